//! One server of nine answers lookups with every kind of lie, over real HTTPS. The client always
//! returns the true record, and names the liar.

use kds_client::LookupOptions;
use kds_tests::liar::{Liar, Lie};
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::record::Name;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

const LIAR: ServerId = ServerId(4);
const HONEST: ServerId = ServerId(0);

fn is_full_lookup(path: &str) -> bool {
    path.starts_with("/v1/records/alice") && !path.contains("brief")
}

/// A lie about full answers to lookups of alice.
fn about_records(change: impl Fn(&mut Value) + Send + Sync + 'static) -> Arc<Lie> {
    Arc::new(move |path, _status, document| {
        if is_full_lookup(path) {
            change(document);
        }
    })
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
    let (_, old) =
        cluster.client.link(HONEST).unwrap().send("GET", "/v1/records/alice", vec![]).await.unwrap();
    let old: Value = serde_json::from_slice(&old).unwrap();
    cluster.client.rotate(&cluster.administrator, alice, 1, entry(2, None)).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(4);

    let changed_key = about_records(|document| {
        document["current"]["value"]["entry"]["keys"][0]["key"] = json!(quorum::Hash([9; 32]));
    });
    expect_caught(&cluster, "a changed key", changed_key).await;

    let mallory = cluster.client.link(HONEST).unwrap();
    let (_, other) = mallory.send("GET", "/v1/records/mallory", vec![]).await.unwrap();
    let other: Value = serde_json::from_slice(&other).unwrap();
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

    let absent: Arc<Lie> = Arc::new(|path, status, document| {
        if is_full_lookup(path) {
            document["current"]["value"] = Value::Null;
            let answer = document.take();
            *status = 404;
            *document = json!({
                "type": "urn:kds:not-found", "title": "", "status": 404, "detail": "", "answer": answer,
            });
        }
    });
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
            document["current"]["proof"]["steps"] = json!([]);
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
        if path.contains("brief") {
            document["version"] = json!(99);
        } else if is_full_lookup(path) {
            document["current"]["value"]["version"] = json!(99);
        }
    });
    expect_caught(&cluster, "a newer version that is not proved", newer).await;
    let refusing: Arc<Lie> = Arc::new(|path, status, document| {
        if path.starts_with("/v1/records/alice") {
            *status = 403;
            *document =
                json!({ "type": "urn:kds:not-allowed", "title": "no", "status": 403, "detail": "go away" });
        }
    });
    expect_caught(&cluster, "a refusal of what everyone may read", refusing).await;
}

/// A liar in a row that only repeats an old version number is outvoted, and named as behind.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_version_number_changes_nothing() {
    let mut cluster = Cluster::start(9).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let alice = Name::new("alice").unwrap();
    cluster.client.rotate(&cluster.administrator, alice.clone(), 1, entry(2, None)).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(4);
    let lie: Arc<Lie> = Arc::new(|path, _, document| {
        if path.contains("brief") {
            document["version"] = json!(1);
        }
    });
    expect_caught(&cluster, "an old version number", lie).await;
}
