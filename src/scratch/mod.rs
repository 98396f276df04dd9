//! The scratch file: what dm-linear can't serve from the image's own files, written out
//! once before the device is built.

use crate::units::GuestRange;

mod cache;
mod fill;
mod job;
mod origin;
mod place;
mod sweep;
mod trailer;
mod worker;

pub use crate::read::{FailedCluster, FailedWhy};
pub(crate) use cache::wait_for_the_clock;
pub use cache::{Cache, CacheBuilder, CacheHit, Cacheable, Kept};
pub use fill::{FillOptions, fill};
pub use job::{Found, FoundKind, OnError, ScratchContent, ScratchJob, ScratchWork};
pub use place::{ScratchFile, ScratchPlace};
pub(crate) use place::{create_named, descriptor_path, open_unnamed};

/// What filling a scratch file came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// The long stretches that turned out all zeros, in order and not adjacent. They are
    /// holes of the scratch file.
    pub zero_runs: Vec<GuestRange>,
    /// What could not be had, in order. They are holes of the scratch file.
    pub failed: Vec<FailedCluster>,
}

impl Filled {
    /// Both kinds of holes, for a plan to be made anew with.
    pub fn found(&self) -> Vec<Found> {
        let zeros = self.zero_runs.iter().map(|&range| Found { range, kind: FoundKind::Zeros });
        let failed = self.failed.iter().map(|f| Found { range: f.guest, kind: FoundKind::Failed });
        zeros.chain(failed).collect()
    }
}
