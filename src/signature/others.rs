//! File systems of other systems: ISO 9660, NTFS, HFS and HFS+, APFS.

use md5::{Digest as _, Md5};

use super::{Area, Signature, text, utf16_be, utf16_le};
use crate::error::Result;
use crate::format::bytes_at;
use crate::partition::{be16, be32, le16, le32, le64};

const ISO_SECTOR: u64 = 2048;
/// Volume descriptors that are looked at.
const ISO_MAX_DESCRIPTORS: u64 = 16;

/// ISO 9660, with the label of the Joliet descriptor where there is one.
pub(super) fn iso9660(area: &mut Area<'_>) -> Result<Option<Signature>> {
    const PRIMARY: u8 = 1;
    const SUPPLEMENTARY: u8 = 2;
    const END: u8 = 255;
    let mut primary = None;
    let mut joliet = None;
    for index in 0..ISO_MAX_DESCRIPTORS {
        let Some(descriptor) = area.read::<2048>((16 + index) * ISO_SECTOR)? else { break };
        if &descriptor[1..6] != b"CD001" || descriptor[0] == END {
            break;
        }
        match descriptor[0] {
            PRIMARY if primary.is_none() => primary = Some(descriptor),
            SUPPLEMENTARY
                if joliet.is_none() && matches!(&descriptor[88..91], b"%/@" | b"%/C" | b"%/E") =>
            {
                joliet = Some(descriptor);
            }
            _ => {}
        }
    }
    let Some(primary) = primary else { return Ok(None) };
    let short = text(&primary[40..72]);
    let label = match joliet {
        // The Joliet label has lower case, but 16 characters only.
        Some(joliet) => {
            let long = utf16_be(&joliet[40..72]);
            let is_start = short.len() > long.len()
                && short.get(..long.len()).is_some_and(|start| start.eq_ignore_ascii_case(&long));
            if is_start { long.clone() + &short[long.len()..] } else { long }
        }
        None => short,
    };
    let mut found = Signature::filesystem("iso9660").with_label(label);
    // The UUID is the date of the last change, else of making.
    found.uuid = [830, 813].into_iter().find_map(|at| iso_date(&primary[at..at + 17]));
    Ok(Some(found))
}

/// A date as a UUID; `None` for one that is not set.
fn iso_date(date: &[u8]) -> Option<String> {
    let (digits, offset) = (date.get(..16)?, date.get(16)?);
    if !digits.iter().all(u8::is_ascii_digit)
        || (digits.iter().all(|&digit| digit == b'0') && *offset == 0)
    {
        return None;
    }
    let digits = String::from_utf8_lossy(digits);
    let ends = [0, 4, 6, 8, 10, 12, 14, 16];
    let parts: Vec<_> = ends.windows(2).filter_map(|ends| digits.get(ends[0]..ends[1])).collect();
    Some(parts.join("-"))
}

/// NTFS. The label is in the fourth record of the master file table.
pub(super) fn ntfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some((serial, record)) = ntfs_volume(area)? else { return Ok(None) };
    let found = Signature::filesystem("ntfs").with_serial(serial);
    Ok(Some(found.with_label(ntfs_attribute(&record, NTFS_NAME).map(utf16_le).unwrap_or_default())))
}

/// The flags of an NTFS's volume information; `None` where that is none.
pub(crate) fn ntfs_volume_flags(area: &mut Area<'_>) -> Result<Option<u16>> {
    let Some((_, record)) = ntfs_volume(area)? else { return Ok(None) };
    let information = ntfs_attribute(&record, NTFS_INFORMATION);
    Ok(information.filter(|value| value.len() >= 12).map(|value| le16(value, 10)))
}

/// The serial number of an NTFS, and the record of its volume.
fn ntfs_volume(area: &mut Area<'_>) -> Result<Option<(String, Vec<u8>)>> {
    const VOLUME_RECORD: u64 = 3;
    const MAX_RECORD: usize = 4096;
    const MAX_CLUSTER: u64 = 2 << 20;
    let Some(boot) = area.read::<84>(0)? else { return Ok(None) };
    let sector_size = u64::from(le16(&boot, 11));
    if &boot[3..11] != b"NTFS    "
        || !(256..=4096).contains(&sector_size)
        || !sector_size.is_power_of_two()
    {
        return Ok(None);
    }
    let sectors_per_cluster = match boot[13] {
        few @ 1..=128 if few.is_power_of_two() => u64::from(few),
        many @ 240..=249 => 1 << (256 - u32::from(many)),
        _ => return Ok(None),
    };
    let cluster_size = sector_size * sectors_per_cluster;
    let record_size = match boot[64] {
        few @ 1..=64 if few.is_power_of_two() => u64::from(few) * cluster_size,
        shift @ 0xe1..=0xf7 => 1 << (256 - u32::from(shift)),
        _ => return Ok(None),
    };
    // Fields that only FAT has must be zero, and the table of files and its copy inside.
    let is_foreign = [14..21, 22..24, 32..36].into_iter().any(|r| boot[r].iter().any(|&b| b != 0));
    let clusters = le64(&boot, 40) / sectors_per_cluster;
    if cluster_size > MAX_CLUSTER
        || is_foreign
        || le64(&boot, 48) > clusters
        || le64(&boot, 56) > clusters
    {
        return Ok(None);
    }
    let table = le64(&boot, 48).saturating_mul(cluster_size);
    let at = table.saturating_add(VOLUME_RECORD.saturating_mul(record_size));
    let length = usize::try_from(record_size).unwrap_or(MAX_RECORD).min(MAX_RECORD);
    let mut record = vec![0; length];
    let Some(start) = area.read::<4>(table)? else { return Ok(None) };
    if &start != b"FILE" || !area.fill(at, &mut record)? || !record.starts_with(b"FILE") {
        return Ok(None);
    }
    Ok(Some((format!("{:016X}", le64(&boot, 72)), record)))
}

/// The attribute of the volume's name.
const NTFS_NAME: u32 = 0x60;
/// The attribute of its version and flags.
const NTFS_INFORMATION: u32 = 0x70;

/// The value of an attribute that lies in a record of the master file table.
fn ntfs_attribute(record: &[u8], wanted: u32) -> Option<&[u8]> {
    const END: u32 = 0xffff_ffff;
    const FIXED: usize = 22;
    let mut at = usize::from(le16(record.get(..22)?, 20));
    loop {
        let attribute = record.get(at..)?;
        let fixed = attribute.get(..FIXED)?;
        let length = le32(fixed, 4) as usize;
        match le32(fixed, 0) {
            END => return None,
            kind if kind == wanted => {
                let start = usize::from(le16(fixed, 20));
                let end = start.checked_add(le32(fixed, 16) as usize)?;
                return attribute.get(start..end);
            }
            _ if length == 0 => return None,
            _ => at = at.checked_add(length)?,
        }
    }
}

/// HFS and HFS+.
pub(super) fn hfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    const HEADER_AT: u64 = 1024;
    let Some(header) = area.read::<512>(HEADER_AT)? else { return Ok(None) };
    match &header[..2] {
        b"H+" | b"HX" => hfs_plus(area, 0, &header),
        b"BD" if matches!(&header[124..126], b"H+" | b"HX") => {
            // An HFS+ volume in the wrapper of an HFS one.
            let start = u64::from(be16(&header, 28)) * 512
                + u64::from(be16(&header, 126)) * u64::from(be32(&header, 20));
            let Some(inner) = area.read::<512>(start.saturating_add(HEADER_AT))? else {
                return Ok(None);
            };
            match &inner[..2] {
                b"H+" | b"HX" => hfs_plus(area, start, &inner),
                _ => Ok(None),
            }
        }
        b"BD" if be32(&header, 20) != 0 && be32(&header, 20).is_multiple_of(512) => {
            let length = usize::from(header[36]).min(27);
            let mut found = Signature::filesystem("hfs").with_label(text(&header[37..37 + length]));
            found.uuid = hfs_uuid(&header[116..124]);
            Ok(Some(found))
        }
        _ => Ok(None),
    }
}

/// The UUID that Apple's systems make of the eight bytes that a volume has.
fn hfs_uuid(id: &[u8]) -> Option<String> {
    const NAMESPACE: [u8; 16] = [
        0xb3, 0xe2, 0x0f, 0x39, 0xf2, 0x92, 0x11, 0xd6, 0x97, 0xa4, 0x00, 0x30, 0x65, 0x43, 0xec,
        0xac,
    ];
    if id.iter().all(|&byte| byte == 0) {
        return None;
    }
    let mut digest = Md5::new();
    digest.update(NAMESPACE);
    digest.update(id);
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.finalize());
    uuid[6] = 0x30 | (uuid[6] & 0x0f);
    uuid[8] = 0x80 | (uuid[8] & 0x3f);
    Some(super::uuid(&uuid))
}

/// HFS+ from byte `start` on. Its label is the first key of the catalogue's first leaf.
fn hfs_plus(area: &mut Area<'_>, start: u64, header: &[u8; 512]) -> Result<Option<Signature>> {
    let block_size = u64::from(be32(header, 40));
    if block_size < 512 || !block_size.is_power_of_two() {
        return Ok(None);
    }
    let mut found = Signature::filesystem("hfsplus");
    found.uuid = hfs_uuid(&header[104..112]);
    let label = hfs_plus_label(area, start, header, block_size)?;
    Ok(Some(found.with_label(label.unwrap_or_default())))
}

fn hfs_plus_label(
    area: &mut Area<'_>,
    start: u64,
    header: &[u8; 512],
    block_size: u64,
) -> Result<Option<String>> {
    const EXTENTS_AT: usize = 272 + 16;
    const EXTENTS: usize = 8;
    const LEAF: u8 = 0xff;
    let at_block = |block: u64| start.saturating_add(block.saturating_mul(block_size));
    let first_block = u64::from(be32(header, EXTENTS_AT));
    let Some(tree) = area.read::<34>(at_block(first_block))? else { return Ok(None) };
    let (leaf, node_size) = (u64::from(be32(&tree, 24)), u64::from(be16(&tree, 32)));
    let mut block = leaf * node_size / block_size;
    for index in 0..EXTENTS {
        let (extent, count) =
            (be32(header, EXTENTS_AT + index * 8), be32(header, EXTENTS_AT + index * 8 + 4));
        if block >= u64::from(count) {
            block -= u64::from(count);
            continue;
        }
        let at = at_block(u64::from(extent) + block);
        let Some(node) = area.read::<532>(at)? else { return Ok(None) };
        let is_volume = node[8] == LEAF && be16(&node, 10) > 0 && be32(&node, 16) == 1;
        let length = usize::from(be16(&node, 20)) * 2;
        let name = node.get(22..22 + length).filter(|_| is_volume);
        return Ok(name.map(utf16_be));
    }
    Ok(None)
}

pub(super) fn apfs(area: &mut Area<'_>) -> Result<Option<Signature>> {
    let Some(superblock) = area.read::<88>(0)? else { return Ok(None) };
    if &superblock[32..36] != b"NXSB" || le32(&superblock, 24) & 0xffff != 1 {
        return Ok(None);
    }
    Ok(Some(Signature::filesystem("apfs").with_uuid(&bytes_at(&superblock, 72))))
}
