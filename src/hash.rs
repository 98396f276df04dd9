//! Hashes of a whole disk, as fast as it is read.
//!
//! A hash takes the bytes one after the other, so it is what limits the speed: each has a
//! thread of its own, while other threads read, inflate and decrypt what comes next. Zeros
//! that no file holds are hashed as any other bytes have to be, but not read.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, LazyLock};

use sha2::Digest as _;

use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result};
use crate::format::raw::RawImage;
use crate::read::{Ciphers, Content, Swept};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange};
use crate::worker;

/// Units of work, of 1 to 4 MiB each, that are read and wait for a hash.
const WAITING: usize = 8;

/// What is hashed for zeros. Nothing ever writes to it, so that the kernel's page of zeros
/// stands for all of it; as an array it would be in the program's file.
static ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 4 << 20]);

/// Shorter pieces are not worth being spread over threads.
const SPREAD_FROM: usize = 128 << 10;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// SHA-256 (FIPS 180-4), as of `sha256sum`.
    Sha256,
    /// BLAKE3 with 32 bytes of output, as of `b3sum`.
    Blake3,
}

impl Algorithm {
    /// Its name: `sha256` or `blake3`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Blake3 => "blake3",
        }
    }
}

/// A hash. Displayed in hex.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    /// SHA-256 of what is in memory.
    pub fn sha256(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl From<sha2::Sha256> for Digest {
    fn from(hasher: sha2::Sha256) -> Self {
        Self(hasher.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The hashes of something, by their functions.
pub type Digests = BTreeMap<Algorithm, Digest>;

/// Is told, by several threads, how many bytes are hashed by all functions; an error stops
/// the work.
pub type Tick<'t> = dyn Fn(ByteLen) -> Result<()> + Sync + 't;

impl Chain {
    /// Hashes the whole virtual disk.
    ///
    /// # Errors
    /// Those of [`for_each_chunk`](Self::for_each_chunk) and of `tick`; no thread can be
    /// started.
    pub fn hash(
        &self,
        ciphers: &Ciphers,
        algorithms: &BTreeSet<Algorithm>,
        tick: &Tick<'_>,
    ) -> Result<Digests> {
        hash_range(self, ciphers, self.whole(), algorithms, tick)
    }
}

/// Hashes a file or block device byte for byte, whatever it holds; its holes are hashed as
/// zeros without being read.
///
/// # Errors
/// It can't be read, or has 2^63 bytes or more; what `tick` says; no thread can be started.
pub fn hash_file(
    source: &Arc<Source>,
    algorithms: &BTreeSet<Algorithm>,
    tick: &Tick<'_>,
) -> Result<Digests> {
    let image = Box::new(RawImage::open(Arc::clone(source))?);
    let layer = Layer { image, source: Arc::clone(source), data_file: None, declared_format: None };
    // As a disk it would be longer, up to the end of its last sector.
    let range = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(source.length().get()));
    hash_range(&Chain::new(vec![layer])?, &Ciphers::new(), range, algorithms, tick)
}

fn hash_range(
    chain: &Chain,
    ciphers: &Ciphers,
    range: GuestRange,
    algorithms: &BTreeSet<Algorithm>,
    tick: &Tick<'_>,
) -> Result<Digests> {
    let done: Vec<AtomicU64> = algorithms.iter().map(|_| AtomicU64::new(0)).collect();
    let tick = |count: &AtomicU64, bytes: usize| {
        count.fetch_add(bytes as u64, Ordering::Relaxed);
        let by_all = done.iter().map(|count| count.load(Ordering::Relaxed)).min();
        tick(ByteLen::new(by_all.unwrap_or(0)))
    };
    std::thread::scope(|scope| {
        let mut senders = Vec::new();
        let mut threads = Vec::new();
        for (&algorithm, count) in algorithms.iter().zip(&done) {
            let hasher = Hasher::new(algorithm, algorithms.len() == 1)?;
            let (sender, receiver) = sync_channel(WAITING);
            senders.push(sender);
            let tick = |bytes| tick(count, bytes);
            let thread = std::thread::Builder::new()
                .name(algorithm.name().to_owned())
                .spawn_scoped(scope, move || {
                    worker::started();
                    hash(hasher, &receiver, &tick)
                })
                .map_err(|error| Error::io("cannot start a thread", error))?;
            threads.push((algorithm, thread));
        }
        let swept = chain.sweep(ciphers, range, |swept| {
            let swept = Arc::new(swept);
            senders
                .iter()
                .try_for_each(|sender| sender.send(Arc::clone(&swept)).map_err(|_| stopped_early()))
        });
        drop(senders);
        let (mut digests, mut stopped) = (Digests::new(), None);
        for (algorithm, thread) in threads {
            match thread.join() {
                Ok(Ok(digest)) => drop(digests.insert(algorithm, digest)),
                Ok(Err(error)) => drop(stopped.get_or_insert(error)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        // Why a hash stopped is why the sweep had to, not the other way round.
        match stopped {
            Some(error) => Err(error),
            None => swept.map(|()| digests),
        }
    })
}

fn stopped_early() -> Error {
    Error::new(ErrorKind::Io("a thread that hashes has ended early".to_owned()))
}

/// Hashes what comes, until nothing more does.
fn hash(
    mut hasher: Hasher,
    units: &Receiver<Arc<Swept>>,
    tick: &dyn Fn(usize) -> Result<()>,
) -> Result<Digest> {
    for unit in units {
        for (range, content) in unit.chunks() {
            match content {
                Content::Bytes(bytes) => {
                    hasher.update(bytes);
                    tick(bytes.len())?;
                }
                Content::Zeros => {
                    let mut left = range.length().get();
                    while left > 0 {
                        let zeros = &ZEROS[..piece_of(left)];
                        hasher.update(zeros);
                        tick(zeros.len())?;
                        left -= zeros.len() as u64;
                    }
                }
            }
        }
    }
    Ok(hasher.finish())
}

/// As many of `left` bytes as are hashed in one go.
fn piece_of(left: u64) -> usize {
    usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()))
}

/// A hash on its way.
enum Hasher {
    Sha256(Box<sha2::Sha256>),
    Blake3(Box<blake3::Hasher>),
    /// BLAKE3, which can use several cores, where no other hash is slower anyway. In a pool
    /// of its own: waiting for those who read would be waiting for each other.
    Blake3Spread(Box<blake3::Hasher>, rayon::ThreadPool),
}

impl Hasher {
    fn new(algorithm: Algorithm, alone: bool) -> Result<Self> {
        let threads = rayon::current_num_threads();
        Ok(match algorithm {
            Algorithm::Sha256 => Self::Sha256(Box::default()),
            Algorithm::Blake3 if alone && threads > 1 => {
                let pool = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .start_handler(|_| worker::started())
                    .build();
                let fail = |error| Error::io("cannot start threads", std::io::Error::other(error));
                Self::Blake3Spread(Box::default(), pool.map_err(fail)?)
            }
            Algorithm::Blake3 => Self::Blake3(Box::default()),
        })
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Blake3Spread(hasher, pool) if bytes.len() >= SPREAD_FROM => {
                pool.install(|| {
                    hasher.update_rayon(bytes);
                });
            }
            Self::Blake3(hasher) | Self::Blake3Spread(hasher, _) => {
                hasher.update(bytes);
            }
        }
    }

    fn finish(self) -> Digest {
        Digest(match self {
            Self::Sha256(hasher) => hasher.finalize().into(),
            Self::Blake3(hasher) | Self::Blake3Spread(hasher, _) => *hasher.finalize().as_bytes(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::chain::tests::{chain_over, layers};
    use crate::read::tests::{ciphers, disk, file};

    const BOTH: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Blake3];

    fn expected(bytes: &[u8]) -> Digests {
        let blake3 = Digest(*blake3::hash(bytes).as_bytes());
        [(Algorithm::Sha256, Digest::sha256(bytes)), (Algorithm::Blake3, blake3)].into()
    }

    fn never_stops(_: ByteLen) -> Result<()> {
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_disk_has_the_hashes_of_its_bytes(layers in layers()) {
            let chain = chain_over(layers.clone(), file);
            let expected = expected(&disk(&layers));
            let all = chain.hash(ciphers(), &BOTH.into(), &never_stops).unwrap();
            prop_assert_eq!(&all, &expected);
            for algorithm in BOTH {
                let one = chain.hash(ciphers(), &[algorithm].into(), &never_stops).unwrap();
                prop_assert_eq!(one, [(algorithm, expected[&algorithm])].into());
            }
        }
    }

    #[test]
    fn the_hashes_are_those_of_their_standards() {
        let hex = |name: Algorithm, bytes: &[u8]| expected(bytes)[&name].to_string();
        // FIPS 180-2, appendix B.1, and BLAKE3's test_vectors.json, input_len 0 and 3.
        assert_eq!(
            hex(Algorithm::Sha256, b"abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            hex(Algorithm::Blake3, b""),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
        assert_eq!(
            hex(Algorithm::Blake3, &[0, 1, 2]),
            "e1be4d7a8ab5560aa4199eea339849ba8e293d55ca0a81006726d184519e647f"
        );
    }

    #[test]
    fn a_file_is_hashed_to_its_last_byte_and_no_further() {
        for length in [0, 1, 511, 512, 1000, 3 << 20, (3 << 20) + 17] {
            let bytes: Vec<u8> = (0..251).cycle().take(length).collect();
            let source = Arc::new(Source::from_bytes("x", bytes.clone()));
            let found = hash_file(&source, &BOTH.into(), &never_stops).unwrap();
            assert_eq!(found, expected(&bytes), "{length}");
        }
    }

    #[test]
    fn zeros_longer_than_any_buffer_are_hashed_unread() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let length = 2 * ZEROS.len() + 12345;
        file.as_file().set_len(length as u64).unwrap();
        let source = Arc::new(Source::open(file.path()).unwrap());
        let found = hash_file(&source, &BOTH.into(), &never_stops).unwrap();
        assert_eq!(found, expected(&vec![0; length]));
    }

    #[test]
    fn the_tick_tells_how_far_all_are_and_can_stop_the_work() {
        let source = Arc::new(Source::from_bytes("x", vec![7; 20 << 20]));
        let most = AtomicU64::new(0);
        let tick = |done: ByteLen| {
            most.fetch_max(done.get(), Ordering::Relaxed);
            Ok(())
        };
        hash_file(&source, &BOTH.into(), &tick).unwrap();
        assert_eq!(most.into_inner(), 20 << 20);
        let stop = |done: ByteLen| match done.get() {
            0..1_000_000 => Ok(()),
            _ => Err(Error::new(ErrorKind::Interrupted(2))),
        };
        let error = hash_file(&source, &BOTH.into(), &stop).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Interrupted(2)), "{error}");
    }
}
