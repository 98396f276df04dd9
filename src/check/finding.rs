//! What a check finds: kind, severity, place.

use std::fmt;

use crate::units::{ByteLen, GuestOffset, HostOffset};

/// How much a finding weighs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// A part could not be checked: QEMU's `check-errors`.
    Error,
    /// Data may be lost, or a write may destroy some: QEMU's `corruptions`.
    Corruption,
    /// Space is wasted: QEMU's `leaks`.
    Leak,
    /// Worth knowing; qemu-img does not count it, and neither does the exit status.
    Notice,
}

impl Severity {
    /// The name in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Corruption => "corruption",
            Self::Leak => "leak",
            Self::Notice => "notice",
        }
    }
}

macro_rules! finding_kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $severity:ident;)*) => {
        /// What is found. The names are stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum FindingKind {
            $($(#[$doc])* $name,)*
        }

        impl FindingKind {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The name in the output.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// How much it weighs.
            pub fn severity(self) -> Severity {
                match self { $(Self::$name => Severity::$severity,)* }
            }
        }
    };
}

finding_kinds! {
    /// A read failed.
    ReadError = "read-error", Error;
    /// The file has more clusters than QEMU checks (2^31 - 1).
    FileTooLarge = "file-too-large", Error;
    /// Tables overlap so often that reading them all would take forever.
    TooMuchWork = "too-much-work", Error;
    /// The header says something of the snapshot table that can't be.
    SnapshotTableInvalid = "snapshot-table-invalid", Error;
    /// A structure whose end is past 2^63.
    OffsetTooLarge = "offset-too-large", Error;
    /// The refcount block of these clusters can't be read.
    RefcountUnreadable = "refcount-unreadable", Error;
    /// The LUKS header, or the extension that points to it, is missing or not valid.
    CryptHeaderInvalid = "crypt-header-invalid", Error;
    /// The bitmaps extension breaks a bound.
    BitmapsExtensionInvalid = "bitmaps-extension-invalid", Error;
    /// A bitmap can't be loaded: its table is not as long as it has to be, or its name is
    /// another's.
    BitmapInvalid = "bitmap-invalid", Error;

    /// Reserved bits of an L1 entry are set.
    L1ReservedBits = "l1-reserved-bits", Corruption;
    /// An L1 entry names an L2 table that starts on no cluster boundary.
    L2TableUnaligned = "l2-table-unaligned", Corruption;
    /// Reserved bits of an L2 entry are set.
    L2ReservedBits = "l2-reserved-bits", Corruption;
    /// A compressed cluster has the COPIED flag.
    CompressedCopied = "compressed-copied", Corruption;
    /// A compressed cluster in an image whose data are in another file.
    CompressedInDataFile = "compressed-in-data-file", Corruption;
    /// A compressed cluster has subclusters.
    CompressedSubclusters = "compressed-subclusters", Corruption;
    /// A subcluster is both allocated and zero.
    SubclustersContradict = "subclusters-contradict", Corruption;
    /// A subcluster is allocated, and there is no cluster.
    SubclustersWithoutCluster = "subclusters-without-cluster", Corruption;
    /// A cluster's host offset is on no cluster boundary.
    ClusterUnaligned = "cluster-unaligned", Corruption;
    /// Something lies past the end of the file.
    PastFileEnd = "past-file-end", Corruption;
    /// More references to a cluster than a refcount can hold.
    RefcountOverflow = "refcount-overflow", Corruption;
    /// Fewer references by the refcount than there are.
    RefcountTooLow = "refcount-too-low", Corruption;
    /// The COPIED flag says other than the refcount.
    CopiedFlag = "copied-flag", Corruption;
    /// Reserved bits of a refcount table entry are set.
    RefcountTableReservedBits = "refcount-table-reserved-bits", Corruption;
    /// A refcount block starts on no cluster boundary.
    RefcountBlockUnaligned = "refcount-block-unaligned", Corruption;
    /// A refcount block lies past the end of the file.
    RefcountBlockPastFileEnd = "refcount-block-past-file-end", Corruption;
    /// Something else uses a refcount block's cluster too.
    RefcountBlockShared = "refcount-block-shared", Corruption;
    /// A version 3 snapshot without its VM state and disk sizes.
    SnapshotIncomplete = "snapshot-incomplete", Corruption;
    /// Snapshots in an image whose data are in another file.
    SnapshotsWithDataFile = "snapshots-with-data-file", Corruption;
    /// A snapshot's L1 table starts on no cluster boundary.
    SnapshotL1Unaligned = "snapshot-l1-unaligned", Corruption;
    /// A snapshot's L1 table is larger than 32 MiB.
    SnapshotL1TooLarge = "snapshot-l1-too-large", Corruption;
    /// The bitmap directory breaks a bound.
    BitmapDirectoryInvalid = "bitmap-directory-invalid", Corruption;
    /// An entry of a bitmap table breaks a bound.
    BitmapTableInvalid = "bitmap-table-invalid", Corruption;
    /// Two tables or clusters of a qcow image share bytes.
    Overlap = "overlap", Corruption;

    /// Clusters with a refcount that nothing, or less, refers to.
    LeakedClusters = "leaked-clusters", Leak;

    /// The dirty bit is set: refcounts may be out of date.
    MarkedDirty = "marked-dirty", Notice;
    /// The corrupt bit is set.
    MarkedCorrupt = "marked-corrupt", Notice;
    /// A cluster of metadata is used by something else as well.
    MetadataOverlap = "metadata-overlap", Notice;
    /// Two guest clusters share a host cluster, and there is no snapshot.
    ClusterShared = "cluster-shared", Notice;
    /// A version 2 image with a zero flag, which came with version 3.
    ZeroFlagInVersion2 = "zero-flag-in-version-2", Notice;
    /// The zero flag in an image with subclusters, where it is reserved.
    ZeroFlagWithSubclusters = "zero-flag-with-subclusters", Notice;
    /// In a raw external data file a cluster has to be at its guest offset.
    DataFileOffset = "data-file-offset", Notice;
    /// Two snapshots have one ID.
    SnapshotDuplicateId = "snapshot-duplicate-id", Notice;
    /// A program that knows no bitmaps wrote to the image, and its bitmaps are void.
    BitmapsInconsistent = "bitmaps-inconsistent", Notice;
    /// A bitmap was not saved when the image was last written to.
    BitmapInUse = "bitmap-in-use", Notice;
    /// Reserved or unknown bits of the header are set.
    UnknownFeature = "unknown-feature", Notice;
    /// Bits of a cow bitmap for sectors that the disk has not.
    StrayBits = "stray-bits", Notice;
}

impl FindingKind {
    pub(crate) fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for FindingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What holds what is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// The header.
    Header,
    /// The L1 table.
    L1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// A bitmap table, or a cow image's bitmap.
    Bitmap,
    /// The LUKS header.
    CryptHeader,
}

impl Table {
    /// The name in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::L1 => "l1",
            Self::L2 => "l2",
            Self::RefcountTable => "refcount-table",
            Self::RefcountBlock => "refcount-block",
            Self::SnapshotTable => "snapshot-table",
            Self::BitmapDirectory => "bitmap-directory",
            Self::Bitmap => "bitmap",
            Self::CryptHeader => "crypt-header",
        }
    }
}

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which table.
    pub table: Table,
    /// Where the table starts in the file.
    pub offset: HostOffset,
    /// Which entry of it, counted from 0; in the header the field's offset.
    pub entry: Option<u64>,
    /// The snapshot it belongs to, counted from 0 in the snapshot table; `None` for the
    /// active layer.
    pub snapshot: Option<u32>,
}

impl Place {
    /// A field of the header.
    pub(crate) fn header(field: u64) -> Self {
        Self::new(Table::Header, HostOffset::ZERO).entry(field)
    }

    pub(crate) fn new(table: Table, offset: HostOffset) -> Self {
        Self { table, offset, entry: None, snapshot: None }
    }

    pub(crate) fn entry(mut self, entry: u64) -> Self {
        self.entry = Some(entry);
        self
    }

    pub(crate) fn snapshot(mut self, snapshot: Option<u32>) -> Self {
        self.snapshot = snapshot;
        self
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.table, self.entry) {
            (Table::Header, Some(field)) => write!(f, "header field at {field:#x}")?,
            (table, None) => write!(f, "{} at {}", table.name(), self.offset)?,
            (table, Some(entry)) => {
                write!(f, "{} at {}, entry {entry}", table.name(), self.offset)?;
            }
        }
        match self.snapshot {
            Some(snapshot) => write!(f, ", of snapshot {snapshot}"),
            None => Ok(()),
        }
    }
}

/// One thing that is found, or several alike that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: FindingKind,
    /// Where in the file the thing is (not the table that names it), where it has a place.
    pub host: Option<HostOffset>,
    /// How long it is there, in bytes.
    pub length: Option<ByteLen>,
    /// The guest offset that it is about.
    pub guest: Option<GuestOffset>,
    /// The table that says so.
    pub place: Option<Place>,
    /// How many times qemu-img counts it: once for each cluster, and once for each L1 table
    /// through which it comes to the entry.
    pub count: u64,
    /// In words.
    pub message: String,
}

impl Finding {
    pub(crate) fn new(kind: FindingKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            host: None,
            length: None,
            guest: None,
            place: None,
            count: 1,
            message: message.into(),
        }
    }

    pub(crate) fn host(mut self, offset: u64, length: u64) -> Self {
        self.host = Some(HostOffset::new(offset));
        self.length = Some(ByteLen::new(length));
        self
    }

    pub(crate) fn guest(mut self, offset: u64) -> Self {
        self.guest = Some(GuestOffset::new(offset));
        self
    }

    pub(crate) fn place(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }
}
