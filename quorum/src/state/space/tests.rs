use super::*;
use crate::codec::decode;
use crate::ids::Epoch;
use crate::manifest::tests::sample;
use crate::record::Status;
use crate::request::{Decision, Operation, Outcome};
use crate::signing::SigningKey;
use crate::state::tests::{
    World, admin, behind_passphrase, deposit, entry as age, guess, key, name, register, release, revoke,
    rotate,
};
use crate::state::{Release, Releases};
use crate::{Hash, Timestamp};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Contents of a name with so many bytes of notes.
fn with_notes(byte: u8, owner: Option<&SigningKey>, bytes: usize) -> crate::record::Entry {
    let notes = (0..bytes.div_ceil(1_000)).map(|i| (format!("note-{i}"), "x".repeat(bytes.min(1_000))));
    crate::record::Entry { metadata: notes.collect(), ..age(byte, owner) }
}
fn set(quota: Quota) -> Operation {
    Operation::Decide(Decision::SetQuota { quota })
}
fn space(world: &World) -> Space {
    layout::space(world.state.map())
}
fn used_by(world: &World, account: &SigningKey) -> u64 {
    layout::account(world.state.map(), &account.public()).used
}
/// Rotates a name with 30 KB of notes until that is refused; gives how often it was done, and the refusal.
fn fill(world: &mut World, text: &str, owner: &SigningKey, from: u64) -> (u64, Refusal) {
    for version in from..from + 300 {
        // As many as are kept of one key at a time would be in the way.
        world.now = world.now.plus_ms(100);
        match world.ask(owner, rotate(text, version, with_notes(1, Some(owner), 30_000))) {
            Some(Outcome::Done(_)) => {}
            Some(Outcome::Refused(refusal)) => return (version, refusal),
            None => panic!("not even executed"),
        }
    }
    panic!("nothing is refused")
}

/// As it was found: 300 versions with 30 KB each, by the owner of one name.
#[test]
fn an_owner_fills_her_quota_and_nobody_elses() {
    let mut world = World::new();
    let (owner, other) = (key(1), key(2));
    world.done(&admin(), register("a", age(1, Some(&owner))));
    world.done(&admin(), register("b", age(1, Some(&other))));
    let (version, refusal) = fill(&mut world, "a", &owner, 1);
    let Refusal::OverQuota { used, quota, needed } = refusal else { panic!("{refusal:?}") };
    assert!(version < 300 && used <= quota && used + needed > quota, "{version}: {refusal:?}");
    assert_eq!((quota, used), (OWNER_QUOTA_BYTES, used_by(&world, &owner)));
    // The others do not feel it, and administrators can do whatever they could.
    world.done(&other, rotate("b", 1, with_notes(1, Some(&other), 30_000)));
    world.done(&admin(), register("c", with_notes(1, Some(&owner), 30_000)));
    world.done(&admin(), rotate("a", version, with_notes(1, Some(&owner), 30_000)));
    assert!(matches!(
        world.refused(&owner, Operation::Deposit(deposit_of(60_000, "s", &owner))),
        Refusal::OverQuota { .. }
    ));
    // Revoking is always possible, and counted.
    world.done(&owner, revoke("a", version + 1));
    assert!(used_by(&world, &owner) > used);
    assert_eq!(space(&world).alarm(), None);
    // Administrators can give her more.
    let more = Quota::Owner { key: owner.public(), bytes: Some(2 * OWNER_QUOTA_BYTES) };
    world.done(&admin(), set(more));
    assert_eq!(world.refused(&admin(), set(more)), Refusal::AlreadySo);
    world.done(&owner, rotate("c", 1, with_notes(1, Some(&owner), 30_000)));
    world.done(&admin(), set(Quota::Owner { key: owner.public(), bytes: None }));
    assert!(matches!(world.refused(&owner, rotate("c", 2, age(2, Some(&owner)))), Refusal::OverQuota { .. }));
    let nobody = set(Quota::Owner { key: key(9).public(), bytes: Some(1) });
    assert_eq!(world.refused(&admin(), nobody), Refusal::Invalid(Invalid::Quota));
}

fn deposit_of(bytes: usize, secret: &str, owner: &SigningKey) -> crate::request::Deposit {
    crate::request::Deposit { ciphertext: Blob(vec![1; bytes]), ..deposit(secret, owner, vec![]) }
}

/// One name, passed along keys that nobody knows, is not space without end; neither are readers.
#[test]
fn who_hands_a_name_on_hands_on_her_quota() {
    let mut world = World::new();
    world.done(&admin(), set(Quota::Each { bytes: 100_000 }));
    let [first, second, third, known] = [1, 2, 3, 4].map(key);
    world.done(&admin(), register("a", age(1, Some(&first))));
    world.done(&admin(), register("b", age(1, Some(&known))));
    let (version, _) = fill(&mut world, "a", &first, 1);
    world.done(&first, rotate("a", version, age(1, Some(&second))));
    let big = |owner: &SigningKey| Operation::Deposit(deposit_of(20_000, "s", owner));
    assert!(matches!(world.refused(&second, big(&second)), Refusal::OverQuota { .. }));
    // Nor does an administrator who changes something else give her a new one.
    world.done(&admin(), rotate("a", version + 1, age(2, Some(&second))));
    assert!(matches!(world.refused(&second, big(&second)), Refusal::OverQuota { .. }));
    // An owner has her own, whatever somebody makes her the owner of besides.
    world.done(&second, rotate("a", version + 2, age(1, Some(&known))));
    world.done(&known, big(&known));
    assert!(used_by(&world, &known) > 20_000 && used_by(&world, &second) == 0);
    world.done(&known, Operation::Delete { secret: name("s") });
    assert_eq!(world.ask(&second, big(&second)), None, "nobody knows her any more");
    // An administrator gives a quota with a name.
    world.done(&admin(), register("c", age(1, Some(&third))));
    world.done(&third, big(&third));
    // Anybody can name readers.
    let readers = vec![Reader::Key(key(7).public())];
    let shared = crate::request::Deposit { readers, ..deposit_of(40, "t", &third) };
    world.done(&third, Operation::Deposit(shared));
    world.done(&key(7), release("t"));
    let own = Operation::Deposit(deposit_of(40, "u", &key(7)));
    assert_eq!(world.refused(&key(7), own), Refusal::OwnsNoName);
}

#[test]
fn what_is_deleted_or_replaced_gives_its_space_back_to_who_paid() {
    let mut world = World::new();
    let [owner, other] = [1, 2].map(key);
    world.done(&admin(), register("a", age(1, Some(&owner))));
    world.done(&admin(), register("b", age(1, Some(&other))));
    let before = space(&world).used;
    // A deposit counts against its depositor's quota, whoever is to own it.
    world.done(&owner, Operation::Deposit(deposit_of(20_000, "s", &other)));
    let secret = layout::secret(world.state.map(), &name("s")).unwrap();
    assert_eq!((secret.account, secret.space), (Some(owner.public()), space(&world).used - before));
    assert_eq!((used_by(&world, &owner), used_by(&world, &other)), (secret.space, 0));
    assert!((30_000..40_000).contains(&secret.space), "{}", secret.space);
    // Neither releases nor the end of the epoch change it.
    world.done(&other, release("s"));
    assert_eq!(space(&world).used - before, secret.space);
    // She replaces it: now it is hers.
    let smaller = deposit_of(17_000, "s", &other);
    let smaller = crate::request::Deposit { replaces: Some(secret.index), ..smaller };
    world.done(&other, Operation::Deposit(smaller));
    assert_eq!((used_by(&world, &owner), used_by(&world, &other)), (0, secret.space - 3_000));
    world.done(&other, Operation::Delete { secret: name("s") });
    assert_eq!((used_by(&world, &other), space(&world).used), (0, before));
    assert!(world.state.map().get(&layout::account_key(&other.public())).is_none());
    // What makes nothing grow is done however little there may be.
    world.done(&other, Operation::Deposit(deposit_of(20_000, "s", &other)));
    let index = layout::secret(world.state.map(), &name("s")).unwrap().index;
    world.done(&admin(), set(Quota::Owner { key: other.public(), bytes: Some(0) }));
    let grown = |bytes| crate::request::Deposit { replaces: Some(index), ..deposit_of(bytes, "s", &other) };
    assert!(matches!(
        world.refused(&other, Operation::Deposit(grown(20_100))),
        Refusal::OverQuota { quota: 0, .. }
    ));
    world.done(&other, Operation::Deposit(grown(20_000)));
}

#[test]
fn the_last_space_is_for_administrators_and_for_revoking() {
    let mut world = World::new();
    let owner = key(1);
    let total = 200_000;
    world.done(&admin(), set(Quota::Total { bytes: total }));
    world.done(&admin(), register("a", age(1, Some(&owner))));
    let mut alarms = vec![];
    let refusal = (1..300).find_map(|version| {
        let refusal = match world.ask(&owner, rotate("a", version, with_notes(1, Some(&owner), 1_000))) {
            Some(Outcome::Refused(refusal)) => Some((version, refusal)),
            _ => None,
        };
        let at = space(&world).used * 100 / total;
        alarms.push((at, space(&world).alarm()));
        refusal
    });
    let (version, Refusal::NoSpace { used, quota, needed }) = refusal.unwrap() else { panic!() };
    assert!(quota == total * 95 / 100 && used <= quota && used + needed > quota);
    let due = |at| (at >= 80).then_some(SpaceAlarm::LowSpace);
    assert!(alarms.iter().all(|(at, alarm)| *alarm == due(*at)), "{alarms:?}");
    // Administrators go on with what is left for them.
    let mut registered = 0;
    let refusal = loop {
        assert!(registered < 300, "nothing is refused");
        match world.ask(&admin(), register(&format!("n-{registered}"), age(1, None))) {
            Some(Outcome::Refused(refusal)) => break refusal,
            _ => registered += 1,
        }
    };
    assert!(matches!(refusal, Refusal::NoSpace { quota, .. } if quota == total), "{refusal:?}");
    assert!(registered > 5 && space(&world).alarm() == Some(SpaceAlarm::NoSpace));
    // Even then who lost her key revokes it, and administrators find a way out.
    world.done(&owner, revoke("a", version));
    world.done(&admin(), revoke("n-0", 1));
    assert!(space(&world).used > total);
    world.done(&admin(), set(Quota::Total { bytes: 2 * total }));
    assert_eq!(space(&world).alarm(), None);
    world.done(&admin(), register("z", age(1, None)));
}

/// Others can make somebody the owner of what they deposit or hand over; who does not want that can say so.
#[test]
fn an_owner_can_refuse_what_others_would_make_hers() {
    let mut world = World::new();
    let [victim, other, next] = [1, 2, 3].map(key);
    let refuse = |refuse| Operation::RefuseGifts { refuse };
    world.done(&admin(), register("victim", age(1, Some(&victim))));
    world.done(&admin(), register("other", age(1, Some(&other))));
    world.done(&other, Operation::Deposit(deposit("framed", &victim, vec![])));
    assert_eq!(world.done(&victim, refuse(true)), Done::Noted);
    assert_eq!(world.refused(&victim, refuse(true)), Refusal::AlreadySo);
    world.done(&victim, Operation::Delete { secret: name("framed") });
    // Whoever it is: an administrator's deposits are hers too.
    for by in [&other, &admin()] {
        let gift = Operation::Deposit(deposit("framed", &victim, vec![]));
        assert_eq!(world.refused(by, gift), Refusal::GiftRefused);
    }
    assert_eq!(world.refused(&other, rotate("other", 1, age(1, Some(&victim)))), Refusal::GiftRefused);
    // A secret of somebody else's does not become hers by being replaced either.
    let Done::Deposited { index } = world.done(&other, Operation::Deposit(deposit("s", &other, vec![])))
    else {
        panic!()
    };
    let replaced = crate::request::Deposit { replaces: Some(index), ..deposit("s", &victim, vec![]) };
    assert_eq!(world.refused(&other, Operation::Deposit(replaced.clone())), Refusal::GiftRefused);
    // Her own are, and who owns names is for administrators to say.
    world.done(&victim, Operation::Deposit(deposit("own", &victim, vec![])));
    world.done(&admin(), register("second", age(1, Some(&victim))));
    // Her next key wants what she wanted.
    world.done(&victim, rotate("second", 1, age(1, Some(&next))));
    assert!(layout::owner(world.state.map(), &next.public()).unwrap().refuses_gifts);
    world.done(&victim, refuse(false));
    world.done(&other, Operation::Deposit(replaced));
    // It is for owners of names: nobody else leaves anything with it.
    assert_eq!(world.ask(&key(9), refuse(true)), None);
    assert_eq!(world.refused(&admin(), refuse(true)), Refusal::OwnsNoName);
}

#[test]
fn counts_of_bytes_are_told_with_a_unit() {
    use crate::bytes::ByteCount;
    let told =
        [0, 1_023, 1_024, 1_048_575, 1 << 20, OWNER_QUOTA_BYTES, u64::MAX].map(|n| ByteCount(n).to_string());
    assert_eq!(told, ["0 B", "1023 B", "1.0 KiB", "1023.9 KiB", "1.0 MiB", "8.0 MiB", "17179869183.9 GiB"]);
    let refusal =
        Refusal::OverQuota { used: 8_300_000, quota: OWNER_QUOTA_BYTES, needed: 31_000 }.to_string();
    assert!(
        refusal.starts_with("over quota: this takes 30.2 KiB, and this owner uses 7.9 MiB of 8.0 MiB"),
        "{refusal}"
    );
}

#[test]
fn a_whole_record_of_releases_is_no_larger_than_what_is_counted() {
    let release = Release {
        release: u64::MAX,
        to: crate::request::RequestId { client: PublicKey([255; 32]), sequence: u64::MAX },
        ephemeral: PublicKey([255; 32]),
        epoch: Epoch(u64::MAX),
        time: Timestamp(u64::MAX),
        blinded: Some(crate::Element([255; 32])),
    };
    let last = vec![release; RELEASES_KEPT];
    let full = Releases { earlier: u64::MAX, chain: Some(Hash([1; 32])), last, guessed: u32::MAX };
    assert!(encode(&full).len() as u64 <= RELEASES_BYTES);
}

/// What the entries come to: what is counted for them, and what they really take.
fn count(world: &World) -> (u64, u64) {
    let map = world.state.map();
    let mut versions: BTreeMap<(String, u64), Record> = BTreeMap::new();
    for (_, value) in map.iter_prefix(b"n/").chain(map.iter_prefix(b"h/")) {
        let record: Record = decode(value).unwrap();
        versions.insert((record.name.to_string(), record.version), record);
    }
    let before = |record: &Record| versions.get(&(record.name.to_string(), record.version - 1));
    let owners = versions.values().filter(|record| {
        let owner = record.entry.owner;
        owner.is_some() && owner != before(record).and_then(|before| before.entry.owner)
    });
    let secrets = map.iter_prefix(b"x/").map(|(_, value)| decode::<Secret>(value).unwrap().space);
    let counted = versions.values().map(of_version).sum::<u64>()
        + owners.count() as u64 * OWNER_BYTES
        + secrets.sum::<u64>();
    let entries = [&b"n/"[..], b"h/", b"k/", b"o/", b"u/", b"x/", b"y/", b"z/", b"w/"];
    let entries = entries.iter().flat_map(|prefix| map.iter_prefix(prefix));
    (counted, entries.map(|(key, value)| entry(key, value.len())).sum())
}

/// Something that somebody asks for.
fn asked(world: &World, (kind, who, other, what, bytes): (u8, u8, u8, u8, usize)) -> (SigningKey, Operation) {
    let by = if who == 0 { admin() } else { key(who) };
    let (text, owner) = (["a", "b", "c"][usize::from(what % 3)], (other > 0).then(|| key(other)));
    let version = layout::record(world.state.map(), &name(text)).map_or(1, |record| record.version);
    let secret = layout::secret(world.state.map(), &name(text));
    let replaces = secret.as_ref().map(|secret| secret.index);
    let readers = (0..other).map(|reader| Reader::Key(key(50 + reader).public())).collect();
    let of = owner.clone().unwrap_or_else(admin);
    let operation = match kind {
        0 | 1 => register(text, with_notes(1, owner.as_ref(), bytes)),
        2..=4 => rotate(text, version, with_notes(kind, owner.as_ref(), bytes)),
        5 => revoke(text, version),
        6 | 7 => {
            let deposit = crate::request::Deposit { readers, replaces, ..deposit(text, &of, vec![]) };
            Operation::Deposit(crate::request::Deposit { ciphertext: Blob(vec![1; bytes]), ..deposit })
        }
        8 => {
            let behind = behind_passphrase(text, &key(60 + other), readers, 9);
            Operation::Deposit(crate::request::Deposit { owner: of.public(), replaces, ..behind })
        }
        9 => Operation::Delete { secret: name(text) },
        10 => release(text),
        11 => guess(text),
        12 => Operation::RefuseGifts { refuse: bytes % 2 == 0 },
        _ => set(Quota::Owner { key: of.public(), bytes: Some(40_000 + bytes as u64) }),
    };
    (by, operation)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is asked for, in whatever order: what is counted is what a count over the map gives and no less than
    /// what is there; each owner's part is hers; and a server that was only shown the state goes on like the others.
    #[test]
    fn what_is_counted_is_what_is_there(
        requests in prop::collection::vec((0u8..14, 0u8..4, 0u8..4, 0u8..3, 0usize..12_000), 1..120),
        shown_at in 0usize..120,
    ) {
        let mut world = World::new();
        world.done(&admin(), set(Quota::Each { bytes: 60_000 }));
        world.done(&admin(), set(Quota::Total { bytes: 250_000 }));
        let (mut administrators, mut shown) = (0, None);
        for (number, request) in requests.into_iter().enumerate() {
            if number == shown_at {
                let (checkpoint, snapshot) = world.state.seal();
                let leaves = snapshot.iter_from(&[]).map(|(key, value)| (key.to_vec(), value.to_vec()));
                let map = crate::map::Map::from_entries(world.cluster, leaves);
                shown = Some(State::restore(Arc::new(sample(4).0), checkpoint, map).unwrap());
            }
            world.now = world.now.plus_ms(500);
            let (by, operation) = asked(&world, request);
            let of_administrators = |world: &World| {
                let secrets = world.state.map().iter_prefix(b"x/").map(|(_, value)| decode::<Secret>(value).unwrap());
                secrets.filter(|secret| secret.account.is_none()).map(|secret| secret.space).sum::<u64>()
            };
            let (before, secrets_before) = (space(&world).used, of_administrators(&world));
            let is_record = operation.name().is_some();
            let signed = world.sign(&by, operation);
            let executed = world.run(vec![signed.clone()]);
            if let Some(shown) = &mut shown {
                let batch = crate::message::CheckedBatch::new(
                    &world.cluster, world.now, vec![signed.verify(&world.cluster).unwrap()]);
                prop_assert_eq!(shown.execute(&batch).checkpoint, executed.checkpoint);
            }
            if is_record && by.public() == admin().public() {
                administrators += space(&world).used - before;
            }
            administrators = administrators + of_administrators(&world) - secrets_before;
            let (counted, real) = count(&world);
            prop_assert_eq!(space(&world).used, counted);
            prop_assert!(real <= counted, "{} bytes are there, and {} are counted", real, counted);
            let accounts = world.state.map().iter_prefix(b"u/").map(|(_, value)| decode::<Account>(value).unwrap());
            prop_assert_eq!(administrators + accounts.map(|account| account.used).sum::<u64>(), counted);
        }
        let revoked = world.state.map().iter_prefix(b"n/").map(|(_, value)| decode::<Record>(value).unwrap());
        let active = revoked.filter(|record| record.status == Status::Active).collect::<Vec<_>>();
        for record in active {
            world.done(&admin(), revoke(record.name.as_str(), record.version));
        }
    }
}
