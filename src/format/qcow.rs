//! qcow version 1: a header, one L1 table, L2 tables, clusters.
//!
//! What an image means is what QEMU's block/qcow.c reads in it, but for one thing: QEMU
//! reads a table that lies outside of the file as zeros, so that a truncated image
//! looks empty there. Here that is an error.

use std::sync::Arc;

use super::qcow2::{Compression, L2Entry};
use super::trace::TraceStep;
use super::{BackingReference, Format, ImageFormat, Scratch, be64, bytes_at};
use crate::crypt::CryptHeader;
use crate::damage::{DamageList, spoil};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Source;
use crate::status::{BlockStatus, Encryption, HostPlace, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};

/// The first four bytes: `QCOW_MAGIC`.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
/// `QCOW_OFLAG_COMPRESSED`: set in the L2 entry of a compressed cluster.
pub(crate) const OFLAG_COMPRESSED: u64 = 1 << 63;
/// Bytes of an L1 or L2 entry.
pub(crate) const ENTRY_SIZE: u64 = 8;
/// Most entries of the L1 table; QEMU holds them in an array of at most INT_MAX bytes.
pub(crate) const L1_ENTRIES_MAX: u64 = 0x7fff_ffff / ENTRY_SIZE;
/// Longest backing file name, in bytes.
pub(crate) const BACKING_NAME_MAX: u32 = 1023;
/// L1 entries that are read at a time: a page's worth.
const L1_CHUNK: usize = 512;

/// The header of a qcow version 1 image. Every bound that QEMU's `qcow_open()` asks for
/// holds in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QcowHeader {
    backing_file_offset: u64,
    backing_file_size: u32,
    mtime: u32,
    size: u64,
    cluster_bits: u8,
    l2_bits: u8,
    crypt_method: Option<Encryption>,
    l1_table_offset: u64,
    l1_size: u64,
}

impl QcowHeader {
    /// Length in bytes of the header; all its fields are big-endian.
    pub const LENGTH: usize = 48;

    /// Reads a header from the first bytes of an image.
    ///
    /// # Errors
    /// Fewer than [`Self::LENGTH`] bytes, another magic, a field outside of its limits
    /// (`InvalidImage`); another version (`Unsupported`).
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() < Self::LENGTH {
            return Err(Error::invalid(format!(
                "the qcow header takes {} bytes, and the file ends after {}",
                Self::LENGTH,
                bytes.len()
            ))
            .at_offset(0));
        }
        let u32_at = |at| u32::from_be_bytes(bytes_at(bytes, at));
        let u64_at = |at| u64::from_be_bytes(bytes_at(bytes, at));
        let invalid = |at: u64, message: String| Err(Error::invalid(message).at_offset(at));

        if bytes[..4] != MAGIC {
            return invalid(0, format!("magic {:#010x} is not qcow's 0x514649fb", u32_at(0)));
        }
        let version = u32_at(4);
        if version != 1 {
            let hint = if matches!(version, 2 | 3) { " (that is qcow2)" } else { "" };
            let message = format!("qcow version {version} is not version 1{hint}");
            return Err(Error::new(ErrorKind::Unsupported(message)).at_offset(4));
        }

        let (backing_file_offset, backing_file_size) = (u64_at(8), u32_at(16));
        if backing_file_offset != 0 && backing_file_size > BACKING_NAME_MAX {
            return invalid(
                16,
                format!(
                    "a backing file name of {backing_file_size} bytes is longer than {BACKING_NAME_MAX}"
                ),
            );
        }
        let size = u64_at(24);
        if size <= 1 {
            return invalid(24, format!("a virtual size of {size} bytes is less than 2"));
        }
        let (cluster_bits, l2_bits) = (bytes[32], bytes[33]);
        if !(9..=16).contains(&cluster_bits) {
            return invalid(32, format!("cluster_bits {cluster_bits} is not from 9 to 16"));
        }
        if !(6..=13).contains(&l2_bits) {
            return invalid(33, format!("l2_bits {l2_bits} is not from 6 to 13"));
        }
        let crypt_method = match u32_at(36) {
            0 => None,
            1 => Some(Encryption::Aes),
            other => {
                return invalid(
                    36,
                    format!("crypt_method {other} is neither 0 (none) nor 1 (AES)"),
                );
            }
        };
        let l1_size = size.div_ceil(1 << (cluster_bits + l2_bits));
        if l1_size > L1_ENTRIES_MAX {
            return invalid(
                24,
                format!(
                    "a virtual size of {size:#x} bytes needs an L1 table of {l1_size:#x} entries, more than {L1_ENTRIES_MAX:#x}"
                ),
            );
        }
        let l1_table_offset = u64_at(40);
        if !is_file_range(l1_table_offset, l1_size * ENTRY_SIZE) {
            return invalid(40, format!("l1_table_offset {l1_table_offset:#x} is past 2^63"));
        }
        Ok(Self {
            backing_file_offset,
            backing_file_size,
            mtime: u32_at(20),
            size,
            cluster_bits,
            l2_bits,
            crypt_method,
            l1_table_offset,
            l1_size,
        })
    }

    /// `backing_file_offset`: where the backing file's name is, in bytes; 0 for none.
    pub fn backing_file_offset(&self) -> HostOffset {
        HostOffset::new(self.backing_file_offset)
    }

    /// `backing_file_size`: length of the backing file's name in bytes, at most 1023
    /// where there is one.
    pub fn backing_file_size(&self) -> u32 {
        self.backing_file_size
    }

    /// `mtime`: seconds since 1970 of the backing file's last change. QEMU writes 0 and
    /// compares it with nothing.
    pub fn mtime(&self) -> u32 {
        self.mtime
    }

    /// `size`: size of the virtual disk in bytes as it is stored, at least 2 and less
    /// than 2^57; QEMU leaves the part of a last sector off.
    pub fn size(&self) -> ByteLen {
        ByteLen::new(self.size)
    }

    /// 1 << `cluster_bits`: bytes of a cluster, from 512 to 65536.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// 1 << `l2_bits`: entries of an L2 table, from 64 to 8192.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits
    }

    /// `crypt_method`: 0 is `None`, 1 is AES.
    pub fn crypt_method(&self) -> Option<Encryption> {
        self.crypt_method
    }

    /// `l1_table_offset`: where the L1 table is, in bytes.
    pub fn l1_table_offset(&self) -> HostOffset {
        HostOffset::new(self.l1_table_offset)
    }

    /// Entries of the L1 table: what `size` needs, at most 268,435,455.
    pub fn l1_entries(&self) -> u64 {
        self.l1_size
    }

    /// The stream of a compressed cluster's L2 entry: where it starts, and its length.
    #[inline]
    pub(crate) fn stream(&self, entry: u64) -> (HostOffset, ByteLen) {
        let offset_bits = 63 - self.cluster_bits;
        let host = HostOffset::new(entry & ((1 << offset_bits) - 1));
        (host, ByteLen::new((entry >> offset_bits) & (self.cluster_size() - 1)))
    }

    /// Guest bytes that one L2 table maps.
    pub(crate) fn l2_span(&self) -> u64 {
        1 << (self.cluster_bits + self.l2_bits)
    }
}

/// Whether a file can hold `length` bytes at `offset`: no offset is past 2^63 - 1.
fn is_file_range(offset: u64, length: u64) -> bool {
    offset.checked_add(length).is_some_and(|end| i64::try_from(end).is_ok())
}

/// A qcow version 1 image.
#[derive(Debug)]
pub struct QcowImage {
    source: Arc<Source>,
    header: QcowHeader,
    backing: Option<BackingReference>,
    /// L1 entries that lie in the file: all of them, but in an image opened past damage.
    l1_in_file: u64,
}

impl QcowImage {
    /// Reads the header and the name of the backing file.
    ///
    /// # Errors
    /// What [`QcowHeader::parse`] says; the L1 table or the backing file's name lies
    /// outside of the file (`InvalidImage`); a read failed.
    pub fn open(source: Arc<Source>) -> Result<Self> {
        let image = Self::open_past_damage(source)?;
        require_l1_inside(&image.source, &image.header)?;
        Ok(image)
    }

    /// As [`open`](Self::open), but with an L1 table that is not in the file whole: what
    /// that spoils is damage when it is asked for.
    ///
    /// # Errors
    /// As [`open`](Self::open), but for the L1 table.
    pub fn open_past_damage(source: Arc<Source>) -> Result<Self> {
        let header = read_header(&source)?;
        let backing = read_backing(&source, &header)?;
        let behind = source.length().get().saturating_sub(header.l1_table_offset);
        let l1_in_file = header.l1_size.min(behind / ENTRY_SIZE);
        Ok(Self { source, header, backing, l1_in_file })
    }

    /// The part of the disk that the L1 entries from `first` up to `end` describe.
    fn covered(&self, first: u64, end: u64) -> GuestRange {
        let span = self.header.l2_span();
        let start = |index: u64| GuestOffset::new(index.saturating_mul(span));
        GuestRange::new(start(first), start(end))
    }

    /// The run of `part` of what damage spoils.
    #[cold]
    fn spoiled_run(
        &self,
        spoiled: GuestRange,
        part: GuestRange,
        error: Error,
        damage: &mut Option<DamageList>,
    ) -> Result<StatusRun> {
        let disk = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(self.virtual_size().get()));
        let error = error.at_path(self.source.path());
        let status = spoil(damage, spoiled.intersection(disk), error)?;
        Ok(StatusRun { start: part.start, length: part.length(), status })
    }

    /// The header.
    pub fn header(&self) -> &QcowHeader {
        &self.header
    }

    /// What an L2 entry says of the cluster at `cluster`; `at` is where the entry lies.
    #[inline]
    fn decode(&self, entry: u64, cluster: u64, at: impl FnOnce() -> u64) -> Result<BlockStatus> {
        if entry == 0 {
            return Ok(BlockStatus::Unallocated(None));
        }
        let cluster_size = self.header.cluster_size();
        if entry & OFLAG_COMPRESSED != 0 {
            let (host, stream_length) = self.header.stream(entry);
            let cluster = GuestOffset::new(cluster);
            return Ok(BlockStatus::Compressed { host, stream_length, cluster });
        }
        if !is_file_range(entry, cluster_size) {
            return Err(Error::invalid(format!(
                "the L2 entry of guest offset {cluster:#x} names a cluster at {entry:#x}, which no file can hold"
            ))
            .at_offset(at())
            .at_path(self.source.path()));
        }
        // As qcow_co_preadv() in QEMU's block/qcow.c: EIO, though a map shows it.
        if !entry.is_multiple_of(SECTOR_SIZE) {
            return Err(Error::invalid(format!(
                "the L2 entry of guest offset {cluster:#x} names a cluster at {entry:#x}, which is no multiple of {SECTOR_SIZE}"
            ))
            .at_offset(at())
            .at_path(self.source.path()));
        }
        let place = HostPlace::in_image(HostOffset::new(entry));
        Ok(match self.header.crypt_method {
            None => BlockStatus::Data(place),
            Some(cipher) => BlockStatus::Encrypted { place, cipher },
        })
    }

    /// As `trace`; `None` where it ends early.
    fn trace_tables(&self, guest: GuestOffset, steps: &mut Vec<TraceStep>) -> Option<()> {
        let read_entry = |at: HostOffset| {
            let mut bytes = [0; 8];
            self.source.read_exact(at, &mut bytes, "a table's entry").ok()?;
            Some(u64::from_be_bytes(bytes))
        };
        let entry_at = |table: HostOffset, index: u64| {
            table.saturating_add(ByteLen::new(index.saturating_mul(ENTRY_SIZE)))
        };
        let index = guest.get() / self.header.l2_span();
        let at = entry_at(self.header.l1_table_offset(), index);
        let value = read_entry(at)?;
        let l2_table = (value != 0).then_some(HostOffset::new(value));
        steps.push(TraceStep::L1Entry { index, at, value, l2_table });
        let l2_length = self.header.l2_entries() * ENTRY_SIZE;
        require_inside(&self.source, value, l2_length, "an L2 table").ok()?;
        let index = guest.get() % self.header.l2_span() / self.header.cluster_size();
        let at = entry_at(l2_table?, index);
        let value = read_entry(at)?;
        let entry = match self.decode(value, guest.get(), || at.get()) {
            Ok(BlockStatus::Unallocated(_)) => L2Entry::Unallocated,
            Ok(BlockStatus::Compressed { host, stream_length, .. }) => {
                L2Entry::Compressed { host, stream_length }
            }
            _ => L2Entry::Standard(HostOffset::new(value)),
        };
        steps.push(TraceStep::L2Entry { index, at, value, entry });
        Some(())
    }

    /// Appends the runs of `range`, which one L2 table at `l2_offset` maps.
    fn l2_status(
        &self,
        range: GuestRange,
        l2_offset: u64,
        buffer: &mut [u8],
        merger: &mut Merger<'_>,
        damage: &mut Option<DamageList>,
    ) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let first = (range.start.get() >> self.header.cluster_bits) % self.header.l2_entries();
        let count = range.end.get().div_ceil(cluster_size) - range.start.get() / cluster_size;
        let entries_at = l2_offset + first * ENTRY_SIZE;
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        let bytes = &mut buffer[..count * 8];
        if let Err(error) =
            self.source.read_exact(HostOffset::new(entries_at), bytes, "an L2 table")
        {
            merger.push(self.spoiled_run(range, range, error, damage)?);
            return Ok(());
        }
        let mut cluster = range.start.get() / cluster_size * cluster_size;
        for index in 0..count {
            let at = || entries_at + index as u64 * ENTRY_SIZE;
            let start = GuestOffset::new(cluster);
            let length = ByteLen::new(cluster_size);
            let whole = match self.decode(be64(bytes, index), cluster, at) {
                Ok(status) => StatusRun { start, length, status },
                Err(error) => {
                    let spoiled = GuestRange::new(start, start.saturating_add(length));
                    self.spoiled_run(spoiled, spoiled, error, damage)?
                }
            };
            if let Some(run) = whole.clipped(range) {
                merger.push(run);
            }
            cluster += cluster_size;
        }
        Ok(())
    }
}

/// The name of the backing file, where the header has one.
/// Reads the header.
///
/// # Errors
/// What [`QcowHeader::parse`] says; a read failed.
pub(crate) fn read_header(source: &Source) -> Result<QcowHeader> {
    let mut start = [0; QcowHeader::LENGTH];
    let length = source.read_up_to(HostOffset::ZERO, &mut start)?;
    QcowHeader::parse(&start[..length]).map_err(|error| error.at_path(source.path()))
}

/// Refuses an L1 table that does not lie in the file whole.
pub(crate) fn require_l1_inside(source: &Source, header: &QcowHeader) -> Result<()> {
    let length = header.l1_size * ENTRY_SIZE;
    require_inside(source, header.l1_table_offset, length, "the L1 table")
}

/// Reads the backing file's name, where there is one.
pub(crate) fn read_backing(
    source: &Source,
    header: &QcowHeader,
) -> Result<Option<BackingReference>> {
    if header.backing_file_offset == 0 {
        return Ok(None);
    }
    let what = "the backing file's name";
    require_inside(source, header.backing_file_offset, u64::from(header.backing_file_size), what)?;
    let mut name = vec![0; usize::try_from(header.backing_file_size).unwrap_or(0)];
    source.read_exact(header.backing_file_offset(), &mut name, what)?;
    // To QEMU it is a C string, and an empty one is no backing file.
    if let Some(end) = name.iter().position(|&byte| byte == 0) {
        name.truncate(end);
    }
    Ok((!name.is_empty()).then_some(BackingReference { name, format: None, expected: None }))
}

/// Refuses metadata that does not lie in the file whole.
fn require_inside(source: &Source, offset: u64, length: u64, what: &str) -> Result<()> {
    match offset.checked_add(length) {
        Some(end) if end <= source.length().get() => Ok(()),
        _ => Err(Error::invalid(format!(
            "{what} ({length} bytes) lies outside the file, which is {} bytes long: the image is truncated or corrupt",
            source.length().get()
        ))
        .at_offset(offset)
        .at_path(source.path())),
    }
}

/// Joins the runs of one call that carry each other on.
struct Merger<'r> {
    runs: &'r mut Vec<StatusRun>,
    pending: Option<StatusRun>,
}

impl Merger<'_> {
    #[inline]
    fn push(&mut self, run: StatusRun) {
        if let Some(pending) = &mut self.pending {
            // Never two compressed clusters: each has its own guest offset in its status.
            if pending.status.advanced(pending.length) == run.status {
                pending.length = run.end().since(pending.start);
                return;
            }
            self.runs.push(*pending);
        }
        self.pending = Some(run);
    }

    fn finish(self) {
        self.runs.extend(self.pending);
    }
}

impl ImageFormat for QcowImage {
    fn format(&self) -> Format {
        Format::Qcow
    }

    fn virtual_size(&self) -> ByteLen {
        self.header.size().floor_to_sector()
    }

    fn granularity(&self) -> u64 {
        self.header.cluster_size().max(SECTOR_SIZE)
    }

    fn compression(&self) -> Option<Compression> {
        Some(Compression::Zlib)
    }

    fn backing(&self) -> Option<&BackingReference> {
        self.backing.as_ref()
    }

    fn crypt_header(&self) -> Result<Option<CryptHeader>> {
        Ok(self.header.crypt_method.map(|_| CryptHeader::Aes))
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let span = self.header.l2_span();
        let l2_length = self.header.l2_entries() * ENTRY_SIZE;
        // At most 64 KiB of an L2 table, and a page of the L1 table.
        let buffer_length = L1_CHUNK * 8 + usize::try_from(l2_length).unwrap_or(0);
        let Scratch { table, damage, .. } = scratch;
        table.reserve(buffer_length);
        let (l1_buffer, l2_buffer) = table.split_at_mut(L1_CHUNK * 8);
        let mut merger = Merger { runs, pending: None };

        let mut index = range.start.get() / span;
        let wanted_end = range.end.get().div_ceil(span).min(self.header.l1_size);
        let end = wanted_end.min(self.l1_in_file);
        while index < end {
            let count = usize::try_from(end - index).unwrap_or(L1_CHUNK).min(L1_CHUNK);
            let chunk = &mut l1_buffer[..count * 8];
            let chunk_at = self.header.l1_table_offset + index * ENTRY_SIZE;
            if let Err(error) =
                self.source.read_exact(HostOffset::new(chunk_at), chunk, "the L1 table")
            {
                let spoiled = self.covered(index, index + count as u64);
                let part = range.intersection(spoiled);
                merger.push(self.spoiled_run(spoiled, part, error, damage)?);
                index += count as u64;
                continue;
            }
            for entry in 0..count {
                let mapped = self.covered(index, index + 1);
                let part = range.intersection(mapped);
                let l2_offset = be64(chunk, entry);
                if l2_offset == 0 {
                    merger.push(StatusRun {
                        start: part.start,
                        length: part.length(),
                        status: BlockStatus::Unallocated(None),
                    });
                } else if let Err(error) =
                    require_inside(&self.source, l2_offset, l2_length, "an L2 table")
                {
                    merger.push(self.spoiled_run(mapped, part, error, damage)?);
                } else {
                    self.l2_status(part, l2_offset, l2_buffer, &mut merger, damage)?;
                }
                index += 1;
            }
        }
        if index < wanted_end {
            let spoiled = self.covered(self.l1_in_file, self.header.l1_size);
            let part = range.intersection(self.covered(index, wanted_end));
            // The file has not grown: it is locked.
            let error = require_l1_inside(&self.source, &self.header)
                .err()
                .unwrap_or_else(|| Error::invalid("the L1 table was cut off"));
            merger.push(self.spoiled_run(spoiled, part, error, damage)?);
        }
        merger.finish();
        Ok(())
    }

    fn trace(&self, guest: GuestOffset, steps: &mut Vec<TraceStep>) {
        let _ = self.trace_tables(guest, steps);
    }
}

#[cfg(test)]
mod tests;
