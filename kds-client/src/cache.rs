//! Lookups from memory, and one read for all who wait for the same name.

use crate::client::Client;
use crate::error::ClientError;
use crate::lookup::{LookupOptions, shown};
use quorum::answer::Shown;
use quorum::record::{Name, Record};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

type Answer = Result<Shown<Arc<Record>>, ClientError>;

/// What came of a read, once it has ended.
type Landed = watch::Receiver<Option<Answer>>;

/// Reads that are under way for [`Client::lookup_cached`], by name: whoever asks for one of these names waits for
/// the same answer, and no longer than she wants to.
#[derive(Default)]
pub(crate) struct Flights {
    under_way: Mutex<HashMap<Name, (Landed, Instant)>>,
}

/// One that does the read.
struct Flight<'a> {
    flights: &'a Flights,
    name: Name,
    land: watch::Sender<Option<Answer>>,
}

/// Her place in a read.
enum Place<'a> {
    Leader(Flight<'a>),
    /// And when the leader gives up.
    Passenger(Landed, Instant),
}

impl Flights {
    fn under_way(&self) -> MutexGuard<'_, HashMap<Name, (Landed, Instant)>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn join(&self, name: &Name, until: Instant) -> Place<'_> {
        let mut under_way = self.under_way();
        if let Some((landed, leaders)) = under_way.get(name) {
            return Place::Passenger(landed.clone(), *leaders);
        }
        let (land, landed) = watch::channel(None);
        under_way.insert(name.clone(), (landed, until));
        Place::Leader(Flight { flights: self, name: name.clone(), land })
    }
}

impl Flight<'_> {
    fn land(self, answer: &Answer) {
        // Whoever comes from now on begins a read of her own.
        self.flights.under_way().remove(&self.name);
        self.land.send_replace(Some(answer.clone()));
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // Given up before it ended, its passengers see that the sender is gone. After it landed another one may
        // be under way.
        let mut under_way = self.flights.under_way();
        if under_way.get(&self.name).is_some_and(|(landed, _)| landed.same_channel(&self.land.subscribe())) {
            under_way.remove(&self.name);
        }
    }
}

impl Client {
    /// Looks a name up, in memory if an answer is there whose certificate is not older than `max_age`, by whichever
    /// call it was told; so it is never older than that, a revocation is seen at the latest then, and a change by
    /// others perhaps not at once. Lookups of one name that have to ask the servers share one read, and each waits
    /// for it no longer than its own timeout. None if absence was proved.
    ///
    /// # Errors
    /// As [`Client::lookup`]; an answer that is too old is never given instead.
    pub async fn lookup_cached(&self, name: &Name) -> Result<Option<Arc<Record>>, ClientError> {
        Ok(self.shown_cached(name).await?.there())
    }
    /// The same, with the absence if that was proved.
    pub(crate) async fn shown_cached(&self, name: &Name) -> Answer {
        let client = self.begun();
        let deadline = client.deadline();
        loop {
            if let Some(shown) = client.cached(name) {
                return Ok(shown);
            }
            let (mut landed, leaders) = match client.inner.flights.join(name, deadline) {
                Place::Leader(flight) => {
                    let answer = client.read_through(name).await;
                    flight.land(&answer);
                    return answer;
                }
                Place::Passenger(landed, leaders) => (landed, leaders),
            };
            let answer = match timeout_at(deadline, landed.wait_for(Option::is_some)).await {
                Err(_) => return Err(client.in_vain(&format!("an answer about {name}, which is awaited"))),
                // Its leader gave up: somebody else has to lead.
                Ok(Err(_)) => continue,
                Ok(Ok(answer)) => answer.clone(),
            };
            match answer {
                // More may have been told meanwhile.
                Some(Ok(shown))
                    if shown.as_ref().there().map_or(0, |record| record.version)
                        >= client.inner.seen.least(name).version =>
                {
                    return Ok(shown);
                }
                // The leader had less time.
                Some(Err(ClientError::Unavailable { .. })) if leaders < deadline => {}
                Some(Err(error)) => return Err(error),
                Some(Ok(_)) | None => {}
            }
        }
    }
    async fn read_through(&self, name: &Name) -> Answer {
        let found = self.lookup(name, &LookupOptions::default()).await?;
        // As it was kept just now, so that all share one.
        let read = shown(found)?.map(Arc::new);
        Ok(self.cached(name).unwrap_or(read))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn name() -> Name {
        Name::new("alice").unwrap()
    }
    fn later(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[tokio::test]
    async fn one_read_serves_all_who_wait() {
        let flights = Flights::default();
        let Place::Leader(flight) = flights.join(&name(), later(1)) else { panic!("nobody reads") };
        let mut passengers = Vec::new();
        for _ in 0..3 {
            let Place::Passenger(landed, leaders) = flights.join(&name(), later(9)) else {
                panic!("one reads")
            };
            assert!(leaders < later(2));
            passengers.push(landed);
        }
        let error = ClientError::from(crate::fixtures::absence(&name(), crate::now()));
        flight.land(&Err(error));
        for mut landed in passengers {
            let answer = landed.wait_for(Option::is_some).await.unwrap().clone();
            assert!(matches!(answer, Some(Err(ClientError::NotFound(_)))));
        }
        // What is asked from now on is read anew.
        assert!(matches!(flights.join(&name(), later(1)), Place::Leader(_)));
        assert!(flights.under_way().is_empty());
    }

    #[tokio::test]
    async fn a_read_that_is_given_up_strands_nobody() {
        let flights = Flights::default();
        let Place::Leader(flight) = flights.join(&name(), later(1)) else { panic!("nobody reads") };
        let Place::Passenger(mut landed, _) = flights.join(&name(), later(1)) else { panic!("one reads") };
        drop(flight);
        assert!(landed.wait_for(Option::is_some).await.is_err());
        let Place::Leader(next) = flights.join(&name(), later(1)) else { panic!("nobody reads") };
        assert!(matches!(flights.join(&name(), later(1)), Place::Passenger(..)));
        let absence = crate::fixtures::absence(&name(), crate::now());
        next.land(&Ok(Shown::Absent(absence)));
        assert!(flights.under_way().is_empty(), "nothing is left");
    }
}
