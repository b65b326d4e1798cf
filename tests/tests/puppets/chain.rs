//! A chain of certified states; honest servers go on along it, each at its own pace, and one liar answers from whichever it
//! likes. Whatever calls one client makes one after the other, nothing goes back; and what is called complete every later reader sees.

use crate::{certify, name, voters};
use kds_client::api::{BulkAnswer, BulkQuestion, HistoryAnswer};
use kds_client::{Client, Consistency, LookupOptions, Options};
use kds_tests::liar::{Answering, Liar, Question, Speech};
use kds_tests::{Cluster, entry};
use quorum::answer::{PageAnswer, Proved, RecordAnswer};
use quorum::certificate::{Certificate, Checkpoint, CompletionTracker, Held};
use quorum::codec::encode;
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId};
use quorum::limits::MAX_PAGE;
use quorum::map::{Map, Page, Snapshot};
use quorum::record::{Change, Name, Record, Status};
use quorum::signing::Voter;
use quorum::state::layout;
use rand::Rng as _;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const LENGTH: usize = 60;
const LIAR: usize = 3;

struct World {
    cluster: Cluster,
    voters: Vec<Voter>,
    chain: Vec<(Snapshot, Arc<Certificate>)>,
    at: Mutex<[usize; 4]>,
}

fn below(n: usize) -> usize {
    (rand::rng().next_u64() % n as u64) as usize
}
fn sequence(i: usize) -> Sequence {
    Sequence(10 + i as u64)
}

impl World {
    fn new() -> Arc<Self> {
        let cluster = Cluster::new(4, &[]).unwrap();
        let (id, voters) = (cluster.manifest.cluster_id(), voters(&cluster));
        let began = kds_client::now();
        let mut map = Map::new(id);
        let mut chain = Vec::new();
        for i in 0..LENGTH {
            // alice changes all the time, and each fifth state has a name more.
            let key = layout::name_key(&name("alice"));
            if let Some(old) = map.get(&key).cloned() {
                map.insert(&layout::history_key(&name("alice"), i as u64), old.to_vec());
            }
            let updated = Change { sequence: sequence(i), time: began.plus_ms(i as u64) };
            let record = |text: &str, version| Record {
                name: name(text),
                version,
                status: Status::Active,
                entry: entry(version as u8, None),
                updated,
            };
            map.insert(&key, encode(&record("alice", 1 + i as u64)));
            if i % 5 == 4 {
                let text = format!("b{i:02}");
                map.insert(&layout::name_key(&name(&text)), encode(&record(&text, 1)));
            }
            let snapshot = map.seal();
            let statement = Checkpoint {
                sequence: sequence(i),
                root: snapshot.root(),
                time: began.plus_ms(i as u64),
                epoch: Epoch(0),
                attempt: 0,
            };
            chain.push((snapshot, certify(&voters, statement)));
        }
        Arc::new(Self { cluster, voters, chain, at: Mutex::new([0; 4]) })
    }
    /// One honest server goes on; a state is certified that one honest server at least has not got yet, or all have.
    fn go_on(&self) {
        let mut at = self.at.lock().unwrap();
        let newest = at[..3].iter().copied().max().unwrap();
        let server = below(3);
        // Two honest servers and the liar make a certificate.
        let ahead = at[..3].iter().filter(|i| **i == newest).count();
        if at[server] < newest {
            at[server] += 1 + below(newest - at[server]);
        } else if ahead >= 1 && newest + 1 < LENGTH {
            at[server] = newest + 1;
        }
    }
    fn honest(&self, server: usize, question: &Question) -> Speech {
        let at = *self.at.lock().unwrap();
        let newest = at[..3].iter().copied().max().unwrap();
        let i = if server == LIAR { below(newest + 1) } else { at[server] };
        let (snapshot, certificate) = &self.chain[i];
        let (path, query) = question.path.split_once('?').unwrap_or((&question.path, ""));
        let query: BTreeMap<&str, String> = query
            .split('&')
            .filter_map(|part| part.split_once('='))
            .map(|(key, value)| (key, value.replace("%2F", "/").replace("%2B", "+")))
            .collect();
        let page = |from: &[u8], to: &[u8], limit| PageAnswer {
            range: snapshot.prove_range(&Page::new(from, to, limit)),
            certificate: Arc::clone(certificate),
        };
        let parts: Vec<_> = path.split('/').skip(2).collect();
        let document: Value = match parts.as_slice() {
            ["records", "lookup"] => {
                let question: BulkQuestion = serde_json::from_slice(&question.body).unwrap();
                let look = |name: &Name| Proved::<Record>::look_up(snapshot, &layout::name_key(name));
                let version = |name: &Name| match server {
                    LIAR if below(4) == 0 => u64::from(rand::rng().next_u64() as u8),
                    _ => layout::record(snapshot, name).map_or(0, |record| record.version),
                };
                json!(BulkAnswer {
                    records: question.names.iter().map(look).collect(),
                    versions: question.brief.iter().map(version).collect(),
                    certified: sequence(i),
                    certificate: Some(Arc::clone(certificate)),
                    complete: Sequence(0),
                })
            }
            ["completion"] => {
                let mut tracker = CompletionTracker::new(self.cluster.manifest.grid());
                for (server, voter) in self.voters.iter().enumerate() {
                    let i = if server == LIAR { newest } else { at[server] };
                    tracker.add(voter.sign(Held { sequence: sequence(i), attempt: AttemptId::default() }));
                }
                json!(tracker.completion().unwrap())
            }
            ["records"] => {
                let prefix = [layout::NAMES, query["prefix"].as_bytes()].concat();
                let from = [layout::NAMES, query["from"].as_bytes()].concat();
                let limit = query["limit"].parse().unwrap();
                json!(page(&from, &layout::prefix_end(&prefix), limit))
            }
            ["records", text] => {
                let version = query.get("version").map(|text| text.parse().unwrap());
                json!(RecordAnswer::look_up(snapshot, certificate, Sequence(0), &name(text), version))
            }
            ["records", text, "history"] => {
                let name = name(text);
                let from = layout::history_key(&name, query["from"].parse().unwrap());
                let current = RecordAnswer::look_up(snapshot, certificate, Sequence(0), &name, None);
                let earlier = page(&from, &layout::prefix_end(&layout::history_prefix(&name)), MAX_PAGE);
                json!(HistoryAnswer { current, earlier })
            }
            _ => {
                return Speech::document(
                    404,
                    &json!({ "type": "urn:kds:not-found", "title": "", "status": 404, "detail": "" }),
                );
            }
        };
        Speech::document(200, &document)
    }
}

fn client(world: &World) -> Client {
    let options = Options {
        timeout: Duration::from_secs(5),
        max_age: Duration::from_secs(3_600),
        ..Options::default()
    };
    Client::new(Arc::clone(&world.cluster.manifest), options).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_asked_nothing_goes_back() {
    let seconds = std::env::var("EYES_SECONDS").ok().map_or(40, |text| text.parse().unwrap());
    let ends = std::time::Instant::now() + Duration::from_secs(seconds);
    let (mut rounds, mut calls, mut failed) =
        (0, BTreeMap::<String, usize>::new(), BTreeMap::<String, usize>::new());
    let world = World::new();
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let speaker = Arc::clone(&world);
        let mouth = move |question: Question| -> Answering {
            let speaker = Arc::clone(&speaker);
            Box::pin(async move { Some(speaker.honest(server, &question)) })
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    // Those that are behind come after, sooner or later, also while a call waits.
    let follows = Arc::clone(&world);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(40)).await;
            let mut at = follows.at.lock().unwrap();
            let newest = at[..3].iter().copied().max().unwrap();
            let server = below(3);
            if at[server] < newest {
                at[server] += 1 + below(newest - at[server]);
            }
        }
    });
    while std::time::Instant::now() < ends {
        rounds += 1;
        *world.at.lock().unwrap() = [0; 4];
        let (first, second) = (client(&world), client(&world));
        // What each client has told, and what was told to be complete by any.
        let mut told = [BTreeMap::<String, u64>::new(), BTreeMap::new()];
        let mut complete = BTreeMap::<String, u64>::new();
        let mut log = Vec::new();
        for _ in 0..60 {
            (0..below(3)).for_each(|_| world.go_on());
            let who = below(2);
            let client = if who == 0 { &first } else { &second };
            let text =
                if below(3) > 0 { "alice".to_owned() } else { format!("b{:02}", 5 * below(LENGTH / 5) + 4) };
            let what = ["row", "quorum", "any", "cached", "list", "history", "version"][below(7)];
            let options =
                |consistency, version| LookupOptions { consistency, version, ..LookupOptions::default() };
            // Names and versions that this call tells of, whether it is of everybody's complete writes, and whether it says complete.
            let mut tells: Vec<(String, u64)> = vec![];
            let (mut sees_complete, mut says_complete) = (true, false);
            let result: Result<(), String> = match what {
                "row" | "quorum" | "any" | "version" => {
                    let (consistency, version) = match what {
                        "row" => (Consistency::Row, None),
                        "quorum" => (Consistency::Quorum, None),
                        "version" => (Consistency::Row, Some(1)),
                        _ => (Consistency::Any, None),
                    };
                    sees_complete = what != "any";
                    client
                        .lookup(&name(&text), &options(consistency, version))
                        .await
                        .map_err(|e| e.to_string())
                        .map(|found| {
                            let current =
                                found.answer.current.value.as_ref().map_or(0, |record| record.version);
                            tells.push((text.clone(), current));
                            says_complete = found.complete;
                        })
                }
                "cached" => {
                    // Up to max_age old.
                    sees_complete = false;
                    client.lookup_cached(&name(&text)).await.map_err(|e| e.to_string()).map(|record| {
                        tells.push((text.clone(), record.map_or(0, |record| record.version)));
                    })
                }
                "list" => client.list("").await.map_err(|e| e.to_string()).map(|records| {
                    says_complete = true;
                    let all: BTreeMap<_, _> = records
                        .iter()
                        .map(|record| (record.name.as_str().to_owned(), record.version))
                        .collect();
                    let known = told[who].keys().chain(complete.keys()).cloned();
                    let names: Vec<String> = known.chain(all.keys().cloned()).collect();
                    tells.extend(
                        names.into_iter().map(|name| (name.clone(), all.get(&name).copied().unwrap_or(0))),
                    );
                }),
                _ => client.history(&name("alice")).await.map_err(|e| e.to_string()).map(|records| {
                    assert!(records.iter().zip(1..).all(|(record, version)| record.version == version));
                    says_complete = true;
                    tells.push(("alice".into(), records.last().map_or(0, |record| record.version)));
                }),
            };
            *calls.entry(what.to_owned()).or_default() += 1;
            log.push(format!(
                "{:?} client {who} {what} {text}: {tells:?} complete {says_complete} {result:?}",
                world.at.lock().unwrap()
            ));
            if let Err(error) = result {
                *failed
                    .entry(format!(
                        "{what}: {}",
                        error.lines().next().unwrap().chars().take(70).collect::<String>()
                    ))
                    .or_default() += 1;
                continue;
            }
            for (name, version) in tells {
                let least = told[who].get(&name).copied().unwrap_or(0);
                let last = log.iter().rev().take(12).rev().cloned().collect::<Vec<_>>();
                assert!(version >= least, "{name} went back from {least} to {version}: {last:#?}");
                let everybodys = complete.get(&name).copied().unwrap_or(0);
                assert!(
                    !sees_complete || version >= everybodys,
                    "{name} was complete at {everybodys} and {version} is told: {last:#?}"
                );
                told[who].insert(name.clone(), version);
                if says_complete {
                    let known = complete.entry(name).or_default();
                    *known = version.max(*known);
                }
            }
        }
    }
    eprintln!("{rounds} rounds, {calls:?}, failed: {failed:#?}");
}

/// The liar answers everything with 429, "at once again", or never; honest servers are 60 ms away.
#[tokio::test(flavor = "multi_thread")]
async fn every_call_in_spite_of_one_who_asks_to_wait_or_is_silent() {
    let world = World::new();
    *world.at.lock().unwrap() = [LENGTH - 1; 4];
    let silent = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut speaking = Vec::new();
    for server in 0..4usize {
        let (speaker, silent) = (Arc::clone(&world), Arc::clone(&silent));
        let mouth = move |question: Question| -> Answering {
            let (speaker, silent) = (Arc::clone(&speaker), silent.load(std::sync::atomic::Ordering::SeqCst));
            Box::pin(async move {
                if server == LIAR && silent {
                    tokio::time::sleep(Duration::from_secs(600)).await;
                }
                if server == LIAR {
                    let document =
                        json!({ "type": "urn:kds:too-many", "title": "t", "status": 429, "detail": "d" });
                    let mut speech = Speech::document(429, &document);
                    speech.headers.push(("retry-after", "0".into()));
                    speech.headers.push(("kds-membership", "9".into()));
                    return Some(speech);
                }
                tokio::time::sleep(Duration::from_millis(60)).await;
                Some(speaker.honest(server, &question))
            })
        };
        let (manifest, folder) = (&world.cluster.manifest, world.cluster.server_dir(server));
        speaking
            .push(Liar::speaking(manifest, ServerId(server as u8), &folder, Arc::new(mouth)).await.unwrap());
    }
    let mut slow = Vec::new();
    for quiet in [false, true] {
        silent.store(quiet, std::sync::atomic::Ordering::SeqCst);
        for what in ["row", "quorum", "any", "version", "list", "history", "many", "watch"] {
            for _ in 0..6 {
                let (client, began) = (client(&world), std::time::Instant::now());
                let options =
                    |consistency, version| LookupOptions { consistency, version, ..LookupOptions::default() };
                let alice = name("alice");
                let result = match what {
                    "row" => client.lookup(&alice, &options(Consistency::Row, None)).await.map(drop),
                    "quorum" => client.lookup(&alice, &options(Consistency::Quorum, None)).await.map(drop),
                    "any" => client.lookup(&alice, &options(Consistency::Any, None)).await.map(drop),
                    "version" => client.lookup(&alice, &options(Consistency::Row, Some(1))).await.map(drop),
                    "list" => client.list("").await.map(drop),
                    "history" => client.history(&alice).await.map(drop),
                    "many" => {
                        let names: Vec<_> = (0..600).map(|i| name(&format!("n{i}"))).collect();
                        client
                            .lookup_many(&names, &LookupOptions::default())
                            .await
                            .into_iter()
                            .collect::<Result<Vec<_>, _>>()
                            .map(drop)
                    }
                    _ => client.watch(&alice, 3).next().await.map(drop),
                };
                let took = began.elapsed();
                if took > Duration::from_millis(3_500) || result.is_err() {
                    let why =
                        result.err().map(|error| error.to_string().chars().take(100).collect::<String>());
                    slow.push(format!("silent {quiet}, {what}: {took:.1?} {why:?}"));
                }
            }
        }
    }
    assert!(slow.is_empty(), "{slow:#?}");
}
