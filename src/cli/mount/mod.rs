//! `imgdm mount`: a file system of an image on a directory, until `umount`.

mod choose;
pub(super) mod helper;

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use imgdm::device::attach::{Above, Overlay, Partitions, Pending};
use imgdm::device::disk::DeviceDisk;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::list;
use imgdm::device::mount::{self, Detached, MountPoint, Namespace};
use imgdm::device::{DeviceId, DeviceNumber, Interrupt, Kernel, fault, udev};
use imgdm::error::printable;
use imgdm::filesystem::{MountOptions, Unclean, split, unclean};
use imgdm::source::FileId;
use imgdm::{Error, ErrorKind, Result};

use super::build::{BuildArgs, Wanted};
use super::output::{show_path, stdout};
use super::overlay::OverlayArgs;
use super::{Globals, signal, workers};
use choose::{Place, Target, choose, whole};

/// Mount a file system of an image until umount: read-only, or over an overlay
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm mount -p 1 disk.qcow2 /mnt\n  imgdm mount -l before-update -p 1 disk.qcow2 /mnt\n  umount /mnt\n  imgdm mount --overlay -p 1 disk.qcow2 /mnt            for writing, until umount\n  imgdm mount --overlay=changes -p 1 disk.qcow2 /mnt    the same, and changes are kept\n\nThe image is never written. Without --overlay nothing is replayed either. umount takes everything down: device, loop devices, locks.\n'imgdm detach --wait ./disk.qcow2' waits until they are gone."
)]
pub(crate) struct Args {
    #[command(flatten)]
    build: BuildArgs,

    /// The directory to mount on
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// The partition with the file system. Without it: the only partition that can be
    /// mounted, or what lies on the whole disk
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    partition: Option<u32>,

    /// The logical volume of the guest's LVM with the file system
    #[arg(long = "lv", value_name = "VG/LV", conflicts_with = "partition")]
    logical_volume: Option<String>,

    /// Options of mount(8), separated by commas; those that it does not know go to the file
    /// system. Without suid, dev or exec among them, the mount is nosuid, nodev and noexec
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Let the file system's programs run, as -o exec does: mount(8) does not pass that on
    #[arg(long)]
    allow_exec: bool,

    /// Let its set-user-ID and set-group-ID bits have an effect, as -o suid does
    #[arg(long)]
    allow_suid: bool,

    /// Let its device nodes be opened, as -o dev does
    #[arg(long)]
    allow_dev: bool,

    #[command(flatten)]
    overlay: OverlayArgs,

    /// Type of the file system; without it the type is probed
    #[arg(short = 't', long = "type", value_name = "FSTYPE")]
    kind: Option<String>,

    /// Mount in this mount namespace: a process's number, or a path like /proc/PID/ns/mnt
    #[arg(short = 'N', long, value_name = "NS")]
    namespace: Option<PathBuf>,

    /// Say what was mounted, and how
    #[arg(short, long)]
    verbose: bool,

    /// Pass over options that the file system does not know
    #[arg(long)]
    sloppy: bool,

    /// Do everything but the mount
    #[arg(long)]
    fake: bool,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let options = args.mount_options()?;
    if options.read_write && !args.is_writable() {
        let message = "an image can't be mounted for writing: leave 'rw' out, or have --overlay keep what is written away from it".to_owned();
        return Err(Error::new(ErrorKind::Usage(message)).into());
    }
    let point = args.mount_point()?;
    let kernel = LinuxKernel::new();
    if let Some(there) = there_already(&kernel, &point, &args.build.open.image)? {
        return Err(there.refusal(&point).into());
    }
    mount_image(args, &options, &kernel, &point, None, globals)
}

/// The same for mount(8): `rw`, which it says unasked, is taken for `ro` without an overlay,
/// and what is mounted there already is left so, as by `mount -a`.
pub(crate) fn run_for_helper(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let options = args.mount_options()?;
    let point = args.mount_point()?;
    let kernel = LinuxKernel::new();
    let there = there_already(&kernel, &point, &args.build.open.image)?;
    mount_image(args, &options, &kernel, &point, there.as_ref(), globals)
}

impl Args {
    fn mount_options(&self) -> Result<MountOptions> {
        let mut options = MountOptions::sort(split(&self.options.join(","))?)?;
        options.exec |= self.allow_exec;
        options.suid |= self.allow_suid;
        options.dev |= self.allow_dev;
        Ok(options)
    }

    fn mount_point(&self) -> Result<MountPoint> {
        let namespace = self.namespace.as_deref().map(Namespace::open).transpose()?;
        MountPoint::open(&self.directory, namespace)
    }

    /// The type that is asked for; `auto` is mount(8)'s word for none.
    fn kind(&self) -> Option<&str> {
        self.kind.as_deref().filter(|&kind| kind != "auto")
    }

    fn image(&self) -> &Path {
        &self.build.open.image
    }

    /// The device takes writes.
    fn is_writable(&self) -> bool {
        self.overlay.overlay() != Overlay::None
    }

    /// Where the file system is said to be.
    fn place(&self) -> Place {
        match (self.partition, &self.logical_volume) {
            (Some(number), _) => Place::Partition(number),
            (None, Some(name)) => Place::Volume(name.clone()),
            (None, None) => Place::Disk,
        }
    }
}

/// A device of the image that is mounted on the directory.
struct There {
    name: String,
    number: DeviceNumber,
}

impl There {
    fn refusal(&self, point: &MountPoint) -> Error {
        let message =
            format!("the image is mounted there already (device '{}'): umount it first", self.name);
        Error::new(ErrorKind::InUse(message)).at_path(point.path())
    }
}

/// Whether the directory is where the image is mounted.
fn there_already(kernel: &LinuxKernel, point: &MountPoint, image: &Path) -> Result<Option<There>> {
    let (Some(mounted), Some(file)) = (point.mounted()?, FileId::of_path(image)) else {
        return Ok(None);
    };
    let number = mounted.device();
    if !Path::new(&format!("/sys/dev/block/{number}/dm")).exists() {
        return Ok(None);
    }
    for attached in list(kernel)? {
        let is_of_image = attached.active_loop().is_some_and(|active| active.info.file == file);
        if is_of_image && stands_on(kernel, number, attached.number)? {
            let name = kernel.device(DeviceId::Number(number))?.map(|device| device.name);
            let name = printable(&name.unwrap_or(attached.name));
            return Ok(Some(There { name, number }));
        }
    }
    Ok(None)
}

/// Whether a device is the disk, a partition of it or a logical volume on that.
fn stands_on(kernel: &LinuxKernel, number: DeviceNumber, disk: DeviceNumber) -> Result<bool> {
    let mut level = vec![disk];
    for _ in 0..3 {
        if level.contains(&number) {
            return Ok(true);
        }
        let above: Result<Vec<_>> = level.iter().map(|&below| kernel.dependents(below)).collect();
        level = above?.concat();
    }
    Ok(false)
}

/// How it went.
enum Done {
    Mounted,
    /// On purpose nothing was mounted.
    Nothing,
}

fn mount_image(
    args: &Args,
    options: &MountOptions,
    kernel: &LinuxKernel,
    point: &MountPoint,
    there: Option<&There>,
    globals: Globals,
) -> anyhow::Result<()> {
    workers::prepare()?;
    let interrupt = signal::catch()?;
    let image = args.image();
    let asked = args.place();
    let wanted = Wanted {
        above: &above(&asked),
        publish: false,
        // One that takes no writes will not do for one that is to take them.
        as_it_is: !args.is_writable(),
        keep: false,
        overlay: &args.overlay,
    };
    let mut pending = args.build.build(kernel, wanted, globals)?;
    let chosen = DeviceDisk::open(kernel, pending.last_number())
        .map(|disk| disk.interrupted_by(interrupt))
        .and_then(|mut disk| choose(&mut disk, &asked, args.kind()));
    let target = match chosen {
        Ok(target) => target,
        Err(error) => return Err(pending.undo(error.at_path(image)).into()),
    };
    if target.place != asked {
        globals.warn(format_args!(
            "{}: mounting {} ({}), the only one with a file system{}",
            show_path(image),
            target.place,
            target.kind,
            if target.is_ambiguous {
                "; what looks like one on the whole disk is not meant"
            } else {
                ""
            }
        ));
        pending = pending.with_above(&above(&target.place), &interrupt)?;
        for warning in pending.warnings() {
            globals.warn(format_args!("{}: {warning}", show_path(image)));
        }
    } else if target.is_ambiguous {
        globals.warn(format_args!(
            "{}: mounting the whole disk ({}), for its partitions hold nothing that is known: that may be what was there before them",
            show_path(image),
            target.kind
        ));
    }
    let work = Work { args, options, kernel, point, there, globals, interrupt };
    match work.mount(&mut pending, &target) {
        Ok(Done::Mounted) => {
            pending.leave_to_openers();
            Ok(())
        }
        Ok(Done::Nothing) => {
            let leftovers = pending.take_down();
            anyhow::ensure!(leftovers.is_empty(), "left behind: {}", leftovers.join(", "));
            Ok(())
        }
        Err(error) => Err(pending.undo(error).into()),
    }
}

/// What has to stand on the disk's device for that.
fn above(place: &Place) -> Above {
    match place {
        Place::Disk => Above::default(),
        Place::Partition(number) => {
            let partitions = Partitions::Only(BTreeSet::from([*number]));
            Above { partitions, ..Above::default() }
        }
        Place::Volume(name) => Above { logical_volumes: vec![name.clone()], ..Above::default() },
    }
}

/// All but what is built.
struct Work<'a> {
    args: &'a Args,
    options: &'a MountOptions,
    kernel: &'a LinuxKernel,
    point: &'a MountPoint,
    there: Option<&'a There>,
    globals: Globals,
    interrupt: Interrupt<'a>,
}

impl Work<'_> {
    fn mount(&self, pending: &mut Pending<'_, LinuxKernel>, target: &Target) -> Result<Done> {
        let Work { args, kernel, point, globals, .. } = *self;
        let number = pending.last_number();
        if let Some(there) = self.there {
            if there.number != number {
                return Err(there.refusal(point));
            }
            globals.warn(format_args!(
                "{}: the image is mounted there already",
                show_path(point.path())
            ));
            return Ok(Done::Nothing);
        }
        let mut disk = DeviceDisk::open(kernel, number)?.interrupted_by(self.interrupt);
        let range = whole(&disk);
        let how = unclean(&mut disk, range, &target.kind)?;
        // Where it can be written, a journal is replayed.
        if let Some(how) = how.filter(|how| !(args.is_writable() && *how == Unclean::Journal)) {
            let (image, Target { place, kind, .. }) = (show_path(args.image()), target);
            globals.warn(format_args!("{image}: the file system ({kind}) on {place}: {how}"));
        }
        if args.fake {
            return Ok(Done::Nothing);
        }
        let device = self.device_path(pending, number)?;
        let request = mount::Request {
            device: &device,
            number,
            kind: &target.kind,
            options: self.options,
            sloppy: args.sloppy,
            writable: args.is_writable(),
        };
        let mounted = mount::mount(&request).map_err(|error| error.at_path(args.image()))?;
        fault::point(format_args!("mount"))?;
        self.interrupt.check()?;
        let said = self.words(&mounted, &device);
        mounted.attach_to(point)?;
        fault::point(format_args!("mount.attach"))?;
        if args.verbose {
            // It is mounted, whether anybody can read that or not.
            let _ = stdout().and_then(|mut out| Ok(writeln!(out, "{said}")?));
        }
        Ok(Done::Mounted)
    }

    /// The path by which the device is mounted, and which the list of mounts will show.
    /// Nobody but udev takes /dev/mapper/NAME away when the mount is gone: where none runs, it
    /// is the kernel's own node.
    fn device_path(
        &self,
        pending: &mut Pending<'_, LinuxKernel>,
        number: DeviceNumber,
    ) -> Result<PathBuf> {
        let node = self.kernel.block_device_path(number);
        let is_served = udev::is_running() && udev::has_device_mapper_rules();
        if !is_served && FileId::of_path(&node).is_some_and(|id| id.device == number.to_dev()) {
            return Ok(node);
        }
        let paths = pending.publish(&self.interrupt)?;
        Ok(paths.last().cloned().unwrap_or(node))
    }

    /// What was mounted, and how.
    fn words(&self, mounted: &Detached, device: &Path) -> String {
        let flags = [
            ("nosuid", !self.options.suid),
            ("nodev", !self.options.dev),
            ("noexec", !self.options.exec),
            ("nosymfollow", self.options.no_symfollow),
        ];
        let flags = flags.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| (*name).to_owned());
        let options: Vec<_> = mounted.options().iter().cloned().chain(flags).collect();
        format!(
            "{} mounted on {} ({}: {})",
            show_path(device),
            show_path(self.point.path()),
            mounted.driver(),
            printable(&options.join(","))
        )
    }
}
