use super::*;
use crate::bytes::{Hash, SecretBytes};
use crate::ids::AttemptId;
use crate::ids::ClusterId;
use crate::refresh::{Field, SCALARS_FROM, Seeds};
use crate::scalars;
use crate::shares::{Helping, Renewal, ShareOp};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng};

const ATTEMPT: AttemptId = AttemptId { epoch: Epoch(1), attempt: 1 };

/// Secrets and what they are.
type Keys = Vec<(u64, [u8; 32])>;

/// A cluster's shares of many secrets in epoch 1, every tenth of them a scalar; server `r` has lost them,
/// and may recover.
fn renewed(n: usize, secrets: u64, r: ServerId) -> (Thresholds, Keys, Vec<ShareSet>) {
    let thresholds = Thresholds::plan(n, None, None).unwrap();
    let mut rng = StdRng::seed_from_u64(n as u64);
    let mut sets = vec![ShareSet::new(); n];
    let mut keys = Vec::new();
    for index in 0..secrets {
        let (key, k) = (scalars::draw(&mut rng), thresholds.k());
        let (index, shares) = match index % 10 {
            9 => (SCALARS_FROM + index / 10, scalars::deal(&key, k, n, &mut rng)),
            _ => (index, crate::shamir::deal(&key.to_bytes(), k, n, &mut rng)),
        };
        keys.push((index, key.to_bytes()));
        for (set, share) in sets.iter_mut().zip(&shares) {
            let share = Some(SecretBytes::new(share));
            set.apply(&ShareOp::Store { index, epoch: Epoch(0), share, dealt: true });
        }
    }
    let seeds = Seeds::new(ClusterId(Hash([3; 32])), thresholds, ATTEMPT, true, Some(r));
    let dealer = |d: u8| (ServerId(d), seeds.draw(ServerId(d), &SecretBytes::new(&[d + 1; 32])));
    let dealings: Vec<_> = (0..n as u8 - 1).map(dealer).collect();
    for (i, set) in sets.iter_mut().enumerate() {
        let id = ServerId(i as u8);
        let held: Vec<_> = dealings.iter().map(|(d, all)| (*d, seeds.for_server(*d, all, id))).collect();
        let held: Vec<_> = held.iter().map(|(d, dealing)| (*d, dealing)).collect();
        let terms = seeds.zero_sharing(id, &held).filter(|_| id != r);
        let recovering = Some(Helping { server: r, attempt: ATTEMPT, masks: seeds.masks(id, &held) });
        set.apply(&ShareOp::Renew(Renewal { to: Epoch(1), terms, recovering }));
    }
    (thresholds, keys, sets)
}

/// Runs a recovery; `change` is what liars do to an answer.
fn recover(
    thresholds: Thresholds,
    sets: &mut [ShareSet],
    r: ServerId,
    silent: &[ServerId],
    mut change: impl FnMut(ServerId, &mut Masked),
) -> (u64, BTreeMap<ServerId, usize>) {
    let mut recovering = Recovering::new(r, thresholds, ATTEMPT, &sets[r.index()]);
    let (mut now, mut wrong) = (Timestamp(1_000_000), BTreeMap::new());
    while !recovering.is_done(&sets[r.index()]) {
        let mut recovery = recovering.tick(now, &sets[r.index()]);
        let asks = std::mem::take(&mut recovery.messages);
        let mut recoveries = vec![recovery];
        for (helper, ask) in asks.into_iter().filter(|(helper, _)| !silent.contains(helper)) {
            let PeerMessage::AskMasked(ask) = ask else { panic!("it asks for masked shares") };
            let Some(chunks) = sets[helper.index()].masked(r, ask.attempt, &ask.chunks) else { continue };
            let mut masked = Masked { attempt: ask.attempt, chunks };
            change(helper, &mut masked);
            recoveries.push(recovering.take(helper, masked));
        }
        for recovery in recoveries {
            recovery.wrong.into_iter().for_each(|(liar, count)| *wrong.entry(liar).or_default() += count);
            recovery.recovered.iter().for_each(|operation| sets[r.index()].apply(operation));
        }
        now = now.plus_ms(RETRANSMIT_MS);
    }
    (recovering.left.open, wrong)
}

fn assert_right(thresholds: Thresholds, keys: &Keys, sets: &[ShareSet], r: ServerId) {
    let helpers: Vec<_> = (0..thresholds.n()).filter(|i| *i != r.index()).take(thresholds.k() - 1).collect();
    for (index, key) in keys {
        let mut xs = vec![r.share_index()];
        xs.extend(helpers.iter().map(|i| *i as u8 + 1));
        let share = |x: &u8| sets[usize::from(*x) - 1].share(*index).expect("everyone has it");
        let shares: Vec<_> = xs.iter().map(|x| (*x, share(x))).collect();
        let points: Vec<_> = shares.iter().map(|(x, share)| (*x, share.expose())).collect();
        assert_eq!(Field::of(*index).interpolate(&points, 0).expose(), key, "secret {index}");
    }
}

#[test]
fn a_server_gets_the_shares_that_it_would_have_had() {
    for n in [4, 9, 16] {
        let r = ServerId(2);
        let (thresholds, keys, mut sets) = renewed(n, 300, r);
        assert_eq!(sets[2].counts().shares, 0);
        let (failed, wrong) = recover(thresholds, &mut sets, r, &[], |_, _| {});
        assert_eq!((failed, wrong.len()), (0, 0));
        assert_right(thresholds, &keys, &sets, r);
    }
}

/// f−1 liars beside the one that recovers: they change nothing, and are named.
#[test]
fn liars_change_nothing_and_are_named() {
    for n in [9, 16] {
        let r = ServerId(0);
        let (thresholds, keys, mut sets) = renewed(n, 150, r);
        let liars: Vec<_> = (1..thresholds.f() as u8).map(ServerId).collect();
        let mut rng = StdRng::seed_from_u64(7);
        let (failed, wrong) = recover(thresholds, &mut sets, r, &[], |helper, masked| {
            if liars.contains(&helper) {
                for value in masked.chunks.iter_mut().flat_map(|chunk| &mut chunk.values) {
                    let mut bytes = *value.expose();
                    bytes[rng.random_range(0..32)] ^= rng.random_range(1..=255u8);
                    *value = SecretBytes::new(&bytes);
                }
            }
        });
        assert_eq!(failed, 0);
        assert_eq!(wrong.keys().copied().collect::<Vec<_>>(), liars);
        assert_right(thresholds, &keys, &sets, r);
    }
}

/// Answers without a share are none: servers that wait for their own recovery show nobody that a secret has no shares.
#[test]
fn servers_without_shares_make_no_server_whole() {
    for n in [4, 9, 16] {
        let r = ServerId(2);
        let (thresholds, _, sets) = renewed(n, 20, r);
        // All but k−1 others have lost theirs as well, and say so.
        let (mut keeper, mut shares) = (Keeper::new(r, thresholds), sets[2].clone());
        let mut now = Timestamp(1_000_000);
        let ended = loop {
            let kept = keeper.tick(now, &shares);
            if kept.ended.is_some() {
                break kept.ended;
            }
            for (helper, ask) in kept.messages {
                let PeerMessage::AskMasked(ask) = ask else { panic!("it asks for masked shares") };
                let mut chunks = sets[helper.index()].masked(r, ask.attempt, &ask.chunks).unwrap();
                let keeps = helper.index() > n - thresholds.k();
                for chunk in chunks.iter_mut().filter(|_| !keeps) {
                    (chunk.filled, chunk.values) = (0, vec![]);
                }
                let kept = keeper.on_masked(helper, Masked { attempt: ask.attempt, chunks });
                kept.recovered.iter().for_each(|operation| shares.apply(operation));
            }
            now = now.plus_ms(RETRANSMIT_MS);
        };
        assert_eq!(ended, Some(Left { open: 20, excused: 0 }), "n = {n}");
        assert!(!shares.is_whole() && keeper.lacks_shares(&shares), "n = {n}");
    }
}

/// A depositor who dealt something that is no secret makes nobody less than whole; and whoever has that excuse says so
/// to others.
#[test]
fn what_was_dealt_wrongly_is_excused_by_index() {
    for n in [4, 9, 16] {
        let r = ServerId(0);
        let (thresholds, keys, mut sets) = renewed(n, 10, r);
        let bad = keys[3].0;
        let mut rng = StdRng::seed_from_u64(5);
        let (open, _) = recover(thresholds, &mut sets, r, &[], |_, masked| {
            for chunk in masked.chunks.iter_mut().filter(|chunk| chunk.chunk == bad / CHUNK as u64) {
                chunk.values[bad as usize] = SecretBytes::new(&rng.random());
            }
        });
        assert_eq!((open, sets[0].counts().excused, sets[0].counts().shares), (0, 1, 9), "n = {n}");
        assert!(sets[0].is_whole() && !sets[0].lacks(bad));
        // The next one recovers from servers of which f+1 have no share of it, and an excuse.
        let (mut lost, f) = (ShareSet::new(), thresholds.f());
        lost.apply(&ShareOp::Present {
            indices: keys.iter().map(|(index, _)| *index).collect(),
            epoch: Epoch(1),
        });
        sets[0] = lost;
        let (open, _) = recover(thresholds, &mut sets, r, &[], |helper, masked| {
            for chunk in masked.chunks.iter_mut().filter(|chunk| chunk.chunk == bad / CHUNK as u64) {
                if helper.index() <= f + 1 {
                    chunk.filled &= !(1 << bad);
                    chunk.excused |= 1 << bad;
                    chunk.values.remove(bad as usize);
                } else {
                    chunk.filled &= !(1 << bad);
                    chunk.values.remove(bad as usize);
                }
            }
        });
        assert_eq!((open, sets[0].counts().excused, sets[0].counts().shares), (0, 1, 9), "n = {n}");
        // If it comes back after all, its loss counts again.
        let back = vec![(bad, SecretBytes::new(&[1; 32]))];
        sets[0].apply(&ShareOp::Recovered { epoch: Epoch(1), shares: back, excused: vec![] });
        assert_eq!((sets[0].counts().excused, sets[0].counts().shares), (0, 10));
    }
}

/// What liars cost: no turn does more than it may, and none is named for another one's lies.
#[test]
fn liars_by_turns_are_named_and_cost_a_slot_each() {
    for n in [9, 16, 25] {
        let r = ServerId(n as u8 - 1);
        let (thresholds, keys, mut sets) = renewed(n, 300, r);
        let f = thresholds.f();
        let liars: Vec<_> = (0..f as u8 - 1).map(ServerId).collect();
        let (open, wrong) = recover(thresholds, &mut sets, r, &[], |helper, masked| {
            for chunk in masked.chunks.iter_mut().filter(|_| liars.contains(&helper)) {
                for (place, value) in chunk.values.iter_mut().enumerate() {
                    if place % liars.len() == helper.index() || place % 7 == 0 {
                        let mut bytes = *value.expose();
                        bytes[place % 31] ^= 1 + helper.0;
                        *value = SecretBytes::new(&bytes);
                    }
                }
            }
        });
        assert_eq!((open, wrong.keys().copied().collect::<Vec<_>>()), (0, liars), "n = {n}");
        assert_right(thresholds, &keys, &sets, r);
    }
}

#[test]
fn too_few_answers_fill_nothing_and_are_counted() {
    let r = ServerId(8);
    let (thresholds, keys, mut sets) = renewed(9, 10, r);
    // k+f−1 = 4 answers are needed: three are there.
    let silent: Vec<_> = (0..5).map(ServerId).collect();
    let (failed, _) = recover(thresholds, &mut sets, r, &silent, |_, _| {});
    assert_eq!((failed, sets[8].counts().shares), (10, 0));
    let (failed, _) = recover(thresholds, &mut sets, r, &silent[..4], |_, _| {});
    assert_eq!(failed, 0);
    assert_right(thresholds, &keys, &sets, r);
}

/// A helper gives its shares to the server that the log names, in that epoch, and to nobody else.
#[test]
fn nobody_else_is_given_masked_shares() {
    let (_, _, sets) = renewed(4, 3, ServerId(1));
    assert!(sets[0].masked(ServerId(1), ATTEMPT, &[0]).is_some());
    assert!(sets[0].masked(ServerId(2), ATTEMPT, &[0]).is_none());
    let other = AttemptId { attempt: 2, ..ATTEMPT };
    assert!(sets[0].masked(ServerId(1), other, &[0]).is_none());
    assert!(sets[1].masked(ServerId(1), ATTEMPT, &[0]).is_none());
    // What it gives is no share.
    let masked = &sets[0].masked(ServerId(1), ATTEMPT, &[0]).unwrap()[0];
    assert_ne!(Some(&masked.values[0]), sets[0].share(0).as_ref());
}

#[test]
fn answers_to_other_questions_are_ignored() {
    let r = ServerId(1);
    let (thresholds, _, mut sets) = renewed(4, 3, r);
    let (failed, _) = recover(thresholds, &mut sets, r, &[], |_, masked| match masked.chunks.first_mut() {
        Some(chunk) if chunk.chunk == 0 => chunk.values.truncate(1),
        _ => {}
    });
    assert_eq!(failed, 3);
    let (failed, _) = recover(thresholds, &mut sets, r, &[], |_, masked| masked.chunks.clear());
    assert_eq!(failed, 3);
}
