//! The message log: for each sequence number the proposal, the votes, and what they prove
//! (PBFT §4.2).

use crate::bytes::Hash;
use crate::certificate::{QuorumProof, VoteBook};
use crate::ids::{AttemptId, Sequence, ServerId, Timestamp, View};
use crate::message::{Batch, CheckedBatch, Commit, PrePrepare, Prepare, Slot};
use crate::request::{Operation, Step};
use crate::signing::{Signed, Verified};
use std::sync::Arc;

/// What is known about one sequence number.
#[derive(Clone, Default)]
pub(super) struct LogEntry {
    /// The proposal that this replica agreed to, or made.
    pub(super) pre_prepare: Option<Signed<PrePrepare>>,
    /// When this replica, as a backup, agreed to it, if its primary was free to choose it.
    pub(super) accepted_at: Option<Timestamp>,
    /// Its primary was accused of proposing another one.
    pub(super) accused: bool,
    /// Its batch, or the one that q commits name.
    pub(super) batch: Option<CheckedBatch>,
    /// A batch as it travels and is stored, with its digest: the committed one once there is one,
    /// otherwise the accepted one.
    wire: Option<(Hash, Arc<Batch>)>,
    /// Who says in that batch to be ready, for which attempt.
    pub(super) ready: Vec<(ServerId, AttemptId)>,
    /// A proposal that came before the one that it follows.
    pub(super) early: Option<(Verified<PrePrepare>, CheckedBatch)>,
    pub(super) prepares: VoteBook<Prepare>,
    pub(super) commits: VoteBook<Commit>,
    /// This replica's own votes, to send again.
    pub(super) own_prepare: Option<Verified<Prepare>>,
    pub(super) own_commit: Option<Verified<Commit>>,
    /// The votes of the highest view in which a batch was prepared here, and that batch: what a view
    /// change has to show.
    pub(super) prepared: Option<(QuorumProof<Prepare>, Arc<Batch>)>,
    /// q commits: ordered for good.
    pub(super) committed: Option<QuorumProof<Commit>>,
}

impl LogEntry {
    /// What the accepted proposal is about.
    pub(super) fn slot(&self) -> Option<Slot> {
        self.pre_prepare.as_ref().map(|proposal| proposal.body.0)
    }
    /// What a proposal is about that came before the one that it follows.
    pub(super) fn early_slot(&self) -> Option<Slot> {
        self.early.as_ref().map(|(proposal, _)| proposal.body().0)
    }
    pub(super) fn set_batch(&mut self, batch: CheckedBatch, wire: Arc<Batch>) {
        self.ready = ready(&wire);
        self.wire = Some((batch.digest(), wire));
        self.batch = Some(batch);
    }
    /// Keeps a batch that was executed before a restart.
    pub(super) fn set_executed(&mut self, digest: Hash, wire: Arc<Batch>) {
        self.strip();
        self.wire = Some((digest, wire));
    }
    /// The time of its batch.
    pub(super) fn time(&self) -> Option<Timestamp> {
        self.wire.as_ref().map(|(_, batch)| batch.time)
    }
    /// The accepted proposal with its batch.
    pub(super) fn proposal(&self) -> Option<(&Signed<PrePrepare>, &Arc<Batch>)> {
        let proposal = self.pre_prepare.as_ref()?;
        let (digest, batch) = self.wire.as_ref()?;
        (proposal.body.0.digest == *digest).then_some((proposal, batch))
    }
    /// Prepared: q matching prepares. PBFT §4.2 counts the pre-prepare as the primary's; here the
    /// primary makes one too, so that q votes of one kind are the whole proof.
    pub(super) fn prepared_now(&self, quorum: usize) -> Option<QuorumProof<Prepare>> {
        self.prepares.proof(&Prepare(self.slot()?), quorum)
    }
    /// This place lies in the epoch that began by `attempt`, or a later one: what was said about it before is void.
    pub(super) fn enter_epoch(&mut self, attempt: AttemptId) {
        self.prepares.keep_since(attempt);
        self.commits.keep_since(attempt);
        self.early.take_if(|(proposal, _)| proposal.body().0.attempt < attempt);
        self.prepared.take_if(|(proof, _)| proof.statement.0.attempt < attempt);
        let accepted = self.slot().is_some_and(|slot| slot.attempt >= attempt);
        if !accepted {
            (self.pre_prepare, self.accepted_at) = (None, None);
            (self.own_prepare, self.own_commit) = (None, None);
        }
        let void = self.committed.take_if(|proof| proof.statement.0.attempt < attempt).is_some();
        if self.committed.is_none() && (void || !accepted) {
            self.forget_batch();
        }
    }
    /// Commits of another epoch than the place turns out to lie in are void.
    pub(super) fn commits_count(&mut self, attempt: AttemptId) -> bool {
        self.enter_epoch(attempt);
        if self.committed.take_if(|proof| proof.statement.0.attempt != attempt).is_some() {
            self.forget_batch();
        }
        self.committed.is_some()
    }
    fn forget_batch(&mut self) {
        (self.batch, self.wire, self.ready) = (None, None, vec![]);
    }
    /// Votes count in their view only.
    pub(super) fn leave_view(&mut self) {
        (self.pre_prepare, self.accepted_at, self.accused) = (None, None, false);
        self.early = None;
        self.prepares = VoteBook::default();
        self.commits = VoteBook::default();
        self.own_prepare = None;
        self.own_commit = None;
        if self.committed.is_none() {
            self.forget_batch();
        }
    }
    /// The batch with this digest, if this entry has it.
    pub(super) fn wire_with(&self, digest: &Hash) -> Option<Arc<Batch>> {
        let prepared = self.prepared.as_ref().filter(|(proof, _)| proof.statement.0.digest == *digest);
        if let Some((_, batch)) = prepared {
            return Some(Arc::clone(batch));
        }
        self.wire.as_ref().filter(|(known, _)| known == digest).map(|(_, batch)| Arc::clone(batch))
    }
    /// The commit proof, once q servers promise to execute one batch, and it is here.
    pub(super) fn committed_now(&self, quorum: usize) -> Option<QuorumProof<Commit>> {
        self.commits.proof(&Commit(self.slot()?), quorum)
    }
    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize {
        let prepared = self.prepared.as_ref().map(|(proof, _)| proof.statement);
        let committed = self.committed.as_ref().map(|proof| proof.statement);
        let own = (self.own_prepare.is_some(), self.own_commit.is_some(), self.batch.is_some());
        let own = (own, self.accepted_at);
        (self.slot(), self.prepares.votes_cast(), self.commits.votes_cast(), prepared, committed, own)
    }
    /// Keeps only what a server that fell behind may ask for.
    pub(super) fn strip(&mut self) {
        *self = Self { wire: self.wire.take(), committed: self.committed.take(), ..Self::default() };
    }
    pub(super) fn bytes(&self) -> usize {
        let requests = self.wire.as_ref().map_or(0, |(_, batch)| batch_bytes(batch));
        256 + requests + self.committed.as_ref().map_or(0, |proof| proof.votes.len() * 256)
    }
}

/// Bytes of a batch, about.
pub(super) fn batch_bytes(batch: &Batch) -> usize {
    batch.requests.iter().map(|request| 512 + request_bytes(request)).sum()
}

/// The parts of a request that can be large.
fn request_bytes(request: &crate::request::SignedRequest) -> usize {
    use crate::request::Operation;
    match &request.request.operation {
        Operation::Register { entry, .. } | Operation::Rotate { entry, .. } => {
            entry.keys.iter().map(|key| key.key.len()).sum::<usize>()
                + entry.metadata.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
        }
        Operation::Deposit(deposit) => {
            deposit.ciphertext.len() + deposit.shares.iter().map(|share| share.len()).sum::<usize>()
        }
        _ => 0,
    }
}

/// What votes for a batch at this place are about.
pub(super) fn slot(view: View, attempt: AttemptId, sequence: Sequence, batch: &CheckedBatch) -> Slot {
    Slot { view, sequence, digest: batch.digest(), attempt }
}

/// Who says in a batch to be ready for an epoch.
fn ready(batch: &Batch) -> Vec<(ServerId, AttemptId)> {
    let ready = |operation: &Operation| match operation {
        Operation::Step(Step::Ready { server, attempt, .. }) => Some((*server, *attempt)),
        _ => None,
    };
    batch.requests.iter().filter_map(|request| ready(&request.request.operation)).collect()
}
