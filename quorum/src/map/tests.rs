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
        from in keys(), to in keys(), limit in 1usize..6, drop in any::<prop::sample::Index>(),
    ) {
        let (from, to) = if from <= to { (from, to) } else { (to, from) };
        let snapshot = build(&entries);
        let proof = snapshot.prove_range(&from, &to, limit);
        let range = proof.verify(&hasher(), &snapshot.root(), &from, &to).unwrap();
        let all: Vec<_> = entries.range(from.clone()..to.clone()).map(|(k, v)| (k.clone(), v.clone())).collect();
        let page = all.iter().take(limit).cloned().collect::<Vec<_>>();
        prop_assert_eq!(&range.entries, &page);
        prop_assert_eq!(range.until.is_some(), all.len() > limit);
        prop_assert_eq!(range.until, all.get(limit).map(|(key, _)| key.clone()));

        // Hiding an entry behind its hash, or turning it into a mere neighbour, never shortens the list unnoticed.
        let shown: Vec<_> = proof.items.iter().enumerate()
            .filter(|(_, item)| matches!(item, RangeItem::Entry { .. })).map(|(i, _)| i).collect();
        if !shown.is_empty() {
            let at = shown[drop.index(shown.len())];
            let RangeItem::Entry { key, value } = proof.items[at].clone() else { unreachable!() };
            let mut hidden = proof.clone();
            hidden.items[at] = RangeItem::Pruned(hasher().leaf(&key, &sha256(&value)));
            if let Ok(range) = hidden.verify(&hasher(), &snapshot.root(), &from, &to) {
                // Allowed only if the page now honestly ends before it, or it was not in the range.
                let in_range = key.0 >= from && key.0 < to;
                prop_assert!(!in_range || range.until.is_some_and(|until| until <= key.0));
            }
            let mut demoted = proof;
            demoted.items[at] = RangeItem::Neighbour { key: key.clone(), value_hash: sha256(&value) };
            let range = demoted.verify(&hasher(), &snapshot.root(), &from, &to).unwrap();
            prop_assert_eq!(range.until.as_deref(), Some(&key[..]).filter(|k| *k >= &from[..] && *k < &to[..]));
        }
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
    let range = RangeProof { items: vec![RangeItem::Inner(3)] };
    assert_eq!(range.verify(&hasher(), &snapshot.root(), b"a", b"b"), Err(RangeProofError::Malformed));
    let hidden = RangeProof { items: vec![RangeItem::Pruned(snapshot.root())] };
    assert_eq!(hidden.verify(&hasher(), &snapshot.root(), b"a", b"b"), Err(RangeProofError::Omits));
}
