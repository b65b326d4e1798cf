//! status: how every server is doing, by its own word.

use super::output::print_json;
use super::{Failure, Session};
use kds_client::api::{ServerStatus, SpaceStatus, TransferStatus};
use kds_client::error::words;
use kds_client::{ExitStatus, now};
use quorum::ServerId;
use quorum::ordering::Part;
use serde_json::{Value, json};
use tokio::task::JoinSet;

pub(super) async fn status(session: &Session) -> Result<(), Failure> {
    // Servers that were given another identity have another certificate too. Too few answers are no reason to
    // say nothing of those that there are.
    let _ = session.client.follow().await;
    let manifest = session.client.manifest();
    let mut tasks = JoinSet::new();
    for server in manifest.grid().servers() {
        let client = session.client.clone();
        tasks.spawn(async move {
            let patience = std::time::Duration::from_secs(3);
            let answer = tokio::time::timeout(patience, client.server_status(server)).await;
            (server, answer.unwrap_or_else(|_| Err("no answer in time".into())))
        });
    }
    let mut servers: Vec<(ServerId, Result<ServerStatus, String>)> = Vec::new();
    while let Some(done) = tasks.join_next().await {
        servers.push(done.map_err(Failure::other)?);
    }
    servers.sort_by_key(|(server, _)| *server);
    let t = manifest.thresholds;
    let reachable: Vec<_> = servers.iter().filter_map(|(_, status)| status.as_ref().ok()).collect();
    // The cluster's view and epoch are what q servers have reached: a liar's word alone moves nothing.
    let reached = |value: &dyn Fn(&ServerStatus) -> u64| {
        let mut values: Vec<_> = reachable.iter().map(|status| value(status)).collect();
        values.sort_unstable_by(|a, b| b.cmp(a));
        values.get(t.q() - 1).or(values.last()).copied().unwrap_or(0)
    };
    let view = reached(&|status| status.view.0);
    let epoch = reached(&|status| status.epoch.0);
    // The median of what they say, for the same reason.
    let mut refreshed: Vec<f64> = reachable.iter().filter_map(|status| status.last_refresh_seconds).collect();
    refreshed.sort_by(f64::total_cmp);
    let last_refresh = refreshed.get(refreshed.len() / 2).copied();
    // The median again.
    let mut told: Vec<_> = reachable.iter().filter_map(|status| status.space).collect();
    told.sort_by_key(|space| (space.alarm, space.used));
    let space = told.get(told.len() / 2).copied();
    if session.json {
        let documents: Vec<_> =
            servers.iter().map(|(server, status)| document(session, *server, status)).collect();
        print_json(&json!({
            "cluster": manifest.cluster_id(),
            "n": t.servers, "f": t.faulty, "q": t.quorum, "b": t.masked, "k": t.threshold,
            "epoch": epoch,
            "last_refresh_seconds": last_refresh,
            "view": view,
            "primary": quorum::View(view).primary(t.n()),
            "space": space,
            "servers": documents,
            "time": now(),
        }));
    } else {
        println!("cluster {}", manifest.cluster_id());
        println!(
            "n = {}, f = {}, q = {}, b = {}, k = {}",
            t.servers, t.faulty, t.quorum, t.masked, t.threshold
        );
        match last_refresh {
            Some(seconds) => {
                println!("epoch {epoch}, secrets last renewed {:.0} s ago", seconds.clamp(0.0, 1e9))
            }
            None => println!("epoch {epoch}"),
        }
        if let Some(warning) = space.as_ref().and_then(SpaceStatus::warning) {
            println!("ALARM {warning}");
        }
        println!("server  row col  view  executed  certified  complete  secrets  shares  peers  up for");
        for (server, status) in &servers {
            match status {
                Ok(s) => println!(
                    "{:>6}  {:>3} {:>3}  {:>4}  {:>8}  {:>9}  {:>8}  {:>7}  {:>6}  {:>5}  {:>6}{}",
                    server,
                    manifest.grid().row_of(*server),
                    manifest.grid().column_of(*server),
                    s.view,
                    s.sequence,
                    s.certified,
                    s.complete,
                    s.secrets,
                    s.shares,
                    s.peers_connected,
                    up_for(s),
                    doing(s)
                ),
                Err(why) => println!("{server:>6}  unreachable: {}", words(why)),
            }
        }
    }
    if reachable.len() < t.q() {
        let text =
            format!("only {} of {} servers answer; {} are needed", reachable.len(), t.servers, t.quorum);
        return Err(Failure::new(ExitStatus::Unavailable, text));
    }
    Ok(())
}

/// Since when it runs, by its own clock: a watchdog restarts it now and then.
fn up_for(status: &ServerStatus) -> String {
    let ms = status.time.zip(status.started).map(|(time, started)| time.since_ms(started));
    match ms.map(|ms| ms / 1_000) {
        None => String::new(),
        Some(seconds @ 0..120) => format!("{seconds} s"),
        Some(seconds @ 120..7_200) => format!("{} min", seconds / 60),
        Some(seconds) => format!("{} h", seconds / 3_600),
    }
}

/// What keeps a server from being a full member, for people.
fn doing(status: &ServerStatus) -> String {
    let transfer = status.transfer.map(|transfer| {
        let TransferStatus { target, entries, missing_parts } = transfer;
        format!(" (fetching state {target}: {entries} entries so far, {missing_parts} parts to go)")
    });
    let what = match status.part {
        Part::Voting if status.recovering => "  catching up",
        Part::Voting => "",
        Part::Estimating => "  starting",
        Part::Recovering => "  recovering",
        Part::Repairing => "  repairing its state",
        Part::Stopped => "  stopped",
    };
    let troubles = status.troubles.iter().map(|trouble| {
        let since = status.time.map(|now| now.since_ms(trouble.since) / 1_000);
        format!("\n    {}, for {} s", trouble.kind.what(), since.unwrap_or_default())
    });
    format!("{what}{}{}", transfer.unwrap_or_default(), troubles.collect::<String>())
}

fn document(session: &Session, server: ServerId, status: &Result<ServerStatus, String>) -> Value {
    let grid = session.client.manifest().grid();
    match status {
        Ok(status) => {
            let mut document = json!(status);
            document["reachable"] = json!(true);
            // Where a server stands is the manifest's to say, not its own.
            document["id"] = json!(server);
            document["row"] = json!(grid.row_of(server));
            document["column"] = json!(grid.column_of(server));
            document
        }
        Err(why) => json!({
            "id": server, "row": grid.row_of(server), "column": grid.column_of(server),
            "reachable": false, "why": why,
        }),
    }
}
