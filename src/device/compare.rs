//! Whether what is attached is what would be attached, and whose a device is.

use std::collections::BTreeMap;

use super::attach::{Request, index_of, table_ids};
use super::name::{DmUuid, LoopRole, UUID_PREFIX};
use super::{DeviceId, DeviceInfo, DeviceNumber, Kernel, LiveLine};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::plan::{Backing, BackingId, Segment, SegmentTarget};

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
            same = match lines.next() {
                Some(line) => comparison.same_line(&segment, &line)?,
                None => false,
            };
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
    Ok(true)
}

struct Comparison<'a, K> {
    kernel: &'a K,
    request: &'a Request<'a>,
    top: &'a DmUuid,
    /// Which device stands for a backing, once it was looked at.
    devices: BTreeMap<BackingId, String>,
}

impl<K: Kernel> Comparison<'_, K> {
    fn same_line(&mut self, segment: &Segment, line: &LiveLine) -> Result<bool> {
        if line.start != segment.start.get() || line.length != segment.length.get() {
            return Ok(false);
        }
        let SegmentTarget::Linear { backing, offset } = segment.target else {
            return Ok(line.kind == "zero");
        };
        let Some((device, live_offset)) = line.parameters.split_once(' ') else {
            return Ok(false);
        };
        if line.kind != "linear" || live_offset.parse() != Ok(offset.get()) {
            return Ok(false);
        }
        if let Some(known) = self.devices.get(&backing) {
            return Ok(known == device);
        }
        let Some(number) = parse_number(device) else { return Ok(false) };
        if !self.stands_for(backing, number)? {
            return Ok(false);
        }
        self.devices.insert(backing, device.to_owned());
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

/// `MAJOR:MINOR`.
fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

/// Whose a device is, in words.
pub(super) fn describe<K: Kernel>(kernel: &K, device: &DeviceInfo) -> String {
    let uuid = &device.uuid;
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
