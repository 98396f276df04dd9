//! Loop devices: bound in one step, read-only, let go at the last close.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;

use super::nodes::{open_block, open_block_for_writing};
use super::sys::{self, LOOP_AUTOCLEAR, LOOP_DIRECT_IO, LOOP_READ_ONLY, LoopInfo64};
use super::{
    DeviceNumber, LOOP_SIZE_LIMIT, LoopHandle, LoopInfo, LoopOptions, LoopPath, loop_node,
};
use crate::error::{Error, ErrorKind, Result};
use crate::source::FileId;
use crate::units::{SECTOR_SIZE, Sectors};

/// The loop driver's major number (Documentation/admin-guide/devices.txt).
const LOOP_MAJOR: u32 = 7;
/// How often another process may take the free loop device before us.
const ATTEMPTS: u32 = 200;

/// A loop device that is held open.
#[derive(Debug)]
pub struct Loop {
    number: DeviceNumber,
    size: Sectors,
    direct_io: bool,
    generation: Option<u64>,
    device: File,
}

impl LoopHandle for Loop {
    fn number(&self) -> DeviceNumber {
        self.number
    }

    fn size(&self) -> Sectors {
        self.size
    }

    fn direct_io(&self) -> bool {
        self.direct_io
    }

    fn generation(&self) -> Option<u64> {
        self.generation
    }

    fn sync(&self) -> io::Result<()> {
        self.device.sync_all()
    }
}

impl Loop {
    fn held(number: DeviceNumber, device: File) -> io::Result<Self> {
        let size = sys::block_device_size(device.as_fd())?;
        let status = sys::loop_status(device.as_fd())?;
        Ok(Self {
            number,
            size: Sectors::new(size / SECTOR_SIZE),
            direct_io: status.flags & LOOP_DIRECT_IO != 0,
            generation: generation(number),
            device,
        })
    }
}

/// Device and inode as `stat` gives them, from a loop's status.
fn file_id(info: &LoopInfo64) -> FileId {
    if info.rdevice != 0 {
        return FileId { device: DeviceNumber::from_kernel(info.rdevice).to_dev(), inode: 0 };
    }
    FileId { device: DeviceNumber::from_kernel(info.device).to_dev(), inode: info.inode }
}

/// The numbers of the loop device that LOOP_CTL_GET_FREE calls `index`.
pub(crate) fn number_of(index: u32) -> DeviceNumber {
    let text = fs::read_to_string(format!("/sys/block/loop{index}/dev")).unwrap_or_default();
    let minor = text.trim().split_once(':').and_then(|(_, minor)| minor.parse().ok());
    DeviceNumber { major: LOOP_MAJOR, minor: minor.unwrap_or(index) }
}

fn sysfs(number: DeviceNumber, attribute: &str) -> PathBuf {
    format!("/sys/dev/block/{number}/{attribute}").into()
}

fn generation(number: DeviceNumber) -> Option<u64> {
    fs::read_to_string(sysfs(number, "diskseq")).ok()?.trim().parse().ok()
}

/// True for the number of a loop device.
pub(crate) fn is_loop(number: DeviceNumber) -> bool {
    number.major == LOOP_MAJOR
}

/// True for a loop device that imgdm has bound.
pub(crate) fn is_ours(number: DeviceNumber) -> bool {
    let limit = fs::read_to_string(sysfs(number, "loop/sizelimit"));
    limit.is_ok_and(|limit| limit.trim().parse() == Ok(LOOP_SIZE_LIMIT))
}

/// Binds a free loop device to `file`.
pub(crate) fn set_up(control: &File, file: &File, options: &LoopOptions) -> Result<Loop> {
    let mut info = LoopInfo64::ZERO;
    info.size_limit = LOOP_SIZE_LIMIT;
    info.flags = LOOP_AUTOCLEAR;
    if !options.is_writable() {
        info.flags |= LOOP_READ_ONLY;
    }
    info.offset = options.offset();
    if options.direct_io {
        info.flags |= LOOP_DIRECT_IO;
    }
    let label = options.role.file_name();
    let length = label.len().min(info.file_name.len() - 1);
    info.file_name[..length].copy_from_slice(&label.as_bytes()[..length]);

    let failed = |error| Error::io("cannot set up a loop device", error);
    for _ in 0..ATTEMPTS {
        let free = sys::loop_get_free(control.as_fd()).map_err(|error| {
            // EINVAL: there is no minor number for one more (device_add_disk() in block/genhd.c).
            if !matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EINVAL)) {
                return failed(error);
            }
            let message = "no loop device is free, and the kernel makes no more: 'losetup -a' lists those in use";
            Error::new(ErrorKind::CannotCreate(message.to_owned())).with_source(error)
        });
        let number = number_of(free?);
        // The kernel makes a loop read-only that was set up through a descriptor for reading.
        let opened = match options.is_writable() {
            true => open_block_for_writing(number, &loop_node(number)),
            false => open_block(number, &loop_node(number)),
        };
        let device = match opened {
            Ok(device) => device,
            // Removed again by another process.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => continue,
            Err(error) => return Err(failed(error)),
        };
        // 512 whatever lies below: the largest of all becomes the attachment's, and its
        // segments are aligned to no more than a sector.
        match sys::loop_configure(device.as_fd(), file.as_fd(), 512, info) {
            Ok(()) => {
                return Loop::held(number, device).map_err(failed);
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(2)),
                Some(libc::ENOTTY) => {
                    let message = "the kernel lacks LOOP_CONFIGURE, which came with Linux 5.8";
                    return Err(Error::new(ErrorKind::KernelLacks(message.to_owned())));
                }
                _ => return Err(failed(error)),
            },
        }
    }
    Err(Error::new(ErrorKind::InUse(format!(
        "other processes took the free loop device {ATTEMPTS} times"
    ))))
}

/// Opens a loop device that is bound.
pub(crate) fn open(number: DeviceNumber) -> Result<Loop> {
    let path = loop_node(number);
    let failed = |error| Error::io("cannot open the loop device", error).at_path(&path);
    let device = open_block(number, &path).map_err(failed)?;
    Loop::held(number, device).map_err(failed)
}

/// What a loop device is bound to.
pub(crate) fn info(number: DeviceNumber) -> Result<Option<LoopInfo>> {
    let path = loop_node(number);
    let failed = |error| Error::io("cannot look at the loop device", error).at_path(&path);
    let none = |error: &io::Error| {
        matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENOENT | libc::ENODEV))
    };
    let generation = generation(number);
    let status = match open_block(number, &path).and_then(|file| sys::loop_status(file.as_fd())) {
        Ok(status) => status,
        Err(error) if none(&error) => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let end = status.file_name.iter().position(|&b| b == 0).unwrap_or(status.file_name.len());
    let file = file_id(&status);
    Ok(Some(LoopInfo {
        file,
        label: String::from_utf8_lossy(&status.file_name[..end]).into_owned(),
        size_limit: status.size_limit,
        read_only: status.flags & LOOP_READ_ONLY != 0,
        autoclear: status.flags & LOOP_AUTOCLEAR != 0,
        direct_io: status.flags & LOOP_DIRECT_IO != 0,
        offset: status.offset,
        path: fs::read(sysfs(number, "loop/backing_file"))
            .ok()
            .map(|raw| LoopPath::read(&raw, file)),
        generation,
    }))
}

/// True once the loop is not bound any more as it was at `generation`.
pub(crate) fn is_clear(number: DeviceNumber, then: Option<u64>) -> bool {
    let bound = if Path::new("/sys/block").exists() {
        sysfs(number, "loop/backing_file").exists()
    } else {
        matches!(info(number), Ok(Some(_)))
    };
    !bound || (then.is_some() && generation(number) != then)
}
