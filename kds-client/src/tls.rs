//! TLS between services that know each other by name: a peer is accepted exactly if its key is one
//! that is registered for its name, now.
//!
//! [`crate::blocking`] has an example.

use crate::blocking::Client;
use crate::error::ClientError;
use crate::lookup::usable;
use crate::signature::{of_spki, signing_form};
use quorum::record::{Name, Record};
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DistinguishedName, Error, OtherError};
use std::sync::Arc;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer as _;

/// Accepts a TLS peer exactly if the key in its certificate is registered for its name: as `x509` that very
/// certificate, as `spki`, `ed25519` or an OpenSSH key the key in it. Who signed the certificate, and
/// its dates, do not matter: the record says who it is and how long it is valid, and a revoked one is refused.
///
/// A server's name is the one that was dialled; a client's the only DNS name in its certificate.
///
/// Handshakes look names up in memory, or wait for the cluster where that is older than `max_age`: in async
/// programs call [`RegisteredPeers::prepare`] before connecting, so that no thread is blocked.
pub struct RegisteredPeers {
    client: Client,
    provider: Arc<CryptoProvider>,
}

impl std::fmt::Debug for RegisteredPeers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegisteredPeers")
    }
}

/// Whether the key in a certificate is one that the record holds.
fn is_registered(record: &Record, der: &[u8]) -> Result<bool, Error> {
    let (rest, certificate) =
        X509Certificate::from_der(der).map_err(|_| Error::from(CertificateError::BadEncoding))?;
    if !rest.is_empty() {
        return Err(CertificateError::BadEncoding.into());
    }
    let (key, raw) = (of_spki(certificate.public_key()), certificate.public_key().raw);
    Ok(record.entry.keys.iter().any(|registered| match registered.algorithm.as_str() {
        "x509" => *registered.key == *der,
        "spki" if *registered.key == *raw => true,
        _ => key.is_some() && signing_form(registered) == key,
    }))
}

/// The one DNS name in a certificate.
fn own_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let alternatives = certificate.subject_alternative_name().ok()??;
    let mut names = alternatives.value.general_names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    });
    names.next().filter(|_| names.next().is_none())
}

impl RegisteredPeers {
    /// Looks peers up through this client.
    pub fn new(client: Client) -> Self {
        Self { client, provider: Arc::new(aws_lc_rs::default_provider()) }
    }
    /// Has a peer's record at hand for the handshakes of the next seconds.
    ///
    /// # Errors
    /// As [`crate::Client::lookup`].
    pub async fn prepare(&self, name: &Name) -> Result<(), ClientError> {
        let (client, name) = (self.client.clone(), name.clone());
        let waiting = tokio::task::spawn_blocking(move || client.lookup_cached(&name).map(drop));
        waiting.await.unwrap_or_else(|_| Err(ClientError::Local("the lookup was broken off".into())))
    }
    fn check(&self, name: &str, certificate: &[u8]) -> Result<(), Error> {
        let refused = |error: ClientError| Error::from(CertificateError::Other(OtherError(Arc::new(error))));
        let name = Name::new(name.to_ascii_lowercase())
            .map_err(|error| refused(ClientError::Unusable(format!("{name:?}: {error}"))))?;
        let record = match self.client.inner().cached(&name) {
            Some(record) => record,
            None => self.client.lookup_cached(&name).map_err(refused)?,
        };
        let record =
            record.ok_or_else(|| refused(ClientError::NotFound { what: format!("the name {name}") }))?;
        usable(&record).map_err(refused)?;
        match is_registered(&record, certificate)? {
            true => Ok(()),
            false => Err(refused(ClientError::Unusable(format!(
                "the peer's key is not one that is registered for {name}"
            )))),
        }
    }
}

impl ServerCertVerifier for RegisteredPeers {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(&name.to_str(), certificate)?;
        Ok(ServerCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}

impl ClientCertVerifier for RegisteredPeers {
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
