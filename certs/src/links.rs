//! TLS between servers: keys of one epoch, certified by the identity (design §7).
//!
//! A server draws a TLS key for every epoch and every start. Its self-signed certificate carries what the
//! server's identity says about that key ([`KeyPurpose::Tls`]), in an extension of its own. Whoever
//! connects checks that against the membership, and learns whose the key is and of which epoch: a thief's
//! keys are old soon, and nothing secret is sent to the holder of an old one. They open a link nevertheless,
//! since a server that slept through epochs has no other, and can only be helped over a link.

use crate::{CertsError, KeyExchange, TlsIdentity, client_config, provider, server_config};
use quorum::Membership;
use quorum::codec::{decode, encode, sha256};
use quorum::signing::{KeyCertificate, KeyPurpose};
use quorum::{PublicKey, ServerId};
use rcgen::PublicKeyData as _;
use rustls::client::danger::{ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, ClientConfig, DistinguishedName, Error, KeyLog, KeyLogFile, ServerConfig};
use std::sync::Arc;
use x509_parser::der_parser::Oid;

/// The extension: an arc under 2.25, where anyone may draw a number.
const EXTENSION: &[u64] = &[2, 25, 7_315_882_190_354_762_611];

/// A TLS key that is to be certified.
pub struct LinkKey(rcgen::KeyPair);

impl LinkKey {
    /// Draws one.
    ///
    /// # Errors
    /// If the random numbers of the system cannot be had.
    pub fn draw() -> Result<Self, CertsError> {
        Ok(Self(rcgen::KeyPair::generate()?))
    }
    /// What the identity certifies: the digest of the public key.
    pub fn public(&self) -> PublicKey {
        PublicKey(sha256(&self.0.subject_public_key_info()).0)
    }
    /// With what the identity says about it.
    ///
    /// # Errors
    /// If no certificate can be made of it.
    pub fn certified(self, key: &KeyCertificate) -> Result<TlsIdentity, CertsError> {
        let mut params = rcgen::CertificateParams::default();
        let name = format!("kds server {}, epoch {}", key.statement.server, key.statement.epoch);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let extension = rcgen::CustomExtension::from_oid_content(EXTENSION, encode(key));
        params.custom_extensions.push(extension);
        let certificate = params.self_signed(&self.0)?.der().clone();
        let key = PrivateKeyDer::try_from(self.0.serialize_der())
            .map_err(|why| CertsError::Pem { what: "private key", why: why.into() })?;
        Ok(TlsIdentity { certificate, key })
    }
}

/// What a link's certificate says: whose key it is, and of which epoch. None unless the identity that its
/// server has in that epoch has certified it.
pub fn certified_key(membership: &Membership, certificate: &[u8]) -> Option<KeyCertificate> {
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let wanted = Oid::from(EXTENSION).ok()?;
    let extension = parsed.get_extension_unique(&wanted).ok()??;
    let key: KeyCertificate = decode(extension.value).ok()?;
    let fits = rest.is_empty()
        && key.statement.purpose == KeyPurpose::Tls
        && key.statement.key == PublicKey(sha256(parsed.public_key().raw).0)
        && key.verify(membership).is_ok();
    fits.then_some(key)
}

/// For a server's listener: only servers of the cluster get in.
///
/// # Errors
/// If the key cannot be used.
pub fn peer_server(membership: &Arc<Membership>, identity: &TlsIdentity) -> Result<ServerConfig, CertsError> {
    let clients = Certified::of(membership, None);
    let mut config = server_config(KeyExchange::Hybrid, clients, identity)?;
    config.key_log = key_log(config.key_log);
    Ok(config)
}

/// Builds with debug assertions write the secrets of links into the file that `SSLKEYLOGFILE` names, so that tests can
/// look for them where they must not be. Others have no way to.
fn key_log(none: Arc<dyn KeyLog>) -> Arc<dyn KeyLog> {
    if cfg!(debug_assertions) { Arc::new(KeyLogFile::new()) } else { none }
}

/// For a server's link to server `server`.
///
/// # Errors
/// If the key cannot be used.
pub fn peer_client(
    membership: &Arc<Membership>,
    identity: &TlsIdentity,
    server: ServerId,
) -> Result<ClientConfig, CertsError> {
    let verifier = Certified::of(membership, Some(server));
    let mut config = client_config(KeyExchange::Hybrid, verifier, Some(identity))?;
    config.key_log = key_log(config.key_log);
    Ok(config)
}

/// Accepts keys that identities of the cluster have certified: of one server, or of any.
#[derive(Debug)]
struct Certified {
    membership: Arc<Membership>,
    only: Option<ServerId>,
    provider: Arc<CryptoProvider>,
}

impl Certified {
    fn of(membership: &Arc<Membership>, only: Option<ServerId>) -> Arc<Self> {
        Arc::new(Self { membership: Arc::clone(membership), only, provider: provider(KeyExchange::Hybrid) })
    }
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let key = certified_key(&self.membership, certificate);
        match key.filter(|key| self.only.is_none_or(|only| only == key.statement.server)) {
            Some(_) => Ok(()),
            None => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }
}

impl ServerCertVerifier for Certified {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }
    crate::signature_checks!();
}

impl ClientCertVerifier for Certified {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }
    crate::signature_checks!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorum::grid::Grid;
    use quorum::ids::Epoch;
    use quorum::manifest::{MANIFEST_FORMAT, Manifest, ServerEntry};
    use quorum::signing::{KeyStatement, SigningKey};
    use quorum::{Blob, Thresholds};

    fn manifest() -> (Manifest, Vec<SigningKey>) {
        let identities: Vec<_> = (0..4).map(|i| SigningKey::from_seed(&[i + 1; 32])).collect();
        let thresholds = Thresholds::plan(4, None, None).unwrap();
        let grid = Grid::new(thresholds);
        let servers = grid.servers().map(|id| ServerEntry {
            id,
            row: grid.row_of(id) as u16,
            column: grid.column_of(id) as u16,
            url: format!("https://s{id}"),
            peer: format!("s{id}"),
            identity: identities[id.index()].public(),
            certificate: Blob(vec![]),
        });
        let manifest = Manifest {
            format: MANIFEST_FORMAT,
            epoch_seconds: 30,
            administrators_needed: 1,
            administrators: vec![SigningKey::from_seed(&[200; 32]).public()],
            thresholds,
            servers: servers.collect(),
        };
        (manifest, identities)
    }

    #[test]
    fn a_link_key_is_its_servers_and_of_its_epoch() {
        let (manifest, identities) = manifest();
        let membership = Membership::genesis(Arc::new(manifest));
        let cluster = *membership.cluster();
        let certified = |by: usize, purpose, of: Option<PublicKey>, server: u8| {
            let drawn = LinkKey::draw().unwrap();
            let key = of.unwrap_or_else(|| drawn.public());
            let (server, epoch) = (ServerId(server), Epoch(7));
            let statement = KeyStatement { server, purpose, epoch, attempt: 1, serial: 1, key };
            let key = KeyCertificate::issue(&cluster, &identities[by], statement);
            drawn.certified(&key).unwrap()
        };
        let good = certified(2, KeyPurpose::Tls, None, 2);
        let known = certified_key(&membership, good.certificate()).unwrap();
        assert_eq!((known.statement.server, known.statement.epoch), (ServerId(2), Epoch(7)));
        assert!(
            peer_server(&membership, &good).is_ok() && peer_client(&membership, &good, ServerId(1)).is_ok()
        );
        assert!(Certified::of(&membership, None).check(&good.certificate).is_ok());
        assert!(Certified::of(&membership, Some(ServerId(2))).check(&good.certificate).is_ok());
        assert!(Certified::of(&membership, Some(ServerId(1))).check(&good.certificate).is_err());
        // By another identity; for another purpose; of another key: a thief shows the certificate of a key
        // that he does not have.
        let stolen = certified(2, KeyPurpose::Tls, Some(known.statement.key), 2);
        for bad in [certified(1, KeyPurpose::Tls, None, 2), certified(2, KeyPurpose::Voting, None, 2), stolen]
        {
            assert!(certified_key(&membership, bad.certificate()).is_none());
        }
        // One without the extension, garbage, and something that follows.
        let plain = crate::generate("a", &["localhost".to_owned()], 2026).unwrap();
        let longer = [good.certificate(), &[0]].concat();
        for bad in [&plain.certificate[..], b"garbage", &longer] {
            assert!(certified_key(&membership, bad).is_none());
        }
    }

    #[test]
    fn servers_agree_on_keys_by_the_hybrid() {
        use crate::config::tests::handshake;
        let (manifest, identities) = manifest();
        let membership = Membership::genesis(Arc::new(manifest));
        let link_key = |server: u8| {
            let (drawn, epoch) = (LinkKey::draw().unwrap(), Epoch(1));
            let (server, purpose) = (ServerId(server), KeyPurpose::Tls);
            let statement =
                KeyStatement { server, purpose, epoch, attempt: 1, serial: 1, key: drawn.public() };
            let identity = &identities[server.index()];
            drawn.certified(&KeyCertificate::issue(membership.cluster(), identity, statement)).unwrap()
        };
        let (one, other) = (link_key(1), link_key(2));
        let dials = Arc::new(peer_client(&membership, &one, ServerId(2)).unwrap());
        let accepts = Arc::new(peer_server(&membership, &other).unwrap());
        for _ in 0..2 {
            let (client, server) = handshake(&dials, &accepts).unwrap();
            for group in [client.negotiated_key_exchange_group(), server.negotiated_key_exchange_group()] {
                assert_eq!(group.unwrap().name(), rustls::NamedGroup::X25519MLKEM768);
            }
            assert_eq!(client.handshake_kind(), Some(rustls::HandshakeKind::Full));
        }
        // Whoever cannot do it is no server of this cluster, whatever its key says.
        let x25519 = rustls::crypto::aws_lc_rs::kx_group::X25519;
        let provider =
            CryptoProvider { kx_groups: vec![x25519], ..rustls::crypto::aws_lc_rs::default_provider() };
        let old = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Certified::of(&membership, Some(ServerId(2))))
            .with_client_auth_cert(one.shown(), one.key.clone_key())
            .unwrap();
        assert!(handshake(&Arc::new(old), &accepts).is_err());
    }
}
