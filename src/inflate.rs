//! Inflating one compressed cluster, by QEMU's rules of what is accepted.
//!
//! The streams are a stranger's: nothing is written past the cluster, and the memory used
//! does not depend on what a stream says of itself.

use flate2::{Decompress, FlushDecompress};

use crate::format::qcow2::Compression;

/// Why a stream does not give a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InflateFault {
    /// The stream breaks its format's rules.
    #[error("the compressed data is damaged")]
    Damaged,
    /// The stream ends, or is cut off, before the cluster is full.
    #[error("the compressed data gives less than a cluster")]
    TooShort,
    /// The stream does not end where the cluster is full. (Only zstd's have to.)
    #[error("the compressed data gives more than a cluster")]
    TooLong,
    /// Not the stream's fault: this build has no zstd, or zstd got no memory.
    #[error("zstd is not available")]
    NoZstd,
}

/// Inflates clusters one after the other and keeps its tables between them. One for each
/// thread.
#[derive(Debug)]
pub struct Inflater {
    deflate: Decompress,
    #[cfg(feature = "device")]
    zstd: Option<zstd::Zstd>,
}

impl Default for Inflater {
    fn default() -> Self {
        Self::new()
    }
}

impl Inflater {
    /// Some 50 KiB; zstd's tables (160 KiB) are made with its first cluster.
    pub fn new() -> Self {
        Self {
            // With QEMU's 12 bits the result would be the same (the whole cluster is in
            // one buffer, which is where distances reach), but a reset would cost more.
            deflate: Decompress::new(false),
            #[cfg(feature = "device")]
            zstd: None,
        }
    }

    /// Fills `cluster` from `stream`, which can have other bytes after its end.
    ///
    /// # Errors
    /// What QEMU does not accept. The bytes of `cluster` mean nothing then.
    pub fn inflate(
        &mut self,
        method: Compression,
        stream: &[u8],
        cluster: &mut [u8],
    ) -> Result<(), InflateFault> {
        match method {
            Compression::Zlib => self.inflate_deflate(stream, cluster),
            Compression::Zstd => self.inflate_zstd(stream, cluster),
        }
    }

    /// qcow2_zlib_decompress() in QEMU's block/qcow2-threads.c, and decompress_buffer()
    /// in block/qcow.c: the cluster has to be full, and no fault found in the stream up to
    /// where it would give one more byte. Its end need not come.
    fn inflate_deflate(&mut self, stream: &[u8], cluster: &mut [u8]) -> Result<(), InflateFault> {
        self.deflate.reset(false);
        match self.deflate.decompress(stream, cluster, FlushDecompress::Finish) {
            Err(_) => Err(InflateFault::Damaged),
            Ok(_) if self.deflate.total_out() == cluster.len() as u64 => Ok(()),
            Ok(_) => Err(InflateFault::TooShort),
        }
    }

    #[cfg(feature = "device")]
    fn inflate_zstd(&mut self, stream: &[u8], cluster: &mut [u8]) -> Result<(), InflateFault> {
        if self.zstd.is_none() {
            self.zstd = Some(zstd::Zstd::new().ok_or(InflateFault::NoZstd)?);
        }
        match &mut self.zstd {
            Some(zstd) => zstd.inflate(stream, cluster),
            None => Err(InflateFault::NoZstd),
        }
    }

    #[cfg(not(feature = "device"))]
    #[allow(clippy::unused_self)]
    fn inflate_zstd(&mut self, _: &[u8], _: &mut [u8]) -> Result<(), InflateFault> {
        Err(InflateFault::NoZstd)
    }
}

/// zstd's streaming decoder. It is C, so it comes with the feature `device` only.
#[cfg(feature = "device")]
mod zstd {
    use std::fmt;

    use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

    use super::InflateFault;

    pub(super) struct Zstd(DCtx<'static>);

    impl fmt::Debug for Zstd {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Zstd")
        }
    }

    impl Zstd {
        pub(super) fn new() -> Option<Self> {
            let mut context = DCtx::try_create()?;
            // Decoded right into the cluster, which is there whole: there is no window of
            // up to 128 MiB to be allocated because a frame says that it needs one.
            context.set_parameter(DParameter::StableOutBuffer(true)).ok()?;
            Some(Self(context))
        }

        /// qcow2_zstd_decompress() in QEMU's block/qcow2-threads.c: frames are decoded
        /// until the cluster is full, and the last one must have come to its end then.
        pub(super) fn inflate(
            &mut self,
            stream: &[u8],
            cluster: &mut [u8],
        ) -> Result<(), InflateFault> {
            self.0.reset(ResetDirective::SessionOnly).map_err(|_| InflateFault::NoZstd)?;
            let size = cluster.len();
            let mut output = OutBuffer::around(cluster);
            let mut input = InBuffer::around(stream);
            let mut wanted = 0;
            while output.pos() < size {
                let before = (output.pos(), input.pos());
                wanted = self
                    .0
                    .decompress_stream(&mut output, &mut input)
                    .map_err(|_| InflateFault::Damaged)?;
                if (output.pos(), input.pos()) == before {
                    return Err(InflateFault::TooShort);
                }
            }
            if wanted == 0 { Ok(()) } else { Err(InflateFault::TooLong) }
        }

        /// Bytes of memory it takes.
        #[cfg(test)]
        pub(super) fn size(&self) -> usize {
            self.0.sizeof()
        }
    }
}

#[cfg(test)]
mod tests;
