//! Records: what a name stands for (design §4).

use crate::bytes::{Blob, PublicKey};
use crate::ids::{Sequence, Timestamp};
use crate::limits;
use crate::signing::is_sound_key;
use serde::{Deserialize, Deserializer, Serialize, de};
use std::collections::BTreeMap;
use std::fmt;

/// A name of a record or a secret: ASCII lower case letters, digits and `. _ - @ / +`, 1 to 255
/// bytes. Anything else is an error and never silently changed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

/// Why a text is not a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No bytes at all.
    #[error("a name cannot be empty")]
    Empty,
    /// Too many bytes.
    #[error("a name has at most {max} bytes, this has {0}", max = limits::MAX_NAME_BYTES)]
    TooLong(usize),
    /// A character outside the alphabet.
    #[error("a name consists of lower case letters, digits and . _ - @ / + only, not {0:?} (at byte {1})")]
    Character(char, usize),
}

impl Name {
    /// Checks a text.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > limits::MAX_NAME_BYTES {
            return Err(NameError::TooLong(text.len()));
        }
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-@/+".contains(c);
        match text.char_indices().find(|(_, c)| !allowed(*c)) {
            Some((at, c)) => Err(NameError::Character(c, at)),
            None => Ok(Self(text)),
        }
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}
impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}
impl std::str::FromStr for Name {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::new(text)
    }
}
impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// Algorithms of key material, and what their canonical bytes are.
///
/// The state machine checks only what can never change between versions: a known algorithm and
/// sound sizes. Full parsing stands at the edges, in the client and in the server that a client
/// talks to, since replicas of different versions must agree on every outcome
/// (`docs/decisions/0004-key-validation.md`).
pub const ALGORITHMS: &[(&str, usize, usize)] = &[
    // OpenSSH: the wire form, as in the second field of an authorized_keys line.
    ("ssh-ed25519", 51, 51),
    ("sk-ssh-ed25519@openssh.com", 60, 512),
    ("ecdsa-sha2-nistp256", 104, 104),
    ("ecdsa-sha2-nistp384", 136, 136),
    ("ecdsa-sha2-nistp521", 172, 172),
    ("sk-ecdsa-sha2-nistp256@openssh.com", 100, 600),
    ("ssh-rsa", 200, 4_200),
    // DER.
    ("x509", 64, limits::MAX_KEY_BYTES),
    ("spki", 32, limits::MAX_KEY_BYTES),
    // 32 bytes.
    ("age-x25519", 32, 32),
    ("ed25519", 32, 32),
];

/// One public key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyMaterial {
    /// One of [`ALGORITHMS`].
    pub algorithm: String,
    /// Canonical bytes under that algorithm.
    pub key: Blob,
}

impl KeyMaterial {
    /// The checks that every replica makes.
    fn validate(&self) -> Result<(), Invalid> {
        let (_, least, most) =
            ALGORITHMS.iter().find(|(name, ..)| *name == self.algorithm).ok_or(Invalid::Algorithm)?;
        if !(*least..=*most).contains(&self.key.len()) {
            return Err(Invalid::Key);
        }
        match (self.algorithm.as_str(), <[u8; 32]>::try_from(&*self.key)) {
            ("ed25519", Ok(key)) if !is_sound_key(&PublicKey(key)) => Err(Invalid::Key),
            ("age-x25519", Ok(key)) if key == [0; 32] => Err(Invalid::Key),
            _ => Ok(()),
        }
    }
}

/// Which part of an operation breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Invalid {
    /// No keys, too many, or one twice.
    #[error("a record has between 1 and {max} different keys", max = limits::MAX_KEYS_PER_RECORD)]
    KeyCount,
    /// Not in [`ALGORITHMS`].
    #[error("unknown key algorithm")]
    Algorithm,
    /// Wrong size or a weak key.
    #[error("a key has the wrong size for its algorithm or is weak")]
    Key,
    /// The owner key is weak.
    #[error("the owner key is not a sound Ed25519 key")]
    Owner,
    /// Owner-only without an owner.
    #[error("an owner-only record needs an owner key")]
    OwnerOnly,
    /// `not_before` after `not_after`.
    #[error("the validity interval is empty")]
    Validity,
    /// Too many entries or too large.
    #[error(
        "metadata has at most {entries} entries, keys of {key} and values of {value} bytes",
        entries = limits::MAX_METADATA_ENTRIES, key = limits::MAX_METADATA_KEY_BYTES, value = limits::MAX_METADATA_VALUE_BYTES
    )]
    Metadata,
    /// Too long.
    #[error("a reason has at most {max} bytes", max = limits::MAX_REASON_BYTES)]
    Reason,
    /// Too many readers, or a weak key among them.
    #[error("a secret has at most {max} readers with sound keys", max = limits::MAX_READERS)]
    Readers,
    /// Not one sealed share for each server, or one too large.
    #[error("a deposit carries one sealed share for each server")]
    Shares,
    /// Too large.
    #[error("a secret's ciphertext has at most {max} bytes", max = limits::MAX_CIPHERTEXT_BYTES)]
    Ciphertext,
    /// A key certificate that does not hold.
    #[error("the key certificates do not hold")]
    Certificate,
    /// Not in order, or not all of them dealers.
    #[error("an acknowledgement names dealers, in ascending order")]
    Dealers,
    /// No guesses or too many, or a key that is none.
    #[error("a passphrase has sound keys, between 1 and {max} guesses, and {memory} KiB and {passes} passes at most", max = limits::MAX_GUESSES, memory = limits::MAX_STRETCH_KIB, passes = limits::MAX_STRETCH_PASSES)]
    Passphrase,
    /// Too many administrators, too few to decide anything, or a weak key.
    #[error("there are at most {max} administrators with sound keys, and at least as many as decide together", max = limits::MAX_ADMINISTRATORS)]
    Administrator,
    /// No such server, no address or certificate, or an identity that is weak or was used before.
    #[error(
        "a replacement is of a server that there is, with addresses, a certificate and an identity that no server has or had"
    )]
    Replacement,
    /// Not of a key that owns a name.
    #[error("a quota of its own has who owns a name")]
    Quota,
    /// No element of the group, or the identity.
    #[error("what is to be evaluated is no ristretto255 element")]
    Element,
}

/// Whether a record may be used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Status {
    /// In force.
    Active,
    /// Withdrawn, visible for ever.
    Revoked {
        /// Why.
        reason: String,
        /// By whose key.
        by: PublicKey,
    },
}

/// When something last changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// The batch that did it.
    pub sequence: Sequence,
    /// Its agreed time.
    pub time: Timestamp,
}

/// What an administrator or owner says about a name: the part of a record that is theirs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The keys of the name.
    pub keys: Vec<KeyMaterial>,
    /// Who may rotate and revoke.
    pub owner: Option<PublicKey>,
    /// Whether an administrator may only revoke.
    pub owner_only: bool,
    /// Not to be used before.
    pub not_before: Option<Timestamp>,
    /// Not to be used after.
    pub not_after: Option<Timestamp>,
    /// Small notes.
    pub metadata: BTreeMap<String, String>,
}

impl Entry {
    /// The rules that every replica applies.
    pub fn validate(&self) -> Result<(), Invalid> {
        if !(1..=limits::MAX_KEYS_PER_RECORD).contains(&self.keys.len()) {
            return Err(Invalid::KeyCount);
        }
        for (index, key) in self.keys.iter().enumerate() {
            key.validate()?;
            if self.keys[..index].contains(key) {
                return Err(Invalid::KeyCount);
            }
        }
        if self.owner.is_some_and(|owner| !is_sound_key(&owner)) {
            return Err(Invalid::Owner);
        }
        if self.owner_only && self.owner.is_none() {
            return Err(Invalid::OwnerOnly);
        }
        if let (Some(from), Some(to)) = (self.not_before, self.not_after)
            && from >= to
        {
            return Err(Invalid::Validity);
        }
        let fits = |(key, value): (&String, &String)| {
            (1..=limits::MAX_METADATA_KEY_BYTES).contains(&key.len())
                && value.len() <= limits::MAX_METADATA_VALUE_BYTES
        };
        if self.metadata.len() > limits::MAX_METADATA_ENTRIES || !self.metadata.iter().all(fits) {
            return Err(Invalid::Metadata);
        }
        Ok(())
    }
}

/// A version of a name's record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The name.
    pub name: Name,
    /// From 1, rising with every change.
    pub version: u64,
    /// In force or revoked.
    pub status: Status,
    /// Keys, owner, validity, metadata.
    pub entry: Entry,
    /// When this version came to be.
    pub updated: Change,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_refused_and_never_changed() {
        for good in ["a", "alice@example.org", "x/y+z_1.2-3", &"a".repeat(255)] {
            assert_eq!(Name::new(good).unwrap().as_str(), good);
        }
        assert_eq!(Name::new(""), Err(NameError::Empty));
        assert_eq!(Name::new("a".repeat(256)), Err(NameError::TooLong(256)));
        for bad in ["Alice", "a b", "a\0", "ä", "аlice", "a\\b", "a\n", "a:b"] {
            assert!(matches!(Name::new(bad), Err(NameError::Character(..))), "{bad:?}");
        }
        assert!(serde_json::from_str::<Name>("\"A\"").is_err());
        assert!(crate::codec::decode::<Name>(&crate::codec::encode("A")).is_err());
    }

    #[test]
    fn broken_entries_name_what_is_wrong() {
        let key =
            |algorithm: &str, bytes: Vec<u8>| KeyMaterial { algorithm: algorithm.into(), key: Blob(bytes) };
        let good = Entry {
            keys: vec![key("age-x25519", vec![1; 32])],
            owner: None,
            owner_only: false,
            not_before: None,
            not_after: None,
            metadata: BTreeMap::new(),
        };
        assert_eq!(good.validate(), Ok(()));
        let with_keys = |keys| Entry { keys, ..good.clone() }.validate();
        assert_eq!(with_keys(vec![]), Err(Invalid::KeyCount));
        assert_eq!(with_keys(vec![good.keys[0].clone(), good.keys[0].clone()]), Err(Invalid::KeyCount));
        assert_eq!(with_keys(vec![key("rot13", vec![1; 32])]), Err(Invalid::Algorithm));
        assert_eq!(with_keys(vec![key("ssh-ed25519", vec![1; 50])]), Err(Invalid::Key));
        assert_eq!(with_keys(vec![key("ed25519", vec![0; 32])]), Err(Invalid::Key));
        assert_eq!(with_keys(vec![key("age-x25519", vec![0; 32])]), Err(Invalid::Key));
        assert_eq!(with_keys(vec![key("x509", vec![1; 1 << 20])]), Err(Invalid::Key));
        let entry = Entry { owner_only: true, ..good.clone() };
        assert_eq!(entry.validate(), Err(Invalid::OwnerOnly));
        let entry = Entry { owner: Some(PublicKey([0; 32])), ..good.clone() };
        assert_eq!(entry.validate(), Err(Invalid::Owner));
        let entry = Entry { not_before: Some(Timestamp(2)), not_after: Some(Timestamp(2)), ..good.clone() };
        assert_eq!(entry.validate(), Err(Invalid::Validity));
        let entry = Entry { metadata: [("k".into(), "v".repeat(2000))].into(), ..good };
        assert_eq!(entry.validate(), Err(Invalid::Metadata));
    }
}
