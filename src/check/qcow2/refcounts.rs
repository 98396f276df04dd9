//! The refcounts that the image says: the refcount table and its blocks, compared with the
//! references that there are.

use rayon::prelude::*;

use super::image::Image;
use crate::check::extent::FileSize;
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::{Log, Tally};
use crate::check::references::{
    Counters, ExactCounters, LANES, References, SATURATED, has_shared, lane,
};
use crate::error::Result;
use crate::units::HostOffset;

/// REFT_RESERVED_MASK in QEMU's block/qcow2.h.
const RESERVED: u64 = 0x1ff;
/// What [`Counters`] hold once a cluster was compared: its refcount, 0, 1, more...
pub(super) const MORE: u64 = 2;
/// ... or that its block can't be read.
pub(super) const UNREADABLE: u64 = 3;
/// Refcount blocks that a worker takes at a time.
const BLOCKS_A_WORKER: u64 = 4;

/// The refcount table.
#[derive(Debug)]
pub(super) struct Refcounts {
    table: Vec<u64>,
    order: u32,
    /// Refcounts of a block: a power of two, at least 64.
    block_entries: u64,
}

/// Where the refcount of a cluster is.
enum Block {
    /// Nowhere: it is 0.
    None,
    /// In this block.
    At(u64),
    /// In a block that QEMU can't read.
    Unreadable(u64),
}

impl Refcounts {
    /// Reads the table, which is at most 8 MiB.
    ///
    /// # Errors
    /// The read failed.
    pub(super) fn read(image: &Image<'_>) -> Result<Self> {
        let location = image.header.refcount_table;
        let entries = usize::try_from(location.length.get() / 8).unwrap_or(0);
        Ok(Self {
            table: image.read_entries(location.offset.get(), entries)?,
            order: image.header.refcount_order,
            block_entries: (image.cluster_size() * 8) >> image.header.refcount_order,
        })
    }

    /// The largest refcount that the width allows.
    pub(super) fn max(&self) -> u64 {
        u64::MAX >> (64 - (1 << self.order))
    }

    fn block(&self, image: &Image<'_>, index: u64) -> Block {
        let entry = usize::try_from(index).ok().and_then(|index| self.table.get(index));
        let offset = entry.map_or(0, |entry| entry & !RESERVED);
        if offset == 0 {
            Block::None
        } else if offset.is_multiple_of(image.cluster_size())
            && FileSize::can_read(offset, image.cluster_size())
        {
            Block::At(offset)
        } else {
            Block::Unreadable(offset)
        }
    }

    /// The refcount of any cluster; `None` where it can't be read.
    pub(super) fn of_cluster(&self, image: &Image<'_>, cluster: u64) -> Option<u64> {
        let block = match self.block(image, cluster / self.block_entries) {
            Block::None => return Some(0),
            Block::At(offset) => offset,
            Block::Unreadable(_) => return None,
        };
        let bit = (cluster % self.block_entries) << self.order;
        // The 8 bytes that hold it, wherever it starts in them.
        let mut bytes = [0; 8];
        image.read(block + bit / 64 * 8, &mut bytes).ok()?;
        Some(self.entry(&bytes, (bit % 64) >> self.order))
    }

    /// Entry `index` of a piece of a refcount block; 0 where the piece ends before.
    fn entry(&self, piece: &[u8], index: u64) -> u64 {
        let bit = index << self.order;
        let at = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        if self.order < 3 {
            let byte = piece.get(at).copied().unwrap_or(0);
            return u64::from(byte) >> (bit % 8) & self.max();
        }
        let bytes = piece.get(at..at + (1 << (self.order - 3))).unwrap_or_default();
        bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// Notes the refcount blocks, as check_refblocks() in QEMU's block/qcow2-refcount.c; all
    /// other references have to be counted by now.
    pub(super) fn refer_to_blocks<R: References>(
        &self,
        image: &Image<'_>,
        refs: &R,
        log: &mut Log<'_>,
    ) {
        let mut tally = log.tally();
        // An entry that lies less than a cluster past the end of the file counts as inside
        // of it where something else was found to end there.
        let past_end = image.file.clusters();
        let clusters = past_end + u64::from(refs.count(past_end) > 0);
        let table = Place::new(Table::RefcountTable, image.header.refcount_table.offset);
        for (index, &entry) in (0u64..).zip(&self.table) {
            if entry == 0 {
                continue;
            }
            log.absorb_if_full(&mut tally);
            let place = table.entry(index);
            let offset = entry & !RESERVED;
            let mut found = |kind, message: String| {
                tally.push(Finding::new(kind, message).place(place));
            };
            if entry & RESERVED != 0 {
                let message = format!("reserved bits are set in the entry {entry:#018x}");
                found(FindingKind::RefcountTableReservedBits, message);
                continue;
            }
            if !offset.is_multiple_of(image.cluster_size()) {
                let message =
                    format!("the refcount block is at {offset:#x}, on no cluster boundary");
                found(FindingKind::RefcountBlockUnaligned, message);
                continue;
            }
            let cluster = offset >> image.file.cluster_bits;
            if cluster >= clusters {
                let message =
                    format!("the refcount block is at {offset:#x}, past the end of the file");
                found(FindingKind::RefcountBlockPastFileEnd, message);
                continue;
            }
            image.refer(refs, &mut tally, (offset, image.cluster_size(), 1), || {
                Finding::new(FindingKind::PastFileEnd, "the refcount block").place(place)
            });
            if refs.count(cluster).min(self.max()) != 1 {
                let message = format!("something else uses the refcount block at {offset:#x}");
                let kind = FindingKind::RefcountBlockShared;
                tally.push(
                    Finding::new(kind, message).place(place).host(offset, image.cluster_size()),
                );
            }
        }
        log.absorb(tally);
    }
}

/// What a comparison comes to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Compared {
    /// The last cluster that has a refcount or a reference.
    pub(super) highest: Option<u64>,
    /// Some cluster has more than one reference.
    pub(super) some_shared: bool,
}

impl Compared {
    fn add(&mut self, other: Self) {
        self.highest = self.highest.max(other.highest);
        self.some_shared |= other.some_shared;
    }
}

/// Compares refcounts and references of the first `clusters` clusters, as compare_refcounts()
/// in QEMU's block/qcow2-refcount.c, and puts the refcounts in the place of the references
/// in `counters`: 0, 1, [`MORE`] or [`UNREADABLE`]. Those that have 3 references or more are
/// [compared](compare_saturated) before.
pub(super) fn compare(
    image: &Image<'_>,
    refcounts: &Refcounts,
    counters: &Counters,
    clusters: u64,
    log: &mut Log<'_>,
) -> Compared {
    let blocks = clusters.div_ceil(refcounts.block_entries);
    if log.is_unlimited() {
        // One after the other: a single block may have millions of findings.
        let mut comparison = Comparison::new(image, refcounts, counters, log.tally());
        for block in 0..blocks {
            comparison.block(block, clusters, &mut |tally| log.absorb_if_full(tally));
        }
        log.absorb(comparison.tally);
        return comparison.compared;
    }
    let a_worker = BLOCKS_A_WORKER;
    let a_round = a_worker * 4 * rayon::current_num_threads() as u64;
    let limit = log.limit();
    let mut total = Compared::default();
    let mut start = 0;
    while start < blocks {
        let end = blocks.min(start + a_round);
        let parts: Vec<u64> =
            (start..end).step_by(usize::try_from(a_worker).unwrap_or(1)).collect();
        let results: Vec<_> = parts
            .par_iter()
            .map(|&first| {
                let tally = Tally::new(limit);
                let mut comparison = Comparison::new(image, refcounts, counters, tally);
                for block in first..(first + a_worker).min(end) {
                    comparison.block(block, clusters, &mut |_| {});
                }
                (comparison.compared, comparison.tally)
            })
            .collect();
        for (compared, tally) in results {
            total.add(compared);
            log.absorb(tally);
        }
        start = end;
    }
    total
}

struct Comparison<'c> {
    image: &'c Image<'c>,
    refcounts: &'c Refcounts,
    counters: &'c Counters,
    tally: Tally,
    compared: Compared,
    buffer: Vec<u8>,
    /// Clusters side by side with the same refcount and references.
    run: Option<Mismatch>,
}

/// Clusters whose refcount is not the number of their references.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Mismatch {
    first: u64,
    count: u64,
    refcount: u64,
    references: u64,
    /// The block that says so, where there is one.
    block: Option<u64>,
}

impl Mismatch {
    fn note(self, image: &Image<'_>, block_entries: u64, tally: &mut Tally) {
        let Self { first, count, refcount, references, block } = self;
        let (kind, what) = if refcount < references {
            (FindingKind::RefcountTooLow, "has")
        } else {
            (FindingKind::LeakedClusters, "leaks")
        };
        tally.add(kind, count, || {
            let clusters = if count == 1 { "the cluster" } else { "each of the clusters" };
            let message =
                format!("{clusters} {what}: refcount {refcount}, references {references}");
            let place = match block {
                Some(block) => Place::new(Table::RefcountBlock, HostOffset::new(block))
                    .entry(first % block_entries),
                None => Place::new(Table::RefcountTable, image.header.refcount_table.offset)
                    .entry(first / block_entries),
            };
            let size = count << image.file.cluster_bits;
            Finding::new(kind, message).place(place).host(first << image.file.cluster_bits, size)
        });
    }
}

/// Notes references that a refcount of this width can't hold.
fn note_overflow(image: &Image<'_>, tally: &mut Tally, cluster: u64, references: u64, max: u64) {
    let Some(over) = references.checked_sub(max).filter(|&over| over > 0) else { return };
    let kind = FindingKind::RefcountOverflow;
    tally.add(kind, over, || {
        let message = format!("{references} references, and a refcount holds {max} at most");
        Finding::new(kind, message).host(cluster << image.file.cluster_bits, image.cluster_size())
    });
}

impl<'c> Comparison<'c> {
    fn new(
        image: &'c Image<'c>,
        refcounts: &'c Refcounts,
        counters: &'c Counters,
        tally: Tally,
    ) -> Self {
        let (buffer, run) = (Vec::new(), None);
        Self { image, refcounts, counters, tally, compared: Compared::default(), buffer, run }
    }

    /// Those of the first `clusters` clusters that one refcount block describes. `tell` may
    /// take what the tally keeps.
    fn block(&mut self, index: u64, clusters: u64, tell: &mut impl FnMut(&mut Tally)) {
        let first = index * self.refcounts.block_entries;
        let count = self.refcounts.block_entries.min(clusters - first);
        let bytes = (count << self.refcounts.order).div_ceil(8);
        let mut buffer = std::mem::take(&mut self.buffer);
        let block = match self.refcounts.block(self.image, index) {
            Block::None => None,
            Block::Unreadable(offset) => {
                return self.unreadable(index, (first, count), offset, tell);
            }
            Block::At(offset) => {
                buffer.resize(usize::try_from(bytes).unwrap_or(0), 0);
                if self.image.read(offset, &mut buffer).is_err() {
                    return self.unreadable(index, (first, count), offset, tell);
                }
                Some(offset)
            }
        };
        let words = count.div_ceil(LANES);
        // The bytes of a block that have 32 refcounts.
        let piece = usize::try_from(LANES << self.refcounts.order >> 3).unwrap_or(4);
        for number in 0..words {
            let word = first / LANES + number;
            let references = self.counters.word(word);
            let clusters = LANES.min(count - number * LANES);
            let refcounts = match block {
                None => &[][..],
                Some(_) => {
                    let start = usize::try_from(number).unwrap_or(0) * piece;
                    buffer.get(start..buffer.len().min(start + piece)).unwrap_or_default()
                }
            };
            self.word(word, clusters, references, refcounts, block);
            tell(&mut self.tally);
        }
        self.flush();
        self.buffer = buffer;
    }

    /// Up to 32 clusters.
    #[inline]
    fn word(
        &mut self,
        word: u64,
        clusters: u64,
        references: u64,
        refcounts: &[u8],
        block: Option<u64>,
    ) {
        let first = word * LANES;
        if references == 0 && refcounts.iter().all(|&byte| byte == 0) {
            self.flush();
            return; // Nothing here: the refcounts are 0 too.
        }
        // All in use once, in the usual width.
        const ALL_ONE: [u8; 64] = {
            let mut bytes = [0; 64];
            let mut at = 1;
            while at < 64 {
                bytes[at] = 1;
                at += 2;
            }
            bytes
        };
        if references == 0x5555_5555_5555_5555 && self.refcounts.order == 4 && refcounts == ALL_ONE
        {
            self.compared.highest = Some(first + LANES - 1);
            self.flush();
            return;
        }
        self.compared.some_shared |= has_shared(references);
        let max = self.refcounts.max();
        let mut said = 0;
        for number in 0..clusters {
            let cluster = first + number;
            let refcount = self.refcounts.entry(refcounts, number);
            let counted = lane(references, number);
            said |= refcount.min(MORE) << (2 * number);
            if refcount > 0 || counted > 0 {
                self.compared.highest = Some(cluster);
            }
            if counted == SATURATED {
                self.flush();
                continue; // Was compared before.
            }
            note_overflow(self.image, &mut self.tally, cluster, counted, max);
            let references = counted.min(max);
            if refcount == references {
                self.flush();
            } else {
                self.mismatch(Mismatch { first: cluster, count: 1, refcount, references, block });
            }
        }
        self.counters.set_word(word, said);
    }

    fn mismatch(&mut self, new: Mismatch) {
        match &mut self.run {
            Some(run)
                if (Mismatch { first: new.first, count: 1, ..*run }) == new
                    && run.first + run.count == new.first =>
            {
                run.count += 1;
            }
            _ => {
                self.flush();
                self.run = Some(new);
            }
        }
    }

    #[inline]
    fn flush(&mut self) {
        if let Some(run) = self.run.take() {
            run.note(self.image, self.refcounts.block_entries, &mut self.tally);
        }
    }

    fn unreadable(
        &mut self,
        index: u64,
        (first, count): (u64, u64),
        offset: u64,
        tell: &mut impl FnMut(&mut Tally),
    ) {
        let kind = FindingKind::RefcountUnreadable;
        self.tally.add(kind, count, || {
            let place = Place::new(Table::RefcountTable, self.image.header.refcount_table.offset);
            let message = format!("the refcount block at {offset:#x} cannot be read");
            Finding::new(kind, message)
                .place(place.entry(index))
                .host(first << self.image.file.cluster_bits, count << self.image.file.cluster_bits)
        });
        for word in first / LANES..(first + count).div_ceil(LANES) {
            let references = self.counters.word(word);
            if has_shared(references) {
                self.compared.some_shared = true;
                for number in 0..LANES {
                    let counted = lane(references, number);
                    if counted < SATURATED {
                        let (cluster, max) = (word * LANES + number, self.refcounts.max());
                        note_overflow(self.image, &mut self.tally, cluster, counted, max);
                    }
                }
            }
            self.counters.set_word(word, u64::MAX);
            tell(&mut self.tally);
        }
    }
}

/// Compares the refcounts of clusters that have 3 references or more.
pub(super) fn compare_saturated(
    image: &Image<'_>,
    refcounts: &Refcounts,
    counters: &Counters,
    exact: &ExactCounters,
    log: &mut Log<'_>,
) {
    let max = refcounts.max();
    let mut block: Option<(u64, Option<Vec<u8>>)> = None;
    for (cluster, references) in exact.saturated(counters) {
        let index = cluster / refcounts.block_entries;
        if block.as_ref().is_none_or(|(read, _)| *read != index) {
            let bytes = match refcounts.block(image, index) {
                Block::None => Some(Vec::new()),
                Block::Unreadable(_) => None,
                Block::At(offset) => {
                    let length = usize::try_from(image.cluster_size()).unwrap_or(0);
                    let mut bytes = vec![0; length];
                    image.read(offset, &mut bytes).ok().map(|()| bytes)
                }
            };
            block = Some((index, bytes));
        }
        let mut tally = log.tally();
        note_overflow(image, &mut tally, cluster, references, max);
        // One that can't be read is noted with its whole block.
        if let Some((_, Some(bytes))) = &block {
            let refcount = refcounts.entry(bytes, cluster % refcounts.block_entries);
            let references = references.min(max);
            if refcount != references {
                let block = match refcounts.block(image, index) {
                    Block::At(offset) => Some(offset),
                    _ => None,
                };
                let mismatch = Mismatch { first: cluster, count: 1, refcount, references, block };
                mismatch.note(image, refcounts.block_entries, &mut tally);
            }
        }
        log.absorb(tally);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refcounts(order: u32) -> Refcounts {
        Refcounts { table: Vec::new(), order, block_entries: 64 }
    }

    #[test]
    fn refcounts_of_every_width_are_read() {
        assert_eq!(refcounts(0).entry(&[0b0000_0100], 2), 1);
        assert_eq!(refcounts(0).entry(&[0b0000_0100], 3), 0);
        assert_eq!(refcounts(1).entry(&[0, 0b1100_0001], 7), 3);
        assert_eq!(refcounts(2).entry(&[0xf0], 1), 15);
        assert_eq!(refcounts(3).entry(&[1, 200], 1), 200);
        assert_eq!(refcounts(4).entry(&[0, 1, 2, 3], 1), 0x203);
        assert_eq!(refcounts(5).entry(&[0, 0, 1, 1], 0), 0x101);
        assert_eq!(refcounts(6).entry(&[1, 0, 0, 0, 0, 0, 0, 2], 0), (1 << 56) + 2);
        assert_eq!(refcounts(4).entry(&[0, 1], 1), 0);
        assert_eq!((refcounts(0).max(), refcounts(1).max()), (1, 3));
        assert_eq!((refcounts(4).max(), refcounts(6).max()), (65535, u64::MAX));
    }
}
