//! What lies on a partition or a bare disk: file systems, swap, members of LVM, RAID and
//! the like, by their superblocks.
//!
//! Type, label and UUID are those that libblkid gives (util-linux:
//! libblkid/src/superblocks), for the kinds of [`probe`]. Superblocks are a stranger's:
//! every read is bounded, and what contradicts itself is passed over.

mod containers;
mod fat;
mod linux;
mod others;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::partition::Disk;
use crate::units::{ByteLen, GuestOffset, GuestRange};
use crate::worker::apart;

pub(crate) use others::ntfs_volume_flags;

/// What something is for (libblkid's `USAGE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A file system.
    Filesystem,
    /// A member of a RAID or of a volume group.
    Raid,
    /// Encrypted.
    Crypto,
    /// Swap space, an external journal.
    Other,
}

impl Usage {
    /// libblkid's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filesystem => "filesystem",
            Self::Raid => "raid",
            Self::Crypto => "crypto",
            Self::Other => "other",
        }
    }
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// libblkid's `TYPE`, like `ext4`.
    pub kind: &'static str,
    /// What it is for.
    pub usage: Usage,
    /// Its label, of a stranger's choosing.
    pub label: Option<String>,
    /// Its UUID or serial number, as libblkid writes it.
    pub uuid: Option<String>,
}

impl Signature {
    fn new(kind: &'static str, usage: Usage) -> Self {
        Self { kind, usage, label: None, uuid: None }
    }

    fn filesystem(kind: &'static str) -> Self {
        Self::new(kind, Usage::Filesystem)
    }

    fn with_label(mut self, label: String) -> Self {
        self.label = Some(label).filter(|label| !label.is_empty());
        self
    }

    fn with_uuid(mut self, bytes: &[u8; 16]) -> Self {
        // libblkid says nothing of an empty one.
        self.uuid = (*bytes != [0; 16]).then(|| uuid(bytes));
        self
    }

    fn with_serial(mut self, serial: String) -> Self {
        self.uuid = Some(serial);
        self
    }
}

/// Most bytes of directories that are searched for the label of one file system.
const MAX_DIRECTORIES: u64 = 1 << 20;
/// Bytes that a read of a directory counts as, at least: small ones take as long.
const LEAST_COUNTED: u64 = 4096;

/// What may be read of directories, which are a chain of a stranger's making, on one disk:
/// 16 MiB. Where it is used up, labels of FAT and exFAT file systems stay unknown.
#[derive(Debug)]
pub struct Budget(u64);

impl Default for Budget {
    fn default() -> Self {
        Self(16 * MAX_DIRECTORIES)
    }
}

/// Finds what lies in `range` of a disk; `None` for nothing that is known. Where several
/// could be meant, containers (RAID, LVM, encryption) go before file systems.
///
/// # Errors
/// What reading the disk says, where nothing is found without what can't be read.
pub fn probe(disk: &mut dyn Disk, range: GuestRange) -> Result<Option<Signature>> {
    probe_within(disk, range, &mut Budget::default())
}

/// As [`probe`], for one of many places on a disk, which share the budget.
///
/// # Errors
/// As [`probe`].
pub fn probe_within(
    disk: &mut dyn Disk,
    range: GuestRange,
    budget: &mut Budget,
) -> Result<Option<Signature>> {
    const PROBERS: [Prober; 20] = [
        containers::linux_raid,
        containers::lvm2,
        containers::luks,
        containers::bitlocker,
        fat::vfat,
        containers::swap,
        linux::xfs,
        linux::ext,
        linux::reiserfs,
        linux::jfs,
        others::iso9660,
        others::hfs,
        others::ntfs,
        linux::squashfs,
        linux::btrfs,
        linux::nilfs2,
        fat::exfat,
        linux::f2fs,
        others::apfs,
        linux::erofs,
    ];
    let mut area = Area::new(disk, range);
    let allowed = area.directories.min(budget.0);
    area.directories = allowed;
    let found = apart(|| first_of(&PROBERS, &mut area))?;
    budget.0 = budget.0.saturating_sub(allowed - area.directories);
    match (found, area.unreadable) {
        (None, Some(error)) => Err(error),
        (found, _) => Ok(found),
    }
}

type Prober = fn(&mut Area<'_>) -> Result<Option<Signature>>;

/// What the first prober that knows it says.
fn first_of(probers: &[Prober], area: &mut Area<'_>) -> Result<Option<Signature>> {
    for prober in probers {
        if let Some(found) = prober(area)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// True for a disk that is an exFAT or NTFS file system from its first sector on.
pub(crate) fn is_exfat_or_ntfs(disk: &mut dyn Disk) -> Result<bool> {
    whole_disk_is(&[fat::exfat, others::ntfs], disk)
}

/// True for a disk that is a physical volume of LVM from its first sector on.
pub(crate) fn is_physical_volume(disk: &mut dyn Disk) -> Result<bool> {
    whole_disk_is(&[containers::lvm2], disk)
}

fn whole_disk_is(probers: &[Prober], disk: &mut dyn Disk) -> Result<bool> {
    let end = GuestOffset::new(disk.size().get());
    let mut area = Area::new(disk, GuestRange::new(GuestOffset::ZERO, end));
    Ok(first_of(probers, &mut area)?.is_some())
}

/// The part of a disk that is looked at.
pub(crate) struct Area<'d> {
    disk: &'d mut dyn Disk,
    range: GuestRange,
    /// Bytes of directories that may still be read.
    directories: u64,
    /// Why the first of what can't be read can't.
    unreadable: Option<Error>,
}

impl<'d> Area<'d> {
    /// That part of that disk.
    pub(crate) fn new(disk: &'d mut dyn Disk, range: GuestRange) -> Self {
        Self { disk, range, directories: MAX_DIRECTORIES, unreadable: None }
    }

    /// Bytes of it.
    fn size(&self) -> u64 {
        self.range.length().get()
    }

    /// The `N` bytes from `offset` on; `None` where it ends before, or they can't be read.
    pub(crate) fn read<const N: usize>(&mut self, offset: u64) -> Result<Option<[u8; N]>> {
        let mut bytes = [0; N];
        Ok(self.fill(offset, &mut bytes)?.then_some(bytes))
    }

    /// The part of a directory at `offset` that is `length` bytes long, as far as the area and
    /// the budget go; empty where that is nowhere.
    fn directory(&mut self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let length = length.min(self.size().saturating_sub(offset)).min(self.directories) / 32 * 32;
        self.directories = self.directories.saturating_sub(length.max(LEAST_COUNTED));
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
        let is_there = !bytes.is_empty() && self.fill(offset, &mut bytes)?;
        Ok(if is_there { bytes } else { Vec::new() })
    }

    /// Fills `buffer` from `offset` on; false where the area ends before, or can't be read.
    fn fill(&mut self, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        let inside = offset.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.size());
        if !inside {
            return Ok(false);
        }
        let at: GuestOffset = self.range.start.saturating_add(ByteLen::new(offset));
        match self.disk.read(at, buffer) {
            Ok(()) => Ok(true),
            Err(error) if error.is_interruption() => Err(error),
            Err(error) => {
                self.unreadable.get_or_insert(error);
                Ok(false)
            }
        }
    }
}

/// A UUID in the usual notation.
pub(crate) fn uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&index) {
            text.push('-');
        }
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Text up to a NUL, without the space at its ends that libblkid cuts off.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).trim_end().to_owned()
}

/// UTF-16 up to a NUL.
fn utf16(units: impl Iterator<Item = u16>) -> String {
    let text: String = char::decode_utf16(units.take_while(|&unit| unit != 0))
        .map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect();
    text.trim_end().to_owned()
}

fn utf16_le(bytes: &[u8]) -> String {
    utf16(bytes.as_chunks::<2>().0.iter().map(|&unit| u16::from_le_bytes(unit)))
}

fn utf16_be(bytes: &[u8]) -> String {
    utf16(bytes.as_chunks::<2>().0.iter().map(|&unit| u16::from_be_bytes(unit)))
}
