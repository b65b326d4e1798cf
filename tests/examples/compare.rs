//! Acknowledged writes side by side: the service unreplicated, at n = 4 and n = 9, and etcd.
//!
//! ```text
//! apt-get install etcd-server
//! cargo build --release --workspace && cargo run --release -p kds-tests --example compare -- [SECONDS] [ROUNDS]
//! ```
//!
//! One after the other on this machine, in rounds, so that a slow minute hits all alike: servers and load
//! generator share its cores. Durability is the same everywhere: what is acknowledged survives a power
//! failure (etcd and SQLite both flush before they answer). etcd runs as three members, TLS with client
//! certificates for clients and peers, asked over gRPC on one connection to each member, as its own client
//! does. A write of ours counts when its receipt is verified and the write is complete; both carry about 200
//! bytes of value. "Unreplicated" is the same server program alone: same API, same checks, same storage;
//! nobody to agree with.

use anyhow::{Context as _, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use kds_tests::{Cluster, entry};
use quorum::record::Name;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

const CLIENTS: [usize; 4] = [1, 16, 64, 256];

/// What one measurement gave.
#[derive(Clone, Copy, Default)]
struct Measured {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Of all processes, the load generator among them.
    cpu_ms_per_operation: f64,
    errors: usize,
}

/// CPU time that a process has used, in milliseconds.
fn cpu_ms(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    (ticks(11) + ticks(12)) * 10.0
}

async fn measure<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
    clients: usize,
    seconds: f64,
    processes: &[u32],
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> Measured {
    let all: Vec<u32> = processes.iter().copied().chain([std::process::id()]).collect();
    let cpu = || all.iter().map(|process| cpu_ms(*process)).sum::<f64>();
    let number = Arc::new(AtomicU64::new(rand::random::<u32>().into()));
    let (begin, cpu_before) = (Instant::now(), cpu());
    let end = begin + Duration::from_secs_f64(seconds);
    let tasks: Vec<_> = (0..clients)
        .map(|_| {
            let (operation, number) = (operation.clone(), Arc::clone(&number));
            tokio::spawn(async move {
                let (mut latencies, mut errors) = (Vec::new(), 0);
                while Instant::now() < end {
                    let asked = Instant::now();
                    match operation(number.fetch_add(1, Ordering::Relaxed)).await {
                        Ok(()) => latencies.push(asked.elapsed().as_secs_f64() * 1000.0),
                        Err(_) => errors += 1,
                    }
                }
                (latencies, errors)
            })
        })
        .collect();
    let (mut latencies, mut errors) = (Vec::new(), 0);
    for task in tasks {
        let (more, failed) = task.await.expect("clients do not panic");
        latencies.extend(more);
        errors += failed;
    }
    let took = begin.elapsed().as_secs_f64();
    latencies.sort_by(f64::total_cmp);
    let at = |q: f64| {
        latencies.get(((latencies.len() as f64 - 1.0) * q).max(0.0) as usize).copied().unwrap_or(0.0)
    };
    let done = latencies.len() as f64;
    Measured {
        per_second: done / took,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        cpu_ms_per_operation: (cpu() - cpu_before) / done.max(1.0),
        errors,
    }
}

async fn ours(servers: usize, seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let cluster = Cluster::start(servers).await?;
    let processes: Vec<_> = (0..servers).filter_map(|server| cluster.process(server)).collect();
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
        let run = rand::random::<u32>();
        let operation = move |i: u64| {
            let (client, key) = (client.clone(), key.clone());
            async move {
                let mut entry = entry(1, None);
                entry.metadata.insert("value".into(), "x".repeat(150));
                let written =
                    client.register(&key, Name::new(format!("bench/{run:08x}/{i:012}"))?, entry).await?;
                ensure!(written.complete, "not complete");
                Ok(())
            }
        };
        // Warm: connections, caches, and a state that is not empty.
        measure(clients, 0.5, &processes, operation.clone()).await;
        measured.push(measure(clients, seconds, &processes, operation).await);
    }
    Ok(measured)
}

/// Three members of etcd; stopped when dropped.
struct Etcd {
    members: Vec<Child>,
    connections: Vec<SendRequest<Full<Bytes>>>,
    _folder: tempfile::TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for member in &mut self.members {
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

impl Etcd {
    async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let hosts = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let own = kds_certs::generate("etcd", &hosts, 2026)?;
        let (certificate, key) = (folder.path().join("etcd.pem"), folder.path().join("etcd.key"));
        std::fs::write(&certificate, &own.certificate_pem)?;
        std::fs::write(&key, own.key_pem.as_bytes())?;
        let mut held = Vec::new();
        for _ in 0..6 {
            held.push(TcpListener::bind("127.0.0.1:0").await?);
        }
        let ports: Vec<u16> =
            held.iter().map(|l| Ok(l.local_addr()?.port())).collect::<std::io::Result<_>>()?;
        drop(held);
        let url = |port: u16| format!("https://127.0.0.1:{port}");
        let cluster: Vec<_> = (0..3).map(|i| format!("m{i}={}", url(ports[2 * i + 1]))).collect();
        let mut members = Vec::new();
        for i in 0..3 {
            let (clients, peers) = (url(ports[2 * i]), url(ports[2 * i + 1]));
            let file = |path: &Path| path.display().to_string();
            let (name, data) = (format!("m{i}"), file(&folder.path().join(format!("m{i}"))));
            let cluster = cluster.join(",");
            let (pem, key) = (file(&certificate), file(&key));
            let options = [
                ("--name", &name),
                ("--data-dir", &data),
                ("--listen-client-urls", &clients),
                ("--advertise-client-urls", &clients),
                ("--listen-peer-urls", &peers),
                ("--initial-advertise-peer-urls", &peers),
                ("--initial-cluster", &cluster),
                ("--cert-file", &pem),
                ("--key-file", &key),
                ("--trusted-ca-file", &pem),
                ("--peer-cert-file", &pem),
                ("--peer-key-file", &key),
                ("--peer-trusted-ca-file", &pem),
            ];
            let member = Command::new("etcd")
                .args(options.iter().flat_map(|(option, value)| [*option, value.as_str()]))
                .args(["--client-cert-auth", "--peer-client-cert-auth", "--log-level", "error"])
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(folder.path().join(format!("m{i}.log")))?)
                .spawn()
                .context("cannot start etcd; `apt-get install etcd-server`")?;
            members.push(member);
        }
        let tls = tls(&own.certificate, own.key_pem.as_bytes())?;
        let mut etcd = Self { members, connections: Vec::new(), _folder: folder };
        let deadline = Instant::now() + Duration::from_secs(30);
        for i in 0..3 {
            loop {
                match connect(&tls, ports[2 * i]).await {
                    Ok(connection) if put(connection.clone(), b"ready", b"?").await.is_ok() => {
                        etcd.connections.push(connection);
                        break;
                    }
                    _ => {
                        ensure!(Instant::now() < deadline, "etcd does not start");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            }
        }
        Ok(etcd)
    }
}

/// Trusts exactly this certificate, and shows it.
fn tls(certificate: &[u8], key_pem: &[u8]) -> anyhow::Result<TlsConnector> {
    use tokio_rustls::rustls::pki_types::pem::PemObject as _;
    use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use tokio_rustls::rustls::{ClientConfig, RootCertStore};
    let certificate = CertificateDer::from(certificate.to_vec());
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone())?;
    let key = PrivateKeyDer::from_pem_slice(key_pem)?;
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate], key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn connect(tls: &TlsConnector, port: u16) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let tcp = TcpStream::connect(("127.0.0.1", port)).await?;
    tcp.set_nodelay(true)?;
    let stream = tls.connect("localhost".try_into()?, tcp).await?;
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// `etcdserverpb.KV/Put` over gRPC: a length-prefixed protobuf message with two byte strings.
async fn put(mut connection: SendRequest<Full<Bytes>>, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
    fn field(message: &mut Vec<u8>, number: u8, bytes: &[u8]) {
        message.push(number << 3 | 2);
        let mut length = bytes.len();
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        message.push(length as u8);
        message.extend_from_slice(bytes);
    }
    let mut message = Vec::with_capacity(300);
    field(&mut message, 1, key);
    field(&mut message, 2, value);
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(&message);
    let request = Request::post("https://localhost/etcdserverpb.KV/Put")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)))?;
    let response = connection.send_request(request).await?;
    let in_head = response.headers().get("grpc-status").cloned();
    let body = response.into_body().collect().await?;
    let status = in_head.or(body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned()));
    ensure!(status.as_ref().is_some_and(|status| status == "0"), "etcd answers {status:?}");
    Ok(())
}

async fn etcd(seconds: f64) -> anyhow::Result<Vec<Measured>> {
    let etcd = Etcd::start().await?;
    let processes: Vec<_> = etcd.members.iter().map(Child::id).collect();
    let mut measured = Vec::new();
    for clients in CLIENTS {
        let connections = etcd.connections.clone();
        let operation = move |i: u64| {
            let connection = connections[i as usize % connections.len()].clone();
            async move { put(connection, format!("bench/{i:012}").as_bytes(), &[b'x'; 200]).await }
        };
        measure(clients, 0.5, &processes, operation.clone()).await;
        measured.push(measure(clients, seconds, &processes, operation).await);
    }
    Ok(measured)
}

/// The middle one of several measurements of a thing, by throughput.
fn median(mut of: Vec<Measured>) -> Measured {
    of.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    of[of.len() / 2]
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let argument = |i: usize, default: f64| {
        std::env::args().nth(i).map_or(Ok(default), |text| text.parse()).context("a number")
    };
    let (seconds, rounds) = (argument(1, 5.0)?, argument(2, 3.0)? as usize);
    let only = std::env::args().nth(3);
    let names = ["unreplicated", "n = 4", "n = 9", "etcd, 3 members"];
    let mut all: Vec<Vec<Vec<Measured>>> = vec![vec![Vec::new(); CLIENTS.len()]; names.len()];
    for round in 1..=rounds {
        for (system, name) in names.iter().enumerate() {
            if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
                all[system].iter_mut().for_each(|of| of.push(Measured::default()));
                continue;
            }
            eprintln!("round {round} of {rounds}: {name} …");
            let measured = match system {
                0 => ours(1, seconds).await?,
                1 => ours(4, seconds).await?,
                2 => ours(9, seconds).await?,
                _ => etcd(seconds).await?,
            };
            for (clients, measured) in measured.into_iter().enumerate() {
                all[system][clients].push(measured);
            }
        }
    }
    println!("writes, {seconds} s each, the middle one of {rounds} rounds\n");
    println!(
        "| clients | system | per second | p50 ms | p99 ms | CPU ms per write | errors | throughput, p50, CPU ÷ etcd | p50 ÷ unreplicated |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for (c, clients) in CLIENTS.iter().enumerate() {
        let of: Vec<Measured> = (0..names.len()).map(|system| median(all[system][c].clone())).collect();
        let (alone, base) = (of[0], of[3]);
        for (name, m) in names.iter().zip(&of) {
            println!(
                "| {clients} | {name} | {:.0} | {:.2} | {:.2} | {:.2} | {} | {:.2}, {:.2}, {:.2} | {:.2} |",
                m.per_second,
                m.p50_ms,
                m.p99_ms,
                m.cpu_ms_per_operation,
                m.errors,
                m.per_second / base.per_second,
                m.p50_ms / base.p50_ms,
                m.cpu_ms_per_operation / base.cpu_ms_per_operation,
                m.p50_ms / alone.p50_ms,
            );
        }
    }
    let at = |system: usize, c: usize| median(all[system][c].clone()).per_second;
    println!(
        "\nn = 9 ÷ n = 4, throughput: {:.2} with 64 clients, {:.2} with 256",
        at(2, 2) / at(1, 2),
        at(2, 3) / at(1, 3)
    );
    Ok(())
}
