//! What others make this server write into its log: one line for each kind and server in a minute, with how often it
//! happened meanwhile. Disks are not for liars to fill.

use quorum::ids::ServerId;
use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shortest time between two lines of one kind about one server.
const INTERVAL: Duration = Duration::from_secs(60);

/// The log is one for the whole process, and so is this. At most as many entries as there are kinds and servers.
static SAID: LazyLock<Mutex<Seldom>> = LazyLock::new(Mutex::default);

type Said = (Instant, u64);

#[derive(Default)]
struct Seldom(BTreeMap<(&'static str, Option<ServerId>), Said>);

impl Seldom {
    fn at(&mut self, now: Instant, kind: &'static str, about: Option<ServerId>) -> Option<u64> {
        let (last, unsaid) = self.0.entry((kind, about)).or_insert((now, u64::MAX));
        if *unsaid != u64::MAX && now.duration_since(*last) < INTERVAL {
            *unsaid += 1;
            return None;
        }
        let before = if *unsaid == u64::MAX { 0 } else { *unsaid };
        (*last, *unsaid) = (now, 0);
        Some(before)
    }
}

/// Whether to say something of this kind, about a server or about anyone, now: then, how often it was left unsaid.
pub fn now(kind: &'static str, about: impl Into<Option<ServerId>>) -> Option<u64> {
    SAID.lock().unwrap_or_else(PoisonError::into_inner).at(Instant::now(), kind, about.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_a_line_a_minute_with_a_count() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let mut said = Vec::new();
        for second in 0..130 {
            said.extend(seldom.at(start + Duration::from_secs(second), "refused", Some(ServerId(3))));
        }
        assert_eq!(said, [0, 59, 59]);
        assert_eq!(seldom.at(start, "refused", Some(ServerId(2))), Some(0), "others are others");
        assert_eq!(seldom.at(start, "closed", Some(ServerId(3))), Some(0), "and so are other kinds");
    }
}
