//! What is attached, read from the kernel alone.

use std::path::PathBuf;

use super::above::AttachedAbove;
use super::name::{DeviceRole, DmUuid, LoopRole};
use super::options::Options;
use super::overlay::{self, AttachedOverlay};
use super::{Access, DeviceId, DeviceInfo, DeviceNumber, Kernel, LoopInfo, LoopPath};
use crate::error::Result;
use crate::status::FileRole;
use crate::units::Sectors;

/// A loop device under an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedLoop {
    /// Its numbers; the minor one is that of /dev/loopN.
    pub number: DeviceNumber,
    /// What it is bound to.
    pub info: LoopInfo,
}

/// An attached image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its name.
    pub name: String,
    /// /dev/mapper/NAME.
    pub path: PathBuf,
    /// The UUID of its top device.
    pub uuid: DmUuid,
    /// The numbers of its top device.
    pub number: DeviceNumber,
    /// Its size.
    pub size: Sectors,
    /// The active layer's file; none where no loop of it is there.
    pub image: Option<LoopPath>,
    /// The snapshot's name as far as a loop device could keep it, `#HASH` where none
    /// did; none for the active layer.
    pub snapshot: Option<String>,
    /// Number of layers.
    pub depth: u32,
    /// Its loop devices: files by layer, then zeros.
    pub loops: Vec<AttachedLoop>,
    /// The devices inside.
    pub inner: Vec<DeviceInfo>,
    /// What it lies on where it takes writes.
    pub overlay: Option<AttachedOverlay>,
    /// Block devices that it lies on without a loop device.
    pub block_devices: Vec<DeviceNumber>,
    /// What stands on it: partitions, ours or kpartx's, by number.
    pub above: Vec<AttachedAbove>,
    /// How many have it open, what stands on it included.
    pub open_count: u32,
    /// It goes at its last close.
    pub deferred_remove: bool,
}

impl Attached {
    /// Whether the host may look into the device; false too where a later imgdm made it.
    pub fn is_published(&self) -> bool {
        Options::from_bits(self.uuid.options).is_ok_and(|options| options.publish)
    }

    /// Whether a record is kept of it; false too where a later imgdm made it.
    pub fn is_evidence(&self) -> bool {
        Options::from_bits(self.uuid.options).is_ok_and(|options| options.evidence)
    }

    /// Whether it takes writes; false too where a later imgdm made it.
    pub fn takes_writes(&self) -> bool {
        let options = Options::from_bits(self.uuid.options);
        options.is_ok_and(|options| options.access() == Access::Writable)
    }

    /// Numbers and UUID of the device that shows what the image says: its own, or the one
    /// inside where it takes writes.
    pub fn disk(&self) -> (DeviceNumber, String) {
        match &self.overlay {
            Some(overlay) => (overlay.disk, overlay.disk_uuid.clone()),
            None => (self.number, self.uuid.to_string()),
        }
    }

    /// The loop device over the active layer's image file.
    pub fn active_loop(&self) -> Option<&AttachedLoop> {
        self.loops.iter().find(|each| {
            matches!(each.info.role(), Some(LoopRole::File { layer: 0, role: FileRole::Image, .. }))
        })
    }
}

/// All that is attached, by name.
///
/// # Errors
/// What the system says.
pub fn list<K: Kernel>(kernel: &K) -> Result<Vec<Attached>> {
    let (mut tops, mut above, mut found) = (Vec::new(), Vec::new(), Vec::new());
    for device in kernel.devices()? {
        let Ok(uuid) = device.uuid.parse::<DmUuid>() else { continue };
        if uuid.role == DeviceRole::Top && device.has_live_table {
            tops.push((device, uuid));
        } else if uuid.role.is_above() {
            above.push(device);
        }
    }
    for (device, uuid) in tops {
        // Not among all devices, for there may be many.
        found.push(attached(kernel, device, uuid, &above)?);
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The devices among `all` that stand on the attachment with this UUID.
fn above<K: Kernel>(kernel: &K, top: &DmUuid, all: &[DeviceInfo]) -> Vec<AttachedAbove> {
    let mut found = Vec::new();
    for device in all {
        let Ok(uuid) = device.uuid.parse::<DmUuid>() else { continue };
        if uuid.role.is_above() && device.has_live_table && uuid.same_attachment(top) {
            found.push(AttachedAbove::of(kernel, uuid.role, device.clone()));
        }
    }
    found.sort_by_key(|above| above.role);
    found
}

/// What hangs below one top device, and which of `all` devices stand on it.
pub(super) fn attached<K: Kernel>(
    kernel: &K,
    device: DeviceInfo,
    uuid: DmUuid,
    all: &[DeviceInfo],
) -> Result<Attached> {
    let mut loops: Vec<AttachedLoop> = Vec::new();
    let mut inner: Vec<DeviceInfo> = Vec::new();
    let mut block_devices = Vec::new();
    let mut open = vec![device.number];
    while let Some(number) = open.pop() {
        for below in kernel.dependencies(DeviceId::Number(number))? {
            if loops.iter().any(|known| known.number == below)
                || inner.iter().any(|known| known.number == below)
                || block_devices.contains(&below)
            {
                continue;
            }
            // A loop of somebody else is a block device like any other (--direct-block).
            if let Some(info) = kernel.loop_info(below)?.filter(|info| info.role().is_some()) {
                loops.push(AttachedLoop { number: below, info });
                continue;
            }
            let info = kernel.device(DeviceId::Number(below))?.filter(|info| {
                info.uuid.parse::<DmUuid>().is_ok_and(|other| other.same_attachment(&uuid))
            });
            match info {
                Some(info) => {
                    inner.push(info);
                    open.push(below);
                }
                None => block_devices.push(below),
            }
        }
    }
    loops.sort_by_key(|each| match each.info.role() {
        Some(LoopRole::File { layer, role, .. }) => (layer, role == FileRole::DataFile, 0),
        Some(LoopRole::Zero | LoopRole::Scratch | LoopRole::Store) | None => {
            (u32::MAX, true, each.number.minor)
        }
    });
    inner.sort_by_key(|info| info.number);
    block_devices.sort_unstable();
    let size = kernel.block_device(device.number).map_or(Sectors::default(), |(size, _)| size);
    let overlay = overlay::of(kernel, &uuid, &loops, &inner)?;
    let mut attached = Attached {
        path: PathBuf::from("/dev/mapper").join(&device.name),
        name: device.name,
        number: device.number,
        size,
        image: None,
        snapshot: None,
        depth: uuid.depth,
        loops,
        inner,
        overlay,
        block_devices,
        above: above(kernel, &uuid, all),
        open_count: device.open_count,
        deferred_remove: device.deferred_remove,
        uuid,
    };
    let active = attached.active_loop().cloned();
    attached.snapshot = match active.as_ref().map(|active| active.info.role()) {
        Some(Some(LoopRole::File { snapshot: Some(snapshot), .. })) => Some(snapshot),
        _ => attached.uuid.is_snapshot().then(|| format!("#{}", attached.uuid.snapshot)),
    };
    attached.image = active.and_then(|active| active.info.path);
    Ok(attached)
}
