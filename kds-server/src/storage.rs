//! The server's database: one SQLite file, written by one task.
//!
//! `synchronous=FULL` with a write-ahead log makes one fsync a commit; the committer puts whatever
//! is in flight into one transaction (group commit). `secure_delete` overwrites what is deleted.

use anyhow::{Context as _, bail};
use quorum::codec::{decode, encode};
use quorum::ids::{ClusterId, Sequence, ServerId};
use quorum::ordering::{Stored, StoredSlot, StoredState, StoredView, Write};
use sqlx::error::BoxDynError;
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::sqlite::{
    SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqlitePool,
    SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Arguments as _, AssertSqlSafe, Connection as _, Encode, Row as _, SqlStr, Sqlite, Type};
use std::path::Path;
use std::time::Duration;

use crate::share_box::ShareBox;

/// The schema, step by step. Steps are never changed, only added.
/// (`sqlx::migrate!` would do the same, and build SQLite a second time for the macro.)
const MIGRATIONS: &[(i64, &str, &str)] =
    &[(1, "server", include_str!("../../migrations/sqlite/0001_server.sql"))];

fn migrator() -> Migrator {
    let migration = |(version, name, sql): &(i64, &'static str, &'static str)| {
        Migration::new(*version, (*name).into(), MigrationType::Simple, SqlStr::from_static(sql), false)
    };
    Migrator::with_migrations(MIGRATIONS.iter().map(migration).collect())
}

/// Entries written by one statement; SQLite allows 32,766 bound values.
const ROWS_PER_STATEMENT: usize = 500;

/// The connection that writes, and a pool for reading shares.
pub struct Storage {
    writer: SqliteConnection,
    readers: SqlitePool,
    shares: ShareBox,
}

/// How many shares a server has.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShareCounts {
    /// Secrets for which there is a slot.
    pub secrets: u64,
    /// Slots that hold a share.
    pub shares: u64,
}

/// Reads shares, sealed at rest; cheap to clone.
#[derive(Clone)]
pub struct ShareReader {
    readers: SqlitePool,
    shares: ShareBox,
}

impl ShareReader {
    /// This server's share of a secret, and its epoch.
    pub async fn share(&self, index: u64) -> anyhow::Result<Option<(u64, zeroize::Zeroizing<[u8; 32]>)>> {
        let row = sqlx::query("SELECT epoch, share FROM shares WHERE secret = ? AND share IS NOT NULL")
            .bind(index as i64)
            .fetch_optional(&self.readers)
            .await?;
        let Some(row) = row else { return Ok(None) };
        let (epoch, sealed): (i64, Vec<u8>) = (row.try_get(0)?, row.try_get(1)?);
        let share = self.shares.open(index, epoch as u64, &sealed).context("a stored share does not open")?;
        Ok(Some((epoch as u64, share)))
    }
    /// How many there are.
    pub async fn counts(&self) -> anyhow::Result<ShareCounts> {
        let row = sqlx::query("SELECT count(*), count(share) FROM shares").fetch_one(&self.readers).await?;
        let (secrets, shares): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        Ok(ShareCounts { secrets: secrets as u64, shares: shares as u64 })
    }
}

impl Storage {
    /// Opens or creates the database, brings its schema up to date, and makes sure that it is this
    /// server's.
    pub async fn open(
        path: &Path,
        cluster: &ClusterId,
        id: ServerId,
        shares: ShareBox,
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
            let readers = SqlitePoolOptions::new().max_connections(4).connect_lazy_with(options.clone());
            anyhow::Ok((writer, readers))
        };
        let (writer, readers) =
            opened.await.with_context(|| format!("cannot open the database {}", path.display()))?;
        let mut storage = Self { writer, readers, shares };
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
        stored.amnesia = self.meta("amnesia").await?.is_some();
        if let Some(checkpoint) = read(self.meta("checkpoint").await?, damaged) {
            let rows = sqlx::query("SELECT key, value FROM leaves").fetch_all(&mut self.writer).await?;
            let leaves = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            let leaves = leaves.collect::<Result<_, sqlx::Error>>()?;
            stored.state = Some(StoredState { checkpoint, leaves });
        }
        stored.certificate = read(self.meta("certificate").await?, damaged);
        if let Some((view, new_view)) = read(self.meta("view").await?, damaged) {
            stored.view = Some(StoredView { view, new_view });
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
        Ok(stored)
    }

    /// For handing out shares.
    pub fn share_reader(&self) -> ShareReader {
        ShareReader { readers: self.readers.clone(), shares: self.shares.clone() }
    }

    /// Makes writes durable, all or none.
    ///
    /// One transaction is one text, sent to the database's thread in one piece: a round trip there
    /// for each statement would cost more than the statements.
    pub async fn commit(&mut self, writes: &[&Write]) -> Result<(), sqlx::Error> {
        if writes.is_empty() {
            return Ok(());
        }
        let mut transaction = Transaction::begin();
        writes
            .iter()
            .try_for_each(|write| transaction.add(write, &self.shares))
            .map_err(sqlx::Error::Encode)?;
        let Transaction { mut sql, arguments, repeats, .. } = transaction;
        sql.push_str("COMMIT");
        let query = sqlx::query_with(AssertSqlSafe(sql), arguments).persistent(repeats);
        let done = query.execute(&mut self.writer).await;
        if done.is_err() {
            // Nothing of it stays; where the transaction is over already this has nothing to do.
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut self.writer).await;
        }
        done.map(drop)
    }

    /// Closes the file cleanly.
    pub async fn close(self) {
        self.readers.close().await;
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
}

impl Transaction {
    fn begin() -> Self {
        Self { sql: "BEGIN IMMEDIATE; ".into(), arguments: SqliteArguments::default(), repeats: true }
    }

    /// One statement; its values are bound in the order of its question marks.
    fn statement(&mut self, sql: &str) {
        self.sql.push_str(sql);
        self.sql.push_str("; ");
    }
    fn bind<T: for<'q> Encode<'q, Sqlite> + Type<Sqlite>>(&mut self, value: T) -> Result<(), BoxDynError> {
        self.arguments.add(value)
    }

    fn add(&mut self, write: &Write, shares: &ShareBox) -> Result<(), BoxDynError> {
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
            Write::View { view, new_view } => self.meta("view", encode(&(view, new_view))),
            Write::Certified(certificate) => self.meta("certificate", encode(certificate.as_ref())),
            Write::State { checkpoint, leaves } => {
                self.leaves(leaves)?;
                self.meta("checkpoint", encode(checkpoint))
            }
            Write::Share { index, epoch, share } => {
                self.statement("INSERT OR REPLACE INTO shares (secret, epoch, share) VALUES (?, ?, ?)");
                self.bind(*index as i64)?;
                self.bind(epoch.0 as i64)?;
                self.bind(share.as_ref().map(|share| shares.seal(*index, epoch.0, &share.0)))
            }
            Write::EraseShare { index } => {
                self.statement("DELETE FROM shares WHERE secret = ?");
                self.bind(*index as i64)
            }
            Write::Secrets { indices, epoch } => {
                // By way of a temporary table: there may be more of them than one statement can bind.
                self.repeats = false;
                self.statement("CREATE TEMP TABLE IF NOT EXISTS present (secret INTEGER PRIMARY KEY)");
                self.statement("DELETE FROM present");
                for chunk in indices.chunks(ROWS_PER_STATEMENT) {
                    let rows = vec!["(?)"; chunk.len()].join(", ");
                    self.statement(&format!("INSERT INTO present (secret) VALUES {rows}"));
                    chunk.iter().try_for_each(|index| self.bind(*index as i64))?;
                }
                self.statement("DELETE FROM shares WHERE secret NOT IN (SELECT secret FROM present)");
                self.statement(
                    "INSERT OR IGNORE INTO shares (secret, epoch, share) SELECT secret, ?, NULL FROM present",
                );
                self.bind(epoch.0 as i64)
            }
            Write::Amnesia(true) => self.meta("amnesia", vec![]),
            Write::Amnesia(false) => {
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
