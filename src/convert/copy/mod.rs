//! The copying: all cores read, look for zeros and compress, then have the writer place what
//! they have in guest order, and write it.
//!
//! A batch of work is small enough to stay in a core's cache from the read over the search
//! for zeros to the write. What it becomes does not depend on how many cores there are: the
//! batches take their turns at the writer.

mod batch;
mod detect;
mod output;
#[cfg(test)]
mod tests;
mod worker;

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::cut::Cutter;
use super::reflink::{HostCalls, Offloads};
use super::{ImageWriter, Input, Placed};
use crate::error::{Error, Result};
use crate::format::qcow2::Compression;
use crate::units::GuestOffset;
use crate::worker::{are_apart, started};
use batch::Batches;
use output::{Output, Room};

/// Is told, by several threads, up to which byte the disk is done; an error stops the work.
pub type Tick<'t> = dyn Fn(u64) -> Result<()> + Sync + 't;

/// Bytes of zeros in a row that are not written, unless told otherwise: as many as for
/// `qemu-img convert`.
pub const DEFAULT_SPARSE: u64 = 4096;

/// How a disk is copied.
#[derive(Debug)]
pub struct CopyOptions<'o> {
    /// So many zeros in a row are not written (`-S`), a multiple of 512; 0: all are.
    pub sparse: u64,
    /// The output has a backing file, so that zeros can hide something.
    pub has_backing: bool,
    /// Clusters are compressed.
    pub compression: Option<Compression>,
    /// What the file system does by itself.
    pub offloads: Offloads,
    /// The system calls for that.
    pub calls: &'o dyn HostCalls,
    /// The output is to be on the disk in the end: writing it out starts early.
    pub write_back: bool,
    /// Space is allocated ahead of what is written, and given back where it turns out to be
    /// zeros. Only for a regular file.
    pub allocate_ahead: bool,
    /// Threads that copy.
    pub threads: usize,
    /// The name of the file that the bytes are written to, for errors.
    pub data_name: &'o Path,
}

/// What became of the disk, in bytes of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes that were written.
    pub copied: u64,
    /// Bytes whose blocks are shared with the input, or were copied by the file system.
    pub cloned: u64,
    /// Bytes that were compressed.
    pub compressed: u64,
    /// Zeros that were not written.
    pub zeros: u64,
}

/// Copies `input` into what `writer` lays out, and has it finish.
///
/// # Errors
/// The first in guest order of what reading, writing and `tick` say, or of the writer.
pub fn copy(
    input: &dyn Input,
    writer: &mut dyn ImageWriter,
    options: &CopyOptions<'_>,
    tick: &Tick<'_>,
) -> Result<Summary> {
    let file = writer.data_file().try_clone();
    let file = file.map_err(|error| Error::io("cannot copy the descriptor", error))?;
    let layout = Layout::of(writer, options);
    let shared = Shared {
        input,
        options,
        tick,
        layout,
        output: Output::new(&file, options)?,
        batches: Mutex::new(Batches::new(
            Cutter::new(input.pieces(), layout.granularity, input.size()),
            layout,
            options,
        )),
        turn: Mutex::new(Turn {
            number: 0,
            writer,
            placed: Vec::new(),
            room: Room::new(&file, options)?,
        }),
        turned: Condvar::new(),
        failed_at: AtomicU64::new(u64::MAX),
        failure: Mutex::new(None),
        counts: Counts::default(),
    };
    // This thread is one of them, unless it may do what they may not.
    let other_threads = options.threads.max(1) - usize::from(!are_apart());
    std::thread::scope(|scope| {
        let threads = (0..other_threads)
            .map(|_| {
                let name = std::thread::Builder::new().name("copy".to_owned());
                name.spawn_scoped(scope, || {
                    started();
                    worker::run(&shared);
                })
            })
            .take_while(std::io::Result::is_ok)
            .count();
        log::debug!("{threads} other threads copy");
        if threads == 0 || !are_apart() {
            worker::run(&shared);
        }
    });
    let Shared { turn, failure, counts, .. } = shared;
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.1);
    }
    let Turn { writer, .. } = turn.into_inner().unwrap_or_else(PoisonError::into_inner);
    pass_over(input.size().get(), writer, tick)?;
    writer.finish()?;
    Ok(counts.summary())
}

/// Has the writer ready what nobody spoke of, in steps.
fn pass_over(size: u64, writer: &mut dyn ImageWriter, tick: &Tick<'_>) -> Result<()> {
    const STEP: u64 = 1 << 30;
    let mut end = 0;
    while end < size {
        end = size.min(end.saturating_add(STEP));
        writer.pass_over(GuestOffset::new(end))?;
        tick(size)?;
    }
    Ok(())
}

/// How the output is made up.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// What is told apart: the writer's granule, or a cluster where clusters are compressed.
    granularity: u64,
    /// A cluster of the output.
    cluster: usize,
    /// Zeros are told to the writer; else they are data.
    tells_zeros: bool,
    /// Zeros in data are looked for.
    detects_zeros: bool,
    /// Zeros that the input knows of are written.
    writes_zeros: bool,
    /// The writer need not be asked.
    keeps_offsets: bool,
    /// Bytes that are read in one go, so that they are in the core's cache when they are looked
    /// at and written: a power of two, no less than a cluster.
    chunk: u64,
    /// Bytes of what one thread does before it asks for more.
    batch: u64,
}

/// Bytes that are read in one go.
const CHUNK: u64 = 256 << 10;
/// The same where zeros are looked for in longer runs.
const LARGE_CHUNK: u64 = 2 << 20;
/// Bytes that are compressed by one thread between two turns.
const COMPRESSED_CHUNK: u64 = 1 << 20;
/// Bytes of a batch of which the parts need not wait for each other.
const IN_PLACE_BATCH: u64 = 4 << 20;

impl Layout {
    fn of(writer: &dyn ImageWriter, options: &CopyOptions<'_>) -> Self {
        let cluster = writer.cluster_size();
        let granularity =
            if options.compression.is_some() { cluster } else { writer.granularity() };
        // Where they hide nothing, they need not be said.
        let tells_zeros = writer.has_zeros();
        let can_skip = tells_zeros || !options.has_backing;
        let chunk = match options.compression {
            Some(_) => COMPRESSED_CHUNK,
            None if options.sparse > CHUNK / 4 => LARGE_CHUNK,
            None => CHUNK,
        };
        let chunk = chunk.max(cluster);
        let keeps_offsets = writer.keeps_offsets();
        Self {
            granularity,
            cluster: usize::try_from(cluster).unwrap_or(usize::MAX),
            tells_zeros,
            detects_zeros: can_skip && options.sparse > 0,
            writes_zeros: !can_skip || options.sparse == 0,
            keeps_offsets,
            chunk,
            batch: if keeps_offsets { chunk.max(IN_PLACE_BATCH) } else { chunk },
        }
    }
}

/// What all threads share.
struct Shared<'s> {
    input: &'s dyn Input,
    options: &'s CopyOptions<'s>,
    tick: &'s Tick<'s>,
    layout: Layout,
    output: Output<'s>,
    batches: Mutex<Batches<'s>>,
    turn: Mutex<Turn<'s>>,
    turned: Condvar,
    /// Number of the first batch that failed: those before it go on, those after it need not.
    failed_at: AtomicU64,
    failure: Mutex<Option<(u64, Error)>>,
    counts: Counts,
}

/// Whose turn it is to have the writer place its bytes.
struct Turn<'w> {
    number: u64,
    writer: &'w mut dyn ImageWriter,
    placed: Vec<Placed>,
    room: Room,
}

impl<'s> Shared<'s> {
    fn has_failed_before(&self, number: u64) -> bool {
        self.failed_at.load(Ordering::Acquire) < number
    }

    /// Notes the error of a batch, unless an earlier one has one.
    fn fail(&self, number: u64, error: Error) {
        let mut failure = lock(&self.failure);
        if failure.as_ref().is_none_or(|(first, _)| number < *first) {
            *failure = Some((number, error));
            self.failed_at.store(number, Ordering::Release);
        }
        drop(failure);
        // Under the lock of what they wait for: else one could go to sleep just now.
        drop(lock(&self.turn));
        self.turned.notify_all();
    }

    /// Waits for the turn of a batch; `None` where an earlier one has failed.
    fn wait_for_turn(&self, number: u64) -> Option<MutexGuard<'_, Turn<'s>>> {
        let mut turn = lock(&self.turn);
        loop {
            if self.has_failed_before(number) {
                return None;
            }
            if turn.number == number {
                return Some(turn);
            }
            turn = self.turned.wait(turn).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn pass_turn(&self, mut turn: MutexGuard<'_, Turn<'s>>) {
        turn.number += 1;
        drop(turn);
        self.turned.notify_all();
    }
}

#[derive(Debug, Default)]
struct Counts {
    copied: AtomicU64,
    cloned: AtomicU64,
    compressed: AtomicU64,
    zeros: AtomicU64,
    /// Up to this byte, at least, all is done.
    done: AtomicU64,
}

impl Counts {
    fn summary(&self) -> Summary {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Summary {
            copied: get(&self.copied),
            cloned: get(&self.cloned),
            compressed: get(&self.compressed),
            zeros: get(&self.zeros),
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file of the input, where it can be read by descriptor.
fn file_of(input: &dyn Input, number: u32) -> Option<&File> {
    input.file(number).and_then(crate::source::Source::file)
}
