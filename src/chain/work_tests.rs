//! How much work a walk over a chain is: counted, never timed.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::windows::WINDOWS_IN_FILE_ORDER;
use super::*;
use crate::format::qcow2::Qcow2Image;
use crate::source::{Allocation, ReadAt};
use crate::units::HostOffset;

const GIB: u64 = 1 << 30;

/// What was done to a chain.
#[derive(Debug, Default)]
struct Work {
    reads: AtomicU64,
    /// Where they started.
    offsets: Mutex<Vec<u64>>,
    bytes: AtomicU64,
    /// Times that a layer was asked for a range.
    asked: AtomicU64,
    /// Times that one was looked at, whether it has anything somewhere.
    looked_at: AtomicU64,
}

impl Work {
    fn take(counter: &AtomicU64) -> u64 {
        counter.swap(0, Ordering::Relaxed)
    }
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// A file of which only some clusters are not zero.
#[derive(Debug)]
struct Sparse {
    cluster: u64,
    clusters: BTreeMap<u64, Vec<u8>>,
    work: Arc<Work>,
}

impl ReadAt for Sparse {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        count(&self.work.reads, 1);
        self.work.offsets.lock().unwrap().push(offset);
        count(&self.work.bytes, buffer.len() as u64);
        let mut rest = &mut *buffer;
        let mut at = offset;
        while !rest.is_empty() {
            let in_cluster = usize::try_from(at % self.cluster).unwrap();
            let length = rest.len().min(usize::try_from(self.cluster).unwrap() - in_cluster);
            let part;
            (part, rest) = rest.split_at_mut(length);
            match self.clusters.get(&(at / self.cluster)) {
                Some(bytes) => part.copy_from_slice(&bytes[in_cluster..in_cluster + length]),
                None => part.fill(0),
            }
            at += length as u64;
        }
        Ok(buffer.len())
    }

    fn allocation(&self, _: HostOffset) -> io::Result<Allocation> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An image that counts how often it is asked.
#[derive(Debug)]
struct Counted(Qcow2Image, Arc<Work>);

impl ImageFormat for Counted {
    fn format(&self) -> Format {
        self.0.format()
    }

    fn virtual_size(&self) -> ByteLen {
        self.0.virtual_size()
    }

    fn granularity(&self) -> u64 {
        self.0.granularity()
    }

    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()> {
        count(&self.1.asked, 1);
        self.0.status(range, scratch, runs)
    }

    fn unallocated_until(&self, from: GuestOffset) -> GuestOffset {
        count(&self.1.looked_at, 1);
        self.0.unallocated_until(from)
    }

    fn page_coverage(&self) -> u64 {
        self.0.page_coverage()
    }

    fn tables(&self, range: GuestRange, each: &mut dyn FnMut(HostOffset, HostOffset)) {
        self.0.tables(range, each);
    }
}

/// A layer of `size` bytes in which these clusters are data, those of a table one after the
/// other, and the tables lie in the order in which their clusters come.
fn layer(cluster: u64, size: u64, allocated: &[u64], work: &Arc<Work>) -> Layer {
    damaged_layer(cluster, size, allocated, None, work)
}

/// The same, with one cluster, of large ones, whose entry no cluster can have.
fn damaged_layer(
    cluster: u64,
    size: u64,
    allocated: &[u64],
    damaged: Option<u64>,
    work: &Arc<Work>,
) -> Layer {
    let entries = cluster / 8;
    let coverage = entries * cluster;
    let l1_bytes = size.div_ceil(coverage) * 8;
    let mut file: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    let mut put = |at: u64, bytes: &[u8]| {
        let of_cluster =
            file.entry(at / cluster).or_insert_with(|| vec![0; usize::try_from(cluster).unwrap()]);
        let start = usize::try_from(at % cluster).unwrap();
        of_cluster[start..start + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"QFI\xfb\0\0\0\x03");
    put(20, &cluster.trailing_zeros().to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &u32::try_from(l1_bytes / 8).unwrap().to_be_bytes());
    let l1 = 2 * cluster;
    put(40, &l1.to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    let mut next = l1 + l1_bytes.next_multiple_of(cluster);
    for of_table in allocated.chunk_by(|a, b| a / entries == b / entries) {
        let table = next;
        next += cluster;
        put(l1 + of_table[0] / entries * 8, &(table | 1 << 63).to_be_bytes());
        for guest in of_table {
            let off = if Some(*guest) == damaged { 512 } else { 0 };
            put(table + guest % entries * 8, &((next + off) | 1 << 63).to_be_bytes());
            next += cluster;
        }
    }
    let reader = Sparse { cluster, clusters: file, work: Arc::clone(work) };
    let source = Source::from_reader("layer", ByteLen::new(next), Box::new(reader));
    let source = Arc::new(source);
    let image = Qcow2Image::open(Arc::clone(&source), None, false).unwrap();
    let image = Box::new(Counted(image, Arc::clone(work)));
    Layer { image, source, data_file: None, declared_format: None }
}

fn walk(chain: &Chain) -> Vec<Extent> {
    let mut extents = Vec::new();
    let each = &mut |extent: &Extent| {
        extents.push(*extent);
        Ok(())
    };
    chain.for_each_extent(chain.whole(), HoleQuery::AsQemu, each).unwrap();
    extents
}

const CLUSTER: u64 = 64 << 10;
const PER_TABLE: u64 = CLUSTER / 8;

/// So many layers of 64 GiB, each with so many clusters, no two of which are in one table
/// or in the same place of the disk.
fn scattered(layers: u64, clusters: u64, work: &Arc<Work>) -> Chain {
    let tables = 64 * GIB / (PER_TABLE * CLUSTER);
    let clusters_of = |layer: u64| {
        let mut clusters: Vec<_> = (layer * clusters..(layer + 1) * clusters)
            .map(|number| number % tables * PER_TABLE + number / tables * 3)
            .collect();
        clusters.sort_unstable();
        clusters
    };
    Chain::new((0..layers).map(|at| layer(CLUSTER, 64 * GIB, &clusters_of(at), work)).collect())
        .unwrap()
}

#[test]
fn the_same_metadata_in_four_times_the_layers_is_the_same_work() {
    let done = |layers: u64| {
        let work = Arc::new(Work::default());
        let chain = scattered(layers, 2000 / layers, &work);
        let opened = Work::take(&work.bytes);
        // The header, no extensions, and the L1 table.
        assert!(opened <= layers * (2 * CLUSTER), "{opened}");
        Work::take(&work.reads);
        let extents = walk(&chain);
        assert_eq!(extents.iter().filter(|extent| !extent.mapping.is_zero()).count(), 2000);
        let [reads, bytes, asked, looked_at] =
            [&work.reads, &work.bytes, &work.asked, &work.looked_at].map(Work::take);
        assert!(bytes <= 2000 * CLUSTER, "each table is read once: {bytes}");
        (reads, asked, looked_at)
    };
    let (reads, asked, looked_at) = done(250);
    let (more_reads, more_asked, more_looked_at) = done(1000);
    assert!(more_reads <= reads + reads / 10, "{reads} reads, then {more_reads}");
    assert!(more_asked <= asked + asked / 2, "asked {asked} times, then {more_asked}");
    // That grows with the L1 tables, of which there are four times as many.
    assert!(more_looked_at <= 5 * looked_at, "looked {looked_at} times, then {more_looked_at}");
    assert!(more_looked_at <= 1000 * 128, "fewer times than there are L1 entries");
}

#[test]
fn layers_without_clusters_are_not_asked_in_each_window() {
    let work = Arc::new(Work::default());
    // Small clusters make small windows, of all layers.
    let mut layers = vec![layer(512, 4 * GIB, &[7], &work)];
    layers.extend((0..500).map(|_| layer(CLUSTER, 4 * GIB, &[], &work)));
    let chain = Chain::new(layers).unwrap();
    let windows = chain.windows(chain.whole(), HoleQuery::AsQemu).count() as u64;
    assert_eq!(windows, 2048);
    for counter in [&work.reads, &work.asked, &work.looked_at] {
        Work::take(counter);
    }
    assert_eq!(walk(&chain).len(), 3);
    assert_eq!(Work::take(&work.reads), 1);
    let asked = Work::take(&work.asked);
    assert!(asked <= 2 * windows, "{asked}");
    let looked_at = Work::take(&work.looked_at);
    assert!(looked_at <= 501 * windows / 8, "{looked_at}");
}

#[test]
fn tables_that_upper_layers_hide_are_not_read() {
    let all: Vec<_> = (0..PER_TABLE).collect();
    let size = PER_TABLE * CLUSTER;
    let below = |top: &[u64]| {
        let above = Arc::new(Work::default());
        let work = Arc::new(Work::default());
        let layers = vec![layer(CLUSTER, size, top, &above), layer(CLUSTER, size, &all, &work)];
        let chain = Chain::new(layers).unwrap();
        Work::take(&work.bytes);
        let extents = walk(&chain);
        (Work::take(&work.bytes), extents.last().unwrap().end().get())
    };
    assert_eq!(below(&all), (0, size));
    // Only the first and the last cluster are the lower layer's.
    let (bytes, end) = below(&all[1..all.len() - 1]);
    assert_eq!((bytes, end), (16, size));
    // Short gaps are read through, long ones are not.
    let mut some = all.clone();
    some.retain(|cluster| !(100..110).contains(cluster) && !(120..130).contains(cluster));
    assert_eq!(below(&some), (30 * 8, size));
    assert_eq!(below(&[]), (PER_TABLE * 8, size));
}

#[test]
fn no_more_is_read_than_the_l1_tables_and_the_l2_tables_that_are_needed() {
    let work = Arc::new(Work::default());
    let chain = scattered(100, 20, &work);
    walk(&chain);
    let (l1, tables) = (100 * 128 * 8, 2000);
    let bytes = Work::take(&work.bytes);
    assert!(bytes <= l1 + tables * CLUSTER + 100 * CLUSTER, "{bytes}");
}

/// The windows as they are taken, which one thread resolves in file order, and their extents;
/// and the damage.
fn in_file_order(chain: &Chain) -> (Vec<(GuestRange, Vec<Extent>)>, DamageList) {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let mut taken = Vec::new();
        let work = |window, extents: Extents<'_>| (window, extents.collect());
        let take = |thing| {
            taken.push(thing);
            Ok(())
        };
        let holes = HoleQuery::AsQemu;
        let damage = chain.map_windows_in_file_order(chain.whole(), holes, work, take).unwrap();
        (taken, damage)
    })
}

/// Gives back where the tables were read of the layers of these, in the order of the reads.
fn assert_windows_in_guest_order(chain: &Chain, of: &[&Work]) -> Vec<Vec<u64>> {
    let offsets = |work: &Work| std::mem::take(&mut *work.offsets.lock().unwrap());
    of.iter().for_each(|work| drop(offsets(work)));
    let (taken, damage) = in_file_order(chain);
    let read = of.iter().map(|work| offsets(work)).collect();
    let windows: Vec<_> = chain.windows(chain.whole(), HoleQuery::AsQemu).collect();
    assert!(taken.iter().map(|(window, _)| *window).eq(windows));
    let mut joined = Vec::new();
    let mut coalescer = Coalescer::default();
    let extents = taken.iter().flat_map(|(_, extents)| extents);
    joined.extend(extents.filter_map(|extent| coalescer.push(*extent)));
    joined.extend(coalescer.finish());
    let mut in_guest_order = Vec::new();
    let each = &mut |extent: &Extent| {
        in_guest_order.push(*extent);
        Ok(())
    };
    let holes = HoleQuery::AsQemu;
    let found = chain.for_each_extent_past_damage(chain.whole(), holes, each).unwrap();
    assert_eq!(joined, in_guest_order);
    assert_eq!(damage.count(), found.count());
    let listed =
        |list: &DamageList| list.listed().iter().map(|each| each.range).collect::<Vec<_>>();
    assert_eq!(listed(&damage), listed(&found));
    read
}

/// The first cluster of each of so many tables, in an order in which they lie shuffled.
fn shuffled(tables: u64) -> Vec<u64> {
    (0..tables).map(|number| number * 37 % tables * PER_TABLE).collect()
}

#[test]
fn windows_are_read_in_the_order_of_their_tables_and_taken_in_the_guests() {
    let (above, work) = (Arc::new(Work::default()), Arc::new(Work::default()));
    let size = 64 * GIB;
    let layer_of = |allocated: &[u64], work| layer(CLUSTER, size, allocated, work);
    let mut layers: Vec<_> = (0..31).map(|_| layer_of(&[], &above)).collect();
    layers.push(layer_of(&shuffled(128), &work));
    let chain = Chain::new(layers).unwrap();
    let read = assert_windows_in_guest_order(&chain, &[&work]);
    // A table tells of two windows.
    assert_eq!(read[0].len(), 2 * 128);
    assert!(read[0].is_sorted(), "{read:?}");
}

#[test]
fn windows_of_many_layers_or_of_several_with_tables_are_read_in_guest_order() {
    let size = 64 * GIB;
    let (above, work) = (Arc::new(Work::default()), Arc::new(Work::default()));
    let layer_of = |allocated: &[u64], work| layer(CLUSTER, size, allocated, work);
    let mut layers: Vec<_> = (0..32).map(|_| layer_of(&[], &above)).collect();
    layers.push(layer_of(&shuffled(128), &work));
    let chain = Chain::new(layers).unwrap();
    above.looked_at.store(0, Ordering::Relaxed);
    let read = assert_windows_in_guest_order(&chain, &[&work]);
    assert!(!read[0].is_sorted());
    let looked_at = Work::take(&above.looked_at);
    assert!(looked_at <= 32 * 128, "{looked_at}");

    let in_order: Vec<_> = (0..128).map(|number| number * PER_TABLE).collect();
    let layers = vec![layer_of(&shuffled(128), &above), layer_of(&in_order, &work)];
    let read = assert_windows_in_guest_order(&Chain::new(layers).unwrap(), &[&above, &work]);
    assert!(!read[0].is_sorted());
    assert!(read[1].is_sorted() && read[1].len() >= 128, "{read:?}");
}

#[test]
fn more_windows_than_are_put_in_order_at_once_come_in_guest_order_too() {
    let work = Arc::new(Work::default());
    let some: Vec<_> = (0..600).map(|number| number * 7919 % 640 * (GIB / 32 / 512)).collect();
    let chain = Chain::new(vec![layer(512, 20 * GIB, &some, &work)]).unwrap();
    let windows = chain.windows(chain.whole(), HoleQuery::AsQemu).count();
    assert!(windows > 2 * WINDOWS_IN_FILE_ORDER, "{windows}");
    assert_windows_in_guest_order(&chain, &[]);
}

#[test]
fn windows_about_damage_are_taken_once_too_and_it_is_counted_once() {
    let (size, tables) = (3072 * GIB, 3072 * GIB / (PER_TABLE * CLUSTER));
    // In the second of three parts that are put in order each.
    let damaged = PER_TABLE * (tables / 2 + 1);
    let work = Arc::new(Work::default());
    let layer = damaged_layer(CLUSTER, size, &shuffled(tables), Some(damaged), &work);
    let chain = Chain::new(vec![layer]).unwrap();
    let windows = chain.windows(chain.whole(), HoleQuery::AsQemu).count();
    assert!(windows == 3 * WINDOWS_IN_FILE_ORDER, "{windows}");
    assert_windows_in_guest_order(&chain, &[]);
    let (_, damage) = in_file_order(&chain);
    assert_eq!(damage.count(), 1);
    assert_eq!(damage.listed()[0].range.start.get(), damaged * CLUSTER);
}
