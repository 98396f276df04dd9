//! Taking an attachment down.
//!
//! Removing the top device is enough: the kernel takes the rest after it. What is done
//! here is to say beforehand who is in the way, and to wait until loop devices have let
//! go of their files and with them of the locks.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::attach::sweep;
use super::compare::{describe, part_of};
use super::list::{Attached, AttachedLoop, attached, list};
use super::name::{DeviceRole, DmName, DmUuid, is_ours};
use super::stacked::{wait_for_all, with_holders};
use super::{
    DeviceId, DeviceInfo, DeviceNumber, Interrupt, Kernel, LoopHandle, PATIENCE, loop_node,
};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::FileId;

/// How long somebody may have the device open before it counts as busy: udev and others
/// look at devices for a moment.
const BUSY_PATIENCE: Duration = Duration::from_millis(1500);

/// The attachment that an argument means: a NAME, or, with a `/` in it,
/// /dev/mapper/NAME, another path of the device, the image, or a kept store. `id` is what is at that
/// path, if anything.
///
/// # Errors
/// [`ErrorKind::NotAttached`]; or [`ErrorKind::Usage`]: an image that is attached several
/// times, or a device that stands on an attachment, each with the names to use.
pub fn find<K: Kernel>(kernel: &K, argument: &Path, id: Option<FileId>) -> Result<Attached> {
    let text = argument.to_string_lossy();
    let name = match text.strip_prefix("/dev/mapper/") {
        Some(name) => Some(name),
        None => (!text.contains('/')).then_some(&*text),
    };
    // Before the list: a device that comes up in between is listed, and one that is an
    // attachment's and is not has gone.
    let device = match name {
        Some(name) => kernel.device(DeviceId::Name(name))?,
        None => match id.filter(|id| id.inode == 0) {
            Some(id) => kernel.device(DeviceId::Number(DeviceNumber::from_dev(id.device)))?,
            None => None,
        },
    };
    let mut all = list(kernel)?;
    if let Some(name) = name
        && let Some(at) = all.iter().position(|attached| attached.name == name)
    {
        return Ok(all.swap_remove(at));
    }
    let stands_on = device.as_ref().and_then(|device| {
        let (what, attachment) = part_of(kernel, &device.uuid)?;
        Some(Error::new(ErrorKind::Usage(format!(
            "'{}' is {what} of '{attached}', with which it comes and goes: name '{attached}'",
            printable(&device.name),
            attached = printable(&attachment.name)
        ))))
    });
    if !text.contains('/') {
        if let Some(error) = stands_on {
            return Err(error);
        }
        let message = match device {
            Some(other) if is_something_else(&other) => {
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
    let is_store = |attached: &Attached| {
        let store = attached.overlay.as_ref().filter(|overlay| overlay.is_kept);
        let is_it = |number| attached.loops.iter().find(|each| Some(each.number) == number);
        let file = store.and_then(|store| is_it(store.store)).map(|each| each.info.file);
        file.is_some() && file == id
    };
    all.retain(|attached| is_device(attached) || is_image(attached) || is_store(attached));
    match all.len() {
        0 => Err(stands_on.unwrap_or_else(|| {
            Error::new(ErrorKind::NotAttached("this image is not attached".to_owned()))
                .at_path(argument)
        })),
        1 => Ok(all.swap_remove(0)),
        _ => {
            let names: Vec<_> = all.iter().map(|attached| printable(&attached.name)).collect();
            let message =
                format!("this image is attached several times: name one of {}", names.join(", "));
            Err(Error::new(ErrorKind::Usage(message)).at_path(argument))
        }
    }
}

/// True for a device that is no attachment, and not what is left of one either.
fn is_something_else(device: &DeviceInfo) -> bool {
    match device.uuid.parse::<DmUuid>() {
        Ok(uuid) => device.has_live_table && uuid.role != DeviceRole::Top,
        Err(_) => device.has_live_table || !is_ours(&device.uuid),
    }
}

/// The attachment of an image that `attach` without options has made or would make: under
/// the name that follows from the image's path, of its active layer, without a record, and it
/// takes no writes. Other attachments of the image do not count. `id` is what is at that path,
/// if anything; an image that was replaced there is known by the path, too.
///
/// # Errors
/// [`ErrorKind::NotAttached`], or no name follows from the path.
pub fn find_by_default_name<K: Kernel>(
    kernel: &K,
    image: &Path,
    id: Option<FileId>,
) -> Result<Attached> {
    let name = DmName::from_image(image, None)?;
    let absolute = std::path::absolute(image).unwrap_or_else(|_| image.to_owned());
    let is_it = |attached: &Attached| {
        let of_image = attached.active_loop().is_some_and(|active| {
            Some(active.info.file) == id
                || active.info.path.as_ref().is_some_and(|known| known.path == absolute)
        });
        of_image
            && attached.name == name.as_str()
            && !attached.uuid.is_snapshot()
            && !attached.is_evidence()
            && !attached.takes_writes()
    };
    list(kernel)?.into_iter().find(is_it).ok_or_else(|| {
        let message = format!("this image is not attached under the name '{name}'");
        Error::new(ErrorKind::NotAttached(message)).at_path(image)
    })
}

/// Refuses, as [`detach`] would, what somebody has open, without taking it down.
///
/// # Errors
/// It is busy, with the names of its holders.
pub fn check_free<K: Kernel>(kernel: &K, target: &Attached) -> Result<()> {
    match becomes_free(kernel, target, BUSY_PATIENCE)? {
        true => Ok(()),
        false => Err(busy(kernel, target)),
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
    let target = attached(kernel, device, target.uuid.clone(), &kernel.devices()?)?;
    let patience = if deferred { Duration::ZERO } else { BUSY_PATIENCE };
    if !becomes_free(kernel, &target, patience)? {
        if !deferred {
            return Err(busy(kernel, &target));
        }
        for above in top_first(&target) {
            kernel.defer_removal(&above.uuid)?;
        }
        kernel.defer_removal(&uuid)?;
        for above in top_first(&target) {
            kernel.unpublish(&above.name, above.number);
        }
        kernel.unpublish(&target.name, target.number);
        return Ok(());
    }

    // The loops are held until all above has let go of them: then it is our own close
    // that clears them, and when it returns they are clear, locks and all.
    let mut loops = Vec::new();
    for each in &target.loops {
        loops.push((each, kernel.open_loop(each.number).ok()));
    }
    let mut gone = Vec::new();
    if let Err(error) = remove_all(kernel, &target, &uuid, &mut gone) {
        drop(loops);
        for (name, number) in gone {
            kernel.unpublish(name, number);
        }
        return Err(error);
    }
    let (mut left, mut unsynced) = (Vec::new(), None);
    let devices = std::iter::once((target.number, uuid.as_str(), target.name.as_str()))
        .chain(target.inner.iter().map(|i| (i.number, i.uuid.as_str(), i.name.as_str())));
    let is_gone = |&(number, uuid, _): &(_, &str, _)| kernel.is_gone(number, uuid);
    for (number, _, name) in wait_for_all(kernel, devices.collect(), is_gone) {
        let what = format!("the device '{}'", printable(name));
        left.push(with_holders(what, &kernel.holders(number)));
    }
    for (each, held) in loops {
        // What was written and not synced by whoever wrote it.
        if let Some(held) = &held
            && target.overlay.as_ref().is_some_and(|o| o.is_kept && o.store == Some(each.number))
            && let Err(error) = held.sync()
        {
            unsynced = Some(cannot_sync(each, error));
        }
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
    for above in top_first(&target) {
        kernel.unpublish(&above.name, above.number);
    }
    for inner in &target.inner {
        kernel.unpublish(&inner.name, inner.number);
    }
    kernel.unpublish(&target.name, target.number);
    if let Some(error) = unsynced {
        return Err(error);
    }
    if left.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InUse(format!(
        "'{}' was removed, but this is still there, of which nothing has gone for {} s: {}",
        printable(&target.name),
        PATIENCE.as_secs(),
        left.join(", ")
    ))))
}

/// Removes what stands on the disk, and the disk. The name and number of each that went are in
/// `gone`, also where the next one did not.
fn remove_all<'t, K: Kernel>(
    kernel: &K,
    target: &'t Attached,
    uuid: &str,
    gone: &mut Vec<(&'t str, DeviceNumber)>,
) -> Result<()> {
    let above = top_first(target).map(|above| (&*above.uuid, &*above.name, above.number));
    for (uuid, name, number) in above.chain([(uuid, &*target.name, target.number)]) {
        if !kernel.remove(uuid)? && kernel.device(DeviceId::Uuid(uuid))?.is_some() {
            return Err(busy(kernel, target));
        }
        gone.push((name, number));
    }
    Ok(())
}

fn cannot_sync(store: &AttachedLoop, error: io::Error) -> Error {
    let message = "it was detached, but what was written can't be synced to the disk of the store";
    let error = Error::new(ErrorKind::Io(message.to_owned())).with_source(error);
    match &store.info.path {
        Some(path) => error.at_path(&path.path),
        None => error,
    }
}

/// Detaches, by `detach_one`, everything that is not busy; each name with how it went. With
/// `once`, as where removal is left to the last close, each is tried once.
///
/// # Errors
/// What is attached cannot be read, or `interrupt` came.
pub fn detach_all<K: Kernel, E>(
    kernel: &K,
    once: bool,
    interrupt: &Interrupt<'_>,
    mut detach_one: impl FnMut(&Attached) -> Result<(), E>,
) -> Result<Vec<(String, Result<(), E>)>> {
    // An attachment can be the image of another: that one first. Each round takes what
    // is free, until a round frees nothing.
    let mut results = Vec::new();
    loop {
        let mut progress = false;
        let all = list(kernel)?;
        let mut failed = Vec::new();
        for target in all {
            interrupt.check()?;
            let result = detach_one(&target);
            if result.is_ok() {
                progress = !once;
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

/// What stands on the attachment, in an order in which it can be removed: a logical volume
/// may lie on a partition.
fn top_first(target: &Attached) -> impl Iterator<Item = &DeviceInfo> {
    target.above.iter().rev().map(|above| &above.info)
}

/// Whether it is free, within that time.
fn becomes_free<K: Kernel>(kernel: &K, target: &Attached, patience: Duration) -> Result<bool> {
    let mut looked = Ok(false);
    kernel.wait(patience, &mut || {
        looked = is_free(kernel, target);
        *looked.as_ref().unwrap_or(&true)
    });
    looked
}

/// True where nobody has the device open but what stands on it, nor that.
fn is_free<K: Kernel>(kernel: &K, target: &Attached) -> Result<bool> {
    let mut own: BTreeMap<DeviceNumber, u32> = BTreeMap::new();
    for above in &target.above {
        for number in kernel.dependencies(DeviceId::Number(above.info.number))? {
            *own.entry(number).or_default() += 1;
        }
    }
    let all = target.above.iter().map(|above| above.info.number).chain([target.number]);
    for number in all {
        let open = kernel.device(DeviceId::Number(number))?.map_or(0, |device| device.open_count);
        if open > own.get(&number).copied().unwrap_or(0) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn busy<K: Kernel>(kernel: &K, target: &Attached) -> Error {
    let own: Vec<_> = target
        .above
        .iter()
        .map(|above| format!("the device '{}'", printable(&above.info.name)))
        .collect();
    let mut holders = kernel.holders(target.number);
    holders.retain(|holder| !own.contains(holder));
    for above in &target.above {
        let what = match above.role {
            DeviceRole::LogicalVolume(_) => "logical volume",
            _ => "partition",
        };
        let of = printable(&above.info.name);
        let mut its = kernel.holders(above.info.number);
        its.retain(|holder| !own.contains(holder));
        holders.extend(its.into_iter().map(|holder| format!("{holder} ({what} '{of}')")));
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
