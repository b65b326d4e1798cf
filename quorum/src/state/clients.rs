//! Exactly once: the client table (PBFT §4.1, design §3).
//!
//! An executed request leaves its reply in the map until its expiry has passed; after that it can
//! no longer execute, so nothing is forgotten too early. It stays a little longer, so that whoever asks then
//! learns from its absence that the request never executed. The entries are part of the root: a receipt is a
//! proof of the stored reply.

use super::{Lookup as _, State, layout};
use crate::bytes::PublicKey;
use crate::ids::Timestamp;
use crate::limits::{MAX_CLIENT_ENTRIES, MAX_REPLIES, REPLY_KEPT_MS};
use crate::request::{Outcome, Reply, RequestId, VerifiedRequest};
use std::collections::{BTreeMap, BTreeSet};

/// What can be rebuilt from the table's entries: expiries in order and entries per client.
#[derive(Clone, Default)]
pub(super) struct ClientIndex {
    expiries: BTreeSet<(Timestamp, RequestId)>,
    entries: BTreeMap<PublicKey, usize>,
}

impl ClientIndex {
    pub(super) fn add(&mut self, id: RequestId, expiry: Timestamp) {
        if self.expiries.insert((expiry, id)) {
            *self.entries.entry(id.client).or_default() += 1;
        }
    }
    pub(super) fn has_room(&self, client: &PublicKey) -> bool {
        self.expiries.len() < MAX_REPLIES
            && self.entries.get(client).is_none_or(|entries| *entries < MAX_CLIENT_ENTRIES)
    }
    fn pop_expired(&mut self, now: Timestamp) -> Option<RequestId> {
        let (expiry, id) = *self.expiries.first()?;
        if expiry.plus_ms(REPLY_KEPT_MS) >= now {
            return None;
        }
        self.expiries.pop_first();
        if let Some(entries) = self.entries.get_mut(&id.client) {
            *entries -= 1;
            if *entries == 0 {
                self.entries.remove(&id.client);
            }
        }
        Some(id)
    }
}

impl State {
    /// The stored reply of a request.
    pub fn reply(&self, id: RequestId) -> Option<Reply> {
        // Most requests are new: look for the key before decoding.
        self.map.value(&layout::reply_key(id)).and_then(|_| layout::reply(&self.map, id))
    }
    pub(super) fn store_reply(&mut self, request: &VerifiedRequest, outcome: Outcome) {
        let expiry = request.request().expiry;
        let reply = Reply { request: request.digest(), sequence: self.sequence, expiry, outcome };
        self.clients.add(request.id(), expiry);
        self.put(layout::reply_key(request.id()), &reply);
    }
    pub(super) fn expire_replies(&mut self) {
        while let Some(id) = self.clients.pop_expired(self.time) {
            self.delete_key(layout::reply_key(id));
        }
    }
}
