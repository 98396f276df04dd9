//! Taking an attachment down.
//!
//! Removing the top device is enough: the kernel takes the rest after it. What is done
//! here is to say beforehand who is in the way, and to wait until loop devices have let
//! go of their files and with them of the locks.

use std::path::Path;
use std::time::Duration;

use super::attach::sweep;
use super::compare::describe;
use super::list::{Attached, attached, list};
use super::stacked::with_holders;
use super::{
    DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel, LoopHandle, PATIENCE, loop_node,
};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::FileId;

/// How long somebody may have the device open before it counts as busy: udev and others
/// look at devices for a moment.
const BUSY_PATIENCE: Duration = Duration::from_millis(1500);

/// The attachment that an argument means: a NAME, or, with a `/` in it,
/// /dev/mapper/NAME, another path of the device, or the image. `id` is what is at that
/// path, if anything.
///
/// # Errors
/// [`ErrorKind::NotAttached`]; or an image that is attached several times, with their
/// names.
pub fn find<K: Kernel>(kernel: &K, argument: &Path, id: Option<FileId>) -> Result<Attached> {
    let mut all = list(kernel)?;
    let text = argument.to_string_lossy();
    let name = match text.strip_prefix("/dev/mapper/") {
        Some(name) => Some(name),
        None => (!text.contains('/')).then_some(&*text),
    };
    if let Some(name) = name
        && let Some(at) = all.iter().position(|attached| attached.name == name)
    {
        return Ok(all.swap_remove(at));
    }
    if !text.contains('/') {
        let message = match kernel.device(DeviceId::Name(&text))? {
            Some(other) if other.has_live_table || !other.uuid.starts_with("IMGDM-") => {
                format!("'{}' is {}, not an attachment", printable(&text), describe(kernel, &other))
            }
            _ => format!("nothing is attached under the name '{}'", printable(&text)),
        };
        return Err(Error::new(ErrorKind::NotAttached(message)));
    }
    let absolute = std::path::absolute(argument).unwrap_or_else(|_| argument.to_owned());
    let is_device = |attached: &Attached| {
        id.is_some_and(|id| id.inode == 0 && DeviceNumber::from_dev(id.device) == attached.number)
    };
    let is_image = |attached: &Attached| match (attached.active_loop(), id) {
        (Some(active), Some(id)) => active.info.file == id,
        // Unlinked since: by the path that the kernel remembers.
        (Some(active), None) => active.info.path.as_ref().is_some_and(|p| p.path == absolute),
        (None, Some(id)) => {
            id.inode == 0 && attached.block_devices.contains(&DeviceNumber::from_dev(id.device))
        }
        (None, None) => false,
    };
    all.retain(|attached| is_device(attached) || is_image(attached));
    match all.len() {
        0 => Err(Error::new(ErrorKind::NotAttached("this image is not attached".to_owned()))
            .at_path(argument)),
        1 => Ok(all.swap_remove(0)),
        _ => {
            let names: Vec<_> = all.iter().map(|attached| printable(&attached.name)).collect();
            let message =
                format!("this image is attached several times: name one of {}", names.join(", "));
            Err(Error::new(ErrorKind::Usage(message)).at_path(argument))
        }
    }
}

/// Detaches; returns when device, inner devices and loop devices are gone. With
/// `deferred`, a device that is in use goes at its last close, and is not waited for.
///
/// # Errors
/// It is busy, with the names of its holders; or it did not go in time.
pub fn detach<K: Kernel>(
    kernel: &K,
    target: &Attached,
    deferred: bool,
    interrupt: &Interrupt<'_>,
) -> Result<()> {
    // Held to the end: a node that is taken away must not be that of another attachment,
    // of the same name and with the number that came free.
    let _lock = kernel.lock(interrupt)?;
    sweep(kernel)?;
    let uuid = target.uuid.to_string();
    let Some(device) = kernel.device(DeviceId::Uuid(&uuid))? else {
        return Ok(()); // Somebody was faster.
    };
    let target = attached(kernel, device, target.uuid.clone())?;
    let partitions = partitions(kernel, &target)?;
    if !kernel.wait(if deferred { Duration::ZERO } else { BUSY_PATIENCE }, &mut || {
        is_free(kernel, &target, &partitions)
    }) {
        if !deferred {
            return Err(busy(kernel, &target, &partitions));
        }
        for partition in &partitions {
            kernel.defer_removal(&partition.uuid)?;
        }
        kernel.defer_removal(&uuid)?;
        kernel.unpublish(&target.name, target.number);
        return Ok(());
    }

    // The loops are held until all above has let go of them: then it is our own close
    // that clears them, and when it returns they are clear, locks and all.
    let mut loops = Vec::new();
    for each in &target.loops {
        loops.push((each, kernel.open_loop(each.number).ok()));
    }
    for partition in &partitions {
        kernel.remove(&partition.uuid)?;
    }
    if !kernel.remove(&uuid)? && kernel.device(DeviceId::Uuid(&uuid))?.is_some() {
        drop(loops);
        return Err(busy(kernel, &target, &partitions));
    }
    let mut left = Vec::new();
    let devices = std::iter::once((target.number, uuid.as_str(), target.name.as_str()))
        .chain(target.inner.iter().map(|i| (i.number, i.uuid.as_str(), i.name.as_str())));
    for (number, uuid, name) in devices {
        if !kernel.wait(PATIENCE, &mut || kernel.is_gone(number, uuid)) {
            let what = format!("the device '{}'", printable(name));
            left.push(with_holders(what, &kernel.holders(number)));
        }
    }
    for (each, held) in loops {
        let generation = held.as_ref().map_or(each.info.generation, LoopHandle::generation);
        drop(held);
        let clear = || kernel.loop_is_clear(each.number, generation);
        if clear() {
            continue;
        }
        if kernel.wait(PATIENCE, &mut || clear()) {
            // Somebody else's close cleared it, and lets go of the file just after.
            kernel.wait(Duration::from_millis(5), &mut || false);
        } else {
            let what = loop_node(each.number).display().to_string();
            left.push(with_holders(what, &kernel.holders(each.number)));
        }
    }
    for partition in &partitions {
        kernel.unpublish(&partition.name, partition.number);
    }
    for inner in &target.inner {
        kernel.unpublish(&inner.name, inner.number);
    }
    kernel.unpublish(&target.name, target.number);
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InUse(format!(
        "'{}' was removed, but this is still there after {} s: {}",
        printable(&target.name),
        PATIENCE.as_secs(),
        left.join(", ")
    ))))
}

/// Detaches everything that is not busy; each name with how it went.
///
/// # Errors
/// What is attached cannot be read.
pub fn detach_all<K: Kernel>(
    kernel: &K,
    deferred: bool,
    interrupt: &Interrupt<'_>,
) -> Result<Vec<(String, Result<()>)>> {
    // An attachment can be the image of another: that one first. Each round takes what
    // is free, until a round frees nothing.
    let mut results: Vec<(String, Result<()>)> = Vec::new();
    loop {
        let mut progress = false;
        let all = list(kernel)?;
        let mut failed = Vec::new();
        for target in all {
            interrupt.check()?;
            let result = detach(kernel, &target, deferred, interrupt);
            if result.is_ok() {
                progress = !deferred;
                results.push((target.name, result));
            } else {
                failed.push((target.name, result));
            }
        }
        if failed.is_empty() || !progress {
            results.extend(failed);
            return Ok(results);
        }
    }
}

/// kpartx's partitions of the device, which lie on it.
fn partitions<K: Kernel>(kernel: &K, target: &Attached) -> Result<Vec<DeviceInfo>> {
    let suffix = format!("-{}", target.uuid);
    let mut found = Vec::new();
    for number in kernel.dependents(target.number)? {
        if let Some(device) = kernel.device(DeviceId::Number(number))?
            && device.uuid.starts_with("part")
            && device.uuid.ends_with(&suffix)
        {
            found.push(device);
        }
    }
    Ok(found)
}

/// True where nobody has the device open but its own partitions, nor those.
fn is_free<K: Kernel>(kernel: &K, target: &Attached, partitions: &[DeviceInfo]) -> bool {
    let open = |number| match kernel.device(DeviceId::Number(number)) {
        Ok(Some(device)) => device.open_count,
        _ => 0,
    };
    let own = u32::try_from(partitions.len()).unwrap_or(u32::MAX);
    open(target.number) <= own && partitions.iter().all(|partition| open(partition.number) == 0)
}

fn busy<K: Kernel>(kernel: &K, target: &Attached, partitions: &[DeviceInfo]) -> Error {
    let own: Vec<_> =
        partitions.iter().map(|p| format!("the device '{}'", printable(&p.name))).collect();
    let mut holders = kernel.holders(target.number);
    holders.retain(|holder| !own.contains(holder));
    for partition in partitions {
        let of = printable(&partition.name);
        holders.extend(
            kernel.holders(partition.number).into_iter().map(|h| format!("{h} (partition '{of}')")),
        );
    }
    if holders.is_empty() {
        holders.push("somebody who can't be seen from here".to_owned());
    }
    Error::new(ErrorKind::InUse(format!(
        "'{}' is in use by {}",
        printable(&target.name),
        holders.join(", ")
    )))
}
