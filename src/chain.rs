//! Folding the layers of a backing chain, top first, into extents.
//!
//! The guest's disk is walked in windows, small enough that one window's runs fit in
//! bounded memory whatever the image holds. In a window each layer is asked for what the
//! layers above leave to it, and nothing is read of tables that they hide. A layer that by
//! its L1 table has nothing in a stretch of many windows is not asked in any of them. So
//! the work grows with the metadata read, not with layers times windows or extents.

use std::sync::{Arc, Mutex};

use crate::damage::DamageList;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Coalescer, Extent, Mapping};
use crate::format::{BackingReference, Format, ImageFormat, Scratch, Stretches};
use crate::holes::{self, Piece, for_each_piece};
use crate::source::Source;
use crate::status::{BlockStatus, FileRole, HostPlace, StatusRun, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};
use crate::worker::apart;

mod ahead;
mod fold;
#[cfg(test)]
pub(crate) mod tests;
mod windows;
#[cfg(test)]
mod work_tests;

use ahead::{ReadAhead, Stretch};
pub(crate) use fold::last_answer;
use fold::{answer, fold_into, push_data};

/// One image of a chain with its open files.
#[derive(Debug)]
pub struct Layer {
    /// The image, parsed.
    pub image: Box<dyn ImageFormat>,
    /// The image file.
    pub source: Arc<Source>,
    /// The external data file, where the image has one.
    pub data_file: Option<Arc<Source>>,
    /// The format that the overlay declared, the user gave, or none (then it was probed).
    pub declared_format: Option<Format>,
}

impl Layer {
    /// The layer's file of that role; the image file where it has no data file.
    pub fn file(&self, role: FileRole) -> &Arc<Source> {
        match (role, &self.data_file) {
            (FileRole::DataFile, Some(data_file)) => data_file,
            _ => &self.source,
        }
    }

    /// Its files with their roles: the image file, then the data file.
    pub fn files(&self) -> impl Iterator<Item = (FileRole, &Arc<Source>)> {
        std::iter::once((FileRole::Image, &self.source))
            .chain(self.data_file.iter().map(|file| (FileRole::DataFile, file)))
    }

    /// The name and declared format of its backing file.
    pub fn backing(&self) -> Option<&BackingReference> {
        self.image.backing()
    }

    /// Whether holes of its file of that role are asked for. (A raw layer's status is that
    /// answer already.)
    fn asks_for_holes(&self, role: FileRole, holes: HoleQuery) -> bool {
        match holes {
            HoleQuery::Deep => true,
            _ if self.image.looks_preallocated() => true,
            HoleQuery::DataFiles => role == FileRole::DataFile,
            HoleQuery::AsQemu => false,
        }
    }

    /// Whether holes of any of its files are asked for.
    fn asks_any_for_holes(&self, holes: HoleQuery) -> bool {
        self.image.format() != Format::Raw
            && self.files().any(|(role, _)| self.asks_for_holes(role, holes))
    }

    /// Bytes of a run to be reckoned with, in sizing windows: those of its image, or fewer
    /// where holes split its runs.
    pub(crate) fn granularity(&self, holes: HoleQuery) -> u64 {
        let granularity = self.image.granularity();
        // Whether an image looks preallocated takes reading its refcounts: not for nothing.
        if granularity > holes::GRANULARITY && self.asks_any_for_holes(holes) {
            return holes::GRANULARITY;
        }
        granularity
    }

    /// What is wrong with the metadata of the guest's byte at `offset`, which lies inside
    /// the layer's disk; `None` where nothing is.
    pub fn damage_at(&self, offset: GuestOffset) -> Option<Error> {
        let byte = GuestRange::new(offset, offset.saturating_add(ByteLen::new(1)));
        let look = || self.image.status(byte, &mut Scratch::default(), &mut Vec::new());
        apart(look).err().map(|error| error.at_path(self.source.path()))
    }
}

/// Under which data clusters the host's file system is asked for holes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HoleQuery {
    /// Where `qemu-img map` asks: raw layers, and images that look preallocated.
    #[default]
    AsQemu,
    /// Raw layers and external data files, and images that look preallocated.
    DataFiles,
    /// Everywhere (`--deep`).
    Deep,
}

/// A whole backing chain: the active layer first.
#[derive(Debug)]
pub struct Chain {
    layers: Arc<[Layer]>,
    /// The active layer: those before it are of a chain that this one is the base of.
    first: usize,
    /// Working memory that no resolver has at the moment: a plan walks over the chain
    /// several times, and memory that is new each time costs more than the walk.
    idle: Mutex<Vec<Memory>>,
}

impl Chain {
    /// Makes a chain of these layers, the active one first.
    ///
    /// # Errors
    /// No layer at all.
    pub fn new(layers: Vec<Layer>) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::new(ErrorKind::Usage("a chain needs a layer".to_owned())));
        }
        Ok(Self { layers: layers.into(), first: 0, idle: Mutex::default() })
    }

    /// The layers, the active one first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers[self.first..]
    }

    /// The chain that starts at the layer at `depth`, with the same open files; `None`
    /// where there is no such layer.
    pub fn base(&self, depth: u32) -> Option<Self> {
        let first = self.first.checked_add(usize::try_from(depth).ok()?)?;
        (first < self.layers.len()).then(|| Self {
            layers: Arc::clone(&self.layers),
            first,
            idle: Mutex::default(),
        })
    }

    /// Size of the virtual disk: the active layer's.
    pub fn virtual_size(&self) -> ByteLen {
        self.layers()[0].image.virtual_size()
    }

    /// The whole virtual disk.
    pub fn whole(&self) -> GuestRange {
        GuestRange::new(GuestOffset::ZERO, GuestOffset::new(self.virtual_size().get()))
    }

    /// A walker over this chain, with working memory of its own.
    pub fn resolver(&self, holes: HoleQuery) -> Resolver<'_> {
        let memory = self.idle.lock().ok().and_then(|mut idle| idle.pop()).unwrap_or_default();
        Resolver { chain: self, holes, memory, whole_answer: None }
    }

    /// A walker that goes on past damage: its extents are [`Mapping::Damaged`] there, and
    /// [`Resolver::take_damage`] says what was found.
    pub fn resolver_past_damage(&self, holes: HoleQuery) -> Resolver<'_> {
        let mut resolver = self.resolver(holes);
        resolver.memory.scratch.damage = Some(DamageList::default());
        resolver
    }

    /// Calls `each` with the extents of `range`, joined where they carry each other on.
    ///
    /// # Errors
    /// What a layer's metadata or `each` says.
    pub fn for_each_extent(
        &self,
        range: GuestRange,
        holes: HoleQuery,
        each: &mut dyn FnMut(&Extent) -> Result<()>,
    ) -> Result<()> {
        self.for_each_extent_by(self.resolver(holes), range, each).map(drop)
    }

    /// As [`for_each_extent`](Self::for_each_extent), but going on past damage, which it
    /// gives back.
    ///
    /// # Errors
    /// What `each` says.
    pub fn for_each_extent_past_damage(
        &self,
        range: GuestRange,
        holes: HoleQuery,
        each: &mut dyn FnMut(&Extent) -> Result<()>,
    ) -> Result<DamageList> {
        self.for_each_extent_by(self.resolver_past_damage(holes), range, each)
    }

    fn for_each_extent_by(
        &self,
        mut resolver: Resolver<'_>,
        range: GuestRange,
        each: &mut dyn FnMut(&Extent) -> Result<()>,
    ) -> Result<DamageList> {
        let mut coalescer = Coalescer::default();
        let mut ahead = ReadAhead::new(self, range);
        for window in self.windows(range, resolver.holes) {
            ahead.before(window);
            for extent in resolver.resolve(window)? {
                if let Some(done) = coalescer.push(extent) {
                    each(&done)?;
                }
            }
        }
        coalescer.finish().as_ref().map_or(Ok(()), each)?;
        Ok(resolver.take_damage())
    }
}

/// Resolves windows of a chain; keeps its working memory between them.
#[derive(Debug)]
pub struct Resolver<'c> {
    chain: &'c Chain,
    holes: HoleQuery,
    memory: Memory,
    /// The layer that answers for the whole window, with the memory's plain clusters or, where
    /// there are none, its `runs`.
    whole_answer: Option<u32>,
}

#[derive(Debug, Default)]
struct Memory {
    scratch: Scratch,
    runs: Vec<StatusRun>,
    split: Vec<StatusRun>,
    /// What the layers so far leave to the next one: in order, none adjacent to another.
    open: Vec<GuestRange>,
    left: Vec<GuestRange>,
    extents: Vec<Extent>,
    stretch: Stretch,
}

impl Drop for Resolver<'_> {
    fn drop(&mut self) {
        let mut memory = std::mem::take(&mut self.memory);
        // The next one is not to go on past damage unless it is asked to.
        memory.scratch.damage = None;
        if let Ok(mut idle) = self.chain.idle.lock() {
            idle.push(memory);
        }
    }
}

/// The extents of a window in guest order, without gap. Not all that carry each other on
/// are joined.
#[derive(Clone, Debug)]
pub enum Extents<'r> {
    /// Of several layers, or of some of a layer's answer.
    Folded(std::iter::Copied<std::slice::Iter<'r, Extent>>),
    /// One layer's answer, nothing left over: the usual case. The extents are made as
    /// they are asked for, which saves a pass over memory.
    OneLayer {
        /// Its depth.
        depth: u32,
        /// What it says.
        runs: std::slice::Iter<'r, StatusRun>,
    },
    /// One layer's answer, which is data of its own file and nothing else.
    Plain {
        /// Its depth.
        depth: u32,
        /// What lies in the file as on the disk, and where.
        stretches: Stretches<'r>,
    },
}

/// The extent of a stretch of the own file of the layer at `depth`.
#[inline]
fn extent_of((range, host): (GuestRange, HostOffset), depth: u32) -> Extent {
    let mapping = Mapping::Data(HostPlace::in_image(host));
    Extent { start: range.start, length: range.length(), depth, mapping }
}

impl Iterator for Extents<'_> {
    type Item = Extent;

    #[inline]
    fn next(&mut self) -> Option<Extent> {
        match self {
            Self::Folded(extents) => extents.next(),
            Self::OneLayer { depth, runs } => runs.next().map(|run| last_answer(run, *depth)),
            Self::Plain { depth, stretches } => {
                stretches.next().map(|stretch| extent_of(stretch, *depth))
            }
        }
    }

    // One loop for each variant, not a choice for each extent.
    #[inline]
    fn fold<B, F: FnMut(B, Extent) -> B>(self, init: B, each: F) -> B {
        match self {
            Self::Folded(extents) => extents.fold(init, each),
            Self::OneLayer { depth, runs } => {
                runs.map(|run| last_answer(run, depth)).fold(init, each)
            }
            Self::Plain { depth, stretches } => {
                stretches.map(|stretch| extent_of(stretch, depth)).fold(init, each)
            }
        }
    }
}

impl Resolver<'_> {
    /// The damage found since it was last taken; none where damage is an error.
    pub fn take_damage(&mut self) -> DamageList {
        self.memory.scratch.damage.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The extents of `window`.
    ///
    /// # Errors
    /// What a layer's metadata says, with its file's path; nothing of a walker that goes
    /// on past damage.
    pub fn resolve(&mut self, window: GuestRange) -> Result<Extents<'_>> {
        self.memory.extents.clear();
        self.whole_answer = None;
        if window.is_empty() {
            return Ok(Extents::Folded(self.memory.extents.iter().copied()));
        }
        self.memory.stretch.look_at(self.chain, window);
        self.memory.open.clear();
        self.memory.open.push(window);
        let mut layers_with_rows = 0;
        for at in 0..self.memory.stretch.busy.len() {
            let layer = &mut self.memory.stretch.busy[at];
            if !layer.is_busy_in(self.chain, window) {
                continue;
            }
            let depth = layer.depth;
            let rows_before = self.memory.extents.len();
            self.fold_layer(depth)?;
            layers_with_rows += usize::from(self.memory.extents.len() > rows_before);
            if self.memory.open.is_empty() {
                break;
            }
        }
        if layers_with_rows > 1 {
            // Each layer's rows are in order already: a merge of sorted runs.
            self.memory.extents.sort_by_key(|extent| extent.start);
            self.memory.extents.dedup_by(|next, extent| extent.absorb(next));
        }
        Ok(match self.whole_answer {
            Some(depth) if !self.memory.scratch.plain.is_empty() => {
                Extents::Plain { depth, stretches: self.memory.scratch.plain.stretches() }
            }
            Some(depth) => Extents::OneLayer { depth, runs: self.memory.runs.iter() },
            None => Extents::Folded(self.memory.extents.iter().copied()),
        })
    }

    /// What one layer by itself says of `range`, which lies inside its own virtual disk:
    /// runs in order, without gap. They are not joined.
    ///
    /// # Errors
    /// What its metadata says, with its file's path (nothing of a walker that goes on past
    /// damage); no layer is so deep.
    pub fn layer_runs(&mut self, depth: usize, range: GuestRange) -> Result<&[StatusRun]> {
        let chain = self.chain;
        let Some(layer) = chain.layers().get(depth) else {
            return Err(Error::new(ErrorKind::Usage(format!("there is no layer {depth}"))));
        };
        self.memory.scratch.plain.begin(false);
        self.ask(layer, u32::try_from(depth).unwrap_or(u32::MAX), range)?;
        Ok(&self.memory.runs)
    }

    /// Puts what `layer`, at that depth, says of `range` into `runs`.
    fn ask(&mut self, layer: &Layer, depth: u32, range: GuestRange) -> Result<()> {
        self.memory.runs.clear();
        self.ask_more(layer, depth, range)?;
        self.ask_for_holes(layer);
        Ok(())
    }

    /// Appends what `layer`, at that depth, says of `range` to `runs`.
    fn ask_more(&mut self, layer: &Layer, depth: u32, range: GuestRange) -> Result<()> {
        if let Some(damage) = &mut self.memory.scratch.damage {
            damage.set_layer(depth);
        }
        layer
            .image
            .status(range, &mut self.memory.scratch, &mut self.memory.runs)
            .map_err(|error| error.at_path(layer.source.path()))
    }

    /// Asks a layer for the open ranges, but not for what is long between them: that is
    /// hidden, and the tables that tell of it are not to be read.
    fn ask_for_open(&mut self, layer: &Layer, depth: u32) -> Result<()> {
        self.memory.runs.clear();
        let worth_a_gap = layer.image.page_coverage();
        let mut open = 0;
        while let Some(&first) = self.memory.open.get(open) {
            let mut asked = first;
            open += 1;
            while let Some(next) = self.memory.open.get(open)
                && next.start.since(asked.end).get() < worth_a_gap
            {
                asked.end = next.end;
                open += 1;
            }
            self.ask_more(layer, depth, asked)?;
        }
        self.ask_for_holes(layer);
        Ok(())
    }

    /// Asks the layer at `depth` for the open ranges: rows for what it answers, and the open
    /// ranges anew for what it leaves to its backing file.
    fn fold_layer(&mut self, depth: u32) -> Result<()> {
        let layers = self.chain.layers();
        let Some(layer) = layers.get(depth as usize) else { return Ok(()) };
        let backing_size = layers.get(depth as usize + 1).map(|l| l.image.virtual_size());
        let Some(last) = self.memory.open.last() else { return Ok(()) };
        let leaves_all_unallocated = backing_size.is_some_and(|size| last.end.get() <= size.get());
        let takes_plain = self.memory.open.len() == 1
            && self.memory.extents.is_empty()
            && !layer.asks_any_for_holes(self.holes);
        self.memory.scratch.plain.begin(takes_plain);
        self.ask_for_open(layer, depth)?;
        if takes_plain && self.has_only_plain() {
            self.whole_answer = Some(depth);
            self.memory.open.clear();
            return Ok(());
        }

        let Memory { runs, open, left, extents, .. } = &mut self.memory;
        let unallocated = |run: &StatusRun| matches!(run.status, BlockStatus::Unallocated(_));
        if leaves_all_unallocated && runs.iter().all(unallocated) {
            return Ok(()); // Nothing here: the open ranges are the next layer's as they are.
        }
        if open.len() > 1 {
            left.clear();
            fold_into(open, runs, depth, backing_size, extents, left);
            std::mem::swap(open, left);
            return Ok(());
        }
        let leaves_something = backing_size.is_some() && runs.iter().any(unallocated);
        if extents.is_empty() && !leaves_something {
            self.whole_answer = Some(depth);
            open.clear();
            return Ok(());
        }
        left.clear();
        let mut runs = runs.as_slice();
        while let [run, rest @ ..] = runs {
            answer(*run, depth, backing_size, extents, left);
            runs = &rest[push_data(rest, depth, extents)..];
        }
        std::mem::swap(open, left);
        Ok(())
    }

    /// Whether what was asked for is nothing but plain clusters; if not, they become runs.
    fn has_only_plain(&mut self) -> bool {
        let Memory { runs, split, scratch: Scratch { plain, .. }, .. } = &mut self.memory;
        if plain.is_empty() || runs.is_empty() {
            return !plain.is_empty();
        }
        split.clear();
        split.extend(plain.runs());
        split.append(runs);
        std::mem::swap(runs, split);
        plain.begin(false);
        false
    }

    /// Splits the data runs by the holes of the file below, where those are wanted.
    fn ask_for_holes(&mut self, layer: &Layer) {
        let holes = self.holes;
        if !layer.asks_any_for_holes(holes) {
            return;
        }
        self.memory.split.clear();
        for run in &self.memory.runs {
            match run.status {
                BlockStatus::Data(place) if layer.asks_for_holes(place.file, holes) => {
                    let split = &mut self.memory.split;
                    let source = layer.file(place.file);
                    for_each_piece(source, place.offset, run.length, &mut |at, length, piece| {
                        let place = place.advanced(at);
                        let status = match piece {
                            Piece::Data => BlockStatus::Data(place),
                            Piece::Hole => BlockStatus::Zero(ZeroStatus::DataHole(place)),
                            Piece::PastEnd => BlockStatus::Zero(ZeroStatus::DataPastFileEnd(place)),
                            Piece::Unwritten => BlockStatus::Zero(ZeroStatus::DataUnwritten(place)),
                        };
                        split.push(StatusRun {
                            start: run.start.saturating_add(at),
                            length,
                            status,
                        });
                    });
                }
                _ => self.memory.split.push(*run),
            }
        }
        std::mem::swap(&mut self.memory.runs, &mut self.memory.split);
    }
}
