//! lookup, verify, list, history.

use super::output::{
    access_json, certified_json, current_json, escaped, note, print_json, print_record, print_superseded,
    record_json, superseded_by,
};
use super::{Failure, Session, duration, name, read_input};
use base64::Engine as _;
use clap::{Args, ValueEnum};
use kds_client::error::words;
use kds_client::{ClientError, Consistency, ExitStatus, LookupOptions, WatchEvent, keys, now, usable};
use quorum::answer::{PROOF_FORMAT, ProofFile, Shown, Verifier};
use quorum::evidence::{Evidence, EvidenceFile};
use quorum::manifest::Manifest;
use quorum::record::{Record, Status};
use serde_json::json;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone, Copy, ValueEnum)]
enum ConsistencyArg {
    /// Rows of the grid: sees every completed write
    Row,
    /// q servers: also while a row lies
    Quorum,
    /// One server: never forged, at most --max-age old
    Any,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Ssh,
    Pem,
    Age,
    Raw,
}

#[derive(Args)]
pub(super) struct LookupArgs {
    /// The name
    name: String,
    /// How sure to be
    #[arg(long, value_enum, default_value = "row")]
    consistency: ConsistencyArg,
    /// How old the cluster's certificate may be
    #[arg(long, default_value = "5s", value_parser = duration)]
    max_age: Duration,
    /// An earlier version
    #[arg(long)]
    version: Option<u64>,
    /// Print the keys alone, in this format; none that are revoked, expired or not valid yet
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Print keys that are revoked, expired or not valid yet, too
    #[arg(long)]
    include_unusable: bool,
    /// Keep the proof in a file, for `verify`
    #[arg(long, value_name = "FILE")]
    proof: Option<PathBuf>,
}

pub(super) async fn lookup(session: &Session, args: &LookupArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let options = LookupOptions {
        consistency: match args.consistency {
            ConsistencyArg::Row => Consistency::Row,
            ConsistencyArg::Quorum => Consistency::Quorum,
            ConsistencyArg::Any => Consistency::Any,
        },
        max_age: Some(args.max_age),
        version: args.version,
    };
    let found = session.client.lookup(&name, &options).await?;
    for bad in &found.access.rejected {
        note("warning", format!("rejected the answer of server {}: {}", bad.server, words(&bad.why)));
    }
    if !found.complete {
        eprintln!("note: the last change is committed, and not shown to be visible to all row reads yet");
    }
    if let Some(path) = &args.proof {
        let cluster = session.client.manifest().cluster_id().0;
        let answer = found.answer.clone();
        let membership = session.client.membership().proofs().to_vec();
        let (format, name, version) = (PROOF_FORMAT, name.clone(), args.version);
        let file = ProofFile { format, cluster, name, version, answer, membership };
        let text = serde_json::to_string_pretty(&file).map_err(Failure::other)?;
        std::fs::write(path, text)
            .map_err(|e| Failure::other(format!("cannot write {}: {e}", path.display())))?;
    }
    if let Some(absence) = found.absence() {
        return Err(ClientError::from(absence.clone()).into());
    }
    let Some(record) = &found.record else { return Err(Failure::other("a read without an answer")) };
    let current = found.answer.current.value.as_ref();
    if session.json {
        let mut document = record_json(record);
        document["current"] = current_json(current);
        document["certified"] = certified_json(&found.answer.certificate);
        document["access"] = access_json(&found.access);
        document["complete"] = json!(found.complete);
        print_json(&document);
        return Ok(());
    }
    warn_if_unusable(record);
    if let Some(current) = superseded_by(record, current) {
        note(
            "warning",
            format!("this is version {} of {}: the current one is {}", record.version, name, current.version),
        );
        warn_if_unusable(current);
    }
    if args.format != Format::Text {
        if let Err(error) = usable(record)
            && !args.include_unusable
        {
            let why = format!("{error}\n  no key is printed; --include-unusable prints it all the same");
            return Err(Failure::new(ExitStatus::NoUsableKey, why));
        }
        return print_keys(record, args.format);
    }
    print_record(record);
    print_superseded(record, current);
    let certificate = &found.answer.certificate;
    println!(
        "  certified at {} by servers {:?}",
        certificate.statement.time,
        certificate.signers().map(|server| server.0).collect::<Vec<_>>()
    );
    Ok(())
}

fn warn_if_unusable(record: &Record) {
    if let Status::Revoked { reason, .. } = &record.status {
        eprintln!("warning: {} is REVOKED: {}", record.name, words(reason));
    }
    if record.entry.not_before.is_some_and(|from| now() < from) {
        eprintln!("warning: {} is not valid yet", record.name);
    }
    if record.entry.not_after.is_some_and(|to| now() > to) {
        eprintln!("warning: {} is no longer valid", record.name);
    }
}

fn print_keys(record: &Record, format: Format) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    for key in &record.entry.keys {
        let bytes = match format {
            Format::Ssh => keys::to_openssh(key, record.name.as_str()).map(String::into_bytes),
            Format::Pem => keys::to_pem(key).map(String::into_bytes),
            Format::Age => keys::to_age(key).map(String::into_bytes),
            Format::Raw | Format::Text => Ok(key.key.0.clone()),
        };
        out.write_all(&bytes.map_err(Failure::other)?).map_err(Failure::other)?;
    }
    Ok(())
}

#[derive(Args)]
pub(super) struct VerifyArgs {
    /// The proof file
    file: PathBuf,
}

pub(super) fn verify(args: &VerifyArgs, manifest: &Arc<Manifest>, as_json: bool) -> Result<(), Failure> {
    let bytes = read_input(&args.file)?;
    let unverified =
        |why: String| Failure::new(ExitStatus::Unverified, format!("{}: {why}", args.file.display()));
    if let Ok(evidence) = serde_json::from_slice::<EvidenceFile>(&bytes) {
        return verify_evidence(&evidence, manifest, as_json, unverified);
    }
    let file: ProofFile = serde_json::from_slice(&bytes)
        .map_err(|e| unverified(format!("not a proof file: {}", words(&e.to_string()))))?;
    let mut verifier = Verifier::new(Arc::clone(manifest));
    let record = verifier.proof_file(&file).map_err(|e| unverified(e.to_string()))?;
    let statement = file.answer.certificate.statement;
    // Checked with the record.
    let current = file.answer.current.value.as_ref();
    if as_json {
        let record = record.as_ref().there().map(record_json);
        let (version, current) = (file.version, current_json(current));
        let certified = certified_json(&file.answer.certificate);
        print_json(&json!({
            "name": file.name, "version": version, "record": record, "current": current, "certified": certified
        }));
        return Ok(());
    }
    match &record {
        Shown::There(record) => {
            print_record(record);
            print_superseded(record, current);
        }
        Shown::Absent(absence) => {
            println!("{}", absence.of());
            if let Some(current) = current {
                println!("  its current version is {}", current.version);
            }
        }
    }
    println!("proved: so it was at {} (sequence {})", statement.time, statement.sequence);
    Ok(())
}

fn verify_evidence(
    file: &EvidenceFile,
    manifest: &Arc<Manifest>,
    as_json: bool,
    unverified: impl Fn(String) -> Failure,
) -> Result<(), Failure> {
    let mut verifier = Verifier::new(Arc::clone(manifest));
    let culprits = verifier.evidence_file(file).map_err(|e| unverified(e.to_string()))?;
    let (what, sequence) = match &file.evidence {
        Evidence::Certificates { second, .. } => {
            ("signed two states that contradict each other", second.statement.sequence)
        }
        Evidence::Votes { second, .. } => ("voted for two states", second.body.sequence),
        Evidence::Dissent { vote, .. } => {
            ("voted for another state than the certified one", vote.body.sequence)
        }
    };
    if as_json {
        print_json(&json!({ "evidence": what, "sequence": sequence, "culprits": culprits }));
    } else {
        let names: Vec<_> = culprits.iter().map(ToString::to_string).collect();
        println!("proved: server {} {what}, at sequence {sequence}", names.join(", "));
    }
    Ok(())
}

#[derive(Args)]
pub(super) struct WatchArgs {
    /// The name
    name: String,
    /// Begin after this version; 0 begins with the first one
    #[arg(long, default_value_t = 0)]
    since: u64,
    /// End after so many events, instead of going on for ever
    #[arg(long)]
    events: Option<u64>,
}

pub(super) async fn watch(session: &Session, args: &WatchArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let mut watch = session.client.watch(&name, args.since);
    let mut told = 0;
    while args.events.is_none_or(|most| told < most) {
        match watch.next().await {
            Ok(event) => {
                told += 1;
                match (&event, session.json) {
                    // One document a line: there is no end to wait for.
                    (WatchEvent::Absent, true) => println!("{}", json!({ "name": name, "version": 0 })),
                    (WatchEvent::Version(record), true) => {
                        println!("{}", escaped(&record_json(record).to_string()))
                    }
                    (WatchEvent::Absent, false) => println!("{name} does not exist yet"),
                    (WatchEvent::Version(record), false) => print_record(record),
                }
            }
            // It goes on when the servers are back.
            Err(error @ (ClientError::Unavailable { .. } | ClientError::NotComplete)) => {
                note("warning", error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[derive(Args)]
pub(super) struct CheckSignatureArgs {
    /// Whose signature
    name: String,
    /// What was signed; `-` is standard input
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// The signature: as its algorithm makes it, in base64, or by `ssh-keygen -Y sign -n file`
    #[arg(long, value_name = "FILE")]
    signature: PathBuf,
}

pub(super) async fn check_signature(session: &Session, args: &CheckSignatureArgs) -> Result<(), Failure> {
    let name = name(&args.name)?;
    let (message, mut signature) = (read_input(&args.file)?, read_input(&args.signature)?);
    let text = std::str::from_utf8(&signature).map(str::trim).unwrap_or_default();
    let decoded = base64::engine::general_purpose::STANDARD.decode(text);
    if let Some(bytes) = decoded.ok().filter(|bytes| !bytes.is_empty()) {
        signature = bytes;
    }
    let key = session.client.verify_signature(&name, &message, &signature).await?;
    let fingerprint = keys::fingerprint(&key);
    match session.json {
        true => print_json(&json!({ "name": name, "algorithm": key.algorithm, "fingerprint": fingerprint })),
        false => println!("signed by {name} with {} {fingerprint}", key.algorithm),
    }
    Ok(())
}

#[derive(Args)]
pub(super) struct ListArgs {
    /// Only names that begin with this
    #[arg(long, default_value = "")]
    prefix: String,
}

pub(super) async fn list(session: &Session, args: &ListArgs) -> Result<(), Failure> {
    let records = session.client.list(&args.prefix).await?;
    if session.json {
        print_json(&json!(records.iter().map(record_json).collect::<Vec<_>>()));
        return Ok(());
    }
    for record in &records {
        let revoked = if record.status == Status::Active { "" } else { "  REVOKED" };
        println!("{}  version {}{revoked}", record.name, record.version);
    }
    Ok(())
}

#[derive(Args)]
pub(super) struct HistoryArgs {
    /// The name
    name: String,
}

pub(super) async fn history(session: &Session, args: &HistoryArgs) -> Result<(), Failure> {
    let versions = session.client.history(&name(&args.name)?).await?;
    if session.json {
        print_json(&json!(versions.iter().map(record_json).collect::<Vec<_>>()));
    } else {
        versions.iter().for_each(print_record);
    }
    Ok(())
}
