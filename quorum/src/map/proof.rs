//! Proofs that a key has a value, or none, under a root (design §5).
//!
//! For a map and a key there is exactly one proof that is accepted:
//!
//! - `steps`: the inner nodes from the root down, each once. Their bits rise.
//! - `terminal`: the leaf at which the search ends, `empty` only for the map without entries, and then
//!   there are no steps. The leaf lies where the search leads: it has the same bits as the key at every step,
//!   and the last bit lies within it.

use super::{Hasher, Kind, Snapshot, bit_of};
use crate::bytes::{Blob, Hash};
use crate::codec::sha256;
use crate::limits::MAX_MAP_KEY_BYTES;
use serde::{Deserialize, Serialize};

/// One inner node on the way from the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// The bit that the node decides on.
    pub bit: u16,
    /// The hash of the child not taken.
    pub sibling: Hash,
}

/// Where the search for the key ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Terminal {
    /// The map has no entries.
    Empty,
    /// At the only leaf that could hold the key.
    Leaf {
        /// Its key.
        key: Blob,
        /// The digest of its value.
        value_hash: Hash,
    },
}

/// The path that a search for one key takes.
///
/// For absence this relies on the tree being well formed, which q servers vouch for when they
/// sign its root: then every key lies exactly where the search for it leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    /// Inner nodes from the root down.
    pub steps: Vec<Step>,
    /// The leaf at its end.
    pub terminal: Terminal,
}

/// What a proof shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The key has the value with this digest.
    Value(Hash),
    /// The key has no value.
    Absent,
}

/// Why a path proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// Positions do not rise, or the leaf does not lie where the path leads.
    #[error("the path is malformed")]
    Malformed,
    /// It leads to another root.
    #[error("the path does not lead to the certified root")]
    WrongRoot,
}

impl Proof {
    /// Checks the path of `key` against a root.
    pub fn verify(&self, hasher: &Hasher, root: &Hash, key: &[u8]) -> Result<Found, ProofError> {
        let positions = self.steps.iter().map(|step| step.bit);
        if !positions.is_sorted_by(|a, b| a < b) {
            return Err(ProofError::Malformed);
        }
        let (mut hash, found) = match &self.terminal {
            Terminal::Empty if self.steps.is_empty() => (hasher.empty(), Found::Absent),
            Terminal::Empty => return Err(ProofError::Malformed),
            Terminal::Leaf { key: leaf, value_hash } => {
                let within = |step: &Step| usize::from(step.bit) <= 9 * leaf.len().min(MAX_MAP_KEY_BYTES);
                let on_the_way = |step: &Step| bit_of(leaf, step.bit) == bit_of(key, step.bit);
                if !self.steps.last().is_none_or(within) || !self.steps.iter().all(on_the_way) {
                    return Err(ProofError::Malformed);
                }
                let found = if **leaf == *key { Found::Value(*value_hash) } else { Found::Absent };
                (hasher.leaf(leaf, value_hash), found)
            }
        };
        for step in self.steps.iter().rev() {
            hash = if bit_of(key, step.bit) {
                hasher.inner(step.bit, &step.sibling, &hash)
            } else {
                hasher.inner(step.bit, &hash, &step.sibling)
            };
        }
        if hash == *root { Ok(found) } else { Err(ProofError::WrongRoot) }
    }
}

impl Snapshot {
    /// The proof of a key's value or absence.
    pub fn prove(&self, key: &[u8]) -> Proof {
        let mut steps = Vec::with_capacity(24);
        let Some(root) = &self.root else { return Proof { steps, terminal: Terminal::Empty } };
        let mut node = root;
        loop {
            match &node.kind {
                Kind::Inner { bit, left, right, .. } => {
                    let (child, sibling) = if bit_of(key, *bit) { (right, left) } else { (left, right) };
                    steps.push(Step { bit: *bit, sibling: sibling.hash });
                    node = child;
                }
                Kind::Leaf { key, value } => {
                    let terminal = Terminal::Leaf { key: Blob(key.to_vec()), value_hash: sha256(value) };
                    return Proof { steps, terminal };
                }
            }
        }
    }
}
