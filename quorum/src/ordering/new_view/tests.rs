use super::*;
use crate::certificate::tests::voters;
use crate::certificate::{QuorumProof, VoteBook};
use crate::limits::KEYS_SHOWN;
use crate::message::{CheckedBatch, CheckedMessage, PrePrepare, Prepare, Slot, ViewChange};
use crate::ordering::view_change::tests::{change, names, replica_at};
use crate::ordering::{Identity, Input, Outgoing, Stored, StoredView};
use crate::signing::{Keyring, Voter};

const NOW: Timestamp = Timestamp(1_000_000);

struct World {
    keyring: Keyring,
    voters: Vec<Voter>,
    backup: Replica,
}

impl World {
    /// Server 2 of 4, which has executed two batches.
    fn new() -> Self {
        let (keyring, voters) = voters(4);
        let backup = replica_at(2, &voters, 2, &keyring);
        Self { keyring, voters, backup }
    }
    /// A server's view change to view 1, which shows one prepared batch; a liar makes many of them.
    fn change(&self, server: usize, prepared: u8) -> CheckedViewChange {
        let body = ViewChange { view: View(1), ..change(2, &[(0, 3, prepared)]) };
        CheckedViewChange::new(self.keyring.cluster(), self.voters[server].sign(body))
    }
    fn hears(&mut self, now: Timestamp, from: u8, message: CheckedMessage) -> Vec<Outgoing> {
        self.backup.handle(now, Input::Message(ServerId(from), message));
        self.backup.drain_free()
    }
    fn is_shown(&mut self, now: Timestamp, from: u8, new_view: NewView) -> Vec<Outgoing> {
        let new_view = self.voters[1].sign(new_view);
        self.hears(now, from, CheckedMessage::NewView(new_view))
    }
    fn has_begun(&self) -> bool {
        (self.backup.view, self.backup.changing.active) == (View(1), true)
    }
}

/// Whom a server asks for which view changes.
fn asked(sent: &[Outgoing]) -> Vec<(Target, Vec<Hash>)> {
    let asks = sent.iter().filter_map(|(to, message)| match &**message {
        PeerMessage::FetchViewChanges(digests) => Some((*to, digests.clone())),
        _ => None,
    });
    asks.collect()
}

/// A liar says something else to each; the primary names one of it, and that one is fetched.
#[test]
fn exactly_the_view_changes_that_the_primary_names_are_fetched() {
    let mut world = World::new();
    let [lie, named, other] = [7, 8, 9].map(|prepared| world.change(0, prepared));
    let changes = [named.clone(), world.change(1, 7), world.change(3, 7)];
    for change in [&lie, &changes[1], &changes[2]] {
        world.hears(NOW, change.server().0, CheckedMessage::ViewChange(change.clone()));
    }
    let sent = world.is_shown(NOW, 1, names(&changes));
    assert_eq!(asked(&sent), [(Target::One(ServerId(1)), vec![named.digest()])]);
    let needs = |world: &World, change: &CheckedViewChange| {
        let message = PeerMessage::FetchedViewChange(Arc::clone(change.evidence()));
        world.backup.wants().needs(ServerId(1), View(0), &message)
    };
    assert!(needs(&world, &named) && !needs(&world, &other) && !needs(&world, &changes[1]));
    world.hears(NOW, 1, CheckedMessage::FetchedViewChange(other));
    assert!(!world.has_begun());
    world.hears(NOW, 1, CheckedMessage::FetchedViewChange(named.clone()));
    assert!(world.has_begun() && !needs(&world, &named));
    // It gives what the view began with, and nothing else.
    let wanted = CheckedMessage::FetchViewChanges(vec![Hash([5; 32]), named.digest()]);
    let given: Vec<_> = world.hears(NOW, 3, wanted);
    let given = given.iter().filter_map(|(to, message)| match &**message {
        PeerMessage::FetchedViewChange(given) => Some((*to, Arc::clone(given))),
        _ => None,
    });
    assert_eq!(given.collect::<Vec<_>>(), [(Target::One(ServerId(3)), Arc::clone(named.evidence()))]);
    // Whoever asks without end is not answered without end.
    let answers = (0..100_000).map(|_| {
        let wanted = CheckedMessage::FetchViewChanges(vec![named.digest()]);
        world.hears(NOW, 3, wanted).len()
    });
    assert!(answers.sum::<usize>() < 50_000);
}

/// Digests of nothing cost a while, and what is gathered for them is bounded; then what another server shows is
/// gathered.
#[test]
fn a_new_view_of_nothing_gives_way_to_another() {
    let mut world = World::new();
    let changes = [0, 1, 3].map(|server| world.change(server, 7));
    for change in &changes[1..] {
        world.hears(NOW, change.server().0, CheckedMessage::ViewChange(change.clone()));
    }
    let mut nothing = names(&changes);
    nothing.view_changes[0].1 = Hash([5; 32]);
    for lie in 0..50 {
        nothing.view_changes[0].1 = Hash([lie; 32]);
        world.is_shown(NOW, 1, nothing.clone());
    }
    assert_eq!(world.backup.changing.shown.by.len(), 1, "one for each peer that shows one");
    let sent = world.is_shown(NOW, 3, names(&changes));
    assert_eq!(asked(&sent), [], "the primary's comes first");
    let mut sent = Vec::new();
    for step in 1..=5 {
        world.backup.handle(NOW.plus_ms(step * TRANSFER_PATIENCE_MS / 4), Input::Tick);
        sent.extend(world.backup.drain_free());
    }
    let asked = asked(&sent);
    assert!(asked.contains(&(Target::One(ServerId(1)), vec![nothing.view_changes[0].1])), "it asks again");
    assert!(asked.contains(&(Target::One(ServerId(0)), vec![nothing.view_changes[0].1])), "and others");
    assert!(asked.contains(&(Target::One(ServerId(3)), vec![changes[0].digest()])), "and goes on");
    assert!(!world.has_begun());
    world.hears(NOW, 3, CheckedMessage::FetchedViewChange(changes[0].clone()));
    assert!(world.has_begun());
}

/// Named are q servers' view changes, each its own, to that view, from where that epoch began.
#[test]
fn a_new_view_of_other_view_changes_is_refused() {
    for lie in 0..4 {
        let mut world = World::new();
        let mut changes = [0, 1, 3].map(|server| world.change(server, 7));
        let body = match lie {
            1 => ViewChange { view: View(5), ..changes[0].body().clone() },
            2 => ViewChange { began: Sequence(1), ..changes[0].body().clone() },
            _ => changes[0].body().clone(),
        };
        changes[0] = CheckedViewChange::new(world.keyring.cluster(), world.voters[0].sign(body));
        let mut new_view = NewView { view: View(1), ..names(&changes) };
        if lie == 3 {
            // One server's for two.
            new_view.view_changes[2].1 = changes[1].digest();
        }
        world.is_shown(NOW, 1, new_view);
        for change in changes {
            world.hears(NOW, 1, CheckedMessage::FetchedViewChange(change));
        }
        let accusations = world.backup.drain().map_or(vec![], |(writes, unsent)| {
            let durable = writes.committed();
            unsent.release(&durable).accusations
        });
        let accused = accusations.contains(&Accusation::BadNewView { server: ServerId(1), view: View(1) });
        assert_eq!((world.has_begun(), accused), (lie == 0, lie != 0), "{lie}");
    }
}

/// A server that restarts in the middle of a view knows what it calls for, and helps those who missed it.
#[test]
fn how_a_view_began_outlives_a_restart() {
    let mut world = World::new();
    let cluster = *world.keyring.cluster();
    let right = CheckedBatch::new(&cluster, Timestamp(5), vec![]);
    let slot = |batch: &CheckedBatch| Slot {
        view: View(1),
        sequence: Sequence(3),
        digest: batch.digest(),
        attempt: AttemptId::default(),
    };
    let changes = [0, 1, 3].map(|server| {
        let mut body = ViewChange { view: View(1), ..change(2, &[(0, 3, 7)]) };
        body.prepared[0].statement.0.digest = right.digest();
        CheckedViewChange::new(&cluster, world.voters[server].sign(body))
    });
    for change in &changes {
        world.hears(NOW, change.server().0, CheckedMessage::ViewChange(change.clone()));
    }
    world.is_shown(NOW, 1, names(&changes));
    let (writes, _unsent) = world.backup.drain().unwrap();
    let began = writes.writes().iter().find_map(|write| match write {
        Write::View { began, .. } => began.clone(),
        _ => None,
    });
    let began = began.unwrap();
    let start = |began: StoredBeginning| {
        // What is stored comes back as it was written.
        let began = crate::codec::decode(&crate::codec::encode(&Some(began))).unwrap();
        let (sequence, time, epoch) = (Sequence(2), Timestamp(1), crate::ids::Epoch(0));
        let root = crate::map::Map::new(cluster).seal().root();
        let checkpoint = crate::certificate::Checkpoint { sequence, root, time, epoch, attempt: 0 };
        let state = Some(crate::ordering::StoredState { checkpoint, leaves: vec![] });
        let identity = Identity {
            membership: Arc::clone(world.keyring.membership()),
            voter: world.voters[2].clone(),
            boot: 0,
            log_tail: crate::limits::LOG_TAIL_BATCHES,
        };
        let view = Some(StoredView { view: View(1), began });
        let mut replica = Replica::start(identity, Stored { state, view, ..Stored::default() });
        replica.standing = crate::ordering::standing::Standing::Voting;
        replica
    };
    let mut restarted = start(began.clone());
    assert!(restarted.changing.active && restarted.changing.expected(Sequence(3)) == Some(right.digest()));
    let wrong = CheckedBatch::new(&cluster, Timestamp(6), vec![]);
    for (batch, accepted) in [(wrong, false), (right.clone(), true)] {
        let proposal = world.voters[1].sign(PrePrepare(slot(&batch)));
        restarted.handle(NOW, Input::Message(ServerId(1), CheckedMessage::PrePrepare(proposal, batch)));
        let votes = restarted.log.get(&Sequence(3)).is_some_and(|entry| entry.own_prepare.is_some());
        assert_eq!(votes, accepted);
    }
    let wanted = CheckedMessage::FetchViewChanges(changes.iter().map(CheckedViewChange::digest).collect());
    restarted.drain_free();
    restarted.handle(NOW, Input::Message(ServerId(3), wanted));
    assert_eq!(restarted.drain_free().len(), 3);
    // Without all of it, it would vote for anything.
    for keep in [0, 2] {
        let mut less = began.clone();
        less.view_changes.truncate(keep);
        assert!(!start(less).changing.active, "{keep}");
    }
}

/// Who draws a key for each vote is not counted any more, before what others have to show grows too large.
#[test]
fn votes_under_too_many_keys_of_one_server_do_not_count() {
    let mut world = World::new();
    let (_, identities) = crate::manifest::tests::sample(4);
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(3);
    for serial in 0..KEYS_SHOWN as u64 + 3 {
        let slot = Slot {
            view: View(0),
            sequence: Sequence(3 + serial),
            digest: Hash([1; 32]),
            attempt: AttemptId::default(),
        };
        let (cluster, attempt) = (*world.keyring.cluster(), AttemptId::default());
        let liar = Voter::generate(cluster, &identities[3], ServerId(3), attempt, serial + 1, &mut rng);
        for voter in [&liar, &world.voters[1].clone()] {
            let vote = voter.sign(Prepare(slot));
            world.backup.handle(NOW, Input::Message(voter.server(), CheckedMessage::Prepare(vote)));
        }
        let counted = world.backup.log[&slot.sequence].prepares.count(&Prepare(slot));
        assert_eq!(counted, if serial < KEYS_SHOWN as u64 { 2 } else { 1 });
    }
}

/// The table has each key once, and from it come the proofs again.
#[test]
fn a_view_change_carries_each_key_once() {
    let (mut keyring, voters) = voters(9);
    let proofs: Vec<QuorumProof<Prepare>> = (1..=20)
        .map(|sequence| {
            let slot = Slot {
                view: View(0),
                sequence: Sequence(sequence),
                digest: Hash([1; 32]),
                attempt: AttemptId::default(),
            };
            let mut book = VoteBook::default();
            // Other servers each time.
            for voter in voters.iter().cycle().skip(sequence as usize).take(6) {
                book.add(voter.sign(Prepare(slot))).unwrap();
            }
            book.proof(&Prepare(slot), 6).unwrap()
        })
        .collect();
    let in_epoch = (AttemptId::default(), Sequence(0));
    let change = voters[2].sign(ViewChange::new(View(1), in_epoch, None, proofs.iter()));
    assert_eq!(change.body().keys.len(), 9);
    keyring.add(*voters[2].certificate()).unwrap();
    let message = PeerMessage::ViewChange(change.signed().clone());
    assert!(message.check(ServerId(2), &mut keyring).is_ok());
}
