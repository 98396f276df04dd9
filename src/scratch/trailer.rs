//! What is written behind the data of a kept scratch file, so that it can be known again.
//!
//! At the first page boundary after the data: the header, the runs of zeros, for each
//! 64 KiB of the file that is no hole where it is and a checksum, the places of the images,
//! and in the last 8 bytes where the header is. All little-endian. What is read is checked
//! as a stranger's would be.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::libc::off_t;
use nix::unistd::{Whence, lseek};
use rayon::prelude::*;
use zerocopy::byteorder::little_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fill::MAX_ZERO_RUNS;
use super::origin::{self, Origin};
use crate::units::{GuestOffset, GuestRange, SECTOR_SIZE};

const MAGIC: [u8; 16] = *b"imgdm scratch\r\n\0";
const VERSION: u32 = 2;
const PAGE: u64 = 4096;

/// Bytes that one checksum is of.
const CHUNK: u64 = 64 << 10;

/// Checksums that are made before they are written.
const CHUNKS_AT_ONCE: usize = 1024;

/// Checksums that are looked at when a file is used again.
const SAMPLES: u64 = 4;

/// Most bytes that the places of images take: 1024 layers with two long paths each.
const MAX_ORIGINS: u64 = 16 << 20;

/// Bytes of the number at the file's end.
const FOOTER_LENGTH: u64 = size_of::<U64>() as u64;

/// Bytes of a sample that are read at a time.
const SAMPLE_BUFFER: usize = 16 << 10;

/// A BLAKE3 hash.
pub(super) type Digest = [u8; 32];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 16],
    version: U32,
    padding: [u8; 4],
    scratch_length: U64,
    identity: Digest,
    modified: I64,
    zero_runs: U64,
    chunks: U64,
    origins: U64,
    zero_runs_digest: Digest,
    origins_digest: Digest,
    /// Of all the fields before.
    digest: Digest,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPair(U64, U64);

const HEADER_LENGTH: u64 = size_of::<RawHeader>() as u64;
const PAIR_LENGTH: u64 = size_of::<RawPair>() as u64;

/// What a header says besides what it must say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Trailer {
    /// Length of the data in bytes.
    pub(super) scratch_length: u64,
    /// What the data was made from.
    pub(super) identity: Digest,
    /// The modification time that the file was given, in whole seconds since 1970.
    pub(super) modified: i64,
    zero_runs: u64,
    chunks: u64,
    /// Bytes of the places of images.
    origins: u64,
    zero_runs_digest: Digest,
    origins_digest: Digest,
}

impl Trailer {
    fn start(&self) -> u64 {
        start_of(self.scratch_length)
    }

    fn chunks_start(&self) -> u64 {
        self.start() + HEADER_LENGTH + self.zero_runs * PAIR_LENGTH
    }

    fn origins_start(&self) -> u64 {
        self.chunks_start() + self.chunks * PAIR_LENGTH
    }

    fn footer_start(&self) -> u64 {
        self.origins_start() + self.origins
    }

    /// Length of the whole file.
    fn file_length(&self) -> u64 {
        self.footer_start() + FOOTER_LENGTH
    }

    /// How long a file can become at most whose data have this length; saturates.
    pub(super) fn longest_file(scratch_length: u64) -> u64 {
        let zero_runs = MAX_ZERO_RUNS as u64 * PAIR_LENGTH;
        let chunks = scratch_length.div_ceil(CHUNK) * PAIR_LENGTH;
        let rest = PAGE + HEADER_LENGTH + zero_runs + MAX_ORIGINS + FOOTER_LENGTH;
        scratch_length.saturating_add(chunks).saturating_add(rest)
    }

    /// Reads and checks the header behind data of `scratch_length` bytes. `None`: it is
    /// none, or not of such data, or the file is not as long as it says.
    ///
    /// # Errors
    /// The read failed.
    pub(super) fn read(
        file: &File,
        file_length: u64,
        scratch_length: u64,
    ) -> io::Result<Option<Self>> {
        let Some(limit) = i64::MAX.unsigned_abs().checked_sub(scratch_length) else {
            return Ok(None);
        };
        if limit < PAGE {
            return Ok(None);
        }
        let header = Self::read_at(file, file_length, start_of(scratch_length))?;
        Ok(header.filter(|header| header.scratch_length == scratch_length))
    }

    /// The same where the length of the data is not known: by the number at the end.
    ///
    /// # Errors
    /// A read failed.
    pub(super) fn find(file: &File, file_length: u64) -> io::Result<Option<Self>> {
        let Some(at) = file_length.checked_sub(FOOTER_LENGTH) else { return Ok(None) };
        let mut start = U64::ZERO;
        file.read_exact_at(start.as_mut_bytes(), at)?;
        Self::read_at(file, file_length, start.get())
    }

    fn read_at(file: &File, file_length: u64, start: u64) -> io::Result<Option<Self>> {
        if file_length < start.saturating_add(HEADER_LENGTH) {
            return Ok(None);
        }
        let mut bytes = [0; size_of::<RawHeader>()];
        file.read_exact_at(&mut bytes, start)?;
        let fits = |header: &Self| header.start() == start && header.file_length() == file_length;
        Ok(Self::parse(&bytes, start).filter(fits))
    }

    /// `start`: where the header was, and so the most bytes that its data can have.
    fn parse(bytes: &[u8; size_of::<RawHeader>()], start: u64) -> Option<Self> {
        let raw = RawHeader::ref_from_bytes(bytes).ok()?;
        let checked = &bytes[..bytes.len() - size_of::<Digest>()];
        let scratch_length = raw.scratch_length.get();
        let good = raw.magic == MAGIC
            && raw.version.get() == VERSION
            && raw.digest == *blake3::hash(checked).as_bytes()
            && scratch_length <= start
            && raw.zero_runs.get() <= MAX_ZERO_RUNS as u64
            && raw.chunks.get() <= scratch_length.div_ceil(CHUNK)
            && raw.origins.get() <= MAX_ORIGINS;
        good.then(|| Self {
            scratch_length,
            identity: raw.identity,
            modified: raw.modified.get(),
            zero_runs: raw.zero_runs.get(),
            chunks: raw.chunks.get(),
            origins: raw.origins.get(),
            zero_runs_digest: raw.zero_runs_digest,
            origins_digest: raw.origins_digest,
        })
    }

    /// The places of the images; `None` where they are damaged.
    ///
    /// # Errors
    /// The read failed.
    pub(super) fn read_origins(&self, file: &File) -> io::Result<Option<Vec<Origin>>> {
        let bytes = read_checked(file, self.origins_start(), self.origins, &self.origins_digest)?;
        Ok(bytes.and_then(|bytes| origin::read_all(&bytes)))
    }

    /// The runs of zeros; `None` where they are damaged.
    ///
    /// # Errors
    /// The read failed.
    pub(super) fn read_zero_runs(&self, file: &File) -> io::Result<Option<Vec<GuestRange>>> {
        let (start, length) = (self.start() + HEADER_LENGTH, self.zero_runs * PAIR_LENGTH);
        let Some(bytes) = read_checked(file, start, length, &self.zero_runs_digest)? else {
            return Ok(None);
        };
        let Ok(pairs) = <[RawPair]>::ref_from_bytes(&bytes) else { return Ok(None) };
        let mut last = 0;
        let runs = pairs.iter().map(|RawPair(start, end)| {
            let (start, end) = (start.get(), end.get());
            let good = start >= last
                && start < end
                && end <= self.scratch_length
                && start % SECTOR_SIZE == 0
                && end % SECTOR_SIZE == 0;
            last = end;
            good.then(|| GuestRange::new(GuestOffset::new(start), GuestOffset::new(end)))
        });
        Ok(runs.collect())
    }

    /// Compares the checksums of a few chunks, other ones with another `seed`. It finds
    /// data that was lost on a large scale; smaller changes show in the file's times.
    ///
    /// # Errors
    /// A read failed.
    pub(super) fn samples_match(&self, file: &File, seed: u64) -> io::Result<bool> {
        // Small: memory that is touched for the first time costs more than another call.
        let mut buffer = vec![0; SAMPLE_BUFFER];
        for sample in 0..SAMPLES.min(self.chunks) {
            let digest = blake3::hash(&[seed.to_le_bytes(), sample.to_le_bytes()].concat());
            let index = first_word(digest.as_bytes()) % self.chunks;
            let mut bytes = [0; size_of::<RawPair>()];
            file.read_exact_at(&mut bytes, self.chunks_start() + index * PAIR_LENGTH)?;
            let Ok(RawPair(at, sum)) = RawPair::read_from_bytes(&bytes) else { return Ok(false) };
            if at.get() % CHUNK != 0 || at.get() >= self.scratch_length {
                return Ok(false);
            }
            if checksum(file, at.get(), self.scratch_length, &mut buffer)? != sum.get() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes all of a trailer but its header to a file that holds its data and nothing
    /// else. Reads all of the data. The file is as if it had no trailer, until
    /// [`write_header`](Self::write_header).
    ///
    /// # Errors
    /// A read or write failed.
    pub(super) fn write_lists(
        file: &File,
        scratch_length: u64,
        identity: Digest,
        zero_runs: &[GuestRange],
        origins: &[Origin],
    ) -> io::Result<Self> {
        let pairs: Vec<_> = zero_runs
            .iter()
            .map(|run| RawPair(U64::new(run.start.get()), U64::new(run.end.get())))
            .collect();
        let mut places = Vec::new();
        origins.iter().for_each(|origin| origin.write(&mut places));
        if places.len() as u64 > MAX_ORIGINS {
            // They only serve for removing the file some day.
            places.clear();
        }
        let runs_at = start_of(scratch_length) + HEADER_LENGTH;
        let mut trailer = Self {
            scratch_length,
            identity,
            modified: 0,
            zero_runs: pairs.len() as u64,
            chunks: 0,
            origins: places.len() as u64,
            zero_runs_digest: *blake3::hash(pairs.as_bytes()).as_bytes(),
            origins_digest: *blake3::hash(&places).as_bytes(),
        };
        let chunks_at = trailer.chunks_start();
        for_each_chunk(file, scratch_length, |chunks| {
            let at = chunks_at + trailer.chunks * PAIR_LENGTH;
            trailer.chunks += chunks.len() as u64;
            file.write_all_at(&checksums(file, chunks, scratch_length)?, at)
        })?;
        file.write_all_at(pairs.as_bytes(), runs_at)?;
        file.write_all_at(&places, trailer.origins_start())?;
        file.write_all_at(U64::new(trailer.start()).as_bytes(), trailer.footer_start())?;
        file.set_len(trailer.file_length())?;
        Ok(trailer)
    }

    /// Writes the header, with the time that the file is given next.
    ///
    /// # Errors
    /// The write failed.
    pub(super) fn write_header(mut self, file: &File, modified: i64) -> io::Result<()> {
        self.modified = modified;
        file.write_all_at(&self.to_bytes(), self.start())
    }

    fn to_bytes(self) -> Vec<u8> {
        let mut raw = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            padding: [0; 4],
            scratch_length: U64::new(self.scratch_length),
            identity: self.identity,
            modified: I64::new(self.modified),
            zero_runs: U64::new(self.zero_runs),
            chunks: U64::new(self.chunks),
            origins: U64::new(self.origins),
            zero_runs_digest: self.zero_runs_digest,
            origins_digest: self.origins_digest,
            digest: Digest::default(),
        };
        let length = size_of::<RawHeader>() - size_of::<Digest>();
        raw.digest = *blake3::hash(&raw.as_bytes()[..length]).as_bytes();
        raw.as_bytes().to_vec()
    }
}

/// Bytes of the file that have to have this hash; `None` where they have not.
fn read_checked(
    file: &File,
    start: u64,
    length: u64,
    digest: &Digest,
) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    file.read_exact_at(&mut bytes, start)?;
    Ok((*digest == *blake3::hash(&bytes).as_bytes()).then_some(bytes))
}

/// Where the trailer of so much data starts; the caller keeps it below 2^63.
fn start_of(scratch_length: u64) -> u64 {
    scratch_length.next_multiple_of(PAGE)
}

/// Calls `each` with the starts of the chunks that hold data, some at a time.
fn for_each_chunk(
    file: &File,
    length: u64,
    mut each: impl FnMut(&[u64]) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunks = Vec::new();
    let mut at = 0;
    while at < length {
        let Some((start, end)) = next_data(file, at, length)? else { break };
        // A chunk that holds data of two stretches counts once: `at` is a chunk's start.
        let mut chunk = (start / CHUNK * CHUNK).max(at);
        while chunk < end {
            chunks.push(chunk);
            chunk += CHUNK;
            if chunks.len() == CHUNKS_AT_ONCE {
                each(&chunks)?;
                chunks.clear();
            }
        }
        at = chunk;
    }
    if chunks.is_empty() { Ok(()) } else { each(&chunks) }
}

/// The next stretch from `at` on that is no hole, inside of `length`.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    let seek = |at: u64, whence| {
        let at = off_t::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        lseek(file, at, whence).map(i64::unsigned_abs)
    };
    match seek(at, Whence::SeekData) {
        Ok(start) if start < length => {
            let end = seek(start, Whence::SeekHole).unwrap_or(length);
            Ok(Some((start, end.min(length).max(start + 1))))
        }
        Ok(_) | Err(Errno::ENXIO) => Ok(None),
        // A file system that cannot tell.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some((at, length))),
        Err(errno) => Err(errno.into()),
    }
}

fn checksums(file: &File, chunks: &[u64], length: u64) -> io::Result<Vec<u8>> {
    let buffer = || vec![0; usize::try_from(CHUNK).unwrap_or(0)];
    let pairs: io::Result<Vec<RawPair>> = chunks
        .par_iter()
        .with_min_len(16)
        .map_init(buffer, |buffer, &at| {
            Ok(RawPair(U64::new(at), U64::new(checksum(file, at, length, buffer)?)))
        })
        .collect();
    Ok(pairs?.as_bytes().to_vec())
}

/// The checksum of the chunk at `at` of data of `length` bytes, read by as much as `buffer`
/// takes.
fn checksum(file: &File, at: u64, length: u64, buffer: &mut [u8]) -> io::Result<u64> {
    let mut hash = blake3::Hasher::new();
    let end = at.saturating_add(CHUNK).min(length);
    let mut at = at;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let piece = &mut buffer[..wanted];
        file.read_exact_at(piece, at)?;
        hash.update(piece);
        at += piece.len() as u64;
    }
    Ok(first_word(hash.finalize().as_bytes()))
}

fn first_word(digest: &Digest) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: u64 = 5 * CHUNK + 512;

    fn run(start: u64, end: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
    }

    fn written(runs: &[GuestRange]) -> (File, u64) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LENGTH).unwrap();
        file.write_all_at(&[7; 100], CHUNK).unwrap();
        file.write_all_at(&[8; 512], LENGTH - 512).unwrap();
        let place = Origin::of(std::path::Path::new("/proc/version")).unwrap();
        let trailer = Trailer::write_lists(&file, LENGTH, [5; 32], runs, &[place]).unwrap();
        let length = file.metadata().unwrap().len();
        assert!(Trailer::find(&file, length).unwrap().is_none(), "it has no header yet");
        trailer.write_header(&file, -3).unwrap();
        let length = file.metadata().unwrap().len();
        (file, length)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let runs = [run(0, CHUNK), run(2 * CHUNK, 3 * CHUNK)];
        let (file, length) = written(&runs);
        let trailer = Trailer::read(&file, length, LENGTH).unwrap().unwrap();
        assert_eq!((trailer.identity, trailer.modified), ([5; 32], -3));
        assert_eq!(trailer.read_zero_runs(&file).unwrap().unwrap(), runs);
        assert_eq!(trailer.read_origins(&file).unwrap().unwrap().len(), 1);
        assert_eq!(Trailer::find(&file, length).unwrap().unwrap(), trailer);
        assert!(length <= Trailer::longest_file(LENGTH));
        assert!(trailer.chunks <= 6, "holes have no checksums: {}", trailer.chunks);
        assert!((0..20).all(|seed| trailer.samples_match(&file, seed).unwrap()));
    }

    #[test]
    fn lost_data_is_found() {
        let (file, length) = written(&[]);
        file.write_all_at(&[0; 100], CHUNK).unwrap();
        let trailer = Trailer::read(&file, length, LENGTH).unwrap().unwrap();
        assert!((0..20).any(|seed| !trailer.samples_match(&file, seed).unwrap()));
    }

    #[test]
    fn runs_of_zeros_outside_of_the_data_or_out_of_order_are_refused() {
        for bad in [
            [run(0, 512), run(0, 512)],
            [run(0, 512), run(LENGTH, LENGTH + 512)],
            [run(0, 512), run(1024, 1024)],
            [run(0, 511), run(1024, 2048)],
        ] {
            let (file, length) = written(&bad);
            let trailer = Trailer::read(&file, length, LENGTH).unwrap().unwrap();
            assert_eq!(trailer.read_zero_runs(&file).unwrap(), None);
        }
    }

    #[test]
    fn lengths_that_no_file_has_are_no_trailer() {
        let (file, length) = written(&[]);
        for scratch_length in [0, LENGTH + 512, length, i64::MAX.unsigned_abs(), u64::MAX] {
            let read = Trailer::read(&file, length, scratch_length);
            assert!(read.unwrap().is_none(), "{scratch_length:#x}");
        }
        assert!(Trailer::read(&file, length + 1, LENGTH).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn no_changed_byte_of_the_header_or_the_runs_is_accepted(
            at in 0..HEADER_LENGTH + PAIR_LENGTH,
            flip in 1u8..,
        ) {
            let (file, length) = written(&[run(0, CHUNK)]);
            let at = start_of(LENGTH) + at;
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ flip], at).unwrap();
            let trailer = Trailer::read(&file, length, LENGTH).unwrap();
            let runs = trailer.and_then(|trailer| trailer.read_zero_runs(&file).unwrap());
            prop_assert_eq!(runs, None);
        }

        #[test]
        fn no_changed_byte_of_the_places_is_accepted(back in 1..=69u64, flip in 1u8..) {
            let (file, length) = written(&[]);
            let mut byte = [0];
            file.read_exact_at(&mut byte, length - back).unwrap();
            file.write_all_at(&[byte[0] ^ flip], length - back).unwrap();
            let trailer = Trailer::find(&file, length).unwrap();
            let places = trailer.and_then(|trailer| trailer.read_origins(&file).unwrap());
            prop_assert_eq!(places, None);
        }

        #[test]
        fn no_bytes_make_it_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            scratch_length in 0u64..8192,
        ) {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&bytes, 4096).unwrap();
            let length = file.metadata().unwrap().len();
            let _ = Trailer::read(&file, length, scratch_length);
            let _ = Trailer::find(&file, length);
        }
    }
}
