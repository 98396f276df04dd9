//! Where every piece of an image's metadata lies, and what nothing refers to.
//!
//! A damaged image is the normal case: only the first bytes have to make sense. What does not
//! is a [`Problem`], and the walk goes on. Nothing that a table says is believed before it is
//! seen to lie in the file.
//!
//! [`Metadata::pieces`] gives the pieces, [`Metadata::walk`] what every byte of the file is
//! used for, and [`Metadata::pieces_at`] what refers to one byte. Memory: 2 bits a cluster
//! that something refers to; parts of clusters, at most 64 MiB (96 while their list grows);
//! pieces in order, at most 40 MiB; and the names of snapshots and bitmaps, of which the file
//! can have 64 MiB each.

mod at;
mod clusters;
mod cow;
mod entries;
mod lenient;
mod problem;
mod qcow;
mod qcow2;
mod refcount;
mod sorted;
#[cfg(test)]
mod tests;
mod usage;
mod zeros;

use std::sync::Arc;

use crate::error::Result;
use crate::format::Format;
use crate::source::Source;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, HostOffset};

pub use at::PiecesAt;
pub use cow::CowMetadata;
pub use problem::{Problem, ProblemKind, Problems};
pub use qcow::QcowMetadata;
pub use qcow2::{BitmapEntryFound, BitmapPlace, CryptPlace, L1Table, Qcow2Metadata};
pub use usage::{Counts, RangeUse, UsedRange};
pub use zeros::first_non_zero;

use refcount::Refcounts;
use usage::{Joined, Ranges, Usage};

/// Whose L1 table it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Owner {
    /// The active layer.
    Active,
    /// The internal snapshot of that number, in the order of the snapshot table.
    Snapshot(u32),
}

/// What a piece of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// The header's fields.
    Header,
    /// A header extension of this type, padding included.
    HeaderExtension(u32),
    /// The backing file's name.
    BackingFileName,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock {
        /// The entry of the refcount table that names it.
        index: u64,
    },
    /// An L1 table.
    L1Table(Owner),
    /// An L2 table.
    L2Table {
        /// Whose L1 table names it.
        owner: Owner,
        /// By which entry.
        l1_index: u64,
    },
    /// The snapshot table.
    SnapshotTable,
    /// The bitmap directory.
    BitmapDirectory,
    /// The table of the bitmap of that number, in the order of the directory.
    BitmapTable {
        /// Which bitmap.
        bitmap: u32,
    },
    /// Bits of a bitmap.
    BitmapCluster {
        /// Which bitmap.
        bitmap: u32,
    },
    /// The LUKS header with its key material.
    CryptHeader,
    /// A cow image's bitmap of sectors.
    SectorBitmap,
    /// A cluster (qcow2, qcow) of the guest's bytes, plain or encrypted; of cow and raw, a
    /// run of sectors.
    Data {
        /// Whose L1 table leads to it.
        owner: Owner,
        /// The guest offset of its first byte.
        guest: GuestOffset,
    },
    /// A compressed stream.
    Compressed {
        /// Whose L1 table leads to it.
        owner: Owner,
        /// The guest offset of its cluster's first byte.
        guest: GuestOffset,
    },
}

impl PieceKind {
    /// A stable name for scripts and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::HeaderExtension(_) => "header-extension",
            Self::BackingFileName => "backing-file-name",
            Self::RefcountTable => "refcount-table",
            Self::RefcountBlock { .. } => "refcount-block",
            Self::L1Table(_) => "l1-table",
            Self::L2Table { .. } => "l2-table",
            Self::SnapshotTable => "snapshot-table",
            Self::BitmapDirectory => "bitmap-directory",
            Self::BitmapTable { .. } => "bitmap-table",
            Self::BitmapCluster { .. } => "bitmap",
            Self::CryptHeader => "crypt-header",
            Self::SectorBitmap => "sector-bitmap",
            Self::Data { .. } => "data",
            Self::Compressed { .. } => "compressed",
        }
    }
}

/// A piece of a file, and what it is. As its owner says: it may reach out of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// In which of the image's files.
    pub file: FileRole,
    /// Where it starts.
    pub offset: HostOffset,
    /// Its length in bytes.
    pub length: ByteLen,
    /// What it is.
    pub kind: PieceKind,
}

impl Piece {
    fn in_image(offset: HostOffset, length: u64, kind: PieceKind) -> Self {
        Self { file: FileRole::Image, offset, length: ByteLen::new(length), kind }
    }

    /// First byte past it.
    pub fn end(&self) -> HostOffset {
        self.offset.saturating_add(self.length)
    }

    /// True where it holds the byte at `offset`.
    pub fn contains(&self, offset: HostOffset) -> bool {
        self.offset <= offset && offset < self.end()
    }
}

/// What a walk comes upon.
pub type Found = std::result::Result<Piece, Problem>;

/// What of an image's metadata is not in tables, by format.
#[derive(Debug)]
pub enum Layout {
    /// qcow2, versions 2 and 3.
    Qcow2(Box<Qcow2Metadata>),
    /// qcow, version 1.
    Qcow(QcowMetadata),
    /// cow.
    Cow(CowMetadata),
    /// raw: all of the file is the guest's.
    Raw,
}

/// One file's metadata, ready to be walked. Its backing and data files are not opened.
#[derive(Debug)]
pub struct Metadata {
    source: Arc<Source>,
    layout: Layout,
}

impl Metadata {
    /// Reads what is not in tables.
    ///
    /// # Errors
    /// The file is not of that format, or of an unknown version, or its header is so
    /// damaged that nothing can be found by it (qcow2: no valid cluster size; qcow and
    /// cow: any broken field); its first bytes can't be read.
    pub fn read(source: Arc<Source>, format: Format) -> Result<Self> {
        let layout = match format {
            Format::Qcow2 => Qcow2Metadata::read(&source).map(|read| Layout::Qcow2(Box::new(read))),
            Format::Qcow => QcowMetadata::read(&source).map(Layout::Qcow),
            Format::Cow => CowMetadata::read(&source).map(Layout::Cow),
            Format::Raw => Ok(Layout::Raw),
        };
        let layout = layout.map_err(|error| error.at_path(source.path()))?;
        Ok(Self { source, layout })
    }

    /// The file.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// What is not in tables.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The metadata of a qcow2 image.
    pub fn qcow2(&self) -> Option<&Qcow2Metadata> {
        match &self.layout {
            Layout::Qcow2(qcow2) => Some(qcow2),
            _ => None,
        }
    }

    /// The pieces that are metadata, in no order; what is wrong with a piece comes right after
    /// it. An L2 table that several snapshots share comes once for each.
    pub fn pieces(&self) -> Box<dyn Iterator<Item = Found> + '_> {
        match &self.layout {
            Layout::Qcow2(qcow2) => Box::new(qcow2.pieces(&self.source)),
            Layout::Qcow(qcow) => Box::new(qcow.pieces(&self.source)),
            Layout::Cow(cow) => Box::new(cow.pieces().map(Ok)),
            Layout::Raw => Box::new(std::iter::empty()),
        }
    }

    /// As [`pieces`](Self::pieces), those that make sense, in the order of the file.
    pub fn sorted_pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        sorted::SortedPieces::new(self)
    }

    /// What an L2 table names: data and compressed streams. `owner` and `l1_index` are those
    /// of its [piece](PieceKind::L2Table).
    fn table_pieces(
        &self,
        owner: Owner,
        l1_index: u64,
        table: HostOffset,
    ) -> Box<dyn Iterator<Item = Found> + '_> {
        match &self.layout {
            Layout::Qcow2(qcow2) => {
                Box::new(qcow2.table_pieces(&self.source, owner, l1_index, table))
            }
            Layout::Qcow(qcow) => Box::new(qcow.table_pieces(&self.source, l1_index, table)),
            Layout::Cow(_) | Layout::Raw => Box::new(std::iter::empty()),
        }
    }

    /// Bytes of a cluster, the unit in which use is noted; `None` where ranges are found
    /// without.
    fn cluster_size(&self) -> Option<u64> {
        match &self.layout {
            Layout::Qcow2(qcow2) => Some(qcow2.cluster_size()),
            Layout::Qcow(qcow) => Some(qcow.unit()),
            Layout::Cow(_) | Layout::Raw => None,
        }
    }

    fn refcounts(&self) -> Option<Refcounts<'_>> {
        self.qcow2().map(|qcow2| Refcounts::new(&self.source, &qcow2.header))
    }

    /// What is wrong with what is not in tables.
    fn own_problems(&self) -> Problems {
        let mut problems = Problems::default();
        for problem in self.qcow2().iter().flat_map(|qcow2| &qcow2.problems) {
            problems.push(problem.clone());
        }
        problems
    }

    /// Walks all tables, each L2 table once.
    pub fn walk(&self) -> Walk<'_> {
        let mut problems = self.own_problems();
        let Some(cluster_size) = self.cluster_size() else {
            return Walk { metadata: self, usage: None, problems };
        };
        let mut usage = Usage::new(self.source.length().get(), cluster_size);
        for found in self.pieces() {
            let piece = match found {
                Ok(piece) => piece,
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            usage.mark(&piece);
            if let PieceKind::L2Table { owner, l1_index } = piece.kind
                && usage.walk_table(piece.offset)
            {
                for found in self.table_pieces(owner, l1_index, piece.offset) {
                    match found {
                        Ok(piece) => usage.mark(&piece),
                        Err(problem) => problems.push(problem),
                    }
                }
            }
        }
        usage.finish(&mut problems);
        Walk { metadata: self, usage: Some(usage), problems }
    }
}

/// What every byte of a file is used for.
#[derive(Debug)]
pub struct Walk<'m> {
    metadata: &'m Metadata,
    /// None of cow and raw.
    usage: Option<Usage>,
    problems: Problems,
}

impl Walk<'_> {
    /// How much of what was found; all 0 of cow and raw.
    pub fn counts(&self) -> Counts {
        self.usage.as_ref().map(|usage| usage.counts).unwrap_or_default()
    }

    /// What was wrong on the way.
    pub fn problems(&self) -> &Problems {
        &self.problems
    }

    /// All ranges of the file in order, from 0 to its end without a gap or an overlap;
    /// neighbours differ in use. Reads the refcounts; those that can't be read count as 0.
    pub fn ranges(&self) -> Box<dyn Iterator<Item = UsedRange> + '_> {
        let length = self.metadata.source.length().get();
        match (&self.usage, &self.metadata.layout) {
            (Some(usage), _) => Box::new(Joined::new(usage.ranges(self.metadata.refcounts()))),
            (None, Layout::Cow(cow)) => Box::new(Joined::new(cow.ranges(length))),
            (None, _) if length == 0 => Box::new(std::iter::empty()),
            (None, _) => Box::new(std::iter::once(UsedRange::new(0, length, RangeUse::Data))),
        }
    }

    /// What can't be read of the refcounts. Reads all of those of clusters that nothing
    /// refers to.
    pub fn refcount_problems(&self) -> Problems {
        let mut problems = Problems::default();
        if let Some(usage) = &self.usage {
            let mut ranges: Ranges<'_> = usage.ranges(self.metadata.refcounts());
            while ranges.next().is_some() {}
            for problem in ranges.problems() {
                problems.push(problem.clone());
            }
        }
        problems
    }
}
