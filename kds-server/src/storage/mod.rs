//! The server's database: one SQLite file, written by one task, which nobody else can open meanwhile.
//!
//! `synchronous=FULL` with a write-ahead log makes one fsync a commit; the committer puts whatever
//! is in flight into one transaction (group commit). `secure_delete` overwrites what is deleted.
//! What a damaged file leads to is in [`opening`].

mod aside;
mod count;
mod failure;
mod opening;
mod transaction;

pub use failure::Failure;
pub use opening::{Opened, Place};

use crate::at_rest::StorageKeys;
use crate::seldom;
use anyhow::{Context as _, bail, ensure};
use count::Count;
use quorum::bytes::SecretBlob;
use quorum::codec::{decode, encode};
use quorum::ids::{AttemptId, ClusterId, Sequence, ServerId};
use quorum::ordering::{Stored, StoredSlot, StoredState, StoredView, VaultKey, Write};
use quorum::shares::ShareOp;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Connection as _, Row as _, SqlStr};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use transaction::{Transaction, attempt_of, in_slot, log_context, marked, unmarked, vault_context};

/// The schema, step by step. Steps are never changed, only added.
/// (`sqlx::migrate!` would do the same, and build SQLite a second time for the macro.)
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "server", include_str!("../../../migrations/sqlite/0001_server.sql")),
    (2, "epochs", include_str!("../../../migrations/sqlite/0002_epochs.sql")),
];

fn migrator() -> Migrator {
    let migration = |(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(*version, (*name).into(), MigrationType::Simple, SqlStr::from_static(sql), false)
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
}

/// How the file is kept: nobody else opens it while this process runs, since a reader that takes its time, or a lock that
/// is forgotten, would hold up what this server promises to others.
const SETTINGS: &str = "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; \
                        PRAGMA secure_delete = ON; PRAGMA wal_autocheckpoint = 4000";
/// How long the engine itself waits for a lock that another process has.
const BUSY: Duration = Duration::from_secs(1);
/// Lines that the engine's check says at most.
const CHECK: &str = "PRAGMA quick_check(100)";

/// The connection that writes.
pub struct Storage {
    writer: SqliteConnection,
    keys: Arc<StorageKeys>,
    /// The number of the next operation on shares.
    next_operation: u64,
    /// Transactions so far, which is written down beside the database too.
    transactions: u64,
    count: Count,
}

impl Storage {
    /// Opens or creates the database, checks it, brings its schema up to date, and makes sure that it is this
    /// server's. What fails leaves nothing open.
    async fn open(
        path: &Path,
        (cluster, id): (&ClusterId, ServerId),
        keys: Arc<StorageKeys>,
        count: Count,
    ) -> anyhow::Result<Self> {
        // No setting is given here that looks into the file: a connection that cannot be made closes when it likes.
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(true).busy_timeout(BUSY);
        let writer = SqliteConnection::connect_with(&options).await?;
        let mut storage = Self { writer, keys, next_operation: 1, transactions: 0, count };
        match storage.set_up(path, cluster, id).await {
            Ok(()) => Ok(storage),
            Err(error) => {
                storage.close().await;
                Err(error)
            }
        }
    }

    async fn set_up(&mut self, path: &Path, cluster: &ClusterId, id: ServerId) -> anyhow::Result<()> {
        sqlx::raw_sql(SETTINGS).execute(&mut self.writer).await?;
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut self.writer).await?;
        ensure!(mode == "wal", "the file cannot be given a write-ahead log");
        let found: Vec<String> = sqlx::query_scalar(CHECK).fetch_all(&mut self.writer).await?;
        failure::judge(&found)?;
        let migrated = migrator().run_direct(None, &mut self.writer, false).await;
        migrated.context("its schema is not one of this version; was it written by a newer kds-server?")?;
        self.check_owner(path, cluster, id).await?;
        self.transactions = self.meta("transactions").await?.and_then(|n| decode(&n).ok()).unwrap_or(0);
        Ok(())
    }

    async fn check_owner(&mut self, path: &Path, cluster: &ClusterId, id: ServerId) -> anyhow::Result<()> {
        let owner = encode(&(cluster, id));
        match self.meta("owner").await? {
            Some(known) if known == owner => Ok(()),
            Some(_) => bail!("the database {} belongs to another server or another cluster", path.display()),
            None => {
                sqlx::query("INSERT OR REPLACE INTO meta (name, value) VALUES ('owner', ?)")
                    .bind(marked(&"owner", owner))
                    .execute(&mut self.writer)
                    .await?;
                Ok(())
            }
        }
    }

    /// None also if it is damaged.
    async fn meta(&mut self, name: &str) -> Result<Option<Vec<u8>>, sqlx::Error> {
        let value = sqlx::query_scalar("SELECT value FROM meta WHERE name = ?").bind(name);
        let value: Option<Vec<u8>> = value.fetch_optional(&mut self.writer).await?;
        Ok(value.and_then(|value| unmarked(&name, value)))
    }

    /// What the replica starts from. What is damaged it repairs from the others.
    async fn load(&mut self) -> Result<Stored, sqlx::Error> {
        let mut stored = Stored::default();
        let damaged = &mut stored.damaged;
        let mut meta: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for row in sqlx::query("SELECT name, value FROM meta").fetch_all(&mut self.writer).await? {
            let (name, value): (String, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            // Also of a name that nobody asks for: it may have been another.
            let value = checked(&name, Some(value), damaged);
            meta.extend(value.map(|value| (name, value)));
        }
        stored.amnesia = decoded(meta.remove("amnesia"), damaged);
        stored.voting_key = decoded(meta.remove("voting-key"), damaged).unwrap_or_default();
        if let Some(checkpoint) = decoded(meta.remove("checkpoint"), damaged) {
            let rows = sqlx::query("SELECT key, value FROM leaves").fetch_all(&mut self.writer).await?;
            let leaves = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let leaves = leaves.collect::<Result<_, sqlx::Error>>()?;
            stored.state = Some(StoredState { checkpoint, leaves });
        }
        stored.certificate = decoded(meta.remove("certificate"), damaged);
        if let Some((view, began)) = decoded(meta.remove("view"), damaged) {
            stored.view = Some(StoredView { view, began });
        }
        let query = "SELECT sequence, accepted, accepted_batch, prepared, prepared_batch, committed, committed_batch \
                     FROM slots ORDER BY sequence";
        for row in sqlx::query(query).fetch_all(&mut self.writer).await? {
            stored.slots.push(slot(&row, damaged)?);
        }
        stored.vault = self.vault().await?;
        Ok(stored)
    }

    /// What the replica's vault holds. A piece that does not open is as good as lost.
    async fn vault(&mut self) -> Result<Vec<(VaultKey, SecretBlob)>, sqlx::Error> {
        let rows = sqlx::query("SELECT key, value FROM vault").fetch_all(&mut self.writer).await?;
        let mut vault = Vec::new();
        for row in rows {
            let (key, value): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            let Ok(of) = decode::<VaultKey>(&key) else { continue };
            let context = vault_context(&key);
            let opened = match attempt_of(&of) {
                Some(attempt) => self.keys.unseal_of(attempt, &context, &value),
                None => self.keys.unseal(&context, &value),
            };
            vault.extend(opened.map(|opened| (of, SecretBlob::new(opened))));
        }
        // A start destroys what the one before did not come to.
        let kept: BTreeSet<_> = vault.iter().filter_map(|(key, _)| attempt_of(key)).collect();
        self.keys.condemn(|attempt| !kept.contains(&attempt));
        Ok(vault)
    }

    /// What has happened to the shares since the share file was written, which has everything up to
    /// `in_file`; and whether anything is missing.
    async fn share_log(&mut self, in_file: u64) -> Result<(Vec<(u64, ShareOp)>, bool), sqlx::Error> {
        let expected = self.meta("share_file").await?.and_then(|bytes| decode(&bytes).ok()).unwrap_or(0);
        let mut damaged = in_file < expected;
        let query = "SELECT number, operation FROM share_log ORDER BY number";
        let mut log = Vec::new();
        for row in sqlx::query(query).fetch_all(&mut self.writer).await? {
            let (number, operation): (i64, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            let number = number as u64;
            let opened = self.keys.unseal(&log_context(number), &operation);
            let operation = opened.and_then(|bytes| decode(&bytes).ok());
            damaged |= operation.is_none() && number > in_file;
            log.extend(operation.map(|operation| (number, operation)));
            self.next_operation = number + 1;
        }
        self.next_operation = self.next_operation.max(in_file.max(expected) + 1);
        Ok((log, damaged))
    }

    /// After an epoch: what the share file has is forgotten, the rest of what is secret is encrypted under
    /// the new storage key, and the write-ahead log, which still has the old forms, is emptied.
    pub async fn rotate(&mut self, applied: u64) -> Result<(), sqlx::Error> {
        sqlx::raw_sql("BEGIN IMMEDIATE").execute(&mut self.writer).await?;
        let number = self.transactions + 1;
        let done = match self.seal_anew(applied, number).await {
            Ok(()) => sqlx::raw_sql("COMMIT").execute(&mut self.writer).await.map(drop),
            Err(error) => Err(error),
        };
        if done.is_err() {
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut self.writer).await;
        }
        done?;
        self.count_to(number);
        sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut self.writer).await.map(drop)
    }

    async fn seal_anew(&mut self, applied: u64, number: u64) -> Result<(), sqlx::Error> {
        for (name, value) in [("share_file", applied), ("transactions", number)] {
            sqlx::query("INSERT OR REPLACE INTO meta (name, value) VALUES (?, ?)")
                .bind(name)
                .bind(marked(&name, encode(&value)))
                .execute(&mut self.writer)
                .await?;
        }
        sqlx::query("DELETE FROM share_log WHERE number <= ?")
            .bind(applied as i64)
            .execute(&mut self.writer)
            .await?;
        let rows = sqlx::query("SELECT number, operation FROM share_log").fetch_all(&mut self.writer).await?;
        for row in rows {
            let (number, operation): (i64, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            let context = log_context(number as u64);
            let Some(opened) = self.keys.unseal(&context, &operation) else { continue };
            sqlx::query("UPDATE share_log SET operation = ? WHERE number = ?")
                .bind(self.keys.seal(&context, &opened))
                .bind(number)
                .execute(&mut self.writer)
                .await?;
        }
        let rows = sqlx::query("SELECT key, value FROM vault").fetch_all(&mut self.writer).await?;
        for row in rows {
            let (key, value): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            if decode(&key).ok().as_ref().and_then(attempt_of).is_some() {
                // Under a key of its own.
                continue;
            }
            let context = vault_context(&key);
            let Some(opened) = self.keys.unseal(&context, &value) else { continue };
            sqlx::query("UPDATE vault SET value = ? WHERE key = ?")
                .bind(self.keys.seal(&context, &opened))
                .bind(key)
                .execute(&mut self.writer)
                .await?;
        }
        Ok(())
    }

    /// Makes writes durable, all or none.
    ///
    /// One transaction is one text, sent to the database's thread in one piece: a round trip there
    /// for each statement would cost more than the statements.
    ///
    /// Gives the operations on shares among them, numbered as they are in the log now.
    pub async fn commit(&mut self, writes: &[&Write]) -> Result<Vec<(u64, ShareOp)>, sqlx::Error> {
        if writes.is_empty() {
            return Ok(vec![]);
        }
        let number = self.transactions + 1;
        let mut transaction = Transaction::begin(self.next_operation);
        writes
            .iter()
            .try_for_each(|write| transaction.add(write, &self.keys))
            .and_then(|()| transaction.meta("transactions", encode(&number)))
            .map_err(sqlx::Error::Encode)?;
        let Transaction { mut sql, arguments, repeats, operations, next_operation } = transaction;
        sql.push_str("COMMIT");
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments).persistent(repeats);
        let done = query.execute(&mut self.writer).await;
        if done.is_err() {
            // Nothing of it stays; where the transaction is over already this has nothing to do.
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut self.writer).await;
        }
        done?;
        self.next_operation = next_operation;
        self.count_to(number);
        // Contributions to an attempt are deleted all at once.
        let deleted: BTreeSet<_> = writes.iter().filter_map(|write| deletes(write)).collect();
        if !deleted.is_empty() {
            self.keys.condemn(|attempt| deleted.contains(&attempt));
        }
        Ok(operations)
    }

    /// Takes note of a transaction that is durable, before anything of it leaves.
    fn count_to(&mut self, number: u64) {
        self.transactions = number;
        if let Err(error) = self.count.set(number)
            && let Some(unsaid) = seldom::now("not counted", None)
        {
            tracing::warn!(%error, unsaid, "transactions are not counted: a damaged log would not be noticed");
        }
    }

    /// Closes the file cleanly.
    pub async fn close(self) {
        if let Err(error) = self.writer.close().await {
            tracing::warn!(%error, "closing the database");
        }
    }
}

/// The attempt that a write deletes contributions to.
fn deletes(write: &Write) -> Option<AttemptId> {
    match write {
        Write::Vault { key, value: None } => attempt_of(key),
        _ => None,
    }
}

/// What stands at a place, if it is what was written there.
fn checked(place: &impl Serialize, stored: Option<Vec<u8>>, damaged: &mut bool) -> Option<Vec<u8>> {
    let value = unmarked(place, stored?);
    *damaged |= value.is_none();
    value
}

fn decoded<T: DeserializeOwned>(value: Option<Vec<u8>>, damaged: &mut bool) -> Option<T> {
    let decoded = decode(&value?);
    *damaged |= decoded.is_err();
    decoded.ok()
}

fn slot(row: &SqliteRow, damaged: &mut bool) -> Result<StoredSlot, sqlx::Error> {
    let sequence: i64 = row.try_get(0)?;
    let sequence = Sequence(sequence as u64);
    let mut value = |column: usize, what| {
        let stored = row.try_get(column)?;
        Ok::<_, sqlx::Error>(checked(&in_slot(what, sequence), stored, damaged))
    };
    let (accepted, accepted_batch) = (value(1, "accepted")?, value(2, "batch")?);
    let (prepared, prepared_batch) = (value(3, "prepared")?, value(4, "batch")?);
    let (committed, committed_batch) = (value(5, "committed")?, value(6, "batch")?);
    let accepted = decoded(accepted, damaged).zip(decoded(accepted_batch, damaged));
    let prepared = decoded(prepared, damaged).map(|proof| (proof, decoded(prepared_batch, damaged)));
    let committed = decoded(committed, damaged).map(|proof| (proof, decoded(committed_batch, damaged)));
    Ok(StoredSlot { sequence, accepted, prepared, committed })
}

#[cfg(test)]
mod tests;
