//! Judging the primary by what clients see of it (Amir et al., "Prime", 2011; Clement et al., "Aardvark", 2009).
//!
//! PBFT's timer begins anew with every batch, so it says only that the primary does *something*. A backup asks for
//! more. Nothing that it goes by can be reset or stretched by the one that is judged:
//!
//! | the primary | is told by | and suspected if |
//! |---|---|---|
//! | passes a request over | batches with room for it, or that serve others twice before it | it goes on for [`PASSED_OVER_MS`] |
//! | is late | how long this server's own clients waited for a proposal | in [`BAD_SECONDS`] of the last [`JUDGED_SECONDS`] s a quarter of them waited for more than [`SLUGGISH_MS`] and twice what agreement takes |
//! | has a clock that lags | times of its proposals | in [`LAGGING_SECONDS`] of them every proposal came more than [`LAG_MS`] after its time |
//! | lets an attempt at an epoch fail | the log | it was the primary all the while |
//! | orders nothing at all | no batch | for a timeout with requests waiting, or three beats without |
//!
//! *Passed over.* A correct primary orders what it knows, first come, first served for each client, clients in turn
//! (`pool`). So a batch that is not full leaves out nothing that it knows, and before a client is served for the
//! second time every other one that waits is served. Load does not excuse a breach of either, and a flood of one
//! conspiring client does not hide it. What this server learnt from its own client it has told the primary, and
//! says again; what it learnt from another server it passes on itself and counts from then: otherwise one liar who
//! tells requests to backups only could have any primary suspected.
//!
//! *Enough is enough.* All limits double whenever this server has suspected a primary for how it serves and the view
//! has changed, and come back one by one: where every primary seems slow it is the network, and views must not change
//! without end. And as always it takes f+1 suspicions.

use super::effects::Target;
use super::{PeerMessage, Replica};
use crate::bytes::PublicKey;
use crate::ids::{AttemptId, Sequence, Timestamp};
use crate::limits::{
    AGREEMENT_MAX_MS, BAD_SECONDS, CENSORSHIP_TIMEOUT_MS, CLOCK_BOUND_MS, FORWARD_TO_ALL_MS, HEARTBEAT_MS,
    JUDGED_SECONDS, LAG_MS, LAGGING_SECONDS, LENIENCE_MAX, LENIENT_FOR_MS, MAX_BATCH_BYTES,
    MAX_BATCH_REQUESTS, MAX_PENDING, MAX_REQUEST_BYTES, PASSED_OVER_MS, RETRANSMIT_MS, SLUGGISH_MS,
    SUSPICION_LIFETIME_MS,
};
use crate::message::CheckedBatch;
use crate::state::Attempt;
use std::collections::{BTreeMap, BTreeSet};

/// Requests passed on to the primary at a time.
const PASSED_ON: usize = 256;
/// A batch of so many bytes has room for any request; with something to spare for what is around them.
const ROOMY_BYTES: usize = MAX_BATCH_BYTES - MAX_REQUEST_BYTES - 4_096;

/// What a backup has seen of the primary of its view.
#[derive(Clone)]
pub(super) struct Conduct {
    /// About how long it takes from a proposal to its execution here, in milliseconds.
    agreement_ms: u64,
    /// Clients that waited too long for their proposals, and others.
    late: Seconds<PublicKey>,
    /// Proposals with an old time, and others.
    lagging: Seconds<bool>,
    /// Clients that were served since the round began, and when that was: it ends when one is served again.
    round: BTreeSet<PublicKey>,
    round_began: Option<Timestamp>,
    /// When a request had been passed over for too long, last.
    unfair: Option<Timestamp>,
    /// The attempt at an epoch that is under way, whether it began under this primary, and whether q servers
    /// are ready.
    attempt: Option<(AttemptId, bool, bool)>,
    /// When one failed.
    failed: Option<Timestamp>,
    /// Whether this server suspects it for how it serves.
    suspected: bool,
    /// How often limits are doubled, and since when.
    lenience: (u32, Timestamp),
}

impl Default for Conduct {
    fn default() -> Self {
        Self {
            agreement_ms: 0,
            late: Seconds::new(4),
            lagging: Seconds::new(1),
            round: BTreeSet::new(),
            round_began: None,
            unfair: None,
            attempt: None,
            failed: None,
            suspected: false,
            lenience: Default::default(),
        }
    }
}

impl Conduct {
    /// A view begins, and with it another primary's time.
    pub(super) fn begin(&mut self, now: Timestamp) {
        let (mut lenience, agreement_ms) = (self.lenience, self.agreement_ms);
        if self.suspected {
            lenience = ((lenience.0 + 1).min(LENIENCE_MAX), now);
        }
        let attempt = self.attempt.map(|(id, _, ready)| (id, false, ready));
        *self = Self { agreement_ms, lenience, attempt, ..Self::default() };
    }
    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize + use<> {
        let seconds = (self.late.fingerprint(), self.lagging.fingerprint());
        let round = (self.round.clone(), self.round_began);
        let epochs = (self.attempt, self.failed);
        (self.agreement_ms, seconds, round, self.unfair, epochs, self.suspected, self.lenience)
    }
    /// A limit, with patience where that has proved too little.
    fn leniently(&self, limit_ms: u64) -> u64 {
        limit_ms << self.lenience.0
    }
    /// How long a request may wait for its proposal.
    fn late_after_ms(&self) -> u64 {
        self.leniently(SLUGGISH_MS + 2 * self.agreement_ms.min(AGREEMENT_MAX_MS))
    }
    /// Takes note of how long agreement took.
    fn note_agreement(&mut self, took_ms: u64) {
        self.agreement_ms = (7 * self.agreement_ms + took_ms.min(2 * AGREEMENT_MAX_MS)) / 8;
    }
    /// Whether the primary serves worse than it must.
    fn is_bad(&mut self, now: Timestamp) -> bool {
        let recent =
            |when: &Option<Timestamp>| when.is_some_and(|when| now.since_ms(when) <= SUSPICION_LIFETIME_MS);
        let slow = recent(&self.unfair) || self.late.bad(now) >= BAD_SECONDS;
        self.suspected |= slow;
        if slow {
            self.lenience.1 = now;
        } else if self.lenience.0 > 0 && now.since_ms(self.lenience.1) >= LENIENT_FOR_MS {
            self.lenience = (self.lenience.0 - 1, now);
        }
        slow || recent(&self.failed) || self.lagging.bad(now) >= LAGGING_SECONDS
    }
}

/// Which of the last seconds were bad: those in which many were treated badly, however many others were not
/// before or after.
#[derive(Clone)]
struct Seconds<K> {
    /// It takes one in so many.
    share: usize,
    current: u64,
    bad_now: BTreeSet<K>,
    all_now: BTreeSet<K>,
    bad: BTreeSet<u64>,
}

impl<K: Ord + Clone + serde::Serialize> Seconds<K> {
    fn new(share: usize) -> Self {
        let (bad_now, all_now) = (BTreeSet::new(), BTreeSet::new());
        Self { share, current: 0, bad_now, all_now, bad: BTreeSet::new() }
    }
    fn fingerprint(&self) -> impl serde::Serialize + use<K> {
        (self.current, self.bad_now.clone(), self.all_now.clone(), self.bad.clone())
    }
    fn turn_to(&mut self, now: Timestamp) {
        let second = now.0 / 1_000;
        if second != self.current {
            if !self.bad_now.is_empty() && self.bad_now.len() * self.share >= self.all_now.len() {
                self.bad.insert(self.current);
            }
            self.current = second;
            self.bad_now.clear();
            self.all_now.clear();
        }
        self.bad = self.bad.split_off(&(second.saturating_sub(JUDGED_SECONDS)));
    }
    /// One was treated badly, or well.
    fn note(&mut self, now: Timestamp, who: K, badly: bool) {
        self.turn_to(now);
        if badly {
            self.bad_now.insert(who.clone());
        }
        self.all_now.insert(who);
    }
    fn bad(&mut self, now: Timestamp) -> usize {
        self.turn_to(now);
        self.bad.len()
    }
}

impl Replica {
    /// A batch that the primary of this view proposed, and that was accepted at `accepted`, is about to be
    /// executed: whom does it serve, and whom does it leave waiting?
    pub(super) fn judge_batch(&mut self, now: Timestamp, accepted: Timestamp, batch: &CheckedBatch) {
        self.conduct.note_agreement(now.since_ms(accepted));
        let primary = self.primary();
        if primary == self.id || !self.changing.active || self.executed() < self.certified_anywhere {
            return;
        }
        let lags = accepted.since_ms(batch.time()) > LAG_MS;
        self.conduct.lagging.note(now, lags, lags);
        // When it was made, at the latest. One with an old time gains no more by that than clocks may differ.
        let made = accepted.min(batch.time().plus_ms(CLOCK_BOUND_MS));
        // Whether it would have held any other request.
        let room = batch.requests().len() < MAX_BATCH_REQUESTS && batch.bytes() <= ROOMY_BYTES;
        let late_ms = self.conduct.late_after_ms();

        let mut served: BTreeMap<PublicKey, Option<Timestamp>> = BTreeMap::new();
        let mut twice = false;
        for request in batch.requests() {
            let client = request.queue();
            twice |= served.contains_key(&client) || self.conduct.round.contains(&client);
            let newest = served.entry(client).or_default();
            let Some(waiting) = self.pool.waiting_of(request.id()) else { continue };
            waiting.taken = true;
            *newest = (*newest).max(waiting.told);
            if let Some(told) = waiting.told.filter(|_| waiting.own && room) {
                self.conduct.late.note(now, client, accepted.since_ms(told) > late_ms);
            }
        }
        let round_over = room || twice || self.conduct.round.len() > MAX_PENDING;
        let round_began = self.conduct.round_began.unwrap_or(self.entered);
        let passed_over_ms = self.conduct.leniently(PASSED_OVER_MS);
        let mut pass_on = Vec::new();
        for waiting in self.pool.waiting_mut().filter(|waiting| !waiting.taken) {
            let client = waiting.request.queue();
            let Some(told) = waiting.told else {
                if room && pass_on.len() < PASSED_ON {
                    pass_on.push(waiting.request.id());
                }
                continue;
            };
            // Before its client's own later ones; before anybody else is served twice; and where there is room.
            let before_later =
                served.get(&client).is_some_and(|newest| *newest > Some(told.plus_ms(SLUGGISH_MS)));
            let in_turn = round_over
                && told <= round_began
                && !served.contains_key(&client)
                && !self.conduct.round.contains(&client);
            if told > made || !(room || in_turn || before_later) {
                continue;
            }
            let since = *waiting.passed_over.get_or_insert(made);
            if made.since_ms(since) >= passed_over_ms {
                self.conduct.unfair = Some(now);
            }
            if waiting.own && made.since_ms(told) > late_ms {
                self.conduct.late.note(now, client, true);
            }
            let again = waiting.sent.is_none_or(|sent| now.since_ms(sent) >= FORWARD_TO_ALL_MS);
            if !waiting.own && again && pass_on.len() < PASSED_ON {
                pass_on.push(waiting.request.id());
            }
        }
        if round_over {
            self.conduct.round.clear();
            self.conduct.round_began = Some(made);
        }
        if !room {
            self.conduct.round.extend(served.into_keys());
        }
        self.pass_on(now, pass_on);
    }

    /// Tells the primary of requests that others told this server of.
    fn pass_on(&mut self, now: Timestamp, requests: Vec<crate::request::RequestId>) {
        let primary = self.primary();
        for id in requests {
            let Some(waiting) = self.pool.waiting_of(id) else { continue };
            waiting.told.get_or_insert(now);
            waiting.sent = Some(now);
            let request = Box::new(waiting.request.signed().clone());
            self.pending.send(Target::One(primary), PeerMessage::Forward(request));
        }
    }

    /// How far an attempt at an epoch is. One that comes to nothing while the primary was the same from its
    /// beginning is grounds to suspect it: steps of servers are small, and it may have kept them until they were
    /// worth nothing. Where q servers were ready and too few of them whole it is not to blame.
    pub(super) fn note_attempt(&mut self, now: Timestamp, attempt: &Attempt) {
        let ready = attempt.ready.len() >= self.quorum() || !attempt.renews;
        let known = self.conduct.attempt.filter(|(id, ..)| *id == attempt.id);
        let throughout = known.is_none_or(|(_, throughout, _)| throughout);
        let before = self.conduct.attempt.replace((attempt.id, throughout, ready));
        if let Some((id, true, false)) = before
            && id.epoch == attempt.id.epoch
            && id != attempt.id
        {
            self.conduct.failed = Some(now);
        }
    }

    /// Whether a backup finds that the primary of its view does not do its work.
    pub(super) fn finds_fault(&mut self, now: Timestamp, waited_ms: u64, timeout_ms: u64) -> bool {
        // Nothing has been executed for a while, or something waits although much is: does the primary know?
        let untold = self.pool.waiting_mut().filter(|waiting| waiting.told.is_none() && !waiting.own);
        let old = |received| now.since_ms(received) >= CENSORSHIP_TIMEOUT_MS / 2;
        let untold = untold.filter(|waiting| waited_ms >= 2 * RETRANSMIT_MS || old(waiting.received));
        let untold = untold.map(|waiting| waiting.request.id()).take(PASSED_ON).collect();
        self.pass_on(now, untold);

        let waits = |ms: u64, told_ms: u64| {
            let told = |told| now.since_ms(told) >= told_ms;
            self.pool.any(|waiting| now.since_ms(waiting.received) >= ms && waiting.told.is_some_and(told))
        };
        let starved = waited_ms >= timeout_ms && waits(timeout_ms, timeout_ms);
        // Longer than any load explains. Every new primary gets time of its own to serve it, or views would
        // change without end.
        let censored =
            waits(CENSORSHIP_TIMEOUT_MS.max(timeout_ms), (CENSORSHIP_TIMEOUT_MS / 2).max(timeout_ms));
        let idle = waited_ms >= timeout_ms.max(3 * HEARTBEAT_MS + CLOCK_BOUND_MS);
        // Time is part of the service: a primary that does not advance it lets certificates age.
        let stale = self.state.time() != Timestamp(0)
            && now.since_ms(self.state.time()) >= timeout_ms.max(3 * HEARTBEAT_MS + CLOCK_BOUND_MS)
            && waited_ms < timeout_ms
            && self.is_stale_since(now);
        starved || censored || idle || stale || self.conduct.is_bad(now)
    }

    /// Whether batches executed lately all carry an old time: the primary's clock stands still.
    fn is_stale_since(&self, now: Timestamp) -> bool {
        // What was carried into this view keeps its time: give the new primary a few beats.
        let carried = self.changing.last_expected().unwrap_or(Sequence(0));
        self.executed() > carried && now.since_ms(self.entered) >= 3 * HEARTBEAT_MS + 2 * CLOCK_BOUND_MS
    }
}

#[cfg(test)]
mod tests;
