//! Who holds locks on a file: F_OFD_GETLK names no process, but /proc shows the locks of
//! each open descriptor.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use super::{DeviceNumber, LOOP_SIZE_LIMIT, LoopPath, PathState, loop_node};
use crate::error::printable;
use crate::lock::readers_bytes;
use crate::source::FileId;

/// Somebody who has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process that can be looked into: root sees all, others see their own.
    Process {
        /// Its ID.
        pid: u32,
        /// The kernel's short name of it.
        command: String,
        /// The bytes of the file that it holds OFD locks on: first and last. None without
        /// an end.
        locks: Vec<(u64, Option<u64>)>,
    },
    /// A loop device of ours over the file: the locks of an attached image are its, with no
    /// process behind. Which bytes, the kernel does not show: no others than a reader's.
    Loop(PathBuf),
}

impl Holder {
    /// Whether it holds a lock on that byte, or may.
    pub fn may_hold(&self, byte: u64) -> bool {
        match self {
            Self::Process { locks, .. } => {
                locks.iter().any(|&(first, last)| first <= byte && last.is_none_or(|l| byte <= l))
            }
            Self::Loop(_) => readers_bytes().any(|its| its == byte),
        }
    }
}

/// Those who hold OFD locks on the file, this process left out, and our loop devices over
/// it; those of others take no locks. A process of another user or in another PID namespace stays unseen.
pub fn holders(file: FileId) -> Vec<Holder> {
    let mut found = Vec::new();
    for (pid, directory) in numbered(Path::new("/proc")) {
        if pid == process::id() {
            continue;
        }
        let locks = locks_of(&directory, |path| FileId::of_path(path) == Some(file));
        if !locks.is_empty() {
            let command = fs::read_to_string(directory.join("comm")).unwrap_or_default();
            let command = printable(command.trim_end_matches('\n'));
            found.push(Holder::Process { pid, command, locks });
        }
    }
    found.extend(loops_over(file, Path::new("/sys/block")).into_iter().map(Holder::Loop));
    found
}

/// The OFD locks of a process on the file that `is_it` knows. That asks the descriptor's file
/// system, where a dead NFS or FUSE server never answers: so only of those with locks.
fn locks_of(process: &Path, is_it: impl Fn(&Path) -> bool) -> Vec<(u64, Option<u64>)> {
    let mut found = Vec::new();
    for (number, info) in numbered(&process.join("fdinfo")) {
        // No more than the kernel's own words: text.
        let locks = fs::read_to_string(info).map(|text| ofd_locks(&text)).unwrap_or_default();
        if !locks.is_empty() && is_it(&process.join("fd").join(number.to_string())) {
            found.extend(locks);
        }
    }
    found
}

/// The entries of a directory that are named by a number.
pub(super) fn numbered(directory: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let number =
        |entry: fs::DirEntry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()));
    entries.filter_map(number).collect()
}

/// The OFD locks in the text of a /proc/PID/fdinfo/N, whose lines look like
/// `lock:   1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 100`.
fn ofd_locks(text: &str) -> Vec<(u64, Option<u64>)> {
    let lock = |line: &str| {
        let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(1);
        if words.next()? != "OFDLCK" {
            return None;
        }
        let mut range = words.skip(4);
        let first = range.next()?.parse().ok()?;
        let last = match range.next()? {
            "EOF" => None,
            last => Some(last.parse().ok()?),
        };
        Some((first, last))
    };
    text.lines().filter_map(lock).collect()
}

/// Our loop devices over the file. Those of others are passed over unasked: their file may be
/// on a dead mount.
fn loops_over(file: FileId, block: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(block).into_iter().flatten().flatten() {
        let attribute = |name: &str| fs::read(entry.path().join(name)).ok();
        let text = |name: &str| attribute(name).and_then(|bytes| String::from_utf8(bytes).ok());
        let limit = text("loop/sizelimit").and_then(|text| text.trim().parse().ok());
        if limit != Some(LOOP_SIZE_LIMIT) {
            continue;
        }
        let path = attribute("loop/backing_file").map(|raw| LoopPath::read(&raw, file));
        if path.is_none_or(|path| path.state != PathState::Same) {
            continue;
        }
        let number = text("dev");
        let number = number.as_deref().and_then(|text| text.trim().split_once(':'));
        if let Some((Ok(major), Ok(minor))) = number.map(|(a, b)| (a.parse(), b.parse())) {
            found.push(loop_node(DeviceNumber { major, minor }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn the_locks_of_a_descriptor_are_read() {
        let text = "pos:\t0\nflags:\t02100000\nmnt_id:\t25\n\
            lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 101\n\
            lock:\t2: POSIX  ADVISORY  WRITE 12 fe:00:1234 7 8\n\
            lock:\t3: OFDLCK  ADVISORY  READ -1 fe:00:1234 203 EOF\n";
        let locks = ofd_locks(text);
        assert_eq!(locks, [(100, Some(101)), (203, None)]);
        let holder = Holder::Process { pid: 1, command: String::new(), locks };
        let held: Vec<_> = (99..206).filter(|&byte| holder.may_hold(byte)).collect();
        assert_eq!(held, [100, 101, 203, 204, 205]);
    }

    #[test]
    fn only_descriptors_with_locks_are_looked_at() {
        let process = tempfile::tempdir().unwrap();
        fs::create_dir(process.path().join("fdinfo")).unwrap();
        for (number, text) in [
            ("3", "pos:\t0\n"),
            ("4", "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:1234 100 100\n"),
            ("5", "lock:\t1: POSIX  ADVISORY  READ 12 fe:00:1234 100 100\n"),
        ] {
            fs::write(process.path().join("fdinfo").join(number), text).unwrap();
        }
        let asked = std::cell::RefCell::new(Vec::new());
        let is_it = |path: &Path| {
            asked.borrow_mut().push(path.to_owned());
            true
        };
        assert_eq!(locks_of(process.path(), is_it), [(100, Some(100))]);
        assert_eq!(asked.into_inner(), [process.path().join("fd/4")]);
        assert_eq!(locks_of(process.path(), |_| false), []);
    }

    #[test]
    fn a_loop_of_ours_is_found_whatever_its_files_name_and_holds_a_readers_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join(OsStr::from_bytes(b"a\xff\n"));
        fs::write(&image, b"x").unwrap();
        let file = FileId::of_path(&image).unwrap();
        let block = directory.path().join("block");
        // Major number 0 is nobody's.
        for (name, limit, number) in [("loop0", LOOP_SIZE_LIMIT, "0:77\n"), ("loop1", 0, "0:78\n")]
        {
            let device = block.join(name);
            fs::create_dir_all(device.join("loop")).unwrap();
            let line = [image.as_os_str().as_bytes(), b"\n"].concat();
            fs::write(device.join("loop/backing_file"), line).unwrap();
            fs::write(device.join("loop/sizelimit"), format!("{limit}\n")).unwrap();
            fs::write(device.join("dev"), number).unwrap();
        }
        let found = loops_over(file, &block);
        assert_eq!(found, [Path::new("/dev/loop77")]);
        let holder = Holder::Loop(found[0].clone());
        let held: Vec<_> = (0..300).filter(|&byte| holder.may_hold(byte)).collect();
        assert_eq!(held, [100, 201, 202, 203]);
    }

    #[test]
    fn our_own_locks_are_nobodys() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = crate::source::Source::open(file.path()).unwrap();
        crate::lock::lock(&source, crate::lock::Sharing::Readers).unwrap();
        assert_eq!(holders(source.id().unwrap()), []);
    }
}
