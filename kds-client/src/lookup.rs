//! Lookups: the read protocol of [`quorum::read`] over HTTPS, many at once, and from memory.

use crate::api::{BulkAnswer, BulkQuestion, KnownState, Problem};
use crate::batch::{Answers, News, PATIENCE, as_reply};
use crate::client::{Client, MOST_READS};
use crate::deadline::millis;
use crate::error::{ClientError, LinkError};
use crate::failure::Tally;
use crate::link::segment;
use quorum::answer::{RecordAnswer, Shown};
use quorum::certificate::{Certificate, Completion};
use quorum::ids::{Sequence, ServerId};
use quorum::read::{Ask, Found, Progress, Question, Read, Reply, Subject};
use quorum::record::{Name, Record};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

pub use quorum::read::{Access, AccessKind, Consistency};

/// How long a reader waits before it asks again whether a change is complete.
const COMPLETION_PAUSE: Duration = Duration::from_millis(20);
/// How long it asks.
const COMPLETION_PATIENCE: Duration = Duration::from_secs(2);
/// Names of one call that are looked up at a time.
const PAGE: usize = 1_024;

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

/// A question that is to be answered.
struct Open {
    server: ServerId,
    ask: Ask,
    /// When it went out; it waits in a queue of this client if none.
    sent: Option<Instant>,
    /// When it is looked at whether the answer is late.
    due: Instant,
}

/// Waits before a server is asked again that wants that, if it does, and while somebody waits for the answer.
async fn goes_on<T>(answers: &Answers, answer: &Result<T, LinkError>) -> bool {
    let Err(LinkError::AsksToWait { wait, .. }) = answer else { return false };
    tokio::select! {
        () = sleep(*wait) => true,
        () = answers.closed() => false,
    }
}

/// The record that was found, or its absence.
pub(crate) fn shown(found: Lookup) -> Result<Shown<Record>, ClientError> {
    found.shown().ok_or_else(|| ClientError::Local("a read without an answer".into()))
}

/// A verified answer: the record, its proof, how the read went, and whether the last change is
/// complete.
pub type Lookup = Found;

impl Client {
    /// Looks a name up. The answer is verified; `record` is none only if absence was proved.
    ///
    /// # Errors
    /// [`ClientError::Unverified`] if what came back cannot be trusted, [`ClientError::Unavailable`] if
    /// too few servers answered in time, [`ClientError::Clock`] if this machine's clock is wrong,
    /// [`ClientError::NotComplete`] if the last change may not be visible to every reader yet.
    pub async fn lookup(&self, name: &Name, options: &LookupOptions) -> Result<Lookup, ClientError> {
        self.lookup_in_order(name, options, self.preferred()).await
    }

    /// Looks many names up, in few requests; the results are in the order of the names. Each is a lookup of its
    /// own, and all have to be done within the timeout of this one call. However many there are, no more of them
    /// are under way than the servers answer.
    pub async fn lookup_many(
        &self,
        names: &[Name],
        options: &LookupOptions,
    ) -> Vec<Result<Lookup, ClientError>> {
        let client = self.begun();
        let mut tasks = tokio::task::JoinSet::new();
        let mut results: Vec<_> = names.iter().map(|_| None).collect();
        let mut order = Vec::new();
        let mut keep = |done| {
            if let Some(Ok((place, result))) = done {
                results[place] = Some(result);
            }
        };
        for (place, name) in names.iter().cloned().enumerate() {
            if place % PAGE == 0 {
                // The same servers for all of a page: fewer requests, and one certificate.
                order = client.preferred();
            }
            if tasks.len() >= PAGE {
                keep(tasks.join_next().await);
            }
            let (client, options, order) = (client.clone(), options.clone(), order.clone());
            tasks.spawn(async move { (place, client.lookup_in_order(&name, &options, order).await) });
        }
        while !tasks.is_empty() {
            keep(tasks.join_next().await);
        }
        let lost = || Err(ClientError::Local("the lookup was broken off".into()));
        results.into_iter().map(|result| result.unwrap_or_else(lost)).collect()
    }

    async fn lookup_in_order(
        &self,
        name: &Name,
        options: &LookupOptions,
        order: Vec<ServerId>,
    ) -> Result<Lookup, ClientError> {
        let least = self.inner.seen.least(name);
        let question = Question {
            subject: Subject::Record { name: name.clone(), version: options.version },
            consistency: options.consistency,
            max_age_ms: self.max_age_ms(options.max_age),
            seen: least.version,
            since: least.since,
        };
        let read = self.read(question, order).await?;
        let found = read.finish().ok_or_else(|| ClientError::Local("a read without an answer".into()))?;
        // What any one server says may not be visible to everyone: only its version counts from now on.
        let shown = found.complete && options.consistency != Consistency::Any;
        let certified = found.answer.certificate.statement.time;
        match &found.answer.current.value {
            Some(record) if shown => self.inner.seen.record(record, certified),
            Some(record) => self.inner.seen.version(name, record.version, record.updated.sequence),
            None => {
                if let Some(absence) = found.absence().filter(|_| shown && options.version.is_none()) {
                    self.inner.seen.absent(name, absence);
                }
            }
        }
        Ok(found)
    }

    /// A certificate of a state that has every write that was complete when this began, and that no
    /// later reader sees less than.
    pub(crate) async fn current_state(&self) -> Result<Arc<Certificate>, ClientError> {
        self.state_by(Consistency::Row).await
    }
    /// The same of q servers. While more than b are silent it has what is complete and more, of which later
    /// readers of rows may see less.
    pub(crate) async fn state_of_quorum(&self) -> Result<Arc<Certificate>, ClientError> {
        self.state_by(Consistency::Quorum).await
    }
    async fn state_by(&self, consistency: Consistency) -> Result<Arc<Certificate>, ClientError> {
        let question = Question {
            subject: Subject::State,
            consistency,
            max_age_ms: self.max_age_ms(None),
            seen: self.inner.seen.least_state().0,
            since: Sequence(0),
        };
        let read = self.read(question, self.preferred()).await?;
        let state = read.finish_state();
        let state = state.ok_or_else(|| ClientError::Local("a read without an answer".into()))?;
        self.inner.seen.state(state.statement.sequence);
        Ok(state)
    }

    fn max_age_ms(&self, max_age: Option<Duration>) -> u64 {
        millis(max_age.unwrap_or(self.inner.options.max_age))
    }

    /// Runs a read to its end, once there is room for it.
    async fn read(&self, question: Question, order: Vec<ServerId>) -> Result<Read, ClientError> {
        let deadline = self.deadline();
        let room = timeout_at(deadline, self.inner.reads.acquire()).await;
        let Ok(Ok(_room)) = room else {
            return Err(
                self.in_vain(&format!("room among the {MOST_READS} reads that this client has under way"))
            );
        };
        let began = Instant::now();
        let consistency = question.consistency;
        let mut read = Read::new(self.inner.manifest.grid(), question, order);
        let (answers, mut answered) = mpsc::unbounded_channel();
        let mut open: Vec<Open> = Vec::new();
        let mut give_up_completion = None;
        let mut first = true;
        let mut idle_until = began;
        loop {
            while let Some((server, ask)) = read.next_ask() {
                let sent = self.ask(read.question(), server, ask, &answers);
                open.push(Open { server, ask, sent, due: Instant::now() + self.inner.pace.patience() });
            }
            match read.progress() {
                Progress::Done => return Ok(read),
                Progress::Failed => return Err(self.failed(&read).await),
                Progress::Waiting => {}
            }
            if read.is_incomplete() {
                let until = *give_up_completion.get_or_insert_with(|| Instant::now() + COMPLETION_PATIENCE);
                if Instant::now() >= until.min(deadline) {
                    return match consistency {
                        Consistency::Quorum | Consistency::Any => Ok(read),
                        Consistency::Row => Err(ClientError::NotComplete),
                    };
                }
            }
            let due = open.iter().map(|open| open.due).min().unwrap_or(idle_until);
            // Some time is left to find out whose clock is wrong.
            let enough = match read.has_stale() && !read.is_incomplete() {
                true => deadline - self.time_for_times(),
                false => deadline,
            };
            tokio::select! {
                news = answered.recv() => {
                    let Some((server, ask, news)) = news else { continue };
                    let Some(at) = open.iter().position(|open| (open.server, open.ask) == (server, ask)) else {
                        continue;
                    };
                    let reply = match news {
                        // Once: a server that asks to wait for no time at all is asked again and again, and is
                        // late all the same.
                        News::Sent => {
                            if open[at].sent.is_none() {
                                let now = Instant::now();
                                (open[at].sent, open[at].due) = (Some(now), now + self.inner.pace.patience());
                            }
                            continue;
                        }
                        News::Reply(reply) => reply,
                    };
                    if let Some(sent) = open.swap_remove(at).sent.filter(|_| first) {
                        self.inner.pace.heard(sent.elapsed());
                        first = false;
                    }
                    self.with_verifier(|verifier| read.take(server, ask, reply, verifier, crate::now()));
                    idle_until = Instant::now() + COMPLETION_PAUSE;
                }
                () = sleep_until(due.min(enough)) => {
                    if Instant::now() >= enough && !read.is_incomplete() {
                        return Err(self.failed(&read).await);
                    }
                    if self.note_late(&mut open) || open.is_empty() {
                        self.with_verifier(|verifier| read.late(verifier, crate::now()));
                        idle_until = Instant::now() + COMPLETION_PAUSE;
                    }
                }
            }
        }
    }

    /// Whether an answer is late: a question is out for long, or waits behind others that are. Time in this
    /// client's own queues is nobody's silence, and neither is a server's asking to wait.
    fn note_late(&self, open: &mut [Open]) -> bool {
        let (now, patience) = (Instant::now(), self.inner.pace.patience());
        let mut late = false;
        for question in open.iter_mut().filter(|question| question.due <= now) {
            question.due = now + patience;
            let server = question.server;
            if question.sent.is_none() && !self.inner.batchers[server.index()].is_held_up(patience) {
                continue;
            }
            late = true;
            if self.inner.pace.waits(server).is_none() {
                self.inner.pace.avoid(server);
            }
        }
        late
    }

    /// Asks a server; says when the question went out if it has.
    fn ask(&self, question: &Question, server: ServerId, ask: Ask, answers: &Answers) -> Option<Instant> {
        let link = self.inner.links[server.index()].clone();
        let answers = answers.clone();
        match (&question.subject, ask) {
            (Subject::Record { name, version }, Ask::Full | Ask::Brief)
                if version.is_none() || ask == Ask::Brief =>
            {
                self.inner.batchers[server.index()].ask(name, ask, &answers);
                return None;
            }
            (Subject::Record { name, version }, Ask::Full | Ask::Brief) => {
                let version = version.map_or(String::new(), |version| format!("?version={version}"));
                let path = format!("/v1/records/{}{version}", segment(name));
                tokio::spawn(async move {
                    let answer = loop {
                        let answer = link.get::<RecordAnswer>(&path, Instant::now() + PATIENCE).await;
                        if !goes_on(&answers, &answer).await {
                            break answer;
                        }
                    };
                    let answer = match answer {
                        // Absence comes as a problem document with its proof.
                        Err(LinkError::Problem(problem)) => match *problem {
                            Problem { answer: Some(answer), .. } => Ok(*answer),
                            problem => Err(LinkError::Problem(Box::new(problem))),
                        },
                        other => other,
                    };
                    let reply =
                        answer.map_or_else(|e| as_reply(&e), |answer| Reply::Record(Box::new(answer)));
                    let _ = answers.send((server, ask, News::Reply(reply)));
                });
            }
            (Subject::State, Ask::Full | Ask::Brief) => {
                let known = match ask {
                    Ask::Brief => self.with_verifier(|verifier| verifier.newest().cloned()),
                    _ => None,
                };
                let known = known.as_deref().map(KnownState::of);
                tokio::spawn(async move {
                    let question = BulkQuestion { known, ..BulkQuestion::default() };
                    let answer = loop {
                        let until = Instant::now() + PATIENCE;
                        let answer = link.bulk(&question, until).await;
                        if !goes_on(&answers, &answer).await {
                            break answer;
                        }
                    };
                    let reply = match answer {
                        Ok(answer) if ask == Ask::Brief => Reply::Brief(answer.certified.0),
                        Ok(BulkAnswer { certificate: Some(certificate), .. }) => Reply::State(certificate),
                        Ok(_) => Reply::Nonsense("it leaves the certificate out".into()),
                        Err(error) => as_reply(&error),
                    };
                    let _ = answers.send((server, ask, News::Reply(reply)));
                });
            }
            (_, Ask::Completion) => {
                tokio::spawn(async move {
                    let until = Instant::now() + PATIENCE;
                    let reply = match link.get::<Completion>("/v1/completion", until).await {
                        Ok(completion) => Reply::Completion(Box::new(completion)),
                        Err(error) => as_reply(&error),
                    };
                    let _ = answers.send((server, ask, News::Reply(reply)));
                });
            }
        }
        Some(Instant::now())
    }

    /// Why a read failed.
    async fn failed(&self, read: &Read) -> ClientError {
        let thresholds = self.inner.manifest.thresholds;
        let needed = match read.question().consistency {
            Consistency::Any => "any one server".to_owned(),
            Consistency::Row if thresholds.masked > 0 => {
                format!("{} full row(s) or {} servers", thresholds.rows, thresholds.quorum)
            }
            Consistency::Row | Consistency::Quorum => format!("{} servers", thresholds.quorum),
        };
        let Access { answered, silent, rejected, stale, .. } = read.access();
        let tally = Tally { answered, silent, rejected, odd_times: !stale.is_empty(), ..Tally::default() };
        self.failure(&needed, tally).await
    }

    /// Waits until everything up to `sequence` is shown to be complete (design §2). False if it is not
    /// within a while.
    pub(crate) async fn complete_through(&self, sequence: Sequence) -> bool {
        let deadline = self.deadline().min(Instant::now() + COMPLETION_PATIENCE);
        loop {
            if self.with_verifier(|verifier| verifier.complete() >= sequence) {
                return true;
            }
            // Servers gossip their statements; f+1 of them include a correct one.
            let asked = self.inner.manifest.thresholds.f() + 1;
            for server in self.preferred().into_iter().take(asked) {
                let link = &self.inner.links[server.index()];
                let until = deadline.min(Instant::now() + self.inner.options.hedge);
                if let Ok(completion) = link.get::<Completion>("/v1/completion", until).await
                    // A wrong statement is not believed; who repeated it is of no consequence here.
                    && self.with_verifier(|verifier| {
                        let _ = verifier.completion(&completion);
                        verifier.complete() >= sequence
                    })
                {
                    return true;
                }
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(COMPLETION_PAUSE).await;
        }
    }
}

/// The keys of a record that may be relied on now: it is active, and within its validity.
///
/// # Errors
/// Says why it may not.
pub fn usable(record: &Record) -> Result<(), ClientError> {
    let now = crate::now();
    let name = &record.name;
    if let quorum::record::Status::Revoked { reason, .. } = &record.status {
        return Err(ClientError::Unusable(format!("{name} is revoked: {}", reason.escape_debug())));
    }
    if record.entry.not_before.is_some_and(|from| now < from) {
        return Err(ClientError::Unusable(format!("{name} is not valid yet")));
    }
    if record.entry.not_after.is_some_and(|to| now > to) {
        return Err(ClientError::Unusable(format!("{name} is no longer valid")));
    }
    Ok(())
}
