//! The authenticated map: an ordered Merkle radix tree in memory.
//!
//! A path-compressed binary trie over the keys themselves (a crit-bit tree): a leaf for each
//! entry, and an inner node for each bit position at which two keys part. Its shape depends on
//! the entries alone, so equal maps have equal roots whatever their history. Keys stay in order,
//! so one range proof shows a page of a listing and that nothing in it was left out.
//!
//! ```text
//! leaf  = H("kds.leaf.1" ‖ cluster ‖ length(key) ‖ key ‖ H(value))
//! inner = H("kds.node.1" ‖ cluster ‖ bit position ‖ left ‖ right)
//! empty = H("kds.none.1" ‖ cluster)
//! ```
//!
//! Nodes are shared: [`Map::seal`] gives a [`Snapshot`] that readers keep while the map goes on;
//! a later change copies only the nodes on its path. Hashes are computed once a batch, in
//! `seal`, and not once a change.
//!
//! Memory: an entry takes one leaf (its key, its value and about 130 bytes) and one inner node
//! (about 80 bytes).

mod proof;
mod range;
mod sync;

pub use proof::{Found, Proof, ProofError, Step, Terminal};
pub use range::{Page, Range, RangeItem, RangeProof, RangeProofError};
pub use sync::{PartError, PartItem, Path, Sync, WantedPart, parts_of};

use crate::bytes::Hash;
use crate::codec::sha256;
use crate::ids::ClusterId;
use crate::limits::MAX_MAP_KEY_BYTES;
use sha2::{Digest as _, Sha256};
use std::sync::Arc;

/// Hash functions of one cluster's map.
#[derive(Clone, Copy, Debug)]
pub struct Hasher {
    cluster: ClusterId,
}

impl Hasher {
    /// For a cluster.
    pub fn new(cluster: ClusterId) -> Self {
        Self { cluster }
    }
    fn tagged(&self, tag: &[u8]) -> Sha256 {
        Sha256::new().chain_update(tag).chain_update(self.cluster.0.0)
    }
    /// The root of a map without entries.
    pub fn empty(&self) -> Hash {
        Hash(self.tagged(b"kds.none.1").finalize().into())
    }
    /// A leaf, from its key and the digest of its value.
    pub fn leaf(&self, key: &[u8], value_hash: &Hash) -> Hash {
        let hasher = self.tagged(b"kds.leaf.1").chain_update((key.len() as u32).to_be_bytes());
        Hash(hasher.chain_update(key).chain_update(value_hash.0).finalize().into())
    }
    /// An inner node.
    // In the frames of what goes down a deep tree there is no room for a hash function's.
    #[inline(never)]
    pub fn inner(&self, bit: u16, left: &Hash, right: &Hash) -> Hash {
        let hasher = self.tagged(b"kds.node.1").chain_update(bit.to_be_bytes());
        Hash(hasher.chain_update(left.0).chain_update(right.0).finalize().into())
    }
}

/// Bit `position` of a key. Each byte gives nine: a one that says that it exists, then its eight
/// from the highest; beyond the end all are zero. So the order of bits is the order of keys, and a
/// key is never mistaken for one that it is a prefix of.
fn bit_of(key: &[u8], position: u16) -> bool {
    let (byte, offset) = (usize::from(position / 9), position % 9);
    match key.get(byte) {
        None => false,
        Some(_) if offset == 0 => true,
        Some(value) => value >> (8 - offset) & 1 == 1,
    }
}

/// The first bit at which two keys differ; none if they are equal.
fn first_difference(a: &[u8], b: &[u8]) -> Option<u16> {
    let common = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let offset = match (a.get(common), b.get(common)) {
        (None, None) => return None,
        (Some(x), Some(y)) => 1 + (x ^ y).leading_zeros(),
        _ => 0,
    };
    Some((common * 9) as u16 + offset as u16)
}

#[derive(Clone)]
struct Node {
    hash: Hash,
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Leaf { key: Box<[u8]>, value: Arc<[u8]> },
    Inner { bit: u16, sealed: bool, left: Arc<Node>, right: Arc<Node> },
}

impl Node {
    /// The leaf that a search for `key` ends at: the only one that can hold it.
    fn search(&self, key: &[u8]) -> (&[u8], &Arc<[u8]>) {
        let mut node = self;
        loop {
            match &node.kind {
                Kind::Leaf { key, value } => return (key, value),
                Kind::Inner { bit, left, right, .. } => node = if bit_of(key, *bit) { right } else { left },
            }
        }
    }
    fn edge_key(&self, last: bool) -> &[u8] {
        let mut node = self;
        loop {
            match &node.kind {
                Kind::Leaf { key, .. } => return key,
                Kind::Inner { left, right, .. } => node = if last { right } else { left },
            }
        }
    }
}

fn lookup<'a>(root: Option<&'a Arc<Node>>, key: &[u8]) -> Option<&'a Arc<[u8]>> {
    let (found, value) = root?.search(key);
    (found == key).then_some(value)
}

/// The map that execution changes. Copies share what neither changes; copy it [sealed](Map::seal).
#[derive(Clone)]
pub struct Map {
    hasher: Hasher,
    root: Option<Arc<Node>>,
    len: usize,
}

impl Map {
    /// A map without entries.
    pub fn new(cluster: ClusterId) -> Self {
        Self { hasher: Hasher::new(cluster), root: None, len: 0 }
    }
    /// From entries; those whose key is too long for this map are left out.
    pub fn from_entries(cluster: ClusterId, entries: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Self {
        let mut map = Self::new(cluster);
        for (key, value) in entries.into_iter().filter(|(key, _)| key.len() <= MAX_MAP_KEY_BYTES) {
            map.insert(&key, value);
        }
        map
    }
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether there are no entries.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&Arc<[u8]>> {
        lookup(self.root.as_ref(), key)
    }
    /// Sets the value of a key.
    ///
    /// # Panics
    /// If the key is longer than [`MAX_MAP_KEY_BYTES`]: keys are built by the state machine from
    /// parts that it has already bounded.
    pub fn insert(&mut self, key: &[u8], value: Vec<u8>) {
        assert!(key.len() <= MAX_MAP_KEY_BYTES, "map keys are built from bounded parts");
        let leaf = Arc::new(Node {
            hash: self.hasher.leaf(key, &sha256(&value)),
            kind: Kind::Leaf { key: key.into(), value: value.into() },
        });
        let Some(root) = &mut self.root else {
            self.root = Some(leaf);
            self.len = 1;
            return;
        };
        let difference = first_difference(key, root.search(key).0);
        self.len += usize::from(difference.is_some());
        insert_below(root, key, leaf, difference);
    }
    /// Removes a key; says whether it was there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        if self.get(key).is_none() {
            return false;
        }
        self.len -= 1;
        match &mut self.root {
            Some(root) if matches!(root.kind, Kind::Inner { .. }) => remove_below(root, key),
            root => *root = None,
        }
        true
    }
    /// Entries from `from` on, in the order of keys.
    pub fn iter_from<'a>(&'a self, from: &[u8]) -> Iter<'a> {
        Iter::from(self.root.as_ref(), from)
    }
    /// Entries whose key begins with `prefix`, in the order of keys.
    pub fn iter_prefix<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Arc<[u8]>)> {
        self.iter_from(prefix).take_while(move |(key, _)| key.starts_with(prefix))
    }
    /// Computes the hashes of what changed and gives a snapshot that stays as it is.
    pub fn seal(&mut self) -> Snapshot {
        if let Some(root) = &mut self.root {
            seal_below(root, &self.hasher);
        }
        Snapshot { hasher: self.hasher, root: self.root.clone() }
    }
}

fn insert_below(mut node: &mut Arc<Node>, key: &[u8], leaf: Arc<Node>, difference: Option<u16>) {
    let goes_on = |node: &Node| match &node.kind {
        Kind::Leaf { .. } => false,
        Kind::Inner { bit, .. } => difference.is_none_or(|difference| *bit < difference),
    };
    while goes_on(node) {
        let Kind::Inner { bit, sealed, left, right } = &mut Arc::make_mut(node).kind else { return };
        *sealed = false;
        node = if bit_of(key, *bit) { right } else { left };
    }
    let Some(bit) = difference else {
        *node = leaf;
        return;
    };
    let other = Arc::clone(node);
    let (left, right) = if bit_of(key, bit) { (other, leaf) } else { (leaf, other) };
    *node = Arc::new(Node { hash: Hash([0; 32]), kind: Kind::Inner { bit, sealed: false, left, right } });
}

/// Removes the leaf of a key that is known to be below this inner node.
fn remove_below(mut node: &mut Arc<Node>, key: &[u8]) {
    let sibling_of_leaf = |node: &Node| match &node.kind {
        Kind::Leaf { .. } => None,
        Kind::Inner { bit, left, right, .. } => {
            let (child, sibling) = if bit_of(key, *bit) { (right, left) } else { (left, right) };
            matches!(child.kind, Kind::Leaf { .. }).then(|| Arc::clone(sibling))
        }
    };
    loop {
        if let Some(sibling) = sibling_of_leaf(node) {
            *node = sibling;
            return;
        }
        let Kind::Inner { bit, sealed, left, right } = &mut Arc::make_mut(node).kind else { return };
        *sealed = false;
        node = if bit_of(key, *bit) { right } else { left };
    }
}

/// As deep as the tree, whose keys were admitted: at most nine nodes for each of their bytes.
fn seal_below(node: &mut Arc<Node>, hasher: &Hasher) {
    if !matches!(node.kind, Kind::Inner { sealed: false, .. }) {
        return;
    }
    // An unsealed node was made after the last snapshot, so nobody else holds it.
    let node = Arc::get_mut(node).expect("snapshots hold only sealed nodes");
    if let Kind::Inner { bit, sealed, left, right } = &mut node.kind {
        seal_below(left, hasher);
        seal_below(right, hasher);
        *sealed = true;
        node.hash = hasher.inner(*bit, &left.hash, &right.hash);
    }
}

/// The map after some batch: cheap to clone, safe to share with readers.
#[derive(Clone)]
pub struct Snapshot {
    hasher: Hasher,
    root: Option<Arc<Node>>,
}

impl Snapshot {
    /// The digest of all entries.
    pub fn root(&self) -> Hash {
        self.root.as_ref().map_or_else(|| self.hasher.empty(), |node| node.hash)
    }
    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&Arc<[u8]>> {
        lookup(self.root.as_ref(), key)
    }
    /// Entries from `from` on, in the order of keys.
    pub fn iter_from<'a>(&'a self, from: &[u8]) -> Iter<'a> {
        Iter::from(self.root.as_ref(), from)
    }
    /// Entries whose key begins with `prefix`, in the order of keys.
    pub fn iter_prefix<'a>(&'a self, prefix: &'a [u8]) -> impl Iterator<Item = (&'a [u8], &'a Arc<[u8]>)> {
        self.iter_from(prefix).take_while(move |(key, _)| key.starts_with(prefix))
    }
}
impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Snapshot({:?})", self.root())
    }
}

/// Entries in the order of keys.
pub struct Iter<'a> {
    /// Subtrees still to visit, the next one last.
    stack: Vec<&'a Arc<Node>>,
}

impl<'a> Iter<'a> {
    fn from(root: Option<&'a Arc<Node>>, from: &[u8]) -> Self {
        let mut stack = Vec::new();
        let Some(root) = root else { return Self { stack } };
        let difference = first_difference(from, root.search(from).0);
        let mut node = root;
        loop {
            match (&node.kind, difference) {
                (Kind::Inner { bit, left, right, .. }, Some(difference)) if *bit < difference => {
                    node = if bit_of(from, *bit) {
                        right
                    } else {
                        stack.push(right);
                        left
                    };
                }
                (Kind::Inner { bit, left, right, .. }, None) => {
                    node = if bit_of(from, *bit) {
                        right
                    } else {
                        stack.push(right);
                        left
                    };
                }
                // All keys here part from `from` at one bit: they all follow it, or none does.
                (_, Some(difference)) => {
                    if !bit_of(from, difference) {
                        stack.push(node);
                    }
                    break;
                }
                (Kind::Leaf { .. }, None) => {
                    stack.push(node);
                    break;
                }
            }
        }
        Self { stack }
    }
}

impl<'a> Iterator for Iter<'a> {
    type Item = (&'a [u8], &'a Arc<[u8]>);
    fn next(&mut self) -> Option<Self::Item> {
        let mut node = self.stack.pop()?;
        loop {
            match &node.kind {
                Kind::Leaf { key, value } => return Some((key, value)),
                Kind::Inner { left, right, .. } => {
                    self.stack.push(right);
                    node = left;
                }
            }
        }
    }
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;
