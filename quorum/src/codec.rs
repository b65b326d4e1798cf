//! The one canonical encoding, and domain separation for everything hashed or signed.
//!
//! A value is encoded with postcard; what is signed or hashed is
//!
//! ```text
//! length(tag) ‖ tag ‖ FORMAT_VERSION ‖ cluster id ‖ postcard(value)
//! ```
//!
//! A verifier never hashes the bytes that it was sent: it decodes and encodes again. So a
//! value has exactly one form under a signature, whatever a liar's encoder does.

use crate::bytes::Hash;
use crate::ids::ClusterId;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// Raised whenever the meaning of any encoded byte changes.
pub const FORMAT_VERSION: u8 = 1;

/// A type that is hashed or signed, and the tag that tells it from all others.
pub trait Tagged: Serialize {
    /// Unique among all types; at most 255 bytes.
    const TAG: &'static str;
}

/// The bytes that a signature on `value` covers.
pub fn signing_bytes<T: Tagged>(cluster: &ClusterId, value: &T) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(160);
    bytes.push(T::TAG.len() as u8);
    bytes.extend_from_slice(T::TAG.as_bytes());
    bytes.push(FORMAT_VERSION);
    bytes.extend_from_slice(&cluster.0.0);
    encode_into(value, bytes)
}

/// The digest of `value` in this cluster.
pub fn digest<T: Tagged>(cluster: &ClusterId, value: &T) -> Hash {
    sha256(&signing_bytes(cluster, value))
}

/// SHA-256 of bytes that already carry a tag.
pub fn sha256(bytes: &[u8]) -> Hash {
    Hash(Sha256::digest(bytes).into())
}

/// The bytes that a digest of a secret covers; allocated once and zeroized.
pub(crate) fn secret_signing_bytes<T: Tagged>(cluster: &ClusterId, value: &T) -> Zeroizing<Vec<u8>> {
    let mut bytes = Vec::with_capacity(T::TAG.len() + 34 + encoded_size(value));
    bytes.push(T::TAG.len() as u8);
    bytes.extend_from_slice(T::TAG.as_bytes());
    bytes.push(FORMAT_VERSION);
    bytes.extend_from_slice(&cluster.0.0);
    Zeroizing::new(encode_into(value, bytes))
}

/// Encodes something secret: allocated once, since a buffer that grows leaves copies behind, and zeroized.
pub fn encode_secret<T: Serialize + ?Sized>(value: &T) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(encode_into(value, Vec::with_capacity(encoded_size(value))))
}

fn encoded_size<T: Serialize + ?Sized>(value: &T) -> usize {
    postcard::serialize_with_flavor(value, postcard::ser_flavors::Size::default())
        .expect("our own types encode")
}

/// Encodes for storage and transport.
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Vec<u8> {
    encode_into(value, Vec::new())
}

fn encode_into<T: Serialize + ?Sized>(value: &T, bytes: Vec<u8>) -> Vec<u8> {
    // Encoding our own values into a growing buffer has no way to fail: postcard reports errors
    // only for full buffers and for serde types that we do not use.
    postcard::to_extend(value, bytes).expect("our own types encode")
}

/// Bytes that are not the encoding of what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They do not decode.
    #[error("malformed encoding")]
    Malformed,
    /// They decode and something follows.
    #[error("{0} bytes follow the encoding")]
    TrailingBytes(usize),
}

/// Decodes what was stored or received; refuses trailing bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let (value, rest) = postcard::take_from_bytes(bytes).map_err(|_| DecodeError::Malformed)?;
    if rest.is_empty() { Ok(value) } else { Err(DecodeError::TrailingBytes(rest.len())) }
}

/// Decodes what one of our own encodings begins with: a value's first fields, one after the other.
pub(crate) fn decode_start<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    postcard::take_from_bytes(bytes).ok().map(|(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Serialize, Deserialize)]
    struct A(u64);
    impl Tagged for A {
        const TAG: &'static str = "test.a";
    }
    #[derive(Serialize, Deserialize)]
    struct B(u64);
    impl Tagged for B {
        const TAG: &'static str = "test.b";
    }

    #[test]
    fn type_and_cluster_separate_digests() {
        let (one, two) = (ClusterId(Hash([1; 32])), ClusterId(Hash([2; 32])));
        assert_ne!(digest(&one, &A(5)), digest(&one, &B(5)));
        assert_ne!(digest(&one, &A(5)), digest(&two, &A(5)));
    }

    #[test]
    fn golden_bytes_of_what_is_signed() {
        let bytes = signing_bytes(&ClusterId(Hash([9; 32])), &A(300));
        let mut expected = vec![6];
        expected.extend_from_slice(b"test.a\x01");
        expected.extend_from_slice(&[9; 32]);
        expected.extend_from_slice(&[0xac, 0x02]);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn secrets_are_encoded_in_a_buffer_that_does_not_grow() {
        let value = vec![(7u64, [9u8; 32]); 300];
        let bytes = encode_secret(&value);
        assert_eq!((bytes.len(), *bytes == encode(&value)), (bytes.capacity(), true));
        let cluster = ClusterId(Hash([9; 32]));
        let bytes = secret_signing_bytes(&cluster, &A(300));
        assert_eq!((bytes.len(), *bytes == signing_bytes(&cluster, &A(300))), (bytes.capacity(), true));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        assert_eq!(decode::<u64>(&[1, 2]), Err(DecodeError::TrailingBytes(1)));
        assert_eq!(decode::<u64>(&[]), Err(DecodeError::Malformed));
    }
}
