//! What LVM writes in front of and into a physical volume: its label, its header, and the
//! areas that hold the metadata of its volume group (LVM2: lib/format_text/layout.h).

use super::{Fault, MAX_TEXT, uuid_text};
use crate::error::Result;
use crate::partition::{Disk, le32, le64};
use crate::units::{ByteLen, GuestOffset, GuestRange};

const SECTOR: usize = 512;
/// Sectors of the volume in which the label may be.
const LABEL_SECTORS: u64 = 4;
const LABEL_MAGIC: &[u8; 8] = b"LABELONE";
const LABEL_TYPE: &[u8; 8] = b"LVM2 001";
const ID_LENGTH: usize = 32;
/// Offset and size of an area.
const LOCATION_LENGTH: usize = 16;

const AREA_MAGIC: &[u8; 16] = b" LVM2 x[5A%r0N*>";
const AREA_VERSION: u32 = 1;
const AREA_HEADER_LENGTH: u64 = 512;
const RAW_LOCATION_AT: usize = 40;
/// The area is not kept up to date.
const IGNORED: u32 = 1;

/// LVM's checksum: a CRC-32 that starts elsewhere and is not inverted at its end.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
    hasher.update(bytes);
    !hasher.finalize()
}

/// A physical volume's label, with the header behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Label {
    /// The volume's UUID.
    pub(super) uuid: String,
    /// Where in the volume the metadata areas are: offset and length in bytes.
    pub(super) areas: Vec<(u64, u64)>,
}

/// Fills `buffer` from `offset` of the volume that `place` is, or tells what is wrong; only an
/// interruption is an error.
fn fill(
    disk: &mut dyn Disk,
    place: GuestRange,
    offset: u64,
    buffer: &mut [u8],
) -> Result<std::result::Result<(), Fault>> {
    let end = offset.checked_add(buffer.len() as u64);
    if end.is_none_or(|end| end > place.length().get()) {
        return Ok(Err(Fault::OutOfVolume));
    }
    let at: GuestOffset = place.start.saturating_add(ByteLen::new(offset));
    match disk.read(at, buffer) {
        Ok(()) => Ok(Ok(())),
        Err(error) if error.is_interruption() => Err(error),
        Err(_) => Ok(Err(Fault::Unreadable(at))),
    }
}

/// The label of what lies at `place`. None where that is no physical volume; a fault where
/// it has a label that can't be used, or may have one that can't be read.
pub(super) fn read_label(
    disk: &mut dyn Disk,
    place: GuestRange,
) -> Result<Option<std::result::Result<Label, Fault>>> {
    let mut fault = None;
    for number in 0..LABEL_SECTORS {
        let mut sector = [0; SECTOR];
        match fill(disk, place, number * SECTOR as u64, &mut sector)? {
            Ok(()) => {}
            Err(Fault::OutOfVolume) => break,
            Err(error) => {
                fault = fault.or(Some(Err(error)));
                continue;
            }
        }
        if !sector.starts_with(LABEL_MAGIC)
            || &sector[24..32] != LABEL_TYPE
            || le64(&sector, 8) != number
        {
            continue;
        }
        match parse_label(&sector) {
            Ok(label) => return Ok(Some(Ok(label))),
            Err(error) => fault = fault.or(Some(Err(error))),
        }
    }
    Ok(fault)
}

fn parse_label(sector: &[u8; SECTOR]) -> std::result::Result<Label, Fault> {
    if checksum(&sector[20..]) != le32(sector, 16) {
        return Err(Fault::LabelChecksum);
    }
    let at = le32(sector, 20) as usize;
    let header = sector.get(at..).filter(|_| at >= 32).ok_or(Fault::LabelChecksum)?;
    let id = header.get(..ID_LENGTH).ok_or(Fault::LabelChecksum)?;
    // Behind the volume's size come two lists, each up to a location of zeros: of the data,
    // of which the metadata has better knowledge, and of the metadata areas.
    let lists = header.get(ID_LENGTH + 8..).unwrap_or_default().chunks_exact(LOCATION_LENGTH);
    let mut locations = lists.map(|location| (le64(location, 0), le64(location, 8)));
    locations.by_ref().find(|(offset, _)| *offset == 0);
    let areas = locations.take_while(|(offset, _)| *offset != 0).collect();
    Ok(Label { uuid: uuid_text(&String::from_utf8_lossy(id)), areas })
}

/// The metadata's text in one area, as it is said to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    /// Of the area, from the volume's start.
    area: u64,
    area_size: u64,
    /// Of the text, from the area's start.
    offset: u64,
    /// Bytes of the text.
    pub(super) size: u64,
    pub(super) checksum: u32,
}

/// Reads the header of the metadata area at `offset`. None where it holds no metadata that
/// counts.
pub(super) fn read_location(
    disk: &mut dyn Disk,
    place: GuestRange,
    offset: u64,
) -> Result<std::result::Result<Option<Location>, Fault>> {
    let mut header = [0; SECTOR];
    let filled = fill(disk, place, offset, &mut header)?;
    Ok(filled.and_then(|()| parse_area_header(&header, place, offset)))
}

fn parse_area_header(
    header: &[u8; SECTOR],
    place: GuestRange,
    area: u64,
) -> std::result::Result<Option<Location>, Fault> {
    if checksum(&header[4..]) != le32(header, 0) {
        return Err(Fault::HeaderChecksum);
    }
    if &header[4..20] != AREA_MAGIC || le32(header, 20) != AREA_VERSION || le64(header, 24) != area
    {
        return Err(Fault::Header);
    }
    let area_size = le64(header, 32);
    let (offset, size) = (le64(header, RAW_LOCATION_AT), le64(header, RAW_LOCATION_AT + 8));
    let flags = le32(header, RAW_LOCATION_AT + 20);
    if offset == 0 || flags & IGNORED != 0 {
        return Ok(None);
    }
    let area_fits = area.checked_add(area_size).is_some_and(|end| end <= place.length().get());
    if !area_fits {
        return Err(Fault::OutOfVolume);
    }
    if size > MAX_TEXT {
        return Err(Fault::TooLarge);
    }
    let text_fits = (AREA_HEADER_LENGTH..area_size).contains(&offset)
        && size > 0
        && size <= area_size - AREA_HEADER_LENGTH;
    if !text_fits {
        return Err(Fault::Header);
    }
    let checksum = le32(header, RAW_LOCATION_AT + 16);
    Ok(Some(Location { area, area_size, offset, size, checksum }))
}

/// Reads the text. The area is a ring behind its header: what reaches past its end goes on
/// at its start.
pub(super) fn read_text(
    disk: &mut dyn Disk,
    place: GuestRange,
    location: Location,
) -> Result<std::result::Result<String, Fault>> {
    let Location { area, area_size, offset, size, checksum: expected } = location;
    let Ok(length) = usize::try_from(size) else { return Ok(Err(Fault::TooLarge)) };
    let mut text = vec![0; length];
    let first = usize::try_from(area_size - offset).unwrap_or(length).min(length);
    let (head, tail) = text.split_at_mut(first);
    for (at, part) in [(offset, head), (AREA_HEADER_LENGTH, tail)] {
        if let Err(fault) = fill(disk, place, area.saturating_add(at), part)? {
            return Ok(Err(fault));
        }
    }
    if checksum(&text) != expected {
        return Ok(Err(Fault::TextChecksum));
    }
    Ok(Ok(match String::from_utf8(text) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }))
}
