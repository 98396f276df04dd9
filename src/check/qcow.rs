//! qcow version 1: whether what the tables name is in the file, and named once.
//!
//! It has no refcounts, so that nothing can be lost or leaked; what nobody refers to is no
//! finding.

use super::extent::{Budget, Extent, FileSize, gave_up};
use super::finding::{Finding, FindingKind, Place, Table};
use super::log::{Log, Tally};
use super::references::{Counters, References};
use super::{Numbers, Report};
use crate::error::Result;
use crate::format::qcow::{ENTRY_SIZE, OFLAG_COMPRESSED, QcowHeader};
use crate::format::{Format, be64};
use crate::source::Source;
use crate::units::HostOffset;

/// L1 entries that are read at a time.
const L1_CHUNK: u64 = 8192;

/// Checks a qcow image. Clusters and tables are noted first; then each is looked at again,
/// to see whether something else lies there too.
///
/// # Errors
/// What [`QcowHeader::parse`] says.
pub(super) fn check(source: &Source, log: &mut Log<'_>) -> Result<Report> {
    let mut start = [0; QcowHeader::LENGTH];
    let length = source.read_up_to(HostOffset::ZERO, &mut start)?;
    let header = QcowHeader::parse(&start[..length])?;
    // The piece by which all tables and clusters are allocated: QEMU puts compressed
    // clusters right behind each other, and behind what was written before.
    let grain = header.cluster_size().min(header.l2_entries() * ENTRY_SIZE);
    let file = FileSize { bytes: source.length().get(), cluster_bits: grain.trailing_zeros() };
    let used = Counters::new(file.clusters() + 1)?;
    let checker = Checker { source, header: &header, file, used: &used };
    let total_clusters = header.size().get().div_ceil(header.cluster_size());
    let mut numbers = Numbers { total_clusters, ..Numbers::default() };
    let mut tally = log.tally();
    let mut outcome = Ok(());
    if checker.l1_is_in_file(&mut tally) {
        checker.note_heads();
        outcome = checker.walk(&mut |part| checker.note(part));
        if outcome.is_ok() {
            outcome = checker.walk(&mut |part| {
                checker.look_at(part, &mut numbers, &mut tally);
                log.absorb_if_full(&mut tally);
            });
        }
    }
    if let Err(error) = outcome {
        tally.push(gave_up(&error));
    }
    log.absorb(tally);
    Ok(Report::new(Format::Qcow, numbers, log))
}

/// What lies in a part of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    L1Table,
    L2Table,
    Cluster,
    Stream,
}

/// A part of the file that a table names.
#[derive(Clone, Copy, Debug)]
struct Part {
    content: Content,
    offset: u64,
    length: u64,
    guest: u64,
    place: Place,
}

impl Part {
    fn found(&self, kind: FindingKind, how: &str) -> Finding {
        let what = match self.content {
            Content::L1Table => "the L1 table",
            Content::L2Table => "the L2 table",
            Content::Cluster => "the cluster",
            Content::Stream => "the compressed cluster",
        };
        Finding::new(kind, format!("{what} {how}"))
            .host(self.offset, self.length)
            .guest(self.guest)
            .place(self.place)
    }
}

struct Checker<'c> {
    source: &'c Source,
    header: &'c QcowHeader,
    file: FileSize,
    /// How often each piece of the file is used by tables and clusters, but for streams.
    used: &'c Counters,
}

impl Checker<'_> {
    fn l1_table(&self) -> Part {
        let offset = self.header.l1_table_offset();
        Part {
            content: Content::L1Table,
            offset: offset.get(),
            length: self.header.l1_entries() * ENTRY_SIZE,
            guest: 0,
            place: Place::header(40),
        }
    }

    /// What a stream may lie right behind of, in one piece with it: the header with the
    /// backing file's name, and the L1 table. Start and end of each.
    fn heads(&self) -> [(u64, u64); 2] {
        let header = QcowHeader::LENGTH as u64;
        let name = self.header.backing_file_offset().get();
        let name_end = name.saturating_add(self.header.backing_file_size().into());
        let header_end = if name < 4096 { header.max(name_end) } else { header };
        let l1 = self.l1_table();
        [(0, header_end), (l1.offset, l1.offset + l1.length)]
    }

    fn l1_is_in_file(&self, tally: &mut Tally) -> bool {
        let l1 = self.l1_table();
        if l1.offset + l1.length <= self.file.bytes {
            return true;
        }
        tally.push(l1.found(FindingKind::PastFileEnd, "ends past the end of the file"));
        false
    }

    /// Hands out all parts that the L1 table and the L2 tables name.
    fn walk(&self, each: &mut dyn FnMut(&Part)) -> Result<()> {
        let mut budget = Budget::for_file(self.source, self.file);
        let l1_offset = self.header.l1_table_offset().get();
        let length = self.header.l2_entries() * ENTRY_SIZE;
        let mut table = vec![0; usize::try_from(length).unwrap_or(0)];
        let mut chunk = Vec::new();
        let mut first = 0;
        while first < self.header.l1_entries() {
            let here = L1_CHUNK.min(self.header.l1_entries() - first);
            chunk.resize(usize::try_from(here * ENTRY_SIZE).unwrap_or(0), 0);
            let at = HostOffset::new(l1_offset + first * ENTRY_SIZE);
            self.source.read_exact(at, &mut chunk, "the L1 table")?;
            for (index, entry) in (first..).zip(chunk.as_chunks::<8>().0) {
                let offset = u64::from_be_bytes(*entry);
                if offset == 0 {
                    continue;
                }
                let guest = index * self.header.l2_span();
                let place = Place::new(Table::L1, HostOffset::new(l1_offset)).entry(index);
                let content = Content::L2Table;
                each(&Part { content, offset, length, guest, place });
                if offset.checked_add(length).is_some_and(|end| end <= self.file.bytes) {
                    budget.take(length)?;
                    self.source.read_exact(HostOffset::new(offset), &mut table, "an L2 table")?;
                    self.l2_table(offset, guest, &table, each);
                }
            }
            first += here;
        }
        Ok(())
    }

    fn l2_table(&self, offset: u64, guest: u64, table: &[u8], each: &mut dyn FnMut(&Part)) {
        let cluster_size = self.header.cluster_size();
        for (number, index) in (0u64..).zip(0..table.len() / 8) {
            let entry = be64(table, index);
            if entry == 0 {
                continue;
            }
            let place = Place::new(Table::L2, HostOffset::new(offset)).entry(number);
            let guest = guest + number * cluster_size;
            let (content, offset, length) = if entry & OFLAG_COMPRESSED == 0 {
                (Content::Cluster, entry, cluster_size)
            } else {
                let (host, length) = self.header.stream(entry);
                (Content::Stream, host.get(), length.get())
            };
            each(&Part { content, offset, length, guest, place });
        }
    }

    fn note_heads(&self) {
        let pieces = |(start, end): (u64, u64)| self.file.extent(start, end - start);
        let mut next = 0;
        for head in self.heads() {
            let Extent::Clusters(first, count) = pieces(head) else { continue };
            // They share a piece.
            let from = if first < next { next.min(first + count) } else { first };
            self.used.add(from, first + count - from, 1);
            next = first + count;
        }
    }

    /// Notes a part as used.
    fn note(&self, part: &Part) {
        if part.content != Content::Stream
            && let Extent::Clusters(first, count) = self.file.extent(part.offset, part.length)
        {
            self.used.add(first, count, 1);
        }
    }

    fn look_at(&self, part: &Part, numbers: &mut Numbers, tally: &mut Tally) {
        match part.content {
            Content::Cluster => numbers.allocated_clusters += 1,
            Content::Stream => {
                numbers.allocated_clusters += 1;
                numbers.compressed_clusters += 1;
            }
            Content::L1Table | Content::L2Table => {}
        }
        let end = part.offset.saturating_add(part.length);
        // The last cluster may be half there; tables and streams have to be whole.
        let may_miss = if part.content == Content::Cluster { part.length - 1 } else { 0 };
        if end > self.file.bytes.saturating_add(may_miss) {
            let kind = FindingKind::PastFileEnd;
            return tally.add(kind, 1, || part.found(kind, "lies past the end of the file"));
        }
        numbers.image_end_offset = numbers.image_end_offset.max(end);
        let Extent::Clusters(first, count) = self.file.extent(part.offset, part.length) else {
            return;
        };
        let is_stream = part.content == Content::Stream;
        let heads = self.heads();
        let hits_head = heads.iter().any(|&(start, stop)| part.offset < stop && start < end);
        let overlaps = (first..first + count).any(|piece| {
            let may_be = if is_stream {
                let start = piece << self.file.cluster_bits;
                let is_head = heads
                    .iter()
                    .any(|&(head, stop)| start < stop && head < start + self.file.cluster_size());
                u64::from(is_head && !hits_head)
            } else {
                1
            };
            self.used.count(piece) > may_be
        });
        if overlaps {
            let kind = FindingKind::Overlap;
            tally.add(kind, 1, || part.found(kind, "shares bytes with something else"));
        }
    }
}
