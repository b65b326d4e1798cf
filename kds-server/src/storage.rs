//! The server's database: one SQLite file, written by one task.
//!
//! `synchronous=FULL` with a write-ahead log makes one fsync a commit; the committer puts whatever
//! is in flight into one transaction (group commit). `secure_delete` overwrites what is deleted.

use anyhow::{Context as _, bail};
use quorum::bytes::SecretBlob;
use quorum::codec::{decode, encode, encode_secret};
use quorum::ids::{AttemptId, ClusterId, Sequence, ServerId};
use quorum::ordering::{Stored, StoredSlot, StoredState, StoredView, VaultKey, Write};
use quorum::shares::ShareOp;
use sqlx::error::BoxDynError;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous,
};
use sqlx::{Arguments as _, AssertSqlSafe, Connection as _, Encode, Row as _, SqlStr, Sqlite, Type};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use crate::at_rest::StorageKeys;
use std::sync::Arc;

/// The schema, step by step. Steps are never changed, only added.
/// (`sqlx::migrate!` would do the same, and build SQLite a second time for the macro.)
const MIGRATIONS: &[(i64, &str, &str)] = &[
    (1, "server", include_str!("../../migrations/sqlite/0001_server.sql")),
    (2, "epochs", include_str!("../../migrations/sqlite/0002_epochs.sql")),
];

fn migrator() -> Migrator {
    let migration = |(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(*version, (*name).into(), MigrationType::Simple, SqlStr::from_static(sql), false)
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
}

/// Entries written by one statement; SQLite allows 32,766 bound values.
const ROWS_PER_STATEMENT: usize = 500;

/// The connection that writes.
pub struct Storage {
    writer: SqliteConnection,
    keys: Arc<StorageKeys>,
    /// The number of the next operation on shares.
    next_operation: u64,
}

impl Storage {
    /// Opens or creates the database, brings its schema up to date, and makes sure that it is this
    /// server's.
    pub async fn open(
        path: &Path,
        cluster: &ClusterId,
        id: ServerId,
        keys: Arc<StorageKeys>,
    ) -> anyhow::Result<Self> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5))
            .pragma("secure_delete", "on")
            .pragma("wal_autocheckpoint", "4000");
        let opened = async {
            let mut writer = SqliteConnection::connect_with(&options).await?;
            migrator().run_direct(None, &mut writer, false).await?;
            anyhow::Ok(writer)
        };
        let writer = opened.await.with_context(|| format!("cannot open the database {}", path.display()))?;
        let mut storage = Self { writer, keys, next_operation: 1 };
        storage.check_owner(path, cluster, id).await?;
        Ok(storage)
    }

    async fn check_owner(&mut self, path: &Path, cluster: &ClusterId, id: ServerId) -> anyhow::Result<()> {
        let owner = encode(&(cluster, id));
        match self.meta("owner").await? {
            Some(known) if known == owner => Ok(()),
            Some(_) => bail!(
                "the database {} belongs to another server or another cluster\n  \
                 start each server with its own config.toml, or move the file away",
                path.display()
            ),
            None => {
                sqlx::query("INSERT INTO meta (name, value) VALUES ('owner', ?)")
                    .bind(owner)
                    .execute(&mut self.writer)
                    .await?;
                Ok(())
            }
        }
    }

    async fn meta(&mut self, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
        let row =
            sqlx::query("SELECT value FROM meta WHERE name = ?").bind(name).fetch_optional(&mut self.writer);
        Ok(row.await?.map(|row| row.try_get(0)).transpose()?)
    }

    /// What the replica starts from.
    pub async fn load(&mut self) -> anyhow::Result<Stored> {
        // What does not decode is damage, which the replica repairs from the others.
        fn read<T: serde::de::DeserializeOwned>(bytes: Option<Vec<u8>>, damaged: &mut bool) -> Option<T> {
            let read = decode(&bytes?);
            *damaged |= read.is_err();
            read.ok()
        }
        let mut stored = Stored::default();
        let damaged = &mut stored.damaged;
        stored.amnesia = read(self.meta("amnesia").await?, damaged);
        stored.voting_key = read(self.meta("voting-key").await?, damaged).unwrap_or_default();
        if let Some(checkpoint) = read(self.meta("checkpoint").await?, damaged) {
            let rows = sqlx::query("SELECT key, value FROM leaves").fetch_all(&mut self.writer).await?;
            let leaves = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let leaves = leaves.collect::<Result<_, sqlx::Error>>()?;
            stored.state = Some(StoredState { checkpoint, leaves });
        }
        stored.certificate = read(self.meta("certificate").await?, damaged);
        if let Some((view, began)) = read(self.meta("view").await?, damaged) {
            stored.view = Some(StoredView { view, began });
        }
        let query = "SELECT sequence, accepted, accepted_batch, prepared, prepared_batch, committed, committed_batch \
                     FROM slots ORDER BY sequence";
        for row in sqlx::query(query).fetch_all(&mut self.writer).await? {
            let sequence: i64 = row.try_get(0)?;
            let accepted = read(row.try_get(1)?, damaged).zip(read(row.try_get(2)?, damaged));
            let prepared_batch = read(row.try_get(4)?, damaged);
            let prepared = read(row.try_get(3)?, damaged).map(|proof| (proof, prepared_batch));
            let committed_batch = read(row.try_get(6)?, damaged);
            let committed = read(row.try_get(5)?, damaged).map(|proof| (proof, committed_batch));
            stored.slots.push(StoredSlot {
                sequence: Sequence(sequence as u64),
                accepted,
                prepared,
                committed,
            });
        }
        stored.vault = self.vault().await?;
        Ok(stored)
    }

    /// What the replica's vault holds. A piece that does not open is as good as lost.
    async fn vault(&mut self) -> anyhow::Result<Vec<(VaultKey, SecretBlob)>> {
        let rows = sqlx::query("SELECT key, value FROM vault").fetch_all(&mut self.writer).await?;
        let mut vault = Vec::new();
        for row in rows {
            let (key, value): (Vec<u8>, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
            let Ok(of) = decode::<VaultKey>(&key) else { continue };
            let opened = match of {
                VaultKey::Dealing(attempt, _) => self.keys.unseal_of(attempt, &vault_context(&key), &value),
                VaultKey::Opening(_) => self.keys.unseal(&vault_context(&key), &value),
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
    pub async fn share_log(&mut self, in_file: u64) -> anyhow::Result<(Vec<(u64, ShareOp)>, bool)> {
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
        let done = match self.seal_anew(applied).await {
            Ok(()) => sqlx::raw_sql("COMMIT").execute(&mut self.writer).await.map(drop),
            Err(error) => Err(error),
        };
        if done.is_err() {
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut self.writer).await;
        }
        done?;
        sqlx::raw_sql("PRAGMA wal_checkpoint(TRUNCATE)").execute(&mut self.writer).await.map(drop)
    }

    async fn seal_anew(&mut self, applied: u64) -> Result<(), sqlx::Error> {
        sqlx::query("DELETE FROM share_log WHERE number <= ?")
            .bind(applied as i64)
            .execute(&mut self.writer)
            .await?;
        sqlx::query("INSERT OR REPLACE INTO meta (name, value) VALUES ('share_file', ?)")
            .bind(encode(&applied))
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

    /// Logs an operation on shares that is not the replica's; gives its number.
    pub async fn log_operation(&mut self, operation: &ShareOp) -> Result<u64, sqlx::Error> {
        let number = self.next_operation;
        sqlx::query("INSERT INTO share_log (number, operation) VALUES (?, ?)")
            .bind(number as i64)
            .bind(self.keys.seal(&log_context(number), &encode_secret(operation)))
            .execute(&mut self.writer)
            .await?;
        self.next_operation += 1;
        Ok(number)
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
        let mut transaction = Transaction::begin(self.next_operation);
        writes
            .iter()
            .try_for_each(|write| transaction.add(write, &self.keys))
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
        // Contributions to an attempt are deleted all at once.
        let deleted: BTreeSet<_> = writes.iter().filter_map(|write| deletes(write)).collect();
        if !deleted.is_empty() {
            self.keys.condemn(|attempt| deleted.contains(&attempt));
        }
        Ok(operations)
    }

    /// Closes the file cleanly.
    pub async fn close(self) {
        if let Err(error) = self.writer.close().await {
            tracing::warn!(%error, "closing the database");
        }
    }
}

/// The text of a transaction and the values that it binds.
struct Transaction {
    sql: String,
    arguments: SqliteArguments,
    /// Whether the same text is likely to come again, and worth keeping prepared.
    repeats: bool,
    operations: Vec<(u64, ShareOp)>,
    next_operation: u64,
}

/// The attempt that a piece of the vault belongs to, if it is to be gone with it.
fn attempt_of(key: &VaultKey) -> Option<AttemptId> {
    match key {
        VaultKey::Dealing(attempt, _) => Some(*attempt),
        VaultKey::Opening(_) => None,
    }
}
fn deletes(write: &Write) -> Option<AttemptId> {
    match write {
        Write::Vault { key, value: None } => attempt_of(key),
        _ => None,
    }
}

fn vault_context(key: &[u8]) -> Vec<u8> {
    encode(&("kds.vault-at-rest.1", key))
}
fn log_context(number: u64) -> Vec<u8> {
    encode(&("kds.share-log-at-rest.1", number))
}

impl Transaction {
    fn begin(next_operation: u64) -> Self {
        Self {
            sql: "BEGIN IMMEDIATE; ".into(),
            arguments: SqliteArguments::default(),
            repeats: true,
            operations: Vec::new(),
            next_operation,
        }
    }

    /// One statement; its values are bound in the order of its question marks.
    fn statement(&mut self, sql: &str) {
        self.sql.push_str(sql);
        self.sql.push_str("; ");
    }
    fn bind<T: for<'q> Encode<'q, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> Result<(), BoxDynError> {
        self.arguments.add(value)
    }

    fn add(&mut self, write: &Write, keys: &StorageKeys) -> Result<(), BoxDynError> {
        match write {
            Write::Accepted { pre_prepare, batch } => {
                self.statement(
                    "INSERT INTO slots (sequence, accepted, accepted_batch) VALUES (?, ?, ?) \
                     ON CONFLICT (sequence) DO UPDATE SET accepted = excluded.accepted, \
                     accepted_batch = excluded.accepted_batch, prepared_batch = \
                     CASE WHEN prepared IS NULL THEN NULL ELSE coalesce(slots.prepared_batch, slots.accepted_batch) END",
                );
                self.bind(pre_prepare.body.0.sequence.0 as i64)?;
                self.bind(encode(pre_prepare))?;
                self.bind(encode(batch.as_ref()))
            }
            Write::Prepared { sequence, proof } => {
                self.statement(
                    "INSERT INTO slots (sequence, prepared) VALUES (?, ?) ON CONFLICT (sequence) \
                     DO UPDATE SET prepared = excluded.prepared, prepared_batch = NULL",
                );
                self.bind(sequence.0 as i64)?;
                self.bind(encode(proof))
            }
            Write::Committed { batch, proof } => {
                self.statement(
                    "INSERT INTO slots (sequence, committed, committed_batch) VALUES (?, ?, ?) \
                     ON CONFLICT (sequence) DO UPDATE SET committed = excluded.committed, committed_batch = excluded.committed_batch",
                );
                self.bind(proof.statement.0.sequence.0 as i64)?;
                self.bind(encode(proof))?;
                self.bind(batch.as_ref().map(|batch| encode(batch.as_ref())))
            }
            Write::View { view, began } => self.meta("view", encode(&(view, began))),
            Write::Certified(certificate) => self.meta("certificate", encode(certificate.as_ref())),
            Write::State { checkpoint, leaves } => {
                self.leaves(leaves)?;
                self.meta("checkpoint", encode(checkpoint))
            }
            Write::Shares(operation) => {
                let number = self.next_operation;
                self.next_operation += 1;
                self.operations.push((number, operation.clone()));
                self.statement("INSERT INTO share_log (number, operation) VALUES (?, ?)");
                self.bind(number as i64)?;
                self.bind(keys.seal(&log_context(number), &encode_secret(operation)))
            }
            Write::Vault { key, value: Some(value) } => {
                let (attempt, key) = (attempt_of(key), encode(key));
                let context = vault_context(&key);
                self.statement("INSERT OR REPLACE INTO vault (key, value) VALUES (?, ?)");
                let sealed = match attempt {
                    Some(attempt) => keys.seal_for(attempt, &context, value.expose())?,
                    None => keys.seal(&context, value.expose()),
                };
                self.bind(key)?;
                self.bind(sealed)
            }
            Write::Vault { key, value: None } => {
                self.statement("DELETE FROM vault WHERE key = ?");
                self.bind(encode(key))
            }
            Write::Amnesia(Some(amnesia)) => self.meta("amnesia", encode(amnesia)),
            Write::VotingKey(number) => self.meta("voting-key", encode(number)),
            Write::Amnesia(None) => {
                self.statement("DELETE FROM meta WHERE name = 'amnesia'");
                Ok(())
            }
            Write::Reset => {
                self.statement("DELETE FROM slots");
                self.statement("DELETE FROM leaves");
                self.statement("DELETE FROM meta WHERE name IN ('checkpoint', 'certificate')");
                Ok(())
            }
            Write::Trim { through } => {
                self.statement("DELETE FROM slots WHERE sequence <= ?");
                self.bind(through.0 as i64)
            }
        }
    }

    fn meta(&mut self, name: &str, value: Vec<u8>) -> Result<(), BoxDynError> {
        self.statement(&format!("INSERT OR REPLACE INTO meta (name, value) VALUES ('{name}', ?)"));
        self.bind(value)
    }

    fn leaves(&mut self, leaves: &[quorum::state::Leaf]) -> Result<(), BoxDynError> {
        self.repeats = false;
        let (set, gone): (Vec<_>, Vec<_>) = leaves.iter().partition(|(_, value)| value.is_some());
        for chunk in set.chunks(ROWS_PER_STATEMENT) {
            let rows = vec!["(?, ?)"; chunk.len()].join(", ");
            self.statement(&format!("INSERT OR REPLACE INTO leaves (key, value) VALUES {rows}"));
            for (key, value) in chunk {
                self.bind(key.clone())?;
                self.bind(value.as_deref().unwrap_or_default().to_vec())?;
            }
        }
        for chunk in gone.chunks(ROWS_PER_STATEMENT) {
            let keys = vec!["?"; chunk.len()].join(", ");
            self.statement(&format!("DELETE FROM leaves WHERE key IN ({keys})"));
            chunk.iter().try_for_each(|(key, _)| self.bind(key.clone()))?;
        }
        Ok(())
    }
}
