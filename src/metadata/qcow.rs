//! The pieces of a qcow version 1 image.

use super::entries::Entries;
use super::problem::{Problem, ProblemKind};
use super::{Found, Owner, Piece, PieceKind};
use crate::error::Result;
use crate::format::qcow::{OFLAG_COMPRESSED, QcowHeader};
use crate::format::qcow2::TableLocation;
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, HostOffset, SECTOR_SIZE};

/// What of a qcow image's metadata is not in tables.
#[derive(Debug)]
pub struct QcowMetadata {
    /// The header.
    pub header: QcowHeader,
}

impl QcowMetadata {
    pub(super) fn read(source: &Source) -> Result<Self> {
        let mut start = [0; QcowHeader::LENGTH];
        let n = source.read_up_to(HostOffset::ZERO, &mut start)?;
        Ok(Self { header: QcowHeader::parse(&start[..n])? })
    }

    /// The L1 table.
    pub fn l1_table(&self) -> TableLocation {
        TableLocation {
            offset: self.header.l1_table_offset(),
            length: ByteLen::new(self.header.l1_entries() * 8),
        }
    }

    /// Where the backing file's name lies, where there is one.
    pub fn backing_name(&self) -> Option<TableLocation> {
        let length = ByteLen::new(self.header.backing_file_size().into());
        let offset = self.header.backing_file_offset();
        (offset != HostOffset::ZERO && !length.is_zero())
            .then_some(TableLocation { offset, length })
    }

    /// The backing file's name, up to a NUL; `None` where there is none, or it can't be read.
    pub fn read_backing_name(&self, source: &Source) -> Option<Vec<u8>> {
        let place = self.backing_name()?;
        let mut name = vec![0; usize::try_from(place.length.get()).ok()?];
        source.read_exact(place.offset, &mut name, "the backing file's name").ok()?;
        name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
        Some(name)
    }

    /// Bytes of an L2 table.
    fn l2_length(&self) -> u64 {
        self.header.l2_entries() * 8
    }

    /// L2 tables and clusters start on multiples of this.
    pub(super) fn unit(&self) -> u64 {
        self.header.cluster_size().min(self.l2_length()).max(SECTOR_SIZE)
    }

    /// The L2 tables that the L1 table names.
    pub fn l2_tables<'s>(&self, source: &'s Source) -> impl Iterator<Item = Found> + use<'s> {
        let length = self.l2_length();
        let unit = self.unit();
        let file_end = source.length().get();
        Entries::non_zero(source, self.l1_table(), "the L1 table").flat_map(move |entry| {
            let entry = match entry {
                Ok(entry) => entry,
                Err(problem) => return [Some(Err(problem)), None].into_iter().flatten(),
            };
            let kind = PieceKind::L2Table { owner: Owner::Active, l1_index: entry.index };
            let piece = Piece::in_image(HostOffset::new(entry.value), length, kind);
            let fault = if piece.end().get() > file_end {
                Some(ProblemKind::OutsideFile)
            } else {
                (!piece.offset.is_multiple_of(unit)).then_some(ProblemKind::Unaligned)
            };
            let problem = fault.map(|kind| {
                Err(Problem::of_entry(kind, entry.offset, "the L1 entry", entry.value))
            });
            [Some(Ok(piece)), problem].into_iter().flatten()
        })
    }

    /// All pieces but those that an L2 table names, in no order.
    pub(super) fn pieces<'s>(&self, source: &'s Source) -> impl Iterator<Item = Found> + use<'s> {
        let piece = |table: TableLocation, kind| {
            Ok(Piece::in_image(table.offset, table.length.get(), kind))
        };
        let header =
            Piece::in_image(HostOffset::ZERO, QcowHeader::LENGTH as u64, PieceKind::Header);
        let name = self.backing_name().map(|name| piece(name, PieceKind::BackingFileName));
        std::iter::once(Ok(header))
            .chain(name)
            .chain([piece(self.l1_table(), PieceKind::L1Table(Owner::Active))])
            .chain(self.l2_tables(source))
    }

    /// What an L2 table names.
    pub(super) fn table_pieces<'s>(
        &self,
        source: &'s Source,
        l1_index: u64,
        table: HostOffset,
    ) -> impl Iterator<Item = Found> + use<'s> {
        let header = self.header.clone();
        let cluster_size = header.cluster_size();
        let file_end = source.length().get();
        let start = l1_index.saturating_mul(header.l2_span());
        let place = TableLocation { offset: table, length: ByteLen::new(self.l2_length()) };
        Entries::non_zero(source, place, "an L2 table").flat_map(move |entry| {
            let entry = match entry {
                Ok(entry) => entry,
                Err(problem) => return [Some(Err(problem)), None].into_iter().flatten(),
            };
            let distance = ByteLen::new(entry.index * cluster_size);
            let guest = GuestOffset::new(start).saturating_add(distance);
            let owner = Owner::Active;
            let piece = if entry.value & OFLAG_COMPRESSED != 0 {
                let (host, length) = header.stream(entry.value);
                Piece::in_image(host, length.get(), PieceKind::Compressed { owner, guest })
            } else {
                let kind = PieceKind::Data { owner, guest };
                Piece::in_image(HostOffset::new(entry.value), cluster_size, kind)
            };
            let problem = (piece.offset.get() >= file_end).then(|| {
                let (kind, target) = (ProblemKind::OutsideFile, piece.offset.get());
                Err(Problem::of_entry(kind, entry.offset, "the L2 entry", target))
            });
            [Some(Ok(piece)), problem].into_iter().flatten()
        })
    }
}
