//! Whether the log of an XFS is clean: whether its last record says "unmounted".
//!
//! The log is a ring of blocks of 512 bytes, each of which starts with the number of the
//! round in which it was written (its cycle), but for the headers of records, which start
//! with a magic number and have the cycle behind it. The head is where the cycle changes:
//! found by halving, as `xlog_find_head` does (kernel: fs/xfs/xfs_log_recover.c). Where a
//! crash left holes in the last round this may find another place; then there is no
//! unmount record at it, and the log is not called clean.

use crate::error::Result;
use crate::format::bytes_at;
use crate::partition::be32;
use crate::signature::Area;

const BLOCK: u64 = 512;
/// XLOG_HEADER_MAGIC_NUM.
const MAGIC: u32 = 0xfeed_babe;
/// Blocks from a record's header to its end, at most: 256 KiB, and its headers
/// (XLOG_MAX_RECORD_BSIZE).
const MAX_RECORD_BLOCKS: u64 = 512 + 8;
/// Bytes of a record for which one header block has the cycles (XLOG_HEADER_CYCLE_SIZE).
const CYCLES_SIZE: u32 = 32 << 10;
/// XLOG_UNMOUNT_TRANS.
const UNMOUNTED: u8 = 0x20;

/// Where the log lies, in bytes of the area.
struct Log {
    start: u64,
    /// Blocks of 512 bytes.
    blocks: u64,
}

/// Whether the log is clean; `None` where that can't be told: it is on another device, or
/// the superblock makes no sense.
pub(super) fn is_clean(area: &mut Area<'_>) -> Result<Option<bool>> {
    let Some(log) = find(area)? else { return Ok(None) };
    let Some(head) = log.head(area)? else { return Ok(None) };
    let Some(head) = head else { return Ok(Some(true)) };
    // The last record's header is the first magic number back from the head.
    for back in 1..=MAX_RECORD_BLOCKS.min(log.blocks) {
        let at = (head + log.blocks - back) % log.blocks;
        let Some(header) = log.block(area, at)? else { return Ok(None) };
        if be32(&header, 0) == MAGIC {
            return log.is_unmount_record(area, &header, at, back).map(Some);
        }
    }
    Ok(Some(false))
}

fn find(area: &mut Area<'_>) -> Result<Option<Log>> {
    let Some(superblock) = area.read::<128>(0)? else { return Ok(None) };
    let block_size = u64::from(be32(&superblock, 4));
    let start = u64::from_be_bytes(bytes_at(&superblock, 48));
    let group_blocks = u64::from(be32(&superblock, 84));
    let log_blocks = u64::from(be32(&superblock, 96));
    let group_shift = u32::from(superblock[124]);
    if start == 0 || group_shift > 32 || !(512..=65536).contains(&block_size) {
        return Ok(None);
    }
    // A block's number is its group's, shifted, and its own in there.
    let (group, inside) = (start >> group_shift, start & ((1 << group_shift) - 1));
    let start = group
        .checked_mul(group_blocks)
        .and_then(|blocks| blocks.checked_add(inside))
        .and_then(|blocks| blocks.checked_mul(block_size));
    let blocks = log_blocks * block_size / BLOCK;
    Ok(start.filter(|_| blocks > 0).map(|start| Log { start, blocks }))
}

impl Log {
    fn block(&self, area: &mut Area<'_>, number: u64) -> Result<Option<[u8; 512]>> {
        area.read(self.start.saturating_add(number.saturating_mul(BLOCK)))
    }

    /// The round in which a block was written; 0: never.
    fn cycle(&self, area: &mut Area<'_>, number: u64) -> Result<Option<u32>> {
        let block = self.block(area, number)?;
        Ok(block.map(|block| {
            let first = be32(&block, 0);
            if first == MAGIC { be32(&block, 4) } else { first }
        }))
    }

    /// The block after the last one written: where the round changes. `Some(None)` for a log
    /// that was never written, `None` where it can't be read.
    fn head(&self, area: &mut Area<'_>) -> Result<Option<Option<u64>>> {
        let (Some(first), Some(last)) = (self.cycle(area, 0)?, self.cycle(area, self.blocks - 1)?)
        else {
            return Ok(None);
        };
        if first == 0 {
            return Ok(Some(None));
        }
        if first == last {
            return Ok(Some(Some(0)));
        }
        let (mut new, mut old) = (0, self.blocks - 1);
        while old - new > 1 {
            let middle = new + (old - new) / 2;
            match self.cycle(area, middle)? {
                Some(cycle) if cycle == first => new = middle,
                Some(_) => old = middle,
                None => return Ok(None),
            }
        }
        Ok(Some(Some(old)))
    }

    /// Whether the record of this header is one of unmounting, and the last: it ends at the
    /// head, which is `back` blocks from the header.
    fn is_unmount_record(
        &self,
        area: &mut Area<'_>,
        header: &[u8; 512],
        at: u64,
        back: u64,
    ) -> Result<bool> {
        const VERSION_2: u32 = 2;
        let (version, length) = (be32(header, 8), be32(header, 12));
        let (operations, size) = (be32(header, 40), be32(header, 320));
        let headers = if version & VERSION_2 != 0 && size > CYCLES_SIZE {
            u64::from(size.div_ceil(CYCLES_SIZE))
        } else {
            1
        };
        if operations != 1 || headers + u64::from(length).div_ceil(BLOCK) != back {
            return Ok(false);
        }
        let data = self.block(area, (at + headers) % self.blocks)?;
        Ok(data.is_some_and(|data| data[9] & UNMOUNTED != 0))
    }
}
