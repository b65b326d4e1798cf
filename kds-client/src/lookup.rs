//! Lookup: one row of the grid, then another, then q servers (design §2).
//!
//! One server of the row gives the whole self-proving answer; the others repeat only the record's
//! version, each over TLS pinned to it. A version that is claimed to be newer has to be proved by
//! who claims it, or that server is rejected and the read goes on.

use crate::api::{BriefAnswer, Problem};
use crate::client::{Client, failure};
use crate::error::{ClientError, LinkError, Misbehaviour};
use crate::link::segment;
use quorum::answer::{AnswerError, RecordAnswer, Verifier};
use quorum::ids::{ServerId, ServerSet};
use quorum::record::{Name, Record};
use rand::seq::SliceRandom as _;
use serde::Serialize;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// How sure a lookup has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// r full rows, or q servers where rows are not to be had: sees every completed write while at
    /// most b servers lie.
    #[default]
    Row,
    /// q servers: sees every completed write while at most f servers lie.
    Quorum,
    /// Any one server: never forged, and at most `max_age` old.
    Any,
}

/// What to look up.
#[derive(Clone, Debug, Default)]
pub struct LookupOptions {
    /// How sure.
    pub consistency: Consistency,
    /// How old the certificate may be; the client's default if none.
    pub max_age: Option<Duration>,
    /// An earlier version.
    pub version: Option<u64>,
}

/// Which servers a lookup used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    /// Full rows.
    Row,
    /// q servers.
    Quorum,
    /// One server.
    Any,
}

/// How a lookup went.
#[derive(Clone, Debug)]
pub struct Access {
    /// What made it complete.
    pub kind: AccessKind,
    /// The full rows among the servers that answered.
    pub rows: Vec<usize>,
    /// Servers with a good answer.
    pub answered: Vec<ServerId>,
    /// Servers that were asked and did not answer in time.
    pub silent: Vec<ServerId>,
    /// Servers whose answers were refused, and why.
    pub rejected: Vec<Misbehaviour>,
}

/// A verified answer.
#[derive(Clone, Debug)]
pub struct Lookup {
    /// The record; none if its absence was proved.
    pub record: Option<Record>,
    /// The proof, to keep.
    pub answer: RecordAnswer,
    /// How it came about.
    pub access: Access,
    /// Whether the record's last change is proved to be visible to every complete read.
    pub complete: bool,
}

enum Reply {
    Full(Box<RecordAnswer>),
    Brief(BriefAnswer),
}

type Asked = (ServerId, Result<Reply, LinkError>);

/// A lookup in progress.
struct Search<'a> {
    client: &'a Client,
    name: &'a Name,
    options: &'a LookupOptions,
    max_age_ms: u64,
    /// Groups of servers still to ask: rows, or single servers.
    groups: VecDeque<Vec<ServerId>>,
    tasks: JoinSet<Asked>,
    waiting: ServerSet,
    good: BTreeMap<ServerId, u64>,
    best: Option<(u64, Option<Record>, RecordAnswer)>,
    silent: Vec<ServerId>,
    rejected: Vec<Misbehaviour>,
    full_asked: bool,
}

impl Client {
    /// Looks a name up. The answer is verified; `record` is none only if absence was proved.
    pub async fn lookup(&self, name: &Name, options: &LookupOptions) -> Result<Lookup, ClientError> {
        let max_age = options.max_age.unwrap_or(self.inner.options.max_age);
        let mut search = Search {
            client: self,
            name,
            options,
            max_age_ms: u64::try_from(max_age.as_millis()).unwrap_or(u64::MAX),
            groups: VecDeque::new(),
            tasks: JoinSet::new(),
            waiting: ServerSet::default(),
            good: BTreeMap::new(),
            best: None,
            silent: vec![],
            rejected: vec![],
            full_asked: false,
        };
        search.plan();
        search.run().await?;
        search.finish().await
    }
}

impl Search<'_> {
    /// Whom to ask, in which order.
    fn plan(&mut self) {
        let grid = self.client.inner.manifest.grid();
        let thresholds = self.client.inner.manifest.thresholds;
        let servers = self.client.shuffled();
        let single = |servers: &[ServerId]| servers.iter().map(|s| vec![*s]).collect::<VecDeque<_>>();
        self.groups = match self.options.consistency {
            Consistency::Any => single(&servers),
            Consistency::Row if thresholds.masked > 0 => {
                let mut rows: Vec<Vec<_>> = (0..grid.side()).map(|row| grid.row(row).collect()).collect();
                rows.shuffle(&mut rand::rng());
                let rest = rows.split_off(usize::from(thresholds.rows));
                let mut groups = VecDeque::from([rows.concat()]);
                groups.extend(rest);
                groups
            }
            Consistency::Row | Consistency::Quorum => {
                let (first, rest) = servers.split_at(thresholds.q());
                let mut groups = single(rest);
                groups.push_front(first.to_vec());
                groups
            }
        };
    }

    fn is_complete(&self) -> bool {
        let Some((best, ..)) = &self.best else { return false };
        let answered = self.agreeing(*best);
        let newest = self.good.values().copied().max().unwrap_or(0);
        // Every answer is in, none claims more than is proved.
        let enough = match self.options.consistency {
            Consistency::Any => !answered.is_empty(),
            Consistency::Row => self.client.inner.manifest.grid().read_is_complete(&answered),
            Consistency::Quorum => answered.len() >= self.client.inner.manifest.thresholds.q(),
        };
        enough && *best >= newest
    }

    /// The servers whose answer is the one that will be returned. One that answers with an older
    /// version may be behind or lying: it does not count.
    fn agreeing(&self, version: u64) -> ServerSet {
        self.good.iter().filter(|(_, answered)| **answered == version).map(|(server, _)| *server).collect()
    }

    /// Asks the next group; false if there is none left.
    fn ask_next(&mut self) -> bool {
        let Some(mut group) = self.groups.pop_front() else { return false };
        // Whoever comes first gives the whole answer: that load is spread too.
        group.shuffle(&mut rand::rng());
        for server in group {
            if !self.good.contains_key(&server) && self.waiting.insert(server) {
                let full = !self.full_asked;
                self.full_asked = true;
                self.ask(server, full);
            }
        }
        true
    }

    fn ask(&mut self, server: ServerId, full: bool) {
        let link = self.client.inner.links[server.index()].clone();
        let path = format!("/v1/records/{}", segment(self.name));
        let version = self.options.version;
        self.tasks.spawn(async move {
            if !full {
                let brief = link.get(&format!("{path}?brief=true")).await;
                return (server, brief.map(Reply::Brief));
            }
            let path = version.map_or(path.clone(), |version| format!("{path}?version={version}"));
            let answer = match link.get::<RecordAnswer>(&path).await {
                // Absence comes as a problem document with its proof.
                Err(LinkError::Problem(problem)) => match *problem {
                    Problem { answer: Some(answer), .. } => Ok(*answer),
                    problem => Err(LinkError::Problem(Box::new(problem))),
                },
                other => other,
            };
            (server, answer.map(|answer| Reply::Full(Box::new(answer))))
        });
    }

    async fn run(&mut self) -> Result<(), ClientError> {
        let deadline = self.client.deadline();
        self.ask_next();
        let mut hedge_at = Instant::now() + self.client.inner.options.hedge;
        while !self.is_complete() {
            // Somebody claims a newer version than anyone proved: he is to prove it.
            if self.tasks.is_empty() {
                let proved = self.best.as_ref().map(|(version, ..)| *version);
                let newest =
                    self.good.iter().filter(|(_, version)| proved.is_none_or(|best| best < **version));
                if let Some((server, _)) = newest.max_by_key(|(_, version)| **version) {
                    let server = *server;
                    self.good.remove(&server);
                    self.ask(server, true);
                } else if !self.ask_next() {
                    return Err(self.failed());
                }
                hedge_at = Instant::now() + self.client.inner.options.hedge;
                continue;
            }
            tokio::select! {
                done = self.tasks.join_next() => {
                    if let Some(Ok((server, reply))) = done {
                        self.take(server, reply);
                    }
                }
                () = sleep_until(hedge_at), if !self.groups.is_empty() => {
                    // Late is as good as silent for the moment: another row is asked as well.
                    self.full_asked = self.best.is_some();
                    self.ask_next();
                    hedge_at = Instant::now() + self.client.inner.options.hedge;
                }
                () = sleep_until(deadline) => return Err(self.failed()),
            }
        }
        Ok(())
    }

    fn take(&mut self, server: ServerId, reply: Result<Reply, LinkError>) {
        let outcome = match reply {
            Ok(Reply::Brief(brief)) => {
                self.good.insert(server, brief.version);
                return;
            }
            Ok(Reply::Full(answer)) => self.check(*answer).map_err(LinkError::from),
            Err(error) => Err(error),
        };
        match outcome {
            Ok((version, record, answer)) => {
                self.good.insert(server, version);
                if self.best.as_ref().is_none_or(|(best, ..)| *best < version) {
                    self.best = Some((version, record, answer));
                }
            }
            Err(error) => {
                // The next server asked gives the whole answer.
                self.full_asked = self.best.is_some();
                match error {
                    LinkError::Nonsense(why) => self.rejected.push(Misbehaviour { server, why }),
                    LinkError::Silent(_) => self.silent.push(server),
                    LinkError::Problem(problem) if problem.status == 503 || problem.status == 429 => {
                        self.silent.push(server);
                    }
                    LinkError::Problem(problem) => {
                        self.rejected.push(Misbehaviour {
                            server,
                            why: format!("{}: {}", problem.title, problem.detail),
                        });
                    }
                }
                self.ask_next();
            }
        }
    }

    /// Is it real, fresh, about what was asked, and no less than what was seen before?
    fn check(&self, answer: RecordAnswer) -> Result<(u64, Option<Record>, RecordAnswer), AnswerError> {
        let record = self.client.verifier().record(&answer, self.name, self.options.version)?;
        Verifier::fresh(&answer.certificate, crate::now(), self.max_age_ms)?;
        let version = answer.current.value.as_ref().map_or(0, |record| record.version);
        if version < self.client.seen(self.name) {
            let (got, seen) = (answer.certificate.statement.sequence, self.client.verifier().complete());
            return Err(AnswerError::Backwards { got, seen });
        }
        Ok((version, record, answer))
    }

    fn failed(&mut self) -> ClientError {
        let answered: Vec<_> = self.good.keys().copied().collect();
        let mut silent = std::mem::take(&mut self.silent);
        for server in self.waiting.iter() {
            let heard = answered.contains(&server)
                || silent.contains(&server)
                || self.rejected.iter().any(|bad| bad.server == server);
            if !heard {
                silent.push(server);
            }
        }
        let thresholds = self.client.inner.manifest.thresholds;
        let needed = match self.options.consistency {
            Consistency::Any => "any one server".to_owned(),
            Consistency::Quorum => format!("{} servers", thresholds.quorum),
            Consistency::Row if thresholds.masked == 0 => format!("{} servers", thresholds.quorum),
            Consistency::Row => format!("{} full row(s) or {} servers", thresholds.rows, thresholds.quorum),
        };
        failure(&needed, answered, silent, std::mem::take(&mut self.rejected))
    }

    async fn finish(mut self) -> Result<Lookup, ClientError> {
        let Some((version, record, answer)) = self.best.take() else { return Err(self.failed()) };
        let answered = self.agreeing(version);
        for (server, older) in self.good.iter().filter(|(_, answered)| **answered != version) {
            let why =
                format!("it answers with version {older}, and version {version} is proved: behind, or lying");
            self.rejected.push(Misbehaviour { server: *server, why });
        }
        let grid = self.client.inner.manifest.grid();
        let rows: Vec<_> =
            (0..grid.side()).filter(|row| grid.row(*row).all(|server| answered.contains(server))).collect();
        let thresholds = self.client.inner.manifest.thresholds;
        let kind = match self.options.consistency {
            Consistency::Any => AccessKind::Any,
            _ if answered.len() >= thresholds.q() => AccessKind::Quorum,
            _ => AccessKind::Row,
        };
        // Atomicity (design §2): what one reader returns, every later reader sees. So the last
        // change has to be complete; it nearly always is, and is known to be.
        let changed = answer.current.value.as_ref().map(|record| record.updated.sequence);
        let complete = match (self.options.consistency, changed) {
            (Consistency::Any, _) | (_, None) => true,
            (_, Some(sequence)) => {
                let patience = self.client.inner.options.timeout.min(Duration::from_secs(2));
                self.client.complete_through(sequence, patience).await
            }
        };
        if !complete && self.options.consistency == Consistency::Row {
            return Err(ClientError::NotComplete);
        }
        self.client.remember(self.name, version);
        let access = Access {
            kind,
            rows,
            answered: answered.iter().collect(),
            silent: std::mem::take(&mut self.silent),
            rejected: std::mem::take(&mut self.rejected),
        };
        Ok(Lookup { record, answer, access, complete })
    }
}
