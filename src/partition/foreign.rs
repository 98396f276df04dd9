//! The partition tables of other machines than PCs, and of other systems inside of a PC's
//! partition (libblkid's aix.c, sgi.c, sun.c, mac.c, ultrix.c, solaris_x86.c, unixware.c).

use super::bsd::Outer;
use super::{
    Disk, Entry, PartitionTable, PartitionType, TableKind, be16, be32, le16, le32, read_at, sector,
};
use crate::error::Result;

const AIX_MAGIC: [u8; 4] = [0xc9, 0xc2, 0xd4, 0xc1];

const SGI_MAGIC: [u8; 4] = [0x0b, 0xe5, 0xa9, 0x41];
const SGI_PARTITIONS_AT: usize = 312;
const SGI_PARTITIONS: usize = 16;

const SUN_MAGIC: [u8; 2] = [0xda, 0xbe];
const SUN_MAGIC_AT: usize = 508;
const SUN_PARTITIONS_AT: usize = 444;
const SUN_PARTITIONS: usize = 8;
const SUN_WHOLE_DISK: u16 = 5;

/// Of the VTOC of Sun and Solaris, and of UnixWare.
const VTOC_SANITY: u32 = 0x600d_deee;

const MAC_DRIVER_MAGIC: [u8; 2] = *b"ER";
const MAC_PARTITION_LENGTH: usize = 136;
const MAC_MAX_PARTITIONS: u32 = 256;

const ULTRIX_AT: u64 = 16384 - 72;
const ULTRIX_MAGIC: u32 = 0x03_2957;
const ULTRIX_PARTITIONS: usize = 8;

const SLICES: usize = 16;
const SLICE_LENGTH: usize = 12;
const SOLARIS_SLICES_AT: usize = 72;
const SOLARIS_WHOLE_DISK: u16 = 5;
const UNIXWARE_SECTOR: u64 = 29;
const UNIXWARE_MAGIC: u32 = 0xcae5_600d;
const UNIXWARE_VTOC_AT: usize = 156;
const UNIXWARE_SLICES_AT: usize = 216;
const UNIXWARE_VALID: u16 = 0x0200;
const UNIXWARE_ENTIRE_DISK: u16 = 5;

/// A table that is found by its first sector.
pub(super) fn aix_sgi_sun(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    let Some(label) = sector(disk, 0)? else { return Ok(None) };
    if label.starts_with(&AIX_MAGIC) {
        return Ok(Some(PartitionTable::new(TableKind::Aix)));
    }
    if label.starts_with(&SGI_MAGIC) {
        return Ok(sgi(&label));
    }
    if label[SUN_MAGIC_AT..].starts_with(&SUN_MAGIC) {
        return Ok(sun(&label));
    }
    Ok(None)
}

fn sgi(label: &[u8; 512]) -> Option<PartitionTable> {
    let words = label.as_chunks::<4>().0.iter();
    if words.fold(0u32, |sum, &word| sum.wrapping_add(u32::from_be_bytes(word))) != 0 {
        return None;
    }
    let mut table = PartitionTable::new(TableKind::Sgi);
    for (number, index) in (1u32..).zip(0..SGI_PARTITIONS) {
        let at = SGI_PARTITIONS_AT + index * 12;
        let length = be32(label, at);
        if length != 0 {
            table.push(Entry {
                number,
                table: TableKind::Sgi,
                start: be32(label, at + 4).into(),
                length: length.into(),
                kind: Some(PartitionType::Number(be32(label, at + 8))),
                flags: 0,
            });
        }
    }
    Some(table)
}

fn sun(label: &[u8; 512]) -> Option<PartitionTable> {
    let words = label.as_chunks::<2>().0.iter();
    if words.fold(0, |sum, &word| sum ^ u16::from_be_bytes(word)) != 0 {
        return None;
    }
    let (version, count, sanity) = (be32(label, 128), be16(label, 140), be32(label, 188));
    let is_valid = sanity == VTOC_SANITY && version == 1 && usize::from(count) <= SUN_PARTITIONS;
    // Labels that Linux made in old times leave all three empty.
    let has_types = is_valid || (sanity, version, count) == (0, 0, 0);
    let count = if is_valid { usize::from(count) } else { SUN_PARTITIONS };
    let sectors_per_cylinder = u64::from(be16(label, 436)) * u64::from(be16(label, 438));
    let mut table = PartitionTable::new(TableKind::Sun);
    for (number, index) in (1u32..).zip(0..count) {
        let at = SUN_PARTITIONS_AT + index * 8;
        let info = 142 + index * 4;
        let (kind, flags) =
            if has_types { (be16(label, info), be16(label, info + 2)) } else { (0, 0) };
        let length = be32(label, at + 4);
        if kind != SUN_WHOLE_DISK && length != 0 {
            table.push(Entry {
                number,
                table: TableKind::Sun,
                start: u64::from(be32(label, at)).saturating_mul(sectors_per_cylinder),
                length: length.into(),
                kind: (kind != 0).then(|| PartitionType::Number(kind.into())),
                flags: flags.into(),
            });
        }
    }
    Some(table)
}

/// The Apple partition map, one block for each partition from the second block on.
pub(super) fn mac(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    let Some(driver) = sector(disk, 0)? else { return Ok(None) };
    let block_size = be16(&driver, 2);
    if !driver.starts_with(&MAC_DRIVER_MAGIC) || usize::from(block_size) < MAC_PARTITION_LENGTH {
        return Ok(None);
    }
    let mut table = PartitionTable::new(TableKind::Mac);
    let mut number = 1;
    let mut count = 1;
    while number <= count {
        let mut block = [0; MAC_PARTITION_LENGTH];
        let has_block = read_at(disk, u64::from(number) * u64::from(block_size), &mut block)?;
        if !has_block || !matches!(&block[..2], b"PM" | b"TS") {
            return Ok(None);
        }
        if number == 1 {
            count = be32(&block, 4).min(MAC_MAX_PARTITIONS);
        }
        let scale = u64::from(block_size / 512);
        let pushed = table.push(Entry {
            number,
            table: TableKind::Mac,
            start: u64::from(be32(&block, 8)) * scale,
            length: u64::from(be32(&block, 12)) * scale,
            kind: Some(PartitionType::Name(text(&block[48..80]))),
            flags: 0,
        });
        if !pushed {
            break;
        }
        if let Some(partition) = table.partitions.last_mut() {
            partition.name = Some(text(&block[16..48])).filter(|name| !name.is_empty());
        }
        number += 1;
    }
    Ok(Some(table))
}

/// Text up to a NUL.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

pub(super) fn ultrix(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    let mut label = [0; 72];
    if !read_at(disk, ULTRIX_AT, &mut label)?
        || le32(&label, 0) != ULTRIX_MAGIC
        || le32(&label, 4) != 1
    {
        return Ok(None);
    }
    let mut table = PartitionTable::new(TableKind::Ultrix);
    for (number, index) in (1u32..).zip(0..ULTRIX_PARTITIONS) {
        let at = 8 + index * 8;
        let length = le32(&label, at);
        if length != 0 {
            table.push(Entry {
                number,
                table: TableKind::Ultrix,
                start: le32(&label, at + 4).into(),
                length: length.into(),
                kind: None,
                flags: 0,
            });
        }
    }
    Ok(Some(table))
}

/// Solaris slices; they count from the start of the partition.
pub(super) fn solaris(disk: &mut dyn Disk, outer: &Outer) -> Result<Vec<Entry>> {
    let Some(vtoc) = sector(disk, outer.start_sector().saturating_add(1))? else {
        return Ok(Vec::new());
    };
    if le32(&vtoc, 12) != VTOC_SANITY || le32(&vtoc, 16) != 1 {
        return Ok(Vec::new());
    }
    // libblkid leaves out the last one, whatever it is.
    let count = usize::from(le16(&vtoc, 30)).min(SLICES).saturating_sub(1);
    let slices = (0..count).map(|index| SOLARIS_SLICES_AT + index * SLICE_LENGTH);
    Ok(slices
        .filter(|&at| le16(&vtoc, at) != SOLARIS_WHOLE_DISK)
        .map(|at| Entry {
            number: 0,
            table: TableKind::Solaris,
            start: u64::from(le32(&vtoc, at + 4)) + outer.start_sector(),
            length: le32(&vtoc, at + 8).into(),
            kind: Some(PartitionType::Number(le16(&vtoc, at).into())),
            flags: le16(&vtoc, at + 2).into(),
        })
        .filter(|entry| outer.holds(entry))
        .collect())
}

/// UnixWare slices, which count from the start of the disk.
pub(super) fn unixware(disk: &mut dyn Disk, outer: &Outer) -> Result<Vec<Entry>> {
    let Some(label) = sector(disk, outer.start_sector().saturating_add(UNIXWARE_SECTOR))? else {
        return Ok(Vec::new());
    };
    if le32(&label, 4) != UNIXWARE_MAGIC || le32(&label, UNIXWARE_VTOC_AT) != VTOC_SANITY {
        return Ok(Vec::new());
    }
    // The first slice is the whole disk.
    let slices = (1..SLICES).map(|index| UNIXWARE_SLICES_AT + index * SLICE_LENGTH);
    Ok(slices
        .filter(|&at| {
            !matches!(le16(&label, at), 0 | UNIXWARE_ENTIRE_DISK)
                && le16(&label, at + 2) == UNIXWARE_VALID
        })
        .map(|at| Entry {
            number: 0,
            table: TableKind::UnixWare,
            start: le32(&label, at + 4).into(),
            length: le32(&label, at + 8).into(),
            kind: Some(PartitionType::Number(le16(&label, at).into())),
            flags: le16(&label, at + 2).into(),
        })
        .filter(|entry| outer.holds(entry))
        .collect())
}
