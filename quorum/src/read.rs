//! The read protocol (design §2), without a network: one row of the grid, then another, then q
//! servers.
//!
//! One server of the row gives the whole self-proving answer; the others repeat only the record's
//! version, each over a channel that is known to be its own. A version that is claimed to be newer has
//! to be proved by who claims it, or that server is rejected and the read goes on. Before the
//! record is returned its last change is shown to be complete, by Held statements, so that no later
//! reader sees less (atomicity): where servers hold it but have not said so yet the reader asks until
//! they do.
//!
//! The shell asks the servers that [`Read::next_ask`] names, hands in what comes back, and calls
//! [`Read::late`] when an answer seems to be late or there is nothing left to wait for. The same code
//! runs in the client and in the simulator.

use crate::answer::{Absence, AnswerError, RecordAnswer, Shown, Verifier};
use crate::certificate::{Certificate, Completion};
use crate::grid::Grid;
use crate::ids::{Sequence, ServerId, ServerSet, Timestamp};
use crate::record::{Name, Record};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// How sure a read has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// r full rows, or q servers where rows are not to be had: sees every completed write while at
    /// most b servers lie.
    #[default]
    Row,
    /// q servers: sees every completed write while at most f servers lie.
    Quorum,
    /// Any one server: never forged, and at most `max_age` old. Complete only if that is shown, as for the others;
    /// nobody waits long for it.
    Any,
}

/// What a read is about.
#[derive(Clone, Debug)]
pub enum Subject {
    /// The record of a name.
    Record {
        /// The name.
        name: Name,
        /// An earlier version, if one is wanted.
        version: Option<u64>,
    },
    /// The state itself: a certificate of a state that has every completed write, for listings.
    State,
}

/// What a read is to find out.
#[derive(Clone, Debug)]
pub struct Question {
    /// About what.
    pub subject: Subject,
    /// How sure.
    pub consistency: Consistency,
    /// How old the certificate may be by the reader's clock, in milliseconds.
    pub max_age_ms: u64,
    /// The newest version that the reader has seen: it never returns less. Of the state: sequence number.
    pub seen: u64,
    /// The answer is to be from this state or a later one: for a reader who no longer knows which version he has
    /// seen, and still how new it was at most.
    pub since: Sequence,
}

/// What to ask a server for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The whole answer.
    Full,
    /// The version alone.
    Brief,
    /// What it knows to be complete.
    Completion,
}

/// What came back, in time or later.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The whole answer about a record.
    Record(Box<RecordAnswer>),
    /// The whole answer about the state.
    State(Arc<Certificate>),
    /// The record's version alone, 0 if there is none; the certified sequence number, of the state. Known
    /// to be this server's own word.
    Brief(u64),
    /// What it knows to be complete.
    Completion(Box<Completion>),
    /// It does not answer, or not now; why, as far as the shell knows.
    Silent(String),
    /// It says what no correct server says.
    Nonsense(String),
}

/// How far a read is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Answers are awaited.
    Waiting,
    /// Done: [`Read::finish`] has the result.
    Done,
    /// Nobody is left to be asked.
    Failed,
}

/// Which servers made a read complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    /// Full rows.
    Row,
    /// q servers.
    Quorum,
    /// One server.
    Any,
}

/// How a read went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// What made it complete.
    pub kind: AccessKind,
    /// The full rows among the servers that answered.
    pub rows: Vec<usize>,
    /// Servers with a good answer.
    pub answered: Vec<ServerId>,
    /// Servers that were asked and did not answer, so far.
    pub silent: Vec<Silence>,
    /// Servers that answered with an older version than the one that was proved: slow, or lying.
    pub behind: Vec<(ServerId, u64)>,
    /// Servers whose answers were refused, and why.
    pub rejected: Vec<Misbehaviour>,
    /// Those of them whose certificates were too old or too young by the reader's clock.
    pub stale: Vec<ServerId>,
}

/// A server that does not answer: slow, cut off, down, or lying.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Which server.
    pub server: ServerId,
    /// Why, as far as the reader knows.
    pub why: String,
}

impl std::fmt::Display for Silence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.server, self.why)
    }
}

/// A server's answer that was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Misbehaviour {
    /// Which server.
    pub server: ServerId,
    /// What was wrong with its answer.
    pub why: String,
}

impl std::fmt::Display for Misbehaviour {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "server {}: {}", self.server, self.why)
    }
}

/// The result of a read.
#[derive(Clone, Debug)]
pub struct Found {
    /// The record; none if its absence was proved.
    pub record: Option<Record>,
    /// The proof, to keep.
    pub answer: RecordAnswer,
    /// How it came about.
    pub access: Access,
    /// Whether the record's last change is proved to be visible to every complete read.
    pub complete: bool,
    absence: Option<Absence>,
}

impl Found {
    /// The absence that was proved, if there is no record.
    pub fn absence(&self) -> Option<&Absence> {
        self.absence.as_ref()
    }
    /// The record, or the absence.
    pub fn shown(self) -> Option<Shown<Record>> {
        self.record.map(Shown::There).or(self.absence.map(Shown::Absent))
    }
}

/// The newest of the answers that were proved.
#[derive(Clone, Debug)]
struct Best {
    version: u64,
    last_change: Sequence,
    proof: Proof,
}

#[derive(Clone, Debug)]
enum Proof {
    Record(Box<(Shown<Record>, RecordAnswer)>),
    State(Arc<Certificate>),
}

impl Proof {
    fn certificate(&self) -> &Certificate {
        match self {
            Self::Record(found) => &found.1.certificate,
            Self::State(certificate) => certificate,
        }
    }
}

/// How often a server's answer may be older than what the reader has seen before it is rejected.
const PATIENCE_WITH_THE_PAST: u32 = 5;

/// A read in progress.
#[derive(Clone, Debug)]
pub struct Read {
    question: Question,
    grid: Grid,
    /// All servers in the order in which this reader prefers them.
    order: Vec<ServerId>,
    /// Groups of servers still to ask: rows, or single servers.
    groups: VecDeque<Vec<ServerId>>,
    asks: VecDeque<(ServerId, Ask)>,
    asked: ServerSet,
    /// Questions that are out.
    open: Vec<(ServerId, Ask)>,
    /// Servers that seem to be late: their answers still count, and nobody waits for them.
    late: ServerSet,
    versions: BTreeMap<ServerId, u64>,
    best: Option<Best>,
    /// Why servers did not answer, those that said so.
    silent: BTreeMap<ServerId, String>,
    rejected: Vec<Misbehaviour>,
    stale: Vec<ServerId>,
    progress: Progress,
    complete: bool,
    next_completion: usize,
    /// Servers whose answer was older than what was seen, to be asked again; and how often that was so.
    again: Vec<ServerId>,
    backward: BTreeMap<ServerId, u32>,
}

impl Read {
    /// Starts a read. `order` has every server once, those that the reader would rather not ask last; a
    /// random one spreads the load and lets nobody expect to be asked.
    pub fn new(grid: Grid, question: Question, order: Vec<ServerId>) -> Self {
        let thresholds = grid.thresholds();
        let groups = match question.consistency {
            Consistency::Any => order.iter().map(|server| vec![*server]).collect(),
            Consistency::Row if thresholds.masked > 0 => {
                let place = |server: &ServerId| order.iter().position(|other| other == server);
                let mut rows: Vec<Vec<ServerId>> = (0..grid.side())
                    .map(|row| order.iter().copied().filter(|server| grid.row_of(*server) == row).collect())
                    .collect();
                // A row is as good as the worst of its members.
                rows.sort_by_key(|row| row.last().and_then(place));
                let rest = rows.split_off(usize::from(thresholds.rows));
                std::iter::once(rows.concat()).chain(rest).collect()
            }
            Consistency::Row | Consistency::Quorum => {
                let (first, rest) = order.split_at(thresholds.q());
                std::iter::once(first.to_vec()).chain(rest.iter().map(|server| vec![*server])).collect()
            }
        };
        let mut read = Self {
            question,
            grid,
            order,
            groups,
            asks: VecDeque::new(),
            asked: ServerSet::default(),
            open: Vec::new(),
            late: ServerSet::default(),
            versions: BTreeMap::new(),
            best: None,
            silent: BTreeMap::new(),
            rejected: Vec::new(),
            stale: Vec::new(),
            progress: Progress::Waiting,
            complete: false,
            next_completion: 0,
            again: Vec::new(),
            backward: BTreeMap::new(),
        };
        read.ask_group();
        read
    }
    /// The next question to send.
    pub fn next_ask(&mut self) -> Option<(ServerId, Ask)> {
        let ask = self.asks.pop_front()?;
        self.open.push(ask);
        Some(ask)
    }
    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.progress
    }
    /// What it is to find out.
    pub fn question(&self) -> &Question {
        &self.question
    }
    /// Whether an answer was refused for its age, by the reader's clock: that may be what is wrong.
    pub fn has_stale(&self) -> bool {
        !self.stale.is_empty()
    }
    /// Whether everything that was asked has been answered: [`Read::late`] is due after a short pause.
    pub fn is_idle(&self) -> bool {
        self.open.is_empty() && self.asks.is_empty()
    }

    /// Whether a whole answer is on its way, from somebody who is not late with it.
    fn awaits_full(&self) -> bool {
        let full = |ask: &(ServerId, Ask)| ask.1 == Ask::Full && !self.late.contains(ask.0);
        self.open.iter().chain(&self.asks).any(full)
    }
    fn ask_group(&mut self) -> bool {
        let Some(group) = self.groups.pop_front() else { return false };
        for server in group {
            if self.asked.insert(server) {
                // Whoever comes first gives the whole answer: that load is spread too.
                let full_is_coming = self.best.is_some() || self.awaits_full();
                let ask = if full_is_coming { Ask::Brief } else { Ask::Full };
                self.asks.push_back((server, ask));
            }
        }
        true
    }

    /// Takes in what a server says to a question. `now` is the reader's clock.
    pub fn take(
        &mut self,
        server: ServerId,
        ask: Ask,
        reply: Reply,
        verifier: &mut Verifier,
        now: Timestamp,
    ) {
        let Some(at) = self.open.iter().position(|open| *open == (server, ask)) else { return };
        self.open.swap_remove(at);
        if self.progress != Progress::Waiting {
            return;
        }
        match (reply, ask) {
            (reply @ (Reply::Record(_) | Reply::State(_)), Ask::Full) => {
                match self.check(reply, verifier, now) {
                    Ok(answer) => {
                        self.versions.insert(server, answer.version);
                        if self.best.as_ref().is_none_or(|best| best.version < answer.version) {
                            self.best = Some(answer);
                        }
                    }
                    // An honest server may be a moment behind: it is asked again after a pause, but not for ever.
                    Err(AnswerError::Backwards { got, .. }) if self.backward(server) => {
                        self.versions.insert(server, got);
                        self.again.push(server);
                        self.ask_group();
                    }
                    Err(AnswerError::Behind { .. }) if self.backward(server) => {
                        self.again.push(server);
                        self.ask_group();
                    }
                    Err(error) => {
                        if matches!(error, AnswerError::TooOld { .. } | AnswerError::FromTheFuture { .. }) {
                            self.stale.push(server);
                        }
                        self.reject(server, error.to_string());
                    }
                }
            }
            (Reply::Brief(version), Ask::Brief) => {
                self.versions.insert(server, version);
            }
            (Reply::Completion(completion), Ask::Completion) => {
                // A wrong statement is not believed; who repeated it is of no consequence.
                let _ = verifier.completion(&completion);
            }
            (_, Ask::Completion) => {}
            (Reply::Silent(why), _) => {
                self.silent.insert(server, why);
                self.ask_group();
            }
            (Reply::Nonsense(why), _) => self.reject(server, why),
            (_, Ask::Full | Ask::Brief) => {
                self.reject(server, AnswerError::OtherQuestion.to_string());
            }
        }
        self.advance(verifier, now);
    }
    /// An answer seems to be late, or nothing is left to wait for: more servers are asked. Late is as
    /// good as silent for the moment.
    pub fn late(&mut self, verifier: &Verifier, now: Timestamp) {
        if self.progress != Progress::Waiting {
            return;
        }
        self.advance(verifier, now);
        if self.progress == Progress::Waiting && self.asks.is_empty() {
            match self.enough() {
                true if self.question.consistency == Consistency::Any => self.progress = Progress::Done,
                true => self.ask_completion(),
                false => {
                    for (server, _) in &self.open {
                        self.late.insert(*server);
                    }
                    let again: Vec<_> = self.again.drain(..).map(|server| (server, Ask::Full)).collect();
                    self.asks.extend(again);
                    if !self.ask_group() && self.is_idle() {
                        self.progress = Progress::Failed;
                    }
                }
            }
        }
    }

    /// Notes an answer that is older than what was seen; says whether that may still be an honest delay.
    fn backward(&mut self, server: ServerId) -> bool {
        let times = self.backward.entry(server).or_default();
        *times += 1;
        *times <= PATIENCE_WITH_THE_PAST
    }

    fn reject(&mut self, server: ServerId, why: String) {
        self.versions.remove(&server);
        self.rejected.push(Misbehaviour { server, why });
        self.ask_group();
    }

    /// Is it real, fresh, about what was asked, and no less than what was seen before?
    fn check(&self, reply: Reply, verifier: &mut Verifier, now: Timestamp) -> Result<Best, AnswerError> {
        let best = match (reply, &self.question.subject) {
            (Reply::Record(mut answer), Subject::Record { name, version }) => {
                answer.certificate = verifier.certificate(&answer.certificate)?;
                Verifier::fresh(&answer.certificate.statement, now, self.question.max_age_ms)?;
                let record = verifier.record(&answer, name, *version)?;
                let current = answer.current.value.as_ref();
                // What was never written has no change that others might miss.
                let (version, last_change) =
                    current.map_or((0, Sequence(0)), |record| (record.version, record.updated.sequence));
                Best { version, last_change, proof: Proof::Record(Box::new((record, *answer))) }
            }
            (Reply::State(certificate), Subject::State) => {
                let certificate = verifier.certificate(&certificate)?;
                Verifier::fresh(&certificate.statement, now, self.question.max_age_ms)?;
                let sequence = certificate.statement.sequence;
                Best { version: sequence.0, last_change: sequence, proof: Proof::State(certificate) }
            }
            _ => return Err(AnswerError::OtherQuestion),
        };
        if best.version < self.question.seen {
            return Err(AnswerError::Backwards { got: best.version, seen: self.question.seen });
        }
        let (got, current) = (best.proof.certificate().statement.sequence, self.question.since);
        if got < current {
            return Err(AnswerError::Behind { got, current });
        }
        Ok(best)
    }

    /// Whether enough servers answered, and nobody claims more than is proved.
    fn enough(&self) -> bool {
        let Some(best) = &self.best else { return false };
        let answered: ServerSet = self.versions.keys().copied().collect();
        let enough = match self.question.consistency {
            Consistency::Any => !answered.is_empty(),
            Consistency::Row => self.grid.read_is_complete(&answered),
            Consistency::Quorum => answered.len() >= self.grid.thresholds().q(),
        };
        enough && self.versions.values().all(|version| *version <= best.version)
    }
    /// The sequence number that has to be complete, whomever it was read from, before the answer is called so.
    fn last_change(&self) -> Sequence {
        self.best.as_ref().map_or(Sequence(0), |best| best.last_change)
    }

    fn advance(&mut self, verifier: &Verifier, now: Timestamp) {
        // It may have become too old while its completeness was awaited.
        let grown_old = |best: &Best| {
            Verifier::fresh(&best.proof.certificate().statement, now, self.question.max_age_ms).is_err()
        };
        if self.best.as_ref().is_some_and(grown_old) {
            self.best = None;
        }
        // Somebody claims a newer version than anyone proved: he is to prove it.
        let proved = self.best.as_ref().map(|best| best.version);
        if !self.awaits_full() {
            let claims =
                self.versions.iter().filter(|(_, claimed)| proved.is_none_or(|best| best < **claimed));
            if let Some((server, _)) = claims.max_by_key(|(_, claimed)| **claimed) {
                let server = *server;
                self.versions.remove(&server);
                self.asks.push_back((server, Ask::Full));
            }
        }
        if self.enough() {
            if verifier.complete() >= self.last_change() {
                self.complete = true;
                self.progress = Progress::Done;
            } else if self.next_completion == 0 {
                self.ask_completion();
            } else if self.question.consistency == Consistency::Any
                && !self.open.iter().chain(&self.asks).any(|ask| ask.1 == Ask::Completion)
            {
                // Who asks one server alone is told that it is not shown to be complete, and waits no longer.
                self.progress = Progress::Done;
            }
        } else if self.is_idle() && self.again.is_empty() && !self.ask_group() {
            // Those that were a moment behind are asked again before a read fails.
            self.progress = Progress::Failed;
        }
    }
    /// Servers gossip their statements: among f+1 of them is a correct one.
    fn ask_completion(&mut self) {
        let asked = self.grid.thresholds().f() + 1;
        for _ in 0..asked {
            let server = self.order[self.next_completion % self.order.len()];
            self.next_completion += 1;
            if !self.open.contains(&(server, Ask::Completion)) {
                self.asks.push_back((server, Ask::Completion));
            }
        }
    }

    /// Whether an answer is there, and only its completeness is not shown. After some patience the shell
    /// may take it as it is, and must say so ("committed, not yet visible to row reads", design §2).
    pub fn is_incomplete(&self) -> bool {
        self.progress == Progress::Waiting && self.enough()
    }
    /// How it went so far, for an error's text or the result.
    pub fn access(&self) -> Access {
        let proved = self.best.as_ref().map_or(0, |best| best.version);
        let answered: ServerSet = self.versions.keys().copied().collect();
        let kind = match self.question.consistency {
            Consistency::Any => AccessKind::Any,
            _ if answered.len() >= self.grid.thresholds().q() => AccessKind::Quorum,
            _ => AccessKind::Row,
        };
        let full = |row: &usize| self.grid.row(*row).all(|server| answered.contains(server));
        let rejected = |server| self.rejected.iter().any(|bad| bad.server == server);
        let silent = |server: &ServerId| !answered.contains(*server) && !rejected(*server);
        let silence = |server| {
            let why = self.silent.get(&server).map_or("no answer yet", String::as_str);
            Silence { server, why: why.to_owned() }
        };
        Access {
            kind,
            rows: (0..self.grid.side()).filter(full).collect(),
            silent: self.asked.iter().filter(silent).map(silence).collect(),
            answered: answered.iter().collect(),
            behind: self.versions.iter().filter(|(_, v)| **v < proved).map(|(s, v)| (*s, *v)).collect(),
            rejected: self.rejected.clone(),
            stale: self.stale.clone(),
        }
    }
    /// The record that was read; none if no answer is good enough.
    pub fn finish(self) -> Option<Found> {
        let (access, complete) = (self.access(), self.complete);
        match self.enough().then_some(self.best?)?.proof {
            Proof::Record(found) => {
                let (shown, answer) = *found;
                let (record, absence) = match shown {
                    Shown::There(record) => (Some(record), None),
                    Shown::Absent(absence) => (None, Some(absence)),
                };
                Some(Found { record, answer, access, complete, absence })
            }
            Proof::State(_) => None,
        }
    }
    /// The certificate of a state that has every completed write.
    pub fn finish_state(self) -> Option<Arc<Certificate>> {
        match self.enough().then_some(self.best?)?.proof {
            Proof::State(certificate) => Some(certificate),
            Proof::Record(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answer::Proved;
    use crate::certificate::tests::voters;
    use crate::certificate::{Checkpoint, CompletionTracker, Held, VoteBook};
    use crate::ids::{AttemptId, Epoch};
    use crate::map::Map;
    use crate::record::{Change, Entry, Status};
    use crate::state::layout;

    /// Complete means the same however it was read: that Held statements show it. Who asks any one server waits
    /// for them no longer than they take, and is told if they do not come.
    #[test]
    fn an_answer_of_any_server_is_complete_only_if_that_is_shown() {
        let (keyring, voters) = voters(4);
        let (manifest, name) = (Arc::clone(keyring.manifest()), Name::new("alice").unwrap());
        let (time, sequence) = (Timestamp(1_000), Sequence(9));
        let entry = Entry {
            keys: vec![],
            owner: None,
            owner_only: false,
            not_before: None,
            not_after: None,
            metadata: BTreeMap::new(),
        };
        let updated = Change { sequence, time };
        let record = Record { name: name.clone(), version: 1, status: Status::Active, entry, updated };
        let entries = [(layout::name_key(&name), crate::codec::encode(&record))];
        let snapshot = Map::from_entries(manifest.cluster_id(), entries).seal();
        let statement = Checkpoint { sequence, root: snapshot.root(), time, epoch: Epoch(0), attempt: 0 };
        let (mut book, mut tracker) = (VoteBook::default(), CompletionTracker::new(manifest.grid()));
        for voter in &voters {
            assert!(book.add(voter.sign(statement)).unwrap());
            assert!(tracker.add(voter.sign(Held { sequence, attempt: AttemptId::default() })));
        }
        let answer = RecordAnswer {
            current: Proved::look_up(&snapshot, &layout::name_key(&name)),
            earlier: None,
            certificate: Arc::new(book.proof(&statement, manifest.thresholds.q()).unwrap()),
            complete: Sequence(u64::MAX),
        };
        // Shown; nobody says so in time; those who are asked know nothing.
        for (shown, late) in [(true, false), (false, true), (false, false)] {
            let question = Question {
                subject: Subject::Record { name: name.clone(), version: None },
                consistency: Consistency::Any,
                max_age_ms: 5_000,
                seen: 0,
                since: Sequence(0),
            };
            let mut verifier = Verifier::new(Arc::clone(&manifest));
            let order = manifest.grid().servers().collect();
            let mut read = Read::new(manifest.grid(), question, order);
            let (server, ask) = read.next_ask().unwrap();
            read.take(server, ask, Reply::Record(Box::new(answer.clone())), &mut verifier, time);
            assert_eq!(read.progress(), Progress::Waiting);
            let asked: Vec<_> = std::iter::from_fn(|| read.next_ask()).collect();
            assert!(asked.iter().all(|(_, ask)| *ask == Ask::Completion) && asked.len() == 2);
            match late {
                true => read.late(&verifier, time),
                false => asked.into_iter().for_each(|(server, ask)| {
                    let reply = match shown {
                        true => Reply::Completion(Box::new(tracker.completion().unwrap())),
                        false => Reply::Silent("nothing is complete yet".into()),
                    };
                    read.take(server, ask, reply, &mut verifier, time);
                }),
            }
            assert_eq!(read.progress(), Progress::Done);
            let found = read.finish().unwrap();
            assert_eq!((found.record.as_ref(), found.complete), (Some(&record), shown));
        }
    }
}
