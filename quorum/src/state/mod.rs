//! The state machine: a pure function of (state, agreed time, operation) (design §4).
//!
//! Everything lives in one authenticated map ([`layout`]), so one root commits to all of it:
//! names and their history, secrets and their releases, administrators, servers' keys, and the
//! client table that makes every request execute at most once. Beside the map there are only
//! indices that can be rebuilt from it.

mod clients;
mod decisions;
pub(crate) mod epochs;
mod guesses;
pub mod layout;
mod names;
mod replacements;
mod secrets;
mod server_keys;
mod space;

pub use decisions::Pending;
pub use epochs::{Attempt, Deal, Epochs};
pub use layout::Lookup;
pub use secrets::{Release, Releases, SealedShares, Secret, data_key_commitment};
pub use server_keys::ServerKeys;
pub use space::{Account, Owner, Space, SpaceAlarm};

use crate::bytes::PublicKey;
use crate::certificate::Checkpoint;
use crate::codec::{decode, encode};
use crate::ids::{AttemptId, ClusterId, Epoch, Sequence, Timestamp};
use crate::manifest::Manifest;
use crate::map::{Map, Snapshot};
use crate::membership::{Change, ChangeProof, Membership};
use crate::message::CheckedBatch;
use crate::request::{Operation, Outcome, Refusal, Request, RequestId, VerifiedRequest};
use crate::signing::Statement as _;
use clients::ClientIndex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Something that execution leaves to the server that executes: shares are not replicated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Open this server's share of the deposit that `request` made.
    Deposited {
        /// Index of the secret.
        index: u64,
        /// Who deposited it, under which number.
        id: RequestId,
    },
    /// Erase the shares of this secret.
    Erased {
        /// Index of the secret.
        index: u64,
    },
    /// This attempt has succeeded: an epoch has begun, or a server may recover its shares.
    Sealed(Box<Attempt>),
}

/// What executing a batch led to.
#[derive(Clone, Debug)]
pub struct Executed {
    /// What this replica signs.
    pub checkpoint: Checkpoint,
    /// The state after it.
    pub snapshot: Snapshot,
    /// The requests of the batch that have a reply now, whether by this batch or an earlier one.
    pub replied: Vec<RequestId>,
    /// What is left to do for this server, with the place of the request in the batch.
    pub events: Vec<(usize, Event)>,
}

/// The replicated state.
#[derive(Clone)]
pub struct State {
    manifest: Arc<Manifest>,
    membership: Arc<Membership>,
    cluster: ClusterId,
    map: Map,
    sequence: Sequence,
    time: Timestamp,
    /// The attempt by which the epoch began, and the last batch before it.
    attempt: AttemptId,
    began: Sequence,
    clients: ClientIndex,
    changed: BTreeSet<Vec<u8>>,
}

/// An entry of the map that differs from what was last written to disk; none if it is gone.
pub type Leaf = (Vec<u8>, Option<Arc<[u8]>>);

/// What a stored state must contain to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// An entry that this version cannot read.
    #[error("an entry of the stored state is damaged")]
    Damaged,
    /// The entries do not add up to the root that was stored with them.
    #[error("the stored state does not have the root that was stored with it")]
    WrongRoot,
}

impl State {
    /// The state before the first batch, as the manifest describes it.
    pub fn genesis(manifest: Arc<Manifest>) -> Self {
        let cluster = manifest.cluster_id();
        let mut state = Self {
            cluster,
            map: Map::new(cluster),
            sequence: Sequence(0),
            time: Timestamp(0),
            attempt: AttemptId::default(),
            began: Sequence(0),
            clients: ClientIndex::default(),
            changed: BTreeSet::new(),
            membership: Membership::genesis(Arc::clone(&manifest)),
            manifest,
        };
        for administrator in state.manifest.administrators.clone() {
            state.put(layout::administrator(&administrator), &());
        }
        // On record from the start: servers of different versions must not differ about it.
        state.put(layout::SPACE.to_vec(), &Space::default());
        state
    }

    /// The state after batch `checkpoint.sequence`, from its entries.
    pub fn restore(
        manifest: Arc<Manifest>,
        checkpoint: Checkpoint,
        mut map: Map,
    ) -> Result<Self, RestoreError> {
        let cluster = manifest.cluster_id();
        if map.seal().root() != checkpoint.root {
            return Err(RestoreError::WrongRoot);
        }
        let mut clients = ClientIndex::default();
        for (key, value) in map.iter_prefix(layout::REPLIES) {
            let id = layout::parse_reply(key).ok_or(RestoreError::Damaged)?;
            let reply: crate::request::Reply = decode(value).map_err(|_| RestoreError::Damaged)?;
            clients.add(id, reply.expiry);
        }
        let epochs = layout::epochs(&map).unwrap_or_default();
        if epochs.attempt_id() != checkpoint.attempt() {
            return Err(RestoreError::Damaged);
        }
        Ok(Self {
            cluster,
            sequence: checkpoint.sequence,
            time: checkpoint.time,
            attempt: epochs.attempt_id(),
            began: epochs.began,
            clients,
            changed: BTreeSet::new(),
            membership: membership(Arc::clone(&manifest), &map)?,
            map,
            manifest,
        })
    }

    /// The last batch executed.
    pub fn sequence(&self) -> Sequence {
        self.sequence
    }
    /// Agreed time of that batch.
    pub fn time(&self) -> Timestamp {
        self.time
    }
    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        self.attempt.epoch
    }
    /// The attempt by which it began: only keys certified for that count in it.
    pub fn attempt(&self) -> AttemptId {
        self.attempt
    }
    /// The last batch of the epoch before: whatever lies after it lies in this epoch, as far as it is executed.
    pub fn began(&self) -> Sequence {
        self.began
    }
    /// Who the servers are, as decided so far.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }
    /// The entries.
    pub fn map(&self) -> &Map {
        &self.map
    }
    /// Hashes what changed and says what a replica would sign now.
    pub fn seal(&mut self) -> (Checkpoint, Snapshot) {
        let snapshot = self.map.seal();
        let (sequence, root, time) = (self.sequence, snapshot.root(), self.time);
        let AttemptId { epoch, attempt } = self.attempt;
        (Checkpoint { sequence, root, time, epoch, attempt }, snapshot)
    }
    /// The entries that changed since this was last asked.
    pub fn take_changes(&mut self) -> Vec<Leaf> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|key| (self.map.get(&key).cloned(), key))
            .map(|(value, key)| (key, value))
            .collect()
    }

    /// The same, as of an earlier state: what changed after that is told the next time.
    pub fn take_changes_until(&mut self, earlier: &Snapshot) -> Vec<Leaf> {
        let changed = std::mem::take(&mut self.changed);
        let leaves: Vec<Leaf> = changed
            .into_iter()
            .map(|key| (earlier.get(&key).cloned(), key))
            .map(|(value, key)| (key, value))
            .collect();
        let since = leaves.iter().filter(|(key, value)| self.map.get(key) != value.as_ref());
        self.changed = since.map(|(key, _)| key.clone()).collect();
        leaves
    }

    /// Executes the next batch (PBFT §4.2: in order, when committed).
    pub fn execute(&mut self, batch: &CheckedBatch) -> Executed {
        self.sequence = self.sequence.next();
        // Agreed time never goes backwards (design §3).
        self.time = self.time.max(batch.time());
        self.expire_replies();
        self.advance_epochs();
        let mut replied = Vec::new();
        let mut events = Vec::new();
        for (place, request) in batch.requests().iter().enumerate() {
            let first_event = events.len();
            if self.execute_request(request, place, &mut events) {
                replied.push(request.id());
            }
            debug_assert!(events.len() <= first_event + 2);
        }
        let (checkpoint, snapshot) = self.seal();
        Executed { checkpoint, snapshot, replied, events }
    }

    /// Executes a request unless it has been, has expired or is nobody's; says whether the client
    /// table has a reply to it.
    fn execute_request(
        &mut self,
        request: &VerifiedRequest,
        place: usize,
        events: &mut Vec<(usize, Event)>,
    ) -> bool {
        let id = request.id();
        let asked = request.request();
        if self.reply(id).is_some() {
            return true;
        }
        if admit(&self.map, &self.membership, self.time, asked).is_err() || !self.clients.has_room(&id.client)
        {
            return false;
        }
        // The number of what this request makes, never used again: batch and place in it.
        let number = self.sequence.0 * (crate::limits::MAX_BATCH_REQUESTS as u64 * 2) + place as u64;
        let mut happened = Vec::new();
        let outcome = match self.apply(asked, number, &mut happened) {
            Ok(done) => Outcome::Done(done),
            Err(refusal) => Outcome::Refused(refusal),
        };
        events.extend(happened.into_iter().map(|event| (place, event)));
        self.store_reply(request, outcome);
        true
    }

    fn apply(
        &mut self,
        request: &Request,
        number: u64,
        events: &mut Vec<Event>,
    ) -> Result<crate::request::Done, Refusal> {
        let client = request.client;
        match &request.operation {
            Operation::Register { name, entry } => self.register(client, name, entry),
            Operation::Rotate { name, from_version, entry } => {
                self.rotate(client, name, *from_version, entry)
            }
            Operation::Revoke { name, from_version, reason } => {
                self.revoke(client, name, *from_version, reason)
            }
            Operation::Deposit(deposit) => self.deposit(client, request.sequence, deposit, events),
            Operation::Release { secret, ephemeral } => {
                self.release(client, number, request.sequence, secret, *ephemeral)
            }
            Operation::Delete { secret } => self.delete(client, secret, events),
            Operation::Step(step) => self.step(client, step, events),
            Operation::AnnounceKeys { voting, sealing } => self.announce(client, voting, sealing),
            Operation::Guess { secret, ephemeral, blinded } => {
                let to = RequestId { client, sequence: request.sequence };
                self.guess(to, number, secret, *ephemeral, *blinded)
            }
            Operation::Unlocked { secret, release } => self.unlocked(client, secret, *release),
            Operation::Decide(decision) => self.decide(client, decision),
            Operation::Attest { proof, .. } => Ok(self.attest(proof)),
            Operation::RefuseGifts { refuse } => self.refuse_gifts(client, *refuse),
        }
    }

    fn put<T: Serialize>(&mut self, key: Vec<u8>, value: &T) {
        self.map.insert(&key, encode(value));
        self.changed.insert(key);
    }
    fn delete_key(&mut self, key: Vec<u8>) {
        if self.map.remove(&key) {
            self.changed.insert(key);
        }
    }
    /// Reads an entry of our own making; that it decodes is our invariant, checked against the
    /// certified root when it was restored.
    fn load<T: DeserializeOwned>(&self, key: &[u8]) -> Option<T> {
        self.map.get(key).map(|value| decode(value).expect("the state machine wrote this entry"))
    }
    fn is_administrator(&self, client: &PublicKey) -> bool {
        layout::is_administrator(&self.map, client)
    }
    /// Counts one more (or one less) reason why a key may ask for things.
    fn count_key(&mut self, key: &PublicKey, more: bool) {
        let at = layout::known_key(key);
        let count: u32 = self.load(&at).unwrap_or(0);
        let count = if more { count.saturating_add(1) } else { count.saturating_sub(1) };
        if count == 0 { self.delete_key(at) } else { self.put(at, &count) }
    }
}

/// Who the servers are, as a state has it.
///
/// # Errors
/// If an entry cannot be read, or one is missing.
pub fn membership(manifest: Arc<Manifest>, map: &Map) -> Result<Arc<Membership>, RestoreError> {
    let mut membership = Membership::genesis(manifest);
    for (_, value) in map.iter_prefix(layout::CHANGES) {
        let change: Change = decode(value).map_err(|_| RestoreError::Damaged)?;
        if change.number as usize != membership.changes().len() {
            return Err(RestoreError::Damaged);
        }
        membership = membership.with_change(change);
    }
    for (_, value) in map.iter_prefix(layout::CHANGE_PROOFS) {
        let proof: ChangeProof = decode(value).map_err(|_| RestoreError::Damaged)?;
        if proof.change.value.is_none() || proof.change.value.as_ref() != membership.unproved() {
            return Err(RestoreError::Damaged);
        }
        membership = membership.with_proof(proof);
    }
    Ok(membership)
}

/// Why a request is not worth ordering.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// It cannot execute any more.
    #[error("the request expired at {expiry}, and the agreed time is {now}")]
    Expired {
        /// Its expiry.
        expiry: Timestamp,
        /// The agreed time.
        now: Timestamp,
    },
    /// Its expiry lies too far ahead, so that its reply would have to be kept too long.
    #[error("the request's expiry {expiry} is more than a minute after the agreed time {now}")]
    ExpiryTooFar {
        /// Its expiry.
        expiry: Timestamp,
        /// The agreed time.
        now: Timestamp,
    },
    /// No administrator, owner, reader or server.
    #[error("this key is known neither as an administrator nor as an owner or reader of anything")]
    UnknownKey,
    /// A guess that cannot be.
    #[error("{0}")]
    Guess(Refusal),
}

/// Whether a request could execute in this state: the same rule at the server that a client
/// talks to, at the primary, and in execution.
pub fn admit(
    state: &impl Lookup,
    membership: &Membership,
    now: Timestamp,
    request: &Request,
) -> Result<(), NotAdmitted> {
    let expiry = request.expiry;
    if expiry < now {
        return Err(NotAdmitted::Expired { expiry, now });
    }
    // Agreed time is 0 before the first batch, and says nothing about the real one then.
    if now.0 != 0 && expiry.since_ms(now) > crate::limits::MAX_REQUEST_LIFETIME_MS {
        return Err(NotAdmitted::ExpiryTooFar { expiry, now });
    }
    let client = &request.client;
    let known = layout::is_administrator(state, client)
        || state.value(&layout::known_key(client)).is_some()
        || names_reader(state, request)
        || server_keys::announces_itself(state, membership, now, request);
    // A server's voting key is known for its steps, and for those that it has not taken yet.
    let known = match &request.operation {
        Operation::Step(step) => epochs::takes_step(state, membership, request, step),
        Operation::Attest { server, proof } => {
            replacements::attests(state, membership, request, *server, proof)
        }
        // She who lost every device has no key that anyone knows.
        Operation::Guess { secret, .. } => match guesses::guesses_left(state, secret, client) {
            Err(refusal) if !known => return Err(NotAdmitted::Guess(refusal)),
            _ => true,
        },
        _ => known,
    };
    if known { Ok(()) } else { Err(NotAdmitted::UnknownKey) }
}

/// Whether the request asks for a secret whose readers include this key by the name that it owns.
fn names_reader(state: &impl Lookup, request: &Request) -> bool {
    match &request.operation {
        Operation::Release { secret, .. } => layout::secret(state, secret)
            .is_some_and(|secret| secrets::may_read(state, &secret, &request.client)),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
