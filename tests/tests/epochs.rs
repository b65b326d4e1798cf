//! Epochs with real servers: everything secret is renewed, nothing old is left, and whoever lost its
//! shares gets them back.

use kds_client::ExitStatus;
use kds_client::keystore::Passphrase;
use kds_tests::thief::{self, Loot};
use kds_tests::{Cluster, stdout};
use quorum::ids::{Epoch, ServerId};
use quorum::record::Name;
use quorum::shamir::{ServerShare, reconstruct};
use quorum::{SecretBytes, oprf, scalars};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};
use tokio::time::sleep;

async fn put(cluster: &Cluster, name: &str, material: &[u8]) -> u64 {
    let name = Name::new(name).unwrap();
    cluster.client.put_secret(&cluster.administrator, &name, material, &[], false, false).await.unwrap().index
}

async fn put_behind(cluster: &Cluster, name: &str) -> u64 {
    let (name, passphrase) = (Name::new(name).unwrap(), Passphrase::new("open sesame"));
    let (client, key) = (&cluster.client, &cluster.administrator);
    client.put_secret_behind(key, &name, b"x", &[], (&passphrase, 9), false, false).await.unwrap().index
}

async fn get(cluster: &Cluster, name: &str) -> Vec<u8> {
    let name = Name::new(name).unwrap();
    cluster.client.get_secret(&cluster.administrator, &name).await.unwrap().material.to_vec()
}

async fn epoch(cluster: &Cluster, server: usize) -> Epoch {
    cluster.client.server_status(ServerId(server as u8)).await.unwrap().epoch
}

/// Waits until every server of these has all its shares, of an epoch from this one on.
async fn whole(cluster: &Cluster, servers: &[usize], from: Epoch) {
    let deadline = Instant::now() + Duration::from_secs(60);
    for server in servers {
        loop {
            let status = cluster.client.server_status(ServerId(*server as u8)).await;
            let whole = status.as_ref().is_ok_and(|status| {
                status.epoch >= from && status.secrets > 0 && status.shares == status.secrets
            });
            if whole {
                break;
            }
            assert!(Instant::now() < deadline, "server {server}: {status:?}\n{}", cluster.log(*server));
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Reads out a server within one epoch: its files and its memory.
async fn steal(cluster: &Cluster, server: usize) -> (Loot, Vec<u8>) {
    let id = ServerId(server as u8);
    loop {
        let before = epoch(cluster, server).await;
        // Past the seal: a server that is read out while shares change counts in both epochs.
        sleep(Duration::from_millis(900)).await;
        let copy = tempfile::tempdir().unwrap();
        thief::copy(&cluster.server_dir(server), copy.path()).unwrap();
        let memory = thief::memory(cluster.process(server).unwrap()).unwrap();
        if epoch(cluster, server).await != before {
            continue;
        }
        let loot = thief::read_out(copy.path(), &cluster.manifest.cluster_id(), id).await.unwrap();
        if loot.epoch == before && loot.shares.keys().any(|(_, epoch)| *epoch == before) {
            return (loot, memory);
        }
    }
}

/// What an adversary knows of one secret: shares, each with the server and the epoch that it is of.
#[derive(Default)]
struct Adversary(BTreeSet<(ServerId, Epoch, [u8; 32])>);

impl Adversary {
    fn take(&mut self, server: usize, index: u64, loot: &Loot) {
        let shares = loot.shares.iter().filter(|((secret, _), _)| *secret == index);
        self.0.extend(shares.map(|((_, epoch), share)| (ServerId(server as u8), *epoch, *share)));
    }
    /// Whether any k of them, of whatever epochs, give the key that was committed to; for a secret behind a
    /// passphrase the key of the function, with which she could try passphrases by herself.
    async fn learns(&self, cluster: &Cluster, name: &str) -> bool {
        let (secret, _) = cluster.client.secret(&Name::new(name).unwrap()).await.unwrap().unwrap();
        let (thresholds, id) = (cluster.manifest.thresholds, cluster.manifest.cluster_id());
        let mut choices: Vec<BTreeMap<ServerId, [u8; 32]>> = vec![BTreeMap::new()];
        for (server, _, share) in &self.0 {
            let with = choices.iter().filter(|choice| choice.len() < thresholds.k());
            let with = with.filter(|choice| !choice.contains_key(server)).cloned();
            let with: Vec<_> = with.map(|mut choice| (choice.insert(*server, *share), choice).1).collect();
            choices.extend(with);
        }
        choices.into_iter().filter(|choice| choice.len() == thresholds.k()).any(|choice| {
            if let Some(passphrase) = &secret.passphrase {
                let points: Vec<_> = choice.iter().map(|(i, share)| (i.share_index(), share)).collect();
                let key = scalars::decode(scalars::interpolate(&points, 0).expose()).unwrap();
                return oprf::public_half(&key) == passphrase.key;
            }
            let share = |(server, share)| ServerShare { server, share: SecretBytes::new(&share) };
            let shares: Vec<_> = choice.into_iter().map(share).collect();
            let (k, f) = (thresholds.k(), thresholds.f());
            reconstruct(&id, &secret.commitment, k, f, &shares, &mut rand::rng()).is_ok()
        })
    }
}

/// k−1 servers are read out in every epoch, others in the next: files, write-ahead log, keys, memory. All
/// of that together never gives the secret; nor does a server's memory or disk have anything of an epoch
/// that is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_mobile_adversary_learns_nothing() {
    let cluster = Cluster::start_with(4, &["--epoch-seconds=3"]).await.unwrap();
    let index = put(&cluster, "s", b"what she wants").await;
    let behind = put_behind(&cluster, "p").await;
    whole(&cluster, &[0, 1, 2, 3], Epoch(1)).await;
    let (mut adversary, mut guesser) = (Adversary::default(), Adversary::default());
    let mut last: BTreeMap<(usize, u64), (Epoch, [u8; 32])> = BTreeMap::new();
    let mut epochs = BTreeSet::new();
    for round in 0..7 {
        let server = (round * 3) % 4;
        let (loot, memory) = steal(&cluster, server).await;
        assert!(epochs.insert(loot.epoch), "two servers of one epoch are more than k−1");
        let known: Vec<_> = loot.shares.keys().copied().collect();
        let both = [(index, loot.epoch), (behind, loot.epoch)];
        assert_eq!(known, both, "server {server} still has shares of an earlier epoch");
        assert_eq!(loot.keys, 1, "server {server} still has an old storage key");
        for index in [index, behind] {
            let share = loot.shares[&(index, loot.epoch)];
            let holds = |share: &[u8; 32]| memory.windows(32).any(|window| window == share);
            assert!(holds(&share), "this looks at the wrong memory");
            if let Some((epoch, old)) = last.insert((server, index), (loot.epoch, share)) {
                assert_ne!(old, share);
                assert!(!holds(&old), "server {server}'s memory still has its share of epoch {epoch}");
            }
        }
        adversary.take(server, index, &loot);
        guesser.take(server, behind, &loot);
        let next = loot.epoch.next();
        whole(&cluster, &[0, 1, 2, 3], next).await;
    }
    assert_eq!((adversary.0.len(), guesser.0.len()), (7, 7));
    assert!(!adversary.learns(&cluster, "s").await);
    assert!(!guesser.learns(&cluster, "p").await);
    assert_eq!(get(&cluster, "s").await, b"what she wants");
    let (one, _) = steal(&cluster, 0).await;
    let (other, _) = steal(&cluster, 1).await;
    // No share stands in clear in any file of any server.
    for server in 0..4 {
        for entry in std::fs::read_dir(cluster.server_dir(server)).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap_or_default();
            for share in one.shares.values().chain(other.shares.values()) {
                let found = bytes.windows(32).any(|window| window == share);
                assert!(!found, "{} has a share in clear", path.display());
            }
        }
    }
}

/// The same adversary where refresh is off, and where servers leave old shares in their files.
#[tokio::test(flavor = "multi_thread")]
async fn without_refresh_or_with_old_shares_left_she_learns_everything() {
    let cluster = Cluster::start_with(4, &["--epoch-seconds=86400"]).await.unwrap();
    let index = put(&cluster, "s", b"what she wants").await;
    let behind = put_behind(&cluster, "p").await;
    let (mut adversary, mut guesser) = (Adversary::default(), Adversary::default());
    for server in [0, 3] {
        assert!(!adversary.learns(&cluster, "s").await && !guesser.learns(&cluster, "p").await);
        let (loot, _) = steal(&cluster, server).await;
        adversary.take(server, index, &loot);
        guesser.take(server, behind, &loot);
    }
    assert!(adversary.learns(&cluster, "s").await);
    assert!(guesser.learns(&cluster, "p").await);
    drop(cluster);

    let cluster = Cluster::start_with(4, &["--epoch-seconds=3"]).await.unwrap();
    let index = put(&cluster, "s", b"what she wants").await;
    whole(&cluster, &[0, 1, 2, 3], Epoch(1)).await;
    // What a server that erases nothing would still have of an epoch when she comes in the next one.
    let left_over = tempfile::tempdir().unwrap();
    let (first, _) = loop {
        let before = epoch(&cluster, 2).await;
        sleep(Duration::from_millis(300)).await;
        thief::copy(&cluster.server_dir(2), left_over.path()).unwrap();
        let stolen = steal(&cluster, 1).await;
        if stolen.0.epoch == before {
            break stolen;
        }
    };
    let old = thief::read_out(left_over.path(), &cluster.manifest.cluster_id(), ServerId(2)).await.unwrap();
    let mut adversary = Adversary::default();
    adversary.take(1, index, &first);
    assert!(!adversary.learns(&cluster, "s").await);
    adversary.take(2, index, &old);
    assert!(adversary.learns(&cluster, "s").await);
}

/// A server sleeps, another loses its whole disk but its keys: both end with the shares that they would
/// have had, and secrets can be read from them. Then all are killed at once, and come back by themselves.
#[tokio::test(flavor = "multi_thread")]
async fn lost_shares_come_back_and_so_does_everything_after_a_total_outage() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=2"]).await.unwrap();
    for i in 0..5 {
        put(&cluster, &format!("s{i}"), format!("material {i}").as_bytes()).await;
    }
    // Asleep for some epochs.
    cluster.kill(1);
    let asleep = epoch(&cluster, 0).await;
    while epoch(&cluster, 0).await.0 < asleep.0 + 2 {
        sleep(Duration::from_millis(100)).await;
    }
    put(&cluster, "meanwhile", b"deposited without it").await;
    cluster.run(1).unwrap();
    whole(&cluster, &[1], asleep.next()).await;
    sleep(Duration::from_millis(500)).await;
    let log = cluster.log_since_start(1);
    assert!(log.contains("all missing shares are recovered"), "{log}");

    cluster.kill(2);
    let keep = ["config.toml", "identity.key", "signer.state", "storage.key", "tls.key", "tls.pem"];
    for entry in std::fs::read_dir(cluster.server_dir(2)).unwrap() {
        let path = entry.unwrap().path();
        if !keep.iter().any(|name| path.ends_with(name)) && path.is_file() {
            std::fs::remove_file(path).unwrap();
        }
    }
    cluster.run(2).unwrap();
    let now = epoch(&cluster, 0).await;
    whole(&cluster, &[2], now.next()).await;

    // A bit of the third one's share file flips.
    cluster.kill(3);
    let shares = std::fs::read_dir(cluster.server_dir(3)).unwrap().map(|entry| entry.unwrap().path());
    let shares = shares.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("shares-"));
    for path in shares.collect::<Vec<_>>() {
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
    }
    cluster.run(3).unwrap();
    let now = epoch(&cluster, 0).await;
    whole(&cluster, &[3], now.next()).await;
    assert!(cluster.log_since_start(3).contains("some of this server's shares cannot be read"));

    // They can give secrets by themselves.
    cluster.kill(0);
    for i in 0..5 {
        assert_eq!(get(&cluster, &format!("s{i}")).await, format!("material {i}").as_bytes());
    }
    assert_eq!(get(&cluster, "meanwhile").await, b"deposited without it");
    cluster.run(0).unwrap();

    // A total outage, whatever they were doing.
    for round in 0..3 {
        sleep(Duration::from_millis(700 * round)).await;
        (0..4).for_each(|server| cluster.kill(server));
        // Three of them are enough; the fourth comes later.
        (0..3).for_each(|server| cluster.run(server).unwrap());
        let began = Instant::now();
        loop {
            let name = Name::new("s0").unwrap();
            if cluster.client.get_secret(&cluster.administrator, &name).await.is_ok() {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "the secret does not come back");
        }
        cluster.run(3).unwrap();
        let now = epoch(&cluster, 0).await;
        whole(&cluster, &[0, 1, 2, 3], now.next()).await;
    }
    for i in 0..5 {
        assert_eq!(get(&cluster, &format!("s{i}")).await, format!("material {i}").as_bytes());
    }
}

/// Secrets are put and read all the time while epochs change every second; nobody notices.
#[tokio::test(flavor = "multi_thread")]
async fn an_epoch_that_changes_is_not_seen_by_clients() {
    let cluster = Cluster::start_with(4, &["--epoch-seconds=1"]).await.unwrap();
    let (began, from) = (Instant::now(), epoch(&cluster, 0).await);
    let mut rounds = 0;
    while began.elapsed() < Duration::from_secs(12) {
        let material = format!("material {rounds}");
        put(&cluster, &format!("s{rounds}"), material.as_bytes()).await;
        let old = rounds / 2;
        assert_eq!(get(&cluster, &format!("s{old}")).await, format!("material {old}").as_bytes());
        rounds += 1;
    }
    let epochs = epoch(&cluster, 0).await.0 - from.0;
    assert!(epochs >= 5 && rounds >= 20, "{rounds} rounds in {epochs} epochs");
    // Status says so.
    let status = cluster.cli(&["status", "--json"]);
    let status: serde_json::Value = serde_json::from_str(&stdout(&status)).unwrap();
    assert!(status["epoch"].as_u64().unwrap() >= epochs);
    assert!(status["last_refresh_seconds"].as_f64().unwrap() < 10.0, "{status}");
    // A secret that was deleted is gone, in this epoch and the next.
    let name = Name::new("s0").unwrap();
    cluster.client.delete_secret(&cluster.administrator, &name).await.unwrap();
    let gone = cluster.client.get_secret(&cluster.administrator, &name).await.unwrap_err();
    assert_eq!(gone.exit_status(), ExitStatus::NotFound);
}
