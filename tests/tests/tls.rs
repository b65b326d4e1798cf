//! TLS: of every link of a cluster, and between services that know each other by registered names.

use kds_certs::{KeyExchange, OwnCertificate};
use kds_client::quorum::record::{Entry, KeyMaterial, Name};
use kds_client::tls::{RegisteredPeers, TlsIdentity};
use kds_client::{Client, ClientError, Options, blocking};
use kds_tests::{Cluster, entry};
use quorum::Blob;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, HandshakeKind, NamedGroup, ProtocolVersion, ServerConfig};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Accepts any server: only the handshake is looked at.
#[derive(Debug)]
struct Anyone {
    provider: Arc<CryptoProvider>,
}

impl rustls::client::danger::ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    kds_certs::signature_checks!();
}

/// The group that a server chooses for somebody who offers these, in this order; and the version.
async fn chosen(address: &str, groups: Vec<&'static dyn SupportedKxGroup>) -> Result<NamedGroup, String> {
    let provider = Arc::new(CryptoProvider { kx_groups: groups, ..aws_lc_rs::default_provider() });
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone { provider }))
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(address).await.unwrap();
    // In TLS 1.3 a client is done before it hears that its certificate was refused.
    let stream = TlsConnector::from(Arc::new(config)).connect("localhost".try_into().unwrap(), tcp).await;
    let stream = stream.map_err(|error| error.to_string())?;
    let tls = stream.get_ref().1;
    assert_eq!(tls.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    Ok(tls.negotiated_key_exchange_group().unwrap().name())
}

/// The groups that the next one offers who connects, and whether he would resume a session.
fn offered(listener: std::net::TcpListener) -> tokio::task::JoinHandle<Vec<NamedGroup>> {
    tokio::task::spawn_blocking(move || {
        let (mut tcp, _) = listener.accept().unwrap();
        tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut hello = rustls::server::Acceptor::default();
        loop {
            hello.read_tls(&mut tcp).unwrap();
            if let Some(accepted) = hello.accept().map_err(|(error, _)| error).unwrap() {
                return accepted.client_hello().named_groups().unwrap().to_vec();
            }
        }
    })
}

/// Whoever records what is on the wires today, and has a quantum computer one day, reads nothing.
#[tokio::test(flavor = "multi_thread")]
async fn every_link_agrees_on_keys_by_the_post_quantum_hybrid() {
    use aws_lc_rs::kx_group::{SECP256R1, X25519, X25519MLKEM768};
    const HYBRID: NamedGroup = NamedGroup::X25519MLKEM768;
    let mut cluster = Cluster::start(4).await.unwrap();
    let https = |server: usize| cluster.manifest.servers[server].url.replace("https://", "");
    let peer = |server: usize| cluster.manifest.servers[server].peer.clone();

    // What servers choose, for clients and for servers.
    for groups in [vec![X25519MLKEM768, X25519], vec![X25519MLKEM768]] {
        assert_eq!(chosen(&https(0), groups.clone()).await.unwrap(), HYBRID);
        assert_eq!(chosen(&peer(0), groups).await.unwrap(), HYBRID);
    }
    // Programs that are not ours may have nothing better; servers of ours do.
    for group in [X25519, SECP256R1] {
        assert_eq!(chosen(&https(0), vec![group]).await.unwrap(), group.name());
        assert!(chosen(&peer(0), vec![group]).await.is_err());
    }
    let (first, second) = (https(0), peer(3));

    // What a client of ours makes of it.
    let tls = kds_certs::https_client(&cluster.manifest.servers[0].certificate).unwrap();
    let connector = TlsConnector::from(Arc::new(tls));
    for _ in 0..2 {
        let tcp = tokio::net::TcpStream::connect(&first).await.unwrap();
        let mut stream = connector.connect("localhost".try_into().unwrap(), tcp).await.unwrap();
        assert_eq!(stream.get_ref().1.negotiated_key_exchange_group().unwrap().name(), HYBRID);
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(HandshakeKind::Full), "nothing is resumed");
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(stream.get_ref().1.tls13_tickets_received(), 0);
    }

    // What the programs offer of their own accord: a server to a server, and the command line to a server.
    cluster.kill(3);
    let listener = bind(&second).await;
    assert_eq!(offered(listener).await.unwrap(), [HYBRID], "a server to another one");
    let listener = bind(&cluster.manifest.servers[3].url.replace("https://", "")).await;
    let hello = offered(listener);
    let output = cluster.cli(&["--timeout", "3s", "status"]);
    assert_eq!(hello.await.unwrap(), [HYBRID], "a client to a server");
    assert_eq!(kds_tests::status(&output), 0, "{}", kds_tests::stderr(&output));
}

/// The killed server's port may be in use for a moment.
async fn bind(address: &str) -> std::net::TcpListener {
    for _ in 0..200 {
        if let Ok(listener) = std::net::TcpListener::bind(address) {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{address} stays in use")
}

/// TLS 1.3 and nothing older, for programs that are not ours too.
#[tokio::test(flavor = "multi_thread")]
async fn tls_1_2_is_refused_and_curl_gets_in() {
    let cluster = Cluster::start(4).await.unwrap();
    let (url, peer) = (&cluster.manifest.servers[1].url, &cluster.manifest.servers[1].peer);
    let https = url.replace("https://", "");
    let s_client = |address: &str, version: &str| {
        let arguments = ["s_client", "-connect", address, version, "-brief"];
        let done = Command::new("openssl").args(arguments).stdin(std::process::Stdio::null()).output();
        let done = done.unwrap();
        (done.status.success(), kds_tests::stdout(&done) + &kds_tests::stderr(&done))
    };
    for address in [&https, peer] {
        let (done, text) = s_client(address, "-tls1_2");
        assert!(!done && text.contains("alert protocol version"), "{address}: {text}");
    }
    let (done, text) = s_client(&https, "-tls1_3");
    assert!(done && text.contains("TLSv1.3"), "{text}");
    let curl = |version: &[&str]| {
        let certificate = cluster.server_dir(1).join("tls.pem");
        let arguments = ["-sS", "--cacert", certificate.to_str().unwrap(), "--max-time", "10"];
        let url = format!("{url}/healthz");
        let done = Command::new("curl").args(arguments).args(version).arg(url).output().unwrap();
        (done.status.success(), kds_tests::stderr(&done))
    };
    assert_eq!(curl(&[]), (true, String::new()));
    assert_eq!(curl(&["--tlsv1.3"]), (true, String::new()));
    assert!(!curl(&["--tls-max", "1.2"]).0);
}

fn with_key(key: KeyMaterial) -> Entry {
    Entry { keys: vec![key], ..entry(1, None) }
}
fn own(host: &str) -> OwnCertificate {
    kds_certs::generate(host, &[host.to_owned()], 2026).unwrap()
}
fn identity(own: &OwnCertificate) -> TlsIdentity {
    TlsIdentity::from_pem(own.certificate_pem.as_bytes(), own.key_pem.as_bytes()).unwrap()
}
fn x509(own: &OwnCertificate) -> KeyMaterial {
    KeyMaterial { algorithm: "x509".into(), key: Blob(own.certificate.clone()) }
}
fn spki(own: &OwnCertificate) -> KeyMaterial {
    use x509_parser::prelude::FromDer as _;
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&own.certificate).unwrap();
    KeyMaterial { algorithm: "spki".into(), key: Blob(parsed.public_key().raw.to_vec()) }
}

const MAX_AGE: Duration = Duration::from_secs(2);
/// What a loaded machine may take on top.
const SLACK: Duration = Duration::from_secs(3);

/// A cluster, and two services: one is registered by its certificate, one by the key in it.
struct Services {
    cluster: Cluster,
    database: OwnCertificate,
    web: OwnCertificate,
}

impl Services {
    async fn start() -> Self {
        let cluster = Cluster::start(4).await.unwrap();
        let (database, web) = (own("db.example"), own("web.example"));
        for (who, key) in [("db.example", x509(&database)), ("web.example", spki(&web))] {
            cluster.client.register(&cluster.administrator, name(who), with_key(key)).await.unwrap();
        }
        Self { cluster, database, web }
    }
    fn options() -> Options {
        Options { max_age: MAX_AGE, timeout: Duration::from_secs(5), ..Options::default() }
    }
    fn peers(&self) -> RegisteredPeers {
        RegisteredPeers::new(Client::new(Arc::clone(&self.cluster.manifest), Self::options()).unwrap())
    }
    async fn revoke(&self, who: &str) {
        let revoked = self.cluster.client.revoke(&self.cluster.administrator, name(who), 1, "stolen".into());
        revoked.await.unwrap();
    }
}

/// What never comes is a failure too.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), work).await.expect("it does not end")
}

type Duplex = tokio::io::DuplexStream;
type Accepted = kds_client::tls::Connection<tokio_rustls::server::TlsStream<Duplex>>;
type Dialled = kds_client::tls::Connection<tokio_rustls::client::TlsStream<Duplex>>;

async fn connect(
    peers: &RegisteredPeers,
    server: &OwnCertificate,
    caller: &OwnCertificate,
    dialled: &str,
) -> (Result<Dialled, ClientError>, Result<Accepted, ClientError>) {
    let acceptor = peers.acceptor(&identity(server)).unwrap();
    let connector = peers.connector(Some(Arc::new(identity(caller))));
    let (one, other) = tokio::io::duplex(64 * 1024);
    let dialled = name(dialled);
    tokio::join!(connector.connect(&dialled, one), acceptor.accept(other))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_is_let_in_exactly_if_its_key_is_registered() {
    let services = Services::start().await;
    let (peers, thief) = (services.peers(), own("db.example"));
    let (database, web) = (&services.database, &services.web);
    let (dialled, accepted) = connect(&peers, database, web, "db.example").await;
    let (mut dialled, mut accepted) = (dialled.unwrap(), accepted.unwrap());
    assert_eq!((dialled.peer().as_str(), accepted.peer().as_str()), ("db.example", "web.example"));
    let group = dialled.get_ref().get_ref().1.negotiated_key_exchange_group();
    assert_eq!(group.unwrap().name(), NamedGroup::X25519MLKEM768);
    dialled.write_all(b"hello").await.unwrap();
    let mut heard = [0; 5];
    accepted.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"hello");

    // Another key; another name's key; no such name; no name of a host.
    for (server, dialled, why) in [
        (&thief, "db.example", "not one that is registered for db.example"),
        (database, "web.example", "not one that is registered for web.example"),
        (database, "unknown.example", "is not registered"),
        (database, "db.example/x", "not the name of a host"),
    ] {
        let (refused, accepted) = connect(&peers, server, web, dialled).await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
        assert!(accepted.is_err(), "{dialled}");
    }
    // A caller with another key, one of no name that is known, and one with two names.
    let two = kds_certs::generate("a", &["web.example".into(), "db.example".into()], 2026).unwrap();
    for (caller, why) in [
        (&thief, "not one that is registered for db.example"),
        (&own("unknown.example"), "is not registered"),
        (&two, "handshake"),
    ] {
        let (_, refused) = connect(&peers, database, caller, "db.example").await;
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    // Withdrawn: at the latest when what is known has become too old.
    services.revoke("db.example").await;
    tokio::time::sleep(MAX_AGE).await;
    let refused = connect(&peers, database, web, "db.example").await.0.unwrap_err().to_string();
    assert!(refused.contains("revoked"), "{refused}");
}

/// A connection outlives a revocation by `max_age` and no longer, whoever waits for whom.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_when_its_peer_is_revoked() {
    let services = Services::start().await;
    let peers = services.peers();
    let (dialled, accepted) = connect(&peers, &services.database, &services.web, "db.example").await;
    let (dialled, accepted) = (dialled.unwrap(), accepted.unwrap());
    let (told, ended) = (accepted.ended(), dialled.ended());
    // The caller waits to read and writes now and then, in two tasks; the database waits to read.
    let (mut reader, mut writer) = tokio::io::split(dialled);
    let mut accepted = accepted;
    let writing = tokio::spawn(async move {
        loop {
            if let Err(error) = writer.write_all(b"x").await {
                return error;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let waiting = tokio::spawn(async move { reader.read_u8().await.unwrap_err() });
    let heard = tokio::spawn(async move {
        let mut count = 0_u32;
        loop {
            match accepted.read_u8().await {
                Ok(_) => count += 1,
                Err(error) => return (count, error, accepted),
            }
        }
    });
    // It lasts for as long as both are registered.
    tokio::time::sleep(2 * MAX_AGE).await;
    assert!(!writing.is_finished() && !waiting.is_finished() && !heard.is_finished());
    services.revoke("db.example").await;
    let revoked = Instant::now();
    for error in [within(writing).await.unwrap(), within(waiting).await.unwrap()] {
        assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("revoked: stolen"), "{error}");
    }
    assert!(revoked.elapsed() < MAX_AGE + SLACK, "{:?}", revoked.elapsed());
    assert!(within(ended).await.contains("revoked: stolen"));
    // The other side still trusts the caller, and sees the connection end.
    let (count, error, accepted) = within(heard).await.unwrap();
    assert!(count > 20, "{count}");
    assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
    drop(accepted);
    assert!(within(told).await.contains("dropped"));
}

/// What cannot be confirmed any more is not relied on.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_ends_when_nobody_confirms_its_peer() {
    let services = Services::start().await;
    let peers = services.peers();
    let (dialled, accepted) = connect(&peers, &services.database, &services.web, "db.example").await;
    let (mut dialled, _accepted) = (dialled.unwrap(), accepted.unwrap());
    for server in [1, 2, 3] {
        services.cluster.signal(server, "STOP").unwrap();
    }
    let stopped = Instant::now();
    let error = within(dialled.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
    assert!(error.to_string().contains("not confirmed in time"), "{error}");
    assert!(stopped.elapsed() < MAX_AGE + SLACK, "{:?}", stopped.elapsed());
    for server in [1, 2, 3] {
        services.cluster.signal(server, "CONT").unwrap();
    }
}

/// rustls calls no verifier where a session is resumed: with the configurations that are shipped none is.
#[tokio::test(flavor = "multi_thread")]
async fn no_session_outlives_a_revocation() {
    let services = Services::start().await;
    let peers = services.peers();
    let accepts = Arc::new(peers.server_config(&identity(&services.database)).unwrap());
    let dials = Arc::new(peers.client_config(Some(&identity(&services.web))).unwrap());
    let handshake = async |dials: &Arc<ClientConfig>, accepts: &Arc<ServerConfig>| {
        let (one, other) = tokio::io::duplex(64 * 1024);
        let connector = TlsConnector::from(Arc::clone(dials));
        let acceptor = TlsAcceptor::from(Arc::clone(accepts));
        let dialled = connector.connect("db.example".try_into().unwrap(), one);
        let (dialled, accepted) = tokio::join!(dialled, acceptor.accept(other));
        let (mut dialled, mut accepted) = (dialled?, accepted?);
        accepted.write_all(b"x").await?;
        dialled.read_u8().await?;
        let kinds = [dialled.get_ref().1.handshake_kind(), accepted.get_ref().1.handshake_kind()];
        assert_eq!(kinds, [Some(HandshakeKind::Full); 2]);
        Ok::<_, std::io::Error>(dialled.get_ref().1.tls13_tickets_received())
    };
    // A thread of this runtime waits for nobody: names are at hand, or refused.
    let refused = handshake(&dials, &accepts).await.unwrap_err().to_string();
    assert!(refused.contains("RegisteredPeers::prepare"), "{refused}");
    let prepare = async || {
        for who in ["db.example", "web.example"] {
            peers.prepare(&name(who)).await.unwrap();
        }
    };
    prepare().await;
    // Whoever is ready to resume finds nothing to resume with.
    let mut eager = ClientConfig::clone(&dials);
    eager.resumption = rustls::client::Resumption::in_memory_sessions(8);
    let eager = Arc::new(eager);
    let mut generous = ServerConfig::clone(&accepts);
    generous.send_tls13_tickets = 2;
    generous.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    let generous = Arc::new(generous);
    for _ in 0..3 {
        assert_eq!(handshake(&dials, &accepts).await.unwrap(), 0);
        assert_eq!(handshake(&eager, &accepts).await.unwrap(), 0);
        handshake(&dials, &generous).await.unwrap();
    }
    for who in ["db.example", "web.example"] {
        services.revoke(who).await;
    }
    tokio::time::sleep(MAX_AGE + Duration::from_millis(500)).await;
    prepare().await;
    for (dials, accepts) in [(&dials, &accepts), (&eager, &accepts), (&dials, &generous)] {
        let refused = handshake(dials, accepts).await.unwrap_err().to_string();
        assert!(refused.contains("revoked"), "{refused}");
    }
}

/// Threads of programs without a runtime may wait, and not for long.
#[tokio::test(flavor = "multi_thread")]
async fn a_thread_waits_for_names_within_bounds() {
    let services = Services::start().await;
    let manifest = Arc::clone(&services.cluster.manifest);
    let (database, web) = (identity(&services.database), identity(&services.web));
    let once = move |dialled: &'static str| {
        let client = blocking::Client::new(Arc::clone(&manifest), Services::options()).unwrap();
        let peers = RegisteredPeers::blocking(client);
        let accepts = Arc::new(peers.server_config(&database).unwrap());
        let dials = Arc::new(peers.client_config(Some(&web)).unwrap());
        let mut client = rustls::ClientConnection::new(dials, dialled.try_into().unwrap()).unwrap();
        let mut server = rustls::ServerConnection::new(accepts).unwrap();
        for _ in 0..8 {
            let mut wire = Vec::new();
            client.write_tls(&mut wire).unwrap();
            server.read_tls(&mut wire.as_slice()).unwrap();
            server.process_new_packets()?;
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
        Ok::<_, rustls::Error>(!client.is_handshaking() && !server.is_handshaking())
    };
    let once = Arc::new(once);
    let on_a_thread = async |dialled: &'static str| {
        let (once, (done, result)) = (Arc::clone(&once), tokio::sync::oneshot::channel());
        std::thread::spawn(move || done.send(once(dialled)));
        result.await.unwrap()
    };
    assert_eq!(on_a_thread("db.example").await, Ok(true));
    assert!(on_a_thread("web.example").await.is_err());
    for server in 0..4 {
        services.cluster.signal(server, "STOP").unwrap();
    }
    let begun = Instant::now();
    let refused = on_a_thread("db.example").await.unwrap_err().to_string();
    assert!(refused.contains("could not be looked up within 2s"), "{refused}");
    assert!(begun.elapsed() < Duration::from_secs(2) + SLACK, "{:?}", begun.elapsed());
    for server in 0..4 {
        services.cluster.signal(server, "CONT").unwrap();
    }
}

/// Strangers choose the names in their certificates. However many of them come while servers hang, the runtime goes
/// on, and who was let in before is let in.
#[tokio::test]
async fn names_of_strangers_block_nobody() {
    let services = Services::start().await;
    let peers = services.peers();
    drop(connect(&peers, &services.database, &services.web, "db.example").await);
    for server in 0..4 {
        services.cluster.signal(server, "STOP").unwrap();
    }
    let acceptor = peers.acceptor(&identity(&services.database)).unwrap();
    let mut strangers = tokio::task::JoinSet::new();
    for number in 0..200 {
        let (acceptor, who) = (acceptor.clone(), own(&format!("stranger-{number}.example")));
        let dials = kds_certs::client_config(
            KeyExchange::Hybrid,
            Arc::new(Anyone { provider: kds_certs::provider(KeyExchange::Hybrid) }),
            Some(&identity(&who)),
        );
        let connector = TlsConnector::from(Arc::new(dials.unwrap()));
        strangers.spawn(async move {
            let (one, other) = tokio::io::duplex(64 * 1024);
            let dialled = connector.connect("db.example".try_into().unwrap(), one);
            let (_dialled, accepted) = tokio::join!(dialled, acceptor.accept(other));
            accepted.map(drop).unwrap_err().to_string()
        });
    }
    // One thread serves everybody here.
    let mut longest = Duration::ZERO;
    tokio::time::sleep(Duration::from_millis(500)).await;
    for _ in 0..50 {
        let begun = Instant::now();
        tokio::time::sleep(Duration::from_millis(10)).await;
        longest = longest.max(begun.elapsed());
    }
    assert!(longest < Duration::from_millis(700), "the runtime stood still for {longest:?}");
    assert!(!strangers.is_empty(), "they wait for servers that hang");
    for server in 0..4 {
        services.cluster.signal(server, "CONT").unwrap();
    }
    // Those who were let in before wait for no stranger.
    let begun = Instant::now();
    let (dialled, accepted) = loop {
        let (dialled, accepted) = connect(&peers, &services.database, &services.web, "db.example").await;
        if let (Ok(dialled), Ok(accepted)) = (dialled, accepted) {
            break (dialled, accepted);
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "nobody is let in");
    };
    assert_eq!((dialled.peer().as_str(), accepted.peer().as_str()), ("db.example", "web.example"));
    while let Some(refused) = strangers.join_next().await {
        let refused = refused.unwrap();
        assert!(
            ["not registered", "answered in time", "within"].iter().any(|why| refused.contains(why)),
            "{refused}"
        );
    }
}

/// `examples/peers.rs` does what it says.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_works() {
    let services = Services::start().await;
    let folder = services.cluster.dir();
    for (who, own) in [("db.example", &services.database), ("web.example", &services.web)] {
        std::fs::write(folder.join(format!("{who}.pem")), &own.certificate_pem).unwrap();
        std::fs::write(folder.join(format!("{who}.key")), own.key_pem.as_bytes()).unwrap();
    }
    let program = kds_tests::program("examples/peers");
    let manifest = folder.join("manifest.toml");
    let run = || Command::new(&program).arg(folder).env("KDS_MANIFEST", &manifest).output().unwrap();
    let output = run();
    assert_eq!(kds_tests::status(&output), 0, "{}", kds_tests::stderr(&output));
    assert_eq!(kds_tests::stdout(&output), "db.example says: hello web.example\n");
    services.revoke("web.example").await;
    let output = run();
    assert!(kds_tests::stderr(&output).contains("revoked: stolen"), "{}", kds_tests::stderr(&output));
}
