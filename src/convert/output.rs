//! The file that is written: a regular one that grows, or a block device that does not.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate, posix_fallocate};
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, ErrorKind, Result};

/// Zeros that are written at a time.
const ZEROS: usize = 1 << 20;

/// A file that a writer writes its metadata to.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutputFile<'f> {
    file: &'f File,
    /// Bytes of a block device.
    capacity: Option<u64>,
    /// What errors name; else who made it knows.
    name: Option<&'f Path>,
}

impl<'f> OutputFile<'f> {
    pub(super) fn new(file: &'f File) -> Result<Self> {
        let fail = |error| Error::io("cannot look at the output", error);
        let metadata = file.metadata().map_err(fail)?;
        let capacity = if metadata.file_type().is_block_device() {
            let end = lseek(file, 0, Whence::SeekEnd).map_err(|errno| fail(errno.into()))?;
            Some(end.unsigned_abs())
        } else {
            None
        };
        Ok(Self { file, capacity, name: None })
    }

    /// With a name for its errors.
    pub(super) fn named(self, name: &'f Path) -> Self {
        Self { name: Some(name), ..self }
    }

    fn failed(self, error: Error) -> Error {
        match self.name {
            Some(name) => error.at_path(name),
            None => error,
        }
    }

    /// As a block device of that many bytes.
    #[cfg(test)]
    pub(super) fn of_device(file: &'f File, capacity: u64) -> Self {
        Self { file, capacity: Some(capacity), name: None }
    }

    pub(super) fn file(self) -> &'f File {
        self.file
    }

    /// True where what is not written may be anything.
    pub(super) fn is_block_device(self) -> bool {
        self.capacity.is_some()
    }

    /// Whether the first `end` bytes can be there.
    pub(super) fn require_room(self, end: u64) -> Result<()> {
        match self.capacity {
            Some(capacity) if end > capacity => {
                Err(self.failed(Error::new(ErrorKind::CannotCreate(format!(
                    "the block device holds {capacity} bytes, and the image takes more: it is no \
                     smaller than {end}"
                )))))
            }
            _ if i64::try_from(end).is_err() => {
                Err(self.failed(Error::new(ErrorKind::CannotCreate(format!(
                    "the image takes {end} bytes, more than a file can have"
                )))))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn write(self, offset: u64, bytes: &[u8], what: &str) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|error| {
            self.failed(Error::io(format!("cannot write {what}"), error).at_offset(offset))
        })
    }

    /// Makes zeros of what was never written.
    pub(super) fn blank(self, offset: u64, length: u64) -> Result<()> {
        if self.is_block_device() { self.zero(offset, length) } else { Ok(()) }
    }

    /// Zeros in a range of a block device, as fast as it can.
    pub(super) fn zero(self, offset: u64, length: u64) -> Result<()> {
        let range = libc::off_t::try_from(offset).ok().zip(libc::off_t::try_from(length).ok());
        if let Some((at, length)) = range
            && fallocate(self.file, FallocateFlags::FALLOC_FL_ZERO_RANGE, at, length).is_ok()
        {
            return Ok(());
        }
        self.write_zeros(offset, length)
    }

    /// Writes zeros.
    pub(super) fn write_zeros(self, mut offset: u64, mut length: u64) -> Result<()> {
        let zeros = vec![0; usize::try_from(length).unwrap_or(ZEROS).min(ZEROS)];
        while length > 0 {
            let part = length.min(zeros.len() as u64);
            let bytes = usize::try_from(part).ok().and_then(|part| zeros.get(..part));
            self.write(offset, bytes.unwrap_or_default(), "zeros")?;
            offset += part;
            length -= part;
        }
        Ok(())
    }

    /// Has the file system keep space.
    pub(super) fn reserve(self, offset: u64, length: u64) -> Result<()> {
        let fail = |error| self.failed(Error::io("cannot allocate space", error).at_offset(offset));
        let too_far = || fail(io::Error::from_raw_os_error(libc::EFBIG));
        let at = libc::off_t::try_from(offset).map_err(|_| too_far())?;
        let length = libc::off_t::try_from(length).map_err(|_| too_far())?;
        posix_fallocate(self.file, at, length).map_err(|errno| fail(errno.into()))
    }

    /// Gives a regular file its length.
    pub(super) fn set_length(self, length: u64) -> Result<()> {
        if self.is_block_device() {
            return Ok(());
        }
        let fail =
            |error| self.failed(Error::io(format!("cannot make it {length} bytes long"), error));
        self.file.set_len(length).map_err(fail)
    }

    /// On a block device, where an old image can shine through: waits until what was written is
    /// there for good.
    pub(super) fn settle(self) -> Result<()> {
        if !self.is_block_device() {
            return Ok(());
        }
        let fail = |error| self.failed(Error::io("cannot write the data out", error));
        self.file.sync_data().map_err(fail)
    }
}
