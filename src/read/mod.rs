//! Reading the guest's disk through its chain, without the kernel.

mod cluster;
mod failed;

pub(crate) use cluster::{ClusterPart, ClusterReader, Stream};
pub use failed::{FailedCluster, FailedWhy};
