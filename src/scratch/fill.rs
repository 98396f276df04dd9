//! Filling the scratch file: jobs to batches, batches to chunks, chunks to threads.
//!
//! A batch is what is done between two looks at progress and signals. A chunk is what one
//! thread reads, inflates and writes in one go. No cluster is in two chunks, so each is
//! inflated once. Memory grows with the threads and with the jobs of one window only.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::place::{cannot_write, set_length};
use super::worker::{ChunkDone, Worker};
use super::{FailedCluster, Filled, OnError, ScratchContent, ScratchJob, ScratchWork};
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::units::{ByteLen, GuestRange};

/// Bytes of a chunk, but for a last cluster that does not end there: so much of the output
/// stays in a core's cache until it is written.
const CHUNK_BYTES: u64 = 512 << 10;

/// Bytes of a batch: a fraction of a second.
const BATCH_BYTES: u64 = 64 << 20;

/// Most failing pieces that are listed; with more of them no rescue is to be hoped for.
const MAX_FAILED: usize = 1 << 17;

/// Most runs of zeros that are kept; further ones stay holes. With as many failing pieces
/// they make no more segments than a table holds.
pub(super) const MAX_ZERO_RUNS: usize = 1 << 17;

/// How to fill a scratch file.
#[derive(Clone, Debug)]
pub struct FillOptions {
    /// What becomes of pieces that can't be had.
    pub on_error: OnError,
    /// Shortest run of zeros that is listed.
    pub shortest_zero_run: ByteLen,
    /// The directory of the file, for messages.
    pub directory: PathBuf,
}

impl FillOptions {
    /// What zeros a segment of their own is worth, in bytes.
    pub const SHORTEST_ZERO_RUN: ByteLen = ByteLen::new(1 << 20);

    /// For a file in `directory`.
    pub fn new(directory: impl Into<PathBuf>, on_error: OnError) -> Self {
        Self { on_error, shortest_zero_run: Self::SHORTEST_ZERO_RUN, directory: directory.into() }
    }
}

/// Writes all of `work`'s pieces to `file`, which is empty, on all cores. Pieces that are
/// zeros are left out: they are holes. `tick` is called on this thread every now and then
/// with the bytes done so far; its error ends the work.
///
/// # Errors
/// What a layer's metadata or `tick` says; `CannotCreate` where the file can't be written;
/// `Unsupported` for zstd without the feature `device`; with [`OnError::Refuse`] the first
/// piece in guest order that can't be had.
pub fn fill(
    chain: &Chain,
    work: &dyn ScratchWork,
    file: &File,
    options: &FillOptions,
    tick: &dyn Fn(u64) -> Result<()>,
) -> Result<Filled> {
    let length = work.scratch_length();
    set_length(file, length, &options.directory)?;
    let mut filler = Filler {
        shared: Shared { chain, file, options, length, workers: Mutex::default() },
        tick,
        zeros: ZeroRuns::new(options.shortest_zero_run),
        failed: Vec::new(),
        done: 0,
    };
    let mut pending = Vec::new();
    let mut pending_bytes = 0u64;
    work.for_each_window(&mut |jobs| {
        pending.extend_from_slice(jobs);
        pending_bytes += jobs.iter().map(|job| job.length).sum::<u64>();
        if pending_bytes >= BATCH_BYTES {
            pending_bytes = 0;
            filler.run(&pending)?;
            pending.clear();
        }
        Ok(())
    })?;
    filler.run(&pending)?;
    if filler.done > 0 {
        // Once this process has gone nobody hears of a write that failed, and what was never
        // written reads as zeros: so it is on the disk before anything lies on it.
        let synced = file.sync_data();
        synced.map_err(|error| cannot_write(error, length, &options.directory))?;
    }
    Ok(Filled { zero_runs: filler.zeros.finish(), failed: filler.failed })
}

/// What all threads see.
struct Shared<'a> {
    chain: &'a Chain,
    file: &'a File,
    options: &'a FillOptions,
    /// Bytes of the scratch file, holes and all.
    length: u64,
    /// One for each thread that has had something to do; they keep their buffers.
    workers: Mutex<Vec<Worker>>,
}

struct Filler<'a> {
    shared: Shared<'a>,
    tick: &'a dyn Fn(u64) -> Result<()>,
    zeros: ZeroRuns,
    failed: Vec<FailedCluster>,
    /// Bytes of the scratch file that are done.
    done: u64,
}

impl Filler<'_> {
    /// Does the jobs of some windows.
    fn run(&mut self, jobs: &[ScratchJob]) -> Result<()> {
        self.check_layout(jobs)?;
        let mut chunks = Vec::new();
        let mut batch_bytes = 0;
        let chain = self.shared.chain;
        for chunk in (Chunks { chain, jobs }) {
            batch_bytes += bytes_of(chunk);
            chunks.push(chunk);
            if batch_bytes >= BATCH_BYTES {
                self.run_batch(&chunks)?;
                chunks.clear();
                batch_bytes = 0;
            }
        }
        self.run_batch(&chunks)
    }

    /// Every job is a piece of the scratch file.
    fn check_layout(&self, jobs: &[ScratchJob]) -> Result<()> {
        let length = self.shared.length;
        for job in jobs {
            if job.length == 0 || job.at.checked_add(job.length).is_none_or(|end| end > length) {
                let message = format!(
                    "a piece of {} bytes is planned at {:#x} of a scratch file of {length:#x}",
                    job.length, job.at
                );
                return Err(Error::invalid(message));
            }
        }
        Ok(())
    }

    fn run_batch(&mut self, chunks: &[&[ScratchJob]]) -> Result<()> {
        if chunks.is_empty() {
            return Ok(());
        }
        let shared = &self.shared;
        let refuse = shared.options.on_error == OnError::Refuse;
        // Chunks after the first one that stops the work are not worth doing.
        let stopped_at = AtomicUsize::new(usize::MAX);
        let results: Vec<Result<ChunkDone>> = chunks
            .par_iter()
            .enumerate()
            .with_max_len(1)
            .map(|(index, jobs)| {
                if index > stopped_at.load(Ordering::Relaxed) {
                    return Ok(ChunkDone::default());
                }
                let done = shared.run_chunk(jobs);
                if done.as_ref().map_or(true, |done| refuse && !done.failed.is_empty()) {
                    stopped_at.fetch_min(index, Ordering::Relaxed);
                }
                done
            })
            .collect();
        for done in results {
            let done = done?;
            if refuse && let Some(first) = done.failed.first() {
                return Err(first.to_error());
            }
            if self.failed.len() + done.failed.len() > MAX_FAILED {
                let message = format!(
                    "more than {MAX_FAILED} pieces of the image can't be read or do not inflate: that is not worth attaching"
                );
                return Err(Error::invalid(message).at_path(shared.chain.layers()[0].source.path()));
            }
            self.failed.extend(done.failed);
            done.zeros.into_iter().for_each(|range| self.zeros.push(range));
        }
        self.done += chunks.iter().map(|chunk| bytes_of(chunk)).sum::<u64>();
        (self.tick)(self.done)
    }
}

impl Shared<'_> {
    fn run_chunk(&self, jobs: &[ScratchJob]) -> Result<ChunkDone> {
        let idle = self.workers.lock().ok().and_then(|mut workers| workers.pop());
        let mut worker = idle.unwrap_or_default();
        let done = worker
            .prepare(self.chain, jobs)?
            .write(self.file)
            .map_err(|error| cannot_write(error, self.length, &self.options.directory));
        if let Ok(mut workers) = self.workers.lock() {
            workers.push(worker);
        }
        done
    }
}

fn bytes_of(jobs: &[ScratchJob]) -> u64 {
    jobs.iter().map(|job| job.length).sum()
}

/// Cuts jobs into chunks, never through a cluster that several of them are of.
struct Chunks<'a> {
    chain: &'a Chain,
    jobs: &'a [ScratchJob],
}

impl<'a> Iterator for Chunks<'a> {
    type Item = &'a [ScratchJob];

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = 0;
        // Up to here reach the clusters that were begun.
        let mut begun = 0;
        let mut last = 0;
        let mut count = 0;
        for job in self.jobs {
            // Back to the start go the pieces of ciphertext.
            let apart = job.guest.get() >= begun || job.guest.get() < last;
            if bytes >= CHUNK_BYTES && apart {
                break;
            }
            last = job.guest.get();
            if let ScratchContent::Inflate { cluster, .. } = job.what {
                let layer = self.chain.layers().get(job.layer as usize);
                let size = layer.map_or(0, |layer| layer.image.cluster_size());
                begun = begun.max(cluster.get().saturating_add(size));
            }
            bytes += job.length;
            count += 1;
        }
        let (chunk, rest) = self.jobs.split_at(count);
        self.jobs = rest;
        (!chunk.is_empty()).then_some(chunk)
    }
}

/// Joins stretches of zeros, and keeps the long ones.
struct ZeroRuns {
    shortest: ByteLen,
    open: Option<GuestRange>,
    runs: Vec<GuestRange>,
}

impl ZeroRuns {
    fn new(shortest: ByteLen) -> Self {
        Self { shortest, open: None, runs: Vec::new() }
    }

    fn push(&mut self, range: GuestRange) {
        match &mut self.open {
            Some(open) if open.end == range.start => open.end = range.end,
            _ => {
                self.close();
                self.open = Some(range);
            }
        }
    }

    fn close(&mut self) {
        if let Some(run) = self.open.take()
            && run.length() >= self.shortest
            && self.runs.len() < MAX_ZERO_RUNS
        {
            self.runs.push(run);
        }
    }

    fn finish(mut self) -> Vec<GuestRange> {
        self.close();
        self.runs
    }
}

#[cfg(test)]
pub(super) mod tests;
