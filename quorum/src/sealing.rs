//! Sealing: HPKE (RFC 9180, X25519 + HKDF-SHA256 + ChaCha20-Poly1305) for shares, and the AEAD
//! for the material itself (design §6).
//!
//! A sealed share opens only under exactly the context that it was made for. Otherwise one who
//! sees a deposit could copy its sealed shares into a deposit of his own, be its owner, and be
//! given the key.

use crate::bytes::{Blob, Hash, PublicKey, SecretBytes};
use crate::codec::{Tagged, decode, encode, sha256, signing_bytes};
use crate::ids::{ClusterId, Epoch, ServerId};
use crate::oprf::Evaluation;
use crate::record::Name;
use crate::request::{Deposit, Passphrase, Reader};
use crate::state::Secret;
use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit as _};
use hpke::aead::ChaCha20Poly1305 as HpkeAead;
use hpke::kdf::HkdfSha256;
use hpke::kem::X25519HkdfSha256 as Kem;
use hpke::{Deserializable as _, Kem as _, OpModeR, OpModeS, Serializable as _};
use rand_core::CryptoRng;
use serde::Serialize;
use std::fmt;
use zeroize::Zeroizing;

/// A private X25519 key that opens what was sealed to it.
pub struct OpeningKey(<Kem as hpke::Kem>::PrivateKey);

/// What does not open: wrong key, wrong context, or changed on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// It does not open.
    #[error("the sealed value does not open")]
    DoesNotOpen,
    /// Not a usable X25519 key.
    #[error("the key to seal to is not sound")]
    BadKey,
}

impl OpeningKey {
    /// Derives a key from 32 random bytes (RFC 9180 §7.1.3).
    pub fn derive(seed: &[u8; 32]) -> Self {
        Self(Kem::derive_keypair(seed).0)
    }
    /// What others seal to.
    pub fn public(&self) -> PublicKey {
        PublicKey(Kem::sk_to_pk(&self.0).to_bytes().into())
    }
    /// Opens what was sealed to this key under this context.
    fn open(&self, info: &[u8], aad: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let (encapsulated, ciphertext) = sealed.split_first_chunk::<32>().ok_or(SealError::DoesNotOpen)?;
        let encapsulated =
            <Kem as hpke::Kem>::EncappedKey::from_bytes(encapsulated).map_err(|_| SealError::DoesNotOpen)?;
        hpke::single_shot_open::<HpkeAead, HkdfSha256, Kem>(
            &OpModeR::Base,
            &self.0,
            &encapsulated,
            info,
            ciphertext,
            aad,
        )
        .map(Zeroizing::new)
        .map_err(|_| SealError::DoesNotOpen)
    }
}
impl fmt::Debug for OpeningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OpeningKey(public {})", self.public())
    }
}

fn seal<R: CryptoRng>(
    to: &PublicKey,
    info: &[u8],
    aad: &[u8],
    plaintext: &[u8],
    rng: &mut R,
) -> Result<Blob, SealError> {
    let to = <Kem as hpke::Kem>::PublicKey::from_bytes(&to.0).map_err(|_| SealError::BadKey)?;
    let (encapsulated, ciphertext) = hpke::single_shot_seal_with_rng::<HpkeAead, HkdfSha256, Kem>(
        &OpModeS::Base,
        &to,
        info,
        plaintext,
        aad,
        rng,
    )
    .map_err(|_| SealError::BadKey)?;
    let mut sealed = encapsulated.to_bytes().to_vec();
    sealed.extend_from_slice(&ciphertext);
    Ok(Blob(sealed))
}

const DEPOSIT: &[u8] = b"kds.deposit-share.1";
const RELEASE: &[u8] = b"kds.release-share.1";
const EVALUATION: &[u8] = b"kds.evaluation.1";

/// What a deposited share is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ShareContext<'a> {
    /// The epoch of the sealing key.
    pub epoch: Epoch,
    /// The server that opens it.
    pub server: ServerId,
    /// The key that signs the deposit.
    pub depositor: PublicKey,
    /// The number of the deposit's request.
    pub client_sequence: u64,
    /// The secret's name.
    pub name: &'a Name,
    /// The secret's owner.
    pub owner: PublicKey,
    /// The secret's readers.
    pub readers: &'a [Reader],
    /// What the secret is behind.
    pub passphrase: Option<&'a Passphrase>,
    /// Digest of the ciphertext.
    pub ciphertext_hash: Hash,
    /// Digest of the data key.
    pub commitment: Hash,
}
impl Tagged for ShareContext<'_> {
    const TAG: &'static str = "kds.share-context";
}

impl<'a> ShareContext<'a> {
    /// The context of one server's share of a deposit, as its request names it.
    pub fn of(deposit: &'a Deposit, server: ServerId, depositor: PublicKey, client_sequence: u64) -> Self {
        Self {
            epoch: deposit.epoch,
            server,
            depositor,
            client_sequence,
            name: &deposit.name,
            owner: deposit.owner,
            readers: &deposit.readers,
            passphrase: deposit.passphrase.as_ref(),
            ciphertext_hash: sha256(&deposit.ciphertext),
            commitment: deposit.commitment,
        }
    }
    /// The same context, from what the state keeps of the deposit.
    pub fn of_secret(secret: &'a Secret, epoch: Epoch, server: ServerId) -> Self {
        Self {
            epoch,
            server,
            depositor: secret.depositor.client,
            client_sequence: secret.depositor.sequence,
            name: &secret.name,
            owner: secret.owner,
            readers: &secret.readers,
            passphrase: secret.passphrase.as_ref(),
            ciphertext_hash: secret.ciphertext_hash,
            commitment: secret.commitment,
        }
    }
    /// Seals a share to its server.
    pub fn seal<R: CryptoRng>(
        &self,
        cluster: &ClusterId,
        to: &PublicKey,
        share: &[u8; 32],
        rng: &mut R,
    ) -> Result<Blob, SealError> {
        seal(to, DEPOSIT, &signing_bytes(cluster, self), share, rng)
    }
    /// Opens a share at its server.
    pub fn open(
        &self,
        cluster: &ClusterId,
        key: &OpeningKey,
        sealed: &[u8],
    ) -> Result<SecretBytes, SealError> {
        share_bytes(key.open(DEPOSIT, &signing_bytes(cluster, self), sealed)?)
    }
}

/// What a share on its way to a reader is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HandOutContext {
    /// The epoch of the share.
    pub epoch: Epoch,
    /// The server that hands it out.
    pub server: ServerId,
    /// Index of the secret.
    pub index: u64,
    /// Number of the release.
    pub release: u64,
}
impl Tagged for HandOutContext {
    const TAG: &'static str = "kds.hand-out-context";
}

impl HandOutContext {
    /// Seals a share to a reader's ephemeral key.
    pub fn seal<R: CryptoRng>(
        &self,
        cluster: &ClusterId,
        to: &PublicKey,
        share: &[u8; 32],
        rng: &mut R,
    ) -> Result<Blob, SealError> {
        seal(to, RELEASE, &signing_bytes(cluster, self), share, rng)
    }
    /// Seals a server's result to the one who guesses.
    pub fn seal_evaluation<R: CryptoRng>(
        &self,
        cluster: &ClusterId,
        to: &PublicKey,
        evaluation: &Evaluation,
        rng: &mut R,
    ) -> Result<Blob, SealError> {
        seal(to, EVALUATION, &signing_bytes(cluster, self), &encode(evaluation), rng)
    }
    /// Opens a server's result.
    pub fn open_evaluation(
        &self,
        cluster: &ClusterId,
        key: &OpeningKey,
        sealed: &[u8],
    ) -> Result<Evaluation, SealError> {
        let opened = key.open(EVALUATION, &signing_bytes(cluster, self), sealed)?;
        decode(&opened).map_err(|_| SealError::DoesNotOpen)
    }
    /// Opens a share at its reader.
    pub fn open(
        &self,
        cluster: &ClusterId,
        key: &OpeningKey,
        sealed: &[u8],
    ) -> Result<SecretBytes, SealError> {
        share_bytes(key.open(RELEASE, &signing_bytes(cluster, self), sealed)?)
    }
}

fn share_bytes(opened: Zeroizing<Vec<u8>>) -> Result<SecretBytes, SealError> {
    <&[u8; 32]>::try_from(opened.as_slice()).map(SecretBytes::new).map_err(|_| SealError::DoesNotOpen)
}

/// What a secret's ciphertext is bound to: moved under another name it does not open.
#[derive(Serialize)]
struct MaterialContext<'a> {
    name: &'a Name,
}
impl Tagged for MaterialContext<'_> {
    const TAG: &'static str = "kds.material";
}

/// Encrypts material under a data key. The key is drawn for this one use, so the nonce is fixed.
pub fn encrypt_material(
    cluster: &ClusterId,
    name: &Name,
    data_key: &[u8; 32],
    material: &[u8],
) -> Result<Blob, SealError> {
    let cipher = ChaCha20Poly1305::new(data_key.into());
    let aad = signing_bytes(cluster, &MaterialContext { name });
    let payload = Payload { msg: material, aad: &aad };
    cipher.encrypt(&Default::default(), payload).map(Blob).map_err(|_| SealError::BadKey)
}

/// Decrypts material.
pub fn decrypt_material(
    cluster: &ClusterId,
    name: &Name,
    data_key: &[u8; 32],
    ciphertext: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    let cipher = ChaCha20Poly1305::new(data_key.into());
    let aad = signing_bytes(cluster, &MaterialContext { name });
    let payload = Payload { msg: ciphertext, aad: &aad };
    cipher.decrypt(&Default::default(), payload).map(Zeroizing::new).map_err(|_| SealError::DoesNotOpen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Element;
    use rand::{SeedableRng, rngs::StdRng};

    fn sample_passphrase(guesses: u32) -> Passphrase {
        Passphrase {
            salt: [1; 16],
            hardness: crate::request::Hardness { memory_kib: 64, passes: 1, lanes: 1 },
            key: Element([2; 32]),
            opener: PublicKey([3; 32]),
            guesses,
        }
    }

    /// Every part of the context that design §6 names is one that a thief would change to make a
    /// copied share open in a deposit of his own.
    #[test]
    fn a_copied_share_opens_for_nobody() {
        let mut rng = StdRng::seed_from_u64(3);
        let cluster = ClusterId(Hash([1; 32]));
        let key = OpeningKey::derive(&[7; 32]);
        let (name, other_name) = (Name::new("s").unwrap(), Name::new("t").unwrap());
        let readers = [Reader::Key(PublicKey([2; 32]))];
        let passphrase = sample_passphrase(10);
        let more_guesses = sample_passphrase(30);
        let good = ShareContext {
            epoch: Epoch(3),
            server: ServerId(1),
            depositor: PublicKey([4; 32]),
            client_sequence: 5,
            name: &name,
            owner: PublicKey([6; 32]),
            readers: &readers,
            passphrase: Some(&passphrase),
            ciphertext_hash: Hash([7; 32]),
            commitment: Hash([8; 32]),
        };
        let share = [9; 32];
        let sealed = good.seal(&cluster, &key.public(), &share, &mut rng).unwrap();
        assert_eq!(*good.open(&cluster, &key, &sealed).unwrap(), share);
        let stolen = [
            ShareContext { epoch: Epoch(4), ..good.clone() },
            ShareContext { server: ServerId(2), ..good.clone() },
            ShareContext { depositor: PublicKey([5; 32]), ..good.clone() },
            ShareContext { client_sequence: 6, ..good.clone() },
            ShareContext { name: &other_name, ..good.clone() },
            ShareContext { owner: PublicKey([7; 32]), ..good.clone() },
            ShareContext { readers: &[], ..good.clone() },
            ShareContext { passphrase: None, ..good.clone() },
            ShareContext { passphrase: Some(&more_guesses), ..good.clone() },
            ShareContext { ciphertext_hash: Hash([0; 32]), ..good.clone() },
            ShareContext { commitment: Hash([0; 32]), ..good.clone() },
        ];
        for context in stolen {
            assert_eq!(context.open(&cluster, &key, &sealed), Err(SealError::DoesNotOpen), "{context:?}");
        }
        assert!(good.open(&ClusterId(Hash([2; 32])), &key, &sealed).is_err());
        assert!(good.open(&cluster, &OpeningKey::derive(&[8; 32]), &sealed).is_err());
        // A deposited share is not a handed-out one.
        let hand_out = HandOutContext { epoch: Epoch(3), server: ServerId(1), index: 1, release: 2 };
        assert!(hand_out.open(&cluster, &key, &sealed).is_err());
        for cut in [0, 31, 40] {
            assert!(good.open(&cluster, &key, &sealed[..cut]).is_err());
        }
    }

    /// The context that servers compute covers everything that the deposit says.
    #[test]
    fn a_changed_deposit_opens_no_share() {
        let mut rng = StdRng::seed_from_u64(3);
        let cluster = ClusterId(Hash([1; 32]));
        let key = OpeningKey::derive(&[7; 32]);
        let good = Deposit {
            name: Name::new("s").unwrap(),
            owner: PublicKey([1; 32]),
            readers: vec![Reader::Key(PublicKey([2; 32]))],
            passphrase: Some(sample_passphrase(10)),
            replaces: None,
            epoch: Epoch(0),
            ciphertext: Blob(vec![3; 40]),
            commitment: Hash([4; 32]),
            shares: vec![],
        };
        fn context(deposit: &Deposit) -> ShareContext<'_> {
            ShareContext::of(deposit, ServerId(1), PublicKey([5; 32]), 6)
        }
        let sealed = context(&good).seal(&cluster, &key.public(), &[9; 32], &mut rng).unwrap();
        assert!(context(&good).open(&cluster, &key, &sealed).is_ok());
        let changes: [&dyn Fn(&mut Deposit); 8] = [
            &|deposit| deposit.name = Name::new("t").unwrap(),
            &|deposit| deposit.owner = PublicKey([0; 32]),
            &|deposit| deposit.readers.clear(),
            &|deposit| deposit.passphrase = None,
            &|deposit| deposit.passphrase = Some(sample_passphrase(30)),
            &|deposit| deposit.epoch = Epoch(1),
            &|deposit| deposit.ciphertext.0[0] ^= 1,
            &|deposit| deposit.commitment = Hash([0; 32]),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut changed = good.clone();
            change(&mut changed);
            assert!(context(&changed).open(&cluster, &key, &sealed).is_err(), "change {index}");
        }
    }

    #[test]
    fn material_opens_under_its_name_only() {
        let cluster = ClusterId(Hash([1; 32]));
        let (name, other) = (Name::new("s").unwrap(), Name::new("t").unwrap());
        let ciphertext = encrypt_material(&cluster, &name, &[1; 32], b"hello").unwrap();
        assert_eq!(&**decrypt_material(&cluster, &name, &[1; 32], &ciphertext).unwrap(), b"hello");
        assert!(decrypt_material(&cluster, &other, &[1; 32], &ciphertext).is_err());
        assert!(decrypt_material(&cluster, &name, &[2; 32], &ciphertext).is_err());
    }

    #[test]
    fn a_zero_key_is_not_sealed_to() {
        let mut rng = StdRng::seed_from_u64(3);
        let context = HandOutContext { epoch: Epoch(0), server: ServerId(0), index: 0, release: 0 };
        let result = context.seal(&ClusterId(Hash([0; 32])), &PublicKey([0; 32]), &[1; 32], &mut rng);
        assert_eq!(result.unwrap_err(), SealError::BadKey);
    }
}
