use super::*;
use crate::certificate::tests::voters;
use crate::certificate::{Checkpoint, QuorumProof};
use crate::ids::{AttemptId, Epoch, Timestamp};
use crate::limits::LOG_TAIL_BATCHES;
use crate::message::{
    Batch, CheckedBatch, CheckedMessage, CheckedViewChange, Commit, NewView, PrePrepare, Prepare, Slot,
    Status, Suspect, ViewChange,
};
use crate::ordering::{Identity, Input, Stored};
use crate::signing::Voter;
use std::sync::Arc;

const NOW: Timestamp = Timestamp(1_000_000);

/// Server 2 of 4, which has agreed to one proposal in view 0.
fn backup() -> (Replica, Vec<Voter>, CheckedBatch) {
    let (keyring, voters) = voters(4);
    let (membership, voter) = (Arc::clone(keyring.membership()), voters[2].clone());
    let identity = Identity { membership, voter, boot: 7, log_tail: LOG_TAIL_BATCHES };
    let mut backup = Replica::start(identity, Stored::default());
    backup.standing = Standing::Voting;
    let batch = CheckedBatch::new(&backup.cluster, NOW, vec![]);
    let proposal = voters[0].sign(PrePrepare(slot(0, 1, batch.digest())));
    backup.handle(NOW, Input::Message(ServerId(0), CheckedMessage::PrePrepare(proposal, batch.clone())));
    (backup, voters, batch)
}

fn slot(view: u64, sequence: u64, digest: Hash) -> Slot {
    Slot { view: View(view), sequence: Sequence(sequence), digest, attempt: AttemptId::default() }
}

fn empty() -> Arc<Batch> {
    Arc::new(Batch { time: NOW, requests: vec![] })
}

/// A proposal is checked if it is from the primary of its view, of this view or one that has just begun, near,
/// and not known.
#[test]
fn proposals_are_wanted_from_the_primary_alone_and_once() {
    let (mut backup, voters, known) = backup();
    let other = Hash([7; 32]);
    let wants = |backup: &Replica, author: usize, begun: u64, slot: Slot| {
        let proposal = voters[author].sign(PrePrepare(slot)).signed().clone();
        let message = PeerMessage::PrePrepare(proposal, empty());
        backup.wants().needs(ServerId(author as u8), View(begun), &message)
    };
    assert!(wants(&backup, 0, 0, slot(0, 2, other)));
    assert!(!wants(&backup, 1, 0, slot(0, 2, other)), "not from its view's primary");
    assert!(!wants(&backup, 0, 0, slot(0, 1, known.digest())), "known");
    assert!(wants(&backup, 0, 0, slot(0, 1, other)), "a lie that is not known");
    assert!(!wants(&backup, 0, 0, slot(0, 0, other)) && !wants(&backup, 0, 0, slot(0, 1_000, other)));
    // The lie is told: from then on no further one is of interest.
    let batch = CheckedBatch::new(&backup.cluster, NOW.plus_ms(1), vec![]);
    let lie = voters[0].sign(PrePrepare(slot(0, 1, batch.digest())));
    backup.handle(NOW, Input::Message(ServerId(0), CheckedMessage::PrePrepare(lie, batch)));
    assert!(!wants(&backup, 0, 0, slot(0, 1, other)));
    // Of a later view, once that has begun as far as this link has shown.
    assert!(!wants(&backup, 1, 0, slot(1, 2, other)) && wants(&backup, 1, 1, slot(1, 2, other)));
    // Nothing of a view that was left, nor of one that has not begun.
    backup.leave_for(NOW, View(4));
    assert!(!wants(&backup, 0, 0, slot(0, 2, other)) && !wants(&backup, 0, 0, slot(4, 2, other)));
    assert!(wants(&backup, 0, 4, slot(4, 2, other)));
}

/// What nobody asked for, and what is known, is not checked.
#[test]
fn answers_are_wanted_if_they_were_asked_for() {
    let (mut backup, voters, known) = backup();
    let needs = |backup: &Replica, message: &PeerMessage| backup.wants().needs(ServerId(1), View(0), message);
    let fetched = PeerMessage::Fetched(Arc::new(known.to_batch()));
    assert!(!needs(&backup, &fetched));
    backup.changing.wanted.insert(Hash([1; 32]));
    assert!(!needs(&backup, &fetched), "another one is wanted");
    backup.changing.wanted.insert(known.digest());
    assert!(needs(&backup, &fetched));

    let witness = |boot| {
        let (certificate, prepares, commits, view_change) = (None, vec![], vec![], None);
        PeerMessage::Witness(Box::new(crate::message::Witness {
            boot,
            certificate,
            prepares,
            commits,
            view_change,
        }))
    };
    assert!(!needs(&backup, &witness(7)), "it remembers its votes");
    backup.standing =
        Standing::Estimating(super::super::standing::Estimation::new(7, (None, None), BTreeMap::new()));
    assert!(needs(&backup, &witness(7)) && !needs(&backup, &witness(8)));
    let parts = crate::message::Parts { question: 0, parts: vec![] };
    assert!(!needs(&backup, &PeerMessage::Parts(parts)));

    let proof = |sequence| QuorumProof {
        statement: Commit(slot(0, sequence, known.digest())),
        votes: vec![],
        keys: vec![],
    };
    let committed = |sequence| PeerMessage::Committed(proof(sequence), empty());
    assert!(
        !needs(&backup, &committed(0)) && needs(&backup, &committed(1)) && !needs(&backup, &committed(9_999))
    );
    backup.log.get_mut(&Sequence(1)).unwrap().committed = Some(proof(1));
    assert!(!needs(&backup, &committed(1)), "it has the proof");
    let certificate = |sequence| {
        let sequence = Sequence(sequence);
        let statement = Checkpoint { sequence, root: Hash([0; 32]), time: NOW, epoch: Epoch(0), attempt: 0 };
        QuorumProof { statement, votes: vec![], keys: vec![] }
    };
    for message in [PeerMessage::Certificate, PeerMessage::Offer] {
        assert!(!needs(&backup, &message(certificate(0))) && needs(&backup, &message(certificate(1))));
    }
    assert!(needs(
        &backup,
        &PeerMessage::Prepare(voters[1].sign(Prepare(slot(0, 1, known.digest()))).signed().clone())
    ));
}

/// Evidence for views that have begun is not checked again, promises of their authors are.
#[test]
fn view_changes_are_wanted_while_they_say_more() {
    let (mut backup, voters, _) = backup();
    let change = |view| {
        let (attempt, began, stable) = (AttemptId::default(), Sequence(0), None);
        ViewChange { view: View(view), attempt, began, stable, prepared: vec![], keys: vec![] }
    };
    let needs = |backup: &Replica, view| {
        let change = PeerMessage::ViewChange(voters[1].sign(change(view)).signed().clone());
        backup.wants().needs(ServerId(1), View(0), &change)
    };
    let new_view = |backup: &Replica, view| {
        let new_view =
            voters[1].sign(NewView { view: View(view), attempt: AttemptId::default(), view_changes: vec![] });
        let message = PeerMessage::NewView(Box::new(new_view.signed().clone()), *new_view.key());
        backup.wants().needs(ServerId(1), View(0), &message)
    };
    assert!(needs(&backup, 1) && new_view(&backup, 1) && !new_view(&backup, 0));
    let said = CheckedViewChange::new(&backup.cluster, voters[1].sign(change(1)));
    let named = |digest| {
        let view_changes = vec![(ServerId(1), digest)];
        NewView { view: View(1), attempt: AttemptId::default(), view_changes }
    };
    assert!(!backup.wants().begins(&named(said.digest())), "what it names is not here");
    let digest = said.digest();
    let said = CheckedMessage::ViewChange(said);
    backup.handle(NOW, Input::Message(ServerId(1), said));
    assert!(needs(&backup, 1), "it may show more by now");
    assert!(backup.wants().begins(&named(digest)) && !backup.wants().begins(&named(Hash([1; 32]))));
    backup.view = View(1);
    assert!(!needs(&backup, 1) && needs(&backup, 2), "that view has begun");
    assert!(!new_view(&backup, 1));
    backup.changing.active = false;
    assert!(needs(&backup, 1) && new_view(&backup, 1));
    let suspect = |view| {
        PeerMessage::Suspect(
            voters[1].sign(Suspect { view: View(view), attempt: AttemptId::default() }).signed().clone(),
        )
    };
    let wants = backup.wants();
    assert!(
        !wants.needs(ServerId(1), View(0), &suspect(0)) && wants.needs(ServerId(1), View(0), &suspect(1))
    );
}

/// 300 questions of a `Status` that claims one more each time are not answered in full each time.
#[test]
fn answers_to_a_flood_of_questions_are_bounded() {
    let (mut backup, voters, _) = backup();
    let large = "x".repeat(100_000);
    for sequence in 1..=200 {
        let operation = crate::request::Operation::Revoke {
            name: crate::record::Name::new("x").unwrap(),
            from_version: 1,
            reason: large.clone(),
        };
        let key = crate::signing::SigningKey::from_seed(&[1; 32]);
        let request = crate::request::SignedRequest::sign(&backup.cluster, &key, sequence, NOW, operation)
            .trusted(&backup.cluster);
        let batch = CheckedBatch::new(&backup.cluster, NOW, vec![request]);
        let statement = Commit(slot(0, sequence, batch.digest()));
        let proof = QuorumProof { statement, votes: vec![], keys: vec![] };
        backup.handle(NOW, Input::Message(ServerId(1), CheckedMessage::Committed(proof, batch)));
    }
    assert_eq!(backup.executed(), Sequence(200));
    let mut ask = |now, executed| {
        let (executed, certified) = (Sequence(executed), Sequence(0));
        let status = Status {
            view: View(0),
            active: true,
            executed,
            certified,
            wants_state: false,
            changes: 0,
            attempt: AttemptId::default(),
        };
        let status = CheckedMessage::Status(voters[1].sign(status));
        backup.handle(now, Input::Message(ServerId(1), status));
        let sent = backup.drain_free();
        let batches = sent.iter().filter(|(_, message)| matches!(**message, PeerMessage::Committed(..)));
        batches.count()
    };
    let first = ask(NOW, 0);
    assert!(first > 0);
    let more: usize = (1..first as u64).map(|executed| ask(NOW, executed)).sum();
    assert_eq!(more, 0, "claiming one more each time gets nothing");
    assert!(ask(NOW, first as u64) > 0, "who used it all is helped at once");
    assert!(ask(NOW.plus_ms(crate::limits::RETRANSMIT_MS), 0) > 0, "who lost it is, after a while");
}
