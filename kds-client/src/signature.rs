//! Signatures under the keys that a name stands for.
//!
//! The key says which algorithm counts, never the signature: Ed25519 by the strict rule that the
//! service itself uses, ECDSA with the hash of its curve's size (ASN.1 or fixed length), RSA of 2048 bits
//! or more with SHA-2 (PKCS #1 v1.5 or PSS). A signature made by `ssh-keygen -Y sign` (SSHSIG) counts for
//! keys of any form, if it was made for [`SSH_NAMESPACE`].

use crate::client::Client;
use crate::error::ClientError;
use crate::lookup::usable;
use aws_lc_rs::signature::{self as lc, UnparsedPublicKey};
use quorum::PublicKey;
use quorum::record::{KeyMaterial, Name};
use ssh_key::public::KeyData;
use ssh_key::{HashAlg, SshSig};
use x509_parser::oid_registry as oid;
use x509_parser::prelude::FromDer as _;
use x509_parser::public_key::PublicKey as X509Key;
use x509_parser::x509::SubjectPublicKeyInfo;

/// The namespace of SSH signatures that are accepted: `ssh-keygen -Y sign -n file`.
pub const SSH_NAMESPACE: &str = "file";

/// Why a signature does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// None of the keys can sign: age recipients, say.
    #[error("none of the keys is one that signs (Ed25519, ECDSA or RSA)")]
    NoSigningKey,
    /// No key of the record verifies it.
    #[error("the signature does not verify under any of the keys")]
    Wrong,
    /// A broken SSH signature, or one for something else.
    #[error("not a usable SSH signature: {0}")]
    Ssh(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Curve {
    P256,
    P384,
    P521,
}

impl Curve {
    fn bytes(self) -> usize {
        match self {
            Self::P256 => 32,
            Self::P384 => 48,
            Self::P521 => 66,
        }
    }
}

/// A key that signs, whatever form it is registered in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SigningForm {
    Ed25519(PublicKey),
    /// The uncompressed point.
    Ecdsa(CurveName, Vec<u8>),
    /// Modulus and exponent, big-endian without leading zeros.
    Rsa(Vec<u8>, Vec<u8>),
}

/// Which curve; opaque outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CurveName(Curve);

/// Without the zeros that keep a big-endian number positive.
fn trimmed(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().skip_while(|byte| *byte == 0).collect()
}

/// The key in a SubjectPublicKeyInfo.
pub(crate) fn of_spki(spki: &SubjectPublicKeyInfo<'_>) -> Option<SigningForm> {
    if spki.algorithm.algorithm == oid::OID_SIG_ED25519 {
        let key = <[u8; 32]>::try_from(&*spki.subject_public_key.data).ok()?;
        return Some(SigningForm::Ed25519(PublicKey(key)));
    }
    match spki.parsed().ok()? {
        X509Key::RSA(rsa) => Some(SigningForm::Rsa(trimmed(rsa.modulus), trimmed(rsa.exponent))),
        X509Key::EC(point) => {
            let curve = spki.algorithm.parameters.as_ref()?.as_oid().ok()?;
            let curve = match () {
                () if curve == oid::OID_EC_P256 => Curve::P256,
                () if curve == oid::OID_NIST_EC_P384 => Curve::P384,
                () if curve == oid::OID_NIST_EC_P521 => Curve::P521,
                () => return None,
            };
            Some(SigningForm::Ecdsa(CurveName(curve), point.data().to_vec()))
        }
        _ => None,
    }
}

fn of_ssh(key: &KeyData) -> Option<SigningForm> {
    use ssh_key::public::EcdsaPublicKey;
    Some(match key {
        KeyData::Ed25519(key) => SigningForm::Ed25519(PublicKey(key.0)),
        KeyData::Rsa(key) => {
            SigningForm::Rsa(key.n.as_positive_bytes()?.to_vec(), key.e.as_positive_bytes()?.to_vec())
        }
        KeyData::Ecdsa(key) => {
            let curve = match key {
                EcdsaPublicKey::NistP256(_) => Curve::P256,
                EcdsaPublicKey::NistP384(_) => Curve::P384,
                EcdsaPublicKey::NistP521(_) => Curve::P521,
            };
            SigningForm::Ecdsa(CurveName(curve), key.as_sec1_bytes().to_vec())
        }
        _ => return None,
    })
}

/// The key, if it is one that signs.
pub(crate) fn signing_form(material: &KeyMaterial) -> Option<SigningForm> {
    match material.algorithm.as_str() {
        "ed25519" => Some(SigningForm::Ed25519(PublicKey(<[u8; 32]>::try_from(&*material.key).ok()?))),
        "spki" => of_spki(&SubjectPublicKeyInfo::from_der(&material.key).ok()?.1),
        "x509" => {
            let (_, certificate) = x509_parser::certificate::X509Certificate::from_der(&material.key).ok()?;
            of_spki(certificate.public_key())
        }
        "age-x25519" => None,
        _ => of_ssh(ssh_key::PublicKey::from_bytes(&material.key).ok()?.key_data()),
    }
}

impl SigningForm {
    fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::Ed25519(key) => ed25519(key, message, signature),
            Self::Ecdsa(CurveName(curve), point) => {
                let rules: [&dyn lc::VerificationAlgorithm; 2] = match curve {
                    Curve::P256 => [&lc::ECDSA_P256_SHA256_ASN1, &lc::ECDSA_P256_SHA256_FIXED],
                    Curve::P384 => [&lc::ECDSA_P384_SHA384_ASN1, &lc::ECDSA_P384_SHA384_FIXED],
                    Curve::P521 => [&lc::ECDSA_P521_SHA512_ASN1, &lc::ECDSA_P521_SHA512_FIXED],
                };
                let holds = |rule| UnparsedPublicKey::new(rule, point).verify(message, signature).is_ok();
                rules.into_iter().any(holds)
            }
            Self::Rsa(n, e) => {
                let rules = [
                    &lc::RSA_PKCS1_2048_8192_SHA256,
                    &lc::RSA_PKCS1_2048_8192_SHA384,
                    &lc::RSA_PKCS1_2048_8192_SHA512,
                    &lc::RSA_PSS_2048_8192_SHA256,
                    &lc::RSA_PSS_2048_8192_SHA384,
                    &lc::RSA_PSS_2048_8192_SHA512,
                ];
                rules.into_iter().any(|rule| rsa(rule, n, e, message, signature))
            }
        }
    }
    /// A signature as SSH encodes it, over data that SSH has made of a message.
    fn verifies_ssh(&self, data: &[u8], signature: &ssh_key::Signature) -> bool {
        use ssh_key::Algorithm;
        match (self, signature.algorithm()) {
            (Self::Ed25519(key), Algorithm::Ed25519) => ed25519(key, data, signature.as_bytes()),
            (Self::Ecdsa(CurveName(curve), _), Algorithm::Ecdsa { .. }) => {
                ecdsa_numbers(signature.as_bytes(), curve.bytes())
                    .is_some_and(|fixed| self.verifies(data, &fixed))
            }
            (Self::Rsa(n, e), Algorithm::Rsa { hash: Some(hash) }) => {
                let rule = match hash {
                    HashAlg::Sha256 => &lc::RSA_PKCS1_2048_8192_SHA256,
                    HashAlg::Sha512 => &lc::RSA_PKCS1_2048_8192_SHA512,
                    _ => return false,
                };
                rsa(rule, n, e, data, signature.as_bytes())
            }
            _ => false,
        }
    }
}

fn ed25519(key: &PublicKey, message: &[u8], signature: &[u8]) -> bool {
    let key = ed25519_dalek::VerifyingKey::from_bytes(&key.0);
    let signature = ed25519_dalek::Signature::from_slice(signature);
    matches!((key, signature), (Ok(key), Ok(signature)) if key.verify_strict(message, &signature).is_ok())
}

fn rsa(rule: &'static lc::RsaParameters, n: &[u8], e: &[u8], message: &[u8], signature: &[u8]) -> bool {
    lc::RsaPublicKeyComponents { n, e }.verify(rule, message, signature).is_ok()
}

/// r and s, each an SSH mpint (RFC 5656 §3.1.2), as two numbers of fixed length.
fn ecdsa_numbers(mut bytes: &[u8], length: usize) -> Option<Vec<u8>> {
    let mut fixed = Vec::with_capacity(2 * length);
    for _ in 0..2 {
        let (size, rest) = bytes.split_first_chunk::<4>()?;
        let (number, rest) = rest.split_at_checked(u32::from_be_bytes(*size) as usize)?;
        let number = trimmed(number);
        fixed.resize(fixed.len() + length.checked_sub(number.len())?, 0);
        fixed.extend_from_slice(&number);
        bytes = rest;
    }
    bytes.is_empty().then_some(fixed)
}

/// Whether one of these keys signed the message; gives its place. The signature is what its algorithm
/// produces, or an armoured SSH signature.
///
/// # Errors
/// [`SignatureError`] says why it does not count.
pub fn check_signature(
    keys: &[KeyMaterial],
    message: &[u8],
    signature: &[u8],
) -> Result<usize, SignatureError> {
    let forms: Vec<_> = keys.iter().map(signing_form).collect();
    if forms.iter().all(Option::is_none) {
        return Err(SignatureError::NoSigningKey);
    }
    let mut holds: Box<dyn Fn(&SigningForm) -> bool> = Box::new(|key| key.verifies(message, signature));
    if signature.starts_with(b"-----BEGIN SSH SIGNATURE-----") {
        let broken = |error: ssh_key::Error| SignatureError::Ssh(error.to_string());
        let ssh = SshSig::from_pem(signature).map_err(broken)?;
        if ssh.namespace() != SSH_NAMESPACE {
            let why = format!("it is for {:?}, not for {SSH_NAMESPACE:?}", ssh.namespace());
            return Err(SignatureError::Ssh(why));
        }
        let data = SshSig::signed_data(SSH_NAMESPACE, ssh.hash_alg(), message).map_err(broken)?;
        holds = Box::new(move |key| key.verifies_ssh(&data, ssh.signature()));
    }
    let place = forms.iter().position(|form| form.as_ref().is_some_and(&holds));
    place.ok_or(SignatureError::Wrong)
}

impl Client {
    /// Whether a name's current keys signed a message: looked up in memory where that is fresh enough
    /// ([`Client::lookup_cached`]). Gives the key that did.
    ///
    /// # Errors
    /// [`ClientError::NotFound`] if there is no such name, [`ClientError::Unusable`] if it is revoked, not
    /// valid now, or did not sign this; others as [`Client::lookup`].
    pub async fn verify_signature(
        &self,
        name: &Name,
        message: &[u8],
        signature: &[u8],
    ) -> Result<KeyMaterial, ClientError> {
        let record = self.shown_cached(name).await?.found()?;
        usable(&record)?;
        match check_signature(&record.entry.keys, message, signature) {
            Ok(place) => Ok(record.entry.keys[place].clone()),
            Err(error) => Err(ClientError::Unusable(format!("{name}: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorum::Blob;

    fn material(algorithm: &str, key: &[u8]) -> KeyMaterial {
        KeyMaterial { algorithm: algorithm.into(), key: Blob(key.to_vec()) }
    }

    #[test]
    fn an_ed25519_key_signs_in_every_form_it_can_be_registered_in() {
        use ed25519_dalek::Signer as _;
        let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let public = key.verifying_key().to_bytes();
        let signature = key.sign(b"hello").to_bytes();
        let mut spki = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        spki.extend_from_slice(&public);
        let ssh = crate::keys::openssh_ed25519(&PublicKey(public));
        for registered in [material("ed25519", &public), material("spki", &spki), ssh] {
            let keys = [material("age-x25519", &[1; 32]), registered];
            assert_eq!(check_signature(&keys, b"hello", &signature), Ok(1), "{:?}", keys[1].algorithm);
            assert_eq!(check_signature(&keys, b"hallo", &signature), Err(SignatureError::Wrong));
            assert_eq!(check_signature(&keys, b"hello", &signature[1..]), Err(SignatureError::Wrong));
        }
        let other =
            material("ed25519", &ed25519_dalek::SigningKey::from_bytes(&[8; 32]).verifying_key().to_bytes());
        assert_eq!(check_signature(&[other], b"hello", &signature), Err(SignatureError::Wrong));
        let none = [material("age-x25519", &[1; 32])];
        assert_eq!(check_signature(&none, b"hello", &signature), Err(SignatureError::NoSigningKey));
    }

    #[test]
    fn numbers_of_any_length_that_fits_become_fixed_ones() {
        let encoded = [&[0, 0, 0, 2, 0, 0x80][..], &[0, 0, 0, 1, 5]].concat();
        assert_eq!(ecdsa_numbers(&encoded, 4), Some(vec![0, 0, 0, 0x80, 0, 0, 0, 5]));
        for broken in [&encoded[..3], &encoded[..8], &[encoded.as_slice(), &[0]].concat()] {
            assert_eq!(ecdsa_numbers(broken, 4), None);
        }
        assert_eq!(ecdsa_numbers(&[0, 0, 0, 5, 1, 1, 1, 1, 1, 0, 0, 0, 0], 4), None, "too long");
    }
}
