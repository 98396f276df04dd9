//! Reading a whole range: on all cores, handed out in guest order.

use std::sync::{Arc, Mutex, PoisonError};

use super::reader::{ExtentReader, bytes_of, in_sectors, joined};
use super::{Ciphers, HOLES, in_order};
use crate::buffer::Buffer;
use crate::chain::{Chain, Resolver};
use crate::error::Result;
use crate::extent::{Extent, Mapping};
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Bytes to be read of a unit of work, but for what must not be cut: then up to two
/// clusters more.
const UNIT_BYTES: u64 = 1 << 20;

/// What a stretch of the disk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'b> {
    /// These bytes, as many as the stretch is long. (They can be zeros too: that is looked
    /// at by nobody.)
    Bytes(&'b [u8]),
    /// Zeros that no file holds.
    Zeros,
}

impl Chain {
    /// Reads `range`, clipped to the disk, and calls `each` with one stretch after the other
    /// in guest order, without gap. Stretches of zeros can be of any length, others have a
    /// few MiB at most; neighbouring ones can be of the same kind. `each` is called on one
    /// thread at a time, while other threads read, inflate and decrypt what comes next;
    /// their memory is bounded (2 to 4 MiB for each of twice 64 units of work at most).
    ///
    /// # Errors
    /// The first in guest order of those of [`ChainReader::read_at`] and of `each`, which
    /// has had all that comes before it.
    ///
    /// [`ChainReader::read_at`]: super::ChainReader::read_at
    pub fn for_each_chunk(
        &self,
        ciphers: &Ciphers,
        range: GuestRange,
        mut each: impl FnMut(GuestRange, Content<'_>) -> Result<()> + Send,
    ) -> Result<()> {
        self.sweep(ciphers, range, |swept| {
            swept.chunks().try_for_each(|(range, content)| each(range, content))
        })
    }

    /// As [`for_each_chunk`](Self::for_each_chunk), but what was read is `take`'s to keep for
    /// as long as it likes; its memory is used again once it is dropped.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn sweep(
        &self,
        ciphers: &Ciphers,
        range: GuestRange,
        take: impl FnMut(Swept) -> Result<()> + Send,
    ) -> Result<()> {
        let units = Units::new(self, range.intersection(self.whole()));
        let spare = SpareBuffers::default();
        in_order(
            units,
            || ExtentReader::new(self, ciphers),
            |reader, unit: Result<Unit>| {
                let unit = unit?;
                let mut buffer = spare.lock().pop().unwrap_or_default();
                unit.read(reader, &mut buffer)?;
                Ok(Swept { stretches: unit.stretches, buffer, spare: spare.clone() })
            },
            take,
        )
    }
}

/// Buffers to be written over.
#[derive(Clone, Debug, Default)]
struct SpareBuffers(Arc<Mutex<Vec<Buffer>>>);

impl SpareBuffers {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Buffer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A few stretches of the disk, read.
#[derive(Debug)]
pub(crate) struct Swept {
    stretches: Vec<Stretch>,
    /// The bytes of those that are not zeros, one after the other.
    buffer: Buffer,
    spare: SpareBuffers,
}

impl Swept {
    /// The stretches in guest order, without gap.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = (GuestRange, Content<'_>)> {
        let mut rest: &[u8] = &self.buffer;
        self.stretches.iter().map(move |stretch| {
            if stretch.zeros {
                return (stretch.range, Content::Zeros);
            }
            let bytes;
            (bytes, rest) = rest.split_at(bytes_of(stretch.range).min(rest.len()));
            (stretch.range, Content::Bytes(bytes))
        })
    }
}

impl Drop for Swept {
    fn drop(&mut self) {
        self.spare.lock().push(std::mem::take(&mut self.buffer));
    }
}

/// What one thread reads in one go.
#[derive(Debug, Default)]
struct Unit {
    /// In guest order, without gap.
    stretches: Vec<Stretch>,
    /// What they are of.
    extents: Vec<Extent>,
    /// Bytes of those that are not zeros.
    bytes: u64,
}

/// Neighbouring extents, all zeros or none.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    range: GuestRange,
    zeros: bool,
}

impl Unit {
    fn push(&mut self, range: GuestRange, zeros: bool) {
        if !zeros {
            self.bytes += range.length().get();
        }
        match self.stretches.last_mut() {
            Some(last) if last.zeros == zeros => last.range.end = range.end,
            _ => self.stretches.push(Stretch { range, zeros }),
        }
    }

    /// Reads the stretches that are not zeros, one after the other, to the start of
    /// `buffer`.
    fn read(&self, reader: &mut ExtentReader<'_>, buffer: &mut Buffer) -> Result<()> {
        let length = usize::try_from(self.bytes).unwrap_or(usize::MAX);
        buffer.reserve(length);
        let mut rest = &mut buffer[..length];
        for stretch in self.stretches.iter().filter(|stretch| !stretch.zeros) {
            let piece;
            (piece, rest) = rest.split_at_mut(bytes_of(stretch.range).min(rest.len()));
            reader.read(&self.extents, stretch.range, piece)?;
        }
        Ok(())
    }
}

/// Cuts a range into units of work. No compressed cluster is in two of them, so each is
/// inflated once.
struct Units<'c, W> {
    chain: &'c Chain,
    resolver: Resolver<'c>,
    windows: W,
    /// The extents of one window.
    extents: Vec<Extent>,
    /// The first extent that is not in a unit yet, and from where on.
    index: usize,
    start: GuestOffset,
    end: GuestOffset,
}

impl<'c> Units<'c, ()> {
    fn new(chain: &'c Chain, range: GuestRange) -> Units<'c, impl Iterator<Item = GuestRange>> {
        Units {
            chain,
            resolver: chain.resolver(HOLES),
            windows: chain.windows(in_sectors(range), HOLES),
            extents: Vec::new(),
            index: 0,
            start: range.start,
            end: range.end,
        }
    }
}

impl<W: Iterator<Item = GuestRange>> Units<'_, W> {
    fn cut(&mut self) -> Unit {
        let mut unit = Unit::default();
        let first = self.index;
        // Up to here reach the compressed clusters that were begun.
        let mut begun = GuestOffset::ZERO;
        while let Some(extent) = self.extents.get(self.index) {
            if self.start >= self.end || (unit.bytes >= UNIT_BYTES && self.start >= begun) {
                break;
            }
            if extent.end() <= self.start {
                // The range starts in a window's first sector, but past this extent.
                self.index += 1;
                continue;
            }
            let mut end = extent.end();
            match extent.mapping {
                Mapping::Zero(_) => {}
                Mapping::Data(_) | Mapping::Encrypted { .. } | Mapping::Damaged { .. } => {
                    // Where the next extent starts does not move where the later units do.
                    let next = (self.start.get() / UNIT_BYTES).saturating_add(1);
                    end = end.min(GuestOffset::new(next.saturating_mul(UNIT_BYTES)));
                }
                Mapping::Compressed { cluster, .. } => {
                    let layer = self.chain.layers().get(extent.depth as usize);
                    let size = layer.map_or(0, |layer| layer.image.cluster_size());
                    begun = begun.max(cluster.saturating_add(ByteLen::new(size)));
                }
            }
            let part = GuestRange::new(self.start, end.min(self.end));
            unit.push(part, extent.mapping.is_zero());
            self.start = end;
            if end < extent.end() {
                continue;
            }
            self.index += 1;
        }
        let last = self.index.saturating_add(1).min(self.extents.len());
        unit.extents.extend_from_slice(&self.extents[first..last]);
        unit
    }
}

impl<W: Iterator<Item = GuestRange>> Iterator for Units<'_, W> {
    type Item = Result<Unit>;

    fn next(&mut self) -> Option<Self::Item> {
        // The last window goes on to a sector's end: extents there can be past the range.
        while self.index >= self.extents.len() || self.start >= self.end {
            let window = self.windows.next()?;
            self.extents.clear();
            self.index = 0;
            self.start = self.start.max(window.start);
            match self.resolver.resolve(window) {
                Ok(extents) => joined(extents, &mut self.extents),
                Err(error) => return Some(Err(error)),
            }
        }
        Some(Ok(self.cut()))
    }
}
