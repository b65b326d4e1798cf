//! This server's shares: in memory, in a file that is written anew with every epoch, and in the database's
//! log of what has happened since.
//!
//! An epoch's renewal runs beside everything else, on a copy; readers see the old shares until the new
//! ones are there. Then, in this order: the next storage key is drawn; the new shares are written under
//! it and synced; what is left in the database is encrypted under it (by the committer); the old file and
//! the old key are overwritten and removed. A crash anywhere in between leaves a file and a log that lead
//! to the same shares.

use crate::at_rest::StorageKeys;
use crate::files;
use crate::memory;
use crate::peers::Peers;
use crate::seldom;
use crate::server::Shared;
use crate::storage::Storage;
use anyhow::Context as _;
use kds_client::api::TroubleKind;
use quorum::codec::{decode, encode, encode_secret};
use quorum::ids::{Epoch, ServerId};
use quorum::ordering::{Holding, Input, Target};
use quorum::recovery::{AskMasked, Keeper, Kept, Left, Masked};
use quorum::shares::{ShareCounts, ShareOp, ShareSet};
use quorum::{ClusterId, SecretBytes};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

/// Names of share files begin with this; the number of the last operation in it follows.
const SHARE_FILE: &str = "shares-";

/// How long after a step of erasure that failed all of them are tried again.
const ERASE_AGAIN: Duration = Duration::from_secs(2);

/// What the keeper of the shares hears from other servers.
pub enum ToKeeper {
    /// Another server that recovers its shares asks for this server's, masked.
    Ask(ServerId, AskMasked),
    /// A masked share that this server asked for.
    Masked(ServerId, Masked),
}

/// What the keeper asks of the committer, which owns the database.
pub enum ToCommitter {
    /// The shares are in a file up to this operation: forget those, and encrypt the rest anew.
    Rotate { applied: u64, done: oneshot::Sender<()> },
    /// Log an operation of the keeper's own.
    Log { operation: ShareOp },
    /// The number of the voting key that the signer is asked for next: in the database before it is asked.
    VotingKey { number: u64, done: oneshot::Sender<()> },
}

/// The shares as others may look at them.
#[derive(Clone)]
pub struct Shares(Arc<RwLock<ShareSet>>);

impl Shares {
    /// This server's share of a secret; none if there is none of this epoch.
    pub fn share(&self, index: u64, epoch: Epoch) -> Option<SecretBytes> {
        let shares = self.0.read().unwrap_or_else(PoisonError::into_inner);
        shares.share(index).filter(|_| shares.epoch() == epoch)
    }
    /// The epoch of the shares.
    pub fn epoch(&self) -> Epoch {
        self.0.read().unwrap_or_else(PoisonError::into_inner).epoch()
    }
    /// How many there are.
    pub fn counts(&self) -> ShareCounts {
        self.0.read().unwrap_or_else(PoisonError::into_inner).counts()
    }
    fn read<T>(&self, look: impl FnOnce(&ShareSet) -> T) -> T {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
    fn change(&self, change: impl FnOnce(&mut ShareSet)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The files that shares are in, and what opens them.
struct Files {
    folder: PathBuf,
    keys: Arc<StorageKeys>,
    context: Vec<u8>,
}

impl Files {
    /// Writes the shares under a new storage key, as of an operation of the log; says which key it is.
    fn write(&self, shares: &Shares, applied: u64) -> anyhow::Result<u64> {
        let number = self.keys.advance()?;
        let sealed = memory::scrubbed(|| self.keys.seal(&self.context, &shares.read(encode_secret)));
        let path = self.folder.join(format!("{SHARE_FILE}{applied}"));
        let written = files::replace(&path, &self.folder.join("shares.new"), &sealed);
        written.with_context(|| format!("cannot write {}", path.display()))?;
        Ok(number)
    }
    /// Erases all other files, and the keys before this one.
    fn erase_others(&self, applied: u64, number: u64) -> anyhow::Result<()> {
        for (_, path) in share_files(&self.folder)?.into_iter().filter(|(other, _)| *other != applied) {
            files::erase(&path).with_context(|| format!("cannot erase {}", path.display()))?;
        }
        self.keys.erase_before(number)
    }
}

/// Where the shares of a server are kept.
pub struct ShareStore {
    shares: Shares,
    files: Arc<Files>,
    /// The last operation of the log that the file has, and the last that memory has.
    in_file: u64,
    applied: u64,
    /// The replica's operations that were applied since the start.
    since_start: u64,
}

impl ShareStore {
    /// Reads the newest share file that opens.
    pub fn open(
        folder: &Path,
        keys: Arc<StorageKeys>,
        cluster: &ClusterId,
        id: ServerId,
    ) -> anyhow::Result<Self> {
        let context = encode(&("kds.shares-at-rest.1", cluster, id));
        let mut newest: Option<(u64, ShareSet)> = None;
        for (number, path) in share_files(folder)? {
            let read = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            // One that was being written, or erased, when the server stopped, or that is damaged.
            let Some(shares) = keys.unseal(&context, &read).and_then(|bytes| decode::<ShareSet>(&bytes).ok())
            else {
                files::erase(&path)?;
                continue;
            };
            if newest.as_ref().is_none_or(|(known, _)| *known < number) {
                newest = Some((number, shares));
            }
        }
        let (applied, shares) = newest.unwrap_or_default();
        let shares = Shares(Arc::new(RwLock::new(shares)));
        let files = Arc::new(Files { folder: folder.to_path_buf(), keys, context });
        Ok(Self { shares, files, in_file: applied, applied, since_start: 0 })
    }
    /// The last operation that the share file has.
    pub fn in_file(&self) -> u64 {
        self.in_file
    }
    /// For handing out shares.
    pub fn shares(&self) -> Shares {
        self.shares.clone()
    }
    /// Applies what the log has beyond the file.
    pub fn replay(&mut self, log: Vec<(u64, ShareOp)>) {
        for (number, operation) in log.into_iter().filter(|(number, _)| *number > self.in_file) {
            self.shares.change(|shares| shares.apply(&operation));
            self.applied = number;
        }
    }

    /// Before a server says a word to anybody: what its replica had done to the shares when it started, and then nothing
    /// of an epoch that is over is left, however the process before it ended.
    pub async fn start(
        &mut self,
        storage: &mut Storage,
        operations: Vec<(u64, ShareOp)>,
    ) -> anyhow::Result<()> {
        for (number, operation) in operations {
            self.apply(number, operation).await;
        }
        let number = self.write().await?;
        storage.rotate(self.applied).await.context("the database does not take it")?;
        self.erase_others(number).await?;
        self.erase_attempts().await
    }

    /// Applies an operation; says whether an epoch began.
    async fn apply(&mut self, number: u64, operation: ShareOp) -> bool {
        self.since_start += u64::from(!matches!(operation, ShareOp::Recovered { .. }));
        let begins = matches!(&operation, ShareOp::Renew(renewal) if renewal.to > self.shares.epoch())
            || matches!(&operation, ShareOp::Present { epoch, .. } if *epoch > self.shares.epoch());
        match begins {
            false => self.shares.change(|shares| shares.apply(&operation)),
            true => {
                let shares = self.shares.clone();
                let renewed = tokio::task::spawn_blocking(move || {
                    memory::scrubbed(|| {
                        let mut next = shares.read(ShareSet::clone);
                        next.apply(&operation);
                        shares.change(|shares| std::mem::swap(shares, &mut next));
                        drop((next, operation));
                    });
                });
                renewed.await.expect("renewing shares does not panic");
            }
        }
        self.applied = number;
        begins
    }

    /// Rotates, and says whether that worked: what could not be erased is tried again until it is.
    async fn try_rotate(&mut self, committer: &mpsc::Sender<ToCommitter>, shared: &Shared) -> bool {
        let rotated = match self.rotate(committer).await {
            Ok(()) => self.erase_attempts().await,
            Err(error) => Err(error),
        };
        Self::erased(rotated, shared)
    }
    /// The same for keys of attempts that are over.
    async fn erase_condemned(&mut self, shared: &Shared) -> bool {
        Self::erased(self.erase_attempts().await, shared)
    }
    async fn erase_attempts(&self) -> anyhow::Result<()> {
        let files = Arc::clone(&self.files);
        tokio::task::spawn_blocking(move || files.keys.erase_condemned()).await?
    }
    fn erased(done: anyhow::Result<()>, shared: &Shared) -> bool {
        shared.health.set(TroubleKind::NotErased, done.is_err());
        if let Err(error) = &done
            && let Some(unsaid) = seldom::now("not erased", None)
        {
            tracing::error!(error = %format!("{error:#}"), unsaid, "what belongs to the last epoch could not be erased; it is tried again");
        }
        done.is_ok()
    }

    /// Writes the share file anew under a new storage key, has the rest of what is secret follow, and
    /// erases what was before.
    async fn rotate(&mut self, committer: &mpsc::Sender<ToCommitter>) -> anyhow::Result<()> {
        let number = self.write().await?;
        let (done, rotated) = oneshot::channel();
        let applied = self.applied;
        if committer.send(ToCommitter::Rotate { applied, done }).await.is_err() || rotated.await.is_err() {
            // The server stops, or cannot write its database: the old key stays for what is in there.
            anyhow::bail!("the database does not take it");
        }
        self.erase_others(number).await
    }
    async fn write(&self) -> anyhow::Result<u64> {
        let (files, shares, applied) = (Arc::clone(&self.files), self.shares.clone(), self.applied);
        tokio::task::spawn_blocking(move || files.write(&shares, applied)).await?
    }
    async fn erase_others(&mut self, number: u64) -> anyhow::Result<()> {
        self.in_file = self.applied;
        let (files, applied) = (Arc::clone(&self.files), self.applied);
        tokio::task::spawn_blocking(move || files.erase_others(applied, number)).await?
    }
}

fn share_files(folder: &Path) -> anyhow::Result<Vec<(u64, PathBuf)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix(SHARE_FILE).and_then(|rest| rest.parse().ok());
        files.extend(number.map(|number| (number, path)));
    }
    Ok(files)
}

/// Runs until the server stops: keeps the shares, helps other servers, has own shares recovered. Ends when the last
/// operation is applied, and what that leaves behind is erased.
pub async fn run(
    mut store: ShareStore,
    (mut operations, mut heard): (mpsc::UnboundedReceiver<(u64, ShareOp)>, mpsc::Receiver<ToKeeper>),
    committer: mpsc::Sender<ToCommitter>,
    peers: Peers,
    inputs: mpsc::Sender<Input>,
    shared: Arc<Shared>,
) {
    let mut keeper = Keeper::new(shared.id, shared.manifest.thresholds);
    let mut tick = interval(Duration::from_millis(125));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut said, mut rotated, mut last_try) = (None, true, Instant::now());
    loop {
        let kept = tokio::select! {
            next = operations.recv() => {
                let Some((number, operation)) = next else {
                    if !rotated {
                        store.try_rotate(&committer, &shared).await;
                    }
                    return;
                };
                let began = Instant::now();
                if store.apply(number, operation).await {
                    let seconds = began.elapsed().as_secs_f64();
                    metrics::gauge!("kds_refresh_seconds").set(seconds);
                    let epoch = store.shares.epoch();
                    let ShareCounts { secrets, shares, .. } = store.shares.counts();
                    tracing::info!(%epoch, secrets, shares, seconds, "shares renewed");
                    rotated = store.try_rotate(&committer, &shared).await;
                }
                Kept::default()
            }
            Some(heard) = heard.recv() => match heard {
                ToKeeper::Ask(from, ask) => {
                    if let Some(answer) = store.shares.read(|shares| keeper.on_ask(from, &ask, shares)) {
                        peers.send(Target::One(from), &answer);
                    }
                    Kept::default()
                }
                ToKeeper::Masked(from, masked) => keeper.on_masked(from, masked),
            },
            // Decoding goes on by turns, so that whatever else there is to do waits for one of them at most.
            () = std::future::ready(()), if keeper.is_busy() => {
                store.shares.read(|shares| keeper.tick(crate::driver::now(), shares))
            }
            _ = tick.tick() => {
                if !rotated && last_try.elapsed() >= ERASE_AGAIN {
                    last_try = Instant::now();
                    rotated = store.try_rotate(&committer, &shared).await;
                }
                if store.files.keys.any_condemned() && rotated {
                    rotated = store.erase_condemned(&shared).await;
                    last_try = Instant::now();
                }
                let kept = store.shares.read(|shares| keeper.tick(crate::driver::now(), shares));
                let (whole, lacks_shares) =
                    store.shares.read(|shares| (shares.is_whole(), keeper.lacks_shares(shares)));
                let holding = Holding { applied: store.since_start, whole, lacks_shares };
                if said.replace(holding) != Some(holding) {
                    let _ = inputs.send(Input::Holding(holding)).await;
                }
                kept
            }
        };
        for (to, message) in &kept.messages {
            peers.send(Target::One(*to), message);
        }
        for (server, secrets) in &kept.wrong {
            metrics::counter!("kds_accusations_total").increment(1);
            tracing::warn!(%server, secrets, "masked shares that fit no polynomial with the others'");
        }
        if let Some(operation) = kept.recovered {
            // Logged first, so that a number is never used twice; it comes back as an operation.
            if committer.send(ToCommitter::Log { operation }).await.is_err() {
                return;
            }
        }
        match kept.ended {
            Some(Left { open: 0, excused: 0 }) => tracing::info!("all missing shares are recovered"),
            Some(Left { open: 0, excused }) => {
                tracing::warn!(
                    excused,
                    "all missing shares are recovered, but of secrets that were dealt wrongly"
                )
            }
            Some(Left { open, excused }) => tracing::error!(
                open,
                excused,
                "shares that could not be recovered: asked for again in a later epoch"
            ),
            None => {}
        }
    }
}
