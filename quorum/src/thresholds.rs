//! The numbers of a cluster, each with its own name (design §2), and the planner that finds them.

use crate::limits::MAX_SERVERS;
use serde::{Deserialize, Serialize};

/// Seed sets that a refresh may need at most: C(n, k−2) (design §2, §7).
pub const MAX_SEED_SETS: u64 = 10_000;

/// The thresholds of an m×m grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// n: servers.
    pub servers: u16,
    /// m: rows, and columns, of the grid.
    pub side: u16,
    /// f: Byzantine servers that ordering survives.
    pub faulty: u16,
    /// q: ordering quorum, and signatures of a certificate; ⌈(n+f+1)/2⌉, not 2f+1.
    pub quorum: u16,
    /// b: Byzantine servers that a row read masks; 0 means that reads use `q` servers.
    pub masked: u16,
    /// r: full rows of a read.
    pub rows: u16,
    /// c: full columns of a complete write.
    pub columns: u16,
    /// k: servers that reconstruct a secret; any k−1 learn nothing.
    pub threshold: u16,
}

/// Why there is no cluster with the numbers asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// n is not the square of 2..=15.
    #[error(
        "{servers} servers do not fill a square grid; take 4, 9, 16, 25, … up to {MAX_SERVERS} (nearest: {nearest})"
    )]
    NotASquare {
        /// What was asked for.
        servers: usize,
        /// The nearest n that works.
        nearest: usize,
    },
    /// No r×c access masks so many.
    #[error(
        "a {side}×{side} grid cannot mask {masked} lying servers: no r, c ≤ {side}−{masked} have r·c ≥ {masked}+1; \
         at most {possible} can be masked"
    )]
    CannotMask {
        /// m.
        side: u16,
        /// The b asked for.
        masked: u16,
        /// The largest b that works.
        possible: u16,
    },
    /// k is out of range.
    #[error(
        "a threshold of {threshold} does not work with {servers} servers: it must be between 2 and {max} ({limit})"
    )]
    Threshold {
        /// The k asked for.
        threshold: u16,
        /// n.
        servers: u16,
        /// The largest k that works.
        max: u16,
        /// What makes it the largest.
        limit: ThresholdLimit,
    },
}

/// Which bound keeps k from being larger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ThresholdLimit {
    /// k ≤ f+1: as many colluders as ordering survives.
    Colluders,
    /// k ≤ q−f: so many honest servers are sure to hold everything when an epoch is sealed.
    HonestHolders,
    /// C(n, k−2) ≤ 10,000: seed sets of a refresh.
    SeedSets,
}

impl std::fmt::Display for ThresholdLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Colluders => "k ≤ f+1: no more colluders than ordering survives",
            Self::HonestHolders => "k ≤ q−f: honest servers sure to hold a share of each sealed epoch",
            Self::SeedSets => "C(n, k−2) ≤ 10000: seed sets that a refresh has to agree on",
        })
    }
}

impl Thresholds {
    /// The thresholds of `servers` servers, with the defaults of design §2 where nothing is asked for.
    pub fn plan(servers: usize, masked: Option<u16>, threshold: Option<u16>) -> Result<Self, PlanError> {
        let side = (2..=15).find(|m| m * m == servers).ok_or_else(|| PlanError::NotASquare {
            servers,
            nearest: (2..=15).map(|m| m * m).min_by_key(|n: &usize| n.abs_diff(servers)).unwrap_or(4),
        })? as u16;
        let n = side * side;
        let faulty = (n - 1) / 3;
        let quorum = (n + faulty + 1).div_ceil(2);
        let (masked, (rows, columns)) = match masked {
            // Reads of q servers: one row against one column would mask nobody.
            Some(0) => (0, (1, 1)),
            Some(b) => (
                b,
                access_for(side, b).filter(|_| b <= faulty).ok_or_else(|| PlanError::CannotMask {
                    side,
                    masked: b,
                    possible: (1..=side.min(faulty))
                        .filter(|&b| access_for(side, b).is_some())
                        .max()
                        .unwrap_or(0),
                })?,
            ),
            None => match access_for(side, 1) {
                Some(access) => (1, access),
                None => (0, (1, 1)),
            },
        };
        let (largest, limit) = largest_threshold(n, faulty, quorum);
        let threshold = threshold.unwrap_or(largest);
        if !(2..=largest).contains(&threshold) {
            return Err(PlanError::Threshold { threshold, servers: n, max: largest, limit });
        }
        Ok(Self { servers: n, side, faulty, quorum, masked, rows, columns, threshold })
    }

    /// One server by itself: no fault is tolerated and no secret is kept. What replication costs is
    /// measured against it.
    pub const UNREPLICATED: Self =
        Self { servers: 1, side: 1, faulty: 0, quorum: 1, masked: 0, rows: 1, columns: 1, threshold: 1 };

    /// Whether these numbers are the ones that [`Thresholds::plan`] would give.
    pub fn is_consistent(&self) -> bool {
        *self == Self::UNREPLICATED
            || Self::plan(self.n(), Some(self.masked), Some(self.threshold)).as_ref() == Ok(self)
    }

    /// n as an index bound.
    pub fn n(&self) -> usize {
        usize::from(self.servers)
    }
    /// q as a count.
    pub fn q(&self) -> usize {
        usize::from(self.quorum)
    }
    /// f as a count.
    pub fn f(&self) -> usize {
        usize::from(self.faulty)
    }
    /// k as a count.
    pub fn k(&self) -> usize {
        usize::from(self.threshold)
    }
    /// Servers that one read touches.
    pub fn servers_per_read(&self) -> u16 {
        if self.masked == 0 { self.quorum } else { self.rows * self.side }
    }
    /// Servers that must hold a write before it is complete, at least: c columns and q servers.
    pub fn servers_per_write(&self) -> u16 {
        self.quorum.max(self.columns * self.side)
    }
    /// Sets T of k−2 servers for which a refresh agrees on a seed (design §7).
    pub fn seed_sets(&self) -> u64 {
        binomial(u64::from(self.servers), u64::from(self.threshold) - 2)
    }
    /// What keeps k from being larger.
    pub fn threshold_limit(&self) -> ThresholdLimit {
        largest_threshold(self.servers, self.faulty, self.quorum).1
    }
    /// Whether fewer colluders break secrecy than ordering survives (from n = 25 on).
    pub fn secrecy_is_weaker_than_ordering(&self) -> bool {
        self.threshold - 1 < self.faulty
    }
    /// Whether ordering pauses while f servers are silent and one more is being recovered.
    pub fn recovery_can_pause_ordering(&self) -> bool {
        self.servers - self.faulty == self.quorum
    }
}

/// The smallest r, then c, with r·c ≥ b+1 (dissemination, BQS §4) and r, c ≤ m−b (availability).
fn access_for(side: u16, masked: u16) -> Option<(u16, u16)> {
    let most = side.checked_sub(masked)?;
    (1..=most).find_map(|rows| {
        let columns = (masked + 1).div_ceil(rows);
        (columns <= most).then_some((rows, columns))
    })
}

fn largest_threshold(n: u16, faulty: u16, quorum: u16) -> (u16, ThresholdLimit) {
    let (cap, limit) = if faulty < quorum - faulty {
        (faulty + 1, ThresholdLimit::Colluders)
    } else {
        (quorum - faulty, ThresholdLimit::HonestHolders)
    };
    let by_seeds = (2..=cap)
        .take_while(|&k| binomial(u64::from(n), u64::from(k) - 2) <= MAX_SEED_SETS)
        .last()
        .unwrap_or(2);
    if by_seeds < cap { (by_seeds, ThresholdLimit::SeedSets) } else { (cap, limit) }
}

fn binomial(n: u64, k: u64) -> u64 {
    (0..k.min(n)).fold(1u64, |product, i| product.saturating_mul(n - i) / (i + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_the_design() {
        // n, masked asked for, f, q, b, r, c, k, servers per read
        for (n, asked, f, q, b, r, c, k, read) in [
            (4, None, 1, 3, 0, 1, 1, 2, 3),
            (9, None, 2, 6, 1, 1, 2, 3, 3),
            (16, None, 5, 11, 1, 1, 2, 6, 4),
            (16, Some(2), 5, 11, 2, 2, 2, 6, 8),
            (25, None, 8, 17, 1, 1, 2, 5, 5),
            (25, Some(3), 8, 17, 3, 2, 2, 5, 10),
            (100, Some(7), 33, 67, 7, 3, 3, 4, 30),
        ] {
            let plan = Thresholds::plan(n, asked, None).unwrap();
            assert_eq!(
                (plan.faulty, plan.quorum, plan.masked, plan.rows, plan.columns),
                (f, q, b, r, c),
                "n = {n}, b = {asked:?}"
            );
            assert_eq!((plan.threshold, plan.servers_per_read()), (k, read), "n = {n}");
            assert!(plan.is_consistent());
        }
    }

    #[test]
    fn quorums_meet_in_an_honest_server_and_are_available() {
        for side in 2..=15usize {
            let plan = Thresholds::plan(side * side, None, None).unwrap();
            // Two quorums share more than f servers (PBFT §4.1 generalised), and n−f servers make one.
            assert!(2 * plan.q() > plan.n() + plan.f());
            assert!(plan.q() <= plan.n() - plan.f());
            assert!(plan.k() <= plan.f() + 1 && plan.k() <= plan.q() - plan.f());
        }
    }

    #[test]
    fn impossible_plans_say_why() {
        assert_eq!(Thresholds::plan(10, None, None), Err(PlanError::NotASquare { servers: 10, nearest: 9 }));
        assert_eq!(
            Thresholds::plan(9, Some(2), None),
            Err(PlanError::CannotMask { side: 3, masked: 2, possible: 1 })
        );
        assert!(matches!(Thresholds::plan(9, None, Some(4)), Err(PlanError::Threshold { max: 3, .. })));
        assert!(matches!(
            Thresholds::plan(25, None, Some(6)),
            Err(PlanError::Threshold { max: 5, limit: ThresholdLimit::SeedSets, .. })
        ));
        assert!(Thresholds::plan(4, None, Some(1)).is_err());
        for text in [Thresholds::plan(10, None, None), Thresholds::plan(9, Some(2), None)] {
            assert!(text.unwrap_err().to_string().len() > 20);
        }
    }
}
