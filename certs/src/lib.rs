//! TLS of a cluster: self-signed certificates, pinned by the manifest.
//!
//! There is no certificate authority to trust or to steal: a client accepts for server i exactly
//! the certificate that the membership names for server i, and servers accept from each other keys of
//! an epoch that identities of the cluster have certified, which also tells who called
//! ([`certified_key`]).
//!
//! All links are made by [`server_config`] and [`client_config`]: TLS 1.3, keys exchanged by the post-quantum
//! hybrid X25519MLKEM768 ([`KeyExchange`]), so that traffic recorded today stays closed, and nothing resumed
//! (decision 0026).

/// What every verifier does with the signature of a handshake: methods of an `impl` of rustls's verifiers, for a
/// type with a field `provider`.
#[macro_export]
macro_rules! signature_checks {
    () => {
        fn verify_tls12_signature(
            &self,
            _message: &[u8],
            _certificate: &::rustls::pki_types::CertificateDer<'_>,
            _signature: &::rustls::DigitallySignedStruct,
        ) -> Result<::rustls::client::danger::HandshakeSignatureValid, ::rustls::Error> {
            Err(::rustls::Error::General("TLS 1.2 is not spoken here".into()))
        }
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &::rustls::pki_types::CertificateDer<'_>,
            signature: &::rustls::DigitallySignedStruct,
        ) -> Result<::rustls::client::danger::HandshakeSignatureValid, ::rustls::Error> {
            let algorithms = &self.provider.signature_verification_algorithms;
            ::rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
        }
        fn supported_verify_schemes(&self) -> Vec<::rustls::SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

mod config;
mod links;

pub use config::{KeyExchange, client_config, provider, server_config};
pub use links::{LinkKey, certified_key, peer_client, peer_server};
use quorum::Blob;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::NoClientAuth;
use rustls::{CertificateError, ClientConfig, Error, ServerConfig};
use std::sync::Arc;
use std::time::Duration;
use zeroize::Zeroizing;

/// Years that a new certificate is valid for.
pub const VALIDITY_YEARS: i32 = 10;
/// Days before its end at which a server starts to warn.
pub const WARN_DAYS: i64 = 30;

/// What goes wrong with certificates at start.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// Making one.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// Reading one.
    #[error("not a PEM {what}: {why}")]
    Pem {
        /// Certificate or private key.
        what: &'static str,
        /// What the parser says.
        why: String,
    },
    /// Using one.
    #[error("the TLS key and certificate cannot be used: {0}")]
    Tls(#[from] Error),
    /// Not X.509.
    #[error("not an X.509 certificate")]
    NotX509,
}

/// A certificate with its private key.
pub struct OwnCertificate {
    /// DER, as the manifest pins it.
    pub certificate: Vec<u8>,
    /// PEM, for `curl --cacert`.
    pub certificate_pem: String,
    /// PEM (PKCS#8, ECDSA P-256).
    pub key_pem: Zeroizing<String>,
}

/// Makes a self-signed certificate for a server that is reached under these host names or
/// addresses, valid from the beginning of `year` for [`VALIDITY_YEARS`].
pub fn generate(common_name: &str, hosts: &[String], year: i32) -> Result<OwnCertificate, CertsError> {
    let mut params = rcgen::CertificateParams::new(hosts.to_vec())?;
    params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
    params.not_before = rcgen::date_time_ymd(year, 1, 1);
    params.not_after = rcgen::date_time_ymd(year + VALIDITY_YEARS, 1, 1);
    let key = rcgen::KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok(OwnCertificate {
        certificate: certificate.der().to_vec(),
        certificate_pem: certificate.pem(),
        key_pem: Zeroizing::new(key.serialize_pem()),
    })
}

/// Seconds since 1970 at which a certificate ends.
pub fn not_after(der: &[u8]) -> Result<i64, CertsError> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).map_err(|_| CertsError::NotX509)?;
    Ok(certificate.validity().not_after.timestamp())
}

/// What a server proves itself with.
pub struct TlsIdentity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl TlsIdentity {
    /// From a server's `tls.pem` and `tls.key`.
    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, CertsError> {
        let certificate = CertificateDer::from_pem_slice(certificate)
            .map_err(|e| CertsError::Pem { what: "certificate", why: e.to_string() })?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|e| CertsError::Pem { what: "private key", why: e.to_string() })?;
        Ok(Self { certificate, key })
    }
    fn shown(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }
    /// DER of the certificate.
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }
}

/// For a server's HTTPS listener: no client certificates.
///
/// # Errors
/// If the key cannot be used.
pub fn https_server(identity: &TlsIdentity) -> Result<ServerConfig, CertsError> {
    server_config(KeyExchange::HybridPreferred, Arc::new(NoClientAuth), identity)
}

/// For a client of the server that has this certificate (DER), while that is valid.
///
/// # Errors
/// If no configuration can be made.
pub fn https_client(certificate: &Blob) -> Result<ClientConfig, CertsError> {
    pinned(certificate, true)
}

/// The same even where the certificate has expired by this machine's clock: to ask what time it is. It is still
/// the pinned server that answers.
///
/// # Errors
/// If no configuration can be made.
pub fn https_client_at_any_date(certificate: &Blob) -> Result<ClientConfig, CertsError> {
    pinned(certificate, false)
}

fn pinned(certificate: &Blob, dated: bool) -> Result<ClientConfig, CertsError> {
    let provider = provider(KeyExchange::Hybrid);
    let pin = Pin { certificate: certificate.clone(), dated, provider };
    client_config(KeyExchange::Hybrid, Arc::new(pin), None)
}

/// Accepts one certificate, byte for byte.
#[derive(Debug)]
struct Pin {
    certificate: Blob,
    /// Whether its end counts.
    dated: bool,
    provider: Arc<CryptoProvider>,
}

impl Pin {
    fn check(&self, certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
        if *self.certificate != **certificate {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        let end = not_after(certificate).map_err(|_| CertificateError::BadEncoding)?;
        // One that ended before 1970 ended then.
        let end = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(end).unwrap_or(0)));
        if self.dated && end < now {
            return Err(CertificateError::ExpiredContext { time: now, not_after: end }.into());
        }
        Ok(())
    }
}

impl ServerCertVerifier for Pin {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(certificate, now).map(|()| ServerCertVerified::assertion())
    }
    crate::signature_checks!();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pinned_certificate_passes_and_only_while_it_is_valid() {
        let hosts = ["127.0.0.1".to_owned()];
        let (one, two) = (generate("a", &hosts, 2026).unwrap(), generate("a", &hosts, 2026).unwrap());
        let provider = provider(KeyExchange::Hybrid);
        let mut pin = Pin { certificate: Blob(one.certificate.clone()), dated: true, provider };
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let now = at(1_790_000_000);
        assert!(pin.check(&one.certificate.as_slice().into(), now).is_ok());
        // Same name, same hosts, other key.
        assert!(pin.check(&two.certificate.as_slice().into(), now).is_err());
        let late = at(not_after(&one.certificate).unwrap() as u64 + 1);
        let refused = pin.check(&one.certificate.as_slice().into(), late).unwrap_err();
        assert!(refused.to_string().contains("expired"), "{refused}");
        // To ask for the time, the certificate alone counts.
        pin.dated = false;
        assert!(pin.check(&one.certificate.as_slice().into(), late).is_ok());
        assert!(pin.check(&two.certificate.as_slice().into(), now).is_err());
    }

    #[test]
    fn pem_files_load_and_garbage_is_named() {
        let own = generate("a", &["localhost".to_owned()], 2026).unwrap();
        let identity = TlsIdentity::from_pem(own.certificate_pem.as_bytes(), own.key_pem.as_bytes()).unwrap();
        assert_eq!(identity.certificate(), own.certificate);
        assert!(https_server(&identity).is_ok());
        assert!(matches!(
            TlsIdentity::from_pem(b"x", b"y"),
            Err(CertsError::Pem { what: "certificate", .. })
        ));
        assert!(matches!(not_after(b"garbage"), Err(CertsError::NotX509)));
    }
}
