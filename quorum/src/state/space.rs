//! Space: how much the state may take, and who makes it grow (`docs/decisions/0036-space-quotas.md`).
//!
//! All of the state is in every server's memory. So what a request leaves there for good is counted: an owner's against
//! her own quota and that of all, an administrator's against that of all alone. It is refused if it would go beyond,
//! unless it makes nothing grow, or revokes.
//!
//! An owner is known by the key that an administrator gave a name first. When she hands a name on to a key that owns
//! none, her next one or somebody else's, that key's requests count against the same quota: otherwise one name, passed
//! along keys, would be space without end. Readers have none, since anybody can name as many as he likes.
//!
//! What is counted is what something takes at most, from its beginning to its end, so that nothing that readers or time
//! do changes it: of a secret also its sealed shares, which go with the epoch, and as many releases as are ever kept.

use super::{Secret, State, layout};
use crate::bytes::{Blob, PublicKey};
use crate::codec::encode;
use crate::limits::{
    ENTRY_BYTES, LOW_SPACE_PERCENT, OWNER_QUOTA_BYTES, OWNERS_PERCENT, RELEASES_KEPT, TOTAL_QUOTA_BYTES,
};
use crate::record::{Invalid, Record};
use crate::request::{Done, Quota, Reader, Refusal};
use serde::{Deserialize, Serialize};

/// What the whole state takes and may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Space {
    /// What all requests have left in it, in bytes.
    pub used: u64,
    /// What they may.
    pub total: u64,
    /// What each owner's may, unless she has a quota of her own.
    pub each: u64,
}

impl Default for Space {
    fn default() -> Self {
        Self { used: 0, total: TOTAL_QUOTA_BYTES, each: OWNER_QUOTA_BYTES }
    }
}

/// That there is little space left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpaceAlarm {
    /// More than [`LOW_SPACE_PERCENT`] of it is used.
    LowSpace,
    /// What is left is for administrators: owners' requests that make the state grow are refused.
    NoSpace,
}

impl Space {
    fn percent(&self, percent: u64) -> u64 {
        (u128::from(self.total) * u128::from(percent) / 100) as u64
    }
    /// What owners can use of it; the rest is for administrators.
    pub fn for_owners(&self) -> u64 {
        self.percent(OWNERS_PERCENT)
    }
    /// Whether somebody should do something about it.
    pub fn alarm(&self) -> Option<SpaceAlarm> {
        match self.used {
            used if used >= self.for_owners() => Some(SpaceAlarm::NoSpace),
            used if used >= self.percent(LOW_SPACE_PERCENT) => Some(SpaceAlarm::LowSpace),
            _ => None,
        }
    }
}

/// A key that owns names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// How many.
    pub names: u32,
    /// Whose quota its requests count against: its own, or of who handed its first name on to it.
    pub account: PublicKey,
    /// Whether others can not make it the owner of secrets and names.
    pub refuses_gifts: bool,
}

/// What an owner's requests have left in the state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// In bytes.
    pub used: u64,
    /// How much they may, if not as everyone's.
    pub quota: Option<u64>,
}

/// Whose space something takes: an owner's account, or the administrators' if none.
pub(super) type Payer = Option<PublicKey>;

/// What a key that comes to own a name takes: that it is known, as an owner, and with an account.
pub(super) const OWNER_BYTES: u64 = 3 * (ENTRY_BYTES + 96);
/// What the record of a secret's releases takes at most: see the test.
const RELEASES_BYTES: u64 = RELEASES_KEPT as u64 * 146 + 64;

fn entry(key: &[u8], value_bytes: usize) -> u64 {
    ENTRY_BYTES + (key.len() + value_bytes) as u64
}

/// What a version of a name takes, as the current one or in its history.
pub(super) fn of_version(record: &Record) -> u64 {
    entry(&layout::history_key(&record.name, record.version), encode(record).len())
}

/// What a secret takes.
pub(super) fn of_secret(secret: &Secret, shares: &[Blob]) -> u64 {
    // Its own count is not there yet.
    let metadata = entry(&layout::secret_key(&secret.name), encode(secret).len() + 9);
    let index = secret.index;
    let ciphertext = entry(&layout::ciphertext_key(index), secret.ciphertext_bytes as usize + 5);
    let shares: usize = shares.iter().map(|share| share.len() + 2).sum();
    let sealed = entry(&layout::sealed_shares_key(index), secret.name.as_str().len() + shares + 16);
    let releases = entry(&layout::releases_key(index), 0) + RELEASES_BYTES;
    let readers = secret.readers.iter().filter(|reader| matches!(reader, Reader::Key(_))).count();
    let keys = readers + 1 + usize::from(secret.passphrase.is_some());
    let known = entry(&layout::known_key(&secret.owner), 5) * keys as u64;
    metadata + ciphertext + sealed + releases + known
}

impl State {
    /// Whose space a key's requests take.
    pub(super) fn payer(&self, client: &PublicKey) -> Result<Payer, Refusal> {
        if self.is_administrator(client) {
            return Ok(None);
        }
        layout::owner(&self.map, client).map(|owner| Some(owner.account)).ok_or(Refusal::OwnsNoName)
    }

    /// Whether something can take so much, in the place of what somebody else paid for perhaps. What makes nothing grow
    /// can, however little space there is.
    pub(super) fn may_take(
        &self,
        payer: Payer,
        needed: u64,
        instead: Option<(Payer, u64)>,
    ) -> Result<(), Refusal> {
        let space = layout::space(&self.map);
        let (by, freed) = instead.unwrap_or((payer, 0));
        if let Some(account) = payer.map(|payer| layout::account(&self.map, &payer)) {
            let (used, quota) = (account.used, account.quota.unwrap_or(space.each));
            if grows_beyond(used, needed, if by == payer { freed } else { 0 }, quota) {
                return Err(Refusal::OverQuota { used, quota, needed });
            }
        }
        let quota = if payer.is_none() { space.total } else { space.for_owners() };
        match grows_beyond(space.used, needed, freed, quota) {
            true => Err(Refusal::NoSpace { used: space.used, quota, needed }),
            false => Ok(()),
        }
    }

    pub(super) fn take_space(&mut self, payer: Payer, bytes: u64) {
        self.change_space(payer, |used| used.saturating_add(bytes));
    }

    pub(super) fn give_back_space(&mut self, payer: Payer, bytes: u64) {
        self.change_space(payer, |used| used.saturating_sub(bytes));
    }

    fn change_space(&mut self, payer: Payer, change: impl Fn(u64) -> u64) {
        let mut space = layout::space(&self.map);
        space.used = change(space.used);
        self.put(layout::SPACE.to_vec(), &space);
        if let Some(payer) = payer {
            let account = layout::account(&self.map, &payer);
            self.set_account(&payer, Account { used: change(account.used), ..account });
        }
    }

    fn set_account(&mut self, payer: &PublicKey, account: Account) {
        let at = layout::account_key(payer);
        if account == Account::default() { self.delete_key(at) } else { self.put(at, &account) }
    }

    /// A name goes from one owner to another. Where an administrator gives it, its owner has a quota of her own from then
    /// on; where an owner does, hers goes along.
    pub(super) fn hand_over(&mut self, by: &PublicKey, from: Option<PublicKey>, to: Option<PublicKey>) {
        if from == to {
            return;
        }
        let giver = layout::owner(&self.map, by).filter(|_| !self.is_administrator(by));
        if let Some(from) = from {
            self.count_key(&from, false);
            let at = layout::owner_key(&from);
            match layout::owner(&self.map, &from) {
                Some(owner) if owner.names > 1 => self.put(at, &Owner { names: owner.names - 1, ..owner }),
                _ => self.delete_key(at),
            }
        }
        if let Some(to) = to {
            self.count_key(&to, true);
            let (account, refuses_gifts) =
                giver.map_or((to, false), |giver| (giver.account, giver.refuses_gifts));
            let before = layout::owner(&self.map, &to).unwrap_or(Owner { names: 0, account, refuses_gifts });
            let account = if giver.is_some() { before.account } else { to };
            let owner = Owner { names: before.names.saturating_add(1), account, ..before };
            self.put(layout::owner_key(&to), &owner);
        }
    }

    /// Whether somebody can be made the owner of something by somebody else.
    pub(super) fn takes_gifts(&self, owner: &PublicKey) -> Result<(), Refusal> {
        match layout::owner(&self.map, owner) {
            Some(owner) if owner.refuses_gifts => Err(Refusal::GiftRefused),
            _ => Ok(()),
        }
    }

    pub(super) fn refuse_gifts(&mut self, client: PublicKey, refuse: bool) -> Result<Done, Refusal> {
        let owner = layout::owner(&self.map, &client).ok_or(Refusal::OwnsNoName)?;
        if owner.refuses_gifts == refuse {
            return Err(Refusal::AlreadySo);
        }
        self.put(layout::owner_key(&client), &Owner { refuses_gifts: refuse, ..owner });
        Ok(Done::Noted)
    }

    /// Whether a quota can be decided.
    pub(super) fn may_be_set(&self, quota: &Quota) -> Result<(), Refusal> {
        let space = layout::space(&self.map);
        let so_already = match quota {
            Quota::Total { bytes } => space.total == *bytes,
            Quota::Each { bytes } => space.each == *bytes,
            Quota::Owner { key, bytes } => {
                let owner = layout::owner(&self.map, key).ok_or(Refusal::Invalid(Invalid::Quota))?;
                layout::account(&self.map, &owner.account).quota == *bytes
            }
        };
        if so_already { Err(Refusal::AlreadySo) } else { Ok(()) }
    }

    pub(super) fn set_quota(&mut self, quota: &Quota) {
        let mut space = layout::space(&self.map);
        match *quota {
            Quota::Total { bytes } => space.total = bytes,
            Quota::Each { bytes } => space.each = bytes,
            Quota::Owner { key, bytes } => {
                if let Some(owner) = layout::owner(&self.map, &key) {
                    let account = layout::account(&self.map, &owner.account);
                    self.set_account(&owner.account, Account { quota: bytes, ..account });
                }
                return;
            }
        }
        self.put(layout::SPACE.to_vec(), &space);
    }
}

fn grows_beyond(used: u64, needed: u64, freed: u64, quota: u64) -> bool {
    let then = used.saturating_sub(freed).saturating_add(needed);
    then > used && then > quota
}

#[cfg(test)]
mod tests;
