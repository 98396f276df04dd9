//! Waiting for what the kernel takes down by itself.
//!
//! After the last close of a device that is marked for removal, as by `umount`, the kernel
//! removes it, the devices inside, and lets loop devices go of their files, in its own time.

use super::list::list;
use super::name::{DeviceRole, DmUuid};
use super::stacked::with_holders;
use super::{DeviceId, DeviceNumber, Interrupt, Kernel, PATIENCE, loop_node};
use crate::error::{Error, ErrorKind, Result, printable};

/// Waits until nothing is on its way out any more: no device or loop device of an attachment
/// whose disk is gone, and the disk `target` neither, where it is marked for removal.
///
/// # Errors
/// [`ErrorKind::InUse`], naming what is still there after [`PATIENCE`], and who holds it.
pub fn wait_until_gone<K: Kernel>(
    kernel: &K,
    target: Option<&DmUuid>,
    interrupt: &Interrupt<'_>,
) -> Result<()> {
    let mut looked = Ok(Vec::new());
    // As long as there is less of it every time: full tables take the kernel a while.
    let mut before = usize::MAX;
    loop {
        kernel.wait(PATIENCE, &mut || {
            looked = interrupt.check().and_then(|()| going(kernel, target, interrupt));
            looked.as_ref().map_or(true, |going| going.is_empty() || going.len() < before)
        });
        match &looked {
            Ok(going) if !going.is_empty() && going.len() < before => before = going.len(),
            _ => break,
        }
    }
    let left: Vec<_> = looked?
        .into_iter()
        .map(|Going { what, number }| with_holders(what, &kernel.holders(number)))
        .collect();
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InUse(format!(
        "this is still there after {} s: {}",
        PATIENCE.as_secs(),
        left.join(", ")
    ))))
}

/// A device on its way out.
struct Going {
    what: String,
    number: DeviceNumber,
}

fn going<K: Kernel>(
    kernel: &K,
    target: Option<&DmUuid>,
    interrupt: &Interrupt<'_>,
) -> Result<Vec<Going>> {
    // Under the lock nothing is half built: what has no disk is going.
    let _lock = kernel.lock(interrupt)?;
    let mut found = Vec::new();
    let mut disks = Vec::new();
    let mut others = Vec::new();
    for device in kernel.devices()? {
        let Ok(uuid) = device.uuid.parse::<DmUuid>() else { continue };
        match uuid.role {
            DeviceRole::Top => disks.push((uuid, device)),
            _ => others.push((uuid, device)),
        }
    }
    let device =
        |name: &str, number| Going { what: format!("the device '{}'", printable(name)), number };
    for (uuid, info) in &others {
        if !disks.iter().any(|(disk, _)| disk.same_attachment(uuid)) {
            found.push(device(&info.name, info.number));
        }
    }
    for (uuid, info) in &disks {
        if target == Some(uuid) && info.deferred_remove {
            found.push(device(&info.name, info.number));
        }
    }
    let mut held = Vec::new();
    for attached in list(kernel)? {
        held.extend(attached.loops.iter().map(|each| each.number));
    }
    for (_, info) in &others {
        held.extend(kernel.dependencies(DeviceId::Number(info.number))?);
    }
    for number in kernel.loops()? {
        if !held.contains(&number) {
            found.push(Going { what: loop_node(number).display().to_string(), number });
        }
    }
    Ok(found)
}
