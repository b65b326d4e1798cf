//! The pure core of the key-distribution service.
//!
//! n = m² servers in an m×m grid keep records *name → public keys* and shares of secrets.
//! [`ordering`] puts the writes in one order (PBFT), [`state`] executes them over an
//! authenticated [`map`], [`certificate`] turns q signatures on the result into something
//! that anyone can check, [`grid`] says which servers a read or write has to reach, and
//! [`shamir`] and [`sealing`] keep private material from every server.
//!
//! Nothing here does I/O, reads a clock, starts a thread or draws randomness: time and
//! randomness are arguments, so the same [`ordering::Replica`] runs in the server and in
//! the simulator, where a seed reproduces any run.
//!
//! Short names of the papers that comments cite: **PBFT** (Castro & Liskov, OSDI 1999),
//! **BQS** (Malkhi & Reiter 1997), **M-Grid** (Malkhi, Reiter & Wool 2000), **Shamir** (1979),
//! **CT** (RFC 6962). "design" is the project's design page, summarised in `docs/design.md`.

pub mod answer;
pub mod bytes;
pub mod certificate;
pub mod codec;
pub mod decoding;
pub mod evidence;
pub mod gf256;
pub mod grid;
pub mod ids;
pub mod limits;
pub mod manifest;
pub mod map;
pub mod membership;
pub mod message;
pub mod oprf;
pub mod ordering;
pub mod read;
pub mod record;
pub mod recovery;
pub mod refresh;
pub mod request;
pub mod scalars;
pub mod sealing;
pub mod shamir;
pub mod shares;
pub mod signer;
pub mod signing;
pub mod state;
pub mod thresholds;

pub use bytes::{Blob, ByteCount, Element, Hash, PublicKey, SecretBytes, SignatureBytes};
pub use ids::{ClusterId, Epoch, Sequence, ServerId, ServerSet, Timestamp, View};
pub use manifest::Manifest;
pub use membership::Membership;
pub use thresholds::Thresholds;
