//! Requests with the time at which they execute, and what they are checked for.

use crate::bytes::Hash;
use crate::codec::{Tagged, sha256, signing_bytes};
use crate::ids::{ClusterId, Timestamp};
use crate::limits::{MAX_BATCH_BYTES, MAX_BATCH_REQUESTS};
use crate::request::{SignedRequest, VerifiedRequest};
use serde::{Deserialize, Serialize};

/// Requests with the time at which they execute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// The primary's clock when it proposed the batch (design §3).
    pub time: Timestamp,
    /// What to execute, in order.
    pub requests: Vec<SignedRequest>,
}
impl Tagged for Batch {
    const TAG: &'static str = "kds.batch";
}

/// A batch whose size and requests' signatures have been checked.
#[derive(Clone, Debug)]
pub struct CheckedBatch {
    time: Timestamp,
    requests: Vec<VerifiedRequest>,
    digest: Hash,
    bytes: usize,
}

impl CheckedBatch {
    /// From requests that were checked one by one.
    pub fn new(cluster: &ClusterId, time: Timestamp, requests: Vec<VerifiedRequest>) -> Self {
        let batch =
            Batch { time, requests: requests.iter().map(|request| request.signed().clone()).collect() };
        let bytes = signing_bytes(cluster, &batch);
        Self { time, requests, digest: sha256(&bytes), bytes: bytes.len() }
    }
    /// Checks a batch from a peer, or one that comes back from this server's own database.
    pub fn check(cluster: &ClusterId, batch: Batch) -> Result<Self, BatchError> {
        Self::check_as(cluster, batch, None)
    }
    /// The same for a batch that votes have named: whether it is the one is told before any of its requests'
    /// signatures is looked at.
    pub(super) fn check_as(
        cluster: &ClusterId,
        batch: Batch,
        named: Option<Hash>,
    ) -> Result<Self, BatchError> {
        let bytes = signing_bytes(cluster, &batch);
        if batch.requests.len() > MAX_BATCH_REQUESTS || bytes.len() > MAX_BATCH_BYTES {
            return Err(BatchError::TooLarge);
        }
        let digest = sha256(&bytes);
        if named.is_some_and(|named| named != digest) {
            return Err(BatchError::WrongBatch);
        }
        let requests = batch
            .requests
            .into_iter()
            .map(|request| request.verify(cluster).map_err(|_| BatchError::BadRequest))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self { time: batch.time, requests, digest, bytes: bytes.len() })
    }
    /// A batch from this server's own log, whose requests were checked before it was written. The
    /// digest shows whether it came back undamaged.
    pub fn from_own_log(cluster: &ClusterId, batch: Batch) -> Self {
        let time = batch.time;
        let bytes = signing_bytes(cluster, &batch);
        let requests = batch.requests.into_iter().map(|request| request.trusted(cluster)).collect();
        Self { time, requests, digest: sha256(&bytes), bytes: bytes.len() }
    }
    /// What votes are about.
    pub fn digest(&self) -> Hash {
        self.digest
    }
    /// Bytes of its requests, with little around them.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// When it executes.
    pub fn time(&self) -> Timestamp {
        self.time
    }
    /// What it executes.
    pub fn requests(&self) -> &[VerifiedRequest] {
        &self.requests
    }
    /// As it travels.
    pub fn to_batch(&self) -> Batch {
        Batch {
            time: self.time,
            requests: self.requests.iter().map(|request| request.signed().clone()).collect(),
        }
    }
}

/// Why a batch is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Too many requests.
    #[error("a batch has at most {MAX_BATCH_REQUESTS} requests in {MAX_BATCH_BYTES} bytes")]
    TooLarge,
    /// It is not the one that the votes are about.
    #[error("the batch does not have the digest that was voted for")]
    WrongBatch,
    /// A request's signature does not hold.
    #[error("a request in the batch is not signed by its client")]
    BadRequest,
}
