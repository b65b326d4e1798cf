//! What clients ask for: signed requests, and what came of them (design §3, §4, §6).

use crate::bytes::{Blob, ByteCount, Element, Hash, PublicKey, SignatureBytes};
use crate::codec::{Tagged, digest, sha256};
use crate::ids::{AttemptId, ClusterId, Epoch, Sequence, ServerId, Timestamp};
use crate::membership::{ChangeProof, Replacement};
use crate::record::{Entry, Invalid, Name};
use crate::signing::{KeyCertificate, SignatureError, SigningKey, verify};
use serde::{Deserialize, Serialize};

/// Who may be given a secret.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reader {
    /// Whoever owns this name when she asks.
    Name(Name),
    /// The holder of this key.
    Key(PublicKey),
}

/// How much work a passphrase is stretched with (Argon2id, RFC 9106).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardness {
    /// Memory.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

/// What turns a passphrase into a data key, together with k servers (see [`oprf`](crate::oprf)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passphrase {
    /// Makes equal passphrases different.
    pub salt: [u8; 16],
    /// How the passphrase is stretched.
    pub hardness: Hardness,
    /// The public half of the key that the servers share.
    pub key: Element,
    /// Signs that a guess was right: it follows from the passphrase, and its private half is kept nowhere.
    pub opener: PublicKey,
    /// How many guesses there may be in a row that nobody shows to be right.
    pub guesses: u32,
}

/// A secret as it is deposited: useless without k servers (design §6).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deposit {
    /// Name of the secret, in a space of its own.
    pub name: Name,
    /// Who may change its readers' list by replacing it, and delete it; also a reader.
    pub owner: PublicKey,
    /// Who else may be given it; if it is behind a passphrase, who may try one: everyone if this is empty.
    pub readers: Vec<Reader>,
    /// Makes it a secret behind a passphrase. Its shares are of the key that the function is evaluated with,
    /// and never leave their servers.
    pub passphrase: Option<Passphrase>,
    /// The index of the secret that this one replaces.
    pub replaces: Option<u64>,
    /// The epoch whose sealing keys the shares are sealed to.
    pub epoch: Epoch,
    /// The material under the data key.
    pub ciphertext: Blob,
    /// Digest of the data key.
    pub commitment: Hash,
    /// Shares of the data key, or of the key of the function, one for each server in order, sealed to its
    /// sealing key.
    pub shares: Vec<Blob>,
}

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Operation {
    /// A new name, by an administrator.
    Register {
        /// The name.
        name: Name,
        /// Its first version.
        entry: Entry,
    },
    /// The next version of a name, by its owner or an administrator.
    Rotate {
        /// The name.
        name: Name,
        /// The version that this one follows.
        from_version: u64,
        /// What replaces it.
        entry: Entry,
    },
    /// Withdraws the current version, by its owner or an administrator. Final.
    Revoke {
        /// The name.
        name: Name,
        /// The version withdrawn.
        from_version: u64,
        /// Why.
        reason: String,
    },
    /// Deposits a secret.
    Deposit(Deposit),
    /// Asks for a secret's shares, for the record.
    Release {
        /// The secret's name.
        secret: Name,
        /// A fresh X25519 key that the shares are sealed to.
        ephemeral: PublicKey,
    },
    /// Removes a secret and its shares, by its owner.
    Delete {
        /// The secret's name.
        secret: Name,
    },
    /// A server's current keys, by the server.
    AnnounceKeys {
        /// Also the key that signs this request.
        voting: KeyCertificate,
        /// What clients seal shares to.
        sealing: KeyCertificate,
    },
    /// A step towards the next epoch, by a server.
    Step(Step),
    /// Tries a passphrase: has one element evaluated, for the record and counted.
    Guess {
        /// The secret's name.
        secret: Name,
        /// A fresh X25519 key that the results are sealed to.
        ephemeral: PublicKey,
        /// The blinded element.
        blinded: Element,
    },
    /// A guess was right, by the secret's opener.
    Unlocked {
        /// The secret's name.
        secret: Name,
        /// Number of the guess.
        release: u64,
    },
    /// An administrator asks for a decision; it is made when enough of them have.
    Decide(Decision),
    /// Puts on record what shows a change of the membership to those who were not there, by a server.
    Attest {
        /// The server, with its announced voting key.
        server: ServerId,
        /// What shows it.
        proof: Box<ChangeProof>,
    },
    /// Whether others may make this key the owner of what they deposit or hand over, by a key that owns a name.
    RefuseGifts {
        /// Whether they may not.
        refuse: bool,
    },
}

/// What administrators decide together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Decision {
    /// One more administrator.
    AddAdministrator {
        /// Her key.
        key: PublicKey,
    },
    /// One less.
    RemoveAdministrator {
        /// Her key.
        key: PublicKey,
    },
    /// A server's place is given to another identity, from the next epoch on.
    ReplaceIdentity {
        /// What takes its place.
        replacement: Replacement,
    },
    /// How much the state may take.
    SetQuota {
        /// Of what, and how much.
        quota: Quota,
    },
}

/// How much of the state something may take, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Quota {
    /// All of it.
    Total {
        /// So much.
        bytes: u64,
    },
    /// What each owner's requests leave there.
    Each {
        /// So much.
        bytes: u64,
    },
    /// What one owner's do.
    Owner {
        /// A key that owns a name.
        key: PublicKey,
        /// So much; none: as everyone's.
        bytes: Option<u64>,
    },
}

/// What a server contributes to agreeing on the next epoch (design §7). Signed with its announced voting
/// key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Step {
    /// It commits to its contributions.
    Deal {
        /// The dealer.
        server: ServerId,
        /// In which attempt.
        attempt: AttemptId,
        /// See [`Seeds::root`](crate::refresh::Seeds::root).
        root: Hash,
        /// Its voting key of that epoch.
        voting: Box<KeyCertificate>,
        /// Its sealing key of that epoch.
        sealing: Box<KeyCertificate>,
    },
    /// It holds these dealers' contributions, durably.
    Ack {
        /// The holder.
        server: ServerId,
        /// In which attempt.
        attempt: AttemptId,
        /// Whose; ascending, and all that it named before among them.
        dealers: Vec<ServerId>,
    },
    /// It holds everything that the epoch's seeds are made of, durably.
    Ready {
        /// The holder.
        server: ServerId,
        /// In which attempt.
        attempt: AttemptId,
        /// Whether it has its shares of the current epoch.
        whole: bool,
    },
    /// It lacks shares: let it recover them in the next epoch.
    Recover {
        /// Who.
        server: ServerId,
    },
}

impl Step {
    /// Who takes it.
    pub fn server(&self) -> ServerId {
        match self {
            Self::Deal { server, .. }
            | Self::Ack { server, .. }
            | Self::Ready { server, .. }
            | Self::Recover { server } => *server,
        }
    }
}

impl Operation {
    /// Whether a server asks, for itself.
    pub fn is_a_servers(&self) -> bool {
        matches!(self, Self::Step(_) | Self::AnnounceKeys { .. } | Self::Attest { .. })
    }
    /// The name whose record changes, if one does.
    pub fn name(&self) -> Option<&Name> {
        match self {
            Self::Register { name, .. } | Self::Rotate { name, .. } | Self::Revoke { name, .. } => Some(name),
            Self::Deposit(_)
            | Self::Release { .. }
            | Self::Delete { .. }
            | Self::Step(_)
            | Self::Guess { .. }
            | Self::Unlocked { .. }
            | Self::Decide(_)
            | Self::Attest { .. }
            | Self::RefuseGifts { .. }
            | Self::AnnounceKeys { .. } => None,
        }
    }
}

/// What a client signs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Who asks.
    pub client: PublicKey,
    /// Never used twice by this client: each number executes at most once.
    pub sequence: u64,
    /// Not executed after this agreed time.
    pub expiry: Timestamp,
    /// What is asked for.
    pub operation: Operation,
}
impl Tagged for Request {
    const TAG: &'static str = "kds.request";
}

/// A request with its signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedRequest {
    /// What is asked for.
    pub request: Request,
    /// By the client's key.
    pub signature: SignatureBytes,
}

impl SignedRequest {
    /// Signs a request; its `client` is set to the key's public half.
    pub fn sign(
        cluster: &ClusterId,
        key: &SigningKey,
        sequence: u64,
        expiry: Timestamp,
        operation: Operation,
    ) -> Self {
        let request = Request { client: key.public(), sequence, expiry, operation };
        Self { signature: key.sign(cluster, &request), request }
    }
    /// A request that was checked before this server wrote it to its log.
    pub(crate) fn trusted(self, cluster: &ClusterId) -> VerifiedRequest {
        VerifiedRequest { digest: digest(cluster, &self.request), signed: self }
    }
    /// Checks the signature.
    pub fn verify(self, cluster: &ClusterId) -> Result<VerifiedRequest, SignatureError> {
        verify(cluster, &self.request.client, &self.request, &self.signature)?;
        Ok(VerifiedRequest { digest: digest(cluster, &self.request), signed: self })
    }
}

/// A request whose signature has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedRequest {
    signed: SignedRequest,
    digest: Hash,
}

impl VerifiedRequest {
    /// What is asked for.
    pub fn request(&self) -> &Request {
        &self.signed.request
    }
    /// With its signature, to send on.
    pub fn signed(&self) -> &SignedRequest {
        &self.signed
    }
    /// What tells this request from another with the same number.
    pub fn digest(&self) -> Hash {
        self.digest
    }
    /// Whose turn it takes while it waits: the client's, or for a server's announcement or step the
    /// server's, which could otherwise be as many clients as it likes. So could one who guesses: all guesses
    /// at a secret wait in one line.
    pub fn queue(&self) -> PublicKey {
        match &self.signed.request.operation {
            Operation::AnnounceKeys { voting, .. } => PublicKey([voting.statement.server.0; 32]),
            Operation::Step(step) => PublicKey([step.server().0; 32]),
            Operation::Attest { server, .. } => PublicKey([server.0; 32]),
            Operation::Guess { secret, .. } => PublicKey(sha256(secret.as_str().as_bytes()).0),
            _ => self.signed.request.client,
        }
    }
    /// What the client table knows it by.
    pub fn id(&self) -> RequestId {
        RequestId { client: self.signed.request.client, sequence: self.signed.request.sequence }
    }
}

/// A client's key and its number: what executes at most once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestId {
    /// Who asked.
    pub client: PublicKey,
    /// Her number.
    pub sequence: u64,
}

/// What a request did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Done {
    /// The name has this version now.
    Record {
        /// The version made.
        version: u64,
    },
    /// The secret is deposited.
    Deposited {
        /// Its index.
        index: u64,
    },
    /// The servers may hand out shares of this secret to the request's ephemeral key.
    Released {
        /// The secret's index.
        index: u64,
        /// Number of the release.
        release: u64,
        /// Whose shares are handed out.
        epoch: Epoch,
    },
    /// The secret is gone.
    Deleted,
    /// The server's keys are on record.
    Announced,
    /// What shows a change of the membership is on record.
    Attested,
    /// The server's step counts.
    Stepped,
    /// The servers may evaluate the guess's blinded element.
    Guessed {
        /// The secret's index.
        index: u64,
        /// Number of the guess, among the secret's releases.
        release: u64,
        /// Whose shares it is evaluated with.
        epoch: Epoch,
        /// Guesses that are left after it.
        left: u32,
    },
    /// The guesses are counted from that one.
    Unlocked,
    /// More administrators have to ask for the same.
    Approved {
        /// How many have.
        approvals: u16,
        /// How many must.
        needed: u16,
    },
    /// Enough administrators asked for it, and so it is.
    Decided,
    /// What the key wants is on record.
    Noted,
}

/// Why a request did nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Refusal {
    /// The name is taken.
    #[error("the name exists already, at version {version}")]
    NameTaken {
        /// Its version.
        version: u64,
    },
    /// There is no such name.
    #[error("the name is not registered")]
    NoSuchName,
    /// Another change came first.
    #[error("another change came first: the name is at version {current}")]
    VersionConflict {
        /// Its version.
        current: u64,
    },
    /// The key may not do this.
    #[error("this key is not allowed to do that")]
    NotAllowed,
    /// The record is withdrawn.
    #[error("the record is revoked")]
    Revoked,
    /// Breaks a rule.
    #[error("{0}")]
    Invalid(Invalid),
    /// Sealed to keys of another epoch: seal again.
    #[error("the deposit is sealed to an epoch that is not current; the current one is {current}")]
    EpochPassed {
        /// The current epoch.
        current: Epoch,
    },
    /// There is no such secret.
    #[error("there is no such secret")]
    NoSuchSecret,
    /// The secret exists, and this deposit does not say that it replaces it.
    #[error("the secret exists already, with index {index}")]
    SecretTaken {
        /// Its index.
        index: u64,
    },
    /// Too many releases in a minute, or announcements in an interval, or the same step again.
    #[error("too many requests of this kind; try again later")]
    TooOften,
    /// It is not behind a passphrase.
    #[error("this secret is not behind a passphrase: its owner and readers get it with their keys")]
    NoPassphrase,
    /// It is behind a passphrase.
    #[error("this secret is behind a passphrase, and no key opens it")]
    OnlyByPassphrase,
    /// All guesses are used up.
    #[error("no guesses are left for this secret: nobody can open it any more; its owner can replace it")]
    NoGuessesLeft,
    /// Nothing to decide.
    #[error("that is so already")]
    AlreadySo,
    /// More than its owner may leave in the state.
    #[error(
        "over quota: this takes {}, and this owner uses {} of {}\n  delete secrets that are not needed, or have an \
         administrator set another quota (`kds-client admin set-quota`); versions of names stay for ever, and revoking \
         is always possible", ByteCount(*.needed), ByteCount(*.used), ByteCount(*.quota)
    )]
    OverQuota {
        /// What is used.
        used: u64,
        /// What may be.
        quota: u64,
        /// How much this would take.
        needed: u64,
    },
    /// More than the state may take in all.
    #[error(
        "no space: this takes {}, and the cluster uses {} of the {} that are there for this key's requests\n  delete secrets \
         that are not needed, or have the administrators set another quota (`kds-client admin set-quota`); revoking is \
         always possible", ByteCount(*.needed), ByteCount(*.used), ByteCount(*.quota)
    )]
    NoSpace {
        /// What is used.
        used: u64,
        /// What may be, by such a key.
        quota: u64,
        /// How much this would take.
        needed: u64,
    },
    /// It owns no name.
    #[error("this key owns no name: who owns one, and administrators, have space for secrets")]
    OwnsNoName,
    /// The new owner does not want it.
    #[error(
        "the key that is to own this takes nothing from others: its owner has to deposit or ask for it herself"
    )]
    GiftRefused,
}

/// The outcome of an executed request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Outcome {
    /// Done.
    Done(Done),
    /// Nothing changed.
    Refused(Refusal),
}

/// The client table's entry: the stored reply (PBFT §4.1, exactly once).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reply {
    /// Digest of the request that executed under this number.
    pub request: Hash,
    /// The batch it executed in.
    pub sequence: Sequence,
    /// The entry goes when agreed time passes this; the request cannot execute afterwards.
    pub expiry: Timestamp,
    /// What came of it.
    pub outcome: Outcome,
}
