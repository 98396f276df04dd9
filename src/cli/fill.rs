//! Writing the scratch file of an attachment.

use std::fs::File;

use imgdm::chain::Chain;
use imgdm::device::{Interrupt, fault};
use imgdm::plan::Plan;
use imgdm::scratch::{FillOptions, Filled, OnError, ScratchPlace, ScratchWork, fill};

use super::Globals;
use super::scratch::{ContentArgs, PlaceArgs};

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
    let place = ScratchPlace::choose(places.scratch_dir.as_deref())?;
    place.check_room(bytes, plan.scratch_length())?;
    let scratch = place.create()?;
    let options = FillOptions::new(place.directory(), content.on_error());
    let filled = fill_with_progress(chain, plan, &scratch.writer, &options, interrupt, globals)?;
    Ok(Some(Written { file: scratch.reader, filled }))
}

/// Fills a scratch file; on a terminal with a progress bar.
fn fill_with_progress(
    chain: &Chain,
    plan: &Plan<'_>,
    file: &File,
    options: &FillOptions,
    interrupt: &Interrupt<'_>,
    globals: Globals,
) -> anyhow::Result<Filled> {
    let bar = globals.progress(plan.scratch_bytes(), "inflating");
    let tick = |done: u64| {
        bar.set_position(done);
        fault::point(format_args!("inflate"))?;
        interrupt.check()
    };
    let filled = fill(chain, plan, file, options, &tick);
    bar.finish_and_clear();
    let filled = filled?;
    let what = match options.on_error {
        OnError::ErrorTarget => "reading fails",
        OnError::Refuse | OnError::Zero => "reads as zeros",
    };
    for failed in &filled.failed {
        globals.warn(format_args!("guest range {failed}; {what} there"));
    }
    Ok(filled)
}
