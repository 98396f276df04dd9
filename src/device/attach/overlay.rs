//! The writable device over the disk that never changes.

use super::Request;
use crate::device::name::{DmUuid, LoopRole};
use crate::device::options::DirectIo;
use crate::device::stacked::{NewDevice, Stack};
use crate::device::{Access, DeviceNumber, Kernel, LoopHandle, LoopOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::table::{DeviceRef, TableLine, Target, WhenFull};
use crate::units::Sectors;

/// Builds the device that takes writes on the stack, over the disk of these numbers and the
/// request's store, and gives its numbers.
///
/// # Errors
/// Whatever went wrong; what was built is on the stack.
pub(super) fn build_overlay<K: Kernel>(
    stack: &mut Stack<'_, K>,
    request: &Request<'_>,
    top: &DmUuid,
    disk: DeviceNumber,
) -> Result<DeviceNumber> {
    let store = request.store.and_then(|store| Some((store.file?, store.chunk)));
    let (file, chunk) = store.ok_or_else(|| {
        Error::new(ErrorKind::Usage("a writable device needs a store".to_owned()))
    })?;
    check_free(stack.kernel, request)?;
    let direct_io = request.options.direct_io == DirectIo::On;
    let options = LoopOptions { role: LoopRole::Store, direct_io };
    let (cow, _) = stack.bind_loop(file, &options, &request.interrupt)?;
    if direct_io && !stack.last_loop().is_some_and(LoopHandle::direct_io) {
        return Err(Error::new(ErrorKind::KernelLacks(
            "the file system of the store, or its disk, does no direct I/O by 512 bytes: use --direct-io=auto".to_owned(),
        )));
    }
    let kernel = stack.kernel;
    let (name, rules) = (request.name.clone(), request.options.rules());
    let line = TableLine {
        start: Sectors::new(0),
        length: request.tables.size(),
        target: Target::Snapshot {
            origin: device_ref(disk),
            cow: device_ref(cow),
            when_full: WhenFull::FailWrites,
            chunk,
        },
    };
    let device = NewDevice { name, uuid: top.clone(), rules };
    stack.build(device, &request.interrupt, &mut |uuid| {
        kernel.load(uuid, Access::Writable, 1, &mut |each| each(&line))
    })
}

/// Refuses a store that another device has already, which its lock does where the file system
/// has locks. Only under the lock under which others build.
fn check_free<K: Kernel>(kernel: &K, request: &Request<'_>) -> Result<()> {
    let Some(id) = request.store.and_then(|store| store.id) else { return Ok(()) };
    for number in kernel.loops()? {
        let Some(info) = kernel.loop_info(number)? else { continue };
        if info.role() == Some(LoopRole::Store) && info.file == id {
            let message = "the store is in use: it is attached already (see 'imgdm list')";
            let error = Error::new(ErrorKind::InUse(message.to_owned()));
            return Err(match info.path {
                Some(path) => error.at_path(&path.path),
                None => error,
            });
        }
    }
    Ok(())
}

fn device_ref(number: DeviceNumber) -> DeviceRef {
    DeviceRef::from_numbers(number.major, number.minor)
}
