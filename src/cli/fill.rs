//! Writing the scratch file of an attachment.

use std::fs::File;
use std::path::Path;

use imgdm::chain::Chain;
use imgdm::device::{Interrupt, fault};
use imgdm::plan::Plan;
use imgdm::scratch::{
    Cache, CacheHit, Cacheable, FillOptions, Filled, OnError, ScratchPlace, ScratchWork, fill,
};

use super::Globals;
use super::scratch::{Compressed, ContentArgs, PlaceArgs};

/// The scratch file of an attachment, written.
pub(crate) struct Written {
    /// Open for reading only.
    pub(crate) file: File,
    pub(crate) filled: Filled,
}

/// Writes what `plan` wants written, where it wants anything.
pub(crate) fn write(
    chain: &Chain,
    plan: &Plan<'_>,
    content: ContentArgs,
    places: &PlaceArgs,
    interrupt: &Interrupt<'_>,
    globals: Globals,
) -> anyhow::Result<Option<Written>> {
    let bytes = plan.scratch_bytes();
    if bytes == 0 {
        return Ok(None);
    }
    let filling = Filling { chain, plan, on_error: content.on_error(), interrupt, globals };
    if content.compressed == Compressed::Cache {
        let run = FillOptions::SHORTEST_ZERO_RUN;
        match Cache::of(Some(&places.cache_dir), chain, plan, run)? {
            Cacheable::Yes(cache) => return filling.in_cache(&cache).map(Some),
            Cacheable::No(why) => {
                globals.warn(format_args!("nothing is kept, a scratch file is used: {why}"));
            }
        }
    }
    let place = ScratchPlace::choose(places.scratch_dir.as_deref())?;
    place.check_room(bytes, plan.scratch_length())?;
    let scratch = place.create()?;
    let filled = filling.fill(&scratch.writer, place.directory())?;
    Ok(Some(Written { file: scratch.reader, filled }))
}

/// What is to be written, and how.
struct Filling<'a> {
    chain: &'a Chain,
    plan: &'a Plan<'a>,
    on_error: OnError,
    interrupt: &'a Interrupt<'a>,
    globals: Globals,
}

impl Filling<'_> {
    /// The file that is kept for this chain; made where there is none that can be used.
    fn in_cache(&self, cache: &Cache) -> anyhow::Result<Written> {
        if let Some(CacheHit { file, filled }) = cache.lookup() {
            return Ok(Written { file, filled });
        }
        let builder = cache.build()?;
        builder.check_room(self.plan.scratch_bytes(), self.plan.scratch_length())?;
        let filled = self.fill(builder.file(), cache.directory())?;
        let kept = builder.keep(cache, self.chain, &filled)?;
        if let Some(why) = kept.not_kept {
            self.globals.warn(format_args!("what was inflated is used, but not kept: {why}"));
        }
        Ok(Written { file: kept.file, filled })
    }

    /// Fills a file; on a terminal with a progress bar.
    fn fill(&self, file: &File, directory: &Path) -> anyhow::Result<Filled> {
        let bar = self.globals.progress(self.plan.scratch_bytes(), "inflating");
        let tick = |done: u64| {
            bar.set_position(done);
            fault::point(format_args!("inflate"))?;
            self.interrupt.check()
        };
        let options = FillOptions::new(directory, self.on_error);
        let filled = fill(self.chain, self.plan, file, &options, &tick);
        bar.finish_and_clear();
        let filled = filled?;
        let what = match self.on_error {
            OnError::ErrorTarget => "reading fails",
            OnError::Refuse | OnError::Zero => "reads as zeros",
        };
        for failed in &filled.failed {
            self.globals.warn(format_args!("guest range {failed}; {what} there"));
        }
        Ok(filled)
    }
}
