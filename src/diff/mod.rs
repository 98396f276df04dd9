//! Where two disks differ: by their mappings, or by their bytes.
//!
//! Both are resolved side by side, window by window, so that memory does not grow with
//! them. Bytes are read only where the mappings differ: the same place of the same file
//! holds the same bytes.

mod content;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::chain::{Chain, HoleQuery, Resolver};
use crate::error::Result;
use crate::extent::{Coalescer, Extent, Mapping};
use crate::read::{Ciphers, in_order};
use crate::units::{GuestOffset, GuestRange};

pub use content::CONTENT_GRANULARITY;

/// Which holes count as zeros: as `qemu-img map` has it.
const HOLES: HoleQuery = HoleQuery::AsQemu;

/// What one of the disks has in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Bytes of a file, as they are. They can be zeros.
    Data,
    /// Bytes of a file, compressed.
    Compressed,
    /// Bytes of a file, encrypted.
    Encrypted,
    /// Zeros that no file holds, for whichever reason.
    Zero,
}

impl State {
    fn of(mapping: Mapping) -> Self {
        match mapping {
            // Damage ends these resolvers with an error.
            Mapping::Data(_) | Mapping::Damaged { .. } => Self::Data,
            Mapping::Compressed { .. } => Self::Compressed,
            Mapping::Encrypted { .. } => Self::Encrypted,
            Mapping::Zero(_) => Self::Zero,
        }
    }

    /// A stable name for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Compressed => "compressed",
            Self::Encrypted => "encrypted",
            Self::Zero => "zero",
        }
    }
}

/// How the disks differ in a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// They have it from different places, or one as zeros; the bytes may be the same.
    Mapping {
        /// What A has.
        a: State,
        /// What B has.
        b: State,
    },
    /// Every sector of it has other bytes.
    Content {
        /// What A has.
        a: State,
        /// What B has.
        b: State,
    },
    /// It lies past B's end.
    OnlyInA(State),
    /// It lies past A's end.
    OnlyInB(State),
}

impl DifferenceKind {
    /// A stable name for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mapping { .. } => "mapping",
            Self::Content { .. } => "content",
            Self::OnlyInA(_) => "only-in-a",
            Self::OnlyInB(_) => "only-in-b",
        }
    }

    /// What A has there, and B; nothing past its end.
    pub fn states(self) -> (Option<State>, Option<State>) {
        match self {
            Self::Mapping { a, b } | Self::Content { a, b } => (Some(a), Some(b)),
            Self::OnlyInA(a) => (Some(a), None),
            Self::OnlyInB(b) => (None, Some(b)),
        }
    }
}

/// A range in which the disks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which part of the disks.
    pub range: GuestRange,
    /// How.
    pub kind: DifferenceKind,
}

/// Two disks to be compared.
#[derive(Clone, Copy, Debug)]
pub struct Comparison<'c> {
    a: &'c Chain,
    b: &'c Chain,
    /// A is the base of B at this depth: what the layers above answer for is the difference.
    base_at: Option<u32>,
}

impl<'c> Comparison<'c> {
    /// Compares any two disks. Their mappings differ where they have the bytes from another
    /// file, another offset in it, or in another way (compressed, encrypted, as they are);
    /// zeros are all the same.
    pub fn new(a: &'c Chain, b: &'c Chain) -> Self {
        Self { a, b, base_at: None }
    }

    /// Compares `overlay` with its own [base](Chain::base) at `depth`: the mappings differ
    /// where the layers above the base answer for the range: they hold it (zeros over zeros
    /// included), or one of them ends before it.
    pub fn with_base(overlay: &'c Chain, base: &'c Chain, depth: u32) -> Self {
        Self { a: base, b: overlay, base_at: Some(depth) }
    }

    /// The larger of the disks.
    pub fn whole(&self) -> GuestRange {
        let (a, b) = (self.a.whole(), self.b.whole());
        GuestRange::new(GuestOffset::ZERO, a.end.max(b.end))
    }

    /// Calls `each` with the ranges whose mapping differs, in order, joined where they
    /// differ in the same way; and `tick` every now and then with the offset up to which
    /// all is compared, whose error ends the work. Past the end of the shorter disk, all of
    /// the longer one is a difference.
    ///
    /// # Errors
    /// What a layer's metadata, `each` or `tick` says.
    pub fn for_each_mapping(
        &self,
        mut each: impl FnMut(&Difference) -> Result<()> + Send,
        mut tick: impl FnMut(GuestOffset) -> Result<()> + Send,
    ) -> Result<()> {
        let mut joiner = Joiner::default();
        in_order(
            self.windows(),
            || self.resolvers(),
            |resolvers, window| {
                let mut found = Joiner::default();
                resolvers.compare(window, &mut |part| found.add(part.difference()))?;
                Ok((window.range().end, found.finish()))
            },
            |(end, found)| {
                for difference in found {
                    if let Some(done) = joiner.push(difference) {
                        each(&done)?;
                    }
                }
                tick(end)
            },
        )?;
        joiner.take().as_ref().map_or(Ok(()), each)
    }

    /// The depths of the layers whose keys comparing the bytes takes: A's and B's.
    ///
    /// # Errors
    /// What a layer's metadata says.
    pub fn keys_needed(&self) -> Result<(BTreeSet<u32>, BTreeSet<u32>)> {
        let (mut of_a, mut of_b) = (BTreeSet::new(), BTreeSet::new());
        if !self.a.can_need_keys() && !self.b.can_need_keys() {
            return Ok((of_a, of_b));
        }
        let encrypted = |extent: Option<Extent>| {
            extent.filter(|e| State::of(e.mapping) == State::Encrypted).map(|e| e.depth)
        };
        in_order(
            self.windows(),
            || self.resolvers(),
            |resolvers, window| {
                let mut depths = Vec::new();
                resolvers.compare(window, &mut |part| {
                    if let (Some(a), Some(b)) = (part.a, part.b) {
                        depths.push((encrypted(Some(a)), encrypted(Some(b))));
                        depths.dedup();
                    }
                })?;
                Ok(depths)
            },
            |depths| {
                for (a, b) in depths {
                    of_a.extend(a);
                    of_b.extend(b);
                }
                Ok(())
            },
        )?;
        Ok((of_a, of_b))
    }

    /// The ciphers of A and of B, where `ciphers` are those of B's layers (which are A's
    /// too, but for A being a base).
    fn ciphers(&self, ciphers: &Ciphers) -> (Ciphers, Ciphers) {
        (ciphers.of_base(self.base_at.unwrap_or(0)), ciphers.clone())
    }

    fn resolvers(&self) -> Resolvers<'c> {
        Resolvers {
            comparison: *self,
            of_a: self.a.resolver(HOLES),
            of_b: self.b.resolver(HOLES),
            extents: Vec::new(),
        }
    }

    /// The windows in which both are best resolved, then those of the longer disk's rest.
    fn windows(&self) -> impl Iterator<Item = Window> + Send + use<> {
        let (a, b) = (self.a.whole(), self.b.whole());
        let common = a.intersection(b);
        let first = |chain: &Chain| chain.windows(common, HOLES).next().map(GuestRange::length);
        let finer = if first(self.a) < first(self.b) { self.a } else { self.b };
        let rest =
            |chain: &Chain| chain.windows(GuestRange::new(common.end, chain.whole().end), HOLES);
        let common = finer.windows(common, HOLES).map(Window::Common);
        common.chain(rest(self.a).map(Window::OnlyA)).chain(rest(self.b).map(Window::OnlyB))
    }

    /// Whether a range that starts at `start` differs.
    fn differs(&self, start: GuestOffset, a: &Extent, b: &Extent) -> bool {
        if let Some(depth) = self.base_at {
            return b.depth < depth;
        }
        let place = |extent: &Extent, place: crate::status::HostPlace| {
            (place.file, place.advanced(start.since(extent.start)).offset)
        };
        let same_bytes = match (a.mapping, b.mapping) {
            (Mapping::Zero(_), Mapping::Zero(_)) => return false,
            (
                Mapping::Encrypted { place: at, cipher: x },
                Mapping::Encrypted { place: bt, cipher: y },
            ) => x == y && place(a, at) == place(b, bt),
            (Mapping::Compressed { .. }, Mapping::Compressed { .. }) => a.mapping == b.mapping,
            // Of the same bytes a file system can say now that they are a hole, now that
            // they are data.
            (x, y) if x.is_data() && y.is_data() => match (x.place(), y.place()) {
                (Some(at), Some(bt)) => place(a, at) == place(b, bt),
                _ => false,
            },
            _ => false,
        };
        !(same_bytes && self.same_file(a, b))
    }

    /// Whether the extents are of the same file (where their roles are the same).
    fn same_file(&self, a: &Extent, b: &Extent) -> bool {
        let file = |chain: &'c Chain, extent: &Extent| {
            let role = extent.mapping.place().map_or(crate::status::FileRole::Image, |p| p.file);
            chain.layers().get(extent.depth as usize).map(|layer| layer.file(role))
        };
        match (file(self.a, a), file(self.b, b)) {
            (Some(a), Some(b)) => match (a.id(), b.id()) {
                (Some(a), Some(b)) => a == b,
                _ => Arc::ptr_eq(a, b),
            },
            _ => false,
        }
    }
}

/// A range to be resolved.
#[derive(Clone, Copy, Debug)]
enum Window {
    Common(GuestRange),
    OnlyA(GuestRange),
    OnlyB(GuestRange),
}

impl Window {
    fn range(self) -> GuestRange {
        match self {
            Self::Common(range) | Self::OnlyA(range) | Self::OnlyB(range) => range,
        }
    }
}

/// A range that differs, and the extents that it is a part of; none past a disk's end.
#[derive(Clone, Copy, Debug)]
struct Part {
    range: GuestRange,
    a: Option<Extent>,
    b: Option<Extent>,
}

impl Part {
    fn difference(self) -> Difference {
        let state = |extent: Extent| State::of(extent.mapping);
        let kind = match (self.a.map(state), self.b.map(state)) {
            (Some(a), Some(b)) => DifferenceKind::Mapping { a, b },
            (Some(a), None) => DifferenceKind::OnlyInA(a),
            (None, b) => DifferenceKind::OnlyInB(b.unwrap_or(State::Zero)),
        };
        Difference { range: self.range, kind }
    }
}

/// Resolves both disks; keeps its working memory.
struct Resolvers<'c> {
    comparison: Comparison<'c>,
    of_a: Resolver<'c>,
    of_b: Resolver<'c>,
    extents: Vec<Extent>,
}

impl Resolvers<'_> {
    /// Calls `each` with the parts of a window that differ.
    fn compare(&mut self, window: Window, each: &mut dyn FnMut(Part)) -> Result<()> {
        match window {
            Window::Common(range) => self.compare_common(range, each),
            Window::OnlyA(range) => {
                for extent in self.of_a.resolve(range)? {
                    let range = GuestRange::new(extent.start, extent.end());
                    each(Part { range, a: Some(extent), b: None });
                }
                Ok(())
            }
            Window::OnlyB(range) => {
                for extent in self.of_b.resolve(range)? {
                    let range = GuestRange::new(extent.start, extent.end());
                    each(Part { range, a: None, b: Some(extent) });
                }
                Ok(())
            }
        }
    }

    fn compare_common(&mut self, range: GuestRange, each: &mut dyn FnMut(Part)) -> Result<()> {
        let mut coalescer = Coalescer::default();
        self.extents.clear();
        let of_a = self.of_a.resolve(range)?;
        self.extents.extend(of_a.filter_map(|extent| coalescer.push(extent)));
        self.extents.extend(coalescer.finish());
        let mut of_a = self.extents.as_slice();
        for b in self.of_b.resolve(range)? {
            let mut start = b.start;
            while let [a, after @ ..] = of_a {
                let end = a.end().min(b.end());
                if start < end && self.comparison.differs(start, a, &b) {
                    let range = GuestRange::new(start, end);
                    each(Part { range, a: Some(*a), b: Some(b) });
                }
                start = start.max(end);
                if a.end() > b.end() {
                    break;
                }
                of_a = after;
                if start == b.end() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Joins neighbouring differences of the same kind.
#[derive(Debug, Default)]
struct Joiner {
    pending: Option<Difference>,
    done: Vec<Difference>,
}

impl Joiner {
    /// Takes the next one; gives back the one before it once that can grow no more.
    fn push(&mut self, next: Difference) -> Option<Difference> {
        match &mut self.pending {
            Some(pending) if pending.range.end == next.range.start && pending.kind == next.kind => {
                pending.range.end = next.range.end;
                None
            }
            _ => self.pending.replace(next),
        }
    }

    /// Gives back the last one.
    fn take(&mut self) -> Option<Difference> {
        self.pending.take()
    }

    /// Takes the next one, to be given back by [`finish`](Self::finish).
    fn add(&mut self, next: Difference) {
        let done = self.push(next);
        self.done.extend(done);
    }

    /// All that were added.
    fn finish(mut self) -> Vec<Difference> {
        let last = self.take();
        self.done.extend(last);
        self.done
    }
}
