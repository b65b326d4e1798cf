//! What each answer can honestly be at most: a liar's takes no more memory, and no longer to read.
//!
//! Sizes of JSON, from the bounds of what it holds, generously: text may be escaped, bytes are in base64.

use crate::api::{BulkAnswer, HistoryAnswer, MembershipAnswer, ServerStatus};
use quorum::answer::{PageAnswer, Receipt, RecordAnswer, SecretAnswer, ShareAnswer, SpaceAnswer};
use quorum::certificate::Completion;
use quorum::limits::{
    CHANGES_TOGETHER, MAX_CERTIFICATE_BYTES, MAX_CIPHERTEXT_BYTES, MAX_LOOKUP_NAMES, MAX_MAP_KEY_BYTES,
    MAX_PAGE, MAX_PAGE_BYTES, MAX_REQUEST_BYTES, MAX_SEALED_SHARE_BYTES, MAX_SERVERS, RELEASES_KEPT,
};
use serde::de::DeserializeOwned;

/// A certificate, or statements of completeness: a signature and a key of each server.
const CERTIFICATE: usize = MAX_SERVERS * 1_024 + 1_024;
/// A path: a step at each bit of a key at most, and no map is as deep as the longest key.
const PATH: usize = 9 * MAX_MAP_KEY_BYTES * 96;
/// A record: it came in a request.
const RECORD: usize = 2 * MAX_REQUEST_BYTES;
/// Entries of a page: the last may begin just below the bound.
const ENTRIES: usize = 2 * (MAX_PAGE_BYTES + MAX_REQUEST_BYTES) + MAX_PAGE * 4 * MAX_MAP_KEY_BYTES;
/// Text of an error.
const WORDS: usize = 16 * 1_024;

/// The answer of a route.
pub(crate) trait Answer: DeserializeOwned {
    /// Bytes that it has at most.
    const MOST_BYTES: usize;
}

impl Answer for RecordAnswer {
    const MOST_BYTES: usize = 2 * (RECORD + PATH) + CERTIFICATE;
}
impl Answer for BulkAnswer {
    const MOST_BYTES: usize = 2 * MAX_PAGE_BYTES + RECORD + MAX_LOOKUP_NAMES * 64 * 1_024 + CERTIFICATE;
}
/// Of an answer about so many names.
pub(crate) fn bulk(names: usize, brief: usize) -> usize {
    let most = CERTIFICATE + WORDS + names * (RECORD + PATH) + brief * 64;
    most.min(BulkAnswer::MOST_BYTES)
}
impl Answer for PageAnswer {
    const MOST_BYTES: usize = ENTRIES + 2 * PATH + CERTIFICATE;
}
impl Answer for HistoryAnswer {
    const MOST_BYTES: usize = RecordAnswer::MOST_BYTES + PageAnswer::MOST_BYTES;
}
impl Answer for Receipt {
    const MOST_BYTES: usize = PATH + 2 * CERTIFICATE + WORDS;
}
impl Answer for SecretAnswer {
    const MOST_BYTES: usize = RECORD + 2 * PATH + RELEASES_KEPT * 1_024 + CERTIFICATE;
}
impl Answer for SpaceAnswer {
    const MOST_BYTES: usize = 3 * PATH + CERTIFICATE + WORDS;
}
impl Answer for ShareAnswer {
    const MOST_BYTES: usize = 2 * (MAX_CIPHERTEXT_BYTES + MAX_SEALED_SHARE_BYTES) + WORDS;
}
impl Answer for Completion {
    const MOST_BYTES: usize = CERTIFICATE;
}
impl Answer for MembershipAnswer {
    const MOST_BYTES: usize = CHANGES_TOGETHER * (2 * MAX_CERTIFICATE_BYTES + WORDS + PATH + CERTIFICATE);
}
impl Answer for ServerStatus {
    const MOST_BYTES: usize = WORDS;
}

/// An answer, or an error document instead, which may have a receipt or the absence of a record.
pub(crate) const fn or_problem(most: usize) -> usize {
    let proofs = WORDS + RecordAnswer::MOST_BYTES + Receipt::MOST_BYTES;
    if most > proofs { most } else { proofs }
}
