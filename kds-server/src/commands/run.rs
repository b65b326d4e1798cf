//! `run`: one server, until it is told to stop.

use crate::{config, logs, memory, server};
use anyhow::Context as _;
use clap::Args as ClapArgs;
use kds_client::keystore::Passphrase;
use std::path::PathBuf;
use tokio::signal::unix::{SignalKind, signal};

/// Run one server until Ctrl-C or SIGTERM
#[derive(ClapArgs)]
pub struct Args {
    /// The server's config.toml
    #[arg(long)]
    config: PathBuf,
    /// Ask for the passphrase of the key files (otherwise KDS_PASSPHRASE, if they are encrypted)
    #[arg(long)]
    passphrase: bool,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    // What operators need.
    logs::begin("info,sqlx=warn")?;
    memory::protect();
    let passphrase = match args.passphrase {
        true => Some(Passphrase::ask("Passphrase of the key files: ")?),
        false => Passphrase::from_environment(),
    };
    let loaded = memory::scrubbed(|| config::load(&args.config, passphrase))?;
    let runtime = memory::runtime()?;
    // On a worker, since those leave nothing on their stacks.
    let running = runtime.spawn(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for Ctrl-C")?;
        let stop = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        server::run(loaded, stop).await
    });
    runtime.block_on(running)?
}
