//! Writing a file for the user: whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use imgdm::chain::Chain;
use imgdm::convert::target::end_of_links;
use imgdm::device::Interrupt;
use imgdm::source::FileId;
use imgdm::{Error, ErrorKind, Result};

/// Names that are tried for the file beside.
const ATTEMPTS: u32 = 100;

/// Refuses a path that leads to a file of the chain: it would be written over.
///
/// # Errors
/// `Usage`, naming the path.
pub(crate) fn refuse_files_of(chain: &Chain, path: &Path) -> Result<()> {
    let Some(id) = FileId::of_path(path) else { return Ok(()) };
    let mut files = chain.layers().iter().flat_map(|layer| layer.files());
    if files.any(|(_, file)| file.id() == Some(id)) {
        let message = "this is a file of the image itself, which is never written".to_owned();
        return Err(Error::new(ErrorKind::Usage(message)).at_path(path));
    }
    Ok(())
}

/// Puts `content` into the file at `path`: it is written beside and then renamed, so that
/// nobody finds half of it. What is no regular file (a FIFO) is written to, and so is what
/// stdout or stderr goes to: after what is there, as the one who redirected it expects.
///
/// SIGINT, SIGTERM and SIGHUP wait until the file beside is gone; only what can't be caught
/// (SIGKILL, a crash, any signal in a build without the feature `device`) leaves it behind.
///
/// # Errors
/// `CannotCreate`, naming the path; `Interrupted`.
pub(crate) fn save(path: &Path, content: &[u8]) -> Result<()> {
    let failed = |error| {
        let message = "cannot write this file".to_owned();
        Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(path)
    };
    match write_through(path, content).map_err(failed)? {
        None => Ok(()),
        Some(target) => {
            let interrupt = hold_signals();
            replace(&target, content, &interrupt).map_err(failed)?;
            interrupt.check()
        }
    }
}

/// Makes a file at `path`, for the user alone, with all of `content` in it; nothing that is
/// there, a symbolic link included, is replaced. It is on the disk when this returns.
///
/// # Errors
/// `CannotCreate`, naming the path; then there is no such file.
#[cfg(feature = "device")]
pub(crate) fn save_new(path: &Path, content: &[u8]) -> Result<()> {
    let write = || {
        let (mut file, beside) = create_beside(path, 0o600)?;
        let made = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .and_then(|()| rename_new(&beside, path));
        if made.is_err() {
            let _ = fs::remove_file(&beside);
        }
        made?;
        sync_directory(path)
    };
    write().map_err(|error| {
        let message = match error.kind() {
            io::ErrorKind::AlreadyExists => "something of that name is there already, and stays",
            _ => "cannot write this file",
        };
        let kind = ErrorKind::CannotCreate(message.to_owned());
        let error = if error.kind() == io::ErrorKind::AlreadyExists {
            Error::new(kind)
        } else {
            Error::new(kind).with_source(error)
        };
        error.at_path(path)
    })
}

/// Replaces the file at `path`, which is the caller's own, whatever signals come. It is on the
/// disk when this returns.
///
/// # Errors
/// `CannotCreate`, naming the path; then the file is as it was.
#[cfg(feature = "device")]
pub(crate) fn save_over(path: &Path, content: &[u8]) -> Result<()> {
    replace(path, content, &Interrupt::never()).and_then(|()| sync_directory(path)).map_err(
        |error| {
            let message = "cannot write this file".to_owned();
            Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(path)
        },
    )
}

/// Gives a file a new name that nothing may have.
#[cfg(feature = "device")]
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from),
        // A file system without links (vfat): the name is taken first, so it is ours.
        Err(error)
            if matches!(error.raw_os_error(), Some(nix::libc::EPERM | nix::libc::EOPNOTSUPP)) =>
        {
            OpenOptions::new().write(true).create_new(true).open(to)?;
            fs::rename(from, to).inspect_err(|_| drop(fs::remove_file(to)))
        }
        Err(error) => Err(error),
    }
}

#[cfg(feature = "device")]
fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

/// From now on signals only set a flag. Where that fails, they do what they always did.
fn hold_signals() -> Interrupt<'static> {
    #[cfg(feature = "device")]
    if let Ok(interrupt) = super::signal::catch() {
        return interrupt;
    }
    Interrupt::never()
}

/// Writes to what is to be written to, or gives the path of the file to be replaced.
fn write_through(path: &Path, content: &[u8]) -> io::Result<Option<PathBuf>> {
    let existing = match fs::metadata(path) {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if existing.as_ref().is_some_and(|metadata| metadata.file_type().is_block_device()) {
        let message = "it is a block device";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // /dev/stdout leads to the file that stdout was redirected to, which others write to as
    // well: replaced, it would lose what they wrote before, and they what they write now.
    if let Some(metadata) = &existing {
        for descriptor in [io::stdout().as_fd(), io::stderr().as_fd()] {
            if let Some(mut file) = same_file(descriptor, metadata) {
                return file.write_all(content).map(|()| None);
            }
        }
    }
    match existing {
        // Where the name is a symbolic link, it stays one, also one to nothing yet.
        Some(metadata) if metadata.is_file() => path.canonicalize().map(Some),
        None => end_of_links(path).map(Some),
        Some(_) => OpenOptions::new().write(true).open(path)?.write_all(content).map(|()| None),
    }
}

/// The descriptor, where it is open on the file that has these metadata.
fn same_file(descriptor: BorrowedFd<'_>, metadata: &fs::Metadata) -> Option<File> {
    let file = File::from(descriptor.try_clone_to_owned().ok()?);
    (FileId::of(&file.metadata().ok()?) == FileId::of(metadata)).then_some(file)
}

/// Puts `content` at `target`, unless there was a signal: then nothing is changed.
fn replace(target: &Path, content: &[u8], interrupt: &Interrupt<'_>) -> io::Result<()> {
    let (mut file, beside) = create_beside(target, 0o666)?;
    let written = match fs::metadata(target) {
        Ok(old) => file.set_permissions(old.permissions()),
        Err(_) => Ok(()),
    };
    let written = written.and_then(|()| file.write_all(content)).and_then(|()| file.sync_all());
    let interrupted = interrupt.check().is_err();
    let renamed = match written {
        Ok(()) if !interrupted => fs::rename(&beside, target),
        other => other,
    };
    if renamed.is_err() || interrupted {
        let _ = fs::remove_file(&beside);
    }
    renamed
}

fn create_beside(target: &Path, mode: u32) -> io::Result<(File, PathBuf)> {
    let name = target
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no file name"))?;
    for attempt in 0..ATTEMPTS {
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(format!(".{}-{attempt}", std::process::id()));
        let path = target.with_file_name(beside);
        match OpenOptions::new().write(true).create_new(true).mode(mode).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|file| (file, path)),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn names(directory: &Path) -> Vec<OsString> {
        let mut names: Vec<_> =
            fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_and_nothing_else_is_left() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.svg");
        save(&path, b"one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let link = directory.path().join("link");
        symlink("x.svg", &link).unwrap();
        save(&link, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(names(directory.path()), ["link", "x.svg"]);
    }

    #[test]
    fn a_link_to_no_file_yet_stays_one() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        symlink("sub/second", directory.path().join("first")).unwrap();
        symlink("../x.svg", directory.path().join("sub/second")).unwrap();
        save(&directory.path().join("first"), b"one").unwrap();
        assert_eq!(names(directory.path()), ["first", "sub", "x.svg"]);
        assert_eq!(names(&directory.path().join("sub")), ["second"]);
        assert_eq!(fs::read(directory.path().join("x.svg")).unwrap(), b"one");
        for link in ["first", "sub/second"] {
            assert!(fs::symlink_metadata(directory.path().join(link)).unwrap().is_symlink());
        }
    }

    #[test]
    fn a_signal_leaves_the_old_file_and_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.svg");
        fs::write(&path, b"old").unwrap();
        let flag = std::sync::atomic::AtomicUsize::new(15);
        replace(&path, b"new", &Interrupt::new(&flag)).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(directory.path()), ["x.svg"]);
    }

    #[test]
    fn what_can_not_be_written_is_said_and_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path().join("no/x.svg"), directory.path().to_owned()] {
            let error = save(&path, b"x").unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::CannotCreate(_)), "{error}");
            assert_eq!(error.path(), Some(path.as_path()));
        }
        assert_eq!(names(directory.path()), Vec::<OsString>::new());
    }

    #[test]
    #[cfg(feature = "device")]
    fn a_new_file_replaces_nothing_and_is_for_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.json");
        save_new(&path, b"one").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        symlink("nowhere", directory.path().join("link")).unwrap();
        for taken in [path.clone(), directory.path().join("link")] {
            let error = save_new(&taken, b"two").unwrap_err();
            assert!(error.to_string().contains("there already"), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), b"one");
        save_over(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(names(directory.path()), ["link", "x.json"]);
    }

    #[test]
    fn a_device_is_written_to_and_stays() {
        save(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
