//! Extents to pieces to segments. Nothing here grows with their number.
//!
//! A window's extents become pieces by themselves, so that windows can be worked on side
//! by side; only pieces that plainly carry each other on are joined across windows. So
//! the segments come out the same in whichever order, and wherever a table starts.

use super::facts::{Facts, FileFacts, Piece, PieceKind};
use super::{BackingId, CompressedMode, ObstacleKind, ZeroMode};
use crate::chain::{Extents, last_answer};
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::scratch::{OnError, ScratchContent, ScratchJob};
use crate::status::{Encryption, FileRole, HostPlace, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, SECTOR_SIZE};

/// Which device's contents are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    /// The virtual disk.
    Guest,
    /// What legacy AES of the layer at this depth has encrypted, in guest order, because
    /// the guest's sectors are its IVs. All else is zeros that nobody reads.
    Ciphertext(u32),
}

/// Bytes of a file under LUKS that its loop device does not show, but that have to be
/// decrypted all the same: the rest of its last cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tail {
    pub(super) depth: u32,
    pub(super) role: FileRole,
    /// Where in the file it ends, perhaps past the file's end.
    pub(super) end: u64,
    /// The first guest offset concerned.
    pub(super) first: GuestOffset,
}

/// What stands in the way of one guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) kind: ObstacleKind,
    pub(super) backing: BackingId,
    pub(super) count: u64,
    pub(super) first: GuestOffset,
}

/// Data in whole sectors inside of its file: start, length and offset in the file.
type Data = (u64, u64, u64);

/// The extent, where it is such data, of that layer and file.
#[inline(always)]
fn whole_data(extent: &Extent, depth: u32, role: FileRole, file: FileFacts) -> Option<Data> {
    let Mapping::Data(place) = extent.mapping else { return None };
    let (start, length) = (extent.start.get(), extent.length.get());
    let offset = place.offset.get();
    let whole = (start | length | offset).is_multiple_of(SECTOR_SIZE);
    let inside = offset.checked_add(length).is_some_and(|end| end <= file.shown);
    let same_file = extent.depth == depth && place.file == role;
    (same_file && whole && inside).then_some((start, length, offset))
}

/// What a window comes to besides its pieces.
#[derive(Debug, Default)]
pub(super) struct Noted {
    pub(super) blocked: Vec<Blocked>,
    pub(super) tails: Vec<Tail>,
}

/// Cuts one window's extents into pieces.
struct Cutter<'a, F, J> {
    facts: &'a Facts,
    pending: Option<Piece>,
    /// A piece of the scratch file, while the zeros after it are the pending piece: whether
    /// they are short, and so the scratch file's too, is known when they end.
    before_zeros: Option<Piece>,
    emit: F,
    job: J,
    noted: Noted,
}

/// Cuts `extents`, all that a window has, into pieces of the stream, and gives them to
/// `emit` but for the last one: that is returned. `job` gets what has to be written to the
/// scratch file.
#[inline]
pub(super) fn cut(
    facts: &Facts,
    stream: Stream,
    extents: Extents<'_>,
    emit: impl FnMut(&Piece),
    job: impl FnMut(ScratchJob),
) -> (Option<Piece>, Noted) {
    let noted = Noted::default();
    let mut cutter = Cutter { facts, pending: None, before_zeros: None, emit, job, noted };
    match (stream, extents) {
        (Stream::Ciphertext(depth), extents) => cutter.ciphertext(depth, extents),
        (Stream::Guest, Extents::Folded(extents)) => cutter.all(extents),
        (Stream::Guest, Extents::OneLayer { depth, runs }) => {
            cutter.all(runs.map(|run| last_answer(run, depth)));
        }
        (Stream::Guest, extents @ Extents::Plain { .. }) => cutter.all(extents),
    }
    cutter.finish();
    (cutter.pending, cutter.noted)
}

impl<F: FnMut(&Piece), J: FnMut(ScratchJob)> Cutter<'_, F, J> {
    #[inline]
    fn all(&mut self, mut extents: impl Iterator<Item = Extent>) {
        let mut next = extents.next();
        while let Some(extent) = next {
            let Mapping::Data(place) = extent.mapping else {
                self.push(&extent);
                next = extents.next();
                continue;
            };
            let file = self.facts.file(extent.depth, place.file);
            let Some(first) = whole_data(&extent, extent.depth, place.file, file) else {
                self.push(&extent);
                next = extents.next();
                continue;
            };
            next = self.data_of_one_file(extent.depth, place.file, file, first, &mut extents);
        }
    }

    /// Takes data in whole sectors inside of one file: `first`, and then what of `extents`
    /// is it too. Gives back the first extent that is not. In most images nearly all are,
    /// so they have a loop of their own.
    #[inline(never)]
    fn data_of_one_file(
        &mut self,
        depth: u32,
        role: FileRole,
        file: FileFacts,
        first: Data,
        extents: &mut impl Iterator<Item = Extent>,
    ) -> Option<Extent> {
        let backing = file.backing;
        let piece = |(start, length, offset)| Piece {
            start,
            length,
            kind: PieceKind::Linear { backing, offset },
        };
        self.whole_piece(piece(first));
        // The pending piece is a linear one of this file now, and ends where the next starts.
        let Some(Piece { mut start, mut length, kind: PieceKind::Linear { mut offset, .. } }) =
            self.pending
        else {
            return extents.next();
        };
        let mut other = None;
        for extent in extents {
            let Some((next, more, next_offset)) = whole_data(&extent, depth, role, file) else {
                other = Some(extent);
                break;
            };
            if offset.wrapping_add(length) == next_offset {
                length += more;
            } else {
                (self.emit)(&piece((start, length, offset)));
                (start, length, offset) = (next, more, next_offset);
            }
        }
        self.pending = Some(piece((start, length, offset)));
        other
    }

    /// Takes the extents of a window for a stream of ciphertext.
    fn ciphertext(&mut self, depth: u32, extents: Extents<'_>) {
        for extent in extents {
            match extent.mapping {
                Mapping::Encrypted { place, cipher: Encryption::Aes } if extent.depth == depth => {
                    self.data(&extent, place);
                }
                _ => self.placeholder(extent.start.get(), extent.length.get()),
            }
        }
    }

    /// Takes any extent.
    #[inline(never)]
    fn push(&mut self, extent: &Extent) {
        let (start, length) = (extent.start.get(), extent.length.get());
        match extent.mapping {
            Mapping::Data(place) => self.data(extent, place),
            Mapping::Zero(cause) => self.zeros(extent, cause),
            // Whoever resolves knows of it, and lists it as an obstacle.
            Mapping::Damaged { .. } => self.placeholder(start, length),
            Mapping::Compressed { host, stream_length, cluster } => {
                if self.facts.options.compressed == CompressedMode::Refuse {
                    self.block(ObstacleKind::Compressed, extent.depth, start, 1);
                    return self.placeholder(start, length);
                }
                let what = ScratchContent::Inflate { host, stream_length, cluster };
                self.scratch(start, length, extent.depth, what);
            }
            Mapping::Encrypted { place, cipher: Encryption::Luks } => self.luks(extent, place),
            Mapping::Encrypted { place, cipher: Encryption::Aes } => {
                // Where it can't be read is known where the ciphertext is cut.
                let file = self.facts.file(extent.depth, place.file);
                let backing = self.facts.crypt_backing(file.backing);
                let inside = self.inside(extent, place.offset.get(), file);
                self.linear(start, inside, backing, start);
                self.past_end(start + inside, length - inside, place.offset.get() + inside, extent);
            }
        }
    }

    /// Data under LUKS: the crypt device over the file has it at the file's own offsets.
    fn luks(&mut self, extent: &Extent, place: HostPlace) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let host = place.offset.get();
        let file = self.facts.file(extent.depth, place.file);
        if !(start | length | host).is_multiple_of(SECTOR_SIZE) {
            self.block(ObstacleKind::Unaligned, extent.depth, start, 1);
            return self.placeholder(start, length);
        }
        let inside = self.inside(extent, host, file);
        let end = host + inside;
        if inside > 0 && end > file.shown {
            self.tail(extent.depth, place.file, end, GuestOffset::new(start));
        }
        self.linear(start, inside, self.facts.crypt_backing(file.backing), host);
        self.past_end(start + inside, length - inside, end, extent);
    }

    /// How many bytes of encrypted data are to be decrypted: of a cluster in which the
    /// file ends all, for QEMU too decrypts the zeros that it reads past the end.
    fn inside(&self, extent: &Extent, host: u64, file: FileFacts) -> u64 {
        let granularity = self.facts.layers[extent.depth as usize].granularity;
        let granules = file.length.saturating_sub(host).div_ceil(granularity);
        granules.saturating_mul(granularity).min(extent.length.get())
    }

    fn zeros(&mut self, extent: &Extent, cause: ZeroCause) {
        let (start, length) = (extent.start.get(), extent.length.get());
        if let ZeroCause::Layer(ZeroStatus::DataPastFileEnd(place)) = cause {
            return self.past_end(start, length, place.offset.get(), extent);
        }
        let readable = match cause {
            ZeroCause::Layer(
                ZeroStatus::Hole(place)
                | ZeroStatus::Unwritten(place)
                | ZeroStatus::DataHole(place)
                | ZeroStatus::DataUnwritten(place),
            ) => Some(place),
            _ => None,
        };
        let same_in_file = readable.and_then(|place| {
            let file = self.facts.file(extent.depth, place.file);
            let end = place.offset.get().checked_add(length)?;
            (end <= file.shown).then_some((file.backing, place.offset.get()))
        });
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file } });
    }

    /// Bytes as they are in a file, perhaps not in whole sectors inside of it.
    fn data(&mut self, extent: &Extent, place: HostPlace) {
        let (start, length) = (extent.start.get(), extent.length.get());
        let host = place.offset.get();
        let file = self.facts.file(extent.depth, place.file);
        let copy = |at: u64, bytes: u64| ScratchContent::Copy {
            role: place.file,
            host: place.offset.saturating_add(ByteLen::new(at)),
            bytes,
        };
        if !start.is_multiple_of(SECTOR_SIZE) {
            self.block(ObstacleKind::Unaligned, extent.depth, start, 1);
            return self.placeholder(start, length);
        }
        // A loop device shows whole sectors: what does not start on one is copied, and so
        // is the last sector where the file ends inside of it.
        let mapped = if host.is_multiple_of(SECTOR_SIZE) {
            whole_sectors(file.shown.saturating_sub(host).min(length))
        } else {
            0
        };
        self.linear(start, mapped, file.backing, host);
        let bytes = file.length.saturating_sub(host).min(length) - mapped;
        let copied = bytes.next_multiple_of(SECTOR_SIZE);
        if bytes > 0 {
            self.scratch(start + mapped, copied, extent.depth, copy(mapped, bytes));
        }
        let done = mapped + copied;
        if done < length {
            self.past_end(start + done, length - done, host + done, extent);
        }
    }

    /// What lies past the end of its file. In the file's last cluster those are zeros; a
    /// whole cluster there means that the file was cut off.
    fn past_end(&mut self, start: u64, length: u64, host: u64, extent: &Extent) {
        let granularity = self.facts.layers[extent.depth as usize].granularity;
        let in_last = (host.next_multiple_of(granularity) - host).min(length);
        self.placeholder(start, in_last);
        let lost = length - in_last;
        if lost / granularity == 0 {
            return self.placeholder(start + in_last, lost);
        }
        let count = lost / granularity;
        self.block(ObstacleKind::PastFileEnd, extent.depth, start + in_last, count);
        if self.facts.options.on_error == OnError::ErrorTarget {
            self.piece(Piece { start: start + in_last, length: lost, kind: PieceKind::Error });
        } else {
            self.placeholder(start + in_last, lost);
        }
    }

    fn linear(&mut self, start: u64, length: u64, backing: BackingId, offset: u64) {
        if length > 0 {
            self.piece(Piece { start, length, kind: PieceKind::Linear { backing, offset } });
        }
    }

    /// A piece of the scratch file, where it lies at the guest's own offset: so neither
    /// its place nor its neighbours depend on what else is there.
    fn scratch(&mut self, start: u64, length: u64, layer: u32, what: ScratchContent) {
        let guest = GuestOffset::new(start);
        (self.job)(ScratchJob { at: start, length, guest, layer, what });
        let scratch = self.facts.scratch_backing;
        // In an image that is all compressed nearly all follow on one: the short way to what
        // taking it as any piece comes to.
        if self.before_zeros.is_none()
            && (start | length).is_multiple_of(SECTOR_SIZE)
            && let Some(pending) = &mut self.pending
            && pending.start + pending.length == start
            && pending.is_scratch(self.facts)
        {
            pending.length += length;
            return;
        }
        self.linear(start, length, scratch, start);
    }

    fn block(&mut self, kind: ObstacleKind, depth: u32, first: u64, count: u64) {
        let backing = self.facts.file(depth, FileRole::Image).backing;
        let first = GuestOffset::new(first);
        // Of a window each kind is one entry for each file: thousands of windows' are kept.
        let blocked = self.noted.blocked.iter_mut();
        match blocked.rev().find(|known| known.kind == kind && known.backing == backing) {
            Some(known) => known.count += count,
            None => self.noted.blocked.push(Blocked { kind, backing, count, first }),
        }
    }

    /// Notes that data decrypted from a file ends past that one's end.
    fn tail(&mut self, depth: u32, role: FileRole, end: u64, first: GuestOffset) {
        let tails = self.noted.tails.iter_mut();
        match tails.rev().find(|known| known.depth == depth && known.role == role) {
            Some(known) => known.end = known.end.max(end),
            None => self.noted.tails.push(Tail { depth, role, end, first }),
        }
    }

    /// What can't be mapped has no segment of its own; zeros keep the table gapless.
    fn placeholder(&mut self, start: u64, length: u64) {
        self.piece(Piece { start, length, kind: PieceKind::Zero { same_in_file: None } });
    }

    /// Takes the next piece, rounded to whole sectors: where a file ends inside one, data
    /// and zeros share it, and the first of them has it.
    fn piece(&mut self, mut next: Piece) {
        let end = (next.start + next.length).next_multiple_of(SECTOR_SIZE);
        let start = next.start.next_multiple_of(SECTOR_SIZE);
        if start >= end {
            return;
        }
        next.start = start;
        next.length = end - start;
        self.whole_piece(next);
    }

    /// The last zeros of the window have ended.
    fn finish(&mut self) {
        let Some(mut scratch) = self.before_zeros.take() else { return };
        if let Some(zeros) = self.pending.take_if(|zeros| self.facts.is_short(zeros.length)) {
            scratch.length += zeros.length;
            self.pending = Some(scratch);
        } else {
            (self.emit)(&scratch);
        }
    }

    #[inline(always)]
    fn whole_piece(&mut self, next: Piece) {
        if let Some(pending) = &mut self.pending {
            if self.before_zeros.is_some() || pending.is_scratch(self.facts) {
                return self.piece_by_scratch(next);
            }
            if pending.absorb_through_hole(&next, self.facts) {
                return;
            }
            (self.emit)(pending);
        }
        self.pending = Some(next);
    }

    /// Takes a piece after one of the scratch file, or after zeros that follow on one.
    #[inline(never)]
    fn piece_by_scratch(&mut self, next: Piece) {
        let Some(mut pending) = self.pending.take() else { return self.pending = Some(next) };
        let Some(mut scratch) = self.before_zeros.take() else {
            if pending.absorb(&next) {
                self.pending = Some(pending);
            } else if next.is_zero() && self.facts.options.zero == ZeroMode::Auto {
                (self.before_zeros, self.pending) = (Some(pending), Some(next));
            } else {
                (self.emit)(&pending);
                self.pending = Some(next);
            }
            return;
        };
        if pending.absorb(&next) {
            (self.before_zeros, self.pending) = (Some(scratch), Some(pending));
        } else if self.facts.is_short(pending.length) {
            scratch.length += pending.length;
            self.pending = Some(scratch);
            self.piece_by_scratch(next);
        } else {
            (self.emit)(&scratch);
            self.pending = Some(pending);
            self.whole_piece(next);
        }
    }
}

fn whole_sectors(bytes: u64) -> u64 {
    bytes / SECTOR_SIZE * SECTOR_SIZE
}
