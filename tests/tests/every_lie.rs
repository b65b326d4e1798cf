//! Every route that clients ask, and every lie that can be told on it, over real HTTPS: no wrong answer, and the
//! right one each time, while at most b servers lie to those who read rows, and f to all others.
//!
//! A liar tells at each question, of all that it can tell there, what was told least often; clients ask until
//! everything was told. `KDS_LIES` says how often each lie is to be told on each route (see `docs/testing.md`).

use kds_client::keystore::Passphrase;
use kds_client::{
    Client, ClientError, Consistency, ExitStatus, LookupOptions, Options, Ticket, WatchEvent, WhatCame,
};
use kds_tests::liar::{Liar, Question};
use kds_tests::lies::{Lie, ROUTES, Route, Told, mouth};
use kds_tests::{Cluster, entry};
use quorum::answer::Missing;
use quorum::ids::ServerId;
use quorum::limits::{OWNER_QUOTA_BYTES, TOTAL_QUOTA_BYTES};
use quorum::record::{Name, Record};
use quorum::request::{Done, Operation, Reader, Refusal, SignedRequest};
use quorum::signing::SigningKey;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Questions under way at a time.
const WORKERS: usize = 6;
/// Keys that may read secrets: each is given one so many times a minute only.
const READERS: u8 = 60;
const MATERIAL: &[u8] = b"what k servers know together";

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}
fn reader(number: usize) -> SigningKey {
    SigningKey::from_seed(&[100 + (number % usize::from(READERS)) as u8; 32])
}
fn hex(key: &SigningKey) -> String {
    key.public().0.iter().map(|byte| format!("{byte:02x}")).collect()
}
fn passphrase() -> Passphrase {
    Passphrase::new("seven words that nobody else ever says")
}

/// What clients ask of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Lookup,
    Version,
    Moving,
    Listing,
    History,
    Watching,
    Write,
    Outcome,
    RefusedWrite,
    StrangersWrite,
    LateWrite,
    Pending,
    Administrators,
    Secret,
    Secrets,
    Recovery,
    Deposit,
    Space,
    Guess,
    Follow,
}

const ASKED: &[(Asked, &[Route])] = &[
    (Asked::Lookup, &[Route::Bulk, Route::Completion]),
    (Asked::Version, &[Route::Record]),
    (Asked::Moving, &[Route::Bulk, Route::Completion]),
    (Asked::Listing, &[Route::List]),
    (Asked::History, &[Route::History]),
    (Asked::Watching, &[Route::Watch]),
    (Asked::Write, &[Route::Requests]),
    (Asked::Outcome, &[Route::Outcome]),
    (Asked::RefusedWrite, &[Route::Requests]),
    (Asked::StrangersWrite, &[Route::Requests]),
    (Asked::LateWrite, &[Route::Status]),
    (Asked::Pending, &[Route::Outcome]),
    (Asked::Administrators, &[Route::Administrators, Route::Decisions]),
    (Asked::Secret, &[Route::Secret]),
    (Asked::Secrets, &[Route::Secrets]),
    (Asked::Recovery, &[Route::Shares]),
    (Asked::Deposit, &[Route::Servers]),
    (Asked::Space, &[Route::Space]),
    (Asked::Guess, &[]),
    (Asked::Follow, &[Route::Membership]),
];

impl Asked {
    /// Whether it reads rows, where no more than b may lie.
    fn reads_rows(self) -> bool {
        use Asked::{History, Listing, Lookup, Moving, Outcome, Pending, Secrets, Version, Watching};
        matches!(self, Lookup | Version | Moving | Listing | History | Watching | Secrets | Outcome | Pending)
    }
}

/// What everybody knows who asks.
struct World {
    cluster: Cluster,
    told: Arc<Told>,
    liars: Vec<ServerId>,
    secret: u64,
    /// The newest version of `f-m` that is complete.
    moved: AtomicU64,
    count: AtomicUsize,
}

async fn fill(cluster: &Cluster) -> u64 {
    let (client, key) = (&cluster.client, &cluster.administrator);
    for text in ["f-a", "f-b", "f-c", "f-m"] {
        cluster.register(text, 1).await.unwrap();
    }
    // Who deposits has space: that comes with a name.
    for number in 0..usize::from(READERS) {
        let owned = entry(1, Some(&reader(number)));
        client.register(key, name(&format!("r-{number}")), owned).await.unwrap();
    }
    for version in 1..3 {
        client.rotate(key, name("f-a"), version, entry(version as u8 + 1, None)).await.unwrap();
    }
    let readers: Vec<_> = (0..READERS).map(|number| Reader::Key(reader(number.into()).public())).collect();
    client.put_secret(key, &name("s-b"), b"another", &[], false, true).await.unwrap();
    let guarded = (&passphrase(), 30);
    client.put_secret_behind(key, &name("s-p"), MATERIAL, &[], guarded, false, true).await.unwrap();
    client.put_secret(key, &name("s-a"), MATERIAL, &readers, false, true).await.unwrap().index
}

/// Answers for the other cluster's liars.
async fn answers(cluster: &Cluster) -> BTreeMap<Route, Value> {
    let link = cluster.client.link(ServerId(0)).unwrap();
    let mut answers = BTreeMap::new();
    for (route, path) in [
        (Route::List, "/v1/records?prefix=f-&from=f-&limit=500"),
        (Route::Record, "/v1/records/f-a?version=1"),
        (Route::Watch, "/v1/records/f-m"),
        (Route::History, "/v1/records/f-a/history?from=1"),
        (Route::Servers, "/v1/servers"),
        (Route::Administrators, "/v1/administrators"),
        (Route::Decisions, "/v1/decisions"),
        (Route::Space, &format!("/v1/space/{}", hex(&reader(0)))),
        (Route::Completion, "/v1/completion"),
        (Route::Secrets, "/v1/secrets?prefix=s-&from=s-&limit=500"),
        (Route::Secret, "/v1/secrets/s-a"),
    ] {
        let question = Question { method: "GET".into(), path: path.into(), body: vec![] };
        let (status, document) = question.put_to(link).await;
        assert_eq!(status, 200, "{path}");
        answers.insert(route, document);
    }
    let body = json!({ "names": ["f-a"] }).to_string().into();
    let question = Question { method: "POST".into(), path: "/v1/records/lookup".into(), body };
    answers.insert(Route::Bulk, question.put_to(link).await.1);
    answers
}

impl World {
    /// A client that has seen nothing, and that for a while asks the liars first, if it is to.
    async fn client(&self, liars_first: bool) -> Client {
        let client = self.cluster.fresh_client();
        if liars_first {
            for server in self.cluster.manifest.grid().servers().filter(|server| !self.liars.contains(server))
            {
                // What cannot even be sent is a silence like any other.
                assert!(client.link(server).unwrap().send("GET", " ", vec![]).await.is_err());
            }
        }
        client
    }

    async fn ask(&self, asked: Asked, number: usize) -> Result<(), String> {
        let client = self.client(number % 4 != 3).await;
        let failed = |error: ClientError| error.to_string();
        let right = |right: bool, what: &dyn std::fmt::Debug| match right {
            true => Ok(()),
            false => Err(format!("a wrong answer: {what:?}")),
        };
        let admin = &self.cluster.administrator;
        let plain = LookupOptions::default();
        match asked {
            Asked::Lookup => {
                for consistency in [Consistency::Row, Consistency::Quorum, Consistency::Any] {
                    let options = LookupOptions { consistency, ..plain.clone() };
                    let found = client.lookup(&name("f-a"), &options).await.map_err(failed)?;
                    let record = found.record.as_ref();
                    right(
                        record.is_some_and(|r| r.version == 3 && r.entry == entry(3, None)),
                        &found.record,
                    )?;
                    let found = client.lookup(&name("f-z"), &options).await.map_err(failed)?;
                    let absent = found.absence().map(|absence| absence.of().clone());
                    right(absent == Some(Missing::Name(name("f-z"))) && found.record.is_none(), &absent)?;
                }
                Ok(())
            }
            Asked::Version => {
                for (version, byte) in [(1, Some(1)), (9, None)] {
                    let options = LookupOptions { version: Some(version), ..plain.clone() };
                    let found = client.lookup(&name("f-a"), &options).await.map_err(failed)?;
                    let expected = byte.map(|byte| (version, entry(byte, None)));
                    right(found.record.map(|r| (r.version, r.entry)) == expected, &version)?;
                }
                Ok(())
            }
            Asked::Moving => {
                let least = self.moved.load(Ordering::SeqCst);
                let consistency =
                    if number.is_multiple_of(2) { Consistency::Row } else { Consistency::Quorum };
                let options = LookupOptions { consistency, ..plain };
                let found = client.lookup(&name("f-m"), &options).await.map_err(failed)?;
                let version = found.record.map_or(0, |record| record.version);
                right(version >= least, &(version, least))
            }
            Asked::Listing => {
                let least = self.moved.load(Ordering::SeqCst);
                let records = client.list("f-").await.map_err(failed)?;
                let names: Vec<_> = records.iter().map(|record| record.name.as_str()).collect();
                right(names == ["f-a", "f-b", "f-c", "f-m"], &names)?;
                right(records[0].version == 3 && records[3].version >= least, &(records[3].version, least))
            }
            Asked::History => {
                let records: Vec<Record> = client.history(&name("f-a")).await.map_err(failed)?;
                let versions: Vec<_> = records.iter().map(|r| (r.version, r.entry.clone())).collect();
                right(versions == [1, 2, 3].map(|i| (i, entry(i as u8, None))), &versions)?;
                let none = client.history(&name("f-z")).await.map_err(|error| error.exit_status());
                right(matches!(none, Err(ExitStatus::NotFound)), &none)
            }
            Asked::Watching => {
                let since = self.moved.load(Ordering::SeqCst);
                let mut watch = client.watch(&name("f-m"), since);
                for version in since + 1..since + 4 {
                    let event = timeout(Duration::from_secs(15), watch.next()).await;
                    let event = event.map_err(|_| "a watch tells nothing".to_owned())?.map_err(failed)?;
                    let WatchEvent::Version(record) = event else { return Err(format!("{event:?}")) };
                    right(record.version == version, &(record.version, version))?;
                }
                Ok(())
            }
            Asked::Write | Asked::Outcome => {
                let text = format!("w-{number}");
                let operation = Operation::Register { name: name(&text), entry: entry(7, None) };
                let request = client.sign(admin, rand::random(), operation);
                let written = client.submit_signed(&request).await.map_err(failed)?;
                right(written.done == Done::Record { version: 1 }, &written.done)?;
                if asked == Asked::Write {
                    return Ok(());
                }
                let came = client
                    .outcome(&Ticket::of(&client.manifest().cluster_id(), &request))
                    .await
                    .map_err(failed)?;
                let WhatCame::Executed(executed) = came else { return Err(format!("{came:?}")) };
                right(executed.outcome() == Ok(&Done::Record { version: 1 }), &executed.reply().outcome)
            }
            Asked::RefusedWrite => {
                let refused = client.register(admin, name("f-a"), entry(7, None)).await.map(|_| ());
                let Err(ClientError::Refused(refused)) = refused else { return Err(format!("{refused:?}")) };
                right(*refused.refusal() == Refusal::NameTaken { version: 3 }, &refused)
            }
            Asked::StrangersWrite => {
                let stranger = SigningKey::from_seed(&[99; 32]);
                let refused = client.register(&stranger, name("f-y"), entry(7, None)).await.map(|_| ());
                let status = refused.as_ref().map_err(ClientError::exit_status);
                let by_servers = matches!(&refused, Err(ClientError::RefusedByServers { said, .. })
                    if said.servers().len() > self.cluster.manifest.thresholds.f());
                right(by_servers && status == Err(ExitStatus::Refused), &refused)
            }
            Asked::LateWrite => {
                let expiry = quorum::Timestamp(kds_client::now().0 - 60_000);
                let operation = Operation::Register { name: name("f-y"), entry: entry(7, None) };
                let cluster = self.cluster.manifest.cluster_id();
                let request = SignedRequest::sign(&cluster, admin, rand::random(), expiry, operation);
                match client.submit_signed(&request).await {
                    // Nothing is wrong with this machine's clock, whatever one server says of it.
                    Err(error) if !matches!(error, ClientError::Clock { .. }) => {
                        right(error.to_string().contains("unusable expiry"), &error)
                    }
                    other => Err(format!("{other:?}")),
                }
            }
            Asked::Pending => {
                let operation = Operation::Register { name: name("f-y"), entry: entry(7, None) };
                let request = client.sign(admin, 77, operation);
                let came = client
                    .outcome(&Ticket::of(&client.manifest().cluster_id(), &request))
                    .await
                    .map_err(failed)?;
                right(matches!(came, WhatCame::Pending), &came)
            }
            Asked::Administrators => {
                let administrators = client.administrators().await.map_err(failed)?;
                right(administrators == [admin.public()], &administrators)?;
                let decisions = client.decisions().await.map_err(failed)?;
                right(decisions.is_empty(), &decisions)
            }
            Asked::Secret => {
                let found = client.secret(&name("s-a")).await.map_err(failed)?;
                right(found.as_ref().is_some_and(|(secret, _)| secret.index == self.secret), &found)?;
                let absent = client.shown_secret(&name("s-z")).await.map_err(failed)?.found();
                let absent = absent.map_err(|absence| absence.of().clone());
                right(absent == Err(Missing::Secret(name("s-z"))), &absent)
            }
            Asked::Secrets => {
                let secrets = client.list_secrets("s-").await.map_err(failed)?;
                let names: Vec<_> = secrets.iter().map(|secret| secret.name.as_str()).collect();
                right(names == ["s-a", "s-b", "s-p"], &names)
            }
            Asked::Recovery => {
                let back = client.get_secret(&reader(number), &name("s-a")).await.map_err(failed)?;
                let honest = |bad: &kds_client::Misbehaviour| !self.liars.contains(&bad.server);
                right(**back.material == *MATERIAL && !back.wrong.iter().any(honest), &back.wrong)
            }
            Asked::Deposit => {
                let (key, text) = (reader(number), format!("t-{number}"));
                let put = client.put_secret(&key, &name(&text), MATERIAL, &[], false, false).await;
                right(put.map_err(failed)?.proved, &text)
            }
            Asked::Space => {
                let key = reader(0).public();
                let (space, owner) = client.space(&key).await.map_err(failed)?;
                let quotas = (space.total, space.each) == (TOTAL_QUOTA_BYTES, OWNER_QUOTA_BYTES);
                let hers = owner.is_some_and(|(owner, account)| {
                    (owner.names, owner.account) == (1, key)
                        && !owner.refuses_gifts
                        && account.quota.is_none()
                });
                right(quotas && hers && space.used > 1_000, &(space, owner))?;
                let (_, nobody) =
                    client.space(&SigningKey::from_seed(&[99; 32]).public()).await.map_err(failed)?;
                right(nobody.is_none(), &nobody)
            }
            Asked::Guess => {
                let back =
                    client.get_secret_behind(None, &name("s-p"), &passphrase()).await.map_err(failed)?;
                right(**back.material == *MATERIAL, &back)
            }
            Asked::Follow => {
                let membership = client.follow().await.map_err(failed)?;
                right(membership.changes().is_empty(), &membership.changes())
            }
        }
    }

    /// Whom nothing was asked of yet that is missing; none if all was told.
    fn next(&self, may: &dyn Fn(Asked) -> bool) -> Option<(Asked, usize)> {
        let missing: BTreeSet<_> = self.told.missing().into_iter().map(|(route, _)| route).collect();
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        let wanted = |(asked, routes): &&(Asked, &[Route])| {
            may(*asked) && routes.iter().any(|route| missing.contains(route))
        };
        let wanted: Vec<_> = ASKED.iter().filter(wanted).map(|(asked, _)| *asked).collect();
        // A guess takes long, and tells of nothing that a recovery does not.
        let guess = number % 400 == 399;
        (!wanted.is_empty())
            .then(|| (if guess { Asked::Guess } else { wanted[number % wanted.len()] }, number))
    }
}

/// Rotates one name all the time, while others read it.
async fn move_on(world: Arc<World>, stop: Arc<AtomicBool>) {
    let mut version = 1;
    while !stop.load(Ordering::Relaxed) {
        let (client, key) = (&world.cluster.client, &world.cluster.administrator);
        let written = client.rotate(key, name("f-m"), version, entry((version % 200) as u8 + 1, None)).await;
        let written = written.unwrap_or_else(|error| panic!("version {version}: {error}"));
        version += 1;
        assert_eq!(written.done, Done::Record { version });
        if written.complete {
            world.moved.store(version, Ordering::SeqCst);
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// Asks everything that may be asked until every lie was told.
async fn tell_everything(world: &Arc<World>, may: fn(Asked) -> bool, most: Duration) {
    let began = Instant::now();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..WORKERS {
        let world = Arc::clone(world);
        workers.spawn(async move {
            let mut done = BTreeMap::new();
            while let Some((asked, number)) = world.next(&may) {
                assert!(began.elapsed() < most, "not told in {most:?}: {:?}", world.told.missing());
                if let Err(why) = world.ask(asked, number).await {
                    panic!("{asked:?}: {why}\n{:#?}", world.told.summary().1);
                }
                *done.entry(format!("{asked:?}")).or_insert(0) += 1;
            }
            done
        });
    }
    let mut sum = BTreeMap::<String, usize>::new();
    while let Some(done) = workers.join_next().await {
        done.unwrap().into_iter().for_each(|(asked, count)| *sum.entry(asked).or_default() += count);
    }
    eprintln!("{} lies in {:?}; right answers: {sum:?}", world.told.summary().0, began.elapsed());
}

/// A cluster some of whose servers lie to their clients, and take part in ordering as they should.
async fn lied_to(
    mut cluster: Cluster,
    begin: usize,
    secret: u64,
    liars: &[usize],
    foreign: BTreeMap<Route, Value>,
    times: usize,
) -> (Arc<World>, Vec<Liar>) {
    let told = Told::new(cluster.manifest.cluster_id(), cluster.manifest.servers.len(), times, foreign);
    let mut speaking = Vec::new();
    for server in liars {
        let own = cluster.hide_behind(*server).unwrap();
        cluster.terminate(*server).unwrap();
        cluster.run(*server).unwrap();
        let id = ServerId(*server as u8);
        let other = cluster.client.link(ServerId(0)).unwrap().clone();
        let mouth = mouth(&told, id, own, other);
        let folder = cluster.server_dir(*server);
        speaking.push(Liar::speaking(&cluster.manifest, id, &folder, mouth).await.unwrap());
    }
    let options = Options { timeout: Duration::from_secs(20), ..Options::default() };
    cluster.client = Client::new(Arc::clone(&cluster.manifest), options).unwrap();
    let liars = liars.iter().map(|server| ServerId(*server as u8)).collect();
    let (moved, count) = (AtomicU64::new(1), AtomicUsize::new(begin));
    (Arc::new(World { cluster, told, liars, secret, moved, count }), speaking)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lie_on_every_route_is_told_and_nothing_wrong_is_believed() {
    let times = std::env::var("KDS_LIES").ok().map_or(2, |times| times.parse().expect("a number"));
    let most = Duration::from_secs(60) * times.max(1) as u32;
    let small = Cluster::start_unlimited(4).await.unwrap();
    let large = Cluster::start_unlimited(9).await.unwrap();
    let (small_secret, large_secret) = (fill(&small).await, fill(&large).await);
    let (of_small, of_large) = (answers(&small).await, answers(&large).await);

    // No route is left out: neither by those who made this table nor by those who make a route.
    let document = Question { method: "GET".into(), path: "/v1/openapi.json".into(), body: vec![] };
    let (_, document) = document.put_to(small.client.link(ServerId(0)).unwrap()).await;
    let routes: BTreeSet<_> =
        ROUTES.iter().map(|(method, path, _)| (method.to_string(), path.to_string())).collect();
    let methods = |(path, methods): (&String, &Value)| {
        let methods: Vec<_> = methods.as_object().unwrap().keys().cloned().collect();
        methods.into_iter().map(|method| (method, path.clone())).collect::<Vec<_>>()
    };
    let described: BTreeSet<_> = document["paths"].as_object().unwrap().iter().flat_map(methods).collect();
    assert_eq!(routes, described, "a route without lies");
    for (.., route) in ROUTES.iter().filter(|(.., route)| *route != Route::Unasked) {
        assert!(ASKED.iter().any(|(_, routes)| routes.contains(route)), "nobody asks {route:?}");
        assert!(Lie::ALL.iter().filter(|lie| lie.can_be_told(*route)).count() > 15, "{route:?}");
    }

    for (cluster, secret, liar, more, foreign) in
        [(small, small_secret, 2, None, of_large), (large, large_secret, 4, Some(8), of_small)]
    {
        // b of nine for those who read rows; one of four, of which every read asks q.
        let (world, liars) = lied_to(cluster, 0, secret, &[liar], foreign.clone(), times).await;
        let stop = Arc::new(AtomicBool::new(false));
        let mover = tokio::spawn(move_on(Arc::clone(&world), Arc::clone(&stop)));
        tell_everything(&world, |_| true, most).await;
        stop.store(true, Ordering::Relaxed);
        mover.await.unwrap();
        drop(liars);
        let Some(more) = more else { continue };
        // f of nine for all others.
        let cluster = Arc::into_inner(world).expect("nobody asks any more").cluster;
        let (world, _liars) = lied_to(cluster, 1_000_000, secret, &[liar, more], foreign, times).await;
        tell_everything(&world, |asked| !asked.reads_rows(), most).await;
    }
}
