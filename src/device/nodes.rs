//! Device nodes, also where nobody else makes them: in containers and initrds.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{Mode, SFlag, mknod};

use super::DeviceNumber;
use crate::error::{Error, ErrorKind, Result};

/// Where the nodes of device-mapper devices are.
pub(crate) const MAPPER: &str = "/dev/mapper";

/// A misc device through which a driver is controlled.
pub(crate) struct Control {
    /// Its node.
    path: &'static str,
    /// Its name in /proc/misc.
    misc: &'static str,
    /// The module that brings it.
    module: &'static str,
    /// What the kernel lacks without it.
    what: &'static str,
}

/// Device-mapper's.
pub(crate) const DEVICE_MAPPER: Control = Control {
    path: "/dev/mapper/control",
    misc: "device-mapper",
    module: "dm-mod",
    what: "device-mapper",
};

/// The loop driver's.
pub(crate) const LOOP: Control = Control {
    path: "/dev/loop-control",
    misc: "loop-control",
    module: "loop",
    what: "the loop driver",
};

/// Loads a module the way the kernel itself would; quietly, since what follows tells.
pub(crate) fn modprobe(module: &str) {
    let program = fs::read_to_string("/proc/sys/kernel/modprobe").unwrap_or_default();
    let program = match program.trim() {
        "" => "/sbin/modprobe",
        program => program,
    };
    let quiet = || Stdio::null();
    let status = Command::new(program)
        .args(["-q", "--", module])
        .stdin(quiet())
        .stdout(quiet())
        .stderr(quiet())
        .status();
    log::debug!("{program} {module}: {status:?}");
}

/// Has the modules of a cipher like `aes-cbc-essiv:sha256` loaded, as far as there are any.
pub(crate) fn load_cipher_modules(cipher: &str) {
    // xts is made of ecb, and the essiv generator of a template of that name.
    modprobe("crypto-ecb");
    for part in cipher.split(['-', ':']) {
        modprobe(&format!("crypto-{part}"));
    }
}

/// The number of a misc device that is registered.
fn misc_number(name: &str) -> Option<DeviceNumber> {
    let list = fs::read_to_string("/proc/misc").ok()?;
    let minor = list.lines().find_map(|line| {
        let (minor, is) = line.trim().split_once(' ')?;
        (is.trim() == name).then(|| minor.parse().ok())?
    })?;
    Some(DeviceNumber { major: 10, minor })
}

impl Control {
    /// Opens it, loading the module and making the node where they are missing.
    pub(crate) fn open(&self) -> Result<File> {
        let first = match self.try_open() {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        let missing = [libc::ENOENT, libc::ENODEV, libc::ENXIO];
        if !first.raw_os_error().is_some_and(|errno| missing.contains(&errno)) {
            let message = match first.kind() {
                io::ErrorKind::PermissionDenied => "this needs root",
                _ => "cannot open the control device",
            };
            return Err(Error::io(message, first).at_path(self.path));
        }
        modprobe(self.module);
        if let Ok(file) = self.try_open() {
            return Ok(file);
        }
        if let Some(number) = misc_number(self.misc) {
            let path = Path::new(self.path);
            if let Some(directory) = path.parent() {
                let _ = fs::create_dir_all(directory);
            }
            let _ = mknod(path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), number.to_dev());
        }
        self.try_open().map_err(|error| {
            let message = format!(
                "the kernel lacks {}: there is no {}, and loading the module {} did not help",
                self.what, self.path, self.module
            );
            Error::new(ErrorKind::KernelLacks(message)).with_source(error)
        })
    }

    /// True where the driver is there already: nothing is loaded to find out.
    pub(crate) fn is_there(&self) -> bool {
        misc_number(self.misc).is_some() || !Path::new("/proc/misc").exists()
    }

    fn try_open(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path)
    }
}

/// Opens a block device for reading, by its usual node or by one made for the moment.
pub(crate) fn open_block(number: DeviceNumber, path: &Path) -> io::Result<File> {
    open_block_with(number, path, OpenOptions::new().read(true), 0)
}

/// Whether a file system, swap space or a device holds a block device for itself.
pub(crate) fn is_held(number: DeviceNumber, path: &Path) -> bool {
    let opened = open_block_with(number, path, OpenOptions::new().read(true), libc::O_EXCL);
    opened.is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
}

/// The same for reading and writing.
pub(crate) fn open_block_for_writing(number: DeviceNumber, path: &Path) -> io::Result<File> {
    open_block_with(number, path, OpenOptions::new().read(true).write(true), 0)
}

fn open_block_with(
    number: DeviceNumber,
    path: &Path,
    options: &mut OpenOptions,
    flags: i32,
) -> io::Result<File> {
    let is_it = |file: &File| {
        file.metadata()
            .is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == number.to_dev())
    };
    options.custom_flags(libc::O_NONBLOCK | flags);
    let open = |path: &Path| options.open(path);
    match open(path) {
        Ok(file) if is_it(&file) => return Ok(file),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
        _ => {}
    }
    let node = private_node(number);
    let mode = Mode::from_bits_truncate(0o600);
    match mknod(&node, SFlag::S_IFBLK, mode, number.to_dev()) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(errno.into()),
    }
    let file = open(&node);
    let _ = fs::remove_file(&node);
    let file = file?;
    if is_it(&file) { Ok(file) } else { Err(Errno::ENXIO.into()) }
}

/// A path in /dev that nobody else uses. Not elsewhere: other file systems may be
/// mounted so that device nodes on them do not open.
fn private_node(number: DeviceNumber) -> PathBuf {
    format!("/dev/.imgdm-{}-{}-{}", std::process::id(), number.major, number.minor).into()
}

/// The number of the block device at `path`, links followed.
pub(crate) fn number_at(path: &Path) -> Option<DeviceNumber> {
    let metadata = fs::metadata(path).ok()?;
    metadata.file_type().is_block_device().then(|| DeviceNumber::from_dev(metadata.rdev()))
}

/// Makes /dev/mapper/NAME for a device: as udev would, a link to its node; a node of
/// its own where that is missing. A stale one is replaced in one step.
pub(crate) fn make_link(name: &str, number: DeviceNumber) -> io::Result<()> {
    let path = Path::new(MAPPER).join(name);
    if number_at(&path) == Some(number) {
        return Ok(());
    }
    fs::create_dir_all(MAPPER)?;
    let new = Path::new(MAPPER).join(format!(".imgdm-{}", std::process::id()));
    let _ = fs::remove_file(&new);
    let node = format!("dm-{}", number.minor);
    if number_at(&Path::new("/dev").join(&node)) == Some(number) {
        std::os::unix::fs::symlink(Path::new("..").join(&node), &new)?;
    } else {
        mknod(&new, SFlag::S_IFBLK, Mode::from_bits_truncate(0o660), number.to_dev())?;
    }
    fs::rename(&new, &path).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

/// Removes /dev/mapper/NAME of a device that is gone: a link to its node, or a node
/// with its numbers.
pub(crate) fn remove_link(name: &str, number: DeviceNumber) {
    let path = Path::new(MAPPER).join(name);
    let node = format!("dm-{}", number.minor);
    let ours = match fs::read_link(&path) {
        Ok(target) => target.file_name().is_some_and(|target| target == node.as_str()),
        Err(_) => number_at(&path) == Some(number),
    };
    if ours {
        let _ = fs::remove_file(&path);
    }
}
