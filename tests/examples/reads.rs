//! Verified lookups side by side with etcd's reads and with a bare server that returns a constant.
//!
//! ```text
//! apt-get install etcd-server
//! cargo build --release --workspace && cargo run --release -p kds-tests --example reads -- [SECONDS] [ROUNDS] [ONLY]
//! ```
//!
//! One after the other on this machine, in rounds. etcd: three members with TLS and client certificates,
//! asked over gRPC on one connection to each member; linearizable reads (by the leader's leave) and serializable
//! ones (whatever a member has). Ours: one client of the library, shared by all tasks as a service shares
//! it; every answer is verified, comes from a full row or q servers, and is complete. "One server" and
//! "constant" are one plain GET each over the same kind of connection, without any check: the whole
//! answer of one of our servers, and a constant of the same size from a bare axum and rustls server.

use anyhow::{Context as _, ensure};
use kds_client::keystore::{self, SecretKind};
use kds_client::{Link, LookupOptions};
use kds_tests::compare::{Etcd, Measured, get, measure, median, put};
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::record::Name;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const CLIENTS: [usize; 4] = [1, 16, 64, 256];
const NAMES: u64 = 1_000;

fn name(i: u64) -> Name {
    Name::new(format!("bench/{:08}", i % NAMES)).expect("a good name")
}

async fn filled(servers: usize) -> anyhow::Result<Cluster> {
    let cluster = Cluster::start_unlimited(servers).await?;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..64 {
        let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
        tasks.spawn(async move {
            for i in (worker..NAMES).step_by(64) {
                let mut entry = entry(1, None);
                entry.metadata.insert("value".into(), "x".repeat(150));
                client.register(&key, name(i), entry).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    cluster.level().await?;
    Ok(cluster)
}

fn processes(cluster: &Cluster) -> Vec<u32> {
    (0..cluster.manifest.servers.len()).filter_map(|server| cluster.process(server)).collect()
}

async fn lookups(servers: usize, seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let cluster = filled(servers).await?;
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let client = cluster.client.clone();
        let operation = move |i: u64| {
            let client = client.clone();
            async move {
                let found = client.lookup(&name(i), &LookupOptions::default()).await?;
                ensure!(found.complete && found.record.is_some(), "not complete");
                Ok(())
            }
        };
        measure(clients, 0.5, &processes(&cluster), operation.clone()).await;
        measured.push(measure(clients, seconds, &processes(&cluster), operation).await);
    }
    Ok(measured)
}

/// Plain GETs of one path from one server.
async fn plain(
    link: Link,
    path: impl Fn(u64) -> String + Clone + Send + 'static,
    processes: &[u32],
    seconds: f64,
) -> Vec<Measured> {
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let (link, path) = (link.clone(), path.clone());
        let operation = move |i: u64| {
            let (link, path) = (link.clone(), path(i));
            async move {
                let (status, _) = link.send("GET", &path, vec![]).await.map_err(anyhow::Error::msg)?;
                ensure!(status == 200, "status {status}");
                Ok(())
            }
        };
        measure(clients, 0.5, processes, operation.clone()).await;
        measured.push(measure(clients, seconds, processes, operation).await);
    }
    measured
}

/// The whole answer of one of nine servers, and then a constant of its size.
async fn one_server(seconds: f64) -> anyhow::Result<[Vec<Measured>; 2]> {
    let mut cluster = filled(9).await?;
    let link = cluster.client.link(ServerId(0)).context("no server")?.clone();
    let path = |i| format!("/v1/records/{}", name(i).as_str().replace('/', "%2F"));
    let (_, answer) = link.send("GET", &path(0), vec![]).await.map_err(anyhow::Error::msg)?;
    let process = cluster.process(0).context("no process")?;
    // What ordering costs an idle server is not part of an answer's price.
    let ours = plain(link.clone(), path, &[process], seconds).await;
    // The constant takes the place of server 0, with its certificate.
    cluster.kill(0);
    let address = cluster.manifest.servers[0].url.replace("https://", "");
    let folder = cluster.server_dir(0);
    let mut bare = Bare(
        Command::new(std::env::current_exe()?)
            .args(["constant", &address, &answer.len().to_string()])
            .arg(&folder)
            .stdin(Stdio::null())
            .spawn()?,
    );
    for _ in 0..100 {
        if link.send("GET", "/ready", vec![]).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    let constant = plain(link, |_| "/constant".to_owned(), &[bare.0.id()], seconds).await;
    bare.0.kill()?;
    eprintln!("an answer has {} bytes", answer.len());
    Ok([ours, constant])
}

struct Bare(Child);
impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A bare axum and rustls server that returns a constant.
async fn constant(address: &str, bytes: usize, folder: &Path) -> anyhow::Result<()> {
    use hyper_util::rt::TokioIo;
    use hyper_util::service::TowerToHyperService;
    let key = keystore::read(&folder.join("tls.key"), SecretKind::TlsKey, None)?;
    let identity = kds_certs::TlsIdentity::from_pem(&std::fs::read(folder.join("tls.pem"))?, &key)?;
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(kds_certs::https_server(&identity)?));
    let listener = tokio::net::TcpListener::bind(address).await?;
    let body: &'static [u8] = vec![b'x'; bytes].leak();
    let answer = move || async move { ([("content-type", "application/json")], body) };
    let app = axum::Router::new().fallback(axum::routing::get(answer));
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        let (acceptor, app) = (acceptor.clone(), app.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(tcp).await else { return };
            let server = hyper::server::conn::http1::Builder::new();
            let _ = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app)).await;
        });
    }
}

async fn etcd(serializable: bool, seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let etcd = Etcd::start().await?;
    for i in 0..NAMES {
        put(etcd.connections[0].clone(), name(i).as_str().as_bytes(), &[b'x'; 200]).await?;
    }
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let connections = etcd.connections.clone();
        let operation = move |i: u64| {
            let connection = connections[i as usize % connections.len()].clone();
            async move {
                let answer = get(connection, name(i).as_str().as_bytes(), serializable).await?;
                ensure!(answer.len() > 200, "no value");
                Ok(())
            }
        };
        measure(clients, 0.5, &etcd.processes(), operation.clone()).await;
        measured.push(measure(clients, seconds, &etcd.processes(), operation).await);
    }
    Ok(measured)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if let [constant_mode, address, bytes, folder] = &arguments[..]
        && constant_mode == "constant"
    {
        return constant(address, bytes.parse()?, folder.as_ref()).await;
    }
    let number = |i: usize, default: f64| arguments.get(i).map_or(Ok(default), |text| text.parse());
    let (seconds, rounds) = (number(0, 4.0)?, number(1, 3.0)? as usize);
    let only = arguments.get(2);
    let names = ["n = 4", "n = 9", "etcd, linearizable", "etcd, serializable", "one server", "constant"];
    let wanted = |system: usize| only.is_none_or(|only| names[system].contains(only.as_str()));
    let mut all: Vec<Vec<Vec<Measured>>> = vec![vec![Vec::new(); CLIENTS.len()]; names.len()];
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds} …");
        let nothing = vec![Measured::default(); CLIENTS.len()];
        let [one, bare] = match wanted(4) || wanted(5) {
            true => one_server(seconds).await?,
            false => [nothing.clone(), nothing.clone()],
        };
        for system in 0..names.len() {
            let measured = match system {
                0 | 1 if wanted(system) => lookups([4, 9][system], seconds).await?,
                2 | 3 if wanted(system) => etcd(system == 3, seconds).await?,
                4 => one.clone(),
                5 => bare.clone(),
                _ => nothing.clone(),
            };
            for (clients, measured) in measured.into_iter().enumerate() {
                all[system][clients].push(measured);
            }
        }
    }
    println!("reads, {seconds} s each, the middle one of {rounds} rounds\n");
    println!(
        "| clients | system | per second | p50 ms | p99 ms | CPU µs per read: all | servers | errors | throughput, p50, CPU ÷ etcd linearizable |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (c, clients) in CLIENTS.iter().enumerate() {
        let of: Vec<Measured> = (0..names.len()).map(|system| median(all[system][c].clone())).collect();
        let base = of[2];
        for (name, m) in names.iter().zip(&of) {
            println!(
                "| {clients} | {name} | {:.0} | {:.2} | {:.2} | {:.0} | {:.0} | {} | {:.2}, {:.2}, {:.2} |",
                m.per_second,
                m.p50_ms,
                m.p99_ms,
                m.cpu_ms_per_operation * 1000.0,
                m.server_cpu_ms_per_operation * 1000.0,
                m.errors,
                m.per_second / base.per_second,
                m.p50_ms / base.p50_ms,
                m.cpu_ms_per_operation / base.cpu_ms_per_operation,
            );
        }
        println!(
            "| {clients} | a server's CPU per answer ÷ the constant's | {:.2} | | | | | | |",
            of[4].server_cpu_ms_per_operation / of[5].server_cpu_ms_per_operation
        );
    }
    Ok(())
}
