//! What an image says of itself, as `qemu-img info` tells it, and what its files are.
//!
//! Nothing but headers is read, so that a damaged image tells what it can: metadata that
//! contradicts the specification is a notice here where QEMU goes on, too.

mod qcow2;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::cow::{CowImage, CowLayout};
use crate::format::qcow2::Snapshot;
use crate::format::raw::RawImage;
use crate::format::{BackingIdentity, BackingReference, Format, ImageFormat, qcow};
use crate::lock::{self, Locked, OthersLock, Sharing};
use crate::open::{
    Confinement, MAX_LAYERS, Reach, WarningKind, full_backing_name, image_argument,
    in_backing_file, probe_format, resolve_backing, resolve_data_file, see_once, too_many_layers,
};
use crate::source::{FileId, Source};
use crate::units::{ByteLen, SECTOR_SIZE};
use crate::worker::apart;

pub use qcow2::{EncryptionFacts, Qcow2Facts};

/// How an image is looked at.
#[derive(Clone, Debug, Default)]
pub struct InfoOptions {
    /// The image's format; probed where none is given.
    pub format: Option<Format>,
    /// With whom its files may be shared.
    pub sharing: Sharing,
    /// Where the files may lie that the images name.
    pub reach: Reach,
}

/// What is known of one image, without its backing file.
#[derive(Debug)]
pub struct ImageInfo {
    /// Its format.
    pub format: Format,
    /// Size of the virtual disk, in whole sectors of 512 bytes as QEMU has it.
    pub virtual_size: ByteLen,
    /// Bytes of a cluster; none for raw.
    pub cluster_size: Option<u64>,
    /// Whether the clusters are encrypted.
    pub encrypted: bool,
    /// Whether the image was not closed cleanly (qcow2's dirty bit).
    pub dirty: bool,
    /// The backing file, where the image names one.
    pub backing: Option<BackingFacts>,
    /// The internal snapshots (qcow2 only).
    pub snapshots: Vec<Snapshot>,
    /// What only qcow2 has.
    pub qcow2: Option<Qcow2Facts>,
    /// How the header is laid out (cow only).
    pub cow_layout: Option<CowLayout>,
    /// The file itself.
    pub file: FileFacts,
    /// The external data file, where there is one that can be looked at.
    pub data_file: Option<FileFacts>,
    /// What the user should know.
    pub notices: Vec<InfoNotice>,
}

/// A backing file as the overlay names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFacts {
    /// The name as it is stored, bytes of a stranger's choosing.
    pub name: Vec<u8>,
    /// The name seen from where the command runs, as QEMU spells it.
    pub full_name: Vec<u8>,
    /// The declared format's name, as it is stored.
    pub format: Option<String>,
    /// What the overlay recorded of the file (cow only).
    pub recorded: Option<BackingIdentity>,
}

/// A file of an image. It is open, and locked as long as this lives if it is the image's.
#[derive(Debug)]
pub struct FileFacts {
    /// The file: path, length, identity, times.
    pub source: Arc<Source>,
    /// The QEMU locks that others hold on it.
    pub locks: Vec<OthersLock>,
}

impl FileFacts {
    fn of(source: Source) -> Self {
        let locks = lock::others(&source);
        Self { source: Arc::new(source), locks }
    }

    /// Its length in whole sectors, as QEMU has it for any file; `None` past 2^64.
    pub fn length_in_sectors(&self) -> Option<ByteLen> {
        self.source.length().get().checked_next_multiple_of(SECTOR_SIZE).map(ByteLen::new)
    }
}

/// Something about an image that the user should know.
#[derive(Debug)]
pub enum InfoNotice {
    /// What a chain would be opened with a warning for.
    Warning(WarningKind),
    /// Metadata that is damaged, and without which the facts here stand.
    Damaged(Error),
    /// The external data file can't be looked at.
    NoDataFile(Error),
}

impl InfoNotice {
    /// A stable name for scripts.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Warning(kind) => kind.name(),
            Self::Damaged(_) => "damaged",
            Self::NoDataFile(_) => "no-data-file",
        }
    }
}

impl fmt::Display for InfoNotice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Warning(kind) => kind.fmt(f),
            Self::Damaged(error) | Self::NoDataFile(error) => {
                error.fmt(f)?;
                match std::error::Error::source(error) {
                    Some(cause) => write!(f, ": {cause}"),
                    None => Ok(()),
                }
            }
        }
    }
}

/// What is known of one image. Its backing file is not opened.
///
/// # Errors
/// The image can't be opened, is in use, or its header is not valid.
pub fn image_info(image: &Path, options: &InfoOptions) -> Result<ImageInfo> {
    let (path, format) = image_argument(image, options.format)?;
    let mut confinement = Confinement::new(&options.reach);
    let source = open_image(&path, &mut confinement)?;
    let layer = Layer { source, format, expected: None, is_backing: false };
    layer.look(options.sharing, &mut confinement)
}

/// What is known of an image and of all below it, the image first. The format of a backing
/// file whose overlay declares none is probed, with a notice.
///
/// # Errors
/// Those of [`image_info`], for each image; a backing file that is no local file; a chain
/// that runs in a circle or is longer than [`MAX_LAYERS`].
pub fn chain_info(image: &Path, options: &InfoOptions) -> Result<Vec<ImageInfo>> {
    let mut seen: HashSet<FileId> = HashSet::new();
    let (path, format) = image_argument(image, options.format)?;
    let mut confinement = Confinement::new(&options.reach);
    let source = open_image(&path, &mut confinement)?;
    see_once(&source, &mut seen)?;
    let layer = Layer { source, format, expected: None, is_backing: false };
    let mut infos = vec![layer.look(options.sharing, &mut confinement)?];
    while let Some(last) = infos.last()
        && let Some(backing) = &last.backing
    {
        let overlay = last.file.source.path();
        let reference = backing.reference();
        let (path, format) = resolve_backing(overlay, &reference)?;
        if infos.len() == MAX_LAYERS {
            return Err(too_many_layers(&path));
        }
        let source = confinement.open(&path).map_err(|error| in_backing_file(error, overlay))?;
        see_once(&source, &mut seen)?;
        let layer = Layer { source, format, expected: backing.recorded, is_backing: true };
        infos.push(layer.look(options.sharing, &mut confinement)?);
    }
    Ok(infos)
}

/// The internal snapshots of an image, and its format; a format other than qcow2 has none.
///
/// # Errors
/// Those of [`image_info`]; the snapshot table is damaged.
pub fn snapshots(image: &Path, options: &InfoOptions) -> Result<(Format, Vec<Snapshot>)> {
    let (path, format) = image_argument(image, options.format)?;
    let mut source = Source::open(&path)?;
    lock_and_refresh(&mut source, options.sharing)?;
    let format = format.map_or_else(|| probe_format(&source), Ok)?;
    let snapshots = apart(|| match format {
        // Not facts(), which goes on past a damaged table.
        Format::Qcow2 => qcow2::read_snapshots(&source),
        _ => facts(format, &Arc::new(source)).map(|facts| facts.snapshots),
    });
    Ok((format, snapshots?))
}

/// Opens an image that the user named.
fn open_image(path: &Path, confinement: &mut Confinement<'_>) -> Result<Source> {
    let source = Source::open(path)?;
    confinement.add_image(path, &source);
    Ok(source)
}

/// Locks the file; what was seen before may be old.
fn lock_and_refresh(source: &mut Source, sharing: Sharing) -> Result<Locked> {
    let locked = lock::lock(source, sharing)?;
    source.refresh()?;
    Ok(locked)
}

impl BackingFacts {
    fn new(overlay: &Path, reference: BackingReference) -> Self {
        let BackingReference { name, format, expected } = reference;
        Self { full_name: full_backing_name(overlay, &name), name, format, recorded: expected }
    }

    fn reference(&self) -> BackingReference {
        BackingReference {
            name: self.name.clone(),
            format: self.format.clone(),
            expected: self.recorded,
        }
    }
}

/// An image to be looked at.
struct Layer {
    source: Source,
    format: Option<Format>,
    /// What the overlay recorded of it.
    expected: Option<BackingIdentity>,
    is_backing: bool,
}

/// What a format's own metadata says.
#[derive(Debug, Default)]
struct FormatFacts {
    virtual_size: ByteLen,
    cluster_size: Option<u64>,
    encrypted: bool,
    dirty: bool,
    backing: Option<BackingReference>,
    snapshots: Vec<Snapshot>,
    qcow2: Option<Qcow2Facts>,
    cow_layout: Option<CowLayout>,
    /// The data file's name as it is stored, where the image has a data file.
    data_file: Option<Option<PathBuf>>,
    notices: Vec<InfoNotice>,
}

impl FormatFacts {
    /// What is right, or its default and a notice of what is wrong.
    fn unless_damaged<T: Default>(&mut self, source: &Source, outcome: Result<T>) -> Result<T> {
        outcome.or_else(|error| match error.kind() {
            ErrorKind::InvalidImage(_) | ErrorKind::Unsupported(_) => {
                self.notices.push(InfoNotice::Damaged(error.at_path(source.path())));
                Ok(T::default())
            }
            _ => Err(error),
        })
    }
}

impl Layer {
    fn look(mut self, sharing: Sharing, confinement: &mut Confinement<'_>) -> Result<ImageInfo> {
        let mut notices = Vec::new();
        let mut notice = |kind| notices.push(InfoNotice::Warning(kind));
        if lock_and_refresh(&mut self.source, sharing)? == Locked::NotSupported {
            notice(WarningKind::NotLocked);
        }
        if self.expected.is_some_and(|expected| !expected.matches(&self.source)) {
            notice(WarningKind::ChangedBacking);
        }
        let format = match self.format {
            Some(format) => format,
            None => {
                let format = probe_format(&self.source)?;
                if self.is_backing {
                    notice(WarningKind::UndeclaredBackingFormat(format));
                }
                format
            }
        };
        let file = FileFacts::of(self.source);
        let source = &file.source;
        let facts = apart(|| facts(format, source))?;
        notices.extend(facts.notices);
        let data_file = match facts.data_file.map(|name| data_file(source, name, confinement)) {
            None => None,
            Some(Ok(file)) => Some(file),
            Some(Err(error)) => {
                notices.push(InfoNotice::NoDataFile(error));
                None
            }
        };
        Ok(ImageInfo {
            format,
            virtual_size: facts.virtual_size,
            cluster_size: facts.cluster_size,
            encrypted: facts.encrypted,
            dirty: facts.dirty,
            backing: facts.backing.map(|backing| BackingFacts::new(source.path(), backing)),
            snapshots: facts.snapshots,
            qcow2: facts.qcow2,
            cow_layout: facts.cow_layout,
            data_file,
            notices,
            file,
        })
    }
}

fn facts(format: Format, source: &Arc<Source>) -> Result<FormatFacts> {
    match format {
        Format::Raw => raw(source),
        Format::Qcow2 => qcow2::facts(source),
        Format::Qcow => qcow(source),
        Format::Cow => cow(source),
    }
}

fn raw(source: &Arc<Source>) -> Result<FormatFacts> {
    let image = RawImage::open(Arc::clone(source))?;
    Ok(FormatFacts { virtual_size: image.virtual_size(), ..FormatFacts::default() })
}

fn qcow(source: &Source) -> Result<FormatFacts> {
    let header = qcow::read_header(source)?;
    let mut facts = FormatFacts {
        virtual_size: header.size().floor_to_sector(),
        cluster_size: Some(header.cluster_size()),
        encrypted: header.crypt_method().is_some(),
        ..FormatFacts::default()
    };
    facts.unless_damaged(source, qcow::require_l1_inside(source, &header))?;
    facts.backing = facts.unless_damaged(source, qcow::read_backing(source, &header))?;
    Ok(facts)
}

fn cow(source: &Arc<Source>) -> Result<FormatFacts> {
    let image = CowImage::open_past_damage(Arc::clone(source))?;
    Ok(FormatFacts {
        virtual_size: image.virtual_size(),
        cluster_size: Some(image.cluster_size()),
        backing: image.backing().cloned(),
        cow_layout: Some(image.header().layout()),
        ..FormatFacts::default()
    })
}

/// Opens the external data file to see what it is. It is not locked: nothing of it is read.
fn data_file(
    image: &Source,
    stored: Option<PathBuf>,
    confinement: &mut Confinement<'_>,
) -> Result<FileFacts> {
    let stored = stored.ok_or_else(|| {
        Error::invalid("the image has an external data file but does not name it")
            .at_path(image.path())
    })?;
    let path = resolve_data_file(image.path(), &stored)?;
    Ok(FileFacts::of(confinement.open(&path)?))
}
