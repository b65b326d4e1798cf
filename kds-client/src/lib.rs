//! Client of the key-distribution service.
//!
//! [`Client`] talks to the servers of one cluster, trusts none of them, and checks every answer
//! against the cluster's manifest: a lookup touches one row of the grid, and goes on to another
//! row or to q servers where one is silent or wrong; a write returns with a receipt.
//!
//! | | |
//! |---|---|
//! | [`Client::lookup`], [`Client::lookup_many`] | verified, complete, one row of servers |
//! | [`Client::lookup_cached`] | from memory, at most `max_age` old |
//! | [`Client::verify_signature`] | a message's signature under a name's current keys |
//! | [`tls::RegisteredPeers`] | TLS with exactly the peers whose keys are registered, for as long as they are |
//! | [`Client::watch`], [`Client::history`], [`Client::list`] | versions as they come, and as they were |
//! | [`Client::retry`], [`Client::outcome`] | a write whose answer did not come |
//! | [`blocking::Client`] | the same without an async runtime |
//!
//! `examples/service.rs`, which the tests run:
//!
//! ```no_run
#![doc = include_str!("../examples/service.rs")]
//! ```

pub mod api;
mod batch;
pub mod blocking;
mod bounds;
mod cache;
mod client;
pub mod deadline;
pub mod error;
pub mod evidence_file;
mod failure;
#[cfg(test)]
mod fixtures;
pub mod keys;
pub mod keystore;
mod link;
mod list;
mod lookup;
pub mod manifest_file;
mod outcome;
mod pace;
mod passphrase;
pub mod random;
mod secrets;
mod seen;
mod signature;
mod submit;
pub mod tls;
mod trust;
mod turns;
mod watch;
mod write;

pub use client::{Client, Options};
pub use error::{AsksToWait, ClientError, ExitStatus, Misbehaviour, Silence};
pub use link::Link;
pub use lookup::{Access, AccessKind, Consistency, Lookup, LookupOptions, usable};
pub use outcome::{NoTicket, Ticket, WhatCame};
pub use passphrase::DEFAULT_GUESSES;
pub use quorum;
pub use secrets::{Deposited, Recovered};
pub use signature::{SSH_NAMESPACE, SignatureError, check_signature};
pub use watch::{Watch, WatchEvent};
pub use write::Written;

/// Which machine clock the client goes by.
pub fn now() -> quorum::Timestamp {
    let ms = jiff::Timestamp::now().as_millisecond();
    quorum::Timestamp(u64::try_from(ms).unwrap_or(0))
}
