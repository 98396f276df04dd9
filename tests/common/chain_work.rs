//! The jobs of a whole chain: what a plan makes of compressed clusters, by itself.

use imgdm::Result;
use imgdm::chain::{Chain, HoleQuery};
use imgdm::extent::Mapping;
use imgdm::scratch::{ScratchContent, ScratchJob, ScratchWork};
use imgdm::units::GuestRange;

/// A job of each compressed extent, where it is in the guest.
pub(crate) struct ChainWork<'c>(pub(crate) &'c Chain);

impl ChainWork<'_> {
    fn window(&self, window: GuestRange, jobs: &mut Vec<ScratchJob>) -> Result<()> {
        jobs.clear();
        self.0.for_each_extent(window, HoleQuery::DataFiles, &mut |extent| {
            if let Mapping::Compressed { host, stream_length, cluster } = extent.mapping {
                jobs.push(ScratchJob {
                    at: extent.start.get(),
                    length: extent.length.get(),
                    guest: extent.start,
                    layer: extent.depth,
                    what: ScratchContent::Inflate { host, stream_length, cluster },
                });
            }
            Ok(())
        })
    }
}

impl ScratchWork for ChainWork<'_> {
    fn scratch_bytes(&self) -> u64 {
        let mut bytes = 0;
        let counted = self.for_each_window(&mut |jobs| {
            bytes += jobs.iter().map(|job| job.length).sum::<u64>();
            Ok(())
        });
        counted.map_or(u64::MAX, |()| bytes)
    }

    fn scratch_length(&self) -> u64 {
        self.0.virtual_size().get()
    }

    fn for_each_window(&self, each: &mut dyn FnMut(&[ScratchJob]) -> Result<()>) -> Result<()> {
        let mut jobs = Vec::new();
        for window in self.0.windows(self.0.whole(), HoleQuery::DataFiles) {
            self.window(window, &mut jobs)?;
            each(&jobs)?;
        }
        Ok(())
    }
}
