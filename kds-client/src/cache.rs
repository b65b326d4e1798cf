//! Answers that are kept for a while: bounded in number, and in age by their certificates.

use crate::client::Client;
use crate::error::ClientError;
use crate::lookup::LookupOptions;
use quorum::ids::Timestamp;
use quorum::record::{Name, Record};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One name's place. Whoever finds it stale renews it while the others wait: one read for all of them.
type Place = Arc<tokio::sync::Mutex<()>>;

/// A record as it was certified at a time.
#[derive(Clone)]
struct Kept {
    record: Option<Arc<Record>>,
    certified: Timestamp,
    /// Rises with every use, to tell what was not used for long.
    used: u64,
}

#[derive(Default)]
struct Inside {
    kept: HashMap<Name, Kept>,
    renewing: HashMap<Name, Place>,
    uses: u64,
}

pub(crate) struct Cache {
    most: usize,
    inside: Mutex<Inside>,
}

impl Cache {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, inside: Mutex::default() }
    }
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The answer for a name, if its certificate is not older than `max_age_ms`, and its version not older than
    /// what the client has seen.
    fn fresh(&self, name: &Name, now: Timestamp, max_age_ms: u64, seen: u64) -> Option<Option<Arc<Record>>> {
        let mut inside = self.inside();
        inside.uses += 1;
        let uses = inside.uses;
        let kept = inside.kept.get_mut(name)?;
        // By this machine's clock, as everywhere. A clock that was put back makes nothing fresh.
        if kept.certified.plus_ms(max_age_ms) < now || kept.certified > now.plus_ms(max_age_ms) {
            return None;
        }
        if kept.record.as_ref().map_or(0, |record| record.version) < seen {
            return None;
        }
        kept.used = uses;
        Some(kept.record.clone())
    }
    fn seat(&self, name: &Name) -> Seat<'_> {
        let place = Arc::clone(self.inside().renewing.entry(name.clone()).or_default());
        Seat { cache: self, name: name.clone(), place }
    }
    fn keep(&self, name: &Name, record: Option<Arc<Record>>, certified: Timestamp) {
        if self.most == 0 {
            return;
        }
        let mut inside = self.inside();
        inside.uses += 1;
        let used = inside.uses;
        if inside.kept.len() >= self.most && !inside.kept.contains_key(name) {
            // What was not used for long goes, an eighth at a time.
            let mut uses: Vec<u64> = inside.kept.values().map(|kept| kept.used).collect();
            let place = uses.len() / 8;
            let oldest = uses.select_nth_unstable(place).1;
            let oldest = *oldest;
            inside.kept.retain(|_, kept| kept.used > oldest);
        }
        inside.kept.insert(name.clone(), Kept { record, certified, used });
    }
}

/// Somebody who renews a name's answer, or waits for that.
struct Seat<'a> {
    cache: &'a Cache,
    name: Name,
    place: Place,
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        let mut inside = self.cache.inside();
        // The map's and this one: nobody else waits.
        if Arc::strong_count(&self.place) <= 2 {
            inside.renewing.remove(&self.name);
        }
    }
}

impl Client {
    /// Looks a name up, in memory if an answer is there whose certificate is not older than `max_age`; so it
    /// is never older than that, a revocation is seen at the latest then, and a change by others perhaps
    /// not at once. Lookups of one name that have to ask the servers share one read. None if absence was
    /// proved.
    ///
    /// # Errors
    /// As [`Client::lookup`]; an answer that is too old is never given instead.
    pub async fn lookup_cached(&self, name: &Name) -> Result<Option<Arc<Record>>, ClientError> {
        if let Some(record) = self.cached(name) {
            return Ok(record);
        }
        let seat = self.inner.cache.seat(name);
        let _renewing = seat.place.lock().await;
        // Somebody else may have renewed it meanwhile.
        match self.cached(name) {
            Some(record) => Ok(record),
            None => self.renew(name).await,
        }
    }
    async fn renew(&self, name: &Name) -> Result<Option<Arc<Record>>, ClientError> {
        let found = self.lookup(name, &LookupOptions::default()).await?;
        let record = found.record.map(Arc::new);
        self.inner.cache.keep(name, record.clone(), found.answer.certificate.statement.time);
        Ok(record)
    }
    /// The answer in memory, if it is still good; for callers that cannot wait.
    pub(crate) fn cached(&self, name: &Name) -> Option<Option<Arc<Record>>> {
        let max_age_ms = self.inner.options.max_age.as_millis() as u64;
        self.inner.cache.fresh(name, crate::now(), max_age_ms, self.seen(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(i: usize) -> Name {
        Name::new(format!("name-{i}")).unwrap()
    }

    #[test]
    fn nothing_is_served_beyond_its_age() {
        let cache = Cache::new(8);
        cache.keep(&name(1), None, Timestamp(10_000));
        assert!(cache.fresh(&name(1), Timestamp(14_999), 5_000, 0).is_some());
        assert!(cache.fresh(&name(1), Timestamp(15_001), 5_000, 0).is_none());
        assert!(cache.fresh(&name(1), Timestamp(4_999), 5_000, 0).is_none(), "from the future");
        assert!(cache.fresh(&name(1), Timestamp(14_999), 5_000, 1).is_none(), "less than was seen");
        assert!(cache.fresh(&name(2), Timestamp(10_000), 5_000, 0).is_none());
    }

    #[test]
    fn it_stays_bounded_and_keeps_what_is_used() {
        let cache = Cache::new(64);
        for i in 0..1_000 {
            cache.keep(&name(i), None, Timestamp(10_000));
            assert!(cache.fresh(&name(0), Timestamp(10_000), 5_000, 0).is_some(), "used all the time");
            assert!(cache.inside().kept.len() <= 64);
        }
        let none = Cache::new(0);
        none.keep(&name(1), None, Timestamp(10_000));
        assert!(none.inside().kept.is_empty());
    }
}
