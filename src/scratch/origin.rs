//! Where the images of a kept scratch file were, so that it can be told when they are gone.
//!
//! A path at which nothing is can mean two things: the image was removed, or the file
//! system that it lies on is not mounted (yet). So the directories on the way to it are
//! recorded too, and which of them were roots of file systems.

use std::fs::Metadata;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::statvfs;

/// The place of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    /// Absolute, without symbolic links.
    path: PathBuf,
    /// The directories on the way, from `/` on.
    directories: Vec<Directory>,
}

/// A directory on the way to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Directory {
    inode: u64,
    /// Where a file system has its root here, the number that it gives itself (never 0);
    /// else 0.
    root_of: u64,
}

impl Directory {
    /// What there is at `path`; `above` is the device of the directory above.
    fn look(path: &Path, above: &mut Option<u64>) -> io::Result<Self> {
        let metadata = std::fs::symlink_metadata(path)?;
        let is_root = *above != Some(metadata.dev());
        *above = Some(metadata.dev());
        let root_of = if is_root { file_system_of(path)? } else { 0 };
        Ok(Self { inode: inode(&metadata), root_of })
    }
}

fn inode(metadata: &Metadata) -> u64 {
    // 0 stands for what is no directory.
    if metadata.is_dir() { metadata.ino() } else { 0 }
}

/// The number that tells file systems apart over reboots, as far as there is one.
fn file_system_of(path: &Path) -> io::Result<u64> {
    Ok(statvfs(path)?.filesystem_id().max(1))
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

impl Origin {
    /// The place of the file at `path`.
    ///
    /// # Errors
    /// It or a directory on the way can't be looked at.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let path = std::fs::canonicalize(path)?;
        let mut above = None;
        let directories = on_the_way(&path)
            .into_iter()
            .map(|directory| Directory::look(directory, &mut above))
            .collect::<io::Result<_>>()?;
        Ok(Self { path, directories })
    }

    /// True where the file is certain to be gone: all that was mounted on the way to it is
    /// mounted now, and there is nothing at its path.
    pub(super) fn is_gone(&self) -> bool {
        let mut above = None;
        for (depth, path) in on_the_way(&self.path).into_iter().enumerate() {
            let Some((then, below)) = self.directories.get(depth..).and_then(<[_]>::split_first)
            else {
                return false;
            };
            let certain = match Directory::look(path, &mut above) {
                Ok(now) if now == *then => continue,
                // A directory made anew is not the one that the file was in.
                Ok(now) => now.inode != 0 && now.root_of == 0,
                Err(error) => is_missing(&error),
            };
            // What was mounted here or further down may come back.
            return certain && then.root_of == 0 && below.iter().all(|below| below.root_of == 0);
        }
        std::fs::symlink_metadata(&self.path).is_err_and(|error| is_missing(&error))
    }

    /// Appends it to `bytes`, for [`read_all`].
    pub(super) fn write(&self, bytes: &mut Vec<u8>) {
        let path = self.path.as_os_str().as_bytes();
        bytes.extend((path.len() as u64).to_le_bytes());
        bytes.extend(path);
        bytes.extend((self.directories.len() as u64).to_le_bytes());
        for Directory { inode, root_of } in &self.directories {
            bytes.extend(inode.to_le_bytes());
            bytes.extend(root_of.to_le_bytes());
        }
    }

    fn read(bytes: &mut &[u8]) -> Option<Self> {
        let length = usize::try_from(read_number(bytes)?).ok()?;
        let (path, rest) = bytes.split_at_checked(length)?;
        *bytes = rest;
        let path = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
        let count = read_number(bytes)?;
        if count != on_the_way(&path).len() as u64 {
            return None;
        }
        let directories = (0..count)
            .map(|_| Some(Directory { inode: read_number(bytes)?, root_of: read_number(bytes)? }))
            .collect::<Option<_>>()?;
        path.is_absolute().then_some(Self { path, directories })
    }
}

/// The directories on the way to an absolute path, from `/` on.
fn on_the_way(path: &Path) -> Vec<&Path> {
    let mut directories: Vec<_> = path.ancestors().skip(1).collect();
    directories.reverse();
    directories
}

fn read_number(bytes: &mut &[u8]) -> Option<u64> {
    let (number, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*number))
}

/// Reads what [`Origin::write`] wrote, one after the other; `None` where it is not that.
pub(super) fn read_all(mut bytes: &[u8]) -> Option<Vec<Origin>> {
    let mut origins = Vec::new();
    while !bytes.is_empty() {
        origins.push(Origin::read(&mut bytes)?);
    }
    Some(origins)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn image_in(directory: &Path) -> Origin {
        fs::create_dir_all(directory).unwrap();
        let path = directory.join("disk.qcow2");
        fs::write(&path, "an image").unwrap();
        Origin::of(&path).unwrap()
    }

    #[test]
    fn an_image_is_gone_when_it_or_its_directory_was_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("a/b");
        let origin = image_in(&place);
        assert!(!origin.is_gone());
        fs::rename(place.join("disk.qcow2"), place.join("other")).unwrap();
        assert!(origin.is_gone());
        fs::rename(place.join("other"), place.join("disk.qcow2")).unwrap();
        assert!(!origin.is_gone());
        fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        assert!(origin.is_gone());
        // Made anew.
        fs::create_dir_all(&place).unwrap();
        assert!(origin.is_gone());
        // Something that is no directory in its place tells nothing.
        let origin = image_in(&place);
        fs::remove_dir_all(&place).unwrap();
        fs::write(&place, "").unwrap();
        assert!(!origin.is_gone());
    }

    #[test]
    fn an_image_on_what_is_not_mounted_is_not_gone() {
        let dir = tempfile::tempdir().unwrap();
        let origin = image_in(&dir.path().join("a/b"));
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert!(origin.is_gone());
        let last = origin.directories.len() - 1;
        for (at, root_of) in [(last, 5), (last - 1, 5), (last - 2, 5), (0, 1 << 60)] {
            let mut mounted = origin.clone();
            mounted.directories[at].root_of = root_of;
            assert!(!mounted.is_gone(), "{at}");
        }
        // Another root directory, as an initrd has.
        let mut other = origin.clone();
        other.directories[0].inode ^= 1 << 40;
        assert!(!other.is_gone());
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let origins = [image_in(dir.path()), image_in(&dir.path().join("b"))];
        let mut bytes = Vec::new();
        origins.iter().for_each(|origin| origin.write(&mut bytes));
        assert_eq!(read_all(&bytes).unwrap(), origins);
        assert_eq!(read_all(&bytes[..bytes.len() - 1]), None);
        assert_eq!(read_all(&bytes[1..]), None);
        assert_eq!(read_all(&[]).unwrap(), []);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes);
        }
    }
}
