//! A server whose identity was stolen is given another one: the thief is nobody from then on, clients that
//! have only the manifest follow, and proofs stay good.

use kds_tests::{Cluster, stderr, stdout};
use serde_json::Value;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Runs the client with what the manifest's owner has, and expects this exit status.
fn expect(cluster: &Cluster, args: &[&str], status: i32) -> Output {
    let output = cluster.cli(args);
    assert_eq!(kds_tests::status(&output), status, "{args:?}: {}{}", stdout(&output), stderr(&output));
    output
}

/// Waits until the client's document says what it is to say.
async fn until(cluster: &Cluster, args: &[&str], what: &str, good: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let output = cluster.cli(args);
        let said: Value = serde_json::from_str(&stdout(&output)).unwrap_or_default();
        if good(&said) {
            return said;
        }
        assert!(Instant::now() < deadline, "{what}: {said:#} {}", stderr(&output));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_identity_is_replaced_and_everyone_follows() {
    let mut cluster = Cluster::start_with(4, &["--epoch-seconds=4"]).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    std::fs::write(cluster.dir().join("plain"), "what k servers keep").unwrap();
    expect(&cluster, &["secret", "put", "s", "--in", "plain"], 0);
    expect(&cluster, &["lookup", "alice", "--proof", "before.json"], 0);

    // A thief has everything of server 1, which its operator stops.
    cluster.kill(1);
    let (folder, stolen) = (cluster.server_dir(1), cluster.dir().join("stolen"));
    std::fs::rename(&folder, &stolen).unwrap();
    let manifest = cluster.dir().join("manifest.toml");
    let made = Command::new(kds_tests::program("kds-server"))
        .args(["new-identity", "--server=1", "--manifest"])
        .arg(&manifest)
        .arg("--dir")
        .arg(&folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", stderr(&made));
    // It does not start to take part by itself.
    cluster.run(1).unwrap();
    let waiting = Instant::now() + Duration::from_secs(30);
    while !cluster.log(1).contains("waiting for the administrators") {
        assert!(Instant::now() < waiting, "{}", cluster.log(1));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let replacement = folder.join("replacement.toml");
    let replacement = replacement.to_str().unwrap();
    assert_eq!(stdout(&expect(&cluster, &["admin", "replace-identity", replacement], 0)), "decided\n");
    expect(&cluster, &["admin", "replace-identity", replacement], 7);
    // Another one's identity is not taken twice, whoever asks.
    let text = std::fs::read_to_string(replacement).unwrap();
    std::fs::write(cluster.dir().join("again.toml"), text.replace("server = 1", "server = 2")).unwrap();
    let again = cluster.cli(&["admin", "replace-identity", "again.toml"]);
    assert_eq!(kds_tests::status(&again), 6, "{}", stderr(&again));

    // It has its place from the next epoch on, votes, and gets its shares back.
    let followed = until(&cluster, &["membership", "--json"], "the change is shown", |said| {
        said["servers"][1]["since_epoch"].as_u64() > Some(0)
    })
    .await;
    assert_eq!(followed["changes"].as_array().unwrap().len(), 1);
    let link = cluster.client.link(quorum::ServerId(0)).unwrap();
    let get = async |path: &str| -> Value {
        serde_json::from_slice(&link.send("GET", path, vec![]).await.unwrap().1).unwrap()
    };
    let (described, answer) = (get("/v1/openapi.json").await, get("/v1/membership?from=0").await);
    let mut schema = described["components"]["schemas"]["MembershipAnswer"].clone();
    schema["components"] = described["components"].clone();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<_> = validator.iter_errors(&answer).map(|e| e.to_string()).collect();
    assert!(errors.is_empty() && answer["changes"].as_array().unwrap().len() == 1, "{errors:#?}");
    cluster.client.follow().await.unwrap();
    until(&cluster, &["status", "--json"], "server 1 is whole", |said| {
        let server = &said["servers"][1];
        server["part"] == "voting" && server["shares"] == 1 && server["recovering"] == false
    })
    .await;

    // With server 3 gone nothing is certified without the new server 1: who has the manifest alone follows.
    cluster.kill(3);
    // What was registered since is in no certificate that server 3 signed.
    cluster.register("bob", 2).await.unwrap();
    expect(&cluster, &["lookup", "bob", "--proof", "after.json"], 0);
    assert_eq!(stdout(&expect(&cluster, &["secret", "get", "s"], 0)), "what k servers keep");

    // The thief starts what he has, at an address of his own: nobody speaks to him.
    let config = std::fs::read_to_string(stolen.join("config.toml")).unwrap();
    let entry = cluster.manifest.servers[1].clone();
    let config = config.replace(&entry.url["https://".len()..], "127.0.0.1:0");
    let config = config.replace(&entry.peer, "127.0.0.1:0");
    std::fs::write(stolen.join("config.toml"), config).unwrap();
    let log = std::fs::File::create(stolen.join("thief.log")).unwrap();
    let mut thief = Command::new(kds_tests::program("kds-server"))
        .args(["run", "--config"])
        .arg(stolen.join("config.toml"))
        .stderr(log)
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    while !(0..3).any(|i| cluster.log(i).contains("refused a link from a server that was replaced")) {
        assert!(Instant::now() < deadline, "nobody refuses the thief");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let log = std::fs::read_to_string(stolen.join("thief.log")).unwrap();
    assert!(!log.contains("this server votes"), "{log}");
    thief.kill().unwrap();
    thief.wait().unwrap();

    // It comes back by itself from its own folder, and one who slept meanwhile follows too.
    cluster.terminate(1).unwrap();
    cluster.run(3).unwrap();
    cluster.run(1).unwrap();
    cluster.ready().await.unwrap();
    expect(&cluster, &["lookup", "bob"], 0);

    // Proofs of before and after are good without any server; without the change the second is none.
    (0..4).for_each(|server| cluster.kill(server));
    expect(&cluster, &["verify", "before.json"], 0);
    expect(&cluster, &["verify", "after.json"], 0);
    let change = |name: &str, change: &dyn Fn(&mut Value)| {
        let text = std::fs::read(cluster.dir().join("after.json")).unwrap();
        let mut proof: Value = serde_json::from_slice(&text).unwrap();
        change(&mut proof);
        std::fs::write(cluster.dir().join(name), proof.to_string()).unwrap();
        let refused = expect(&cluster, &["verify", name], 4);
        stderr(&refused)
    };
    let why = change("without.json", &|proof| proof["membership"] = serde_json::json!([]));
    assert!(why.contains("server 1's key is not certified by its identity key"), "{why}");
    let why = change("other.json", &|proof| {
        let replacement = &mut proof["membership"][0]["change"]["value"]["replacement"];
        replacement["identity"] = serde_json::to_value(cluster.administrator.public()).unwrap();
    });
    assert!(why.contains("not in the certified state"), "{why}");
}
