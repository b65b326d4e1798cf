//! Readers in the simulation: the client's own read protocol against servers that lie to readers.
//!
//! One writer replaces a name's keys over and over; several readers read it meanwhile. Liars among the
//! servers take part in ordering as they should and answer readers with whatever they have ever seen,
//! changed at will. After every read: nothing forged, nothing older than `max_age`; while no more lie
//! than the access masks, nothing older than what was complete when the read began, nor than what
//! any earlier read returned.

use crate::cluster::{Event, Simulation};
use quorum::answer::{Proved, RecordAnswer, Verifier};
use quorum::bytes::Blob;
use quorum::certificate::{Certificate, Completion};
use quorum::ids::{Sequence, ServerId, Timestamp};
use quorum::limits::CLOCK_BOUND_MS;
use quorum::ordering::{Input, Published};
use quorum::read::{Ask, Consistency, Progress, Question, Read, Reply, Subject};
use quorum::record::{Entry, KeyMaterial, Name};
use quorum::request::{Operation, SignedRequest};
use quorum::signing::SigningKey;
use quorum::state::layout;
use rand::RngExt;
use rand::seq::SliceRandom;
use std::collections::BTreeMap;
use std::sync::Arc;

/// How many servers lie to readers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liars {
    /// As many as a row access masks: b, or f where reads ask q servers.
    Masked,
    /// f.
    Most,
}

const READERS: usize = 3;
const MAX_AGE_MS: u64 = 5_000;
/// How long a reader waits before it asks others too.
const PATIENCE_MS: u64 = 150;
/// How long a question or an answer takes at most: less than ordering, so that servers are seen apart.
const READER_DELAY_MS: u64 = 15;
/// Certified states that liars remember.
const REMEMBERED: usize = 64;

pub struct Reader {
    verifier: Verifier,
    seen: u64,
    /// The last change of what it has seen: a reader may remember no more than that.
    since: Sequence,
    number: u64,
    read: Option<Running>,
}

struct Running {
    read: Read,
    began: Timestamp,
    /// What was complete, or had been returned to somebody, when it began.
    at_least: u64,
}

/// What the readers' side of a run knows.
pub struct Readers {
    name: Name,
    liars: Vec<ServerId>,
    /// Whether no more lie than an access masks.
    masked: bool,
    readers: Vec<Reader>,
    /// The version that is being written, and its request.
    writing: u64,
    request: Option<SignedRequest>,
    /// Versions that were complete, and when that was shown.
    completed: Vec<(Timestamp, u64)>,
    /// The newest version that any read has returned.
    returned: u64,
    history: Vec<Published>,
    pub reads: usize,
    pub failed: usize,
    pub rejected: usize,
    pub lies: usize,
}

fn entry(version: u64) -> Entry {
    Entry {
        keys: vec![KeyMaterial { algorithm: "age-x25519".into(), key: Blob(vec![version as u8 | 1; 32]) }],
        owner: None,
        owner_only: false,
        not_before: None,
        not_after: None,
        metadata: BTreeMap::from([("version".into(), version.to_string())]),
    }
}

impl Simulation {
    pub(crate) fn start_readers(&mut self, liars: Liars) {
        let thresholds = self.manifest.thresholds;
        let maskable = if thresholds.masked > 0 { usize::from(thresholds.masked) } else { thresholds.f() };
        let count = match liars {
            Liars::Masked => maskable,
            Liars::Most => thresholds.f(),
        };
        let mut servers: Vec<_> = self.manifest.grid().servers().collect();
        servers.shuffle(&mut self.rng);
        // Whoever lies in ordering lies to readers too.
        servers.sort_by_key(|server| !self.liars.contains_key(server));
        servers.truncate(count);
        let reader = || Reader {
            verifier: Verifier::new(Arc::clone(&self.manifest)),
            seen: 0,
            since: Sequence(0),
            number: 0,
            read: None,
        };
        self.readers = Some(Readers {
            name: Name::new("hot").unwrap(),
            liars: servers,
            masked: count <= maskable,
            readers: (0..READERS).map(|_| reader()).collect(),
            writing: 0,
            request: None,
            completed: Vec::new(),
            returned: 0,
            history: Vec::new(),
            reads: 0,
            failed: 0,
            rejected: 0,
            lies: 0,
        });
        self.schedule(500, Event::Write);
        for reader in 0..READERS {
            self.schedule(700 + 30 * reader as u64, Event::Begin(reader));
        }
    }

    /// Liars keep what is certified, for later.
    pub(crate) fn remember_for_liars(&mut self, published: &Published) {
        let newest = published.certificate.statement.sequence;
        if let Some(readers) = &mut self.readers
            && readers.history.last().is_none_or(|last| last.certificate.statement.sequence < newest)
        {
            readers.history.push(published.clone());
            if readers.history.len() > REMEMBERED {
                // Thinned out, so that very old states stay too.
                let mut place = 0;
                readers.history.retain(|_| {
                    place += 1;
                    place % 2 == 0
                });
            }
        }
    }

    /// The writer: the next version, or the same one again until it is complete.
    pub(crate) fn write(&mut self) {
        let administrator = SigningKey::from_seed(&[200; 32]);
        let best = self.honest().filter_map(|server| server.published.as_ref()?.completion.clone());
        let complete = best.map(|completion| completion.sequence).max().unwrap_or_default();
        let holder = self.honest().filter_map(|server| server.published.as_ref()).max_by_key(|p| p.executed);
        let (name, now) = (self.readers.as_ref().expect("readers run").name.clone(), self.now);
        let written = holder.and_then(|published| layout::record(&published.snapshot, &name));
        let readers = self.readers.as_mut().expect("readers run");
        if let Some(record) = written
            && record.version == readers.writing
            && complete >= record.updated.sequence
        {
            readers.completed.push((now, record.version));
            readers.request = None;
        }
        let mut pause = self.rng.random_range(40..120);
        if readers.request.is_none() {
            readers.writing += 1;
            let version = readers.writing;
            let operation = match version {
                1 => Operation::Register { name, entry: entry(1) },
                _ => Operation::Rotate { name, from_version: version - 1, entry: entry(version) },
            };
            let expiry = now.plus_ms(55_000);
            readers.request = Some(SignedRequest::sign(
                &self.cluster,
                &administrator,
                1_000_000 + version,
                expiry,
                operation,
            ));
            pause += self.rng.random_range(0..200);
        }
        let request = readers.request.clone().expect("there is one").verify(&self.cluster).unwrap();
        let gateway = ServerId(self.rng.random_range(0..self.voters.len()) as u8);
        if !self.is_liar(gateway) {
            self.step(gateway, Input::Request(request));
        }
        self.schedule(pause, Event::Write);
    }

    pub(crate) fn begin(&mut self, reader: usize) {
        let mut order: Vec<_> = self.manifest.grid().servers().collect();
        order.shuffle(&mut self.rng);
        let consistency = match self.rng.random_range(0..8) {
            0 => Consistency::Quorum,
            1 => Consistency::Any,
            _ => Consistency::Row,
        };
        let (grid, now) = (self.manifest.grid(), self.now);
        let forgets = self.rng.random_bool(0.2);
        let readers = self.readers.as_mut().expect("readers run");
        if forgets {
            // Somebody else, who has seen nothing yet.
            readers.readers[reader].seen = 0;
            readers.readers[reader].since = Sequence(0);
            readers.readers[reader].verifier = Verifier::new(Arc::clone(&self.manifest));
        }
        let complete = readers.completed.last().map_or(0, |(_, version)| *version);
        let subject = Subject::Record { name: readers.name.clone(), version: None };
        let at_least = complete.max(readers.returned);
        let this = &mut readers.readers[reader];
        let (seen, since) =
            if this.number.is_multiple_of(3) { (0, this.since) } else { (this.seen, Sequence(0)) };
        let question = Question { subject, consistency, max_age_ms: MAX_AGE_MS, seen, since };
        this.number += 1;
        this.read = Some(Running { read: Read::new(grid, question, order), began: now, at_least });
        let number = this.number;
        self.schedule(PATIENCE_MS, Event::Late { reader, number });
        self.go_on(reader);
    }

    /// Sends what the read wants to ask, or ends it.
    fn go_on(&mut self, reader: usize) {
        let readers = self.readers.as_mut().expect("readers run");
        let this = &mut readers.readers[reader];
        let (number, Some(running)) = (this.number, &mut this.read) else { return };
        let asks: Vec<_> = std::iter::from_fn(|| running.read.next_ask()).collect();
        let progress = running.read.progress();
        let too_long = self.now > running.began.plus_ms(4_000);
        for (server, ask) in asks {
            let delay = self.rng.random_range(0..READER_DELAY_MS);
            self.schedule(delay, Event::Ask { reader, number, server, ask });
        }
        match progress {
            Progress::Waiting if !too_long => return,
            Progress::Done => self.check_read(reader),
            Progress::Waiting | Progress::Failed => {
                let readers = self.readers.as_mut().expect("readers run");
                readers.failed += 1;
                let running = readers.readers[reader].read.take().expect("it runs");
                // On a good network with no more liars than are masked every read succeeds.
                assert!(
                    !self.faults.is_good() || !readers.masked,
                    "seed {}: a read of {:?} fails: {:#?}",
                    self.seed,
                    running.read.question().consistency,
                    running.read.access()
                );
            }
        }
        let pause = self.rng.random_range(10..150);
        self.schedule(pause, Event::Begin(reader));
    }

    fn check_read(&mut self, reader: usize) {
        let (seed, now) = (self.seed, self.now);
        let honest: Vec<_> = self.manifest.grid().servers().filter(|server| !self.is_liar(*server)).collect();
        let readers = self.readers.as_mut().expect("readers run");
        let this = &mut readers.readers[reader];
        let running = this.read.take().expect("it runs");
        let consistency = running.read.question().consistency;
        let found = running.read.finish().expect("it is done");
        readers.reads += 1;
        readers.rejected += found.access.rejected.len();
        let version = found.record.as_ref().map_or(0, |record| record.version);
        // Never forged.
        assert!(version <= readers.writing, "seed {seed}: version {version} was never written");
        if let Some(record) = &found.record {
            assert_eq!(record.entry, entry(version), "seed {seed}: a forged record");
            assert_eq!(record.name, readers.name, "seed {seed}: another name's record");
        }
        // Never older than max_age, whoever lies.
        let certified = found.answer.certificate.statement.time;
        assert!(certified.plus_ms(MAX_AGE_MS) >= now, "seed {seed}: an answer of {certified} at {now}");
        let past = Timestamp(now.0 - MAX_AGE_MS - CLOCK_BOUND_MS - 2 * self.faults.skew_ms);
        let long_ago = readers.completed.iter().rev().find(|(at, _)| *at < past);
        assert!(long_ago.is_none_or(|(_, old)| *old <= version), "seed {seed}: a change is suppressed");
        // Never less than this reader has seen.
        assert!(version >= this.seen, "seed {seed}: version {version} after {}", this.seen);
        this.seen = version;
        this.since = found.record.as_ref().map_or(Sequence(0), |record| record.updated.sequence);
        if consistency == Consistency::Any && found.complete && found.record.is_some() {
            // Complete means the same, whoever says so: no later reader sees less.
            readers.returned = readers.returned.max(version);
        }
        if consistency != Consistency::Any && readers.masked {
            assert!(found.complete, "seed {seed}: returned before it is complete");
            assert!(
                version >= running.at_least,
                "seed {seed}: {consistency:?} read of {:?} returns version {version}, and {} was there when it began: {:?}",
                running.began,
                running.at_least,
                found.access
            );
            readers.returned = readers.returned.max(version);
        }
        // Nobody honest is blamed for more than being late.
        for bad in &found.access.rejected {
            let late = bad.why.contains("old") || bad.why.contains("or later");
            assert!(
                late || !honest.contains(&bad.server) || readers.liars.contains(&bad.server),
                "seed {seed}: blamed: {bad}"
            );
        }
    }

    pub(crate) fn answer_reader(&mut self, reader: usize, number: u64, server: ServerId, ask: Ask) {
        let readers = self.readers.as_ref().expect("readers run");
        let lies = readers.liars.contains(&server) || self.liars.contains_key(&server);
        let reply = if lies {
            self.lie(ask)
        } else {
            let published = self.servers[server.index()].published.as_ref();
            published.map_or(Some(Reply::Silent("down".into())), |published| {
                honest_reply(published, &readers.name, ask)
            })
        };
        // A silent liar keeps its reader waiting; a server that is down says so at once, or the link does.
        let Some(reply) = reply else { return };
        let delay = self.rng.random_range(0..READER_DELAY_MS);
        self.schedule(delay, Event::Answer { reader, number, server, ask, reply: Box::new(reply) });
    }

    pub(crate) fn take_answer(
        &mut self,
        reader: usize,
        number: u64,
        server: ServerId,
        ask: Ask,
        reply: Reply,
    ) {
        let now = self.now;
        let readers = self.readers.as_mut().expect("readers run");
        let this = &mut readers.readers[reader];
        if let Some(running) = this.read.as_mut().filter(|_| this.number == number) {
            running.read.take(server, ask, reply, &mut this.verifier, now);
            self.go_on(reader);
        }
    }

    pub(crate) fn late(&mut self, reader: usize, number: u64) {
        let now = self.now;
        let readers = self.readers.as_mut().expect("readers run");
        let this = &mut readers.readers[reader];
        if let Some(running) = this.read.as_mut().filter(|_| this.number == number) {
            running.read.late(&this.verifier, now);
            self.schedule(PATIENCE_MS, Event::Late { reader, number });
            self.go_on(reader);
        }
    }

    /// Anything that a liar can say without breaking signatures or hashes, and some that it cannot.
    fn lie(&mut self, ask: Ask) -> Option<Reply> {
        let readers = self.readers.as_mut().expect("readers run");
        readers.lies += 1;
        let newest = readers.history.last()?.clone();
        let old = readers.history[self.rng.random_range(0..readers.history.len())].clone();
        let (name, other) = (readers.name.clone(), self.clients[0].name.clone());
        let mut answer = look_up(&newest, &name);
        let kind = self.rng.random_range(0..14);
        match (ask, kind) {
            (_, 0) => return None,
            (_, 1) => return Some(Reply::Silent(String::new())),
            (_, 2) => return Some(Reply::Nonsense("garbage".into())),
            (Ask::Completion, 3) => {
                // Complete far ahead, by its own word.
                let mut completion = Completion::clone(newest.completion.as_ref()?);
                completion.sequence = Sequence(completion.sequence.0 + 1_000);
                return Some(Reply::Completion(Box::new(completion)));
            }
            (Ask::Completion, 4) => {
                let mut completion = Completion::clone(newest.completion.as_ref()?);
                completion.sequence = newest.certificate.statement.sequence;
                completion.held.iter_mut().for_each(|held| held.body.sequence = completion.sequence);
                return Some(Reply::Completion(Box::new(completion)));
            }
            (Ask::Completion, 5) => {
                let mut completion = Completion::clone(newest.completion.as_ref()?);
                completion.held.truncate(1);
                return Some(Reply::Completion(Box::new(completion)));
            }
            (Ask::Brief, 3) => return Some(Reply::Brief(u64::MAX)),
            (Ask::Brief, 4) => return Some(Reply::Brief(0)),
            (Ask::Brief, 5) => return Some(Reply::Brief(readers.writing + 1)),
            (Ask::Full, 3) => answer.current.value.as_mut()?.entry.keys[0].key.0[0] ^= 1,
            (Ask::Full, 4) => answer.current = look_up(&newest, &other).current,
            (Ask::Full, 5) => answer.current.value = None,
            (Ask::Full, 6) => answer.current = look_up(&old, &name).current,
            (Ask::Full, 7) => answer.certificate = Arc::clone(&old.certificate),
            (Ask::Full, 8) => {
                let votes = newest.certificate.votes.len() - 1;
                answer.certificate = changed(&newest, |certificate| certificate.votes.truncate(votes));
            }
            (Ask::Full, 9) => {
                answer = look_up(&old, &name);
                let now = self.now;
                answer.certificate = changed(&old, |certificate| certificate.statement.time = now);
            }
            (Ask::Full, 10) => answer.current.value.as_mut()?.version += 1,
            // Real, and old: the one that works, where nobody else is asked.
            _ => return honest_reply(&old, &name, ask),
        }
        Some(Reply::Record(Box::new(answer)))
    }
}

fn changed(published: &Published, change: impl FnOnce(&mut Certificate)) -> Arc<Certificate> {
    let mut certificate = Certificate::clone(&published.certificate);
    change(&mut certificate);
    Arc::new(certificate)
}

fn look_up(published: &Published, name: &Name) -> RecordAnswer {
    let complete = published.completion.as_ref().map_or(Sequence(0), |completion| completion.sequence);
    RecordAnswer {
        current: Proved::look_up(&published.snapshot, &layout::name_key(name)),
        earlier: None,
        certificate: Arc::clone(&published.certificate),
        complete,
    }
}

fn honest_reply(published: &Published, name: &Name, ask: Ask) -> Option<Reply> {
    Some(match ask {
        Ask::Full => Reply::Record(Box::new(look_up(published, name))),
        Ask::Brief => {
            Reply::Brief(layout::record(&published.snapshot, name).map_or(0, |record| record.version))
        }
        Ask::Completion => match &published.completion {
            Some(completion) => Reply::Completion(Box::new(Completion::clone(completion))),
            None => Reply::Silent("nothing is complete".into()),
        },
    })
}
