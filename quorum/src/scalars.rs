//! Sharing over the scalar field of ristretto255: the arithmetic of [`gf256`](crate::gf256) and
//! [`shamir`](crate::shamir) for keys that servers use without putting them together (see
//! [`oprf`](crate::oprf)).
//!
//! A share is 32 bytes there too, the canonical encoding of a scalar, so the same slots hold both kinds.
//! Zero sharing and masks are as in [`refresh`](crate::refresh): polynomials with small whole coefficients,
//! over any field in which the servers' indices differ. What is secret goes through dalek's arithmetic,
//! which is constant-time.

use crate::bytes::SecretBytes;
use crate::ids::ServerId;
use curve25519_dalek::scalar::Scalar;
use rand_core::CryptoRng;
use zeroize::Zeroizing;

/// A whole number as a scalar.
pub fn whole(number: i64) -> Scalar {
    let magnitude = Scalar::from(number.unsigned_abs());
    if number < 0 { -magnitude } else { magnitude }
}

/// A scalar that is uniform up to 2⁻¹²⁸, from 64 pseudo-random bytes.
pub fn from_wide(bytes: &[u8; 64]) -> Scalar {
    Scalar::from_bytes_mod_order_wide(bytes)
}

/// A uniform scalar.
pub fn draw<R: CryptoRng>(rng: &mut R) -> Zeroizing<Scalar> {
    let mut wide = Zeroizing::new([0; 64]);
    rng.fill_bytes(&mut *wide);
    Zeroizing::new(from_wide(&wide))
}

/// The scalar that these bytes encode; none if they are not its canonical encoding.
pub fn decode(bytes: &[u8; 32]) -> Option<Zeroizing<Scalar>> {
    Option::from(Scalar::from_canonical_bytes(*bytes)).map(Zeroizing::new)
}

/// The coefficients λ with f(x) = Σ λᵢ·f(xᵢ) for every polynomial f of degree below the number of points,
/// which must be distinct (Lagrange). Points are public.
pub fn lagrange(points: &[u8], x: u8) -> Vec<Scalar> {
    let minus = |a: u8, b: u8| whole(i64::from(a) - i64::from(b));
    let coefficient = |i: usize| {
        let others = points.iter().enumerate().filter(|(j, _)| *j != i);
        let (over, under) = others.fold((Scalar::ONE, Scalar::ONE), |(over, under), (_, &other)| {
            (over * minus(x, other), under * minus(points[i], other))
        });
        over * under.invert()
    };
    (0..points.len()).map(coefficient).collect()
}

/// The value at `x` of the polynomial through these points; a value that is no canonical encoding counts
/// as what it is modulo the group's order.
pub fn interpolate(points: &[(u8, &[u8; 32])], x: u8) -> SecretBytes {
    let xs: Vec<u8> = points.iter().map(|(x, _)| *x).collect();
    let mut sum = Zeroizing::new(Scalar::ZERO);
    for (coefficient, (_, value)) in lagrange(&xs, x).into_iter().zip(points) {
        let value = Zeroizing::new(Scalar::from_bytes_mod_order(**value));
        *sum += coefficient * *value;
    }
    SecretBytes::new(&Zeroizing::new(sum.to_bytes()))
}

/// Splits a scalar into one share for each of `servers` servers, any `threshold` of which give it back and
/// fewer say nothing (Shamir 1979).
pub fn deal<R: CryptoRng>(
    secret: &Scalar,
    threshold: usize,
    servers: usize,
    rng: &mut R,
) -> Vec<SecretBytes> {
    let mut coefficients = Vec::with_capacity(threshold);
    coefficients.push(Zeroizing::new(*secret));
    coefficients.extend((1..threshold).map(|_| draw(rng)));
    let share = |server: usize| {
        let x = Scalar::from(ServerId(server as u8).share_index());
        let mut sum = Zeroizing::new(Scalar::ZERO);
        for coefficient in coefficients.iter().rev() {
            *sum = *sum * x + **coefficient;
        }
        SecretBytes::new(&Zeroizing::new(sum.to_bytes()))
    };
    (0..servers).map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    #[test]
    fn any_k_shares_give_the_scalar_and_every_other_share() {
        for (n, k) in [(4, 2), (9, 3), (16, 6)] {
            let mut rng = StdRng::seed_from_u64(n as u64);
            let secret = draw(&mut rng);
            let shares = deal(&secret, k, n, &mut rng);
            let point = |i: usize| (i as u8 + 1, &*shares[i]);
            let (first, last): (Vec<_>, Vec<_>) =
                ((0..k).map(point).collect(), (n - k..n).rev().map(point).collect());
            assert_eq!(interpolate(&first, 0).expose(), &secret.to_bytes());
            assert_eq!(interpolate(&last, 0).expose(), &secret.to_bytes());
            for (i, share) in shares.iter().enumerate() {
                assert_eq!(interpolate(&first, i as u8 + 1).expose(), &**share);
            }
            assert_ne!(interpolate(&first[1..], 0).expose(), &secret.to_bytes());
        }
    }

    #[test]
    fn only_canonical_scalars_decode() {
        // The group's order (RFC 9496 §4.4), and one less.
        let mut order = [0; 32];
        order[..16].copy_from_slice(&0x14def9dea2f79cd65812631a5cf5d3edu128.to_le_bytes());
        order[31] = 0x10;
        assert!(decode(&order).is_none());
        order[0] -= 1;
        assert_eq!(*decode(&order).unwrap(), whole(-1));
        assert!(decode(&[0xff; 32]).is_none());
    }
}
