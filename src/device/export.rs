//! What was written to an attached disk, as of one moment.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::disk::DeviceDisk;
use super::linux::LinuxKernel;
use super::list::Attached;
use super::overlay::{self, AttachedOverlay, OverlayState};
use super::suspend::{Still, Suspended};
use super::{DeviceReader, Interrupt, Kernel, PathState, fault, sys};
use crate::convert::InputReader;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::overlay::STORE_OFFSET;
use crate::overlay::input::Origin;
use crate::partition::Disk;
use crate::scratch::{create_named, open_unnamed};
use crate::source::{Allocation, FileId, ReadAt, Source};
use crate::units::{ByteLen, GuestOffset, HostOffset, SECTOR_SIZE};

/// The store of an attached disk, which does not change as long as this lives.
#[derive(Debug)]
pub struct Moment<'k> {
    source: Source,
    start: HostOffset,
    suspended: Option<Suspended<'k>>,
    since: Instant,
    held_still: Duration,
}

impl<'k> Moment<'k> {
    /// Takes hold of the store of `attached`, so that what is read of it is of one moment.
    ///
    /// All of its device, and what stands on it, is suspended for that. It goes on at once where
    /// the file system can have the store share its blocks with a second file (XFS, btrfs); else
    /// not before [`end`](Self::end), or when this is dropped. `outputs` are the files, with their
    /// names, that what is read goes to.
    ///
    /// # Errors
    /// The disk takes no writes; its store was given up; an output lies on the device itself;
    /// what the system says, or `interrupt` came. The device goes on then.
    pub fn take(
        kernel: &'k LinuxKernel,
        attached: &Attached,
        outputs: &[(&Path, &File)],
        interrupt: &Interrupt<'_>,
    ) -> Result<Self> {
        let overlay = overlay_of(attached)?;
        require_usable(attached, &overlay.state)?;
        let still = Still::of(kernel, attached.number)?;
        still.check(kernel, outputs)?;
        let file = kept_file(overlay)?;
        let copy = file.as_ref().and_then(|(path, _)| unnamed_beside(path));
        if let Some((_, file)) = &file {
            // What is written out now need not be while all wait.
            let _ = file.sync_data();
        }
        let lock = kernel.lock(interrupt)?;
        let since = Instant::now();
        let suspended = still.suspend(kernel, interrupt)?;
        drop(lock);
        // It may have been given up just now.
        require_usable(attached, &overlay::state(kernel, &attached.uuid)?)?;
        let (source, start) = match file {
            Some((path, file)) => {
                let clone = copy.filter(|copy| sys::clone_range(&file, 0, 0, copy, 0).is_ok());
                fault::point(format_args!("clone"))?;
                if let Some(clone) = clone {
                    suspended.resume()?;
                    let held_still = since.elapsed();
                    let source = source_of(&clone, &path)?;
                    let start = HostOffset::new(STORE_OFFSET);
                    return Ok(Self { source, start, suspended: None, since, held_still });
                }
                (source_of(&file, &path)?, STORE_OFFSET)
            }
            None => (loop_source(kernel, overlay)?, 0),
        };
        let (start, suspended) = (HostOffset::new(start), Some(suspended));
        Ok(Self { source, start, suspended, since, held_still: Duration::ZERO })
    }

    /// The file of the store, and where dm-snapshot's part starts in it.
    pub fn store(&self) -> (&Source, HostOffset) {
        (&self.source, self.start)
    }

    /// The device has to wait until all is read.
    pub fn holds_still(&self) -> bool {
        self.suspended.is_some()
    }

    /// Lets the device go on; tells how long it was suspended.
    ///
    /// # Errors
    /// It can't be resumed.
    pub fn end(mut self) -> Result<Duration> {
        if let Some(suspended) = self.suspended.take() {
            suspended.resume()?;
            self.held_still = self.since.elapsed();
        }
        Ok(self.held_still)
    }
}

/// What a disk that takes writes lies on.
///
/// # Errors
/// `Usage` where it takes none.
pub fn overlay_of(attached: &Attached) -> Result<&AttachedOverlay> {
    attached.overlay.as_ref().ok_or_else(|| {
        Error::new(ErrorKind::Usage(format!(
            "'{}' takes no writes, so there is nothing to export: 'imgdm attach --overlay' makes a device that does",
            printable(&attached.name)
        )))
    })
}

fn require_usable(attached: &Attached, state: &OverlayState) -> Result<()> {
    match state {
        // What did not fail to be written is in a full one.
        OverlayState::Usable { .. } | OverlayState::Full => Ok(()),
        OverlayState::Invalid => Err(Error::invalid(format!(
            "the kernel has given up the store of '{}', which could not be written: what was changed is lost. The image is unhurt",
            printable(&attached.name)
        ))),
        OverlayState::Other(words) => Err(Error::new(ErrorKind::Unsupported(format!(
            "the kernel says of the store of '{}': {words}",
            printable(&attached.name)
        )))),
    }
}

/// The file of a kept store, where it still is at its path.
fn kept_file(overlay: &AttachedOverlay) -> Result<Option<(PathBuf, File)>> {
    let path = overlay.path.as_ref().filter(|path| path.state == PathState::Same);
    let Some(path) = path.map(|path| path.path.clone()) else { return Ok(None) };
    let failed = |error| Error::io("cannot open the store", error).at_path(&path);
    let id = FileId::of_path(&path);
    let file = File::open(&path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    Ok((Some(FileId::of(&metadata)) == id).then_some((path, file)))
}

/// A file without a name in the directory of `path`; none where there can't be one.
fn unnamed_beside(path: &Path) -> Option<File> {
    let directory = path.parent()?;
    open_unnamed(directory).ok().or_else(|| {
        let (file, name) = create_named(directory).ok()?;
        std::fs::remove_file(name).ok()?;
        Some(file)
    })
}

/// What an open file holds, which goes by `path`.
fn source_of(file: &File, path: &Path) -> Result<Source> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(Source::open(Path::new(&link)).map_err(|error| error.at_path(path))?.named(path))
}

/// The store as its loop device shows it, past the page cache of that.
fn loop_source(kernel: &LinuxKernel, overlay: &AttachedOverlay) -> Result<Source> {
    let number = overlay.store.ok_or_else(|| {
        let message = "the loop device over the store is not to be seen".to_owned();
        Error::new(ErrorKind::NotFound(message))
    })?;
    let (size, _) = kernel.block_device(number)?;
    let length = size.to_bytes().unwrap_or(u64::MAX / SECTOR_SIZE * SECTOR_SIZE);
    let reader = Sectors { reader: kernel.reader(number)?, length };
    let path = kernel.block_device_path(number);
    Ok(Source::from_reader(path, ByteLen::new(length), Box::new(reader)))
}

/// Reads a device, which gives whole sectors, at any byte.
struct Sectors {
    reader: Arc<dyn DeviceReader>,
    length: u64,
}

impl std::fmt::Debug for Sectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sectors").field("length", &self.length).finish_non_exhaustive()
    }
}

impl ReadAt for Sectors {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(self.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(rest);
        let buffer = &mut buffer[..wanted];
        if buffer.is_empty() {
            return Ok(0);
        }
        if offset.is_multiple_of(SECTOR_SIZE) && (wanted as u64).is_multiple_of(SECTOR_SIZE) {
            self.reader.read_at(offset, buffer)?;
            return Ok(wanted);
        }
        // Both ends are on the device, which is of whole sectors.
        let start = offset / SECTOR_SIZE * SECTOR_SIZE;
        let end = (offset + wanted as u64).next_multiple_of(SECTOR_SIZE);
        let too_long = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut sectors = vec![0; usize::try_from(end - start).map_err(too_long)?];
        self.reader.read_at(start, &mut sectors)?;
        let skipped = usize::try_from(offset - start).map_err(too_long)?;
        buffer.copy_from_slice(&sectors[skipped..skipped + wanted]);
        Ok(wanted)
    }

    fn allocation(&self, offset: HostOffset) -> io::Result<Allocation> {
        match offset.get() < self.length {
            true => Ok(Allocation::Data { until: HostOffset::new(self.length) }),
            false => Ok(Allocation::Hole { until: None }),
        }
    }
}

/// The disk below an attached one that takes writes, as the kernel serves it.
pub struct DeviceOrigin(DeviceDisk<'static>);

impl DeviceOrigin {
    /// Opens it. It is not suspended when what lies over it is.
    ///
    /// # Errors
    /// The disk takes no writes; what the system says.
    pub fn of(kernel: &LinuxKernel, attached: &Attached) -> Result<Self> {
        DeviceDisk::open(kernel, overlay_of(attached)?.disk).map(Self)
    }
}

impl Origin for DeviceOrigin {
    fn reader(&self) -> Box<dyn InputReader + Send + '_> {
        Box::new(OriginReader(self.0.clone()))
    }
}

struct OriginReader(DeviceDisk<'static>);

impl InputReader for OriginReader {
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        Disk::read(&mut self.0, offset, buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbered;

    impl DeviceReader for Numbered {
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            assert!(offset.is_multiple_of(512) && buffer.len().is_multiple_of(512));
            assert!(offset + buffer.len() as u64 <= 2048);
            for (at, byte) in (offset..).zip(buffer) {
                *byte = u8::try_from(at / 8 % 256).unwrap();
            }
            Ok(())
        }
    }

    #[test]
    fn a_device_is_read_at_any_byte_up_to_its_end() {
        let sectors = Sectors { reader: Arc::new(Numbered), length: 2048 };
        let source = Source::from_reader("/dev/x", ByteLen::new(2048), Box::new(sectors));
        let mut all = vec![0; 3000];
        assert_eq!(source.read_up_to(HostOffset::ZERO, &mut all).unwrap(), 2048);
        for (offset, length) in [(0, 16), (500, 20), (512, 512), (511, 1025), (2040, 8)] {
            let mut part = vec![0; length];
            source.read_exact(HostOffset::new(offset as u64), &mut part, "it").unwrap();
            assert_eq!(part, all[offset..offset + length]);
        }
        assert!(source.read_exact(HostOffset::new(2041), &mut [0; 8], "it").is_err());
    }
}
