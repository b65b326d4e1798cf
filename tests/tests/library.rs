//! What services build on: signatures, TLS, watches, many names at once, limits, descriptions.

use kds_client::{Client, ClientError, ExitStatus, LookupOptions, Options, WatchEvent, keys};
use kds_tests::liar::{Liar, Lie};
use kds_tests::{Cluster, entry, status, stderr, stdout};
use quorum::ServerId;
use quorum::record::{Entry, KeyMaterial, Name};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn with_key(key: KeyMaterial) -> Entry {
    Entry { keys: vec![key], ..entry(1, None) }
}

fn run(folder: &Path, program: &str, arguments: &[&str]) {
    let done = Command::new(program).args(arguments).current_dir(folder).output();
    let done = done.unwrap_or_else(|e| panic!("install {program}: {e}"));
    assert!(done.status.success(), "{program} {arguments:?}: {}", stderr(&done));
}

/// Keys and signatures that openssl and ssh-keygen make.
#[tokio::test(flavor = "multi_thread")]
async fn signatures_of_real_tools_verify_and_others_do_not() {
    let cluster = Cluster::start(4).await.unwrap();
    let folder = cluster.dir();
    std::fs::write(folder.join("message"), "pay 5").unwrap();
    std::fs::write(folder.join("forged"), "pay 500").unwrap();
    let mut signed = Vec::new();
    for (kind, bits) in
        [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "2048")]
    {
        let key = format!("ssh-{kind}{bits}");
        run(folder, "ssh-keygen", &["-q", "-t", kind, "-b", bits, "-N", "", "-C", "c", "-f", &key]);
        run(folder, "ssh-keygen", &["-q", "-Y", "sign", "-n", "file", "-f", &key, "message"]);
        std::fs::rename(folder.join("message.sig"), folder.join(format!("{key}.sig"))).unwrap();
        signed.push((key.clone(), format!("{key}.pub")));
    }
    let openssl: [(&str, &[&str], &[&str]); 5] = [
        ("ed25519", &["-algorithm", "ed25519"], &[]),
        ("p256", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"], &["-digest", "sha256"]),
        ("p384", &["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"], &["-digest", "sha384"]),
        ("rsa", &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"], &["-digest", "sha256"]),
        (
            "pss",
            &["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
            &["-digest", "sha512", "-pkeyopt", "rsa_padding_mode:pss", "-pkeyopt", "rsa_pss_saltlen:digest"],
        ),
    ];
    for (what, make, sign) in openssl {
        let (key, public, signature) =
            (format!("pem-{what}.key"), format!("pem-{what}.pub"), format!("pem-{what}.sig"));
        run(folder, "openssl", &[&["genpkey", "-out", key.as_str()], make].concat());
        run(folder, "openssl", &["pkey", "-in", &key, "-pubout", "-out", &public]);
        let base = ["pkeyutl", "-sign", "-rawin", "-inkey", &key, "-in", "message", "-out", &signature];
        run(folder, "openssl", &[&base[..], sign].concat());
        signed.push((format!("pem-{what}"), public));
    }
    for (who, public) in &signed {
        let key = keys::parse(&std::fs::read(folder.join(public)).unwrap()).unwrap();
        let written = cluster.client.register(&cluster.administrator, name(who), with_key(key)).await;
        assert!(written.unwrap().complete);
    }
    for (place, (who, _)) in signed.iter().enumerate() {
        let signature = format!("{who}.sig");
        let check = |name: &str, file: &str| {
            cluster.cli(&["check-signature", name, "--file", file, "--signature", &signature])
        };
        let good = check(who, "message");
        assert_eq!(status(&good), 0, "{who}: {}", stderr(&good));
        assert!(stdout(&good).contains(&format!("signed by {who} with ")), "{}", stdout(&good));
        assert_eq!(status(&check(who, "forged")), 4, "{who}: another message");
        let other = &signed[(place + 1) % signed.len()].0;
        assert_eq!(status(&check(other, "message")), 4, "{who}'s signature as {other}'s");
    }
    // In base64, as many tools write it.
    use base64::Engine as _;
    let raw = std::fs::read(folder.join("pem-ed25519.sig")).unwrap();
    std::fs::write(folder.join("b64.sig"), base64::engine::general_purpose::STANDARD.encode(raw) + "\n")
        .unwrap();
    let check =
        |who: &str| cluster.cli(&["check-signature", who, "--file", "message", "--signature", "b64.sig"]);
    assert_eq!(status(&check("pem-ed25519")), 0);
    assert_eq!(status(&check("nobody")), 3, "there is no such name, and that is proved");
    // Made for something else than files.
    run(folder, "ssh-keygen", &["-q", "-Y", "sign", "-n", "git", "-f", "ssh-ed25519256", "message"]);
    let other = cluster.cli(&[
        "check-signature",
        "ssh-ed25519256",
        "--file",
        "message",
        "--signature",
        "message.sig",
    ]);
    assert_eq!(status(&other), 4, "{}", stdout(&other));
    assert!(stderr(&other).contains("git"), "{}", stderr(&other));
    // A key that was withdrawn signs nothing any more.
    let revoke = cluster.client.revoke(&cluster.administrator, name("pem-ed25519"), 1, "lost".into());
    revoke.await.unwrap();
    let revoked = check("pem-ed25519");
    assert_eq!(status(&revoked), 4);
    assert!(stderr(&revoked).contains("revoked: lost"), "{}", stderr(&revoked));
}

/// All versions, in order, whoever dies or keeps something to himself.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_misses_nothing() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    cluster.hide_from_clients(3).unwrap();
    for server in 0..4 {
        cluster.run(server).unwrap();
    }
    // One server never tells of a change on its streams: it ends them after what it said first.
    let lie: Arc<Lie> = Arc::new(|path, _, document| {
        if path.contains("/watch") {
            *document = Value::Null;
        }
    });
    let folder = cluster.server_dir(3);
    let _liar = Liar::start(&cluster.manifest, ServerId(3), &folder, ServerId(0), lie).await.unwrap();
    cluster.ready().await.unwrap();

    let client = cluster.fresh_client();
    let mut watch = client.watch(&name("alice"), 0);
    assert_eq!(watch.next().await.unwrap(), WatchEvent::Absent);
    let mut late = client.watch(&name("alice"), 3);
    let watching = tokio::spawn(async move {
        let mut versions = Vec::new();
        while versions.last() != Some(&8) {
            match watch.next().await {
                Ok(WatchEvent::Version(record)) => versions.push(record.version),
                Ok(WatchEvent::Absent) => panic!("told twice"),
                // Too few servers for a moment: it goes on.
                Err(error) => assert_eq!(error.exit_status(), ExitStatus::Unavailable, "{error}"),
            }
        }
        versions
    });
    cluster.register("alice", 1).await.unwrap();
    for version in 1..8 {
        let next = entry(version as u8 + 1, None);
        cluster.client.rotate(&cluster.administrator, name("alice"), version, next).await.unwrap();
        if version == 3 {
            cluster.kill(1);
        }
        if version == 5 {
            cluster.run(1).unwrap();
            cluster.ready().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let versions = tokio::time::timeout(Duration::from_secs(20), watching).await.unwrap().unwrap();
    assert_eq!(versions, [1, 2, 3, 4, 5, 6, 7, 8]);
    // One that begins later is told what came between.
    for expected in 4..=8 {
        let WatchEvent::Version(record) = late.next().await.unwrap() else { panic!("a version") };
        assert_eq!(record.version, expected);
    }
    // From the command line, for scripts.
    cluster.client.rotate(&cluster.administrator, name("alice"), 8, entry(9, None)).await.unwrap();
    let output = cluster.cli(&["watch", "alice", "--since", "8", "--events", "1", "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&stdout(&output)).unwrap()["version"], 9);
}

/// A change comes over the stream: the next look by a row is half a minute away here.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_is_told_at_once() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let options = Options { max_age: Duration::from_secs(60), ..Options::default() };
    let client = Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let mut watch = client.watch(&name("alice"), 0);
    assert!(matches!(watch.next().await.unwrap(), WatchEvent::Version(_)));
    cluster.client.rotate(&cluster.administrator, name("alice"), 1, entry(2, None)).await.unwrap();
    let told =
        tokio::time::timeout(Duration::from_secs(15), watch.next()).await.expect("it waits for a look");
    let WatchEvent::Version(record) = told.unwrap() else { panic!("a version") };
    assert_eq!(record.version, 2);
}

/// Many names in few requests, each verified; a name's answer in memory is renewed once for all who wait.
#[tokio::test(flavor = "multi_thread")]
async fn many_lookups_share_requests() {
    let cluster = Cluster::start(9).await.unwrap();
    let names: Vec<_> = (0..300).map(|i| name(&format!("name-{i}"))).collect();
    let mut writing = tokio::task::JoinSet::new();
    for name in names.iter().take(200).cloned() {
        let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
        writing.spawn(async move { client.register(&key, name, entry(7, None)).await.unwrap() });
    }
    while writing.join_next().await.is_some() {}
    cluster.level().await.unwrap();
    let asked = async || {
        let mut requests = 0;
        for server in 0..9 {
            let link = cluster.client.link(ServerId(server)).unwrap();
            let (_, text) = link.send("GET", "/metrics", vec![]).await.unwrap();
            let text = String::from_utf8(text).unwrap();
            let lines = text.lines().filter(|line| line.contains("route=\"/v1/records/lookup\""));
            requests += lines.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum::<u64>();
        }
        requests
    };
    let client = cluster.fresh_client();
    let before = asked().await;
    let found = client.lookup_many(&names, &LookupOptions::default()).await;
    let requests = asked().await - before;
    for (i, found) in found.into_iter().enumerate() {
        let found = found.unwrap();
        assert_eq!(found.record.is_some(), i < 200, "name {i}");
        assert!(found.complete);
    }
    println!("300 lookups of three servers each took {requests} requests");
    assert!(requests < 90, "300 lookups took {requests} requests");

    let before = asked().await;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (client, name) = (client.clone(), names[0].clone());
        waiting.spawn(async move { client.lookup_cached(&name).await.unwrap().unwrap() });
    }
    while let Some(record) = waiting.join_next().await {
        assert_eq!(record.unwrap().version, 1);
    }
    let requests = asked().await - before;
    assert!(requests <= 6, "200 lookups of one name, from memory, took {requests} requests");
}

/// A client whose clock is wrong is told so, and not that all servers lie.
#[tokio::test(flavor = "multi_thread")]
async fn the_odd_clock_is_named() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    for (seconds, says) in [(600, "ahead"), (-600, "behind")] {
        let clock = cluster.clock_off_by(seconds).unwrap();
        let environment: Vec<_> = clock.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let output = cluster.cli_with(&["--timeout", "5s", "lookup", "alice"], &environment, "");
        assert_eq!(status(&output), 4, "{}", stderr(&output));
        let text = stderr(&output);
        assert!(text.contains("this machine's clock is") && text.contains(says), "{text}");
    }
    let output = cluster.cli(&["lookup", "alice"]);
    assert_eq!(status(&output), 0, "{}", stderr(&output));
}

/// Who asks too much is refused with a time to come back; others notice nothing.
#[tokio::test(flavor = "multi_thread")]
async fn one_greedy_address_does_not_starve_another() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    for server in 0..4 {
        cluster.limit_requests(server, 200).unwrap();
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let url = format!("{}/v1/records/alice", cluster.manifest.servers[0].url);
    let curl = |from: &str| {
        let arguments = ["-sk", "-D", "-", "-o", "/dev/null", "--interface", from, "--parallel-max", "1"];
        let output = Command::new("curl").args(arguments).args([url.as_str(); 30]).output();
        stdout(&output.expect("install curl"))
    };
    let mut refused = String::new();
    for _ in 0..40 {
        refused = curl("127.0.0.1");
        if refused.contains(" 429 ") {
            break;
        }
    }
    let head = refused.split("\r\n\r\n").find(|head| head.contains(" 429 ")).expect("it was never refused");
    let wait = head.lines().find_map(|line| line.strip_prefix("retry-after: "));
    assert!(
        wait.is_some_and(|seconds| seconds.trim().parse::<u64>().is_ok_and(|s| (1..=5).contains(&s))),
        "{head}"
    );
    let modest = curl("127.0.0.2");
    assert!(modest.contains(" 200 ") && !modest.contains(" 429 "), "{modest}");
    // The client goes on to servers that have time, and comes back.
    let found = cluster.fresh_client().lookup(&name("alice"), &LookupOptions::default()).await;
    assert!(found.unwrap().record.is_some());
}

/// What the servers answer is what their OpenAPI document says.
#[tokio::test(flavor = "multi_thread")]
async fn answers_are_as_described() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let carol = quorum::signing::SigningKey::from_seed(&[3; 32]);
    let owned = kds_tests::entry(1, Some(&carol));
    cluster.client.register(&cluster.administrator, name("carol"), owned.clone()).await.unwrap();
    cluster.client.rotate(&carol, name("carol"), 1, owned).await.unwrap();
    let owner: String = carol.public().0.iter().map(|byte| format!("{byte:02x}")).collect();
    let revoked = cluster.register("bob", 1).await.unwrap();
    cluster.client.revoke(&cluster.administrator, name("bob"), 1, "lost".into()).await.unwrap();
    cluster.client.put_secret(&cluster.administrator, &name("s"), b"x", &[], false, false).await.unwrap();
    cluster.level().await.unwrap();
    let link = cluster.client.link(ServerId(1)).unwrap();
    let get = async |path: &str| {
        let (code, body) = link.send("GET", path, vec![]).await.unwrap();
        (code, serde_json::from_slice::<Value>(&body).unwrap())
    };
    let (_, described) = get("/v1/openapi.json").await;
    let check = |schema: &str, answer: &Value| {
        let mut root = described["components"]["schemas"][schema].clone();
        assert!(root.is_object(), "{schema} is not described");
        root["components"] = described["components"].clone();
        let validator = jsonschema::validator_for(&root).unwrap();
        let errors: Vec<_> =
            validator.iter_errors(answer).map(|e| format!("{e} at {}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{schema}: {errors:#?}");
    };
    for (path, code, schema) in [
        ("/v1/records/alice", 200, "RecordAnswer"),
        ("/v1/records/bob?version=1", 200, "RecordAnswer"),
        ("/v1/records/alice?brief=true", 200, "BriefAnswer"),
        ("/v1/records/nobody", 404, "Problem"),
        ("/v1/records/Nobody", 400, "Problem"),
        ("/v1/records", 200, "PageAnswer"),
        ("/v1/records/bob/history", 200, "HistoryAnswer"),
        ("/v1/servers", 200, "PageAnswer"),
        ("/v1/administrators", 200, "PageAnswer"),
        ("/v1/decisions", 200, "PageAnswer"),
        (&format!("/v1/space/{}", "0a".repeat(32)), 200, "SpaceAnswer"),
        (&format!("/v1/space/{owner}"), 200, "SpaceAnswer"),
        ("/v1/space/0A", 400, "Problem"),
        ("/v1/completion", 200, "Completion"),
        ("/v1/secrets", 200, "PageAnswer"),
        ("/v1/secrets/s", 200, "SecretAnswer"),
        ("/v1/manifest", 200, "Manifest"),
        ("/v1/membership?from=0", 200, "MembershipAnswer"),
        ("/v1/status", 200, "ServerStatus"),
    ] {
        let (got, answer) = get(path).await;
        assert_eq!(got, code, "{path}");
        check(schema, &answer);
        assert!(described["paths"].as_object().unwrap().len() > 10);
    }
    let question = json!({ "names": ["alice", "nobody"], "brief": ["bob"] });
    check("BulkQuestion", &question);
    let (_, body) = link.send("POST", "/v1/records/lookup", question.to_string().into()).await.unwrap();
    check("BulkAnswer", &serde_json::from_slice(&body).unwrap());
    check("Receipt", &serde_json::to_value(&*revoked.receipt).unwrap());
    let client: String = cluster.administrator.public().0.iter().map(|byte| format!("{byte:02x}")).collect();
    let (code, none) = get(&format!("/v1/requests/{client}/77")).await;
    assert_eq!((code, &none["reply"]["value"]), (200, &Value::Null));
    check("Receipt", &none);
    let (code, problem) = get("/v1/requests/0A/77").await;
    assert_eq!(code, 400);
    check("Problem", &problem);
    let request = cluster.client.sign(
        &cluster.administrator,
        77,
        quorum::request::Operation::Delete { secret: name("s") },
    );
    check("SignedRequest", &serde_json::to_value(&request).unwrap());
    // A validator that accepts anything would show nothing.
    let wrong = json!({ "version": "one", "certified": 1 });
    let brief = jsonschema::validator_for(&described["components"]["schemas"]["BriefAnswer"]).unwrap();
    assert!(!brief.is_valid(&wrong));
}

/// Certificates that contradict each other, which takes more than f liars, are kept as evidence that
/// names them, and that others can check.
#[tokio::test(flavor = "multi_thread")]
async fn evidence_is_kept_and_can_be_checked_by_others() {
    use kds_client::keystore::{self, SecretKind};
    use quorum::signing::{Statement as _, Voter};
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(3);
    // Three of four conspire: they sign another state.
    let identities: Vec<_> = (0..3)
        .map(|server| {
            let path = cluster.server_dir(server).join("identity.key");
            keystore::read_signing_key(&path, SecretKind::IdentityKey, None).unwrap()
        })
        .collect();
    let cluster_id = cluster.manifest.cluster_id();
    let lie: Arc<Lie> = Arc::new(move |path, _, document| {
        if path != "/v1/records/lookup" || !document["certificate"].is_object() {
            return;
        }
        let mut certificate: quorum::certificate::Certificate =
            serde_json::from_value(document["certificate"].clone()).unwrap();
        certificate.statement.root = quorum::Hash([9; 32]);
        let attempt = certificate.statement.attempt();
        let votes = identities.iter().enumerate().map(|(server, identity)| {
            let id = ServerId(server as u8);
            let voter = Voter::generate(cluster_id, identity, id, attempt, 0, &mut rand::rng());
            voter.sign(certificate.statement).vote()
        });
        (certificate.votes, certificate.keys) = votes.unzip();
        document["certificate"] = serde_json::to_value(&certificate).unwrap();
    });
    let folder = cluster.server_dir(3);
    let _liar = Liar::start(&cluster.manifest, ServerId(3), &folder, ServerId(0), lie).await.unwrap();
    let kept = cluster.dir().join("evidence");
    let options =
        Options { evidence: Some(kept.clone()), timeout: Duration::from_secs(5), ..Options::default() };
    let client = Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let files = || std::fs::read_dir(&kept).map_or(vec![], |dir| dir.map(|e| e.unwrap().path()).collect());
    for _ in 0..1_000 {
        let found: Result<_, ClientError> = client.lookup(&name("alice"), &LookupOptions::default()).await;
        if let Ok(found) = found {
            assert_eq!(found.record.unwrap().version, 1);
        }
        if !files().is_empty() {
            break;
        }
        // There is a new certificate every second.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let files: Vec<std::path::PathBuf> = files();
    let file = files.first().expect("no evidence was kept").to_str().unwrap();
    let checked = cluster.cli(&["verify", file]);
    assert_eq!(status(&checked), 0, "{}", stderr(&checked));
    // The honest certificate has three signers too: at least two signed both.
    assert!(stdout(&checked).starts_with("proved: server "), "{}", stdout(&checked));
    let json: Value = serde_json::from_str(&stdout(&cluster.cli(&["--json", "verify", file]))).unwrap();
    assert!(json["culprits"].as_array().unwrap().len() >= 2, "{json}");
    // Changed, it proves nothing.
    let text = std::fs::read_to_string(file).unwrap();
    let forged = cluster.dir().join("forged.json");
    std::fs::write(&forged, text.replacen("\"sequence\": ", "\"sequence\": 1", 1)).unwrap();
    assert_eq!(status(&cluster.cli(&["verify", forged.to_str().unwrap()])), 4);
}

/// Whichever byte of a proof file is changed, it proves nothing else than before.
#[tokio::test(flavor = "multi_thread")]
async fn a_proof_file_with_any_byte_changed_proves_nothing_else() {
    use quorum::answer::{PROOF_FORMAT, ProofFile, Verifier};
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.register("bob", 2).await.unwrap();
    let found = cluster.client.lookup(&name("alice"), &LookupOptions::default()).await.unwrap();
    let id = cluster.manifest.cluster_id().0;
    let file = ProofFile {
        format: PROOF_FORMAT,
        cluster: id,
        name: name("alice"),
        version: None,
        answer: found.answer,
        membership: vec![],
    };
    let verify = |bytes: &[u8]| {
        let file: ProofFile = serde_json::from_slice(bytes).ok()?;
        let record = Verifier::new(Arc::clone(&cluster.manifest)).proof_file(&file).ok()?;
        Some((file.name.clone(), file.version, record, file.answer.certificate.statement))
    };
    let good = serde_json::to_vec(&file).unwrap();
    let proved = verify(&good).expect("it holds as it is");
    let mut refused = 0;
    for place in 0..good.len() {
        for flip in [1, 32] {
            let mut changed = good.clone();
            changed[place] ^= flip;
            match verify(&changed) {
                None => refused += 1,
                // A hint that nobody relies on, or the same thing written differently.
                Some(still) => assert_eq!(still, proved, "byte {place}"),
            }
        }
    }
    assert!(refused > good.len(), "{refused} of {} changes were refused", 2 * good.len());
    // Under another cluster's manifest nothing holds.
    let other = Cluster::new(4, &[]).unwrap();
    assert!(Verifier::new(Arc::clone(&other.manifest)).proof_file(&file).is_err());
}

/// The library's examples do what they say.
#[tokio::test(flavor = "multi_thread")]
async fn the_examples_work() {
    let cluster = Cluster::start(4).await.unwrap();
    run(cluster.dir(), "ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "c", "-f", "key"]);
    let key = keys::parse(&std::fs::read(cluster.dir().join("key.pub")).unwrap()).unwrap();
    cluster.client.register(&cluster.administrator, name("alice"), with_key(key)).await.unwrap();
    for (example, who, says) in [
        (
            "service",
            "alice",
            "version 1, from servers [\nssh-ed25519 SHA256:\nalice: there\nnobody: not there\nrefused: alice: the signature does not verify\nwatching from version 1",
        ),
        ("service", "nobody", "nobody does not exist"),
        ("blocking", "alice", "version 1\nTLS is configured"),
    ] {
        let program = kds_tests::program(&format!("examples/{example}"));
        let manifest = cluster.dir().join("manifest.toml");
        let output = Command::new(program).arg(who).env("KDS_MANIFEST", manifest).output().unwrap();
        assert_eq!(status(&output), 0, "{example}: {}", stderr(&output));
        for line in says.lines() {
            assert!(stdout(&output).contains(line), "{example} should say {line:?}: {}", stdout(&output));
        }
    }
}
