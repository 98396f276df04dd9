//! Writing raw images: the bytes of the disk at their own offsets.

use std::fs::File;

use super::create::NewImage;
use super::options::{Preallocation, RawOptions};
use super::output::OutputFile;
use super::{ImageWriter, Placed};
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Bytes of what can be a hole: a block of most file systems, and of what `qemu-img convert`
/// looks for zeros in.
const GRANULARITY: u64 = 4096;

/// Bytes that are best read at a time.
const AT_ONCE: u64 = 64 << 10;

/// Writes a raw image: a sparse file, or a block device.
#[derive(Debug)]
pub struct RawWriter<'f> {
    image: OutputFile<'f>,
    size: u64,
    preallocation: Preallocation,
    /// Everything before this has been spoken of, or passed over.
    done: u64,
}

impl<'f> RawWriter<'f> {
    /// Gives the file its length.
    ///
    /// # Errors
    /// `CannotCreate`: the block device is too small, or the file system holds no such file.
    pub fn new(new: &NewImage<'f>, options: &RawOptions) -> Result<Self> {
        let image = OutputFile::new(new.file)?;
        let size = new.size.get();
        image.require_room(size)?;
        image.set_length(size)?;
        Ok(Self { image, size, preallocation: options.preallocation, done: 0 })
    }

    /// What lies between the last range and this one was never spoken of: zeros.
    fn fill_up(&mut self, to: u64) -> Result<()> {
        let (from, length) = (self.done, to.saturating_sub(self.done));
        self.done = self.done.max(to);
        match self.preallocation {
            _ if length == 0 => Ok(()),
            Preallocation::Full => self.image.write_zeros(from, length),
            // There are no holes in a block device, to read as zeros.
            _ if self.image.is_block_device() => self.image.zero(from, length),
            Preallocation::Falloc => self.image.reserve(from, length),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
        }
    }
}

impl ImageWriter for RawWriter<'_> {
    fn granularity(&self) -> u64 {
        GRANULARITY
    }

    fn cluster_size(&self) -> u64 {
        AT_ONCE
    }

    fn has_zeros(&self) -> bool {
        true
    }

    fn data(&mut self, range: GuestRange, placed: &mut Vec<Placed>) -> Result<()> {
        self.fill_up(range.start.get())?;
        self.done = range.end.get();
        placed.push(Placed { range, offset: HostOffset::new(range.start.get()) });
        Ok(())
    }

    fn zeros(&mut self, _: GuestRange) -> Result<()> {
        // What nobody speaks of is zeros, and the longer the run the better.
        Ok(())
    }

    fn compressed(&mut self, _: GuestOffset, _: usize) -> Result<HostOffset> {
        let message = "raw images hold nothing compressed";
        Err(crate::error::Error::new(crate::error::ErrorKind::Usage(message.to_owned())))
    }

    fn keeps_offsets(&self) -> bool {
        self.preallocation == Preallocation::Off && !self.image.is_block_device()
    }

    fn pass_over(&mut self, end: GuestOffset) -> Result<()> {
        self.fill_up(end.get().min(self.size))
    }

    fn data_file(&self) -> &File {
        self.image.file()
    }

    fn finish(&mut self) -> Result<()> {
        self.fill_up(self.size)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::units::ByteLen;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
    }

    #[test]
    fn bytes_stay_where_they_are_and_the_file_is_as_long_as_the_disk() {
        let file = tempfile::tempfile().unwrap();
        let new =
            NewImage { file: &file, data_file: None, size: ByteLen::new(1 << 20), backing: None };
        let mut writer = RawWriter::new(&new, &RawOptions::default()).unwrap();
        let mut placed = Vec::new();
        writer.data(range(8192, 12288), &mut placed).unwrap();
        assert_eq!(placed, [Placed { range: range(8192, 12288), offset: HostOffset::new(8192) }]);
        writer.zeros(range(12288, 16384)).unwrap();
        writer.finish().unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn what_is_preallocated_has_its_space() {
        let file = tempfile::tempfile().unwrap();
        let new =
            NewImage { file: &file, data_file: None, size: ByteLen::new(1 << 20), backing: None };
        let options = RawOptions { preallocation: Preallocation::Falloc };
        let mut writer = RawWriter::new(&new, &options).unwrap();
        writer.data(range(8192, 12288), &mut Vec::new()).unwrap();
        writer.finish().unwrap();
        // All but what is data, which nobody has written here.
        assert!(file.metadata().unwrap().blocks() * 512 >= (1 << 20) - 4096);
    }
}
