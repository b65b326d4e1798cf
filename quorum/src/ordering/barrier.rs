//! Where an epoch begins, ordering begins anew (design §7, *Old keys count for nothing after the seal*).
//!
//! Ordering within an epoch is one run of PBFT, whose voters are the keys that were certified for the attempt by
//! which it began. It orders the places from the last batch of the epoch before to the batch that seals the next
//! one. Its votes name that attempt, and only keys of it sign them ([`crate::signing::Statement`]); nothing of
//! the run before it counts but the state that it led to. That is how reconfigured state machines treat what the
//! old configuration said about later places (Lamport, Malkhi & Zhou, "Reconfiguring a state machine", 2010).
//!
//! Why that is safe: within one run at most f of the voters are faulty, and PBFT's argument holds. What a run says
//! about places after the batch that seals the next epoch is void. No correct server acts on it: it executes a
//! batch only after all before it, and by then it knows in which epoch the place lies. So two different batches
//! at one place would need two quorums of one run. Keys of other epochs, however many an adversary collected,
//! make none.
//!
//! Why it stays live: a batch that may seal an epoch is a *barrier*. A primary proposes nothing after one before
//! it has executed it, and a backup accepts nothing after one: so correct servers lose no votes at a seal. A
//! server that has not executed the sealing batch is shown it, with q commits, by those that have.

use super::Replica;
use crate::ids::Sequence;
use crate::message::{CheckedBatch, CheckedMessage, PrePrepare};
use crate::signing::Verified;

impl Replica {
    /// Whether what a peer says counts in the epoch that this replica is in. Votes of the next one are kept until it
    /// begins here. What is not said in an epoch, or is judged where it is used, passes.
    pub(super) fn counts(&mut self, message: &CheckedMessage) -> bool {
        let (said_in, early) = match message {
            CheckedMessage::PrePrepare(proposal, _) => (proposal.body().0.attempt, true),
            CheckedMessage::Prepare(vote) => (vote.body().0.attempt, true),
            CheckedMessage::Commit(vote) => (vote.body().0.attempt, true),
            CheckedMessage::Held(held) => (held.body().attempt, false),
            CheckedMessage::Suspect(suspect) => (suspect.body().attempt, false),
            CheckedMessage::ViewChange(change) => (change.body().attempt, false),
            _ => return true,
        };
        let current = self.state.attempt();
        // Its author has executed what this replica lacks.
        self.later_epoch_seen |= said_in.epoch > current.epoch;
        said_in == current || (early && said_in.epoch == current.epoch.next())
    }

    /// Whether a place can be voted for: everything before it is known, and no epoch begins on the way.
    pub(super) fn leads_to(&self, sequence: Sequence) -> bool {
        let first = self.executed().next();
        let known = self.log.range(first..sequence).take_while(|(_, entry)| entry.leads_on()).count() as u64;
        sequence.0.saturating_sub(first.0) == known
    }

    /// A proposal that came before what it follows, and can be judged now.
    pub(super) fn next_early(&mut self) -> Option<(Verified<PrePrepare>, CheckedBatch)> {
        let current = self.state.attempt();
        let mut sequence = self.executed().next();
        loop {
            let entry = self.log.get_mut(&sequence)?;
            if let Some(early) = entry.early.take_if(|(proposal, _)| proposal.body().0.attempt == current) {
                return Some(early);
            }
            if !entry.leads_on() {
                return None;
            }
            sequence = sequence.next();
        }
    }

    /// The executed state is of another epoch than before: what was said about later places is void.
    pub(super) fn enter_epoch(&mut self) {
        let (attempt, first) = (self.state.attempt(), self.executed().next());
        // What is on disk about these places names its epoch too: a start forgets it in the same way.
        self.log.range_mut(first..).for_each(|(_, entry)| entry.enter_epoch(attempt));
        self.later_epoch_seen = false;
        // At a start its own proposals of this epoch are there already.
        let accepted = self.log.range(first..).rfind(|(_, entry)| entry.slot().is_some());
        self.next_sequence = accepted.map_or(first, |(last, _)| last.next());
        self.pool.requeue();
        self.changing.enter_epoch(attempt, self.state.began());
    }
}
