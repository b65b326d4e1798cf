//! Lookups of many tasks in few requests: what is asked of one server while its answers are on their
//! way goes out together with the next request.
//!
//! Nothing waits for company: with few lookups under way each goes at once. Questions about the same
//! name that are still waiting share one answer; one that is already out is never joined, since its
//! answer may be older than the moment at which the second lookup began.
//!
//! A server that asks to wait is left alone for so long, and then asked what is still of interest. Whoever asks
//! is told when her question goes out, so that nobody takes the time in this queue for a server's silence.

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
use tokio::time::{Instant, sleep_until};

/// Requests to one server that are on their way at once.
const IN_FLIGHT: usize = 2;
/// How long one request may take. Lookups do not wait for it: they go on to other servers.
pub(crate) const PATIENCE: Duration = Duration::from_secs(3);
/// How often a queue that waits is looked through for questions that nobody waits for any more.
const TIDY_INTERVAL: Duration = Duration::from_millis(500);
/// Questions that may wait before the queue is looked through for the first time.
const TIDY_FROM: usize = 1_024;

/// What a lookup hears of its question.
pub(crate) enum News {
    /// It goes out now.
    Sent,
    /// What came of it.
    Reply(Reply),
}

/// Where a lookup hears of its questions.
pub(crate) type Answers = UnboundedSender<(ServerId, Ask, News)>;

struct Waiting {
    name: Name,
    ask: Ask,
    answers: Answers,
}

impl Waiting {
    fn tell(&self, server: ServerId, news: News) {
        let _ = self.answers.send((server, self.ask, news));
    }
}

/// A place for a request.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Slot {
    #[default]
    Free,
    /// Somebody sees to the queue.
    Taken,
    /// A request is out since then.
    Out(Instant),
}

#[derive(Default)]
struct Queue {
    /// As many as there are lookups under way, and so bounded by those that a client lets begin; and those that
    /// ended since the queue was last looked through.
    waiting: Vec<Waiting>,
    slots: [Slot; IN_FLIGHT],
    /// Until when the server asked to wait.
    paused: Option<Instant>,
    /// At how many questions it is looked through.
    tidy_at: usize,
}

impl Queue {
    fn tidy(&mut self) {
        self.waiting.retain(|waiting| !waiting.answers.is_closed());
        self.tidy_at = (2 * self.waiting.len()).max(TIDY_FROM);
    }
    fn pause(&mut self) -> Option<Instant> {
        self.paused.filter(|until| *until > Instant::now())
    }
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
        let mut queue = self.queue();
        queue.waiting.push(Waiting { name: name.clone(), ask, answers: answers.clone() });
        if queue.waiting.len() > queue.tidy_at {
            queue.tidy();
        }
        if let Some(place) = queue.slots.iter().position(|slot| *slot == Slot::Free) {
            queue.slots[place] = Slot::Taken;
            drop(queue);
            tokio::spawn(Arc::clone(self).run(place));
        }
    }
    /// Whether what waits here has to wait for the server: it asked for that, or leaves all that is out
    /// unanswered for so long.
    pub(crate) fn is_held_up(&self, patience: Duration) -> bool {
        let mut queue = self.queue();
        let unanswered = |slot: &Slot| matches!(slot, Slot::Out(since) if since.elapsed() >= patience);
        queue.pause().is_some() || queue.slots.iter().all(unanswered)
    }

    async fn run(self: Arc<Self>, place: usize) {
        let mut guard = SlotGuard { batcher: Arc::clone(&self), place, taken: true };
        loop {
            // Tasks that are about to ask do so first.
            tokio::task::yield_now().await;
            match self.next(&mut guard) {
                Next::Batch(batch) => {
                    self.send(batch).await;
                    self.queue().slots[place] = Slot::Taken;
                }
                Next::Pause(until) => sleep_until(until.min(Instant::now() + TIDY_INTERVAL)).await,
                Next::End => return,
            }
        }
    }

    fn next(&self, guard: &mut SlotGuard) -> Next {
        let mut queue = self.queue();
        queue.tidy();
        let count = queue.waiting.len().min(MAX_LOOKUP_NAMES);
        if count == 0 {
            // Under the lock: whoever asks next sees it.
            guard.leave(queue);
            return Next::End;
        }
        if let Some(until) = queue.pause() {
            return Next::Pause(until);
        }
        queue.slots[guard.place] = Slot::Out(Instant::now());
        Next::Batch(queue.waiting.drain(..count).collect())
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
        batch.iter().for_each(|waiting| waiting.tell(server, News::Sent));
        let asked = self.link.bulk(&question, Instant::now() + PATIENCE).await;
        match asked.and_then(|answer| Checked::new(answer, &question, known)) {
            Ok(answer) => {
                for waiting in &batch {
                    let reply = match waiting.ask {
                        Ask::Full => answer.record(full[&waiting.name]),
                        _ => Reply::Brief(answer.versions[brief[&waiting.name]]),
                    };
                    waiting.tell(server, News::Reply(reply));
                }
            }
            // More than fits into one answer: each by itself.
            Err(LinkError::Problem(problem)) if problem.status == 413 && batch.len() > 1 => {
                for waiting in batch {
                    Box::pin(self.send(vec![waiting])).await;
                }
            }
            // First again, when it is time.
            Err(LinkError::AsksToWait { wait, .. }) => {
                let mut queue = self.queue();
                queue.paused = queue.pause().max(Some(Instant::now() + wait));
                queue.waiting.splice(0..0, batch);
            }
            Err(error) => {
                for waiting in &batch {
                    waiting.tell(server, News::Reply(as_reply(&error)));
                }
            }
        }
    }
}

/// What is to be done about a queue.
enum Next {
    Batch(Vec<Waiting>),
    /// The server asked to wait until then.
    Pause(Instant),
    End,
}

/// Makes the place of a request free again, even if its task is broken off with its runtime.
struct SlotGuard {
    batcher: Arc<Batcher>,
    place: usize,
    taken: bool,
}

impl SlotGuard {
    fn leave(&mut self, mut queue: MutexGuard<'_, Queue>) {
        queue.slots[self.place] = Slot::Free;
        self.taken = false;
    }
}

impl Drop for SlotGuard {
    fn drop(&mut self) {
        if self.taken {
            self.batcher.queue().slots[self.place] = Slot::Free;
        }
    }
}

/// What a failed request means for a read.
pub(crate) fn as_reply(error: &LinkError) -> Reply {
    match error {
        LinkError::Silent(why) | LinkError::Unreached(why) => Reply::Silent(why.clone()),
        // Not now: no lie.
        LinkError::AsksToWait { .. } => Reply::Silent(error.to_string()),
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
