//! The pieces of a qcow2 image. As little as possible is taken for given: what can't be read is
//! a problem, and all else is walked.

mod tables;

use std::collections::BTreeMap;

use super::Owner;
use super::lenient;
use super::problem::{Problem, ProblemKind};
use crate::crypt::LUKS_HEADER_BYTES;
use crate::error::{Result, printable};
use crate::format::bytes_at;
use crate::format::qcow2::bitmap::BitmapTableEntry;
use crate::format::qcow2::header::AUTOCLEAR_BITMAPS;
use crate::format::qcow2::snapshot::read_entry;
use crate::format::qcow2::{Extensions, Qcow2Header, Snapshot, TableLocation, incompatible};
use crate::source::Source;
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

/// QCOW2_MAX_BITMAP_DIRECTORY_SIZE in QEMU's block/qcow2.h.
const MAX_BITMAP_DIRECTORY_BYTES: u64 = 64 << 20;
/// BME_MAX_PHYS_SIZE in QEMU's block/qcow2-bitmap.c: so many bytes of bits at most.
const MAX_BITMAP_BYTES: u64 = 512 << 20;
const MAX_BITMAPS: usize = 65535;
/// QCOW_MAX_SNAPSHOTS_SIZE.
const MAX_SNAPSHOT_TABLE_BYTES: u64 = 1024 * 65536;
const LUKS_SLOTS: usize = 8;
const LUKS_SLOT_ACTIVE: u32 = 0x00ac_71f3;

/// An L1 table, the active one or a snapshot's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Table {
    /// Whose it is.
    pub owner: Owner,
    /// Where it lies; its length is that of its entries.
    pub table: TableLocation,
    /// The first entry past the virtual disk: there a snapshot keeps its VM state.
    pub vm_state_index: u64,
    /// It shares bytes with one before it, and its entries are not looked into again.
    pub overlaps: bool,
}

/// A bitmap, as its directory entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapPlace {
    /// Its name.
    pub name: String,
    /// The bitmap table.
    pub table: TableLocation,
}

/// What an entry of a bitmap table names, for the dump.
pub type BitmapEntryFound = std::result::Result<BitmapTableEntry, Problem>;

/// The LUKS header and its key slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CryptPlace {
    /// All that the header extension says: header and key material.
    pub location: TableLocation,
    /// The header's own bytes, where there is a LUKS header at all.
    pub header: Option<TableLocation>,
    /// The key material of each slot: whether the slot is enabled, and where it lies.
    pub slots: Vec<(bool, TableLocation)>,
}

/// What of a qcow2 image's metadata is not in tables: read once, a few MiB at most.
#[derive(Debug)]
pub struct Qcow2Metadata {
    /// The header; fields that make no sense are empty.
    pub header: Qcow2Header,
    /// The header extensions; one that makes no sense only by its place.
    pub extensions: Extensions,
    /// The backing file's name, where there is one.
    pub backing_name: Option<Vec<u8>>,
    /// The snapshots, up to the first that makes no sense.
    pub snapshots: Vec<Snapshot>,
    /// The snapshot table's entries, without padding at its end; `None` without snapshots.
    pub snapshot_table: Option<TableLocation>,
    /// The active L1 table, and those of the snapshots.
    pub l1_tables: Vec<L1Table>,
    /// The bitmap directory, where the image has one that is consistent.
    pub bitmap_directory: Option<TableLocation>,
    /// The bitmaps in it.
    pub bitmaps: Vec<BitmapPlace>,
    /// The encryption header.
    pub crypt: Option<CryptPlace>,
    pub(super) problems: Vec<Problem>,
}

impl Qcow2Metadata {
    /// Reads what is not in tables.
    ///
    /// # Errors
    /// It is no qcow2 image of a known version, or has no valid cluster size; its first bytes
    /// can't be read.
    pub(super) fn read(source: &Source) -> Result<Self> {
        let mut start = [0; lenient::HEADER_LENGTH];
        let n = source.read_up_to(HostOffset::ZERO, &mut start)?;
        let lenient = lenient::parse(&start[..n])?;
        let header = lenient.header;
        let mut problems = lenient.problems;
        let unknown = header.unknown_incompatible();
        let extensions = read_extensions(source, &header, &mut problems);
        if unknown != 0 {
            let names = extensions.name_incompatible(unknown);
            let message = format!(
                "the image uses incompatible features that imgdm does not know: {names}; there may be metadata that is not listed"
            );
            let offset = HostOffset::new(72);
            problems.push(Problem::new(ProblemKind::InvalidField, offset, message));
        }
        let mut metadata = Self {
            backing_name: read_backing_name(source, &header, &mut problems),
            snapshots: Vec::new(),
            snapshot_table: None,
            l1_tables: Vec::new(),
            bitmap_directory: None,
            bitmaps: Vec::new(),
            crypt: None,
            extensions,
            header,
            problems,
        };
        metadata.read_snapshots(source);
        metadata.collect_l1_tables();
        metadata.read_bitmaps(source);
        metadata.read_crypt_header(source);
        Ok(metadata)
    }

    fn problem(&mut self, kind: ProblemKind, offset: HostOffset, message: String) {
        self.problems.push(Problem::new(kind, offset, message));
    }

    fn read_snapshots(&mut self, source: &Source) {
        if self.header.snapshot_count == 0 {
            return;
        }
        let start = self.header.snapshots_offset.get();
        let (mut at, mut end) = (start, start);
        for _ in 0..self.header.snapshot_count {
            at = at.next_multiple_of(8);
            match read_entry(source, HostOffset::new(at), &self.header) {
                Ok((snapshot, length)) => {
                    self.snapshots.push(snapshot);
                    at = at.saturating_add(length);
                    end = at;
                }
                Err(error) => {
                    self.problems.push(Problem::of_error(&error, HostOffset::new(at)));
                    break;
                }
            }
            if end - start > MAX_SNAPSHOT_TABLE_BYTES {
                let message = "the snapshot table is larger than 64 MiB".to_owned();
                self.problem(ProblemKind::InvalidField, HostOffset::new(at), message);
                break;
            }
        }
        self.snapshot_table = Some(TableLocation {
            offset: HostOffset::new(start),
            length: ByteLen::new(end - start),
        });
    }

    fn collect_l1_tables(&mut self) {
        let coverage = self.header.l2_coverage();
        let index = |size: ByteLen| size.get().div_ceil(coverage);
        let mut tables = vec![L1Table {
            owner: Owner::Active,
            table: self.header.l1_table,
            vm_state_index: index(self.header.virtual_size),
            overlaps: false,
        }];
        for (snapshot, number) in self.snapshots.iter().zip(0u32..) {
            // Whatever its size: what its tables name is in use.
            if let Err(error) = snapshot.checked_virtual_size() {
                self.problems.push(Problem::of_error(&error, snapshot.entry_offset));
            }
            match snapshot.l1_table(&self.header) {
                Ok(table) => tables.push(L1Table {
                    owner: Owner::Snapshot(number),
                    table,
                    vm_state_index: index(snapshot.virtual_size),
                    overlaps: false,
                }),
                Err(error) => {
                    self.problems.push(Problem::of_error(&error, snapshot.entry_offset));
                }
            }
        }
        // Whoever made two snapshots share an L1 table could make a small file stand for
        // tables without end.
        let mut taken: BTreeMap<u64, u64> = BTreeMap::new();
        for l1 in tables.iter_mut().filter(|l1| !l1.table.length.is_zero()) {
            let (start, end) = (l1.table.offset.get(), l1.table.end().get());
            let before = taken.range(..end).next_back();
            if before.is_some_and(|(_, &other_end)| other_end > start) {
                l1.overlaps = true;
                let message = "the L1 table shares bytes with another one".to_owned();
                let offset = l1.table.offset;
                self.problems.push(Problem::new(ProblemKind::NamedTwice, offset, message));
            } else {
                taken.insert(start, end);
            }
        }
        self.l1_tables = tables;
    }

    /// Reads the bitmap directory, which has to be ignored where its autoclear bit is not set.
    fn read_bitmaps(&mut self, source: &Source) {
        let Some(data) = self.extensions.bitmaps.clone() else { return };
        if self.header.autoclear_features & AUTOCLEAR_BITMAPS == 0 {
            return;
        }
        let place = self.extensions.places.iter().find(|place| place.name() == Some("bitmaps"));
        let field = place.map_or(HostOffset::ZERO, |place| place.offset);
        let broken = |what: String| Problem::new(ProblemKind::InvalidField, field, what);
        let Some(fields) = data.first_chunk::<24>().filter(|_| data.len() == 24) else {
            let what = format!("the bitmaps extension has {} bytes and not 24", data.len());
            self.problems.push(broken(what));
            return;
        };
        let count = u32::from_be_bytes(bytes_at(fields, 0));
        let (length, offset) =
            (u64::from_be_bytes(bytes_at(fields, 8)), u64::from_be_bytes(bytes_at(fields, 16)));
        if offset == 0
            || !offset.is_multiple_of(self.header.cluster_size())
            || length > MAX_BITMAP_DIRECTORY_BYTES
            || offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err())
        {
            self.problems.push(broken(format!(
                "the bitmaps extension says a directory of {length} bytes at {offset:#x}, which can't be"
            )));
            return;
        }
        let directory =
            TableLocation { offset: HostOffset::new(offset), length: ByteLen::new(length) };
        self.bitmap_directory = Some(directory);
        let in_file = source.length().get().saturating_sub(offset).min(length);
        let mut bytes = vec![0; usize::try_from(in_file).unwrap_or(0)];
        if let Err(error) = source.read_exact(directory.offset, &mut bytes, "the bitmap directory")
        {
            self.problems.push(Problem::of_error(&error, directory.offset));
            return;
        }
        if in_file < length {
            let message = "the bitmap directory does not lie in the file whole".to_owned();
            self.problem(ProblemKind::OutsideFile, directory.offset, message);
        }
        self.read_bitmap_directory(&bytes, offset);
        if self.bitmaps.len() as u64 != u64::from(count) {
            let found = self.bitmaps.len();
            self.problems.push(broken(format!(
                "the bitmaps extension says {count} bitmaps, the bitmap directory has {found}"
            )));
        }
    }

    fn read_bitmap_directory(&mut self, directory: &[u8], start: u64) {
        let mut rest = directory;
        while !rest.is_empty() && self.bitmaps.len() < MAX_BITMAPS {
            let here = HostOffset::new(start.saturating_add((directory.len() - rest.len()) as u64));
            let Some((place, length)) = bitmap_place(rest) else {
                let message = "an entry of the bitmap directory is cut off".to_owned();
                self.problem(ProblemKind::InvalidField, here, message);
                return;
            };
            let most = MAX_BITMAP_BYTES >> self.header.cluster_bits;
            let aligned = place.table.offset.is_multiple_of(self.header.cluster_size());
            if aligned && i64::try_from(place.table.end().get()).is_ok() {
                let mut place = place;
                if place.table.length.get() / 8 > most {
                    let message = format!(
                        "the bitmap '{}' has a table of more than {most} entries",
                        printable(&place.name)
                    );
                    self.problem(ProblemKind::InvalidField, here, message);
                    place.table.length = ByteLen::new(most * 8);
                }
                self.bitmaps.push(place);
            } else {
                let message = format!(
                    "the bitmap '{}' has its table at {}, where none can be",
                    printable(&place.name),
                    place.table.offset
                );
                self.problem(ProblemKind::Unaligned, here, message);
                // Kept for its name: a table of nothing.
                self.bitmaps.push(BitmapPlace {
                    table: TableLocation { length: ByteLen::ZERO, ..place.table },
                    ..place
                });
            }
            rest = rest.get(length..).unwrap_or_default();
        }
    }

    /// Finds the LUKS header and the key material of its slots, enabled or not.
    fn read_crypt_header(&mut self, source: &Source) {
        let Some((offset, length)) = self.extensions.crypt_header else { return };
        let start = HostOffset::new(offset);
        if offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err()) {
            let message = format!("the encryption header at {start} can't be {length} bytes long");
            self.problem(ProblemKind::InvalidField, start, message);
            return;
        }
        let location = TableLocation { offset: start, length: ByteLen::new(length) };
        let mut crypt = CryptPlace { location, header: None, slots: Vec::new() };
        let mut bytes = [0; LUKS_HEADER_BYTES];
        let read = source.read_up_to(start, &mut bytes).unwrap_or(0);
        if read == bytes.len()
            && bytes.starts_with(b"LUKS\xba\xbe")
            && length >= LUKS_HEADER_BYTES as u64
        {
            let u32_at = |at: usize| u32::from_be_bytes(bytes_at(&bytes, at));
            crypt.header =
                Some(TableLocation { length: ByteLen::new(LUKS_HEADER_BYTES as u64), ..location });
            let key_bytes = u64::from(u32_at(108));
            for slot in (0..LUKS_SLOTS).map(|slot| 208 + slot * 48) {
                let distance = u64::from(u32_at(slot + 40)) * SECTOR_SIZE;
                // What reaches out of the header can't be key material.
                let material = key_bytes.saturating_mul(u64::from(u32_at(slot + 44)));
                let material = material.min(length.saturating_sub(distance));
                let table = TableLocation {
                    offset: start.saturating_add(ByteLen::new(distance)),
                    length: ByteLen::new(material),
                };
                crypt.slots.push((u32_at(slot) == LUKS_SLOT_ACTIVE, table));
            }
        } else {
            let message = format!("there is no LUKS header at {start}");
            self.problem(ProblemKind::InvalidField, start, message);
        }
        self.crypt = Some(crypt);
    }

    /// The name of the snapshot, empty for the active layer's owner.
    pub fn owner_name(&self, owner: Owner) -> &str {
        let Owner::Snapshot(number) = owner else { return "" };
        let snapshot = usize::try_from(number).ok().and_then(|number| self.snapshots.get(number));
        snapshot.map_or("", |snapshot| snapshot.name.as_str())
    }

    /// True where the image says that its data file is a raw image by itself.
    pub fn data_file_is_raw(&self) -> bool {
        self.header.autoclear_features & 2 != 0
            && self.header.incompatible_features & incompatible::DATA_FILE != 0
    }
}

/// The directory entry at the start of `bytes`, and its length with padding; `None` where it
/// is cut off. Its bounds are not looked at.
fn bitmap_place(bytes: &[u8]) -> Option<(BitmapPlace, usize)> {
    const FIXED: usize = 24;
    let fixed = bytes.first_chunk::<FIXED>()?;
    let name_length = usize::from(u16::from_be_bytes(bytes_at(fixed, 18)));
    let extra_length = usize::try_from(u32::from_be_bytes(bytes_at(fixed, 20))).ok()?;
    let name_start = FIXED.checked_add(extra_length)?;
    let whole = name_start.checked_add(name_length)?.checked_next_multiple_of(8)?;
    let name = bytes.get(name_start..name_start + name_length).filter(|_| whole <= bytes.len())?;
    let table = TableLocation {
        offset: HostOffset::new(u64::from_be_bytes(bytes_at(fixed, 0))),
        length: ByteLen::new(u64::from(u32::from_be_bytes(bytes_at(fixed, 8))) * 8),
    };
    Some((BitmapPlace { name: String::from_utf8_lossy(name).into_owned(), table }, whole))
}

/// The header extensions. One that makes no sense is passed over; one that does not end ends
/// them all.
fn read_extensions(
    source: &Source,
    header: &Qcow2Header,
    problems: &mut Vec<Problem>,
) -> Extensions {
    /// A type that nobody knows, in place of that of an extension to be passed over.
    const PASSED_OVER: u32 = u32::MAX;
    const MAX_ERRORS: usize = 64;
    let start = u64::from(header.header_length);
    let end = header.extensions_end().min(source.length().get());
    let mut area = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
    let offset = HostOffset::new(start);
    if let Err(error) = source.read_exact(offset, &mut area, "the header extensions") {
        problems.push(Problem::of_error(&error, offset));
        return Extensions::default();
    }
    let mut passed_over = BTreeMap::new();
    for _ in 0..MAX_ERRORS {
        let error = match Extensions::parse(&area, start) {
            Ok(mut extensions) => {
                for place in &mut extensions.places {
                    place.kind =
                        passed_over.get(&place.offset.get()).copied().unwrap_or(place.kind);
                }
                return extensions;
            }
            Err(error) => error,
        };
        let here = error.offset().unwrap_or(start);
        problems.push(Problem::of_error(&error, offset));
        let at = usize::try_from(here.saturating_sub(start)).unwrap_or(0);
        let fits = |head: &[u8; 8]| {
            let length = u32::from_be_bytes(bytes_at(head, 4)) as usize;
            length <= area.len().saturating_sub(at.saturating_add(8))
        };
        let head = area.get(at..).and_then(|rest| rest.first_chunk::<8>());
        match head.filter(|head| fits(head)).map(|head| u32::from_be_bytes(bytes_at(head, 0))) {
            Some(kind) if kind != PASSED_OVER => {
                passed_over.insert(here, kind);
                area[at..at + 4].copy_from_slice(&PASSED_OVER.to_be_bytes());
            }
            _ => area.truncate(at),
        }
    }
    Extensions::default()
}

fn read_backing_name(
    source: &Source,
    header: &Qcow2Header,
    problems: &mut Vec<Problem>,
) -> Option<Vec<u8>> {
    let place = header.backing_name.filter(|place| !place.length.is_zero())?;
    let mut name = vec![0; usize::try_from(place.length.get()).ok()?];
    match source.read_exact(place.offset, &mut name, "the backing file's name") {
        Ok(()) => {
            name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
            Some(name)
        }
        Err(error) => {
            problems.push(Problem::of_error(&error, place.offset));
            None
        }
    }
}
