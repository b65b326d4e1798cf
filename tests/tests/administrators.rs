//! M of the N administrators decide who they are.

use kds_tests::{Cluster, status, stderr, stdout};
use serde_json::Value;
use std::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn two_of_three_administrators_replace_the_third() {
    let keys = tempfile::tempdir().unwrap();
    let path = |name: &str| keys.path().join(name).to_str().unwrap().to_owned();
    for name in ["bob", "carol", "dave"] {
        let made =
            Command::new(kds_tests::program("kds-client")).args(["keygen", "--out", &path(name)]).output();
        assert!(made.unwrap().status.success());
    }
    let (bob, carol) = (path("bob.pub"), path("carol.pub"));
    let others = ["--administrator", &bob, "--administrator", &carol, "--administrators-needed", "2"];
    let cluster = Cluster::start_with(4, &others).await.unwrap();
    let listed =
        || -> Value { serde_json::from_str(&stdout(&cluster.cli(&["admin", "list", "--json"]))).unwrap() };
    let before = listed();
    assert_eq!((before["administrators"].as_array().unwrap().len(), &before["needed"]), (3, &Value::from(2)));

    // One alone does not get anywhere.
    let add = ["admin", "add", &path("dave.pub")];
    let asked = cluster.cli(&add);
    assert_eq!(status(&asked), 0, "{}", stderr(&asked));
    assert!(stdout(&asked).starts_with("1 of 2"), "{}", stdout(&asked));
    assert_eq!(listed()["pending"].as_array().unwrap().len(), 1);
    let dave = path("dave");
    let register = ["--key", &dave, "register", "dave", "--public-key", &bob];
    assert_eq!(status(&cluster.cli(&register)), 6);
    // The second one's word does it.
    let by = |who: &str, what: &str, whom: &str| {
        cluster.cli(&["--key", &path(who), "admin", what, &path(&format!("{whom}.pub"))])
    };
    assert_eq!(stdout(&by("bob", "add", "dave")), "decided\n");
    assert_eq!(status(&cluster.cli(&register)), 0);
    assert_eq!(status(&by("bob", "add", "dave")), 7, "that is so already");
    // Carol is no administrator any more, and nothing that she asks for counts.
    assert!(stdout(&by("dave", "remove", "carol")).starts_with("1 of 2"));
    assert_eq!(stdout(&by("bob", "remove", "carol")), "decided\n");
    assert_eq!(status(&by("carol", "remove", "bob")), 6);
    assert_eq!(listed()["administrators"].as_array().unwrap().len(), 3);
    assert_eq!(listed()["pending"].as_array().unwrap().len(), 0);

    // A cluster that could never decide anything is not made.
    let dir = path("c");
    let init = ["init", "--servers=4", "--dir", &dir, "--administrators-needed=2"];
    let refused = Command::new(kds_tests::program("kds-server")).args(init).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--administrator FILE"));
}
