//! What a replica wants to hear now, for the tasks that check messages: signatures cost more than anything else that
//! is done with a message, so what is of no use is dropped before they are checked (PBFT §5 checks in this
//! order too). Cheap questions first: from whom it is, when, whether it was asked for.
//!
//! Whatever it says is only as new as the replica's last step. So it errs on the side of wanting, and nothing
//! is dropped that nobody would say again.

use super::Replica;
use super::standing::Standing;
use crate::bytes::Hash;
use crate::codec::digest;
use crate::ids::{ClusterId, Sequence, ServerId, View};
use crate::limits::{PROPOSALS_AHEAD, WINDOW};
use crate::message::{NewView, PeerMessage};
use std::collections::{BTreeMap, BTreeSet};

/// See the module.
#[derive(Clone, Debug)]
pub struct Wants {
    cluster: ClusterId,
    servers: usize,
    view: View,
    active: bool,
    prepared: Sequence,
    executed: Sequence,
    certified: Sequence,
    complete: Sequence,
    uncertified_snapshot: Option<Sequence>,
    /// Proposals that it has agreed to in this view, and whether their primary was accused of another one.
    proposals: BTreeMap<Sequence, (Hash, bool)>,
    /// Batches whose commit proofs it has.
    committed: BTreeSet<Sequence>,
    /// Batches that it has asked for.
    batches: BTreeSet<Hash>,
    /// The view of the last view change that it holds of each server, and its digest.
    view_changes: BTreeMap<ServerId, (View, Hash)>,
    /// View changes that it has asked for.
    changes_wanted: BTreeSet<Hash>,
    /// The question that witnesses are to answer.
    boot: Option<u64>,
    /// Questions about parts of a state, and whom they were put to.
    parts: BTreeMap<ServerId, u64>,
}

impl Wants {
    /// Whether a message that came from `from` has to be checked. `begun` is the highest view that a checked
    /// new-view message on the same link [began](Self::begins): its proposals follow at once, when the replica may
    /// not have got that far.
    pub fn needs(&self, from: ServerId, begun: View, message: &PeerMessage) -> bool {
        match message {
            PeerMessage::PrePrepare(proposal, _) => {
                let slot = proposal.body.0;
                let primary = slot.view.primary(self.servers) == from && proposal.server == from;
                // A few more than it would take, since it may have gone on.
                let near = slot.sequence > self.executed
                    && slot.sequence.0 <= self.executed.0.saturating_add(2 * PROPOSALS_AHEAD);
                // A second one proves a lie, once.
                let known = self.proposals.get(&slot.sequence).filter(|_| slot.view == self.view);
                let new = known.is_none_or(|(digest, accused)| *digest != slot.digest && !accused);
                let current = slot.view == self.view && self.active;
                primary && near && new && (current || (slot.view >= self.view && slot.view == begun))
            }
            PeerMessage::Prepare(vote) => {
                let slot = vote.body.0;
                slot.view > self.view || slot.sequence > self.prepared
            }
            PeerMessage::Commit(vote) => vote.body.0.view > self.view || vote.body.0.sequence > self.executed,
            PeerMessage::Checkpoint(vote) => {
                let sequence = vote.body.sequence;
                sequence > self.certified || self.uncertified_snapshot.is_some_and(|first| sequence >= first)
            }
            PeerMessage::Held(held) => held.body.sequence > self.complete,
            PeerMessage::Certificate(certificate) => certificate.statement.sequence > self.certified,
            PeerMessage::Offer(certificate) => certificate.statement.sequence > self.executed,
            PeerMessage::Committed(proof, _) => {
                let sequence = proof.statement.0.sequence;
                let near = sequence.0 <= self.executed.0.saturating_add(2 * WINDOW);
                sequence > self.executed && near && !self.committed.contains(&sequence)
            }
            PeerMessage::Suspect(suspect) => suspect.body.view >= self.view,
            PeerMessage::ViewChange(change) => {
                let view = change.body.view;
                let known = self.view_changes.get(&from).map(|(view, _)| *view);
                // Of views that it is in, too: its author may ask what it promised.
                Some(view) > known || (Some(view) == known && self.waits_for(view))
            }
            PeerMessage::NewView(new_view, _) => self.waits_for(new_view.body.view),
            PeerMessage::FetchedViewChange(evidence) => {
                !self.changes_wanted.is_empty()
                    && self.changes_wanted.contains(&digest(&self.cluster, &evidence.0))
            }
            PeerMessage::Fetched(batch) => {
                !self.batches.is_empty() && self.batches.contains(&digest(&self.cluster, batch.as_ref()))
            }
            PeerMessage::Witness(witness) => self.boot == Some(witness.boot),
            PeerMessage::Parts(parts) => self.parts.get(&from) == Some(&parts.question),
            PeerMessage::Keys(_)
            | PeerMessage::Forward(_)
            | PeerMessage::Status(_)
            | PeerMessage::FetchViewChanges(_)
            | PeerMessage::Fetch(_)
            | PeerMessage::AskWitness(_)
            | PeerMessage::Membership(_)
            | PeerMessage::AskParts(_)
            | PeerMessage::Dealing(_)
            | PeerMessage::AskDealing(_)
            | PeerMessage::AskMasked(_)
            | PeerMessage::Masked(_) => true,
        }
    }

    /// Whether a checked new view begins at once, since the view changes that it names are here.
    pub fn begins(&self, new_view: &NewView) -> bool {
        let held = |(server, digest): &(ServerId, Hash)| {
            self.view_changes.get(server).is_some_and(|(_, held)| held == digest)
        };
        self.waits_for(new_view.view) && new_view.view_changes.iter().all(held)
    }

    /// Whether a view has not begun here.
    fn waits_for(&self, view: View) -> bool {
        view > self.view || (view == self.view && !self.active)
    }
}

impl Replica {
    /// What it wants to hear now.
    pub fn wants(&self) -> Wants {
        let executed = self.executed();
        let ahead = self.log.range(executed.next()..);
        let proposals = ahead.clone().filter_map(|(sequence, entry)| {
            let slot = entry.slot().or(entry.early_slot())?;
            Some((*sequence, (slot.digest, entry.accused)))
        });
        let committed = ahead.filter(|(_, entry)| entry.committed.is_some());
        Wants {
            cluster: self.cluster,
            servers: self.manifest.thresholds.n(),
            view: self.view,
            active: self.changing.active,
            prepared: self.prepared_through(),
            executed,
            certified: self.certified(),
            complete: self.completed(),
            uncertified_snapshot: self.uncertified_snapshot(),
            proposals: proposals.collect(),
            committed: committed.map(|(sequence, _)| *sequence).collect(),
            batches: self.changing.wanted.clone(),
            view_changes: self.changing.views_left().collect(),
            changes_wanted: self.changing.shown.wanted(),
            boot: match &self.standing {
                Standing::Estimating(estimation) => Some(estimation.boot()),
                _ => None,
            },
            parts: self.transferring.questions().collect(),
        }
    }
}

#[cfg(test)]
mod tests;
