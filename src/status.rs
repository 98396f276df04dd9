//! What one layer says of one guest range, before its backing file is asked.

use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Which of a layer's files a host offset is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileRole {
    /// The image file itself.
    Image,
    /// The external data file of a qcow2 image.
    DataFile,
}

/// A place in one of a layer's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPlace {
    /// The file.
    pub file: FileRole,
    /// Bytes from its start.
    pub offset: HostOffset,
}

impl HostPlace {
    /// A place in the image file itself.
    #[inline]
    pub const fn in_image(offset: HostOffset) -> Self {
        Self { file: FileRole::Image, offset }
    }

    /// `distance` bytes further on in the same file.
    #[must_use]
    pub fn advanced(self, distance: ByteLen) -> Self {
        Self { file: self.file, offset: self.offset.saturating_add(distance) }
    }
}

/// Why a layer itself says that a range reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroStatus {
    /// A qcow2 zero cluster or subcluster with no host cluster.
    Plain,
    /// A qcow2 zero cluster or subcluster that keeps its host cluster; the bytes
    /// there mean nothing.
    Allocated(HostPlace),
    /// A hole of a raw file.
    Hole(HostPlace),
    /// An unwritten extent of a raw file.
    Unwritten(HostPlace),
    /// The last bytes of a raw image whose size is no multiple of 512: QEMU rounds
    /// the size up and reads zeros.
    PastFileEnd(HostPlace),
    /// A data cluster whose host range is a hole of its file.
    DataHole(HostPlace),
    /// A data cluster whose host range lies past the end of its file.
    DataPastFileEnd(HostPlace),
    /// A data cluster whose host range is an unwritten extent of its file.
    DataUnwritten(HostPlace),
}

/// The cipher of an encrypted layer, as far as mapping needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Method 1 (qcow and qcow2): AES-CBC, IV from the guest sector.
    Aes,
    /// Method 2 (qcow2): LUKS, IV from the host sector.
    Luks,
}

/// A layer's answer for one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// The bytes lie at this place, as they are.
    Data(HostPlace),
    /// The bytes lie at this place of the image file, under a cipher.
    Encrypted {
        /// Where the ciphertext is.
        place: HostPlace,
        /// Which cipher.
        cipher: Encryption,
    },
    /// One compressed cluster (or the asked part of it).
    Compressed {
        /// Where its stream starts in the image file.
        host: HostOffset,
        /// An upper bound of the stream's length (qcow2: to the end of its last
        /// 512-byte sector).
        stream_length: ByteLen,
        /// Guest offset of the cluster's first byte.
        cluster: GuestOffset,
    },
    /// Reads as zero, whatever the backing file holds.
    Zero(ZeroStatus),
    /// The backing file answers. An extended L2 entry may keep a host cluster of
    /// which this subcluster is unallocated.
    Unallocated(Option<HostPlace>),
    /// Damaged metadata: what the range holds can't be told. Only where damage is listed
    /// and gone past (see [`damage`](crate::damage)).
    Damaged {
        /// Start of all that the same damage spoils.
        from: GuestOffset,
    },
}

impl BlockStatus {
    /// The status of the part that starts `distance` bytes into the run.
    #[must_use]
    pub fn advanced(self, distance: ByteLen) -> Self {
        match self {
            Self::Data(place) => Self::Data(place.advanced(distance)),
            Self::Encrypted { place, cipher } => {
                Self::Encrypted { place: place.advanced(distance), cipher }
            }
            Self::Compressed { .. } | Self::Damaged { .. } => self,
            Self::Zero(zero) => Self::Zero(zero.advanced(distance)),
            Self::Unallocated(place) => Self::Unallocated(place.map(|p| p.advanced(distance))),
        }
    }
}

impl ZeroStatus {
    /// The place in a file that belongs to the zeros, where there is one.
    pub fn place(self) -> Option<HostPlace> {
        match self {
            Self::Plain => None,
            Self::Allocated(place)
            | Self::Hole(place)
            | Self::Unwritten(place)
            | Self::PastFileEnd(place)
            | Self::DataHole(place)
            | Self::DataPastFileEnd(place)
            | Self::DataUnwritten(place) => Some(place),
        }
    }

    fn advanced(self, distance: ByteLen) -> Self {
        match self {
            Self::Plain => Self::Plain,
            Self::Allocated(place) => Self::Allocated(place.advanced(distance)),
            Self::Hole(place) => Self::Hole(place.advanced(distance)),
            Self::Unwritten(place) => Self::Unwritten(place.advanced(distance)),
            Self::PastFileEnd(place) => Self::PastFileEnd(place.advanced(distance)),
            Self::DataHole(place) => Self::DataHole(place.advanced(distance)),
            Self::DataPastFileEnd(place) => Self::DataPastFileEnd(place.advanced(distance)),
            Self::DataUnwritten(place) => Self::DataUnwritten(place.advanced(distance)),
        }
    }
}

/// A guest range with one status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusRun {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes, never 0.
    pub length: ByteLen,
    /// What the layer says of it.
    pub status: BlockStatus,
}

impl StatusRun {
    /// First byte past the run.
    pub fn end(&self) -> GuestOffset {
        self.start.saturating_add(self.length)
    }

    /// The guest range.
    pub fn range(&self) -> GuestRange {
        GuestRange::new(self.start, self.end())
    }

    /// The part of the run inside `range`; `None` where they do not meet.
    pub fn clipped(&self, range: GuestRange) -> Option<StatusRun> {
        let part = self.range().intersection(range);
        if part.is_empty() {
            return None;
        }
        let status = self.status.advanced(part.start.since(self.start));
        Some(StatusRun { start: part.start, length: part.length(), status })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_moves_the_host_offset_along() {
        let run = StatusRun {
            start: GuestOffset::new(100),
            length: ByteLen::new(100),
            status: BlockStatus::Data(HostPlace::in_image(HostOffset::new(5000))),
        };
        let part = run
            .clipped(GuestRange::new(GuestOffset::new(150), GuestOffset::new(999)))
            .expect("they meet");
        assert_eq!(part.length, ByteLen::new(50));
        assert_eq!(part.status, BlockStatus::Data(HostPlace::in_image(HostOffset::new(5050))));
        assert_eq!(
            run.clipped(GuestRange::new(GuestOffset::new(200), GuestOffset::new(300))),
            None
        );
    }
}
