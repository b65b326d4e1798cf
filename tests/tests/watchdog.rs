//! Proactive recovery: watchdogs restart one server after the other, and nobody notices.

use kds_client::{Consistency, LookupOptions};
use kds_tests::Cluster;
use quorum::ids::{ServerId, Timestamp};
use quorum::record::Name;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// A watchdog that is killed leaves its server running: nothing of this test may.
struct Cleanup(PathBuf);
impl Drop for Cleanup {
    fn drop(&mut self) {
        let _ = Command::new("pkill").args(["-9", "-f"]).arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_are_restarted_in_turn_while_the_cluster_serves() {
    let mut cluster = Cluster::new(4, &["--epoch-seconds=2"]).unwrap();
    let _cleanup = Cleanup(cluster.dir().to_path_buf());
    for server in 0..4 {
        cluster.run_as(server, &["guard", "--period-seconds=24"]).unwrap();
    }
    cluster.ready().await.unwrap();
    let secret = Name::new("s").unwrap();
    cluster.client.put_secret(&cluster.administrator, &secret, b"kept", &[], false, false).await.unwrap();
    cluster.register("known", 1).await.unwrap();

    let mut starts: BTreeMap<ServerId, BTreeSet<Timestamp>> = BTreeMap::new();
    let (began, mut rounds, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    let enough = |starts: &BTreeMap<ServerId, BTreeSet<Timestamp>>| {
        starts.values().filter(|s| s.len() > 1).count() == 4
    };
    while !enough(&starts) {
        assert!(began.elapsed() < Duration::from_secs(120), "not all had their turn: {starts:?}");
        let round = Instant::now();
        let options = LookupOptions { consistency: Consistency::Quorum, ..LookupOptions::default() };
        let found = cluster.fresh_client().lookup(&Name::new("known").unwrap(), &options).await.unwrap();
        assert!(found.record.is_some());
        cluster.register(&format!("during-{rounds}"), 1).await.unwrap();
        if rounds % 8 == 0 {
            let back = cluster.client.get_secret(&cluster.administrator, &secret).await.unwrap();
            assert_eq!(&**back.material, b"kept");
        }
        slowest = slowest.max(round.elapsed());
        rounds += 1;
        let mut away = 0;
        for server in (0..4).map(ServerId) {
            match cluster.client.server_status(server).await {
                Ok(status) => {
                    starts.entry(server).or_default().extend(status.started);
                }
                Err(_) => away += 1,
            }
        }
        assert!(away <= 1, "{away} servers are away at a time");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // A primary that is restarted has to be replaced, or waited for.
    assert!(slowest < Duration::from_secs(12), "{slowest:?}");
    assert!(rounds > 10, "{rounds}");
    for server in 0..4 {
        assert!(cluster.log(server).contains("is restarted, as it is its turn"));
        cluster.terminate(server).unwrap();
    }
}
