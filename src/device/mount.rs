//! Mounting a device, in two steps: first so that nobody sees it, and then on a
//! directory. Before the second, closing a descriptor undoes it, whoever closes it.
//!
//! This is done by the calls fsopen(2), fsconfig(2), fsmount(2) and move_mount(2): through
//! them the kernel also says in words what is wrong.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{AtFlags, StatxFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::mountinfo::{Mount, mounts};
use super::{DeviceNumber, nodes};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::filesystem::{AccessTimes, Driver, Item, MountOptions, drivers};

/// Messages of the kernel that an error repeats, at most; the last ones.
const MAX_MESSAGES: usize = 6;

/// A mount namespace that this process is not in.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Opens it: `name` is a process's number, or a path like /proc/PID/ns/mnt.
    ///
    /// # Errors
    /// There is no such file.
    pub fn open(name: &Path) -> Result<Self> {
        let process = name.to_str().and_then(|name| name.parse::<u32>().ok());
        let path = match process {
            Some(process) => PathBuf::from(format!("/proc/{process}/ns/mnt")),
            None => name.to_owned(),
        };
        let failed = |error| Error::io("cannot open the mount namespace", error).at_path(&path);
        File::open(&path).map(Self).map_err(failed)
    }

    /// Does something there: on a thread, for the rest of the process stays where it is.
    fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let failed = |errno: Errno| Error::io("cannot enter the mount namespace", errno.into());
        let thread = || {
            // Root and working directory are the process's, until they are the thread's own.
            unshare(CloneFlags::CLONE_FS).map_err(failed)?;
            setns(&self.0, CloneFlags::CLONE_NEWNS).map_err(failed)?;
            work()
        };
        std::thread::scope(|scope| scope.spawn(thread).join()).unwrap_or(Err(failed(Errno::EINTR)))
    }
}

/// A directory that something is to be mounted on, held open: it stays the same one, whatever
/// becomes of its name.
#[derive(Debug)]
pub struct MountPoint {
    path: PathBuf,
    directory: File,
    namespace: Option<Namespace>,
}

impl MountPoint {
    /// Opens it, in the mount namespace if one is given; a symbolic link is followed.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or [`ErrorKind::Usage`] for what is no directory.
    pub fn open(path: &Path, namespace: Option<Namespace>) -> Result<Self> {
        let failed = |error| Error::io("cannot mount there", error).at_path(path);
        // An automount point is not triggered by this, as it is not by mount(2).
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_PATH);
        let open = || options.open(path).map_err(failed);
        let directory = match &namespace {
            None => open(),
            Some(namespace) => namespace.within(open),
        }?;
        let is_directory = directory.metadata().is_ok_and(|metadata| metadata.is_dir());
        if !is_directory {
            let message = "cannot mount there: it is no directory".to_owned();
            return Err(Error::new(ErrorKind::Usage(message)).at_path(path));
        }
        Ok(Self { path: path.to_owned(), directory, namespace })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.namespace {
            None => work(),
            Some(namespace) => namespace.within(work),
        }
    }

    /// What is mounted on it already; `None` where it lies inside of a file system.
    ///
    /// # Errors
    /// The list of mounts can't be read.
    pub fn mounted(&self) -> Result<Option<Mount>> {
        self.within(|| {
            let failed = |error| Error::io("cannot tell what is mounted here", error);
            let (flags, wanted) =
                (AtFlags::EMPTY_PATH, StatxFlags::MNT_ID | StatxFlags::BASIC_STATS);
            let here = rustix::fs::statx(self.directory.as_fd(), "", flags, wanted)
                .map_err(|errno| failed(errno.into()).at_path(&self.path))?;
            let all = mounts("thread-self")
                .map_err(|error| failed(error).at_path("/proc/thread-self/mountinfo"))?;
            // Of the same mount other directories have the same number.
            let is_here = |mount: &Mount| {
                mount.id == here.stx_mnt_id
                    && fs::symlink_metadata(&mount.point).is_ok_and(|at| at.ino() == here.stx_ino)
            };
            Ok(all.into_iter().find(is_here))
        })
    }
}

/// What is to be mounted.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The path of the device, which the list of mounts will show.
    pub device: &'a Path,
    /// The device's numbers.
    pub number: DeviceNumber,
    /// The type of the file system, by libblkid's name or the driver's.
    pub kind: &'a str,
    /// The options.
    pub options: &'a MountOptions,
    /// Pass over options that the file system does not know.
    pub sloppy: bool,
    /// The device takes writes, and what is written stays away from the image: the file system
    /// may be written to, and replays its journal first.
    pub writable: bool,
}

/// A file system that is mounted, but nowhere yet. Dropped, it is unmounted.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
    /// The driver, and the options that it was given.
    driver: String,
    options: Vec<String>,
    /// What the kernel had to say on the way.
    messages: Vec<String>,
}

impl Detached {
    /// Puts it on a directory.
    ///
    /// # Errors
    /// What the system says; it is unmounted then.
    pub fn attach_to(self, point: &MountPoint) -> Result<()> {
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        point.within(|| {
            move_mount(self.mount.as_fd(), "", point.directory.as_fd(), "", flags).map_err(
                |errno| {
                    let message = "cannot mount on the directory";
                    Error::io(message, errno.into()).at_path(point.path())
                },
            )
        })
    }

    /// The driver that reads it.
    pub fn driver(&self) -> &str {
        &self.driver
    }

    /// The options that the driver was given.
    pub fn options(&self) -> &[String] {
        &self.options
    }

    /// What the kernel warned of.
    pub fn messages(&self) -> &[String] {
        &self.messages
    }
}

/// Mounts a file system, nowhere yet: read-only, unless [`Request::writable`] says otherwise.
///
/// # Errors
/// [`ErrorKind::KernelLacks`] where it has no driver for the file system, and what the kernel
/// says, with its own words as far as it has any.
pub fn mount(request: &Request<'_>) -> Result<Detached> {
    if request.kind == "btrfs" {
        refuse_twin(request)?;
    }
    let mut first = None;
    let all = drivers(request.kind);
    for driver in &all {
        let failure = match mount_with(request, driver) {
            Ok(detached) => {
                if driver.name == "btrfs" && !is_in_btrfs(request.number) {
                    return Err(wrong_twin());
                }
                return Ok(detached);
            }
            Err(failure) => failure,
        };
        if failure.is_decisive() {
            return Err(failure.into_error());
        }
        if failure.step != Step::Driver {
            first.get_or_insert(failure);
        }
    }
    if let Some(failure) = first {
        return Err(failure.into_error());
    }
    let names: Vec<_> = all.iter().map(|driver| format!("'{}'", driver.name)).collect();
    let message = format!(
        "the kernel has no driver for the file system: neither built in nor as a module ({})",
        names.join(" or ")
    );
    Err(Error::new(ErrorKind::KernelLacks(message)))
}

/// Where mounting failed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// There is no driver of that name.
    Driver,
    /// An option of ours.
    OwnOption(String),
    /// An option of the user's.
    Option(String),
    /// Reading the file system.
    Create,
}

/// Why a driver did not mount.
#[derive(Debug)]
struct Failure {
    step: Step,
    driver: String,
    errno: Errno,
    messages: Vec<String>,
}

impl Failure {
    /// No other driver or option will help.
    fn is_decisive(&self) -> bool {
        match self.step {
            Step::Driver | Step::OwnOption(_) => false,
            Step::Option(_) => true,
            // Drivers that were written for mount(2) look at their options as late as here.
            Step::Create => self.errno != Errno::EINVAL,
        }
    }

    fn into_error(self) -> Error {
        let mut message = match &self.step {
            Step::Driver | Step::Create => {
                format!("cannot mount the file system ({})", printable(&self.driver))
            }
            Step::OwnOption(option) | Step::Option(option) => format!(
                "the file system ({}) does not take the option '{}'",
                printable(&self.driver),
                printable(option)
            ),
        };
        let hint = match self.errno {
            Errno::EEXIST if self.driver == "btrfs" => Some(
                "the kernel knows a newer device with the same btrfs on it: 'btrfs device scan --forget' has it forget those that are not mounted",
            ),
            Errno::EBUSY => Some("it is mounted with other options, or in use"),
            _ => None,
        };
        if let Some(hint) = hint {
            message.push_str("; ");
            message.push_str(hint);
        }
        if !self.messages.is_empty() {
            message.push_str("; the kernel says:\n  ");
            message.push_str(&self.messages.join("\n  "));
            message.push_str("\nin short");
        }
        let source = io::Error::from(self.errno);
        let kind = match self.errno {
            Errno::EBUSY | Errno::EEXIST => ErrorKind::InUse(message),
            Errno::EPERM | Errno::EACCES => ErrorKind::PermissionDenied(message),
            _ => match self.step {
                Step::Option(_) => ErrorKind::Usage(message),
                _ => ErrorKind::Io(message),
            },
        };
        Error::new(kind).with_source(source)
    }
}

/// A file system on its way, with what the kernel says of it.
struct Context<'a> {
    context: OwnedFd,
    log: KernelLog,
    driver: &'a str,
    given: Vec<String>,
}

impl Context<'_> {
    fn failure(&mut self, step: Step, errno: rustix::io::Errno) -> Failure {
        let messages = self.messages();
        let errno = Errno::from_raw(errno.raw_os_error());
        Failure { step, driver: self.driver.to_owned(), errno, messages }
    }

    /// What the kernel has said in this context and of the device since the last call.
    fn messages(&mut self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0; 1024];
        // One message a call; ENODATA after the last.
        while let Ok(length) = rustix::io::read(&self.context, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            // "e ", "w " or "i " before each.
            let text = text.get(2..).unwrap_or(&text).trim_end();
            if !text.is_empty() {
                messages.push(printable(text));
            }
        }
        messages.extend(self.log.news());
        messages.drain(..messages.len().saturating_sub(MAX_MESSAGES));
        messages
    }

    fn set(&mut self, key: &str, value: Option<&str>) -> Result<(), rustix::io::Errno> {
        match value {
            None => fsconfig_set_flag(&self.context, key)?,
            Some(value) => fsconfig_set_string(&self.context, key, value)?,
        }
        self.given.push(match value {
            None => key.to_owned(),
            Some(value) => format!("{key}={value}"),
        });
        Ok(())
    }
}

fn mount_with(request: &Request<'_>, driver: &Driver<'_>) -> Result<Detached, Failure> {
    let data = &request.options.data;
    match mount_by(request, driver, data) {
        // Drivers that were written for mount(2) do not say which option it was.
        Err(failure)
            if request.sloppy
                && failure.step == Step::Create
                && failure.errno == Errno::EINVAL
                && !data.is_empty() =>
        {
            mount_by(request, driver, &[]).map_err(|_| failure)
        }
        other => other,
    }
}

fn mount_by(
    request: &Request<'_>,
    driver: &Driver<'_>,
    data: &[Item],
) -> Result<Detached, Failure> {
    let context = open(driver.name)?;
    let log = KernelLog::of(request.number);
    let mut context = Context { context, log, driver: driver.name, given: Vec::new() };
    let access = if request.writable && !request.options.read_only { "rw" } else { "ro" };
    let set = context.set(access, None);
    set.map_err(|errno| context.failure(Step::OwnOption(access.into()), errno))?;
    let set = fsconfig_set_string(&context.context, "source", request.device);
    set.map_err(|errno| context.failure(Step::OwnOption("source".into()), errno))?;
    for flag in request.options.writing.iter().filter(|_| request.writable) {
        let set = context.set(flag, None);
        set.map_err(|errno| context.failure(Step::Option((*flag).to_owned()), errno))?;
    }
    let own = if request.writable { driver.writable } else { driver.options };
    for option in own {
        let (key, value) = option.split_once('=').map_or((*option, None), |(k, v)| (k, Some(v)));
        let set = context.set(key, value);
        set.map_err(|errno| context.failure(Step::OwnOption((*option).to_owned()), errno))?;
    }
    for Item { key, value } in data {
        let set = context.set(key, value.as_deref());
        if set.is_err() && request.sloppy {
            continue;
        }
        set.map_err(|errno| context.failure(Step::Option(key.clone()), errno))?;
    }
    fsconfig_create(&context.context).map_err(|errno| context.failure(Step::Create, errno))?;
    let mount = fsmount(&context.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes(request))
        .map_err(|errno| context.failure(Step::Create, errno))?;
    let messages = context.messages();
    Ok(Detached { mount, driver: driver.name.to_owned(), options: context.given, messages })
}

/// Opens the kernel's driver of that name, loading its module where it is missing.
fn open(driver: &str) -> Result<OwnedFd, Failure> {
    let try_open = || fsopen(driver, FsOpenFlags::FSOPEN_CLOEXEC);
    // The kernel loads it itself; in a container or an initrd its helper may be missing.
    let opened = match try_open() {
        Err(rustix::io::Errno::NODEV) => {
            nodes::modprobe(&format!("fs-{driver}"));
            try_open()
        }
        other => other,
    };
    opened.map_err(|errno| Failure {
        step: if errno == rustix::io::Errno::NODEV { Step::Driver } else { Step::Create },
        driver: driver.to_owned(),
        errno: Errno::from_raw(errno.raw_os_error()),
        messages: Vec::new(),
    })
}

fn attributes(request: &Request<'_>) -> MountAttrFlags {
    /// MOUNT_ATTR_NOSYMFOLLOW (Linux 5.14).
    const NO_SYMFOLLOW: u32 = 0x0020_0000;
    let Request { options, writable, .. } = *request;
    let mut attributes = MountAttrFlags::empty();
    for (flag, is_set) in [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, !writable || options.read_only),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, !options.suid),
        (MountAttrFlags::MOUNT_ATTR_NODEV, !options.dev),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, !options.exec),
        (MountAttrFlags::from_bits_retain(NO_SYMFOLLOW), options.no_symfollow),
        (MountAttrFlags::MOUNT_ATTR_NOATIME, options.access_times == AccessTimes::None),
        (MountAttrFlags::MOUNT_ATTR_STRICTATIME, options.access_times == AccessTimes::Strict),
        (MountAttrFlags::MOUNT_ATTR_NODIRATIME, options.no_directory_access_times),
    ] {
        attributes.set(flag, is_set);
    }
    attributes
}

/// The kernel's log from now on, as far as it is of one device.
struct KernelLog {
    file: Option<File>,
    /// The kernel's name of the device, like `dm-3`.
    device: String,
}

impl KernelLog {
    fn of(number: DeviceNumber) -> Self {
        let open = || {
            let mut file =
                OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
            io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
            io::Result::Ok(file)
        };
        Self { file: open().ok(), device: kernel_name(number).unwrap_or_default() }
    }

    /// What the kernel has said of the device since the last call.
    fn news(&mut self) -> Vec<String> {
        let Some(file) = self.file.as_mut().filter(|_| !self.device.is_empty()) else {
            return Vec::new();
        };
        let mut news = Vec::new();
        let mut record = vec![0; 8192];
        loop {
            match file.read(&mut record) {
                Ok(0) => break,
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    // Level, number and time; then the message, and lines that start with a
                    // blank.
                    let message = text.split_once(';').map_or("", |(_, rest)| rest);
                    let message = message.lines().next().unwrap_or_default();
                    if names(message, &self.device) {
                        news.push(printable(message.trim_end()));
                    }
                }
                // Records were lost.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        news
    }
}

/// Whether a message names the device, and not one whose name begins the same.
fn names(message: &str, device: &str) -> bool {
    message.match_indices(device).any(|(at, _)| {
        let before = message[..at].chars().next_back();
        let after = message[at + device.len()..].chars().next();
        !before.is_some_and(|c| c.is_ascii_alphanumeric())
            && !after.is_some_and(|c| c.is_ascii_digit())
    })
}

/// The kernel's name of a block device.
fn kernel_name(number: DeviceNumber) -> Option<String> {
    let link = fs::read_link(format!("/sys/dev/block/{number}")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

const BTRFS: &str = "/sys/fs/btrfs";

/// The devices of each btrfs that is mounted, by its UUID.
fn mounted_btrfs() -> Vec<(String, Vec<String>)> {
    let names = |path: &Path| -> Vec<String> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
    };
    let all = names(Path::new(BTRFS)).into_iter();
    all.map(|uuid| {
        let devices = names(&Path::new(BTRFS).join(&uuid).join("devices"));
        (uuid, devices)
    })
    .filter(|(_, devices)| !devices.is_empty())
    .collect()
}

/// Whether a btrfs that is mounted is on this device.
fn is_in_btrfs(number: DeviceNumber) -> bool {
    let name = kernel_name(number).unwrap_or_default();
    mounted_btrfs().iter().any(|(_, devices)| devices.contains(&name))
}

/// Of two btrfs file systems with one UUID the kernel can't mount the second: it takes both
/// for one, and older ones show the first instead.
fn refuse_twin(request: &Request<'_>) -> Result<()> {
    // Since Linux 6.7 it gives the second a temporary UUID.
    if Path::new(BTRFS).join("features/temp_fsid").exists() || is_in_btrfs(request.number) {
        return Ok(());
    }
    let Some(uuid) = btrfs_uuid(request.number, request.device)? else { return Ok(()) };
    let all = mounted_btrfs();
    let Some((_, devices)) = all.iter().find(|(mounted, _)| *mounted == uuid) else {
        return Ok(());
    };
    let is_twin = |mount: &&Mount| {
        let number = nodes::number_at(&mount.source);
        mount.driver == "btrfs"
            && number.and_then(kernel_name).is_some_and(|name| devices.contains(&name))
    };
    let mounted = mounts("self").unwrap_or_default();
    let place = mounted.iter().find(is_twin).map_or(String::new(), |mount| {
        format!(" on {}", printable(&mount.point.to_string_lossy()))
    });
    Err(Error::new(ErrorKind::InUse(format!(
        "a btrfs with the same UUID ({uuid}) is mounted{place}, from {}: this kernel can't tell the two apart, and is not asked to mount this one. Unmount that first (then 'btrfs device scan --forget'), or look into this one in a virtual machine",
        devices.join(", ")
    ))))
}

fn wrong_twin() -> Error {
    let message = "the kernel mounted another btrfs with the same UUID, which it knew before: it was unmounted again; 'btrfs device scan --forget' has the kernel forget those that are not mounted";
    Error::new(ErrorKind::InUse(message.to_owned()))
}

/// The UUID in a btrfs's superblock.
fn btrfs_uuid(number: DeviceNumber, path: &Path) -> Result<Option<String>> {
    use std::os::unix::fs::FileExt;
    let failed = |error| Error::io("cannot read the superblock", error).at_path(path);
    let file = nodes::open_block(number, path).map_err(failed)?;
    let mut superblock = [0; 0x48];
    file.read_exact_at(&mut superblock, 64 << 10).map_err(failed)?;
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&superblock[0x20..0x30]);
    Ok((&superblock[0x40..] == b"_BHRfS_M").then(|| crate::signature::uuid(&uuid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_of_a_device_only_by_its_whole_name() {
        assert!(names("EXT4-fs (dm-1): bad geometry", "dm-1"));
        assert!(names("dm-1", "dm-1"));
        assert!(!names("EXT4-fs (dm-12): bad geometry", "dm-1"));
        assert!(!names("pdm-1: x", "dm-1"));
    }

    #[test]
    fn only_a_directory_is_a_mount_point() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let kind = |path: &Path| MountPoint::open(path, None).unwrap_err().kind().clone();
        assert!(matches!(kind(&file), ErrorKind::Usage(_)));
        assert!(matches!(kind(&directory.path().join("none")), ErrorKind::NotFound(_)));
        assert!(MountPoint::open(directory.path(), None).unwrap().mounted().unwrap().is_none());
        let proc = MountPoint::open(Path::new("/proc"), None).unwrap().mounted().unwrap().unwrap();
        assert_eq!((proc.driver.as_str(), proc.point.as_path()), ("proc", Path::new("/proc")));
    }
}
