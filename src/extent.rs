//! A row of a map: one guest range, which layer answers for it, and how.

use crate::status::{Encryption, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// Why a range reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroCause {
    /// The layer's own metadata or file says so.
    Layer(ZeroStatus),
    /// No layer has the range, and this one is the last. The place is the host cluster
    /// that an extended L2 entry keeps for it all the same.
    Unallocated(Option<HostPlace>),
    /// The layer leaves it to its backing file, which ends before it.
    PastBackingEnd(Option<HostPlace>),
}

/// Where the bytes of an extent come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// From a file of the layer, as they are.
    Data(HostPlace),
    /// From a file of the layer, under a cipher.
    Encrypted {
        /// Where the ciphertext is.
        place: HostPlace,
        /// Which cipher.
        cipher: Encryption,
    },
    /// Out of one compressed cluster of the layer's image file.
    Compressed {
        /// Where its stream starts.
        host: HostOffset,
        /// An upper bound of the stream's length.
        stream_length: ByteLen,
        /// Guest offset of the cluster's first byte.
        cluster: GuestOffset,
    },
    /// Zeros.
    Zero(ZeroCause),
    /// The layer's metadata is damaged: nobody can tell.
    Damaged {
        /// Start of all that the same damage spoils.
        from: GuestOffset,
    },
}

impl Mapping {
    /// `BDRV_BLOCK_ALLOCATED`: some layer holds the range (`present` of a map).
    pub fn is_present(self) -> bool {
        !matches!(self, Self::Zero(ZeroCause::Unallocated(_) | ZeroCause::PastBackingEnd(_)))
    }

    /// `BDRV_BLOCK_ZERO`: it is known to read as zero.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Zero(_))
    }

    /// `BDRV_BLOCK_DATA`: reading it reads a file, by the layer's metadata.
    pub fn is_data(self) -> bool {
        match self {
            Self::Data(_) | Self::Encrypted { .. } | Self::Compressed { .. } => true,
            Self::Damaged { .. } => false,
            Self::Zero(cause) => matches!(
                cause,
                ZeroCause::Layer(
                    ZeroStatus::DataHole(_)
                        | ZeroStatus::DataPastFileEnd(_)
                        | ZeroStatus::DataUnwritten(_)
                )
            ),
        }
    }

    /// `BDRV_BLOCK_COMPRESSED`.
    pub fn is_compressed(self) -> bool {
        matches!(self, Self::Compressed { .. })
    }

    /// `BDRV_BLOCK_OFFSET_VALID`: the place in a file where the range lies as it is.
    pub fn place(self) -> Option<HostPlace> {
        match self {
            Self::Data(place) => Some(place),
            Self::Encrypted { .. } | Self::Compressed { .. } | Self::Damaged { .. } => None,
            Self::Zero(ZeroCause::Layer(zero)) => zero.place(),
            Self::Zero(ZeroCause::Unallocated(place) | ZeroCause::PastBackingEnd(place)) => place,
        }
    }

    /// True where `next`, `distance` bytes further on, carries this mapping on.
    #[inline]
    fn continues_as(self, distance: ByteLen, next: Mapping) -> bool {
        if let (Self::Data(a), Self::Data(b)) = (self, next) {
            return a.advanced(distance) == b;
        }
        self.continues_without_data(distance, next)
    }

    #[inline(never)]
    fn continues_without_data(self, distance: ByteLen, next: Mapping) -> bool {
        match (self, next) {
            (Self::Encrypted { place: a, cipher: x }, Self::Encrypted { place: b, cipher: y }) => {
                x == y && a.advanced(distance) == b
            }
            // Two parts of one cluster only; neighbouring clusters stay apart, so that
            // each can be inflated.
            (Self::Compressed { .. }, Self::Compressed { .. })
            // And two parts of what the same damage spoils.
            | (Self::Damaged { .. }, Self::Damaged { .. }) => self == next,
            (Self::Zero(a), Self::Zero(b)) => a.continues_as(distance, b),
            _ => false,
        }
    }
}

impl ZeroCause {
    fn continues_as(self, distance: ByteLen, next: ZeroCause) -> bool {
        use std::mem::discriminant;
        let same_kind = match (self, next) {
            (Self::Layer(a), Self::Layer(b)) => discriminant(&a) == discriminant(&b),
            (a, b) => discriminant(&a) == discriminant(&b),
        };
        let moved = Mapping::Zero(self).place().map(|place| place.advanced(distance));
        same_kind && moved == Mapping::Zero(next).place()
    }
}

/// One row of a map. Extents come sorted by `start`, without gap or overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: GuestOffset,
    /// Length in bytes, never 0.
    pub length: ByteLen,
    /// The layer that answers: 0 the active layer, 1 its backing file, and so on.
    pub depth: u32,
    /// Where the bytes come from.
    pub mapping: Mapping,
}

impl Extent {
    /// First byte past the extent.
    #[inline]
    pub fn end(&self) -> GuestOffset {
        self.start.saturating_add(self.length)
    }

    /// Takes `next`, which follows this extent, into it where it carries it on.
    #[inline]
    pub fn absorb(&mut self, next: &Extent) -> bool {
        debug_assert_eq!(self.end(), next.start);
        let merges =
            self.depth == next.depth && self.mapping.continues_as(self.length, next.mapping);
        if merges {
            self.length = ByteLen::new(self.length.get().saturating_add(next.length.get()));
        }
        merges
    }
}

/// Joins extents that carry each other on, one at a time.
#[derive(Debug, Default)]
pub struct Coalescer {
    pending: Option<Extent>,
}

impl Coalescer {
    /// Takes the next extent; gives back the one before it once that can grow no more.
    #[inline]
    pub fn push(&mut self, next: Extent) -> Option<Extent> {
        if self.pending.as_mut().is_some_and(|pending| pending.absorb(&next)) {
            return None;
        }
        self.pending.replace(next)
    }

    /// Gives back the last extent.
    pub fn finish(&mut self) -> Option<Extent> {
        self.pending.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(start: u64, length: u64, host: u64) -> Extent {
        Extent {
            start: GuestOffset::new(start),
            length: ByteLen::new(length),
            depth: 0,
            mapping: Mapping::Data(HostPlace::in_image(HostOffset::new(host))),
        }
    }

    #[test]
    fn extents_join_only_where_guest_and_host_both_carry_on() {
        let mut coalescer = Coalescer::default();
        assert_eq!(coalescer.push(data(0, 10, 100)), None);
        assert_eq!(coalescer.push(data(10, 10, 110)), None);
        assert_eq!(coalescer.push(data(20, 10, 500)), Some(data(0, 20, 100)));
        assert_eq!(coalescer.finish(), Some(data(20, 10, 500)));
        assert_eq!(coalescer.finish(), None);
    }

    #[test]
    fn plain_zeros_join_whatever_their_length() {
        let zero = |start, length| Extent {
            start: GuestOffset::new(start),
            length: ByteLen::new(length),
            depth: 1,
            mapping: Mapping::Zero(ZeroCause::Layer(ZeroStatus::Plain)),
        };
        let mut first = zero(0, 7);
        assert!(first.absorb(&zero(7, 9)));
        assert_eq!(first.length, ByteLen::new(16));
    }
}
