//! What fstab mounts where, and which requirements of images would go round in a circle by
//! it: a service that waits for the mount of its own device never ends waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use imgdm::imgdmtab::{self, Entry};

use super::units;

/// The mounts of fstab.
#[derive(Debug, Default)]
pub(crate) struct Mounts {
    /// Mount point to what has to be there first: devices, and paths on other mounts.
    at: BTreeMap<PathBuf, Vec<PathBuf>>,
}

impl Mounts {
    /// Of fstab's text. What is no path (`UUID=`, the place of swap space) is passed over.
    pub(crate) fn parse(text: &[u8]) -> Self {
        let mut mounts = Self::default();
        for fields in text.split(|&byte| byte == b'\n').filter_map(imgdmtab::fields) {
            let mut fields = fields.into_iter().map(imgdmtab::unescape);
            let Some(source) = fields.next().map(PathBuf::from) else { continue };
            let point = fields.next().map(PathBuf::from).unwrap_or_default();
            let options = fields.nth(1).unwrap_or_default();
            let options = options.to_string_lossy();
            let beside = options.split(',').filter_map(|option| {
                Some(PathBuf::from(option.strip_prefix("x-systemd.requires-mounts-for=")?))
            });
            let needs = mounts.at.entry(point).or_default();
            needs.extend(std::iter::once(source).chain(beside).filter(|path| path.is_absolute()));
        }
        mounts
    }

    /// The devices that are mounted.
    pub(crate) fn devices(&self) -> impl Iterator<Item = &PathBuf> {
        self.at.values().flatten().filter(|path| is_device(path))
    }

    /// The devices whose mounts `RequiresMountsFor=` a path waits for: at it, above it, and
    /// where what is mounted there (`bind`) lies on another mount in turn.
    fn devices_for<'a>(&'a self, path: &'a Path) -> BTreeSet<&'a Path> {
        let mut devices = BTreeSet::new();
        let mut seen = BTreeSet::from([path]);
        let mut left = vec![path];
        while let Some(path) = left.pop() {
            let needs = path.ancestors().filter_map(|above| self.at.get(above)).flatten();
            for need in needs.map(PathBuf::as_path) {
                if is_device(need) {
                    devices.insert(need);
                } else if seen.insert(need) {
                    left.push(need);
                }
            }
        }
        devices
    }
}

fn is_device(path: &Path) -> bool {
    path.starts_with("/dev")
}

/// The directories for scratch files, each with the line of its entry, whose mounts wait for
/// that very entry: for its device, or for that of another which waits for it.
pub(crate) fn circular(entries: &[&Entry], mounts: &Mounts) -> BTreeSet<(usize, PathBuf)> {
    let mounted: BTreeSet<_> = mounts.devices().cloned().collect();
    let mut owners = BTreeMap::new();
    for entry in entries {
        owners.extend(units::paths(entry, &mounted).into_iter().map(|path| (path, entry.line)));
    }
    let owners_for = |path: &Path| -> BTreeSet<usize> {
        let itself = owners.get(path).copied();
        let below = mounts.devices_for(path);
        below.into_iter().filter_map(|device| owners.get(device).copied()).chain(itself).collect()
    };
    let mut waits: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut scratch = Vec::new();
    for entry in entries {
        let mut needs = owners_for(&entry.image);
        for path in units::other_paths(entry) {
            needs.extend(owners_for(&path));
        }
        for path in units::scratch_paths(entry) {
            let of_path = owners_for(&path);
            needs.extend(&of_path);
            scratch.push((entry.line, path, of_path));
        }
        waits.insert(entry.line, needs);
    }
    // Those that a line waits for, itself included, and in turn; few are asked for.
    let mut known: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
    let mut reaches = |from: usize, to: usize| {
        let reached = known.entry(from).or_insert_with(|| {
            let mut reached = BTreeSet::from([from]);
            let mut left = vec![from];
            while let Some(line) = left.pop() {
                let next = waits.get(&line).into_iter().flatten().copied();
                left.extend(next.filter(|&line| reached.insert(line)));
            }
            reached
        });
        reached.contains(&to)
    };
    scratch.retain(|(line, _, of_path)| of_path.iter().any(|&other| reaches(other, *line)));
    scratch.into_iter().map(|(line, path, _)| (line, path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn circles(tab: &str, fstab: &str) -> Vec<(usize, PathBuf)> {
        let tab = imgdmtab::Tab::parse(tab.as_bytes());
        assert!(tab.errors.is_empty(), "{:?}", tab.errors);
        let entries: Vec<_> = tab.entries.iter().collect();
        circular(&entries, &Mounts::parse(fstab.as_bytes())).into_iter().collect()
    }

    #[test]
    fn what_lies_on_the_own_device_is_circular() {
        let tmp = |line| (line, PathBuf::from("/var/tmp"));
        let tab = "a /i - partition=1,lv=vg/x\nother /o\n";
        for device in [
            "/dev/mapper/a",
            "/dev/disk/by-imgdm/a",
            "/dev/mapper/a1",
            "/dev/disk/by-imgdm/a-part1",
            "/dev/mapper/a-x",
        ] {
            for point in ["/var/tmp", "/var", "/var//tmp/", "/"] {
                let fstab = format!("{device} {point} ext4 ro 0 0\n");
                assert_eq!(circles(tab, &fstab), [tmp(1)], "{fstab}");
            }
        }
        for fstab in [
            "",
            "/dev/mapper/a /var/tmpfiles ext4 ro 0 0",
            "/dev/mapper/a /var/tmp/below ext4 ro 0 0",
            "/dev/sda1 /var/tmp ext4 rw 0 0",
            "/dev/mapper/a none swap sw 0 0",
            "UUID=0 /var/tmp ext4 ro 0 0",
        ] {
            assert_eq!(circles(tab, fstab), [], "{fstab}");
        }
        let fstab = "/dev/mapper/a2 /var auto ro 0 0";
        assert_eq!(circles("a /i\n", fstab), []);
        assert_eq!(circles("a /i - partitions\n", fstab), [tmp(1)]);
        assert_eq!(circles("a /i - compressed=refuse\n", "/dev/mapper/a /var auto ro 0 0"), []);
    }

    #[test]
    fn directories_that_are_named_count_as_well() {
        let tab = "a /i - scratch-dir=/fast/s,compressed=cache,cache-dir=/kept\nb /j - cache\n";
        let fstab = "/dev/mapper/a /fast auto ro 0 0\n/dev/mapper/b /var/cache auto ro 0 0\n";
        let found = circles(tab, fstab);
        assert_eq!(found, [(1, "/fast/s".into()), (2, "/var/cache/imgdm".into())]);
    }

    #[test]
    fn circles_lead_over_other_mounts_and_other_images() {
        let tmp = |line| (line, PathBuf::from("/var/tmp"));
        // By what is bound there, and what an option asks for.
        let fstab = "/dev/mapper/a /m auto ro 0 0\n/m/tmp /var/tmp none bind 0 0\n";
        assert_eq!(circles("a /i\n", fstab), [tmp(1)]);
        let fstab = "/dev/mapper/a /m auto ro 0 0\n\
                     x /var/tmp tmpfs rw,x-systemd.requires-mounts-for=/m 0 0\n";
        assert_eq!(circles("a /i\n", fstab), [tmp(1)]);
        // a lies on b, which would wait for a; c may wait.
        let fstab = "/dev/mapper/a /var auto ro 0 0\n/dev/mapper/b /b auto ro 0 0\n";
        assert_eq!(circles("a /b/i\nb /i\nc /j\n", fstab), [tmp(1), tmp(2)]);
        // The image is the other's device.
        let fstab = "/dev/mapper/a /var/tmp auto ro 0 0\n";
        let tab = "a /dev/mapper/b - compressed=refuse\nb /i\n";
        assert_eq!(circles(tab, fstab), [tmp(2)]);
        // Mounts that lead to each other end the search, too.
        let fstab = "/x /var/tmp none bind 0 0\n/var/tmp /x none bind 0 0\n";
        assert_eq!(circles("a /i\n", fstab), []);
    }
}
