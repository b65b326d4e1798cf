//! What a client trusts, and whom it reaches: the manifest, and the changes of the membership since.
//!
//! Servers say with every answer how many changes they know. Where that is more than the client does, it
//! asks the same server for what shows them before it looks at the answer. Nobody is believed: a change
//! counts with its proof, and one that a server keeps to itself is shown by the others. Where a server cannot
//! be connected to, the others are asked whether it has another place by now.

use crate::api::MembershipAnswer;
use crate::link::Wire;
use quorum::answer::Verifier;
use quorum::ids::ServerId;
use quorum::manifest::{Manifest, ServerEntry};
use quorum::membership::{Membership, MembershipError};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// For how long a server is not asked again whose changes did not hold, or did not come.
const DISTRUST: Duration = Duration::from_secs(2);
/// How often the others are asked at most whether a server that cannot be reached has another place.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// How long they may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Shared by the links and the client that they belong to.
pub(crate) struct Trust {
    verifier: Mutex<Verifier>,
    /// Changes that the verifier has followed.
    known: AtomicUsize,
    places: Vec<Place>,
    /// When the others were asked last; held while they are.
    looked: tokio::sync::Mutex<Option<Instant>>,
}

/// A server, where it is now.
struct Place {
    reached: RwLock<(ServerEntry, Wire)>,
    /// Until when it is not asked for changes; held while it is.
    distrusted: tokio::sync::Mutex<Option<Instant>>,
}

impl Trust {
    /// Trusts the manifest.
    pub(crate) fn new(manifest: &Arc<Manifest>) -> Result<Arc<Self>, String> {
        let place = |entry: &ServerEntry| {
            let reached = RwLock::new((entry.clone(), Wire::to(entry)?));
            Ok(Place { reached, distrusted: tokio::sync::Mutex::default() })
        };
        let places = manifest.servers.iter().map(place).collect::<Result<_, String>>()?;
        let verifier = Mutex::new(Verifier::new(Arc::clone(manifest)));
        let looked = tokio::sync::Mutex::default();
        Ok(Arc::new(Self { verifier, known: AtomicUsize::new(0), places, looked }))
    }
    pub(crate) fn verifier(&self) -> MutexGuard<'_, Verifier> {
        // A panic while it was held cannot leave it half-changed in a way that accepts more.
        self.verifier.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub(crate) fn membership(&self) -> Arc<Membership> {
        Arc::clone(self.verifier().membership())
    }
    /// How a server is reached now.
    pub(crate) fn wire(&self, server: ServerId) -> Option<Wire> {
        let place = self.places.get(server.index())?;
        Some(place.reached.read().unwrap_or_else(PoisonError::into_inner).1.clone())
    }

    /// Asks a server for changes that are not known here, if it says that there are some.
    pub(crate) async fn follow(&self, server: ServerId, says: usize) {
        let Some(place) = self.places.get(server.index()) else { return };
        if says <= self.known.load(Ordering::Acquire) {
            return;
        }
        let mut distrusted = place.distrusted.lock().await;
        if distrusted.is_some_and(|until| Instant::now() < until) {
            return;
        }
        while self.known.load(Ordering::Acquire) < says {
            let known = self.known.load(Ordering::Acquire);
            let Some(wire) = self.wire(server) else { return };
            let answer = wire.json::<MembershipAnswer>(&format!("/v1/membership?from={known}")).await;
            let followed = answer.map(|answer| self.take(&answer));
            if !matches!(followed, Ok(Ok(more)) if more > known) {
                *distrusted = Some(Instant::now() + DISTRUST);
                return;
            }
        }
    }

    /// Where a server is now that could not be connected to, if others show that it is elsewhere. Of f+1 that
    /// answer one is honest.
    pub(crate) async fn look_for(self: &Arc<Self>, server: ServerId, before: &Wire) -> Option<Wire> {
        let mut looked = self.looked.lock().await;
        let moved = || self.wire(server).filter(|wire| !wire.is_same(before));
        if moved().is_some() || looked.is_some_and(|when| when.elapsed() < LOOK_INTERVAL) {
            return moved();
        }
        let manifest = Arc::clone(self.membership().manifest());
        let mut asked = JoinSet::new();
        for other in manifest.grid().servers().filter(|other| *other != server) {
            let trust = Arc::clone(self);
            asked.spawn(async move {
                let known = trust.known.load(Ordering::Acquire);
                let wire = trust.wire(other)?;
                let answer = wire.json::<MembershipAnswer>(&format!("/v1/membership?from={known}")).await;
                trust.take(&answer.ok()?).ok()
            });
        }
        let mut answers = 0;
        let enough = async {
            while let Some(answer) = asked.join_next().await {
                answers += usize::from(matches!(answer, Ok(Some(_))));
                if answers > manifest.thresholds.f() {
                    break;
                }
            }
        };
        let _ = tokio::time::timeout(LOOK_TIMEOUT, enough).await;
        *looked = Some(Instant::now());
        moved()
    }

    /// Follows changes that somebody shows; says how many are known then.
    pub(crate) fn take(&self, answer: &MembershipAnswer) -> Result<usize, MembershipError> {
        let mut verifier = self.verifier();
        verifier.follow(&answer.changes)?;
        let membership = Arc::clone(verifier.membership());
        for (place, server) in self.places.iter().zip(membership.manifest().grid().servers()) {
            let mut reached = place.reached.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(entry) = membership.place(server).filter(|entry| *entry != reached.0)
                && let Ok(wire) = Wire::to(&entry)
            {
                *reached = (entry, wire);
            }
        }
        let known = membership.proofs().len();
        self.known.store(known, Ordering::Release);
        Ok(known)
    }
}
