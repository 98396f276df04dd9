//! The first cluster: header, header extensions, backing file name, in QEMU's order.

use crate::convert::create::StoredBacking;
use crate::convert::options::{CompatibilityLevel, Qcow2Options};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::extension::{BACKING_FORMAT, DATA_FILE_NAME, END, FEATURE_NAME_TABLE};
use crate::format::qcow2::header::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, KNOWN_HEADER_LENGTH, MAGIC,
    MAX_BACKING_NAME, V2_HEADER_LENGTH,
};
use crate::format::qcow2::{Compression, incompatible};
use crate::units::ByteLen;

/// The names of all features that QEMU knows: type, bit, name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];
/// Bytes of a name in the table, type and bit not counted.
const FEATURE_NAME_LENGTH: usize = 46;
/// With clusters up to this QEMU leaves the names out, to have room for a backing file's name.
const NO_FEATURE_NAMES_UP_TO: u64 = 4096;

/// Where the header says that the refcount table is.
const REFCOUNT_TABLE_FIELDS: std::ops::Range<usize> = 48..60;

/// The bytes of the first cluster, as far as they are known before the refcount table is.
#[derive(Debug)]
pub(super) struct HeaderCluster(Vec<u8>);

impl HeaderCluster {
    /// # Errors
    /// `Usage` where a name does not fit.
    pub(super) fn new(
        options: &Qcow2Options,
        size: ByteLen,
        backing: Option<&StoredBacking>,
        (l1_offset, l1_entries): (u64, u32),
    ) -> Result<Self> {
        let v3 = options.compat == CompatibilityLevel::V3;
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(if v3 { 3u32 } else { 2 }.to_be_bytes());
        bytes.extend([0; 12]); // The backing file's name, below.
        bytes.extend(options.cluster_bits.to_be_bytes());
        bytes.extend(size.get().to_be_bytes());
        bytes.extend([0; 4]); // Not encrypted.
        bytes.extend(l1_entries.to_be_bytes());
        bytes.extend(l1_offset.to_be_bytes());
        // The refcount table, and no snapshots.
        bytes.resize(V2_HEADER_LENGTH as usize, 0);
        if v3 {
            bytes.extend(incompatible_features(options).to_be_bytes());
            let lazy = if options.lazy_refcounts { COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
            bytes.extend(lazy.to_be_bytes());
            let raw = if options.data_file_raw { AUTOCLEAR_DATA_FILE_RAW } else { 0 };
            bytes.extend(raw.to_be_bytes());
            bytes.extend(options.refcount_order.to_be_bytes());
            bytes.extend(u32::try_from(KNOWN_HEADER_LENGTH).unwrap_or(0).to_be_bytes());
            bytes.push(u8::from(options.compression == Compression::Zstd));
            bytes.resize(KNOWN_HEADER_LENGTH, 0);
        }
        if let Some(format) = backing.and_then(|backing| backing.format) {
            extend(&mut bytes, BACKING_FORMAT, format.name().as_bytes());
        }
        if let Some(name) = &options.data_file {
            extend(&mut bytes, DATA_FILE_NAME, name.as_bytes());
        }
        if v3 && options.cluster_size() > NO_FEATURE_NAMES_UP_TO {
            extend(&mut bytes, FEATURE_NAME_TABLE, &feature_names());
        }
        extend(&mut bytes, END, &[]);
        let too_long = |what: &str, length: usize, limit: u64| {
            Error::new(ErrorKind::Usage(format!(
                "the name of the {what} has {length} bytes, and at most {limit} fit: give a \
                 shorter or a relative one, or a larger cluster_size"
            )))
        };
        let room = options.cluster_size().saturating_sub(bytes.len() as u64);
        if let Some(name) = &options.data_file
            && bytes.len() as u64 > options.cluster_size()
        {
            let others = (bytes.len() - name.len()) as u64;
            let limit = options.cluster_size().saturating_sub(others);
            return Err(too_long("data file", name.len(), limit));
        }
        if let Some(backing) = backing {
            let limit = room.min(u64::from(MAX_BACKING_NAME));
            let length = u32::try_from(backing.name.len()).ok();
            let length = length.filter(|&length| u64::from(length) <= limit);
            let Some(length) = length else {
                return Err(too_long("backing file", backing.name.len(), limit));
            };
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&length.to_be_bytes());
            bytes.extend(&backing.name);
        }
        bytes.resize(usize::try_from(options.cluster_size()).unwrap_or(bytes.len()), 0);
        Ok(Self(bytes))
    }

    /// The whole cluster.
    pub(super) fn with_refcount_table(mut self, offset: u64, clusters: u32) -> Vec<u8> {
        let fields = &mut self.0[REFCOUNT_TABLE_FIELDS];
        fields[..8].copy_from_slice(&offset.to_be_bytes());
        fields[8..].copy_from_slice(&clusters.to_be_bytes());
        self.0
    }
}

fn incompatible_features(options: &Qcow2Options) -> u64 {
    let bits = [
        (options.data_file.is_some(), incompatible::DATA_FILE),
        (options.compression == Compression::Zstd, incompatible::COMPRESSION),
        (options.extended_l2, incompatible::EXTENDED_L2),
    ];
    bits.iter().filter(|(set, _)| *set).fold(0, |all, (_, bit)| all | bit)
}

/// Adds a header extension, padded to 8 bytes.
fn extend(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

fn feature_names() -> Vec<u8> {
    let mut table = Vec::new();
    for (kind, bit, name) in FEATURE_NAMES {
        table.extend([kind, bit]);
        table.extend(name.as_bytes());
        table.resize(table.len() + FEATURE_NAME_LENGTH - name.len(), 0);
    }
    table
}
