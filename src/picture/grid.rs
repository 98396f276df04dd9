//! The cells into which a disk is cut to be drawn.

use crate::units::{ByteLen, GuestOffset, GuestRange};

/// A disk in cells of equal length, but for the byte by which they can't be equal: cell
/// `i` of `n` starts at `i * size / n`, rounded down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    size: ByteLen,
    cells: usize,
}

impl Grid {
    /// Cuts a disk of `size` bytes into `cells` cells; into fewer where a cell would hold
    /// no byte.
    pub fn new(size: ByteLen, cells: usize) -> Self {
        let most = usize::try_from(size.get()).unwrap_or(usize::MAX);
        Self { size, cells: cells.max(1).min(most) }
    }

    /// The disk's size.
    pub fn size(&self) -> ByteLen {
        self.size
    }

    /// How many cells there are; none of a disk of no bytes.
    pub fn cells(&self) -> usize {
        self.cells
    }

    /// Where cell `index` starts; the disk's end for any past the last.
    pub fn start(&self, index: usize) -> GuestOffset {
        if index >= self.cells {
            return GuestOffset::new(self.size.get());
        }
        // Below the size, as the index is below the cells.
        let start = index as u128 * u128::from(self.size.get()) / self.cells as u128;
        GuestOffset::new(u64::try_from(start).unwrap_or(u64::MAX))
    }

    /// The range of cell `index`.
    pub fn range(&self, index: usize) -> GuestRange {
        GuestRange::new(self.start(index), self.start(index.saturating_add(1)))
    }

    /// The cell that holds the byte at `offset`; the number of cells past the disk's end.
    pub fn cell_at(&self, offset: GuestOffset) -> usize {
        if offset.get() >= self.size.get() {
            return self.cells;
        }
        // The last index whose start is not past the offset: index * size / cells is below
        // offset + 1 exactly for the indexes below (offset + 1) * cells / size.
        let past = (u128::from(offset.get()) + 1) * self.cells as u128;
        usize::try_from((past - 1) / u128::from(self.size.get())).unwrap_or(self.cells)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_disk_of_nothing_has_no_cell() {
        let grid = Grid::new(ByteLen::ZERO, 60);
        assert_eq!(grid.cells(), 0);
        assert_eq!(grid.cell_at(GuestOffset::ZERO), 0);
        assert!(grid.range(0).is_empty());
    }

    proptest! {
        #[test]
        fn cells_cover_the_disk_without_gap_and_are_found_by_their_bytes(
            size in prop_oneof![1..5000u64, 1..=i64::MAX.unsigned_abs()],
            cells in 1..2000usize,
        ) {
            let grid = Grid::new(ByteLen::new(size), cells);
            let mut at = GuestOffset::ZERO;
            for index in 0..grid.cells() {
                let range = grid.range(index);
                prop_assert_eq!(range.start, at);
                prop_assert!(!range.is_empty());
                prop_assert_eq!(grid.cell_at(range.start), index);
                prop_assert_eq!(grid.cell_at(GuestOffset::new(range.end.get() - 1)), index);
                at = range.end;
            }
            prop_assert_eq!(at.get(), size);
            prop_assert_eq!(grid.cell_at(at), grid.cells());
        }
    }
}
