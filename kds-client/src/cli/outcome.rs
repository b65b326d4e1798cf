//! outcome: what came of a write whose answer did not come.

use super::output::print_json;
use super::{Failure, Session};
use clap::Args;
use kds_client::deadline::after;
use kds_client::{ClientError, ExitStatus, Ticket, WhatCame};
use quorum::request::Done;
use serde_json::json;
use std::time::Duration;

/// How long to wait before it is asked again.
const PAUSE: Duration = Duration::from_millis(300);

#[derive(Args)]
pub(super) struct OutcomeArgs {
    /// What the write that was not answered named: kdsreq1…
    request: Ticket,
}

pub(super) async fn outcome(session: &Session, args: &OutcomeArgs) -> Result<(), Failure> {
    let deadline = after(session.client.timeout());
    let ticket = &args.request;
    let executed = loop {
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        let came = match session.client.with_timeout(left).outcome(ticket).await {
            Ok(came) => came,
            // Servers may come back, or catch up.
            Err(ClientError::Unavailable { .. } | ClientError::Unverified { .. }) if left > 2 * PAUSE => {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        match came {
            WhatCame::Executed(executed) => break executed,
            WhatCame::NeverExecuted(absence) => {
                let text = format!(
                    "not executed, and it never will be: it expired at {}, which is proved; it can be done again",
                    ticket.expiry
                );
                return Err(Failure::absent(&absence, text));
            }
            WhatCame::Forgotten => return Err(ClientError::Forgotten { expiry: ticket.expiry }.into()),
            WhatCame::Pending if tokio::time::Instant::now() + PAUSE < deadline => {
                tokio::time::sleep(PAUSE).await;
            }
            WhatCame::Pending => {
                let text =
                    format!("not executed so far; it may still be until {}: ask again then", ticket.expiry);
                return Err(Failure::new(ExitStatus::Unavailable, text));
            }
        }
    };
    let done = executed.outcome().map_err(ClientError::from)?;
    let sequence = executed.sequence();
    let version = match done {
        Done::Record { version } => Some(version),
        _ => None,
    };
    if session.json {
        print_json(&json!({ "executed": true, "version": version, "sequence": sequence }));
        return Ok(());
    }
    let version = version.map_or(String::new(), |version| format!(": version {version}"));
    println!("executed{version}, sequence {sequence}");
    Ok(())
}
