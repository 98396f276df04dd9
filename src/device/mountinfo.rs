//! What is mounted where, as /proc/PID/mountinfo has it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{DeviceNumber, nodes};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Its number, as statx(2) gives it.
    pub id: u64,
    /// The device's numbers; btrfs shows some of its own.
    pub number: DeviceNumber,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The driver.
    pub driver: String,
    /// What is mounted: of a file system on a block device its path.
    pub source: PathBuf,
    /// The file system can be written to, if perhaps not through this mount.
    pub writable: bool,
    /// The directories that an overlay file system is made of.
    pub layers: Vec<PathBuf>,
}

impl Mount {
    /// Reads a line; `None` where it is no such line.
    fn parse(line: &[u8]) -> Option<Self> {
        // ID, parent, major:minor, root, mount point, options, tags ... - type, source, options
        // of the file system.
        let mut fields = line.split(|&byte| byte == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let number = std::str::from_utf8(fields.nth(1)?).ok()?;
        let (major, minor) = number.split_once(':')?;
        let number = DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? };
        let point = unescape(fields.nth(1)?);
        fields.find(|field| field == b"-")?;
        let driver = String::from_utf8_lossy(fields.next()?).into_owned();
        let source = unescape(fields.next()?);
        let options = fields.next().unwrap_or_default().split(|&byte| byte == b',');
        let writable = options.clone().any(|option| option == b"rw");
        let layers = if driver == "overlay" { layers(options) } else { Vec::new() };
        Some(Self { id, number, point, driver, source, writable, layers })
    }

    /// The block device that it is of, where it is of one.
    pub fn device(&self) -> DeviceNumber {
        // btrfs shows a number of its own: its source tells.
        let source = self.source.starts_with("/dev/").then(|| nodes::number_at(&self.source));
        source.flatten().unwrap_or(self.number)
    }

    /// Whether it shows the file system on that block device.
    pub fn is_of(&self, number: DeviceNumber) -> bool {
        self.number == number || self.device() == number
    }
}

/// The directories in the options of an overlay file system.
fn layers<'o>(options: impl Iterator<Item = &'o [u8]>) -> Vec<PathBuf> {
    const KEYS: [&[u8]; 5] = [b"lowerdir", b"lowerdir+", b"datadir+", b"upperdir", b"workdir"];
    let mut found = Vec::new();
    for option in options {
        let Some(at) = option.iter().position(|&byte| byte == b'=') else { continue };
        if !KEYS.contains(&&option[..at]) {
            continue;
        }
        let paths = option[at + 1..].split(|&byte| byte == b':').filter(|path| !path.is_empty());
        found.extend(paths.map(unescape));
    }
    found
}

/// Undoes the octal escapes.
pub(super) fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match octal {
            Some(value) => {
                out.push(value);
                rest = &after[3..];
            }
            None => {
                out.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsStr::from_bytes(&out))
}

/// What the process (`self`, or a number) sees mounted, in the order of mounting.
///
/// # Errors
/// It can't be read.
pub fn mounts(process: &str) -> io::Result<Vec<Mount>> {
    let list = fs::read(Path::new("/proc").join(process).join("mountinfo"))?;
    Ok(list.split(|&byte| byte == b'\n').filter_map(Mount::parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_its_escapes_and_any_number_of_tags() {
        let line =
            b"36 35 98:0 /mnt1 /mnt\\040a\\134b rw,noatime master:1 shared:2 - ext3 /dev/root rw";
        let mount = Mount::parse(line).unwrap();
        assert_eq!(mount.id, 36);
        assert_eq!(mount.number, DeviceNumber { major: 98, minor: 0 });
        assert_eq!(mount.point, Path::new("/mnt a\\b"));
        assert_eq!(
            (mount.driver.as_str(), mount.source.as_path()),
            ("ext3", Path::new("/dev/root"))
        );
        assert!(mount.writable);
        let read_only = b"36 35 98:0 / /mnt rw - ext4 /dev/root ro,errors=continue";
        assert!(!Mount::parse(read_only).unwrap().writable);
        let bare = b"1 0 0:2 / / rw - rootfs rootfs rw";
        assert_eq!(Mount::parse(bare).unwrap().point, Path::new("/"));
        let overlay =
            b"1 0 0:30 / / rw - overlay none ro,lowerdir=/a\\040b::/c,upperdir=/u,index=on";
        let layers = ["/a b", "/c", "/u"].map(PathBuf::from);
        assert_eq!(Mount::parse(overlay).unwrap().layers, layers);
        assert_eq!(Mount::parse(b""), None);
        assert_eq!(Mount::parse(b"1 0 0:2 / / rw"), None);
    }

    #[test]
    fn escapes_that_are_cut_off_stay_as_they_are() {
        assert_eq!(unescape(b"a\\04"), Path::new("a\\04"));
        assert_eq!(unescape(b"\\999"), Path::new("\\999"));
    }
}
