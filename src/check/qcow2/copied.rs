//! The COPIED flags of the active layer: set where the refcount is 1, and only there.

use rayon::prelude::*;

use super::image::{COPIED, Holes, Image};
use super::l2::{L2Table, guest_offset};
use super::refcounts::{MORE, Refcounts, UNREADABLE};
use super::tables::{L1Table, for_each_window};
use crate::check::extent::Budget;
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::{Log, Tally};
use crate::check::references::{Counters, References};
use crate::error::Result;
use crate::format::qcow2::entry::L2Entry;
use crate::units::HostOffset;

/// What the flags are compared with.
pub(super) struct Flags<'f> {
    pub(super) image: &'f Image<'f>,
    pub(super) refcounts: &'f Refcounts,
    /// The refcounts of the first `clusters` clusters, as compare() leaves them.
    pub(super) counters: &'f Counters,
    pub(super) clusters: u64,
    /// Nothing else may share a cluster of the active layer: no snapshot, and all refcounts
    /// are right.
    pub(super) nothing_shared: bool,
}

impl Flags<'_> {
    /// Compares all flags, as check_oflag_copied() in QEMU's block/qcow2-refcount.c.
    ///
    /// # Errors
    /// A table can't be read.
    pub(super) fn check(&self, active: L1Table, log: &mut Log<'_>) -> Result<()> {
        // What is wrong with the entries was noted when the references were counted.
        let mut nobody = |_| {};
        let mut discarded = Log::new(0, &mut nobody);
        // The same tables were walked before, and more.
        let mut budget = Budget::for_file(self.image.source, self.image.file);
        let l1_table = [active];
        let limit = log.limit();
        for_each_window(self.image, &l1_table, &mut budget, &mut discarded, |l2_tables, _, _| {
            for batch in l2_tables.chunks(super::batch_length(self.image, log)) {
                let results = if log.is_unlimited() {
                    let tell = &mut |tally: &mut Tally| log.absorb_if_full(tally);
                    vec![self.check_tables(batch, Tally::new(limit), tell)?]
                } else {
                    batch
                        .par_chunks(super::tables_a_worker(self.image))
                        .map(|tables| self.check_tables(tables, Tally::new(limit), &mut |_| {}))
                        .collect::<Result<Vec<Tally>>>()?
                };
                for tally in results {
                    log.absorb(tally);
                }
            }
            Ok(())
        })?;
        self.check_l1(active, log)
    }

    /// The flags of the L1 table.
    fn check_l1(&self, active: L1Table, log: &mut Log<'_>) -> Result<()> {
        const CHUNK: u64 = 65536;
        let in_file = self.image.file.bytes.saturating_sub(active.offset).div_ceil(8);
        let count = active.entries.min(in_file);
        let mut first = 0;
        while first < count {
            let here = usize::try_from(CHUNK.min(count - first)).unwrap_or(0);
            let entries = self.image.read_entries(active.offset + first * 8, here)?;
            let mut tally = log.tally();
            for (index, entry) in (first..).zip(entries) {
                let offset = entry & super::image::OFFSET_MASK;
                if offset == 0 {
                    continue;
                }
                let Some(refcount) = self.refcount(offset) else { continue };
                if (refcount == 1) != (entry & COPIED != 0) {
                    let place = Place::new(Table::L1, HostOffset::new(active.offset)).entry(index);
                    let guest = guest_offset(self.image, index, 0);
                    tally.push(self.wrong("L2 table", entry, offset).place(place).guest(guest));
                    log.absorb_if_full(&mut tally);
                }
            }
            log.absorb(tally);
            first += here as u64;
        }
        Ok(())
    }

    fn check_tables(
        &self,
        tables: &[L2Table],
        mut tally: Tally,
        tell: &mut dyn FnMut(&mut Tally),
    ) -> Result<Tally> {
        let mut holes = Holes::default();
        let length = self.image.cluster_size();
        let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
        for table in tables {
            // QEMU passes over tables without offset, and those whose own refcount it can't
            // read.
            if table.offset == 0
                || self.refcount(table.offset).is_none()
                || holes.cover(self.image.source, table.offset, length)
            {
                continue;
            }
            self.image.read(table.offset, &mut buffer)?;
            self.check_table(table, &buffer, &mut tally, tell);
        }
        Ok(tally)
    }

    fn check_table(
        &self,
        table: &L2Table,
        bytes: &[u8],
        tally: &mut Tally,
        tell: &mut dyn FnMut(&mut Tally),
    ) {
        let data_file = self.image.header.has_data_file();
        let step = usize::from(self.image.header.has_extended_l2()) + 1;
        let entries = bytes.as_chunks::<8>().0.iter().step_by(step);
        for (index, entry) in (0u64..).zip(entries) {
            let entry = u64::from_be_bytes(*entry);
            if entry == 0 {
                continue;
            }
            let (L2Entry::Standard(host) | L2Entry::ZeroAllocated(host)) =
                self.image.format.decode(entry)
            else {
                continue;
            };
            let refcount = if data_file { Some(1) } else { self.refcount(host.get()) };
            let Some(refcount) = refcount else { continue };
            let copied = entry & COPIED != 0;
            if (refcount == 1) == copied && (refcount != MORE || !self.nothing_shared) {
                continue;
            }
            tell(tally);
            let place = table.place().entry(index);
            let guest = guest_offset(self.image, table.l1_index, index);
            if (refcount == 1) == copied {
                tally.add(FindingKind::ClusterShared, table.active, || {
                    let message = "something else uses the cluster too, and there is no snapshot";
                    Finding::new(FindingKind::ClusterShared, message)
                        .place(place)
                        .guest(guest)
                        .host(host.get(), self.image.cluster_size())
                });
            } else {
                tally.add(FindingKind::CopiedFlag, table.active, || {
                    self.wrong("cluster", entry, host.get()).place(place).guest(guest)
                });
            }
        }
    }

    fn wrong(&self, what: &str, entry: u64, offset: u64) -> Finding {
        let refcount =
            self.refcounts.of_cluster(self.image, offset >> self.image.file.cluster_bits);
        let is = if entry & COPIED != 0 { "set" } else { "not set" };
        let message = format!(
            "the COPIED flag of the {what} is {is}, and its refcount is {}",
            refcount.unwrap_or(0)
        );
        let kind = FindingKind::CopiedFlag;
        Finding::new(kind, message).host(offset, self.image.cluster_size())
    }

    /// 0, 1, or [`MORE`]; `None` where it can't be read.
    #[inline]
    fn refcount(&self, offset: u64) -> Option<u64> {
        let cluster = offset >> self.image.file.cluster_bits;
        if cluster < self.clusters {
            Some(self.counters.count(cluster)).filter(|&said| said != UNREADABLE)
        } else {
            self.refcounts.of_cluster(self.image, cluster).map(|refcount| refcount.min(MORE))
        }
    }
}
