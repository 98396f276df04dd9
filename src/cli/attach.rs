//! `imgdm attach`: an image becomes /dev/mapper/NAME.

use std::collections::BTreeSet;
use std::io::Write;

use anyhow::Context;
use imgdm::device::Interrupt;
use imgdm::device::attach::{Above, Attachment, Partitions};
use imgdm::device::detach::{detach, find};
use imgdm::device::linux::LinuxKernel;

use super::build::{BuildArgs, Wanted, volume_name};
use super::evidence::{Evidence, EvidenceArgs, in_full};
use super::exit::is_broken_pipe;
use super::output::show_path;
use super::overlay::OverlayArgs;
use super::{Globals, signal, workers};

/// Attach an image as the block device /dev/mapper/NAME: read-only, or over an overlay
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm attach disk.qcow2                     prints /dev/mapper/disk\n  imgdm attach -l before-update disk.qcow2    its snapshot, as disk@before-update\n  imgdm attach --name golden /srv/base.raw\n  imgdm attach --partitions disk.qcow2        also prints /dev/mapper/disk1, ...\n  imgdm attach --lv guest/root disk.qcow2     also prints /dev/mapper/disk-root\n  imgdm attach --overlay disk.qcow2           takes writes, until it is detached\n  imgdm attach --overlay=changes disk.qcow2   the same, and changes are kept\n  imgdm attach --evidence --hash disk.qcow2   keeps a record in ./disk.evidence.json\n\nNothing runs on: the kernel alone serves the device until 'imgdm detach NAME'.\nThe image is never written. While it is attached, QEMU may read it but not write to it."
)]
pub(crate) struct Args {
    #[command(flatten)]
    build: BuildArgs,

    /// Also make a device of each partition, as NAME1 or, where NAME ends in a digit, NAMEp1
    #[arg(long)]
    partitions: bool,

    /// Also make a device of this partition; can be given several times. It is an error where
    /// there is none
    #[arg(short, long, value_name = "N", conflicts_with = "partitions")]
    partition: Vec<u32>,

    /// Also make a device of this logical volume of the guest's LVM, as NAME-LV; can be given
    /// several times. Linear and striped ones on this disk alone; the host's LVM is not asked
    #[arg(long = "lv", value_name = "VG/LV", value_parser = volume_name)]
    logical_volumes: Vec<String>,

    /// Where the image is attached already but marked for removal at its last close, make
    /// it stay
    #[arg(long)]
    keep: bool,

    /// Let the host look into the disk as into its own: links in /dev/disk/by-uuid and others,
    /// volume groups activated
    #[arg(long)]
    publish: bool,

    #[command(flatten)]
    overlay: OverlayArgs,

    #[command(flatten)]
    evidence: EvidenceArgs,
}

impl Args {
    fn above(&self) -> Above {
        let partitions = match (self.partitions, &self.partition[..]) {
            (true, _) => Partitions::All,
            (false, []) => Partitions::None,
            (false, numbers) => Partitions::Only(BTreeSet::from_iter(numbers.iter().copied())),
        };
        Above { partitions, logical_volumes: self.logical_volumes.clone() }
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    workers::prepare()?;
    let kernel = LinuxKernel::new();
    let above = args.above();
    let wanted = Wanted {
        above: &above,
        publish: args.publish,
        as_it_is: false,
        keep: args.keep,
        overlay: &args.overlay,
    };
    let (pending, evidence) = if args.evidence.is_given() {
        args.build.build_recorded(&kernel, wanted, &args.evidence, globals)?
    } else {
        (args.build.build(&kernel, wanted, globals)?, None)
    };
    let interrupt = signal::catch()?;
    // Of what is attached already there is a record, and that is the only one.
    if pending.already_attached()
        && let Err(error) = args.evidence.check_record_of(pending.uuid())
    {
        return Err(pending.undo(error).into());
    }
    let mut evidence = evidence.filter(|_| !pending.already_attached());
    if let Some(Err(error)) = evidence.as_mut().map(Evidence::remember) {
        return Err(pending.undo(error).into());
    }
    let attachment = match pending.commit(&interrupt) {
        Ok(attachment) => attachment,
        Err(error) => {
            if !error.leftovers.is_empty() {
                keep(&mut evidence);
            }
            return Err(error.into());
        }
    };
    // The device is there: from here on the record goes only where that goes first.
    keep(&mut evidence);
    let recorded = match &mut evidence {
        Some(evidence) => evidence.attached(&attachment.path, &interrupt, globals),
        None => Ok(()),
    };
    let error = match recorded {
        Ok(()) => match print_devices(&attachment) {
            Ok(()) => return Ok(()),
            // Whoever closed the pipe does not wait for the path: the device stays.
            Err(error) if is_broken_pipe(&error) || attachment.already_attached => {
                return Err(error);
            }
            Err(error) => error,
        },
        Err(error) => error.into(),
    };
    // Whoever waits for the path takes this for a failure: then it should be one.
    match take_back(&kernel, &attachment) {
        Ok(()) => {
            if let Some(evidence) = evidence {
                evidence.goes();
            }
            Err(error)
        }
        Err(why) => {
            let path = show_path(&attachment.path);
            Err(error
                .context(format!("{path} stays, for it can't be detached ({})", in_full(&why))))
        }
    }
}

fn keep(evidence: &mut Option<Evidence>) {
    if let Some(evidence) = evidence {
        evidence.stays();
    }
}

/// Detaches what was just attached.
fn take_back(kernel: &LinuxKernel, attachment: &Attachment) -> imgdm::Result<()> {
    let attached = find(kernel, &attachment.path, None)?;
    detach(kernel, &attached, false, &Interrupt::never())
}

/// Prints the paths of the device and what stands on it, which is what whoever calls waits
/// for.
fn print_devices(attachment: &Attachment) -> anyhow::Result<()> {
    let above = attachment.above.iter().map(|above| &above.path);
    let paths: String = std::iter::once(&attachment.path)
        .chain(above)
        .map(|path| format!("{}\n", path.display()))
        .collect();
    let printed = std::io::stdout().write_all(paths.as_bytes());
    printed.context("cannot print the path of the device")
}
