//! Resolving a disk window by window, on all cores.

use rayon::prelude::*;

use super::ahead::{InFileOrder, ReadAhead};
use super::{Chain, Extents, HoleQuery, Layer, Resolver};
use crate::damage::DamageList;
use crate::error::Result;
use crate::units::{GuestOffset, GuestRange};
use crate::worker::apart;

/// Most runs that one layer can give in one window.
pub(super) const RUNS_PER_WINDOW: u64 = 1 << 12;

/// Windows that a thread resolves before their results are taken in order.
const WINDOWS_PER_THREAD: usize = 16;

/// Windows that are resolved before their results are taken, with however many threads:
/// the text of a map has some 600 KiB for each (of a raw file that is nothing but holes
/// and data of 4 KiB, 8 MiB).
const WINDOWS_AT_ONCE: usize = 32;

/// Windows that are resolved in the order in which their tables lie in the files: of a disk of
/// 1 TiB in clusters of 64 KiB, all.
pub(super) const WINDOWS_IN_FILE_ORDER: usize = 4096;

/// Most layers of a chain that is.
const LAYERS_IN_FILE_ORDER: usize = 32;

impl Chain {
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
        work: impl Fn(GuestRange, Extents<'_>) -> T + Sync,
        take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        self.map_windows_by(|| self.resolver(holes), range, holes, work, take).map(drop)
    }

    /// As [`map_windows`](Self::map_windows), but going on past damage, which it gives
    /// back.
    ///
    /// # Errors
    /// The first in guest order of what `take` says.
    pub fn map_windows_past_damage<T: Send>(
        &self,
        range: GuestRange,
        holes: HoleQuery,
        work: impl Fn(GuestRange, Extents<'_>) -> T + Sync,
        take: impl FnMut(T) -> Result<()>,
    ) -> Result<DamageList> {
        self.map_windows_by(|| self.resolver_past_damage(holes), range, holes, work, take)
    }

    fn map_windows_by<'c, T: Send>(
        &'c self,
        resolver: impl Fn() -> Resolver<'c> + Sync + Send,
        range: GuestRange,
        holes: HoleQuery,
        work: impl Fn(GuestRange, Extents<'_>) -> T + Sync,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<DamageList> {
        let mut damage = DamageList::default();
        let mut windows = self.windows(range, holes);
        let mut ahead = ReadAhead::new(self, range);
        loop {
            let batch: Vec<_> = windows.by_ref().take(batch_size()).collect();
            let Some(last) = batch.last() else { return Ok(damage) };
            apart(|| ahead.before(*last));
            for done in resolved(&resolver, batch, &work) {
                let (thing, found) = done?;
                damage.append(found);
                take(thing)?;
            }
        }
    }

    /// As [`map_windows_past_damage`](Self::map_windows_past_damage), for a `work` that makes
    /// something of at most a few KiB: up to 4096 windows are resolved before the first is taken,
    /// in the order in which their tables lie in the file, which is how a disk is read fastest.
    /// Where several layers have tables, or any is damaged, they are resolved in guest order.
    ///
    /// # Errors
    /// The first in guest order of what `take` says.
    pub fn map_windows_in_file_order<T: Send>(
        &self,
        range: GuestRange,
        holes: HoleQuery,
        work: impl Fn(GuestRange, Extents<'_>) -> T + Sync,
        mut take: impl FnMut(T) -> Result<()>,
    ) -> Result<DamageList> {
        let resolver = || self.resolver_past_damage(holes);
        let mut damage = DamageList::default();
        let mut windows = self.windows(range, holes);
        loop {
            let some: Vec<_> = windows.by_ref().take(WINDOWS_IN_FILE_ORDER).collect();
            let (Some(first), Some(last)) = (some.first(), some.last()) else { return Ok(damage) };
            let all = GuestRange::new(first.start, last.end);
            let things = match apart(|| self.is_one_layers(all)) {
                true => self.resolved_in_file_order(&some, &resolver, &work),
                false => None,
            };
            let Some(things) = things else {
                damage.append(self.map_windows_by(resolver, all, holes, &work, &mut take)?);
                continue;
            };
            things.into_iter().try_for_each(&mut take)?;
        }
    }

    /// Whether at most one layer tells where tables of `range` lie. In the order of one layer's,
    /// another's may be read in no order; and many layers are looked at for a stretch of windows
    /// that follow on one another.
    fn is_one_layers(&self, range: GuestRange) -> bool {
        let has_tables = |layer: &&Layer| {
            let mut any = false;
            layer.image.tables(range, &mut |_, _| any = true);
            any
        };
        let layers = self.layers();
        layers.len() <= LAYERS_IN_FILE_ORDER && layers.iter().filter(has_tables).count() <= 1
    }

    /// What `work` makes of the windows, in their order; none where any has damage: lists of
    /// that are large, and in guest order those of a few windows are kept.
    fn resolved_in_file_order<'c, T: Send>(
        &'c self,
        windows: &[GuestRange],
        resolver: &(impl Fn() -> Resolver<'c> + Sync + Send),
        work: &(impl Fn(GuestRange, Extents<'_>) -> T + Sync),
    ) -> Option<Vec<T>> {
        let mut upcoming = apart(|| InFileOrder::of(self, windows));
        let mut things: Vec<_> = windows.iter().map(|_| None).collect();
        while let Some(batch) = apart(|| upcoming.next(batch_size())) {
            let their = batch.iter().filter_map(|&number| windows.get(number).copied()).collect();
            for (&number, resolved) in batch.iter().zip(resolved(resolver, their, work)) {
                let (thing, damage) = resolved.ok()?;
                if !damage.is_empty() {
                    return None;
                }
                *things.get_mut(number)? = Some(thing);
            }
        }
        things.into_iter().collect()
    }

    /// Cuts `range` into the windows in which it is best resolved, where `holes` are asked
    /// for.
    pub fn windows(
        &self,
        range: GuestRange,
        holes: HoleQuery,
    ) -> impl Iterator<Item = GuestRange> + use<> {
        let finest = apart(|| self.layers().iter().map(|layer| layer.granularity(holes)).min());
        let finest = finest.unwrap_or(512);
        let size = (finest.saturating_mul(RUNS_PER_WINDOW)).clamp(1 << 20, 4 << 30);
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

/// Windows that are resolved by all threads together.
fn batch_size() -> usize {
    (rayon::current_num_threads() * WINDOWS_PER_THREAD).min(WINDOWS_AT_ONCE)
}

/// What `work` makes of each window of a batch, on all cores, and the damage found there.
fn resolved<'c, T: Send>(
    resolver: &(impl Fn() -> Resolver<'c> + Sync + Send),
    windows: Vec<GuestRange>,
    work: &(impl Fn(GuestRange, Extents<'_>) -> T + Sync),
) -> Vec<Result<(T, DamageList)>> {
    windows
        .into_par_iter()
        .with_min_len((batch_size() / rayon::current_num_threads() / 4).max(1))
        .map_init(resolver, |resolver, window| {
            let thing = work(window, resolver.resolve(window)?);
            Ok((thing, resolver.take_damage()))
        })
        .collect()
}
