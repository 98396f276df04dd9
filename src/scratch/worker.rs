//! What one thread does of a scratch file: reads streams, inflates them, writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{FailedCluster, FailedWhy, ScratchContent, ScratchJob};
use crate::chain::{Chain, Layer};
use crate::error::{Error, Result};
use crate::inflate::InflateFault;
use crate::read::{ClusterPart, ClusterReader, Stream, is_zero};
use crate::status::FileRole;
use crate::units::{ByteLen, GuestRange};

/// Reads, inflates and writes chunks; keeps its memory between them.
#[derive(Debug, Default)]
pub(super) struct Worker {
    clusters: ClusterReader,
    /// The chunk's bytes.
    output: Vec<u8>,
}

/// What came of a chunk.
#[derive(Debug, Default)]
pub(super) struct ChunkDone {
    /// Stretches of zeros in order, joined.
    pub(super) zeros: Vec<GuestRange>,
    /// What could not be had, in order.
    pub(super) failed: Vec<FailedCluster>,
}

/// A chunk in memory.
#[derive(Debug)]
pub(super) struct PreparedChunk<'w> {
    output: &'w [u8],
    writes: Vec<Write>,
    done: ChunkDone,
}

/// A part of a chunk that is not zeros.
#[derive(Clone, Copy, Debug)]
struct Write {
    /// Where in the chunk's bytes it starts.
    start: usize,
    length: usize,
    /// Where in the scratch file it goes.
    at: u64,
}

impl Worker {
    /// Gets the bytes of neighbouring jobs.
    ///
    /// # Errors
    /// A job contradicts its chain, or there is no zstd.
    pub(super) fn prepare(
        &mut self,
        chain: &Chain,
        jobs: &[ScratchJob],
    ) -> Result<PreparedChunk<'_>> {
        let length: u64 = jobs.iter().map(|job| job.length).sum();
        let length = usize::try_from(length).map_err(|_| contradiction())?;
        if self.output.len() < length {
            self.output.resize(length, 0);
        }
        let mut output = std::mem::take(&mut self.output);
        let chunk = self.prepare_into(chain, jobs, &mut output);
        self.output = output;
        let (writes, done) = chunk?;
        Ok(PreparedChunk { output: &self.output, writes, done })
    }

    fn prepare_into(
        &mut self,
        chain: &Chain,
        jobs: &[ScratchJob],
        output: &mut [u8],
    ) -> Result<(Vec<Write>, ChunkDone)> {
        self.clusters.forget();
        let mut writes: Vec<Write> = Vec::new();
        let mut done = ChunkDone::default();
        let mut start = 0;
        for (index, job) in jobs.iter().enumerate() {
            let layer = chain.layers().get(job.layer as usize).ok_or_else(contradiction)?;
            let length = usize::try_from(job.length).map_err(|_| contradiction())?;
            let piece = &mut output[start..start + length];
            match self.get(layer, &jobs[index..], job, piece)? {
                Err(why) => {
                    let failed = failed(layer, job, why);
                    if why == FailedWhy::Inflate(InflateFault::NoZstd) {
                        return Err(failed.to_error());
                    }
                    done.failed.push(failed);
                }
                Ok(()) if is_zero(piece) => push_zeros(&mut done.zeros, job),
                Ok(()) => match writes.last_mut() {
                    Some(last)
                        if last.start + last.length == start
                            && last.at + last.length as u64 == job.at =>
                    {
                        last.length += length;
                    }
                    _ => writes.push(Write { start, length, at: job.at }),
                },
            }
            start += length;
        }
        Ok((writes, done))
    }

    /// Gets the bytes of `job`, the first of `jobs`.
    fn get(
        &mut self,
        layer: &Layer,
        jobs: &[ScratchJob],
        job: &ScratchJob,
        piece: &mut [u8],
    ) -> Result<Result<(), FailedWhy>> {
        match job.what {
            ScratchContent::Copy { role, host, bytes } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).min(piece.len());
                let (copied, zeros) = piece.split_at_mut(bytes);
                zeros.fill(0);
                let read = layer.file(role).read_with_zeros(host, copied);
                Ok(read.map_err(|error| FailedWhy::of_read(&error)))
            }
            ScratchContent::Inflate { host, stream_length, cluster } => {
                let stream = Stream { layer: job.layer, host, length: stream_length };
                let part = ClusterPart { stream, cluster, start: job.guest };
                let ahead = jobs[1..].iter().map_while(stream_of);
                self.clusters.read(layer, part, ahead, piece)
            }
        }
    }
}

/// The stream that a job is of; none where it is not of one.
fn stream_of(job: &ScratchJob) -> Option<Stream> {
    match job.what {
        ScratchContent::Inflate { host, stream_length, .. } => {
            Some(Stream { layer: job.layer, host, length: stream_length })
        }
        ScratchContent::Copy { .. } => None,
    }
}

impl PreparedChunk<'_> {
    /// Writes what is not zeros to the scratch file.
    ///
    /// # Errors
    /// The write failed.
    pub(super) fn write(self, file: &File) -> io::Result<ChunkDone> {
        for Write { start, length, at } in self.writes {
            file.write_all_at(&self.output[start..start + length], at)?;
        }
        Ok(self.done)
    }
}

/// Adds the range of `job`, whose bytes are zeros. Not of a copied piece, whose zeros may
/// be ciphertext.
fn push_zeros(zeros: &mut Vec<GuestRange>, job: &ScratchJob) {
    if matches!(job.what, ScratchContent::Copy { .. }) {
        return;
    }
    let range = guest_range(job);
    match zeros.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => zeros.push(range),
    }
}

fn guest_range(job: &ScratchJob) -> GuestRange {
    GuestRange::new(job.guest, job.guest.saturating_add(ByteLen::new(job.length)))
}

fn failed(layer: &Layer, job: &ScratchJob, why: FailedWhy) -> FailedCluster {
    let (role, host, length) = match job.what {
        ScratchContent::Inflate { host, stream_length, .. } => {
            (FileRole::Image, host, stream_length)
        }
        ScratchContent::Copy { role, host, bytes } => (role, host, ByteLen::new(bytes)),
    };
    let path: Arc<Path> = layer.file(role).path().into();
    FailedCluster { guest: guest_range(job), layer: job.layer, path, host, length, why }
}

fn contradiction() -> Error {
    Error::invalid("a piece of the scratch file is planned that its layer can't have")
}
