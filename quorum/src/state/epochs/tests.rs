use super::*;
use crate::ids::{ClusterId, Sequence};
use crate::manifest::tests::sample;
use crate::message::CheckedBatch;
use crate::request::{Operation, Outcome, RequestId, SignedRequest};
use crate::signing::{KeyStatement, SigningKey, Voter};
use crate::state::NotAdmitted;
use rand::{SeedableRng, rngs::StdRng};
use std::sync::Arc;

/// Four servers whose keys are announced: f = 1, q = 3, k = 2, so that D has two dealers at least.
pub(crate) struct World {
    pub(crate) state: State,
    cluster: ClusterId,
    pub(crate) identities: Vec<SigningKey>,
    pub(crate) voters: Vec<Voter>,
    now: Timestamp,
    next: u64,
    sealed: Vec<Attempt>,
    /// What was executed.
    pub(crate) batches: Vec<CheckedBatch>,
}

pub(crate) const SECOND: u64 = 1_000;

impl World {
    pub(crate) fn new() -> Self {
        let (manifest, identities) = sample(4);
        let cluster = manifest.cluster_id();
        let mut rng = StdRng::seed_from_u64(1);
        let voters = (0..4u8).map(|i| {
            Voter::generate(
                cluster,
                &identities[usize::from(i)],
                ServerId(i),
                AttemptId::default(),
                0,
                &mut rng,
            )
        });
        let voters = voters.collect();
        let state = State::genesis(Arc::new(manifest));
        let now = Timestamp(1_000_000);
        let mut world =
            Self { state, cluster, voters, identities, now, next: 0, sealed: vec![], batches: vec![] };
        for i in 0..4 {
            let (voting, sealing) = (*world.voters[i as usize].certificate(), world.sealing(i, Epoch(0)));
            assert!(world.ask(i, Operation::AnnounceKeys { voting, sealing }).is_ok());
        }
        world
    }
    /// A server's voting key of an epoch's first attempt.
    pub(crate) fn voter(&self, server: u8, epoch: Epoch) -> Voter {
        self.voter_of(server, AttemptId::first(epoch))
    }
    pub(crate) fn voter_of(&self, server: u8, attempt: AttemptId) -> Voter {
        let identity = &self.identities[usize::from(server)];
        let (seed, serial) = (u64::from(server) << 32 | attempt.epoch.0, attempt.epoch.0);
        let mut rng = StdRng::seed_from_u64(seed | u64::from(attempt.attempt) << 16);
        Voter::generate(self.cluster, identity, ServerId(server), attempt, serial, &mut rng)
    }
    pub(crate) fn sealing(&self, server: u8, epoch: Epoch) -> KeyCertificate {
        self.sealing_of(server, AttemptId::first(epoch))
    }
    pub(crate) fn sealing_of(&self, server: u8, AttemptId { epoch, attempt }: AttemptId) -> KeyCertificate {
        let key = PublicKey([server + 1 + epoch.0 as u8; 32]);
        let (server, purpose) = (ServerId(server), KeyPurpose::Sealing);
        let statement = KeyStatement { server, purpose, epoch, attempt, serial: epoch.0, key };
        KeyCertificate::issue(&self.cluster, &self.identities[server.index()], statement)
    }
    fn run(&mut self, requests: Vec<SignedRequest>) {
        let requests = requests.into_iter().map(|request| request.verify(&self.cluster).unwrap()).collect();
        let batch = CheckedBatch::new(&self.cluster, self.now, requests);
        let executed = self.state.execute(&batch);
        self.batches.push(batch);
        for (_, event) in executed.events {
            if let Event::Sealed(attempt) = event {
                self.sealed.push(*attempt);
            }
        }
    }
    /// What becomes of a server's request; none if it was not even admitted.
    pub(crate) fn ask(&mut self, server: u8, operation: Operation) -> Result<Done, Option<Refusal>> {
        let key = self.voters[usize::from(server)].key().clone();
        self.ask_with(&key, operation)
    }
    /// The same for anybody's.
    pub(crate) fn ask_with(
        &mut self,
        key: &SigningKey,
        operation: Operation,
    ) -> Result<Done, Option<Refusal>> {
        self.next += 1;
        let expiry = self.now.plus_ms(10_000);
        let request = SignedRequest::sign(&self.cluster, key, self.next, expiry, operation);
        let id = RequestId { client: key.public(), sequence: self.next };
        self.run(vec![request]);
        match self.state.reply(id).map(|reply| reply.outcome) {
            Some(Outcome::Done(done)) => Ok(done),
            Some(Outcome::Refused(refusal)) => Err(Some(refusal)),
            None => Err(None),
        }
    }
    pub(crate) fn step(&mut self, server: u8, step: Step) -> bool {
        self.ask(server, Operation::Step(step)).is_ok()
    }
    pub(crate) fn pass(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
        self.run(vec![]);
    }
    pub(crate) fn epochs(&self) -> Epochs {
        let epochs = layout::epochs(self.state.map()).unwrap();
        let under_way = epochs.attempt.as_ref().map(|attempt| attempt.id);
        assert_eq!(layout::attempt_under_way(self.state.map()), under_way);
        epochs
    }
    pub(crate) fn attempt(&self) -> Attempt {
        self.epochs().attempt.expect("an attempt is under way")
    }
    pub(crate) fn deal(&mut self, server: u8) -> bool {
        let attempt = self.attempt().id;
        let sealing = Box::new(self.sealing_of(server, attempt));
        let voting = Box::new(*self.voter_of(server, attempt).certificate());
        let root = Hash([server + 10; 32]);
        self.step(server, Step::Deal { server: ServerId(server), attempt, root, voting, sealing })
    }
    pub(crate) fn ack(&mut self, server: u8, dealers: &[u8]) -> bool {
        let dealers = dealers.iter().copied().map(ServerId).collect();
        let attempt = self.attempt().id;
        self.step(server, Step::Ack { server: ServerId(server), attempt, dealers })
    }
    pub(crate) fn ready(&mut self, server: u8) -> bool {
        self.ready_with(server, true)
    }
    pub(crate) fn ready_with(&mut self, server: u8, whole: bool) -> bool {
        let attempt = self.attempt().id;
        self.step(server, Step::Ready { server: ServerId(server), attempt, whole })
    }
}

/// Where a cluster stands whose epoch began with attempt `current`, and that makes attempt `next`.
pub(crate) fn standing(current: AttemptId, next: Option<AttemptId>) -> Epochs {
    let mut world = World::new();
    world.pass(30 * SECOND);
    let of = |id| Attempt { id, ..world.attempt() };
    let sealed = (current.epoch > Epoch(0)).then(|| of(current));
    Epochs { current: current.epoch, sealed, attempt: next.map(of), ..world.epochs() }
}

#[test]
fn an_epoch_begins_when_it_is_time_and_q_servers_are_ready() {
    let mut world = World::new();
    world.pass(29 * SECOND);
    assert_eq!(world.epochs().attempt, None);
    world.pass(SECOND);
    assert_eq!(world.attempt().id, AttemptId { epoch: Epoch(1), attempt: 1 });
    for dealer in 0..3 {
        assert!(world.deal(dealer));
    }
    // A dealer's first commitment counts.
    assert!(!world.deal(0));
    assert!(!world.ready(0), "nobody is ready before D is fixed");
    // Two dealers with three acks each are needed; dealer 2 has only two.
    assert!(world.ack(0, &[0, 1, 2]) && world.ack(1, &[1, 2]));
    assert!(world.ack(3, &[0, 1]), "an ack names what is held, not all there is");
    assert_eq!(world.attempt().dealers, None, "one dealer could be the adversary's");
    assert!(world.ack(1, &[0, 1, 2]));
    assert_eq!(world.attempt().dealers, Some(vec![ServerId(0), ServerId(1)]));
    // From now on nobody's contributions get in or out.
    assert!(!world.deal(3) && !world.ack(2, &[0, 1, 2]));
    assert!(world.ready(0) && !world.ready(0) && world.ready(3));
    assert_eq!((world.epochs().current, world.sealed.len()), (Epoch(0), 0), "two of four are not q");
    assert!(world.ready(2));
    assert_eq!((world.epochs().current, world.epochs().since), (Epoch(1), world.now));
    assert_eq!(world.sealed[0].dealers, Some(vec![ServerId(0), ServerId(1)]));
    // The dealers' new sealing keys are on record; the one that did not deal announces its own.
    let key = |world: &World, i| layout::server_keys(world.state.map(), ServerId(i)).unwrap().sealing;
    assert_eq!(key(&world, 2), world.sealing(2, Epoch(1)));
    assert_eq!(key(&world, 3), world.sealing(3, Epoch(0)));
    assert_eq!(world.state.seal().0.epoch, Epoch(1));
    // So are their voting keys. Nobody takes a step with one of an epoch that is over: a thief may have it.
    let recover = |world: &mut World, i: u8| world.step(i, Step::Recover { server: ServerId(i) });
    assert!(!recover(&mut world, 2) && !recover(&mut world, 3));
    world.voters[2] = world.voter(2, Epoch(1));
    assert!(recover(&mut world, 2));
    // The one that did not deal announces its keys; old ones are too late.
    let announce = |world: &mut World, voting: Epoch| {
        world.voters[3] = world.voter(3, voting);
        let voting = *world.voters[3].certificate();
        let sealing = world.sealing(3, Epoch(1));
        world.ask(3, Operation::AnnounceKeys { voting, sealing })
    };
    assert_eq!(announce(&mut world, Epoch(0)), Err(None), "not even ordered");
    assert_eq!(announce(&mut world, Epoch(1)), Ok(Done::Announced));
    assert!(recover(&mut world, 3));
}

/// What an attempt lacked does not hold up the next one, and the old epoch stays valid all the time.
#[test]
fn an_attempt_that_fails_is_repeated_under_another_number() {
    let mut world = World::new();
    world.pass(30 * SECOND);
    assert!(world.step(3, Step::Recover { server: ServerId(3) }));
    assert!(world.deal(0) && world.deal(1) && world.ack(0, &[0, 1]));
    let first = world.attempt().id;
    world.pass(ATTEMPT_MS - 1);
    assert_eq!(world.attempt().id, first);
    world.pass(1);
    assert_eq!(world.attempt().id, AttemptId { epoch: Epoch(1), attempt: 2 });
    assert!(world.attempt().deals.is_empty() && world.attempt().acks.is_empty());
    assert_eq!(world.attempt().recovering, Some(ServerId(3)));
    // Steps of the attempt that is over count for nothing.
    assert!(!world.step(2, Step::Ready { server: ServerId(2), attempt: first, whole: true }));
    assert_eq!(world.epochs().current, Epoch(0));
    // Whoever was to recover is still the one.
    assert!(!world.attempt().renews);
    world.pass(2 * ATTEMPT_MS);
    assert_eq!((world.attempt().id.attempt, world.attempt().recovering), (3, Some(ServerId(3))));
    assert!((0..3).all(|i| world.deal(i)));
    assert!((0..3).all(|i| world.ack(i, &[0, 1, 2])));
    assert!((0..3).all(|i| world.ready(i)));
    assert_eq!((world.epochs().current, world.sealed[0].recovering), (Epoch(1), Some(ServerId(3))));
    assert!(world.epochs().waiting.is_empty());
}

/// A server without its shares has nothing to renew: were it counted, a slow one could be left behind, and
/// with it the last share of a secret (found by simulation). Where too few are whole every other attempt
/// lets a server recover, in the epoch as it is.
#[test]
fn an_epoch_is_sealed_on_servers_that_have_their_shares() {
    let mut world = World::new();
    let agree = |world: &mut World| {
        assert!((0..3).all(|i| world.deal(i)));
        assert!((0..3).all(|i| world.ack(i, &[0, 1, 2])));
    };
    assert!(world.step(2, Step::Recover { server: ServerId(2) }));
    world.pass(30 * SECOND);
    agree(&mut world);
    assert!(world.ready(0) && world.ready(1) && world.ready_with(2, false));
    assert!(!world.ready_with(2, false) && !world.ready_with(1, false), "nothing new");
    assert_eq!(world.epochs().current, Epoch(0), "two whole servers are not k+f");
    world.pass(ATTEMPT_MS);
    assert!(!world.attempt().renews && world.attempt().recovering == Some(ServerId(2)));
    agree(&mut world);
    assert!(world.ready(0) && world.ready(1) && world.ready_with(2, false));
    assert_eq!(
        (world.epochs().current, world.sealed.len()),
        (Epoch(0), 1),
        "it recovers, nothing is renewed"
    );
    world.pass(SECOND);
    let id = world.attempt().id;
    assert_eq!((id.attempt, world.attempt().renews, world.attempt().recovering), (3, true, None));
    agree(&mut world);
    // It may become whole while the attempt goes on.
    assert!(world.ready_with(2, false) && world.ready(0) && world.ready(1) && world.ready(2));
    assert_eq!((world.epochs().current, world.epochs().last_attempt), (Epoch(1), 0));
}

/// A server that waits for an epoch does not wait until the current one has had its length; and nobody makes epochs
/// shorter, or ends more of them, than is said.
#[test]
fn an_epoch_ends_early_for_who_waits_and_neither_too_early_nor_too_often() {
    let mut world = World::new();
    let waits = |world: &mut World, i: u8| world.step(i, Step::Recover { server: ServerId(i) });
    let recovering = |world: &World| world.epochs().attempt.and_then(|attempt| attempt.recovering);
    let seal = |world: &mut World| {
        assert!((0..3).all(|i| world.deal(i)));
        assert!((0..3).all(|i| world.ack(i, &[0, 1, 2])));
        assert!((0..3).all(|i| world.ready(i)));
        let current = world.state.attempt();
        (0..4).for_each(|i| world.voters[usize::from(i)] = world.voter_of(i, current));
        let (voting, sealing) = (*world.voters[3].certificate(), world.sealing_of(3, current));
        assert!(world.ask(3, Operation::AnnounceKeys { voting, sealing }).is_ok(), "the first of an epoch");
        current.epoch.0
    };
    assert!(waits(&mut world, 3));
    world.pass(EARLY_EPOCH_MS - 1);
    assert_eq!(world.epochs().attempt, None, "an epoch has to last so long");
    world.pass(1);
    assert_eq!(recovering(&world), Some(ServerId(3)));
    assert!(world.attempt().renews);
    assert_eq!(seal(&mut world), 1);
    // Not again for the same server, whether it has something to wait for or not; for another one, who comes first then.
    assert!(waits(&mut world, 3));
    world.pass(EARLY_EPOCH_MS);
    assert_eq!(world.epochs().attempt, None);
    assert!(waits(&mut world, 2));
    assert_eq!(recovering(&world), Some(ServerId(2)), "it begins with the request");
    assert_eq!(world.epochs().waiting, [ServerId(3)]);
    // An attempt that comes to nothing is repeated at once, as any.
    world.pass(ATTEMPT_MS);
    assert_eq!((recovering(&world), world.attempt().id.attempt), (Some(ServerId(2)), 2));
    world.pass(2 * ATTEMPT_MS);
    assert_eq!(seal(&mut world), 2);
    world.pass(29 * SECOND);
    assert_eq!(world.epochs().attempt, None);
    world.pass(SECOND);
    assert_eq!(recovering(&world), Some(ServerId(3)), "it is served when the epoch has had its length");
    assert_eq!(seal(&mut world), 3);
    // After a while anyone may have another one.
    world.pass(EARLY_EPOCH_MS);
    world.now = world.now.plus_ms(EARLY_INTERVAL_MS);
    let mut epochs = world.epochs();
    epochs.since = world.now;
    world.state.put(layout::EPOCHS.to_vec(), &epochs);
    world.pass(EARLY_EPOCH_MS);
    assert!(waits(&mut world, 3));
    assert_eq!(recovering(&world), Some(ServerId(3)));
    assert_eq!(world.epochs().early_for.len(), 1, "what is long ago is forgotten");
}

/// An early attempt that only lets a server recover is followed by one that renews.
#[test]
fn an_epoch_that_ends_early_ends() {
    let mut world = World::new();
    world.pass(EARLY_EPOCH_MS);
    assert!(world.step(2, Step::Recover { server: ServerId(2) }));
    let agree = |world: &mut World, whole| {
        assert!((0..3).all(|i| world.deal(i)));
        assert!((0..3).all(|i| world.ack(i, &[0, 1, 2])));
        assert!(world.ready(0) && world.ready(1) && world.ready_with(2, whole));
    };
    agree(&mut world, false);
    world.pass(ATTEMPT_MS);
    assert!(!world.attempt().renews);
    agree(&mut world, false);
    assert_eq!((world.epochs().current, world.sealed.len()), (Epoch(0), 1));
    world.pass(1);
    assert!(world.attempt().renews, "at once, and not when the epoch has had its length");
    agree(&mut world, true);
    assert_eq!((world.epochs().current, world.epochs().early), (Epoch(1), false));
}

#[test]
fn servers_take_their_own_steps_and_none_that_make_no_sense() {
    let mut world = World::new();
    let early = AttemptId { epoch: Epoch(1), attempt: 1 };
    assert!(!world.step(0, Step::Ready { server: ServerId(0), attempt: early, whole: true }));
    world.pass(30 * SECOND);
    let attempt = world.attempt().id;
    let good = |world: &World| {
        let sealing = world.sealing(0, attempt.epoch);
        (ServerId(0), attempt, Hash([1; 32]), sealing)
    };
    let voting = *world.voter(0, attempt.epoch).certificate();
    let deal_with = |voting, (server, attempt, root, sealing)| {
        let (voting, sealing) = (Box::new(voting), Box::new(sealing));
        Step::Deal { server, attempt, root, voting, sealing }
    };
    let deal = |parts| deal_with(voting, parts);
    // In another's name; with a key of another epoch, of another server, of another attempt.
    let honest = good(&world);
    assert!(!world.step(1, deal(honest)));
    let old = world.sealing(0, Epoch(0));
    assert!(!world.step(0, deal((honest.0, honest.1, honest.2, old))));
    let foreign = world.sealing(1, attempt.epoch);
    assert!(!world.step(0, deal((honest.0, honest.1, honest.2, foreign))));
    let other = AttemptId { attempt: 2, ..attempt };
    assert!(!world.step(0, deal((honest.0, other, honest.2, honest.3))));
    for voting in
        [*world.voter(0, Epoch(0)).certificate(), *world.voter(1, attempt.epoch).certificate(), honest.3]
    {
        assert!(!world.step(0, deal_with(voting, honest)));
    }
    assert!(world.step(0, deal(honest)));
    // Acks of what was not dealt, in disorder, of nothing, and ever less.
    assert!(!world.ack(1, &[0, 1]) && !world.ack(1, &[]) && world.deal(1));
    assert!(!world.ack(1, &[1, 0]) && world.ack(1, &[0]) && !world.ack(1, &[1]) && world.ack(1, &[0, 1]));
    // Whoever waits for its shares waits once.
    assert!(world.step(2, Step::Recover { server: ServerId(2) }));
    assert!(!world.step(2, Step::Recover { server: ServerId(2) }));
    assert_eq!(world.epochs().waiting, [ServerId(2)]);
    // Not even admitted, so that nobody orders what changes nothing.
    let again = Operation::Step(Step::Recover { server: ServerId(2) });
    let expiry = world.now.plus_ms(1_000);
    let request = SignedRequest::sign(&world.cluster, world.voters[2].key(), 999, expiry, again);
    let membership = world.state.membership();
    let admitted = crate::state::admit(world.state.map(), membership, world.now, &request.request);
    assert_eq!(admitted, Err(NotAdmitted::UnknownKey));
    assert!(world.state.sequence() > Sequence(0));
}
