//! The grid: which servers form rows and columns, and when an access is complete (design §2).

use crate::ids::{ServerId, ServerSet};
use crate::thresholds::Thresholds;

/// An m×m grid with its completion rules. Server i stands in row i / m and column i mod m.
#[derive(Clone, Copy, Debug)]
pub struct Grid {
    thresholds: Thresholds,
}

impl Grid {
    /// The grid of a cluster.
    pub fn new(thresholds: Thresholds) -> Self {
        Self { thresholds }
    }

    /// The numbers of the cluster.
    pub fn thresholds(&self) -> &Thresholds {
        &self.thresholds
    }
    /// m.
    pub fn side(&self) -> usize {
        usize::from(self.thresholds.side)
    }
    /// All servers.
    pub fn servers(&self) -> impl Iterator<Item = ServerId> + use<> {
        (0..self.thresholds.servers as u8).map(ServerId)
    }
    /// The row of a server.
    pub fn row_of(&self, server: ServerId) -> usize {
        server.index() / self.side()
    }
    /// The column of a server.
    pub fn column_of(&self, server: ServerId) -> usize {
        server.index() % self.side()
    }
    /// The members of a row.
    pub fn row(&self, row: usize) -> impl Iterator<Item = ServerId> + use<> {
        let side = self.side();
        (0..side).map(move |column| ServerId((row * side + column) as u8))
    }
    /// The members of a column.
    pub fn column(&self, column: usize) -> impl Iterator<Item = ServerId> + use<> {
        let side = self.side();
        (0..side).map(move |row| ServerId((row * side + column) as u8))
    }
    /// Rows whose members are all in the set.
    pub fn full_rows(&self, set: &ServerSet) -> usize {
        (0..self.side()).filter(|&row| self.row(row).all(|server| set.contains(server))).count()
    }
    /// Columns whose members are all in the set.
    pub fn full_columns(&self, set: &ServerSet) -> usize {
        (0..self.side()).filter(|&column| self.column(column).all(|server| set.contains(server))).count()
    }

    /// A write is complete when servers that hold it cover c full columns **and** number q.
    pub fn write_is_complete(&self, holders: &ServerSet) -> bool {
        holders.len() >= self.thresholds.q()
            && self.full_columns(holders) >= usize::from(self.thresholds.columns)
    }
    /// A read is complete when its verified answers cover r full rows **or** number q. Where the
    /// grid masks nobody (b = 0) a row is never enough.
    pub fn read_is_complete(&self, answered: &ServerSet) -> bool {
        answered.len() >= self.thresholds.q()
            || (self.thresholds.masked > 0 && self.full_rows(answered) >= usize::from(self.thresholds.rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(n: usize, masked: Option<u16>) -> Grid {
        Grid::new(Thresholds::plan(n, masked, None).unwrap())
    }

    fn subset(bits: u32) -> ServerSet {
        (0..32).filter(|i| bits & (1 << i) != 0).map(ServerId).collect()
    }

    /// BQS's consistency for dissemination systems, on every pair of sets: a complete read and a
    /// complete write share at least b+1 servers (f+1 when the read went to q servers).
    #[test]
    fn complete_reads_meet_complete_writes_beyond_the_liars() {
        for n in [4usize, 9] {
            let grid = grid(n, None);
            let all = 1u32 << n;
            let reads: Vec<u32> = (0..all).filter(|&s| grid.read_is_complete(&subset(s))).collect();
            let writes: Vec<u32> = (0..all).filter(|&s| grid.write_is_complete(&subset(s))).collect();
            assert!(!reads.is_empty() && !writes.is_empty());
            let masked = u32::from(grid.thresholds.masked.max(u16::from(n == 4)));
            for read in &reads {
                for write in &writes {
                    assert!((read & write).count_ones() > masked, "n={n} read={read:b} write={write:b}");
                }
            }
        }
    }

    /// All sets of `size` of the first `n` servers.
    fn sets_of(n: usize, size: usize) -> impl Iterator<Item = u32> {
        (0..1u32 << n).filter(move |set| set.count_ones() as usize == size)
    }
    /// The sets that satisfy a rule and of which no part does.
    fn smallest(n: usize, rule: impl Fn(&ServerSet) -> bool) -> Vec<u32> {
        let without_any =
            |set: u32| (0..n as u32).filter(move |i| set & (1 << i) != 0).map(move |i| set & !(1 << i));
        (0..1u32 << n)
            .filter(|&set| rule(&subset(set)) && !without_any(set).any(|part| rule(&subset(part))))
            .collect()
    }

    /// Every pair of accesses, every set of b liars, for m = 2…4: among the servers that a read and a write
    /// share is one that does not lie. Larger accesses share no fewer, so the smallest ones suffice.
    #[test]
    fn whoever_lies_a_read_meets_an_honest_holder() {
        for (n, masked) in [(4usize, None), (9, Some(1)), (9, Some(0)), (16, Some(1)), (16, Some(2))] {
            let grid = grid(n, masked);
            let liars = match grid.thresholds.masked {
                0 => grid.thresholds.f(),
                b => usize::from(b),
            };
            let reads = smallest(n, |set| grid.read_is_complete(set));
            let writes = smallest(n, |set| grid.write_is_complete(set));
            let liar_sets: Vec<u32> = sets_of(n, liars).collect();
            // What both sides share, once each: there are far fewer of them than pairs.
            let shared: std::collections::BTreeSet<u32> =
                reads.iter().flat_map(|read| writes.iter().map(move |write| read & write)).collect();
            for both in &shared {
                assert!(liar_sets.iter().all(|lying| both & !lying != 0), "n={n} b={liars} share {both:b}");
            }
            // And it is tight where rows are used: with one liar more some pair shares liars only.
            if grid.thresholds.masked > 0 {
                let more = usize::from(grid.thresholds.rows * grid.thresholds.columns);
                assert!(sets_of(n, more).any(|lying| shared.iter().any(|both| both & !lying == 0)));
            }
        }
    }

    /// Every read of q servers meets every complete write beyond f liars, every certificate too; and two
    /// quorums share an honest server (PBFT §4.1).
    #[test]
    fn quorum_reads_meet_everything_beyond_f_liars() {
        for n in [4usize, 9, 16] {
            let grid = grid(n, None);
            let (q, f) = (grid.thresholds.q(), grid.thresholds.f());
            let writes = smallest(n, |set| grid.write_is_complete(set));
            for read in sets_of(n, q) {
                assert!(writes.iter().all(|write| (read & write).count_ones() as usize > f), "n={n}");
            }
        }
    }

    /// Whichever b servers are silent, or any fewer, a complete read and a complete write remain.
    #[test]
    fn whoever_is_silent_accesses_remain() {
        for (n, masked) in [(4usize, 1), (9, 1), (16, 1), (16, 2)] {
            let grid = grid(n, Some(masked).filter(|_| n > 4));
            for silent in sets_of(n, usize::from(masked)) {
                let alive = subset(((1u32 << n) - 1) & !silent);
                assert!(grid.read_is_complete(&alive), "n={n} silent={silent:b}");
                // At n = 4 a silent server stands in one column; the other is full, and q are left.
                assert!(grid.write_is_complete(&alive), "n={n} silent={silent:b}");
                if grid.thresholds.masked > 0 {
                    assert!(grid.full_rows(&alive) >= usize::from(grid.thresholds.rows), "rows, not only q");
                }
            }
        }
    }

    proptest::proptest! {
        /// The same for larger grids, on random accesses and liars.
        #[test]
        fn accesses_of_larger_grids_meet_beyond_the_liars(
            side in 5usize..=15,
            masked in 1u16..=7,
            seed in proptest::prelude::any::<u64>(),
        ) {
            use rand::seq::SliceRandom as _;
            use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
            let Ok(thresholds) = Thresholds::plan(side * side, Some(masked), None) else { return Ok(()) };
            let grid = Grid::new(thresholds);
            let mut rng = StdRng::seed_from_u64(seed);
            let mut access = |complete: &dyn Fn(&ServerSet) -> bool, whole: &dyn Fn(usize) -> Vec<ServerId>| {
                // Whole lines first, or single servers: accesses of both kinds.
                let mut lines: Vec<usize> = (0..side).collect();
                lines.shuffle(&mut rng);
                let mut servers: Vec<ServerId> = grid.servers().collect();
                servers.shuffle(&mut rng);
                let from_lines = lines.into_iter().flat_map(whole);
                let order: Vec<_> = match rng.random_bool(0.5) {
                    true => from_lines.chain(servers).collect(),
                    false => servers,
                };
                let mut set = ServerSet::default();
                for server in order {
                    if complete(&set) {
                        break;
                    }
                    set.insert(server);
                }
                set
            };
            let read = access(&|set| grid.read_is_complete(set), &|row| grid.row(row).collect());
            let write = access(&|set| grid.write_is_complete(set), &|column| grid.column(column).collect());
            let both = read.iter().filter(|server| write.contains(*server)).count();
            proptest::prop_assert!(both > usize::from(masked), "{both} shared, {masked} masked");
        }
    }

    #[test]
    fn a_plain_row_is_never_enough_where_the_grid_masks_nobody() {
        let grid = grid(4, None);
        assert!(!grid.read_is_complete(&grid.row(0).collect()));
        assert!(grid.read_is_complete(&subset(0b0111)));
    }

    #[test]
    fn a_write_needs_both_columns_and_a_quorum() {
        let grid = grid(9, None);
        let two_columns: ServerSet = grid.column(0).chain(grid.column(1)).collect();
        assert!(grid.write_is_complete(&two_columns));
        let six_without_columns = subset(0b011_011_110);
        assert_eq!(six_without_columns.len(), 6);
        assert!(!grid.write_is_complete(&six_without_columns));
    }
}
