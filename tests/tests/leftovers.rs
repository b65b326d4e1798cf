//! What a thief finds in a server after the moment at which it has to be gone: in its memory, on its disk, in what others
//! have recorded.
//!
//! The tests know everything that was secret: shares of every epoch, contributions and the seeds made of them, keys that open
//! deposits, storage keys, and what each link between servers was encrypted with. They look for all of it in every page that a
//! server's process can write to, and in every byte of its files.

use kds_client::keystore::Passphrase;
use kds_tests::Cluster;
use kds_tests::thief::{self, Loot, Wanted};
use quorum::ids::{Epoch, ServerId};
use quorum::record::Name;
use quorum::refresh::{Dealing, Seeds};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Until contributions are erased: two seconds after the seal by agreed time and by a server's own, at most; the files
/// then, and new links.
const ERASED_AFTER: Duration = Duration::from_millis(4_500);

async fn epoch(cluster: &Cluster, server: usize) -> Epoch {
    cluster.client.server_status(ServerId(server as u8)).await.unwrap().epoch
}

/// Waits until a server is in another epoch than this.
async fn leave(cluster: &Cluster, server: usize, last: Epoch) -> Epoch {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = epoch(cluster, server).await;
        if now != last {
            return now;
        }
        assert!(Instant::now() < deadline, "epoch {last} does not end\n{}", cluster.log(server));
        sleep(Duration::from_millis(50)).await;
    }
}

async fn read_out(cluster: &Cluster, server: usize) -> Loot {
    let copy = tempfile::tempdir().unwrap();
    thief::copy(&cluster.server_dir(server), copy.path()).unwrap();
    thief::read_out(copy.path(), &cluster.manifest.cluster_id(), ServerId(server as u8)).await.unwrap()
}

fn memory(cluster: &Cluster, server: usize) -> Vec<u8> {
    thief::memory(cluster.process(server).unwrap()).unwrap()
}

/// Every set of dealers that can have been agreed on gives other seeds: all of them are looked for.
fn want_seeds(wanted: &mut Wanted, cluster: &Cluster, all: &[Loot], of: Epoch) {
    let thresholds = cluster.manifest.thresholds;
    for (server, loot) in all.iter().enumerate() {
        let dealings = loot.dealings.iter().filter(|((attempt, _), _)| attempt.epoch == of);
        let dealings: Vec<_> =
            dealings.map(|((attempt, dealer), dealing)| (*attempt, *dealer, dealing)).collect();
        for choice in 0u32..1 << dealings.len() {
            let chosen = dealings.iter().enumerate().filter(|(place, _)| choice & (1 << place) != 0);
            let chosen: Vec<(ServerId, &Dealing)> =
                chosen.map(|(_, (_, dealer, dealing))| (*dealer, *dealing)).collect();
            if chosen.len() < thresholds.k().max(thresholds.f() + 1) {
                continue;
            }
            let attempt = dealings[0].0;
            let seeds = Seeds::new(cluster.manifest.cluster_id(), thresholds, attempt, true, None);
            if let Some(terms) = seeds.zero_sharing(ServerId(server as u8), &chosen) {
                for seed in thief::seeds(&terms) {
                    wanted.add(&seed, format!("a seed of epoch {of}"));
                }
            }
        }
    }
}

/// In every epoch, as soon as what led to it has to be gone, neither memory nor disk of any server has anything of that or of
/// the epoch before, and no key is left to what was recorded of it.
async fn nothing_is_left(servers: usize, epochs: usize) {
    // Time to look at all of them.
    let mut cluster = Cluster::new(servers, &[&format!("--epoch-seconds={}", 5 + servers)]).unwrap();
    let logs: Vec<PathBuf> =
        (0..servers).map(|server| cluster.dir().join(format!("links-{server}"))).collect();
    for (server, log) in logs.iter().enumerate() {
        cluster.start_through(server, ["env".to_owned(), format!("SSLKEYLOGFILE={}", log.display())]);
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    let (client, key) = (&cluster.client, &cluster.administrator);
    let index = |name| Name::new(name).unwrap();
    client.put_secret(key, &index("s"), b"what she wants", &[], false, false).await.unwrap();
    let passphrase = Passphrase::new("open sesame");
    client.put_secret_behind(key, &index("p"), b"x", &[], (&passphrase, 9), false, false).await.unwrap();

    // What has to be gone: from the last epochs, and what the present one began with.
    let mut wanted = Wanted::default();
    // As dealt: where whoever looks away from them looks first.
    let mut alive = Vec::new();
    for server in 0..servers {
        alive.push(read_out(&cluster, server).await);
    }
    let mut now = epoch(&cluster, 0).await;
    let mut opened = 0;
    for _ in 0..epochs {
        let last = now;
        now = leave(&cluster, servers - 1, last).await;
        let sealed = Instant::now();
        // What is alive in an epoch is not wanted in the next.
        for loot in &alive {
            loot.shares.values().for_each(|share| wanted.add(share, format!("a share of epoch {last}")));
            for (epoch, seed) in loot.openings.iter().filter(|(epoch, _)| **epoch < now) {
                wanted.add(seed, format!("the seed of a key that opens deposits of epoch {epoch}"));
            }
            loot.storage_keys
                .iter()
                .for_each(|(name, key)| wanted.add(key, format!("{name} of epoch {last}")));
        }
        let mut all = Vec::new();
        for server in 0..servers {
            all.push(read_out(&cluster, server).await);
        }
        let mut contributions = BTreeSet::new();
        for loot in &all {
            for ((attempt, _), dealing) in
                loot.dealings.iter().filter(|((attempt, _), _)| attempt.epoch == now)
            {
                contributions.extend(thief::contributions(dealing));
                let _ = attempt;
            }
            let attempts = loot.storage_keys.iter().filter(|(name, _)| name.starts_with("attempt-key"));
            attempts.for_each(|(name, key)| wanted.add(key, name.clone()));
        }
        assert!(!contributions.is_empty(), "no contributions were found while they are kept");
        contributions.iter().for_each(|value| wanted.add(value, format!("a contribution to epoch {now}")));
        want_seeds(&mut wanted, &cluster, &all, now);
        for (name, secret) in logs.iter().flat_map(|log| thief::link_secrets(log)) {
            wanted.add(&secret, name);
        }
        // The thief looks at what is there.
        let found = wanted.found_in(&memory(&cluster, 0)).len();
        assert!(
            found > 0,
            "this looks at the wrong memory: contributions and keys of links are there for now"
        );

        sleep(ERASED_AFTER.saturating_sub(sealed.elapsed())).await;
        alive.clear();
        for server in 0..servers {
            let (pages, loot) = (memory(&cluster, server), read_out(&cluster, server).await);
            assert_eq!(epoch(&cluster, server).await, now, "this takes longer than an epoch");
            let left = wanted.found_in(&pages);
            assert!(left.is_empty(), "the memory of server {server} has, in epoch {now}: {left:#?}");
            for entry in std::fs::read_dir(cluster.server_dir(server)).unwrap() {
                let path = entry.unwrap().path();
                let left = wanted.found_in(&std::fs::read(&path).unwrap_or_default()).len();
                assert_eq!(left, 0, "{} has secrets in clear", path.display());
            }
            for sealed in all.iter().flat_map(|loot| &loot.sealed_dealings) {
                opened += usize::from(all.iter().any(|then| then.opens(sealed)));
                assert!(
                    !loot.opens(sealed),
                    "server {server} still has the key to contributions that it deleted"
                );
            }
            let mut current = Wanted::default();
            loot.shares.values().for_each(|share| current.add(share, "a share"));
            assert_eq!(current.found_in(&pages).len(), 1, "this looks at the wrong memory");
            assert_eq!(loot.storage_keys.len(), 1, "{:?}", loot.storage_keys.keys());
            alive.push(loot);
        }
    }
    assert!(opened > 0, "contributions were never found in a database");
    assert!(wanted.len() > epochs * servers * 10, "only {} secrets were looked for", wanted.len());
    let material = cluster.client.get_secret(&cluster.administrator, &index("s")).await.unwrap().material;
    assert_eq!(&**material, b"what she wants");
}

/// `KDS_LEFTOVERS=9,10`: nine servers, ten epochs.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_an_epoch_is_left_in_the_next() {
    let wanted = std::env::var("KDS_LEFTOVERS").unwrap_or_else(|_| "4,4".into());
    let (servers, epochs) = wanted.split_once(',').expect("servers and epochs");
    nothing_is_left(servers.parse().unwrap(), epochs.parse().unwrap()).await;
}
