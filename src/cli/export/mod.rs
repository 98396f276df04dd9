//! `imgdm export`: what was written to a device, as a qcow2 overlay of its image.

mod backing;
mod job;
mod source;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use imgdm::convert::options::FormatOptions;
use imgdm::device::export::{DeviceOrigin, Moment};
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::error::printable;
use imgdm::format::Format;
use imgdm::overlay::exceptions::ExceptionStore;
use imgdm::overlay::input::{ChangedDisk, ImageOrigin};
use imgdm::units::{ByteLen, HostOffset};
use imgdm::{Error, ErrorKind, Result};

use super::Globals;
use super::convert::{OptionsParser, catch_signals, threads};
use super::open::ReachArgs;
use super::output::OutputFormat;
use super::unlock::{UnlockArgs, Unlocker};
use backing::Facts;
use job::{Job, Outputs};
use source::{Kept, Named};

/// Write what was changed on a writable device into a qcow2 overlay of its image
///
/// OUT holds the changed clusters, and names the image as its backing file: QEMU boots it as
/// it is. It is written beside its name, and has the name only once it is finished and on the
/// disk.
///
/// A device that is attached is suspended for a moment, with its file systems in order, so
/// that OUT is of one instant: who reads or writes it waits meanwhile. On file systems with
/// shared blocks (XFS, btrfs) a kept store is cloned for that, and the device goes on at once;
/// elsewhere, and where the store is not kept, it waits until all is copied. It goes on
/// whatever becomes of this command, also where that is killed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm attach --overlay disk.qcow2\n  imgdm export disk changed.qcow2\n  qemu-system-x86_64 -m 2G -drive file=changed.qcow2\n\n  imgdm attach --overlay=disk.changes disk.qcow2\n  imgdm detach disk\n  imgdm export -c ./disk.changes changed.qcow2\n\n  imgdm convert -O qcow2 changed.qcow2 whole.qcow2    all of the disk, without the image"
)]
pub(crate) struct Args {
    /// What was written to: the NAME or path of a device that is attached with --overlay, the
    /// image of one, or the file of a store that is kept
    #[arg(value_name = "NAME|STORE")]
    source: PathBuf,

    /// The new qcow2 image: a file that is not there yet, or, with --force, one that is to be
    /// replaced or a block device
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// The image of a STORE that is not attached, where it is not where the store says
    #[arg(long, value_name = "IMAGE")]
    image: Option<PathBuf>,

    #[command(flatten)]
    reach: ReachArgs,

    /// Name of the backing file, as OUT is to have it: seen from the directory of OUT. Without
    /// it, the absolute path of the image
    #[arg(long, value_name = "NAME")]
    backing: Option<PathBuf>,

    /// Format of that backing file (raw, qcow2, qcow); without it, that of the image
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    backing_format: Option<Format>,

    /// Hold exactly what was changed: in subclusters (extended_l2), which QEMU reads since 5.2.
    /// Without it, a cluster that was changed in part is filled from the image
    #[arg(long, conflicts_with = "compress")]
    subclusters: bool,

    /// Compress the clusters
    #[arg(short, long)]
    compress: bool,

    /// Options of qcow2, NAME=VALUE,...; 'help' lists them
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", value_parser = OptionsParser)]
    format_options: Vec<String>,

    /// Replace OUT if it is there; write to OUT if it is a block device
    #[arg(long)]
    force: bool,

    /// Print how far it is in percent, as lines on stderr
    #[arg(short, long)]
    progress: bool,

    /// Threads that copy; without it, one for each core
    #[arg(short = 'm', long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    #[command(flatten)]
    keys: UnlockArgs,

    /// Print what was done
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let options = args.options()?;
    let unlocker = args.keys.unlocker()?;
    catch_signals()?;
    let kernel = LinuxKernel::new();
    match source::find(&kernel, &args.source)? {
        Named::Attached(attached) => {
            let given = [(args.image.is_some(), "--image"), (unlocker.is_given_keys(), "key")];
            if let Some((_, what)) = given.iter().find(|(is_given, _)| *is_given) {
                let name = printable(&attached.name);
                let message = format!("'{name}' is attached, and needs no {what}: leave it out");
                return Err(Error::new(ErrorKind::Usage(message)).into());
            }
            export_attached(args, &options, &kernel, &attached, globals)
        }
        Named::Store(path) => {
            let kept = Kept::open(&path, args.image.as_deref(), args.reach.reach(), globals)?;
            export_kept(args, &options, &kept, unlocker, globals)
        }
    }
}

impl Args {
    /// The options of OUT.
    fn options(&self) -> Result<FormatOptions> {
        let parse = |texts: &[String]| FormatOptions::parse(Format::Qcow2, texts);
        let mut options = parse(&self.format_options)?;
        if self.subclusters && !has_subclusters(&options) {
            let extended = "extended_l2=on".to_owned();
            let texts: Vec<_> = self.format_options.iter().cloned().chain([extended]).collect();
            options = parse(&texts)?;
        }
        options.check(self.compress, true)?;
        Ok(options)
    }
}

/// Bytes that OUT can tell to be changed or not by themselves, and of a cluster.
fn granularity(options: &FormatOptions) -> (u64, u64) {
    match options {
        FormatOptions::Qcow2(options) => (options.granularity(), options.cluster_size()),
        FormatOptions::Raw(_) | FormatOptions::Qcow(_) => (512, 512),
    }
}

fn has_subclusters(options: &FormatOptions) -> bool {
    let (granularity, cluster) = granularity(options);
    granularity < cluster
}

/// Refuses subclusters that are larger than a chunk: a chunk could not be told from others.
fn check_exact(args: &Args, options: &FormatOptions, chunk: u64) -> Result<()> {
    let (granularity, _) = granularity(options);
    if args.subclusters && granularity > chunk {
        return Err(Error::new(ErrorKind::Usage(format!(
            "--subclusters: subclusters of {granularity} bytes are larger than what was changed at a time, {chunk} bytes: choose a cluster_size of at most {}",
            chunk.saturating_mul(32)
        ))));
    }
    Ok(())
}

fn export_attached(
    args: &Args,
    options: &FormatOptions,
    kernel: &LinuxKernel,
    attached: &Attached,
    globals: Globals,
) -> anyhow::Result<()> {
    let interrupt = catch_signals()?;
    imgdm::device::export::overlay_of(attached)?;
    let facts = Facts::of_attached(kernel, attached, args.backing.is_some())?;
    let backing = backing::stored(args, &facts, globals)?;
    let files = attached.loops.iter().map(|each| each.info.file);
    let mut outputs = Outputs::create(args, options, files)?;
    let origin = DeviceOrigin::of(kernel, attached)?;
    let moment = Moment::take(kernel, attached, &outputs.files(), &interrupt)?;
    if moment.holds_still() {
        globals.warn(format_args!(
            "'{}' is suspended until all is copied: its store lies where no blocks can be shared",
            printable(&attached.name)
        ));
    }
    let job = Job { args, options, backing: &backing, interrupt };
    let (store, start) = moment.store();
    let store = ExceptionStore::open(store, start, facts.size)?;
    check_exact(args, options, store.chunk_size())?;
    let input = ChangedDisk::new(&origin, store.changes()?);
    let changed = changed(&input);
    let summary = job.copy(&input, &outputs, globals)?;
    drop(input);
    let suspended = moment.end()?;
    interrupt.check()?;
    outputs.commit()?;
    job.print(&outputs, facts.size, changed, Some(suspended), summary)
}

fn export_kept(
    args: &Args,
    options: &FormatOptions,
    kept: &Kept,
    unlocker: Unlocker,
    globals: Globals,
) -> anyhow::Result<()> {
    let interrupt = catch_signals()?;
    let facts = kept.facts()?;
    let backing = backing::stored(args, &facts, globals)?;
    let mut outputs = Outputs::create(args, options, kept.files())?;
    let start = HostOffset::new(imgdm::overlay::STORE_OFFSET);
    let store = ExceptionStore::open(&kept.source, start, facts.size)?;
    check_exact(args, options, store.chunk_size())?;
    let (granularity, cluster) = granularity(options);
    let told_apart = if args.compress { cluster } else { granularity };
    let needed = match told_apart > store.chunk_size() {
        // Some clusters are of both.
        true => kept.chain.keys_needed(kept.chain.whole())?,
        false => std::collections::BTreeSet::new(),
    };
    let unlocked = unlocker.unlock(&kept.chain, &needed)?;
    let origin = ImageOrigin { chain: &kept.chain, ciphers: &unlocked.ciphers };
    let input = ChangedDisk::new(&origin, store.changes()?);
    let changed = changed(&input);
    let job = Job { args, options, backing: &backing, interrupt };
    let summary = job.copy(&input, &outputs, globals)?;
    kept.check_unchanged()?;
    interrupt.check()?;
    outputs.commit()?;
    job.print(&outputs, facts.size, changed, None, summary)
}

/// Bytes that were changed, in whole chunks.
fn changed(input: &ChangedDisk<'_>) -> ByteLen {
    let changes = input.changes();
    let bytes = changes.count().saturating_mul(changes.store().chunk_size());
    ByteLen::new(bytes).min(changes.store().disk())
}
