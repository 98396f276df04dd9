//! Which clusters of the file a structure takes, by QEMU's rules; and how much may be read.

use super::finding::{Finding, FindingKind};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;

/// The largest offset that QEMU reads at, BDRV_MAX_LENGTH in its include/block/block-io.h:
/// 2^63 - 1 rounded down to 1 GiB.
const MAX_LENGTH: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// The image file, measured in clusters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileSize {
    /// Its length in bytes; of a qcow2 in whole sectors of 512.
    pub(crate) bytes: u64,
    pub(crate) cluster_bits: u32,
}

/// Where a structure lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// It takes no cluster.
    Nothing,
    /// It takes these clusters: the first, and how many. At most one of them lies past the
    /// end of the file.
    Clusters(u64, u64),
    /// It ends one cluster or more past the end of the file.
    PastEnd,
    /// QEMU's sum overflows, and it would need a table for more clusters than there can be.
    TooLarge,
}

impl FileSize {
    pub(crate) fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Clusters of the file, the last one perhaps not whole.
    pub(crate) fn clusters(self) -> u64 {
        self.bytes.div_ceil(self.cluster_size())
    }

    /// The rules of qcow2_inc_refcounts_imrt() in QEMU's block/qcow2-refcount.c, which
    /// calculates with signed numbers.
    #[allow(clippy::cast_possible_wrap)]
    #[inline]
    pub(crate) fn extent(self, offset: u64, size: u64) -> Extent {
        if size as i64 <= 0 {
            return Extent::Nothing;
        }
        let end = (offset as i64).wrapping_add(size as i64);
        if end.wrapping_sub(self.bytes as i64) >= self.cluster_size() as i64 {
            return Extent::PastEnd;
        }
        let first = offset >> self.cluster_bits;
        let last = offset.wrapping_add(size - 1) >> self.cluster_bits;
        if first > last {
            return Extent::Nothing; // Its loop ends before it starts.
        }
        if last > self.clusters() {
            return Extent::TooLarge;
        }
        Extent::Clusters(first, last - first + 1)
    }

    /// True where QEMU can read there: past the end of the file it reads zeros.
    pub(crate) fn can_read(offset: u64, length: u64) -> bool {
        offset.checked_add(length).is_some_and(|end| end <= MAX_LENGTH)
    }
}

/// What may be read of tables over and over, besides twice the file.
const EXTRA_WORK: u64 = 1 << 30;
/// What a read costs at least, in bytes: the call takes as long as copying about so much.
const LEAST_READ: u64 = 4096;

/// How much may be read: tables that overlap each other could take forever.
#[derive(Debug)]
pub(crate) struct Budget {
    whole: u64,
    rest: u64,
}

impl Budget {
    /// Enough for any image whose tables do not overlap. A hole can be of any length and
    /// costs its writer nothing, so only what is allocated counts where that is known.
    pub(crate) fn for_file(source: &Source, file: FileSize) -> Self {
        // Of a block device, and of files on some file systems, it says 0.
        let allocated = source.allocated().map_or(0, |allocated| allocated.get());
        let bytes = if allocated == 0 { file.bytes } else { file.bytes.min(allocated) };
        let whole = bytes.saturating_mul(2).saturating_add(EXTRA_WORK);
        Self { whole, rest: whole }
    }

    /// Bytes taken so far.
    pub(crate) fn taken(&self) -> u64 {
        self.whole - self.rest
    }

    /// Notes a read of so many bytes of a table that may be read in small pieces.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub(crate) fn take_read(&mut self, bytes: u64) -> Result<()> {
        self.take(bytes.max(LEAST_READ))
    }

    /// Notes that so many bytes are going to be read.
    ///
    /// # Errors
    /// It is enough (`Unsupported`).
    pub(crate) fn take(&mut self, bytes: u64) -> Result<()> {
        let Some(rest) = self.rest.checked_sub(bytes) else {
            let message = "the tables overlap so often that not all of them are checked";
            return Err(Error::new(ErrorKind::Unsupported(message.to_owned())));
        };
        self.rest = rest;
        Ok(())
    }
}

/// Why tables were not walked to their end: the [`Budget`] is used up, or a read failed.
pub(crate) fn gave_up(error: &Error) -> Finding {
    let kind = match error.kind() {
        ErrorKind::Unsupported(_) => FindingKind::TooMuchWork,
        _ => FindingKind::ReadError,
    };
    Finding::new(kind, error.kind().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_cluster_may_be_half_there() {
        let file = FileSize { bytes: 3 * 4096 + 512, cluster_bits: 12 };
        assert_eq!(file.clusters(), 4);
        assert_eq!(file.extent(3 * 4096, 4096), Extent::Clusters(3, 1));
        // Not aligned, and less than a cluster too far.
        assert_eq!(file.extent(3 * 4096 + 511, 4096), Extent::Clusters(3, 2));
        assert_eq!(file.extent(3 * 4096 + 512, 4096), Extent::PastEnd);
        assert_eq!(file.extent(4 * 4096, 0), Extent::Nothing);
        assert_eq!(file.extent(100, 8192), Extent::Clusters(0, 3));
    }

    #[test]
    fn a_hole_buys_no_work() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 8192]).unwrap();
        file.as_file().set_len(1 << 40).unwrap();
        let source = Source::open(file.path()).unwrap();
        let size = FileSize { bytes: source.length().get(), cluster_bits: 16 };
        let mut budget = Budget::for_file(&source, size);
        budget.take(EXTRA_WORK).unwrap();
        assert!(budget.take(1 << 30).is_err());
        assert_eq!(budget.taken(), EXTRA_WORK);
        // What is in memory has no holes.
        let source = Source::from_bytes("x", vec![0; 8192]);
        let size = FileSize { bytes: 8192, cluster_bits: 9 };
        let mut budget = Budget::for_file(&source, size);
        budget.take(EXTRA_WORK).unwrap();
        budget.take_read(8).unwrap();
        assert_eq!(budget.taken(), EXTRA_WORK + LEAST_READ);
        budget.take_read(3 * LEAST_READ).unwrap();
        assert!(budget.take_read(0).is_err());
    }

    #[test]
    fn sums_that_overflow_are_told_from_those_past_the_end() {
        let file = FileSize { bytes: 1 << 20, cluster_bits: 16 };
        assert_eq!(file.extent((1 << 62) + (1 << 21), 1 << 62), Extent::TooLarge);
        assert_eq!(file.extent(1 << 62, 65536), Extent::PastEnd);
        assert_eq!(file.extent(u64::MAX << 16, 65536), Extent::TooLarge);
        assert_eq!(file.extent(0, u64::MAX), Extent::Nothing);
        assert!(FileSize::can_read(1 << 62, 4096));
        assert!(!FileSize::can_read(i64::MAX as u64 - 4096, 4096));
    }
}
