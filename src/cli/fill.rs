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

/// What is known of the scratch file before anything is written.
pub(crate) enum Prepared {
    /// There is none.
    Unneeded,
    /// It was kept, and is used again.
    Kept(Written),
    /// It is to be written, and kept.
    ToBeKept(Cache),
    /// It is to be written.
    Unlinked,
}

impl Prepared {
    /// Looks for a kept file where one may be used.
    pub(crate) fn of(
        chain: &Chain,
        plan: &Plan<'_>,
        content: ContentArgs,
        places: &PlaceArgs,
        globals: Globals,
    ) -> anyhow::Result<Self> {
        if plan.scratch_bytes() == 0 {
            return Ok(Self::Unneeded);
        }
        if content.compressed != Compressed::Cache {
            return Ok(Self::Unlinked);
        }
        let run = FillOptions::SHORTEST_ZERO_RUN;
        Ok(match Cache::of(Some(&places.cache_dir), chain, plan, run)? {
            Cacheable::Yes(cache) => match cache.lookup() {
                Some(CacheHit { file, filled }) => Self::Kept(Written { file, filled }),
                None => Self::ToBeKept(cache),
            },
            Cacheable::No(why) => {
                globals.warn(format_args!("nothing is kept, a scratch file is used: {why}"));
                Self::Unlinked
            }
        })
    }

    /// Whether there is something to be written.
    pub(crate) fn takes_long(&self) -> bool {
        matches!(self, Self::ToBeKept(_) | Self::Unlinked)
    }

    /// Writes what `plan` wants written, where that is yet to be done.
    pub(crate) fn write(
        self,
        chain: &Chain,
        plan: &Plan<'_>,
        content: ContentArgs,
        places: &PlaceArgs,
        interrupt: &Interrupt<'_>,
        globals: Globals,
    ) -> anyhow::Result<Option<Written>> {
        let filling = Filling { chain, plan, on_error: content.on_error(), interrupt, globals };
        Ok(match self {
            Self::Unneeded => None,
            Self::Kept(written) => Some(written),
            Self::ToBeKept(cache) => Some(filling.to_be_kept(&cache)?),
            Self::Unlinked => Some(filling.unlinked(places)?),
        })
    }
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
    fn unlinked(&self, places: &PlaceArgs) -> anyhow::Result<Written> {
        let place = ScratchPlace::choose(places.scratch_dir.as_deref())?;
        place.check_room(self.plan.scratch_bytes(), self.plan.scratch_length())?;
        let scratch = place.create()?;
        let filled = self.fill(&scratch.writer, place.directory())?;
        Ok(Written { file: scratch.reader, filled })
    }

    fn to_be_kept(&self, cache: &Cache) -> anyhow::Result<Written> {
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
