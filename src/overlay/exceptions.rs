//! The persistent store of dm-snapshot: which chunks of the disk were changed, and where in the
//! store each of them lies (drivers/md/dm-snap-persistent.c).
//!
//! A store is made of chunks. The first holds a header; then an area of exceptions (pairs of
//! 64-bit numbers: a chunk of the disk, and the chunk of the store that has it now) takes turns
//! with as many chunks of data as it has room for exceptions. A pair whose second number is 0
//! ends them all. They lie in the order of their writing: [`Changes`] gives them in that of the
//! disk, with memory that does not grow with the store.

mod check;

use std::sync::{Arc, Mutex, PoisonError};

use super::persistent::{
    EXCEPTION_LENGTH, HEADER_LENGTH, PersistentHeader, area_chunk, chunk_bytes, exceptions_per_area,
};
use crate::error::{Error, Result};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, Sectors};

/// Bytes of an exception, in memory.
const EXCEPTION_BYTES: usize = 16;
const _: () = assert!(EXCEPTION_BYTES as u64 == EXCEPTION_LENGTH);
/// Bytes of exceptions that are read at a time.
const READ_LENGTH: usize = 64 << 10;
/// Exceptions that are held in memory at a time, 16 bytes each.
const MAX_WINDOW: u64 = 2 << 20;
/// Ranges of the disk whose exceptions are counted apart.
const COUNTERS: u64 = 64 << 10;

/// A store that can be read: its header is in order, and the kernel has not given it up.
#[derive(Clone, Copy, Debug)]
pub struct ExceptionStore<'s> {
    source: &'s Source,
    /// Where it starts in the file.
    start: HostOffset,
    /// Bytes of it.
    length: ByteLen,
    /// Bytes of the disk.
    disk: ByteLen,
    /// Size of a chunk, a power of two.
    chunk: Sectors,
}

/// A chunk that was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Exception {
    old: u64,
    new: u64,
}

impl<'s> ExceptionStore<'s> {
    /// Looks at the store that starts at `start` of a file and goes on to its end; it is of a
    /// disk of so many bytes.
    ///
    /// # Errors
    /// As [`PersistentHeader::parse`]; `InvalidImage` for a store that overflowed; a read failed.
    pub fn open(source: &'s Source, start: HostOffset, disk: ByteLen) -> Result<Self> {
        let mut header = [0; HEADER_LENGTH];
        source.read_exact(start, &mut header, "the header of dm-snapshot's part")?;
        let at_header = |error: Error| error.at_path(source.path()).at_offset(start.get());
        let header = PersistentHeader::parse(&header).map_err(at_header)?;
        if !header.valid {
            return Err(at_header(Error::invalid(
                "the overlay overflowed: its store was full or could not be written, and the kernel gave it up. What was changed is lost; the image is unhurt",
            )));
        }
        let length = ByteLen::new(source.length().get().saturating_sub(start.get()));
        Ok(Self { source, start, length, disk, chunk: header.chunk })
    }

    fn invalid(&self, offset: HostOffset, message: String) -> Error {
        Error::invalid(message).at_path(self.source.path()).at_offset(offset.get())
    }

    /// The file that it is in.
    pub fn source(&self) -> &'s Source {
        self.source
    }

    /// Bytes of the disk that it is of.
    pub fn disk(&self) -> ByteLen {
        self.disk
    }

    /// Bytes of a chunk, a power of two.
    pub fn chunk_size(&self) -> u64 {
        chunk_bytes(self.chunk)
    }

    /// Gives all exceptions to `each`, in the order of their writing, checked one by one.
    fn for_each(&self, mut each: impl FnMut(Exception) -> Result<()>) -> Result<()> {
        let chunk = self.chunk_size();
        let (chunks, stored) = (self.disk.get().div_ceil(chunk), self.length.get() / chunk);
        let stride = exceptions_per_area(self.chunk) + 1;
        let mut buffer = vec![0; usize::try_from(chunk).unwrap_or(usize::MAX).min(READ_LENGTH)];
        for area in 0.. {
            let Some(area) = area_chunk(self.chunk, area).filter(|&area| area < stored) else {
                return Err(self.invalid(
                    self.start.saturating_add(self.length),
                    "an area of the overlay's exceptions lies past the end of its store: the file was cut off"
                        .to_owned(),
                ));
            };
            let base = self.place(area)?;
            let mut done = 0;
            while done < chunk {
                let offset = base.saturating_add(ByteLen::new(done));
                self.source.read_exact(offset, &mut buffer, "an area of exceptions")?;
                let pairs = buffer.chunks_exact(EXCEPTION_BYTES);
                for (at, bytes) in (offset.get()..).step_by(EXCEPTION_BYTES).zip(pairs) {
                    let mut halves = [[0; 8]; 2];
                    halves[0].copy_from_slice(&bytes[..8]);
                    halves[1].copy_from_slice(&bytes[8..]);
                    let [old, new] = halves.map(u64::from_le_bytes);
                    if new == 0 {
                        return Ok(());
                    }
                    let wrong = |what: String| Err(self.invalid(HostOffset::new(at), what));
                    if old >= chunks {
                        return wrong(format!(
                            "chunk {old} is said to be changed, and the disk has {chunks}"
                        ));
                    }
                    if new >= stored || new % stride == 1 {
                        return wrong(format!(
                            "chunk {old} of the disk is said to lie in chunk {new} of the store, which is {}",
                            if new >= stored { "past its end" } else { "for exceptions" }
                        ));
                    }
                    each(Exception { old, new })?;
                }
                done += buffer.len() as u64;
            }
        }
        Ok(())
    }

    /// Where a chunk of the store lies in the file.
    fn place(&self, chunk: u64) -> Result<HostOffset> {
        let offset = chunk.checked_mul(self.chunk_size()).map(ByteLen::new);
        offset.and_then(|offset| self.start.checked_add(offset)).ok_or_else(|| {
            self.invalid(self.start, format!("chunk {chunk} of the store lies past 2^64 bytes"))
        })
    }

    /// What was changed, in the order of the disk.
    ///
    /// # Errors
    /// An exception of what lies outside of the disk or the store; a chunk that is said to be
    /// changed twice; a read failed.
    pub fn changes(self) -> Result<Changes<'s>> {
        self.changes_within(MAX_WINDOW)
    }

    /// The same, with at most so many exceptions in memory at a time.
    fn changes_within(self, most: u64) -> Result<Changes<'s>> {
        let chunk = self.chunk_size();
        let chunks = self.disk.get().div_ceil(chunk);
        let width = chunks.div_ceil(COUNTERS).max(1);
        let mut counts = vec![0u64; usize::try_from(chunks.div_ceil(width)).unwrap_or(0)];
        self.for_each(|Exception { old, .. }| {
            let count = usize::try_from(old / width).ok().and_then(|at| counts.get_mut(at));
            let count = count.ok_or_else(|| Error::invalid("a chunk outside of the disk"))?;
            *count += 1;
            match *count > width {
                true => Err(self.twice(old)),
                false => Ok(()),
            }
        })?;
        let mut windows = Vec::new();
        let (mut start, mut held) = (0, 0);
        for (index, &count) in (0..).zip(&counts) {
            if count > most {
                return Err(self.invalid(
                    self.start,
                    format!(
                        "more than {most} chunks of {width} next to each other are changed: too many for imgdm to sort"
                    ),
                ));
            }
            if held + count > most {
                windows.push(start..index * width);
                (start, held) = (index * width, 0);
            }
            held += count;
        }
        windows.push(start..chunks);
        let changed = counts.iter().sum();
        Ok(Changes { store: self, chunk, changed, windows, loaded: Mutex::default() })
    }

    fn twice(&self, chunk: u64) -> Error {
        self.invalid(
            self.start,
            format!("the overlay's store says of chunk {chunk} (or near it) twice where it is"),
        )
    }
}

/// Exceptions of a part of the disk, in its order.
#[derive(Debug)]
struct Window {
    index: usize,
    exceptions: Vec<Exception>,
}

/// What was changed on a disk. Can be asked by several threads.
#[derive(Debug)]
pub struct Changes<'s> {
    store: ExceptionStore<'s>,
    chunk: u64,
    changed: u64,
    /// Chunks of the disk whose exceptions are held in memory together; they cover it.
    windows: Vec<std::ops::Range<u64>>,
    /// The ones that were loaded last: who is at a window's end may ask for either.
    loaded: Mutex<[Option<Arc<Window>>; 2]>,
}

/// A range of the disk that is all changed, or all not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The range, never empty.
    pub range: GuestRange,
    /// Where it lies in the store's file, one byte after the other; `None` where it was not
    /// changed.
    pub place: Option<HostOffset>,
}

impl<'s> Changes<'s> {
    /// The store.
    pub fn store(&self) -> &ExceptionStore<'s> {
        &self.store
    }

    /// Chunks that were changed.
    pub fn count(&self) -> u64 {
        self.changed
    }

    /// What there is from `offset` on, which lies on the disk. The run can go on in the next
    /// one.
    ///
    /// # Errors
    /// As [`ExceptionStore::changes`].
    pub fn at(&self, offset: GuestOffset) -> Result<Run> {
        let chunk = offset.get() / self.chunk;
        let index = self.windows.partition_point(|window| window.end <= chunk);
        let Some(bounds) = self.windows.get(index) else {
            return Err(Error::invalid(format!("guest offset {offset} is not on the disk")));
        };
        let window = self.window(index)?;
        let at = window.exceptions.partition_point(|exception| exception.old < chunk);
        let rest = window.exceptions.get(at..).unwrap_or_default();
        let (end, place) = match rest.first() {
            Some(&first) if first.old == chunk => {
                let next = rest.iter().zip(0..).take_while(|&(each, distance)| {
                    each.old - first.old == distance
                        && each.new.checked_sub(first.new) == Some(distance)
                });
                let place = self.store.place(first.new)?;
                let inside = ByteLen::new(offset.get() % self.chunk);
                (chunk + next.count() as u64, Some(place.saturating_add(inside)))
            }
            Some(next) => (next.old, None),
            None => (bounds.end, None),
        };
        let end = end.saturating_mul(self.chunk).min(self.store.disk.get());
        Ok(Run { range: GuestRange::new(offset, GuestOffset::new(end)), place })
    }

    /// All runs of the disk.
    pub fn runs(&self) -> impl Iterator<Item = Result<Run>> + '_ {
        let mut at = GuestOffset::ZERO;
        let mut is_over = false;
        std::iter::from_fn(move || {
            if is_over || at.get() >= self.store.disk.get() {
                return None;
            }
            let run = self.at(at);
            match &run {
                Ok(run) if !run.range.is_empty() => at = run.range.end,
                _ => is_over = true,
            }
            Some(run)
        })
    }

    /// The exceptions of a window, read where they are not in memory.
    fn window(&self, index: usize) -> Result<Arc<Window>> {
        // Whoever waits here most likely waits for the same one.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let known = loaded.iter().flatten().find(|window| window.index == index);
        if let Some(window) = known {
            return Ok(Arc::clone(window));
        }
        let bounds = self.windows.get(index).cloned().unwrap_or_default();
        let mut exceptions = Vec::new();
        loaded.rotate_right(1);
        loaded[0] = None;
        self.store.for_each(|exception| {
            if bounds.contains(&exception.old) {
                exceptions.push(exception);
            }
            Ok(())
        })?;
        exceptions.sort_unstable();
        if let Some(pair) = exceptions.windows(2).find(|pair| pair[0].old == pair[1].old) {
            return Err(self.store.twice(pair[0].old));
        }
        let window = Arc::new(Window { index, exceptions });
        loaded[0] = Some(Arc::clone(&window));
        Ok(window)
    }
}

#[cfg(test)]
pub(super) mod tests;
