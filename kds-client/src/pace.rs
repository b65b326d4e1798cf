//! How long to wait for an answer before others are asked too, and whom to ask last.

use quorum::ids::ServerId;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The shortest patience: below it, asking others costs more than waiting.
pub(crate) const LEAST: Duration = Duration::from_millis(20);
/// How long an order of servers is kept.
const ORDER_KEPT: Duration = Duration::from_millis(5);
/// How long a server that was silent is asked last.
const AVOIDED: Duration = Duration::from_secs(2);

/// What a client has learned of the time that answers take. Smoothed mean and deviation as TCP keeps them
/// for its retransmission timer (RFC 6298).
pub(crate) struct Pace {
    most: Duration,
    began: Instant,
    smoothed: Mutex<Option<(Duration, Duration)>>,
    /// Until when each server is avoided, in milliseconds since the beginning.
    avoided: Vec<AtomicU64>,
    /// An order of servers, and when it was drawn.
    order: Mutex<Option<(Instant, Vec<ServerId>)>>,
}

impl Pace {
    pub(crate) fn new(most: Duration, servers: usize) -> Self {
        let avoided = (0..servers).map(|_| AtomicU64::new(0)).collect();
        Self { most, began: Instant::now(), smoothed: Mutex::new(None), avoided, order: Mutex::new(None) }
    }
    /// An answer took so long.
    pub(crate) fn heard(&self, took: Duration) {
        let mut smoothed = self.smoothed.lock().unwrap_or_else(PoisonError::into_inner);
        *smoothed = Some(match *smoothed {
            None => (took, took / 2),
            Some((mean, deviation)) => ((mean * 7 + took) / 8, (deviation * 3 + mean.abs_diff(took)) / 4),
        });
    }
    /// How long an answer may take before it seems late.
    pub(crate) fn patience(&self) -> Duration {
        let smoothed = *self.smoothed.lock().unwrap_or_else(PoisonError::into_inner);
        let usual = smoothed.map_or(self.most, |(mean, deviation)| mean + deviation * 4);
        usual.max(LEAST).min(self.most)
    }
    /// The order in which servers are asked for the next few milliseconds.
    pub(crate) fn order(&self, draw: impl FnOnce() -> Vec<ServerId>) -> Vec<ServerId> {
        let mut order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        match &*order {
            Some((drawn, servers)) if drawn.elapsed() < ORDER_KEPT => servers.clone(),
            _ => order.insert((Instant::now(), draw())).1.clone(),
        }
    }
    fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }
    /// A server was silent: for a while others are asked before it.
    pub(crate) fn avoid(&self, server: ServerId) {
        let until = self.now_ms() + AVOIDED.as_millis() as u64;
        self.avoided[server.index()].store(until, Ordering::Relaxed);
        *self.order.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
    /// Whether a server is one to ask last.
    pub(crate) fn avoids(&self, server: ServerId) -> bool {
        self.avoided[server.index()].load(Ordering::Relaxed) > self.now_ms()
    }
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
        assert!(pace.avoids(ServerId(2)) && !pace.avoids(ServerId(1)));
    }
}
