//! A piece of the disk that can't be had: where it is, and why.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, printable};
use crate::inflate::InflateFault;
use crate::units::{ByteLen, GuestRange, HostOffset};

/// A piece of the disk that can't be read or does not inflate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FailedCluster {
    /// Which part of the disk.
    pub guest: GuestRange,
    /// The layer that has it: 0 the active layer.
    pub layer: u32,
    /// The layer's file.
    pub path: Arc<Path>,
    /// Where in that file its bytes start.
    pub host: HostOffset,
    /// How many bytes they are; of a compressed cluster, at most.
    pub length: ByteLen,
    /// What is the matter.
    pub why: FailedWhy,
}

/// What is the matter with a [`FailedCluster`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailedWhy {
    /// Its stream is not one.
    Inflate(InflateFault),
    /// The file can't be read there: errno, 0 where there is none.
    Read(i32),
}

impl FailedWhy {
    /// Of a read that failed.
    pub(crate) fn of_read(error: &Error) -> Self {
        let source = std::error::Error::source(error);
        let errno = source.and_then(|source| source.downcast_ref::<io::Error>()?.raw_os_error());
        Self::Read(errno.unwrap_or(0))
    }
}

impl fmt::Display for FailedWhy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inflate(fault) => fault.fmt(f),
            Self::Read(0) => f.write_str("cannot read"),
            Self::Read(errno) => {
                write!(f, "cannot read: {}", io::Error::from_raw_os_error(*errno))
            }
        }
    }
}

impl fmt::Display for FailedCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} to {}: {}: {} to {}: {}",
            self.guest.start,
            self.guest.end,
            printable(&self.path.to_string_lossy()),
            self.host,
            self.host.saturating_add(self.length),
            self.why
        )
    }
}

impl FailedCluster {
    /// The error that refuses the image because of it.
    pub fn to_error(&self) -> Error {
        let end = self.host.saturating_add(self.length);
        let place =
            format!("guest offset {} (bytes {} to {end} of the file)", self.guest.start, self.host);
        match self.why {
            FailedWhy::Inflate(InflateFault::NoZstd) => Error::new(ErrorKind::Unsupported(
                "the image has clusters compressed by zstd, and zstd is not available (is this imgdm built without the feature 'device'?)".to_owned(),
            )),
            FailedWhy::Inflate(fault) => {
                Error::invalid(format!("the compressed cluster of {place} does not inflate: {fault}"))
            }
            FailedWhy::Read(errno) => Error::io(
                format!("cannot read what the file has for {place}"),
                io::Error::from_raw_os_error(errno),
            ),
        }
        .at_path(&self.path)
        .at_offset(self.host.get())
    }
}
