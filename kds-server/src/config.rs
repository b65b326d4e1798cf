//! A server's `config.toml` and the private files beside it.

use anyhow::{Context as _, ensure};
use kds_certs::TlsIdentity;
use kds_client::keystore::{self, Passphrase, SecretKind};
use kds_client::manifest_file;
use quorum::ids::{ClusterId, ServerId};
use quorum::manifest::Manifest;
use rand::Rng as _;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

use crate::at_rest::StorageKeys;
use crate::http::{Configured, Limits};

/// What `init` writes and `run` reads. Paths are relative to the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Which server of the manifest this is.
    pub server: ServerId,
    /// The cluster's manifest.
    pub manifest: PathBuf,
    /// Where to listen for clients.
    pub listen_clients: SocketAddr,
    /// Where to listen for servers.
    pub listen_peers: SocketAddr,
    /// `sqlite`: the file kds.db beside this one.
    pub database: String,
    /// Requests a second that one address may make: four names of a bulk lookup count as one, a write as
    /// ten; 0 sets no limit.
    #[serde(default = "requests_per_second")]
    pub requests_per_second: u32,
    /// Socket of the signer that has the identity key; without one the server starts a signer by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<PathBuf>,
    /// Where to tell health and metrics, and nothing else, in plain text: for load balancers and Prometheus. The
    /// routes are there for clients, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen_health: Option<SocketAddr>,
    /// Connections of clients at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<usize>,
    /// The same of one address, or IPv6 network of 64 bits: half of them where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections_per_address: Option<usize>,
    /// Watches at a time: a third of the connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watches: Option<usize>,
    /// The same of one address: half of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watches_per_address: Option<usize>,
    /// MiB of answers that wait to be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread_mib: Option<usize>,
    /// The same of one address: a quarter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unread_mib_per_address: Option<usize>,
}

impl Config {
    /// With what is usual for everything else.
    pub fn new(
        server: ServerId,
        manifest: PathBuf,
        listen_clients: SocketAddr,
        listen_peers: SocketAddr,
    ) -> Self {
        Self {
            server,
            manifest,
            listen_clients,
            listen_peers,
            database: "sqlite".into(),
            requests_per_second: requests_per_second(),
            signer: None,
            listen_health: None,
            connections: None,
            connections_per_address: None,
            watches: None,
            watches_per_address: None,
            unread_mib: None,
            unread_mib_per_address: None,
        }
    }

    /// What clients may take of a server, of so many servers.
    ///
    /// # Errors
    /// If that makes no sense, or is more than this process may have open.
    fn limits(&self, servers: usize) -> anyhow::Result<Limits> {
        let limits = Limits::of(&Configured {
            requests_per_second: self.requests_per_second,
            connections: (self.connections, self.connections_per_address),
            watches: (self.watches, self.watches_per_address),
            unread_mib: (self.unread_mib, self.unread_mib_per_address),
        })?;
        if let (needed, Some(open)) = (limits.files(servers), open_files())
            && needed > open
        {
            let what = format!(
                "this server may need {needed} open files, and its limit is {open}\n  \
                 raise that (`ulimit -n`, LimitNOFILE= in a systemd unit), or lower `connections` in config.toml"
            );
            ensure!(self.connections.is_none(), what);
            tracing::warn!("{what}");
        }
        Ok(limits)
    }
}

/// Files that this process may have open at a time.
fn open_files() -> Option<usize> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What one address may ask for where nothing else is configured: a busy service asks for tens of
/// thousands of names a second through the library, and one core answers two or three times as many
/// requests.
pub const fn requests_per_second() -> u32 {
    20_000
}

/// A server's configuration with everything it names, read and checked.
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// The cluster's id.
    pub cluster: ClusterId,
    /// Where the private files are.
    pub folder: PathBuf,
    /// Opens the files, where they are encrypted.
    pub passphrase: Option<Passphrase>,
    /// What is secret on the disk is encrypted under these.
    pub storage_keys: Arc<StorageKeys>,
    /// For TLS.
    pub tls: TlsIdentity,
    /// It has voted before, and its database is gone.
    pub lost_database: bool,
    /// What clients may take.
    pub limits: Limits,
}

/// Names of the private files.
pub const IDENTITY_KEY: &str = "identity.key";
/// What the signer remembers.
pub const SIGNER_STATE: &str = "signer.state";
const STORAGE_KEY: &str = "storage.key";
/// What this server was shown of the membership before its first state.
pub const MEMBERSHIP: &str = "membership.json";
/// What administrators are asked to decide, if this server is to take the place of another one.
pub const REPLACEMENT: &str = "replacement.toml";
/// The TLS key.
pub const TLS_KEY: &str = "tls.key";
/// The TLS certificate.
pub const TLS_CERTIFICATE: &str = "tls.pem";
/// Says that the database was lost, until the new one does.
pub const LOST_DATABASE: &str = "lost-database";
/// The database.
pub const DATABASE: &str = "kds.db";

/// What to do about a file that only this server had.
pub const FROM_BACKUP: &str =
    "bring it back from a backup (docs/operations.md says what to back up, and what to do without)";

/// The folder that a file is in. A name alone is in the current one, which is not the same as none: programs that are
/// started there have to find it too.
pub fn folder_of(file: &Path) -> PathBuf {
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// Reads everything a server needs; says what to do where it cannot.
pub fn load(path: &Path, passphrase: Option<Passphrase>) -> anyhow::Result<Loaded> {
    let text = std::fs::read_to_string(path).with_context(|| {
        format!("cannot read {}\n  `kds-server init` writes one for every server", path.display())
    })?;
    let config: Config = toml::from_str(&text)
        .with_context(|| format!("{} is not a server's config\n  {FROM_BACKUP}", path.display()))?;
    ensure!(config.database == "sqlite", "database {:?} is not supported; use \"sqlite\"", config.database);
    let folder = folder_of(path);
    let manifest = manifest_file::read(&folder.join(&config.manifest))?;
    let cluster = manifest.cluster_id();
    let id = config.server;
    manifest.server(id).with_context(|| format!("server {id} is not in the manifest"))?;

    let limits = config.limits(manifest.servers.len())?;
    let certificate = std::fs::read(folder.join(TLS_CERTIFICATE)).context("cannot read tls.pem")?;
    let key = keystore::read(&folder.join(TLS_KEY), SecretKind::TlsKey, passphrase.as_ref());
    let key = key.with_context(|| format!("no key for HTTPS\n  {FROM_BACKUP}"))?;
    let tls =
        TlsIdentity::from_pem(&certificate, &key).and_then(|tls| kds_certs::https_server(&tls).map(|_| tls));
    let tls = tls.with_context(|| format!("tls.key and tls.pem are of no use\n  {FROM_BACKUP}"))?;
    let lost_database = lost_database(&folder)?;
    let wrapping = own_seed(&folder.join(STORAGE_KEY), SecretKind::StorageKey, passphrase.as_ref())?;
    let storage_keys = Arc::new(StorageKeys::open(&folder, &wrapping)?);
    Ok(Loaded { manifest, cluster, folder, passphrase, storage_keys, tls, lost_database, limits, config })
}

/// Whether this server has voted before and its database is gone: it has a storage key and no
/// database. (The file is made before the key is, so that a first start that breaks off is not taken
/// for that.)
fn lost_database(folder: &Path) -> anyhow::Result<bool> {
    let (database, marker) = (folder.join(DATABASE), folder.join(LOST_DATABASE));
    if !database.exists() {
        // The marker stays until the new database says so itself: a crash between must not hide it.
        let new = if folder.join(STORAGE_KEY).exists() { &marker } else { &database };
        let made = File::create(new).and_then(|file| file.sync_all());
        made.with_context(|| format!("cannot write {}", new.display()))?;
    }
    Ok(marker.exists())
}

/// A key that the server makes for itself at its first start and keeps.
fn own_seed(
    path: &Path,
    kind: SecretKind,
    passphrase: Option<&Passphrase>,
) -> anyhow::Result<Zeroizing<[u8; 32]>> {
    let mut seed = Zeroizing::new([0; 32]);
    if path.exists() {
        let stored = keystore::read(path, kind, passphrase);
        let stored =
            stored.with_context(|| format!("what is on the disk cannot be opened\n  {FROM_BACKUP}"))?;
        ensure!(stored.len() == 32, "{} has the wrong size\n  {FROM_BACKUP}", path.display());
        seed.copy_from_slice(&stored);
    } else {
        kds_client::random::system().fill_bytes(&mut *seed);
        keystore::write(path, kind, None, &*seed, passphrase)?;
    }
    Ok(seed)
}
