//! The text of one transaction, from what the replica wants written.

use crate::at_rest::StorageKeys;
use quorum::codec::{encode, encode_secret, sha256};
use quorum::ids::{AttemptId, Sequence};
use quorum::ordering::{VaultKey, Write};
use quorum::shares::ShareOp;
use serde::Serialize;
use sqlx::error::BoxDynError;
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments as _, Encode, Sqlite, Type};

/// Entries written by one statement; SQLite allows 32,766 bound values.
const ROWS_PER_STATEMENT: usize = 500;

/// The text of a transaction and the values that it binds.
pub(super) struct Transaction {
    pub sql: String,
    pub arguments: SqliteArguments,
    /// Whether the same text is likely to come again, and worth keeping prepared.
    pub repeats: bool,
    pub operations: Vec<(u64, ShareOp)>,
    pub next_operation: u64,
}

/// The attempt that a piece of the vault belongs to, if it is to be gone with it.
pub(super) fn attempt_of(key: &VaultKey) -> Option<AttemptId> {
    match key {
        VaultKey::Dealing(attempt, _) => Some(*attempt),
        VaultKey::Opening(_) => None,
    }
}

pub(super) fn vault_context(key: &[u8]) -> Vec<u8> {
    encode(&("kds.vault-at-rest.1", key))
}
pub(super) fn log_context(number: u64) -> Vec<u8> {
    encode(&("kds.share-log-at-rest.1", number))
}

/// Bytes of a digest behind a value, by which damage is noticed that leaves the file a sound database.
const DIGEST: usize = 16;

fn digest(place: &impl Serialize, value: &[u8]) -> [u8; DIGEST] {
    let digest = sha256(&encode(&("kds.database-value.1", place, value)));
    std::array::from_fn(|i| digest.0[i])
}
/// A value as it stands in the database, at this place.
pub(super) fn marked(place: &impl Serialize, mut value: Vec<u8>) -> Vec<u8> {
    value.extend(digest(place, &value));
    value
}
/// What was marked; none if it is damaged, or was written for another place.
pub(super) fn unmarked(place: &impl Serialize, mut stored: Vec<u8>) -> Option<Vec<u8>> {
    let (value, known) = stored.split_last_chunk::<DIGEST>()?;
    (digest(place, value) == *known).then(|| {
        stored.truncate(stored.len() - DIGEST);
        stored
    })
}
/// Where a value of the log stands: what the value is, and at which sequence number. Batches may move to another column.
pub(super) fn in_slot(what: &'static str, sequence: Sequence) -> (&'static str, Sequence) {
    (what, sequence)
}

impl Transaction {
    pub fn begin(next_operation: u64) -> Self {
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

    pub fn add(&mut self, write: &Write, keys: &StorageKeys) -> Result<(), BoxDynError> {
        match write {
            Write::Accepted { pre_prepare, batch } => {
                self.statement(
                    "INSERT INTO slots (sequence, accepted, accepted_batch) VALUES (?, ?, ?) \
                     ON CONFLICT (sequence) DO UPDATE SET accepted = excluded.accepted, \
                     accepted_batch = excluded.accepted_batch, prepared_batch = \
                     CASE WHEN prepared IS NULL THEN NULL ELSE coalesce(slots.prepared_batch, slots.accepted_batch) END",
                );
                let sequence = pre_prepare.body.0.sequence;
                self.bind(sequence.0 as i64)?;
                self.bind(marked(&in_slot("accepted", sequence), encode(pre_prepare)))?;
                self.bind(marked(&in_slot("batch", sequence), encode(batch.as_ref())))
            }
            Write::Prepared { sequence, proof } => {
                self.statement(
                    "INSERT INTO slots (sequence, prepared) VALUES (?, ?) ON CONFLICT (sequence) \
                     DO UPDATE SET prepared = excluded.prepared, prepared_batch = NULL",
                );
                self.bind(sequence.0 as i64)?;
                self.bind(marked(&in_slot("prepared", *sequence), encode(proof)))
            }
            Write::Committed { batch, proof } => {
                self.statement(
                    "INSERT INTO slots (sequence, committed, committed_batch) VALUES (?, ?, ?) \
                     ON CONFLICT (sequence) DO UPDATE SET committed = excluded.committed, committed_batch = excluded.committed_batch",
                );
                let sequence = proof.statement.0.sequence;
                self.bind(sequence.0 as i64)?;
                self.bind(marked(&in_slot("committed", sequence), encode(proof)))?;
                let batch = batch.as_ref().map(|batch| encode(batch.as_ref()));
                self.bind(batch.map(|batch| marked(&in_slot("batch", sequence), batch)))
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

    pub fn meta(&mut self, name: &str, value: Vec<u8>) -> Result<(), BoxDynError> {
        self.statement(&format!("INSERT OR REPLACE INTO meta (name, value) VALUES ('{name}', ?)"));
        self.bind(marked(&name, value))
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
