//! qcow2: every refcount against what refers to the cluster, as QEMU counts it.

mod copied;
mod extras;
mod image;
mod l2;
mod refcounts;
mod snapshots;
mod tables;

use rayon::prelude::*;

use super::extent::{Budget, Extent, FileSize, gave_up};
use super::finding::{Finding, FindingKind, Place, Severity, Table};
use super::log::{Log, Tally};
use super::references::{Counters, ExactCounters, References, SATURATED, has_shared};
use super::{Numbers, Report, gives_up};
use crate::error::Result;
use crate::format::Format;
use crate::format::qcow2::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, Qcow2Header};
use crate::format::qcow2::{Extensions, incompatible, read_extensions, read_header};
use crate::source::Source;
use crate::units::HostOffset;

use copied::Flags;
use image::{Holes, Image};
use l2::{Clusters, L2Table};
use refcounts::{Refcounts, compare, compare_saturated};
use snapshots::Snapshots;
use tables::{L1Table, for_each_window};

/// QEMU checks no more clusters (INT_MAX).
const MAX_CLUSTERS: u64 = i32::MAX as u64;
/// L2 tables that are walked in a round, in bytes.
const ROUND_BYTES: u64 = 16 << 20;
/// What a worker takes of it at least.
const WORKER_BYTES: u64 = 64 << 10;

/// What it costs to learn that a table is in a hole, in bytes that could be read instead.
const HOLE_COST: u64 = 128;

/// L2 tables to walk before what was found is told.
fn batch_length(image: &Image<'_>, log: &Log<'_>) -> usize {
    let bytes = if log.is_unlimited() { WORKER_BYTES } else { ROUND_BYTES };
    usize::try_from(bytes / image.cluster_size()).unwrap_or(1).max(1)
}

/// L2 tables that a worker walks at a time.
fn tables_a_worker(image: &Image<'_>) -> usize {
    usize::try_from(WORKER_BYTES / image.cluster_size()).unwrap_or(1).max(1)
}

/// Checks a qcow2 image, as qcow2_co_check() in QEMU's block/qcow2.c does without repair.
///
/// # Errors
/// What QEMU refuses to open: a header that can't be understood, unknown incompatible
/// features, header extensions that break a bound.
pub(super) fn check(source: &Source, log: &mut Log<'_>) -> Result<Report> {
    let header = read_header(source, Qcow2Header::parse_damaged)?;
    let extensions = read_extensions(source, &header)?;
    header.refuse_unknown_features(&extensions)?;
    let image = Image::new(source, &header);
    note_header(&header, log);
    let checker = Checker::new(image, &extensions, log);
    let total = header.virtual_size.get().div_ceil(header.cluster_size());
    let mut numbers = Numbers { total_clusters: total, ..Numbers::default() };
    if let Some(checker) = checker {
        checker.check(&mut numbers, log)?;
    }
    Ok(Report::new(Format::Qcow2, numbers, log))
}

/// What the header alone tells.
fn note_header(header: &Qcow2Header, log: &mut Log<'_>) {
    let mut note = |kind, field, message: String| {
        log.push(Finding::new(kind, message).place(Place::header(field)));
    };
    if header.incompatible_features & incompatible::DIRTY != 0 {
        let message = "the image is marked dirty: its refcounts may be out of date";
        note(FindingKind::MarkedDirty, 72, message.to_owned());
    }
    if header.incompatible_features & incompatible::CORRUPT != 0 {
        let message = "the image is marked corrupt";
        note(FindingKind::MarkedCorrupt, 72, message.to_owned());
    }
    let unknown = [
        ("compatible", header.compatible_features & !1, 80),
        (
            "autoclear",
            header.autoclear_features & !(AUTOCLEAR_BITMAPS | AUTOCLEAR_DATA_FILE_RAW),
            88,
        ),
    ];
    for (name, bits, field) in unknown {
        if bits != 0 {
            let message = format!("unknown bits of the {name} features are set: {bits:#x}");
            note(FindingKind::UnknownFeature, field, message);
        }
    }
}

/// A structure that nothing else may use.
#[derive(Clone, Copy)]
struct Exclusive {
    name: &'static str,
    place: Place,
    offset: u64,
    length: u64,
}

struct Checker<'c> {
    image: Image<'c>,
    extensions: &'c Extensions,
    snapshots: Snapshots,
    refcounts: Refcounts,
    active: L1Table,
    /// Clusters of the file.
    clusters: u64,
}

impl<'c> Checker<'c> {
    /// `None` where the file is so large that QEMU does not check it, or where there are no
    /// refcounts to compare with.
    fn new(image: Image<'c>, extensions: &'c Extensions, log: &mut Log<'_>) -> Option<Self> {
        let mut tally = log.tally();
        let snapshots = Snapshots::read(&image, &mut tally);
        log.absorb(tally);
        let clusters = image.file.clusters();
        if clusters > MAX_CLUSTERS {
            let message = format!("the file has {clusters} clusters, more than {MAX_CLUSTERS}");
            log.push(Finding::new(FindingKind::FileTooLarge, message));
            return None;
        }
        let l1 = image.header.l1_table;
        let active =
            L1Table { offset: l1.offset.get(), entries: l1.length.get() / 8, snapshot: None };
        let refcounts = match Refcounts::read(&image) {
            Ok(refcounts) => refcounts,
            Err(error) => {
                let offset = image.header.refcount_table.offset;
                let place = Place::new(Table::RefcountTable, offset);
                log.push(image.unreadable("the refcount table", place, &error));
                return None;
            }
        };
        Some(Self { image, extensions, snapshots, refcounts, active, clusters })
    }

    fn check(&self, numbers: &mut Numbers, log: &mut Log<'_>) -> Result<()> {
        // One more for what ends less than a cluster past the end of the file.
        let counters = Counters::new(self.clusters + 1)?;
        let mut budget = self.budget();
        let clusters = self.count(&counters, &mut budget, log);
        numbers.allocated_clusters = clusters.allocated;
        numbers.fragmented_clusters = clusters.fragmented;
        numbers.compressed_clusters = clusters.compressed;
        let all = self.clusters + u64::from(counters.count(self.clusters) > 0);
        if gives_up(log.counts()) {
            log.ignore_leaks();
        }

        let mut too_much = log.counts().of(FindingKind::TooMuchWork) > 0;
        // Each time it costs as much as the first time.
        let (cost, mut repeats) = (budget.taken(), self.budget());
        let mut page = 0;
        while !too_much && let Some(exact) = ExactCounters::for_saturated(&counters, page)? {
            if let Err(error) = repeats.take(cost) {
                log.push(gave_up(&error));
                log.ignore_leaks();
                too_much = true;
                break;
            }
            self.count(&exact, &mut self.budget(), &mut Log::new(0, &mut |_| {}));
            compare_saturated(&self.image, &self.refcounts, &counters, &exact, log);
            page = exact.next_page();
        }
        if !too_much {
            self.note_overlaps(&counters, log);
        }
        let compared = compare(&self.image, &self.refcounts, &counters, all, log);
        numbers.image_end_offset =
            (compared.highest.unwrap_or(0) + 1) << self.image.file.cluster_bits;

        let right = [Severity::Error, Severity::Corruption, Severity::Leak]
            .iter()
            .all(|&severity| log.counts().of_severity(severity) == 0);
        // Where each cluster is used once and has the refcount 1, flags that are all set are
        // all right.
        if too_much || (right && !compared.some_shared && !clusters.some_not_copied) {
            return Ok(());
        }
        let flags = Flags {
            image: &self.image,
            refcounts: &self.refcounts,
            counters: &counters,
            clusters: all,
            nothing_shared: right && self.snapshots.count == 0,
        };
        if let Err(error) = flags.check(self.active, log) {
            log.push(Finding::new(FindingKind::ReadError, error.kind().to_string()));
        }
        Ok(())
    }

    /// What one walk of all tables may read.
    fn budget(&self) -> Budget {
        Budget::for_file(self.image.source, self.image.file)
    }

    /// Counts all references, as calculate_refcounts() in QEMU's block/qcow2-refcount.c.
    /// Where QEMU gives up, this goes on.
    fn count<R: References>(&self, refs: &R, budget: &mut Budget, log: &mut Log<'_>) -> Clusters {
        let image = &self.image;
        let mut tally = log.tally();
        for part in self.exclusive() {
            // The order in which QEMU counts is no matter: but for the refcount blocks, which
            // come last, sums are all that counts.
            image.refer(refs, &mut tally, (part.offset, part.length, 1), || {
                Finding::new(FindingKind::PastFileEnd, part.name).place(part.place)
            });
            log.absorb_if_full(&mut tally);
        }
        for l1 in self.l1_tables() {
            if !FileSize::can_read(l1.offset, l1.entries * 8) {
                let place = Place::new(Table::L1, HostOffset::new(l1.offset)).snapshot(l1.snapshot);
                tally.push(
                    Finding::new(FindingKind::ReadError, "the L1 table cannot be read")
                        .place(place),
                );
                log.absorb_if_full(&mut tally);
            }
        }
        if image.header.has_data_file() && self.snapshots.count > 0 {
            let message = format!(
                "{} snapshots in an image with an external data file",
                self.snapshots.count
            );
            tally.push(
                Finding::new(FindingKind::SnapshotsWithDataFile, message).place(Place::header(60)),
            );
        }
        log.absorb(tally);
        let clusters = self.walk(refs, budget, log);
        let mut tally = log.tally();
        extras::check_crypt(image, self.extensions, refs, &mut tally);
        log.absorb(tally);
        extras::check_bitmaps(image, self.extensions, refs, budget, log);
        self.refcounts.refer_to_blocks(image, refs, log);
        clusters
    }

    /// The active L1 table and those of the snapshots.
    fn l1_tables(&self) -> Vec<L1Table> {
        let snapshots = self.snapshots.l1_tables.iter();
        std::iter::once(&self.active)
            .chain(snapshots)
            .filter(|l1| l1.entries > 0)
            .copied()
            .collect()
    }

    /// The parts of the image that only the header or the snapshot table names.
    fn exclusive(&self) -> impl Iterator<Item = Exclusive> {
        let header = self.image.header;
        let part = |name, table, offset: u64, length: u64| Exclusive {
            name,
            place: Place::new(table, HostOffset::new(offset)),
            offset,
            length,
        };
        let l1_tables = self.l1_tables().into_iter().map(move |l1| {
            let exclusive = part("the L1 table", Table::L1, l1.offset, l1.entries * 8);
            Exclusive { place: exclusive.place.snapshot(l1.snapshot), ..exclusive }
        });
        let (snapshots, length) = self.snapshots.table;
        let refcounts = header.refcount_table;
        [
            part("the header", Table::Header, 0, header.cluster_size()),
            part("the snapshot table", Table::SnapshotTable, snapshots, length),
            part(
                "the refcount table",
                Table::RefcountTable,
                refcounts.offset.get(),
                refcounts.length.get(),
            ),
        ]
        .into_iter()
        .chain(l1_tables)
    }

    /// Walks all L2 tables that the L1 tables name.
    fn walk<R: References>(&self, refs: &R, budget: &mut Budget, log: &mut Log<'_>) -> Clusters {
        let mut total = Clusters::default();
        if let Err(error) = self.try_walk(refs, &mut total, budget, log) {
            log.push(gave_up(&error));
        }
        total
    }

    fn try_walk<R: References>(
        &self,
        refs: &R,
        total: &mut Clusters,
        budget: &mut Budget,
        log: &mut Log<'_>,
    ) -> Result<()> {
        let image = &self.image;
        let l1_tables = self.l1_tables();
        let limit = log.limit();
        for_each_window(image, &l1_tables, budget, log, |l2_tables, budget, log| {
            let mut tally = log.tally();
            for table in l2_tables {
                total.some_not_copied |= table.some_not_copied;
                let size = image.cluster_size();
                image.refer(refs, &mut tally, (table.offset, size, table.named), || {
                    Finding::new(FindingKind::PastFileEnd, "the L2 table")
                        .place(table.named_by())
                        .guest(l2::guest_offset(image, table.l1_index, 0))
                });
                log.absorb_if_full(&mut tally);
            }
            log.absorb(tally);
            for batch in l2_tables.chunks(batch_length(image, log)) {
                let results = if log.is_unlimited() {
                    // A single table may have hundreds of thousands of findings.
                    let tell = &mut |tally: &mut Tally| log.absorb_if_full(tally);
                    vec![walk_tables(image, batch, refs, Tally::new(limit), tell)?]
                } else {
                    batch
                        .par_chunks(tables_a_worker(image))
                        .map(|tables| {
                            walk_tables(image, tables, refs, Tally::new(limit), &mut |_| {})
                        })
                        .collect::<Result<Vec<(Clusters, Tally, u64)>>>()?
                };
                let mut work = 0u64;
                for (clusters, tally, cost) in results {
                    total.add(clusters);
                    log.absorb(tally);
                    work = work.saturating_add(cost);
                }
                // After they were read, so that it is told what is wrong with them.
                budget.take(work)?;
            }
            Ok(())
        })
    }

    /// Notes metadata whose clusters have more references than they should: QEMU does not
    /// see that where the refcounts agree.
    fn note_overlaps(&self, counters: &Counters, log: &mut Log<'_>) {
        if !(0..counters.words()).any(|word| has_shared(counters.word(word))) {
            return;
        }
        let image = &self.image;
        let mut tally = log.tally();
        for part in self.exclusive() {
            note_overlap(image, counters, &mut tally, (part.offset, part.length, 1), || {
                Finding::new(FindingKind::MetadataOverlap, part.name).place(part.place)
            });
            log.absorb_if_full(&mut tally);
        }
        let mut nobody = |_| {};
        let mut discarded = Log::new(0, &mut nobody);
        let (l1_tables, mut budget) = (self.l1_tables(), self.budget());
        let each = |l2_tables: &[L2Table], _: &mut Budget, _: &mut Log<'_>| {
            for table in l2_tables {
                let used = (table.offset, image.cluster_size(), table.named);
                note_overlap(image, counters, &mut tally, used, || {
                    Finding::new(FindingKind::MetadataOverlap, "the L2 table")
                        .place(table.named_by())
                });
                log.absorb_if_full(&mut tally);
            }
            Ok(())
        };
        let outcome = for_each_window(image, &l1_tables, &mut budget, &mut discarded, each);
        // One that can't be read was noted before.
        drop(outcome);
        log.absorb(tally);
    }
}

/// Notes the clusters of a structure that have more than `named` references.
fn note_overlap(
    image: &Image<'_>,
    counters: &Counters,
    tally: &mut Tally,
    (offset, length, named): (u64, u64, u64),
    what: impl FnOnce() -> Finding,
) {
    let Extent::Clusters(first, count) = image.file.extent(offset, length) else { return };
    let mut shared = (first..first + count).filter(|&cluster| {
        let references = counters.count(cluster);
        // 3 stands for more, too.
        references > named && (references < SATURATED || named < SATURATED)
    });
    let Some(cluster) = shared.next() else { return };
    tally.add(FindingKind::MetadataOverlap, 1 + shared.count() as u64, || {
        let what = what();
        let message = format!("something else uses clusters of {} too", what.message);
        Finding { message, ..what }.host(cluster << image.file.cluster_bits, image.cluster_size())
    });
}

/// Walks tables side by side in the file; also says what they cost, in bytes read.
fn walk_tables<R: References>(
    image: &Image<'_>,
    tables: &[L2Table],
    refs: &R,
    mut tally: Tally,
    tell: &mut dyn FnMut(&mut Tally),
) -> Result<(Clusters, Tally, u64)> {
    let (mut total, mut cost) = (Clusters::default(), 0);
    let mut holes = Holes::default();
    let length = image.cluster_size();
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(0)];
    for table in tables {
        if holes.cover(image.source, table.offset, length) {
            let in_file = table.offset < image.file.bytes;
            cost += if in_file { HOLE_COST } else { 0 };
            continue; // All entries are 0.
        }
        cost += length;
        total.add(l2::walk(image, table, &mut buffer, refs, &mut tally, tell)?);
    }
    Ok((total, tally, cost))
}
