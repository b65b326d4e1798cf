//! Many clients register, rotate and look up the same names while servers are killed and stopped: what
//! they saw can be put in one order that explains all of it.

use kds_client::{ClientError, LookupOptions};
use kds_tests::liar::{Liar, Lie};
use kds_tests::linearizable::{Call, Operation, Outcome, Value, check};
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::bytes::Blob;
use quorum::record::{Entry, Name, Record};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const NAMES: u64 = 5;
const CLIENTS: u64 = 8;

fn contents(number: u64) -> Entry {
    let mut entry = entry(1, None);
    let mut key = [1; 32];
    key[..8].copy_from_slice(&number.to_be_bytes());
    entry.keys[0].key = Blob(key.to_vec());
    entry
}

fn value(record: Option<&Record>) -> Value {
    record.map(|record| {
        let number = record.entry.keys[0].key[..8].try_into().expect("keys have 32 bytes");
        (record.version, u64::from_be_bytes(number))
    })
}

/// A small generator, so that clients need not share one.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_see_under_faults_can_be_put_in_order() {
    let mut cluster = Cluster::start(4).await.unwrap();
    check_history(&mut cluster, 4).await;
}

/// Nine servers, so that lookups touch one row; and one of them answers readers from the past.
#[tokio::test(flavor = "multi_thread")]
async fn what_readers_of_rows_see_beside_a_liar_can_be_put_in_order() {
    let mut cluster = Cluster::new(9, &[]).unwrap();
    cluster.hide_from_clients(8).unwrap();
    for server in 0..9 {
        cluster.run(server).unwrap();
    }
    let folder = cluster.server_dir(8);
    let (lied, lie) = from_the_past();
    let _liar = Liar::start(&cluster.manifest, ServerId(8), &folder, ServerId(0), lie).await.unwrap();
    cluster.ready().await.unwrap();
    check_history(&mut cluster, 8).await;
    let lied = lied.load(Ordering::Relaxed);
    assert!(lied > 20, "{lied} lies are too few to show anything");
}

/// Answers lookups with what it said before: whole answers with their proofs, and versions.
fn from_the_past() -> (Arc<AtomicU64>, Arc<Lie>) {
    let lied = Arc::new(AtomicU64::new(0));
    let kept: Mutex<BTreeMap<String, Vec<serde_json::Value>>> = Mutex::default();
    let (count, random) = (Arc::clone(&lied), AtomicU64::new(7));
    let lie = move |path: &str, _: &mut u16, document: &mut serde_json::Value| {
        let mut state = random.load(Ordering::Relaxed);
        let chance = next(&mut state);
        random.store(state, Ordering::Relaxed);
        if path != "/v1/records/lookup" {
            return;
        }
        if let Some(versions) = document["versions"].as_array_mut() {
            for version in versions.iter_mut().filter(|_| chance.is_multiple_of(2)) {
                *version = version.as_u64().unwrap_or(0).saturating_sub(1).into();
                count.fetch_add(1, Ordering::Relaxed);
            }
        }
        let of_one = document["records"].as_array().filter(|records| records.len() == 1);
        let Some(name) = of_one.and_then(|records| records[0]["value"]["name"].as_str()) else { return };
        let mut kept = kept.lock().unwrap();
        let before = kept.entry(name.to_owned()).or_default();
        if document["certificate"].is_object() && before.len() < 500 {
            before.push(document.clone());
        }
        if chance.is_multiple_of(3) && !before.is_empty() && document["versions"].is_null() {
            *document = before[(chance / 3) as usize % before.len()].clone();
            count.fetch_add(1, Ordering::Relaxed);
        }
    };
    (lied, Arc::new(lie))
}

/// Clients at work while one server after the other of the first `mortal` ones is killed or stopped.
async fn check_history(cluster: &mut Cluster, mortal: usize) {
    let (start, stop) = (Instant::now(), Arc::new(AtomicBool::new(false)));
    let numbers = Arc::new(AtomicU64::new(1));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (mut kds, key) = (cluster.fresh_client(), cluster.administrator.clone());
            let fresh = cluster.fresh();
            let (stop, numbers) = (Arc::clone(&stop), Arc::clone(&numbers));
            tokio::spawn(async move {
                let mut history = Vec::new();
                let mut random = client + 1;
                let mut known = [0; NAMES as usize];
                while !stop.load(Ordering::Relaxed) {
                    if next(&mut random).is_multiple_of(12) {
                        // Somebody who has not seen what this one has.
                        kds = fresh();
                    }
                    let n = next(&mut random) % NAMES;
                    let name = Name::new(format!("name-{n}")).unwrap();
                    let called = start.elapsed().as_nanos() as u64;
                    let contents_of = numbers.fetch_add(1, Ordering::Relaxed);
                    let (call, outcome) = match next(&mut random) % 10 {
                        0..5 => {
                            let found = kds.lookup(&name, &LookupOptions::default()).await;
                            let outcome = found.map_or(Outcome::Unknown, |found| {
                                let value = value(found.record.as_ref());
                                known[n as usize] = value.map_or(0, |(version, _)| version);
                                Outcome::Found(value)
                            });
                            (Call::Lookup, outcome)
                        }
                        operation => {
                            let from = known[n as usize];
                            let (call, written) = if operation == 5 || from == 0 {
                                let call = Call::Register(contents_of);
                                (call, kds.register(&key, name, contents(contents_of)).await)
                            } else {
                                let call = Call::Rotate { from, contents: contents_of };
                                (call, kds.rotate(&key, name, from, contents(contents_of)).await)
                            };
                            let outcome = match written {
                                // "Committed, not yet visible" may become visible at any time.
                                Ok(written) if written.complete => Outcome::Done,
                                Err(ClientError::Refused(_)) => Outcome::Refused,
                                _ => Outcome::Unknown,
                            };
                            (call, outcome)
                        }
                    };
                    let returned = start.elapsed().as_nanos() as u64;
                    history.push((n, Operation { called, returned, call, outcome }));
                }
                history
            })
        })
        .collect();

    for round in 0..5 {
        tokio::time::sleep(Duration::from_millis(900)).await;
        let victim = round % mortal;
        match round % 2 {
            0 => {
                cluster.kill(victim);
                tokio::time::sleep(Duration::from_millis(2_500)).await;
                cluster.run(victim).unwrap();
            }
            _ => {
                cluster.signal(victim, "STOP").unwrap();
                tokio::time::sleep(Duration::from_millis(2_500)).await;
                cluster.signal(victim, "CONT").unwrap();
            }
        }
        cluster.ready().await.unwrap();
    }
    let all = 0..cluster.manifest.servers.len();
    all.clone().for_each(|server| cluster.kill(server));
    all.for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);

    let mut histories = vec![Vec::new(); NAMES as usize];
    for client in clients {
        for (name, operation) in client.await.unwrap() {
            histories[name as usize].push(operation);
        }
    }
    let of = |wanted: fn(&Outcome) -> bool| histories.iter().flatten().filter(|o| wanted(&o.outcome)).count();
    let (done, found) = (of(|o| *o == Outcome::Done), of(|o| matches!(o, Outcome::Found(_))));
    println!(
        "{done} writes done, {} refused, {} unknown; {found} lookups",
        of(|o| *o == Outcome::Refused),
        of(|o| *o == Outcome::Unknown)
    );
    assert!(done > 50 && found > 100, "{done} writes and {found} lookups are too few to show anything");
    for (name, history) in histories.iter().enumerate() {
        if let Err(best) = check(history) {
            panic!("name {name}: of {} calls only these fit an order: {best:#?}", history.len());
        }
        // The checker would notice: a lookup that found a version that had been replaced before.
        let stale = history.iter().filter(|o| matches!(o.outcome, Outcome::Found(Some((1, _)))));
        if let Some(first) = stale.min_by_key(|o| o.called) {
            let late = Operation { called: u64::MAX - 2, returned: u64::MAX - 1, ..*first };
            assert!(
                check(&[history.as_slice(), &[late]].concat()).is_err(),
                "the checker passes a stale read"
            );
        }
    }
}
