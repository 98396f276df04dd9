//! L1 tables: which L2 tables they name.
//!
//! Snapshots share most L2 tables with each other and with the active layer, at the same
//! place of their L1 tables. So all L1 tables are read side by side, a stretch at a time,
//! and each L2 table that some of them name is looked at once.

use super::image::{COPIED, Image, OFFSET_MASK};
use super::l2::L2Table;
use crate::check::extent::Budget;
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::{Log, Tally};
use crate::error::Result;
use crate::units::HostOffset;

/// L1E_RESERVED_MASK in QEMU's block/qcow2.h.
const RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// L1 entries at a time, of all tables together: 4 MiB.
const WINDOW: u64 = 256 << 10;

/// An L1 table.
#[derive(Clone, Copy, Debug)]
pub(super) struct L1Table {
    /// Where it starts in the file.
    pub(super) offset: u64,
    /// Its entries, at most 2^22.
    pub(super) entries: u64,
    /// The snapshot it belongs to; `None` for the active one.
    pub(super) snapshot: Option<u32>,
}

impl L1Table {
    pub(super) fn place(&self, index: u64) -> Place {
        Place::new(Table::L1, HostOffset::new(self.offset)).entry(index).snapshot(self.snapshot)
    }

    /// Entries that are in the file; those past its end are 0.
    pub(super) fn entries_in_file(&self, image: &Image<'_>) -> u64 {
        self.entries.min(image.file.bytes.saturating_sub(self.offset).div_ceil(8))
    }
}

/// An L1 entry that names a table, in the order to sort by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Named {
    offset: u64,
    /// Which of the L1 tables; the active one is the first.
    by: u32,
    index: u32,
    copied: bool,
}

/// Hands out the L2 tables that `l1_tables` name, a stretch of L1 entries at a time, in the
/// order of the file. Of each L1 entry `log` takes what is wrong with it. The reads of L1
/// tables are taken from `budget`: those of 65536 snapshots may all be the same 32 MiB.
///
/// # Errors
/// An L1 table can't be read; the budget is used up; what `each` says.
pub(super) fn for_each_window(
    image: &Image<'_>,
    l1_tables: &[L1Table],
    budget: &mut Budget,
    log: &mut Log<'_>,
    mut each: impl FnMut(&[L2Table], &mut Budget, &mut Log<'_>) -> Result<()>,
) -> Result<()> {
    let longest = l1_tables.iter().map(|l1| l1.entries_in_file(image)).max().unwrap_or(0);
    let step = (WINDOW / (l1_tables.len() as u64).max(1)).max(1);
    let mut named = Vec::new();
    let mut start = 0;
    while start < longest {
        named.clear();
        let mut tally = log.tally();
        for (by, l1) in (0u32..).zip(l1_tables) {
            let end = l1.entries_in_file(image).min(start + step);
            let count = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
            if count == 0 {
                continue;
            }
            budget.take_read(count as u64 * 8)?;
            let entries = image.read_entries(l1.offset + start * 8, count)?;
            for (index, entry) in (start..).zip(entries) {
                if entry != 0 {
                    look_at(image, l1, index, entry, &mut tally);
                    log.absorb_if_full(&mut tally);
                    let index = u32::try_from(index).unwrap_or(u32::MAX);
                    let copied = entry & COPIED != 0;
                    named.push(Named { offset: entry & OFFSET_MASK, by, index, copied });
                }
            }
        }
        named.sort_unstable();
        log.absorb(tally);
        each(&group(&named, l1_tables), budget, log)?;
        start += step;
    }
    Ok(())
}

fn look_at(image: &Image<'_>, l1: &L1Table, index: u64, entry: u64, tally: &mut Tally) {
    let guest = super::l2::guest_offset(image, index, 0);
    let mut found = |kind, message: &dyn Fn() -> String| {
        tally.add(kind, 1, || Finding::new(kind, message()).place(l1.place(index)).guest(guest));
    };
    if entry & RESERVED != 0 {
        found(FindingKind::L1ReservedBits, &|| {
            format!("reserved bits are set in the L1 entry {entry:#018x}")
        });
    }
    let offset = entry & OFFSET_MASK;
    if !offset.is_multiple_of(image.cluster_size()) {
        found(FindingKind::L2TableUnaligned, &|| {
            format!("the L2 table is at {offset:#x}, on no cluster boundary")
        });
    }
}

/// Each table once; the first of those that name it comes first.
fn group(named: &[Named], l1_tables: &[L1Table]) -> Vec<L2Table> {
    named
        .chunk_by(|a, b| a.offset == b.offset)
        .filter_map(|same| {
            let first = same.first()?;
            let l1 = l1_tables.get(first.by as usize)?;
            let is_active = |named: &&Named| {
                l1_tables.get(named.by as usize).is_some_and(|l1| l1.snapshot.is_none())
            };
            Some(L2Table {
                offset: first.offset,
                l1_offset: l1.offset,
                l1_index: first.index.into(),
                snapshot: l1.snapshot,
                named: same.len() as u64,
                active: same.iter().filter(is_active).count() as u64,
                some_not_copied: same.iter().filter(is_active).any(|named| !named.copied),
            })
        })
        .collect()
}
