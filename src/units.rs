//! Address spaces and lengths, each its own type.
//!
//! A guest offset and a host offset are never added to each other, and 512-byte
//! sectors appear only at the device-mapper edge. All arithmetic is checked: the
//! numbers come from strangers' images.

use std::fmt;

/// Bytes in a device-mapper sector, whatever the disk's own block size is
/// (kernel: `SECTOR_SHIFT` in include/linux/blk_types.h).
pub const SECTOR_SIZE: u64 = 512;

macro_rules! byte_unit {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Zero.
            pub const ZERO: Self = Self(0);

            /// Wraps a number of bytes.
            #[inline]
            pub const fn new(bytes: u64) -> Self {
                Self(bytes)
            }

            /// The number of bytes.
            #[inline]
            pub const fn get(self) -> u64 {
                self.0
            }

            /// This many bytes further on; `None` past 2^64 - 1.
            #[inline]
            pub const fn checked_add(self, length: ByteLen) -> Option<Self> {
                match self.0.checked_add(length.0) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }

            /// This many bytes further on, or 2^64 - 1 where that is too far.
            #[inline]
            pub const fn saturating_add(self, length: ByteLen) -> Self {
                Self(self.0.saturating_add(length.0))
            }

            /// True on a multiple of `alignment` (which is not 0).
            #[inline]
            pub const fn is_multiple_of(self, alignment: u64) -> bool {
                self.0 % alignment == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

byte_unit! {
    /// An offset in bytes on the virtual disk that the guest sees.
    GuestOffset
}
byte_unit! {
    /// An offset in bytes into a file (or block device) of the host.
    HostOffset
}
byte_unit! {
    /// A length in bytes.
    ByteLen
}

impl GuestOffset {
    /// The distance from `start` to here; 0 where `start` lies further on.
    #[inline]
    pub const fn since(self, start: GuestOffset) -> ByteLen {
        ByteLen(self.0.saturating_sub(start.0))
    }
}

impl HostOffset {
    /// The distance from `start` to here; 0 where `start` lies further on.
    #[inline]
    pub const fn since(self, start: HostOffset) -> ByteLen {
        ByteLen(self.0.saturating_sub(start.0))
    }
}

impl ByteLen {
    /// The shorter of the two.
    #[inline]
    pub fn min(self, other: ByteLen) -> ByteLen {
        ByteLen(self.0.min(other.0))
    }

    /// True for a length of nothing.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// Cut down to whole sectors, as the loop driver does with a file's size.
    #[inline]
    pub const fn floor_to_sector(self) -> ByteLen {
        ByteLen(self.0 / SECTOR_SIZE * SECTOR_SIZE)
    }
}

/// Sectors of 512 bytes: device-mapper's unit. Made only by a checked conversion.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Sectors(u64);

impl Sectors {
    /// Wraps a count of sectors.
    #[inline]
    pub const fn new(sectors: u64) -> Self {
        Self(sectors)
    }

    /// The count of sectors.
    #[inline]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Whole sectors of `bytes`; `None` where that is no multiple of 512.
    #[inline]
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes.is_multiple_of(SECTOR_SIZE) { Some(Self(bytes / SECTOR_SIZE)) } else { None }
    }

    /// Bytes; `None` past 2^64 - 1.
    #[inline]
    pub const fn to_bytes(self) -> Option<u64> {
        self.0.checked_mul(SECTOR_SIZE)
    }
}

impl fmt::Display for Sectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A half-open range of the virtual disk: `start` inclusive, `end` exclusive.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct GuestRange {
    /// First byte.
    pub start: GuestOffset,
    /// First byte past the range; never before `start`.
    pub end: GuestOffset,
}

impl GuestRange {
    /// The range from `start` up to `end`; empty where `end` lies before it.
    #[inline]
    pub fn new(start: GuestOffset, end: GuestOffset) -> Self {
        Self { start, end: end.max(start) }
    }

    /// Length in bytes.
    #[inline]
    pub const fn length(self) -> ByteLen {
        self.end.since(self.start)
    }

    /// True where the range holds no byte.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.start.0 >= self.end.0
    }

    /// The part that both ranges hold; empty where they do not meet.
    #[inline]
    pub fn intersection(self, other: GuestRange) -> GuestRange {
        GuestRange::new(self.start.max(other.start), self.end.min(other.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_come_only_from_multiples_of_512() {
        assert_eq!(Sectors::from_bytes(1024), Some(Sectors::new(2)));
        assert_eq!(Sectors::from_bytes(1023), None);
        assert_eq!(Sectors::new(u64::MAX).to_bytes(), None);
    }

    #[test]
    fn offsets_do_not_wrap() {
        let far = GuestOffset::new(u64::MAX);
        assert_eq!(far.checked_add(ByteLen::new(1)), None);
        assert_eq!(far.saturating_add(ByteLen::new(1)), far);
    }

    #[test]
    fn ranges_that_do_not_meet_have_an_empty_intersection() {
        let range = |start, end| GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        assert!(range(0, 4).intersection(range(8, 9)).is_empty());
        assert_eq!(range(0, 6).intersection(range(4, 9)), range(4, 6));
    }
}
