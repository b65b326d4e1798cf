//! What people and programs see.

use kds_client::error::{steers, words};
use kds_client::{Access, keys};
use quorum::certificate::Certificate;
use quorum::record::{Record, Status};
use serde_json::{Value, json};

/// Prints one JSON document.
pub(super) fn print_json(value: &Value) {
    println!("{}", escaped(&format!("{value:#}")));
}

/// JSON in which nothing steers a terminal, and that means the same: what does is in its strings.
pub(super) fn escaped(json: &str) -> String {
    let escape = |c: char| match steers(c) && c != '\n' {
        true => format!("\\u{:04x}", u32::from(c)),
        false => c.to_string(),
    };
    json.chars().map(escape).collect()
}

/// Says something beside the answer, on standard error. What others' words are in it steers no terminal.
pub(super) fn note(kind: &str, text: impl std::fmt::Display) {
    eprintln!("{kind}: {}", lines(&text.to_string()));
}

/// Text of several lines in which nothing steers a terminal.
pub(super) fn lines(text: &str) -> String {
    text.chars().map(|c| if steers(c) && c != '\n' { '\u{fffd}' } else { c }).collect()
}

pub(super) fn record_json(record: &Record) -> Value {
    let entry = &record.entry;
    let keys: Vec<_> = entry
        .keys
        .iter()
        .map(|key| json!({ "algorithm": key.algorithm, "key": key.key, "fingerprint": keys::fingerprint(key) }))
        .collect();
    let (status, reason) = match &record.status {
        Status::Active => ("active", None),
        Status::Revoked { reason, .. } => ("revoked", Some(reason)),
    };
    json!({
        "name": record.name,
        "version": record.version,
        "status": status,
        "reason": reason,
        "keys": keys,
        "owner": entry.owner,
        "owner_only": entry.owner_only,
        "not_before": entry.not_before,
        "not_after": entry.not_after,
        "metadata": entry.metadata,
        "updated": { "sequence": record.updated.sequence, "time": record.updated.time },
    })
}

/// Which version was current in the state that a record was shown from, if it was another one.
pub(super) fn superseded_by<'a>(record: &Record, current: Option<&'a Record>) -> Option<&'a Record> {
    current.filter(|current| current.version != record.version)
}

/// The current version of a name in a document about any of them.
pub(super) fn current_json(current: Option<&Record>) -> Value {
    let current = current.map(record_json);
    current.map_or(Value::Null, |current| {
        json!({ "version": current["version"], "status": current["status"], "reason": current["reason"] })
    })
}

/// That a record is not the current one, and what is.
pub(super) fn print_superseded(record: &Record, current: Option<&Record>) {
    if let Some(current) = superseded_by(record, current) {
        let revoked = match &current.status {
            Status::Active => String::new(),
            Status::Revoked { reason, .. } => format!(", which is REVOKED: {}", words(reason)),
        };
        println!("  NOT CURRENT: version {} is{revoked}", current.version);
    }
}

pub(super) fn certified_json(certificate: &Certificate) -> Value {
    let statement = certificate.statement;
    json!({
        "sequence": statement.sequence,
        "time": statement.time,
        "epoch": statement.epoch,
        "signers": certificate.signers().collect::<Vec<_>>(),
    })
}

pub(super) fn access_json(access: &Access) -> Value {
    let rejected: Vec<_> =
        access.rejected.iter().map(|bad| json!({ "server": bad.server, "why": bad.why })).collect();
    let because: Vec<_> =
        access.silent.iter().map(|silence| json!({ "server": silence.server, "why": silence.why })).collect();
    json!({
        "kind": access.kind,
        "rows": access.rows,
        "answered": access.answered,
        "silent": access.silent.iter().map(|silence| silence.server).collect::<Vec<_>>(),
        "silent_because": because,
        "behind": access.behind.iter().map(|(server, version)| json!({ "server": server, "version": version })).collect::<Vec<_>>(),
        "rejected": rejected,
    })
}

pub(super) fn print_record(record: &Record) {
    println!("{}  version {}", record.name, record.version);
    if let Status::Revoked { reason, .. } = &record.status {
        println!("  REVOKED: {}", words(reason));
    }
    for key in &record.entry.keys {
        println!("  {} {}", words(&key.algorithm), keys::fingerprint(key));
    }
    if let Some(owner) = &record.entry.owner {
        println!("  owner {owner}{}", if record.entry.owner_only { " (only)" } else { "" });
    }
    if let Some(from) = record.entry.not_before {
        println!("  not before {from}");
    }
    if let Some(to) = record.entry.not_after {
        println!("  not after {to}");
    }
    for (key, value) in &record.entry.metadata {
        // Somebody's text, as long as it is: it is what was asked for.
        println!("  {}: {}", key.escape_debug(), value.escape_debug());
    }
    println!("  changed {} (sequence {})", record.updated.time, record.updated.sequence);
}
