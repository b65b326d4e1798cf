//! Proofs of a page of consecutive entries: what is listed is there, and nothing is left out.
//!
//! The tree is sent in preorder with the subtrees outside the page replaced by their hashes. The
//! page is framed by its neighbours on both sides (key and digest only), so a verifier sees that
//! no hidden subtree lies between the entries.

use super::{Hasher, Kind, Node, Snapshot};
use crate::bytes::{Blob, Hash};
use crate::codec::sha256;
use crate::limits::{MAX_MAP_KEY_BYTES, MAX_PAGE_BYTES};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A node of the pruned tree, in preorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RangeItem {
    /// An inner node; its left, then its right subtree follow.
    Inner(u16),
    /// A subtree outside the page.
    Pruned(Hash),
    /// An entry of the page.
    Entry {
        /// Its key.
        key: Blob,
        /// Its value.
        value: Blob,
    },
    /// A neighbour of the page.
    Neighbour {
        /// Its key.
        key: Blob,
        /// The digest of its value.
        value_hash: Hash,
    },
}

/// A page of entries with the proof that none is missing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RangeProof {
    /// The pruned tree in preorder; nothing if the map is empty.
    pub items: Vec<RangeItem>,
}

/// What a range proof shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The entries, in order of keys: all that lie from the start asked for to `until`.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the page ends, if it ends before the range asked for.
    pub until: Option<Vec<u8>>,
}

/// Why a page proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeProofError {
    /// Not a tree in preorder, positions that do not rise, or keys out of order.
    #[error("the listing's proof is malformed")]
    Malformed,
    /// It leads to another root.
    #[error("the listing does not lead to the certified root")]
    WrongRoot,
    /// A hidden subtree could hold entries of the range.
    #[error("the listing hides a part of the range")]
    Omits,
}

impl Snapshot {
    /// A page of at most `limit` entries and [`MAX_PAGE_BYTES`], with keys in `from..to`.
    pub fn prove_range(&self, from: &[u8], to: &[u8], limit: usize) -> RangeProof {
        let mut items = Vec::new();
        let Some(root) = &self.root else { return RangeProof { items } };
        let mut bytes = 0;
        let inside = self.iter_from(from).take(limit).take_while(|(key, value)| {
            let first = bytes == 0;
            bytes += key.len() + value.len() + 1;
            *key < to && (first || bytes <= MAX_PAGE_BYTES)
        });
        let last_inside = inside.last().map(|(key, _)| key);
        let before = predecessor(root, from);
        let after = match last_inside {
            Some(last) => self.iter_from(last).nth(1),
            None => self.iter_from(from).next(),
        };
        let shown = Shown { before, from, after: after.map(|(key, _)| key) };
        prune(root, &shown, &mut items);
        RangeProof { items }
    }
}

/// Which keys a range proof shows: the page and its neighbours.
struct Shown<'a> {
    before: Option<&'a [u8]>,
    from: &'a [u8],
    after: Option<&'a [u8]>,
}

fn prune(node: &Arc<Node>, shown: &Shown<'_>, items: &mut Vec<RangeItem>) {
    let outside = node.edge_key(true) < shown.before.unwrap_or(shown.from)
        || shown.after.is_some_and(|after| node.edge_key(false) > after);
    match &node.kind {
        _ if outside => items.push(RangeItem::Pruned(node.hash)),
        Kind::Inner { bit, left, right, .. } => {
            items.push(RangeItem::Inner(*bit));
            prune(left, shown, items);
            prune(right, shown, items);
        }
        Kind::Leaf { key, value } => {
            let inside = **key >= *shown.from && shown.after.is_none_or(|after| **key < *after);
            let key = Blob(key.to_vec());
            items.push(if inside {
                RangeItem::Entry { key, value: Blob(value.to_vec()) }
            } else {
                RangeItem::Neighbour { key, value_hash: sha256(value) }
            });
        }
    }
}

/// The largest key below `key`.
fn predecessor<'a>(root: &'a Arc<Node>, key: &[u8]) -> Option<&'a [u8]> {
    let mut node = root;
    let mut best = None;
    while let Kind::Inner { left, right, .. } = &node.kind {
        if right.edge_key(false) < key {
            best = None;
            node = right;
        } else {
            if left.edge_key(true) < key {
                best = Some(left.edge_key(true));
            }
            node = left;
        }
    }
    let here = node.edge_key(false);
    if here < key { Some(here) } else { best }
}

struct Checker<'a> {
    hasher: &'a Hasher,
    items: std::slice::Iter<'a, RangeItem>,
    /// Entries and neighbours in the order in which the tree holds them.
    revealed: Vec<(&'a [u8], Option<&'a [u8]>)>,
    hidden_before: bool,
    hidden_after: bool,
}

impl<'a> Checker<'a> {
    fn reveal(&mut self, key: &'a [u8], value: Option<&'a [u8]>) -> Result<(), RangeProofError> {
        if self.hidden_after {
            return Err(RangeProofError::Omits);
        }
        if self.revealed.last().is_some_and(|(last, _)| *last >= key) {
            return Err(RangeProofError::Malformed);
        }
        self.revealed.push((key, value));
        Ok(())
    }
    /// Recursion is bounded: bit positions rise strictly and lie within a key.
    fn subtree(&mut self, above: Option<u16>) -> Result<Hash, RangeProofError> {
        match self.items.next().ok_or(RangeProofError::Malformed)? {
            RangeItem::Inner(bit) => {
                let too_deep = usize::from(bit / 9) > MAX_MAP_KEY_BYTES;
                if too_deep || above.is_some_and(|above| above >= *bit) {
                    return Err(RangeProofError::Malformed);
                }
                let left = self.subtree(Some(*bit))?;
                let right = self.subtree(Some(*bit))?;
                Ok(self.hasher.inner(*bit, &left, &right))
            }
            RangeItem::Pruned(hash) => {
                if self.revealed.is_empty() {
                    self.hidden_before = true;
                } else {
                    self.hidden_after = true;
                }
                Ok(*hash)
            }
            RangeItem::Entry { key, value } => {
                self.reveal(key, Some(value))?;
                Ok(self.hasher.leaf(key, &sha256(value)))
            }
            RangeItem::Neighbour { key, value_hash } => {
                self.reveal(key, None)?;
                Ok(self.hasher.leaf(key, value_hash))
            }
        }
    }
}

impl RangeProof {
    /// Checks the page against a root and gives its entries within `from..to`.
    pub fn verify(
        &self,
        hasher: &Hasher,
        root: &Hash,
        from: &[u8],
        to: &[u8],
    ) -> Result<Range, RangeProofError> {
        if self.items.is_empty() {
            let empty = hasher.empty() == *root;
            return if empty {
                Ok(Range { entries: vec![], until: None })
            } else {
                Err(RangeProofError::WrongRoot)
            };
        }
        let mut checker = Checker {
            hasher,
            items: self.items.iter(),
            revealed: Vec::new(),
            hidden_before: false,
            hidden_after: false,
        };
        let hash = checker.subtree(None)?;
        if checker.items.next().is_some() {
            return Err(RangeProofError::Malformed);
        }
        if hash != *root {
            return Err(RangeProofError::WrongRoot);
        }
        // What is hidden lies before the first key shown or after the last one. It is outside the
        // range only if those keys are.
        if checker.hidden_before && checker.revealed.first().is_none_or(|(first, _)| *first >= from) {
            return Err(RangeProofError::Omits);
        }
        let mut entries = Vec::new();
        for (key, value) in checker.revealed.iter().filter(|(key, _)| *key >= from) {
            match value {
                _ if *key >= to => return Ok(Range { entries, until: None }),
                Some(value) => entries.push((key.to_vec(), value.to_vec())),
                None => return Ok(Range { entries, until: Some(key.to_vec()) }),
            }
        }
        if checker.hidden_after { Err(RangeProofError::Omits) } else { Ok(Range { entries, until: None }) }
    }
}
