//! Walking the tables of a qcow2 image.

use super::{BitmapEntryFound, BitmapPlace, L1Table, Qcow2Metadata};
use crate::format::qcow2::TableLocation;
use crate::format::qcow2::bitmap::BitmapTableEntry;
use crate::format::qcow2::entry::{L2Entry, L2Format, l2_table_offset};
use crate::metadata::entries::Entries;
use crate::metadata::problem::{Problem, ProblemKind};
use crate::metadata::{Found, Owner, Piece, PieceKind};
use crate::source::Source;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// Bits 9 to 63 of a refcount table entry.
const REFCOUNT_BLOCK_MASK: u64 = !0x1ff;

impl Qcow2Metadata {
    /// Bytes of a cluster.
    pub(in crate::metadata) fn cluster_size(&self) -> u64 {
        self.header.cluster_size()
    }

    /// The L2 tables that an L1 table names, from entry `first` on; none of one that
    /// [overlaps](L1Table::overlaps) another.
    pub fn l2_tables<'s>(
        &self,
        source: &'s Source,
        l1: &L1Table,
        first: u64,
    ) -> impl Iterator<Item = Found> + use<'s> {
        let cluster_size = self.cluster_size();
        let file_end = source.length().get();
        let owner = l1.owner;
        let skipped = first.saturating_mul(8).min(l1.table.length.get());
        let table = TableLocation {
            offset: l1.table.offset.saturating_add(ByteLen::new(skipped)),
            length: ByteLen::new(if l1.overlaps { 0 } else { l1.table.length.get() - skipped }),
        };
        Entries::non_zero(source, table, "the L1 table").flat_map(move |entry| {
            let entry = match entry {
                Ok(entry) => entry,
                Err(problem) => return [Some(Err(problem)), None].into_iter().flatten(),
            };
            let Some(offset) = l2_table_offset(entry.value) else {
                return [None, None].into_iter().flatten();
            };
            let l1_index = first + entry.index;
            let piece =
                Piece::in_image(offset, cluster_size, PieceKind::L2Table { owner, l1_index });
            let fault = fault_of(&piece, cluster_size, file_end);
            let problem = fault.map(|kind| {
                Err(Problem::of_entry(kind, entry.offset, "the L1 entry", offset.get()))
            });
            [Some(Ok(piece)), problem].into_iter().flatten()
        })
    }

    /// The refcount blocks that the refcount table names.
    pub fn refcount_blocks<'s>(&self, source: &'s Source) -> impl Iterator<Item = Found> + use<'s> {
        let cluster_size = self.cluster_size();
        let file_end = source.length().get();
        let table = self.header.refcount_table;
        Entries::non_zero(source, table, "the refcount table").flat_map(move |entry| {
            let entry = match entry {
                Ok(entry) => entry,
                Err(problem) => return [Some(Err(problem)), None].into_iter().flatten(),
            };
            let offset = HostOffset::new(entry.value & REFCOUNT_BLOCK_MASK);
            if offset == HostOffset::ZERO {
                return [None, None].into_iter().flatten();
            }
            let kind = PieceKind::RefcountBlock { index: entry.index };
            let piece = Piece::in_image(offset, cluster_size, kind);
            let what = "the refcount table entry";
            let problem = fault_of(&piece, cluster_size, file_end)
                .map(|kind| Err(Problem::of_entry(kind, entry.offset, what, offset.get())));
            [Some(Ok(piece)), problem].into_iter().flatten()
        })
    }

    /// What a bitmap's table says, entry by entry.
    pub fn bitmap_entries<'s>(
        &self,
        source: &'s Source,
        bitmap: &BitmapPlace,
    ) -> impl Iterator<Item = BitmapEntryFound> + use<'s> {
        let cluster_size = self.cluster_size();
        Entries::non_zero(source, bitmap.table, "the bitmap table").with_zeros().map(move |entry| {
            let entry = entry?;
            BitmapTableEntry::decode(entry.value, cluster_size).ok_or_else(|| {
                let kind = ProblemKind::InvalidField;
                Problem::of_entry(kind, entry.offset, "the bitmap table entry", entry.value)
            })
        })
    }

    /// All pieces but those that an L2 table names, in no order.
    pub(in crate::metadata) fn pieces<'s>(
        &'s self,
        source: &'s Source,
    ) -> impl Iterator<Item = Found> + 's {
        let cluster_size = self.cluster_size();
        let file_end = source.length().get();
        let l1_tables = self.l1_tables.iter().flat_map(move |l1| {
            let table = table_piece(l1.table, PieceKind::L1Table(l1.owner));
            std::iter::once(Ok(table)).chain(self.l2_tables(source, l1, 0))
        });
        let bitmaps = self.bitmaps.iter().zip(0u32..).flat_map(move |(place, bitmap)| {
            let table = table_piece(place.table, PieceKind::BitmapTable { bitmap });
            let clusters =
                self.bitmap_entries(source, place).filter_map(move |entry| match entry {
                    Ok(BitmapTableEntry::Serialized(offset)) => {
                        let kind = PieceKind::BitmapCluster { bitmap };
                        Some(Ok(Piece::in_image(offset, cluster_size, kind)))
                    }
                    Ok(_) => None,
                    Err(problem) => Some(Err(problem)),
                });
            let checked = clusters.flat_map(move |found| {
                let outside = found.as_ref().ok().filter(|piece| piece.end().get() > file_end);
                let problem = outside.map(|piece| {
                    let kind = ProblemKind::OutsideFile;
                    let (at, target) = (place.table.offset, piece.offset.get());
                    Err(Problem::of_entry(kind, at, "the bitmap table", target))
                });
                std::iter::once(found).chain(problem)
            });
            std::iter::once(Ok(table)).chain(checked)
        });
        self.fixed_pieces()
            .into_iter()
            .map(Ok)
            .chain(self.refcount_blocks(source))
            .chain(l1_tables)
            .chain(bitmaps)
            .filter(|found| found.as_ref().map_or(true, |piece| !piece.length.is_zero()))
    }

    /// The pieces that no table names.
    fn fixed_pieces(&self) -> Vec<Piece> {
        let header = &self.header;
        let mut pieces =
            vec![Piece::in_image(HostOffset::ZERO, header.header_length.into(), PieceKind::Header)];
        // The padding after an extension is its own.
        let area_end = header.extensions_end();
        pieces.extend(self.extensions.places.iter().map(|place| {
            let room = area_end.saturating_sub(place.offset.get());
            let length = place.length.get().next_multiple_of(8).min(room);
            Piece::in_image(place.offset, length, PieceKind::HeaderExtension(place.kind))
        }));
        let tables = [
            (header.backing_name, PieceKind::BackingFileName),
            (self.crypt.as_ref().map(|crypt| crypt.location), PieceKind::CryptHeader),
            (self.snapshot_table, PieceKind::SnapshotTable),
            (self.bitmap_directory, PieceKind::BitmapDirectory),
            (Some(header.refcount_table), PieceKind::RefcountTable),
        ];
        pieces.extend(tables.into_iter().filter_map(|(t, kind)| Some(table_piece(t?, kind))));
        pieces
    }

    /// What the L2 table at `table` names, which `owner`'s L1 entry `l1_index` names.
    pub(in crate::metadata) fn table_pieces<'s>(
        &self,
        source: &'s Source,
        owner: Owner,
        l1_index: u64,
        table: HostOffset,
    ) -> impl Iterator<Item = Found> + use<'s> {
        let header = &self.header;
        let cluster_size = header.cluster_size();
        let cluster_bits = header.cluster_bits;
        let format = L2Format::of(header);
        let file_end = source.length().get();
        let data_file = header.has_data_file();
        let start = l1_index.saturating_mul(header.l2_coverage());
        let place = TableLocation { offset: table, length: ByteLen::new(cluster_size) };
        Entries::non_zero(source, place, "an L2 table")
            .with_stride(header.l2_entry_size())
            .flat_map(move |entry| {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(problem) => return [Some(Err(problem)), None].into_iter().flatten(),
                };
                let distance = ByteLen::new(entry.index << cluster_bits);
                let guest = GuestOffset::new(start).saturating_add(distance);
                let piece = match format.decode(entry.value) {
                    L2Entry::Unallocated | L2Entry::ZeroPlain => {
                        return [None, None].into_iter().flatten();
                    }
                    L2Entry::Standard(host) | L2Entry::ZeroAllocated(host) => Piece {
                        file: if data_file { FileRole::DataFile } else { FileRole::Image },
                        ..Piece::in_image(host, cluster_size, PieceKind::Data { owner, guest })
                    },
                    L2Entry::Compressed { host, stream_length } => Piece::in_image(
                        host,
                        stream_length.get(),
                        PieceKind::Compressed { owner, guest },
                    ),
                };
                // With a data file it is that file's length, which is not looked at here.
                let file_end = if data_file { u64::MAX } else { file_end };
                let fault = match piece.kind {
                    // A stream's length is known to 512 bytes only, and a file may well end
                    // inside its last data cluster.
                    PieceKind::Compressed { .. } if piece.offset.get() < file_end => None,
                    PieceKind::Compressed { .. } => Some(ProblemKind::OutsideFile),
                    _ if !piece.offset.is_multiple_of(cluster_size) => Some(ProblemKind::Unaligned),
                    _ if piece.offset.get() >= file_end => Some(ProblemKind::OutsideFile),
                    _ => None,
                };
                let problem = fault.map(|kind| {
                    Err(Problem::of_entry(kind, entry.offset, "the L2 entry", piece.offset.get()))
                });
                [Some(Ok(piece)), problem].into_iter().flatten()
            })
    }
}

fn table_piece(table: TableLocation, kind: PieceKind) -> Piece {
    Piece::in_image(table.offset, table.length.get(), kind)
}

/// What is wrong with where a table lies.
fn fault_of(table: &Piece, cluster_size: u64, file_end: u64) -> Option<ProblemKind> {
    if !table.offset.is_multiple_of(cluster_size) {
        return Some(ProblemKind::Unaligned);
    }
    (table.end().get() > file_end).then_some(ProblemKind::OutsideFile)
}
