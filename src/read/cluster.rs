//! Compressed clusters: their streams read together, inflated, and kept while only parts
//! of them are asked for.

use super::failed::FailedWhy;
use crate::chain::Layer;
use crate::error::{Error, Result};
use crate::inflate::Inflater;
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// Most bytes that are read ahead of what is asked for.
const READ_AHEAD: u64 = 1 << 20;

/// Gap between two streams that is read over rather than left out.
const READ_GAP: u64 = 32 << 10;

/// Clusters that are kept because only parts of them were asked for so far. Where layers
/// alternate, those of several layers are begun at the same time.
const KEPT_CLUSTERS: usize = 4;

/// Where the stream of a compressed cluster lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stream {
    /// The layer in whose image file it is.
    pub(crate) layer: u32,
    /// Where it starts.
    pub(crate) host: HostOffset,
    /// An upper bound of its length.
    pub(crate) length: ByteLen,
}

impl Stream {
    fn end(self) -> u64 {
        self.host.saturating_add(self.length).get()
    }
}

/// A part of a compressed cluster that is asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClusterPart {
    /// The cluster's stream.
    pub(crate) stream: Stream,
    /// Guest offset of the cluster's first byte.
    pub(crate) cluster: GuestOffset,
    /// Guest offset of the part's first byte.
    pub(crate) start: GuestOffset,
}

/// Reads and inflates clusters; keeps its memory between them: the inflater's tables, what
/// is read ahead, and the kept clusters, which are at most 2 MiB each. One for each thread.
#[derive(Debug, Default)]
pub(crate) struct ClusterReader {
    inflater: Inflater,
    streams: StreamReader,
    kept: Vec<KeptCluster>,
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

impl ClusterReader {
    /// Keeps the memory, but nothing that was read.
    pub(crate) fn forget(&mut self) {
        self.kept.clear();
        self.streams.forget();
    }

    /// Fills `piece` with the part's bytes. `ahead` are the streams that will be asked for
    /// after this one.
    ///
    /// # Errors
    /// The layer can't have such a cluster.
    pub(crate) fn read(
        &mut self,
        layer: &Layer,
        part: ClusterPart,
        ahead: impl Iterator<Item = Stream>,
        piece: &mut [u8],
    ) -> Result<Result<(), FailedWhy>> {
        let size = usize::try_from(layer.image.cluster_size()).unwrap_or(usize::MAX);
        let start = usize::try_from(part.start.since(part.cluster).get()).unwrap_or(usize::MAX);
        let end = start.saturating_add(piece.len());
        if part.start < part.cluster || end > size {
            return Err(contradiction());
        }
        if piece.len() == size {
            return self.inflate(layer, part.stream, ahead, piece);
        }
        let known = self.kept.iter().position(|kept| {
            (kept.layer, kept.host, kept.guest)
                == (part.stream.layer, part.stream.host, part.cluster)
        });
        let index = match known {
            Some(index) => index,
            None => self.keep(layer, part, ahead, size)?,
        };
        let kept = &self.kept[index];
        Ok(kept.outcome.map(|()| piece.copy_from_slice(&kept.bytes[start..end])))
    }

    /// Inflates a cluster of which only a part is asked for, and says where it is kept.
    fn keep(
        &mut self,
        layer: &Layer,
        part: ClusterPart,
        ahead: impl Iterator<Item = Stream>,
        size: usize,
    ) -> Result<usize> {
        let mut bytes = Vec::new();
        if self.kept.len() == KEPT_CLUSTERS {
            // The one kept for longest.
            bytes = self.kept.remove(0).bytes;
        }
        bytes.resize(size, 0);
        let outcome = self.inflate(layer, part.stream, ahead, &mut bytes)?;
        let (layer, host) = (part.stream.layer, part.stream.host);
        self.kept.push(KeptCluster { layer, host, guest: part.cluster, outcome, bytes });
        Ok(self.kept.len() - 1)
    }

    /// Inflates a whole cluster.
    fn inflate(
        &mut self,
        layer: &Layer,
        stream: Stream,
        ahead: impl Iterator<Item = Stream>,
        cluster: &mut [u8],
    ) -> Result<Result<(), FailedWhy>> {
        let method = layer.image.compression().ok_or_else(contradiction)?;
        Ok(match self.streams.bytes(&layer.source, stream, ahead) {
            Ok(stream) => {
                self.inflater.inflate(method, stream, cluster).map_err(FailedWhy::Inflate)
            }
            Err(error) => Err(FailedWhy::of_read(&error)),
        })
    }
}

/// Reads streams, neighbouring ones together.
#[derive(Debug, Default)]
struct StreamReader {
    layer: Option<u32>,
    start: u64,
    length: usize,
    bytes: Vec<u8>,
}

impl StreamReader {
    fn forget(&mut self) {
        self.layer = None;
    }

    /// The bytes of a stream; what lies past the end of the file is zeros, as QEMU reads
    /// it.
    fn bytes(
        &mut self,
        source: &Source,
        stream: Stream,
        wanted: impl Iterator<Item = Stream>,
    ) -> Result<&[u8]> {
        let (layer, start, end) = (stream.layer, stream.host.get(), stream.end());
        let known = self.layer == Some(layer) && self.start <= start;
        if !known || end > self.start.saturating_add(self.length as u64) {
            let mut ahead = end;
            for next in wanted {
                let follows = (start..=ahead.saturating_add(READ_GAP)).contains(&next.host.get());
                if next.layer != layer || !follows || next.end() - start > READ_AHEAD {
                    break;
                }
                ahead = ahead.max(next.end());
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
        source.read_with_zeros(HostOffset::new(start), &mut self.bytes[..length])?;
        (self.start, self.length) = (start, length);
        Ok(())
    }
}

fn contradiction() -> Error {
    Error::invalid("a part of a compressed cluster is asked for that its layer can't have")
}
