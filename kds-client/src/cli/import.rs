//! import: many names from JSON lines or CSV.

use super::output::{note, print_json};
use super::{Failure, Session, read_input};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kds_client::error::words;
use kds_client::{Client, ClientError, ExitStatus, Written, keys};
use quorum::Timestamp;
use quorum::limits::REPLY_KEPT_MS;
use quorum::record::{Entry, Name};
use quorum::signing::SigningKey;
use serde::Deserialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Names registered at a time.
const AT_A_TIME: usize = 64;
/// How long to wait before it is asked again what came of a request.
const PAUSE: Duration = Duration::from_millis(300);

/// Fields of a line: `name` and `public_key` (the text of a public key file), and optionally
/// `owner`, `owner_only`, `not_before`, `not_after`, and in JSON `public_keys` and `metadata`
#[derive(Args)]
pub(super) struct ImportArgs {
    /// JSON lines, or CSV with a header line; - for standard input
    file: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: String,
    public_key: Option<String>,
    #[serde(default)]
    public_keys: Vec<String>,
    owner: Option<String>,
    #[serde(default)]
    owner_only: Option<bool>,
    not_before: Option<Timestamp>,
    not_after: Option<Timestamp>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
}

impl Line {
    fn parse(self) -> Result<(Name, Entry), String> {
        let name = Name::new(self.name).map_err(|e| e.to_string())?;
        let texts = self.public_key.iter().chain(&self.public_keys);
        let keys = texts
            .map(|text| keys::parse(text.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|e| e.to_string())?;
        let owner = self.owner.filter(|text| !text.is_empty()).map(|text| {
            let material = keys::parse(text.as_bytes()).map_err(|e| e.to_string())?;
            keys::signing_public_key(&material).map_err(|e| e.to_string())
        });
        let entry = Entry {
            keys,
            owner: owner.transpose()?,
            owner_only: self.owner_only.unwrap_or(false),
            not_before: self.not_before,
            not_after: self.not_after,
            metadata: self.metadata,
        };
        entry.validate().map_err(|e| e.to_string())?;
        Ok((name, entry))
    }
}

/// Lines with their number, parsed as far as they can be.
type Parsed = Vec<(u64, Result<Line, String>)>;

fn parse(bytes: &[u8]) -> Parsed {
    let is_json = bytes.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
    if is_json {
        let lines = bytes.split(|byte| *byte == b'\n').zip(1..);
        let lines = lines.filter(|(line, _)| !line.trim_ascii().is_empty());
        return lines.map(|(line, n)| (n, serde_json::from_slice(line).map_err(|e| e.to_string()))).collect();
    }
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(bytes);
    let headers = match reader.headers() {
        Ok(headers) => headers.clone(),
        Err(error) => return vec![(1, Err(error.to_string()))],
    };
    let line = |record: Result<csv::StringRecord, csv::Error>| {
        let record = record.map_err(|e| (e.position().map_or(0, csv::Position::line), e.to_string()));
        match record {
            Ok(record) => {
                let number = record.position().map_or(0, csv::Position::line);
                (number, record.deserialize(Some(&headers)).map_err(|e| e.to_string()))
            }
            Err((number, why)) => (number, Err(why)),
        }
    };
    reader.records().map(line).collect()
}

/// Registers a name. While it is not known what came of that the same request is sent again, and another one is
/// signed only when that one is proved to be dead.
async fn register(
    client: &Client,
    key: &SigningKey,
    name: &Name,
    entry: &Entry,
) -> Result<Written, ClientError> {
    let mut resigned = false;
    let mut result = client.register(key, name.clone(), entry.clone()).await;
    loop {
        let request = match &result {
            Err(ClientError::OutcomeUnknown { request, .. }) => request.clone(),
            _ => return result,
        };
        match client.retry(&request).await {
            Err(ClientError::NotExecuted { .. }) if !resigned => {
                resigned = true;
                result = client.register(key, name.clone(), entry.clone()).await;
            }
            // It could not be asked for: as before, until the answer would no longer be kept.
            Err(ClientError::Unavailable { .. } | ClientError::Unverified { .. })
                if kds_client::now() < request.request.expiry.plus_ms(REPLY_KEPT_MS) =>
            {
                tokio::time::sleep(PAUSE).await;
            }
            other => result = other,
        }
    }
}

pub(super) async fn import(session: &Session, args: &ImportArgs) -> Result<(), Failure> {
    let lines = parse(&read_input(&args.file)?);
    if lines.is_empty() {
        return Err(Failure::usage(format!("{} holds no names", args.file.display())));
    }
    let key = Arc::new(session.key()?);
    let progress = ProgressBar::with_draw_target(Some(lines.len() as u64), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{pos}/{len} names  {per_sec}  {eta} left  {wide_bar}") {
        progress.set_style(style);
    }
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut tasks = JoinSet::new();
    let total = lines.len();
    for (number, line) in lines {
        let place = Arc::clone(&places).acquire_owned().await.map_err(Failure::other)?;
        let (client, key, progress) = (session.client.clone(), Arc::clone(&key), progress.clone());
        tasks.spawn(async move {
            let _place = place;
            let stated = line.as_ref().map_or_else(|_| String::new(), |line| line.name.clone());
            let result = async {
                let parsed = line.and_then(Line::parse);
                let (name, entry) = parsed.map_err(|why| (ExitStatus::Refused, why))?;
                let written = register(&client, &key, &name, &entry).await;
                written.map_err(|error| (error.exit_status(), error.to_string()))
            };
            let result = result.await;
            progress.inc(1);
            (number, stated, result)
        });
    }
    let mut refused = Vec::new();
    let mut incomplete = 0;
    while let Some(done) = tasks.join_next().await {
        match done.map_err(Failure::other)? {
            (_, _, Ok(written)) => incomplete += usize::from(!written.complete),
            (number, name, Err((status, why))) => refused.push((number, name, status, why)),
        }
    }
    progress.finish_and_clear();
    refused.sort_by_key(|(number, ..)| *number);
    let imported = total - refused.len();
    if session.json {
        let refused: Vec<_> = refused
            .iter()
            .map(|(line, name, _, why)| json!({ "line": line, "name": name, "why": why }))
            .collect();
        print_json(&json!({ "imported": imported, "incomplete": incomplete, "refused": refused }));
    } else {
        println!("imported {imported} of {total} names");
    }
    for (number, name, _, why) in &refused {
        note(&format!("line {number}"), format!("{}: {}", words(name), words(why)));
    }
    if incomplete > 0 {
        eprintln!("note: {incomplete} are committed, not yet visible to row reads");
    }
    match refused.first() {
        None => Ok(()),
        // The most severe reason decides: what a script can do about it differs.
        Some((_, _, first, _)) => {
            let unavailable = refused.iter().any(|(_, _, status, _)| *status == ExitStatus::Unavailable);
            let status = if unavailable { ExitStatus::Unavailable } else { *first };
            Err(Failure::new(status, format!("{} of {total} names were refused", refused.len())))
        }
    }
}
