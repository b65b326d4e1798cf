//! `init`: the files of a new cluster.

use crate::config::{Config, IDENTITY_KEY, TLS_CERTIFICATE, TLS_KEY};
use anyhow::{Context as _, bail, ensure};
use clap::Args as ClapArgs;
use kds_client::keystore::{self, Passphrase, SecretKind};
use kds_client::{keys, manifest_file};
use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
use quorum::membership::Replacement;
use quorum::{Blob, PublicKey, ServerId, Thresholds};
use rand::RngExt as _;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

/// Lowest port that is chosen where none is given.
const FIRST_PORT: u16 = 10_240;
/// Ports that there must be from that on, below those of outgoing connections, to choose among them only.
const FEWEST_PORTS: u16 = 1_024;

/// Write the files of a new cluster: manifest, administrator's key, a folder for each server
#[derive(ClapArgs)]
pub struct Args {
    /// Servers: 4, 9, 16, 25, …
    #[arg(long, default_value_t = 9)]
    servers: usize,
    /// Folder to write to; nothing in it is overwritten
    #[arg(long)]
    dir: PathBuf,
    /// Lying servers that a row read masks (default: the smallest that the grid supports)
    #[arg(long)]
    masked: Option<u16>,
    /// Servers that reconstruct a secret (default: the largest that works)
    #[arg(long)]
    threshold: Option<u16>,
    /// Server N gets client port P+2N and peer port P+2N+1 (default: free ports)
    #[arg(long, value_name = "P")]
    base_port: Option<u16>,
    /// Address that servers listen on and are reached at; or one for each server, separated by commas
    #[arg(long, default_value = "127.0.0.1", value_delimiter = ',')]
    host: Vec<IpAddr>,
    /// Length of an epoch, in seconds of agreed time
    #[arg(long, default_value_t = 30)]
    epoch_seconds: u32,
    /// Public key file of one more administrator, beside the one whose key is written to admin.key; repeatable
    #[arg(long, value_name = "FILE")]
    administrator: Vec<PathBuf>,
    /// Administrators that must ask for the same before administrators are changed
    #[arg(long, value_name = "M", default_value_t = 1)]
    administrators_needed: u16,
    /// One server alone, to measure what replication costs: it tolerates nothing and keeps no secrets
    #[arg(long, hide = true, conflicts_with = "servers")]
    unreplicated: bool,
    /// Where servers keep their data: sqlite
    #[arg(long, default_value = "sqlite")]
    database: String,
}

/// Runs the command.
pub fn main(args: &Args) -> anyhow::Result<()> {
    ensure!(
        args.database == "sqlite",
        "database {:?} is not supported in this version; use sqlite",
        args.database
    );
    let thresholds = match args.unreplicated {
        true => Thresholds::UNREPLICATED,
        false => Thresholds::plan(args.servers, args.masked, args.threshold)?,
    };
    let cluster = NewCluster {
        thresholds,
        dir: &args.dir,
        base_port: args.base_port,
        hosts: &args.host,
        epoch_seconds: args.epoch_seconds,
        administrators: args.administrator.iter().map(|path| public_key(path)).collect::<Result<_, _>>()?,
        administrators_needed: args.administrators_needed,
    };
    let manifest = cluster.write()?;
    println!("cluster {}", manifest.cluster_id());
    println!("wrote {}", args.dir.join("manifest.toml").display());
    println!(
        "start each server with: kds-server run --config {}",
        args.dir.join("server-N/config.toml").display()
    );
    Ok(())
}

/// What `init` and `dev` make.
pub struct NewCluster<'a> {
    /// The numbers.
    pub thresholds: Thresholds,
    /// Where to write.
    pub dir: &'a Path,
    /// Ports, or free ones.
    pub base_port: Option<u16>,
    /// Where servers listen: one address for all, or one for each.
    pub hosts: &'a [IpAddr],
    /// Seconds.
    pub epoch_seconds: u32,
    /// Administrators beside the one whose key is written.
    pub administrators: Vec<PublicKey>,
    /// How many of them decide together.
    pub administrators_needed: u16,
}

/// An administrator's key, from a file that `kds-client keygen` or `ssh-keygen -t ed25519` wrote.
fn public_key(path: &Path) -> anyhow::Result<PublicKey> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let key = keys::parse(&bytes).and_then(|key| keys::signing_public_key(&key));
    key.with_context(|| format!("{} is no signing key's public half", path.display()))
}

impl NewCluster<'_> {
    /// Writes all files; fails before the first one if anything is there already.
    pub fn write(&self) -> anyhow::Result<Manifest> {
        let n = self.thresholds.n();
        let folders: Vec<_> = (0..n).map(|i| self.dir.join(format!("server-{i}"))).collect();
        let manifest_path = self.dir.join("manifest.toml");
        let administrator_path = self.dir.join("admin.key");
        for path in folders.iter().chain([&manifest_path, &administrator_path]) {
            ensure!(!path.exists(), "{} exists already; name an empty folder with --dir", path.display());
        }
        let administrators = self.administrators.len() + 1;
        ensure!(
            (1..=administrators).contains(&usize::from(self.administrators_needed)),
            "--administrators-needed {} of {administrators}: name the others with --administrator FILE",
            self.administrators_needed
        );
        let addresses = self.addresses(n)?;
        let passphrase = Passphrase::from_environment();
        let administrator = keystore::generate();
        let mut manifest = Manifest {
            format: MANIFEST_FORMAT,
            epoch_seconds: self.epoch_seconds,
            administrators_needed: self.administrators_needed,
            administrators: [&[administrator.public()], &self.administrators[..]].concat(),
            thresholds: self.thresholds,
            servers: Vec::new(),
        };
        // What is refused leaves nothing behind.
        manifest.validate_terms()?;
        fs::create_dir_all(self.dir).with_context(|| format!("cannot create {}", self.dir.display()))?;

        keystore::write_signing_key(
            &administrator_path,
            SecretKind::SigningKey,
            &administrator,
            passphrase.as_ref(),
        )?;
        let grid = quorum::grid::Grid::new(self.thresholds);
        for (id, (folder, (clients, peers))) in grid.servers().zip(folders.iter().zip(&addresses)) {
            let Replacement { server: id, url, peer, identity, certificate } = NewServer {
                id,
                manifest: "../manifest.toml".into(),
                listen_clients: *clients,
                listen_peers: *peers,
                url: format!("https://{clients}"),
                peer: peers.to_string(),
            }
            .write(folder, passphrase.as_ref())?;
            let (row, column) = (grid.row_of(id) as u16, grid.column_of(id) as u16);
            manifest.servers.push(ServerEntry { id, row, column, url, peer, identity, certificate });
        }
        manifest.validate()?;
        fs::write(&manifest_path, manifest_file::to_text(&manifest).map_err(anyhow::Error::msg)?)?;
        Ok(manifest)
    }

    fn addresses(&self, n: usize) -> anyhow::Result<Vec<(SocketAddr, SocketAddr)>> {
        ensure!(
            self.hosts.len() == 1 || self.hosts.len() == n,
            "--host takes one address for all servers, or one for each of the {n}; it got {}",
            self.hosts.len()
        );
        let host = |server: usize| self.hosts[server % self.hosts.len()];
        if let Some(base) = self.base_port {
            if usize::from(base) + 2 * n > usize::from(u16::MAX) {
                bail!("{} ports from {base} on do not exist; take a lower --base-port", 2 * n);
            }
            let at = |i: usize, port| SocketAddr::new(host(i), base + 2 * i as u16 + port);
            return Ok((0..n).map(|i| (at(i, 0), at(i, 1))).collect());
        }
        ensure!(self.hosts.len() == 1, "give --base-port too: free ports can only be found on this machine");
        let ports = free_ports(host(0), 2 * n)?;
        let at = |port: &u16| SocketAddr::new(host(0), *port);
        Ok(ports.chunks(2).map(|pair| (at(&pair[0]), at(&pair[1]))).collect())
    }
}

/// Ports that are free, outside the range from which the system takes the ports of outgoing connections: a
/// server that is not running for a moment would find one of those taken. Where that range leaves none, any.
fn free_ports(host: IpAddr, count: usize) -> anyhow::Result<Vec<u16>> {
    TcpListener::bind((host, 0)).with_context(|| format!("cannot listen on {host}"))?;
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let outgoing = range.split_whitespace().next().and_then(|low| low.parse().ok()).unwrap_or(32_768);
    let outgoing = if outgoing < FIRST_PORT + FEWEST_PORTS { u16::MAX } else { outgoing };
    let first = rand::rng().random_range(FIRST_PORT..outgoing);
    let ports = (first..outgoing).chain(FIRST_PORT..first);
    let free: Vec<_> = ports.filter(|port| TcpListener::bind((host, *port)).is_ok()).take(count).collect();
    ensure!(free.len() == count, "fewer than {count} ports are free on {host}; choose with --base-port");
    Ok(free)
}

/// A server whose keys are to be drawn.
pub struct NewServer {
    /// Its place in the grid.
    pub id: ServerId,
    /// The manifest, as seen from its folder.
    pub manifest: PathBuf,
    /// Where it listens for clients.
    pub listen_clients: SocketAddr,
    /// Where it listens for servers.
    pub listen_peers: SocketAddr,
    /// Where clients reach it.
    pub url: String,
    /// Where servers reach it.
    pub peer: String,
}

impl NewServer {
    /// Writes its folder, which must not exist; says what others are to know of it.
    pub fn write(self, folder: &Path, passphrase: Option<&Passphrase>) -> anyhow::Result<Replacement> {
        private_folder(folder)?;
        let identity = keystore::generate();
        let path = folder.join(IDENTITY_KEY);
        keystore::write_signing_key(&path, SecretKind::IdentityKey, &identity, passphrase)?;
        let year = i32::from(jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).year());
        let hosts = [self.listen_clients.ip().to_string(), "localhost".into()];
        let own = kds_certs::generate(&format!("kds server {}", self.id), &hosts, year)?;
        let key = own.key_pem.as_bytes();
        keystore::write(&folder.join(TLS_KEY), SecretKind::TlsKey, None, key, passphrase)?;
        fs::write(folder.join(TLS_CERTIFICATE), &own.certificate_pem)?;
        let config = Config::new(self.id, self.manifest, self.listen_clients, self.listen_peers);
        keystore::write_private(&folder.join("config.toml"), toml::to_string(&config)?.as_bytes())?;
        let (server, identity, certificate) = (self.id, identity.public(), Blob(own.certificate));
        Ok(Replacement { server, url: self.url, peer: self.peer, identity, certificate })
    }
}

fn private_folder(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot create {}", path.display()))
}
