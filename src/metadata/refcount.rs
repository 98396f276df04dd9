//! Reading refcounts in the order of the file.

use super::problem::{Problem, ProblemKind, Problems};
use crate::format::qcow2::Qcow2Header;
use crate::source::{Allocation, Source};
use crate::units::{ByteLen, HostOffset};

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// The refcounts of an image, as far as they are 0 or not. What can't be read counts as 0.
#[derive(Debug)]
pub(super) struct Refcounts<'s> {
    source: &'s Source,
    header: &'s Qcow2Header,
    /// The number of the block in `block`, and whether it is all zeros.
    loaded: Option<(u64, bool)>,
    block: Vec<u8>,
    problems: Problems,
}

impl<'s> Refcounts<'s> {
    pub(super) fn new(source: &'s Source, header: &'s Qcow2Header) -> Self {
        Self { source, header, loaded: None, block: Vec::new(), problems: Problems::default() }
    }

    /// What could not be read on the way.
    pub(super) fn problems(&self) -> &Problems {
        &self.problems
    }

    /// Clusters whose refcounts are in one block: 2^6 to 2^24.
    fn block_entries(&self) -> u64 {
        (self.header.cluster_size() * 8) >> self.header.refcount_order
    }

    /// Whether the refcount of cluster `first` is another than 0, and the first cluster after
    /// it, up to `end`, of which that is not so.
    pub(super) fn run(&mut self, first: u64, end: u64) -> (bool, u64) {
        let entries = self.block_entries();
        let mut cluster = first;
        let mut counted = None;
        while cluster < end {
            let index = cluster / entries;
            if index >= self.header.refcount_table.length.get() / 8 {
                // The table has no more: all that follow have none.
                return match counted {
                    Some(true) => (true, cluster),
                    _ => (false, end),
                };
            }
            let empty = self.load(index);
            let stop = end.min((index + 1).saturating_mul(entries));
            while cluster < stop {
                let is_counted = !empty && self.is_counted(cluster % entries);
                if *counted.get_or_insert(is_counted) != is_counted {
                    return (!is_counted, cluster);
                }
                cluster = if empty { stop } else { cluster + 1 };
            }
        }
        (counted.unwrap_or(false), end)
    }

    fn is_counted(&self, entry: u64) -> bool {
        let bit = entry << self.header.refcount_order;
        let byte = |at: u64| usize::try_from(at).ok().and_then(|at| self.block.get(at)).copied();
        if self.header.refcount_order < 3 {
            let mask = (1u16 << (1 << self.header.refcount_order)) - 1;
            return u16::from(byte(bit / 8).unwrap_or(0)) >> (bit % 8) & mask != 0;
        }
        let bytes = 1 << (self.header.refcount_order - 3);
        (bit / 8..bit / 8 + bytes).any(|at| byte(at).is_some_and(|byte| byte != 0))
    }

    /// Brings block `index` of the table into memory; true where all of it is 0.
    fn load(&mut self, index: u64) -> bool {
        match self.loaded {
            Some((loaded, empty)) if loaded == index => return empty,
            _ => {}
        }
        let empty = self.read(index).unwrap_or_else(|problem| {
            self.problems.push(problem);
            true
        });
        self.loaded = Some((index, empty));
        empty
    }

    fn read(&mut self, index: u64) -> Result<bool, Problem> {
        let at = self.header.refcount_table.offset.saturating_add(ByteLen::new(index * 8));
        let problem = |error: &crate::Error, offset| {
            let message = format!("a refcount can't be read: {}", error.kind());
            Problem::new(ProblemKind::Unreadable, offset, message)
        };
        let mut entry = [0; 8];
        if at.get() >= self.source.length().get() {
            return Ok(true);
        }
        self.source
            .read_exact(at, &mut entry, "the refcount table")
            .map_err(|error| problem(&error, at))?;
        let offset = HostOffset::new(u64::from_be_bytes(entry) & BLOCK_OFFSET_MASK);
        let cluster_size = self.header.cluster_size();
        let end = offset.saturating_add(ByteLen::new(cluster_size));
        // The walk of the refcount table has already told of one that is misplaced.
        if offset == HostOffset::ZERO
            || !offset.is_multiple_of(cluster_size)
            || end.get() > self.source.length().get()
        {
            return Ok(true);
        }
        if let Allocation::Hole { until } = self.source.allocation(offset)
            && until.is_none_or(|until| until >= end)
        {
            return Ok(true);
        }
        self.block.resize(usize::try_from(cluster_size).unwrap_or(0), 0);
        self.source
            .read_exact(offset, &mut self.block, "a refcount block")
            .map_err(|error| problem(&error, offset))?;
        Ok(self.block.iter().all(|&byte| byte == 0))
    }
}
