//! The parts of a plan: backings, tables and their segments, without device numbers.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};
use crate::status::FileRole;
use crate::table::{CryptKey, DeviceRef, TableLine, Target};
use crate::units::Sectors;

/// Targets that one device-mapper table holds at most; the kernel answers EOVERFLOW
/// past it (kernel: DM_MAX_TARGETS in drivers/md/dm-table.c).
pub const MAX_SEGMENTS_PER_TABLE: u64 = 1_048_576;

/// Names a backing of a plan: an index into [`Plan::backings`](super::Plan::backings).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackingId(pub u32);

/// Names a table of a plan: an index into [`Plan::tables`](super::Plan::tables).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableId(pub u32);

/// What a linear segment can lie on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backing {
    /// A file or block device of the chain, through a read-only loop device.
    File {
        /// Depth of its layer.
        layer: u32,
        /// Which of the layer's files.
        role: FileRole,
    },
    /// Zeros, through a loop device over a sealed memory file of this size.
    Zero {
        /// The longest zero segment that needs it.
        length: Sectors,
    },
    /// The scratch file, through a read-only loop device.
    Scratch {
        /// Its size.
        length: Sectors,
    },
    /// Another table of the same plan.
    Table(TableId),
}

/// Names a cipher of a plan: an index into [`Plan::crypts`](super::Plan::crypts).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CryptId(pub u32);

/// One crypt target, which decrypts one file of an encrypted layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedCrypt {
    /// Depth of the layer whose key it takes.
    pub layer: u32,
    /// Which of the layer's files it decrypts.
    pub role: FileRole,
    /// The cipher as dm-crypt's table names it (`aes-xts-plain64`).
    pub cipher: String,
    /// Bytes of its key.
    pub key_bytes: usize,
}

/// What a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableRole {
    /// The device that the user gets.
    Top,
    /// A device below the top one, hidden from udev.
    Inner,
}

impl TableRole {
    /// The role's name in JSON and in device UUIDs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Top => "top",
            Self::Inner => "inner",
        }
    }
}

/// One table to be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTable {
    /// What it is for.
    pub role: TableRole,
    /// Size of its device.
    pub size: Sectors,
    /// How many segments it has.
    pub segments: u64,
}

/// What serves a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentTarget {
    /// dm-linear onto a backing.
    Linear {
        /// The backing.
        backing: BackingId,
        /// Where on it the segment starts.
        offset: Sectors,
    },
    /// dm-zero.
    Zero,
    /// dm-error: what can't be read.
    Error,
    /// dm-crypt over a whole backing, from its first sector on, which has IV 0.
    Crypt {
        /// The ciphertext.
        backing: BackingId,
        /// The cipher.
        crypt: CryptId,
    },
}

/// One line of a planned table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First sector in its table.
    pub start: Sectors,
    /// Length, never 0.
    pub length: Sectors,
    /// What serves it.
    pub target: SegmentTarget,
}

/// Which device stands for each backing.
#[derive(Clone, Debug, Default)]
pub struct Bindings {
    devices: BTreeMap<BackingId, DeviceRef>,
    ciphers: BTreeMap<CryptId, (String, CryptKey)>,
}

impl Bindings {
    /// Says that `device` stands for `backing`.
    pub fn bind(&mut self, backing: BackingId, device: DeviceRef) {
        self.devices.insert(backing, device);
    }

    /// Says which cipher and key `crypt` stands for.
    pub fn bind_cipher(&mut self, crypt: CryptId, cipher: String, key: CryptKey) {
        self.ciphers.insert(crypt, (cipher, key));
    }

    fn device(&self, backing: BackingId) -> Result<DeviceRef> {
        self.devices.get(&backing).cloned().ok_or_else(|| {
            Error::new(ErrorKind::Usage(format!("no device is given for backing @{}", backing.0)))
        })
    }

    /// The table line of a segment, with the device in it.
    ///
    /// # Errors
    /// The backing has no device yet, or the cipher no key.
    pub fn line(&self, segment: &Segment) -> Result<TableLine> {
        let target = match segment.target {
            SegmentTarget::Zero => Target::Zero,
            SegmentTarget::Error => Target::Error,
            SegmentTarget::Linear { backing, offset } => {
                Target::Linear { device: self.device(backing)?, offset }
            }
            SegmentTarget::Crypt { backing, crypt } => {
                let (cipher, key) = self.ciphers.get(&crypt).cloned().ok_or_else(|| {
                    Error::new(ErrorKind::WrongKey(format!(
                        "no key is given for cipher {}",
                        crypt.0
                    )))
                })?;
                Target::Crypt { cipher, key, device: self.device(backing)? }
            }
        };
        Ok(TableLine { start: segment.start, length: segment.length, target })
    }
}

/// Makes the lines of one table, one after the other, without anew what a line has in common
/// with the one before.
#[derive(Debug)]
pub struct LineMaker<'b> {
    bindings: &'b Bindings,
    /// What `line` lies on, where it is linear.
    backing: Option<BackingId>,
    line: TableLine,
}

impl<'b> LineMaker<'b> {
    /// With these devices and keys.
    pub fn new(bindings: &'b Bindings) -> Self {
        let (start, length) = (Sectors::default(), Sectors::default());
        Self { bindings, backing: None, line: TableLine { start, length, target: Target::Zero } }
    }

    /// The table line of a segment.
    ///
    /// # Errors
    /// As [`Bindings::line`].
    pub fn line(&mut self, segment: &Segment) -> Result<&TableLine> {
        match (segment.target, &mut self.line.target) {
            (SegmentTarget::Linear { backing, offset }, Target::Linear { offset: before, .. })
                if self.backing == Some(backing) =>
            {
                *before = offset;
                (self.line.start, self.line.length) = (segment.start, segment.length);
            }
            (target, _) => {
                self.line = self.bindings.line(segment)?;
                self.backing = match target {
                    SegmentTarget::Linear { backing, .. } => Some(backing),
                    SegmentTarget::Zero | SegmentTarget::Error | SegmentTarget::Crypt { .. } => {
                        None
                    }
                };
            }
        }
        Ok(&self.line)
    }
}

/// A plan as the device side sees it: what to build, bottom up.
pub trait TableSource: Sync {
    /// Size of the top device.
    fn size(&self) -> Sectors;

    /// The backings, by [`BackingId`].
    fn backings(&self) -> &[Backing];

    /// The tables by [`TableId`], each after those it lies on; the last is the top one.
    fn tables(&self) -> &[PlannedTable];

    /// The crypt targets, by [`CryptId`].
    fn crypts(&self) -> &[PlannedCrypt] {
        &[]
    }

    /// True where parts of the scratch file may be dm-error instead.
    fn scratch_may_fail(&self) -> bool {
        false
    }

    /// Calls `each` with the segments of a table in order, gapless from sector 0.
    ///
    /// # Errors
    /// What resolving the images or `each` says.
    fn for_each_segment(
        &self,
        table: TableId,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()>;
}
