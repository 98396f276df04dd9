//! From extents to what the kernel is to load, and what stands in the way.
//!
//! A [`Plan`] holds counts and table bounds, never the segments themselves: those are
//! resolved anew, one table's worth at a time, when they are printed or loaded.

mod build;
mod census;
mod obstacle;
mod segment;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::chain::{Chain, HoleQuery};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::Sharing;
use crate::open::{OpenPolicy, Warning, WarningKind};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, SECTOR_SIZE, Sectors};

use build::{Blocked, Facts, Piece, chain_files, cut};
use census::Census;
pub use obstacle::{Obstacle, ObstacleKind};
pub use segment::{
    Backing, BackingId, Bindings, MAX_SEGMENTS_PER_TABLE, PlannedTable, Segment, SegmentTarget,
    TableId, TableRole, TableSource,
};

/// What a dm-linear target costs the kernel in bytes, lookup tree included (measured on
/// a table of 1,048,576).
const KERNEL_BYTES_PER_SEGMENT: u64 = 113;
/// What a loop device or a mapped device costs the kernel in bytes, roughly: its queue,
/// its disk and its worker.
const KERNEL_BYTES_PER_DEVICE: u64 = 64 << 10;

/// Zeros up to this length are mapped to the zero loop by default. dm-zero fails every
/// read-ahead bio, so a table that alternates data with short dm-zero segments makes
/// buffered reads go page by page; a long one costs one segment and no loop's work.
pub const DEFAULT_ZERO_THRESHOLD: ByteLen = ByteLen::new(1 << 20);

/// How zeros are served (`--zero`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroMode {
    /// Long runs by dm-zero, short ones by the zero loop, or by the file itself where a
    /// hole lies between its data.
    #[default]
    Auto,
    /// All by dm-zero.
    Dm,
    /// All by the zero loop.
    Loop,
}

/// How to plan.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// How zeros are served.
    pub zero: ZeroMode,
    /// From this length on zeros are a long run.
    pub zero_threshold: ByteLen,
    /// Where the files are asked for holes.
    pub holes: HoleQuery,
    /// Segments of a table at most; [`MAX_SEGMENTS_PER_TABLE`] but in tests.
    pub max_segments: u64,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            zero: ZeroMode::Auto,
            zero_threshold: DEFAULT_ZERO_THRESHOLD,
            holes: HoleQuery::DataFiles,
            max_segments: MAX_SEGMENTS_PER_TABLE,
        }
    }
}

/// How many segments of each target a plan has, over all its tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SegmentCounts {
    /// dm-linear.
    pub linear: u64,
    /// dm-zero.
    pub zero: u64,
}

impl SegmentCounts {
    /// All segments.
    pub fn total(self) -> u64 {
        self.linear + self.zero
    }
}

/// A table that is a stretch of the virtual disk.
#[derive(Clone, Debug)]
struct Stretch {
    guest: GuestRange,
    /// Files that no segment uses, mapped one sector each past the guest's end.
    keepers: Vec<BackingId>,
}

/// What to load for a chain, and what stands in the way.
#[derive(Debug)]
pub struct Plan<'c> {
    chain: &'c Chain,
    facts: Facts,
    holes: HoleQuery,
    max_segments: u64,
    backings: Vec<Backing>,
    tables: Vec<PlannedTable>,
    /// One for each table but a stacking top.
    stretches: Vec<Stretch>,
    counts: SegmentCounts,
    obstacles: Vec<Obstacle>,
    unheld: Vec<PathBuf>,
}

impl<'c> Plan<'c> {
    /// Resolves the whole chain once and lays out the tables.
    ///
    /// # Errors
    /// What resolving says. Obstacles are no errors: see [`obstacles`](Self::obstacles).
    pub fn new(chain: &'c Chain, options: PlanOptions) -> Result<Self> {
        let mut backings: Vec<Backing> =
            chain_files(chain).map(|(layer, role)| Backing::File { layer, role }).collect();
        let facts = Facts::new(chain, options);
        let files = backings.len();
        // Room for the files that need a sector each in the last table.
        let max_segments = options.max_segments.saturating_sub(files as u64).max(1);
        let census = Census::of(chain, &facts, files, options.holes, max_segments)?;
        let Census { counts, longest_zero, used, splits, blocked, .. } = census;
        if longest_zero > Sectors::default() {
            backings.push(Backing::Zero { length: longest_zero });
        }
        let mut plan = Self {
            chain,
            facts,
            holes: options.holes,
            max_segments,
            backings,
            tables: Vec::new(),
            stretches: Vec::new(),
            counts,
            obstacles: Vec::new(),
            unheld: Vec::new(),
        };
        let keepers = plan.keepers(&used);
        plan.lay_out(&splits, keepers);
        plan.list_obstacles(blocked.values());
        Ok(plan)
    }

    /// The files that no segment uses, but that have to stay open and locked.
    fn keepers(&mut self, used: &[bool]) -> Vec<BackingId> {
        let mut keepers = Vec::new();
        for ((id, &used), (layer, role)) in
            (0..).map(BackingId).zip(used).zip(chain_files(self.chain))
        {
            let file = self.chain.layers()[layer as usize].file(role);
            if used {
                continue;
            }
            if file.length().floor_to_sector().is_zero() {
                self.unheld.push(file.path().to_owned());
            } else {
                keepers.push(id);
            }
        }
        keepers
    }

    fn lay_out(&mut self, splits: &[GuestOffset], keepers: Vec<BackingId>) {
        let whole = self.chain.whole();
        let bounds: Vec<GuestOffset> =
            [whole.start].into_iter().chain(splits.iter().copied()).chain([whole.end]).collect();
        let total = self.counts.total();
        let stacked = !splits.is_empty() || !keepers.is_empty();
        for (index, pair) in (0u32..).zip(bounds.windows(2)) {
            let guest = GuestRange::new(pair[0], pair[1]);
            let is_last = pair[1] == whole.end;
            let keepers = if is_last { keepers.clone() } else { Vec::new() };
            let kept = keepers.len() as u64;
            let before = u64::from(index) * self.max_segments;
            self.tables.push(PlannedTable {
                role: if stacked { TableRole::Inner } else { TableRole::Top },
                size: Sectors::new(guest.length().get() / SECTOR_SIZE + kept),
                segments: (total - before).min(self.max_segments) + kept,
            });
            self.stretches.push(Stretch { guest, keepers });
            self.counts.linear += kept;
            if stacked {
                self.backings.push(Backing::Table(TableId(index)));
            }
        }
        if stacked {
            let segments = self.stretches.len() as u64;
            self.tables.push(PlannedTable { role: TableRole::Top, size: self.size(), segments });
            self.counts.linear += segments;
        }
    }

    fn list_obstacles<'b>(&mut self, blocked: impl Iterator<Item = &'b Blocked>) {
        self.obstacles = blocked
            .map(|blocked| Obstacle {
                kind: blocked.kind,
                path: self.file(blocked.backing).map_or_else(PathBuf::new, |f| f.path().to_owned()),
                count: blocked.count,
                first: Some(blocked.first),
            })
            .collect();
        if self.chain.virtual_size().is_zero() {
            self.obstacles.push(Obstacle {
                kind: ObstacleKind::Empty,
                path: self.chain.layers()[0].source.path().to_owned(),
                count: 1,
                first: None,
            });
        }
    }

    /// The chain that the plan is of.
    pub fn chain(&self) -> &'c Chain {
        self.chain
    }

    /// The file of a backing that is one.
    pub fn file(&self, backing: BackingId) -> Option<&'c Source> {
        match self.backings.get(backing.0 as usize)? {
            Backing::File { layer, role } => Some(self.chain.layers()[*layer as usize].file(*role)),
            Backing::Zero { .. } | Backing::Table(_) => None,
        }
    }

    /// What stands in the way of attaching, all of it.
    pub fn obstacles(&self) -> &[Obstacle] {
        &self.obstacles
    }

    /// Adds as obstacles what was only a warning when the files were opened, and would
    /// have been refused under `policy`.
    pub fn add_obstacles_of(&mut self, warnings: &[Warning], policy: &OpenPolicy) {
        for Warning { path, kind } in warnings {
            let kind = match kind {
                WarningKind::InUse(_) if policy.sharing == Sharing::Readers => ObstacleKind::InUse,
                WarningKind::UndeclaredBackingFormat(_) if !policy.probe_backing => {
                    ObstacleKind::UndeclaredBackingFormat
                }
                WarningKind::Corrupt if !policy.allow_corrupt => ObstacleKind::Corrupt,
                WarningKind::ChangedBacking if !policy.allow_changed_backing => {
                    ObstacleKind::ChangedBacking
                }
                _ => continue,
            };
            self.obstacles.push(Obstacle { kind, path: path.clone(), count: 1, first: None });
        }
    }

    /// Files under 512 bytes, which no loop device can show and so nothing can hold.
    pub fn unheld_files(&self) -> &[PathBuf] {
        &self.unheld
    }

    /// Segments by target, over all tables.
    pub fn counts(&self) -> SegmentCounts {
        self.counts
    }

    /// Loop devices that attaching takes.
    pub fn loops(&self) -> u64 {
        let is_loop = |backing: &&Backing| !matches!(backing, Backing::Table(_));
        let held = self.backings.iter().filter(is_loop).count();
        held.saturating_sub(self.unheld.len()) as u64
    }

    /// Kernel memory that the attachment takes, in bytes, estimated.
    pub fn kernel_bytes(&self) -> u64 {
        self.counts.total() * KERNEL_BYTES_PER_SEGMENT
            + (self.loops() + self.tables.len() as u64) * KERNEL_BYTES_PER_DEVICE
    }

    /// Bytes of scratch space that attaching takes.
    pub fn scratch_bytes(&self) -> u64 {
        0
    }

    /// The segments of a stretch of the virtual disk, window by window.
    fn for_each_guest_segment(
        &self,
        guest: GuestRange,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        let mut resolver = self.chain.resolver(self.holes);
        let mut pieces = Vec::new();
        let mut pending: Option<Piece> = None;
        for window in self.chain.windows(guest) {
            pieces.clear();
            let extents = resolver.resolve(window)?;
            let (last, _) = cut(&self.facts, extents, |piece| pieces.push(*piece));
            for &piece in pieces.iter().chain(&last) {
                if pending.as_mut().is_some_and(|pending| pending.absorb(&piece)) {
                    continue;
                }
                if let Some(done) = pending.replace(piece) {
                    each(self.facts.segment(&done, guest.start))?;
                }
            }
        }
        pending.map_or(Ok(()), |last| each(self.facts.segment(&last, guest.start)))
    }

    /// Fails with the whole list where anything stands in the way.
    ///
    /// # Errors
    /// `NotRepresentable`, or `InvalidImage` where the image itself is damaged.
    pub fn check_attachable(&self) -> Result<()> {
        if self.obstacles.is_empty() {
            return Ok(());
        }
        let list: Vec<_> = self.obstacles.iter().map(|o| format!("\n  {o}")).collect();
        let message = format!("the image can't be attached:{}", list.concat());
        let any = |kind| self.obstacles.iter().any(|o: &Obstacle| o.kind == kind);
        Err(Error::new(if any(ObstacleKind::PastFileEnd) {
            ErrorKind::InvalidImage(message)
        } else if any(ObstacleKind::InUse) {
            ErrorKind::InUse(message)
        } else {
            ErrorKind::NotRepresentable(message)
        }))
    }
}

impl TableSource for Plan<'_> {
    fn size(&self) -> Sectors {
        // The virtual size is a multiple of 512 for every format.
        Sectors::from_bytes(self.chain.virtual_size().floor_to_sector().get()).unwrap_or_default()
    }

    fn backings(&self) -> &[Backing] {
        &self.backings
    }

    fn tables(&self) -> &[PlannedTable] {
        &self.tables
    }

    fn for_each_segment(
        &self,
        table: TableId,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        if let Some(stretch) = self.stretches.get(table.0 as usize) {
            self.for_each_guest_segment(stretch.guest, each)?;
            let past_the_end = stretch.guest.length().get() / SECTOR_SIZE;
            for (start, &backing) in (past_the_end..).zip(&stretch.keepers) {
                each(Segment {
                    start: Sectors::new(start),
                    length: Sectors::new(1),
                    target: SegmentTarget::Linear { backing, offset: Sectors::default() },
                })?;
            }
            return Ok(());
        }
        // The top one over the inner tables.
        let first_table = self.backings.len() - self.stretches.len();
        let mut start = 0;
        for (index, stretch) in self.stretches.iter().enumerate() {
            let backing = BackingId(u32::try_from(first_table + index).unwrap_or(u32::MAX));
            let length = stretch.guest.length().get() / SECTOR_SIZE;
            each(Segment {
                start: Sectors::new(start),
                length: Sectors::new(length),
                target: SegmentTarget::Linear { backing, offset: Sectors::default() },
            })?;
            start += length;
        }
        Ok(())
    }
}
