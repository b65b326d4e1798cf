//! Secrets: deposit, release, delete (design §6).
//!
//! The state holds metadata, ciphertext and the record of releases. Shares are no part of it:
//! each server opens its own when a deposit executes.

use super::{Event, Lookup, State, layout, space};
use crate::bytes::{Blob, Element, Hash, PublicKey};
use crate::codec::{Tagged, digest, sha256, signing_bytes};
use crate::ids::{ClusterId, Epoch, Timestamp};
use crate::limits;
use crate::oprf;
use crate::record::{Change, Invalid, Name};
use crate::refresh::SCALARS_FROM;
use crate::request::{Deposit, Done, Passphrase, Reader, Refusal, RequestId};
use crate::signing::is_sound_key;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// What everyone knows of a secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Secret {
    /// Its name.
    pub name: Name,
    /// Names its shares: how many deposits came before it, from [`SCALARS_FROM`] if it is behind a passphrase.
    /// Never used again.
    pub index: u64,
    /// Who may replace and delete it, and be given it.
    pub owner: PublicKey,
    /// Who else may be given it; if it is behind a passphrase, who may try one: everyone if this is empty.
    pub readers: Vec<Reader>,
    /// What it is behind, if anything.
    pub passphrase: Option<Passphrase>,
    /// Whose request deposited it.
    pub depositor: RequestId,
    /// Digest of the ciphertext.
    pub ciphertext_hash: Hash,
    /// Bytes of the ciphertext.
    pub ciphertext_bytes: u64,
    /// Digest of the data key.
    pub commitment: Hash,
    /// When it was deposited.
    pub deposited: Change,
    /// Against whose quota it counts: its depositor's, as an owner; none if she was an administrator.
    pub account: Option<PublicKey>,
    /// For how many bytes.
    pub space: u64,
}

/// A deposit's sealed shares, which stay while the keys do that open them: so a server that was shown the
/// state instead of the deposit has its share too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealedShares {
    /// The secret's name.
    pub name: Name,
    /// The epoch whose sealing keys they are sealed to.
    pub epoch: Epoch,
    /// One for each server, in order.
    pub shares: Vec<Blob>,
}

/// A reader was given a secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// Number of the release.
    pub release: u64,
    /// To whom, by which request.
    pub to: RequestId,
    /// The key that shares are sealed to.
    pub ephemeral: PublicKey,
    /// The epoch in which shares may be handed out.
    pub epoch: Epoch,
    /// When.
    pub time: Timestamp,
    /// What servers evaluate instead of handing out shares, if this was a guess.
    pub blinded: Option<Element>,
}
impl Tagged for Release {
    const TAG: &'static str = "kds.release";
}

/// The last releases of a secret; older ones as a hash chain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Releases {
    /// How many there were before those listed.
    pub earlier: u64,
    /// H(H(… ‖ first) ‖ second)… of those.
    pub chain: Option<Hash>,
    /// The last ones, oldest first.
    pub last: Vec<Release>,
    /// Guesses since the last that was shown to be right.
    pub guessed: u32,
}

/// The commitment to a data key: its digest, bound to the cluster.
pub fn data_key_commitment(cluster: &ClusterId, data_key: &[u8; 32]) -> Hash {
    #[derive(Serialize)]
    struct DataKey<'a>(&'a [u8; 32]);
    impl Tagged for DataKey<'_> {
        const TAG: &'static str = "kds.data-key";
    }
    sha256(&Zeroizing::new(signing_bytes(cluster, &DataKey(data_key))))
}

/// Whether a key may be given a secret now: its owner, a listed key, or the owner of a listed name.
pub(super) fn may_read(state: &impl Lookup, secret: &Secret, client: &PublicKey) -> bool {
    secret.owner == *client
        || secret.readers.iter().any(|reader| match reader {
            Reader::Key(key) => key == client,
            Reader::Name(name) => layout::record(state, name).is_some_and(|record| {
                record.entry.owner == Some(*client) && record.status == crate::record::Status::Active
            }),
        })
}

fn is_sound_passphrase(passphrase: &Passphrase) -> bool {
    let hardness = passphrase.hardness;
    oprf::is_sound(&passphrase.key)
        && is_sound_key(&passphrase.opener)
        && (1..=limits::MAX_GUESSES).contains(&passphrase.guesses)
        && hardness.memory_kib <= limits::MAX_STRETCH_KIB
        && hardness.passes <= limits::MAX_STRETCH_PASSES
}

impl Secret {
    /// Whether a key may be given this secret in this state. Checked when a release is ordered,
    /// and again when a share is handed out.
    pub fn may_be_read_by(&self, state: &impl Lookup, client: &PublicKey) -> bool {
        may_read(state, self, client)
    }
}

impl State {
    pub(super) fn deposit(
        &mut self,
        client: PublicKey,
        client_sequence: u64,
        deposit: &Deposit,
        events: &mut Vec<Event>,
    ) -> Result<Done, Refusal> {
        self.check_deposit(deposit).map_err(Refusal::Invalid)?;
        if deposit.epoch != self.epoch() {
            return Err(Refusal::EpochPassed { current: self.epoch() });
        }
        // Every server whose key is on record is given a share. So a slot without one is either at a server
        // that was not there, which recovers it, or its depositor's fault, which nobody waits for.
        for (server, sealed) in self.manifest.grid().servers().zip(&deposit.shares) {
            let key = layout::server_keys(&self.map, server).map(|keys| keys.sealing.statement.epoch);
            if sealed.is_empty() && key == Some(self.epoch()) {
                return Err(Refusal::EpochPassed { current: self.epoch() });
            }
        }
        let existing = layout::secret(&self.map, &deposit.name);
        match (&existing, deposit.replaces) {
            (Some(existing), _) if existing.owner != client => return Err(Refusal::NotAllowed),
            (Some(existing), replaces) if replaces != Some(existing.index) => {
                return Err(Refusal::SecretTaken { index: existing.index });
            }
            (None, Some(_)) => return Err(Refusal::NoSuchSecret),
            _ => {}
        }
        if deposit.owner != client {
            self.takes_gifts(&deposit.owner)?;
        }
        // Numbered without gaps, so that pseudo-random bytes for many secrets come from one stretch of a
        // key stream (docs/decisions/0018-refresh.md), and never again.
        let (counter, first) = match deposit.passphrase {
            None => (layout::SECRETS_EVER, 0),
            Some(_) => (layout::PASSPHRASES_EVER, SCALARS_FROM),
        };
        let before: u64 = self.load(counter).unwrap_or(0);
        let index = first + before;
        let depositor = RequestId { client, sequence: client_sequence };
        let mut secret = Secret {
            name: deposit.name.clone(),
            index,
            owner: deposit.owner,
            readers: deposit.readers.clone(),
            passphrase: deposit.passphrase.clone(),
            depositor,
            ciphertext_hash: sha256(&deposit.ciphertext),
            ciphertext_bytes: deposit.ciphertext.len() as u64,
            commitment: deposit.commitment,
            deposited: Change { sequence: self.sequence, time: self.time },
            account: self.payer(&client)?,
            space: 0,
        };
        secret.space = space::of_secret(&secret, &deposit.shares);
        let freed = existing.as_ref().map(|existing| (existing.account, existing.space));
        self.may_take(secret.account, secret.space, freed)?;
        if let Some(existing) = existing {
            self.remove_secret(&existing, events);
        }
        self.take_space(secret.account, secret.space);
        self.put(counter.to_vec(), &(before + 1));
        self.count_keys_of(&secret, true);
        self.put(layout::secret_key(&secret.name), &secret);
        self.put(layout::ciphertext_key(index), &deposit.ciphertext);
        let (name, epoch, shares) = (deposit.name.clone(), deposit.epoch, deposit.shares.clone());
        self.put(layout::sealed_shares_key(index), &SealedShares { name, epoch, shares });
        events.push(Event::Deposited { index, id: depositor });
        Ok(Done::Deposited { index })
    }

    fn check_deposit(&self, deposit: &Deposit) -> Result<(), Invalid> {
        if !is_sound_key(&deposit.owner) {
            return Err(Invalid::Owner);
        }
        let sound = |reader: &Reader| match reader {
            Reader::Key(key) => is_sound_key(key),
            Reader::Name(_) => true,
        };
        if deposit.readers.len() > limits::MAX_READERS || !deposit.readers.iter().all(sound) {
            return Err(Invalid::Readers);
        }
        if deposit.ciphertext.len() > limits::MAX_CIPHERTEXT_BYTES {
            return Err(Invalid::Ciphertext);
        }
        if !deposit.passphrase.as_ref().is_none_or(is_sound_passphrase) {
            return Err(Invalid::Passphrase);
        }
        let sizes_fit = deposit.shares.iter().all(|share| share.len() <= limits::MAX_SEALED_SHARE_BYTES);
        if deposit.shares.len() != self.manifest.thresholds.n() || !sizes_fit {
            return Err(Invalid::Shares);
        }
        Ok(())
    }

    pub(super) fn release(
        &mut self,
        client: PublicKey,
        release: u64,
        client_sequence: u64,
        name: &Name,
        ephemeral: PublicKey,
    ) -> Result<Done, Refusal> {
        let secret = layout::secret(&self.map, name).ok_or(Refusal::NoSuchSecret)?;
        if !may_read(&self.map, &secret, &client) {
            return Err(Refusal::NotAllowed);
        }
        if secret.passphrase.is_some() {
            return Err(Refusal::OnlyByPassphrase);
        }
        let to = RequestId { client, sequence: client_sequence };
        self.record_release(secret.index, to, release, ephemeral, None)?;
        Ok(Done::Released { index: secret.index, release, epoch: self.epoch() })
    }

    /// Puts a release, or a guess, on the record.
    pub(super) fn record_release(
        &mut self,
        index: u64,
        to: RequestId,
        release: u64,
        ephemeral: PublicKey,
        blinded: Option<Element>,
    ) -> Result<(), Refusal> {
        let mut releases = layout::releases(&self.map, index).unwrap_or_default();
        let recent =
            |release: &&Release| release.to.client == to.client && self.time.since_ms(release.time) < 60_000;
        if releases.last.iter().filter(recent).count() >= limits::RELEASES_PER_MINUTE {
            return Err(Refusal::TooOften);
        }
        if releases.last.len() == limits::RELEASES_KEPT {
            let oldest = releases.last.remove(0);
            let before = releases.chain.map_or([0; 32], |chain| chain.0);
            releases.chain = Some(sha256(&[before, digest(&self.cluster, &oldest).0].concat()));
            releases.earlier += 1;
        }
        releases.last.push(Release { release, to, ephemeral, epoch: self.epoch(), time: self.time, blinded });
        releases.guessed += u32::from(blinded.is_some());
        self.put(layout::releases_key(index), &releases);
        Ok(())
    }

    pub(super) fn delete(
        &mut self,
        client: PublicKey,
        name: &Name,
        events: &mut Vec<Event>,
    ) -> Result<Done, Refusal> {
        let secret = layout::secret(&self.map, name).ok_or(Refusal::NoSuchSecret)?;
        if secret.owner != client {
            return Err(Refusal::NotAllowed);
        }
        self.remove_secret(&secret, events);
        Ok(Done::Deleted)
    }

    fn remove_secret(&mut self, secret: &Secret, events: &mut Vec<Event>) {
        self.give_back_space(secret.account, secret.space);
        self.count_keys_of(secret, false);
        self.delete_key(layout::secret_key(&secret.name));
        self.delete_key(layout::ciphertext_key(secret.index));
        self.delete_key(layout::releases_key(secret.index));
        self.delete_key(layout::sealed_shares_key(secret.index));
        events.push(Event::Erased { index: secret.index });
    }

    fn count_keys_of(&mut self, secret: &Secret, more: bool) {
        self.count_key(&secret.owner, more);
        if let Some(passphrase) = &secret.passphrase {
            self.count_key(&passphrase.opener, more);
        }
        for reader in &secret.readers {
            if let Reader::Key(key) = reader {
                self.count_key(key, more);
            }
        }
    }
}
