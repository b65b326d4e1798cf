//! Following a name: every version, in order, as it becomes visible.

use crate::api::WatchMessage;
use crate::client::Client;
use crate::error::{ClientError, LinkError};
use crate::link::{Events, segment};
use crate::lookup::LookupOptions;
use quorum::answer::Verifier;
use quorum::ids::ServerId;
use quorum::record::{Name, Record};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a server may be silent on a stream: it says at least every two seconds that it is there.
const SILENCE: Duration = Duration::from_secs(6);
/// How long to wait before another server is tried, when one failed.
const PAUSE: Duration = Duration::from_millis(200);

/// What a watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// There is no such name, yet: proved. Comes first, or not at all.
    Absent,
    /// A version. Versions come in order, each once, none left out.
    Version(Box<Record>),
}

/// A name that is followed. Reconnects to other servers by itself and misses nothing: versions are
/// numbered, and those in between are fetched from the name's history.
///
/// One server streams changes as they are certified. Since it could keep one to itself, the name
/// is also looked up by a whole row, every half `max_age`: so a change is told at once by honest servers, and in
/// spite of a lying one after that time at most, with the guarantees of a row lookup.
pub struct Watch {
    client: Client,
    name: Name,
    /// The newest version that was told.
    told: u64,
    /// Whether anything was told.
    begun: bool,
    ready: VecDeque<WatchEvent>,
    stream: Option<(ServerId, Events)>,
    /// The version that the stream showed last.
    streamed: Option<u64>,
    look_at: Instant,
    connect_at: Instant,
}

impl Client {
    /// Follows a name from its version after `since` on; from its first one if that is 0.
    pub fn watch(&self, name: &Name, since: u64) -> Watch {
        let now = Instant::now();
        Watch {
            client: self.clone(),
            name: name.clone(),
            told: since,
            begun: false,
            ready: VecDeque::new(),
            stream: None,
            streamed: None,
            look_at: now,
            connect_at: now,
        }
    }
}

impl Watch {
    /// The next event; waits for it. Cancel-safe: nothing is lost if the call is dropped.
    ///
    /// # Errors
    /// As [`Client::lookup`], while the name cannot be looked up; the watch can be asked again, and goes on
    /// where it was.
    pub async fn next(&mut self) -> Result<WatchEvent, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.begun = true;
                if let WatchEvent::Version(record) = &event {
                    self.told = record.version;
                }
                return Ok(event);
            }
            if Instant::now() >= self.look_at {
                self.look().await?;
                continue;
            }
            let Some((server, events)) = &mut self.stream else {
                sleep_until(self.connect_at.min(self.look_at)).await;
                if Instant::now() >= self.connect_at {
                    self.connect().await;
                }
                continue;
            };
            let server = *server;
            if events.silence() > SILENCE {
                self.leave(server);
                continue;
            }
            let message = tokio::select! {
                message = events.next() => message,
                () = sleep_until(self.look_at) => continue,
            };
            match message {
                Ok(message) => self.take(server, &message).await?,
                Err(_) => self.leave(server),
            }
        }
    }

    /// On to another server.
    fn leave(&mut self, server: ServerId) {
        self.client.inner.pace.avoid(server);
        self.stream = None;
        self.connect_at = Instant::now() + PAUSE;
    }

    async fn connect(&mut self) {
        let server = self.client.preferred()[0];
        let link = self.client.inner.links[server.index()].clone();
        let path = format!("/v1/records/{}/watch", segment(&self.name));
        match timeout(SILENCE, link.events(&path)).await {
            Ok(Ok(events)) => (self.stream, self.streamed) = (Some((server, events)), None),
            // Others are asked before it meanwhile.
            Ok(Err(LinkError::AsksToWait { .. })) => self.connect_at = Instant::now() + PAUSE,
            Ok(Err(_)) | Err(_) => self.leave(server),
        }
    }

    async fn take(&mut self, server: ServerId, message: &WatchMessage) -> Result<(), ClientError> {
        let max_age_ms = self.client.inner.options.max_age.as_millis() as u64;
        let checked = self.client.with_verifier(|verifier| {
            let record = verifier.record(&message.answer, &self.name, None)?.there();
            Verifier::fresh(&message.answer.certificate.statement, crate::now(), max_age_ms)?;
            Ok::<_, LinkError>(record)
        });
        let version = checked.as_ref().ok().map(|record| record.as_ref().map_or(0, |record| record.version));
        if self.streamed >= version {
            // An honest server has something to tell only if there is something newer.
            self.leave(server);
            return Ok(());
        }
        self.streamed = version;
        match checked {
            // What a single server shows first is to be visible to everyone before it is told.
            Ok(Some(record)) if record.version > self.told => {
                if self.client.complete_through(record.updated.sequence).await {
                    self.client.inner.seen.record(&record, message.answer.certificate.statement.time);
                    self.tell(record).await?;
                }
            }
            Ok(_) => {}
            Err(_) => self.leave(server),
        }
        Ok(())
    }

    /// What a whole row says.
    async fn look(&mut self) -> Result<(), ClientError> {
        self.look_at = Instant::now() + self.client.inner.options.max_age / 2;
        let found = self.client.lookup(&self.name, &LookupOptions::default()).await?;
        match found.record {
            Some(record) if record.version > self.told => {
                // The stream had its time to tell.
                if self.begun
                    && let Some((server, _)) = self.stream
                {
                    self.leave(server);
                }
                self.tell(record).await?;
            }
            None if !self.begun && self.told == 0 => self.ready.push_back(WatchEvent::Absent),
            _ => {}
        }
        Ok(())
    }

    /// Queues a version, and those before it that were not told.
    async fn tell(&mut self, record: Record) -> Result<(), ClientError> {
        let first = self.told + 1;
        let versions = match record.version == first {
            true => vec![record],
            false => self.client.history_from(&self.name, first, record.version).await?,
        };
        self.ready.extend(versions.into_iter().map(|record| WatchEvent::Version(Box::new(record))));
        Ok(())
    }
}
