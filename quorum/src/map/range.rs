//! Proofs of a page of consecutive entries: what is listed is there, and nothing is left out.
//!
//! The tree is sent in preorder with the subtrees outside the page replaced by their hashes. The
//! page is framed by its neighbours on both sides (key and digest only), so a verifier sees that
//! no hidden subtree lies between the entries.
//!
//! # What may stand where
//!
//! For a map and a [`Page`] there is exactly one proof that is accepted; a server has no choice in
//! what it shows. Its leaves and hidden subtrees are, in order of keys:
//!
//! | item | where | how many |
//! |---|---|---|
//! | `pruned` | first; only where a neighbour follows that lies before the page | any |
//! | `neighbour` with a key before `from` | before all other leaves | 1 if there is such a key, the last of them |
//! | `entry` with a key in `from..to` | between the neighbours | see below |
//! | `neighbour` with a key from `from` on | after all other leaves | 1 if there is such a key, the next one |
//! | `pruned` | last; only after such a neighbour | any |
//!
//! - The page is *full* when it has `limit` entries, or with the entry that brings it to the bytes
//!   that a page has. It has no entry after that; and if the neighbour after it lies within the range, so
//!   that the listing goes on there, it is full. So whoever goes on makes progress, and nobody stops early.
//! - An `inner` node does not consist of two pruned subtrees: it would be pruned itself.
//! - An `inner` node decides on the very bit at which the last key that is shown on its left and the
//!   first one on its right part. Where one side is pruned the others' keys lie on their side by that
//!   bit, and the bit lies within them, so nobody has to trust the tree to be well formed where it is shown.
//! - A map without entries has a proof without items, and no other has.
//!
//! Nothing here recurses: nesting is a number in a list, and bits that rise bound it.

use super::{Hasher, Kind, Node, Snapshot, bit_of, first_difference};
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

/// What is asked for: the entries with keys in `from..to`, so many at a time.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    from: &'a [u8],
    to: &'a [u8],
    limit: usize,
    bytes: usize,
}

impl<'a> Page<'a> {
    /// At most `limit` entries, and one at least if there is any; no further ones after the entry with which
    /// they have [`MAX_PAGE_BYTES`].
    pub fn new(from: &'a [u8], to: &'a [u8], limit: usize) -> Self {
        Self { from, to, limit: limit.max(1), bytes: MAX_PAGE_BYTES }
    }
    #[cfg(test)]
    pub(super) fn of_bytes(self, bytes: usize) -> Self {
        Self { bytes, ..self }
    }
}

/// How much of a page is there. Who makes a page and who checks it count alike.
#[derive(Default)]
struct Filling {
    entries: usize,
    bytes: usize,
}

impl Filling {
    fn add(&mut self, key: &[u8], value: &[u8]) {
        self.entries += 1;
        self.bytes += key.len() + value.len();
    }
    fn is_full(&self, page: &Page<'_>) -> bool {
        self.entries > 0 && (self.entries >= page.limit || self.bytes >= page.bytes)
    }
}

/// What a range proof shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Range {
    /// The entries, in order of keys: all that lie from the start asked for to `until`.
    pub entries: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the page ends, if it ends before the range asked for: the key of the next entry.
    pub until: Option<Vec<u8>>,
}

/// Why a range proof proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeProofError {
    /// Not one tree in preorder, or something in it stands where it may not stand.
    #[error("the listing's proof is malformed")]
    Malformed,
    /// It leads to another root.
    #[error("the listing does not lead to the certified root")]
    WrongRoot,
    /// A hidden subtree, or an entry shown as a neighbour, could lie in the range.
    #[error("the listing hides a part of the range")]
    Omits,
    /// It goes on elsewhere although there was room for more.
    #[error("the listing's page ends before it is full")]
    EndsEarly,
}

impl Snapshot {
    /// The proof of a page.
    pub fn prove_range(&self, page: &Page<'_>) -> RangeProof {
        let mut items = Vec::new();
        let Some(root) = &self.root else { return RangeProof { items } };
        let mut filling = Filling::default();
        let mut after = None;
        for (key, value) in self.iter_from(page.from) {
            if key >= page.to || filling.is_full(page) {
                after = Some(key);
                break;
            }
            filling.add(key, value);
        }
        let before = predecessor(root, page.from);
        let mut stack = vec![root];
        while let Some(node) = stack.pop() {
            let outside = before.is_some_and(|before| node.edge_key(true) < before)
                || after.is_some_and(|after| node.edge_key(false) > after);
            match &node.kind {
                _ if outside => items.push(RangeItem::Pruned(node.hash)),
                Kind::Inner { bit, left, right, .. } => {
                    items.push(RangeItem::Inner(*bit));
                    stack.push(right);
                    stack.push(left);
                }
                Kind::Leaf { key, value } => {
                    let inside = **key >= *page.from && after.is_none_or(|after| **key < *after);
                    let key = Blob(key.to_vec());
                    items.push(if inside {
                        RangeItem::Entry { key, value: Blob(value.to_vec()) }
                    } else {
                        RangeItem::Neighbour { key, value_hash: sha256(value) }
                    });
                }
            }
        }
        RangeProof { items }
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

/// A subtree of a proof that was read to its end.
struct Subtree<'a> {
    hash: Hash,
    /// The first and the last key that it shows; none if it is pruned.
    shown: Option<(&'a [u8], &'a [u8])>,
}

impl<'a> Subtree<'a> {
    fn leaf(hash: Hash, key: &'a [u8]) -> Self {
        Self { hash, shown: Some((key, key)) }
    }
    /// The inner node that decides on `bit` over these two, if the keys that they show lie where they must.
    /// By the same rule further down, keys of one side agree on this bit and those before it.
    fn join(hasher: &Hasher, bit: u16, left: Self, right: Self) -> Result<Self, RangeProofError> {
        // A key in a subtree that parts at a bit has this bit, or ends just before it.
        let lies = |key: &[u8], right| bit_of(key, bit) == right && usize::from(bit) <= 9 * key.len();
        let (shown, sound) = match (left.shown, right.shown) {
            (Some((first, before)), Some((after, last))) => {
                let parts = first_difference(before, after) == Some(bit);
                ((first, last), parts && lies(before, false) && lies(after, true))
            }
            (Some(keys), None) => (keys, lies(keys.0, false)),
            (None, Some(keys)) => (keys, lies(keys.0, true)),
            (None, None) => return Err(RangeProofError::Malformed),
        };
        let hash = hasher.inner(bit, &left.hash, &right.hash);
        if sound { Ok(Self { hash, shown: Some(shown) }) } else { Err(RangeProofError::Malformed) }
    }
}

/// Reads leaves and hidden subtrees in order of keys, and lets each stand only where it may.
struct Reader<'a> {
    page: Page<'a>,
    filling: Filling,
    entries: Vec<(Vec<u8>, Vec<u8>)>,
    hidden_before: bool,
    /// A neighbour before the page.
    before: bool,
    /// The neighbour after the page.
    after: Option<&'a [u8]>,
}

impl<'a> Reader<'a> {
    /// No leaf was shown yet.
    fn at_the_beginning(&self) -> bool {
        !self.before && self.entries.is_empty() && self.after.is_none()
    }
    fn pruned(&mut self) -> Result<(), RangeProofError> {
        match (self.at_the_beginning(), self.after) {
            (true, _) => self.hidden_before = true,
            (false, Some(_)) => {}
            (false, None) => return Err(RangeProofError::Omits),
        }
        Ok(())
    }
    fn entry(&mut self, key: &[u8], value: &[u8]) -> Result<(), RangeProofError> {
        self.in_the_open()?;
        if key < self.page.from || key >= self.page.to || self.filling.is_full(&self.page) {
            return Err(RangeProofError::Malformed);
        }
        self.filling.add(key, value);
        self.entries.push((key.to_vec(), value.to_vec()));
        Ok(())
    }
    fn neighbour(&mut self, key: &'a [u8]) -> Result<(), RangeProofError> {
        if key < self.page.from {
            let first = self.at_the_beginning();
            self.before = true;
            return if first { Ok(()) } else { Err(RangeProofError::Malformed) };
        }
        self.in_the_open()?;
        if key < self.page.to && !self.filling.is_full(&self.page) {
            return Err(RangeProofError::EndsEarly);
        }
        self.after = Some(key);
        Ok(())
    }
    /// Whether the next leaf may lie in the range or after it.
    fn in_the_open(&self) -> Result<(), RangeProofError> {
        match (self.after, self.hidden_before && !self.before) {
            (Some(_), _) => Err(RangeProofError::Malformed),
            (None, true) => Err(RangeProofError::Omits),
            (None, false) => Ok(()),
        }
    }
    fn finish(self) -> Result<Range, RangeProofError> {
        if self.hidden_before && !self.before {
            return Err(RangeProofError::Omits);
        }
        let until = self.after.filter(|key| *key < self.page.to).map(<[u8]>::to_vec);
        Ok(Range { entries: self.entries, until })
    }
}

impl RangeProof {
    /// Checks the page against a root; gives all entries of the map that it asks for.
    ///
    /// # Errors
    /// If this is not the one proof of that page under that root.
    pub fn verify(&self, hasher: &Hasher, root: &Hash, page: &Page<'_>) -> Result<Range, RangeProofError> {
        if self.items.is_empty() {
            let empty = hasher.empty() == *root;
            let nothing = Range { entries: vec![], until: None };
            return if empty { Ok(nothing) } else { Err(RangeProofError::WrongRoot) };
        }
        let mut reader = Reader {
            page: *page,
            filling: Filling::default(),
            entries: Vec::new(),
            hidden_before: false,
            before: false,
            after: None,
        };
        // Inner nodes whose subtrees are being read, each with its left one when that is done.
        let mut open: Vec<(u16, Option<Subtree<'_>>)> = Vec::new();
        let mut whole = None;
        for item in &self.items {
            if whole.is_some() {
                return Err(RangeProofError::Malformed);
            }
            let mut done = match item {
                RangeItem::Inner(bit) => {
                    let too_deep = usize::from(*bit) > 9 * MAX_MAP_KEY_BYTES;
                    if too_deep || open.last().is_some_and(|(above, _)| above >= bit) {
                        return Err(RangeProofError::Malformed);
                    }
                    open.push((*bit, None));
                    continue;
                }
                RangeItem::Entry { key, .. } | RangeItem::Neighbour { key, .. }
                    if key.len() > MAX_MAP_KEY_BYTES =>
                {
                    return Err(RangeProofError::Malformed);
                }
                RangeItem::Pruned(hash) => {
                    reader.pruned()?;
                    Subtree { hash: *hash, shown: None }
                }
                RangeItem::Entry { key, value } => {
                    reader.entry(key, value)?;
                    Subtree::leaf(hasher.leaf(key, &sha256(value)), key)
                }
                RangeItem::Neighbour { key, value_hash } => {
                    reader.neighbour(key)?;
                    Subtree::leaf(hasher.leaf(key, value_hash), key)
                }
            };
            loop {
                match open.pop() {
                    None => {
                        whole = Some(done);
                        break;
                    }
                    Some((bit, None)) => {
                        open.push((bit, Some(done)));
                        break;
                    }
                    Some((bit, Some(left))) => done = Subtree::join(hasher, bit, left, done)?,
                }
            }
        }
        let whole = whole.ok_or(RangeProofError::Malformed)?;
        if whole.hash != *root {
            return Err(RangeProofError::WrongRoot);
        }
        reader.finish()
    }
}
