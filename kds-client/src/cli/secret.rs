//! secret put, get, list, delete, releases.

use super::output::print_json;
use super::write::signing_key_file;
use super::{Failure, Session, name, read_input};
use clap::Subcommand;
use kds_client::{ExitStatus, keystore};
use quorum::PublicKey;
use quorum::request::Reader;
use serde_json::json;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

#[derive(Subcommand)]
pub(super) enum SecretCommand {
    /// Deposit a secret: any k servers together can give it back, fewer learn nothing
    Put {
        /// Its name
        name: String,
        /// What to keep; - for standard input
        #[arg(long = "in", value_name = "FILE")]
        input: PathBuf,
        /// Who else may have it: a name (its owner), or a public key or key file; repeatable
        #[arg(long, value_name = "NAME|KEY")]
        reader: Vec<String>,
        /// Replace the secret of this name that you deposited before
        #[arg(long)]
        replace: bool,
        /// Do not recover it once to prove that it can be
        #[arg(long)]
        no_read_back: bool,
    },
    /// Recover a secret
    Get {
        /// Its name
        name: String,
        /// Where to; - for standard output
        #[arg(long, value_name = "FILE", default_value = "-")]
        out: PathBuf,
    },
    /// The secrets that you own or may read by your key
    List,
    /// Delete a secret that you own
    Delete {
        /// Its name
        name: String,
    },
    /// Who was given a secret, and when
    Releases {
        /// Its name
        name: String,
    },
}

/// A key in base64, a file that holds one, or a name.
fn reader(text: &str) -> Result<Reader, Failure> {
    if let Some(key) = PublicKey::from_base64(text) {
        return Ok(Reader::Key(key));
    }
    if Path::new(text).is_file() {
        return signing_key_file(Path::new(text)).map(Reader::Key);
    }
    name(text).map(Reader::Name)
}

pub(super) async fn run(session: &Session, command: &SecretCommand) -> Result<(), Failure> {
    match command {
        SecretCommand::Put { name: text, input, reader: readers, replace, no_read_back } => {
            let name = name(text)?;
            let readers = readers.iter().map(|text| reader(text)).collect::<Result<Vec<_>, _>>()?;
            let key = session.key()?;
            let material = Zeroizing::new(read_input(input)?);
            let put =
                session.client.put_secret(&key, &name, &material, &readers, *replace, *no_read_back).await?;
            if session.json {
                print_json(&json!({
                    "name": name, "index": put.index, "sequence": put.written.sequence,
                    "complete": put.written.complete, "read_back": put.proved,
                }));
            } else {
                let k = session.client.manifest().thresholds.threshold;
                let checked = if put.proved { ", and recovered once to be sure" } else { "" };
                println!("deposited {name}: any {k} servers give it back{checked}");
            }
            Ok(())
        }
        SecretCommand::Get { name: text, out } => {
            let found = session.client.get_secret(&session.key()?, &name(text)?).await?;
            for bad in &found.wrong {
                eprintln!("warning: {bad}");
            }
            if out == Path::new("-") {
                std::io::stdout().lock().write_all(&found.material).map_err(Failure::other)
            } else {
                keystore::write_private(out, &found.material).map_err(Failure::other)
            }
        }
        SecretCommand::List => list(session).await,
        SecretCommand::Delete { name: text } => {
            let name = name(text)?;
            let written = session.client.delete_secret(&session.key()?, &name).await?;
            if session.json {
                print_json(&json!({ "name": name, "sequence": written.sequence }));
            } else {
                println!("deleted {name}");
            }
            Ok(())
        }
        SecretCommand::Releases { name: text } => releases(session, text).await,
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let me = session.key()?.public();
    let mine = |readers: &[Reader]| readers.contains(&Reader::Key(me));
    let secrets = session.client.list_secrets("").await?;
    let secrets: Vec<_> = secrets.into_iter().filter(|s| s.owner == me || mine(&s.readers)).collect();
    if session.json {
        let documents: Vec<_> = secrets
            .iter()
            .map(|s| {
                json!({
                    "name": s.name, "owner": s.owner, "readers": s.readers, "bytes": s.ciphertext_bytes,
                    "deposited": { "sequence": s.deposited.sequence, "time": s.deposited.time },
                })
            })
            .collect();
        print_json(&json!(documents));
    } else {
        for secret in &secrets {
            let role = if secret.owner == me { "owner" } else { "reader" };
            println!("{}  {role}  deposited {}", secret.name, secret.deposited.time);
        }
    }
    Ok(())
}

async fn releases(session: &Session, text: &str) -> Result<(), Failure> {
    let name = name(text)?;
    let Some((_, releases)) = session.client.secret(&name).await? else {
        let why = format!("the secret {name} does not exist; its absence is proved");
        return Err(Failure::new(ExitStatus::NotFound, why));
    };
    if session.json {
        let last: Vec<_> = releases
            .last
            .iter()
            .map(|release| json!({ "to": release.to.client, "time": release.time, "epoch": release.epoch }))
            .collect();
        print_json(&json!({ "name": name, "earlier": releases.earlier, "releases": last }));
    } else {
        if releases.earlier > 0 {
            println!("({} earlier ones)", releases.earlier);
        }
        for release in &releases.last {
            println!("{}  to {}", release.time, release.to.client);
        }
    }
    Ok(())
}
