//! An attached device as a disk to look at.

use std::path::PathBuf;
use std::sync::Arc;

use super::{DeviceNumber, DeviceReader, Interrupt, Kernel};
use crate::error::{Error, ErrorKind, Result};
use crate::partition::Disk;
use crate::units::{ByteLen, GuestOffset, SECTOR_SIZE};

/// A device that is read as the kernel serves it: decrypted, with all layers.
#[derive(Clone)]
pub struct DeviceDisk<'a> {
    reader: Arc<dyn DeviceReader>,
    size: ByteLen,
    path: PathBuf,
    interrupt: Interrupt<'a>,
}

impl<'a> DeviceDisk<'a> {
    /// Opens the device of these numbers.
    ///
    /// # Errors
    /// What the system says.
    pub fn open<K: Kernel>(kernel: &K, number: DeviceNumber) -> Result<Self> {
        let (size, _) = kernel.block_device(number)?;
        let size = size.to_bytes().unwrap_or(u64::MAX / SECTOR_SIZE * SECTOR_SIZE);
        let (reader, path) = (kernel.reader(number)?, kernel.block_device_path(number));
        let interrupt = Interrupt::never();
        Ok(Self { reader, size: ByteLen::new(size), path, interrupt })
    }

    /// No longer to be read once a signal came: what is looked for may take many reads.
    #[must_use]
    pub fn interrupted_by(self, interrupt: Interrupt<'a>) -> Self {
        Self { interrupt, ..self }
    }
}

impl Disk for DeviceDisk<'_> {
    fn size(&self) -> ByteLen {
        self.size
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.interrupt.check()?;
        let here = |error: Error| error.at_offset(offset.get()).at_path(&self.path);
        let failed = |error| here(Error::io("cannot read the device", error));
        let outside = || {
            let what = format!("{} bytes from there are past the end of the device", buffer.len());
            here(Error::new(ErrorKind::Io(what)))
        };
        // The sectors around what is asked for: the device is read by whole ones.
        let start = offset.get() / SECTOR_SIZE * SECTOR_SIZE;
        let end = offset.get().checked_add(buffer.len() as u64).ok_or_else(outside)?;
        let end = end.checked_next_multiple_of(SECTOR_SIZE).filter(|&end| end <= self.size.get());
        let end = end.ok_or_else(outside)?;
        if (start, end) == (offset.get(), offset.get() + buffer.len() as u64) {
            return self.reader.read_at(start, buffer).map_err(failed);
        }
        let mut sectors = vec![0; usize::try_from(end - start).map_err(|_| outside())?];
        self.reader.read_at(start, &mut sectors).map_err(failed)?;
        let skipped = usize::try_from(offset.get() - start).map_err(|_| outside())?;
        buffer.copy_from_slice(&sectors[skipped..skipped + buffer.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Each byte is the low byte of its sector's number.
    struct Numbered;

    impl DeviceReader for Numbered {
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            assert!(offset.is_multiple_of(512) && buffer.len().is_multiple_of(512));
            for (at, byte) in (offset..).zip(buffer) {
                *byte = (at / 512).to_le_bytes()[0];
            }
            Ok(())
        }
    }

    #[test]
    fn any_bytes_are_read_by_whole_sectors_and_none_past_the_end() {
        let (reader, size) = (Arc::new(Numbered), ByteLen::new(4 * 512));
        let interrupt = Interrupt::never();
        let mut disk = DeviceDisk { reader, size, path: PathBuf::new(), interrupt };
        for (offset, length) in [(0, 512), (511, 2), (1, 100), (600, 1448), (2047, 1), (2048, 0)] {
            let mut buffer = vec![0xee; length];
            disk.read(GuestOffset::new(offset), &mut buffer).unwrap();
            let wanted: Vec<u8> =
                (offset..).take(length).map(|at| (at / 512).to_le_bytes()[0]).collect();
            assert_eq!(buffer, wanted, "{offset}+{length}");
        }
        for (offset, length) in [(2047, 2), (2048, 1), (u64::MAX, 1), (u64::MAX - 4, 2)] {
            let read = disk.read(GuestOffset::new(offset), &mut vec![0; length]);
            assert!(read.is_err(), "{offset}+{length}");
        }
    }

    #[test]
    fn nothing_is_read_once_a_signal_came() {
        let signal = AtomicUsize::new(0);
        let (reader, size) = (Arc::new(Numbered), ByteLen::new(4 * 512));
        let disk = DeviceDisk { reader, size, path: PathBuf::new(), interrupt: Interrupt::never() };
        let mut disk = disk.interrupted_by(Interrupt::new(&signal));
        disk.read(GuestOffset::ZERO, &mut [0; 512]).unwrap();
        signal.store(15, Ordering::Relaxed);
        let error = disk.read(GuestOffset::ZERO, &mut [0; 512]).unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Interrupted(15));
    }
}
