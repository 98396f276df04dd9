//! `imgdm explain NAME`: what is attached, and the live tables on the way of a sector.

use std::sync::Arc;

use imgdm::chain::Chain;
use imgdm::device::detach::find;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::locate::{Located, ServedBy, ServedEnd, locate};
use imgdm::device::name::snapshot_hash;
use imgdm::device::{LoopInfo, PathState, loop_node};
use imgdm::error::printable;
use imgdm::explain::Explanation;
use imgdm::extent::Mapping;
use imgdm::format::qcow2::{Qcow2Image, SnapshotSelector};
use imgdm::open::is_path;
use imgdm::source::{FileId, Source};
use imgdm::units::SECTOR_SIZE;
use imgdm::{Error, ErrorKind, Result};

use super::forward::Report;
use super::steps::Step;
use crate::cli::open::OpenArgs;
use crate::cli::output::{JsonPath, show_path};

/// The attachment that the image argument means, if it means one; the arguments then open
/// its image, and the snapshot that is attached.
pub(super) fn attached(args: &OpenArgs) -> Result<(OpenArgs, Option<Attached>)> {
    let mut args = args.clone();
    let is_name = !is_path(args.image.as_os_str()) && !args.image.exists();
    let text = args.image.as_os_str().to_string_lossy();
    // These are names of an image that the opening understands.
    if text.starts_with("json:") || text.starts_with("file:") {
        return Ok((args, None));
    }
    if !is_name && !args.image.starts_with("/dev/mapper") {
        return Ok((args, None));
    }
    let id = FileId::of_path(&args.image);
    let attached = match find(&LinuxKernel::new(), &args.image, id) {
        Ok(attached) => attached,
        // Somebody else's device: an image like any other block device.
        Err(_) if !is_name => return Ok((args, None)),
        Err(error) => {
            let message = format!("there is no file of that name here, and {}", error.kind());
            return Err(Error::new(ErrorKind::NotFound(message)).at_path(&args.image));
        }
    };
    args.image = image_path(&attached)?;
    if args.snapshot_mut().is_some() {
        let message = "-l is for images: what is attached has its snapshot already";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())));
    }
    if attached.uuid.is_snapshot() {
        *args.snapshot_mut() = Some(snapshot_of(&attached, &args)?);
    }
    Ok((args, Some(attached)))
}

fn image_path(attached: &Attached) -> Result<std::path::PathBuf> {
    let name = printable(&attached.name);
    match &attached.image {
        Some(image) if image.state == PathState::Same => Ok(image.path.clone()),
        Some(image) => Err(Error::new(ErrorKind::NotFound(format!(
            "the image of {name} is no longer at {}",
            show_path(&image.path)
        )))),
        None => Err(Error::new(ErrorKind::Usage(format!(
            "{name} lies on a block device without a loop device: name that device instead"
        )))),
    }
}

/// The snapshot that is attached: a loop device may have cut its name, the UUID has a hash.
fn snapshot_of(attached: &Attached, args: &OpenArgs) -> Result<SnapshotSelector> {
    let source = Arc::new(Source::open(&args.image)?);
    let snapshots = Qcow2Image::open_past_damage(source, None, true)?.snapshots()?;
    let found = snapshots
        .into_iter()
        .find(|s| snapshot_hash(Some((&s.id, &s.name))) == attached.uuid.snapshot);
    match found {
        Some(found) => Ok(SnapshotSelector::Exact { id: Some(found.id), name: Some(found.name) }),
        None => Err(Error::new(ErrorKind::SnapshotNotFound(format!(
            "the snapshot that is attached as {} is no longer in the image",
            printable(&attached.name)
        )))
        .at_path(&args.image)),
    }
}

/// Adds the devices that serve the byte's sector.
pub(super) fn with_devices(
    mut report: Report,
    attached: &Attached,
    explanation: &Explanation,
    chain: &Chain,
) -> Result<Report> {
    let sector = explanation.offset.get() / SECTOR_SIZE;
    let Located { devices, end } = locate(&LinuxKernel::new(), attached, sector)?;
    report.steps.extend(devices.into_iter().map(|ServedBy { name, number, sector, line }| {
        let words =
            [&line.start.to_string(), &line.length.to_string(), &line.kind, &line.parameters];
        let line = words.map(String::as_str).join(" ").trim_end().to_owned();
        Step::Device { name, number: number.to_string(), sector, line }
    }));
    let in_sector = explanation.offset.get() % SECTOR_SIZE;
    report.steps.extend(match end {
        ServedEnd::Target => None,
        ServedEnd::Loop { number, info, sector } => {
            let offset = sector.saturating_mul(SECTOR_SIZE).saturating_add(in_sector);
            let agrees = match explanation.mapping {
                Mapping::Data(_) => Some(is_place(chain, explanation, &info, offset)),
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
    Ok(report)
}

/// Whether `offset` of a loop's file is the place that the image's metadata gives.
fn is_place(chain: &Chain, explanation: &Explanation, info: &LoopInfo, offset: u64) -> bool {
    let layer = chain.layers().get(explanation.depth() as usize);
    match (layer, explanation.mapping) {
        (Some(layer), Mapping::Data(place)) => {
            layer.file(place.file).id() == Some(info.file) && place.offset.get() == offset
        }
        _ => false,
    }
}
