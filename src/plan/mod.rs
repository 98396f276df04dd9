//! From extents to what the kernel is to load, and what stands in the way.
//!
//! A [`Plan`] holds counts and table bounds, never the segments themselves: those are
//! resolved anew, one table's worth at a time, when they are printed or loaded.

mod build;
mod census;
mod facts;
mod layout;
mod memory;
mod obstacle;
mod segment;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use crate::chain::{Chain, HoleQuery, Resolver};
use crate::damage::DamageList;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::Sharing;
use crate::open::{OpenPolicy, Warning, WarningKind};
use crate::scratch::{Found, OnError, ScratchContent, ScratchJob, ScratchWork};
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset, Sectors};
use crate::worker::apart;

use build::{Blocked, Stream, cut};
use census::Census;
use facts::{Facts, Piece};
use layout::{Content, Layout, sorted};
pub use memory::KernelMemory;
pub use obstacle::{Obstacle, ObstacleKind};
pub use segment::{
    Backing, BackingId, Bindings, CryptId, LineMaker, MAX_SEGMENTS_PER_TABLE, PlannedCrypt,
    PlannedTable, Segment, SegmentTarget, TableId, TableRole, TableSource,
};

/// Zeros up to this length are mapped to the zero loop by default. dm-zero fails every
/// read-ahead bio, so that buffered reads go page by page where data and dm-zero segments
/// alternate; a long one costs no loop's work. Measured by `cargo bench --bench zeros`:
/// sequential buffered reads got 0.1 of the zero loop's speed with runs of 64 and 256 KiB,
/// 0.3 with 1 MiB, 0.6 with 4 MiB and 0.8 from here on; all others 1 to 1.1.
pub const DEFAULT_ZERO_THRESHOLD: ByteLen = ByteLen::new(16 << 20);

/// Pieces that are resolved, apart from the thread that asks for them, before it gets them.
const PIECES_AT_ONCE: usize = 4096;

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

/// What is done with compressed clusters (`--compressed`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompressedMode {
    /// Inflated into the scratch file.
    #[default]
    Inflate,
    /// Nothing: they stand in the way.
    Refuse,
}

/// How to plan.
#[derive(Clone, Copy, Debug)]
pub struct PlanOptions {
    /// What is done with compressed clusters.
    pub compressed: CompressedMode,
    /// What is done with clusters that can't be read.
    pub on_error: OnError,
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
            compressed: CompressedMode::Inflate,
            on_error: OnError::Refuse,
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
    /// dm-error.
    pub error: u64,
    /// dm-crypt.
    pub crypt: u64,
}

impl SegmentCounts {
    /// All segments.
    pub fn total(self) -> u64 {
        self.linear + self.zero + self.error + self.crypt
    }

    /// Adds those of another table.
    fn add(&mut self, more: Self) {
        self.linear += more.linear;
        self.zero += more.zero;
        self.error += more.error;
        self.crypt += more.crypt;
    }
}

/// What to load for a chain, and what stands in the way.
#[derive(Debug)]
pub struct Plan<'c> {
    chain: &'c Chain,
    facts: Facts,
    holes: HoleQuery,
    layout: Layout,
    obstacles: Vec<Obstacle>,
    damage: Vec<Obstacle>,
    /// The pieces of the virtual disk, where they are few.
    few: Option<Vec<Piece>>,
    /// Metadata is damaged: to be gone past, as the plan is not for loading.
    is_damaged: bool,
}

impl<'c> Plan<'c> {
    /// Resolves the whole chain once and lays out the tables.
    ///
    /// # Errors
    /// An encrypted layer's header is invalid. Obstacles are no errors, damaged metadata
    /// among them: see [`obstacles`](Self::obstacles).
    pub fn new(chain: &'c Chain, options: PlanOptions) -> Result<Self> {
        Self::with_found(chain, options, &[])
    }

    /// The same, with what writing the scratch file found.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_found(chain: &'c Chain, options: PlanOptions, found: &[Found]) -> Result<Self> {
        let facts = Facts::new(chain, options, sorted(found));
        // Room for the files that need a sector each in the last table.
        let files = u64::from(facts.zero_backing.0);
        let max_segments = options.max_segments.saturating_sub(files).max(1);
        let census = Census::of(chain, &facts, Stream::Guest, options.holes, max_segments)?;
        let layout = Layout::new(chain, &facts, &census, options, max_segments)?;
        let Census { blocked, damage: found_damage, few, .. } = census;
        let blocked: Vec<_> = blocked.into_values().collect();
        let mut plan = Self {
            chain,
            facts,
            holes: options.holes,
            layout,
            obstacles: Vec::new(),
            damage: Vec::new(),
            few,
            is_damaged: !found_damage.is_empty(),
        };
        plan.list_damage(&found_damage);
        plan.list_obstacles(&blocked, options.on_error);
        Ok(plan)
    }

    fn list_damage(&mut self, found: &DamageList) {
        for (depth, found) in found.layers() {
            let layer = &self.chain.layers()[depth as usize];
            self.obstacles.push(Obstacle {
                kind: ObstacleKind::Damaged,
                path: layer.source.path().to_owned(),
                count: found.count,
                first: Some(found.first),
                detail: layer.damage_at(found.first).map(|error| error.without_path()),
            });
        }
    }

    fn list_obstacles(&mut self, blocked: &[Blocked], on_error: OnError) {
        for blocked in blocked {
            let obstacle = Obstacle {
                kind: blocked.kind,
                path: self.file(blocked.backing).map_or_else(PathBuf::new, |f| f.path().to_owned()),
                count: blocked.count,
                first: Some(blocked.first),
                detail: None,
            };
            if blocked.kind == ObstacleKind::PastFileEnd && on_error != OnError::Refuse {
                self.damage.push(obstacle);
            } else {
                self.obstacles.push(obstacle);
            }
        }
        for crypt in &self.layout.crypts {
            let layer = &self.chain.layers()[crypt.layer as usize];
            if matches!(layer.image.crypt_header(), Ok(Some(header)) if !header.has_key()) {
                let path = layer.source.path();
                self.obstacles.push(Obstacle::of_file(ObstacleKind::NoKeySlot, path));
            }
        }
        if self.chain.virtual_size().is_zero() {
            let path = self.chain.layers()[0].source.path();
            self.obstacles.push(Obstacle::of_file(ObstacleKind::Empty, path));
        }
    }

    /// The chain that the plan is of.
    pub fn chain(&self) -> &'c Chain {
        self.chain
    }

    /// The file of a backing that is one.
    pub fn file(&self, backing: BackingId) -> Option<&'c Source> {
        match self.layout.backings.get(backing.0 as usize)? {
            Backing::File { layer, role } => Some(self.chain.layers()[*layer as usize].file(*role)),
            Backing::Zero { .. } | Backing::Scratch { .. } | Backing::Table(_) => None,
        }
    }

    /// What stands in the way of attaching, all of it.
    pub fn obstacles(&self) -> &[Obstacle] {
        &self.obstacles
    }

    /// Adds something that stands in the way.
    pub fn add_obstacle(&mut self, obstacle: Obstacle) {
        self.obstacles.push(obstacle);
    }

    /// What can't be read and, as was asked for, reads as zeros or fails.
    pub fn damage(&self) -> &[Obstacle] {
        &self.damage
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
                WarningKind::Damaged(what) => {
                    let mut obstacle = Obstacle::of_file(ObstacleKind::Damaged, path);
                    obstacle.detail = Some(what.clone());
                    self.obstacles.push(obstacle);
                    continue;
                }
                _ => continue,
            };
            self.obstacles.push(Obstacle::of_file(kind, path));
        }
    }

    /// Files under 512 bytes, which no loop device can show and so nothing can hold.
    pub fn unheld_files(&self) -> impl Iterator<Item = &'c Source> {
        self.layout.unheld.iter().filter_map(|&id| self.file(id))
    }

    /// Segments by target, over all tables.
    pub fn counts(&self) -> SegmentCounts {
        self.layout.counts
    }

    /// Loop devices that attaching takes.
    pub fn loops(&self) -> u64 {
        let is_loop = |backing: &&Backing| !matches!(backing, Backing::Table(_));
        let held = self.layout.backings.iter().filter(is_loop).count();
        held.saturating_sub(self.layout.unheld.len()) as u64
    }

    /// A walker over the chain, past its damage where the plan has any.
    fn resolver(&self) -> Resolver<'c> {
        if self.is_damaged {
            self.chain.resolver_past_damage(self.holes)
        } else {
            self.chain.resolver(self.holes)
        }
    }

    /// The segments of a stretch of a stream, window by window.
    fn for_each_guest_segment(
        &self,
        stream: Stream,
        guest: GuestRange,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        let ciphertext_facts = self.facts.for_ciphertext();
        let facts = if stream == Stream::Guest { &self.facts } else { &ciphertext_facts };
        let mut finish = |piece: &Piece| {
            facts.segments(piece, guest.start, |segment| each(self.with_real_backing(segment)?))
        };
        if let (Stream::Guest, Some(few)) = (stream, &self.few) {
            return few.iter().try_for_each(finish);
        }
        let mut resolver = self.resolver();
        let mut windows = self.chain.windows(guest, self.holes);
        let mut pending: Option<Piece> = None;
        let mut gather = |pieces: &mut Vec<Piece>| {
            for window in windows.by_ref() {
                let extents = resolver.resolve(window)?;
                let (last, _) = cut(facts, stream, extents, |piece| pieces.push(*piece), |_| ());
                pieces.extend(last);
                if pieces.len() >= PIECES_AT_ONCE {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut pieces = Vec::new();
        let mut more = true;
        while more {
            pieces.clear();
            more = apart(|| gather(&mut pieces))?;
            for &piece in &pieces {
                if pending.as_mut().is_some_and(|pending| pending.absorb(&piece)) {
                    continue;
                }
                if let Some(done) = pending.replace(piece) {
                    finish(&done)?;
                }
            }
        }
        pending.map_or(Ok(()), |last| finish(&last))
    }

    fn with_real_backing(&self, mut segment: Segment) -> Result<Segment> {
        if let SegmentTarget::Linear { backing, .. } = &mut segment.target {
            let id = self.layout.ids.get(backing.0 as usize).copied().flatten();
            *backing = id.ok_or_else(|| {
                Error::new(ErrorKind::NotRepresentable(format!(
                    "sector {} lies on a backing that the plan has not (has the image changed?)",
                    segment.start
                )))
            })?;
        }
        Ok(segment)
    }

    /// The jobs of one stream.
    fn for_each_job_window(
        &self,
        stream: Stream,
        each: &mut dyn FnMut(&[ScratchJob]) -> Result<()>,
    ) -> Result<()> {
        let jobs_of = |_, extents: crate::chain::Extents<'_>| {
            let mut jobs = Vec::new();
            cut(&self.facts, stream, extents, |_| (), |job| jobs.push(job));
            jobs
        };
        let take = |jobs: Vec<ScratchJob>| if jobs.is_empty() { Ok(()) } else { each(&jobs) };
        let whole = self.chain.whole();
        if self.is_damaged {
            return self.chain.map_windows_past_damage(whole, self.holes, jobs_of, take).map(drop);
        }
        self.chain.map_windows(whole, self.holes, jobs_of, take)
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
        Err(Error::new(if any(ObstacleKind::Damaged) || any(ObstacleKind::PastFileEnd) {
            ErrorKind::InvalidImage(message)
        } else if any(ObstacleKind::InUse) {
            ErrorKind::InUse(message)
        } else if any(ObstacleKind::NoKeySlot) {
            ErrorKind::WrongKey(message)
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
        &self.layout.backings
    }

    fn tables(&self) -> &[PlannedTable] {
        &self.layout.tables
    }

    fn crypts(&self) -> &[PlannedCrypt] {
        &self.layout.crypts
    }

    fn scratch_may_fail(&self) -> bool {
        self.facts.options.on_error == OnError::ErrorTarget
    }

    fn for_each_segment(
        &self,
        table: TableId,
        each: &mut dyn FnMut(Segment) -> Result<()>,
    ) -> Result<()> {
        let at = table.0 as usize;
        let (Some(content), Some(planned)) =
            (self.layout.contents.get(at), self.layout.tables.get(at))
        else {
            return Ok(());
        };
        let mut start = 0;
        let mut linear = |backing, offset, length: Sectors| {
            let target = SegmentTarget::Linear { backing, offset };
            let segment = Segment { start: Sectors::new(start), length, target };
            start += length.get();
            segment
        };
        match content {
            Content::Stretch { stream, guest, keepers } => {
                self.for_each_guest_segment(*stream, *guest, each)?;
                let kept = keepers.len() as u64;
                linear(BackingId(0), Sectors::default(), Sectors::new(planned.size.get() - kept));
                keepers
                    .iter()
                    .try_for_each(|&id| each(linear(id, Sectors::default(), Sectors::new(1))))
            }
            Content::Join(parts) => parts
                .iter()
                .try_for_each(|&(backing, offset, length)| each(linear(backing, offset, length))),
            Content::Crypt { crypt, below } => each(Segment {
                start: Sectors::default(),
                length: planned.size,
                target: SegmentTarget::Crypt { backing: *below, crypt: *crypt },
            }),
        }
    }
}

impl ScratchWork for Plan<'_> {
    fn scratch_bytes(&self) -> u64 {
        self.layout.scratch_bytes
    }

    fn scratch_length(&self) -> u64 {
        self.layout.scratch_length
    }

    fn for_each_window(&self, each: &mut dyn FnMut(&[ScratchJob]) -> Result<()>) -> Result<()> {
        for stream in self.job_streams() {
            self.for_each_job_window(stream, each)?;
        }
        let tails: Vec<_> = self.tail_jobs().collect();
        if tails.is_empty() { Ok(()) } else { each(&tails) }
    }

    fn for_each_job(&self, each: &mut (dyn FnMut(&ScratchJob) + Send)) -> Result<()> {
        apart(|| {
            let mut resolver = self.resolver();
            for stream in self.job_streams() {
                for window in self.chain.windows(self.chain.whole(), self.holes) {
                    let extents = resolver.resolve(window)?;
                    cut(&self.facts, stream, extents, |_| (), |job| each(&job));
                }
            }
            self.tail_jobs().for_each(|job| each(&job));
            Ok(())
        })
    }
}

impl Plan<'_> {
    /// The streams that jobs are of, the guest's first.
    fn job_streams(&self) -> impl Iterator<Item = Stream> {
        let ciphertexts = self.layout.contents.iter().filter_map(|content| match content {
            Content::Stretch { stream: stream @ Stream::Ciphertext(_), guest, .. } => {
                (guest.start == GuestOffset::ZERO).then_some(*stream)
            }
            _ => None,
        });
        let some = self.layout.scratch_bytes > 0;
        some.then_some(Stream::Guest).into_iter().chain(ciphertexts.filter(move |_| some))
    }

    fn tail_jobs(&self) -> impl Iterator<Item = ScratchJob> {
        self.layout.tails.iter().map(|placed| {
            let file = self.chain.layers()[placed.tail.depth as usize].file(placed.tail.role);
            ScratchJob {
                at: placed.at,
                length: placed.tail.end - placed.shown,
                guest: placed.tail.first,
                layer: placed.tail.depth,
                what: ScratchContent::Copy {
                    role: placed.tail.role,
                    host: HostOffset::new(placed.shown),
                    bytes: file.length().get() - placed.shown,
                },
            }
        })
    }
}
