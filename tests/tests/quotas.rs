//! What an owner leaves in every server's memory has an end, and nobody else feels it.

use kds_client::keystore::{self, SecretKind};
use kds_client::{ClientError, ExitStatus};
use kds_tests::{Cluster, entry, status, stderr, stdout};
use quorum::ServerId;
use quorum::record::{Entry, Name};
use quorum::request::{Deposit, Operation, Refusal};
use quorum::signing::SigningKey;
use quorum::state::SpaceAlarm;
use serde_json::Value;
use std::process::Command;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}
/// A record with 30 KB of notes.
fn bulky(byte: u8, owner: &SigningKey) -> Entry {
    let metadata = (0..30).map(|note| (format!("note-{note}"), "x".repeat(1_000))).collect();
    Entry { metadata, ..entry(byte, Some(owner)) }
}
/// Memory of a server that is its own, in bytes.
fn memory(cluster: &Cluster, server: usize) -> u64 {
    let status =
        std::fs::read_to_string(format!("/proc/{}/status", cluster.process(server).unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() * 1_024
}
/// Makes a signing key's file; gives its path and the key.
fn keygen(folder: &std::path::Path, text: &str) -> (String, SigningKey) {
    let path = folder.join(text);
    let made = Command::new(kds_tests::program("kds-client")).args(["keygen", "--out"]).arg(&path).output();
    assert!(made.unwrap().status.success());
    let key = keystore::read_signing_key(&path, SecretKind::SigningKey, None).unwrap();
    (path.to_str().unwrap().to_owned(), key)
}
fn json(output: &std::process::Output) -> Value {
    assert_eq!(status(output), 0, "{}", stderr(output));
    serde_json::from_str(&stdout(output)).unwrap()
}
fn refusal(error: &ClientError) -> &Refusal {
    match error {
        ClientError::Refused(refused) => refused.refusal(),
        other => panic!("{other}"),
    }
}

/// The attack as it was found: the owner of one name rotates it 300 times with 30 KB of metadata, which took 34 MB in
/// every server for ever; and then with what her quota leaves, over and over.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_cannot_fill_the_servers_memory() {
    let mut cluster = Cluster::new(4, &["--epoch-seconds=5"]).unwrap();
    for server in 0..4 {
        cluster.limit_requests(server, 0).unwrap();
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    let keys = tempfile::tempdir().unwrap();
    let (owner_file, owner) = keygen(keys.path(), "owner");
    let (_, other) = keygen(keys.path(), "other");
    let (client, admin) = (cluster.client.clone(), cluster.administrator.clone());
    client.register(&admin, name("mallory"), bulky(1, &owner)).await.unwrap();
    client.register(&admin, name("bob"), entry(1, Some(&other))).await.unwrap();

    let (mut version, mut refused) = (1, 0);
    for attempt in 0..300_u32 {
        let written =
            client.rotate(&owner, name("mallory"), version, bulky(1 + (attempt % 100) as u8, &owner)).await;
        match written {
            Ok(_) => version += 1,
            Err(error) => {
                assert!(matches!(refusal(&error), Refusal::OverQuota { .. }), "{error}");
                assert_eq!(error.exit_status(), ExitStatus::Refused);
                refused += 1;
            }
        }
    }
    assert!(refused > 10 && version > 200, "{refused} of 300 were refused, {version} versions");
    // What she goes on to ask for leaves nothing: nothing of the state, that is. The log of the last
    // requests has its own bound, 64 MB, which these do not fill.
    let space = client.space(&owner.public()).await.unwrap();
    let (_, account) = space.1.unwrap();
    assert!(account.used <= space.0.each);
    let before = memory(&cluster, 1);
    for _ in 0..100 {
        let refused = client.rotate(&owner, name("mallory"), version, bulky(9, &owner)).await.unwrap_err();
        assert!(matches!(refusal(&refused), Refusal::OverQuota { .. }));
    }
    let now = client.space(&owner.public()).await.unwrap();
    assert_eq!((now.0.used, now.1.unwrap().1), (space.0.used, account));
    let grown = memory(&cluster, 1).saturating_sub(before);
    assert!(grown < 24 << 20, "100 refused requests took {grown} bytes");

    // The command line says what it is and what to do; the HTTP answer has its type.
    let public = format!("{owner_file}.pub");
    let notes: Vec<_> =
        bulky(1, &owner).metadata.iter().map(|(key, text)| format!("--meta={key}={text}")).collect();
    let rotate = ["--key", &owner_file, "rotate", "mallory", "--public-key", &public];
    let args: Vec<&str> = rotate.into_iter().chain(notes.iter().map(String::as_str)).collect();
    let told = cluster.cli(&args);
    assert_eq!(status(&told), 6);
    assert!(
        stderr(&told).contains("over quota: this takes") && stderr(&told).contains("of 8.0 MiB"),
        "{}",
        stderr(&told)
    );
    let request = client.sign(
        &owner,
        1,
        Operation::Rotate { name: name("mallory"), from_version: version, entry: bulky(1, &owner) },
    );
    let body = serde_json::to_vec(&request).unwrap();
    let (code, body) = client.link(ServerId(2)).unwrap().send("POST", "/v1/requests", body).await.unwrap();
    let problem: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((code, &problem["type"]), (403, &Value::from("urn:kds:over-quota")));
    assert!(problem["receipt"].is_object(), "a refusal is proved");
    let shown = json(&cluster.cli(&["--json", "--key", &owner_file, "space"]));
    assert_eq!(shown["owner"]["used"].as_u64(), Some(account.used));
    assert_eq!(shown["owner"]["names"].as_u64(), Some(1));

    // Nobody else feels it, and what leaked can be revoked.
    client.register(&admin, name("carol"), bulky(1, &other)).await.unwrap();
    client.rotate(&other, name("bob"), 1, bulky(2, &other)).await.unwrap();
    client.put_secret(&other, &name("bobs"), b"kept", &[], false, false).await.unwrap();
    client.revoke(&owner, name("mallory"), version, "leaked".into()).await.unwrap();

    // A server that lost everything, and is shown the state, counts alike and refuses alike.
    let _ = client.space(&owner.public()).await.unwrap();
    cluster.kill(3);
    for file in ["kds.db", "kds.db-wal", "kds.db-shm"] {
        let _ = std::fs::remove_file(cluster.server_dir(3).join(file));
    }
    cluster.run(3).unwrap();
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();
    let counts: Vec<_> = {
        let mut counts = Vec::new();
        for server in 0..4 {
            counts.push(client.server_status(ServerId(server)).await.unwrap().space.unwrap().used);
        }
        counts
    };
    assert!(counts.iter().all(|used| *used == counts[0]), "{counts:?}");
    cluster.kill(0);
    client.rotate(&other, name("carol"), 1, entry(3, Some(&other))).await.unwrap();
    let full = client.put_secret(&owner, &name("more"), &[1; 60_000], &[], false, false).await.unwrap_err();
    assert!(matches!(refusal(&full), Refusal::OverQuota { .. }), "{full}");
}

/// The whole state fills up: administrators see it coming, have the last of it, and a way out.
#[tokio::test(flavor = "multi_thread")]
async fn little_space_is_an_alarm_before_it_is_none() {
    let cluster = Cluster::start_unlimited(4).await.unwrap();
    let keys = tempfile::tempdir().unwrap();
    let (owner_file, owner) = keygen(keys.path(), "owner");
    let (client, admin) = (cluster.client.clone(), cluster.administrator.clone());
    client.register(&admin, name("alice"), entry(1, Some(&owner))).await.unwrap();
    let quiet = json(&cluster.cli(&["--json", "status"]));
    assert_eq!(quiet["space"]["alarm"], Value::Null);
    assert_eq!(stdout(&cluster.cli(&["admin", "set-quota", "--total", "1MiB"])), "decided\n");
    assert_eq!(status(&cluster.cli(&["admin", "set-quota", "--total", "1MiB"])), 7, "that is so already");
    assert_eq!(status(&cluster.cli(&["admin", "set-quota", "--total", "1MB"])), 2);
    assert_eq!(status(&cluster.cli(&["admin", "set-quota"])), 2);

    let (mut version, mut alarms) = (1, vec![]);
    let full = loop {
        match client.rotate(&owner, name("alice"), version, bulky(1, &owner)).await {
            Ok(_) => version += 1,
            Err(error) => break error,
        }
        let (space, _) = client.space(&owner.public()).await.unwrap();
        alarms.extend(space.alarm());
    };
    assert!(matches!(refusal(&full), Refusal::NoSpace { .. }), "{full}");
    assert!(alarms.contains(&SpaceAlarm::LowSpace), "{alarms:?}");
    assert_eq!(full.exit_status(), ExitStatus::Refused);
    // What is left is for administrators.
    let mut registered = 0;
    while client.register(&admin, name(&format!("n-{registered}")), bulky(1, &owner)).await.is_ok() {
        registered += 1;
    }
    assert!(registered > 0);
    // They see it wherever they look.
    cluster.level().await.unwrap();
    let told = json(&cluster.cli(&["--json", "status"]));
    assert_eq!(
        (&told["space"]["alarm"], &told["servers"][2]["space"]["alarm"]),
        (&"no-space".into(), &"no-space".into())
    );
    let told = stdout(&cluster.cli(&["status"]));
    assert!(told.contains("ALARM NO SPACE: ") && told.contains("of 1.0 MiB are used"), "{told}");
    let (_, metrics) = client.link(ServerId(1)).unwrap().send("GET", "/metrics", vec![]).await.unwrap();
    let metrics = String::from_utf8(metrics).unwrap();
    assert!(
        metrics.contains("kds_space_alarm 2") && metrics.contains("kds_space_quota_bytes 1048576"),
        "{metrics}"
    );
    let logged = cluster.log(1);
    let lines = logged.lines().filter(|line| line.contains("SPACE: ")).count();
    assert!((1..4).contains(&lines), "{lines} lines in a minute or two:\n{logged}");
    // Space is no reason to take a server out of service.
    let (ready, _) = client.link(ServerId(1)).unwrap().send("GET", "/readyz", vec![]).await.unwrap();
    assert_eq!(ready, 200);
    // Whoever lost a key can still revoke it.
    let revoke = ["--key", &owner_file, "revoke", "alice", "--reason", "lost"];
    let revoked = cluster.cli(&revoke);
    assert_eq!(status(&revoked), 0, "{}", stderr(&revoked));
    assert_eq!(status(&cluster.cli(&["admin", "set-quota", "--total", "4MiB"])), 0);
    client.register(&admin, name("later"), bulky(1, &owner)).await.unwrap();
    let owners = ["admin", "set-quota", "--of", &format!("{owner_file}.pub"), "64KiB"];
    assert_eq!(status(&cluster.cli(&owners)), 0);
    let small = client.rotate(&owner, name("later"), 1, bulky(2, &owner)).await.unwrap_err();
    assert!(matches!(refusal(&small), Refusal::OverQuota { quota: 65_536, .. }), "{small}");
    assert_eq!(
        status(&cluster.cli(&["admin", "set-quota", "--of", &format!("{owner_file}.pub"), "default"])),
        0
    );
    client.rotate(&owner, name("later"), 1, bulky(2, &owner)).await.unwrap();
}

/// Somebody deposits what another is to own: it fills the depositor's quota, is listed as hers, and who does not want
/// such gifts says so.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_refuses_what_others_deposit_as_hers() {
    let cluster = Cluster::start(4).await.unwrap();
    let keys = tempfile::tempdir().unwrap();
    let (victim_file, victim) = keygen(keys.path(), "victim");
    let (_, mallory) = keygen(keys.path(), "mallory");
    let (client, admin) = (cluster.client.clone(), cluster.administrator.clone());
    for (text, owner) in [("victim", &victim), ("mallory", &mallory)] {
        client.register(&admin, name(text), entry(1, Some(owner))).await.unwrap();
    }
    let gift = |text: &str, epoch| {
        let deposit = Deposit {
            name: name(text),
            owner: victim.public(),
            readers: vec![],
            passphrase: None,
            replaces: None,
            epoch,
            ciphertext: quorum::Blob(vec![1; 20_000]),
            commitment: quorum::Hash([2; 32]),
            shares: vec![quorum::Blob(vec![3; 80]); 4],
        };
        client.sign(&mallory, rand::random(), Operation::Deposit(deposit))
    };
    let given = async |text: &str| {
        loop {
            let epoch = client.server_status(ServerId(0)).await.unwrap().epoch;
            match client.submit_signed(&gift(text, epoch)).await {
                Err(ClientError::Refused(refused))
                    if matches!(refused.refusal(), Refusal::EpochPassed { .. }) => {}
                other => return other.map(|_| ()),
            }
        }
    };
    let listed = || json(&cluster.cli(&["--json", "--key", &victim_file, "secret", "list"]));
    given("stolen-goods").await.unwrap();
    let secrets = listed();
    assert_eq!(secrets[0]["depositor"], Value::from(mallory.public().to_string()));
    assert_eq!(secrets[0]["account"], Value::from(mallory.public().to_string()), "she pays for it herself");
    let show =
        |what: &str| json(&cluster.cli(&["--json", "--key", &victim_file, "gifts", what]))["refused"].clone();
    assert_eq!([show("show"), show("refuse"), show("show")], [false, true, true].map(Value::from));
    assert_eq!(status(&cluster.cli(&["--key", &victim_file, "secret", "delete", "stolen-goods"])), 0);
    let refused = given("stolen-goods").await.unwrap_err();
    assert_eq!((refusal(&refused), refused.exit_status()), (&Refusal::GiftRefused, ExitStatus::Refused));
    let handed_over = client.rotate(&mallory, name("mallory"), 1, entry(2, Some(&victim))).await.unwrap_err();
    assert_eq!(refusal(&handed_over), &Refusal::GiftRefused);
    assert_eq!(listed().as_array().unwrap().len(), 0);
    // Her own deposits are not meant.
    client.put_secret(&victim, &name("mine"), b"x", &[], false, false).await.unwrap();
    assert_eq!(show("accept"), false);
    given("stolen-goods").await.unwrap();
}
