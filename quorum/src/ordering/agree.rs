//! Prepare and commit: q servers agree on a batch, and q servers know that (PBFT §4.2).

use super::Replica;
use super::effects::{Accusation, Write};
use crate::certificate::QuorumProof;
use crate::ids::{Sequence, ServerId, View};
use crate::limits::KEYS_SHOWN;
use crate::message::{Commit, PeerMessage, Prepare};
use crate::signing::{KeyCertificate, Verified};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Under which keys the others' prepares were counted, and for which place last. A view change shows the
/// certificates of all of them above the last certificate: a server that draws keys without end must not make that
/// too large to be sent. A correct one draws one at each start.
#[derive(Clone, Default)]
pub(super) struct KeysHeard(BTreeMap<ServerId, BTreeMap<KeyCertificate, Sequence>>);

impl KeysHeard {
    /// Whether a prepare under this key counts.
    fn admits(&mut self, key: &KeyCertificate, sequence: Sequence, certified: Sequence) -> bool {
        let of_server = self.0.entry(key.statement.server).or_default();
        of_server.retain(|_, last| *last > certified);
        if of_server.len() >= KEYS_SHOWN && !of_server.contains_key(key) {
            return false;
        }
        let last = of_server.entry(*key).or_insert(sequence);
        *last = sequence.max(*last);
        true
    }
    /// A proof from this server's own database.
    pub(super) fn restore(&mut self, proof: &QuorumProof<Prepare>) {
        for key in &proof.keys {
            self.admits(key, proof.statement.0.sequence, Sequence(0));
        }
    }
}

impl Replica {
    /// Votes count in the view that this replica takes part in.
    fn votes_count(&mut self, view: View) -> bool {
        self.changing.later_view_seen |= view > self.view;
        view == self.view && self.changing.active
    }

    pub(super) fn on_prepare(&mut self, vote: Verified<Prepare>) {
        let (slot, server) = (vote.body().0, vote.server());
        self.witnessed.prepare(&vote);
        if !self.votes_count(slot.view) || !self.in_window(slot.sequence) {
            return;
        }
        if !self.keys_heard.admits(vote.key(), slot.sequence, self.certified()) {
            return;
        }
        if self.log.entry(slot.sequence).or_default().prepares.add(vote).is_err() {
            self.pending.accuse(Accusation::Equivocation {
                server,
                sequence: slot.sequence,
                phase: "prepare",
            });
        }
        self.advance(slot.sequence);
    }

    pub(super) fn on_commit(&mut self, vote: Verified<Commit>) {
        let (slot, server) = (vote.body().0, vote.server());
        self.witnessed.commit(&vote);
        if !self.votes_count(slot.view) || !self.in_window(slot.sequence) {
            return;
        }
        if self.log.entry(slot.sequence).or_default().commits.add(vote).is_err() {
            self.pending.accuse(Accusation::Equivocation {
                server,
                sequence: slot.sequence,
                phase: "commit",
            });
        }
        self.advance(slot.sequence);
    }

    /// Casts the votes that waited for a key of this epoch: only a server that started has any.
    pub(super) fn vote_where_missing(&mut self) {
        if !self.may_vote() || !self.changing.active {
            return;
        }
        let (attempt, first) = (self.state.attempt(), self.executed().next());
        let mut votes = Vec::new();
        for (_, entry) in self.log.range_mut(first..) {
            let Some(slot) = entry.slot().filter(|slot| slot.attempt == attempt) else { continue };
            if entry.own_prepare.is_none() {
                let vote = self.voter.sign(Prepare(slot));
                let _ = entry.prepares.add(vote.clone());
                entry.own_prepare = Some(vote.clone());
                votes.push((slot.sequence, vote));
            }
        }
        for (sequence, vote) in votes {
            self.pending.send_all(&vote, PeerMessage::Prepare);
            self.advance(sequence);
        }
    }

    /// Takes whatever step the votes for a sequence number allow.
    pub(super) fn advance(&mut self, sequence: Sequence) {
        let (quorum, may_vote) = (self.quorum(), self.may_vote());
        let Some(entry) = self.log.get_mut(&sequence) else { return };
        if may_vote
            && entry.own_commit.is_none()
            && let (Some(slot), Some(proof), Some(batch)) = (
                entry.slot(),
                entry.prepared_now(quorum),
                entry.proposal().map(|(_, batch)| Arc::clone(batch)),
            )
        {
            // What a commit promises: this batch is prepared here. A new view must find it, so the
            // proof is durable before the commit leaves (PBFT §4.4).
            entry.prepared = Some((proof.clone(), batch));
            self.pending.write(Write::Prepared { sequence, proof });
            let vote = self.voter.sign(Commit(slot));
            self.pending.send_all(&vote, PeerMessage::Commit);
            let _ = entry.commits.add(vote.clone());
            entry.own_commit = Some(vote);
        }
        // q commits prove by themselves that the batch is ordered: two quorums share an honest
        // server, which commits to one batch at a sequence number.
        if entry.committed.is_none()
            && let (Some(proof), true) = (entry.committed_now(quorum), entry.proposal().is_some())
        {
            // It promises nothing yet: q servers hold the proof that it is prepared. It is durable, with
            // the certificate, before this server says that it holds the batch.
            self.pending.write_along(Write::Committed { batch: None, proof: proof.clone() });
            entry.committed = Some(proof);
            self.execute_ready();
        }
    }
}
