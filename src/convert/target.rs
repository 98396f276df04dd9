//! The file that an output becomes: made beside its name, and given the name in the end.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};

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

/// An output on its way. Dropped before it is [committed](Self::commit), nothing of it is left
/// (but on a block device).
#[derive(Debug)]
pub struct Target {
    /// Its name as it was given.
    name: PathBuf,
    file: File,
    kind: Kind,
    force: bool,
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
    /// `CannotCreate`: something is there and may not be replaced, or can't be; there is no
    /// such directory. `InUse`: a virtual machine has it open, or the block device is mounted.
    pub fn create(name: &Path, force: bool) -> Result<Self> {
        let failed =
            |error: io::Error| cannot_create("the file can't be made", error).at_path(name);
        let existing = match fs::metadata(name) {
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        if let Some(metadata) = &existing {
            require_replaceable(metadata, force).map_err(|error| error.at_path(name))?;
            require_unused(name)?;
            if metadata.file_type().is_block_device() {
                return Self::open_device(name);
            }
        }
        let path = match existing {
            Some(_) => name.canonicalize(),
            None => end_of_links(name),
        };
        let (file, kind) = path.and_then(make).map_err(failed)?;
        Ok(Self { name: name.to_owned(), file, kind, force })
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
            _ => cannot_create("the block device can't be written", error).at_path(name),
        })?;
        Ok(Self { name: name.to_owned(), file, kind: Kind::BlockDevice, force: true })
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its name, as it was given.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// True where both would come to be one and the same.
    pub fn is_same_place(&self, other: &Self) -> bool {
        let path = |target: &'_ Self| match &target.kind {
            Kind::Unnamed(path) | Kind::Beside { path, .. } => Some(path.clone()),
            Kind::BlockDevice | Kind::Done => None,
        };
        match (path(self), path(other)) {
            (Some(a), Some(b)) => {
                let [directory, other] = [&a, &b].map(|path| FileId::of_path(directory_of(path)));
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

    /// Gives the file its name; with `sync`, it is on the disk when this returns. What it
    /// replaces hands down its permissions, and its owner where that is permitted.
    ///
    /// # Errors
    /// `CannotCreate`: something of that name has come into being and may not be replaced; it
    /// can't be written out. Nothing of it is left.
    pub fn commit(&mut self, sync: bool) -> Result<()> {
        let failed = |error: io::Error| {
            let is_there = error.kind() == io::ErrorKind::AlreadyExists;
            if is_there { exists() } else { cannot_create("the file can't be finished", error) }
        };
        self.commit_io(sync).map_err(|error| failed(error).at_path(&self.name))
    }

    fn commit_io(&mut self, sync: bool) -> io::Result<()> {
        let path = match &self.kind {
            Kind::Unnamed(path) | Kind::Beside { path, .. } => Some(path.clone()),
            Kind::BlockDevice | Kind::Done => None,
        };
        if let Some(path) = &path
            && self.force
            && let Ok(old) = fs::metadata(path)
        {
            // Its owner may not be ours to give.
            let _ = fchown(&self.file, Some(old.uid()), Some(old.gid()));
            self.file.set_permissions(old.permissions())?;
        }
        if sync {
            self.file.sync_all()?;
        }
        match &self.kind {
            Kind::Unnamed(path) => link(&self.file, path, self.force)?,
            Kind::Beside { path, beside } => rename(beside, path, self.force)?,
            Kind::BlockDevice | Kind::Done => {}
        }
        self.kind = Kind::Done;
        match path {
            Some(path) if sync => sync_directory(&path),
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
    let Ok(source) = Source::open(path) else { return Ok(()) };
    if lock::others(&source).is_empty() {
        return Ok(());
    }
    let message = "it is in use by another program (a running virtual machine?) and stays";
    Err(Error::new(ErrorKind::InUse(message.to_owned())).at_path(path))
}

/// What a path leads to that leads to no file yet.
fn end_of_links(path: &Path) -> io::Result<PathBuf> {
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
    if path.file_name().is_none() {
        return Err(Errno::EISDIR.into());
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
    let beside = beside(&path);
    let file = options.create_new(true).open(&beside)?;
    Ok((file, Kind::Beside { path, beside }))
}

/// The name of a file beside `path` until it is finished.
fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().filter(|name| name.len() <= LONG_NAME);
    let mut beside = OsString::from(".");
    beside.push(name.unwrap_or(OsStr::new("output")));
    beside.push(format!(".imgdm-{}", std::process::id()));
    path.with_file_name(beside)
}

/// Gives an unnamed file its name.
fn link(file: &File, path: &Path, force: bool) -> io::Result<()> {
    match link_new(file, path) {
        Err(error) if force && error.kind() == io::ErrorKind::AlreadyExists => {
            let beside = beside(path);
            link_new(file, &beside)?;
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
mod tests {
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    fn written(path: &Path, force: bool, content: &[u8]) -> Result<Target> {
        let mut target = Target::create(path, force)?;
        target.file.write_all(content).unwrap();
        Ok(target)
    }

    #[test]
    fn a_file_has_its_name_only_once_it_is_finished() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.raw");
        drop(written(&path, false, b"one").unwrap());
        assert_eq!(names(directory.path()), Vec::<OsString>::new());
        let mut target = written(&path, false, b"two").unwrap();
        assert!(!path.exists());
        target.commit(true).unwrap();
        drop(target);
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(directory.path()), ["out.raw"]);
    }

    #[test]
    fn a_file_with_a_name_beside_is_renamed_or_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.raw");
        let make = |force| {
            let beside = beside(&path);
            let file = File::create_new(&beside).unwrap();
            let kind = Kind::Beside { path: path.clone(), beside };
            Target { name: path.clone(), file, kind, force }
        };
        drop(make(false));
        assert_eq!(names(directory.path()), Vec::<OsString>::new());
        make(false).commit(true).unwrap();
        assert_eq!(names(directory.path()), ["out.raw"]);
        let error = make(false).commit(false).unwrap_err();
        assert!(error.to_string().contains("there already; --force"), "{error}");
        make(true).commit(false).unwrap();
        assert_eq!(names(directory.path()), ["out.raw"]);
    }

    #[test]
    fn what_is_there_stays_unless_forced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.raw");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Target::create(&path, false).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
        assert!(error.to_string().contains("--force"), "{error}");
        drop(written(&path, true, b"new").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        written(&path, true, b"new").unwrap().commit(true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(directory.path()), ["out.raw"]);
    }

    #[test]
    fn what_came_into_being_meanwhile_stays_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.raw");
        let mut target = written(&path, false, b"new").unwrap();
        fs::write(&path, b"another's").unwrap();
        let error = target.commit(true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
        drop(target);
        assert_eq!(fs::read(&path).unwrap(), b"another's");
        assert_eq!(names(directory.path()), ["out.raw"]);
    }

    #[test]
    fn links_stay_links() {
        let directory = tempfile::tempdir().unwrap();
        let (link, path) = (directory.path().join("link"), directory.path().join("out.raw"));
        symlink("out.raw", &link).unwrap();
        written(&link, false, b"one").unwrap().commit(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert!(Target::create(&link, false).is_err());
        written(&link, true, b"two").unwrap().commit(false).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        symlink("b", directory.path().join("a")).unwrap();
        symlink("a", directory.path().join("b")).unwrap();
        assert!(Target::create(&directory.path().join("a"), true).is_err());
    }

    #[test]
    fn what_no_image_can_be_made_of_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let places = [
            directory.path(),
            &fifo,
            Path::new("/dev/null"),
            Path::new("/no/such/x"),
            Path::new("/"),
        ];
        for path in places {
            let error = Target::create(path, true).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
            assert_eq!(error.path(), Some(path));
        }
        assert_eq!(names(directory.path()), ["fifo"]);
    }

    #[test]
    fn the_file_of_a_running_virtual_machine_is_not_replaced() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let reader = Source::open(file.path()).unwrap();
        lock::lock(&reader, lock::Sharing::Readers).unwrap();
        let error = Target::create(file.path(), true).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InUse(_)), "{error}");
        drop(reader);
        Target::create(file.path(), true).unwrap();
    }

    #[test]
    fn a_file_that_is_read_is_known_by_any_name() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("in"), directory.path().join("other"));
        fs::write(&path, b"x").unwrap();
        fs::hard_link(&path, &other).unwrap();
        let source = Source::open(&path).unwrap();
        let error = refuse_files(&other, [&source]).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
        refuse_files(&directory.path().join("new"), [&source]).unwrap();
    }
}
