//! Getting back shares that a server has lost (design §7; Herzberg et al. 1995 §4).
//!
//! The other servers answer with their shares under masks that vanish at the one that recovers (see
//! [`refresh`](crate::refresh)). Some of them may lie, and this server counts as one of the f faulty ones
//! itself, so it accepts only a polynomial that at least k+f−1 answers fit, and only if no other one
//! does. Fewer are not enough: two liars can choose errors that vanish at two honest points, and so
//! outvote the truth.

use crate::bytes::SecretBytes;
use crate::gf256::{self, Combination};
use crate::ids::{AttemptId, Epoch, ServerId, ServerSet, Timestamp};
use crate::limits::{
    RECOVERY_BACKOFF, RECOVERY_CHUNKS, RECOVERY_PATIENCE_MS, RECOVERY_WAIT_MS, RETRANSMIT_MS,
};
use crate::message::PeerMessage;
use crate::refresh::{CHUNK, CHUNK_BYTES, Field};
use crate::shares::{MaskedChunk, ShareOp, ShareSet};
use crate::thresholds::Thresholds;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use zeroize::Zeroizing;

/// The server that recovers asks another one for its masked shares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskMasked {
    /// By which attempt.
    pub attempt: AttemptId,
    /// Of which chunks; at most [`RECOVERY_CHUNKS`].
    pub chunks: Vec<u64>,
}

/// Another server's masked shares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Masked {
    /// By which attempt.
    pub attempt: AttemptId,
    /// In the order of the question; empty if the sender cannot help.
    pub chunks: Vec<MaskedChunk>,
}

/// What a recovery wants to happen.
#[derive(Debug, Default)]
struct Recovery {
    /// Questions to send.
    asks: Vec<(ServerId, AskMasked)>,
    /// Shares that were recovered.
    shares: Vec<(u64, SecretBytes)>,
    /// Servers whose answers lie on no polynomial with the others', and for how many secrets.
    wrong: Vec<(ServerId, usize)>,
}

/// Helps others, and has its own server's shares recovered: the part of a share store that talks to
/// others. The one who calls it keeps the [`ShareSet`].
pub struct Keeper {
    id: ServerId,
    thresholds: Thresholds,
    recovering: Option<Recovering>,
    /// The last recovery that has ended.
    ended: Option<Ended>,
    /// How many chunks were given to the server that recovers by this attempt.
    given: Option<(AttemptId, usize)>,
}

#[derive(Clone, Copy)]
struct Ended {
    epoch: Epoch,
    attempt: AttemptId,
    /// Slots that it left empty.
    failed: u64,
    /// Those of them that are beyond hope: enough servers answered, and what they said is no polynomial.
    hopeless: u64,
    /// How many recoveries in a row left such slots.
    times: u32,
}

/// How often a helper gives each of its chunks in one attempt, on average.
const ANSWERS_PER_CHUNK: usize = 16;

/// What a [`Keeper`] wants to happen.
#[derive(Debug, Default)]
pub struct Kept {
    /// Messages to send.
    pub messages: Vec<(ServerId, PeerMessage)>,
    /// Shares that were recovered, to be put in place.
    pub recovered: Option<ShareOp>,
    /// Servers whose masked shares were wrong, and how many.
    pub wrong: Vec<(ServerId, usize)>,
    /// Slots that were given up, if a recovery has just ended.
    pub gave_up: Option<u64>,
}

impl Keeper {
    /// Of one server's shares.
    pub fn new(id: ServerId, thresholds: Thresholds) -> Self {
        Self { id, thresholds, recovering: None, ended: None, given: None }
    }

    /// Whether a recovery of these shares goes on.
    pub fn is_recovering(&self) -> bool {
        self.recovering.is_some()
    }

    /// Whether the replica should ask for a recovery: there are empty slots, and they are not those that
    /// the last one could not fill, which are asked for again after ever longer times. (A depositor who
    /// deals shares that lie on no polynomial makes such slots.)
    pub fn lacks_shares(&self, shares: &ShareSet) -> bool {
        let counts = shares.counts();
        let empty = counts.secrets - counts.shares;
        let again = self.ended.is_none_or(|ended| {
            let due = ended.epoch.0.saturating_add(1 << ended.times.min(RECOVERY_BACKOFF));
            empty > ended.failed || shares.epoch().0 >= due
        });
        let granted = shares.recovering().filter(|(server, _)| *server == self.id);
        let tried =
            granted.is_none_or(|(_, attempt)| self.ended.is_some_and(|ended| ended.attempt == attempt));
        empty > 0 && tried && self.recovering.is_none() && (again || !self.is_whole(shares))
    }

    /// Whether this server has all shares that anyone can expect it to have. Only then may an epoch be
    /// sealed on its word.
    pub fn is_whole(&self, shares: &ShareSet) -> bool {
        let counts = shares.counts();
        counts.secrets - counts.shares - counts.hopeless <= self.ended.map_or(0, |ended| ended.hopeless)
    }

    /// Time passed.
    pub fn tick(&mut self, now: Timestamp, shares: &ShareSet) -> Kept {
        let granted = shares.recovering().filter(|(server, _)| *server == self.id);
        let granted = granted.map(|(_, attempt)| attempt);
        self.recovering.take_if(|recovering| Some(recovering.attempt) != granted);
        if let Some(attempt) = granted
            && self.recovering.is_none()
            && self.ended.is_none_or(|ended| ended.attempt != attempt)
        {
            self.recovering = Some(Recovering::new(self.id, self.thresholds, attempt, shares));
        }
        let Some(recovering) = &mut self.recovering else { return Kept::default() };
        let recovery = recovering.tick(now, shares);
        let mut kept = self.kept(recovery);
        if let Some(done) = self.recovering.take_if(|recovering| recovering.is_done()) {
            let times = self.ended.filter(|_| done.failed > 0).map_or(0, |ended| ended.times + 1);
            let Recovering { epoch, attempt, failed, hopeless, .. } = done;
            self.ended = Some(Ended { epoch, attempt, failed, hopeless, times });
            kept.gave_up = Some(done.failed);
        }
        kept
    }

    fn kept(&self, recovery: Recovery) -> Kept {
        let Recovery { asks, shares, wrong } = recovery;
        let epoch = self.recovering.as_ref().map(|recovering| recovering.epoch);
        let recovered = epoch.filter(|_| !shares.is_empty());
        Kept {
            messages: asks.into_iter().map(|(to, ask)| (to, PeerMessage::AskMasked(ask))).collect(),
            recovered: recovered.map(|epoch| ShareOp::Recovered { epoch, shares }),
            wrong,
            gave_up: None,
        }
    }

    /// Another server asks for its masked shares, and is given them if the log says so.
    pub fn on_ask(&mut self, from: ServerId, ask: &AskMasked, shares: &ShareSet) -> Option<PeerMessage> {
        // Masks are work: each chunk is given often enough for a bad network, and not for ever.
        let given = self.given.filter(|(attempt, _)| *attempt == ask.attempt).map_or(0, |(_, given)| given);
        if given > ANSWERS_PER_CHUNK * (shares.chunks() + RECOVERY_CHUNKS) {
            return None;
        }
        let chunks = shares.masked(from, ask.attempt, &ask.chunks)?;
        self.given = Some((ask.attempt, given + ask.chunks.len()));
        Some(PeerMessage::Masked(Masked { attempt: ask.attempt, chunks }))
    }

    /// An answer.
    pub fn on_masked(&mut self, from: ServerId, masked: Masked) -> Kept {
        let recovery = self.recovering.as_mut().map(|recovering| recovering.take(from, masked));
        recovery.map(|recovery| self.kept(recovery)).unwrap_or_default()
    }
}

/// One server's recovery of its shares in one epoch.
struct Recovering {
    id: ServerId,
    epoch: Epoch,
    attempt: AttemptId,
    thresholds: Thresholds,
    /// Chunks that have gaps and have not been tried yet.
    todo: BTreeSet<u64>,
    /// Those that are being recovered, with what is missing of them.
    window: BTreeMap<u64, u128>,
    answers: BTreeMap<u64, BTreeMap<ServerId, Answer>>,
    answered: ServerSet,
    /// Who had not answered when the last window was decoded: nobody waits for them again.
    slow: ServerSet,
    began: Timestamp,
    asked: Timestamp,
    /// Servers that were caught lying: their answers are tried last.
    suspects: ServerSet,
    /// Slots that could not be filled although there was time, and those of them for which so many servers
    /// answered that no further answer would help.
    failed: u64,
    hopeless: u64,
}

struct Answer {
    filled: u128,
    values: Zeroizing<Vec<u8>>,
}

impl Recovering {
    /// Begins to fill the gaps of a set of shares.
    fn new(id: ServerId, thresholds: Thresholds, attempt: AttemptId, shares: &ShareSet) -> Self {
        Self {
            id,
            epoch: shares.epoch(),
            attempt,
            thresholds,
            todo: shares.gaps().map(|(chunk, _)| chunk).collect(),
            window: BTreeMap::new(),
            answers: BTreeMap::new(),
            answered: ServerSet::default(),
            slow: ServerSet::default(),
            began: Timestamp(0),
            asked: Timestamp(0),
            suspects: ServerSet::default(),
            failed: 0,
            hopeless: 0,
        }
    }
    /// Whether there is nothing left to try.
    fn is_done(&self) -> bool {
        self.todo.is_empty() && self.window.is_empty()
    }

    /// Answers that a polynomial must fit.
    fn needed(&self) -> usize {
        self.thresholds.k() + self.thresholds.f() - 1
    }

    /// Time passed: asks, asks again, gives up.
    fn tick(&mut self, now: Timestamp, shares: &ShareSet) -> Recovery {
        let mut recovery = Recovery::default();
        let waited_ms = now.since_ms(self.began);
        if !self.window.is_empty() && waited_ms >= RECOVERY_WAIT_MS && self.answered.len() >= self.needed() {
            let silent = self.helpers().filter(|helper| !self.answered.contains(*helper));
            self.slow = silent.collect();
            self.decode(&mut recovery);
        }
        if !self.window.is_empty() && waited_ms >= RECOVERY_PATIENCE_MS {
            let failed = self.window.values().map(|gaps| u64::from(gaps.count_ones())).sum::<u64>();
            self.failed += failed;
            // All but f of the servers, this one among those, have said what they have.
            if self.answered.len() + 1 >= self.thresholds.n() - self.thresholds.f() {
                self.hopeless += failed;
            }
            self.window.clear();
        }
        if self.window.is_empty() {
            self.next_window(now, shares);
        }
        if !self.window.is_empty() && now.since_ms(self.asked) >= RETRANSMIT_MS {
            self.asked = now;
            let silent = self.helpers().filter(|helper| !self.answered.contains(*helper));
            let ask = AskMasked { attempt: self.attempt, chunks: self.window.keys().copied().collect() };
            recovery.asks = silent.map(|server| (server, ask.clone())).collect();
        }
        recovery
    }

    fn helpers(&self) -> impl Iterator<Item = ServerId> + use<> {
        let (id, n) = (self.id, self.thresholds.n() as u8);
        (0..n).map(ServerId).filter(move |server| *server != id)
    }

    fn next_window(&mut self, now: Timestamp, shares: &ShareSet) {
        let gaps: BTreeMap<u64, u128> = shares.gaps().collect();
        while self.window.len() < RECOVERY_CHUNKS
            && let Some(chunk) = self.todo.pop_first()
        {
            self.window.extend(gaps.get(&chunk).map(|gaps| (chunk, *gaps)));
        }
        self.answers.clear();
        self.answered = ServerSet::default();
        (self.began, self.asked) = (now, Timestamp(0));
    }

    /// An answer came.
    fn take(&mut self, from: ServerId, masked: Masked) -> Recovery {
        let mut recovery = Recovery::default();
        let asked_for = masked.chunks.iter().map(|masked| &masked.chunk).eq(self.window.keys());
        if masked.attempt != self.attempt || from == self.id || self.window.is_empty() || !asked_for {
            return recovery;
        }
        let fits = |masked: &MaskedChunk| masked.values.len() == masked.filled.count_ones() as usize;
        if !masked.chunks.iter().all(fits) || !self.answered.insert(from) {
            return recovery;
        }
        for masked in masked.chunks {
            let mut values = Zeroizing::new(vec![0; CHUNK_BYTES]);
            let places = (0..CHUNK).filter(|place| masked.filled & (1 << place) != 0);
            for (place, value) in places.zip(&masked.values) {
                values[32 * place..32 * place + 32].copy_from_slice(value.expose());
            }
            let answer = Answer { filled: masked.filled, values };
            self.answers.entry(masked.chunk).or_default().insert(from, answer);
        }
        // Two answers of which one is a lie look like two of the truth where k+f−1 is 2: so all that may
        // come soon are waited for, and must not contradict each other.
        let all = self.helpers().all(|helper| self.answered.contains(helper) || self.slow.contains(helper));
        if all && self.answered.len() >= self.needed() {
            self.decode(&mut recovery);
        }
        recovery
    }

    /// Fills what the answers so far allow.
    fn decode(&mut self, recovery: &mut Recovery) {
        let mut wrong: BTreeMap<ServerId, usize> = BTreeMap::new();
        let chunks: Vec<_> = self.window.iter().map(|(chunk, gaps)| (*chunk, *gaps)).collect();
        // A vector of secrets that grows leaves copies behind.
        recovery.shares.reserve_exact(chunks.iter().map(|(_, gaps)| gaps.count_ones() as usize).sum());
        for (chunk, gaps) in chunks {
            let Some(answers) = self.answers.get(&chunk) else { continue };
            let mut open = gaps;
            let field = Field::of_chunk(chunk);
            if field == Field::Bytes {
                self.decode_together(chunk, answers, &mut open, recovery);
            }
            let rest = open;
            for place in (0..CHUNK).filter(|place| rest & (1 << place) != 0) {
                if let Some((share, liars)) = self.decode_one(answers, place, field) {
                    recovery.shares.push((chunk * CHUNK as u64 + place as u64, share));
                    open &= !(1 << place);
                    liars.iter().for_each(|liar| *wrong.entry(liar).or_default() += 1);
                }
            }
            match open {
                0 => self.window.remove(&chunk),
                _ => self.window.insert(chunk, open),
            };
        }
        for liar in wrong.keys() {
            self.suspects.insert(*liar);
        }
        recovery.wrong.extend(wrong);
    }

    /// Those of a chunk's gaps for which the answers that are not suspect agree, all at once.
    fn decode_together(
        &self,
        chunk: u64,
        answers: &BTreeMap<ServerId, Answer>,
        open: &mut u128,
        recovery: &mut Recovery,
    ) {
        let trusted: Vec<_> =
            answers.iter().filter(|(server, _)| !self.suspects.contains(**server)).collect();
        let k = self.thresholds.k();
        if trusted.len() < self.needed() || answers.len() - trusted.len() >= self.thresholds.f() {
            return;
        }
        let (base, others) = trusted.split_at(k);
        let points: Vec<u8> = base.iter().map(|(server, _)| server.share_index()).collect();
        let mut combination = Combination::new(CHUNK_BYTES);
        let mut at = |x: u8, out: &mut [u8]| {
            for (coefficient, (_, answer)) in gf256::lagrange(&points, x).into_iter().zip(base) {
                combination.add(coefficient, &answer.values);
            }
            combination.add_to(out);
        };
        let mut agreed = trusted.iter().fold(*open, |agreed, (_, answer)| agreed & answer.filled);
        let mut difference = Zeroizing::new(vec![0; CHUNK_BYTES]);
        for (server, answer) in others {
            difference.copy_from_slice(&answer.values);
            at(server.share_index(), &mut difference);
            let (places, _) = difference.as_chunks::<32>();
            for (place, difference) in places.iter().enumerate() {
                let same = difference.iter().fold(0, |or, byte| or | byte) == 0;
                agreed &= !(u128::from(!same) << place);
            }
        }
        let mut shares = Zeroizing::new(vec![0; CHUNK_BYTES]);
        at(self.id.share_index(), &mut shares);
        let (places, _) = shares.as_chunks::<32>();
        for (place, share) in places.iter().enumerate().filter(|(place, _)| agreed & (1 << place) != 0) {
            recovery.shares.push((chunk * CHUNK as u64 + place as u64, SecretBytes::new(share)));
        }
        *open &= !agreed;
    }

    /// One share, whatever some answers are, and who does not fit.
    fn decode_one(
        &self,
        answers: &BTreeMap<ServerId, Answer>,
        place: usize,
        field: Field,
    ) -> Option<(SecretBytes, ServerSet)> {
        let points: Vec<(ServerId, &[u8; 32])> = answers
            .iter()
            .filter(|(_, answer)| answer.filled & (1 << place) != 0)
            .map(|(server, answer)| {
                (*server, answer.values.as_chunks::<32>().0.get(place).expect("128 places"))
            })
            .collect();
        accept(&points, self.thresholds.k(), self.needed(), self.id.share_index(), field)
    }
}

/// The value at `x` of the one polynomial of degree below k that at least `needed` points lie on, and the
/// servers whose points do not; none if there is no such polynomial, or more than one.
fn accept(
    points: &[(ServerId, &[u8; 32])],
    k: usize,
    needed: usize,
    x: u8,
    field: Field,
) -> Option<(SecretBytes, ServerSet)> {
    if points.len() < needed || needed < k {
        return None;
    }
    // Any polynomial that `needed` points lie on has k of them among the first so many.
    let among = points.len() - needed + k;
    let mut found: Option<(SecretBytes, ServerSet)> = None;
    let mut subset: Vec<usize> = (0..k).collect();
    loop {
        let chosen: Vec<_> = subset.iter().map(|&i| (points[i].0.share_index(), points[i].1)).collect();
        let at = |x: u8| field.interpolate(&chosen, x);
        let misfits = points.iter().filter(|(s, value)| at(s.share_index()) != SecretBytes::new(value));
        let misfits: ServerSet = misfits.map(|(server, _)| *server).collect();
        if points.len() - misfits.len() >= needed {
            let value = at(x);
            match &found {
                Some((other, _)) if *other != value => return None,
                Some(_) => {}
                None => found = Some((value, misfits)),
            }
            // Another one would share fewer than k points with this, and have the misfits.
            if misfits.len() + k - 1 < needed {
                return found;
            }
        }
        let Some(at) = (0..k).rev().find(|&i| subset[i] < among - k + i) else { return found };
        subset[at] += 1;
        for i in at + 1..k {
            subset[i] = subset[i - 1] + 1;
        }
    }
}

#[cfg(test)]
mod tests;
