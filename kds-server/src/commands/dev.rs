//! `dev`: a cluster on this machine, every server its own process.

use super::init::NewCluster;
use super::processes::Processes;
use clap::Args as ClapArgs;
use kds_client::{Client, Options, manifest_file};
use quorum::Thresholds;
use quorum::manifest::Manifest;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Start a cluster on this machine, each server as its own process, until Ctrl-C
#[derive(ClapArgs)]
pub struct Args {
    /// Servers: 4, 9, 16, 25, …
    #[arg(long, default_value_t = 9)]
    servers: usize,
    /// Folder of the cluster; made where it is empty
    #[arg(long, default_value = "kds-dev")]
    dir: PathBuf,
    /// Server N gets client port P+2N and peer port P+2N+1 (default: free ports)
    #[arg(long, value_name = "P")]
    base_port: Option<u16>,
}

/// How long a cluster may take to come up.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let manifest_path = args.dir.join("manifest.toml");
    if !manifest_path.exists() {
        let thresholds = Thresholds::plan(args.servers, None, None)?;
        let hosts = &[IpAddr::V4(Ipv4Addr::LOCALHOST)];
        let dir = args.dir.as_path();
        NewCluster {
            thresholds,
            dir,
            base_port: args.base_port,
            hosts,
            epoch_seconds: 30,
            administrators: vec![],
            administrators_needed: 1,
        }
        .write()?;
    }
    let manifest = manifest_file::read(&manifest_path)?;
    let ready = args.dir.join("ready");
    let _ = std::fs::remove_file(&ready);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let client = Client::new(manifest.clone(), Options::default())?;
        let mut processes = Processes::start(&args.dir, manifest.thresholds.n())?;
        eprintln!("starting {} servers …", manifest.thresholds.n());
        tokio::select! {
            result = processes.ready(&client, START_PATIENCE) => {
                result?;
                std::fs::write(&ready, "ready\n")?;
                introduce(&manifest, &args.dir);
                tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
            }
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        eprintln!("stopping …");
        processes.stop();
        anyhow::Ok(())
    });
    let _ = std::fs::remove_file(&ready);
    result
}

fn introduce(manifest: &Manifest, dir: &Path) {
    println!("{}", picture(manifest));
    let in_default_place = dir == Path::new("kds-dev");
    if !in_default_place {
        println!("export KDS_MANIFEST={}\n", dir.join("manifest.toml").display());
    }
    println!("Try, in another terminal:");
    println!("  kds-client status");
    println!("  kds-client register alice --public-key ~/.ssh/id_ed25519.pub");
    println!("  kds-client lookup alice");
    println!("  echo 'attack at dawn' | kds-client secret put plan --in -");
    println!("  kds-client secret get plan");
    let last = manifest.servers.len() - 1;
    println!("  kill -9 $(cat {}/server-{last}/server.pid)    # and look up again", dir.display());
    println!("Ctrl-C stops all servers.");
}

/// The grid with its addresses.
pub fn picture(manifest: &Manifest) -> String {
    let t = manifest.thresholds;
    let address = |url: &str| url.trim_start_matches("https://").to_owned();
    let width = manifest.servers.iter().map(|s| address(&s.url).len() + 4).max().unwrap_or(0).max(16);
    let mut lines = vec![format!(
        "cluster {} — {} servers, f = {}, q = {}, b = {}, k = {}",
        manifest.cluster_id(),
        t.servers,
        t.faulty,
        t.quorum,
        t.masked,
        t.threshold
    )];
    for row in manifest.servers.chunks(usize::from(t.side)) {
        let cells: Vec<_> =
            row.iter().map(|s| format!("{:>3} {:<w$}", s.id, address(&s.url), w = width - 4)).collect();
        lines.push(format!("  [{} ]", cells.join(" |")));
    }
    lines.join("\n") + "\n"
}
