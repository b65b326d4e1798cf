//! `signer`: the process that has a server's identity key.

use crate::signer::{Keeper, listen};
use crate::{logs, memory};
use clap::Args as ClapArgs;
use kds_client::keystore::Passphrase;
use quorum::ServerId;
use std::path::PathBuf;
use tokio::sync::oneshot;

/// Keep a server's identity key, and certify the keys of its epochs with it
///
/// Run it under a user of its own who owns FOLDER with identity.key, and name its socket in the server's
/// config.toml (signer = "PATH"). A server whose config names none starts a signer by itself.
#[derive(ClapArgs)]
pub struct Args {
    /// The cluster's manifest
    #[arg(long, value_name = "FILE")]
    manifest: PathBuf,
    /// Whose identity it is
    #[arg(long, value_name = "N")]
    server: u8,
    /// Where identity.key is, and where the counter is kept
    #[arg(long, value_name = "FOLDER")]
    folder: PathBuf,
    /// Where to listen
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// The user whose server may ask, besides the signer's own; repeatable
    #[arg(long, value_name = "UID")]
    allow_uid: Vec<u32>,
    /// Ask for the passphrase of the key file (otherwise KDS_PASSPHRASE, if it is encrypted)
    #[arg(long)]
    passphrase: bool,
    /// End when standard input is closed
    #[arg(long, hide = true)]
    until_closed: bool,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    logs::begin("info")?;
    let passphrase = match args.passphrase {
        true => Some(Passphrase::ask("Passphrase of the key file: ")?),
        false => Passphrase::from_environment(),
    };
    memory::protect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let own = rustix::process::geteuid().as_raw();
        let users = args.allow_uid.iter().copied().chain([own]).collect();
        let id = ServerId(args.server);
        let keeper = Keeper::open(&args.manifest, id, &args.folder, users, passphrase.as_ref()).await?;
        let listener = listen(&args.socket)?;
        println!("ready");
        if !args.until_closed {
            return keeper.serve(listener).await;
        }
        let (close, closed) = oneshot::channel::<()>();
        // Nobody writes there: it is closed when the process ends that holds the other end.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            drop(close);
        });
        tokio::select! {
            served = keeper.serve(listener) => served,
            _ = closed => Ok(()),
        }
    })
}
