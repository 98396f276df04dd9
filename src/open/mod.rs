//! Opening a backing chain: which files may be opened, by which names and formats.
//!
//! Every file is opened, locked, and only then read. A name in an image is a stranger's
//! word: it is resolved beside the image that says it, its format is the declared one or
//! refused, and no file is taken twice.

mod name;
mod policy_file;
mod reach;

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::{Chain, Layer};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::format::cow::CowImage;
use crate::format::qcow::QcowImage;
use crate::format::qcow2::{Qcow2Image, SnapshotSelector};
use crate::format::raw::RawImage;
use crate::format::{BackingReference, Format, ImageFormat, Notice, PROBE_LENGTH};
use crate::lock::{self, Locked, Sharing};
use crate::source::{FileId, Source, UnwrittenProbe};
use crate::status::FileRole;
use crate::units::HostOffset;
use crate::worker::apart;

pub(crate) use name::full_backing_name;
pub use name::{LocalName, resolve_beside};
pub use policy_file::PolicyFile;
pub(crate) use reach::Confinement;
pub use reach::Reach;

/// Layers of a chain at most.
pub const MAX_LAYERS: usize = 1024;

/// What may be opened, and how it is shared.
#[derive(Clone, Debug, Default)]
pub struct OpenPolicy {
    /// The active layer's format (`-f`); probed where none is given.
    pub format: Option<Format>,
    /// The internal snapshot of the active layer to read in its stead.
    pub snapshot: Option<SnapshotSelector>,
    /// With whom the files may be shared.
    pub sharing: Sharing,
    /// Where the files may lie that the images name. Those named here lie where they do.
    pub reach: Reach,
    /// A file in use is a warning and not an error (`plan` lists it).
    pub report_in_use: bool,
    /// Probes the format of a backing file whose overlay declares none. A probed raw
    /// file's first bytes may be the guest's, who could make it look like an overlay of
    /// any file of the host's.
    pub probe_backing: bool,
    /// Reads a cow image whose backing file is not the recorded one.
    pub allow_changed_backing: bool,
    /// Reads a qcow2 image that is marked corrupt.
    pub allow_corrupt: bool,
    /// Opens images whose tables are damaged, for those who go on past damage.
    pub past_damage: bool,
    /// The external data file, in place of the one that the active layer names.
    pub data_file: Option<PathBuf>,
    /// A file whose word it is which image to open, and not the user's.
    pub named_in: Option<NamedIn>,
    /// What is to be opened in place of a layer's file, by depth: 0 the active layer. It
    /// goes by the file's own path all the same. For files in use of which the path is gone.
    pub in_place_of: BTreeMap<(u32, FileRole), PathBuf>,
    /// What takes the place of the active layer's own backing file, which is not opened: for
    /// one that was moved. An image without a backing file has none with it either.
    pub backing: Option<(PathBuf, Format)>,
    /// Takes unwritten extents as zero, in files that are locked and that nobody has
    /// open for writing.
    pub unwritten: Option<Arc<dyn UnwrittenProbe>>,
}

/// A file that names an image and its data file, as the store of a writable device does: they
/// have to lie in its directory or below, or where [`OpenPolicy::reach`] allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedIn {
    /// The file.
    pub file: PathBuf,
    /// The image itself was named by the user, and only the data file by this file.
    pub only_data_file: bool,
}

/// What the user should know of an opened chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The file.
    pub path: PathBuf,
    /// What about it.
    pub kind: WarningKind,
}

/// The kinds of [`Warning`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WarningKind {
    /// The qcow2 dirty bit is set.
    Dirty,
    /// The qcow2 corrupt bit is set, and was allowed.
    Corrupt,
    /// Damage that spoils no guest range, in words.
    Damaged(String),
    /// Somebody else's locks contradict ours; how, in words.
    InUse(String),
    /// The file system has no locks.
    NotLocked,
    /// The overlay declares no format for this backing file, which was probed to be this.
    UndeclaredBackingFormat(Format),
    /// It is not the backing file that the cow image recorded, and was allowed.
    ChangedBacking,
}

impl From<Notice> for WarningKind {
    fn from(notice: Notice) -> Self {
        match notice {
            Notice::Dirty => Self::Dirty,
            Notice::Corrupt => Self::Corrupt,
            Notice::Damaged(what) => Self::Damaged(what),
        }
    }
}

impl WarningKind {
    /// A stable name for scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dirty => "dirty",
            Self::Corrupt => "corrupt",
            Self::Damaged(_) => "damaged",
            Self::InUse(_) => "in-use",
            Self::NotLocked => "not-locked",
            Self::UndeclaredBackingFormat(_) => "undeclared-backing-format",
            Self::ChangedBacking => "changed-backing-file",
        }
    }
}

impl std::fmt::Display for WarningKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Dirty => f.write_str(
                "the image was not closed cleanly (dirty bit): its refcounts may be stale, its contents are read as they are",
            ),
            Self::Corrupt => f.write_str("the image is marked corrupt; it is read all the same"),
            Self::InUse(what) | Self::Damaged(what) => f.write_str(what),
            Self::NotLocked => f.write_str(
                "the file system has no locks: nothing keeps a virtual machine from writing to the image",
            ),
            Self::UndeclaredBackingFormat(format) => write!(
                f,
                "no format is declared for this backing file; it looks like {format} (a qcow2 overlay can declare it: 'qemu-img rebase -u -F')"
            ),
            Self::ChangedBacking => f.write_str(
                "the backing file's modification time or size is not the one recorded in the cow image",
            ),
        }
    }
}

/// A chain and what is to be said of it.
#[derive(Debug)]
pub struct OpenedChain {
    /// The layers.
    pub chain: Chain,
    /// What the user should know.
    pub warnings: Vec<Warning>,
}

/// Opens an image and its whole backing chain.
///
/// # Errors
/// A file that can't be opened, is in use, or is no valid image; a backing file whose
/// format nobody declared; a name that leads to no local file, or to one that
/// [`OpenPolicy::reach`] does not allow; a cycle, or more than [`MAX_LAYERS`] layers. A message about a backing file names it and its overlay.
pub fn open_chain(image: &Path, policy: &OpenPolicy) -> Result<OpenedChain> {
    let mut opener = Opener::new(policy);
    let (path, format) = image_argument(image, policy.format)?;
    let named_by = match &policy.named_in {
        None | Some(NamedIn { only_data_file: true, .. }) => NamedBy::User,
        Some(_) => NamedBy::Image,
    };
    let mut next = Some(Reference { path, format, expected: None, is_backing: false, named_by });
    while let Some(reference) = next {
        if opener.layers.len() == MAX_LAYERS {
            return Err(too_many_layers(&reference.path));
        }
        let overlay = opener.layers.last().map(|layer: &Layer| layer.source.path().to_owned());
        let layer = opener.open_layer(&reference).map_err(|error| match &overlay {
            Some(overlay) => in_backing_file(error, overlay),
            None => error,
        })?;
        next = opener.backing_of(&layer)?;
        opener.layers.push(layer);
    }
    Ok(OpenedChain { chain: Chain::new(opener.layers)?, warnings: opener.warnings })
}

/// An image file by itself.
#[derive(Debug)]
pub struct OpenedFile {
    /// The file, locked.
    pub source: Source,
    /// Its format: given, or probed.
    pub format: Format,
    /// What the user should know.
    pub warnings: Vec<Warning>,
}

/// Opens an image file without looking at more of it than tells its format: neither its
/// backing file nor its external data file.
///
/// # Errors
/// The file can't be opened, is in use, or looks like a format that imgdm does not read.
pub fn open_file(image: &Path, policy: &OpenPolicy) -> Result<OpenedFile> {
    let mut opener = Opener::new(policy);
    let (path, format) = image_argument(image, policy.format)?;
    let source = opener.open_file(&path, FileRole::Image, NamedBy::User)?;
    let format = format.map_or_else(|| probe_format(&source), Ok)?;
    Ok(OpenedFile { source, format, warnings: opener.warnings })
}

/// The file and the format that an argument of the command line names.
///
/// # Errors
/// A `json:` or `file:` name that leads to no local file, or contradicts `format`.
pub(crate) fn image_argument(
    image: &Path,
    format: Option<Format>,
) -> Result<(PathBuf, Option<Format>)> {
    let bytes = image.as_os_str().as_bytes();
    if bytes.starts_with(b"json:") || (bytes.starts_with(b"file:") && !image.exists()) {
        let name = LocalName::parse(bytes)?;
        let format = agree(format, name.driver.as_deref())?;
        return Ok((name.path, format));
    }
    Ok((image.to_owned(), format))
}

/// The file that a backing reference of `overlay` leads to, and the format that it is
/// declared to have.
///
/// # Errors
/// A name that leads to no local file, a format that is not known.
pub(crate) fn resolve_backing(
    overlay: &Path,
    backing: &BackingReference,
) -> Result<(PathBuf, Option<Format>)> {
    let resolve = || {
        let name = LocalName::parse(&backing.name)?;
        let declared = backing.format.as_deref().map(str::parse).transpose()?;
        let format = agree(declared, name.driver.as_deref())?;
        Ok((beside(overlay, &name.path), format))
    };
    resolve().map_err(|error: Error| error.at_path(overlay))
}

/// The external data file that `image` names.
///
/// # Errors
/// A name that leads to no local file.
pub(crate) fn resolve_data_file(image: &Path, stored: &Path) -> Result<PathBuf> {
    let name = LocalName::parse(stored.as_os_str().as_bytes())
        .and_then(|name| agree(Some(Format::Raw), name.driver.as_deref()).map(|_| name))
        .map_err(|error| error.at_path(image))?;
    Ok(beside(image, &name.path))
}

/// Refuses a file that is one of `seen`, and adds it there.
///
/// # Errors
/// The chain has come to it before.
pub(crate) fn see_once(source: &Source, seen: &mut HashSet<FileId>) -> Result<()> {
    if let Some(id) = source.id()
        && !seen.insert(id)
    {
        return Err(Error::invalid(
            "the backing chain runs in a circle: it comes to this file a second time",
        )
        .at_path(source.path()));
    }
    Ok(())
}

/// The format that a file's first bytes announce.
///
/// # Errors
/// A format that imgdm does not read; a read failed.
pub(crate) fn probe_format(source: &Source) -> Result<Format> {
    let mut start = [0; PROBE_LENGTH];
    let n = source.read_up_to(HostOffset::ZERO, &mut start)?;
    if let Some(foreign) = Format::foreign(&start[..n]) {
        return Err(Error::new(ErrorKind::Unsupported(format!(
            "this looks like {foreign}, which imgdm does not read; if it is the raw bytes of a disk, say so with -f raw"
        )))
        .at_path(source.path()));
    }
    Ok(Format::probe(&start[..n]))
}

/// That a chain has more layers than can be opened, at the file that would be the next.
pub(crate) fn too_many_layers(path: &Path) -> Error {
    Error::new(ErrorKind::Unsupported(format!(
        "the backing chain is longer than {MAX_LAYERS} layers"
    )))
    .at_path(path)
}

/// Adds to an error about a backing file which overlay asked for it.
pub(crate) fn in_backing_file(error: Error, overlay: &Path) -> Error {
    named_in(error, "the backing file", overlay)
}

/// Adds to an error about a file which image names it, and as what.
fn named_in(error: Error, what_it_is: &str, image: &Path) -> Error {
    let add =
        |what: &str| format!("{what} ({what_it_is} of {})", printable(&image.to_string_lossy()));
    let kind = match error.kind() {
        ErrorKind::NotFound(what) => ErrorKind::NotFound(add(what)),
        ErrorKind::PermissionDenied(what) => ErrorKind::PermissionDenied(add(what)),
        _ => return error,
    };
    error.with_kind(kind)
}

/// The next file to open.
struct Reference {
    path: PathBuf,
    format: Option<Format>,
    /// What the overlay recorded of it (cow).
    expected: Option<crate::format::BackingIdentity>,
    is_backing: bool,
    named_by: NamedBy,
}

/// Whose word it is that a file is to be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NamedBy {
    User,
    /// A stranger's: see [`Reach`].
    Image,
}

struct Opener<'p> {
    policy: &'p OpenPolicy,
    confinement: Confinement<'p>,
    seen: HashSet<FileId>,
    warnings: Vec<Warning>,
    layers: Vec<Layer>,
}

impl<'p> Opener<'p> {
    fn new(policy: &'p OpenPolicy) -> Self {
        let mut confinement = Confinement::new(&policy.reach);
        if let Some(NamedIn { file, .. }) = &policy.named_in {
            confinement.add_directories_of(file, None);
        }
        Self { policy, confinement, seen: HashSet::new(), warnings: Vec::new(), layers: Vec::new() }
    }

    /// Opens and locks a file, which must not be part of the chain yet.
    fn open_file(&mut self, path: &Path, role: FileRole, named_by: NamedBy) -> Result<Source> {
        let depth = u32::try_from(self.layers.len()).unwrap_or(u32::MAX);
        let mut source = match (self.policy.in_place_of.get(&(depth, role)), named_by) {
            (Some(other), _) => Source::open(other)?.named(path),
            (None, NamedBy::User) => Source::open(path)?,
            (None, NamedBy::Image) => self.confinement.open(path)?,
        };
        see_once(&source, &mut self.seen)?;
        if named_by == NamedBy::User && role == FileRole::Image {
            self.confinement.add_image(path, &source);
        }
        let locked = match lock::lock(&source, self.policy.sharing) {
            Err(error) if self.policy.report_in_use => match error.kind() {
                ErrorKind::InUse(how) => {
                    self.warn(path, WarningKind::InUse(how.clone()));
                    false
                }
                _ => return Err(error),
            },
            Err(error) => return Err(error),
            Ok(Locked::Yes) => true,
            Ok(Locked::NotSupported) => {
                self.warn(path, WarningKind::NotLocked);
                false
            }
        };
        // From here on nobody changes it: what was seen before the locks may be old.
        source.refresh()?;
        if locked
            && self.policy.sharing == Sharing::Readers
            && let (Some(probe), Some(file)) = (&self.policy.unwritten, source.file())
            && probe.nobody_writes(file)
        {
            source.set_unwritten_probe(Arc::clone(probe));
        }
        Ok(source)
    }

    fn warn(&mut self, path: &Path, kind: WarningKind) {
        self.warnings.push(Warning { path: path.to_owned(), kind });
    }

    fn open_layer(&mut self, reference: &Reference) -> Result<Layer> {
        let source =
            Arc::new(self.open_file(&reference.path, FileRole::Image, reference.named_by)?);
        self.check_expected(reference, &source)?;
        let format = match reference.format {
            Some(format) => format,
            None => self.probe(reference, &source)?,
        };
        let is_active = !reference.is_backing;
        let snapshot = self.policy.snapshot.as_ref().filter(|_| is_active);
        if format != Format::Qcow2
            && let Some(snapshot) = snapshot
        {
            return Err(Error::new(ErrorKind::SnapshotNotFound(format!(
                "no snapshot {snapshot}: the format {format} has no internal snapshots"
            )))
            .at_path(source.path()));
        }
        let file = Arc::clone(&source);
        let OpenPolicy { past_damage, allow_corrupt, .. } = *self.policy;
        let image = apart(|| -> Result<Box<dyn ImageFormat>> {
            Ok(match (format, past_damage) {
                (Format::Raw, _) => Box::new(RawImage::open(file)?),
                (Format::Qcow2, false) => {
                    Box::new(Qcow2Image::open(file, snapshot, allow_corrupt)?)
                }
                (Format::Qcow2, true) => {
                    Box::new(Qcow2Image::open_past_damage(file, snapshot, allow_corrupt)?)
                }
                (Format::Qcow, false) => Box::new(QcowImage::open(file)?),
                (Format::Qcow, true) => Box::new(QcowImage::open_past_damage(file)?),
                (Format::Cow, false) => Box::new(CowImage::open(file)?),
                (Format::Cow, true) => Box::new(CowImage::open_past_damage(file)?),
            })
        })?;
        for notice in image.notices() {
            self.warn(source.path(), notice.into());
        }
        let data_file = self.data_file(&*image, &source, is_active)?;
        Ok(Layer { image, source, data_file, declared_format: reference.format })
    }

    fn check_expected(&mut self, reference: &Reference, source: &Source) -> Result<()> {
        let Some(expected) = reference.expected else { return Ok(()) };
        if expected.matches(source) {
            return Ok(());
        }
        if self.policy.allow_changed_backing {
            self.warn(source.path(), WarningKind::ChangedBacking);
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the backing file has changed since the cow image was made: the cow image recorded {}modification at {} (seconds since 1970), the file has {} bytes, modified at {}; if you know that it is the right one, use --allow-changed-backing",
            expected.size.map(|size| format!("{} bytes, ", size.get())).unwrap_or_default(),
            expected.modified,
            source.length().get(),
            source.modified().unwrap_or_default(),
        ))
        .at_path(source.path()))
    }

    fn probe(&mut self, reference: &Reference, source: &Source) -> Result<Format> {
        let format = probe_format(source)?;
        if reference.is_backing {
            if !self.policy.probe_backing {
                let overlay = self.layers.last().map(|layer| layer.image.format());
                let declare = match overlay {
                    Some(Format::Qcow2) => format!(
                        "declare it with 'qemu-img rebase -u -F {format} -b NAME OVERLAY', or "
                    ),
                    _ => "the overlay's format can't declare one: ".to_owned(),
                };
                return Err(Error::invalid(format!(
                    "no format is declared for this backing file (it looks like {format}); {declare}accept the risk of guessing with --probe-backing"
                ))
                .at_path(source.path()));
            }
            self.warn(source.path(), WarningKind::UndeclaredBackingFormat(format));
        }
        Ok(format)
    }

    fn data_file(
        &mut self,
        image: &dyn ImageFormat,
        source: &Source,
        is_active: bool,
    ) -> Result<Option<Arc<Source>>> {
        let given = self.policy.data_file.clone().filter(|_| is_active);
        let (path, named_by) = match (image.data_file(), given) {
            (None, None) => return Ok(None),
            (None, Some(_)) => {
                return Err(Error::new(ErrorKind::Usage(
                    "--data-file is given, but the image has no external data file".to_owned(),
                ))
                .at_path(source.path()));
            }
            (Some(_), Some(given)) if self.policy.named_in.is_none() => (given, NamedBy::User),
            (Some(_), Some(given)) => (given, NamedBy::Image),
            (Some(Some(stored)), None) => {
                (resolve_data_file(source.path(), &stored)?, NamedBy::Image)
            }
            (Some(None), None) => {
                return Err(Error::invalid(
                    "the image has an external data file but does not name it; give it with --data-file",
                )
                .at_path(source.path()));
            }
        };
        let whose = "the external data file";
        let file = self
            .open_file(&path, FileRole::DataFile, named_by)
            .map_err(|error| named_in(error, whose, source.path()))?;
        Ok(Some(Arc::new(file)))
    }

    fn backing_of(&self, layer: &Layer) -> Result<Option<Reference>> {
        let Some(backing) = layer.backing() else { return Ok(None) };
        if let (Some((path, format)), true) = (&self.policy.backing, self.layers.is_empty()) {
            let (path, format) = (path.clone(), Some(*format));
            let named_by = NamedBy::User;
            let reference = Reference { path, format, expected: None, is_backing: true, named_by };
            return Ok(Some(reference));
        }
        let (path, format) = resolve_backing(layer.source.path(), backing)?;
        let (expected, named_by) = (backing.expected, NamedBy::Image);
        Ok(Some(Reference { path, format, expected, is_backing: true, named_by }))
    }
}

/// `name` seen from the directory of `image`. Spelled as QEMU spells it, until in a long
/// chain of relative names that comes near to what the kernel takes.
fn beside(image: &Path, name: &Path) -> PathBuf {
    const LONG: usize = 2048;
    let path = resolve_beside(image, name);
    if path.as_os_str().len() < LONG {
        return path;
    }
    let directory = resolve_beside(image, Path::new("."));
    std::fs::canonicalize(directory).map_or(path, |directory| directory.join(name))
}

/// One format out of two places that may name it.
fn agree(declared: Option<Format>, driver: Option<&str>) -> Result<Option<Format>> {
    let driver: Option<Format> = driver.map(str::parse).transpose()?;
    match (declared, driver) {
        (Some(a), Some(b)) if a != b => Err(Error::invalid(format!(
            "the format is declared as {a}, but the json: name says {b}"
        ))),
        (declared, driver) => Ok(declared.or(driver)),
    }
}

/// Splits an argument as DESIGN does: with a slash it is a path, else a NAME.
pub fn is_path(argument: &OsStr) -> bool {
    argument.as_bytes().contains(&b'/')
}
