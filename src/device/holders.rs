//! Who holds locks on a file: F_OFD_GETLK names no process, but /proc shows the locks of
//! each open descriptor.

use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use super::{DeviceNumber, loop_node};
use crate::error::printable;
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
    /// A loop device over the file: the locks of an attached image are its, with no process
    /// behind. Which bytes, the kernel does not show.
    Loop(PathBuf),
}

impl Holder {
    /// Whether it holds a lock on that byte, or may.
    pub fn may_hold(&self, byte: u64) -> bool {
        match self {
            Self::Process { locks, .. } => {
                locks.iter().any(|&(first, last)| first <= byte && last.is_none_or(|l| byte <= l))
            }
            Self::Loop(_) => true,
        }
    }
}

/// Those who hold OFD locks on the file, this process left out, and the loop devices over
/// it. A process of another user or in another PID namespace stays unseen.
pub fn holders(file: FileId) -> Vec<Holder> {
    let mut found = Vec::new();
    for (pid, directory) in numbered(Path::new("/proc")) {
        if pid == process::id() {
            continue;
        }
        let mut locks = Vec::new();
        for (number, path) in numbered(&directory.join("fd")) {
            if FileId::of_path(&path) != Some(file) {
                continue;
            }
            let info = directory.join("fdinfo").join(number.to_string());
            locks.extend(fs::read_to_string(info).iter().flat_map(|text| ofd_locks(text)));
        }
        if !locks.is_empty() {
            let command = fs::read_to_string(directory.join("comm")).unwrap_or_default();
            let command = printable(command.trim_end_matches('\n'));
            found.push(Holder::Process { pid, command, locks });
        }
    }
    found.extend(loops_over(file).into_iter().map(Holder::Loop));
    found
}

/// The entries of a directory that are named by a number.
fn numbered(directory: &Path) -> Vec<(u32, PathBuf)> {
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

fn loops_over(file: FileId) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(path) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        // Only the line's own end: a name may have others.
        let path = path.strip_suffix('\n').unwrap_or(&path);
        if FileId::of_path(Path::new(path)) != Some(file) {
            continue;
        }
        let number = fs::read_to_string(entry.path().join("dev")).ok();
        let number = number.as_deref().and_then(|text| text.trim().split_once(':'));
        if let Some((Ok(major), Ok(minor))) = number.map(|(a, b)| (a.parse(), b.parse())) {
            found.push(loop_node(DeviceNumber { major, minor }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
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
    fn our_own_locks_are_nobodys() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = crate::source::Source::open(file.path()).unwrap();
        crate::lock::lock(&source, crate::lock::Sharing::Readers).unwrap();
        assert_eq!(holders(source.id().unwrap()), []);
    }
}
