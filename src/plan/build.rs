//! Extents to segments, one at a time: nothing here grows with their number.

use super::{BackingId, ObstacleKind, PlanOptions, Segment, SegmentTarget, ZeroMode};
use crate::chain::Chain;
use crate::error::{Error, Result};
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::status::{FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, HostOffset, SECTOR_SIZE, Sectors};

/// What stands in the way of one guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) kind: ObstacleKind,
    pub(super) backing: BackingId,
    pub(super) count: u64,
    pub(super) first: GuestOffset,
}

/// What becomes of the segments and obstacles.
pub(super) trait Sink {
    fn segment(&mut self, segment: Segment) -> Result<()>;
    fn blocked(&mut self, blocked: Blocked);
}

/// What the builder needs to know of one file.
#[derive(Clone, Copy, Debug)]
struct FileFacts {
    backing: BackingId,
    length: u64,
}

/// What the builder needs to know of one layer.
#[derive(Clone, Copy, Debug)]
struct LayerFacts {
    image: FileFacts,
    data_file: FileFacts,
    granularity: u64,
}

/// A stretch of the device that one segment can serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stretch {
    Linear {
        backing: BackingId,
        offset: u64,
    },
    /// Zeros, and where in a file the same zeros could be read, if anywhere.
    Zero {
        same_in_file: Option<(BackingId, u64)>,
    },
}

/// Turns extents into segments.
pub(super) struct Builder<'s, S> {
    layers: Vec<LayerFacts>,
    options: PlanOptions,
    zero_backing: BackingId,
    /// Where the table's sector 0 lies on the virtual disk.
    origin: GuestOffset,
    pending: Option<(GuestOffset, ByteLen, Stretch)>,
    sink: &'s mut S,
}

/// The files of a chain in the order of their backing ids.
pub(super) fn chain_files(chain: &Chain) -> impl Iterator<Item = (u32, FileRole)> {
    let layers = chain.layers().iter().zip(0u32..);
    layers.flat_map(|(layer, depth)| layer.files().map(move |(role, _)| (depth, role)))
}

impl<'s, S: Sink> Builder<'s, S> {
    pub(super) fn new(
        chain: &Chain,
        options: PlanOptions,
        zero_backing: BackingId,
        origin: GuestOffset,
        sink: &'s mut S,
    ) -> Self {
        let mut ids = (0..).map(BackingId);
        let mut facts = |length: ByteLen| FileFacts {
            backing: ids.next().unwrap_or(BackingId(u32::MAX)),
            length: length.get(),
        };
        let layers = chain
            .layers()
            .iter()
            .map(|layer| {
                let image = facts(layer.source.length());
                let data_file = layer.data_file.as_ref().map_or(image, |file| facts(file.length()));
                LayerFacts { image, data_file, granularity: layer.image.granularity() }
            })
            .collect();
        Self { layers, options, zero_backing, origin, pending: None, sink }
    }

    fn file(&self, depth: u32, role: FileRole) -> FileFacts {
        let layer = &self.layers[depth as usize];
        match role {
            FileRole::Image => layer.image,
            FileRole::DataFile => layer.data_file,
        }
    }

    /// Takes the next extent.
    pub(super) fn push(&mut self, extent: &Extent) -> Result<()> {
        let Extent { start, length, depth, mapping } = *extent;
        match mapping {
            Mapping::Data(place) => self.data(start, length, depth, place),
            Mapping::Zero(cause) => {
                if let ZeroCause::Layer(ZeroStatus::DataPastFileEnd(place)) = cause {
                    let file = self.file(depth, place.file);
                    self.check_past_end(start, length.get(), depth, file);
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
                    let file = self.file(depth, place.file);
                    let end = place.offset.get().checked_add(length.get())?;
                    (end <= file.length / SECTOR_SIZE * SECTOR_SIZE)
                        .then_some((file.backing, place.offset.get()))
                });
                self.stretch(start, length, Stretch::Zero { same_in_file })
            }
            Mapping::Compressed { .. } => {
                self.block(ObstacleKind::Compressed, depth, start, 1);
                self.placeholder(start, length)
            }
            Mapping::Encrypted { .. } => {
                let count = length.get().div_ceil(self.layers[depth as usize].granularity);
                self.block(ObstacleKind::Encrypted, depth, start, count);
                self.placeholder(start, length)
            }
        }
    }

    /// What can't be mapped has no segment of its own yet; zeros keep the table gapless.
    fn placeholder(&mut self, start: GuestOffset, length: ByteLen) -> Result<()> {
        self.stretch(start, length, Stretch::Zero { same_in_file: None })
    }

    fn block(&mut self, kind: ObstacleKind, depth: u32, first: GuestOffset, count: u64) {
        let backing = self.file(depth, FileRole::Image).backing;
        self.sink.blocked(Blocked { kind, backing, count, first });
    }

    fn data(
        &mut self,
        start: GuestOffset,
        length: ByteLen,
        depth: u32,
        place: HostPlace,
    ) -> Result<()> {
        let file = self.file(depth, place.file);
        let host = place.offset.get();
        let misaligned = |offset: u64| !offset.is_multiple_of(SECTOR_SIZE);
        if misaligned(start.get()) || misaligned(host) {
            self.sink.blocked(Blocked {
                kind: ObstacleKind::Unaligned,
                backing: file.backing,
                count: 1,
                first: start,
            });
            return self.placeholder(start, length);
        }
        // A loop device ends with the last whole sector of its file.
        let whole = file.length / SECTOR_SIZE * SECTOR_SIZE;
        let mut at = 0;
        let mapped = whole.saturating_sub(host).min(length.get()) / SECTOR_SIZE * SECTOR_SIZE;
        if mapped > 0 {
            let linear = Stretch::Linear { backing: file.backing, offset: host };
            self.stretch(start, ByteLen::new(mapped), linear)?;
            at = mapped;
        }
        if at < length.get() && host + at < file.length {
            let sector = SECTOR_SIZE.min(length.get() - at);
            let first = start.saturating_add(ByteLen::new(at));
            self.sink.blocked(Blocked {
                kind: ObstacleKind::PartialSector,
                backing: file.backing,
                count: 1,
                first,
            });
            self.placeholder(first, ByteLen::new(sector))?;
            at += sector;
        }
        if at < length.get() {
            let first = start.saturating_add(ByteLen::new(at));
            let rest = length.get() - at;
            self.check_past_end(first, rest, depth, file);
            self.placeholder(first, ByteLen::new(rest))?;
        }
        Ok(())
    }

    /// A file may end inside its last cluster; a whole cluster past the end means that
    /// the file was cut off.
    fn check_past_end(&mut self, first: GuestOffset, bytes: u64, depth: u32, file: FileFacts) {
        let granularity = self.layers[depth as usize].granularity;
        let count = bytes / granularity;
        if count > 0 {
            self.sink.blocked(Blocked {
                kind: ObstacleKind::PastFileEnd,
                backing: file.backing,
                count,
                first,
            });
        }
    }

    fn stretch(&mut self, start: GuestOffset, length: ByteLen, next: Stretch) -> Result<()> {
        let Some((at, so_far, stretch)) = self.pending else {
            self.pending = Some((start, length, next));
            return Ok(());
        };
        let joined = ByteLen::new(so_far.get().saturating_add(length.get()));
        if let Some(stretch) = self.join(so_far, stretch, length, next) {
            self.pending = Some((at, joined, stretch));
            return Ok(());
        }
        self.emit(at, so_far, stretch)?;
        self.pending = Some((start, length, next));
        Ok(())
    }

    /// One stretch that serves both, where there is one.
    fn join(
        &self,
        length: ByteLen,
        stretch: Stretch,
        next_length: ByteLen,
        next: Stretch,
    ) -> Option<Stretch> {
        let length_of_both = length;
        let follows = |(backing, offset): (BackingId, u64), (b, o): (BackingId, u64)| {
            backing == b && offset.checked_add(length_of_both.get()) == Some(o)
        };
        let runs_through =
            |hole: ByteLen| self.options.zero == ZeroMode::Auto && self.is_short(hole);
        match (stretch, next) {
            (Stretch::Linear { backing, offset }, Stretch::Linear { backing: b, offset: o }) => {
                follows((backing, offset), (b, o)).then_some(stretch)
            }
            (Stretch::Zero { same_in_file: a }, Stretch::Zero { same_in_file: b }) => {
                let same_in_file = match (a, b) {
                    (Some(a), Some(b)) if follows(a, b) => Some(a),
                    _ => None,
                };
                Some(Stretch::Zero { same_in_file })
            }
            // A hole between data of one file: the linear can run on through it.
            (Stretch::Linear { backing, offset }, Stretch::Zero { same_in_file: Some(hole) }) => {
                (runs_through(next_length) && follows((backing, offset), hole)).then_some(stretch)
            }
            (Stretch::Zero { same_in_file: Some(hole) }, Stretch::Linear { backing, offset }) => {
                (runs_through(length) && follows(hole, (backing, offset)))
                    .then_some(Stretch::Linear { backing: hole.0, offset: hole.1 })
            }
            _ => None,
        }
    }

    fn is_short(&self, zeros: ByteLen) -> bool {
        zeros < self.options.zero_threshold
    }

    fn emit(&mut self, start: GuestOffset, length: ByteLen, stretch: Stretch) -> Result<()> {
        let sectors = |bytes: u64| {
            Sectors::from_bytes(bytes).ok_or_else(|| {
                Error::invalid(format!("guest offset {start} is no multiple of a sector"))
            })
        };
        let target = match stretch {
            Stretch::Linear { backing, offset } => {
                SegmentTarget::Linear { backing, offset: sectors(HostOffset::new(offset).get())? }
            }
            Stretch::Zero { .. } => {
                let by_loop = match self.options.zero {
                    ZeroMode::Auto => self.is_short(length),
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
        let start = sectors(start.since(self.origin).get())?;
        self.sink.segment(Segment { start, length: sectors(length.get())?, target })
    }

    /// Emits the last segment.
    pub(super) fn finish(&mut self) -> Result<()> {
        match self.pending.take() {
            Some((start, length, stretch)) => self.emit(start, length, stretch),
            None => Ok(()),
        }
    }
}
