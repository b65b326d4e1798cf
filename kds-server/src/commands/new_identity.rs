//! `new-identity`: the folder of a server that is to take another one's place.

use super::init::NewServer;
use crate::config::REPLACEMENT;
use anyhow::{Context as _, ensure};
use clap::Args as ClapArgs;
use kds_client::keystore::Passphrase;
use kds_client::manifest_file;
use quorum::ServerId;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Write the folder of a server that is to take another one's place, with an identity of its own
///
/// For a server whose identity key may be in strange hands, or is lost. Give the replacement.toml in it to
/// the administrators: `kds-client admin replace-identity replacement.toml`. Start it with `kds-server run`
/// at once; it waits until they have decided, and then fetches the state and recovers its shares.
#[derive(ClapArgs)]
pub struct Args {
    /// The cluster's manifest
    #[arg(long, value_name = "FILE")]
    manifest: PathBuf,
    /// Whose place it takes
    #[arg(long, value_name = "N")]
    server: u8,
    /// Folder to write to; must not exist
    #[arg(long)]
    dir: PathBuf,
    /// Where it listens for clients, and where they reach it [default: as the manifest has it]
    #[arg(long, value_name = "ADDRESS:PORT")]
    clients: Option<SocketAddr>,
    /// Where it listens for servers, and where they reach it [default: as the manifest has it]
    #[arg(long, value_name = "ADDRESS:PORT")]
    peers: Option<SocketAddr>,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let manifest = manifest_file::read(&args.manifest)?;
    let id = ServerId(args.server);
    let entry = manifest.server(id).with_context(|| format!("server {id} is not in the manifest"))?;
    ensure!(!args.dir.exists(), "{} exists already; name a new folder with --dir", args.dir.display());
    let listening = |given: Option<SocketAddr>, known: &str, option: &str| match given {
        Some(address) => Ok(address),
        None => known.parse().with_context(|| format!("{known} is no address to listen on: give {option}")),
    };
    let known = entry.url.trim_start_matches("https://").trim_end_matches('/');
    let listen_clients = listening(args.clients, known, "--clients")?;
    let listen_peers = listening(args.peers, &entry.peer, "--peers")?;
    let server = NewServer {
        id,
        manifest: "manifest.toml".into(),
        listen_clients,
        listen_peers,
        url: args.clients.map_or(entry.url.clone(), |clients| format!("https://{clients}")),
        peer: args.peers.map_or(entry.peer.clone(), |peers| peers.to_string()),
    };
    let replacement = server.write(&args.dir, Passphrase::from_environment().as_ref())?;
    fs::copy(&args.manifest, args.dir.join("manifest.toml")).context("cannot copy the manifest")?;
    let path = args.dir.join(REPLACEMENT);
    fs::write(&path, toml::to_string(&replacement)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("identity {}", replacement.identity);
    println!("start it with: kds-server run --config {}", args.dir.join("config.toml").display());
    println!("each administrator: kds-client admin replace-identity {}", path.display());
    Ok(())
}
