//! Images written byte by byte, hostile ones above all.

use std::sync::Arc;

use super::*;
use crate::damage::{Damage, DamageList};
use crate::error::ErrorKind;
use crate::status::{BlockStatus, Encryption, FileRole, HostPlace, ZeroStatus};
use crate::units::GuestOffset;

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Start, length, status.
type Run = (u64, u64, BlockStatus);

/// A qcow2 file with the header in cluster 0, the refcount table in 1, the L1 table in 2
/// and one L2 table in 3; data is put where a test wants it.
pub(crate) struct Builder {
    pub(crate) bytes: Vec<u8>,
}

impl Builder {
    pub(crate) fn new(clusters: u64) -> Self {
        let mut image = Self { bytes: vec![0; usize::try_from(clusters * CLUSTER).unwrap()] };
        image.u32(0, header::MAGIC);
        image.u32(4, 3);
        image.u32(20, 16);
        image.u64(24, 4 << 20);
        image.u32(36, 1);
        image.u64(40, 2 * CLUSTER);
        image.u64(48, CLUSTER);
        image.u32(56, 1);
        image.u32(96, 4);
        image.u32(100, 104);
        image.u64(2 * CLUSTER, (3 * CLUSTER) | COPIED);
        image
    }

    pub(crate) fn put(&mut self, at: u64, bytes: &[u8]) -> &mut Self {
        let at = usize::try_from(at).unwrap();
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn u32(&mut self, at: u64, value: u32) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn u64(&mut self, at: u64, value: u64) -> &mut Self {
        self.put(at, &value.to_be_bytes())
    }

    pub(crate) fn l2(&mut self, index: u64, entry: u64) -> &mut Self {
        self.u64(3 * CLUSTER + index * 8, entry)
    }

    /// Makes it an image with subclusters, and writes such an entry.
    fn extended(&mut self, index: u64, entry: u64, bitmap: u64) -> &mut Self {
        self.u64(72, incompatible::EXTENDED_L2);
        self.u64(3 * CLUSTER + index * 16, entry).u64(3 * CLUSTER + index * 16 + 8, bitmap)
    }

    fn open(&self) -> Result<Qcow2Image> {
        self.open_snapshot(None)
    }

    fn open_snapshot(&self, snapshot: Option<&str>) -> Result<Qcow2Image> {
        let selector = snapshot.map(|text| text.parse().unwrap());
        let source = Arc::new(Source::from_bytes("x.qcow2", self.bytes.clone()));
        Qcow2Image::open(source, selector.as_ref(), false)
    }

    fn status(&self, start: u64, end: u64) -> Result<Vec<Run>> {
        let mut runs = Vec::new();
        let range = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        self.open()?.status(range, &mut Scratch::default(), &mut runs)?;
        Ok(runs.iter().map(|run| (run.start.get(), run.length.get(), run.status)).collect())
    }
}

/// A header all of whose bounds hold.
pub(super) fn header() -> Qcow2Header {
    Qcow2Header::parse(&Builder::new(4).bytes).unwrap()
}

impl Builder {
    fn open_past_damage(&self) -> Qcow2Image {
        let source = Arc::new(Source::from_bytes("x.qcow2", self.bytes.clone()));
        Qcow2Image::open_past_damage(source, None, false).unwrap()
    }

    fn runs_and_damage(&self) -> (Vec<StatusRun>, DamageList) {
        let image = self.open_past_damage();
        let mut scratch = Scratch { damage: Some(DamageList::default()), ..Scratch::default() };
        let mut runs = Vec::new();
        image.status(image.disk(), &mut scratch, &mut runs).unwrap();
        (runs, scratch.damage.unwrap())
    }

    /// The runs of the whole disk, and the damage: the range that it spoils, and where.
    fn past_damage(&self) -> (Vec<Run>, Vec<(u64, u64, u64)>) {
        let (runs, damage) = self.runs_and_damage();
        assert_eq!(damage.count(), damage.listed().len() as u64);
        let places = damage.listed().iter().map(|Damage { range, error, .. }| {
            assert!(error.to_string().starts_with("x.qcow2: at offset "), "{error}");
            (range.start.get(), range.length().get(), error.offset().unwrap())
        });
        let runs = runs.iter().map(|run| (run.start.get(), run.length.get(), run.status));
        (runs.collect(), places.collect())
    }
}

fn data(offset: u64) -> BlockStatus {
    BlockStatus::Data(HostPlace::in_image(HostOffset::new(offset)))
}

const NONE: BlockStatus = BlockStatus::Unallocated(None);

#[test]
fn contiguous_clusters_are_one_run_cut_to_the_range() {
    let mut image = Builder::new(8);
    image.l2(0, (4 * CLUSTER) | COPIED).l2(1, 5 * CLUSTER).l2(3, (4 * CLUSTER) | COPIED);
    assert_eq!(
        image.status(512, 4 * CLUSTER + 1024).unwrap(),
        [
            (512, 2 * CLUSTER - 512, data(4 * CLUSTER + 512)),
            (2 * CLUSTER, CLUSTER, NONE),
            (3 * CLUSTER, CLUSTER, data(4 * CLUSTER)),
            (4 * CLUSTER, 1024, NONE),
        ]
    );
}

#[test]
fn every_range_gives_its_part_of_the_whole() {
    const STEP: u64 = CLUSTER / 32;
    // What each step of a range reads: runs may be cut differently.
    let steps = |image: &Builder, start: u64, end: u64| -> Vec<(u64, BlockStatus)> {
        let runs = image.status(start * STEP, end * STEP).unwrap();
        let mut at = start * STEP;
        let mut steps = Vec::new();
        for (start, length, status) in runs {
            assert_eq!(start, at, "no gap");
            assert!(length > 0);
            at += length;
            let parts = (0..length).step_by(usize::try_from(STEP).unwrap());
            steps.extend(parts.map(|part| (start + part, status.advanced(ByteLen::new(part)))));
        }
        assert_eq!(at, end * STEP, "the whole range and no more");
        steps
    };
    let mut standard = Builder::new(8);
    standard.l2(0, 4 * CLUSTER).l2(1, 5 * CLUSTER).l2(2, 1);
    let mut extended = Builder::new(8);
    let checkered = 0x5555_5555 | (0x2a2a_2a2a << 32);
    extended.extended(0, 4 * CLUSTER, checkered).extended(1, 5 * CLUSTER, checkered);
    for image in [&standard, &extended] {
        let whole = steps(image, 0, 96);
        for start in 0..96u64 {
            for end in start + 1..=96 {
                let part = steps(image, start, end);
                assert!(part.iter().eq(
                    whole.iter().filter(|(at, _)| { (start * STEP..end * STEP).contains(at) })
                ));
            }
        }
    }
}

#[test]
fn zero_clusters_are_plain_or_keep_their_host_cluster() {
    let mut image = Builder::new(8);
    image.l2(0, 1).l2(1, 1 | COPIED).l2(2, (4 * CLUSTER) | 1 | COPIED);
    let allocated = HostPlace::in_image(HostOffset::new(4 * CLUSTER));
    assert_eq!(
        image.status(0, 3 * CLUSTER).unwrap(),
        [
            (0, 2 * CLUSTER, BlockStatus::Zero(ZeroStatus::Plain)),
            (2 * CLUSTER, CLUSTER, BlockStatus::Zero(ZeroStatus::Allocated(allocated))),
        ]
    );
}

#[test]
fn subclusters_follow_the_bitmap_and_join_over_clusters() {
    let mut image = Builder::new(8);
    let upper_half = 0xffff_0000;
    image.extended(0, 4 * CLUSTER, upper_half).extended(1, 5 * CLUSTER, 1 | 1 << (32 + 1));
    let sub = CLUSTER / 32;
    let place = |at| HostPlace::in_image(HostOffset::new(at));
    assert_eq!(
        image.status(0, CLUSTER + 3 * sub).unwrap(),
        [
            (0, 16 * sub, BlockStatus::Unallocated(Some(place(4 * CLUSTER)))),
            (16 * sub, 17 * sub, data(4 * CLUSTER + 16 * sub)),
            (
                CLUSTER + sub,
                sub,
                BlockStatus::Zero(ZeroStatus::Allocated(place(5 * CLUSTER + sub)))
            ),
            (CLUSTER + 2 * sub, sub, BlockStatus::Unallocated(Some(place(5 * CLUSTER + 2 * sub)))),
        ]
    );
}

#[test]
fn an_encrypted_image_tells_no_offset_but_of_its_data() {
    let mut image = Builder::new(8);
    image.u32(32, 2).l2(0, 4 * CLUSTER).l2(1, (5 * CLUSTER) | 1);
    let place = HostPlace::in_image(HostOffset::new(4 * CLUSTER));
    assert_eq!(
        image.status(0, 2 * CLUSTER).unwrap(),
        [
            (0, CLUSTER, BlockStatus::Encrypted { place, cipher: Encryption::Luks }),
            (CLUSTER, CLUSTER, BlockStatus::Zero(ZeroStatus::Plain)),
        ]
    );
}

#[test]
fn offset_zero_of_an_external_data_file_is_data() {
    let mut image = Builder::new(4);
    image.u64(72, incompatible::DATA_FILE).l2(0, COPIED).l2(1, CLUSTER | COPIED);
    let place = HostPlace { file: FileRole::DataFile, offset: HostOffset::ZERO };
    assert_eq!(
        image.status(0, 3 * CLUSTER).unwrap(),
        [(0, 2 * CLUSTER, BlockStatus::Data(place)), (2 * CLUSTER, CLUSTER, NONE)]
    );
}

/// What a change to a good image makes of it: the kind and part of the message.
fn refusal(change: impl FnOnce(&mut Builder)) -> Error {
    let mut image = Builder::new(8);
    change(&mut image);
    image.status(0, 4 << 20).expect_err("the image is bad")
}

#[track_caller]
fn assert_refused(change: impl FnOnce(&mut Builder), offset: u64, part: &str) {
    let error = refusal(change);
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}");
    assert_eq!(error.offset(), Some(offset), "{error}");
    assert!(error.to_string().contains(part), "{error}");
    assert!(error.to_string().starts_with("x.qcow2: "), "{error}");
}

#[test]
fn header_fields_out_of_bounds_are_refused_at_their_offset() {
    assert_refused(|i| _ = i.u32(0, 7), 0, "magic");
    assert_refused(|i| _ = i.u32(20, 8), 20, "cluster_bits is 8");
    assert_refused(|i| _ = i.u32(20, 22), 20, "cluster_bits is 22");
    assert_refused(|i| _ = i.u64(24, 1 << 62), 36, "the virtual size needs");
    assert_refused(|i| _ = i.u64(24, u64::MAX), 24, "past 2^63");
    assert_refused(|i| _ = i.u32(32, 3), 32, "crypt_method 3");
    assert_refused(|i| _ = i.u32(36, 0), 36, "0 entries");
    assert_refused(|i| _ = i.u32(36, u32::MAX), 40, "too large");
    assert_refused(|i| _ = i.u64(40, 2 * CLUSTER + 512), 40, "no multiple of a cluster");
    assert_refused(|i| _ = i.u64(40, !(CLUSTER - 1)), 40, "past 2^63");
    assert_refused(|i| _ = i.u64(40, 1 << 40), 40, "outside the file");
    assert_refused(|i| _ = i.u64(40, 0), 40, "overlaps the header");
    assert_refused(|i| _ = i.u64(40, CLUSTER), 40, "overlaps the refcount table");
    assert_refused(|i| _ = i.u64(48, 0), 48, "overlaps the header");
    assert_refused(|i| _ = i.u64(48, 1 << 40), 48, "outside the file");
    assert_refused(|i| _ = i.u32(56, 0), 56, "no refcount table");
    assert_refused(|i| _ = i.u32(60, 65537), 60, "65537 snapshots");
    assert_refused(|i| _ = i.u64(64, 100), 64, "no multiple of a cluster");
    assert_refused(|i| _ = i.u64(8, CLUSTER + 1), 8, "past the first cluster");
    assert_refused(|i| _ = i.u64(8, 200).u32(16, 1024), 16, "too long");
    assert_refused(|i| _ = i.u64(8, CLUSTER - 4).u32(16, 5), 16, "too long");
    assert_refused(|i| _ = i.u32(96, 7), 96, "refcount_order is 7");
    assert_refused(|i| _ = i.u32(100, 103), 100, "less than 104");
    assert_refused(|i| _ = i.u32(100, 1 << 20), 100, "exceeds");
    assert_refused(|i| _ = i.u64(72, incompatible::COMPRESSION), 104, "contradicts");
    assert_refused(|i| _ = i.u32(100, 112).put(104, &[1]), 104, "contradicts");
    assert_refused(|i| _ = i.u64(88, 2), 88, "data-file-raw");
}

#[test]
fn subclusters_need_clusters_of_16_kib() {
    let change =
        |i: &mut Builder| _ = i.u32(20, 13).u64(24, 4096).u64(72, incompatible::EXTENDED_L2);
    assert_refused(change, 20, "too small for subclusters");
}

#[test]
fn entries_that_contradict_the_specification_are_refused_at_their_offset() {
    let l1 = 2 * CLUSTER;
    let l2 = 3 * CLUSTER;
    assert_refused(|i| _ = i.u64(l1, 3 * CLUSTER + 512), l1, "cluster boundary");
    assert_refused(|i| _ = i.u64(l1, 8 * CLUSTER), l1, "outside the file");
    assert_refused(|i| _ = i.u64(l1, 1 << 55), l1, "outside the file");
    assert_refused(|i| _ = i.u64(l1, 2 * CLUSTER), l1, "overlaps the L1 table");
    assert_refused(|i| _ = i.u64(l1, CLUSTER), l1, "overlaps the refcount table");
    assert_refused(|i| _ = i.l2(5, 4 * CLUSTER + 512), l2 + 40, "no multiple of the cluster size");
    assert_refused(|i| _ = i.u32(4, 2).l2(5, 1), l2 + 40, "version 2 does not have");
    assert_refused(|i| _ = i.extended(1, 4 * CLUSTER, 1 | 1 << 32), l2 + 16, "bitmap");
    assert_refused(|i| _ = i.extended(1, 0, 1), l2 + 16, "bitmap");
    let data_file = incompatible::DATA_FILE;
    assert_refused(|i| _ = i.u64(72, data_file).l2(1, 5 * CLUSTER), l2 + 8, "only 0x10000 can be");
    assert_refused(|i| _ = i.u64(72, data_file).l2(1, COMPRESSED), l2 + 8, "compressed");
}

fn damaged(from: u64) -> BlockStatus {
    BlockStatus::Damaged { from: GuestOffset::new(from) }
}

#[test]
fn past_damage_a_bad_entry_spoils_its_cluster() {
    const L2: u64 = 3 * CLUSTER;
    let mut image = Builder::new(8);
    image.l2(0, 4 * CLUSTER).l2(1, 512).l2(2, CLUSTER + 512).l2(3, 5 * CLUSTER).l2(63, 512);
    let (runs, damage) = image.past_damage();
    assert_eq!(
        runs,
        [
            (0, CLUSTER, data(4 * CLUSTER)),
            (CLUSTER, CLUSTER, damaged(CLUSTER)),
            (2 * CLUSTER, CLUSTER, damaged(2 * CLUSTER)),
            (3 * CLUSTER, CLUSTER, data(5 * CLUSTER)),
            (4 * CLUSTER, 59 * CLUSTER, NONE),
            (63 * CLUSTER, CLUSTER, damaged(63 * CLUSTER)),
        ]
    );
    assert_eq!(
        damage,
        [
            (CLUSTER, CLUSTER, L2 + 8),
            (2 * CLUSTER, CLUSTER, L2 + 16),
            (63 * CLUSTER, CLUSTER, L2 + 63 * 8)
        ]
    );
    // With subclusters too, where an entry's own bitmap can be bad.
    let mut image = Builder::new(8);
    image.extended(0, 4 * CLUSTER, u64::MAX >> 32).extended(1, 0, 1).extended(2, 512, 0);
    let (runs, damage) = image.past_damage();
    assert_eq!(
        runs,
        [
            (0, CLUSTER, data(4 * CLUSTER)),
            (CLUSTER, CLUSTER, damaged(CLUSTER)),
            (2 * CLUSTER, CLUSTER, damaged(2 * CLUSTER)),
            (3 * CLUSTER, 61 * CLUSTER, NONE),
        ]
    );
    assert_eq!(damage, [(CLUSTER, CLUSTER, L2 + 16), (2 * CLUSTER, CLUSTER, L2 + 32)]);
}

#[test]
fn past_damage_a_bad_table_spoils_what_it_describes() {
    const L1: u64 = 2 * CLUSTER;
    const COVERAGE: u64 = CLUSTER / 8 * CLUSTER;
    let size = 3 * COVERAGE + 4 * CLUSTER;
    let mut image = Builder::new(8);
    image.u64(24, size).u32(36, 4).l2(0, 5 * CLUSTER);
    // Unaligned; the first one again; past the end of the file.
    image.u64(L1 + 8, 4 * CLUSTER + 512).u64(L1 + 16, 3 * CLUSTER).u64(L1 + 24, 8 * CLUSTER);
    let (runs, damage) = image.past_damage();
    assert_eq!(
        runs,
        [
            (0, CLUSTER, data(5 * CLUSTER)),
            (CLUSTER, COVERAGE - CLUSTER, NONE),
            (COVERAGE, COVERAGE, damaged(COVERAGE)),
            (2 * COVERAGE, COVERAGE, damaged(2 * COVERAGE)),
            (3 * COVERAGE, 4 * CLUSTER, damaged(3 * COVERAGE)),
        ]
    );
    assert_eq!(
        damage,
        [
            (COVERAGE, COVERAGE, L1 + 8),
            (2 * COVERAGE, COVERAGE, L1 + 16),
            (3 * COVERAGE, 4 * CLUSTER, L1 + 24)
        ]
    );
    // The file ends inside the L1 table: the rest of the disk is lost.
    image.bytes.truncate(usize::try_from(L1 + 20).unwrap());
    let (runs, damage) = image.past_damage();
    assert_eq!(runs.last(), Some(&(2 * COVERAGE, size - 2 * COVERAGE, damaged(2 * COVERAGE))));
    assert_eq!(damage.last(), Some(&(2 * COVERAGE, size - 2 * COVERAGE, 40)));
    // And where it is not there at all, all of it.
    image.u64(40, 1 << 40);
    assert_eq!(image.past_damage(), (vec![(0, size, damaged(0))], vec![(0, size, 40)]));
}

#[test]
fn tables_named_again_and_again_give_no_extents_without_end() {
    let mut image = Builder::new(8);
    let entries = 4096;
    image.u64(24, entries * (CLUSTER / 8) * CLUSTER).u32(36, u32::try_from(entries).unwrap());
    for entry in 0..entries {
        image.u64(2 * CLUSTER + entry * 8, 3 * CLUSTER);
    }
    for cluster in (0..CLUSTER / 8).step_by(2) {
        image.l2(cluster, 4 * CLUSTER);
    }
    let (runs, damage) = image.runs_and_damage();
    assert_eq!(runs.len() as u64, CLUSTER / 8 + entries - 1);
    assert_eq!(damage.count(), entries - 1);
}

#[test]
fn a_refcount_table_out_of_the_file_is_noted_and_not_needed() {
    let mut image = Builder::new(8);
    image.u64(48, 1 << 40).l2(0, 4 * CLUSTER);
    assert!(image.open().is_err());
    let notices = image.open_past_damage().notices();
    let [Notice::Damaged(what)] = &notices[..] else { panic!("{notices:?}") };
    assert!(what.starts_with("at offset 0x30: the refcount table"), "{what}");
    assert_eq!(image.past_damage().1, []);
    // So is damage of the L1 table past what the disk needs of it.
    let mut image = Builder::new(8);
    image.u32(36, 3).u64(2 * CLUSTER + 8, 3 * CLUSTER).u64(2 * CLUSTER + 16, 3 * CLUSTER);
    assert!(image.open().is_err());
    let noted = |image: &Builder| image.open_past_damage().notices();
    let what =
        "at offset 0x20008: the L1 entries 0 and 1 overlap: both name the L2 table at 0x30000";
    assert_eq!(noted(&image), [Notice::Damaged(what.to_owned())]);
    image.u64(2 * CLUSTER, 0).bytes.truncate(usize::try_from(2 * CLUSTER + 8).unwrap());
    assert_eq!(noted(&image).len(), 1);
    assert_eq!(image.past_damage().1, []);
}

#[test]
fn the_last_l2_entry_is_bounded_by_the_virtual_size() {
    // Entries past the disk's end are never looked at: QEMU does not either.
    let mut image = Builder::new(8);
    image.l2(64, 4 * CLUSTER + 512);
    assert!(image.status(0, 4 << 20).is_ok());
}

#[test]
fn every_cut_of_a_file_is_an_error_or_reads_the_same() {
    let mut image = Builder::new(5);
    image.l2(0, 4 * CLUSTER);
    let whole = image.status(0, 4 << 20).unwrap();
    let full = image.bytes.clone();
    for length in (0..full.len()).step_by(4099).chain([1, 71, 72, 103, 104, 511, 512]) {
        image.bytes = full[..length].to_vec();
        match image.status(0, 4 << 20) {
            Ok(status) => {
                assert!(length >= usize::try_from(4 * CLUSTER).unwrap(), "{length}");
                assert_eq!(status, whole);
            }
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{length}: {error}")
            }
        }
    }
}

#[test]
fn unknown_versions_and_features_are_not_called_corrupt() {
    let error = refusal(|i| _ = i.u32(4, 4));
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
    let error = refusal(|i| {
        i.u64(72, 1 << 13).u32(104, 0x6803_f857).u32(108, 48).put(112, b"\0\x0dcrystal balls");
    });
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)), "{error}");
    assert!(error.to_string().contains("bit 13 (crystal balls)"), "{error}");
}

#[test]
fn a_corrupt_image_is_refused_until_allowed() {
    let error = refusal(|i| _ = i.u64(72, incompatible::CORRUPT));
    assert!(error.to_string().contains("--allow-corrupt"), "{error}");
    let mut image = Builder::new(8);
    image.u64(72, incompatible::CORRUPT | incompatible::DIRTY);
    let source = Arc::new(Source::from_bytes("x", image.bytes));
    let image = Qcow2Image::open(source, None, true).unwrap();
    assert_eq!(image.notices(), [Notice::Dirty, Notice::Corrupt]);
}

#[test]
fn a_version_2_overlay_keeps_its_declared_backing_format() {
    // Header extensions start at offset 72 there.
    let mut image = Builder::new(8);
    image.u32(4, 2).u32(72, 0xe279_2aca).u32(76, 3).put(80, b"raw\0\0\0\0\0");
    image.u64(8, 200).u32(16, 4).put(200, b"base");
    let image = image.open().unwrap();
    let backing = image.backing().unwrap();
    assert_eq!((backing.name.as_slice(), backing.format.as_deref()), (&b"base"[..], Some("raw")));
}

/// One snapshot in cluster 4 with its L1 table in cluster 5.
fn with_snapshot() -> Builder {
    let mut image = Builder::new(8);
    let at = 4 * CLUSTER;
    image.u32(60, 1).u64(64, at);
    image.u64(at, 5 * CLUSTER).u32(at + 8, 1).u32(at + 12, 1 << 16 | 4).u32(at + 36, 16);
    image.u64(at + 48, 1 << 20).put(at + 56, b"7name");
    image.u64(5 * CLUSTER, 3 * CLUSTER);
    image
}

#[test]
fn a_snapshot_has_its_own_size_and_l1_table() {
    let image = with_snapshot().open_snapshot(Some("name")).unwrap();
    assert_eq!(image.virtual_size(), ByteLen::new(1 << 20));
    assert_eq!(image.snapshot().unwrap().id, "7");
    assert!(with_snapshot().open_snapshot(Some("7")).is_ok());
    let error = with_snapshot().open_snapshot(Some("8")).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::SnapshotNotFound(_)), "{error}");
}

#[test]
fn a_bad_snapshot_table_stops_only_those_who_ask_for_a_snapshot() {
    type Change = fn(&mut Builder);
    let bad: [(&str, Change); 5] = [
        ("past 2^63", |i| _ = i.u64(4 * CLUSTER + 48, 1 << 63)),
        ("extra data", |i| _ = i.u32(4 * CLUSTER + 36, 1025)),
        ("cluster boundary", |i| _ = i.u64(4 * CLUSTER, 5 * CLUSTER + 8)),
        ("too large", |i| _ = i.u32(4 * CLUSTER + 8, u32::MAX)),
        ("outside the file", |i| _ = i.u64(64, 7 << 40)),
    ];
    for (part, change) in bad {
        let mut image = with_snapshot();
        change(&mut image);
        assert!(image.open().is_ok(), "{part}");
        let error = image.open_snapshot(Some("7")).unwrap_err();
        assert!(error.to_string().contains(part), "{part}: {error}");
    }
}
