use super::*;
use crate::bytes::Hash;
use crate::certificate::{Checkpoint, QuorumProof, VoteBook};
use crate::evidence::{Evidence, EvidenceError, EvidenceFile};
use crate::ids::AttemptId;
use crate::message::PeerMessage;
use crate::request::{Decision, Done, Operation, Refusal};
use crate::signer::{Ask, Counter, Refused, Signer};
use crate::signing::Statement as _;
use crate::signing::{KeyError, KeyPurpose, SigningKey, Voter};
use crate::state::State;
use crate::state::epochs::tests::{SECOND, World};

fn administrator() -> SigningKey {
    SigningKey::from_seed(&[200; 32])
}

fn replacement(server: u8, identity: &SigningKey) -> Replacement {
    Replacement {
        server: ServerId(server),
        url: "https://10.0.0.7:7000".into(),
        peer: "10.0.0.7:7001".into(),
        identity: identity.public(),
        certificate: Blob(vec![7; 300]),
    }
}

fn decide(world: &mut World, replacement: &Replacement) -> Result<Done, Option<Refusal>> {
    let replacement = replacement.clone();
    world.ask_with(&administrator(), Operation::Decide(Decision::ReplaceIdentity { replacement }))
}

/// What three servers certify now, with the voters that they have.
fn certificate(world: &mut World) -> Certificate {
    let statement = world.state.seal().0;
    let mut book = VoteBook::default();
    for voter in &world.voters[..3] {
        assert!(book.add(voter.sign(statement)).unwrap());
    }
    book.proof(&statement, 3).unwrap()
}

/// What shows a change in the state as it is.
fn proof(world: &mut World, number: u32) -> ChangeProof {
    let certificate = certificate(world);
    let snapshot = world.state.seal().1;
    ChangeProof { change: Proved::look_up(&snapshot, &layout::change_key(number)), certificate }
}

fn attest(world: &mut World, by: u8, proof: &ChangeProof) -> Result<Done, Option<Refusal>> {
    world.ask(by, Operation::Attest { server: ServerId(by), proof: Box::new(proof.clone()) })
}

/// Server 3 of four gets another identity, and the next epoch begins.
pub(crate) fn replaced() -> (World, SigningKey, ChangeProof) {
    let (mut world, new) = (World::new(), SigningKey::from_seed(&[77; 32]));
    assert_eq!(decide(&mut world, &replacement(3, &new)), Ok(Done::Decided));
    let proof = proof(&mut world, 0);
    assert_eq!(attest(&mut world, 0, &proof), Ok(Done::Attested));
    begin_epoch(&mut world);
    world.identities[3] = new.clone();
    (world, new, proof)
}

fn begin_epoch(world: &mut World) {
    world.pass(30 * SECOND);
    assert!((0..3).all(|i| world.deal(i)));
    assert!((0..3).all(|i| world.ack(i, &[0, 1, 2])));
    assert!((0..3).all(|i| world.ready(i)));
    let epoch = world.epochs().current;
    (0..3u8).for_each(|i| world.voters[usize::from(i)] = world.voter(i, epoch));
}

#[test]
fn an_identity_is_its_servers_from_one_epoch_on() {
    let (world, new, proof) = replaced();
    let membership = Arc::clone(world.state.membership());
    let old = membership.manifest().servers[3].identity;
    let of = |epoch| membership.identity(ServerId(3), Epoch(epoch));
    assert_eq!((of(0), of(1), of(9)), (Some(old), Some(new.public()), Some(new.public())));
    assert_eq!(membership.identity(ServerId(4), Epoch(1)), None);
    assert_eq!((membership.since(ServerId(3)), membership.since(ServerId(2))), (Epoch(1), Epoch(0)));
    assert_eq!(membership.place(ServerId(3)).unwrap().peer, "10.0.0.7:7001");
    let is_replaced = |of, current| membership.is_replaced(ServerId(3), Epoch(of), Epoch(current));
    assert!(!is_replaced(0, 0) && is_replaced(0, 1) && !is_replaced(1, 1));
    // The same from the manifest and what shows it, and from a stored state.
    let genesis = Membership::genesis(Arc::clone(membership.manifest()));
    let followed = genesis.follow([Arc::new(proof)]).unwrap();
    assert_eq!(followed.changes(), membership.changes());
    let checkpoint = world.state.clone().seal().0;
    let restored = State::restore(Arc::clone(membership.manifest()), checkpoint, world.state.map().clone());
    let restored = restored.unwrap();
    assert_eq!(restored.membership().changes(), membership.changes());
    assert_eq!(restored.membership().proofs(), membership.proofs());
}

#[test]
fn what_does_not_show_a_change_is_not_followed() {
    let (world, _, good) = replaced();
    let genesis = Membership::genesis(Arc::clone(world.state.membership().manifest()));
    let refused = |change: &dyn Fn(&mut ChangeProof)| {
        let mut other = good.clone();
        change(&mut other);
        genesis.follow([Arc::new(other)]).unwrap_err()
    };
    fn of(proof: &mut ChangeProof) -> &mut Change {
        proof.change.value.as_mut().unwrap()
    }
    let thief = SigningKey::from_seed(&[78; 32]).public();
    assert_eq!(refused(&|p| of(p).replacement.identity = thief), MembershipError::NotThere(0));
    assert_eq!(refused(&|p| of(p).replacement.server = ServerId(2)), MembershipError::NotThere(0));
    assert_eq!(refused(&|p| of(p).from = Epoch(2)), MembershipError::Epoch(0));
    assert_eq!(refused(&|p| of(p).number = 1), MembershipError::Order { known: 0 });
    assert_eq!(refused(&|p| p.change.value = None), MembershipError::Order { known: 0 });
    let used = genesis.manifest().servers[0].identity;
    assert_eq!(refused(&|p| of(p).replacement.identity = used), MembershipError::Malformed(0));
    let few = |p: &mut ChangeProof| p.certificate.votes.truncate(2);
    assert!(matches!(refused(&few), MembershipError::Certificate(_)));
    let unsigned = |p: &mut ChangeProof| p.certificate.statement.root = Hash([1; 32]);
    assert!(matches!(refused(&unsigned), MembershipError::Certificate(_)));
    // Twice the same is passed over; then comes the next one or nothing.
    let good = Arc::new(good.clone());
    let twice = genesis.follow([Arc::clone(&good), Arc::clone(&good)]).unwrap();
    assert_eq!(twice.changes().len(), 1);
}

/// Whoever has q keys of an earlier or a later epoch shows nothing: q votes of the epoch before count.
#[test]
fn a_change_is_certified_in_the_epoch_before_it_takes_effect() {
    let (mut world, _, good) = replaced();
    let later = proof(&mut world, 0);
    assert_eq!(later.certificate.statement.epoch, Epoch(1));
    let genesis = Membership::genesis(Arc::clone(world.state.membership().manifest()));
    assert_eq!(genesis.follow([Arc::new(later)]).unwrap_err(), MembershipError::Epoch(0));
    assert!(genesis.follow([Arc::new(good)]).is_ok());
}

#[test]
fn no_epoch_begins_before_a_change_can_be_shown() {
    let (mut world, new) = (World::new(), SigningKey::from_seed(&[77; 32]));
    world.pass(30 * SECOND);
    // The attempt that is under way ends: the server that is replaced may have dealt in it.
    assert!(world.deal(3) && world.deal(0));
    let before = world.attempt().id;
    assert_eq!(decide(&mut world, &replacement(3, &new)), Ok(Done::Decided));
    assert_eq!(world.epochs().attempt, None);
    world.pass(120 * SECOND);
    assert_eq!(world.epochs().attempt, None, "an epoch begins that nobody could follow to");
    let shown = proof(&mut world, 0);
    let mut forged = shown.clone();
    forged.certificate.votes.pop();
    assert_eq!(attest(&mut world, 1, &forged), Err(None), "not even ordered");
    let stranger = Operation::Attest { server: ServerId(1), proof: Box::new(shown.clone()) };
    assert_eq!(world.ask_with(&new, stranger), Err(None));
    assert_eq!(attest(&mut world, 1, &shown), Ok(Done::Attested));
    assert_eq!(attest(&mut world, 2, &shown), Err(None), "once is enough");
    world.pass(SECOND);
    assert!(world.attempt().id > before);
    // The old identity certifies nothing for the next epoch, the new one does; nor do its shares count.
    assert!(!world.deal(3));
    world.identities[3] = new;
    assert!(world.deal(3) && world.deal(0) && world.deal(1));
    assert!([0, 1, 3].iter().all(|i| world.ack(*i, &[0, 1, 3])));
    assert!(world.ready(0) && world.ready(1) && world.ready(3));
    assert_eq!(world.epochs().current, Epoch(0), "three are whole, and one of them is about to be nobody");
    assert!(world.ready(2));
    assert_eq!(world.epochs().current, Epoch(1));
}

#[test]
fn one_server_in_an_epoch_is_given_an_identity_that_nobody_had() {
    let (mut world, new) = (World::new(), SigningKey::from_seed(&[77; 32]));
    let (other, third) = (SigningKey::from_seed(&[79; 32]), SigningKey::from_seed(&[80; 32]));
    let invalid = Err(Some(Refusal::Invalid(crate::record::Invalid::Replacement)));
    let used = world.identities[0].clone();
    assert_eq!(decide(&mut world, &replacement(3, &used)), invalid);
    assert_eq!(decide(&mut world, &replacement(4, &new)), invalid, "no such server");
    for change in [
        (|r: &mut Replacement| r.url = "http://plain:1".into()) as fn(&mut Replacement),
        |r| r.url = "https://no-port".into(),
        |r| r.peer = "10.0.0.7:70010".into(),
        |r| r.peer = " 10.0.0.7:7001".into(),
        |r| r.certificate = Blob(vec![]),
        |r| r.certificate = Blob(vec![0; 10_000]),
        |r| r.identity = PublicKey([0; 32]),
    ] {
        let mut odd = replacement(3, &new);
        change(&mut odd);
        assert_eq!(decide(&mut world, &odd), invalid, "{odd:?}");
    }
    let by_nobody = Operation::Decide(Decision::ReplaceIdentity { replacement: replacement(3, &new) });
    assert_eq!(world.ask(0, by_nobody), Err(None));
    assert_eq!(decide(&mut world, &replacement(3, &new)), Ok(Done::Decided));
    assert_eq!(decide(&mut world, &replacement(3, &new)), Err(Some(Refusal::AlreadySo)));
    assert_eq!(decide(&mut world, &replacement(2, &other)), Err(Some(Refusal::TooOften)));
    let shown = proof(&mut world, 0);
    assert_eq!(attest(&mut world, 0, &shown), Ok(Done::Attested));
    assert_eq!(decide(&mut world, &replacement(2, &other)), Err(Some(Refusal::TooOften)));
    begin_epoch(&mut world);
    let first = SigningKey::from_seed(&[4; 32]);
    assert_eq!(
        decide(&mut world, &replacement(3, &first)),
        invalid,
        "the identity that was stolen comes back"
    );
    assert_eq!(decide(&mut world, &replacement(2, &new)), invalid, "another server's");
    // The same place again: the chain goes on under keys of the membership before.
    assert_eq!(decide(&mut world, &replacement(3, &third)), Ok(Done::Decided));
    let second = proof(&mut world, 1);
    let genesis = Membership::genesis(Arc::clone(world.state.membership().manifest()));
    let alone = genesis.follow([Arc::new(second.clone())]).unwrap_err();
    assert_eq!(alone, MembershipError::Order { known: 0 });
    let both = genesis.follow([Arc::new(shown), Arc::new(second)]).unwrap();
    assert_eq!(both.identity(ServerId(3), Epoch(1)), Some(new.public()));
    assert_eq!(both.identity(ServerId(3), Epoch(2)), Some(third.public()));
}

/// The thief of the identity that was replaced is nobody from then on; what was signed before stays good.
#[test]
fn a_thief_of_an_old_identity_is_nobody() {
    let (world, new, shown) = replaced();
    let membership = Arc::clone(world.state.membership());
    let (cluster, old) = (*membership.cluster(), SigningKey::from_seed(&[4; 32]));
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(9);
    let mut voter = |identity: &SigningKey, epoch: u64| {
        Voter::generate(cluster, identity, ServerId(3), AttemptId::first(Epoch(epoch)), 90 + epoch, &mut rng)
    };
    let (before, thief, honest) = (voter(&old, 0), voter(&old, 1), voter(&new, 1));
    let mut keyring = Keyring::new(Arc::clone(membership.manifest()));
    // Who does not know of the change takes the thief's key, and forgets it with the change.
    assert_eq!(keyring.add(*thief.certificate()), Ok(true));
    assert_eq!(keyring.add(*before.certificate()), Ok(true));
    let not_certified = Err(KeyError::NotCertified(ServerId(3)));
    assert_eq!(keyring.add(*honest.certificate()), not_certified);
    let followed = PeerMessage::Membership(vec![Arc::new(shown.clone())]).check(ServerId(1), &mut keyring);
    assert!(followed.is_ok());
    assert!(!keyring.knows(thief.certificate()) && keyring.knows(before.certificate()));
    assert_eq!(keyring.add(*thief.certificate()), not_certified);
    assert_eq!(keyring.add(*honest.certificate()), Ok(true));
    // It may have slept: that is believed of whoever the server is, not of whoever it was.
    let held = |by: &Voter| crate::certificate::Held { sequence: crate::Sequence(1), attempt: by.attempt() };
    let note = |by: &Voter| by.sign(held(by)).signed().clone();
    keyring.set_epoch(Epoch(0));
    assert!(keyring.check(note(&before)).is_ok(), "it still is the server");
    keyring.set_epoch(Epoch(1));
    let late = keyring.check(note(&before)).unwrap_err();
    assert_eq!(late, KeyError::OtherEpoch(ServerId(3)));
    assert!(keyring.check(note(&honest)).is_ok());
}

/// What a file that verifies has in it was checked: whoever takes it out of the file again may rely on it.
#[test]
fn a_proof_file_that_verifies_has_nothing_unchecked() {
    use crate::answer::{PROOF_FORMAT, ProofFile, RecordAnswer, Verifier};
    use crate::map::{Proof, Terminal};
    use crate::record::{Change as Changed, Entry, Name, Record, Status};
    let (mut world, _, good) = replaced();
    let manifest = Arc::clone(world.state.membership().manifest());
    let certificate = Arc::new(certificate(&mut world));
    let (_, snapshot) = world.state.seal();
    let name = Name::new("alice").unwrap();
    let answer = RecordAnswer::look_up(&snapshot, &certificate, crate::Sequence(0), &name, None);
    let membership = vec![Arc::new(good.clone())];
    let cluster = manifest.cluster_id().0;
    let file =
        ProofFile { format: PROOF_FORMAT, cluster, name: name.clone(), version: None, answer, membership };
    let verifies = |file: &ProofFile| Verifier::new(Arc::clone(&manifest)).proof_file(file).is_ok();
    assert!(verifies(&file));
    let mut twice = file.clone();
    twice.membership.push(Arc::new(good.clone()));
    assert!(verifies(&twice), "the same again");
    let entry = Entry {
        keys: vec![],
        owner: None,
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: Default::default(),
    };
    let updated = Changed { sequence: crate::Sequence(1), time: crate::Timestamp(1) };
    let value = Some(Record { name, version: 1, status: Status::Active, entry, updated });
    let proof = Proof { steps: vec![], terminal: Terminal::Empty };
    let mut more = file.clone();
    more.answer.earlier = Some(Proved { value, proof });
    assert!(!verifies(&more), "a version that nobody asked for");
    let mut forged = good;
    forged.certificate.votes.clear();
    if let Some(change) = &mut forged.change.value {
        change.replacement.url = "https://evil.example:1".into();
    }
    let mut more = file;
    more.membership.push(Arc::new(forged));
    assert!(!verifies(&more), "a change that is known, told otherwise");
}

/// Evidence names those alone whose announced keys signed it: an identity that was stolen certifies keys for any epoch.
#[test]
fn a_stolen_identity_frames_nobody() {
    let (mut world, _, _) = replaced();
    let membership = Arc::clone(world.state.membership());
    let cluster = *membership.cluster();
    let certificate = Arc::new(certificate(&mut world));
    let (_, snapshot) = world.state.seal();
    let of = certificate.statement;
    let votes = |voter: &Voter, of: Checkpoint| {
        let statement = |root: u8| Checkpoint { root: Hash([root; 32]), ..of };
        let ((first, key), (second, _)) =
            (voter.sign(statement(1)).stored(), voter.sign(statement(2)).stored());
        Evidence::Votes { first, second, keys: vec![key] }
    };
    let check = |file: &EvidenceFile| {
        let mut verifier = crate::answer::Verifier::new(Arc::clone(membership.manifest()));
        verifier.evidence_file(file)
    };
    let state = Some((&certificate, &snapshot));
    // A liar votes with the key that it announced.
    let liar = world.voter_of(1, of.attempt());
    let file = EvidenceFile::new(&membership, votes(&liar, of), state);
    assert_eq!(check(&file), Ok(vec![ServerId(1)]));
    let not_announced = |server| Err(EvidenceError::NotAnnounced(ServerId(server)));
    assert_eq!(check(&EvidenceFile { announced: None, ..file.clone() }), not_announced(1));
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(9);
    // Keys that others' identities certify: one that is still in use, one that was replaced, for the epoch that is,
    // and for the one before, in which it was the server's. With the change in the file, and without.
    for (server, seed) in [(1, 2), (3, 4)] {
        let identity = SigningKey::from_seed(&[seed; 32]);
        for attempt in [of.attempt(), AttemptId::default()] {
            let thief = Voter::generate(cluster, &identity, ServerId(server), attempt, 9, &mut rng);
            let of = Checkpoint { epoch: attempt.epoch, attempt: attempt.attempt, ..of };
            let file = EvidenceFile::new(&membership, votes(&thief, of), state);
            assert_eq!(check(&file), not_announced(server), "{server} {attempt}");
            for membership in [vec![], file.membership.clone()] {
                let announced = file.announced.clone();
                let dissent = match &file.evidence {
                    Evidence::Votes { first, keys, .. } => Evidence::Dissent {
                        certificate: Box::new(certificate.as_ref().clone()),
                        vote: first.clone(),
                        key: keys[0],
                    },
                    _ => unreachable!("they are votes"),
                };
                for evidence in [dissent, file.evidence.clone()] {
                    let (announced, membership) = (announced.clone(), membership.clone());
                    let framing = EvidenceFile { evidence, announced, membership, ..file.clone() };
                    assert!(check(&framing).is_err());
                }
            }
        }
    }
    // A key of the epoch before, which a server that did not take part in the attempt still has in the state.
    let (stale, before) = (&world.voters[3], AttemptId::default());
    let announced = layout::server_keys(&snapshot, ServerId(3)).unwrap().voting;
    assert_eq!(announced, *stale.certificate());
    let said = Checkpoint { epoch: before.epoch, attempt: before.attempt, ..of };
    assert_eq!(check(&EvidenceFile::new(&membership, votes(stale, said), state)), not_announced(3));
    // A certificate of the very state in which the thief's vote stands in the place of an honest one makes his key
    // known; the key that was announced is put beside it, or none.
    let identity = SigningKey::from_seed(&[2; 32]);
    let thief = Voter::generate(cluster, &identity, ServerId(1), of.attempt(), 9, &mut rng);
    let mut book = VoteBook::default();
    for voter in [&world.voter_of(0, of.attempt()), &thief, &world.voter_of(2, of.attempt())] {
        assert!(book.add(voter.sign(of)).unwrap());
    }
    let mixed = Arc::new(book.proof(&of, 3).unwrap());
    for keys in [vec![*liar.certificate()], vec![]] {
        let Evidence::Votes { first, second, .. } = votes(&thief, of) else { unreachable!("they are votes") };
        let framing = Evidence::Votes { first, second, keys };
        let file = EvidenceFile::new(&membership, framing, Some((&mixed, &snapshot)));
        assert!(check(&file).is_err(), "{:?}", check(&file));
    }
    // What is said of two checkpoints by two keys of a liar's, of which it announced one, stands for nothing.
    let other = Voter::generate(cluster, &world.identities[1], ServerId(1), of.attempt(), 10, &mut rng);
    let (first, key) = liar.sign(Checkpoint { root: Hash([1; 32]), ..of }).stored();
    let (second, other_key) = other.sign(Checkpoint { root: Hash([2; 32]), ..of }).stored();
    let mixed = Evidence::Votes { first, second, keys: vec![key, other_key] };
    assert_eq!(check(&EvidenceFile::new(&membership, mixed, state)), not_announced(1));
}

#[test]
fn a_signer_certifies_for_the_epochs_in_which_its_identity_is_the_servers() {
    let (mut world, new, shown) = replaced();
    let genesis = Membership::genesis(Arc::clone(world.state.membership().manifest()));
    let key = vec![(KeyPurpose::Voting, PublicKey([7; 32]))];
    let evidence = Some(certificate(&mut world));
    let number = std::cell::Cell::new(0);
    let ask = |epoch: u64, evidence: Option<Certificate>, changes: Vec<Arc<ChangeProof>>| Ask {
        keys: key.clone(),
        number: number.replace(number.get() + 1) + 1,
        attempt: AttemptId::first(Epoch(epoch)),
        evidence,
        coming: None,
        changes,
    };
    let shown = vec![Arc::new(shown)];
    let signer = |identity: &SigningKey| {
        Signer::new(Arc::clone(&genesis), ServerId(3), identity.clone(), Counter::default())
    };
    let refused = |epoch| Err(Refused::NotIdentity { server: ServerId(3), epoch: Epoch(epoch) });
    // The new one's: not before it is shown that it is the server's, and not for the epoch before.
    let mut fresh = signer(&new);
    assert_eq!(fresh.certify(&ask(0, None, vec![])).map(drop), refused(0));
    let certified = fresh.certify(&ask(0, None, shown.clone())).unwrap().1;
    assert_eq!(certified[0].statement.epoch, Epoch(1));
    certified[0].verify(world.state.membership()).unwrap();
    // Of no attempt: nobody counts a vote under it, until the epoch is shown to have begun.
    assert_eq!(certified[0].statement.attempt, 0);
    let begun = fresh.certify(&ask(1, evidence.clone(), vec![])).unwrap().1;
    assert_eq!(begun[0].statement.attempt_id(), AttemptId::first(Epoch(1)));
    assert!(fresh.certify(&ask(2, evidence.clone(), vec![])).is_err());
    // The old one's: not any more, as soon as it knows.
    let mut old = signer(&SigningKey::from_seed(&[4; 32]));
    assert!(old.certify(&ask(0, None, vec![])).is_ok());
    assert_eq!(old.certify(&ask(1, evidence.clone(), shown.clone())).map(drop), refused(1));
    assert_eq!(old.certify(&ask(0, None, vec![])).map(drop), refused(1));
    // Changes that do not hold are not believed.
    let mut forged = ChangeProof::clone(&shown[0]);
    forged.certificate = QuorumProof { votes: vec![], ..forged.certificate };
    let lie = signer(&new).certify(&ask(0, None, vec![Arc::new(forged)])).map(drop);
    assert_eq!(lie, Err(Refused::Evidence));
}

/// A server's start: its database has the first state, the batches after it, among them the one that replaces server
/// 3 and the one that begins epoch 1, and perhaps that a view has begun since, with this primary. How far it comes, and its complaints.
fn after_a_start(begun: Option<u8>) -> (crate::ids::Sequence, Vec<crate::ordering::Accusation>) {
    use crate::message::{Commit, NewView, Slot, ViewChange};
    use crate::ordering::{Identity, Replica, Stored, StoredBeginning, StoredSlot, StoredView};
    let (world, _, _) = replaced();
    let manifest = Arc::clone(world.state.membership().manifest());
    let mut state = State::genesis(Arc::clone(&manifest));
    let slots = world.batches.iter().map(|batch| {
        let (view, sequence, attempt) = (crate::ids::View(0), state.sequence().next(), state.attempt());
        state.execute(batch);
        let slot = Slot { view, sequence, digest: batch.digest(), attempt };
        let proof = QuorumProof { statement: Commit(slot), votes: vec![], keys: vec![] };
        StoredSlot {
            sequence,
            accepted: None,
            prepared: None,
            committed: Some((proof, Some(batch.to_batch()))),
        }
    });
    let slots: Vec<_> = slots.collect();
    assert!(slots.len() as u64 <= crate::limits::FLUSH_BATCHES, "the state is not written meanwhile");
    // Of view 3 whoever has the place of server 3 now is the primary.
    let primary = world.voter(begun.unwrap_or(0), Epoch(1));
    let view = crate::ids::View(u64::from(primary.server().0));
    let changes = [0, 1, 2].map(|id| {
        let (voter, at) = (world.voter(id, Epoch(1)), (state.attempt(), state.began()));
        Arc::new(voter.sign(ViewChange::new(view, at, None, [].iter())).stored())
    });
    let named = changes
        .iter()
        .map(|change| (change.0.server, crate::codec::digest(&manifest.cluster_id(), &change.0)));
    let new_view = NewView { view, attempt: primary.attempt(), view_changes: named.collect() };
    let new_view = primary.sign(new_view);
    let view = begun.map(|_| StoredView {
        view,
        began: Some(StoredBeginning { new_view: new_view.stored(), view_changes: changes.to_vec() }),
    });
    let membership = Membership::genesis(manifest);
    let stored = Stored { slots, view, ..Stored::default() };
    let membership = stored.membership(membership.manifest()).unwrap();
    let identity = Identity {
        membership,
        voter: world.voters[0].clone(),
        boot: 0,
        log_tail: crate::limits::LOG_TAIL_BATCHES,
    };
    let mut replica = Replica::start(identity, stored);
    let (writes, unsent) = replica.drain().unwrap();
    let resets = writes.writes().iter().any(|write| matches!(write, crate::ordering::Write::Reset));
    assert_eq!(resets, replica.status().executed.0 == 0);
    (replica.status().executed, unsent.release(&writes.committed()).accusations)
}

#[test]
fn a_server_starts_after_a_replacement() {
    assert_eq!(after_a_start(None), (crate::ids::Sequence(16), vec![]));
    assert_eq!(after_a_start(Some(2)), (crate::ids::Sequence(16), vec![]));
}

/// The new-view message is checked before the log is executed that changes the membership, and so against what that
/// log shows. Else the server would take its own database for damaged and throw it away; and where all are started again
/// at once, all would.
#[test]
fn a_start_in_a_view_of_a_replaced_server_keeps_the_database() {
    assert_eq!(after_a_start(Some(3)), (crate::ids::Sequence(16), vec![]));
}
