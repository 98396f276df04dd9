//! The snapshot table, read as far as it can be.

use std::collections::BTreeSet;

use super::image::Image;
use super::tables::L1Table;
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::Tally;
use crate::error::{Error, Result, printable};
use crate::format::be64;
use crate::format::bytes_at;
use crate::format::qcow2::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::format::qcow2::snapshot::{MAX_EXTRA_DATA, MAX_TABLE_BYTES};
use crate::units::HostOffset;

const FIXED_LENGTH: usize = 40;
/// QEMU's endof(QCowSnapshotExtraData, disk_size): what version 3 asks for.
const NEEDED_EXTRA_DATA: u32 = 16;
/// Bytes of a name or ID that are told.
const SHOWN: usize = 64;

/// The snapshot table, where it could be read.
#[derive(Debug, Default)]
pub(super) struct Snapshots {
    /// The L1 tables that can be walked.
    pub(super) l1_tables: Vec<L1Table>,
    /// Where the table starts, and its length in bytes.
    pub(super) table: (u64, u64),
    /// How many snapshots there are.
    pub(super) count: u64,
}

impl Snapshots {
    /// Reads the table as qcow2_check_read_snapshot_table() and qcow2_do_read_snapshots() in
    /// QEMU's block/qcow2-snapshot.c do. What QEMU gives up on is an error here, and the
    /// image is checked on without snapshots.
    pub(super) fn read(image: &Image<'_>, tally: &mut Tally) -> Self {
        match Self::try_read(image, tally) {
            Ok(snapshots) => snapshots,
            Err(error) => {
                let kind = FindingKind::SnapshotTableInvalid;
                let finding = Finding::new(kind, error.kind().to_string());
                tally.push(finding.place(Place::header(60)));
                Self::default()
            }
        }
    }

    fn try_read(image: &Image<'_>, tally: &mut Tally) -> Result<Self> {
        let header = image.header;
        let start = header.snapshots_offset.get();
        if header.snapshot_count > MAX_SNAPSHOTS {
            return Err(Error::invalid(format!(
                "the header says {} snapshots, more than {MAX_SNAPSHOTS}",
                header.snapshot_count
            )));
        }
        let least = u64::from(header.snapshot_count) * FIXED_LENGTH as u64;
        if !start.is_multiple_of(image.cluster_size()) || start > i64::MAX as u64 - least {
            return Err(Error::invalid(format!(
                "the snapshot table's offset {start:#x} is no multiple of a cluster, or past 2^63"
            )));
        }
        let mut snapshots =
            Self { l1_tables: Vec::new(), table: (start, 0), count: header.snapshot_count.into() };
        if header.snapshot_count == 0 {
            return Ok(snapshots);
        }
        let mut incomplete = Vec::new();
        let mut ids = BTreeSet::new();
        let mut at = start;
        for index in 0..header.snapshot_count {
            at = at.next_multiple_of(8);
            let entry = Entry::read(image, at, index)?;
            let end = at + entry.length;
            if end - start > MAX_TABLE_BYTES {
                return Err(Error::invalid(format!(
                    "the snapshot table is larger than {MAX_TABLE_BYTES} bytes at entry {index}"
                )));
            }
            if header.version >= 3 && entry.extra_data < NEEDED_EXTRA_DATA {
                incomplete.push(entry.found(FindingKind::SnapshotIncomplete, || {
                    format!(
                        "has {} bytes of extra data, less than {NEEDED_EXTRA_DATA}",
                        entry.extra_data
                    )
                }));
            }
            if !ids.insert(entry.id_hash) {
                tally.push(entry.found(FindingKind::SnapshotDuplicateId, || {
                    "has an ID that another snapshot has too".to_owned()
                }));
            }
            snapshots.l1_tables.extend(entry.l1_table(image, tally));
            at = end;
        }
        for finding in incomplete {
            tally.push(finding);
        }
        snapshots.table.1 = at - start;
        Ok(snapshots)
    }
}

/// One entry of the table.
struct Entry {
    offset: u64,
    index: u32,
    length: u64,
    l1_offset: u64,
    l1_entries: u32,
    extra_data: u32,
    id_hash: [u8; 32],
    name: String,
}

impl Entry {
    fn read(image: &Image<'_>, offset: u64, index: u32) -> Result<Self> {
        let mut fixed = [0; FIXED_LENGTH];
        image.read(offset, &mut fixed)?;
        let id_length = usize::from(u16::from_be_bytes(bytes_at(&fixed, 12)));
        let name_length = usize::from(u16::from_be_bytes(bytes_at(&fixed, 14)));
        let extra_data = u32::from_be_bytes(bytes_at(&fixed, 36));
        if extra_data as usize > MAX_EXTRA_DATA {
            return Err(Error::invalid(format!(
                "snapshot {index} has {extra_data} bytes of extra data, more than {MAX_EXTRA_DATA}"
            )));
        }
        let strings_at = offset + FIXED_LENGTH as u64 + u64::from(extra_data);
        let mut strings = vec![0; id_length + name_length];
        image.read(strings_at, &mut strings)?;
        let (id, name) = strings.split_at(id_length);
        Ok(Self {
            offset,
            index,
            length: FIXED_LENGTH as u64 + u64::from(extra_data) + strings.len() as u64,
            l1_offset: be64(&fixed, 0),
            l1_entries: u32::from_be_bytes(bytes_at(&fixed, 8)),
            extra_data,
            id_hash: *blake3::hash(id).as_bytes(),
            name: printable(&String::from_utf8_lossy(&name[..name.len().min(SHOWN)])),
        })
    }

    fn found(&self, kind: FindingKind, what: impl FnOnce() -> String) -> Finding {
        Finding::new(kind, format!("snapshot {} '{}' {}", self.index, self.name, what()))
            .place(self.place())
    }

    fn place(&self) -> Place {
        Place::new(Table::SnapshotTable, HostOffset::new(self.offset))
            .entry(self.index.into())
            .snapshot(Some(self.index))
    }

    /// The L1 table, where calculate_refcounts() in QEMU's block/qcow2-refcount.c walks it.
    fn l1_table(&self, image: &Image<'_>, tally: &mut Tally) -> Option<L1Table> {
        if !self.l1_offset.is_multiple_of(image.cluster_size()) {
            tally.push(self.found(FindingKind::SnapshotL1Unaligned, || {
                format!("has its L1 table at {:#x}, on no cluster boundary", self.l1_offset)
            }));
            return None;
        }
        if u64::from(self.l1_entries) * 8 > MAX_L1_BYTES {
            tally.push(self.found(FindingKind::SnapshotL1TooLarge, || {
                format!("has an L1 table of {} entries, which is too many", self.l1_entries)
            }));
            return None;
        }
        Some(L1Table {
            offset: self.l1_offset,
            entries: self.l1_entries.into(),
            snapshot: Some(self.index),
        })
    }
}
