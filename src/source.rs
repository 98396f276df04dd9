//! Reading images: files, block devices, and memory for tests.
//!
//! Everything is read with positioned reads on a descriptor opened read-only; a
//! [`Source`] is never written and has no cursor that matters (SEEK_DATA and
//! SEEK_HOLE move the shared one, and nothing reads by it).

use std::fmt;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, PosixFadviseAdvice, fcntl, posix_fadvise};
use nix::libc;
use nix::unistd::{Whence, lseek};

use crate::error::{Error, ErrorKind, Result};
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

/// What identifies a file whatever its names: device and inode numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// `st_dev` of a regular file, `st_rdev` of a block device.
    pub device: u64,
    /// `st_ino` of a regular file, 0 for a block device (it may have many nodes).
    pub inode: u64,
}

impl FileId {
    /// What is at `path`, symbolic links followed; `None` where nothing can be seen there.
    pub fn of_path(path: &Path) -> Option<Self> {
        std::fs::metadata(path).ok().as_ref().map(Self::of)
    }

    /// What `metadata` is of.
    pub fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self { device: metadata.rdev(), inode: 0 }
        } else {
            Self { device: metadata.dev(), inode: metadata.ino() }
        }
    }
}

/// What of a regular file changes when its content does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStamp {
    /// Inode number.
    pub inode: u64,
    /// Length in bytes.
    pub length: u64,
    /// Time of the last modification: seconds since 1970 and nanoseconds.
    pub modified: (i64, i64),
    /// Time of the last change of the inode, which nobody can set: seconds since 1970 and
    /// nanoseconds.
    pub changed: (i64, i64),
}

impl FileStamp {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// Whether the bytes from an offset on are allocated in the host's file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Data up to (not including) this offset.
    Data {
        /// First byte past the data.
        until: HostOffset,
    },
    /// A hole up to this offset, `None` where it runs to the end of the file.
    Hole {
        /// First byte of the next data.
        until: Option<HostOffset>,
    },
}

/// Finds unwritten extents (FIEMAP_EXTENT_UNWRITTEN): preallocated space that reads
/// as zero, and that SEEK_DATA calls data once its zero pages are in the page cache.
///
/// The device side implements it with an ioctl; the pure core only asks.
pub trait UnwrittenProbe: Send + Sync + fmt::Debug {
    /// The unwritten ranges of `file` that meet `start..end`, in order, clipped to it.
    ///
    /// # Errors
    /// What the ioctl says; EOPNOTSUPP where the file system has no FIEMAP.
    fn unwritten(
        &self,
        file: &File,
        start: HostOffset,
        end: HostOffset,
    ) -> io::Result<Vec<(HostOffset, HostOffset)>>;

    /// True where it is certain that nobody has `file` open for writing (F_SETLEASE with
    /// F_RDLCK): only then can FIEMAP be trusted.
    fn nobody_writes(&self, file: &File) -> bool;
}

/// Bytes that can be read at any offset, by several threads.
pub trait ReadAt: Send + Sync + fmt::Debug {
    /// Reads as pread(2) does: at least a byte, but at the end.
    ///
    /// # Errors
    /// The read failed.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Whether the bytes from an offset on are data or a hole, and how far.
    ///
    /// # Errors
    /// Nobody can tell.
    fn allocation(&self, offset: HostOffset) -> io::Result<Allocation>;
}

impl ReadAt for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }

    fn allocation(&self, offset: HostOffset) -> io::Result<Allocation> {
        // The cases D1 to D4 and H1 to H4 of find_allocation() in QEMU's
        // block/file-posix.c, so that a map comes out the same.
        let start = libc::off_t::try_from(offset.get()).map_err(|_| Errno::EOVERFLOW)?;
        let data = match lseek(self, start, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => return Ok(Allocation::Hole { until: None }),
            Err(errno) => return Err(errno.into()),
        };
        if data > start {
            return Ok(Allocation::Hole { until: Some(HostOffset::new(data.unsigned_abs())) });
        }
        let hole = match lseek(self, start, Whence::SeekHole) {
            Ok(hole) => hole,
            Err(Errno::ENXIO) => return Ok(Allocation::Hole { until: None }),
            Err(errno) => return Err(errno.into()),
        };
        if data < start || hole <= start {
            // Not a valid answer: the file changed between the two calls.
            return Err(Errno::EBUSY.into());
        }
        Ok(Allocation::Data { until: HostOffset::new(hole.unsigned_abs()) })
    }
}

/// An image in memory.
#[derive(Debug)]
struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or(&[]);
        let n = rest.len().min(buffer.len());
        buffer[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }

    fn allocation(&self, offset: HostOffset) -> io::Result<Allocation> {
        let length = self.0.len() as u64;
        if offset.get() >= length {
            return Ok(Allocation::Hole { until: None });
        }
        Ok(Allocation::Data { until: HostOffset::new(length) })
    }
}

fn refuse_what_is_no_image(metadata: &Metadata) -> Result<()> {
    let file_type = metadata.file_type();
    let what = if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        return Ok(());
    };
    Err(Error::new(ErrorKind::InvalidImage(format!(
        "this is {what}, not an image file or a block device"
    ))))
}

/// Opens for reading what `handle` (O_PATH) is of; by its path where there is no /proc.
fn reopen(handle: &File, path: &Path) -> io::Result<File> {
    // O_NONBLOCK: should a FIFO be at the path by now, it must not be waited for.
    let open = |path: &Path, flags: libc::c_int| {
        let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
        OpenOptions::new().read(true).custom_flags(flags).open(path)
    };
    // O_NOATIME is for the file's owner and the mighty only.
    let open = |path: &Path| match open(path, libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(path, 0),
        other => other,
    };
    match open(Path::new(&format!("/proc/self/fd/{}", handle.as_raw_fd()))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let file = open(path)?;
            let is_same = FileId::of(&file.metadata()?) == FileId::of(&handle.metadata()?);
            // Another file has come there since, and nobody said that it may be opened.
            if is_same { Ok(file) } else { Err(Errno::ESTALE.into()) }
        }
        other => other,
    }
}

/// One file of an image: where it is, how long, and how to read it.
#[derive(Debug)]
pub struct Source {
    name: PathBuf,
    length: ByteLen,
    allocated: Option<ByteLen>,
    modified: Option<i64>,
    id: Option<FileId>,
    block_device: bool,
    reader: Reader,
    unwritten: Option<Arc<dyn UnwrittenProbe>>,
    /// From here on the file is known to be a hole: a large sparse file is not asked
    /// again for each of its windows.
    trailing_hole: AtomicU64,
}

#[derive(Debug)]
enum Reader {
    File(File),
    Other(Box<dyn ReadAt>),
}

impl Source {
    /// Opens a regular file or block device read-only, without changing its access
    /// time where the kernel permits that (O_NOATIME: the owner, or CAP_FOWNER).
    ///
    /// # Errors
    /// The open failed, or it is neither a regular file nor a block device.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |error| Error::io("cannot open the file", error).at_path(path);
        // Looked at before it is opened for real: opening alone does something with some
        // devices (a watchdog starts, a tape rewinds), and an image may name any of them.
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
        Self::of_handle(&handle.map_err(fail)?, path)
    }

    /// The same of the file that `handle` (O_PATH) is of, which goes by that path.
    pub(crate) fn of_handle(handle: &File, path: &Path) -> Result<Self> {
        let fail = |error| Error::io("cannot open the file", error).at_path(path);
        refuse_what_is_no_image(&handle.metadata().map_err(fail)?)
            .map_err(|error| error.at_path(path))?;
        let file = reopen(handle, path).map_err(fail)?;
        let metadata = file.metadata().map_err(fail)?;
        refuse_what_is_no_image(&metadata).map_err(|error| error.at_path(path))?;
        let mut source = Self {
            name: path.to_owned(),
            length: ByteLen::ZERO,
            allocated: None,
            modified: None,
            id: Some(FileId::of(&metadata)),
            block_device: metadata.file_type().is_block_device(),
            reader: Reader::File(file),
            unwritten: None,
            trailing_hole: AtomicU64::new(u64::MAX),
        };
        source.refresh()?;
        Ok(source)
    }

    /// Looks again at the length and times, which a writer may have changed until locks
    /// kept it out.
    ///
    /// # Errors
    /// The file can't be looked at.
    pub fn refresh(&mut self) -> Result<()> {
        let Reader::File(file) = &self.reader else { return Ok(()) };
        let fail = |error| Error::io("cannot look at the file", error).at_path(&self.name);
        let metadata = file.metadata().map_err(fail)?;
        let length = if self.block_device {
            // A block device's st_size is 0; its end is where SEEK_END goes.
            lseek(file, 0, Whence::SeekEnd).map_err(|errno| fail(errno.into()))?.unsigned_abs()
        } else {
            metadata.len()
        };
        self.length = ByteLen::new(length);
        self.trailing_hole = AtomicU64::new(u64::MAX);
        // A block device allocates nothing by stat; QEMU reads it the same way.
        self.allocated = Some(ByteLen::new(metadata.blocks().saturating_mul(SECTOR_SIZE)));
        self.modified = Some(metadata.mtime());
        Ok(())
    }

    /// An image in memory, for tests and fuzzing: no identity, no holes.
    pub fn from_bytes(name: impl Into<PathBuf>, bytes: Vec<u8>) -> Self {
        let length = ByteLen::new(bytes.len() as u64);
        Self::from_reader(name, length, Box::new(Memory(bytes)))
    }

    /// So many bytes that are to be read in another way than from a descriptor: no identity.
    pub fn from_reader(name: impl Into<PathBuf>, length: ByteLen, reader: Box<dyn ReadAt>) -> Self {
        Self {
            name: name.into(),
            length,
            allocated: None,
            modified: None,
            id: None,
            block_device: false,
            reader: Reader::Other(reader),
            unwritten: None,
            trailing_hole: AtomicU64::new(u64::MAX),
        }
    }

    /// Has it go by another path than it was opened by: a loop device that shows a file
    /// stands for the file.
    #[must_use]
    pub fn named(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.name);
        self
    }

    /// The path it was opened by, as QEMU would print it (perhaps relative).
    pub fn path(&self) -> &Path {
        &self.name
    }

    /// The path from the root, with `.` and symbolic links of directories left as
    /// they are; the path itself where the working directory cannot be told.
    pub fn absolute_path(&self) -> PathBuf {
        std::path::absolute(&self.name).unwrap_or_else(|_| self.name.clone())
    }

    /// Length in bytes when it was opened, or last [refreshed](Self::refresh).
    pub fn length(&self) -> ByteLen {
        self.length
    }

    /// Bytes that the host's file system has allocated to it (`st_blocks`).
    pub fn allocated(&self) -> Option<ByteLen> {
        self.allocated
    }

    /// Seconds of the last modification since 1970.
    pub fn modified(&self) -> Option<i64> {
        self.modified
    }

    /// Device and inode; none for an image in memory.
    pub fn id(&self) -> Option<FileId> {
        self.id
    }

    /// What the kernel says of the file at this moment; `None` of a block device, whose
    /// content changes without a trace, and of an image in memory.
    ///
    /// # Errors
    /// The file can't be looked at.
    pub fn stamp(&self) -> Result<Option<FileStamp>> {
        match &self.reader {
            Reader::File(file) if !self.block_device => {
                let metadata = file.metadata();
                let fail = |error| Error::io("cannot look at the file", error).at_path(&self.name);
                Ok(Some(FileStamp::of(&metadata.map_err(fail)?)))
            }
            _ => Ok(None),
        }
    }

    /// True where reading it leaves the file's access time as it is: it is open with
    /// O_NOATIME, which is for its owner and the mighty, or it is no file.
    pub fn leaves_access_time(&self) -> bool {
        let flags = |file: &File| fcntl(file, FcntlArg::F_GETFL).unwrap_or(0);
        self.file().is_none_or(|file| flags(file) & libc::O_NOATIME != 0)
    }

    /// True for a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// The open descriptor, to be locked and given to a loop device.
    pub fn file(&self) -> Option<&File> {
        match &self.reader {
            Reader::File(file) => Some(file),
            Reader::Other(_) => None,
        }
    }

    /// From now on unwritten extents count as holes. Only for a file that nobody
    /// writes: FIEMAP tells of the moment, the page cache may be ahead of it.
    pub fn set_unwritten_probe(&mut self, probe: Arc<dyn UnwrittenProbe>) {
        self.unwritten = Some(probe);
    }

    fn reader(&self) -> &dyn ReadAt {
        match &self.reader {
            Reader::File(file) => file,
            Reader::Other(other) => &**other,
        }
    }

    /// Reads as many bytes as there are, up to the buffer's length.
    ///
    /// # Errors
    /// The read failed.
    pub fn read_up_to(&self, offset: HostOffset, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset.saturating_add(ByteLen::new(done as u64));
            match self.reader().read_at(&mut buffer[done..], at.get()) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io("cannot read", error)
                        .at_path(&self.name)
                        .at_offset(at.get()));
                }
            }
        }
        Ok(done)
    }

    /// Fills the buffer, with zeros for what lies past the end of the file, as QEMU reads
    /// images that end inside of a cluster (bdrv_aligned_preadv() in its block/io.c).
    ///
    /// # Errors
    /// The read failed.
    pub fn read_with_zeros(&self, offset: HostOffset, buffer: &mut [u8]) -> Result<()> {
        let read = self.read_up_to(offset, buffer)?;
        buffer[read..].fill(0);
        Ok(())
    }

    /// Fills the buffer.
    ///
    /// # Errors
    /// The read failed, or the file ends before the buffer is full: `what` then
    /// names, for the message, the piece of metadata that is cut off.
    pub fn read_exact(&self, offset: HostOffset, buffer: &mut [u8], what: &str) -> Result<()> {
        let done = self.read_up_to(offset, buffer)?;
        if done == buffer.len() {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{what} ({} bytes) lies outside the file, which is {} bytes long: the image is truncated or corrupt",
            buffer.len(),
            self.length.get(),
        ))
        .at_path(&self.name)
        .at_offset(offset.get()))
    }

    /// Has the kernel fetch these bytes while the caller does something else. Only a hint,
    /// of which nothing is said where it is not taken.
    pub fn read_ahead(&self, offset: HostOffset, length: ByteLen) {
        let Reader::File(file) = &self.reader else { return };
        let (Ok(offset), Ok(length)) =
            (libc::off_t::try_from(offset.get()), libc::off_t::try_from(length.get()))
        else {
            return;
        };
        let _ = posix_fadvise(file, offset, length, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    }

    /// Whether the bytes from `offset` on are data or a hole, and how far (SEEK_DATA
    /// and SEEK_HOLE). A file system that cannot tell has no holes, as in QEMU.
    pub fn allocation(&self, offset: HostOffset) -> Allocation {
        if offset.get() >= self.trailing_hole.load(Ordering::Relaxed) {
            return Allocation::Hole { until: None };
        }
        let unknown = Allocation::Data { until: HostOffset::new(u64::MAX) };
        let allocation = self.reader().allocation(offset).unwrap_or(unknown);
        if allocation == (Allocation::Hole { until: None }) {
            self.trailing_hole.fetch_min(offset.get(), Ordering::Relaxed);
        }
        allocation
    }

    /// The unwritten ranges that meet `start..end`; none where nobody asked for them
    /// or the file system cannot tell.
    pub fn unwritten(&self, start: HostOffset, end: HostOffset) -> Vec<(HostOffset, HostOffset)> {
        match (&self.unwritten, &self.reader) {
            (Some(probe), Reader::File(file)) => {
                probe.unwritten(file, start, end).unwrap_or_default()
            }
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_file_is_truncated_metadata() {
        let source = Source::from_bytes("x.qcow2", vec![0; 10]);
        let error = source
            .read_exact(HostOffset::new(4), &mut [0; 8], "the header")
            .expect_err("only 6 bytes are there");
        assert!(error.to_string().starts_with("x.qcow2: at offset 0x4: the header (8 bytes)"));
    }

    #[test]
    fn an_own_file_is_read_without_a_trace() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(Source::open(file.path()).unwrap().leaves_access_time());
    }

    #[test]
    fn a_directory_is_refused_by_name() {
        let error = Source::open(Path::new("/")).expect_err("a directory");
        assert!(error.to_string().contains("a directory"), "{error}");
    }

    #[test]
    fn holes_are_found() {
        use std::io::{Seek, SeekFrom, Write};
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let source = Source::open(file.path()).unwrap();
        let data = HostOffset::new(1 << 20);
        assert_eq!(source.allocation(HostOffset::ZERO), Allocation::Hole { until: Some(data) });
        assert!(matches!(source.allocation(data), Allocation::Data { .. }));
        assert_eq!(source.allocation(HostOffset::new(3 << 20)), Allocation::Hole { until: None });
    }
}
