//! Numbers and durations of any size, clocks that are far off, and what is said of servers that do not answer.

use kds_client::deadline::FOR_EVER;
use kds_client::quorum::record::Name;
use kds_client::{Client, ClientError, Consistency, LookupOptions, Options, WatchEvent};
use kds_tests::{Cluster, entry, status, stderr, stdout};
use quorum::ServerId;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// No option makes the command line panic or mean something else than it says.
#[tokio::test(flavor = "multi_thread")]
async fn options_of_any_size_mean_what_they_say() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let says = |arguments: &[&str], wanted: &[i32]| {
        let output = cluster.cli(arguments);
        let text = stderr(&output);
        assert!(wanted.contains(&status(&output)), "{arguments:?}: {} {text}", status(&output));
        assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    };
    const FOR_LONG: [&str; 5] = [
        "18446744073709551615",
        "9223372036854775807",
        "18446744073709551615m",
        "18446744073709551615ms",
        // 384 ms modulo 2^64 ms.
        "18446744073709552",
    ];
    for long in FOR_LONG {
        says(&["--timeout", long, "lookup", "alice"], &[0]);
        says(&["--timeout", long, "list"], &[0]);
        says(&["--timeout", long, "status"], &[0]);
        says(&["lookup", "alice", "--max-age", long], &[0]);
        says(&["lookup", "nobody", "--max-age", long, "--consistency", "any"], &[3]);
        says(
            &["bench", "lookup", "--names", "1", "--clients", "1", "--requests", "3", "--seconds", long],
            &[0],
        );
    }
    // In no time there is no answer, and answers of no age are as rare.
    for none in ["0", "0ms", "0m"] {
        says(&["--timeout", none, "lookup", "alice"], &[5]);
        says(&["--timeout", none, "list"], &[5]);
        says(&["--timeout", none, "register", "bob", "--public-key", "none.pub"], &[1]);
        says(&["lookup", "alice", "--max-age", none], &[4, 5]);
        says(&["bench", "register", "--clients", "1", "--seconds", none], &[0]);
    }
    says(&["--timeout", "1ms", "lookup", "alice"], &[0, 5]);
    for wrong in ["18446744073709551616", "-1", "1h", "1.5", "", "ms"] {
        says(&["--timeout", wrong, "lookup", "alice"], &[2]);
        says(&["lookup", "alice", "--max-age", wrong], &[2]);
    }
    for most in ["18446744073709551615", "9223372036854775807"] {
        says(&["lookup", "alice", "--version", most], &[3]);
        says(&["bench", "lookup", "--clients", most], &[2]);
        says(&["bench", "lookup", "--names", most], &[2]);
        says(
            &["bench", "lookup", "--names", "1", "--clients", "1", "--requests", most, "--seconds", "1ms"],
            &[0],
        );
        says(&["watch", "alice", "--events", "0", "--since", most], &[0]);
    }
    for never in ["9999-12-31T23:59:59.999Z", "-009999-01-01T00:00:00Z", "18446744073709551615", ""] {
        for option in ["--not-before", "--not-after"] {
            says(&["register", "bob", "--public-key", "none.pub", option, never], &[2]);
        }
    }
    says(&["lookup", "alice", "--version", "0"], &[3]);
    says(&["bench", "lookup", "--names", "1", "--requests", "0"], &[0]);
    says(&["secret", "put", "safe", "--guesses", "4294967296"], &[2]);
    for server in 0..4 {
        assert!(!cluster.log(server).contains("panicked"));
    }
}

/// The same for programs: every option of a client, and every call with them.
#[tokio::test(flavor = "multi_thread")]
async fn durations_of_any_length_can_be_given_to_the_library() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let with = |timeout, hedge, max_age| {
        let options = Options { timeout, hedge, max_age, ..Options::default() };
        Client::new(Arc::clone(&cluster.manifest), options).unwrap()
    };
    for long in [Duration::MAX, Duration::from_secs(u64::MAX), Duration::from_millis(u64::MAX), FOR_EVER] {
        let client = with(long, long, long);
        for consistency in [Consistency::Row, Consistency::Quorum, Consistency::Any] {
            let options = LookupOptions { consistency, max_age: Some(long), version: None };
            assert!(client.lookup(&name("alice"), &options).await.unwrap().record.is_some());
        }
        for _ in 0..2 {
            assert!(client.lookup_cached(&name("alice")).await.unwrap().is_some());
        }
        assert_eq!(client.list("").await.unwrap().len(), 1);
        assert_eq!(client.history(&name("alice")).await.unwrap().len(), 1);
        assert!(matches!(client.watch(&name("alice"), 0).next().await, Ok(WatchEvent::Version(_))));
        assert_eq!(client.administrators().await.unwrap().len(), 1);
        client.follow().await.unwrap();
        client.server_status(ServerId(0)).await.unwrap();
    }
    let client = with(Duration::MAX, Duration::MAX, Duration::MAX);
    client.register(&cluster.administrator, name("bob"), entry(1, None)).await.unwrap();
    let put = client.put_secret(&cluster.administrator, &name("safe"), b"x", &[], false, false).await;
    put.unwrap();
    // In no time nothing comes, and nothing hangs or spins.
    for short in [Duration::ZERO, Duration::from_nanos(1)] {
        let client = with(short, short, short);
        let options = LookupOptions { max_age: Some(short), ..LookupOptions::default() };
        let call = async {
            client.lookup(&name("alice"), &options).await.unwrap_err();
            client.lookup_cached(&name("alice")).await.unwrap_err();
            client.list("").await.unwrap_err();
            client.history(&name("alice")).await.unwrap_err();
            client.register(&cluster.administrator, name("carol"), entry(1, None)).await.unwrap_err();
            client.watch(&name("alice"), u64::MAX).next().await.unwrap_err();
        };
        tokio::time::timeout(Duration::from_secs(20), call).await.unwrap();
        // No patience with one server is none with all: the answer comes nevertheless.
        let client = with(Duration::from_secs(20), short, Duration::from_secs(5));
        client.lookup(&name("alice"), &LookupOptions::default()).await.unwrap();
    }
    let everything = Options { timeout: Duration::from_secs(5), ..Options::default() };
    let client = Client::new(Arc::clone(&cluster.manifest), everything).unwrap();
    let last = LookupOptions { version: Some(u64::MAX), ..LookupOptions::default() };
    assert!(client.lookup(&name("alice"), &last).await.unwrap().record.is_none());
    for from in [0, u64::MAX] {
        let refused = client.rotate(&cluster.administrator, name("alice"), from, entry(2, None)).await;
        assert!(matches!(refused, Err(ClientError::Refused(_))), "{refused:?}");
    }
}

/// Numbers in the paths of requests.
#[tokio::test(flavor = "multi_thread")]
async fn pages_of_any_number_are_answered() {
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let link = cluster.client.link(ServerId(1)).unwrap();
    for number in [0, 1, u64::from(u32::MAX), i64::MAX as u64, u64::MAX] {
        for path in [
            "/v1/records?limit=",
            "/v1/secrets?limit=",
            "/v1/records/alice?version=",
            "/v1/records/alice/history?from=",
            "/v1/records/alice/history?limit=",
            "/v1/membership?from=",
        ] {
            let (status, body) = link.send("GET", &format!("{path}{number}"), vec![]).await.unwrap();
            let text = String::from_utf8_lossy(&body);
            assert!(matches!(status, 200 | 400 | 404), "{path}{number}: {status} {text}");
        }
    }
    assert!(!cluster.log(1).contains("panicked"), "{}", cluster.log(1));
}

/// Also where the servers' certificates seem over, and requests to have expired: it is the clock.
#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_is_years_off_is_named() {
    const TEN_YEARS: i64 = 3_653 * 24 * 60 * 60;
    let cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    assert_eq!(status(&cluster.cli(&["keygen", "--out", "owner.key"])), 0);
    for (seconds, says) in [(TEN_YEARS, "ahead"), (-TEN_YEARS, "behind"), (120, "ahead"), (-120, "behind")] {
        let clock = cluster.clock_off_by(seconds).unwrap();
        let environment: Vec<_> = clock.iter().map(|(name, value)| (*name, value.as_str())).collect();
        for command in [
            &["lookup", "alice"][..],
            &["list"],
            &["history", "alice"],
            &["register", "bob", "--public-key", "owner.key.pub"],
            &["admin", "list"],
        ] {
            let output = cluster.cli_with(&[&["--timeout", "8s"], command].concat(), &environment, "");
            let text = stderr(&output);
            assert_eq!(status(&output), 4, "{seconds} s, {command:?}: {text}");
            assert!(text.contains("this machine's clock is") && text.contains(says), "{command:?}: {text}");
        }
    }
    // A clock that is right is not blamed for what is wrong otherwise.
    let output = cluster.cli(&["lookup", "alice", "--max-age", "0"]);
    assert_eq!(status(&output), 4);
    assert!(!stderr(&output).contains("agree on another time"), "{}", stderr(&output));
}

/// Why servers are silent is said, in words and in JSON, and who is silent stays a list of numbers.
#[tokio::test(flavor = "multi_thread")]
async fn silence_has_a_reason() {
    let mut cluster = Cluster::start(4).await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.kill(3);
    let mut why = None;
    for _ in 0..40 {
        let output = cluster.cli(&["lookup", "alice", "--json"]);
        assert_eq!(status(&output), 0, "{}", stderr(&output));
        let document: Value = serde_json::from_str(&stdout(&output)).unwrap();
        if document["access"]["silent"] == serde_json::json!([3]) {
            why = Some(document["access"]["silent_because"].clone());
            break;
        }
    }
    let why = why.expect("server 3 was never asked");
    assert_eq!(why[0]["server"], 3);
    assert!(why[0]["why"].as_str().unwrap().contains("onnection refused"), "{why}");

    // One refuses connections, one hangs, one is another than it should be.
    cluster.signal(2, "STOP").unwrap();
    cluster.kill(1);
    let foreign = kds_certs::generate("x", &["localhost".into()], 2026).unwrap();
    let foreign =
        kds_certs::TlsIdentity::from_pem(foreign.certificate_pem.as_bytes(), foreign.key_pem.as_bytes());
    let acceptor = kds_certs::https_server(&foreign.unwrap()).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(acceptor));
    let address = cluster.manifest.servers[1].url.replace("https://", "");
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let _ = acceptor.accept(tcp).await;
        }
    });
    for command in [&["lookup", "alice"][..], &["list"]] {
        let output = cluster.cli(&[&["--timeout", "9s"], command].concat());
        let text = stderr(&output);
        assert_eq!(status(&output), 5, "{command:?}: {text}");
        assert!(text.contains("3 (no connection: Connection refused"), "{command:?}: {text}");
        assert!(text.contains("1 (no connection: TLS: "), "{command:?}: {text}");
        assert!(text.contains("2 (no answer"), "{command:?}: {text}");
    }
    cluster.signal(2, "CONT").unwrap();
}
