//! Partition tables on a virtual disk: which parts of it are partitions.
//!
//! What a partition is decides libblkid (util-linux: libblkid/src/partitions): the same
//! tables are known, numbered the same, and one that libblkid passes over is passed over
//! here. Tables are a stranger's: reads are bounded by named limits, whatever they claim.

mod bsd;
mod dos;
mod foreign;
mod gpt;
mod noting;
#[cfg(test)]
mod tests;
mod type_name;

use std::fmt;

use crate::error::Result;
use crate::units::{ByteLen, GuestOffset, GuestRange, SECTOR_SIZE};
use crate::worker::apart;

pub(crate) use dos::is_fat;
pub use noting::Noting;

/// Most partitions of a disk that are listed: those of a GPT of the usual size, and the
/// logical ones that the kernel would show.
pub const MAX_PARTITIONS: usize = 256;

/// A disk that is looked at for partitions.
pub trait Disk: Send {
    /// Its size in bytes.
    fn size(&self) -> ByteLen;

    /// Fills `buffer` from `offset` on; all of it lies inside of the disk.
    ///
    /// # Errors
    /// The bytes can't be had.
    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()>;
}

/// The kinds of partition tables, by libblkid's names (`PTTYPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// Master boot record, with logical partitions in extended ones.
    Dos,
    /// BSD disklabel of no special system.
    Bsd,
    /// BSD disklabel in a FreeBSD partition.
    FreeBsd,
    /// BSD disklabel in a NetBSD partition.
    NetBsd,
    /// BSD disklabel in an OpenBSD partition.
    OpenBsd,
    /// Solaris slices in a partition of a master boot record.
    Solaris,
    /// UnixWare slices in a partition of a master boot record.
    UnixWare,
    /// Minix subpartitions.
    Minix,
    /// Sun disklabel.
    Sun,
    /// SGI volume header.
    Sgi,
    /// Apple partition map.
    Mac,
    /// Ultrix disklabel.
    Ultrix,
    /// AIX: known, but its logical volumes are no partitions.
    Aix,
}

impl TableKind {
    /// libblkid's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt => "gpt",
            Self::Dos => "dos",
            Self::Bsd => "bsd",
            Self::FreeBsd => "freebsd",
            Self::NetBsd => "netbsd",
            Self::OpenBsd => "openbsd",
            Self::Solaris => "solaris",
            Self::UnixWare => "unixware",
            Self::Minix => "minix",
            Self::Sun => "sun",
            Self::Sgi => "sgi",
            Self::Mac => "mac",
            Self::Ultrix => "ultrix",
            Self::Aix => "aix",
        }
    }
}

impl fmt::Display for TableKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a partition is for, as its table says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionType {
    /// A number; its meaning depends on the table.
    Number(u32),
    /// A GUID, in the usual notation (GPT).
    Guid(String),
    /// A name (Apple).
    Name(String),
}

impl fmt::Display for PartitionType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "{number:#x}"),
            Self::Guid(text) | Self::Name(text) => f.write_str(text),
        }
    }
}

/// Why a partition is listed, but can't be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// It has no sector.
    Empty,
    /// It reaches past the end of the disk.
    OutOfDisk,
    /// It shares sectors with the partition of this number, which comes first.
    Overlaps(u32),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("it has no sector"),
            Self::OutOfDisk => f.write_str("it reaches past the end of the disk"),
            Self::Overlaps(other) => write!(f, "it overlaps partition {other}"),
        }
    }
}

/// One partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as the kernel, libblkid and kpartx count.
    pub number: u32,
    /// The table that it is of.
    pub table: TableKind,
    /// Where it lies; both ends are multiples of 512.
    pub range: GuestRange,
    /// What it is for, where the table says it.
    pub kind: Option<PartitionType>,
    /// Its UUID: of GPT its own, of a master boot record the disk's ID and the number.
    pub uuid: Option<String>,
    /// Its name, of a stranger's choosing (GPT, Apple).
    pub name: Option<String>,
    /// The table's flags: attributes of GPT, 0x80 for an active one of a master boot record.
    pub flags: u64,
    /// An extended partition: nothing but the container of logical ones.
    pub is_extended: bool,
    /// The number of the extended or outer partition that it lies in.
    pub inside: Option<u32>,
    /// Why it can't be attached.
    pub unusable: Option<Unusable>,
}

/// What is not as it should be with a table that can be read all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableWarning {
    /// The primary GPT is damaged: the backup at the end of the disk was read.
    BackupGptUsed,
    /// The backup GPT is damaged or missing, as after the disk was enlarged.
    NoBackupGpt,
    /// What starts here can't be read, and is taken for missing.
    Unreadable(GuestOffset),
    /// There are more partitions than are listed.
    TooManyPartitions,
    /// A partition entry points out of where partitions can be; it is passed over, as
    /// libblkid does.
    EntryIgnored(u32),
    /// The chain of an extended partition's boot records breaks off: logical partitions may
    /// be missing.
    ChainCut {
        /// The extended partition's number.
        extended: u32,
        /// The sector of 512 bytes of the record that is not followed.
        sector: u64,
        /// Why.
        fault: ChainFault,
    },
}

/// Why a boot record of an extended partition is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// What the link says is there reaches past the end of the extended partition.
    OutOfExtended,
    /// The chain has been there before.
    Loop,
    /// Too many records before it have no partition.
    TooLong,
    /// There is no boot record, or it can't be read.
    NoRecord,
}

impl fmt::Display for ChainFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutOfExtended => "it reaches out of the extended partition",
            Self::Loop => "the chain leads back to it",
            Self::TooLong => "too many before it have no partition",
            Self::NoRecord => "there is none that can be read",
        })
    }
}

impl fmt::Display for TableWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BackupGptUsed => {
                f.write_str("the primary GPT is damaged; its backup at the end of the disk is used")
            }
            Self::NoBackupGpt => f.write_str("the GPT has no good backup at the end of the disk"),
            Self::Unreadable(at) => write!(
                f,
                "the disk can't be read at {at}: what the partition table has there is missing"
            ),
            Self::TooManyPartitions => {
                write!(f, "only the first {MAX_PARTITIONS} partitions are listed")
            }
            Self::EntryIgnored(number) => {
                write!(f, "partition entry {number} points out of the usable space; it is ignored")
            }
            Self::ChainCut { extended, sector, fault } => write!(
                f,
                "logical partitions in partition {extended} may be missing: the boot record at sector {sector} is not followed: {fault}"
            ),
        }
    }
}

/// A disk's partition table, with those nested in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    /// The outermost table's kind.
    pub kind: TableKind,
    /// Bytes of the sectors that it counts in: 512 or 4096 (GPT); of other tables 512.
    pub sector_size: u64,
    /// Its UUID (GPT) or disk ID (master boot record), as libblkid's `PTUUID`.
    pub uuid: Option<String>,
    /// Its partitions by number.
    pub partitions: Vec<Partition>,
    /// What is not as it should be.
    pub warnings: Vec<TableWarning>,
}

impl PartitionTable {
    fn new(kind: TableKind) -> Self {
        Self {
            kind,
            sector_size: SECTOR_SIZE,
            uuid: None,
            partitions: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Adds a partition of `length` sectors, unless there are too many; false where that is
    /// so.
    fn push(&mut self, entry: Entry) -> bool {
        if self.partitions.len() == MAX_PARTITIONS {
            if !self.warnings.contains(&TableWarning::TooManyPartitions) {
                self.warnings.push(TableWarning::TooManyPartitions);
            }
            return false;
        }
        self.partitions.push(Partition {
            number: entry.number,
            table: entry.table,
            range: entry.range(),
            kind: entry.kind,
            uuid: None,
            name: None,
            flags: entry.flags,
            is_extended: false,
            inside: None,
            unusable: None,
        });
        true
    }

    /// The first warning of what can't be read.
    pub fn unreadable(&self) -> Option<&TableWarning> {
        self.warnings.iter().find(|warning| matches!(warning, TableWarning::Unreadable(_)))
    }

    /// The number after the last one that was given out.
    fn next_number(&self) -> u32 {
        self.partitions.last().map_or(1, |last| last.number.saturating_add(1))
    }

    /// Says which partitions can't be attached. Of two that overlap the first in number
    /// stays; what lies in an extended or outer partition does not overlap that.
    fn judge(&mut self, disk_size: ByteLen) {
        let end = GuestOffset::new(disk_size.floor_to_sector().get());
        for index in 0..self.partitions.len() {
            let (before, rest) = self.partitions.split_at_mut(index);
            let Some(this) = rest.first_mut() else { return };
            let overlapped = before.iter().find(|other| {
                other.unusable.is_none()
                    && this.inside != Some(other.number)
                    && other.inside != Some(this.number)
                    && !other.range.intersection(this.range).is_empty()
            });
            this.unusable = if this.range.is_empty() {
                Some(Unusable::Empty)
            } else if this.range.end > end {
                Some(Unusable::OutOfDisk)
            } else {
                overlapped.map(|other| Unusable::Overlaps(other.number))
            };
        }
    }
}

/// A partition as most tables describe one: sectors of 512 bytes.
struct Entry {
    number: u32,
    table: TableKind,
    start: u64,
    length: u64,
    kind: Option<PartitionType>,
    flags: u64,
}

impl Entry {
    fn range(&self) -> GuestRange {
        let bytes = |sectors: u64| GuestOffset::new(sectors.saturating_mul(SECTOR_SIZE));
        GuestRange::new(bytes(self.start), bytes(self.start.saturating_add(self.length)))
    }
}

/// Reads the partition table of a disk; `None` where there is none.
///
/// # Errors
/// What reading the disk says, where no table is found without what can't be read; else that
/// is a warning. A damaged table is none, or one with warnings.
pub fn read(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    apart(|| read_first(disk))
}

fn read_first(disk: &mut dyn Disk) -> Result<Option<PartitionTable>> {
    // A foreign magic at the start of the disk goes before a master boot record's two
    // bytes, as in libblkid.
    type Reader = fn(&mut dyn Disk) -> Result<Option<PartitionTable>>;
    const READERS: [Reader; 6] =
        [foreign::aix_sgi_sun, dos::read, gpt::read, foreign::mac, foreign::ultrix, bsd::read];
    let mut disk = Noting::new(disk);
    for reader in READERS {
        if let Some(mut table) = reader(&mut disk)? {
            table.judge(disk.size());
            table.warnings.extend(disk.take().into_iter().map(TableWarning::Unreadable));
            return Ok(Some(table));
        }
    }
    disk.into_error().map_or(Ok(None), Err)
}

/// The sector of 512 bytes at this sector number; `None` where that can't be read, or past the
/// end of the disk.
fn sector(disk: &mut dyn Disk, number: u64) -> Result<Option<[u8; 512]>> {
    let mut bytes = [0; 512];
    Ok(read_at(disk, number.saturating_mul(SECTOR_SIZE), &mut bytes)?.then_some(bytes))
}

/// Fills `buffer` from byte `offset` on; false where that can't be read, which [`Noting`] keeps,
/// or reaches past the end of the disk.
fn read_at(disk: &mut dyn Disk, offset: u64, buffer: &mut [u8]) -> Result<bool> {
    let inside =
        offset.checked_add(buffer.len() as u64).is_some_and(|end| end <= disk.size().get());
    if !inside {
        return Ok(false);
    }
    match disk.read(GuestOffset::new(offset), buffer) {
        Err(error) if error.is_interruption() => Err(error),
        read => Ok(read.is_ok()),
    }
}

/// The little-endian 16 bits at `at`; the caller keeps it inside.
pub(crate) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(crate::format::bytes_at(bytes, at))
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(crate::format::bytes_at(bytes, at))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(crate::format::bytes_at(bytes, at))
}

pub(crate) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(crate::format::bytes_at(bytes, at))
}

pub(crate) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(crate::format::bytes_at(bytes, at))
}
