//! Batches of work, taken one after the other.

use super::super::cut::{Cut, CutKind, Cutter};
use super::super::reflink::{Offload, Offloads};
use super::super::{InputPlace, Piece};
use super::{CopyOptions, Layout};
use crate::error::Result;
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Parts of a batch at most.
const MAX_UNITS: usize = 512;
/// Cuts of a batch that are left to the backing file, at most: between batches the work can be
/// stopped.
const MAX_LEFT_OUT: usize = 4096;
/// Bytes that are cloned in one batch.
const CLONED: u64 = 8 << 30;

/// A part of the disk with one thing to be done.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    pub(super) range: GuestRange,
    pub(super) work: Work,
    /// First byte past what comes behind and is likely data too.
    pub(super) run_end: GuestOffset,
}

impl Unit {
    /// What of it comes from `start` on.
    pub(super) fn from(self, start: GuestOffset) -> Self {
        let distance = start.since(self.range.start);
        let work = match self.work {
            Work::Copy(Some(place)) => Work::Copy(Some(place.advanced(distance))),
            other => other,
        };
        Self { range: GuestRange::new(start, self.range.end), work, ..self }
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// To tell the writer of zeros.
    Zeros,
    /// To write zeros.
    WriteZeros,
    /// To read and write; from this place on, where the bytes lie in a file as they are.
    Copy(Option<InputPlace>),
    /// To read a granule as the output's disk has it, and write all of it or nothing.
    Granule,
    /// To have the file system do it.
    Offload(InputPlace, Offload),
}

/// Some units in guest order; none where all that it goes by is left to the backing file.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) units: Vec<Unit>,
    /// Bytes that are to be in memory.
    pub(super) bytes: u64,
    /// Up to where the disk is done with this and all earlier batches.
    pub(super) end: GuestOffset,
}

type Pieces<'s> = Box<dyn Iterator<Item = Result<Piece>> + Send + 's>;

/// All the work there is.
pub(super) struct Batches<'s> {
    cutter: Cutter<Pieces<'s>>,
    layout: Layout,
    offloads: &'s Offloads,
    compresses: bool,
    rest: Option<Cut>,
    next: u64,
    /// Nothing comes after an error.
    ended: bool,
}

impl<'s> Batches<'s> {
    pub(super) fn new(
        cutter: Cutter<Pieces<'s>>,
        layout: Layout,
        options: &'s CopyOptions<'s>,
    ) -> Self {
        Self {
            cutter,
            layout,
            offloads: &options.offloads,
            compresses: options.compression.is_some(),
            rest: None,
            next: 0,
            ended: false,
        }
    }

    /// The next batch, in `batch`, whose memory is used again; false where there is none. An
    /// error is the batch's, and the last.
    pub(super) fn take(&mut self, batch: &mut Batch) -> Result<bool> {
        batch.units.clear();
        batch.bytes = 0;
        batch.number = self.next;
        if self.ended {
            return Ok(false);
        }
        self.next += 1;
        let mut cloned = 0;
        let mut left_out = 0;
        while batch.bytes < self.layout.batch
            && cloned < CLONED
            && batch.units.len() < MAX_UNITS
            && left_out < MAX_LEFT_OUT
        {
            let cut = match self.rest.take().map(Ok).or_else(|| self.cutter.next()) {
                Some(Ok(cut)) => cut,
                Some(Err(error)) => {
                    // What comes before it is copied all the same.
                    self.ended = true;
                    return Err(error);
                }
                None => {
                    self.ended = true;
                    break;
                }
            };
            let Some((unit, rest)) = self.unit(cut) else {
                left_out += 1;
                batch.end = cut.range.end;
                continue;
            };
            // What was begun is not cut anew in the middle of a chunk.
            if !matches!(unit.work, Work::Zeros | Work::Offload(..)) {
                let length = unit.range.length().get();
                if batch.bytes > 0 && batch.bytes + length > self.layout.batch {
                    self.rest = Some(cut);
                    break;
                }
                batch.bytes += length;
            }
            if matches!(unit.work, Work::Offload(..)) {
                cloned += unit.range.length().get();
            }
            batch.end = unit.range.end;
            batch.units.push(unit);
            self.rest = rest;
        }
        Ok(!self.ended || !batch.units.is_empty())
    }

    /// The first unit of a cut, and what is left of it; none where it is left to the backing
    /// file.
    fn unit(&self, cut: Cut) -> Option<(Unit, Option<Cut>)> {
        let run_end = cut.range.end;
        let unit = |range, work| Unit { range, work, run_end };
        let work = match cut.kind {
            CutKind::Backing => return None,
            CutKind::Zeros if !self.layout.writes_zeros => {
                return Some((unit(cut.range, Work::Zeros), None));
            }
            CutKind::Zeros => Work::WriteZeros,
            CutKind::Mixed => return Some((unit(cut.range, Work::Granule), None)),
            CutKind::Bytes(place) => {
                if let Some((end, offload)) = place.and_then(|place| self.offload(cut, place)) {
                    let (range, rest) = split(cut, end);
                    return Some(match (offload, place) {
                        (Some(offload), Some(place)) => {
                            (unit(range, Work::Offload(place, offload)), rest)
                        }
                        _ => (unit(range, Work::Copy(place)), rest),
                    });
                }
                Work::Copy(place)
            }
        };
        let next = (cut.range.start.get() / self.layout.batch).saturating_add(1);
        let end = GuestOffset::new(next.saturating_mul(self.layout.batch)).min(cut.range.end);
        let (range, rest) = split(cut, end);
        Some((unit(range, work), rest))
    }

    /// Up to where the file system does the work, or up to where it has to be done before the
    /// file system can.
    fn offload(&self, cut: Cut, place: InputPlace) -> Option<(GuestOffset, Option<Offload>)> {
        let offload = self.offloads.of(place.file)?;
        if self.compresses {
            return None;
        }
        let alignment = offload.alignment();
        let (start, end) = (cut.range.start.get(), cut.range.end.get());
        if start % alignment != place.offset.get() % alignment {
            return None;
        }
        // The writer takes whole granules, the file system whole blocks.
        let step = alignment.max(self.layout.granularity);
        let first = start.next_multiple_of(step);
        let last = end / step * step;
        if first >= last {
            return None;
        }
        if first > start {
            return Some((GuestOffset::new(first), None));
        }
        Some((GuestOffset::new(last), Some(offload)))
    }
}

/// What of a cut lies before `end`, and the rest.
fn split(cut: Cut, end: GuestOffset) -> (GuestRange, Option<Cut>) {
    let range = GuestRange::new(cut.range.start, end);
    if end >= cut.range.end {
        return (cut.range, None);
    }
    let distance: ByteLen = end.since(cut.range.start);
    let kind = match cut.kind {
        CutKind::Bytes(place) => CutKind::Bytes(place.map(|place| place.advanced(distance))),
        other => other,
    };
    (range, Some(Cut { range: GuestRange::new(end, cut.range.end), kind }))
}
