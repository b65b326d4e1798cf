//! The command line on top of the library.

mod admin;
mod bench;
mod import;
mod lookup;
mod membership;
mod outcome;
mod output;
mod secret;
mod space;
mod status;
mod write;

use clap::{Parser, Subcommand};
use kds_client::keystore::{self, KeystoreError, Passphrase, SecretKind};
use kds_client::{Client, ClientError, ExitStatus, Options, deadline, manifest_file};
use quorum::answer::Absence;
use quorum::record::Name;
use quorum::signing::SigningKey;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Client of the key-distribution service: whose key is this, and keep this secret for me.
///
/// Every answer is verified against the cluster's manifest: no single server is trusted.
///
/// Exit status: 0 done, 1 other errors, 2 usage, 3 not found (proved), 4 not verifiable,
/// 5 not enough servers, or not known whether a write was executed, 6 refused, 7 conflict, 8 no usable key.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// The cluster's manifest
    #[arg(
        long,
        global = true,
        env = "KDS_MANIFEST",
        default_value = "kds-dev/manifest.toml",
        value_name = "FILE"
    )]
    manifest: PathBuf,
    /// Your signing key [default: admin.key beside the manifest]
    #[arg(long, global = true, env = "KDS_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
    /// Ask for the passphrase of your key file, even where KDS_PASSPHRASE is set. (Before the command: a
    /// command's own --passphrase is another one.)
    #[arg(long = "passphrase")]
    key_passphrase: bool,
    /// Print one JSON document on standard output
    #[arg(long, global = true)]
    json: bool,
    /// How long an operation may take, such as 500ms, 10s or 1m
    #[arg(long, global = true, default_value = "10s", value_parser = duration)]
    timeout: Duration,
    /// Where to keep evidence of servers that contradict themselves [default: kds-evidence beside the
    /// manifest]
    #[arg(long, global = true, env = "KDS_EVIDENCE", value_name = "FOLDER")]
    evidence: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Look a name up: its verified keys
    Lookup(lookup::LookupArgs),
    /// Check a proof file, or evidence of misbehaviour, offline: against the manifest alone
    Verify(lookup::VerifyArgs),
    /// List names
    List(lookup::ListArgs),
    /// All versions of a name
    History(lookup::HistoryArgs),
    /// Follow a name: every version, as soon as it is visible
    Watch(lookup::WatchArgs),
    /// Check a signature under the keys of a name
    CheckSignature(lookup::CheckSignatureArgs),
    /// Register a name, as an administrator
    Register(write::RegisterArgs),
    /// Replace a name's keys, as its owner or an administrator
    Rotate(write::RotateArgs),
    /// Withdraw a name's keys, as its owner or an administrator
    Revoke(write::RevokeArgs),
    /// Register many names from JSON lines or CSV
    Import(import::ImportArgs),
    /// What came of a write that was not answered: waits until it is executed, or never will be
    Outcome(outcome::OutcomeArgs),
    /// Make a signing key; FILE.pub is its public half
    Keygen(write::KeygenArgs),
    /// Deposit, recover and delete secrets
    #[command(subcommand)]
    Secret(secret::SecretCommand),
    /// Who the administrators are, and what they decide together
    #[command(subcommand)]
    Admin(admin::AdminCommand),
    /// How much the state takes and may take, and how much of it an owner
    Space(space::SpaceArgs),
    /// Whether others may make you the owner of secrets that they deposit, and of names that they hand over
    Gifts(space::GiftsArgs),
    /// Who the servers are: the manifest, and the identities that were replaced since
    Membership,
    /// How every server is doing
    Status,
    /// Measure throughput and latency
    Bench(bench::BenchArgs),
}

/// Why the program ends, with its exit status.
#[derive(Debug)]
pub struct Failure {
    text: String,
    /// For scripts.
    pub status: ExitStatus,
}

impl Failure {
    fn new(status: ExitStatus, text: impl Into<String>) -> Self {
        Self { text: text.into(), status }
    }
    /// It is not there, which is proved: nothing else has this status.
    fn absent(_: &Absence, text: impl Into<String>) -> Self {
        Self::new(ExitStatus::NotFound, text)
    }
    fn usage(text: impl Into<String>) -> Self {
        Self::new(ExitStatus::Usage, text)
    }
    fn other(error: impl std::fmt::Display) -> Self {
        Self::new(ExitStatus::Other, error.to_string())
    }
}
impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&output::lines(&self.text))
    }
}
impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(error.exit_status(), error.to_string())
    }
}

/// What commands share.
pub(crate) struct Session {
    client: Client,
    key_path: PathBuf,
    ask_passphrase: bool,
    json: bool,
}

impl Session {
    fn key(&self) -> Result<SigningKey, Failure> {
        let ask = || Passphrase::ask("Passphrase of the key: ").map_err(Failure::other);
        let read = |passphrase: Option<Passphrase>| {
            keystore::read_signing_key(&self.key_path, SecretKind::SigningKey, passphrase.as_ref())
        };
        let key = match self.ask_passphrase {
            true => read(Some(ask()?)),
            false => match read(Passphrase::from_environment()) {
                Err(KeystoreError::NeedsPassphrase { .. }) if std::io::stdin().is_terminal() => {
                    read(Some(ask()?))
                }
                key => key,
            },
        };
        key.map_err(|error| {
            Failure::other(format!(
                "{error}\n  name your key with --key or KDS_KEY; `kds-client keygen` makes one"
            ))
        })
    }
}

/// Runs one command.
pub async fn run(cli: Cli) -> Result<(), Failure> {
    if let Command::Keygen(args) = &cli.command {
        return write::keygen(args, cli.key_passphrase, cli.json);
    }
    let manifest = manifest_file::read(&cli.manifest).map_err(Failure::other)?;
    if let Command::Verify(args) = &cli.command {
        return lookup::verify(args, &manifest, cli.json);
    }
    let evidence = cli.evidence.clone().unwrap_or_else(|| beside(&cli.manifest, "kds-evidence"));
    let key_path = cli.key.clone().unwrap_or_else(|| beside(&cli.manifest, "admin.key"));
    let session = Session {
        client: Client::new(
            Arc::clone(&manifest),
            Options { timeout: cli.timeout, evidence: Some(evidence), ..Options::default() },
        )?,
        key_path,
        ask_passphrase: cli.key_passphrase,
        json: cli.json,
    };
    match cli.command {
        Command::Lookup(args) => lookup::lookup(&session, &args).await,
        Command::List(args) => lookup::list(&session, &args).await,
        Command::History(args) => lookup::history(&session, &args).await,
        Command::Watch(args) => lookup::watch(&session, &args).await,
        Command::CheckSignature(args) => lookup::check_signature(&session, &args).await,
        Command::Register(args) => write::register(&session, &args).await,
        Command::Rotate(args) => write::rotate(&session, &args).await,
        Command::Revoke(args) => write::revoke(&session, &args).await,
        Command::Import(args) => import::import(&session, &args).await,
        Command::Outcome(args) => outcome::outcome(&session, &args).await,
        Command::Secret(command) => secret::run(&session, &command).await,
        Command::Admin(command) => admin::run(&session, &command).await,
        Command::Space(args) => space::space(&session, &args).await,
        Command::Gifts(args) => space::gifts(&session, &args).await,
        Command::Membership => membership::membership(&session).await,
        Command::Status => status::status(&session).await,
        Command::Bench(args) => bench::bench(&session, &args).await,
        Command::Keygen(_) | Command::Verify(_) => Ok(()),
    }
}

fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().map_or_else(|| name.into(), |folder| folder.join(name))
}

/// `500ms`, `10s`, `2m`; a bare number is seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| "not a duration such as 500ms, 10s or 1m".to_owned())?;
    let duration = match &text[digits.len()..] {
        "ms" => Duration::from_millis(number),
        "" | "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(number.saturating_mul(60)),
        unit => return Err(format!("unknown unit {unit:?}; use ms, s or m")),
    };
    Ok(deadline::bounded(duration))
}

/// A name as an argument: refused with its own words, as wrong input rather than wrong usage.
fn name(text: &str) -> Result<Name, Failure> {
    Name::new(text).map_err(|error| Failure::new(ExitStatus::Refused, format!("{text:?}: {error}")))
}

/// A file's bytes, or standard input for `-`.
fn read_input(path: &Path) -> Result<Vec<u8>, Failure> {
    use std::io::Read as _;
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        std::io::stdin().lock().read_to_end(&mut bytes).map_err(Failure::other)?;
        return Ok(bytes);
    }
    std::fs::read(path).map_err(|error| Failure::other(format!("cannot read {}: {error}", path.display())))
}
