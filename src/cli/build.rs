//! From an image to devices that are not yet for good: what `attach` does before its last
//! step, for other commands to take it from there.

use std::collections::BTreeSet;

use clap::ValueEnum;
use imgdm::ErrorKind;
use imgdm::device::attach::{
    Above, DirectIo, LayerFiles, Options, Overlay, OverlayStore, Pending, Request, build,
    find_attached, find_same_disk,
};
use imgdm::device::keys::Keys;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::udev;
use imgdm::device::{DeviceNumber, Kernel};
use imgdm::format::Format;
use imgdm::lock::Sharing;
use imgdm::open::{Warning, open_chain};
use imgdm::overlay::Store;
use imgdm::plan::{Plan, TableSource};
use imgdm::read::Ciphers;
use imgdm::source::Source;
use imgdm::worker::apart;

use super::evidence::{Evidence, EvidenceArgs, Planned};
use super::fill::Prepared;
use super::key::{KeyArgs, KeySources, encrypted_layers};
use super::memory::MemoryArgs;
use super::open::{FiemapArgs, OpenArgs, ZeroArgs};
use super::output::show_path;
use super::overlay::OverlayArgs;
use super::partitions::GuestDisk;
use super::scratch::{ContentArgs, PlaceArgs};
use super::stamps::Stamps;
use super::table::device_name;
use super::{Globals, signal};

// What an image is, and how its device is to be built.
#[derive(Debug, clap::Args)]
pub(crate) struct BuildArgs {
    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// Name of the device; without it, made of the image's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Read the files around the page cache
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    direct_io: DirectIoChoice,

    #[command(flatten)]
    zero: ZeroArgs,

    #[command(flatten)]
    content: ContentArgs,

    #[command(flatten)]
    places: PlaceArgs,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    keys: KeyArgs,

    /// Map a block device without a loop device between. Gives up the locks once this
    /// command ends, and the loop's guard against writes from devices stacked on top
    #[arg(long)]
    direct_block: bool,

    #[command(flatten)]
    fiemap: FiemapArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DirectIoChoice {
    /// Around it where the kernel says that the file system can (Linux 6.1)
    #[default]
    Auto,
    /// Around it; an error where the file system can't
    On,
    /// Through it: attachments of one base image share what was read of it
    Off,
}

/// True where what is asked for on top is not there, or can't be had.
fn is_missing(error: &imgdm::Error) -> bool {
    use ErrorKind::{NotFound, NotRepresentable, PartitionNotFound};
    matches!(error.kind(), PartitionNotFound(_) | NotFound(_) | NotRepresentable(_))
}

/// The name of a logical volume, `VG/LV`, as an option's value.
pub(crate) fn volume_name(text: &str) -> Result<String, String> {
    match imgdm::lvm::split_name(text) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("not of the form VG/LV (like vg0/root)".to_owned()),
    }
}

/// What is asked for beside the image itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    /// What is to stand on the device.
    pub(crate) above: &'a Above,
    /// Let blkid, LVM and others look into the devices.
    pub(crate) publish: bool,
    /// Where the disk is attached already, take it as it is, under whatever name, unless one
    /// is given, and with whatever options.
    pub(crate) as_it_is: bool,
    /// Where it is attached already and marked for removal, take the mark away.
    pub(crate) keep: bool,
    /// Whether the device is to take writes.
    pub(crate) overlay: &'a OverlayArgs,
}

impl BuildArgs {
    fn options(&self, wanted: Wanted<'_>, evidence: &EvidenceArgs) -> Options {
        Options {
            direct_io: match self.direct_io {
                DirectIoChoice::Auto => DirectIo::Auto,
                DirectIoChoice::On => DirectIo::On,
                DirectIoChoice::Off => DirectIo::Off,
            },
            direct_block: self.direct_block,
            publish: wanted.publish,
            evidence: evidence.is_given(),
            zero: self.zero.mode(),
            no_fiemap: self.fiemap.no_fiemap,
            on_error: self.content.on_error(),
            overlay: wanted.overlay.overlay(),
        }
    }

    /// Builds it all, up to the last step, with signals caught from the first one on. What
    /// is not as it should be is printed.
    pub(crate) fn build<'k>(
        &self,
        kernel: &'k LinuxKernel,
        wanted: Wanted<'_>,
        globals: Globals,
    ) -> anyhow::Result<Pending<'k, LinuxKernel>> {
        let no_record = EvidenceArgs::default();
        Ok(self.build_recorded(kernel, wanted, &no_record, globals)?.0)
    }

    /// The same, with the record that `evidence` asks for, where it is not attached already.
    pub(crate) fn build_recorded<'k>(
        &self,
        kernel: &'k LinuxKernel,
        wanted: Wanted<'_>,
        evidence: &EvidenceArgs,
        globals: Globals,
    ) -> anyhow::Result<(Pending<'k, LinuxKernel>, Option<Evidence>)> {
        let (pending, evidence) = build_all(self, kernel, wanted, evidence, globals)?;
        for warning in pending.warnings() {
            globals.warn(format_args!("{}: {warning}", show_path(&self.open.image)));
        }
        Ok((pending, evidence))
    }
}

/// A host that has mounted a block device takes no QEMU locks, so nothing refuses it.
fn holders_of(kernel: &LinuxKernel, file: &Source) -> Option<String> {
    let id = file.id().filter(|_| file.is_block_device())?;
    let holders = kernel.holders(DeviceNumber::from_dev(id.device));
    (!holders.is_empty()).then(|| {
        format!(
            "{}: the block device is in use ({}): if that writes to it, what is read here is torn",
            show_path(file.path()),
            holders.join(", ")
        )
    })
}

/// What the user is warned of, and evidence keeps.
struct Warnings {
    globals: Globals,
    said: Vec<String>,
}

impl Warnings {
    fn say(&mut self, warning: String) {
        self.globals.warn(&warning);
        self.said.push(warning);
    }
}

fn build_all<'k>(
    args: &BuildArgs,
    kernel: &'k LinuxKernel,
    wanted: Wanted<'_>,
    evidence: &EvidenceArgs,
    globals: Globals,
) -> anyhow::Result<(Pending<'k, LinuxKernel>, Option<Evidence>)> {
    let key_sources = KeySources::new(&args.keys)?;
    let mut policy = args.open.policy();
    args.fiemap.apply(&mut policy);
    evidence.narrow(&mut policy);
    evidence.check(&policy, &args.options(wanted, evidence))?;
    wanted.overlay.check(policy.sharing, args.direct_block)?;
    let opened = open_chain(&args.open.image, &policy)?;
    let mut warnings = Warnings { globals, said: Vec::new() };
    for Warning { path, kind } in &opened.warnings {
        warnings.say(format!("{}: {kind}", show_path(path)));
    }
    let chain = &opened.chain;
    for unknown in evidence.check_files(chain)? {
        warnings.say(unknown);
    }
    let name = device_name(chain, args.name.as_deref())?;
    let stamps = match policy.sharing {
        Sharing::Readers => Some(Stamps::of(chain)?),
        Sharing::Writers => None,
    };
    let options = args.content.options(args.zero);
    let plan = apart(|| Plan::new(chain, options))?;
    plan.check_attachable().map_err(|error| error.at_path(&args.open.image))?;
    key_sources.check_all_used(&encrypted_layers(chain))?;
    for damage in plan.damage() {
        warnings.say(damage.to_string());
    }
    for file in plan.unheld_files() {
        warnings.say(format!(
            "{}: a file under 512 bytes can't be held: nothing keeps it from being changed",
            show_path(file.path())
        ));
    }
    let has_raw = chain.layers().iter().any(|layer| layer.image.format() == Format::Raw);
    if has_raw && udev::looks_into_loops() {
        warnings.say(
            "udev will look into the loop devices of raw layers and may show or activate what the guest has on them: install udev/59-imgdm.rules in /etc/udev/rules.d".to_owned(),
        );
    }
    let layers: Vec<_> = chain
        .layers()
        .iter()
        .map(|layer| LayerFiles::of(layer, layer.image.format().name()))
        .collect();
    let snapshot = chain.layers()[0].image.snapshot();
    for (_, file) in chain.layers().iter().flat_map(|layer| layer.files()) {
        if let Some(holders) = holders_of(kernel, file) {
            warnings.say(holders);
        }
    }
    let interrupt = signal::catch()?;
    let (keys, no_ciphers) = (Keys::default(), Ciphers::new());
    let overlay = wanted.overlay.wanted(plan.size())?;
    let request = |tables, scratch| Request {
        name: &name,
        layers: &layers,
        snapshot: snapshot.map(|s| (s.id.as_str(), s.name.as_str())),
        tables,
        scratch,
        store: overlay,
        keys: &keys,
        options: args.options(wanted, evidence),
        above: wanted.above,
        keep: wanted.keep,
        memory: args.memory.limit(),
        interrupt,
    };
    if wanted.as_it_is
        && let Some(there) = find_same_disk(kernel, &request(&plan, None), args.name.is_some())?
    {
        return Ok((there, None));
    }
    // What takes long, or asks for keys, is not done for nothing.
    let prepared = Prepared::of(chain, &plan, args.content, &args.places, globals)?;
    let is_overlay = wanted.overlay.overlay() != Overlay::None;
    if (prepared.takes_long() || !plan.crypts().is_empty() || evidence.is_given() || is_overlay)
        && let Some(there) = find_attached(kernel, &request(&plan, None))?
    {
        return Ok((there, None));
    }
    if prepared.takes_long() && plan.crypts().is_empty() {
        let mut disk = GuestDisk::new(chain, &no_ciphers, interrupt);
        // What can't be read may be readable as zeros yet, as --on-error has it.
        match wanted.above.check(&mut disk) {
            Err(error) if is_missing(&error) => return Err(error.into()),
            _ => {}
        }
    }
    let record = evidence.begin(
        &Planned {
            chain,
            plan: &plan,
            name: &name,
            uuid: &request(&plan, None).uuid()?,
            content: args.content,
            places: &args.places,
            warnings: &warnings.said,
            interrupt: &interrupt,
        },
        globals,
    )?;
    // Before the scratch file: that may take minutes, which a wrong key would waste.
    let depths: BTreeSet<u32> = plan.crypts().iter().map(|crypt| crypt.layer).collect();
    for depth in depths {
        let layer = &chain.layers()[depth as usize];
        let Some(header) = layer.image.crypt_header()? else { continue };
        let key = key_sources.unlock(Some(&name), depth, &header, &layer.source, &interrupt)?;
        let description = request(&plan, None).uuid()?.key_description(depth);
        keys.insert(depth, kernel.store_key(&description, &key)?);
    }
    drop(key_sources);
    let (content, places) = (args.content, &args.places);
    let written = prepared.write(chain, &plan, content, places, &interrupt, globals)?;
    let found = written.as_ref().map(|written| written.filled.found()).unwrap_or_default();
    let planned_anew = match found.as_slice() {
        [] => None,
        found => Some(apart(|| Plan::with_found(chain, options, found))?),
    };
    // That may have taken minutes, and the tables are made from what was read before.
    if let Some(stamps) = stamps {
        stamps.check(chain)?;
    }
    let scratch = written.as_ref().map(|written| &written.file);
    let store = wanted.overlay.open(chain, plan.size(), content.on_error(), places)?;
    if let Some(warning) = store.as_ref().and_then(Store::warning) {
        warnings.say(warning.to_owned());
    }
    let request = Request {
        store: store.as_ref().map(|store| OverlayStore {
            file: Some(&store.file),
            id: store.id,
            chunk: store.chunk,
            room: overlay.and_then(|overlay| overlay.room),
        }),
        ..request(planned_anew.as_ref().unwrap_or(&plan), scratch)
    };
    let pending = build(kernel, &request)?;
    Ok((pending.with_store(store), record))
}
