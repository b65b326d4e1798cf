//! What the client promises whatever servers do: it tells nothing older than it has told, waits when it is asked
//! to, nobody waits for another's deadline, nothing goes on behind a caller's back, and a write whose answer did not
//! come is not one that failed.

use kds_client::{Client, ClientError, ExitStatus, LookupOptions, Options, Ticket, WatchEvent, WhatCame};
use kds_tests::liar::{Liar, Lie};
use kds_tests::{Cluster, entry, status, stderr, stdout};
use quorum::ServerId;
use quorum::record::{Name, Record, Status};
use quorum::request::{Done, Operation, SignedRequest};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn is_revoked(record: &Record) -> bool {
    matches!(record.status, Status::Revoked { .. })
}

/// After a watch, a listing, a history or a lookup told of a revocation, nothing of the same client says anything
/// older, from memory least of all.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_told_is_not_taken_back() {
    let cluster = Cluster::start(4).await.unwrap();
    // Long enough that nothing in memory grows too old meanwhile.
    let options = Options { max_age: Duration::from_secs(120), ..Options::default() };
    for (turn, how) in ["watch", "list", "history", "lookup", "many"].into_iter().cycle().take(10).enumerate()
    {
        let client = Client::new(Arc::clone(&cluster.manifest), options.clone()).unwrap();
        let who = name(&format!("{how}-{turn}"));
        cluster.register(who.as_str(), 1).await.unwrap();
        let mut watch = client.watch(&who, 0);
        assert!(matches!(watch.next().await.unwrap(), WatchEvent::Version(_)));
        let before = client.lookup_cached(&who).await.unwrap().unwrap();
        assert!(!is_revoked(&before));
        cluster.client.revoke(&cluster.administrator, who.clone(), 1, "stolen".into()).await.unwrap();
        let told = match how {
            "watch" => match watch.next().await.unwrap() {
                WatchEvent::Version(record) => *record,
                WatchEvent::Absent => panic!("it exists"),
            },
            "list" => client.list(who.as_str()).await.unwrap().remove(0),
            "history" => client.history(&who).await.unwrap().pop().unwrap(),
            "lookup" => client.lookup(&who, &LookupOptions::default()).await.unwrap().record.unwrap(),
            _ => {
                let mut found =
                    client.lookup_many(std::slice::from_ref(&who), &LookupOptions::default()).await;
                found.remove(0).unwrap().record.unwrap()
            }
        };
        assert!(is_revoked(&told), "{how}: a write that was complete is told");
        let after = client.lookup_cached(&who).await.unwrap().unwrap();
        assert!(is_revoked(&after), "{how} told of the revocation, and memory did not");
        let checked = client.verify_signature(&who, b"x", b"y").await.unwrap_err();
        assert!(checked.to_string().contains("is revoked: stolen"), "{how}: {checked}");
    }
}

/// A server that answers readers from an old state, certified and fresh enough as that is, gets nothing past a
/// client that has told more: neither by name nor, where it forgot which version it was, at all.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_older_than_what_was_told_is_read_either() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    cluster.hide_from_clients(3).unwrap();
    for server in 0..4 {
        cluster.run(server).unwrap();
    }
    // What it answers to full lookups the first time it answers for ever.
    let first = Arc::new(Mutex::new(None));
    let kept = Arc::clone(&first);
    let lie: Arc<Lie> = Arc::new(move |path, _, document| {
        let full = document["records"].as_array().is_some_and(|records| records.len() == 1);
        if path != "/v1/records/lookup" || !full {
            return;
        }
        let mut kept = kept.lock().unwrap();
        match &*kept {
            Some(old) => *document = Value::clone(old),
            None => *kept = document["certificate"].is_object().then(|| document.clone()),
        }
    });
    let folder = cluster.server_dir(3);
    let _liar = Liar::start(&cluster.manifest, ServerId(3), &folder, ServerId(0), lie).await.unwrap();
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.level().await.unwrap();
    let options = Options { max_age: Duration::from_secs(120), ..Options::default() };
    let client = Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let any = LookupOptions { consistency: kds_client::Consistency::Any, ..LookupOptions::default() };
    // The liar is asked at some time, and keeps what it said.
    while first.lock().unwrap().is_none() {
        client.lookup(&name("alice"), &any).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    cluster.client.revoke(&cluster.administrator, name("alice"), 1, "stolen".into()).await.unwrap();
    cluster.level().await.unwrap();
    assert!(is_revoked(&client.list("alice").await.unwrap()[0]));
    for _ in 0..40 {
        let found = client.lookup(&name("alice"), &any).await.unwrap();
        assert!(is_revoked(&found.record.unwrap()), "told by the liar, after the truth");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// More names than a client has places for, and than a server takes at once: they are looked up all the same, page
/// by page, and no server is blamed for it.
#[tokio::test(flavor = "multi_thread")]
async fn as_many_names_as_anybody_likes_are_looked_up() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("name-7", 1).await.unwrap();
    let names: Vec<_> = (0..20_000).map(|i| name(&format!("name-{i}"))).collect();
    let client = cluster.fresh_client().with_timeout(Duration::from_secs(240));
    let began = Instant::now();
    let found = client.lookup_many(&names, &LookupOptions::default()).await;
    println!("{} lookups took {:?}", names.len(), began.elapsed());
    let mut blamed = 0;
    for (i, found) in found.into_iter().enumerate() {
        let found = found.unwrap_or_else(|error| panic!("name {i}: {error}"));
        assert_eq!(found.record.is_some(), i == 7);
        blamed += found.access.rejected.len();
    }
    assert_eq!(blamed, 0);
}

/// A client that asks for more than servers allow is slowed down, and not refused: its lookups, its listings, and
/// its writes, many at once.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_asked_to_wait_waits() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    for server in 0..4 {
        cluster.limit_requests(server, 100).unwrap();
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    let lines: String = (0..200)
        .map(|i| {
            let key = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj";
            json!({ "name": format!("imported/{i}"), "public_key": key }).to_string() + "\n"
        })
        .collect();
    let began = Instant::now();
    let imported = cluster.cli_with(&["--json", "import", "-"], &[], &lines);
    println!("the import took {:?}", began.elapsed());
    assert_eq!(status(&imported), 0, "{}", stderr(&imported));
    assert_eq!(serde_json::from_str::<Value>(&stdout(&imported)).unwrap()["imported"], 200);

    // One after the other, each a request of its own: more than are allowed in a second.
    let client = cluster.fresh_client();
    let mut reading = JoinSet::new();
    for i in 0..300 {
        let client = client.clone();
        reading.spawn(async move {
            let options = LookupOptions { version: Some(1), ..LookupOptions::default() };
            client.lookup(&name(&format!("imported/{}", i % 200)), &options).await
        });
    }
    while let Some(read) = reading.join_next().await {
        let found = read.unwrap().unwrap_or_else(|error| panic!("{error}"));
        assert!(found.record.is_some() && found.access.rejected.is_empty());
    }
    for _ in 0..60 {
        assert_eq!(client.list("imported/").await.unwrap_or_else(|error| panic!("{error}")).len(), 200);
    }
}

/// Where the time does not suffice it is said what it was spent on.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_that_is_too_long_is_named() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    for server in 0..4 {
        cluster.limit_requests(server, 5).unwrap();
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    let client = cluster.fresh_client().with_timeout(Duration::from_millis(1_500));
    let mut writing = JoinSet::new();
    for i in 0..40 {
        let (client, key) = (client.clone(), cluster.administrator.clone());
        writing.spawn(async move { client.register(&key, name(&format!("many-{i}")), entry(1, None)).await });
    }
    let mut named = 0;
    while let Some(written) = writing.join_next().await {
        let Err(error) = written.unwrap() else { continue };
        assert_eq!(error.exit_status(), ExitStatus::Unavailable, "{error}");
        let ClientError::OutcomeUnknown { why, .. } = &error else { panic!("{error:?}") };
        let ClientError::Unavailable { silent, waits, rejected, .. } = &**why else { panic!("{why:?}") };
        assert!(rejected.is_empty(), "{error}");
        // Others had its turn, and not the time to be executed.
        if silent.is_empty() {
            assert!(!waits.is_empty() && error.to_string().contains("asks to wait"), "{error}");
            assert!(error.to_string().contains("too many requests"), "{error}");
            named += 1;
        }
    }
    assert!(named > 10, "{named} of 40 writes did not get their turn");
}

/// A server that says that it is not ready has neither refused nor been silent, and whatever it passed on executes
/// once.
#[tokio::test(flavor = "multi_thread")]
async fn not_ready_is_no_refusal() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    for server in 2..4 {
        cluster.hide_from_clients(server).unwrap();
    }
    for server in 0..4 {
        cluster.run(server).unwrap();
    }
    // Two gateways pass requests on, and say that they did not.
    let mut liars = Vec::new();
    for (server, says) in [(2, 503), (3, 429)] {
        let lie: Arc<Lie> = Arc::new(move |path, status, document| {
            if path == "/v1/requests" {
                *status = says;
                let (kind, title) = match says {
                    503 => ("urn:kds:not-ready", "not ready"),
                    _ => ("urn:kds:too-many", "too many requests"),
                };
                *document = json!({ "type": kind, "title": title, "status": says, "detail": "later" });
            }
        });
        let (at, folder) = (ServerId(server as u8), cluster.server_dir(server));
        liars.push(Liar::start(&cluster.manifest, at, &folder, ServerId(0), lie).await.unwrap());
    }
    cluster.ready().await.unwrap();
    for i in 0..20 {
        let client = cluster.fresh_client();
        let written = client.register(&cluster.administrator, name(&format!("n-{i}")), entry(1, None)).await;
        assert!(matches!(written.unwrap().done, Done::Record { version: 1 }));
    }
}

/// Connections of this process to a server's port for clients.
fn connections_to(cluster: &Cluster, server: usize) -> usize {
    let port: u16 = cluster.manifest.servers[server].url.rsplit(':').next().unwrap().parse().unwrap();
    let ours: Vec<_> = std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok()?.to_str().map(str::to_owned))
        .collect();
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let to_port = table.lines().skip(1).filter(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let remote = fields[2].rsplit(':').next().unwrap();
        u16::from_str_radix(remote, 16) == Ok(port) && ours.contains(&format!("socket:[{}]", fields[9]))
    });
    to_port.count()
}

async fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    println!("{what}: after {:?}", began.elapsed());
}

/// Everyone's deadline is her own: ten who ask for a name that cannot be read wait as long as one does, and one with
/// more patience gets her answer when there is one.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_the_deadline_of_another() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    // Without these there are not enough.
    (2..4).for_each(|server| cluster.signal(server, "STOP").unwrap());
    let client = cluster.fresh_client().with_timeout(Duration::from_secs(1));
    let mut waiting = JoinSet::new();
    for _ in 0..10 {
        let client = client.clone();
        waiting.spawn(async move {
            let began = Instant::now();
            (client.lookup_cached(&name("alice")).await, began.elapsed())
        });
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let patient = client.with_timeout(Duration::from_secs(60));
    let patient = tokio::spawn(async move { patient.lookup_cached(&name("alice")).await });
    while let Some(done) = waiting.join_next().await {
        let (answer, took) = done.unwrap();
        assert_eq!(answer.unwrap_err().exit_status(), ExitStatus::Unavailable);
        assert!(took < Duration::from_millis(1_800), "with a second's patience it took {took:?}");
    }
    (2..4).for_each(|server| cluster.signal(server, "CONT").unwrap());
    assert_eq!(patient.await.unwrap().unwrap().unwrap().version, 1);
}

/// Calls that one hung server did not answer leave nothing behind: no task, no connection.
#[tokio::test(flavor = "multi_thread")]
async fn a_hung_server_leaves_nothing_behind() {
    const HUNG: usize = 3;
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.register("alice/2", 1).await.unwrap();
    cluster.level().await.unwrap();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    cluster.signal(HUNG, "STOP").unwrap();
    // Another client's connections, which it keeps for a while.
    let (before, others) = (tasks(), connections_to(&cluster, HUNG));
    let client = cluster.fresh_client();
    let mut calls = JoinSet::new();
    for i in 0..80 {
        let client = client.clone();
        calls.spawn(async move {
            match i % 4 {
                0 => client.lookup(&name("alice"), &LookupOptions::default()).await.map(drop),
                1 => client.list("alice").await.map(drop),
                2 => client.history(&name("alice")).await.map(drop),
                _ => {
                    let options = LookupOptions { version: Some(1), ..LookupOptions::default() };
                    client.lookup(&name("alice"), &options).await.map(drop)
                }
            }
        });
    }
    while let Some(done) = calls.join_next().await {
        done.unwrap().unwrap_or_else(|error| panic!("one silent server of four: {error}"));
    }
    println!(
        "{} connections to it, {} tasks more",
        connections_to(&cluster, HUNG),
        tasks().saturating_sub(before)
    );
    soon("no connection to it", || connections_to(&cluster, HUNG) <= others).await;
    // What is left now serves connections to the others, for further calls.
    drop(client);
    soon("no task", || tasks() <= before).await;
}

/// A server that hangs is noticed once, by whoever meets it first, and asked last by reads and writes from then on.
#[tokio::test(flavor = "multi_thread")]
async fn writes_do_not_draw_a_hung_server_again_and_again() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.signal(3, "STOP").unwrap();
    let client = cluster.fresh_client();
    let (mut slow, began) = (0, Instant::now());
    for i in 0..24 {
        let began = Instant::now();
        client.register(&cluster.administrator, name(&format!("w-{i}")), entry(1, None)).await.unwrap();
        slow += usize::from(began.elapsed() >= Duration::from_millis(450));
    }
    println!("24 writes took {:?}, {slow} of them long", began.elapsed());
    assert!(slow <= 4, "{slow} of 24 writes waited for the hung server");
}

/// A write whose answer does not come says that it may still execute; it can be asked what came of it; and sent
/// again it executes once.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_is_not_answered_can_be_asked_for_and_executes_once() {
    let cluster = Cluster::start(4).await.unwrap();
    std::fs::write(
        cluster.dir().join("key"),
        "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj",
    )
    .unwrap();
    // Two of four do not order anything.
    (2..4).for_each(|server| cluster.signal(server, "STOP").unwrap());
    // Long enough that one of the others is given the request.
    let client = cluster.fresh_client().with_timeout(Duration::from_secs(4));
    let began = Instant::now();
    let error = client.register(&cluster.administrator, name("alice"), entry(1, None)).await.unwrap_err();
    assert!(began.elapsed() < Duration::from_millis(5_500), "{:?}", began.elapsed());
    let ClientError::OutcomeUnknown { request, .. } = &error else { panic!("{error}") };
    let ticket = Ticket::of(&client.manifest().cluster_id(), request);
    let from_shell = cluster.cli(&["--timeout", "4s", "register", "bob", "--public-key", "key"]);
    assert_eq!(status(&from_shell), 5, "{}", stderr(&from_shell));
    let text = stderr(&from_shell);
    assert!(text.contains("not known whether the request was executed"), "{text}");
    let bobs =
        text.split_whitespace().map(|word| word.trim_matches('`')).find(|word| word.starts_with("kdsreq1"));
    let bobs = bobs.expect("its name is said");
    // Nobody can say while they are away.
    assert_eq!(status(&cluster.cli(&["--timeout", "1s", "outcome", bobs])), 5);
    assert!(client.with_timeout(Duration::from_secs(1)).outcome(&ticket).await.is_err());
    (2..4).for_each(|server| cluster.signal(server, "CONT").unwrap());

    let asked = cluster.cli(&["--timeout", "30s", "outcome", bobs]);
    assert_eq!(status(&asked), 0, "{}", stderr(&asked));
    assert!(stdout(&asked).starts_with("executed: version 1, sequence "), "{}", stdout(&asked));
    // Sent again, as often as one likes.
    let client = cluster.fresh_client();
    for _ in 0..3 {
        let written = client.retry(request).await.unwrap();
        assert!(matches!(written.done, Done::Record { version: 1 }), "{:?}", written.done);
    }
    assert_eq!(client.history(&name("alice")).await.unwrap().len(), 1);
    match client.outcome(&ticket).await.unwrap() {
        WhatCame::Executed(executed) => {
            assert_eq!(executed.outcome(), Ok(&Done::Record { version: 1 }));
        }
        other => panic!("{other:?}"),
    }
    // What was executed and refused is told as that.
    let again = client.sign(
        &cluster.administrator,
        5,
        Operation::Register { name: name("alice"), entry: entry(2, None) },
    );
    assert!(matches!(client.submit_signed(&again).await, Err(ClientError::Refused(_))));
    assert_eq!(
        status(&cluster.cli(&["outcome", &Ticket::of(&client.manifest().cluster_id(), &again).to_string()])),
        7
    );
    assert_eq!(status(&cluster.cli(&["outcome", "kdsreq1abc"])), 2, "not a request's name");
}

/// What never executed is proved to be dead once it has expired, and only then; and what is too old is said to be.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_nobody_sent_is_shown_to_be_dead() {
    let cluster = Cluster::start(4).await.unwrap();
    let client = cluster.fresh_client();
    let expiry = kds_client::now().plus_ms(6_000);
    let operation = Operation::Register { name: name("alice"), entry: entry(1, None) };
    let id = cluster.manifest.cluster_id();
    let request = SignedRequest::sign(&id, &cluster.administrator, 99, expiry, operation);
    let ticket = Ticket::of(&client.manifest().cluster_id(), &request);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut seen = Vec::new();
    while seen.last() != Some(&"forgotten") {
        assert!(Instant::now() < deadline, "{seen:?}");
        let came = match client.outcome(&ticket).await.unwrap() {
            WhatCame::Pending => "pending",
            WhatCame::NeverExecuted(_) => "never",
            WhatCame::Forgotten => "forgotten",
            WhatCame::Executed(_) => panic!("nobody sent it"),
        };
        if seen.last() != Some(&came) {
            seen.push(came);
            println!("{came} at {}, expiry {expiry}", kds_client::now());
            if came == "never" {
                assert!(kds_client::now() > expiry);
                let dead = cluster.cli(&["outcome", &ticket.to_string()]);
                assert_eq!(status(&dead), 3, "{}", stderr(&dead));
                assert!(matches!(client.retry(&request).await, Err(ClientError::NotExecuted { .. })));
            }
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(seen, ["pending", "never", "forgotten"]);
    assert!(client.lookup(&name("alice"), &LookupOptions::default()).await.unwrap().record.is_none());
}
