//! `imgdm explain NAME`: what is attached, and the live tables on the way of a sector.

use anyhow::Context;
use imgdm::chain::Chain;
use imgdm::device::detach::find;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::locate::{Located, ServedBy, ServedEnd, locate};
use imgdm::device::name::LoopRole;
use imgdm::device::overlay::OverlayState;
use imgdm::device::verify::{FindingKind, Verifier};
use imgdm::device::{Kernel, loop_node};
use imgdm::explain::Explanation;
use imgdm::extent::Mapping;
use imgdm::open::is_path;
use imgdm::overlay::STORE_OFFSET;
use imgdm::overlay::exceptions::ExceptionStore;
use imgdm::source::{FileId, Source};
use imgdm::units::{ByteLen, GuestOffset, HostOffset, SECTOR_SIZE};
use imgdm::{Error, ErrorKind, Result};

use super::forward::Report;
use super::steps::Step;
use crate::cli::Globals;
use crate::cli::open::OpenArgs;
use crate::cli::output::{JsonPath, show_path};
use crate::cli::verify::described;

/// An attachment, with its image opened as it is attached.
pub(super) struct Live<'k> {
    kernel: &'k LinuxKernel,
    attached: Attached,
    verifier: Verifier<'k, LinuxKernel>,
}

/// The attachment that the image argument means, if it means one.
fn find_attached(kernel: &LinuxKernel, args: &OpenArgs) -> anyhow::Result<Option<Attached>> {
    let is_name = !is_path(args.image.as_os_str()) && !args.image.exists();
    let text = args.image.as_os_str().to_string_lossy();
    // These are names of an image that the opening understands.
    if text.starts_with("json:") || text.starts_with("file:") {
        return Ok(None);
    }
    if !is_name && !args.image.starts_with("/dev/mapper") {
        return Ok(None);
    }
    let error = match find(kernel, &args.image, FileId::of_path(&args.image)) {
        Ok(attached) => return Ok(Some(attached)),
        Err(error) => error,
    };
    let no_file = "there is no file of that name here";
    match error.kind() {
        ErrorKind::NotAttached(what) if is_name => {
            let message = format!("{no_file}, and {what}");
            Err(error.with_kind(ErrorKind::NotFound(message)).at_path(&args.image).into())
        }
        // Somebody else's device, or not for this user to ask: an image like any other
        // block device.
        ErrorKind::NotAttached(_) | ErrorKind::PermissionDenied(_) | ErrorKind::KernelLacks(_)
            if !is_name =>
        {
            Ok(None)
        }
        _ if is_name => Err(error).with_context(|| {
            format!("{}: {no_file}, and what is attached can't be told", show_path(&args.image))
        }),
        _ => Err(error.into()),
    }
}

impl<'k> Live<'k> {
    /// The attachment that the image argument means, if it means one.
    pub(super) fn of(kernel: &'k LinuxKernel, args: &OpenArgs) -> anyhow::Result<Option<Self>> {
        let Some(attached) = find_attached(kernel, args)? else { return Ok(None) };
        if let Some(option) = args.what_is_known_of_the_attached() {
            let message =
                format!("{option} is for images: of what is attached it is known already");
            return Err(Error::new(ErrorKind::Usage(message)).into());
        }
        let verifier = Verifier::open(kernel, attached.clone(), None)?;
        Ok(Some(Self { kernel, attached, verifier }))
    }

    /// The chain, after warnings of what is not as it was attached.
    ///
    /// # Errors
    /// The image can't be opened any more.
    pub(super) fn chain(&self, globals: Globals) -> Result<&Chain> {
        let found = self.verifier.found();
        let Some(chain) = self.verifier.chain() else {
            let what = found.findings().last().map(|finding| (finding.kind, described(finding)));
            return Err(Error::new(match what {
                Some((FindingKind::Snapshot, what)) => ErrorKind::SnapshotNotFound(what),
                Some((_, what)) => ErrorKind::InvalidImage(what),
                None => ErrorKind::InvalidImage("the image can't be opened".to_owned()),
            }));
        };
        for finding in found.findings() {
            globals.warn(format_args!("{}", described(finding)));
        }
        for notice in found.notices() {
            globals.warn(format_args!("{notice}"));
        }
        Ok(chain)
    }

    /// Whether the chunk of that byte was written, where the device takes writes.
    fn written(&self, offset: GuestOffset) -> Result<Option<Step>> {
        let Some(overlay) = &self.attached.overlay else { return Ok(None) };
        let is_readable = matches!(overlay.state, OverlayState::Usable { .. } | OverlayState::Full);
        let Some(store) = overlay.store.filter(|_| is_readable) else { return Ok(None) };
        let disk = ByteLen::new(self.attached.size.to_bytes().unwrap_or(u64::MAX));
        // The page cache has nothing of the store from before.
        drop(self.kernel.reader(store)?);
        let source = Source::open(&self.kernel.block_device_path(store))?;
        let changes = ExceptionStore::open(&source, HostOffset::ZERO, disk)?.changes()?;
        let place = changes.at(offset)?.place;
        let written = place.is_some();
        let offset = place.and_then(|place| place.get().checked_add(STORE_OFFSET));
        let path = overlay.path.as_ref().filter(|_| written);
        let store = path.map(|path| JsonPath::from(path.path.as_path()));
        Ok(Some(Step::Written { written, store, offset }))
    }

    /// Adds the devices that serve the byte's sector.
    pub(super) fn add_devices(&self, report: &mut Report, explanation: &Explanation) -> Result<()> {
        let sector = explanation.offset.get() / SECTOR_SIZE;
        let Located { devices, end } = locate(self.kernel, &self.attached, sector)?;
        let mut written = self.written(explanation.offset)?;
        report.steps.extend(devices.into_iter().flat_map(
            |ServedBy { name, number, sector, line }| {
                // It is the top device that takes writes.
                let written = written.take();
                let words = [
                    &line.start.to_string(),
                    &line.length.to_string(),
                    &line.kind,
                    &line.parameters,
                ];
                let line = words.map(String::as_str).join(" ").trim_end().to_owned();
                let device = Step::Device { name, number: number.to_string(), sector, line };
                std::iter::once(device).chain(written)
            },
        ));
        let in_sector = explanation.offset.get() % SECTOR_SIZE;
        report.steps.extend(match end {
            ServedEnd::Target => None,
            ServedEnd::Loop { number, info, sector } => {
                let offset = sector.saturating_mul(SECTOR_SIZE).saturating_add(in_sector);
                // What the scratch file holds, and that zeros come from the zero loop, is for
                // verify to compare: no metadata gives those places.
                let agrees = match (info.role(), explanation.mapping) {
                    (Some(LoopRole::File { .. }), Mapping::Data(place)) => {
                        let shown = self.verifier.device(explanation.depth(), place.file);
                        Some(shown == Some(number) && place.offset.get() == offset)
                    }
                    _ => None,
                };
                let device = JsonPath::from(loop_node(number).as_path());
                let file = info.path.map(|path| JsonPath::from(path.path.as_path()));
                Some(Step::Loop { device, file, sector, offset, agrees })
            }
            ServedEnd::BlockDevice { number, sector } => {
                let offset = sector.saturating_mul(SECTOR_SIZE).saturating_add(in_sector);
                let device = JsonPath::from(loop_node(number).as_path());
                Some(Step::Loop { device, file: None, sector, offset, agrees: None })
            }
        });
        Ok(())
    }
}
