//! Files that strangers offer, and what is in other people's text.

use kds_client::manifest_file;
use quorum::answer::{PROOF_FORMAT, ProofFile, RecordAnswer};
use quorum::certificate::{Checkpoint, VoteBook};
use quorum::codec::encode;
use quorum::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::map::Map;
use quorum::record::{Change, Entry, KeyMaterial, Name, Record, Status};
use quorum::signing::{KeyCertificate, KeyPurpose, KeyStatement, SigningKey, Voter};
use quorum::state::{ServerKeys, layout};
use quorum::{Blob, PublicKey, Thresholds};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

fn client(args: &[&str], folder: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kds-client")).args(args).current_dir(folder).output().expect("it starts")
}

fn manifest() -> (Manifest, Vec<SigningKey>) {
    let identities: Vec<_> = (1..=4).map(|seed| SigningKey::from_seed(&[seed; 32])).collect();
    let thresholds = Thresholds::plan(4, None, None).unwrap();
    let grid = quorum::grid::Grid::new(thresholds);
    let entry = |(id, identity): (ServerId, &SigningKey)| ServerEntry {
        id,
        row: grid.row_of(id) as u16,
        column: grid.column_of(id) as u16,
        url: format!("https://127.0.0.1:{}", 7_000 + 2 * id.index()),
        peer: format!("127.0.0.1:{}", 7_001 + 2 * id.index()),
        identity: identity.public(),
        certificate: Blob(vec![1]),
    };
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        epoch_seconds: 30,
        administrators_needed: 1,
        administrators: vec![SigningKey::from_seed(&[200; 32]).public()],
        thresholds,
        servers: grid.servers().zip(&identities).map(entry).collect(),
    };
    (manifest, identities)
}

fn record(version: u64, status: Status) -> Record {
    let entry = Entry {
        keys: vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![version as u8; 32]) }],
        owner: None,
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: Default::default(),
    };
    let updated = Change { sequence: Sequence(version), time: Timestamp(1_700_000_000_000 + version) };
    Record { name: Name::new("alice").unwrap(), version, status, entry, updated }
}

/// Alice's first key was stolen; version 2 is revoked. A true proof of that state, about `version`.
fn proof(folder: &Path, version: Option<u64>, reason: &str) {
    let (manifest, identities) = manifest();
    std::fs::write(folder.join("manifest.toml"), manifest_file::to_text(&manifest).unwrap()).unwrap();
    let cluster = manifest.cluster_id();
    let name = Name::new("alice").unwrap();
    let revoked = Status::Revoked { reason: reason.into(), by: PublicKey([3; 32]) };
    let entries = [
        (layout::history_key(&name, 1), encode(&record(1, Status::Active))),
        (layout::name_key(&name), encode(&record(2, revoked))),
    ];
    let snapshot = Map::from_entries(cluster, entries).seal();
    let statement = Checkpoint {
        sequence: Sequence(9),
        root: snapshot.root(),
        time: Timestamp(1_800_000_000_000),
        epoch: Epoch(0),
        attempt: 0,
    };
    let mut book = VoteBook::default();
    for (i, identity) in identities.iter().enumerate().take(3) {
        let voter =
            Voter::generate(cluster, identity, ServerId(i as u8), AttemptId::default(), 0, &mut rand::rng());
        assert!(book.add(voter.sign(statement)).unwrap());
    }
    let certificate = Arc::new(book.proof(&statement, 3).unwrap());
    let answer = RecordAnswer::look_up(&snapshot, &certificate, Sequence(0), &name, version);
    let file =
        ProofFile { format: PROOF_FORMAT, cluster: cluster.0, name, version, answer, membership: vec![] };
    std::fs::write(folder.join("proof.json"), serde_json::to_string(&file).unwrap()).unwrap();
}

fn verify(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let output = client(&[&["--manifest", "manifest.toml", "verify"][..], args].concat(), folder);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// In the state that the proof is of, alice is revoked. What is told of it must not look as if version 1 were in force
/// at that time.
#[test]
fn a_proof_of_an_earlier_version_says_that_it_is_one() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), Some(1), "stolen");
    let (status, out, err) = verify(folder.path(), &["proof.json"]);
    assert_eq!(status, 0, "{err}");
    eprintln!("{out}{err}");
    let all = format!("{out}{err}").to_lowercase();
    assert!(
        all.contains("earlier") || all.contains("not current") || all.contains("revoked"),
        "nothing says that version 1 was not alice's record then:\n{out}{err}"
    );
}

/// The same for scripts.
#[test]
fn json_of_an_earlier_version_says_that_it_is_one() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), Some(1), "stolen");
    let (status, out, err) = verify(folder.path(), &["--json", "proof.json"]);
    assert_eq!(status, 0, "{err}");
    let earlier: serde_json::Value = serde_json::from_str(&out).unwrap();
    eprintln!("{earlier:#}");
    assert_eq!(earlier["record"]["status"], "active");
    assert!(
        earlier.get("current").is_some()
            || earlier.get("version").is_some()
            || earlier.get("asked").is_some(),
        "nothing says that it was asked for an earlier version: {earlier:#}"
    );
}

/// The proof that there is no version 99 of alice is not the proof that there is no alice.
#[test]
fn json_of_an_absent_version_is_not_that_of_an_absent_name() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), Some(99), "stolen");
    let (status, out, err) = verify(folder.path(), &["--json", "proof.json"]);
    assert_eq!(status, 0, "{err}");
    let shown: serde_json::Value = serde_json::from_str(&out).unwrap();
    eprintln!("{shown:#}");
    assert!(out.contains("99"), "alice exists, and a script is told this with status 0:\n{out}");
}

/// Other people's text in a record.
#[test]
fn a_reason_controls_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    proof(
        folder.path(),
        None,
        "\u{1b}[2J\u{1b}[H\u{1b}]0;owned\u{7}alice  version 2\r\n  ed25519 SHA256:good",
    );
    let (status, out, err) = verify(folder.path(), &["proof.json"]);
    assert_eq!(status, 0, "{err}");
    assert!(!out.contains('\u{1b}'), "{out:?}");
}

/// What a file says that is no proof.
#[test]
fn a_strangers_file_controls_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), None, "x");
    let mut shown = Vec::new();
    for evil in [
        "{\"\\u001b[2J\\u001b[1;32mproved: so it was\": 1}".to_owned(),
        format!("{{\"{}\":1}}", "x".repeat(1_000_000)),
    ] {
        std::fs::write(folder.path().join("evil.json"), evil).unwrap();
        let (status, _, err) = verify(folder.path(), &["evil.json"]);
        assert_eq!(status, 4);
        if err.contains('\u{1b}') || err.len() > 10_000 {
            shown.push(format!("{} bytes: {:?}", err.len(), err.chars().take(120).collect::<String>()));
        }
    }
    assert!(shown.is_empty(), "{shown:#?}");
}

/// Files of other people that are to be imported or registered.
#[test]
fn an_import_and_a_key_file_control_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), None, "x");
    let dir = folder.path();
    assert_eq!(client(&["keygen", "--out", "k"], dir).status.code(), Some(0));
    std::fs::write(
        dir.join("names.json"),
        "{\"name\":\"\\u001b[2Jx\",\"public_key\":\"y\"}\n{\"\\u001b[2J\":1}\n",
    )
    .unwrap();
    std::fs::write(dir.join("names.csv"), "name,public_key\n\u{1b}[2Jx,y\n").unwrap();
    std::fs::write(dir.join("key.pem"), "-----BEGIN \u{1b}[2JX-----\nAAAA\n-----END \u{1b}[2JX-----\n")
        .unwrap();
    let mut shown = Vec::new();
    for args in [
        &["--manifest", "manifest.toml", "--key", "k", "import", "names.json"][..],
        &["--manifest", "manifest.toml", "--key", "k", "import", "names.csv"],
        &["--manifest", "manifest.toml", "--key", "k", "register", "a", "--public-key", "key.pem"],
    ] {
        let output = client(args, dir);
        let text =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        if text.contains('\u{1b}') {
            shown.push(format!("{args:?}: {text:?}"));
        }
    }
    assert!(shown.is_empty(), "{shown:#?}");
}

/// JSON on a terminal: control characters above 127, and those that turn text around, are as good as others.
#[test]
fn json_controls_no_terminal() {
    let folder = tempfile::tempdir().unwrap();
    proof(folder.path(), None, "\u{9b}2J\u{202e}x\u{7f}");
    let (status, out, err) = verify(folder.path(), &["--json", "proof.json"]);
    assert_eq!(status, 0, "{err}");
    assert!(!out.contains(['\u{9b}', '\u{202e}', '\u{7f}']), "{out:?}");
}

fn paths(value: &serde_json::Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        serde_json::Value::Object(object) => {
            object.iter().for_each(|(key, value)| paths(value, &format!("{at}/{key}"), all));
        }
        serde_json::Value::Array(values) => {
            values.iter().enumerate().for_each(|(i, value)| paths(value, &format!("{at}/{i}"), all));
        }
        _ => {}
    }
}

/// Every single change of a proof file: nothing that was changed verifies, and nothing panics.
#[test]
fn every_single_change_of_a_proof_file() {
    use serde_json::{Value, json};
    let folder = tempfile::tempdir().unwrap();
    let (manifest, _) = manifest();
    let manifest = Arc::new(manifest);
    let mut accepted = std::collections::BTreeMap::<String, usize>::new();
    let mut tried = 0;
    for version in [None, Some(1), Some(2), Some(99)] {
        proof(folder.path(), version, "x");
        let text = std::fs::read_to_string(folder.path().join("proof.json")).unwrap();
        let good: Value = serde_json::from_str(&text).unwrap();
        let mut all = Vec::new();
        paths(&good, "", &mut all);
        let subtrees: Vec<Value> = all.iter().map(|path| good.pointer(path).unwrap().clone()).collect();
        for path in &all {
            let mut others: Vec<Value> =
                [0u64, 1, 2, 3, 4, 99, 255, 256, 5_400, 5_401, 65_535, u64::from(u32::MAX), u64::MAX]
                    .map(|number| json!(number))
                    .to_vec();
            others.extend([
                Value::Null,
                json!([]),
                json!({}),
                json!("empty"),
                json!("AAAA"),
                json!("2026-01-01T00:00:00Z"),
                json!("bob"),
            ]);
            others.extend(subtrees.iter().cloned());
            if let Some(list) = good.pointer(path).unwrap().as_array() {
                let mut twice = list.clone();
                twice.extend(list.first().cloned());
                others.push(json!(twice));
                others.push(json!(list.iter().rev().collect::<Vec<_>>()));
                others.extend((0..list.len()).map(|i| {
                    let mut less = list.clone();
                    less.remove(i);
                    json!(less)
                }));
            }
            for other in others {
                let mut changed = good.clone();
                *changed.pointer_mut(path).unwrap() = other.clone();
                if changed == good {
                    continue;
                }
                tried += 1;
                let Ok(file) = serde_json::from_value::<ProofFile>(changed) else { continue };
                if let Ok(shown) = quorum::answer::Verifier::new(Arc::clone(&manifest)).proof_file(&file) {
                    let what = format!("{version:?} {path} = {other:.60} -> {:.60}", format!("{shown:?}"));
                    *accepted.entry(what).or_default() += 1;
                }
            }
        }
    }
    // A hint; an order that says nothing; other questions that the same proof answers truly.
    let harmless = ["/answer/complete =", "/certificate/votes =", "/certificate/keys =", " /version ="];
    accepted.retain(|what, _| !harmless.iter().any(|part| what.contains(part)));
    eprintln!("{tried} tried");
    assert!(accepted.is_empty(), "{accepted:#?}");
}

/// Every single change of evidence: nobody else is named, and nothing panics.
#[test]
fn every_single_change_of_evidence() {
    use quorum::evidence::{Evidence, EvidenceFile};
    use quorum::membership::Membership;
    use serde_json::{Value, json};
    let (manifest, identities) = manifest();
    let manifest = Arc::new(manifest);
    let cluster = manifest.cluster_id();
    let at = |sequence, root, time| Checkpoint {
        sequence: Sequence(sequence),
        root: quorum::Hash([root; 32]),
        time: Timestamp(time),
        epoch: Epoch(0),
        attempt: 0,
    };
    let voters: Vec<_> = identities
        .iter()
        .enumerate()
        .map(|(i, identity)| {
            Voter::generate(cluster, identity, ServerId(i as u8), AttemptId::default(), 0, &mut rand::rng())
        })
        .collect();
    let certificate = |of: [usize; 3], statement: Checkpoint| {
        let mut book = VoteBook::default();
        of.iter().for_each(|i| assert!(book.add(voters[*i].sign(statement)).unwrap()));
        Box::new(book.proof(&statement, 3).unwrap())
    };
    // A state in which server 1 has announced its keys.
    let (voting, purpose) = (*voters[1].certificate(), KeyPurpose::Sealing);
    let sealing = KeyStatement { purpose, key: PublicKey([9; 32]), ..voting.statement };
    let sealing = KeyCertificate::issue(&cluster, &identities[1], sealing);
    let keys = ServerKeys { voting, sealing, announced: Timestamp(3) };
    let snapshot = Map::from_entries(cluster, [(layout::server_key(ServerId(1)), encode(&keys))]).seal();
    let announced = Checkpoint { root: snapshot.root(), ..at(8, 0, 4) };
    let announced = Arc::new(*certificate([0, 2, 3], announced));
    let ((first, key), (second, _)) =
        (voters[1].sign(at(9, 1, 5)).stored(), voters[1].sign(at(9, 2, 5)).stored());
    let evidence = [
        Evidence::Votes { first, second: second.clone(), keys: vec![key] },
        Evidence::Dissent { certificate: certificate([0, 2, 3], at(9, 1, 5)), vote: second, key },
        Evidence::Certificates {
            first: certificate([0, 1, 2], at(9, 1, 5)),
            second: certificate([0, 2, 3], at(10, 2, 4)),
        },
    ];
    let membership = Membership::genesis(Arc::clone(&manifest));
    let (mut tried, mut accepted) = (0, Vec::new());
    for evidence in evidence {
        let file = EvidenceFile::new(&membership, evidence, Some((&announced, &snapshot)));
        let named = quorum::answer::Verifier::new(Arc::clone(&manifest)).evidence_file(&file).unwrap();
        let good = serde_json::to_value(&file).unwrap();
        let mut all = Vec::new();
        paths(&good, "", &mut all);
        let subtrees: Vec<Value> = all.iter().map(|path| good.pointer(path).unwrap().clone()).collect();
        for path in &all {
            let mut others: Vec<Value> =
                [0u64, 1, 2, 3, 4, 99, 255, 256, 65_535, u64::from(u32::MAX), u64::MAX]
                    .map(|number| json!(number))
                    .to_vec();
            others.extend([Value::Null, json!([]), json!({}), json!("AAAA"), json!("2026-01-01T00:00:00Z")]);
            others.extend(subtrees.iter().cloned());
            for other in others {
                let mut changed = good.clone();
                *changed.pointer_mut(path).unwrap() = other.clone();
                if changed == good {
                    continue;
                }
                tried += 1;
                let Ok(file) = serde_json::from_value::<EvidenceFile>(changed) else { continue };
                if let Ok(now) = quorum::answer::Verifier::new(Arc::clone(&manifest)).evidence_file(&file)
                    && now != named
                {
                    accepted.push(format!("{path} = {other:.60}: {now:?} instead of {named:?}"));
                }
            }
        }
    }
    eprintln!("{tried} tried");
    assert!(accepted.is_empty(), "{accepted:#?}");
}
