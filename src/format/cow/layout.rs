//! The header of a cow image, in each of the six layouts that were ever written.
//!
//! User-Mode Linux's are those of its arch/um/drivers/cow_user.c; QEMU's is the C
//! structure of its block/cow.c as the compiler laid it out, up to QEMU 2.2.

use std::fmt;

use crate::error::{Error, ErrorKind, Result, printable};
use crate::format::bytes_at;
use crate::format::qcow2::TableLocation;
use crate::units::{ByteLen, HostOffset, SECTOR_SIZE};

/// `COW_MAGIC` as a big-endian number.
pub(super) const MAGIC: [u8; 4] = *b"OOOM";
/// `COW_MAGIC` as little-endian User-Mode Linux wrote it in version 1.
pub(super) const MAGIC_SWAPPED: [u8; 4] = *b"MOOO";

/// Which of the layouts a cow image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CowLayout {
    /// User-Mode Linux version 1, written by a little-endian host.
    UmlV1LittleEndian,
    /// User-Mode Linux version 1, written by a big-endian host.
    UmlV1BigEndian,
    /// User-Mode Linux version 2.
    UmlV2,
    /// User-Mode Linux version 3: what `uml_mkcow` and the kernel write today.
    UmlV3,
    /// User-Mode Linux version 3 as 64-bit hosts wrote it before 2006, four bytes apart
    /// (the kernel's `cow_header_v3_broken`).
    UmlV3Misaligned,
    /// QEMU's version 2, where `uint64_t` is aligned to 8 bytes.
    QemuOn64Bit,
    /// QEMU's version 2, where `uint64_t` is aligned to 4 bytes (32-bit x86).
    QemuOn32Bit,
}

impl CowLayout {
    /// True for the layouts of User-Mode Linux.
    pub fn is_uml(self) -> bool {
        !matches!(self, Self::QemuOn64Bit | Self::QemuOn32Bit)
    }

    fn places(self) -> &'static Places {
        match self {
            Self::UmlV1LittleEndian | Self::UmlV1BigEndian => &UML_V1,
            Self::UmlV2 => &UML_V2,
            Self::UmlV3 => &UML_V3,
            Self::UmlV3Misaligned => &UML_V3_MISALIGNED,
            Self::QemuOn64Bit => &QEMU_64,
            Self::QemuOn32Bit => &QEMU_32,
        }
    }
}

impl fmt::Display for CowLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UmlV1LittleEndian => "User-Mode Linux version 1, little-endian",
            Self::UmlV1BigEndian => "User-Mode Linux version 1, big-endian",
            Self::UmlV2 => "User-Mode Linux version 2",
            Self::UmlV3 => "User-Mode Linux version 3",
            Self::UmlV3Misaligned => "User-Mode Linux version 3, misaligned",
            Self::QemuOn64Bit => "QEMU version 2 of a 64-bit host",
            Self::QemuOn32Bit => "QEMU version 2 of a 32-bit host",
        })
    }
}

/// Where the fields of a layout are: bytes from the start of the file.
struct Places {
    /// `backing_file`: the name, ended by a NUL, and the room for it.
    name: (usize, usize),
    /// `mtime`, 4 bytes.
    modified: usize,
    /// `size`, 8 bytes.
    size: usize,
    /// `sectorsize`, 4 bytes.
    sector_size: usize,
    /// `alignment` and `cow_format`, 4 bytes each; version 3 only.
    alignment: Option<usize>,
    /// Length of the header.
    end: usize,
}

const UML_V1: Places = Places {
    name: (8, 256),
    modified: 264,
    size: 268,
    sector_size: 276,
    alignment: None,
    end: 280,
};
const UML_V2: Places = Places {
    name: (8, 4096),
    modified: 4104,
    size: 4108,
    sector_size: 4116,
    alignment: None,
    end: 4120,
};
const UML_V3: Places = Places {
    name: (32, 4096),
    modified: 8,
    size: 12,
    sector_size: 20,
    alignment: Some(24),
    end: 4128,
};
const UML_V3_MISALIGNED: Places = Places {
    name: (36, 4096),
    // Eight bytes, of which the writer filled the first four.
    modified: 8,
    size: 16,
    sector_size: 24,
    alignment: Some(28),
    // The structure ends at 4132 and is padded to a multiple of 8.
    end: 4136,
};
const QEMU_64: Places = Places {
    name: (8, 1024),
    modified: 1032,
    size: 1040,
    sector_size: 1048,
    alignment: None,
    end: 1056,
};
const QEMU_32: Places = Places {
    name: (8, 1024),
    modified: 1032,
    size: 1036,
    sector_size: 1044,
    alignment: None,
    end: 1048,
};

/// The header of a cow image. Its numbers are consistent: the bitmap lies in the file,
/// and no sector's data would be past 2^63.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CowHeader {
    layout: CowLayout,
    backing_file: Vec<u8>,
    mtime: u32,
    size: u64,
    bitmap_offset: u64,
    bitmap_length: u64,
    data_offset: u64,
}

impl CowHeader {
    /// Length in bytes of the longest of the headers.
    pub const MAX_LENGTH: usize = UML_V3_MISALIGNED.end;

    /// Reads a header from the first bytes of an image, [`Self::MAX_LENGTH`] of them
    /// where the file has so many. `file_length` is the length of the whole file.
    ///
    /// Version 2 is User-Mode Linux's or QEMU's, and nothing in the file says whose:
    /// it is the one whose fields are sane.
    ///
    /// # Errors
    /// Another magic, a header that is cut short, a name with no end, a size past 2^63,
    /// a bitmap that is not in the file; a version 2 that fits none of its layouts, or
    /// more than one (all `InvalidImage`). Another version, a sector size other than
    /// 512, or another `cow_format` than the bitmap (`Unsupported`).
    pub fn parse(start: &[u8], file_length: ByteLen) -> Result<Self> {
        let [Some(magic), Some(version)] = [start.get(..4), start.get(4..8)] else {
            return Err(Error::invalid("the file is too short for a cow header").at_offset(0));
        };
        let (magic, version) = (bytes_at::<4>(magic, 0), bytes_at::<4>(version, 0));
        let read = |layout| Self::read(layout, start, file_length);
        match (magic, u32::from_be_bytes(version)) {
            // Only version 1 was ever written in the host's own byte order.
            (MAGIC_SWAPPED, _) if u32::from_le_bytes(version) == 1 => {
                read(CowLayout::UmlV1LittleEndian)
            }
            (MAGIC, 1) => read(CowLayout::UmlV1BigEndian),
            (MAGIC, 2) => Self::read_version_2(start, file_length),
            // The kernel's own rule: no name starts with four NULs, but where each field
            // is four bytes further on, `cow_format` is there, which is 0.
            (MAGIC, 3) if start.get(32..36) == Some(&[0; 4]) => read(CowLayout::UmlV3Misaligned),
            (MAGIC, 3) => read(CowLayout::UmlV3),
            (MAGIC, version) => Err(unknown_version(version)),
            (MAGIC_SWAPPED, _) => Err(unknown_version(u32::from_le_bytes(version))),
            _ => Err(Error::invalid(format!(
                "magic {:#010x} is not cow's 0x4f4f4f4d",
                u32::from_be_bytes(magic)
            ))
            .at_offset(0)),
        }
    }

    fn read_version_2(start: &[u8], file_length: ByteLen) -> Result<Self> {
        let layouts = [CowLayout::UmlV2, CowLayout::QemuOn64Bit, CowLayout::QemuOn32Bit];
        let mut fitting = Vec::new();
        let mut reasons = Vec::new();
        for layout in layouts {
            let header = Self::read(layout, start, file_length).and_then(|header| {
                if header.size < SECTOR_SIZE {
                    let message = format!("a size of {} bytes is less than a sector", header.size);
                    return Err(Error::invalid(message));
                }
                Ok(header)
            });
            match header {
                Ok(header) => fitting.push(header),
                Err(error) => reasons.push(format!("{layout}: {}", error.kind())),
            }
        }
        match (fitting.pop(), fitting.is_empty()) {
            (Some(header), true) => Ok(header),
            (Some(last), false) => {
                fitting.push(last);
                let names: Vec<_> =
                    fitting.iter().map(|header| header.layout.to_string()).collect();
                Err(Error::invalid(format!(
                    "the version 2 cow header can be read as {}: which is right cannot be told",
                    names.join(" and as ")
                ))
                .at_offset(4))
            }
            (None, _) => Err(Error::invalid(format!(
                "the version 2 cow header fits no known layout ({})",
                reasons.join("; ")
            ))
            .at_offset(4)),
        }
    }

    fn read(layout: CowLayout, start: &[u8], file_length: ByteLen) -> Result<Self> {
        let places = layout.places();
        if start.len() < places.end {
            return Err(Error::invalid(format!(
                "the cow header takes {} bytes, and the file ends after {}",
                places.end,
                start.len()
            ))
            .at_offset(0));
        }
        let swapped = layout == CowLayout::UmlV1LittleEndian;
        let u32_at = |at| {
            let bytes = bytes_at(start, at);
            if swapped { u32::from_le_bytes(bytes) } else { u32::from_be_bytes(bytes) }
        };
        let u64_at = |at| {
            let bytes = bytes_at(start, at);
            if swapped { u64::from_le_bytes(bytes) } else { u64::from_be_bytes(bytes) }
        };

        let sector_size = u32_at(places.sector_size);
        if u64::from(sector_size) != SECTOR_SIZE {
            // The kernel takes the bitmap for one of 512-byte sectors whatever this
            // field says, uml_moo believes the field; nothing ever wrote another value.
            let message = format!("a sector size of {sector_size} bytes is not 512");
            return Err(
                Error::new(ErrorKind::Unsupported(message)).at_offset(places.sector_size as u64)
            );
        }
        let alignment = match places.alignment {
            None => SECTOR_SIZE,
            Some(at) => {
                let cow_format = u32_at(at + 4);
                if cow_format != 0 {
                    let message = format!("cow_format {cow_format} is not 0, the bitmap");
                    return Err(
                        Error::new(ErrorKind::Unsupported(message)).at_offset(at as u64 + 4)
                    );
                }
                match u32_at(at) {
                    0 => return Err(Error::invalid("the alignment is 0").at_offset(at as u64)),
                    alignment => u64::from(alignment),
                }
            }
        };
        let (name_at, room) = places.name;
        let name = &start[name_at..name_at + room];
        let Some(name_end) = name.iter().position(|&byte| byte == 0) else {
            let shown = printable(&String::from_utf8_lossy(&name[..32]));
            return Err(Error::invalid(format!(
                "the backing file's name '{shown}...' has no end in its {room} bytes"
            ))
            .at_offset(name_at as u64));
        };

        let size = u64_at(places.size);
        let too_large = || {
            Error::invalid(format!("a size of {size:#x} bytes is too large"))
                .at_offset(places.size as u64)
        };
        if i64::try_from(size).is_err() {
            return Err(too_large());
        }
        // No sum below can overflow: size is less than 2^63, alignment less than 2^32.
        let sectors = size.div_ceil(SECTOR_SIZE);
        let end = places.end as u64;
        let (bitmap_offset, bitmap_length) = match layout {
            // Rounded down, "the rounding bug" that version 3 put right: up to seven
            // sectors at the end have no bit.
            CowLayout::UmlV1LittleEndian | CowLayout::UmlV1BigEndian | CowLayout::UmlV2 => {
                (end, sectors / 8)
            }
            CowLayout::UmlV3 | CowLayout::UmlV3Misaligned => {
                (end.next_multiple_of(alignment), sectors.div_ceil(8))
            }
            CowLayout::QemuOn64Bit | CowLayout::QemuOn32Bit => {
                (end, (size / SECTOR_SIZE).div_ceil(8))
            }
        };
        let bitmap_end = bitmap_offset + bitmap_length;
        if bitmap_end > file_length.get() {
            return Err(Error::invalid(format!(
                "the bitmap ({bitmap_length} bytes) of a size of {size:#x} bytes lies outside the file, which is {} bytes long: the image is truncated or corrupt",
                file_length.get()
            ))
            .at_offset(bitmap_offset));
        }
        let data_offset = bitmap_end.next_multiple_of(alignment);
        if i64::try_from(data_offset + sectors * SECTOR_SIZE).is_err() {
            return Err(too_large());
        }
        Ok(Self {
            layout,
            backing_file: name[..name_end].to_vec(),
            mtime: u32_at(places.modified),
            size,
            bitmap_offset,
            bitmap_length,
            data_offset,
        })
    }

    /// Which layout it is.
    pub fn layout(&self) -> CowLayout {
        self.layout
    }

    /// `backing_file`: the backing file's name; empty for none.
    pub fn backing_file(&self) -> &[u8] {
        &self.backing_file
    }

    /// Length of the header in bytes, the room for the backing file's name included.
    pub fn length(&self) -> ByteLen {
        ByteLen::new(self.layout.places().end as u64)
    }

    /// The room for the backing file's name. What follows the NUL in it means nothing.
    pub fn backing_name_field(&self) -> TableLocation {
        let (offset, room) = self.layout.places().name;
        TableLocation { offset: HostOffset::new(offset as u64), length: ByteLen::new(room as u64) }
    }

    /// `mtime`: the backing file's time of modification, in seconds since 1970, cut to
    /// 32 bits. QEMU wrote 0 where it could not tell.
    pub fn mtime(&self) -> u32 {
        self.mtime
    }

    /// `size` in bytes, less than 2^63. User-Mode Linux's is the backing file's, to the
    /// byte; QEMU's is the virtual disk's, and the backing file may have another.
    pub fn size(&self) -> ByteLen {
        ByteLen::new(self.size)
    }

    /// The virtual disk's size in bytes, a multiple of 512. User-Mode Linux rounds `size`
    /// up (`ROUND_BLOCK` in its ubd driver; the bytes past the backing file's end read
    /// as zero), QEMU leaves the part of a last sector off.
    pub fn virtual_size(&self) -> ByteLen {
        if self.layout.is_uml() {
            ByteLen::new(self.size.next_multiple_of(SECTOR_SIZE))
        } else {
            self.size().floor_to_sector()
        }
    }

    /// Where the bitmap is: a bit a sector of 512 bytes, least significant bit first,
    /// set where the sector is in this file.
    pub fn bitmap_offset(&self) -> HostOffset {
        HostOffset::new(self.bitmap_offset)
    }

    /// Length of the bitmap in bytes. Sectors past it (at most seven, in versions 1 and 2
    /// of User-Mode Linux, which round it down) are the backing file's: the kernel
    /// reads no bit for them.
    pub fn bitmap_length(&self) -> ByteLen {
        ByteLen::new(self.bitmap_length)
    }

    /// Where the data of sector 0 is; that of sector i is 512 i bytes further on.
    pub fn data_offset(&self) -> HostOffset {
        HostOffset::new(self.data_offset)
    }
}

fn unknown_version(version: u32) -> Error {
    let message = format!("cow version {version} is not one that imgdm reads (1, 2, 3)");
    Error::new(ErrorKind::Unsupported(message)).at_offset(4)
}
