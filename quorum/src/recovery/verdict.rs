//! What the other servers' answers say about a secret: this server's share of it, or that nobody can expect it to have
//! one.
//!
//! **A share is accepted** if at least k+f−1 values lie on one polynomial and at most f−1 do not. No other polynomial has
//! as many then: it shares at most k−1 points with this one, and has the f−1 others at best. This server counts as one
//! of the f faulty ones, so no more than f−1 of the others lie, and what k+f−1 of them fit at least k honest ones do.
//! Where there are k+2f values, f may be wrong: two polynomials that each are missed by f at most would share k points,
//! so the one that the honest servers' values lie on is the only one, also if f of the *others* lie.
//!
//! **A slot is excused**, so that it makes nobody less than whole, if the words about it cannot all but f be true of
//! a secret whose depositor was honest. A word is a value, or that the slot is excused at the one who answers; that a
//! server lacks its share is none. With an honest depositor every honest server's word is a value, and all these lie on
//! one polynomial. So h that excuse it and the values that miss the best polynomial number at most f; if they are more for
//! every polynomial, the depositor was not honest, and has made only her own secret unrecoverable (design §6). That the slot
//! is empty at others, who wait for their own recovery, shows nothing.
//!
//! Decoding decides both: at most one polynomial is missed by (m−k)/2 of m values, and it is found. What is more than
//! that is no matter: of k+f−1 values and no more than f−1 wrong ones it is not, and with k+2f values f are not.
//!
//! If all n−1 others have a word, the slot is filled or excused, whatever the depositor did: so she stops no renewal. In one
//! case that takes the assumption that this server is one of the f: where n = 3f+1 and k = f+1 (n = 4 and 16 by
//! default) f wrong values of n−1 cannot be told from f honest ones. There f−1 wrong ones are enough to excuse a slot,
//! if nobody else excuses it; f liars, one more than are promised beside a server without its shares, can make it go without
//! some. With a smaller k they cannot.

use super::Answer;
use crate::bytes::SecretBytes;
use crate::decoding::{Byte, Checks, Element};
use crate::gf256::{self, Combination};
use crate::ids::{ServerId, ServerSet};
use crate::refresh::{CHUNK, CHUNK_BYTES, Field};
use crate::scalars;
use crate::thresholds::Thresholds;
use curve25519_dalek::scalar::Scalar;
use std::collections::BTreeMap;
use zeroize::Zeroizing;

/// Gaps of a chunk that are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gaps {
    /// Those that are still there.
    pub(super) open: u128,
    /// Those that have not been looked at alone since the last answer.
    pub(super) unseen: u128,
}

/// What came out.
#[derive(Default)]
pub(super) struct Found {
    /// This server's shares, by the secrets' indices.
    pub(super) shares: Vec<(u64, SecretBytes)>,
    /// Secrets of which nobody can expect it to have one.
    pub(super) excused: Vec<u64>,
    /// Who was wrong, and about how many.
    pub(super) wrong: BTreeMap<ServerId, usize>,
}

impl Found {
    /// With room for so many: a vector of secrets that grows leaves copies behind.
    pub(super) fn with_room(slots: usize) -> Self {
        Self { shares: Vec::with_capacity(slots), ..Self::default() }
    }
}

/// What one slot's answers say.
enum Verdict {
    Share(SecretBytes, ServerSet),
    Excused,
    Open,
}

/// Looks at answers to one server's questions.
pub(super) struct Judge {
    id: ServerId,
    thresholds: Thresholds,
    /// How often each server was wrong: whoever was is believed last.
    blame: BTreeMap<ServerId, usize>,
    /// The checks of the servers whose values were decoded last.
    bytes: Option<(ServerSet, Checks<Byte>)>,
    scalars: Option<(ServerSet, Checks<Scalar>)>,
}

type Answers = BTreeMap<ServerId, Answer>;
type Points<'a> = Vec<(ServerId, &'a [u8; 32])>;

impl Judge {
    pub(super) fn new(id: ServerId, thresholds: Thresholds) -> Self {
        Self { id, thresholds, blame: BTreeMap::new(), bytes: None, scalars: None }
    }

    /// Values that a polynomial must go through.
    pub(super) fn needed(&self) -> usize {
        self.thresholds.k() + self.thresholds.f() - 1
    }

    /// See the module.
    fn accepts(&self, right: usize, wrong: usize) -> bool {
        let (k, f) = (self.thresholds.k(), self.thresholds.f());
        right >= self.needed() && (wrong < f || (wrong == f && right + wrong >= k + 2 * f))
    }

    /// How many values may be wrong in a slot of an honest depositor that others excuse; see the module.
    fn bearable(&self, excusing: usize) -> usize {
        let (n, k, f) = (self.thresholds.n(), self.thresholds.k(), self.thresholds.f());
        let undecidable = n - 1 < k + 2 * f;
        f - excusing.max(usize::from(undecidable))
    }

    /// Fills or excuses gaps of a chunk, as far as the answers allow and the budget lasts.
    ///
    /// The polynomials through k servers' values are tried for all gaps at once. Where too many others do not fit, one slot
    /// is decoded alone, which names who is wrong in it; then k servers are tried who were wrong least often. So
    /// each liar costs this a slot, and more only if he lies now and then.
    pub(super) fn look(
        &mut self,
        chunk: u64,
        answers: &Answers,
        gaps: &mut Gaps,
        found: &mut Found,
        budget: &mut usize,
    ) {
        let (field, mut tried) = (Field::of_chunk(chunk), Vec::new());
        let index = |place: usize| chunk * CHUNK as u64 + place as u64;
        while *budget > 0 && gaps.open & gaps.unseen != 0 {
            let base = self.least_blamed(answers, gaps.open);
            if base.len() == self.thresholds.k() && base != tried {
                *budget = budget.saturating_sub(1);
                self.try_base(chunk, answers, &base, gaps, found);
                tried = base;
            }
            let left = gaps.open & gaps.unseen;
            if left == 0 {
                break;
            }
            let place = left.trailing_zeros() as usize;
            gaps.unseen &= !(1 << place);
            match self.decode(field, answers, place, budget) {
                Verdict::Share(share, wrong) => {
                    found.shares.push((index(place), share));
                    gaps.open &= !(1 << place);
                    for server in wrong.iter() {
                        self.blame(server, 1, found);
                    }
                }
                Verdict::Excused => {
                    found.excused.push(index(place));
                    gaps.open &= !(1 << place);
                }
                Verdict::Open => {}
            }
        }
    }

    fn blame(&mut self, server: ServerId, times: usize, found: &mut Found) {
        if times > 0 {
            *self.blame.entry(server).or_default() += times;
            *found.wrong.entry(server).or_default() += times;
        }
    }

    /// k servers that have values for these gaps, for most of them if not for all.
    fn least_blamed(&self, answers: &Answers, open: u128) -> Vec<ServerId> {
        let useful = answers.iter().filter(|(_, answer)| answer.filled & open != 0);
        let mut servers: Vec<_> = useful
            .map(|(server, answer)| {
                let blame = self.blame.get(server).copied().unwrap_or_default();
                (blame, (open & !answer.filled).count_ones(), *server)
            })
            .collect();
        servers.sort_unstable();
        servers.into_iter().take(self.thresholds.k()).map(|(.., server)| server).collect()
    }

    /// Fills the gaps in which enough answers lie on the polynomials through those of `base`.
    fn try_base(
        &mut self,
        chunk: u64,
        answers: &Answers,
        base: &[ServerId],
        gaps: &mut Gaps,
        found: &mut Found,
    ) {
        let places = base.iter().fold(gaps.open, |places, server| places & answers[server].filled);
        if places == 0 {
            return;
        }
        let through = Through::new(Field::of_chunk(chunk), answers, base, places);
        let others = answers.iter().filter(|(server, _)| !base.contains(server));
        let misses: Vec<(ServerId, u128, u128)> = others
            .map(|(server, answer)| {
                let filled = answer.filled & places;
                (*server, filled, filled & through.misses(server.share_index(), &answer.values))
            })
            .collect();
        let accepted = (0..CHUNK).filter(|place| places & (1 << place) != 0).filter(|place| {
            let count = |of: fn(&(ServerId, u128, u128)) -> u128| {
                misses.iter().filter(|server| of(server) & (1 << place) != 0).count()
            };
            let (filled, wrong) = (count(|(_, filled, _)| *filled), count(|(.., wrong)| *wrong));
            self.accepts(base.len() + filled - wrong, wrong)
        });
        let accepted = accepted.fold(0, |accepted, place| accepted | 1u128 << place);
        for (server, _, wrong) in misses {
            self.blame(server, (wrong & accepted).count_ones() as usize, found);
        }
        through.values(self.id.share_index(), |place, value| {
            if accepted & (1 << place) != 0 {
                found.shares.push((chunk * CHUNK as u64 + place as u64, SecretBytes::new(value)));
            }
        });
        gaps.open &= !accepted;
    }

    /// What is said about one slot.
    fn decode(&mut self, field: Field, answers: &Answers, place: usize, budget: &mut usize) -> Verdict {
        let has = |bits: u128| bits & (1 << place) != 0;
        let excusing = answers.values().filter(|answer| has(answer.excused & !answer.filled)).count();
        let (k, f) = (self.thresholds.k(), self.thresholds.f());
        *budget = budget.saturating_sub(1);
        if excusing > f {
            return Verdict::Excused;
        }
        let filled = answers.iter().filter(|(_, answer)| has(answer.filled));
        let points: Points<'_> = filled
            .map(|(server, answer)| (*server, answer.values.as_chunks().0.get(place).expect("128 places")))
            .collect();
        let Some(spare) = points.len().checked_sub(k) else { return Verdict::Open };
        let (wrong, decoded) = match field {
            Field::Bytes => wrong_bytes(self.bytes(&points), &points),
            Field::Scalars => wrong_scalars(self.scalars(&points), &points),
        };
        *budget = budget.saturating_sub(decoded);
        let bearable = self.bearable(excusing);
        match wrong {
            Some(wrong) if self.accepts(points.len() - wrong.len(), wrong.len()) => {
                let right = points.iter().enumerate().filter(|(i, _)| !wrong.contains(i));
                let base: Vec<_> = right.take(k).map(|(_, (s, value))| (s.share_index(), *value)).collect();
                let share = field.interpolate(&base, self.id.share_index());
                Verdict::Share(share, wrong.iter().map(|i| points[*i].0).collect())
            }
            Some(wrong) if wrong.len() <= bearable => Verdict::Open,
            _ if 2 * bearable <= spare => Verdict::Excused,
            _ => Verdict::Open,
        }
    }

    fn bytes(&mut self, points: &Points<'_>) -> &Checks<Byte> {
        checks(&mut self.bytes, points, self.thresholds.k())
    }
    fn scalars(&mut self, points: &Points<'_>) -> &Checks<Scalar> {
        checks(&mut self.scalars, points, self.thresholds.k())
    }
}

/// The checks for values of these servers.
fn checks<'a, E: Element>(
    known: &'a mut Option<(ServerSet, Checks<E>)>,
    points: &Points<'_>,
    k: usize,
) -> &'a Checks<E> {
    let servers: ServerSet = points.iter().map(|(server, _)| *server).collect();
    known.take_if(|(of, _)| *of != servers);
    let new = || {
        let xs: Vec<u8> = points.iter().map(|(server, _)| server.share_index()).collect();
        (servers, Checks::new(&xs, k))
    };
    &known.get_or_insert_with(new).1
}

/// Which values are wrong, of vectors of bytes.
fn wrong_bytes(checks: &Checks<Byte>, points: &Points<'_>) -> (Option<Vec<usize>>, usize) {
    let mut combination = Combination::new(32);
    let sum = |row: &Vec<Byte>| {
        for (factor, (_, value)) in row.iter().zip(points) {
            combination.add(factor.0, *value);
        }
        let mut sum = [0; 32];
        combination.add_to(&mut sum);
        sum
    };
    let sums: Vec<[u8; 32]> = checks.rows().iter().map(sum).collect();
    checks.wrong((0..32).map(|column| sums.iter().map(|sum| Byte(sum[column])).collect()))
}

/// The same of scalars.
fn wrong_scalars(checks: &Checks<Scalar>, points: &Points<'_>) -> (Option<Vec<usize>>, usize) {
    let values = points.iter().map(|(_, value)| Scalar::from_bytes_mod_order(**value));
    let values = Zeroizing::new(values.collect::<Vec<_>>());
    let sum = |row: &Vec<Scalar>| row.iter().zip(&*values).map(|(factor, value)| factor * value).sum();
    checks.wrong(std::iter::once(checks.rows().iter().map(sum).collect()))
}

/// The polynomials through k servers' values, of many secrets. A scalar that is no canonical encoding counts as what it is
/// modulo the group's order.
enum Through<'a> {
    Bytes { points: Vec<u8>, values: Vec<&'a [u8]> },
    Scalars { points: Vec<u8>, places: Vec<usize>, values: Vec<Zeroizing<Vec<Scalar>>> },
}

impl<'a> Through<'a> {
    fn new(field: Field, answers: &'a Answers, base: &[ServerId], places: u128) -> Self {
        let points = base.iter().map(|server| server.share_index()).collect();
        let values = base.iter().map(|server| &*answers[server].values);
        match field {
            Field::Bytes => Self::Bytes { points, values: values.map(Vec::as_slice).collect() },
            Field::Scalars => {
                let places: Vec<_> = (0..CHUNK).filter(|place| places & (1 << place) != 0).collect();
                let values = values.map(|values| Zeroizing::new(scalars_at(values, &places).collect()));
                Self::Scalars { points, values: values.collect(), places }
            }
        }
    }

    /// The places in which these values do not lie on the polynomials.
    fn misses(&self, x: u8, values: &[u8]) -> u128 {
        match self {
            Self::Bytes { .. } => {
                let mut difference = Zeroizing::new(values.to_vec());
                self.add_bytes(x, &mut difference);
                let (places, _) = difference.as_chunks::<32>();
                let differs = |place: &[u8; 32]| place.iter().fold(0, |or, byte| or | byte) != 0;
                places
                    .iter()
                    .enumerate()
                    .fold(0, |misses, (at, place)| misses | u128::from(differs(place)) << at)
            }
            Self::Scalars { places, .. } => {
                let (at, given) = (self.scalars(x), scalars_at(values, places));
                places
                    .iter()
                    .zip(at.iter().zip(given))
                    .fold(0, |misses, (place, (at, given))| misses | u128::from(*at != given) << place)
            }
        }
    }

    /// Gives out the values at `x`, with their places.
    fn values(&self, x: u8, mut give: impl FnMut(usize, &[u8; 32])) {
        match self {
            Self::Bytes { .. } => {
                let mut values = Zeroizing::new(vec![0; CHUNK_BYTES]);
                self.add_bytes(x, &mut values);
                values.as_chunks::<32>().0.iter().enumerate().for_each(|(place, value)| give(place, value));
            }
            Self::Scalars { places, .. } => {
                for (place, value) in places.iter().zip(&*self.scalars(x)) {
                    give(*place, &Zeroizing::new(value.to_bytes()));
                }
            }
        }
    }

    /// Adds the values at `x` to `out`.
    fn add_bytes(&self, x: u8, out: &mut [u8]) {
        let Self::Bytes { points, values } = self else { return };
        let mut combination = Combination::new(CHUNK_BYTES);
        for (coefficient, values) in gf256::lagrange(points, x).into_iter().zip(values) {
            combination.add(coefficient, values);
        }
        combination.add_to(out);
    }

    /// The values at `x`, in the order of the places.
    fn scalars(&self, x: u8) -> Zeroizing<Vec<Scalar>> {
        let Self::Scalars { points, places, values } = self else { return Zeroizing::default() };
        let coefficients = scalars::lagrange(points, x);
        let value = |at: usize| coefficients.iter().zip(values).map(|(c, values)| c * values[at]).sum();
        Zeroizing::new((0..places.len()).map(value).collect())
    }
}

fn scalars_at<'a>(values: &'a [u8], places: &'a [usize]) -> impl Iterator<Item = Scalar> + 'a {
    places.iter().map(|place| {
        Scalar::from_bytes_mod_order(*values.as_chunks::<32>().0.get(*place).expect("128 places"))
    })
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
mod tests;
