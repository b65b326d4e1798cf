//! Real input: every certificate of the system's CA bundle and keys freshly made by ssh-keygen,
//! imported and looked up again byte for byte.

use kds_client::{LookupOptions, keys};
use kds_tests::{Cluster, status, stderr, stdout};
use quorum::record::Name;
use std::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn the_ca_bundle_and_ssh_keys_come_back_byte_for_byte() {
    let cluster = Cluster::start(4).await.unwrap();
    let bundle = std::fs::read_to_string("/etc/ssl/certs/ca-certificates.crt")
        .expect("install ca-certificates: this test wants real certificates");
    let mut expected = Vec::new();
    let mut lines = String::new();
    let end = "-----END CERTIFICATE-----";
    for (i, pem) in bundle.split_inclusive(end).filter(|part| part.contains(end)).enumerate() {
        let name = format!("ca/{i}");
        let line = serde_json::json!({ "name": name, "public_key": pem.trim() });
        lines.push_str(&format!("{line}\n"));
        expected.push((name, pem.trim().to_owned() + "\n", None));
    }
    assert!(expected.len() > 50, "a real bundle has many certificates, this has {}", expected.len());

    for (kind, bits) in
        [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "3072")]
    {
        let path = cluster.dir().join(format!("{kind}{bits}"));
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", kind, "-b", bits, "-N", "", "-C", "c", "-f"])
            .arg(&path)
            .output()
            .expect("install openssh-client: this test wants real SSH keys");
        assert!(made.status.success(), "{}", stderr(&made));
        let public = path.with_extension("pub");
        let text = std::fs::read_to_string(&public).unwrap();
        let listed = Command::new("ssh-keygen").arg("-lf").arg(&public).output().unwrap();
        let fingerprint = stdout(&listed).split_whitespace().nth(1).unwrap().to_owned();
        let name = format!("ssh/{kind}-{bits}");
        lines.push_str(&format!("{}\n", serde_json::json!({ "name": name, "public_key": text })));
        expected.push((name, text, Some(fingerprint)));
    }
    let file = cluster.dir().join("import.jsonl");
    std::fs::write(&file, &lines).unwrap();
    let imported = cluster.cli(&["import", file.to_str().unwrap()]);
    assert_eq!(status(&imported), 0, "{}", stderr(&imported));
    assert!(stdout(&imported).contains(&format!("imported {0} of {0} names", expected.len())));

    for (name, text, fingerprint) in &expected {
        let found = cluster
            .client
            .lookup(&Name::new(name.clone()).unwrap(), &LookupOptions::default())
            .await
            .unwrap();
        let record = found.record.unwrap_or_else(|| panic!("{name} is missing"));
        let key = &record.entry.keys[0];
        assert_eq!(keys::parse(text.as_bytes()).unwrap(), *key, "{name}");
        match fingerprint {
            None => assert_eq!(keys::to_pem(key).unwrap(), *text, "{name}"),
            Some(fingerprint) => {
                let ours = keys::to_openssh(key, "c").unwrap();
                assert_eq!(ours, *text, "{name}");
                assert_eq!(keys::fingerprint(key), *fingerprint, "{name}");
            }
        }
    }
    // The command line prints the same bytes.
    let printed = cluster.cli(&["lookup", "ssh/rsa-3072", "--format", "ssh"]);
    let words = |text: &str| text.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(&stdout(&printed)), words(&expected.last().unwrap().1));
    let printed = cluster.cli(&["lookup", "ca/0", "--format", "pem"]);
    assert_eq!(stdout(&printed), expected[0].1);

    // A second import changes nothing and says why, line by line.
    let again = cluster.cli(&["import", file.to_str().unwrap()]);
    assert_eq!(status(&again), 7, "{}", stderr(&again));
    assert!(stderr(&again).contains("line 1: ca/0: refused: the name exists already"), "{}", stderr(&again));
    let listed = cluster.cli(&["list", "--prefix", "ssh/", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(&stdout(&listed)).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 5);
}
