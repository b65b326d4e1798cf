//! Where things stand in the authenticated map.
//!
//! | key | value | |
//! |---|---|---|
//! | `n/` name | [`Record`] | the current version |
//! | `h/` name `00` version (8 bytes, big-endian) | [`Record`] | every earlier version |
//! | `a/` key | `()` | an administrator |
//! | `d/` digest | [`Pending`](super::Pending) | what some administrators ask for, and not yet enough of them |
//! | `k/` key | `u32` | reasons why a key may ask for things: records and secrets it owns or reads |
//! | `q` | [`Space`] | how much all of it takes, and may take |
//! | `o/` key | [`Owner`] | a key that owns names: how many, and whose quota its requests count against |
//! | `u/` key | [`Account`] | what an owner's requests have left here |
//! | `s/` server | [`ServerKeys`] | what a server announced |
//! | `c/` client number | [`Reply`] | the client table |
//! | `x/` name | [`Secret`] | a secret's metadata |
//! | `y/` index | bytes | its ciphertext |
//! | `z/` index | [`Releases`] | who was given it |
//! | `w/` index | [`SealedShares`] | the sealed shares of a secret that was deposited in this epoch |
//! | `e` | [`Epochs`] | the current epoch, and the attempt at the next one |
//! | `j` | `u64` | how many secrets were ever deposited |
//! | `i` | `u64` | how many secrets behind a passphrase were ever deposited |

use super::{Account, Epochs, Owner, Releases, SealedShares, Secret, ServerKeys, Space};
use crate::bytes::{Blob, Hash, PublicKey};
use crate::codec::{decode, decode_start};
use crate::ids::{AttemptId, Epoch, Sequence, ServerId, Timestamp};
use crate::map::{Map, Snapshot};
use crate::record::{Name, Record};
use crate::request::{Reply, RequestId};
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// Something to look entries up in: the map in execution, a snapshot elsewhere.
pub trait Lookup {
    /// The value of a key.
    fn value(&self, key: &[u8]) -> Option<&Arc<[u8]>>;
}
impl Lookup for Map {
    fn value(&self, key: &[u8]) -> Option<&Arc<[u8]>> {
        self.get(key)
    }
}
impl Lookup for Snapshot {
    fn value(&self, key: &[u8]) -> Option<&Arc<[u8]>> {
        self.get(key)
    }
}

fn joined(prefix: &[u8], rest: &[u8]) -> Vec<u8> {
    [prefix, rest].concat()
}
fn read<T: DeserializeOwned>(state: &impl Lookup, key: &[u8]) -> Option<T> {
    state.value(key).and_then(|value| decode(value).ok())
}

/// Prefix of current records.
pub const NAMES: &[u8] = b"n/";
/// Prefix of the client table.
pub const REPLIES: &[u8] = b"c/";
/// Prefix of what servers announced.
pub const SERVERS: &[u8] = b"s/";
/// Prefix of secrets' metadata.
pub const SECRETS: &[u8] = b"x/";

/// Key of where the cluster stands in its epochs.
pub const EPOCHS: &[u8] = b"e";
/// Key of the number of secrets ever deposited.
pub const SECRETS_EVER: &[u8] = b"j";
/// Key of the number of secrets behind a passphrase ever deposited.
pub const PASSPHRASES_EVER: &[u8] = b"i";

/// Where the cluster stands in its epochs.
pub fn epochs(state: &impl Lookup) -> Option<Epochs> {
    read(state, EPOCHS)
}
/// The attempt at the next epoch that is under way, as [`epochs`] has it: asked after every step of a server, and an
/// attempt is large.
pub fn attempt_under_way(state: &impl Lookup) -> Option<AttemptId> {
    let (_, _, _, attempt): (Epoch, Timestamp, Sequence, Option<AttemptId>) =
        decode_start(state.value(EPOCHS)?)?;
    attempt
}
/// Key of a name's current record.
pub fn name_key(name: &Name) -> Vec<u8> {
    joined(NAMES, name.as_str().as_bytes())
}
/// Prefix of a name's earlier versions.
pub fn history_prefix(name: &Name) -> Vec<u8> {
    [b"h/", name.as_str().as_bytes(), b"\0"].concat()
}
/// Key of one earlier version.
pub fn history_key(name: &Name, version: u64) -> Vec<u8> {
    joined(&history_prefix(name), &version.to_be_bytes())
}
/// Prefix of administrators.
pub const ADMINISTRATORS: &[u8] = b"a/";
/// Prefix of decisions that are not made yet.
pub const DECISIONS: &[u8] = b"d/";
/// Prefix of changes of the membership.
pub const CHANGES: &[u8] = b"m/";
/// Key of a change.
pub fn change_key(number: u32) -> Vec<u8> {
    joined(CHANGES, &number.to_be_bytes())
}
/// Prefix of what shows changes.
pub const CHANGE_PROOFS: &[u8] = b"p/";
/// Key of what shows a change.
pub fn change_proof_key(number: u32) -> Vec<u8> {
    joined(CHANGE_PROOFS, &number.to_be_bytes())
}
/// Key of an administrator.
pub fn administrator(key: &PublicKey) -> Vec<u8> {
    joined(ADMINISTRATORS, &key.0)
}
/// The administrator that a key stands for.
pub fn parse_administrator(key: &[u8]) -> Option<PublicKey> {
    key.strip_prefix(ADMINISTRATORS)?.try_into().ok().map(PublicKey)
}
/// Whether a key is an administrator's.
pub fn is_administrator(state: &impl Lookup, key: &PublicKey) -> bool {
    state.value(&administrator(key)).is_some()
}
/// Key of a decision that is not made yet.
pub fn decision_key(decision: &Hash) -> Vec<u8> {
    joined(DECISIONS, &decision.0)
}
/// Key of the count of reasons why a key may ask for things.
pub fn known_key(key: &PublicKey) -> Vec<u8> {
    joined(b"k/", &key.0)
}
/// Key of what the whole state takes and may take.
pub const SPACE: &[u8] = b"q";
/// Key of what is known of a key that owns names.
pub fn owner_key(owner: &PublicKey) -> Vec<u8> {
    joined(b"o/", &owner.0)
}
/// Key of what an owner's requests have left in the state.
pub fn account_key(account: &PublicKey) -> Vec<u8> {
    joined(b"u/", &account.0)
}
/// Key of what a server announced.
pub fn server_key(server: ServerId) -> Vec<u8> {
    joined(SERVERS, &[server.0])
}
/// Key of a reply in the client table.
pub fn reply_key(id: RequestId) -> Vec<u8> {
    [REPLIES, &id.client.0[..], &id.sequence.to_be_bytes()].concat()
}
/// The request that a key of the client table belongs to.
pub fn parse_reply(key: &[u8]) -> Option<RequestId> {
    let rest = key.strip_prefix(REPLIES)?;
    let (client, sequence) = rest.split_first_chunk::<32>()?;
    Some(RequestId { client: PublicKey(*client), sequence: u64::from_be_bytes(sequence.try_into().ok()?) })
}
/// Key of a secret's metadata.
pub fn secret_key(name: &Name) -> Vec<u8> {
    joined(SECRETS, name.as_str().as_bytes())
}
/// Key of a secret's ciphertext.
pub fn ciphertext_key(index: u64) -> Vec<u8> {
    joined(b"y/", &index.to_be_bytes())
}
/// Key of a secret's releases.
pub fn releases_key(index: u64) -> Vec<u8> {
    joined(b"z/", &index.to_be_bytes())
}
/// Prefix of the sealed shares of this epoch's deposits.
pub const SEALED_SHARES: &[u8] = b"w/";
/// Key of a secret's sealed shares.
pub fn sealed_shares_key(index: u64) -> Vec<u8> {
    joined(SEALED_SHARES, &index.to_be_bytes())
}
/// The sealed shares of this epoch's deposits, with the index and the metadata of each secret.
pub fn sealed_shares(state: &Snapshot) -> impl Iterator<Item = (u64, Secret, SealedShares)> + '_ {
    state.iter_prefix(SEALED_SHARES).filter_map(|(key, value)| {
        let index = u64::from_be_bytes(key.strip_prefix(SEALED_SHARES)?.try_into().ok()?);
        let sealed: SealedShares = decode(value).ok()?;
        Some((index, secret(state, &sealed.name)?, sealed))
    })
}
/// Indices of all secrets.
pub fn secret_indices(state: &Snapshot) -> impl Iterator<Item = u64> + '_ {
    let index = |key: &[u8]| Some(u64::from_be_bytes(key.strip_prefix(b"y/")?.try_into().ok()?));
    state.iter_prefix(b"y/").filter_map(move |(key, _)| index(key))
}
/// The end of the range of keys that begin with `prefix`: the first key after all of them.
pub fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    vec![0xff; crate::limits::MAX_MAP_KEY_BYTES]
}

/// A name's current record.
pub fn record(state: &impl Lookup, name: &Name) -> Option<Record> {
    read(state, &name_key(name))
}
/// What the whole state takes and may take.
pub fn space(state: &impl Lookup) -> Space {
    read(state, SPACE).unwrap_or_default()
}
/// What is known of a key that owns names.
pub fn owner(state: &impl Lookup, key: &PublicKey) -> Option<Owner> {
    read(state, &owner_key(key))
}
/// What an owner's requests have left in the state.
pub fn account(state: &impl Lookup, account: &PublicKey) -> Account {
    read(state, &account_key(account)).unwrap_or_default()
}
/// What a server announced.
pub fn server_keys(state: &impl Lookup, server: ServerId) -> Option<ServerKeys> {
    read(state, &server_key(server))
}
/// The reply to a request.
pub fn reply(state: &impl Lookup, id: RequestId) -> Option<Reply> {
    read(state, &reply_key(id))
}
/// A secret's metadata.
pub fn secret(state: &impl Lookup, name: &Name) -> Option<Secret> {
    read(state, &secret_key(name))
}
/// A secret's ciphertext.
pub fn ciphertext(state: &impl Lookup, index: u64) -> Option<Blob> {
    read(state, &ciphertext_key(index))
}
/// Who was given a secret.
pub fn releases(state: &impl Lookup, index: u64) -> Option<Releases> {
    read(state, &releases_key(index))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_reaches_into_another_names_history() {
        let a = Name::new("a").unwrap();
        let ab = Name::new("a/b").unwrap();
        assert!(!history_key(&ab, 1).starts_with(&history_prefix(&a)));
        assert!(prefix_end(&history_prefix(&a)) > history_key(&a, u64::MAX));
        assert!(prefix_end(NAMES) > name_key(&Name::new("zzz").unwrap()));
        assert_eq!(prefix_end(&[1, 0xff]), vec![2]);
    }

    #[test]
    fn reply_keys_parse_back() {
        let id = RequestId { client: PublicKey([5; 32]), sequence: 77 };
        assert_eq!(parse_reply(&reply_key(id)), Some(id));
        assert_eq!(parse_reply(b"c/short"), None);
    }
}
