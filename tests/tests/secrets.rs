//! Secrets over real servers: recovered whatever up to n−k shares are, and by nobody else.

use kds_client::LookupOptions;
use kds_tests::liar::{Liar, Lie};
use kds_tests::{Cluster, entry};
use quorum::answer::{PageAnswer, ShareAnswer, Verifier};
use quorum::bytes::Blob;
use quorum::ids::{Epoch, ServerId};
use quorum::record::Name;
use quorum::request::{Deposit, Operation, Reader};
use quorum::sealing::{HandOutContext, ShareContext, encrypt_material};
use quorum::signing::SigningKey;
use quorum::state::data_key_commitment;
use serde_json::json;
use std::sync::Arc;

/// Somebody who sees a deposit copies its sealed shares, ciphertext and commitment into a deposit
/// of his own. It is accepted, its shares open at no server, and he is given nothing (design §6).
#[tokio::test(flavor = "multi_thread")]
async fn a_copied_sealed_share_opens_for_nobody() {
    let cluster = Cluster::start(4).await.unwrap();
    let thief = SigningKey::from_seed(&[66; 32]);
    let thiefs_name = Name::new("thief").unwrap();
    cluster.client.register(&cluster.administrator, thiefs_name, entry(1, Some(&thief))).await.unwrap();

    let cluster_id = cluster.manifest.cluster_id();
    let mut rng = rand::rng();
    let (name, data_key) = (Name::new("crown-jewels").unwrap(), [42; 32]);
    let victim = cluster.administrator.clone();
    let mut deposit = Deposit {
        name: name.clone(),
        owner: victim.public(),
        readers: vec![],
        passphrase: None,
        replaces: None,
        epoch: Epoch(0),
        ciphertext: encrypt_material(&cluster_id, &name, &data_key, b"jewels").unwrap(),
        commitment: data_key_commitment(&cluster_id, &data_key),
        shares: vec![],
    };
    let (_, keys) =
        cluster.client.link(ServerId(0)).unwrap().send("GET", "/v1/servers", vec![]).await.unwrap();
    let keys: PageAnswer = serde_json::from_slice(&keys).unwrap();
    let keys = Verifier::new(Arc::clone(&cluster.manifest)).server_keys(&keys).unwrap();
    let shares = quorum::shamir::deal(&data_key, 2, 4, &mut rng);
    let number = 1;
    for (server, share) in cluster.manifest.grid().servers().zip(&shares) {
        let key = keys.iter().find(|k| k.sealing.statement.server == server).unwrap().sealing.statement.key;
        let context = ShareContext::of(&deposit, server, victim.public(), number);
        let sealed = context.seal(&cluster_id, &key, share, &mut rng).unwrap();
        deposit.shares.push(sealed);
    }
    let request = cluster.client.sign(&victim, number, Operation::Deposit(deposit.clone()));
    cluster.client.submit_signed(&request).await.unwrap();
    assert_eq!(&**cluster.client.get_secret(&victim, &name).await.unwrap().material, b"jewels");

    for (stolen_as, readers) in [("mine", vec![]), ("mine2", vec![Reader::Key(victim.public())])] {
        let copy = Deposit {
            name: Name::new(stolen_as).unwrap(),
            owner: thief.public(),
            readers,
            ..deposit.clone()
        };
        let request =
            cluster.client.sign(&thief, number + 1 + stolen_as.len() as u64, Operation::Deposit(copy));
        cluster.client.submit_signed(&request).await.unwrap();
        let got = cluster.client.get_secret(&thief, &Name::new(stolen_as).unwrap()).await;
        assert!(got.is_err(), "the thief was given the key");
    }
    // Nor is he given it under its own name.
    assert!(cluster.client.get_secret(&thief, &name).await.is_err());
    // No server holds a share of the copies.
    let status = cluster.client.server_status(ServerId(1)).await.unwrap();
    assert_eq!((status.secrets, status.shares), (3, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_get_it_while_they_are_readers() {
    let cluster = Cluster::start(4).await.unwrap();
    let (bob, carol) = (SigningKey::from_seed(&[1; 32]), SigningKey::from_seed(&[2; 32]));
    let bobs_name = Name::new("bob").unwrap();
    cluster.client.register(&cluster.administrator, bobs_name.clone(), entry(1, Some(&bob))).await.unwrap();
    let secret = Name::new("s").unwrap();
    let readers = [Reader::Name(bobs_name.clone())];
    let put = cluster
        .client
        .put_secret(&cluster.administrator, &secret, &[7; 60_000], &readers, false, false)
        .await;
    assert!(put.unwrap().proved);
    assert_eq!(cluster.client.get_secret(&bob, &secret).await.unwrap().material.as_slice(), [7; 60_000]);
    assert!(cluster.client.get_secret(&carol, &secret).await.is_err());
    // The name goes to Carol, and the right with it.
    let record = cluster.client.lookup(&bobs_name, &LookupOptions::default()).await.unwrap().record.unwrap();
    cluster.client.rotate(&bob, bobs_name, record.version, entry(1, Some(&carol))).await.unwrap();
    cluster.level().await.unwrap();
    assert!(cluster.client.get_secret(&bob, &secret).await.is_err());
    assert!(cluster.client.get_secret(&carol, &secret).await.is_ok());
    let (_, releases) = cluster.client.secret(&secret).await.unwrap().unwrap();
    let to: Vec<_> = releases.last.iter().map(|release| release.to.client).collect();
    assert_eq!(to, [cluster.administrator.public(), bob.public(), carol.public()]);
}

/// A server that hands out a wrong share is found by the key commitment.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_share_is_noticed_and_the_secret_comes_anyway() {
    let mut cluster = Cluster::start(9).await.unwrap();
    // Several: each is released 30 times a minute at most, and a slow liar is not always among the first.
    let secrets: Vec<_> = (0..4).map(|i| Name::new(format!("s{i}")).unwrap()).collect();
    for secret in &secrets {
        let put = cluster.client.put_secret(&cluster.administrator, secret, b"material", &[], false, false);
        put.await.unwrap();
    }
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
        let wrong = context.seal(&cluster_id, &answer.release.ephemeral, &[9; 32], &mut rand::rng()).unwrap();
        answer.share = Some(wrong);
        answer.ciphertext = answer.ciphertext.map(|_| Blob(vec![1, 2, 3]));
        *document = json!(answer);
    });
    let _liar =
        Liar::start(&cluster.manifest, ServerId(4), &cluster.server_dir(4), ServerId(0), lie).await.unwrap();
    let mut caught = false;
    for secret in secrets.iter().cycle().take(100) {
        let back = cluster.client.get_secret(&cluster.administrator, secret).await;
        let back = match back {
            Ok(back) => back,
            // Releases are limited to 30 a minute.
            Err(error) if error.to_string().contains("too many") => break,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(&**back.material, b"material");
        assert!(!back.answered.contains(&ServerId(4)) || back.wrong.is_empty());
        for bad in &back.wrong {
            assert_eq!(bad.server, ServerId(4), "an honest server was blamed: {bad}");
            caught = true;
        }
        if caught {
            break;
        }
    }
    assert!(caught, "the liar was never named");
}

/// With n−q servers gone everything goes on; with fewer than q left a secret is safe but not
/// released, since releases are ordered.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_survive_lost_servers() {
    let mut cluster = Cluster::start(4).await.unwrap();
    let secret = Name::new("s").unwrap();
    cluster.client.put_secret(&cluster.administrator, &secret, b"material", &[], false, false).await.unwrap();
    cluster.level().await.unwrap();
    cluster.kill(3);
    assert!(cluster.client.get_secret(&cluster.administrator, &secret).await.is_ok());
    cluster.kill(2);
    let options = kds_client::Options { timeout: std::time::Duration::from_secs(3), ..Default::default() };
    let impatient = kds_client::Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let error = impatient.get_secret(&cluster.administrator, &secret).await.unwrap_err();
    assert_eq!(error.exit_status(), kds_client::ExitStatus::Unavailable);
    cluster.run(2).unwrap();
    cluster.ready().await.unwrap();
    assert_eq!(
        &**cluster.client.get_secret(&cluster.administrator, &secret).await.unwrap().material,
        b"material"
    );
}

/// No share, key or secret stands in a database or log in clear.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_written_in_clear() {
    let cluster = Cluster::start(4).await.unwrap();
    let planted = b"PLANTED-SECRET-MATERIAL-0123456789";
    let secret = Name::new("s").unwrap();
    cluster.client.put_secret(&cluster.administrator, &secret, planted, &[], false, false).await.unwrap();
    cluster.level().await.unwrap();
    let administrator = Blob(cluster.administrator.seed().to_vec()).to_base64();
    for server in 0..4 {
        for file in std::fs::read_dir(cluster.server_dir(server)).unwrap() {
            let file = file.unwrap();
            if !file.file_type().unwrap().is_file() {
                // The signer's socket.
                continue;
            }
            let path = file.path();
            let bytes = std::fs::read(&path).unwrap();
            for needle in [&planted[..], administrator.as_bytes(), &*cluster.administrator.seed()] {
                let found = bytes.windows(needle.len()).any(|window| window == needle);
                assert!(!found, "{} holds something secret", path.display());
            }
        }
    }
}
