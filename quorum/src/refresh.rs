//! Pseudo-random zero sharing: the arithmetic by which shares change and secrets do not (design §7;
//! Cramer, Damgård & Ishai 2005; Herzberg et al. 1995).
//!
//! With t = k−1 there is a seed for every set T of t−1 servers, which the servers outside T know. Server
//! i's part of the zero sharing for secret j is
//!
//! ```text
//! z_j(i) = Σ over T without i of  PRF(seed_T, j) · i · ∏_{l∈T} (i − l)
//! ```
//!
//! Each term is a polynomial of degree t in i that vanishes at 0 and at T. So adding it to a share keeps
//! the secret, and t servers learn nothing that the t shares they have do not say. Once the seeds are
//! agreed nothing is sent, however many secrets there are.
//!
//! A server r that has lost its shares gets, from each other server i, its new share under a mask that
//! vanishes at r: with a seed for every set T of t servers that contains r,
//!
//! ```text
//! m_j(i) = s_j(i) + Σ over such T without i of  PRF(seed_T, j) · ∏_{l∈T} (i − l)
//! ```
//!
//! which is a polynomial of degree t that r can interpolate at r, where it is r's share, and which is
//! random everywhere else.
//!
//! Shares are over GF(256) bytewise, or scalars of ristretto255: [`Field::of`] says by a secret's index
//! which. The formulas are the same; over scalars i and l are whole numbers.
//!
//! Seeds are made of contributions that *dealers* commit to in the log and hand out in private: one for
//! each set that the dealer is no member of. [`Dealing`] is what one dealer hands to one server.

use crate::bytes::{Hash, SecretBytes};
use crate::codec::{Tagged, digest, secret_signing_bytes};
use crate::gf256::{self, Combination};
use crate::ids::{AttemptId, ClusterId, ServerId, ServerSet};
use crate::scalars;
use crate::thresholds::{MAX_SEED_SETS, Thresholds};
use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit as _, StreamCipher as _};
use curve25519_dalek::scalar::Scalar;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use zeroize::{Zeroize as _, Zeroizing};

/// Secrets whose pseudo-random bytes come from one stretch of a key stream, as they have consecutive
/// indices.
pub const CHUNK: usize = 128;
/// Bytes of the shares of a chunk.
pub const CHUNK_BYTES: usize = CHUNK * 32;

/// The index of the first secret whose shares are scalars. So many secrets are never deposited.
pub const SCALARS_FROM: u64 = 1 << 48;

/// What a secret's shares are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// 32 bytes, each shared over GF(256): of a data key that its readers put together.
    Bytes,
    /// A scalar of ristretto255: of a key that servers evaluate a function with.
    Scalars,
}

impl Field {
    /// Of the secret with this index.
    pub fn of(index: u64) -> Self {
        if index < SCALARS_FROM { Self::Bytes } else { Self::Scalars }
    }
    /// Of the secrets in this chunk, which are all of one kind.
    pub fn of_chunk(chunk: u64) -> Self {
        Self::of(chunk.saturating_mul(CHUNK as u64))
    }
    /// Whether these bytes can be a share.
    pub fn has(self, share: &[u8; 32]) -> bool {
        match self {
            Self::Bytes => true,
            Self::Scalars => scalars::decode(share).is_some(),
        }
    }
    /// The value at `x` of the polynomial through these points, which have different first halves.
    pub fn interpolate(self, points: &[(u8, &[u8; 32])], x: u8) -> SecretBytes {
        match self {
            Self::Bytes => gf256::interpolate(points, x),
            Self::Scalars => scalars::interpolate(points, x),
        }
    }
}

/// What a seed is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Purpose {
    /// A zero sharing for every secret.
    Refresh,
    /// A mask for the shares that this server gets.
    Recovery(ServerId),
}

/// Servers that do not know a seed.
#[derive(Clone, Copy, Debug)]
struct SeedSet {
    purpose: Purpose,
    members: ServerSet,
}

/// All subsets of a given size, in lexicographic order.
fn subsets(of: &[ServerId], size: usize) -> Vec<ServerSet> {
    let mut places: Vec<usize> = (0..size).collect();
    let mut all = Vec::new();
    if size > of.len() {
        return all;
    }
    loop {
        all.push(places.iter().map(|&place| of[place]).collect());
        let Some(at) = (0..size).rev().find(|&i| places[i] < of.len() - size + i) else { return all };
        places[at] += 1;
        for i in at + 1..size {
            places[i] = places[i - 1] + 1;
        }
    }
}

/// The seeds that one attempt agrees on.
#[derive(Clone)]
pub struct Seeds {
    cluster: ClusterId,
    attempt: AttemptId,
    recovering: Option<ServerId>,
    sets: Arc<[SeedSet]>,
}

/// What a dealer's commitment is made of.
#[derive(Serialize)]
struct Contribution<'a> {
    attempt: AttemptId,
    dealer: ServerId,
    purpose: Purpose,
    members: ServerSet,
    contribution: &'a SecretBytes,
}
impl Tagged for Contribution<'_> {
    const TAG: &'static str = "kds.contribution";
}
#[derive(Serialize)]
struct Commitment<'a> {
    attempt: AttemptId,
    dealer: ServerId,
    leaves: &'a [Hash],
}
impl Tagged for Commitment<'_> {
    const TAG: &'static str = "kds.dealing";
}
#[derive(Serialize)]
struct Seed<'a> {
    attempt: AttemptId,
    purpose: Purpose,
    members: ServerSet,
    contributions: &'a [(ServerId, &'a SecretBytes)],
}
impl Tagged for Seed<'_> {
    const TAG: &'static str = "kds.seed";
}

impl Seeds {
    /// The seeds of an attempt which `renews` shares or not, and in which `recovering`, if anyone, is to get
    /// its shares back.
    pub fn new(
        cluster: ClusterId,
        thresholds: Thresholds,
        attempt: AttemptId,
        renews: bool,
        recovering: Option<ServerId>,
    ) -> Self {
        let servers: Vec<_> = (0..thresholds.n()).map(|i| ServerId(i as u8)).collect();
        // t − 1 = k − 2.
        let size = thresholds.k().saturating_sub(2);
        let refresh = subsets(&servers, size).into_iter();
        let mut sets: Vec<_> = refresh
            .filter(|_| renews)
            .map(|members| SeedSet { purpose: Purpose::Refresh, members })
            .collect();
        if let Some(r) = recovering {
            let others: Vec<_> = servers.iter().copied().filter(|server| *server != r).collect();
            sets.extend(subsets(&others, size).into_iter().map(|mut members| {
                members.insert(r);
                SeedSet { purpose: Purpose::Recovery(r), members }
            }));
        }
        Self { cluster, attempt, recovering, sets: sets.into() }
    }
    /// Of which attempt.
    pub fn attempt(&self) -> AttemptId {
        self.attempt
    }
    /// Who gets its shares back.
    pub fn recovering(&self) -> Option<ServerId> {
        self.recovering
    }

    fn sets_of(&self, dealer: ServerId) -> impl Iterator<Item = &SeedSet> {
        self.sets.iter().filter(move |set| !set.members.contains(dealer))
    }
    fn leaf(&self, dealer: ServerId, set: &SeedSet, contribution: &SecretBytes) -> Hash {
        let (attempt, purpose, members) = (self.attempt, set.purpose, set.members);
        let leaf = Contribution { attempt, dealer, purpose, members, contribution };
        crate::codec::sha256(&secret_signing_bytes(&self.cluster, &leaf))
    }

    /// A dealer's contributions, drawn from 32 random bytes that are used for nothing else.
    pub fn draw(&self, dealer: ServerId, entropy: &SecretBytes) -> Dealing {
        let mut stream = key_stream(entropy, u64::from(self.attempt.attempt));
        let mut parts = Vec::with_capacity(self.sets.len());
        for _ in self.sets_of(dealer) {
            parts.push(Part::Value(SecretBytes::fill(|bytes| stream.apply_keystream(bytes))));
        }
        Dealing { parts }
    }

    /// What a dealer commits to: a hash of a hash for each of its contributions. Since a contribution is
    /// 32 random bytes, its hash does not give it away.
    pub fn root(&self, dealer: ServerId, dealing: &Dealing) -> Option<Hash> {
        if self.sets_of(dealer).count() != dealing.parts.len() {
            return None;
        }
        let leaves = self.sets_of(dealer).zip(&dealing.parts).map(|(set, part)| match part {
            Part::Value(value) => self.leaf(dealer, set, value),
            Part::Hash(hash) => *hash,
        });
        let leaves: Vec<_> = leaves.collect();
        Some(digest(&self.cluster, &Commitment { attempt: self.attempt, dealer, leaves: &leaves }))
    }

    /// What a server may be given: the values of the sets that it is no member of, and for the others
    /// the hashes, so that it can check the whole.
    pub fn for_server(&self, dealer: ServerId, dealing: &Dealing, server: ServerId) -> Dealing {
        // Vectors of secrets are as large as they get from the start: one that grows leaves copies behind.
        let mut parts = Vec::with_capacity(dealing.parts.len());
        parts.extend(self.sets_of(dealer).zip(&dealing.parts).map(|(set, part)| match part {
            Part::Value(value) if set.members.contains(server) => Part::Hash(self.leaf(dealer, set, value)),
            part => part.clone(),
        }));
        Dealing { parts }
    }

    /// Whether a server has every contribution of this dealer that it may have.
    pub fn is_complete(&self, dealer: ServerId, dealing: &Dealing, server: ServerId) -> bool {
        let mut parts = self.sets_of(dealer).zip(&dealing.parts);
        parts.all(|(set, part)| set.members.contains(server) || matches!(part, Part::Value(_)))
    }

    /// The seeds that a server knows, with its coefficients: the sets that it is no member of.
    fn terms_of(
        &self,
        server: ServerId,
        dealings: &[(ServerId, &Dealing)],
        purpose: Purpose,
        coefficient: impl Fn(u8, &ServerSet) -> Coefficient,
    ) -> Option<Terms> {
        let mut parts: Vec<_> =
            dealings.iter().map(|(dealer, dealing)| (*dealer, dealing.parts.iter())).collect();
        let mut terms = Vec::with_capacity(self.sets.len());
        for set in self.sets.iter() {
            let dealers = parts.iter_mut().filter(|(dealer, _)| !set.members.contains(*dealer));
            let given: Vec<_> = dealers.map(|(dealer, parts)| Some((*dealer, parts.next()?))).collect();
            if set.members.contains(server) || set.purpose != purpose {
                continue;
            }
            let values = given.into_iter().map(|given| match given {
                Some((dealer, Part::Value(value))) => Some((dealer, value)),
                _ => None,
            });
            let contributions: Vec<_> = values.collect::<Option<_>>()?;
            let seed =
                Seed { attempt: self.attempt, purpose, members: set.members, contributions: &contributions };
            let seed = crate::codec::sha256(&secret_signing_bytes(&self.cluster, &seed));
            let coefficient = coefficient(server.share_index(), &set.members);
            terms.push(Term { coefficient, seed: SecretBytes::new(&seed.0) });
        }
        Some(Terms(terms))
    }

    /// A server's part of the zero sharings, from the dealings of the dealers that were agreed on, in
    /// ascending order; none if it lacks a contribution.
    pub fn zero_sharing(&self, server: ServerId, dealings: &[(ServerId, &Dealing)]) -> Option<Terms> {
        self.terms_of(server, dealings, Purpose::Refresh, zero_coefficient)
    }

    /// The masks under which a server gives its shares to the one that recovers; none if it lacks a
    /// contribution, or if there is nobody to give them to.
    pub fn masks(&self, server: ServerId, dealings: &[(ServerId, &Dealing)]) -> Option<Terms> {
        let r = self.recovering.filter(|r| *r != server)?;
        self.terms_of(server, dealings, Purpose::Recovery(r), mask_coefficient)
    }
}

/// What a term is multiplied with, in GF(256) and as a whole number. At most 225 servers and MAX_SEED_SETS
/// sets leave few factors of at most 225: no product comes near the bounds of an i64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Coefficient {
    byte: u8,
    whole: i64,
}

/// i·∏(i − l): vanishes at 0 and at T.
fn zero_coefficient(i: u8, members: &ServerSet) -> Coefficient {
    let Coefficient { byte, whole } = mask_coefficient(i, members);
    Coefficient { byte: gf256::multiply(i, byte), whole: i64::from(i) * whole }
}
/// ∏(i − l): vanishes at T.
fn mask_coefficient(i: u8, members: &ServerSet) -> Coefficient {
    members.iter().fold(Coefficient { byte: 1, whole: 1 }, |product, l| Coefficient {
        byte: gf256::multiply(product.byte, i ^ l.share_index()),
        whole: product.whole * (i64::from(i) - i64::from(l.share_index())),
    })
}

/// One dealer's contributions as one server knows them, in the order of the sets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dealing {
    parts: Vec<Part>,
}

/// A contribution, or its hash where it is not for the one who holds this.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Part {
    Value(SecretBytes),
    Hash(Hash),
}

impl Dealing {
    /// Takes over what another dealing with the same root knows besides.
    pub fn merge(&mut self, other: Self) {
        for (own, other) in self.parts.iter_mut().zip(other.parts) {
            if let (Part::Hash(_), Part::Value(_)) = (&*own, &other) {
                *own = other;
            }
        }
    }
    /// Whether an attempt can have so many sets: a liar's need not be stored before that is known exactly.
    pub fn is_plausible(&self) -> bool {
        self.parts.len() as u64 <= 2 * MAX_SEED_SETS
    }
}

/// A seed and what its pseudo-random bytes are multiplied with.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Term {
    coefficient: Coefficient,
    seed: SecretBytes,
}

/// One server's sum over seeds: what is added to each of its shares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Terms(Vec<Term>);

/// The key stream for the secrets of one chunk.
fn key_stream(seed: &SecretBytes, chunk: u64) -> ChaCha20 {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&chunk.to_le_bytes());
    ChaCha20::new(seed.expose().into(), &nonce.into())
}

/// Memory that adding terms needs, to be used again for the next chunk.
pub struct Scratch {
    combination: Combination,
    stream: Zeroizing<Vec<u8>>,
    /// For scalars: 64 bytes each, and the sums. Empty until there are any.
    wide: Zeroizing<Vec<u8>>,
    sums: Zeroizing<Vec<Scalar>>,
}
impl Default for Scratch {
    fn default() -> Self {
        Self {
            combination: Combination::new(CHUNK_BYTES),
            stream: Zeroizing::new(vec![0; CHUNK_BYTES]),
            wide: Zeroizing::default(),
            sums: Zeroizing::default(),
        }
    }
}

impl Terms {
    /// Adds them to the shares of the secrets CHUNK·chunk…, one after the other.
    pub fn add_to(&self, chunk: u64, shares: &mut [u8; CHUNK_BYTES], scratch: &mut Scratch) {
        match Field::of_chunk(chunk) {
            Field::Bytes => self.add_bytes(chunk, shares, scratch),
            Field::Scalars => self.add_scalars(chunk, shares, scratch),
        }
    }

    fn add_bytes(&self, chunk: u64, shares: &mut [u8; CHUNK_BYTES], scratch: &mut Scratch) {
        let Scratch { combination, stream, .. } = scratch;
        for term in &self.0 {
            stream.fill(0);
            key_stream(&term.seed, chunk).apply_keystream(stream);
            combination.add(term.coefficient.byte, stream);
        }
        stream.as_mut_slice().zeroize();
        combination.add_to(shares);
    }

    fn add_scalars(&self, chunk: u64, shares: &mut [u8; CHUNK_BYTES], scratch: &mut Scratch) {
        let Scratch { wide, sums, .. } = scratch;
        wide.resize(2 * CHUNK_BYTES, 0);
        sums.resize(CHUNK, Scalar::ZERO);
        let (places, _) = shares.as_chunks_mut::<32>();
        for (sum, place) in sums.iter_mut().zip(&*places) {
            *sum = Scalar::from_bytes_mod_order(*place);
        }
        for term in &self.0 {
            wide.fill(0);
            key_stream(&term.seed, chunk).apply_keystream(wide);
            let coefficient = scalars::whole(term.coefficient.whole);
            for (sum, bytes) in sums.iter_mut().zip(wide.as_chunks::<64>().0) {
                *sum += coefficient * scalars::from_wide(bytes);
            }
        }
        for (sum, place) in sums.iter().zip(places) {
            *place = sum.to_bytes();
        }
        wide.as_mut_slice().zeroize();
        sums.iter_mut().for_each(Scalar::zeroize);
    }
}

#[cfg(test)]
mod tests;
