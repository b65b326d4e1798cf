//! A threshold oblivious pseudo-random function: what turns a weak passphrase into a strong key without
//! anyone being able to try passphrases on her own (design §6; Jarecki, Kiayias, Krawczyk & Xu 2017).
//!
//! The function is VOPRF(ristretto255, SHA-512) of RFC 9497. Its key is shared among the servers
//! ([`scalars`]): a client blinds its input, each server multiplies the blinded element with its share, and
//! any k of the results, with Lagrange coefficients in the exponent, make what the whole key would have
//! made. The client takes its blind off. No server learns input or output, and fewer than k can compute
//! nothing.
//!
//! A server shows with each result the public half b·G of its share, and proves (RFC 9497 §2.2) that it
//! used that share. Shares are renewed with every epoch, so nobody can know b·G beforehand; but the whole
//! key's public half does not change, and results count only if the public halves interpolate to it. That
//! needs no right passphrase: so a wrong one is told from lying servers with certainty.

use crate::bytes::{Element, PublicKey, SecretBytes};
use crate::codec::{Tagged, secret_signing_bytes, sha256};
use crate::ids::{ClusterId, ServerId};
use crate::scalars;
use crate::signing::SigningKey;
use curve25519_dalek::constants::RISTRETTO_BASEPOINT_POINT as GENERATOR;
use curve25519_dalek::ristretto::{CompressedRistretto, RistrettoPoint};
use curve25519_dalek::scalar::Scalar;
use curve25519_dalek::traits::{Identity as _, VartimeMultiscalarMul as _};
use rand_core::CryptoRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha512};
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// "OPRFV1-" ‖ mode ‖ "-" ‖ suite (RFC 9497 §3.1), in the verifiable mode.
const CONTEXT: &[u8] = b"OPRFV1-\x01-ristretto255-SHA512";
/// Subsets of results that are tried before a client gives up.
const MAX_SUBSETS: usize = 20_000;

/// `expand_message_xmd` with SHA-512 for 64 bytes (RFC 9380 §5.3.1), with the tag `name` ‖ context.
fn expand(message: &[u8], name: &[u8]) -> Zeroizing<[u8; 64]> {
    let tag = |hash: Sha512| {
        let hash = hash.chain_update(name).chain_update(CONTEXT);
        Zeroizing::new(<[u8; 64]>::from(hash.chain_update([(name.len() + CONTEXT.len()) as u8]).finalize()))
    };
    let padded = Sha512::new().chain_update([0; 128]).chain_update(message);
    let first = tag(padded.chain_update(64u16.to_be_bytes()).chain_update([0]));
    tag(Sha512::new().chain_update(*first).chain_update([1]))
}

fn hash_to_group(input: &[u8]) -> RistrettoPoint {
    RistrettoPoint::from_uniform_bytes(&expand(input, b"HashToGroup-"))
}
fn hash_to_scalar(input: &[u8]) -> Scalar {
    scalars::from_wide(&expand(input, b"HashToScalar-"))
}
/// The parts with their lengths in front.
fn transcript(parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend_from_slice(&(part.len() as u16).to_be_bytes());
        bytes.extend_from_slice(part);
    }
    bytes
}

fn encode(point: &RistrettoPoint) -> Element {
    Element(point.compress().0)
}
/// The element, unless it is the identity or no canonical encoding of any.
fn decode(element: &Element) -> Option<RistrettoPoint> {
    CompressedRistretto(element.0).decompress().filter(|point| *point != RistrettoPoint::identity())
}
/// Whether an element is one that may be evaluated.
pub fn is_sound(element: &Element) -> bool {
    decode(element).is_some()
}

/// The public half of a key.
pub fn public_half(key: &Scalar) -> Element {
    encode(&RistrettoPoint::mul_base(key))
}

/// What makes an element of an element, and a proof for it (RFC 9497 §2.2): M and Z of one pair.
fn composites(key: &Element, from: &Element, to: &Element) -> Scalar {
    let mut seed_tag = b"Seed-".to_vec();
    seed_tag.extend_from_slice(CONTEXT);
    let seed = Sha512::digest(transcript(&[&key.0, &seed_tag]));
    let mut bytes = transcript(&[&seed]);
    bytes.extend_from_slice(&0u16.to_be_bytes());
    bytes.extend_from_slice(&transcript(&[&from.0, &to.0]));
    bytes.extend_from_slice(b"Composite");
    hash_to_scalar(&bytes)
}
fn challenge(key: &Element, points: [&RistrettoPoint; 4]) -> Scalar {
    let [m, z, t2, t3] = points.map(encode);
    let mut bytes = transcript(&[&key.0, &m.0, &z.0, &t2.0, &t3.0]);
    bytes.extend_from_slice(b"Challenge");
    hash_to_scalar(&bytes)
}

/// A server's result: its share times the blinded element, and the proof that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// The public half of the share.
    pub key: Element,
    /// The share times the blinded element.
    pub element: Element,
    /// Challenge and response, each a canonical scalar.
    pub proof: [[u8; 32]; 2],
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OprfError {
    /// The identity, or no element at all.
    #[error("not a ristretto255 element that may be evaluated")]
    Element,
    /// Fewer than k results.
    #[error("{got} results where {needed} are needed")]
    TooFew {
        /// Results with a proof.
        got: usize,
        /// k.
        needed: usize,
    },
    /// No k of them belong to the key.
    #[error("no {needed} of {got} results are of the key that was deposited")]
    NoneFits {
        /// Results with a proof.
        got: usize,
        /// k.
        needed: usize,
    },
}

/// Evaluates a blinded element under a key or a share of one (RFC 9497 §3.3.2). `nonce` is uniform and used
/// for nothing else.
fn evaluate_with(key: &Scalar, blinded: &Element, nonce: &Scalar) -> Result<Evaluation, OprfError> {
    let from = decode(blinded).ok_or(OprfError::Element)?;
    let public = public_half(key);
    let element = encode(&(from * key));
    let factor = composites(&public, blinded, &element);
    let m = from * factor;
    let z = m * key;
    let c = challenge(&public, [&m, &z, &RistrettoPoint::mul_base(nonce), &(m * nonce)]);
    let s = nonce - c * key;
    Ok(Evaluation { key: public, element, proof: [c.to_bytes(), s.to_bytes()] })
}

/// A server's result under its share of a key.
pub fn evaluate<R: CryptoRng>(
    share: &[u8; 32],
    blinded: &Element,
    rng: &mut R,
) -> Result<Evaluation, OprfError> {
    // A share that is not canonical never got into a slot.
    let share = scalars::decode(share).ok_or(OprfError::Element)?;
    evaluate_with(&share, blinded, &scalars::draw(rng))
}

impl Evaluation {
    /// Whether the element is that of the share whose public half is shown (RFC 9497 §2.2.2).
    pub fn is_proved(&self, blinded: &Element) -> bool {
        let [c, s] = self.proof.map(|bytes| scalars::decode(&bytes));
        let points = (decode(&self.key), decode(blinded), decode(&self.element), c, s);
        let (Some(key), Some(from), Some(to), Some(c), Some(s)) = points else { return false };
        let factor = composites(&self.key, blinded, &self.element);
        let (m, z) = (from * factor, to * factor);
        let t2 = RistrettoPoint::vartime_multiscalar_mul([*s, *c], [GENERATOR, key]);
        let t3 = RistrettoPoint::vartime_multiscalar_mul([*s, *c], [m, z]);
        challenge(&self.key, [&m, &z, &t2, &t3]) == *c
    }
}

/// A client's input, blinded (RFC 9497 §3.3.1).
pub struct Blinded {
    blind: Zeroizing<Scalar>,
    input: Zeroizing<Vec<u8>>,
    /// What servers may see.
    pub element: Element,
}

/// What k results were put together to.
pub struct Combined {
    /// The function's output (RFC 9497 §3.3.2).
    pub output: Zeroizing<[u8; 64]>,
    /// Servers whose results are wrong, as far as that is certain.
    pub wrong: Vec<ServerId>,
}

fn finalize(input: &[u8], unblinded: &RistrettoPoint) -> Zeroizing<[u8; 64]> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(input.len() + 48));
    bytes.extend_from_slice(&(input.len() as u16).to_be_bytes());
    bytes.extend_from_slice(input);
    bytes.extend_from_slice(&32u16.to_be_bytes());
    bytes.extend_from_slice(&unblinded.compress().0);
    bytes.extend_from_slice(b"Finalize");
    Zeroizing::new(Sha512::digest(&*bytes).into())
}

/// The function's output for one who knows the whole key: the depositor.
pub fn output(key: &Scalar, input: &[u8]) -> Zeroizing<[u8; 64]> {
    finalize(input, &(hash_to_group(input) * key))
}

impl Blinded {
    /// Blinds an input of at most 65,535 bytes.
    pub fn new<R: CryptoRng>(input: &[u8], rng: &mut R) -> Self {
        Self::with(input, scalars::draw(rng))
    }
    fn with(input: &[u8], blind: Zeroizing<Scalar>) -> Self {
        let element = encode(&(hash_to_group(input) * *blind));
        Self { blind, input: Zeroizing::new(input.to_vec()), element }
    }

    /// Puts the results of k servers together: such that are proved, and whose shares' public halves
    /// interpolate to that of the whole key. Subsets are tried in random order, so that liars cannot
    /// place themselves to be tried first.
    ///
    /// A server is named if its proof fails; or if its public half does not fit and that is certain: a
    /// polynomial that k−1+`faulty` of them lie on is right, as in [`shamir`](crate::shamir).
    pub fn combine<R: CryptoRng>(
        &self,
        key: &Element,
        threshold: usize,
        faulty: usize,
        results: &[(ServerId, Evaluation)],
        rng: &mut R,
    ) -> Result<Combined, OprfError> {
        let whole = decode(key).ok_or(OprfError::Element)?;
        let (mut proved, mut wrong) = (Vec::new(), Vec::new());
        for (server, result) in results {
            match (decode(&result.key), decode(&result.element)) {
                (Some(key), Some(element)) if result.is_proved(&self.element) => {
                    proved.push((*server, key, element))
                }
                _ => wrong.push(*server),
            }
        }
        let (got, needed) = (proved.len(), threshold);
        if got < needed {
            return Err(OprfError::TooFew { got, needed });
        }
        for i in (1..got).rev() {
            proved.swap(i, (rng.next_u64() % (i as u64 + 1)) as usize);
        }
        let mut subset: Vec<usize> = (0..needed).collect();
        for _ in 0..MAX_SUBSETS {
            let xs: Vec<u8> = subset.iter().map(|&i| proved[i].0.share_index()).collect();
            let keys = || subset.iter().map(|&i| proved[i].1);
            let key_at = |x| RistrettoPoint::vartime_multiscalar_mul(scalars::lagrange(&xs, x), keys());
            if key_at(0) == whole {
                let misfits = proved.iter().filter(|(server, key, _)| key_at(server.share_index()) != *key);
                let misfits: Vec<_> = misfits.map(|(server, ..)| *server).collect();
                if got - misfits.len() + 1 >= needed + faulty {
                    wrong.extend(misfits);
                }
                let elements = subset.iter().map(|&i| proved[i].2);
                let together = RistrettoPoint::vartime_multiscalar_mul(scalars::lagrange(&xs, 0), elements);
                let unblinded = together * self.blind.invert();
                return Ok(Combined { output: finalize(&self.input, &unblinded), wrong });
            }
            if !crate::shamir::next_subset(&mut subset, got) {
                break;
            }
        }
        Err(OprfError::NoneFits { got, needed })
    }
}

/// What a passphrase leads to, together with k servers.
pub struct PassphraseKeys {
    /// Encrypts the material.
    pub data_key: SecretBytes,
    /// Shows to the log that the passphrase was right.
    pub opener: SigningKey,
}

impl PassphraseKeys {
    /// From the output for the stretched passphrase.
    pub fn derive(cluster: &ClusterId, output: &[u8; 64]) -> Self {
        #[derive(Serialize)]
        struct DataKey<'a>(&'a [u8]);
        impl Tagged for DataKey<'_> {
            const TAG: &'static str = "kds.passphrase-data-key";
        }
        #[derive(Serialize)]
        struct Opener<'a>(&'a [u8]);
        impl Tagged for Opener<'_> {
            const TAG: &'static str = "kds.passphrase-opener";
        }
        let data_key = sha256(&secret_signing_bytes(cluster, &DataKey(output)));
        let opener = Zeroizing::new(sha256(&secret_signing_bytes(cluster, &Opener(output))).0);
        Self {
            data_key: SecretBytes::new(&Zeroizing::new(data_key.0)),
            opener: SigningKey::from_seed(&opener),
        }
    }
    /// Whether these are the keys whose opener was deposited: whether the passphrase was right.
    pub fn are_of(&self, opener: &PublicKey) -> bool {
        self.opener.public().0.ct_eq(&opener.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Hash;
    use rand::{SeedableRng, rngs::StdRng};

    fn hex<const N: usize>(text: &str) -> [u8; N] {
        assert_eq!(text.len(), 2 * N);
        std::array::from_fn(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
    }
    fn scalar(text: &str) -> Zeroizing<Scalar> {
        scalars::decode(&hex(text)).unwrap()
    }

    /// RFC 9497, appendix A.1.2: ristretto255-SHA512 in the verifiable mode, its two single-input vectors.
    #[test]
    fn vectors_of_the_rfc() {
        // DeriveKeyPair (§3.2.1) of the seed and "test key".
        let mut derive = vec![0xa3; 32];
        derive.extend_from_slice(&transcript(&[b"test key"]));
        derive.push(0);
        let key = scalars::from_wide(&expand(&derive, b"DeriveKeyPair"));
        assert_eq!(key.to_bytes(), hex("e6f73f344b79b379f1a0dd37e07ff62e38d9f71345ce62ae3a9bc60b04ccd909"));
        let public = public_half(&key);
        assert_eq!(public.0, hex("c803e2cc6b05fc15064549b5920659ca4a77b2cca6f04f6b357009335476ad4e"));
        let blind = "64d37aed22a27f5191de1c1d69fadb899d8862b58eb4220029e036ec4c1f6706";
        let nonce = scalar("222a5e897cf59db8145db8d16e597e8facb80ae7d4e26d9881aa6f61d645fc0e");
        let vectors: [(&[u8], [&str; 5]); 2] = [
            (
                &[0],
                [
                    "863f330cc1a1259ed5a5998a23acfd37fb4351a793a5b3c090b642ddc439b945",
                    "aa8fa048764d5623868679402ff6108d2521884fa138cd7f9c7669a9a014267e",
                    "ddef93772692e535d1a53903db24367355cc2cc78de93b3be5a8ffcc6985dd06",
                    "6d4346421d17bf5117a2a1ff0fcb2a759f58a539dfbe857a40bce4cf49ec600d",
                    "b58cfbe118e0cb94d79b5fd6a6dafb98764dff49c14e1770b566e42402da1a7d\
                     a4d8527693914139caee5bd03903af43a491351d23b430948dd50cde10d32b3c",
                ],
            ),
            (
                &[0x5a; 17],
                [
                    "cc0b2a350101881d8a4cba4c80241d74fb7dcbfde4a61fde2f91443c2bf9ef0c",
                    "60a59a57208d48aca71e9e850d22674b611f752bed48b36f7a91b372bd7ad468",
                    "401a0da6264f8cf45bb2f5264bc31e109155600babb3cd4e5af7d181a2c9dc0a",
                    "67154fabf031fd936051dec80b0b6ae29c9503493dde7393b722eafdf5a50b02",
                    "8a9a2f3c7f085b65933594309041fc1898d42d0858e59f90814ae90571a6df60\
                     356f4610bf816f27afdd84f47719e480906d27ecd994985890e5f539e7ea74b6",
                ],
            ),
        ];
        for (input, [blinded, evaluated, c, s, out]) in vectors {
            let asked = Blinded::with(input, scalar(blind));
            assert_eq!(asked.element.0, hex(blinded));
            let result = evaluate_with(&key, &asked.element, &nonce).unwrap();
            assert_eq!(result.element.0, hex(evaluated));
            assert_eq!(result.proof, [hex(c), hex(s)]);
            assert!(result.is_proved(&asked.element));
            assert_eq!(*output(&key, input), hex(&out.replace(' ', "")));
            // One server with the whole key: a threshold of one.
            let mut rng = StdRng::seed_from_u64(1);
            let unshared = scalars::deal(&key, 1, 1, &mut rng);
            let result = evaluate(&unshared[0], &asked.element, &mut rng).unwrap();
            let combined = asked.combine(&public, 1, 0, &[(ServerId(0), result)], &mut rng).unwrap();
            assert_eq!(*combined.output, hex(&out.replace(' ', "")));
        }
    }

    type Results = Vec<(ServerId, Evaluation)>;
    type Shares = Vec<SecretBytes>;

    fn asked(n: usize, k: usize) -> (Zeroizing<Scalar>, Shares, Blinded, Results, StdRng) {
        let mut rng = StdRng::seed_from_u64(n as u64);
        let key = scalars::draw(&mut rng);
        let shares = scalars::deal(&key, k, n, &mut rng);
        let asked = Blinded::new(b"stretched", &mut rng);
        let results = shares
            .iter()
            .enumerate()
            .map(|(i, share)| (ServerId(i as u8), evaluate(share, &asked.element, &mut rng).unwrap()));
        let results = results.collect();
        (key, shares, asked, results, rng)
    }

    #[test]
    fn any_k_right_results_are_enough_whatever_the_others_are() {
        for (n, k, f) in [(4, 2, 1), (9, 3, 2), (16, 6, 5)] {
            let (key, _, asked, right, mut rng) = asked(n, k);
            let whole = public_half(&key);
            let expected = output(&key, b"stretched");
            // All but k evaluate honestly under shares of another key, or send nonsense.
            let foreign = scalars::deal(&scalars::draw(&mut rng), k, n, &mut rng);
            let mut results = right.clone();
            for (i, (_, result)) in results.iter_mut().enumerate().skip(k) {
                match i % 3 {
                    0 => result.element = result.key,
                    1 => result.proof[1] = [0xff; 32],
                    _ => *result = evaluate(&foreign[i], &asked.element, &mut rng).unwrap(),
                }
            }
            let combined = asked.combine(&whole, k, f, &results, &mut rng).unwrap();
            assert_eq!(combined.output, expected, "n {n}");
            // One less, and there is no result; never a wrong one.
            results[0].1 = evaluate(&foreign[0], &asked.element, &mut rng).unwrap();
            assert!(asked.combine(&whole, k, f, &results, &mut rng).is_err());
            let few = asked.combine(&whole, k, f, &right[..k - 1], &mut rng).err();
            assert_eq!(few, Some(OprfError::TooFew { got: k - 1, needed: k }));

            // f lie: they are named, and nobody else is.
            let mut results = right.clone();
            for (i, (_, result)) in results.iter_mut().enumerate().take(f) {
                *result = match i % 2 {
                    0 => evaluate(&foreign[i], &asked.element, &mut rng).unwrap(),
                    _ => Evaluation { element: result.key, ..*result },
                };
            }
            let mut combined = asked.combine(&whole, k, f, &results, &mut rng).unwrap();
            combined.wrong.sort();
            assert_eq!(combined.wrong, (0..f).map(|i| ServerId(i as u8)).collect::<Vec<_>>());
            assert_eq!(combined.output, expected);
        }
    }

    /// A proof for one question, key or answer is none for another.
    #[test]
    fn proofs_hold_for_what_they_were_made_for() {
        let (_, shares, asked, right, mut rng) = asked(4, 2);
        let result = right[0].1;
        assert!(result.is_proved(&asked.element));
        let other = Blinded::new(b"stretched", &mut rng);
        assert_ne!(other.element, asked.element, "the same input is blinded anew");
        assert!(!result.is_proved(&other.element));
        let elsewhere = evaluate(&shares[1], &asked.element, &mut rng).unwrap();
        for wrong in [
            Evaluation { key: elsewhere.key, ..result },
            Evaluation { element: elsewhere.element, ..result },
            Evaluation { proof: elsewhere.proof, ..result },
            Evaluation { element: Element([0; 32]), ..result },
            Evaluation { key: Element([0xff; 32]), ..result },
        ] {
            assert!(!wrong.is_proved(&asked.element));
        }
        // The identity is not evaluated: it would be no question.
        assert_eq!(evaluate(&shares[0], &Element([0; 32]), &mut rng), Err(OprfError::Element));
        assert!(!is_sound(&Element([0; 32])) && !is_sound(&Element([0xff; 32])));
    }

    #[test]
    fn keys_follow_from_the_output_and_the_cluster() {
        let (one, two) = (ClusterId(Hash([1; 32])), ClusterId(Hash([2; 32])));
        let keys = PassphraseKeys::derive(&one, &[7; 64]);
        assert!(keys.are_of(&PassphraseKeys::derive(&one, &[7; 64]).opener.public()));
        for other in [PassphraseKeys::derive(&two, &[7; 64]), PassphraseKeys::derive(&one, &[8; 64])] {
            assert_ne!(*keys.data_key, *other.data_key);
            assert!(!keys.are_of(&other.opener.public()));
        }
    }
}
