//! Bringing a map to a certified root by fetching only what differs (PBFT-PR §5.3: hierarchical
//! state partitions; here the partitions are the tree's own nodes).
//!
//! A server that is behind walks the tree under the certified root from the top. What it is sent
//! is a *part*: some nodes in preorder, the rest replaced by their hashes. A part has to have the
//! hash that its parent named, so nothing in it has to be believed, and a wrong one names its
//! sender. Wherever the server's own tree holds a subtree with the wanted hash, that is used.
//!
//! What may stand in a part: one tree in preorder, its topmost node shown, any of the others pruned. It may
//! show less than it could, since a server fills a message as it likes, but never nothing: every part
//! that is taken in brings at least one node, and where the whole tree's hashes come from is a certified root.

use super::{Kind, Map, Node, Snapshot, bit_of};
use crate::bytes::{Blob, Hash};
use crate::codec::sha256;
use crate::limits::{MAX_MAP_KEY_BYTES, PART_BYTES, PART_LEVELS};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Own subtrees that are compared with one wanted node at most; more are possible only where the
/// own tree has many keys that the wanted one lacks, and then fetching is the better way.
const CANDIDATES: usize = 32;

/// The way from the root to a node: at each inner node left (0) or right (1).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Path {
    length: u16,
    bits: Blob,
}

impl Path {
    fn child(&self, right: bool) -> Self {
        let mut path = self.clone();
        if path.length.is_multiple_of(8) {
            path.bits.0.push(0);
        }
        if right && let Some(last) = path.bits.0.last_mut() {
            *last |= 0x80 >> (path.length % 8);
        }
        path.length += 1;
        path
    }
    fn directions(&self) -> impl Iterator<Item = bool> + '_ {
        (0..self.length)
            .map(|i| self.bits.0.get(usize::from(i / 8)).is_some_and(|b| b & (0x80 >> (i % 8)) != 0))
    }
}

/// A part that somebody wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedPart {
    /// Its topmost node.
    pub path: Path,
    /// The asker has nothing like it: send as much as fits. Otherwise a few levels of hashes.
    pub whole: bool,
}

/// A node of a part, in preorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartItem {
    /// An inner node; its left, then its right subtree follow.
    Inner(u16),
    /// A subtree that is left out.
    Pruned(Hash),
    /// An entry.
    Leaf {
        /// Its key.
        key: Blob,
        /// Its value.
        value: Blob,
    },
}

/// Why a part is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PartError {
    /// Not one tree in preorder.
    #[error("a part of the state is malformed")]
    Malformed,
    /// Not the part that was asked for.
    #[error("a part of the state does not have the hash that it must have")]
    WrongHash,
}

impl Snapshot {
    /// The part that begins at a node, in at most about `room` bytes more than one entry; none if
    /// there is no such node.
    pub fn part(&self, wanted: &WantedPart, room: usize) -> Option<Vec<PartItem>> {
        let mut node = self.root.as_ref()?;
        for right_turn in wanted.path.directions() {
            let Kind::Inner { left, right, .. } = &node.kind else { return None };
            node = if right_turn { right } else { left };
        }
        let mut items = Vec::new();
        let mut bytes = 0;
        let mut stack = vec![(node, 0)];
        while let Some((node, level)) = stack.pop() {
            let top = level == 0;
            let shown = top || if wanted.whole { bytes < room } else { level < PART_LEVELS };
            match &node.kind {
                Kind::Inner { bit, left, right, .. } if shown => {
                    items.push(PartItem::Inner(*bit));
                    bytes += 3;
                    stack.push((right, level + 1));
                    stack.push((left, level + 1));
                }
                Kind::Leaf { key, value } if shown && (top || wanted.whole) => {
                    items.push(PartItem::Leaf { key: Blob(key.to_vec()), value: Blob(value.to_vec()) });
                    bytes += key.len() + value.len() + 4;
                }
                _ => {
                    items.push(PartItem::Pruned(node.hash));
                    bytes += 33;
                }
            }
        }
        Some(items)
    }

    /// What has to be written to turn these entries into `new`'s: changed entries, and keys that
    /// are gone.
    pub fn changes_to(&self, new: &Snapshot) -> Vec<crate::state::Leaf> {
        let mut changes = Vec::new();
        let (mut old, mut new) = (self.iter_from(&[]).peekable(), new.iter_from(&[]).peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return changes,
                (Some(_), None) => std::cmp::Ordering::Less,
                (None, Some(_)) => std::cmp::Ordering::Greater,
                (Some((a, _)), Some((b, _))) => a.cmp(b),
            };
            let (before, after) = (
                (!order.is_gt()).then(|| old.next()).flatten(),
                (!order.is_lt()).then(|| new.next()).flatten(),
            );
            match (before, after) {
                (Some((key, _)), None) => changes.push((key.to_vec(), None)),
                (Some((_, a)), Some((_, b))) if Arc::ptr_eq(a, b) || a == b => {}
                (_, Some((key, value))) => changes.push((key.to_vec(), Some(Arc::clone(value)))),
                (None, None) => return changes,
            }
        }
    }
}

/// The tree as far as it is known.
#[derive(Clone)]
enum Building {
    /// Not there yet.
    Wanted { hash: Hash, path: Path, candidates: Vec<Arc<Node>> },
    /// A subtree of the own tree, or an entry that was fetched.
    Have(Arc<Node>),
    /// A fetched inner node: places of its children.
    Inner { bit: u16, hash: Hash, left: usize, right: usize },
}

/// A map on its way to a certified root.
#[derive(Clone)]
pub struct Sync {
    base: Map,
    root: Hash,
    tree: Vec<Building>,
    /// Places that nobody has been asked for.
    wanted: Vec<usize>,
    missing: usize,
    fetched_entries: usize,
}

impl Sync {
    /// From the entries of `base` to those under `root`.
    pub fn new(base: &Snapshot, root: Hash) -> Self {
        let len = base.iter_from(&[]).count();
        Self::from_map(Map { hasher: base.hasher, root: base.root.clone(), len }, root)
    }

    fn from_map(mut base: Map, root: Hash) -> Self {
        let own = base.seal();
        let mut sync =
            Self { base, root, tree: Vec::new(), wanted: Vec::new(), missing: 0, fetched_entries: 0 };
        if root != own.hasher.empty() {
            sync.missing = 1;
            sync.tree.push(Building::Wanted { hash: root, path: Path::default(), candidates: Vec::new() });
            sync.settle(0, Path::default(), own.root.into_iter().collect());
        }
        sync
    }

    /// The same towards another root; what was fetched is not fetched again.
    pub fn towards(self, root: Hash) -> Self {
        let mut base = self.base;
        for node in &self.tree {
            if let Building::Have(node) = node
                && let Kind::Leaf { key, value } = &node.kind
                && base.get(key) != Some(value)
            {
                base.insert(key, value.to_vec());
            }
        }
        Self::from_map(base, root)
    }

    /// Where it goes.
    pub fn root(&self) -> Hash {
        self.root
    }
    /// Parts that are known to be missing; more may be found below them.
    pub fn missing(&self) -> usize {
        self.missing
    }
    /// Entries that came from others.
    pub fn fetched_entries(&self) -> usize {
        self.fetched_entries
    }
    /// Places that nobody has been asked for.
    pub fn unasked(&self) -> usize {
        self.wanted.len()
    }
    /// Takes the next place to ask for.
    pub fn next_wanted(&mut self) -> Option<(usize, WantedPart)> {
        while let Some(place) = self.wanted.pop() {
            if let Building::Wanted { path, candidates, .. } = &self.tree[place] {
                return Some((place, WantedPart { path: path.clone(), whole: candidates.is_empty() }));
            }
        }
        None
    }
    /// Nobody answered: ask for this place again.
    pub fn put_back(&mut self, place: usize) {
        if matches!(self.tree.get(place), Some(Building::Wanted { .. })) {
            self.wanted.push(place);
        }
    }

    /// Takes a part in.
    pub fn take(&mut self, place: usize, items: Vec<PartItem>) -> Result<(), PartError> {
        let Some(Building::Wanted { hash, path, candidates }) = self.tree.get(place) else { return Ok(()) };
        let (hash, path, candidates) = (*hash, path.clone(), candidates.clone());
        let before = self.tree.len();
        let parsed = self.parse(items).and_then(|(top, found)| match found == hash {
            true => Ok(top),
            false => Err(PartError::WrongHash),
        });
        match parsed {
            Ok(top) => {
                // The topmost node is the last one that was made.
                self.tree.swap(place, top);
                self.tree.truncate(top);
                self.settle(place, path, candidates);
                Ok(())
            }
            Err(error) => {
                self.tree.truncate(before);
                Err(error)
            }
        }
    }

    /// Puts the nodes of a part at the end of the tree, children first; gives the topmost one's
    /// place and hash. Backwards, so that a liar's nesting needs no stack.
    fn parse(&mut self, items: Vec<PartItem>) -> Result<(usize, Hash), PartError> {
        let hasher = self.base.hasher;
        let mut done: Vec<(usize, Hash)> = Vec::new();
        for item in items.into_iter().rev() {
            let (node, hash) = match item {
                PartItem::Pruned(hash) => {
                    (Building::Wanted { hash, path: Path::default(), candidates: vec![] }, hash)
                }
                PartItem::Leaf { key, value } => {
                    if key.len() > MAX_MAP_KEY_BYTES {
                        return Err(PartError::Malformed);
                    }
                    let hash = hasher.leaf(&key, &sha256(&value));
                    let kind = Kind::Leaf { key: key.0.into(), value: value.0.into() };
                    (Building::Have(Arc::new(Node { hash, kind })), hash)
                }
                PartItem::Inner(bit) => {
                    let (Some((left, left_hash)), Some((right, right_hash))) = (done.pop(), done.pop())
                    else {
                        return Err(PartError::Malformed);
                    };
                    let hash = hasher.inner(bit, &left_hash, &right_hash);
                    (Building::Inner { bit, hash, left, right }, hash)
                }
            };
            self.tree.push(node);
            done.push((self.tree.len() - 1, hash));
        }
        match done[..] {
            // A part that shows nothing would be asked for for ever.
            [(top, hash)] if !matches!(self.tree[top], Building::Wanted { .. }) => Ok((top, hash)),
            _ => Err(PartError::Malformed),
        }
    }

    /// Goes through a part that has just been put in: looks for what it leaves out in the own tree.
    fn settle(&mut self, top: usize, path: Path, candidates: Vec<Arc<Node>>) {
        let mut stack = vec![(top, path, candidates)];
        self.missing -= 1;
        while let Some((place, path, candidates)) = stack.pop() {
            match &mut self.tree[place] {
                Building::Have(_) => self.fetched_entries += 1,
                Building::Inner { bit, left, right, .. } => {
                    let (bit, left, right) = (*bit, *left, *right);
                    for (child, turn) in [(left, false), (right, true)] {
                        let mut below = Vec::new();
                        for candidate in &candidates {
                            descend(candidate, bit, turn, &mut below);
                        }
                        stack.push((child, path.child(turn), below));
                    }
                }
                Building::Wanted { hash, path: at, candidates: known } => {
                    if let Some(own) = candidates.iter().find(|candidate| candidate.hash == *hash) {
                        self.tree[place] = Building::Have(Arc::clone(own));
                    } else {
                        (*at, *known) = (path, candidates);
                        self.wanted.push(place);
                        self.missing += 1;
                    }
                }
            }
        }
    }

    /// The map.
    ///
    /// # Panics
    /// If something is [missing](Self::missing).
    pub fn finish(self) -> Map {
        let mut map = Map { hasher: self.base.hasher, root: self.assemble(), len: 0 };
        map.len = map.iter_from(&[]).count();
        debug_assert_eq!(map.seal().root(), self.root);
        map
    }

    /// Puts the nodes together, children first.
    fn assemble(&self) -> Option<Arc<Node>> {
        enum Step {
            Visit(usize),
            Join(u16, Hash),
        }
        let mut steps: Vec<_> = (!self.tree.is_empty()).then_some(Step::Visit(0)).into_iter().collect();
        let mut done: Vec<Arc<Node>> = Vec::new();
        while let Some(step) = steps.pop() {
            match step {
                Step::Visit(place) => match &self.tree[place] {
                    Building::Have(node) => done.push(Arc::clone(node)),
                    Building::Inner { bit, hash, left, right } => {
                        steps.extend([Step::Join(*bit, *hash), Step::Visit(*right), Step::Visit(*left)]);
                    }
                    Building::Wanted { .. } => panic!("a state is finished only when nothing is missing"),
                },
                Step::Join(bit, hash) => {
                    let (right, left) = (done.pop().expect("visited"), done.pop().expect("visited"));
                    done.push(Arc::new(Node { hash, kind: Kind::Inner { bit, sealed: true, left, right } }));
                }
            }
        }
        done.pop()
    }
}

/// The subtrees of `node` that can lie on one side of a wanted node that decides on `bit`.
fn descend(top: &Arc<Node>, bit: u16, turn: bool, found: &mut Vec<Arc<Node>>) {
    let mut stack = vec![top];
    while let Some(node) = stack.pop() {
        if found.len() >= CANDIDATES {
            return;
        }
        match &node.kind {
            Kind::Inner { bit: own, left, right, .. } if *own < bit => stack.extend([right, left]),
            Kind::Inner { bit: own, left, right, .. } if *own == bit => {
                found.push(Arc::clone(if turn { right } else { left }));
            }
            // All keys here agree on that bit.
            _ if bit_of(node.edge_key(false), bit) == turn => found.push(Arc::clone(node)),
            _ => {}
        }
    }
}

/// Answers to several wanted parts, as many as fit into one message.
pub fn parts_of(snapshot: &Snapshot, wanted: &[WantedPart]) -> Vec<Vec<PartItem>> {
    let mut parts = Vec::new();
    let mut room = PART_BYTES;
    for wanted in wanted {
        let Some(part) = snapshot.part(wanted, room) else { break };
        room = room.saturating_sub(part.iter().map(item_bytes).sum());
        parts.push(part);
        if room == 0 {
            break;
        }
    }
    parts
}

fn item_bytes(item: &PartItem) -> usize {
    match item {
        PartItem::Inner(_) => 3,
        PartItem::Pruned(_) => 33,
        PartItem::Leaf { key, value } => key.len() + value.len() + 4,
    }
}
