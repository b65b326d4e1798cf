//! One server of nine answers lookups with every kind of lie, over real HTTPS. The client always
//! returns the true record, and names the liar.

use kds_client::{ClientError, ExitStatus, LookupOptions};
use kds_tests::liar::{Answering, Liar, Lie, Speech};
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::record::Name;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const LIAR: ServerId = ServerId(4);
const HONEST: ServerId = ServerId(0);

/// Whether the answer to a bulk lookup has whole records.
fn is_full(path: &str, document: &Value) -> bool {
    path == "/v1/records/lookup" && document["records"].as_array().is_some_and(|records| !records.is_empty())
}

/// A lie about full answers to lookups of alice.
fn about_records(change: impl Fn(&mut Value) + Send + Sync + 'static) -> Arc<Lie> {
    Arc::new(move |path, _status, document| {
        if is_full(path, document) {
            change(document);
        }
    })
}

/// What an honest server answers now.
async fn full_answer(cluster: &Cluster, name: &str) -> Value {
    let question = json!({ "names": [name] }).to_string();
    let link = cluster.client.link(HONEST).unwrap();
    let (_, answer) = link.send("POST", "/v1/records/lookup", question.into()).await.unwrap();
    serde_json::from_slice(&answer).unwrap()
}

/// Looks alice up until the liar has been asked and named; every single answer must be true.
async fn expect_caught(cluster: &Cluster, what: &str, lie: Arc<Lie>) {
    let _liar = Liar::start(&cluster.manifest, LIAR, &cluster.server_dir(4), HONEST, lie).await.unwrap();
    let name = Name::new("alice").unwrap();
    for _ in 0..300 {
        let client = cluster.fresh_client();
        let found =
            client.lookup(&name, &LookupOptions::default()).await.unwrap_or_else(|e| panic!("{what}: {e}"));
        let record = found.record.unwrap_or_else(|| panic!("{what}: alice is said not to exist"));
        assert_eq!((record.version, &record.entry), (2, &entry(2, None)), "{what}");
        if let Some(caught) = found.access.rejected.first() {
            assert_eq!(caught.server, LIAR, "{what}: an honest server was blamed: {caught}");
            assert!(!found.access.answered.contains(&LIAR), "{what}: the liar counts as an answer");
            eprintln!("{what}: {caught}");
            return;
        }
        // Some lies are lies only once the certificate is too old.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{what}: the liar was never caught");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lying_server_is_caught_named_and_routed_around() {
    let mut cluster = Cluster::start(9).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.register("mallory", 66).await.unwrap();
    let alice = Name::new("alice").unwrap();
    // The answer with version 1, kept by the liar for later.
    let old = full_answer(&cluster, "alice").await;
    cluster.client.rotate(&cluster.administrator, alice, 1, entry(2, None)).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(4);

    let changed_key = about_records(|document| {
        document["records"][0]["value"]["entry"]["keys"][0]["key"] = json!(quorum::Hash([9; 32]));
    });
    expect_caught(&cluster, "a changed key", changed_key).await;

    let other = full_answer(&cluster, "mallory").await;
    let renamed = Mutex::new(other.clone());
    expect_caught(
        &cluster,
        "another name's record",
        about_records(move |document| {
            // Under the current certificate, so that its age does not give it away.
            let mut lie = renamed.lock().unwrap().clone();
            lie["certificate"] = document["certificate"].clone();
            *document = lie;
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "another name's record, whole",
        about_records(move |document| {
            *document = other.clone();
        }),
    )
    .await;

    // A younger one would be taken for a server's that is behind.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let kept = old.clone();
    expect_caught(
        &cluster,
        "an old version with its old certificate",
        about_records(move |document| {
            *document = kept.clone();
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "an old version with a new certificate",
        about_records(move |document| {
            let certificate = document["certificate"].take();
            *document = old.clone();
            document["certificate"] = certificate;
        }),
    )
    .await;

    let absent = about_records(|document| document["records"][0]["value"] = Value::Null);
    expect_caught(&cluster, "absence of a name that exists", absent).await;

    expect_caught(
        &cluster,
        "a certificate with too few signers",
        about_records(|document| {
            document["certificate"]["votes"].as_array_mut().unwrap().pop();
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "one signer twice",
        about_records(|document| {
            let votes = document["certificate"]["votes"].as_array_mut().unwrap();
            votes[0] = votes[1].clone();
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "a signer who is not in the manifest",
        about_records(|document| {
            document["certificate"]["votes"][0]["server"] = json!(9);
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "a signer whose key nobody certified",
        about_records(|document| {
            document["certificate"]["keys"][0]["statement"]["key"] = json!(quorum::Hash([7; 32]));
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "a forged root",
        about_records(|document| {
            document["certificate"]["statement"]["root"] = json!(quorum::Hash([7; 32]));
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "a certificate made younger",
        about_records(|document| {
            document["certificate"]["statement"]["time"] = json!(kds_client::now());
            document["certificate"]["statement"]["sequence"] = json!(1_000_000);
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "a path of garbage",
        about_records(|document| {
            document["records"][0]["proof"]["steps"] = json!([]);
        }),
    )
    .await;
    expect_caught(
        &cluster,
        "no JSON of ours at all",
        about_records(|document| {
            *document = json!([1, 2, 3]);
        }),
    )
    .await;
    let newer: Arc<Lie> = Arc::new(|path, _, document| {
        if is_full(path, document) {
            document["records"][0]["value"]["version"] = json!(99);
        } else if path == "/v1/records/lookup" {
            document["versions"] = json!([99]);
        }
    });
    expect_caught(&cluster, "a newer version that is not proved", newer).await;
    let refusing: Arc<Lie> = Arc::new(|path, status, document| {
        if path == "/v1/records/lookup" {
            *status = 403;
            *document =
                json!({ "type": "urn:kds:not-allowed", "title": "no", "status": 403, "detail": "go away" });
        }
    });
    expect_caught(&cluster, "a refusal of what everyone may read", refusing).await;
    let fewer = about_records(|document| document["records"] = json!([]));
    expect_caught(&cluster, "fewer records than were asked for", fewer).await;
    let without = about_records(|document| document["certificate"] = Value::Null);
    expect_caught(&cluster, "no certificate", without).await;
    let leaf = about_records(|document| {
        document["records"][0]["proof"]["terminal"]["leaf"]["value_hash"] = json!(quorum::Hash([1; 32]));
    });
    expect_caught(&cluster, "the right path to a wrong leaf", leaf).await;
    let foreign = Cluster::start(9).await.unwrap();
    foreign.register("alice", 1).await.unwrap();
    let answer = full_answer(&foreign, "alice").await;
    let of_another = about_records(move |document| document.clone_from(&answer));
    expect_caught(&cluster, "another cluster's answer", of_another).await;
}

/// Nobody but liars answers a write: what is reported as the cluster's refusal f+1 of them say alike, and nothing of it
/// says that something does not exist.
#[tokio::test(flavor = "multi_thread")]
async fn servers_that_refuse_for_different_reasons_do_not_agree() {
    let cluster = Cluster::new(4, &[]).unwrap();
    let refuse = |kinds: [(u16, &'static str); 4]| {
        let (manifest, folders) =
            (Arc::clone(&cluster.manifest), [0, 1, 2, 3].map(|i| cluster.server_dir(i)));
        async move {
            let mut liars = Vec::new();
            for (server, (status, kind)) in kinds.into_iter().enumerate() {
                let mouth = move |_| {
                    let problem = json!({
                        "type": format!("urn:kds:{kind}"), "title": "t", "status": status, "detail": kind,
                    });
                    let speech = Speech::document(status, &problem);
                    Box::pin(async move { Some(speech) }) as Answering
                };
                let id = ServerId(server as u8);
                liars.push(Liar::speaking(&manifest, id, &folders[server], Arc::new(mouth)).await.unwrap());
            }
            liars
        }
    };
    let name = Name::new("alice").unwrap();
    let register = async || {
        let client = cluster.fresh_client().with_timeout(Duration::from_secs(3));
        client.register(&cluster.administrator, name.clone(), entry(1, None)).await.unwrap_err()
    };
    let liars =
        refuse([(403, "not-allowed"), (404, "not-found"), (400, "malformed"), (413, "too-large")]).await;
    let ClientError::OutcomeUnknown { why, .. } = register().await else { panic!("one of them is believed") };
    let ClientError::Disagree { said } = &*why else { panic!("{why}") };
    assert_eq!(said.len(), 4, "{why}");
    drop(liars);
    // Two of the same kind include an honest one; it is its reason that counts, and no proof. What another state may
    // allow takes q: one of two may have passed the request on, and the other may be behind.
    let (malformed, not_found, conflict) = ((400, "malformed"), (404, "not-found"), (409, "conflict"));
    for (kinds, servers) in
        [([malformed, malformed, conflict, conflict], 2), ([not_found, not_found, not_found, conflict], 3)]
    {
        let liars = refuse(kinds).await;
        let refused = register().await;
        assert!(
            matches!(&refused, ClientError::RefusedByServers { said, .. } if said.servers().len() == servers),
            "{refused}"
        );
        assert_eq!(refused.exit_status(), ExitStatus::Refused);
        drop(liars);
    }
    let liars = refuse([not_found, not_found, conflict, conflict]).await;
    let ClientError::OutcomeUnknown { why, .. } = register().await else { panic!("two may be wrong") };
    assert!(matches!(&*why, ClientError::RefusedByServers { .. }), "{why}");
    drop(liars);
    // Nobody refuses for what is found out by executing only: without a receipt that is no answer.
    let liars =
        refuse([(409, "conflict"), (409, "conflict"), (409, "epoch-passed"), (500, "internal")]).await;
    let unknown = register().await;
    assert!(matches!(unknown, ClientError::OutcomeUnknown { .. }), "{unknown}");
    drop(liars);
}

/// A whole row lies, more than are masked: what it says is believed for `max_age` at most, and then
/// never again; a cache does not make it longer.
#[tokio::test(flavor = "multi_thread")]
async fn a_lying_row_hides_a_revocation_no_longer_than_max_age() {
    let mut cluster = Cluster::new(9, &[]).unwrap();
    for server in 0..9 {
        if (3..6).contains(&server) {
            cluster.hide_from_clients(server).unwrap();
        }
        cluster.run(server).unwrap();
    }
    // They answer with what was true before: proofs, versions, statements of completeness.
    let kept: Arc<Mutex<BTreeMap<String, Value>>> = Arc::default();
    let frozen = Arc::new(AtomicBool::new(false));
    let lie: Arc<Lie> = {
        let (kept, frozen) = (Arc::clone(&kept), Arc::clone(&frozen));
        Arc::new(move |path, _, document| {
            // A brief and a full question go to the same path.
            let kind = format!("{path} {}", document["records"].as_array().map_or(0, Vec::len));
            let mut kept = kept.lock().unwrap();
            match frozen.load(Ordering::Relaxed) {
                true => document.clone_from(kept.get(&kind).unwrap_or(&Value::Null)),
                false if document["certificate"].is_object() || !path.ends_with("/lookup") => {
                    kept.insert(kind, document.clone());
                }
                false => {}
            }
        })
    };
    let mut liars = Vec::new();
    for server in [3, 4, 5] {
        let folder = cluster.server_dir(server);
        let at = ServerId(server as u8);
        liars.push(Liar::start(&cluster.manifest, at, &folder, HONEST, Arc::clone(&lie)).await.unwrap());
    }
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.level().await.unwrap();
    let name = Name::new("alice").unwrap();
    // While they tell the truth they learn what to say.
    let warm = async || {
        for server in [3, 4, 5] {
            let link = cluster.client.link(ServerId(server)).unwrap();
            for question in [json!({ "names": ["alice"] }), json!({ "names": [], "brief": ["alice"] })] {
                link.send("POST", "/v1/records/lookup", question.to_string().into()).await.unwrap();
            }
            link.send("GET", "/v1/completion", vec![]).await.unwrap();
        }
    };
    warm().await;
    let cached = cluster.fresh_client();
    assert!(cached.lookup_cached(&name).await.unwrap().is_some());
    warm().await;
    frozen.store(true, Ordering::Relaxed);
    let stale_since = tokio::time::Instant::now();
    cluster.client.revoke(&cluster.administrator, name.clone(), 1, "stolen".into()).await.unwrap();

    let (mut hidden, mut seen) = (0, 0);
    let active = |record: &quorum::record::Record| record.status == quorum::record::Status::Active;
    while stale_since.elapsed() < Duration::from_secs(9) {
        let asked = stale_since.elapsed();
        let found = cluster.fresh_client().lookup(&name, &LookupOptions::default()).await;
        let from_memory = cached.lookup_cached(&name).await;
        let late = asked > Duration::from_millis(5_000 + 200);
        if let Ok(found) = found {
            let record = found.record.expect("absence is never proved");
            match active(&record) {
                true => hidden += 1,
                false => seen += 1,
            }
            assert!(!late || !active(&record), "revoked {asked:?} ago, and {:?} hides it", found.access);
        }
        if let Ok(record) = from_memory {
            assert!(!late || !active(&record.expect("it exists")), "the cache outlives the revocation");
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    println!("{hidden} lookups were deceived for a while, {seen} were not");
    assert!(hidden > 0, "the liars deceived nobody: this tests nothing");
    assert!(seen > 20);
    assert!(cached.lookup_cached(&name).await.unwrap().is_some_and(|record| !active(&record)));
}

/// A liar in a row that only repeats an old version number changes nothing, and is named as behind.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_version_number_changes_nothing() {
    let mut cluster = Cluster::start(9).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let alice = Name::new("alice").unwrap();
    cluster.client.rotate(&cluster.administrator, alice.clone(), 1, entry(2, None)).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(4);
    let lie: Arc<Lie> = Arc::new(|path, _, document| {
        if path == "/v1/records/lookup" && document["versions"].is_array() {
            document["versions"] = json!([1]);
        }
    });
    let _liar = Liar::start(&cluster.manifest, LIAR, &cluster.server_dir(4), HONEST, lie).await.unwrap();
    for _ in 0..300 {
        let client = cluster.fresh_client();
        let found = client.lookup(&Name::new("alice").unwrap(), &LookupOptions::default()).await.unwrap();
        assert_eq!(found.record.unwrap().version, 2);
        if let Some(behind) = found.access.behind.first() {
            assert_eq!(*behind, (LIAR, 1));
            return;
        }
    }
    panic!("the liar was never asked");
}
