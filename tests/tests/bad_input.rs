//! Bad input to every route and command gets the status promised: never a panic, never a hang.

use kds_client::api::Problem;
use kds_client::{ExitStatus, Link};
use kds_tests::{Cluster, entry, status, stderr, stdout};
use quorum::answer::Receipt;
use quorum::record::Name;
use quorum::request::{Operation, SignedRequest};
use quorum::signing::SigningKey;
use quorum::{Hash, ServerId};
use serde_json::{Value, json};
use std::time::Duration;

/// Sends a body and expects this status with a problem document of this type.
async fn expect(
    link: &Link,
    method: &str,
    path: &str,
    body: impl Into<Vec<u8>>,
    status: u16,
    kind: &str,
) -> Problem {
    let sent = tokio::time::timeout(Duration::from_secs(20), link.send(method, path, body.into())).await;
    let (got, bytes) = sent.unwrap_or_else(|_| panic!("{method} {path} hangs")).unwrap();
    let text = String::from_utf8_lossy(&bytes);
    assert_eq!(got, status, "{method} {path}: {text}");
    let problem: Problem =
        serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{method} {path}: {e}: {text}"));
    assert_eq!(
        (problem.kind.as_str(), problem.status),
        (format!("urn:kds:{kind}").as_str(), status),
        "{path}: {text}"
    );
    assert!(problem.detail.len() > 5, "{path}: an error says what happened");
    problem
}

fn register(name: &str) -> Operation {
    Operation::Register { name: Name::new(name).unwrap(), entry: entry(1, None) }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_refuses_nonsense_with_a_problem_document() {
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.level().await.unwrap();
    let link = cluster.client.link(ServerId(2)).unwrap().clone();
    let key = cluster.administrator.clone();

    // Bodies.
    let good = serde_json::to_value(cluster.client.sign(&key, 1, register("bob"))).unwrap();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut document = good.clone();
        change(&mut document);
        document.to_string()
    };
    let text = good.to_string();
    let deep = "[".repeat(100_000);
    for (body, why) in [
        ("".to_owned(), "empty"),
        ("{".to_owned(), "broken"),
        ("[]".to_owned(), "another type"),
        (deep, "deep"),
        ("\u{0}\u{1}".to_owned(), "bytes"),
        (text.replacen('{', "{\"signature\":\"AA==\",", 1), "a field twice"),
        (changed(&|d| d["extra"] = json!(1)), "an unknown field"),
        (changed(&|d| d["request"]["extra"] = json!(1)), "an unknown field inside"),
        (changed(&|d| d["signature"] = json!("not base64!")), "wrong base64"),
        (changed(&|d| d["signature"] = json!("AAAA")), "a short signature"),
        (changed(&|d| d["request"]["client"] = json!("AAAA")), "a short key"),
        (changed(&|d| d["request"]["expiry"] = json!("tomorrow")), "no time"),
        (changed(&|d| d["request"]["expiry"] = json!(5)), "a number for a time"),
        (changed(&|d| d["request"]["sequence"] = json!(-1)), "a negative number"),
        (changed(&|d| d["request"]["operation"] = json!({ "destroy": {} })), "an unknown operation"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("Bob")), "capitals"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("b b")), "blanks"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("b\u{f6}b")), "non-ASCII"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("b\u{0}")), "NUL"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("b".repeat(300))), "300 bytes"),
        (changed(&|d| d["request"]["operation"]["register"]["name"] = json!("")), "no name"),
    ] {
        let problem = expect(&link, "POST", "/v1/requests", body, 400, "malformed").await;
        assert!(problem.receipt.is_none(), "{why}");
    }
    let huge = changed(&|d| d["signature"] = json!("A".repeat(300 * 1024)));
    expect(&link, "POST", "/v1/requests", huge, 413, "too-large").await;

    // Signatures.
    for change in [
        &(|d: &mut Value| d["request"]["sequence"] = json!(2)) as &dyn Fn(&mut Value),
        &|d| d["signature"] = json!(quorum::SignatureBytes([1; 64])),
        &|d| d["request"]["client"] = json!(Hash([0; 32])),
        &|d| d["request"]["operation"]["register"]["name"] = json!("carol"),
    ] {
        expect(&link, "POST", "/v1/requests", changed(change), 401, "bad-signature").await;
    }
    let other_cluster = quorum::ClusterId(Hash([5; 32]));
    let foreign =
        SignedRequest::sign(&other_cluster, &key, 9, kds_client::now().plus_ms(9_000), register("bob"));
    expect(&link, "POST", "/v1/requests", serde_json::to_vec(&foreign).unwrap(), 401, "bad-signature").await;

    // Expiries.
    let cluster_id = cluster.manifest.cluster_id();
    for expiry in [kds_client::now().plus_ms(3_600_000), quorum::Timestamp(1_000)] {
        let request = SignedRequest::sign(&cluster_id, &key, 10, expiry, register("bob"));
        expect(&link, "POST", "/v1/requests", serde_json::to_vec(&request).unwrap(), 400, "expiry").await;
    }

    // Keys that are broken, or that may not do this.
    let mut broken = entry(1, None);
    broken.keys[0].algorithm = "ssh-ed25519".into();
    broken.keys[0].key.0 = vec![0; 51];
    let broken = Operation::Register { name: Name::new("bob").unwrap(), entry: broken };
    let body = serde_json::to_vec(&cluster.client.sign(&key, 11, broken)).unwrap();
    expect(&link, "POST", "/v1/requests", body, 400, "invalid").await;
    let mut unknown = entry(1, None);
    unknown.keys[0].algorithm = "rot13".into();
    let unknown = Operation::Register { name: Name::new("bob").unwrap(), entry: unknown };
    let body = serde_json::to_vec(&cluster.client.sign(&key, 12, unknown)).unwrap();
    assert!(expect(&link, "POST", "/v1/requests", body, 400, "invalid").await.receipt.is_some());
    let stranger = SigningKey::from_seed(&[77; 32]);
    let body = serde_json::to_vec(&cluster.client.sign(&stranger, 13, register("bob"))).unwrap();
    expect(&link, "POST", "/v1/requests", body, 403, "not-allowed").await;
    let body = serde_json::to_vec(&cluster.client.sign(&key, 14, register("alice"))).unwrap();
    assert!(expect(&link, "POST", "/v1/requests", body, 409, "conflict").await.receipt.is_some());

    // Other routes.
    let absent = expect(&link, "GET", "/v1/records/nobody", "", 404, "not-found").await;
    assert!(absent.answer.is_some(), "absence comes with its proof");
    expect(&link, "GET", "/v1/records/alice?version=7", "", 404, "not-found").await;
    for path in [
        "/v1/records/Alice",
        "/v1/records/a%20b",
        "/v1/records/%00",
        "/v1/records/%c3%b6",
        "/v1/records/%ff",
        &format!("/v1/records/{}", "a".repeat(300)),
        "/v1/records/alice?version=x",
        "/v1/records/alice?versions=1",
        "/v1/records?limit=-1",
        "/v1/records?limit=many",
        "/v1/records?colour=red",
        "/v1/records/Alice/history",
        "/v1/secrets/Alice",
        "/v1/secrets?limit=x",
    ] {
        expect(&link, "GET", path, "", 400, "malformed").await;
    }
    for path in ["/", "/v1", "/v2/records", "/v1/records/a/b", "/v1/records/../../etc/passwd", "/admin"] {
        expect(&link, "GET", path, "", 404, "no-route").await;
    }
    for (method, path) in [("DELETE", "/v1/records/alice"), ("GET", "/v1/requests"), ("PUT", "/v1/shares")] {
        expect(&link, method, path, "", 405, "method").await;
    }
    for body in ["{}", "{\"names\":1}", "{\"names\":[\"A\"]}", "x"] {
        expect(&link, "POST", "/v1/records/lookup", body, 400, "malformed").await;
    }
    let many = json!({ "names": vec!["alice"; 300] }).to_string();
    expect(&link, "POST", "/v1/records/lookup", many, 413, "too-large").await;
    for body in ["", "{}", "{\"secret\":\"A\",\"release\":1,\"with_ciphertext\":true}"] {
        expect(&link, "POST", "/v1/shares", body, 400, "malformed").await;
    }
    let unknown = "{\"secret\":\"none\",\"release\":1,\"with_ciphertext\":true}";
    expect(&link, "POST", "/v1/shares", unknown, 404, "not-found").await;

    // What answers well, still does, and nobody died of it.
    for path in [
        "/v1/records/alice",
        "/v1/records/alice?brief=true",
        "/v1/records",
        "/v1/records?limit=0",
        "/v1/records/alice/history",
        "/v1/servers",
        "/v1/completion",
        "/v1/secrets",
        "/v1/manifest",
        "/v1/status",
        "/healthz",
        "/readyz",
        "/metrics",
    ] {
        assert_eq!(link.send("GET", path, vec![]).await.unwrap().0, 200, "{path}");
    }
    let bulk =
        link.send("POST", "/v1/records/lookup", br#"{"names":["alice","nobody"]}"#.to_vec()).await.unwrap();
    assert_eq!(bulk.0, 200);
    for server in 0..4 {
        assert!(cluster.is_running(server));
        assert!(!cluster.log(server).contains("panicked"), "{}", cluster.log(server));
    }
}

/// The first answer comes back, whoever is asked, and nothing happens twice.
#[tokio::test(flavor = "multi_thread")]
async fn a_replayed_request_gets_its_first_answer() {
    let cluster = Cluster::start(4).await.unwrap();
    let request = cluster.client.sign(&cluster.administrator, 1, register("alice"));
    let body = serde_json::to_vec(&request).unwrap();
    let mut replies = Vec::new();
    for server in [0, 1, 2, 3, 0, 1] {
        let link = cluster.client.link(ServerId(server)).unwrap();
        let (status, bytes) = link.send("POST", "/v1/requests", body.clone()).await.unwrap();
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&bytes));
        let receipt: Receipt = serde_json::from_slice(&bytes).unwrap();
        replies.push(receipt.reply.value.unwrap());
    }
    assert!(replies.iter().all(|reply| *reply == replies[0]));
    // Another request under the same number: the first one's reply, recognisably not its own.
    let other = cluster.client.sign(&cluster.administrator, 1, register("bob"));
    let error = cluster.client.submit_signed(&other).await.unwrap_err();
    assert_eq!(error.exit_status(), ExitStatus::Conflict);
    let bob = cluster.client.lookup(&Name::new("bob").unwrap(), &Default::default()).await.unwrap();
    assert!(bob.record.is_none());
}

/// Connections that never finish what they start cost a place for a while, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn half_open_connections_do_not_hurt_others() {
    use tokio::io::AsyncWriteExt as _;
    let cluster = Cluster::start(4).await.unwrap();
    let entry = &cluster.manifest.servers[1];
    let mut held = Vec::new();
    for address in [entry.url.replace("https://", ""), entry.peer.clone()] {
        for garbage in [&b""[..], b"\x16\x03\x01\xff", b"GET / HTTP/1.1\r\n\r\n", &[0xff; 4096]] {
            for _ in 0..20 {
                let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
                let _ = stream.write_all(garbage).await;
                held.push(stream);
            }
        }
    }
    let written = cluster.register("alice", 1).await.unwrap();
    assert!(written.sequence.0 > 0);
    let link = cluster.client.link(ServerId(1)).unwrap();
    assert_eq!(link.send("GET", "/v1/records/alice?brief=true", vec![]).await.unwrap().0, 200);
    assert!(!cluster.log(1).contains("panicked"));
}

/// Whoever asks and never reads costs a place for 20 s, and no memory beyond an answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_is_let_go() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    const ASKED: usize = 20_000;
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let tls = kds_certs::https_client(&cluster.manifest.servers[1].certificate).unwrap();
    let address = cluster.manifest.servers[1].url.replace("https://", "");
    let tcp = tokio::net::TcpStream::connect(&address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls));
    let stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
    let (mut reading, mut writing) = tokio::io::split(stream);
    let writer = tokio::spawn(async move {
        for _ in 0..ASKED {
            let request = b"GET /v1/records/alice HTTP/1.1\r\nhost: x\r\n\r\n";
            if writing.write_all(request).await.is_err() {
                break;
            }
        }
        // The connection stays open for as long as the server lets it.
        writing
    });
    let link = cluster.client.link(ServerId(1)).unwrap();
    for _ in 0..25 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(link.send("GET", "/v1/records/alice", vec![]).await.unwrap().0, 200);
    }
    let mut received = Vec::new();
    let ended = tokio::time::timeout(Duration::from_secs(10), reading.read_to_end(&mut received)).await;
    assert!(ended.is_ok(), "the connection is still open");
    let answers = received.windows(15).filter(|bytes| bytes == b"HTTP/1.1 200 OK").count();
    assert!(answers < ASKED, "everything was answered although nothing was read: this tests nothing");
    writer.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_ends_with_the_status_promised() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let age = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p";
    std::fs::write(cluster.dir().join("key.age"), age).unwrap();
    std::fs::write(cluster.dir().join("broken.pub"), "ssh-ed25519 AAAA broken").unwrap();
    let expect = |cluster: &Cluster, args: &[&str], wanted: i32, says: &str| {
        let output = cluster.cli(args);
        let text = stdout(&output) + &stderr(&output);
        assert_eq!(status(&output), wanted, "{args:?}: {text}");
        assert!(text.contains(says), "{args:?} should say {says:?}: {text}");
    };
    assert_eq!(status(&cluster.cli(&["keygen", "--out", "owner.key"])), 0);
    assert_eq!(status(&cluster.cli(&["keygen", "--out", "stranger.key"])), 0);

    expect(
        &cluster,
        &["register", "alice", "--public-key", "key.age", "--owner", "owner.key.pub", "--meta", "team=red"],
        0,
        "version 1",
    );
    expect(&cluster, &["register", "alice", "--public-key", "key.age"], 7, "exists already");
    expect(&cluster, &["register", "bob", "--public-key", "broken.pub"], 6, "broken OpenSSH key");
    expect(&cluster, &["register", "bob", "--public-key", "owner.key"], 6, "not a public key");
    expect(&cluster, &["register", "bob", "--public-key", "none.pub"], 1, "cannot read");
    expect(&cluster, &["register", "bob"], 2, "--public-key");
    expect(&cluster, &["register", "Bob", "--public-key", "key.age"], 6, "lower case");
    expect(&cluster, &["register", &"b".repeat(300), "--public-key", "key.age"], 6, "255 bytes");
    expect(&cluster, &["register", "b b", "--public-key", "key.age"], 6, "lower case");
    expect(&cluster, &["register", "b\u{f6}b", "--public-key", "key.age"], 6, "lower case");
    expect(&cluster, &["register", "bob", "--public-key", "key.age", "--owner-only"], 6, "owner key");
    expect(&cluster, &["register", "bob", "--public-key", "key.age", "--not-after", "soon"], 2, "RFC 3339");
    expect(
        &cluster,
        &["--key", "stranger.key", "register", "bob", "--public-key", "key.age"],
        6,
        "refused by 3 servers",
    );
    expect(&cluster, &["--key", "owner.key", "register", "bob", "--public-key", "key.age"], 6, "not allowed");
    expect(&cluster, &["--key", "none.key", "register", "bob", "--public-key", "key.age"], 1, "keygen");

    expect(&cluster, &["lookup", "alice"], 0, "team: red");
    expect(&cluster, &["lookup", "alice", "--format", "age"], 0, age);
    expect(&cluster, &["lookup", "alice", "--format", "ssh"], 1, "no ssh form");
    expect(&cluster, &["lookup", "nobody"], 3, "absence is proved");
    expect(&cluster, &["lookup", "alice", "--version", "5"], 3, "does not exist");
    expect(&cluster, &["lookup", "Alice"], 6, "lower case");
    expect(&cluster, &["--key", "owner.key", "rotate", "alice", "--public-key", "key.age"], 0, "version 2");
    expect(&cluster, &["rotate", "nobody", "--public-key", "key.age"], 3, "does not exist");
    expect(&cluster, &["--key", "stranger.key", "revoke", "alice", "--reason", "x"], 6, "refused by");
    expect(&cluster, &["revoke", "alice", "--reason", "lost"], 0, "version 3");
    expect(&cluster, &["revoke", "alice", "--reason", "lost"], 7, "revoked");
    expect(&cluster, &["lookup", "alice"], 0, "REVOKED: lost");
    expect(&cluster, &["history", "alice"], 0, "version 1");
    expect(&cluster, &["history", "nobody"], 3, "does not exist");
    expect(&cluster, &["list", "--prefix", "ali"], 0, "alice  version 3  REVOKED");
    expect(&cluster, &["list", "--prefix", "zzz"], 0, "");

    // Proof files: with any byte changed, or under another manifest, they do not verify.
    expect(&cluster, &["lookup", "alice", "--proof", "proof.json"], 0, "alice");
    expect(&cluster, &["verify", "proof.json"], 0, "proved");
    let proof = std::fs::read_to_string(cluster.dir().join("proof.json")).unwrap();
    let tampered = proof.replacen("lost", "list", 1);
    assert_ne!(proof, tampered);
    std::fs::write(cluster.dir().join("tampered.json"), tampered).unwrap();
    expect(&cluster, &["verify", "tampered.json"], 4, "not the one in the certified state");
    std::fs::write(cluster.dir().join("garbage.json"), "{}").unwrap();
    expect(&cluster, &["verify", "garbage.json"], 4, "not a proof file");
    let other = Cluster::start(4).await.unwrap();
    let moved = other.dir().join("proof.json");
    std::fs::write(&moved, &proof).unwrap();
    expect(&other, &["verify", moved.to_str().unwrap()], 4, "another cluster");

    // Imports name each line.
    let csv = format!("name,public_key,owner\ncarol,{age},\nDave,{age},\nerin,nonsense,\n");
    std::fs::write(cluster.dir().join("names.csv"), csv).unwrap();
    expect(&cluster, &["import", "names.csv"], 6, "line 3: Dave");
    expect(&cluster, &["lookup", "carol"], 0, "carol");
    std::fs::write(cluster.dir().join("empty.csv"), "").unwrap();
    expect(&cluster, &["import", "empty.csv"], 2, "holds no names");
    std::fs::write(
        cluster.dir().join("bad.jsonl"),
        "{\"name\":\"x\"}\n{nonsense\n{\"name\":\"y\",\"colour\":1}\n",
    )
    .unwrap();
    expect(&cluster, &["import", "bad.jsonl"], 6, "3 of 3 names were refused");

    // Secrets.
    let put = cluster.cli_with(
        &["secret", "put", "plan", "--in", "-", "--reader", "owner.key.pub"],
        &[],
        "attack at dawn",
    );
    assert_eq!(status(&put), 0, "{}", stderr(&put));
    expect(&cluster, &["secret", "get", "plan"], 0, "attack at dawn");
    expect(&cluster, &["--key", "owner.key", "secret", "get", "plan"], 0, "attack at dawn");
    expect(&cluster, &["--key", "owner.key", "secret", "list"], 0, "plan  reader");
    expect(&cluster, &["--key", "stranger.key", "secret", "get", "plan"], 6, "refused by");
    expect(&cluster, &["--key", "owner.key", "secret", "delete", "plan"], 6, "not allowed");
    expect(&cluster, &["secret", "get", "none"], 3, "no such secret");
    expect(&cluster, &["secret", "put", "plan", "--in", "key.age"], 7, "exists already");
    expect(&cluster, &["secret", "put", "plan", "--in", "key.age", "--replace"], 0, "deposited");
    expect(&cluster, &["secret", "get", "plan"], 0, age);
    expect(&cluster, &["secret", "releases", "plan"], 0, "to ");
    expect(&cluster, &["secret", "put", "Plan", "--in", "key.age"], 6, "lower case");
    expect(&cluster, &["secret", "put", "x", "--in", "none"], 1, "cannot read");
    std::fs::write(cluster.dir().join("big"), vec![0; 70_000]).unwrap();
    expect(&cluster, &["secret", "put", "big", "--in", "big"], 6, "65536");
    expect(&cluster, &["secret", "delete", "plan"], 0, "deleted");
    expect(&cluster, &["secret", "get", "plan"], 3, "no such secret");
    expect(&cluster, &["secret", "releases", "plan"], 3, "does not exist");

    // Too few servers.
    let status_document: Value = serde_json::from_str(&stdout(&cluster.cli(&["status", "--json"]))).unwrap();
    assert_eq!(
        (&status_document["n"], &status_document["servers"][3]["reachable"]),
        (&json!(4), &json!(true))
    );
    cluster.kill(2);
    cluster.kill(3);
    expect(&cluster, &["--timeout", "3s", "lookup", "carol"], 5, "not enough servers");
    expect(
        &cluster,
        &["--timeout", "3s", "register", "frank", "--public-key", "key.age"],
        5,
        "not enough servers",
    );
    expect(&cluster, &["status"], 5, "unreachable");
    // What is not fresh is not believed.
    tokio::time::sleep(Duration::from_millis(5_500)).await;
    expect(&cluster, &["--timeout", "3s", "lookup", "carol", "--consistency", "any"], 5, "ms old");
    expect(
        &cluster,
        &["--timeout", "3s", "lookup", "carol", "--consistency", "any", "--max-age", "60s"],
        0,
        "carol",
    );
}
