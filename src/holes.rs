//! Which parts of a file's range are data, and which read as zero.

use crate::source::{Allocation, Source};
use crate::units::{ByteLen, HostOffset};

/// Bytes of a run to be reckoned with where holes are asked for, in sizing the windows in
/// which a chain is walked. Holes come in blocks of the host's file system, but a file of
/// nothing else is rare, and small windows would be slow on a large file of few pieces.
pub const GRANULARITY: u64 = 64 << 10;

/// What the host's file system says of a piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Data, or nothing known.
    Data,
    /// A hole (SEEK_DATA skips it).
    Hole,
    /// An unwritten extent (FIEMAP), asked for only where the source has a probe.
    Unwritten,
    /// Past the end of the file.
    PastEnd,
}

/// Calls `each` with the pieces of `length` bytes from `start` on, in order, without
/// gap: their distance from `start`, their length and what they are.
pub fn for_each_piece(
    source: &Source,
    start: HostOffset,
    length: ByteLen,
    each: &mut dyn FnMut(ByteLen, ByteLen, Piece),
) {
    let end = start.saturating_add(length);
    let file_end = HostOffset::new(source.length().get());
    let mut emit = |from: HostOffset, to: HostOffset, piece| {
        if from < to {
            each(from.since(start), to.since(from), piece);
        }
    };
    let mut at = start;
    while at < end {
        if at >= file_end {
            emit(at, end, Piece::PastEnd);
            return;
        }
        let stop = end.min(file_end);
        match source.allocation(at) {
            Allocation::Hole { until } => {
                let until = until.unwrap_or(file_end).min(stop);
                emit(at, until, Piece::Hole);
                at = until;
            }
            Allocation::Data { until } => {
                let until = until.min(stop);
                for (from, to) in source.unwritten(at, until) {
                    let (from, to) = (from.max(at), to.min(until));
                    if from < to {
                        emit(at, from, Piece::Data);
                        emit(from, to, Piece::Unwritten);
                        at = to;
                    }
                }
                emit(at, until, Piece::Data);
                at = until;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    fn pieces(source: &Source, start: u64, length: u64) -> Vec<(u64, u64, Piece)> {
        let mut out = Vec::new();
        for_each_piece(source, HostOffset::new(start), ByteLen::new(length), &mut |at, n, p| {
            out.push((at.get(), n.get(), p));
        });
        out
    }

    #[test]
    fn pieces_cover_the_range_without_gap() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((1 << 20) + 100).unwrap();
        file.seek(SeekFrom::Start(64 << 10)).unwrap();
        file.write_all(&[7; 64 << 10]).unwrap();
        let source = Source::open(file.path()).unwrap();
        assert_eq!(
            pieces(&source, 0, 2 << 20),
            [
                (0, 64 << 10, Piece::Hole),
                (64 << 10, 64 << 10, Piece::Data),
                (128 << 10, (1 << 20) + 100 - (128 << 10), Piece::Hole),
                ((1 << 20) + 100, (1 << 20) - 100, Piece::PastEnd),
            ]
        );
        assert_eq!(pieces(&source, (64 << 10) + 5, 10), [(0, 10, Piece::Data)]);
        assert_eq!(pieces(&source, 0, 0), []);
    }

    #[derive(Debug)]
    struct Fixed(Vec<(u64, u64)>);

    impl crate::source::UnwrittenProbe for Fixed {
        fn unwritten(
            &self,
            _: &std::fs::File,
            _: HostOffset,
            _: HostOffset,
        ) -> std::io::Result<Vec<(HostOffset, HostOffset)>> {
            Ok(self.0.iter().map(|&(a, b)| (HostOffset::new(a), HostOffset::new(b))).collect())
        }

        fn nobody_writes(&self, _: &std::fs::File) -> bool {
            true
        }
    }

    #[test]
    fn unwritten_extents_split_data_and_are_clipped_to_it() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 64 << 10]).unwrap();
        let mut source = Source::open(file.path()).unwrap();
        source.set_unwritten_probe(std::sync::Arc::new(Fixed(vec![(0, 4096), (8192, 1 << 30)])));
        assert_eq!(
            pieces(&source, 1024, 16384),
            [
                (0, 3072, Piece::Unwritten),
                (3072, 4096, Piece::Data),
                (7168, 9216, Piece::Unwritten)
            ]
        );
    }
}
