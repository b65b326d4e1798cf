//! Killing and starting any server, or all of them, loses nothing that was acknowledged.

use kds_client::{Consistency, LookupOptions};
use kds_tests::Cluster;
use kds_tests::load::Load;
use quorum::ServerId;
use quorum::record::Name;
use std::time::Duration;

async fn expect_all(cluster: &Cluster, names: &[Name], consistency: Consistency) {
    let client = cluster.fresh_client();
    let options = LookupOptions { consistency, ..LookupOptions::default() };
    for name in names {
        let found = client.lookup(name, &options).await.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(found.record.unwrap_or_else(|| panic!("{name} was acknowledged and is lost")).version, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_killed_one_after_the_other_and_all_at_once_under_load() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let secret = Name::new("the/secret").unwrap();
    cluster.client.put_secret(&cluster.administrator, &secret, b"keep me", &[], false, false).await.unwrap();
    let mut acknowledged = Vec::new();
    // Each in turn, the primary included: the others wait for it, and go on when it is back.
    for server in 0..4 {
        let load = Load::start(&cluster, &format!("one-{server}"), 8);
        tokio::time::sleep(Duration::from_millis(600)).await;
        cluster.kill(server);
        tokio::time::sleep(Duration::from_millis(600)).await;
        cluster.run(server).unwrap();
        tokio::time::sleep(Duration::from_millis(600)).await;
        let names = load.finish().await;
        assert!(names.len() > 5, "only {} registers went through", names.len());
        acknowledged.extend(names);
        cluster.ready().await.unwrap();
    }
    let load = Load::start(&cluster, "all", 8);
    tokio::time::sleep(Duration::from_millis(700)).await;
    (0..4).for_each(|server| cluster.kill(server));
    (0..4).for_each(|server| cluster.run(server).unwrap());
    tokio::time::sleep(Duration::from_millis(700)).await;
    acknowledged.extend(load.finish().await);
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();

    expect_all(&cluster, &acknowledged, Consistency::Row).await;
    // Every server has everything, by itself.
    let samples: Vec<_> = acknowledged.iter().step_by(acknowledged.len() / 40 + 1).collect();
    for server in 0..4 {
        let link = cluster.client.link(ServerId(server)).unwrap();
        for name in &samples {
            let path = format!("/v1/records/{}", name.as_str().replace('/', "%2F"));
            let (status, _) = link.send("GET", &path, vec![]).await.unwrap();
            assert_eq!(status, 200, "server {server} lacks {name}");
        }
        let status = cluster.client.server_status(ServerId(server)).await.unwrap();
        assert_eq!((status.secrets, status.shares), (1, 1), "server {server} lost its share");
    }
    let back = cluster.client.get_secret(&cluster.administrator, &secret).await.unwrap();
    assert_eq!(&**back.material, b"keep me");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_stops_cleanly_and_a_second_process_of_it_is_refused() {
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let second = std::process::Command::new(kds_tests::program("kds-server"))
        .arg("run")
        .arg("--config")
        .arg(cluster.server_dir(1).join("config.toml"))
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(kds_tests::stderr(&second).contains("another process runs this server already"));
    assert!(cluster.is_running(1));
    for server in 0..4 {
        cluster.terminate(server).unwrap();
        assert!(cluster.log(server).contains("stopped"), "{}", cluster.log(server));
        assert!(!cluster.log(server).contains("panicked"));
    }
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    expect_all(&cluster, &[Name::new("alice").unwrap()], Consistency::Row).await;
}

/// Two of nine are gone: in one column reads of rows go on; in two columns a write is durable but
/// not complete, and the client says so.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_but_not_complete_is_said_to_be_so() {
    let mut cluster = Cluster::start(9).await.unwrap();
    cluster.kill(5);
    cluster.kill(8);
    let written = cluster.register("one-column", 1).await.unwrap();
    assert!(
        written.complete
            || cluster
                .client
                .lookup(&Name::new("one-column").unwrap(), &LookupOptions::default())
                .await
                .unwrap()
                .complete
    );
    cluster.run(5).unwrap();
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(4);
    let written = cluster.register("two-columns", 1).await.unwrap();
    assert!(!written.complete, "columns 1 and 2 miss a server: only one column is full");
    let name = Name::new("two-columns").unwrap();
    let row = cluster.fresh_client().lookup(&name, &LookupOptions::default()).await;
    assert_eq!(row.unwrap_err().exit_status(), kds_client::ExitStatus::Unavailable);
    let options = LookupOptions { consistency: Consistency::Quorum, ..LookupOptions::default() };
    let found = cluster.fresh_client().lookup(&name, &options).await.unwrap();
    assert!(found.record.is_some() && !found.complete);
    // With its servers back the write becomes complete by itself.
    cluster.run(4).unwrap();
    cluster.run(8).unwrap();
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();
    let found = cluster.fresh_client().lookup(&name, &LookupOptions::default()).await.unwrap();
    assert!(found.complete);
}

/// The primary dies under load: the others replace it and go on; it comes back and catches up.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_primary_is_replaced() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "before-and-after", 8);
    tokio::time::sleep(Duration::from_millis(700)).await;
    cluster.kill(0);
    tokio::time::sleep(Duration::from_millis(6_000)).await;
    let acknowledged = load.finish().await;
    cluster.register("without-the-first-primary", 1).await.unwrap();
    let status = cluster.client.server_status(ServerId(1)).await.unwrap();
    assert!(status.view.0 >= 1, "the view did not change");
    expect_all(&cluster, &acknowledged, Consistency::Row).await;
    assert!(acknowledged.iter().any(|name| name.as_str().len() > 5));

    // The next one too, once the first is back.
    cluster.run(0).unwrap();
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();
    let view = cluster.client.server_status(ServerId(2)).await.unwrap().view;
    let primary = view.primary(4).index();
    cluster.kill(primary);
    cluster.register("without-the-second-primary", 1).await.unwrap();
    cluster.run(primary).unwrap();
    cluster.ready().await.unwrap();
    cluster.level().await.unwrap();
    expect_all(&cluster, &acknowledged, Consistency::Row).await;
}
