//! Which of some values of a polynomial are wrong: Reed–Solomon codes, decoded by syndromes (Massey 1969).
//!
//! Of m values y_i at distinct points x_i ≠ 0, all but a few lie on a polynomial of degree below k. The m−k *checks*
//!
//! ```text
//! S_j = Σ_i v_i·x_i^j·y_i    with v_i = 1 / ∏_{l≠i} (x_i − x_l),    0 ≤ j < m−k
//! ```
//!
//! are zero for each such polynomial (they are divided differences of polynomials of degree below m−1), and for nothing
//! else. So they tell of errors, and of nothing else: what is computed from them may show in time, also where the
//! values are secret. The checks themselves are sums with public coefficients, which the caller adds up in constant
//! time.
//!
//! Two polynomials agree in at most k−1 points. So at most one is missed by (m−k)/2 values or fewer, and that one is
//! found: its errors are the shortest recurrence that the checks follow.

use crate::gf256;
use crate::scalars;
use curve25519_dalek::scalar::Scalar;

/// An element of a field.
pub trait Element: Copy + PartialEq {
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// The point at which a server's share is the value.
    fn point(x: u8) -> Self;
    /// The sum.
    fn plus(self, other: Self) -> Self;
    /// The difference.
    fn minus(self, other: Self) -> Self;
    /// The product.
    fn times(self, other: Self) -> Self;
    /// The inverse; of anything but zero.
    fn inverse(self) -> Self;
}

/// An element of GF(256) that is no secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Byte(pub u8);

impl Element for Byte {
    const ZERO: Self = Self(0);
    const ONE: Self = Self(1);
    fn point(x: u8) -> Self {
        Self(x)
    }
    fn plus(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
    fn minus(self, other: Self) -> Self {
        Self(self.0 ^ other.0)
    }
    fn times(self, other: Self) -> Self {
        Self(gf256::multiply(self.0, other.0))
    }
    fn inverse(self) -> Self {
        Self(gf256::invert(self.0))
    }
}

impl Element for Scalar {
    const ZERO: Self = Self::ZERO;
    const ONE: Self = Self::ONE;
    fn point(x: u8) -> Self {
        scalars::whole(i64::from(x))
    }
    fn plus(self, other: Self) -> Self {
        self + other
    }
    fn minus(self, other: Self) -> Self {
        self - other
    }
    fn times(self, other: Self) -> Self {
        self * other
    }
    fn inverse(self) -> Self {
        self.invert()
    }
}

/// The checks of values at some points.
pub struct Checks<E> {
    points: Vec<E>,
    rows: Vec<Vec<E>>,
}

impl<E: Element> Checks<E> {
    /// At distinct points, none of them 0, for polynomials of degree below k.
    pub fn new(points: &[u8], k: usize) -> Self {
        let points: Vec<E> = points.iter().map(|x| E::point(*x)).collect();
        let under = |i: usize| {
            let others = points.iter().enumerate().filter(|(l, _)| *l != i);
            others.fold(E::ONE, |product, (_, other)| product.times(points[i].minus(*other)))
        };
        let mut row: Vec<E> = (0..points.len()).map(|i| under(i).inverse()).collect();
        let mut rows = Vec::with_capacity(points.len().saturating_sub(k));
        for _ in k..points.len() {
            let next = row.iter().zip(&points).map(|(factor, x)| factor.times(*x)).collect();
            rows.push(std::mem::replace(&mut row, next));
        }
        Self { points, rows }
    }

    /// What the values are multiplied with, for each check.
    pub fn rows(&self) -> &[Vec<E>] {
        &self.rows
    }

    /// So many wrong values are found, whatever they are.
    pub fn radius(&self) -> usize {
        self.rows.len() / 2
    }

    /// Which values are wrong, for vectors of values of which each has its column of checks: those that no polynomials
    /// go through that go through all others. None if that would be more than [`radius`](Self::radius). Also says how
    /// many columns had to be decoded.
    ///
    /// Where a vector of polynomials is missed by the set W of at most `radius` values, each column is missed by a part
    /// of W, and decoding gives that part: so what is found stays within W, and in the end explains every column. If
    /// anything larger comes out, there is no such W.
    pub fn wrong(&self, columns: impl Iterator<Item = Vec<E>>) -> (Option<Vec<usize>>, usize) {
        let (mut wrong, mut decoded) = (Vec::new(), 0);
        for column in columns {
            if self.explains(&wrong, &column) {
                continue;
            }
            decoded += 1;
            let Some(more) = self.decode(&column) else { return (None, decoded) };
            wrong.extend(more);
            wrong.sort_unstable();
            wrong.dedup();
            if wrong.len() > self.radius() || !self.explains(&wrong, &column) {
                return (None, decoded);
            }
        }
        (Some(wrong), decoded)
    }

    /// Whether all values but these lie on one polynomial: the checks, filtered by the recurrence of the wrong ones, are
    /// the checks of the others.
    fn explains(&self, wrong: &[usize], checks: &[E]) -> bool {
        // ∏ (1 − x_i·z) over the wrong ones.
        let mut locator = vec![E::ONE];
        for i in wrong {
            locator.push(E::ZERO);
            for at in (1..locator.len()).rev() {
                locator[at] = locator[at].minus(locator[at - 1].times(self.points[*i]));
            }
        }
        checks.windows(locator.len()).all(|window| {
            let terms = locator.iter().zip(window.iter().rev());
            terms.fold(E::ZERO, |sum, (a, b)| sum.plus(a.times(*b))) == E::ZERO
        })
    }

    /// The wrong values of one column, if there are at most `radius`; anything or nothing if there are more.
    fn decode(&self, checks: &[E]) -> Option<Vec<usize>> {
        // Massey 1969: the shortest recurrence, Σ current[i]·S_{j−i} = 0 with current[0] = 1.
        let (mut current, mut before) = (vec![E::ONE], vec![E::ONE]);
        let (mut length, mut shift, mut missed_before) = (0, 1, E::ONE);
        for at in 0..checks.len() {
            let terms = current.iter().zip(checks[..=at].iter().rev()).take(length + 1);
            let missed = terms.fold(E::ZERO, |sum, (a, b)| sum.plus(a.times(*b)));
            if missed == E::ZERO {
                shift += 1;
                continue;
            }
            let factor = missed.times(missed_before.inverse());
            let mut next = current.clone();
            next.resize(next.len().max(before.len() + shift), E::ZERO);
            for (i, term) in before.iter().enumerate() {
                next[i + shift] = next[i + shift].minus(factor.times(*term));
            }
            if 2 * length <= at {
                (length, before, missed_before, shift) = (at + 1 - length, current, missed, 1);
            } else {
                shift += 1;
            }
            current = next;
        }
        current.resize(length + 1, E::ZERO);
        // The reversed polynomial is ∏ (x − x_i).
        let value = |x: &E| current.iter().fold(E::ZERO, |value, term| value.times(*x).plus(*term));
        let roots: Vec<usize> =
            (0..self.points.len()).filter(|i| value(&self.points[*i]) == E::ZERO).collect();
        (length <= self.radius() && roots.len() == length).then_some(roots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng};

    fn checks_of<E: Element>(checks: &Checks<E>, values: &[E]) -> Vec<E> {
        let sum = |row: &Vec<E>| {
            row.iter().zip(values).fold(E::ZERO, |sum, (factor, value)| sum.plus(factor.times(*value)))
        };
        checks.rows().iter().map(sum).collect()
    }

    /// Polynomials in two columns, and errors of some values in one, the other or both.
    fn try_with<E: Element>(seed: u64, draw: impl Fn(&mut StdRng) -> E) {
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..60 {
            let m = rng.random_range(2..26usize);
            let k = rng.random_range(1..=m.min(7));
            let mut points: Vec<u8> = (1..=40).collect();
            while points.len() > m {
                points.remove(rng.random_range(0..points.len()));
            }
            let checks = Checks::<E>::new(&points, k);
            let most = checks.radius();
            let mut wrong: Vec<usize> = (0..m).collect();
            let count = rng.random_range(0..=most);
            while wrong.len() > count {
                wrong.remove(rng.random_range(0..wrong.len()));
            }
            let mut columns: Vec<Vec<E>> = (0..2)
                .map(|_| {
                    let terms: Vec<E> = (0..k).map(|_| draw(&mut rng)).collect();
                    let value = |x: &u8| {
                        terms.iter().fold(E::ZERO, |value, term| value.times(E::point(*x)).plus(*term))
                    };
                    points.iter().map(value).collect()
                })
                .collect();
            for column in &columns {
                assert!(checks_of(&checks, column).iter().all(|sum| *sum == E::ZERO), "a polynomial");
            }
            for i in &wrong {
                let which = rng.random_range(1..4);
                for (number, column) in columns.iter_mut().enumerate() {
                    if which & (1 << number) != 0 {
                        let error = std::iter::repeat_with(|| draw(&mut rng)).find(|e| *e != E::ZERO);
                        column[*i] = column[*i].plus(error.expect("one is not zero"));
                    }
                }
            }
            let found = checks.wrong(columns.iter().map(|column| checks_of(&checks, column))).0;
            assert_eq!(found.as_ref(), Some(&wrong), "m = {m}, k = {k}, points {points:?}");
        }
    }

    #[test]
    fn errors_are_found_up_to_the_radius_in_both_fields() {
        try_with::<Byte>(1, |rng| Byte(rng.random()));
        try_with::<Scalar>(2, |rng| *scalars::draw(rng));
    }

    /// More errors: nothing is found, or another polynomial that as many values lie on.
    #[test]
    fn what_is_found_is_so() {
        let mut rng = StdRng::seed_from_u64(5);
        let points: Vec<u8> = (1..=15).collect();
        let (checks, mut none) = (Checks::<Byte>::new(&points, 6), 0);
        for _ in 0..2_000 {
            let values: Vec<Byte> = points.iter().map(|_| Byte(rng.random_range(0..4))).collect();
            match checks.wrong(std::iter::once(checks_of(&checks, &values))).0 {
                None => none += 1,
                Some(wrong) => {
                    let right: Vec<usize> = (0..points.len()).filter(|i| !wrong.contains(i)).collect();
                    let xs: Vec<u8> = right.iter().map(|i| points[*i]).collect();
                    let values: Vec<Byte> = right.iter().map(|i| values[*i]).collect();
                    let of_the_others = Checks::<Byte>::new(&xs, 6);
                    assert!(checks_of(&of_the_others, &values).iter().all(|sum| *sum == Byte(0)));
                    assert!(wrong.len() <= checks.radius());
                }
            }
        }
        assert!(none > 1_000, "{none}");
    }
}
