//! One server: storage, replica, peers and HTTPS put together, and taken apart again.

use crate::config::{LOST_DATABASE, Loaded};
use crate::epoch_keys::{LinkEra, LinkTls};
use crate::health::Health;
use crate::share_store::{self, ShareStore, Shares};
use crate::signer::SignerLink;
use crate::storage;
use crate::{committer, driver, epoch_keys, http, memory, peers, place};
use anyhow::Context as _;
use arc_swap::{ArcSwap, ArcSwapOption};
use kds_client::api::TroubleKind;
use quorum::certificate::Certificate;
use quorum::ids::{AttemptId, ClusterId, ServerId, Timestamp};
use quorum::manifest::Manifest;
use quorum::membership::Membership;
use quorum::ordering::{Identity, Part, PoolError, Published, Replica, ReplicaStatus, Wants};
use quorum::request::RequestId;
use quorum::signing::KeyCertificate;
use rand::Rng as _;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

/// Inputs that wait for the replica.
const INPUTS: usize = 4_096;
/// Questions about shares that wait, and things that the keeper of the shares wants of the database.
const QUESTIONS: usize = 256;
/// Groups of effects that wait for the disk.
const EFFECTS: usize = 64;

/// What the server's tasks share.
pub struct Shared {
    /// This server.
    pub id: ServerId,
    /// The manifest.
    pub manifest: Arc<Manifest>,
    /// Who the servers are, as far as this one has followed.
    pub membership: ArcSwap<Membership>,
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The certified state that readers see.
    pub published: watch::Sender<Option<Arc<Published>>>,
    /// Clients' requests that wait for their reply.
    pub waiters: Waiters,
    /// How the replica is doing.
    pub replica_status: ArcSwap<ReplicaStatus>,
    /// What it wants to hear.
    pub wants: ArcSwap<Wants>,
    /// The last keys that it voted with.
    pub voting: ArcSwap<Vec<KeyCertificate>>,
    /// The replica's last certificate, whether readers are shown it or not.
    pub certificate: ArcSwapOption<Certificate>,
    /// What links to other servers are made with.
    pub links: ArcSwap<LinkTls>,
    /// When this process was started.
    pub started: Timestamp,
    /// Links that are up.
    pub peers_connected: AtomicUsize,
    /// Where this server has reached each other one: whoever comes from there is no stranger, perhaps.
    neighbours: Mutex<BTreeMap<ServerId, IpAddr>>,
    /// The folder that evidence of misbehaviour is kept in.
    pub evidence: PathBuf,
    /// For handing out shares.
    pub shares: Shares,
    /// The attempt by which the epoch of the executed state began.
    pub epoch: watch::Sender<AttemptId>,
    /// What links are of that are made now.
    pub link_era: watch::Sender<LinkEra>,
    /// What is wrong.
    pub health: Health,
}

impl Shared {
    /// Takes note of where another server was reached.
    pub fn note_neighbour(&self, server: ServerId, at: IpAddr) {
        let mut neighbours = self.neighbours.lock().unwrap_or_else(PoisonError::into_inner);
        neighbours.insert(server, crate::places::network(at));
    }
    /// Whether some server was reached at an address of this network.
    pub fn is_neighbour(&self, network: IpAddr) -> bool {
        let neighbours = self.neighbours.lock().unwrap_or_else(PoisonError::into_inner);
        neighbours.values().any(|known| *known == network)
    }
    /// Whether it takes part in ordering: as its replica sees it, unless nothing can leave.
    pub fn part(&self) -> Part {
        if self.health.can_write() { self.replica_status.load().part } else { Part::Stopped }
    }
}

/// Requests whose clients wait at this server.
#[derive(Default)]
pub struct Waiters(Mutex<HashMap<RequestId, Vec<Waiter>>>);

type Waiter = oneshot::Sender<Result<(), PoolError>>;

/// Somebody who waits; whoever goes away leaves nothing behind.
pub struct Waiting<'a> {
    waiters: &'a Waiters,
    id: RequestId,
    outcome: oneshot::Receiver<Result<(), PoolError>>,
}

impl Waiting<'_> {
    /// None if this server stops.
    pub async fn outcome(&mut self) -> Option<Result<(), PoolError>> {
        (&mut self.outcome).await.ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.outcome.close();
        self.waiters.forget(self.id);
    }
}

impl Waiters {
    /// Waits for a request's reply to be certified.
    pub fn wait(&self, id: RequestId) -> Waiting<'_> {
        let (sender, outcome) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_request = waiting.entry(id).or_default();
        of_request.retain(|waiter| !waiter.is_closed());
        of_request.push(sender);
        Waiting { waiters: self, id, outcome }
    }
    /// Drops what nobody waits for any more.
    fn forget(&self, id: RequestId) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(of_request) = waiting.get_mut(&id) {
            of_request.retain(|waiter| !waiter.is_closed());
            if of_request.is_empty() {
                waiting.remove(&id);
            }
        }
    }
    /// Wakes those whose requests were executed, or cannot wait.
    pub fn wake(&self, replied: Vec<RequestId>, refused: Vec<(RequestId, PoolError)>) {
        if replied.is_empty() && refused.is_empty() {
            return;
        }
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let outcomes = replied.into_iter().map(|id| (id, Ok(())));
        for (id, outcome) in outcomes.chain(refused.into_iter().map(|(id, why)| (id, Err(why)))) {
            for waiter in waiting.remove(&id).into_iter().flatten() {
                // Whoever went away meanwhile is not told.
                let _ = waiter.send(outcome);
            }
        }
    }
}

/// Runs a server until `stop` completes, then shuts it down in order.
pub async fn run(loaded: Loaded, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let _lock = lock(&loaded.folder)?;
    let known = place::remembered(&loaded.folder, &loaded.manifest)?;
    let mut stop = std::pin::pin!(stop);
    // Who is to take another one's place waits until the administrators have decided it.
    let known = tokio::select! {
        known = place::take(&loaded, known) => known?,
        () = &mut stop => return Ok(()),
    };
    let Loaded { config, manifest, cluster, folder, passphrase, storage_keys, tls, lost_database, limits } =
        loaded;
    let id = config.server;
    let signer = match &config.signer {
        Some(socket) => SignerLink::to(folder.join(socket)),
        None => SignerLink::start(&folder.join(&config.manifest), id, &folder, passphrase.as_ref()).await?,
    };
    drop(passphrase);
    let remembered = epoch_keys::probe(&signer, id, &known).await?;
    warn_of_expiry(&tls)?;
    let clients = bound(http::listen(config.listen_clients), config.listen_clients, "clients")?;
    let servers = bound(TcpListener::bind(config.listen_peers).await, config.listen_peers, "servers")?;
    let health = match config.listen_health {
        Some(address) => Some(bound(http::listen(address), address, "health and metrics")?),
        None => None,
    };

    let mut store = ShareStore::open(&folder, Arc::clone(&storage_keys), &cluster, id)?;
    let in_file = store.in_file();
    let database = storage::Place { folder: &folder, cluster: &cluster, id, keys: &storage_keys, in_file };
    // It may wait for a while.
    let storage::Opened { mut storage, mut stored, share_log, aside } = tokio::select! {
        opened = database.open() => opened?,
        () = &mut stop => return Ok(()),
    };
    store.replay(share_log);
    let lost = lost_database || aside.is_some();
    if lost {
        tracing::warn!(server = %id, "the database is gone: fetching the state from the other servers; this server votes again in the next epoch, when nothing that it forgot matters");
    }
    stored.forgot |= lost;
    let membership = known.or_newer(&stored.membership(&manifest).unwrap_or_else(|| Arc::clone(&known)));
    if stored.voting_key > 0 && remembered.voting > stored.voting_key {
        stored.forgot = true;
        tracing::warn!(server = %id, "the database is an older copy than the one that this server used last: it votes again in the next epoch, when nothing that it forgot matters");
    }
    let damaged = stored.forgot || stored.damaged;
    let writes = stored.begin(&remembered, membership.since(id));
    storage.commit(&writes.iter().collect::<Vec<_>>()).await?;
    if lost {
        // The new database says so itself now.
        std::fs::remove_file(folder.join(LOST_DATABASE))?;
    }
    let number = stored.voting_key;
    let asked = (stored.certificate.clone(), number);
    let (voter, link_tls) = epoch_keys::boot(&signer, id, &membership, asked).await?;
    let boot = rand::rng().next_u64();
    let log_tail = quorum::limits::LOG_TAIL_BATCHES;
    let identity = Identity { membership, voter, boot, log_tail };
    let starting = move || memory::scrubbed(|| Replica::start(identity, stored));
    let mut replica = tokio::task::spawn_blocking(starting).await?;
    let (first, operations) = match replica.drain() {
        None => (None, vec![]),
        Some((batch, unsent)) => {
            let operations = storage.commit(&batch.writes().iter().collect::<Vec<_>>()).await?;
            (Some((unsent, batch.committed())), operations)
        }
    };
    store.start(&mut storage, operations).await.context(
        "what belongs to an epoch that is over could not be erased: nothing is said to anybody before it is",
    )?;
    let status = replica.status();
    tracing::info!(server = %id, executed = %status.executed, certified = %status.certified, "starting");

    let shared = Arc::new(Shared {
        id,
        cluster,
        published: watch::Sender::new(None),
        waiters: Waiters::default(),
        replica_status: ArcSwap::from_pointee(status),
        wants: ArcSwap::from_pointee(replica.wants()),
        voting: ArcSwap::from_pointee(vec![status.voting]),
        link_era: watch::Sender::new(LinkEra { attempt: link_tls.attempt, ..LinkEra::default() }),
        links: ArcSwap::from_pointee(link_tls),
        membership: ArcSwap::new(Arc::clone(replica.membership())),
        certificate: ArcSwapOption::new(replica.certificate().cloned()),
        started: driver::now(),
        peers_connected: AtomicUsize::new(0),
        neighbours: Mutex::default(),
        evidence: folder.join("evidence"),
        shares: store.shares(),
        epoch: watch::Sender::new(status.attempt),
        health: Health::default(),
        manifest: Arc::clone(&manifest),
    });
    shared.health.set(TroubleKind::LostDatabase, damaged);
    let (inputs, inputs_received) = mpsc::channel(INPUTS);
    let (heard, from_peers) = mpsc::channel(INPUTS);
    let (effects, effects_received) = mpsc::channel(EFFECTS);
    let links = peers::dial_all(&inputs, &shared);
    let (operations, operations_received) = mpsc::unbounded_channel();
    let (questions, questions_received) = mpsc::channel(QUESTIONS);
    let (asks, asked) = mpsc::channel(QUESTIONS);
    let numbers = epoch_keys::Numbers { last: number, committer: asks.clone() };
    let mut keeping = tokio::spawn(share_store::run(
        store,
        (operations_received, questions_received),
        asks,
        links.clone(),
        inputs.clone(),
        Arc::clone(&shared),
    ));
    let mut committer = tokio::spawn(committer::run(
        storage,
        first,
        effects_received,
        (asked, operations),
        inputs.clone(),
        links.clone(),
        Arc::clone(&shared),
    ));
    let mut driver = tokio::spawn(driver::run(
        replica,
        (inputs_received, from_peers),
        effects,
        links,
        Arc::clone(&shared),
    ));
    let hears = peers::Hears { inputs: heard, questions };
    let mut listening = tokio::spawn(peers::listen(servers, Arc::clone(&shared), hears));
    let mut drawing = tokio::spawn(epoch_keys::run(signer, numbers, inputs.clone(), Arc::clone(&shared)));
    let (stop_http, http_stops) = watch::channel(false);
    let https = kds_certs::https_server(&tls)?;
    let app = http::App::new(Arc::clone(&shared), inputs.clone(), http_stops, &limits);
    let mut http = tokio::spawn(app.serve(clients, https, health));
    tracing::info!(server = %id, clients = %config.listen_clients, peers = %config.listen_peers, "running");

    let dead = tokio::select! {
        () = &mut stop => None,
        dead = died(&mut keeping, "keeper of the shares") => Some(dead),
        dead = died(&mut driver, "replica") => Some(dead),
        dead = died(&mut listening, "listener for servers") => Some(dead),
        dead = failed(&mut drawing, "drawer of keys") => Some(dead),
        dead = failed(&mut committer, "writer of the database") => Some(dead),
        dead = died(&mut http, "listener for clients") => Some(dead),
    };
    if let Some(dead) = dead {
        // Whoever started this process starts it again; half a server only seems to be one.
        tracing::error!(why = %format!("{dead:#}"), "a part of this server has ended: this process ends too");
        return Err(dead);
    }
    tracing::info!("stopping: answering what is under way");
    stop_http.send_replace(true);
    let _ = tokio::time::timeout(Duration::from_secs(5), http).await;
    listening.abort();
    drawing.abort();
    // The driver ends; the committer writes what it left; the keeper puts the shares in order, so that those of one epoch
    // alone are left; and the database is closed.
    driver.abort();
    match tokio::time::timeout(Duration::from_secs(5), committer).await {
        Ok(Ok(Ok(storage))) => storage.close().await,
        Ok(Ok(Err(error))) => {
            tracing::error!(error = %format!("{error:#}"), "the last writes are not on the disk")
        }
        Ok(Err(error)) => tracing::error!(%error, "the committer failed"),
        Err(_) => {
            tracing::warn!("the database did not take the last writes in time; they were promised to nobody")
        }
    }
    tracing::info!("stopped");
    Ok(())
}

/// Returns when a task has panicked.
async fn died<T>(task: &mut JoinHandle<T>, name: &str) -> anyhow::Error {
    match task.await {
        Err(error) if error.is_panic() => {
            anyhow::anyhow!("the {name} has ended: please report what stands above")
        }
        _ => std::future::pending().await,
    }
}

/// The same for a task that may also find that it cannot go on.
async fn failed<T>(task: &mut JoinHandle<anyhow::Result<T>>, name: &str) -> anyhow::Error {
    match task.await {
        Ok(Err(error)) => error,
        Err(error) if error.is_panic() => {
            anyhow::anyhow!("the {name} has ended: please report what stands above")
        }
        _ => std::future::pending().await,
    }
}

/// One process a folder: a second one would contradict the first.
fn lock(folder: &std::path::Path) -> anyhow::Result<File> {
    let path = folder.join("server.lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    file.try_lock().map_err(|_| {
        anyhow::anyhow!(
            "another process runs this server already (it holds {})\n  stop it first",
            path.display()
        )
    })?;
    Ok(file)
}

fn bound(listener: io::Result<TcpListener>, at: SocketAddr, whom: &str) -> anyhow::Result<TcpListener> {
    listener.with_context(|| {
        format!("cannot listen for {whom} on {at}\n  is the port taken? `init --base-port` chooses others")
    })
}

fn warn_of_expiry(tls: &kds_certs::TlsIdentity) -> anyhow::Result<()> {
    let seconds_left = kds_certs::not_after(tls.certificate())? - (driver::now().0 / 1000) as i64;
    anyhow::ensure!(
        seconds_left > 0,
        "this server's TLS certificate (tls.pem) has expired: no one will connect to it"
    );
    let days_left = seconds_left / 86_400;
    if days_left < kds_certs::WARN_DAYS {
        tracing::warn!(days_left, "this server's TLS certificate expires soon");
    }
    Ok(())
}
