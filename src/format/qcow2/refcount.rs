//! Counting used clusters, to tell whether an image looks preallocated.

use super::header::Qcow2Header;
use crate::error::{Error, Result};
use crate::format::be64;
use crate::format::trace::Refcount;
use crate::source::Source;
use crate::units::{ByteLen, HostOffset};

/// Bits 9 to 63 of a refcount table entry.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;
/// Refcount table entries that are read at a time: a page.
const ENTRIES_AT_ONCE: u64 = 512;

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
    let mut table = Vec::new();
    // Where there is no entry, all refcounts from there on are 0.
    let blocks = clusters.div_ceil(block_entries).min(header.refcount_table.length.get() / 8);
    for index in 0..blocks {
        let first = index * block_entries;
        let in_table = index % ENTRIES_AT_ONCE;
        if in_table == 0 {
            let bytes = (blocks - index).min(ENTRIES_AT_ONCE) * 8;
            table.resize(usize::try_from(bytes).unwrap_or(0), 0);
            let at = header.refcount_table.offset.saturating_add(ByteLen::new(index * 8));
            source.read_exact(at, &mut table, "the refcount table")?;
        }
        let entry = be64(&table, usize::try_from(in_table).unwrap_or(0));
        let offset = entry & BLOCK_OFFSET_MASK;
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

/// The refcount of the cluster that starts at `cluster`.
///
/// # Errors
/// Its table or block can't be read, or lies where it can't.
pub(crate) fn refcount_of(
    source: &Source,
    header: &Qcow2Header,
    cluster: HostOffset,
) -> Result<Refcount> {
    let number = cluster.get() / header.cluster_size();
    let block_entries = (header.cluster_size() * 8) >> header.refcount_order;
    let (index, entry) = (number / block_entries, number % block_entries);
    let table_entry_at =
        header.refcount_table.offset.saturating_add(ByteLen::new(index.saturating_mul(8)));
    let none = Refcount { table_entry_at, table_entry: 0, at: None, count: 0 };
    if index >= header.refcount_table.length.get() / 8 {
        return Ok(none);
    }
    let mut bytes = [0; 8];
    source.read_exact(table_entry_at, &mut bytes, "the refcount table")?;
    let table_entry = u64::from_be_bytes(bytes);
    let block = HostOffset::new(table_entry & BLOCK_OFFSET_MASK);
    if block == HostOffset::ZERO {
        return Ok(Refcount { table_entry, ..none });
    }
    if !block.is_multiple_of(header.cluster_size()) {
        return Err(Error::invalid(format!(
            "the refcount block at {block} does not start on a cluster boundary"
        ))
        .at_offset(table_entry_at.get()));
    }
    let bit = entry << header.refcount_order;
    let at = block.saturating_add(ByteLen::new(bit / 8));
    let mut bytes = [0; 8];
    let width = 1usize << header.refcount_order;
    let used = &mut bytes[..width.div_ceil(8)];
    source.read_exact(at, used, "a refcount block")?;
    let count = if width < 8 {
        // The least significant bits are the first entry's.
        u64::from(used[0]) >> (bit % 8) & ((1 << width) - 1)
    } else {
        used.iter().fold(0, |count, &byte| count << 8 | u64::from(byte))
    };
    Ok(Refcount { table_entry_at, table_entry, at: Some(at), count })
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
    fn one_refcount_of_every_width_is_found() {
        for order in 0..=6 {
            let cluster_size = 512u64;
            let mut header = vec![0; 112];
            let mut put = |at: usize, bytes: &[u8]| {
                header[at..at + bytes.len()].copy_from_slice(bytes);
            };
            put(0, b"QFI\xfb\0\0\0\x03");
            put(20, &9u32.to_be_bytes());
            put(48, &512u64.to_be_bytes());
            put(56, &1u32.to_be_bytes());
            put(96, &u32::to_be_bytes(order));
            put(100, &104u32.to_be_bytes());
            put(40, &1024u64.to_be_bytes());
            let header = Qcow2Header::parse(&header).unwrap();
            let entries = (cluster_size * 8) >> order;
            // Entry 3 of the second block is 1; for wide ones the number is all ones.
            let mut file = vec![0; 4096];
            file[512 + 8..512 + 16].copy_from_slice(&2048u64.to_be_bytes());
            let width = 1u64 << order;
            let bit = 3 * width;
            let at = 2048 + usize::try_from(bit / 8).unwrap();
            if width < 8 {
                file[at] = ((1u8 << width) - 1) << (bit % 8);
            } else {
                file[at..at + usize::try_from(width / 8).unwrap()].fill(0xff);
            }
            let source = Source::from_bytes("x", file);
            let find = |cluster: u64| {
                refcount_of(&source, &header, HostOffset::new(cluster * cluster_size)).unwrap()
            };
            let found = find(entries + 3);
            assert_eq!(found.count, u64::MAX >> (64 - width), "order {order}");
            assert_eq!(found.at, Some(HostOffset::new(at as u64)));
            assert_eq!((found.table_entry_at.get(), found.table_entry), (520, 2048));
            assert_eq!(find(entries + 2).count, 0);
            assert_eq!(find(entries + 4).count, 0);
            let none = find(3);
            assert_eq!((none.table_entry, none.at, none.count), (0, None, 0));
            assert_eq!(find(entries * 64).at, None);
        }
    }

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

    /// 600 blocks of 64 refcounts, for a sparse file of as many clusters; blocks from `first` on
    /// say that all of theirs are used.
    fn with_blocks_from(first: u64) -> bool {
        const BLOCKS: u64 = 600;
        let mut image = crate::format::qcow2::tests::Builder::new(6);
        // Clusters of 512 bytes, refcounts of 64 bits, a refcount table of ten clusters.
        image.u32(20, 9).u64(24, 32768).u32(56, 10).u32(96, 6);
        for block in first..BLOCKS {
            image.u64((1 << 16) + block * 8, 4 << 16);
        }
        image.put(4 << 16, &[1; 512]);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &image.bytes).unwrap();
        file.as_file().set_len(BLOCKS * 64 * 512).unwrap();
        let source = Source::open(file.path()).unwrap();
        looks_preallocated(&source, &Qcow2Header::parse(&image.bytes).unwrap()).unwrap()
    }

    #[test]
    fn used_clusters_are_counted_past_the_first_page_of_the_refcount_table() {
        // 64 clusters a block, of which a ninth more than the file takes have to be used.
        assert!(with_blocks_from(512));
        assert!(with_blocks_from(0));
        assert!(!with_blocks_from(600));
        assert!(!with_blocks_from(597), "192 clusters are not more than the file takes");
    }
}
