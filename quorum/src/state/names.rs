//! Names: register, rotate, revoke (design §4).

use super::{State, layout};
use crate::bytes::PublicKey;
use crate::record::{Change, Entry, Invalid, Name, Record, Status};
use crate::request::{Done, Refusal};

impl State {
    pub(super) fn register(
        &mut self,
        client: PublicKey,
        name: &Name,
        entry: &Entry,
    ) -> Result<Done, Refusal> {
        if !self.is_administrator(&client) {
            return Err(Refusal::NotAllowed);
        }
        entry.validate().map_err(Refusal::Invalid)?;
        if let Some(record) = layout::record(&self.map, name) {
            return Err(Refusal::NameTaken { version: record.version });
        }
        self.store(name, 1, Status::Active, entry.clone())
    }

    pub(super) fn rotate(
        &mut self,
        client: PublicKey,
        name: &Name,
        from_version: u64,
        entry: &Entry,
    ) -> Result<Done, Refusal> {
        let record = layout::record(&self.map, name).ok_or(Refusal::NoSuchName)?;
        let owner = record.entry.owner == Some(client);
        let administrator = self.is_administrator(&client) && !record.entry.owner_only;
        // After a revocation the owner's key may be the one that leaked: only an administrator
        // starts again, and nobody does for a record that is its owner's alone.
        let allowed = match record.status {
            Status::Active => owner || administrator,
            Status::Revoked { .. } => administrator,
        };
        if !allowed {
            let revoked = record.status != Status::Active && owner;
            return Err(if revoked { Refusal::Revoked } else { Refusal::NotAllowed });
        }
        if record.version != from_version {
            return Err(Refusal::VersionConflict { current: record.version });
        }
        entry.validate().map_err(Refusal::Invalid)?;
        self.archive(&record);
        self.store(name, record.version + 1, Status::Active, entry.clone())
    }

    pub(super) fn revoke(
        &mut self,
        client: PublicKey,
        name: &Name,
        from_version: u64,
        reason: &str,
    ) -> Result<Done, Refusal> {
        let record = layout::record(&self.map, name).ok_or(Refusal::NoSuchName)?;
        if record.entry.owner != Some(client) && !self.is_administrator(&client) {
            return Err(Refusal::NotAllowed);
        }
        if record.status != Status::Active {
            return Err(Refusal::Revoked);
        }
        if record.version != from_version {
            return Err(Refusal::VersionConflict { current: record.version });
        }
        if reason.len() > crate::limits::MAX_REASON_BYTES {
            return Err(Refusal::Invalid(Invalid::Reason));
        }
        self.archive(&record);
        let status = Status::Revoked { reason: reason.to_owned(), by: client };
        self.store(name, record.version + 1, status, record.entry)
    }

    /// Moves a version into the name's history.
    fn archive(&mut self, record: &Record) {
        if let Some(owner) = record.entry.owner {
            self.count_key(&owner, false);
        }
        self.put(layout::history_key(&record.name, record.version), record);
    }

    fn store(&mut self, name: &Name, version: u64, status: Status, entry: Entry) -> Result<Done, Refusal> {
        if let Some(owner) = entry.owner {
            self.count_key(&owner, true);
        }
        let updated = Change { sequence: self.sequence, time: self.time };
        let record = Record { name: name.clone(), version, status, entry, updated };
        self.put(layout::name_key(name), &record);
        Ok(Done::Record { version })
    }
}
