//! Compressing clusters, with memory that is used again for the next one.

use std::fmt;

use flate2::{Compress, Compression as Level, FlushCompress, Status};

use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Compression;

/// zlib-rs's level that is as small as QEMU's, zlib's 6, on text; there it is the faster one.
const TEXT_LEVEL: u32 = 6;
/// The same for anything else: it takes matches of 3 bytes as zlib does, which its other levels
/// do not. (On text it finds no more, and where there are but a few letters it takes long.)
const BINARY_LEVEL: u32 = 9;
/// QEMU inflates with a window of 4 KiB: no distance may be longer.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Compresses clusters; one for each thread.
pub struct Compressor {
    method: Method,
    stream: Vec<u8>,
}

enum Method {
    Deflate(Box<Deflate>),
    #[cfg(feature = "device")]
    Zstd(zstd_safe::CCtx<'static>),
}

struct Deflate {
    text: Compress,
    binary: Compress,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.method {
            Method::Deflate(_) => "deflate",
            #[cfg(feature = "device")]
            Method::Zstd(_) => "zstd",
        };
        f.debug_struct("Compressor").field("method", &method).finish_non_exhaustive()
    }
}

impl Compressor {
    /// Of qcow2's compression type; qcow has [`Compression::Zlib`].
    ///
    /// # Errors
    /// `Unsupported` for zstd in a build without it; no memory.
    pub fn new(method: Compression) -> Result<Self> {
        let method = match method {
            Compression::Zlib => Method::Deflate(Box::new(Deflate {
                text: deflate(TEXT_LEVEL),
                binary: deflate(BINARY_LEVEL),
            })),
            Compression::Zstd => Self::zstd()?,
        };
        Ok(Self { method, stream: Vec::new() })
    }

    #[cfg(feature = "device")]
    fn zstd() -> Result<Method> {
        let context = zstd_safe::CCtx::try_create();
        let no_memory = || Error::new(ErrorKind::Io("no memory for zstd".to_owned()));
        context.map(Method::Zstd).ok_or_else(no_memory)
    }

    #[cfg(not(feature = "device"))]
    fn zstd() -> Result<Method> {
        Err(Error::new(ErrorKind::Unsupported(
            "this build of imgdm has no zstd: take compression_type=zlib".to_owned(),
        )))
    }

    /// The stream that gives `cluster`, which is whole: past the disk's end it has zeros.
    /// `None` where it would not be shorter, and the cluster is to be stored as it is.
    ///
    /// # Errors
    /// The library fails, which it does not do by itself.
    pub fn compress(&mut self, cluster: &[u8]) -> Result<Option<&[u8]>> {
        // Room for a stream that is longer than the cluster: zlib-rs 0.6 panics where what it
        // takes to store some bytes as they are does not fit in.
        self.stream.resize(cluster.len() + cluster.len() / 4 + 64, 0);
        let failed = |what: String| Error::new(ErrorKind::Io(format!("cannot compress: {what}")));
        let length = match &mut self.method {
            Method::Deflate(deflate) => {
                let Deflate { text, binary } = &mut **deflate;
                let deflate = if is_text(cluster) { text } else { binary };
                deflate.reset();
                match deflate.compress(cluster, &mut self.stream, FlushCompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(deflate.total_out()).ok(),
                    Ok(Status::Ok | Status::BufError) => None,
                    Err(error) => return Err(failed(error.to_string())),
                }
            }
            #[cfg(feature = "device")]
            Method::Zstd(zstd) => zstd.compress2(&mut self.stream[..], cluster).ok(),
        };
        // One of the cluster's length is none: QEMU gives one byte less as well.
        let length = length.filter(|&length| length < cluster.len());
        Ok(length.and_then(|length| self.stream.get(..length)))
    }
}

fn deflate(level: u32) -> Compress {
    Compress::new_with_window_bits(Level::new(level), false, DEFLATE_WINDOW_BITS)
}

/// Whether all but 2 % of a sample are bytes that text in ASCII is made of.
fn is_text(cluster: &[u8]) -> bool {
    // A step that no structure has.
    let sample = cluster.iter().step_by(17);
    let others = sample.clone().filter(|&&byte| !(9..0x80).contains(&byte)).count();
    others * 50 <= sample.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inflate::Inflater;

    /// Numbers, text, both, and what can't be compressed; all of the length of a cluster.
    fn clusters(length: usize) -> Vec<Vec<u8>> {
        let numbers = (0u32..).flat_map(|i| (i.wrapping_mul(i) / 7).to_le_bytes());
        let text =
            (0u32..).flat_map(|i| format!("{} bottles of {}\n", i % 97, i % 89 * 31).into_bytes());
        let mut state = 1u64;
        let noise = std::iter::repeat_with(move || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            state.to_be_bytes()[0]
        });
        let numbers: Vec<u8> = numbers.take(length).collect();
        let text: Vec<u8> = text.take(length).collect();
        let mut both = text.clone();
        both[length / 2..].copy_from_slice(&numbers[length / 2..]);
        vec![numbers, text, both, vec![0; length], noise.take(length).collect()]
    }

    #[test]
    fn what_is_compressed_is_inflated_to_the_same() {
        let mut methods = vec![Compression::Zlib];
        if cfg!(feature = "device") {
            methods.push(Compression::Zstd);
        }
        for method in methods {
            let mut compressor = Compressor::new(method).unwrap();
            let mut inflater = Inflater::new();
            for length in [512, 4096, 65536, 2 << 20] {
                for (index, cluster) in clusters(length).iter().enumerate() {
                    let stream = compressor.compress(cluster).unwrap();
                    let Some(stream) = stream else {
                        assert!(index == 4 || length == 512, "{method:?} {length} {index}");
                        continue;
                    };
                    assert!(stream.len() < length && index != 4);
                    // QEMU knows the length but to a sector.
                    let mut padded = stream.to_vec();
                    padded.resize(stream.len().next_multiple_of(512), 0xff);
                    let mut inflated = vec![1; length];
                    inflater.inflate(method, &padded, &mut inflated).unwrap();
                    assert!(inflated == *cluster, "{method:?} {length} {index}");
                }
            }
        }
    }

    #[test]
    fn no_distance_is_longer_than_a_window_of_4_kib() {
        let noise = clusters(65536).remove(4);
        let repeats = |period: usize| -> Vec<u8> {
            noise[..period].iter().copied().cycle().take(noise.len()).collect()
        };
        let mut compressor = Compressor::new(Compression::Zlib).unwrap();
        // Further back than that there may be the same again: it is not to be found.
        assert_eq!(compressor.compress(&repeats(4097)).unwrap(), None);
        assert_eq!(compressor.compress(&repeats(8192)).unwrap(), None);
        assert!(compressor.compress(&repeats(3500)).unwrap().unwrap().len() < 10_000);
    }

    #[test]
    fn text_is_told_from_numbers() {
        let kinds: Vec<bool> = clusters(65536).iter().map(|cluster| is_text(cluster)).collect();
        assert_eq!(kinds, [false, true, false, false, false]);
        assert!(is_text(b"ab\ncd"));
    }
}
