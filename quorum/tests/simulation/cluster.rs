//! The simulated cluster: replicas, disks, a network, clients, and the invariants.

use crate::disk::Disk;
use crate::liar::{Conspiracy, Liar};
use crate::patient::{Patience, Patient};
use crate::readers::{Liars, Readers};
use crate::secrets::{BACK_IN_TURN_MS, BACK_MS, LONG_EPOCH_SECONDS, Secrets};
use crate::thief::Thief;
use quorum::answer::{Proved, Receipt, Verifier};
use quorum::bytes::{Blob, Hash};
use quorum::codec::{decode, encode, sha256};
use quorum::grid::Grid;
use quorum::ids::{AttemptId, ClusterId, Epoch, Sequence, ServerId, Timestamp, View};
use quorum::limits::{CLOCK_BOUND_MS, FLUSH_BATCHES, MAX_FRAME_BYTES, WINDOW};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::membership::{Membership, Replacement};
use quorum::message::{CheckedMessage, PeerMessage, Slot};
use quorum::ordering::{
    Accusation, Identity, Input, Outgoing, Part, Published, Replica, Target, Unsent, Write, WriteBatch,
};
use quorum::read::{Ask, Reply};
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::recovery::Keeper;
use quorum::request::{Decision, Done, Operation, RequestId, SignedRequest};
use quorum::signer::{Counter, Signer};
use quorum::signing::{KeyCertificate, Keyring, SigningKey, Statement as _, Voter};
use quorum::state::layout;
use quorum::thresholds::Thresholds;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

#[derive(Clone, Copy)]
pub struct Faults {
    pub loss: f64,
    pub duplication: f64,
    pub max_delay_ms: u64,
    pub crashes: bool,
    /// Up to f servers, the primary first, go down and never come back.
    pub deaths: bool,
    /// For a while some servers cannot reach the others.
    pub partitions: bool,
    /// Server 0, the first primary, runs twice under one identity: two honest copies that know
    /// nothing of each other, and so say two things wherever two things can be said (*Twins*,
    /// Bano et al. 2021). What is sent to server 0 reaches the one, the other, or both.
    pub twins: bool,
    /// Some servers follow a Byzantine strategy.
    pub liars: bool,
    /// The first primary does everything right, and each thing so late, in milliseconds.
    pub sluggish_ms: u64,
    /// A server does what it must, just not well enough, for ever.
    pub patient: Option<Patience>,
    /// Somebody is in other servers each epoch, and keeps all keys that she finds.
    pub mobile: bool,
    /// A server's disk is lost, or replaced by an older copy of it.
    pub forgetful: bool,
    /// All of them are, one after the other.
    pub in_turn: bool,
    /// A server's place is given to another identity, by order of the administrator.
    pub replaced: bool,
    /// An entry of one server's stored state changes, and the digest beside it too, so that the server
    /// cannot know when it starts.
    pub corrupt: bool,
    /// How far each clock may be off, in milliseconds.
    pub skew_ms: u64,
    /// Executed batches that servers keep for others: few of them mean state transfer.
    pub log_tail: u64,
    /// Names that clients register.
    pub requests: usize,
    /// Readers read meanwhile, and so many servers lie to them.
    pub readers: Option<Liars>,
    /// Secrets that are deposited.
    pub secrets: usize,
    /// How long an epoch lasts.
    pub epoch_seconds: u32,
}

impl Faults {
    /// Whether the network and all servers do what they should, but for those that lie to readers.
    pub fn is_good(&self) -> bool {
        self.loss == 0.0 && self.has_good_servers()
    }
    /// Whether all servers do what they should, whatever the network does.
    fn has_good_servers(&self) -> bool {
        let broken = self.crashes || self.deaths || self.partitions || self.twins || self.liars;
        !broken
            && self.sluggish_ms == 0
            && self.patient.is_none()
            && !self.mobile
            && !self.forgetful
            && !self.replaced
            && !self.corrupt
    }
}

pub(crate) enum Event {
    Deliver {
        to: ServerId,
        from: ServerId,
        bytes: Arc<Vec<u8>>,
    },
    Tick(ServerId),
    /// The shell's transaction commits: everything written so far is durable.
    Commit(ServerId),
    Crash(ServerId),
    Restart(ServerId),
    /// Somebody makes a copy of a server's disk.
    Backup(ServerId),
    /// A server's disk is lost, or replaced by the copy.
    Forget(ServerId),
    /// A server is stopped for good: another one is to take its place.
    Replace(ServerId),
    /// The administrator asks for it; or the new server sees that it is decided, and starts.
    Decide(ServerId),
    /// A server's stored state is changed, unnoticed.
    Corrupt(ServerId),
    Submit(usize),
    /// A secret is deposited, or its deposit tried again.
    Deposit(usize),
    /// From now on these servers and the others do not reach each other.
    Partition(Vec<ServerId>),
    /// The writer whose name is read goes on.
    Write,
    /// A reader begins a read.
    Begin(usize),
    /// A question reaches a server.
    Ask {
        reader: usize,
        number: u64,
        server: ServerId,
        ask: Ask,
    },
    /// An answer reaches a reader.
    Answer {
        reader: usize,
        number: u64,
        server: ServerId,
        ask: Ask,
        reply: Box<Reply>,
    },
    /// Answers seem to be late.
    Late {
        reader: usize,
        number: u64,
    },
}

pub(crate) struct Server {
    pub(crate) replica: Option<Replica>,
    pub(crate) disk: Disk,
    pub(crate) keeper: Keeper,
    /// Operations on shares that are durable since the start.
    pub(crate) operations: u64,
    uncommitted: VecDeque<(WriteBatch, Unsent)>,
    keyrings: BTreeMap<ServerId, Keyring>,
    /// What it was shown before its first state.
    membership: Arc<Membership>,
    pub(crate) published: Option<Published>,
    /// How far ahead of the true time its clock is, in milliseconds, less the largest skew.
    skew_ms: u64,
    backup: Option<Disk>,
}

pub(crate) struct Client {
    request: SignedRequest,
    pub(crate) name: Name,
    attempts: usize,
    acknowledged: bool,
    /// When it asked first.
    asked: Option<Timestamp>,
    /// How long it waited for its receipt.
    pub(crate) waited_ms: u64,
}

pub struct Simulation {
    pub verbose: bool,
    /// How often an honest server accused the liar of saying two things.
    pub equivocations: usize,
    pub(crate) seed: u64,
    pub(crate) rng: StdRng,
    pub(crate) faults: Faults,
    pub(crate) now: Timestamp,
    events: BTreeMap<(Timestamp, u64), Event>,
    event_count: u64,
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) cluster: ClusterId,
    pub(crate) voters: Vec<Voter>,
    pub(crate) servers: Vec<Server>,
    pub(crate) clients: Vec<Client>,
    gateways: BTreeMap<(ServerId, RequestId), usize>,
    healed: bool,
    dead: Vec<ServerId>,
    pub(crate) liars: BTreeMap<ServerId, Liar>,
    conspiracy: Conspiracy,
    pub(crate) patient: Patient,
    pub thief: Thief,
    forgetful: Vec<ServerId>,
    /// Those whose signer could not tell that they have forgotten.
    unnoticed: Vec<ServerId>,
    /// Servers that are down until another identity has their place; and the administrator.
    replacing: BTreeMap<ServerId, SigningKey>,
    pub(crate) administrator: SigningKey,
    /// What checking a message led to: the same for everyone who gets it in the same epoch.
    checked: BTreeMap<(ServerId, Hash, Epoch, usize), Option<CheckedMessage>>,
    /// State transfers that were completed, and servers that got over having forgotten.
    pub transfers: usize,
    pub recoveries: usize,
    /// Servers that repaired a wrong state.
    pub repairs: usize,
    pub replacements: usize,
    /// How often contributions were not those that were committed to.
    pub wrong_dealings: usize,
    /// The server whose state was changed, and whether it still is wrong.
    corrupt: Option<(ServerId, bool)>,
    cut_off: Vec<ServerId>,
    trace: Hash,
    /// What each server promised: no server ever says two things (checked at every send).
    promises: BTreeMap<(ServerId, &'static str, View, Sequence, AttemptId), Hash>,
    roots: BTreeMap<Sequence, Hash>,
    /// The view that each server last said it changes to.
    left: BTreeMap<ServerId, View>,
    pub readers: Option<Readers>,
    pub(crate) secrets: Secrets,
    pub(crate) signers: BTreeMap<ServerId, Signer>,
    /// Voting keys that were drawn for each node lately.
    pub(crate) drawn: BTreeMap<ServerId, Vec<Voter>>,
    /// The last ones that each node voted with.
    pub(crate) in_use: BTreeMap<ServerId, Vec<KeyCertificate>>,
}

pub(crate) const START: Timestamp = Timestamp(1_700_000_000_000);

/// The thresholds of a grid; or, for a number of servers that fills none, those of ordering alone.
fn thresholds(n: usize) -> Thresholds {
    Thresholds::plan(n, None, None).unwrap_or_else(|_| {
        let (servers, faulty) = (n as u16, (n as u16 - 1) / 3);
        let quorum = (servers + faulty + 1).div_ceil(2);
        Thresholds { servers, side: 1, faulty, quorum, masked: 0, rows: 1, columns: 0, threshold: 2 }
    })
}

/// Whether what is on disk keeps a server from contradicting a vote: the vote itself, one of a
/// later view that was written together with it (earlier views are never voted in again), or a
/// later state (nor are places that have been executed).
fn covers(disk: &Disk, stored: Option<Slot>, vote: Slot) -> bool {
    stored.is_some_and(|stored| stored == vote || stored.view > vote.view)
        || disk.state.is_some_and(|state| state.sequence >= vote.sequence)
}

impl Simulation {
    pub fn new(n: usize, seed: u64, faults: Faults) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let thresholds = thresholds(n);
        let grid = Grid::new(thresholds);
        let identities: Vec<_> = (0..n).map(|i| SigningKey::from_seed(&[i as u8 + 1; 32])).collect();
        let administrator = SigningKey::from_seed(&[200; 32]);
        let servers = grid.servers().map(|id| ServerEntry {
            id,
            row: grid.row_of(id) as u16,
            column: grid.column_of(id) as u16,
            url: format!("https://s{id}"),
            peer: format!("s{id}"),
            identity: identities[id.index()].public(),
            certificate: Blob(vec![]),
        });
        let manifest = Arc::new(Manifest {
            format: MANIFEST_FORMAT,
            epoch_seconds: faults.epoch_seconds,
            administrators_needed: 1,
            administrators: vec![administrator.public()],
            thresholds,
            servers: servers.collect(),
        });
        let cluster = manifest.cluster_id();
        let voters = (0..n).map(|i| {
            let id = ServerId(i as u8);
            Voter::generate(
                cluster,
                &identities[i],
                id,
                AttemptId::default(),
                0,
                &mut StdRng::seed_from_u64(i as u64),
            )
        });
        let signers = grid.servers().map(|id| {
            let identity = identities[id.index()].clone();
            (id, Signer::new(Membership::genesis(Arc::clone(&manifest)), id, identity, Counter::default()))
        });
        let clients = (0..faults.requests).map(|i| {
            let name = Name::new(format!("name-{i}")).unwrap();
            let keys = vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![i as u8 | 1; 32]) }];
            let entry = Entry {
                keys,
                owner: None,
                owner_only: false,
                not_before: None,
                not_after: None,
                metadata: BTreeMap::new(),
            };
            let operation = Operation::Register { name: name.clone(), entry };
            let request =
                SignedRequest::sign(&cluster, &administrator, i as u64, START.plus_ms(59_000), operation);
            Client { request, name, attempts: 0, acknowledged: false, asked: None, waited_ms: 0 }
        });
        let mut simulation = Self {
            verbose: false,
            equivocations: 0,
            seed,
            faults,
            now: START,
            events: BTreeMap::new(),
            event_count: 0,
            cluster,
            voters: voters.collect(),
            servers: Vec::new(),
            clients: clients.collect(),
            gateways: BTreeMap::new(),
            healed: false,
            dead: Vec::new(),
            liars: BTreeMap::new(),
            conspiracy: Conspiracy::default(),
            patient: Patient::default(),
            thief: Thief::default(),
            forgetful: Vec::new(),
            unnoticed: Vec::new(),
            replacing: BTreeMap::new(),
            administrator,
            checked: BTreeMap::new(),
            transfers: 0,
            recoveries: 0,
            repairs: 0,
            replacements: 0,
            wrong_dealings: 0,
            corrupt: None,
            cut_off: Vec::new(),
            trace: Hash([0; 32]),
            promises: BTreeMap::new(),
            roots: BTreeMap::new(),
            left: BTreeMap::new(),
            readers: None,
            secrets: Secrets::default(),
            signers: signers.collect(),
            drawn: BTreeMap::new(),
            in_use: BTreeMap::new(),
            manifest,
            rng: StdRng::seed_from_u64(rng.random()),
        };
        let twin = faults.twins.then_some(ServerId(n as u8));
        for _ in grid.servers().chain(twin) {
            simulation.servers.push(Server {
                replica: None,
                disk: Disk::default(),
                keeper: Keeper::new(ServerId(0), thresholds),
                operations: 0,
                uncommitted: VecDeque::new(),
                keyrings: BTreeMap::new(),
                membership: Membership::genesis(Arc::clone(&simulation.manifest)),
                published: None,
                skew_ms: simulation.rng.random_range(0..=2 * faults.skew_ms),
                backup: None,
            });
        }
        simulation.choose_faulty();
        for id in grid.servers().chain(twin) {
            simulation.start(id);
        }
        for i in 0..faults.requests {
            let busy_ms = if faults.sluggish_ms > 0 || faults.patient.is_some() { 9_500 } else { 6_000 };
            let at = simulation.rng.random_range(0..busy_ms);
            simulation.schedule(at, Event::Submit(i));
        }
        simulation.schedule_deposits();
        if let Some(liars) = faults.readers {
            simulation.start_readers(liars);
        }
        if faults.corrupt {
            let (id, at) = (simulation.rng.random_range(0..n), simulation.rng.random_range(2_000..7_000));
            simulation.schedule(at, Event::Corrupt(ServerId(id as u8)));
        }
        if faults.crashes {
            simulation.schedule_crashes();
        }
        if faults.partitions {
            for _ in 0..simulation.rng.random_range(1..4) {
                let (at, long) =
                    (simulation.rng.random_range(0..7_000), simulation.rng.random_range(500..6_000));
                let side =
                    (0..n).map(|i| ServerId(i as u8)).filter(|_| simulation.rng.random_bool(0.4)).collect();
                simulation.schedule(at, Event::Partition(side));
                simulation.schedule(at + long, Event::Partition(vec![]));
            }
        }
        simulation
    }

    /// At most f servers are faulty, whatever their faults are.
    fn choose_faulty(&mut self) {
        let (n, mut room) = (self.voters.len(), self.manifest.thresholds.f());
        let mut kinds = Vec::new();
        kinds.extend(self.faults.liars.then_some(Event::Restart as fn(ServerId) -> Event));
        kinds.extend(self.faults.deaths.then_some(Event::Crash as fn(ServerId) -> Event));
        kinds.extend(self.faults.forgetful.then_some(Event::Forget as fn(ServerId) -> Event));
        kinds.extend(self.faults.replaced.then_some(Event::Replace as fn(ServerId) -> Event));
        if self.faults.twins {
            room -= 1;
        }
        let count = match () {
            _ if self.faults.in_turn => n,
            _ if kinds.is_empty() || room == 0 => 0,
            _ => self.rng.random_range(1..=room),
        };
        // Primaries in a row that do nothing cost a doubled timeout each: here at most three.
        let mut faulty: Vec<_> = loop {
            let mut chosen: Vec<usize> = (usize::from(self.faults.twins)..n).collect();
            while chosen.len() > count {
                let out = self.rng.random_range(0..chosen.len());
                chosen.remove(out);
            }
            let four_in_a_row = (0..n).any(|i| (0..4).all(|j| chosen.contains(&((i + j) % n))));
            if !four_in_a_row || self.faults.in_turn {
                break chosen;
            }
        };
        if self.faults.sluggish_ms > 0 {
            let (rng, voter) = (StdRng::seed_from_u64(self.rng.random()), self.voters[0].clone());
            let mut liar = Liar::new(rng, self.cluster, voter, n, self.manifest.thresholds.q(), START);
            liar.only_delay(self.faults.sluggish_ms);
            self.liars.insert(ServerId(0), liar);
        }
        if let Some(patience) = self.faults.patient {
            let id = patience.who(n);
            let count = patience.count(self.manifest.thresholds.f());
            for id in (id.index()..id.index() + count).map(|i| ServerId(i as u8)) {
                let (rng, voter) =
                    (StdRng::seed_from_u64(self.rng.random()), self.voters[id.index()].clone());
                let mut liar = Liar::new(rng, self.cluster, voter, n, self.manifest.thresholds.q(), START);
                liar.only_delay(0);
                self.liars.insert(id, liar);
            }
        }
        if let ([_], true) = (&kinds[..], self.faults.deaths) {
            // The first primaries.
            faulty = (0..count.min(3)).collect();
        }
        for id in faulty.into_iter().map(|i| ServerId(i as u8)) {
            let at = self.rng.random_range(0..7_000);
            match kinds[self.rng.random_range(0..kinds.len())](id) {
                Event::Crash(_) => {
                    self.dead.push(id);
                    self.schedule(at, Event::Crash(id));
                }
                Event::Forget(_) => {
                    self.forgetful.push(id);
                    self.schedule(at / 4, Event::Backup(id));
                    self.schedule(at / 2 + 100, Event::Forget(id));
                }
                Event::Replace(_) => {
                    self.forgetful.push(id);
                    self.schedule(at / 2 + 100, Event::Replace(id));
                }
                _ => {
                    let rng = StdRng::seed_from_u64(self.rng.random());
                    let voter = self.voters[id.index()].clone();
                    let liar = Liar::new(rng, self.cluster, voter, n, self.manifest.thresholds.q(), START);
                    self.liars.insert(id, liar);
                }
            }
        }
    }

    /// The view that most servers are in.
    pub fn view(&self) -> View {
        let mut views: Vec<_> =
            self.honest().filter_map(|server| server.replica.as_ref()).map(|r| r.status().view).collect();
        views.sort_unstable();
        views[views.len() / 2]
    }

    /// Single crashes, and sometimes all at once.
    fn schedule_crashes(&mut self) {
        for _ in 0..self.rng.random_range(1..6) {
            let (at, down) = (self.rng.random_range(0..8_000), self.rng.random_range(10..3_000));
            if self.rng.random_bool(0.2) {
                for id in self.manifest.grid().servers() {
                    self.schedule(at, Event::Crash(id));
                    let up = at + down + self.rng.random_range(0..500);
                    self.schedule(up, Event::Restart(id));
                }
            } else {
                let id = ServerId(self.rng.random_range(0..self.voters.len()) as u8);
                self.schedule(at, Event::Crash(id));
                self.schedule(at + down, Event::Restart(id));
            }
        }
    }

    /// In whose name a node speaks: the twin, which stands behind the last server, in server 0's.
    pub(crate) fn identity(&self, node: ServerId) -> ServerId {
        if node.index() < self.voters.len() { node } else { ServerId(0) }
    }
    pub(crate) fn is_liar(&self, node: ServerId) -> bool {
        (self.faults.twins && self.identity(node) == ServerId(0))
            || self.liars.contains_key(&node)
            || self.corrupt == Some((node, true))
    }
    pub(crate) fn honest(&self) -> impl Iterator<Item = &Server> {
        let of_number = |(i, server)| (!self.is_liar(ServerId(i as u8))).then_some(server);
        self.servers.iter().take(self.voters.len()).enumerate().filter_map(of_number)
    }

    pub(crate) fn schedule(&mut self, after_ms: u64, event: Event) {
        self.event_count += 1;
        self.events.insert((self.now.plus_ms(after_ms), self.event_count), event);
    }

    fn start(&mut self, id: ServerId) {
        let mut stored = self.servers[id.index()].disk.stored();
        let file = &self.servers[id.index()].membership;
        let membership = stored
            .membership(&self.manifest)
            .map_or_else(|| Arc::clone(file), |stored| file.or_newer(&stored));
        let own = self.identity(id);
        if id == own {
            let writes = stored.begin(&self.signers[&own].counter(), membership.since(own));
            writes.iter().for_each(|write| self.servers[id.index()].disk.apply(write));
        }
        let identity = Identity {
            voter: self.boot_voter(id, stored.certificate.as_ref(), &membership),
            membership,
            boot: self.rng.random(),
            log_tail: self.faults.log_tail,
        };
        let server = &mut self.servers[id.index()];
        server.keeper = Keeper::new(own, self.manifest.thresholds);
        server.operations = 0;
        server.replica = Some(Replica::start(identity, stored));
        server.keyrings = (0..self.voters.len())
            .map(|from| (ServerId(from as u8), Keyring::new(Arc::clone(&self.manifest))))
            .collect();
        let voting = server.replica.as_ref().expect("it was started just now").status().voting;
        self.in_use.entry(id).or_default().push(voting);
        self.after_step(id);
        for peer in self.manifest.grid().servers().filter(|peer| *peer != own) {
            self.step(id, Input::Connected(peer));
            self.step(peer, Input::Connected(own));
        }
        self.schedule(Replica::tick_interval_ms(), Event::Tick(id));
    }

    pub(crate) fn step(&mut self, id: ServerId, input: Input) {
        let liar = self.is_liar(id);
        let skew_ms = self.servers.get(id.index()).map_or(0, |server| server.skew_ms);
        let now = self.lagging_clock(id, self.now.plus_ms(skew_ms));
        if let Some(replica) = self.servers.get_mut(id.index()).and_then(|server| server.replica.as_mut()) {
            let before = replica.status();
            replica.handle(now, input);
            let status = replica.status();
            let in_use = self.in_use.entry(id).or_default();
            if !in_use.contains(&status.voting) {
                in_use.push(status.voting);
                in_use.drain(..in_use.len().saturating_sub(3));
            }
            assert!(status.part != Part::Repairing || liar, "seed {}: server {id} diverged", self.seed);
            let bound = self.faults.log_tail + 2 * WINDOW + FLUSH_BATCHES;
            assert!(status.log_entries as u64 <= bound, "seed {}: the log of server {id} grows", self.seed);
            // Deposits and servers' steps are tried again with new numbers until the old ones expire.
            let tries = 40 * (self.faults.secrets + self.voters.len());
            assert!(
                status.pending_requests <= self.faults.requests + tries,
                "seed {}: requests pile up",
                self.seed
            );
            if before.part == Part::Repairing && status.part == Part::Voting {
                self.repairs += 1;
                self.corrupt = Some((id, false));
            }
            self.transfers += usize::from(before.transfer.is_some() && status.transfer.is_none());
            self.recoveries += usize::from(before.part == Part::Recovering && status.part == Part::Voting);
            self.after_step(id);
        }
    }

    fn after_step(&mut self, id: ServerId) {
        let free = self.servers[id.index()].replica.as_mut().map(Replica::drain_free);
        self.send_out(id, free.unwrap_or_default());
        let server = &mut self.servers[id.index()];
        let Some(effects) = server.replica.as_mut().and_then(Replica::drain) else { return };
        if server.uncommitted.is_empty() {
            let fsync_ms = self.rng.random_range(0..8);
            server.uncommitted.push_back(effects);
            self.schedule(fsync_ms, Event::Commit(id));
        } else {
            // Group commit: goes along with the transaction that is open.
            server.uncommitted.push_back(effects);
        }
    }

    fn commit(&mut self, id: ServerId) {
        let liar = self.is_liar(id);
        let server = &mut self.servers[id.index()];
        let effects: Vec<_> = server.uncommitted.drain(..).collect();
        let mut unsent = Vec::new();
        let mut durable = None;
        for (writes, messages) in effects {
            writes.writes().iter().for_each(|write| server.disk.apply(write));
            let shares = writes.writes().iter().filter(|write| matches!(write, Write::Shares(_)));
            server.operations += shares.count() as u64;
            durable = Some(writes.committed());
            unsent.push(messages);
        }
        let Some(durable) = durable else { return };
        for released in unsent.into_iter().map(|unsent| unsent.release(&durable)) {
            for accusation in released.accusations.into_iter().filter(|_| !liar) {
                self.check_accusation(id, &accusation);
            }
            self.send_out(id, released.messages);
            for request in released.requests {
                self.check_step(id, request.request());
                self.step(id, Input::Request(request));
            }
            match released.published {
                // A liar's signer has to be shown something too, or it has no keys to lie with.
                Some(published) if liar => self.servers[id.index()].published = Some(published),
                Some(published) => self.check_published(id, published),
                None => {}
            }
            for request in released.replied {
                self.acknowledge(id, request);
            }
        }
    }

    pub(crate) fn send_out(&mut self, id: ServerId, messages: Vec<Outgoing>) {
        let (from, liar) = (self.identity(id), self.is_liar(id));
        for (target, message) in messages {
            if !liar {
                self.check_promise(id, &message);
                if let PeerMessage::Forward(request) = &*message
                    && self.hello(from).any(|key| key.statement.key == request.request.client)
                {
                    self.check_step(id, &request.request);
                }
            }
            let bytes = Arc::new(encode(&*message));
            assert!(bytes.len() <= MAX_FRAME_BYTES, "seed {}: a message that cannot be sent", self.seed);
            self.trace = sha256(&[&self.trace.0[..], &bytes].concat());
            let to: Vec<_> = match target {
                Target::One(to) => vec![to],
                Target::All => self.manifest.grid().servers().filter(|to| *to != from).collect(),
            };
            let voter = self.voter(id);
            if let Some(liar) = self.liars.get_mut(&id) {
                liar.vote_with(voter);
                let lies = liar.say(self.now, &to, &message, &mut self.conspiracy);
                self.send_lies(id, lies);
            } else {
                let held_back_ms = self.held_back_ms(&message);
                for to in to {
                    let instead = self.thief_changes(id, to, &message);
                    let sent: Vec<_> = match instead.is_empty() {
                        true => vec![Arc::clone(&bytes)],
                        false => instead.iter().map(|lie| Arc::new(encode(lie))).collect(),
                    };
                    sent.into_iter().for_each(|bytes| self.send(from, to, bytes, held_back_ms));
                }
            }
        }
    }

    pub(crate) fn send_lies(&mut self, from: ServerId, lies: Vec<(ServerId, u64, PeerMessage)>) {
        for (to, delay_ms, message) in lies {
            let Some(message) = self.lets_out(from, to, message) else { continue };
            self.send(from, to, Arc::new(encode(&message)), delay_ms);
        }
    }

    fn send(&mut self, from: ServerId, to: ServerId, bytes: Arc<Vec<u8>>, held_back_ms: u64) {
        if self.cut_off.contains(&from) != self.cut_off.contains(&to) {
            return;
        }
        let (loss, duplication, max_delay_ms) = match self.healed {
            true => (0.0, 0.0, 10),
            false => (self.faults.loss, self.faults.duplication, self.faults.max_delay_ms),
        };
        let copies =
            usize::from(!self.rng.random_bool(loss)) + usize::from(self.rng.random_bool(duplication));
        let twin = ServerId(self.voters.len() as u8);
        let nodes = match (self.faults.twins && to == ServerId(0), self.rng.random_range(0..3)) {
            (false, _) | (true, 0) => vec![to],
            (true, 1) => vec![twin],
            _ => vec![to, twin],
        };
        for node in nodes {
            for _ in 0..copies {
                let delay_ms = held_back_ms + self.rng.random_range(0..=max_delay_ms);
                self.schedule(delay_ms, Event::Deliver { to: node, from, bytes: Arc::clone(&bytes) });
            }
        }
    }

    /// Nothing leaves before it is durable, and nobody contradicts what it said: before a crash,
    /// after it, ever.
    fn check_promise(&mut self, id: ServerId, message: &PeerMessage) {
        let disk = &self.servers[id.index()].disk;
        let shown = match message {
            PeerMessage::Certificate(certificate) | PeerMessage::Offer(certificate) => Some(certificate),
            PeerMessage::ViewChange(change) => change.body.stable.as_ref(),
            _ => None,
        };
        if let Some(certificate) = shown {
            assert!(certificate.votes.len() >= self.manifest.thresholds.q(), "a certificate without q votes");
        }
        let (phase, view, sequence, attempt, said) = match message {
            PeerMessage::PrePrepare(signed, _) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.accepted.as_ref());
                assert!(
                    covers(disk, known.map(|(p, _)| p.body.0), slot),
                    "pre-prepare sent before it was durable"
                );
                ("pre-prepare", slot.view, slot.sequence, slot.attempt, slot.digest)
            }
            PeerMessage::Prepare(signed) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.accepted.as_ref());
                assert!(
                    covers(disk, known.map(|(p, _)| p.body.0), slot),
                    "prepare sent before it was durable"
                );
                ("prepare", slot.view, slot.sequence, slot.attempt, slot.digest)
            }
            PeerMessage::Commit(signed) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.prepared.as_ref());
                assert!(
                    covers(disk, known.map(|(p, _)| p.statement.0), slot),
                    "commit sent before it was durable"
                );
                assert!(known.is_none_or(|(p, _)| p.votes.len() >= self.manifest.thresholds.q()));
                ("commit", slot.view, slot.sequence, slot.attempt, slot.digest)
            }
            PeerMessage::Checkpoint(signed) => {
                let checkpoint = signed.body;
                let root = *self.roots.entry(checkpoint.sequence).or_insert(checkpoint.root);
                assert_eq!(
                    root, checkpoint.root,
                    "seed {}: two states at {}",
                    self.seed, checkpoint.sequence
                );
                ("checkpoint", View(0), checkpoint.sequence, checkpoint.attempt(), checkpoint.root)
            }
            PeerMessage::ViewChange(signed) => {
                let promised = disk.view.as_ref().map(|stored| stored.view);
                assert!(promised >= Some(signed.body.view), "view change sent before it was durable");
                self.left.insert(id, signed.body.view);
                return;
            }
            PeerMessage::Held(signed) => {
                let certified = disk.certificate.as_ref().map(|c| c.statement.sequence);
                assert!(certified >= Some(signed.body.sequence), "held before its certificate was durable");
                let executed = disk.state.map_or(Sequence(0), |s| s.sequence);
                let replayable = (executed.0 + 1..=signed.body.sequence.0)
                    .all(|s| disk.slots.get(&Sequence(s)).is_some_and(|slot| slot.committed.is_some()));
                assert!(replayable, "held before it was executed durably");
                return;
            }
            _ => return,
        };
        if phase != "checkpoint" {
            let left = self.left.get(&id).copied().unwrap_or_default();
            assert!(view >= left, "seed {}: server {id} votes in view {view} after {left}", self.seed);
        }
        let before = *self.promises.entry((id, phase, view, sequence, attempt)).or_insert(said);
        if before != said && self.may_take_back(id) {
            self.promises.insert((id, phase, view, sequence, attempt), said);
            return;
        }
        assert_eq!(before, said, "seed {}: server {id} contradicts its {phase} for {sequence}", self.seed);
    }

    fn check_published(&mut self, id: ServerId, published: Published) {
        let statement = published.certificate.statement;
        assert_eq!(published.snapshot.root(), statement.root);
        // Agreed time: never back, and not further ahead than a correct clock's error allows.
        let before = self.servers[id.index()].published.as_ref().map(|before| before.certificate.statement);
        assert!(before.is_none_or(|before| before.time <= statement.time), "agreed time goes back");
        let latest = self.now.plus_ms(2 * self.faults.skew_ms + CLOCK_BOUND_MS);
        assert!(statement.time <= latest, "seed {}: agreed time runs ahead", self.seed);
        let root = *self.roots.entry(statement.sequence).or_insert(statement.root);
        assert_eq!(root, statement.root, "seed {}: two certificates at {}", self.seed, statement.sequence);
        self.check_epoch(&published);
        self.remember_for_liars(&published);
        self.servers[id.index()].published = Some(published);
    }

    /// A gateway answers its client: from then on the write is never lost.
    fn acknowledge(&mut self, id: ServerId, request: RequestId) {
        self.acknowledge_deposit(id, request);
        let Some(index) = self.gateways.remove(&(id, request)) else { return };
        let published = self.servers[id.index()].published.as_ref().expect("replies follow a certificate");
        let receipt = Receipt {
            reply: Proved::look_up(&published.snapshot, &layout::reply_key(request)),
            certificate: Arc::clone(&published.certificate),
            completion: published.completion.clone(),
        };
        // A client that has the manifest alone follows what the same server shows.
        let replica = self.servers[id.index()].replica.as_ref().expect("it has just published");
        let mut verifier = Verifier::new(Arc::clone(&self.manifest));
        verifier.follow(replica.membership().proofs()).expect("a correct server's changes hold");
        let executed = verifier.executed(receipt, request).expect("a correct server's receipt holds");
        let executed = executed.there().expect("it was executed");
        assert_eq!(
            executed.outcome(),
            Ok(&Done::Record { version: 1 }),
            "seed {}: executed twice",
            self.seed
        );
        let client = &mut self.clients[index];
        client.acknowledged = true;
        client.waited_ms = self.now.since_ms(client.asked.expect("it asked"));
    }

    fn submit(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.acknowledged {
            return;
        }
        client.attempts += 1;
        client.asked.get_or_insert(self.now);
        let request = client.request.clone().verify(&self.cluster).unwrap();
        // A liar's clients go on to the next server: here they begin there.
        let gateway = ServerId(self.rng.random_range(0..self.voters.len()) as u8);
        if self.servers[gateway.index()].replica.is_none() || self.is_liar(gateway) {
            self.schedule(300, Event::Submit(index));
            return;
        }
        self.gateways.insert((gateway, request.id()), index);
        self.step(gateway, Input::Request(request));
        // No receipt in time: on to another server.
        let again = self.rng.random_range(800..2_500);
        self.schedule(again, Event::Submit(index));
    }

    pub(crate) fn next_event(&mut self) {
        let ((at, number), event) = self.events.pop_first().expect("ticks go on for ever");
        self.now = at;
        if self.verbose {
            let time = at.since_ms(START);
            match &event {
                Event::Deliver { to, from, bytes } => {
                    let message: PeerMessage = decode(bytes).unwrap();
                    eprintln!("{time:>6} {number:>6} {from}→{to} {message:?}");
                }
                Event::Tick(_) | Event::Commit(_) => {}
                Event::Crash(id) => eprintln!("{time:>6} {number:>6} crash {id}"),
                Event::Replace(id) => eprintln!("{time:>6} {number:>6} {id} is to be replaced"),
                Event::Decide(_) => {}
                Event::Backup(id) => eprintln!("{time:>6} {number:>6} backup of {id}"),
                Event::Corrupt(id) => eprintln!("{time:>6} {number:>6} the state of {id} is changed"),
                Event::Forget(id) => eprintln!("{time:>6} {number:>6} {id} forgets"),
                Event::Restart(id) => eprintln!("{time:>6} {number:>6} restart {id}"),
                Event::Partition(side) => eprintln!("{time:>6} {number:>6} cut off: {side:?}"),
                Event::Deposit(index) => eprintln!("{time:>6} {number:>6} secret {index} is deposited"),
                Event::Submit(index) => eprintln!("{time:>6} {number:>6} client {index} asks"),
                Event::Write | Event::Begin(_) | Event::Late { .. } => {}
                Event::Ask { reader, server, ask, .. } => {
                    eprintln!("{time:>6} {number:>6} reader {reader} asks {server}: {ask:?}");
                }
                Event::Answer { reader, server, reply, .. } => {
                    eprintln!("{time:>6} {number:>6} {server} tells reader {reader} {reply:?}");
                }
            }
        }
        match event {
            Event::Deliver { to, from, bytes } => {
                if self.servers[to.index()].replica.is_some()
                    && self.takes_note(to, from, &bytes)
                    && let Some(checked) = self.check(from, to, &bytes)
                    && !self.hoards(to, &checked)
                {
                    match checked {
                        CheckedMessage::AskMasked(_) | CheckedMessage::Masked(_) => {
                            self.keeper_hears(to, from, checked)
                        }
                        checked => self.step(to, Input::Message(from, checked)),
                    }
                }
            }
            Event::Tick(id) => {
                if self.servers[id.index()].replica.is_some() {
                    self.step(id, Input::Tick);
                    self.keeper_ticks(id);
                    self.check_back(id);
                    self.tell_backups(id);
                    self.thief_acts(id);
                    if self.liars.contains_key(&id) {
                        self.lie_about_epochs(id);
                    }
                    if let Some(liar) = self.liars.get_mut(&id) {
                        let lies = liar.tick(self.now, &mut self.conspiracy);
                        self.send_lies(id, lies);
                    }
                    self.schedule(Replica::tick_interval_ms(), Event::Tick(id));
                }
            }
            Event::Commit(id) => self.commit(id),
            Event::Crash(id) => self.crash(id),
            Event::Backup(id) => {
                self.servers[id.index()].backup = Some(self.servers[id.index()].disk.clone())
            }
            Event::Corrupt(id) => {
                self.crash(id);
                if self.servers[id.index()].disk.corrupt(self.cluster) {
                    self.corrupt = Some((id, true));
                }
                self.schedule(60, Event::Restart(id));
            }
            Event::Forget(id) => {
                if self.faults.in_turn && !self.may_forget_now(id) {
                    return self.schedule(100, Event::Forget(id));
                }
                self.crash(id);
                if self.faults.in_turn {
                    self.hold_up(id);
                }
                // An old copy, or a new disk.
                let backup = self.servers[id.index()].backup.take().filter(|_| self.rng.random_bool(0.5));
                let disk = backup.unwrap_or_default();
                // A copy that was made under its present voting key is found by the others' word alone. What nobody
                // has heard it say then it may take back: only what follows is checked.
                let signer = self.signers[&self.identity(id)].counter();
                if disk.voting_key == signer.voting && (self.faults.loss > 0.0 || self.faults.partitions) {
                    self.promises.retain(|(server, ..), _| *server != id);
                    self.left.remove(&id);
                    self.unnoticed.push(id);
                }
                self.servers[id.index()].disk = disk;
                let down = self.rng.random_range(60..1_500);
                self.schedule(down, Event::Restart(id));
            }
            Event::Replace(id) => {
                self.crash(id);
                let seed = [100 + id.0; 32];
                self.replacing.insert(id, SigningKey::from_seed(&seed));
                self.schedule(300, Event::Decide(id));
            }
            Event::Decide(id) => self.decide(id),
            Event::Restart(id) => {
                let quiet = self.faults.secrets > 0 && self.faults.epoch_seconds >= LONG_EPOCH_SECONDS;
                if quiet && self.forgetful.contains(&id) {
                    let turns = self.forgetful.len() as u64;
                    self.secrets.back_by.insert(id, self.now.plus_ms(BACK_MS + turns * BACK_IN_TURN_MS));
                }
                let gone = self.dead.contains(&id) && self.healed;
                let may_start = !gone && !self.replacing.contains_key(&id);
                if self.servers[id.index()].replica.is_none() && may_start {
                    self.start(id);
                }
            }
            Event::Submit(index) => self.submit(index),
            Event::Deposit(index) => self.deposit(index),
            Event::Partition(side) => self.cut_off = side,
            Event::Write => self.write(),
            Event::Begin(reader) => self.begin(reader),
            Event::Ask { reader, number, server, ask } => self.answer_reader(reader, number, server, ask),
            Event::Answer { reader, number, server, ask, reply } => {
                self.take_answer(reader, number, server, ask, *reply)
            }
            Event::Late { reader, number } => self.late(reader, number),
        }
    }

    /// Has the administrator order that a server is replaced, until it is so; then the new one starts, with
    /// what any server shows it.
    fn decide(&mut self, id: ServerId) {
        let identity = self.replacing[&id].clone();
        let replicas = self.honest().filter_map(|server| server.replica.as_ref());
        let shown = replicas.map(|replica| replica.membership()).find(|membership| {
            let proved = membership.changes().iter().take(membership.proofs().len());
            proved.into_iter().any(|change| change.replacement.identity == identity.public())
        });
        if let Some(membership) = shown.cloned() {
            let signer = Signer::new(
                Membership::genesis(Arc::clone(&self.manifest)),
                id,
                identity,
                Counter::default(),
            );
            self.signers.insert(id, signer);
            self.replacing.remove(&id);
            self.replacements += 1;
            if self.faults.loss > 0.0 || self.faults.partitions {
                self.promises.retain(|(server, ..), _| *server != id);
                self.left.remove(&id);
            }
            let server = &mut self.servers[id.index()];
            (server.membership, server.disk) = (membership, Disk::default());
            return self.schedule(100, Event::Restart(id));
        }
        let gateway = ServerId(self.rng.random_range(0..self.voters.len()) as u8);
        if self.servers[gateway.index()].replica.is_some() && !self.is_liar(gateway) {
            let replacement = Replacement {
                server: id,
                url: format!("https://new-{id}:1"),
                peer: format!("new-{id}:2"),
                identity: identity.public(),
                certificate: Blob(vec![1]),
            };
            let operation = Operation::Decide(Decision::ReplaceIdentity { replacement });
            let (number, expiry) = (self.rng.random(), self.now.plus_ms(10_000));
            let request = SignedRequest::sign(&self.cluster, &self.administrator, number, expiry, operation);
            self.step(
                gateway,
                Input::Request(request.verify(&self.cluster).expect("it was signed just now")),
            );
        }
        self.schedule(700, Event::Decide(id));
    }

    /// No other server has forgotten anything that matters, and this one's old copy is older than its voting key.
    fn may_forget_now(&self, id: ServerId) -> bool {
        let server = &self.servers[id.index()];
        let old = server.backup.as_ref().is_none_or(|backup| backup.voting_key < server.disk.voting_key);
        let voting = |server: &Server| {
            server.replica.as_ref().is_some_and(|replica| replica.status().part == Part::Voting)
        };
        old && self.servers.iter().all(voting)
    }

    /// What a server has said last is under way for so long that nobody has it when the server asks what it has said.
    fn hold_up(&mut self, id: ServerId) {
        let under_way = |event: &Event| matches!(event, Event::Deliver { from, .. } if *from == id);
        let said: Vec<_> =
            self.events.iter().filter(|(_, event)| under_way(event)).map(|(when, _)| *when).collect();
        for (when, number) in said {
            if let Some(event) = self.events.remove(&(when, number)) {
                self.events.insert((when.plus_ms(3_000), number), event);
            }
        }
    }

    fn crash(&mut self, id: ServerId) {
        let server = &mut self.servers[id.index()];
        server.replica = None;
        server.uncommitted.clear();
        server.published = None;
        self.gateways.retain(|(gateway, _), _| *gateway != id);
        self.events.retain(|_, event| !matches!(event, Event::Tick(i) | Event::Commit(i) if *i == id));
    }

    /// Checks a message as the server's link does. Only liars say what does not pass.
    fn check(&mut self, from: ServerId, to: ServerId, bytes: &Arc<Vec<u8>>) -> Option<CheckedMessage> {
        let digest = sha256(bytes);
        let heard = self.is_liar(to);
        let replica = self.servers[to.index()].replica.as_ref();
        let epoch = replica.map_or(Epoch(0), |replica| replica.state().epoch());
        if let Some(replica) = self.servers[to.index()].replica.as_ref().filter(|_| !heard)
            && decode::<PeerMessage>(bytes)
                .is_ok_and(|message| !replica.wants().needs(from, View(0), &message))
        {
            return None;
        }
        let membership =
            self.servers[to.index()].replica.as_ref().map(|replica| Arc::clone(replica.membership()));
        let changes = membership.as_ref().map_or(0, |membership| membership.changes().len());
        if let Some(known) = self.checked.get(&(from, digest, epoch, changes)).filter(|_| !heard) {
            return known.clone();
        }
        let message: PeerMessage = decode(bytes).expect("what was encoded decodes");
        if heard {
            self.conspiracy.hear(&message, self.voter(from).certificate());
        }
        // Whoever dials says which keys it votes with, and again before the first vote with a new one.
        let hello: Vec<_> = self.hello(from).collect();
        let keyring = self.servers[to.index()].keyrings.get_mut(&from).expect("there is one for each server");
        keyring.set_epoch(epoch);
        if let Some(membership) = &membership {
            keyring.follow(membership);
        }
        for key in hello {
            let known = keyring.add(key);
            assert!(known.is_ok() || self.faults.replaced, "its identity certified it");
        }
        let checked = message.check(from, keyring);
        if let Err(error) = &checked {
            // Who does not know of a change yet does not know the new server.
            let behind = changes < self.replacements;
            // Of what was held up for seconds nobody may remember the key any more.
            let behind = behind || self.faults.in_turn;
            assert!(
                error.is_late() || self.is_liar(from) || self.thief.may_have_spoken_as(from) || behind,
                "seed {}: server {from} is honest, but {error}",
                self.seed
            );
        }
        if self.checked.len() > 4_000 {
            self.checked.clear();
        }
        self.checked.insert((from, digest, epoch, changes), checked.as_ref().ok().cloned());
        checked.ok()
    }

    /// Whether a server may contradict what it said before it forgot. Where messages are lost nobody may have
    /// heard it, or nobody among the q−1 others that it asked for what it signed: one that forgets is one of the f
    /// faulty servers.
    fn may_take_back(&self, server: ServerId) -> bool {
        self.unnoticed.contains(&server)
    }

    /// Nobody who is honest is accused, and no honest server finds fault with itself.
    fn check_accusation(&mut self, by: ServerId, accusation: &Accusation) {
        let seed = self.seed;
        let forgot = matches!(accusation, Accusation::Amnesia { .. }).then_some(by);
        let blamed = accusation.accused().or(forgot);
        if blamed.is_some_and(|server| self.thief.may_have_spoken_as(server)) {
            self.equivocations += 1;
            return;
        }
        self.wrong_dealings += usize::from(matches!(accusation, Accusation::WrongDealing { .. }));
        match accusation {
            Accusation::Equivocation { server, .. } => {
                self.equivocations += 1;
                assert!(
                    self.is_liar(*server) || self.may_take_back(*server),
                    "seed {seed}: {by} says: {accusation}"
                );
            }
            Accusation::BadProposal { server, .. }
            | Accusation::BadNewView { server, .. }
            | Accusation::WrongState { server, .. }
            | Accusation::WrongPart { server, .. }
            | Accusation::WrongDealing { server, .. } => {
                let was_corrupt = self.corrupt.is_some_and(|(id, _)| id == *server);
                assert!(self.is_liar(*server) || was_corrupt, "seed {seed}: {by} says: {accusation}")
            }
            Accusation::Amnesia { .. } => {
                assert!(self.forgetful.contains(&by), "seed {seed}: {by} says: {accusation}")
            }
            // It may be repaired by the time that this leaves it.
            Accusation::Diverged { .. } => {
                let was_corrupt = self.corrupt.is_some_and(|(id, _)| id == by);
                assert!(was_corrupt, "seed {seed}: {by} says: {accusation}")
            }
            Accusation::Damaged(_) | Accusation::Unreadable { .. } => {
                panic!("seed {seed}: {by} says: {accusation}")
            }
        }
    }

    /// Runs with faults, then heals everything and requires progress.
    pub fn run(&mut self) {
        let faulty_ms = if self.faults.in_turn { 30_000 } else { 10_000 };
        while self.now < START.plus_ms(faulty_ms) {
            self.next_event();
        }
        self.healed = true;
        self.secrets.healed_in = self.epoch();
        self.cut_off.clear();
        self.events.retain(|_, event| !matches!(event, Event::Partition(_)));
        for id in self.manifest.grid().servers() {
            let down = self.servers[id.index()].replica.is_none();
            if down && !self.dead.contains(&id) && !self.replacing.contains_key(&id) {
                self.start(id);
            }
        }
        // To ask costs as much as an event of each server.
        while self.now < START.plus_ms(55_000) && !self.is_done() {
            (0..self.voters.len()).for_each(|_| self.next_event());
        }
        let open: Vec<_> = self.clients.iter().filter(|c| !c.acknowledged).map(|c| c.name.as_str()).collect();
        assert!(
            open.is_empty(),
            "seed {}: no receipt for {open:?} although the network healed; dead {:?}, lying {:?}: {:#?}",
            self.seed,
            self.dead,
            self.liars.keys().collect::<Vec<_>>(),
            self.positions()
        );
        assert!(self.is_done(), "seed {}: servers do not catch up: {:#?}", self.seed, self.positions());
        self.check_patient();
        self.check_thief();
        if self.faults.has_good_servers() {
            // A correct primary is not suspected, or hardly ever where every seventh message is lost.
            let most = View(u64::from(self.faults.loss > 0.0));
            assert!(self.view() <= most, "seed {}: a good primary is replaced, {}", self.seed, self.view());
        }
        for server in self.honest() {
            let Some(published) = &server.published else { continue };
            for client in &self.clients {
                let record = layout::record(&published.snapshot, &client.name);
                let record = record.unwrap_or_else(|| panic!("seed {}: {} is lost", self.seed, client.name));
                assert_eq!(record.version, 1);
            }
        }
    }

    /// How far everyone is, for a failure's message.
    fn positions(&self) -> Vec<String> {
        let status = |server: &Server| {
            server.replica.as_ref().map_or("down".into(), |replica| {
                let s = replica.status();
                let active = if s.active { "" } else { " changing" };
                format!(
                    "{}/{} of {} in view {}{active} {:?} {:?}; epoch {}, {:?}",
                    s.executed,
                    s.certified,
                    s.target,
                    s.view,
                    s.part,
                    s.transfer,
                    s.epoch,
                    server.disk.shares
                )
            })
        };
        self.servers.iter().map(status).collect()
    }

    /// All clients have receipts, and all servers hold them.
    fn is_done(&self) -> bool {
        let last = self.roots.last_key_value().map_or(Sequence(0), |(sequence, _)| *sequence);
        let up_to_date = |server: &Server| {
            server.published.as_ref().is_some_and(|published| {
                published.certificate.statement.sequence.0 + 1 >= last.0
                    && self
                        .clients
                        .iter()
                        .all(|c| published.snapshot.get(&layout::name_key(&c.name)).is_some())
            })
        };
        // One that forgot may have to wait for longer than this goes on; it counts as faulty till then.
        let forgot = |server: &&Server| {
            let forgetful = !self.forgetful.is_empty();
            forgetful
                && server.replica.as_ref().is_some_and(|replica| replica.status().part == Part::Recovering)
        };
        let mut alive = self.honest().filter(|server| server.replica.is_some() && !forgot(server));
        let written = self.clients.iter().all(|client| client.acknowledged) && alive.all(up_to_date);
        written && self.replacing.is_empty() && self.secrets.back_by.is_empty() && self.secrets_are_kept()
    }

    pub fn trace_digest(&self) -> Hash {
        self.trace
    }
}
