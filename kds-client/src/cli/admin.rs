//! admin list, add, remove, replace-identity.

use super::output::print_json;
use super::write::signing_key_file;
use super::{Failure, Session};
use clap::Subcommand;
use quorum::request::{Decision, Done};
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
}

/// A key in base64, or a file that holds one.
fn public_key(text: &str) -> Result<PublicKey, Failure> {
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

/// What is asked for, the key, and the server if it is a server's.
fn described(decision: &Decision) -> (&'static str, PublicKey, Option<ServerId>) {
    match decision {
        Decision::AddAdministrator { key } => ("add", *key, None),
        Decision::RemoveAdministrator { key } => ("remove", *key, None),
        Decision::ReplaceIdentity { replacement } => {
            ("replace-identity", replacement.identity, Some(replacement.server))
        }
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
                let (what, key, server) = described(&pending.decision);
                json!({ "decision": what, "key": key, "server": server, "approvals": pending.approvals, "since": pending.since })
            })
            .collect();
        print_json(&json!({ "administrators": administrators, "needed": needed, "pending": pending }));
        return Ok(());
    }
    println!("{needed} of {} administrators decide:", administrators.len());
    administrators.iter().for_each(|key| println!("  {key}"));
    for pending in pending {
        let (what, key, server) = described(&pending.decision);
        let of = server.map_or(String::new(), |server| format!(" of server {server}:"));
        println!("asked for by {} since {}: {what}{of} {key}", pending.approvals.len(), pending.since);
    }
    Ok(())
}
