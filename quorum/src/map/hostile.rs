//! What a liar can make out of the right hashes: every structure, against the truth; nesting and items in
//! places where no correct server puts them, on a small stack.

use super::sync::{PartItem, Sync, parts_of};
use super::*;
use crate::bytes::Blob;
use proptest::prelude::*;
use std::collections::BTreeMap;

type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

fn hasher() -> Hasher {
    Hasher::new(ClusterId(Hash([1; 32])))
}

fn build(entries: &Entries) -> Snapshot {
    let entries = entries.iter().map(|(key, value)| (key.clone(), value.clone()));
    Map::from_entries(ClusterId(Hash([1; 32])), entries).seal()
}

/// Every way to show a subtree: each of its nodes pruned or shown, each leaf as an entry or a neighbour.
fn shown(node: &Node) -> Vec<Vec<RangeItem>> {
    let mut all = vec![vec![RangeItem::Pruned(node.hash)]];
    match &node.kind {
        Kind::Leaf { key, value } => {
            let key = Blob(key.to_vec());
            all.push(vec![RangeItem::Neighbour { key: key.clone(), value_hash: sha256(value) }]);
            all.push(vec![RangeItem::Entry { key, value: Blob(value.to_vec()) }]);
        }
        Kind::Inner { bit, left, right, .. } => {
            let rights = shown(right);
            for left in shown(left) {
                let inner =
                    |right: &Vec<RangeItem>| [&[RangeItem::Inner(*bit)], &left[..], &right[..]].concat();
                all.extend(rights.iter().map(inner));
            }
        }
    }
    all
}

/// The page as it should be.
fn truth(entries: &Entries, from: &[u8], to: &[u8], limit: usize, bytes: usize) -> Range {
    let (mut page, mut have) = (Vec::new(), 0);
    for (key, value) in entries.iter().filter(|(key, _)| &key[..] >= from && &key[..] < to) {
        if page.len() == limit || (have >= bytes && !page.is_empty()) {
            return Range { entries: page, until: Some(key.clone()) };
        }
        have += key.len() + value.len();
        page.push((key.clone(), value.clone()));
    }
    Range { entries: page, until: None }
}

/// Of all that can be made of a map's hashes, one proof is accepted for a page, and it shows the truth.
fn exactly_one_proof(entries: &Entries, probes: &[Vec<u8>], sizes: &[usize]) -> usize {
    let snapshot = build(entries);
    let structures = snapshot.root.as_ref().map_or(vec![vec![]], |root| shown(root));
    let mut tried = 0;
    for (from, to) in probes.iter().flat_map(|from| probes.iter().map(move |to| (from, to))) {
        for limit in 1..=entries.len() + 1 {
            for bytes in sizes {
                let page = Page::new(from, to, limit).of_bytes(*bytes);
                let honest = snapshot.prove_range(&page);
                let range = truth(entries, from, to, limit, *bytes);
                assert_eq!(honest.verify(&hasher(), &snapshot.root(), &page), Ok(range));
                for items in &structures {
                    tried += 1;
                    let lie = RangeProof { items: items.clone() };
                    let accepted = lie.verify(&hasher(), &snapshot.root(), &page);
                    assert!(accepted.is_err() || lie == honest, "{from:?}..{to:?}, {limit}: {lie:?}");
                    assert_ne!(accepted, Err(RangeProofError::WrongRoot), "its hashes are the right ones");
                }
            }
        }
    }
    tried
}

fn map_of(keys: &[&[u8]]) -> Entries {
    keys.iter().map(|key| (key.to_vec(), [&[7], *key].concat())).collect()
}

#[test]
fn of_all_structures_one_is_accepted_for_a_page() {
    let maps: [&[&[u8]]; 7] = [
        &[],
        &[b"b"],
        &[b"a", b"b"],
        &[b"", b"a", b"ab"],
        &[b"a", b"ab", b"abc", b"abcd"],
        &[b"\x00", b"\x00\x00", b"b", b"\xff"],
        &[b"a", b"b", b"c", b"d", b"e"],
    ];
    let mut tried = 0;
    for keys in maps {
        let entries = map_of(keys);
        // Ends of ranges: before, at and behind every key.
        let mut probes: Vec<Vec<u8>> = vec![b"".to_vec(), b"\xff\xff".to_vec()];
        probes.extend(keys.iter().flat_map(|key| [key.to_vec(), [key, &b"\0"[..]].concat()]));
        probes.sort();
        probes.dedup();
        tried += exactly_one_proof(&entries, &probes, &[usize::MAX]);
    }
    // Pages that end because they have the bytes that a page has.
    let entries = map_of(&[b"a", b"bb", b"c", b"dddd"]);
    let probes = [b"".to_vec(), b"a".to_vec(), b"b".to_vec(), b"d".to_vec(), b"e".to_vec()];
    tried += exactly_one_proof(&entries, &probes, &[0, 1, 3, 4, 5, 8, 9, 12, 100]);
    println!("{tried} structures");
    assert!(tried > 300_000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn of_all_structures_of_random_maps_one_is_accepted(
        entries in prop::collection::btree_map(short_keys(), prop::collection::vec(any::<u8>(), 0..3), 0..6),
        from in short_keys(), to in short_keys(), bytes in 0usize..12,
    ) {
        exactly_one_proof(&entries, &[from, to], &[bytes, usize::MAX]);
    }

    /// Any items at all: what is accepted is the truth, and nothing panics.
    #[test]
    fn arbitrary_items_show_nothing_but_the_truth(
        entries in prop::collection::btree_map(short_keys(), prop::collection::vec(any::<u8>(), 0..2), 0..6),
        items in prop::collection::vec(items(), 0..12),
        swaps in prop::collection::vec((any::<prop::sample::Index>(), items()), 0..3),
        (from, to) in (short_keys(), short_keys()), limit in 0usize..5,
    ) {
        let snapshot = build(&entries);
        let page = Page::new(&from, &to, limit);
        let honest = snapshot.prove_range(&page);
        let mut changed = honest.clone();
        for (at, item) in swaps {
            if !changed.items.is_empty() {
                let at = at.index(changed.items.len());
                changed.items[at] = item;
            }
        }
        for lie in [RangeProof { items }, changed] {
            let accepted = lie.verify(&hasher(), &snapshot.root(), &page);
            prop_assert!(accepted.is_err() || lie == honest, "{lie:?}");
        }
    }

    /// The same for parts of a state: one is taken in only if it is a part of the tree that was asked for.
    #[test]
    fn arbitrary_parts_are_refused(
        entries in prop::collection::btree_map(short_keys(), prop::collection::vec(any::<u8>(), 0..2), 1..6),
        items in prop::collection::vec(items(), 0..12),
    ) {
        let snapshot = build(&entries);
        let mut sync = Sync::new(&build(&Entries::new()), snapshot.root());
        let (place, _) = sync.next_wanted().unwrap();
        let part = items.into_iter().map(|item| match item {
            RangeItem::Inner(bit) => PartItem::Inner(bit),
            RangeItem::Pruned(hash) => PartItem::Pruned(hash),
            RangeItem::Entry { key, value } => PartItem::Leaf { key, value },
            RangeItem::Neighbour { key, value_hash } => PartItem::Leaf { key, value: Blob(value_hash.0.to_vec()) },
        });
        let part: Vec<_> = part.collect();
        // By chance it is the leaf of a map of one entry.
        let right = snapshot.part(&WantedPart { path: Path::default(), whole: true }, 1 << 20) == Some(part.clone());
        prop_assert_eq!(sync.take(place, part).is_ok(), right);
    }
}

/// No correct server signs such a root. Where a tree is shown, nobody has to trust that.
#[test]
fn what_is_shown_of_a_tree_is_well_formed() {
    let hasher = hasher();
    let value = sha256(&[1]);
    let entry = |key: &[u8]| RangeItem::Entry { key: Blob(key.to_vec()), value: Blob(vec![1]) };
    let leaf = |key: &[u8]| hasher.leaf(key, &value);
    let page = Page::new(b"", b"z", 9);
    let (a, b) = (&b"a"[..], &b"b"[..]);
    let parts = first_difference(a, b).unwrap();
    let verify = |bit, left: &[u8], right: &[u8]| {
        let root = hasher.inner(bit, &leaf(left), &leaf(right));
        let items = vec![RangeItem::Inner(bit), entry(left), entry(right)];
        RangeProof { items }.verify(&hasher, &root, &page).map(|range| range.entries.len())
    };
    assert_eq!(verify(parts, a, b), Ok(2));
    for (bit, left, right) in
        [(parts, b, a), (parts - 1, a, b), (parts + 1, a, b), (parts, a, a), (parts + 1, b, a), (5_000, a, b)]
    {
        assert_eq!(verify(bit, left, right), Err(RangeProofError::Malformed), "{bit}");
    }
    // One side hidden: `a` has a zero at this bit, and would lie left; and no key lies below a bit beyond its end.
    let other = Hash([9; 32]);
    let step = |bit| vec![Step { bit, sibling: other }];
    for bit in [parts, 40] {
        let root = hasher.inner(bit, &other, &leaf(a));
        let neighbour = RangeItem::Neighbour { key: Blob(a.to_vec()), value_hash: value };
        let items = vec![RangeItem::Inner(bit), RangeItem::Pruned(other), neighbour];
        let shown = RangeProof { items }.verify(&hasher, &root, &Page::new(b"b", b"c", 9));
        assert_eq!(shown, Err(RangeProofError::Malformed));
        // It would show that `b`, which has a one there, is absent.
        let terminal = Terminal::Leaf { key: Blob(a.to_vec()), value_hash: value };
        let absent = Proof { steps: step(bit), terminal }.verify(&hasher, &root, b"b\xff\xff\xff\xff\xff");
        assert_eq!(absent, Err(ProofError::Malformed));
    }
}

fn short_keys() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0u8, 1, 97, 98, 255]), 0..4)
}

fn items() -> impl Strategy<Value = RangeItem> {
    let long = prop_oneof![
        9 => short_keys(),
        // Beyond any key, and so long that positions of bits in it overflow.
        1 => (500usize..9_000).prop_map(|length| vec![97; length]),
    ];
    prop_oneof![
        prop_oneof![0u16..40, any::<u16>()].prop_map(RangeItem::Inner),
        any::<[u8; 32]>().prop_map(|hash| RangeItem::Pruned(Hash(hash))),
        (long, any::<bool>(), any::<[u8; 2]>()).prop_map(|(key, entry, value)| {
            let key = Blob(key);
            match entry {
                true => RangeItem::Entry { key, value: Blob(value.to_vec()) },
                false => RangeItem::Neighbour { key, value_hash: sha256(&value) },
            }
        }),
    ]
}

/// On a stack of 64 KiB, where a task of a server or client has two MiB.
fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().stack_size(64 * 1024).spawn(work).unwrap().join().unwrap();
}

#[test]
fn nesting_needs_no_stack() {
    on_a_small_stack(|| {
        let page = Page::new(b"a", b"b", 5);
        let hidden = || RangeItem::Pruned(Hash([3; 32]));
        let entry = || RangeItem::Entry { key: Blob(vec![97; 600]), value: Blob(vec![]) };
        for depth in [5_400u16, 5_409, u16::MAX] {
            let down = |from: u16| (from..depth).map(RangeItem::Inner);
            // To the left, to the right, never closed.
            let left: Vec<_> = down(0).chain((0..=depth).map(|_| hidden())).collect();
            let right: Vec<_> = down(0).flat_map(|inner| [inner, hidden()]).chain([hidden()]).collect();
            let shown: Vec<_> = down(0).flat_map(|inner| [inner, hidden()]).chain([entry()]).collect();
            for items in [left.clone(), right, shown, down(0).collect(), down(0).rev().collect()] {
                assert!(RangeProof { items }.verify(&hasher(), &Hash([1; 32]), &page).is_err());
            }
            let mut sync = Sync::new(&build(&Entries::new()), Hash([1; 32]));
            let (place, _) = sync.next_wanted().unwrap();
            let part = left.iter().map(|item| match item {
                RangeItem::Inner(bit) => PartItem::Inner(*bit),
                _ => PartItem::Pruned(Hash([3; 32])),
            });
            assert_eq!(sync.take(place, part.collect()), Err(PartError::WrongHash));
            let steps = (0..depth).map(|bit| Step { bit, sibling: Hash([3; 32]) }).collect();
            let terminal = Terminal::Leaf { key: Blob(vec![97; 600]), value_hash: Hash([3; 32]) };
            let path = Proof { steps, terminal };
            assert!(path.verify(&hasher(), &Hash([1; 32]), b"a").is_err());
        }
    });
}

/// The deepest tree that keys of a name's length can make: at every bit another one parts from the longest.
fn deepest(length: usize) -> Entries {
    let longest = vec![0xff; length];
    let parting = (0..9 * length).map(|bit| {
        let mut key = longest[..bit / 9].to_vec();
        if bit % 9 > 0 {
            key.push(0xff ^ (1 << (8 - bit % 9)));
        }
        key
    });
    parting.chain([longest.clone()]).map(|key| (key, vec![1])).collect()
}

/// Who may register names makes the tree as deep as names are long, and no deeper. What servers and clients do
/// with it fits into half the stack of a task, also in development builds.
#[test]
fn the_deepest_tree_fits_a_task() {
    let work = || {
        let entries = deepest(270);
        let snapshot = build(&entries);
        let last = entries.last_key_value().unwrap().0;
        assert_eq!(snapshot.prove(last).steps.len(), 9 * 270);
        assert!(matches!(
            snapshot.prove(last).verify(&hasher(), &snapshot.root(), last),
            Ok(Found::Value(_))
        ));
        let page = Page::new(&last[..260], &[0xff; 300], 1_000);
        let range = snapshot.prove_range(&page).verify(&hasher(), &snapshot.root(), &page).unwrap();
        assert_eq!(range.entries.last().map(|(key, _)| key), Some(last));
        let mut sync = Sync::new(&build(&Entries::new()), snapshot.root());
        while let Some((place, wanted)) = sync.next_wanted() {
            sync.take(place, parts_of(&snapshot, &[wanted]).remove(0)).unwrap();
        }
        let mut map = sync.finish();
        assert_eq!(map.seal().root(), snapshot.root());
        assert!(map.remove(last));
        assert_ne!(map.seal().root(), snapshot.root());
    };
    std::thread::Builder::new().stack_size(1024 * 1024).spawn(work).unwrap().join().unwrap();
}
