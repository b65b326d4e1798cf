//! Rate limits by client address: whoever asks for more than their share is told when to come back, and
//! the others notice nothing.

use super::problem::ApiError;
use governor::clock::{Clock as _, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use kds_client::api::ProblemKind;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, PoisonError};

/// Names of a bulk lookup that cost as much as a request: most of a request's price is not the answer's.
pub(super) const NAMES_PER_REQUEST: usize = 4;
/// What a write costs, in lookups.
pub(super) const WRITE_COST: u32 = 10;
/// Addresses that are told apart: while more are active, all share one allowance.
const MAX_ADDRESSES: usize = 65_536;

type Limiter =
    RateLimiter<IpAddr, HashMapStateStore<IpAddr>, MonotonicClock, NoOpMiddleware<std::time::Instant>>;

/// Connections of one address at a time: half of all.
pub(super) const MAX_PER_ADDRESS: usize = super::MAX_CONNECTIONS / 2;

/// Allowances of requests a second, a second's worth of which may be used at once; and of connections.
pub(super) struct RateLimits {
    lookups: Option<Limiter>,
    connections: Mutex<HashMap<IpAddr, usize>>,
}

/// Where a request comes from, and what it may still ask for.
#[derive(Clone)]
pub(super) struct Caller {
    address: IpAddr,
    limits: Arc<RateLimits>,
}

impl RateLimits {
    /// No limit for 0.
    pub(super) fn new(per_second: u32) -> Self {
        let quota = NonZeroU32::new(per_second).map(Quota::per_second);
        let limiter = |quota| RateLimiter::new(quota, HashMapStateStore::default(), MonotonicClock);
        Self { lookups: quota.map(limiter), connections: Mutex::default() }
    }
    /// Forgets the addresses whose allowance is whole again. Called now and then.
    pub(super) fn tidy(&self) {
        if let Some(limiter) = &self.lookups {
            limiter.retain_recent();
        }
    }
    /// A connection of an address; none if it has too many already.
    pub(super) fn connect(self: &Arc<Self>, peer: SocketAddr) -> Option<Connection> {
        let caller = self.caller(peer);
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        // As many entries at most as there are connections.
        let open = connections.entry(caller.address).or_default();
        (*open < MAX_PER_ADDRESS).then(|| {
            *open += 1;
            Connection(caller)
        })
    }
    pub(super) fn caller(self: &Arc<Self>, peer: SocketAddr) -> Caller {
        // Who has one IPv6 address commonly has 2^64 of them.
        let address = crate::places::network(peer.ip());
        Caller { address, limits: Arc::clone(self) }
    }
}

/// An open connection; makes room when dropped.
pub(super) struct Connection(Caller);

impl Connection {
    /// Whose it is.
    pub(super) fn caller(&self) -> Caller {
        self.0.clone()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut connections = self.0.limits.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = connections.get_mut(&self.0.address) {
            *open -= 1;
            if *open == 0 {
                connections.remove(&self.0.address);
            }
        }
    }
}

impl Caller {
    /// Charges for so many lookups.
    pub(super) fn charge(&self, lookups: u32) -> Result<(), ApiError> {
        let (Some(limiter), Some(lookups)) = (&self.limits.lookups, NonZeroU32::new(lookups)) else {
            return Ok(());
        };
        let crowded = limiter.len() >= MAX_ADDRESSES;
        let address = if crowded { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { self.address };
        let wait = match limiter.check_key_n(&address, lookups) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(not_until)) => not_until.wait_time_from(limiter.clock().now()),
            // More at once than a second's allowance: as much as there is.
            Err(_) => return self.charge(lookups.get() / 2),
        };
        let seconds = wait.as_secs() + 1;
        let detail = format!(
            "too many requests from {address}: wait {seconds} s; `requests_per_second` in config.toml is the limit"
        );
        Err(ApiError::new(ProblemKind::TooMany, detail).with_retry_after(seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_use_up_what_others_may() {
        let limits = Arc::new(RateLimits::new(100));
        let greedy = limits.caller("192.0.2.1:1000".parse().unwrap());
        let modest = limits.caller("192.0.2.2:1000".parse().unwrap());
        assert!(greedy.charge(60).is_ok());
        assert!(greedy.charge(60).is_err());
        assert!(limits.caller("192.0.2.1:2000".parse().unwrap()).charge(60).is_err(), "by another port");
        assert!(limits.caller("[::ffff:192.0.2.1]:1".parse().unwrap()).charge(60).is_err());
        assert!(modest.charge(60).is_ok());
        assert!(modest.charge(1_000).is_err(), "more than there ever is is not free");
        let (one, other) = ("[2001:db8::1]:1", "[2001:db8::2]:1");
        assert!(limits.caller(one.parse().unwrap()).charge(100).is_ok());
        assert!(limits.caller(other.parse().unwrap()).charge(100).is_err(), "the same /64");
        let none = Arc::new(RateLimits::new(0));
        assert!((0..10_000).all(|_| none.caller(one.parse().unwrap()).charge(100).is_ok()));
    }

    #[test]
    fn one_address_does_not_take_all_places() {
        let limits = Arc::new(RateLimits::new(0));
        let peer = "192.0.2.1:1000".parse().unwrap();
        let open: Vec<_> = std::iter::from_fn(|| limits.connect(peer)).take(2 * MAX_PER_ADDRESS).collect();
        assert_eq!(open.len(), MAX_PER_ADDRESS);
        assert!(limits.connect("192.0.2.2:1000".parse().unwrap()).is_some());
        drop(open);
        assert!(limits.connect(peer).is_some());
        assert!(limits.connections.lock().unwrap().is_empty(), "whoever is gone is forgotten");
    }
}
