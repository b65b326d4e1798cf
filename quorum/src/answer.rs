//! Answers that prove themselves, and the client's checks (design §5).
//!
//! A server answers with what it found, the path in the authenticated map that shows it, and the
//! certificate of the map's root. [`Verifier`] reads top-down as the checks that a client makes:
//! is the certificate real, is it fresh, does the path lead there, is it about what was asked.

use crate::certificate::{Certificate, Checkpoint, Completion, CompletionError, QuorumError};
use crate::codec::{decode, digest, encode, sha256};
use crate::evidence::{Evidence, EvidenceError, EvidenceFile, contradict};
use crate::ids::{Epoch, Sequence, ServerId, Timestamp};
use crate::limits::{CLOCK_BOUND_MS, MAX_ADMINISTRATORS, MAX_DECISIONS, MAX_SERVERS};
use crate::manifest::Manifest;
use crate::map::{Found, Hasher, Page, Proof, ProofError, Range, RangeProof, RangeProofError, Snapshot};
use crate::membership::{ChangeProof, Membership, MembershipError};
use crate::record::{Name, Record};
use crate::request::{Reply, RequestId};
use crate::signing::Keyring;
use crate::state::{Account, Owner, Pending, Release, Releases, Secret, ServerKeys, Space, layout};
use crate::{Blob, Hash, PublicKey};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
pub use shown::{Absence, Executed, Missing, Refusals, Refused, SaidAlike, Shown};
use std::collections::BTreeMap;
use std::sync::Arc;

mod shown;

/// An entry of the map, or its absence, with its path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proved<T> {
    /// The entry; none if there is none.
    pub value: Option<T>,
    /// The path that shows it.
    pub proof: Proof,
}

impl<T: Serialize + DeserializeOwned> Proved<T> {
    /// Looks a key up in a snapshot of this server's own.
    pub fn look_up(snapshot: &Snapshot, key: &[u8]) -> Self {
        let value = snapshot.get(key).and_then(|bytes| crate::codec::decode(bytes).ok());
        Self { value, proof: snapshot.prove(key) }
    }
    /// Checks that the map with this root holds exactly this under `key`.
    pub fn verify(&self, hasher: &Hasher, root: &Hash, key: &[u8]) -> Result<Option<&T>, AnswerError> {
        match (self.proof.verify(hasher, root, key)?, &self.value) {
            (Found::Absent, None) => Ok(None),
            (Found::Value(hash), Some(value)) if sha256(&encode(value)) == hash => Ok(Some(value)),
            _ => Err(AnswerError::OtherValue),
        }
    }
}

/// The answer to a lookup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordAnswer {
    /// The current version.
    pub current: Proved<Record>,
    /// The earlier version that was asked for, if one was.
    pub earlier: Option<Proved<Record>>,
    /// q signatures on the root.
    pub certificate: Arc<Certificate>,
    /// Up to where this server knows writes to be complete. A hint: it proves nothing.
    pub complete: Sequence,
}

/// The answer to a write: its stored reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    /// The client table's entry.
    pub reply: Proved<Reply>,
    /// q signatures on the root.
    pub certificate: Arc<Certificate>,
    /// Statements that show that the write is complete; none if it is not, yet.
    pub completion: Option<Arc<Completion>>,
}

/// A page of consecutive entries.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageAnswer {
    /// The entries and the proof that none is left out.
    pub range: RangeProof,
    /// q signatures on the root.
    pub certificate: Arc<Certificate>,
}

/// What is known of a secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretAnswer {
    /// Its metadata.
    pub secret: Proved<Secret>,
    /// Who was given it; there only if the secret is.
    pub releases: Option<Proved<Releases>>,
    /// q signatures on the root.
    pub certificate: Arc<Certificate>,
}

/// What the state takes and may take, and what of it is one owner's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpaceAnswer {
    /// All of it.
    pub space: Proved<Space>,
    /// What is known of the key that was asked for, if it owns names.
    pub owner: Proved<Owner>,
    /// What its owner's requests have left; there only if the key owns names.
    pub account: Option<Proved<Account>>,
    /// q signatures on the root.
    pub certificate: Arc<Certificate>,
}

/// A reader's question for a share, after her release was ordered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareQuestion {
    /// The secret.
    pub secret: Name,
    /// Number of the release.
    pub release: u64,
    /// Whether the ciphertext is wanted too.
    pub with_ciphertext: bool,
}

/// One server's share, sealed to the reader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareAnswer {
    /// The server.
    pub server: ServerId,
    /// The release that it is handed out under.
    pub release: Release,
    /// Index of the secret.
    pub index: u64,
    /// The share, sealed to the release's ephemeral key under a
    /// [`HandOutContext`](crate::sealing::HandOutContext); none if this server holds none.
    pub share: Option<Blob>,
    /// The ciphertext, if it was asked for.
    pub ciphertext: Option<Blob>,
}

/// A proof file: an answer with the question, to be checked offline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProofFile {
    /// Format of this file; 1.
    pub format: u32,
    /// The cluster that answered.
    pub cluster: Hash,
    /// The name asked for.
    pub name: Name,
    /// The version asked for, if one was.
    pub version: Option<u64>,
    /// What it answered.
    pub answer: RecordAnswer,
    /// Servers that were given another identity since the manifest, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub membership: Vec<Arc<ChangeProof>>,
}

/// The page that holds all that servers announced: its prefix, and entries that it has at most.
pub const SERVERS_PAGE: (&[u8], usize) = (layout::SERVERS, MAX_SERVERS);
/// The page that holds all administrators.
pub const ADMINISTRATORS_PAGE: (&[u8], usize) = (layout::ADMINISTRATORS, MAX_ADMINISTRATORS + 1);
/// The page that holds all decisions that are not made yet.
pub const DECISIONS_PAGE: (&[u8], usize) = (layout::DECISIONS, MAX_DECISIONS + 1);

/// Format that this version reads and writes.
pub const PROOF_FORMAT: u32 = 1;

/// Why an answer is not accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// The certificate.
    #[error("the certificate does not hold: {0}")]
    Certificate(#[from] QuorumError),
    /// The path.
    #[error("{0}")]
    Path(#[from] ProofError),
    /// The page.
    #[error("{0}")]
    Page(#[from] RangeProofError),
    /// The value does not have the digest that the path leads to.
    #[error("the value is not the one in the certified state")]
    OtherValue,
    /// A record of another name, or another version.
    #[error("the answer is about something else than what was asked for")]
    OtherQuestion,
    /// Too old to be relied on.
    #[error("the certificate is {age_ms} ms old, and at most {max_age_ms} ms are accepted")]
    TooOld {
        /// By the client's clock.
        age_ms: u64,
        /// What the client accepts.
        max_age_ms: u64,
    },
    /// From the future: somebody's clock is wrong, and q servers agree on this one.
    #[error("the certificate is {ahead_ms} ms ahead of this machine's clock, which seems to be slow")]
    FromTheFuture {
        /// By the client's clock.
        ahead_ms: u64,
    },
    /// Less than what this client has seen before.
    #[error("the answer is older than what was seen before (version {got} after {seen})")]
    Backwards {
        /// The version that it proves; 0 for absence.
        got: u64,
        /// The version that was seen.
        seen: u64,
    },
    /// From before what is known to be complete.
    #[error("the answer is from sequence number {got}, and the state is at {current} or later")]
    Behind {
        /// Its certificate's sequence number.
        got: Sequence,
        /// What has to be there at least.
        current: Sequence,
    },
    /// More than f servers signed two statements that do not fit together.
    #[error(
        "servers signed another state at sequence number {sequence} as well: more of them are faulty than this cluster survives"
    )]
    Contradiction {
        /// Where.
        sequence: Sequence,
    },
    /// A certificate that this client is said to have, and does not.
    #[error("the certificate is left out, and is not known here")]
    NoCertificate,
    /// Statements of completeness.
    #[error("the statements of completeness do not hold: {0}")]
    Completion(#[from] CompletionError),
    /// Changes of the membership.
    #[error("{0}")]
    Membership(#[from] MembershipError),
    /// A proof file of another format.
    #[error("proof format {0} is not known to this version (it reads {PROOF_FORMAT})")]
    Format(u32),
    /// A proof file of another cluster.
    #[error("the proof is of another cluster than the manifest")]
    OtherCluster,
}

/// Certificates that a verifier remembers having checked.
const REMEMBERED_CERTIFICATES: usize = 256;

/// Checks answers against a manifest. Remembers keys and certificates that it has checked, so that
/// further answers under the same root cost hashes only.
#[derive(Clone, Debug)]
pub struct Verifier {
    keyring: Keyring,
    hasher: Hasher,
    checked: BTreeMap<Sequence, Arc<Certificate>>,
    complete: Sequence,
    evidence: Option<Evidence>,
}

impl Verifier {
    /// Trusts the manifest and nothing else.
    pub fn new(manifest: Arc<Manifest>) -> Self {
        let hasher = Hasher::new(manifest.cluster_id());
        let keyring = Keyring::new(manifest);
        Self { keyring, hasher, checked: BTreeMap::new(), complete: Sequence(0), evidence: None }
    }
    /// Who the servers are, as far as was shown.
    pub fn membership(&self) -> &Arc<Membership> {
        self.keyring.membership()
    }
    /// Follows changes of the membership.
    ///
    /// # Errors
    /// At the first that does not hold; nothing is believed of any of them then.
    pub fn follow(&mut self, proofs: &[Arc<ChangeProof>]) -> Result<(), MembershipError> {
        let followed = self.membership().follow(proofs.iter().cloned())?;
        self.keyring.follow(&followed);
        Ok(())
    }
    /// Everything up to here is complete, as far as was shown.
    pub fn complete(&self) -> Sequence {
        self.complete
    }
    /// Whether q servers signed this; gives back the first certificate of the same statement that was
    /// checked, whose votes are known to be good. Two that contradict each other, which takes more than f
    /// liars, are not accepted: they are kept as evidence.
    pub fn certificate(&mut self, certificate: &Arc<Certificate>) -> Result<Arc<Certificate>, AnswerError> {
        let statement = &certificate.statement;
        if let Some(known) = self.checked.get(&statement.sequence)
            && known.statement == *statement
        {
            return Ok(Arc::clone(known));
        }
        certificate.verify(&mut self.keyring)?;
        let before = self.checked.range(..=statement.sequence).next_back();
        let after = self.checked.range(statement.sequence..).next();
        let other = before.into_iter().chain(after).map(|(_, known)| known);
        if let Some(other) = other.into_iter().find(|known| contradict(&known.statement, statement)) {
            let (first, second) =
                (Box::new(Certificate::clone(other)), Box::new(Certificate::clone(certificate)));
            self.evidence = Some(Evidence::Certificates { first, second });
            return Err(AnswerError::Contradiction { sequence: statement.sequence });
        }
        self.checked.insert(statement.sequence, Arc::clone(certificate));
        if self.checked.len() > REMEMBERED_CERTIFICATES {
            self.checked.pop_first();
        }
        Ok(Arc::clone(certificate))
    }
    /// The certificate of a sequence number, if it was checked lately.
    pub fn known(&self, sequence: Sequence) -> Option<Arc<Certificate>> {
        self.checked.get(&sequence).cloned()
    }
    /// The newest certificate that was checked.
    pub fn newest(&self) -> Option<&Arc<Certificate>> {
        self.checked.last_key_value().map(|(_, certificate)| certificate)
    }
    /// Certificates that contradict each other, if any were seen.
    pub fn take_evidence(&mut self) -> Option<Evidence> {
        self.evidence.take()
    }
    /// Who is shown to be faulty by a file of evidence.
    pub fn evidence_file(&mut self, file: &EvidenceFile) -> Result<Vec<ServerId>, EvidenceError> {
        self.follow(&file.membership)?;
        file.culprits(&mut self.keyring)
    }
    /// Whether a certified statement is as fresh as the client demands, by the client's clock.
    pub fn fresh(statement: &Checkpoint, now: Timestamp, max_age_ms: u64) -> Result<(), AnswerError> {
        let time = statement.time;
        let ahead_ms = time.since_ms(now);
        if ahead_ms > CLOCK_BOUND_MS.saturating_add(max_age_ms) {
            return Err(AnswerError::FromTheFuture { ahead_ms });
        }
        let age_ms = now.since_ms(time);
        if age_ms > max_age_ms {
            return Err(AnswerError::TooOld { age_ms, max_age_ms });
        }
        Ok(())
    }
    /// Takes note of what is complete. What is said under keys of epochs that are over may be said by a thief,
    /// and counts for nothing.
    pub fn completion(&mut self, completion: &Completion) -> Result<(), AnswerError> {
        let current = self.newest().map_or(Epoch(0), |newest| newest.statement.epoch);
        if completion.sequence > self.complete {
            let oldest = completion.verify(&mut self.keyring)?;
            if oldest.next() >= current {
                self.complete = completion.sequence;
            }
        }
        Ok(())
    }
    /// The record of a name that an answer proves, or that there is none.
    pub fn record(
        &mut self,
        answer: &RecordAnswer,
        name: &Name,
        version: Option<u64>,
    ) -> Result<Shown<Record>, AnswerError> {
        self.certificate(&answer.certificate)?;
        let at = answer.certificate.statement;
        let current = answer.current.verify(&self.hasher, &at.root, &layout::name_key(name))?;
        // The state machine never stores a record elsewhere, but nothing is lost by looking.
        if current.is_some_and(|record| record.name != *name) {
            return Err(AnswerError::OtherQuestion);
        }
        // Nothing stays in an answer that was not asked for, and so not checked.
        let is_current = |version| current.is_some_and(|current| current.version == version);
        if version.is_none_or(is_current) && answer.earlier.is_some() {
            return Err(AnswerError::OtherQuestion);
        }
        let (found, missing) = match (version, current) {
            (None, current) => (current, Missing::Name(name.clone())),
            (Some(version), Some(current)) if current.version == version => {
                return Ok(Shown::There(current.clone()));
            }
            (Some(version), _) => {
                let earlier = answer.earlier.as_ref().ok_or(AnswerError::OtherQuestion)?;
                let found = earlier.verify(&self.hasher, &at.root, &layout::history_key(name, version))?;
                if found.is_some_and(|record| record.name != *name || record.version != version) {
                    return Err(AnswerError::OtherQuestion);
                }
                (found, Missing::Version(name.clone(), version))
            }
        };
        Ok(found.cloned().map_or_else(|| Shown::Absent(Absence::new(missing, at)), Shown::There))
    }
    /// That a request was executed, or that a state is shown that has no reply of it.
    pub fn executed(&mut self, receipt: Receipt, id: RequestId) -> Result<Shown<Executed>, AnswerError> {
        self.certificate(&receipt.certificate)?;
        let at = receipt.certificate.statement;
        let reply = receipt.reply.verify(&self.hasher, &at.root, &layout::reply_key(id))?;
        let Some(reply) = reply.cloned() else {
            return Ok(Shown::Absent(Absence::new(Missing::Reply(id), at)));
        };
        let receipt = self.kept(receipt)?;
        let complete = self.complete >= reply.sequence;
        Ok(Shown::There(Executed::new(reply, receipt, complete)))
    }
    /// A receipt to keep and to show to others: nothing stays in it that was not checked. What is known of a
    /// statement is believed whoever signs it once more, so votes on it may be anything.
    pub(crate) fn kept(&mut self, mut receipt: Receipt) -> Result<Receipt, AnswerError> {
        receipt.certificate = self.certificate(&receipt.certificate)?;
        if let Some(completion) = &receipt.completion {
            completion.verify(&mut self.keyring)?;
            self.completion(completion)?;
        }
        Ok(receipt)
    }
    fn range(&mut self, answer: &PageAnswer, page: &Page<'_>) -> Result<Range, AnswerError> {
        self.certificate(&answer.certificate)?;
        Ok(answer.range.verify(&self.hasher, &answer.certificate.statement.root, page)?)
    }
    /// The entries of a page, decoded, and where the listing goes on if it does. Each has to stand under its
    /// own key, as `key_of` says.
    pub fn page<T: DeserializeOwned>(
        &mut self,
        answer: &PageAnswer,
        page: &Page<'_>,
        key_of: impl Fn(&T) -> Vec<u8>,
    ) -> Result<(Vec<T>, Option<Vec<u8>>), AnswerError> {
        let range = self.range(answer, page)?;
        let decoded = range.entries.iter().map(|(key, value)| match decode::<T>(value) {
            Ok(entry) if key_of(&entry) == *key => Ok(entry),
            _ => Err(AnswerError::OtherValue),
        });
        Ok((decoded.collect::<Result<_, _>>()?, range.until))
    }
    /// All entries that begin with a prefix, of which there are at most so many.
    fn all<T: DeserializeOwned>(
        &mut self,
        answer: &PageAnswer,
        (prefix, most): (&[u8], usize),
        key_of: impl Fn(&T) -> Vec<u8>,
    ) -> Result<Vec<T>, AnswerError> {
        let end = layout::prefix_end(prefix);
        match self.page(answer, &Page::new(prefix, &end, most), key_of)? {
            (entries, None) => Ok(entries),
            (_, Some(_)) => Err(AnswerError::Page(RangeProofError::Omits)),
        }
    }
    /// What servers announced, by server.
    pub fn server_keys(&mut self, answer: &PageAnswer) -> Result<Vec<ServerKeys>, AnswerError> {
        self.all(answer, SERVERS_PAGE, |keys: &ServerKeys| layout::server_key(keys.sealing.statement.server))
    }
    /// The administrators.
    pub fn administrators(&mut self, answer: &PageAnswer) -> Result<Vec<PublicKey>, AnswerError> {
        let (from, most) = ADMINISTRATORS_PAGE;
        let end = layout::prefix_end(from);
        let range = self.range(answer, &Page::new(from, &end, most))?;
        if range.until.is_some() {
            return Err(AnswerError::Page(RangeProofError::Omits));
        }
        let keys = range.entries.iter().map(|(key, _)| layout::parse_administrator(key));
        keys.collect::<Option<_>>().ok_or(AnswerError::OtherValue)
    }
    /// What some administrators ask for, and not yet enough of them.
    pub fn decisions(&mut self, answer: &PageAnswer) -> Result<Vec<Pending>, AnswerError> {
        let cluster = *self.keyring.cluster();
        let key_of = |pending: &Pending| layout::decision_key(&digest(&cluster, &pending.decision));
        self.all(answer, DECISIONS_PAGE, key_of)
    }
    /// A secret's metadata and releases, or that there is none of that name.
    pub fn secret(
        &mut self,
        answer: &SecretAnswer,
        name: &Name,
    ) -> Result<Shown<(Secret, Releases)>, AnswerError> {
        self.certificate(&answer.certificate)?;
        let at = answer.certificate.statement;
        let secret = answer.secret.verify(&self.hasher, &at.root, &layout::secret_key(name))?;
        let Some(secret) = secret else {
            return Ok(Shown::Absent(Absence::new(Missing::Secret(name.clone()), at)));
        };
        let releases = answer.releases.as_ref().ok_or(AnswerError::OtherQuestion)?;
        let releases = releases.verify(&self.hasher, &at.root, &layout::releases_key(secret.index))?;
        Ok(Shown::There((secret.clone(), releases.cloned().unwrap_or_default())))
    }
    /// What the state takes, and what of it is a key's, if that owns names.
    pub fn space(
        &mut self,
        answer: &SpaceAnswer,
        key: &PublicKey,
    ) -> Result<(Space, Option<(Owner, Account)>), AnswerError> {
        self.certificate(&answer.certificate)?;
        let (hasher, root) = (&self.hasher, &answer.certificate.statement.root);
        let space = answer.space.verify(hasher, root, layout::SPACE)?.copied().unwrap_or_default();
        let owner = answer.owner.verify(hasher, root, &layout::owner_key(key))?;
        let account = match (owner, &answer.account) {
            (None, None) => return Ok((space, None)),
            (Some(owner), Some(account)) => {
                account.verify(hasher, root, &layout::account_key(&owner.account))?
            }
            _ => return Err(AnswerError::OtherQuestion),
        };
        Ok((space, owner.map(|owner| (*owner, account.copied().unwrap_or_default()))))
    }
    /// Checks a proof file offline: the record as of the certificate's time.
    pub fn proof_file(&mut self, file: &ProofFile) -> Result<Shown<Record>, AnswerError> {
        if file.format != PROOF_FORMAT {
            return Err(AnswerError::Format(file.format));
        }
        if file.cluster != self.keyring.cluster().0 {
            return Err(AnswerError::OtherCluster);
        }
        self.follow(&file.membership)?;
        self.record(&file.answer, &file.name, file.version)
    }
}

impl SpaceAnswer {
    /// Answers from a certified snapshot.
    pub fn look_up(snapshot: &Snapshot, certificate: &Arc<Certificate>, key: &PublicKey) -> Self {
        let owner = Proved::<Owner>::look_up(snapshot, &layout::owner_key(key));
        let account =
            owner.value.map(|owner| Proved::look_up(snapshot, &layout::account_key(&owner.account)));
        let space = Proved::look_up(snapshot, layout::SPACE);
        Self { space, owner, account, certificate: Arc::clone(certificate) }
    }
}

impl RecordAnswer {
    /// Answers from a certified snapshot.
    pub fn look_up(
        snapshot: &Snapshot,
        certificate: &Arc<Certificate>,
        complete: Sequence,
        name: &Name,
        version: Option<u64>,
    ) -> Self {
        let current = Proved::<Record>::look_up(snapshot, &layout::name_key(name));
        let is_current = |version| current.value.as_ref().is_some_and(|record| record.version == version);
        let earlier = version
            .filter(|version| !is_current(*version))
            .map(|version| Proved::look_up(snapshot, &layout::history_key(name, version)));
        Self { current, earlier, certificate: Arc::clone(certificate), complete }
    }
}
