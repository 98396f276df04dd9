//! The image under check, and reading it as QEMU does: past the end of the file are zeros.

use crate::check::extent::{Extent, FileSize};
use crate::check::finding::{Finding, FindingKind, Place};
use crate::check::log::Tally;
use crate::check::references::References;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Qcow2Header;
use crate::format::qcow2::entry::L2Format;
use crate::source::{Allocation, Source};
use crate::units::{HostOffset, SECTOR_SIZE};

/// Host bytes of an L1 or standard L2 entry.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster's refcount is 1 (QCOW_OFLAG_COPIED).
pub(super) const COPIED: u64 = 1 << 63;

/// What all parts of a check look at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image<'s> {
    pub(super) source: &'s Source,
    pub(super) header: &'s Qcow2Header,
    pub(super) file: FileSize,
    pub(super) format: L2Format,
}

impl<'s> Image<'s> {
    pub(super) fn new(source: &'s Source, header: &'s Qcow2Header) -> Self {
        // QEMU's bdrv_getlength() gives whole sectors.
        let bytes = source.length().get().div_ceil(SECTOR_SIZE).saturating_mul(SECTOR_SIZE);
        let file = FileSize { bytes, cluster_bits: header.cluster_bits };
        Self { source, header, file, format: L2Format::of(header) }
    }

    pub(super) fn cluster_size(&self) -> u64 {
        self.file.cluster_size()
    }

    /// Fills `buffer` from `offset` on, with zeros past the end of the file.
    ///
    /// # Errors
    /// The read failed, or QEMU reads nothing so far out.
    pub(super) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if !FileSize::can_read(offset, buffer.len() as u64) {
            let message = "no file reaches so far".to_owned();
            return Err(Error::new(ErrorKind::Io(message)).at_offset(offset));
        }
        let read = self.source.read_up_to(HostOffset::new(offset), buffer)?;
        buffer[read..].fill(0);
        Ok(())
    }

    /// The big-endian numbers of a table.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn read_entries(&self, offset: u64, entries: usize) -> Result<Vec<u64>> {
        let mut bytes = vec![0; entries.saturating_mul(8)];
        self.read(offset, &mut bytes)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|&entry| u64::from_be_bytes(entry)).collect())
    }

    /// Notes that a structure of `size` bytes at `offset` is used `weight` times; `what`
    /// describes it where it can't be.
    pub(super) fn refer<R: References>(
        &self,
        refs: &R,
        tally: &mut Tally,
        (offset, size, weight): (u64, u64, u64),
        what: impl FnOnce() -> Finding,
    ) {
        let (kind, message) = match self.file.extent(offset, size) {
            Extent::Nothing => return,
            Extent::Clusters(first, count) => return refs.add(first, count, weight),
            Extent::PastEnd => (FindingKind::PastFileEnd, "ends past the end of the file"),
            Extent::TooLarge => {
                (FindingKind::OffsetTooLarge, "lies where no file can have anything")
            }
        };
        tally.add(kind, weight, || {
            let what = what();
            Finding { kind, message: format!("{} {message}", what.message), ..what }
                .host(offset, size)
        });
    }

    /// A read error, as a finding.
    pub(super) fn unreadable(&self, what: &str, place: Place, error: &Error) -> Finding {
        Finding::new(FindingKind::ReadError, format!("{what} cannot be read: {}", error.kind()))
            .place(place)
    }
}

/// Remembers what is data and what a hole of the file, so that tables in holes, which say
/// nothing, need not be read.
#[derive(Debug, Default)]
pub(super) struct Holes {
    /// Where the data end that were found last.
    data: (u64, u64),
}

impl Holes {
    /// True where all bytes of the range are a hole or past the end of the file.
    pub(super) fn cover(&mut self, source: &Source, offset: u64, length: u64) -> bool {
        if offset >= source.length().get() {
            return true;
        }
        let end = offset.saturating_add(length);
        if self.data.0 <= offset && end <= self.data.1 {
            return false;
        }
        match source.allocation(HostOffset::new(offset)) {
            Allocation::Data { until } => {
                self.data = (offset, until.get());
                false
            }
            Allocation::Hole { until } => until.is_none_or(|until| until.get() >= end),
        }
    }
}
