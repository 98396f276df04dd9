//! The guest's logical volumes, as devices that stand on the disk. Each lies straight on
//! the disk's device, wherever its physical volumes are, and LVM has no part in it.

use std::collections::BTreeSet;

use super::DeviceNumber;
use super::above::WantedAbove;
use super::name::{DeviceRole, DmName, DmUuid, volume_hash};
use crate::error::{Error, ErrorKind, Result};
use crate::lvm::{self, LogicalVolume, Lvm, Piece, PieceSource, VolumeGroup};
use crate::partition::{Disk, PartitionTable};
use crate::table::{DeviceRef, TableLine, Target};
use crate::units::{GuestOffset, SECTOR_SIZE, Sectors};

/// What a volume's device stands on.
#[derive(Clone, Copy)]
pub(super) struct Ground {
    /// The numbers of the disk's device.
    pub(super) number: DeviceNumber,
    /// Sectors of its logical blocks.
    pub(super) block: u64,
}

/// Reads what LVM has on a disk with this partition table.
///
/// # Errors
/// What reading says.
pub(super) fn read(disk: &mut dyn Disk, table: Option<&PartitionTable>) -> Result<Lvm> {
    let places = lvm::places(table, disk.size());
    lvm::read(disk, &places)
}

/// Whether these volumes, each named `VG/LV`, are on a disk with this partition table, and
/// can be put together.
///
/// # Errors
/// One of them is not, or can't; what reading says.
pub(super) fn check(
    disk: &mut dyn Disk,
    table: Option<&PartitionTable>,
    names: &[String],
) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    let lvm = read(disk, table)?;
    names.iter().try_for_each(|name| {
        let (group, volume) = lvm.find(name)?;
        group.pieces(volume).map(drop)
    })
}

/// The devices of these volumes, each named `VG/LV`, on the disk of that name and UUID.
///
/// # Errors
/// One of them is not there, or can't be put together; its name makes no device name, or
/// the same one as another's.
pub(super) fn wanted(
    lvm: &Lvm,
    names: &[String],
    (disk, top): (&DmName, &DmUuid),
    ground: Ground,
) -> Result<Vec<WantedAbove>> {
    let mut devices: Vec<WantedAbove> = Vec::new();
    for full_name in names.iter().collect::<BTreeSet<_>>() {
        let (group, volume) = lvm.find(full_name)?;
        let name = disk.logical_volume(&volume.name)?;
        if devices.iter().any(|other| other.name == name) {
            return Err(Error::new(ErrorKind::CannotCreate(format!(
                "two of the logical volumes are called '{}', and both would be '{name}': attach them one at a time, with --name",
                volume.name
            ))));
        }
        let uuid = top.with_role(role(group, volume));
        devices.push(WantedAbove { name, uuid, lines: lines(group, volume, ground)? });
    }
    Ok(devices)
}

/// The role of a volume's device.
pub(super) fn role(group: &VolumeGroup, volume: &LogicalVolume) -> DeviceRole {
    DeviceRole::LogicalVolume(volume_hash(&group.name, &volume.name))
}

/// The table of a volume's device.
///
/// # Errors
/// As [`VolumeGroup::pieces`]; or it is not of whole blocks of the disk.
pub(super) fn lines(
    group: &VolumeGroup,
    volume: &LogicalVolume,
    ground: Ground,
) -> Result<Vec<TableLine>> {
    let device = DeviceRef::from_numbers(ground.number.major, ground.number.minor);
    let mut lines = Vec::new();
    let mut start = 0u64;
    for Piece { length, source } in group.pieces(volume)? {
        let length = length.get() / SECTOR_SIZE;
        let sectors = |offset: GuestOffset| Sectors::new(offset.get() / SECTOR_SIZE);
        let (target, chunk, offsets) = match source {
            PieceSource::Linear(offset) => {
                let offset = sectors(offset);
                (Target::Linear { device: device.clone(), offset }, length, vec![offset])
            }
            PieceSource::Striped { chunk, stripes } => {
                let chunk = Sectors::new(chunk.get() / SECTOR_SIZE);
                let offsets: Vec<_> = stripes.into_iter().map(sectors).collect();
                let device = device.clone();
                let target = Target::Striped { chunk, device, offsets: offsets.clone() };
                (target, chunk.get(), offsets)
            }
        };
        let all = offsets.iter().fold(length | chunk, |all, offset| all | offset.get());
        if !all.is_multiple_of(ground.block) {
            return Err(Error::new(ErrorKind::NotRepresentable(format!(
                "logical volume {} is not of whole blocks of the block device below: do without --direct-block",
                group.full_name(volume)
            ))));
        }
        lines.push(TableLine { start: Sectors::new(start), length: Sectors::new(length), target });
        start = start.saturating_add(length);
    }
    Ok(lines)
}
