//! Which layers have anything in a stretch of the disk, and reading their tables ahead.

use super::Chain;
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// Windows of a stretch: to know which layers have anything in it takes a look at each
/// layer, of a thousand perhaps.
const WINDOWS_PER_STRETCH: u64 = 32;

/// Windows that the kernel fetches the tables of before they are resolved: 2 to 4 MiB of
/// tables. A disk is busy with as many requests as it takes at once.
const WINDOWS_AHEAD: u64 = 128;

/// A stretch of the disk, and the layers that may answer for something in it.
#[derive(Debug, Default)]
pub(super) struct Stretch {
    range: Option<GuestRange>,
    /// By their depths.
    pub(super) busy: Vec<Busy>,
}

/// A layer that may answer for something in a stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Busy {
    pub(super) depth: u32,
    /// The layer above a shorter one answers for what lies past that one's end, and the
    /// last one for all that is left: even where they have nothing.
    always: bool,
    /// Where it is known to have nothing.
    nothing: GuestRange,
}

impl Busy {
    /// Whether the layer may answer for something in `window`, which lies in the stretch.
    #[inline]
    pub(super) fn is_busy_in(&mut self, chain: &Chain, window: GuestRange) -> bool {
        if self.always || self.nothing.intersection(window) == window {
            return self.always;
        }
        let layer = chain.layers().get(self.depth as usize);
        let until = layer.map_or(window.start, |l| l.image.unallocated_until(window.start));
        self.nothing = GuestRange::new(window.start, until);
        until < window.end
    }
}

impl Stretch {
    /// Sees to it that the stretch is one around `window`.
    pub(super) fn look_at(&mut self, chain: &Chain, window: GuestRange) {
        if self.range.is_some_and(|range| range.intersection(window) == window) {
            return;
        }
        let length = ByteLen::new(window.length().get().saturating_mul(WINDOWS_PER_STRETCH));
        let disk_end = chain.whole().end;
        let end = window.start.saturating_add(length).min(disk_end).max(window.end);
        let range = GuestRange::new(window.start, end);
        let layers = chain.layers();
        self.busy.clear();
        for (depth, layer) in (0u32..).zip(layers) {
            let backing = layers.get(depth as usize + 1).map(|layer| &layer.image);
            let leaves_all =
                backing.is_some_and(|image| image.virtual_size().get() >= range.end.get());
            let until = layer.image.unallocated_until(range.start);
            if !leaves_all || until < range.end {
                let nothing = GuestRange::new(range.start, until);
                self.busy.push(Busy { depth, always: !leaves_all, nothing });
            }
        }
        self.range = Some(range);
    }
}

/// Has the kernel fetch tables before they are needed: those of the uppermost layer that
/// has any, which are needed whatever they say. Of the layers below they may be hidden.
#[derive(Debug)]
pub(super) struct ReadAhead<'c> {
    chain: &'c Chain,
    /// What has not been asked for yet.
    rest: GuestRange,
    stretch: Stretch,
}

impl<'c> ReadAhead<'c> {
    pub(super) fn new(chain: &'c Chain, range: GuestRange) -> Self {
        let rest = range.intersection(chain.whole());
        Self { chain, rest, stretch: Stretch::default() }
    }

    /// Asks for what lies before the end of `window` and for some that follows.
    pub(super) fn before(&mut self, window: GuestRange) {
        let step = window.length();
        let ahead = ByteLen::new(step.get().saturating_mul(WINDOWS_AHEAD));
        // In pieces of some size, so that tables that follow on one another are one request.
        if self.rest.start > window.end.saturating_add(ByteLen::new(ahead.get() / 2)) {
            return;
        }
        let until = window.end.saturating_add(ahead).min(self.rest.end);
        while self.rest.start < until {
            let next = self.rest.start.saturating_add(ahead).min(until);
            self.fetch(GuestRange::new(self.rest.start, next), step);
            self.rest.start = next;
        }
    }

    fn fetch(&mut self, range: GuestRange, step: ByteLen) {
        let chain = self.chain;
        // What the uppermost layer is asked for that has tables there.
        let mut pending: Option<(u32, GuestRange)> = None;
        let mut at = range.start;
        while at < range.end {
            let part = GuestRange::new(at, at.saturating_add(step).min(range.end));
            self.stretch.look_at(chain, part);
            let mut nothing_until = part.end;
            let uppermost = self.stretch.busy.iter().map(|busy| busy.depth).find(|&depth| {
                let layer = chain.layers().get(depth as usize);
                let until = layer.map_or(GuestOffset::ZERO, |l| l.image.unallocated_until(at));
                nothing_until = nothing_until.min(until.max(at));
                until <= at
            });
            let Some(depth) = uppermost else {
                at = nothing_until;
                continue;
            };
            at = part.end;
            match &mut pending {
                Some((same, range)) if *same == depth && range.end == part.start => {
                    range.end = part.end;
                }
                _ => self.ask(pending.replace((depth, part))),
            }
        }
        self.ask(pending);
    }

    fn ask(&self, tables: Option<(u32, GuestRange)>) {
        if let Some((depth, range)) = tables
            && let Some(layer) = self.chain.layers().get(depth as usize)
        {
            layer.image.read_ahead(range);
        }
    }
}
