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
//! | `NewView` | new primary → all | q view changes: the view begins | PBFT §4.4 |
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

use crate::bytes::Hash;
use crate::certificate::{Certificate, Checkpoint, Held, QuorumError, QuorumProof};
use crate::codec::{Tagged, sha256, signing_bytes};
use crate::ids::{AttemptId, ClusterId, Sequence, ServerId, ServerSet, Timestamp, View};
use crate::limits::{
    CHANGES_TOGETHER, MAX_BATCH_BYTES, MAX_BATCH_REQUESTS, MAX_PARTS, RECOVERY_CHUNKS, WINDOW,
};
use crate::map::{PartItem, WantedPart};
use crate::membership::{ChangeProof, Membership, MembershipError};
use crate::recovery::{AskMasked, Masked};
use crate::refresh::Dealing;
use crate::request::{SignedRequest, VerifiedRequest};
use crate::signing::{KeyCertificate, KeyError, Keyring, Signed, Statement, Verified};
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
    bytes: usize,
}

impl CheckedBatch {
    /// From requests that were checked one by one.
    pub fn new(cluster: &ClusterId, time: Timestamp, requests: Vec<VerifiedRequest>) -> Self {
        let batch =
            Batch { time, requests: requests.iter().map(|request| request.signed().clone()).collect() };
        let bytes = signing_bytes(cluster, &batch);
        Self { time, requests, digest: sha256(&bytes), bytes: bytes.len() }
    }
    /// Checks a batch from a peer, or one that comes back from this server's own database.
    pub fn check(cluster: &ClusterId, batch: Batch) -> Result<Self, BatchError> {
        Self::check_as(cluster, batch, None)
    }
    /// The same for a batch that votes have named: whether it is the one is told before any of its requests'
    /// signatures is looked at.
    fn check_as(cluster: &ClusterId, batch: Batch, named: Option<Hash>) -> Result<Self, BatchError> {
        let bytes = signing_bytes(cluster, &batch);
        if batch.requests.len() > MAX_BATCH_REQUESTS || bytes.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge);
        }
        let digest = sha256(&bytes);
        if named.is_some_and(|named| named != digest) {
            return Err(BatchError::WrongBatch);
        }
        let requests = batch
            .requests
            .into_iter()
            .map(|request| request.verify(cluster).map_err(|_| BatchError::BadRequest))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { time: batch.time, requests, digest, bytes: bytes.len() })
    }
    /// A batch from this server's own log, whose requests were checked before it was written. The
    /// digest shows whether it came back undamaged.
    pub fn from_own_log(cluster: &ClusterId, batch: Batch) -> Self {
        let time = batch.time;
        let bytes = signing_bytes(cluster, &batch);
        let requests = batch.requests.into_iter().map(|request| request.trusted(cluster)).collect();
        Self { time, requests, digest: sha256(&bytes), bytes: bytes.len() }
    }
    /// What votes are about.
    pub fn digest(&self) -> Hash {
        self.digest
    }
    /// Bytes of its requests, with little around them.
    pub fn bytes(&self) -> usize {
        self.bytes
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
    /// It is not the one that the votes are about.
    #[error("the batch does not have the digest that was voted for")]
    WrongBatch,
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
    /// By which the epoch began that the place lies in. Votes of other epochs for the same place are void.
    pub attempt: AttemptId,
}

macro_rules! phase {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub Slot);
        impl Tagged for $name {
            const TAG: &'static str = $tag;
        }
        impl Statement for $name {
            fn attempt(&self) -> AttemptId {
                self.0.attempt
            }
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

/// "The primary of this view does not do its work." Promises nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspect {
    /// The view whose primary is suspected.
    pub view: View,
    /// By which the epoch began that its author is in.
    pub attempt: AttemptId,
}
impl Tagged for Suspect {
    const TAG: &'static str = "kds.suspect";
}
impl Statement for Suspect {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// "I take part in no view before this one, and this is what I have prepared" (PBFT §4.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewChange {
    /// The view that is to begin.
    pub view: View,
    /// By which the epoch began that its author is in.
    pub attempt: AttemptId,
    /// Where that epoch began: everything up to here is decided for its author.
    pub began: Sequence,
    /// The sender's last certificate; none before the first.
    pub stable: Option<Certificate>,
    /// For each sequence number after both at which the sender prepared a batch in this epoch: the votes of the
    /// highest view in which it did.
    pub prepared: Vec<QuorumProof<Prepare>>,
}
impl Tagged for ViewChange {
    const TAG: &'static str = "kds.view-change";
}
impl Statement for ViewChange {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

impl ViewChange {
    /// Everything up to here is decided.
    pub fn low(&self) -> Sequence {
        self.stable.as_ref().map_or(self.began, |stable| stable.statement.sequence.max(self.began))
    }
    /// Checks every certificate and proof in it. What is nested in it is as fresh as it is itself: proofs are of
    /// its own epoch, and its certificate of no later one.
    fn check(&self, keyring: &mut Keyring) -> Result<(), MessageError> {
        if let Some(stable) = &self.stable {
            if stable.statement.attempt() > self.attempt {
                return Err(MessageError::BadViewChange);
            }
            stable.verify(keyring)?;
        }
        let low = self.low().0;
        let mut previous = low;
        for proof in &self.prepared {
            let slot = proof.statement.0;
            // In order, each place once, between the watermarks, from an earlier view.
            let placed = slot.sequence.0 > previous && slot.sequence.0 <= low.saturating_add(WINDOW);
            if !placed || slot.view >= self.view || slot.attempt != self.attempt {
                return Err(MessageError::BadViewChange);
            }
            previous = slot.sequence.0;
            proof.verify(keyring)?;
        }
        Ok(())
    }
}

/// q view changes: the view begins, with what they call for (PBFT §4.4).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewView {
    /// The view that begins.
    pub view: View,
    /// By which the epoch began in which it does.
    pub attempt: AttemptId,
    /// View changes of q servers, all made in that epoch, with the certificates of the keys that signed them.
    pub view_changes: Vec<(Signed<ViewChange>, KeyCertificate)>,
}
impl Tagged for NewView {
    const TAG: &'static str = "kds.new-view";
}
impl Statement for NewView {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

impl NewView {
    /// Where its epoch began, by all its view changes.
    pub fn began(&self) -> Option<Sequence> {
        self.view_changes.first().map(|(change, _)| change.body.began)
    }
    /// Checks that q different servers changed to this view, with everything they say.
    fn check(&self, keyring: &mut Keyring) -> Result<(), MessageError> {
        let thresholds = keyring.manifest().thresholds;
        if self.view_changes.len() != thresholds.q() {
            return Err(MessageError::BadNewView);
        }
        let mut servers = ServerSet::default();
        for (change, key) in &self.view_changes {
            let known = keyring.manifest().server(change.server).is_some();
            let ViewChange { view, attempt, began, .. } = change.body;
            let together = (view, attempt) == (self.view, self.attempt) && Some(began) == self.began();
            if !known || !servers.insert(change.server) || !together {
                return Err(MessageError::BadNewView);
            }
            let carried = keyring.carried(&[*key])?;
            keyring.verify_with(&carried, change.server, &change.body, &change.signature)?;
            change.body.check(keyring)?;
        }
        Ok(())
    }
}

/// How far a replica is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its view.
    pub view: View,
    /// Whether that view has begun for it.
    pub active: bool,
    /// The last batch it executed.
    pub executed: Sequence,
    /// The last batch it has a certificate for.
    pub certified: Sequence,
    /// Its state is wrong: batches are of no use to it.
    pub wants_state: bool,
    /// Changes of the membership that it knows.
    pub changes: u32,
    /// By which the epoch began whose key it has: an old one if it slept.
    pub attempt: AttemptId,
}
impl Tagged for Status {
    const TAG: &'static str = "kds.status";
}
impl Statement for Status {
    fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// A signed statement with the certificate of its key, for somebody who may not know the key.
pub type Evidence<T> = (Signed<T>, KeyCertificate);

/// What a server holds of another one's newest signatures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Witness {
    /// The question that this answers.
    pub boot: u64,
    /// What the one that answers has executed.
    pub executed: Sequence,
    /// The view that it is in.
    pub view: View,
    /// Its last certificate.
    pub certificate: Option<Certificate>,
    /// The asker's prepare votes for the highest sequence number, and of the last view; at most two.
    pub prepares: Vec<Evidence<Prepare>>,
    /// The same of its commit votes.
    pub commits: Vec<Evidence<Commit>>,
    /// The asker's last view change.
    pub view_change: Option<Evidence<ViewChange>>,
}

impl Witness {
    fn check(&self, keyring: &mut Keyring) -> Result<(), MessageError> {
        fn holds<'a, T: Statement + 'a>(
            evidence: impl IntoIterator<Item = &'a Evidence<T>>,
            keyring: &mut Keyring,
        ) -> Result<(), MessageError> {
            for (signed, key) in evidence {
                if keyring.manifest().server(signed.server).is_none() {
                    return Err(KeyError::UnknownServer(signed.server).into());
                }
                // It may be long ago: the asker judges that.
                let carried = keyring.carried(&[*key])?;
                keyring.verify_with(&carried, signed.server, &signed.body, &signed.signature)?;
            }
            Ok(())
        }
        if let Some(certificate) = &self.certificate {
            certificate.verify(keyring)?;
        }
        if self.prepares.len() > 2 || self.commits.len() > 2 {
            return Err(MessageError::TooManyVotes);
        }
        holds(&self.prepares, keyring)?;
        holds(&self.commits, keyring)?;
        // What it says about others does not matter here, only that its author left a view.
        holds(&self.view_change, keyring)
    }
}

/// A question for parts of the state under a certified root.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AskParts {
    /// Of which batch's state.
    pub sequence: Sequence,
    /// Its root.
    pub root: Hash,
    /// Names the question in its answer.
    pub question: u64,
    /// Which parts; at most [`MAX_PARTS`].
    pub parts: Vec<WantedPart>,
}

/// Parts of a state, in the order of the question; not all of them if they are large, and none if the
/// sender does not have that state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Parts {
    /// The question that this answers.
    pub question: u64,
    /// The parts.
    pub parts: Vec<Vec<PartItem>>,
}

/// A dealer's contributions, as far as their receiver may know them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandedOut {
    /// To which attempt.
    pub attempt: AttemptId,
    /// Whose.
    pub dealer: ServerId,
    /// The contributions. The dealer's commitment in the log shows whether they are right.
    pub dealing: Dealing,
}

/// A question for a dealer's contributions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedDealing {
    /// To which attempt.
    pub attempt: AttemptId,
    /// Whose.
    pub dealer: ServerId,
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
    /// See [`Suspect`].
    Suspect(Signed<Suspect>),
    /// See [`ViewChange`].
    ViewChange(Signed<ViewChange>),
    /// See [`NewView`]; also passed on by others than its author. The key is the author's.
    NewView(Box<Signed<NewView>>, KeyCertificate),
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
    ViewChange(Verified<ViewChange>),
    /// The view's primary shows q view changes.
    NewView(Verified<NewView>),
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
    /// A new view without q different view changes, or not from its primary.
    #[error("a new view is not justified by view changes of q servers")]
    BadNewView,
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
                CheckedMessage::ViewChange(change)
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
