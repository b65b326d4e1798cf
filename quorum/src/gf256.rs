//! GF(256) with x⁸+x⁴+x³+x²+1, the field of `sharks`, on many secret bytes at once.
//!
//! What is secret is only ever XORed and shifted, eight bytes in a word: no table is indexed by it
//! and no branch depends on it. Coefficients are public, since they follow from servers' numbers.

use crate::bytes::SecretBytes;
use zeroize::Zeroize as _;

/// The low byte of the polynomial.
const REDUCTION: u8 = 0x1d;

/// The product of two public elements.
pub const fn multiply(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = (a << 1) ^ if a & 0x80 != 0 { REDUCTION } else { 0 };
        b >>= 1;
    }
    product
}

/// The inverse of a public element; 0 has none and gives 0.
pub const fn invert(a: u8) -> u8 {
    // a²⁵⁴, by Fermat.
    let (mut power, mut square, mut exponent) = (1, a, 254);
    while exponent != 0 {
        if exponent & 1 != 0 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        exponent >>= 1;
    }
    if a == 0 { 0 } else { power }
}

/// The coefficients λ with f(x) = Σ λᵢ·f(xᵢ) for every polynomial f of degree below the number of
/// points, which must be distinct (Lagrange).
pub fn lagrange(points: &[u8], x: u8) -> Vec<u8> {
    let coefficient = |i: usize| {
        let others = points.iter().enumerate().filter(|(j, _)| *j != i);
        others
            .fold(1, |product, (_, &other)| multiply(product, multiply(x ^ other, invert(points[i] ^ other))))
    };
    (0..points.len()).map(coefficient).collect()
}

/// The value at `x` of the polynomial through points whose first halves differ.
pub fn interpolate(points: &[(u8, &[u8; 32])], x: u8) -> SecretBytes {
    let xs: Vec<u8> = points.iter().map(|(x, _)| *x).collect();
    let mut combination = Combination::new(32);
    for (coefficient, (_, point)) in lagrange(&xs, x).into_iter().zip(points) {
        combination.add(coefficient, *point);
    }
    SecretBytes::fill(|value| combination.add_to(value))
}

/// Sums up Σ cᵢ·vᵢ for vectors of secret bytes and public coefficients.
///
/// The vectors are gathered by the bits of their coefficients, Σ_b x^b·(Σ of the vᵢ whose cᵢ has bit b),
/// so that many terms cost a few XORs each and there are seven multiplications by x in all.
pub struct Combination {
    planes: Vec<u64>,
    words: usize,
}

impl Combination {
    /// Of vectors of so many bytes, a multiple of 8.
    pub fn new(bytes: usize) -> Self {
        assert!(bytes.is_multiple_of(8), "vectors are whole words");
        Self { planes: vec![0; bytes], words: bytes / 8 }
    }
    /// Adds `coefficient`·`bytes`.
    pub fn add(&mut self, coefficient: u8, bytes: &[u8]) {
        assert_eq!(bytes.len(), 8 * self.words, "vectors have one length");
        for (bit, plane) in self.planes.chunks_exact_mut(self.words).enumerate() {
            if coefficient & (1 << bit) != 0 {
                let (words, _) = bytes.as_chunks::<8>();
                plane.iter_mut().zip(words).for_each(|(sum, word)| *sum ^= u64::from_le_bytes(*word));
            }
        }
    }
    /// Adds the sum to `out` and begins anew.
    pub fn add_to(&mut self, out: &mut [u8]) {
        let (out, rest) = out.as_chunks_mut::<8>();
        assert!(out.len() == self.words && rest.is_empty(), "vectors have one length");
        for (at, out) in out.iter_mut().enumerate() {
            // Horner: ((p₇·x + p₆)·x + …)·x + p₀.
            let mut sum = 0u64;
            for plane in self.planes.chunks_exact(self.words).rev() {
                sum = times_x(sum) ^ plane[at];
            }
            *out = (u64::from_le_bytes(*out) ^ sum).to_le_bytes();
        }
        self.planes.fill(0);
    }
}
impl Drop for Combination {
    fn drop(&mut self) {
        self.planes.zeroize();
    }
}

/// Eight elements times x.
const fn times_x(bytes: u64) -> u64 {
    const LOW: u64 = u64::from_ne_bytes([0x7f; 8]);
    const ONE: u64 = u64::from_ne_bytes([1; 8]);
    let high = (bytes >> 7) & ONE;
    // 0x1d = x⁴ + x³ + x² + 1: four shifts that stay inside their byte.
    ((bytes & LOW) << 1) ^ high ^ (high << 2) ^ (high << 3) ^ (high << 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product by the definition: polynomials multiplied, then divided by 0x11d.
    fn naive(a: u8, b: u8) -> u8 {
        let mut wide = 0u32;
        for bit in 0..8 {
            if b & (1 << bit) != 0 {
                wide ^= u32::from(a) << bit;
            }
        }
        for bit in (8..16).rev() {
            if wide & (1 << bit) != 0 {
                wide ^= 0x11d << (bit - 8);
            }
        }
        wide as u8
    }

    #[test]
    fn products_are_those_of_the_field() {
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                assert_eq!(multiply(a, b), naive(a, b));
            }
            assert_eq!(multiply(a, invert(a)), u8::from(a != 0));
        }
    }

    #[test]
    fn combinations_are_sums_of_products() {
        let vectors: Vec<Vec<u8>> = (0..40u8)
            .map(|i| (0..=255u8).map(|j| j.wrapping_mul(31) ^ i.wrapping_mul(77)).collect())
            .collect();
        let coefficients: Vec<u8> = (0..40u8).map(|i| i.wrapping_mul(i).wrapping_mul(13) ^ 0x5a).collect();
        let mut combination = Combination::new(256);
        for _ in 0..2 {
            let mut out: Vec<u8> = (0..=255).rev().collect();
            let mut expected = out.clone();
            for (vector, coefficient) in vectors.iter().zip(&coefficients) {
                combination.add(*coefficient, vector);
                expected.iter_mut().zip(vector).for_each(|(sum, v)| *sum ^= multiply(*coefficient, *v));
            }
            combination.add_to(&mut out);
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn interpolation_meets_the_polynomial_everywhere() {
        let f = |x: u8| 0x53 ^ multiply(0xca, x) ^ multiply(0x11, multiply(x, x));
        for x in 0..=255 {
            let points = [3, 9, 200];
            let sum = lagrange(&points, x)
                .iter()
                .zip(points)
                .fold(0, |sum, (coefficient, point)| sum ^ multiply(*coefficient, f(point)));
            assert_eq!(sum, f(x));
        }
    }
}
