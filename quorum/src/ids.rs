//! Identifiers. Each word means one thing: [`View`] is ordering's, [`Epoch`] is the secrets'.

use crate::bytes::Hash;
use crate::limits::MAX_SERVERS;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The number that follows; saturates, which no correct cluster lives to see.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// The place of a batch in the one order (PBFT's n). The first batch has number 1.
    Sequence
);
number!(
    /// A configuration of ordering with one primary (PBFT's v).
    View
);
number!(
    /// A period at whose end everything secret is renewed (design §7).
    Epoch
);

/// Which attempt at which epoch. An epoch begins with one attempt of possibly several, and the keys that
/// count in it are those that were certified for that one: so whoever saw an attempt that came to nothing
/// has nothing for the epoch (design §7). Epoch 0 begins without one, under number 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttemptId {
    /// The epoch that is to begin, or has begun.
    pub epoch: Epoch,
    /// Counts the attempts at it, from 1.
    pub attempt: u32,
}
impl AttemptId {
    /// The first attempt at an epoch; for epoch 0, its beginning.
    pub fn first(epoch: Epoch) -> Self {
        Self { epoch, attempt: u32::from(epoch > Epoch(0)) }
    }
    /// Whether what belongs to the attempt `about` may go over a link whose keys are certified for this one (design §7,
    /// *Fresh channels*): keys for an attempt are drawn when it has begun, so whoever was in a server before has none of
    /// them. Number 0 is that of keys for no attempt, and they hear nothing.
    pub fn may_hear(self, about: AttemptId) -> bool {
        self.attempt > 0 && self >= about
    }
}
impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (attempt {})", self.epoch, self.attempt)
    }
}

impl View {
    /// The server that proposes batches in this view: v mod n (PBFT §4.1).
    pub fn primary(self, servers: usize) -> ServerId {
        let servers = servers as u64;
        // n <= 225, so the remainder fits.
        ServerId((self.0 % servers) as u8)
    }
}

/// Digest of the manifest: what every signature and hash of a cluster is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClusterId(pub Hash);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A server, by its place in the grid: row-major, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ServerId(pub u8);

impl ServerId {
    /// As an index into per-server tables.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
    /// The x of this server's Shamir shares; never 0, which would be the secret itself.
    pub fn share_index(self) -> u8 {
        self.0 + 1
    }
}
impl fmt::Display for ServerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A set of servers; counts each one once, which is what quorums rely on.
#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ServerSet([u64; MAX_SERVERS.div_ceil(64)]);

impl ServerSet {
    /// Adds a server; says whether it is new.
    pub fn insert(&mut self, server: ServerId) -> bool {
        let (word, bit) = (server.index() / 64, 1 << (server.index() % 64));
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }
    /// Whether the server is in the set.
    pub fn contains(&self, server: ServerId) -> bool {
        self.0[server.index() / 64] & (1 << (server.index() % 64)) != 0
    }
    /// How many servers are in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|word| word.count_ones() as usize).sum()
    }
    /// Whether nobody is in the set.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = ServerId> + '_ {
        (0..=u8::MAX).take(self.0.len() * 64).map(ServerId).filter(|&server| self.contains(server))
    }
}
impl FromIterator<ServerId> for ServerSet {
    fn from_iter<I: IntoIterator<Item = ServerId>>(servers: I) -> Self {
        let mut set = Self::default();
        for server in servers {
            set.insert(server);
        }
        set
    }
}
impl fmt::Debug for ServerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|server| server.0)).finish()
    }
}

/// Milliseconds since 1970-01-01 UTC; in text RFC 3339. Agreed by ordering (design §3) or
/// handed in by the shell: the core knows no clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// The last instant that has an RFC 3339 form: 9999-12-30T22:00:00Z.
    pub const MAX: Self = Self(253_402_207_200_000);

    /// Later by so many milliseconds.
    #[must_use]
    pub fn plus_ms(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }
    /// Milliseconds from `earlier` to `self`, 0 if it is not earlier.
    pub fn since_ms(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
    /// Parses RFC 3339 with at most millisecond precision, between 1970 and year 9999.
    pub fn parse(text: &str) -> Option<Self> {
        let time: jiff::Timestamp = text.parse().ok()?;
        if time.subsec_nanosecond() % 1_000_000 != 0 {
            return None;
        }
        let time = Self(u64::try_from(time.as_millisecond()).ok()?);
        (time <= Self::MAX).then_some(time)
    }
}
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clamped = self.0.min(Self::MAX.0) as i64;
        match jiff::Timestamp::from_millisecond(clamped) {
            Ok(time) => time.fmt(f),
            Err(_) => self.0.fmt(f),
        }
    }
}
impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}
impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let time = if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            Self::parse(&text).ok_or_else(|| {
                de::Error::invalid_value(de::Unexpected::Str(&text), &"an RFC 3339 time, to the millisecond")
            })?
        } else {
            Self(u64::deserialize(deserializer)?)
        };
        if time > Self::MAX {
            return Err(de::Error::custom("time after year 9999"));
        }
        Ok(time)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_counts_each_server_once() {
        let mut set = ServerSet::default();
        assert!(set.insert(ServerId(224)));
        assert!(!set.insert(ServerId(224)));
        assert!(set.insert(ServerId(0)));
        assert_eq!(set.len(), 2);
        assert_eq!(set.iter().collect::<Vec<_>>(), [ServerId(0), ServerId(224)]);
    }

    /// Design §7: secrets of an attempt go over links under keys of that attempt or a later one.
    #[test]
    fn old_link_keys_hear_no_secrets() {
        let of = |epoch, attempt| AttemptId { epoch: Epoch(epoch), attempt };
        let about = of(5, 2);
        for (key, hears) in [
            (of(4, 1), false),
            (of(5, 1), false),
            (of(5, 2), true),
            (of(5, 3), true),
            (of(6, 1), true),
            // A new identity's first keys, and those of the first epoch.
            (of(6, 0), false),
            (of(0, 0), false),
        ] {
            assert_eq!(key.may_hear(about), hears, "{key}");
        }
    }

    #[test]
    fn times_are_rfc3339_to_the_millisecond() {
        let time = Timestamp(1_763_640_000_123);
        assert_eq!(time.to_string(), "2025-11-20T12:00:00.123Z");
        assert_eq!(Timestamp::parse(&time.to_string()), Some(time));
        assert_eq!(Timestamp::parse("2025-11-20T12:00:00.1234Z"), None);
        assert_eq!(Timestamp::parse("1969-01-01T00:00:00Z"), None);
        assert!(Timestamp::parse(&Timestamp::MAX.to_string()).is_some());
        assert_eq!(Timestamp::parse("yesterday"), None);
    }
}
