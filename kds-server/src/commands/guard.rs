//! `guard`: the watchdog of one server (PBFT-PR §4: proactive recovery).
//!
//! It runs the server as a child process and restarts it on a schedule, whether or not anything seems to be
//! wrong with it: whoever took the process over is out, and what was changed in its memory is gone. The
//! server that starts reads its state again, checks it against its certificate, fetches what differs, has
//! fresh session keys, and recovers shares that it lacks. Servers take turns: each has its own part of the
//! period, and nobody is restarted while another one is not back.

use crate::config::{self, Config};
use crate::logs;
use anyhow::{Context as _, ensure};
use clap::Args as ClapArgs;
use kds_client::api::ServerStatus;
use kds_client::{Client, Options, manifest_file};
use quorum::codec::sha256;
use quorum::ids::ServerId;
use quorum::ordering::Part;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep, timeout};

/// Run one server, and restart it on a schedule when all others are well
#[derive(ClapArgs)]
pub struct Args {
    /// The server's config.toml
    #[arg(long)]
    config: PathBuf,
    /// Seconds in which every server of the cluster has its turn once
    #[arg(long, default_value_t = 3_600, value_parser = clap::value_parser!(u64).range(5..=31_536_000))]
    period_seconds: u64,
}

/// How long a server that is told to stop may take.
const STOP_PATIENCE: Duration = Duration::from_secs(20);
/// How long a server that ended by itself is left alone; doubles while it does so again and again.
const RESTART_FIRST: Duration = Duration::from_millis(500);
const RESTART_MOST: Duration = Duration::from_secs(30);

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    let config: Config = toml::from_str(&text).context("this is not a server's config")?;
    let folder = config::folder_of(&args.config);
    let manifest = manifest_file::read(&folder.join(&config.manifest))?;
    let client = Client::new(manifest.clone(), Options::default())?;
    let program = std::env::current_exe().context("cannot find this program's file")?;
    let digest = sha256(&std::fs::read(&program)?);
    let servers = manifest.thresholds.n() as u64;
    let turn = Turn { period_ms: args.period_seconds * 1_000, server: config.server, servers };
    let guard = Guard { config: args.config.clone(), server: config.server, client, program, digest, turn };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(guard.run())
}

/// When a server's turn is: at the same moments for all guards, each server a part of the period.
struct Turn {
    period_ms: u64,
    server: ServerId,
    servers: u64,
}

impl Turn {
    /// Milliseconds until its next one.
    fn next_in(&self, now_ms: u64) -> u64 {
        let offset = self.period_ms * u64::from(self.server.0) / self.servers;
        let into = (now_ms + self.period_ms - offset % self.period_ms) % self.period_ms;
        self.period_ms - into
    }
}

struct Guard {
    config: PathBuf,
    server: ServerId,
    client: Client,
    program: PathBuf,
    digest: quorum::Hash,
    turn: Turn,
}

impl Guard {
    async fn run(&self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut child = self.start()?;
        let (mut wait, mut began) = (RESTART_FIRST, Instant::now());
        let mut last_turn: Option<Instant> = None;
        loop {
            let mut turn = Duration::from_millis(self.turn.next_in(kds_client::now().0));
            let period = Duration::from_millis(self.turn.period_ms);
            if turn < period / 2 && last_turn.is_some_and(|last| last.elapsed() < period / 2) {
                // The timer fired a moment early, or the clock was set: that turn was taken.
                turn += period;
            }
            tokio::select! {
                _ = terminate.recv() => return stop(&mut child).await,
                _ = interrupt.recv() => return stop(&mut child).await,
                ended = child.wait() => {
                    logs::say("guard", &format!("server {} ended by itself ({}); starting it again", self.server, ended?));
                    wait = if began.elapsed() > RESTART_MOST { RESTART_FIRST } else { (wait * 2).min(RESTART_MOST) };
                    tokio::select! {
                        _ = terminate.recv() => return Ok(()),
                        _ = interrupt.recv() => return Ok(()),
                        () = sleep(wait) => {}
                    }
                    (child, began) = (self.start()?, Instant::now());
                }
                () = sleep(turn) => match self.others_are_well().await {
                    Err(why) => {
                        last_turn = Some(Instant::now());
                        logs::say("guard", &format!("server {} keeps running, since {why:#}", self.server));
                    }
                    Ok(()) => {
                        last_turn = Some(Instant::now());
                        logs::say("guard", &format!("server {} is restarted, as it is its turn", self.server));
                        stop(&mut child).await?;
                        (child, began) = (self.start()?, Instant::now());
                    }
                },
            }
        }
    }

    /// Starts the server from the program that this guard was started from, unchanged.
    fn start(&self) -> anyhow::Result<Child> {
        let digest = sha256(&std::fs::read(&self.program)?);
        ensure!(
            digest == self.digest,
            "{} is not the program any more that this guard was started from\n  \
             was it upgraded? then start the guard again; otherwise find out who changed it",
            self.program.display()
        );
        let mut command = Command::new(&self.program);
        logs::hand_on(command.as_std_mut());
        command.arg("run").arg("--config").arg(&self.config).stdin(Stdio::null()).kill_on_drop(true);
        command.spawn().context("cannot start the server")
    }

    /// Whether every other server takes part, has its shares, and is up to date: at most one server at a
    /// time is away by plan.
    async fn others_are_well(&self) -> anyhow::Result<()> {
        for other in self.client.manifest().grid().servers().filter(|other| *other != self.server) {
            let status = self.client.server_status(other).await;
            let status = status.map_err(|why| anyhow::anyhow!("server {other} does not answer: {why}"))?;
            let ServerStatus { part, secrets, shares, troubles, .. } = status;
            if let Some(trouble) = troubles.first() {
                anyhow::bail!("server {other} says: {}", trouble.kind.what());
            }
            ensure!(part == Part::Voting, "server {other} does not vote yet");
            ensure!(shares == secrets, "server {other} has {shares} of {secrets} shares");
        }
        Ok(())
    }
}

/// Tells a server to stop, and makes it.
async fn stop(child: &mut Child) -> anyhow::Result<()> {
    if let Some(id) = child.id() {
        // SIGTERM without unsafe code or another crate.
        let _ = Command::new("kill").arg(id.to_string()).stderr(Stdio::null()).status().await;
        if timeout(STOP_PATIENCE, child.wait()).await.is_err() {
            child.kill().await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_server_has_a_turn_of_its_own_in_every_period() {
        let turns: Vec<_> =
            (0..9).map(|i| Turn { period_ms: 90_000, server: ServerId(i), servers: 9 }).collect();
        for start in [0, 1_700_000_000_123] {
            let mut moments: Vec<_> = turns.iter().map(|turn| start + turn.next_in(start)).collect();
            moments.sort_unstable();
            assert!(moments.windows(2).all(|two| two[1] - two[0] == 10_000), "{moments:?}");
            for turn in &turns {
                let first = start + turn.next_in(start);
                assert_eq!(turn.next_in(first), 90_000, "the next one is a period later");
            }
        }
    }
}
