//! register, rotate, revoke, keygen.

use super::output::print_json;
use super::{Failure, Session, name, read_input};
use clap::Args;
use kds_client::keystore::{self, Passphrase, SecretKind};
use kds_client::{ExitStatus, LookupOptions, Written, keys};
use quorum::record::{Entry, KeyMaterial, Name, Record};
use quorum::request::Done;
use quorum::{PublicKey, Timestamp};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub(super) struct EntryArgs {
    /// Public key: OpenSSH, PEM (public key or certificate), age recipient, or a keygen .pub file; - for standard input
    #[arg(long, required = true, num_args = 1.., value_name = "FILE")]
    public_key: Vec<PathBuf>,
    /// Public key of the owner, who may rotate and revoke
    #[arg(long, value_name = "FILE")]
    owner: Option<PathBuf>,
    /// Administrators may only revoke
    #[arg(long)]
    owner_only: bool,
    /// Not to be used before (RFC 3339)
    #[arg(long, value_name = "T", value_parser = timestamp)]
    not_before: Option<Timestamp>,
    /// Not to be used after (RFC 3339)
    #[arg(long, value_name = "T", value_parser = timestamp)]
    not_after: Option<Timestamp>,
    /// A note
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    meta: Vec<(String, String)>,
}

fn timestamp(text: &str) -> Result<Timestamp, String> {
    Timestamp::parse(text).ok_or_else(|| "not an RFC 3339 time such as 2027-01-31T12:00:00Z".into())
}
fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("not of the form key=value")?;
    Ok((key.into(), value.into()))
}

/// A key file, refused with what is wrong with it.
pub(super) fn key_file(path: &Path) -> Result<KeyMaterial, Failure> {
    let bytes = read_input(path)?;
    keys::parse(&bytes).map_err(|e| Failure::new(ExitStatus::Refused, format!("{}: {e}", path.display())))
}

/// An owner's or reader's key file.
pub(super) fn signing_key_file(path: &Path) -> Result<PublicKey, Failure> {
    let material = key_file(path)?;
    keys::signing_public_key(&material)
        .map_err(|e| Failure::new(ExitStatus::Refused, format!("{}: {e}", path.display())))
}

impl EntryArgs {
    fn entry(&self, owner: Option<PublicKey>, owner_only: bool) -> Result<Entry, Failure> {
        let keys = self.public_key.iter().map(|path| key_file(path)).collect::<Result<_, _>>()?;
        let owner = self.owner.as_deref().map(signing_key_file).transpose()?.or(owner);
        let entry = Entry {
            keys,
            owner,
            owner_only: self.owner_only || owner_only,
            not_before: self.not_before,
            not_after: self.not_after,
            metadata: self.meta.iter().cloned().collect::<BTreeMap<_, _>>(),
        };
        entry.validate().map_err(|e| Failure::new(ExitStatus::Refused, e.to_string()))?;
        Ok(entry)
    }
}

#[derive(Args)]
pub(super) struct RegisterArgs {
    /// The name: lower case letters, digits and . _ - @ / +
    name: String,
    #[command(flatten)]
    entry: EntryArgs,
}

pub(super) async fn register(session: &Session, args: &RegisterArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let entry = args.entry.entry(None, false)?;
    let written = session.client.register(&session.key()?, name.clone(), entry).await?;
    report(session, &name, "registered", &written);
    Ok(())
}

#[derive(Args)]
pub(super) struct RotateArgs {
    /// The name
    name: String,
    #[command(flatten)]
    entry: EntryArgs,
}

async fn current(session: &Session, name: &Name) -> Result<Record, Failure> {
    let found = session.client.lookup(name, &LookupOptions::default()).await?;
    if let Some(absence) = found.absence() {
        return Err(Failure::absent(absence, format!("{name} does not exist; `register` makes it")));
    }
    found.record.ok_or_else(|| Failure::other("a read without an answer"))
}

pub(super) async fn rotate(session: &Session, args: &RotateArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let key = session.key()?;
    let record = current(session, &name).await?;
    // Who owns the name stays as it is unless said otherwise.
    let entry = args.entry.entry(record.entry.owner, record.entry.owner_only)?;
    let written = session.client.rotate(&key, name.clone(), record.version, entry).await?;
    report(session, &name, "rotated", &written);
    Ok(())
}

#[derive(Args)]
pub(super) struct RevokeArgs {
    /// The name
    name: String,
    /// Why; visible to everyone
    #[arg(long)]
    reason: String,
}

pub(super) async fn revoke(session: &Session, args: &RevokeArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let key = session.key()?;
    let record = current(session, &name).await?;
    let written = session.client.revoke(&key, name.clone(), record.version, args.reason.clone()).await?;
    report(session, &name, "revoked", &written);
    Ok(())
}

fn report(session: &Session, name: &Name, what: &str, written: &Written) {
    let version = match written.done {
        Done::Record { version } => version,
        _ => 0,
    };
    let sequence = written.sequence;
    if session.json {
        print_json(&json!({
            "name": name, "version": version, "sequence": sequence, "complete": written.complete,
        }));
        return;
    }
    println!("{what} {name}: version {version}, sequence {sequence}");
    if !written.complete {
        eprintln!("note: committed, not yet visible to row reads: too few servers hold it so far");
    }
}

#[derive(Args)]
pub(super) struct KeygenArgs {
    /// File for the private key; its public half goes to FILE.pub
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Ask for a passphrase to encrypt it under (otherwise KDS_PASSPHRASE, if that is set)
    #[arg(long = "passphrase")]
    encrypt: bool,
}

pub(super) fn keygen(args: &KeygenArgs, ask: bool, as_json: bool) -> Result<(), Failure> {
    let passphrase = match ask || args.encrypt {
        true => Some(Passphrase::ask("New passphrase: ").map_err(Failure::other)?),
        false => Passphrase::from_environment(),
    };
    let key = keystore::generate();
    let mut public_path = args.out.clone().into_os_string();
    public_path.push(".pub");
    keystore::write_signing_key(&args.out, SecretKind::SigningKey, &key, passphrase.as_ref())
        .map_err(Failure::other)?;
    std::fs::write(&public_path, keys::keygen_line(&key.public()))
        .map_err(|e| Failure::other(format!("cannot write {}: {e}", public_path.to_string_lossy())))?;
    if as_json {
        print_json(
            &json!({ "public": key.public(), "file": args.out, "public_file": public_path.to_string_lossy() }),
        );
    } else {
        println!("wrote {} and {}", args.out.display(), public_path.to_string_lossy());
    }
    Ok(())
}
