//! Images written byte by byte: what qemu-img does not count, and what is hostile.

use super::*;

const CLUSTER: u64 = 4096;
const COPIED: u64 = 1 << 63;

/// Bytes to be put at offsets.
struct Bytes(Vec<u8>);

impl Bytes {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn u16(&mut self, at: u64, value: u16) {
        self.put(at, &value.to_be_bytes());
    }

    fn u32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    fn u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }
}

/// A qcow2 of 16 clusters of 4 KiB: header, refcount table, refcount block, L1 table of 8
/// entries, L2 table in cluster 4, and data in cluster 5, the first of the disk.
fn qcow2() -> Bytes {
    let mut image = Bytes(vec![0; 16 * 4096]);
    image.put(0, b"QFI\xfb\0\0\0\x03");
    image.u32(20, 12);
    image.u64(24, 1 << 20);
    image.u32(36, 8);
    image.u64(40, 3 * CLUSTER);
    image.u64(48, CLUSTER);
    image.u32(56, 1);
    image.u32(96, 4);
    image.u32(100, 104);
    image.u64(CLUSTER, 2 * CLUSTER);
    image.u64(3 * CLUSTER, (4 * CLUSTER) | COPIED);
    image.u64(4 * CLUSTER, (5 * CLUSTER) | COPIED);
    for cluster in 0..6 {
        refcount(&mut image, cluster, 1);
    }
    image
}

fn refcount(image: &mut Bytes, cluster: u64, refcount: u16) {
    image.u16(2 * CLUSTER + cluster * 2, refcount);
}

fn check_with(image: Bytes, format: Format, limit: Option<u64>) -> (Report, Vec<Finding>) {
    let source = Source::from_bytes("x", image.0);
    let mut findings = Vec::new();
    let options = Options { findings_of_a_kind: limit };
    let report = check(&source, format, options, &mut |finding| findings.push(finding)).unwrap();
    (report, findings)
}

/// The numbers that qemu-img has too (errors, corruptions, leaks), and the kinds found.
fn found(image: Bytes, format: Format) -> ([u64; 3], Vec<(&'static str, u64)>) {
    let (report, findings) = check_with(image, format, None);
    let kinds: Vec<_> = report.counts.iter().map(|(kind, count)| (kind.name(), count)).collect();
    let told: u64 = findings.iter().map(|finding| finding.count).sum();
    assert_eq!(told, kinds.iter().map(|(_, count)| count).sum::<u64>(), "{findings:?}");
    ([report.check_errors(), report.corruptions(), report.leaks()], kinds)
}

#[test]
fn a_healthy_image_has_no_findings() {
    assert_eq!(found(qcow2(), Format::Qcow2), ([0, 0, 0], vec![]));
}

#[test]
fn overlaps_with_refcounts_that_agree_are_notices() {
    let mut image = qcow2();
    // The second guest cluster is the first one, too.
    image.u64(4 * CLUSTER, 5 * CLUSTER);
    image.u64(4 * CLUSTER + 8, 5 * CLUSTER);
    refcount(&mut image, 5, 2);
    assert_eq!(found(image, Format::Qcow2), ([0, 0, 0], vec![("cluster-shared", 2)]));

    let mut image = qcow2();
    // A guest cluster in the L1 table.
    image.u64(4 * CLUSTER + 8, 3 * CLUSTER);
    refcount(&mut image, 3, 2);
    let expected = vec![("metadata-overlap", 1), ("cluster-shared", 1)];
    assert_eq!(found(image, Format::Qcow2), ([0, 0, 0], expected));
}

#[test]
fn clusters_with_many_references_are_counted_exactly() {
    for (refcount_said, expected) in [(7, [0, 0, 0]), (6, [0, 1, 0]), (9, [0, 0, 1])] {
        let mut image = qcow2();
        for guest in 0..7 {
            image.u64(4 * CLUSTER + guest * 8, 5 * CLUSTER);
        }
        refcount(&mut image, 5, refcount_said);
        assert_eq!(found(image, Format::Qcow2).0, expected, "{refcount_said}");
    }
}

#[test]
fn a_table_that_is_named_often_is_walked_once_and_counted_often() {
    let mut image = qcow2();
    // 4 Mi L1 entries, as far as the file goes all of the same table.
    image.u32(36, 4 << 20);
    for at in (3 * CLUSTER..4 * CLUSTER).step_by(8) {
        image.u64(at, 4 * CLUSTER);
    }
    image.u64(4 * CLUSTER, (5 * CLUSTER) | 2);
    let (report, findings) = check_with(image, Format::Qcow2, Some(3));
    // 512 entries by the L1 table itself, and the table as a part of it.
    let reserved = FindingKind::L2ReservedBits;
    assert!(report.counts.of(reserved) >= 512, "{report:?}");
    assert!(findings.iter().filter(|finding| finding.kind == reserved).count() <= 3);
    assert!(!report.incomplete);
}

#[test]
fn no_leaks_are_told_of_where_references_are_missing() {
    let mut image = qcow2();
    image.u32(60, 1);
    image.u64(64, 100);
    refcount(&mut image, 9, 1);
    let (report, findings) = check_with(image, Format::Qcow2, None);
    assert!(report.incomplete);
    assert_eq!((report.check_errors(), report.leaks()), (1, 0), "{findings:?}");
}

#[test]
fn neighbours_that_leak_are_one_finding() {
    let mut image = qcow2();
    for cluster in [7, 8, 9, 11] {
        refcount(&mut image, cluster, 1);
    }
    refcount(&mut image, 12, 2);
    let (report, findings) = check_with(image, Format::Qcow2, None);
    assert_eq!(report.leaks(), 5);
    let places: Vec<_> =
        findings.iter().map(|f| (f.host.unwrap().get() / CLUSTER, f.count)).collect();
    assert_eq!(places, [(7, 3), (11, 1), (12, 1)]);
}

#[test]
fn a_file_of_more_clusters_than_qemu_checks_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut image = qcow2();
    image.u32(20, 9);
    image.u64(40, 3 << 9);
    image.u64(48, 1 << 9);
    image.u32(36, 4096);
    std::fs::write(file.path(), &image.0).unwrap();
    file.as_file().set_len((1 << 40) + 512).unwrap();
    let source = Source::open(file.path()).unwrap();
    let report = check(&source, Format::Qcow2, Options::default(), &mut |_| {}).unwrap();
    assert_eq!(report.counts.of(FindingKind::FileTooLarge), 1);
    assert!(report.incomplete);
}

/// A qcow with clusters of 4 KiB and L2 tables of 512 entries: an L1 entry, an L2 table at
/// 4 KiB, and the first guest cluster at 8 KiB.
fn qcow() -> Bytes {
    let mut image = Bytes(vec![0; 12 << 10]);
    image.put(0, b"QFI\xfb\0\0\0\x01");
    image.u64(24, 1 << 20);
    image.put(32, &[12, 9]);
    image.u64(40, 48);
    image.u64(48, 4 << 10);
    image.u64(4 << 10, 8 << 10);
    image
}

#[test]
fn qcow_clusters_lie_in_the_file_and_apart() {
    assert_eq!(found(qcow(), Format::Qcow), ([0, 0, 0], vec![]));
    let with = |entry: u64| {
        let mut image = qcow();
        image.u64((4 << 10) + 8, entry);
        found(image, Format::Qcow)
    };
    assert_eq!(with(12 << 10), ([0, 1, 0], vec![("past-file-end", 1)]));
    // The L2 table itself; both sides are told of.
    assert_eq!(with(4 << 10), ([0, 2, 0], vec![("overlap", 2)]));
    let stream = |offset: u64, length: u64| 1 << 63 | length << 51 | offset;
    // Right behind the L1 table, in it, and in a cluster.
    assert_eq!(with(stream(56, 100)), ([0, 0, 0], vec![]));
    assert_eq!(with(stream(50, 100)), ([0, 1, 0], vec![("overlap", 1)]));
    assert_eq!(with(stream(9 << 10, 100)), ([0, 1, 0], vec![("overlap", 1)]));
    assert_eq!(with(stream((12 << 10) - 50, 51)), ([0, 1, 0], vec![("past-file-end", 1)]));
}

#[test]
fn qcow_tables_out_of_the_file_are_found() {
    let mut image = qcow();
    image.u64(48, 1 << 40);
    assert_eq!(found(image, Format::Qcow), ([0, 1, 0], vec![("past-file-end", 1)]));
    let mut image = qcow();
    image.u64(40, 1 << 30);
    assert_eq!(found(image, Format::Qcow), ([0, 1, 0], vec![("past-file-end", 1)]));
}

#[test]
fn cow_sectors_lie_in_the_file() {
    // User-Mode Linux version 3: a bitmap for 12 sectors at 4608, data from 5120 on.
    let mut image = Bytes(vec![0; 5120 + 4 * 512]);
    image.put(0, b"OOOM\0\0\0\x03");
    image.u64(12, 12 * 512);
    image.u32(20, 512);
    image.u32(24, 512);
    image.put(32, b"base");
    image.put(4608, &[0b0000_1111, 0]);
    let (report, _) = check_with(Bytes(image.0.clone()), Format::Cow, None);
    assert_eq!((report.corruptions(), report.numbers.allocated_clusters), (0, 4));
    // Two more that are not there, and two that the disk has not.
    image.put(4608, &[0b0011_1111, 0b0011_0000]);
    let expected = vec![("past-file-end", 2), ("stray-bits", 2)];
    assert_eq!(found(image, Format::Cow), ([0, 2, 0], expected));
}

#[test]
fn raw_has_nothing_to_check() {
    assert!(!is_checkable(Format::Raw));
    let source = Source::from_bytes("x", vec![0; 512]);
    let outcome = check(&source, Format::Raw, Options::default(), &mut |_| {});
    assert!(matches!(outcome.unwrap_err().kind(), ErrorKind::Unsupported(_)));
}

/// Checks an image whose file is made longer: what is added is a hole.
fn check_with_hole(image: &Bytes, length: u64) -> Report {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &image.0).unwrap();
    file.as_file().set_len(length).unwrap();
    let source = Source::open(file.path()).unwrap();
    check(&source, Format::Qcow2, Options::default(), &mut |_| {}).unwrap()
}

#[test]
fn tables_that_overlap_without_end_are_given_up_and_what_was_found_is_told() {
    // 128 Ki L2 tables of 2 MiB, 512 bytes apart: 256 GiB to read, of 64 MiB.
    let cluster = 2u64 << 20;
    let mut image = Bytes(vec![0; usize::try_from(3 * cluster + (128 << 19)).unwrap()]);
    image.put(0, &qcow2().0[..104]);
    image.u32(20, 21);
    image.u32(36, 128 << 10);
    image.u64(40, cluster);
    image.u64(48, 2 * cluster);
    for index in 0..128 << 10 {
        image.u64(cluster + index * 8, 3 * cluster + index * 512);
    }
    // The hole behind them makes it no more work than they are.
    let report = check_with_hole(&image, 1 << 42);
    assert_eq!(report.counts.of(FindingKind::TooMuchWork), 1, "{report:?}");
    assert!(report.counts.of(FindingKind::L2TableUnaligned) > 100_000);
    assert!(report.incomplete);
}

#[test]
fn snapshots_that_share_a_huge_l1_table_are_given_up_at_once() {
    // 65536 times 32 MiB, all the same hole.
    let mut image = qcow2();
    let (snapshots, l1) = (16 * CLUSTER, 2048 * CLUSTER);
    image.0.resize(usize::try_from(l1).unwrap(), 0);
    image.u32(60, 65536);
    image.u64(64, snapshots);
    for index in 0..65536 {
        let at = snapshots + index * 56;
        image.u64(at, l1);
        image.u32(at + 8, 4 << 20);
        image.u32(at + 36, 16);
    }
    let report = check_with_hole(&image, l1 + (32 << 20));
    assert_eq!(report.counts.of(FindingKind::TooMuchWork), 1, "{report:?}");
    assert!(report.incomplete);
    assert_eq!(report.leaks(), 0);
}

/// The image with as many bitmaps, in use, which all have the same table of so many entries
/// at 64 MiB.
fn with_bitmaps(bitmaps: u32, table_entries: u32) -> Bytes {
    let mut image = qcow2();
    let directory = 16 * CLUSTER;
    image.0.resize(64 << 20, 0);
    image.u64(88, 1);
    image.u32(104, 0x2385_2875);
    image.u32(108, 24);
    image.u32(112, bitmaps);
    image.u64(120, u64::from(bitmaps) * 24);
    image.u64(128, directory);
    for index in 0..bitmaps.into() {
        let at = directory + index * 24;
        image.u64(at, 64 << 20);
        image.u32(at + 8, table_entries);
        image.u32(at + 12, 1);
        image.put(at + 16, &[1, 16]);
    }
    image
}

#[test]
fn bitmaps_that_share_a_huge_table_are_given_up_at_once() {
    // 65535 times 1 MiB, all the same hole: 8.6e9 entries.
    let image = with_bitmaps(65535, 128 << 10);
    let report = check_with_hole(&image, 65 << 20);
    assert_eq!(report.counts.of(FindingKind::TooMuchWork), 1, "{report:?}");
    assert!(report.incomplete);
}

#[test]
fn a_refcount_table_that_cannot_be_read_is_a_finding() {
    let mut image = qcow2();
    image.u64(48, 0x7fff_ffff_c000_0000);
    image.put(79, &[1]);
    let (report, findings) = check_with(image, Format::Qcow2, None);
    let kinds: Vec<_> = findings.iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [FindingKind::MarkedDirty, FindingKind::ReadError]);
    assert_eq!((report.check_errors(), report.incomplete), (1, true));
}
