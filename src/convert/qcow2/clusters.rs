//! Giving out host clusters, one after the other, and counting them.
//!
//! The first cluster of each range that a refcount block counts is that block (but for the
//! first range, where the header stands before it), so that no more than one block is in
//! memory: once clusters of the next range are given out, it is written.

use crate::convert::output::OutputFile;
use crate::error::{Error, ErrorKind, Result};

/// Entries of a refcount table: QCOW_MAX_REFTABLE_SIZE in QEMU's block/qcow2.h.
const MAX_TABLE_ENTRIES: usize = (8 << 20) / 8;
/// Bytes of a refcount table entry.
const TABLE_ENTRY: u64 = 8;

/// Where the refcount table came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RefcountTable {
    pub(super) offset: u64,
    pub(super) clusters: u32,
}

#[derive(Debug)]
pub(super) struct Clusters<'f> {
    output: OutputFile<'f>,
    cluster_bits: u32,
    refcount_order: u32,
    /// Clusters that a refcount block counts.
    range: u64,
    /// The next cluster that nobody has.
    next: u64,
    /// Of each range up to the last one: where its refcount block is, in bytes.
    table: Vec<u64>,
    /// The last range's refcount block.
    block: Vec<u8>,
}

impl<'f> Clusters<'f> {
    /// The header's cluster, and the first refcount block behind it.
    pub(super) fn new(
        output: OutputFile<'f>,
        cluster_bits: u32,
        refcount_order: u32,
    ) -> Result<Self> {
        let mut clusters = Self {
            output,
            cluster_bits,
            refcount_order,
            range: (8 << cluster_bits) >> refcount_order,
            next: 2,
            table: vec![1 << cluster_bits],
            block: vec![0; 1 << cluster_bits],
        };
        clusters.require_room()?;
        clusters.count(0, 2);
        Ok(clusters)
    }

    /// First byte that nobody has.
    pub(super) fn end(&self) -> u64 {
        self.next << self.cluster_bits
    }

    /// The next cluster that nobody has.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// True where the refcount of `cluster` can still be changed.
    pub(super) fn is_countable(&self, cluster: u64) -> bool {
        cluster / self.range == self.last_range()
    }

    /// One reference more to a cluster that is [countable](Self::is_countable).
    pub(super) fn count_again(&mut self, cluster: u64) {
        let count = self.refcount(cluster);
        self.set_refcount(cluster, count + 1);
    }

    /// True where the refcount of a countable cluster can't be any larger.
    pub(super) fn is_full(&self, cluster: u64) -> bool {
        self.refcount(cluster) == u64::MAX >> (64 - (1u32 << self.refcount_order))
    }

    /// Gives out up to `wanted` clusters that follow each other, at least one: the first of
    /// them, and how many.
    pub(super) fn allocate(&mut self, wanted: u64) -> Result<(u64, u64)> {
        if self.next / self.range != self.last_range() {
            self.write_block()?;
            self.block.fill(0);
            self.push_block(self.next)?;
            self.next += 1;
            self.count(self.next - 1, self.next);
        }
        let first = self.next;
        let count = wanted.min(self.range - first % self.range);
        self.next += count;
        self.require_room()?;
        self.count(first, self.next);
        Ok((first, count))
    }

    /// Gives out `wanted` clusters that follow each other; refcount blocks that they need
    /// come behind them.
    pub(super) fn allocate_contiguous(&mut self, wanted: u64) -> Result<u64> {
        let first = self.next;
        let blocks = self.blocks_behind(wanted);
        let mut counted = first;
        self.next = first + wanted + blocks;
        self.require_room()?;
        for block in first + wanted..self.next {
            let range_end = (self.last_range() + 1) * self.range;
            self.count(counted, range_end);
            counted = range_end;
            self.write_block()?;
            self.block.fill(0);
            self.push_block(block)?;
        }
        self.count(counted, self.next);
        Ok(first)
    }

    /// Writes the last refcount block and the table.
    pub(super) fn finish(&mut self) -> Result<RefcountTable> {
        let per_cluster = (1 << self.cluster_bits) / TABLE_ENTRY;
        let mut clusters = 1;
        loop {
            let entries = self.table.len() as u64 + self.blocks_behind(clusters);
            let needed = entries.div_ceil(per_cluster);
            if needed <= clusters {
                break;
            }
            clusters = needed;
        }
        let first = self.allocate_contiguous(clusters)?;
        self.write_block()?;
        let mut bytes: Vec<u8> = self.table.iter().flat_map(|at| at.to_be_bytes()).collect();
        let length = clusters << self.cluster_bits;
        bytes.resize(usize::try_from(length).unwrap_or(bytes.len()), 0);
        let offset = first << self.cluster_bits;
        self.output.write(offset, &bytes, "the refcount table")?;
        Ok(RefcountTable { offset, clusters: u32::try_from(clusters).unwrap_or(u32::MAX) })
    }

    /// Refcount blocks that have to come behind `wanted` clusters, to count these and
    /// themselves.
    fn blocks_behind(&self, wanted: u64) -> u64 {
        let mut blocks = 0;
        loop {
            let last = (self.next + wanted + blocks).saturating_sub(1) / self.range;
            let needed = last - self.last_range();
            if needed <= blocks {
                return blocks;
            }
            blocks = needed;
        }
    }

    fn last_range(&self) -> u64 {
        self.table.len() as u64 - 1
    }

    fn push_block(&mut self, cluster: u64) -> Result<()> {
        if self.table.len() >= MAX_TABLE_ENTRIES {
            return Err(Error::new(ErrorKind::CannotCreate(format!(
                "the image takes more than {} bytes, which is all that reference counts of {} \
                 bits can count with clusters of {} bytes: take a larger cluster_size",
                (MAX_TABLE_ENTRIES as u64 * self.range) << self.cluster_bits,
                1u32 << self.refcount_order,
                1u64 << self.cluster_bits,
            ))));
        }
        self.table.push(cluster << self.cluster_bits);
        Ok(())
    }

    fn require_room(&self) -> Result<()> {
        self.output.require_room(self.end())
    }

    fn write_block(&self) -> Result<()> {
        let offset = self.table.last().copied().unwrap_or_default();
        self.output.write(offset, &self.block, "a refcount block")
    }

    /// Counts one reference to each of the clusters from `first` up to `end`, which are of
    /// the last range.
    fn count(&mut self, first: u64, end: u64) {
        for cluster in first..end {
            self.set_refcount(cluster, 1);
        }
    }

    /// Where the refcount is in the block: its byte, and the bits to shift by there.
    fn place(&self, cluster: u64) -> (usize, u64) {
        let bit = (cluster % self.range) << self.refcount_order;
        (usize::try_from(bit / 8).unwrap_or(usize::MAX), bit % 8)
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let (at, shift) = self.place(cluster);
        let width = 1usize << self.refcount_order;
        if width < 8 {
            return u64::from(self.block[at]) >> shift & ((1 << width) - 1);
        }
        let bytes = &self.block[at..at + width / 8];
        bytes.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
    }

    fn set_refcount(&mut self, cluster: u64, count: u64) {
        let (at, shift) = self.place(cluster);
        let width = 1usize << self.refcount_order;
        if width < 8 {
            let mask = ((1u8 << width) - 1) << shift;
            let [.., low] = count.to_be_bytes();
            // The first entry's bits are the least significant ones.
            self.block[at] = self.block[at] & !mask | low << shift & mask;
        } else {
            let bytes = width / 8;
            self.block[at..at + bytes].copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_device_holds_as_many_clusters_as_it_has() {
        let file = tempfile::tempfile().unwrap();
        let output = OutputFile::of_device(&file, 10 * 512 + 511);
        let mut clusters = Clusters::new(output, 9, 4).unwrap();
        assert_eq!(clusters.allocate(5).unwrap(), (2, 5));
        assert_eq!(clusters.allocate(3).unwrap(), (7, 3));
        let error = clusters.allocate(1).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error:?}");
        assert!(error.to_string().contains("holds 5631 bytes"), "{error}");
        let error = Clusters::new(OutputFile::of_device(&file, 600), 9, 4).unwrap_err();
        assert!(error.to_string().contains("no smaller than 1024"), "{error}");
    }

    #[test]
    fn more_than_reference_counts_can_count_is_refused() {
        let file = tempfile::tempfile().unwrap();
        let mut clusters = Clusters::new(OutputFile::new(&file).unwrap(), 9, 6).unwrap();
        clusters.table.resize(MAX_TABLE_ENTRIES, 0);
        clusters.next = clusters.table.len() as u64 * clusters.range;
        let error = clusters.allocate(1).unwrap_err();
        assert!(error.to_string().contains("take a larger cluster_size"), "{error}");
    }

    #[test]
    fn a_refcount_can_be_changed_until_its_block_is_written() {
        let file = tempfile::tempfile().unwrap();
        for order in 0..=6 {
            let mut clusters = Clusters::new(OutputFile::new(&file).unwrap(), 9, order).unwrap();
            let (first, _) = clusters.allocate(2).unwrap();
            assert_eq!(clusters.is_full(first), order == 0);
            if order > 0 {
                clusters.count_again(first);
                assert_eq!((clusters.refcount(first), clusters.refcount(first + 1)), (2, 1));
            }
            assert!(clusters.is_countable(first));
            let rest = clusters.range - clusters.next();
            assert_eq!(clusters.allocate(rest + 1).unwrap().1, rest);
            assert!(clusters.is_countable(first));
            // Behind the block that counts it.
            assert_eq!(clusters.allocate(1).unwrap().0, clusters.range + 1);
            assert!(!clusters.is_countable(first));
        }
    }
}
