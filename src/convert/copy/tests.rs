//! Copying from and to memory, and to files.

#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use proptest::prelude::*;

use super::detect::Detector;
use super::*;
use crate::chain::tests::{chain_over, layers};
use crate::convert::create::{DataFile, NewImage};
use crate::convert::input::tests::base_disk;
use crate::convert::input::{Base, ChainInput};
use crate::convert::options::{FormatOptions, RawOptions};
use crate::convert::qcow::QcowWriter;
use crate::convert::qcow2::Qcow2Writer;
use crate::convert::raw::RawWriter;
use crate::convert::reflink::Reflink;
use crate::convert::{Content, InputPlace, InputReader, Piece};
use crate::error::ErrorKind;
use crate::format::Format;
use crate::read::tests::{ciphers, disk, file};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// A kernel that clones by copying, or can't.
#[derive(Debug, Default)]
struct Kernel {
    /// Block size; 0 where it can't clone.
    block: u64,
    clones: AtomicU64,
    /// The clone of this number and those after it fail.
    fails_from: Option<u64>,
}

impl HostCalls for Kernel {
    fn clone_range(
        &self,
        from: &File,
        from_offset: u64,
        length: u64,
        to: &File,
        to_offset: u64,
    ) -> io::Result<()> {
        let number = self.clones.fetch_add(1, Ordering::Relaxed);
        if self.block == 0 || self.fails_from.is_some_and(|first| number >= first) {
            return Err(io::Error::from_raw_os_error(nix::libc::EOPNOTSUPP));
        }
        for offset in [from_offset, length, to_offset] {
            assert_eq!(offset % self.block, 0, "the kernel would refuse that");
        }
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        from.read_exact_at(&mut bytes, from_offset)?;
        to.write_all_at(&bytes, to_offset)
    }

    fn start_write_back(&self, _: &File, _: u64, _: u64) {}
}

/// Puts one cluster behind the other, and keeps what it was told.
struct Packed {
    file: File,
    cluster: u64,
    granularity: u64,
    has_zeros: bool,
    next: u64,
    told: Vec<(GuestRange, Option<u64>)>,
    /// The call for that guest offset fails.
    fails_at: Option<u64>,
    /// As does this one, by a panic.
    panics_at: Option<u64>,
}

impl Packed {
    fn new(cluster: u64, granularity: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        let (next, told) = (0, Vec::new());
        Self {
            file,
            cluster,
            granularity,
            has_zeros: true,
            next,
            told,
            fails_at: None,
            panics_at: None,
        }
    }

    /// The disk, over a backing file with the bytes `base`.
    fn disk(&self, mut base: Vec<u8>, size: usize) -> Vec<u8> {
        base.resize(size, 0);
        for (range, offset) in &self.told {
            let (start, end) = (range.start.get() as usize, range.end.get() as usize);
            match offset {
                None => base[start..end].fill(0),
                Some(offset) => self.file.read_exact_at(&mut base[start..end], *offset).unwrap(),
            }
        }
        base
    }

    fn tell(&mut self, range: GuestRange, offset: Option<u64>) -> Result<()> {
        if self.fails_at.is_some_and(|at| range.end.get() > at) {
            return Err(Error::invalid("the writer fails"));
        }
        assert!(self.panics_at.is_none_or(|at| range.end.get() <= at), "the writer panics");
        let before = self.told.last().map_or(0, |(range, _)| range.end.get());
        assert!(range.start.get() >= before, "guest order");
        assert_eq!(range.start.get() % self.granularity, 0);
        self.told.push((range, offset));
        Ok(())
    }
}

impl ImageWriter for Packed {
    fn granularity(&self) -> u64 {
        self.granularity
    }

    fn cluster_size(&self) -> u64 {
        self.cluster
    }

    fn has_zeros(&self) -> bool {
        self.has_zeros
    }

    fn data(&mut self, range: GuestRange, placed: &mut Vec<Placed>) -> Result<()> {
        // In two places, where that can be.
        let middle = (range.length().get() / self.granularity / 2) * self.granularity;
        let middle = range.start.saturating_add(ByteLen::new(middle));
        for range in [GuestRange::new(range.start, middle), GuestRange::new(middle, range.end)] {
            if !range.is_empty() {
                let offset = self.next.next_multiple_of(4096);
                self.next = offset + range.length().get();
                self.tell(range, Some(offset))?;
                placed.push(Placed { range, offset: HostOffset::new(offset) });
            }
        }
        Ok(())
    }

    fn zeros(&mut self, range: GuestRange) -> Result<()> {
        assert!(self.has_zeros);
        self.tell(range, None)
    }

    fn compressed(&mut self, cluster: GuestOffset, length: usize) -> Result<HostOffset> {
        assert_eq!(cluster.get() % self.cluster, 0);
        let offset = self.next;
        self.next += length as u64;
        Ok(HostOffset::new(offset))
    }

    fn data_file(&self) -> &File {
        &self.file
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

fn options(calls: &Kernel) -> CopyOptions<'_> {
    CopyOptions {
        sparse: DEFAULT_SPARSE,
        has_backing: false,
        compression: None,
        offloads: Offloads::none(),
        calls,
        write_back: true,
        allocate_ahead: true,
        threads: 3,
        data_name: Path::new("the output"),
    }
}

fn goes_on(_: u64) -> Result<()> {
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_copy_has_the_bytes_whatever_is_asked_for(
        layers in layers(),
        granularity in 0..4u32,
        sparse in prop::sample::select(vec![0, 512, 4096, 65536]),
        has_zeros in any::<bool>(),
    ) {
        let chain = chain_over(layers.clone(), file);
        let whole = disk(&layers);
        let kernel = Kernel::default();
        for depth in 0..=layers.len() {
            let has_backing = depth < layers.len();
            let base = has_backing.then(|| Base::Layer(u32::try_from(depth).unwrap()));
            let input = ChainInput::new(&chain, ciphers(), base).unwrap();
            let mut writer = Packed::new(4096, 512 << granularity);
            writer.has_zeros = has_zeros;
            let options = CopyOptions { sparse, has_backing, ..options(&kernel) };
            copy(&input, &mut writer, &options, &goes_on).unwrap();
            let below = match base {
                Some(Base::Layer(depth)) => base_disk(&chain, depth),
                _ => Vec::new(),
            };
            prop_assert!(writer.disk(below, whole.len()) == whole);
            let mut by_one = Packed { has_zeros, ..Packed::new(4096, 512 << granularity) };
            copy(&input, &mut by_one, &CopyOptions { threads: 1, ..options }, &goes_on).unwrap();
            prop_assert_eq!(by_one.told, writer.told, "not by how many threads");
        }
    }

    #[test]
    fn a_raw_copy_is_the_disk(layers in layers(), sparse in prop::sample::select(vec![0, 4096])) {
        let chain = chain_over(layers.clone(), file);
        let input = ChainInput::new(&chain, ciphers(), None).unwrap();
        let file = tempfile::tempfile().unwrap();
        let new = NewImage { file: &file, data_file: None, size: input.size(), backing: None };
        let mut writer = RawWriter::new(&new, &RawOptions::default()).unwrap();
        let kernel = Kernel::default();
        copy(&input, &mut writer, &CopyOptions { sparse, ..options(&kernel) }, &goes_on).unwrap();
        let expected = disk(&layers);
        let mut found = vec![0xaa; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        prop_assert!(found == expected);
    }
}

/// Bytes of a file, all of them; with a few runs of zeros.
struct OneFile {
    source: Source,
    /// Where in the file the disk starts.
    skip: u64,
    /// Reading from there on fails.
    bad: Option<u64>,
}

impl OneFile {
    /// `mebibytes` of noise, with zeros in the second quarter.
    fn noise(mebibytes: usize, skip: usize) -> (Self, Vec<u8>) {
        let mut bytes: Vec<u8> =
            (0..mebibytes << 20).map(|at| (at * 7 / 3 % 255) as u8 + 1).collect();
        let quarter = bytes.len() / 4;
        bytes[quarter..2 * quarter].fill(0);
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().write_all_at(&bytes, skip as u64).unwrap();
        let source = Source::open(path.path()).unwrap();
        (Self { source, skip: skip as u64, bad: None }, bytes)
    }
}

impl Input for OneFile {
    fn size(&self) -> ByteLen {
        ByteLen::new(self.source.length().get() - self.skip)
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let end = GuestOffset::new(self.bad.unwrap_or(self.size().get()));
        let place = Some(InputPlace { file: 0, offset: HostOffset::new(self.skip) });
        let range = GuestRange::new(GuestOffset::ZERO, end);
        let bad = self.bad.map(|_| Err(Error::invalid("bad metadata")));
        Box::new(std::iter::once(Ok(Piece { range, content: Content::Bytes { place } })).chain(bad))
    }

    fn file(&self, number: u32) -> Option<&Source> {
        (number == 0).then_some(&self.source)
    }

    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        unreachable!("all of it has a place")
    }
}

fn raw_copy(input: &OneFile, options: &CopyOptions<'_>) -> (File, Summary) {
    let file = tempfile::tempfile().unwrap();
    let new = NewImage { file: &file, data_file: None, size: input.size(), backing: None };
    let mut writer = RawWriter::new(&new, &RawOptions::default()).unwrap();
    let summary = copy(input, &mut writer, options, &goes_on).unwrap();
    (file, summary)
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn zeros_in_data_take_no_space_also_where_it_was_allocated_ahead() {
    let kernel = Kernel::default();
    let (input, bytes) = OneFile::noise(24, 0);
    let (file, summary) = raw_copy(&input, &options(&kernel));
    assert!(content(&file) == bytes);
    file.sync_all().unwrap();
    assert_eq!(summary, Summary { copied: 18 << 20, zeros: 6 << 20, ..Summary::default() });
    assert!(file.metadata().unwrap().blocks() * 512 < 20 << 20);
    let (file, summary) = raw_copy(&input, &CopyOptions { sparse: 0, ..options(&kernel) });
    assert!(content(&file) == bytes);
    assert_eq!(summary.copied, 24 << 20);
}

/// 40 MiB of noise and 88 MiB of written zeros.
fn noise_then_zeros() -> OneFile {
    let (noise, bytes) = OneFile::noise(40, 0);
    drop(noise);
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut whole: Vec<u8> = bytes.into_iter().map(|byte| byte.max(1)).collect();
    whole.resize(128 << 20, 0);
    file.as_file().write_all_at(&whole, 0).unwrap();
    OneFile { source: Source::open(file.path()).unwrap(), skip: 0, bad: None }
}

#[test]
fn space_that_was_allocated_ahead_does_not_stay() {
    let kernel = Kernel::default();
    let input = noise_then_zeros();
    let allocated = |file: &File| {
        file.sync_all().unwrap();
        file.metadata().unwrap().blocks() * 512
    };
    let most = (40 << 20) + 16 * 65536;
    let (file, data) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let named = DataFile { file: &data, name: Path::new("data") };
    for (texts, data_file) in [(vec![], None), (vec!["data_file=data"], Some(named))] {
        let FormatOptions::Qcow2(format) = FormatOptions::parse(Format::Qcow2, &texts).unwrap()
        else {
            unreachable!()
        };
        file.set_len(0).unwrap();
        let new = NewImage { file: &file, data_file, size: input.size(), backing: None };
        let mut writer = Qcow2Writer::new(&new, &format).unwrap();
        let summary = copy(&input, &mut writer, &options(&kernel), &goes_on).unwrap();
        assert_eq!((summary.copied, summary.zeros), (40 << 20, 88 << 20));
        let bytes = allocated(&file) + allocated(&data);
        assert!((40 << 20..most).contains(&bytes), "{texts:?}: {bytes}");
    }
    file.set_len(0).unwrap();
    let new = NewImage { file: &file, data_file: None, size: input.size(), backing: None };
    let mut writer = QcowWriter::new(&new).unwrap();
    copy(&input, &mut writer, &options(&kernel), &goes_on).unwrap();
    assert!((40 << 20..most).contains(&allocated(&file)), "qcow: {}", allocated(&file));
    let (file, _) = raw_copy(&input, &options(&kernel));
    assert_eq!(file.metadata().unwrap().len(), 128 << 20);
    assert!((40 << 20..most).contains(&allocated(&file)), "{}", allocated(&file));
}

#[test]
fn what_is_aligned_is_cloned_and_the_rest_copied() {
    for (skip, block, cloned) in
        [(0, 4096, 24 << 20), (4096, 4096, 24 << 20), (512, 4096, 0), (0, 0, 0)]
    {
        let kernel = Kernel { block, ..Kernel::default() };
        let (input, bytes) = OneFile::noise(24, skip);
        let output = tempfile::tempfile().unwrap();
        let offloads = Offloads::probe(&input, &output, Reflink::Auto, &kernel).unwrap();
        assert_eq!(output.metadata().unwrap().len(), 0);
        let (file, summary) = raw_copy(&input, &CopyOptions { offloads, ..options(&kernel) });
        assert!(content(&file) == bytes, "{skip} {block}");
        assert_eq!(summary.cloned, cloned, "{skip} {block}");
    }
}

#[test]
fn what_can_not_be_cloned_after_all_is_copied_unless_it_must_not() {
    for reflink in [Reflink::Auto, Reflink::Always, Reflink::Never] {
        let kernel = Kernel { block: 4096, fails_from: Some(1), ..Kernel::default() };
        let (input, bytes) = OneFile::noise(8, 0);
        let output = tempfile::tempfile().unwrap();
        let offloads = Offloads::probe(&input, &output, reflink, &kernel).unwrap();
        let options = CopyOptions { offloads, ..options(&kernel) };
        if reflink == Reflink::Always {
            let new =
                NewImage { file: &output, data_file: None, size: input.size(), backing: None };
            let mut writer = RawWriter::new(&new, &RawOptions::default()).unwrap();
            let error = copy(&input, &mut writer, &options, &goes_on).unwrap_err();
            assert!(error.to_string().contains("--reflink=always"), "{error}");
            continue;
        }
        assert!(content(&raw_copy(&input, &options).0) == bytes);
        assert_eq!(kernel.clones.load(Ordering::Relaxed) > 0, reflink == Reflink::Auto);
    }
}

#[test]
fn a_file_system_that_shares_nothing_is_named_where_it_must() {
    let (input, _) = OneFile::noise(1, 0);
    let output = tempfile::tempfile().unwrap();
    let kernel = Kernel::default();
    let error = Offloads::probe(&input, &output, Reflink::Always, &kernel).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    assert_eq!(error.path(), Some(input.source.path()));
}

#[test]
fn clones_go_where_the_writer_says() {
    let kernel = Kernel { block: 4096, ..Kernel::default() };
    let (input, bytes) = OneFile::noise(8, 4096);
    let output = tempfile::tempfile().unwrap();
    let offloads = Offloads::probe(&input, &output, Reflink::Always, &kernel).unwrap();
    let mut writer = Packed::new(65536, 65536);
    let options = CopyOptions { offloads, ..options(&kernel) };
    let summary = copy(&input, &mut writer, &options, &goes_on).unwrap();
    assert_eq!(summary.cloned, 8 << 20);
    assert!(writer.disk(Vec::new(), bytes.len()) == bytes);
}

#[test]
fn the_first_error_in_guest_order_is_told() {
    let kernel = Kernel::default();
    for threads in [1, 2, 8] {
        for (bad, fails_at, says) in [
            (Some(5 << 20), None, "bad metadata"),
            (Some(5 << 20), Some(3 << 20), "the writer fails"),
            (Some(3 << 20), Some(5 << 20), "bad metadata"),
        ] {
            let (mut input, _) = OneFile::noise(8, 0);
            input.bad = bad;
            let mut writer = Packed::new(65536, 65536);
            writer.fails_at = fails_at;
            let options = CopyOptions { threads, ..options(&kernel) };
            let error = copy(&input, &mut writer, &options, &goes_on).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            let end = writer.told.last().map_or(0, |(range, _)| range.end.get());
            assert!(end <= 5 << 20);
        }
    }
}

#[test]
fn the_tick_tells_how_far_it_is_and_can_stop_the_work() {
    let kernel = Kernel::default();
    let (input, bytes) = OneFile::noise(16, 0);
    let most = AtomicU64::new(0);
    let tick = |done| {
        most.fetch_max(done, Ordering::Relaxed);
        Ok(())
    };
    let mut writer = Packed::new(65536, 65536);
    copy(&input, &mut writer, &options(&kernel), &tick).unwrap();
    assert_eq!(most.into_inner(), bytes.len() as u64);
    let stop = |done| match done {
        0..4_000_000 => Ok(()),
        _ => Err(Error::new(ErrorKind::Interrupted(15))),
    };
    let mut writer = Packed::new(65536, 65536);
    let error = copy(&input, &mut writer, &options(&kernel), &stop).unwrap_err();
    assert!(error.is_interruption(), "{error}");
    assert!(writer.next < 16 << 20);
}

/// An endless disk that is left to the backing file; it counts the pieces that it was asked for.
#[derive(Default)]
struct LeftOut {
    pieces: AtomicU64,
}

impl LeftOut {
    const PIECES: u64 = 1 << 25;
    const PIECE: u64 = 1 << 30;
}

impl Input for LeftOut {
    fn size(&self) -> ByteLen {
        ByteLen::new(Self::PIECES * Self::PIECE)
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        Box::new((0..Self::PIECES).map(|number| {
            self.pieces.fetch_add(1, Ordering::Relaxed);
            let start = number * Self::PIECE;
            let end = GuestOffset::new(start + Self::PIECE);
            let range = GuestRange::new(GuestOffset::new(start), end);
            Ok(Piece { range, content: Content::Backing })
        }))
    }

    fn file(&self, _: u32) -> Option<&Source> {
        None
    }

    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        unreachable!("nothing is read")
    }
}

#[test]
fn the_work_can_be_stopped_while_all_is_left_to_the_backing_file() {
    let kernel = Kernel::default();
    for threads in [1, 4] {
        let input = LeftOut::default();
        let stop = |_| Err(Error::new(ErrorKind::Interrupted(2)));
        let options = CopyOptions { has_backing: true, threads, ..options(&kernel) };
        let mut writer = Packed::new(65536, 65536);
        let error = copy(&input, &mut writer, &options, &stop).unwrap_err();
        assert!(error.is_interruption(), "{error}");
        assert!(input.pieces.into_inner() < LeftOut::PIECES / 100, "it went on");
    }
}

/// A writer, or its reader, that panics.
struct Panics {
    by_reading: bool,
}

impl Input for Panics {
    fn size(&self) -> ByteLen {
        ByteLen::new(16 << 20)
    }

    fn pieces(&self) -> Box<dyn Iterator<Item = Result<Piece>> + Send + '_> {
        let range = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(16 << 20));
        Box::new(std::iter::once(Ok(Piece { range, content: Content::Bytes { place: None } })))
    }

    fn file(&self, _: u32) -> Option<&Source> {
        None
    }

    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        struct Reader(bool);
        impl InputReader for Reader {
            fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
                assert!(!self.0 || offset.get() != 2 << 20, "the reader panics");
                buffer.fill(1);
                Ok(())
            }
        }
        Box::new(Reader(self.by_reading))
    }
}

#[test]
fn a_panic_of_one_thread_is_the_end_of_all() {
    for (by_reading, threads) in [(true, 1), (true, 4), (false, 1), (false, 4)] {
        let (tell, told) = std::sync::mpsc::channel();
        // On a thread of its own: without an end, the test is to fail nevertheless.
        std::thread::spawn(move || {
            let kernel = Kernel::default();
            let mut writer = Packed::new(65536, 65536);
            writer.panics_at = (!by_reading).then_some(2 << 20);
            let options = CopyOptions { threads, ..options(&kernel) };
            let copying = std::panic::AssertUnwindSafe(|| {
                copy(&Panics { by_reading }, &mut writer, &options, &goes_on).map(drop)
            });
            let _ = tell.send(std::panic::catch_unwind(copying).is_err());
        });
        let panicked = told.recv_timeout(std::time::Duration::from_secs(60));
        assert_eq!(panicked, Ok(true), "by reading: {by_reading}, {threads} threads");
    }
}

#[test]
fn a_full_file_is_told_of_with_its_cause() {
    let kernel = Kernel::default();
    let (input, _) = OneFile::noise(1, 0);
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let mut writer = Packed { file: full, ..Packed::new(65536, 65536) };
    let error = copy(&input, &mut writer, &options(&kernel), &goes_on).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
    assert!(error.without_path().contains("No space left"), "{}", error.without_path());
    assert_eq!(error.path(), Some(Path::new("the output")));
}

fn runs(sparse: usize, granularity: usize, bytes: &[u8]) -> Vec<(usize, bool)> {
    let mut runs = Vec::new();
    Detector { sparse, granularity }.for_each_run(0, bytes, &mut |length, is_data| {
        runs.push((length, is_data));
    });
    runs
}

#[test]
fn zeros_are_found_by_granules_where_those_are_long_enough() {
    let mut bytes = vec![0; 5 * 4096 + 512];
    bytes[4096 + 7] = 1;
    bytes[5 * 4096] = 1;
    let expected = [(4096, false), (4096, true), (3 * 4096, false), (512, true)];
    assert_eq!(runs(4096, 4096, &bytes), expected);
    assert_eq!(runs(512, 4096, &bytes), expected);
}

#[test]
fn zeros_shorter_than_asked_for_are_data_between_data() {
    let mut bytes = vec![0; 16 * 4096];
    bytes[4096] = 1;
    bytes[3 * 4096] = 1;
    bytes[15 * 4096] = 1;
    let k = 4096;
    // Data up to a multiple of 16k; the zeros behind it are long enough.
    assert_eq!(runs(4 * k, k, &bytes), [(4 * k, true), (8 * k, false), (4 * k, true)]);
    assert_eq!(runs(16 * k, k, &bytes), [(16 * k, true)]);
}
