//! Whether a file system was left with changes that are not at their places yet. Mounted
//! without a replay of the journal, it shows the state before those.
//!
//! Only flags that superblocks have for it, and of XFS the end of its log: what is cheap to
//! read. Superblocks are a stranger's: what makes no sense is taken for clean.

use std::fmt;

use super::xfs_log;
use crate::error::Result;
use crate::partition::{Disk, be32, le16, le32, le64};
use crate::signature::{Area, ntfs_volume_flags};
use crate::units::GuestRange;
use crate::worker::apart;

/// How a file system was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unclean {
    /// Its journal has changes that are to be replayed.
    Journal,
    /// It was not unmounted, or is marked as having errors.
    NotUnmounted,
}

impl fmt::Display for Unclean {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Journal => {
                "its journal holds changes that were not written to their places yet. It is not replayed: what is seen is the state without them, and files and directories that were being changed can look damaged"
            }
            Self::NotUnmounted => {
                "it is marked as not cleanly unmounted (or as having errors): what was written last may be missing, and can look damaged"
            }
        })
    }
}

/// How the file system of libblkid's type `kind` in `range` was left; `None` for a clean one,
/// and for kinds that have no mark of it.
///
/// # Errors
/// What reading the disk says.
pub fn unclean(disk: &mut dyn Disk, range: GuestRange, kind: &str) -> Result<Option<Unclean>> {
    apart(|| look(Area::new(disk, range), kind))
}

fn look(mut area: Area<'_>, kind: &str) -> Result<Option<Unclean>> {
    match kind {
        "ext2" | "ext3" | "ext4" => ext(&mut area),
        "xfs" => {
            let is_clean = xfs_log::is_clean(&mut area)?;
            Ok((is_clean == Some(false)).then_some(Unclean::Journal))
        }
        "btrfs" => btrfs(&mut area),
        "f2fs" => f2fs(&mut area),
        "ntfs" => {
            const DIRTY: u16 = 1;
            let flags = ntfs_volume_flags(&mut area)?;
            Ok(flags.filter(|flags| flags & DIRTY != 0).map(|_| Unclean::NotUnmounted))
        }
        "vfat" => vfat(&mut area),
        "exfat" => {
            // VolumeDirty of VolumeFlags.
            flag(&mut area, 106, |flags: [u8; 2]| u16::from_le_bytes(flags) & 2 != 0)
        }
        // s_state is FM_CLEAN.
        "jfs" => flag(&mut area, (32 << 10) + 40, |state: [u8; 4]| state != [0; 4]),
        // s_state has NILFS_VALID_FS.
        "nilfs2" => flag(&mut area, 1024 + 116, |state: [u8; 2]| state[0] & 1 == 0),
        // s_umount_state is REISERFS_VALID_FS.
        "reiserfs" => flag(&mut area, (64 << 10) + 50, |state: [u8; 2]| state != [1, 0]),
        "hfsplus" => {
            // kHFSVolumeUnmountedBit; a wrapped volume has its header elsewhere.
            flag(&mut area, 1024, |start: [u8; 8]| {
                matches!(&start[..2], b"H+" | b"HX") && be32(&start, 4) & 0x100 == 0
            })
        }
        _ => Ok(None),
    }
}

/// [`Unclean::NotUnmounted`] where the bytes at `offset` say so.
fn flag<const N: usize>(
    area: &mut Area<'_>,
    offset: u64,
    is_unclean: impl Fn([u8; N]) -> bool,
) -> Result<Option<Unclean>> {
    Ok(area.read(offset)?.filter(|&bytes| is_unclean(bytes)).map(|_| Unclean::NotUnmounted))
}

fn ext(area: &mut Area<'_>) -> Result<Option<Unclean>> {
    const RECOVER: u32 = 0x4;
    const VALID: u16 = 1;
    const ERRORS: u16 = 2;
    let Some(superblock) = area.read::<136>(1024)? else { return Ok(None) };
    let state = le16(&superblock, 58);
    Ok(if le32(&superblock, 96) & RECOVER != 0 {
        Some(Unclean::Journal)
    } else if state & VALID == 0 || state & ERRORS != 0 {
        Some(Unclean::NotUnmounted)
    } else {
        None
    })
}

/// A log tree is there until the next full commit: what fsync wrote since the last one.
fn btrfs(area: &mut Area<'_>) -> Result<Option<Unclean>> {
    let log_root = area.read::<8>((64 << 10) + 0x60)?;
    Ok(log_root.filter(|root| *root != [0; 8]).map(|_| Unclean::Journal))
}

/// The valid checkpoint is the newer of two; only unmounting writes one with this flag.
fn f2fs(area: &mut Area<'_>) -> Result<Option<Unclean>> {
    const UNMOUNTED: u32 = 1;
    let Some(superblock) = area.read::<128>(1024)? else { return Ok(None) };
    let (block_shift, segment_shift) = (le32(&superblock, 16), le32(&superblock, 20));
    let first = u64::from(le32(&superblock, 76));
    if block_shift != 12 || segment_shift > 16 || first == 0 {
        return Ok(None);
    }
    let mut newest = None;
    for place in [first, first + (1 << segment_shift)] {
        let Some(checkpoint) = area.read::<136>(place << block_shift)? else { continue };
        let (version, flags) = (le64(&checkpoint, 0), le32(&checkpoint, 132));
        if newest.is_none_or(|(known, _)| version > known) {
            newest = Some((version, flags));
        }
    }
    Ok(newest.filter(|(_, flags)| flags & UNMOUNTED == 0).map(|_| Unclean::Journal))
}

/// The dirty bit that Windows and Linux set while it is mounted for writing.
fn vfat(area: &mut Area<'_>) -> Result<Option<Unclean>> {
    const DIRTY: u8 = 1;
    let Some(boot) = area.read::<512>(0)? else { return Ok(None) };
    let is_32 = le16(&boot, 22) == 0;
    let state = if is_32 { boot[0x41] } else { boot[0x25] };
    Ok((state & DIRTY != 0).then_some(Unclean::NotUnmounted))
}
