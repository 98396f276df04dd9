//! The seam to the machine: loop devices and device-mapper, real and fake.
//!
//! [`attach`] builds one tree that the kernel alone owns, [`detach`] takes it down,
//! [`list`] reads what there is, [`locate`] what serves one sector, and [`verify`] whether all
//! of it is right. All of them speak to the machine through [`Kernel`]:
//! the running one, or [`fake`], which records and can fail at any step.

mod above;
pub mod attach;
pub mod blocks;
mod compare;
pub mod detach;
pub mod disk;
pub mod fake;
pub mod fault;
pub mod fiemap;
pub mod going;
pub mod holders;
pub mod keys;
pub mod list;
mod live;
pub mod locate;
pub mod memory;
pub mod name;
mod options;
pub mod overlay;
mod stacked;
pub mod sys;
pub mod verify;
mod volumes;

#[cfg(feature = "device")]
pub mod below;
#[cfg(feature = "device")]
mod dm;
#[cfg(feature = "device")]
pub mod export;
#[cfg(feature = "device")]
pub mod linux;
#[cfg(feature = "device")]
mod live_table;
#[cfg(feature = "device")]
mod loops;
#[cfg(feature = "device")]
pub mod mount;
#[cfg(feature = "device")]
pub mod mountinfo;
#[cfg(feature = "device")]
mod nodes;
#[cfg(feature = "device")]
pub mod suspend;
#[cfg(feature = "device")]
mod table_buffer;
#[cfg(feature = "device")]
pub mod udev;
#[cfg(feature = "device")]
pub mod writers;

pub use disk::DeviceDisk;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
pub use sys::raise_open_files_limit;

use crate::crypt::VolumeKey;
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::STORE_OFFSET;
use crate::source::FileId;
use crate::table::{CryptKey, TableLine};
use crate::units::{ByteLen, Sectors};
use name::{DmName, DmUuid, LoopRole};
pub use options::Access;

/// The `lo_sizelimit` of every loop of ours: above any file's size, so that it limits
/// nothing, and below 2^63, so that the kernel takes it. By `ATTR{loop/sizelimit}` the
/// udev rule knows our loops and hides the guest's signatures on them. 0x7fffff, "IMGDM".
pub const LOOP_SIZE_LIMIT: u64 = 0x7fff_ff49_4d47_444d;

/// How long device, inner devices and loops may take to go, and udev to do its part.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A block device by its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// The device.
    pub minor: u32,
}

impl DeviceNumber {
    /// From the C library's `dev_t`.
    pub fn from_dev(dev: u64) -> Self {
        let part = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Self { major: part(nix::sys::stat::major(dev)), minor: part(nix::sys::stat::minor(dev)) }
    }

    /// As the C library's `dev_t`.
    pub fn to_dev(self) -> u64 {
        nix::sys::stat::makedev(u64::from(self.major), u64::from(self.minor))
    }

    /// From the kernel's `huge_encode_dev`, as ioctls carry it.
    pub fn from_kernel(dev: u64) -> Self {
        let part = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        Self {
            major: part((dev & 0xf_ff00) >> 8),
            minor: part((dev & 0xff) | ((dev >> 12) & 0xfff_ff00)),
        }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What device-mapper says of one of its devices. Names and UUIDs of others can be
/// any bytes; those that are not UTF-8 come with replacement characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its numbers.
    pub number: DeviceNumber,
    /// Its name.
    pub name: String,
    /// Its UUID, empty where it has none.
    pub uuid: String,
    /// How many have it open, devices stacked on it included.
    pub open_count: u32,
    /// It has a live table.
    pub has_live_table: bool,
    /// It goes at its last close.
    pub deferred_remove: bool,
    /// It takes no writes.
    pub read_only: bool,
}

impl DeviceInfo {
    /// Whether it takes writes.
    pub fn access(&self) -> Access {
        if self.read_only { Access::ReadOnly } else { Access::Writable }
    }
}

/// A line of a live table as the kernel prints it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveLine {
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub length: u64,
    /// The target's type.
    pub kind: String,
    /// Its parameters.
    pub parameters: String,
}

/// The node of a loop device. The number in its name is not the minor one where the
/// driver leaves room for partitions (`max_part`): sysfs knows the name.
pub fn loop_node(number: DeviceNumber) -> PathBuf {
    let name = std::fs::read_link(format!("/sys/dev/block/{number}")).ok();
    match name.as_deref().and_then(std::path::Path::file_name) {
        Some(name) => std::path::Path::new("/dev").join(name),
        None => format!("/dev/loop{}", number.minor).into(),
    }
}

/// What a loop device is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopInfo {
    /// The file, by device and inode, or the block device by its numbers.
    pub file: FileId,
    /// Its `lo_file_name`.
    pub label: String,
    /// Its `lo_sizelimit`.
    pub size_limit: u64,
    /// It takes no writes.
    pub read_only: bool,
    /// It lets go of the file at its last close.
    pub autoclear: bool,
    /// It reads the file around the page cache.
    pub direct_io: bool,
    /// Where in the file it starts; 0 of all loops of ours, but those over stores.
    pub offset: u64,
    /// The file's path, where the kernel knows one.
    pub path: Option<LoopPath>,
    /// Changes each time that the device is bound, where the kernel counts that.
    pub generation: Option<u64>,
}

impl LoopInfo {
    /// What the loop is for; none for a loop of others.
    pub fn role(&self) -> Option<LoopRole> {
        (self.size_limit == LOOP_SIZE_LIMIT).then(|| LoopRole::parse(&self.label)).flatten()
    }
}

/// The path of a loop's file, which may be another's by now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopPath {
    /// The path by which the kernel knows the file, without its mark of deletion.
    pub path: PathBuf,
    /// What is at that path now.
    pub state: PathState,
}

impl LoopPath {
    /// The path in sysfs's `loop/backing_file`, whose mark of deletion may be a part of a
    /// file's name. `file` is what the loop is bound to.
    pub(crate) fn read(raw: &[u8], file: FileId) -> Self {
        const DELETED: &[u8] = b" (deleted)";
        let to_path = |bytes| PathBuf::from(OsStr::from_bytes(bytes));
        // Only the line's own end: a name may have others.
        let raw = raw.strip_suffix(b"\n").unwrap_or(raw);
        let path = to_path(raw);
        if FileId::of_path(&path) == Some(file) {
            return Self { path, state: PathState::Same };
        }
        match raw.strip_suffix(DELETED) {
            Some(path) => Self { path: to_path(path), state: PathState::Deleted },
            None => Self { path, state: PathState::Other },
        }
    }
}

/// What is at the path of a file in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathState {
    /// The file itself.
    Same,
    /// Nothing: the file was unlinked.
    Deleted,
    /// Another file, or one that cannot be looked at.
    Other,
}

/// How a loop device is to be set up. It lets go of the file at its last close, and is
/// read-only, but for that over a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopOptions {
    /// What it is for.
    pub role: LoopRole,
    /// Read the file around the page cache.
    pub direct_io: bool,
}

impl LoopOptions {
    /// True where it takes writes.
    pub fn is_writable(&self) -> bool {
        self.role == LoopRole::Store
    }

    /// Where in the file it starts: a store has a header of ours.
    pub fn offset(&self) -> u64 {
        if self.role == LoopRole::Store { STORE_OFFSET } else { 0 }
    }
}

/// A loop device that is held open.
pub trait LoopHandle {
    /// Its numbers.
    fn number(&self) -> DeviceNumber;
    /// Its size.
    fn size(&self) -> Sectors;
    /// The kernel reads the file around the page cache, as was asked.
    fn direct_io(&self) -> bool;
    /// As in [`LoopInfo::generation`].
    fn generation(&self) -> Option<u64>;
    /// Has the file written to its disk, as far as the loop device has taken writes.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&self) -> io::Result<()>;
}

/// A device that is open to be read, by several threads.
pub trait DeviceReader: Send + Sync {
    /// Fills the buffer with what lies on the device from `offset` on, both multiples of
    /// 512.
    ///
    /// # Errors
    /// The device can't be read there.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// Which of udev's rules are to pass over a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdevRules {
    /// Everything: blkid, LVM, links under /dev/disk.
    Publish,
    /// A node under /dev/mapper and a systemd unit, nothing that looks into the device.
    HideContent,
    /// As little as can be.
    Hide,
}

/// Tells which device is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceId<'a> {
    /// The one of this name.
    Name(&'a str),
    /// The one of this UUID.
    Uuid(&'a str),
    /// The one of these numbers.
    Number(DeviceNumber),
}

/// Gives the lines of a table to its argument, one by one; what they are made of is resolved
/// meanwhile, perhaps on a thread that may do nothing else.
pub type Lines<'a> = dyn FnMut(&mut dyn FnMut(&TableLine) -> Result<()>) -> Result<()> + Send + 'a;

/// What imgdm wants of the machine.
///
/// Dropping a [`Node`](Self::Node) or a [`Loop`](Self::Loop) closes it, and with that
/// removes a device that is marked for deferred removal, or clears the loop.
pub trait Kernel {
    /// While it lives, no other imgdm builds or cleans up.
    type Lock;
    /// A device-mapper device that is held open.
    type Node;
    /// A loop device that is held open.
    type Loop: LoopHandle;

    /// Makes sure that device-mapper, the loop driver and these targets are there,
    /// loading modules and making control nodes where they are missing.
    ///
    /// # Errors
    /// [`ErrorKind::KernelLacks`], naming what is missing.
    fn prepare(&self, targets: &[&str]) -> Result<()>;

    /// Waits until no other imgdm builds or cleans up.
    ///
    /// # Errors
    /// It took too long, or `interrupt` came.
    fn lock(&self, interrupt: &Interrupt<'_>) -> Result<Self::Lock>;

    /// Before a build: sees to it that the devices of this attachment which hold nothing
    /// yet go even when this process is killed. It ends with the returned guard.
    ///
    /// # Errors
    /// What the system says.
    fn guard(&self, lock: &Self::Lock, uuids: &[String]) -> Result<Box<dyn Guard>>;

    /// Bytes of memory that can be had without swapping, where anybody knows.
    fn available_memory(&self) -> Option<u64>;

    /// All device-mapper devices.
    ///
    /// # Errors
    /// What the system says.
    fn devices(&self) -> Result<Vec<DeviceInfo>>;

    /// One device-mapper device; none where it is not there.
    ///
    /// # Errors
    /// What the system says.
    fn device(&self, id: DeviceId<'_>) -> Result<Option<DeviceInfo>>;

    /// The devices that the live table of this one lies on.
    ///
    /// # Errors
    /// What the system says.
    fn dependencies(&self, id: DeviceId<'_>) -> Result<Vec<DeviceNumber>>;

    /// The devices that lie on this one.
    ///
    /// # Errors
    /// What the system says.
    fn dependents(&self, number: DeviceNumber) -> Result<Vec<DeviceNumber>>;

    /// The live table.
    ///
    /// # Errors
    /// What the system says.
    fn live_table(&self, uuid: &str) -> Result<Box<dyn Iterator<Item = LiveLine>>>;

    /// What the targets of the live table say of their state.
    ///
    /// # Errors
    /// What the system says.
    fn live_status(&self, uuid: &str) -> Result<Vec<LiveLine>>;

    /// Makes a device without a table.
    ///
    /// # Errors
    /// What the system says.
    fn create(&self, name: &DmName, uuid: &DmUuid) -> Result<DeviceNumber>;

    /// Loads a table of `count` lines as the inactive one. It decides whether the device
    /// takes writes.
    ///
    /// # Errors
    /// What the system or `lines` says.
    fn load(&self, uuid: &str, access: Access, count: u64, lines: &mut Lines<'_>) -> Result<()>;

    /// Hands a key to the kernel's keyring, under a description by which a table can name
    /// it; where there is no keyring, the key itself comes back, for the table's own line.
    ///
    /// # Errors
    /// What the system says.
    fn store_key(&self, description: &str, key: &VolumeKey) -> Result<CryptKey>;

    /// Takes a key out of the keyring again. Tables that were loaded have a copy.
    fn forget_key(&self, key: &CryptKey);

    /// Makes the inactive table the live one.
    ///
    /// # Errors
    /// What the system says.
    fn resume(&self, uuid: &str, rules: UdevRules) -> Result<()>;

    /// Opens a device for reading.
    ///
    /// # Errors
    /// What the system says.
    fn open(&self, number: DeviceNumber) -> Result<Self::Node>;

    /// Has a device that is open removed at its last close.
    ///
    /// # Errors
    /// What the system says.
    fn defer_removal(&self, uuid: &str) -> Result<()>;

    /// Takes that back.
    ///
    /// # Errors
    /// What the system says.
    fn cancel_deferred_removal(&self, uuid: &str) -> Result<()>;

    /// Removes a device; `Ok(false)` where it is open or not there.
    ///
    /// # Errors
    /// What the system says.
    fn remove(&self, uuid: &str) -> Result<bool>;

    /// True once a device-mapper device has let go of all it lay on.
    fn is_gone(&self, number: DeviceNumber, uuid: &str) -> bool;

    /// Binds a free loop device to a file, with the very descriptor that is given.
    ///
    /// # Errors
    /// What the system says.
    fn set_up_loop(&self, file: &File, options: &LoopOptions) -> Result<Self::Loop>;

    /// A sealed file of zeros in memory.
    ///
    /// # Errors
    /// What the system says.
    fn zeros(&self, length: ByteLen) -> Result<File>;

    /// What a loop device is bound to; none where it is to nothing or is no loop.
    ///
    /// # Errors
    /// What the system says.
    fn loop_info(&self, number: DeviceNumber) -> Result<Option<LoopInfo>>;

    /// The loop devices of ours that are bound, found without opening any.
    ///
    /// # Errors
    /// What the system says.
    fn loops(&self) -> Result<Vec<DeviceNumber>>;

    /// Opens a loop device that is bound, so that it is cleared no earlier.
    ///
    /// # Errors
    /// What the system says.
    fn open_loop(&self, number: DeviceNumber) -> Result<Self::Loop>;

    /// True once the loop has let go of what it was bound to at `generation`.
    fn loop_is_clear(&self, number: DeviceNumber, generation: Option<u64>) -> bool;

    /// Size and logical block size of a block device.
    ///
    /// # Errors
    /// What the system says.
    fn block_device(&self, number: DeviceNumber) -> Result<(Sectors, u32)>;

    /// Opens a device-mapper or loop device to read what it gives now: of what the page
    /// cache has of the device from before, nothing.
    ///
    /// # Errors
    /// What the system says.
    fn reader(&self, number: DeviceNumber) -> Result<Arc<dyn DeviceReader>>;

    /// A path by which a block device can be opened: a loop device, or what lies below a
    /// device without one.
    fn block_device_path(&self, number: DeviceNumber) -> PathBuf;

    /// A moment, to tell udev's records from before it.
    fn now(&self) -> u64;

    /// Waits until udev has done its part, or does it where there is no udev; then
    /// opens /dev/mapper/NAME. Records of udev from before `since` do not count; without
    /// it udev is not waited for.
    ///
    /// # Errors
    /// The path cannot be opened in the end, or `interrupt` came.
    fn publish(
        &self,
        name: &str,
        number: DeviceNumber,
        since: Option<u64>,
        interrupt: &Interrupt<'_>,
    ) -> Result<PathBuf>;

    /// Takes /dev/mapper/NAME away where udev does not: a stale one would mean another
    /// device one day.
    fn unpublish(&self, name: &str, number: DeviceNumber);

    /// Who has a block device open or mounted, in words.
    fn holders(&self, number: DeviceNumber) -> Vec<String>;

    /// Calls `done` again and again until it is true or the time is over; tells which.
    fn wait(&self, patience: Duration, done: &mut dyn FnMut() -> bool) -> bool;
}

/// Watches over a build; see [`Kernel::guard`]. Dropping it ends the watch.
pub trait Guard {}

/// A signal that asks to stop, looked at between steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interrupt<'a>(Option<&'a AtomicUsize>);

impl<'a> Interrupt<'a> {
    /// The flag holds the signal's number, 0 as long as none came.
    pub fn new(flag: &'a AtomicUsize) -> Self {
        Self(Some(flag))
    }

    /// Never interrupts.
    pub fn never() -> Self {
        Self(None)
    }

    /// Goes on, or not.
    ///
    /// # Errors
    /// [`ErrorKind::Interrupted`] once a signal came.
    pub fn check(&self) -> Result<()> {
        match self.0.map_or(0, |flag| flag.load(Ordering::Relaxed)) {
            0 => Ok(()),
            signal => {
                let signal = i32::try_from(signal).unwrap_or_default();
                Err(Error::new(ErrorKind::Interrupted(signal)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn device_numbers_keep_large_minors() {
        let number = DeviceNumber { major: 253, minor: 0x1_2345 };
        assert_eq!(DeviceNumber::from_dev(number.to_dev()), number);
        // huge_encode_dev(253:0x12345)
        assert_eq!(DeviceNumber::from_kernel(0x45 | 253 << 8 | 0x1_2300 << 12), number);
    }

    #[test]
    fn the_loops_mark_limits_no_file() {
        // XFS takes files of 8 EiB less one byte; nobody has one within 1 TiB of that.
        const { assert!(LOOP_SIZE_LIMIT < 1 << 63 && LOOP_SIZE_LIMIT > (1 << 63) - (1 << 40)) };
        assert!(include_str!("../../udev/59-imgdm.rules").contains(&LOOP_SIZE_LIMIT.to_string()));
    }

    #[test]
    fn a_mark_of_deletion_can_be_part_of_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x (deleted)");
        std::fs::write(&path, "x").unwrap();
        let id = FileId::of_path(&path).unwrap();
        let mut raw = path.as_os_str().as_bytes().to_vec();
        raw.push(b'\n');
        let found = LoopPath::read(&raw, id);
        assert_eq!((found.path.as_path(), found.state), (path.as_path(), PathState::Same));
        let other = FileId { inode: id.inode + 1, ..id };
        let found = LoopPath::read(&raw, other);
        assert_eq!(found.path, directory.path().join("x"));
        assert_eq!(found.state, PathState::Deleted);
        assert_eq!(LoopPath::read(b"/nowhere\n\n", id).path, Path::new("/nowhere\n"));
    }
}
