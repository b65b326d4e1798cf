//! How long to wait for an answer before others are asked too, and whom to ask last.

use quorum::ids::ServerId;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The shortest patience: below it, asking others costs more than waiting.
pub(crate) const LEAST: Duration = Duration::from_millis(20);
/// The shortest patience with a write, which is ordered first.
const LEAST_OF_WRITES: Duration = Duration::from_millis(500);
/// The longest, and what it is while nothing is known.
const MOST_OF_WRITES: Duration = Duration::from_secs(4);
const FIRST_OF_WRITES: Duration = Duration::from_secs(1);
/// How long an order of servers is kept.
const ORDER_KEPT: Duration = Duration::from_millis(5);
/// How long a server that was silent is asked last; twice as long each further time, so often.
const AVOIDED: Duration = Duration::from_secs(2);
const DOUBLINGS: u32 = 4;

/// Smoothed mean and deviation of the time that something takes, as TCP keeps them for its retransmission timer
/// (RFC 6298).
#[derive(Default)]
struct Usual(Mutex<Option<(Duration, Duration)>>);

impl Usual {
    fn heard(&self, took: Duration) {
        let mut smoothed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *smoothed = Some(match *smoothed {
            None => (took, took / 2),
            Some((mean, deviation)) => ((mean * 7 + took) / 8, (deviation * 3 + mean.abs_diff(took)) / 4),
        });
    }
    fn patience(&self) -> Option<Duration> {
        let smoothed = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        smoothed.map(|(mean, deviation)| mean + deviation * 4)
    }
}

/// What is known of one server, whoever learned it: reads and writes alike.
#[derive(Clone, Default)]
struct Standing {
    /// How often it was silent since it last answered.
    silences: u32,
    /// Until when it is asked last.
    avoided: Option<Instant>,
    /// It asked to wait: until when, and why. That is no fault of its.
    waits: Option<(Instant, String)>,
}

/// What a client has learned of the time that answers take, and of who gives none.
pub(crate) struct Pace {
    most: Duration,
    reads: Usual,
    writes: Usual,
    servers: Mutex<Vec<Standing>>,
    /// An order of servers, and when it was drawn.
    order: Mutex<Option<(Instant, Vec<ServerId>)>>,
}

impl Pace {
    pub(crate) fn new(most: Duration, servers: usize) -> Self {
        let servers = Mutex::new(vec![Standing::default(); servers]);
        Self { most, reads: Usual::default(), writes: Usual::default(), servers, order: Mutex::new(None) }
    }
    /// An answer to a read took so long.
    pub(crate) fn heard(&self, took: Duration) {
        self.reads.heard(took);
    }
    /// How long an answer to a read may take before it seems late.
    pub(crate) fn patience(&self) -> Duration {
        self.reads.patience().unwrap_or(self.most).max(LEAST).min(self.most)
    }
    /// A receipt took so long.
    pub(crate) fn ordered(&self, took: Duration) {
        self.writes.heard(took);
    }
    /// How long a receipt may take before the request goes to another server too.
    pub(crate) fn patience_with_writes(&self) -> Duration {
        self.writes.patience().unwrap_or(FIRST_OF_WRITES).clamp(LEAST_OF_WRITES, MOST_OF_WRITES)
    }
    /// The order in which servers are asked for the next few milliseconds.
    pub(crate) fn order(&self, draw: impl FnOnce() -> Vec<ServerId>) -> Vec<ServerId> {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*order {
            Some((drawn, servers)) if drawn.elapsed() < ORDER_KEPT => servers.clone(),
            _ => order.insert((Instant::now(), draw())).1.clone(),
        }
    }
    fn change(&self, server: ServerId, change: impl FnOnce(&mut Standing)) {
        let mut servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(standing) = servers.get_mut(server.index()) {
            change(standing);
        }
    }
    fn draw_again(&self) {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    /// A server was silent: for a while others are asked before it, for longer the more often it is.
    pub(crate) fn avoid(&self, server: ServerId) {
        let now = Instant::now();
        self.change(server, |standing| {
            // What several callers notice at once is one silence.
            if standing.avoided.is_none_or(|until| until <= now) {
                let doublings = standing.silences.min(DOUBLINGS);
                standing.avoided = Some(now + AVOIDED * 2_u32.pow(doublings));
                standing.silences = standing.silences.saturating_add(1);
            }
        });
        self.draw_again();
    }
    /// It answered something, in time or not.
    pub(crate) fn answered(&self, server: ServerId) {
        self.change(server, |standing| standing.silences = 0);
    }
    /// It asked to wait so long.
    pub(crate) fn asked_to_wait(&self, server: ServerId, wait: Duration, why: &str) {
        self.change(server, |standing| {
            standing.silences = 0;
            standing.waits = Some((Instant::now() + wait, why.to_owned()));
        });
        self.draw_again();
    }
    /// Why it asked to wait, if that is not over for longer than an answer may take.
    pub(crate) fn waits(&self, server: ServerId) -> Option<String> {
        let servers = self.servers.lock().unwrap_or_else(PoisonError::into_inner);
        let (until, why) = servers.get(server.index())?.waits.as_ref()?;
        (*until + self.most > Instant::now()).then(|| why.clone())
    }
    /// Whether a server is one to ask last: it was silent, or asked to wait. The silent ones come after all.
    pub(crate) fn avoids(&self, server: ServerId) -> Option<Avoided> {
        let (now, servers) = (Instant::now(), self.servers.lock().unwrap_or_else(PoisonError::into_inner));
        let standing = servers.get(server.index())?;
        if standing.avoided.is_some_and(|until| until > now) {
            return Some(Avoided::Silent);
        }
        standing.waits.as_ref().filter(|(until, _)| *until > now).map(|_| Avoided::AskedToWait)
    }
}

/// Why a server is asked last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Avoided {
    AskedToWait,
    Silent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_follows_what_is_usual_and_stays_within_bounds() {
        let pace = Pace::new(Duration::from_millis(500), 4);
        assert_eq!(pace.patience(), Duration::from_millis(500), "nothing is known yet");
        (0..100).for_each(|_| pace.heard(Duration::from_millis(1)));
        assert_eq!(pace.patience(), LEAST);
        (0..100).for_each(|_| pace.heard(Duration::from_millis(80)));
        let patience = pace.patience();
        assert!(
            patience >= Duration::from_millis(80) && patience < Duration::from_millis(200),
            "{patience:?}"
        );
        (0..100).for_each(|_| pace.heard(Duration::from_secs(2)));
        assert_eq!(pace.patience(), Duration::from_millis(500));
    }

    #[test]
    fn a_silent_server_is_avoided() {
        let pace = Pace::new(Duration::from_millis(500), 4);
        pace.avoid(ServerId(2));
        assert_eq!(pace.avoids(ServerId(2)), Some(Avoided::Silent));
        assert_eq!(pace.avoids(ServerId(1)), None);
    }

    #[test]
    fn silence_that_goes_on_is_avoided_for_longer() {
        let pace = Pace::new(Duration::from_millis(500), 4);
        let avoided_for = || {
            pace.change(ServerId(2), |standing| standing.avoided = None);
            pace.avoid(ServerId(2));
            // Others notice the same silence.
            pace.avoid(ServerId(2));
            let until = pace.servers.lock().unwrap()[2].avoided.unwrap();
            (until - Instant::now()).as_secs_f64().round() as u64
        };
        let times: Vec<u64> = (0..7).map(|_| avoided_for()).collect();
        assert_eq!(times, [2, 4, 8, 16, 32, 32, 32]);
        pace.answered(ServerId(2));
        assert_eq!(avoided_for(), 2);
    }

    #[test]
    fn who_asks_to_wait_is_not_taken_for_silent() {
        let pace = Pace::new(Duration::from_millis(500), 4);
        pace.asked_to_wait(ServerId(1), Duration::from_secs(60), "too many requests");
        pace.asked_to_wait(ServerId(3), Duration::ZERO, "too many requests");
        assert_eq!(pace.avoids(ServerId(1)), Some(Avoided::AskedToWait));
        assert_eq!(pace.avoids(ServerId(3)), None, "it has waited");
        assert_eq!(pace.waits(ServerId(3)).as_deref(), Some("too many requests"));
        // To others it may answer meanwhile.
        pace.answered(ServerId(1));
        assert_eq!(pace.waits(ServerId(1)).as_deref(), Some("too many requests"));
        pace.avoid(ServerId(2));
        let mut order: Vec<_> = (0..4).map(ServerId).collect();
        order.sort_by_key(|server| pace.avoids(*server));
        assert_eq!(order, [ServerId(0), ServerId(3), ServerId(1), ServerId(2)]);
    }
}
