//! Master boot records with logical partitions, and the tables nested in their partitions
//! (libblkid's dos.c, minix.c).

use std::collections::BTreeSet;

use super::{
    ChainFault, Disk, Entry, PartitionTable, PartitionType, TableKind, TableWarning, bsd, foreign,
    le16, le32, sector,
};
use crate::error::Result;
use crate::signature;

const TABLE_AT: usize = 446;
const ENTRY_LENGTH: usize = 16;
/// Extended boot records without a partition that are followed, as libblkid and the kernel
/// do: a chain of them may be endless.
const MAX_EMPTY_RECORDS: u32 = 100;

const GPT: u8 = 0xee;
const MINIX: u8 = 0x81;
const MINIX_SUBPARTITIONS: usize = 4;
const AIX_MAGIC: [u8; 4] = [0xc9, 0xc2, 0xd4, 0xc1];

/// One of the four entries of a boot record.
#[derive(Clone, Copy)]
struct Slot {
    boot: u8,
    kind: u8,
    /// First sector; of an extended boot record, from somewhere else than the disk's start.
    start: u64,
    length: u64,
}

impl Slot {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

fn slots(record: &[u8; 512]) -> [Slot; 4] {
    std::array::from_fn(|index| {
        let at = TABLE_AT + index * ENTRY_LENGTH;
        Slot {
            boot: record[at],
            kind: record[at + 4],
            start: u64::from(le32(record, at + 8)),
            length: u64::from(le32(record, at + 12)),
        }
    })
}

fn has_magic(record: &[u8; 512]) -> bool {
    record.ends_with(&[0x55, 0xaa])
}

/// True for the master boot record in front of a GPT.
pub(super) fn is_protective(record: &[u8; 512]) -> bool {
    has_magic(record) && slots(record).iter().any(|slot| slot.kind == GPT)
}

/// True for the first sector of a FAT file system, by what it says of itself (libblkid's
/// fat_valid_superblock()).
pub(crate) fn is_fat(record: &[u8; 512]) -> bool {
    const NAMES: [(usize, &[u8]); 6] = [
        (0x36, b"FAT12   "),
        (0x36, b"FAT16   "),
        (0x36, b"FAT     "),
        (0x36, b"MSDOS"),
        (0x52, b"FAT32   "),
        (0x52, b"MSWIN"),
    ];
    let has_name = NAMES.iter().any(|(at, name)| record[*at..].starts_with(name));
    // JFS and HPFS put something like a FAT's first sector in front of theirs.
    let is_like_fat = has_magic(record) && !matches!(&record[54..62], b"JFS     " | b"HPFS    ");
    if !has_name && !is_like_fat {
        return false;
    }
    let (sector_size, cluster_sectors, reserved) =
        (u64::from(le16(record, 11)), u64::from(record[13]), u64::from(le16(record, 14)));
    let (fats, media) = (u64::from(record[16]), record[21]);
    if !(512..=4096).contains(&sector_size)
        || !sector_size.is_power_of_two()
        || !cluster_sectors.is_power_of_two()
        || reserved == 0
        || fats == 0
        || !(media >= 0xf8 || media == 0xf0)
    {
        return false;
    }
    let either = |short: u16, long: u32| if short == 0 { long } else { short.into() };
    let sectors = u64::from(either(le16(record, 19), le32(record, 32)));
    let short_fat = le16(record, 22);
    let fat_length = u64::from(either(short_fat, le32(record, 36)));
    let directory = (u64::from(le16(record, 17)) * 32).div_ceil(sector_size);
    let Some(data) = sectors.checked_sub(reserved + fat_length * fats + directory) else {
        return false;
    };
    let most = if short_fat == 0 && fat_length > 0 { 0x0fff_fff6 } else { 0xfff4 };
    data / cluster_sectors <= most
}

/// True where the two magic bytes are not a table's: the first sector of a FAT, exFAT or
/// NTFS file system ends in them as well, and a physical volume of LVM may have a boot
/// loader in front that leaves the table empty.
fn is_something_else(disk: &mut dyn Disk, record: &[u8; 512]) -> Result<bool> {
    let is_empty = slots(record).iter().all(|slot| slot.length == 0);
    Ok(is_fat(record)
        || signature::is_exfat_or_ntfs(disk)?
        || (is_empty && signature::is_physical_volume(disk)?))
}

/// Reads a master boot record, the logical partitions and the nested tables.
pub(super) fn read(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    let Some(record) = sector(disk, 0)? else { return Ok(None) };
    let primary = slots(&record);
    if !has_magic(&record)
        || record.starts_with(&AIX_MAGIC)
        || primary.iter().any(|slot| !matches!(slot.boot, 0 | 0x80) || slot.kind == GPT)
        || is_something_else(disk, &record)?
    {
        return Ok(None);
    }
    let mut table = PartitionTable::new(TableKind::Dos);
    let id = le32(&record, 440);
    table.uuid = (id != 0).then(|| format!("{id:08x}"));
    for (number, slot) in (1u32..).zip(primary) {
        if slot.length > 0 {
            push(&mut table, number, slot.start, slot, None);
        }
    }
    let mut next_number = 5;
    for (number, slot) in (1u32..).zip(primary) {
        if slot.length > 0 && slot.is_extended() {
            logical(disk, &mut table, number, slot, &mut next_number)?;
        }
    }
    nested(disk, &mut table, &mut next_number)?;
    Ok(Some(table))
}

fn push(
    table: &mut PartitionTable,
    number: u32,
    start: u64,
    slot: Slot,
    inside: Option<u32>,
) -> bool {
    let pushed = table.push(Entry {
        number,
        table: TableKind::Dos,
        start,
        length: slot.length,
        kind: Some(PartitionType::Number(slot.kind.into())),
        flags: slot.boot.into(),
    });
    if !pushed {
        return false;
    }
    let uuid = table.uuid.as_ref().map(|id| format!("{id}-{number:02x}"));
    if let Some(partition) = table.partitions.last_mut() {
        partition.uuid = uuid;
        partition.is_extended = slot.is_extended();
        partition.inside = inside;
    }
    true
}

/// The logical partitions of an extended one: a chain of boot records. It may lead back, as
/// fdisk makes it where a partition was deleted and another one made in its place. The kernel
/// follows it then, as libblkid did before 2026.
fn logical(
    disk: &mut dyn Disk,
    table: &mut PartitionTable,
    extended: u32,
    area: Slot,
    next_number: &mut u32,
) -> Result<()> {
    let area_end = area.start + area.length;
    let (mut here, mut here_length) = (area.start, area.length);
    let mut empty = 0;
    let mut visited = BTreeSet::new();
    if area.start == 0 {
        return Ok(());
    }
    let fault = loop {
        empty += 1;
        if empty > MAX_EMPTY_RECORDS {
            break ChainFault::TooLong;
        }
        if !visited.insert(here) {
            break ChainFault::Loop;
        }
        let Some(record) = sector(disk, here)?.filter(has_magic) else {
            // An extended partition in which there was never any has no record either.
            if here == area.start {
                return Ok(());
            }
            break ChainFault::NoRecord;
        };
        let slots = slots(&record);
        for (index, slot) in slots.into_iter().enumerate() {
            let start = here + slot.start;
            let known = table.partitions.iter().any(|known| known.range.start.get() == start * 512);
            if slot.length == 0
                || slot.is_extended()
                // The third and fourth entries are seldom real ones. (The kernel takes the
                // others wherever they lead, newer versions of libblkid do not.)
                || (index >= 2
                    && (slot.start + slot.length > here_length
                        || start + slot.length > area_end))
                || known
            {
                continue;
            }
            if !push(table, *next_number, start, slot, Some(extended)) {
                return Ok(());
            }
            *next_number += 1;
            empty = 0;
        }
        // Links count from the start of the extended partition.
        let link = slots.into_iter().find(|s| s.length > 0 && s.is_extended() && s.start != 0);
        let Some(link) = link else { return Ok(()) };
        let next = area.start + link.start;
        (here, here_length) = (next, link.length);
        if next + link.length > area_end {
            break ChainFault::OutOfExtended;
        }
    };
    table.warnings.push(TableWarning::ChainCut { extended, sector: here, fault });
    Ok(())
}

/// The tables inside of primary partitions of other systems.
fn nested(disk: &mut dyn Disk, table: &mut PartitionTable, next_number: &mut u32) -> Result<()> {
    let outer: Vec<_> = table
        .partitions
        .iter()
        .filter(|partition| !partition.is_extended && partition.inside.is_none())
        .filter_map(|partition| match partition.kind {
            Some(PartitionType::Number(kind)) => Some((partition.number, kind, partition.range)),
            _ => None,
        })
        .collect();
    for (number, kind, range) in outer {
        let inside = bsd::Outer { range };
        let found = match kind {
            0xa5 => bsd::nested(disk, TableKind::FreeBsd, &inside)?,
            0xa9 => bsd::nested(disk, TableKind::NetBsd, &inside)?,
            0xa6 => bsd::nested(disk, TableKind::OpenBsd, &inside)?,
            0x63 => foreign::unixware(disk, &inside)?,
            0x82 => foreign::solaris(disk, &inside)?,
            0x81 => minix(disk, &inside)?,
            _ => Vec::new(),
        };
        for mut entry in found {
            entry.number = *next_number;
            if !table.push(entry) {
                return Ok(());
            }
            *next_number += 1;
            if let Some(partition) = table.partitions.last_mut() {
                partition.inside = Some(number);
            }
        }
    }
    Ok(())
}

/// Minix subpartitions: a boot record in the partition's own first sector.
fn minix(disk: &mut dyn Disk, outer: &bsd::Outer) -> Result<Vec<Entry>> {
    let Some(record) = sector(disk, outer.start_sector())? else { return Ok(Vec::new()) };
    if !has_magic(&record) {
        return Ok(Vec::new());
    }
    let entries = slots(&record).into_iter().take(MINIX_SUBPARTITIONS);
    Ok(entries
        .filter(|slot| slot.kind == MINIX)
        .map(|slot| Entry {
            number: 0,
            table: TableKind::Minix,
            start: slot.start,
            length: slot.length,
            kind: Some(PartitionType::Number(slot.kind.into())),
            flags: slot.boot.into(),
        })
        .filter(|entry| outer.holds(entry))
        .collect())
}
