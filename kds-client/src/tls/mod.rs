//! TLS between services that know each other by name: a peer is let in exactly if its key is one that is
//! registered for its name, and only for as long as it is.
//!
//! A peer's certificate carries its key, and the record of its name says whether that is registered: as `x509`
//! that very certificate, as `spki`, `ed25519` or an OpenSSH key the key in it. Who signed the certificate, and its
//! dates, do not matter. Whom a service connects to is named by whoever dials; who connects, by the only DNS
//! name in the certificate that it shows.
//!
//! - [`RegisteredPeers::acceptor`] and [`RegisteredPeers::connector`] make [`Connection`]s over anything that tokio
//!   reads and writes: they look names up without blocking a thread, say who is at the other end, and end
//!   when that key has been withdrawn, `max_age` after that at the latest.
//! - [`RegisteredPeers::server_config`] and [`RegisteredPeers::client_config`] are for programs that drive rustls
//!   themselves. They check once, in the handshake: [`RegisteredPeers::check`] is to be called again every half
//!   `max_age` for as long as a connection lasts, or [`RegisteredPeers::guard`] does so.
//!
//! All of them agree on keys by X25519MLKEM768 with peers that know it, speak TLS 1.3 only, and resume nothing:
//! whoever resumes a session shows no certificate, so that a revocation would not be noticed for as long as
//! tickets live. There is no way to the verifiers but through these configurations.
//!
//! `examples/peers.rs`, which the tests run:
//!
//! ```no_run
#![doc = include_str!("../../examples/peers.rs")]
//! ```

mod connection;
mod standing;
mod verifier;

pub use connection::{Acceptor, Connection, Connector};
pub use kds_certs::TlsIdentity;

use crate::error::ClientError;
use crate::lookup::{LookupOptions, usable};
use crate::signature::{of_spki, signing_form};
use crate::{Client, blocking, deadline};
use kds_certs::KeyExchange;
use quorum::record::{Name, Record};
use rustls::{ClientConfig, ServerConfig};
use standing::{Sighting, Standings, Until};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use verifier::{Claims, InMemory};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

/// Names that are looked up at once because strangers carry them. Names that were let in before do not wait for these.
const STRANGERS: usize = 64;
/// How long a thread of a program without an async runtime waits in a handshake for a name that is not in memory.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(2);

/// Whom to let in. Cheap to clone; clones share what they know.
#[derive(Clone)]
pub struct RegisteredPeers {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    /// For handshakes on threads that may wait.
    waits: Option<blocking::Client>,
    standings: Standings,
    strangers: Semaphore,
}

impl std::fmt::Debug for RegisteredPeers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegisteredPeers")
    }
}

impl RegisteredPeers {
    /// Looks peers up through this client.
    pub fn new(client: Client) -> Self {
        Self::with(client, None)
    }
    /// For programs without an async runtime: handshakes of [`Self::server_config`] and [`Self::client_config`] wait
    /// for names that are not in memory, at most two seconds each. (Not on threads of an async runtime, where
    /// others would wait for them.)
    pub fn blocking(client: blocking::Client) -> Self {
        Self::with(client.inner().clone(), Some(client))
    }
    fn with(client: Client, waits: Option<blocking::Client>) -> Self {
        let standings = Standings::new(client.clone());
        let strangers = Semaphore::new(STRANGERS);
        Self { inner: Arc::new(Inner { client, waits, standings, strangers }) }
    }

    /// For a service that others connect to, each with a certificate.
    ///
    /// # Errors
    /// If the key cannot be used.
    pub fn acceptor(&self, own: &TlsIdentity) -> Result<Acceptor, ClientError> {
        let claims = Arc::new(Claims { provider: kds_certs::provider(KeyExchange::HybridPreferred) });
        let tls = kds_certs::server_config(KeyExchange::HybridPreferred, claims, own).map_err(unusable)?;
        Ok(Acceptor::new(self.clone(), tls))
    }
    /// For a service that connects to others, with a certificate or without.
    pub fn connector(&self, own: Option<Arc<TlsIdentity>>) -> Connector {
        Connector::new(self.clone(), own)
    }
    /// For rustls as a server. A caller whose name is not in memory is refused, or waited for with
    /// [`Self::blocking`]; [`Self::acceptor`] looks it up.
    ///
    /// # Errors
    /// If the key cannot be used.
    pub fn server_config(&self, own: &TlsIdentity) -> Result<ServerConfig, ClientError> {
        let verifier = Arc::new(InMemory::new(self.clone()));
        kds_certs::server_config(KeyExchange::HybridPreferred, verifier, own).map_err(unusable)
    }
    /// For rustls as a client. A name that is not in memory is refused, or waited for with
    /// [`Self::blocking`]: call [`Self::prepare`] before connecting; [`Self::connector`] does.
    ///
    /// # Errors
    /// If the key cannot be used.
    pub fn client_config(&self, own: Option<&TlsIdentity>) -> Result<ClientConfig, ClientError> {
        let verifier = Arc::new(InMemory::new(self.clone()));
        kds_certs::client_config(KeyExchange::HybridPreferred, verifier, own).map_err(unusable)
    }

    /// Has a peer's record at hand for the handshakes of the next seconds.
    ///
    /// # Errors
    /// As [`crate::Client::lookup`].
    pub async fn prepare(&self, name: &Name) -> Result<(), ClientError> {
        self.inner.client.lookup_cached(name).await.map(drop)
    }
    /// Whether the key in this certificate (DER) is registered for a name now, by an answer that is not older than
    /// `max_age`.
    ///
    /// # Errors
    /// Says why it is not, or why that is not known.
    pub async fn check(&self, name: &Name, certificate: &[u8]) -> Result<(), ClientError> {
        self.sighting(name).await?.admits(name, certificate)
    }
    /// The same from a thread that may wait, at most so long.
    ///
    /// # Errors
    /// As [`Self::check`]; and if these peers were not made by [`Self::blocking`].
    pub fn check_now(&self, name: &Name, certificate: &[u8], most: Duration) -> Result<(), ClientError> {
        let record = match self.inner.client.cached(name) {
            Some(shown) => shown.there(),
            None => {
                let client = self.inner.waits.as_ref().ok_or_else(|| {
                    ClientError::Local(format!(
                        "{name} is not in memory: call RegisteredPeers::prepare before connecting, or use an acceptor \
                         or a connector, which look names up"
                    ))
                })?;
                client.lookup_cached_within(name, most)?
            }
        };
        admits(record.as_deref(), name, certificate)
    }
    /// Goes on checking a peer that was let in by one of the configurations: the connection ends when its key is no
    /// longer registered.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub async fn guard<T>(
        &self,
        stream: T,
        name: &Name,
        certificate: &[u8],
    ) -> Result<Connection<T>, ClientError> {
        let sighting = self.sighting(name).await?;
        self.hold(stream, name, certificate, sighting)
    }
    fn hold<T>(
        &self,
        stream: T,
        name: &Name,
        certificate: &[u8],
        sighting: Sighting,
    ) -> Result<Connection<T>, ClientError> {
        sighting.admits(name, certificate)?;
        // It may have become known meanwhile that the key is withdrawn: a handshake takes its time.
        let standing = self.inner.standings.join(name, sighting);
        let known = standing.subscribe().borrow().sighting.clone();
        known.admits(name, certificate)?;
        if known.until.left().is_zero() {
            return Err(ClientError::Unusable(format!(
                "that {name}'s key is registered was not confirmed in time"
            )));
        }
        Ok(Connection::new(stream, standing, name, certificate))
    }

    /// What is known of a name, or what servers say now.
    async fn sighting(&self, name: &Name) -> Result<Sighting, ClientError> {
        if let Some(known) = self.inner.standings.current(name) {
            return Ok(known);
        }
        let client = &self.inner.client;
        let look = async {
            let _place = match self.inner.standings.was_let_in(name) {
                true => None,
                false => self.inner.strangers.acquire().await.ok(),
            };
            Sighting::look(client, name).await
        };
        let most = client.inner.options.timeout;
        timeout(most, look).await.unwrap_or_else(|_| {
            Err(ClientError::Local(format!(
                "{name} could not be looked up within {most:?}: too many strangers ask"
            )))
        })
    }
}

impl Sighting {
    /// Asks the servers.
    async fn look(client: &Client, name: &Name) -> Result<Self, ClientError> {
        let found = client.lookup(name, &LookupOptions::default()).await?;
        let max_age_ms = deadline::millis(client.inner.options.max_age);
        let until = found.answer.certificate.statement.time.plus_ms(max_age_ms);
        Ok(Self { record: found.record.map(Arc::new), until: Until::new(until) })
    }
    fn admits(&self, name: &Name, certificate: &[u8]) -> Result<(), ClientError> {
        admits(self.record.as_deref(), name, certificate)
    }
}

fn unusable(error: kds_certs::CertsError) -> ClientError {
    ClientError::Local(error.to_string())
}

/// Whether a record lets the holder of a certificate's key in.
fn admits(record: Option<&Record>, name: &Name, certificate: &[u8]) -> Result<(), ClientError> {
    let record = record.ok_or_else(|| ClientError::Unusable(format!("{name} is not registered")))?;
    usable(record)?;
    match is_registered(record, certificate) {
        true => Ok(()),
        false => {
            Err(ClientError::Unusable(format!("the peer's key is not one that is registered for {name}")))
        }
    }
}

/// Whether the key in a certificate is one that the record holds.
fn is_registered(record: &Record, der: &[u8]) -> bool {
    let Ok(([], certificate)) = X509Certificate::from_der(der) else { return false };
    let (key, raw) = (of_spki(certificate.public_key()), certificate.public_key().raw);
    record.entry.keys.iter().any(|registered| match registered.algorithm.as_str() {
        "x509" => *registered.key == *der,
        "spki" if *registered.key == *raw => true,
        _ => key.is_some() && signing_form(registered) == key,
    })
}

/// The name that a caller's certificate carries: the only DNS name in it.
fn own_name(der: &[u8]) -> Option<Name> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let alternatives = certificate.subject_alternative_name().ok()??;
    let mut names = alternatives.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    let name = names.next().filter(|_| names.next().is_none())?;
    Name::new(name.to_ascii_lowercase()).ok()
}
