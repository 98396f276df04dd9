//! FAT and exFAT.

use std::collections::BTreeSet;

use super::{Area, Signature, text, utf16_le};
use crate::error::Result;
use crate::partition::{le16, le32};

const ENTRY_LENGTH: usize = 32;
/// Clusters of a root directory that are looked through for the label.
const MAX_CLUSTERS: usize = 100;
/// Bytes of each cluster, or of a root directory of FAT12 and FAT16, that are looked
/// through.
const MAX_LENGTH: u64 = 64 << 10;

/// FAT12, FAT16 and FAT32.
pub(super) fn vfat(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(boot) = area.read::<512>(0)? else { return Ok(None) };
    if !crate::partition::is_fat(&boot) {
        return Ok(None);
    }
    let sector_size = u64::from(le16(&boot, 11));
    let cluster_size = u64::from(boot[13]) * sector_size;
    let reserved = u64::from(le16(&boot, 14));
    let short_length = u64::from(le16(&boot, 22));
    let is_32 = short_length == 0;
    let fat_length = if is_32 { u64::from(le32(&boot, 36)) } else { short_length };
    let data_start = (reserved + fat_length * u64::from(boot[16])) * sector_size;
    let (label, serial) = if is_32 {
        (root_label_32(area, &boot, data_start, cluster_size)?, Some(67))
    } else {
        let entries = u64::from(le16(&boot, 17));
        let has_serial = matches!(boot[38], 0x28 | 0x29);
        (label_in(area, data_start, entries * ENTRY_LENGTH as u64)?, has_serial.then_some(39))
    };
    let mut found = Signature::filesystem("vfat").with_label(label.unwrap_or_default());
    if let Some(at) = serial {
        found = found.with_serial(serial_of(&boot[at..at + 4]));
    }
    Ok(Some(found))
}

/// A serial number of four bytes.
fn serial_of(bytes: &[u8]) -> String {
    let number = le32(bytes, 0);
    format!("{:04X}-{:04X}", number >> 16, number & 0xffff)
}

/// The label in the root directory of FAT32, which is a chain of clusters.
fn root_label_32(
    area: &mut Area<'_>,
    boot: &[u8; 512],
    data_start: u64,
    cluster_size: u64,
) -> Result<Option<String>> {
    let fat_start = u64::from(le16(boot, 14)) * u64::from(le16(boot, 11));
    let mut cluster = le32(boot, 44);
    let mut visited = BTreeSet::new();
    while visited.len() < MAX_CLUSTERS && visited.insert(cluster) {
        let Some(index) = cluster.checked_sub(2) else { break };
        let at = data_start + u64::from(index) * cluster_size;
        if let Some(label) = label_in(area, at, cluster_size)? {
            return Ok(Some(label));
        }
        if area.directories == 0 {
            break;
        }
        let Some(next) = area.read::<4>(fat_start + u64::from(cluster) * 4)? else { break };
        cluster = le32(&next, 0) & 0x0fff_ffff;
    }
    Ok(None)
}

/// The volume's name in a directory of so many bytes.
fn label_in(area: &mut Area<'_>, at: u64, length: u64) -> Result<Option<String>> {
    const FREE: u8 = 0xe5;
    const VOLUME: u8 = 0x08;
    const DIRECTORY: u8 = 0x10;
    const LONG_NAME: u8 = 0x0f;
    let directory = area.directory(at, length.min(MAX_LENGTH))?;
    for entry in directory.as_chunks::<ENTRY_LENGTH>().0 {
        let attributes = entry[11];
        if entry[0] == 0 {
            break;
        }
        let has_cluster = le16(entry, 20) != 0 || le16(entry, 26) != 0;
        if entry[0] == FREE || has_cluster || attributes & 0x3f == LONG_NAME {
            continue;
        }
        if attributes & (VOLUME | DIRECTORY) == VOLUME {
            let mut name = [0; 11];
            name.copy_from_slice(&entry[..11]);
            if name[0] == 0x05 {
                name[0] = FREE;
            }
            return Ok(Some(text(&name)));
        }
    }
    Ok(None)
}

pub(super) fn exfat(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(boot) = area.read::<512>(0)? else { return Ok(None) };
    let (sector_shift, cluster_shift) = (u32::from(boot[108]), u32::from(boot[109]));
    if &boot[3..11] != b"EXFAT   "
        || !boot.ends_with(&[0x55, 0xaa])
        || !boot.starts_with(&[0xeb, 0x76, 0x90])
        || boot[11..64].iter().any(|&byte| byte != 0)
        || !(9..=12).contains(&sector_shift)
        || cluster_shift > 25 - sector_shift
        || !exfat_parts_fit(&boot)
        || !exfat_checksum_is_right(area, 1 << sector_shift)?
    {
        return Ok(None);
    }
    let found = Signature::filesystem("exfat").with_serial(serial_of(&boot[100..104]));
    let fat_start = u64::from(le32(&boot, 80)) << sector_shift;
    let heap_start = u64::from(le32(&boot, 88)) << sector_shift;
    let cluster_size = 1u64 << (sector_shift + cluster_shift);
    let mut cluster = le32(&boot, 96);
    let mut visited = BTreeSet::new();
    while visited.len() < MAX_CLUSTERS && visited.insert(cluster) {
        let Some(index) = cluster.checked_sub(2) else { break };
        let at = heap_start.saturating_add(u64::from(index).saturating_mul(cluster_size));
        let directory = area.directory(at, cluster_size.min(MAX_LENGTH))?;
        if directory.is_empty() {
            break;
        }
        for entry in directory.as_chunks::<ENTRY_LENGTH>().0 {
            match entry[0] {
                0 => return Ok(Some(found)),
                0x83 => {
                    let length = (usize::from(entry[1]) * 2).min(22);
                    return Ok(Some(found.with_label(utf16_le(&entry[2..2 + length]))));
                }
                _ => {}
            }
        }
        let Some(next) = area.read::<4>(fat_start.saturating_add(u64::from(cluster) * 4))? else {
            break;
        };
        cluster = le32(&next, 0);
    }
    Ok(Some(found))
}

/// True where the file allocation tables lie before the clusters, and the root directory in
/// one of these.
fn exfat_parts_fit(boot: &[u8; 512]) -> bool {
    let field = |at| u64::from(le32(boot, at));
    let (fat_start, fat_length, heap_start) = (field(80), field(84), field(88));
    let fats = u64::from(boot[110]);
    (1..=2).contains(&fats)
        && fat_start >= 24
        && (fat_start + fat_length * fats..=1 << 31).contains(&heap_start)
        && (2..=field(92) + 1).contains(&field(96))
}

/// True where the twelfth sector repeats the checksum of the eleven before it.
fn exfat_checksum_is_right(area: &mut Area<'_>, sector_size: usize) -> Result<bool> {
    // These change while the file system is mounted.
    const NOT_SUMMED: [usize; 3] = [106, 107, 112];
    let mut sectors = vec![0; sector_size * 12];
    if !area.fill(0, &mut sectors)? {
        return Ok(false);
    }
    let (summed, sums) = sectors.split_at(sector_size * 11);
    let bytes = summed.iter().enumerate().filter(|(at, _)| !NOT_SUMMED.contains(at));
    let sum = bytes.fold(0u32, |sum, (_, &byte)| sum.rotate_right(1).wrapping_add(byte.into()));
    Ok(sums.as_chunks::<4>().0.iter().all(|&word| u32::from_le_bytes(word) == sum))
}
