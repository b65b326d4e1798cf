//! Requests come in; the primary puts them into batches; backups accept them (PBFT §4.1, §4.2).

use super::effects::{Accusation, Target, Write};
use super::log::LogEntry;
use super::{Replica, log};
use crate::ids::{Sequence, ServerId, Timestamp};
use crate::limits::{
    CLOCK_BOUND_MS, GATHER_MS, HEARTBEAT_MS, MAX_BATCH_BYTES, MAX_BATCH_REQUESTS, MAX_REQUEST_BYTES,
    PIPELINE, PROPOSALS_AHEAD, WINDOW,
};
use crate::message::{CheckedBatch, PeerMessage, PrePrepare, Prepare};
use crate::request::VerifiedRequest;
use crate::signing::Verified;
use std::sync::Arc;

/// Room for the envelope around a batch's requests.
const BATCH_ENVELOPE_BYTES: usize = 1024;
const _: () = assert!(MAX_REQUEST_BYTES + BATCH_ENVELOPE_BYTES <= MAX_BATCH_BYTES);

impl Replica {
    /// A request of this server's own client: it waits here and goes to the primary.
    pub(super) fn on_request(&mut self, now: Timestamp, request: VerifiedRequest) {
        let id = request.id();
        if let Some(reply) = self.state.reply(id) {
            // A retry (PBFT §4.1): the stored reply is shown once it is certified.
            self.announce_reply(id, reply.sequence);
            return;
        }
        let signed = request.signed().clone();
        if let Err(why) = self.pool.add(now, self.id, request) {
            self.pending.refuse(id, why);
            return;
        }
        let (active, primary) = (self.changing.active, self.primary());
        let Some(waiting) = self.pool.waiting_of(id).filter(|waiting| !waiting.own) else { return };
        (waiting.own, waiting.sent) = (true, Some(now));
        if primary != self.id {
            waiting.told.get_or_insert(now);
            let alone = !(active && self.may_vote()) && signed.request.operation.is_a_servers();
            let target = if alone { Target::All } else { Target::One(primary) };
            self.pending.send(target, PeerMessage::Forward(Box::new(signed)));
        }
    }

    /// A request that another server passes on.
    pub(super) fn on_forward(&mut self, now: Timestamp, from: ServerId, request: VerifiedRequest) {
        let known = crate::state::admit(
            self.state.map(),
            self.state.membership(),
            self.state.time(),
            request.request(),
        );
        if known.is_ok() && self.state.reply(request.id()).is_none() {
            // A full pool refuses: the client's own server tells her.
            let _ = self.pool.add(now, from, request);
        }
    }

    /// As primary: proposes what waits, while the pipeline has room; with nothing waiting, an
    /// empty batch once a second keeps certificates fresh.
    pub(super) fn propose(&mut self, now: Timestamp) {
        if self.primary() != self.id || !self.may_vote() || !self.changing.active {
            return;
        }
        loop {
            let in_flight = self.next_sequence.0.saturating_sub(self.executed().0 + 1);
            let room = in_flight < PIPELINE && self.next_sequence.0 <= self.certified().0 + WINDOW;
            // Where an epoch may begin with what is under way, the next place lies in another one perhaps.
            if !room || !self.leads_to(self.next_sequence) {
                return;
            }
            if let Some(batch) = self.changing.carried.remove(&self.next_sequence) {
                // What the new view calls for keeps its time.
                self.propose_at_next(batch);
                continue;
            }
            let beat = in_flight == 0 && now.since_ms(self.last_proposed) >= HEARTBEAT_MS;
            let gathered = in_flight == 0
                || self.pool.unproposed() >= MAX_BATCH_REQUESTS
                || now.since_ms(self.last_proposed) >= GATHER_MS;
            let due = beat || (gathered && self.pool.has_unproposed());
            if !due {
                return;
            }
            let requests = self.pool.take(MAX_BATCH_BYTES - BATCH_ENVELOPE_BYTES);
            if requests.is_empty() && !beat {
                return;
            }
            // Agreed time (design §3): the clock, and never backwards.
            let time = now.max(self.last_proposed).max(self.state.time());
            self.last_proposed = time;
            self.propose_at_next(CheckedBatch::new(&self.cluster, time, requests));
        }
    }

    fn propose_at_next(&mut self, batch: CheckedBatch) {
        let sequence = self.next_sequence;
        self.next_sequence = sequence.next();
        let slot = log::slot(self.view, self.state.attempt(), sequence, &batch);
        let proposal = self.voter.sign(PrePrepare(slot));
        self.accept(sequence, proposal, batch);
    }

    /// A proposal from the primary. Conditions as in PBFT §4.2, and design §3's on time.
    pub(super) fn on_pre_prepare(
        &mut self,
        now: Timestamp,
        proposal: Verified<PrePrepare>,
        batch: CheckedBatch,
    ) {
        let slot = proposal.body().0;
        let server = proposal.server();
        self.changing.later_view_seen |= slot.view > self.view;
        if slot.view != self.view
            || !self.changing.active
            || server != self.primary()
            || server == self.id
            || !self.in_window(slot.sequence)
            || !self.may_vote()
        {
            return;
        }
        if slot.sequence.0 > self.executed().0 + PROPOSALS_AHEAD {
            return;
        }
        let known = self.log.get(&slot.sequence).and_then(|entry| entry.slot().or(entry.early_slot()));
        if let Some(known) = known {
            // What a primary said in another epoch is void, and contradicts nothing.
            if known != slot && known.attempt == slot.attempt {
                let accusation =
                    Accusation::Equivocation { server, sequence: slot.sequence, phase: "pre-prepare" };
                self.pending.accuse(accusation);
                if let Some(entry) = self.log.get_mut(&slot.sequence) {
                    entry.accused = true;
                }
            }
            return;
        }
        // A time that lies back is harmless: execution never lets agreed time go backwards, and an
        // old certificate is the client's to refuse. It occurs when a primary repeats a proposal
        // from before an outage, which must not be stuck (docs/decisions/0006-agreed-time.md).
        // Nor is a time refused that view changes have carried over (design §3).
        let now_here = slot.attempt == self.state.attempt();
        if now_here && !self.fits_plan(slot.sequence, slot.digest) {
            return;
        }
        if !now_here || !self.leads_to(slot.sequence) {
            self.log.entry(slot.sequence).or_default().early = Some((proposal, batch));
            return;
        }
        let carried = self.changing.expected(slot.sequence).is_some();
        // Nor one that others had agreed on before: this server's own clock is the odd one then.
        let previous = self.log.get(&Sequence(slot.sequence.0 - 1)).and_then(LogEntry::time);
        let agreed = self.state.time().max(previous.unwrap_or_default());
        if !carried && batch.time() > agreed && batch.time().since_ms(now) > CLOCK_BOUND_MS {
            let why = "its time is more than a second ahead of this server's clock";
            self.pending.accuse(Accusation::BadProposal { server, sequence: slot.sequence, why });
            return;
        }
        self.accept(slot.sequence, proposal, batch);
        if let Some(entry) = self.log.get_mut(&slot.sequence).filter(|_| !carried) {
            entry.accepted_at = Some(now);
        }
    }

    /// Binds this replica to a proposal: written before any vote for it leaves.
    pub(super) fn accept(&mut self, sequence: Sequence, proposal: Verified<PrePrepare>, batch: CheckedBatch) {
        let slot = proposal.body().0;
        let wire = Arc::new(batch.to_batch());
        let proposal = proposal.signed().clone();
        self.pending.write(Write::Accepted { pre_prepare: proposal.clone(), batch: Arc::clone(&wire) });
        let entry = self.log.entry(sequence).or_default();
        if entry.committed.is_none() {
            entry.set_batch(batch, Arc::clone(&wire));
        }
        if proposal.server == self.id {
            self.pending.send(Target::All, PeerMessage::PrePrepare(proposal.clone(), wire));
        }
        let vote = self.voter.sign(Prepare(slot));
        self.pending.send_all(&vote, PeerMessage::Prepare);
        // Its own first vote: nothing can contradict it.
        let _ = entry.prepares.add(vote.clone());
        entry.own_prepare = Some(vote);
        entry.pre_prepare = Some(proposal);
        self.advance(sequence);
    }
}
