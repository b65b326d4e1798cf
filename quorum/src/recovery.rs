//! Getting back shares that a server has lost (design §7; Herzberg et al. 1995 §4).
//!
//! The other servers answer with their shares under masks that vanish at the one that recovers (see
//! [`refresh`](crate::refresh)). Some of them may lie, and this server counts as one of the f faulty ones
//! itself, so it accepts only a polynomial that at least k+f−1 answers fit, and only if no other one
//! does. Fewer are not enough: two liars can choose errors that vanish at two honest points, and so
//! outvote the truth. `verdict` says what answers amount to.

mod verdict;

use crate::ids::{AttemptId, Epoch, ServerId, ServerSet, Timestamp};
use crate::limits::{
    RECOVERY_BACKOFF, RECOVERY_CHUNKS, RECOVERY_PATIENCE_MS, RECOVERY_TURN, RECOVERY_WAIT_MS, RETRANSMIT_MS,
};
use crate::message::PeerMessage;
use crate::refresh::{CHUNK, CHUNK_BYTES};
use crate::shares::{MaskedChunk, ShareOp, ShareSet};
use crate::thresholds::Thresholds;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use verdict::{Found, Gaps, Judge};
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
    left: u64,
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
    /// What was recovered, to be put in place.
    pub recovered: Option<ShareOp>,
    /// Servers whose masked shares were wrong, and how many.
    pub wrong: Vec<(ServerId, usize)>,
    /// What is left, if a recovery has just ended.
    pub ended: Option<Left>,
}

/// Slots that a recovery leaves empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// For want of answers that agree.
    pub open: u64,
    /// Since their depositors dealt something that is no secret.
    pub excused: u64,
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

    /// Whether there is something to do that waits for nobody: [`tick`](Self::tick) does some of it.
    pub fn is_busy(&self) -> bool {
        self.recovering.as_ref().is_some_and(Recovering::is_busy)
    }

    /// Whether the replica should ask for a recovery: there are empty slots, and they are not those that
    /// the last one could not fill, which are asked for again after ever longer times. (A depositor who
    /// deals shares that lie on no polynomial makes such slots.)
    pub fn lacks_shares(&self, shares: &ShareSet) -> bool {
        let counts = shares.counts();
        let empty = counts.secrets - counts.shares;
        let again = self.ended.is_none_or(|ended| {
            let due = ended.epoch.0.saturating_add(1 << ended.times.min(RECOVERY_BACKOFF));
            empty > ended.left || shares.epoch().0 >= due
        });
        let granted = shares.recovering().filter(|(server, _)| *server == self.id);
        let tried =
            granted.is_none_or(|(_, attempt)| self.ended.is_some_and(|ended| ended.attempt == attempt));
        empty > 0 && tried && self.recovering.is_none() && (again || !shares.is_whole())
    }

    /// Time passed, or there was something to do.
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
        let mut kept = recovering.tick(now, shares);
        if let Some(done) = self.recovering.take_if(|recovering| recovering.is_done(shares)) {
            let Recovering { epoch, attempt, left, .. } = done;
            let all = left.open + left.excused;
            let times = self.ended.filter(|_| all > 0).map_or(0, |ended| ended.times + 1);
            self.ended = Some(Ended { epoch, attempt, left: all, times });
            kept.ended = Some(left);
        }
        kept
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
        self.recovering.as_mut().map(|recovering| recovering.take(from, masked)).unwrap_or_default()
    }
}

/// One server's recovery of its shares in one epoch.
struct Recovering {
    id: ServerId,
    epoch: Epoch,
    attempt: AttemptId,
    thresholds: Thresholds,
    judge: Judge,
    /// Chunks that have gaps and have not been tried yet.
    todo: BTreeSet<u64>,
    /// Those that are being recovered, with what is missing of them.
    window: BTreeMap<u64, Gaps>,
    /// Those of them that are to be looked at, now that there are answers.
    looking: BTreeSet<u64>,
    answers: BTreeMap<u64, BTreeMap<ServerId, Answer>>,
    answered: ServerSet,
    /// How many had answered when they were looked at last.
    looked_at: usize,
    /// Who had not answered when the last window was looked at: nobody waits for them again.
    slow: ServerSet,
    began: Timestamp,
    asked: Timestamp,
    /// The last slot that was handed out to be filled or excused.
    last: Option<u64>,
    left: Left,
}

/// One server's words about one chunk.
struct Answer {
    filled: u128,
    excused: u128,
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
            judge: Judge::new(id, thresholds),
            todo: shares.gaps().map(|(chunk, _)| chunk).collect(),
            window: BTreeMap::new(),
            looking: BTreeSet::new(),
            answers: BTreeMap::new(),
            answered: ServerSet::default(),
            looked_at: 0,
            slow: ServerSet::default(),
            began: Timestamp(0),
            asked: Timestamp(0),
            last: None,
            left: Left::default(),
        }
    }
    /// Whether there is nothing left to try, and what came out is in place.
    fn is_done(&self, shares: &ShareSet) -> bool {
        let in_place = self.last.is_none_or(|index| !shares.lacks(index));
        self.todo.is_empty() && self.window.is_empty() && in_place
    }
    fn is_busy(&self) -> bool {
        !self.looking.is_empty() || (self.window.is_empty() && !self.todo.is_empty())
    }

    /// Time passed: asks, asks again, looks at answers, gives up.
    fn tick(&mut self, now: Timestamp, shares: &ShareSet) -> Kept {
        let mut kept = Kept::default();
        let waited_ms = now.since_ms(self.began);
        let news = self.answered.len() >= self.judge.needed() && self.answered.len() > self.looked_at;
        if self.looking.is_empty() && waited_ms >= RECOVERY_WAIT_MS && news {
            self.slow = self.silent().collect();
            self.look_anew();
        }
        self.look(&mut kept);
        let nobody_left = self.silent().next().is_none();
        if self.looking.is_empty() && (waited_ms >= RECOVERY_PATIENCE_MS || nobody_left) {
            self.left.open += self.window.values().map(|gaps| u64::from(gaps.open.count_ones())).sum::<u64>();
            self.window.clear();
        }
        if self.window.is_empty() {
            self.next_window(now, shares);
        }
        if !self.window.is_empty() && now.since_ms(self.asked) >= RETRANSMIT_MS {
            self.asked = now;
            let ask = AskMasked { attempt: self.attempt, chunks: self.window.keys().copied().collect() };
            let asks = self.silent().map(|server| (server, PeerMessage::AskMasked(ask.clone())));
            kept.messages = asks.collect();
        }
        kept
    }

    fn helpers(&self) -> impl Iterator<Item = ServerId> + use<> {
        let (id, n) = (self.id, self.thresholds.n() as u8);
        (0..n).map(ServerId).filter(move |server| *server != id)
    }
    fn silent(&self) -> impl Iterator<Item = ServerId> + '_ {
        self.helpers().filter(|helper| !self.answered.contains(*helper))
    }

    fn next_window(&mut self, now: Timestamp, shares: &ShareSet) {
        let gaps: BTreeMap<u64, u128> = shares.gaps().collect();
        while self.window.len() < RECOVERY_CHUNKS
            && let Some(chunk) = self.todo.pop_first()
        {
            let open = gaps.get(&chunk).map(|open| (chunk, Gaps { open: *open, unseen: 0 }));
            self.window.extend(open);
        }
        self.answers.clear();
        self.answered = ServerSet::default();
        self.looked_at = 0;
        (self.began, self.asked) = (now, Timestamp(0));
    }

    /// An answer came.
    fn take(&mut self, from: ServerId, masked: Masked) -> Kept {
        let mut kept = Kept::default();
        // While some chunks of the window are looked at others are gone from it: what comes now is for the next question.
        let asked_for = masked.chunks.iter().map(|masked| &masked.chunk).eq(self.window.keys());
        if masked.attempt != self.attempt || from == self.id || self.window.is_empty() || !asked_for {
            return kept;
        }
        let fits = |masked: &MaskedChunk| masked.values.len() == masked.filled.count_ones() as usize;
        if !masked.chunks.iter().all(fits) || !self.answered.insert(from) {
            return kept;
        }
        for masked in masked.chunks {
            let mut values = Zeroizing::new(vec![0; CHUNK_BYTES]);
            let places = (0..CHUNK).filter(|place| masked.filled & (1 << place) != 0);
            for (place, value) in places.zip(&masked.values) {
                values[32 * place..32 * place + 32].copy_from_slice(value.expose());
            }
            let answer = Answer { filled: masked.filled, excused: masked.excused, values };
            self.answers.entry(masked.chunk).or_default().insert(from, answer);
        }
        // Two answers of which one is a lie look like two of the truth where k+f−1 is 2: so all that may
        // come soon are waited for, and must not contradict each other.
        let all = self.silent().all(|helper| self.slow.contains(helper));
        if all && self.answered.len() >= self.judge.needed() {
            self.look_anew();
            self.look(&mut kept);
        }
        kept
    }

    /// Has everything in the window looked at with the answers so far.
    fn look_anew(&mut self) {
        self.looked_at = self.answered.len();
        self.looking = self.window.keys().copied().collect();
        self.window.values_mut().for_each(|gaps| gaps.unseen = gaps.open);
    }

    /// Fills what the answers so far allow, as much as one turn has time for.
    fn look(&mut self, kept: &mut Kept) {
        let slots = self.looking.iter().filter_map(|chunk| self.window.get(chunk));
        let mut found = Found::with_room(slots.map(|gaps| gaps.open.count_ones() as usize).sum());
        let mut budget = RECOVERY_TURN;
        while budget > 0
            && let Some(chunk) = self.looking.first().copied()
        {
            if let (Some(gaps), Some(answers)) = (self.window.get_mut(&chunk), self.answers.get(&chunk)) {
                self.judge.look(chunk, answers, gaps, &mut found, &mut budget);
                if gaps.open & gaps.unseen != 0 {
                    break;
                }
                if gaps.open == 0 {
                    self.window.remove(&chunk);
                    self.answers.remove(&chunk);
                }
            }
            self.looking.pop_first();
        }
        let Found { shares, excused, wrong } = found;
        self.left.excused += excused.len() as u64;
        self.last = excused.last().or(shares.last().map(|(index, _)| index)).copied().or(self.last);
        kept.wrong.extend(wrong);
        if !shares.is_empty() || !excused.is_empty() {
            kept.recovered = Some(ShareOp::Recovered { epoch: self.epoch, shares, excused });
        }
    }
}

#[cfg(test)]
mod tests;
