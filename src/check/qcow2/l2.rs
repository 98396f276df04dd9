//! One L2 table: what its entries refer to, and whether they may.

use super::image::{COPIED, Image, OFFSET_MASK};
use crate::check::finding::{Finding, FindingKind, Place, Table};
use crate::check::log::Tally;
use crate::check::references::References;
use crate::error::Result;
use crate::format::qcow2::entry::L2Entry;
use crate::format::qcow2::header::AUTOCLEAR_DATA_FILE_RAW;
use crate::units::HostOffset;

/// L2E_STD_RESERVED_MASK in QEMU's block/qcow2.h.
const RESERVED: u64 = 0x3f00_0000_0000_01fe;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// An L2 table, and who names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Table {
    /// Where it starts in the file.
    pub(super) offset: u64,
    /// Where the first L1 table starts that names it: the active one where that does.
    pub(super) l1_offset: u64,
    /// The entry of it that does.
    pub(super) l1_index: u64,
    /// The snapshot whose L1 table that is.
    pub(super) snapshot: Option<u32>,
    /// How many L1 entries name it.
    pub(super) named: u64,
    /// How many of them are of the active L1 table.
    pub(super) active: u64,
    /// Some of these has not the COPIED flag.
    pub(super) some_not_copied: bool,
}

impl L2Table {
    /// The L1 entry.
    pub(super) fn named_by(&self) -> Place {
        Place::new(Table::L1, HostOffset::new(self.l1_offset))
            .entry(self.l1_index)
            .snapshot(self.snapshot)
    }

    pub(super) fn place(&self) -> Place {
        Place::new(Table::L2, HostOffset::new(self.offset)).snapshot(self.snapshot)
    }
}

/// What the entries of active tables are: QEMU's BlockFragInfo.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Clusters {
    pub(super) allocated: u64,
    pub(super) fragmented: u64,
    pub(super) compressed: u64,
    /// Some entry of an active table, or one that names such a table, has not the COPIED flag.
    pub(super) some_not_copied: bool,
}

impl Clusters {
    pub(super) fn add(&mut self, other: Self) {
        self.allocated = self.allocated.saturating_add(other.allocated);
        self.fragmented = self.fragmented.saturating_add(other.fragmented);
        self.compressed = self.compressed.saturating_add(other.compressed);
        self.some_not_copied |= other.some_not_copied;
    }

    /// As often as an active L1 table names the table.
    fn times(self, active: u64) -> Self {
        Self {
            allocated: self.allocated.saturating_mul(active),
            fragmented: self.fragmented.saturating_mul(active),
            compressed: self.compressed.saturating_mul(active),
            some_not_copied: self.some_not_copied && active > 0,
        }
    }
}

struct Walk<'w, R> {
    image: &'w Image<'w>,
    table: &'w L2Table,
    refs: &'w R,
    tally: &'w mut Tally,
    /// May take what the tally keeps.
    tell: &'w mut dyn FnMut(&mut Tally),
    clusters: Clusters,
    /// Where the next cluster has to be not to count as fragmented; 0 before the first.
    contiguous: u64,
}

/// Walks a table as check_refcounts_l2() in QEMU's block/qcow2-refcount.c does. `tell` may
/// take what the tally keeps before the table is at its end.
///
/// # Errors
/// It can't be read.
pub(super) fn walk<R: References>(
    image: &Image<'_>,
    table: &L2Table,
    buffer: &mut [u8],
    refs: &R,
    tally: &mut Tally,
    tell: &mut dyn FnMut(&mut Tally),
) -> Result<Clusters> {
    image.read(table.offset, buffer)?;
    let clusters = Clusters::default();
    let mut walk = Walk { image, table, refs, tally, tell, clusters, contiguous: 0 };
    let entries = buffer.as_chunks::<8>().0;
    if image.header.has_extended_l2() {
        for (index, pair) in (0u64..).zip(entries.as_chunks::<2>().0) {
            let [entry, bitmap] = pair.map(u64::from_be_bytes);
            if entry | bitmap != 0 {
                walk.entry(index, entry, bitmap);
            }
        }
    } else if image.header.has_data_file() {
        for (index, entry) in (0u64..).zip(entries) {
            walk.entry(index, u64::from_be_bytes(*entry), 0);
        }
    } else {
        walk.standard_entries(entries);
    }
    Ok(walk.clusters.times(table.active))
}

impl<R: References> Walk<'_, R> {
    /// The entries of most images: most of them are nothing, or lead on from the one before
    /// to the cluster that follows in the file.
    fn standard_entries(&mut self, entries: &[[u8; 8]]) {
        let cluster_bits = self.image.file.cluster_bits;
        let cluster_size = self.image.cluster_size();
        let special = COMPRESSED | RESERVED | ZERO | ((cluster_size - 1) & OFFSET_MASK);
        let clusters = self.image.file.clusters();
        let mut all_copied = COPIED;
        let mut index = 0;
        while let Some((first, rest)) = entries.get(index..).and_then(<[_]>::split_first) {
            let entry = u64::from_be_bytes(*first);
            let offset = entry & OFFSET_MASK;
            let cluster = offset >> cluster_bits;
            if entry == 0 {
                index += 1;
                continue;
            }
            if entry & special != 0 || cluster == 0 || cluster >= clusters {
                self.entry(index as u64, entry, 0);
                index += 1;
                continue;
            }
            let mut expected = entry;
            let followers = rest
                .iter()
                .take(usize::try_from(clusters - cluster - 1).unwrap_or(usize::MAX))
                .take_while(|&&entry| {
                    expected = expected.wrapping_add(cluster_size);
                    u64::from_be_bytes(entry) == expected
                })
                .count();
            let count = followers as u64 + 1;
            all_copied &= entry;
            self.clusters.allocated += count;
            self.clusters.fragmented +=
                u64::from(self.contiguous != 0 && offset != self.contiguous);
            self.contiguous = offset + count * cluster_size;
            self.refs.add(cluster, count, self.table.named);
            index += 1 + followers;
        }
        self.clusters.some_not_copied |= all_copied == 0;
    }

    /// An entry of any sort.
    fn entry(&mut self, index: u64, entry: u64, bitmap: u64) {
        (self.tell)(self.tally);
        let decoded = self.image.format.decode(entry);
        if !matches!(decoded, L2Entry::Compressed { .. }) && entry & RESERVED != 0 {
            self.found(FindingKind::L2ReservedBits, index, || {
                format!("reserved bits are set in the L2 entry {entry:#018x}")
            });
        }
        match decoded {
            L2Entry::Compressed { host, stream_length } => {
                self.compressed(index, entry, bitmap, (host.get(), stream_length.get()));
            }
            L2Entry::Standard(host) | L2Entry::ZeroAllocated(host) => {
                self.cluster(index, entry, bitmap, host.get());
            }
            L2Entry::ZeroPlain => {}
            L2Entry::Unallocated if bitmap & 0xffff_ffff != 0 => {
                self.found(FindingKind::SubclustersWithoutCluster, index, || {
                    format!("subclusters {bitmap:#018x} are allocated, and no cluster is")
                });
            }
            L2Entry::Unallocated => {}
        }
        let header = self.image.header;
        if entry & (COMPRESSED | ZERO) == ZERO {
            if header.has_extended_l2() {
                self.found(FindingKind::ZeroFlagWithSubclusters, index, || {
                    "bit 0 is set, which is reserved with subclusters".to_owned()
                });
            } else if header.version < 3 {
                self.found(FindingKind::ZeroFlagInVersion2, index, || {
                    "the zero flag is set, which version 2 does not have".to_owned()
                });
            }
        }
    }

    fn compressed(&mut self, index: u64, entry: u64, bitmap: u64, stream: (u64, u64)) {
        if entry & COPIED != 0 {
            self.found(FindingKind::CompressedCopied, index, || {
                format!("the COPIED flag is set on a compressed cluster: {entry:#018x}")
            });
        }
        if self.image.header.has_data_file() {
            self.found(FindingKind::CompressedInDataFile, index, || {
                "a compressed cluster in an image with an external data file".to_owned()
            });
            return;
        }
        if bitmap != 0 {
            self.found(FindingKind::CompressedSubclusters, index, || {
                format!("a compressed cluster has subclusters: {bitmap:#018x}")
            });
            return;
        }
        self.refer(index, stream, "the compressed cluster");
        self.clusters.allocated += 1;
        self.clusters.compressed += 1;
        self.clusters.fragmented += 1;
    }

    fn cluster(&mut self, index: u64, entry: u64, bitmap: u64, offset: u64) {
        self.clusters.some_not_copied |= entry & COPIED == 0;
        if (bitmap >> 32) & bitmap != 0 {
            self.found(FindingKind::SubclustersContradict, index, || {
                format!("subclusters are both allocated and zero: {bitmap:#018x}")
            });
        }
        let cluster_size = self.image.cluster_size();
        if !offset.is_multiple_of(cluster_size) {
            self.found(FindingKind::ClusterUnaligned, index, || {
                format!("the cluster is at {offset:#x}, on no cluster boundary")
            });
        }
        self.clusters.allocated += 1;
        self.clusters.fragmented += u64::from(self.contiguous != 0 && offset != self.contiguous);
        self.contiguous = offset + cluster_size;
        if !self.image.header.has_data_file() {
            self.refer(index, (offset, cluster_size), "the cluster");
        } else if self.image.header.autoclear_features & AUTOCLEAR_DATA_FILE_RAW != 0
            && offset != self.guest(index)
        {
            self.found(FindingKind::DataFileOffset, index, || {
                format!("a cluster of a raw external data file is at {offset:#x} in it")
            });
        }
    }

    fn refer(&mut self, index: u64, (offset, size): (u64, u64), what: &str) {
        let (place, guest) = (self.table.place().entry(index), self.guest(index));
        self.image.refer(self.refs, self.tally, (offset, size, self.table.named), || {
            Finding::new(FindingKind::PastFileEnd, what).place(place).guest(guest)
        });
    }

    fn found(&mut self, kind: FindingKind, index: u64, message: impl FnOnce() -> String) {
        let (place, guest) = (self.table.place().entry(index), self.guest(index));
        self.tally.add(kind, self.table.named, || {
            Finding::new(kind, message()).place(place).guest(guest)
        });
    }

    fn guest(&self, index: u64) -> u64 {
        guest_offset(self.image, self.table.l1_index, index)
    }
}

/// The guest offset of an L2 entry.
pub(super) fn guest_offset(image: &Image<'_>, l1_index: u64, index: u64) -> u64 {
    // L1 tables have less than 2^23 entries, of less than 2^40 bytes each.
    l1_index * image.header.l2_coverage() + index * image.cluster_size()
}
