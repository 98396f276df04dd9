//! Whether what is attached is what would be attached, and whose a device is.

use std::collections::BTreeMap;

use super::attach::{Request, index_of, table_ids};
use super::list::AttachedLoop;
use super::live::LiveTarget;
use super::name::{DeviceRole, DmUuid, LoopRole, UUID_PREFIX};
use super::{Access, DeviceId, DeviceInfo, DeviceNumber, Kernel, LiveLine};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::plan::{Backing, BackingId, CryptId, Segment, SegmentTarget};

/// True where the live tables of the attachment with this UUID are those that `request`
/// would load, over loop devices of the same files.
pub(super) fn same_tables<K: Kernel>(
    kernel: &K,
    request: &Request<'_>,
    top: &DmUuid,
) -> Result<bool> {
    let mut comparison = Comparison { kernel, request, top, devices: BTreeMap::new() };
    for id in table_ids(request.tables) {
        let uuid = request.device_of(id, top).1.to_string();
        let live = kernel.device(DeviceId::Uuid(&uuid))?;
        if !live.is_some_and(|live| live.has_live_table && live.read_only) {
            return Ok(false);
        }
        let mut lines = kernel.live_table(&uuid)?;
        let mut same = true;
        let walked = request.tables.for_each_segment(id, &mut |segment| {
            same = comparison.same_segment(&segment, &mut *lines)?;
            // An error only to stop the walk early.
            if same { Ok(()) } else { Err(Error::new(ErrorKind::Io("another table".to_owned()))) }
        });
        if !same {
            return Ok(false);
        }
        walked?;
        if lines.next().is_some() || index_of(id) >= request.tables.tables().len() {
            return Ok(false);
        }
    }
    match request.options.access() {
        Access::ReadOnly => Ok(true),
        Access::Writable => same_overlay(kernel, request, top),
    }
}

/// True where the device that takes writes lies over the disk and on a store.
fn same_overlay<K: Kernel>(kernel: &K, request: &Request<'_>, top: &DmUuid) -> Result<bool> {
    let text = top.to_string();
    let live = kernel.device(DeviceId::Uuid(&text))?;
    if !live.is_some_and(|live| live.has_live_table && live.access() == Access::Writable) {
        return Ok(false);
    }
    let mut lines = kernel.live_table(&text)?;
    let (Some(line), None) = (lines.next(), lines.next()) else { return Ok(false) };
    let size = request.tables.size().get();
    let LiveTarget::Snapshot(live) = LiveTarget::of(&line) else { return Ok(false) };
    if (line.start, line.length) != (0, size) {
        return Ok(false);
    }
    let Some(disk) = table_ids(request.tables).last() else { return Ok(false) };
    let disk = request.device_of(disk, top).1.to_string();
    let origin = kernel.device(DeviceId::Number(live.origin))?;
    let store = kernel.loop_info(live.cow)?;
    Ok(origin.is_some_and(|origin| origin.uuid == disk)
        && store.is_some_and(|store| store.role() == Some(LoopRole::Store)))
}

/// The loop device over the store that the device of this UUID has.
pub(super) fn store_of<K: Kernel>(kernel: &K, top: &DmUuid) -> Result<Option<AttachedLoop>> {
    let line = kernel.live_table(&top.to_string())?.next();
    let Some(LiveTarget::Snapshot(live)) = line.as_ref().map(LiveTarget::of) else {
        return Ok(None);
    };
    let number = live.cow;
    Ok(kernel.loop_info(number)?.map(|info| AttachedLoop { number, info }))
}

struct Comparison<'a, K> {
    kernel: &'a K,
    request: &'a Request<'a>,
    top: &'a DmUuid,
    /// Which device stands for a backing, once it was looked at.
    devices: BTreeMap<BackingId, DeviceNumber>,
}

impl<K: Kernel> Comparison<'_, K> {
    /// Takes the live lines of one segment. It is one line, but of the scratch file, which
    /// when it was written showed what inflates to zeros or not at all.
    fn same_segment(
        &mut self,
        segment: &Segment,
        lines: &mut dyn Iterator<Item = LiveLine>,
    ) -> Result<bool> {
        let (mut at, end) = (segment.start.get(), segment.start.get() + segment.length.get());
        let offset = match segment.target {
            SegmentTarget::Linear { backing, offset } if self.is_scratch(backing) => Some(offset),
            _ => None,
        };
        while at < end {
            let Some(line) = lines.next() else { return Ok(false) };
            let length = if offset.is_some() { line.length } else { segment.length.get() };
            if line.start != at || line.length != length || length == 0 || length > end - at {
                return Ok(false);
            }
            let live = LiveTarget::of(&line);
            let fits = match (segment.target, offset) {
                (SegmentTarget::Linear { backing, .. }, Some(offset)) => {
                    let here = offset.get() + (at - segment.start.get());
                    live == LiveTarget::Zero
                        || (live == LiveTarget::Error && self.request.tables.scratch_may_fail())
                        || self.same_linear(backing, here, &live)?
                }
                _ => self.same_target(segment, &live)?,
            };
            if !fits {
                return Ok(false);
            }
            at += length;
        }
        Ok(true)
    }

    fn is_scratch(&self, backing: BackingId) -> bool {
        let backing = self.request.tables.backings().get(backing.0 as usize);
        matches!(backing, Some(Backing::Scratch { .. }))
    }

    fn same_target(&mut self, segment: &Segment, live: &LiveTarget) -> Result<bool> {
        match segment.target {
            SegmentTarget::Zero => Ok(*live == LiveTarget::Zero),
            SegmentTarget::Error => Ok(*live == LiveTarget::Error),
            SegmentTarget::Linear { backing, offset } => {
                self.same_linear(backing, offset.get(), live)
            }
            SegmentTarget::Crypt { backing, crypt } => self.same_crypt(backing, crypt, live),
        }
    }

    fn same_crypt(
        &mut self,
        backing: BackingId,
        crypt: CryptId,
        live: &LiveTarget,
    ) -> Result<bool> {
        let planned = self.request.tables.crypts().get(crypt.0 as usize);
        let (Some(planned), LiveTarget::Crypt(live)) = (planned, live) else { return Ok(false) };
        Ok(live.cipher == planned.cipher
            && live.has_key(self.top, planned.layer, planned.key_bytes)
            && (live.iv_offset, live.start) == (0, 0)
            && self.is_device_of(backing, live.device)?)
    }

    fn same_linear(&mut self, backing: BackingId, offset: u64, live: &LiveTarget) -> Result<bool> {
        match *live {
            LiveTarget::Linear { device, offset: live_offset } if live_offset == offset => {
                self.is_device_of(backing, device)
            }
            _ => Ok(false),
        }
    }

    fn is_device_of(&mut self, backing: BackingId, device: DeviceNumber) -> Result<bool> {
        if let Some(known) = self.devices.get(&backing) {
            return Ok(*known == device);
        }
        if !self.stands_for(backing, device)? {
            return Ok(false);
        }
        self.devices.insert(backing, device);
        Ok(true)
    }

    fn stands_for(&self, backing: BackingId, number: DeviceNumber) -> Result<bool> {
        let plan = self.request.tables;
        let backing = usize::try_from(backing.0).ok().and_then(|at| plan.backings().get(at));
        match backing {
            None => Ok(false),
            Some(Backing::Table(table)) => {
                let uuid = self.request.device_of(*table, self.top).1.to_string();
                let device = self.kernel.device(DeviceId::Number(number))?;
                Ok(device.is_some_and(|device| device.uuid == uuid))
            }
            Some(Backing::Zero { .. }) => {
                let info = self.kernel.loop_info(number)?;
                Ok(info.is_some_and(|info| info.role() == Some(LoopRole::Zero)))
            }
            Some(Backing::Scratch { .. }) => {
                let info = self.kernel.loop_info(number)?;
                Ok(info.is_some_and(|info| info.role() == Some(LoopRole::Scratch)))
            }
            Some(Backing::File { layer, role }) => {
                let source = self.request.source(*layer, *role)?;
                if self.request.is_direct(source) {
                    return Ok(
                        source.id().map(|id| DeviceNumber::from_dev(id.device)) == Some(number)
                    );
                }
                let info = self.kernel.loop_info(number)?;
                Ok(info.is_some_and(|info| info.read_only && Some(info.file) == source.id()))
            }
        }
    }
}

/// What the device of this UUID is on an attachment, in words, and that one's top device;
/// none where it does not stand on any.
pub(super) fn part_of<K: Kernel>(kernel: &K, uuid: &str) -> Option<(String, DeviceInfo)> {
    let uuid: DmUuid = uuid.parse().ok()?;
    let what = match uuid.role {
        DeviceRole::Partition(number) => format!("partition {number}"),
        DeviceRole::LogicalVolume(_) => "a logical volume".to_owned(),
        DeviceRole::Top | DeviceRole::Inner(_) => return None,
    };
    let top = uuid.with_role(DeviceRole::Top).to_string();
    let attachment = kernel.device(DeviceId::Uuid(&top)).ok().flatten()?;
    Some((what, attachment))
}

/// Whose a device is, in words.
pub(super) fn describe<K: Kernel>(kernel: &K, device: &DeviceInfo) -> String {
    let uuid = &device.uuid;
    if let Some((what, attachment)) = part_of(kernel, uuid) {
        return format!("{what} of '{}'", printable(&attachment.name));
    }
    if uuid.starts_with(UUID_PREFIX) {
        let attached = super::list::list(kernel).unwrap_or_default();
        let image = attached.iter().find(|attached| attached.number == device.number);
        return match image.and_then(|attached| attached.image.as_ref()) {
            Some(image) => {
                format!("an imgdm device of {}", printable(&image.path.to_string_lossy()))
            }
            None => "an imgdm device".to_owned(),
        };
    }
    let kinds = [
        ("LVM-", "an LVM logical volume"),
        ("CRYPT-", "an encrypted device"),
        ("mpath-", "a multipath device"),
        ("part", "a partition"),
    ];
    for (prefix, kind) in kinds {
        if uuid.starts_with(prefix) {
            return format!("{kind} (UUID {})", printable(uuid));
        }
    }
    match uuid.as_str() {
        "" => "a device without a UUID".to_owned(),
        uuid => format!("a device with the UUID {}", printable(uuid)),
    }
}
