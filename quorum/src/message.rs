//! What servers say to each other.
//!
//! | message | from → to | what it promises or asks | source |
//! |---|---|---|---|
//! | `Keys` | any → any, first on a link | the voting key, certified by the identity | design §7 |
//! | `Forward` | gateway → primary, then all | a client's request to order | PBFT §4.1 |
//! | `PrePrepare` | primary → backups | this batch at this sequence number in this view | PBFT §4.2 |
//! | `Prepare` | backup → all | I accepted that pre-prepare | PBFT §4.2 |
//! | `Commit` | any → all | q servers prepared it; I will execute it | PBFT §4.2 |
//! | `Checkpoint` | any → all | what executing up to here led to | PBFT §4.3, design §5 |
//! | `Certificate` | any → one that is behind | q checkpoint votes | PBFT §4.3 |
//! | `Held` | any → all | executed, certified and durable up to here | design §2 |
//! | `Status` | any → all, when progress stalls | how far I am: send what I lack | PBFT §5.2 (retransmission) |
//! | `Committed` | any → one that is behind | a batch and q commit votes for it | PBFT §4.6 |
//!
//! What comes from a peer is a [`PeerMessage`]; [`PeerMessage::check`] verifies every signature in
//! it, off the replica's thread, and yields the [`CheckedMessage`] that the replica accepts.

use crate::bytes::Hash;
use crate::certificate::{Certificate, Checkpoint, Held, QuorumError, QuorumProof};
use crate::codec::{Tagged, digest, sha256, signing_bytes};
use crate::ids::{ClusterId, Sequence, ServerId, Timestamp, View};
use crate::limits::{MAX_BATCH_BYTES, MAX_BATCH_REQUESTS};
use crate::request::{SignedRequest, VerifiedRequest};
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Verified};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Requests with the time at which they execute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The primary's clock when it proposed the batch (design §3).
    pub time: Timestamp,
    /// What to execute, in order.
    pub requests: Vec<SignedRequest>,
}
impl Tagged for Batch {
    const TAG: &'static str = "kds.batch";
}

/// A batch whose size and requests' signatures have been checked.
#[derive(Clone, Debug)]
pub struct CheckedBatch {
    time: Timestamp,
    requests: Vec<VerifiedRequest>,
    digest: Hash,
}

impl CheckedBatch {
    /// From requests that were checked one by one.
    pub fn new(cluster: &ClusterId, time: Timestamp, requests: Vec<VerifiedRequest>) -> Self {
        let batch =
            Batch { time, requests: requests.iter().map(|request| request.signed().clone()).collect() };
        Self { time, requests, digest: digest(cluster, &batch) }
    }
    /// Checks a batch from a peer, or one that comes back from this server's own database.
    pub fn check(cluster: &ClusterId, batch: Batch) -> Result<Self, BatchError> {
        let bytes = signing_bytes(cluster, &batch);
        if batch.requests.len() > MAX_BATCH_REQUESTS || bytes.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge);
        }
        let digest = sha256(&bytes);
        let requests = batch
            .requests
            .into_iter()
            .map(|request| request.verify(cluster).map_err(|_| BatchError::BadRequest))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { time: batch.time, requests, digest })
    }
    /// A batch from this server's own log, whose requests were checked before it was written. The
    /// digest shows whether it came back undamaged.
    pub fn from_own_log(cluster: &ClusterId, batch: Batch) -> Self {
        let time = batch.time;
        let digest = digest(cluster, &batch);
        let requests = batch.requests.into_iter().map(|request| request.trusted(cluster)).collect();
        Self { time, requests, digest }
    }
    /// What votes are about.
    pub fn digest(&self) -> Hash {
        self.digest
    }
    /// When it executes.
    pub fn time(&self) -> Timestamp {
        self.time
    }
    /// What it executes.
    pub fn requests(&self) -> &[VerifiedRequest] {
        &self.requests
    }
    /// As it travels.
    pub fn to_batch(&self) -> Batch {
        Batch {
            time: self.time,
            requests: self.requests.iter().map(|request| request.signed().clone()).collect(),
        }
    }
}

/// Why a batch is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Too many requests.
    #[error("a batch has at most {MAX_BATCH_REQUESTS} requests in {MAX_BATCH_BYTES} bytes")]
    TooLarge,
    /// A request's signature does not hold.
    #[error("a request in the batch is not signed by its client")]
    BadRequest,
}

/// What ordering votes are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Slot {
    /// In which view.
    pub view: View,
    /// At which place in the order.
    pub sequence: Sequence,
    /// Which batch.
    pub digest: Hash,
}

macro_rules! phase {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub Slot);
        impl Tagged for $name {
            const TAG: &'static str = $tag;
        }
    };
}
phase!(
    /// The primary's proposal (PBFT §4.2).
    PrePrepare, "kds.pre-prepare"
);
phase!(
    /// A backup's agreement (PBFT §4.2).
    Prepare, "kds.prepare"
);
phase!(
    /// The promise to execute (PBFT §4.2).
    Commit, "kds.commit"
);

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its view.
    pub view: View,
    /// The last batch it executed.
    pub executed: Sequence,
    /// The last batch it has a certificate for.
    pub certified: Sequence,
}
impl Tagged for Status {
    const TAG: &'static str = "kds.status";
}

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
    /// The batch is not the one that the votes are about.
    #[error("the batch does not have the digest that was voted for")]
    WrongBatch,
    /// A certificate.
    #[error(transparent)]
    Quorum(#[from] QuorumError),
}

impl PeerMessage {
    /// Checks everything in a message that came over the link from `from`. Learns the certified
    /// keys that it carries.
    pub fn check(self, from: ServerId, keyring: &mut Keyring) -> Result<CheckedMessage, MessageError> {
        fn authored<T: Tagged>(
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
                let batch = CheckedBatch::check(&cluster, Arc::unwrap_or_clone(batch))?;
                if batch.digest() != proposal.body().0.digest {
                    return Err(MessageError::WrongBatch);
                }
                CheckedMessage::PrePrepare(proposal, batch)
            }
            Self::Prepare(signed) => CheckedMessage::Prepare(authored(signed, from, keyring)?),
            Self::Commit(signed) => CheckedMessage::Commit(authored(signed, from, keyring)?),
            Self::Checkpoint(signed) => CheckedMessage::Checkpoint(authored(signed, from, keyring)?),
            Self::Held(signed) => CheckedMessage::Held(authored(signed, from, keyring)?),
            Self::Status(signed) => CheckedMessage::Status(authored(signed, from, keyring)?),
            Self::Certificate(certificate) => {
                certificate.verify(keyring)?;
                CheckedMessage::Certificate(certificate)
            }
            Self::Committed(proof, batch) => {
                proof.verify(keyring)?;
                let batch = CheckedBatch::check(&cluster, Arc::unwrap_or_clone(batch))?;
                if batch.digest() != proof.statement.0.digest {
                    return Err(MessageError::WrongBatch);
                }
                CheckedMessage::Committed(proof, batch)
            }
        })
    }
}
