//! admin list, add, remove, replace-identity.

use super::output::print_json;
use super::write::signing_key_file;
use super::{Failure, Session};
use clap::{Args, Subcommand};
use quorum::request::{Decision, Done, Quota};
use quorum::{PublicKey, ServerId};
use serde_json::json;
use std::path::{Path, PathBuf};

#[derive(Subcommand)]
pub(super) enum AdminCommand {
    /// The administrators, and what some of them ask for
    List,
    /// Ask for one more administrator; it is done when enough administrators ask for the same
    Add {
        /// Her public key, or a file with it
        #[arg(value_name = "KEY|FILE")]
        whom: String,
    },
    /// Ask that somebody is an administrator no more
    Remove {
        /// Her public key, or a file with it
        #[arg(value_name = "KEY|FILE")]
        whom: String,
    },
    /// Ask that a server's place is given to another identity, from the next epoch on: when the old one's key
    /// may be in strange hands, or is lost
    ReplaceIdentity {
        /// What `kds-server new-identity` wrote: replacement.toml
        #[arg(value_name = "FILE")]
        replacement: PathBuf,
    },
    /// Ask that the state may take more or less; it is done when enough administrators ask for the same
    SetQuota(QuotaOf),
}

/// Of what a quota is.
#[derive(Args)]
#[group(required = true, multiple = false)]
pub(super) struct QuotaOf {
    /// The whole state may take so much, such as 4GiB; the last 5 % are for administrators
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    total: Option<u64>,
    /// What each owner's requests leave may take so much
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    each: Option<u64>,
    /// What one owner's requests leave may take so much, or as much as everyone's
    #[arg(long, num_args = 2, value_names = ["KEY|FILE", "SIZE|default"])]
    of: Option<Vec<String>>,
}

impl QuotaOf {
    fn quota(&self) -> Result<Quota, Failure> {
        match (self.total, self.each, self.of.as_deref()) {
            (Some(bytes), ..) => Ok(Quota::Total { bytes }),
            (_, Some(bytes), _) => Ok(Quota::Each { bytes }),
            (.., Some([whom, size])) => {
                let size = (size != "default").then(|| bytes(size)).transpose().map_err(Failure::usage)?;
                Ok(Quota::Owner { key: public_key(whom)?, bytes: size })
            }
            _ => Err(Failure::usage("of what is the quota to be?")),
        }
    }
}

/// `30000`, `512KiB`, `16MiB`, `4GiB`.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 =
        digits.parse().map_err(|_| "not a size such as 30000, 512KiB, 16MiB or 4GiB".to_owned())?;
    let factor: u64 = match &text[digits.len()..] {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        unit => return Err(format!("unknown unit {unit:?}; use B, KiB, MiB or GiB")),
    };
    number.checked_mul(factor).ok_or_else(|| "that is too much".to_owned())
}

/// A key in base64, or a file that holds one.
pub(super) fn public_key(text: &str) -> Result<PublicKey, Failure> {
    PublicKey::from_base64(text).map_or_else(|| signing_key_file(Path::new(text)), Ok)
}

pub(super) async fn run(session: &Session, command: &AdminCommand) -> Result<(), Failure> {
    match command {
        AdminCommand::List => list(session).await,
        AdminCommand::Add { whom } => {
            decide(session, Decision::AddAdministrator { key: public_key(whom)? }).await
        }
        AdminCommand::Remove { whom } => {
            decide(session, Decision::RemoveAdministrator { key: public_key(whom)? }).await
        }
        AdminCommand::ReplaceIdentity { replacement } => {
            let text = std::fs::read_to_string(replacement);
            let text =
                text.map_err(|e| Failure::other(format!("cannot read {}: {e}", replacement.display())))?;
            let parsed = toml::from_str(&text);
            let replacement = parsed
                .map_err(|e| Failure::usage(format!("{} is no replacement: {e}", replacement.display())))?;
            decide(session, Decision::ReplaceIdentity { replacement }).await
        }
        AdminCommand::SetQuota(of) => decide(session, Decision::SetQuota { quota: of.quota()? }).await,
    }
}

async fn decide(session: &Session, decision: Decision) -> Result<(), Failure> {
    let written = session.client.decide(&session.key()?, decision).await?;
    let (made, approvals, needed) = match written.done {
        Done::Decided => (true, None, None),
        Done::Approved { approvals, needed } => (false, Some(approvals), Some(needed)),
        _ => return Err(Failure::other("the receipt is of another operation")),
    };
    if session.json {
        let sequence = written.sequence;
        print_json(&json!({
            "decided": made, "approvals": approvals, "needed": needed, "sequence": sequence,
        }));
    } else if let (Some(approvals), Some(needed)) = (approvals, needed) {
        println!(
            "{approvals} of {needed} administrators ask for it: the others have a week to run the same command"
        );
    } else {
        println!("decided");
    }
    Ok(())
}

/// What is asked for: in a word, whose key it is about, which server, how many bytes.
type Described = (&'static str, Option<PublicKey>, Option<ServerId>, Option<u64>);

fn described(decision: &Decision) -> Described {
    match decision {
        Decision::AddAdministrator { key } => ("add", Some(*key), None, None),
        Decision::RemoveAdministrator { key } => ("remove", Some(*key), None, None),
        Decision::ReplaceIdentity { replacement } => {
            ("replace-identity", Some(replacement.identity), Some(replacement.server), None)
        }
        Decision::SetQuota { quota } => match *quota {
            Quota::Total { bytes } => ("set-quota --total", None, None, Some(bytes)),
            Quota::Each { bytes } => ("set-quota --each", None, None, Some(bytes)),
            Quota::Owner { key, bytes } => ("set-quota --of", Some(key), None, bytes),
        },
    }
}

async fn list(session: &Session) -> Result<(), Failure> {
    let administrators = session.client.administrators().await?;
    let pending = session.client.decisions().await?;
    let needed = session.client.manifest().administrators_needed;
    if session.json {
        let pending: Vec<_> = pending
            .iter()
            .map(|pending| {
                let (what, key, server, bytes) = described(&pending.decision);
                json!({
                    "decision": what, "key": key, "server": server, "bytes": bytes, "approvals": pending.approvals,
                    "since": pending.since,
                })
            })
            .collect();
        print_json(&json!({ "administrators": administrators, "needed": needed, "pending": pending }));
        return Ok(());
    }
    println!("{needed} of {} administrators decide:", administrators.len());
    administrators.iter().for_each(|key| println!("  {key}"));
    for pending in pending {
        let (what, key, server, bytes) = described(&pending.decision);
        let of = server.map_or(String::new(), |server| format!(" of server {server}:"));
        let key = key.map_or(String::new(), |key| format!(" {key}"));
        let bytes = bytes.map_or(String::new(), |bytes| format!(" {bytes}"));
        println!("asked for by {} since {}: {what}{of}{key}{bytes}", pending.approvals.len(), pending.since);
    }
    Ok(())
}
