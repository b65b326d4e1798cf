//! Names: register, rotate, revoke (design §4).

use super::{State, layout, space};
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
        self.store(client, name, None, Status::Active, entry.clone())
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
        self.store(client, name, Some(record), Status::Active, entry.clone())
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
        let status = Status::Revoked { reason: reason.to_owned(), by: client };
        let entry = record.entry.clone();
        self.store(client, name, Some(record), status, entry)
    }

    /// Makes the next version of a name, and moves the one before into its history.
    fn store(
        &mut self,
        client: PublicKey,
        name: &Name,
        before: Option<Record>,
        status: Status,
        entry: Entry,
    ) -> Result<Done, Refusal> {
        let updated = Change { sequence: self.sequence, time: self.time };
        let version = before.as_ref().map_or(1, |record| record.version + 1);
        let record = Record { name: name.clone(), version, status, entry, updated };
        let from = before.as_ref().and_then(|record| record.entry.owner);
        let new_owner = record.entry.owner.filter(|owner| from != Some(*owner));
        let needed = space::of_version(&record) + new_owner.map_or(0, |_| space::OWNER_BYTES);
        let payer = match record.status {
            // A key that leaked can be revoked however little space there is: once a version, so that is bounded.
            Status::Revoked { .. } => self.payer(&client).unwrap_or_default(),
            Status::Active => {
                let payer = self.payer(&client)?;
                if let Some(owner) = new_owner.filter(|owner| payer.is_some() && *owner != client) {
                    self.takes_gifts(&owner)?;
                }
                self.may_take(payer, needed, None)?;
                payer
            }
        };
        self.take_space(payer, needed);
        self.hand_over(&client, from, record.entry.owner);
        if let Some(before) = before {
            self.put(layout::history_key(name, before.version), &before);
        }
        self.put(layout::name_key(name), &record);
        Ok(Done::Record { version })
    }
}
