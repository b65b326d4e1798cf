//! What every link has in common, in one place: TLS 1.3, the key exchange, and that nothing is resumed.

use crate::{CertsError, TlsIdentity};
use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{ClientConfig, ServerConfig};
use std::sync::Arc;

/// How the two ends of a link agree on keys (decision 0026).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyExchange {
    /// By X25519MLKEM768 and nothing else: where both ends are programs of ours, so that what is promised is
    /// what happens, and not what the other end makes of it.
    Hybrid,
    /// By X25519MLKEM768 with everybody who offers it, by X25519 or P-256 with others: for programs that are
    /// not ours, such as `curl` with an OpenSSL before 3.5.
    HybridPreferred,
}

/// The cryptography behind a link.
pub fn provider(exchange: KeyExchange) -> Arc<CryptoProvider> {
    use aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
    let kx_groups = match exchange {
        KeyExchange::Hybrid => vec![X25519MLKEM768],
        KeyExchange::HybridPreferred => vec![X25519MLKEM768, X25519, SECP256R1],
    };
    Arc::new(CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() })
}

/// For whoever is connected to. Keys are agreed anew on every connection: rustls calls no verifier where a
/// session is resumed, so a peer whose key was withdrawn would be let in for as long as its ticket lives; and
/// what opens the session would lie in memory for others to read.
///
/// # Errors
/// If the key cannot be used.
pub fn server_config(
    exchange: KeyExchange,
    clients: Arc<dyn ClientCertVerifier>,
    own: &TlsIdentity,
) -> Result<ServerConfig, CertsError> {
    let mut config = ServerConfig::builder_with_provider(provider(exchange))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(clients)
        .with_single_cert(own.shown(), own.key.clone_key())?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// For whoever connects, with a certificate of its own or without. Nothing is resumed: see [`server_config`].
///
/// # Errors
/// If the key cannot be used.
pub fn client_config(
    exchange: KeyExchange,
    server: Arc<dyn ServerCertVerifier>,
    own: Option<&TlsIdentity>,
) -> Result<ClientConfig, CertsError> {
    let builder = ClientConfig::builder_with_provider(provider(exchange))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(server);
    let mut config = match own {
        Some(own) => builder.with_client_auth_cert(own.shown(), own.key.clone_key())?,
        None => builder.with_no_client_auth(),
    };
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{generate, https_client, https_server};
    use quorum::Blob;
    use rustls::{ClientConnection, HandshakeKind, NamedGroup, ProtocolVersion, ServerConnection};

    fn identity() -> TlsIdentity {
        let own = generate("a", &["localhost".to_owned()], 2026).unwrap();
        TlsIdentity::from_pem(own.certificate_pem.as_bytes(), own.key_pem.as_bytes()).unwrap()
    }

    /// Both ends, until nothing more is to be said.
    pub(crate) fn handshake(
        client: &Arc<ClientConfig>,
        server: &Arc<ServerConfig>,
    ) -> Result<(ClientConnection, ServerConnection), rustls::Error> {
        let name = "localhost".try_into().unwrap();
        let mut client = ClientConnection::new(Arc::clone(client), name)?;
        let mut server = ServerConnection::new(Arc::clone(server))?;
        for _ in 0..8 {
            let mut wire = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut wire).unwrap();
            }
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                server.read_tls(&mut rest).unwrap();
                server.process_new_packets()?;
            }
            wire.clear();
            while server.wants_write() {
                server.write_tls(&mut wire).unwrap();
            }
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest).unwrap();
                client.process_new_packets()?;
            }
        }
        assert!(!client.is_handshaking() && !server.is_handshaking());
        Ok((client, server))
    }

    /// A client of somebody else's making, which knows these groups.
    fn stranger(
        pinned: &TlsIdentity,
        groups: Vec<&'static dyn rustls::crypto::SupportedKxGroup>,
    ) -> ClientConfig {
        let provider = Arc::new(CryptoProvider { kx_groups: groups, ..aws_lc_rs::default_provider() });
        let certificate = Blob(pinned.certificate().to_vec());
        let pin = crate::Pin { certificate, dated: true, provider: Arc::clone(&provider) };
        ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(pin))
            .with_no_client_auth()
    }

    #[test]
    fn our_own_links_agree_on_keys_by_the_hybrid() {
        let own = identity();
        let client = Arc::new(https_client(&Blob(own.certificate().to_vec())).unwrap());
        let server = Arc::new(https_server(&own).unwrap());
        let (client, server) = handshake(&client, &server).unwrap();
        let groups = [client.negotiated_key_exchange_group(), server.negotiated_key_exchange_group()];
        for group in groups {
            assert_eq!(group.unwrap().name(), NamedGroup::X25519MLKEM768);
        }
        assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        // At once: the share that is sent first is the one that is wanted.
        assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
    }

    #[test]
    fn who_lacks_the_hybrid_is_served_by_https_and_trusted_by_nobody() {
        use aws_lc_rs::kx_group::{SECP256R1, X25519};
        let own = identity();
        let server = Arc::new(https_server(&own).unwrap());
        for group in [X25519, SECP256R1] {
            let (client, _) = handshake(&Arc::new(stranger(&own, vec![group])), &server).unwrap();
            assert_eq!(client.negotiated_key_exchange_group().unwrap().name(), group.name());
        }
        // A server that can only do without it is none of ours.
        let provider = CryptoProvider { kx_groups: vec![X25519], ..aws_lc_rs::default_provider() };
        let old = ServerConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&server.cert_resolver));
        let client = Arc::new(https_client(&Blob(own.certificate().to_vec())).unwrap());
        assert!(handshake(&client, &Arc::new(old)).is_err());
    }

    #[test]
    fn nothing_is_resumed_on_either_side() {
        let own = identity();
        let server = Arc::new(https_server(&own).unwrap());
        let client = Arc::new(https_client(&Blob(own.certificate().to_vec())).unwrap());
        for _ in 0..3 {
            let (client, _) = handshake(&client, &server).unwrap();
            assert_eq!(client.handshake_kind(), Some(HandshakeKind::Full));
            assert_eq!(client.tls13_tickets_received(), 0, "a ticket is a key that lives on");
        }
        // A client that would resume with us is not given the means, and ours does not take them.
        let eager = Arc::new(stranger(&own, vec![aws_lc_rs::kx_group::X25519MLKEM768]));
        let mut generous = ServerConfig::clone(&server);
        generous.send_tls13_tickets = 2;
        generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
        let generous = Arc::new(generous);
        for _ in 0..3 {
            let (resumed, _) = handshake(&eager, &server).unwrap();
            assert_eq!(resumed.handshake_kind(), Some(HandshakeKind::Full));
            let (resumed, _) = handshake(&client, &generous).unwrap();
            assert_eq!(resumed.handshake_kind(), Some(HandshakeKind::Full));
        }
        // That the test can fail: these two do resume.
        handshake(&eager, &generous).unwrap();
        let (resumed, _) = handshake(&eager, &generous).unwrap();
        assert_eq!(resumed.handshake_kind(), Some(HandshakeKind::Resumed));
    }
}
