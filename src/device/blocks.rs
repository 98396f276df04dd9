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
