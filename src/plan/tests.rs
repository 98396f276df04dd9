//! Plans against the same model as the fold: what each sector of each table reads.

use proptest::prelude::*;

use super::*;
use crate::chain::Extents;
use crate::chain::tests::{FILE_SECTORS, Sector, chain_of, chain_over, layers, model};
use crate::scratch::FoundKind;
use crate::table::DeviceRef;
use crate::units::SECTOR_SIZE;

/// What a sector of a device reads, followed through the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reads {
    Zero,
    File(BackingId, u64),
    Scratch(u64),
    Error,
    /// Under the layer's key, with this IV, these bytes.
    Decrypted(u32, u64, Box<Reads>),
}

fn segments(plan: &Plan<'_>, table: TableId) -> Vec<Segment> {
    let mut out = Vec::new();
    plan.for_each_segment(table, &mut |segment| {
        out.push(segment);
        Ok(())
    })
    .unwrap();
    out
}

fn read(plan: &Plan<'_>, tables: &[Vec<Segment>], table: usize, sector: u64) -> Reads {
    let segment = tables[table]
        .iter()
        .find(|s| s.start.get() <= sector && sector < s.start.get() + s.length.get())
        .unwrap();
    let inside = sector - segment.start.get();
    match segment.target {
        SegmentTarget::Zero => Reads::Zero,
        SegmentTarget::Error => Reads::Error,
        SegmentTarget::Linear { backing, offset } => {
            read_backing(plan, tables, table, backing, offset.get() + inside)
        }
        SegmentTarget::Crypt { backing, crypt } => {
            let layer = plan.crypts()[crypt.0 as usize].layer;
            let below = read_backing(plan, tables, table, backing, inside);
            Reads::Decrypted(layer, inside, Box::new(below))
        }
    }
}

fn read_backing(
    plan: &Plan<'_>,
    tables: &[Vec<Segment>],
    table: usize,
    backing: BackingId,
    at: u64,
) -> Reads {
    match &plan.backings()[backing.0 as usize] {
        Backing::File { .. } => Reads::File(backing, at),
        Backing::Scratch { length } => {
            assert!(at < length.get(), "the scratch file is long enough");
            Reads::Scratch(at)
        }
        Backing::Zero { length } => {
            assert!(at < length.get(), "the zero loop is long enough");
            Reads::Zero
        }
        Backing::Table(below) => {
            assert!((below.0 as usize) < table, "tables are built bottom up");
            read(plan, tables, below.0 as usize, at)
        }
    }
}

fn zero_mode() -> impl Strategy<Value = ZeroMode> {
    prop_oneof![Just(ZeroMode::Auto), Just(ZeroMode::Dm), Just(ZeroMode::Loop)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Of more than a window, that are nothing but data of one file but for one sector, and may
    /// lie past the file's end.
    #[test]
    fn many_pieces_are_counted_as_they_are_cut(
        places in prop::collection::vec((0..62u64, 1..4u64), 1100..1800),
        other in 0..3000usize,
        what in prop_oneof![
            Just(Sector::Zero), Just(Sector::Unallocated), Just(Sector::Compressed),
            Just(Sector::Encrypted(1)), Just(Sector::Data(9)), Just(Sector::Data(FILE_SECTORS)),
        ],
        file_size in prop_oneof![
            8 => Just(FILE_SECTORS * SECTOR_SIZE), 1 => Just(20 * SECTOR_SIZE + 7), 1 => Just(100),
        ],
        max_segments in prop_oneof![70..900u64, Just(MAX_SEGMENTS_PER_TABLE)],
    ) {
        let mut layer: Vec<_> =
            places.iter().flat_map(|&(at, n)| (at..at + n).map(Sector::Data)).collect();
        if let Some(sector) = layer.get_mut(other) {
            *sector = what;
        }
        let file = vec![0; usize::try_from(file_size).unwrap()];
        let chain = chain_over(vec![layer], |_| file.clone());
        let plan = Plan::new(&chain, PlanOptions { max_segments, ..Default::default() }).unwrap();
        let mut total = 0;
        for (id, table) in (0u32..).map(TableId).zip(plan.tables()) {
            let segments = segments(&plan, id);
            prop_assert_eq!(segments.len() as u64, table.segments);
            prop_assert_eq!(segments.iter().map(|s| s.length.get()).sum::<u64>(), table.size.get());
            total += table.segments;
        }
        prop_assert_eq!(total, plan.counts().total());
    }
}

proptest! {
    #[test]
    fn every_sector_reads_what_the_chain_says(
        layers in layers(),
        zero in zero_mode(),
        threshold in 0..6u64,
        max_segments in prop_oneof![1..9u64, Just(MAX_SEGMENTS_PER_TABLE)],
        found in prop::collection::vec((0..40u64, 1..5u64, any::<bool>()), 0..4),
        on_error in prop_oneof![Just(OnError::Zero), Just(OnError::ErrorTarget)],
    ) {
        let chain = chain_of(layers.clone());
        let options = PlanOptions {
            zero,
            zero_threshold: ByteLen::new(threshold * SECTOR_SIZE),
            max_segments,
            on_error,
            ..PlanOptions::default()
        };
        let found = only_compressed(&layers, &found);
        let mut plan = Plan::with_found(&chain, options, &found).unwrap();
        prop_assert!(plan.obstacles().is_empty());
        let all_segments = |plan: &Plan<'_>| -> Vec<_> {
            let ids = (0u32..).map(TableId).take(plan.tables().len());
            ids.map(|id| segments(plan, id)).collect()
        };
        let tables = all_segments(&plan);
        if plan.few.take().is_some() {
            prop_assert_eq!(&all_segments(&plan), &tables, "resolved again");
        }
        let mut counts = SegmentCounts::default();
        for (segments, table) in tables.iter().zip(plan.tables()) {
            let mut at = 0;
            for segment in segments {
                prop_assert_eq!(segment.start.get(), at, "gapless");
                prop_assert!(segment.length.get() > 0);
                at += segment.length.get();
                match segment.target {
                    SegmentTarget::Zero => counts.zero += 1,
                    SegmentTarget::Linear { .. } => counts.linear += 1,
                    SegmentTarget::Error => counts.error += 1,
                    SegmentTarget::Crypt { .. } => counts.crypt += 1,
                }
            }
            prop_assert_eq!(at, table.size.get());
            prop_assert_eq!(segments.len() as u64, table.segments);
        }
        prop_assert_eq!(counts, plan.counts());
        prop_assert_eq!(plan.tables().last().unwrap().role, TableRole::Top);
        prop_assert_eq!(plan.tables().last().unwrap().size, plan.size());
        for sector in 0..plan.size().get() {
            let expected = match model(&layers, usize::try_from(sector).unwrap()) {
                (depth, Sector::Data(at)) => Reads::File(BackingId(depth), at),
                (depth, Sector::Encrypted(at)) => {
                    Reads::Decrypted(depth, sector, Box::new(Reads::File(BackingId(depth), at)))
                }
                (_, Sector::Compressed) => Reads::Scratch(sector),
                _ => Reads::Zero,
            };
            let mut got = read(&plan, &tables, tables.len() - 1, sector);
            let at = GuestOffset::new(sector * SECTOR_SIZE);
            let here = found.iter().find(|f| f.range.start <= at && at < f.range.end);
            match (here.map(|found| found.kind), &got) {
                (Some(FoundKind::Zeros), Reads::Zero)
                | (Some(FoundKind::Failed), Reads::Error) => got = Reads::Scratch(sector),
                _ => {}
            }
            // A short run of zeros may be read from the scratch file, where it is a hole.
            if expected == Reads::Zero && got == Reads::Scratch(sector) {
                got = Reads::Zero;
            }
            prop_assert_eq!(got, expected);
        }
        // Every file is on some table, so that its loop stays.
        let on_a_table = |id| {
            tables.iter().flatten().any(|segment| {
                matches!(
                    segment.target,
                    SegmentTarget::Linear { backing, .. } | SegmentTarget::Crypt { backing, .. }
                        if backing == id
                )
            })
        };
        prop_assert!((0..).map(BackingId).take(layers.len()).all(on_a_table));
    }
}

/// Ranges that lie in compressed sectors, one after the other.
fn only_compressed(layers: &[Vec<Sector>], ranges: &[(u64, u64, bool)]) -> Vec<Found> {
    let mut ranges = ranges.to_vec();
    ranges.sort_unstable();
    let mut found: Vec<Found> = Vec::new();
    for (start, length, failed) in ranges {
        let size = layers[0].len() as u64;
        let is_compressed = |sector| {
            sector < size && model(layers, usize::try_from(sector).unwrap()).1 == Sector::Compressed
        };
        let offset = |sector| GuestOffset::new(sector * SECTOR_SIZE);
        let range = GuestRange::new(offset(start), offset(start + length));
        if (start..start + length).all(is_compressed)
            && found.last().is_none_or(|last| last.range.end <= range.start)
        {
            let kind = if failed { FoundKind::Failed } else { FoundKind::Zeros };
            found.push(Found { range, kind });
        }
    }
    found
}

#[test]
fn a_file_without_segments_is_kept_in_an_inner_table_past_the_end() {
    let chain = chain_of(vec![vec![Sector::Unallocated; 8], (0..8).map(Sector::Data).collect()]);
    let plan = Plan::new(&chain, PlanOptions::default()).unwrap();
    assert_eq!(plan.tables().len(), 2);
    assert_eq!(plan.tables()[0].size, Sectors::new(9));
    assert_eq!(
        segments(&plan, TableId(0))[1],
        Segment {
            start: Sectors::new(8),
            length: Sectors::new(1),
            target: SegmentTarget::Linear { backing: BackingId(0), offset: Sectors::new(0) },
        }
    );
    assert_eq!(plan.size(), Sectors::new(8));
}

#[test]
fn lines_are_the_same_whatever_line_was_before() {
    let chain = chain_of(vec![
        vec![Sector::Data(5), Sector::Unallocated, Sector::Data(9), Sector::Data(2), Sector::Zero],
        (0..5).map(Sector::Data).collect(),
    ]);
    for zero in [ZeroMode::Dm, ZeroMode::Loop] {
        let plan = Plan::new(&chain, PlanOptions { zero, ..PlanOptions::default() }).unwrap();
        let mut bindings = Bindings::default();
        for minor in 0..5 {
            bindings.bind(BackingId(minor), DeviceRef::from_numbers(7, minor));
        }
        let segments = segments(&plan, TableId(0));
        assert!(segments.len() > 4, "{segments:?}");
        let mut maker = LineMaker::new(&bindings);
        for segment in segments.iter().chain(segments.iter().rev()) {
            assert_eq!(*maker.line(segment).unwrap(), bindings.line(segment).unwrap());
        }
        let offset = Sectors::default();
        let target = SegmentTarget::Linear { backing: BackingId(9), offset };
        assert!(maker.line(&Segment { target, ..segments[0] }).is_err());
    }
}

#[test]
fn kernel_memory_grows_with_segments_devices_and_the_largest_table() {
    let sectors = (0..64).map(|sector| Sector::Data(63 - sector)).collect();
    let chain = chain_of(vec![sectors]);
    let memory = |max_segments| {
        let plan = Plan::new(&chain, PlanOptions { max_segments, ..PlanOptions::default() });
        KernelMemory::of(&plan.unwrap())
    };
    // One table on a loop device; or four and one over them, the lines of which count too.
    let (one, split) = (memory(MAX_SEGMENTS_PER_TABLE), memory(17));
    assert_eq!(one, KernelMemory { kept: 64 * 113 + 2 * 65536, loading: 64 * 64 });
    assert_eq!(split, KernelMemory { kept: 68 * 113 + 6 * 65536, loading: 16 * 64 });
    assert_eq!(one.peak(), one.kept + one.loading);
}

#[test]
fn a_chain_whose_files_are_all_used_needs_one_table() {
    let chain = chain_of(vec![vec![Sector::Data(5), Sector::Zero]]);
    let plan = Plan::new(&chain, PlanOptions { zero: ZeroMode::Dm, ..PlanOptions::default() });
    let plan = plan.unwrap();
    assert_eq!(plan.tables().len(), 1);
    assert_eq!(plan.loops(), 1);
    assert_eq!(plan.counts(), SegmentCounts { linear: 1, zero: 1, ..SegmentCounts::default() });
}

#[test]
fn obstacles_are_counted_by_file_with_the_first_offset() {
    let chain = chain_of(vec![vec![
        Sector::Zero,
        Sector::Compressed,
        Sector::Compressed,
        Sector::Data(63),
        Sector::Data(70),
        Sector::Compressed,
    ]]);
    let refuse = PlanOptions { compressed: CompressedMode::Refuse, ..PlanOptions::default() };
    let plan = Plan::new(&chain, refuse).unwrap();
    let obstacle = |kind, count, first| Obstacle {
        kind,
        path: PathBuf::from("layer0"),
        count,
        first: Some(GuestOffset::new(first * SECTOR_SIZE)),
        detail: None,
    };
    assert_eq!(
        plan.obstacles(),
        [obstacle(ObstacleKind::Compressed, 3, 1), obstacle(ObstacleKind::PastFileEnd, 1, 4)]
    );
    let error = plan.check_attachable().unwrap_err();
    assert!(error.to_string().contains("3, the first at guest offset 0x200"), "{error}");

    let rescue = PlanOptions { on_error: OnError::ErrorTarget, ..PlanOptions::default() };
    let plan = Plan::new(&chain, rescue).unwrap();
    assert!(plan.obstacles().is_empty());
    assert_eq!(plan.damage(), [obstacle(ObstacleKind::PastFileEnd, 1, 4)]);
    assert_eq!(plan.counts().error, 1);
}

#[test]
fn the_partial_sector_of_an_odd_raw_file_is_copied() {
    use crate::chain::Layer;
    use crate::format::raw::RawImage;
    use crate::status::FileRole;
    use std::sync::Arc;
    let source = Arc::new(Source::from_bytes("odd.raw", vec![1; 1000]));
    let layer = Layer {
        image: Box::new(RawImage::open(Arc::clone(&source)).unwrap()),
        source,
        data_file: None,
        declared_format: None,
    };
    let chain = Chain::new(vec![layer]).unwrap();
    let plan = Plan::new(&chain, PlanOptions::default()).unwrap();
    assert!(plan.obstacles().is_empty());
    assert_eq!(plan.size(), Sectors::new(2));
    let mut jobs = Vec::new();
    plan.for_each_window(&mut |window| {
        jobs.extend_from_slice(window);
        Ok(())
    })
    .unwrap();
    let what =
        ScratchContent::Copy { role: FileRole::Image, host: HostOffset::new(512), bytes: 488 };
    let guest = GuestOffset::new(512);
    assert_eq!(jobs, [ScratchJob { at: 512, length: 512, guest, layer: 0, what }]);
    assert_eq!((plan.scratch_bytes(), plan.scratch_length()), (512, 1024));
}

#[test]
fn an_empty_disk_cannot_be_attached() {
    let chain = chain_of(vec![vec![]]);
    let plan = Plan::new(&chain, PlanOptions::default()).unwrap();
    assert_eq!(plan.obstacles()[0].kind, ObstacleKind::Empty);
}

#[test]
fn a_short_hole_between_data_of_one_file_is_run_through() {
    use crate::extent::{Extent, Mapping, ZeroCause};
    use crate::status::{HostPlace, ZeroStatus};
    use crate::units::HostOffset;
    let chain = chain_of(vec![vec![Sector::Zero; 8]]);
    let place = |at| HostPlace::in_image(HostOffset::new(at * SECTOR_SIZE));
    let hole = |at| Mapping::Zero(ZeroCause::Layer(ZeroStatus::Hole(place(at))));
    let cut = |rows: &[(u64, Mapping)], threshold: u64| {
        let zero_threshold = ByteLen::new(threshold * SECTOR_SIZE);
        let options = PlanOptions { zero_threshold, ..PlanOptions::default() };
        let facts = Facts::new(&chain, options, sorted(&[]));
        let mut at = 0;
        let extents: Vec<_> = rows
            .iter()
            .map(|&(sectors, mapping)| {
                let start = GuestOffset::new(at * SECTOR_SIZE);
                at += sectors;
                Extent { start, length: ByteLen::new(sectors * SECTOR_SIZE), depth: 0, mapping }
            })
            .collect();
        let mut pieces = Vec::new();
        let extents = Extents::Folded(extents.iter().copied());
        let (last, _) = cut(&facts, Stream::Guest, extents, |piece| pieces.push(*piece), |_| ());
        pieces.extend(last);
        let mut segments = Vec::new();
        for piece in &pieces {
            let each = |segment: Segment| {
                segments.push((segment.start.get(), segment.length.get()));
                Ok::<_, Error>(())
            };
            facts.segments(piece, GuestOffset::ZERO, each).unwrap();
        }
        segments
    };
    let data = |at| Mapping::Data(place(at));
    let rows = [(2, data(4)), (3, hole(6)), (2, data(9))];
    assert_eq!(cut(&rows, 4), [(0, 7)]);
    assert_eq!(cut(&rows, 3), [(0, 2), (2, 3), (5, 2)], "a long hole is worth a target");
    assert_eq!(cut(&[(3, hole(6)), (2, data(9))], 4), [(0, 5)]);
    assert_eq!(cut(&[(3, hole(7)), (2, data(9))], 4), [(0, 3), (3, 2)], "not the same bytes");
}
