//! cow: whether the sectors that the bitmap says are in the file are in it.

use super::finding::{Finding, FindingKind, Place, Table};
use super::log::{Log, Tally};
use super::{Numbers, Report};
use crate::error::Result;
use crate::format::Format;
use crate::format::cow::{CowHeader, bit_run};
use crate::source::Source;
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

/// Bytes of the bitmap that are read at a time.
const CHUNK: u64 = 64 << 10;

/// Checks a cow image. Its clusters are the sectors.
///
/// # Errors
/// What [`CowHeader::parse`] says, and thereby a bitmap that is not in the file.
pub(super) fn check(source: &Source, log: &mut Log<'_>) -> Result<Report> {
    let mut start = [0; CowHeader::MAX_LENGTH];
    let length = source.read_up_to(HostOffset::ZERO, &mut start)?;
    let header = CowHeader::parse(&start[..length], source.length())?;
    let sectors = header.virtual_size().get() / SECTOR_SIZE;
    let mut numbers = Numbers {
        total_clusters: sectors,
        image_end_offset: header.data_offset().get(),
        ..Numbers::default()
    };
    let bytes = header.bitmap_length().get();
    let mut first = 0;
    let mut buffer = Vec::new();
    while first < bytes {
        let here = CHUNK.min(bytes - first);
        buffer.resize(usize::try_from(here).unwrap_or(0), 0);
        let offset = header.bitmap_offset().saturating_add(ByteLen::new(first));
        let mut tally = log.tally();
        match source.read_exact(offset, &mut buffer, "the bitmap") {
            Ok(()) => {
                let part = Part { source, header: &header, sectors, first_sector: first * 8 };
                part.check(&buffer, &mut numbers, &mut tally);
            }
            Err(error) => {
                let place = Place::new(Table::Bitmap, header.bitmap_offset());
                tally.push(
                    Finding::new(FindingKind::ReadError, error.kind().to_string()).place(place),
                );
            }
        }
        log.absorb(tally);
        first += here;
    }
    Ok(Report::new(Format::Cow, numbers, log))
}

/// A part of the bitmap.
struct Part<'p> {
    source: &'p Source,
    header: &'p CowHeader,
    /// Sectors of the disk.
    sectors: u64,
    first_sector: u64,
}

impl Part<'_> {
    fn check(&self, bitmap: &[u8], numbers: &mut Numbers, tally: &mut Tally) {
        let bits = bitmap.len() * 8;
        let mut bit = 0;
        while bit < bits {
            let (set, count) = bit_run(bitmap, bit, bits);
            let start = self.first_sector + bit as u64;
            bit += count;
            if set {
                self.run(start, start + count as u64, numbers, tally);
            }
        }
    }

    /// The sectors from `start` up to `end`, which the bitmap says are in the file.
    fn run(&self, start: u64, end: u64, numbers: &mut Numbers, tally: &mut Tally) {
        let on_disk = end.min(self.sectors).max(start);
        if on_disk < end {
            let first = start.max(self.sectors);
            tally.add(FindingKind::StrayBits, end - first, || {
                let message = "bits are set for sectors past the end of the disk";
                Finding::new(FindingKind::StrayBits, message).place(self.place(first))
            });
        }
        if on_disk == start {
            return;
        }
        numbers.allocated_clusters += on_disk - start;
        let data = self.header.data_offset().get();
        numbers.image_end_offset = data + on_disk * SECTOR_SIZE;
        // Sectors that are in the file whole.
        let in_file = self.source.length().get().saturating_sub(data) / SECTOR_SIZE;
        let missing = on_disk.saturating_sub(start.max(in_file));
        if missing > 0 {
            let first = on_disk - missing;
            tally.add(FindingKind::PastFileEnd, missing, || {
                let message = "sectors that the bitmap says are in the file lie past its end";
                Finding::new(FindingKind::PastFileEnd, message)
                    .place(self.place(first))
                    .guest(first * SECTOR_SIZE)
                    .host(data + first * SECTOR_SIZE, missing * SECTOR_SIZE)
            });
        }
    }

    fn place(&self, sector: u64) -> Place {
        Place::new(Table::Bitmap, self.header.bitmap_offset()).entry(sector)
    }
}
