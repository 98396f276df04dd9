//! Reading the guest's disk through its chain, without the kernel: data, zeros,
//! compressed and encrypted clusters of all layers.
//!
//! [`ChainReader`] reads at any offset and keeps its working memory;
//! [`Chain::for_each_chunk`] reads a range on all cores and hands it out in guest order.
//! Past the end of a layer's file both read zeros, as QEMU does.

mod ciphers;
mod cluster;
mod failed;
mod in_order;
mod reader;
mod sweep;
#[cfg(test)]
pub(crate) mod tests;

pub use ciphers::Ciphers;
pub(crate) use cluster::{ClusterPart, ClusterReader, Stream};
pub use failed::{FailedCluster, FailedWhy};
pub(crate) use in_order::in_order;
pub use reader::ChainReader;
pub(crate) use reader::joined;
pub use sweep::Content;
pub(crate) use sweep::Swept;

use crate::chain::{Chain, HoleQuery};
use crate::error::Result;
use crate::units::GuestOffset;

/// Which holes are not read: those that a plan maps as zeros.
pub(crate) const HOLES: HoleQuery = HoleQuery::DataFiles;

impl Chain {
    /// Fills `buffer` with the guest's bytes from `offset` on. For more than one read make
    /// a [`ChainReader`], which keeps its memory.
    ///
    /// # Errors
    /// Those of [`ChainReader::read_at`].
    pub fn read_at(&self, ciphers: &Ciphers, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        ChainReader::new(self, ciphers).read_at(offset, buffer)
    }
}

/// True where all of `bytes` are zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Each byte is the one before it, and the first is 0: one comparison of memory.
    bytes.first().is_none_or(|&first| first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}
