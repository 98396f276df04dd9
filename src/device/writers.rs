//! Who can write to a file or block device at this moment, whatever locks they take or do
//! not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use nix::libc;
use nix::sys::statfs::{FsType, fstatfs};

use super::holders::numbered;
use super::linux::{bound_loops, mounted};
use super::{DeviceNumber, loops, sys};
use crate::error::printable;
use crate::source::{FileId, Source};

/// File systems that give leases by what their server granted, not by who has the file open
/// (NFS, SMB, CIFS): linux/magic.h.
const LEASES_OF_SERVERS: [i64; 4] = [0x6969, 0x517b, 0xff53_4d42, 0xfe53_4d42];

/// Who can write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CanWrite {
    /// Nobody on this machine.
    Nobody,
    /// Somebody: those that can be found, in words.
    Somebody(Vec<String>),
    /// The file system does not tell.
    Unknown,
}

/// Who has the file open for writing, or uses the block device so that it can be written to:
/// processes, writable devices and loop devices over it, mounts, swap. A writable partition,
/// and of a partition the disk, is the device itself.
pub fn can_write(source: &Source) -> CanWrite {
    let (Some(file), Some(id)) = (source.file(), source.id()) else { return CanWrite::Nobody };
    if source.is_block_device() {
        let found = writers_of_device(DeviceNumber::from_dev(id.device));
        return if found.is_empty() { CanWrite::Nobody } else { CanWrite::Somebody(found) };
    }
    let is_of_server = fstatfs(file).is_ok_and(|it| is_of_server(it.filesystem_type()));
    let named = || {
        let mut found: Vec<_> = loops_over(&[id].into()).collect();
        found.extend(processes(&[id].into()));
        found
    };
    match sys::writers(file) {
        sys::Writers::Nobody => CanWrite::Nobody,
        sys::Writers::Somebody if !is_of_server => CanWrite::Somebody(named()),
        _ => match named() {
            found if found.is_empty() => CanWrite::Unknown,
            found => CanWrite::Somebody(found),
        },
    }
}

fn is_of_server(kind: FsType) -> bool {
    // Its width is the architecture's.
    #[allow(clippy::unnecessary_cast, reason = "it is 32 bits wide elsewhere")]
    let kind = kind.0 as i64 & 0xffff_ffff;
    LEASES_OF_SERVERS.contains(&kind)
}

fn writers_of_device(number: DeviceNumber) -> Vec<String> {
    let mut numbers = vec![number];
    let directory = PathBuf::from(format!("/sys/dev/block/{number}"));
    let inside = fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.path());
    for partition in inside.filter(|path| path.join("partition").exists()) {
        numbers.extend(number_in(&partition));
    }
    if directory.join("partition").exists() {
        numbers.extend(number_in(&directory.join("..")));
    }
    let ids: BTreeSet<_> =
        numbers.iter().map(|number| FileId { device: number.to_dev(), inode: 0 }).collect();
    let mut found: Vec<_> = numbers.iter().flat_map(|&number| devices_on(number)).collect();
    found.extend(loops_over(&ids));
    for &number in &numbers {
        let mounts = mounted(number).into_iter().filter(|mount| mount.writable);
        found.extend(
            mounts.map(|mount| format!("the mount {}", printable(&mount.point.to_string_lossy()))),
        );
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let swaps = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    found.extend(
        swaps
            .filter(|path| FileId::of_path(Path::new(path)).is_some_and(|id| ids.contains(&id)))
            .map(|path| format!("swap on {}", printable(path))),
    );
    found.extend(processes(&ids));
    found
}

fn number_in(directory: &Path) -> Option<DeviceNumber> {
    let text = fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn is_writable(disk: &Path) -> bool {
    fs::read_to_string(disk.join("ro")).is_ok_and(|text| text.trim() == "0")
}

/// Writable devices that stand on a block device: device-mapper's, MD's and others.
fn devices_on(number: DeviceNumber) -> Vec<String> {
    let holders = fs::read_dir(format!("/sys/dev/block/{number}/holders"));
    let holders = holders.into_iter().flatten().flatten().filter(|it| is_writable(&it.path()));
    holders
        .map(|holder| match fs::read_to_string(holder.path().join("dm/name")) {
            Ok(name) => format!("the device '{}'", printable(name.trim_end())),
            Err(_) => format!("the device {}", printable(&holder.file_name().to_string_lossy())),
        })
        .collect()
}

/// Writable loop devices over any of these.
fn loops_over(ids: &BTreeSet<FileId>) -> impl Iterator<Item = String> {
    bound_loops()
        .filter(|(name, _)| is_writable(&Path::new("/sys/block").join(name)))
        .filter(|(_, number)| {
            loops::info(*number).is_ok_and(|info| info.is_some_and(|it| ids.contains(&it.file)))
        })
        .map(|(name, _)| format!("the loop device /dev/{name}"))
}

/// Other processes that have any of these open for writing.
fn processes(ids: &BTreeSet<FileId>) -> Vec<String> {
    let mut found = Vec::new();
    for (pid, directory) in numbered(Path::new("/proc")) {
        let writes = pid != process::id()
            && numbered(&directory.join("fdinfo")).iter().any(|(number, info)| {
                let text = fs::read_to_string(info).unwrap_or_default();
                may_write_to(&text, ids)
                    && FileId::of_path(&directory.join("fd").join(number.to_string()))
                        .is_some_and(|id| ids.contains(&id))
            });
        if writes {
            let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", printable(name.trim_end())));
        }
    }
    found
}

/// Whether the text of a /proc/PID/fdinfo/N is of a descriptor open for writing on what may
/// be one of these: to ask the descriptor itself is to ask its file system, where a dead
/// server never answers.
fn may_write_to(text: &str, ids: &BTreeSet<FileId>) -> bool {
    let field = |name: &str| {
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let flags = field("flags").and_then(|flags| libc::c_int::from_str_radix(flags, 8).ok());
    let is_open_for_writing = flags.is_some_and(|flags| {
        flags & libc::O_ACCMODE != libc::O_RDONLY && flags & libc::O_PATH == 0
    });
    // Linux 5.14 on; of a block device's node it is another.
    let inode = field("ino").and_then(|inode| inode.parse::<u64>().ok());
    let may_be = |id: &FileId| id.inode == 0 || inode.is_none_or(|inode| inode == id.inode);
    is_open_for_writing && ids.iter().any(may_be)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_only_reads_or_is_of_another_file_can_not_write() {
        let ids = |inode| BTreeSet::from([FileId { device: 1, inode }]);
        let text = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t2\nino:\t7\n");
        assert!(may_write_to(&text("0100002"), &ids(7)));
        assert!(may_write_to(&text("01"), &ids(0)));
        assert!(!may_write_to(&text("0100000"), &ids(7)));
        assert!(!may_write_to(&text("010000002"), &ids(7)), "O_PATH");
        assert!(!may_write_to(&text("02"), &ids(8)));
        assert!(may_write_to("flags:\t02\n", &ids(8)), "before Linux 5.14");
    }

    #[test]
    fn one_who_has_a_file_open_for_writing_is_found_until_it_is_closed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = Source::open(file.path()).unwrap();
        if sys::writers(source.file().unwrap()) == sys::Writers::Unknown {
            return; // No leases on this file system.
        }
        assert!(matches!(can_write(&source), CanWrite::Somebody(_)));
        let path = file.into_temp_path();
        assert_eq!(can_write(&source), CanWrite::Nobody);
        drop(path);
    }
}
