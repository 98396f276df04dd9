//! Which layers have anything in a stretch of the disk, where their tables lie, and reading
//! those ahead.

use std::ops::Range;

use super::Chain;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Windows of a stretch: to know which layers have anything in it takes a look at each
/// layer, of a thousand perhaps.
const WINDOWS_PER_STRETCH: u64 = 32;

/// Windows that the kernel fetches the tables of before they are resolved: 2 to 4 MiB of
/// tables. A disk is busy with as many requests as it takes at once.
const WINDOWS_AHEAD: usize = 128;

/// Bytes of several pieces of tables that follow on one another in the file from which on the
/// kernel is not asked to read them ahead: by itself it does so with what is read in order, in
/// larger pages and requests than those of `posix_fadvise`, so that it takes half the time.
const LEFT_TO_THE_KERNEL: u64 = 1 << 20;

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

/// Bytes of the file of the layer at `depth` that are tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tables {
    depth: u32,
    from: HostOffset,
    to: HostOffset,
}

/// Finds the tables that are needed whatever they say: those of the uppermost layer that has
/// any. Of the layers below they may be hidden.
#[derive(Debug)]
struct Finder<'c> {
    chain: &'c Chain,
    stretch: Stretch,
}

impl<'c> Finder<'c> {
    fn new(chain: &'c Chain) -> Self {
        Self { chain, stretch: Stretch::default() }
    }

    /// Calls `each` with the tables of `range`, in guest order, looking at windows of `step`.
    fn find(&mut self, range: GuestRange, step: ByteLen, each: &mut dyn FnMut(Tables)) {
        let chain = self.chain;
        let mut tables_of = |layer: Option<(u32, GuestRange)>| {
            if let Some((depth, range)) = layer
                && let Some(layer) = chain.layers().get(depth as usize)
            {
                layer.image.tables(range, &mut |from, to| each(Tables { depth, from, to }));
            }
        };
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
                _ => tables_of(pending.replace((depth, part))),
            }
        }
        tables_of(pending);
    }
}

/// What the kernel is to fetch: tables that follow on one another are one request.
struct Requests<'c> {
    chain: &'c Chain,
    pending: Option<Tables>,
    /// How many it was put together from.
    count: u32,
}

impl<'c> Requests<'c> {
    fn new(chain: &'c Chain) -> Self {
        Self { chain, pending: None, count: 0 }
    }

    fn add(&mut self, tables: Tables) {
        match &mut self.pending {
            Some(pending) if pending.depth == tables.depth && pending.to == tables.from => {
                pending.to = tables.to;
                self.count += 1;
            }
            _ => {
                self.make();
                (self.pending, self.count) = (Some(tables), 1);
            }
        }
    }

    /// Makes the last one, too.
    fn make(&mut self) {
        let Some(Tables { depth, from, to }) = self.pending.take() else { return };
        let length = to.since(from);
        if (self.count == 1 || length.get() < LEFT_TO_THE_KERNEL)
            && let Some(layer) = self.chain.layers().get(depth as usize)
        {
            layer.source.read_ahead(from, length);
        }
    }
}

/// Has the kernel fetch tables before they are needed, in guest order.
#[derive(Debug)]
pub(super) struct ReadAhead<'c> {
    finder: Finder<'c>,
    /// What has not been asked for yet.
    rest: GuestRange,
}

impl<'c> ReadAhead<'c> {
    pub(super) fn new(chain: &'c Chain, range: GuestRange) -> Self {
        let rest = range.intersection(chain.whole());
        Self { finder: Finder::new(chain), rest }
    }

    /// Asks for what lies before the end of `window` and for some that follows.
    pub(super) fn before(&mut self, window: GuestRange) {
        let step = window.length();
        let ahead = ByteLen::new(step.get().saturating_mul(WINDOWS_AHEAD as u64));
        // In pieces of some size, so that tables that follow on one another are one request.
        if self.rest.start > window.end.saturating_add(ByteLen::new(ahead.get() / 2)) {
            return;
        }
        let until = window.end.saturating_add(ahead).min(self.rest.end);
        while self.rest.start < until {
            let next = self.rest.start.saturating_add(ahead).min(until);
            let mut requests = Requests::new(self.finder.chain);
            let part = GuestRange::new(self.rest.start, next);
            self.finder.find(part, step, &mut |tables| requests.add(tables));
            requests.make();
            self.rest.start = next;
        }
    }
}

/// Windows in the order in which their tables lie in the files.
#[derive(Debug)]
pub(super) struct InFileOrder<'c> {
    chain: &'c Chain,
    /// The windows by their numbers in guest order.
    order: Vec<usize>,
    /// How many of them were handed out, and how many asked for.
    handed_out: usize,
    asked: usize,
    /// At most 64 for each window, where a layer has clusters of 512 bytes.
    tables: Vec<Tables>,
    /// Which of them are of the window of a number.
    of_window: Vec<Range<usize>>,
}

impl<'c> InFileOrder<'c> {
    pub(super) fn of(chain: &'c Chain, windows: &[GuestRange]) -> Self {
        let mut finder = Finder::new(chain);
        let mut tables = Vec::new();
        let mut of_window = Vec::with_capacity(windows.len());
        for window in windows {
            let first = tables.len();
            finder.find(*window, window.length(), &mut |found| tables.push(found));
            of_window.push(first..tables.len());
        }
        let mut order: Vec<_> = (0..windows.len()).collect();
        order.sort_by_key(|&window| {
            let its = of_window.get(window).and_then(|its| tables.get(its.clone()));
            its.and_then(|its| its.first()).map(|first| (first.depth, first.from))
        });
        Self { chain, order, handed_out: 0, asked: 0, tables, of_window }
    }

    /// The numbers of the next `count` windows, and fewer at the end. Asks for their tables and
    /// for some that follow.
    pub(super) fn next(&mut self, count: usize) -> Option<Vec<usize>> {
        let rest = self.order.get(self.handed_out..)?;
        let next = rest.get(..count).unwrap_or(rest).to_vec();
        self.handed_out += next.len();
        if self.asked <= self.handed_out + WINDOWS_AHEAD / 2 {
            let until = (self.handed_out + WINDOWS_AHEAD).min(self.order.len());
            let mut requests = Requests::new(self.chain);
            for &window in self.order.get(self.asked..until).unwrap_or_default() {
                let its = self.of_window.get(window).and_then(|its| self.tables.get(its.clone()));
                its.into_iter().flatten().for_each(|&tables| requests.add(tables));
            }
            requests.make();
            self.asked = until;
        }
        (!next.is_empty()).then_some(next)
    }
}
