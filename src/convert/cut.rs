//! Cutting what is copied to what the output can tell apart.
//!
//! An input's pieces start and end where they like; an output tells bytes, zeros and what is
//! left to its backing file apart in granules. Where pieces meet inside of a granule, it is
//! read and looked at as a whole.

use std::iter::Peekable;

use super::{Content, InputPlace, Piece};
use crate::error::Result;
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Pieces are joined up to this length.
const JOINED: u64 = 1 << 30;

/// A part of the disk in whole granules (but for the disk's end), all of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) range: GuestRange,
    pub(super) kind: CutKind,
}

/// What a [`Cut`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutKind {
    /// Zeros, which may hide what the backing file has.
    Zeros,
    /// Bytes, from this place on where they lie in a file as they are.
    Bytes(Option<InputPlace>),
    /// A granule that holds some of several, not all of it left to the backing file.
    Mixed,
    /// Nothing: it is left to the backing file. Told all the same, so that who asks for the
    /// next cut never waits long.
    Backing,
}

/// Cuts pieces.
pub(super) struct Cutter<I: Iterator> {
    pieces: Peekable<I>,
    /// What is left of the piece that was taken last; starts with a granule.
    rest: Option<Piece>,
    granularity: u64,
    /// Where the disk ends.
    end: GuestOffset,
}

impl<I: Iterator<Item = Result<Piece>>> Cutter<I> {
    /// Cuts to granules of that many bytes, a power of two.
    pub(super) fn new(pieces: I, granularity: u64, size: ByteLen) -> Self {
        let end = GuestOffset::new(size.get());
        Self { pieces: pieces.peekable(), rest: None, granularity, end }
    }

    /// The next piece, with those joined that carry it on.
    fn piece(&mut self) -> Option<Result<Piece>> {
        if let Some(rest) = self.rest.take() {
            return Some(Ok(rest));
        }
        let mut piece = match self.pieces.next()? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error)),
        };
        while piece.range.length().get() < JOINED
            && let Some(Ok(next)) = self.pieces.peek()
            && carries_on(&piece, next)
        {
            piece.range.end = next.range.end;
            self.pieces.next();
        }
        Some(Ok(piece))
    }

    /// The end of the granule that a byte is in.
    fn granule_end(&self, at: GuestOffset) -> GuestOffset {
        let next = (at.get() / self.granularity).saturating_add(1).saturating_mul(self.granularity);
        GuestOffset::new(next).min(self.end)
    }

    /// The whole granules at the start of a piece: where they end.
    fn whole_granules(&self, range: GuestRange) -> GuestOffset {
        if range.end >= self.end {
            return self.end;
        }
        let whole = GuestOffset::new(range.end.get() / self.granularity * self.granularity);
        whole.max(range.start)
    }

    /// The granule that `first` starts and does not fill: with the pieces that do.
    fn granule(&mut self, first: Piece) -> Result<Cut> {
        let range = GuestRange::new(first.range.start, self.granule_end(first.range.start));
        let mut kind = kind_of(first.content);
        let mut at = first.range.end;
        while at < range.end {
            let Some(piece) = self.piece() else { break };
            let piece = piece?;
            if kind != kind_of(piece.content) {
                kind = CutKind::Mixed;
            }
            at = piece.range.end;
            if at > range.end {
                self.rest = Some(without_start(piece, range.end));
            }
        }
        Ok(Cut { range, kind })
    }
}

impl<I: Iterator<Item = Result<Piece>>> Iterator for Cutter<I> {
    type Item = Result<Cut>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = match self.piece()? {
            Ok(piece) => piece,
            Err(error) => return Some(Err(error)),
        };
        let whole = self.whole_granules(piece.range);
        if whole == piece.range.start {
            return Some(self.granule(piece));
        }
        if whole < piece.range.end {
            self.rest = Some(without_start(piece, whole));
        }
        let kind = match piece.content {
            Content::Backing => CutKind::Backing,
            Content::Zeros => CutKind::Zeros,
            Content::Bytes { place } => CutKind::Bytes(place),
        };
        Some(Ok(Cut { range: GuestRange::new(piece.range.start, whole), kind }))
    }
}

/// What a granule of that content alone is. Which bytes does not matter.
fn kind_of(content: Content) -> CutKind {
    match content {
        Content::Backing => CutKind::Backing,
        Content::Zeros => CutKind::Zeros,
        Content::Bytes { .. } => CutKind::Bytes(None),
    }
}

/// A piece from `start` on, which lies inside of it.
fn without_start(piece: Piece, start: GuestOffset) -> Piece {
    let content = match piece.content {
        Content::Bytes { place: Some(place) } => {
            Content::Bytes { place: Some(place.advanced(start.since(piece.range.start))) }
        }
        other => other,
    };
    Piece { range: GuestRange::new(start, piece.range.end), content }
}

fn carries_on(piece: &Piece, next: &Piece) -> bool {
    match (piece.content, next.content) {
        (Content::Bytes { place: Some(a) }, Content::Bytes { place: Some(b) }) => {
            a.advanced(piece.range.length()) == b
        }
        (a, b) => a == b,
    }
}

#[cfg(test)]
mod tests;
