//! Opens the database at a start, whatever has happened to it.
//!
//! A database that the engine calls damaged is as good as lost, and loses nothing of the cluster: it is moved out of the
//! way, and the server begins with an empty one and recovers. What may pass is waited for, so that nobody loses a database
//! over it; everything else is refused, with what to do about it (docs/decisions/0035).

use super::{Count, Failure, Storage, aside};
use crate::at_rest::StorageKeys;
use crate::config::DATABASE;
use anyhow::Context as _;
use quorum::ids::{ClusterId, ServerId};
use quorum::ordering::Stored;
use quorum::shares::ShareOp;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long what may pass is waited for, and between two tries.
const PATIENCE: Duration = Duration::from_secs(20);
const AGAIN: Duration = Duration::from_millis(250);

/// The file beside the database that counts its transactions.
const COUNT: &str = "kds.count";

/// Whose database it is, and where.
pub struct Place<'a> {
    /// The server's folder.
    pub folder: &'a Path,
    /// Its cluster.
    pub cluster: &'a ClusterId,
    /// The server.
    pub id: ServerId,
    /// What opens what is secret in it.
    pub keys: &'a Arc<StorageKeys>,
    /// The last operation on shares that the share file has.
    pub in_file: u64,
}

/// An open database, and what was found in it.
pub struct Opened {
    /// To write to.
    pub storage: Storage,
    /// What the replica starts from. It says so if the database is known to have lost transactions.
    pub stored: Stored,
    /// What has happened to the shares since the share file was written.
    pub share_log: Vec<(u64, ShareOp)>,
    /// Where a damaged one was moved to, just now.
    pub aside: Option<PathBuf>,
}

impl Place<'_> {
    /// Opens and reads it.
    pub async fn open(&self) -> anyhow::Result<Opened> {
        let (began, mut waits, mut put_aside) = (Instant::now(), false, None);
        loop {
            let error = match self.try_to_open().await {
                Ok(opened) => {
                    self.mention_kept();
                    return Ok(Opened { aside: put_aside, ..opened });
                }
                Err(error) => error,
            };
            match Failure::behind(&error) {
                Failure::Damaged if put_aside.is_none() => {
                    let kept = aside::keep(self.folder)?;
                    tracing::error!(
                        server = %self.id, error = %format!("{error:#}"), kept = %kept.display(),
                        "the database is damaged, and moved aside: this server begins with an empty one and gets \
                         everything from the others. Is its disk failing? Remove what is kept when you have looked at it"
                    );
                    put_aside = Some(kept);
                }
                Failure::Passing | Failure::Full if began.elapsed() < PATIENCE => {
                    if !std::mem::replace(&mut waits, true) {
                        tracing::warn!(
                            server = %self.id, error = %format!("{error:#}"), seconds = PATIENCE.as_secs(),
                            "the database cannot be opened yet: waiting"
                        );
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                failure => return Err(error.context(self.what_to_do(failure))),
            }
        }
    }

    async fn try_to_open(&self) -> anyhow::Result<Opened> {
        let path = self.folder.join(COUNT);
        let counted = Count::open(&path).with_context(|| format!("cannot open {}", path.display()));
        let (count, counted) = counted?;
        let (path, keys) = (self.folder.join(DATABASE), Arc::clone(self.keys));
        let mut storage = Storage::open(&path, (self.cluster, self.id), keys, count).await?;
        match self.read(&mut storage, counted).await {
            Ok((stored, share_log)) => Ok(Opened { storage, stored, share_log, aside: None }),
            Err(error) => {
                storage.close().await;
                Err(error)
            }
        }
    }

    async fn read(
        &self,
        storage: &mut Storage,
        counted: Option<u64>,
    ) -> anyhow::Result<(Stored, Vec<(u64, ShareOp)>)> {
        let mut stored = storage.load().await?;
        let (log, damaged) = storage.share_log(self.in_file).await?;
        if damaged {
            tracing::warn!(server = %self.id, "some of this server's shares cannot be read: they are recovered from the other servers");
            stored.shares_damaged = true;
        }
        if counted.is_some_and(|counted| counted > storage.transactions) {
            tracing::warn!(
                server = %self.id, counted, found = storage.transactions,
                "the database has lost transactions: it is an older copy, or its write-ahead log is damaged"
            );
            stored.forgot = true;
        }
        Ok((stored, log))
    }

    fn what_to_do(&self, failure: Failure) -> String {
        let path = self.folder.join(DATABASE);
        let path = path.display();
        match failure {
            Failure::Passing => format!(
                "cannot open the database {path}\n  does another program have it open (fuser {path})? does its disk work? \
                 Nothing was changed; start the server again. With a disk that is lost: move {path}* away, and it \
                 recovers from the others"
            ),
            Failure::Full => format!(
                "cannot open the database {path}\n  make room on its disk, and start the server again"
            ),
            Failure::Damaged => {
                format!(
                    "the new database {path} is damaged at once\n  this disk does not keep what is written to it"
                )
            }
            Failure::Refused => format!(
                "cannot open the database {path}\n  is it this server's, and may it read and write there? Nothing was \
                 changed. If the file is of no use any more: move {path}* away, and start the server again: it recovers \
                 from the others"
            ),
        }
    }

    fn mention_kept(&self) {
        for kept in aside::all(self.folder).unwrap_or_default() {
            tracing::info!(server = %self.id, kept = %kept.display(), "what is left of a damaged database is kept: remove it when you have looked at it");
        }
    }
}
