//! What the header extensions point to: the LUKS header and the persistent bitmaps.

use std::collections::BTreeSet;

use super::image::Image;
use crate::check::extent::{Budget, FileSize, gave_up};
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::{Log, Tally};
use crate::check::references::References;
use crate::crypt::{LUKS_HEADER_BYTES, LuksHeader};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Extensions;
use crate::format::qcow2::bitmap::{
    BitmapDirectoryEntry, BitmapTableEntry, BitmapsExtension, read_directory,
};
use crate::status::Encryption;
use crate::units::HostOffset;

/// Entries of a bitmap table that are read at a time.
const TABLE_CHUNK: u64 = 8192;

/// The LUKS header, where the image has one: QEMU refuses an image whose is not valid.
pub(super) fn check_crypt<R: References>(
    image: &Image<'_>,
    extensions: &Extensions,
    refs: &R,
    tally: &mut Tally,
) {
    let mut invalid = |message: String| {
        tally.push(Finding::new(FindingKind::CryptHeaderInvalid, message).place(Place::header(32)));
    };
    let is_luks = image.header.encryption == Some(Encryption::Luks);
    let (offset, length) = match extensions.crypt_header {
        None if is_luks => {
            return invalid(
                "the image is encrypted by LUKS, and no extension says where its header is"
                    .to_owned(),
            );
        }
        None => return,
        Some(_) if !is_luks => {
            return invalid(
                "there is an extension for LUKS, and the image is not encrypted by it".to_owned(),
            );
        }
        Some(place) => place,
    };
    if !offset.is_multiple_of(image.cluster_size()) {
        return invalid(format!("the LUKS header is at {offset:#x}, on no cluster boundary"));
    }
    let mut start = [0; LUKS_HEADER_BYTES];
    let place = Place::new(Table::CryptHeader, HostOffset::new(offset));
    if let Err(error) = image.read(offset, &mut start) {
        tally.push(image.unreadable("the LUKS header", place, &error));
        return;
    }
    // QEMU minds the length only where it reads more: a header that is cut off, or the
    // material of a key slot that it tries.
    let in_header = start.get(..usize::try_from(length).unwrap_or(usize::MAX)).unwrap_or(&start);
    let parsed = LuksHeader::parse(in_header, HostOffset::new(offset), u64::MAX);
    if let Err(error) = parsed
        && matches!(error.kind(), ErrorKind::InvalidImage(_))
    {
        let finding = Finding::new(FindingKind::CryptHeaderInvalid, error.kind().to_string());
        tally.push(finding.place(place).host(offset, length));
    }
    image.refer(refs, tally, (offset, length, 1), || {
        Finding::new(FindingKind::PastFileEnd, "the LUKS header").place(place)
    });
}

/// The bitmap directory and all bitmaps, as qcow2_check_bitmaps_refcounts() in QEMU's
/// block/qcow2-bitmap.c and, since QEMU loads the bitmaps of an image that it opens,
/// load_bitmap() there. Bitmaps that share a table read it as often as `budget` allows.
pub(super) fn check_bitmaps<R: References>(
    image: &Image<'_>,
    extensions: &Extensions,
    refs: &R,
    budget: &mut Budget,
    log: &mut Log<'_>,
) {
    let mut tally = log.tally();
    if let Some(directory) = read_bitmaps(image, extensions, refs, &mut tally) {
        let outcome = check_each_bitmap(image, &directory, refs, budget, &mut tally, log);
        if let Err(error) = outcome {
            tally.push(gave_up(&error));
        }
    }
    log.absorb(tally);
}

/// Where the bitmap directory is, and its entries, where there is one that can be understood.
fn read_bitmaps<R: References>(
    image: &Image<'_>,
    extensions: &Extensions,
    refs: &R,
    tally: &mut Tally,
) -> Option<(Place, Vec<BitmapDirectoryEntry>)> {
    let place = Place::new(Table::Header, HostOffset::ZERO);
    let extension = match BitmapsExtension::parse(image.header, extensions) {
        Ok(Some(extension)) => extension,
        Ok(None) if extensions.bitmaps.is_some() => {
            let kind = FindingKind::BitmapsInconsistent;
            tally.push(
                Finding::new(
                    kind,
                    "the bitmaps are not valid: a program that knows no bitmaps wrote to the image",
                )
                .place(place),
            );
            return None;
        }
        Ok(None) => return None,
        Err(error) => {
            let kind = FindingKind::BitmapsExtensionInvalid;
            tally.push(Finding::new(kind, error.kind().to_string()).place(place));
            return None;
        }
    };
    let directory = extension.directory;
    let place = Place::new(Table::BitmapDirectory, directory.offset);
    let size = directory.length.get();
    image.refer(refs, tally, (directory.offset.get(), size, 1), || {
        Finding::new(FindingKind::PastFileEnd, "the bitmap directory").place(place)
    });
    match read_directory(image.source, image.header, &extension) {
        Ok(bitmaps) => Some((place, bitmaps)),
        Err(error) => {
            directory_invalid(tally, place, &error);
            None
        }
    }
}

fn check_each_bitmap<R: References>(
    image: &Image<'_>,
    (directory, bitmaps): &(Place, Vec<BitmapDirectoryEntry>),
    refs: &R,
    budget: &mut Budget,
    tally: &mut Tally,
    log: &mut Log<'_>,
) -> Result<()> {
    let mut names = BTreeSet::new();
    for (index, bitmap) in (0u64..).zip(bitmaps) {
        let place = directory.entry(index);
        let name = bitmap.display_name();
        if !names.insert(&bitmap.name) && !bitmap.in_use {
            let message = format!("the bitmap '{name}' has the name of another one");
            tally.push(Finding::new(FindingKind::BitmapInvalid, message).place(place));
        }
        if bitmap.in_use {
            let message =
                format!("the bitmap '{name}' was not saved when the image was last written to");
            tally.push(Finding::new(FindingKind::BitmapInUse, message).place(place));
        }
        let needed = table_entries_needed(image, bitmap);
        if !bitmap.in_use && bitmap.table_entries() != needed {
            let message = format!(
                "the bitmap '{name}' has a table of {} entries, where {needed} are needed",
                bitmap.table_entries()
            );
            tally.push(Finding::new(FindingKind::BitmapInvalid, message).place(place));
        }
        check_bitmap_table(image, bitmap, refs, budget, tally, log)?;
    }
    Ok(())
}

fn directory_invalid(tally: &mut Tally, place: Place, error: &Error) {
    // QEMU counts a corruption and gives up.
    let message = error.kind().to_string();
    tally.push(Finding::new(FindingKind::BitmapDirectoryInvalid, &*message).place(place));
    tally.push(Finding::new(FindingKind::BitmapInvalid, "no bitmap can be checked").place(place));
}

/// Clusters that the bits of a bitmap take: whole 64-bit words of them.
fn table_entries_needed(image: &Image<'_>, bitmap: &BitmapDirectoryEntry) -> u64 {
    let bits = image.header.virtual_size.get().div_ceil(bitmap.granularity());
    (bits.div_ceil(64) * 8).div_ceil(image.cluster_size())
}

fn check_bitmap_table<R: References>(
    image: &Image<'_>,
    bitmap: &BitmapDirectoryEntry,
    refs: &R,
    budget: &mut Budget,
    tally: &mut Tally,
    log: &mut Log<'_>,
) -> Result<()> {
    let place = Place::new(Table::Bitmap, bitmap.table.offset);
    let (start, length) = (bitmap.table.offset.get(), bitmap.table.length.get());
    image.refer(refs, tally, (start, length, 1), || {
        let message = format!("the table of the bitmap '{}'", bitmap.display_name());
        Finding::new(FindingKind::PastFileEnd, message).place(place)
    });
    if !FileSize::can_read(start, length) {
        let message = format!("the table of the bitmap '{}' can't be read", bitmap.display_name());
        tally.push(Finding::new(FindingKind::BitmapInvalid, message).place(place));
        return Ok(());
    }
    // What lies past the end of the file reads as zeros: as bits that are all 0.
    let in_file = image.file.bytes.saturating_sub(start).div_ceil(8);
    let count = bitmap.table_entries().min(in_file);
    let mut broken = false;
    let mut first = 0;
    while first < count {
        let here = (count - first).min(TABLE_CHUNK);
        budget.take_read(here * 8)?;
        let entries = image.read_entries(start + first * 8, usize::try_from(here).unwrap_or(0));
        let entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                tally.push(image.unreadable("a bitmap table", place, &error));
                return Ok(());
            }
        };
        for (index, entry) in (first..).zip(entries) {
            match BitmapTableEntry::decode(entry, image.cluster_size()) {
                Some(BitmapTableEntry::Serialized(host)) => {
                    let bits = (host.get(), image.cluster_size(), 1);
                    image.refer(refs, tally, bits, || {
                        Finding::new(FindingKind::PastFileEnd, "a cluster of a bitmap's bits")
                            .place(place.entry(index))
                    });
                }
                Some(_) => {}
                None => {
                    broken = true;
                    let kind = FindingKind::BitmapTableInvalid;
                    let message = format!("the bitmap table entry {entry:#018x} breaks a bound");
                    tally.push(Finding::new(kind, message).place(place.entry(index)));
                }
            }
            log.absorb_if_full(tally);
        }
        first += here;
    }
    if broken {
        // QEMU counts it once and gives up.
        let message = format!("the bitmap '{}' cannot be loaded", bitmap.display_name());
        tally.push(Finding::new(FindingKind::BitmapInvalid, message).place(place));
    }
    Ok(())
}
