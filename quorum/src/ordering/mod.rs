//! Ordering: one replica of PBFT (OSDI 1999).
//!
//! In: client requests, peers' checked messages, the passing of time, each with the time at which
//! it came ([`Replica::handle`]). Out: writes, and messages that may leave once the writes are
//! durable ([`Replica::drain`]). One file for each phase:
//!
//! | file | phase | source |
//! |---|---|---|
//! | `pool` | requests waiting to be ordered | PBFT §4.1 |
//! | `propose` | the primary makes batches; backups accept them | PBFT §4.2 |
//! | `agree` | prepare and commit | PBFT §4.2 |
//! | `execute` | execution in order, checkpoint votes | PBFT §4.2, §4.3 |
//! | `certify` | certificates, Held statements, garbage collection | PBFT §4.3, design §2, §5 |
//! | `judge` | whether the primary serves clients as it must | Prime, Aardvark |
//! | `view_change` | replacing a primary that does not do its work | PBFT §4.4 |
//! | `new_view` | how a view begins, and for whom | PBFT §4.4 |
//! | `catch_up` | retransmission, servers that fell behind | PBFT §4.6, §5.2 |
//! | `transfer` | fetching a state that is too far away for that, or repairing one | PBFT-PR §5.3 |
//! | `restore` | starting again from what is durable | design §3 |
//! | `renew` | this server's part in agreeing on the next epoch | design §7 |
//! | `wants`, `budget` | what is worth checking, and what answers may cost | |
//! | `standing` | whether it remembers its votes, and may vote | PBFT-PR §4.3.2, design §3 |

mod agree;
mod barrier;
mod budget;
mod catch_up;
mod certify;
mod effects;
mod execute;
mod judge;
mod log;
mod new_view;
mod pool;
mod propose;
mod renew;
mod restore;
mod standing;
mod transfer;
mod view_change;
mod wants;

pub use effects::{
    Accusation, Durable, Outgoing, Published, Released, Target, Unsent, VaultKey, Write, WriteBatch,
};
pub use pool::PoolError;
pub use renew::{EpochKeys, Holding};
pub use restore::{Damage, Stored, StoredBeginning, StoredSlot, StoredState, StoredView};
pub use standing::{Amnesia, Part};
pub use transfer::TransferProgress;
pub use view_change::Plan;
pub use wants::Wants;

use crate::bytes::Hash;
use crate::certificate::{Certificate, Checkpoint, Completion, CompletionTracker, Held, VoteBook};
use crate::ids::{AttemptId, ClusterId, Epoch, Sequence, ServerId, Timestamp, View};
#[cfg(doc)]
use crate::limits::LOG_TAIL_BATCHES;
use crate::limits::{HEARTBEAT_MS, RETRANSMIT_MS, WINDOW};
use crate::manifest::Manifest;
use crate::map::Snapshot;
use crate::membership::Membership;
use crate::message::{CheckedMessage, PeerMessage};
use crate::request::{RequestId, VerifiedRequest};
use crate::signing::{KeyCertificate, Signed, Verified, Voter};
use crate::state::State;
use agree::KeysHeard;
use budget::Budgets;
use effects::Pending;
use judge::Conduct;
use log::LogEntry;
use pool::RequestPool;
use renew::Renewing;
use standing::{Standing, Witnessed};
use std::collections::BTreeMap;
use std::sync::Arc;
use transfer::Transferring;
use view_change::Changing;

/// Who a replica is.
#[derive(Clone)]
pub struct Identity {
    /// Who the servers are, as far as this one has followed.
    pub membership: Arc<Membership>,
    /// The key that it votes with at first, certified for the epoch of its last certificate.
    pub voter: Voter,
    /// A random number, another one at each start.
    pub boot: u64,
    /// Executed batches that stay for servers that fell behind; [`LOG_TAIL_BATCHES`] by default.
    pub log_tail: u64,
}

/// Something that happened.
#[derive(Debug)]
pub enum Input {
    /// A client's request, at the server that she talks to.
    Request(VerifiedRequest),
    /// A message from a peer.
    Message(ServerId, CheckedMessage),
    /// The same over a link under a key of an epoch that is over: from a server that slept, or a thief of its keys. What
    /// is asked there is put to an account of its own.
    OldLink(ServerId, Epoch, CheckedMessage),
    /// Keys and randomness for an epoch, as [`ReplicaStatus::wants_keys`] asks for.
    Keys(EpochKeys),
    /// How this server's shares are.
    Holding(Holding),
    /// A link to a peer came up: it may lack what was sent before.
    Connected(ServerId),
    /// Time passed.
    Tick,
}

/// A vote with what it is about, from execution until its certificate is there.
#[derive(Clone)]
struct OwnCheckpoint {
    checkpoint: Checkpoint,
    /// None as long as this server has no voting key of the epoch.
    vote: Option<Verified<Checkpoint>>,
    snapshot: Snapshot,
    replied: Vec<RequestId>,
}

/// A snapshot that is kept for servers that fetch state.
#[derive(Clone)]
struct Boundary {
    checkpoint: Checkpoint,
    snapshot: Snapshot,
    votes: VoteBook<Checkpoint>,
    certificate: Option<Certificate>,
}

/// One server's part in ordering. A value: a copy has the same future (model checking relies on it).
#[derive(Clone)]
pub struct Replica {
    id: ServerId,
    cluster: ClusterId,
    manifest: Arc<Manifest>,
    /// As its state has it, or as others have shown it.
    membership: Arc<Membership>,
    voter: Voter,
    view: View,
    state: State,
    log: BTreeMap<Sequence, LogEntry>,
    log_bytes: usize,
    keys_heard: KeysHeard,
    pool: RequestPool,
    /// As primary: where the next batch goes, and the time of the last one.
    next_sequence: Sequence,
    last_proposed: Timestamp,
    checkpoints: BTreeMap<Sequence, VoteBook<Checkpoint>>,
    own_checkpoints: BTreeMap<Sequence, OwnCheckpoint>,
    certificate: Option<Arc<Certificate>>,
    /// A certificate of a batch that is not executed here yet: what comes before it needs no votes.
    ahead: Option<Certificate>,
    /// Requests that were executed before that batch.
    replied_before: Vec<RequestId>,
    /// The state that the certificate is about; none after a restart until the next one.
    certified_snapshot: Option<Snapshot>,
    own_held: Option<Verified<Held>>,
    completion: CompletionTracker,
    published_completion: Option<Arc<Completion>>,
    /// Where the state was last written to disk.
    flushed: Sequence,
    /// The highest sequence number that somebody showed to be certified: q servers executed it.
    certified_anywhere: Sequence,
    /// The highest sequence number that somebody showed to be committed or certified.
    target: Sequence,
    progress: catch_up::Progress,
    changing: Changing,
    /// Somebody has spoken in an epoch after this replica's.
    later_epoch_seen: bool,
    conduct: Conduct,
    budgets: Budgets,
    /// When the current view began here.
    entered: Timestamp,
    /// The time of the step that is being taken.
    now: Timestamp,
    /// Its state is not the certified one: it fetches what differs.
    diverged: bool,
    standing: Standing,
    /// Below such a certificate readers are shown nothing, see `standing`.
    shown_from: Sequence,
    witnessed: Witnessed,
    boundaries: BTreeMap<Sequence, Boundary>,
    log_tail: u64,
    transferring: Transferring,
    /// The epoch of the key that the link is under over which something came just now, if it is over.
    asked_under: Option<Epoch>,
    renewing: Renewing,
    pending: Pending,
}

/// How a replica is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Its view.
    pub view: View,
    /// Whether that view has begun.
    pub active: bool,
    /// Everything up to here is prepared.
    pub prepared: Sequence,
    /// The last batch executed.
    pub executed: Sequence,
    /// The last batch certified.
    pub certified: Sequence,
    /// Everything up to here is known to be complete.
    pub complete: Sequence,
    /// The first snapshot whose certificate still lacks votes.
    pub uncertified_snapshot: Option<Sequence>,
    /// The highest sequence number seen certified anywhere.
    pub target: Sequence,
    /// The epoch of the executed state.
    pub epoch: Epoch,
    /// The attempt by which that began.
    pub attempt: AttemptId,
    /// Requests waiting.
    pub pending_requests: usize,
    /// Sequence numbers in the log.
    pub log_entries: usize,
    /// Bytes of the log, about.
    pub log_bytes: usize,
    /// Whether it votes, and if not, why.
    pub part: Part,
    /// The state that it fetches.
    pub transfer: Option<TransferProgress>,
    /// The attempt that it needs keys and randomness for.
    pub wants_keys: Option<AttemptId>,
    /// The key that it votes with.
    pub voting: KeyCertificate,
    /// The last attempt whose contributions it has erased after it led to an epoch.
    pub erased: AttemptId,
}

impl Replica {
    /// Takes one step.
    pub fn handle(&mut self, now: Timestamp, input: Input) {
        self.now = now;
        let before = self.executed();
        match input {
            Input::Request(request) => self.on_request(now, request),
            Input::Message(from, message) => self.on_message(now, from, message),
            Input::OldLink(from, of, message) => {
                self.asked_under = Some(of);
                self.on_message(now, from, message);
                self.asked_under = None;
            }
            Input::Keys(keys) => self.on_keys(keys),
            Input::Holding(holding) => self.on_holding(holding),
            Input::Connected(peer) => self.on_connected(peer),
            Input::Tick => {
                self.on_tick(now);
                self.renew(now);
            }
        }
        while let Some((proposal, batch)) = self.next_early() {
            self.on_pre_prepare(now, proposal, batch);
        }
        self.propose(now);
        if self.executed() > before {
            let membership = Arc::clone(self.state.membership());
            self.learn(&membership);
            self.renew(now);
            self.note_progress(now);
            self.transferring.advanced = now;
        }
        self.recovered(now);
    }

    /// Messages since the last call that promise nothing: they may leave at once.
    pub fn drain_free(&mut self) -> Vec<Outgoing> {
        self.pending.drain_free()
    }

    /// The effects since the last call: commit the writes, then release the messages.
    pub fn drain(&mut self) -> Option<(WriteBatch, Unsent)> {
        self.pending.drain()
    }

    fn on_message(&mut self, now: Timestamp, from: ServerId, message: CheckedMessage) {
        if !self.counts(&message) {
            return;
        }
        match message {
            // Keys were learnt when the message was checked.
            CheckedMessage::Keys(_) => {}
            CheckedMessage::Forward(request) => self.on_forward(now, from, request),
            CheckedMessage::PrePrepare(proposal, batch) => self.on_pre_prepare(now, proposal, batch),
            CheckedMessage::Prepare(vote) => self.on_prepare(vote),
            CheckedMessage::Commit(vote) => self.on_commit(vote),
            CheckedMessage::Checkpoint(vote) => self.on_checkpoint(vote),
            CheckedMessage::Certificate(certificate) => self.on_certificate(certificate),
            CheckedMessage::Held(held) => self.on_held(held),
            CheckedMessage::Status(status) => self.on_status(now, &status),
            CheckedMessage::Committed(proof, batch) => self.on_committed(from, proof, batch),
            CheckedMessage::Suspect(suspect) => self.on_suspect(now, &suspect),
            CheckedMessage::ViewChange(change) => self.on_view_change(now, change),
            CheckedMessage::NewView(new_view) => self.on_new_view(now, from, new_view),
            CheckedMessage::FetchViewChanges(digests) => self.on_fetch_view_changes(now, from, &digests),
            CheckedMessage::FetchedViewChange(change) => self.take_view_change(now, &change),
            CheckedMessage::Fetch(digest) => self.on_fetch(now, from, digest),
            CheckedMessage::Fetched(batch) => self.on_fetched(now, batch),
            CheckedMessage::Membership(membership) => self.learn(&membership),
            CheckedMessage::AskWitness(boot) => self.on_ask_witness(now, from, boot),
            CheckedMessage::Witness(witness) => self.on_witness(now, from, *witness),
            CheckedMessage::Offer(certificate) => self.on_offer(now, from, certificate),
            CheckedMessage::AskParts(ask) => self.on_ask_parts(now, from, &ask),
            CheckedMessage::Parts(parts) => self.on_parts(now, from, parts),
            CheckedMessage::Dealing(handed) => {
                self.on_dealing(now, from, *handed);
                self.renew(now);
            }
            CheckedMessage::AskDealing(wanted) => self.on_ask_dealing(now, from, wanted),
            // For whoever keeps the shares.
            CheckedMessage::AskMasked(_) | CheckedMessage::Masked(_) => {}
        }
    }

    fn on_tick(&mut self, now: Timestamp) {
        if now.since_ms(self.progress.last_tick) >= RETRANSMIT_MS {
            self.progress.last_tick = now;
            self.forget_hopeless(now);
            self.ask_witnesses();
            self.conclude(now);
            self.retransmit(now);
            self.gather_on(now);
            self.watch_primary(now);
            self.drive_transfer(now);
        }
    }

    /// Drops requests that cannot execute any more: their waiting is nobody's fault.
    fn forget_hopeless(&mut self, now: Timestamp) {
        let state = &self.state;
        self.pool.retain(|waiting| {
            now.since_ms(waiting.received) < RETRANSMIT_MS
                || crate::state::admit(
                    state.map(),
                    state.membership(),
                    state.time(),
                    waiting.request.request(),
                )
                .is_ok()
        });
    }

    /// A digest of everything that decides its future: for model checkers.
    pub fn fingerprint(&self) -> Hash {
        let slots = self.log.iter().map(|(sequence, entry)| (*sequence, entry.fingerprint()));
        let checkpoints = self.checkpoints.iter().map(|(sequence, book)| (*sequence, book.votes_cast()));
        let parts = (
            (self.id, self.view, self.state.sequence(), self.state.time(), self.entered, self.next_sequence),
            (self.last_proposed, self.certified(), self.target, self.certified_anywhere, self.part()),
            (self.state.attempt(), self.later_epoch_seen),
            slots.collect::<Vec<_>>(),
            checkpoints.collect::<Vec<_>>(),
            (self.changing.fingerprint(), self.conduct.fingerprint(), self.budgets.fingerprint()),
            self.pool.fingerprint(),
            self.progress.fingerprint(),
        );
        crate::codec::sha256(&crate::codec::encode(&parts))
    }

    /// This server.
    pub fn id(&self) -> ServerId {
        self.id
    }
    /// How it is doing.
    pub fn status(&self) -> ReplicaStatus {
        ReplicaStatus {
            view: self.view,
            active: self.changing.active,
            prepared: self.prepared_through(),
            complete: self.completed(),
            uncertified_snapshot: self.uncertified_snapshot(),
            executed: self.state.sequence(),
            certified: self.certified(),
            target: self.target,
            epoch: self.state.epoch(),
            attempt: self.state.attempt(),
            pending_requests: self.pool.len(),
            log_entries: self.log.len(),
            log_bytes: self.log_bytes,
            part: self.part(),
            transfer: self.transfer_progress(),
            wants_keys: self.wants_keys(),
            voting: *self.voter.certificate(),
            erased: self.renewing.erased(),
        }
    }
    /// Who the servers are.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }
    /// Takes note of who the servers are, if that is more than is known here.
    fn learn(&mut self, membership: &Arc<Membership>) {
        self.membership = self.membership.or_newer(membership);
    }
    /// The last certificate.
    pub fn certificate(&self) -> Option<&Arc<Certificate>> {
        self.certificate.as_ref()
    }
    /// The executed state.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Sends a vote, if this replica may vote; if not, it says so later or not at all.
    fn promise<T: Clone>(&mut self, vote: &Verified<T>, wrap: fn(Signed<T>) -> PeerMessage) {
        if self.may_vote() {
            self.pending.send_all(vote, wrap);
        }
    }

    /// How far batches are prepared here without a gap.
    fn prepared_through(&self) -> Sequence {
        let after = self.log.range(self.executed().next()..);
        let prepared = after.take_while(|(_, entry)| entry.own_commit.is_some());
        prepared.last().map_or(self.executed(), |(sequence, _)| *sequence)
    }
    fn certified(&self) -> Sequence {
        self.certificate.as_ref().map_or(Sequence(0), |certificate| certificate.statement.sequence)
    }
    /// Everything up to here is known to be complete.
    fn completed(&self) -> Sequence {
        self.published_completion.as_ref().map_or(Sequence(0), |completion| completion.sequence)
    }
    fn note_certified(&mut self, sequence: Sequence) {
        self.certified_anywhere = self.certified_anywhere.max(sequence);
        self.target = self.target.max(sequence);
    }
    fn executed(&self) -> Sequence {
        self.state.sequence()
    }
    fn primary(&self) -> ServerId {
        self.view.primary(self.manifest.thresholds.n())
    }
    fn quorum(&self) -> usize {
        self.manifest.thresholds.q()
    }
    /// Between the watermarks (PBFT §4.2): not executed yet, and not too far ahead.
    fn in_window(&self, sequence: Sequence) -> bool {
        sequence > self.executed() && sequence.0 <= self.certified().0 + WINDOW
    }
    /// When the shell should call with [`Input::Tick`] at the latest.
    pub fn tick_interval_ms() -> u64 {
        RETRANSMIT_MS.min(HEARTBEAT_MS) / 2
    }
}
