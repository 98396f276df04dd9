//! Extents to pieces to segments. Nothing here grows with their number.
//!
//! A window's extents become pieces by themselves, so that windows can be worked on side
//! by side; only pieces that plainly carry each other on are joined across windows. So
//! the segments come out the same in whichever order, and wherever a table starts.

use super::{BackingId, ObstacleKind, PlanOptions, Segment, SegmentTarget, ZeroMode};
use crate::chain::Chain;
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::status::{FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, SECTOR_SIZE, Sectors};

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
}

/// What the plan needs to know of one layer.
#[derive(Clone, Copy, Debug)]
struct LayerFacts {
    image: FileFacts,
    data_file: FileFacts,
    granularity: u64,
}

/// What the plan needs to know of a chain; shared by all threads.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    layers: Vec<LayerFacts>,
    options: PlanOptions,
    pub(super) zero_backing: BackingId,
}

/// The files of a chain in the order of their backing ids.
pub(super) fn chain_files(chain: &Chain) -> impl Iterator<Item = (u32, FileRole)> {
    let layers = chain.layers().iter().zip(0u32..);
    layers.flat_map(|(layer, depth)| layer.files().map(move |(role, _)| (depth, role)))
}

impl Facts {
    pub(super) fn new(chain: &Chain, options: PlanOptions) -> Self {
        let mut ids = (0..).map(BackingId);
        let mut next_id = || ids.next().unwrap_or(BackingId(u32::MAX));
        let layers = chain
            .layers()
            .iter()
            .map(|layer| {
                let mut facts =
                    |length: ByteLen| FileFacts { backing: next_id(), length: length.get() };
                let image = facts(layer.source.length());
                let data_file = layer.data_file.as_ref().map_or(image, |file| facts(file.length()));
                LayerFacts { image, data_file, granularity: layer.image.granularity() }
            })
            .collect();
        Self { layers, options, zero_backing: next_id() }
    }

    fn is_short(&self, zeros: u64) -> bool {
        zeros < self.options.zero_threshold.get()
    }

    /// The segment of a piece that can grow no more, in a table whose sector 0 lies at
    /// `origin` of the virtual disk.
    #[inline]
    pub(super) fn segment(&self, piece: &Piece, origin: GuestOffset) -> Segment {
        let target = match piece.kind {
            PieceKind::Linear { backing, offset } => {
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
        };
        // Pieces start and end on sectors: the cutter blocks what does not.
        Segment {
            start: Sectors::new((piece.start - origin.get()) / SECTOR_SIZE),
            length: Sectors::new(piece.length / SECTOR_SIZE),
            target,
        }
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
        let (place, hole_length, next_place) = match (self.kind, next.kind) {
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

/// Cuts one window's extents into pieces.
pub(super) struct Cutter<'a, F> {
    facts: &'a Facts,
    pending: Option<Piece>,
    emit: F,
    pub(super) blocked: Vec<Blocked>,
}

impl<'a, F: FnMut(&Piece)> Cutter<'a, F> {
    /// Gives the pieces of `extents`, all that a window has, to `emit`; returns what is
    /// blocked.
    pub(super) fn cut(facts: &'a Facts, extents: &[Extent], emit: F) -> Vec<Blocked> {
        let mut cutter = Self { facts, pending: None, emit, blocked: Vec::new() };
        for extent in extents {
            cutter.push(extent);
        }
        if let Some(last) = &cutter.pending {
            (cutter.emit)(last);
        }
        cutter.blocked
    }

    #[inline]
    fn file(&self, depth: u32, role: FileRole) -> FileFacts {
        let layer = &self.facts.layers[depth as usize];
        match role {
            FileRole::Image => layer.image,
            FileRole::DataFile => layer.data_file,
        }
    }

    #[inline]
    fn push(&mut self, extent: &Extent) {
        let (start, length) = (extent.start.get(), extent.length.get());
        match extent.mapping {
            Mapping::Data(place) => self.data(extent, place),
            Mapping::Zero(cause) => self.zeros(extent, cause),
            Mapping::Compressed { .. } => {
                self.block(ObstacleKind::Compressed, extent.depth, start, 1);
                self.placeholder(start, length);
            }
            Mapping::Encrypted { .. } => {
                let granularity = self.facts.layers[extent.depth as usize].granularity;
                self.block(
                    ObstacleKind::Encrypted,
                    extent.depth,
                    start,
                    length.div_ceil(granularity),
                );
                self.placeholder(start, length);
            }
        }
    }

    fn zeros(&mut self, extent: &Extent, cause: ZeroCause) {
        let (start, length) = (extent.start.get(), extent.length.get());
        if let ZeroCause::Layer(ZeroStatus::DataPastFileEnd(place)) = cause {
            let file = self.file(extent.depth, place.file);
            self.check_past_end(start, length, extent.depth, file);
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
            let file = self.file(extent.depth, place.file);
            let end = place.offset.get().checked_add(length)?;
            (end <= whole_sectors(file.length)).then_some((file.backing, place.offset.get()))
        });
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file } });
    }

    #[inline]
    fn data(&mut self, extent: &Extent, place: HostPlace) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let file = self.file(extent.depth, place.file);
        let host = place.offset.get();
        let whole = whole_sectors(file.length);
        let aligned = (start | host | length) % SECTOR_SIZE == 0;
        if aligned && host.checked_add(length).is_some_and(|end| end <= whole) {
            let kind = PieceKind::Linear { backing: file.backing, offset: host };
            self.piece(Piece { start, length, kind });
        } else {
            self.odd_data(extent, file, host, whole);
        }
    }

    /// Data that is not whole sectors inside of its file.
    fn odd_data(&mut self, extent: &Extent, file: FileFacts, host: u64, whole: u64) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let mut block = |kind, first| {
            let first = GuestOffset::new(first);
            self.blocked.push(Blocked { kind, backing: file.backing, count: 1, first });
        };
        if (start | host) % SECTOR_SIZE != 0 {
            block(ObstacleKind::Unaligned, start);
            return self.placeholder(start, length);
        }
        // A loop device ends with the last whole sector of its file.
        let mapped = whole_sectors(whole.saturating_sub(host).min(length));
        let mut at = mapped;
        let partial = at < length && host + at < file.length;
        if partial {
            block(ObstacleKind::PartialSector, start + at);
        }
        if mapped > 0 {
            let kind = PieceKind::Linear { backing: file.backing, offset: host };
            self.piece(Piece { start, length: mapped, kind });
        }
        if partial {
            // The data's last bytes and the zeros that fill their sector.
            let sector = SECTOR_SIZE.min(length - at);
            self.placeholder(start + at, sector);
            at += sector;
        }
        if at < length {
            self.check_past_end(start + at, length - at, extent.depth, file);
            self.placeholder(start + at, length - at);
        }
    }

    /// A file may end inside its last cluster; a whole cluster past the end means that
    /// the file was cut off.
    fn check_past_end(&mut self, first: u64, bytes: u64, depth: u32, file: FileFacts) {
        let count = bytes / self.facts.layers[depth as usize].granularity;
        if count > 0 {
            self.blocked.push(Blocked {
                kind: ObstacleKind::PastFileEnd,
                backing: file.backing,
                count,
                first: GuestOffset::new(first),
            });
        }
    }

    fn block(&mut self, kind: ObstacleKind, depth: u32, first: u64, count: u64) {
        let backing = self.file(depth, FileRole::Image).backing;
        let first = GuestOffset::new(first);
        // Neighbours in one window count as one entry, or a whole image of compressed
        // clusters would make a list as long.
        match self.blocked.last_mut() {
            Some(last) if last.kind == kind && last.backing == backing => last.count += count,
            _ => self.blocked.push(Blocked { kind, backing, count, first }),
        }
    }

    /// What can't be mapped has no segment of its own yet; zeros keep the table gapless.
    fn placeholder(&mut self, start: u64, length: u64) {
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file: None } });
    }

    /// Takes the next piece, rounded to whole sectors: where a file ends inside one, data
    /// and zeros share it, and the first of them has it.
    #[inline]
    fn piece(&mut self, mut next: Piece) {
        let end = (next.start + next.length).next_multiple_of(SECTOR_SIZE);
        let start = next.start.next_multiple_of(SECTOR_SIZE);
        if start >= end {
            return;
        }
        next.start = start;
        next.length = end - start;
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
