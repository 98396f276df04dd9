//! Which bytes of the disk a logical volume is made of.

use super::{GroupVolume, LogicalVolume, SegmentKind, VolumeGroup};
use crate::error::{Error, ErrorKind, Result};
use crate::lvm::group::Area;
use crate::units::{ByteLen, GuestOffset, GuestRange, SECTOR_SIZE};

/// A part of a logical volume that one device-mapper target can serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Bytes of it; the pieces before it say where it starts. A multiple of 512.
    pub length: ByteLen,
    /// Where these lie.
    pub source: PieceSource,
}

/// Where a piece lies on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PieceSource {
    /// In one go from here.
    Linear(GuestOffset),
    /// In chunks from each of these in turn.
    Striped {
        /// Bytes of a chunk, a multiple of 512.
        chunk: ByteLen,
        /// Where each stripe starts.
        stripes: Vec<GuestOffset>,
    },
}

impl VolumeGroup {
    /// Bytes of a logical volume; as many as fit where that is too much.
    pub fn size_of(&self, volume: &LogicalVolume) -> ByteLen {
        let extent = u64::from(self.extent_sectors) * SECTOR_SIZE;
        ByteLen::new(volume.extents.saturating_mul(extent))
    }

    /// Why a logical volume can't be put together here, in words; none where it can.
    pub fn obstacle(&self, volume: &LogicalVolume) -> Option<String> {
        self.pieces(volume).err().map(|error| error.kind().to_string())
    }

    /// The parts of a logical volume, in order.
    ///
    /// # Errors
    /// `NotRepresentable` for a segment type other than linear and striped, named;
    /// `NotFound` where a physical volume is on another disk, or was missing when LVM last
    /// wrote to the others, named; `InvalidImage` where the metadata points out of a
    /// physical volume.
    pub fn pieces(&self, volume: &LogicalVolume) -> Result<Vec<Piece>> {
        let mut pieces: Vec<Piece> = Vec::new();
        for segment in &volume.segments {
            let invalid = |what: &str| {
                let name = self.full_name(volume);
                Error::invalid(format!(
                    "logical volume {name}, segment at extent {}: {what}",
                    segment.start
                ))
            };
            let extent = u64::from(self.extent_sectors) * SECTOR_SIZE;
            let length = u64::from(segment.extents)
                .checked_mul(extent)
                .ok_or_else(|| invalid("it is longer than 2^64 bytes"))?;
            let place = |area: &Area, extents: u64| self.place_of(volume, *area, extents, &invalid);
            let source = match &segment.kind {
                SegmentKind::Linear(area) => {
                    PieceSource::Linear(place(area, segment.extents.into())?)
                }
                SegmentKind::Striped { chunk_sectors, areas } => {
                    let count = areas.len() as u64;
                    let chunk = u64::from(*chunk_sectors) * SECTOR_SIZE;
                    let stripe_extents = u64::from(segment.extents) / count;
                    let is_whole = u64::from(segment.extents).is_multiple_of(count)
                        && stripe_extents.saturating_mul(extent).is_multiple_of(chunk);
                    if !is_whole {
                        return Err(invalid("its stripes are no whole number of chunks"));
                    }
                    let stripes = areas.iter().map(|area| place(area, stripe_extents));
                    PieceSource::Striped {
                        chunk: ByteLen::new(chunk),
                        stripes: stripes.collect::<Result<_>>()?,
                    }
                }
                SegmentKind::Unsupported(kind) => {
                    return Err(Error::new(ErrorKind::NotRepresentable(format!(
                        "logical volume {} has a segment of type '{kind}': only linear and striped ones can be attached",
                        self.full_name(volume)
                    ))));
                }
            };
            push(&mut pieces, Piece { length: ByteLen::new(length), source });
        }
        if pieces.is_empty() {
            let name = self.full_name(volume);
            return Err(Error::invalid(format!("logical volume {name} has no segments")));
        }
        Ok(pieces)
    }

    /// `VG/LV`.
    pub fn full_name(&self, volume: &LogicalVolume) -> String {
        format!("{}/{}", self.name, volume.name)
    }

    /// Where an area of so many extents starts on the disk.
    fn place_of(
        &self,
        volume: &LogicalVolume,
        area: Area,
        extents: u64,
        invalid: &dyn Fn(&str) -> Error,
    ) -> Result<GuestOffset> {
        let found = self.physical_volumes.get(area.physical_volume);
        let found = found.ok_or_else(|| invalid("it is on no physical volume"))?;
        let place = self.usable_place(volume, found)?;
        let past = u64::from(area.extent) + extents;
        if past > found.extents.into() {
            return Err(invalid("it reaches past its physical volume's last extent"));
        }
        let at = |extent: u64| {
            let sector =
                extent.checked_mul(self.extent_sectors.into())?.checked_add(found.extents_start)?;
            place.start.checked_add(ByteLen::new(sector.checked_mul(SECTOR_SIZE)?))
        };
        match (at(area.extent.into()), at(past)) {
            (Some(start), Some(end)) if end <= place.end => Ok(start),
            _ => Err(invalid("it reaches past the end of the physical volume's partition")),
        }
    }

    /// Where a physical volume is, unless it can't be used.
    fn usable_place(&self, volume: &LogicalVolume, found: &GroupVolume) -> Result<GuestRange> {
        let GroupVolume { name, uuid, device, .. } = found;
        let was = device.as_ref().map(|device| format!(", once {device}")).unwrap_or_default();
        let trouble = match found.place {
            Some(place) if !found.was_missing => return Ok(place),
            Some(_) => "was missing when the others were last written to, so what is on it is old",
            None => "is not on this disk",
        };
        Err(Error::new(ErrorKind::NotFound(format!(
            "logical volume {} needs the physical volume {name} (UUID {uuid}{was}), which {trouble}",
            self.full_name(volume)
        ))))
    }
}

/// Adds a piece, or lengthens the last one where it goes on there.
fn push(pieces: &mut Vec<Piece>, piece: Piece) {
    if let (
        Some(Piece { length, source: PieceSource::Linear(start) }),
        Piece { length: more, source: PieceSource::Linear(next) },
    ) = (pieces.last_mut(), &piece)
        && start.checked_add(*length) == Some(*next)
        && let Some(sum) = length.checked_add(*more)
    {
        *length = sum;
        return;
    }
    pieces.push(piece);
}
