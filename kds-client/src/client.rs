//! The client: links to every server, what it trusts, and what it has seen.

use crate::error::{ClientError, LinkError, Misbehaviour};
use crate::link::Link;
use quorum::answer::{AnswerError, Verifier};
use quorum::certificate::Completion;
use quorum::ids::{Sequence, ServerId};
use quorum::manifest::Manifest;
use quorum::record::Name;
use rand::seq::SliceRandom as _;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an operation may take in all.
    pub timeout: Duration,
    /// How long a server may take before another row is asked too.
    pub hedge: Duration,
    /// How old a certificate may be.
    pub max_age: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            hedge: Duration::from_millis(500),
            max_age: Duration::from_secs(5),
        }
    }
}

/// Names whose newest version is remembered, so that a client never returns less than it has seen.
const REMEMBERED_NAMES: usize = 65_536;

/// A client of one cluster. Cheap to clone; clones share connections and what they have checked.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) links: Vec<Link>,
    pub(crate) options: Options,
    verifier: Mutex<Verifier>,
    seen: Mutex<BTreeMap<Name, u64>>,
}

impl Client {
    /// Trusts the manifest. Connects when it is used.
    pub fn new(manifest: Arc<Manifest>, options: Options) -> Result<Self, ClientError> {
        manifest.validate().map_err(|e| ClientError::Local(e.to_string()))?;
        let links = manifest.grid().servers().map(|server| Link::new(&manifest, server));
        let links = links.collect::<Result<_, _>>().map_err(ClientError::Local)?;
        let verifier = Mutex::new(Verifier::new(Arc::clone(&manifest)));
        let inner = Inner { manifest, links, options, verifier, seen: Mutex::new(BTreeMap::new()) };
        Ok(Self { inner: Arc::new(inner) })
    }
    /// The cluster's manifest.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.inner.manifest
    }
    /// The connection to a server, for tools that look at one server alone.
    pub fn link(&self, server: ServerId) -> Option<&Link> {
        self.inner.links.get(server.index())
    }
    /// What one server says of itself.
    pub async fn server_status(&self, server: ServerId) -> Result<crate::api::ServerStatus, String> {
        let link = self.link(server).ok_or("no such server")?;
        let answer = tokio::time::timeout(self.inner.options.timeout, link.get("/v1/status")).await;
        answer.map_err(|_| "no answer in time".to_owned())?.map_err(|e: LinkError| e.to_string())
    }

    pub(crate) fn verifier(&self) -> MutexGuard<'_, Verifier> {
        // A panic while it was held cannot leave it half-changed in a way that accepts more.
        self.inner.verifier.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.inner.options.timeout
    }
    /// All servers, in random order: load spreads, and nobody can expect to be asked.
    pub(crate) fn shuffled(&self) -> Vec<ServerId> {
        let mut servers: Vec<_> = self.inner.manifest.grid().servers().collect();
        servers.shuffle(&mut rand::rng());
        servers
    }
    /// The newest version of a name that this client has returned.
    pub(crate) fn seen(&self, name: &Name) -> u64 {
        self.seen_map().get(name).copied().unwrap_or(0)
    }
    pub(crate) fn remember(&self, name: &Name, version: u64) {
        let mut seen = self.seen_map();
        if seen.len() >= REMEMBERED_NAMES && !seen.contains_key(name) {
            seen.pop_first();
        }
        let known = seen.entry(name.clone()).or_default();
        *known = version.max(*known);
    }
    fn seen_map(&self) -> MutexGuard<'_, BTreeMap<Name, u64>> {
        self.inner.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Asks servers one after the other, in random order, until one gives an answer that `check`
    /// accepts. For answers that prove themselves, where one server is enough.
    pub(crate) async fn first_good<T, U>(
        &self,
        path: &str,
        check: impl Fn(&mut Verifier, &T) -> Result<U, AnswerError>,
    ) -> Result<U, ClientError>
    where
        T: serde::de::DeserializeOwned,
    {
        let deadline = self.deadline();
        let (mut silent, mut rejected) = (Vec::new(), Vec::new());
        for server in self.shuffled() {
            let patience = self.inner.options.hedge.max(Duration::from_secs(2));
            let until = deadline.min(Instant::now() + patience);
            let answer =
                tokio::time::timeout_at(until, self.inner.links[server.index()].get::<T>(path)).await;
            match answer.unwrap_or_else(|_| Err(LinkError::Silent("no answer in time".into()))) {
                Ok(answer) => match check(&mut self.verifier(), &answer) {
                    Ok(good) => return Ok(good),
                    Err(error) => rejected.push(Misbehaviour { server, why: error.to_string() }),
                },
                Err(LinkError::Nonsense(why)) => rejected.push(Misbehaviour { server, why }),
                Err(LinkError::Silent(_) | LinkError::Problem(_)) => silent.push(server),
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(failure("one server with a good answer", vec![], silent, rejected))
    }

    /// Waits until everything up to `sequence` is shown to be complete: servers that hold it cover
    /// c columns and number q, by their own signed statements (design §2). False if it is not
    /// within `patience`.
    pub(crate) async fn complete_through(&self, sequence: Sequence, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            if self.verifier().complete() >= sequence {
                return true;
            }
            // Servers gossip their statements; f+1 of them include a correct one.
            let asked = self.inner.manifest.thresholds.f() + 1;
            for server in self.shuffled().into_iter().take(asked) {
                let link = &self.inner.links[server.index()];
                let until = deadline.min(Instant::now() + self.inner.options.hedge);
                let answer = tokio::time::timeout_at(until, link.get::<Completion>("/v1/completion")).await;
                if let Ok(Ok(completion)) = answer {
                    // A wrong statement is not believed; who made it is of no consequence here.
                    let _ = self.verifier().completion(&completion);
                }
                if self.verifier().complete() >= sequence {
                    return true;
                }
            }
            if Instant::now() >= deadline {
                return false;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Nothing came of it: because answers were bad, or because there were too few.
pub(crate) fn failure(
    needed: &str,
    answered: Vec<ServerId>,
    silent: Vec<ServerId>,
    rejected: Vec<Misbehaviour>,
) -> ClientError {
    if !rejected.is_empty() && silent.is_empty() && answered.is_empty() {
        return ClientError::Unverified { rejected };
    }
    ClientError::Unavailable { needed: needed.to_owned(), answered, silent, rejected }
}
