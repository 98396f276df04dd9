//! The fold against a model that asks the layers sector by sector.

use proptest::prelude::*;

use super::windows::RUNS_PER_WINDOW;
use super::*;
use crate::extent::{Mapping, ZeroCause};
use crate::format::PlainClusters;
use crate::status::{Encryption, HostPlace};
use crate::units::{HostOffset, SECTOR_SIZE};

/// What one sector of a synthetic layer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sector {
    Unallocated,
    Zero,
    /// Data at this sector of the layer's file.
    Data(u64),
    /// The same, under legacy AES.
    Encrypted(u64),
    /// A compressed cluster of one sector, whose stream is the first sector of the file.
    Compressed,
}

/// A layer made of sectors.
#[derive(Debug)]
pub(crate) struct Synthetic(pub(crate) Vec<Sector>);

impl ImageFormat for Synthetic {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> ByteLen {
        ByteLen::new(self.0.len() as u64 * SECTOR_SIZE)
    }

    fn granularity(&self) -> u64 {
        SECTOR_SIZE
    }

    fn compression(&self) -> Option<crate::format::qcow2::Compression> {
        Some(crate::format::qcow2::Compression::Zlib)
    }

    fn crypt_header(&self) -> Result<Option<crate::crypt::CryptHeader>> {
        Ok(Some(crate::crypt::CryptHeader::Aes))
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        let in_plain = self.put_plain(range, &mut scratch.plain);
        for (index, sector) in self.0.iter().enumerate().skip(in_plain) {
            let place = |at: u64| HostPlace::in_image(HostOffset::new(at * SECTOR_SIZE));
            let status = match *sector {
                Sector::Unallocated => BlockStatus::Unallocated(None),
                Sector::Zero => BlockStatus::Zero(ZeroStatus::Plain),
                Sector::Data(at) => BlockStatus::Data(place(at)),
                Sector::Encrypted(at) => {
                    BlockStatus::Encrypted { place: place(at), cipher: Encryption::Aes }
                }
                Sector::Compressed => BlockStatus::Compressed {
                    host: HostOffset::ZERO,
                    stream_length: ByteLen::new(SECTOR_SIZE),
                    cluster: GuestOffset::new(index as u64 * SECTOR_SIZE),
                },
            };
            let run = StatusRun {
                start: GuestOffset::new(index as u64 * SECTOR_SIZE),
                length: ByteLen::new(SECTOR_SIZE),
                status,
            };
            runs.extend(run.clipped(range));
        }
        Ok(())
    }
}

impl Synthetic {
    /// Puts the data at the start of `range` where plain clusters go, if anywhere; gives back the
    /// first sector that is not there.
    fn put_plain(&self, range: GuestRange, plain: &mut PlainClusters) -> usize {
        let first = usize::try_from(range.start.get() / SECTOR_SIZE).unwrap();
        let end = usize::try_from(range.end.get().div_ceil(SECTOR_SIZE)).unwrap();
        let sectors = &self.0[..end.min(self.0.len())];
        let data = sectors.get(first..).unwrap_or(&[]).iter().map_while(|sector| match *sector {
            Sector::Data(at) => Some((at * SECTOR_SIZE).to_be_bytes()),
            _ => None,
        });
        let entries: Vec<_> = data.collect();
        if !plain.is_wanted() || entries.is_empty() {
            return 0;
        }
        let rest = first + entries.len();
        let end = GuestOffset::new(rest as u64 * SECTOR_SIZE).min(range.end);
        assert!(plain.push_all(9, GuestRange::new(range.start, end), &entries, |at| (at, 0)));
        rest
    }
}

pub(crate) const FILE_SECTORS: u64 = 64;

pub(crate) fn chain_of(layers: Vec<Vec<Sector>>) -> Chain {
    let zeros = vec![0; usize::try_from(FILE_SECTORS * SECTOR_SIZE).unwrap()];
    chain_over(layers, |_| zeros.clone())
}

/// A chain whose layers' files hold what `file` gives for each depth.
pub(crate) fn chain_over(layers: Vec<Vec<Sector>>, file: impl Fn(usize) -> Vec<u8>) -> Chain {
    let source = |depth| Arc::new(Source::from_bytes(format!("layer{depth}"), file(depth)));
    let sources: Vec<_> = (0..layers.len()).map(source).collect();
    chain_on(layers, &sources)
}

/// A chain whose layers' files are these.
pub(crate) fn chain_on(layers: Vec<Vec<Sector>>, files: &[Arc<Source>]) -> Chain {
    let layer = |(sectors, source): (_, &Arc<Source>)| Layer {
        image: Box::new(Synthetic(sectors)),
        source: Arc::clone(source),
        data_file: None,
        declared_format: None,
    };
    Chain::new(layers.into_iter().zip(files).map(layer).collect()).unwrap()
}

fn sector() -> impl Strategy<Value = Sector> {
    prop_oneof![
        4 => Just(Sector::Unallocated),
        1 => Just(Sector::Zero),
        4 => (0..FILE_SECTORS).prop_map(Sector::Data),
        1 => (0..FILE_SECTORS).prop_map(Sector::Encrypted),
        1 => Just(Sector::Compressed),
    ]
}

/// Layers of runs, so that there is something to join.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Vec<Sector>>> {
    let run = (sector(), 1..6u64).prop_map(|(sector, length)| {
        let step = |i| match sector {
            Sector::Data(at) if at + length <= FILE_SECTORS => Sector::Data(at + i),
            Sector::Encrypted(at) if at + length <= FILE_SECTORS => Sector::Encrypted(at + i),
            other => other,
        };
        (0..length).map(step).collect::<Vec<_>>()
    });
    let layer = prop::collection::vec(run, 1..12).prop_map(|runs| runs.concat());
    prop::collection::vec(layer, 1..6)
}

/// Which layer answers for a sector, and how, by asking each in turn.
pub(crate) fn model(layers: &[Vec<Sector>], sector: usize) -> (u32, Sector) {
    for (depth, layer) in (0..).zip(layers) {
        match layer.get(sector) {
            Some(Sector::Unallocated) => {}
            Some(&found) => return (depth, found),
            // Past the end of a backing file: zeros, on its overlay's account.
            None => return (depth - 1, Sector::Unallocated),
        }
    }
    (u32::try_from(layers.len()).unwrap() - 1, Sector::Unallocated)
}

fn extents(chain: &Chain, range: GuestRange) -> Vec<Extent> {
    let mut out = Vec::new();
    chain
        .for_each_extent(range, HoleQuery::AsQemu, &mut |extent| {
            out.push(*extent);
            Ok(())
        })
        .unwrap();
    out
}

proptest! {
    #[test]
    fn folding_agrees_with_asking_sector_by_sector(layers in layers(), from in 0..20u64) {
        let chain = chain_of(layers.clone());
        let whole = chain.whole();
        let range = GuestRange::new(GuestOffset::new(from * SECTOR_SIZE), whole.end);
        let mut at = range.start;
        let rows = extents(&chain, range);
        for extent in &rows {
            prop_assert_eq!(extent.start, at, "gapless and in order");
            prop_assert!(!extent.length.is_zero());
            for index in 0..extent.length.get() / SECTOR_SIZE {
                let sector = usize::try_from(extent.start.get() / SECTOR_SIZE + index).unwrap();
                let (depth, expected) = model(&layers, sector);
                prop_assert_eq!(extent.depth, depth);
                let got = match extent.mapping {
                    Mapping::Data(place) => Sector::Data(place.offset.get() / SECTOR_SIZE + index),
                    Mapping::Zero(ZeroCause::Layer(_)) => Sector::Zero,
                    Mapping::Zero(_) => Sector::Unallocated,
                    Mapping::Encrypted { place, .. } => {
                        Sector::Encrypted(place.offset.get() / SECTOR_SIZE + index)
                    }
                    Mapping::Compressed { .. } => Sector::Compressed,
                    damaged @ Mapping::Damaged { .. } => panic!("{damaged:?}"),
                };
                prop_assert_eq!(got, expected);
            }
            at = extent.end();
        }
        prop_assert_eq!(at, range.end.max(range.start));
        for pair in rows.windows(2) {
            prop_assert!(!pair[0].clone().absorb(&pair[1]), "neighbours are joined");
        }
    }

    #[test]
    fn windows_cover_the_range_in_order(from in 0..1u64 << 34, length in 0..1u64 << 34) {
        let chain = chain_of(vec![vec![Sector::Zero]]);
        let range = GuestRange::new(GuestOffset::new(from), GuestOffset::new(from + length));
        let mut at = range.start;
        for window in chain.windows(range, HoleQuery::AsQemu) {
            prop_assert_eq!(window.start, at);
            prop_assert!(!window.is_empty());
            at = window.end;
        }
        prop_assert_eq!(at, range.end);
    }
}

#[test]
fn a_thousand_empty_layers_leave_the_last_ones_rows() {
    let mut layers = vec![vec![Sector::Unallocated; 8]; 1000];
    layers.push(vec![Sector::Data(3); 8]);
    let chain = chain_of(layers);
    let rows = extents(&chain, chain.whole());
    assert_eq!(rows.len(), 8, "the same sector eight times is no run");
    assert!(rows.iter().all(|row| row.depth == 1000));
}

#[test]
fn windows_come_back_in_order_and_the_first_error_stops_them() {
    let chain = chain_of(vec![vec![Sector::Zero; 8]]);
    let huge = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(1 << 32));
    let mut starts = Vec::new();
    let outcome = chain.map_windows(
        huge,
        HoleQuery::AsQemu,
        |window, _| window.start,
        |start| {
            starts.push(start);
            if starts.len() == 100 { Err(Error::invalid("enough")) } else { Ok(()) }
        },
    );
    assert!(outcome.is_err());
    assert_eq!(starts.len(), 100);
    assert!(starts.is_sorted());
}

/// A disk of 4 MiB, of which a stretch in the middle is damaged.
#[derive(Debug)]
struct Torn;

const TORN: (u64, u64) = (512 << 10, 3 << 20);

impl ImageFormat for Torn {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> ByteLen {
        ByteLen::new(4 << 20)
    }

    fn granularity(&self) -> u64 {
        SECTOR_SIZE
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        let torn = GuestRange::new(GuestOffset::new(TORN.0), GuestOffset::new(TORN.1));
        let before = GuestRange::new(range.start, range.end.min(torn.start));
        let after = GuestRange::new(range.start.max(torn.end), range.end);
        let run = |part: GuestRange, status| StatusRun {
            start: part.start,
            length: part.length(),
            status,
        };
        let zero = BlockStatus::Zero(ZeroStatus::Plain);
        if !before.is_empty() {
            runs.push(run(before, zero));
        }
        let part = torn.intersection(range);
        if !part.is_empty() {
            let error = Error::invalid("torn").at_offset(7);
            runs.push(run(part, crate::damage::spoil(&mut scratch.damage, torn, error)?));
        }
        if !after.is_empty() {
            runs.push(run(after, zero));
        }
        Ok(())
    }
}

fn layer(image: Box<dyn ImageFormat>, name: &str) -> Layer {
    Layer {
        image,
        source: Arc::new(Source::from_bytes(name, vec![0; 1 << 20])),
        data_file: None,
        declared_format: None,
    }
}

fn torn_below(overlay: Vec<Sector>) -> Chain {
    let layers =
        vec![layer(Box::new(Synthetic(overlay)), "top"), layer(Box::new(Torn), "torn.qcow2")];
    Chain::new(layers).unwrap()
}

/// A chain with no encrypted layer, whose damage ends every walk.
pub(crate) fn torn() -> Chain {
    Chain::new(vec![layer(Box::new(Torn), "torn.qcow2")]).unwrap()
}

#[test]
fn damage_is_one_extent_and_counts_once_however_many_windows_see_it() {
    let mut overlay = vec![Sector::Unallocated; (4 << 20) / 512];
    let seen_over = 2 << 20 >> 9;
    overlay[seen_over] = Sector::Data(3);
    let chain = torn_below(overlay);
    assert_eq!(chain.windows(chain.whole(), HoleQuery::AsQemu).count(), 2);
    let mut extents = Vec::new();
    let found = chain
        .for_each_extent_past_damage(chain.whole(), HoleQuery::AsQemu, &mut |extent| {
            extents.push((extent.start.get(), extent.depth, extent.mapping));
            Ok(())
        })
        .unwrap();
    let damaged = Mapping::Damaged { from: GuestOffset::new(TORN.0) };
    let zero = Mapping::Zero(ZeroCause::Layer(ZeroStatus::Plain));
    let data = Mapping::Data(HostPlace::in_image(HostOffset::new(3 * 512)));
    assert_eq!(
        extents,
        [
            (0, 1, zero),
            (TORN.0, 1, damaged),
            (2 << 20, 0, data),
            ((2 << 20) + 512, 1, damaged),
            (TORN.1, 1, zero),
        ]
    );
    assert_eq!(found.count(), 1);
    assert_eq!(found.listed()[0].depth, 1);
    assert_eq!(found.listed()[0].range.start.get(), TORN.0);
    let by_window = chain
        .map_windows_past_damage(chain.whole(), HoleQuery::AsQemu, |_, _| (), |()| Ok(()))
        .unwrap();
    assert_eq!(by_window.count(), 1);
    let in_file_order = chain
        .map_windows_in_file_order(chain.whole(), HoleQuery::AsQemu, |_, _| (), |()| Ok(()))
        .unwrap();
    assert_eq!(in_file_order.count(), 1);
    assert_eq!(in_file_order.listed()[0].range.start.get(), TORN.0);
    // Who hands the bytes on gets an error.
    let mut each = |_: &Extent| Ok(());
    let error = chain.for_each_extent(chain.whole(), HoleQuery::AsQemu, &mut each).unwrap_err();
    assert_eq!(error.to_string(), "torn.qcow2: at offset 0x7: torn");
    let layer = &chain.layers()[1];
    assert!(layer.damage_at(GuestOffset::new(TORN.0)).is_some());
    assert!(layer.damage_at(GuestOffset::new(TORN.1)).is_none());
}

#[test]
fn a_base_is_asked_for_its_own_layers() {
    let chain = chain_of(vec![vec![Sector::Zero; 8], vec![Sector::Data(3); 8]]);
    let base = chain.base(1).unwrap();
    let mut resolver = base.resolver(HoleQuery::AsQemu);
    let place = HostPlace::in_image(HostOffset::new(3 * SECTOR_SIZE));
    let runs = resolver.layer_runs(0, base.whole()).unwrap();
    assert_eq!(runs[0].status, BlockStatus::Data(place));
    assert!(resolver.layer_runs(1, base.whole()).is_err());
}

/// A disk of clusters of 2 MiB, all data.
#[derive(Debug)]
struct LargeClusters {
    looks_preallocated: bool,
}

impl ImageFormat for LargeClusters {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> ByteLen {
        ByteLen::new(1 << 40)
    }

    fn granularity(&self) -> u64 {
        2 << 20
    }

    fn looks_preallocated(&self) -> bool {
        self.looks_preallocated
    }

    fn status(&self, range: GuestRange, _: &mut Scratch, runs: &mut Vec<StatusRun>) -> Result<()> {
        let place = HostPlace::in_image(HostOffset::new(range.start.get()));
        let status = BlockStatus::Data(place);
        runs.push(StatusRun { start: range.start, length: range.length(), status });
        Ok(())
    }
}

#[test]
fn windows_are_small_where_holes_split_the_runs_of_large_clusters() {
    use HoleQuery::{AsQemu, DataFiles, Deep};
    for (looks_preallocated, has_data_file, holes, size) in [
        (false, false, AsQemu, 4u64 << 30),
        (false, false, DataFiles, 4 << 30),
        (false, false, Deep, 256 << 20),
        (true, false, AsQemu, 256 << 20),
        (true, false, DataFiles, 256 << 20),
        (false, true, AsQemu, 4 << 30),
        (false, true, DataFiles, 256 << 20),
        (false, true, Deep, 256 << 20),
    ] {
        let mut layer = layer(Box::new(LargeClusters { looks_preallocated }), "large.qcow2");
        layer.data_file = has_data_file.then(|| Arc::clone(&layer.source));
        let granularity = layer.granularity(holes);
        let chain = Chain::new(vec![layer]).unwrap();
        let mut windows = chain.windows(chain.whole(), holes);
        assert_eq!(windows.next().unwrap().length().get(), size, "{holes:?}");
        assert_eq!(size, granularity.saturating_mul(RUNS_PER_WINDOW).min(4 << 30));
    }
}

/// A qcow2 image of 512-byte clusters with three L2 tables of 64 entries: data of the image
/// file, shuffled but for pairs, where `entry` does not say otherwise. The last of the tables
/// may lie somewhere else.
fn three_tables(last_table: Option<u64>, entry: impl Fn(u64) -> Option<u64>) -> Chain {
    const CLUSTER: u64 = 512;
    let mut image = crate::format::qcow2::tests::Builder::new(6);
    image.u32(20, 9).u64(24, 192 * CLUSTER).u32(36, 3);
    let (l1, l2, data) = (2 << 16, 3 << 16, 4 << 16);
    for table in 0..3 {
        image.u64(l1 + table * 8, l2 + table * CLUSTER);
    }
    if let Some(at) = last_table {
        image.u64(l1 + 16, at);
    }
    for cluster in 0..192u64 {
        let shuffled = (cluster / 2 * 37 % 96) * 2 + cluster % 2;
        image.u64(l2 + cluster * 8, entry(cluster).unwrap_or(data + shuffled * CLUSTER));
    }
    let source = Arc::new(Source::from_bytes("x.qcow2", image.bytes));
    let image = crate::format::qcow2::Qcow2Image::open(Arc::clone(&source), None, false).unwrap();
    let layer = Layer { image: Box::new(image), source, data_file: None, declared_format: None };
    Chain::new(vec![layer]).unwrap()
}

#[test]
fn clusters_that_are_only_data_resolve_as_their_runs() {
    let range = |start: u64, end: u64| {
        GuestRange::new(GuestOffset::new(start * 256), GuestOffset::new(end * 256))
    };
    let kinds = [
        ("data alone", three_tables(None, |_| None)),
        ("one of zeros", three_tables(None, |cluster| (cluster == 100).then_some(1))),
        ("an empty table", three_tables(None, |c| (64..128).contains(&c).then_some(0))),
        ("nothing at the end", three_tables(None, |cluster| (cluster == 191).then_some(0))),
        ("a table outside of the file", three_tables(Some(1 << 40), |_| None)),
    ];
    for (kind, chain) in kinds {
        let mut resolver = chain.resolver_past_damage(HoleQuery::AsQemu);
        let mut plain = 0;
        for start in (0..384).step_by(5) {
            for end in (start + 1..=384).step_by(7) {
                let window = range(start, end);
                let mut coalescer = Coalescer::default();
                let runs = resolver.layer_runs(0, window).unwrap();
                let pushed = runs.iter().filter_map(|run| coalescer.push(last_answer(run, 0)));
                let mut wanted: Vec<_> = pushed.collect();
                wanted.extend(coalescer.finish());
                let by_layer = resolver.take_damage().count();
                let extents = resolver.resolve(window).unwrap();
                plain += u32::from(matches!(extents, Extents::Plain { .. }));
                let mut coalescer = Coalescer::default();
                let mut got: Vec<_> = extents.filter_map(|e| coalescer.push(e)).collect();
                got.extend(coalescer.finish());
                assert_eq!(got, wanted, "{kind} {window:?}");
                let is_damaged = got.iter().any(|e| matches!(e.mapping, Mapping::Damaged { .. }));
                let found = [by_layer, resolver.take_damage().count()];
                assert_eq!(found, [u64::from(is_damaged); 2], "{kind} {window:?}");
            }
        }
        assert!(plain > 100, "{kind}: {plain}");
    }
}
