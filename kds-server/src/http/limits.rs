//! What clients may take of a server, as it is configured.

use crate::places::Places;
use anyhow::ensure;
use std::fmt::Display;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// Connections of clients at a time: with handshakes, links of other servers and the database below the 1,024 files
/// that a process commonly may open.
const CONNECTIONS: usize = 640;
/// Handshakes under way at a time for each connection that there may be: a fifth.
const CONNECTIONS_PER_HANDSHAKE: usize = 5;
/// MiB of answers that were not read.
const UNREAD_MIB: usize = 64;
/// Files that a server has open beside those of its clients and links.
const OTHER_FILES: usize = 64;
/// Links to and from each other server, old ones included.
const FILES_PER_PEER: usize = 4;

/// A bound for all, and one for each address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    pub(super) all: usize,
    pub(super) each: usize,
}

impl Bound {
    /// As configured, where it is: `each` is a part of all otherwise.
    fn of(
        name: &str,
        (all, each): (Option<usize>, Option<usize>),
        usual: usize,
        part: usize,
        range: RangeInclusive<usize>,
    ) -> anyhow::Result<Self> {
        let all = within(name, all.unwrap_or(usual), range)?;
        let each = each.unwrap_or_else(|| all.div_ceil(part));
        Ok(Self { all, each: within(&format!("{name}_per_address"), each, 1..=all)? })
    }
    pub(super) fn places(self) -> Arc<Places<IpAddr>> {
        Places::with_most_each(self.all, self.each)
    }
}

fn within<T: PartialOrd + Display>(name: &str, value: T, range: RangeInclusive<T>) -> anyhow::Result<T> {
    let (least, most) = (range.start(), range.end());
    ensure!(
        range.contains(&value),
        "{name} = {value} in config.toml makes no sense: it is from {least} to {most}"
    );
    Ok(value)
}

/// What config.toml says of limits; nothing for what is usual.
#[derive(Clone, Copy, Debug, Default)]
pub struct Configured {
    /// Requests a second of one address.
    pub requests_per_second: u32,
    /// Connections, of all and of one address.
    pub connections: (Option<usize>, Option<usize>),
    /// Watches, of all and of one address.
    pub watches: (Option<usize>, Option<usize>),
    /// MiB of answers that were not read, of all and of one address.
    pub unread_mib: (Option<usize>, Option<usize>),
}

/// Limits that make sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    pub(super) requests_per_second: u32,
    pub(super) connections: Bound,
    pub(super) watches: Bound,
    pub(super) unread_bytes: Bound,
}

impl Limits {
    /// Refuses what makes no sense.
    ///
    /// # Errors
    /// Says which setting, and what it may be.
    pub fn of(configured: &Configured) -> anyhow::Result<Self> {
        let connections = Bound::of("connections", configured.connections, CONNECTIONS, 2, 8..=65_536)?;
        // A watch is a connection, too.
        let (usual, most) = (connections.all / 3, connections.all);
        let watches = Bound::of("watches", configured.watches, usual, 2, 1..=most)?;
        let unread_mib = Bound::of("unread_mib", configured.unread_mib, UNREAD_MIB, 4, 1..=65_536)?;
        let unread_bytes = Bound { all: unread_mib.all << 20, each: unread_mib.each << 20 };
        let requests_per_second = configured.requests_per_second;
        Ok(Self { requests_per_second, connections, watches, unread_bytes })
    }
    pub(super) fn handshakes(&self) -> usize {
        self.connections.all.div_ceil(CONNECTIONS_PER_HANDSHAKE)
    }
    /// Files that a server of so many may need at a time.
    pub fn files(&self, servers: usize) -> usize {
        self.connections.all + self.handshakes() + servers * FILES_PER_PEER + OTHER_FILES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_configured_is_usual_and_nonsense_is_refused_by_name() {
        let usual = Limits::of(&Configured::default()).unwrap();
        assert_eq!(usual.connections, Bound { all: 640, each: 320 });
        assert_eq!(usual.watches, Bound { all: 213, each: 107 });
        assert_eq!(usual.unread_bytes, Bound { all: 64 << 20, each: 16 << 20 });
        assert!(usual.files(16) < 1_024, "{}", usual.files(16));
        let few = Configured { connections: (Some(8), Some(8)), ..Configured::default() };
        assert_eq!(Limits::of(&few).unwrap().watches, Bound { all: 2, each: 1 });

        let with = |change: fn(&mut Configured)| {
            let mut configured = Configured::default();
            change(&mut configured);
            Limits::of(&configured).map_or_else(|error| error.to_string(), |limits| format!("{limits:?}"))
        };
        for (refused, name) in [
            (with(|c| c.connections.0 = Some(0)), "connections = 0"),
            (with(|c| c.connections.0 = Some(1_000_000)), "connections = 1000000"),
            (with(|c| c.connections.1 = Some(0)), "connections_per_address = 0"),
            (with(|c| c.connections = (Some(10), Some(11))), "connections_per_address = 11"),
            (with(|c| c.watches.0 = Some(641)), "watches = 641"),
            (with(|c| c.watches.1 = Some(0)), "watches_per_address = 0"),
            (with(|c| c.unread_mib.0 = Some(0)), "unread_mib = 0"),
            (with(|c| c.unread_mib.1 = Some(65)), "unread_mib_per_address = 65"),
        ] {
            assert!(refused.starts_with(name) && refused.contains("makes no sense"), "{refused}");
        }
    }
}
