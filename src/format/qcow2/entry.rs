//! L1 and L2 entries (docs/interop/qcow2, section "Cluster mapping").

use super::header::{Qcow2Header, SUBCLUSTERS_PER_CLUSTER};
use crate::units::{ByteLen, HostOffset};

/// Bits 9 to 55: the host offset of an L1 or standard L2 entry.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
pub(crate) const COPIED: u64 = 1 << 63;
pub(crate) const COMPRESSED: u64 = 1 << 62;
pub(crate) const ZERO: u64 = 1;

/// The L2 table that an L1 entry points to; `None` where it points to none.
#[inline]
pub(crate) fn l2_table_offset(l1_entry: u64) -> Option<HostOffset> {
    match l1_entry & OFFSET_MASK {
        0 => None,
        offset => Some(HostOffset::new(offset)),
    }
}

/// What an L2 entry says of its cluster (or, with subclusters, of where it lies).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L2Entry {
    /// No host cluster.
    Unallocated,
    /// A host cluster.
    Standard(HostOffset),
    /// A zero cluster without a host cluster (version 3, no subclusters).
    ZeroPlain,
    /// A zero cluster that keeps its host cluster (version 3, no subclusters).
    ZeroAllocated(HostOffset),
    /// A compressed cluster.
    Compressed {
        /// Where the stream starts.
        host: HostOffset,
        /// From there to the end of the last 512-byte sector that holds some of it.
        stream_length: ByteLen,
    },
}

/// How to read L2 entries of one image; worked out of the header once, for speed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct L2Format {
    cluster_bits: u32,
    extended: bool,
    data_file: bool,
    /// The bits by which entries differ.
    known: u64,
    /// The bits that the entry of a data cluster has not, unless it is a special one.
    not_plain: u64,
}

impl L2Format {
    /// The format of this image's entries.
    pub(crate) fn of(header: &Qcow2Header) -> Self {
        Self::new(header.cluster_bits, header.has_extended_l2(), header.has_data_file())
    }

    fn new(cluster_bits: u32, extended: bool, data_file: bool) -> Self {
        let zero = if extended { 0 } else { ZERO };
        // Of offset 0 with an external data file only this bit tells what it means.
        let copied = if data_file { COPIED } else { 0 };
        let known = OFFSET_MASK | COMPRESSED | zero | copied;
        let in_cluster = ((1 << cluster_bits) - 1) & OFFSET_MASK;
        let not_plain = COMPRESSED | ZERO | in_cluster;
        Self { cluster_bits, extended, data_file, known, not_plain }
    }

    /// The host cluster of an entry that is nothing but a well-formed reference to one;
    /// `None` for anything else, which [`decode`](Self::decode) tells apart.
    #[inline]
    pub(crate) fn plain_host(self, entry: u64) -> Option<HostOffset> {
        let is_plain = self.against_plain(entry) == 0;
        is_plain.then_some(HostOffset::new(self.host_of_plain(entry)))
    }

    /// The bits that speak against an entry's having a [`plain_host`](Self::plain_host); 0 where
    /// it has. Those of many entries put together tell of all of them, which a processor works
    /// out for several at a time.
    #[inline(always)]
    pub(crate) fn against_plain(self, entry: u64) -> u64 {
        // Of offset 0, and of no other, the topmost bit has to be borrowed.
        let is_zero = self.host_of_plain(entry).wrapping_sub(1) & 1 << 63;
        entry & self.not_plain | is_zero
    }

    /// The offset of that, in bytes.
    #[inline(always)]
    pub(crate) fn host_of_plain(self, entry: u64) -> u64 {
        entry & OFFSET_MASK
    }

    /// How many of the entries after `first` say of their clusters what it says of its
    /// own: on the host bytes that follow, or on none. Compressed clusters stand alone.
    #[inline]
    pub(crate) fn followers(self, first: u64, rest: &[[u8; 8]]) -> usize {
        let step = match self.decode(first) {
            L2Entry::Compressed { .. } => return 0,
            L2Entry::Standard(_) | L2Entry::ZeroAllocated(_) => 1 << self.cluster_bits,
            L2Entry::Unallocated | L2Entry::ZeroPlain => 0,
        };
        let mut expected = first & self.known;
        rest.iter()
            .take_while(|&&entry| {
                expected = expected.wrapping_add(step);
                u64::from_be_bytes(entry) & self.known == expected
            })
            .count()
    }

    /// Decodes the (first) 64 bits of an entry.
    #[inline]
    pub(crate) fn decode(self, entry: u64) -> L2Entry {
        let offset = HostOffset::new(entry & OFFSET_MASK);
        if entry & COMPRESSED != 0 {
            let shift = 62 - (self.cluster_bits - 8);
            let host = entry & ((1 << shift) - 1);
            let sectors = ((entry >> shift) & ((1 << (self.cluster_bits - 8)) - 1)) + 1;
            L2Entry::Compressed {
                host: HostOffset::new(host),
                stream_length: ByteLen::new(sectors * 512 - host % 512),
            }
        } else if entry & ZERO != 0 && !self.extended {
            if offset == HostOffset::ZERO {
                L2Entry::ZeroPlain
            } else {
                L2Entry::ZeroAllocated(offset)
            }
        } else if offset == HostOffset::ZERO && !(self.data_file && entry & COPIED != 0) {
            // With an external data file the offset 0 is a valid one.
            L2Entry::Unallocated
        } else {
            L2Entry::Standard(offset)
        }
    }
}

/// What an extended L2 entry's bitmap says of one subcluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subcluster {
    /// The backing file answers.
    Unallocated,
    /// Allocated: the bytes are in the host cluster.
    Allocated,
    /// Reads as zero.
    Zero,
}

/// The subcluster bitmap: the second 64 bits of an extended L2 entry. Bit x is
/// "subcluster x is allocated", bit 32 + x "subcluster x reads as zero".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SubclusterBitmap(u64);

impl SubclusterBitmap {
    /// Checks a bitmap; `None` where a subcluster is both allocated and zero, or
    /// allocated in an entry without a host cluster.
    pub(crate) fn new(bitmap: u64, has_host_cluster: bool) -> Option<Self> {
        let allocated = bitmap & 0xffff_ffff;
        let zero = bitmap >> 32;
        (allocated & zero == 0 && (has_host_cluster || allocated == 0)).then_some(Self(bitmap))
    }

    /// The status of subcluster `index` (less than 32).
    pub(crate) fn get(self, index: u64) -> Subcluster {
        if self.0 >> (32 + index) & 1 == 1 {
            Subcluster::Zero
        } else if self.0 >> index & 1 == 1 {
            Subcluster::Allocated
        } else {
            Subcluster::Unallocated
        }
    }

    /// How many subclusters from `index` on have the same status.
    pub(crate) fn run_length(self, index: u64) -> u64 {
        let first = self.get(index);
        (index..SUBCLUSTERS_PER_CLUSTER).take_while(|&i| self.get(i) == first).count() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> L2Format {
        L2Format::new(16, false, false)
    }

    #[test]
    fn entries_decode_as_the_specification_says() {
        let host = HostOffset::new(0x5_0000);
        assert_eq!(plain().decode(0), L2Entry::Unallocated);
        assert_eq!(plain().decode(COPIED), L2Entry::Unallocated);
        assert_eq!(plain().decode(COPIED | 0x5_0000), L2Entry::Standard(host));
        assert_eq!(plain().decode(1), L2Entry::ZeroPlain);
        assert_eq!(plain().decode(0x5_0001), L2Entry::ZeroAllocated(host));
    }

    #[test]
    fn offset_zero_is_a_cluster_of_a_data_file_only_when_marked() {
        let format = L2Format::new(16, false, true);
        assert_eq!(format.decode(COPIED), L2Entry::Standard(HostOffset::ZERO));
        assert_eq!(format.decode(0), L2Entry::Unallocated);
    }

    #[test]
    fn entries_that_carry_each_other_on_make_a_run() {
        let followers = |format: L2Format, entries: &[u64]| {
            let bytes: Vec<_> = entries.iter().map(|entry| entry.to_be_bytes()).collect();
            format.followers(entries[0], &bytes[1..])
        };
        let plain = plain();
        // Neighbouring host clusters, whatever bit 63 and reserved bits say.
        assert_eq!(followers(plain, &[0x5_0000, COPIED | 0x6_0000, 0x7_0002, 0x9_0000]), 2);
        assert_eq!(followers(plain, &[0x5_0000, 0x5_0000]), 0);
        assert_eq!(followers(plain, &[0x5_0000, 0x6_0001]), 0);
        assert_eq!(followers(plain, &[0x5_0001, 0x6_0001, 0x7_0000]), 1);
        assert_eq!(followers(plain, &[0, COPIED, 0, ZERO]), 2);
        assert_eq!(followers(plain, &[ZERO, ZERO, ZERO, 0]), 2);
        assert_eq!(followers(plain, &[COMPRESSED | 5, COMPRESSED | 5]), 0);
        // The last cluster that an entry can name has none after it.
        assert_eq!(followers(plain, &[OFFSET_MASK & !0xffff, 0]), 0);
        // Offset 0 of a data file is a host cluster where bit 63 says so.
        let with_data_file = L2Format::new(16, false, true);
        assert_eq!(followers(with_data_file, &[COPIED, COPIED | 0x1_0000, 0x2_0000]), 1);
        assert_eq!(followers(with_data_file, &[0, 0, COPIED]), 1);
    }

    #[test]
    fn plain_hosts_are_standard_entries_on_a_cluster_boundary() {
        let plain = plain();
        for entry in [0x5_0000, COPIED | 0x5_0000, 0x5_0002, OFFSET_MASK & !0xffff] {
            let host = plain.plain_host(entry).unwrap();
            assert_eq!(plain.decode(entry), L2Entry::Standard(host));
        }
        for entry in [0, COPIED, ZERO, 0x5_0001, 0x5_0200, COMPRESSED | 0x5_0000] {
            assert_eq!(plain.plain_host(entry), None, "{entry:#x}");
        }
    }

    #[test]
    fn a_stream_reaches_to_the_end_of_its_last_sector() {
        // 64 KiB clusters: x = 62 - 8 = 54; 2 additional sectors.
        let entry = COMPRESSED | 2 << 54 | 0x1234;
        assert_eq!(
            plain().decode(entry),
            L2Entry::Compressed {
                host: HostOffset::new(0x1234),
                stream_length: ByteLen::new(3 * 512 - 0x34),
            }
        );
    }

    #[test]
    fn contradicting_subclusters_are_refused() {
        assert!(SubclusterBitmap::new(1 | 1 << 32, true).is_none());
        assert!(SubclusterBitmap::new(1, false).is_none());
        let bitmap = SubclusterBitmap::new(0b111 | 1 << 40, true).unwrap();
        assert_eq!(bitmap.run_length(0), 3);
        assert_eq!(bitmap.run_length(3), 5);
        assert_eq!(bitmap.get(8), Subcluster::Zero);
        assert_eq!(bitmap.run_length(9), 23);
    }
}
