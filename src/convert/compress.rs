//! Compressing clusters, with memory that is used again for the next one.

use std::fmt;

use flate2::{Compress, Compression as Level, FlushCompress, Status};

use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Compression;

/// Level of deflate: zlib's Z_DEFAULT_COMPRESSION, which QEMU takes.
const DEFLATE_LEVEL: u32 = 6;
/// QEMU inflates with a window of 4 KiB: no distance may be longer.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Compresses clusters; one for each thread.
pub struct Compressor {
    method: Method,
    stream: Vec<u8>,
}

enum Method {
    Deflate(Compress),
    #[cfg(feature = "device")]
    Zstd(zstd_safe::CCtx<'static>),
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
            Compression::Zlib => Method::Deflate(Compress::new_with_window_bits(
                Level::new(DEFLATE_LEVEL),
                false,
                DEFLATE_WINDOW_BITS,
            )),
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
        // A stream of the cluster's length is none: QEMU gives one byte less as well.
        self.stream.resize(cluster.len().saturating_sub(1), 0);
        let failed = |what: String| Error::new(ErrorKind::Io(format!("cannot compress: {what}")));
        let length = match &mut self.method {
            Method::Deflate(deflate) => {
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
        Ok(length.and_then(|length| self.stream.get(..length)))
    }
}
