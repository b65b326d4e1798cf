//! Lookups: the read protocol of [`quorum::read`] over HTTPS, many at once, and from memory.

use crate::api::{BulkAnswer, BulkQuestion, KnownState, Problem};
use crate::batch::{Answers, as_reply};
use crate::client::Client;
use crate::deadline::{after, millis};
use crate::error::{ClientError, LinkError};
use crate::failure::Tally;
use crate::link::segment;
use quorum::answer::RecordAnswer;
use quorum::certificate::{Certificate, Completion};
use quorum::ids::{Sequence, ServerId};
use quorum::read::{Ask, Found, Progress, Question, Read, Reply, Subject};
use quorum::record::{Name, Record};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

pub use quorum::read::{Access, AccessKind, Consistency};

/// How long a reader waits before it asks again whether a change is complete.
const COMPLETION_PAUSE: Duration = Duration::from_millis(20);
/// How long it asks.
const COMPLETION_PATIENCE: Duration = Duration::from_secs(2);

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

    /// Looks many names up at once, in few requests; the results are in the order of the names. Each
    /// is a lookup of its own.
    pub async fn lookup_many(
        &self,
        names: &[Name],
        options: &LookupOptions,
    ) -> Vec<Result<Lookup, ClientError>> {
        // The same servers for all of them: fewer requests, and one certificate.
        let order = self.preferred();
        let mut tasks = tokio::task::JoinSet::new();
        for (place, name) in names.iter().cloned().enumerate() {
            let (client, options, order) = (self.clone(), options.clone(), order.clone());
            tasks.spawn(async move { (place, client.lookup_in_order(&name, &options, order).await) });
        }
        let mut results: Vec<_> = names.iter().map(|_| None).collect();
        while let Some(done) = tasks.join_next().await {
            if let Ok((place, result)) = done {
                results[place] = Some(result);
            }
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
        let question = Question {
            subject: Subject::Record { name: name.clone(), version: options.version },
            consistency: options.consistency,
            max_age_ms: self.max_age_ms(options.max_age),
            seen: self.seen(name),
        };
        let read = self.read(question, order).await?;
        let found = read.finish().ok_or_else(|| ClientError::Local("a read without an answer".into()))?;
        let version = found.answer.current.value.as_ref().map_or(0, |record| record.version);
        self.remember(name, version);
        Ok(found)
    }

    /// A certificate of a state that has every write that was complete when this began, and that no
    /// later reader sees less than.
    pub(crate) async fn current_state(&self) -> Result<Arc<Certificate>, ClientError> {
        let question = Question {
            subject: Subject::State,
            consistency: Consistency::Row,
            max_age_ms: self.max_age_ms(None),
            seen: 0,
        };
        let read = self.read(question, self.preferred()).await?;
        read.finish_state().ok_or_else(|| ClientError::Local("a read without an answer".into()))
    }

    fn max_age_ms(&self, max_age: Option<Duration>) -> u64 {
        millis(max_age.unwrap_or(self.inner.options.max_age))
    }

    /// Runs a read to its end.
    async fn read(&self, question: Question, order: Vec<ServerId>) -> Result<Read, ClientError> {
        let (began, deadline) = (Instant::now(), self.deadline());
        let consistency = question.consistency;
        let mut read = Read::new(self.inner.manifest.grid(), question, order);
        let (answers, mut answered) = mpsc::unbounded_channel();
        let mut late_at = began + self.inner.pace.patience();
        let mut give_up_completion = None;
        let mut first = true;
        loop {
            while let Some((server, ask)) = read.next_ask() {
                self.ask(read.question(), server, ask, &answers);
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
                        Consistency::Quorum => Ok(read),
                        _ => Err(ClientError::NotComplete),
                    };
                }
            }
            if read.is_idle() {
                late_at = late_at.min(Instant::now() + COMPLETION_PAUSE);
            }
            tokio::select! {
                reply = answered.recv() => if let Some((server, ask, reply)) = reply {
                    if first {
                        self.inner.pace.heard(began.elapsed());
                        first = false;
                    }
                    if matches!(reply, Reply::Silent(_)) {
                        self.inner.pace.avoid(server);
                    }
                    self.with_verifier(|verifier| read.take(server, ask, reply, verifier, crate::now()));
                },
                () = sleep_until(late_at.min(deadline)) => {
                    if Instant::now() >= deadline && !read.is_incomplete() {
                        return Err(self.failed(&read).await);
                    }
                    if !read.is_idle() {
                        for silence in read.access().silent {
                            self.inner.pace.avoid(silence.server);
                        }
                    }
                    self.with_verifier(|verifier| read.late(verifier, crate::now()));
                    late_at = Instant::now() + self.inner.pace.patience();
                }
            }
        }
    }

    fn ask(&self, question: &Question, server: ServerId, ask: Ask, answers: &Answers) {
        let link = self.inner.links[server.index()].clone();
        let answers = answers.clone();
        match (&question.subject, ask) {
            (Subject::Record { name, version }, Ask::Full | Ask::Brief)
                if version.is_none() || ask == Ask::Brief =>
            {
                self.inner.batchers[server.index()].ask(name, ask, &answers);
            }
            (Subject::Record { name, version }, Ask::Full | Ask::Brief) => {
                let version = version.map_or(String::new(), |version| format!("?version={version}"));
                let path = format!("/v1/records/{}{version}", segment(name));
                tokio::spawn(async move {
                    let answer = match link.get::<RecordAnswer>(&path).await {
                        // Absence comes as a problem document with its proof.
                        Err(LinkError::Problem(problem)) => match *problem {
                            Problem { answer: Some(answer), .. } => Ok(*answer),
                            problem => Err(LinkError::Problem(Box::new(problem))),
                        },
                        other => other,
                    };
                    let reply =
                        answer.map_or_else(|e| as_reply(&e), |answer| Reply::Record(Box::new(answer)));
                    let _ = answers.send((server, ask, reply));
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
                    let answer = link.post::<_, BulkAnswer>("/v1/records/lookup", &question).await;
                    let reply = match answer {
                        Ok(answer) if ask == Ask::Brief => Reply::Brief(answer.certified.0),
                        Ok(BulkAnswer { certificate: Some(certificate), .. }) => Reply::State(certificate),
                        Ok(_) => Reply::Nonsense("it leaves the certificate out".into()),
                        Err(error) => as_reply(&error),
                    };
                    let _ = answers.send((server, ask, reply));
                });
            }
            (_, Ask::Completion) => {
                tokio::spawn(async move {
                    let reply = match link.get::<Completion>("/v1/completion").await {
                        Ok(completion) => Reply::Completion(Box::new(completion)),
                        Err(error) => as_reply(&error),
                    };
                    let _ = answers.send((server, ask, reply));
                });
            }
        }
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
        let tally = Tally { answered, silent, rejected, odd_times: !stale.is_empty() };
        self.failure(&needed, tally).await
    }

    /// Waits until everything up to `sequence` is shown to be complete (design §2). False if it is not
    /// within a while.
    pub(crate) async fn complete_through(&self, sequence: Sequence) -> bool {
        let deadline = after(COMPLETION_PATIENCE.min(self.inner.options.timeout));
        loop {
            if self.with_verifier(|verifier| verifier.complete() >= sequence) {
                return true;
            }
            // Servers gossip their statements; f+1 of them include a correct one.
            let asked = self.inner.manifest.thresholds.f() + 1;
            for server in self.preferred().into_iter().take(asked) {
                let link = &self.inner.links[server.index()];
                let until = deadline.min(after(self.inner.options.hedge));
                let answer = tokio::time::timeout_at(until, link.get::<Completion>("/v1/completion")).await;
                if let Ok(Ok(completion)) = answer
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
