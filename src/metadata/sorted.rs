//! Pieces in the order of the file, in bounded memory.

use std::collections::BinaryHeap;

use super::{Metadata, Piece};
use crate::units::HostOffset;

/// Pieces that are kept at a time, about 40 MiB of them; where there are more, the tables are
/// read again for the next lot.
const LOT: usize = 1 << 19;

/// A piece with its place in the order: by offset, then as it is found.
#[derive(Debug)]
struct Placed {
    key: (HostOffset, u64),
    piece: Piece,
}

impl PartialEq for Placed {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for Placed {}

impl PartialOrd for Placed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Placed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

/// See [`Metadata::sorted_pieces`].
#[derive(Debug)]
pub(super) struct SortedPieces<'m> {
    metadata: &'m Metadata,
    lot: std::vec::IntoIter<Placed>,
    lot_size: usize,
    last: Option<(HostOffset, u64)>,
    done: bool,
}

impl<'m> SortedPieces<'m> {
    pub(super) fn new(metadata: &'m Metadata) -> Self {
        Self::with_lots_of(metadata, LOT)
    }

    pub(super) fn with_lots_of(metadata: &'m Metadata, lot_size: usize) -> Self {
        Self { metadata, lot: Vec::new().into_iter(), lot_size, last: None, done: false }
    }

    /// Collects the pieces after the last one, as many as a lot takes.
    fn next_lot(&mut self) {
        let mut heap = BinaryHeap::new();
        let found = self.metadata.pieces().filter_map(std::result::Result::ok);
        for (piece, ordinal) in found.zip(0u64..) {
            let placed = Placed { key: (piece.offset, ordinal), piece };
            if self.last.is_some_and(|last| placed.key <= last) {
                continue;
            }
            if heap.len() < self.lot_size {
                heap.push(placed);
            } else if let Some(mut greatest) = heap.peek_mut()
                && placed < *greatest
            {
                *greatest = placed;
            }
        }
        self.done = heap.len() < self.lot_size;
        self.lot = heap.into_sorted_vec().into_iter();
    }
}

impl Iterator for SortedPieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some(placed) = self.lot.next() {
                self.last = Some(placed.key);
                return Some(placed.piece);
            }
            if self.done {
                return None;
            }
            self.next_lot();
        }
    }
}
