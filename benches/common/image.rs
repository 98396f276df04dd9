//! qcow2 images of which only the metadata takes space on disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

pub(crate) const CLUSTER: u64 = 64 << 10;
pub(crate) const ENTRIES_PER_TABLE: u64 = CLUSTER / 8;
/// Refcounts of 16 bits in a block.
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER / 2;
const COPIED: u64 = 1 << 63;
/// Where the header has the size of the disk.
const VIRTUAL_SIZE_AT: u64 = 24;
/// Clusters that [`Order::Runs`] keeps together.
const GROUP_BITS: u32 = 6;

/// How the clusters lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Each somewhere else.
    Shuffled,
    /// In runs of 1 to 64, each somewhere else.
    Runs,
    /// Each somewhere else, and each L2 table too.
    ShuffledTables,
}

/// A qcow2 image (version 3) with every cluster allocated.
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) clusters: u64,
    pub(crate) l2_tables: u64,
    /// Where the first of them starts.
    pub(crate) l2_offset: u64,
    /// Where the first cluster of data starts.
    pub(crate) data_offset: u64,
    bits: u32,
    order: Order,
}

impl Image {
    /// Makes one of 2^`bits` clusters; without refcounts its refcount table is empty, which
    /// is no matter to those who only read.
    pub(crate) fn create(
        path: &Path,
        bits: u32,
        order: Order,
        with_refcounts: bool,
    ) -> anyhow::Result<Self> {
        let clusters = 1u64 << bits;
        let l2_tables = clusters / ENTRIES_PER_TABLE;
        // Header, L1 table, refcount table, refcount blocks, L2 tables, data.
        let l1_offset = CLUSTER;
        let table_offset = 2 * CLUSTER;
        let others = 3 + l2_tables + clusters;
        // Each block has room for more than it takes itself.
        let blocks = if with_refcounts { others.div_ceil(REFCOUNTS_PER_BLOCK - 1) } else { 0 };
        let l2_offset = (3 + blocks) * CLUSTER;
        let data_offset = l2_offset + l2_tables * CLUSTER;
        let header = header(clusters, u32::try_from(l2_tables)?, l1_offset, table_offset);

        let write = || -> io::Result<()> {
            let file = File::create(path)?;
            file.write_all_at(&header, 0)?;
            let table_offset_of = |table: u64| match order {
                Order::Shuffled | Order::Runs => l2_offset + table * CLUSTER,
                Order::ShuffledTables => {
                    l2_offset + shuffled(table, l2_tables.trailing_zeros()) * CLUSTER
                }
            };
            let l1 = entries((0..l2_tables).map(table_offset_of), COPIED);
            file.write_all_at(&l1, l1_offset)?;
            let table = entries((0..blocks).map(|block| (3 + block) * CLUSTER), 0);
            file.write_all_at(&table, table_offset)?;
            for block in 0..blocks {
                let first = block * REFCOUNTS_PER_BLOCK;
                let used = (others + blocks).saturating_sub(first).min(REFCOUNTS_PER_BLOCK);
                let refcounts: Vec<u8> = (0..used).flat_map(|_| [0, 1]).collect();
                file.write_all_at(&refcounts, (3 + block) * CLUSTER)?;
            }
            for table in 0..l2_tables {
                let first = table * ENTRIES_PER_TABLE;
                let hosts = (first..first + ENTRIES_PER_TABLE)
                    .map(|cluster| data_offset + place(cluster, bits, order) * CLUSTER);
                file.write_all_at(&entries(hosts, COPIED), table_offset_of(table))?;
            }
            file.set_len(data_offset + clusters * CLUSTER)
        };
        write().with_context(|| format!("cannot make {}", path.display()))?;
        let path = path.to_owned();
        Ok(Self { path, clusters, l2_tables, l2_offset, data_offset, bits, order })
    }

    /// Makes the disk end after so many clusters; the others lie in the file for nobody.
    pub(crate) fn cut(self, clusters: u64) -> anyhow::Result<Self> {
        let file = File::options().write(true).open(&self.path)?;
        file.write_all_at(&(clusters * CLUSTER).to_be_bytes(), VIRTUAL_SIZE_AT)?;
        Ok(Self { clusters, ..self })
    }

    /// Where in the file a guest cluster lies.
    pub(crate) fn host_offset(&self, cluster: u64) -> u64 {
        self.data_offset + place(cluster, self.bits, self.order) * CLUSTER
    }
}

fn entries(offsets: impl Iterator<Item = u64>, flags: u64) -> Vec<u8> {
    offsets.flat_map(|offset| (offset | flags).to_be_bytes()).collect()
}

/// The header of an image with every table in clusters of its own and no backing file.
pub(crate) fn header(
    clusters: u64,
    l1_entries: u32,
    l1_offset: u64,
    refcounts_offset: u64,
) -> Vec<u8> {
    let mut header = Vec::new();
    let be32 = |value: u32| value.to_be_bytes().to_vec();
    let be64 = |value: u64| value.to_be_bytes().to_vec();
    for field in [
        b"QFI\xfb".to_vec(),
        be32(3),
        be64(0), // backing file
        be32(0),
        be32(CLUSTER.trailing_zeros()),
        be64(clusters * CLUSTER),
        be32(0), // encryption
        be32(l1_entries),
        be64(l1_offset),
        be64(refcounts_offset),
        be32(1),
        be32(0), // snapshots
        be64(0),
        be64(0), // features: incompatible, compatible, autoclear
        be64(0),
        be64(0),
        be32(4), // refcounts of 16 bits
        be32(104),
    ] {
        header.extend(field);
    }
    header
}

/// Where among the host clusters a guest cluster lies.
fn place(cluster: u64, bits: u32, order: Order) -> u64 {
    match order {
        Order::Shuffled | Order::ShuffledTables => shuffled(cluster, bits),
        Order::Runs => {
            let group = shuffled(cluster >> GROUP_BITS, bits - GROUP_BITS);
            group << GROUP_BITS | in_group(cluster % (1 << GROUP_BITS), group)
        }
    }
}

/// Cuts a group into runs and turns their order round.
fn in_group(cluster: u64, group: u64) -> u64 {
    let size = 1u64 << GROUP_BITS;
    let mut random = group.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut start = 0;
    loop {
        random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let end = (start + 1 + (random >> 40) % size).min(size);
        if cluster < end {
            return size - end + (cluster - start);
        }
        start = end;
    }
}

/// A permutation of the numbers of `bits` bits: each step can be undone. A list to
/// shuffle would count as memory of the programs that are started.
pub(crate) fn shuffled(number: u64, bits: u32) -> u64 {
    const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
    let mask = (1 << bits) - 1;
    let mut mixed = number;
    for _ in 0..3 {
        mixed = mixed.wrapping_mul(SEED | 1).wrapping_add(SEED >> 7) & mask;
        mixed ^= mixed >> (bits / 2);
    }
    mixed
}
