//! Secrets behind a passphrase, for a person who has lost every device.

use kds_client::keystore::Passphrase;
use kds_client::{ClientError, ExitStatus};
use kds_tests::liar::{Liar, Lie};
use kds_tests::{Cluster, status, stderr, stdout};
use quorum::answer::ShareAnswer;
use quorum::ids::{Epoch, ServerId};
use quorum::record::Name;
use quorum::request::{Reader, Refusal};
use quorum::sealing::HandOutContext;
use quorum::signing::SigningKey;
use quorum::{oprf, scalars};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::sleep;

const RIGHT: &str = "correct horse battery staple";

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// Deposits behind [`RIGHT`].
async fn put(cluster: &Cluster, secret: &str, readers: &[Reader], guesses: u32) {
    let (secret, right) = (name(secret), Passphrase::new(RIGHT));
    let (client, key, material) = (&cluster.client, &cluster.administrator, b"what only she knows");
    let put = client.put_secret_behind(key, &secret, material, readers, (&right, guesses), false, false);
    assert!(put.await.unwrap().proved);
}

/// On the command line, as README shows it: without any key, from nothing but manifest and passphrase.
#[tokio::test(flavor = "multi_thread")]
async fn she_gets_it_back_without_any_key() {
    let cluster = Cluster::start(4).await.unwrap();
    let file = cluster.dir().join("material");
    std::fs::write(&file, b"a private key").unwrap();
    let file = file.to_str().unwrap();
    let right = [("KDS_SECRET_PASSPHRASE", RIGHT)];
    let wrong = [("KDS_SECRET_PASSPHRASE", "correct horse battery stable")];
    let put = cluster.cli_with(
        &["secret", "put", "hers", "--in", file, "--passphrase", "--guesses", "3"],
        &right,
        "",
    );
    assert_eq!(status(&put), 0, "{}", stderr(&put));

    let get = ["--key", "/nowhere", "secret", "get", "hers", "--passphrase"];
    let got = cluster.cli_with(&get, &right, "");
    assert_eq!((status(&got), stdout(&got).as_str()), (0, "a private key"), "{}", stderr(&got));
    for left in ["2 more guesses are left", "1 more guess is left"] {
        let got = cluster.cli_with(&get, &wrong, "");
        assert_eq!((status(&got), stdout(&got).as_str()), (6, ""));
        assert!(stderr(&got).contains(left), "{}", stderr(&got));
    }
    // What is right is told to the servers, and she has all her guesses again.
    assert_eq!(status(&cluster.cli_with(&get, &right, "")), 0);
    let releases: Value =
        serde_json::from_str(&stdout(&cluster.cli(&["secret", "releases", "hers", "--json"]))).unwrap();
    assert_eq!(releases["guesses_left"], 3);
    assert!(releases["releases"].as_array().unwrap().iter().all(|release| release["guess"] == true));
    for _ in 0..3 {
        assert_eq!(status(&cluster.cli_with(&get, &wrong, "")), 6);
    }
    // Locked: for the right passphrase too, and her own key never opened it.
    let locked = cluster.cli_with(&get, &right, "");
    assert_eq!(status(&locked), 6);
    assert!(stderr(&locked).contains("no guesses are left"), "{}", stderr(&locked));
    assert_eq!(status(&cluster.cli(&["secret", "get", "hers"])), 6);
    // She who still has her key replaces it.
    let again = ["secret", "put", "hers", "--in", file, "--passphrase", "--replace"];
    assert_eq!(status(&cluster.cli_with(&again, &right, "")), 0);
    assert_eq!(status(&cluster.cli_with(&get, &right, "")), 0);
    // Usage.
    let absent = ["secret", "get", "nobodys", "--passphrase"];
    assert_eq!(status(&cluster.cli_with(&absent, &right, "")), 3);
    for guesses in ["0", "33"] {
        let put = ["secret", "put", "x", "--in", file, "--passphrase", "--guesses", guesses];
        assert_eq!(status(&cluster.cli_with(&put, &right, "")), 2);
    }
}

/// Attack 55. Many guess at once, through every server, while servers are killed and started: the cluster
/// evaluates as often as it was allowed to, and not once more.
#[tokio::test(flavor = "multi_thread")]
async fn there_is_never_one_more_guess() {
    let mut cluster = Cluster::start_unlimited(4).await.unwrap();
    put(&cluster, "s", &[], 5).await;
    let evaluated = Arc::new(AtomicU32::new(0));
    let fresh = cluster.fresh();
    let mut guessers = JoinSet::new();
    for guesser in 0..6 {
        let (client, evaluated) = (fresh(), Arc::clone(&evaluated));
        guessers.spawn(async move {
            for attempt in 0..6 {
                let wrong = Passphrase::new(&format!("guess {guesser} {attempt}"));
                match client.get_secret_behind(None, &name("s"), &wrong).await {
                    Err(ClientError::WrongPassphrase { .. }) => {
                        evaluated.fetch_add(1, Ordering::SeqCst);
                    }
                    Err(_) => sleep(Duration::from_millis(100)).await,
                    Ok(_) => panic!("a wrong passphrase opened it"),
                }
            }
        });
    }
    for server in [0, 1, 2] {
        sleep(Duration::from_millis(700)).await;
        cluster.kill(server);
        sleep(Duration::from_millis(300)).await;
        cluster.run(server).unwrap();
        cluster.ready().await.unwrap();
    }
    guessers.join_all().await;
    // Some may have lost theirs to a server that was killed; nobody got more.
    let mut evaluated = evaluated.load(Ordering::SeqCst);
    while let Err(ClientError::WrongPassphrase { .. }) =
        cluster.client.get_secret_behind(None, &name("s"), &Passphrase::new("one more")).await
    {
        evaluated += 1;
    }
    assert!((1..=5).contains(&evaluated), "{evaluated} guesses");
    let (_, record) = cluster.client.secret(&name("s")).await.unwrap().unwrap();
    assert_eq!(record.guessed, 5);
    let right = cluster.client.get_secret_behind(None, &name("s"), &Passphrase::new(RIGHT)).await;
    let refused = right.unwrap_err();
    assert_eq!(refused.exit_status(), ExitStatus::Refused, "{refused}");
}

/// Who may guess is up to the depositor.
#[tokio::test(flavor = "multi_thread")]
async fn guesses_can_be_left_to_a_help_desk() {
    let cluster = Cluster::start(4).await.unwrap();
    let desk = SigningKey::from_seed(&[9; 32]);
    put(&cluster, "s", &[Reader::Key(desk.public())], 2).await;
    let right = Passphrase::new(RIGHT);
    let stranger = cluster.client.get_secret_behind(None, &name("s"), &right).await.unwrap_err();
    assert_eq!(stranger.exit_status(), ExitStatus::Refused, "{stranger}");
    let got = cluster.client.get_secret_behind(Some(&desk), &name("s"), &right).await.unwrap();
    assert_eq!(&**got.material, b"what only she knows");
    let (_, record) = cluster.client.secret(&name("s")).await.unwrap().unwrap();
    assert_eq!(record.guessed, 0, "a stranger's guess was not counted");
    // A reader's key alone is given nothing.
    let by_key = cluster.client.get_secret(&desk, &name("s")).await.unwrap_err();
    let ClientError::Refused(refused) = &by_key else { panic!("{by_key}") };
    assert_eq!(refused.refusal(), &Refusal::OnlyByPassphrase);
}

/// A server that evaluates under another share is named, right passphrase or wrong; and what liars say never
/// makes a right passphrase look wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_evaluation_is_noticed_and_the_secret_comes_anyway() {
    let mut cluster = Cluster::start(9).await.unwrap();
    put(&cluster, "s", &[], 32).await;
    cluster.level().await.unwrap();
    cluster.kill(4);
    let cluster_id = cluster.manifest.cluster_id();
    let lie: Arc<Lie> = Arc::new(move |path, _, document| {
        if path != "/v1/shares" {
            return;
        }
        let Ok(mut answer) = serde_json::from_value::<ShareAnswer>(document.clone()) else { return };
        answer.server = ServerId(4);
        let context = HandOutContext {
            epoch: answer.release.epoch,
            server: ServerId(4),
            index: answer.index,
            release: answer.release.release,
        };
        // A correct proof, of a share that is not this secret's.
        let share = scalars::draw(&mut rand::rng()).to_bytes();
        let blinded = answer.release.blinded.unwrap();
        let result = oprf::evaluate(&share, &blinded, &mut rand::rng()).unwrap();
        let to = &answer.release.ephemeral;
        answer.share = Some(context.seal_evaluation(&cluster_id, to, &result, &mut rand::rng()).unwrap());
        *document = json!(answer);
    });
    let _liar =
        Liar::start(&cluster.manifest, ServerId(4), &cluster.server_dir(4), ServerId(0), lie).await.unwrap();
    let mut blamed = 0;
    for round in 0..12 {
        let passphrase = Passphrase::new(if round % 3 == 2 { "wrong" } else { RIGHT });
        match cluster.client.get_secret_behind(None, &name("s"), &passphrase).await {
            Ok(back) => {
                assert_eq!(&**back.material, b"what only she knows");
                assert!(back.wrong.iter().all(|bad| bad.server == ServerId(4)), "{:?}", back.wrong);
                blamed += back.wrong.len();
            }
            Err(ClientError::WrongPassphrase { .. }) => assert_eq!(round % 3, 2),
            Err(error) => panic!("{error}"),
        }
    }
    println!("the liar was named {blamed} times");
}

/// The key of the function is refreshed and recovered like every share.
#[tokio::test(flavor = "multi_thread")]
async fn epochs_and_lost_disks_change_nothing() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=2"]).await.unwrap();
    put(&cluster, "s", &[], 10).await;
    cluster.kill(1);
    for entry in std::fs::read_dir(cluster.server_dir(1)).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        if ["kds.db", "shares-", "storage-key-"].iter().any(|prefix| file.starts_with(prefix)) {
            std::fs::remove_file(path).unwrap();
        }
    }
    let epoch = |server: u8| {
        let client = cluster.client.clone();
        async move { client.server_status(ServerId(server)).await.map_or(Epoch(0), |status| status.epoch) }
    };
    let before = epoch(0).await;
    while epoch(0).await.0 < before.0 + 2 {
        sleep(Duration::from_millis(100)).await;
    }
    cluster.run(1).unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !cluster.client.server_status(ServerId(1)).await.is_ok_and(|s| s.secrets == 1 && s.shares == 1) {
        assert!(std::time::Instant::now() < deadline, "{}", cluster.log_since_start(1));
        sleep(Duration::from_millis(100)).await;
    }
    // k = 2: the one that recovered is needed as soon as two others are gone... of which only one may be, so
    // that guesses are ordered at all. Among three that answer every pair gets its turn.
    cluster.kill(0);
    let mut by = std::collections::BTreeSet::new();
    for _ in 0..6 {
        let got = cluster.client.get_secret_behind(None, &name("s"), &Passphrase::new(RIGHT)).await.unwrap();
        assert!(got.wrong.is_empty(), "{:?}", got.wrong);
        by.extend(got.answered);
    }
    assert!(by.contains(&ServerId(1)), "the server that recovered its share never answered: {by:?}");
}
