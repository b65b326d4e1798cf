//! Rate limits by client address: whoever asks for more than their share is told when to come back, and
//! the others notice nothing.

use super::problem::ApiError;
use governor::clock::{Clock as _, MonotonicClock};
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::{Quota, RateLimiter};
use kds_client::api::ProblemKind;
use std::net::{IpAddr, Ipv6Addr};
use std::num::NonZeroU32;

/// Names of a bulk lookup that cost as much as a request: most of a request's price is not the answer's.
pub(super) const NAMES_PER_REQUEST: usize = 4;
/// What a write costs, in lookups.
pub(super) const WRITE_COST: u32 = 10;
/// Addresses that are told apart: while more are active, all share one allowance.
const MAX_ADDRESSES: usize = 65_536;

type Limiter =
    RateLimiter<IpAddr, HashMapStateStore<IpAddr>, MonotonicClock, NoOpMiddleware<std::time::Instant>>;

/// Allowances of requests a second, a second's worth of which may be used at once.
pub(super) struct RateLimits(Option<Limiter>);

impl RateLimits {
    /// No limit for 0.
    pub(super) fn new(per_second: u32) -> Self {
        let quota = NonZeroU32::new(per_second).map(Quota::per_second);
        Self(quota.map(|quota| RateLimiter::new(quota, HashMapStateStore::default(), MonotonicClock)))
    }
    /// Forgets the addresses whose allowance is whole again. Called now and then.
    pub(super) fn tidy(&self) {
        if let Some(limiter) = &self.0 {
            limiter.retain_recent();
        }
    }
    /// Charges an address for so many lookups.
    pub(super) fn charge(&self, address: IpAddr, lookups: u32) -> Result<(), ApiError> {
        let (Some(limiter), Some(lookups)) = (&self.0, NonZeroU32::new(lookups)) else {
            return Ok(());
        };
        let crowded = limiter.len() >= MAX_ADDRESSES;
        let shared = if crowded { IpAddr::V6(Ipv6Addr::UNSPECIFIED) } else { address };
        let wait = match limiter.check_key_n(&shared, lookups) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(not_until)) => not_until.wait_time_from(limiter.clock().now()),
            // More at once than a second's allowance: as much as there is.
            Err(_) => return self.charge(address, lookups.get() / 2),
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
    use crate::places::network;

    #[test]
    fn one_address_does_not_use_up_what_others_may() {
        let limits = RateLimits::new(100);
        let charge = |address: &str, lookups| limits.charge(network(address.parse().unwrap()), lookups);
        assert!(charge("192.0.2.1", 60).is_ok());
        assert!(charge("192.0.2.1", 60).is_err());
        assert!(charge("::ffff:192.0.2.1", 60).is_err());
        assert!(charge("192.0.2.2", 60).is_ok());
        assert!(charge("192.0.2.2", 1_000).is_err(), "more than there ever is is not free");
        assert!(charge("2001:db8::1", 100).is_ok());
        assert!(charge("2001:db8::2", 100).is_err(), "the same /64");
        assert!(charge("2001:db8:0:1::2", 100).is_ok());
        let none = RateLimits::new(0);
        assert!((0..10_000).all(|_| none.charge("192.0.2.1".parse().unwrap(), 100).is_ok()));
    }
}
