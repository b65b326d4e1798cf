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

    #[test]
    fn with_b_silent_a_row_and_the_columns_remain() {
        for (n, masked) in [(9, 1), (16, 2), (25, 3)] {
            let grid = grid(n, Some(masked));
            // The worst case: the silent servers stand in different rows and columns.
            let side = grid.side();
            let alive: ServerSet = grid
                .servers()
                .filter(|s| grid.row_of(*s) != grid.column_of(*s) || grid.row_of(*s) >= usize::from(masked))
                .collect();
            assert_eq!(alive.len(), side * side - usize::from(masked));
            assert!(grid.full_rows(&alive) >= usize::from(grid.thresholds.rows));
            assert!(grid.full_columns(&alive) >= usize::from(grid.thresholds.columns));
        }
    }
}
