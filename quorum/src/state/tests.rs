use super::*;
use crate::Blob;
use crate::ids::ServerId;
use crate::limits::DECISION_MS;
use crate::manifest::tests::sample;
use crate::record::{Entry, Invalid, KeyMaterial, Name, Status};
use crate::refresh::SCALARS_FROM;
use crate::request::{Decision, Deposit, Done, Hardness, Passphrase, Reader, SignedRequest};
use crate::signing::{KeyCertificate, KeyPurpose, KeyStatement, SigningKey, Voter};
use crate::{Element, oprf};
use rand::{SeedableRng, rngs::StdRng};
use std::collections::BTreeMap;

/// A state with its clock and a counter for request numbers.
pub(super) struct World {
    pub(super) state: State,
    pub(super) cluster: ClusterId,
    pub(super) now: Timestamp,
    next: u64,
    events: Vec<Event>,
}

pub(super) fn admin() -> SigningKey {
    SigningKey::from_seed(&[200; 32])
}
pub(super) fn key(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}
pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

impl World {
    pub(super) fn new() -> Self {
        let (manifest, _) = sample(4);
        let cluster = manifest.cluster_id();
        let state = State::genesis(Arc::new(manifest));
        Self { state, cluster, now: Timestamp(1_000_000), next: 0, events: vec![] }
    }
    pub(super) fn sign(&mut self, by: &SigningKey, operation: Operation) -> SignedRequest {
        self.next += 1;
        SignedRequest::sign(&self.cluster, by, self.next, self.now.plus_ms(10_000), operation)
    }
    pub(super) fn run(&mut self, requests: Vec<SignedRequest>) -> Executed {
        let requests = requests.into_iter().map(|request| request.verify(&self.cluster).unwrap()).collect();
        let executed = self.state.execute(&CheckedBatch::new(&self.cluster, self.now, requests));
        self.events.extend(executed.events.iter().map(|(_, event)| event.clone()));
        executed
    }
    /// Executes one operation; none if it left no reply.
    pub(super) fn ask(&mut self, by: &SigningKey, operation: Operation) -> Option<Outcome> {
        let request = self.sign(by, operation);
        let id = RequestId { client: request.request.client, sequence: request.request.sequence };
        self.run(vec![request]);
        self.state.reply(id).map(|reply| reply.outcome)
    }
    pub(super) fn refused(&mut self, by: &SigningKey, operation: Operation) -> Refusal {
        match self.ask(by, operation) {
            Some(Outcome::Refused(refusal)) => refusal,
            other => panic!("not refused: {other:?}"),
        }
    }
    pub(super) fn done(&mut self, by: &SigningKey, operation: Operation) -> Done {
        match self.ask(by, operation) {
            Some(Outcome::Done(done)) => done,
            other => panic!("not done: {other:?}"),
        }
    }
}

pub(super) fn entry(byte: u8, owner: Option<&SigningKey>) -> Entry {
    Entry {
        keys: vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![byte; 32]) }],
        owner: owner.map(SigningKey::public),
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: BTreeMap::new(),
    }
}
pub(super) fn register(text: &str, entry: Entry) -> Operation {
    Operation::Register { name: name(text), entry }
}
pub(super) fn rotate(text: &str, from_version: u64, entry: Entry) -> Operation {
    Operation::Rotate { name: name(text), from_version, entry }
}
pub(super) fn revoke(text: &str, from_version: u64) -> Operation {
    Operation::Revoke { name: name(text), from_version, reason: "lost".into() }
}

#[test]
fn administrators_register_owners_rotate_strangers_do_nothing() {
    let mut world = World::new();
    let (owner, stranger) = (key(1), key(2));
    assert_eq!(world.done(&admin(), register("a", entry(1, Some(&owner)))), Done::Record { version: 1 });
    assert_eq!(world.refused(&admin(), register("a", entry(2, None))), Refusal::NameTaken { version: 1 });
    assert_eq!(world.refused(&owner, register("b", entry(2, None))), Refusal::NotAllowed);
    // A key that nobody knows leaves nothing behind, not even a reply.
    let before = world.state.map().len();
    assert_eq!(world.ask(&stranger, register("b", entry(2, None))), None);
    assert_eq!(world.ask(&stranger, rotate("a", 1, entry(2, None))), None);
    assert_eq!(world.state.map().len(), before);
    assert_eq!(
        world.refused(&owner, rotate("a", 2, entry(2, Some(&owner)))),
        Refusal::VersionConflict { current: 1 }
    );
    assert_eq!(world.done(&owner, rotate("a", 1, entry(2, Some(&stranger)))), Done::Record { version: 2 });
    // Ownership went over: the former owner is a stranger now.
    assert_eq!(world.ask(&owner, rotate("a", 2, entry(3, None))), None);
    assert_eq!(world.done(&stranger, rotate("a", 2, entry(3, None))), Done::Record { version: 3 });
    let old = layout::history_key(&name("a"), 1);
    let old: crate::record::Record = world.state.load(&old).unwrap();
    assert_eq!((old.version, &old.entry.keys[0].key.0[0]), (1, &1));
    assert_eq!(world.refused(&admin(), rotate("none", 1, entry(1, None))), Refusal::NoSuchName);
    let mut broken = entry(1, None);
    broken.keys.clear();
    assert_eq!(world.refused(&admin(), register("c", broken)), Refusal::Invalid(Invalid::KeyCount));
}

#[test]
fn an_owner_only_record_is_revoked_but_not_replaced_by_an_administrator() {
    let mut world = World::new();
    let owner = key(1);
    let entry = Entry { owner_only: true, ..entry(1, Some(&owner)) };
    world.done(&admin(), register("a", entry.clone()));
    assert_eq!(world.refused(&admin(), rotate("a", 1, entry.clone())), Refusal::NotAllowed);
    assert_eq!(world.done(&admin(), revoke("a", 1)), Done::Record { version: 2 });
    let record = layout::record(world.state.map(), &name("a")).unwrap();
    assert!(matches!(record.status, Status::Revoked { ref reason, .. } if reason == "lost"));
    // Final: not even its owner, whose key may be the one that was stolen.
    assert_eq!(world.refused(&owner, rotate("a", 2, entry)), Refusal::Revoked);
    assert_eq!(world.refused(&admin(), revoke("a", 2)), Refusal::Revoked);
}

#[test]
fn a_request_executes_once_and_a_retry_finds_its_first_reply() {
    let mut world = World::new();
    let request = world.sign(&admin(), register("a", entry(1, None)));
    let id = RequestId { client: request.request.client, sequence: request.request.sequence };
    let other = SignedRequest::sign(
        &world.cluster,
        &admin(),
        request.request.sequence,
        request.request.expiry,
        register("b", entry(1, None)),
    );
    let executed = world.run(vec![request.clone(), request.clone()]);
    assert_eq!(executed.replied, [id, id]);
    let first = world.state.reply(id).unwrap();
    assert_eq!(first.outcome, Outcome::Done(Done::Record { version: 1 }));
    // The same number with other bytes: the first reply stands, nothing happens.
    world.run(vec![request.clone(), other]);
    assert_eq!(world.state.reply(id).unwrap(), first);
    assert!(layout::record(world.state.map(), &name("b")).is_none());

    // After its expiry the request can no longer execute. Its reply stays for a while, so that one that is not
    // there then shows that nothing was executed, and goes.
    let size = world.state.map().len();
    let (number, expiry) = (request.request.sequence.wrapping_add(1), request.request.expiry);
    let late = SignedRequest::sign(&world.cluster, &admin(), number, expiry, register("c", entry(1, None)));
    world.now = request.request.expiry.plus_ms(crate::limits::REPLY_KEPT_MS);
    assert!(world.run(vec![late]).replied.is_empty());
    assert_eq!(world.state.reply(id).unwrap(), first);
    world.now = world.now.plus_ms(1);
    world.run(vec![]);
    assert_eq!(world.state.reply(id), None);
    assert_eq!(world.state.map().len(), size - 1);
    assert!(world.run(vec![request]).replied.is_empty());
    assert_eq!(layout::record(world.state.map(), &name("a")).unwrap().version, 1);
}

#[test]
fn replies_are_kept_for_a_bounded_time_only() {
    let mut world = World::new();
    world.run(vec![]);
    let far = world.now.plus_ms(crate::limits::MAX_REQUEST_LIFETIME_MS + 1);
    let request = SignedRequest::sign(&world.cluster, &admin(), 1, far, register("a", entry(1, None)));
    assert!(world.run(vec![request]).replied.is_empty());
    assert!(layout::record(world.state.map(), &name("a")).is_none());
}

#[test]
fn time_never_goes_backwards() {
    let mut world = World::new();
    world.run(vec![]);
    let before = world.state.time();
    world.now = Timestamp(5);
    world.run(vec![]);
    assert_eq!(world.state.time(), before);
}

pub(super) fn deposit(secret: &str, owner: &SigningKey, readers: Vec<Reader>) -> Deposit {
    Deposit {
        name: name(secret),
        owner: owner.public(),
        readers,
        passphrase: None,
        replaces: None,
        epoch: Epoch(0),
        ciphertext: Blob(vec![1; 40]),
        commitment: crate::Hash([2; 32]),
        shares: vec![Blob(vec![3; 80]); 4],
    }
}
pub(super) fn release(secret: &str) -> Operation {
    Operation::Release { secret: name(secret), ephemeral: PublicKey([9; 32]) }
}

#[test]
fn secrets_are_released_to_readers_only_and_on_the_record() {
    let mut world = World::new();
    let (owner, by_key, by_name, stranger) = (key(1), key(2), key(3), key(4));
    world.done(&admin(), register("bob", entry(1, Some(&by_name))));
    let readers = vec![Reader::Key(by_key.public()), Reader::Name(name("bob"))];
    let Done::Deposited { index } = world.done(&admin(), Operation::Deposit(deposit("s", &owner, readers)))
    else {
        panic!()
    };
    assert!(matches!(world.events[..], [Event::Deposited { index: i, .. }] if i == index));
    for reader in [&owner, &by_key, &by_name] {
        let Done::Released { index: released, .. } = world.done(reader, release("s")) else { panic!() };
        assert_eq!(released, index);
    }
    assert_eq!(world.ask(&stranger, release("s")), None);
    assert_eq!(world.refused(&admin(), release("s")), Refusal::NotAllowed);
    assert_eq!(world.refused(&owner, release("t")), Refusal::NoSuchSecret);
    let releases = layout::releases(world.state.map(), index).unwrap();
    let to: Vec<_> = releases.last.iter().map(|release| release.to.client).collect();
    assert_eq!(to, [owner.public(), by_key.public(), by_name.public()]);

    // A name that changed hands, or was revoked, takes its right along.
    world.done(&by_name, rotate("bob", 1, entry(1, Some(&stranger))));
    assert_eq!(world.ask(&by_name, release("s")), None);
    world.done(&stranger, release("s"));
    world.done(&admin(), revoke("bob", 2));
    assert_eq!(world.refused(&stranger, release("s")), Refusal::NotAllowed);

    assert_eq!(world.refused(&by_key, Operation::Delete { secret: name("s") }), Refusal::NotAllowed);
    assert_eq!(world.done(&owner, Operation::Delete { secret: name("s") }), Done::Deleted);
    assert_eq!(world.events.last(), Some(&Event::Erased { index }));
    // Nothing of it is left, the readers' right to ask included.
    assert_eq!(world.ask(&by_key, release("s")), None);
    assert!(layout::ciphertext(world.state.map(), index).is_none());
}

#[test]
fn a_deposit_is_bound_to_its_epoch_and_replaces_only_what_it_names() {
    let mut world = World::new();
    let owner = key(1);
    let deposit = deposit("s", &admin(), vec![]);
    let old = Deposit { epoch: Epoch(1), ..deposit.clone() };
    assert_eq!(world.refused(&admin(), Operation::Deposit(old)), Refusal::EpochPassed { current: Epoch(0) });
    let short = Deposit { shares: vec![Blob(vec![]); 3], ..deposit.clone() };
    assert_eq!(world.refused(&admin(), Operation::Deposit(short)), Refusal::Invalid(Invalid::Shares));
    let Done::Deposited { index } = world.done(&admin(), Operation::Deposit(deposit.clone())) else {
        panic!()
    };
    assert_eq!(world.refused(&admin(), Operation::Deposit(deposit.clone())), Refusal::SecretTaken { index });
    world.done(&admin(), register("a", entry(1, Some(&owner))));
    let theirs = Deposit { replaces: Some(index), ..deposit.clone() };
    assert_eq!(world.refused(&owner, Operation::Deposit(theirs.clone())), Refusal::NotAllowed);
    let Done::Deposited { index: second } = world.done(&admin(), Operation::Deposit(theirs)) else {
        panic!()
    };
    assert!(second > index);
    assert_eq!(world.events[1], Event::Erased { index });
}

#[test]
fn releases_are_limited_and_old_ones_become_a_chain() {
    let mut world = World::new();
    world.done(&admin(), Operation::Deposit(deposit("s", &admin(), vec![])));
    for _ in 0..crate::limits::RELEASES_PER_MINUTE {
        world.done(&admin(), release("s"));
    }
    assert_eq!(world.refused(&admin(), release("s")), Refusal::TooOften);
    let mut total = crate::limits::RELEASES_PER_MINUTE;
    while total <= crate::limits::RELEASES_KEPT + 1 {
        world.now = world.now.plus_ms(60_001);
        for _ in 0..crate::limits::RELEASES_PER_MINUTE {
            world.done(&admin(), release("s"));
            total += 1;
        }
    }
    let index = layout::secret(world.state.map(), &name("s")).unwrap().index;
    let releases = layout::releases(world.state.map(), index).unwrap();
    assert_eq!(releases.last.len(), crate::limits::RELEASES_KEPT);
    assert_eq!(releases.earlier as usize, total - crate::limits::RELEASES_KEPT);
    assert!(releases.chain.is_some());
}

/// Two of three administrators decide, whatever one of them wants, and for how long she wants it.
#[test]
fn m_of_n_administrators_decide_who_they_are() {
    let admins = [key(1), key(2), key(3)];
    let (mut manifest, _) = sample(4);
    manifest.administrators = admins.iter().map(SigningKey::public).collect();
    manifest.administrators_needed = 2;
    let cluster = manifest.cluster_id();
    let state = State::genesis(Arc::new(manifest));
    let mut world = World { state, cluster, now: Timestamp(1_000_000), next: 0, events: vec![] };
    let add = |seed: u8| Operation::Decide(Decision::AddAdministrator { key: key(seed).public() });
    let remove = |seed: u8| Operation::Decide(Decision::RemoveAdministrator { key: key(seed).public() });
    let one_of_two = Done::Approved { approvals: 1, needed: 2 };

    assert_eq!(world.ask(&key(9), add(9)), None, "a stranger");
    assert_eq!(world.done(&admins[0], add(4)), one_of_two);
    // Again is not twice, and something else is not the same.
    assert_eq!(world.done(&admins[0], add(4)), one_of_two);
    assert_eq!(world.done(&admins[1], add(5)), one_of_two);
    assert_eq!(world.ask(&key(4), register("a", entry(1, None))), None);
    assert_eq!(world.done(&admins[2], add(4)), Done::Decided);
    world.done(&key(4), register("a", entry(1, None)));
    assert_eq!(world.refused(&admins[0], add(4)), Refusal::AlreadySo);
    assert_eq!(world.refused(&admins[0], remove(9)), Refusal::AlreadySo);

    // Who is removed does not count any more, not for what she asked for before either.
    assert_eq!(world.done(&admins[0], remove(2)), one_of_two);
    assert_eq!(world.done(&key(4), remove(2)), Done::Decided);
    assert_eq!(world.ask(&admins[1], add(6)), None);
    assert_eq!(world.done(&admins[0], add(5)), one_of_two);
    // What nobody else wants for a week is forgotten.
    world.now = world.now.plus_ms(DECISION_MS);
    assert_eq!(world.done(&admins[2], add(5)), one_of_two);
    assert_eq!(world.done(&key(4), add(5)), Done::Decided);
    // There are always enough to decide.
    for seed in [3, 4] {
        assert_eq!(world.done(&key(5), remove(seed)), one_of_two);
        assert_eq!(world.done(&key(1), remove(seed)), Done::Decided);
    }
    assert_eq!(world.refused(&key(1), remove(5)), Refusal::Invalid(Invalid::Administrator));
    let weak = Operation::Decide(Decision::AddAdministrator { key: PublicKey([0; 32]) });
    assert_eq!(world.refused(&key(1), weak), Refusal::Invalid(Invalid::Administrator));
    // No administrator fills the state with what nobody else wants.
    for seed in 100..100 + crate::limits::MAX_DECISIONS as u8 {
        assert_eq!(world.done(&key(1), add(seed)), one_of_two);
    }
    assert_eq!(world.refused(&key(1), add(99)), Refusal::TooOften);
    assert_eq!(world.done(&key(5), add(100)), Done::Decided);
}

pub(super) fn behind_passphrase(
    secret: &str,
    opener: &SigningKey,
    readers: Vec<Reader>,
    guesses: u32,
) -> Deposit {
    let key = oprf::public_half(&crate::scalars::whole(5));
    let hardness = Hardness { memory_kib: 64, passes: 1, lanes: 1 };
    let passphrase = Passphrase { salt: [1; 16], hardness, key, opener: opener.public(), guesses };
    Deposit { passphrase: Some(passphrase), ..deposit(secret, &admin(), readers) }
}
pub(super) fn guess(secret: &str) -> Operation {
    let blinded = oprf::public_half(&crate::scalars::whole(7));
    Operation::Guess { secret: name(secret), ephemeral: PublicKey([9; 32]), blinded }
}

/// Attack 55: never more guesses than the limit, whoever makes them, and whatever comes late or again.
#[test]
fn guesses_are_counted_before_anything_is_evaluated() {
    let mut world = World::new();
    let opener = key(50);
    let deposit = behind_passphrase("s", &opener, vec![], 3);
    let Done::Deposited { index } = world.done(&admin(), Operation::Deposit(deposit)) else { panic!() };
    assert!(index >= SCALARS_FROM, "its shares are scalars");
    // No key opens it, not its owner's: the shares would be those of the function's key.
    assert_eq!(world.refused(&admin(), release("s")), Refusal::OnlyByPassphrase);

    let try_one = |world: &mut World, by: u8| {
        let Done::Guessed { index: of, left, .. } = world.done(&key(by), guess("s")) else { panic!() };
        assert_eq!(of, index);
        left
    };
    // From keys that nobody knows, one after the other.
    assert_eq!([60, 61].map(|by| try_one(&mut world, by)), [2, 1]);
    // The opener shows that the first was right; the second counts nevertheless.
    let late = Operation::Unlocked { secret: name("s"), release: guesses_at(&world, index)[0] };
    assert_eq!(world.ask(&key(60), late.clone()), None);
    assert_eq!(world.done(&opener, late.clone()), Done::Unlocked);
    assert_eq!([62, 63].map(|by| try_one(&mut world, by)), [1, 0]);
    // No guess is left: nobody is admitted, and known keys are told why.
    assert_eq!(world.ask(&key(64), guess("s")), None);
    assert_eq!(world.refused(&admin(), guess("s")), Refusal::NoGuessesLeft);
    // The same proof again, held back by somebody, gives nothing: three came after it.
    assert_eq!(world.done(&opener, late), Done::Unlocked);
    assert_eq!(world.refused(&admin(), guess("s")), Refusal::NoGuessesLeft);
    // A guess that was never made is no proof.
    let never = Operation::Unlocked { secret: name("s"), release: 1 };
    assert_eq!(world.refused(&opener, never), Refusal::NotAllowed);
    // What servers evaluate is what was ordered.
    let record = layout::releases(world.state.map(), index).unwrap();
    assert!(record.last.iter().all(|release| release.blinded.is_some()));
    assert_eq!((record.last.len(), record.guessed), (4, 3));
    // Replaced by its owner, it begins anew; deleted, nothing of it is left.
    let again = behind_passphrase("s", &key(51), vec![], 2);
    let again = Deposit { replaces: Some(index), ..again };
    assert_eq!(world.done(&admin(), Operation::Deposit(again)), Done::Deposited { index: index + 1 });
    assert_eq!(world.ask(&opener, Operation::Unlocked { secret: name("s"), release: 1 }), None);
    world.done(&key(65), guess("s"));
}

fn guesses_at(world: &World, index: u64) -> Vec<u64> {
    let releases = layout::releases(world.state.map(), index).unwrap();
    releases.last.iter().map(|release| release.release).collect()
}

#[test]
fn who_may_guess_is_up_to_the_depositor_and_what_is_up_to_the_group() {
    let mut world = World::new();
    let (desk, stranger) = (key(2), key(3));
    let readers = vec![Reader::Key(desk.public())];
    let guarded = behind_passphrase("s", &key(50), readers, 3);
    world.done(&admin(), Operation::Deposit(guarded.clone()));
    assert_eq!(world.ask(&stranger, guess("s")), None);
    world.done(&desk, guess("s"));
    let Operation::Guess { secret, ephemeral, .. } = guess("s") else { panic!() };
    for nothing in [Element([0; 32]), Element([0xff; 32])] {
        let bad = Operation::Guess { secret: secret.clone(), ephemeral, blinded: nothing };
        assert_eq!(world.refused(&desk, bad), Refusal::Invalid(Invalid::Element));
    }
    world.done(&admin(), Operation::Deposit(deposit("plain", &admin(), vec![])));
    assert_eq!(world.refused(&admin(), guess("plain")), Refusal::NoPassphrase);
    assert_eq!(world.ask(&stranger, guess("plain")), None);
    let change = |change: &dyn Fn(&mut Passphrase)| {
        let mut deposit = Deposit { name: name("bad"), ..guarded.clone() };
        change(deposit.passphrase.as_mut().unwrap());
        Operation::Deposit(deposit)
    };
    let bad: [&dyn Fn(&mut Passphrase); 6] = [
        &|p| p.guesses = 0,
        &|p| p.guesses = crate::limits::MAX_GUESSES + 1,
        &|p| p.key = Element([0; 32]),
        &|p| p.opener = PublicKey([0; 32]),
        &|p| p.hardness.memory_kib = u32::MAX,
        &|p| p.hardness.passes = u32::MAX,
    ];
    for bad in bad {
        assert_eq!(world.refused(&admin(), change(bad)), Refusal::Invalid(Invalid::Passphrase));
    }
}

#[test]
fn servers_announce_their_own_keys_and_nobody_elses() {
    let mut world = World::new();
    let (_, identities) = sample(4);
    let mut rng = StdRng::seed_from_u64(1);
    let announce = |server: u8, identity: &SigningKey, serial: u64, rng: &mut StdRng| {
        let (manifest, _) = sample(4);
        let cluster = manifest.cluster_id();
        let voter = Voter::generate(cluster, identity, ServerId(server), AttemptId::default(), serial, rng);
        let statement = KeyStatement {
            server: ServerId(server),
            purpose: KeyPurpose::Sealing,
            epoch: Epoch(0),
            attempt: 0,
            serial,
            key: PublicKey([serial as u8 + 1; 32]),
        };
        let sealing = KeyCertificate::issue(&cluster, identity, statement);
        (voter.key().clone(), Operation::AnnounceKeys { voting: *voter.certificate(), sealing })
    };
    let (voting, operation) = announce(2, &identities[2], 0, &mut rng);
    assert_eq!(world.done(&voting, operation.clone()), Done::Announced);
    assert_eq!(layout::server_keys(world.state.map(), ServerId(2)).unwrap().sealing.statement.key.0[0], 1);
    // Signed by somebody else, or certified by somebody else.
    assert_eq!(world.ask(&key(9), operation.clone()), None);
    assert_eq!(world.refused(&admin(), operation), Refusal::Invalid(Invalid::Certificate));
    let (forged, operation) = announce(2, &identities[1], 1, &mut rng);
    assert_eq!(world.ask(&forged, operation), None);
    // New keys, but not as often as a liar likes.
    let (voting, operation) = announce(2, &identities[2], 1, &mut rng);
    assert_eq!(world.ask(&voting, operation.clone()), None);
    world.now = world.now.plus_ms(crate::limits::ANNOUNCE_INTERVAL_MS);
    assert_eq!(world.done(&voting, operation), Done::Announced);
}

#[test]
fn a_state_is_restored_from_its_entries_and_damage_is_noticed() {
    let mut world = World::new();
    world.done(&admin(), register("a", entry(1, None)));
    let (checkpoint, snapshot) = world.state.seal();
    let leaves: Vec<_> = snapshot.iter_from(&[]).map(|(k, v)| (k.to_vec(), v.to_vec())).collect();
    let manifest = Arc::new(sample(4).0);
    let restore = |leaves| {
        State::restore(Arc::clone(&manifest), checkpoint, Map::from_entries(manifest.cluster_id(), leaves))
    };
    let mut restored = restore(leaves.clone()).unwrap();
    // The same future: replies expire at the same time.
    world.now = world.now.plus_ms(10_001);
    let batch = CheckedBatch::new(&world.cluster, world.now, vec![]);
    assert_eq!(restored.execute(&batch).checkpoint, world.state.execute(&batch).checkpoint);

    for at in 0..leaves.len() {
        let mut damaged = leaves.clone();
        *damaged[at].1.last_mut().unwrap_or(&mut 0) ^= 1;
        if damaged != leaves {
            assert!(restore(damaged).is_err());
        }
        let mut missing = leaves.clone();
        missing.remove(at);
        assert!(restore(missing).is_err());
    }
}
