//! secret put, get, list, delete, releases.

use super::output::{note, print_json};
use super::write::signing_key_file;
use super::{Failure, Session, name, read_input};
use clap::Subcommand;
use kds_client::keystore::{self, Passphrase};
use kds_client::{ClientError, ExitStatus, Recovered};
use quorum::PublicKey;
use quorum::limits::MAX_GUESSES;
use quorum::record::Name;
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
        /// Put it behind a passphrase, which alone opens it, also for one who has lost every device (asked for
        /// on the terminal, or KDS_SECRET_PASSPHRASE). Named readers and you may try; without any, everyone
        #[arg(long = "passphrase")]
        behind_passphrase: bool,
        /// With --passphrase: how many wrong guesses in a row lock it for ever
        #[arg(long, value_name = "N", default_value_t = kds_client::DEFAULT_GUESSES, requires = "behind_passphrase",
              value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_GUESSES)))]
        guesses: u32,
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
        /// By its passphrase (asked for on the terminal, or KDS_SECRET_PASSPHRASE); no key is needed unless its
        /// depositor named those who may try
        #[arg(long = "passphrase")]
        by_passphrase: bool,
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
        SecretCommand::Put {
            name: text,
            input,
            reader: readers,
            replace,
            behind_passphrase,
            guesses,
            no_read_back,
        } => {
            let name = name(text)?;
            let readers = readers.iter().map(|text| reader(text)).collect::<Result<Vec<_>, _>>()?;
            let key = session.key()?;
            let material = Zeroizing::new(read_input(input)?);
            let passphrase = behind_passphrase.then(|| secret_passphrase(true)).transpose()?;
            let client = &session.client;
            let put = match &passphrase {
                None => client.put_secret(&key, &name, &material, &readers, *replace, *no_read_back).await?,
                Some(passphrase) => {
                    let lock = (passphrase, *guesses);
                    let put = client.put_secret_behind(
                        &key,
                        &name,
                        &material,
                        &readers,
                        lock,
                        *replace,
                        *no_read_back,
                    );
                    put.await?
                }
            };
            if session.json {
                print_json(&json!({
                    "name": name, "index": put.index, "sequence": put.written.sequence,
                    "complete": put.written.complete, "read_back": put.proved,
                }));
            } else {
                let k = session.client.manifest().thresholds.threshold;
                let checked = if put.proved { ", and recovered once to be sure" } else { "" };
                match behind_passphrase {
                    false => println!("deposited {name}: any {k} servers give it back{checked}"),
                    true => println!(
                        "deposited {name}: its passphrase and any {k} servers give it back, in {guesses} guesses at most{checked}"
                    ),
                }
            }
            Ok(())
        }
        SecretCommand::Get { name: text, out, by_passphrase } => {
            let name = name(text)?;
            let found = match by_passphrase {
                false => session.client.get_secret(&session.key()?, &name).await?,
                true => get_by_passphrase(session, &name).await?,
            };
            for bad in &found.wrong {
                note("warning", bad);
            }
            if let Some(error) = &found.uncounted {
                note(
                    "warning",
                    format!("the passphrase was right, and the servers could not be told: {error}"),
                );
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

/// The passphrase of a secret: the environment's, or what a person types, twice if it is a new one.
fn secret_passphrase(new: bool) -> Result<Passphrase, Failure> {
    if let Some(passphrase) = Passphrase::from_variable("KDS_SECRET_PASSPHRASE") {
        return Ok(passphrase);
    }
    let ask = |prompt| {
        Passphrase::ask(prompt).map_err(|error| {
            Failure::other(format!("cannot ask for the passphrase: {error}\n  set KDS_SECRET_PASSPHRASE where there is no terminal"))
        })
    };
    let passphrase = ask("Passphrase of the secret: ")?;
    if passphrase.is_empty() {
        return Err(Failure::new(ExitStatus::Refused, "an empty passphrase protects nothing"));
    }
    if new && !ask("The same once more: ")?.is(&passphrase) {
        return Err(Failure::new(ExitStatus::Refused, "the passphrases differ; nothing was deposited"));
    }
    Ok(passphrase)
}

async fn get_by_passphrase(session: &Session, name: &Name) -> Result<Recovered, Failure> {
    // Whoever has lost her key needs none, unless only some may try.
    let secret = session.client.secret(name).await?;
    let guarded = secret.is_some_and(|(secret, _)| !secret.readers.is_empty());
    let key = guarded.then(|| session.key()).transpose()?;
    let passphrase = secret_passphrase(false)?;
    Ok(session.client.get_secret_behind(key.as_ref(), name, &passphrase).await?)
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
                    "depositor": s.depositor.client, "space": s.space, "account": s.account,
                })
            })
            .collect();
        print_json(&json!(documents));
    } else {
        for secret in &secrets {
            let role = if secret.owner == me { "owner" } else { "reader" };
            // Others may make somebody the owner of what they have deposited, and know what it is.
            let by = match secret.depositor.client {
                depositor if depositor == secret.owner => String::new(),
                depositor => format!(" by {depositor}"),
            };
            println!("{}  {role}  deposited {}{by}", secret.name, secret.deposited.time);
        }
    }
    Ok(())
}

async fn releases(session: &Session, text: &str) -> Result<(), Failure> {
    let name = name(text)?;
    let (secret, releases) = session.client.shown_secret(&name).await?.found().map_err(ClientError::from)?;
    if session.json {
        let last: Vec<_> = releases
            .last
            .iter()
            .map(|release| {
                json!({
                    "to": release.to.client, "time": release.time, "epoch": release.epoch,
                    "guess": release.blinded.is_some(),
                })
            })
            .collect();
        let left = secret.passphrase.map(|passphrase| passphrase.guesses.saturating_sub(releases.guessed));
        print_json(&json!({
            "name": name, "earlier": releases.earlier, "releases": last, "guesses_left": left,
        }));
    } else {
        if releases.earlier > 0 {
            println!("({} earlier ones)", releases.earlier);
        }
        for release in &releases.last {
            let what = if release.blinded.is_some() { "guess by" } else { "to" };
            println!("{}  {what} {}", release.time, release.to.client);
        }
    }
    Ok(())
}
