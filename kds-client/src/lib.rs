//! Client of the key-distribution service.
//!
//! [`Client`] talks to the servers of one cluster, trusts none of them, and checks every answer
//! against the cluster's manifest: a lookup touches one row of the grid, and goes on to another
//! row or to q servers where one is silent or wrong; a write returns with a receipt.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use kds_client::{Client, LookupOptions, manifest_file, quorum::record::Name};
//!
//! let manifest = manifest_file::read("kds-dev/manifest.toml".as_ref())?;
//! let client = Client::new(manifest, Default::default())?;
//! let found = client.lookup(&Name::new("alice")?, &LookupOptions::default()).await?;
//! if let Some(record) = found.record {
//!     println!("version {} with {} keys", record.version, record.entry.keys.len());
//! }
//! # Ok(())
//! # }
//! ```

pub mod api;
mod batch;
pub mod blocking;
mod cache;
mod client;
pub mod error;
pub mod evidence_file;
pub mod keys;
pub mod keystore;
mod link;
mod list;
mod lookup;
pub mod manifest_file;
mod pace;
mod secrets;
mod signature;
pub mod tls;
mod watch;
mod write;

pub use client::{Client, Options};
pub use error::{ClientError, ExitStatus, Misbehaviour};
pub use link::Link;
pub use lookup::{Access, AccessKind, Consistency, Lookup, LookupOptions, usable};
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
