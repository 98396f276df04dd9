//! What is exported: a device that is attached, or a store that is kept.

use std::path::{Path, PathBuf};

use imgdm::chain::Chain;
use imgdm::device::detach::find as find_attached;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::{Attached, list};
use imgdm::format::Format;
use imgdm::format::qcow2::SnapshotSelector;
use imgdm::lock::{self, Locked, Sharing};
use imgdm::open::{NamedIn, OpenPolicy, OpenedChain, Reach, is_path, open_chain};
use imgdm::overlay::store::{read_header, read_persistent};
use imgdm::overlay::{STORE_OFFSET, StoreFile, StoreHeader, StoreSnapshot};
use imgdm::source::{FileId, FileStamp, Source};
use imgdm::status::FileRole;
use imgdm::units::{ByteLen, Sectors};
use imgdm::{Error, ErrorKind, Result};

use super::super::Globals;
use super::super::open::print_warnings;
use super::super::stamps::Stamps;
use super::backing::Facts;

/// What the argument names.
pub(super) enum Named {
    /// A device that is attached.
    Attached(Box<Attached>),
    /// The file of a store that is not attached.
    Store(PathBuf),
}

/// Finds what the argument means.
///
/// # Errors
/// It is neither.
pub(super) fn find(kernel: &LinuxKernel, argument: &Path) -> Result<Named> {
    let id = FileId::of_path(argument);
    let is_store = id.is_some_and(|id| id.inode != 0) && is_store(argument);
    if is_path(argument.as_os_str()) && is_store {
        return match store_of_attached(kernel, id) {
            Some(attached) => Ok(Named::Attached(Box::new(attached))),
            None => Ok(Named::Store(argument.to_owned())),
        };
    }
    find_attached(kernel, argument, id).map(Box::new).map(Named::Attached).map_err(|error| {
        match error.kind() {
            ErrorKind::NotAttached(message) if is_store => {
                let message =
                    format!("{message}; the store of that name is ./{}", argument.display());
                error.with_kind(ErrorKind::NotAttached(message))
            }
            ErrorKind::NotAttached(_) if id.is_some_and(|id| id.inode != 0) => {
                let message = "this is neither the store of a writable device nor an image that is attached with --overlay";
                error.with_kind(ErrorKind::NotAttached(message.to_owned()))
            }
            _ => error,
        }
    })
}

/// Whether a file starts as a store does, whatever else is wrong with it.
fn is_store(path: &Path) -> bool {
    let Ok(source) = Source::open(path) else { return false };
    let header = source.file().map(read_header);
    // What is none is said to be a file that can't be used as one.
    !matches!(header, Some(Err(error)) if matches!(error.kind(), ErrorKind::CannotCreate(_)))
}

/// The device whose store is in that file.
fn store_of_attached(kernel: &LinuxKernel, id: Option<FileId>) -> Option<Attached> {
    // Who may not ask is kept out by the locks.
    list(kernel).unwrap_or_default().into_iter().find(|attached| {
        let store = attached.overlay.as_ref().and_then(|overlay| overlay.store);
        let mut loops = attached.loops.iter();
        store.is_some()
            && loops.any(|each| Some(each.number) == store && Some(each.info.file) == id)
    })
}

/// A store that is not attached, and its image.
pub(super) struct Kept {
    pub(super) source: Source,
    pub(super) chain: Chain,
    header: StoreHeader,
    image: PathBuf,
    stamps: (Option<FileStamp>, Stamps),
}

impl Kept {
    /// Opens and locks both; the image is `image`, or where the store says.
    ///
    /// # Errors
    /// It is in use or damaged; it is the store of another image, or of one that has changed.
    pub(super) fn open(
        path: &Path,
        image: Option<&Path>,
        reach: Reach,
        globals: Globals,
    ) -> Result<Self> {
        let mut source = Source::open(path)?;
        let in_use = |error: Error| {
            match error.kind() {
            ErrorKind::InUse(_) => error.with_kind(ErrorKind::InUse(
                "the store is in use: by a device that another mount namespace or user sees, or by another program"
                    .to_owned(),
            )),
            _ => error,
        }
        };
        let locked = lock::lock(&source, Sharing::Readers).map_err(in_use)?;
        let here = |error: Error| error.at_path(path);
        if locked == Locked::NotSupported {
            globals.warn(format_args!(
                "{}: the file system has no locks: nothing keeps the store from being attached meanwhile",
                path.display()
            ));
        }
        source.refresh()?;
        let file = source.file().ok_or_else(|| here(Error::invalid("this is no file")))?;
        let header = read_header(file).map_err(here)?;
        let length = source.length().get().saturating_sub(STORE_OFFSET);
        let persistent = read_persistent(file).map_err(here)?;
        header.check_persistent(&persistent, ByteLen::new(length)).map_err(here)?;

        let said = header.files.first().ok_or_else(|| here(Error::invalid("it names no image")))?;
        let named_in = NamedIn { file: path.to_owned(), only_data_file: image.is_some() };
        let policy = OpenPolicy { reach, named_in: Some(named_in), ..policy(&header)? };
        let image = image.unwrap_or(&said.path).to_owned();
        let missing = |error: Error| match error.kind() {
            ErrorKind::NotFound(_) if error.path() == Some(&image) => {
                error.with_kind(ErrorKind::NotFound(
                    "the image of the store is not there: say with --image where it is now"
                        .to_owned(),
                ))
            }
            ErrorKind::PermissionDenied(what) if error.path() == Some(&image) => {
                let what = format!("{what} (the image of the store; --image names it, too)");
                error.with_kind(ErrorKind::PermissionDenied(what))
            }
            _ => error,
        };
        let OpenedChain { chain, warnings } = open_chain(&image, &policy).map_err(missing)?;
        print_warnings(&warnings, globals);
        header.check(&now(&header, &chain)?).map_err(here)?;
        let stamps = (source.stamp()?, Stamps::of(&chain)?);
        Ok(Self { source, chain, header, image, stamps })
    }

    /// What the backing file is made from.
    pub(super) fn facts(&self) -> Result<Facts> {
        let path = std::fs::canonicalize(&self.image);
        let path = path.map_err(|e| Error::io("cannot find the image", e).at_path(&self.image))?;
        let disk = ByteLen::new(self.header.disk.to_bytes().unwrap_or(u64::MAX));
        let snapshot = self.header.snapshot.as_ref().map(|snapshot| snapshot.name.clone());
        Facts::new(Ok(path), Some(&self.chain), snapshot, disk, self.header.on_error)
    }

    /// The files that are read.
    pub(super) fn files(&self) -> impl Iterator<Item = FileId> {
        let layers = self.chain.layers().iter().flat_map(|layer| layer.files());
        layers.filter_map(|(_, file)| file.id()).chain(self.source.id())
    }

    /// Refuses what was written to while it was read, whatever locks that took.
    ///
    /// # Errors
    /// `InUse`, naming the file.
    pub(super) fn check_unchanged(&self) -> Result<()> {
        let content = |stamp: Option<FileStamp>| stamp.map(|stamp| (stamp.length, stamp.modified));
        if content(self.source.stamp()?) != content(self.stamps.0) {
            let message = "the store was written to while it was read".to_owned();
            return Err(Error::new(ErrorKind::InUse(message)).at_path(self.source.path()));
        }
        self.stamps.1.check(&self.chain)
    }
}

/// How the image of a store is to be opened.
fn policy(header: &StoreHeader) -> Result<OpenPolicy> {
    let format = header.files.first().map(|file| file.format.parse::<Format>()).transpose()?;
    let exact = |StoreSnapshot { id, name }: &StoreSnapshot| SnapshotSelector::Exact {
        id: Some(id.clone()),
        name: Some(name.clone()),
    };
    let is_data_file = |file: &&StoreFile| file.layer == 0 && file.role == FileRole::DataFile;
    let data_file = header.files.iter().find(is_data_file).map(|file| file.path.clone());
    Ok(OpenPolicy {
        format,
        snapshot: header.snapshot.as_ref().map(exact),
        // What attach had to be told to accept, it was told.
        probe_backing: true,
        allow_changed_backing: true,
        allow_corrupt: true,
        data_file: data_file.filter(|path| path.exists()),
        ..OpenPolicy::default()
    })
}

/// The header that a store of the chain would get now.
fn now(header: &StoreHeader, chain: &Chain) -> Result<StoreHeader> {
    let snapshot = chain.layers().first().and_then(|layer| layer.image.snapshot());
    Ok(StoreHeader {
        disk: Sectors::from_bytes(chain.virtual_size().get()).unwrap_or_default(),
        snapshot: snapshot.map(|s| StoreSnapshot { id: s.id.clone(), name: s.name.clone() }),
        files: StoreFile::of_chain(chain)?,
        ..header.clone()
    })
}
