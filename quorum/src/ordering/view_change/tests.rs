use super::*;
use crate::certificate::tests::voters;
use crate::certificate::{Checkpoint, QuorumProof};
use crate::ids::Epoch;
use crate::limits::CLOCK_BOUND_MS;
use crate::message::{CheckedMessage, PrePrepare, Prepare, Prepared, Slot};
use crate::ordering::effects::Accusation;
use crate::ordering::{Identity, Input, Stored};
use crate::signing::Verified;

const NULL: Hash = Hash([0; 32]);

fn slot(view: u64, sequence: u64, digest: Hash) -> Slot {
    Slot { view: View(view), sequence: Sequence(sequence), digest, attempt: AttemptId::default() }
}

/// A view change with a certificate at `stable` and batches prepared at (view, sequence, digest).
pub(in crate::ordering) fn change(stable: u64, prepared: &[(u64, u64, u8)]) -> ViewChange {
    let checkpoint = Checkpoint {
        sequence: Sequence(stable),
        root: NULL,
        time: Timestamp(1),
        epoch: Epoch(0),
        attempt: 0,
    };
    let proof = |(view, sequence, digest): &(u64, u64, u8)| {
        let slot = slot(*view, *sequence, Hash([*digest; 32]));
        Prepared { statement: Prepare(slot), votes: vec![] }
    };
    ViewChange {
        view: View(9),
        attempt: AttemptId::default(),
        began: Sequence(0),
        stable: (stable > 0).then(|| QuorumProof { statement: checkpoint, votes: vec![], keys: vec![] }),
        prepared: prepared.iter().map(proof).collect(),
        keys: vec![],
    }
}

/// A new view with these view changes, each of which is sent to all as well.
fn begin(
    replica: &mut Replica,
    now: Timestamp,
    primary: &crate::signing::Voter,
    changes: Vec<Verified<ViewChange>>,
) {
    let cluster = replica.cluster;
    let changes: Vec<_> =
        changes.into_iter().map(|change| CheckedViewChange::new(&cluster, change)).collect();
    let new_view = primary.sign(names(&changes));
    for change in changes {
        replica.handle(now, Input::Message(change.server(), CheckedMessage::ViewChange(change)));
    }
    replica.handle(now, Input::Message(primary.server(), CheckedMessage::NewView(new_view)));
}

/// The new view that is begun by view changes.
pub(in crate::ordering) fn names(changes: &[CheckedViewChange]) -> NewView {
    let ViewChange { view, attempt, .. } = *changes[0].body();
    let view_changes = changes.iter().map(|change| (change.server(), change.digest())).collect();
    NewView { view, attempt, view_changes }
}

/// PBFT §4.4: from the highest certificate on, the batch of the highest view, null in the gaps.
#[test]
fn q_view_changes_decide_what_is_proposed_again() {
    for (changes, low, expected) in [
        (vec![change(0, &[]), change(0, &[])], 0, vec![]),
        // One server alone knows of a prepared batch: it is kept, and the gap before it filled.
        (vec![change(0, &[(0, 2, 7)]), change(0, &[])], 0, vec![(1, NULL), (2, Hash([7; 32]))]),
        // The later view wins, in whatever order they come.
        (vec![change(4, &[(1, 5, 8)]), change(4, &[(3, 5, 9)])], 4, vec![(5, Hash([9; 32]))]),
        (vec![change(4, &[(3, 5, 9)]), change(4, &[(1, 5, 8)])], 4, vec![(5, Hash([9; 32]))]),
        // What lies at or below the highest certificate is decided.
        (vec![change(0, &[(0, 1, 7), (0, 6, 8)]), change(6, &[])], 6, vec![]),
    ] {
        let plan = Plan::of(NULL, changes.iter());
        assert_eq!(plan.stable.map_or(0, |certificate| certificate.statement.sequence.0), low);
        let expected: BTreeMap<_, _> =
            expected.into_iter().map(|(s, digest)| (Sequence(s), digest)).collect();
        assert_eq!(plan.slots, expected);
    }
}

/// The primary of a new view cannot put another batch where the view changes call for one, nor
/// propose again what was certified before: backups vote for neither, and name it.
#[test]
fn a_backup_votes_only_for_what_the_new_view_calls_for() {
    let (keyring, voters) = voters(4);
    let cluster = *keyring.cluster();
    let mut backup = replica_at(2, &voters, 2, &keyring);
    let now = Timestamp(1_000_000);
    let batch = |ms| CheckedBatch::new(&cluster, Timestamp(ms), vec![]);
    // Far older than the clock bound: a batch that is carried over keeps its time.
    let (right, wrong) = (batch(5), batch(6));
    let slot = slot(0, 3, right.digest());
    let proof = Prepared { statement: Prepare(slot), votes: vec![] };
    let changes = [0, 1, 3].map(|i| {
        voters[i].sign(ViewChange { view: View(1), prepared: vec![proof.clone()], ..change(2, &[]) })
    });
    begin(&mut backup, now, &voters[1], changes.to_vec());

    let mut votes_for = |sequence, batch: &CheckedBatch| {
        let slot = super::tests::slot(1, sequence, batch.digest());
        let proposal = voters[1].sign(PrePrepare(slot));
        backup.handle(now, Input::Message(ServerId(1), CheckedMessage::PrePrepare(proposal, batch.clone())));
        let Some((writes, unsent)) = backup.drain() else { return (false, false) };
        let released = unsent.release(&writes.committed());
        let voted = |(_, message): &(Target, Arc<PeerMessage>)| matches!(&**message, PeerMessage::Prepare(vote) if vote.body.0 == slot);
        let accused = |accusation: &Accusation| {
            matches!(accusation, Accusation::BadProposal { server: ServerId(1), .. })
        };
        (released.messages.iter().any(voted), released.accusations.iter().any(accused))
    };
    assert_eq!(votes_for(3, &wrong), (false, true), "another batch than was prepared");
    assert_eq!(votes_for(2, &wrong), (false, false), "a place that is certified already");
    assert_eq!(votes_for(3, &right), (true, false));
    assert_eq!(votes_for(4, &wrong), (true, false), "places after the plan are free");
}

pub(in crate::ordering) fn replica(
    voters: &[crate::signing::Voter],
    id: usize,
    keyring: &crate::signing::Keyring,
) -> Replica {
    replica_at(0, voters, id, keyring)
}

/// One that has executed so many batches, all of them empty.
pub(in crate::ordering) fn replica_at(
    executed: u64,
    voters: &[crate::signing::Voter],
    id: usize,
    keyring: &crate::signing::Keyring,
) -> Replica {
    let root = crate::map::Map::new(*keyring.cluster()).seal().root();
    let (sequence, time, epoch) = (Sequence(executed), Timestamp(1), Epoch(0));
    let checkpoint = Checkpoint { sequence, root, time, epoch, attempt: 0 };
    let state = (executed > 0).then_some(crate::ordering::StoredState { checkpoint, leaves: vec![] });
    let identity = Identity {
        membership: Arc::clone(keyring.membership()),
        voter: voters[id].clone(),
        boot: 0,
        log_tail: crate::limits::LOG_TAIL_BATCHES,
    };
    let mut replica = Replica::start(identity, Stored { state, ..Stored::default() });
    replica.standing = crate::ordering::standing::Standing::Voting;
    replica
}

/// Whoever collected q servers' keys of epochs that are over, one server's after the other's, begins no
/// view with them; f+1 servers' word under keys that count shows that it began long ago.
#[test]
fn an_old_new_view_is_believed_if_servers_say_that_they_are_in_it() {
    let (manifest, identities) = crate::manifest::tests::sample(4);
    let cluster = manifest.cluster_id();
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(3);
    let mut of = |epoch: u64| -> Vec<_> {
        let voter = |(i, identity)| {
            let id = ServerId(i as u8);
            crate::signing::Voter::generate(
                cluster,
                identity,
                id,
                AttemptId::first(Epoch(epoch)),
                epoch,
                &mut rng,
            )
        };
        identities.iter().enumerate().map(voter).collect()
    };
    let (old, present) = (of(3), of(5));
    let membership = crate::Membership::genesis(Arc::new(manifest));
    let now = Timestamp(1_000_000);
    let entered = |signers: &[crate::signing::Voter], vouching: &[&crate::signing::Voter]| {
        let state = Some(crate::ordering::restore::tests::stored_at(cluster, present[0].attempt()));
        let log_tail = crate::limits::LOG_TAIL_BATCHES;
        let (membership, voter) = (Arc::clone(&membership), present[0].clone());
        let identity = Identity { membership, voter, boot: 0, log_tail };
        let mut replica = Replica::start(identity, Stored { state, ..Stored::default() });
        assert_eq!(replica.state.epoch(), Epoch(5));
        for voter in vouching {
            let (executed, certified) = (Sequence(1), Sequence(1));
            let status = crate::message::Status {
                view: View(9),
                active: true,
                executed,
                certified,
                wants_state: false,
                changes: 0,
                attempt: voter.attempt(),
            };
            let status = CheckedMessage::Status(voter.sign(status));
            replica.handle(now, Input::Message(voter.server(), status));
        }
        let changes = [1, 2, 3].map(|i| {
            let began = replica.state.began();
            signers[i].sign(ViewChange { attempt: signers[i].attempt(), began, ..change(0, &[]) })
        });
        begin(&mut replica, now, &signers[1], changes.to_vec());
        replica.view == View(9) && replica.changing.active
    };
    assert!(entered(&present, &[]), "it has just begun");
    assert!(!entered(&old, &[]));
    assert!(!entered(&old, &[&present[1]]), "one could be the thief's friend");
    assert!(!entered(&old, &[&present[1], &old[2], &old[3]]), "so could the keys of old");
    assert!(entered(&old, &[&present[1], &present[2]]));
}

/// f servers, however loud, make nobody leave a view; f+1 do.
#[test]
fn a_view_ends_when_more_than_f_servers_suspect_its_primary() {
    let (keyring, voters) = voters(9);
    let mut replica = replica(&voters, 8, &keyring);
    let now = Timestamp(1_000_000);
    let mut suspects = |server: usize| {
        for _ in 0..3 {
            let suspect = voters[server].sign(Suspect { view: View(0), attempt: AttemptId::default() });
            let from = ServerId(server as u8);
            replica.handle(now, Input::Message(from, CheckedMessage::Suspect(suspect)));
        }
        replica.status().view
    };
    assert_eq!((suspects(3), suspects(4)), (View(0), View(0)));
    assert_eq!(suspects(5), View(1));
}

/// What begins a view is checked in full, before the replica sees it.
#[test]
fn evidence_for_a_new_view_is_checked() {
    use crate::message::{MessageError, PeerMessage};
    let (mut keyring, voters) = voters(4);
    for voter in &voters {
        keyring.add(*voter.certificate()).unwrap();
    }
    let slot = slot(0, 1, Hash([5; 32]));
    let mut book = crate::certificate::VoteBook::default();
    for voter in &voters[..3] {
        book.add(voter.sign(Prepare(slot))).unwrap();
    }
    let proof = book.proof(&Prepare(slot), 3).unwrap();
    let mut forged = proof.clone();
    forged.statement.0.digest = Hash([6; 32]);
    let mut short = proof.clone();
    short.votes.pop();
    short.keys.pop();
    let in_epoch = (AttemptId::default(), Sequence(0));
    let body =
        |proofs: &[&QuorumProof<Prepare>]| ViewChange::new(View(1), in_epoch, None, proofs.iter().copied());
    let mut check = |body: ViewChange| {
        let signed = voters[2].sign(body);
        let fetched = PeerMessage::FetchedViewChange(Arc::new(signed.stored()));
        let said =
            PeerMessage::ViewChange(signed.signed().clone()).check(ServerId(2), &mut keyring).map(drop);
        assert_eq!(said, fetched.check(ServerId(1), &mut keyring).map(drop), "fetched or not, it is checked");
        said
    };
    assert_eq!(check(body(&[&proof])), Ok(()));
    assert!(matches!(check(body(&[&forged])), Err(MessageError::Key(_))));
    assert!(matches!(check(body(&[&short])), Err(MessageError::Quorum(_))));
    // Twice the same place; a proof from the view that is to begin.
    assert_eq!(check(body(&[&proof, &proof])), Err(MessageError::BadViewChange));
    assert_eq!(check(ViewChange { view: View(0), ..body(&[&proof]) }), Err(MessageError::BadViewChange));
    // Keys twice; one that is not in the table; a server that votes under two keys.
    let whole = body(&[&proof]);
    let twice = [&whole.keys[..], &whole.keys[2..]].concat();
    assert_eq!(check(ViewChange { keys: twice, ..whole.clone() }), Err(MessageError::BadViewChange));
    assert_eq!(
        check(ViewChange { keys: whole.keys[..2].to_vec(), ..whole.clone() }),
        Err(MessageError::BadViewChange)
    );
    let many = (0..=crate::limits::KEYS_SHOWN as u64).map(|serial| {
        let mut key = *voters[3].certificate();
        key.statement.serial = serial;
        key
    });
    let many = whole.keys.iter().copied().chain(many).collect();
    assert_eq!(check(ViewChange { keys: many, ..whole }), Err(MessageError::BadViewChange));
    let mut doubled = body(&[&proof]);
    doubled.prepared[0].votes[2] = doubled.prepared[0].votes[1];
    assert!(matches!(check(doubled), Err(MessageError::Quorum(_))));

    let mut check = |from: u8, author: usize, servers: &[u8]| {
        let view_changes = servers.iter().map(|server| (ServerId(*server), NULL)).collect();
        let new_view = NewView { view: View(1), attempt: AttemptId::default(), view_changes };
        let (signed, key) = voters[author].sign(new_view).into_stored();
        PeerMessage::NewView(Box::new(signed), key).check(ServerId(from), &mut keyring).map(drop)
    };
    assert_eq!(check(3, 1, &[0, 1, 2]), Ok(()));
    for servers in [&[0, 1][..], &[0, 1, 1], &[0, 1, 4], &[0, 1, 2, 3]] {
        assert_eq!(check(3, 1, servers), Err(MessageError::BadNewView), "{servers:?}");
    }
    assert_eq!(check(2, 2, &[0, 1, 2]), Err(MessageError::BadNewView), "not from the view's primary");
    let digests = vec![NULL; 5];
    let asked = PeerMessage::FetchViewChanges(digests).check(ServerId(1), &mut keyring).map(drop);
    assert_eq!(asked, Err(MessageError::TooManyViewChanges));
}

/// Design §3's δ: a first proposal from the future is refused, and its primary named.
#[test]
fn a_time_ahead_of_the_clock_is_refused() {
    let (keyring, voters) = voters(4);
    let mut backup = replica(&voters, 2, &keyring);
    let now = Timestamp(1_000_000);
    let mut votes_for = |ms: u64| {
        let batch = CheckedBatch::new(keyring.cluster(), Timestamp(ms), vec![]);
        let slot = slot(0, 1, batch.digest());
        let proposal = voters[0].sign(PrePrepare(slot));
        backup.handle(now, Input::Message(ServerId(0), CheckedMessage::PrePrepare(proposal, batch)));
        let Some((writes, unsent)) = backup.drain() else { return (false, false) };
        let released = unsent.release(&writes.committed());
        (!released.messages.is_empty(), !released.accusations.is_empty())
    };
    assert_eq!(votes_for(now.0 + CLOCK_BOUND_MS + 1), (false, true));
    assert_eq!(votes_for(now.0 + CLOCK_BOUND_MS), (true, false));
}

/// Who is shown that q servers have executed more than it has catches up first.
#[test]
fn a_server_that_is_behind_does_not_suspect_the_primary() {
    let (keyring, voters) = voters(4);
    for behind in [false, true] {
        let mut replica = replica(&voters, 2, &keyring);
        if behind {
            let statement = Checkpoint {
                sequence: Sequence(5),
                root: NULL,
                time: Timestamp(1),
                epoch: Epoch(0),
                attempt: 0,
            };
            let certificate = QuorumProof { statement, votes: vec![], keys: vec![] };
            let shown = CheckedMessage::Certificate(certificate);
            replica.handle(Timestamp(1_000_000), Input::Message(ServerId(1), shown));
        }
        replica.handle(Timestamp(1_000_000), Input::Tick);
        replica.handle(Timestamp(1_010_000), Input::Tick);
        let sent = replica.drain_free();
        let suspects = sent.iter().any(|(_, message)| matches!(**message, PeerMessage::Suspect(_)));
        assert_eq!(suspects, !behind);
    }
}

/// What is small is said again at once; the largest view change is not sent to everyone four times a second.
#[test]
fn large_view_changes_are_repeated_slowly() {
    let (keyring, voters) = voters(4);
    let mut replica = replica(&voters, 2, &keyring);
    let mut said = change(0, &[(0, 1, 7)]);
    for (votes, least) in [(3, RETRANSMIT_MS), (60_000, 1_000)] {
        let vote = crate::message::KeyedVote { key: 0, signature: crate::bytes::SignatureBytes([0; 64]) };
        said.prepared = vec![Prepared { votes: vec![vote; votes], ..said.prepared[0].clone() }; 5];
        let own = CheckedViewChange::new(keyring.cluster(), voters[2].sign(said.clone()));
        replica.changing.view_changes.insert(ServerId(2), own);
        let after_ms = replica.repeat_after_ms();
        assert!((least..least + 500).contains(&after_ms), "{after_ms}");
    }
}
