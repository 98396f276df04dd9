//! What stands in the way of attaching an image.

use std::path::{Path, PathBuf};

use crate::error::printable;
use crate::units::GuestOffset;

/// Why an image can't be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ObstacleKind {
    /// Compressed clusters, which `--compressed=refuse` does not inflate.
    Compressed,
    /// The scratch file has no room, or there is no place for it.
    NoScratch,
    /// An encrypted layer whose key slots are all erased.
    NoKeySlot,
    /// A guest range that does not start on a sector of the virtual disk.
    Unaligned,
    /// Clusters that lie wholly past the end of their file.
    PastFileEnd,
    /// Metadata that contradicts the format or can't be read.
    Damaged,
    /// A virtual disk of no bytes.
    Empty,
    /// A backing file without a declared format.
    UndeclaredBackingFormat,
    /// A file that somebody has open for writing.
    InUse,
    /// A qcow2 image that is marked corrupt.
    Corrupt,
    /// A backing file that is not the one that its cow overlay recorded.
    ChangedBacking,
    /// The tables take more kernel memory than they may.
    KernelMemory,
}

impl ObstacleKind {
    /// A stable name for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compressed => "compressed",
            Self::NoScratch => "no-scratch",
            Self::NoKeySlot => "no-key-slot",
            Self::Unaligned => "unaligned",
            Self::PastFileEnd => "past-end-of-file",
            Self::Damaged => "damaged",
            Self::Empty => "empty",
            Self::UndeclaredBackingFormat => "undeclared-backing-format",
            Self::InUse => "in-use",
            Self::Corrupt => "corrupt",
            Self::ChangedBacking => "changed-backing-file",
            Self::KernelMemory => "kernel-memory",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Compressed => "compressed clusters (--compressed=scratch inflates them)",
            Self::NoScratch => "no room for the scratch file",
            Self::NoKeySlot => "encrypted, and no key opens it: all its key slots are erased",
            Self::Unaligned => "ranges that do not start on a sector of the disk",
            Self::PastFileEnd => {
                "clusters past the end of the file (is it truncated? --on-error=zero reads zeros there)"
            }
            Self::Damaged => "damaged metadata ('imgdm map' lists what it spoils)",
            Self::Empty => "a virtual disk of 0 bytes",
            Self::UndeclaredBackingFormat => "a backing file without a declared format",
            Self::InUse => "a program that may write to the file",
            Self::Corrupt => "marked corrupt (--allow-corrupt reads it as it is)",
            Self::ChangedBacking => {
                "changed since its cow overlay was made (--allow-changed-backing)"
            }
            Self::KernelMemory => "too many segments",
        }
    }
}

/// One kind of obstacle in one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// What kind.
    pub kind: ObstacleKind,
    /// In which file.
    pub path: PathBuf,
    /// How many clusters (subclusters, sectors) are concerned; 1 where it is the file.
    pub count: u64,
    /// The first guest offset concerned; none where it is the whole file.
    pub first: Option<GuestOffset>,
    /// More about it, in words.
    pub detail: Option<String>,
}

impl Obstacle {
    /// One that concerns a file as a whole.
    pub fn of_file(kind: ObstacleKind, path: &Path) -> Self {
        Self { kind, path: path.to_owned(), count: 1, first: None, detail: None }
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let path = printable(&self.path.to_string_lossy());
        write!(f, "{path}: {}", self.kind.describe())?;
        if let Some(first) = self.first {
            write!(f, ": {}, the first at guest offset {first}", self.count)?;
        }
        if let Some(detail) = &self.detail {
            write!(f, ": {}", printable(detail))?;
        }
        Ok(())
    }
}
