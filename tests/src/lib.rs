//! Real clusters for tests: `kds-server` processes in a temporary folder, on free ports, and
//! servers that lie.

pub mod compare;
pub mod faults;
pub mod liar;
pub mod lies;
pub mod linearizable;
pub mod load;
pub mod mutants;
pub mod thief;
pub mod visitors;

use anyhow::{Context as _, bail, ensure};
use kds_client::keystore::{self, SecretKind};
use kds_client::{Client, Options, manifest_file};
use quorum::bytes::Blob;
use quorum::manifest::Manifest;
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::signing::SigningKey;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A program of this workspace, as built for these tests.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has a file");
    let folder = test.parent().and_then(Path::parent).expect("tests stand in target/PROFILE/deps");
    let program = folder.join(name);
    assert!(program.exists(), "{} is not built: run `cargo build` first", program.display());
    program
}

/// A cluster of server processes; stopped and removed when dropped.
pub struct Cluster {
    folder: tempfile::TempDir,
    ports: Ports,
    children: Vec<Option<Child>>,
    /// Where each server's log stood at its last start.
    log_starts: Vec<usize>,
    /// Through which programs each server is started.
    wrappers: Vec<Vec<String>>,
    /// Its manifest.
    pub manifest: Arc<Manifest>,
    /// A client with short timeouts.
    pub client: Client,
    /// The administrator's key.
    pub administrator: SigningKey,
}

impl Cluster {
    /// Makes and starts a cluster, and waits until every server is ready.
    pub async fn start(servers: usize) -> anyhow::Result<Self> {
        Self::start_with(servers, &[]).await
    }
    /// The same; `init` gets these arguments too.
    pub async fn start_with(servers: usize, arguments: &[&str]) -> anyhow::Result<Self> {
        let mut cluster = Self::new(servers, arguments)?;
        for server in 0..servers {
            cluster.run(server)?;
        }
        cluster.ready().await?;
        Ok(cluster)
    }
    /// The same without rate limits, for benchmarks: all load comes from one address there.
    pub async fn start_unlimited(servers: usize) -> anyhow::Result<Self> {
        let mut cluster = Self::new(servers, &[])?;
        for server in 0..servers {
            cluster.limit_requests(server, 0)?;
            cluster.configure(server, "connections_per_address", "640")?;
            cluster.run(server)?;
        }
        cluster.ready().await?;
        Ok(cluster)
    }
    /// Sets how much one address may ask of a server that does not run yet.
    pub fn limit_requests(&self, server: usize, per_second: u32) -> anyhow::Result<()> {
        self.configure(server, "requests_per_second", &per_second.to_string())
    }
    /// Sets something in the configuration of a server that does not run.
    pub fn configure(&self, server: usize, key: &str, value: &str) -> anyhow::Result<()> {
        let path = self.server_dir(server).join("config.toml");
        let config = std::fs::read_to_string(&path)?;
        let is_other = |line: &&str| line.split_once(" = ").is_none_or(|(known, _)| known != key);
        let others = config.lines().filter(is_other).map(|line| format!("{line}\n"));
        Ok(std::fs::write(&path, others.chain([format!("{key} = {value}\n")]).collect::<String>())?)
    }
    /// A port of this cluster that no server listens on by itself.
    pub fn spare_port(&self, server: usize) -> anyhow::Result<u16> {
        let port = self.ports.first + (2 * self.children.len() + server) as u16;
        ensure!(port < self.ports.first + Ports::EACH, "too many servers");
        Ok(port)
    }
    /// Makes a cluster and starts nothing; `init` gets these arguments too.
    pub fn new(servers: usize, arguments: &[&str]) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let ports = Ports::reserve(2 * servers as u16)?;
        let made = Command::new(program("kds-server"))
            .args(match servers {
                1 => vec!["init".into(), "--unreplicated".into()],
                _ => vec!["init".into(), format!("--servers={servers}")],
            })
            .arg("--dir")
            .arg(folder.path())
            .args((!arguments.contains(&"--base-port")).then(|| format!("--base-port={}", ports.first)))
            .args(arguments)
            .output()?;
        ensure!(made.status.success(), "init failed: {}", String::from_utf8_lossy(&made.stderr));
        let manifest = manifest_file::read(&folder.path().join("manifest.toml"))?;
        let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
        let client = Client::new(Arc::clone(&manifest), options)?;
        let administrator =
            keystore::read_signing_key(&folder.path().join("admin.key"), SecretKind::SigningKey, None)?;
        let children = (0..servers).map(|_| None).collect();
        let log_starts = vec![0; servers];
        let wrappers = vec![vec![]; servers];
        Ok(Self { folder, ports, children, log_starts, wrappers, manifest, client, administrator })
    }
    /// Starts a server through another program from now on.
    pub fn start_through<S: Into<String>>(&mut self, server: usize, program: impl IntoIterator<Item = S>) {
        self.wrappers[server] = program.into_iter().map(Into::into).collect();
    }
    /// A server's process, if it runs.
    pub fn process(&self, server: usize) -> Option<u32> {
        self.children[server].as_ref().map(Child::id)
    }
    /// A client that has seen nothing yet.
    pub fn fresh_client(&self) -> Client {
        self.fresh()()
    }
    /// Makes such clients, for tasks that outlive a borrow of the cluster.
    pub fn fresh(&self) -> impl Fn() -> Client + Send + use<> {
        let manifest = Arc::clone(&self.manifest);
        move || {
            let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
            Client::new(Arc::clone(&manifest), options).expect("the manifest was good before")
        }
    }
    /// The cluster's folder.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }
    /// A server's folder.
    pub fn server_dir(&self, server: usize) -> PathBuf {
        self.dir().join(format!("server-{server}"))
    }
    /// Makes a server that does not run yet listen for clients at a port that nobody knows, so that a
    /// [`liar::Liar`] can answer them in its place while it takes part in ordering.
    pub fn hide_from_clients(&self, server: usize) -> anyhow::Result<()> {
        self.configure(server, "listen_clients", "\"127.0.0.1:0\"")
    }
    /// The same at a port that the test knows: gives the way to it.
    pub fn hide_behind(&self, server: usize) -> anyhow::Result<kds_client::Link> {
        let port = self.spare_port(server)?;
        self.configure(server, "listen_clients", &format!("\"127.0.0.1:{port}\""))?;
        let mut manifest = Manifest::clone(&self.manifest);
        manifest.servers[server].url = format!("https://127.0.0.1:{port}");
        kds_client::Link::new(&Arc::new(manifest), quorum::ServerId(server as u8)).map_err(anyhow::Error::msg)
    }
    /// Starts a server's process.
    pub fn run(&mut self, server: usize) -> anyhow::Result<()> {
        self.run_as(server, &["run"])
    }
    /// Starts a server by another command than `run`, with arguments.
    pub fn run_as(&mut self, server: usize, arguments: &[&str]) -> anyhow::Result<()> {
        let folder = self.server_dir(server);
        self.log_starts[server] = self.log(server).len();
        let log = File::options().create(true).append(true).open(folder.join("server.log"))?;
        let command =
            [self.wrappers[server].as_slice(), &[program("kds-server").display().to_string()]].concat();
        let child = Command::new(&command[0])
            .args(&command[1..])
            .args(arguments)
            .arg("--config")
            .arg(folder.join("config.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.children[server] = Some(child);
        Ok(())
    }
    /// kill −9.
    pub fn kill(&mut self, server: usize) {
        if let Some(mut child) = self.children[server].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
    /// SIGTERM, and waits for the end; its exit status must be 0.
    pub fn terminate(&mut self, server: usize) -> anyhow::Result<()> {
        let Some(mut child) = self.children[server].take() else { bail!("server {server} does not run") };
        Command::new("kill").arg(child.id().to_string()).status()?;
        let deadline = Instant::now() + Duration::from_secs(15);
        while Instant::now() < deadline {
            if let Some(status) = child.try_wait()? {
                ensure!(status.success(), "server {server} ended with {status}");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        bail!("server {server} does not stop");
    }
    /// Whether a server's process is alive.
    pub fn is_running(&mut self, server: usize) -> bool {
        self.children[server].as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
    /// Waits until every running server has a fresh certificate.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        for server in (0..self.children.len()).filter(|server| self.children[*server].is_some()) {
            let link = self.client.link(quorum::ServerId(server as u8)).context("no such server")?;
            while !matches!(link.send("GET", "/readyz", vec![]).await, Ok((200, _))) {
                ensure!(
                    Instant::now() < deadline,
                    "server {server} is not ready:\n{}",
                    stdout(&self.cli(&["status", "--json"]))
                );
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        }
        Ok(())
    }
    /// Waits until every running server has executed as much as the furthest one had.
    pub async fn level(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let running: Vec<_> = (0..self.children.len()).filter(|i| self.children[*i].is_some()).collect();
        let mut target = None;
        loop {
            let mut certified = Vec::new();
            for server in &running {
                let status = self.client.server_status(quorum::ServerId(*server as u8)).await;
                certified.push(status.map_err(anyhow::Error::msg)?.certified);
            }
            let goal = *target.get_or_insert(certified.iter().copied().max().unwrap_or_default());
            if certified.iter().all(|sequence| *sequence >= goal) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "servers do not catch up: {certified:?} of {goal}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    /// What a server logged.
    pub fn log(&self, server: usize) -> String {
        std::fs::read_to_string(self.server_dir(server).join("server.log")).unwrap_or_default()
    }
    /// What a server logged since its last start.
    pub fn log_since_start(&self, server: usize) -> String {
        self.log(server).split_off(self.log_starts[server])
    }
    /// Runs `kds-client` on this cluster.
    pub fn cli(&self, args: &[&str]) -> Output {
        self.cli_with(args, &[], "")
    }
    /// Runs `kds-client` with an environment and standard input.
    pub fn cli_with(&self, args: &[&str], environment: &[(&str, &str)], input: &str) -> Output {
        use std::io::Write as _;
        let mut child = Command::new(program("kds-client"))
            .args(args)
            .env("KDS_MANIFEST", self.dir().join("manifest.toml"))
            .envs(environment.iter().copied())
            .current_dir(self.dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kds-client starts");
        // A program that does not read its input has ended already.
        let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
        child.wait_with_output().expect("kds-client ends")
    }
    /// Registers an age key under a name, as the administrator.
    pub async fn register(&self, name: &str, byte: u8) -> anyhow::Result<kds_client::Written> {
        Ok(self.client.register(&self.administrator, Name::new(name)?, entry(byte, None)).await?)
    }
}

/// Ports that no other test on this machine takes meanwhile, below those of outgoing connections.
struct Ports {
    first: u16,
    _lock: File,
}

impl Ports {
    const EACH: u16 = 64;

    fn reserve(count: u16) -> anyhow::Result<Self> {
        let folder = std::env::temp_dir().join("kds-test-ports");
        std::fs::create_dir_all(&folder)?;
        ensure!(count <= Self::EACH, "{count} ports for one cluster");
        for first in (10_240..32_000).step_by(usize::from(Self::EACH)) {
            let lock = File::create(folder.join(first.to_string()))?;
            let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
            if lock.try_lock().is_ok() && (first..first + count).all(free) {
                return Ok(Self { first, _lock: lock });
            }
        }
        bail!("no ports are free for a cluster")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for server in 0..self.children.len() {
            self.kill(server);
        }
        if std::thread::panicking() {
            for server in 0..self.children.len() {
                let log = self.log(server);
                let tail: Vec<_> = log.lines().rev().take(8).collect();
                eprintln!("--- server {server} ---");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// A record's contents with one age key.
pub fn entry(byte: u8, owner: Option<&SigningKey>) -> Entry {
    Entry {
        keys: vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![byte; 32]) }],
        owner: owner.map(SigningKey::public),
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: BTreeMap::new(),
    }
}

/// The exit status of a finished program.
pub fn status(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}
/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}
/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
