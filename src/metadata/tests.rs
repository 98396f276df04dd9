//! Small images in memory, walked whole.

use std::sync::Arc;

use super::sorted::SortedPieces;
use super::*;
use crate::status::HostPlace;

const CLUSTER: u64 = 512;
const COPIED: u64 = 1 << 63;

/// A qcow2 image of 512-byte clusters: header, refcount table and block, active L1 and L2
/// table, and what the test adds.
struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    const REFCOUNT_TABLE: u64 = CLUSTER;
    const REFCOUNT_BLOCK: u64 = 2 * CLUSTER;
    const L1: u64 = 3 * CLUSTER;
    const L2: u64 = 4 * CLUSTER;
    const FIRST_FREE: u64 = 5;

    fn new(clusters: u64) -> Self {
        let bytes = vec![0; usize::try_from(clusters * CLUSTER).unwrap()];
        let mut image = Self { bytes };
        image.put(0, b"QFI\xfb\0\0\0\x03");
        image.u32(20, 9).u64(24, 64 * CLUSTER).u32(36, 1).u64(40, Self::L1);
        image.u64(48, Self::REFCOUNT_TABLE).u32(56, 1).u32(96, 4).u32(100, 104);
        image.u64(Self::REFCOUNT_TABLE, Self::REFCOUNT_BLOCK);
        image.u64(Self::L1, Self::L2 | COPIED);
        for cluster in 0..Self::FIRST_FREE {
            image.refcount(cluster, 1);
        }
        image
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn u32(&mut self, at: u64, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn u64(&mut self, at: u64, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    fn refcount(&mut self, cluster: u64, count: u16) -> &mut Self {
        self.put(Self::REFCOUNT_BLOCK + cluster * 2, &count.to_be_bytes())
    }

    /// Guest cluster `guest` is at `host`.
    fn data(&mut self, guest: u64, host: u64) -> &mut Self {
        self.u64(Self::L2 + guest * 8, (host * CLUSTER) | COPIED).refcount(host, 1)
    }

    fn compressed(&mut self, guest: u64, host: u64, sectors: u64) -> &mut Self {
        self.u64(Self::L2 + guest * 8, 1 << 62 | (sectors - 1) << 61 | host)
    }

    /// A snapshot table in cluster `at` with one snapshot, whose L1 table is in the cluster
    /// after it and names `l2`.
    fn snapshot(&mut self, at: u64, l2: u64) -> &mut Self {
        let table = at * CLUSTER;
        let l1 = table + CLUSTER;
        self.u32(60, 1).u64(64, table);
        self.u64(table, l1).u32(table + 8, 1).put(table + 12, &[0, 1, 0, 3]).u32(table + 36, 16);
        self.u64(table + 48, 64 * CLUSTER).put(table + 56, b"1one");
        self.u64(l1, l2).refcount(at, 1).refcount(at + 1, 1)
    }

    fn metadata(&self) -> Metadata {
        self.try_metadata().unwrap()
    }

    fn try_metadata(&self) -> Result<Metadata> {
        let source = Source::from_bytes("x.qcow2", self.bytes.clone());
        Metadata::read(Arc::new(source), Format::Qcow2)
    }
}

fn shown(walk: &Walk<'_>) -> Vec<(u64, u64, RangeUse)> {
    walk.ranges().map(|r| (r.offset.get(), r.length.get(), r.used)).collect()
}

fn kinds(metadata: &Metadata, at: u64) -> Vec<PieceKind> {
    let place = HostPlace::in_image(HostOffset::new(at));
    metadata.pieces_at(place).pieces.into_iter().map(|piece| piece.kind).collect()
}

#[test]
fn every_byte_is_listed_with_its_use() {
    let mut image = Builder::new(13);
    image.data(0, 5).data(9, 6).refcount(8, 1);
    // Two streams that share a cluster: [9 * 512 + 10, 9 * 512 + 512) and one in 10 alone.
    image.compressed(1, 9 * CLUSTER + 10, 1).compressed(2, 10 * CLUSTER + 7, 2).refcount(9, 1);
    image.bytes.truncate(12 * 512 + 100);
    let metadata = image.metadata();
    let walk = metadata.walk();
    let problems: Vec<_> = walk.problems().iter().collect();
    assert!(problems.is_empty(), "{problems:?}");
    let c = CLUSTER;
    assert_eq!(
        shown(&walk),
        [
            // The header and the end mark of the extensions, and the rest of its cluster.
            (0, 112, RangeUse::Metadata),
            (112, c - 112, RangeUse::Slack),
            // Refcount table and block, L1 table of one entry.
            (c, 2 * c + 8, RangeUse::Metadata),
            (3 * c + 8, c - 8, RangeUse::Slack),
            (4 * c, c, RangeUse::Metadata),
            (5 * c, 2 * c, RangeUse::Data),
            (7 * c, c, RangeUse::Unused),
            (8 * c, c, RangeUse::Unreferenced),
            (9 * c, 10, RangeUse::Slack),
            (9 * c + 10, c - 10, RangeUse::Data),
            (10 * c, 7, RangeUse::Slack),
            (10 * c + 7, 2 * c - 7, RangeUse::Data),
            (12 * c, 100, RangeUse::Unused),
        ]
    );
    let counts = walk.counts();
    assert_eq!((counts.data_references, counts.compressed_streams), (2, 2));
    assert!(walk.refcount_problems().is_empty());
}

#[test]
fn a_table_that_snapshots_share_is_walked_once_and_its_data_has_all_owners() {
    let mut image = Builder::new(10);
    image.data(3, 5).snapshot(6, Builder::L2);
    let metadata = image.metadata();
    assert_eq!(metadata.qcow2().unwrap().snapshots[0].name, "one");
    assert_eq!(metadata.walk().counts().data_references, 1);
    let owners = [Owner::Active, Owner::Snapshot(0)];
    let guest = GuestOffset::new(3 * CLUSTER);
    assert_eq!(
        kinds(&metadata, 5 * CLUSTER + 20),
        owners.map(|owner| PieceKind::Data { owner, guest })
    );
    assert_eq!(
        kinds(&metadata, Builder::L2 + 511),
        owners.map(|owner| PieceKind::L2Table { owner, l1_index: 0 })
    );
    assert_eq!(kinds(&metadata, 6 * CLUSTER + 59), [PieceKind::SnapshotTable]);
    assert_eq!(kinds(&metadata, 6 * CLUSTER + 60), []);
    let place = HostPlace::in_image(HostOffset::new(6 * CLUSTER + 60));
    let slack = metadata.pieces_at(place).unclaimed.unwrap();
    assert_eq!((slack.offset.get(), slack.length.get()), (6 * CLUSTER + 60, CLUSTER - 60));
    assert_eq!(slack.used, RangeUse::Slack);
}

#[test]
fn owners_without_end_are_not_all_looked_at() {
    // Each of 2^19 L1 entries names one L2 table of 8192 entries, which all name one cluster:
    // to add each of these would take minutes.
    const LARGE: u64 = 64 << 10;
    const ENTRIES: u32 = 1 << 19;
    let (l2, data, l1) = (LARGE, 2 * LARGE, 3 * LARGE);
    let mut image = Builder::new(l1 / CLUSTER);
    image.u32(20, 16).u64(24, LARGE).u32(36, ENTRIES).u64(40, l1);
    for entry in 0..LARGE / 8 {
        image.u64(l2 + entry * 8, data | COPIED);
    }
    for _ in 0..ENTRIES {
        image.bytes.extend((l2 | COPIED).to_be_bytes());
    }
    let found = image.metadata().pieces_at(HostPlace::in_image(HostOffset::new(data)));
    assert!(found.truncated);
    assert_eq!(found.pieces.len(), 1 << 16);
}

#[test]
fn a_snapshot_of_an_impossible_size_hides_neither_its_tables_nor_those_of_others() {
    let mut image = Builder::new(12);
    image.snapshot(6, 0);
    // Three entries of 64 bytes, padding included, each with an L1 table.
    let table = 6 * CLUSTER;
    let first = image.bytes[usize::try_from(table).unwrap()..][..64].to_vec();
    for (number, l1) in [(1, 8), (2, 9)] {
        let entry = table + number * 64;
        image.put(entry, &first).u64(entry, l1 * CLUSTER).refcount(l1, 1);
    }
    image.u32(60, 3).u64(table + 48, 1 << 63);
    let metadata = image.metadata();
    assert_eq!(metadata.qcow2().unwrap().snapshots.len(), 3);
    let owner = |at: u64| kinds(&metadata, at * CLUSTER);
    for (at, number) in [(7, 0), (8, 1), (9, 2)] {
        assert_eq!(owner(at), [PieceKind::L1Table(Owner::Snapshot(number))]);
    }
    let walk = metadata.walk();
    let problems: Vec<_> = walk.problems().iter().map(|p| (p.offset.get(), p.kind)).collect();
    assert_eq!(problems, [(table, ProblemKind::InvalidField)]);
    assert!(shown(&walk).iter().all(|&(_, _, used)| used != RangeUse::Unreferenced));
}

#[test]
fn an_l1_table_named_twice_is_not_walked_twice() {
    let mut image = Builder::new(10);
    image.snapshot(6, 0).u64(6 * CLUSTER, Builder::L1);
    let metadata = image.metadata();
    let walk = metadata.walk();
    let problems: Vec<_> = walk.problems().iter().map(|problem| problem.kind).collect();
    assert_eq!(problems, [ProblemKind::NamedTwice]);
    let tables = metadata.pieces().filter_map(std::result::Result::ok);
    assert_eq!(tables.filter(|t| matches!(t.kind, PieceKind::L2Table { .. })).count(), 1);
}

#[test]
fn entries_that_lead_nowhere_are_problems_and_the_rest_is_walked() {
    let mut image = Builder::new(10);
    image.data(0, 5).data(1, 50);
    image.u64(Builder::L2 + 16, (6 * CLUSTER + 8) | COPIED);
    image.u64(Builder::L2 + 24, 1 << 62 | 1 << 40);
    image.u64(Builder::REFCOUNT_TABLE + 8, 1 << 40);
    let metadata = image.metadata();
    let walk = metadata.walk();
    let found: Vec<_> = walk.problems().iter().map(|p| (p.offset.get(), p.kind)).collect();
    assert_eq!(
        found,
        [
            (Builder::REFCOUNT_TABLE + 8, ProblemKind::OutsideFile),
            (Builder::L2 + 8, ProblemKind::OutsideFile),
            (Builder::L2 + 24, ProblemKind::OutsideFile),
        ],
        "{:?}",
        walk.problems()
    );
    assert_eq!(kinds(&metadata, 5 * CLUSTER).len(), 1);
}

#[test]
fn pieces_come_sorted_in_lots_of_any_size() {
    let mut image = Builder::new(10);
    image.snapshot(6, Builder::L2);
    let metadata = image.metadata();
    let whole: Vec<_> = metadata.sorted_pieces().collect();
    assert!(whole.is_sorted_by_key(|piece| piece.offset));
    assert_eq!(whole.len(), metadata.pieces().count());
    for lot in 1..whole.len() + 2 {
        let sorted: Vec<_> = SortedPieces::with_lots_of(&metadata, lot).collect();
        assert_eq!(sorted, whole, "lots of {lot}");
    }
}

#[test]
fn a_byte_that_is_not_zero_is_found_wherever_it_is() {
    let mut bytes = vec![0; 1 << 20];
    let find = |bytes: &[u8], offset, length| {
        let source = Source::from_bytes("x", bytes.to_vec());
        first_non_zero(&source, HostOffset::new(offset), ByteLen::new(length))
            .unwrap()
            .map(HostOffset::get)
    };
    assert_eq!(find(&bytes, 0, 2 << 20), None);
    bytes[700_000] = 1;
    assert_eq!(find(&bytes, 0, 1 << 20), Some(700_000));
    assert_eq!(find(&bytes, 700_000, 1), Some(700_000));
    assert_eq!(find(&bytes, 0, 700_000), None);
    assert_eq!(find(&bytes, 700_001, u64::MAX), None);
}

/// All that a walk comes upon, each L2 table once, clipped to the file; by itself.
fn all_pieces(metadata: &Metadata) -> Vec<Piece> {
    let mut all = Vec::new();
    let mut walked = std::collections::HashSet::new();
    for piece in metadata.pieces().filter_map(std::result::Result::ok) {
        all.push(piece);
        if let PieceKind::L2Table { owner, l1_index } = piece.kind
            && piece.offset.is_multiple_of(CLUSTER)
            && walked.insert(piece.offset)
        {
            let named = metadata.table_pieces(owner, l1_index, piece.offset);
            all.extend(named.filter_map(std::result::Result::ok));
        }
    }
    all
}

/// Checks that the ranges cover the file without gap or overlap, and say of each byte whether
/// a piece holds it.
fn check_coverage(metadata: &Metadata) {
    let length = metadata.source().length().get();
    let mut used = vec![false; usize::try_from(length).unwrap()];
    for piece in all_pieces(metadata).iter().filter(|piece| piece.file == FileRole::Image) {
        let end = piece.end().get().min(length);
        for at in piece.offset.get().min(end)..end {
            used[usize::try_from(at).unwrap()] = true;
        }
    }
    let walk = metadata.walk();
    let ranges: Vec<_> = walk.ranges().collect();
    let mut at = 0;
    for range in &ranges {
        assert_eq!(range.offset.get(), at);
        assert!(!range.length.is_zero());
        let end = at + range.length.get();
        for byte in at..end {
            let is_used = used[usize::try_from(byte).unwrap()];
            assert_eq!(!range.used.is_unclaimed(), is_used, "{range:?} at {byte:#x}");
        }
        at = end;
    }
    assert_eq!(at, length);
    for at in (0..length).step_by(509) {
        let place = HostPlace::in_image(HostOffset::new(at));
        let found = metadata.pieces_at(place);
        assert_eq!(found.pieces.is_empty(), !used[usize::try_from(at).unwrap()], "{at:#x}");
        assert_eq!(found.unclaimed.is_some(), found.pieces.is_empty(), "{at:#x}");
        let holds = |r: &UsedRange| r.offset.get() <= at && at < r.offset.get() + r.length.get();
        let range = *ranges.iter().find(|range| holds(range)).unwrap();
        if let Some(unclaimed) = found.unclaimed {
            assert_eq!(unclaimed.used, range.used, "{at:#x}");
            assert!(unclaimed.offset.get() / CLUSTER == at / CLUSTER && holds(&unclaimed));
        }
    }
    let _ = walk.refcount_problems();
}

#[test]
fn any_byte_of_the_metadata_may_be_any_other_and_the_file_stays_covered() {
    let mut image = Builder::new(16);
    image.data(0, 5).data(9, 6).compressed(1, 9 * CLUSTER + 10, 1).snapshot(10, Builder::L2);
    // A backing name, extensions of every kind, a bitmap and its directory.
    image.put(104, &0xe279_2acau32.to_be_bytes()).u32(108, 3).put(112, b"raw");
    image.put(120, &0x2385_2875u32.to_be_bytes()).u32(124, 24);
    image.u32(128, 1).u64(136, 32).u64(144, 12 * CLUSTER).u64(88, 1);
    image.put(152, &0x0537_be77u32.to_be_bytes()).u32(156, 16).u64(160, 14 * CLUSTER).u64(168, 600);
    image.u64(8, 200).u32(16, 8).put(200, b"base.raw");
    image.u64(12 * CLUSTER, 13 * CLUSTER).u32(12 * CLUSTER + 8, 1).put(12 * CLUSTER + 16, &[1, 16]);
    image.put(12 * CLUSTER + 18, &[0, 1]).put(12 * CLUSTER + 24, b"b");
    image.u64(13 * CLUSTER, 7 * CLUSTER);
    image.put(14 * CLUSTER, b"LUKS\xba\xbe");
    for cluster in 5..15 {
        image.refcount(cluster, 1);
    }
    let metadata = image.metadata();
    assert!(metadata.walk().problems().is_empty(), "{:?}", metadata.walk().problems());
    check_coverage(&metadata);
    let places: Vec<u64> = [(0, 208), (512, 16), (1024, 32), (1536, 8), (2048, 80), (5120, 64)]
        .into_iter()
        .chain([(5632, 8), (12 * CLUSTER, 32), (13 * CLUSTER, 8), (14 * CLUSTER, 12)])
        .flat_map(|(start, length)| start..start + length)
        .collect();
    let (mut walked, mut refused) = (0, 0);
    for at in places {
        for value in [0x00, 0x01, 0x41, 0x80, 0xff] {
            let mut broken = Builder { bytes: image.bytes.clone() };
            broken.put(at, &[value]);
            match broken.try_metadata() {
                Ok(metadata) => {
                    walked += 1;
                    walked += 1;
                    check_coverage(&metadata);
                }
                // Without magic, version and cluster size there is nothing to go by.
                Err(error) => {
                    refused += 1;
                    assert!(at < 8 || (20..24).contains(&at), "{at:#x} {value:#x}: {error}");
                }
            }
        }
    }
    assert!(walked > 2000 && refused > 20, "{walked} walked, {refused} refused");
}

#[test]
fn tables_strewn_over_more_than_is_kept_may_hide_a_use() {
    use std::os::unix::fs::FileExt;
    // One table in each 64 MiB of a sparse file; the last of them names the byte's cluster.
    const TABLES: u64 = 4100;
    const DISTANCE: u64 = 64 << 20;
    let mut image = Builder::new(8 + TABLES * 8 / CLUSTER + 1);
    let l1 = 8 * CLUSTER;
    image.u64(24, TABLES * 64 * CLUSTER).u32(36, u32::try_from(TABLES).unwrap()).u64(40, l1);
    for table in 0..TABLES {
        image.u64(l1 + table * 8, ((table + 1) * DISTANCE) | COPIED);
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.qcow2");
    std::fs::write(&path, &image.bytes).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((TABLES + 2) * DISTANCE).unwrap();
    let used = 7 * CLUSTER;
    file.write_all_at(&(used | COPIED).to_be_bytes(), TABLES * DISTANCE).unwrap();
    let source = Arc::new(Source::open(&path).unwrap());
    let metadata = Metadata::read(source, Format::Qcow2).unwrap();
    let found = metadata.pieces_at(HostPlace::in_image(HostOffset::new(used)));
    assert_eq!(found.pieces, []);
    assert!(found.truncated);
    assert_eq!(found.unclaimed.unwrap().used, RangeUse::NotExamined);
}

#[test]
fn a_cow_file_is_covered_to_the_byte() {
    // User-Mode Linux's version 3: 16 sectors, of which 1, 2 and 15 are in the file.
    const ALIGNMENT: u32 = 4096;
    let mut bytes = vec![0; 3 * 4096 + 16 * 512 + 700];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"OOOM\0\0\0\x03");
    put(12, &(16u64 * 512).to_be_bytes());
    put(20, &512u32.to_be_bytes());
    put(24, &ALIGNMENT.to_be_bytes());
    put(32, b"/base.raw\0left over");
    put(8192, &[0b0000_0110, 0b1000_0000]);
    let source = Arc::new(Source::from_bytes("x.cow", bytes));
    let metadata = Metadata::read(source, Format::Cow).unwrap();
    let data = 3 * 4096;
    let expected = [
        (0, 42, RangeUse::Metadata),
        (42, 4128 - 42, RangeUse::Slack),
        (4128, 8192 - 4128, RangeUse::Slack),
        (8192, 2, RangeUse::Metadata),
        (8194, data - 8194, RangeUse::Slack),
        (data, 512, RangeUse::Unused),
        (data + 512, 1024, RangeUse::Data),
        (data + 3 * 512, 12 * 512, RangeUse::Unused),
        (data + 15 * 512, 512, RangeUse::Data),
        (data + 16 * 512, 700, RangeUse::Unreferenced),
    ];
    // The name's field ends the header here, and slack follows slack.
    let joined = [expected[0], (42, 8192 - 42, RangeUse::Slack)];
    assert_eq!(shown(&metadata.walk()), [&joined, &expected[3..]].concat());
    let owner = Owner::Active;
    let guest = GuestOffset::new(512);
    assert_eq!(kinds(&metadata, data + 1100), [PieceKind::Data { owner, guest }]);
    assert_eq!(kinds(&metadata, 33), [PieceKind::Header, PieceKind::BackingFileName]);
    assert_eq!(kinds(&metadata, 8193), [PieceKind::SectorBitmap]);
    let place = HostPlace::in_image(HostOffset::new(data + 5));
    assert_eq!(metadata.pieces_at(place).unclaimed.unwrap().used, RangeUse::Unused);
}
