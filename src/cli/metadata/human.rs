//! The pieces of a file as a table, in the order of the file.

use std::io::{self, Write};

use imgdm::error::printable;
use imgdm::format::qcow2::extension_name;
use imgdm::metadata::{
    Layout, Metadata, Owner, Piece, PieceKind, Qcow2Metadata, RangeUse, UsedRange, Walk,
};
use imgdm::units::{ByteLen, HostOffset};

use super::{Content, problems};

/// Owners of one piece that are named; of more, the number is told.
const NAMED_OWNERS: usize = 3;

/// Prints all pieces with offset, size and what they are, then what is wrong.
pub(crate) fn print(out: &mut impl Write, metadata: &Metadata, walk: &Walk<'_>) -> io::Result<()> {
    row(out, "Offset", "Size", "What")?;
    let mut pieces = metadata.sorted_pieces().peekable();
    let others = walk.ranges().filter(|range| range.used != RangeUse::Metadata);
    for range in others {
        while let Some(piece) = pieces.next_if(|piece| piece.offset <= range.offset) {
            print_piece(out, metadata, piece, &mut pieces)?;
        }
        print_range(out, metadata, &range)?;
    }
    while let Some(piece) = pieces.next() {
        print_piece(out, metadata, piece, &mut pieces)?;
    }
    let problems = problems(walk);
    if !problems.is_empty() {
        writeln!(out, "\nProblems:")?;
    }
    for problem in problems.iter() {
        writeln!(out, "{:<18}{}: {problem}", problem.offset.to_string(), problem.kind.name())?;
    }
    if problems.omitted() > 0 {
        writeln!(out, "and {} more", problems.omitted())?;
    }
    Ok(())
}

fn row(
    out: &mut impl Write,
    offset: impl std::fmt::Display,
    size: impl std::fmt::Display,
    what: impl std::fmt::Display,
) -> io::Result<()> {
    // Formatted first: a Display of its own pays no heed to the width.
    let (offset, size) = (offset.to_string(), size.to_string());
    writeln!(out, "{offset:<18}{size:<14}{what}")
}

fn place(
    out: &mut impl Write,
    offset: HostOffset,
    length: ByteLen,
    what: impl std::fmt::Display,
) -> io::Result<()> {
    row(out, offset, length.get(), what)
}

/// Prints a piece, and in its line the owners of the same piece that follow.
fn print_piece(
    out: &mut impl Write,
    metadata: &Metadata,
    piece: Piece,
    rest: &mut std::iter::Peekable<impl Iterator<Item = Piece>>,
) -> io::Result<()> {
    let what = describe(metadata, piece.kind);
    let PieceKind::L2Table { owner, .. } = piece.kind else {
        return place(out, piece.offset, piece.length, what);
    };
    let mut owners = vec![owner_name(metadata.qcow2(), owner)];
    let mut more = 0u64;
    while let Some(same) = rest.next_if(|next| {
        next.offset == piece.offset && matches!(next.kind, PieceKind::L2Table { .. })
    }) {
        match same.kind {
            PieceKind::L2Table { owner, .. } if owners.len() < NAMED_OWNERS => {
                owners.push(owner_name(metadata.qcow2(), owner));
            }
            _ => more += 1,
        }
    }
    let mut owners = owners.join(", ");
    if more > 0 {
        owners.push_str(&format!(" and {more} more"));
    }
    place(out, piece.offset, piece.length, format_args!("{what} of {owners}"))
}

/// Prints a range that is no metadata.
fn print_range(out: &mut impl Write, metadata: &Metadata, range: &UsedRange) -> io::Result<()> {
    let used = range.used.name();
    if !range.used.is_unclaimed() {
        return place(out, range.offset, range.length, used);
    }
    let content = Content::of(metadata, range);
    let what = match (content.all_zeros, content.first_non_zero) {
        (None, _) => format!("{used}, unreadable"),
        (_, Some(first)) => format!("{used}, not zero from {first:#x} on"),
        _ => format!("{used}, zeros"),
    };
    place(out, range.offset, range.length, what)
}

fn owner_name(qcow2: Option<&Qcow2Metadata>, owner: Owner) -> String {
    match (owner, qcow2) {
        (Owner::Snapshot(_), Some(qcow2)) => {
            format!("snapshot '{}'", printable(qcow2.owner_name(owner)))
        }
        _ => "the active layer".to_owned(),
    }
}

/// A piece in words, without the owner of an L2 table.
fn describe(metadata: &Metadata, kind: PieceKind) -> String {
    let qcow2 = metadata.qcow2();
    let bitmap = |index: u32| {
        let bitmap = qcow2.and_then(|qcow2| qcow2.bitmaps.get(usize::try_from(index).ok()?));
        bitmap.map_or_else(String::new, |bitmap| format!(" '{}'", printable(&bitmap.name)))
    };
    match kind {
        PieceKind::Header => match metadata.layout() {
            Layout::Cow(cow) => format!("header ({})", cow.header().layout()),
            _ => "header".to_owned(),
        },
        PieceKind::HeaderExtension(kind) => match extension_name(kind) {
            Some(name) => format!("header extension {name}"),
            None => format!("header extension {kind:#010x}"),
        },
        PieceKind::BackingFileName => "backing file name".to_owned(),
        PieceKind::RefcountTable => "refcount table".to_owned(),
        PieceKind::RefcountBlock { index } => format!("refcount block {index}"),
        PieceKind::L1Table(owner) => format!("L1 table of {}", owner_name(qcow2, owner)),
        PieceKind::L2Table { l1_index, .. } => format!("L2 table {l1_index}"),
        PieceKind::SnapshotTable => "snapshot table".to_owned(),
        PieceKind::BitmapDirectory => "bitmap directory".to_owned(),
        PieceKind::BitmapTable { bitmap: index } => format!("table of bitmap{}", bitmap(index)),
        PieceKind::BitmapCluster { bitmap: index } => format!("bits of bitmap{}", bitmap(index)),
        PieceKind::CryptHeader => "LUKS header and key material".to_owned(),
        PieceKind::SectorBitmap => "bitmap of sectors".to_owned(),
        PieceKind::Data { .. } => "data".to_owned(),
        PieceKind::Compressed { .. } => "compressed data".to_owned(),
    }
}
