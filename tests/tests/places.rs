//! Places that strangers may take at the ports for clients, and what answers that they do not read may cost: B4 and B5 of
//! the attack from open ports. Addresses are cheap: two of them, or a thousand.

use kds_client::{Client, ClientError, LookupOptions, Options};
use kds_tests::visitors::{Port, address, answer, get, head, say};
use kds_tests::{Cluster, entry, program, stderr};
use quorum::ids::ServerId;
use quorum::record::Name;
use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// An honest client's address.
const HONEST: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// Visitors who connect at the same time.
const AT_A_TIME: usize = 8;
/// How long an honest client is willing to wait for a server under attack.
const PATIENCE: Duration = Duration::from_secs(5);

/// MiB of a process that are in memory.
fn resident(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() / 1_024
}

/// Does something with the numbers below `count`, a few at a time; gives what came of each.
async fn each<T, F>(count: usize, one: impl Fn(usize) -> F) -> Vec<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (mut running, mut done) = (JoinSet::new(), Vec::new());
    for i in 0..count {
        if running.len() == AT_A_TIME {
            done.push(running.join_next().await.unwrap().unwrap());
        }
        running.spawn(one(i));
    }
    done.extend(running.join_all().await);
    done
}

/// An answer to somebody who waits for it and reads it.
async fn ask(port: &Port, from: Ipv4Addr, path: &str) -> (u16, String, String) {
    let asked = async { answer(&mut port.ask(from, path).await?).await };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("{path} hangs")).unwrap()
}

/// What a server counts under a name.
async fn measured(port: &Port, name: &str) -> f64 {
    let (_, _, metrics) = ask(port, HONEST, "/metrics").await;
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |number| number.parse().unwrap())
}

fn turned_away(what: &str, how: &str) -> String {
    format!("kds_http_turned_away_total{{what=\"{what}\",how=\"{how}\"}}")
}

/// Whether the other end closes a connection, whatever it still says.
async fn is_closed(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut buffer = [0; 4_096];
    let end = async { while let Ok(1..) = stream.read(&mut buffer).await {} };
    timeout(Duration::from_millis(300), end).await.is_ok()
}

/// Names whose records make a page as long as there is one.
async fn register_long_names(cluster: &Cluster, names: usize) {
    let written = each(names, |i| {
        let (client, key) = (cluster.client.clone(), cluster.administrator.clone());
        let mut entry = entry(1, None);
        entry.metadata = (0..32).map(|j| (format!("k{j}"), "x".repeat(1_000))).collect();
        async move { client.register(&key, Name::new(format!("long-{i}")).unwrap(), entry).await }
    });
    written.await.into_iter().for_each(|written| drop(written.unwrap()));
}

/// They ask for the longest list, and read nothing of it: from two addresses, and then from many. What a server keeps for
/// them is bounded for each address and for all, others are answered meanwhile, and the memory goes back.
#[tokio::test(flavor = "multi_thread")]
async fn b4_slow_readers_of_long_lists_cost_little_memory_and_it_goes_back() {
    let readers = std::env::var("KDS_SLOW_READERS").map_or(160, |readers| readers.parse().unwrap());
    let cluster = Cluster::start(4).await.unwrap();
    register_long_names(&cluster, 140).await;
    cluster.level().await.unwrap();
    let (port, process) = (Port::of(&cluster, 0).unwrap(), cluster.process(0).unwrap());
    let before = resident(process);
    let read_nothing = |addresses: usize, readers| {
        let port = port.clone();
        each(readers, move |i| {
            let port = port.clone();
            async move { port.ask(address(i % addresses), "/v1/records?limit=1000").await }
        })
    };
    let few = read_nothing(2, readers).await;
    sleep(Duration::from_millis(500)).await;
    assert!(resident(process) < before + 150, "{before} MiB, and then {}", resident(process));
    let unread = measured(&port, "kds_http_unread_bytes").await;
    assert!((20e6..34e6).contains(&unread), "{unread} bytes for two addresses");
    assert!(measured(&port, &turned_away("answer", "refused")).await >= readers as f64 / 2.0);

    let many = read_nothing(30, 30).await;
    sleep(Duration::from_millis(500)).await;
    let peak = resident(process);
    assert!(peak < before + 200, "{before} MiB, and then {peak}");
    let unread = measured(&port, "kds_http_unread_bytes").await;
    assert!((40e6..67.2e6).contains(&unread), "{unread} bytes for all");
    assert!(measured(&port, &turned_away("answer", "cut")).await >= 10.0);

    let listed = timeout(PATIENCE, cluster.fresh_client().list("")).await.expect("in time").unwrap();
    assert_eq!(listed.len(), 140);
    drop((few, many));
    sleep(Duration::from_secs(1)).await;
    let after = resident(process);
    println!("{readers} readers: {before} MiB before, {peak} MiB at most, {after} MiB after");
    assert!(after < before + 60, "{before} MiB, and {after} when all were gone");
    assert_eq!(measured(&port, "kds_http_unread_bytes").await, 0.0);
}

/// Two addresses that hold as many connections as they get, which used to be all.
#[tokio::test(flavor = "multi_thread")]
async fn b5_two_addresses_do_not_take_all_places() {
    let cluster = Cluster::start(4).await.unwrap();
    let port = Port::of(&cluster, 0).unwrap();
    let held = each(780, |i| {
        let port = port.clone();
        async move { timeout(PATIENCE, port.enter(address(i % 2))).await }
    });
    let held = held.await;
    assert!(held.iter().filter(|held| matches!(held, Ok(Ok(_)))).count() > 640, "too few came");
    for path in ["/healthz", "/readyz", "/metrics", "/v1/status", "/v1/manifest"] {
        let (status, ..) = ask(&port, HONEST, path).await;
        assert_eq!(status, 200, "{path}");
    }
    assert!(measured(&port, "kds_http_connections").await <= 640.0);
    let mut away = 0.0;
    for how in ["refused", "cut"] {
        away += measured(&port, &turned_away("connection", how)).await;
    }
    assert!(away > 100.0, "{away} were turned away");
}

/// A thousand addresses that connect and say nothing, and come back when they are cut off.
#[tokio::test(flavor = "multi_thread")]
async fn b5_a_thousand_silent_addresses_keep_nobody_out() {
    let cluster = Cluster::start(4).await.unwrap();
    let connected = Arc::new(AtomicUsize::new(0));
    let mut silent = JoinSet::new();
    for i in 0..1_000 {
        let (port, connected) = (Port::of(&cluster, i % 4).unwrap(), Arc::clone(&connected));
        silent.spawn(async move {
            loop {
                if let Ok(mut tcp) = port.connect(address(i)).await {
                    connected.fetch_add(1, Ordering::Relaxed);
                    let _ = tcp.read(&mut [0; 1]).await;
                }
                sleep(Duration::from_millis(500)).await;
            }
        });
    }
    sleep(Duration::from_secs(1)).await;
    for i in 0..5 {
        // Fresh ones, who have to shake hands.
        let client = cluster.fresh_client();
        let name = Name::new(format!("name-{i}")).unwrap();
        let written = client.register(&cluster.administrator, name.clone(), entry(1, None));
        timeout(PATIENCE, written).await.expect("writes stop").unwrap();
        let found = cluster.fresh_client().lookup(&name, &LookupOptions::default()).await.unwrap();
        assert!(found.record.is_some());
    }
    assert!(connected.load(Ordering::Relaxed) > 1_000, "too few came: this tests nothing");
    let log = cluster.log(0);
    let told = log.lines().filter(|line| line.contains("handshakes at a time with clients")).count();
    assert_eq!(told, 1, "{log}");
}

/// Each of many addresses shakes hands, and stays.
#[tokio::test(flavor = "multi_thread")]
async fn b5_as_many_addresses_as_there_are_places_keep_nobody_out() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    cluster.configure(0, "connections", "60").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    let port = Port::of(&cluster, 0).unwrap();
    let held = each(150, |i| {
        let port = port.clone();
        async move { port.enter(address(i)).await }
    });
    let held = held.await;
    assert!(held.iter().filter(|held| held.is_ok()).count() > 100, "too few came");
    let mut asks = port.ask(HONEST, "/v1/manifest").await.unwrap();
    assert_eq!(answer(&mut asks).await.unwrap().0, 200);
    assert!(measured(&port, &turned_away("connection", "cut")).await >= 50.0);
    // It goes on with what it has as long as it is not the oldest one.
    say(&mut asks, &get("/v1/manifest")).await.unwrap();
    assert_eq!(answer(&mut asks).await.unwrap().0, 200);
}

/// What is too much for one address is said in words, on whatever connection; counted; and logged once.
#[tokio::test(flavor = "multi_thread")]
async fn b5_surplus_connections_are_told_counted_and_logged_seldom() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    for server in 0..4 {
        cluster.configure(server, "connections_per_address", "6").unwrap();
        cluster.run(server).unwrap();
    }
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    let ports: Vec<_> = (0..4).map(|server| Port::of(&cluster, server).unwrap()).collect();
    let (port, crowd) = (&ports[0], address(0));
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(port.enter(crowd).await.unwrap());
    }
    for _ in 0..30 {
        let (status, head, body) = ask(port, crowd, "/v1/records/alice").await;
        assert_eq!(status, 429, "{body}");
        assert!(head.contains("retry-after: 1") && head.contains("connection: close"), "{head}");
        assert!(body.contains("too many connections from this address: 6 are open"), "{body}");
    }
    // What a client sends is read before it is refused.
    let mut writes = port.enter(crowd).await.unwrap();
    let body = "x".repeat(200 * 1024);
    say(
        &mut writes,
        &format!("POST /v1/requests HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()),
    )
    .await
    .unwrap();
    assert_eq!(answer(&mut writes).await.unwrap().0, 429);
    // One that says nothing does not stay.
    let mut silent = port.enter(crowd).await.unwrap();
    assert!(timeout(Duration::from_secs(8), silent.read(&mut [0; 1])).await.is_ok());
    assert_eq!(ask(port, crowd, "/readyz").await.0, 200, "how a server is doing is told to all");
    assert_eq!(ask(port, HONEST, "/v1/records/alice").await.0, 200, "others have their own");
    assert!(measured(port, &turned_away("connection", "refused")).await >= 32.0);
    let log = cluster.log(0);
    assert_eq!(log.lines().filter(|line| line.contains("too many connections from")).count(), 1, "{log}");

    // A client at such an address waits, and asks others; nobody lies.
    drop(held);
    sleep(Duration::from_millis(200)).await;
    let options = Options { timeout: Duration::from_secs(3), ..Options::default() };
    let client = Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let mut held = Vec::new();
    for port in &ports {
        for _ in 0..6 {
            held.push(port.enter(HONEST).await.unwrap());
        }
    }
    let alice = Name::new("alice").unwrap();
    match client.lookup(&alice, &LookupOptions::default()).await {
        Err(ClientError::Unavailable { waits, rejected, .. }) => {
            assert!(rejected.is_empty() && !waits.is_empty(), "{waits:?} {rejected:?}");
            assert!(waits.iter().all(|wait| wait.why.contains("too many connections")), "{waits:?}");
        }
        other => panic!("{other:?}"),
    }
    drop(held);
    client.lookup(&alice, &LookupOptions::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn b5_watches_are_shared_by_address_and_nobody_takes_all() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    cluster.configure(0, "watches", "8").unwrap();
    cluster.configure(0, "watches_per_address", "5").unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    cluster.register("alice", 1).await.unwrap();
    cluster.level().await.unwrap();
    let port = Port::of(&cluster, 0).unwrap();
    let watch = async |from| {
        let mut stream = port.ask(from, "/v1/records/alice/watch").await.unwrap();
        let (status, _) = head(&mut stream).await.unwrap();
        (status, stream)
    };
    let mut greedy = Vec::new();
    for _ in 0..5 {
        let (status, stream) = watch(address(0)).await;
        assert_eq!(status, 200);
        greedy.push(stream);
    }
    let (status, _, body) = ask(&port, address(0), "/v1/records/alice/watch").await;
    assert_eq!(status, 429);
    assert!(body.contains("5 watches from this address are open"), "{body}");
    let mut others = Vec::new();
    for i in 1..=3 {
        others.push(watch(address(i)).await.1);
    }
    assert_eq!(measured(&port, "kds_http_watches").await, 8.0);
    let (status, mut honest) = watch(HONEST).await;
    assert_eq!(status, 200);
    assert!(is_closed(&mut greedy[0]).await, "the oldest of the address that has most");
    for stream in greedy[1..].iter_mut().chain(&mut others).chain([&mut honest]) {
        assert!(!is_closed(stream).await);
    }
    assert_eq!(measured(&port, &turned_away("watch", "refused")).await, 1.0);
    assert_eq!(measured(&port, &turned_away("watch", "cut")).await, 1.0);
    drop(greedy);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(measured(&port, "kds_http_watches").await, 4.0);
}

/// Health and metrics at a port of their own, in plain text, whatever happens at the other one.
#[tokio::test(flavor = "multi_thread")]
async fn b5_health_and_metrics_have_a_listener_of_their_own() {
    let mut cluster = Cluster::new(4, &[]).unwrap();
    let at = format!("127.0.0.1:{}", cluster.spare_port(0).unwrap());
    cluster.configure(0, "listen_health", &format!("\"{at}\"")).unwrap();
    (0..4).for_each(|server| cluster.run(server).unwrap());
    cluster.ready().await.unwrap();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(&at).await.unwrap());
    }
    let mut tcp = TcpStream::connect(&at).await.unwrap();
    for (path, status) in
        [("/healthz", 200), ("/readyz", 200), ("/metrics", 200), ("/v1/status", 404), ("/v1/records", 404)]
    {
        say(&mut tcp, &get(path)).await.unwrap();
        let (got, _, body) = timeout(PATIENCE, answer(&mut tcp)).await.expect("in time").unwrap();
        assert_eq!(got, status, "{path}: {body}");
        assert!(path != "/metrics" || body.contains("kds_http_connections "), "{body}");
    }
    let port = Port::of(&cluster, 0).unwrap();
    assert_eq!(ask(&port, HONEST, "/readyz").await.0, 200, "it is there as before");
    assert!(is_closed(&mut silent[0]).await, "places are given to those who come");
}

#[test]
fn b5_limits_that_make_no_sense_are_refused() {
    let cluster = Cluster::new(4, &[]).unwrap();
    let path = cluster.server_dir(1).join("config.toml");
    let whole = std::fs::read_to_string(&path).unwrap();
    for (key, value, says) in [
        ("connections", "0", "connections = 0 in config.toml makes no sense"),
        ("connections", "500", "open files, and its limit is 400"),
        ("connections_per_address", "100000", "connections_per_address = 100000"),
        ("watches", "-1", "is not a server's config"),
        ("unread_mib", "0", "unread_mib = 0"),
        ("listen_health", "\"nowhere\"", "is not a server's config"),
    ] {
        cluster.configure(1, key, value).unwrap();
        let script = "ulimit -n 400; exec \"$0\" run --config \"$1\"";
        let run =
            Command::new("sh").args(["-c", script]).arg(program("kds-server")).arg(&path).output().unwrap();
        let said = stderr(&run);
        assert!(!run.status.success() && said.contains(says), "{key} = {value}: {said}");
        std::fs::write(&path, &whole).unwrap();
    }
}

/// Handshakes and bodies that do not end; with `KDS_SLOW_CLIENTS` heads that do not, and readers of a byte a second.
#[tokio::test(flavor = "multi_thread")]
async fn b5_whoever_is_slow_is_cut_off() {
    let cluster = Cluster::start(4).await.unwrap();
    let port = Port::of(&cluster, 0).unwrap();
    let (began, whole) = (Instant::now(), std::env::var_os("KDS_SLOW_CLIENTS").is_some());
    let ends =
        async |what: &str, stream: &mut (dyn AsyncRead + Send + Unpin), seconds: std::ops::Range<u64>| {
            let mut buffer = [0; 4_096];
            let end = async { while let Ok(1..) = stream.read(&mut buffer).await {} };
            timeout(Duration::from_secs(seconds.end), end).await.unwrap_or_else(|_| panic!("{what} goes on"));
            assert!(seconds.contains(&began.elapsed().as_secs()), "{what} ends after {:?}", began.elapsed());
        };
    let mut handshake = port.connect(address(0)).await.unwrap();
    let mut body = port.enter(address(1)).await.unwrap();
    say(&mut body, "POST /v1/requests HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{").await.unwrap();
    let mut start = port.enter(address(2)).await.unwrap();
    say(&mut start, "GET /v1/manifest HTTP/1.1\r\nhost:").await.unwrap();
    let mut reader = port.enter(address(3)).await.unwrap();
    let slowly = async {
        if whole {
            register_long_names(&cluster, 140).await;
            cluster.level().await.unwrap();
            say(&mut reader, &get("/v1/records?limit=1000")).await.unwrap();
            for _ in 0..30 {
                let _ = reader.read_u8().await;
                sleep(Duration::from_secs(1)).await;
            }
            assert!(measured(&port, &turned_away("answer", "slow")).await >= 1.0);
        }
    };
    let head = async {
        if whole {
            ends("a head", &mut start, 29..40).await;
        }
    };
    tokio::join!(ends("a handshake", &mut handshake, 9..15), ends("a body", &mut body, 14..20), head, slowly);
    assert_eq!(measured(&port, &turned_away("handshake", "slow")).await, 1.0);
    let status = cluster.client.server_status(ServerId(0)).await.unwrap();
    assert!(status.troubles.is_empty());
}

/// Heads alone are answered one by one: they are not made in advance for somebody who does not read them.
#[tokio::test(flavor = "multi_thread")]
async fn b4_answers_without_a_body_do_not_pile_up() {
    let cluster = Cluster::start(4).await.unwrap();
    let port = Port::of(&cluster, 0).unwrap();
    let mut stream = port.enter(address(0)).await.unwrap();
    say(&mut stream, &"HEAD /healthz HTTP/1.1\r\nhost: x\r\n\r\n".repeat(100)).await.unwrap();
    let mut all = Vec::new();
    let end = async { while let Ok(1..) = stream.read_buf(&mut all).await {} };
    timeout(PATIENCE, end).await.expect("it ends");
    let all = String::from_utf8_lossy(&all);
    assert_eq!(all.matches("HTTP/1.1 200 OK").count(), 1, "{all}");
}
