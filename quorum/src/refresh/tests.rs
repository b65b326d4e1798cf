use super::*;
use crate::gf256::{invert, lagrange, multiply};
use crate::ids::Epoch;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng};
use std::collections::BTreeMap;

const CLUSTER: ClusterId = ClusterId(Hash([7; 32]));
const ATTEMPT: AttemptId = AttemptId { epoch: Epoch(5), attempt: 2 };

fn thresholds(n: usize, k: usize) -> Thresholds {
    let (n, faulty) = (n as u16, (n as u16 - 1) / 3);
    Thresholds {
        servers: n,
        side: 1,
        faulty,
        quorum: (n + faulty + 1).div_ceil(2),
        masked: 0,
        rows: 1,
        columns: 0,
        threshold: k as u16,
    }
}

/// Every k that `plan` accepts up to 16 servers.
fn planned() -> impl Iterator<Item = (usize, usize)> {
    [4, 9, 16].into_iter().flat_map(|n| {
        let accepts = move |k: &usize| Thresholds::plan(n, None, Some(*k as u16)).is_ok();
        (2..=n).filter(accepts).map(move |k| (n, k))
    })
}

/// An element of either field, for linear algebra.
trait Number: Copy + PartialEq {
    const ZERO: Self;
    const ONE: Self;
    fn of(coefficient: Coefficient) -> Self;
    fn times(self, other: Self) -> Self;
    fn inverse(self) -> Self;
    /// self − factor·other
    fn less(self, factor: Self, other: Self) -> Self;
    fn index(i: ServerId) -> Self;
}
impl Number for u8 {
    const ZERO: Self = 0;
    const ONE: Self = 1;
    fn of(coefficient: Coefficient) -> Self {
        coefficient.byte
    }
    fn times(self, other: Self) -> Self {
        multiply(self, other)
    }
    fn inverse(self) -> Self {
        invert(self)
    }
    fn less(self, factor: Self, other: Self) -> Self {
        self ^ multiply(factor, other)
    }
    fn index(i: ServerId) -> Self {
        i.share_index()
    }
}
impl Number for Scalar {
    const ZERO: Self = Scalar::ZERO;
    const ONE: Self = Scalar::ONE;
    fn of(coefficient: Coefficient) -> Self {
        scalars::whole(coefficient.whole)
    }
    fn times(self, other: Self) -> Self {
        self * other
    }
    fn inverse(self) -> Self {
        self.invert()
    }
    fn less(self, factor: Self, other: Self) -> Self {
        self - factor * other
    }
    fn index(i: ServerId) -> Self {
        Scalar::from(i.share_index())
    }
}

fn rank<T: Number>(mut rows: Vec<Vec<T>>) -> usize {
    let width = rows.first().map_or(0, Vec::len);
    let mut rank = 0;
    for column in 0..width {
        let Some(pivot) = (rank..rows.len()).find(|row| rows[*row][column] != T::ZERO) else { continue };
        rows.swap(rank, pivot);
        let inverse = rows[rank][column].inverse();
        let pivot = rows[rank].clone();
        for row in &mut rows[rank + 1..] {
            let factor = row[column].times(inverse);
            row.iter_mut().zip(&pivot).for_each(|(a, b)| *a = a.less(factor, *b));
        }
        rank += 1;
    }
    rank
}

#[derive(serde::Deserialize)]
struct Vectors {
    cases: Vec<Case>,
}
#[derive(serde::Deserialize)]
struct Case {
    n: usize,
    k: usize,
    secret: String,
    shares: BTreeMap<String, String>,
    zero: Zero,
    refreshed: BTreeMap<String, String>,
    recovery: Recovery,
}
#[derive(serde::Deserialize)]
struct Zero {
    terms: BTreeMap<String, String>,
    share: BTreeMap<String, String>,
}
#[derive(serde::Deserialize)]
struct Recovery {
    index: u8,
    terms: BTreeMap<String, String>,
    masked: BTreeMap<String, String>,
    recovered: String,
}

fn hex(text: &str) -> [u8; 32] {
    let bytes = (0..32).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap());
    bytes.collect::<Vec<_>>().try_into().unwrap()
}
/// "1,4" names the servers with these share indices.
fn set(text: &str) -> ServerSet {
    let indices = text.split([',', ' ']).filter(|part| !part.is_empty());
    indices.map(|index| ServerId(index.parse::<u8>().unwrap() - 1)).collect()
}
fn at_zero(shares: &[(u8, [u8; 32])]) -> [u8; 32] {
    interpolated(shares, 0)
}
fn interpolated(shares: &[(u8, [u8; 32])], x: u8) -> [u8; 32] {
    let points: Vec<_> = shares.iter().map(|(x, _)| *x).collect();
    let mut sum = [0; 32];
    for (coefficient, (_, share)) in lagrange(&points, x).into_iter().zip(shares) {
        sum.iter_mut().zip(share).for_each(|(sum, byte)| *sum ^= multiply(coefficient, *byte));
    }
    sum
}

/// The arithmetic is that of the published vectors, coefficients and all.
#[test]
fn vectors_are_reproduced() {
    let vectors: Vectors = serde_json::from_str(include_str!("../../tests/vectors/refresh.json")).unwrap();
    assert!(vectors.cases.len() >= 2);
    for case in vectors.cases {
        let sum =
            |i: u8, terms: &BTreeMap<String, String>, coefficient: fn(u8, &ServerSet) -> Coefficient| {
                let mut combination = Combination::new(32);
                for (members, term) in terms {
                    let members = set(members);
                    if !members.contains(ServerId(i - 1)) {
                        combination.add(coefficient(i, &members).byte, &hex(term));
                    }
                }
                let mut sum = [0; 32];
                combination.add_to(&mut sum);
                sum
            };
        let plus = |a: [u8; 32], b: [u8; 32]| std::array::from_fn::<u8, 32, _>(|i| a[i] ^ b[i]);
        let attempt = Seeds::new(CLUSTER, thresholds(case.n, case.k), ATTEMPT, true, None);
        assert_eq!(attempt.sets.len(), case.zero.terms.len());
        for i in 1..=case.n as u8 {
            let key = i.to_string();
            let zero = sum(i, &case.zero.terms, zero_coefficient);
            assert_eq!(zero, hex(&case.zero.share[&key]), "n {} k {} z({i})", case.n, case.k);
            let refreshed = plus(hex(&case.shares[&key]), zero);
            assert_eq!(refreshed, hex(&case.refreshed[&key]));
            if i != case.recovery.index {
                let masked = plus(refreshed, sum(i, &case.recovery.terms, mask_coefficient));
                assert_eq!(masked, hex(&case.recovery.masked[&key]), "n {} k {} m({i})", case.n, case.k);
            }
        }
        let points = |values: &BTreeMap<String, String>| -> Vec<(u8, [u8; 32])> {
            let points = values.iter().map(|(i, value)| (i.parse().unwrap(), hex(value)));
            points.take(case.k).collect()
        };
        assert_eq!(at_zero(&points(&case.refreshed)), hex(&case.secret));
        let recovered = interpolated(&points(&case.recovery.masked), case.recovery.index);
        assert_eq!(recovered, hex(&case.recovery.recovered));
        assert_eq!(recovered, hex(&case.refreshed[&case.recovery.index.to_string()]));
    }
}

/// With u ≤ t servers corrupt the zero sharing keeps t−u dimensions that they know nothing of, which is
/// all that any zero sharing can have (design §7); and a mask keeps t−u for any u ≤ t corrupt helpers.
#[test]
fn what_corrupt_servers_do_not_know_has_full_rank() {
    full_rank::<u8>(60);
}
/// So over scalars.
#[test]
fn what_corrupt_servers_do_not_know_has_full_rank_over_scalars() {
    full_rank::<Scalar>(6);
}

fn full_rank<T: Number>(of_each_size: usize) {
    for (n, k) in planned().chain([(7, 2), (7, 3)]) {
        let t = k - 1;
        for r in [None, Some(ServerId(0)), Some(ServerId(n as u8 - 1))] {
            let seeds = Seeds::new(CLUSTER, thresholds(n, k), ATTEMPT, true, r);
            for u in 0..=t {
                let all: Vec<_> = (0..n).map(|i| ServerId(i as u8)).collect();
                let corrupt = subsets(&all, u);
                // Large clusters: some of the sets.
                let step = (corrupt.len() / of_each_size).max(1);
                for corrupt in corrupt.into_iter().step_by(step) {
                    let honest: Vec<_> = all.iter().filter(|i| !corrupt.contains(**i)).collect();
                    // Seeds that no corrupt server knows are those of sets that contain them all.
                    let columns = |purpose: Purpose, coefficient: fn(u8, &ServerSet) -> Coefficient| {
                        let unknown: Vec<_> = seeds
                            .sets
                            .iter()
                            .filter(|set| set.purpose == purpose)
                            .filter(|set| corrupt.iter().all(|c| set.members.contains(c)))
                            .collect();
                        let row = |i: &&ServerId| -> Vec<T> {
                            let of_set = |set: &&SeedSet| match set.members.contains(**i) {
                                true => T::ZERO,
                                false => T::of(coefficient(i.share_index(), &set.members)),
                            };
                            unknown.iter().map(of_set).collect()
                        };
                        rank(honest.iter().map(row).collect())
                    };
                    let zero = columns(Purpose::Refresh, zero_coefficient);
                    assert_eq!(zero, t - u, "n {n} k {k}, corrupt {corrupt:?}");
                    if let Some(r) = r {
                        // r itself may be among the corrupt: then it learns only its own share.
                        let mut with_r = corrupt;
                        with_r.insert(r);
                        if with_r.len() <= t {
                            let masks = columns(Purpose::Recovery(r), mask_coefficient);
                            assert_eq!(masks, t + 1 - with_r.len(), "n {n} k {k} r {r}, corrupt {corrupt:?}");
                        }
                    }
                }
            }
        }
    }
}

/// An exact form of "they learn nothing", not a sampled one: what a mobile adversary sees is a linear
/// function of the secret and of random bytes that she does not choose. Two secrets lead to the same
/// distribution of views exactly if the secret's column lies in the span of the randomness'. She reads
/// out any k−1 servers in one epoch, k−1 others in the next, and so on: their shares, and the seeds that
/// they know. Without refresh, or if old shares are left, the same computation finds the secret.
#[test]
fn a_mobile_adversary_sees_the_same_whatever_the_secret_is() {
    mobile_adversary::<u8>(&[(4, 2), (7, 3), (9, 3), (9, 2), (16, 4)]);
}
/// So where the secret is a key that servers evaluate a function with.
#[test]
fn a_mobile_adversary_sees_the_same_whatever_the_scalar_is() {
    mobile_adversary::<Scalar>(&[(4, 2), (7, 3), (9, 3)]);
}

fn mobile_adversary<T: Number>(clusters: &[(usize, usize)]) {
    let mut rng = StdRng::seed_from_u64(5);
    for &(n, k) in clusters {
        let (t, epochs) = (k - 1, 5);
        let sets = Seeds::new(CLUSTER, thresholds(n, k), ATTEMPT, true, None).sets;
        for round in 0..12 {
            let hops: Vec<Vec<ServerId>> = (0..epochs)
                .map(|_| {
                    let mut all: Vec<_> = (0..n).map(|i| ServerId(i as u8)).collect();
                    while all.len() > t {
                        all.swap_remove((rng.next_u64() % all.len() as u64) as usize);
                    }
                    all
                })
                .collect();
            // Unknowns: the secret, the k−1 further coefficients, and one value per set and refresh.
            let unknowns = 1 + t + (epochs - 1) * sets.len();
            let share = |i: ServerId, epoch: usize, refreshed: bool| {
                let mut row = vec![T::ZERO; unknowns];
                (row[0], row[1]) = (T::ONE, T::index(i));
                for power in 2..=t {
                    row[power] = row[power - 1].times(T::index(i));
                }
                for at in (0..epoch * sets.len()).filter(|_| refreshed) {
                    let members = &sets[at % sets.len()].members;
                    if !members.contains(i) {
                        row[1 + t + at] = T::of(zero_coefficient(i.share_index(), members));
                    }
                }
                row
            };
            let learns = |refreshed: bool, old_shares_stay: bool| {
                let (mut view, mut known) = (Vec::new(), vec![false; unknowns]);
                for (epoch, hop) in hops.iter().enumerate() {
                    for i in hop {
                        view.push(share(*i, epoch, refreshed));
                        if old_shares_stay && epoch > 0 {
                            view.push(share(*i, epoch - 1, refreshed));
                        }
                        // A server that is corrupt between two epochs counts in both: its seeds are known
                        // only if it is among the hops of both.
                        let also_next = hops.get(epoch + 1).is_some_and(|next| next.contains(i));
                        for (place, set) in sets.iter().enumerate() {
                            if also_next && !set.members.contains(*i) {
                                known[1 + t + epoch * sets.len() + place] = true;
                            }
                        }
                    }
                }
                // What she knows she can subtract.
                let known: Vec<_> = (0..unknowns).filter(|at| known[*at]).collect();
                view.iter_mut().for_each(|row| known.iter().for_each(|at| row[*at] = T::ZERO));
                let blind = view.iter().map(|row| row[1..].to_vec()).collect();
                rank(view) > rank(blind)
            };
            assert!(!learns(true, false), "n {n} k {k}, round {round}: {hops:?}");
            let together: ServerSet = hops.iter().flatten().copied().collect();
            assert_eq!(learns(false, false), together.len() > t, "without refresh she must learn it");
            let neighbours =
                hops.windows(2).any(|two| two.concat().into_iter().collect::<ServerSet>().len() > t);
            assert_eq!(learns(true, true), neighbours, "with old shares left she must learn it");
        }
    }
}

fn dealt(seeds: &Seeds, dealers: &[u8]) -> Vec<(ServerId, Dealing)> {
    let draw = |d: &u8| (ServerId(*d), seeds.draw(ServerId(*d), &SecretBytes::new(&[*d + 1; 32])));
    dealers.iter().map(draw).collect()
}

/// What a server is handed suffices for its own part, gives away no seed that it must not know, and has
/// the root that its dealer committed to.
#[test]
fn dealings_hide_what_is_not_for_their_receiver() {
    for (n, k) in [(4, 2), (9, 3), (16, 6)] {
        let seeds = Seeds::new(CLUSTER, thresholds(n, k), ATTEMPT, true, Some(ServerId(2)));
        let dealings = dealt(&seeds, &[0, 1, 3]);
        for (dealer, dealing) in &dealings {
            let root = seeds.root(*dealer, dealing).unwrap();
            for to in (0..n).map(|i| ServerId(i as u8)) {
                let mut handed = seeds.for_server(*dealer, dealing, to);
                assert_eq!(seeds.root(*dealer, &handed), Some(root));
                assert!(seeds.is_complete(*dealer, &handed, to));
                for (set, part) in seeds.sets_of(*dealer).zip(&handed.parts) {
                    assert_eq!(matches!(part, Part::Hash(_)), set.members.contains(to));
                }
                // A changed contribution has another root.
                let value = handed.parts.iter_mut().find_map(|part| match part {
                    Part::Value(value) => Some(value),
                    Part::Hash(_) => None,
                });
                if let Some(value) = value {
                    let mut bytes = *value.expose();
                    bytes[31] ^= 1;
                    *value = SecretBytes::new(&bytes);
                    assert_ne!(seeds.root(*dealer, &handed), Some(root));
                }
                // One that lacks a value is not complete, until another holder's fills the gap.
                let other = ServerId((to.0 + 1) % n as u8);
                let mut narrow = seeds.for_server(*dealer, &seeds.for_server(*dealer, dealing, to), other);
                if k > 2 && other != *dealer {
                    assert!(!seeds.is_complete(*dealer, &narrow, to));
                }
                narrow.merge(seeds.for_server(*dealer, dealing, to));
                assert!(seeds.is_complete(*dealer, &narrow, to));
            }
        }
        // Of another attempt, dealer or length it is another commitment.
        let (dealer, dealing) = &dealings[0];
        let root = seeds.root(*dealer, dealing);
        let later = AttemptId { attempt: 3, ..ATTEMPT };
        let later = Seeds::new(CLUSTER, thresholds(n, k), later, true, Some(ServerId(2)));
        assert_ne!(later.root(*dealer, dealing), root);
        assert_ne!(seeds.root(ServerId(1), dealing), root);
        assert_eq!(seeds.root(*dealer, &Dealing { parts: vec![] }), None);
    }
}

/// Dealt, agreed, added up at every server: the secret stays, every share changes, the recovering server
/// interpolates what it would have had.
#[test]
fn shares_change_and_secrets_do_not() {
    renewed_and_recovered(Field::Bytes, 9);
    renewed_and_recovered(Field::Scalars, SCALARS_FROM / CHUNK as u64 + 9);
}

fn renewed_and_recovered(field: Field, chunk: u64) {
    assert_eq!(Field::of_chunk(chunk), field);
    for (n, k) in planned() {
        let r = ServerId(1);
        let seeds = Seeds::new(CLUSTER, thresholds(n, k), ATTEMPT, true, Some(r));
        let dealings = dealt(&seeds, &[0, 1, 3]);
        let mut rng = StdRng::seed_from_u64(1);
        let secrets: Vec<[u8; 32]> = (0..CHUNK).map(|_| scalars::draw(&mut rng).to_bytes()).collect();
        let mut before = vec![[0; CHUNK_BYTES]; n];
        for (slot, secret) in secrets.iter().enumerate() {
            let shares = match field {
                Field::Bytes => crate::shamir::deal(secret, k, n, &mut rng),
                Field::Scalars => scalars::deal(&scalars::decode(secret).unwrap(), k, n, &mut rng),
            };
            for (i, share) in shares.iter().enumerate() {
                before[i][32 * slot..32 * slot + 32].copy_from_slice(&**share);
            }
        }
        let mut scratch = Scratch::default();
        let (mut after, mut masked) = (before.clone(), vec![]);
        for (i, share) in after.iter_mut().enumerate() {
            let id = ServerId(i as u8);
            let held: Vec<_> =
                dealings.iter().map(|(d, dealing)| (*d, seeds.for_server(*d, dealing, id))).collect();
            let held: Vec<_> = held.iter().map(|(d, dealing)| (*d, dealing)).collect();
            seeds.zero_sharing(id, &held).unwrap().add_to(chunk, share, &mut scratch);
            let mut mask = *share;
            match seeds.masks(id, &held) {
                Some(terms) => terms.add_to(chunk, &mut mask, &mut scratch),
                None => assert_eq!(id, r),
            }
            masked.push(mask);
        }
        let interpolated = |points: &[(u8, [u8; 32])], x: u8| {
            let points: Vec<_> = points.iter().map(|(x, value)| (*x, value)).collect();
            *field.interpolate(&points, x).expose()
        };
        for (slot, secret) in secrets.iter().enumerate() {
            let at = |all: &[[u8; CHUNK_BYTES]], i: usize| -> (u8, [u8; 32]) {
                (i as u8 + 1, all[i][32 * slot..32 * slot + 32].try_into().unwrap())
            };
            let last: Vec<_> = (n - k..n).map(|i| at(&after, i)).collect();
            assert_eq!(interpolated(&last, 0), *secret, "n {n} k {k}");
            assert!((0..n).all(|i| at(&after, i) != at(&before, i)));
            let helpers: Vec<_> = (0..n).filter(|i| *i != r.index()).map(|i| at(&masked, i)).collect();
            assert_eq!(interpolated(&helpers[..k], r.share_index()), at(&after, r.index()).1);
            assert_eq!(interpolated(&helpers[n - 1 - k..], r.share_index()), at(&after, r.index()).1);
        }
    }
}

#[test]
fn secret_bytes_are_never_printed() {
    let seeds = Seeds::new(CLUSTER, thresholds(4, 2), ATTEMPT, true, None);
    let text = format!("{:?}", seeds.draw(ServerId(0), &SecretBytes::new(&[1; 32])));
    assert_eq!(text, "Dealing { parts: [Value(SecretBytes(..))] }");
}
