//! Who is at a port for clients, by address: connections, watches, and bytes of answers that nobody has read (and of
//! requests that have not come to their end).
//!
//! One address gets a part of all. Whoever comes when everything is taken is given the place of the one that has been
//! there longest, of the address that has most ([`Places`]): so nobody keeps others out. What that costs somebody is
//! counted in `kds_http_turned_away_total`, and logged seldom.

use super::limits::Limits;
use super::pieces::{Counted, UNCOUNTED_BYTES};
use super::problem::ApiError;
use super::rate::RateLimits;
use crate::places::{Place, Places};
use crate::seldom;
use axum::body::{Body, HttpBody as _};
use axum::response::Response;
use kds_client::api::ProblemKind;
use std::net::IpAddr;
use std::sync::Arc;
use tokio::sync::Notify;

/// Places at the port for health and metrics.
const AT_THE_HEALTH_PORT: usize = 32;

/// What somebody is turned away for.
pub(super) struct TurnedAway {
    what: &'static str,
    how: &'static str,
    says: &'static str,
}

pub(super) const HANDSHAKE_CUT: TurnedAway = TurnedAway {
    what: "handshake",
    how: "cut",
    says: "too many handshakes at a time with clients: cut off the oldest of the address that has most",
};
pub(super) const HANDSHAKE_SLOW: TurnedAway =
    TurnedAway { what: "handshake", how: "slow", says: "a client's handshake takes too long: cut it off" };
pub(super) const CONNECTION_REFUSED: TurnedAway = TurnedAway {
    what: "connection",
    how: "refused",
    says: "too many connections from this address: refused one (`connections_per_address` in config.toml)",
};
pub(super) const CONNECTION_CUT: TurnedAway = TurnedAway {
    what: "connection",
    how: "cut",
    says: "all places for clients are taken: cut off the oldest connection of the address that has most (`connections` in config.toml)",
};
pub(super) const READER_SLOW: TurnedAway =
    TurnedAway { what: "answer", how: "slow", says: "a client does not read its answer: cut it off" };
const WATCH_REFUSED: TurnedAway = TurnedAway {
    what: "watch",
    how: "refused",
    says: "too many watches from this address: refused one (`watches_per_address` in config.toml)",
};
const WATCH_CUT: TurnedAway = TurnedAway {
    what: "watch",
    how: "cut",
    says: "all places for watches are taken: cut off the oldest of the address that has most (`watches` in config.toml)",
};
const ANSWER_REFUSED: TurnedAway = TurnedAway {
    what: "answer",
    how: "refused",
    says: "too much is on its way to or from this address: refused one (`unread_mib_per_address` in config.toml)",
};
const ANSWER_CUT: TurnedAway = TurnedAway {
    what: "answer",
    how: "cut",
    says: "too much is on its way to clients: cut off the oldest of the address that has most (`unread_mib` in config.toml)",
};

impl TurnedAway {
    /// Counts it, and says so now and then.
    pub(super) fn note(&self, address: Option<IpAddr>) {
        metrics::counter!("kds_http_turned_away_total", "what" => self.what, "how" => self.how).increment(1);
        if let Some(unsaid) = seldom::now(self.says, None) {
            let address = address.map(tracing::field::display);
            tracing::warn!(address, unsaid, "{}", self.says);
        }
    }
}

/// See the module.
pub(super) struct Guests {
    rates: RateLimits,
    pub(super) handshakes: Arc<Places<IpAddr>>,
    pub(super) connections: Arc<Places<IpAddr>>,
    watches: Arc<Places<IpAddr>>,
    unread: Arc<Places<IpAddr>>,
}

impl Guests {
    pub(super) fn new(limits: &Limits) -> Arc<Self> {
        Arc::new(Self {
            rates: RateLimits::new(limits.requests_per_second),
            handshakes: Places::new(limits.handshakes()),
            connections: limits.connections.places(),
            watches: limits.watches.places(),
            unread: limits.unread_bytes.places(),
        })
    }
    /// At the port where nothing but health and metrics is told.
    pub(super) fn at_the_health_port() -> Arc<Self> {
        let places = || Places::new(AT_THE_HEALTH_PORT);
        let (handshakes, connections, watches) = (places(), places(), places());
        let unread = Places::new(AT_THE_HEALTH_PORT * UNCOUNTED_BYTES);
        Arc::new(Self { rates: RateLimits::new(0), handshakes, connections, watches, unread })
    }
    /// Forgets what need not be remembered. Called now and then.
    pub(super) fn tidy(&self) {
        self.rates.tidy();
    }
    /// Tells the metrics how many there are.
    pub(super) fn measure(&self) {
        metrics::gauge!("kds_http_connections").set(self.connections.amount() as f64);
        metrics::gauge!("kds_http_watches").set(self.watches.amount() as f64);
        metrics::gauge!("kds_http_unread_bytes").set(self.unread.amount() as f64);
    }
}

/// Where a request comes from, and what it may still ask for.
#[derive(Clone)]
pub(super) struct Caller(Arc<Guest>);

struct Guest {
    address: IpAddr,
    guests: Arc<Guests>,
    /// Ends its connection.
    cut: Arc<Notify>,
    /// It is one of too many from its address.
    is_surplus: bool,
}

impl Caller {
    pub(super) fn new(guests: &Arc<Guests>, address: IpAddr, cut: &Arc<Notify>, is_surplus: bool) -> Self {
        Self(Arc::new(Guest { address, guests: Arc::clone(guests), cut: Arc::clone(cut), is_surplus }))
    }
    /// Charges for so many lookups.
    pub(super) fn charge(&self, lookups: u32) -> Result<(), ApiError> {
        self.0.guests.rates.charge(self.0.address, lookups)
    }
    /// An error if this connection is one of too many.
    pub(super) fn has_a_place(&self) -> Result<(), ApiError> {
        if !self.0.is_surplus {
            return Ok(());
        }
        let most = self.0.guests.connections.most_each();
        let detail = format!(
            "too many connections from this address: {most} are open, which is `connections_per_address` in config.toml; \
             close some, or try another server"
        );
        Err(ApiError::new(ProblemKind::TooMany, detail))
    }
    /// An error if this address leaves too much unread, before more is made for it.
    pub(super) fn reads(&self) -> Result<(), ApiError> {
        if !self.0.guests.unread.is_full_for(&self.0.address) {
            return Ok(());
        }
        ANSWER_REFUSED.note(Some(self.0.address));
        Err(self.reads_too_little())
    }
    fn reads_too_little(&self) -> ApiError {
        let mib = self.0.guests.unread.most_each() >> 20;
        let detail = format!(
            "{mib} MiB of answers to this address, or of requests from it, are on their way, which is `unread_mib_per_address` in config.toml; \
             read on, or try another server"
        );
        ApiError::new(ProblemKind::TooMany, detail)
    }
    /// A place for a watch.
    pub(super) fn watch(&self) -> Result<Place<IpAddr>, ApiError> {
        let Some((place, gone)) = self.0.guests.watches.admit(self.0.address, 1, &self.0.cut) else {
            WATCH_REFUSED.note(Some(self.0.address));
            let most = self.0.guests.watches.most_each();
            let detail = format!(
                "{most} watches from this address are open, which is `watches_per_address` in config.toml; \
                 close some, or try another server"
            );
            return Err(ApiError::new(ProblemKind::TooMany, detail));
        };
        gone.into_iter().for_each(|gone| WATCH_CUT.note(Some(gone)));
        Ok(place)
    }
    /// A place for bytes that wait to be read; none is needed for few.
    pub(super) fn unread(&self, bytes: usize) -> Result<Option<Place<IpAddr>>, ApiError> {
        if bytes <= UNCOUNTED_BYTES {
            return Ok(None);
        }
        let Some((place, gone)) = self.0.guests.unread.admit(self.0.address, bytes, &self.0.cut) else {
            ANSWER_REFUSED.note(Some(self.0.address));
            return Err(self.reads_too_little());
        };
        gone.into_iter().for_each(|gone| ANSWER_CUT.note(Some(gone)));
        Ok(Some(place))
    }
    /// An answer that is counted until it has been read.
    pub(super) fn answer(&self, response: Response) -> Result<Response, ApiError> {
        let bytes = response.body().size_hint().exact().unwrap_or(0);
        let place = self.unread(usize::try_from(bytes).unwrap_or(usize::MAX))?;
        Ok(match place {
            Some(place) => response.map(|body| Body::new(Counted { body, _place: place })),
            None => response,
        })
    }
}
