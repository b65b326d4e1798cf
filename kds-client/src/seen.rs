//! What this client has told: nothing that it tells later is less (monotonic reads, Terry et al. 1994).
//!
//! Whatever is told, by whichever call, comes by here: the newest version of each name, and the record while it
//! may be told again from memory. Names that were not asked about for long go first; what is forgotten of them
//! stays as one number, the sequence number of the newest change among them, and whatever is told of names
//! that are not known here is from a state that has that change. So bounded memory forgets nothing that
//! matters, and strangers who choose names push nothing out that would let an old answer in.

use crate::client::Client;
use crate::deadline::millis;
use quorum::answer::{Absence, Shown};
use quorum::ids::{Sequence, Timestamp};
use quorum::record::{Name, Record};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names that are remembered at least, whatever the options say.
const LEAST_NAMES: usize = 1_024;

/// A record, or that there is none, and until when that may be told.
pub(crate) type Cached = (Shown<Arc<Record>>, Timestamp);

/// What an answer has to be at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Least {
    /// The version that was told, 0 if none was.
    pub(crate) version: u64,
    /// The state that it has to be from, or a later one.
    pub(crate) since: Sequence,
}

/// As many values as fit; those not used for longest make room, an eighth at a time.
struct Recent<T> {
    most: usize,
    kept: HashMap<Name, (u64, T)>,
    uses: u64,
}

impl<T> Recent<T> {
    fn new(most: usize) -> Self {
        Self { most, kept: HashMap::new(), uses: 0 }
    }
    /// Counts as a use.
    fn get(&mut self, name: &Name) -> Option<&mut T> {
        self.uses += 1;
        let (used, value) = self.kept.get_mut(name)?;
        *used = self.uses;
        Some(value)
    }
    /// What had to make room.
    fn insert(&mut self, name: &Name, value: T) -> Vec<T> {
        let mut gone = Vec::new();
        if self.kept.len() >= self.most && !self.kept.contains_key(name) {
            let mut uses: Vec<u64> = self.kept.values().map(|(used, _)| *used).collect();
            let eighth = uses.len() / 8;
            let oldest = *uses.select_nth_unstable(eighth).1;
            gone =
                self.kept.extract_if(|_, (used, _)| *used <= oldest).map(|(_, (_, value))| value).collect();
        }
        self.uses += 1;
        self.kept.insert(name.clone(), (self.uses, value));
        gone
    }
}

/// The newest version of a name that was told.
struct Told {
    version: u64,
    changed: Sequence,
    /// The state that later answers are from, or a later one: something was told of the name beside its version.
    since: Sequence,
    /// The record itself and when it was certified last, if it is known to be visible to everyone.
    record: Option<(Arc<Record>, Timestamp)>,
}

struct Inside {
    told: Recent<Told>,
    /// Names that were shown not to exist. They push out only each other.
    absent: Recent<Absence>,
    /// The newest change that was told.
    newest: Sequence,
    /// The newest change of a name that is forgotten.
    forgotten: Sequence,
}

/// See the module.
pub(crate) struct Seen {
    /// Records are kept, not their versions alone.
    keeps: bool,
    inside: Mutex<Inside>,
}

impl Seen {
    /// Keeps the records of so many names.
    pub(crate) fn new(names: usize) -> Self {
        let most = names.max(LEAST_NAMES);
        let (told, absent) = (Recent::new(most), Recent::new(most));
        let inside = Inside { told, absent, newest: Sequence(0), forgotten: Sequence(0) };
        Self { keeps: names > 0, inside: Mutex::new(inside) }
    }
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What an answer about a name has to be at least.
    pub(crate) fn least(&self, name: &Name) -> Least {
        let mut inside = self.inside();
        let forgotten = inside.forgotten;
        match inside.told.get(name) {
            Some(told) => Least { version: told.version, since: told.since },
            None => Least { version: 0, since: forgotten },
        }
    }
    /// What an answer about the whole state has to be at least.
    pub(crate) fn least_state(&self) -> Sequence {
        self.inside().newest
    }
    /// What is in memory of a name, if it was certified not longer than `max_age_ms` ago: its newest version, or
    /// that there is none.
    fn fresh(&self, name: &Name, now: Timestamp, max_age_ms: u64) -> Option<Cached> {
        // By this machine's clock, as everywhere. A clock that was put back makes nothing fresh.
        let until = |certified: Timestamp| {
            let until = certified.plus_ms(max_age_ms);
            (until >= now && certified <= now.plus_ms(max_age_ms)).then_some(until)
        };
        let mut inside = self.inside();
        if let Some(told) = inside.told.get(name) {
            let (record, certified) = told.record.as_ref()?;
            return Some((Shown::There(Arc::clone(record)), until(*certified)?));
        }
        let absence = inside.absent.get(name)?.clone();
        let until = until(absence.at().time)?;
        Some((Shown::Absent(absence), until))
    }
    fn tell(&self, name: &Name, told: Told) {
        let mut inside = self.inside();
        inside.newest = inside.newest.max(told.changed);
        inside.absent.kept.remove(name);
        match inside.told.get(name) {
            // A newer one, or the same certified later.
            Some(known) if known.version < told.version => {
                *known = Told { since: known.since.max(told.since), ..told };
            }
            Some(known) if known.version == told.version => {
                let certified = |told: &Told| told.record.as_ref().map(|(_, certified)| *certified);
                if certified(known) < certified(&told) {
                    known.record = told.record;
                }
            }
            Some(_) => {}
            None => {
                for gone in inside.told.insert(name, told) {
                    inside.forgotten = inside.forgotten.max(gone.changed).max(gone.since);
                }
            }
        }
    }
    /// Something of a whole state was told.
    pub(crate) fn state(&self, state: Sequence) {
        let mut inside = self.inside();
        inside.newest = inside.newest.max(state);
    }
    /// Something of a name was told that is so in a state, and maybe not before.
    pub(crate) fn since(&self, name: &Name, state: Sequence) {
        let version = self.least(name).version;
        self.tell(name, Told { version, changed: state, since: state, record: None });
        if let Some(told) = self.inside().told.get(name) {
            (told.since, told.record) = (told.since.max(state), None);
        }
    }
    /// A version was told, and shown to be visible to everyone by a certificate of that time.
    pub(crate) fn record(&self, record: &Record, certified: Timestamp) {
        let kept = self.keeps.then(|| (Arc::new(record.clone()), certified));
        let (version, changed, since) = (record.version, record.updated.sequence, Sequence(0));
        self.tell(&record.name, Told { version, changed, since, record: kept });
    }
    /// A version was told, and no more is known of it: it was written, or may not be visible to everyone yet.
    pub(crate) fn version(&self, name: &Name, version: u64, changed: Sequence) {
        self.tell(name, Told { version, changed, since: Sequence(0), record: None });
    }
    /// A name was shown not to exist.
    pub(crate) fn absent(&self, name: &Name, absence: &Absence) {
        let mut inside = self.inside();
        if self.keeps && inside.told.get(name).is_none() {
            inside.absent.insert(name, absence.clone());
        }
    }
}

impl Client {
    /// The answer in memory, if it is still good; for callers that cannot wait.
    pub(crate) fn cached(&self, name: &Name) -> Option<Shown<Arc<Record>>> {
        self.cached_until(name).map(|(shown, _)| shown)
    }
    /// And until when it is.
    pub(crate) fn cached_until(&self, name: &Name) -> Option<Cached> {
        let max_age_ms = millis(self.inner.options.max_age);
        self.inner.seen.fresh(name, crate::now(), max_age_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorum::record::{Change, Entry, Status};
    use std::collections::BTreeMap;

    use crate::fixtures::absence;

    const AGE: u64 = 5_000;

    fn name(i: usize) -> Name {
        Name::new(format!("name-{i}")).unwrap()
    }
    fn record(i: usize, version: u64, sequence: u64) -> Record {
        let updated = Change { sequence: Sequence(sequence), time: Timestamp(sequence) };
        let entry = Entry {
            keys: vec![],
            owner: None,
            owner_only: false,
            not_before: None,
            not_after: None,
            metadata: BTreeMap::new(),
        };
        Record { name: name(i), version, status: Status::Active, entry, updated }
    }
    fn version(found: Option<Cached>) -> Option<u64> {
        found.map(|(shown, _)| shown.there().map_or(0, |record| record.version))
    }

    #[test]
    fn nothing_is_told_from_memory_beyond_its_age() {
        let seen = Seen::new(8);
        let at = |i: usize, now: u64| version(seen.fresh(&name(i), Timestamp(now), AGE));
        seen.record(&record(1, 1, 1), Timestamp(10_000));
        seen.absent(&name(2), &absence(&name(2), Timestamp(10_000)));
        for (i, found) in [(1, 1), (2, 0)] {
            assert_eq!(at(i, 14_999), Some(found));
            assert_eq!(at(i, 15_001), None);
            assert_eq!(at(i, 4_999), None, "from the future");
        }
        assert_eq!(at(3, 10_000), None);
    }

    #[test]
    fn what_was_told_last_is_told_again_and_nothing_older() {
        let seen = Seen::new(8);
        let now = Timestamp(10_000);
        let at = |i: usize| version(seen.fresh(&name(i), now, AGE));
        seen.absent(&name(1), &absence(&name(1), now));
        seen.record(&record(1, 1, 7), now);
        assert_eq!(at(1), Some(1), "no longer absent");
        seen.record(&record(1, 2, 8), now);
        seen.record(&record(1, 1, 7), now.plus_ms(1));
        seen.absent(&name(1), &absence(&name(1), now.plus_ms(1)));
        assert_eq!(at(1), Some(2));
        assert_eq!(seen.least(&name(1)), Least { version: 2, since: Sequence(0) });
        // Written, and not read yet: the servers are asked.
        seen.version(&name(1), 3, Sequence(9));
        assert_eq!(at(1), None);
        assert_eq!(seen.least(&name(1)).version, 3);
        seen.record(&record(1, 3, 9), now);
        assert_eq!(at(1), Some(3));
        assert_eq!(seen.least_state(), Sequence(9));
        // It was refused in a state: nothing older is told afterwards, from memory least of all.
        seen.since(&name(1), Sequence(12));
        assert_eq!((at(1), seen.least_state()), (None, Sequence(12)));
        assert_eq!(seen.least(&name(1)), Least { version: 3, since: Sequence(12) });
        seen.since(&name(5), Sequence(11));
        assert_eq!(seen.least(&name(5)), Least { version: 0, since: Sequence(11) });
        seen.record(&record(5, 4, 9), now);
        assert_eq!(seen.least(&name(5)), Least { version: 4, since: Sequence(11) });
        seen.state(Sequence(20));
        assert_eq!(seen.least_state(), Sequence(20));
        let none = Seen::new(0);
        none.record(&record(1, 4, 1), now);
        assert_eq!(version(none.fresh(&name(1), now, AGE)), None);
        assert_eq!(none.least(&name(1)).version, 4);
    }

    #[test]
    fn it_is_bounded_by_use_and_forgets_no_promise() {
        let seen = Seen::new(LEAST_NAMES);
        let now = Timestamp(10_000);
        let nothing = absence(&name(0), now);
        seen.record(&record(0, 5, 5), now);
        seen.record(&record(1, 9, 77), now);
        for i in 2..10 * LEAST_NAMES {
            seen.record(&record(i, 1, 6), now);
            seen.absent(&name(1_000_000 + i), &nothing);
            assert_eq!(seen.least(&name(0)).version, 5, "used all the time, and first by the alphabet");
            let inside = seen.inside();
            assert!(inside.told.kept.len() <= LEAST_NAMES && inside.absent.kept.len() <= LEAST_NAMES);
        }
        // Forgotten, with everything that has not been used: what is told of it has its change all the same.
        let least = seen.least(&name(1));
        assert_eq!(least, Least { version: 0, since: Sequence(77) });
        // Names that do not exist push nothing out.
        let before = seen.inside().told.kept.len();
        (0..10 * LEAST_NAMES).for_each(|i| seen.absent(&name(2_000_000 + i), &nothing));
        assert_eq!(seen.inside().told.kept.len(), before);
    }
}
