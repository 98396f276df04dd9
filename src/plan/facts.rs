//! What a plan needs to know of a chain, and the pieces that a chain is cut into.

use std::sync::Arc;

use super::{BackingId, PlanOptions, Segment, SegmentTarget, ZeroMode};
use crate::chain::Chain;
use crate::scratch::{Found, FoundKind, OnError};
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, SECTOR_SIZE, Sectors};

/// What the plan needs to know of one file.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileFacts {
    pub(super) backing: BackingId,
    pub(super) length: u64,
    /// Length of what a loop device shows of it: whole sectors.
    pub(super) shown: u64,
}

/// What the plan needs to know of one layer.
#[derive(Clone, Copy, Debug)]
pub(super) struct LayerFacts {
    pub(super) image: FileFacts,
    pub(super) data_file: FileFacts,
    pub(super) granularity: u64,
}

/// What the plan needs to know of a chain; shared by all threads.
///
/// Its backing ids are provisional, for all that there might be: the files by their real
/// ids, then the zeros, the scratch file, and for each file a crypt device over it.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) layers: Vec<LayerFacts>,
    pub(super) options: PlanOptions,
    pub(super) zero_backing: BackingId,
    pub(super) scratch_backing: BackingId,
    /// What inflating found, in guest order.
    pub(super) found: Arc<[Found]>,
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
    pub(super) fn file(&self, depth: u32, role: FileRole) -> FileFacts {
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

    pub(super) fn is_short(&self, zeros: u64) -> bool {
        zeros < self.options.zero_threshold.get()
    }

    /// The index of the backing of a piece that is one linear segment, as nearly all are.
    #[inline(always)]
    pub(super) fn only_linear(&self, piece: &Piece) -> Option<usize> {
        match piece.kind {
            PieceKind::Linear { backing, .. } if backing != self.scratch_backing => {
                Some(backing.0 as usize)
            }
            _ => None,
        }
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
    pub(super) length: u64,
    pub(super) kind: PieceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
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
    #[inline]
    pub(super) fn is_scratch(&self, facts: &Facts) -> bool {
        matches!(self.kind, PieceKind::Linear { backing, .. } if backing == facts.scratch_backing)
    }

    pub(super) fn is_zero(&self) -> bool {
        matches!(self.kind, PieceKind::Zero { .. })
    }

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
    pub(super) fn absorb_through_hole(&mut self, next: &Piece, facts: &Facts) -> bool {
        if self.absorb(next) {
            return true;
        }
        if facts.options.zero != ZeroMode::Auto {
            return false;
        }
        // The scratch file has the guest's own offsets, and holes where nothing is written.
        let scratch = facts.scratch_backing;
        let (place, hole_length, next_place) = match (self.kind, next.kind) {
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
