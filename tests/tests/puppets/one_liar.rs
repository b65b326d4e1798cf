//! What one server of four can do to clients, as an outside review tried it. Four servers that are puppets of the test: they answer over real HTTPS whatever state each has,
//! certified by keys that the test holds.

use crate::{certify, name, voters};
use kds_client::api::{BulkAnswer, BulkQuestion};
use kds_client::keystore::{self, SecretKind};
use kds_client::{Client, ClientError, LookupOptions, Options};
use kds_tests::liar::{Answering, Liar, Question, Speech};
use kds_tests::{Cluster, entry};
use quorum::PublicKey;
use quorum::answer::{PageAnswer, Proved, Receipt, RecordAnswer, SecretAnswer};
use quorum::bytes::Hash;
use quorum::certificate::{Certificate, Checkpoint, Completion, CompletionTracker, Held};
use quorum::codec::{digest, encode};
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId};
use quorum::map::{Map, Page, Snapshot};
use quorum::record::{Change, Name, Record, Status};
use quorum::request::{Operation, Outcome, Refusal, Reply, RequestId};
use quorum::signing::{SigningKey, Voter};
use quorum::state::{Secret, layout};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a server has: entries, sequence number, and up to where it knows writes to be complete.
#[derive(Clone, Default)]
struct View {
    entries: Vec<(Vec<u8>, Vec<u8>)>,
    sequence: u64,
    complete: u64,
}

struct World {
    cluster: Cluster,
    voters: Vec<Voter>,
    views: Mutex<Vec<View>>,
    began: quorum::Timestamp,
    /// How many milliseconds away honest servers are.
    away: AtomicUsize,
}

/// Says something instead of the honest answer, if it likes.
type Twist = dyn Fn(&Question) -> Option<Answering> + Send + Sync;

impl World {
    fn new() -> Arc<Self> {
        let cluster = Cluster::new(4, &[]).unwrap();
        Arc::new(Self {
            voters: voters(&cluster),
            cluster,
            views: Mutex::new(vec![View::default(); 4]),
            began: kds_client::now(),
            away: AtomicUsize::new(0),
        })
    }
    fn set(&self, servers: &[usize], view: &View) {
        let mut views = self.views.lock().unwrap();
        servers.iter().for_each(|server| views[*server] = view.clone());
    }
    fn state(&self, view: &View) -> (Snapshot, Arc<Certificate>) {
        let id = self.cluster.manifest.cluster_id();
        let snapshot = Map::from_entries(id, view.entries.iter().cloned()).seal();
        let (time, sequence) = (self.began.plus_ms(view.sequence), Sequence(view.sequence));
        let statement = Checkpoint { sequence, root: snapshot.root(), time, epoch: Epoch(0), attempt: 0 };
        let certificate = certify(&self.voters, statement);
        (snapshot, certificate)
    }
    fn completion(&self, view: &View) -> Completion {
        let mut tracker = CompletionTracker::new(self.cluster.manifest.grid());
        let held = Held { sequence: Sequence(view.complete), attempt: AttemptId::default() };
        self.voters.iter().for_each(|voter| assert!(tracker.add(voter.sign(held))));
        tracker.completion().unwrap()
    }
    fn honest(&self, server: usize, question: &Question) -> Speech {
        let view = self.views.lock().unwrap()[server].clone();
        let (snapshot, certificate) = self.state(&view);
        let path = question.path.split('?').next().unwrap();
        let document = match path {
            "/v1/records/lookup" => {
                let question: BulkQuestion = serde_json::from_slice(&question.body).unwrap();
                let look = |name: &Name| Proved::<Record>::look_up(&snapshot, &layout::name_key(name));
                let version = |name| layout::record(&snapshot, name).map_or(0, |record| record.version);
                json!(BulkAnswer {
                    records: question.names.iter().map(look).collect(),
                    versions: question.brief.iter().map(version).collect(),
                    certified: Sequence(view.sequence),
                    certificate: Some(certificate),
                    complete: Sequence(view.complete),
                })
            }
            "/v1/completion" => json!(self.completion(&view)),
            "/v1/administrators" => {
                let (from, most) = quorum::answer::ADMINISTRATORS_PAGE;
                let end = layout::prefix_end(from);
                json!(PageAnswer { range: snapshot.prove_range(&Page::new(from, &end, most)), certificate })
            }
            _ if path.starts_with("/v1/requests/") => {
                let mut parts = path.rsplit('/');
                let sequence = parts.next().unwrap().parse().unwrap();
                let hex = parts.next().unwrap();
                let byte = |i: usize| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap();
                let id = RequestId { client: PublicKey(std::array::from_fn(byte)), sequence };
                json!(Receipt {
                    reply: Proved::look_up(&snapshot, &layout::reply_key(id)),
                    certificate,
                    completion: None,
                })
            }
            _ if path.starts_with("/v1/secrets/") => {
                let name = name(path.strip_prefix("/v1/secrets/").unwrap());
                let secret = Proved::<Secret>::look_up(&snapshot, &layout::secret_key(&name));
                let releases = secret
                    .value
                    .as_ref()
                    .map(|secret| Proved::look_up(&snapshot, &layout::releases_key(secret.index)));
                json!(SecretAnswer { secret, releases, certificate })
            }
            _ if path.starts_with("/v1/records/") && path.ends_with("/watch") => {
                let text = path.strip_prefix("/v1/records/").unwrap().strip_suffix("/watch").unwrap();
                let answer = RecordAnswer::look_up(&snapshot, &certificate, Sequence(0), &name(text), None);
                return Speech::bytes(200, format!("data:{}\n\n", json!({ "answer": answer })));
            }
            // They have too much to do.
            "/v1/requests" => return Speech::document(503, &problem("not-ready", 503)),
            _ => return Speech::document(404, &problem("not-found", 404)),
        };
        Speech::document(200, &document)
    }
    /// Starts all four; `liar` says what the twist says.
    async fn speak(self: &Arc<Self>, liar: usize, twist: Arc<Twist>) -> Vec<Liar> {
        let mut speaking = Vec::new();
        for server in 0..4 {
            let (world, twist) = (Arc::clone(self), Arc::clone(&twist));
            let mouth = move |question: Question| -> Answering {
                if server == liar
                    && let Some(said) = twist(&question)
                {
                    return said;
                }
                let world = Arc::clone(&world);
                Box::pin(async move {
                    tokio::time::sleep(Duration::from_millis(world.away.load(Ordering::SeqCst) as u64)).await;
                    Some(world.honest(server, &question))
                })
            };
            let (manifest, folder) = (&self.cluster.manifest, self.cluster.server_dir(server));
            speaking.push(
                Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap(),
            );
        }
        speaking
    }
}

fn problem(kind: &str, status: u16) -> Value {
    json!({ "type": format!("urn:kds:{kind}"), "title": "t", "status": status, "detail": "d" })
}
fn none() -> Arc<Twist> {
    Arc::new(|_| None)
}
fn say(speech: Speech) -> Option<Answering> {
    Some(Box::pin(async move { Some(speech) }))
}
fn never() -> Option<Answering> {
    Some(Box::pin(async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        None
    }))
}

fn record(text: &str, version: u64, sequence: u64) -> (Vec<u8>, Vec<u8>) {
    let updated = Change { sequence: Sequence(sequence), time: kds_client::now() };
    let record = Record {
        name: name(text),
        version,
        status: Status::Active,
        entry: entry(version as u8, None),
        updated,
    };
    (layout::name_key(&record.name), encode(&record))
}

fn secret(text: &str) -> (Vec<u8>, Vec<u8>) {
    let updated = Change { sequence: Sequence(100), time: kds_client::now() };
    let secret = Secret {
        name: name(text),
        index: 0,
        owner: SigningKey::from_seed(&[9; 32]).public(),
        readers: vec![],
        passphrase: None,
        depositor: RequestId { client: PublicKey([1; 32]), sequence: 1 },
        ciphertext_hash: Hash([0; 32]),
        ciphertext_bytes: 1,
        commitment: Hash([0; 32]),
        deposited: updated,
        account: None,
        space: 0,
    };
    (layout::secret_key(&secret.name), encode(&secret))
}

fn client(world: &World, seconds: u64) -> Client {
    let options = Options {
        timeout: Duration::from_secs(seconds),
        max_age: Duration::from_secs(600),
        ..Options::default()
    };
    Client::new(Arc::clone(&world.cluster.manifest), options).unwrap()
}

/// One server of four answers 429, "come back at once". It costs a retry, and never the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_to_wait_for_no_time_costs_a_retry() {
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    world.away.store(60, Ordering::SeqCst);
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let twist = move |question: &Question| {
        if question.path != "/v1/records/lookup" {
            return None;
        }
        counted.fetch_add(1, Ordering::SeqCst);
        let mut speech = Speech::document(429, &problem("too-many", 429));
        speech.headers.push(("retry-after", "0".into()));
        say(speech)
    };
    let _speaking = world.speak(2, Arc::new(twist)).await;
    let mut slow = Vec::new();
    for _ in 0..10 {
        let (client, began) = (client(&world, 5), Instant::now());
        let found = client.lookup(&name("alice"), &LookupOptions::default()).await;
        slow.push((
            began.elapsed(),
            found.map(|found| found.record.map(|r| r.version)).map_err(|e| e.to_string()),
        ));
    }
    eprintln!("asked {} times: {slow:#?}", asked.load(Ordering::SeqCst));
    assert!(
        slow.iter().all(|(took, found)| *took < Duration::from_secs(3) && found == &Ok(Some(1))),
        "{slow:#?}"
    );
}

/// A secret that was told to exist, and administrators, do not go back in time for the same client. Server 0 alone has
/// a state that q certified and that is not complete (a liar kept its vote from the others).
#[tokio::test(flavor = "multi_thread")]
async fn secrets_and_administrators_never_go_back_in_time() {
    let world = World::new();
    let old = View { entries: vec![record("alice", 1, 5)], sequence: 99, complete: 99 };
    let mut new = View { sequence: 100, ..old.clone() };
    new.entries.push(secret("s"));
    new.entries.push((layout::administrator(&PublicKey([7; 32])), vec![]));
    world.set(&[1, 2, 3], &old);
    world.set(&[0], &new);
    let _speaking = world.speak(9, none()).await;
    let client = client(&world, 5);
    let (mut secrets, mut administrators) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        secrets.push(client.secret(&name("s")).await.unwrap().is_some());
        administrators.push(client.administrators().await.unwrap().len());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    eprintln!("{secrets:?}\n{administrators:?}");
    assert!(secrets.is_sorted(), "told that it exists, and then that it does not: {secrets:?}");
    assert!(administrators.is_sorted(), "{administrators:?}");
}

/// Who was refused with the proof that the name exists at version 7 is not told afterwards that it does not.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_refusal_told_is_remembered() {
    let world = World::new();
    let old = View { entries: vec![record("bob", 1, 5)], sequence: 99, complete: 99 };
    world.set(&[0, 1, 2, 3], &old);
    let admin = world.cluster.administrator.clone();
    let speaker = Arc::clone(&world);
    let twist = move |question: &Question| {
        if question.path != "/v1/requests" {
            return None;
        }
        // Server 0 has a state that q servers certified and that is not complete.
        let signed: quorum::request::SignedRequest = serde_json::from_slice(&question.body).unwrap();
        let id = RequestId { client: signed.request.client, sequence: signed.request.sequence };
        let cluster = speaker.cluster.manifest.cluster_id();
        let reply = Reply {
            request: digest(&cluster, &signed.request),
            sequence: Sequence(100),
            expiry: signed.request.expiry,
            outcome: Outcome::Refused(Refusal::NameTaken { version: 7 }),
        };
        let mut new = View { sequence: 100, ..old.clone() };
        new.entries.push(record("alice", 7, 98));
        new.entries.push((layout::reply_key(id), encode(&reply)));
        let (snapshot, certificate) = speaker.state(&new);
        let reply = Proved::look_up(&snapshot, &layout::reply_key(id));
        say(Speech::document(200, &json!(Receipt { reply, certificate, completion: None })))
    };
    let _speaking = world.speak(0, Arc::new(twist)).await;
    let client = client(&world, 5);
    let refused = client.register(&admin, name("alice"), entry(1, None)).await.unwrap_err();
    assert!(matches!(&refused, ClientError::Refused(_)), "{refused}");
    let found = client.lookup(&name("alice"), &LookupOptions::default()).await;
    let told = found.map(|found| found.record.map(|record| record.version));
    assert!(
        !matches!(told, Ok(None | Some(..7))),
        "first: \"{refused}\"; then the absence is called proved: {told:?}"
    );
}

/// What a server says reaches no terminal as it is, and not without a bound.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_server_says_controls_a_terminal() {
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    let twist = |question: &Question| {
        let evil = format!("\u{1b}]0;owned\u{7}\u{1b}[2J{}", "x".repeat(100_000));
        match question.path.as_str() {
            "/v1/records/lookup" => say(Speech::document(200, &json!({ evil: 1 }))),
            "/v1/status" => say(Speech::document(200, &json!({ "part": evil }))),
            _ => None,
        }
    };
    let _speaking = world.speak(2, Arc::new(twist)).await;
    let mut shown = Vec::new();
    for args in [
        &["lookup", "alice"][..],
        &["lookup", "alice"],
        &["lookup", "alice"],
        &["lookup", "alice"],
        &["status"],
    ] {
        let world = Arc::clone(&world);
        let args: Vec<String> = args.iter().map(|s| (*s).to_owned()).collect();
        let output = tokio::task::spawn_blocking(move || {
            world.cluster.cli(&args.iter().map(String::as_str).collect::<Vec<_>>())
        })
        .await
        .unwrap();
        for (what, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            if bytes.contains(&0x1b) || bytes.len() > 20_000 {
                let text: String = String::from_utf8_lossy(bytes).chars().take(160).collect();
                shown.push(format!("{what}, {} bytes: {text:?}", bytes.len()));
            }
        }
    }
    assert!(shown.is_empty(), "{shown:#?}");
}

/// The time that a call may take holds as a whole.
#[tokio::test(flavor = "multi_thread")]
async fn a_call_takes_no_longer_than_its_timeout() {
    let world = World::new();
    let twist = |question: &Question| match question.path.as_str() {
        "/v1/requests" => say(Speech::document(400, &problem("expiry", 400))),
        _ => never(),
    };
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let mouth = move |question: Question| -> Answering {
            if server == 2 { twist(&question).unwrap() } else { never().unwrap() }
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    let client = client(&world, 4);
    let began = Instant::now();
    let result = client.register(&world.cluster.administrator, name("alice"), entry(1, None)).await;
    let took = began.elapsed();
    eprintln!("{took:?}: {}", result.unwrap_err());
    assert!(took < Duration::from_millis(4_300), "a write with a timeout of 4 s took {took:?}");
}

/// `Watch::next` is cancel-safe: who asks it in short turns is told sooner or later.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_asked_in_short_turns_tells() {
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    // Honest servers, 60 ms away.
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let speaker = Arc::clone(&world);
        let mouth = move |question: Question| -> Answering {
            let speaker = Arc::clone(&speaker);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(60)).await;
                Some(speaker.honest(server, &question))
            })
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    let client = client(&world, 5);
    let mut watch = client.watch(&name("alice"), 0);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(12) {
        if let Ok(event) = tokio::time::timeout(Duration::from_millis(40), watch.next()).await {
            eprintln!("after {:?}: {event:?}", began.elapsed());
            return;
        }
    }
    panic!("nothing was told in {:?}", began.elapsed());
}

/// A server that floods a watch with signs of life is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_signs_of_life_is_left() {
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    let sent = Arc::new(AtomicUsize::new(0));
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let (speaker, sent) = (Arc::clone(&world), Arc::clone(&sent));
        let mouth = move |question: Question| -> Answering {
            let (speaker, sent) = (Arc::clone(&speaker), Arc::clone(&sent));
            Box::pin(async move {
                if !question.path.ends_with("/watch") || server != 2 {
                    // Honest ones end the stream, so that the liar's turn comes soon.
                    return Some(speaker.honest(server, &question));
                }
                let (sender, body) = kds_tests::liar::Pieces::new();
                tokio::spawn(async move {
                    let piece = hyper::body::Bytes::from(vec![b'\n'; 256 * 1024]);
                    while sender.send(piece.clone()).await.is_ok() {
                        sent.fetch_add(piece.len(), Ordering::SeqCst);
                    }
                });
                Some(Speech { status: 200, headers: vec![], body })
            })
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    let client = client(&world, 5);
    let mut watch = client.watch(&name("alice"), 1);
    let _ = tokio::time::timeout(Duration::from_secs(15), watch.next()).await;
    let megabytes = sent.load(Ordering::SeqCst) / (1024 * 1024);
    assert!(
        megabytes < 100,
        "{megabytes} MiB of nothing were read in 15 s from one server, and it was not left"
    );
}

/// Odd names: with real servers, every name can be asked for in every way.
#[tokio::test(flavor = "multi_thread")]
async fn odd_names() {
    let cluster = Cluster::start(4).await.unwrap();
    let mut wrong = Vec::new();
    let long = "/".repeat(255);
    for text in ["lookup", ".", "..", "../..", "a/b", "/", "//", "+", "@", "-x", "a/../b", "history", &long] {
        let name = name(text);
        cluster.register(text, 1).await.unwrap();
        cluster.client.rotate(&cluster.administrator, name.clone(), 1, entry(2, None)).await.unwrap();
        let version = |version| LookupOptions { version, ..LookupOptions::default() };
        for asked in [None, Some(1), Some(2)] {
            let found = cluster.client.lookup(&name, &version(asked)).await;
            let found =
                found.map(|found| found.record.map(|record| record.version)).map_err(|e| e.to_string());
            if found != Ok(Some(asked.unwrap_or(2))) {
                wrong.push(format!("{text:?} version {asked:?}: {found:?}"));
            }
        }
        let history = cluster.client.history(&name).await.map(|versions| versions.len());
        if !matches!(history, Ok(2)) {
            wrong.push(format!("{text:?} history: {history:?}"));
        }
        let mut watch = cluster.client.watch(&name, 0);
        let first = tokio::time::timeout(Duration::from_secs(8), watch.next()).await;
        if !matches!(first, Ok(Ok(_))) {
            wrong.push(format!("{text:?} watch: {first:?}"));
        }
        let listed = cluster.client.list(text).await.map(|all| all.iter().any(|record| record.name == name));
        if !matches!(listed, Ok(true)) {
            wrong.push(format!("{text:?} list: {listed:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// f+1 servers refuse, one of which lies (it passes the request on) and one of which is honest and behind (it does not know
/// the key yet): "whatever a server answers, it may have passed the request on", so it is not known what came of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_depends_on_the_state_is_no_end() {
    let world = World::new();
    let executed = Arc::new(AtomicUsize::new(0));
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let executed = Arc::clone(&executed);
        let mouth = move |question: Question| -> Answering {
            match (server, question.path.as_str()) {
                // The liar: executes by way of the others, and says that it did not.
                (0, "/v1/requests") => {
                    executed.fetch_add(1, Ordering::SeqCst);
                    say(Speech::document(403, &problem("not-allowed", 403))).unwrap()
                }
                // Honest, and fetching the state.
                (1, "/v1/requests") => say(Speech::document(403, &problem("not-allowed", 403))).unwrap(),
                _ => never().unwrap(),
            }
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    let client = client(&world, 5);
    let error =
        client.register(&world.cluster.administrator, name("alice"), entry(1, None)).await.unwrap_err();
    assert_eq!(executed.load(Ordering::SeqCst), 1);
    assert!(
        matches!(&error, ClientError::OutcomeUnknown { .. }),
        "executed, and this is told, with no name to ask for: {error}"
    );
}

/// `status`: where a server stands is the manifest's to say.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_say_which_one_it_is() {
    let world = World::new();
    let twist = |question: &Question| match question.path.as_str() {
        "/v1/status" => say(Speech::document(
            200,
            &json!({
                "id": 1, "row": 7, "column": 7, "view": 0, "sequence": 666, "certified": 666, "complete": 666, "epoch": 0,
                "last_refresh_seconds": 1e300, "secrets": 0, "shares": 0, "recovering": false, "part": "stopped", "transfer": null,
                "peers_connected": 0, "version": "x",
            }),
        )),
        _ => None,
    };
    let _speaking = world.speak(2, Arc::new(twist)).await;
    let output = tokio::task::spawn_blocking(move || world.cluster.cli(&["status"])).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    eprintln!("{text}");
    let row = text.lines().find(|line| line.contains("666")).unwrap();
    assert!(row.trim().starts_with('2'), "server 2 says that server 1 has stopped: {row}");
}

fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
}

/// How much memory one answer of a liar takes.
#[tokio::test(flavor = "multi_thread")]
async fn a_liars_answer_takes_little_memory() {
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    let twist = |question: &Question| {
        (question.path == "/v1/records/lookup").then(|| -> Answering {
            Box::pin(async move {
                let (sender, body) = kds_tests::liar::Pieces::new();
                tokio::spawn(async move {
                    let entry = "{\"value\":null,\"proof\":{\"steps\":[],\"terminal\":\"empty\"}},";
                    let piece = hyper::body::Bytes::from(entry.repeat(5_000));
                    let _ = sender.send("{\"records\":[".into()).await;
                    for _ in 0..23 * 1024 * 1024 / piece.len() {
                        if sender.send(piece.clone()).await.is_err() {
                            return;
                        }
                    }
                    let _ = sender.send("1]}".into()).await;
                });
                Some(Speech { status: 200, headers: vec![], body })
            })
        })
    };
    let _speaking = world.speak(2, Arc::new(twist)).await;
    let before = resident();
    let mut took = Vec::new();
    for _ in 0..6 {
        let began = Instant::now();
        let client = client(&world, 10);
        client.lookup(&name("alice"), &LookupOptions::default()).await.unwrap();
        took.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(1500)).await;
    }
    eprintln!("{} MiB before, {} MiB after, {took:?}", before, resident());
    assert!(resident() - before < 100, "{} MiB for one answer to one name", resident() - before);
}

/// An answer in chunks of one byte each.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_tiny_chunks_takes_little_memory() {
    use kds_certs::TlsIdentity;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let world = World::new();
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 9, complete: 9 });
    let mut speaking = world.speak(2, none()).await;
    drop(speaking.remove(2));
    let folder = world.cluster.server_dir(2);
    let key = keystore::read(&folder.join("tls.key"), SecretKind::TlsKey, None).unwrap();
    let identity = TlsIdentity::from_pem(&std::fs::read(folder.join("tls.pem")).unwrap(), &key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(kds_certs::https_server(&identity).unwrap()));
    let address = world.cluster.manifest.servers[2].url.replace("https://", "");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&sent);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, sent) = (acceptor.clone(), Arc::clone(&counted));
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(tcp).await else { return };
                let mut buffer = [0; 4_096];
                let _ = stream.read(&mut buffer).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
                let piece = b"1\r\n \r\n".repeat(10_000);
                while stream.write_all(&piece).await.is_ok() {
                    sent.fetch_add(10_000, Ordering::SeqCst);
                }
            });
        }
    });
    let before = resident();
    let mut took = Vec::new();
    for _ in 0..4 {
        let began = Instant::now();
        let client = client(&world, 10);
        client.lookup(&name("alice"), &LookupOptions::default()).await.unwrap();
        took.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(4_000)).await;
    }
    eprintln!(
        "{} MiB before, {} MiB after, {} chunks sent, {took:?}",
        before,
        resident(),
        sent.load(Ordering::SeqCst)
    );
    assert!(resident() - before < 100, "{} MiB for one answer to one name", resident() - before);
}

/// Keys of a revoked name for a script: `lookup --format` prints them like good ones, with status 0.
#[tokio::test(flavor = "multi_thread")]
async fn keys_of_a_revoked_name_are_not_given_to_scripts() {
    let world = World::new();
    let (key, bytes) = record("alice", 2, 5);
    let mut revoked: Record = quorum::codec::decode(&bytes).unwrap();
    revoked.status = Status::Revoked { reason: "stolen".into(), by: PublicKey([1; 32]) };
    world.set(&[0, 1, 2, 3], &View { entries: vec![(key, encode(&revoked))], sequence: 9, complete: 9 });
    let _speaking = world.speak(9, none()).await;
    let cli = tokio::task::spawn_blocking(move || world.cluster.cli(&["lookup", "alice", "--format", "age"]));
    let output = cli.await.unwrap();
    eprintln!("{output:?}");
    assert!(output.status.code() != Some(0) || output.stdout.is_empty());
}

/// A request of one cluster is asked for at another one (the default manifest, say): that proves nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_of_one_cluster() {
    use kds_client::{Ticket, WhatCame};
    let (world, other) = (World::new(), World::new());
    world.set(&[0, 1, 2, 3], &View { entries: vec![record("alice", 1, 5)], sequence: 900, complete: 900 });
    let _speaking = world.speak(9, none()).await;
    // Signed for the other cluster, and executed there.
    let expiry = world.began.plus_ms(500);
    let operation = Operation::Register { name: name("bob"), entry: entry(1, None) };
    let (key, cluster) = (&other.cluster.administrator, other.cluster.manifest.cluster_id());
    let request = quorum::request::SignedRequest::sign(&cluster, key, 77, expiry, operation);
    let text = Ticket::of(&cluster, &request).to_string();
    let came = match text.parse::<Ticket>() {
        Ok(ticket) => client(&world, 5).outcome(&ticket).await,
        Err(_) => return,
    };
    assert!(
        !matches!(came, Ok(WhatCame::NeverExecuted(_))),
        "\"never executed, which is proved; do it again\": {came:?}"
    );
}
