//! What the new image names as its backing file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use imgdm::chain::Chain;
use imgdm::convert::create::StoredBacking;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::verify::Verifier;
use imgdm::device::{DeviceNumber, PathState, attach::Options};
use imgdm::error::printable;
use imgdm::format::Format;
use imgdm::open::{LocalName, OpenPolicy, open_chain, resolve_beside};
use imgdm::scratch::OnError;
use imgdm::source::FileId;
use imgdm::units::ByteLen;
use imgdm::{Error, ErrorKind, Result};

use super::super::key::encrypted_layers;
use super::super::output::show_path;
use super::super::{Globals, verify::described};
use super::Args;

/// What is known of the image that was written over.
pub(super) struct Facts {
    /// Where it is; or why that is not known.
    path: Result<PathBuf, String>,
    /// Its format, where it could be opened.
    format: Option<Format>,
    /// The snapshot of it that is meant.
    snapshot: Option<String>,
    /// Some of it is encrypted.
    is_encrypted: bool,
    /// Bytes of the disk.
    pub(super) size: ByteLen,
    /// What is read where it can't be.
    on_error: OnError,
}

impl Facts {
    pub(super) fn new(
        path: Result<PathBuf, String>,
        chain: Option<&Chain>,
        snapshot: Option<String>,
        size: ByteLen,
        on_error: OnError,
    ) -> Result<Self> {
        let format = chain.and_then(|chain| Some(chain.layers().first()?.image.format()));
        let path = path.map(lasting_name);
        let is_encrypted = chain.is_some_and(|chain| !encrypted_layers(chain).is_empty());
        Ok(Self { path, format, snapshot, is_encrypted, size, on_error })
    }

    /// Of the image of a device that is attached; it need not be found where `named` another
    /// way.
    pub(super) fn of_attached(
        kernel: &LinuxKernel,
        attached: &Attached,
        named: bool,
    ) -> Result<Self> {
        let path = match &attached.image {
            Some(image) => match image.state {
                PathState::Same => Ok(image.path.clone()),
                PathState::Deleted => Err(format!("{} was removed", show_path(&image.path))),
                PathState::Other => {
                    Err(format!("another file is at {} by now", show_path(&image.path)))
                }
            },
            None => Err("the kernel does not know where it is".to_owned()),
        };
        let verifier = Verifier::open(kernel, attached.clone(), None)?;
        let chain = verifier.chain();
        if chain.is_none() && !named {
            let why = verifier.found().findings().last().map(described).unwrap_or_default();
            let message = format!("the image can't be opened anew: {why}");
            return Err(Error::new(ErrorKind::NotFound(message)));
        }
        let size = ByteLen::new(attached.size.to_bytes().unwrap_or(u64::MAX));
        let on_error = Options::from_bits(attached.uuid.options)?.on_error;
        Self::new(path, chain, attached.snapshot.clone(), size, on_error)
    }
}

/// The name of a device of device-mapper instead of a number (`/dev/dm-3`), which may be another
/// device's after the next boot; all other paths as they are.
fn lasting_name(path: PathBuf) -> PathBuf {
    let id = FileId::of_path(&path);
    let Some(FileId { device, inode: 0 }) = id else { return path };
    let number = DeviceNumber::from_dev(device);
    let Ok(name) = std::fs::read(format!("/sys/dev/block/{number}/dm/name")) else { return path };
    let name = Path::new("/dev/mapper").join(OsStr::from_bytes(name.trim_ascii_end()));
    if FileId::of_path(&name) == id { name } else { path }
}

/// The backing file as the new image is to name it.
///
/// # Errors
/// No name stands for the disk that was written over; the one that is given is of another.
pub(super) fn stored(args: &Args, facts: &Facts, globals: Globals) -> Result<StoredBacking> {
    if facts.on_error != OnError::Refuse {
        globals.warn(
            "the device has something in place of clusters that can't be read; QEMU fails to read them in the image",
        );
    }
    if facts.is_encrypted {
        globals
            .warn("the image is encrypted, and OUT is not: what was changed lies in it as it is");
    }
    let stored = match &args.backing {
        Some(name) => given(args, name, facts, globals)?,
        None => of_image(facts)?,
    };
    if stored.format == Some(Format::Cow) {
        return Err(Error::new(ErrorKind::NotRepresentable(
            "QEMU reads no cow images: make a qcow2 one of it ('imgdm convert -O qcow2'), and name that with --backing and -F qcow2"
                .to_owned(),
        )));
    }
    Ok(stored)
}

/// The image itself.
fn of_image(facts: &Facts) -> Result<StoredBacking> {
    if let Some(snapshot) = &facts.snapshot {
        let snapshot = printable(snapshot);
        return Err(Error::new(ErrorKind::NotRepresentable(format!(
            "the device is of the snapshot '{snapshot}', and no name of a backing file stands for that: make an image of it ('imgdm convert -O qcow2 -l {snapshot} IMAGE base.qcow2'), and name it with --backing base.qcow2 -F qcow2"
        ))));
    }
    let path = facts.path.as_ref().map_err(|why| {
        Error::new(ErrorKind::NotFound(format!(
            "the image has no name any more ({why}): say with --backing and -F what OUT is to name"
        )))
    })?;
    Ok(StoredBacking { name: path.as_os_str().as_bytes().to_vec(), format: facts.format })
}

/// The name that was given, and what is there, if anything.
fn given(args: &Args, name: &Path, facts: &Facts, globals: Globals) -> Result<StoredBacking> {
    let local = LocalName::parse(name.as_os_str().as_bytes())?;
    let path = resolve_beside(&args.out, &local.path);
    // Of a snapshot's copy nothing is known but what is said.
    let own = facts.format.filter(|_| facts.snapshot.is_none());
    let Some(format) = args.backing_format.or(own) else {
        let message = "say with -F which format it has: a guessed one is not to be stored";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(name));
    };
    let stored = StoredBacking { name: name.as_os_str().as_bytes().to_vec(), format: Some(format) };
    let policy = OpenPolicy {
        format: Some(format),
        probe_backing: true,
        report_in_use: true,
        reach: args.reach.reach(),
        ..OpenPolicy::default()
    };
    match open_chain(&path, &policy) {
        Ok(opened) if opened.chain.virtual_size() != facts.size => {
            let message = format!(
                "this can't be the backing file: its disk has {} bytes, and the device {}",
                opened.chain.virtual_size().get(),
                facts.size.get()
            );
            Err(Error::new(ErrorKind::Usage(message)).at_path(path))
        }
        Ok(_) => Ok(stored),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound(_)) => {
            globals.warn(format_args!(
                "{}: nothing is there yet; it has to have the content of the image",
                show_path(&path)
            ));
            Ok(stored)
        }
        Err(error) => Err(error.at_path(path)),
    }
}
