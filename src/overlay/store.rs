//! The file of a store: made, opened again, locked.
//!
//! A kept store is made whole without a name and then linked to it: there is a whole store at
//! the name or what was there before. It is locked on the descriptor that a loop device is to
//! get, so that the lock lasts as long as the device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::linkat;

use super::StoreFile;
use super::exceptions::ExceptionStore;
use super::header::{FIXED_LENGTH, STORE_OFFSET, StoreHeader};
use super::persistent::{HEADER_LENGTH, PersistentHeader};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::{Locked, lock_writer};
use crate::scratch::{
    ScratchPlace, create_named, descriptor_path, open_unnamed, wait_for_the_clock,
};
use crate::source::{FileId, Source};
use crate::units::{ByteLen, HostOffset, Sectors};
use crate::worker::apart;

/// How often a store may come and go while it is opened.
const ATTEMPTS: u32 = 20;

/// The file of a store, open for reading and writing.
#[derive(Debug)]
pub struct Store {
    /// To be given to a loop device.
    pub file: File,
    /// Size of dm-snapshot's chunks.
    pub chunk: Sectors,
    /// Which file it is, where it is kept.
    pub id: Option<FileId>,
    /// Nobody else can take it as long as it is open: it is locked, or has no name.
    pub is_locked: bool,
    /// Where it was made just now.
    made: Option<PathBuf>,
}

impl Store {
    /// A store that has no name and goes with its last user, of a length that dm-snapshot's
    /// part has.
    ///
    /// # Errors
    /// `CannotCreate`: the directory takes no such file.
    pub fn transient(place: &ScratchPlace, header: &StoreHeader) -> Result<Self> {
        let length = file_length(header.length)?;
        place.check_room(0, length)?;
        let file = place.create()?.writer;
        fill(&file, header, length).map_err(|error| cannot_make(error, place.directory()))?;
        Ok(Self { file, chunk: header.chunk, id: None, is_locked: true, made: None })
    }

    /// The kept store at `path`, made where nothing is there. An existing one is checked
    /// against `header`, which says what the image is now; `size`, where it was asked for, may
    /// make it longer.
    ///
    /// # Errors
    /// It is no store, or not one of this image as it is now; it is in use, or can't be made.
    pub fn kept(path: &Path, header: &StoreHeader, size: Option<ByteLen>) -> Result<Self> {
        for _ in 0..ATTEMPTS {
            let is_missing = path.metadata().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
            let is_made = is_missing && {
                // A later write to the image is to be seen by its time.
                header.files.iter().filter_map(StoreFile::modified).for_each(wait_for_the_clock);
                make(path, header)?
            };
            let found = read(path).and_then(|found| match found {
                Some(found) => found.taken(path, header, size),
                None => Ok(None),
            });
            if let Some(mut store) = found.map_err(|error| error.at_path(path))? {
                store.made = is_made.then(|| path.to_owned());
                return Ok(store);
            }
        }
        let message = "no store stays there: others make and remove it, or it is a symbolic link to what is not there";
        Err(Error::new(ErrorKind::CannotCreate(message.to_owned())).at_path(path))
    }

    /// What the user should know of it.
    pub fn warning(&self) -> Option<&'static str> {
        (!self.is_locked).then_some(
            "the file system of the store has no locks: nothing keeps other machines and programs from writing to it, which destroys it",
        )
    }

    /// Keeps a store that was made just now. Dropped before, it goes: it got no use.
    pub fn keep(&mut self) {
        self.made = None;
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(path) = self.made.take()
            && FileId::of_path(&path) == self.id
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The file of a store as it is found, not yet locked.
struct Found {
    file: File,
    header: StoreHeader,
}

impl Found {
    /// Locks it and checks all of it; none where it is no longer at `path`: whoever made it has
    /// taken it away again, or it was renamed. Without a name, nobody could keep it.
    fn taken(
        self,
        path: &Path,
        header: &StoreHeader,
        size: Option<ByteLen>,
    ) -> Result<Option<Store>> {
        let Self { file, header: found } = self;
        found.check(header)?;
        let is_locked = lock_writer(&file)? == Locked::Yes;
        // All that follows under the lock: whoever had it may have filled it.
        let metadata = file.metadata().map_err(cannot_look)?;
        let id = Some(FileId::of(&metadata));
        if FileId::of_path(path) != id {
            return Ok(None);
        }
        let length = ByteLen::new(metadata.len().saturating_sub(STORE_OFFSET));
        found.check_persistent(&read_persistent(&file)?, length)?;
        check_exceptions(path, &file, found.disk)?;
        if let Some(size) = size
            && size != length
        {
            grow(&file, length, size)?;
        }
        Ok(Some(Store { file, chunk: found.chunk, id, is_locked, made: None }))
    }
}

fn cannot_look(error: io::Error) -> Error {
    Error::io("cannot look at the store", error)
}

/// Opens what is at `path` for reading and writing, and reads its header; none where nothing is
/// there.
fn read(path: &Path) -> Result<Option<Found>> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let metadata = match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(cannot_look)?,
    };
    if !metadata.file_type().is_file() {
        let what = match metadata.file_type() {
            kind if kind.is_block_device() => "a block device",
            kind if kind.is_dir() => "a directory",
            _ => "no regular file",
        };
        return Err(Error::new(ErrorKind::CannotCreate(format!(
            "this is {what}: a store has to be a file"
        ))));
    }
    let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    let file = match file {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let message = "the store lies on a file system that is read-only";
            let error = Error::new(ErrorKind::CannotCreate(message.to_owned())).with_source(error);
            return Err(error);
        }
        other => other.map_err(|error| Error::io("cannot open the store for writing", error))?,
    };
    let header = read_header(&file)?;
    Ok(Some(Found { file, header }))
}

/// The header of an open store.
///
/// # Errors
/// It can't be read, or is none.
pub fn read_header(file: &File) -> Result<StoreHeader> {
    let mut first = [0; FIXED_LENGTH];
    read_up_to(file, &mut first, 0)?;
    let mut bytes = vec![0; StoreHeader::length_of(&first)?];
    read_up_to(file, &mut bytes, 0)?;
    StoreHeader::parse(&bytes)
}

/// The header of dm-snapshot's part of an open store.
///
/// # Errors
/// It can't be read, or is none.
pub fn read_persistent(file: &File) -> Result<PersistentHeader> {
    let mut bytes = [0; HEADER_LENGTH];
    read_up_to(file, &mut bytes, STORE_OFFSET)?;
    PersistentHeader::parse(&bytes).map_err(|error| error.at_offset(STORE_OFFSET))
}

/// Checks all that the kernel is going to read of an open store, of a disk of this size.
///
/// # Errors
/// As [`ExceptionStore::check`].
fn check_exceptions(path: &Path, file: &File, disk: Sectors) -> Result<()> {
    let look = || Ok((file.metadata()?.len(), file.try_clone()?));
    let (length, file) = look().map_err(cannot_look)?;
    let source = Source::from_reader(path, ByteLen::new(length), Box::new(file));
    let disk = disk.to_bytes().ok_or_else(|| Error::invalid("a disk of more than 2^64 bytes"))?;
    apart(|| {
        ExceptionStore::open(&source, HostOffset::new(STORE_OFFSET), ByteLen::new(disk))?.check()
    })
}

/// Fills the buffer; with zeros past the end of the file, which are no header of anything.
fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    match file.read_exact_at(buffer, at) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other.map_err(|error| Error::io("cannot read the store", error).at_offset(at)),
    }
}

/// Length of a store's file whose part of dm-snapshot is so long.
fn file_length(store: ByteLen) -> Result<u64> {
    let length = store.get().checked_add(STORE_OFFSET);
    length.filter(|&length| i64::try_from(length).is_ok()).ok_or_else(|| {
        Error::new(ErrorKind::CannotCreate("the store would be longer than any file".to_owned()))
    })
}

/// Refuses a length past the limit at which the kernel would end the process by SIGXFSZ.
fn check_limit(length: u64) -> Result<()> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if length > limit => Err(Error::new(ErrorKind::CannotCreate(format!(
            "the store is {length} bytes long with its holes, and this process may write files of at most {limit} (RLIMIT_FSIZE, 'ulimit -f')"
        )))),
        _ => Ok(()),
    }
}

/// Writes an empty store into an empty file, all of it holes but the headers.
fn fill(file: &File, header: &StoreHeader, length: u64) -> Result<()> {
    let persistent = PersistentHeader { chunk: header.chunk, valid: true }.to_bytes()?;
    let bytes = header.to_bytes()?;
    check_limit(length)?;
    let write = || {
        file.set_len(length)?;
        file.write_all_at(&bytes, 0)?;
        file.write_all_at(&persistent, STORE_OFFSET)
    };
    write().map_err(|error| Error::io("cannot write", error))
}

/// Makes a store at `path`, where nothing is; false where somebody else was faster: then it is
/// theirs that is there.
fn make(path: &Path, header: &StoreHeader) -> Result<bool> {
    let length = file_length(header.length)?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let made = |error: io::Error| Error::io("no store can be made", error);
    let attempt = || {
        if let Ok(file) = open_unnamed(directory)
            && File::open(descriptor_path(&file)).is_ok()
        {
            fill(&file, header, length)?;
            file.sync_all().map_err(made)?;
            let from = descriptor_path(&file);
            let linked = linkat(AT_FDCWD, &from, AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW);
            return linked.map_err(|errno| made(errno.into()));
        }
        let (file, temporary) = create_named(directory).map_err(made)?;
        let written = fill(&file, header, length).and_then(|()| {
            file.sync_all().map_err(made)?;
            let flags = RenameFlags::RENAME_NOREPLACE;
            renameat2(AT_FDCWD, &temporary, AT_FDCWD, path, flags)
                .or_else(|_| linkat(AT_FDCWD, &temporary, AT_FDCWD, path, AtFlags::empty()))
                .map_err(|errno| made(errno.into()))
        });
        let _ = std::fs::remove_file(&temporary);
        written
    };
    match attempt() {
        Err(error) if is_there(&error) => Ok(false),
        Err(error) => Err(cannot_make(error, path)),
        Ok(()) => File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map(|()| true)
            .map_err(|error| cannot_make(made(error), path)),
    }
}

fn cause(error: &Error) -> Option<&io::Error> {
    std::error::Error::source(error)?.downcast_ref()
}

fn is_there(error: &Error) -> bool {
    cause(error).is_some_and(|cause| cause.kind() == io::ErrorKind::AlreadyExists)
}

/// The error of a store that can't be made.
fn cannot_make(error: Error, path: &Path) -> Error {
    let why = match cause(&error).map(io::Error::kind) {
        Some(io::ErrorKind::StorageFull) => "the file system is full",
        Some(io::ErrorKind::QuotaExceeded) => "the quota is used up",
        Some(io::ErrorKind::ReadOnlyFilesystem) => "the file system is read-only",
        Some(io::ErrorKind::NotFound) => "there is no such directory",
        Some(io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput) => {
            "the file system takes no file that long, holes and all: choose another place, or limit it with --overlay-size"
        }
        _ => return error.at_path(path),
    };
    let kind = ErrorKind::CannotCreate(format!("no store can be made: {why}"));
    error.with_kind(kind).at_path(path)
}

/// Makes dm-snapshot's part of a store longer. The header keeps the first length: where a store
/// is cut back to that and something lay behind, its exceptions tell.
fn grow(file: &File, length: ByteLen, size: ByteLen) -> Result<()> {
    if size < length {
        return Err(Error::new(ErrorKind::Usage(format!(
            "the store has room for {} bytes already: --overlay-size can make it larger, and not smaller",
            length.get()
        ))));
    }
    let new = file_length(size)?;
    check_limit(new)?;
    file.set_len(new).and_then(|()| file.sync_all()).map_err(|error| {
        Error::new(ErrorKind::CannotCreate(format!("the store can't be made {new} bytes long")))
            .with_source(error)
    })
}

#[cfg(test)]
mod tests;
