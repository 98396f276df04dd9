//! Blocks of files, shared and written out by the kernel.

use std::fs::File;
use std::io;

use super::sys;
use crate::convert::reflink::HostCalls;

/// The running kernel's calls.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelBlocks;

impl HostCalls for KernelBlocks {
    fn clone_range(
        &self,
        from: &File,
        from_offset: u64,
        length: u64,
        to: &File,
        to_offset: u64,
    ) -> io::Result<()> {
        sys::clone_range(from, from_offset, length, to, to_offset)
    }

    fn start_write_back(&self, file: &File, offset: u64, length: u64) {
        sys::start_write_back(file, offset, length);
    }
}

/// True of a file of which the kernel says that any sector can be read around the page cache
/// (STATX_DIOALIGN, since Linux 6.1). A loop device itself looks at the disk below at most, and
/// what a file system then refuses are errors of whoever reads.
#[cfg(feature = "device")]
pub(super) fn reads_sectors_directly(file: &File) -> bool {
    use rustix::fs::{AtFlags, StatxFlags};

    let sector = u32::try_from(crate::units::SECTOR_SIZE).unwrap_or(0);
    let wanted = StatxFlags::DIOALIGN;
    rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, wanted).is_ok_and(|stat| {
        stat.stx_mask & wanted.bits() != 0
            && (1..=sector).contains(&stat.stx_dio_offset_align)
            && (1..=sector).contains(&stat.stx_dio_mem_align)
    })
}

/// Nothing is attached by a real kernel there.
#[cfg(not(feature = "device"))]
pub(super) fn reads_sectors_directly(_: &File) -> bool {
    false
}
