#![allow(clippy::cast_possible_truncation)]

use std::cell::RefCell;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use flate2::write::DeflateEncoder;
use proptest::prelude::*;

use nix::libc;

use super::*;
use crate::chain::Layer;
use crate::error::ErrorKind;
use crate::format::qcow2::Compression;
use crate::format::{Format, ImageFormat, Scratch};
use crate::inflate::InflateFault;
use crate::scratch::{FailedWhy, Found, FoundKind};
use crate::source::Source;
use crate::status::{FileRole, StatusRun};
use crate::units::{GuestOffset, HostOffset};

pub(in crate::scratch) const CLUSTER: u64 = 64 << 10;

/// An image of which only the compressed clusters are looked at.
#[derive(Debug)]
pub(in crate::scratch) struct Clusters(pub(in crate::scratch) Compression);

impl ImageFormat for Clusters {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn virtual_size(&self) -> ByteLen {
        ByteLen::new(1 << 40)
    }

    fn granularity(&self) -> u64 {
        CLUSTER
    }

    fn compression(&self) -> Option<Compression> {
        Some(self.0)
    }

    fn status(&self, _: GuestRange, _: &mut Scratch, _: &mut Vec<StatusRun>) -> Result<()> {
        Ok(())
    }
}

fn chain(bytes: Vec<u8>) -> Chain {
    chain_over(Source::from_bytes("x.qcow2", bytes))
}

pub(in crate::scratch) fn chain_over(source: Source) -> Chain {
    let layer = Layer {
        image: Box::new(Clusters(Compression::Zlib)),
        source: Arc::new(source),
        data_file: None,
        declared_format: None,
    };
    Chain::new(vec![layer]).unwrap()
}

pub(in crate::scratch) struct Windows(pub(in crate::scratch) Vec<Vec<ScratchJob>>);

impl ScratchWork for Windows {
    fn scratch_bytes(&self) -> u64 {
        self.0.iter().flatten().map(|job| job.length).sum()
    }

    fn scratch_length(&self) -> u64 {
        self.0.iter().flatten().map(|job| job.at.saturating_add(job.length)).max().unwrap_or(0)
    }

    fn for_each_window(&self, each: &mut dyn FnMut(&[ScratchJob]) -> Result<()>) -> Result<()> {
        self.0.iter().try_for_each(|window| each(window))
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(in crate::scratch) fn cluster_of(byte: u8) -> Vec<u8> {
    vec![byte; CLUSTER as usize]
}

/// One file with these streams in it, each on a sector of its own, and where they are.
pub(in crate::scratch) fn streams_of(
    clusters: &[Vec<u8>],
) -> (Vec<u8>, Vec<(HostOffset, ByteLen)>) {
    let mut file = vec![0xee; 512];
    let places = clusters.iter().map(|cluster| {
        let start = file.len() as u64;
        file.extend(deflate(cluster));
        file.resize(file.len().next_multiple_of(512), 0xee);
        (HostOffset::new(start), ByteLen::new(file.len() as u64 - start))
    });
    let places = places.collect();
    (file, places)
}

/// The part of cluster `index` from `start` on, in sectors.
fn part(place: (HostOffset, ByteLen), index: u64, start: u64, length: u64) -> ScratchJob {
    let guest = index * CLUSTER + start * 512;
    ScratchJob {
        at: guest,
        length: length * 512,
        guest: GuestOffset::new(guest),
        layer: 0,
        what: ScratchContent::Inflate {
            host: place.0,
            stream_length: place.1,
            cluster: GuestOffset::new(index * CLUSTER),
        },
    }
}

pub(in crate::scratch) fn whole(place: (HostOffset, ByteLen), index: u64) -> ScratchJob {
    part(place, index, 0, CLUSTER / 512)
}

struct Outcome {
    filled: Filled,
    file: File,
    ticks: Vec<u64>,
}

impl Outcome {
    fn bytes(&self, at: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

fn run(file: Vec<u8>, windows: Vec<Vec<ScratchJob>>, on_error: OnError) -> Result<Outcome> {
    let scratch = tempfile::tempfile().unwrap();
    let ticks = RefCell::new(Vec::new());
    let mut options = FillOptions::new("/somewhere", on_error);
    options.shortest_zero_run = ByteLen::new(2 * CLUSTER);
    let filled = fill(&chain(file), &Windows(windows), &scratch, &options, &|done| {
        ticks.borrow_mut().push(done);
        Ok(())
    })?;
    Ok(Outcome { filled, file: scratch, ticks: ticks.into_inner() })
}

#[test]
fn clusters_are_written_where_their_jobs_say() {
    let clusters = [cluster_of(1), cluster_of(2), cluster_of(3)];
    let (file, places) = streams_of(&clusters);
    // Not in the order of the file, and with a gap.
    let jobs = vec![whole(places[2], 0), whole(places[0], 1), whole(places[1], 9)];
    let outcome = run(file, vec![jobs], OnError::Refuse).unwrap();
    assert_eq!(outcome.bytes(0, CLUSTER), clusters[2]);
    assert_eq!(outcome.bytes(CLUSTER, CLUSTER), clusters[0]);
    assert_eq!(outcome.bytes(9 * CLUSTER, CLUSTER), clusters[1]);
    assert_eq!(outcome.bytes(2 * CLUSTER, 7 * CLUSTER), vec![0; 7 * CLUSTER as usize]);
    assert_eq!(outcome.filled, Filled::default());
    assert_eq!(outcome.ticks, [3 * CLUSTER]);
}

#[test]
fn zeros_are_holes_and_long_runs_of_them_are_listed() {
    let clusters: Vec<_> = [0, 0, 0, 7, 0, 7, 0, 0].into_iter().map(cluster_of).collect();
    let (file, places) = streams_of(&clusters);
    let jobs: Vec<_> = (0..).zip(&places).map(|(i, &place)| whole(place, i)).collect();
    // Runs go over the bounds of windows.
    let windows = jobs.chunks(2).map(<[_]>::to_vec).collect();
    let outcome = run(file, windows, OnError::Refuse).unwrap();
    let range = |start, end| {
        GuestRange::new(GuestOffset::new(start * CLUSTER), GuestOffset::new(end * CLUSTER))
    };
    assert_eq!(outcome.filled.zero_runs, [range(0, 3), range(6, 8)]);
    assert_eq!(outcome.bytes(0, 8 * CLUSTER), clusters.concat());
    let metadata = outcome.file.metadata().unwrap();
    assert_eq!(metadata.len(), 8 * CLUSTER);
    assert!(metadata.blocks() * 512 < 4 * CLUSTER, "{} blocks", metadata.blocks());
}

#[test]
fn parts_of_a_cluster_come_from_their_place_in_it() {
    let cluster: Vec<u8> = (0..CLUSTER).map(|i| (i / 512 + 1) as u8).collect();
    let (file, places) = streams_of(&[cluster.clone(), cluster_of(9)]);
    // The parts of two clusters, one of them of another layer's in between.
    let jobs = vec![
        part(places[0], 0, 1, 1),
        part(places[1], 0, 2, 2),
        part(places[0], 0, 4, 124),
        part(places[0], 1, 0, 1),
    ];
    let outcome = run(file, vec![jobs], OnError::Refuse).unwrap();
    assert_eq!(outcome.bytes(512, 512), cluster[512..1024]);
    assert_eq!(outcome.bytes(1024, 1024), vec![9; 1024]);
    assert_eq!(outcome.bytes(2048, CLUSTER - 2048), cluster[2048..]);
    assert_eq!(outcome.bytes(CLUSTER, 512), cluster[..512]);
}

#[test]
fn tails_are_copied_and_filled_up_with_zeros() {
    let job = ScratchJob {
        at: 512,
        length: 512,
        guest: GuestOffset::new(0),
        layer: 0,
        what: ScratchContent::Copy {
            role: FileRole::Image,
            host: HostOffset::new(1024),
            bytes: 100,
        },
    };
    // Of the last sector one byte is there; the file has shrunk since it was planned.
    let outcome = run([vec![5; 1024], vec![6]].concat(), vec![vec![job]], OnError::Refuse);
    let outcome = outcome.unwrap();
    assert_eq!(outcome.bytes(512, 512), [vec![6], vec![0; 511]].concat());
    let copied = run(vec![6; 2000], vec![vec![job]], OnError::Refuse).unwrap();
    assert_eq!(copied.bytes(512, 512), [vec![6; 100], vec![0; 412]].concat());
}

#[test]
fn copied_zeros_are_no_zeros_of_the_guest() {
    let job = |index: u64| ScratchJob {
        at: index * CLUSTER,
        length: CLUSTER,
        guest: GuestOffset::new(index * CLUSTER),
        layer: 0,
        what: ScratchContent::Copy {
            role: FileRole::Image,
            host: HostOffset::ZERO,
            bytes: CLUSTER,
        },
    };
    let jobs = (0..8).map(job).collect();
    let outcome = run(vec![0; CLUSTER as usize], vec![jobs], OnError::Refuse).unwrap();
    assert_eq!(outcome.filled, Filled::default());
}

#[test]
fn the_first_failing_cluster_in_guest_order_is_named() {
    let (mut file, places) = streams_of(&[cluster_of(1), cluster_of(2), cluster_of(3)]);
    for place in &places[1..] {
        file[place.0.get() as usize] = 0xff;
    }
    let jobs: Vec<_> = (0..300)
        .map(|i| whole(places[if i == 100 { 2 } else { usize::from(i >= 200) }], i))
        .collect();
    let Err(error) = run(file.clone(), vec![jobs.clone()], OnError::Refuse) else {
        panic!("a damaged stream is accepted")
    };
    assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)));
    let (host, end) = (places[2].0.get(), places[2].0.get() + places[2].1.get());
    assert_eq!(
        error.to_string(),
        format!(
            "x.qcow2: at offset {host:#x}: the compressed cluster of guest offset {:#x} (bytes {host:#x} to {end:#x} of the file) does not inflate: the compressed data is damaged",
            100 * CLUSTER
        )
    );

    let outcome = run(file, vec![jobs], OnError::Zero).unwrap();
    assert_eq!(outcome.filled.failed.len(), 101);
    let first = &outcome.filled.failed[0];
    assert_eq!((first.guest.start.get(), first.host), (100 * CLUSTER, places[2].0));
    assert_eq!(first.why, FailedWhy::Inflate(InflateFault::Damaged));
    assert_eq!(outcome.bytes(100 * CLUSTER, CLUSTER), cluster_of(0));
    assert_eq!(outcome.bytes(99 * CLUSTER, CLUSTER), cluster_of(1));
    assert_eq!(outcome.filled.found()[0], Found { range: first.guest, kind: FoundKind::Failed });
}

#[test]
fn a_stream_cut_off_by_the_end_of_the_file_goes_on_with_zeros() {
    // Stored blocks, so that the last bytes of the stream are the cluster's.
    let half = 1u16 << 15;
    let block = |last: u8| {
        let header = [&[last][..], &half.to_le_bytes(), &(!half).to_le_bytes()].concat();
        [header, vec![0; CLUSTER as usize / 2]].concat()
    };
    let mut stream = [block(0), block(1)].concat();
    let length = stream.len() as u64;
    stream.truncate(stream.len() - 100);
    let job = whole((HostOffset::ZERO, ByteLen::new(length)), 0);
    run(stream, vec![vec![job]], OnError::Refuse).unwrap();
}

#[test]
fn what_cannot_be_read_counts_as_what_does_not_inflate() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.qcow2");
    let (bytes, places) = streams_of(&[cluster_of(1)]);
    std::fs::write(&path, bytes).unwrap();
    let chain = chain_over(Source::open(&path).unwrap());
    // No file has an offset past 2^63: EINVAL.
    let unreadable = (HostOffset::new(1 << 63), ByteLen::new(512));
    let work = Windows(vec![vec![whole(places[0], 0), whole(unreadable, 1)]]);
    let run = |on_error| {
        let scratch = tempfile::tempfile().unwrap();
        fill(&chain, &work, &scratch, &FillOptions::new("/somewhere", on_error), &|_| Ok(()))
    };
    let error = run(OnError::Refuse).unwrap_err();
    assert!(error.to_string().contains("cannot read"), "{error}");
    let filled = run(OnError::ErrorTarget).unwrap();
    assert_eq!(filled.failed[0].why, FailedWhy::Read(libc::EINVAL));
    assert_eq!((filled.failed.len(), filled.failed[0].guest.start.get()), (1, CLUSTER));
}

#[test]
fn a_tick_ends_the_work() {
    let (file, places) = streams_of(&[cluster_of(1)]);
    let jobs: Vec<_> = (0..3000).map(|i| whole(places[0], i)).collect();
    let scratch = tempfile::tempfile().unwrap();
    let ticks = RefCell::new(0);
    let options = FillOptions::new("/somewhere", OnError::Refuse);
    let outcome = fill(&chain(file), &Windows(vec![jobs]), &scratch, &options, &|_| {
        *ticks.borrow_mut() += 1;
        Err(Error::new(ErrorKind::Interrupted(15)))
    });
    assert!(matches!(outcome.unwrap_err().kind(), ErrorKind::Interrupted(15)));
    assert_eq!(ticks.into_inner(), 1);
}

#[test]
fn a_full_file_system_is_named() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = full.write_all_at(b"x", 0).unwrap_err();
    let error = cannot_write(error, 4096, Path::new("/somewhere"));
    assert_eq!(
        error.to_string(),
        "/somewhere: no scratch file of 4096 bytes (with holes) can be filled: the file system of this directory is full"
    );
}

#[test]
fn jobs_that_contradict_their_chain_are_refused() {
    let (file, places) = streams_of(&[cluster_of(1)]);
    let good = whole(places[0], 0);
    let past_the_cluster = part(places[0], 0, 1, CLUSTER / 512);
    for bad in [
        ScratchJob { layer: 1, ..good },
        ScratchJob { length: 0, ..good },
        ScratchJob { at: u64::MAX - 511, ..good },
        past_the_cluster,
    ] {
        assert!(run(file.clone(), vec![vec![bad]], OnError::Zero).is_err(), "{bad:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the jobs and however they are cut into windows: each piece is what its
    /// cluster has there.
    #[test]
    fn every_piece_is_its_part_of_its_cluster(
        contents in prop::collection::vec(0u8..4, 1..8),
        cuts in prop::collection::vec((0u64..128, 0u64..128, 0usize..8, any::<bool>()), 1..80),
    ) {
        let clusters: Vec<Vec<u8>> = contents
            .iter()
            .map(|&n| (0..CLUSTER).map(|i| if n == 0 { 0 } else { (i / 512) as u8 ^ n }).collect())
            .collect();
        let (file, places) = streams_of(&clusters);
        let mut windows = vec![Vec::new()];
        let mut expected = Vec::new();
        for (index, &(start, length, pick, split)) in (0..).zip(&cuts) {
            let pick = pick % clusters.len();
            let length = length.min(127 - start) + 1;
            let job = part(places[pick], index, start, length);
            let from = (start * 512) as usize;
            expected.push((job.at, clusters[pick][from..from + (length * 512) as usize].to_vec()));
            if split {
                windows.push(Vec::new());
            }
            windows.last_mut().unwrap().push(job);
        }
        let outcome = run(file, windows, OnError::Refuse).unwrap();
        for (at, bytes) in expected {
            prop_assert!(outcome.bytes(at, bytes.len() as u64) == bytes, "at {at:#x}");
        }
    }
}
