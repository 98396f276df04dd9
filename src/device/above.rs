//! What is built on top of an attachment's device: its partitions, and logical volumes.
//!
//! The tables are read from the device itself, so as the kernel serves them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use super::compare::describe;
use super::disk::DeviceDisk;
use super::name::{DeviceRole, DmName, DmUuid};
use super::volumes::{self, Ground};
use super::{Access, DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::lvm;
use crate::partition::{self, Disk, Partition, PartitionTable, TableKind, TableWarning, Unusable};
use crate::signature::{self, Signature};
use crate::table::{DeviceRef, TableLine, Target};
use crate::units::{GuestOffset, GuestRange, SECTOR_SIZE, Sectors};

/// Sectors of an extended partition's device, as the kernel and kpartx have it: room for a
/// boot loader, and nothing of the logical partitions inside. Never less than a block.
const EXTENDED_SECTORS: u64 = 2;

/// Which partitions are asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Partitions {
    /// None.
    #[default]
    None,
    /// All that can be had; where there are none, that is no error.
    All,
    /// Those of these numbers, each of which has to be there.
    Only(BTreeSet<u32>),
}

/// What is asked for on top of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Above {
    /// Partitions.
    pub partitions: Partitions,
    /// Logical volumes of the guest's LVM, each as `VG/LV`.
    pub logical_volumes: Vec<String>,
}

impl Above {
    /// True where nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.partitions.is_empty() && self.logical_volumes.is_empty()
    }

    /// Whether what is asked for by number or name is on a disk: for a look at the image
    /// before work that takes long.
    ///
    /// # Errors
    /// It is not there, or can't be had; what reading the disk says.
    pub fn check(&self, disk: &mut dyn Disk) -> Result<()> {
        let has_numbers = matches!(self.partitions, Partitions::Only(_));
        if !has_numbers && self.logical_volumes.is_empty() {
            return Ok(());
        }
        let table = partition::read(disk)?;
        if has_numbers {
            look(disk, table.as_ref(), &self.partitions)?;
        }
        volumes::check(disk, table.as_ref(), &self.logical_volumes)
    }
}

impl Partitions {
    /// True where none is asked for.
    fn is_empty(&self) -> bool {
        match self {
            Self::None => true,
            Self::All => false,
            Self::Only(numbers) => numbers.is_empty(),
        }
    }
}

/// A device that stands on an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedAbove {
    /// What it is.
    pub role: DeviceRole,
    /// /dev/mapper/NAME of it.
    pub path: PathBuf,
    /// Its size.
    pub size: Sectors,
    /// Its name, numbers and UUID, and how many have it open.
    pub info: DeviceInfo,
}

impl AttachedAbove {
    /// From what the kernel says of a device.
    pub(super) fn of<K: Kernel>(kernel: &K, role: DeviceRole, info: DeviceInfo) -> Self {
        let size = kernel.block_device(info.number).map_or(Sectors::default(), |(size, _)| size);
        let path = PathBuf::from("/dev/mapper").join(&info.name);
        Self { role, path, size, info }
    }
}

/// What is not as it was asked for, or not as it should be, and no error.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AboveWarning {
    /// The partition table can be read all the same.
    Table(TableWarning),
    /// The partition of this number is passed over.
    PassedOver(u32, Unusable),
    /// The partition of this number is passed over: it is not of whole logical blocks.
    Unaligned(u32),
    /// The table, of this kind, has no partition.
    NoPartitions(TableKind),
    /// There is no partition table on the disk. What lies there instead.
    NoTable(Option<Signature>),
    /// Whether there is a partition table can't be read, for this reason.
    TableUnknown(String),
    /// LVM's metadata can be read all the same.
    Lvm(lvm::Warning),
}

/// Only over a block device without a loop device between: loops have blocks of 512 bytes.
const UNALIGNED: &str =
    "it is not of whole blocks of the block device below: do without --direct-block";

impl fmt::Display for AboveWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(warning) => warning.fmt(f),
            Self::Lvm(warning) => warning.fmt(f),
            Self::PassedOver(number, why) => {
                write!(f, "partition {number} is passed over: {why}")
            }
            Self::Unaligned(number) => {
                write!(f, "partition {number} is passed over: {UNALIGNED}")
            }
            Self::TableUnknown(why) => {
                write!(f, "the partition table can't be read: {why}")
            }
            Self::NoPartitions(kind) => {
                write!(f, "the partition table ({kind}) has no partition")
            }
            Self::NoTable(signature) => {
                write!(f, "there is no partition table on the disk")?;
                match signature {
                    Some(signature) => write!(f, ": {} lies on the whole of it", signature.kind),
                    None => Ok(()),
                }
            }
        }
    }
}

/// A device to be on top.
pub(super) struct WantedAbove {
    pub(super) name: DmName,
    pub(super) uuid: DmUuid,
    /// Its table.
    pub(super) lines: Vec<TableLine>,
}

/// The devices that `above` asks for on the top device of these numbers, by what its
/// content says.
///
/// # Errors
/// The device can't be read; a partition that was asked for by its number is not there or
/// can't be had.
pub(super) fn wanted<K: Kernel>(
    kernel: &K,
    above: &Above,
    (name, top): (&DmName, &DmUuid),
    number: DeviceNumber,
    interrupt: Interrupt<'_>,
) -> Result<(Vec<WantedAbove>, Vec<AboveWarning>)> {
    if above.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let mut disk = DeviceDisk::open(kernel, number)?.interrupted_by(interrupt);
    let at_disk = |error: Error| error.at_path(PathBuf::from("/dev/mapper").join(name.as_str()));
    let table = match partition::read(&mut disk) {
        // All that can be had is none, and the disk is there all the same.
        Err(error)
            if above.partitions == Partitions::All
                && above.logical_volumes.is_empty()
                && !error.is_interruption() =>
        {
            let warning = AboveWarning::TableUnknown(error.without_path());
            return Ok((Vec::new(), vec![warning]));
        }
        table => table.map_err(at_disk)?,
    };
    let (chosen, mut warnings) = look(&mut disk, table.as_ref(), &above.partitions)?;
    let block = block(kernel, number)?;
    let mut devices = Vec::new();
    for partition in chosen {
        if let Some(line) = line(partition, number, block) {
            let uuid = top.with_role(DeviceRole::Partition(partition.number));
            let name = name.partition(partition.number);
            devices.push(WantedAbove { name, uuid, lines: vec![line] });
        } else if above.partitions == Partitions::All {
            warnings.push(AboveWarning::Unaligned(partition.number));
        } else {
            let message = format!("partition {} can't be attached: {UNALIGNED}", partition.number);
            return Err(Error::new(ErrorKind::NotRepresentable(message)));
        }
    }
    if !above.logical_volumes.is_empty() {
        let lvm = volumes::read(&mut disk, table.as_ref()).map_err(at_disk)?;
        warnings.extend(lvm.warnings.iter().cloned().map(AboveWarning::Lvm));
        let ground = Ground { number, block };
        devices.extend(volumes::wanted(&lvm, &above.logical_volumes, (name, top), ground)?);
    }
    Ok((devices, warnings))
}

/// Sectors of a logical block of a device.
pub(super) fn block<K: Kernel>(kernel: &K, number: DeviceNumber) -> Result<u64> {
    Ok((u64::from(kernel.block_device(number)?.1) / SECTOR_SIZE).max(1))
}

/// The partitions of a disk that are asked for. `table` is the disk's.
fn look<'t>(
    disk: &mut dyn Disk,
    table: Option<&'t PartitionTable>,
    asked: &Partitions,
) -> Result<(Vec<&'t Partition>, Vec<AboveWarning>)> {
    let Some(table) = table else {
        if asked.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let whole = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk.size().get()));
        let content = match signature::probe(disk, whole) {
            Err(error) if error.is_interruption() => return Err(error),
            content => content.unwrap_or_default(),
        };
        let warning = AboveWarning::NoTable(content);
        return match asked {
            Partitions::All => Ok((Vec::new(), vec![warning])),
            _ => Err(Error::new(ErrorKind::PartitionNotFound(warning.to_string()))),
        };
    };
    let mut warnings = table.warnings.iter().copied().map(AboveWarning::Table).collect();
    let chosen = choose(table, asked, &mut warnings)?;
    Ok((chosen, warnings))
}

/// The partitions of `table` that are asked for.
fn choose<'t>(
    table: &'t PartitionTable,
    asked: &Partitions,
    warnings: &mut Vec<AboveWarning>,
) -> Result<Vec<&'t Partition>> {
    let all = &table.partitions;
    match asked {
        Partitions::None => Ok(Vec::new()),
        Partitions::All => {
            if all.is_empty() {
                warnings.push(AboveWarning::NoPartitions(table.kind));
            }
            let passed_over = all.iter().filter_map(|partition| {
                Some(AboveWarning::PassedOver(partition.number, partition.unusable?))
            });
            warnings.extend(passed_over);
            Ok(all.iter().filter(|partition| partition.unusable.is_none()).collect())
        }
        Partitions::Only(numbers) => {
            numbers.iter().map(|&number| choose_one(table, number)).collect()
        }
    }
}

fn choose_one(table: &PartitionTable, number: u32) -> Result<&Partition> {
    let Some(found) = table.partitions.iter().find(|partition| partition.number == number) else {
        let numbers = table.partitions.iter().map(|p| p.number.to_string()).collect::<Vec<_>>();
        let there = match &numbers[..] {
            [] => "no partition".to_owned(),
            [one] => format!("only partition {one}"),
            [several @ .., last] => format!("partitions {} and {last}", several.join(", ")),
        };
        return Err(Error::new(ErrorKind::PartitionNotFound(format!(
            "there is no partition {number}: the {} table has {there}{}",
            table.kind,
            table.unreadable().map(|warning| format!("; {warning}")).unwrap_or_default()
        ))));
    };
    match found.unusable {
        None => Ok(found),
        Some(why) => Err(Error::new(ErrorKind::InvalidImage(format!(
            "partition {number} can't be attached: {why}"
        )))),
    }
}

/// The table of a partition on the disk of these numbers; none where it is not of whole
/// blocks, of `block` sectors. Its range is of whole sectors.
pub(super) fn line(partition: &Partition, disk: DeviceNumber, block: u64) -> Option<TableLine> {
    let mut length = partition.range.length().get() / SECTOR_SIZE;
    if partition.is_extended {
        length = length.min(EXTENDED_SECTORS.max(block));
    }
    let offset = partition.range.start.get() / SECTOR_SIZE;
    if length == 0 || !(offset | length).is_multiple_of(block) {
        return None;
    }
    let device = DeviceRef::from_numbers(disk.major, disk.minor);
    let target = Target::Linear { device, offset: Sectors::new(offset) };
    Some(TableLine { start: Sectors::new(0), length: Sectors::new(length), target })
}

/// The device that stands for `wanted` already; none where there is none.
///
/// # Errors
/// It has another table than it would get now, or its name is taken by something else.
pub(super) fn existing<K: Kernel>(
    kernel: &K,
    wanted: &WantedAbove,
    access: Access,
) -> Result<Option<DeviceInfo>> {
    let uuid = wanted.uuid.to_string();
    let refuse = |message: String| Err(Error::new(ErrorKind::CannotCreate(message)));
    if let Some(there) = kernel.device(DeviceId::Uuid(&uuid))? {
        let is_same = there.has_live_table
            && there.access() == access
            && has_lines(kernel, &uuid, &wanted.lines)?;
        if is_same {
            return Ok(Some(there));
        }
        return refuse(format!(
            "the device '{}' is there already, but not with the {} table that it would get now: detach first",
            printable(&there.name),
            match access {
                Access::ReadOnly => "read-only",
                Access::Writable => "writable",
            }
        ));
    }
    match kernel.device(DeviceId::Name(wanted.name.as_str()))? {
        None => Ok(None),
        Some(other) => refuse(format!(
            "the device name '{}' is taken by {}: choose another with --name",
            wanted.name,
            describe(kernel, &other)
        )),
    }
}

/// True where the live table of the device is of these lines.
pub(super) fn has_lines<K: Kernel>(kernel: &K, uuid: &str, lines: &[TableLine]) -> Result<bool> {
    let mut live = kernel.live_table(uuid)?;
    for line in lines {
        let same = live.next().is_some_and(|live| {
            (live.start, live.length) == (line.start.get(), line.length.get())
                && (live.kind.as_str(), live.parameters)
                    == (line.target.kind(), line.target.parameters())
        });
        if !same {
            return Ok(false);
        }
    }
    Ok(live.next().is_none())
}
