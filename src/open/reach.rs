//! How far the names in an image reach: into the directory of the image that is opened and
//! what lies below it, and no further without somebody's word.
//!
//! What counts is where a file is, not how it is named: links and `..` are followed first, and
//! the file is then opened anew from the directory that it has to lie below, by a path without
//! either (openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS). Whoever puts a link in
//! its way meanwhile has the open fail, and no other file is ever opened for reading.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::libc;
use nix::sys::stat::{Mode, fstat, fstatat};

use super::name::resolve_beside;
use super::policy_file::PolicyFile;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::{FileId, Source};

/// What the names in an image may lead to, beside regular files in the directory of the
/// active image and in those below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Directories: what lies in them and below them, block devices too. Files and block
    /// devices: just these. `/` is everything.
    pub allowed: Vec<PathBuf>,
    /// A file that says more of them, and that need not be there: [`PolicyFile`].
    pub policy_file: Option<PathBuf>,
}

/// A directory whose files may be opened, with all below it.
#[derive(Debug)]
struct Tree {
    /// Without links in it.
    path: PathBuf,
    directory: OwnedFd,
}

/// What is allowed by somebody's word.
#[derive(Debug, Default)]
struct Allowed {
    trees: Vec<Tree>,
    files: HashSet<FileId>,
}

impl Allowed {
    fn of(paths: &[PathBuf]) -> Self {
        let mut allowed = Self::default();
        for path in paths {
            allowed.add(path);
        }
        allowed
    }

    /// A handle of the file at `path`, which without links is `real`; none where that is not
    /// allowed.
    fn handle(&self, path: &Path, real: &Path) -> Option<Result<File, Errno>> {
        if let Some(handle) = self.trees.iter().find_map(|tree| tree.handle(real)) {
            return Some(handle);
        }
        if self.files.is_empty() {
            return None;
        }
        let handle = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path).ok()?;
        let id = FileId::of(&handle.metadata().ok()?);
        self.files.contains(&id).then_some(Ok(handle))
    }

    /// What is not there allows nothing.
    fn add(&mut self, path: &Path) {
        if let Some(tree) = Tree::open(path) {
            self.trees.push(tree);
        } else if let Some(id) = FileId::of_path(path) {
            self.files.insert(id);
        }
    }
}

impl Tree {
    fn open(path: &Path) -> Option<Self> {
        let real = path.canonicalize().ok()?;
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let directory = OpenOptions::new().read(true).custom_flags(flags).open(&real).ok()?;
        // Should a part of the path have been replaced meanwhile: what is open counts.
        let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let path = std::fs::read_link(link).unwrap_or(real);
        Some(Self { path, directory: directory.into() })
    }

    /// True where `name` in this very directory is that file.
    fn has(&self, name: &OsStr, id: FileId, flags: AtFlags) -> bool {
        fstatat(&self.directory, name, flags)
            .is_ok_and(|stat| FileId { device: stat.st_dev, inode: stat.st_ino } == id)
    }

    /// True of directories in which files are not of one image's owner: device nodes, and
    /// what the kernel makes up.
    fn is_the_systems(&self) -> bool {
        let is_in = |parent| self.path.starts_with(parent);
        (is_in("/dev") && !is_in("/dev/shm")) || is_in("/proc") || is_in("/sys")
    }

    /// A handle (O_PATH) of the file at `path`, which has no links in it; none where that is
    /// outside.
    fn handle(&self, path: &Path) -> Option<Result<File, Errno>> {
        let below = path.strip_prefix(&self.path).ok()?;
        let below = if below.as_os_str().is_empty() { Path::new(".") } else { below };
        Some(open_beneath(&self.directory, below).map(File::from))
    }
}

/// Opens what is below a directory by a path without links and `..` in it: O_PATH.
fn open_beneath(directory: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    const TRIES: usize = 16;
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    for _ in 0..TRIES {
        match openat2(directory, path, how) {
            // Something was renamed meanwhile.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // Before Linux 5.6, or forbidden by a filter that is older.
            Err(Errno::ENOSYS | Errno::EPERM) => return walk_beneath(directory, path),
            other => return other,
        }
    }
    Err(Errno::EAGAIN)
}

/// The same, a name at a time: none of them may be a link.
fn walk_beneath(directory: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let mut reached: Option<OwnedFd> = None;
    let mut names = path.components().peekable();
    while let Some(name) = names.next() {
        let name = match name {
            Component::Normal(name) => name,
            Component::CurDir => OsStr::new("."),
            _ => return Err(Errno::EXDEV),
        };
        let mut flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        // It refuses a link, too, which O_PATH alone opens as such.
        flags.set(OFlag::O_DIRECTORY, names.peek().is_some());
        reached = Some(openat(reached.as_ref().unwrap_or(directory), name, flags, Mode::empty())?);
    }
    let reached = reached.ok_or(Errno::ENOENT)?;
    let is_link = fstat(&reached)?.st_mode & libc::S_IFMT == libc::S_IFLNK;
    if is_link { Err(Errno::ELOOP) } else { Ok(reached) }
}

/// The places in which the files of one chain may lie.
#[derive(Debug)]
pub(crate) struct Confinement<'r> {
    reach: &'r Reach,
    /// Of the images that the user named: only for regular files, for among the nodes of
    /// block devices are those of the host's own disks.
    own: Vec<Tree>,
    /// Looked at where the images' own directories do not do.
    allowed: Option<Allowed>,
    /// The same of the policy file.
    by_policy: Option<Allowed>,
}

impl<'r> Confinement<'r> {
    /// Nothing yet but what `reach` allows.
    pub(crate) fn new(reach: &'r Reach) -> Self {
        Self { reach, own: Vec::new(), allowed: None, by_policy: None }
    }

    /// From now on files may also lie in the directory of `image`, which the user named by
    /// that path: in the one that the path names, and in the one that links from there lead
    /// to. An image on a block device has no directory of its own.
    pub(crate) fn add_image(&mut self, path: &Path, image: &Source) {
        if !image.is_block_device() {
            self.add_directories_of(path, image.id());
        }
    }

    /// The same of the file at `path`; where `id` says which file was opened by it, just of
    /// directories that have it. Somebody could have put a link to another place there since.
    pub(crate) fn add_directories_of(&mut self, path: &Path, id: Option<FileId>) {
        let has = |tree: &Tree, path: &Path, flags| match (path.file_name(), id) {
            (Some(name), Some(id)) => tree.has(name, id, flags),
            _ => id.is_none(),
        };
        let named = Tree::open(&resolve_beside(path, Path::new(".")))
            .filter(|tree| has(tree, path, AtFlags::empty()));
        let real = path.canonicalize().ok();
        let real = real.as_deref().and_then(|real| {
            let tree = Tree::open(real.parent()?)?;
            has(&tree, real, AtFlags::AT_SYMLINK_NOFOLLOW).then_some(tree)
        });
        for tree in named.into_iter().chain(real) {
            if !tree.is_the_systems() && self.own.iter().all(|own| own.path != tree.path) {
                self.own.push(tree);
            }
        }
    }

    /// Opens a file that an image names.
    ///
    /// # Errors
    /// `PermissionDenied` where it lies outside; those of [`Source::open`].
    pub(crate) fn open(&mut self, path: &Path) -> Result<Source> {
        let fail = |error| Error::io("cannot open the file", error).at_path(path);
        let real = path.canonicalize().map_err(fail)?;
        for tree in &self.own {
            let Some(handle) = tree.handle(&real) else { continue };
            let handle = handle.map_err(|errno| fail(errno.into()))?;
            if !handle.metadata().map_err(fail)?.file_type().is_block_device() {
                return Source::of_handle(&handle, path);
            }
        }
        let reach = self.reach;
        let allowed = self.allowed.get_or_insert_with(|| Allowed::of(&reach.allowed));
        if let Some(handle) = allowed.handle(path, &real) {
            return Source::of_handle(&handle.map_err(|errno| fail(errno.into()))?, path);
        }
        let by_policy = match &mut self.by_policy {
            Some(read) => read,
            None => {
                let file = reach.policy_file.as_deref().map(PolicyFile::read).transpose()?;
                let allowed = file.unwrap_or_default().allowed;
                self.by_policy.insert(Allowed::of(&allowed))
            }
        };
        match by_policy.handle(path, &real) {
            Some(handle) => Source::of_handle(&handle.map_err(|errno| fail(errno.into()))?, path),
            None => Err(self.refusal(path, &real)),
        }
    }

    fn refusal(&self, path: &Path, real: &Path) -> Error {
        let shown = |path: &Path| printable(&path.to_string_lossy());
        let is_block_device =
            real.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
        let what = if std::path::absolute(path).is_ok_and(|path| path == real) {
            String::new()
        } else {
            format!("this leads to {}: ", shown(real))
        };
        let (why, allow) = if is_block_device {
            ("an image may not name a block device unasked".to_owned(), path)
        } else {
            let own: Vec<_> = self.own.iter().map(|tree| shown(&tree.path)).collect();
            let why = format!(
                "it lies outside the directory of the image{}{}",
                if own.is_empty() { "" } else { ", " },
                own.join(" and ")
            );
            (why, real.parent().unwrap_or(real))
        };
        let message = format!("{what}{why}; --allow-path={} allows it", shown(allow));
        Error::new(ErrorKind::PermissionDenied(message)).at_path(path)
    }
}

#[cfg(test)]
mod tests;
