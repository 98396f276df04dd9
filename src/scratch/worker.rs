//! What one thread does of a scratch file: reads streams, inflates them, writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{FailedCluster, FailedWhy, ScratchContent, ScratchJob};
use crate::chain::{Chain, Layer};
use crate::error::{Error, Result};
use crate::inflate::{InflateFault, Inflater};
use crate::source::Source;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Most bytes that are read ahead of what is asked for.
const READ_AHEAD: u64 = 1 << 20;

/// Gap between two streams that is read over rather than left out.
const READ_GAP: u64 = 32 << 10;

/// Clusters that are kept because only parts of them were asked for so far. Where layers
/// alternate, those of several layers are begun at the same time.
const KEPT_CLUSTERS: usize = 4;

/// Reads, inflates and writes chunks; keeps its memory between them: a chunk, what is read
/// ahead, and the kept clusters, which are at most 2 MiB each.
#[derive(Debug, Default)]
pub(super) struct Worker {
    inflater: Inflater,
    reader: Reader,
    kept: Vec<KeptCluster>,
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

/// A cluster of which other parts may be asked for.
#[derive(Debug)]
struct KeptCluster {
    layer: u32,
    host: HostOffset,
    guest: GuestOffset,
    outcome: Result<(), FailedWhy>,
    bytes: Vec<u8>,
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
        self.kept.clear();
        self.reader.forget();
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
                let read = layer.file(role).read_up_to(host, &mut piece[..bytes]);
                Ok(read.map(|n| piece[n..].fill(0)).map_err(|error| read_failure(&error)))
            }
            ScratchContent::Inflate { host, cluster, .. } => {
                let size = usize::try_from(layer.image.cluster_size()).unwrap_or(usize::MAX);
                let start = usize::try_from(job.guest.since(cluster).get()).unwrap_or(usize::MAX);
                let end = start.saturating_add(piece.len());
                if job.guest < cluster || end > size {
                    return Err(contradiction());
                }
                if piece.len() == size {
                    return self.inflate(layer, jobs, piece);
                }
                let known = self.kept.iter().position(|kept| {
                    (kept.layer, kept.host, kept.guest) == (job.layer, host, cluster)
                });
                let index = match known {
                    Some(index) => index,
                    None => self.keep(layer, jobs, job, host, cluster, size)?,
                };
                let kept = &self.kept[index];
                Ok(kept.outcome.map(|()| piece.copy_from_slice(&kept.bytes[start..end])))
            }
        }
    }

    /// Inflates a cluster of which only a part is asked for, and says where it is kept.
    fn keep(
        &mut self,
        layer: &Layer,
        jobs: &[ScratchJob],
        job: &ScratchJob,
        host: HostOffset,
        guest: GuestOffset,
        size: usize,
    ) -> Result<usize> {
        let mut bytes = Vec::new();
        if self.kept.len() == KEPT_CLUSTERS {
            // The one kept for longest.
            bytes = self.kept.remove(0).bytes;
        }
        bytes.resize(size, 0);
        let outcome = self.inflate(layer, jobs, &mut bytes)?;
        self.kept.push(KeptCluster { layer: job.layer, host, guest, outcome, bytes });
        Ok(self.kept.len() - 1)
    }

    /// Inflates the whole cluster of the first of `jobs`.
    fn inflate(
        &mut self,
        layer: &Layer,
        jobs: &[ScratchJob],
        cluster: &mut [u8],
    ) -> Result<Result<(), FailedWhy>> {
        let method = layer.image.compression().ok_or_else(contradiction)?;
        Ok(match self.reader.stream(&layer.source, jobs) {
            Ok(stream) => {
                self.inflater.inflate(method, stream, cluster).map_err(FailedWhy::Inflate)
            }
            Err(error) => Err(read_failure(&error)),
        })
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

/// Reads streams, neighbouring ones together.
#[derive(Debug, Default)]
struct Reader {
    layer: Option<u32>,
    start: u64,
    length: usize,
    bytes: Vec<u8>,
}

impl Reader {
    fn forget(&mut self) {
        self.layer = None;
    }

    /// The stream of the first of `jobs`; what lies past the end of the file is zeros, as
    /// QEMU reads it.
    fn stream(&mut self, source: &Source, jobs: &[ScratchJob]) -> Result<&[u8]> {
        let mut wanted = jobs.iter().map_while(|job| match job.what {
            ScratchContent::Inflate { host, stream_length, .. } => {
                Some((job.layer, host.get(), host.get().saturating_add(stream_length.get())))
            }
            ScratchContent::Copy { .. } => None,
        });
        let Some((layer, start, end)) = wanted.next() else { return Ok(&[]) };
        let known = self.layer == Some(layer) && self.start <= start;
        if !known || end > self.start.saturating_add(self.length as u64) {
            let mut ahead = end;
            for (next_layer, next_start, next_end) in wanted {
                let follows = (start..=ahead.saturating_add(READ_GAP)).contains(&next_start);
                if next_layer != layer || !follows || next_end - start > READ_AHEAD {
                    break;
                }
                ahead = ahead.max(next_end);
            }
            let read = self.read(source, start, ahead);
            if read.is_err() && ahead > end {
                // Only what is behind may be unreadable.
                self.read(source, start, end)?;
            } else {
                read?;
            }
            self.layer = Some(layer);
        }
        let from = usize::try_from(start - self.start).unwrap_or(usize::MAX);
        let length = usize::try_from(end - start).unwrap_or(usize::MAX);
        self.bytes.get(from..from.saturating_add(length)).ok_or_else(contradiction)
    }

    fn read(&mut self, source: &Source, start: u64, end: u64) -> Result<()> {
        self.forget();
        let length = usize::try_from(end - start).map_err(|_| contradiction())?;
        if self.bytes.len() < length {
            self.bytes.resize(length, 0);
        }
        let bytes = &mut self.bytes[..length];
        let read = source.read_up_to(HostOffset::new(start), bytes)?;
        bytes[read..].fill(0);
        (self.start, self.length) = (start, length);
        Ok(())
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

fn read_failure(error: &Error) -> FailedWhy {
    let source = std::error::Error::source(error);
    let errno = source.and_then(|source| source.downcast_ref::<io::Error>()?.raw_os_error());
    FailedWhy::Read(errno.unwrap_or(0))
}

fn contradiction() -> Error {
    Error::invalid("a piece of the scratch file is planned that its layer can't have")
}

/// True where all of `bytes` are zeros.
fn is_zero(bytes: &[u8]) -> bool {
    // Each byte is the one before it, and the first is 0: one comparison of memory.
    bytes.first().is_none_or(|&first| first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}
