//! Signatures: one rule of validity, and keys that an identity key certifies.
//!
//! A server's long-term **identity** key signs nothing but [`KeyCertificate`]s for the keys that
//! it votes, opens shares and makes links with, each for one epoch (design §7). Votes carry only the server's id; a [`Keyring`]
//! knows which voting keys its identity has certified.
//!
//! Bytes from outside become [`Signed`] by decoding and [`Verified`] only by a check here; the
//! replica accepts nothing less.

use crate::bytes::{Hash, PublicKey, SignatureBytes};
use crate::codec::{Tagged, signing_bytes};
use crate::ids::{ClusterId, Epoch, ServerId};
use crate::limits::KEYS_PER_SERVER;
use crate::manifest::Manifest;
use crate::membership::Membership;
use ed25519_dalek::{Signature, Signer as _, VerifyingKey};
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use zeroize::Zeroizing;

/// A private Ed25519 key. Zeroized when dropped, never printed.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

impl SigningKey {
    /// Draws a key.
    pub fn generate<R: CryptoRng>(rng: &mut R) -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *seed);
        Self::from_seed(&seed)
    }
    /// From its 32-byte seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }
    /// The 32-byte seed, for key files.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.0.to_bytes())
    }
    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }
    /// Signs a tagged value for one cluster.
    pub fn sign<T: Tagged>(&self, cluster: &ClusterId, value: &T) -> SignatureBytes {
        SignatureBytes(self.0.sign(&signing_bytes(cluster, value)).to_bytes())
    }
}
impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(public {})", self.public())
    }
}

/// Whether a key is one that a signature can be trusted under: a canonical point that is not of
/// small order (with those, one signature fits many messages).
pub fn is_sound_key(key: &PublicKey) -> bool {
    VerifyingKey::from_bytes(&key.0).is_ok_and(|key| !key.is_weak())
}

/// The one rule of signature validity (design §3): `verify_strict`.
pub fn verify<T: Tagged>(
    cluster: &ClusterId,
    key: &PublicKey,
    value: &T,
    signature: &SignatureBytes,
) -> Result<(), SignatureError> {
    let key = VerifyingKey::from_bytes(&key.0).map_err(|_| SignatureError)?;
    verify_with(cluster, &key, value, signature)
}

fn verify_with<T: Tagged>(
    cluster: &ClusterId,
    key: &VerifyingKey,
    value: &T,
    signature: &SignatureBytes,
) -> Result<(), SignatureError> {
    let signature = Signature::from_bytes(&signature.0);
    key.verify_strict(&signing_bytes(cluster, value), &signature).map_err(|_| SignatureError)
}

/// A signature that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct SignatureError;

/// What a certified key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyPurpose {
    /// Signs ordering messages, checkpoints and Held statements.
    Voting,
    /// Opens shares that clients deposit (HPKE).
    Sealing,
    /// Proves the server to others on their links; the digest of the key, which is not of this kind.
    Tls,
}

/// What an identity key says about another key of its server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyStatement {
    /// Whose key.
    pub server: ServerId,
    /// What it may be used for.
    pub purpose: KeyPurpose,
    /// The epoch that the key is for.
    pub epoch: Epoch,
    /// Rises with every key of this server and purpose.
    pub serial: u64,
    /// The key.
    pub key: PublicKey,
}
impl Tagged for KeyStatement {
    const TAG: &'static str = "kds.key-statement";
}

/// A key statement signed by the server's identity key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyCertificate {
    /// What is certified.
    pub statement: KeyStatement,
    /// By the identity key.
    pub signature: SignatureBytes,
}

impl KeyCertificate {
    /// Certifies a key.
    pub fn issue(cluster: &ClusterId, identity: &SigningKey, statement: KeyStatement) -> Self {
        Self { statement, signature: identity.sign(cluster, &statement) }
    }
    /// Checks it against the identity that the server has in the epoch of the key.
    pub fn verify(&self, membership: &Membership) -> Result<(), KeyError> {
        let KeyStatement { server, epoch, .. } = self.statement;
        let identity = membership.identity(server, epoch).ok_or(KeyError::UnknownServer(server))?;
        verify(membership.cluster(), &identity, &self.statement, &self.signature)
            .map_err(|_| KeyError::NotCertified(server))
    }
}

/// Why a key or a vote under it is refused. Names the server it is blamed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not in the manifest.
    #[error("server {0} is not in the manifest")]
    UnknownServer(ServerId),
    /// The identity key did not sign this.
    #[error("server {0}'s key is not certified by its identity key")]
    NotCertified(ServerId),
    /// No certified voting key of this server is known here.
    #[error("no certified voting key of server {0} is known")]
    NoKey(ServerId),
    /// No known voting key of the server made the signature.
    #[error("server {0}'s signature does not verify")]
    BadSignature(ServerId),
    /// The signature verifies under a key of an epoch that the statement does not belong to.
    #[error("server {0}'s signature is under a key of another epoch")]
    OtherEpoch(ServerId),
}

/// A certified voting key, ready to verify with.
#[derive(Clone)]
pub struct VotingKey {
    certificate: KeyCertificate,
    key: VerifyingKey,
}

/// The certified voting keys of the cluster's servers, ready to verify with.
///
/// Voting keys are renewed with every epoch, and a thief may have those of epochs that are over. A
/// statement that names its epoch counts under a key of that epoch only. Any other counts under keys
/// from the *floor* on, which whoever follows the log sets to the epoch before the current one: what is on
/// its way when an epoch begins was signed in the last one.
#[derive(Clone)]
pub struct Keyring {
    membership: Arc<Membership>,
    keys: BTreeMap<ServerId, Vec<VotingKey>>,
    floor: Epoch,
}

impl Keyring {
    /// Knows who the servers are, and no voting key yet.
    pub fn of(membership: Arc<Membership>) -> Self {
        Self { membership, keys: BTreeMap::new(), floor: Epoch(0) }
    }
    /// The same for a cluster whose servers are as the manifest has them.
    pub fn new(manifest: Arc<Manifest>) -> Self {
        Self::of(Membership::genesis(manifest))
    }
    /// Who the servers are.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }
    /// Takes note of who the servers are. Keys that an identity certified for epochs in which it is not the
    /// server's any more are forgotten.
    pub fn follow(&mut self, membership: &Arc<Membership>) {
        if !Arc::ptr_eq(&self.membership, membership) {
            let before = std::mem::replace(&mut self.membership, Arc::clone(membership));
            for (server, keys) in &mut self.keys {
                let identity =
                    |by: &Membership, key: &VotingKey| by.identity(*server, key.certificate.statement.epoch);
                keys.retain(|key| identity(&before, key) == identity(membership, key));
            }
        }
    }
    /// Keys of earlier epochs than this do not count any more.
    pub fn set_floor(&mut self, floor: Epoch) {
        self.floor = floor;
    }
    /// The cluster that all signatures are bound to.
    pub fn cluster(&self) -> &ClusterId {
        self.membership.cluster()
    }
    /// The cluster's manifest.
    pub fn manifest(&self) -> &Arc<Manifest> {
        self.membership.manifest()
    }
    /// Adds a voting key after checking its certificate; says whether it is new. The newest
    /// [`KEYS_PER_SERVER`] of a server stay, so that a liar's many keys cost nothing.
    pub fn add(&mut self, certificate: KeyCertificate) -> Result<bool, KeyError> {
        let new = !self.knows(&certificate);
        self.checked(certificate).map(|_| new)
    }
    /// A voting key whose certificate holds; remembers it.
    fn checked(&mut self, certificate: KeyCertificate) -> Result<VotingKey, KeyError> {
        let statement = certificate.statement;
        let known = self.keys.get(&statement.server).into_iter().flatten();
        if let Some(known) = known.into_iter().find(|key| key.certificate == certificate) {
            return Ok(known.clone());
        }
        if statement.purpose != KeyPurpose::Voting {
            return Err(KeyError::NotCertified(statement.server));
        }
        certificate.verify(&self.membership)?;
        let key = VerifyingKey::from_bytes(&statement.key.0)
            .map_err(|_| KeyError::NotCertified(statement.server))?;
        let keys = self.keys.entry(statement.server).or_default();
        let checked = VotingKey { certificate, key };
        keys.push(checked.clone());
        keys.sort_by_key(|key| {
            std::cmp::Reverse((key.certificate.statement.epoch, key.certificate.statement.serial))
        });
        keys.truncate(KEYS_PER_SERVER);
        Ok(checked)
    }
    /// The keys that a proof carries, checked. They may be older than those that are remembered.
    pub fn carried(&mut self, certificates: &[KeyCertificate]) -> Result<Vec<VotingKey>, KeyError> {
        certificates.iter().map(|certificate| self.checked(*certificate)).collect()
    }
    /// Whether this very certificate has been checked before.
    pub fn knows(&self, certificate: &KeyCertificate) -> bool {
        self.keys
            .get(&certificate.statement.server)
            .is_some_and(|keys| keys.iter().any(|key| key.certificate == *certificate))
    }
    /// Checks a server's signature on a value; returns the key certificate that it verified under.
    pub fn verify<T: Tagged>(
        &self,
        server: ServerId,
        value: &T,
        signature: &SignatureBytes,
    ) -> Result<KeyCertificate, KeyError> {
        self.verify_with(&[], server, value, signature)
    }
    /// The same, with keys that came along.
    pub fn verify_with<T: Tagged>(
        &self,
        carried: &[VotingKey],
        server: ServerId,
        value: &T,
        signature: &SignatureBytes,
    ) -> Result<KeyCertificate, KeyError> {
        let key = self.made_by(carried, server, value, signature)?;
        let of = key.statement.epoch;
        let counts = match value.epoch() {
            Some(epoch) => of == epoch,
            None => of >= self.floor,
        };
        if counts { Ok(key) } else { Err(KeyError::OtherEpoch(server)) }
    }
    /// The key that made a signature, of whatever epoch.
    fn made_by<T: Tagged>(
        &self,
        carried: &[VotingKey],
        server: ServerId,
        value: &T,
        signature: &SignatureBytes,
    ) -> Result<KeyCertificate, KeyError> {
        let of_server = |key: &&VotingKey| key.certificate.statement.server == server;
        let known = self.keys.get(&server).into_iter().flatten();
        let mut keys = carried.iter().filter(of_server).chain(known).peekable();
        keys.peek().ok_or(KeyError::NoKey(server))?;
        keys.find(|key| verify_with(self.cluster(), &key.key, value, signature).is_ok())
            .map(|key| key.certificate)
            .ok_or(KeyError::BadSignature(server))
    }
    /// The same, with the key that came along.
    pub fn check_with<T: Tagged>(
        &mut self,
        key: KeyCertificate,
        signed: Signed<T>,
    ) -> Result<Verified<T>, KeyError> {
        let carried = self.carried(&[key])?;
        let key = self.verify_with(&carried, signed.server, &signed.body, &signed.signature)?;
        Ok(Verified { signed, key })
    }
    /// Checks a message that promises nothing, from a server that may have missed epochs; not from somebody
    /// whose identity is no longer that server's.
    pub fn check_of_any_epoch<T: Tagged>(&self, signed: Signed<T>) -> Result<Verified<T>, KeyError> {
        let key = self.made_by(&[], signed.server, &signed.body, &signed.signature)?;
        match self.membership.is_replaced(signed.server, key.statement.epoch, self.floor) {
            false => Ok(Verified { signed, key }),
            true => Err(KeyError::OtherEpoch(signed.server)),
        }
    }
    /// Checks what a server said once, under the key that comes along.
    pub fn verify_past<T: Tagged>(
        &mut self,
        signed: &Signed<T>,
        key: &KeyCertificate,
    ) -> Result<(), KeyError> {
        let carried = self.carried(&[*key])?;
        self.made_by(&carried, signed.server, &signed.body, &signed.signature).map(drop)
    }
    /// Turns a signed message into one that the replica accepts.
    pub fn check<T: Tagged>(&self, signed: Signed<T>) -> Result<Verified<T>, KeyError> {
        let key = self.verify(signed.server, &signed.body, &signed.signature)?;
        Ok(Verified { signed, key })
    }
}
impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring of {} servers", self.keys.len())
    }
}

/// A server's statement and its signature: not yet checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed<T> {
    /// What is said.
    pub body: T,
    /// Who says it.
    pub server: ServerId,
    /// Under a certified voting key of that server.
    pub signature: SignatureBytes,
}

/// A server's statement whose signature has been checked. Made only by [`Keyring::check`] and,
/// for its own statements, by [`Voter::sign`].
#[derive(Clone, Debug)]
pub struct Verified<T> {
    signed: Signed<T>,
    key: KeyCertificate,
}

impl<T> Verified<T> {
    /// What is said.
    pub fn body(&self) -> &T {
        &self.signed.body
    }
    /// Who says it.
    pub fn server(&self) -> ServerId {
        self.signed.server
    }
    /// The signed form, to send on or store.
    pub fn signed(&self) -> &Signed<T> {
        &self.signed
    }
    /// The vote alone, for a certificate that states the body once.
    pub fn vote(&self) -> (Vote, KeyCertificate) {
        (Vote { server: self.signed.server, signature: self.signed.signature }, self.key)
    }
    /// With the certificate of its key, to write to disk or to pass on.
    pub fn stored(&self) -> (Signed<T>, KeyCertificate)
    where
        T: Clone,
    {
        (self.signed.clone(), self.key)
    }
    /// The certificate of the key that it verified under.
    pub fn key(&self) -> &KeyCertificate {
        &self.key
    }
}

/// One server's signature on a statement that stands elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vote {
    /// Who signed.
    pub server: ServerId,
    /// The signature.
    pub signature: SignatureBytes,
}

/// A server's voting key together with its certificate.
#[derive(Clone, Debug)]
pub struct Voter {
    cluster: ClusterId,
    key: SigningKey,
    certificate: KeyCertificate,
}

impl Voter {
    /// Pairs a voting key with the certificate that its server's identity key gave it.
    pub fn new(cluster: ClusterId, key: SigningKey, certificate: KeyCertificate) -> Option<Self> {
        let fits =
            certificate.statement.key == key.public() && certificate.statement.purpose == KeyPurpose::Voting;
        fits.then_some(Self { cluster, key, certificate })
    }
    /// Draws a voting key and has the identity certify it.
    pub fn generate<R: CryptoRng>(
        cluster: ClusterId,
        identity: &SigningKey,
        server: ServerId,
        epoch: Epoch,
        serial: u64,
        rng: &mut R,
    ) -> Self {
        let key = SigningKey::generate(rng);
        let statement =
            KeyStatement { server, purpose: KeyPurpose::Voting, epoch, serial, key: key.public() };
        Self { cluster, certificate: KeyCertificate::issue(&cluster, identity, statement), key }
    }
    /// The epoch that its key is certified for.
    pub fn epoch(&self) -> Epoch {
        self.certificate.statement.epoch
    }
    /// The server that votes.
    pub fn server(&self) -> ServerId {
        self.certificate.statement.server
    }
    /// The certificate of the voting key.
    pub fn certificate(&self) -> &KeyCertificate {
        &self.certificate
    }
    /// The key itself, which also signs this server's own requests.
    pub fn key(&self) -> &SigningKey {
        &self.key
    }
    /// Makes a statement.
    pub fn sign<T: Tagged>(&self, body: T) -> Verified<T> {
        let signature = self.key.sign(&self.cluster, &body);
        Verified { signed: Signed { body, server: self.server(), signature }, key: self.certificate }
    }
}

/// The digest under which a key is indexed and shown: SHA-256 of its bytes.
pub fn fingerprint(bytes: &[u8]) -> Hash {
    crate::codec::sha256(bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::manifest::tests::sample;
    use rand::{SeedableRng, rngs::StdRng};

    #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
    struct Note(u64);
    impl Tagged for Note {
        const TAG: &'static str = "test.note";
    }

    #[test]
    fn only_the_identity_can_certify_a_voting_key() {
        let (manifest, identities) = sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = StdRng::seed_from_u64(1);
        let mut keyring = Keyring::new(Arc::new(manifest));
        let voter = Voter::generate(cluster, &identities[2], ServerId(2), Epoch(0), 0, &mut rng);
        let note = voter.sign(Note(1)).signed().clone();
        assert_eq!(keyring.check(note.clone()).unwrap_err(), KeyError::NoKey(ServerId(2)));
        assert_eq!(keyring.add(*voter.certificate()), Ok(true));
        assert_eq!(keyring.add(*voter.certificate()), Ok(false));
        assert!(keyring.check(note.clone()).is_ok());
        // Server 1 certifies a key in server 2's name.
        let forged = Voter::generate(cluster, &identities[1], ServerId(2), Epoch(0), 9, &mut rng);
        assert_eq!(keyring.add(*forged.certificate()), Err(KeyError::NotCertified(ServerId(2))));
        // Another server's vote in this one's name.
        let stolen = Signed { server: ServerId(2), ..forged.sign(Note(1)).signed().clone() };
        assert_eq!(keyring.check(stolen).unwrap_err(), KeyError::BadSignature(ServerId(2)));
        // A changed body.
        assert!(keyring.check(Signed { body: Note(2), ..note }).is_err());
    }

    #[test]
    fn keys_of_epochs_that_are_over_do_not_count() {
        let (manifest, identities) = sample(4);
        let (cluster, mut rng) = (manifest.cluster_id(), StdRng::seed_from_u64(1));
        let mut keyring = Keyring::new(Arc::new(manifest));
        let mut voter =
            |epoch| Voter::generate(cluster, &identities[2], ServerId(2), Epoch(epoch), epoch, &mut rng);
        let voters: Vec<_> = (3..9).map(&mut voter).collect();
        for voter in &voters[..3] {
            keyring.add(*voter.certificate()).unwrap();
        }
        keyring.set_floor(Epoch(4));
        let note = |voter: &Voter| voter.sign(Note(1)).signed().clone();
        assert_eq!(keyring.check(note(&voters[0])).unwrap_err(), KeyError::OtherEpoch(ServerId(2)));
        assert!(keyring.check(note(&voters[1])).is_ok() && keyring.check(note(&voters[2])).is_ok());
        assert!(keyring.check_of_any_epoch(note(&voters[0])).is_ok(), "whoever slept asks for help");
        // What came along counts whatever is remembered, and what is remembered is bounded.
        for voter in &voters[3..] {
            keyring.add(*voter.certificate()).unwrap();
        }
        assert_eq!(keyring.check(note(&voters[1])).unwrap_err(), KeyError::BadSignature(ServerId(2)));
        assert!(keyring.check_with(*voters[1].certificate(), note(&voters[1])).is_ok());
        assert!(keyring.verify_past(&note(&voters[0]), voters[0].certificate()).is_ok());
        assert!(keyring.verify_past(&note(&voters[0]), voters[1].certificate()).is_err());
    }

    #[test]
    fn weak_keys_are_not_sound() {
        assert!(!is_sound_key(&PublicKey([0; 32])));
        let mut identity_point = [0; 32];
        identity_point[0] = 1;
        assert!(!is_sound_key(&PublicKey(identity_point)));
        assert!(is_sound_key(&SigningKey::from_seed(&[3; 32]).public()));
    }

    #[test]
    fn a_private_key_is_never_printed() {
        let key = SigningKey::from_seed(&[0x5a; 32]);
        let text = format!("{key:?}");
        assert!(!text.contains("90, 90") && !text.contains("5a5a") && !text.contains("WlpaWlpa"));
    }
}
