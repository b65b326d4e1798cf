//! Following a name: every version, in order, as it becomes visible.

use crate::api::WatchMessage;
use crate::client::Client;
use crate::deadline::millis;
use crate::error::{ClientError, LinkError};
use crate::link::{Events, segment};
use crate::lookup::LookupOptions;
use quorum::answer::Verifier;
use quorum::ids::{ServerId, Timestamp};
use quorum::record::{Name, Record};
use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// How long a server may be silent on a stream: it says at least every two seconds that it is there.
const SILENCE: Duration = Duration::from_secs(6);
/// How long to wait before another server is tried, when one failed; twice as long after each that fails too.
const PAUSE: Duration = Duration::from_millis(200);
/// How often that doubles.
const DOUBLES: u32 = 5;

/// What a watch tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// There is no such name, yet: proved. Comes first, or not at all.
    Absent,
    /// A version. Versions come in order, each once, none left out.
    Version(Box<Record>),
}

/// What looking at a name led to.
#[derive(Default)]
struct Looked {
    /// Versions that were not told yet, in order.
    versions: Vec<Record>,
    /// There is no such name.
    absent: bool,
    /// A whole row said so, and not a stream.
    by_row: bool,
}

type Looking = Pin<Box<dyn Future<Output = Result<Looked, ClientError>> + Send>>;

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
    /// Streams that were left since one told anything.
    left: u32,
    /// What is under way: a call that is dropped does not begin it again.
    looking: Option<Looking>,
    connecting: Option<Connecting>,
    look_at: Instant,
    connect_at: Instant,
}

type Connecting = Pin<Box<dyn Future<Output = (ServerId, Result<Events, LinkError>)> + Send>>;

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
            left: 0,
            looking: None,
            connecting: None,
            look_at: now,
            connect_at: now,
        }
    }

    /// A record that was found, and the versions after `told` that come before it.
    async fn newer(&self, told: u64, record: Record) -> Result<Vec<Record>, ClientError> {
        match record.version {
            version if version <= told => Ok(vec![]),
            version if version == told + 1 => Ok(vec![record]),
            version => self.history_from(&record.name, told + 1, version).await,
        }
    }
    /// What a whole row says of a name.
    async fn look(self, name: Name, told: u64) -> Result<Looked, ClientError> {
        let found = self.lookup(&name, &LookupOptions::default()).await?;
        let absent = found.record.is_none();
        let versions = match found.record {
            Some(record) => self.newer(told, record).await?,
            None => vec![],
        };
        Ok(Looked { versions, absent, by_row: true })
    }
    /// What a single server showed first is to be visible to everyone before it is told.
    async fn look_at_streamed(
        self,
        told: u64,
        record: Record,
        certified: Timestamp,
    ) -> Result<Looked, ClientError> {
        if !self.complete_through(record.updated.sequence).await {
            return Ok(Looked::default());
        }
        self.inner.seen.record(&record, certified);
        Ok(Looked { versions: self.newer(told, record).await?, ..Looked::default() })
    }
    async fn connect_to(self, server: ServerId, path: String) -> (ServerId, Result<Events, LinkError>) {
        let link = self.inner.links[server.index()].clone();
        let connected = timeout(SILENCE, link.events(&path)).await;
        (server, connected.unwrap_or_else(|_| Err(LinkError::late(SILENCE))))
    }
}

impl Watch {
    /// The next event; waits for it. Cancel-safe: nothing is lost if the call is dropped, and what it was about
    /// goes on with the next one.
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
            if let Some(looking) = &mut self.looking {
                let looked = looking.await;
                self.looking = None;
                self.looked(looked?);
                continue;
            }
            if Instant::now() >= self.look_at {
                self.look_at = Instant::now() + self.client.inner.options.max_age / 2;
                let look = self.client.clone().look(self.name.clone(), self.told);
                self.looking = Some(Box::pin(look));
                continue;
            }
            let Some((server, events)) = &mut self.stream else {
                self.connect().await;
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
                Ok(message) => self.take(server, &message),
                Err(_) => self.leave(server),
            }
        }
    }

    /// On to another server.
    fn leave(&mut self, server: ServerId) {
        self.client.inner.pace.avoid(server);
        self.stream = None;
        self.connect_at = Instant::now() + PAUSE * 2_u32.pow(self.left);
        self.left = (self.left + 1).min(DOUBLES);
    }

    /// Until there is a stream, or it is time to look.
    async fn connect(&mut self) {
        if self.connecting.is_none() {
            sleep_until(self.connect_at.min(self.look_at)).await;
            if Instant::now() < self.connect_at {
                return;
            }
        }
        let connecting = self.connecting.get_or_insert_with(|| {
            let path = format!("/v1/records/{}/watch", segment(&self.name));
            Box::pin(self.client.clone().connect_to(self.client.preferred()[0], path))
        });
        let (server, connected) = tokio::select! {
            connected = connecting => connected,
            () = sleep_until(self.look_at) => return,
        };
        self.connecting = None;
        match connected {
            Ok(events) => (self.stream, self.streamed) = (Some((server, events)), None),
            // Others are asked before it meanwhile.
            Err(LinkError::AsksToWait { .. }) => self.connect_at = Instant::now() + PAUSE,
            Err(_) => self.leave(server),
        }
    }

    fn take(&mut self, server: ServerId, message: &WatchMessage) {
        let max_age_ms = millis(self.client.inner.options.max_age);
        let checked = self.client.with_verifier(|verifier| {
            let record = verifier.record(&message.answer, &self.name, None)?.there();
            Verifier::fresh(&message.answer.certificate.statement, crate::now(), max_age_ms)?;
            Ok::<_, LinkError>(record)
        });
        let version = checked.as_ref().ok().map(|record| record.as_ref().map_or(0, |record| record.version));
        if self.streamed >= version {
            // An honest server has something to tell only if there is something newer.
            self.leave(server);
            return;
        }
        self.streamed = version;
        match checked {
            Ok(Some(record)) if record.version > self.told => {
                self.left = 0;
                let certified = message.answer.certificate.statement.time;
                let look = self.client.clone().look_at_streamed(self.told, record, certified);
                self.looking = Some(Box::pin(look));
            }
            Ok(_) => {}
            Err(_) => self.leave(server),
        }
    }

    fn looked(&mut self, looked: Looked) {
        let Looked { versions, absent, by_row } = looked;
        // The stream had its time to tell.
        if let (true, true, false, Some((server, _))) =
            (self.begun, by_row, versions.is_empty(), &self.stream)
        {
            self.leave(*server);
        }
        if absent && !self.begun && self.told == 0 {
            self.ready.push_back(WatchEvent::Absent);
        }
        self.ready.extend(versions.into_iter().map(|record| WatchEvent::Version(Box::new(record))));
    }
}
