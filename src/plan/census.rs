//! Counting what a chain's pieces come to, window by window and side by side, before any
//! of it is loaded.

use std::collections::BTreeMap;

use super::build::{Blocked, Facts, Piece, cut};
use super::{BackingId, ObstacleKind, Segment, SegmentCounts, SegmentTarget};
use crate::chain::{Chain, Extents, HoleQuery};
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange, Sectors};

/// What one window's pieces come to: the two at its ends may grow together with the
/// neighbouring windows', those between are segments already.
struct Tally {
    window: GuestRange,
    first: Option<Piece>,
    last: Option<Piece>,
    between: SegmentCounts,
    longest_zero: Sectors,
    used: Vec<bool>,
    blocked: Vec<Blocked>,
}

impl Tally {
    fn of(facts: &Facts, files: usize, window: GuestRange, extents: Extents<'_>) -> Self {
        let mut tally = Self {
            window,
            first: None,
            last: None,
            between: SegmentCounts::default(),
            longest_zero: Sectors::default(),
            used: vec![false; files],
            blocked: Vec::new(),
        };
        let Tally { first, between, longest_zero, used, .. } = &mut tally;
        let (last, blocked) = cut(facts, extents, |piece| {
            if first.is_none() {
                *first = Some(*piece);
            } else {
                let segment = facts.segment(piece, GuestOffset::ZERO);
                count(facts, &segment, between, longest_zero, used);
            }
        });
        if tally.first.is_none() {
            tally.first = last;
        } else {
            tally.last = last;
        }
        tally.blocked = blocked;
        tally
    }
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

/// Adds up the tallies, in guest order.
pub(super) struct Census<'f> {
    chain: &'f Chain,
    facts: &'f Facts,
    holes: HoleQuery,
    max_segments: u64,
    pending: Option<Piece>,
    pub(super) counts: SegmentCounts,
    /// The longest run of zeros that the zero loop serves.
    pub(super) longest_zero: Sectors,
    /// Which files some segment lies on, by backing.
    pub(super) used: Vec<bool>,
    /// Where each table after the first starts.
    pub(super) splits: Vec<GuestOffset>,
    pub(super) blocked: BTreeMap<(BackingId, ObstacleKind), Blocked>,
}

impl<'f> Census<'f> {
    /// Resolves the whole chain once. `files` is the number of its files, `max_segments`
    /// how many segments a table may have.
    ///
    /// # Errors
    /// What resolving says.
    pub(super) fn of(
        chain: &'f Chain,
        facts: &'f Facts,
        files: usize,
        holes: HoleQuery,
        max_segments: u64,
    ) -> Result<Self> {
        let mut census = Self {
            chain,
            facts,
            holes,
            max_segments,
            pending: None,
            counts: SegmentCounts::default(),
            longest_zero: Sectors::default(),
            used: vec![false; files],
            splits: Vec::new(),
            blocked: BTreeMap::new(),
        };
        chain.map_windows(
            chain.whole(),
            holes,
            |window, extents| Tally::of(facts, files, window, extents),
            |tally| census.take(tally),
        )?;
        census.flush();
        Ok(census)
    }

    fn take(&mut self, tally: Tally) -> Result<()> {
        for blocked in &tally.blocked {
            self.blocked
                .entry((blocked.backing, blocked.kind))
                .and_modify(|known| known.count += blocked.count)
                .or_insert(*blocked);
        }
        if let Some(first) = tally.first {
            self.piece(first);
        }
        let Some(last) = tally.last else { return Ok(()) };
        self.flush();
        let before = self.counts.total();
        let between = tally.between.total();
        if before.max(1).next_multiple_of(self.max_segments) < before + between {
            self.find_splits(tally.window, before)?;
        }
        self.counts.linear += tally.between.linear;
        self.counts.zero += tally.between.zero;
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
        let before = self.counts.total();
        if before > 0 && before.is_multiple_of(self.max_segments) {
            self.splits.push(GuestOffset::new(piece.start));
        }
        let segment = self.facts.segment(&piece, GuestOffset::ZERO);
        count(self.facts, &segment, &mut self.counts, &mut self.longest_zero, &mut self.used);
    }

    /// A table ends among the segments between a window's ends: looks where.
    fn find_splits(&mut self, window: GuestRange, before: u64) -> Result<()> {
        let mut starts = Vec::new();
        let mut resolver = self.chain.resolver(self.holes);
        cut(self.facts, resolver.resolve(window)?, |piece| starts.push(piece.start));
        // The window's first and last piece are not among them.
        for (index, &start) in (before..).zip(starts.iter().skip(1)) {
            if index > 0 && index.is_multiple_of(self.max_segments) {
                self.splits.push(GuestOffset::new(start));
            }
        }
        Ok(())
    }
}
