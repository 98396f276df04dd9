//! What a picture of a guest's disk shows: for the disk as a whole and for each layer by
//! itself, how many bytes of each state every cell of a strip holds, and how scattered
//! they lie in their files.
//!
//! Each layer is walked once, in windows as [`Chain::windows`] has them: memory grows with
//! the cells and not with the image, and a disk of 16 TiB that holds little costs little.

mod fragmentation;
mod grid;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

use crate::chain::{Chain, Extents, HoleQuery, last_answer};
use crate::damage::DamageList;
use crate::error::Result;
use crate::extent::{Extent, Mapping, ZeroCause};
use crate::units::{ByteLen, GuestOffset, GuestRange};

pub use fragmentation::Fragmentation;
pub use grid::Grid;

use fragmentation::Measure;

/// Most runs that a layer should give in one window: some 12 MiB of a raw file that is
/// nothing but holes and data of 4 KiB, in a window of 1 GiB.
const RUNS_PER_WINDOW: u64 = 1 << 14;

/// Windows of layers that are asked about before their answers are added up.
const WINDOWS_AT_ONCE: usize = 256;

/// What a part of the disk is, as far as a picture tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum State {
    /// Nobody can tell: the metadata is damaged.
    Damaged,
    /// Stored as it is.
    Data,
    /// Stored in a compressed cluster.
    Compressed,
    /// Stored under a cipher.
    Encrypted,
    /// Known to read as zero: a zero cluster, or a hole of a raw file or under data.
    Zero,
    /// Not in this layer; in the whole, in none.
    Unallocated,
}

impl State {
    /// All states: what is drawn before others first.
    pub const ALL: [Self; 6] = [
        Self::Damaged,
        Self::Data,
        Self::Compressed,
        Self::Encrypted,
        Self::Zero,
        Self::Unallocated,
    ];

    /// The states in which something is stored.
    const CONTENT: [Self; 3] = [Self::Data, Self::Compressed, Self::Encrypted];

    /// Its name, which is stable.
    pub fn name(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Data => "data",
            Self::Compressed => "compressed",
            Self::Encrypted => "encrypted",
            Self::Zero => "zero",
            Self::Unallocated => "unallocated",
        }
    }

    /// The state of what a mapping describes.
    pub fn of(mapping: Mapping) -> Self {
        match mapping {
            Mapping::Damaged { .. } => Self::Damaged,
            Mapping::Data(_) => Self::Data,
            Mapping::Compressed { .. } => Self::Compressed,
            Mapping::Encrypted { .. } => Self::Encrypted,
            Mapping::Zero(ZeroCause::Layer(_)) => Self::Zero,
            Mapping::Zero(ZeroCause::Unallocated(_) | ZeroCause::PastBackingEnd(_)) => {
                Self::Unallocated
            }
        }
    }
}

/// Bytes of each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums([u64; State::ALL.len()]);

impl Sums {
    /// Bytes of one state.
    pub fn get(&self, state: State) -> u64 {
        self.0[state as usize]
    }

    /// Bytes of all states.
    pub fn total(&self) -> u64 {
        self.0.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }

    /// Bytes that are stored in a file.
    pub fn content(&self) -> u64 {
        State::CONTENT.into_iter().fold(0, |sum, state| sum.saturating_add(self.get(state)))
    }

    /// Adds so many bytes of a state.
    #[inline]
    pub fn add(&mut self, state: State, bytes: u64) {
        let sum = &mut self.0[state as usize];
        *sum = sum.saturating_add(bytes);
    }

    /// Adds another's bytes.
    pub fn add_all(&mut self, other: &Self) {
        for (sum, bytes) in self.0.iter_mut().zip(other.0) {
            *sum = sum.saturating_add(bytes);
        }
    }

    /// What a cell of these bytes is drawn as; none for a cell of no byte.
    ///
    /// Damage goes before content, that before zeros, and zeros before nothing, however few
    /// bytes they are, so that the only cluster of an empty disk is seen. Among the kinds of
    /// content the one with most bytes is drawn, with as many as all content together.
    pub fn look(&self) -> Option<Look> {
        let content = State::CONTENT.into_iter().rev().max_by_key(|&state| self.get(state));
        let states = [
            (State::Damaged, self.get(State::Damaged)),
            (content.unwrap_or(State::Data), self.content()),
            (State::Zero, self.get(State::Zero)),
            (State::Unallocated, self.get(State::Unallocated)),
        ];
        let (state, bytes) = states.into_iter().find(|&(_, bytes)| bytes > 0)?;
        Some(Look { state, bytes, of: self.total() })
    }
}

/// What a cell is drawn as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// The state that stands for the cell.
    pub state: State,
    /// Bytes that it stands for: all content, or all that are of the state.
    pub bytes: u64,
    /// Bytes of the cell.
    pub of: u64,
}

impl Look {
    /// How much of the cell it is.
    pub fn density(&self) -> Density {
        let of = u128::from(self.of);
        let under = |percent: u128| u128::from(self.bytes) * 100 < of * percent;
        match (under(10), under(50), under(90)) {
            (true, ..) => Density::Trace,
            (_, true, _) => Density::Some,
            (.., true) => Density::Most,
            _ => Density::Full,
        }
    }
}

/// How much of a cell is what it is drawn as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Density {
    /// Under 10 %.
    Trace,
    /// Under 50 %.
    Some,
    /// Under 90 %.
    Most,
    /// All, or nearly so.
    Full,
}

/// A strip of the picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Strip {
    /// Bytes of each state in each cell of the picture's [`Grid`]. Cells past the layer's
    /// end hold none.
    pub cells: Vec<Sums>,
    /// Bytes of each state in all, also of what lies past the grid's end.
    pub total: Sums,
    /// How scattered it lies.
    pub fragmentation: Fragmentation,
}

/// One layer by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerStrip {
    /// Its depth: 0 is the active layer.
    pub depth: usize,
    /// What it holds, whatever its overlays and its backing file say.
    pub strip: Strip,
    /// What of it lies past the end of the disk, which is smaller.
    pub beyond: Sums,
}

/// A picture of a disk.
#[derive(Debug)]
pub struct Picture {
    /// The cells of all strips.
    pub grid: Grid,
    /// The disk that the guest sees: all layers, resolved.
    pub whole: Strip,
    /// Parts of the whole that carry on in one layer's file, and zeros of one cause: the
    /// rows of `imgdm map --output=json-full`.
    pub segments: u64,
    /// The layers that were asked for, by depth.
    pub layers: Vec<LayerStrip>,
    /// By depth, the bytes of the whole that each layer answers for. Together they are the
    /// whole's; what no layer has is counted to the last one asked.
    pub visible: Vec<Sums>,
    /// What is wrong with the layers that have a strip, and with others where the whole
    /// comes to it.
    pub damage: DamageList,
}

/// What is to be drawn.
#[derive(Clone, Copy)]
pub struct PictureOptions<'o> {
    /// Cells of each strip.
    pub cells: usize,
    /// Which layers get a strip, by depth.
    pub layers: &'o dyn Fn(usize) -> bool,
    /// Under which data the host's file system is asked for holes.
    pub holes: HoleQuery,
    /// Told how many bytes of [`PictureOptions::work`] more are done.
    pub progress: &'o dyn Fn(ByteLen),
}

impl std::fmt::Debug for PictureOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PictureOptions")
            .field("cells", &self.cells)
            .field("holes", &self.holes)
            .finish_non_exhaustive()
    }
}

impl PictureOptions<'_> {
    /// Bytes of disks that are walked for a picture of `chain`.
    pub fn work(&self, chain: &Chain) -> ByteLen {
        let depths = self.walked(chain).into_iter();
        let sizes = depths.map(|depth| chain.layers()[depth].image.virtual_size().get());
        ByteLen::new(sizes.fold(chain.virtual_size().get(), u64::saturating_add))
    }

    fn wanted(&self, chain: &Chain) -> Vec<usize> {
        (0..chain.layers().len()).filter(|&depth| (self.layers)(depth)).collect()
    }

    /// The layers that are walked by themselves: a layer that is all of the chain is the
    /// whole.
    fn walked(&self, chain: &Chain) -> Vec<usize> {
        if chain.layers().len() == 1 { Vec::new() } else { self.wanted(chain) }
    }
}

impl Picture {
    /// Adds up the bytes of `chain`, going on past damage.
    ///
    /// # Errors
    /// None that an image brings about.
    pub fn of(chain: &Chain, options: &PictureOptions<'_>) -> Result<Self> {
        let grid = Grid::new(chain.virtual_size(), options.cells);
        let mut whole = Whole::new(grid, chain);
        let unit = smallest_cluster(chain);
        let damage = chain.map_windows_past_damage(
            chain.whole(),
            options.holes,
            |window, extents| WholePart::of(grid, window, unit, extents),
            |part| {
                whole.take(&part);
                (options.progress)(part.area.range.length());
                Ok(())
            },
        )?;
        let mut picture = Self {
            grid,
            whole: whole.area.into_strip(),
            segments: whole.segments.count,
            layers: Vec::new(),
            visible: whole.visible,
            damage,
        };
        if let [layer] = chain.layers() {
            if (options.layers)(0) {
                debug_assert_eq!(layer.image.virtual_size(), grid.size());
                let strip = picture.whole.clone();
                picture.layers.push(LayerStrip { depth: 0, strip, beyond: Sums::default() });
            }
            return Ok(picture);
        }
        let walked = options.walked(chain);
        let (layers, damage) = layer_strips(chain, grid, &walked, options)?;
        picture.layers = layers;
        // A walked layer's is all here, the whole's only where it comes to it.
        picture.damage.retain_layers(|depth| !walked.contains(&(depth as usize)));
        picture.damage.append(damage);
        Ok(picture)
    }
}

/// Bytes of the smallest clusters of any layer.
fn smallest_cluster(chain: &Chain) -> u64 {
    chain.layers().iter().map(|layer| layer.image.cluster_size()).min().unwrap_or(1)
}

/// The windows of one layer's disk, aligned, so that neighbouring ones do not read a table
/// twice.
fn layer_windows(
    chain: &Chain,
    depth: usize,
    holes: HoleQuery,
) -> impl Iterator<Item = GuestRange> + use<> {
    let layer = &chain.layers()[depth];
    let end = layer.image.virtual_size().get();
    let size = layer.granularity(holes).saturating_mul(RUNS_PER_WINDOW).clamp(1 << 20, 64 << 30);
    (0..end.div_ceil(size)).map(move |index| {
        let start = index * size;
        GuestRange::new(
            GuestOffset::new(start),
            GuestOffset::new(start.saturating_add(size).min(end)),
        )
    })
}

/// Walks the layers at these depths, each by itself, on all cores.
fn layer_strips(
    chain: &Chain,
    grid: Grid,
    depths: &[usize],
    options: &PictureOptions<'_>,
) -> Result<(Vec<LayerStrip>, DamageList)> {
    let holes = options.holes;
    let mut damage = DamageList::default();
    let mut areas: Vec<_> =
        depths.iter().map(|&depth| Area::of_layer(chain, grid, depth)).collect();
    let mut windows = depths.iter().enumerate().flat_map(|(slot, &depth)| {
        layer_windows(chain, depth, holes).map(move |window| (slot, depth, window))
    });
    loop {
        let batch: Vec<_> = windows.by_ref().take(WINDOWS_AT_ONCE).collect();
        if batch.is_empty() {
            break;
        }
        let done: Vec<Result<(usize, Area, DamageList)>> = batch
            .into_par_iter()
            .map_init(
                || chain.resolver_past_damage(holes),
                |resolver, (slot, depth, window)| {
                    let cluster_size = chain.layers()[depth].image.cluster_size();
                    let mut area = Area::new(grid, window, cluster_size);
                    let number = u32::try_from(depth).unwrap_or(u32::MAX);
                    for run in resolver.layer_runs(depth, window)? {
                        area.push(&last_answer(run, number));
                    }
                    Ok((slot, area, resolver.take_damage()))
                },
            )
            .collect();
        for part in done {
            let (slot, part, found) = part?;
            damage.append(found);
            (options.progress)(part.range.length());
            areas[slot].append(&part);
        }
    }
    let strip = |(&depth, area): (&usize, Area)| LayerStrip {
        depth,
        beyond: area.beyond,
        strip: area.into_strip(),
    };
    Ok((depths.iter().zip(areas).map(strip).collect(), damage))
}

/// The sums of a range of one disk.
#[derive(Debug)]
struct Area {
    grid: Grid,
    range: GuestRange,
    /// The first cell that the range meets.
    first: usize,
    cells: Vec<Sums>,
    /// Past the grid's end.
    beyond: Sums,
    measure: Measure,
    /// The cell that grows, as an index of `cells`, and where it ends.
    at: usize,
    at_end: GuestOffset,
}

impl Area {
    fn new(grid: Grid, range: GuestRange, cluster_size: u64) -> Self {
        let first = grid.cell_at(range.start);
        let last = grid.cell_at(GuestOffset::new(range.end.get().saturating_sub(1)));
        let count = if range.is_empty() { 0 } else { (last + 1).min(grid.cells()) - first };
        Self {
            grid,
            range,
            first,
            cells: vec![Sums::default(); count],
            beyond: Sums::default(),
            measure: Measure::new(cluster_size),
            at: 0,
            at_end: grid.start(first + 1),
        }
    }

    /// All cells, and whatever of the layer lies past them.
    fn of_layer(chain: &Chain, grid: Grid, depth: usize) -> Self {
        let image = &chain.layers()[depth].image;
        let end = GuestOffset::new(image.virtual_size().get().max(grid.size().get()));
        Self::new(grid, GuestRange::new(GuestOffset::ZERO, end), image.cluster_size())
    }

    /// Adds the next extent; they come in order.
    #[inline]
    fn push(&mut self, extent: &Extent) {
        let Extent { start, length, depth, mapping } = *extent;
        self.measure.push(start, length, depth, mapping);
        let state = State::of(mapping);
        let end = extent.end();
        let mut at = start;
        while let Some(cell) = self.cells.get_mut(self.at) {
            let stop = end.min(self.at_end);
            cell.add(state, stop.since(at).get());
            at = at.max(stop);
            if end < self.at_end {
                return;
            }
            self.at += 1;
            self.at_end = self.grid.start(self.first + self.at + 1);
        }
        self.beyond.add(state, end.since(at).get());
    }

    /// Adds the sums of a part of the range; parts come in order.
    fn append(&mut self, part: &Self) {
        let cells = self.cells.iter_mut().skip(part.first - self.first);
        for (cell, sums) in cells.zip(&part.cells) {
            cell.add_all(sums);
        }
        self.beyond.add_all(&part.beyond);
        self.measure.append(&part.measure);
    }

    fn into_strip(self) -> Strip {
        let mut total = self.beyond;
        self.cells.iter().for_each(|cell| total.add_all(cell));
        Strip { cells: self.cells, total, fragmentation: self.measure.finish() }
    }
}

/// How many segments a range has; neighbouring ranges' are joined.
#[derive(Debug, Default)]
struct Segments {
    count: u64,
    first: Option<Extent>,
    last: Option<Extent>,
}

impl Segments {
    #[inline]
    fn push(&mut self, extent: Extent) {
        if self.last.as_mut().is_some_and(|last| last.absorb(&extent)) {
            return;
        }
        if self.count == 1 {
            self.first = self.last;
        }
        self.count += 1;
        self.last = Some(extent);
    }

    /// Adds those right behind. Only the last one here and the first one there can be one.
    fn append(&mut self, next: &Self) {
        let (Some(last), count) = (next.last, next.count) else { return };
        self.push(next.first.unwrap_or(last));
        if count > 1 {
            if self.count == 1 {
                self.first = self.last;
            }
            self.count += count - 1;
            self.last = Some(last);
        }
    }
}

/// The resolved disk, as far as it is known.
struct Whole {
    area: Area,
    segments: Segments,
    visible: Vec<Sums>,
}

/// A window's share of it.
struct WholePart {
    area: Area,
    segments: Segments,
    /// Of the layers that answer in the window.
    visible: Vec<(u32, Sums)>,
}

impl Whole {
    fn new(grid: Grid, chain: &Chain) -> Self {
        Self {
            area: Area::new(grid, chain.whole(), smallest_cluster(chain)),
            segments: Segments::default(),
            visible: vec![Sums::default(); chain.layers().len()],
        }
    }

    fn take(&mut self, part: &WholePart) {
        self.area.append(&part.area);
        self.segments.append(&part.segments);
        for (depth, sums) in &part.visible {
            if let Some(visible) = self.visible.get_mut(*depth as usize) {
                visible.add_all(sums);
            }
        }
    }
}

impl WholePart {
    fn of(grid: Grid, window: GuestRange, unit: u64, extents: Extents<'_>) -> Self {
        let mut part = Self {
            area: Area::new(grid, window, unit),
            segments: Segments::default(),
            visible: Vec::new(),
        };
        extents.for_each(|extent| {
            part.area.push(&extent);
            part.segments.push(extent);
            let state = State::of(extent.mapping);
            match part.visible.iter_mut().rev().find(|(depth, _)| *depth == extent.depth) {
                Some((_, sums)) => sums.add(state, extent.length.get()),
                None => {
                    let mut sums = Sums::default();
                    sums.add(state, extent.length.get());
                    part.visible.push((extent.depth, sums));
                }
            }
        });
        part
    }
}
