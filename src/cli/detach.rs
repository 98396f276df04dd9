//! `imgdm detach`: the device, its loop devices and locks go.

use std::io::Write;
use std::path::{Path, PathBuf};

use imgdm::device::Interrupt;
use imgdm::device::detach::{detach, detach_all, find, find_by_default_name};
use imgdm::device::going::wait_until_gone;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::overlay::OverlayState;
use imgdm::source::FileId;
use imgdm::{Error, ErrorKind};

use super::evidence::detach::detach_with_record;
use super::output::show_path;
use super::{Globals, signal, workers};

/// Detach an image; returns when device, loop devices and locks are gone
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm detach disk\n  imgdm detach ./disk.qcow2\n  imgdm detach --all\n  umount /mnt && imgdm detach --wait disk\n\nAn argument with a slash is a path (of the device or of the image), else a NAME."
)]
pub(crate) struct Args {
    /// What to detach: a NAME, /dev/mapper/NAME, or the path of an image or a store
    #[arg(value_name = "NAME|PATH", required_unless_present = "all", conflicts_with = "all")]
    target: Option<PathBuf>,

    /// Detach everything that is not in use
    #[arg(long)]
    all: bool,

    /// If the device is in use, leave its removal to the last close, and do not wait
    #[arg(long)]
    deferred: bool,

    /// Detach nothing, but wait for what the kernel is taking down by itself, as after the
    /// umount of an 'imgdm mount'. Where nothing is attached any more, succeed
    #[arg(long, conflicts_with_all = ["all", "deferred", "record"])]
    wait: bool,

    /// The record of an evidence attachment, where it is not known any more
    #[arg(long, value_name = "FILE", conflicts_with = "all")]
    record: Option<PathBuf>,

    /// Where nothing is attached, succeed
    #[arg(long)]
    if_attached: bool,

    /// The argument is an image, and only what 'imgdm attach' of it without options makes is
    /// meant, not what it is attached as besides. For imgdm@.service
    #[arg(long, hide = true, conflicts_with_all = ["all", "wait", "record"])]
    default_name: bool,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    workers::prepare()?;
    let kernel = LinuxKernel::new();
    let interrupt = signal::catch()?;
    let detach_one = |attached: &Attached| -> anyhow::Result<()> {
        if attached.is_evidence() {
            let record = args.record.as_deref();
            return detach_with_record(&kernel, attached, record, &interrupt, globals);
        }
        if args.record.is_some() {
            let name = imgdm::error::printable(&attached.name);
            let message = format!("'{name}' was attached without --evidence, and has no record");
            return Err(Error::new(ErrorKind::Usage(message)).into());
        }
        let detached = detach(&kernel, attached, args.deferred, &interrupt);
        if let Some(ended) = ended_store(attached).filter(|_| !is_in_use(&detached)) {
            globals.warn(ended);
        }
        Ok(detached?)
    };
    let Some(target) = &args.target else {
        let mut busy = 0;
        let results = detach_all(&kernel, args.deferred, &interrupt, detach_one)?;
        for (name, result) in &results {
            if let Err(error) = result {
                busy += 1;
                let name = imgdm::error::printable(name);
                writeln!(std::io::stderr(), "imgdm: {name}: {error:#}")?;
            }
        }
        if results.is_empty() && !args.if_attached {
            return Err(nothing_attached().into());
        }
        anyhow::ensure!(busy == 0, "{busy} of {} could not be detached", results.len());
        return Ok(());
    };
    if args.wait {
        return Ok(wait(&kernel, target, &interrupt)?);
    }
    let id = FileId::of_path(target);
    let found = match args.default_name {
        true => find_by_default_name(&kernel, target, id),
        false => find(&kernel, target, id),
    };
    match found {
        Ok(attached) => detach_one(&attached),
        Err(error) if args.if_attached && is_not_attached(&error) => Ok(()),
        Err(error) => {
            if is_not_attached(&error)
                && !imgdm::open::is_path(target.as_os_str())
                && target.exists()
            {
                let hint = show_path(target);
                globals.warn(format_args!("for the image of that name, write ./{hint}"));
            }
            Err(error.into())
        }
    }
}

/// Whether it is still there, and goes on being used.
fn is_in_use(detached: &imgdm::Result<()>) -> bool {
    detached.as_ref().is_err_and(|error| matches!(error.kind(), ErrorKind::InUse(_)))
}

/// What is to be said of a kept store that is full, or that the kernel gave up.
fn ended_store(attached: &Attached) -> Option<String> {
    let overlay = attached.overlay.as_ref().filter(|overlay| overlay.is_kept)?;
    let path = overlay.path.as_ref().map(|path| show_path(&path.path)).unwrap_or_default();
    match overlay.state {
        OverlayState::Full => Some(format!(
            "{path}: this store is full, and writes have failed since; what is in it is kept, and 'imgdm attach --overlay=FILE --overlay-size=N' makes it larger"
        )),
        OverlayState::Invalid => Some(format!(
            "{path}: the kernel has given this store up, which could not be written: what was written is lost, and the file is of no more use; the image is unhurt"
        )),
        OverlayState::Usable { .. } | OverlayState::Other(_) => None,
    }
}

/// Waits until what is on its way is gone. A file that no device has the name of is meant as
/// the image: to say that nothing is attached would mean that its locks are gone.
fn wait(kernel: &LinuxKernel, target: &Path, interrupt: &Interrupt<'_>) -> imgdm::Result<()> {
    let id = FileId::of_path(target);
    let mut found = find(kernel, target, id);
    if found.as_ref().is_err_and(is_not_attached)
        && !imgdm::open::is_path(target.as_os_str())
        && target.exists()
    {
        found = find(kernel, &Path::new(".").join(target), id);
    }
    let going = match &found {
        Ok(attached) if !attached.deferred_remove => {
            let name = imgdm::error::printable(&attached.name);
            return Err(Error::new(ErrorKind::InUse(format!(
                "'{name}' is attached to stay: 'imgdm detach {name}' takes it down"
            ))));
        }
        Ok(attached) => Some(&attached.uuid),
        Err(error) if is_not_attached(error) => None,
        Err(_) => return found.map(drop),
    };
    match wait_until_gone(kernel, going, interrupt) {
        Err(error) if matches!(error.kind(), ErrorKind::KernelLacks(_)) => Ok(()),
        other => other,
    }
}

fn nothing_attached() -> Error {
    Error::new(ErrorKind::NotAttached("nothing is attached".to_owned()))
}

fn is_not_attached(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotAttached(_) | ErrorKind::KernelLacks(_))
}
