//! Writing a file for the user: whole or not at all.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use imgdm::chain::Chain;
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
/// nobody finds half of it. What is no regular file (a FIFO, /dev/stdout) is written to.
///
/// # Errors
/// `CannotCreate`, naming the path.
pub(crate) fn save(path: &Path, content: &[u8]) -> Result<()> {
    try_save(path, content).map_err(|error| {
        let message = "cannot write this file".to_owned();
        Error::new(ErrorKind::CannotCreate(message)).with_source(error).at_path(path)
    })
}

fn try_save(path: &Path, content: &[u8]) -> io::Result<()> {
    let existing = match fs::metadata(path) {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if existing.as_ref().is_some_and(|metadata| metadata.file_type().is_block_device()) {
        let message = "it is a block device";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    if existing.as_ref().is_some_and(|metadata| !metadata.is_file()) {
        return OpenOptions::new().write(true).open(path)?.write_all(content);
    }
    // Where the name is a symbolic link, it stays one.
    let target = if existing.is_some() { path.canonicalize()? } else { path.to_owned() };
    let (mut file, beside) = create_beside(&target)?;
    let written = file
        .write_all(content)
        .and_then(|()| existing.map_or(Ok(()), |old| file.set_permissions(old.permissions())))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, &target));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}

fn create_beside(target: &Path) -> io::Result<(File, PathBuf)> {
    let name = target
        .file_name()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "it has no file name"))?;
    for attempt in 0..ATTEMPTS {
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(format!(".{}-{attempt}", std::process::id()));
        let path = target.with_file_name(beside);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
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
    fn a_device_is_written_to_and_stays() {
        save(Path::new("/dev/null"), b"x").unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }
}
