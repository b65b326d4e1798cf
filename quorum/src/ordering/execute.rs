//! Execution in order, and the checkpoint vote after every batch (PBFT §4.2, §4.3; design §5).

use super::effects::Write;
use super::{OwnCheckpoint, Replica};
use crate::bytes::Blob;
use crate::limits::{FLUSH_BATCHES, WINDOW};
use crate::message::CheckedBatch;
use crate::refresh::Field;
use crate::request::Operation;
use crate::sealing::{OpeningKey, ShareContext};
use crate::shares::ShareOp;
use crate::state::{Event, layout};

impl Replica {
    /// Executes every batch that is committed and whose predecessors are executed.
    pub(super) fn execute_ready(&mut self) {
        let mut executed_any = false;
        if self.diverged {
            // Whatever it led to would be wrong too.
            return;
        }
        while let Some(entry) = self.log.get_mut(&self.state.sequence().next()) {
            // Who is right about the place is known only now: commits of another epoch than it lies in are void.
            if !entry.commits_count(self.state.attempt()) {
                break;
            }
            let Some(batch) = entry.batch.take() else { break };
            self.log_bytes += entry.bytes();
            let accepted = entry.accepted_at;
            if let Some(accepted) = accepted {
                self.judge_batch(self.now, accepted, &batch);
            }
            self.execute(&batch);
            executed_any = true;
        }
        if executed_any {
            self.certify();
        }
    }

    fn execute(&mut self, batch: &CheckedBatch) {
        let (before, epoch) = (self.state.time(), self.state.attempt());
        let executed = self.state.execute(batch);
        if self.state.attempt() != epoch {
            self.enter_epoch();
        }
        self.keep_snapshot(before, &executed);
        for (place, event) in &executed.events {
            self.on_event(batch, *place, event);
        }
        for request in batch.requests() {
            self.pool.remove(request.id());
        }
        let sequence = executed.checkpoint.sequence;
        self.next_sequence = self.next_sequence.max(sequence.next());
        let mut replied = std::mem::take(&mut self.replied_before);
        replied.extend(executed.replied);
        if self.ahead.as_ref().is_some_and(|ahead| ahead.statement.sequence > sequence) {
            // Catching up: q servers have certified a later batch, so nobody needs this vote.
            self.replied_before = replied;
            return;
        }
        let checkpoint = executed.checkpoint;
        let vote = self.vote_for(checkpoint);
        let own = OwnCheckpoint { checkpoint, vote, snapshot: executed.snapshot, replied };
        self.own_checkpoints.insert(sequence, own);
        if self.own_checkpoints.len() as u64 > WINDOW
            && let Some((_, oldest)) = self.own_checkpoints.pop_first()
            && let Some(mut next) = self.own_checkpoints.first_entry()
        {
            // A certificate of a later one serves as well.
            next.get_mut().replied.extend(oldest.replied);
        }
        if let Some(reached) = self.ahead.take_if(|ahead| ahead.statement.sequence <= sequence) {
            self.on_certificate(reached);
        }
    }

    /// Opens this server's share of a deposit, or erases one. A share that does not open leaves
    /// an empty slot: it hurts nobody but its depositor (design §6).
    fn on_event(&mut self, batch: &CheckedBatch, place: usize, event: &Event) {
        match event {
            Event::Erased { index } => self.change_shares(ShareOp::Erase { index: *index }),
            Event::Sealed(attempt) => self.on_sealed(attempt),
            Event::Deposited { index, id } => {
                let Some(Operation::Deposit(deposit)) =
                    batch.requests().get(place).map(|request| &request.request().operation)
                else {
                    return;
                };
                let context = ShareContext::of(deposit, self.id, id.client, id.sequence);
                self.store_share(*index, &context, &deposit.shares);
            }
        }
    }

    /// Opens this server's share among those of a deposit.
    pub(super) fn store_share(&mut self, index: u64, context: &ShareContext<'_>, shares: &[Blob]) {
        let opening = self.renewing.opening(context.epoch);
        let share = shares
            .get(self.id.index())
            .zip(opening)
            .and_then(|(sealed, opening)| context.open(&self.cluster, opening, sealed).ok())
            .filter(|share| Field::of(index).has(share));
        // If it does not open although it was sealed while this server's own key was on record, its depositor
        // is to blame; otherwise this server, which has lost that key.
        let known = layout::server_keys(self.state.map(), self.id).map(|keys| keys.sealing.statement.key);
        let own = self.renewing.opening(context.epoch).map(OpeningKey::public);
        let dealt =
            own.is_some() && own == known && shares.get(self.id.index()).is_some_and(|s| !s.is_empty());
        self.change_shares(ShareOp::Store { index, epoch: context.epoch, share, dealt });
    }

    /// Writes the certified state to disk: what changed since the last time. Not a later one: with its
    /// certificate it can be offered to others after a restart, and they may need it to be certified at all.
    pub(super) fn flush_certified(&mut self) {
        let (Some(certificate), Some(snapshot)) = (&self.certificate, &self.certified_snapshot) else {
            return;
        };
        let checkpoint = certificate.statement;
        if checkpoint.sequence.0 >= self.flushed.0 + FLUSH_BATCHES {
            self.flushed = checkpoint.sequence;
            let leaves = self.state.take_changes_until(snapshot);
            self.pending.write(Write::State { checkpoint, leaves });
        }
    }

    /// Writes the state that a replica begins with.
    pub(super) fn flush(&mut self) {
        let (checkpoint, _) = self.state.seal();
        self.flushed = checkpoint.sequence;
        self.pending.write(Write::State { checkpoint, leaves: self.state.take_changes() });
    }
}
