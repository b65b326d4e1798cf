//! Whoever can reach a port, with nothing in hand, and a server that closes every link at once.

use kds_tests::{Cluster, thief};
use quorum::ids::{AttemptId, Epoch, ServerId};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

async fn epoch(cluster: &Cluster) -> Epoch {
    cluster.client.server_status(ServerId(0)).await.map_or(Epoch(0), |status| status.epoch)
}

/// 200 connections to each of two servers that never say a word, and come back when they are closed. Links are made
/// anew all the time, so they would end within an epoch if strangers took their places.
#[tokio::test(flavor = "multi_thread")]
async fn silent_strangers_at_the_peer_ports_stop_nothing() {
    let cluster = Cluster::start_with(4, &["--epoch-seconds=4"]).await.unwrap();
    let mut strangers = JoinSet::new();
    let connected = Arc::new(AtomicUsize::new(0));
    for server in [0, 1] {
        for _ in 0..200 {
            let (peer, connected) = (cluster.manifest.servers[server].peer.clone(), Arc::clone(&connected));
            strangers.spawn(async move {
                loop {
                    if let Ok(mut tcp) = TcpStream::connect(&peer).await {
                        connected.fetch_add(1, Ordering::Relaxed);
                        let _ = tcp.read(&mut [0; 1]).await;
                    }
                    sleep(Duration::from_millis(500)).await;
                }
            });
        }
    }
    sleep(Duration::from_secs(1)).await;
    let (from, start) = (epoch(&cluster).await, Instant::now());
    let mut written = 0;
    while epoch(&cluster).await < Epoch(from.0 + 4) {
        let name = format!("name-{written}");
        let write = timeout(Duration::from_secs(8), cluster.register(&name, 1)).await;
        write.expect("writes stop").unwrap();
        written += 1;
        assert!(start.elapsed() < Duration::from_secs(90), "epochs stop");
        sleep(Duration::from_millis(100)).await;
    }
    assert!(connected.load(Ordering::Relaxed) > 1_000, "too few strangers came: this tests nothing");
    for server in [0, 1] {
        let log = cluster.log(server);
        let told = log.lines().filter(|line| line.contains("handshake")).count();
        assert!((1..10).contains(&told), "{told} lines about strangers:\n{log}");
        let status = cluster.client.server_status(ServerId(server as u8)).await.unwrap();
        assert_eq!(status.peers_connected, 3, "server {server} has lost links");
    }
}

/// It has the right key, and ends every link as soon as that is up: it is not dialled at its pace, and fills no log.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_closes_every_link_is_dialled_seldom() {
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.kill(3);
    let before = cluster.log(0).len();
    let listener = TcpListener::bind(&cluster.manifest.servers[3].peer).await.unwrap();
    let of = AttemptId::first(epoch(&cluster).await);
    let identity = thief::link_identity(cluster.dir(), &cluster.manifest, ServerId(3), of).unwrap();
    let membership = quorum::Membership::genesis(Arc::clone(&cluster.manifest));
    let tls = TlsAcceptor::from(Arc::new(kds_certs::peer_server(&membership, &identity).unwrap()));
    let (mut shaken, until) = (0, Instant::now() + Duration::from_secs(10));
    while let Ok(Ok((tcp, _))) = timeout(until - Instant::now().min(until), listener.accept()).await {
        if let Ok(mut stream) = tls.accept(tcp).await {
            shaken += 1;
            let _ = stream.read(&mut [0; 1]).await;
        }
    }
    // Three servers, once a second after the first few.
    assert!((9..60).contains(&shaken), "{shaken} links in ten seconds");
    let log = cluster.log(0).split_off(before);
    assert!(log.lines().count() < 20, "{log}");
    cluster.register("alice", 1).await.unwrap();
}
