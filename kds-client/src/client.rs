//! The client: links to every server, what it trusts, and what it has seen.

use crate::api::MembershipAnswer;
use crate::batch::Batcher;
use crate::bounds::Answer;
use crate::cache::Flights;
use crate::deadline::{after, bounded, millis};
use crate::error::{AsksToWait, ClientError, LinkError, Silence};
use crate::link::{Link, Wire};
use crate::pace::{self, Pace};
use crate::seen::Seen;
use crate::trust::Trust;
use crate::turns::Turns;
use quorum::answer::{AnswerError, Verifier};
use quorum::certificate::Checkpoint;
use quorum::ids::{Sequence, ServerId};
use quorum::manifest::Manifest;
use quorum::membership::Membership;
use rand::seq::SliceRandom as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// How a client behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long a lookup or a write may take in all, of whichever names; a page of a listing or of a history; and
    /// each step of what has several, as secrets do.
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

/// Reads that one client has under way at once; more of them wait for room.
pub(crate) const MOST_READS: usize = 2_048;

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

/// A client of one cluster. Cheap to clone; clones share connections and what they have checked and told.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
    /// How long an operation may take in all.
    timeout: Duration,
    /// When the operation has to be done that this handle is used within.
    until: Option<Instant>,
}

pub(crate) struct Inner {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) links: Vec<Link>,
    pub(crate) batchers: Vec<Arc<Batcher>>,
    pub(crate) pace: Arc<Pace>,
    pub(crate) options: Options,
    pub(crate) seen: Seen,
    pub(crate) flights: Flights,
    pub(crate) reads: Semaphore,
    trust: Arc<Trust>,
}

impl Client {
    /// Trusts the manifest. Connects when it is used.
    pub fn new(manifest: Arc<Manifest>, options: Options) -> Result<Self, ClientError> {
        let options = options.bounded();
        manifest.validate().map_err(|e| ClientError::Local(e.to_string()))?;
        let trust = Trust::new(&manifest).map_err(ClientError::Local)?;
        let pace = Arc::new(Pace::new(options.hedge, manifest.servers.len()));
        let links: Vec<_> = manifest.grid().servers().map(|server| Link::of(&trust, &pace, server)).collect();
        let batcher = |link: &Link| Arc::new(Batcher::new(link.clone(), &trust));
        let batchers = links.iter().map(batcher).collect();
        let (seen, flights) = (Seen::new(options.cached_names), Flights::default());
        let (reads, timeout) = (Semaphore::new(MOST_READS), options.timeout);
        let inner = Inner { manifest, links, batchers, pace, options, seen, flights, reads, trust };
        Ok(Self { inner: Arc::new(inner), timeout, until: None })
    }
    /// The same client, whose operations may take so long.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { inner: Arc::clone(&self.inner), timeout: bounded(timeout), until: None }
    }
    /// How long its operations may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }
    /// A handle for one operation: whatever is done with it has to be done within the timeout that began with the
    /// first of it.
    pub(crate) fn begun(&self) -> Self {
        Self { until: Some(self.deadline()), ..self.clone() }
    }
    /// When what begins now has to be done.
    pub(crate) fn deadline(&self) -> Instant {
        self.until.unwrap_or_else(|| after(self.timeout))
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
        let mut turns = Turns::new(self);
        while let Some((server, until)) = turns.next().await {
            let path = format!("/v1/membership?from={}", self.membership().proofs().len());
            match self.inner.links[server.index()].get::<MembershipAnswer>(&path, until).await {
                Ok(answer) => match self.inner.trust.take(&answer) {
                    Ok(_) => turns.tally.answered.push(server),
                    Err(error) => turns.wrong(server, &error.into()),
                },
                Err(error) => turns.failed(server, &error),
            }
            if turns.tally.answered.len() == needed {
                return Ok(self.membership());
            }
        }
        Err(self.failure(&format!("{needed} servers"), turns.tally).await)
    }
    /// The connection to a server, for tools that look at one server alone.
    pub fn link(&self, server: ServerId) -> Option<&Link> {
        self.inner.links.get(server.index())
    }
    /// What one server says of itself.
    pub async fn server_status(&self, server: ServerId) -> Result<crate::api::ServerStatus, String> {
        let link = self.link(server).ok_or("no such server")?;
        link.get("/v1/status", self.deadline()).await.map_err(|e: LinkError| e.to_string())
    }

    /// Checks something against the manifest. Evidence that turns up is kept.
    pub(crate) fn with_verifier<T>(&self, check: impl FnOnce(&mut Verifier) -> T) -> T {
        let mut verifier = self.inner.trust.verifier();
        let result = check(&mut verifier);
        let evidence = verifier.take_evidence();
        drop(verifier);
        if let (Some(evidence), Some(folder)) = (evidence, &self.inner.options.evidence) {
            crate::evidence_file::keep(folder, &self.membership(), evidence, None);
        }
        result
    }
    /// A connection to a server whose certificate may have ended by this machine's clock.
    pub(crate) fn wire_at_any_date(&self, server: ServerId) -> Option<Wire> {
        Wire::at_any_date(&self.membership().place(server)?).ok()
    }
    /// All servers, in random order: load spreads, and nobody can expect to be asked.
    pub(crate) fn shuffled(&self) -> Vec<ServerId> {
        let mut servers: Vec<_> = self.inner.manifest.grid().servers().collect();
        servers.shuffle(&mut rand::rng());
        servers
    }
    /// All servers in random order, those that were silent lately last, and before them those that asked to wait. Reads that begin in the same few
    /// milliseconds prefer the same servers: they go together in fewer requests, and over time the load
    /// spreads all the same.
    pub(crate) fn preferred(&self) -> Vec<ServerId> {
        self.inner.pace.order(|| {
            let mut servers = self.shuffled();
            servers.sort_by_key(|server| self.inner.pace.avoids(*server));
            servers
        })
    }
    /// Asks servers one after the other, in random order, until one gives an answer that `check`
    /// accepts. For answers that prove themselves, where one server is enough.
    pub(crate) async fn first_good<T, U>(
        &self,
        path: &str,
        check: impl Fn(&mut Verifier, &T) -> Result<U, AnswerError>,
    ) -> Result<U, ClientError>
    where
        T: Answer,
    {
        let mut turns = Turns::new(self);
        while let Some((server, until)) = turns.next().await {
            match self.inner.links[server.index()].get::<T>(path, until).await {
                Ok(answer) => match self.with_verifier(|verifier| check(verifier, &answer)) {
                    Ok(good) => return Ok(good),
                    Err(error) => turns.wrong(server, &error),
                },
                Err(error) => turns.failed(server, &error),
            }
        }
        Err(self.failure("one server with a good answer", turns.tally).await)
    }

    /// The same with the guarantees of a read of q servers: the answer, of which `check` gives the statement too, is
    /// fresh, and from a state that has everything that was complete when this began.
    pub(crate) async fn current_good<T, U>(
        &self,
        path: &str,
        check: impl Fn(&mut Verifier, &T) -> Result<(U, Checkpoint), AnswerError>,
    ) -> Result<U, ClientError>
    where
        T: Answer,
    {
        let current = self.state_of_quorum().await?.statement.sequence;
        self.good_since(path, current, check).await
    }
    /// The same of a state that is known to be there, or a later one.
    pub(crate) async fn good_since<T, U>(
        &self,
        path: &str,
        current: Sequence,
        check: impl Fn(&mut Verifier, &T) -> Result<(U, Checkpoint), AnswerError>,
    ) -> Result<U, ClientError>
    where
        T: Answer,
    {
        let max_age_ms = millis(self.inner.options.max_age);
        let check = |verifier: &mut Verifier, answer: &T| {
            let (good, statement) = check(verifier, answer)?;
            Verifier::fresh(&statement, crate::now(), max_age_ms)?;
            match statement.sequence {
                got if got < current => Err(AnswerError::Behind { got, current }),
                got => Ok((good, got)),
            }
        };
        let (good, state) = self.first_good(path, check).await?;
        self.inner.seen.state(state);
        Ok(good)
    }

    /// The time was over before anything was asked for this call; says who is known not to answer.
    pub(crate) fn in_vain(&self, awaited: &str) -> ClientError {
        let (mut silent, mut waits) = (Vec::new(), Vec::new());
        for server in self.inner.manifest.grid().servers() {
            match (self.inner.pace.avoids(server), self.inner.pace.waits(server)) {
                (Some(_), Some(why)) => waits.push(AsksToWait { server, why }),
                (Some(_), None) => silent.push(Silence { server, why: "it was silent lately".into() }),
                (None, _) => {}
            }
        }
        let needed = awaited.to_owned();
        ClientError::Unavailable { needed, answered: vec![], silent, waits, rejected: vec![] }
    }
}
