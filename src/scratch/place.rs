//! Where the scratch file lies: a directory with room, and a file there that nobody else
//! can see and that goes away with the last one who holds it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::sys::statvfs::statvfs;

use crate::error::{Error, ErrorKind, Result};

/// On disk and kept over a reboot, so that a large scratch file takes no memory.
const DEFAULT_DIRECTORY: &str = "/var/tmp";
/// What an initrd has.
const FALLBACK_DIRECTORY: &str = "/run";
/// What names start with that a file has for a moment only.
pub(super) const TEMPORARY_PREFIX: &str = ".imgdm-";
/// `RAMFS_MAGIC` of linux/magic.h, the file system of an initramfs.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// A directory for scratch files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScratchPlace {
    directory: PathBuf,
}

/// A file that has no name any more, open twice.
#[derive(Debug)]
pub struct ScratchFile {
    /// Open for reading and writing, to be filled and then closed.
    pub writer: File,
    /// Open for reading only, to be given to a loop device.
    pub reader: File,
}

impl ScratchPlace {
    /// The directory asked for; without one /var/tmp or, where no file can be made in that,
    /// /run. It is tried out, for permissions tell little: of a read-only file system, or
    /// of one like /proc.
    ///
    /// # Errors
    /// `CannotCreate`, naming the directory: no file can be made in it; without one asked
    /// for, in neither of the two.
    pub fn choose(directory: Option<&Path>) -> Result<Self> {
        let try_out = |directory: PathBuf| {
            let place = Self { directory };
            place.create().map(|_| place)
        };
        if let Some(directory) = directory {
            return try_out(
                std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned()),
            );
        }
        let usual = try_out(DEFAULT_DIRECTORY.into());
        usual.or_else(|error| try_out(FALLBACK_DIRECTORY.into()).map_err(|_| error))
    }

    /// A directory that is known to be there.
    pub(super) fn in_directory(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The directory, an absolute path.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// True where a scratch file takes memory: on tmpfs and ramfs.
    pub fn in_memory(&self) -> bool {
        statfs(&self.directory)
            .is_ok_and(|found| [TMPFS_MAGIC, RAMFS_MAGIC].contains(&found.filesystem_type()))
    }

    /// Bytes that can still be written there, what is reserved for root left out; 2^64 - 1
    /// where the file system has no limit or does not say.
    pub fn free_bytes(&self) -> u64 {
        match statvfs(&self.directory) {
            // A ramfs, and a tmpfs without a size, has no blocks at all.
            Ok(found) if found.blocks() != 0 => {
                found.blocks_available().saturating_mul(found.fragment_size())
            }
            _ => u64::MAX,
        }
    }

    /// Checks that a scratch file can be made of `length` bytes, holes and all, of which
    /// `bytes` are written at most. Makes one and leaves nothing behind. Quotas of users
    /// are no matter, since root is not bound by them; those of directories show in what
    /// is free.
    ///
    /// # Errors
    /// `CannotCreate`: no file can be made, too little is free, or the process (by
    /// RLIMIT_FSIZE) or the file system takes no file that long.
    pub fn check_room(&self, bytes: u64, length: u64) -> Result<()> {
        self.check_room_with(bytes, length, 0)
    }

    /// As [`check_room`](Self::check_room), where `soon` bytes more will be free.
    pub(super) fn check_room_with(&self, bytes: u64, length: u64, soon: u64) -> Result<()> {
        let free = self.free_bytes().saturating_add(soon);
        if bytes > free {
            return Err(Error::new(ErrorKind::CannotCreate(format!(
                "the scratch file takes {bytes} bytes, and {free} are free in this directory{}",
                if self.in_memory() { " (it is in memory)" } else { "" },
            )))
            .at_path(&self.directory));
        }
        set_length(&self.create()?.writer, length, &self.directory)
    }

    /// Makes an empty file that only its holders can reach, mode 0600. The kernel frees it
    /// when the last of them has closed it.
    ///
    /// # Errors
    /// `CannotCreate`, naming the directory.
    pub fn create(&self) -> Result<ScratchFile> {
        let made = self.create_unnamed().or_else(|_| self.create_and_unlink());
        made.map_err(|error| {
            let message = format!("no scratch file can be made in this directory: {error}");
            Error::new(ErrorKind::CannotCreate(message)).at_path(&self.directory)
        })
    }

    fn create_unnamed(&self) -> io::Result<ScratchFile> {
        let writer = open_unnamed(&self.directory)?;
        // Without a name, /proc is the only way to it.
        let reader = File::open(descriptor_path(&writer))?;
        Ok(ScratchFile { writer, reader })
    }

    /// For file systems without O_TMPFILE (overlay on some kernels, NFS), and without /proc.
    fn create_and_unlink(&self) -> io::Result<ScratchFile> {
        let (writer, path) = create_named(&self.directory)?;
        let reader = File::open(&path);
        std::fs::remove_file(&path)?;
        Ok(ScratchFile { writer, reader: reader? })
    }
}

/// Opens a new file in `directory` that has no name (O_TMPFILE), mode 0600.
pub(crate) fn open_unnamed(directory: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
    options.open(directory)
}

/// Makes a new file under a name that nothing has, mode 0600.
pub(crate) fn create_named(directory: &Path) -> io::Result<(File, PathBuf)> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    let mut number = 0u32;
    loop {
        let path = directory.join(format!("{TEMPORARY_PREFIX}{}-{number}", std::process::id()));
        match options.open(&path) {
            Ok(file) => return Ok((file, path)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < 10_000 => {
                number += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The path under which /proc shows an open file.
pub(crate) fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Makes an empty file of `directory` that long, all of it a hole.
///
/// # Errors
/// `CannotCreate`: RLIMIT_FSIZE, where the kernel would end the process by SIGXFSZ, or the
/// file system does not allow it.
pub(super) fn set_length(file: &File, length: u64, directory: &Path) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if length > limit => Err(Error::new(ErrorKind::CannotCreate(format!(
            "the scratch file is {length} bytes long with its holes, and this process may write files of at most {limit} (RLIMIT_FSIZE, 'ulimit -f')"
        )))
        .at_path(directory)),
        _ => file.set_len(length).map_err(|error| cannot_write(error, length, directory)),
    }
}

/// The error of a scratch file that can't be written or made that long.
pub(super) fn cannot_write(error: io::Error, length: u64, directory: &Path) -> Error {
    let why = match error.kind() {
        io::ErrorKind::StorageFull => "the file system of this directory is full",
        io::ErrorKind::QuotaExceeded => "the quota in this directory is used up",
        // Past 2^63 the length is no valid one, whatever the file system.
        io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput => {
            "the file system of this directory takes no file that long"
        }
        _ => "it can't be written",
    };
    let message = format!("no scratch file of {length} bytes (with holes) can be filled: {why}");
    Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(directory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn without_a_directory_there_is_a_default() {
        let place = ScratchPlace::choose(None).unwrap();
        let known = [DEFAULT_DIRECTORY, FALLBACK_DIRECTORY].map(Path::new);
        assert!(known.contains(&place.directory()));
    }

    #[test]
    fn a_directory_asked_for_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = ScratchPlace::choose(Some(&missing)).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
        assert!(error.to_string().starts_with(&missing.display().to_string()), "{error}");
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        for place in [file.as_path(), Path::new("/proc"), Path::new("/sys"), Path::new("/dev/null")]
        {
            let error = ScratchPlace::choose(Some(place)).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
            assert_eq!(error.path(), Some(place), "{error}");
        }
        let missing = dir.path().join("a/b");
        ScratchPlace::choose(Some(&missing)).unwrap_err();
        ScratchPlace::choose(Some(dir.path())).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "it leaves nothing");
    }

    #[test]
    fn a_scratch_file_has_no_name_and_two_handles() {
        let dir = tempfile::tempdir().unwrap();
        let place = ScratchPlace::choose(Some(dir.path())).unwrap();
        for file in [place.create().unwrap(), place.create_and_unlink().unwrap()] {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
            file.writer.write_all_at(b"inflated", 0).unwrap();
            let mut read = [0; 8];
            file.reader.read_exact_at(&mut read, 0).unwrap();
            assert_eq!(&read, b"inflated");
            file.reader.write_all_at(b"x", 0).unwrap_err();
            let metadata = file.writer.metadata().unwrap();
            assert_eq!((metadata.nlink(), metadata.permissions().mode() & 0o777), (0, 0o600));
        }
    }

    #[test]
    fn too_little_room_is_said_with_both_sizes() {
        let place = ScratchPlace::choose(None).unwrap();
        let free = place.free_bytes();
        place.check_room(1, 1).unwrap();
        if free != u64::MAX {
            let error = place.check_room(u64::MAX, 1).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
            assert!(error.to_string().contains(&u64::MAX.to_string()), "{error}");
            place.check_room_with(u64::MAX, 1, u64::MAX).unwrap();
            place.check_room_with(u64::MAX, 1, 1 << 30).unwrap_err();
        }
        // No file system takes a file that long.
        let error = place.check_room(1, 1 << 63).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)));
        assert!(error.to_string().contains("no file that long"), "{error}");
    }
}
