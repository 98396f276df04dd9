//! Patching bytes of a qcow2 image, to make what QEMU's tools do not make.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::images::open_to_patch;
use super::process::Outcome;

/// Offsets of header fields (docs/interop/qcow2.txt of QEMU).
pub(crate) const VERSION: u64 = 4;
pub(crate) const BACKING_OFFSET: u64 = 8;
pub(crate) const BACKING_LENGTH: u64 = 16;
pub(crate) const CLUSTER_BITS: u64 = 20;
pub(crate) const SIZE: u64 = 24;
pub(crate) const CRYPT_METHOD: u64 = 32;
pub(crate) const L1_ENTRIES: u64 = 36;
pub(crate) const L1_OFFSET: u64 = 40;
pub(crate) const REFCOUNT_OFFSET: u64 = 48;
pub(crate) const SNAPSHOTS: u64 = 60;
pub(crate) const SNAPSHOTS_OFFSET: u64 = 64;
pub(crate) const INCOMPATIBLE: u64 = 72;
pub(crate) const REFCOUNT_ORDER: u64 = 96;
pub(crate) const HEADER_LENGTH: u64 = 100;

/// Types of header extensions.
pub(crate) const BACKING_FORMAT: u32 = 0xe279_2aca;
pub(crate) const FEATURE_NAMES: u32 = 0x6803_f857;

/// The bits of an L1 or L2 entry that hold an offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// A qcow2 file to be read and patched in place.
pub(crate) struct Patch {
    file: File,
}

impl Patch {
    pub(crate) fn open(path: &Path) -> Outcome<Self> {
        Ok(Self { file: open_to_patch(path)? })
    }

    pub(crate) fn bytes<const N: usize>(&self, at: u64) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        self.file
            .read_exact_at(&mut bytes, at)
            .map_err(|error| format!("reading {N} bytes at {at:#x}: {error}"))?;
        Ok(bytes)
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) -> Outcome {
        self.file.write_all_at(bytes, at).map_err(|error| format!("writing at {at:#x}: {error}"))
    }

    pub(crate) fn u64(&self, at: u64) -> Outcome<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    pub(crate) fn u32(&self, at: u64) -> Outcome<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    pub(crate) fn put_u64(&self, at: u64, value: u64) -> Outcome {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn put_u32(&self, at: u64, value: u32) -> Outcome {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn length(&self) -> Outcome<u64> {
        Ok(self.file.metadata().map_err(|error| error.to_string())?.len())
    }

    pub(crate) fn set_length(&self, length: u64) -> Outcome {
        self.file.set_len(length).map_err(|error| error.to_string())
    }

    pub(crate) fn cluster(&self) -> Outcome<u64> {
        Ok(1 << self.u32(CLUSTER_BITS)?)
    }

    /// Where the L1 entry for that guest byte is in the file.
    pub(crate) fn l1_entry(&self, guest: u64) -> Outcome<u64> {
        let cluster = self.cluster()?;
        Ok(self.u64(L1_OFFSET)? + guest / (cluster * (cluster / 8)) * 8)
    }

    /// Where the L2 entry (of 8 bytes) for that guest byte is in the file.
    pub(crate) fn l2_entry(&self, guest: u64) -> Outcome<u64> {
        let cluster = self.cluster()?;
        let table = self.u64(self.l1_entry(guest)?)? & OFFSET_MASK;
        if table == 0 {
            return Err(format!("guest byte {guest:#x} has no L2 table"));
        }
        Ok(table + guest / cluster % (cluster / 8) * 8)
    }

    /// The header extensions: type, offset of the data, length.
    pub(crate) fn extensions(&self) -> Outcome<Vec<(u32, u64, u32)>> {
        let mut at = match self.u32(VERSION)? {
            2 => 72,
            _ => u64::from(self.u32(HEADER_LENGTH)?),
        };
        let mut found = Vec::new();
        loop {
            let (kind, length) = (self.u32(at)?, self.u32(at + 4)?);
            if kind == 0 {
                return Ok(found);
            }
            found.push((kind, at + 8, length));
            at += 8 + u64::from(length).next_multiple_of(8);
        }
    }

    /// Makes an extension one that nobody knows.
    pub(crate) fn forget_extension(&self, kind: u32) -> Outcome {
        let (_, at, _) = *self
            .extensions()?
            .iter()
            .find(|extension| extension.0 == kind)
            .ok_or(format!("there is no header extension {kind:#x}"))?;
        self.put_u32(at - 8, 0x696d_6764)
    }
}

/// Copies a file over another.
///
/// # Errors
/// It can't be read or written.
pub(crate) fn copy(from: &Path, to: &Path) -> Outcome {
    fs::copy(from, to)
        .map(drop)
        .map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))
}
