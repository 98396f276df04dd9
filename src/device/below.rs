//! What a file lies on: the block devices of its file system, and all below them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::mountinfo::{Mount, mounts};
use super::{DeviceNumber, loops, nodes};

/// File systems and devices on each other, at most.
const MAX_STEPS: usize = 4096;

/// Block devices that something lies on, directly or through others: partitions, devices of
/// device-mapper and MD, loop devices and what their files lie on, all layers of an overlay
/// file system.
#[derive(Debug, Default)]
pub struct Below {
    devices: BTreeSet<DeviceNumber>,
    mounts: Option<Vec<Mount>>,
}

/// What is yet to be looked at.
enum Step {
    Device(DeviceNumber),
    /// A file system, by the device number of its files.
    FileSystem(DeviceNumber),
    Path(PathBuf),
}

impl Below {
    /// All that the file or directory at `path` lies on. What can't be looked at is passed
    /// over.
    pub fn of_path(path: &Path) -> Self {
        let mut below = Self::default();
        below.add(Step::Path(path.to_owned()));
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

    /// Whether this device is among them.
    pub fn has(&self, number: DeviceNumber) -> bool {
        self.devices.contains(&number)
    }

    fn add(&mut self, first: Step) {
        let (mut steps, mut seen) = (vec![first], BTreeSet::new());
        for _ in 0..MAX_STEPS {
            match steps.pop() {
                None => break,
                Some(Step::Path(path)) => {
                    let Ok(metadata) = fs::metadata(&path) else { continue };
                    steps.push(match nodes::number_at(&path) {
                        Some(number) => Step::Device(number),
                        None => Step::FileSystem(DeviceNumber::from_dev(metadata.dev())),
                    });
                }
                Some(Step::Device(number)) => {
                    if self.devices.insert(number) {
                        steps.extend(below_device(number));
                    }
                }
                Some(Step::FileSystem(number)) => {
                    if seen.insert(number) {
                        steps.extend(self.below_file_system(number));
                    }
                }
            }
        }
    }

    fn below_file_system(&mut self, number: DeviceNumber) -> Vec<Step> {
        if sysfs(number, "").exists() {
            return vec![Step::Device(number)];
        }
        // The number is none of a device: btrfs, overlay, network, memory.
        let all = self.mounts.get_or_insert_with(|| mounts("self").unwrap_or_default());
        let mut steps = Vec::new();
        for mount in all.iter().filter(|mount| mount.number == number) {
            steps.extend(mount.layers.iter().cloned().map(Step::Path));
            let device = mount.device();
            if device != number {
                let all = if mount.driver == "btrfs" { btrfs_devices(device) } else { Vec::new() };
                steps.extend(all.into_iter().chain([device]).map(Step::Device));
            }
        }
        steps
    }
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
        steps.push(match info.file.inode {
            0 => Step::Device(device),
            _ => Step::FileSystem(device),
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
    use super::*;

    #[test]
    fn a_file_lies_on_its_file_systems_device_or_on_none() {
        assert!(Below::of_path(Path::new("/proc/self/stat")).devices.is_empty());
        assert!(Below::of_path(Path::new("/nowhere")).devices.is_empty());
        let here = Below::of_path(Path::new(env!("CARGO_MANIFEST_DIR")));
        let device = fs::metadata(env!("CARGO_MANIFEST_DIR")).unwrap().dev();
        let number = DeviceNumber::from_dev(device);
        assert_eq!(here.has(number), sysfs(number, "").exists());
    }
}
