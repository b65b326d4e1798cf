//! What the replica asks of its shell: write this, and only then send that.
//!
//! *Persist before send* is a type here and not a comment (design §3): messages stay inside
//! [`Unsent`] until the shell shows a [`Durable`], which it gets only by giving up the
//! [`WriteBatch`] that was made together with them, or a later one: so writes can be committed
//! in groups. Messages that promise nothing ([`PeerMessage::promises`]) do not wait.

use crate::bytes::SecretBlob;
use crate::certificate::{Certificate, Checkpoint, Completion, QuorumProof};
use crate::evidence::Evidence;
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, View};
use crate::map::{PartError, Snapshot};
use crate::message::{Batch, Commit, PeerMessage, PrePrepare, Prepare};
use crate::ordering::{Amnesia, PoolError, StoredBeginning};
use crate::request::{RequestId, VerifiedRequest};
use crate::shares::ShareOp;
use crate::signing::{Signed, Verified};
use crate::state::Leaf;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Pieces of evidence that one group of effects carries at most.
const EVIDENCE_AT_ONCE: usize = 4;

/// Something to make durable.
#[derive(Debug)]
pub enum Write {
    /// A proposal made or agreed to: never another one at this place in this view. A batch that was
    /// prepared here in an earlier view is kept beside it.
    Accepted {
        /// The primary's signature on it.
        pre_prepare: Signed<PrePrepare>,
        /// The batch.
        batch: Arc<Batch>,
    },
    /// q servers agree on the proposal: evidence for a new view (PBFT §4.4).
    Prepared {
        /// Where it belongs.
        sequence: Sequence,
        /// The backups' votes.
        proof: QuorumProof<Prepare>,
    },
    /// The batch is ordered for good.
    Committed {
        /// The batch, unless it is the one that was accepted and written here before.
        batch: Option<Arc<Batch>>,
        /// q votes for it.
        proof: QuorumProof<Commit>,
    },
    /// The view: votes in earlier ones are never made again. With how it began, once it has.
    View {
        /// The view.
        view: View,
        /// Its new-view message, and the view changes that this names.
        began: Option<StoredBeginning>,
    },
    /// The latest certificate.
    Certified(Arc<Certificate>),
    /// The state after `checkpoint.sequence`: what changed since the last time.
    State {
        /// Root, time and epoch of that state.
        checkpoint: Checkpoint,
        /// Changed entries.
        leaves: Vec<Leaf>,
    },
    /// Something that happens to this server's shares.
    Shares(ShareOp),
    /// Something secret that a restart must not lose, encrypted; none to erase it.
    Vault {
        /// What it is.
        key: VaultKey,
        /// Its encoding.
        value: Option<SecretBlob>,
    },
    /// What is forgotten: the server must not vote, also after another start.
    Amnesia(Option<Amnesia>),
    /// The number of the voting key that the signer is asked for next.
    VotingKey(u64),
    /// The stored log and state are damaged: begin with nothing.
    Reset,
    /// Batches up to here are no longer needed.
    Trim {
        /// The last one to forget.
        through: Sequence,
    },
}

/// What a piece of the vault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VaultKey {
    /// The seed of the key that opens shares deposited in an epoch, with the key's certificate.
    Opening(Epoch),
    /// What a dealer handed to this server in an attempt.
    Dealing(AttemptId, ServerId),
}

/// Writes to commit together, in order.
#[derive(Debug)]
#[must_use = "what is not written must not be promised"]
pub struct WriteBatch {
    ticket: u64,
    writes: Vec<Write>,
}

impl WriteBatch {
    /// What to write.
    pub fn writes(&self) -> &[Write] {
        &self.writes
    }
    /// Called by the shell once all of it, and all batches before it, survive a power failure.
    pub fn committed(self) -> Durable {
        Durable { ticket: self.ticket }
    }
}

/// Shows that everything up to some write batch is durable.
#[derive(Debug)]
pub struct Durable {
    ticket: u64,
}

/// Whom a message goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Every other server.
    All,
    /// One server.
    One(ServerId),
}

/// What readers may see: the certified state.
#[derive(Clone, Debug)]
pub struct Published {
    /// Entries of the certified state.
    pub snapshot: Snapshot,
    /// q signatures on its root.
    pub certificate: Arc<Certificate>,
    /// What is known to be complete, with the statements that show it.
    pub completion: Option<Arc<Completion>>,
    /// The view that ordering is in.
    pub view: View,
    /// The last batch executed; not yet certified, perhaps.
    pub executed: Sequence,
}

/// What may leave once the writes are durable.
#[derive(Debug, Default)]
pub struct Released {
    /// Messages to other servers.
    pub messages: Vec<Outgoing>,
    /// A newer certified state, if there is one.
    pub published: Option<Published>,
    /// Requests whose reply is part of the certified state now.
    pub replied: Vec<RequestId>,
    /// This server's own requests, which promise that something is durable: to be put to it as inputs.
    pub requests: Vec<VerifiedRequest>,
    /// Requests of own clients that cannot wait here.
    pub refused: Vec<(RequestId, PoolError)>,
    /// What somebody did wrong, for the log.
    pub accusations: Vec<Accusation>,
    /// What proves some of it to others.
    pub evidence: Vec<Evidence>,
}

/// What may leave once the writes made with it are durable.
#[derive(Debug)]
#[must_use = "unsent messages stall the protocol"]
pub struct Unsent {
    ticket: u64,
    released: Released,
}

impl Unsent {
    /// Gives out what waits for writes up to `durable`.
    ///
    /// # Panics
    /// If the writes that it waits for are not covered: a defect of the shell.
    pub fn release(self, durable: &Durable) -> Released {
        assert!(self.ticket <= durable.ticket, "messages released before what they promise is durable");
        self.released
    }
}

/// Someone's misbehaviour, or our own damage, as far as this replica can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Accusation {
    /// Two different statements where only one is allowed.
    #[error("server {server} said two different things about sequence number {sequence} ({phase})")]
    Equivocation {
        /// Who.
        server: ServerId,
        /// Where.
        sequence: Sequence,
        /// In which phase.
        phase: &'static str,
    },
    /// A proposal that breaks the rules.
    #[error("primary {server}'s proposal {sequence} is refused: {why}")]
    BadProposal {
        /// Who.
        server: ServerId,
        /// Where.
        sequence: Sequence,
        /// What is wrong.
        why: &'static str,
    },
    /// A new view that names view changes which are not of it.
    #[error("primary {server}'s new view {view} names view changes that are not of that view")]
    BadNewView {
        /// Who.
        server: ServerId,
        /// Which view.
        view: View,
    },
    /// A checkpoint vote that q others contradict.
    #[error("server {server} voted for another state at sequence number {sequence} than q servers did")]
    WrongState {
        /// Who.
        server: ServerId,
        /// Where.
        sequence: Sequence,
    },
    /// A part of a state that does not have the hash that it must have.
    #[error("server {server} sent a wrong part of the state: {why}")]
    WrongPart {
        /// Who.
        server: ServerId,
        /// What is wrong.
        why: PartError,
    },
    /// Contributions that are not the ones that their dealer committed to.
    #[error("server {server} sent contributions of dealer {dealer} that are not the ones committed to")]
    WrongDealing {
        /// Who sent them.
        server: ServerId,
        /// Whose they are said to be.
        dealer: ServerId,
    },
    /// The database is older than what this server once signed.
    #[error(
        "this server has signed a vote for sequence number {sequence} that its database does not know: was a \
         backup restored? It recovers its state from the others, and votes again once no forgotten vote matters"
    )]
    Amnesia {
        /// The highest such vote.
        sequence: Sequence,
    },
    /// The database does not hold what it must.
    #[error("the database is damaged: {0}. This server recovers its state from the others before it votes")]
    Damaged(super::Damage),
    /// q servers vouch for a state that this program cannot read.
    #[error("the certified state at sequence number {sequence} has entries that this version cannot read")]
    Unreadable {
        /// Where.
        sequence: Sequence,
    },
    /// q servers contradict this very replica: it stops voting.
    #[error(
        "this server's own state at sequence number {sequence} is not the certified one; it stops voting and \
         fetches what differs"
    )]
    Diverged {
        /// Where.
        sequence: Sequence,
    },
}

impl Accusation {
    /// The other server that is to blame; none where this one finds fault with itself.
    pub fn accused(&self) -> Option<ServerId> {
        match self {
            Self::Equivocation { server, .. }
            | Self::BadProposal { server, .. }
            | Self::BadNewView { server, .. }
            | Self::WrongState { server, .. }
            | Self::WrongPart { server, .. }
            | Self::WrongDealing { server, .. } => Some(*server),
            Self::Amnesia { .. } | Self::Damaged(_) | Self::Unreadable { .. } | Self::Diverged { .. } => None,
        }
    }
}

/// A message and whom it goes to.
pub type Outgoing = (Target, Arc<PeerMessage>);

/// Effects as the replica collects them.
#[derive(Default)]
pub(super) struct Pending {
    next_ticket: u64,
    writes: Vec<Write>,
    /// Whether something has to be written now. Otherwise it waits for what comes next.
    urgent: bool,
    released: Released,
    free: Vec<Outgoing>,
}

impl Clone for Pending {
    /// Effects are handed out once: a copy has none.
    fn clone(&self) -> Self {
        Self { next_ticket: self.next_ticket, ..Self::default() }
    }
}

impl Pending {
    pub(super) fn write(&mut self, write: Write) {
        self.writes.push(write);
        self.urgent = true;
    }
    /// Something that no message promises yet: it goes along with the next write that one does.
    pub(super) fn write_along(&mut self, write: Write) {
        self.writes.push(write);
    }
    pub(super) fn send(&mut self, target: Target, message: PeerMessage) {
        let outgoing = match message.promises() {
            true => &mut self.released.messages,
            false => &mut self.free,
        };
        outgoing.push((target, Arc::new(message)));
    }
    /// Messages that wait for nothing.
    pub(super) fn drain_free(&mut self) -> Vec<Outgoing> {
        std::mem::take(&mut self.free)
    }
    pub(super) fn send_all<T: Clone>(&mut self, vote: &Verified<T>, wrap: fn(Signed<T>) -> PeerMessage) {
        self.send(Target::All, wrap(vote.signed().clone()));
    }
    pub(super) fn publish(&mut self, published: Published) {
        self.released.published = Some(published);
    }
    pub(super) fn replied(&mut self, replied: impl IntoIterator<Item = RequestId>) {
        self.released.replied.extend(replied);
    }
    /// A request of this server's own, once everything written so far is durable.
    pub(super) fn request(&mut self, request: VerifiedRequest) {
        self.released.requests.push(request);
    }
    pub(super) fn refuse(&mut self, id: RequestId, why: PoolError) {
        self.released.refused.push((id, why));
    }
    pub(super) fn accuse(&mut self, accusation: Accusation) {
        self.released.accusations.push(accusation);
    }
    /// Goes with an accusation. A liar's flood of it is cut short: one piece proves as much as ten.
    pub(super) fn evidence(&mut self, evidence: Evidence) {
        if self.released.evidence.len() < EVIDENCE_AT_ONCE {
            self.released.evidence.push(evidence);
        }
    }
    pub(super) fn drain(&mut self) -> Option<(WriteBatch, Unsent)> {
        let nothing = !self.urgent
            && self.released.messages.is_empty()
            && self.released.published.is_none()
            && self.released.replied.is_empty()
            && self.released.refused.is_empty()
            && self.released.requests.is_empty()
            && self.released.accusations.is_empty();
        if nothing {
            return None;
        }
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.urgent = false;
        let writes = WriteBatch { ticket, writes: std::mem::take(&mut self.writes) };
        Some((writes, Unsent { ticket, released: std::mem::take(&mut self.released) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "released before")]
    fn messages_do_not_leave_before_their_writes() {
        let mut pending = Pending::default();
        pending.write(Write::Trim { through: Sequence(1) });
        let (first, _unsent) = pending.drain().unwrap();
        pending.write(Write::Trim { through: Sequence(2) });
        let (_second, unsent) = pending.drain().unwrap();
        let durable = first.committed();
        let _ = unsent.release(&durable);
    }

    #[test]
    fn a_later_commit_covers_earlier_messages() {
        let mut pending = Pending::default();
        pending.write(Write::Trim { through: Sequence(1) });
        let (_first, early) = pending.drain().unwrap();
        pending.write(Write::Trim { through: Sequence(2) });
        let (second, late) = pending.drain().unwrap();
        let durable = second.committed();
        let _ = early.release(&durable);
        let _ = late.release(&durable);
        assert!(pending.drain().is_none());
    }
}
