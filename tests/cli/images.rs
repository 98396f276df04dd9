//! Small images written byte by byte, the same on every machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub(crate) const CLUSTER: usize = 65536;

/// Runs imgdm in `directory`.
pub(crate) fn imgdm(directory: &Path, arguments: &[&str]) -> Output {
    command(directory, arguments).output().unwrap()
}

pub(crate) fn command(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imgdm"));
    command.args(arguments).current_dir(directory);
    command
}

/// A qcow2 version 3 image of 1 MiB: header, refcount table, L1 and L2 table, then data.
pub(crate) struct Qcow2 {
    pub(crate) bytes: Vec<u8>,
}

impl Qcow2 {
    pub(crate) fn new() -> Self {
        let mut image = Self { bytes: vec![0; 4 * CLUSTER] };
        image.put(0, b"QFI\xfb\0\0\0\x03");
        image.put(20, &16u32.to_be_bytes());
        image.put(24, &(1u64 << 20).to_be_bytes());
        image.put(36, &1u32.to_be_bytes());
        image.put(40, &(2 * CLUSTER as u64).to_be_bytes());
        image.put(48, &(CLUSTER as u64).to_be_bytes());
        image.put(56, &1u32.to_be_bytes());
        image.put(96, &4u32.to_be_bytes());
        image.put(100, &104u32.to_be_bytes());
        image.put(2 * CLUSTER, &(3 * CLUSTER as u64).to_be_bytes());
        image
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Cluster `guest` of the disk gets data.
    pub(crate) fn data(mut self, guest: usize) -> Self {
        let at = self.bytes.len() as u64;
        self.bytes.resize(self.bytes.len() + CLUSTER, b'x');
        self.put(3 * CLUSTER + guest * 8, &(at | 1 << 63).to_be_bytes());
        self
    }

    /// Cluster `guest` of the disk becomes this L2 entry.
    pub(crate) fn entry(mut self, guest: usize, entry: u64) -> Self {
        self.put(3 * CLUSTER + guest * 8, &entry.to_be_bytes());
        self
    }

    pub(crate) fn backing(mut self, name: &Path, format: Option<&str>) -> Self {
        let mut at = 104;
        if let Some(format) = format {
            self.put(at, &0xe279_2acau32.to_be_bytes());
            self.put(at + 4, &u32::try_from(format.len()).unwrap().to_be_bytes());
            self.put(at + 8, format.as_bytes());
            at += 8 + format.len().next_multiple_of(8);
        }
        let name = name.as_os_str().as_bytes();
        let name_at = at + 8;
        self.put(8, &(name_at as u64).to_be_bytes());
        self.put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
        self.put(name_at, name);
        self
    }

    pub(crate) fn write(&self, directory: &Path, name: &str) -> PathBuf {
        let path = directory.join(name);
        fs::write(&path, &self.bytes).unwrap();
        path
    }
}

/// `top.qcow2` over `base.raw` in a new directory.
pub(crate) fn chain() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![b'b'; 8 * CLUSTER]).unwrap();
    Qcow2::new()
        .backing(Path::new("base.raw"), Some("raw"))
        .data(1)
        .data(2)
        .entry(4, 1)
        .data(9)
        .write(directory.path(), "top.qcow2");
    directory
}
