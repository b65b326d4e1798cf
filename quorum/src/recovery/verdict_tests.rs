use super::*;
use crate::shamir;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng};

const R: ServerId = ServerId(0);

/// What one other server says about a slot.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Word {
    Value([u8; 32]),
    Excused,
    Lacks,
}

struct World {
    thresholds: Thresholds,
    field: Field,
    rng: StdRng,
}

impl World {
    fn new(n: usize, field: Field, seed: u64) -> Self {
        let thresholds = Thresholds::plan(n, None, None).unwrap();
        Self { thresholds, field, rng: StdRng::seed_from_u64(seed) }
    }
    /// All servers' shares of a random secret.
    fn deal(&mut self) -> Vec<[u8; 32]> {
        let (k, n) = (self.thresholds.k(), self.thresholds.n());
        let key = scalars::draw(&mut self.rng);
        match self.field {
            Field::Bytes => shamir::deal(&key.to_bytes(), k, n, &mut self.rng).iter().map(|s| **s).collect(),
            Field::Scalars => scalars::deal(&key, k, n, &mut self.rng).iter().map(|s| **s).collect(),
        }
    }
    /// Another secret whose shares are the same at these servers, as liars would choose it.
    fn other_through(&mut self, shares: &[[u8; 32]], servers: &[usize]) -> Vec<[u8; 32]> {
        let random = self.deal();
        let mut points: Vec<_> = servers.iter().map(|i| (*i as u8 + 1, &shares[*i])).collect();
        let free = (0..shares.len()).filter(|i| !servers.contains(i));
        points.extend(free.take(self.thresholds.k() - servers.len()).map(|i| (i as u8 + 1, &random[i])));
        let at = |i: usize| *self.field.interpolate(&points, i as u8 + 1).expose();
        (0..shares.len()).map(at).collect()
    }
    fn some(&mut self, of: &[usize], count: usize) -> Vec<usize> {
        of.sample(&mut self.rng, count).copied().collect()
    }
    fn judge(&self, words: &[Word]) -> Verdict {
        let mut judge = Judge::new(R, self.thresholds);
        judge.decode(self.field, &answers(words), 0, &mut 1_000)
    }
}

/// Of the servers after the one that recovers.
fn answers(words: &[Word]) -> Answers {
    let answer = |word: &Word| {
        let mut values = Zeroizing::new(vec![0; CHUNK_BYTES]);
        if let Word::Value(value) = word {
            values[..32].copy_from_slice(value);
        }
        let bit = |set: bool| u128::from(set);
        let filled = bit(matches!(word, Word::Value(_)));
        Answer { filled, excused: bit(*word == Word::Excused), values }
    };
    words.iter().enumerate().map(|(i, word)| (ServerId(i as u8 + 1), answer(word))).collect()
}

/// Everything that liars may say of an honest depositor's secret, as cleverly as they can: another polynomial through as
/// many honest shares as possible, excuses, silence. Honest servers say their shares, or that they lack them.
fn with_liars(world: &mut World, count: usize) -> ([u8; 32], Vec<Word>, usize) {
    let (n, k) = (world.thresholds.n(), world.thresholds.k());
    let shares = world.deal();
    let everyone: Vec<usize> = (1..n).collect();
    let liars = world.some(&everyone, count);
    let honest: Vec<usize> = everyone.iter().copied().filter(|i| !liars.contains(i)).collect();
    let shared = world.some(&honest, k - 1);
    let other = world.other_through(&shares, &shared);
    let lacking = if world.rng.random_bool(0.5) { 0 } else { world.rng.random_range(0..honest.len()) };
    let lacking = world.some(&honest, lacking);
    let style = world.rng.random_range(0..4);
    let words = (1..n).map(|i| match () {
        _ if lacking.contains(&i) => Word::Lacks,
        _ if !liars.contains(&i) => Word::Value(shares[i]),
        _ if style == 0 || (style == 3 && world.rng.random_bool(0.5)) => Word::Excused,
        _ if style == 1 => Word::Value(scalars::draw(&mut world.rng).to_bytes()),
        _ => Word::Value(other[i]),
    });
    (shares[0], words.collect(), honest.len() - lacking.len())
}

/// Design §7: nothing wrong is accepted and nothing is excused that an honest depositor dealt; and k+f−1 honest shares
/// are enough.
#[test]
fn liars_have_nothing_accepted_and_nothing_excused() {
    for (n, field, rounds) in
        [(4, Field::Bytes, 400), (9, Field::Bytes, 600), (16, Field::Bytes, 400), (25, Field::Bytes, 300)]
            .into_iter()
            .chain([(4, Field::Scalars, 60), (9, Field::Scalars, 60), (16, Field::Scalars, 20)])
    {
        let mut world = World::new(n, field, n as u64);
        let (k, f) = (world.thresholds.k(), world.thresholds.f());
        let robust = n > k + 2 * f;
        for round in 0..rounds {
            // One more than this server counts for is borne where that can be told.
            let count = world.rng.random_range(0..f + usize::from(robust));
            let (truth, words, honest) = with_liars(&mut world, count);
            let values = words.iter().filter(|word| matches!(word, Word::Value(_))).count();
            match world.judge(&words) {
                // f liars who are believed to be f−1 at most may be believed where there are few other values.
                Verdict::Share(share, _) => {
                    let sure = count < f || values >= k + 2 * f;
                    assert!(!sure || *share.expose() == truth, "n = {n}, round {round}: {words:?}");
                }
                Verdict::Excused => panic!("n = {n}, round {round}, {count} liars: {words:?}"),
                Verdict::Open => {
                    let enough = honest >= k + f - 1 && count < f || honest >= k + f && values >= k + 2 * f;
                    assert!(!enough, "n = {n}, round {round}, {count} liars: {words:?}");
                }
            }
        }
    }
}

/// Whatever a depositor dealt, words of all others decide: so she stops no renewal.
#[test]
fn no_depositor_leaves_a_slot_open_for_ever() {
    for n in [4, 9, 16, 25] {
        let mut world = World::new(n, Field::Bytes, 7 + n as u64);
        let (k, everyone) = (world.thresholds.k(), (1..n).collect::<Vec<_>>());
        let (mut filled, mut excused) = (0, 0);
        for _ in 0..2_000 {
            let shares = world.deal();
            let shared = world.rng.random_range(0..k);
            let shared = world.some(&everyone, shared);
            let other = world.other_through(&shares, &shared);
            // On one polynomial, on another, on none, or nothing that opens.
            let [first, second, third] = [(); 3].map(|()| world.rng.random_range(0..n));
            let mut places = everyone.clone();
            while places.len() > first {
                places.pop();
            }
            let places = world.some(&everyone, places.len());
            let others = world.some(&everyone, second.min(n - 1));
            let empty = world.some(&everyone, third.min(n - 1) / 2);
            let words: Vec<Word> = (1..n)
                .map(|i| match () {
                    _ if places.contains(&i) => Word::Value(shares[i]),
                    _ if others.contains(&i) => Word::Value(other[i]),
                    _ if empty.contains(&i) => Word::Excused,
                    _ => Word::Value(world.rng.random()),
                })
                .collect();
            match world.judge(&words) {
                Verdict::Share(..) => filled += 1,
                Verdict::Excused => excused += 1,
                Verdict::Open => panic!("n = {n}: {words:?}"),
            }
        }
        assert!(filled > 100 && excused > 100, "n = {n}: {filled} filled, {excused} excused");
    }
}

/// The acceptance rule by its definition: some polynomial of degree below k that k+f−1 values lie on, if only one is.
fn by_definition(world: &World, words: &[Word]) -> Vec<[u8; 32]> {
    let (k, needed) = (world.thresholds.k(), world.thresholds.k() + world.thresholds.f() - 1);
    let values = words.iter().enumerate().filter_map(|(i, word)| match word {
        Word::Value(value) => Some((i as u8 + 2, value)),
        _ => None,
    });
    let points: Vec<(u8, &[u8; 32])> = values.collect();
    let mut found: Vec<[u8; 32]> = Vec::new();
    if points.len() < needed {
        return found;
    }
    let mut subset: Vec<usize> = (0..k).collect();
    loop {
        let base: Vec<_> = subset.iter().map(|i| points[*i]).collect();
        let at = |x: u8| *world.field.interpolate(&base, x).expose();
        if points.iter().filter(|(x, value)| at(*x) == **value).count() >= needed {
            found.push(at(R.share_index()));
        }
        let Some(at) = (0..k).rev().find(|&i| subset[i] < points.len() - k + i) else { break };
        subset[at] += 1;
        (at + 1..k).for_each(|i| subset[i] = subset[i - 1] + 1);
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Whatever is accepted of at most f−1 wrong values is what the rule says; with f wrong ones it is what f liars cannot
/// change (see the module).
#[test]
fn decoding_keeps_the_acceptance_rule() {
    for n in [4, 9] {
        let mut world = World::new(n, Field::Bytes, 40 + n as u64);
        let (f, mut accepted) = (world.thresholds.f(), 0);
        for _ in 0..1_500 {
            let count = world.rng.random_range(0..=2 * f);
            let count = count.min(n - 1 - world.thresholds.k());
            let (_, words, _) = with_liars(&mut world, count);
            let Verdict::Share(share, wrong) = world.judge(&words) else { continue };
            let found = by_definition(&world, &words);
            assert!(found.contains(share.expose()), "n = {n}: {words:?}");
            assert!(found.len() == 1 || wrong.len() == f, "n = {n}: {words:?}");
            accepted += 1;
        }
        assert!(accepted > 200, "{accepted}");
    }
}

/// All slots at once, or one by one: the same comes out.
#[test]
fn a_chunk_at_once_is_what_its_slots_are_alone() {
    for (n, field, chunk) in
        [(9, Field::Bytes, 0), (16, Field::Bytes, 0), (9, Field::Scalars, crate::refresh::SCALARS_FROM / 128)]
    {
        let mut world = World::new(n, field, 60 + n as u64);
        let mut all = answers(&vec![Word::Lacks; n - 1]);
        let mut alone = Vec::new();
        for place in 0..40 {
            let count = world.rng.random_range(0..=world.thresholds.f());
            let (_, words, _) = with_liars(&mut world, count);
            for (word, answer) in words.iter().zip(all.values_mut()) {
                match word {
                    Word::Value(value) => {
                        answer.filled |= 1 << place;
                        answer.values[32 * place..32 * place + 32].copy_from_slice(value);
                    }
                    Word::Excused => answer.excused |= 1 << place,
                    Word::Lacks => {}
                }
            }
            alone.push(world.judge(&words));
        }
        let (mut judge, mut found) = (Judge::new(R, world.thresholds), Found::default());
        let open = (1 << 40) - 1;
        let mut gaps = Gaps { open, unseen: open };
        // In turns as short as can be.
        while gaps.open & gaps.unseen != 0 {
            judge.look(chunk, &all, &mut gaps, &mut found, &mut 1);
        }
        for (place, verdict) in alone.into_iter().enumerate() {
            let index = chunk * 128 + place as u64;
            let share = found.shares.iter().find(|(at, _)| *at == index).map(|(_, share)| share);
            let (excused, is_open) = (found.excused.contains(&index), gaps.open & (1 << place) != 0);
            match verdict {
                Verdict::Share(expected, _) => assert_eq!(share, Some(&expected)),
                Verdict::Excused => assert!(excused && share.is_none() && !is_open),
                Verdict::Open => assert!(is_open && share.is_none() && !excused),
            }
        }
    }
}

/// Who was wrong in one slot is believed last in the next: liars cost a few decodings, and not one for each secret.
#[test]
fn liars_cost_as_many_decodings_as_they_are() {
    let mut world = World::new(16, Field::Bytes, 80);
    let mut all = answers(&[Word::Lacks; 15]);
    for place in 0..128 {
        let shares = world.deal();
        for (server, answer) in &mut all {
            let mut value = shares[server.index()];
            value[place % 32] ^= u8::from(server.index() < world.thresholds.f());
            answer.filled |= 1 << place;
            answer.values[32 * place..32 * place + 32].copy_from_slice(&value);
        }
    }
    let (mut judge, mut found) = (Judge::new(R, world.thresholds), Found::default());
    let (mut gaps, mut budget) = (Gaps { open: u128::MAX, unseen: u128::MAX }, 1_000);
    judge.look(0, &all, &mut gaps, &mut found, &mut budget);
    assert_eq!((gaps.open, found.shares.len()), (0, 128));
    assert!(budget > 990, "{} decodings", 1_000 - budget);
}
