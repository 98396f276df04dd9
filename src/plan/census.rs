//! Counting what a chain's pieces come to, window by window and side by side, before any
//! of it is loaded.

use std::collections::BTreeMap;

use std::convert::Infallible;

use super::build::{Blocked, Noted, Stream, Tail, cut};
use super::facts::{Facts, Piece, PieceKind};
use super::{BackingId, ObstacleKind, Segment, SegmentCounts, SegmentTarget};
use crate::chain::{Chain, Extents, HoleQuery};
use crate::damage::DamageList;
use crate::error::Result;
use crate::format::Stretches;
use crate::status::FileRole;
use crate::units::{GuestOffset, GuestRange, HostOffset, SECTOR_SIZE, Sectors};
use crate::vectorized::vectorized;

/// Most pieces between a window's ends that are kept, and of a whole disk. More would be
/// memory that grows with the image.
const FEW_IN_WINDOW: usize = 64;
const FEW: usize = 1024;

/// What one window's pieces come to: the two at its ends may grow together with the
/// neighbouring windows', those between are segments already.
struct Tally {
    window: GuestRange,
    first: Option<Piece>,
    last: Option<Piece>,
    between: SegmentCounts,
    /// The pieces between, where they are few.
    few: Vec<Piece>,
    /// They are not.
    many: bool,
    longest_zero: Sectors,
    used: Vec<bool>,
    scratch_bytes: u64,
    noted: Noted,
}

impl Tally {
    fn of(facts: &Facts, stream: Stream, window: GuestRange, extents: Extents<'_>) -> Self {
        let mut tally = Self {
            window,
            first: None,
            last: None,
            between: SegmentCounts::default(),
            few: Vec::new(),
            many: false,
            longest_zero: Sectors::default(),
            used: vec![false; facts.backing_count()],
            scratch_bytes: 0,
            noted: Noted::default(),
        };
        if let (Stream::Guest, Extents::Plain { depth, stretches }) = (stream, &extents)
            && let Some(plain) = PlainPieces::of(facts, *depth, stretches)
        {
            tally.take_plain(plain);
            return tally;
        }
        let emit = |piece: &Piece| {
            // Nearly all pieces of an image of many: so short that it is inlined.
            if tally.many
                && let Some(used) = facts.only_linear(piece).and_then(|at| tally.used.get_mut(at))
            {
                *used = true;
                tally.between.linear += 1;
            } else {
                tally.take(facts, piece);
            }
        };
        let mut scratch_bytes = 0;
        let (last, noted) = cut(facts, stream, extents, emit, |job| scratch_bytes += job.length);
        tally.scratch_bytes = scratch_bytes;
        if tally.first.is_none() {
            tally.first = last;
        } else {
            tally.last = last;
        }
        tally.noted = noted;
        tally
    }

    /// Takes the only pieces of the window.
    fn take_plain(&mut self, plain: PlainPieces) {
        self.first = Some(plain.first);
        self.last = Some(plain.last);
        self.between.linear = plain.between;
        self.many = true;
        if let Some(used) = self.used.get_mut(plain.backing.0 as usize) {
            *used = true;
        }
    }

    /// Takes the next piece that can grow no more, within the window.
    #[inline(never)]
    fn take(&mut self, facts: &Facts, piece: &Piece) {
        if self.first.is_none() {
            self.first = Some(*piece);
            return;
        }
        if self.few.len() < FEW_IN_WINDOW {
            self.few.push(*piece);
        } else {
            self.many = true;
            self.few = Vec::new();
        }
        let Self { between, longest_zero, used, .. } = self;
        for_each_segment(facts, piece, |segment| {
            count(facts, &segment, between, longest_zero, used);
        });
    }
}

/// The topmost bit of 64.
const TOPMOST: u64 = 1 << 63;

/// What a window comes to that is nothing but data of one file, in many pieces: the worst
/// that an image can be, counted without making the pieces.
struct PlainPieces {
    backing: BackingId,
    first: Piece,
    last: Piece,
    between: u64,
}

impl PlainPieces {
    /// The pieces of these stretches of the layer at `depth`, where they are such.
    #[inline(never)]
    fn of(facts: &Facts, depth: u32, stretches: &Stretches<'_>) -> Option<Self> {
        let file = facts.file(depth, FileRole::Image);
        let (hosts, size) = (stretches.hosts(), stretches.cluster_size());
        // Where the last one may start.
        let last = file.shown.checked_sub(size).filter(|&last| last < TOPMOST)?;
        let (pieces, any_past) = vectorized(
            #[inline(always)]
            move || count_pieces(hosts, size, last),
        );
        if pieces <= FEW_IN_WINDOW as u64 + 2 || any_past {
            return None;
        }
        let piece = |(range, host): (GuestRange, HostOffset)| {
            let (start, length, offset) = (range.start.get(), range.length().get(), host.get());
            let kind = PieceKind::Linear { backing: file.backing, offset };
            let is_whole = (start | length | offset).is_multiple_of(SECTOR_SIZE);
            is_whole.then_some(Piece { start, length, kind })
        };
        Some(Self {
            backing: file.backing,
            first: piece(stretches.clone().next()?)?,
            last: piece(stretches.last_one()?)?,
            between: pieces - 2,
        })
    }
}

/// How many pieces clusters of `size` at these offsets are, where those that carry the one before
/// on are one piece with it; and whether any starts past `last`, which is below 2^63.
#[inline(always)]
fn count_pieces(hosts: &[u64], size: u64, last: u64) -> (u64, bool) {
    // Of one that does, the topmost bit is set.
    let past = |host: u64| last.wrapping_sub(host) | host;
    let Some((first, others)) = hosts.split_first() else { return (0, false) };
    let (mut pieces, mut any_past) = (1u64, past(*first));
    for (&before, &host) in hosts.iter().zip(others) {
        pieces = pieces.wrapping_add(u64::from(before.wrapping_add(size) != host));
        any_past |= past(host);
    }
    (pieces, any_past & TOPMOST != 0)
}

/// Calls `each` with the segments of a piece, by their guest offsets.
#[inline(always)]
fn for_each_segment(facts: &Facts, piece: &Piece, mut each: impl FnMut(Segment)) {
    let Ok(()) = facts.segments(piece, GuestOffset::ZERO, |segment| {
        each(segment);
        Ok::<_, Infallible>(())
    });
}

#[inline(always)]
fn count(
    facts: &Facts,
    segment: &Segment,
    counts: &mut SegmentCounts,
    longest_zero: &mut Sectors,
    used: &mut [bool],
) {
    match segment.target {
        SegmentTarget::Zero => counts.zero += 1,
        SegmentTarget::Error => counts.error += 1,
        // No stream has one: it has a table of its own.
        SegmentTarget::Crypt { .. } => counts.crypt += 1,
        SegmentTarget::Linear { backing, .. } => {
            counts.linear += 1;
            if backing == facts.zero_backing {
                *longest_zero = (*longest_zero).max(segment.length);
            } else if let Some(used) = used.get_mut(backing.0 as usize) {
                *used = true;
            }
        }
    }
}

/// Where a table ends and the next one starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Split {
    pub(super) at: GuestOffset,
    /// Segments of all tables before.
    pub(super) before: u64,
}

/// Adds up the tallies, in guest order.
pub(super) struct Census<'f> {
    chain: &'f Chain,
    facts: &'f Facts,
    stream: Stream,
    holes: HoleQuery,
    max_segments: u64,
    pending: Option<Piece>,
    pub(super) counts: SegmentCounts,
    /// The longest run of zeros that the zero loop serves.
    pub(super) longest_zero: Sectors,
    /// Which of the provisional backings some segment lies on.
    pub(super) used: Vec<bool>,
    /// Where each table after the first starts.
    pub(super) splits: Vec<Split>,
    /// All pieces, where they are few and in one table: then nothing has to be resolved
    /// again to load it.
    pub(super) few: Option<Vec<Piece>>,
    /// Segments of the table that is being counted.
    in_table: u64,
    pub(super) blocked: BTreeMap<(BackingId, ObstacleKind), Blocked>,
    /// Bytes to be written to the scratch file.
    pub(super) scratch_bytes: u64,
    /// Damaged metadata; what it spoils is zeros in the table, which nobody loads.
    pub(super) damage: DamageList,
    /// The furthest tail of each file.
    pub(super) tails: BTreeMap<(u32, FileRole), Tail>,
}

impl<'f> Census<'f> {
    /// Resolves the whole chain once. `max_segments` is how many segments a table may have.
    ///
    /// # Errors
    /// None: damage is counted too.
    pub(super) fn of(
        chain: &'f Chain,
        facts: &'f Facts,
        stream: Stream,
        holes: HoleQuery,
        max_segments: u64,
    ) -> Result<Self> {
        let mut census = Self {
            chain,
            facts,
            stream,
            holes,
            max_segments,
            pending: None,
            counts: SegmentCounts::default(),
            longest_zero: Sectors::default(),
            used: vec![false; facts.backing_count()],
            splits: Vec::new(),
            few: Some(Vec::new()),
            in_table: 0,
            blocked: BTreeMap::new(),
            scratch_bytes: 0,
            damage: DamageList::default(),
            tails: BTreeMap::new(),
        };
        census.damage = chain.map_windows_in_file_order(
            chain.whole(),
            holes,
            |window, extents| Tally::of(facts, stream, window, extents),
            |tally| census.take(tally),
        )?;
        census.flush();
        if !census.splits.is_empty() {
            census.few = None;
        }
        Ok(census)
    }

    fn take(&mut self, tally: Tally) -> Result<()> {
        for blocked in &tally.noted.blocked {
            self.blocked
                .entry((blocked.backing, blocked.kind))
                .and_modify(|known| known.count += blocked.count)
                .or_insert(*blocked);
        }
        for tail in &tally.noted.tails {
            self.tails
                .entry((tail.depth, tail.role))
                .and_modify(|known| known.end = known.end.max(tail.end))
                .or_insert(*tail);
        }
        self.scratch_bytes += tally.scratch_bytes;
        if let Some(first) = tally.first {
            self.piece(first);
        }
        let Some(last) = tally.last else { return Ok(()) };
        self.flush();
        self.keep(&tally.few, tally.many);
        let before = self.counts.total();
        let between = tally.between.total();
        if self.in_table + between > self.max_segments {
            self.find_splits(tally.window, before)?;
        } else {
            self.in_table += between;
        }
        self.counts.add(tally.between);
        self.longest_zero = self.longest_zero.max(tally.longest_zero);
        for (used, more) in self.used.iter_mut().zip(&tally.used) {
            *used |= more;
        }
        self.pending = Some(last);
        Ok(())
    }

    fn piece(&mut self, next: Piece) {
        if self.pending.as_mut().is_some_and(|pending| pending.absorb(&next)) {
            return;
        }
        self.flush();
        self.pending = Some(next);
    }

    fn flush(&mut self) {
        let Some(piece) = self.pending.take() else { return };
        let facts = self.facts;
        let before = self.counts.total();
        for_each_segment(facts, &piece, |segment| {
            let Self { counts, longest_zero, used, .. } = self;
            count(facts, &segment, counts, longest_zero, used);
        });
        self.place(piece.start, self.counts.total() - before, before);
        self.keep(&[piece], false);
    }

    /// Keeps the next pieces, `and_more` than these or not, while they are few.
    fn keep(&mut self, pieces: &[Piece], and_more: bool) {
        let Some(few) = &mut self.few else { return };
        if and_more || few.len() + pieces.len() > FEW {
            self.few = None;
        } else {
            few.extend_from_slice(pieces);
        }
    }

    /// Puts the segments of a piece that come after `before` others into the table, or
    /// into the next. Tables start with pieces: inside of one, other neighbours might join
    /// where resolving starts there.
    fn place(&mut self, start: u64, segments: u64, before: u64) {
        if self.in_table > 0 && self.in_table + segments > self.max_segments {
            self.splits.push(Split { at: GuestOffset::new(start), before });
            self.in_table = 0;
        }
        self.in_table += segments;
    }

    /// A table ends among the segments between a window's ends: looks where.
    fn find_splits(&mut self, window: GuestRange, mut before: u64) -> Result<()> {
        let mut pieces = Vec::new();
        let mut resolver = self.chain.resolver_past_damage(self.holes);
        let mut is_first = true;
        let emit = |piece: &Piece| {
            // The window's first and last piece are not among them.
            if !std::mem::take(&mut is_first) {
                let mut segments = 0;
                for_each_segment(self.facts, piece, |_| segments += 1);
                pieces.push((piece.start, segments));
            }
        };
        cut(self.facts, self.stream, resolver.resolve(window)?, emit, |_| ());
        for (start, segments) in pieces {
            self.place(start, segments, before);
            before += segments;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever instructions this processor has.
    fn counted(hosts: &[u64], size: u64, last: u64) -> (u64, bool) {
        let counted = vectorized(|| count_pieces(hosts, size, last));
        assert_eq!(counted, count_pieces(hosts, size, last));
        counted
    }

    /// As many as a processor works out at a time, and fewer and more.
    #[test]
    fn clusters_that_carry_each_other_on_are_one_piece() {
        const SIZE: u64 = 4096;
        for count in 0..70u64 {
            let shuffled: Vec<_> = (0..count).map(|at| (count - at) * SIZE).collect();
            let in_order: Vec<_> = (1..=count).map(|at| at * SIZE).collect();
            for last in [count * SIZE, u64::MAX >> 1] {
                assert_eq!(counted(&shuffled, SIZE, last), (count, false));
                assert_eq!(counted(&in_order, SIZE, last), (count.min(1), false));
                for broken in 1..in_order.len() {
                    let mut hosts = in_order.clone();
                    hosts[broken..].reverse();
                    let pieces =
                        if broken + 1 == hosts.len() { 1 } else { count - broken as u64 + 1 };
                    assert_eq!(counted(&hosts, SIZE, last), (pieces, false), "{count} {broken}");
                }
            }
        }
    }

    #[test]
    fn a_cluster_that_starts_past_the_last_place_is_seen_wherever_it_stands() {
        for at in 0..70 {
            for past in [40_001, 1 << 62, 1 << 63, u64::MAX] {
                let mut hosts = [40_000; 70];
                hosts[at] = past;
                assert!(counted(&hosts, 512, 40_000).1, "{past} at {at}");
            }
        }
        assert!(!counted(&[40_000; 70], 512, 40_000).1);
    }
}
