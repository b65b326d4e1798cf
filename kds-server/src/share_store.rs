//! This server's shares: in memory, in a file that is written anew with every epoch, and in the database's
//! log of what has happened since.
//!
//! An epoch's renewal runs beside everything else, on a copy; readers see the old shares until the new
//! ones are there. Then, in this order: the next storage key is drawn; the new shares are written under
//! it and synced; what is left in the database is encrypted under it (by the committer); the old file and
//! the old key are overwritten and removed. A crash anywhere in between leaves a file and a log that lead
//! to the same shares.

use crate::at_rest::{StorageKeys, erase_file, sync_folder};
use crate::memory;
use crate::peers::Peers;
use crate::seldom;
use crate::server::Shared;
use anyhow::Context as _;
use kds_client::api::TroubleKind;
use quorum::codec::{decode, encode, encode_secret};
use quorum::ids::{Epoch, ServerId};
use quorum::ordering::{Holding, Input, Target};
use quorum::recovery::{AskMasked, Keeper, Kept, Left, Masked};
use quorum::shares::{ShareCounts, ShareOp, ShareSet};
use quorum::{ClusterId, SecretBytes};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
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

/// Where the shares of a server are kept.
pub struct ShareStore {
    shares: Shares,
    folder: PathBuf,
    keys: Arc<StorageKeys>,
    context: Vec<u8>,
    /// The last operation of the log that the file has, and the last that memory has.
    in_file: u64,
    applied: u64,
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
            let opened = keys.unseal(&context, &std::fs::read(&path)?);
            // One that was being written, or erased, when the server stopped.
            let Some(shares) = opened.and_then(|bytes| decode::<ShareSet>(&bytes).ok()) else {
                erase_file(&path)?;
                continue;
            };
            if newest.as_ref().is_none_or(|(known, _)| *known < number) {
                newest = Some((number, shares));
            }
        }
        let (applied, shares) = newest.unwrap_or_default();
        let shares = Shares(Arc::new(RwLock::new(shares)));
        Ok(Self { shares, folder: folder.to_path_buf(), keys, context, in_file: applied, applied })
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

    /// Applies an operation; says whether an epoch began.
    async fn apply(&mut self, number: u64, operation: ShareOp) -> bool {
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
        let keys = Arc::clone(&self.keys);
        tokio::task::spawn_blocking(move || keys.erase_condemned()).await?
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
        let (keys, shares, applied) = (Arc::clone(&self.keys), self.shares.clone(), self.applied);
        let (folder, context) = (self.folder.clone(), self.context.clone());
        let written = tokio::task::spawn_blocking(move || {
            let number = keys.advance()?;
            let sealed = memory::scrubbed(|| keys.seal(&context, &shares.read(encode_secret)));
            let path = folder.join(format!("{SHARE_FILE}{applied}"));
            let new = folder.join("shares.new");
            let write = || {
                let options = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).clone();
                let mut file = options.open(&new)?;
                file.write_all(&sealed)?;
                file.sync_all()?;
                std::fs::rename(&new, &path)?;
                sync_folder(&folder)
            };
            write().with_context(|| format!("cannot write {}", path.display()))?;
            anyhow::Ok(number)
        });
        let number = written.await??;
        let (done, rotated) = oneshot::channel();
        if committer.send(ToCommitter::Rotate { applied, done }).await.is_err() || rotated.await.is_err() {
            // The server stops, or cannot write its database: the old key stays for what is in there.
            anyhow::bail!("the database does not take it");
        }
        self.in_file = applied;
        let (folder, keys) = (self.folder.clone(), Arc::clone(&self.keys));
        let erased = tokio::task::spawn_blocking(move || {
            for (_, path) in share_files(&folder)?.into_iter().filter(|(other, _)| *other != applied) {
                erase_file(&path)?;
            }
            keys.erase_before(number)
        });
        erased.await?
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

/// Runs until the server stops: keeps the shares, helps other servers, has own shares recovered.
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
    let (mut said, mut applied) = (None, 0);
    // A start erases what the one before did not come to, before it does anything else with shares.
    let mut rotated = store.try_rotate(&committer, &shared).await;
    let mut last_try = Instant::now();
    loop {
        let kept = tokio::select! {
            next = operations.recv() => {
                let Some((number, operation)) = next else { return };
                applied += u64::from(!matches!(operation, ShareOp::Recovered { .. }));
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
            next = heard.recv() => match next {
                None => return,
                Some(ToKeeper::Ask(from, ask)) => {
                    if let Some(answer) = store.shares.read(|shares| keeper.on_ask(from, &ask, shares)) {
                        peers.send(Target::One(from), &answer);
                    }
                    Kept::default()
                }
                Some(ToKeeper::Masked(from, masked)) => keeper.on_masked(from, masked),
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
                if store.keys.any_condemned() && rotated {
                    rotated = store.erase_condemned(&shared).await;
                    last_try = Instant::now();
                }
                let kept = store.shares.read(|shares| keeper.tick(crate::driver::now(), shares));
                let (whole, lacks_shares) =
                    store.shares.read(|shares| (shares.is_whole(), keeper.lacks_shares(shares)));
                let holding = Holding { applied, whole, lacks_shares };
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
