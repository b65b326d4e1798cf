//! Certificates, Held statements, and what can be forgotten (PBFT §4.3, design §2 and §5).

use super::Replica;
use super::effects::{Accusation, Published, Write};
use crate::certificate::{Certificate, Checkpoint, Held};
use crate::evidence::Evidence;
use crate::ids::Sequence;
use crate::limits::{LOG_TAIL_BYTES, WINDOW};
use crate::message::PeerMessage;
use crate::request::RequestId;
use crate::signing::{Statement as _, Verified};
use std::sync::Arc;

impl Replica {
    pub(super) fn on_checkpoint(&mut self, vote: Verified<Checkpoint>) {
        let (sequence, server) = (vote.body().sequence, vote.server());
        self.boundary_vote(&vote);
        if sequence <= self.certified() || sequence.0 > self.certified().0 + WINDOW {
            return;
        }
        let book = self.checkpoints.entry(sequence).or_default();
        if let Err(second) = book.add(vote) {
            let first = book.of(server).expect("a second vote has a first");
            let keys = vec![*first.key(), *second.key()];
            let (first, second) = (first.signed().clone(), second.signed().clone());
            self.pending.evidence(Evidence::Votes { first, second, keys });
            self.pending.accuse(Accusation::Equivocation { server, sequence, phase: "checkpoint" });
        }
        self.certify();
    }

    /// A certificate from a peer, for a server that missed the votes.
    pub(super) fn on_certificate(&mut self, certificate: Certificate) {
        let sequence = certificate.statement.sequence;
        self.note_certified(sequence);
        if sequence > self.certified() && self.own_checkpoints.contains_key(&sequence) {
            self.adopt(certificate);
        } else if sequence > self.executed()
            && self.ahead.as_ref().is_none_or(|ahead| ahead.statement.sequence <= self.executed())
        {
            // Kept until it is reached, and not exchanged for later ones that run away.
            self.ahead = Some(certificate);
        }
    }

    /// Makes a certificate of the highest executed batch that q votes agree on.
    pub(super) fn certify(&mut self) {
        let quorum = self.quorum();
        let certificate = self.own_checkpoints.iter().rev().find_map(|(sequence, own)| {
            let book = self.checkpoints.get(sequence)?;
            book.proof(&own.checkpoint, quorum).or_else(|| {
                // q servers may agree on something else: then this replica is the one that is wrong.
                let mut others = book.dissenters(&own.checkpoint);
                others.find_map(|server| book.proof(book.of(server)?.body(), quorum))
            })
        });
        if let Some(certificate) = certificate {
            self.adopt(certificate);
        }
    }

    /// Takes over a certificate of a batch that this replica has executed.
    fn adopt(&mut self, certificate: Certificate) {
        let statement = certificate.statement;
        let sequence = statement.sequence;
        let own = self.own_checkpoints.get(&sequence).expect("callers look up the own checkpoint");
        if own.checkpoint != statement {
            self.diverged = true;
            self.pending.accuse(Accusation::Diverged { sequence });
            return;
        }
        if let Some(book) = self.checkpoints.get(&sequence) {
            for server in book.dissenters(&statement) {
                let vote = book.of(server).expect("a dissenter has voted");
                if vote.body().attempt() != statement.attempt() {
                    // Under a key of another epoch: that need not have been the server.
                    continue;
                }
                let (vote, key) = vote.stored();
                let certificate = Box::new(certificate.clone());
                self.pending.evidence(Evidence::Dissent { certificate, vote, key });
                self.pending.accuse(Accusation::WrongState { server, sequence });
            }
        }
        let before = self.certified();
        let certificate = Arc::new(certificate);
        self.pending.write(Write::Certified(Arc::clone(&certificate)));
        self.certificate = Some(certificate);
        self.certified_snapshot = Some(own.snapshot.clone());
        self.note_certified(sequence);

        let later = self.own_checkpoints.split_off(&sequence.next());
        for (_, done) in std::mem::replace(&mut self.own_checkpoints, later) {
            self.tell_clients(done.replied);
        }
        self.checkpoints = self.checkpoints.split_off(&sequence.next());

        // Executed and certified; the writes above are durable before this leaves (design §2).
        self.hold(sequence);
        self.update_completion();
        self.publish();
        if self.offered().is_none() {
            self.keep_certified();
        }
        self.flush_certified();
        self.collect_garbage(before);
    }

    /// Says that everything up to here is held, in the epoch that this replica is in; later if it has no key of it.
    pub(super) fn hold(&mut self, sequence: Sequence) {
        let attempt = self.state.attempt();
        self.own_held =
            (self.voter.attempt() == attempt).then(|| self.voter.sign(Held { sequence, attempt }));
        if let Some(held) = self.own_held.clone() {
            self.promise(&held, PeerMessage::Held);
            self.completion.add(held);
        }
    }

    pub(super) fn on_held(&mut self, held: Verified<Held>) {
        // Nobody is believed about sequence numbers that are not shown to exist.
        if held.body().sequence.0 <= self.certified().0 + WINDOW && self.completion.add(held) {
            self.update_completion();
        }
    }

    pub(super) fn update_completion(&mut self) {
        let known = self.published_completion.as_ref().map_or(Sequence(0), |completion| completion.sequence);
        if let Some(completion) = self.completion.completion()
            && completion.sequence > known
        {
            self.published_completion = Some(Arc::new(completion));
            self.publish();
        }
    }

    /// Shows readers the certified state.
    pub(super) fn publish(&mut self) {
        if !self.shows_readers() {
            return;
        }
        if let (Some(certificate), Some(snapshot)) = (&self.certificate, &self.certified_snapshot) {
            self.pending.publish(Published {
                snapshot: snapshot.clone(),
                certificate: Arc::clone(certificate),
                completion: self.published_completion.clone(),
                view: self.view,
                executed: self.state.sequence(),
            });
        }
    }

    /// Wakes clients of this server, if it may show them the state that their replies are in.
    pub(super) fn tell_clients(&mut self, replied: impl IntoIterator<Item = RequestId>) {
        if self.shows_readers() {
            self.pending.replied(replied);
        }
    }

    /// A retry of a request that executed: its client is answered now, or when the state that holds
    /// the reply is certified.
    pub(super) fn announce_reply(&mut self, id: RequestId, executed_at: Sequence) {
        if executed_at <= self.certified() && self.certified_snapshot.is_some() {
            self.tell_clients([id]);
        } else if let Some((_, own)) = self.own_checkpoints.range_mut(executed_at..).next()
            && !own.replied.contains(&id)
        {
            own.replied.push(id);
        } else if executed_at > self.certified() && !self.replied_before.contains(&id) {
            self.replied_before.push(id);
        }
    }

    /// Certified batches stay as a bounded tail for servers that fell behind; votes go (PBFT §4.3).
    fn collect_garbage(&mut self, before: Sequence) {
        let certified = self.certified();
        let offered = self.offered();
        for (_, entry) in self.log.range_mut(before.next()..=certified) {
            entry.strip();
        }
        let mut trimmed = None;
        while let Some(first) = self.log.first_entry() {
            let sequence = *first.key();
            let too_many = sequence.0 + self.log_tail <= certified.0 || self.log_bytes > LOG_TAIL_BYTES;
            // What is not in the stored state yet is needed to start again; what follows the last state that
            // can be offered, by whoever is offered that.
            let needed = sequence > self.flushed || offered.is_some_and(|offered| sequence > offered);
            if !too_many || needed || sequence >= certified {
                break;
            }
            self.log_bytes = self.log_bytes.saturating_sub(first.get().bytes());
            first.remove();
            trimmed = Some(sequence);
        }
        if let Some(through) = trimmed {
            self.pending.write(Write::Trim { through });
        }
    }
}
