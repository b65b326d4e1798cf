//! Byte strings that are base64 for people (JSON, TOML) and plain bytes on the wire.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use std::fmt;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// A number of bytes, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteCount(pub u64);

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(bits, _)| self.0 >> bits > 0) {
            None => write!(f, "{} B", self.0),
            // Cut off and not rounded: what is used never looks like more than it is.
            Some((bits, unit)) => {
                let tenths = (u128::from(self.0) * 10) >> bits;
                write!(f, "{}.{} {unit}", tenths / 10, tenths % 10)
            }
        }
    }
}

macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $length:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $length]);

        impl $name {
            /// Parses standard base64 of exactly the right length.
            pub fn from_base64(text: &str) -> Option<Self> {
                STANDARD.decode(text).ok()?.try_into().ok().map(Self)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&STANDARD.encode(self.0))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:.10}…)", stringify!($name), STANDARD.encode(self.0))
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    // On the stack: there are dozens of these in an answer.
                    let mut text = [0; $length / 3 * 4 + 4];
                    let length = STANDARD.encode_slice(self.0, &mut text).map_err(ser::Error::custom)?;
                    serializer.serialize_str(str::from_utf8(&text[..length]).map_err(ser::Error::custom)?)
                } else {
                    use serde::ser::SerializeTuple as _;
                    let mut tuple = serializer.serialize_tuple($length)?;
                    for byte in &self.0 {
                        tuple.serialize_element(byte)?;
                    }
                    tuple.end()
                }
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Bytes;
                impl<'de> de::Visitor<'de> for Bytes {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        write!(f, "{} bytes, in text as standard base64", $length)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        $name::from_base64(text)
                            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
                    }
                    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<$name, A::Error> {
                        let mut bytes = [0; $length];
                        for (i, byte) in bytes.iter_mut().enumerate() {
                            *byte = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(i, &self))?;
                        }
                        Ok($name(bytes))
                    }
                }
                if deserializer.is_human_readable() {
                    deserializer.deserialize_str(Bytes)
                } else {
                    deserializer.deserialize_tuple($length, Bytes)
                }
            }
        }
    };
}

fixed_bytes!(
    /// A SHA-256 digest.
    Hash, 32
);
fixed_bytes!(
    /// An Ed25519 or X25519 public key in its standard encoding.
    PublicKey, 32
);
fixed_bytes!(
    /// An element of ristretto255 in its canonical encoding (RFC 9496), as far as that was checked.
    Element, 32
);
fixed_bytes!(
    /// An Ed25519 signature.
    SignatureBytes, 64
);

/// 32 secret bytes: in one place on the heap, so that whoever moves them moves a pointer and leaves no copy in a channel
/// or a vector that grew; zeroized when dropped, compared in constant time, never printed. They are encoded only for a
/// peer that may know them, over TLS, or for the disk, where they are encrypted.
#[derive(Clone)]
pub struct SecretBytes(Box<Zeroizing<[u8; 32]>>);

impl SecretBytes {
    /// A copy of these bytes.
    pub fn new(bytes: &[u8; 32]) -> Self {
        Self::fill(|secret| secret.copy_from_slice(bytes))
    }
    /// Bytes that are written where they stay.
    pub fn fill(write: impl FnOnce(&mut [u8; 32])) -> Self {
        let mut secret = Box::new(Zeroizing::new([0; 32]));
        write(&mut secret);
        Self(secret)
    }
    /// The bytes.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}
/// As those of `Zeroizing`.
impl std::ops::Deref for SecretBytes {
    type Target = [u8; 32];
    fn deref(&self) -> &[u8; 32] {
        self.expose()
    }
}
impl Serialize for SecretBytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.expose().serialize(serializer)
    }
}
impl<'de> Deserialize<'de> for SecretBytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> serde::de::Visitor<'de> for Bytes {
            type Value = SecretBytes;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("32 bytes")
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut bytes: A) -> Result<SecretBytes, A::Error> {
                let mut secret = Box::new(Zeroizing::new([0; 32]));
                for (i, byte) in secret.iter_mut().enumerate() {
                    let next = bytes.next_element()?;
                    *byte = next.ok_or_else(|| serde::de::Error::invalid_length(i, &self))?;
                }
                Ok(SecretBytes(secret))
            }
        }
        deserializer.deserialize_tuple(32, Bytes)
    }
}
impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBytes(..)")
    }
}
impl PartialEq for SecretBytes {
    fn eq(&self, other: &Self) -> bool {
        self.expose().ct_eq(other.expose()).into()
    }
}
impl Eq for SecretBytes {}

/// Secret bytes of any length, on their way to or from where they are encrypted.
#[derive(Clone)]
pub struct SecretBlob(Zeroizing<Vec<u8>>);

impl SecretBlob {
    /// Takes these bytes over.
    pub fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }
    /// The bytes.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}
impl fmt::Debug for SecretBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretBlob(..)")
    }
}

/// Bytes of any length.
#[derive(Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Blob(pub Vec<u8>);

impl Blob {
    /// Standard base64 of the bytes.
    pub fn to_base64(&self) -> String {
        STANDARD.encode(&self.0)
    }
}
impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}
impl From<Vec<u8>> for Blob {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}
impl std::ops::Deref for Blob {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.serialize_str(&STANDARD.encode(&self.0))
        } else {
            serializer.serialize_bytes(&self.0)
        }
    }
}
impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl de::Visitor<'_> for Bytes {
            type Value = Blob;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes, in text as standard base64")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Blob, E> {
                STANDARD
                    .decode(text)
                    .map(Blob)
                    .map_err(|_| E::invalid_value(de::Unexpected::Other("text that is not base64"), &self))
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Blob, E> {
                Ok(Blob(bytes.to_vec()))
            }
            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Blob, E> {
                Ok(Blob(bytes))
            }
        }
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(Bytes)
        } else {
            deserializer.deserialize_byte_buf(Bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_base64_and_the_wire_is_bare_bytes() {
        let hash = Hash([7; 32]);
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(json, format!("\"{hash}\""));
        assert_eq!(serde_json::from_str::<Hash>(&json).unwrap(), hash);
        assert_eq!(postcard::to_stdvec(&hash).unwrap(), vec![7; 32]);
        assert_eq!(postcard::from_bytes::<Hash>(&[7; 32]).unwrap(), hash);
        assert!(serde_json::from_str::<Hash>("\"AAAA\"").is_err());
        assert!(serde_json::from_str::<Blob>("\"not base64!\"").is_err());
        assert!(postcard::from_bytes::<Hash>(&[7; 31]).is_err());
    }
}
