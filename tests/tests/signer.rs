//! The identity key is where its server is not: in a process of its own, under a user of its own.
//!
//! They read other processes' memory, and one of them starts programs as other users, which takes root.

use kds_client::api::TroubleKind;
use kds_client::keystore::{self, SecretKind};
use kds_tests::{Cluster, program, thief};
use quorum::codec::decode;
use quorum::ids::{AttemptId, Epoch, ServerId};
use quorum::message::PeerMessage;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

/// Users that nobody else is.
const SIGNERS: u32 = 51_001;
const SERVERS: u32 = 51_002;
const STRANGERS: u32 = 51_003;

async fn epoch(cluster: &Cluster, server: u8) -> Epoch {
    cluster.client.server_status(ServerId(server)).await.map_or(Epoch(0), |status| status.epoch)
}

/// Waits until a server is in an epoch, with all its shares.
async fn reach(cluster: &Cluster, server: u8, from: Epoch) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = cluster.client.server_status(ServerId(server)).await;
        let there = |s: &kds_client::api::ServerStatus| s.epoch >= from && s.shares == s.secrets;
        if status.as_ref().is_ok_and(there) {
            return;
        }
        assert!(Instant::now() < deadline, "{status:?}\n{}", cluster.log(server.into()));
        sleep(Duration::from_millis(50)).await;
    }
}

fn children_of(process: u32) -> Vec<u32> {
    let path = format!("/proc/{process}/task/{process}/children");
    // Of its main thread; others may start processes too.
    let mut all = std::fs::read_to_string(path).unwrap_or_default();
    for task in std::fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        all += " ";
        all += &std::fs::read_to_string(task.unwrap().path().join("children")).unwrap_or_default();
    }
    all.split_whitespace().map(|id| id.parse().unwrap()).collect()
}

fn knows(process: u32, seed: &[u8; 32]) -> bool {
    thief::memory(process).unwrap().windows(32).any(|window| window == seed)
}

/// Without any configuration: the server's own memory never has the key, and its signer ends with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_starts_a_signer_that_ends_with_it() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=2"]).await.unwrap();
    reach(&cluster, 1, Epoch(2)).await;
    let path = cluster.server_dir(1).join("identity.key");
    let seed = *keystore::read_signing_key(&path, SecretKind::IdentityKey, None).unwrap().seed();
    let server = cluster.process(1).unwrap();
    let signer = *children_of(server).first().expect("it has a signer");
    assert!(!knows(server, &seed), "the server's memory has the identity key");
    assert!(knows(signer, &seed), "this looks at the wrong process");
    cluster.kill(1);
    let deadline = Instant::now() + Duration::from_secs(10);
    while Path::new(&format!("/proc/{signer}/exe")).exists() {
        assert!(Instant::now() < deadline, "the signer outlives its server");
        sleep(Duration::from_millis(20)).await;
    }
    let counter = counter(&cluster, 1);
    assert!(
        counter["serial"].as_u64() >= Some(6) && counter["begun"]["epoch"].as_u64() >= Some(1),
        "{counter}"
    );
    cluster.run(1).unwrap();
    let now = epoch(&cluster, 0).await;
    reach(&cluster, 1, now.next()).await;

    // And a server without its signer is none: it ends, and says why, for whoever started it.
    let signer = *children_of(cluster.process(1).unwrap()).first().expect("it has a signer");
    Command::new("kill").args(["-9", &signer.to_string()]).status().unwrap();
    let deadline = Instant::now() + Duration::from_secs(15);
    while cluster.is_running(1) {
        assert!(Instant::now() < deadline, "it goes on without a signer:\n{}", cluster.log(1));
        sleep(Duration::from_millis(50)).await;
    }
    assert!(cluster.log(1).contains("this server has no signer"), "{}", cluster.log(1));
}

/// What a server's signer remembers.
fn counter(cluster: &Cluster, server: usize) -> serde_json::Value {
    let counter = std::fs::read(cluster.server_dir(server).join("signer.state")).unwrap();
    serde_json::from_slice(&counter).unwrap()
}

/// A signer that is not told that an epoch has begun certifies keys of the last one, and a thief tells it nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_signer_knows_at_once_that_an_epoch_has_begun() {
    let cluster = Cluster::start_with(4, &["--epoch-seconds=6"]).await.unwrap();
    for wanted in 1..4 {
        reach(&cluster, 1, Epoch(wanted)).await;
        // The first certificate of the epoch, and one look at it.
        sleep(Duration::from_millis(1_500)).await;
        for server in 0..4 {
            let counter = counter(&cluster, server);
            assert!(counter["begun"]["epoch"].as_u64() >= Some(wanted), "server {server}: {counter}");
        }
    }
}

fn as_user(program: &Path, user: u32) -> Command {
    let mut command = Command::new(program);
    command.uid(user).gid(user).stdin(Stdio::null()).current_dir("/");
    command
}

/// A child that is killed when the test ends.
struct Running(Child);
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As operators run it: the server's user cannot read the key, and the signer answers nobody else. While the
/// signer is away its server falls behind the epochs, and comes back by itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_identity_key_belongs_to_another_user() {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("not tested here: this needs the right to start programs as other users (root)");
        return;
    }
    let mut cluster = Cluster::new(4, &["--epoch-seconds=2"]).unwrap();
    // Others may look into the folder; the programs are copied there, since they may not look into ours.
    let open = |path: &Path| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    };
    let folder = cluster.dir().to_path_buf();
    open(&folder);
    let kds_server = folder.join("kds-server");
    std::fs::copy(program("kds-server"), &kds_server).unwrap();
    let (own, signers) = (cluster.server_dir(0), folder.join("signer-0"));
    std::fs::create_dir(&signers).unwrap();
    let identity = signers.join("identity.key");
    std::fs::rename(own.join("identity.key"), &identity).unwrap();
    chown(&identity, Some(SIGNERS), Some(SIGNERS)).unwrap();
    chown(&signers, Some(SIGNERS), Some(SIGNERS)).unwrap();
    let socket = signers.join("socket");
    let config = std::fs::read_to_string(own.join("config.toml")).unwrap();
    std::fs::write(own.join("config.toml"), format!("{config}signer = \"{}\"\n", socket.display())).unwrap();
    for entry in std::fs::read_dir(&own).unwrap() {
        chown(entry.unwrap().path(), Some(SERVERS), Some(SERVERS)).unwrap();
    }
    chown(&own, Some(SERVERS), Some(SERVERS)).unwrap();

    let start_signer = || {
        let mut command = as_user(&kds_server, SIGNERS);
        command.args(["signer", "--server", "0", "--allow-uid", &SERVERS.to_string(), "--manifest"]);
        command.arg(folder.join("manifest.toml")).arg("--folder").arg(&signers);
        Running(command.arg("--socket").arg(&socket).stdout(Stdio::null()).spawn().unwrap())
    };
    let signer = start_signer();
    let mut command = as_user(&kds_server, SERVERS);
    let log = std::fs::File::create(folder.join("log")).unwrap();
    let server =
        Running(command.args(["run", "--config"]).arg(own.join("config.toml")).stderr(log).spawn().unwrap());
    (1..4).for_each(|other| cluster.run(other).unwrap());
    cluster.ready().await.unwrap();
    reach(&cluster, 0, Epoch(2)).await;

    // Its user cannot read the key, nor is it in its memory; another user is not answered.
    let seed = *keystore::read_signing_key(&identity, SecretKind::IdentityKey, None).unwrap().seed();
    let read = as_user(Path::new("/bin/cat"), SERVERS).arg(&identity).stderr(Stdio::null()).output().unwrap();
    assert!(!read.status.success() && read.stdout.is_empty());
    assert!(!knows(server.0.id(), &seed) && knows(signer.0.id(), &seed));
    let thief_folder = folder.join("thief");
    std::fs::create_dir(&thief_folder).unwrap();
    for file in ["config.toml", "tls.key", "tls.pem"] {
        std::fs::copy(own.join(file), thief_folder.join(file)).unwrap();
        chown(thief_folder.join(file), Some(STRANGERS), Some(STRANGERS)).unwrap();
    }
    chown(&thief_folder, Some(STRANGERS), Some(STRANGERS)).unwrap();
    let config = std::fs::read_to_string(thief_folder.join("config.toml")).unwrap();
    let elsewhere = config.replace(&cluster.manifest.servers[0].url["https://".len()..], "127.0.0.1:0");
    let elsewhere = elsewhere.replace(&cluster.manifest.servers[0].peer, "127.0.0.1:0");
    std::fs::write(thief_folder.join("config.toml"), elsewhere).unwrap();
    let mut stranger = as_user(&kds_server, STRANGERS);
    let refused = stranger.args(["run", "--config"]).arg(thief_folder.join("config.toml")).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("the signer does not answer"), "{said}");

    // The signer is away for some epochs: the others go on, and its server cannot follow.
    drop(signer);
    let away = epoch(&cluster, 1).await;
    reach(&cluster, 1, Epoch(away.0 + 4)).await;
    let troubles = async || cluster.client.server_status(ServerId(0)).await.unwrap().troubles;
    assert_eq!(troubles().await[0].kind, TroubleKind::Signer);
    let _signer = start_signer();
    let now = epoch(&cluster, 1).await;
    reach(&cluster, 0, Epoch(now.0 + 2)).await;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !troubles().await.is_empty() {
        assert!(Instant::now() < deadline, "its signer is back");
        sleep(Duration::from_millis(100)).await;
    }
    // It takes part again: without one of the others nothing would go on otherwise.
    cluster.kill(3);
    let now = epoch(&cluster, 1).await;
    reach(&cluster, 0, Epoch(now.0 + 2)).await;
    cluster.register("alice", 1).await.unwrap();
}

/// What servers say to one who has a link key of server 1: how many messages, and how many contributions
/// to seeds among them.
async fn overheard(cluster: &Cluster, of: impl Fn(Epoch) -> Epoch, seconds: u64) -> (usize, usize) {
    let listener = TcpListener::bind(&cluster.manifest.servers[1].peer).await.unwrap();
    let (messages, dealings) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut links = JoinSet::new();
    while let Ok(Ok((tcp, _))) = timeout(until - Instant::now().min(until), listener.accept()).await {
        let of = AttemptId::first(of(epoch(cluster, 0).await));
        let identity = thief::link_identity(cluster.dir(), &cluster.manifest, ServerId(1), of).unwrap();
        let membership = quorum::Membership::genesis(Arc::clone(&cluster.manifest));
        let tls = kds_certs::peer_server(&membership, &identity).unwrap();
        let (messages, dealings) = (Arc::clone(&messages), Arc::clone(&dealings));
        links.spawn(async move {
            let Ok(mut stream) = TlsAcceptor::from(Arc::new(tls)).accept(tcp).await else { return };
            while let Ok(length) = stream.read_u32().await {
                let mut frame = vec![0; length as usize];
                if stream.read_exact(&mut frame).await.is_err() {
                    return;
                }
                let message: PeerMessage = decode(&frame).unwrap();
                messages.fetch_add(1, Ordering::SeqCst);
                dealings.fetch_add(usize::from(matches!(message, PeerMessage::Dealing(_))), Ordering::SeqCst);
            }
        });
    }
    links.shutdown().await;
    (messages.load(Ordering::SeqCst), dealings.load(Ordering::SeqCst))
}

/// A thief of a link key takes the place of its server, on the network too. What he took along before an attempt began
/// hears nothing of it: contributions go over links under keys that were drawn after that (design §7).
#[tokio::test(flavor = "multi_thread")]
async fn a_link_key_from_before_an_attempt_hears_no_secrets() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=2"]).await.unwrap();
    reach(&cluster, 0, Epoch(3)).await;
    cluster.kill(1);
    let (messages, dealings) = overheard(&cluster, Epoch::next, 8).await;
    assert!(messages > 0 && dealings > 0, "this test listens at the wrong place: {messages}, {dealings}");
    for back in [0, 3] {
        let old = |current: Epoch| Epoch(current.0.saturating_sub(back));
        let (messages, dealings) = overheard(&cluster, old, 8).await;
        assert!(messages > 0, "whoever slept must be helped to catch up");
        assert_eq!(dealings, 0, "with a key of {back} epochs ago");
    }
}
