//! The pieces of a cow image.

use std::sync::Arc;

use super::usage::{RangeUse, UsedRange};
use super::{Piece, PieceKind};
use crate::error::Result;
use crate::format::cow::{CowHeader, CowImage};
use crate::format::qcow2::TableLocation;
use crate::format::{ImageFormat, Scratch};
use crate::source::Source;
use crate::status::BlockStatus;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Guest bytes whose bits are looked at at a time: 64 KiB of bitmap.
const WINDOW: u64 = 64 * 1024 * 8 * 512;

/// What of a cow image's metadata is not in its bitmap.
#[derive(Debug)]
pub struct CowMetadata {
    image: CowImage,
}

impl CowMetadata {
    pub(super) fn read(source: &Arc<Source>) -> Result<Self> {
        Ok(Self { image: CowImage::open_past_damage(Arc::clone(source))? })
    }

    /// The header.
    pub fn header(&self) -> &CowHeader {
        self.image.header()
    }

    /// The bitmap.
    pub fn bitmap(&self) -> TableLocation {
        let header = self.header();
        TableLocation { offset: header.bitmap_offset(), length: header.bitmap_length() }
    }

    /// The backing file's name with the NUL that ends it.
    pub fn backing_name(&self) -> TableLocation {
        let header = self.header();
        let length = ByteLen::new(header.backing_file().len() as u64 + 1);
        TableLocation { offset: header.backing_name_field().offset, length }
    }

    /// Header, name and bitmap, in the order of the file. The header is that of the layout:
    /// the name's field is part of it.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + use<> {
        let piece =
            |table: TableLocation, kind| Piece::in_image(table.offset, table.length.get(), kind);
        let header = TableLocation { offset: HostOffset::ZERO, length: self.header().length() };
        let name = self.backing_name();
        let has_name = name.length.get() > 1;
        [
            Some(piece(header, PieceKind::Header)),
            has_name.then(|| piece(name, PieceKind::BackingFileName)),
            Some(piece(self.bitmap(), PieceKind::SectorBitmap)),
        ]
        .into_iter()
        .flatten()
        .filter(|piece| !piece.length.is_zero())
    }

    /// All ranges of the file, which is `length` bytes long. What a bitmap of 0 leaves free is
    /// unused; the rest of the name's field is slack.
    pub(super) fn ranges(&self, length: u64) -> impl Iterator<Item = UsedRange> + '_ {
        let header = self.header();
        let (name, field) = (self.backing_name(), header.backing_name_field());
        let data_start = header.data_offset().get();
        let size = self.image.virtual_size().get();
        let marks = [
            (name.end().get(), RangeUse::Metadata),
            (field.end().get(), RangeUse::Slack),
            (header.length().get(), RangeUse::Metadata),
            (header.bitmap_offset().get(), RangeUse::Slack),
            (self.bitmap().end().get(), RangeUse::Metadata),
            (data_start, RangeUse::Slack),
        ];
        let front = marks.into_iter().scan(0, |start, (end, used)| {
            let range = UsedRange::new(*start, end, used);
            *start = end;
            Some(range)
        });
        // Past the file's end there is nothing to be told apart.
        let in_file = size.min(length.saturating_sub(data_start));
        let windows = (0..in_file.div_ceil(WINDOW)).map(|window| window * WINDOW);
        let data = windows.flat_map(move |start| self.window(start, (start + WINDOW).min(size)));
        let data_end = data_start.saturating_add(size);
        let tail = UsedRange::new(data_end, length.max(data_end), RangeUse::Unreferenced);
        front.chain(data).chain([tail]).filter_map(move |range| clipped(range, length))
    }

    /// The ranges of the guest's bytes from `start` up to `end`.
    fn window(&self, start: u64, end: u64) -> Vec<UsedRange> {
        let data_start = self.header().data_offset().get();
        let guest = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        let mut runs = Vec::new();
        if self.image.status(guest, &mut Scratch::default(), &mut runs).is_err() {
            let (start, end) = (data_start + start, data_start + end);
            return vec![UsedRange::new(start, end, RangeUse::NotExamined)];
        }
        let range = |run: crate::status::StatusRun| {
            let start = data_start + run.start.get();
            let used = match run.status {
                BlockStatus::Data(_) => RangeUse::Data,
                _ => RangeUse::Unused,
            };
            UsedRange::new(start, start + run.length.get(), used)
        };
        runs.into_iter().map(range).collect()
    }

    /// The run of sectors that holds the byte at `at`, where the bitmap says that they are in
    /// this file.
    pub(super) fn data_at(&self, at: HostOffset) -> Option<Piece> {
        let start = at.get().checked_sub(self.header().data_offset().get())?;
        if start >= self.image.virtual_size().get() {
            return None;
        }
        let guest = start / WINDOW * WINDOW;
        let end = (guest + WINDOW).min(self.image.virtual_size().get());
        let range = self
            .window(guest, end)
            .into_iter()
            .find(|range| range.offset <= at && at < range.offset.saturating_add(range.length))?;
        let first = range.offset.since(self.header().data_offset());
        let kind =
            PieceKind::Data { owner: super::Owner::Active, guest: GuestOffset::new(first.get()) };
        (range.used == RangeUse::Data)
            .then(|| Piece::in_image(range.offset, range.length.get(), kind))
    }
}

/// The part of a range that lies in a file of `length` bytes.
fn clipped(range: UsedRange, length: u64) -> Option<UsedRange> {
    let start = range.offset.get();
    let end = range.offset.saturating_add(range.length).get().min(length);
    (start < end).then(|| UsedRange::new(start, end, range.used))
}
