//! Image files of all formats.

use std::sync::Arc;

use imgdm::chain::{Chain, HoleQuery, Layer};
use imgdm::check::Options;
use imgdm::error::Result;
use imgdm::explain::{explain, explain_reverse};
use imgdm::extent::Mapping;
use imgdm::format::cow::CowImage;
use imgdm::format::qcow::QcowImage;
use imgdm::format::qcow2::dirty::for_each_dirty_run;
use imgdm::format::qcow2::{Qcow2Image, SnapshotSelector, read_snapshots};
use imgdm::format::raw::RawImage;
use imgdm::format::{Format, ImageFormat};
use imgdm::metadata::Metadata;
use imgdm::plan::{Plan, PlanOptions, TableId, TableSource};
use imgdm::read::{ChainReader, Ciphers};
use imgdm::source::Source;
use imgdm::status::FileRole;
use imgdm::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Bytes of the disk that are looked at, at its start and at its end: a header can claim
/// exbibytes, of which all that no table describes are alike.
const LOOKED_AT: u64 = 4 << 20;

/// The largest disk that is planned whole.
const PLANNED: u64 = 64 << 20;

fn source(bytes: &[u8]) -> Arc<Source> {
    Arc::new(Source::from_bytes("fuzzed", bytes.to_vec()))
}

fn open(format: Format, source: &Arc<Source>, past_damage: bool) -> Result<Box<dyn ImageFormat>> {
    let source = Arc::clone(source);
    Ok(match (format, past_damage) {
        (Format::Raw, _) => Box::new(RawImage::open(source)?),
        (Format::Qcow2, false) => Box::new(Qcow2Image::open(source, None, true)?),
        (Format::Qcow2, true) => Box::new(Qcow2Image::open_past_damage(source, None, true)?),
        (Format::Qcow, false) => Box::new(QcowImage::open(source)?),
        (Format::Qcow, true) => Box::new(QcowImage::open_past_damage(source)?),
        (Format::Cow, false) => Box::new(CowImage::open(source)?),
        (Format::Cow, true) => Box::new(CowImage::open_past_damage(source)?),
    })
}

fn layer(format: Format, bytes: &[u8], past_damage: bool) -> Result<Layer> {
    let source = source(bytes);
    let image = open(format, &source, past_damage)?;
    Ok(Layer { image, source, data_file: None, declared_format: Some(format) })
}

/// The parts of a disk that are looked at.
fn parts(chain: &Chain) -> Vec<GuestRange> {
    let end = chain.virtual_size().get();
    let range = |start, end| GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
    if end <= 2 * LOOKED_AT {
        return vec![range(0, end)];
    }
    vec![range(0, LOOKED_AT), range(end - LOOKED_AT, end)]
}

/// Maps, explains, reads and plans a chain that could be opened.
fn use_chain(chain: &Chain) {
    for part in parts(chain) {
        map(chain, part);
        read(chain, part);
    }
    if chain.virtual_size().get() <= PLANNED {
        plan(chain);
    }
}

/// A map's extents lie one after the other from the start of the range to its end, strictly
/// read or past damage; where the strict one comes through, both are the same.
fn map(chain: &Chain, range: GuestRange) {
    let mut strict = Vec::new();
    let outcome = chain.for_each_extent(range, HoleQuery::Deep, &mut |extent| {
        strict.push(*extent);
        Ok(())
    });
    let mut past_damage = Vec::new();
    let damage = chain
        .for_each_extent_past_damage(range, HoleQuery::Deep, &mut |extent| {
            past_damage.push(*extent);
            Ok(())
        })
        .expect("nothing but damage is in memory");
    let mut at = range.start;
    for extent in &past_damage {
        assert_eq!(extent.start, at, "a gap or an overlap");
        assert!(!extent.length.is_zero(), "an empty extent");
        at = extent.end();
    }
    assert_eq!(at, range.end, "the map does not end where the range does");
    let damaged =
        past_damage.iter().any(|extent| matches!(extent.mapping, Mapping::Damaged { .. }));
    assert_eq!(damaged, outcome.is_err(), "{outcome:?} and {damage:?}");
    assert_eq!(damaged, !damage.is_empty(), "{damage:?}");
    if outcome.is_ok() {
        assert_eq!(strict.len(), past_damage.len());
    }
    for extent in past_damage.iter().take(4) {
        let _ = explain(chain, extent.start);
    }
}

/// What can be read at all is the same in pieces and in one sweep.
fn read(chain: &Chain, range: GuestRange) {
    let ciphers = Ciphers::new();
    let mut reader = ChainReader::new(chain, &ciphers);
    let end = range.start.saturating_add(ByteLen::new(64 << 10)).min(range.end);
    let mut at = range.start;
    let mut piece = [0; 1000];
    while at < end {
        let length = (piece.len() as u64).min(end.since(at).get());
        let length = usize::try_from(length).expect("it is 1000 at most");
        let _ = reader.read_at(at, &mut piece[..length]);
        at = at.saturating_add(ByteLen::new(length as u64));
    }
    let mut at = range.start;
    let swept = chain.for_each_chunk(&ciphers, range, |chunk, _| {
        assert_eq!(chunk.start, at, "a gap or an overlap");
        at = chunk.end;
        Ok(())
    });
    if swept.is_ok() {
        assert_eq!(at, range.end, "not all was read");
    }
}

/// The segments of each planned table lie one after the other, as long as the table is.
fn plan(chain: &Chain) {
    let options = PlanOptions { max_segments: 64, ..PlanOptions::default() };
    let Ok(plan) = Plan::new(chain, options) else { return };
    if !plan.obstacles().is_empty() {
        return;
    }
    for (number, table) in (0..).zip(plan.tables()) {
        let mut at = 0;
        plan.for_each_segment(TableId(number), &mut |segment| {
            assert_eq!(segment.start.get(), at, "a gap or an overlap");
            assert_ne!(segment.length.get(), 0, "an empty segment");
            at = segment.start.get() + segment.length.get();
            Ok(())
        })
        .expect("what could be planned has segments");
        assert_eq!(at, table.size.get(), "the table does not end where the device does");
    }
}

fn one_image(format: Format, bytes: &[u8]) {
    for past_damage in [false, true] {
        let Ok(layer) = layer(format, bytes, past_damage) else { continue };
        let _ = (layer.image.notices(), layer.image.crypt_header(), layer.image.data_file());
        let mut steps = Vec::new();
        layer.image.trace(GuestOffset::ZERO, &mut steps);
        use_chain(&Chain::new(vec![layer]).expect("it has a layer"));
    }
}

/// qcow2: open, map, read, plan.
pub fn qcow2(bytes: &[u8]) {
    one_image(Format::Qcow2, bytes);
}

/// qcow: open, map, read, plan.
pub fn qcow(bytes: &[u8]) {
    one_image(Format::Qcow, bytes);
}

/// cow: open, map, read, plan.
pub fn cow(bytes: &[u8]) {
    one_image(Format::Cow, bytes);
}

/// What a qcow2 file has besides its disk: header extensions, internal snapshots, each as a
/// disk of its own, and persistent dirty bitmaps.
pub fn qcow2_tables(bytes: &[u8]) {
    let source = source(bytes);
    let snapshots = read_snapshots(&source).unwrap_or_default();
    for snapshot in snapshots.iter().take(4) {
        let selector = SnapshotSelector::IdOrName(snapshot.id.clone());
        for past_damage in [false, true] {
            let open = if past_damage { Qcow2Image::open_past_damage } else { Qcow2Image::open };
            let Ok(image) = open(Arc::clone(&source), Some(&selector), true) else { continue };
            let (source, image) = (Arc::clone(&source), Box::new(image));
            let layer = Layer { image, source, data_file: None, declared_format: None };
            let chain = Chain::new(vec![layer]).expect("it has a layer");
            parts(&chain).into_iter().for_each(|part| map(&chain, part));
        }
    }
    let Ok(image) = Qcow2Image::open_past_damage(Arc::clone(&source), None, true) else { return };
    let _ = (image.extensions(), image.backing());
    let disk = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(image.virtual_size().get()));
    for bitmap in image.bitmaps().unwrap_or_default().iter().take(4) {
        let mut at = disk.start;
        let mut before = None;
        let walked =
            for_each_dirty_run(&source, image.header(), bitmap, disk, &mut |run, dirty| {
                assert_eq!(run.start, at, "a gap or an overlap");
                assert_ne!(before, Some(dirty), "neighbours that do not differ");
                (at, before) = (run.end, Some(dirty));
                Ok(())
            });
        if walked.is_ok() {
            assert_eq!(at, disk.end, "not all of the disk");
        }
    }
}

/// Two images, one the backing file of the other: the first two bytes are the length of the
/// upper one. The formats are probed, so raw is among them.
pub fn chain(bytes: &[u8]) {
    let Some((length, rest)) = bytes.split_first_chunk() else { return };
    let middle = usize::from(u16::from_le_bytes(*length)).min(rest.len());
    let (upper, lower) = rest.split_at(middle);
    let opened = |past_damage| {
        let layers = [upper, lower].map(|part| layer(Format::probe(part), part, past_damage));
        layers.into_iter().collect::<Result<Vec<_>>>()
    };
    for past_damage in [false, true] {
        let Ok(layers) = opened(past_damage) else { continue };
        let chain = Chain::new(layers).expect("it has layers");
        use_chain(&chain);
        let base = chain.base(1).expect("it has two layers");
        if chain.virtual_size().get().max(base.virtual_size().get()) <= 2 * LOOKED_AT {
            let comparison = imgdm::diff::Comparison::with_base(&chain, &base, 1);
            let _ = comparison.for_each_mapping(|_| Ok(()), |_| Ok(()));
            let _ = comparison.for_each_content(&Ciphers::new(), |_| Ok(()), |_| Ok(()));
        }
        let length = chain.layers()[0].source.length().get();
        let offset = HostOffset::new(length / 2);
        let _ = explain_reverse(&chain, 0, FileRole::Image, offset);
    }
}

/// Checking any format. What is told of does not depend on how much is asked for.
pub fn check(bytes: &[u8]) {
    let (source, format) = (source(bytes), Format::probe(bytes));
    let check = |findings_of_a_kind| {
        let mut told = 0u64;
        let options = Options { findings_of_a_kind };
        let report = imgdm::check::check(&source, format, options, &mut |finding| {
            let _ = format!("{finding:?}");
            told += 1;
        });
        report.ok().map(|report| (report, told))
    };
    let (few, all) = (check(Some(10)), check(None));
    match (&few, &all) {
        (Some((few, of_few)), Some((all, of_all))) => {
            assert_eq!(few.numbers, all.numbers);
            assert_eq!(few.counts, all.counts);
            assert!(of_few <= of_all, "{of_few} told of {of_all}");
        }
        (None, None) => {}
        _ => panic!("one check came through and one did not: {few:?} {all:?}"),
    }
}

/// Where every piece of the metadata of any format lies. The ranges cover the file.
pub fn metadata(bytes: &[u8]) {
    let source = source(bytes);
    let Ok(metadata) = Metadata::read(Arc::clone(&source), Format::probe(bytes)) else { return };
    let mut last = None;
    for piece in metadata.sorted_pieces().take(100_000) {
        assert!(last.is_none_or(|last| last <= piece.offset), "not in order");
        last = Some(piece.offset);
    }
    let walk = metadata.walk();
    let _ = (walk.counts(), walk.problems().iter().count(), walk.refcount_problems().omitted());
    let mut at = HostOffset::ZERO;
    for range in walk.ranges() {
        assert_eq!(range.offset, at, "a gap or an overlap");
        assert!(!range.length.is_zero(), "an empty range");
        at = at.saturating_add(range.length);
    }
    assert_eq!(at.get(), source.length().get(), "not all of the file");
    for offset in [0, bytes.len() as u64 / 3, bytes.len() as u64 / 2] {
        let place = imgdm::status::HostPlace::in_image(HostOffset::new(offset));
        let _ = metadata.pieces_at(place);
    }
}
