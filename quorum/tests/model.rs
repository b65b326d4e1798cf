//! The replicas that the server runs, model-checked: every order in which messages can arrive, and be
//! lost, in the smallest interesting cases, as far as the number of states reaches.
//!
//! Four servers, of which the first primary is Byzantine: the model holds every vote that it could cast
//! for either of two batches at the first place, to any server, and delivers whichever it likes. The
//! three others are [`Replica`]s; a step delivers one message to one of them, or lets time pass for one.
//! What they send joins the network, from which nothing has to be delivered. States with the same
//! replicas ([`Replica::fingerprint`]) and the same network are one.
//!
//! `KDS_MODEL_STATES=1000000 cargo test --release -p quorum --test model -- --nocapture` goes further.

use quorum::bytes::{Blob, Hash};
use quorum::codec::{encode, sha256};
use quorum::grid::Grid;
use quorum::ids::{AttemptId, Sequence, ServerId, Timestamp, View};
use quorum::limits::LOG_TAIL_BATCHES;
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::membership::Membership;
use quorum::message::{
    Batch, CheckedBatch, CheckedMessage, Commit, PeerMessage, PrePrepare, Prepare, Slot, Witness,
};
use quorum::ordering::{Identity, Input, Outgoing, Replica, Stored, Target};
use quorum::signing::{Keyring, SigningKey, Voter};
use quorum::thresholds::Thresholds;
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use stateright::{Checker, Model, Property, UniformChooser};
use std::collections::BTreeMap;
use std::fmt;
use std::hash::{Hash as StdHash, Hasher};
use std::sync::atomic::{self, AtomicBool};
use std::sync::{Arc, Mutex};

const LIAR: ServerId = ServerId(0);
const HONEST: [ServerId; 3] = [ServerId(1), ServerId(2), ServerId(3)];
const START: Timestamp = Timestamp(1_700_000_000_000);
/// How far time goes at a step: long enough to suspect a primary.
const PATIENCE_MS: u64 = 4_500;

/// A message on its way: to whom, from whom, and its digest.
type Envelope = (ServerId, ServerId, Hash);

#[derive(Clone)]
struct World {
    /// With their fingerprints.
    replicas: BTreeMap<ServerId, (Arc<Replica>, Hash)>,
    /// How often time has passed for each.
    ticks: BTreeMap<ServerId, u64>,
    network: BTreeMap<Envelope, Vec<Arc<CheckedMessage>>>,
    /// What each said about the first place: committed in a view, executed to a root.
    commits: BTreeMap<(ServerId, View), Hash>,
    roots: BTreeMap<ServerId, Hash>,
    digest: Hash,
}

impl World {
    fn seal(&mut self) {
        let replicas: Vec<_> = self.replicas.values().map(|(_, fingerprint)| *fingerprint).collect();
        let network: Vec<_> = self.network.keys().copied().collect();
        let ticks: Vec<_> = self.ticks.iter().map(|(server, ticks)| (*server, *ticks)).collect();
        let said: Vec<_> = self.commits.iter().map(|(key, digest)| (*key, *digest)).collect();
        self.digest = sha256(&encode(&(replicas, network, ticks, said)));
    }
}
impl StdHash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.digest.0);
    }
}
impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}
impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let replicas = self.replicas.values().map(|(replica, _)| replica.status());
        f.debug_list().entries(replicas).finish()?;
        write!(f, "{:?} {:?}", self.commits, self.roots)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Step {
    Deliver(ServerId, ServerId, [u8; 32]),
    Tick(ServerId),
}

struct Ordering {
    keyring: Keyring,
    start: World,
    /// How often time may pass for each replica.
    ticks: u64,
    /// Only what must never be is looked for: the checker cannot give back the walk that led to a state in
    /// which something had no effect.
    walks: bool,
    /// Whether anybody executed what it committed to in a later view.
    later_view: AtomicBool,
    /// What checking a message led to: the same in every state.
    checked: Mutex<BTreeMap<Hash, Arc<CheckedMessage>>>,
}

impl Ordering {
    /// `both`: the liar may propose two batches; otherwise it proposes one and falls silent.
    fn new(both: bool, ticks: u64) -> Self {
        let identities: Vec<_> = (0..4).map(|i| SigningKey::from_seed(&[i + 1; 32])).collect();
        let thresholds = Thresholds::plan(4, None, None).unwrap();
        let grid = Grid::new(thresholds);
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
            administrators: vec![SigningKey::from_seed(&[200; 32]).public()],
            thresholds,
            servers: servers.collect(),
        });
        let cluster = manifest.cluster_id();
        let mut keyring = Keyring::new(Arc::clone(&manifest));
        let voters: Vec<_> = (0..4u8)
            .map(|i| {
                let mut rng = StdRng::seed_from_u64(i.into());
                Voter::generate(
                    cluster,
                    &identities[usize::from(i)],
                    ServerId(i),
                    AttemptId::default(),
                    0,
                    &mut rng,
                )
            })
            .collect();
        for voter in &voters {
            keyring.add(*voter.certificate()).unwrap();
        }
        let mut start = World {
            replicas: BTreeMap::new(),
            ticks: BTreeMap::new(),
            network: BTreeMap::new(),
            commits: BTreeMap::new(),
            roots: BTreeMap::new(),
            digest: Hash([0; 32]),
        };
        for id in HONEST {
            let identity = Identity {
                membership: Membership::genesis(Arc::clone(&manifest)),
                voter: voters[id.index()].clone(),
                boot: 7,
                log_tail: LOG_TAIL_BATCHES,
            };
            let mut replica = Replica::start(identity, Stored::default());
            for other in HONEST.into_iter().filter(|other| *other != id) {
                let nothing = Witness {
                    boot: 7,
                    certificate: None,
                    prepares: vec![],
                    commits: vec![],
                    view_change: None,
                };
                let answer = CheckedMessage::Witness(Box::new(nothing));
                replica.handle(START, Input::Message(other, answer));
            }
            replica.handle(START, Input::Tick);
            let _ = (replica.drain_free(), replica.drain());
            let fingerprint = replica.fingerprint();
            start.replicas.insert(id, (Arc::new(replica), fingerprint));
        }
        let mut ordering = Self {
            keyring,
            start,
            ticks,
            walks: false,
            later_view: AtomicBool::new(false),
            checked: Mutex::default(),
        };
        let mut start = ordering.start.clone();
        for time in 0..=u64::from(both) {
            let batch = Batch { time: START.plus_ms(time), requests: vec![] };
            let digest = CheckedBatch::check(&cluster, batch.clone()).unwrap().digest();
            let slot = Slot { view: View(0), sequence: Sequence(1), digest, attempt: AttemptId::default() };
            let liar = &voters[0];
            let proposal =
                PeerMessage::PrePrepare(liar.sign(PrePrepare(slot)).signed().clone(), batch.into());
            // Both of its votes in one step: an adversary gains nothing by keeping the second.
            let prepare = PeerMessage::Prepare(liar.sign(Prepare(slot)).signed().clone());
            let commit = PeerMessage::Commit(liar.sign(Commit(slot)).signed().clone());
            for to in HONEST {
                ordering.post(&mut start, LIAR, to, &[&proposal]);
                ordering.post(&mut start, LIAR, to, &[&prepare, &commit]);
            }
        }
        start.seal();
        ordering.start = start;
        ordering
    }

    /// Puts messages into the network that arrive together, if they can bear on what is ordered at the
    /// first place.
    fn post(&self, world: &mut World, from: ServerId, to: ServerId, messages: &[&PeerMessage]) {
        let matters = |message: &&PeerMessage| match message {
            PeerMessage::PrePrepare(proposal, _) => proposal.body.0.sequence == Sequence(1),
            PeerMessage::Prepare(vote) => vote.body.0.sequence == Sequence(1),
            PeerMessage::Commit(vote) => vote.body.0.sequence == Sequence(1),
            PeerMessage::Suspect(_)
            | PeerMessage::ViewChange(_)
            | PeerMessage::NewView(..)
            | PeerMessage::FetchViewChanges(_)
            | PeerMessage::FetchedViewChange(_)
            | PeerMessage::Fetch(_)
            | PeerMessage::Fetched(_) => true,
            _ => false,
        };
        if !HONEST.contains(&to) || !messages.iter().all(matters) {
            return;
        }
        let mut digests = Vec::new();
        let checked = messages.iter().map(|message| {
            let digest = sha256(&encode(message));
            digests.push(digest);
            let mut known = self.checked.lock().expect("nobody panics with it");
            let check = || {
                let checked = (*message).clone().check(from, &mut self.keyring.clone());
                Arc::new(checked.expect("all of them are well formed"))
            };
            Arc::clone(known.entry(digest).or_insert_with(check))
        });
        let checked = checked.collect();
        world.network.insert((to, from, sha256(&encode(&digests))), checked);
    }

    /// One step of one replica. What it writes is durable at once.
    fn step(&self, world: &mut World, id: ServerId, inputs: impl IntoIterator<Item = Input>) {
        let mut replica = world.replicas[&id].0.as_ref().clone();
        let now = START.plus_ms(PATIENCE_MS * world.ticks.get(&id).copied().unwrap_or(0));
        inputs.into_iter().for_each(|input| replica.handle(now, input));
        let mut sent: Vec<Outgoing> = replica.drain_free();
        while let Some((writes, unsent)) = replica.drain() {
            sent.extend(unsent.release(&writes.committed()).messages);
        }
        let fingerprint = replica.fingerprint();
        world.replicas.insert(id, (Arc::new(replica), fingerprint));
        let executed_before = world.roots.contains_key(&id);
        for (target, message) in sent {
            match &*message {
                PeerMessage::Commit(vote) if vote.body.0.sequence == Sequence(1) => {
                    world.commits.insert((id, vote.body.0.view), vote.body.0.digest);
                }
                PeerMessage::Checkpoint(vote) if vote.body.sequence == Sequence(1) => {
                    world.roots.insert(id, Hash(sha256(&encode(&(vote.body.root, vote.body.time))).0));
                }
                _ => {}
            }
            for to in HONEST
                .into_iter()
                .filter(|to| *to != id && matches!(target, Target::All) || target == Target::One(*to))
            {
                self.post(world, id, to, &[&message]);
            }
        }
        let executes = !executed_before && world.roots.contains_key(&id);
        if executes && world.commits.contains_key(&(id, View(1))) {
            self.later_view.store(true, atomic::Ordering::Relaxed);
        }
    }
}

impl Model for Ordering {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![self.start.clone()]
    }
    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        steps.extend(world.network.keys().map(|(to, from, digest)| Step::Deliver(*to, *from, digest.0)));
        let awake = |id: &ServerId| world.ticks.get(id).copied().unwrap_or(0) < self.ticks;
        steps.extend(HONEST.into_iter().filter(awake).map(Step::Tick));
    }
    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut world = world.clone();
        match step {
            Step::Deliver(to, from, digest) => {
                let messages = world.network.remove(&(to, from, Hash(digest)))?;
                let before = world.replicas[&to].1;
                let inputs = messages.iter().map(|message| Input::Message(from, message.as_ref().clone()));
                self.step(&mut world, to, inputs);
                // A message without effect is as good as lost, and that is a state already.
                let changed = world.replicas[&to].1 != before;
                world.seal();
                changed.then_some(world)
            }
            Step::Tick(id) => {
                *world.ticks.entry(id).or_default() += 1;
                self.step(&mut world, id, [Input::Tick]);
                world.seal();
                Some(world)
            }
        }
    }
    fn properties(&self) -> Vec<Property<Self>> {
        fn agree<T: PartialEq>(mut said: impl Iterator<Item = T>) -> bool {
            let first = said.next();
            said.all(|other| Some(&other) == first.as_ref())
        }
        let mut properties = vec![
            Property::<Self>::always("all execute the same", |_, world| agree(world.roots.values())),
            Property::<Self>::always("one batch is prepared in a view", |_, world| {
                let views = world.commits.keys().map(|(_, view)| *view);
                views.into_iter().all(|of| {
                    agree(world.commits.iter().filter(|((_, view), _)| *view == of).map(|(_, digest)| digest))
                })
            }),
        ];
        if !self.walks {
            let executes = |_: &Self, world: &World| !world.roots.is_empty();
            properties.push(Property::<Self>::sometimes("somebody executes", executes));
        }
        properties
    }
}

fn states(default: usize) -> usize {
    std::env::var("KDS_MODEL_STATES").map_or(default, |text| text.parse().expect("a number"))
}

fn report(name: &str, checker: &impl Checker<Ordering>, all: &str) {
    println!(
        "{name}: {} states, {} of them distinct, up to {} steps deep{all}",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
    );
    checker.assert_no_discovery("all execute the same");
    checker.assert_no_discovery("one batch is prepared in a view");
}

/// Two batches for one place: the liar votes for both, and shows each to whom it likes. All of it.
#[test]
fn a_primary_that_proposes_two_batches() {
    let checker = Ordering::new(true, 0).checker().threads(2).spawn_bfs().join();
    report("two batches", &checker, ": all there are");
    assert!(checker.is_done());
    checker.assert_any_discovery("somebody executes");
}

/// One batch, and then silence: the others change the view, at any moment of agreement on it, and what
/// somebody may have executed stays. Breadth first as far as it reaches, then deep walks.
#[test]
fn a_primary_that_falls_silent_in_the_middle() {
    let model = || {
        let mut model = Ordering::new(false, 1);
        // It has said all that it says.
        for (to, from, digest) in model.start.network.keys().copied().collect::<Vec<_>>() {
            let step = Step::Deliver(to, from, digest.0);
            model.start = model.next_state(&model.start, step).expect("nobody has heard that before");
        }
        model
    };
    let checker = model().checker().threads(2).target_state_count(states(150_000)).spawn_bfs().join();
    report("one batch, then silence", &checker, "");
    checker.assert_any_discovery("somebody executes");
    let model = Ordering { walks: true, ..model() };
    let walks = model.checker().threads(2).target_state_count(states(60_000));
    let checker = walks.spawn_simulation(1, UniformChooser).join();
    report("one batch, then silence: walks", &checker, "");
    let later_view = &checker.model().later_view;
    assert!(later_view.load(atomic::Ordering::Relaxed), "no walk went on in a later view");
}
