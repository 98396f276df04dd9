//! Whether what stands on the device is what its content says.

use super::{Finding, FindingKind, Verification};
use crate::device::above::{block, has_lines, line};
use crate::device::list::Attached;
use crate::device::name::DeviceRole;
use crate::device::{DeviceDisk, Kernel};
use crate::error::{Result, printable};
use crate::partition;

/// Compares the partitions that are there with those of the table on the device.
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
    let read = DeviceDisk::open(kernel, attached.number).and_then(|mut d| partition::read(&mut d));
    let table = match read {
        Ok(table) => table,
        Err(error) => {
            let what = format!("the partition table can't be read: {error}");
            found.add(Finding::new(FindingKind::Unreadable, what));
            return Ok(());
        }
    };
    let partitions = table.map(|table| table.partitions).unwrap_or_default();
    let block = block(kernel, attached.number)?;
    for above in &attached.above {
        let DeviceRole::Partition(number) = above.role else { continue };
        let name = printable(&above.info.name);
        if !above.info.read_only {
            let what = format!("the live table of '{name}' is not read-only");
            found.add(Finding::new(FindingKind::Writable, what));
        }
        if above.info.deferred_remove {
            found.note(format!("'{name}' is marked for removal at its last close"));
        }
        let wanted = partitions.iter().find(|partition| partition.number == number);
        let wanted = wanted.and_then(|partition| line(partition, attached.number, block));
        let what = match wanted {
            None => format!("'{name}' is there, but the disk has no partition {number}"),
            Some(line) if !has_lines(kernel, &above.info.uuid, std::slice::from_ref(&line))? => {
                format!("'{name}' is not what the partition table says of partition {number}")
            }
            Some(_) => continue,
        };
        found.add(Finding::new(FindingKind::Partition, what));
    }
    Ok(())
}
