//! Real processes that are stopped, starved of disk, cut off, and slow: nothing acknowledged is lost, and
//! the others go on.

use kds_client::api::TroubleKind;
use kds_tests::faults::{Network, may_make_namespaces};
use kds_tests::load::Load;
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::ordering::Part;
use quorum::record::Name;
use std::time::{Duration, Instant};

async fn everyone_holds(cluster: &Cluster, names: &[Name]) {
    cluster.level().await.unwrap();
    for server in 0..4 {
        let link = cluster.client.link(ServerId(server)).unwrap();
        for name in names.iter().step_by(names.len() / 20 + 1) {
            let path = format!("/v1/records/{}", name.as_str().replace('/', "%2F"));
            let (status, _) = link.send("GET", &path, vec![]).await.unwrap();
            assert_eq!(status, 200, "server {server} lacks {name}");
        }
    }
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(40);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A primary that hangs is no better than a dead one; and when it goes on where it stood, in a view that
/// is over, it does no harm.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_hangs_is_replaced_and_does_no_harm_when_it_wakes_up() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "load", 8);
    let mut primary = 0;
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        cluster.signal(primary, "STOP").unwrap();
        let other = ServerId((primary as u8 + 1) % 4);
        let before = cluster.client.server_status(other).await.unwrap().view;
        until("another view", async || {
            cluster.client.server_status(other).await.is_ok_and(|status| status.view > before)
        })
        .await;
        let executed = cluster.client.server_status(other).await.unwrap().sequence;
        until("progress without it", async || {
            cluster.client.server_status(other).await.is_ok_and(|s| s.sequence.0 > executed.0 + 20)
        })
        .await;
        cluster.signal(primary, "CONT").unwrap();
        primary = cluster.client.server_status(other).await.unwrap().view.primary(4).index();
    }
    let names = load.finish().await;
    assert!(names.len() > 100);
    cluster.ready().await.unwrap();
    everyone_holds(&cluster, &names).await;
    assert!((0..4).all(|server| cluster.is_running(server)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_one_server_until_there_is_room() {
    if !may_make_namespaces() {
        return;
    }
    let mut cluster = Cluster::new(4, &[]).unwrap();
    cluster.on_small_disk(2, "3m");
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    let load = Load::start(&cluster, "load", 8);
    until("the disk is full", async || cluster.log(2).contains("the disk is full")).await;
    let link = cluster.client.link(ServerId(2)).unwrap();
    let (status, body) = link.send("GET", "/readyz", vec![]).await.unwrap();
    assert_eq!(status, 503);
    assert!(String::from_utf8_lossy(&body).contains("the disk is full"));
    // The others go on.
    let before = cluster.client.server_status(ServerId(0)).await.unwrap().sequence;
    until("progress", async || {
        cluster.client.server_status(ServerId(0)).await.is_ok_and(|s| s.sequence.0 > before.0 + 50)
    })
    .await;
    cluster.resize_disk(2, "200m").unwrap();
    cluster.ready().await.unwrap();
    let names = load.finish().await;
    everyone_holds(&cluster, &names).await;
    assert!(cluster.is_running(2));
}

/// A flush that fails is tried again, with everything that it was for, and nothing leaves meanwhile; the server says so. One
/// that goes on failing ends the process.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_flushes_fail_stops_voting_until_they_work() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    let switch = cluster.with_switch(1, "KDS_FAIL_FSYNC").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    let load = Load::start(&cluster, "load", 4);
    tokio::time::sleep(Duration::from_millis(500)).await;
    std::fs::write(&switch, b"").unwrap();
    until("it notices", async || cluster.log(1).contains("this server stops voting")).await;
    let link = cluster.client.link(ServerId(1)).unwrap();
    assert_eq!(link.send("GET", "/readyz", vec![]).await.unwrap().0, 503);
    // Everything that it says of itself says so.
    let status = cluster.client.server_status(ServerId(1)).await.unwrap();
    assert_eq!((status.part, status.troubles[0].kind), (Part::Stopped, TroubleKind::Storage));
    let (_, metrics) = link.send("GET", "/metrics", vec![]).await.unwrap();
    assert!(String::from_utf8_lossy(&metrics).lines().any(|line| line == "kds_votes 0"));
    let before = cluster.client.server_status(ServerId(0)).await.unwrap().sequence;
    until("progress without it", async || {
        cluster.client.server_status(ServerId(0)).await.is_ok_and(|s| s.sequence.0 > before.0 + 50)
    })
    .await;
    // Its votes would be needed now, and do not leave; and then they do.
    cluster.signal(2, "STOP").unwrap();
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    let stuck = cluster.client.server_status(ServerId(0)).await.unwrap().certified;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(cluster.client.server_status(ServerId(0)).await.unwrap().certified, stuck);
    std::fs::remove_file(&switch).unwrap();
    until("progress with it", async || {
        cluster.client.server_status(ServerId(0)).await.is_ok_and(|s| s.certified.0 > stuck.0 + 5)
    })
    .await;
    cluster.signal(2, "CONT").unwrap();
    cluster.ready().await.unwrap();
    let names = load.finish().await;
    everyone_holds(&cluster, &names).await;
    assert!(cluster.is_running(1) && cluster.log(1).contains("the database can be written again"));
    cluster.kill(2);
    cluster.register("with-its-votes", 1).await.unwrap();
    cluster.run(2).unwrap();
    cluster.ready().await.unwrap();

    std::fs::write(&switch, b"").unwrap();
    until("it ends", async || !cluster.is_running(1)).await;
    let log = cluster.log_since_start(1);
    assert!(log.contains("the database could not be written for 20 s"), "{log}");
    std::fs::remove_file(&switch).unwrap();
    cluster.run(1).unwrap();
    cluster.ready().await.unwrap();
    assert!(!cluster.log_since_start(1).contains("recovering"), "nothing was lost");
}

/// Servers in network namespaces of their own: the primary is cut off, then two at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_parts_and_heals_loses_nothing() {
    if !may_make_namespaces() {
        return;
    }
    let number = 100 + (std::process::id() % 100) as u8;
    let network = Network::new(4, number).unwrap();
    let hosts = Network::hosts(number, 4).join(",");
    let mut cluster = Cluster::new(4, &["--host", &hosts, "--base-port", "7440"]).unwrap();
    for server in 0..4 {
        cluster.start_through(server, network.enter(server));
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    let load = Load::start(&cluster, "load", 6);
    tokio::time::sleep(Duration::from_millis(700)).await;

    network.cut(0, true).unwrap();
    let status = async |server| cluster.client.server_status(ServerId(server)).await;
    until("a view without the first primary", async || status(1).await.is_ok_and(|s| s.view.0 >= 1)).await;
    let before = status(1).await.unwrap().sequence;
    until("progress", async || status(1).await.is_ok_and(|s| s.sequence.0 > before.0 + 20)).await;

    // Two of four: nobody may go on.
    network.cut(1, true).unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let stuck = status(2).await.unwrap().certified;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert_eq!(status(2).await.unwrap().certified, stuck, "a minority goes on by itself");

    network.cut(0, false).unwrap();
    network.cut(1, false).unwrap();
    until("progress again", async || status(2).await.is_ok_and(|s| s.certified.0 > stuck.0 + 20)).await;
    let names = load.finish().await;
    cluster.ready().await.unwrap();
    everyone_holds(&cluster, &names).await;
    cluster
        .client
        .register(&cluster.administrator, Name::new("after").unwrap(), entry(1, None))
        .await
        .unwrap();
}
