//! What servers say to each other.
//!
//! | message | from → to | what it promises or asks | source |
//! |---|---|---|---|
//! | `Keys` | any → any, first on a link | the voting key, certified by the identity | design §7 |
//! | `Forward` | gateway → primary, then all | a client's request to order | PBFT §4.1 |
//! | `PrePrepare` | primary → backups | this batch at this sequence number in this view | PBFT §4.2 |
//! | `Prepare` | any → all | I accepted, or made, that pre-prepare | PBFT §4.2 |
//! | `Commit` | any → all | q servers prepared it; I will execute it | PBFT §4.2 |
//! | `Checkpoint` | any → all | what executing up to here led to | PBFT §4.3, design §5 |
//! | `Certificate` | any → one that is behind | q checkpoint votes | PBFT §4.3 |
//! | `Held` | any → all | executed, certified and durable up to here | design §2 |
//! | `Suspect` | backup → all | the primary does not do its work; promises nothing | PBFT §4.4 |
//! | `ViewChange` | any → all | I left earlier views; this is what I prepared | PBFT §4.4 |
//! | `NewView` | new primary → all | names q view changes: the view begins | PBFT §4.4 |
//! | `FetchViewChanges`, `FetchedViewChange` | any ↔ one that shows a new view, any | view changes that it names | PBFT §4.4 |
//! | `Fetch`, `Fetched` | new primary ↔ any | a batch that the new view needs | PBFT §4.4 |
//! | `Status` | any → some, when progress stalls | how far I am: send what I lack | PBFT §5.2 (retransmission) |
//! | `Committed` | any → one that is behind | a batch and q commit votes for it | PBFT §4.6 |
//! | `Membership` | any → one that knows less | servers that were given another identity | design §4 |
//! | `AskWitness`, `Witness` | one that starts ↔ any | the newest of its own votes that others hold | PBFT-PR §4.3.2 |
//! | `Offer` | any → one that is too far behind | a certified state that it can fetch | PBFT §4.6 |
//! | `Dealing`, `AskDealing` | dealer or holder → one that may know it | contributions to the next epoch's seeds | design §7 |
//! | `AskMasked`, `Masked` | one that lost shares ↔ any | shares under masks that only it can take off | design §7 |
//! | `AskParts`, `Parts` | one that fetches state ↔ any | parts of the map under a root | PBFT-PR §5.3 |
//!
//! What comes from a peer is a [`PeerMessage`]; [`PeerMessage::check`] verifies every signature in
//! it, off the replica's thread, and yields the [`CheckedMessage`] that the replica accepts.

mod batch;
mod help;
#[cfg(test)]
mod sizes;
mod view_change;
mod votes;

pub use batch::{Batch, BatchError, CheckedBatch};
pub use help::{AskParts, Evidence, HandedOut, Parts, Status, WantedDealing, Witness};
pub use view_change::{CheckedViewChange, KeyedVote, NewView, Prepared, ViewChange};
pub use votes::{Commit, PrePrepare, Prepare, Slot, Suspect};

use crate::bytes::Hash;
use crate::certificate::{Certificate, Checkpoint, Held, QuorumError, QuorumProof};
use crate::ids::ServerId;
use crate::limits::{CHANGES_TOGETHER, MAX_PARTS, RECOVERY_CHUNKS};
use crate::membership::{ChangeProof, Membership, MembershipError};
use crate::recovery::{AskMasked, Masked};
use crate::request::{SignedRequest, VerifiedRequest};
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Statement, Verified};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// A message from a peer: nothing in it has been checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum PeerMessage {
    /// The sender's voting key.
    Keys(KeyCertificate),
    /// A client's request.
    Forward(Box<SignedRequest>),
    /// A proposal and its batch.
    PrePrepare(Signed<PrePrepare>, Arc<Batch>),
    /// See [`Prepare`].
    Prepare(Signed<Prepare>),
    /// See [`Commit`].
    Commit(Signed<Commit>),
    /// See [`Checkpoint`].
    Checkpoint(Signed<Checkpoint>),
    /// For a server that is behind.
    Certificate(Certificate),
    /// See [`Held`].
    Held(Signed<Held>),
    /// See [`Status`].
    Status(Signed<Status>),
    /// A committed batch for a server that is behind.
    Committed(QuorumProof<Commit>, Arc<Batch>),
    /// See [`Suspect`].
    Suspect(Signed<Suspect>),
    /// See [`ViewChange`].
    ViewChange(Signed<ViewChange>),
    /// See [`NewView`]; also passed on by others than its author. The key is the author's.
    NewView(Box<Signed<NewView>>, KeyCertificate),
    /// View changes that a new view names by these digests are wanted; at most one of each server.
    FetchViewChanges(Vec<Hash>),
    /// One that was wanted.
    FetchedViewChange(Arc<Evidence<ViewChange>>),
    /// A batch with this digest is wanted.
    Fetch(Hash),
    /// The batch that was wanted.
    Fetched(Arc<Batch>),
    /// The sender has just started: what do you hold of mine? With a number for the answer.
    AskWitness(u64),
    /// Changes of the membership that the receiver does not know, in order.
    Membership(Vec<Arc<ChangeProof>>),
    /// See [`Witness`].
    Witness(Box<Witness>),
    /// The sender can give parts of the state that this certifies.
    Offer(Certificate),
    /// See [`AskParts`].
    AskParts(AskParts),
    /// See [`Parts`].
    Parts(Parts),
    /// See [`HandedOut`].
    Dealing(Box<HandedOut>),
    /// See [`WantedDealing`].
    AskDealing(WantedDealing),
    /// See [`AskMasked`]. Not for the replica, but for whoever keeps the shares.
    AskMasked(AskMasked),
    /// See [`Masked`]. Not for the replica, but for whoever keeps the shares.
    Masked(Masked),
}

/// A message whose every signature holds. Made only by [`PeerMessage::check`].
#[derive(Clone, Debug)]
pub enum CheckedMessage {
    /// The certificate of a voting key.
    Keys(KeyCertificate),
    /// A client's request.
    Forward(VerifiedRequest),
    /// A proposal whose batch has the digest that it names.
    PrePrepare(Verified<PrePrepare>, CheckedBatch),
    /// See [`Prepare`].
    Prepare(Verified<Prepare>),
    /// See [`Commit`].
    Commit(Verified<Commit>),
    /// See [`Checkpoint`].
    Checkpoint(Verified<Checkpoint>),
    /// q checkpoint votes.
    Certificate(Certificate),
    /// See [`Held`].
    Held(Verified<Held>),
    /// See [`Status`].
    Status(Verified<Status>),
    /// A batch with q commit votes.
    Committed(QuorumProof<Commit>, CheckedBatch),
    /// See [`Suspect`].
    Suspect(Verified<Suspect>),
    /// See [`ViewChange`].
    ViewChange(CheckedViewChange),
    /// The view's primary names q view changes.
    NewView(Verified<NewView>),
    /// View changes are wanted.
    FetchViewChanges(Vec<Hash>),
    /// A view change of which everything holds; its digest tells whether it is wanted.
    FetchedViewChange(CheckedViewChange),
    /// A batch is wanted.
    Fetch(Hash),
    /// A batch whose requests are signed; its digest tells whether it is wanted.
    Fetched(CheckedBatch),
    /// The sender has just started.
    AskWitness(u64),
    /// Who the servers are.
    Membership(Arc<Membership>),
    /// Every signature in it holds.
    Witness(Box<Witness>),
    /// A certified state that can be fetched.
    Offer(Certificate),
    /// Parts are wanted.
    AskParts(AskParts),
    /// Parts; their hashes tell whether they are right.
    Parts(Parts),
    /// A dealer's contributions; its commitment tells whether they are right.
    Dealing(Box<HandedOut>),
    /// Contributions are wanted.
    AskDealing(WantedDealing),
    /// Masked shares are wanted.
    AskMasked(AskMasked),
    /// Masked shares.
    Masked(Masked),
}

/// Why a peer's message is refused. The sender is to blame: a correct server checks before it
/// sends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// A statement in another server's name, which only its author sends.
    #[error("a statement of server {0} came from another server")]
    NotTheAuthor(ServerId),
    /// A key or signature.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A client's signature.
    #[error("a forwarded request is not signed by its client")]
    BadRequest,
    /// A batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// A certificate.
    #[error(transparent)]
    Quorum(#[from] QuorumError),
    /// A change of the membership that is not shown.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// More changes than one message may show.
    #[error("at most {CHANGES_TOGETHER} changes of the membership go into one message")]
    TooManyChanges,
    /// A view change whose parts do not fit together.
    #[error("a view change is malformed")]
    BadViewChange,
    /// More parts than one message may ask for.
    #[error("at most {MAX_PARTS} parts of the state go into one message")]
    TooManyParts,
    /// More votes than a witness has to show.
    #[error("a witness shows at most two votes of a kind")]
    TooManyVotes,
    /// More chunks of shares than one message may be about.
    #[error("at most {RECOVERY_CHUNKS} chunks of shares go into one message")]
    TooManyChunks,
    /// More contributions than there can be seeds.
    #[error("more contributions than any attempt has seeds")]
    TooManyContributions,
    /// A new view that does not name q servers' view changes, or not from its primary.
    #[error("a new view is not justified by view changes of q servers")]
    BadNewView,
    /// More view changes than a new view names.
    #[error("at most one view change of each server goes into one question")]
    TooManyViewChanges,
}

impl MessageError {
    /// Whether an honest server may have sent it, some epochs ago or behind.
    pub fn is_late(&self) -> bool {
        let late = |key: &KeyError| matches!(key, KeyError::OtherEpoch(_));
        match self {
            Self::Key(key) | Self::Quorum(QuorumError::Key(key)) => late(key),
            _ => false,
        }
    }
}

impl PeerMessage {
    /// Whether a crash of its sender could make it untrue: such a message leaves only when what it
    /// promises is durable. The others say what was proved by others, ask, or, like a checkpoint vote,
    /// follow from what q servers are bound to: a server that forgets such a vote comes to the same one
    /// again.
    pub fn promises(&self) -> bool {
        match self {
            Self::PrePrepare(..)
            | Self::Prepare(_)
            | Self::Commit(_)
            | Self::Held(_)
            | Self::ViewChange(_)
            | Self::NewView(..) => true,
            Self::Keys(_)
            | Self::Forward(_)
            | Self::Checkpoint(_)
            | Self::Certificate(_)
            | Self::Status(_)
            | Self::Committed(..)
            | Self::Suspect(_)
            | Self::FetchViewChanges(_)
            | Self::FetchedViewChange(_)
            | Self::Fetch(_)
            | Self::Fetched(_)
            | Self::Membership(_)
            | Self::AskWitness(_)
            | Self::Witness(_)
            | Self::Offer(_)
            | Self::AskParts(_)
            | Self::Parts(_)
            | Self::Dealing(_)
            | Self::AskDealing(_)
            | Self::AskMasked(_)
            | Self::Masked(_) => false,
        }
    }

    /// Checks everything in a message that came over the link from `from`. Learns the certified
    /// keys that it carries.
    pub fn check(self, from: ServerId, keyring: &mut Keyring) -> Result<CheckedMessage, MessageError> {
        fn authored<T: Statement>(
            signed: Signed<T>,
            from: ServerId,
            keyring: &Keyring,
        ) -> Result<Verified<T>, MessageError> {
            if signed.server != from {
                return Err(MessageError::NotTheAuthor(signed.server));
            }
            Ok(keyring.check(signed)?)
        }
        let cluster = *keyring.cluster();
        Ok(match self {
            Self::Keys(certificate) => {
                if certificate.statement.server != from {
                    return Err(MessageError::NotTheAuthor(certificate.statement.server));
                }
                keyring.add(certificate)?;
                CheckedMessage::Keys(certificate)
            }
            Self::Forward(request) => {
                CheckedMessage::Forward(request.verify(&cluster).map_err(|_| MessageError::BadRequest)?)
            }
            Self::PrePrepare(signed, batch) => {
                // The proposal first: its signature is cheap, and a stranger's batch is not checked.
                let proposal = authored(signed, from, keyring)?;
                let named = Some(proposal.body().0.digest);
                let batch = CheckedBatch::check_as(&cluster, Arc::unwrap_or_clone(batch), named)?;
                CheckedMessage::PrePrepare(proposal, batch)
            }
            Self::Prepare(signed) => CheckedMessage::Prepare(authored(signed, from, keyring)?),
            Self::Commit(signed) => CheckedMessage::Commit(authored(signed, from, keyring)?),
            Self::Checkpoint(signed) => CheckedMessage::Checkpoint(authored(signed, from, keyring)?),
            Self::Held(signed) => CheckedMessage::Held(authored(signed, from, keyring)?),
            Self::Status(signed) => CheckedMessage::Status(authored(signed, from, keyring)?),
            Self::Suspect(signed) => CheckedMessage::Suspect(authored(signed, from, keyring)?),
            Self::ViewChange(signed) => {
                let change = authored(signed, from, keyring)?;
                change.body().check(keyring)?;
                CheckedMessage::ViewChange(CheckedViewChange::new(&cluster, change))
            }
            Self::NewView(signed, key) => {
                let primary = signed.body.view.primary(keyring.manifest().thresholds.n());
                if signed.server != primary {
                    return Err(MessageError::BadNewView);
                }
                // A view may have begun many epochs ago: the replica asks for more than this then.
                let new_view = keyring.check_with(key, *signed)?;
                new_view.body().check(keyring)?;
                CheckedMessage::NewView(new_view)
            }
            Self::FetchViewChanges(digests) if digests.len() <= keyring.manifest().thresholds.n() => {
                CheckedMessage::FetchViewChanges(digests)
            }
            Self::FetchViewChanges(_) => return Err(MessageError::TooManyViewChanges),
            Self::FetchedViewChange(evidence) => {
                let (signed, key) = Arc::unwrap_or_clone(evidence);
                let change = keyring.check_with(key, signed)?;
                change.body().check(keyring)?;
                CheckedMessage::FetchedViewChange(CheckedViewChange::new(&cluster, change))
            }
            Self::Fetch(digest) => CheckedMessage::Fetch(digest),
            Self::Fetched(batch) => {
                CheckedMessage::Fetched(CheckedBatch::check(&cluster, Arc::unwrap_or_clone(batch))?)
            }
            Self::Certificate(certificate) => {
                certificate.verify(keyring)?;
                CheckedMessage::Certificate(certificate)
            }
            Self::Membership(proofs) if proofs.len() <= CHANGES_TOGETHER => {
                let followed = keyring.membership().follow(proofs)?;
                keyring.follow(&followed);
                CheckedMessage::Membership(followed)
            }
            Self::Membership(_) => return Err(MessageError::TooManyChanges),
            Self::AskWitness(boot) => CheckedMessage::AskWitness(boot),
            Self::Witness(witness) => {
                witness.check(keyring)?;
                CheckedMessage::Witness(witness)
            }
            Self::Offer(certificate) => {
                certificate.verify(keyring)?;
                CheckedMessage::Offer(certificate)
            }
            Self::AskParts(ask) if ask.parts.len() <= MAX_PARTS => CheckedMessage::AskParts(ask),
            Self::AskParts(_) => return Err(MessageError::TooManyParts),
            Self::Parts(parts) if parts.parts.len() <= MAX_PARTS => CheckedMessage::Parts(parts),
            Self::Parts(_) => return Err(MessageError::TooManyParts),
            Self::Dealing(handed) if handed.dealing.is_plausible() => CheckedMessage::Dealing(handed),
            Self::Dealing(_) => return Err(MessageError::TooManyContributions),
            Self::AskDealing(wanted) => CheckedMessage::AskDealing(wanted),
            Self::AskMasked(ask) if ask.chunks.len() <= RECOVERY_CHUNKS => CheckedMessage::AskMasked(ask),
            Self::Masked(masked) if masked.chunks.len() <= RECOVERY_CHUNKS => CheckedMessage::Masked(masked),
            Self::AskMasked(_) | Self::Masked(_) => return Err(MessageError::TooManyChunks),
            Self::Committed(proof, batch) => {
                proof.verify(keyring)?;
                let named = Some(proof.statement.0.digest);
                let batch = CheckedBatch::check_as(&cluster, Arc::unwrap_or_clone(batch), named)?;
                CheckedMessage::Committed(proof, batch)
            }
        })
    }
}
