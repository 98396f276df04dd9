//! A qcow2 header though some of its fields are broken.

use super::problem::Problem;
use crate::error::{Error, ErrorKind, Result};
use crate::format::bytes_at;
use crate::format::qcow2::{Qcow2Header, TableLocation, incompatible};
use crate::units::{ByteLen, HostOffset};

/// Bytes of a header that are known.
pub(super) const HEADER_LENGTH: usize = 112;
/// More errors than a header has fields mean that putting them right does not help.
const MAX_ERRORS: usize = 32;
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u32 = 65536;

/// Where header fields are (docs/interop/qcow2, section "Header").
mod field {
    pub(super) const BACKING_OFFSET: usize = 8;
    pub(super) const BACKING_LENGTH: usize = 16;
    pub(super) const CLUSTER_BITS: usize = 20;
    pub(super) const SIZE: usize = 24;
    pub(super) const CRYPT_METHOD: usize = 32;
    pub(super) const L1_ENTRIES: usize = 36;
    pub(super) const L1_OFFSET: usize = 40;
    pub(super) const REFCOUNT_OFFSET: usize = 48;
    pub(super) const REFCOUNT_CLUSTERS: usize = 56;
    pub(super) const SNAPSHOTS: usize = 60;
    pub(super) const SNAPSHOTS_OFFSET: usize = 64;
    pub(super) const INCOMPATIBLE: usize = 72;
    pub(super) const AUTOCLEAR: usize = 88;
    pub(super) const REFCOUNT_ORDER: usize = 96;
    pub(super) const LENGTH: usize = 100;
    pub(super) const COMPRESSION: usize = 104;
}

/// A header, and what is wrong with it.
#[derive(Debug)]
pub(super) struct LenientHeader {
    /// The header; a field that makes no sense is as if there were nothing to be found by it.
    pub(super) header: Qcow2Header,
    pub(super) problems: Vec<Problem>,
}

/// Parses as [`Qcow2Header::parse`], and where that refuses a field, again without the
/// field.
///
/// # Errors
/// No magic, another version, too short, or no valid cluster size: nothing can be found then.
pub(super) fn parse(bytes: &[u8]) -> Result<LenientHeader> {
    let mut draft = Draft {
        bytes: [0; HEADER_LENGTH],
        given: bytes.len().min(HEADER_LENGTH),
        l1_table: None,
        refcount_table: None,
    };
    draft.bytes[..draft.given].copy_from_slice(&bytes[..draft.given]);
    let mut problems = Vec::new();
    for _ in 0..MAX_ERRORS {
        let error = match Qcow2Header::parse(&draft.bytes[..draft.given]) {
            Ok(mut header) => {
                header.l1_table = draft.l1_table.unwrap_or(header.l1_table);
                header.refcount_table = draft.refcount_table.unwrap_or(header.refcount_table);
                return Ok(LenientHeader { header, problems });
            }
            Err(error) => error,
        };
        let place = error.offset().and_then(|offset| usize::try_from(offset).ok());
        if !place.is_some_and(|place| draft.mend(place)) {
            return Err(error);
        }
        problems.push(Problem::of_error(&error, HostOffset::ZERO));
    }
    Err(Error::new(ErrorKind::InvalidImage("the header makes no sense at all".to_owned())))
}

/// A header being put right.
struct Draft {
    bytes: [u8; HEADER_LENGTH],
    given: usize,
    /// What is to be walked though the header's own checks refuse it (or nothing).
    l1_table: Option<TableLocation>,
    refcount_table: Option<TableLocation>,
}

impl Draft {
    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes(bytes_at(&self.bytes, at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_be_bytes(bytes_at(&self.bytes, at))
    }

    fn put_u32(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, at: usize, value: u64) {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    fn cluster_bits(&self) -> u32 {
        self.u32(field::CLUSTER_BITS).min(63)
    }

    /// Takes back the field at which the header was refused; false where there is no reading
    /// on without it.
    fn mend(&mut self, place: usize) -> bool {
        match place {
            field::BACKING_OFFSET | field::BACKING_LENGTH => self.put_u64(field::BACKING_OFFSET, 0),
            // The other error of this field is a cluster size that none is.
            field::CLUSTER_BITS
                if self.has_extended_l2() && (9..14).contains(&self.cluster_bits()) =>
            {
                let bits = self.u64(field::INCOMPATIBLE) & !incompatible::EXTENDED_L2;
                self.put_u64(field::INCOMPATIBLE, bits);
            }
            field::SIZE => self.put_u64(field::SIZE, 0),
            field::L1_ENTRIES => self.put_u64(field::SIZE, self.size_of_l1_table()),
            field::CRYPT_METHOD => self.put_u32(field::CRYPT_METHOD, 0),
            field::L1_OFFSET => self.mend_l1_table(),
            field::REFCOUNT_OFFSET | field::REFCOUNT_CLUSTERS => self.mend_refcount_table(),
            field::SNAPSHOTS => self.put_u32(field::SNAPSHOTS, MAX_SNAPSHOTS),
            field::SNAPSHOTS_OFFSET => {
                self.put_u32(field::SNAPSHOTS, 0);
                self.put_u64(field::SNAPSHOTS_OFFSET, 0);
            }
            field::AUTOCLEAR => self.put_u64(field::AUTOCLEAR, self.u64(field::AUTOCLEAR) & !2),
            field::REFCOUNT_ORDER => self.put_u32(field::REFCOUNT_ORDER, 4),
            field::LENGTH => self.put_u32(field::LENGTH, 104),
            field::COMPRESSION => {
                self.bytes[field::COMPRESSION] = 0;
                let bits = self.u64(field::INCOMPATIBLE) & !incompatible::COMPRESSION;
                self.put_u64(field::INCOMPATIBLE, bits);
            }
            _ => return false,
        }
        true
    }

    fn has_extended_l2(&self) -> bool {
        self.u64(field::INCOMPATIBLE) & incompatible::EXTENDED_L2 != 0
    }

    /// Guest bytes that the L1 table as it is can describe.
    fn size_of_l1_table(&self) -> u64 {
        let entry_bits = if self.has_extended_l2() { 4 } else { 3 };
        let coverage = 1u64 << (2 * self.cluster_bits()).saturating_sub(entry_bits).min(62);
        let all = u64::from(self.u32(field::L1_ENTRIES)).saturating_mul(coverage);
        all.min(self.u64(field::SIZE)).min(i64::MAX.unsigned_abs())
    }

    /// A table that lies where one can lie, cut to `limit` bytes; an empty one else.
    fn usable(&self, offset: usize, length: u64, limit: u64) -> TableLocation {
        let offset = self.u64(offset);
        let length = length.min(limit);
        let aligned = offset.is_multiple_of(1 << self.cluster_bits());
        let in_range = offset.checked_add(length).is_some_and(|end| i64::try_from(end).is_ok());
        if aligned && in_range {
            TableLocation { offset: HostOffset::new(offset), length: ByteLen::new(length) }
        } else {
            TableLocation { offset: HostOffset::ZERO, length: ByteLen::ZERO }
        }
    }

    /// Puts an L1 table in the header's place that passes, and keeps the one to be walked.
    fn mend_l1_table(&mut self) {
        let length = u64::from(self.u32(field::L1_ENTRIES)) * 8;
        let usable = self.usable(field::L1_OFFSET, length, MAX_L1_BYTES);
        self.l1_table.get_or_insert(usable);
        self.put_u64(field::SIZE, 0);
        self.put_u32(field::L1_ENTRIES, 0);
        self.put_u64(field::L1_OFFSET, 0);
    }

    /// As [`mend_l1_table`](Self::mend_l1_table); the stand-in lies far out.
    fn mend_refcount_table(&mut self) {
        let length = u64::from(self.u32(field::REFCOUNT_CLUSTERS)) << self.cluster_bits();
        let usable = self.usable(field::REFCOUNT_OFFSET, length, MAX_REFCOUNT_TABLE_BYTES);
        self.refcount_table.get_or_insert(usable);
        self.put_u64(field::REFCOUNT_OFFSET, 1 << 62);
        self.put_u32(field::REFCOUNT_CLUSTERS, 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LENGTH];
        bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(20, &16u32.to_be_bytes());
        put(24, &(1u64 << 20).to_be_bytes());
        put(36, &1u32.to_be_bytes());
        put(40, &0x2_0000u64.to_be_bytes());
        put(48, &0x1_0000u64.to_be_bytes());
        put(56, &1u32.to_be_bytes());
        put(96, &4u32.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_good_header_has_no_problem() {
        let lenient = parse(&good()).unwrap();
        assert_eq!(lenient.header, Qcow2Header::parse(&good()).unwrap());
        assert_eq!(lenient.problems, []);
    }

    #[test]
    fn each_broken_field_is_a_problem_and_the_rest_is_read() {
        for (at, value) in [
            (8, 0xff),
            (24, 0x80),
            (29, 0xff),
            (35, 9),
            (37, 1),
            (47, 1),
            (40, 0x80),
            (48, 0x80),
            (55, 1),
            (56, 1),
            (59, 0),
            (61, 0xff),
            (71, 1),
            (95, 2),
            (99, 99),
            (100, 1),
            (103, 1),
            (104, 7),
            (104, 1),
            (79, 8),
        ] {
            let mut bytes = good();
            bytes[at] = value;
            let strict = Qcow2Header::parse(&bytes);
            let lenient = parse(&bytes).unwrap();
            assert_eq!(strict.is_ok(), lenient.problems.is_empty(), "{at}");
            assert_eq!(lenient.header.cluster_bits, 16, "{at}");
            if ![37, 40, 47].contains(&at) {
                assert_eq!(lenient.header.l1_table.offset.get(), 0x2_0000, "{at}");
            }
        }
        // One that overlaps another is walked all the same.
        let mut bytes = good();
        bytes[45] = 1;
        let lenient = parse(&bytes).unwrap();
        assert_eq!(lenient.header.l1_table.offset.get(), 0x1_0000);
        assert_eq!((lenient.header.l1_table.length.get(), lenient.problems.len()), (8, 1));
    }

    #[test]
    fn without_a_cluster_size_there_is_no_header() {
        for (at, value) in [(0, 0), (7, 9), (23, 8), (23, 22)] {
            let mut bytes = good();
            bytes[at] = value;
            assert!(parse(&bytes).is_err(), "{at}");
        }
        assert!(parse(&good()[..71]).is_err());
        // Refused at the L1 table, before its clusters are found to be none.
        let mut bytes = b"QFI\xfb\0\0\0\x03\0\x10".to_vec();
        bytes.resize(34, 0);
        bytes.extend([8, 0]);
        assert!(parse(&bytes).is_err());
    }
}
