//! Splitting a data key among the servers and putting it together again (Shamir 1979, over
//! GF(256) with x⁸+x⁴+x³+x²+1).
//!
//! This is the client's side: it deals, and it reconstructs from answers of which some may be
//! wrong. `sharks` looks values up in tables, which is fine here, on the machine that knows the
//! secret anyway, and not on servers.

use crate::bytes::{Hash, SecretBytes};
use crate::ids::{ClusterId, ServerId};
use crate::state::data_key_commitment;
use rand_core::CryptoRng;
use sharks::{Share, Sharks};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, Zeroizing};

/// Subsets of shares that a reconstruction tries before it gives up.
pub const MAX_SUBSETS: usize = 200_000;

/// Splits a data key into one share for each of `servers` servers, any `threshold` of which
/// give it back. Share i belongs to server i, whose x is i + 1.
pub fn deal<R: CryptoRng>(
    data_key: &[u8; 32],
    threshold: usize,
    servers: usize,
    rng: &mut R,
) -> Vec<SecretBytes> {
    // n ≤ 225, so the threshold fits; `plan` made sure that it is at least 2.
    let sharks = Sharks(threshold as u8);
    let shares = sharks.dealer_rng(data_key, rng);
    shares
        .take(servers)
        .map(|share| {
            let mut bytes = Vec::from(&share);
            let y = SecretBytes::fill(|y| y.copy_from_slice(&bytes[1..]));
            bytes.zeroize();
            y
        })
        .collect()
}

/// A share as a server handed it out.
#[derive(Clone)]
pub struct ServerShare {
    /// Who handed it out.
    pub server: ServerId,
    /// Its value.
    pub share: SecretBytes,
}

/// A data key that fits its commitment.
pub struct Reconstructed {
    /// The key.
    pub data_key: SecretBytes,
    /// The servers whose shares do not lie on its polynomial: wrong, by malice or damage. Empty
    /// while it is undecided who they are.
    pub wrong: Vec<ServerId>,
    /// Some shares are wrong, and more are needed to tell which (see [`reconstruct`]).
    pub undecided: bool,
}

/// Why no data key came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReconstructError {
    /// Fewer than k shares.
    #[error("{got} shares where {needed} are needed")]
    TooFew {
        /// Shares at hand.
        got: usize,
        /// k.
        needed: usize,
    },
    /// No k of them fit the commitment.
    #[error("no {needed} of {got} shares give the key that was committed to")]
    NoneFits {
        /// Shares at hand.
        got: usize,
        /// k.
        needed: usize,
    },
}

/// Finds k shares that fit the commitment: all right if all are, otherwise by trying subsets in
/// random order, so that liars cannot place themselves to be tried first. The shares must come
/// from different servers.
///
/// A server is named only where that is certain. Liars can choose errors that cancel out at 0, so
/// that together with fewer than k honest shares they give the right key on a wrong polynomial,
/// and the honest rest seems not to fit. Such a polynomial meets the right one at 0 and in at most
/// k−2 honest shares, so one that k−1+`faulty` shares lie on is right.
pub fn reconstruct<R: CryptoRng>(
    cluster: &ClusterId,
    commitment: &Hash,
    threshold: usize,
    faulty: usize,
    shares: &[ServerShare],
    rng: &mut R,
) -> Result<Reconstructed, ReconstructError> {
    let (got, needed) = (shares.len(), threshold);
    if got < needed {
        return Err(ReconstructError::TooFew { got, needed });
    }
    let mut order: Vec<usize> = (0..got).collect();
    for i in (1..got).rev() {
        order.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
    }
    let mut subset: Vec<usize> = (0..needed).collect();
    let mut found = None;
    for _ in 0..MAX_SUBSETS {
        let chosen: Vec<&ServerShare> = subset.iter().map(|&i| &shares[order[i]]).collect();
        if let Some(data_key) = interpolate(&chosen, 0)
            && bool::from(data_key_commitment(cluster, &data_key).0.ct_eq(&commitment.0))
        {
            let fits = |share: &&ServerShare| {
                interpolate(&chosen, share.server.share_index())
                    .is_some_and(|expected| expected == share.share)
            };
            let wrong: Vec<_> =
                shares.iter().filter(|share| !fits(share)).map(|share| share.server).collect();
            let certain = wrong.is_empty() || got - wrong.len() + 1 >= needed + faulty;
            if certain {
                return Ok(Reconstructed { data_key, wrong, undecided: false });
            }
            // With so few shares no polynomial can be certain: the key is all there is to find.
            if got + 1 < needed + faulty {
                return Ok(Reconstructed { data_key, wrong: Vec::new(), undecided: true });
            }
            found.get_or_insert(Reconstructed { data_key, wrong: Vec::new(), undecided: true });
        }
        if !next_subset(&mut subset, got) {
            break;
        }
    }
    found.ok_or(ReconstructError::NoneFits { got, needed })
}

/// The value at `x` of the polynomial through these shares. `sharks` interpolates at 0; since
/// subtraction is XOR, shifting every x by XOR moves any other point there.
fn interpolate(shares: &[&ServerShare], x: u8) -> Option<SecretBytes> {
    if let Some(known) = shares.iter().find(|share| share.server.share_index() == x) {
        return Some(known.share.clone());
    }
    let points = shares.iter().map(|share| {
        let mut bytes = Zeroizing::new(vec![share.server.share_index() ^ x]);
        bytes.extend_from_slice(&*share.share);
        Share::try_from(bytes.as_slice()).ok()
    });
    let points: Vec<Share> = points.collect::<Option<_>>()?;
    let value = Zeroizing::new(Sharks(shares.len() as u8).recover(points.iter()).ok()?);
    <&[u8; 32]>::try_from(value.as_slice()).ok().map(SecretBytes::new)
}

/// The next k-subset of 0..n in lexicographic order.
pub(crate) fn next_subset(subset: &mut [usize], n: usize) -> bool {
    let k = subset.len();
    let Some(at) = (0..k).rev().find(|&i| subset[i] < n - k + i) else { return false };
    subset[at] += 1;
    for i in at + 1..k {
        subset[i] = subset[i - 1] + 1;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    const CLUSTER: ClusterId = ClusterId(Hash([1; 32]));

    /// A liar's share: wrong in one byte.
    fn spoil(share: &mut ServerShare, at: usize, by: u8) {
        let right = share.share.clone();
        share.share = SecretBytes::fill(|bytes| {
            bytes.copy_from_slice(right.expose());
            bytes[at] ^= by;
        });
    }

    fn dealt(n: usize, k: usize, seed: u64) -> (SecretBytes, Vec<ServerShare>, StdRng) {
        let mut rng = StdRng::seed_from_u64(seed);
        let key = SecretBytes::fill(|key| rand::Rng::fill_bytes(&mut rng, key));
        let shares = deal(&key, k, n, &mut rng);
        let shares = shares.into_iter().enumerate();
        let shares = shares.map(|(i, share)| ServerShare { server: ServerId(i as u8), share }).collect();
        (key, shares, rng)
    }

    #[test]
    fn any_k_right_shares_are_enough_whatever_the_others_are() {
        for (n, k, f) in [(4, 2, 1), (9, 3, 2), (16, 6, 5)] {
            let (key, right, mut rng) = dealt(n, k, n as u64);
            let commitment = data_key_commitment(&CLUSTER, &key);
            let mut shares = right.clone();
            for (i, share) in shares.iter_mut().enumerate().skip(k) {
                spoil(share, i, i as u8);
            }
            // All but k lie: the key comes out. Whom to blame is not certain.
            let found = reconstruct(&CLUSTER, &commitment, k, f, &shares, &mut rng).unwrap();
            assert_eq!(*found.data_key, *key);
            spoil(&mut shares[0], 31, 0x80);
            let none = reconstruct(&CLUSTER, &commitment, k, f, &shares, &mut rng);
            assert_eq!(none.err(), Some(ReconstructError::NoneFits { got: n, needed: k }));
            let few = reconstruct(&CLUSTER, &commitment, k, f, &shares[..k - 1], &mut rng);
            assert_eq!(few.err(), Some(ReconstructError::TooFew { got: k - 1, needed: k }));

            // f lie: they are named.
            let mut shares = right.clone();
            for (i, share) in shares.iter_mut().enumerate().take(f) {
                spoil(share, i, 1);
            }
            let found = reconstruct(&CLUSTER, &commitment, k, f, &shares, &mut rng).unwrap();
            assert_eq!(*found.data_key, *key);
            assert_eq!(found.wrong, (0..f).map(|i| ServerId(i as u8)).collect::<Vec<_>>());
        }
    }

    /// Two of nine liars choose errors whose interpolation at 0 vanishes together with any one
    /// honest share's: no honest server is ever blamed for it.
    #[test]
    fn liars_cannot_frame_honest_servers() {
        let (key, right, mut rng) = dealt(9, 3, 5);
        let commitment = data_key_commitment(&CLUSTER, &key);
        let liars = [ServerId(1), ServerId(2)];
        let mut framings = 0;
        for errors in 0..=u16::MAX {
            let [e1, e2] = errors.to_be_bytes();
            let mut shares = right.clone();
            spoil(&mut shares[1], 0, e1);
            spoil(&mut shares[2], 0, e2);
            let lying: Vec<&ServerShare> = [0, 1, 2].map(|i| &shares[i]).into();
            if e1 == 0 || e2 == 0 || interpolate(&lying, 0).unwrap() != key {
                continue;
            }
            framings += 1;
            if framings > 20 {
                break;
            }
            let found = reconstruct(&CLUSTER, &commitment, 3, 2, &shares, &mut rng).unwrap();
            assert_eq!(*found.data_key, *key);
            assert_eq!(found.wrong, liars);
        }
        assert!(framings > 0);
    }

    /// One share of a 2-of-n sharing is uniform whatever the secret: every byte occurs about
    /// equally often, the secret's own included. (With `sharks` 0.5, whose coefficients are never
    /// zero, a share never equals its secret: RUSTSEC-2024-0398.)
    #[test]
    fn fewer_than_k_shares_say_nothing() {
        for secret in [0u8, 0x42, 0xff] {
            let mut rng = StdRng::seed_from_u64(u64::from(secret));
            let mut seen = [0u32; 256];
            for _ in 0..1_600 {
                let shares = deal(&[secret; 32], 2, 4, &mut rng);
                shares[1].iter().for_each(|byte| seen[usize::from(*byte)] += 1);
            }
            // 51,200 bytes: 200 of each expected, standard deviation 14.
            assert!(seen.iter().all(|count| (100..300).contains(count)), "{secret}: {seen:?}");
        }
    }

    /// The field and the indices are those of the vectors that refresh is checked against.
    #[test]
    fn shares_of_the_reference_vector_give_its_secret() {
        let hex = |text: &str| -> [u8; 32] {
            let bytes: Vec<u8> =
                (0..32).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
            bytes.try_into().unwrap()
        };
        let secret = hex("e3c5966d47d536d944409e6fefbca950992d991b3bb1cdbca1c1bbbc077bb475");
        let shares = [
            (0, hex("3e388dbafbc3972cafb55ae42101a8bb8ab0af736c918214316d60fe0b6c4bf1")),
            (3, hex("b016fa168d8d882acfb3a979f072addbd56341a67a31ec26db4bf0a937276f5f")),
        ]
        .map(|(server, share)| ServerShare { server: ServerId(server), share: SecretBytes::new(&share) });
        let commitment = data_key_commitment(&CLUSTER, &secret);
        let mut rng = StdRng::seed_from_u64(0);
        let found = reconstruct(&CLUSTER, &commitment, 2, 1, &shares, &mut rng).unwrap();
        assert_eq!(*found.data_key, secret);
    }
}
