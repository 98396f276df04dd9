//! Persistent dirty bitmaps (docs/interop/qcow2, section "Bitmaps").
//!
//! The header extension names a bitmap directory; each of its entries a bitmap table, whose
//! entries are clusters of bits. A bit covers `granularity` guest bytes, the least
//! significant bit of a byte first.

use super::extension::Extensions;
use super::header::{AUTOCLEAR_BITMAPS, Qcow2Header, TableLocation};
use crate::error::{Error, Result, printable};
use crate::format::{be64, bytes_at};
use crate::source::Source;
use crate::units::{ByteLen, HostOffset};

/// Bytes of the extension's data.
const EXTENSION_LENGTH: usize = 24;
/// QCOW2_MAX_BITMAPS in QEMU's block/qcow2.h.
const MAX_BITMAPS: u32 = 65535;
/// QCOW2_MAX_BITMAP_DIRECTORY_SIZE.
const MAX_DIRECTORY_BYTES: u64 = 64 << 20;
/// Bytes of a directory entry before its extra data and name.
const ENTRY_LENGTH: usize = 24;
/// BME_MAX_TABLE_SIZE in QEMU's block/qcow2-bitmap.c, in entries.
const MAX_TABLE_ENTRIES: u32 = 0x800_0000;
/// BME_MAX_PHYS_SIZE: most bytes of a bitmap's clusters together.
const MAX_PHYSICAL_BYTES: u64 = 512 << 20;
/// BME_MAX_NAME_SIZE.
const MAX_NAME_LENGTH: usize = 1023;
const MIN_GRANULARITY_BITS: u8 = 9;
const MAX_GRANULARITY_BITS: u8 = 31;
/// The only type there is: dirty tracking bitmap.
const DIRTY_TRACKING: u8 = 1;

const FLAG_IN_USE: u32 = 1 << 0;
const FLAG_AUTO: u32 = 1 << 1;
const RESERVED_FLAGS: u32 = !(FLAG_IN_USE | FLAG_AUTO);

const TABLE_OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
const TABLE_ALL_ONES: u64 = 1;

/// The bitmaps header extension, all of whose bounds hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// `nb_bitmaps`: 1 to 65535.
    pub count: u32,
    /// The bitmap directory: at most 64 MiB, on a cluster boundary.
    pub directory: TableLocation,
}

impl BitmapsExtension {
    /// Reads the extension's data, as qcow2_read_extensions() in QEMU's block/qcow2.c does;
    /// `None` where the image has none, or where its autoclear bit is not set: then it is
    /// not consistent and has to be ignored.
    ///
    /// # Errors
    /// A bound does not hold. QEMU refuses to open such an image.
    pub fn parse(header: &Qcow2Header, extensions: &Extensions) -> Result<Option<Self>> {
        let Some(data) = &extensions.bitmaps else { return Ok(None) };
        let invalid = |what: String| Err(Error::invalid(format!("the bitmaps extension {what}")));
        if data.len() != EXTENSION_LENGTH {
            return invalid(format!("has {} bytes and not {EXTENSION_LENGTH}", data.len()));
        }
        if header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return Ok(None);
        }
        let count = u32::from_be_bytes(bytes_at(data, 0));
        if bytes_at(data, 4) != [0; 4] {
            return invalid("has a reserved field that is not zero".to_owned());
        }
        if !(1..=MAX_BITMAPS).contains(&count) {
            return invalid(format!("says {count} bitmaps: 1 to {MAX_BITMAPS} can be"));
        }
        let (length, offset) = (be64(data, 1), be64(data, 2));
        if !offset.is_multiple_of(header.cluster_size()) {
            return invalid(format!(
                "has the bitmap directory at {offset:#x}, which is no multiple of the cluster size"
            ));
        }
        if length > MAX_DIRECTORY_BYTES {
            return invalid(format!(
                "says {length} bytes of bitmap directory: {MAX_DIRECTORY_BYTES} at most can be"
            ));
        }
        let directory =
            TableLocation { offset: HostOffset::new(offset), length: ByteLen::new(length) };
        Ok(Some(Self { count, directory }))
    }
}

/// An entry of the bitmap directory: one bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapDirectoryEntry {
    /// Where the entry lies in the file.
    pub entry_offset: HostOffset,
    /// Its length in bytes, padding included: a multiple of 8.
    pub entry_length: ByteLen,
    /// The bitmap table: on a cluster boundary, at most 1 GiB.
    pub table: TableLocation,
    /// It was not saved cleanly: its bits mean nothing.
    pub in_use: bool,
    /// It is to record the guest's writes when the image is opened.
    pub auto: bool,
    /// log2 of the guest bytes that a bit covers: 9 to 31.
    pub granularity_bits: u8,
    /// Its name, at most 1023 bytes of a stranger's choosing.
    pub name: Vec<u8>,
}

impl BitmapDirectoryEntry {
    /// Guest bytes that a bit covers.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Entries of the bitmap table.
    pub fn table_entries(&self) -> u64 {
        self.table.length.get() / 8
    }

    /// The name as text, for people.
    pub fn display_name(&self) -> String {
        printable(&String::from_utf8_lossy(&self.name))
    }
}

/// What an entry of a bitmap table says of its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapTableEntry {
    /// All of them are 0.
    AllZeros,
    /// All of them are 1.
    AllOnes,
    /// They are in this cluster.
    Serialized(HostOffset),
}

impl BitmapTableEntry {
    /// Reads an entry, as check_table_entry() in QEMU's block/qcow2-bitmap.c does; `None`
    /// where reserved bits are set or the offset is on no cluster boundary.
    pub fn decode(entry: u64, cluster_size: u64) -> Option<Self> {
        let offset = entry & TABLE_OFFSET_MASK;
        let all_ones = entry & TABLE_ALL_ONES != 0;
        if entry & TABLE_RESERVED != 0 || (offset != 0 && all_ones) {
            return None;
        }
        match offset {
            0 if all_ones => Some(Self::AllOnes),
            0 => Some(Self::AllZeros),
            offset if offset.is_multiple_of(cluster_size) => {
                Some(Self::Serialized(HostOffset::new(offset)))
            }
            _ => None,
        }
    }
}

/// Reads the bitmap directory of an image that has one.
///
/// # Errors
/// What [`BitmapsExtension::parse`] and [`read_directory`] say.
pub fn read_bitmaps(
    source: &Source,
    header: &Qcow2Header,
    extensions: &Extensions,
) -> Result<Vec<BitmapDirectoryEntry>> {
    match BitmapsExtension::parse(header, extensions)? {
        Some(extension) => read_directory(source, header, &extension),
        None => Ok(Vec::new()),
    }
}

/// Reads the whole bitmap directory, as bitmap_list_load() in QEMU's block/qcow2-bitmap.c.
///
/// # Errors
/// It can't be read whole; an entry is cut off, has extra data or breaks a bound; there are
/// more or fewer entries than the extension says.
pub fn read_directory(
    source: &Source,
    header: &Qcow2Header,
    extension: &BitmapsExtension,
) -> Result<Vec<BitmapDirectoryEntry>> {
    let TableLocation { offset, length } = extension.directory;
    let start = offset.get();
    let in_file = source.length().get().saturating_sub(start);
    if length.is_zero() || length.get() > in_file {
        return Err(Error::invalid(format!(
            "the bitmap directory ({} bytes from {offset}) is empty or lies outside the file",
            length.get()
        ))
        .at_offset(start));
    }
    let mut directory = vec![0; usize::try_from(length.get()).unwrap_or(0)];
    source.read_exact(offset, &mut directory, "the bitmap directory")?;
    let mut entries = Vec::new();
    let mut rest = directory.as_slice();
    while !rest.is_empty() {
        let here = start.saturating_add((directory.len() - rest.len()) as u64);
        if entries.len() == extension.count as usize {
            return Err(Error::invalid(format!(
                "the bitmap directory goes on after the {} bitmaps that the extension says",
                extension.count
            ))
            .at_offset(here));
        }
        let (entry, length) = parse_entry(rest, HostOffset::new(here), header)
            .map_err(|error| error.at_offset(here))?;
        entries.push(entry);
        rest = rest.get(length..).unwrap_or_default();
    }
    if entries.len() != extension.count as usize {
        return Err(Error::invalid(format!(
            "the bitmap directory has {} bitmaps, the extension says {}",
            entries.len(),
            extension.count
        ))
        .at_offset(start));
    }
    Ok(entries)
}

/// The entry at the start of `bytes`, and its length with padding.
fn parse_entry(
    bytes: &[u8],
    entry_offset: HostOffset,
    header: &Qcow2Header,
) -> Result<(BitmapDirectoryEntry, usize)> {
    let cut_off = || Error::invalid("an entry of the bitmap directory is cut off");
    let fixed = bytes.first_chunk::<ENTRY_LENGTH>().ok_or_else(cut_off)?;
    let table_offset = be64(fixed, 0);
    let table_entries = u32::from_be_bytes(bytes_at(fixed, 8));
    let flags = u32::from_be_bytes(bytes_at(fixed, 12));
    let [kind, granularity_bits] = bytes_at(fixed, 16);
    let name_length = usize::from(u16::from_be_bytes(bytes_at(fixed, 18)));
    let extra_length = u32::from_be_bytes(bytes_at(fixed, 20)) as usize;
    let whole = ENTRY_LENGTH.saturating_add(name_length).saturating_add(extra_length);
    let whole = whole.checked_next_multiple_of(8).ok_or_else(cut_off)?;
    if whole > bytes.len() {
        return Err(cut_off());
    }
    let name_start = ENTRY_LENGTH + extra_length;
    let name = bytes.get(name_start..name_start + name_length).ok_or_else(cut_off)?;
    // A name is a C string to QEMU.
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let broken = |what: &str| {
        let name = printable(&String::from_utf8_lossy(name));
        Err(Error::invalid(format!("the bitmap '{name}' {what}")))
    };
    if extra_length != 0 {
        return broken("has extra data, which is not known");
    }
    let table_bytes = u64::from(table_entries) * 8;
    let cluster_size = header.cluster_size();
    if table_entries == 0 || table_entries > MAX_TABLE_ENTRIES {
        return broken(&format!("has a bitmap table of {table_entries} entries"));
    }
    if table_offset == 0 || !table_offset.is_multiple_of(cluster_size) {
        return broken(&format!("has its bitmap table at {table_offset:#x}"));
    }
    if !(MIN_GRANULARITY_BITS..=MAX_GRANULARITY_BITS).contains(&granularity_bits) {
        return broken(&format!("has the granularity 2^{granularity_bits}"));
    }
    if flags & RESERVED_FLAGS != 0 {
        return broken(&format!("has reserved flags: {flags:#x}"));
    }
    if name_length > MAX_NAME_LENGTH {
        return broken("has a name that is too long");
    }
    if kind != DIRTY_TRACKING {
        return broken(&format!("is of the type {kind}, which is not known"));
    }
    let physical_bytes = u64::from(table_entries).saturating_mul(cluster_size);
    if physical_bytes > MAX_PHYSICAL_BYTES {
        return broken(&format!("has {physical_bytes} bytes of bits, which is too much"));
    }
    // At most 2^29 bytes with 2^31 bytes a bit: no overflow.
    let covered = (physical_bytes * 8) << granularity_bits;
    let in_use = flags & FLAG_IN_USE != 0;
    // One that is in use may have been left behind by a resize.
    if !in_use && header.virtual_size.get() > covered {
        return broken(&format!("covers {covered:#x} bytes, less than the virtual disk"));
    }
    let entry = BitmapDirectoryEntry {
        entry_offset,
        entry_length: ByteLen::new(whole as u64),
        table: TableLocation {
            offset: HostOffset::new(table_offset),
            length: ByteLen::new(table_bytes),
        },
        in_use,
        auto: flags & FLAG_AUTO != 0,
        granularity_bits,
        name: name.to_vec(),
    };
    Ok((entry, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_entries_decode_as_the_specification_says() {
        let decode = |entry| BitmapTableEntry::decode(entry, 65536);
        assert_eq!(decode(0), Some(BitmapTableEntry::AllZeros));
        assert_eq!(decode(1), Some(BitmapTableEntry::AllOnes));
        let host = HostOffset::new(0x5_0000);
        assert_eq!(decode(0x5_0000), Some(BitmapTableEntry::Serialized(host)));
        // Both an offset and all ones; reserved bits; on no cluster boundary.
        for entry in [0x5_0001, 2, 1 << 56, 0x5_0200] {
            assert_eq!(decode(entry), None, "{entry:#x}");
        }
    }

    #[test]
    fn an_entry_that_is_cut_off_or_breaks_a_bound_is_refused() {
        let mut entry = Vec::new();
        entry.extend(0x3_0000u64.to_be_bytes());
        entry.extend(1u32.to_be_bytes());
        entry.extend(FLAG_AUTO.to_be_bytes());
        entry.extend([DIRTY_TRACKING, 16, 0, 5]);
        entry.extend(0u32.to_be_bytes());
        entry.extend(b"dirty\0\0\0");
        let header = super::super::tests::header();
        let parse = |bytes: &[u8]| parse_entry(bytes, HostOffset::ZERO, &header);
        let (good, length) = parse(&entry).unwrap();
        assert_eq!((length, good.name.as_slice(), good.auto), (32, &b"dirty"[..], true));
        assert_eq!((good.granularity(), good.table_entries()), (65536, 1));
        for cut in 0..entry.len() {
            assert!(parse(&entry[..cut]).is_err(), "{cut}");
        }
        for (at, byte) in [(7, 1), (8, 0xff), (11, 0), (15, 4), (16, 2), (17, 8), (17, 32)] {
            let mut broken = entry.clone();
            broken[at] = byte;
            assert!(parse(&broken).is_err(), "byte {at}");
        }
        for (at, byte) in [(20, 0xff), (23, 8), (18, 0xff)] {
            let mut broken = entry.clone();
            broken[at] = byte;
            broken.resize(64, 0);
            assert!(parse(&broken).is_err(), "byte {at}");
        }
    }
}
