//! The command line without a cluster: usage, files, and exit statuses.

use std::process::{Command, Output};

fn client(args: &[&str], folder: &std::path::Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kds-client"))
        .args(args)
        .current_dir(folder)
        .output()
        .expect("kds-client starts")
}

#[test]
fn wrong_usage_is_status_2_and_missing_files_say_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    for args in [
        &["lookup"][..],
        &["nonsense"],
        &["lookup", "a", "--consistency", "strong"],
        &["--timeout", "1y", "list"],
    ] {
        assert_eq!(client(args, dir).status.code(), Some(2), "{args:?}");
    }
    let missing = client(&["lookup", "a"], dir);
    assert_eq!(missing.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&missing.stderr).contains("--manifest"));
    let help = client(&["--help"], dir);
    assert!(String::from_utf8_lossy(&help.stdout).contains("Exit status"));
}

#[test]
fn keygen_makes_a_private_key_and_its_public_half_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    assert_eq!(client(&["keygen", "--out", "k"], dir).status.code(), Some(0));
    let public = std::fs::read(dir.join("k.pub")).unwrap();
    let parsed = kds_client::keys::parse(&public).unwrap();
    let private = kds_client::keystore::read_signing_key(
        &dir.join("k"),
        kds_client::keystore::SecretKind::SigningKey,
        None,
    );
    assert_eq!(kds_client::keys::signing_public_key(&parsed).unwrap(), private.unwrap().public());
    let again = client(&["keygen", "--out", "k"], dir);
    assert_eq!(again.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&again.stderr).contains("cannot write"));
}

/// Where a service has no environment with secrets in it, systemd hands it the passphrase as a credential.
#[test]
fn the_passphrase_may_be_a_credential_of_systemd() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    std::fs::write(dir.join("kds-passphrase"), "open sesame\n").unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_kds-client"))
        .args(["keygen", "--out", "k"])
        .current_dir(dir)
        .env("CREDENTIALS_DIRECTORY", dir)
        .output();
    assert!(made.unwrap().status.success());
    let read = |passphrase: Option<&str>| {
        let passphrase = passphrase.map(kds_client::keystore::Passphrase::new);
        let kind = kds_client::keystore::SecretKind::SigningKey;
        kds_client::keystore::read_signing_key(&dir.join("k"), kind, passphrase.as_ref())
    };
    assert!(read(None).is_err() && read(Some("open sesame\n")).is_err());
    assert!(read(Some("open sesame")).is_ok());
}
