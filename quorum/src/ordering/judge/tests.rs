use super::*;
use crate::certificate::tests::voters;
use crate::ids::ServerId;
use crate::limits::{LOG_TAIL_BATCHES, VIEW_CHANGE_TIMEOUT_MS};
use crate::message::{CheckedMessage, Commit, PrePrepare, Prepare};
use crate::ordering::{Identity, Input, Stored, log};
use crate::record::Name;
use crate::request::{Operation, SignedRequest, VerifiedRequest};
use crate::signing::{SigningKey, Voter};
use crate::state::Attempt;
use std::sync::Arc;

const START: Timestamp = Timestamp(1_700_000_000_000);

/// A backup of four servers, and the others' keys.
struct World {
    backup: Replica,
    voters: Vec<Voter>,
    now: Timestamp,
    sequence: Sequence,
}

impl World {
    fn new() -> Self {
        let (keyring, voters) = voters(4);
        let (membership, voter) = (Arc::clone(keyring.membership()), voters[2].clone());
        let identity = Identity { membership, voter, boot: 0, log_tail: LOG_TAIL_BATCHES };
        let mut backup = Replica::start(identity, Stored::default());
        backup.standing = crate::ordering::standing::Standing::Voting;
        backup.entered = START;
        Self { backup, voters, now: START, sequence: Sequence(0) }
    }
    fn request(&self, client: u8, number: u64, bytes: usize) -> VerifiedRequest {
        let name = Name::new("x").unwrap();
        let operation = Operation::Revoke { name, from_version: 1, reason: "x".repeat(bytes) };
        let key = SigningKey::from_seed(&[client; 32]);
        let cluster = self.backup.cluster;
        SignedRequest::sign(&cluster, &key, number, START.plus_ms(50_000), operation).trusted(&cluster)
    }
    /// One of the backup's own clients asks.
    fn asks(&mut self, client: u8, number: u64) -> VerifiedRequest {
        let request = self.request(client, number, 1);
        self.backup.handle(self.now, Input::Request(request.clone()));
        request
    }
    /// Another server passes a request on.
    fn hears(&mut self, client: u8, number: u64) -> VerifiedRequest {
        let request = self.request(client, number, 1);
        // Whether it is admitted is not the question here.
        self.backup.pool.add(self.now, ServerId(3), request.clone()).unwrap();
        request
    }
    /// The primary proposes, and all agree.
    fn order(&mut self, requests: Vec<VerifiedRequest>) {
        self.order_as_of(self.now, requests);
    }
    fn order_as_of(&mut self, time: Timestamp, requests: Vec<VerifiedRequest>) {
        let batch = CheckedBatch::new(&self.backup.cluster, time, requests);
        self.sequence = self.sequence.next();
        let slot = log::slot(self.backup.view, AttemptId::default(), self.sequence, &batch);
        let primary = self.backup.primary();
        let proposal = self.voters[primary.index()].sign(PrePrepare(slot));
        let mut say = |from: ServerId, message| {
            self.backup.handle(self.now, Input::Message(from, message));
        };
        say(primary, CheckedMessage::PrePrepare(proposal, batch));
        for voter in self.voters.iter().filter(|voter| voter.server() != ServerId(2)) {
            say(voter.server(), CheckedMessage::Prepare(voter.sign(Prepare(slot))));
            say(voter.server(), CheckedMessage::Commit(voter.sign(Commit(slot))));
        }
        assert_eq!(self.backup.executed(), self.sequence);
    }
    fn passes(&mut self, ms: u64) {
        self.now = self.now.plus_ms(ms);
    }
    fn finds_fault(&mut self) -> bool {
        self.backup.finds_fault(self.now, 0, VIEW_CHANGE_TIMEOUT_MS)
    }
    /// Batch after batch, one each 100 ms, as `next` makes them; after how long the primary is suspected.
    fn suspects(
        &mut self,
        for_ms: u64,
        mut next: impl FnMut(&mut Self, u64) -> Vec<VerifiedRequest>,
    ) -> Option<u64> {
        for step in 0..for_ms / 100 {
            self.passes(100);
            let requests = next(self, step);
            self.order(requests);
            if self.finds_fault() {
                return Some(100 * step);
            }
        }
        None
    }
    /// So large that nothing else has room.
    fn full(&self, clients: [u8; 4], number: u64) -> Vec<VerifiedRequest> {
        clients.map(|client| self.request(client, number, 200_000)).to_vec()
    }
}

/// Whoever has room takes everybody along, however fast it serves the others.
#[test]
fn a_primary_that_leaves_one_request_out_is_suspected() {
    let mut world = World::new();
    world.asks(1, 1);
    let after = world.suspects(5_000, |world, step| vec![world.asks(2, step)]);
    assert!(after.is_some_and(|after| (PASSED_OVER_MS..3_000).contains(&after)), "{after:?}");
    // Nothing is left out: nothing is wrong.
    assert_eq!(World::new().suspects(5_000, |world, step| vec![world.asks(2, step)]), None);
}

/// Full batches excuse only those who serve clients in turn, and each client in order.
#[test]
fn full_batches_hide_nobody() {
    // All others are served before anyone is for the second time: that is load.
    let mut world = World::new();
    world.asks(1, 1);
    let all_others = |world: &mut World, step: u64| {
        let first = 10 + 4 * (step % 50) as u8;
        world.full([first, first + 1, first + 2, first + 3], step)
    };
    assert_eq!(world.suspects(4_900, all_others), None);
    // Four who conspire are served again and again.
    let mut world = World::new();
    world.asks(1, 1);
    let after = world.suspects(5_000, |world, step| world.full([10, 11, 12, 13], step));
    assert!(after.is_some_and(|after| after >= PASSED_OVER_MS), "{after:?}");
    // So is one.
    let mut world = World::new();
    world.asks(1, 1);
    assert!(world.suspects(5_000, |world, step| world.full([10; 4], step)).is_some());
    // A client's own later requests come before her first.
    let mut world = World::new();
    world.asks(1, 1);
    let after = world.suspects(5_000, |world, step| {
        let later = world.asks(1, 2 + step);
        [all_others(world, step), vec![later]].concat()
    });
    assert!(after.is_some(), "her first request waits for ever");
}

/// What comes late second after second is noticed, whatever comes in time between.
#[test]
fn a_primary_that_is_late_with_some_is_suspected() {
    let kept = |every_ms: u64, others: u8| {
        let mut world = World::new();
        let mut waiting = None;
        world.suspects(20_000, |world, step| {
            let mut batch: Vec<_> = (0..others).map(|other| world.asks(20 + other, step)).collect();
            if let Some((_, request)) = waiting.take_if(|(since, _): &mut (u64, _)| step - *since >= 9) {
                batch.push(request);
            }
            if (step * 100).is_multiple_of(every_ms) {
                waiting = Some((step, world.asks(1, step)));
            }
            batch
        })
    };
    assert!(kept(1_000, 1).is_some(), "one of two clients waits 0.9 s, in every second");
    assert_eq!(kept(1_000, 9), None, "nine of ten clients are served at once");
    assert_eq!(kept(4_000, 1), None, "in one second of four");
}

/// Where every primary seems slow it is the network; once one is not, limits come back.
#[test]
fn limits_double_when_primaries_are_suspected_in_vain() {
    let mut conduct = Conduct::default();
    let first = conduct.late_after_ms();
    for expected in [2, 4, 8, 8] {
        conduct.unfair = Some(START);
        assert!(conduct.is_bad(START));
        conduct.begin(START);
        assert_eq!(conduct.late_after_ms(), expected * first);
        assert!(!conduct.is_bad(START), "the next one has time of its own");
    }
    // A view that changed for another reason changes nothing.
    conduct.begin(START);
    assert_eq!(conduct.late_after_ms(), 8 * first);
    for (step, expected) in [(1, 4), (2, 2), (3, 1), (4, 1)] {
        assert!(!conduct.is_bad(START.plus_ms(step * LENIENT_FOR_MS)));
        assert_eq!(conduct.late_after_ms(), expected * first);
    }
}

/// The primary is not blamed for what it may not know.
#[test]
fn what_another_server_said_is_passed_on_before_it_counts() {
    let told = |backup: &mut Replica| {
        let sent = backup.drain_free();
        let forwards = sent.iter().filter(|(to, message)| {
            *to == Target::One(ServerId(0)) && matches!(**message, PeerMessage::Forward(_))
        });
        forwards.count()
    };
    let mut world = World::new();
    world.hears(1, 1);
    assert_eq!(world.suspects(100, |_, _| vec![]), None);
    assert_eq!(told(&mut world.backup), 1);
    // It is told again while it goes on, and then it is to blame.
    let after = world.suspects(5_000, |_, _| vec![]);
    assert!(after.is_some_and(|after| after >= PASSED_OVER_MS), "{after:?}");
    assert!((1..=3).contains(&told(&mut world.backup)));
    // The same without any batch.
    let mut world = World::new();
    world.hears(1, 1);
    world.passes(VIEW_CHANGE_TIMEOUT_MS);
    let waited_ms = VIEW_CHANGE_TIMEOUT_MS;
    assert!(!world.backup.finds_fault(world.now, waited_ms, VIEW_CHANGE_TIMEOUT_MS));
    assert_eq!(told(&mut world.backup), 1);
    world.passes(VIEW_CHANGE_TIMEOUT_MS);
    assert!(world.backup.finds_fault(world.now, waited_ms, VIEW_CHANGE_TIMEOUT_MS));
}

/// Design §3: time is part of the service. Clocks may differ by a second, and messages take a while.
#[test]
fn a_primary_whose_clock_lags_is_suspected() {
    let lagging = |lag_ms: u64, right: u64| {
        let mut world = World::new();
        (0..60).any(|step| {
            world.passes(100);
            let lag_ms = if step % 10 < right { 0 } else { lag_ms };
            world.order_as_of(Timestamp(world.now.0 - lag_ms), vec![]);
            world.finds_fault()
        })
    };
    assert!(lagging(LAG_MS + 1, 0));
    assert!(!lagging(LAG_MS, 0));
    assert!(!lagging(LAG_MS + 1, 1), "where one proposal in a second has the time, certificates are fresh");
}

/// A primary that keeps steps of servers until they are worth nothing stops all renewal.
#[test]
fn a_failed_attempt_at_an_epoch_is_grounds_for_suspicion() {
    let attempt = |number: u32, renews: bool, ready: u8| Attempt {
        id: AttemptId { epoch: crate::Epoch(1), attempt: number },
        began: START,
        renews,
        recovering: None,
        deals: BTreeMap::new(),
        acks: BTreeMap::new(),
        dealers: None,
        ready: (0..ready).map(|server| (ServerId(server), true)).collect(),
    };
    let fails = |world: &mut World, renews, ready| {
        world.backup.note_attempt(START, &attempt(1, renews, 0));
        world.backup.note_attempt(START, &attempt(1, renews, ready));
        world.backup.note_attempt(START, &attempt(2, true, 0));
        world.finds_fault()
    };
    assert!(fails(&mut World::new(), true, 2));
    assert!(!fails(&mut World::new(), true, 3), "q are ready: too few of them are whole");
    assert!(!fails(&mut World::new(), false, 0), "it renews nothing");
    // Another primary's time was in it.
    let mut world = World::new();
    world.backup.note_attempt(START, &attempt(1, true, 0));
    world.backup.conduct.begin(START);
    assert!(!fails(&mut world, true, 0));
}
