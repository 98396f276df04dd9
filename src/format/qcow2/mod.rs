//! qcow2, versions 2 and 3 (QEMU: docs/interop/qcow2).

pub mod bitmap;
pub mod dirty;
pub(crate) mod entry;
pub(crate) mod extension;
pub(crate) mod header;
mod l1;
mod mapping;
mod refcount;
pub(crate) mod snapshot;
#[cfg(test)]
pub(crate) mod tests;
mod trace;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use super::trace::TraceStep;
use super::{BackingReference, Format, ImageFormat, Notice, Scratch, TABLE_PAGE};
use crate::crypt::{CryptHeader, LUKS_HEADER_BYTES, LuksHeader};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::Source;
use crate::status::{Encryption, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};
use crate::worker::apart;

pub use entry::L2Entry;
use entry::l2_table_offset;
pub use extension::{ExtensionPlace, Extensions, extension_name};
pub use header::{Compression, Qcow2Header, TableLocation, incompatible};
use l1::KeptL1;
pub(crate) use refcount::refcount_of;
pub use snapshot::{Snapshot, SnapshotSelector};
pub(crate) use trace::trace_tables;

/// A qcow2 image: its active layer, or one of its internal snapshots.
#[derive(Debug)]
pub struct Qcow2Image {
    source: Arc<Source>,
    header: Qcow2Header,
    backing: Option<BackingReference>,
    data_file_name: Option<PathBuf>,
    /// Where the LUKS header is, and its length.
    crypt_header: Option<(u64, u64)>,
    snapshot: Option<Snapshot>,
    l1_table: TableLocation,
    /// The L1 entries as far as they are kept; others are read when they are needed.
    kept_l1: KeptL1,
    /// From where on the L1 table can't be read; only in an image opened past damage.
    l1_damage: Option<L1Damage>,
    /// L1 entries that name an L2 table which another one names as well; only in an image
    /// opened past damage.
    repeated_l2: RepeatedL2,
    /// Damage that spoils no guest range; only in an image opened past damage.
    other_damage: Vec<String>,
    virtual_size: ByteLen,
    allow_corrupt: bool,
    preallocated: OnceLock<bool>,
}

impl Qcow2Image {
    /// Reads the header, its extensions and, where `snapshot` is given, the snapshot table.
    ///
    /// # Errors
    /// What [`Qcow2Header::parse`] and [`Extensions::parse`] say; an unknown incompatible
    /// feature, by the name that the image gives it; the corrupt bit, unless
    /// `allow_corrupt`; a snapshot that is not there.
    pub fn open(
        source: Arc<Source>,
        snapshot: Option<&SnapshotSelector>,
        allow_corrupt: bool,
    ) -> Result<Self> {
        Self::open_inner(&source, snapshot, allow_corrupt, false)
            .map_err(|error| error.at_path(source.path()))
    }

    /// As [`open`](Self::open), but with tables that can't be read or overlap: what they
    /// spoil is damage when it is asked for, and what spoils nothing is a [`Notice`].
    ///
    /// # Errors
    /// As [`open`](Self::open), but for the L1, L2 and refcount tables.
    pub fn open_past_damage(
        source: Arc<Source>,
        snapshot: Option<&SnapshotSelector>,
        allow_corrupt: bool,
    ) -> Result<Self> {
        Self::open_inner(&source, snapshot, allow_corrupt, true)
            .map_err(|error| error.at_path(source.path()))
    }

    fn open_inner(
        source: &Arc<Source>,
        selector: Option<&SnapshotSelector>,
        allow_corrupt: bool,
        past_damage: bool,
    ) -> Result<Self> {
        let header = read_header(source, Qcow2Header::parse)?;
        let extensions = read_extensions(source, &header)?;
        header.refuse_unknown_features(&extensions)?;
        if header.incompatible_features & incompatible::CORRUPT != 0 && !allow_corrupt {
            return Err(Error::invalid(
                "the image is marked corrupt; repair a copy with 'qemu-img check -r all', or read it as it is with --allow-corrupt",
            )
            .at_offset(72));
        }
        let in_file = check_table_in_file(source, header.refcount_table, 48, "the refcount table");
        let mut other_damage = Vec::new();
        match in_file {
            Err(error) if past_damage => other_damage.push(error.to_string()),
            in_file => in_file?,
        }
        let snapshot = match selector {
            None => None,
            Some(selector) => {
                let snapshots = snapshot::read_table(source, &header)?;
                Some(selector.find(&snapshots)?.clone())
            }
        };
        let virtual_size =
            snapshot.as_ref().map_or(Ok(header.virtual_size), Snapshot::checked_virtual_size)?;
        let l1_table = snapshot.as_ref().map_or(Ok(header.l1_table), |s| s.l1_table(&header))?;
        let in_file = match &snapshot {
            None => check_table_in_file(source, l1_table, 40, "the L1 table"),
            Some(snapshot) => {
                let name = format!("the L1 table of snapshot '{}'", printable(&snapshot.name));
                check_table_in_file(source, l1_table, snapshot.entry_offset.get(), &name)
            }
        };
        let (l1_entries, l1_damage) = read_l1(source, l1_table, in_file, past_damage)?;
        let repeated_l2 = RepeatedL2::of(&l1_entries);
        if !past_damage && let Some(error) = repeated_l2.first_error_from(0, &l1_entries, l1_table)
        {
            return Err(error);
        }
        // An L1 table may have more entries than the disk needs.
        let needed = virtual_size.get().div_ceil(header.l2_coverage());
        let lost = l1_damage.as_ref().filter(|damage| damage.first_entry >= needed);
        other_damage.extend(lost.map(|damage| damage.error().to_string()));
        let repeated = repeated_l2.first_error_from(needed, &l1_entries, l1_table);
        other_damage.extend(repeated.map(|error| error.to_string()));
        Ok(Self {
            backing: read_backing(source, &header, &extensions)?,
            crypt_header: extensions.crypt_header,
            data_file_name: extensions
                .data_file
                .map(|name| PathBuf::from(OsString::from_vec(name))),
            virtual_size,
            l1_table,
            kept_l1: KeptL1::of(l1_entries),
            l1_damage,
            repeated_l2,
            other_damage,
            snapshot,
            allow_corrupt,
            source: Arc::clone(source),
            header,
            preallocated: OnceLock::new(),
        })
    }

    /// The header.
    pub fn header(&self) -> &Qcow2Header {
        &self.header
    }

    /// The whole virtual disk.
    fn disk(&self) -> GuestRange {
        GuestRange::new(GuestOffset::ZERO, GuestOffset::new(self.virtual_size.get()))
    }

    /// The header extensions, read anew.
    ///
    /// # Errors
    /// They can't be read any more.
    pub fn extensions(&self) -> Result<Extensions> {
        read_extensions(&self.source, &self.header)
            .map_err(|error| error.at_path(self.source.path()))
    }

    /// The persistent dirty bitmaps; none where the image has no bitmaps extension, or one
    /// that is not consistent (its autoclear bit is not set), which has to be ignored.
    ///
    /// # Errors
    /// The extension or the bitmap directory contradicts the specification.
    pub fn bitmaps(&self) -> Result<Vec<bitmap::BitmapDirectoryEntry>> {
        bitmap::read_bitmaps(&self.source, &self.header, &self.extensions()?)
            .map_err(|error| error.at_path(self.source.path()))
    }

    /// All internal snapshots.
    ///
    /// # Errors
    /// The snapshot table is cut off or out of bounds.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        snapshot::read_table(&self.source, &self.header)
    }
}

/// The internal snapshots of a qcow2 file, of which nothing else is looked at.
///
/// # Errors
/// It is no qcow2 file; the snapshot table is cut off or out of bounds.
pub fn read_snapshots(source: &Source) -> Result<Vec<Snapshot>> {
    snapshot::read_table(source, &read_header(source, Qcow2Header::parse)?)
}

impl ImageFormat for Qcow2Image {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> ByteLen {
        self.virtual_size
    }

    fn granularity(&self) -> u64 {
        self.header.subcluster_size()
    }

    fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    fn compression(&self) -> Option<Compression> {
        Some(self.header.compression)
    }

    fn backing(&self) -> Option<&BackingReference> {
        self.backing.as_ref()
    }

    fn crypt_header(&self) -> Result<Option<CryptHeader>> {
        let header = match self.header.encryption {
            None => return Ok(None),
            Some(Encryption::Aes) => Ok(CryptHeader::Aes),
            Some(Encryption::Luks) => {
                apart(|| read_luks_header(&self.source, &self.header, self.crypt_header))
                    .map(|header| CryptHeader::Luks(Box::new(header)))
            }
        };
        header.map(Some).map_err(|error| error.at_path(self.source.path()))
    }

    fn data_file(&self) -> Option<Option<PathBuf>> {
        self.header.has_data_file().then(|| self.data_file_name.clone())
    }

    fn looks_preallocated(&self) -> bool {
        *self.preallocated.get_or_init(|| {
            // Only a hint: where it cannot be had, data clusters are not asked for holes.
            refcount::looks_preallocated(&self.source, &self.header).unwrap_or(false)
        })
    }

    fn snapshot(&self) -> Option<&Snapshot> {
        self.snapshot.as_ref()
    }

    fn snapshot_count(&self) -> u32 {
        self.header.snapshot_count
    }

    fn notices(&self) -> Vec<Notice> {
        let features = self.header.incompatible_features;
        let dirty = features & incompatible::DIRTY != 0;
        let corrupt = features & incompatible::CORRUPT != 0 && self.allow_corrupt;
        let damage = self.other_damage.iter().cloned().map(Notice::Damaged);
        dirty
            .then_some(Notice::Dirty)
            .into_iter()
            .chain(corrupt.then_some(Notice::Corrupt))
            .chain(damage)
            .collect()
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        mapping::status(self, range, scratch, runs)
            .map_err(|error| error.at_path(self.source.path()))
    }

    fn unallocated_until(&self, from: GuestOffset) -> GuestOffset {
        mapping::unallocated_until(self, from)
    }

    fn page_coverage(&self) -> u64 {
        (TABLE_PAGE / self.header.l2_entry_size()).saturating_mul(self.header.cluster_size())
    }

    fn tables(&self, range: GuestRange, each: &mut dyn FnMut(HostOffset, HostOffset)) {
        mapping::tables(self, range, each);
    }

    fn trace(&self, guest: GuestOffset, steps: &mut Vec<TraceStep>) {
        trace::trace(self, guest, steps);
    }
}

/// Reads the header, by [`Qcow2Header::parse`] or [`Qcow2Header::parse_damaged`].
pub(crate) fn read_header(
    source: &Source,
    parse: impl Fn(&[u8]) -> Result<Qcow2Header>,
) -> Result<Qcow2Header> {
    let mut start = [0; header::KNOWN_HEADER_LENGTH];
    let n = source.read_up_to(HostOffset::ZERO, &mut start)?;
    parse(&start[..n])
}

pub(crate) fn read_extensions(source: &Source, header: &Qcow2Header) -> Result<Extensions> {
    let start = u64::from(header.header_length);
    let end = header.extensions_end();
    // The file may end inside its first cluster; what is not there reads as an end mark.
    let length = end.saturating_sub(start).min(source.length().get().saturating_sub(start));
    let mut area = vec![0; usize::try_from(length).unwrap_or(0)];
    source.read_exact(HostOffset::new(start), &mut area, "the header extensions")?;
    Extensions::parse(&area, start)
}

/// Reads the LUKS header at the place, offset and length, that the header extension gives.
///
/// # Errors
/// There is no such extension; what [`LuksHeader::parse`] says.
pub(crate) fn read_luks_header(
    source: &Source,
    header: &Qcow2Header,
    place: Option<(u64, u64)>,
) -> Result<LuksHeader> {
    let Some((offset, length)) = place else {
        return Err(Error::invalid(
            "the image is encrypted by LUKS, but its header does not say where the LUKS header is",
        ));
    };
    if !offset.is_multiple_of(header.cluster_size()) || i64::try_from(offset).is_err() {
        return Err(Error::invalid(format!(
            "the LUKS header is not on a cluster boundary below 2^63: {offset:#x}"
        )));
    }
    let start = HostOffset::new(offset);
    let mut bytes = [0; LUKS_HEADER_BYTES];
    let read = source.read_up_to(start, &mut bytes)?;
    LuksHeader::parse(&bytes[..read], start, length)
}

pub(crate) fn read_backing(
    source: &Source,
    header: &Qcow2Header,
    extensions: &Extensions,
) -> Result<Option<BackingReference>> {
    let Some(place) = header.backing_name.filter(|place| !place.length.is_zero()) else {
        return Ok(None);
    };
    let mut name = vec![0; usize::try_from(place.length.get()).unwrap_or(0)];
    source.read_exact(place.offset, &mut name, "the backing file's name")?;
    // QEMU takes the name as a C string.
    name.truncate(name.iter().position(|&b| b == 0).unwrap_or(name.len()));
    if name.is_empty() {
        return Ok(None);
    }
    let format = extensions
        .backing_format
        .as_ref()
        .filter(|format| !format.is_empty())
        .map(|format| String::from_utf8_lossy(format).into_owned());
    Ok(Some(BackingReference { name, format, expected: None }))
}

/// From where on an L1 table can't be read.
#[derive(Debug)]
struct L1Damage {
    /// The first entry that can't be.
    first_entry: u64,
    /// Why, and where in the file.
    kind: ErrorKind,
    offset: Option<u64>,
}

impl L1Damage {
    fn error(&self) -> Error {
        let error = Error::new(self.kind.clone());
        match self.offset {
            Some(offset) => error.at_offset(offset),
            None => error,
        }
    }
}

/// Reads an L1 table, which is at most 32 MiB; `in_file` says whether it is in the file
/// whole. Past damage it gives the entries that can be read.
fn read_l1(
    source: &Source,
    l1_table: TableLocation,
    in_file: Result<()>,
    past_damage: bool,
) -> Result<(Vec<u64>, Option<L1Damage>)> {
    let mut bytes = vec![0; usize::try_from(l1_table.length.get()).unwrap_or(0)];
    let entries = |bytes: &[u8]| -> Vec<u64> {
        bytes.as_chunks::<8>().0.iter().map(|&entry| u64::from_be_bytes(entry)).collect()
    };
    let whole =
        in_file.and_then(|()| source.read_exact(l1_table.offset, &mut bytes, "the L1 table"));
    let error = match whole {
        Ok(()) => return Ok((entries(&bytes), None)),
        Err(error) if !past_damage => return Err(error),
        Err(error) => error,
    };
    let mut readable = 0;
    for page in bytes.chunks_mut(4096) {
        let at = l1_table.offset.saturating_add(ByteLen::new(readable as u64));
        let read = source.read_up_to(at, page).unwrap_or(0);
        readable += read / 8 * 8;
        if read < page.len() {
            break;
        }
    }
    bytes.truncate(readable);
    let first_entry = readable as u64 / 8;
    let kind = match std::error::Error::source(&error) {
        Some(cause) => ErrorKind::Io(format!("{}: {cause}", error.kind())),
        None => error.kind().clone(),
    };
    Ok((entries(&bytes), Some(L1Damage { first_entry, kind, offset: error.offset() })))
}

/// L1 entries that name an L2 table which an earlier entry names too: a file of a few MiB
/// could otherwise stand for extents without end.
#[derive(Debug, Default)]
struct RepeatedL2 {
    /// Such an entry and the first one that names the table, by their indices; sorted.
    pairs: Vec<(u32, u32)>,
}

impl RepeatedL2 {
    fn of(l1_entries: &[u64]) -> Self {
        let indexed = l1_entries.iter().zip(0u32..);
        let mut tables: Vec<_> =
            indexed.filter_map(|(&entry, i)| Some((l2_table_offset(entry)?, i))).collect();
        tables.sort_unstable();
        let mut pairs: Vec<_> = tables
            .chunk_by(|a, b| a.0 == b.0)
            .flat_map(|same| same[1..].iter().map(|later| (later.1, same[0].1)))
            .collect();
        pairs.sort_unstable();
        Self { pairs }
    }

    /// What is wrong with L1 entry `index`, which names `table`, if that is such a one.
    #[inline]
    fn error_of(&self, index: u64, table: HostOffset, l1_table: TableLocation) -> Option<Error> {
        if self.pairs.is_empty() {
            return None;
        }
        let at = self.pairs.binary_search_by_key(&index, |&(later, _)| u64::from(later)).ok()?;
        let (_, first) = self.pairs.get(at)?;
        let error = Error::invalid(format!(
            "the L1 entries {first} and {index} overlap: both name the L2 table at {table}"
        ));
        Some(error.at_offset(l1_table.offset.get() + index * 8))
    }

    /// The error of the first such entry from entry `start` on.
    fn first_error_from(
        &self,
        start: u64,
        l1_entries: &[u64],
        l1_table: TableLocation,
    ) -> Option<Error> {
        let at = self.pairs.partition_point(|&(later, _)| u64::from(later) < start);
        let (index, _) = *self.pairs.get(at)?;
        let table = l2_table_offset(*l1_entries.get(index as usize)?)?;
        self.error_of(u64::from(index), table, l1_table)
    }
}

pub(crate) fn check_table_in_file(
    source: &Source,
    table: TableLocation,
    field: u64,
    name: &str,
) -> Result<()> {
    if table.length.is_zero() || table.end().get() <= source.length().get() {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{name} ({} bytes from {}) lies outside the file, which is {} bytes long: the image is truncated or corrupt",
        table.length.get(),
        table.offset,
        source.length().get()
    ))
    .at_offset(field))
}
