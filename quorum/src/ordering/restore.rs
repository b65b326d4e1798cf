//! Starting again from what is durable (design §3).
//!
//! The database holds a state, some batches after it with their commit proofs, and the proposals
//! that this server has voted for. Executing the batches again gives the state that it had; the
//! votes are restored, so that it never contradicts one that left.

use super::agree::KeysHeard;
use super::budget::Budgets;
use super::catch_up::Progress;
use super::effects::{Accusation, Pending, VaultKey, Write};
use super::judge::Conduct;
use super::log::LogEntry;
use super::new_view::Beginning;
use super::pool::RequestPool;
use super::renew::Renewing;
use super::standing::{Amnesia, Estimation, Memory, Standing, Witnessed};
use super::transfer::Transferring;
use super::view_change::Changing;
use super::{Identity, Replica};
use crate::bytes::SecretBlob;
use crate::certificate::{Certificate, Checkpoint, CompletionTracker, QuorumProof};
use crate::ids::{Epoch, Sequence, Timestamp, View};
use crate::manifest::Manifest;
use crate::map::Map;
use crate::membership::{ChangeProof, Membership};
use crate::message::{
    Batch, CheckedBatch, CheckedViewChange, Commit, Evidence, NewView, PrePrepare, Prepare, ViewChange,
};
use crate::request::Operation;
use crate::shares::ShareOp;
use crate::signer::Counter;
use crate::signing::{KeyCertificate, Keyring, Signed, Statement as _};
use crate::state::{RestoreError, State, layout};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a server finds in its database.
#[derive(Default)]
pub struct Stored {
    /// The state written last; none on a new disk.
    pub state: Option<StoredState>,
    /// The log, in ascending order of sequence numbers.
    pub slots: Vec<StoredSlot>,
    /// The last certificate.
    pub certificate: Option<Certificate>,
    /// The view; none in view 0.
    pub view: Option<StoredView>,
    /// The server has voted before and does not remember its votes.
    pub amnesia: Option<Amnesia>,
    /// The database is certainly not the one that this server used last: it was lost, or is an older copy. Not in the
    /// database.
    pub forgot: bool,
    /// The number of the last voting key that the signer was asked for.
    pub voting_key: u64,
    /// The last epoch that the signer has certified a voting key for, as it says, if it remembers; not in the
    /// database.
    pub voted_in: Option<Epoch>,
    /// Something is missing of the shares or of what happened to them.
    pub shares_damaged: bool,
    /// What has to stay secret.
    pub vault: Vec<(VaultKey, SecretBlob)>,
    /// Something stored does not decode.
    pub damaged: bool,
}

/// The view that this server promised not to go back from, and how it began.
#[derive(Clone)]
pub struct StoredView {
    /// The view.
    pub view: View,
    /// How it began; none if it had not begun here.
    pub began: Option<StoredBeginning>,
}

/// How a view began: what a server goes on from, and shows to those that missed it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredBeginning {
    /// The new-view message, and the certificate of the key that signed it.
    pub new_view: (Signed<NewView>, KeyCertificate),
    /// The view changes that it names; none where it is of an epoch that is over.
    pub view_changes: Vec<Arc<Evidence<ViewChange>>>,
}

/// The state as it was written last.
pub struct StoredState {
    /// Where it was written, and its root.
    pub checkpoint: Checkpoint,
    /// All entries.
    pub leaves: Vec<(Vec<u8>, Vec<u8>)>,
}

/// One sequence number of the stored log.
pub struct StoredSlot {
    /// Where.
    pub sequence: Sequence,
    /// The proposal that was accepted, and its batch.
    pub accepted: Option<(Signed<PrePrepare>, Batch)>,
    /// The votes by which a batch was prepared here, and the batch if it is not the accepted one.
    pub prepared: Option<(QuorumProof<Prepare>, Option<Batch>)>,
    /// q commits, and the batch that they name if it is not the accepted one.
    pub committed: Option<(QuorumProof<Commit>, Option<Batch>)>,
}

/// Why a server cannot go on from its database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// A row that does not decode.
    #[error("a row cannot be read")]
    Row,
    /// The state.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// A batch whose digest is not the one that was voted for.
    #[error("batch {0} is not what was voted for")]
    Batch(Sequence),
    /// The message that began the view.
    #[error("the beginning of view {0} cannot be checked")]
    View(View),
    /// What execution leads to is not what was certified.
    #[error("the state at sequence number {0} is not the certified one")]
    NotCertified(Sequence),
}

impl Stored {
    /// Compares what is stored with what the signer remembers: a voting key that it has certified since is one that
    /// this database knows no votes of. `since` is the epoch in which this server's identity took another one's
    /// place. Says what is to be durable before the signer is asked for the key of this start.
    pub fn begin(&mut self, signer: &Counter, since: Epoch) -> Vec<Write> {
        self.voted_in = (signer.voting > 0).then_some(signer.voted_in.epoch);
        if self.forgot || signer.voting > self.voting_key {
            self.amnesia = Some(Amnesia::of(self.voted_in));
        } else if self.voting_key == 0 && since > Epoch(0) {
            // What the identity before it signed it does not know.
            self.amnesia = Some(Amnesia { through: Epoch(since.0 - 1), settled: true });
        }
        self.voting_key = self.voting_key.max(signer.voting) + 1;
        vec![Write::VotingKey(self.voting_key), Write::Amnesia(self.amnesia)]
    }

    /// Who the servers are, as far as what is stored shows; believed for its proofs alone.
    pub fn membership(&self, manifest: &Arc<Manifest>) -> Option<Arc<Membership>> {
        let leaves = self.state.iter().flat_map(|state| &state.leaves);
        let mut proofs: Vec<_> = leaves.filter(|(key, _)| key.starts_with(layout::CHANGE_PROOFS)).collect();
        proofs.sort();
        let proofs =
            proofs.into_iter().map(|(_, value)| crate::codec::decode::<ChangeProof>(value).map(Arc::new));
        let proofs = proofs.collect::<Result<Vec<_>, _>>().ok()?;
        Membership::genesis(Arc::clone(manifest)).follow(proofs).ok()
    }
}

/// Who the servers are as far as the stored log shows, which is executed later: the view may have begun under keys of
/// a server that took another one's place meanwhile. What does not hold is passed over.
fn shown_in_log(membership: &Arc<Membership>, slots: &[StoredSlot]) -> Arc<Membership> {
    let batches = slots.iter().flat_map(|slot| {
        let accepted = slot.accepted.as_ref().map(|(_, batch)| batch);
        slot.committed.as_ref().and_then(|(_, batch)| batch.as_ref()).or(accepted)
    });
    let proofs =
        batches.flat_map(|batch| &batch.requests).filter_map(|request| match &request.request.operation {
            Operation::Attest { proof, .. } => Some(Arc::new(proof.as_ref().clone())),
            _ => None,
        });
    proofs.fold(Arc::clone(membership), |known, proof| known.follow([proof]).unwrap_or(known))
}

impl Replica {
    /// A replica that goes on from what is stored, or begins at genesis. If what is stored is
    /// damaged it says so, and fetches what differs from the others.
    pub fn start(identity: Identity, stored: Stored) -> Self {
        let Stored {
            state, slots, certificate, view, amnesia, voted_in, shares_damaged, vault, damaged, ..
        } = stored;
        let remembers = (amnesia, voted_in);
        let cluster = *identity.membership.cluster();
        let (at, leaves) = state.map(|state| (state.checkpoint, state.leaves)).unzip();
        let mut map = Map::from_entries(cluster, leaves.unwrap_or_default());
        let entries = map.seal();
        let resumed = match damaged {
            true => Err(Damage::Row),
            false => {
                let resumed = (slots, certificate, view.clone());
                Self::resume(identity.clone(), at, map, resumed, remembers, vault.clone())
            }
        };
        let mut replica = resumed.unwrap_or_else(|damage| {
            let state = State::genesis(Arc::clone(identity.membership.manifest()));
            let amnesia = amnesia.unwrap_or(Amnesia::of(voted_in));
            let mut replica = Self::new(identity, state, BTreeMap::new(), (Some(amnesia), voted_in), vault);
            replica.pending.accuse(Accusation::Damaged(damage));
            replica.pending.write(Write::Amnesia(Some(amnesia)));
            replica.pending.write(Write::Reset);
            replica.flush();
            // Its view is a promise of its own; how that began is not needed.
            if let Some(StoredView { view, .. }) = view {
                replica.view = view;
                replica.changing.active = false;
            }
            replica.transferring.base = Some(entries);
            replica
        });
        if shares_damaged {
            // The state says which secrets there are: slots for those that are gone, to be recovered.
            let indices = layout::secret_indices(&replica.state.seal().1).collect();
            replica.change_shares(ShareOp::Present { indices, epoch: replica.state.epoch() });
        }
        replica
    }

    fn resume(
        identity: Identity,
        at: Option<Checkpoint>,
        map: Map,
        (slots, certificate, view): (Vec<StoredSlot>, Option<Certificate>, Option<StoredView>),
        remembers: (Option<Amnesia>, Option<Epoch>),
        vault: Vec<(VaultKey, SecretBlob)>,
    ) -> Result<Self, Damage> {
        let manifest = Arc::clone(identity.membership.manifest());
        let state = match at {
            None => State::genesis(manifest),
            Some(checkpoint) => State::restore(manifest, checkpoint, map)?,
        };
        let memory = slots.iter().map(|slot| {
            let accepted = slot.accepted.as_ref().map(|(pre_prepare, _)| pre_prepare.body.0.view);
            let prepared = slot.prepared.as_ref().map(|(proof, _)| proof.statement.0.view);
            (slot.sequence, Memory { accepted, prepared })
        });
        let memory = memory.filter(|(sequence, _)| *sequence > state.sequence()).collect();
        let mut replica = Self::new(identity, state, memory, remembers, vault);
        if at.is_none() {
            // The state that the first batches build on is on disk before anything is promised.
            replica.flush();
        }
        replica.resume_renewal();
        let shown = shown_in_log(&replica.membership, &slots);
        replica.restore_view(view, &shown)?;
        replica.restore_log(slots)?;
        let (view, attempt) = (replica.view, replica.state.attempt());
        if replica.changing.began.as_ref().is_some_and(|began| !began.says_enough(attempt)) {
            return Err(Damage::View(view));
        }
        replica.restore_certificate(certificate)?;
        Ok(replica)
    }

    fn new(
        identity: Identity,
        state: State,
        memory: BTreeMap<Sequence, Memory>,
        remembers: (Option<Amnesia>, Option<Epoch>),
        vault: Vec<(VaultKey, SecretBlob)>,
    ) -> Self {
        let Identity { membership, voter, boot, log_tail } = identity;
        let manifest = Arc::clone(membership.manifest());
        let membership = membership.or_newer(state.membership());
        let flushed = state.sequence();
        Self {
            id: voter.server(),
            cluster: manifest.cluster_id(),
            view: Default::default(),
            log: BTreeMap::new(),
            log_bytes: 0,
            keys_heard: KeysHeard::default(),
            pool: RequestPool::new(manifest.thresholds.n()),
            next_sequence: flushed.next(),
            last_proposed: Timestamp(0),
            checkpoints: BTreeMap::new(),
            own_checkpoints: BTreeMap::new(),
            certificate: None,
            ahead: None,
            replied_before: Vec::new(),
            certified_snapshot: None,
            own_held: None,
            later_epoch_seen: false,
            completion: CompletionTracker::new(manifest.grid()),
            published_completion: None,
            flushed,
            certified_anywhere: Sequence(0),
            target: Sequence(0),
            progress: Progress::default(),
            changing: Changing::new(),
            conduct: Conduct::default(),
            budgets: Budgets::default(),
            entered: Timestamp(0),
            now: Timestamp(0),
            diverged: false,
            standing: Standing::Estimating(Estimation::new(boot, remembers, memory)),
            shown_from: Sequence(0),
            witnessed: Witnessed::default(),
            boundaries: BTreeMap::new(),
            log_tail,
            transferring: Transferring::new(boot),
            asked_under: None,
            renewing: Renewing::new(boot, vault),
            pending: Pending::default(),
            manifest,
            membership,
            voter,
            state,
        }
    }

    fn restore_view(
        &mut self,
        stored: Option<StoredView>,
        membership: &Arc<Membership>,
    ) -> Result<(), Damage> {
        let Some(StoredView { view, began }) = stored else { return Ok(()) };
        self.view = view;
        self.changing.active = began.is_some();
        if let Some(StoredBeginning { new_view: (signed, key), view_changes }) = began {
            let mut keyring = Keyring::of(Arc::clone(membership));
            let new_view = keyring.check_with(key, signed).map_err(|_| Damage::View(view))?;
            let named: BTreeSet<_> = new_view.body().view_changes.iter().copied().collect();
            let changes: Vec<_> = view_changes
                .into_iter()
                .map(|evidence| CheckedViewChange::from_own_log(&self.cluster, evidence))
                .collect();
            let held: BTreeSet<_> = changes.iter().map(|change| (change.server(), change.digest())).collect();
            // None, if it was of an epoch that was over.
            if !held.is_empty() && held != named {
                return Err(Damage::View(view));
            }
            self.install(Beginning::new(new_view, changes));
        }
        Ok(())
    }

    fn restore_log(&mut self, slots: Vec<StoredSlot>) -> Result<(), Damage> {
        for slot in slots {
            let sequence = slot.sequence;
            let mut entry = LogEntry::default();
            let accepted_batch = slot.accepted.as_ref().map(|(_, batch)| batch.clone());
            if let Some((pre_prepare, batch)) = slot.accepted {
                self.restore_votes(&mut entry, pre_prepare, batch)?;
            }
            if let Some((proof, batch)) = slot.prepared {
                let batch = batch.or_else(|| accepted_batch.clone()).ok_or(Damage::Batch(sequence))?;
                self.witnessed.prepared(&proof);
                self.keys_heard.restore(&proof);
                self.restore_prepared(&mut entry, proof, batch)?;
            }
            if let Some((proof, batch)) = slot.committed {
                let batch = batch.or(accepted_batch).ok_or(Damage::Batch(sequence))?;
                let wire = Arc::new(batch.clone());
                let batch = CheckedBatch::from_own_log(&self.cluster, batch);
                if batch.digest() != proof.statement.0.digest || proof.statement.0.sequence != sequence {
                    return Err(Damage::Batch(sequence));
                }
                if sequence > self.flushed {
                    entry.set_batch(batch, wire);
                } else {
                    entry.set_executed(batch.digest(), wire);
                }
                self.witnessed.committed(&proof);
                entry.committed = Some(proof);
                if sequence <= self.flushed {
                    self.log_bytes += entry.bytes();
                }
            }
            self.next_sequence = self.next_sequence.max(sequence.next());
            self.log.insert(sequence, entry);
        }
        self.execute_ready();
        // Where an epoch has begun since it was written, what follows may be void.
        let (attempt, first) = (self.state.attempt(), self.executed().next());
        self.log.range_mut(first..).for_each(|(_, entry)| entry.enter_epoch(attempt));
        Ok(())
    }

    /// Puts back the votes that may have left: under another key of the epoch, perhaps, but for the same.
    fn restore_votes(
        &mut self,
        entry: &mut LogEntry,
        pre_prepare: Signed<PrePrepare>,
        batch: Batch,
    ) -> Result<(), Damage> {
        let slot = pre_prepare.body.0;
        let wire = Arc::new(batch.clone());
        let batch = CheckedBatch::from_own_log(&self.cluster, batch);
        if batch.digest() != slot.digest {
            return Err(Damage::Batch(slot.sequence));
        }
        if pre_prepare.server == self.id {
            self.last_proposed = self.last_proposed.max(batch.time());
        }
        if slot.view != self.view || !self.changing.active {
            return Ok(());
        }
        let mut pre_prepare = pre_prepare;
        if slot.attempt == self.voter.attempt() {
            if pre_prepare.server == self.id {
                // Others remember only the last few keys of a server that starts again and again.
                pre_prepare = self.voter.sign(PrePrepare(slot)).signed().clone();
            }
            let vote = self.voter.sign(Prepare(slot));
            let _ = entry.prepares.add(vote.clone());
            entry.own_prepare = Some(vote);
        }
        entry.set_batch(batch, wire);
        entry.pre_prepare = Some(pre_prepare);
        Ok(())
    }

    /// Puts back what a view change has to show, and the commit that may have left.
    fn restore_prepared(
        &mut self,
        entry: &mut LogEntry,
        proof: QuorumProof<Prepare>,
        batch: Batch,
    ) -> Result<(), Damage> {
        let slot = proof.statement.0;
        let wire = Arc::new(batch.clone());
        if CheckedBatch::from_own_log(&self.cluster, batch).digest() != slot.digest {
            return Err(Damage::Batch(slot.sequence));
        }
        if entry.slot() == Some(slot) && slot.attempt == self.voter.attempt() {
            let vote = self.voter.sign(Commit(slot));
            let _ = entry.commits.add(vote.clone());
            entry.own_commit = Some(vote);
        }
        entry.prepared = Some((proof, wire));
        Ok(())
    }

    fn restore_certificate(&mut self, certificate: Option<Certificate>) -> Result<(), Damage> {
        let Some(certificate) = certificate else { return Ok(()) };
        let statement = certificate.statement;
        let sequence = statement.sequence;
        if sequence > self.executed() {
            return Err(Damage::NotCertified(sequence));
        }
        if let Some(own) = self.own_checkpoints.get(&sequence) {
            if own.checkpoint != statement {
                return Err(Damage::NotCertified(sequence));
            }
        } else {
            // The state was written at or after the certificate: its own snapshot is at `executed`.
            let (checkpoint, snapshot) = self.state.seal();
            if checkpoint.sequence == sequence && checkpoint != statement {
                return Err(Damage::NotCertified(sequence));
            }
            self.vote_again(checkpoint, snapshot);
            if checkpoint.sequence != sequence {
                // The state on disk is newer than its last certificate, which still says where the
                // watermarks are; readers wait for the next one.
                self.certificate = Some(Arc::new(certificate));
                return Ok(());
            }
        }
        self.on_certificate(certificate);
        Ok(())
    }

    fn vote_again(&mut self, checkpoint: Checkpoint, snapshot: crate::map::Snapshot) {
        let vote = (self.voter.attempt() == checkpoint.attempt()).then(|| self.voter.sign(checkpoint));
        if let Some(vote) = &vote {
            let _ = self.checkpoints.entry(checkpoint.sequence).or_default().add(vote.clone());
        }
        let own = super::OwnCheckpoint { checkpoint, vote, snapshot, replied: Vec::new() };
        self.own_checkpoints.entry(checkpoint.sequence).or_insert(own);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::ids::{AttemptId, ClusterId};

    /// A state after one batch, in the epoch that began by this attempt.
    pub(in crate::ordering) fn stored_at(cluster: ClusterId, attempt: AttemptId) -> StoredState {
        let epochs = crate::codec::encode(&crate::state::epochs::tests::standing(attempt, None));
        let mut map = Map::new(cluster);
        map.insert(layout::EPOCHS, epochs.clone());
        let (sequence, root, time) = (Sequence(1), map.seal().root(), Timestamp(1));
        let AttemptId { epoch, attempt } = attempt;
        let checkpoint = Checkpoint { sequence, root, time, epoch, attempt };
        StoredState { checkpoint, leaves: vec![(layout::EPOCHS.to_vec(), epochs)] }
    }
}
