//! Reading tables of big-endian 64-bit entries, a piece at a time.

use super::problem::{Problem, ProblemKind};
use crate::format::qcow2::TableLocation;
use crate::source::{Allocation, Source};
use crate::units::{ByteLen, HostOffset};

/// Bytes of a table that are read at a time.
const CHUNK: u64 = 64 << 10;
const ENTRY_SIZE: u64 = 8;

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number, from 0 on.
    pub(super) index: u64,
    /// Where it lies in the file.
    pub(super) offset: HostOffset,
    /// What it says.
    pub(super) value: u64,
}

/// The entries of a table, or only those that are not 0. A part outside of the file or one
/// that can't be read is a problem, and passed over.
#[derive(Debug)]
pub(super) struct Entries<'s> {
    source: &'s Source,
    table: TableLocation,
    what: &'static str,
    /// Bytes from one entry to the next: 16 in extended L2 tables, whose second half is a
    /// bitmap.
    stride: u64,
    zeros_too: bool,
    /// Where the chunk in `buffer` starts, and the first byte not read yet: bytes of the table.
    chunk: u64,
    next: u64,
    end: u64,
    buffer: Vec<u8>,
    at: usize,
    /// Up to here the file is known to have data, so that it is not asked again.
    data_until: HostOffset,
    cut_off: bool,
}

impl<'s> Entries<'s> {
    /// The entries that are not 0.
    pub(super) fn non_zero(source: &'s Source, table: TableLocation, what: &'static str) -> Self {
        let in_file = source.length().get().saturating_sub(table.offset.get());
        let end = table.length.get().min(in_file) / ENTRY_SIZE * ENTRY_SIZE;
        Self {
            source,
            table,
            what,
            stride: ENTRY_SIZE,
            zeros_too: false,
            chunk: 0,
            next: 0,
            end,
            buffer: Vec::new(),
            at: 0,
            data_until: HostOffset::ZERO,
            cut_off: end < table.length.get() / ENTRY_SIZE * ENTRY_SIZE,
        }
    }

    /// All entries, also those that are 0.
    pub(super) fn with_zeros(mut self) -> Self {
        self.zeros_too = true;
        self
    }

    /// Entries of so many bytes, 8 or 16, of which the first 8 count.
    pub(super) fn with_stride(mut self, stride: u64) -> Self {
        self.stride = stride;
        self
    }

    fn offset(&self, in_table: u64) -> HostOffset {
        self.table.offset.saturating_add(ByteLen::new(in_table))
    }

    /// Passes over a hole of the file, where all entries are 0: a table of 2 MiB costs its
    /// writer nothing.
    fn skip_hole(&mut self) {
        let here = self.offset(self.next);
        if self.zeros_too || here < self.data_until {
            return;
        }
        let end = self.offset(self.end);
        match self.source.allocation(here) {
            Allocation::Data { until } => self.data_until = until,
            Allocation::Hole { until } => {
                let skipped = until.unwrap_or(end).min(end).since(here).get();
                self.next += skipped / self.stride * self.stride;
            }
        }
    }

    /// Reads the next chunk, which is not empty.
    fn fill(&mut self) -> Result<(), Problem> {
        let length = CHUNK.min(self.end - self.next);
        self.chunk = self.next;
        self.at = 0;
        self.next += length;
        self.buffer.resize(usize::try_from(length).unwrap_or(0), 0);
        let offset = self.offset(self.chunk);
        self.source.read_exact(offset, &mut self.buffer, self.what).map_err(|error| {
            self.buffer.clear();
            let message = format!("{} can't be read: {}", self.what, error.kind());
            Problem::new(ProblemKind::Unreadable, offset, message)
        })
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            while let Some(bytes) = self.buffer.get(self.at..self.at + 8) {
                let in_table = self.chunk + self.at as u64;
                self.at += usize::try_from(self.stride).unwrap_or(8);
                let value = crate::format::be64(bytes, 0);
                if value != 0 || self.zeros_too {
                    let index = in_table / self.stride;
                    return Some(Ok(Entry { index, offset: self.offset(in_table), value }));
                }
            }
            self.skip_hole();
            if self.next < self.end {
                if let Err(problem) = self.fill() {
                    return Some(Err(problem));
                }
                continue;
            }
            if std::mem::take(&mut self.cut_off) {
                let message = format!("{} does not lie in the file whole", self.what);
                let kind = ProblemKind::OutsideFile;
                return Some(Err(Problem::new(kind, self.table.offset, message)));
            }
            return None;
        }
    }
}
