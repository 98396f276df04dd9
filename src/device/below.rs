//! What a file lies on: the block devices of its file system, and all below them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};

use super::mountinfo::{Mount, mounts};
use super::{DeviceNumber, PathState, loops};

/// File systems and devices on each other, at most.
const MAX_STEPS: usize = 4096;

/// Block devices that something lies on, directly or through others: partitions, devices of
/// device-mapper and MD, loop devices and what their files lie on, all layers of an overlay
/// file system.
#[derive(Debug, Default)]
pub struct Below {
    devices: BTreeSet<DeviceNumber>,
    /// Some of it lies on a file system that no mount here shows: as the root of a live system,
    /// an overlay of what was mounted before it.
    on_unseen: bool,
}

/// What is yet to be looked at.
enum Step {
    Device(DeviceNumber),
    /// A file system, as it is mounted somewhere; the device number of its files, should that
    /// mount not be to be seen.
    Mount(u64, DeviceNumber),
    /// A file system, by the device number of its files: of btrfs and overlay that is none of
    /// the file system.
    FileSystem(DeviceNumber),
    Path(PathBuf),
    /// A file system that no mount here shows.
    Unseen,
}

impl Below {
    /// All that the file or directory at `path` lies on. What can't be looked at is passed
    /// over.
    pub fn of_path(path: &Path) -> Self {
        let mut below = Self::default();
        below.add(Step::Path(path.to_owned()));
        below
    }

    /// All that an open file lies on.
    pub fn of_file(file: &File) -> Self {
        let mut below = Self::default();
        if let Some(step) = look(file.as_fd(), Path::new("")) {
            below.add(step);
        }
        below
    }

    /// All that this process's program and libraries lie on.
    pub fn of_program() -> Self {
        let mut below = Self::of_path(Path::new("/proc/self/exe"));
        entries(Path::new("/proc/self/map_files")).for_each(|file| below.add(Step::Path(file)));
        below
    }

    /// All that memory is swapped to.
    pub fn of_swap() -> Self {
        let mut below = Self::default();
        let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
        for line in swaps.lines().skip(1) {
            let path = line.split_whitespace().next().unwrap_or_default();
            below.add(Step::Path(super::mountinfo::unescape(path.as_bytes())));
        }
        below
    }

    /// Whether this device is among them, or may be: something lies on a file system that is not
    /// to be seen, and one that is not to be seen has the device, which is at `path`.
    pub fn has(&self, number: DeviceNumber, path: &Path) -> bool {
        self.devices.contains(&number) || self.on_unseen && is_held_by_unseen(number, path)
    }

    fn add(&mut self, first: Step) {
        let all = mounts("self").unwrap_or_default();
        let (mut steps, mut seen) = (vec![first], BTreeSet::new());
        for _ in 0..MAX_STEPS {
            match steps.pop() {
                None => break,
                Some(Step::Path(path)) => steps.extend(look(CWD, &path)),
                Some(Step::Device(number)) => {
                    if self.devices.insert(number) {
                        steps.extend(below_device(number));
                    }
                }
                Some(Step::Mount(id, number)) => match all.iter().find(|mount| mount.id == id) {
                    Some(mount) => {
                        if seen.insert(mount.number) {
                            steps.extend(below_mount(mount));
                        }
                    }
                    None => steps.push(Step::FileSystem(number)),
                },
                Some(Step::FileSystem(number)) => match seen.insert(number) {
                    true if sysfs(number, "").exists() => steps.push(Step::Device(number)),
                    true => {
                        let known = all.iter().find(|mount| mount.number == number);
                        let is_other = |mount: &&Mount| match known {
                            Some(known) => mount.id == known.id,
                            None => matches!(mount.driver.as_str(), "btrfs" | "overlay"),
                        };
                        steps.extend(all.iter().filter(is_other).flat_map(below_mount));
                        steps.extend(known.is_none().then_some(Step::Unseen));
                    }
                    false => {}
                },
                Some(Step::Unseen) => self.on_unseen = true,
            }
        }
    }
}

/// What a file or directory lies on directly. Its mount tells of more file systems than the
/// device number that it has.
fn look(directory: BorrowedFd<'_>, path: &Path) -> Option<Step> {
    let wanted = StatxFlags::MNT_ID | StatxFlags::BASIC_STATS;
    let found = rustix::fs::statx(directory, path, AtFlags::EMPTY_PATH, wanted).ok()?;
    let number = |major, minor| DeviceNumber { major, minor };
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::BlockDevice => {
            Some(Step::Device(number(found.stx_rdev_major, found.stx_rdev_minor)))
        }
        FileType::RegularFile | FileType::Directory => {
            Some(Step::Mount(found.stx_mnt_id, number(found.stx_dev_major, found.stx_dev_minor)))
        }
        // What goes through a pipe, a socket or a terminal lies nowhere.
        _ => None,
    }
}

fn below_mount(mount: &Mount) -> Vec<Step> {
    let mut steps = Vec::new();
    if sysfs(mount.number, "").exists() {
        steps.push(Step::Device(mount.number));
    }
    let device = mount.device();
    if device != mount.number {
        let all = if mount.driver == "btrfs" { btrfs_devices(device) } else { Vec::new() };
        steps.extend(all.into_iter().chain([device]).map(Step::Device));
    }
    for layer in &mount.layers {
        // A path of another mount namespace, or from a directory that nobody knows.
        let is_known = layer.is_absolute() && layer.exists();
        steps.push(if is_known { Step::Path(layer.clone()) } else { Step::Unseen });
    }
    steps
}

/// Whether what holds a device is neither a mount that is seen here nor another device.
fn is_held_by_unseen(number: DeviceNumber, path: &Path) -> bool {
    let is_of = |mount: &Mount| mount.number == number || mount.device() == number;
    let has_holders = entries(&sysfs(number, "holders")).next().is_some();
    !has_holders
        && !mounts("self").unwrap_or_default().iter().any(is_of)
        && super::nodes::is_held(number, path)
}

fn sysfs(number: DeviceNumber, attribute: &str) -> PathBuf {
    format!("/sys/dev/block/{number}/{attribute}").into()
}

/// The number in a `dev` file of sysfs.
fn number_in(path: &Path) -> Option<DeviceNumber> {
    super::live::parse_number(fs::read_to_string(path).ok()?.trim())
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn below_device(number: DeviceNumber) -> Vec<Step> {
    let slaves =
        entries(&sysfs(number, "slaves")).filter_map(|slave| number_in(&slave.join("dev")));
    let mut steps: Vec<_> = slaves.map(Step::Device).collect();
    if sysfs(number, "partition").exists() {
        steps.extend(number_in(&sysfs(number, "../dev")).map(Step::Device));
    }
    if loops::is_loop(number)
        && let Ok(Some(info)) = loops::info(number)
    {
        let device = DeviceNumber::from_dev(info.file.device);
        let path = info.path.filter(|path| path.state == PathState::Same);
        steps.push(match (info.file.inode, path) {
            (0, _) => Step::Device(device),
            (_, Some(path)) => Step::Path(path.path),
            (_, None) => Step::FileSystem(device),
        });
    }
    steps
}

/// All devices of the btrfs that has this one.
fn btrfs_devices(number: DeviceNumber) -> Vec<DeviceNumber> {
    let numbers = |file_system: PathBuf| -> Vec<_> {
        let devices = entries(&file_system.join("devices"));
        devices.filter_map(|device| number_in(&device.join("dev"))).collect()
    };
    let all = entries(Path::new("/sys/fs/btrfs")).map(numbers);
    all.into_iter().find(|numbers| numbers.contains(&number)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_file_lies_on_its_file_systems_device_or_on_none() {
        assert!(Below::of_path(Path::new("/proc/self/stat")).devices.is_empty());
        assert!(Below::of_path(Path::new("/nowhere")).devices.is_empty());
        assert!(Below::of_file(&File::open("/proc/self/stat").unwrap()).devices.is_empty());
        let (pipe, _writer) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        assert!(look(pipe.as_fd(), Path::new("")).is_none());
        let here = Below::of_path(Path::new(env!("CARGO_MANIFEST_DIR")));
        let device = fs::metadata(env!("CARGO_MANIFEST_DIR")).unwrap().dev();
        let number = DeviceNumber::from_dev(device);
        assert_eq!(here.devices.contains(&number), sysfs(number, "").exists());
    }
}
