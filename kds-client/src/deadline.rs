//! Durations that somebody else chose, and what follows from them: nothing here panics or wraps.
//!
//! `Duration::MAX` means "for ever", and so does everything beyond [`FOR_EVER`]: the sum of a clock's time and a
//! larger duration has no value, and milliseconds beyond 64 bits would begin again at 0. All deadlines of the client
//! are made here, and its [`Options`](crate::Options) are [`bounded`] when it is made.

use std::time::Duration;
use tokio::time::Instant;

/// The longest that anything waits, or that an answer may be old: thirty years.
pub const FOR_EVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// The duration, or [`FOR_EVER`] if it is longer.
pub fn bounded(duration: Duration) -> Duration {
    duration.min(FOR_EVER)
}

/// So long from now.
pub fn after(wait: Duration) -> Instant {
    Instant::now() + bounded(wait)
}

/// In milliseconds, rounded down.
pub fn millis(duration: Duration) -> u64 {
    // Thirty years are 2^40 of them.
    bounded(duration).as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_for_ever() {
        for long in
            [Duration::MAX, Duration::from_secs(u64::MAX), Duration::from_millis(u64::MAX), FOR_EVER * 2]
        {
            assert!(after(long) > Instant::now() + FOR_EVER / 2);
            assert_eq!(millis(long), millis(FOR_EVER));
        }
        // 384 ms modulo 2^64 ms.
        assert_eq!(millis(Duration::from_secs(18_446_744_073_709_552)), millis(FOR_EVER));
        assert_eq!(millis(Duration::from_nanos(1_999_999)), 1);
        assert!(after(Duration::ZERO) <= Instant::now());
    }
}
