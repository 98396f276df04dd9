//! BSD disklabels, alone on a disk or inside of a partition (libblkid's bsd.c).

use super::{Disk, Entry, PartitionTable, PartitionType, TableKind, le16, le32, read_at};
use crate::error::Result;
use crate::units::{GuestRange, SECTOR_SIZE};

const MAGIC: [u8; 4] = [0x57, 0x45, 0x56, 0x82];
/// Where the label is, depending on the machine it was made for.
const PLACES: [u64; 3] = [512, 64, 128];
const LABEL_LENGTH: usize = 404;
const COUNT_AT: usize = 138;
const PARTITIONS_AT: usize = 148;
const ENTRY_LENGTH: usize = 16;
const MAX_PARTITIONS: usize = 16;
const UNUSED: u8 = 0;

/// A partition that is looked into for a table of its own.
pub(super) struct Outer {
    pub(super) range: GuestRange,
}

impl Outer {
    pub(super) fn start_sector(&self) -> u64 {
        self.range.start.get() / SECTOR_SIZE
    }

    /// True where the entry lies inside.
    pub(super) fn holds(&self, entry: &Entry) -> bool {
        let range = entry.range();
        !range.is_empty() && range.intersection(self.range) == range
    }
}

/// A disk that is nothing but a BSD disk.
pub(super) fn read(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    let Some(label) = label(disk, 0)? else { return Ok(None) };
    let mut table = PartitionTable::new(TableKind::Bsd);
    for mut entry in entries(&label, TableKind::Bsd, 0) {
        entry.number = table.next_number();
        if !table.push(entry) {
            break;
        }
    }
    Ok(Some(table))
}

/// The partitions of a label inside of a partition; they are numbered by the caller.
pub(super) fn nested(disk: &mut dyn Disk, kind: TableKind, outer: &Outer) -> Result<Vec<Entry>> {
    let Some(label) = label(disk, outer.range.start.get())? else { return Ok(Vec::new()) };
    // FreeBSD counts from the partition's start since version 10: there the third
    // partition, which stands for the whole, starts at 0.
    let is_relative = kind == TableKind::FreeBsd
        && count(&label) >= 3
        && le32(&label, PARTITIONS_AT + 2 * ENTRY_LENGTH + 4) == 0;
    let base = if is_relative { outer.start_sector() } else { 0 };
    let mut found = entries(&label, kind, base);
    found.retain(|entry| outer.holds(entry) && entry.range() != outer.range);
    Ok(found)
}

/// The label of what starts at byte `start`, where there is one whose checksum is right.
fn label(disk: &mut dyn Disk, start: u64) -> Result<Option<[u8; LABEL_LENGTH]>> {
    let mut label = [0; LABEL_LENGTH];
    for place in PLACES {
        if !read_at(disk, start.saturating_add(place), &mut label)? || !label.starts_with(&MAGIC) {
            continue;
        }
        // The checksum makes the sum of all zero.
        let pairs = label.as_chunks::<2>().0.iter();
        let sum = pairs.fold(0, |sum, &pair| sum ^ u16::from_le_bytes(pair));
        return Ok((sum == 0).then_some(label));
    }
    Ok(None)
}

fn count(label: &[u8; LABEL_LENGTH]) -> usize {
    usize::from(le16(label, COUNT_AT)).min(MAX_PARTITIONS)
}

fn entries(label: &[u8; LABEL_LENGTH], table: TableKind, base: u64) -> Vec<Entry> {
    (0..count(label))
        .map(|index| PARTITIONS_AT + index * ENTRY_LENGTH)
        .filter(|&at| label[at + 12] != UNUSED)
        .map(|at| Entry {
            number: 0,
            table,
            start: u64::from(le32(label, at + 4)) + base,
            length: u64::from(le32(label, at)),
            kind: Some(PartitionType::Number(label[at + 12].into())),
            flags: 0,
        })
        .collect()
}
