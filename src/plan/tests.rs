//! Plans against the same model as the fold: what each sector of each table reads.

use proptest::prelude::*;

use super::*;
use crate::chain::Extents;
use crate::chain::tests::{Sector, chain_of, layers, model};

/// What a sector of a device reads, followed through the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reads {
    Zero,
    File(BackingId, u64),
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
    let SegmentTarget::Linear { backing, offset } = segment.target else { return Reads::Zero };
    let at = offset.get() + sector - segment.start.get();
    match &plan.backings()[backing.0 as usize] {
        Backing::File { .. } => Reads::File(backing, at),
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
    #[test]
    fn every_sector_reads_what_the_chain_says(
        layers in layers(),
        zero in zero_mode(),
        threshold in 0..6u64,
        max_segments in 1..9u64,
    ) {
        let chain = chain_of(layers.clone());
        let options = PlanOptions {
            zero,
            zero_threshold: ByteLen::new(threshold * SECTOR_SIZE),
            max_segments,
            ..PlanOptions::default()
        };
        let plan = Plan::new(&chain, options).unwrap();
        prop_assert!(plan.obstacles().is_empty());
        let ids = (0u32..).map(TableId).take(plan.tables().len());
        let tables: Vec<_> = ids.map(|id| segments(&plan, id)).collect();
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
                _ => Reads::Zero,
            };
            prop_assert_eq!(read(&plan, &tables, tables.len() - 1, sector), expected);
        }
        // Every file is on some table, so that its loop stays.
        let on_a_table = |id| {
            tables.iter().flatten().any(|segment| {
                matches!(segment.target, SegmentTarget::Linear { backing, .. } if backing == id)
            })
        };
        prop_assert!((0..).map(BackingId).take(layers.len()).all(on_a_table));
    }
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
fn a_chain_whose_files_are_all_used_needs_one_table() {
    let chain = chain_of(vec![vec![Sector::Data(5), Sector::Zero]]);
    let plan = Plan::new(&chain, PlanOptions { zero: ZeroMode::Dm, ..PlanOptions::default() });
    let plan = plan.unwrap();
    assert_eq!(plan.tables().len(), 1);
    assert_eq!(plan.loops(), 1);
    assert_eq!(plan.counts(), SegmentCounts { linear: 1, zero: 1 });
}

#[test]
fn obstacles_are_counted_by_file_with_the_first_offset() {
    let chain = chain_of(vec![vec![
        Sector::Zero,
        Sector::Encrypted(1),
        Sector::Encrypted(2),
        Sector::Data(63),
        Sector::Data(70),
        Sector::Encrypted(9),
    ]]);
    let plan = Plan::new(&chain, PlanOptions::default()).unwrap();
    let obstacle = |kind, count, first| Obstacle {
        kind,
        path: PathBuf::from("layer0"),
        count,
        first: Some(GuestOffset::new(first * SECTOR_SIZE)),
    };
    assert_eq!(
        plan.obstacles(),
        [obstacle(ObstacleKind::Encrypted, 3, 1), obstacle(ObstacleKind::PastFileEnd, 1, 4)]
    );
    let error = plan.check_attachable().unwrap_err();
    assert!(error.to_string().contains("3, the first at guest offset 0x200"), "{error}");
}

#[test]
fn an_odd_raw_file_has_one_partial_sector() {
    use crate::chain::Layer;
    use crate::format::raw::RawImage;
    use crate::source::Source;
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
    assert_eq!(plan.obstacles().len(), 1);
    assert_eq!(plan.obstacles()[0].kind, ObstacleKind::PartialSector);
    assert_eq!(plan.obstacles()[0].first, Some(GuestOffset::new(512)));
    assert_eq!(plan.size(), Sectors::new(2));
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
        let facts = Facts::new(&chain, options);
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
        let (last, _) = cut(&facts, extents, |piece| pieces.push(*piece));
        pieces.extend(last);
        let segments = pieces.iter().map(|piece| facts.segment(piece, GuestOffset::ZERO));
        segments.map(|segment| (segment.start.get(), segment.length.get())).collect::<Vec<_>>()
    };
    let data = |at| Mapping::Data(place(at));
    let rows = [(2, data(4)), (3, hole(6)), (2, data(9))];
    assert_eq!(cut(&rows, 4), [(0, 7)]);
    assert_eq!(cut(&rows, 3), [(0, 2), (2, 3), (5, 2)], "a long hole is worth a target");
    assert_eq!(cut(&[(3, hole(6)), (2, data(9))], 4), [(0, 5)]);
    assert_eq!(cut(&[(3, hole(7)), (2, data(9))], 4), [(0, 3), (3, 2)], "not the same bytes");
}
