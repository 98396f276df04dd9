//! File systems of Linux.

use super::{Area, Signature, Usage, text, utf16_le};
use crate::error::Result;
use crate::format::bytes_at;
use crate::partition::{be16, be32, le16, le32};

/// ext2, ext3, ext4, and an external journal of them.
pub(super) fn ext(area: &mut Area<'_>) -> Result<Option<Signature>> {
    const JOURNAL: u32 = 0x4;
    const JOURNAL_DEVICE: u32 = 0x8;
    // Sparse superblocks, large files, B-trees: what ext2 and ext3 know.
    const OLD_READ_ONLY: u32 = 0x7;
    // File types, a journal to be replayed, meta block groups.
    const EXT3_INCOMPATIBLE: u32 = 0x16;
    let Some(superblock) = area.read::<136>(1024)? else { return Ok(None) };
    if le16(&superblock, 56) != 0xef53 {
        return Ok(None);
    }
    let (compatible, incompatible, read_only) =
        (le32(&superblock, 92), le32(&superblock, 96), le32(&superblock, 100));
    let kind = if incompatible & JOURNAL_DEVICE != 0 {
        "jbd"
    } else if read_only & !OLD_READ_ONLY != 0 || incompatible & !EXT3_INCOMPATIBLE != 0 {
        "ext4"
    } else if compatible & JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    };
    let usage = if kind == "jbd" { Usage::Other } else { Usage::Filesystem };
    let found = Signature::new(kind, usage)
        .with_uuid(&bytes_at(&superblock, 104))
        .with_label(text(&superblock[120..136]));
    Ok(Some(found))
}

pub(super) fn xfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<128>(0)? else { return Ok(None) };
    let (block_size, sector_size) = (be32(&superblock, 4), be16(&superblock, 102));
    if !superblock.starts_with(b"XFSB")
        || !(512..=65536).contains(&block_size)
        || !block_size.is_power_of_two()
        || !(512..=32768).contains(&sector_size)
        || !sector_size.is_power_of_two()
    {
        return Ok(None);
    }
    let found = Signature::filesystem("xfs")
        .with_uuid(&bytes_at(&superblock, 32))
        .with_label(text(&superblock[108..120]));
    Ok(Some(found))
}

pub(super) fn btrfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<0x22b>(64 << 10)? else { return Ok(None) };
    if &superblock[0x40..0x48] != b"_BHRfS_M" {
        return Ok(None);
    }
    let found = Signature::filesystem("btrfs")
        .with_uuid(&bytes_at(&superblock, 0x20))
        .with_label(text(&superblock[0x12b..0x22b]));
    Ok(Some(found))
}

/// squashfs 4, which has neither label nor UUID.
pub(super) fn squashfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<32>(0)? else { return Ok(None) };
    let is_squashfs = superblock.starts_with(b"hsqs") && le16(&superblock, 28) >= 4;
    Ok(is_squashfs.then(|| Signature::filesystem("squashfs")))
}

pub(super) fn erofs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<80>(1024)? else { return Ok(None) };
    if le32(&superblock, 0) != 0xe0f5_e1e2 {
        return Ok(None);
    }
    let found = Signature::filesystem("erofs")
        .with_uuid(&bytes_at(&superblock, 48))
        .with_label(text(&superblock[64..80]));
    Ok(Some(found))
}

pub(super) fn f2fs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    const LABEL_AT: usize = 0x7c;
    let Some(superblock) = area.read::<0x47c>(1024)? else { return Ok(None) };
    if le32(&superblock, 0) != 0xf2f5_2010 {
        return Ok(None);
    }
    let found = Signature::filesystem("f2fs");
    // Of version 1.0 nobody knows where these are.
    if (le16(&superblock, 4), le16(&superblock, 6)) == (1, 0) {
        return Ok(Some(found));
    }
    let found =
        found.with_uuid(&bytes_at(&superblock, 0x6c)).with_label(utf16_le(&superblock[LABEL_AT..]));
    Ok(Some(found))
}

pub(super) fn nilfs2(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<1024>(1024)? else { return Ok(None) };
    let length = usize::from(le16(&superblock, 8));
    if le16(&superblock, 6) != 0x3434 || !(0xa8..=1024).contains(&length) {
        return Ok(None);
    }
    let found = Signature::filesystem("nilfs2")
        .with_uuid(&bytes_at(&superblock, 0x98))
        .with_label(text(&superblock[0xa8..0xa8 + 80]));
    Ok(Some(found))
}

pub(super) fn reiserfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<116>(64 << 10)? else { return Ok(None) };
    let magic = &superblock[52..62];
    if !magic.starts_with(b"ReIsEr2Fs") && !magic.starts_with(b"ReIsEr3Fs") {
        return Ok(None);
    }
    let found = Signature::filesystem("reiserfs")
        .with_uuid(&bytes_at(&superblock, 84))
        .with_label(text(&superblock[100..116]));
    Ok(Some(found))
}

pub(super) fn jfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<184>(32 << 10)? else { return Ok(None) };
    let (block_size, block_shift) = (le32(&superblock, 16), u32::from(le16(&superblock, 20)));
    if !superblock.starts_with(b"JFS1") || 1u32.checked_shl(block_shift) != Some(block_size) {
        return Ok(None);
    }
    let found = Signature::filesystem("jfs")
        .with_uuid(&bytes_at(&superblock, 136))
        .with_label(text(&superblock[152..168]));
    Ok(Some(found))
}
