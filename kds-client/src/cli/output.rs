//! What people and programs see.

use kds_client::{Access, keys};
use quorum::certificate::Certificate;
use quorum::record::{Record, Status};
use serde_json::{Value, json};

/// Prints one JSON document.
pub(super) fn print_json(value: &Value) {
    println!("{value:#}");
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
        println!("  REVOKED: {reason}");
    }
    for key in &record.entry.keys {
        println!("  {} {}", key.algorithm, keys::fingerprint(key));
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
        // Metadata is somebody's text: control characters must not reach the terminal.
        println!("  {}: {}", key.escape_debug(), value.escape_debug());
    }
    println!("  changed {} (sequence {})", record.updated.time, record.updated.sequence);
}
