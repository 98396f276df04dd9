//! What the image says of a guest range, in pieces of whole sectors.

use super::fresh::Fresh;
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::format::Format;
use crate::status::{Encryption, FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, SECTOR_SIZE};

/// Where the bytes of a piece come from, by the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FreshBytes {
    /// Zeros; and where in a file the same zeros are to be found, if anywhere.
    Zero(Option<(u32, FileRole, u64)>),
    /// The bytes of a file from this offset on, as they are or as ciphertext, and zeros past
    /// the file's end.
    File(u32, FileRole, u64),
    /// A compressed cluster.
    Inflate(u32, HostOffset),
    /// Whole clusters past the end of the file of that layer.
    Lost(u32, FileRole, u64),
    /// Nobody can tell: the layer's metadata is damaged.
    Damaged(u32),
    /// What the partial last sector has of a file that only its loop device still shows.
    Unseen,
}

/// A guest range of one kind, in whole sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreshPiece {
    pub(super) range: GuestRange,
    pub(super) bytes: FreshBytes,
    /// The layer whose cipher the bytes are under.
    pub(super) crypt: Option<(u32, Encryption)>,
}

impl FreshPiece {
    /// The part of it from `start` to `end`, which lie inside.
    pub(super) fn part(&self, start: GuestOffset, end: GuestOffset) -> Self {
        let by = start.since(self.range.start).get();
        let bytes = match self.bytes {
            FreshBytes::Zero(Some((depth, role, at))) => {
                FreshBytes::Zero(Some((depth, role, at.saturating_add(by))))
            }
            FreshBytes::File(depth, role, at) => {
                FreshBytes::File(depth, role, at.saturating_add(by))
            }
            FreshBytes::Lost(depth, role, at) => {
                FreshBytes::Lost(depth, role, at.saturating_add(by))
            }
            other => other,
        };
        Self { range: GuestRange::new(start, end), bytes, crypt: self.crypt }
    }
}

/// Rounds up to whole sectors: where a file ends inside of one, data and the zeros after
/// them share it, and it counts to the data.
fn up(bytes: u64) -> u64 {
    bytes.checked_next_multiple_of(SECTOR_SIZE).unwrap_or(u64::MAX / SECTOR_SIZE * SECTOR_SIZE)
}

/// Cuts an extent into pieces.
pub(super) struct Pieces<'f> {
    fresh: &'f Fresh,
    extent: Extent,
    pieces: Vec<FreshPiece>,
}

/// The pieces of an extent, in guest order. The sector in which it starts counts to the
/// extent before.
pub(super) fn pieces(fresh: &Fresh, extent: &Extent, pieces: Vec<FreshPiece>) -> Vec<FreshPiece> {
    let mut cut = Pieces { fresh, extent: *extent, pieces };
    cut.pieces.clear();
    cut.cut();
    cut.pieces
}

impl Pieces<'_> {
    fn push(&mut self, start: u64, end: u64, bytes: FreshBytes, crypt: Option<Encryption>) {
        let range = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        if !range.is_empty() {
            let crypt = crypt.map(|cipher| (self.extent.depth, cipher));
            self.pieces.push(FreshPiece { range, bytes, crypt });
        }
    }

    fn cut(&mut self) {
        let depth = self.extent.depth;
        let (start, end) = (up(self.extent.start.get()), up(self.extent.end().get()));
        let skipped = start.saturating_sub(self.extent.start.get());
        if start >= end {
            return;
        }
        let at = |place: HostPlace| place.advanced(ByteLen::new(skipped));
        match self.extent.mapping {
            Mapping::Data(place) => self.file(start, end, at(place), None),
            Mapping::Encrypted { place, cipher } => self.file(start, end, at(place), Some(cipher)),
            Mapping::Compressed { host, stream_length, .. } => {
                let past = host.saturating_add(stream_length).get();
                let shown = self.fresh.length(depth, FileRole::Image);
                let cut_off = self.fresh.is_cut(depth) && past > shown;
                let bytes =
                    if cut_off { FreshBytes::Unseen } else { FreshBytes::Inflate(depth, host) };
                self.push(start, end, bytes, None);
            }
            Mapping::Damaged { .. } => self.push(start, end, FreshBytes::Damaged(depth), None),
            Mapping::Zero(ZeroCause::Layer(ZeroStatus::DataPastFileEnd(place))) => {
                self.past_end(start, end, at(place));
            }
            Mapping::Zero(ZeroCause::PastBackingEnd(_)) if self.backing_is_cut_at(start) => {
                let split = start.saturating_add(SECTOR_SIZE).min(end);
                self.push(start, split, FreshBytes::Unseen, None);
                self.push(split, end, FreshBytes::Zero(None), None);
            }
            Mapping::Zero(cause) => {
                let same = match cause {
                    ZeroCause::Layer(
                        ZeroStatus::Hole(place)
                        | ZeroStatus::Unwritten(place)
                        | ZeroStatus::DataHole(place)
                        | ZeroStatus::DataUnwritten(place),
                    ) => Some(at(place)),
                    _ => None,
                };
                let same = same.map(|place| (depth, place.file, place.offset.get()));
                self.push(start, end, FreshBytes::Zero(same), None);
            }
        }
    }

    /// Bytes of a file, as far as that goes.
    fn file(&mut self, start: u64, end: u64, place: HostPlace, crypt: Option<Encryption>) {
        let depth = self.extent.depth;
        let host = place.offset.get();
        let left = self.fresh.length(depth, place.file).saturating_sub(host);
        // Of encrypted data QEMU also decrypts the zeros in the file's last cluster.
        let inside = match crypt {
            None => up(left),
            Some(_) => left.checked_next_multiple_of(self.granularity()).unwrap_or(u64::MAX),
        };
        let split = start.saturating_add(inside).min(end);
        self.push(start, split, FreshBytes::File(depth, place.file, host), crypt);
        self.past_end(split, end, place.advanced(ByteLen::new(split - start)));
    }

    /// What lies past the end of a file: zeros in its last cluster, and else lost.
    fn past_end(&mut self, start: u64, end: u64, place: HostPlace) {
        if start >= end {
            return;
        }
        let (depth, host) = (self.extent.depth, place.offset.get());
        let granularity = self.granularity();
        let next = host.checked_next_multiple_of(granularity).unwrap_or(u64::MAX);
        let in_last = start.saturating_add(next - host).min(end);
        let mut zeros_from = start;
        if self.fresh.is_cut_file(depth, place.file) && host == self.fresh.length(depth, place.file)
        {
            zeros_from = start.saturating_add(SECTOR_SIZE).min(in_last);
            self.push(start, zeros_from, FreshBytes::Unseen, None);
        }
        self.push(zeros_from, in_last, FreshBytes::Zero(None), None);
        let bytes = if end - in_last < granularity {
            FreshBytes::Zero(None)
        } else {
            FreshBytes::Lost(depth, place.file, host.saturating_add(in_last - start))
        };
        self.push(in_last, end, bytes, None);
    }

    /// True where the raw backing file ends here only as far as its loop device shows.
    fn backing_is_cut_at(&self, start: u64) -> bool {
        let below = self.extent.depth.saturating_add(1);
        let layer = self.fresh.chain.layers().get(below as usize);
        layer.is_some_and(|layer| {
            layer.image.format() == Format::Raw
                && self.fresh.is_cut(below)
                && layer.image.virtual_size().get() == start
        })
    }

    fn granularity(&self) -> u64 {
        let layer = self.fresh.chain.layers().get(self.extent.depth as usize);
        layer.map_or(SECTOR_SIZE, |layer| layer.image.granularity())
    }
}
