//! The file that an output becomes: made beside its name, and given the name in the end.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, RenameFlags, renameat2};
use nix::libc;
use nix::unistd::linkat;

use crate::error::{Error, ErrorKind, Result};
use crate::lock;
use crate::source::{FileId, Source};

/// Symbolic links that are followed, as many as by the kernel (MAXSYMLINKS).
const LINKS: u32 = 40;
/// Longest name that room is left in for what is added to it.
const LONG_NAME: usize = 200;
/// Names beside that are tried: others may have left some of them.
const NAMES_BESIDE: u32 = 10_000;

/// An output on its way. Dropped before it is [committed](Self::commit), nothing of it is left
/// (but on a block device).
#[derive(Debug)]
pub struct Target {
    /// Its name as it was given.
    name: PathBuf,
    file: File,
    kind: Kind,
    force: bool,
    /// All but the name is done.
    is_prepared: bool,
}

#[derive(Debug)]
enum Kind {
    /// A file that is to have this name, and has none yet.
    Unnamed(PathBuf),
    /// A file that is to have this name, and has another one beside it.
    Beside { path: PathBuf, beside: PathBuf },
    /// A block device, which is written as it is.
    BlockDevice,
    /// Committed, under this name.
    Done,
}

impl Target {
    /// Starts an output at `name`: symbolic links are followed, also one to nothing yet. What
    /// is there is replaced in the end where it is `force`d, and a block device is written to.
    ///
    /// # Errors
    /// `PermissionDenied`; `CannotCreate`: something is there and may not be replaced, or can't be; there is no
    /// such directory. `InUse`: a virtual machine has it open, or the block device is mounted.
    pub fn create(name: &Path, force: bool) -> Result<Self> {
        let failed = |error: io::Error| cannot_open("the file can't be made", error).at_path(name);
        let existing = match fs::metadata(name) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if let Some(metadata) = &existing {
            require_replaceable(metadata, force).map_err(|error| error.at_path(name))?;
            require_unused(name).map_err(|error| error.at_path(name))?;
            if metadata.file_type().is_block_device() {
                return Self::open_device(name);
            }
        }
        let path = match existing {
            Some(_) => name.canonicalize(),
            None => end_of_links(name),
        };
        let (file, kind) = path.and_then(make).map_err(failed)?;
        Ok(Self::new(name, file, kind, force))
    }

    fn open_device(name: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_EXCL | libc::O_NOCTTY);
        let file = options.open(name).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => Error::new(ErrorKind::InUse(
                "the block device is in use: it is mounted, or another device lies on it"
                    .to_owned(),
            ))
            .at_path(name),
            _ => cannot_open("the block device can't be written", error).at_path(name),
        })?;
        lock_device(&file).map_err(|error| error.at_path(name))?;
        Ok(Self::new(name, file, Kind::BlockDevice, true))
    }

    fn new(name: &Path, file: File, kind: Kind, force: bool) -> Self {
        Self { name: name.to_owned(), file, kind, force, is_prepared: false }
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its name, as it was given.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Where its name is to be, links followed; none for a block device.
    fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::Unnamed(path) | Kind::Beside { path, .. } => Some(path),
            Kind::BlockDevice | Kind::Done => None,
        }
    }

    /// True where both would come to be one and the same.
    pub fn is_same_place(&self, other: &Self) -> bool {
        match (self.path(), other.path()) {
            (Some(a), Some(b)) => {
                let [directory, other] = [a, b].map(|path| FileId::of_path(directory_of(path)));
                a.file_name() == b.file_name() && directory == other
            }
            (None, None) => FileId::of_path(&self.name) == FileId::of_path(&other.name),
            _ => false,
        }
    }

    /// True for a block device, which keeps what was written to it.
    pub fn is_block_device(&self) -> bool {
        matches!(self.kind, Kind::BlockDevice)
    }

    /// True once it has its name.
    pub fn is_committed(&self) -> bool {
        matches!(self.kind, Kind::Done)
    }

    /// Does all that comes before its name: what it replaces hands down its permissions, and
    /// its owner where that is permitted; with `sync`, it is written out, which can take long.
    ///
    /// # Errors
    /// `CannotCreate`: it can't be written out; something of that name has come into being and
    /// may not be replaced. `InUse`: a virtual machine has opened what is to be replaced.
    pub fn prepare(&mut self, sync: bool) -> Result<()> {
        if self.is_prepared {
            return Ok(());
        }
        self.finish_file(sync)
            .map_err(|error| cannot_create("the file can't be finished", error))
            .and_then(|()| self.require_free())
            .map_err(|error| error.at_path(&self.name))?;
        self.is_prepared = true;
        Ok(())
    }

    fn finish_file(&self, sync: bool) -> io::Result<()> {
        let old = self.path().filter(|_| self.force).and_then(|path| fs::metadata(path).ok());
        match (old, &self.kind) {
            (Some(old), _) => inherit(&self.file, &old)?,
            (None, Kind::Beside { .. }) => {
                let mode = 0o666 & !umask();
                self.file.set_permissions(fs::Permissions::from_mode(mode))?;
            }
            (None, _) => {}
        }
        if sync { self.file.sync_all() } else { Ok(()) }
    }

    /// Looks again whether the name may be had: much time has gone by.
    fn require_free(&self) -> Result<()> {
        match self.path() {
            Some(path) if self.force => require_unused(path),
            Some(path) if fs::symlink_metadata(path).is_ok() => Err(exists()),
            _ => Ok(()),
        }
    }

    /// Gives the file its name, [prepared](Self::prepare) if it is not yet; with `sync`, it is
    /// on the disk when this returns.
    ///
    /// # Errors
    /// As [`prepare`](Self::prepare), and then nothing of it is left. `CannotCreate`, though it
    /// [is there](Self::is_committed): the directory can't be written out.
    pub fn commit(&mut self, sync: bool) -> Result<()> {
        self.prepare(sync)?;
        let named = match &self.kind {
            Kind::Unnamed(path) => link(&self.file, path, self.force),
            Kind::Beside { path, beside } => rename(beside, path, self.force),
            Kind::BlockDevice | Kind::Done => Ok(()),
        };
        named.map_err(|error| {
            let is_there = error.kind() == io::ErrorKind::AlreadyExists;
            let failed = |error| cannot_create("the file can't be given its name", error);
            if is_there { exists() } else { failed(error) }.at_path(&self.name)
        })?;
        let path = self.path().map(Path::to_owned);
        self.kind = Kind::Done;
        match path {
            Some(path) if sync => sync_directory(&path).map_err(|error| {
                let message = "it is there and whole, but its directory can't be written out: \
                               after a power failure the name may be missing, or be the old file's";
                cannot_create(message, error).at_path(&self.name)
            }),
            _ => Ok(()),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Kind::Beside { beside, .. } = &self.kind {
            let _ = fs::remove_file(beside);
        }
    }
}

fn cannot_create(message: &str, error: io::Error) -> Error {
    Error::new(ErrorKind::CannotCreate(message.to_owned())).with_source(error)
}

/// As [`cannot_create`], but what is not permitted has a status of its own.
fn cannot_open(message: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::PermissionDenied {
        let kind = ErrorKind::PermissionDenied(message.to_owned());
        return Error::new(kind).with_source(error);
    }
    cannot_create(message, error)
}

fn exists() -> Error {
    let message = "something of that name is there already; --force replaces it";
    Error::new(ErrorKind::CannotCreate(message.to_owned()))
}

fn require_replaceable(existing: &Metadata, force: bool) -> Result<()> {
    let kind = existing.file_type();
    let what = if kind.is_file() {
        return if force { Ok(()) } else { Err(exists()) };
    } else if kind.is_block_device() {
        if force {
            return Ok(());
        }
        return Err(Error::new(ErrorKind::CannotCreate(
            "this is a block device: --force writes over all that it holds".to_owned(),
        )));
    } else if kind.is_dir() {
        "a directory"
    } else {
        "neither a file nor a block device"
    };
    Err(Error::new(ErrorKind::CannotCreate(format!(
        "this is {what}: an image can't be made of it"
    ))))
}

/// Refuses what a virtual machine has open: it would go on with a file that has no name.
fn require_unused(path: &Path) -> Result<()> {
    match Source::open(path) {
        Ok(source) if !lock::others(&source).is_empty() => Err(in_use()),
        _ => Ok(()),
    }
}

fn in_use() -> Error {
    let message = "it is in use by another program (a running virtual machine?) and stays";
    Error::new(ErrorKind::InUse(message.to_owned()))
}

/// Keeps virtual machines from a block device while it is written.
fn lock_device(file: &File) -> Result<()> {
    match lock::lock_writer(file) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.kind(), ErrorKind::InUse(_)) => Err(in_use()),
        Err(error) => Err(error),
    }
}

/// Gives a new file the owner and the permissions of the one it replaces. Where the group can't
/// be given, its permissions are nobody else's: group and others keep what both had.
fn inherit(file: &File, old: &Metadata) -> io::Result<()> {
    let has_group = fchown(file, Some(old.uid()), Some(old.gid())).is_ok()
        || fchown(file, None, Some(old.gid())).is_ok();
    let mode = if has_group { old.mode() & 0o777 } else { mode_for_others(old.mode()) };
    file.set_permissions(fs::Permissions::from_mode(mode))
}

fn mode_for_others(mode: u32) -> u32 {
    let of_both = (mode >> 3) & mode & 0o7;
    mode & 0o700 | of_both << 3 | of_both
}

/// What new files of this process are not to permit.
fn umask() -> u32 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    line.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or_else(|| {
        // The kernel tells it only in exchange for another.
        let mask =
            nix::sys::stat::umask(nix::sys::stat::Mode::S_IRWXG | nix::sys::stat::Mode::S_IRWXO);
        nix::sys::stat::umask(mask);
        mask.bits()
    })
}

/// What a path leads to that leads to no file yet.
///
/// # Errors
/// A link can't be read, or they lead in circles.
pub fn end_of_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&path) {
            // From where the link is; an absolute one replaces all.
            Ok(to) => path = path.parent().unwrap_or(Path::new("")).join(to),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(error) => return Err(error),
        }
    }
    Err(Errno::ELOOP.into())
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// A file that is to be at `path`: with no name, so that it is gone whatever becomes of us;
/// where that can't be had, with a name beside.
fn make(path: PathBuf) -> io::Result<(File, Kind)> {
    let name = path.file_name().ok_or(Errno::EISDIR)?;
    if !path.as_os_str().as_bytes().ends_with(name.as_bytes()) {
        return Err(io::Error::new(
            io::ErrorKind::IsADirectory,
            "a name that ends in '/' is a directory's, and there is none",
        ));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o666);
    // A name is given to it by way of /proc.
    if Path::new("/proc/self/fd").exists() {
        match options.clone().custom_flags(libc::O_TMPFILE).open(directory_of(&path)) {
            Ok(file) => return Ok((file, Kind::Unnamed(path))),
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)
                ) => {}
            Err(error) => return Err(error),
        }
    }
    make_beside(path)
}

fn make_beside(path: PathBuf) -> io::Result<(File, Kind)> {
    let mut options = OpenOptions::new();
    // Whom the finished file permits to read it is not known yet.
    options.read(true).write(true).mode(0o600).create_new(true);
    let (beside, file) = with_name_beside(&path, |beside| options.open(beside))?;
    Ok((file, Kind::Beside { path, beside }))
}

/// Makes something of a name beside `path` that nothing has yet.
fn with_name_beside<T>(
    path: &Path,
    mut make: impl FnMut(&Path) -> io::Result<T>,
) -> io::Result<(PathBuf, T)> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    for _ in 0..NAMES_BESIDE {
        let beside = beside(path, NEXT.fetch_add(1, Ordering::Relaxed));
        match make(&beside) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return Ok((beside, made?)),
        }
    }
    Err(io::Error::other("all names beside it are taken"))
}

/// The name of a file beside `path` until it is finished.
fn beside(path: &Path, number: u32) -> PathBuf {
    let name = path.file_name().filter(|name| name.len() <= LONG_NAME);
    let mut beside = OsString::from(".");
    beside.push(name.unwrap_or(OsStr::new("output")));
    // Processes in containers may have the same number.
    beside.push(format!(".imgdm-{}-{number}", std::process::id()));
    path.with_file_name(beside)
}

/// Gives an unnamed file its name.
fn link(file: &File, path: &Path, force: bool) -> io::Result<()> {
    match link_new(file, path) {
        Err(error) if force && error.kind() == io::ErrorKind::AlreadyExists => {
            let (beside, ()) = with_name_beside(path, |beside| link_new(file, beside))?;
            fs::rename(&beside, path).inspect_err(|_| drop(fs::remove_file(&beside)))
        }
        other => other,
    }
}

fn link_new(file: &File, path: &Path) -> io::Result<()> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flag = AtFlags::AT_SYMLINK_FOLLOW;
    Ok(linkat(AT_FDCWD, from.as_str(), AT_FDCWD, path, flag)?)
}

fn rename(from: &Path, to: &Path, force: bool) -> io::Result<()> {
    if force {
        return fs::rename(from, to);
    }
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // A file system that can't promise that.
        Err(Errno::EINVAL | Errno::ENOSYS) => {
            OpenOptions::new().write(true).create_new(true).open(to)?;
            fs::rename(from, to).inspect_err(|_| drop(fs::remove_file(to)))
        }
        other => Ok(other?),
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

/// Refuses an output that is one of the files which are read, whatever its name.
///
/// # Errors
/// `Usage`, naming the output.
pub fn refuse_files<'s>(name: &Path, files: impl IntoIterator<Item = &'s Source>) -> Result<()> {
    let Some(id) = FileId::of_path(name) else { return Ok(()) };
    if files.into_iter().any(|file| file.id() == Some(id)) {
        let message =
            "this file is read for what is to be written, and stays as it is: take another name";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(name));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
