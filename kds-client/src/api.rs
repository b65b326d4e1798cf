//! The JSON that servers and clients exchange over HTTPS, beside the self-proving answers of
//! [`quorum::answer`].

use quorum::ByteCount;
use quorum::answer::{PageAnswer, Receipt, RecordAnswer};
use quorum::certificate::Certificate;
use quorum::ids::{Epoch, Sequence, ServerId, Timestamp, View};
use quorum::membership::ChangeProof;
use quorum::ordering::Part;
use quorum::record::{Name, Record};
use quorum::state::SpaceAlarm;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Header of every answer of a server that knows of changes of the membership: how many. A hint.
pub const CHANGES_HEADER: &str = "kds-membership";

/// The answer to `GET /v1/membership?from=N`: changes from number N on, in order, and not all of them if they
/// are many.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MembershipAnswer {
    /// Each with what shows it.
    pub changes: Vec<Arc<ChangeProof>>,
}

/// An error as RFC 9457 describes it. `kind` is stable; scripts may rely on it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:kds:` and a [`ProblemKind`].
    #[serde(rename = "type")]
    pub kind: String,
    /// What happened, in a few words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened here, and what to do about it.
    pub detail: String,
    /// If a request was executed and refused: the proof of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Box<Receipt>>,
    /// If a record was looked up and is absent: the proof of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Box<RecordAnswer>>,
}

macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident = ($status:literal, $slug:literal, $title:literal);)*) => {
        /// What can go wrong, each with its HTTP status.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum ProblemKind { $($(#[$doc])* $name,)* }
        impl ProblemKind {
            /// The HTTP status.
            pub fn status(self) -> u16 {
                match self { $(Self::$name => $status,)* }
            }
            /// The stable `type`.
            pub fn uri(self) -> &'static str {
                match self { $(Self::$name => concat!("urn:kds:", $slug),)* }
            }
            /// What happened, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }
            /// From the stable `type`.
            pub fn from_uri(uri: &str) -> Option<Self> {
                match uri { $(concat!("urn:kds:", $slug) => Some(Self::$name),)* _ => None }
            }
        }
    };
}
problems! {
    /// Not what the route expects.
    Malformed = (400, "malformed", "malformed request");
    /// Executed and refused: breaks a rule.
    Invalid = (400, "invalid", "invalid request");
    /// Its expiry lies before the agreed time, or too far ahead.
    Expiry = (400, "expiry", "unusable expiry");
    /// The signature does not hold.
    BadSignature = (401, "bad-signature", "bad signature");
    /// A key that may not do this.
    NotAllowed = (403, "not-allowed", "not allowed");
    /// More than its owner may leave in the state.
    OverQuota = (403, "over-quota", "over quota");
    /// Nothing there.
    NotFound = (404, "not-found", "not found");
    /// No such route.
    NoRoute = (404, "no-route", "no such route");
    /// Wrong method.
    Method = (405, "method", "method not allowed");
    /// Another change came first, or the name is taken.
    Conflict = (409, "conflict", "conflict");
    /// Sealed to keys that are gone.
    EpochPassed = (409, "epoch-passed", "epoch passed");
    /// Too large.
    TooLarge = (413, "too-large", "too large");
    /// Too many requests.
    TooMany = (429, "too-many", "too many requests");
    /// A defect of the server.
    Internal = (500, "internal", "internal error");
    /// Not ready, or no quorum in time.
    NotReady = (503, "not-ready", "not ready");
    /// More than the state may take in all.
    NoSpace = (507, "no-space", "no space");
}

/// Version and certified sequence number alone, for a server of a row that need not repeat the
/// whole answer. Trusted as the statement of this one server, over TLS pinned to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BriefAnswer {
    /// The record's version; 0 if there is none.
    pub version: u64,
    /// The last batch that this server has a certificate for.
    pub certified: Sequence,
}

/// Many names at once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BulkQuestion {
    /// Names whose records are wanted with their proofs.
    pub names: Vec<Name>,
    /// Names whose versions alone are wanted. At most [`quorum::limits::MAX_LOOKUP_NAMES`] together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub brief: Vec<Name>,
    /// A certificate that the client has: it need not be repeated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<KnownState>,
}

/// Which certified state a client knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownState {
    /// Its sequence number.
    pub sequence: Sequence,
    /// Its root: there should be no two of one sequence number, and more than f liars can make them.
    pub root: quorum::Hash,
}

impl KnownState {
    /// The state that a certificate is about.
    pub fn of(certificate: &Certificate) -> Self {
        Self { sequence: certificate.statement.sequence, root: certificate.statement.root }
    }
}

/// Answers under one certificate, in the order of the question.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BulkAnswer {
    /// Records or their absence.
    pub records: Vec<quorum::answer::Proved<Record>>,
    /// Versions of the names that were asked for briefly; 0 where there is no record.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub versions: Vec<u64>,
    /// The last batch that this server has a certificate for.
    pub certified: Sequence,
    /// q signatures on the root; left out if the client has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Arc<Certificate>>,
    /// Up to where writes are known to be complete; a hint.
    pub complete: Sequence,
}

/// History of a name: the current version, and earlier ones as a page.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HistoryAnswer {
    /// The current version.
    pub current: RecordAnswer,
    /// Earlier versions, in order, under the same certificate.
    pub earlier: PageAnswer,
}

/// One event of a watch's stream: the record as it is now.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchMessage {
    /// With its proof.
    pub answer: RecordAnswer,
}

/// How far a server's fetching of a state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferStatus {
    /// The sequence number of the state.
    pub target: Sequence,
    /// Entries that came from others.
    pub entries: u64,
    /// Parts known to be missing.
    pub missing_parts: u64,
}

/// Something that is wrong with a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TroubleKind {
    /// Writes to its database fail: it does not vote, and tries again for a while before it ends.
    Storage,
    /// Its disk is full: nothing is ordered there until there is room.
    DiskFull,
    /// Its signer does not answer: it has no keys for the next epoch.
    Signer,
    /// Secrets of an epoch that is over are not erased yet. It is tried again.
    NotErased,
    /// Its database was lost, damaged or an older copy. It recovers from the others.
    LostDatabase,
}

impl TroubleKind {
    /// In words.
    pub fn what(self) -> &'static str {
        match self {
            Self::Storage => {
                "the database cannot be written: this server has stopped voting, and tries again"
            }
            Self::DiskFull => "the disk is full",
            Self::Signer => "the signer does not answer: this server gets no keys for the next epoch",
            Self::NotErased => "secrets of an epoch that is over are not erased yet",
            Self::LostDatabase => {
                "the database was lost, damaged or an older copy: this server recovers from the others; look at its log \
                 and its disk"
            }
        }
    }
}

/// One thing that is wrong with a server, and since when by its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    /// What.
    pub kind: TroubleKind,
    /// Since when.
    pub since: Timestamp,
}

/// What all requests have left in the state, and may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// In bytes.
    pub used: u64,
    /// At most.
    pub quota: u64,
    /// What each owner may leave, unless she has a quota of her own.
    pub each: u64,
    /// Whether somebody should do something about it.
    pub alarm: Option<SpaceAlarm>,
}

impl SpaceStatus {
    /// What to do about an alarm, for people.
    pub fn warning(&self) -> Option<String> {
        let so_far = format!("{} of {} are used", ByteCount(self.used), ByteCount(self.quota));
        Some(match self.alarm? {
            SpaceAlarm::LowSpace => {
                format!(
                    "LOW SPACE: {so_far}: `kds-client admin set-quota --total` when servers have memory for more"
                )
            }
            SpaceAlarm::NoSpace => format!(
                "NO SPACE: {so_far}: owners can only revoke and delete until `kds-client admin set-quota --total` gives more"
            ),
        })
    }
}

/// How a server says that it is doing. Nothing of it is proved.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ServerStatus {
    /// Its place in the grid.
    pub id: ServerId,
    /// Row.
    pub row: u16,
    /// Column.
    pub column: u16,
    /// Its view.
    pub view: View,
    /// The last batch executed.
    pub sequence: Sequence,
    /// The last batch certified.
    pub certified: Sequence,
    /// The last batch known to be complete.
    pub complete: Sequence,
    /// The epoch.
    pub epoch: Epoch,
    /// Seconds since the shares were last renewed.
    pub last_refresh_seconds: Option<f64>,
    /// Secrets in the state.
    pub secrets: u64,
    /// Shares that it holds.
    pub shares: u64,
    /// Whether it is being recovered: behind what it has seen certified.
    pub recovering: bool,
    /// Whether it takes part in ordering, and if not, why.
    pub part: Part,
    /// What is wrong with it, worst first; nothing with a server that is well.
    #[serde(default)]
    pub troubles: Vec<Trouble>,
    /// What the state takes and may take; servers of older versions do not tell.
    #[serde(default)]
    pub space: Option<SpaceStatus>,
    /// The state that it fetches from others, if it does.
    pub transfer: Option<TransferStatus>,
    /// Peers that it has a link to.
    pub peers_connected: u16,
    /// What its clock says; servers of older versions do not tell.
    #[serde(default)]
    pub time: Option<Timestamp>,
    /// When it was started, by its clock; servers of older versions do not tell.
    #[serde(default)]
    pub started: Option<Timestamp>,
    /// Its program's version.
    pub version: String,
}
