//! What refers to one byte of a file.

use super::clusters::Clusters;
use super::usage::{RangeUse, UsedRange};
use super::{Layout, Metadata, Owner, Piece, PieceKind, Problems};
use crate::status::{FileRole, HostPlace};
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// References that are collected at most.
const MAX_REFERENCES: usize = 1 << 16;

/// What refers to one byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PiecesAt {
    /// The pieces that hold the byte: metadata first, then data and compressed streams, one
    /// for each guest cluster of each owner that reads it. In a data piece the byte lies
    /// as far from the guest offset as from the piece's start.
    pub pieces: Vec<Piece>,
    /// What the byte is where there is no piece: the unused, unreferenced or slack range
    /// around it, at most its cluster. `None` in an external data file, and past the end.
    pub unclaimed: Option<UsedRange>,
    /// There are more pieces than these, or more tables than imgdm keeps in memory.
    pub truncated: bool,
    /// What was wrong on the way: what refers to the byte there is not known.
    pub problems: Problems,
}

/// An L2 entry that leads to the byte.
struct Reference {
    table: HostOffset,
    /// Guest bytes from where the table's own start.
    distance: u64,
    piece: Piece,
}

impl Metadata {
    /// Everything that refers to the byte at `place`, of the image file or of its external data
    /// file. Walks all tables; none of it is kept.
    pub fn pieces_at(&self, place: HostPlace) -> PiecesAt {
        let mut found = PiecesAt {
            pieces: Vec::new(),
            unclaimed: None,
            truncated: false,
            problems: self.own_problems(),
        };
        let at = place.offset;
        let in_image = place.file == FileRole::Image;
        match &self.layout {
            Layout::Raw => {
                let length = self.source.length().get();
                let kind = PieceKind::Data { owner: Owner::Active, guest: GuestOffset::ZERO };
                if at.get() < length && in_image {
                    found.pieces.push(Piece::in_image(HostOffset::ZERO, length, kind));
                }
                return found;
            }
            Layout::Cow(cow) => {
                if in_image {
                    found.pieces.extend(cow.pieces().filter(|piece| piece.contains(at)));
                    found.pieces.extend(cow.data_at(at));
                    let whole = |range: &UsedRange| range.offset.saturating_add(range.length) > at;
                    let around = cow.ranges(self.source.length().get()).find(whole);
                    found.unclaimed = around.filter(|range| range.used.is_unclaimed());
                }
                return found;
            }
            Layout::Qcow2(_) | Layout::Qcow(_) => {}
        }
        let Some(size) = self.cluster_size() else { return found };
        let mut around = Around::new(at, size, self.source.length().get());
        let mut walked = Clusters::new(self.source.length().get().div_ceil(size));
        let mut references = Vec::new();
        for piece in self.pieces() {
            let piece = match piece {
                Ok(piece) => piece,
                Err(problem) => {
                    found.problems.push(problem);
                    continue;
                }
            };
            if in_image {
                around.take(&piece);
                if piece.contains(at) {
                    found.add(piece);
                }
            }
            let PieceKind::L2Table { owner, l1_index } = piece.kind else { continue };
            let table = piece.offset;
            // What lies where no table can be comes with a problem.
            if !table.is_multiple_of(size) || !walked.walk_table(table.get() / size) {
                continue;
            }
            let mut first_guest = None;
            for piece in self.table_pieces(owner, l1_index, table) {
                let piece = match piece {
                    Ok(piece) => piece,
                    Err(problem) => {
                        found.problems.push(problem);
                        continue;
                    }
                };
                if in_image && piece.file == FileRole::Image {
                    around.take(&piece);
                }
                let (PieceKind::Data { guest, .. } | PieceKind::Compressed { guest, .. }) =
                    piece.kind
                else {
                    continue;
                };
                if piece.file != place.file || !piece.contains(at) {
                    continue;
                }
                if references.len() == MAX_REFERENCES {
                    found.truncated = true;
                    break;
                }
                let start = *first_guest.get_or_insert_with(|| self.table_start(l1_index));
                let distance = guest.get().saturating_sub(start);
                references.push(Reference { table, distance, piece });
            }
        }
        found.truncated |= walked.is_exhausted();
        references.sort_by_key(|reference| reference.table);
        self.add_owners(&references, &mut found);
        if found.pieces.is_empty() && in_image {
            let not_examined = walked.is_exhausted();
            found.unclaimed = around.range(self, not_examined, &mut found.problems);
        }
        found
    }

    /// Guest offset of the first byte that the L2 table of an L1 entry describes.
    fn table_start(&self, l1_index: u64) -> u64 {
        let coverage = match &self.layout {
            Layout::Qcow2(qcow2) => qcow2.header.l2_coverage(),
            Layout::Qcow(qcow) => qcow.header.l2_span(),
            Layout::Cow(_) | Layout::Raw => 0,
        };
        l1_index.saturating_mul(coverage)
    }

    /// Goes through the L1 tables again: an L2 table may have many owners.
    fn add_owners(&self, references: &[Reference], found: &mut PiecesAt) {
        if references.is_empty() {
            return;
        }
        // Its problems are known from the first time.
        for table in self.pieces().filter_map(Result::ok) {
            let PieceKind::L2Table { owner, l1_index } = table.kind else { continue };
            let first = references.partition_point(|reference| reference.table < table.offset);
            let of_table =
                references[first..].iter().take_while(|reference| reference.table == table.offset);
            for reference in of_table {
                let start = GuestOffset::new(self.table_start(l1_index));
                let guest = start.saturating_add(ByteLen::new(reference.distance));
                let kind = match reference.piece.kind {
                    PieceKind::Compressed { .. } => PieceKind::Compressed { owner, guest },
                    _ => PieceKind::Data { owner, guest },
                };
                found.add(Piece { kind, ..reference.piece });
                if found.is_cut_off() {
                    return;
                }
            }
        }
    }
}

impl PiecesAt {
    /// True where there is no room for more, and there was more: nothing will be added.
    fn is_cut_off(&self) -> bool {
        self.truncated && self.pieces.len() >= MAX_REFERENCES
    }

    fn add(&mut self, piece: Piece) {
        if self.pieces.len() < MAX_REFERENCES {
            self.pieces.push(piece);
        } else {
            self.truncated = true;
        }
    }
}

/// What lies nearest to a byte in its cluster.
struct Around {
    at: u64,
    start: u64,
    end: u64,
    touched: bool,
    cluster: u64,
    in_file: bool,
}

impl Around {
    fn new(at: HostOffset, cluster_size: u64, file_length: u64) -> Self {
        let at = at.get();
        let start = at / cluster_size * cluster_size;
        let end = start.saturating_add(cluster_size).min(file_length);
        let cluster = at / cluster_size;
        Self { at, start, end, touched: false, cluster, in_file: at < file_length }
    }

    /// Narrows the range by a piece.
    fn take(&mut self, piece: &Piece) {
        let (start, end) = (piece.offset.get(), piece.end().get());
        if end > self.start && end <= self.at {
            self.start = end;
            self.touched = true;
        } else if start > self.at && start < self.end {
            self.end = start;
            self.touched = true;
        }
    }

    /// The range around the byte, to which nothing refers.
    fn range(
        &self,
        metadata: &Metadata,
        not_examined: bool,
        problems: &mut Problems,
    ) -> Option<UsedRange> {
        let used = match metadata.refcounts() {
            _ if !self.in_file => return None,
            _ if not_examined => RangeUse::NotExamined,
            _ if self.touched => RangeUse::Slack,
            None => RangeUse::Unreferenced,
            Some(mut refcounts) => {
                let (counted, _) = refcounts.run(self.cluster, self.cluster + 1);
                for problem in refcounts.problems().iter() {
                    problems.push(problem.clone());
                }
                if counted { RangeUse::Unreferenced } else { RangeUse::Unused }
            }
        };
        Some(UsedRange::new(self.start, self.end, used))
    }
}
