//! Reading at any offset.

use super::cluster::{ClusterPart, ClusterReader, Stream};
use super::failed::{FailedCluster, FailedWhy};
use super::{Ciphers, HOLES};
use crate::chain::{Chain, Resolver};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Coalescer, Extent, Mapping};
use crate::status::{Encryption, FileRole, HostPlace};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};

/// [`SECTOR_SIZE`] as a length in memory.
const SECTOR: usize = 512;

/// Extents that are looked at for streams to be read ahead.
const LOOK_AHEAD: usize = 256;

/// Reads the guest's disk, and keeps its working memory between reads: the extents of a
/// window (a few hundred KiB at most), what it read ahead of compressed streams (1 MiB),
/// and at most four inflated clusters (2 MiB each) of which only parts were asked for. One
/// for each thread.
#[derive(Debug)]
pub struct ChainReader<'c> {
    chain: &'c Chain,
    resolver: Resolver<'c>,
    /// What `extents` cover.
    window: GuestRange,
    extents: Vec<Extent>,
    /// Where the last read ended: one that starts there is not the last of its kind.
    next: Option<GuestOffset>,
    bytes: ExtentReader<'c>,
}

impl<'c> ChainReader<'c> {
    /// A reader of this chain, with the ciphers of its encrypted layers.
    pub fn new(chain: &'c Chain, ciphers: &'c Ciphers) -> Self {
        Self {
            chain,
            resolver: chain.resolver(HOLES),
            window: GuestRange::new(GuestOffset::ZERO, GuestOffset::ZERO),
            extents: Vec::new(),
            next: None,
            bytes: ExtentReader::new(chain, ciphers),
        }
    }

    /// Fills `buffer` with the guest's bytes from `offset` on; neither has to be aligned.
    ///
    /// # Errors
    /// `Usage` where the range is not all on the disk; what a layer's metadata says;
    /// `WrongKey` naming the layer whose key is missing; `InvalidImage` for a cluster that
    /// does not inflate, with guest offset, file and host range; `Unsupported` for one
    /// compressed by zstd where this build has none; a read failed.
    pub fn read_at(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let end = offset
            .checked_add(ByteLen::new(buffer.len() as u64))
            .filter(|end| end.get() <= self.chain.virtual_size().get());
        let Some(end) = end else {
            return Err(Error::new(ErrorKind::Usage(format!(
                "{} bytes at guest offset {offset} are not all on the disk, which has {} bytes",
                buffer.len(),
                self.chain.virtual_size().get()
            ))));
        };
        let mut at = offset;
        let mut rest = buffer;
        while at < end {
            if at < self.window.start || at >= self.window.end {
                self.resolve(GuestRange::new(at, end))?;
            }
            let part = GuestRange::new(at, end.min(self.window.end));
            let (piece, after) = rest.split_at_mut(bytes_of(part));
            // Where the reads are in order, what follows in the window is likely next.
            self.bytes.read(&self.extents, part, piece)?;
            rest = after;
            at = part.end;
            self.next = Some(at);
        }
        Ok(())
    }

    /// Resolves from the start of `wanted` on: a whole window where reads are in order, else
    /// only what is wanted.
    fn resolve(&mut self, wanted: GuestRange) -> Result<()> {
        let in_order = self.next == Some(wanted.start);
        let mut wanted = in_sectors(wanted);
        if in_order {
            wanted.end = self.chain.whole().end;
        }
        let window = self
            .chain
            .windows(wanted, HOLES)
            .next()
            .ok_or_else(|| Error::invalid("a range of nothing is resolved"))?;
        self.window = GuestRange::new(window.start, window.start);
        self.extents.clear();
        joined(self.resolver.resolve(window)?, &mut self.extents);
        self.window = window;
        Ok(())
    }
}

/// Appends extents, joined where they carry each other on.
pub(crate) fn joined(extents: impl Iterator<Item = Extent>, to: &mut Vec<Extent>) {
    let mut coalescer = Coalescer::default();
    to.extend(extents.filter_map(|extent| coalescer.push(extent)));
    to.extend(coalescer.finish());
}

/// The range made longer to whole sectors, which ciphers need. (A disk is of whole ones.)
pub(super) fn in_sectors(range: GuestRange) -> GuestRange {
    if range.is_empty() {
        return range;
    }
    let start = range.start.get() / SECTOR_SIZE * SECTOR_SIZE;
    let end = range.end.get().div_ceil(SECTOR_SIZE).saturating_mul(SECTOR_SIZE);
    GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
}

/// Length of a range that lies in memory.
pub(super) fn bytes_of(range: GuestRange) -> usize {
    usize::try_from(range.length().get()).unwrap_or(usize::MAX)
}

/// Reads the bytes of extents.
#[derive(Debug)]
pub(super) struct ExtentReader<'c> {
    chain: &'c Chain,
    ciphers: &'c Ciphers,
    clusters: ClusterReader,
}

impl<'c> ExtentReader<'c> {
    pub(super) fn new(chain: &'c Chain, ciphers: &'c Ciphers) -> Self {
        Self { chain, ciphers, clusters: ClusterReader::default() }
    }

    /// Fills `buffer`, as long as `range`, from `extents`, which come in order and cover it.
    /// What they cover behind it may be read ahead.
    pub(super) fn read(
        &mut self,
        extents: &[Extent],
        range: GuestRange,
        buffer: &mut [u8],
    ) -> Result<()> {
        let first = extents.partition_point(|extent| extent.end() <= range.start);
        let mut rest = buffer;
        for (index, extent) in extents.iter().enumerate().skip(first) {
            let part = GuestRange::new(extent.start, extent.end()).intersection(range);
            if part.is_empty() {
                break;
            }
            let piece;
            (piece, rest) = rest.split_at_mut(bytes_of(part).min(rest.len()));
            self.read_part(extent, part, &extents[index + 1..], piece)?;
        }
        // Nothing, unless the extents leave a gap.
        rest.fill(0);
        Ok(())
    }

    /// Fills `piece` with `part` of an extent, after which come those of `following`.
    fn read_part(
        &mut self,
        extent: &Extent,
        part: GuestRange,
        following: &[Extent],
        piece: &mut [u8],
    ) -> Result<()> {
        let chain = self.chain;
        let layer = chain
            .layers()
            .get(extent.depth as usize)
            .ok_or_else(|| Error::invalid("an extent is of no layer of the chain"))?;
        let inside = part.start.since(extent.start);
        let (role, host, length, outcome) = match extent.mapping {
            Mapping::Zero(_) => {
                piece.fill(0);
                return Ok(());
            }
            Mapping::Damaged { .. } => {
                let error = layer.damage_at(part.start);
                return Err(error.unwrap_or_else(|| Error::invalid("damaged metadata")));
            }
            Mapping::Data(place) => {
                let HostPlace { file, offset } = place.advanced(inside);
                let read = layer.file(file).read_with_zeros(offset, piece);
                (file, offset, part.length(), read.map_err(|error| FailedWhy::of_read(&error)))
            }
            Mapping::Encrypted { place, cipher } => {
                let from = place.advanced(inside);
                let read = self.decrypt(extent, place, cipher, part, piece)?;
                (from.file, from.offset, part.length(), read)
            }
            Mapping::Compressed { host, stream_length, cluster } => {
                let stream = Stream { layer: extent.depth, host, length: stream_length };
                let wanted = ClusterPart { stream, cluster, start: part.start };
                let ahead = following.iter().take(LOOK_AHEAD).filter_map(stream_of);
                let read = self.clusters.read(layer, wanted, ahead, piece)?;
                (FileRole::Image, host, stream_length, read)
            }
        };
        outcome.map_err(|why| {
            let path = layer.file(role).path().into();
            FailedCluster { guest: part, layer: extent.depth, path, host, length, why }.to_error()
        })
    }

    /// Reads and decrypts `part` of an extent that starts at `place`. Also the zeros past
    /// the end of the file are decrypted, as by QEMU (qcow2_co_preadv_encrypted() in its
    /// block/qcow2.c).
    fn decrypt(
        &self,
        extent: &Extent,
        place: HostPlace,
        encryption: Encryption,
        part: GuestRange,
        piece: &mut [u8],
    ) -> Result<Result<(), FailedWhy>> {
        let cipher = self.ciphers.get(self.chain, extent.depth)?;
        let source = self.chain.layers()[extent.depth as usize].file(place.file);
        let decrypt = |from: u64, sectors: &mut [u8]| {
            let guest = GuestOffset::new(from);
            let host: HostOffset = place.advanced(guest.since(extent.start)).offset;
            source.read_with_zeros(host, sectors)?;
            let number = match encryption {
                Encryption::Aes => from / SECTOR_SIZE,
                Encryption::Luks => host.get() / SECTOR_SIZE,
            };
            cipher.decrypt(number, sectors);
            Ok(())
        };
        let mut at = part.start.get();
        let mut rest = piece;
        let mut one = [0; SECTOR];
        while !rest.is_empty() {
            // A sector of which a part is wanted, or all that are wanted whole.
            let skip = usize::try_from(at % SECTOR_SIZE).unwrap_or(0);
            let (sectors, after);
            if skip > 0 || rest.len() < SECTOR {
                (sectors, after) = rest.split_at_mut((SECTOR - skip).min(rest.len()));
                if let Err(error) = decrypt(at - skip as u64, &mut one) {
                    return Ok(Err(FailedWhy::of_read(&error)));
                }
                sectors.copy_from_slice(&one[skip..skip + sectors.len()]);
            } else {
                (sectors, after) = rest.split_at_mut(rest.len() / SECTOR * SECTOR);
                if let Err(error) = decrypt(at, sectors) {
                    return Ok(Err(FailedWhy::of_read(&error)));
                }
            }
            at = at.saturating_add(sectors.len() as u64);
            rest = after;
        }
        Ok(Ok(()))
    }
}

/// The stream of a compressed extent.
fn stream_of(extent: &Extent) -> Option<Stream> {
    match extent.mapping {
        Mapping::Compressed { host, stream_length, .. } => {
            Some(Stream { layer: extent.depth, host, length: stream_length })
        }
        _ => None,
    }
}
