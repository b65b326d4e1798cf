//! What is known of the names that connections are open to, kept fresh: one task for each name, however many
//! connections there are.

use crate::Client;
use crate::error::ClientError;
use quorum::Timestamp;
use quorum::record::{Name, Record};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

/// The shortest time between two lookups of one name.
const LEAST_PAUSE: Duration = Duration::from_millis(100);
/// Names that are remembered to have been let in.
const MOST_LET_IN: usize = 4_096;

/// Until when something may be relied on: by the machine's clock, and, since that can be set back, by one that cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Until {
    clock: Timestamp,
    steady: Instant,
}

impl Until {
    pub(super) fn new(clock: Timestamp) -> Self {
        Self { clock, steady: Instant::now() + Duration::from_millis(clock.since_ms(crate::now())) }
    }
    /// How long that is; nothing once it is over.
    pub(super) fn left(self) -> Duration {
        let by_clock = Duration::from_millis(self.clock.since_ms(crate::now()));
        by_clock.min(self.steady.saturating_duration_since(Instant::now()))
    }
}

/// A record, or that there is none, and until when that may be relied on: `max_age` after it was certified.
#[derive(Clone, Debug)]
pub(super) struct Sighting {
    pub(super) record: Option<Arc<Record>>,
    pub(super) until: Until,
}

impl Sighting {
    /// 0 if there is no record.
    fn version(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.version)
    }
    /// Of two, the newer one: by version first, since two states can be certified at the same time.
    fn age(&self) -> (u64, Instant) {
        (self.version(), self.until.steady)
    }
}

/// What is known now, and why no more is.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) sighting: Sighting,
    /// Why the last lookup failed, if it did.
    pub(super) failure: Option<Arc<ClientError>>,
}

/// One name's, for as long as somebody holds it.
pub(super) struct Standing {
    known: watch::Sender<Known>,
    task: Mutex<Option<AbortHandle>>,
}

impl Standing {
    pub(super) fn subscribe(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().unwrap_or_else(PoisonError::into_inner).take() {
            task.abort();
        }
    }
}

#[derive(Default)]
struct Inside {
    open: HashMap<Name, Weak<Standing>>,
    /// Names that were let in, when last, counted, and what was known of them.
    let_in: HashMap<Name, (u64, Sighting)>,
    count: u64,
}

/// All names that connections are open to.
pub(super) struct Standings {
    client: Client,
    inside: Arc<Mutex<Inside>>,
}

impl Standings {
    pub(super) fn new(client: Client) -> Self {
        Self { client, inside: Arc::default() }
    }
    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// What is known of a name that somebody is or was connected to, if it is still good.
    pub(super) fn current(&self, name: &Name) -> Option<Sighting> {
        let inside = self.inside();
        let open = inside.open.get(name).and_then(Weak::upgrade);
        let open = open.map(|standing| standing.known.borrow().sighting.clone());
        let last = inside.let_in.get(name).map(|(_, sighting)| sighting.clone());
        drop(inside);
        let newest = open.into_iter().chain(last).max_by_key(Sighting::age)?;
        // The same client may have told of a newer version meanwhile, by any of its calls.
        let told = self.client.inner.seen.least(name).version;
        (newest.version() >= told && !newest.until.left().is_zero()).then_some(newest)
    }
    /// Whether a name was let in, lately.
    pub(super) fn was_let_in(&self, name: &Name) -> bool {
        self.inside().let_in.contains_key(name)
    }
    /// Somebody of this name was let in: it is looked up again and again from now on.
    pub(super) fn join(&self, name: &Name, sighting: Sighting) -> Arc<Standing> {
        let mut inside = self.inside();
        inside.count += 1;
        let count = inside.count;
        inside.let_in.insert(name.clone(), (count, sighting.clone()));
        if inside.let_in.len() > MOST_LET_IN {
            inside.let_in.retain(|_, (when, _)| *when + (MOST_LET_IN as u64) / 2 > count);
        }
        if let Some(standing) = inside.open.get(name).and_then(Weak::upgrade) {
            standing.known.send_if_modified(|known| {
                let newer = known.sighting.age() < sighting.age();
                if newer {
                    *known = Known { sighting, failure: None };
                }
                newer
            });
            return standing;
        }
        let (known, _) = watch::channel(Known { sighting, failure: None });
        let standing = Arc::new(Standing { known, task: Mutex::default() });
        let inside_of = Arc::clone(&self.inside);
        let keep = keep_fresh(self.client.clone(), name.clone(), Arc::downgrade(&standing), inside_of);
        let task = tokio::spawn(keep).abort_handle();
        *standing.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        inside.open.retain(|_, open| open.strong_count() > 0);
        inside.open.insert(name.clone(), Arc::downgrade(&standing));
        standing
    }
}

/// Looks a name up again when half of the time is over that its last answer may be relied on.
async fn keep_fresh(client: Client, name: Name, standing: Weak<Standing>, inside: Arc<Mutex<Inside>>) {
    loop {
        let Some(until) = standing.upgrade().map(|standing| standing.known.borrow().sighting.until) else {
            return;
        };
        let left = until.left();
        sleep((left / 2).max(LEAST_PAUSE)).await;
        let most = left.max(LEAST_PAUSE * 10);
        let looked = timeout(most, Sighting::look(&client, &name)).await;
        let Some(standing) = standing.upgrade() else { return };
        // Whoever is let in later is judged by this, also when all connections are gone.
        if let Ok(Ok(sighting)) = &looked {
            let mut inside = inside.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, last)) = inside.let_in.get_mut(&name) {
                *last = sighting.clone();
            }
        }
        standing.known.send_modify(|known| match looked {
            Ok(Ok(sighting)) => *known = Known { sighting, failure: None },
            Ok(Err(error)) => known.failure = Some(Arc::new(error)),
            Err(_) => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::RegisteredPeers;
    use crate::{ClientError, Options};
    use quorum::Blob;
    use quorum::ids::Sequence;
    use quorum::record::{Change, Entry, KeyMaterial, Status};

    fn name() -> Name {
        Name::new("alice").unwrap()
    }
    /// Version 1 is active, later ones are revoked.
    fn record(version: u64, der: &[u8]) -> Record {
        let entry = Entry {
            keys: vec![KeyMaterial { algorithm: "x509".into(), key: Blob(der.to_vec()) }],
            owner: None,
            owner_only: false,
            not_before: None,
            not_after: None,
            metadata: std::collections::BTreeMap::new(),
        };
        let status = match version {
            1 => Status::Active,
            _ => Status::Revoked { reason: "stolen".into(), by: quorum::PublicKey([1; 32]) },
        };
        let updated = Change { sequence: Sequence(version), time: Timestamp(version) };
        Record { name: name(), version, status, entry, updated }
    }
    fn peers() -> (RegisteredPeers, Client, Vec<u8>) {
        let client = Client::new(crate::fixtures::cluster(), Options::default()).unwrap();
        let der = kds_certs::generate("alice", &["alice".into()], 2_026).unwrap().certificate;
        (RegisteredPeers::new(client.clone()), client, der)
    }
    fn sighting(version: u64, der: &[u8], ms: u64) -> Sighting {
        let until = Until::new(crate::now().plus_ms(ms));
        Sighting { record: Some(Arc::new(record(version, der))), until }
    }
    fn learn(standing: &Standing, sighting: Sighting) {
        standing.known.send_modify(|known| *known = Known { sighting, failure: None });
    }

    #[tokio::test]
    async fn a_revocation_that_any_call_has_told_counts() {
        let (peers, client, der) = peers();
        drop(peers.inner.standings.join(&name(), sighting(1, &der, 4_000)));
        assert!(peers.check(&name(), &der).await.is_ok());
        client.inner.seen.record(&record(2, &der), crate::now());
        assert!(peers.inner.standings.current(&name()).is_none(), "what is older than that counts no more");
    }

    #[tokio::test]
    async fn of_two_sightings_the_newer_version_counts_whatever_their_times() {
        let (peers, _, der) = peers();
        let standing = peers.inner.standings.join(&name(), sighting(1, &der, 5_000));
        learn(&standing, sighting(2, &der, 4_000));
        let checked = peers.check(&name(), &der).await;
        assert!(matches!(&checked, Err(ClientError::Unusable(_))), "{checked:?}");
    }

    /// The clock of the machine is put back by an hour while something is known for four seconds.
    #[tokio::test]
    async fn a_clock_that_is_put_back_makes_nothing_good_for_longer() {
        let until = Until {
            clock: crate::now().plus_ms(3_604_000),
            steady: Instant::now() + Duration::from_millis(4_000),
        };
        assert!(until.left() <= Duration::from_secs(4));
        let over = Until { steady: Instant::now(), ..until };
        assert!(over.left().is_zero());
    }

    /// The key was revoked while a handshake went on, and another connection's lookup knows it.
    #[tokio::test]
    async fn who_is_known_to_be_revoked_after_a_handshake_gets_no_connection() {
        let (peers, _, der) = peers();
        let before = sighting(1, &der, 4_000);
        let standing = peers.inner.standings.join(&name(), before.clone());
        learn(&standing, sighting(2, &der, 5_000));
        let (ours, _theirs) = tokio::io::duplex(64);
        assert!(peers.hold(ours, &name(), &der, before).is_err());
    }
}
