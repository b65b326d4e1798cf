//! Lookups of many tasks in few requests: what is asked of one server while its answers are on their
//! way goes out together with the next request.
//!
//! Nothing waits for company: with few lookups under way each goes at once. Questions about the same
//! name that are still waiting share one answer; one that is already out is never joined, since its
//! answer may be older than the moment at which the second lookup began.

use crate::api::{BulkAnswer, BulkQuestion, KnownState};
use crate::error::LinkError;
use crate::link::Link;
use crate::trust::Trust;
use quorum::answer::{Proved, RecordAnswer};
use quorum::certificate::Certificate;
use quorum::ids::ServerId;
use quorum::limits::MAX_LOOKUP_NAMES;
use quorum::read::{Ask, Reply};
use quorum::record::{Name, Record};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;

/// Requests to one server that are on their way at once.
const IN_FLIGHT: usize = 2;
/// Questions that wait for one server at most: a server that hangs costs no more.
const MAX_WAITING: usize = 8 * 1024;
/// How long one request may take. Lookups do not wait for it: they go on to other servers.
const PATIENCE: Duration = Duration::from_secs(3);

/// Where a lookup hears of its answers.
pub(crate) type Answers = UnboundedSender<(ServerId, Ask, Reply)>;

struct Waiting {
    name: Name,
    ask: Ask,
    answers: Answers,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Waiting>,
    running: usize,
}

/// The questions to one server.
pub(crate) struct Batcher {
    link: Link,
    trust: Arc<Trust>,
    queue: Mutex<Queue>,
}

impl Batcher {
    pub(crate) fn new(link: Link, trust: &Arc<Trust>) -> Self {
        Self { link, trust: Arc::clone(trust), queue: Mutex::default() }
    }
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// Asks about a name, fully or briefly.
    pub(crate) fn ask(self: &Arc<Self>, name: &Name, ask: Ask, answers: &Answers) {
        let server = self.link.server();
        let mut queue = self.queue();
        if queue.waiting.len() >= MAX_WAITING {
            queue.waiting.retain(|waiting| !waiting.answers.is_closed());
            if queue.waiting.len() >= MAX_WAITING {
                let why = "too many questions wait for it here";
                let _ = answers.send((server, ask, Reply::Silent(why.into())));
                return;
            }
        }
        queue.waiting.push(Waiting { name: name.clone(), ask, answers: answers.clone() });
        if queue.running < IN_FLIGHT {
            queue.running += 1;
            drop(queue);
            tokio::spawn(Arc::clone(self).run());
        }
    }

    async fn run(self: Arc<Self>) {
        let mut slot = Slot { batcher: Arc::clone(&self), taken: true };
        loop {
            // Tasks that are about to ask do so first.
            tokio::task::yield_now().await;
            let batch = {
                let mut queue = self.queue();
                queue.waiting.retain(|waiting| !waiting.answers.is_closed());
                let count = queue.waiting.len().min(MAX_LOOKUP_NAMES);
                if count == 0 {
                    // Under the lock: whoever asks next sees it.
                    return slot.leave(queue);
                }
                queue.waiting.drain(..count).collect()
            };
            self.send(batch).await;
        }
    }

    async fn send(&self, batch: Vec<Waiting>) {
        let server = self.link.server();
        let mut question = BulkQuestion::default();
        let (mut full, mut brief) = (BTreeMap::new(), BTreeMap::new());
        for waiting in &batch {
            let (places, names) = match waiting.ask {
                Ask::Full => (&mut full, &mut question.names),
                _ => (&mut brief, &mut question.brief),
            };
            places.entry(&waiting.name).or_insert_with(|| {
                names.push(waiting.name.clone());
                names.len() - 1
            });
        }
        let known = self.trust.verifier().newest().cloned();
        question.known = known.as_deref().map(KnownState::of);
        let asked = tokio::time::timeout(PATIENCE, self.link.post("/v1/records/lookup", &question)).await;
        let answer = asked
            .unwrap_or_else(|_| Err(LinkError::late(PATIENCE)))
            .and_then(|answer| Checked::new(answer, &question, known));
        match answer {
            Ok(answer) => {
                for waiting in &batch {
                    let reply = match waiting.ask {
                        Ask::Full => answer.record(full[&waiting.name]),
                        _ => Reply::Brief(answer.versions[brief[&waiting.name]]),
                    };
                    let _ = waiting.answers.send((server, waiting.ask, reply));
                }
            }
            // More than fits into one answer: each by itself.
            Err(LinkError::Problem(problem)) if problem.status == 413 && batch.len() > 1 => {
                for waiting in batch {
                    Box::pin(self.send(vec![waiting])).await;
                }
            }
            Err(error) => {
                for waiting in &batch {
                    let _ = waiting.answers.send((server, waiting.ask, as_reply(&error)));
                }
            }
        }
    }
}

/// The place of a request on its way; free again even if its task is broken off with its runtime.
struct Slot {
    batcher: Arc<Batcher>,
    taken: bool,
}

impl Slot {
    fn leave(&mut self, mut queue: MutexGuard<'_, Queue>) {
        queue.running -= 1;
        self.taken = false;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.taken {
            self.batcher.queue().running -= 1;
        }
    }
}

/// What a failed request means for a read.
pub(crate) fn as_reply(error: &LinkError) -> Reply {
    match error {
        LinkError::Silent(why) => Reply::Silent(why.clone()),
        // Not now: no lie.
        LinkError::Problem(problem) if matches!(problem.status, 429 | 503) => {
            Reply::Silent(error.to_string())
        }
        LinkError::Problem(_) | LinkError::Nonsense(_) => Reply::Nonsense(error.to_string()),
    }
}

/// An answer that is as long as it should be. What it says is checked by each lookup.
struct Checked {
    records: Vec<Proved<Record>>,
    versions: Vec<u64>,
    certificate: Arc<Certificate>,
    complete: quorum::ids::Sequence,
}

impl Checked {
    fn new(
        answer: BulkAnswer,
        question: &BulkQuestion,
        known: Option<Arc<Certificate>>,
    ) -> Result<Self, LinkError> {
        let BulkAnswer { records, versions, certified, certificate, complete } = answer;
        if records.len() != question.names.len() || versions.len() != question.brief.len() {
            return Err(LinkError::Nonsense("it answers more or fewer names than were asked for".into()));
        }
        let known = known.filter(|known| known.statement.sequence == certified);
        let certificate = certificate
            .or(known)
            .ok_or_else(|| LinkError::from(quorum::answer::AnswerError::NoCertificate))?;
        Ok(Self { records, versions, certificate, complete })
    }
    fn record(&self, place: usize) -> Reply {
        Reply::Record(Box::new(RecordAnswer {
            current: self.records[place].clone(),
            earlier: None,
            certificate: Arc::clone(&self.certificate),
            complete: self.complete,
        }))
    }
}
