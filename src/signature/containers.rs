//! What holds other things: RAID, LVM, encryption; and swap space.

use super::{Area, Signature, Usage, text};
use crate::error::Result;
use crate::format::bytes_at;
use crate::partition::{be16, be32, le32, le64};

const MD_MAGIC: u32 = 0xa92b_4efc;
const MD_RESERVED: u64 = 64 << 10;

/// A member of a Linux software RAID, versions 0.90 and 1.
pub(super) fn linux_raid(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let size = area.size();
    let mut places = vec![0, 4096];
    if size > MD_RESERVED {
        let old = size / MD_RESERVED * MD_RESERVED - MD_RESERVED;
        if let Some(superblock) = area.read::<64>(old)?
            && le32(&superblock, 0) == MD_MAGIC
            && le32(&superblock, 4) == 0
            && (1..=old).contains(&(u64::from(le32(&superblock, 32)) << 10))
        {
            // The UUID's four words are not beside each other.
            let mut words = [0; 16];
            for (to, from) in words.as_chunks_mut::<4>().0.iter_mut().zip([20, 52, 56, 60]) {
                *to = le32(&superblock, from).to_be_bytes();
            }
            return Ok(Some(Signature::new("linux_raid_member", Usage::Raid).with_uuid(&words)));
        }
        places.insert(0, (size / 4096 * 4096).saturating_sub(8192));
    }
    for place in places {
        let Some(superblock) = area.read::<256>(place)? else { continue };
        if le32(&superblock, 0) == MD_MAGIC
            && le32(&superblock, 4) == 1
            && le64(&superblock, 144) == place / 512
        {
            let found = Signature::new("linux_raid_member", Usage::Raid)
                .with_uuid(&bytes_at(&superblock, 16))
                .with_label(text(&superblock[32..64]));
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// A physical volume of LVM2. Its label is in one of the first four sectors.
pub(super) fn lvm2(area: &mut Area<'_>) -> Result<Option<Signature>> {
    // Characters of each part of the UUID.
    const PARTS: [usize; 7] = [6, 4, 4, 4, 4, 4, 6];
    for sector in 0..4 {
        let Some(label) = area.read::<64>(sector * 512)? else { continue };
        if !label.starts_with(b"LABELONE")
            || &label[24..32] != b"LVM2 001"
            || le64(&label, 8) != sector
        {
            continue;
        }
        let mut rest = &label[32..];
        let parts = PARTS.map(|length| {
            let part;
            (part, rest) = rest.split_at(length);
            String::from_utf8_lossy(part).into_owned()
        });
        let found = Signature::new("LVM2_member", Usage::Raid).with_serial(parts.join("-"));
        return Ok(Some(found));
    }
    Ok(None)
}

/// LUKS 1 and 2.
pub(super) fn luks(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(header) = area.read::<208>(0)? else { return Ok(None) };
    let version = be16(&header, 6);
    if !header.starts_with(b"LUKS\xba\xbe") || !(1..=2).contains(&version) {
        return Ok(None);
    }
    let mut found = Signature::new("crypto_LUKS", Usage::Crypto);
    found.uuid = Some(text(&header[168..208])).filter(|uuid| !uuid.is_empty());
    if version == 2 {
        found = found.with_label(text(&header[24..72]));
    }
    Ok(Some(found))
}

pub(super) fn bitlocker(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(header) = area.read::<11>(0)? else { return Ok(None) };
    Ok((&header[3..11] == b"-FVE-FS-").then(|| Signature::new("BitLocker", Usage::Crypto)))
}

/// Swap space; its magic is at the end of its first page, whatever size that has.
pub(super) fn swap(area: &mut Area<'_>) -> Result<Option<Signature>> {
    for page in [4096u64, 8192, 16384, 32768, 65536] {
        let Some(magic) = area.read::<10>(page - 10)? else { continue };
        if &magic == b"SWAP-SPACE" {
            return Ok(Some(Signature::new("swap", Usage::Other)));
        }
        if matches!(&magic[..9], b"S1SUSPEND" | b"S2SUSPEND" | b"ULSUSPEND" | b"LINHIB000") {
            return Ok(Some(Signature::new("swsuspend", Usage::Other)));
        }
        if &magic != b"SWAPSPACE2" {
            continue;
        }
        let Some(header) = area.read::<44>(1024)? else { continue };
        // In either byte order; a swap space of nothing is none.
        let is_version_1 = le32(&header, 0) == 1 || be32(&header, 0) == 1;
        if !is_version_1 || le32(&header, 4) == 0 {
            continue;
        }
        let found = Signature::new("swap", Usage::Other)
            .with_uuid(&bytes_at(&header, 12))
            .with_label(text(&header[28..44]));
        return Ok(Some(found));
    }
    Ok(None)
}
