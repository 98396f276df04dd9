//! GUID partition tables (UEFI specification, chapter 5; libblkid's gpt.c).

use std::fmt::Write as _;

use super::{
    Disk, Entry, PartitionTable, PartitionType, TableKind, TableWarning, dos, le32, le64, read_at,
    sector,
};
use crate::error::Result;

const SIGNATURE: &[u8; 8] = b"EFI PART";
/// Bytes of the header that are described; `HeaderSize` may be more, up to a sector.
const HEADER_LENGTH: usize = 92;
/// Bytes of an entry: the only size that Linux knows.
const ENTRY_LENGTH: usize = 128;
/// Most entries that are read: 128 KiB of them. The usual number is 128.
const MAX_ENTRIES: u32 = 1024;
/// The sector sizes that are tried.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

struct Header {
    first_usable: u64,
    last_usable: u64,
    disk_guid: [u8; 16],
    entries: Vec<u8>,
}

/// Reads a GPT: the primary one or, where that is damaged, its backup in the last sector.
pub(super) fn read(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    // Without a protective master boot record, its partition of type 0xee, libblkid and the
    // kernel take no GPT for one: it may be the rest of an older one.
    match sector(disk, 0)? {
        Some(mbr) if dos::is_protective(&mbr) => {}
        _ => return Ok(None),
    }
    for sector_size in SECTOR_SIZES {
        let Some(last) = (disk.size().get() / sector_size).checked_sub(1) else { continue };
        let primary = read_header(disk, 1, last, sector_size)?;
        let backup = read_header(disk, last, last, sector_size)?;
        let (header, warning) = match (primary, backup) {
            (Some(primary), Some(_)) => (primary, None),
            (Some(primary), None) => (primary, Some(TableWarning::NoBackupGpt)),
            (None, Some(backup)) => (backup, Some(TableWarning::BackupGptUsed)),
            (None, None) => continue,
        };
        let mut table = table(&header, sector_size);
        table.warnings.extend(warning);
        return Ok(Some(table));
    }
    Ok(None)
}

/// The header at sector `at`, with its entries, all of which checks hold.
fn read_header(
    disk: &mut dyn Disk,
    at: u64,
    last: u64,
    sector_size: u64,
) -> Result<Option<Header>> {
    let mut bytes = vec![0; usize::try_from(sector_size).unwrap_or(0)];
    if !read_at(disk, at.saturating_mul(sector_size), &mut bytes)? || !bytes.starts_with(SIGNATURE)
    {
        return Ok(None);
    }
    let length = le32(&bytes, 12) as usize;
    if length < HEADER_LENGTH || length > bytes.len() {
        return Ok(None);
    }
    let crc = le32(&bytes, 16);
    bytes[16..20].fill(0);
    if crc32fast::hash(&bytes[..length]) != crc || le64(&bytes, 24) != at {
        return Ok(None);
    }
    let (first_usable, last_usable) = (le64(&bytes, 40), le64(&bytes, 48));
    if last_usable < first_usable || last_usable > last || (first_usable < at && at < last_usable) {
        return Ok(None);
    }
    let (count, entry_length) = (le32(&bytes, 80), le32(&bytes, 84) as usize);
    if count == 0 || count > MAX_ENTRIES || entry_length != ENTRY_LENGTH {
        return Ok(None);
    }
    let mut entries = vec![0; count as usize * ENTRY_LENGTH];
    let entries_at = le64(&bytes, 72).saturating_mul(sector_size);
    if !read_at(disk, entries_at, &mut entries)? || crc32fast::hash(&entries) != le32(&bytes, 88) {
        return Ok(None);
    }
    let disk_guid = crate::format::bytes_at(&bytes, 56);
    Ok(Some(Header { first_usable, last_usable, disk_guid, entries }))
}

fn table(header: &Header, sector_size: u64) -> PartitionTable {
    let mut table = PartitionTable::new(TableKind::Gpt);
    table.sector_size = sector_size;
    table.uuid = Some(guid(&header.disk_guid));
    let entries = header.entries.as_chunks::<ENTRY_LENGTH>().0;
    for (number, entry) in (1u32..).zip(entries) {
        let [kind, unique]: [[u8; 16]; 2] =
            [crate::format::bytes_at(entry, 0), crate::format::bytes_at(entry, 16)];
        if kind == [0; 16] {
            continue;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if first < header.first_usable || last < first || last > header.last_usable {
            table.warnings.push(TableWarning::EntryIgnored(number));
            continue;
        }
        let scale = sector_size / 512;
        // Inside of the usable sectors, and these inside of the disk: no overflow.
        let pushed = table.push(Entry {
            number,
            table: TableKind::Gpt,
            start: first.saturating_mul(scale),
            length: (last - first).saturating_add(1).saturating_mul(scale),
            kind: Some(PartitionType::Guid(guid(&kind))),
            flags: le64(entry, 48),
        });
        if !pushed {
            break;
        }
        if let Some(partition) = table.partitions.last_mut() {
            partition.uuid = Some(guid(&unique));
            partition.name = Some(utf16(&entry[56..])).filter(|name| !name.is_empty());
        }
    }
    table
}

/// A GUID in the usual notation; its first three fields are little-endian.
fn guid(bytes: &[u8; 16]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::with_capacity(36);
    for (place, index) in order.into_iter().enumerate() {
        if [4, 6, 8, 10].contains(&place) {
            text.push('-');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{:02x}", bytes[index]);
    }
    text
}

/// UTF-16 up to a NUL.
fn utf16(bytes: &[u8]) -> String {
    let units = bytes.as_chunks::<2>().0.iter().map(|&unit| u16::from_le_bytes(unit));
    char::decode_utf16(units.take_while(|&unit| unit != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}
