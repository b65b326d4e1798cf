//! The simulated cluster: replicas, disks, a network, clients, and the invariants.

use crate::disk::Disk;
use quorum::answer::{Proved, Receipt, Verifier};
use quorum::bytes::{Blob, Hash};
use quorum::codec::{decode, encode, sha256};
use quorum::grid::Grid;
use quorum::ids::{ClusterId, Epoch, Sequence, ServerId, Timestamp, View};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::message::{PeerMessage, Slot};
use quorum::ordering::{Accusation, Identity, Input, Part, Published, Replica, Target, Unsent, WriteBatch};
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::request::{Done, Operation, Outcome, RequestId, SignedRequest};
use quorum::sealing::OpeningKey;
use quorum::signing::{Keyring, SigningKey, Voter};
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
}

enum Event {
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
    Submit(usize),
    /// From now on these servers and the others do not reach each other.
    Partition(Vec<ServerId>),
}

struct Server {
    replica: Option<Replica>,
    disk: Disk,
    uncommitted: VecDeque<(WriteBatch, Unsent)>,
    keyrings: BTreeMap<ServerId, Keyring>,
    published: Option<Published>,
}

struct Client {
    request: SignedRequest,
    name: Name,
    attempts: usize,
    acknowledged: bool,
}

pub struct Simulation {
    pub verbose: bool,
    /// How often an honest server accused the liar of saying two things.
    pub equivocations: usize,
    seed: u64,
    rng: StdRng,
    faults: Faults,
    now: Timestamp,
    events: BTreeMap<(Timestamp, u64), Event>,
    event_count: u64,
    manifest: Arc<Manifest>,
    cluster: ClusterId,
    voters: Vec<Voter>,
    servers: Vec<Server>,
    clients: Vec<Client>,
    gateways: BTreeMap<(ServerId, RequestId), usize>,
    healed: bool,
    dead: Vec<ServerId>,
    cut_off: Vec<ServerId>,
    trace: Hash,
    /// What each server promised: no server ever says two things (checked at every send).
    promises: BTreeMap<(ServerId, &'static str, View, Sequence), Hash>,
    roots: BTreeMap<Sequence, Hash>,
    /// The view that each server last said it changes to.
    left: BTreeMap<ServerId, View>,
}

const START: Timestamp = Timestamp(1_700_000_000_000);
const REQUESTS: usize = 24;

/// Whether what is on disk keeps a server from contradicting a vote: the vote itself, or one of a
/// later view that was written together with it (earlier views are never voted in again).
fn covers(stored: Slot, vote: Slot) -> bool {
    stored == vote || stored.view > vote.view
}

impl Simulation {
    pub fn new(n: usize, seed: u64, faults: Faults) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let thresholds = Thresholds::plan(n, None, None).unwrap();
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
            epoch_seconds: 30,
            administrators_needed: 1,
            administrators: vec![administrator.public()],
            thresholds,
            servers: servers.collect(),
        });
        manifest.validate().unwrap();
        let cluster = manifest.cluster_id();
        let voters = (0..n).map(|i| {
            let id = ServerId(i as u8);
            Voter::generate(cluster, &identities[i], id, Epoch(0), 0, &mut StdRng::seed_from_u64(i as u64))
        });
        let clients = (0..REQUESTS).map(|i| {
            let name = Name::new(format!("name-{i}")).unwrap();
            let keys = vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![i as u8 + 1; 32]) }];
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
            Client { request, name, attempts: 0, acknowledged: false }
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
            cut_off: Vec::new(),
            trace: Hash([0; 32]),
            promises: BTreeMap::new(),
            roots: BTreeMap::new(),
            left: BTreeMap::new(),
            manifest,
            rng: StdRng::seed_from_u64(rng.random()),
        };
        let twin = faults.twins.then_some(ServerId(n as u8));
        for id in grid.servers().chain(twin) {
            simulation.servers.push(Server {
                replica: None,
                disk: Disk::default(),
                uncommitted: VecDeque::new(),
                keyrings: BTreeMap::new(),
                published: None,
            });
            simulation.start(id);
        }
        for i in 0..REQUESTS {
            let at = simulation.rng.random_range(0..6_000);
            simulation.schedule(at, Event::Submit(i));
        }
        if faults.crashes {
            simulation.schedule_crashes();
        }
        if faults.deaths {
            let f = simulation.manifest.thresholds.f();
            for victim in 0..simulation.rng.random_range(1..=f) {
                let at = simulation.rng.random_range(0..7_000);
                simulation.dead.push(ServerId(victim as u8));
                simulation.schedule(at, Event::Crash(ServerId(victim as u8)));
            }
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
    fn identity(&self, node: ServerId) -> ServerId {
        if node.index() < self.voters.len() { node } else { ServerId(0) }
    }
    fn is_liar(&self, node: ServerId) -> bool {
        self.faults.twins && self.identity(node) == ServerId(0)
    }
    fn honest(&self) -> impl Iterator<Item = &Server> {
        self.servers.iter().take(self.voters.len()).skip(usize::from(self.faults.twins))
    }

    fn schedule(&mut self, after_ms: u64, event: Event) {
        self.event_count += 1;
        self.events.insert((self.now.plus_ms(after_ms), self.event_count), event);
    }

    fn start(&mut self, id: ServerId) {
        let identity = Identity {
            manifest: Arc::clone(&self.manifest),
            voter: self.voters[self.identity(id).index()].clone(),
            opening: Arc::new(OpeningKey::derive(&[self.identity(id).0; 32])),
            boot: self.rng.random(),
        };
        let server = &mut self.servers[id.index()];
        server.replica = Some(Replica::start(identity, server.disk.stored()));
        server.keyrings = (0..self.voters.len())
            .map(|from| {
                let mut keyring = Keyring::new(Arc::clone(&self.manifest));
                keyring.add(*self.voters[from].certificate()).unwrap();
                (ServerId(from as u8), keyring)
            })
            .collect();
        self.after_step(id);
        let own = self.identity(id);
        for peer in self.manifest.grid().servers().filter(|peer| *peer != own) {
            self.step(id, Input::Connected(peer));
            self.step(peer, Input::Connected(own));
        }
        self.schedule(Replica::tick_interval_ms(), Event::Tick(id));
    }

    fn step(&mut self, id: ServerId, input: Input) {
        let now = self.now;
        let liar = self.is_liar(id);
        if let Some(replica) = self.servers.get_mut(id.index()).and_then(|server| server.replica.as_mut()) {
            replica.handle(now, input);
            let status = replica.status();
            assert!(status.part != Part::Repairing || liar, "seed {}: server {id} diverged", self.seed);
            assert!(status.log_entries < 1_000, "seed {}: the log of server {id} grows", self.seed);
            self.after_step(id);
        }
    }

    fn after_step(&mut self, id: ServerId) {
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
        let (from, liar, twins) = (self.identity(id), self.is_liar(id), self.faults.twins);
        let server = &mut self.servers[id.index()];
        let effects: Vec<_> = server.uncommitted.drain(..).collect();
        let mut unsent = Vec::new();
        let mut durable = None;
        for (writes, messages) in effects {
            writes.writes().iter().for_each(|write| server.disk.apply(write));
            durable = Some(writes.committed());
            unsent.push(messages);
        }
        let Some(durable) = durable else { return };
        for released in unsent.into_iter().map(|unsent| unsent.release(&durable)) {
            for accusation in released.accusations {
                // Nobody who is honest may be accused.
                let equivocation = match accusation {
                    Accusation::Equivocation { server, .. } => !(twins && server == ServerId(0)),
                    _ => false,
                };
                let of_liar = matches!(accusation, Accusation::Equivocation { .. });
                self.equivocations += usize::from(!liar && of_liar);
                assert!(liar || !equivocation, "seed {}: {accusation}", self.seed);
            }
            for (target, message) in released.messages {
                if !liar {
                    self.check_promise(id, &message);
                }
                let bytes = Arc::new(encode(&*message));
                self.trace = sha256(&[&self.trace.0[..], &bytes].concat());
                match target {
                    Target::One(to) => self.send(from, to, bytes),
                    Target::All => {
                        for to in self.manifest.grid().servers().filter(|to| *to != from) {
                            self.send(from, to, Arc::clone(&bytes));
                        }
                    }
                }
            }
            if let Some(published) = released.published.filter(|_| !liar) {
                self.check_published(id, published);
            }
            for request in released.replied {
                self.acknowledge(id, request);
            }
        }
    }

    fn send(&mut self, from: ServerId, to: ServerId, bytes: Arc<Vec<u8>>) {
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
                let delay_ms = self.rng.random_range(0..=max_delay_ms);
                self.schedule(delay_ms, Event::Deliver { to: node, from, bytes: Arc::clone(&bytes) });
            }
        }
    }

    /// Nothing leaves before it is durable, and nobody contradicts what it said: before a crash,
    /// after it, ever.
    fn check_promise(&mut self, id: ServerId, message: &PeerMessage) {
        let disk = &self.servers[id.index()].disk;
        let (phase, view, sequence, said) = match message {
            PeerMessage::PrePrepare(signed, _) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.accepted.as_ref());
                assert!(
                    known.is_some_and(|(p, _)| covers(p.body.0, slot)),
                    "pre-prepare sent before it was durable"
                );
                ("pre-prepare", slot.view, slot.sequence, slot.digest)
            }
            PeerMessage::Prepare(signed) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.accepted.as_ref());
                assert!(
                    known.is_some_and(|(p, _)| covers(p.body.0, slot)),
                    "prepare sent before it was durable"
                );
                ("prepare", slot.view, slot.sequence, slot.digest)
            }
            PeerMessage::Commit(signed) => {
                let slot = signed.body.0;
                let known = disk.slots.get(&slot.sequence).and_then(|s| s.prepared.as_ref());
                assert!(
                    known.is_some_and(|(p, _)| covers(p.statement.0, slot)),
                    "commit sent before it was durable"
                );
                assert!(known.unwrap().0.votes.len() >= self.manifest.thresholds.q());
                ("commit", slot.view, slot.sequence, slot.digest)
            }
            PeerMessage::Checkpoint(signed) => {
                let checkpoint = signed.body;
                let root = *self.roots.entry(checkpoint.sequence).or_insert(checkpoint.root);
                assert_eq!(
                    root, checkpoint.root,
                    "seed {}: two states at {}",
                    self.seed, checkpoint.sequence
                );
                ("checkpoint", View(0), checkpoint.sequence, checkpoint.root)
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
        let before = *self.promises.entry((id, phase, view, sequence)).or_insert(said);
        assert_eq!(before, said, "seed {}: server {id} contradicts its {phase} for {sequence}", self.seed);
    }

    fn check_published(&mut self, id: ServerId, published: Published) {
        let statement = published.certificate.statement;
        assert_eq!(published.snapshot.root(), statement.root);
        let root = *self.roots.entry(statement.sequence).or_insert(statement.root);
        assert_eq!(root, statement.root, "seed {}: two certificates at {}", self.seed, statement.sequence);
        self.servers[id.index()].published = Some(published);
    }

    /// A gateway answers its client: from then on the write is never lost.
    fn acknowledge(&mut self, id: ServerId, request: RequestId) {
        let Some(index) = self.gateways.remove(&(id, request)) else { return };
        let published = self.servers[id.index()].published.as_ref().expect("replies follow a certificate");
        let receipt = Receipt {
            reply: Proved::look_up(&published.snapshot, &layout::reply_key(request)),
            certificate: Arc::clone(&published.certificate),
            completion: published.completion.clone(),
        };
        let mut verifier = Verifier::new(Arc::clone(&self.manifest));
        let reply = verifier.receipt(&receipt, request).expect("a correct server's receipt holds");
        if let Some(completion) = &receipt.completion {
            verifier.completion(completion).expect("a correct server's completion holds");
        }
        assert_eq!(
            reply.outcome,
            Outcome::Done(Done::Record { version: 1 }),
            "seed {}: executed twice",
            self.seed
        );
        self.clients[index].acknowledged = true;
    }

    fn submit(&mut self, index: usize) {
        let client = &mut self.clients[index];
        if client.acknowledged {
            return;
        }
        client.attempts += 1;
        let request = client.request.clone().verify(&self.cluster).unwrap();
        // A liar's clients go on to the next server: here they begin there.
        let gateway =
            ServerId(self.rng.random_range(usize::from(self.faults.twins)..self.voters.len()) as u8);
        if self.servers[gateway.index()].replica.is_none() {
            self.schedule(300, Event::Submit(index));
            return;
        }
        self.gateways.insert((gateway, request.id()), index);
        self.step(gateway, Input::Request(request));
        // No receipt in time: on to another server.
        let again = self.rng.random_range(800..2_500);
        self.schedule(again, Event::Submit(index));
    }

    fn next_event(&mut self) {
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
                Event::Restart(id) => eprintln!("{time:>6} {number:>6} restart {id}"),
                Event::Partition(side) => eprintln!("{time:>6} {number:>6} cut off: {side:?}"),
                Event::Submit(index) => eprintln!("{time:>6} {number:>6} client {index} asks"),
            }
        }
        match event {
            Event::Deliver { to, from, bytes } => {
                let message: PeerMessage = decode(&bytes).expect("what was encoded decodes");
                let server = &mut self.servers[to.index()];
                if server.replica.is_some() {
                    let keyring = server.keyrings.get_mut(&from).unwrap();
                    let checked = message.check(from, keyring).expect("honest messages pass");
                    self.step(to, Input::Message(from, checked));
                }
            }
            Event::Tick(id) => {
                if self.servers[id.index()].replica.is_some() {
                    self.step(id, Input::Tick);
                    self.schedule(Replica::tick_interval_ms(), Event::Tick(id));
                }
            }
            Event::Commit(id) => self.commit(id),
            Event::Crash(id) => {
                let server = &mut self.servers[id.index()];
                server.replica = None;
                server.uncommitted.clear();
                server.published = None;
                self.gateways.retain(|(gateway, _), _| *gateway != id);
                self.events
                    .retain(|_, event| !matches!(event, Event::Tick(i) | Event::Commit(i) if *i == id));
            }
            Event::Restart(id) => {
                if self.servers[id.index()].replica.is_none() && !(self.dead.contains(&id) && self.healed) {
                    self.start(id);
                }
            }
            Event::Submit(index) => self.submit(index),
            Event::Partition(side) => self.cut_off = side,
        }
    }

    /// Runs with faults, then heals everything and requires progress.
    pub fn run(&mut self) {
        while self.now < START.plus_ms(10_000) {
            self.next_event();
        }
        self.healed = true;
        self.cut_off.clear();
        self.events.retain(|_, event| !matches!(event, Event::Partition(_)));
        for id in self.manifest.grid().servers() {
            if self.servers[id.index()].replica.is_none() && !self.dead.contains(&id) {
                self.start(id);
            }
        }
        while self.now < START.plus_ms(55_000) && !self.is_done() {
            self.next_event();
        }
        let open: Vec<_> = self.clients.iter().filter(|c| !c.acknowledged).map(|c| c.name.as_str()).collect();
        assert!(open.is_empty(), "seed {}: no receipt for {open:?} although the network healed", self.seed);
        assert!(self.is_done(), "seed {}: servers do not catch up: {:?}", self.seed, self.positions());
        for server in self.honest().filter(|server| server.replica.is_some()) {
            let published = server.published.as_ref().unwrap();
            for client in &self.clients {
                let record = layout::record(&published.snapshot, &client.name);
                let record = record.unwrap_or_else(|| panic!("seed {}: {} is lost", self.seed, client.name));
                assert_eq!(record.version, 1);
            }
        }
    }

    fn positions(&self) -> Vec<Option<(Sequence, Sequence)>> {
        let status =
            |server: &Server| server.replica.as_ref().map(|r| (r.status().executed, r.status().certified));
        self.servers.iter().map(status).collect()
    }

    /// All clients have receipts, and all servers hold them.
    fn is_done(&self) -> bool {
        let last = self.roots.last_key_value().map_or(Sequence(0), |(sequence, _)| *sequence);
        let up_to_date = |server: &Server| {
            server.published.as_ref().is_some_and(|published| {
                published.certificate.statement.sequence.0 + 1 >= last.0
                    && self.clients.iter().all(|c| layout::record(&published.snapshot, &c.name).is_some())
            })
        };
        let mut alive = self.honest().filter(|server| server.replica.is_some());
        self.clients.iter().all(|client| client.acknowledged) && alive.all(up_to_date)
    }

    pub fn trace_digest(&self) -> Hash {
        self.trace
    }
}
