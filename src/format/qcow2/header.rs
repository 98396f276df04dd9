//! The qcow2 header (docs/interop/qcow2, section "Header").

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::extension::Extensions;
use crate::error::{Error, ErrorKind, Result};
use crate::status::Encryption;
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

/// `QFI\xfb`.
pub(crate) const MAGIC: u32 = 0x5146_49fb;

/// Bytes of a version 2 header; version 3 says its own length, at least 104.
pub(crate) const V2_HEADER_LENGTH: u32 = 72;
const V3_MIN_HEADER_LENGTH: u32 = 104;
/// Bytes of the header that imgdm knows: up to compression_type and its padding.
pub(crate) const KNOWN_HEADER_LENGTH: usize = 112;

const MIN_CLUSTER_BITS: u32 = 9;
const MAX_CLUSTER_BITS: u32 = 21;
/// QCOW_MAX_L1_SIZE in QEMU's block/qcow2.h.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
/// QCOW_MAX_REFTABLE_SIZE.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// QCOW_MAX_SNAPSHOTS.
pub(crate) const MAX_SNAPSHOTS: u32 = 65536;
/// QEMU's limit of a backing file's name.
pub(crate) const MAX_BACKING_NAME: u32 = 1023;

/// Subclusters of a cluster in an image with extended L2 entries.
pub(crate) const SUBCLUSTERS_PER_CLUSTER: u64 = 32;

/// Bits of `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be inconsistent.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be corrupt.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters lie in an external data file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not deflate.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 128 bits, with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that imgdm knows.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bit of `compatible_features`: refcounts may be written lazily.
pub(crate) const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;

/// Bit of `autoclear_features`: the bitmaps extension is consistent.
pub(crate) const AUTOCLEAR_BITMAPS: u64 = 1 << 0;

/// Bit of `autoclear_features`: the external data file is a raw image by itself.
pub(crate) const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

/// How compressed clusters are compressed (`compression_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate with a 12-bit window ("zlib" in QEMU).
    Zlib,
    /// zstd.
    Zstd,
}

/// The header as it lies in the file.
#[derive(FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    // From here on version 3.
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
    compression_type: u8,
    padding: [u8; 7],
}

/// A table that the header points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableLocation {
    /// Where it starts in the file, on a cluster boundary.
    pub offset: HostOffset,
    /// Its length in bytes; the end does not overflow 2^63.
    pub length: ByteLen,
}

impl TableLocation {
    /// First byte past the table.
    pub fn end(self) -> HostOffset {
        self.offset.saturating_add(self.length)
    }

    /// True where `length` bytes from `offset` on share a byte with the table.
    pub fn overlaps(self, offset: HostOffset, length: u64) -> bool {
        offset < self.end()
            && self.offset < offset.saturating_add(ByteLen::new(length))
            && !self.length.is_zero()
    }
}

/// A header all of whose bounds hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Virtual size in bytes, cut down to whole sectors of 512 as QEMU does.
    pub virtual_size: ByteLen,
    /// Where the backing file's name lies and its length (at most 1023 bytes, inside the
    /// first cluster), where there is one.
    pub backing_name: Option<TableLocation>,
    /// Method 1 or 2; none for an image in the clear.
    pub encryption: Option<Encryption>,
    /// The active L1 table.
    pub l1_table: TableLocation,
    /// The refcount table.
    pub refcount_table: TableLocation,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// Where the snapshot table starts: on a cluster boundary.
    pub snapshots_offset: HostOffset,
    /// Number of internal snapshots, at most 65536.
    pub snapshot_count: u32,
    /// `incompatible_features`; unknown bits may be set, see
    /// [`unknown_incompatible`](Self::unknown_incompatible).
    pub incompatible_features: u64,
    /// `compatible_features`.
    pub compatible_features: u64,
    /// `autoclear_features`.
    pub autoclear_features: u64,
    /// Length of the header: where the header extensions start.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
}

fn at(offset: usize, message: impl Into<String>) -> Error {
    Error::invalid(message).at_offset(offset as u64)
}

impl Qcow2Header {
    /// Reads the header from the first bytes of a file, 112 of them
    /// or all there are.
    ///
    /// # Errors
    /// `InvalidImage` with the field's offset where a bound of QEMU's qcow2_do_open()
    /// does not hold, or tables overlap; `Unsupported` for a version or compression type that
    /// is not known.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let header = Self::parse_damaged(bytes)?;
        header.check_tables()?;
        Ok(header)
    }

    /// Reads the header of an image that is to be checked: tables may overlap, the refcount
    /// table may be empty and what is said of the snapshot table may be wrong, as when QEMU
    /// opens an image with BDRV_O_CHECK.
    ///
    /// # Errors
    /// As [`parse`](Self::parse), but for those.
    pub(crate) fn parse_damaged(bytes: &[u8]) -> Result<Self> {
        let mut padded = [0; KNOWN_HEADER_LENGTH];
        let given = bytes.len().min(KNOWN_HEADER_LENGTH);
        padded[..given].copy_from_slice(&bytes[..given]);
        let too_short = || {
            at(given, "the file ends inside the qcow2 header: the image is truncated or corrupt")
        };
        let (raw, _) = RawHeader::ref_from_prefix(&padded).map_err(|_| too_short())?;
        if given < V2_HEADER_LENGTH as usize {
            return Err(too_short());
        }
        if raw.magic.get() != MAGIC {
            return Err(at(0, "not a qcow2 image: the magic bytes QFI\\xfb are missing"));
        }
        let version = raw.version.get();
        if !(2..=3).contains(&version) {
            return Err(Error::new(ErrorKind::Unsupported(format!(
                "qcow2 version {version} is not known (2 and 3 are)"
            )))
            .at_offset(4));
        }
        let cluster_bits = raw.cluster_bits.get();
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(at(
                20,
                format!("cluster_bits is {cluster_bits}: a cluster has 2^9 to 2^21 bytes"),
            ));
        }
        let cluster_size = 1u64 << cluster_bits;
        let v3 = version >= 3;
        if v3 && given < V3_MIN_HEADER_LENGTH as usize {
            return Err(too_short());
        }
        let feature = |field: U64| if v3 { field.get() } else { 0 };
        let header_length = if v3 { raw.header_length.get() } else { V2_HEADER_LENGTH };
        if v3 && header_length < V3_MIN_HEADER_LENGTH {
            return Err(at(100, format!("header_length is {header_length}, less than 104")));
        }
        if u64::from(header_length) > cluster_size {
            return Err(at(100, format!("header_length {header_length} exceeds the cluster size")));
        }
        let incompatible_features = feature(raw.incompatible_features);
        let compression_type = if header_length > 104 { raw.compression_type } else { 0 };
        let compression = compression(compression_type, incompatible_features)?;
        if incompatible_features & incompatible::EXTENDED_L2 != 0
            && cluster_size / SUBCLUSTERS_PER_CLUSTER < SECTOR_SIZE
        {
            return Err(at(
                20,
                format!("clusters of {cluster_size} bytes are too small for subclusters"),
            ));
        }
        let refcount_order = if v3 { raw.refcount_order.get() } else { 4 };
        if refcount_order > 6 {
            return Err(at(96, format!("refcount_order is {refcount_order}, more than 6")));
        }
        let encryption = match raw.crypt_method.get() {
            0 => None,
            1 => Some(Encryption::Aes),
            2 => Some(Encryption::Luks),
            other => return Err(at(32, format!("crypt_method {other} is not known"))),
        };
        let table = |field, name: &str, offset: U64, length: u64, limit| {
            table_location(field, name, offset.get(), length, limit, cluster_size)
        };
        let size = raw.size.get();
        let header = Self {
            version,
            cluster_bits,
            virtual_size: ByteLen::new(size).floor_to_sector(),
            backing_name: backing_name(raw, cluster_size)?,
            encryption,
            l1_table: table(
                40,
                "the L1 table",
                raw.l1_table_offset,
                u64::from(raw.l1_size.get()) * 8,
                MAX_L1_BYTES,
            )?,
            refcount_table: table(
                48,
                "the refcount table",
                raw.refcount_table_offset,
                u64::from(raw.refcount_table_clusters.get()) << cluster_bits,
                MAX_REFCOUNT_TABLE_BYTES,
            )?,
            refcount_order,
            snapshots_offset: HostOffset::new(raw.snapshots_offset.get()),
            snapshot_count: raw.nb_snapshots.get(),
            incompatible_features,
            compatible_features: feature(raw.compatible_features),
            autoclear_features: feature(raw.autoclear_features),
            header_length,
            compression,
        };
        header.check_sizes(size)?;
        Ok(header)
    }

    fn check_sizes(&self, size: u64) -> Result<()> {
        if i64::try_from(size).is_err() {
            return Err(at(24, format!("the virtual size {size:#x} is past 2^63 bytes")));
        }
        let needed = size.div_ceil(self.l2_coverage());
        let entries = self.l1_table.length.get() / 8;
        if entries < needed {
            return Err(at(
                36,
                format!("the L1 table has {entries} entries, the virtual size needs {needed}"),
            ));
        }
        if self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0 && !self.has_data_file() {
            return Err(at(88, "data-file-raw is set on an image without an external data file"));
        }
        Ok(())
    }

    /// The bounds without which an image can be checked, but not read.
    pub(crate) fn check_tables(&self) -> Result<()> {
        let (snapshots, cluster_size) = (self.snapshots_offset.get(), self.cluster_size());
        table_location(64, "the snapshot table", snapshots, 0, 0, cluster_size)?;
        if self.refcount_table.length.is_zero() {
            return Err(at(56, "the image has no refcount table"));
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(at(
                60,
                format!("{} snapshots are more than {MAX_SNAPSHOTS}", self.snapshot_count),
            ));
        }
        let header_cluster =
            TableLocation { offset: HostOffset::ZERO, length: ByteLen::new(self.cluster_size()) };
        let overlap = |a: TableLocation, b: TableLocation| a.overlaps(b.offset, b.length.get());
        if overlap(self.l1_table, header_cluster) {
            return Err(at(40, "the L1 table overlaps the header"));
        }
        if overlap(self.refcount_table, header_cluster) {
            return Err(at(48, "the refcount table overlaps the header"));
        }
        if overlap(self.l1_table, self.refcount_table) && !self.l1_table.length.is_zero() {
            return Err(at(40, "the L1 table overlaps the refcount table"));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// True where L2 entries have 128 bits, with subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible_features & incompatible::EXTENDED_L2 != 0
    }

    /// True where guest clusters lie in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & incompatible::DATA_FILE != 0
    }

    /// True where the external data file is a raw image by itself.
    pub fn has_raw_data_file(&self) -> bool {
        self.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0
    }

    /// True where refcounts may be written later than what they count.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible_features & COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// True where somebody found the image corrupt and marked it.
    pub fn is_marked_corrupt(&self) -> bool {
        self.incompatible_features & incompatible::CORRUPT != 0
    }

    /// Bytes of an L2 entry: 8, or 16 with subclusters.
    pub fn l2_entry_size(&self) -> u64 {
        if self.has_extended_l2() { 16 } else { 8 }
    }

    /// Entries of an L2 table, which is one cluster.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L2 table describes: 2^15 to 2^39.
    pub fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Bytes of a subcluster, or of a cluster where there are none.
    pub fn subcluster_size(&self) -> u64 {
        if self.has_extended_l2() {
            self.cluster_size() / SUBCLUSTERS_PER_CLUSTER
        } else {
            self.cluster_size()
        }
    }

    /// The bits of `incompatible_features` that imgdm does not know.
    pub fn unknown_incompatible(&self) -> u64 {
        self.incompatible_features & !incompatible::KNOWN
    }

    /// Refuses an image with incompatible features that imgdm does not know, naming them.
    pub(crate) fn refuse_unknown_features(&self, extensions: &Extensions) -> Result<()> {
        let unknown = self.unknown_incompatible();
        if unknown == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Unsupported(format!(
            "the image uses incompatible features that imgdm does not know: {}",
            extensions.name_incompatible(unknown)
        )))
        .at_offset(72))
    }

    /// Where the header extension area ends: at the backing file's name, or with the
    /// first cluster.
    pub fn extensions_end(&self) -> u64 {
        self.backing_name.map_or(self.cluster_size(), |name| name.offset.get())
    }
}

fn compression(compression_type: u8, incompatible_features: u64) -> Result<Compression> {
    let compression = match compression_type {
        0 => Compression::Zlib,
        1 => Compression::Zstd,
        other => {
            return Err(Error::new(ErrorKind::Unsupported(format!(
                "compression_type {other} is not known (0 zlib and 1 zstd are)"
            )))
            .at_offset(104));
        }
    };
    let flagged = incompatible_features & incompatible::COMPRESSION != 0;
    if flagged != (compression != Compression::Zlib) {
        return Err(at(
            104,
            format!(
                "compression_type {compression_type} contradicts the compression type bit of incompatible_features"
            ),
        ));
    }
    Ok(compression)
}

fn backing_name(raw: &RawHeader, cluster_size: u64) -> Result<Option<TableLocation>> {
    let offset = raw.backing_file_offset.get();
    let length = raw.backing_file_size.get();
    if offset == 0 {
        return Ok(None);
    }
    if offset > cluster_size {
        return Err(at(8, format!("backing_file_offset {offset:#x} lies past the first cluster")));
    }
    if length > MAX_BACKING_NAME || u64::from(length) > cluster_size - offset {
        return Err(at(16, format!("the backing file's name is too long: {length} bytes")));
    }
    Ok(Some(TableLocation {
        offset: HostOffset::new(offset),
        length: ByteLen::new(u64::from(length)),
    }))
}

fn table_location(
    field: usize,
    name: &str,
    offset: u64,
    length: u64,
    limit: u64,
    cluster_size: u64,
) -> Result<TableLocation> {
    if length > limit {
        return Err(at(field, format!("{name} is too large: {length} bytes, {limit} at most")));
    }
    if !offset.is_multiple_of(cluster_size) {
        return Err(at(field, format!("{name}'s offset {offset:#x} is no multiple of a cluster")));
    }
    if offset.checked_add(length).is_none_or(|end| i64::try_from(end).is_err()) {
        return Err(at(field, format!("{name}'s offset {offset:#x} is past 2^63")));
    }
    Ok(TableLocation { offset: HostOffset::new(offset), length: ByteLen::new(length) })
}
