//! The message log: for each sequence number the proposal, the votes, and what they prove
//! (PBFT §4.2).

use crate::certificate::{QuorumProof, VoteBook};
use crate::ids::{Sequence, View};
use crate::message::{Batch, CheckedBatch, Commit, PrePrepare, Prepare, Slot};
use crate::signing::{Signed, Verified};
use std::sync::Arc;

/// What is known about one sequence number.
#[derive(Default)]
pub(super) struct LogEntry {
    /// The proposal that this replica agreed to, or made.
    pub(super) pre_prepare: Option<Signed<PrePrepare>>,
    /// Its batch, or the one that q commits name.
    pub(super) batch: Option<CheckedBatch>,
    /// The same as it travels and is stored.
    pub(super) wire: Option<Arc<Batch>>,
    pub(super) prepares: VoteBook<Prepare>,
    pub(super) commits: VoteBook<Commit>,
    /// This replica's own votes, to send again.
    pub(super) own_prepare: Option<Verified<Prepare>>,
    pub(super) own_commit: Option<Verified<Commit>>,
    /// q commits: ordered for good.
    pub(super) committed: Option<QuorumProof<Commit>>,
}

impl LogEntry {
    /// What the accepted proposal is about.
    pub(super) fn slot(&self) -> Option<Slot> {
        self.pre_prepare.as_ref().map(|proposal| proposal.body.0)
    }
    pub(super) fn set_batch(&mut self, batch: CheckedBatch, wire: Arc<Batch>) {
        self.batch = Some(batch);
        self.wire = Some(wire);
    }
    /// Prepared: the pre-prepare and q−1 matching prepares of different backups (PBFT §4.2 for
    /// general n: with the primary's, q servers vouch for it).
    pub(super) fn prepared(&self, quorum: usize) -> Option<QuorumProof<Prepare>> {
        self.prepares.proof(&Prepare(self.slot()?), quorum - 1)
    }
    /// The commit proof, once q servers promise to execute one batch, and it is here.
    pub(super) fn committed_now(&self, quorum: usize) -> Option<QuorumProof<Commit>> {
        self.commits.proof(&Commit(self.slot()?), quorum)
    }
    /// Keeps only what a server that fell behind may ask for.
    pub(super) fn strip(&mut self) {
        *self = Self { wire: self.wire.take(), committed: self.committed.take(), ..Self::default() };
    }
    pub(super) fn bytes(&self) -> usize {
        let requests = self
            .wire
            .as_ref()
            .map_or(0, |batch| batch.requests.iter().map(|request| 512 + request_bytes(request)).sum());
        256 + requests + self.committed.as_ref().map_or(0, |proof| proof.votes.len() * 256)
    }
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
pub(super) fn slot(view: View, sequence: Sequence, batch: &CheckedBatch) -> Slot {
    Slot { view, sequence, digest: batch.digest() }
}
