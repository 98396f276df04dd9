//! Folding the layers of a backing chain, top first, into extents.
//!
//! The guest's disk is walked in windows, small enough that one window's runs fit in
//! bounded memory whatever the image holds. In a window each layer is asked once for
//! what the layers above leave to it; a layer that has nothing there costs one call,
//! so the work grows with the metadata read and not with layers times extents.

use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{Error, ErrorKind, Result};
use crate::extent::{Coalescer, Extent, Mapping, ZeroCause};
use crate::format::{BackingReference, Format, ImageFormat, Scratch};
use crate::holes::{Piece, for_each_piece};
use crate::source::Source;
use crate::status::{BlockStatus, FileRole, StatusRun, ZeroStatus};
use crate::units::{ByteLen, GuestOffset, GuestRange};

#[cfg(test)]
pub(crate) mod tests;

/// Most runs that one layer can give in one window.
const RUNS_PER_WINDOW: u64 = 1 << 11;

/// Windows that a thread resolves before their results are taken in order.
const WINDOWS_PER_THREAD: usize = 32;

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
    layers: Vec<Layer>,
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
        Ok(Self { layers })
    }

    /// The layers, the active one first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Size of the virtual disk: the active layer's.
    pub fn virtual_size(&self) -> ByteLen {
        self.layers[0].image.virtual_size()
    }

    /// The whole virtual disk.
    pub fn whole(&self) -> GuestRange {
        GuestRange::new(GuestOffset::ZERO, GuestOffset::new(self.virtual_size().get()))
    }

    /// A walker over this chain, with its own working memory.
    pub fn resolver(&self, holes: HoleQuery) -> Resolver<'_> {
        Resolver {
            chain: self,
            holes,
            scratch: Scratch::default(),
            runs: Vec::new(),
            split: Vec::new(),
            open: Vec::new(),
            left: Vec::new(),
            extents: Vec::new(),
        }
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
        let mut resolver = self.resolver(holes);
        let mut coalescer = Coalescer::default();
        for window in self.windows(range) {
            for &extent in resolver.resolve(window)? {
                if let Some(done) = coalescer.push(extent) {
                    each(&done)?;
                }
            }
        }
        coalescer.finish().as_ref().map_or(Ok(()), each)
    }

    /// Resolves the windows of `range` on all cores: `work` makes something of each
    /// window's extents, and `take` gets these things in guest order, a bounded number
    /// of windows behind.
    ///
    /// # Errors
    /// The first in guest order of what resolving, `work` or `take` says; `take` has had
    /// all that comes before it.
    pub fn map_windows<T: Send>(
        &self,
        range: GuestRange,
        holes: HoleQuery,
        work: impl Fn(GuestRange, &[Extent]) -> T + Sync,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        let batch_size = rayon::current_num_threads() * WINDOWS_PER_THREAD;
        let mut windows = self.windows(range);
        loop {
            let batch: Vec<_> = windows.by_ref().take(batch_size).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let done: Vec<Result<T>> = batch
                .into_par_iter()
                .with_min_len(WINDOWS_PER_THREAD / 4)
                .map_init(
                    || self.resolver(holes),
                    |resolver, window| Ok(work(window, resolver.resolve(window)?)),
                )
                .collect();
            for thing in done {
                take(thing?)?;
            }
        }
    }

    /// Cuts `range` into the windows in which it is best resolved.
    pub fn windows(&self, range: GuestRange) -> impl Iterator<Item = GuestRange> + use<> {
        let finest = self.layers.iter().map(|layer| layer.image.granularity()).min().unwrap_or(512);
        let size = (finest.saturating_mul(RUNS_PER_WINDOW)).clamp(8 << 20, 4 << 30);
        let mut at = range.start;
        let end = range.end;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            // Aligned, so that neighbouring windows do not read a table twice.
            let next = GuestOffset::new((at.get() / size).saturating_add(1).saturating_mul(size));
            let window = GuestRange::new(at, next.min(end));
            at = window.end;
            Some(window)
        })
    }
}

/// Resolves windows of a chain; keeps its working memory between them.
#[derive(Debug)]
pub struct Resolver<'c> {
    chain: &'c Chain,
    holes: HoleQuery,
    scratch: Scratch,
    runs: Vec<StatusRun>,
    split: Vec<StatusRun>,
    open: Vec<StatusRun>,
    left: Vec<StatusRun>,
    extents: Vec<Extent>,
}

impl Resolver<'_> {
    /// The extents of `window` in guest order, without gap, joined where they carry each
    /// other on.
    ///
    /// # Errors
    /// What a layer's metadata says, with its file's path.
    pub fn resolve(&mut self, window: GuestRange) -> Result<&[Extent]> {
        self.extents.clear();
        if window.is_empty() {
            return Ok(&self.extents);
        }
        self.open.clear();
        self.open.push(StatusRun {
            start: window.start,
            length: window.length(),
            status: BlockStatus::Unallocated(None),
        });
        let mut layers_with_rows = 0;
        for depth in 0..self.chain.layers.len() {
            let rows_before = self.extents.len();
            self.fold_layer(depth)?;
            layers_with_rows += usize::from(self.extents.len() > rows_before);
            if self.open.is_empty() {
                break;
            }
        }
        if layers_with_rows > 1 {
            // Each layer's rows are in order already: a merge of sorted runs.
            self.extents.sort_by_key(|extent| extent.start);
            self.extents.dedup_by(|next, extent| extent.absorb(next));
        }
        Ok(&self.extents)
    }

    /// Asks layer `depth` for the open runs: rows for what it answers, and the open
    /// runs anew for what it leaves to its backing file.
    fn fold_layer(&mut self, depth: usize) -> Result<()> {
        let layer = &self.chain.layers[depth];
        let backing_size = self.chain.layers.get(depth + 1).map(|l| l.image.virtual_size());
        let (Some(first), Some(last)) = (self.open.first(), self.open.last()) else {
            return Ok(());
        };
        let hull = GuestRange::new(first.start, last.end());
        self.runs.clear();
        layer
            .image
            .status(hull, &mut self.scratch, &mut self.runs)
            .map_err(|error| error.at_path(layer.source.path()))?;
        self.ask_for_holes(layer);

        if let ([run], Some(backing_size)) = (self.runs.as_slice(), backing_size)
            && matches!(run.status, BlockStatus::Unallocated(_))
            && run.range() == hull
            && hull.end.get() <= backing_size.get()
        {
            return Ok(()); // Nothing here: the open runs are the next layer's as they are.
        }

        let depth_number = u32::try_from(depth).unwrap_or(u32::MAX);
        self.left.clear();
        if self.open.len() == 1 {
            self.extents.reserve(self.runs.len());
            for &run in &self.runs {
                answer(run, depth_number, backing_size, &mut self.extents, &mut self.left);
            }
            std::mem::swap(&mut self.open, &mut self.left);
            return Ok(());
        }
        let mut open = self.open.iter().peekable();
        for run in &self.runs {
            while let Some(wanted) = open.peek() {
                if let Some(part) = run.clipped(wanted.range()) {
                    answer(part, depth_number, backing_size, &mut self.extents, &mut self.left);
                }
                if wanted.end() > run.end() {
                    break;
                }
                open.next();
            }
        }
        std::mem::swap(&mut self.open, &mut self.left);
        Ok(())
    }

    /// Splits the data runs by the holes of the file below, where those are wanted.
    fn ask_for_holes(&mut self, layer: &Layer) {
        let wanted = |role| match self.holes {
            HoleQuery::Deep => true,
            _ if layer.image.looks_preallocated() => true,
            HoleQuery::DataFiles => role == FileRole::DataFile,
            HoleQuery::AsQemu => false,
        };
        // A raw layer has asked already: that is its status.
        if layer.image.format() == Format::Raw
            || !(wanted(FileRole::Image)
                || (layer.data_file.is_some() && wanted(FileRole::DataFile)))
        {
            return;
        }
        self.split.clear();
        for run in &self.runs {
            match run.status {
                BlockStatus::Data(place) if wanted(place.file) => {
                    let split = &mut self.split;
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
                _ => self.split.push(*run),
            }
        }
        std::mem::swap(&mut self.runs, &mut self.split);
    }
}

/// Turns one run into a row, or into an open run where the backing file answers.
#[inline]
fn answer(
    run: StatusRun,
    depth: u32,
    backing_size: Option<ByteLen>,
    extents: &mut Vec<Extent>,
    left: &mut Vec<StatusRun>,
) {
    let StatusRun { start, length, status } = run;
    let mut row = |start, length, mapping| {
        let next = Extent { start, length, depth, mapping };
        // Rows of one layer come in order, but not without gap.
        if let Some(last) = extents.last_mut()
            && last.end() == start
            && last.absorb(&next)
        {
            return;
        }
        extents.push(next);
    };
    match status {
        BlockStatus::Data(place) => row(start, length, Mapping::Data(place)),
        BlockStatus::Encrypted { place, cipher } => {
            row(start, length, Mapping::Encrypted { place, cipher });
        }
        BlockStatus::Compressed { host, stream_length, cluster } => {
            row(start, length, Mapping::Compressed { host, stream_length, cluster });
        }
        BlockStatus::Zero(zero) => row(start, length, Mapping::Zero(ZeroCause::Layer(zero))),
        BlockStatus::Unallocated(place) => {
            let Some(backing_size) = backing_size else {
                return row(start, length, Mapping::Zero(ZeroCause::Unallocated(place)));
            };
            let backing_end = GuestOffset::new(backing_size.get());
            let inside = GuestRange::new(start, run.end().min(backing_end));
            if !inside.is_empty() {
                match left.last_mut() {
                    Some(last) if last.end() == inside.start => {
                        last.length = inside.end.since(last.start);
                    }
                    _ => left.push(StatusRun {
                        start: inside.start,
                        length: inside.length(),
                        status: BlockStatus::Unallocated(None),
                    }),
                }
            }
            let past = GuestRange::new(start.max(backing_end), run.end());
            if !past.is_empty() {
                let place = place.map(|place| place.advanced(past.start.since(start)));
                row(past.start, past.length(), Mapping::Zero(ZeroCause::PastBackingEnd(place)));
            }
        }
    }
}
