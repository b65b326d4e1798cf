//! What rustls calls in a handshake. It is synchronous, so nothing here waits on a thread of an async runtime.

use super::{HANDSHAKE_PATIENCE, RegisteredPeers, Sighting, own_name};
use crate::error::ClientError;
use quorum::record::Name;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use std::sync::Arc;

fn refused(error: ClientError) -> Error {
    CertificateError::Other(OtherError(Arc::new(error))).into()
}

fn name_of(name: &str) -> Result<Name, Error> {
    Name::new(name.to_ascii_lowercase())
        .map_err(|error| refused(ClientError::Unusable(format!("{name:?}: {error}"))))
}

/// Takes a caller's certificate for what it claims: that it is a certificate with one name, and that the caller
/// has its key. Whether the name vouches for it is looked up after the handshake, before anything is read or
/// written: see [`super::Acceptor`].
#[derive(Debug)]
pub(super) struct Claims {
    pub(super) provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for Claims {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        own_name(certificate).ok_or(CertificateError::NotValidForName)?;
        Ok(ClientCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}

/// Accepts the one server that was looked up before it was dialled.
#[derive(Debug)]
pub(super) struct Dialled {
    pub(super) name: Name,
    pub(super) sighting: Sighting,
    pub(super) provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Dialled {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.sighting.admits(&self.name, certificate).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}

/// Accepts who is registered by what is in memory, or waits for the servers where a thread may.
#[derive(Debug)]
pub(super) struct InMemory {
    peers: RegisteredPeers,
    provider: Arc<CryptoProvider>,
}

impl InMemory {
    pub(super) fn new(peers: RegisteredPeers) -> Self {
        Self { peers, provider: kds_certs::provider(kds_certs::KeyExchange::HybridPreferred) }
    }
    fn check(&self, name: &Name, certificate: &[u8]) -> Result<(), Error> {
        let inner = &self.peers.inner;
        if inner.client.cached(name).is_some() {
            return self.peers.check_now(name, certificate, HANDSHAKE_PATIENCE).map_err(refused);
        }
        if tokio::runtime::Handle::try_current().is_ok() {
            return Err(refused(ClientError::Local(format!(
                "{name} is not in memory, and a thread of an async runtime does not wait for it: call \
                 RegisteredPeers::prepare before connecting, or use an acceptor or a connector, which look names up"
            ))));
        }
        // Names that strangers carry take so many threads and no more.
        let Ok(_place) = inner.strangers.try_acquire() else {
            return Err(refused(ClientError::Local("too many strangers at once".into())));
        };
        self.peers.check_now(name, certificate, HANDSHAKE_PATIENCE).map_err(refused)
    }
}

impl ServerCertVerifier for InMemory {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(&name_of(&name.to_str())?, certificate)?;
        Ok(ServerCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}

impl ClientCertVerifier for InMemory {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let name = own_name(certificate).ok_or(CertificateError::NotValidForName)?;
        self.check(&name, certificate)?;
        Ok(ClientCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}
