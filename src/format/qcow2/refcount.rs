//! Counting used clusters, to tell whether an image looks preallocated.

use super::header::Qcow2Header;
use crate::error::Result;
use crate::source::Source;
use crate::units::{ByteLen, HostOffset};

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// QEMU's qcow2_detect_metadata_preallocation(): true where clearly more clusters have a
/// refcount than the host's file system has allocated space for, so that data clusters
/// are likely holes of the file.
///
/// # Errors
/// A refcount block cannot be read.
pub(super) fn looks_preallocated(source: &Source, header: &Qcow2Header) -> Result<bool> {
    let Some(allocated) = source.allocated() else { return Ok(false) };
    let cluster_size = header.cluster_size();
    let real = allocated.get() / cluster_size;
    let threshold = (real.saturating_mul(10) / 9).max(real + 2);
    let clusters = source.length().get().div_ceil(cluster_size);
    if clusters < threshold {
        return Ok(false); // Even with a refcount for each it would not be reached.
    }
    let block_entries = (cluster_size * 8) >> header.refcount_order;
    let mut counted = 0;
    let mut block = Vec::new();
    for first in (0..clusters).step_by(usize::try_from(block_entries).unwrap_or(usize::MAX)) {
        let index = first / block_entries;
        if index * 8 >= header.refcount_table.length.get() {
            break; // No entry: all refcounts from here on are 0.
        }
        let mut entry = [0; 8];
        let at = header.refcount_table.offset.saturating_add(ByteLen::new(index * 8));
        source.read_exact(at, &mut entry, "the refcount table")?;
        let offset = u64::from_be_bytes(entry) & BLOCK_OFFSET_MASK;
        if offset == 0 {
            continue;
        }
        let entries = block_entries.min(clusters - first);
        let bits = entries << header.refcount_order;
        block.resize(usize::try_from(bits.div_ceil(8)).unwrap_or(0), 0);
        source.read_exact(HostOffset::new(offset), &mut block, "a refcount block")?;
        counted += used(&block, header.refcount_order, entries);
        if counted >= threshold {
            return Ok(true);
        }
    }
    Ok(false)
}

/// How many of the first `entries` refcounts of a block are not 0.
fn used(block: &[u8], order: u32, entries: u64) -> u64 {
    if order < 3 {
        let width = 1u64 << order;
        let mask = (1u16 << width) - 1;
        let is_used = |entry: u64| {
            let bit = entry << order;
            let byte = usize::try_from(bit / 8).ok().and_then(|at| block.get(at).copied());
            u16::from(byte.unwrap_or(0)) >> (bit % 8) & mask != 0
        };
        return (0..entries).filter(|&entry| is_used(entry)).count() as u64;
    }
    block.chunks(1 << (order - 3)).filter(|entry| entry.iter().any(|&b| b != 0)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_counted() {
        assert_eq!(used(&[0b0000_0101], 0, 8), 2);
        assert_eq!(used(&[0b0000_0101], 0, 2), 1);
        assert_eq!(used(&[0b1100_0001], 1, 4), 2);
        assert_eq!(used(&[0xf0, 0x01], 2, 4), 2);
        assert_eq!(used(&[0, 1, 0], 3, 3), 1);
        assert_eq!(used(&[0, 1, 0, 0, 1, 0], 4, 3), 2);
        assert_eq!(used(&[0, 0, 0, 0, 0, 0, 0, 1], 6, 1), 1);
    }
}
