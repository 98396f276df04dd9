//! Whether what stands on the device is what its content says.

use super::{Finding, FindingKind, Verification};
use crate::device::above::{block, has_lines, line};
use crate::device::list::Attached;
use crate::device::name::DeviceRole;
use crate::device::volumes::{self, Ground};
use crate::device::{DeviceDisk, Kernel};
use crate::error::{Result, printable};
use crate::lvm::Lvm;
use crate::partition::{self, PartitionTable};
use crate::table::TableLine;

/// What the disk's content says now.
struct Content {
    table: Option<PartitionTable>,
    lvm: Lvm,
}

impl Content {
    fn read<K: Kernel>(kernel: &K, attached: &Attached) -> Result<Self> {
        let mut disk = DeviceDisk::open(kernel, attached.number)?;
        let table = partition::read(&mut disk)?;
        let has_volumes =
            attached.above.iter().any(|a| matches!(a.role, DeviceRole::LogicalVolume(_)));
        let lvm = match has_volumes {
            true => volumes::read(&mut disk, table.as_ref())?,
            false => Lvm::default(),
        };
        Ok(Self { table, lvm })
    }

    /// What of it can't be read, in words.
    fn unreadable(&self) -> Option<String> {
        let of_table = self.table.as_ref().and_then(PartitionTable::unreadable);
        let of_lvm = || self.lvm.unreadable().map(ToString::to_string);
        of_table.map(ToString::to_string).or_else(of_lvm)
    }

    /// The table that the device of a partition has to have.
    fn of_partition(&self, number: u32, ground: Ground) -> Option<Vec<TableLine>> {
        let mut partitions = self.table.iter().flat_map(|table| &table.partitions);
        let found = partitions.find(|partition| partition.number == number)?;
        Some(vec![line(found, ground.number, ground.block)?])
    }

    /// The table that the device of a logical volume has to have.
    fn of_volume(&self, role: DeviceRole, ground: Ground) -> Option<Vec<TableLine>> {
        let groups = self.lvm.groups.iter();
        let mut volumes =
            groups.flat_map(|group| group.logical_volumes.iter().map(move |one| (group, one)));
        let (group, volume) = volumes.find(|(group, one)| volumes::role(group, one) == role)?;
        volumes::lines(group, volume, ground).ok()
    }
}

/// Compares the devices that are there with what the partition table on the disk and the
/// metadata of its volume groups say.
///
/// # Errors
/// The kernel can't be asked.
pub(super) fn check<K: Kernel>(
    kernel: &K,
    attached: &Attached,
    found: &mut Verification,
) -> Result<()> {
    if attached.above.is_empty() {
        return Ok(());
    }
    let content = match Content::read(kernel, attached) {
        Ok(content) => content,
        Err(error) => {
            let what = format!("the partition table or LVM's metadata can't be read: {error}");
            found.add(Finding::new(FindingKind::Unreadable, what));
            return Ok(());
        }
    };
    let ground = Ground { number: attached.number, block: block(kernel, attached.number)? };
    for above in &attached.above {
        let name = printable(&above.info.name);
        let (kind, what, wanted) = match above.role {
            DeviceRole::Partition(number) => {
                let what = format!("partition {number}");
                (FindingKind::Partition, what, content.of_partition(number, ground))
            }
            DeviceRole::LogicalVolume(_) => {
                let what = "logical volume of that name".to_owned();
                (FindingKind::LogicalVolume, what, content.of_volume(above.role, ground))
            }
            DeviceRole::Top | DeviceRole::Inner(_) => continue,
        };
        if !above.info.read_only && attached.overlay.is_none() {
            let what = format!("the live table of '{name}' is not read-only");
            found.add(Finding::new(FindingKind::Writable, what));
        }
        if above.info.deferred_remove {
            found.note(format!("'{name}' is marked for removal at its last close"));
        }
        if let (None, Some(why)) = (&wanted, content.unreadable()) {
            let what = format!("'{name}' can't be compared: {why}");
            found.add(Finding::new(FindingKind::Unreadable, what));
            continue;
        }
        let what = match wanted {
            None => format!("'{name}' is there, but the disk has no {what}"),
            Some(lines) if !has_lines(kernel, &above.info.uuid, &lines)? => match kind {
                FindingKind::Partition => {
                    format!("'{name}' is not what the partition table says of {what}")
                }
                _ => format!("'{name}' is not what LVM's metadata says of it"),
            },
            Some(_) => continue,
        };
        found.add(Finding::new(kind, what));
    }
    Ok(())
}
