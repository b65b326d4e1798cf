//! A server that lies to everybody about everything, and keeps count.

use super::{Lie, ROUTES, Route, tell};
use crate::liar::{Mouth, Pieces, Question, Speech};
use hyper::body::Bytes;
use kds_client::Link;
use kds_client::api::CHANGES_HEADER;
use quorum::{ClusterId, ServerId};
use serde_json::{Value, json};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// How old an answer is at least that is told as what is true now.
const OLD: Duration = Duration::from_millis(400);
/// And at most: later its certificate would give it away.
const TOO_OLD: Duration = Duration::from_millis(3_500);
/// How long the slow answer takes.
const LONG: Duration = Duration::from_secs(4);
/// More than any answer has.
const HUGE: usize = 48 * 1024 * 1024;
/// Lies that are remembered, to say which ones led to a wrong answer.
const LATEST: usize = 24;

/// When an answer began to be old, that answer, and the one that will be it next.
type Past = (Instant, Value, Value);

/// Which lies were told, and what they were made of.
pub struct Told {
    cluster: ClusterId,
    servers: usize,
    times: usize,
    /// How often each was told.
    told: Mutex<BTreeMap<(Route, Lie), usize>>,
    latest: Mutex<VecDeque<(Route, Lie, ServerId)>>,
    /// What was answered to each question a while ago, and since then.
    past: Mutex<BTreeMap<(Route, String), Past>>,
    /// Answers of another cluster.
    foreign: BTreeMap<Route, Value>,
    /// Something that exists, of each route.
    present: Mutex<BTreeMap<Route, Value>>,
    /// Answers to questions that are asked once.
    earlier: Mutex<BTreeMap<Route, VecDeque<Value>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Told {
    /// None was told yet; each is to be told so often.
    pub fn new(
        cluster: ClusterId,
        servers: usize,
        times: usize,
        foreign: BTreeMap<Route, Value>,
    ) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            servers,
            times,
            told: Mutex::default(),
            latest: Mutex::default(),
            past: Mutex::default(),
            foreign,
            present: Mutex::default(),
            earlier: Mutex::default(),
        })
    }
    fn wanted(&self, lie: Lie) -> usize {
        if lie.is_costly() { self.times.div_ceil(4) } else { self.times }
    }
    /// Lies that were not told often enough yet.
    pub fn missing(&self) -> Vec<(Route, Lie)> {
        let told = lock(&self.told);
        let all = ROUTES.iter().flat_map(|(.., route)| Lie::ALL.iter().map(move |lie| (*route, *lie)));
        let can = all.filter(|(route, lie)| lie.can_be_told(*route));
        can.filter(|pair| told.get(pair).copied().unwrap_or(0) < self.wanted(pair.1)).collect()
    }
    /// How many were told in all, and the last ones.
    pub fn summary(&self) -> (usize, Vec<(Route, Lie, ServerId)>) {
        (lock(&self.told).values().sum(), lock(&self.latest).iter().copied().collect())
    }
    /// Those that can be told on a route, the rarest first. The costly ones are told no more often than wanted.
    fn candidates(&self, route: Route) -> Vec<Lie> {
        let told = lock(&self.told);
        let count = |lie: Lie| told.get(&(route, lie)).copied().unwrap_or(0);
        let can = Lie::ALL.iter().copied().filter(|lie| lie.can_be_told(route));
        let mut can: Vec<_> = can.filter(|lie| !lie.is_costly() || count(*lie) < self.wanted(*lie)).collect();
        can.sort_by_key(|lie| count(*lie));
        can
    }
    fn note(&self, route: Route, lie: Lie, by: ServerId) {
        *lock(&self.told).entry((route, lie)).or_default() += 1;
        let mut latest = lock(&self.latest);
        latest.push_back((route, lie, by));
        if latest.len() > LATEST {
            latest.pop_front();
        }
    }
    /// Remembers an honest answer, for later.
    fn remember(&self, route: Route, question: &Question, document: &Value) {
        let key = (route, format!("{} {}", question.path, String::from_utf8_lossy(&question.body)));
        let mut past = lock(&self.past);
        if past.len() > 4_096 {
            past.clear();
        }
        let entry = past.entry(key).or_insert_with(|| (Instant::now(), document.clone(), document.clone()));
        if entry.0.elapsed() > TOO_OLD / 2 {
            *entry = (Instant::now(), std::mem::take(&mut entry.2), document.clone());
        }
        drop(past);
        let mut proved = None;
        find(document, &mut |object| {
            if object.get("proof").is_some() && object.get("value").is_some_and(Value::is_object) {
                proved = proved.take().or(object.get("value").cloned());
            }
        });
        if let Some(proved) = proved {
            lock(&self.present).insert(route, proved);
        }
        if Lie::Earlier.can_be_told(route) && document.get("type").is_none() {
            let mut earlier = lock(&self.earlier);
            let earlier = earlier.entry(route).or_default();
            earlier.push_back(document.clone());
            if earlier.len() > 8 {
                earlier.pop_front();
            }
        }
    }
    fn past(&self, route: Route, question: &Question) -> Option<Value> {
        let key = (route, format!("{} {}", question.path, String::from_utf8_lossy(&question.body)));
        let past = lock(&self.past);
        let (since, document, _) = past.get(&key)?;
        (OLD..TOO_OLD).contains(&since.elapsed()).then(|| document.clone())
    }
}

fn find(document: &Value, visit: &mut dyn FnMut(&Value)) {
    match document {
        Value::Object(object) => {
            visit(document);
            object.values().for_each(|value| find(value, visit));
        }
        Value::Array(values) => values.iter().take(8).for_each(|value| find(value, visit)),
        _ => {}
    }
}

/// One server's mouth. `own` is the honest process behind it, `other` another honest server.
pub fn mouth(told: &Arc<Told>, server: ServerId, own: Link, other: Link) -> Arc<Mouth> {
    let speaker = Arc::new(Speaker { told: Arc::clone(told), server, own, other });
    Arc::new(move |question| {
        let speaker = Arc::clone(&speaker);
        Box::pin(async move { speaker.say(question).await })
    })
}

struct Speaker {
    told: Arc<Told>,
    server: ServerId,
    own: Link,
    other: Link,
}

impl Speaker {
    async fn say(&self, question: Question) -> Option<Speech> {
        let Some(route) = Route::of(&question.method, &question.path) else {
            return Some(Speech::bytes(404, ""));
        };
        let (status, honest) = self.honest(route, &question).await;
        if route == Route::Unasked {
            return Some(Speech::document(status, &honest));
        }
        self.told.remember(route, &question, &honest);
        for lie in self.told.candidates(route) {
            if lie == Lie::Slow {
                // Nobody waits for its end.
                self.told.note(route, lie, self.server);
                sleep(LONG).await;
                return None;
            }
            if let Some(mut speech) = self.lie(lie, route, &question, status, &honest).await {
                self.told.note(route, lie, self.server);
                if let Some(speech) = &mut speech {
                    // There are no changes: whoever believes that there are asks for them.
                    speech.headers.push((CHANGES_HEADER, "7".into()));
                }
                return speech;
            }
        }
        Some(answer(route, status, &honest))
    }
    /// What its own process answers. Of a stream, what it begins with.
    async fn honest(&self, route: Route, question: &Question) -> (u16, Value) {
        match route {
            Route::Watch => {
                let path = question.path.replace("/watch", "");
                let question = Question { path, ..question.clone() };
                question.put_to(&self.own).await
            }
            _ => question.put_to(&self.own).await,
        }
    }
    /// None if there is nothing to lie about; an inner none if the connection is to break.
    async fn lie(
        &self,
        lie: Lie,
        route: Route,
        question: &Question,
        status: u16,
        honest: &Value,
    ) -> Option<Option<Speech>> {
        if let Some((status, document)) = tell::problem(lie) {
            let mut speech = Speech::document(status, &document);
            speech.headers.push(("retry-after", "30".into()));
            return Some(Some(speech));
        }
        let mut document = honest.clone();
        let said = match lie {
            Lie::Page => Speech::bytes(500, "<html>down for maintenance</html>"),
            Lie::OtherJson => answer(route, 200, &json!([1, 2, 3])),
            Lie::DeepJson => Speech::bytes(200, "[".repeat(100_000)),
            Lie::Garbage => Speech::bytes(200, vec![0xff; 1_000]),
            Lie::Nothing => Speech::bytes(200, ""),
            Lie::Huge => huge(),
            Lie::Dropped => return Some(None),
            Lie::Flood => stream(Bytes::from(event(honest)), true),
            Lie::EmptyLines => stream(Bytes::from(vec![b'\n'; 1024 * 1024]), true),
            Lie::Stale => {
                answer(route, status, &self.told.past(route, question).filter(|past| past != honest)?)
            }
            Lie::OtherCluster => answer(route, 200, self.told.foreign.get(&route)?),
            Lie::PresentForAbsent => {
                let present = lock(&self.told.present).get(&route)?.clone();
                let mut changed = false;
                // A refusal with its proof becomes an answer.
                let inner = document.get("answer").cloned();
                document = inner.unwrap_or(document);
                absent(&mut document, &mut |value| {
                    *value = present.clone();
                    changed = true;
                });
                changed.then(|| answer(route, 200, &document))?
            }
            Lie::Earlier => {
                let earlier = lock(&self.told.earlier);
                let asks_the_same = |other: &Value| {
                    other["reply"] == honest["reply"] && other["release"] == honest["release"]
                };
                answer(route, 200, earlier.get(&route)?.iter().find(|other| !asks_the_same(other))?)
            }
            Lie::WrongShare | Lie::ZeroShare => tell::share(lie, &mut document, &self.told.cluster)
                .then(|| answer(route, status, &document))?,
            Lie::SwappedShare | Lie::OthersShare => {
                let (status, mut others) = question.put_to(&self.other).await;
                let is_one = others.get("share").is_some_and(Value::is_string);
                if lie == Lie::SwappedShare {
                    tell::as_server(&mut others, self.server);
                }
                is_one.then(|| answer(route, status, &others))?
            }
            _ => match tell::other_question(lie, route, &question.path, &question.body) {
                Some((path, body)) => {
                    let other = Question { method: question.method.clone(), path, body };
                    let (status, true_elsewhere) = other.put_to(&self.own).await;
                    (true_elsewhere != *honest).then(|| answer(route, status, &true_elsewhere))?
                }
                None => {
                    let changed = tell::change(lie, &mut document, self.told.servers);
                    changed.then(|| answer(route, status, &document))?
                }
            },
        };
        Some(Some(said))
    }
}

/// What is said not to exist.
fn absent(document: &mut Value, change: &mut dyn FnMut(&mut Value)) {
    match document {
        Value::Object(object) => {
            if object.contains_key("proof") && object.get("value").is_some_and(Value::is_null) {
                object.get_mut("value").into_iter().for_each(&mut *change);
            }
            object.values_mut().for_each(|value| absent(value, change));
        }
        Value::Array(values) => values.iter_mut().take(64).for_each(|value| absent(value, change)),
        _ => {}
    }
}

fn event(answer: &Value) -> String {
    format!("data:{}\n\n", json!({ "answer": answer }))
}

fn answer(route: Route, status: u16, document: &Value) -> Speech {
    match route {
        Route::Watch => stream(Bytes::from(event(document)), false),
        _ => Speech::document(status, document),
    }
}

/// A piece, and then the same again and again, or only signs of life.
fn stream(piece: Bytes, again: bool) -> Speech {
    let (sender, body) = Pieces::new();
    tokio::spawn(async move {
        let began = Instant::now();
        let mut next = piece.clone();
        while began.elapsed() < LONG && sender.send(next).await.is_ok() {
            next = if again { piece.clone() } else { Bytes::from_static(b":\n\n") };
            if !again {
                sleep(Duration::from_millis(300)).await;
            }
        }
    });
    Speech { status: 200, headers: vec![], body }
}

fn huge() -> Speech {
    let (sender, body) = Pieces::new();
    tokio::spawn(async move {
        let piece = Bytes::from(vec![b' '; 256 * 1024]);
        for _ in 0..HUGE / piece.len() {
            if sender.send(piece.clone()).await.is_err() {
                return;
            }
        }
    });
    Speech { status: 200, headers: vec![], body }
}
