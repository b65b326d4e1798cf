use super::*;
use crate::bytes::Hash;
use crate::ids::AttemptId;
use crate::ids::ClusterId;
use crate::refresh::{SCALARS_FROM, Seeds};
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
    while !recovering.is_done() {
        let mut recovery = recovering.tick(now, &sets[r.index()]);
        let asks = std::mem::take(&mut recovery.asks);
        let mut recoveries = vec![recovery];
        for (helper, ask) in asks.into_iter().filter(|(helper, _)| !silent.contains(helper)) {
            let Some(chunks) = sets[helper.index()].masked(r, ask.attempt, &ask.chunks) else { continue };
            let mut masked = Masked { attempt: ask.attempt, chunks };
            change(helper, &mut masked);
            recoveries.push(recovering.take(helper, masked));
        }
        for recovery in recoveries {
            recovery.wrong.into_iter().for_each(|(liar, count)| *wrong.entry(liar).or_default() += count);
            let epoch = recovering.epoch;
            sets[r.index()].apply(&ShareOp::Recovered { epoch, shares: recovery.shares });
        }
        now = now.plus_ms(RETRANSMIT_MS);
    }
    (recovering.failed, wrong)
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

/// The acceptance rule (design §7): two liars whose errors vanish at two honest points put k+1 answers on
/// a wrong polynomial. With one answer less than k+f−1 asked for, they would be believed.
#[test]
fn a_wrong_share_is_never_accepted() {
    let (k, f, r) = (3, 3, 200);
    let (truth, mut rng) = ([[5; 32], [6; 32], [7; 32]], StdRng::seed_from_u64(3));
    let f_of = |x: u8| -> [u8; 32] {
        let square = gf256::multiply(x, x);
        std::array::from_fn(|i| {
            truth[0][i] ^ gf256::multiply(truth[1][i], x) ^ gf256::multiply(truth[2][i], square)
        })
    };
    for round in 0..200 {
        // Two liars among six that answered: a multiple of (x−1)(x−2) vanishes at honest points 1 and 2.
        let factor: u8 = rng.random_range(1..=255);
        let values: Vec<[u8; 32]> = (1..=6u8)
            .map(|x| {
                let error = gf256::multiply(factor, gf256::multiply(x ^ 1, x ^ 2));
                if x >= 5 { f_of(x).map(|byte| byte ^ error) } else { f_of(x) }
            })
            .collect();
        let points: Vec<_> = values.iter().enumerate().map(|(i, v)| (ServerId(i as u8), v)).collect();
        let bytes = Field::Bytes;
        let strict = accept(&points, k, k + f - 1, r, bytes);
        assert!(strict.is_none(), "round {round}: neither polynomial has five answers");
        let lax = accept(&points, k, k + f - 2, r, bytes);
        assert!(lax.is_none(), "round {round}: two polynomials with four answers each");
        let only_four =
            accept(&points[..2].iter().chain(&points[4..]).copied().collect::<Vec<_>>(), k, 4, r, bytes);
        assert_ne!(only_four.unwrap().0, SecretBytes::new(&f_of(r)), "this is how they would be believed");
        // With one more honest answer the truth is sure.
        let seventh = f_of(7);
        let all: Vec<_> = points.iter().copied().chain([(ServerId(6), &seventh)]).collect();
        let (share, liars) = accept(&all, k, k + f - 1, r, bytes).unwrap();
        assert_eq!(share, SecretBytes::new(&f_of(r)));
        assert_eq!(liars.iter().collect::<Vec<_>>(), [ServerId(4), ServerId(5)]);
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
