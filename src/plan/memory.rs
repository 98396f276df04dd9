//! What kernel memory an attachment takes.

use super::{Backing, TableSource};

/// What a dm-linear target costs the kernel in bytes, lookup tree included (measured on
/// a table of 1,048,576).
const PER_SEGMENT: u64 = 113;
/// What a loop device or a mapped device costs the kernel in bytes, roughly: its queue,
/// its disk and its worker.
const PER_DEVICE: u64 = 64 << 10;
/// What a crypt target costs the kernel in bytes, its three workers included (measured).
const PER_CRYPT: u64 = 1_400_000;
/// What a line of a table takes in the ioctl's buffer, of which the kernel makes a copy
/// while it loads the table.
const PER_LINE: u64 = 64;

/// Kernel memory in bytes, estimated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KernelMemory {
    /// What is taken as long as the image is attached; without a scratch file or a store,
    /// which may lie in memory too.
    pub kept: u64,
    /// What the largest table takes beside that, only while it is loaded.
    pub loading: u64,
}

impl KernelMemory {
    /// Of everything that `plan` has to build.
    pub fn of<T: TableSource + ?Sized>(plan: &T) -> Self {
        let segments = plan.tables().iter().map(|table| table.segments);
        let is_loop = |backing: &&Backing| !matches!(backing, Backing::Table(_));
        let loops = plan.backings().iter().filter(is_loop).count();
        let count = |things: usize| u64::try_from(things).unwrap_or(u64::MAX);
        let devices = count(loops).saturating_add(count(plan.tables().len()));
        let cost = |things: u64, each: u64| things.saturating_mul(each);
        Self {
            kept: cost(segments.clone().fold(0, u64::saturating_add), PER_SEGMENT)
                .saturating_add(cost(devices, PER_DEVICE))
                .saturating_add(cost(count(plan.crypts().len()), PER_CRYPT)),
            loading: cost(segments.max().unwrap_or(0), PER_LINE),
        }
    }

    /// The most that is taken at any moment.
    pub fn peak(self) -> u64 {
        self.kept.saturating_add(self.loading)
    }
}
