//! Every byte of a file, by what refers to it: the proof that nothing is left out.

use super::clusters::{ClusterUse, Clusters};
use super::problem::{Problem, ProblemKind, Problems};
use super::refcount::Refcounts;
use super::{Piece, PieceKind};
use crate::status::FileRole;
use crate::units::{ByteLen, HostOffset};

/// Parts of clusters that are kept at most, 64 MiB of them. Past it, a cluster that is
/// partly used counts as used whole.
const MAX_PARTS: usize = 4 << 20;

/// What a range of the file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RangeUse {
    /// Metadata: the pieces say which.
    Metadata,
    /// The guest's bytes, plain, encrypted or compressed: some L2 entry names them.
    Data,
    /// Nothing refers to it, in a cluster that something refers to in part.
    Slack,
    /// Whole clusters that nothing refers to and that have no refcount.
    Unused,
    /// Whole clusters that nothing refers to though they have a refcount (leaks), or of a
    /// format without refcounts.
    Unreferenced,
    /// What is referred to here was more than imgdm keeps in memory.
    NotExamined,
}

impl RangeUse {
    /// A stable name for scripts and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Data => "data",
            Self::Slack => "slack",
            Self::Unused => "unused",
            Self::Unreferenced => "unreferenced",
            Self::NotExamined => "not-examined",
        }
    }

    /// True where nothing is known to refer to the range: something may be hidden in it.
    pub fn is_unclaimed(self) -> bool {
        !matches!(self, Self::Metadata | Self::Data)
    }
}

/// A range of the file with one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedRange {
    /// Where it starts.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: ByteLen,
    /// What it is used for.
    pub used: RangeUse,
}

impl UsedRange {
    pub(super) fn new(start: u64, end: u64, used: RangeUse) -> Self {
        let length = ByteLen::new(end.saturating_sub(start));
        Self { offset: HostOffset::new(start), length, used }
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length).get()
    }
}

/// A part of clusters: 16 bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part {
    start: u64,
    length: u32,
    is_data: bool,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + u64::from(self.length)
    }

    /// Grows by `next`, where that starts in or right after this part and is of the same kind.
    fn takes(&mut self, next: Part) -> bool {
        let joins = self.is_data == next.is_data && (self.start..=self.end()).contains(&next.start);
        let length = u32::try_from(self.end().max(next.end()) - self.start);
        match length {
            Ok(length) if joins => {
                self.length = length;
                true
            }
            _ => false,
        }
    }
}

/// How much of what is in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// L2 entries that name a data cluster in the image file. An L2 table that several
    /// snapshots share counts once.
    pub data_references: u64,
    /// L2 entries that name a cluster of the external data file.
    pub data_file_references: u64,
    /// L2 entries that name a compressed stream.
    pub compressed_streams: u64,
}

/// What every byte of a file is used for.
#[derive(Debug)]
pub(super) struct Usage {
    file_length: u64,
    cluster_size: u64,
    clusters: Clusters,
    parts: Vec<Part>,
    /// The parts have been too many to be kept.
    coarse: bool,
    pub(super) counts: Counts,
}

impl Usage {
    /// Of a file of so many bytes, in clusters of a power of two.
    pub(super) fn new(file_length: u64, cluster_size: u64) -> Self {
        Self {
            file_length,
            cluster_size,
            clusters: Clusters::new(file_length.div_ceil(cluster_size)),
            parts: Vec::new(),
            coarse: false,
            counts: Counts::default(),
        }
    }

    /// True the first time for an L2 table that starts a cluster of the file.
    pub(super) fn walk_table(&mut self, offset: HostOffset) -> bool {
        offset.is_multiple_of(self.cluster_size)
            && self.clusters.walk_table(offset.get() / self.cluster_size)
    }

    /// Notes that something refers to the piece.
    pub(super) fn mark(&mut self, piece: &Piece) {
        let is_data = match piece.kind {
            PieceKind::Data { .. } if piece.file == FileRole::DataFile => {
                self.counts.data_file_references += 1;
                return;
            }
            PieceKind::Data { .. } => {
                self.counts.data_references += 1;
                true
            }
            PieceKind::Compressed { .. } => {
                self.counts.compressed_streams += 1;
                true
            }
            _ => false,
        };
        let size = self.cluster_size;
        let (start, end) = (piece.offset.get(), piece.end().get().min(self.file_length));
        if start >= end {
            return;
        }
        let used = if is_data { ClusterUse::Data } else { ClusterUse::Metadata };
        let first_whole = start.div_ceil(size);
        // The file may end inside its last cluster, which is whole then.
        let end_whole = if end == self.file_length { end.div_ceil(size) } else { end / size };
        if first_whole < end_whole {
            self.clusters.mark(first_whole, end_whole, used);
            self.add_part(start, (first_whole * size).min(end), is_data);
            self.add_part((end_whole * size).max(start).min(end), end, is_data);
        } else {
            self.add_part(start, end, is_data);
        }
    }

    fn add_part(&mut self, start: u64, end: u64, is_data: bool) {
        if start >= end {
            return;
        }
        if self.coarse {
            let used = if is_data { ClusterUse::Data } else { ClusterUse::Metadata };
            let size = self.cluster_size;
            self.clusters.mark(start / size, end.div_ceil(size), used);
            return;
        }
        // Less than two clusters, each at most 2 MiB.
        let length = u32::try_from(end - start).unwrap_or(u32::MAX);
        let next = Part { start, length, is_data };
        if self.parts.last_mut().is_some_and(|last| last.takes(next)) {
            return;
        }
        if self.parts.len() == MAX_PARTS {
            self.join_parts();
            self.coarse = self.parts.len() > MAX_PARTS / 4 * 3;
        }
        self.parts.push(next);
    }

    fn join_parts(&mut self) {
        self.parts.sort_unstable();
        self.parts.dedup_by(|next, before| before.takes(*next));
    }

    /// To be called when all is marked; says what could not be kept.
    pub(super) fn finish(&mut self, problems: &mut Problems) {
        self.join_parts();
        let not_kept = |what| Problem::new(ProblemKind::NotExamined, HostOffset::ZERO, what);
        if self.clusters.is_exhausted() {
            problems.push(not_kept(
                "the clusters in use lie strewn over more of the file than imgdm keeps in memory; what is past that is listed as not examined",
            ));
        } else if self.coarse {
            problems.push(not_kept(
                "compressed clusters leave more gaps than imgdm keeps in memory; some are listed as data",
            ));
        }
    }

    /// All ranges in order, without a gap, from 0 to the end of the file; neighbours may have
    /// the same use. `refcounts` is none where the format has no refcounts.
    pub(super) fn ranges<'u>(&'u self, refcounts: Option<Refcounts<'u>>) -> Ranges<'u> {
        Ranges { usage: self, refcounts, at: 0, next_part: 0, free_until: 0 }
    }
}

/// See [`Usage::ranges`].
#[derive(Debug)]
pub(super) struct Ranges<'u> {
    usage: &'u Usage,
    refcounts: Option<Refcounts<'u>>,
    at: u64,
    next_part: usize,
    /// No cluster up to here is referred to as a whole.
    free_until: u64,
}

impl Ranges<'_> {
    /// What could not be read on the way.
    pub(super) fn problems(&self) -> impl Iterator<Item = &Problem> {
        self.refcounts.iter().flat_map(|refcounts| refcounts.problems().iter())
    }

    fn taken(&mut self, end: u64, used: RangeUse) -> UsedRange {
        let range = UsedRange::new(self.at, end, used);
        self.at = end;
        range
    }

    /// The end and use of the next range, in clusters up to `run_end` that nothing refers to
    /// as a whole.
    fn step_in_free(&mut self, run_end: u64) -> (u64, RangeUse) {
        let usage = self.usage;
        let size = usage.cluster_size;
        while usage.parts.get(self.next_part).is_some_and(|part| part.end() <= self.at) {
            self.next_part += 1;
        }
        let part = usage.parts.get(self.next_part).filter(|part| part.start < run_end);
        let Some(part) = part else {
            // A cluster whose part ended before is not whole any more.
            if !self.at.is_multiple_of(size) {
                let end = self.at.next_multiple_of(size).min(run_end);
                return (end, RangeUse::Slack);
            }
            return self.step_in_unclaimed(run_end);
        };
        if part.start <= self.at {
            let used = if part.is_data { RangeUse::Data } else { RangeUse::Metadata };
            return (part.end().min(run_end), used);
        }
        if !self.at.is_multiple_of(size) {
            return (part.start.min(self.at.next_multiple_of(size)), RangeUse::Slack);
        }
        match part.start / size * size {
            whole_end if whole_end > self.at => self.step_in_unclaimed(whole_end),
            _ => (part.start, RangeUse::Slack),
        }
    }

    /// As [`step_in_free`](Self::step_in_free), where nothing refers to any byte up to `end`.
    fn step_in_unclaimed(&mut self, end: u64) -> (u64, RangeUse) {
        let size = self.usage.cluster_size;
        if self.usage.clusters.is_exhausted() {
            return (end, RangeUse::NotExamined);
        }
        let Some(refcounts) = &mut self.refcounts else { return (end, RangeUse::Unreferenced) };
        let (counted, run_end) = refcounts.run(self.at / size, end.div_ceil(size));
        let used = if counted { RangeUse::Unreferenced } else { RangeUse::Unused };
        (run_end.saturating_mul(size).min(end), used)
    }
}

impl Iterator for Ranges<'_> {
    type Item = UsedRange;

    fn next(&mut self) -> Option<UsedRange> {
        let (size, file_length) = (self.usage.cluster_size, self.usage.file_length);
        if self.at >= file_length {
            return None;
        }
        if self.at >= self.free_until {
            let (used, end) = self.usage.clusters.run(self.at / size);
            let end = end.saturating_mul(size).min(file_length);
            match used {
                ClusterUse::None => self.free_until = end,
                ClusterUse::Data => return Some(self.taken(end, RangeUse::Data)),
                _ => return Some(self.taken(end, RangeUse::Metadata)),
            }
        }
        let (end, used) = self.step_in_free(self.free_until);
        Some(self.taken(end, used))
    }
}

/// Joins neighbours of the same use.
#[derive(Debug)]
pub(super) struct Joined<I> {
    ranges: I,
    pending: Option<UsedRange>,
}

impl<I: Iterator<Item = UsedRange>> Joined<I> {
    pub(super) fn new(ranges: I) -> Self {
        Self { ranges, pending: None }
    }
}

impl<I: Iterator<Item = UsedRange>> Iterator for Joined<I> {
    type Item = UsedRange;

    fn next(&mut self) -> Option<UsedRange> {
        loop {
            let next = self.ranges.next();
            match (&mut self.pending, next) {
                (Some(range), Some(next)) if range.used == next.used => {
                    *range = UsedRange::new(range.offset.get(), next.end(), range.used);
                }
                _ => {
                    let done = std::mem::replace(&mut self.pending, next);
                    if done.is_some() || next.is_none() {
                        return done;
                    }
                }
            }
        }
    }
}
