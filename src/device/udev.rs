//! What udev has done with a device, and which rules it has.
//!
//! No cookie semaphore is waited for, as libdevmapper does: that wait has no end where
//! `dmsetup` is missing, and a kill leaves the semaphore behind. udev's own record of
//! the device tells the same, and its age that it is not of an earlier device.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use super::{DeviceNumber, LOOP_SIZE_LIMIT};

/// Where rules are, the strongest first (udev(7)).
const RULE_DIRECTORIES: [&str; 5] = [
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
];

/// Where udev takes orders.
const CONTROL: &str = "/run/udev/control";

/// True where udev runs.
pub fn is_running() -> bool {
    Path::new(CONTROL).exists() && !is_abandoned(Path::new(CONTROL))
}

/// True for a socket that nobody listens at any more: it outlives a udev that was killed.
/// Where somebody does, no connection comes about, for theirs is of another type.
fn is_abandoned(socket: &Path) -> bool {
    let connected = UnixDatagram::unbound().and_then(|ours| ours.connect(socket));
    connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The file of that name which counts: the one in the strongest directory, where an empty
/// one, as a link to /dev/null, masks those below.
fn rule_file(name: &OsStr) -> Option<PathBuf> {
    let paths = RULE_DIRECTORIES.iter().map(|directory| Path::new(directory).join(name));
    let first = paths.into_iter().find(|path| path.symlink_metadata().is_ok())?;
    fs::metadata(&first).is_ok_and(|m| m.is_file() && m.len() > 0).then_some(first)
}

/// True where udev has device-mapper's rules, without which it makes no links in
/// /dev/mapper.
pub fn has_device_mapper_rules() -> bool {
    ["55-dm.rules", "10-dm.rules"].iter().any(|name| rule_file(OsStr::new(name)).is_some())
}

/// True where a rule tells udev to keep away from our loop devices (any rule that names
/// their size limit, so under any file name).
pub fn hides_our_loops() -> bool {
    let mark = LOOP_SIZE_LIMIT.to_string();
    let has_mark = |path: &Path| {
        fs::read(path).is_ok_and(|rules| {
            rules.split(|&byte| byte == b'\n').any(|line| {
                !line.trim_ascii_start().starts_with(b"#")
                    && line.windows(mark.len()).any(|part| part == mark.as_bytes())
            })
        })
    };
    RULE_DIRECTORIES.iter().any(|directory| {
        fs::read_dir(directory).into_iter().flatten().flatten().any(|entry| {
            let path = entry.path();
            path.extension().is_some_and(|e| e == "rules")
                && rule_file(&entry.file_name()).as_ref() == Some(&path)
                && has_mark(&path)
        })
    })
}

/// True where udev runs and will look into our loop devices: raw images then show the
/// guest's file systems to the host. `attach` warns of it.
pub fn looks_into_loops() -> bool {
    is_running() && !hides_our_loops()
}

/// What udev noted of a device (/run/udev/data/bMAJOR:MINOR).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Record {
    /// When it first dealt with the device, in microseconds of CLOCK_MONOTONIC.
    initialized: u64,
    /// The event was one of device-mapper's resumes, and its rules dealt with it.
    activated: bool,
}

impl Record {
    /// The record of a device; none where udev has dealt with none of these numbers.
    pub(crate) fn of(number: DeviceNumber) -> Option<Self> {
        Some(Self::parse(&fs::read(format!("/run/udev/data/b{number}")).ok()?))
    }

    fn parse(record: &[u8]) -> Self {
        let mut parsed = Self::default();
        for line in record.split(|&byte| byte == b'\n') {
            if let Some(time) = line.strip_prefix(b"I:") {
                let time = std::str::from_utf8(time).ok().and_then(|time| time.parse().ok());
                parsed.initialized = time.unwrap_or(0);
            }
            parsed.activated |= line == b"E:DM_UDEV_PRIMARY_SOURCE_FLAG=1";
        }
        parsed
    }

    /// It is of a device that came after `since` and was resumed.
    pub(crate) fn is_done(&self, since: u64) -> bool {
        self.activated && self.initialized >= since
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_outlived_its_owner_is_abandoned() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(!is_abandoned(&path));
        drop(listener);
        assert!(path.exists() && is_abandoned(&path));
        std::fs::remove_file(&path).unwrap();
        assert!(!is_abandoned(&path));
    }

    #[test]
    fn records_of_an_earlier_device_do_not_count() {
        let record = Record::parse(
            b"S:mapper/x\nI:1000\nE:DM_UDEV_PRIMARY_SOURCE_FLAG=1\nE:DM_NAME=x\nG:systemd\n",
        );
        assert!(record.is_done(1000));
        assert!(!record.is_done(1001));
        // The `add` event, before the device was resumed.
        assert!(!Record::parse(b"I:1000\nE:DM_UDEV_DISABLE_DISK_RULES_FLAG=1\n").is_done(0));
    }
}
