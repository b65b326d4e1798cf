//! The client: links to every server, what it trusts, and what it has seen.

use crate::api::MembershipAnswer;
use crate::batch::Batcher;
use crate::cache::Cache;
use crate::deadline::{after, bounded};
use crate::error::{ClientError, LinkError};
use crate::failure::Tally;
use crate::link::{Link, Wire};
use crate::pace::{self, Pace};
use crate::trust::Trust;
use quorum::answer::{AnswerError, Verifier};
use quorum::ids::ServerId;
use quorum::manifest::Manifest;
use quorum::membership::Membership;
use quorum::record::Name;
use rand::seq::SliceRandom as _;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::Instant;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long an operation may take in all.
    pub timeout: Duration,
    /// How long a server may take at most before another row is asked too. Once the client knows how long
    /// answers usually take, it waits less.
    pub hedge: Duration,
    /// How old a certificate may be.
    pub max_age: Duration,
    /// Names whose answers are kept in memory for [`Client::lookup_cached`].
    pub cached_names: usize,
    /// Where evidence of servers that contradict themselves is kept; nowhere if none.
    pub evidence: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            hedge: Duration::from_millis(500),
            max_age: Duration::from_secs(5),
            cached_names: 65_536,
            evidence: None,
        }
    }
}

impl Options {
    /// With every duration such that clocks can be added to it, and with a moment's patience at least.
    fn bounded(self) -> Self {
        Self {
            timeout: bounded(self.timeout),
            hedge: bounded(self.hedge).max(pace::LEAST),
            max_age: bounded(self.max_age),
            ..self
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
    pub(crate) batchers: Vec<Arc<Batcher>>,
    pub(crate) pace: Pace,
    pub(crate) options: Options,
    pub(crate) cache: Cache,
    trust: Arc<Trust>,
    seen: Mutex<BTreeMap<Name, u64>>,
}

impl Client {
    /// Trusts the manifest. Connects when it is used.
    pub fn new(manifest: Arc<Manifest>, options: Options) -> Result<Self, ClientError> {
        let options = options.bounded();
        manifest.validate().map_err(|e| ClientError::Local(e.to_string()))?;
        let trust = Trust::new(&manifest).map_err(ClientError::Local)?;
        let links: Vec<_> = manifest.grid().servers().map(|server| Link::of(&trust, server)).collect();
        let batcher = |link: &Link| Arc::new(Batcher::new(link.clone(), &trust));
        let batchers = links.iter().map(batcher).collect();
        let pace = Pace::new(options.hedge, links.len());
        let cache = Cache::new(options.cached_names);
        let seen = Mutex::new(BTreeMap::new());
        let inner = Inner { manifest, links, batchers, pace, options, cache, trust, seen };
        Ok(Self { inner: Arc::new(inner) })
    }
    /// The cluster's manifest.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.inner.manifest
    }
    /// Who the servers are: the manifest, and what was followed since.
    pub fn membership(&self) -> Arc<Membership> {
        self.inner.trust.membership()
    }
    /// Follows the changes that f+1 servers know, of which one at least is honest. What needs them follows
    /// them without; this is for those who want to know whether there are any.
    ///
    /// # Errors
    /// If fewer servers can be reached.
    pub async fn follow(&self) -> Result<Arc<Membership>, ClientError> {
        let needed = self.inner.manifest.thresholds.f() + 1;
        let mut tally = Tally::default();
        for server in self.preferred() {
            let path = format!("/v1/membership?from={}", self.membership().proofs().len());
            let asked = self.inner.links[server.index()].get::<MembershipAnswer>(&path);
            let asked = tokio::time::timeout(self.patience(), asked).await;
            match asked.unwrap_or_else(|_| Err(LinkError::late(self.patience()))) {
                Ok(answer) => match self.inner.trust.take(&answer) {
                    Ok(_) => tally.answered.push(server),
                    Err(error) => tally.wrong(server, &error.into()),
                },
                Err(error) => tally.failed(server, &error),
            }
            if tally.answered.len() == needed {
                return Ok(self.membership());
            }
        }
        Err(self.failure(&format!("{needed} servers"), tally).await)
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

    /// Checks something against the manifest. Evidence that turns up is kept.
    pub(crate) fn with_verifier<T>(&self, check: impl FnOnce(&mut Verifier) -> T) -> T {
        let mut verifier = self.inner.trust.verifier();
        let result = check(&mut verifier);
        let evidence = verifier.take_evidence();
        drop(verifier);
        if let (Some(evidence), Some(folder)) = (evidence, &self.inner.options.evidence) {
            crate::evidence_file::keep(folder, &self.membership(), evidence);
        }
        result
    }
    /// How long one server is waited for where any will do.
    fn patience(&self) -> Duration {
        self.inner.options.hedge.max(Duration::from_secs(2)).min(self.inner.options.timeout)
    }
    /// A connection to a server whose certificate may have ended by this machine's clock.
    pub(crate) fn wire_at_any_date(&self, server: ServerId) -> Option<Wire> {
        Wire::at_any_date(&self.membership().place(server)?).ok()
    }
    pub(crate) fn deadline(&self) -> Instant {
        after(self.inner.options.timeout)
    }
    /// All servers, in random order: load spreads, and nobody can expect to be asked.
    pub(crate) fn shuffled(&self) -> Vec<ServerId> {
        let mut servers: Vec<_> = self.inner.manifest.grid().servers().collect();
        servers.shuffle(&mut rand::rng());
        servers
    }
    /// All servers in random order, those that were silent lately last. Reads that begin in the same few
    /// milliseconds prefer the same servers: they go together in fewer requests, and over time the load
    /// spreads all the same.
    pub(crate) fn preferred(&self) -> Vec<ServerId> {
        self.inner.pace.order(|| {
            let mut servers = self.shuffled();
            servers.sort_by_key(|server| self.inner.pace.avoids(*server));
            servers
        })
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
        let mut tally = Tally::default();
        for server in self.preferred() {
            let until = deadline.min(after(self.patience()));
            let answer =
                tokio::time::timeout_at(until, self.inner.links[server.index()].get::<T>(path)).await;
            match answer.unwrap_or_else(|_| Err(LinkError::late(self.patience()))) {
                Ok(answer) => match self.with_verifier(|verifier| check(verifier, &answer)) {
                    Ok(good) => return Ok(good),
                    Err(error) => tally.wrong(server, &error),
                },
                Err(error) => tally.failed(server, &error),
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        Err(self.failure("one server with a good answer", tally).await)
    }
}
