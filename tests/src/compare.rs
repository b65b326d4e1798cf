//! For benchmarks: measuring, and three members of etcd to compare with.

use anyhow::{Context as _, ensure};
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// What one measurement gave.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Operations that succeeded.
    pub per_second: f64,
    /// Median latency.
    pub p50_ms: f64,
    /// Latency that one in a hundred exceeds.
    pub p99_ms: f64,
    /// CPU time of all processes, the load generator among them.
    pub cpu_ms_per_operation: f64,
    /// CPU time of the servers alone.
    pub server_cpu_ms_per_operation: f64,
    /// Operations that failed.
    pub errors: usize,
}

/// CPU time that a process has used, in milliseconds.
fn cpu_ms(process: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks = |i: usize| fields.get(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    (ticks(11) + ticks(12)) * 10.0
}

/// Runs an operation over and over by so many clients; `processes` are the servers.
pub async fn measure<F: Future<Output = anyhow::Result<()>> + Send + 'static>(
    clients: usize,
    seconds: f64,
    processes: &[u32],
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> Measured {
    let servers_cpu = || processes.iter().map(|process| cpu_ms(*process)).sum::<f64>();
    let own_cpu = || cpu_ms(std::process::id());
    let number = Arc::new(AtomicU64::new(rand::random::<u32>().into()));
    let (begin, servers_before, own_before) = (Instant::now(), servers_cpu(), own_cpu());
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
    let servers_used = servers_cpu() - servers_before;
    Measured {
        per_second: done / took,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        cpu_ms_per_operation: (servers_used + own_cpu() - own_before) / done.max(1.0),
        server_cpu_ms_per_operation: servers_used / done.max(1.0),
        errors,
    }
}

/// The middle one of several measurements of a thing, by throughput.
pub fn median(mut of: Vec<Measured>) -> Measured {
    of.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
    of[of.len() / 2]
}

/// Three members of etcd; stopped when dropped.
pub struct Etcd {
    members: Vec<Child>,
    /// One connection to each member.
    pub connections: Vec<SendRequest<Full<Bytes>>>,
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
    /// The members' processes.
    pub fn processes(&self) -> Vec<u32> {
        self.members.iter().map(Child::id).collect()
    }
    /// Starts them in a temporary folder, on free ports, with TLS and client certificates everywhere.
    pub async fn start() -> anyhow::Result<Self> {
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

/// A byte string as a field of a protobuf message.
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

/// A unary call over gRPC; gives the answer's message.
async fn call(
    mut connection: SendRequest<Full<Bytes>>,
    method: &str,
    message: &[u8],
) -> anyhow::Result<Bytes> {
    let mut body = vec![0];
    body.extend_from_slice(&(message.len() as u32).to_be_bytes());
    body.extend_from_slice(message);
    let request = Request::post(format!("https://localhost/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(Bytes::from(body)))?;
    let response = connection.send_request(request).await?;
    let in_head = response.headers().get("grpc-status").cloned();
    let body = response.into_body().collect().await?;
    let status = in_head.or(body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned()));
    ensure!(status.as_ref().is_some_and(|status| status == "0"), "etcd answers {status:?}");
    Ok(body.to_bytes())
}

/// `etcdserverpb.KV/Put`.
pub async fn put(connection: SendRequest<Full<Bytes>>, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
    let mut message = Vec::with_capacity(300);
    field(&mut message, 1, key);
    field(&mut message, 2, value);
    call(connection, "etcdserverpb.KV/Put", &message).await.map(drop)
}

/// `etcdserverpb.KV/Range` of one key, linearizable unless `serializable`; gives the answer's bytes.
pub async fn get(
    connection: SendRequest<Full<Bytes>>,
    key: &[u8],
    serializable: bool,
) -> anyhow::Result<Bytes> {
    let mut message = Vec::with_capacity(64);
    field(&mut message, 1, key);
    if serializable {
        // Field 7, a bool.
        message.extend_from_slice(&[7 << 3, 1]);
    }
    call(connection, "etcdserverpb.KV/Range", &message).await
}
