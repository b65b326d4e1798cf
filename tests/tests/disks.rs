//! Disks that lie, forget and fail, and programs that look into files which are not theirs: a server recovers, or says what
//! to do; and nothing of an epoch that is over stays on the disk, however a process ended.

use kds_client::api::TroubleKind;
use kds_tests::load::Load;
use kds_tests::{Cluster, thief};
use quorum::ids::{Epoch, ServerId};
use quorum::record::Name;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Connection as _};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::sleep;

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(20)).await;
    }
}

fn id(server: usize) -> ServerId {
    ServerId(server as u8)
}

async fn put(cluster: &Cluster) {
    let name = Name::new("the/secret").unwrap();
    cluster.client.put_secret(&cluster.administrator, &name, b"keep me", &[], false, false).await.unwrap();
}

async fn epoch(cluster: &Cluster, server: usize) -> Epoch {
    cluster.client.server_status(id(server)).await.map_or(Epoch(0), |status| status.epoch)
}

/// It votes, and has its share.
async fn is_whole(cluster: &Cluster, server: usize) {
    cluster.ready().await.unwrap();
    until("its share is back", async || {
        cluster.client.server_status(id(server)).await.is_ok_and(|s| s.secrets == 1 && s.shares == 1)
    })
    .await;
}

/// Names of files in a server's folder that begin so.
fn files(folder: &Path, prefix: &str) -> Vec<String> {
    let names = std::fs::read_dir(folder).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter(|name| name.starts_with(prefix)).collect();
    names.sort();
    names
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

/// As README promises: such a server is simply started, under load, and a server is not needed for that.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_put_aside_and_everything_comes_back() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=3"]).await.unwrap();
    put(&cluster).await;
    let load = Load::start(&cluster, "load", 2);
    until("an epoch", async || epoch(&cluster, 1).await > Epoch(0)).await;
    let folder = cluster.server_dir(1);
    let damages: [fn(&mut Vec<u8>); 3] = [
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes[..100].fill(0),
        |bytes| bytes.chunks_mut(4_096).skip(1).for_each(|page| page[..16].fill(0xff)),
    ];
    for (round, damage) in damages.into_iter().enumerate() {
        // A log that was not written into the database yet would repair what it has.
        cluster.terminate(1).unwrap();
        let sound = std::fs::read(folder.join("kds.db")).unwrap();
        let copy = tempfile::tempdir().unwrap();
        thief::copy(&folder, copy.path()).unwrap();
        let loot = thief::read_out(copy.path(), &cluster.manifest.cluster_id(), id(1)).await.unwrap();
        assert!(loot.vault > 0, "this looks at the wrong file");
        change(&folder.join("kds.db"), damage);
        cluster.run(1).unwrap();
        until("it says what is wrong", async || {
            let status = cluster.client.server_status(id(1)).await;
            status.is_ok_and(|status| {
                status.recovering && status.troubles.iter().any(|t| t.kind == TroubleKind::LostDatabase)
            })
        })
        .await;
        is_whole(&cluster, 1).await;
        let log = cluster.log_since_start(1);
        assert!(log.contains("the database is damaged, and moved aside"), "{log}");
        assert!(
            log.contains("recovering: votes were forgotten"),
            "it votes although it has forgotten votes: {log}"
        );
        let kept = files(&folder, "kds.db.damaged-");
        let kept: Vec<_> = kept.iter().filter(|name| !name.ends_with("-wal")).collect();
        assert_eq!(kept.len(), (round + 1).min(2), "{kept:?}");
        // Nothing secret in it opens any more, with all that the folder has now.
        let copy = tempfile::tempdir().unwrap();
        thief::copy(&folder, copy.path()).unwrap();
        let _ = std::fs::remove_file(copy.path().join("kds.db-wal"));
        std::fs::write(copy.path().join("kds.db"), &sound).unwrap();
        let loot = thief::read_out(copy.path(), &cluster.manifest.cluster_id(), id(1)).await.unwrap();
        assert_eq!(loot.vault, 0, "what is kept still opens");
    }
    assert!(load.finish().await.len() > 20);
    // It is needed, and has all that it needs.
    cluster.kill(0);
    cluster.register("with-its-votes", 1).await.unwrap();
    let secret = Name::new("the/secret").unwrap();
    assert_eq!(
        &**cluster.client.get_secret(&cluster.administrator, &secret).await.unwrap().material,
        b"keep me"
    );
}

/// SQLite goes on from an older state without a word; the server does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_write_ahead_log_is_forgotten_votes() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=3"]).await.unwrap();
    put(&cluster).await;
    let load = Load::start(&cluster, "load", 2);
    sleep(Duration::from_secs(1)).await;
    let log = cluster.server_dir(2).join("kds.db-wal");
    cluster.kill(2);
    // It may have been emptied just then.
    while std::fs::metadata(&log).map_or(0, |log| log.len()) < 20_000 {
        cluster.run(2).unwrap();
        is_whole(&cluster, 2).await;
        sleep(Duration::from_millis(700)).await;
        cluster.kill(2);
    }
    change(&log, |bytes| bytes[5_000] ^= 1);
    cluster.run(2).unwrap();
    is_whole(&cluster, 2).await;
    let said = cluster.log_since_start(2);
    assert!(said.contains("the database has lost transactions"), "{said}");
    assert!(said.contains("recovering: votes were forgotten"), "{said}");
    load.finish().await;
}

/// Whoever opens the file is refused at once, and holds up nobody; and a server waits for one who was there before it.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_opens_the_database() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let folders: Vec<_> = (0..4).map(|server| cluster.server_dir(server)).collect();
    let database = |server: usize| {
        let path = folders[server].join("kds.db");
        SqliteConnectOptions::new().filename(path).busy_timeout(Duration::ZERO)
    };
    for server in 0..4 {
        let mut other = database(server).connect().await.unwrap();
        for wanted in
            ["SELECT count(*) FROM meta", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "PRAGMA wal_checkpoint"]
        {
            let refused = sqlx::raw_sql(wanted).execute(&mut other).await;
            assert!(refused.is_err_and(|why| why.to_string().contains("locked")), "{wanted}");
        }
    }
    let view = cluster.client.server_status(id(0)).await.unwrap().view;
    let mut slowest = Duration::ZERO;
    for i in 0..10 {
        let began = Instant::now();
        cluster.register(&format!("name-{i}"), 1).await.unwrap();
        slowest = slowest.max(began.elapsed());
    }
    assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    assert_eq!(cluster.client.server_status(id(0)).await.unwrap().view, view);

    cluster.terminate(3).unwrap();
    let mut other = database(3).connect().await.unwrap();
    sqlx::raw_sql("BEGIN; SELECT count(*) FROM meta").execute(&mut other).await.unwrap();
    cluster.run(3).unwrap();
    until("it says that it waits", async || {
        cluster.log_since_start(3).contains("cannot be opened yet: waiting")
    })
    .await;
    sleep(Duration::from_millis(500)).await;
    assert!(cluster.is_running(3));
    other.close().await.unwrap();
    cluster.ready().await.unwrap();
    let log = cluster.log_since_start(3);
    assert!(
        !log.contains("recovering") && files(&cluster.server_dir(3), "kds.db.damaged").is_empty(),
        "{log}"
    );
}

/// An error of the disk is no damage, whatever it keeps from being read.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_read_for_a_while_costs_no_database() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    let switch = cluster.with_switch(1, "KDS_FAIL_READ").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.kill(1);
    std::fs::write(&switch, b"").unwrap();
    cluster.run(1).unwrap();
    until("it says that it waits", async || {
        cluster.log_since_start(1).contains("cannot be opened yet: waiting")
    })
    .await;
    std::fs::remove_file(&switch).unwrap();
    cluster.ready().await.unwrap();
    let log = cluster.log_since_start(1);
    assert!(
        !log.contains("recovering") && files(&cluster.server_dir(1), "kds.db.damaged").is_empty(),
        "{log}"
    );
}

/// One key, one share file, and these are not the ones of before.
fn is_one_epochs(folder: &Path, before: &BTreeSet<String>) -> bool {
    let (keys, shares) = (files(folder, "storage-key-"), files(folder, "shares"));
    keys.len() == 1 && shares.len() == 1 && !before.contains(&keys[0])
}

/// Killed in the middle of erasing, at every step of it: what is left of the epoch before is gone before the server
/// answers anybody.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_erases_before_it_serves() {
    let mut cluster = Cluster::new(4, &["--epoch-seconds=3"]).unwrap();
    let switch = cluster.with_switch(2, "KDS_DIE_AT").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    put(&cluster).await;
    let folder = cluster.server_dir(2);
    let peer = cluster.manifest.servers[2].peer.clone();
    for moment in ["rename shares.new", "unlink shares-", "unlink storage-key-"] {
        is_whole(&cluster, 2).await;
        std::fs::write(&switch, moment).unwrap();
        until(moment, async || !cluster.is_running(2)).await;
        std::fs::remove_file(&switch).unwrap();
        let before: BTreeSet<_> = files(&folder, "storage-key-").into_iter().collect();
        assert_eq!(before.len(), 2, "{moment}: it did not die in between");
        cluster.run(2).unwrap();
        // Whoever comes first, and whoever comes next.
        let link = cluster.client.link(id(2)).unwrap();
        let client = async {
            while link.send("GET", "/healthz", vec![]).await.is_err() {
                sleep(Duration::from_millis(2)).await;
            }
            is_one_epochs(&folder, &before)
        };
        let server = async {
            while !is_answered(&peer).await {
                sleep(Duration::from_millis(2)).await;
            }
            is_one_epochs(&folder, &before)
        };
        assert_eq!(tokio::join!(client, server), (true, true), "{moment}: it serves before it has erased");
        let copy = tempfile::tempdir().unwrap();
        thief::copy(&folder, copy.path()).unwrap();
        let loot = thief::read_out(copy.path(), &cluster.manifest.cluster_id(), id(2)).await.unwrap();
        let epochs: BTreeSet<_> = loot.shares.keys().map(|(_, epoch)| *epoch).collect();
        assert!(epochs.len() <= 1, "{moment}: shares of {epochs:?}");
    }
    is_whole(&cluster, 2).await;
}

/// Whether a TLS server speaks there: to a ClientHello that it cannot like.
async fn is_answered(peer: &str) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let Ok(mut tcp) = tokio::net::TcpStream::connect(peer).await else { return false };
    if tcp.write_all(&[22, 3, 1, 0, 4, 1, 0, 0, 0]).await.is_err() {
        return false;
    }
    // An alert, or the end: until somebody accepts it, there is neither.
    tokio::time::timeout(Duration::from_millis(500), tcp.read_u8()).await.is_ok()
}

/// Told to stop while an epoch begins, with all that this takes still to do: what is left is of one epoch.
#[tokio::test(flavor = "multi_thread")]
async fn an_orderly_stop_leaves_one_epoch() {
    let mut cluster = Cluster::new(4, &["--epoch-seconds=3"]).unwrap();
    let switch = cluster.with_switch(1, "KDS_DIE_AT").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    put(&cluster).await;
    is_whole(&cluster, 1).await;
    let folder = cluster.server_dir(1);
    std::fs::write(&switch, "rename shares.new slowly").unwrap();
    until("it is between two epochs", async || files(&folder, "storage-key-").len() == 2).await;
    std::fs::remove_file(&switch).unwrap();
    cluster.terminate(1).unwrap();
    assert!(is_one_epochs(&folder, &BTreeSet::new()), "{:?}", files(&folder, "s"));
    let copy = tempfile::tempdir().unwrap();
    thief::copy(&folder, copy.path()).unwrap();
    let loot = thief::read_out(copy.path(), &cluster.manifest.cluster_id(), id(1)).await.unwrap();
    let epochs: BTreeSet<_> = loot.shares.keys().map(|(_, epoch)| *epoch).collect();
    assert_eq!(epochs.len(), 1, "shares of {epochs:?}");
    cluster.run(1).unwrap();
    is_whole(&cluster, 1).await;
}

/// What a start makes of a damaged file.
#[derive(Clone, Copy)]
enum Then {
    /// The server runs; its log says so, where there is something to say.
    Runs(&'static str),
    /// It does not start, and says what to do.
    Refuses(&'static str),
    /// The one or the other, by what is hit.
    Either,
}
use Then::{Either, Refuses, Runs};

/// Every file of a server's folder, by the beginning of its name; and what happens when it is emptied, cut in half, zeroed,
/// and has a flipped bit in its middle. docs/operations.md has the same table in words.
const FILES: &[(&str, [Then; 4])] = &[
    // A bit of an address or a path makes it another one.
    ("config.toml", [Refuses(BACKUP), Refuses(BACKUP), Refuses(BACKUP), Either]),
    ("identity.key", [Refuses(BACKUP); 4]),
    ("tls.key", [Refuses(BACKUP); 4]),
    ("tls.pem", [Refuses(BACKUP); 4]),
    ("storage.key", [Refuses(BACKUP); 4]),
    (
        "storage-key-",
        [
            Runs("shares cannot be read"),
            Runs("shares cannot be read"),
            Runs("shares cannot be read"),
            Refuses("remove it"),
        ],
    ),
    ("shares-", [Runs("shares cannot be read"); 4]),
    ("signer.state", [Refuses("move the file away"); 4]),
    ("kds.db-wal", [Runs("lost transactions"); 4]),
    // Pages that are in the log, too, are not missed.
    ("kds.db", [Runs("lost transactions"), Runs(""), Runs(""), Runs("")]),
    ("kds.count", [Runs(""); 4]),
    ("server.lock", [Runs(""); 4]),
    ("signer.lock", [Runs(""); 4]),
    // Of these tests.
    ("server.log", [Runs(""); 4]),
    ("attempt-key-", [Runs(""); 4]),
];
const BACKUP: &str = "from a backup";

#[tokio::test(flavor = "multi_thread")]
async fn whatever_file_is_damaged_the_server_recovers_or_says_what_to_do() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=3"]).await.unwrap();
    put(&cluster).await;
    until("an epoch", async || epoch(&cluster, 1).await > Epoch(0)).await;
    is_whole(&cluster, 1).await;
    cluster.register("alice", 1).await.unwrap();
    (0..4).for_each(|server| cluster.kill(server));
    let whole = tempfile::tempdir().unwrap();
    thief::copy(&cluster.server_dir(1), whole.path()).unwrap();
    let config = std::fs::read_to_string(whole.path().join("config.toml")).unwrap();
    let anywhere = config.lines().map(|line| match line.split_once(" = ") {
        Some((name @ ("listen_clients" | "listen_peers"), _)) => format!("{name} = \"127.0.0.1:0\"\n"),
        Some(("manifest", _)) => {
            format!("manifest = \"{}\"\n", cluster.dir().join("manifest.toml").display())
        }
        _ => format!("{line}\n"),
    });
    std::fs::write(whole.path().join("config.toml"), anywhere.collect::<String>()).unwrap();

    let damages: [fn(&mut Vec<u8>); 4] = [
        Vec::clear,
        |bytes| bytes.truncate(bytes.len() / 2),
        |bytes| bytes.fill(0),
        |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        },
    ];
    // By itself: a server that has forgotten where others go on would be one liar more.
    for name in files(whole.path(), "") {
        // The longest beginning that fits.
        let of = FILES
            .iter()
            .filter(|(prefix, _)| name.starts_with(prefix))
            .max_by_key(|(prefix, _)| prefix.len());
        let (_, outcomes) = of.unwrap_or_else(|| panic!("what if {name} is damaged?"));
        for (kind, then) in outcomes.iter().enumerate() {
            let folder = tempfile::tempdir().unwrap();
            thief::copy(whole.path(), folder.path()).unwrap();
            let path = folder.path().join(&name);
            if std::fs::metadata(&path).unwrap().len() < 2 {
                continue;
            }
            change(&path, damages[kind]);
            let what = format!("{name}, {}", ["emptied", "cut", "zeroed", "a bit"][kind]);
            let (runs, said) = started_alone(folder.path()).await;
            assert!(!said.contains("panicked"), "{what}: {said}");
            match then {
                Runs(says) => assert!(runs && said.contains(says), "{what}: {said}"),
                Refuses(advice) => assert!(!runs && said.contains(advice), "{what}: {said}"),
                Either => {}
            }
        }
    }
}

/// Starts a server in this folder; whether it runs, and what it said until then.
async fn started_alone(folder: &Path) -> (bool, String) {
    let log = std::fs::File::create(folder.join("said")).unwrap();
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700)).unwrap();
    let mut child = tokio::process::Command::new(kds_tests::program("kds-server"))
        .args(["run", "--config"])
        .arg(folder.join("config.toml"))
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let said = || String::from_utf8_lossy(&std::fs::read(folder.join("said")).unwrap()).into_owned();
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if child.try_wait().unwrap().is_some() {
            return (false, said());
        }
        if said().contains(" running") {
            child.kill().await.unwrap();
            return (true, said());
        }
        assert!(Instant::now() < deadline, "it neither runs nor ends: {}", said());
        sleep(Duration::from_millis(20)).await;
    }
}
