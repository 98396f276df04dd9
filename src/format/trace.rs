//! The entries of an image's tables that lead to one guest byte, as they lie in the file.

use crate::error::Result;
use crate::units::HostOffset;

use super::qcow2::L2Entry;

/// One entry that was looked at.
#[derive(Debug)]
pub enum TraceStep {
    /// An entry of an L1 table (qcow2, qcow).
    L1Entry {
        /// Its number in the table.
        index: u64,
        /// Where it lies in the image file.
        at: HostOffset,
        /// As it is stored.
        value: u64,
        /// The L2 table that it names, if any.
        l2_table: Option<HostOffset>,
    },
    /// The L1 table has no such entry: that of a snapshot may be shorter than its disk.
    NoL1Entry {
        /// The number that the entry would have.
        index: u64,
        /// How many there are.
        entries: u64,
    },
    /// An entry of an L2 table (qcow2, qcow).
    L2Entry {
        /// Its number in the table.
        index: u64,
        /// Where it lies in the image file.
        at: HostOffset,
        /// As it is stored: of an extended entry, the first 64 bits.
        value: u64,
        /// What it says.
        entry: L2Entry,
    },
    /// The bitmap of an extended L2 entry, and what it says of one subcluster.
    Subcluster {
        /// Where the bitmap lies in the image file.
        at: HostOffset,
        /// As it is stored.
        bitmap: u64,
        /// Which subcluster, 0 to 31.
        number: u64,
    },
    /// The refcount of the cluster that an L2 entry names (qcow2); it takes no part in
    /// reading.
    Refcount {
        /// The cluster.
        cluster: HostOffset,
        /// Where the refcount is and what it says, or why that can't be told.
        found: Result<Refcount>,
    },
    /// The bit of a sector in a cow image's bitmap.
    SectorBit {
        /// Which sector of the disk.
        sector: u64,
        /// Where its byte lies in the image file.
        at: HostOffset,
        /// That byte.
        byte: u8,
        /// Which bit of it, 0 the least significant.
        bit: u8,
    },
    /// A cow image's bitmap has no bit for the sector: the backing file has it.
    NoSectorBit {
        /// Which sector of the disk.
        sector: u64,
    },
}

impl TraceStep {
    /// A subcluster's own two bits: that it is allocated, and that it reads as zero.
    pub fn subcluster_bits(bitmap: u64, number: u64) -> (bool, bool) {
        let bit = |at: u64| bitmap.checked_shr(u32::try_from(at).unwrap_or(64)).unwrap_or(0) & 1;
        (bit(number) == 1, bit(number.saturating_add(32)) == 1)
    }
}

/// A refcount, and the entries that lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refcount {
    /// Where the refcount table's entry lies in the file.
    pub table_entry_at: HostOffset,
    /// As it is stored; 0 where the table has no such entry.
    pub table_entry: u64,
    /// Where the refcount itself lies (of one less wide than a byte, that byte); `None`
    /// where there is no block for it.
    pub at: Option<HostOffset>,
    /// How often the cluster is used, as the image counts it.
    pub count: u64,
}
