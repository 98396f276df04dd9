//! The options that change what is attached, and the bits of a UUID that record them.

use super::UdevRules;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::ZeroMode;
use crate::scratch::OnError;

/// Whether loop devices read their files around the page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Around it where the kernel says that the file system can (Linux 6.1): through it, the
    /// loop device has one read under way at a time, and copies all that is read a second time
    /// (measured: `cargo bench --bench datapath`).
    #[default]
    Auto,
    /// Around it; an error where the file system can't.
    On,
    /// Through it.
    Off,
}

/// Whether what is written to the device is taken, and where it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overlay {
    /// The device takes no writes.
    #[default]
    None,
    /// To a store that goes with the device.
    Transient,
    /// To a store that stays.
    Kept,
}

/// Whether a device takes writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It does not.
    ReadOnly,
    /// It does.
    Writable,
}

/// The options that change what is attached; the UUID carries them as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// How zeros are served.
    pub zero: ZeroMode,
    /// Unwritten extents are not asked for.
    pub no_fiemap: bool,
    /// What is done with clusters that can't be read.
    pub on_error: OnError,
    /// How loop devices read.
    pub direct_io: DirectIo,
    /// Image files that are block devices are mapped without a loop device between.
    pub direct_block: bool,
    /// Let blkid, LVM and others look into the device.
    pub publish: bool,
    /// A record is kept of it, and as little as can be is told of it to the host.
    pub evidence: bool,
    /// What becomes of writes.
    pub overlay: Overlay,
}

// Bit of each option; the plan's lie below, the device's from 16 on.
const ZERO: u32 = 0;
const NO_FIEMAP: u32 = 2;
const ON_ERROR: u32 = 3;
const DIRECT_IO: u32 = 16;
const DIRECT_BLOCK: u32 = 18;
const PUBLISH: u32 = 19;
const EVIDENCE: u32 = 20;
const OVERLAY: u32 = 21;

// By the number that their two bits carry.
const ZERO_MODES: [ZeroMode; 3] = [ZeroMode::Auto, ZeroMode::Dm, ZeroMode::Loop];
const ON_ERRORS: [OnError; 3] = [OnError::Refuse, OnError::Zero, OnError::ErrorTarget];
const DIRECT_IOS: [DirectIo; 3] = [DirectIo::Auto, DirectIo::On, DirectIo::Off];
const OVERLAYS: [Overlay; 3] = [Overlay::None, Overlay::Transient, Overlay::Kept];

/// The two bits of one of `all`.
fn number<T: PartialEq>(all: &[T], one: &T) -> u32 {
    (0..).zip(all).find_map(|(number, each)| (each == one).then_some(number)).unwrap_or(0)
}

impl Options {
    /// As the UUID carries them.
    pub fn bits(&self) -> u32 {
        number(&ZERO_MODES, &self.zero) << ZERO
            | u32::from(self.no_fiemap) << NO_FIEMAP
            | number(&ON_ERRORS, &self.on_error) << ON_ERROR
            | number(&DIRECT_IOS, &self.direct_io) << DIRECT_IO
            | u32::from(self.direct_block) << DIRECT_BLOCK
            | u32::from(self.publish) << PUBLISH
            | u32::from(self.evidence) << EVIDENCE
            | number(&OVERLAYS, &self.overlay) << OVERLAY
    }

    /// True where the same tables come of both.
    pub(super) fn is_same_plan(&self, other: &Self) -> bool {
        (self.bits() ^ other.bits()) & ((1 << DIRECT_IO) - 1) == 0
    }

    /// Whether the devices that the user gets take writes. All below them never do.
    pub fn access(&self) -> Access {
        if self.overlay == Overlay::None { Access::ReadOnly } else { Access::Writable }
    }

    /// What udev is to do with the devices that the user gets.
    pub(super) fn rules(&self) -> UdevRules {
        match self {
            Self { evidence: true, .. } => UdevRules::Hide,
            Self { publish: true, .. } => UdevRules::Publish,
            _ => UdevRules::HideContent,
        }
    }

    /// The options that a UUID carries.
    ///
    /// # Errors
    /// `Unsupported`: the bits are a later imgdm's.
    pub fn from_bits(bits: u32) -> Result<Self> {
        let unknown = || {
            Error::new(ErrorKind::Unsupported(format!(
                "the device was attached with options ({bits:#010x}) that this imgdm does not know"
            )))
        };
        let index = |at: u32| usize::try_from(bits >> at & 3).unwrap_or(usize::MAX);
        let options = Self {
            zero: *ZERO_MODES.get(index(ZERO)).ok_or_else(unknown)?,
            no_fiemap: bits >> NO_FIEMAP & 1 == 1,
            on_error: *ON_ERRORS.get(index(ON_ERROR)).ok_or_else(unknown)?,
            direct_io: *DIRECT_IOS.get(index(DIRECT_IO)).ok_or_else(unknown)?,
            direct_block: bits >> DIRECT_BLOCK & 1 == 1,
            publish: bits >> PUBLISH & 1 == 1,
            evidence: bits >> EVIDENCE & 1 == 1,
            overlay: *OVERLAYS.get(index(OVERLAY)).ok_or_else(unknown)?,
        };
        if options.bits() == bits { Ok(options) } else { Err(unknown()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read_back_from_their_bits_and_unknown_bits_are_refused() {
        let mut known = 0;
        for bits in 0..1 << 24 {
            if let Ok(options) = Options::from_bits(bits) {
                assert_eq!(options.bits(), bits);
                known += 1;
            }
        }
        assert_eq!(known, 3 * 2 * 3 * 3 * 2 * 2 * 2 * 3);
        assert_eq!(Options::default().bits(), 0);
        // Of devices that are attached while imgdm is replaced.
        let options = Options {
            zero: ZeroMode::Loop,
            no_fiemap: true,
            on_error: OnError::ErrorTarget,
            direct_io: DirectIo::Off,
            direct_block: true,
            publish: true,
            evidence: true,
            overlay: Overlay::Kept,
        };
        let bits = 2 | 1 << 2 | 2 << 3 | 2 << 16 | 1 << 18 | 1 << 19 | 1 << 20 | 2 << 21;
        assert_eq!(options.bits(), bits);
    }
}
