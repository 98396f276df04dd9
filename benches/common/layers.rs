//! qcow2 layers with data whose clusters lie where a bench wants them, and raw files of
//! what they hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Context;

use super::image::{CLUSTER, ENTRIES_PER_TABLE, header};

const COPIED: u64 = 1 << 63;
/// Header, L1 table and an empty refcount table, which is no matter to those who read.
const FIRST_L2: u64 = 3;
const HEADER_LENGTH: usize = 104;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FORMAT: &[u8; 5] = b"qcow2";

/// A qcow2 image of `hosts.len()` clusters: which of the clusters in the file's data area
/// holds each, or none for those that it leaves to `backing`.
pub(crate) fn write_layer(
    path: &Path,
    hosts: &[Option<u64>],
    backing: Option<&str>,
) -> anyhow::Result<()> {
    let clusters = hosts.len() as u64;
    let l2_tables = clusters.div_ceil(ENTRIES_PER_TABLE);
    let data = FIRST_L2 + l2_tables;
    let mut header = header(clusters, u32::try_from(l2_tables)?, CLUSTER, 2 * CLUSTER);
    if let Some(name) = backing {
        header.truncate(HEADER_LENGTH);
        header.extend(BACKING_FORMAT.to_be_bytes());
        header.extend(u32::try_from(FORMAT.len())?.to_be_bytes());
        header.extend(FORMAT);
        header.resize(header.len().next_multiple_of(8) + 8, 0);
        let (at, length) = (header.len() as u64, u32::try_from(name.len())?);
        header.extend(name.as_bytes());
        header[8..16].copy_from_slice(&at.to_be_bytes());
        header[16..20].copy_from_slice(&length.to_be_bytes());
    }
    let mut content = Content::new();
    let mut write = || -> io::Result<()> {
        let file = File::create(path)?;
        file.write_all_at(&header, 0)?;
        let l1 = (0..l2_tables).flat_map(|table| entry(FIRST_L2 + table));
        file.write_all_at(&l1.collect::<Vec<_>>(), CLUSTER)?;
        let l2 = hosts.iter().flat_map(|host| host.map_or([0; 8], |host| entry(data + host)));
        file.write_all_at(&l2.collect::<Vec<_>>(), FIRST_L2 * CLUSTER)?;
        file.set_len(data * CLUSTER)?;
        for (host, cluster) in hosts.iter().zip(0..).filter_map(|(host, n)| Some(((*host)?, n))) {
            file.write_all_at(content.of(cluster), (data + host) * CLUSTER)?;
        }
        Ok(())
    };
    write().with_context(|| format!("cannot make {}", path.display()))
}

/// A raw file of what such layers hold, with a hole where `is_zero` says so.
pub(crate) fn write_raw(
    path: &Path,
    clusters: u64,
    is_zero: impl Fn(u64) -> bool,
) -> anyhow::Result<()> {
    let mut content = Content::new();
    let mut write = || -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(clusters * CLUSTER)?;
        for cluster in (0..clusters).filter(|&cluster| !is_zero(cluster)) {
            file.write_all_at(content.of(cluster), cluster * CLUSTER)?;
        }
        Ok(())
    };
    write().with_context(|| format!("cannot make {}", path.display()))
}

fn entry(cluster: u64) -> [u8; 8] {
    ((cluster * CLUSTER) | COPIED).to_be_bytes()
}

/// What guest clusters hold: never zeros, and no two sectors alike.
struct Content(Vec<u8>);

impl Content {
    fn new() -> Self {
        let mut state = 1u64;
        let words = (0..CLUSTER / 8).flat_map(|_| {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            state.to_le_bytes()
        });
        Self(words.collect())
    }

    fn of(&mut self, cluster: u64) -> &[u8] {
        for (sector, bytes) in (1..).zip(self.0.chunks_mut(512)) {
            bytes[..8].copy_from_slice(&(cluster << 16 | sector).to_le_bytes());
        }
        &self.0
    }
}
