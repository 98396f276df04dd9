//! dm-snapshot's persistent exception store (kernel: drivers/md/dm-snap-persistent.c).
//!
//! It is made of chunks. The first holds a header. Then areas follow, each a chunk of
//! metadata, which has room for 16 bytes for each of as many chunks, and those chunks. All
//! numbers are little-endian.

use zerocopy::byteorder::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteLen, SECTOR_SIZE, Sectors};

/// `SNAP_MAGIC`: "SnAp".
const MAGIC: u32 = 0x7041_6e53;
/// `SNAPSHOT_DISK_VERSION`.
const VERSION: u32 = 1;
/// Bytes of an exception (`struct disk_exception`).
pub const EXCEPTION_LENGTH: u64 = 16;
/// Chunks that are no area's: the header.
pub const HEADER_CHUNKS: u64 = 1;
/// Size of a chunk, unless a store says otherwise.
pub const DEFAULT_CHUNK: Sectors = Sectors::new(32);
/// Sizes of chunks that a store may have: a page, and what a copy should not exceed.
const CHUNK_SECTORS: std::ops::RangeInclusive<u64> = 8..=2048;

/// `struct disk_header`.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    valid: U32,
    version: U32,
    chunk_size: U32,
}

/// Bytes of the header that mean something.
pub const HEADER_LENGTH: usize = size_of::<RawHeader>();

/// The header of a persistent exception store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PersistentHeader {
    /// Size of a chunk.
    pub chunk: Sectors,
    /// False once the kernel had to give the store up: it was full, or could not be written.
    pub valid: bool,
}

impl PersistentHeader {
    /// Reads it.
    ///
    /// # Errors
    /// `InvalidImage` or `Unsupported`: it is none, or of a layout that is not known.
    pub fn parse(bytes: &[u8; HEADER_LENGTH]) -> Result<Self> {
        let raw = RawHeader::ref_from_bytes(bytes)
            .map_err(|_| Error::invalid("no header of a dm-snapshot store"))?;
        if raw.magic.get() != MAGIC {
            let magic = raw.magic.get();
            return Err(Error::invalid(format!(
                "dm-snapshot's part has the magic {magic:#010x} and not {MAGIC:#010x} (\"SnAp\"): it is damaged"
            )));
        }
        if raw.version.get() != VERSION {
            return Err(Error::new(ErrorKind::Unsupported(format!(
                "dm-snapshot's part is of version {}, and only {VERSION} is known",
                raw.version.get()
            ))));
        }
        let chunk = u64::from(raw.chunk_size.get());
        check_chunk(chunk)?;
        Ok(Self { chunk: Sectors::new(chunk), valid: raw.valid.get() != 0 })
    }

    /// As it is written.
    ///
    /// # Errors
    /// The size of a chunk is none that a store may have.
    pub fn to_bytes(self) -> Result<[u8; HEADER_LENGTH]> {
        check_chunk(self.chunk.get())?;
        let raw = RawHeader {
            magic: MAGIC.into(),
            valid: u32::from(self.valid).into(),
            version: VERSION.into(),
            chunk_size: u32::try_from(self.chunk.get()).unwrap_or_default().into(),
        };
        let mut bytes = [0; HEADER_LENGTH];
        bytes.copy_from_slice(raw.as_bytes());
        Ok(bytes)
    }
}

/// Refuses a size of a chunk that no store of ours has.
fn check_chunk(sectors: u64) -> Result<()> {
    if sectors.is_power_of_two() && CHUNK_SECTORS.contains(&sectors) {
        return Ok(());
    }
    Err(Error::invalid(format!("{sectors} sectors are no size of a chunk: it is damaged")))
}

/// Bytes of a chunk; 0 where they would be more than 2^64.
pub(crate) fn chunk_bytes(chunk: Sectors) -> u64 {
    chunk.to_bytes().unwrap_or(0)
}

/// Exceptions in an area, and so chunks of data behind each chunk of metadata.
pub fn exceptions_per_area(chunk: Sectors) -> u64 {
    chunk_bytes(chunk) / EXCEPTION_LENGTH
}

/// The chunk in which the metadata of an area lies; `None` past 2^64.
pub fn area_chunk(chunk: Sectors, area: u64) -> Option<u64> {
    let stride = exceptions_per_area(chunk).checked_add(1)?;
    area.checked_mul(stride)?.checked_add(HEADER_CHUNKS)
}

/// How long a store is that can't overflow: in which every chunk of the disk can be changed.
/// `None` past 2^63 bytes, which no file can have.
///
/// The kernel wipes the metadata of the next area as soon as one is full, so there is one
/// more than is in use where the last one is.
pub fn length_for(disk: Sectors, chunk: Sectors) -> Option<ByteLen> {
    check_chunk(chunk.get()).ok()?;
    let exceptions = disk.get().div_ceil(chunk.get());
    let areas = exceptions / exceptions_per_area(chunk) + 1;
    let chunks = HEADER_CHUNKS.checked_add(areas)?.checked_add(exceptions)?;
    let bytes = chunks.checked_mul(chunk.get())?.checked_mul(SECTOR_SIZE)?;
    i64::try_from(bytes).ok().map(|_| ByteLen::new(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_written_as_the_kernel_reads_it() {
        let header = PersistentHeader { chunk: Sectors::new(32), valid: true };
        let bytes = header.to_bytes().unwrap();
        assert_eq!(bytes, *b"SnAp\x01\0\0\0\x01\0\0\0\x20\0\0\0");
        assert_eq!(PersistentHeader::parse(&bytes).unwrap(), header);
        let invalid = PersistentHeader { valid: false, ..header };
        assert_eq!(PersistentHeader::parse(&invalid.to_bytes().unwrap()).unwrap(), invalid);
    }

    #[test]
    fn what_is_no_header_is_said_to_be_none() {
        let good = PersistentHeader { chunk: Sectors::new(32), valid: true }.to_bytes().unwrap();
        for (at, byte, said) in
            [(0, 0, "magic"), (8, 2, "version 2"), (12, 0, "0 sectors"), (12, 33, "33 sectors")]
        {
            let mut bytes = good;
            bytes[at] = byte;
            let error = PersistentHeader::parse(&bytes).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
        for sectors in [0, 4, 24, 4096, 1 << 40] {
            let header = PersistentHeader { chunk: Sectors::new(sectors), valid: true };
            assert!(header.to_bytes().is_err(), "{sectors}");
        }
    }

    /// Where the kernel's `next_free` and areas end up when chunks are taken one by one
    /// (persistent_prepare_exception(), skip_metadata(), persistent_commit_exception()).
    fn chunks_used(exceptions: u64, per_area: u64) -> u64 {
        let (mut next_free, mut end) = (2, 2);
        for taken in 1..=exceptions {
            end = end.max(next_free + 1);
            next_free += 1;
            if next_free % (per_area + 1) == 1 {
                next_free += 1;
            }
            if taken % per_area == 0 {
                // The metadata of the next area is wiped.
                end = end.max(1 + (per_area + 1) * (taken / per_area) + 1);
            }
        }
        end
    }

    #[test]
    fn a_store_of_full_size_has_room_for_every_chunk_and_no_more() {
        let chunk = Sectors::new(8);
        assert_eq!(exceptions_per_area(chunk), 256);
        for exceptions in (0..600).chain([1023, 1024, 1025]) {
            let wanted = chunks_used(exceptions, 256) * 4096;
            let length = length_for(Sectors::new(exceptions * 8), chunk).unwrap();
            assert_eq!(length.get(), wanted, "{exceptions}");
        }
        // The last chunk of the disk may be a part of one.
        assert_eq!(length_for(Sectors::new(9), chunk), length_for(Sectors::new(16), chunk));
    }

    #[test]
    fn no_size_of_a_disk_overflows() {
        assert_eq!(length_for(Sectors::new(u64::MAX), Sectors::new(8)), None);
        assert_eq!(length_for(Sectors::new(1 << 54), Sectors::new(2048)), None);
        assert!(length_for(Sectors::new(1 << 53), Sectors::new(2048)).is_some());
        assert_eq!(area_chunk(Sectors::new(8), u64::MAX), None);
        assert_eq!(area_chunk(Sectors::new(8), 2), Some(515));
    }
}
