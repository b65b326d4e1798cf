//! Requests that wait to be ordered: FIFO for each client, clients in turn, bounded for both, so
//! that neither a flood nor a primary's preference starves anyone (design §3).
//!
//! A lying server passes on what accomplices have signed, as many as it likes. So each server that requests come
//! from, and this one for its own clients, always has its share of the room, whatever the others have filled: with
//! all shares the pool holds at most twice what it is bounded to.

use crate::bytes::PublicKey;
use crate::ids::{ServerId, Timestamp};
use crate::limits::{
    MAX_BATCH_REQUESTS, MAX_PENDING, MAX_PENDING_BYTES, MAX_PENDING_BYTES_PER_CLIENT, MAX_PENDING_PER_CLIENT,
    MAX_REQUEST_BYTES,
};
use crate::request::{RequestId, VerifiedRequest};
use std::collections::{BTreeMap, VecDeque};

/// A waiting request.
#[derive(Clone)]
pub(super) struct Waiting {
    pub(super) request: VerifiedRequest,
    pub(super) received: Timestamp,
    /// Whether one of this server's own clients asked for it.
    pub(super) own: bool,
    /// When it was last sent to others.
    pub(super) sent: Option<Timestamp>,
    /// When this server first told the primary of the current view.
    pub(super) told: Option<Timestamp>,
    /// When a batch of the current view first passed it over.
    pub(super) passed_over: Option<Timestamp>,
    /// It is in the batch that is being executed.
    pub(super) taken: bool,
    /// Place in its client's queue; none once the primary has proposed it.
    queued: Option<u64>,
    bytes: usize,
    /// The server that it came from first.
    from: ServerId,
}

/// Why a request is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Too many of this client's wait.
    #[error(
        "{MAX_PENDING_PER_CLIENT} requests of this key, or {MAX_PENDING_BYTES_PER_CLIENT} bytes of them, are waiting already"
    )]
    ClientFull,
    /// Too many wait.
    #[error("{MAX_PENDING} requests, or {MAX_PENDING_BYTES} bytes of them, are waiting already")]
    Full,
    /// Another request has the same client and number.
    #[error("another request with this number is waiting")]
    NumberInUse,
}

#[derive(Clone, Default)]
pub(super) struct RequestPool {
    /// How many servers share the room.
    servers: usize,
    waiting: BTreeMap<RequestId, Waiting>,
    queues: BTreeMap<PublicKey, BTreeMap<u64, RequestId>>,
    /// How many, and how many bytes.
    per_client: BTreeMap<PublicKey, (usize, usize)>,
    per_server: BTreeMap<ServerId, (usize, usize)>,
    bytes: usize,
    turn: VecDeque<PublicKey>,
    arrivals: u64,
}

fn bytes_of(request: &VerifiedRequest) -> usize {
    crate::codec::encode(request.signed()).len()
}

/// One request less, of so many bytes.
fn less<K: Ord>(counts: &mut BTreeMap<K, (usize, usize)>, key: K, bytes: usize) {
    if let Some(count) = counts.get_mut(&key) {
        *count = (count.0 - 1, count.1 - bytes);
        if count.0 == 0 {
            counts.remove(&key);
        }
    }
}

impl RequestPool {
    /// For so many servers.
    pub(super) fn new(servers: usize) -> Self {
        Self { servers, ..Self::default() }
    }
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }
    /// What decides its future, for model checkers.
    pub(super) fn fingerprint(&self) -> impl serde::Serialize {
        let waiting = self.waiting.iter();
        let waiting = waiting.map(|(id, w)| {
            let told = (w.own, w.sent, w.told, w.passed_over);
            (id.client, id.sequence, w.received, told, w.queued)
        });
        waiting.collect::<Vec<_>>()
    }
    pub(super) fn has_unproposed(&self) -> bool {
        !self.queues.is_empty()
    }
    /// How many requests have not been proposed.
    pub(super) fn unproposed(&self) -> usize {
        self.queues.values().map(BTreeMap::len).sum()
    }
    fn has_room(&self, from: ServerId, client: PublicKey, bytes: usize) -> Result<(), PoolError> {
        let (of_client, bytes_of_client) = self.per_client.get(&client).copied().unwrap_or_default();
        if of_client >= MAX_PENDING_PER_CLIENT || bytes_of_client + bytes > MAX_PENDING_BYTES_PER_CLIENT {
            return Err(PoolError::ClientFull);
        }
        let (of_server, bytes_of_server) = self.per_server.get(&from).copied().unwrap_or_default();
        let in_share = of_server < MAX_PENDING / self.servers
            && bytes_of_server + bytes <= (MAX_PENDING_BYTES / self.servers).max(MAX_REQUEST_BYTES);
        let room = self.waiting.len() < MAX_PENDING && self.bytes + bytes <= MAX_PENDING_BYTES;
        if in_share || room { Ok(()) } else { Err(PoolError::Full) }
    }
    /// Takes a request in that came from a server, or from a client of this one; says whether it is new.
    pub(super) fn add(
        &mut self,
        now: Timestamp,
        from: ServerId,
        request: VerifiedRequest,
    ) -> Result<bool, PoolError> {
        let id = request.id();
        if let Some(known) = self.waiting.get(&id) {
            let same = known.request.digest() == request.digest();
            return if same { Ok(false) } else { Err(PoolError::NumberInUse) };
        }
        let client = request.queue();
        let bytes = bytes_of(&request);
        self.has_room(from, client, bytes)?;
        for count in [self.per_client.entry(client).or_default(), self.per_server.entry(from).or_default()] {
            *count = (count.0 + 1, count.1 + bytes);
        }
        self.bytes += bytes;
        self.arrivals += 1;
        let queue = self.queues.entry(client).or_default();
        if queue.is_empty() {
            self.turn.push_back(client);
        }
        queue.insert(self.arrivals, id);
        let queued = Some(self.arrivals);
        let waiting = Waiting {
            request,
            received: now,
            own: false,
            sent: None,
            told: None,
            passed_over: None,
            taken: false,
            queued,
            bytes,
            from,
        };
        self.waiting.insert(id, waiting);
        Ok(true)
    }
    /// The next batch: one request of each client in turn, until it is full.
    pub(super) fn take(&mut self, max_bytes: usize) -> Vec<VerifiedRequest> {
        let mut batch = Vec::new();
        let mut room = max_bytes;
        while batch.len() < MAX_BATCH_REQUESTS {
            let Some(client) = self.turn.front().copied() else { break };
            let Some(queue) = self.queues.get_mut(&client) else {
                self.turn.pop_front();
                continue;
            };
            let Some((_, id)) = queue.first_key_value() else {
                self.queues.remove(&client);
                self.turn.pop_front();
                continue;
            };
            let waiting = self.waiting.get_mut(id).expect("queued requests are waiting");
            if waiting.bytes > room {
                break;
            }
            room -= waiting.bytes;
            waiting.queued = None;
            batch.push(waiting.request.clone());
            queue.pop_first();
            self.turn.pop_front();
            if queue.is_empty() {
                self.queues.remove(&client);
            } else {
                self.turn.push_back(client);
            }
        }
        batch
    }
    /// Forgets a request that was executed or can no longer be.
    pub(super) fn remove(&mut self, id: RequestId) {
        let Some(waiting) = self.waiting.remove(&id) else { return };
        let client = waiting.request.queue();
        self.bytes -= waiting.bytes;
        less(&mut self.per_client, client, waiting.bytes);
        less(&mut self.per_server, waiting.from, waiting.bytes);
        if let Some(place) = waiting.queued
            && let Some(queue) = self.queues.get_mut(&client)
        {
            queue.remove(&place);
            if queue.is_empty() {
                self.queues.remove(&client);
                self.turn.retain(|other| *other != client);
            }
        }
    }
    /// Whether something like this waits.
    pub(super) fn any(&self, like: impl Fn(&Waiting) -> bool) -> bool {
        self.waiting.values().any(like)
    }
    /// Puts everything back into the queues: what a former primary proposed may be lost, and the new one has
    /// not been told.
    pub(super) fn requeue(&mut self) {
        for waiting in self.waiting.values_mut() {
            (waiting.told, waiting.passed_over) = (None, None);
        }
        let lost = self.waiting.iter_mut().filter(|(_, waiting)| waiting.queued.is_none());
        for (id, waiting) in lost {
            self.arrivals += 1;
            waiting.queued = Some(self.arrivals);
            let client = waiting.request.queue();
            let queue = self.queues.entry(client).or_default();
            if queue.is_empty() {
                self.turn.push_back(client);
            }
            queue.insert(self.arrivals, *id);
        }
    }
    /// Forgets what does not pass.
    pub(super) fn retain(&mut self, keep: impl Fn(&Waiting) -> bool) {
        let gone: Vec<_> =
            self.waiting.iter().filter(|(_, waiting)| !keep(waiting)).map(|(id, _)| *id).collect();
        for id in gone {
            self.remove(id);
        }
    }
    /// Forgets those that pass; says which.
    pub(super) fn take_if(&mut self, passes: impl Fn(RequestId) -> bool) -> Vec<RequestId> {
        let taken: Vec<_> = self.waiting.keys().copied().filter(|id| passes(*id)).collect();
        taken.iter().for_each(|id| self.remove(*id));
        taken
    }
    pub(super) fn waiting_mut(&mut self) -> impl Iterator<Item = &mut Waiting> {
        self.waiting.values_mut()
    }
    pub(super) fn waiting_of(&mut self, id: RequestId) -> Option<&mut Waiting> {
        self.waiting.get_mut(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::ClusterId;
    use crate::record::Name;
    use crate::request::{Operation, SignedRequest};
    use crate::signing::SigningKey;

    const OWN: ServerId = ServerId(0);

    fn request(client: u8, sequence: u64) -> VerifiedRequest {
        let cluster = ClusterId(crate::Hash([0; 32]));
        let key = SigningKey::from_seed(&[client; 32]);
        let operation = Operation::Delete { secret: Name::new("x").unwrap() };
        SignedRequest::sign(&cluster, &key, sequence, Timestamp(1000), operation).verify(&cluster).unwrap()
    }

    #[test]
    fn clients_take_turns_and_each_is_served_in_order() {
        let mut pool = RequestPool::new(4);
        for sequence in [7, 3, 5] {
            assert_eq!(pool.add(Timestamp(0), OWN, request(1, sequence)), Ok(true));
        }
        assert_eq!(pool.add(Timestamp(0), OWN, request(2, 1)), Ok(true));
        assert_eq!(pool.add(Timestamp(0), OWN, request(2, 1)), Ok(false));
        let batch = pool.take(1 << 20);
        let order: Vec<_> = batch.iter().map(|r| r.id().sequence).collect();
        assert_eq!(order, [7, 1, 3, 5]);
        assert!(pool.take(1 << 20).is_empty());
        assert_eq!(pool.len(), 4);
        batch.iter().for_each(|r| pool.remove(r.id()));
        assert_eq!(pool.len(), 0);
        assert!(pool.per_client.is_empty() && pool.queues.is_empty() && pool.turn.is_empty());
    }

    #[test]
    fn a_flood_of_one_client_leaves_room_for_others() {
        let mut pool = RequestPool::new(4);
        let flood = request(1, 0);
        for sequence in 0..MAX_PENDING_PER_CLIENT as u64 {
            assert_eq!(pool.add(Timestamp(0), OWN, request(1, sequence)), Ok(true));
        }
        assert_eq!(pool.add(Timestamp(0), OWN, request(1, u64::MAX)), Err(PoolError::ClientFull));
        assert_eq!(pool.add(Timestamp(0), OWN, request(2, 0)), Ok(true));
        assert_eq!(pool.take(1 << 20)[1].id(), request(2, 0).id());
        pool.retain(|waiting| waiting.request.request().expiry > Timestamp(1001));
        assert_eq!(pool.len(), 0);
        assert_eq!(pool.add(Timestamp(0), OWN, flood), Ok(true));
    }

    /// Places are counted, and bytes. One who owns a name makes keys known by naming readers, 64 in a
    /// secret; a liar forwards what they sign, up to MAX_REQUEST_BYTES each, past every gateway's limits.
    #[test]
    fn waiting_requests_are_bounded_in_bytes() {
        use crate::limits::MAX_KEY_BYTES;
        let cluster = ClusterId(crate::Hash([0; 32]));
        let mut pool = RequestPool::new(4);
        let flood = |pool: &mut RequestPool, from: u8, clients: std::ops::Range<u8>| {
            let mut taken = 0;
            for client in clients {
                let key = SigningKey::from_seed(&[client; 32]);
                for sequence in 0..80 {
                    let name = Name::new("x").unwrap();
                    let key_of_record = crate::record::KeyMaterial {
                        algorithm: "x".into(),
                        key: crate::Blob(vec![1; MAX_KEY_BYTES]),
                    };
                    let entry = crate::record::Entry {
                        keys: vec![key_of_record; 15],
                        owner: None,
                        owner_only: false,
                        not_before: None,
                        not_after: None,
                        metadata: Default::default(),
                    };
                    let operation = Operation::Rotate { name, from_version: 1, entry };
                    let request = SignedRequest::sign(&cluster, &key, sequence, Timestamp(1000), operation);
                    let request = request.trusted(&cluster);
                    taken += usize::from(pool.add(Timestamp(0), ServerId(from), request) == Ok(true));
                }
            }
            taken
        };
        let most = MAX_PENDING_BYTES / (MAX_KEY_BYTES * 15);
        let taken = flood(&mut pool, 3, 0..12);
        assert!(taken > most * 9 / 10 && taken <= most, "{taken} of {most}");
        assert!(pool.bytes <= MAX_PENDING_BYTES);
        // The other servers have their shares all the same, and no more.
        for from in 0..3 {
            let taken = flood(&mut pool, from, 20 + 8 * from..28 + 8 * from);
            assert!(taken > most / 5 && taken <= most / 4, "{taken} of {most} from {from}");
        }
        assert!(pool.bytes <= 2 * MAX_PENDING_BYTES);
        assert!(pool.per_client.values().all(|(_, bytes)| *bytes <= MAX_PENDING_BYTES_PER_CLIENT));
        let ids: Vec<_> = pool.waiting.keys().copied().collect();
        ids.into_iter().for_each(|id| pool.remove(id));
        assert!(pool.bytes == 0 && pool.per_client.is_empty() && pool.per_server.is_empty());
    }
}
