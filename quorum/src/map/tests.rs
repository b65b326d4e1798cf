use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn map() -> Map {
    Map::new(ClusterId(Hash([1; 32])))
}
fn hasher() -> Hasher {
    map().hasher
}

fn build(entries: &BTreeMap<Vec<u8>, Vec<u8>>) -> Snapshot {
    let mut map = map();
    for (key, value) in entries {
        map.insert(key, value.clone());
    }
    map.seal()
}

/// Short keys over a tiny alphabet, so that prefixes and shared bits are common.
fn keys() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 97, 98, 255]), 0..5)
}

proptest! {
    #[test]
    fn it_behaves_as_a_sorted_map_whatever_the_history(
        steps in prop::collection::vec((keys(), prop::option::of(any::<u8>()), any::<bool>()), 0..60),
        probe in keys(),
    ) {
        let (mut ours, mut model, mut old) = (map(), BTreeMap::new(), vec![]);
        for (key, value, seal) in steps {
            match value {
                Some(value) => {
                    ours.insert(&key, vec![value]);
                    model.insert(key, vec![value]);
                }
                None => prop_assert_eq!(ours.remove(&key), model.remove(&key).is_some()),
            }
            prop_assert_eq!(ours.len(), model.len());
            if seal {
                old.push((ours.seal(), model.clone()));
            }
        }
        old.push((ours.seal(), model));
        // Snapshots stay as they were, and the root depends on the entries alone.
        for (snapshot, model) in &old {
            let entries: Vec<_> = snapshot.iter_from(&[]).map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
            prop_assert_eq!(&entries, &model.clone().into_iter().collect::<Vec<_>>());
            prop_assert_eq!(snapshot.root(), build(model).root());
            let from: Vec<_> = snapshot.iter_from(&probe).map(|(k, _)| k.to_vec()).collect();
            prop_assert_eq!(from, model.range(probe.clone()..).map(|(k, _)| k.clone()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn proofs_show_what_the_map_holds_and_nothing_else(
        entries in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 0..30),
        probe in keys(),
        lie in any::<prop::sample::Index>(),
        flip in 0u8..8,
    ) {
        let snapshot = build(&entries);
        let proof = snapshot.prove(&probe);
        let expected = entries.get(&probe).map_or(Found::Absent, |value| Found::Value(sha256(value)));
        prop_assert_eq!(proof.verify(&hasher(), &snapshot.root(), &probe), Ok(expected));
        prop_assert_eq!(snapshot.get(&probe).map(|v| v.to_vec()), entries.get(&probe).cloned());

        // Any flipped bit of the proof is noticed: it fails, or (a changed neighbour's key can
        // never lead to the root) it is not accepted.
        let mut bytes = crate::codec::encode(&proof);
        let at = lie.index(bytes.len());
        bytes[at] ^= 1 << flip;
        if let Ok(forged) = crate::codec::decode::<Proof>(&bytes)
            && forged != proof
        {
            prop_assert!(forged.verify(&hasher(), &snapshot.root(), &probe).is_err());
        }
    }

    #[test]
    fn a_proof_for_one_key_is_not_a_proof_for_another(
        entries in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 1..30),
        one in keys(), other in keys(),
    ) {
        let snapshot = build(&entries);
        if let Ok(found) = snapshot.prove(&one).verify(&hasher(), &snapshot.root(), &other) {
            let expected = entries.get(&other).map_or(Found::Absent, |value| Found::Value(sha256(value)));
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_listing_shows_all_of_its_range(
        entries in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 0..30),
        from in keys(), to in keys(), limit in 1usize..6,
    ) {
        let (from, to) = if from <= to { (from, to) } else { (to, from) };
        let snapshot = build(&entries);
        let asked = Page::new(&from, &to, limit);
        let range = snapshot.prove_range(&asked).verify(&hasher(), &snapshot.root(), &asked).unwrap();
        let all: Vec<_> = entries.range(from.clone()..to.clone()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let page = all.iter().take(limit).cloned().collect::<Vec<_>>();
        prop_assert_eq!(&range.entries, &page);
        prop_assert_eq!(range.until, all.get(limit).map(|(key, _)| key.clone()));
    }
}

#[test]
fn malformed_paths_are_refused() {
    let entries = [(b"a".to_vec(), vec![1]), (b"b".to_vec(), vec![2]), (b"c".to_vec(), vec![3])].into();
    let snapshot = build(&entries);
    let good = snapshot.prove(b"b");
    assert!(good.steps.len() > 1);
    let mut reversed = good.clone();
    reversed.steps.reverse();
    assert_eq!(reversed.verify(&hasher(), &snapshot.root(), b"b"), Err(ProofError::Malformed));
    let mut far = good.clone();
    far.steps.last_mut().unwrap().bit = u16::MAX;
    assert_eq!(far.verify(&hasher(), &snapshot.root(), b"b"), Err(ProofError::Malformed));
    let empty = Proof { steps: good.steps, terminal: Terminal::Empty };
    assert_eq!(empty.verify(&hasher(), &snapshot.root(), b"b"), Err(ProofError::Malformed));
    let page = Page::new(b"a", b"b", 9);
    let range = RangeProof { items: vec![RangeItem::Inner(3)] };
    assert_eq!(range.verify(&hasher(), &snapshot.root(), &page), Err(RangeProofError::Malformed));
    let hidden = RangeProof { items: vec![RangeItem::Pruned(snapshot.root())] };
    assert_eq!(hidden.verify(&hasher(), &snapshot.root(), &page), Err(RangeProofError::Omits));
    // The same hashes, and a leaf that does not lie where the path leads.
    let elsewhere = snapshot.prove(b"c");
    assert_eq!(elsewhere.verify(&hasher(), &snapshot.root(), b"b"), Err(ProofError::Malformed));
}

/// One exchange after the other until the map is there; gives it and the bytes that travelled.
fn transfer(base: &Snapshot, from: &Snapshot, at_a_time: usize) -> (Map, usize) {
    let mut sync = Sync::new(base, from.root());
    let mut bytes = 0;
    while sync.missing() > 0 {
        let asked: Vec<_> = (0..at_a_time).map_while(|_| sync.next_wanted()).collect();
        let wanted: Vec<_> = asked.iter().map(|(_, wanted)| wanted.clone()).collect();
        let parts = parts_of(from, &wanted);
        bytes += crate::codec::encode(&wanted).len() + crate::codec::encode(&parts).len();
        let mut parts = parts.into_iter();
        for (place, _) in asked {
            match parts.next() {
                Some(part) => sync.take(place, part).unwrap(),
                None => sync.put_back(place),
            }
        }
    }
    (sync.finish(), bytes)
}

proptest! {
    #[test]
    fn any_map_becomes_any_other(
        old in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 0..40),
        new in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 0..40),
        later in prop::collection::btree_map(keys(), prop::collection::vec(any::<u8>(), 0..3), 0..40),
        at_a_time in 1usize..5,
        lie in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let (from, to) = (build(&old), build(&new));
        let (mut map, _) = transfer(&from, &to, at_a_time);
        prop_assert_eq!(map.len(), new.len());
        let sealed = map.seal();
        prop_assert_eq!(sealed.root(), to.root());
        let entries: BTreeMap<_, _> = sealed.iter_from(&[]).map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
        prop_assert_eq!(&entries, &new);

        // What is written to disk turns the old entries into the new ones.
        let mut disk = old.clone();
        for (key, value) in from.changes_to(&to) {
            prop_assert_ne!(disk.get(&key).map(|value| &value[..]), value.as_deref());
            match value {
                Some(value) => disk.insert(key, value.to_vec()),
                None => disk.remove(&key),
            };
        }
        prop_assert_eq!(disk, new);

        // Broken off in the middle, and on towards a third map; a changed part is refused.
        let mut sync = Sync::new(&from, to.root());
        for _ in 0..3 {
            let Some((place, wanted)) = sync.next_wanted() else { break };
            let part = to.part(&wanted, crate::limits::PART_BYTES).unwrap();
            let mut wrong = part.clone();
            let at = lie.0.index(wrong.len());
            match &mut wrong[at] {
                PartItem::Inner(bit) => *bit ^= 1,
                PartItem::Pruned(hash) => hash.0[lie.1.index(32)] ^= 1,
                PartItem::Leaf { value, .. } => value.0.push(0),
            }
            let missing = sync.missing();
            prop_assert!(sync.take(place, wrong).is_err());
            let mut longer = part.clone();
            longer.push(PartItem::Inner(7));
            prop_assert!(sync.take(place, longer).is_err());
            prop_assert_eq!(sync.missing(), missing);
            prop_assert_eq!(sync.take(place, part), Ok(()));
        }
        let third = build(&later);
        let mut sync = sync.towards(third.root());
        while let Some((place, wanted)) = sync.next_wanted() {
            sync.take(place, third.part(&wanted, 40).unwrap()).unwrap();
        }
        prop_assert_eq!(sync.missing(), 0);
        let map = sync.finish();
        prop_assert_eq!(map.len(), later.len());
    }
}

/// Of 100,000 records 100 differ, and only about those travel.
#[test]
fn only_the_difference_travels() {
    let key = |i: u32| format!("n/user-{:05}@example.org", i * 7_919 % 100_000).into_bytes();
    let mut theirs = map();
    for i in 0..100_000 {
        theirs.insert(&key(i), vec![7; 200]);
    }
    let before = theirs.seal();
    let everything = transfer(&map().seal(), &before, 32).1;
    for i in 0..90 {
        theirs.insert(&key(i * 1000), vec![8; 200]);
    }
    for i in 90..100 {
        theirs.remove(&key(i * 1000));
    }
    let after = theirs.seal();
    let (ours, bytes) = transfer(&before, &after, 32);
    assert_eq!(ours.len(), theirs.len());
    let entry = 200 + key(0).len();
    println!(
        "100 of 100,000 differ: {bytes} bytes, {:.1} times the changed entries, {:.2} % of the {everything} bytes of all",
        bytes as f64 / (100 * entry) as f64,
        100.0 * bytes as f64 / everything as f64
    );
    assert!(everything < 100_000 * (entry + 60), "a whole map travels with little beside its entries");
    assert!(bytes < everything / 50, "{bytes} of {everything} bytes for 100 of 100,000 entries");
}

#[test]
fn nobody_is_given_a_part_that_is_not_there() {
    let one = build(&BTreeMap::from([(b"a".to_vec(), vec![1])]));
    let sync_from = |path: &[u8]| crate::codec::decode::<WantedPart>(path).unwrap();
    // Path of two turns in a map of one leaf; a path whose bits are missing.
    assert!(one.part(&sync_from(&[2, 1, 0x40, 0]), 100).is_none());
    assert!(one.part(&sync_from(&[200, 1, 0, 1]), 100).is_none());
    assert!(map().seal().part(&sync_from(&[0, 0, 0]), 100).is_none());
}
