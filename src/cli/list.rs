//! `imgdm list`: what is attached.

use std::io::Write;

use imgdm::device::attach::AttachedAbove;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::{Attached, list};
use imgdm::device::name::{DeviceRole, LoopRole};
use imgdm::device::overlay::{AttachedOverlay, OverlayState};
use imgdm::device::{LoopPath, PathState, loop_node};
use imgdm::error::printable;
use imgdm::status::FileRole;
use imgdm::units::Sectors;

use super::Globals;
use super::output::{JsonPath, OutputFormat, print_json, show_path, stdout};

/// List what is attached, as the kernel tells it
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  imgdm list\n  imgdm list --output=json | jq -r '.[].name'")]
pub(crate) struct Args {
    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

#[derive(serde::Serialize)]
struct JsonAttached {
    name: String,
    device: String,
    uuid: String,
    /// Bytes.
    size: u64,
    image: Option<JsonLoopPath>,
    snapshot: Option<String>,
    depth: u32,
    loops: Vec<JsonLoop>,
    partitions: Vec<JsonPartition>,
    logical_volumes: Vec<JsonAbove>,
    open_count: u32,
    deferred_remove: bool,
    published: bool,
    /// A record is kept of it.
    evidence: bool,
    /// Null where it takes no writes.
    overlay: Option<JsonOverlay>,
}

/// Where what is written to a device goes.
#[derive(serde::Serialize)]
struct JsonOverlay {
    /// The store stays when the device goes.
    kept: bool,
    /// The file of a kept store.
    store: Option<JsonLoopPath>,
    /// `usable`, `full` once a write has found no room, `invalid` once the kernel gave it up,
    /// or `unknown`.
    state: &'static str,
    /// Bytes of the store in use; null where it is not usable, as the next two.
    used: Option<u64>,
    /// Bytes of the store.
    total: Option<u64>,
    /// Bytes of those in use that are bookkeeping.
    metadata: Option<u64>,
}

/// A device that stands on the attachment: that of a logical volume, or of a partition.
#[derive(serde::Serialize)]
struct JsonAbove {
    name: String,
    device: String,
    uuid: String,
    /// Bytes.
    size: u64,
    open_count: u32,
    deferred_remove: bool,
}

#[derive(serde::Serialize)]
struct JsonPartition {
    number: u32,
    #[serde(flatten)]
    device: JsonAbove,
}

#[derive(serde::Serialize)]
struct JsonLoop {
    device: String,
    /// Which layer's file it shows; none for the zeros.
    layer: Option<u32>,
    role: &'static str,
    direct_io: bool,
    file: Option<JsonLoopPath>,
}

#[derive(serde::Serialize)]
struct JsonLoopPath {
    #[serde(flatten)]
    path: JsonPath,
    /// What is at the path now: the file itself, nothing (it was unlinked), or another.
    state: &'static str,
}

pub(crate) fn run(args: &Args, _globals: Globals) -> anyhow::Result<()> {
    let attached = list(&LinuxKernel::new())?;
    match args.output {
        OutputFormat::Json => print_json(&attached.iter().map(json).collect::<Vec<_>>()),
        OutputFormat::Human => print_human(&attached),
    }
}

fn json_overlay(overlay: &AttachedOverlay) -> JsonOverlay {
    let (state, sizes) = match overlay.state {
        OverlayState::Usable { used, total, metadata } => {
            ("usable", Some([used, total, metadata].map(bytes)))
        }
        OverlayState::Full => ("full", None),
        OverlayState::Invalid => ("invalid", None),
        OverlayState::Other(_) => ("unknown", None),
    };
    JsonOverlay {
        kept: overlay.is_kept,
        store: overlay.path.as_ref().map(json_loop_path),
        state,
        used: sizes.map(|[used, _, _]| used),
        total: sizes.map(|[_, total, _]| total),
        metadata: sizes.map(|[_, _, metadata]| metadata),
    }
}

/// The store of a device, for people: how full it is, and where.
fn show_overlay(overlay: &AttachedOverlay) -> String {
    let state = match &overlay.state {
        OverlayState::Usable { used, total, .. } => {
            let (used, total) = (bytes(*used), bytes(*total));
            format!("{used} of {total} bytes of its store used")
        }
        OverlayState::Full => "its store is full, so writes fail".to_owned(),
        OverlayState::Invalid => {
            "its store was given up by the kernel, what was written is lost: detach it".to_owned()
        }
        OverlayState::Other(said) => format!("the kernel says of its store: {said}"),
    };
    match &overlay.path {
        Some(path) => format!(" (writable: {state}; {})", show_loop_path(path)),
        None => format!(" (writable: {state})"),
    }
}

fn show_loop_path(path: &LoopPath) -> String {
    let note = match path.state {
        PathState::Same => "",
        PathState::Deleted => " (deleted)",
        PathState::Other => " (another file is there now)",
    };
    format!("{}{note}", show_path(&path.path))
}

fn json_loop_path(path: &LoopPath) -> JsonLoopPath {
    JsonLoopPath { path: JsonPath::from(path.path.as_path()), state: state_name(path.state) }
}

fn state_name(state: PathState) -> &'static str {
    match state {
        PathState::Same => "same",
        PathState::Deleted => "deleted",
        PathState::Other => "other",
    }
}

fn bytes(size: Sectors) -> u64 {
    size.to_bytes().unwrap_or(u64::MAX)
}

fn above(above: &AttachedAbove) -> JsonAbove {
    JsonAbove {
        name: above.info.name.clone(),
        device: above.path.display().to_string(),
        uuid: above.info.uuid.clone(),
        size: bytes(above.size),
        open_count: above.info.open_count,
        deferred_remove: above.info.deferred_remove,
    }
}

fn partition(partition: &AttachedAbove) -> Option<JsonPartition> {
    let DeviceRole::Partition(number) = partition.role else { return None };
    Some(JsonPartition { number, device: above(partition) })
}

fn logical_volume(volume: &AttachedAbove) -> Option<JsonAbove> {
    matches!(volume.role, DeviceRole::LogicalVolume(_)).then(|| above(volume))
}

fn json(attached: &Attached) -> JsonAttached {
    let loops = attached.loops.iter().map(|each| {
        let (layer, role) = match each.info.role() {
            Some(LoopRole::File { layer, role: FileRole::Image, .. }) => (Some(layer), "image"),
            Some(LoopRole::File { layer, role: FileRole::DataFile, .. }) => {
                (Some(layer), "data-file")
            }
            Some(LoopRole::Zero) => (None, "zero"),
            Some(LoopRole::Scratch) => (None, "scratch"),
            Some(LoopRole::Store) => (None, "store"),
            None => (None, "unknown"),
        };
        JsonLoop {
            device: loop_node(each.number).display().to_string(),
            layer,
            role,
            direct_io: each.info.direct_io,
            file: each.info.path.as_ref().map(json_loop_path),
        }
    });
    JsonAttached {
        name: attached.name.clone(),
        device: attached.path.display().to_string(),
        uuid: attached.uuid.to_string(),
        size: bytes(attached.size),
        image: attached.image.as_ref().map(json_loop_path),
        snapshot: attached.snapshot.clone(),
        depth: attached.depth,
        loops: loops.collect(),
        partitions: attached.above.iter().filter_map(partition).collect(),
        logical_volumes: attached.above.iter().filter_map(logical_volume).collect(),
        open_count: attached.open_count,
        deferred_remove: attached.deferred_remove,
        published: attached.is_published(),
        evidence: attached.is_evidence(),
        overlay: attached.overlay.as_ref().map(json_overlay),
    }
}

fn print_human(all: &[Attached]) -> anyhow::Result<()> {
    let mut out = stdout()?;
    if !all.is_empty() {
        writeln!(
            out,
            "{:<20} {:>15} {:>5} {:>5} {:>5}  IMAGE",
            "NAME", "SIZE", "DEPTH", "LOOPS", "OPEN"
        )?;
    }
    for attached in all {
        let mut image = match &attached.image {
            None => "(block device)".to_owned(),
            Some(path) => show_loop_path(path),
        };
        if let Some(snapshot) = &attached.snapshot {
            image.push_str(&format!(", snapshot {}", printable(snapshot)));
        }
        if attached.is_published() {
            image.push_str(" (published)");
        }
        if let Some(overlay) = &attached.overlay {
            image.push_str(&show_overlay(overlay));
        }
        if attached.is_evidence() {
            image.push_str(" (evidence)");
        }
        if attached.deferred_remove {
            image.push_str(" (goes at its last close)");
        }
        writeln!(
            out,
            "{:<20} {:>15} {:>5} {:>5} {:>5}  {image}",
            printable(&attached.name),
            bytes(attached.size),
            attached.depth,
            attached.loops.len(),
            attached.open_count
        )?;
        for above in &attached.above {
            let what = match above.role {
                DeviceRole::Partition(number) => format!("partition {number}"),
                _ => "logical volume".to_owned(),
            };
            let note = if above.info.deferred_remove { " (goes at its last close)" } else { "" };
            let name = format!("  {}", printable(&above.info.name));
            let (size, open) = (bytes(above.size), above.info.open_count);
            writeln!(out, "{name:<20} {size:>15} {:>5} {:>5} {open:>5}  {what}{note}", "", "")?;
        }
    }
    out.flush()?;
    Ok(())
}
