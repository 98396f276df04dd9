//! Extents to pieces to segments. Nothing here grows with their number.
//!
//! A window's extents become pieces by themselves, so that windows can be worked on side
//! by side; only pieces that plainly carry each other on are joined across windows. So
//! the segments come out the same in whichever order, and wherever a table starts.

use std::sync::Arc;

use super::{
    BackingId, CompressedMode, ObstacleKind, PlanOptions, Segment, SegmentTarget, ZeroMode,
};
use crate::chain::{Chain, Extents, last_answer};
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::scratch::{Found, FoundKind, OnError, ScratchContent, ScratchJob};
use crate::status::{Encryption, FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, SECTOR_SIZE, Sectors};

/// Which device's contents are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// The virtual disk.
    Guest,
    /// What legacy AES of the layer at this depth has encrypted, in guest order, because
    /// the guest's sectors are its IVs. All else is zeros that nobody reads.
    Ciphertext(u32),
}

/// Bytes of a file under LUKS that its loop device does not show, but that have to be
/// decrypted all the same: the rest of its last cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) depth: u32,
    pub(super) role: FileRole,
    /// Where in the file it ends, perhaps past the file's end.
    pub(super) end: u64,
    /// The first guest offset concerned.
    pub(super) first: GuestOffset,
}

/// What stands in the way of one guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) kind: ObstacleKind,
    pub(super) backing: BackingId,
    pub(super) count: u64,
    pub(super) first: GuestOffset,
}

/// What the plan needs to know of one file.
#[derive(Clone, Copy, Debug)]
struct FileFacts {
    backing: BackingId,
    length: u64,
    /// Length of what a loop device shows of it: whole sectors.
    shown: u64,
}

/// What the plan needs to know of one layer.
#[derive(Clone, Copy, Debug)]
struct LayerFacts {
    image: FileFacts,
    data_file: FileFacts,
    granularity: u64,
}

/// What the plan needs to know of a chain; shared by all threads.
///
/// Its backing ids are provisional, for all that there might be: the files by their real
/// ids, then the zeros, the scratch file, and for each file a crypt device over it.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    layers: Vec<LayerFacts>,
    pub(super) options: PlanOptions,
    pub(super) zero_backing: BackingId,
    pub(super) scratch_backing: BackingId,
    /// What inflating found, in guest order.
    found: Arc<[Found]>,
}

/// The files of a chain in the order of their backing ids.
pub(super) fn chain_files(chain: &Chain) -> impl Iterator<Item = (u32, FileRole)> {
    let layers = chain.layers().iter().zip(0u32..);
    layers.flat_map(|(layer, depth)| layer.files().map(move |(role, _)| (depth, role)))
}

impl Facts {
    pub(super) fn new(chain: &Chain, options: PlanOptions, found: Arc<[Found]>) -> Self {
        let mut ids = (0..).map(BackingId);
        let mut next_id = || ids.next().unwrap_or(BackingId(u32::MAX));
        let layers = chain
            .layers()
            .iter()
            .map(|layer| {
                let mut facts = |length: ByteLen| FileFacts {
                    backing: next_id(),
                    length: length.get(),
                    shown: length.floor_to_sector().get(),
                };
                let image = facts(layer.source.length());
                let data_file = layer.data_file.as_ref().map_or(image, |file| facts(file.length()));
                LayerFacts { image, data_file, granularity: layer.image.granularity() }
            })
            .collect();
        let (zero_backing, scratch_backing) = (next_id(), next_id());
        Self { layers, options, zero_backing, scratch_backing, found }
    }

    /// The same for a stream of ciphertext: what is not ciphertext there is never read.
    pub(super) fn for_ciphertext(&self) -> Self {
        let options = PlanOptions { zero: ZeroMode::Dm, ..self.options };
        Self { options, ..self.clone() }
    }

    /// How many backings there might be.
    pub(super) fn backing_count(&self) -> usize {
        let files = self.zero_backing.0 as usize;
        files * 2 + 2
    }

    /// The crypt device over a file.
    pub(super) fn crypt_backing(&self, file: BackingId) -> BackingId {
        BackingId(self.scratch_backing.0 + 1 + file.0)
    }

    #[inline]
    fn file(&self, depth: u32, role: FileRole) -> FileFacts {
        let layer = &self.layers[depth as usize];
        match role {
            FileRole::Image => layer.image,
            FileRole::DataFile => layer.data_file,
        }
    }

    /// The backing of a file, and how many bytes of it a loop device shows.
    pub(super) fn shown(&self, depth: u32, role: FileRole) -> (BackingId, u64) {
        let file = self.file(depth, role);
        (file.backing, file.shown)
    }

    fn is_short(&self, zeros: u64) -> bool {
        zeros < self.options.zero_threshold.get()
    }

    /// Calls `each` with the segments of a piece that can grow no more, in a table whose
    /// sector 0 lies at `origin` of the virtual disk. It is one segment, but where
    /// inflating found something in the piece.
    #[inline]
    pub(super) fn segments<E>(
        &self,
        piece: &Piece,
        origin: GuestOffset,
        mut each: impl FnMut(Segment) -> Result<(), E>,
    ) -> Result<(), E> {
        let target = match piece.kind {
            PieceKind::Linear { backing, offset } => {
                if backing == self.scratch_backing && !self.found.is_empty() {
                    return self.scratch_segments(piece, origin, &mut each);
                }
                SegmentTarget::Linear { backing, offset: Sectors::new(offset / SECTOR_SIZE) }
            }
            PieceKind::Zero { .. } => {
                let by_loop = match self.options.zero {
                    ZeroMode::Auto => self.is_short(piece.length),
                    ZeroMode::Loop => true,
                    ZeroMode::Dm => false,
                };
                if by_loop {
                    SegmentTarget::Linear { backing: self.zero_backing, offset: Sectors::default() }
                } else {
                    SegmentTarget::Zero
                }
            }
            PieceKind::Error => SegmentTarget::Error,
        };
        each(segment(piece.start, piece.length, origin, target))
    }

    /// The segments of a piece of the scratch file, some of which inflated to zeros or not
    /// at all.
    fn scratch_segments<E>(
        &self,
        piece: &Piece,
        origin: GuestOffset,
        each: &mut impl FnMut(Segment) -> Result<(), E>,
    ) -> Result<(), E> {
        let end = piece.start + piece.length;
        let mut at = piece.start;
        let scratch = |from: u64, to: u64| {
            let target = SegmentTarget::Linear {
                backing: self.scratch_backing,
                offset: Sectors::new(from / SECTOR_SIZE),
            };
            segment(from, to - from, origin, target)
        };
        let first = self.found.partition_point(|found| found.range.end.get() <= at);
        for found in &self.found[first..] {
            let (from, to) = (found.range.start.get().max(at), found.range.end.get().min(end));
            if from >= end {
                break;
            }
            let target = match found.kind {
                // The hole of the scratch file serves as well.
                FoundKind::Zeros if self.options.zero == ZeroMode::Loop => continue,
                FoundKind::Failed if self.options.on_error != OnError::ErrorTarget => continue,
                FoundKind::Zeros => SegmentTarget::Zero,
                FoundKind::Failed => SegmentTarget::Error,
            };
            if from > at {
                each(scratch(at, from))?;
            }
            each(segment(from, to - from, origin, target))?;
            at = to;
        }
        if at < end { each(scratch(at, end)) } else { Ok(()) }
    }
}

/// Pieces start and end on sectors: the cutter rounds what does not.
#[inline]
fn segment(start: u64, length: u64, origin: GuestOffset, target: SegmentTarget) -> Segment {
    Segment {
        start: Sectors::new((start - origin.get()) / SECTOR_SIZE),
        length: Sectors::new(length / SECTOR_SIZE),
        target,
    }
}

/// A stretch of the virtual disk that one segment can serve; bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    length: u64,
    kind: PieceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceKind {
    Linear {
        backing: BackingId,
        offset: u64,
    },
    /// Zeros, and where in a file the same zeros could be read, if anywhere.
    Zero {
        same_in_file: Option<(BackingId, u64)>,
    },
    /// What can't be read, and is to fail.
    Error,
}

impl Piece {
    /// Takes `next`, which follows, where both are one file's neighbouring bytes or both
    /// zeros.
    #[inline]
    pub(super) fn absorb(&mut self, next: &Piece) -> bool {
        let follows = |(backing, offset): (BackingId, u64), (b, o): (BackingId, u64)| {
            backing == b && offset.wrapping_add(self.length) == o
        };
        match (&mut self.kind, next.kind) {
            (
                PieceKind::Linear { backing, offset },
                PieceKind::Linear { backing: b, offset: o },
            ) => {
                if !follows((*backing, *offset), (b, o)) {
                    return false;
                }
            }
            (PieceKind::Zero { same_in_file: a }, PieceKind::Zero { same_in_file: b }) => {
                if !matches!((*a, b), (Some(a), Some(b)) if follows(a, b)) {
                    *a = None;
                }
            }
            (PieceKind::Error, PieceKind::Error) => {}
            _ => return false,
        }
        self.length += next.length;
        true
    }

    /// As `absorb`, and a short hole between data of one file, which the linear can run on
    /// through.
    #[inline]
    fn absorb_through_hole(&mut self, next: &Piece, facts: &Facts) -> bool {
        if self.absorb(next) {
            return true;
        }
        if facts.options.zero != ZeroMode::Auto {
            return false;
        }
        // The scratch file has the guest's own offsets, and holes where nothing is written.
        let scratch = facts.scratch_backing;
        let (place, hole_length, next_place) = match (self.kind, next.kind) {
            (PieceKind::Linear { backing, offset }, PieceKind::Zero { .. })
                if backing == scratch =>
            {
                ((backing, offset), next.length, (scratch, next.start))
            }
            (PieceKind::Zero { .. }, PieceKind::Linear { backing, offset })
                if backing == scratch =>
            {
                ((scratch, self.start), self.length, (backing, offset))
            }
            (
                PieceKind::Linear { backing, offset },
                PieceKind::Zero { same_in_file: Some(hole) },
            ) => ((backing, offset), next.length, hole),
            (
                PieceKind::Zero { same_in_file: Some(hole) },
                PieceKind::Linear { backing, offset },
            ) => (hole, self.length, (backing, offset)),
            _ => return false,
        };
        let joins = facts.is_short(hole_length)
            && place.0 == next_place.0
            && place.1.wrapping_add(self.length) == next_place.1;
        if joins {
            self.kind = PieceKind::Linear { backing: place.0, offset: place.1 };
            self.length += next.length;
        }
        joins
    }
}

/// Data in whole sectors inside of its file: start, length and offset in the file.
type Data = (u64, u64, u64);

/// The extent, where it is such data, of that layer and file.
#[inline(always)]
fn whole_data(extent: &Extent, depth: u32, role: FileRole, file: FileFacts) -> Option<Data> {
    let Mapping::Data(place) = extent.mapping else { return None };
    let (start, length) = (extent.start.get(), extent.length.get());
    let offset = place.offset.get();
    let whole = (start | length | offset).is_multiple_of(SECTOR_SIZE);
    let inside = offset.checked_add(length).is_some_and(|end| end <= file.shown);
    let same_file = extent.depth == depth && place.file == role;
    (same_file && whole && inside).then_some((start, length, offset))
}

/// What a window comes to besides its pieces.
#[derive(Debug, Default)]
pub(super) struct Noted {
    pub(super) blocked: Vec<Blocked>,
    pub(super) tails: Vec<Tail>,
}

/// Cuts one window's extents into pieces.
struct Cutter<'a, F, J> {
    facts: &'a Facts,
    pending: Option<Piece>,
    emit: F,
    job: J,
    noted: Noted,
}

/// Cuts `extents`, all that a window has, into pieces of the stream, and gives them to
/// `emit` but for the last one: that is returned. `job` gets what has to be written to the
/// scratch file.
#[inline]
pub(super) fn cut(
    facts: &Facts,
    stream: Stream,
    extents: Extents<'_>,
    emit: impl FnMut(&Piece),
    job: impl FnMut(ScratchJob),
) -> (Option<Piece>, Noted) {
    let mut cutter = Cutter { facts, pending: None, emit, job, noted: Noted::default() };
    match (stream, extents) {
        (Stream::Ciphertext(depth), extents) => cutter.ciphertext(depth, extents),
        (Stream::Guest, Extents::Folded(extents)) => cutter.all(extents),
        (Stream::Guest, Extents::OneLayer { depth, runs }) => {
            cutter.all(runs.map(|run| last_answer(run, depth)));
        }
    }
    (cutter.pending, cutter.noted)
}

impl<F: FnMut(&Piece), J: FnMut(ScratchJob)> Cutter<'_, F, J> {
    #[inline]
    fn all(&mut self, mut extents: impl Iterator<Item = Extent>) {
        let mut next = extents.next();
        while let Some(extent) = next {
            let Mapping::Data(place) = extent.mapping else {
                self.push(&extent);
                next = extents.next();
                continue;
            };
            let file = self.facts.file(extent.depth, place.file);
            let Some(first) = whole_data(&extent, extent.depth, place.file, file) else {
                self.push(&extent);
                next = extents.next();
                continue;
            };
            next = self.data_of_one_file(extent.depth, place.file, file, first, &mut extents);
        }
    }

    /// Takes data in whole sectors inside of one file: `first`, and then what of `extents`
    /// is it too. Gives back the first extent that is not. In most images nearly all are,
    /// so they have a loop of their own.
    #[inline(never)]
    fn data_of_one_file(
        &mut self,
        depth: u32,
        role: FileRole,
        file: FileFacts,
        first: Data,
        extents: &mut impl Iterator<Item = Extent>,
    ) -> Option<Extent> {
        let backing = file.backing;
        let piece = |(start, length, offset)| Piece {
            start,
            length,
            kind: PieceKind::Linear { backing, offset },
        };
        self.whole_piece(piece(first));
        // The pending piece is a linear one of this file now, and ends where the next starts.
        let Some(Piece { mut start, mut length, kind: PieceKind::Linear { mut offset, .. } }) =
            self.pending
        else {
            return extents.next();
        };
        let mut other = None;
        for extent in extents {
            let Some((next, more, next_offset)) = whole_data(&extent, depth, role, file) else {
                other = Some(extent);
                break;
            };
            if offset.wrapping_add(length) == next_offset {
                length += more;
            } else {
                (self.emit)(&piece((start, length, offset)));
                (start, length, offset) = (next, more, next_offset);
            }
        }
        self.pending = Some(piece((start, length, offset)));
        other
    }

    /// Takes the extents of a window for a stream of ciphertext.
    fn ciphertext(&mut self, depth: u32, extents: Extents<'_>) {
        for extent in extents {
            match extent.mapping {
                Mapping::Encrypted { place, cipher: Encryption::Aes } if extent.depth == depth => {
                    self.data(&extent, place);
                }
                _ => self.placeholder(extent.start.get(), extent.length.get()),
            }
        }
    }

    /// Takes any extent.
    #[inline(never)]
    fn push(&mut self, extent: &Extent) {
        let (start, length) = (extent.start.get(), extent.length.get());
        match extent.mapping {
            Mapping::Data(place) => self.data(extent, place),
            Mapping::Zero(cause) => self.zeros(extent, cause),
            Mapping::Compressed { host, stream_length, cluster } => {
                if self.facts.options.compressed == CompressedMode::Refuse {
                    self.block(ObstacleKind::Compressed, extent.depth, start, 1);
                    return self.placeholder(start, length);
                }
                let what = ScratchContent::Inflate { host, stream_length, cluster };
                self.scratch(start, length, extent.depth, what);
            }
            Mapping::Encrypted { place, cipher: Encryption::Luks } => self.luks(extent, place),
            Mapping::Encrypted { place, cipher: Encryption::Aes } => {
                // Where it can't be read is known where the ciphertext is cut.
                let file = self.facts.file(extent.depth, place.file);
                let backing = self.facts.crypt_backing(file.backing);
                let inside = self.inside(extent, place.offset.get(), file);
                self.linear(start, inside, backing, start);
                self.past_end(start + inside, length - inside, place.offset.get() + inside, extent);
            }
        }
    }

    /// Data under LUKS: the crypt device over the file has it at the file's own offsets.
    fn luks(&mut self, extent: &Extent, place: HostPlace) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let host = place.offset.get();
        let file = self.facts.file(extent.depth, place.file);
        if !(start | length | host).is_multiple_of(SECTOR_SIZE) {
            self.block(ObstacleKind::Unaligned, extent.depth, start, 1);
            return self.placeholder(start, length);
        }
        let inside = self.inside(extent, host, file);
        let end = host + inside;
        if inside > 0 && end > file.shown {
            let first = GuestOffset::new(start);
            self.noted.tails.push(Tail { depth: extent.depth, role: place.file, end, first });
        }
        self.linear(start, inside, self.facts.crypt_backing(file.backing), host);
        self.past_end(start + inside, length - inside, end, extent);
    }

    /// How many bytes of encrypted data are to be decrypted: of a cluster in which the
    /// file ends all, for QEMU too decrypts the zeros that it reads past the end.
    fn inside(&self, extent: &Extent, host: u64, file: FileFacts) -> u64 {
        let granularity = self.facts.layers[extent.depth as usize].granularity;
        let granules = file.length.saturating_sub(host).div_ceil(granularity);
        granules.saturating_mul(granularity).min(extent.length.get())
    }

    fn zeros(&mut self, extent: &Extent, cause: ZeroCause) {
        let (start, length) = (extent.start.get(), extent.length.get());
        if let ZeroCause::Layer(ZeroStatus::DataPastFileEnd(place)) = cause {
            return self.past_end(start, length, place.offset.get(), extent);
        }
        let readable = match cause {
            ZeroCause::Layer(
                ZeroStatus::Hole(place)
                | ZeroStatus::Unwritten(place)
                | ZeroStatus::DataHole(place)
                | ZeroStatus::DataUnwritten(place),
            ) => Some(place),
            _ => None,
        };
        let same_in_file = readable.and_then(|place| {
            let file = self.facts.file(extent.depth, place.file);
            let end = place.offset.get().checked_add(length)?;
            (end <= file.shown).then_some((file.backing, place.offset.get()))
        });
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file } });
    }

    /// Bytes as they are in a file, perhaps not in whole sectors inside of it.
    fn data(&mut self, extent: &Extent, place: HostPlace) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let host = place.offset.get();
        let file = self.facts.file(extent.depth, place.file);
        let copy = |at: u64, bytes: u64| ScratchContent::Copy {
            role: place.file,
            host: place.offset.saturating_add(ByteLen::new(at)),
            bytes,
        };
        if !start.is_multiple_of(SECTOR_SIZE) {
            self.block(ObstacleKind::Unaligned, extent.depth, start, 1);
            return self.placeholder(start, length);
        }
        // A loop device shows whole sectors: what does not start on one is copied, and so
        // is the last sector where the file ends inside of it.
        let mapped = if host.is_multiple_of(SECTOR_SIZE) {
            whole_sectors(file.shown.saturating_sub(host).min(length))
        } else {
            0
        };
        self.linear(start, mapped, file.backing, host);
        let bytes = file.length.saturating_sub(host).min(length) - mapped;
        let copied = bytes.next_multiple_of(SECTOR_SIZE);
        if bytes > 0 {
            self.scratch(start + mapped, copied, extent.depth, copy(mapped, bytes));
        }
        let done = mapped + copied;
        if done < length {
            self.past_end(start + done, length - done, host + done, extent);
        }
    }

    /// What lies past the end of its file. In the file's last cluster those are zeros; a
    /// whole cluster there means that the file was cut off.
    fn past_end(&mut self, start: u64, length: u64, host: u64, extent: &Extent) {
        let granularity = self.facts.layers[extent.depth as usize].granularity;
        let in_last = (host.next_multiple_of(granularity) - host).min(length);
        self.placeholder(start, in_last);
        let lost = length - in_last;
        if lost / granularity == 0 {
            return self.placeholder(start + in_last, lost);
        }
        let count = lost / granularity;
        self.block(ObstacleKind::PastFileEnd, extent.depth, start + in_last, count);
        if self.facts.options.on_error == OnError::ErrorTarget {
            self.piece(Piece { start: start + in_last, length: lost, kind: PieceKind::Error });
        } else {
            self.placeholder(start + in_last, lost);
        }
    }

    fn linear(&mut self, start: u64, length: u64, backing: BackingId, offset: u64) {
        if length > 0 {
            self.piece(Piece { start, length, kind: PieceKind::Linear { backing, offset } });
        }
    }

    /// A piece of the scratch file, where it lies at the guest's own offset: so neither
    /// its place nor its neighbours depend on what else is there.
    fn scratch(&mut self, start: u64, length: u64, layer: u32, what: ScratchContent) {
        let guest = GuestOffset::new(start);
        (self.job)(ScratchJob { at: start, length, guest, layer, what });
        self.linear(start, length, self.facts.scratch_backing, start);
    }

    fn block(&mut self, kind: ObstacleKind, depth: u32, first: u64, count: u64) {
        let backing = self.facts.file(depth, FileRole::Image).backing;
        let first = GuestOffset::new(first);
        // Neighbours in one window count as one entry, or a whole image of compressed
        // clusters would make a list as long.
        match self.noted.blocked.last_mut() {
            Some(last) if last.kind == kind && last.backing == backing => last.count += count,
            _ => self.noted.blocked.push(Blocked { kind, backing, count, first }),
        }
    }

    /// What can't be mapped has no segment of its own; zeros keep the table gapless.
    fn placeholder(&mut self, start: u64, length: u64) {
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file: None } });
    }

    /// Takes the next piece, rounded to whole sectors: where a file ends inside one, data
    /// and zeros share it, and the first of them has it.
    fn piece(&mut self, mut next: Piece) {
        let end = (next.start + next.length).next_multiple_of(SECTOR_SIZE);
        let start = next.start.next_multiple_of(SECTOR_SIZE);
        if start >= end {
            return;
        }
        next.start = start;
        next.length = end - start;
        self.whole_piece(next);
    }

    #[inline(always)]
    fn whole_piece(&mut self, next: Piece) {
        if let Some(pending) = &mut self.pending {
            if pending.absorb_through_hole(&next, self.facts) {
                return;
            }
            (self.emit)(pending);
        }
        self.pending = Some(next);
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    bytes / SECTOR_SIZE * SECTOR_SIZE
}
