//! The image formats: what each says of a guest range.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::buffer::Buffer;
use crate::crypt::CryptHeader;
use crate::damage::DamageList;
use crate::error::{Error, ErrorKind, Result};
use crate::status::StatusRun;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

pub(crate) use plain::PlainClusters;
pub use plain::Stretches;
use trace::TraceStep;

pub mod cow;
mod plain;
pub mod qcow;
pub mod qcow2;
pub mod raw;
pub mod trace;

/// An image format, by the name `qemu-img -f` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The bytes of the disk themselves.
    Raw,
    /// qcow2, versions 2 and 3.
    Qcow2,
    /// qcow, version 1.
    Qcow,
    /// User-Mode Linux's and old QEMU's copy-on-write files.
    Cow,
}

/// Bytes at the start of a file that [`Format::probe`] wants to see.
pub const PROBE_LENGTH: usize = 512;

impl Format {
    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow",
            Self::Cow => "cow",
        }
    }

    /// The name of a format that imgdm does not read, where the first bytes of a file are
    /// of one. Taken as raw, its container would be served as the disk. (Not LUKS: there
    /// the bytes of the file are those of an encrypted disk.)
    pub fn foreign(start: &[u8]) -> Option<&'static str> {
        const MAGICS: [(usize, &[u8], &str); 11] = [
            (0, b"KDMV", "vmdk"),
            (0, b"COWD", "vmdk"),
            (0, b"# Disk DescriptorFile", "vmdk"),
            (0x40, b"\x7f\x10\xda\xbe", "vdi"),
            (0, b"vhdxfile", "vhdx"),
            (0, b"conectix", "vpc"),
            (0, b"QED\0", "qed"),
            (0, b"WithoutFreeSpace", "parallels"),
            (0, b"WithouFreSpacExt", "parallels"),
            (0, b"Bochs Virtual HD Image", "bochs"),
            (0x40, b"\xbe\xda\x10\x7f", "vdi"),
        ];
        let has = |at: usize, magic: &[u8]| start.get(at..at + magic.len()) == Some(magic);
        MAGICS.iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, name)| *name)
    }

    /// The format that the first bytes of a file announce; raw where none does.
    pub fn probe(start: &[u8]) -> Self {
        match start {
            [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 1, ..] => Self::Qcow,
            // As QEMU's qcow2_probe(): any version from 2 on, so that a later one is
            // refused as an unknown qcow2 and not taken for raw data.
            [b'Q', b'F', b'I', 0xfb, version @ ..]
                if version.len() >= 4 && version[..4] != [0, 0, 0, 0] =>
            {
                Self::Qcow2
            }
            _ if cow::probe(start) => Self::Cow,
            _ => Self::Raw,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            // QEMU may declare a backing file by the protocol driver under it; both
            // mean that the bytes of the file are the disk.
            "raw" | "file" | "host_device" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "qcow" => Ok(Self::Qcow),
            "cow" => Ok(Self::Cow),
            other => Err(Error::new(ErrorKind::Unsupported(format!(
                "the format '{}' is not one that imgdm reads (raw, qcow2, qcow, cow)",
                crate::error::printable(other)
            )))),
        }
    }
}

/// The backing file as the overlay names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingReference {
    /// The name as it is stored, bytes of a stranger's choosing.
    pub name: Vec<u8>,
    /// The declared format's name, where the overlay declares one.
    pub format: Option<String>,
    /// What the overlay remembers of the backing file (cow only).
    pub expected: Option<BackingIdentity>,
}

/// What a cow image recorded of its backing file when it was made.
///
/// User-Mode Linux refuses to go on where either is another. QEMU compares neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingIdentity {
    /// `st_mtime` in seconds since 1970, of which the header stores the low 32 bits: equal
    /// where `modified as u32` of the file's time is. Of a block device it is the node's.
    pub modified: u32,
    /// Size in bytes, exactly: `st_size` of a regular file, not rounded to sectors, or
    /// a block device's size. `None` where the header's size is not the backing file's
    /// but the image's own virtual size (QEMU's layouts).
    pub size: Option<ByteLen>,
}

impl BackingIdentity {
    /// True where `source` is as it was recorded.
    pub fn matches(&self, source: &crate::source::Source) -> bool {
        // The recorded time is cut to 32 bits, so the file's is cut too.
        let modified = source.modified().map(|seconds| (seconds & 0xffff_ffff).unsigned_abs());
        modified == Some(u64::from(self.modified))
            && self.size.is_none_or(|size| source.length() == size)
    }
}

/// Something about an image that does not stop it from being read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The qcow2 dirty bit is set: refcounts may be stale; they are not used to read.
    Dirty,
    /// The qcow2 corrupt bit is set, and the caller allowed that.
    Corrupt,
    /// Damage that spoils no guest range, in an image that was opened past damage: the
    /// error that it would have been.
    Damaged(String),
}

/// Bytes that are read of a disk at least, whatever is asked for.
pub(crate) const TABLE_PAGE: u64 = 4096;

/// Memory that status calls reuse, so that nothing is allocated for each call.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Bytes of the tables being read.
    pub(crate) table: Buffer,
    /// Where it is there, a status call lists damage here and goes on past it; else damage
    /// is its error.
    pub damage: Option<DamageList>,
    /// Clusters at the start of the range that are not among the runs, where the caller takes
    /// them from here.
    pub(crate) plain: PlainClusters,
}

/// One opened image of any format, without its backing file.
pub trait ImageFormat: Send + Sync + fmt::Debug {
    /// Which format it is.
    fn format(&self) -> Format;

    /// Size of the virtual disk, a multiple of 512 (as QEMU rounds it).
    fn virtual_size(&self) -> ByteLen;

    /// The shortest run that a status call can give, in bytes (a cluster, subcluster
    /// or sector); at least 512.
    fn granularity(&self) -> u64;

    /// Bytes of a cluster: what one compressed stream gives.
    fn cluster_size(&self) -> u64 {
        self.granularity()
    }

    /// How compressed clusters are compressed; `None` where the format has none.
    fn compression(&self) -> Option<qcow2::Compression> {
        None
    }

    /// The backing file, where there is one.
    fn backing(&self) -> Option<&BackingReference> {
        None
    }

    /// The name of the external data file as the image stores it: `None` where the
    /// image has no data file, `Some(None)` where it has one but does not name it.
    fn data_file(&self) -> Option<Option<PathBuf>> {
        None
    }

    /// Whether holes of the file below are asked for under data clusters, because the
    /// image looks preallocated (QEMU's qcow2_detect_metadata_preallocation()).
    fn looks_preallocated(&self) -> bool {
        false
    }

    /// The internal snapshot that this is, unless it is the active layer (qcow2 only).
    fn snapshot(&self) -> Option<&qcow2::Snapshot> {
        None
    }

    /// How many internal snapshots its header counts (qcow2 only).
    fn snapshot_count(&self) -> u32 {
        0
    }

    /// How the image is encrypted; `None` for one in the clear. Read when it is asked for:
    /// a map needs no more than to know that it is.
    ///
    /// # Errors
    /// The encryption's own header is missing, cut off or contradicts its specification.
    fn crypt_header(&self) -> Result<Option<CryptHeader>> {
        Ok(None)
    }

    /// What the user should know.
    fn notices(&self) -> Vec<Notice> {
        Vec::new()
    }

    /// Appends runs that cover `range` in order, without gap or overlap. `range` lies
    /// inside the virtual size. What `scratch` takes of its start as plain clusters is not
    /// among them.
    ///
    /// # Errors
    /// A table cannot be read, or an entry contradicts the specification; where `scratch`
    /// lists damage, that is none: the smallest range that it spoils is
    /// [`Damaged`](crate::status::BlockStatus::Damaged).
    fn status(
        &self,
        range: GuestRange,
        scratch: &mut Scratch,
        runs: &mut Vec<StatusRun>,
    ) -> Result<()>;

    /// From `from` on, the first offset of which it takes more than what is kept in memory
    /// to tell that the image has nothing there, or that it has: all before is
    /// [`Unallocated`](crate::status::BlockStatus::Unallocated). It may lie past the disk's
    /// end.
    fn unallocated_until(&self, from: GuestOffset) -> GuestOffset {
        from
    }

    /// How much of the disk a page (4 KiB) of the tables tells of: a range that is not asked
    /// about saves no read where it is shorter. It may be a guess.
    fn page_coverage(&self) -> u64 {
        self.granularity().saturating_mul(TABLE_PAGE / 8)
    }

    /// Calls `each` with where in the image file the tables start and end that
    /// [`status`](Self::status) reads of `range`, in guest order. Only a hint, of when best to
    /// read them: nothing of it is checked, and formats whose tables are small or in order tell
    /// none.
    fn tables(&self, range: GuestRange, each: &mut dyn FnMut(HostOffset, HostOffset)) {
        let _ = (range, each);
    }

    /// Appends the entries of the tables by which [`status`](Self::status) knows of the
    /// guest's byte at `guest`, which lies inside the virtual size: as far as they can be
    /// read. Raw images have none.
    fn trace(&self, guest: GuestOffset, steps: &mut Vec<TraceStep>) {
        let _ = (guest, steps);
    }
}

/// Reads a part of a table into `table` and hands out its bytes.
pub(crate) fn table_bytes<'s>(
    source: &crate::source::Source,
    offset: HostOffset,
    length: usize,
    what: &str,
    table: &'s mut Buffer,
) -> Result<&'s [u8]> {
    table.reserve(length);
    let bytes = &mut table[..length];
    source.read_exact(offset, bytes, what)?;
    Ok(bytes)
}

/// The `N` bytes at `at` of a header; the caller keeps them inside.
#[inline]
pub(crate) fn bytes_at<const N: usize>(header: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&header[at..at + N]);
    field
}

/// Entry `index` of a table of big-endian `u64`s; the caller keeps it inside.
#[inline]
pub(crate) fn be64(bytes: &[u8], index: usize) -> u64 {
    u64::from_be_bytes(bytes.as_chunks::<8>().0[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probing_tells_qcow_from_qcow2_by_the_version() {
        assert_eq!(Format::probe(b"QFI\xfb\0\0\0\x01"), Format::Qcow);
        assert_eq!(Format::probe(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(Format::probe(b"QFI\xfb\0\0\0\x09"), Format::Qcow2);
        assert_eq!(Format::probe(b"QFI\xfb"), Format::Raw);
        assert_eq!(Format::probe(b""), Format::Raw);
    }

    #[test]
    fn images_of_others_are_known_by_name() {
        assert_eq!(Format::foreign(b"KDMV\x01"), Some("vmdk"));
        let mut vdi = [0; 512];
        vdi[0x40..0x44].copy_from_slice(&0xbeda_107fu32.to_le_bytes());
        assert_eq!(Format::foreign(&vdi), Some("vdi"));
        assert_eq!(Format::foreign(b""), None);
        assert_eq!(Format::foreign(b"LUKS\xba\xbe"), None);
    }
}
