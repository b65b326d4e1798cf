//! Servers that lost their memory, or hold a wrong state, get it back from the others before they
//! vote, while the others go on.

use kds_client::{Consistency, LookupOptions};
use kds_tests::load::Load;
use kds_tests::{Cluster, entry};
use quorum::ServerId;
use quorum::ordering::Part;
use quorum::record::Name;
use sqlx::{Connection as _, SqliteConnection};
use std::time::{Duration, Instant};

/// Less than an epoch, of which it would take one to vote and another one to have its shares.
const BACK_IN: Duration = Duration::from_secs(20);

/// Waits until a server that was just started votes again; says whether it had to recover first.
async fn votes_again(cluster: &Cluster, server: usize) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let since = cluster.log_since_start(server);
        if since.contains("this server votes executed=") {
            cluster.ready().await.unwrap();
            let status = cluster.client.server_status(ServerId(server as u8)).await.unwrap();
            assert_eq!(status.part, Part::Voting);
            return since.contains("recovering: votes were forgotten");
        }
        assert!(Instant::now() < deadline, "server {server} does not vote again:\n{since}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Every acknowledged name is at this one server, by its own proof.
async fn holds_all(cluster: &Cluster, server: usize, names: &[Name]) {
    cluster.level().await.unwrap();
    let link = cluster.client.link(ServerId(server as u8)).unwrap();
    for name in names.iter().step_by(names.len() / 30 + 1) {
        let path = format!("/v1/records/{}", name.as_str().replace('/', "%2F"));
        let (status, _) = link.send("GET", &path, vec![]).await.unwrap();
        assert_eq!(status, 200, "server {server} lacks {name}");
    }
}

/// The others need this server's votes: with another one gone, writes go on only with it.
async fn is_needed_and_works(cluster: &mut Cluster, server: usize) {
    let other = (server + 1) % 4;
    cluster.kill(other);
    cluster.register("with-its-votes", 1).await.unwrap();
    cluster.run(other).unwrap();
}

fn database_files(cluster: &Cluster, server: usize) -> Vec<std::path::PathBuf> {
    ["kds.db", "kds.db-wal", "kds.db-shm"].map(|name| cluster.server_dir(server).join(name)).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_whose_disk_is_lost_gets_its_state_from_the_others() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "before", 8);
    tokio::time::sleep(Duration::from_secs(3)).await;
    cluster.kill(2);
    for file in database_files(&cluster, 2) {
        let _ = std::fs::remove_file(file);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.run(2).unwrap();
    assert!(votes_again(&cluster, 2).await, "it votes although it may have forgotten votes");
    let names = load.finish().await;
    assert!(names.len() > 100, "{}", names.len());
    assert!(cluster.log(2).contains("the database is gone"));
    holds_all(&cluster, 2, &names).await;
    is_needed_and_works(&mut cluster, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_is_noticed_and_brought_up_to_date_before_it_votes() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "first", 4);
    tokio::time::sleep(Duration::from_millis(800)).await;
    let mut names = load.finish().await;
    cluster.terminate(1).unwrap();
    let database = cluster.server_dir(1).join("kds.db");
    let backup = cluster.dir().join("backup.db");
    std::fs::copy(&database, &backup).unwrap();
    cluster.run(1).unwrap();
    cluster.ready().await.unwrap();
    let load = Load::start(&cluster, "second", 4);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    cluster.kill(1);
    for file in database_files(&cluster, 1) {
        let _ = std::fs::remove_file(file);
    }
    std::fs::copy(&backup, &database).unwrap();
    cluster.run(1).unwrap();
    assert!(votes_again(&cluster, 1).await, "a restored backup votes");
    names.extend(load.finish().await);
    assert!(cluster.log(1).contains("the database is an older copy"), "{}", cluster.log(1));
    holds_all(&cluster, 1, &names).await;
    is_needed_and_works(&mut cluster, 1).await;
}

/// On a quiet cluster whose epochs have the usual length: it asks for the next epoch, in which nothing that it forgot matters,
/// and gets its shares with it. So writes go on when another server stops a moment later.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_of_a_quiet_cluster_votes_and_has_its_shares_within_seconds() {
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.terminate(2).unwrap();
    let folder = cluster.server_dir(2);
    let backup = cluster.dir().join("backup.db");
    std::fs::copy(folder.join("kds.db"), &backup).unwrap();
    cluster.run(2).unwrap();
    cluster.ready().await.unwrap();
    for i in 0..4 {
        let name = Name::new(format!("secret-{i}")).unwrap();
        cluster.client.put_secret(&cluster.administrator, &name, b"x", &[], false, false).await.unwrap();
    }
    cluster.kill(2);
    for file in database_files(&cluster, 2) {
        let _ = std::fs::remove_file(file);
    }
    for file in std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()) {
        if file.file_name().unwrap().to_str().unwrap().starts_with("shares-") {
            std::fs::remove_file(file).unwrap();
        }
    }
    std::fs::copy(&backup, folder.join("kds.db")).unwrap();
    cluster.run(2).unwrap();
    let (started, mut voted) = (Instant::now(), None);
    loop {
        let status = cluster.client.server_status(ServerId(2)).await;
        let votes = status.as_ref().is_ok_and(|status| status.part == Part::Voting);
        if votes {
            voted.get_or_insert(started.elapsed());
        }
        if votes && status.as_ref().is_ok_and(|status| status.secrets == 4 && status.shares == 4) {
            break;
        }
        let log = || cluster.log_since_start(2);
        assert!(started.elapsed() < BACK_IN, "it voted after {voted:?}; {status:?}\n{}", log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("it votes after {voted:?}, and has its shares after {:?}", started.elapsed());
    assert!(cluster.log_since_start(2).contains("recovering: votes were forgotten"));
    is_needed_and_works(&mut cluster, 2).await;
    for i in 0..4 {
        let name = Name::new(format!("secret-{i}")).unwrap();
        let back = cluster.client.get_secret(&cluster.administrator, &name).await.unwrap();
        assert_eq!(&back.material[..], b"x");
    }
}

/// A plain kill is no amnesia: the server votes again at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_remembers_its_votes() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "load", 4);
    for server in [1, 0, 3] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.kill(server);
        cluster.run(server).unwrap();
        assert!(!votes_again(&cluster, server).await);
    }
    load.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_database_is_repaired_from_the_others() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let load = Load::start(&cluster, "before", 8);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    cluster.terminate(3).unwrap();
    let url = format!("sqlite://{}", cluster.server_dir(3).join("kds.db").display());
    let mut database = SqliteConnection::connect(&url).await.unwrap();
    let flipped = sqlx::query("UPDATE leaves SET value = x'00' WHERE key = (SELECT key FROM leaves WHERE hex(key) LIKE '6E2F%' LIMIT 1)")
        .execute(&mut database)
        .await
        .unwrap();
    assert_eq!(flipped.rows_affected(), 1);
    database.close().await.unwrap();
    cluster.run(3).unwrap();
    assert!(votes_again(&cluster, 3).await);
    let names = load.finish().await;
    assert!(cluster.log(3).contains("the database is damaged"), "{}", cluster.log(3));
    holds_all(&cluster, 3, &names).await;
    // Everything is as it was before, also on its disk.
    cluster.kill(3);
    cluster.run(3).unwrap();
    assert!(!votes_again(&cluster, 3).await);
    let options = LookupOptions { consistency: Consistency::Quorum, ..LookupOptions::default() };
    cluster.kill(0);
    for name in names.iter().step_by(names.len() / 10 + 1) {
        assert!(cluster.fresh_client().lookup(name, &options).await.unwrap().record.is_some());
    }
    cluster
        .client
        .register(&cluster.administrator, Name::new("after").unwrap(), entry(1, None))
        .await
        .unwrap();
}
