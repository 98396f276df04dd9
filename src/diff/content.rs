//! Comparing the bytes where the mappings differ, on all cores.

use std::collections::VecDeque;

use super::{Comparison, Difference, DifferenceKind, Joiner, Resolvers, State, Window};
use crate::error::Result;
use crate::read::{ChainReader, Ciphers, in_order, is_zero};
use crate::units::{ByteLen, GuestOffset, GuestRange, SECTOR_SIZE};

/// Bytes that are compared as one: listed ranges are multiples of it, and every such piece
/// of them differs.
pub const CONTENT_GRANULARITY: u64 = SECTOR_SIZE;

/// [`SECTOR_SIZE`] as a length in memory.
const SECTOR: usize = 512;

/// Bytes of a unit of work, more or less. Cut at multiples of it, which are multiples of
/// the largest cluster: no compressed one is inflated twice.
const UNIT_BYTES: u64 = 2 << 20;

impl<'c> Comparison<'c> {
    /// Calls `each` with the ranges whose bytes differ, in order, joined where the mappings
    /// differ in the same way; whole sectors of [`CONTENT_GRANULARITY`] bytes. Only what
    /// [`for_each_mapping`](Self::for_each_mapping) lists is read, by `ciphers` of B's
    /// layers (which [`keys_needed`](Self::keys_needed) names), whose images are A's too.
    /// What lies past the end of the shorter disk is listed as it is there. `tick` is called
    /// every now and then with the offset up to which all is compared.
    ///
    /// # Errors
    /// The first in guest order of what reading, `each` or `tick` says.
    pub fn for_each_content(
        &self,
        ciphers: &Ciphers,
        mut each: impl FnMut(&Difference) -> Result<()> + Send,
        mut tick: impl FnMut(GuestOffset) -> Result<()> + Send,
    ) -> Result<()> {
        let (of_a, of_b) = self.ciphers(ciphers);
        let units = Units {
            resolvers: self.resolvers(),
            windows: self.windows(),
            window_end: GuestOffset::ZERO,
            found: VecDeque::new(),
        };
        let mut joiner = Joiner::default();
        let mut listed_to = GuestOffset::ZERO;
        in_order(
            units,
            || Comparer {
                of_a: ChainReader::new(self.a, &of_a),
                of_b: ChainReader::new(self.b, &of_b),
                bytes_a: Vec::new(),
                bytes_b: Vec::new(),
            },
            |comparer, unit: Result<Unit>| {
                let unit = unit?;
                let mut found = Joiner::default();
                for part in &unit.parts {
                    comparer.compare(part, &mut found)?;
                }
                Ok((unit.end, found.finish()))
            },
            |(end, found)| {
                for mut difference in found {
                    // Where mappings change inside of a sector, two parts have it.
                    difference.range.start = difference.range.start.max(listed_to);
                    if difference.range.is_empty() {
                        continue;
                    }
                    listed_to = difference.range.end;
                    if let Some(done) = joiner.push(difference) {
                        each(&done)?;
                    }
                }
                tick(end)
            },
        )?;
        joiner.take().as_ref().map_or(Ok(()), each)
    }
}

/// What one thread compares in one go.
#[derive(Debug, Default)]
struct Unit {
    parts: Vec<Difference>,
    /// Up to here all is compared then.
    end: GuestOffset,
}

/// Cuts what differs by its mapping into units of work; none reaches over two windows.
struct Units<'c, W> {
    resolvers: Resolvers<'c>,
    windows: W,
    window_end: GuestOffset,
    /// What is left of a window.
    found: VecDeque<Difference>,
}

impl<W: Iterator<Item = Window>> Iterator for Units<'_, W> {
    type Item = Result<Unit>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.found.is_empty() {
            let window = self.windows.next()?;
            self.window_end = window.range().end;
            let mut found = Joiner::default();
            let compared = self.resolvers.compare(window, &mut |part| found.add(part.difference()));
            if let Err(error) = compared {
                return Some(Err(error));
            }
            self.found = found.finish().into();
        }
        let mut unit = Unit { parts: Vec::new(), end: self.window_end };
        let mut bytes = 0;
        while bytes < UNIT_BYTES
            && let Some(mut part) = self.found.pop_front()
        {
            if matches!(part.kind, DifferenceKind::Mapping { .. }) {
                let next = (part.range.start.get() / UNIT_BYTES).saturating_add(1);
                let cut = part.range.end.min(GuestOffset::new(next.saturating_mul(UNIT_BYTES)));
                let rest = GuestRange::new(cut, part.range.end);
                if !rest.is_empty() {
                    self.found.push_front(Difference { range: rest, kind: part.kind });
                }
                part.range.end = cut;
                bytes += part.range.length().get();
            }
            unit.parts.push(part);
        }
        if let Some(part) = unit.parts.last()
            && !self.found.is_empty()
        {
            unit.end = part.range.end;
        }
        Some(Ok(unit))
    }
}

/// Reads both disks; keeps its memory.
struct Comparer<'c> {
    of_a: ChainReader<'c>,
    of_b: ChainReader<'c>,
    bytes_a: Vec<u8>,
    bytes_b: Vec<u8>,
}

impl Comparer<'_> {
    /// Adds the sectors of `part` that differ.
    fn compare(&mut self, part: &Difference, found: &mut Joiner) -> Result<()> {
        let DifferenceKind::Mapping { a, b } = part.kind else {
            found.add(*part);
            return Ok(());
        };
        let start = part.range.start.get() / SECTOR_SIZE * SECTOR_SIZE;
        let end = part.range.end.get().div_ceil(SECTOR_SIZE).saturating_mul(SECTOR_SIZE);
        let range = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        // What is known of a part of a sector is not known of the sector.
        let zeros = |state| state == State::Zero && range == part.range;
        let bytes_a = read(&mut self.of_a, range, zeros(a), &mut self.bytes_a)?;
        let bytes_b = read(&mut self.of_b, range, zeros(b), &mut self.bytes_b)?;
        if same(bytes_a, bytes_b) {
            return Ok(());
        }
        let kind = DifferenceKind::Content { a, b };
        for (index, start) in (start..end).step_by(SECTOR).enumerate() {
            let at = index * SECTOR;
            let of_a = bytes_a.and_then(|bytes| bytes.get(at..at + SECTOR));
            let of_b = bytes_b.and_then(|bytes| bytes.get(at..at + SECTOR));
            if !same(of_a, of_b) {
                let start = GuestOffset::new(start);
                let end = start.saturating_add(ByteLen::new(SECTOR_SIZE));
                found.add(Difference { range: GuestRange::new(start, end), kind });
            }
        }
        Ok(())
    }
}

/// The bytes of a range; none for what is known to be zeros.
fn read<'b>(
    reader: &mut ChainReader<'_>,
    range: GuestRange,
    zeros: bool,
    buffer: &'b mut Vec<u8>,
) -> Result<Option<&'b [u8]>> {
    if zeros {
        return Ok(None);
    }
    let length = usize::try_from(range.length().get()).unwrap_or(usize::MAX);
    buffer.resize(buffer.len().max(length), 0);
    let bytes = &mut buffer[..length];
    reader.read_at(range.start, bytes)?;
    Ok(Some(bytes))
}

fn same(a: Option<&[u8]>, b: Option<&[u8]>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a == b,
        (Some(bytes), None) | (None, Some(bytes)) => is_zero(bytes),
        (None, None) => true,
    }
}
