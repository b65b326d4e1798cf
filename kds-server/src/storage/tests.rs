//! What becomes of a database that was damaged in whatever way, between two starts or under a running server.

use super::*;
use quorum::certificate::Checkpoint;
use quorum::ids::{AttemptId, Epoch, View};
use quorum::ordering::Amnesia;
use quorum::{Hash, SecretBytes, Timestamp};
use rand::rngs::StdRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use std::path::PathBuf;
use tempfile::TempDir;

const CLUSTER: ClusterId = ClusterId(Hash([3; 32]));
const ID: ServerId = ServerId(2);

/// A server's folder.
struct Folder {
    dir: TempDir,
    keys: Arc<StorageKeys>,
}

/// What a start goes on from.
#[derive(Clone, Debug, Default, PartialEq)]
struct Found {
    entries: Vec<(Vec<u8>, Vec<u8>)>,
    checkpoint: Option<Checkpoint>,
    amnesia: Option<Amnesia>,
    voting_key: u64,
    view: Option<View>,
    vault: usize,
    log: Vec<u64>,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let keys = Arc::new(StorageKeys::open(dir.path(), &[7; 32]).unwrap());
        Self { dir, keys }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    /// Another one with the same files.
    fn copy(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(self.dir.path()).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
        let keys = Arc::new(StorageKeys::open(dir.path(), &[7; 32]).unwrap());
        Self { dir, keys }
    }
    async fn open(&self) -> anyhow::Result<Opened> {
        let place =
            Place { folder: self.dir.path(), cluster: &CLUSTER, id: ID, keys: &self.keys, in_file: 0 };
        place.open().await
    }
    async fn damage(&self, name: &str, damage: impl FnOnce(&mut Vec<u8>)) -> anyhow::Result<Opened> {
        let mut bytes = std::fs::read(self.path(name)).unwrap();
        damage(&mut bytes);
        std::fs::write(self.path(name), bytes).unwrap();
        self.open().await
    }
    fn kept(&self) -> usize {
        aside::all(self.dir.path()).unwrap().len()
    }
}

fn found(opened: &Opened) -> Found {
    Found {
        entries: opened.stored.state.iter().flat_map(|state| state.leaves.clone()).collect(),
        checkpoint: opened.stored.state.as_ref().map(|state| state.checkpoint),
        amnesia: opened.stored.amnesia,
        voting_key: opened.stored.voting_key,
        view: opened.stored.view.as_ref().map(|view| view.view),
        vault: opened.stored.vault.len(),
        log: opened.share_log.iter().map(|(number, _)| *number).collect(),
    }
}

fn state(sequence: u64, entries: u64) -> Write {
    let root = Hash([sequence as u8; 32]);
    let checkpoint =
        Checkpoint { sequence: Sequence(sequence), root, time: Timestamp(5), epoch: Epoch(1), attempt: 0 };
    let leaf = |i: u64| {
        let value: Arc<[u8]> = vec![i as u8; 300].into();
        (format!("n/name-{i}").into_bytes(), Some(value))
    };
    Write::State { checkpoint, leaves: (0..entries).map(leaf).collect() }
}

fn store(index: u64) -> Write {
    let share = Some(SecretBytes::new(&[index as u8; 32]));
    Write::Shares(ShareOp::Store { index, epoch: Epoch(1), share, dealt: true })
}

async fn fill(storage: &mut Storage, entries: u64) {
    for i in 0..4 {
        let value = Some(SecretBlob::new(vec![9; 64].into()));
        let writes = [
            state(10 + i, entries),
            Write::View { view: View(i), began: None },
            Write::VotingKey(3 + i),
            Write::Amnesia(Some(Amnesia { through: Epoch(i), settled: true })),
            Write::Vault { key: VaultKey::Dealing(AttemptId::first(Epoch(i)), ID), value },
            store(i),
        ];
        storage.commit(&writes.iter().collect::<Vec<_>>()).await.unwrap();
    }
}

/// A server's folder as a crash leaves it: much of the database stands in the write-ahead log.
async fn crashed() -> (Folder, Found) {
    let folder = Folder::new();
    let mut opened = folder.open().await.unwrap();
    assert!(!opened.stored.forgot && !opened.stored.damaged && opened.aside.is_none());
    fill(&mut opened.storage, 200).await;
    let copy = folder.copy();
    opened.storage.close().await;
    assert!(std::fs::metadata(copy.path("kds.db-wal")).unwrap().len() > 10_000);
    let again = copy.copy().open().await.unwrap();
    assert!(!again.stored.forgot && !again.stored.damaged && again.aside.is_none());
    let found = found(&again);
    assert_eq!((found.voting_key, found.view, &found.log[..]), (6, Some(View(3)), &[1, 2, 3, 4][..]));
    (copy, found)
}

/// The same after an orderly stop.
async fn stopped() -> (Folder, Found) {
    let (folder, found) = crashed().await;
    folder.open().await.unwrap().storage.close().await;
    assert!(!folder.path("kds.db-wal").exists());
    (folder, found)
}

/// The server begins anew, goes on as before, or says that something is missing; where it refuses it says what to do, and
/// leaves the file where it is.
fn judge(what: &str, folder: &Folder, opened: anyhow::Result<Opened>, before: &Found) -> &'static str {
    match opened {
        Err(refused) => {
            let refused = format!("{refused:#}");
            assert!(refused.contains("away, and start"), "{what}: {refused}");
            assert!(folder.path("kds.db").exists() && folder.kept() == 0, "{what}");
            "refused"
        }
        Ok(opened) if opened.aside.is_some() => {
            assert_eq!(found(&opened), Found::default(), "{what}");
            assert!(folder.path(crate::config::LOST_DATABASE).exists(), "{what}");
            assert_eq!(folder.kept(), 1, "{what}");
            "put aside"
        }
        Ok(opened) if opened.stored.forgot || opened.stored.damaged || opened.stored.shares_damaged => {
            "noticed"
        }
        Ok(opened) => {
            let now = found(&opened);
            // The replica knows the root of the entries; a piece of the vault that does not open is as good as lost.
            let rest = Found { entries: before.entries.clone(), vault: before.vault, ..now.clone() };
            assert_eq!(rest, *before, "{what}: unnoticed");
            if now.entries != before.entries {
                return "noticed";
            }
            "as before"
        }
    }
}

#[tokio::test]
async fn whatever_byte_of_a_database_changes_is_noticed_or_changes_nothing() {
    let (folder, before) = stopped().await;
    let length = std::fs::metadata(folder.path("kds.db")).unwrap().len() as usize;
    let mut random = StdRng::seed_from_u64(12);
    let places = (0..100).chain((0..250).map(|_| random.random_range(100..length)));
    let mut outcomes = BTreeMap::new();
    for place in places.collect::<Vec<_>>() {
        let copy = folder.copy();
        let change: u8 = random.random_range(1..=255);
        let opened = copy.damage("kds.db", |bytes| bytes[place] ^= change).await;
        *outcomes.entry(judge(&format!("byte {place} ^ {change}"), &copy, opened, &before)).or_insert(0) += 1;
    }
    println!("{outcomes:?}");
    assert!(outcomes["put aside"] > 20 && outcomes["noticed"] > 20, "{outcomes:?}");
}

/// What a server promised not to do again: no root covers it, and with another value it would be a liar.
#[tokio::test]
async fn no_bit_of_what_a_server_remembers_of_itself_flips_unnoticed() {
    let (folder, before) = stopped().await;
    let bytes = std::fs::read(folder.path("kds.db")).unwrap();
    for name in ["amnesia", "voting-key", "checkpoint", "transactions", "view\x03"] {
        let at = bytes.windows(name.len()).rposition(|window| window == name.as_bytes());
        let at = at.unwrap_or_else(|| panic!("{name} is not in the file"));
        // The name, the value, and some of its digest.
        for place in at..at + name.len() + 8 {
            let copy = folder.copy();
            let opened = copy.damage("kds.db", |bytes| bytes[place] ^= 1).await;
            let outcome = judge(&format!("{name}, byte {}", place - at), &copy, opened, &before);
            assert!(["noticed", "put aside"].contains(&outcome), "{name}, byte {}: {outcome}", place - at);
        }
    }
}

#[tokio::test]
async fn a_database_that_is_cut_short_emptied_or_overwritten_is_put_aside_or_empty() {
    let (folder, before) = stopped().await;
    let length = std::fs::metadata(folder.path("kds.db")).unwrap().len() as usize;
    let mut random = StdRng::seed_from_u64(13);
    for cut in [2, 15, 16, 99, 100, 511, 512, 4_095, 4_096, 8_192, length / 2, length - 4_096] {
        let copy = folder.copy();
        let opened = copy.damage("kds.db", |bytes| bytes.truncate(cut)).await;
        let outcome = judge(&format!("cut at {cut}"), &copy, opened, &before);
        assert_eq!(outcome, "put aside", "cut at {cut}");
    }
    // To SQLite an empty file, or one of one byte, is a new database: which has lost transactions.
    for cut in [0, 1] {
        let copy = folder.copy();
        let opened = copy.damage("kds.db", |bytes| bytes.truncate(cut)).await;
        assert_eq!(judge("emptied", &copy, opened, &before), "noticed");
    }
    for page in 0..length / 4_096 {
        let copy = folder.copy();
        let opened =
            copy.damage("kds.db", |bytes| random.fill_bytes(&mut bytes[page * 4_096..][..4_096])).await;
        let outcome = judge(&format!("page {page} overwritten"), &copy, opened, &before);
        assert!(["put aside", "noticed", "as before"].contains(&outcome), "page {page}: {outcome}");
    }
    let copy = folder.copy();
    let opened = copy.damage("kds.db", |bytes| bytes.fill(0)).await;
    assert_eq!(judge("zeroed", &copy, opened, &before), "put aside");
}

/// SQLite itself says nothing about it, and goes on from an older state.
#[tokio::test]
async fn a_write_ahead_log_that_lost_transactions_is_noticed() {
    let (folder, before) = crashed().await;
    let length = std::fs::metadata(folder.path("kds.db-wal")).unwrap().len() as usize;
    for (what, damage) in [
        ("emptied", Box::new(Vec::clear) as Box<dyn Fn(&mut Vec<u8>)>),
        ("zeroed", Box::new(|bytes: &mut Vec<u8>| bytes.fill(0))),
        ("header", Box::new(|bytes: &mut Vec<u8>| bytes[17] ^= 1)),
        ("cut in the middle", Box::new(move |bytes: &mut Vec<u8>| bytes.truncate(length / 2))),
        ("a byte in the middle", Box::new(move |bytes: &mut Vec<u8>| bytes[length / 2] ^= 4)),
        ("the last transaction", Box::new(move |bytes: &mut Vec<u8>| bytes[length - 5] ^= 4)),
    ] {
        let copy = folder.copy();
        let opened = copy.damage("kds.db-wal", damage).await;
        let forgot = opened.as_ref().is_ok_and(|opened| opened.stored.forgot || opened.aside.is_some());
        assert!(forgot, "{what}: {}", judge(what, &copy, opened, &before));
    }
    let copy = folder.copy();
    std::fs::remove_file(copy.path("kds.db-wal")).unwrap();
    let opened = copy.open().await.unwrap();
    assert!(opened.stored.forgot || opened.aside.is_some());
    // And so is an older copy of the file that is put back.
    let (folder, _) = stopped().await;
    let old = std::fs::read(folder.path("kds.db")).unwrap();
    let mut opened = folder.open().await.unwrap();
    opened.storage.commit(&[&Write::VotingKey(7)]).await.unwrap();
    opened.storage.close().await;
    assert!(folder.damage("kds.db", |bytes| *bytes = old).await.unwrap().stored.forgot);
}

/// What is counted beside the database is not needed; nor does a log do harm whose database is gone.
#[tokio::test]
async fn a_lost_count_is_no_loss_and_a_stray_log_is_not_replayed() {
    let (folder, before) = crashed().await;
    let copy = folder.copy();
    std::fs::remove_file(copy.path("kds.count")).unwrap();
    let opened = copy.open().await.unwrap();
    assert!(!opened.stored.forgot);
    assert_eq!(found(&opened), before);
    let copy = folder.copy();
    std::fs::remove_file(copy.path("kds.db")).unwrap();
    let opened = copy.open().await.unwrap();
    assert!(opened.stored.forgot && opened.stored.state.is_none());
}

#[tokio::test]
async fn what_may_pass_or_is_somebody_elses_costs_no_database() {
    let (folder, before) = stopped().await;
    // Another program has it open, for a while.
    let other = SqliteConnectOptions::new().filename(folder.path("kds.db"));
    let mut other = SqliteConnection::connect_with(&other).await.unwrap();
    sqlx::query("BEGIN").execute(&mut other).await.unwrap();
    sqlx::query("SELECT count(*) FROM meta").fetch_one(&mut other).await.unwrap();
    let release = async {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        other.close().await.unwrap();
    };
    let (opened, ()) = tokio::join!(folder.open(), release);
    let opened = opened.unwrap();
    assert_eq!(found(&opened), before);
    // While this process has it nobody else even reads.
    let other = SqliteConnectOptions::new().filename(folder.path("kds.db")).busy_timeout(Duration::ZERO);
    let mut other = SqliteConnection::connect_with(&other).await.unwrap();
    let locked = sqlx::query("SELECT count(*) FROM meta").fetch_one(&mut other).await.unwrap_err();
    assert_eq!(Failure::of(&locked), Failure::Passing, "{locked}");
    other.close().await.unwrap();
    opened.storage.close().await;

    // Another server's, and one of a newer version.
    let place = Place {
        folder: folder.dir.path(),
        cluster: &CLUSTER,
        id: ServerId(1),
        keys: &folder.keys,
        in_file: 0,
    };
    let refused = format!("{:#}", place.open().await.err().unwrap());
    assert!(refused.contains("belongs to another server"), "{refused}");
    let newer = SqliteConnectOptions::new().filename(folder.path("kds.db"));
    let mut newer = SqliteConnection::connect_with(&newer).await.unwrap();
    let later = "INSERT INTO _sqlx_migrations SELECT 99, description, installed_on, success, checksum, execution_time \
                 FROM _sqlx_migrations WHERE version = 1";
    sqlx::query(later).execute(&mut newer).await.unwrap();
    newer.close().await.unwrap();
    let refused = format!("{:#}", folder.open().await.err().unwrap());
    assert!(refused.contains("by a newer kds-server?"), "{refused}");
    // A folder stands where the file should.
    std::fs::rename(folder.path("kds.db"), folder.path("away")).unwrap();
    std::fs::create_dir(folder.path("kds.db")).unwrap();
    let refused = format!("{:#}", folder.open().await.err().unwrap());
    assert!(refused.contains("cannot open the database"), "{refused}");
    assert_eq!(folder.kept(), 0);
}

/// Damage is met when a page is used: that is an error of its own kind, and the next start finds it.
#[tokio::test]
async fn damage_under_a_running_server_is_called_so_and_found_by_the_next_start() {
    let folder = Folder::new();
    let mut opened = folder.open().await.unwrap();
    fill(&mut opened.storage, 20_000).await;
    opened.storage.rotate(0).await.unwrap();
    let mut bytes = std::fs::read(folder.path("kds.db")).unwrap();
    // The root pages of all tables stay: what is in memory already is not read again.
    for page in bytes.chunks_mut(4_096).skip(12) {
        page[..64].fill(0xff);
    }
    std::fs::write(folder.path("kds.db"), bytes).unwrap();
    let mut met = None;
    for sequence in 20..40 {
        if let Err(error) = opened.storage.commit(&[&state(sequence, 20_000)]).await {
            met = Some(Failure::of(&error));
            break;
        }
    }
    assert_eq!(met, Some(Failure::Damaged));
    opened.storage.close().await;
    assert!(folder.open().await.unwrap().aside.is_some());
}

/// Nothing that a start reads is in pages that are free: they are used later.
#[tokio::test]
async fn damage_that_no_reading_meets_is_found_by_the_check() {
    let (folder, _) = stopped().await;
    let mut opened = folder.open().await.unwrap();
    let Write::State { checkpoint, mut leaves } = state(30, 200) else { unreachable!() };
    leaves.iter_mut().for_each(|(_, value)| *value = None);
    opened.storage.commit(&[&Write::State { checkpoint, leaves }]).await.unwrap();
    opened.storage.close().await;
    let opened = folder.damage("kds.db", |bytes| {
        let first_free = u32::from_be_bytes(*bytes[32..].first_chunk().unwrap()) as usize;
        assert!(first_free > 1, "no page is free: this tests nothing");
        bytes[(first_free - 1) * 4_096 + 4..][..4].fill(0xff);
    });
    assert!(opened.await.unwrap().aside.is_some());
}
