//! What is known of the store of an attached disk that takes writes.

use super::list::AttachedLoop;
use super::live::LiveTarget;
use super::name::{DmUuid, LoopRole};
use super::options::{Options, Overlay};
use super::{DeviceId, DeviceInfo, DeviceNumber, Kernel, LoopInfo, LoopPath};
use crate::error::Result;
use crate::units::Sectors;

/// What a disk that takes writes lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedOverlay {
    /// The device that shows the image and is never written.
    pub disk: DeviceNumber,
    /// Its UUID.
    pub disk_uuid: String,
    /// The loop device over the store; none where it is not to be seen.
    pub store: Option<DeviceNumber>,
    /// The store's file; none for one that goes with the device.
    pub path: Option<LoopPath>,
    /// The store stays when the device goes.
    pub is_kept: bool,
    /// How full it is.
    pub state: OverlayState,
}

/// What dm-snapshot says of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayState {
    /// It takes writes.
    Usable {
        /// What of it is in use.
        used: Sectors,
        /// Its size.
        total: Sectors,
        /// What of the use is bookkeeping.
        metadata: Sectors,
    },
    /// It is full: writes fail, reads go on, and what is in it stays.
    Full,
    /// It was given up, for it could not be written: every read and write fails.
    Invalid,
    /// Something that this imgdm does not know, in the kernel's words.
    Other(String),
}

impl OverlayState {
    /// Reads the status of a snapshot target (snapshot_status() in the kernel's
    /// drivers/md/dm-snap.c).
    fn parse(text: &str) -> Self {
        let other = || Self::Other(crate::error::printable(text));
        let usable = || {
            let (used, rest) = text.split_once('/')?;
            let (total, metadata) = rest.split_once(' ')?;
            let sectors = |text: &str| text.parse().ok().map(Sectors::new);
            let (used, total, metadata) = (sectors(used)?, sectors(total)?, sectors(metadata)?);
            Some(Self::Usable { used, total, metadata })
        };
        match text {
            "Invalid" => Self::Invalid,
            "Overflow" => Self::Full,
            _ => usable().unwrap_or_else(other),
        }
    }
}

/// What the device of this UUID, with these loop devices and devices inside, lies on, where
/// it takes writes.
pub(super) fn of<K: Kernel>(
    kernel: &K,
    top: &DmUuid,
    loops: &[AttachedLoop],
    inner: &[DeviceInfo],
) -> Result<Option<AttachedOverlay>> {
    let overlay = Options::from_bits(top.options).map_or(Overlay::None, |options| options.overlay);
    if overlay == Overlay::None {
        return Ok(None);
    }
    let text = top.to_string();
    let ask = || Ok((kernel.live_table(&text)?.next(), state(kernel, top)?));
    let (line, state) = match ask() {
        Ok(answers) => answers,
        // It went after it was listed.
        Err(_) if kernel.device(DeviceId::Uuid(&text))?.is_none() => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(LiveTarget::Snapshot(live)) = line.as_ref().map(LiveTarget::of) else {
        return Ok(None);
    };
    let is_store = |info: &LoopInfo| info.role() == Some(LoopRole::Store);
    let store = loops.iter().find(|each| each.number == live.cow && is_store(&each.info));
    let is_kept = overlay == Overlay::Kept;
    let disk = inner.iter().find(|device| device.number == live.origin);
    Ok(Some(AttachedOverlay {
        disk: live.origin,
        disk_uuid: disk.map(|disk| disk.uuid.clone()).unwrap_or_default(),
        store: store.map(|each| each.number),
        path: store.and_then(|each| each.info.path.clone()).filter(|_| is_kept),
        is_kept,
        state,
    }))
}

/// How full the store of the device of this UUID is now.
pub(super) fn state<K: Kernel>(kernel: &K, top: &DmUuid) -> Result<OverlayState> {
    let status = kernel.live_status(&top.to_string())?;
    Ok(OverlayState::parse(status.first().map_or("", |line| &line.parameters)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_understood() {
        let usable = OverlayState::Usable {
            used: Sectors::new(96),
            total: Sectors::new(2048),
            metadata: Sectors::new(64),
        };
        assert_eq!(OverlayState::parse("96/2048 64"), usable);
        assert_eq!(OverlayState::parse("Invalid"), OverlayState::Invalid);
        assert_eq!(OverlayState::parse("Overflow"), OverlayState::Full);
        for text in ["", "Merge failed", "1/2", "a/b c"] {
            assert_eq!(OverlayState::parse(text), OverlayState::Other(text.to_owned()));
        }
    }
}
