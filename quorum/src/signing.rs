//! Signatures: one rule of validity, and keys that an identity key certifies.
//!
//! A server's long-term **identity** key signs nothing but [`KeyCertificate`]s for the keys that
//! it votes, opens shares and makes links with, each for one epoch (design §7). Votes carry only the server's id; a [`Keyring`]
//! knows which voting keys its identity has certified.
//!
//! Every statement that a server votes with names the attempt by which its epoch began ([`Statement`]), and counts
//! under voting keys that were certified for that attempt and no other. This is the one place that says so:
//! keys that were stolen in several epochs, one server's in each, never add up to a quorum.
//!
//! Bytes from outside become [`Signed`] by decoding and [`Verified`] only by a check here; the
//! replica accepts nothing less.

use crate::bytes::{Hash, PublicKey, SignatureBytes};
use crate::codec::{Tagged, signing_bytes};
use crate::ids::{AttemptId, ClusterId, Epoch, ServerId};
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

/// A private Ed25519 key: in one place, wherever it is moved to and however often it is cloned. Zeroized with the last
/// clone, never printed.
#[derive(Clone)]
pub struct SigningKey(Arc<ed25519_dalek::SigningKey>);

impl SigningKey {
    /// Draws a key.
    pub fn generate<R: CryptoRng>(rng: &mut R) -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        rng.fill_bytes(&mut *seed);
        Self::from_seed(&seed)
    }
    /// From its 32-byte seed.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(Arc::new(ed25519_dalek::SigningKey::from_bytes(seed)))
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
    /// By which attempt at it: keys of an attempt that came to nothing never count.
    pub attempt: u32,
    /// Rises with every key of this server and purpose.
    pub serial: u64,
    /// The key.
    pub key: PublicKey,
}
impl Tagged for KeyStatement {
    const TAG: &'static str = "kds.key-statement";
}
impl KeyStatement {
    /// The attempt that the key is for.
    pub fn attempt_id(&self) -> AttemptId {
        AttemptId { epoch: self.epoch, attempt: self.attempt }
    }
}

/// What a server signs with a voting key.
pub trait Statement: Tagged {
    /// The attempt by which the epoch began that it belongs to: keys certified for it alone may sign it. Of a
    /// statement about a sequence number, that is the epoch in which that number lies (design §7).
    fn attempt(&self) -> AttemptId;
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
    /// No key of the epoch that the statement names is known here, or the server has another identity by now.
    #[error("server {0}'s statement is of an epoch that no key of it is known for")]
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
/// Voting keys are renewed with every epoch, and an adversary may have those of epochs that are over. A
/// statement holds under a key of the attempt that it names; whether that is worth anything now is the
/// receiver's to judge.
#[derive(Clone)]
pub struct Keyring {
    membership: Arc<Membership>,
    keys: BTreeMap<ServerId, Vec<VotingKey>>,
    /// The epoch that its owner is in.
    current: Epoch,
}

impl Keyring {
    /// Knows who the servers are, and no voting key yet.
    pub fn of(membership: Arc<Membership>) -> Self {
        Self { membership, keys: BTreeMap::new(), current: Epoch(0) }
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
    /// Takes note of the epoch: a server that has another identity in it is not spoken to as the old one.
    pub fn set_epoch(&mut self, current: Epoch) {
        self.current = current;
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
    /// Checks a server's statement; returns the certificate of the key that it verified under.
    pub fn verify<T: Statement>(
        &self,
        server: ServerId,
        statement: &T,
        signature: &SignatureBytes,
    ) -> Result<KeyCertificate, KeyError> {
        self.verify_with(&[], server, statement, signature)
    }
    /// The same, with keys that came along.
    pub fn verify_with<T: Statement>(
        &self,
        carried: &[VotingKey],
        server: ServerId,
        statement: &T,
        signature: &SignatureBytes,
    ) -> Result<KeyCertificate, KeyError> {
        let attempt = statement.attempt();
        let known = self.keys.get(&server).into_iter().flatten();
        let of_server = |key: &&VotingKey| key.certificate.statement.server == server;
        let mut keys = carried.iter().filter(of_server).chain(known).peekable();
        keys.peek().ok_or(KeyError::NoKey(server))?;
        let mut keys = keys.filter(|key| key.certificate.statement.attempt_id() == attempt).peekable();
        keys.peek().ok_or(KeyError::OtherEpoch(server))?;
        keys.find(|key| verify_with(self.cluster(), &key.key, statement, signature).is_ok())
            .map(|key| key.certificate)
            .ok_or(KeyError::BadSignature(server))
    }
    /// Checks a statement under one key that was checked before, and that was certified for its attempt.
    pub fn verify_under<T: Statement>(
        &self,
        key: &VotingKey,
        statement: &T,
        signature: &SignatureBytes,
    ) -> Result<(), KeyError> {
        let KeyStatement { server, .. } = key.certificate.statement;
        if key.certificate.statement.attempt_id() != statement.attempt() {
            return Err(KeyError::OtherEpoch(server));
        }
        verify_with(self.cluster(), &key.key, statement, signature)
            .map_err(|_| KeyError::BadSignature(server))
    }
    /// Checks a message that comes with the certificate of its author's key.
    pub fn check_with<T: Statement>(
        &mut self,
        key: KeyCertificate,
        signed: Signed<T>,
    ) -> Result<Verified<T>, KeyError> {
        let carried = self.carried(&[key])?;
        let key = self.verify_with(&carried, signed.server, &signed.body, &signed.signature)?;
        Ok(Verified { signed, key })
    }
    /// Turns a signed message into one that the replica accepts. Not from somebody whose identity is no longer
    /// that server's.
    pub fn check<T: Statement>(&self, signed: Signed<T>) -> Result<Verified<T>, KeyError> {
        let key = self.verify(signed.server, &signed.body, &signed.signature)?;
        if self.membership.is_replaced(signed.server, key.statement.epoch, self.current) {
            return Err(KeyError::OtherEpoch(signed.server));
        }
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
    /// The same, of one that is needed no more.
    pub fn into_stored(self) -> (Signed<T>, KeyCertificate) {
        (self.signed, self.key)
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
        AttemptId { epoch, attempt }: AttemptId,
        serial: u64,
        rng: &mut R,
    ) -> Self {
        let (key, purpose) = (SigningKey::generate(rng), KeyPurpose::Voting);
        let statement = KeyStatement { server, purpose, epoch, attempt, serial, key: key.public() };
        Self { cluster, certificate: KeyCertificate::issue(&cluster, identity, statement), key }
    }
    /// The attempt that its key is certified for.
    pub fn attempt(&self) -> AttemptId {
        self.certificate.statement.attempt_id()
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
    /// Makes a statement; under a key of another attempt than it names nobody will believe it.
    pub fn sign<T: Statement>(&self, body: T) -> Verified<T> {
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
    struct Note(u64, AttemptId);
    impl Tagged for Note {
        const TAG: &'static str = "test.note";
    }
    impl Statement for Note {
        fn attempt(&self) -> AttemptId {
            self.1
        }
    }

    #[test]
    fn only_the_identity_can_certify_a_voting_key() {
        let (manifest, identities) = sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = StdRng::seed_from_u64(1);
        let mut keyring = Keyring::new(Arc::new(manifest));
        let voter = Voter::generate(cluster, &identities[2], ServerId(2), AttemptId::default(), 0, &mut rng);
        let note = voter.sign(Note(1, AttemptId::default())).signed().clone();
        assert_eq!(keyring.check(note.clone()).unwrap_err(), KeyError::NoKey(ServerId(2)));
        assert_eq!(keyring.add(*voter.certificate()), Ok(true));
        assert_eq!(keyring.add(*voter.certificate()), Ok(false));
        assert!(keyring.check(note.clone()).is_ok());
        // Server 1 certifies a key in server 2's name.
        let forged = Voter::generate(cluster, &identities[1], ServerId(2), AttemptId::default(), 9, &mut rng);
        assert_eq!(keyring.add(*forged.certificate()), Err(KeyError::NotCertified(ServerId(2))));
        // Another server's vote in this one's name.
        let stolen =
            Signed { server: ServerId(2), ..forged.sign(Note(1, AttemptId::default())).signed().clone() };
        assert_eq!(keyring.check(stolen).unwrap_err(), KeyError::BadSignature(ServerId(2)));
        // A changed body.
        assert!(keyring.check(Signed { body: Note(2, AttemptId::default()), ..note }).is_err());
    }

    /// A statement holds under keys of the attempt that it names: not of another epoch, nor of an attempt that
    /// came to nothing.
    #[test]
    fn a_statement_holds_under_keys_of_its_own_attempt_only() {
        let (manifest, identities) = sample(4);
        let (cluster, mut rng) = (manifest.cluster_id(), StdRng::seed_from_u64(1));
        let mut keyring = Keyring::new(Arc::new(manifest));
        let attempts = [(3, 1), (4, 1), (5, 1), (5, 2), (6, 1)];
        let attempts = attempts.map(|(epoch, attempt)| AttemptId { epoch: Epoch(epoch), attempt });
        let mut voter =
            |of| Voter::generate(cluster, &identities[2], ServerId(2), of, attempts.len() as u64, &mut rng);
        let voters = attempts.map(&mut voter);
        for voter in &voters[..4] {
            keyring.add(*voter.certificate()).unwrap();
        }
        let other = Err(KeyError::OtherEpoch(ServerId(2)));
        for (made, said) in (0..4).flat_map(|made| (0..4).map(move |said| (made, said))) {
            let note = voters[made].sign(Note(1, attempts[said])).signed().clone();
            let bad = Err(KeyError::BadSignature(ServerId(2)));
            let expected = if made == said { Ok(()) } else { bad };
            assert_eq!(keyring.check(note.clone()).map(drop), expected, "{made} {said}");
            // The key that made it may come along: that is no help.
            let along = keyring.check_with(*voters[made].certificate(), note).map(drop);
            assert_eq!(along, expected, "{made} {said}");
        }
        let late = voters[4].sign(Note(1, attempts[4])).signed().clone();
        assert_eq!(keyring.check(late.clone()).map(drop), other);
        // What came along counts whatever is remembered, and what is remembered is bounded.
        keyring.add(*voters[4].certificate()).unwrap();
        assert!(keyring.check(late).is_ok());
        let first = voters[0].sign(Note(1, attempts[0])).signed().clone();
        assert_eq!(keyring.check(first.clone()).map(drop), other);
        assert!(keyring.check_with(*voters[0].certificate(), first).is_ok());
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
