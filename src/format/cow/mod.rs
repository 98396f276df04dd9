//! cow images: User-Mode Linux's copy-on-write files and QEMU's, in all six layouts.
//!
//! A header with the backing file's name, a bitmap of the sectors that were written, and
//! room for every sector of the disk.

use std::sync::Arc;

use super::trace::TraceStep;
use super::{BackingIdentity, BackingReference, Format, ImageFormat, Scratch};
use crate::damage::{DamageList, spoil};
use crate::error::{Error, Result};
use crate::source::Source;
use crate::status::{BlockStatus, HostPlace, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};

mod layout;

pub use layout::{CowHeader, CowLayout};

/// Bytes of the bitmap that are read at a time.
const BITMAP_CHUNK: usize = 64 << 10;

/// Bytes of the bitmap that may be missing of a file however short, past damage: the bits
/// of 256 MiB.
const MOST_MISSING: u64 = 64 << 10;

/// True where the first bytes of a file are a cow header: the magic, and a version that
/// was written with it.
pub fn probe(start: &[u8]) -> bool {
    let Some((magic, rest)) = start.split_first_chunk::<4>() else { return false };
    let Some(version) = rest.first_chunk::<4>() else { return false };
    match *magic {
        layout::MAGIC => matches!(u32::from_be_bytes(*version), 1..=3),
        layout::MAGIC_SWAPPED => u32::from_le_bytes(*version) == 1,
        _ => false,
    }
}

/// A cow image.
#[derive(Debug)]
pub struct CowImage {
    source: Arc<Source>,
    header: CowHeader,
    backing: Option<BackingReference>,
}

impl CowImage {
    /// Reads the header.
    ///
    /// # Errors
    /// What [`CowHeader::parse`] says; a read failed.
    pub fn open(source: Arc<Source>) -> Result<Self> {
        Self::open_inner(source, CowHeader::parse)
    }

    /// As [`open`](Self::open), but with a bitmap that is not in the file whole: what that
    /// spoils is damage when it is asked for.
    ///
    /// # Errors
    /// As [`open`](Self::open), but of the bitmap only where more is missing than the file
    /// is long and 64 KiB: so the disk's size, and with it the work of a walk over it, is
    /// bounded by the file's.
    pub fn open_past_damage(source: Arc<Source>) -> Result<Self> {
        Self::open_inner(source, |start, length| {
            // Whose a version 2 is, is told by what fits: first of all the file.
            CowHeader::parse(start, length).or_else(|error| {
                let with_missing = length.get().saturating_mul(2).saturating_add(MOST_MISSING);
                CowHeader::parse(start, ByteLen::new(with_missing)).map_err(|_| error)
            })
        })
    }

    fn open_inner(
        source: Arc<Source>,
        parse: impl FnOnce(&[u8], ByteLen) -> Result<CowHeader>,
    ) -> Result<Self> {
        let mut start = [0; CowHeader::MAX_LENGTH];
        let length = source.read_up_to(HostOffset::ZERO, &mut start)?;
        let header = parse(&start[..length], source.length())
            .map_err(|error| error.at_path(source.path()))?;
        let backing = backing_reference(&header);
        Ok(Self { source, header, backing })
    }

    /// The header.
    pub fn header(&self) -> &CowHeader {
        &self.header
    }

    /// What is wrong with a bitmap that is not in the file whole.
    fn cut_off(&self) -> Error {
        Error::invalid(format!(
            "the bitmap ({} bytes) lies outside the file, which is {} bytes long: the image is truncated or corrupt",
            self.header.bitmap_length().get(),
            self.source.length().get()
        ))
        .at_offset(self.header.bitmap_offset().get())
    }

    /// The bits of the sectors from `first` up to `end` can't be read.
    #[cold]
    fn spoil(
        &self,
        first: u64,
        end: u64,
        error: Error,
        damage: &mut Option<DamageList>,
    ) -> Result<()> {
        let disk_end = self.virtual_size().get() / SECTOR_SIZE;
        let start = |sector: u64| GuestOffset::new(sector.min(disk_end) * SECTOR_SIZE);
        let spoiled = GuestRange::new(start(first), start(end));
        spoil(damage, spoiled, error.at_path(self.source.path())).map(drop)
    }
}

fn backing_reference(header: &CowHeader) -> Option<BackingReference> {
    if header.backing_file().is_empty() {
        return None;
    }
    let uml = header.layout().is_uml();
    let identity = BackingIdentity { modified: header.mtime(), size: uml.then_some(header.size()) };
    Some(BackingReference {
        name: header.backing_file().to_vec(),
        // User-Mode Linux reads the bytes of the backing file, whatever they are; QEMU
        // probes.
        format: uml.then(|| Format::Raw.name().to_owned()),
        // QEMU's 0 stands for a time that it could not tell.
        expected: (uml || header.mtime() != 0).then_some(identity),
    })
}

/// Length of the run of equal bits that starts with bit `from` of `bitmap` (least
/// significant bit of a byte first) and ends before bit `end`; and what the bits are.
/// `from` is less than `end`, and `end` at most 8 times the bitmap's length.
#[inline]
pub(crate) fn bit_run(bitmap: &[u8], from: usize, end: usize) -> (bool, usize) {
    let set = bitmap[from / 8] >> (from % 8) & 1 == 1;
    let flip = if set { u64::MAX } else { 0 };
    let mut at = from;
    while at < end {
        // The next 64 bits from a byte's start on, fewer at the bitmap's end.
        let rest = &bitmap[at / 8..];
        let (word, bits) = match rest.first_chunk::<8>() {
            Some(bytes) => (u64::from_le_bytes(*bytes), 64),
            None => {
                let mut bytes = [0; 8];
                bytes[..rest.len()].copy_from_slice(rest);
                (u64::from_le_bytes(bytes), rest.len() * 8)
            }
        };
        let skip = at % 8;
        let other = (word ^ flip) >> skip;
        let same = other.trailing_zeros() as usize;
        let here = bits - skip;
        if same < here {
            at += same;
            break;
        }
        at += here;
    }
    (set, at.min(end) - from)
}

/// What the bitmap says of sectors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sectors {
    InBacking,
    InThisFile,
    /// The bitmap can't be read from the bit of this sector on.
    Damaged(u64),
}

/// Makes status runs of runs of bits, and joins those that neighbour.
struct RunWriter<'r> {
    runs: &'r mut Vec<StatusRun>,
    range: GuestRange,
    data_offset: HostOffset,
    /// What the sectors are, the first of them, and the first after them.
    pending: Option<(Sectors, u64, u64)>,
}

impl RunWriter<'_> {
    /// Takes the next `count` sectors, from `sector` on.
    #[inline]
    fn push(&mut self, what: Sectors, sector: u64, count: u64) {
        match &mut self.pending {
            Some((value, _, end)) if *value == what => *end += count,
            _ => {
                self.flush();
                self.pending = Some((what, sector, sector + count));
            }
        }
    }

    fn flush(&mut self) {
        let Some((what, first, end)) = self.pending.take() else { return };
        let start = first * SECTOR_SIZE;
        let length = ByteLen::new((end - first) * SECTOR_SIZE);
        let status = match what {
            Sectors::InThisFile => {
                let offset = self.data_offset.saturating_add(ByteLen::new(start));
                BlockStatus::Data(HostPlace::in_image(offset))
            }
            Sectors::InBacking => BlockStatus::Unallocated(None),
            Sectors::Damaged(from) => {
                BlockStatus::Damaged { from: GuestOffset::new(from * SECTOR_SIZE) }
            }
        };
        let run = StatusRun { start: GuestOffset::new(start), length, status };
        self.runs.extend(run.clipped(self.range));
    }
}

impl ImageFormat for CowImage {
    fn format(&self) -> Format {
        Format::Cow
    }

    fn virtual_size(&self) -> ByteLen {
        self.header.virtual_size()
    }

    fn granularity(&self) -> u64 {
        SECTOR_SIZE
    }

    fn backing(&self) -> Option<&BackingReference> {
        self.backing.as_ref()
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let end = range.end.get().div_ceil(SECTOR_SIZE);
        let mut sector = range.start.get() / SECTOR_SIZE;
        let with_bit = self.header.bitmap_length().get().saturating_mul(8).min(end);
        let in_file = self.source.length().get().saturating_sub(self.header.bitmap_offset().get());
        let readable = with_bit.min(in_file.saturating_mul(8));
        let data_offset = self.header.data_offset();
        let Scratch { table, damage, .. } = scratch;
        let mut writer = RunWriter { runs, range, data_offset, pending: None };
        while sector < readable {
            let first_byte = sector / 8;
            let length = usize::try_from(readable.div_ceil(8) - first_byte)
                .unwrap_or(BITMAP_CHUNK)
                .min(BITMAP_CHUNK);
            let offset = self.header.bitmap_offset().saturating_add(ByteLen::new(first_byte));
            let first_bit = first_byte * 8;
            let bits = (readable - first_bit).min(length as u64 * 8);
            let bits = usize::try_from(bits).unwrap_or(0);
            let read = super::table_bytes(&self.source, offset, length, "the bitmap", table);
            let bitmap = match read {
                Ok(bitmap) => bitmap,
                Err(error) => {
                    let next = first_bit + bits as u64;
                    self.spoil(sector, next, error, damage)?;
                    writer.push(Sectors::Damaged(sector), sector, next - sector);
                    sector = next;
                    continue;
                }
            };
            let mut bit = usize::from((sector % 8) as u8);
            while bit < bits {
                let (set, count) = bit_run(bitmap, bit, bits);
                let what = if set { Sectors::InThisFile } else { Sectors::InBacking };
                writer.push(what, first_bit + bit as u64, count as u64);
                bit += count;
            }
            sector = first_bit + bits as u64;
        }
        if sector < with_bit {
            // A header whose bitmap is not in the file whole was opened past damage.
            let bits = self.header.bitmap_length().get().saturating_mul(8);
            self.spoil(readable, bits, self.cut_off(), damage)?;
            writer.push(Sectors::Damaged(readable), sector, with_bit - sector);
            sector = with_bit;
        }
        if sector < end {
            writer.push(Sectors::InBacking, sector, end - sector);
        }
        writer.flush();
        Ok(())
    }

    fn trace(&self, guest: GuestOffset, steps: &mut Vec<TraceStep>) {
        let sector = guest.get() / SECTOR_SIZE;
        if sector / 8 >= self.header.bitmap_length().get() {
            steps.push(TraceStep::NoSectorBit { sector });
            return;
        }
        let at = self.header.bitmap_offset().saturating_add(ByteLen::new(sector / 8));
        let mut byte = [0];
        if self.source.read_exact(at, &mut byte, "the bitmap").is_ok() {
            let bit = (sector % 8) as u8;
            steps.push(TraceStep::SectorBit { sector, at, byte: byte[0], bit });
        }
    }
}

#[cfg(test)]
mod tests;
