//! The bits of a persistent dirty bitmap, as guest ranges.

use super::bitmap::{BitmapDirectoryEntry, BitmapTableEntry};
use super::header::Qcow2Header;
use crate::error::{Error, Result};
use crate::format::be64;
use crate::format::cow::bit_run;
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Entries of the bitmap table that are read at a time.
const TABLE_CHUNK: u64 = 8192;

/// Calls `each` with the parts of `range`, which lies inside of the disk, in order and without
/// gap, and whether the guest wrote to them since the bitmap was begun. Neighbours differ.
/// Only what is asked for is read: a cluster of bits and 64 KiB of the table are in memory.
///
/// # Errors
/// The bitmap is in use (inconsistent, as QEMU says): its bits mean nothing. Its table has
/// another number of entries than the disk takes, or one that makes no sense; bits that lie
/// outside of the file. What `each` says.
pub fn for_each_dirty_run(
    source: &Source,
    header: &Qcow2Header,
    bitmap: &BitmapDirectoryEntry,
    range: GuestRange,
    each: &mut dyn FnMut(GuestRange, bool) -> Result<()>,
) -> Result<()> {
    let mut walk = || {
        check(header, bitmap)?;
        let mut runs =
            Runs { range, granularity_bits: bitmap.granularity_bits, pending: None, each };
        read_bits(source, header, bitmap, &mut runs)?;
        runs.flush()
    };
    walk().map_err(|error| error.at_path(source.path()))
}

fn check(header: &Qcow2Header, bitmap: &BitmapDirectoryEntry) -> Result<()> {
    let broken = |what: String| {
        let name = bitmap.display_name();
        let error = Error::invalid(format!("the bitmap '{name}' {what}"));
        Err(error.at_offset(bitmap.entry_offset.get()))
    };
    if bitmap.in_use {
        return broken(
            "is inconsistent: it was in use and never saved, and its bits mean nothing ('qemu-img bitmap --remove' is all that can be done with it)".to_owned(),
        );
    }
    // As load_bitmap_data() in QEMU's block/qcow2-bitmap.c: bits are stored in words of 64.
    let bits = header.virtual_size.get().div_ceil(bitmap.granularity());
    let needed = (bits.div_ceil(64) * 8).div_ceil(header.cluster_size());
    if needed != bitmap.table_entries() {
        let found = bitmap.table_entries();
        return broken(format!("has a table of {found} entries, the disk takes {needed}"));
    }
    Ok(())
}

fn read_bits(
    source: &Source,
    header: &Qcow2Header,
    bitmap: &BitmapDirectoryEntry,
    runs: &mut Runs<'_>,
) -> Result<()> {
    let range = runs.range;
    if range.is_empty() {
        return Ok(());
    }
    let cluster_size = header.cluster_size();
    let entry_bits = cluster_size * 8;
    let first_bit = range.start.get() >> bitmap.granularity_bits;
    let end_bit = range.end.get().div_ceil(bitmap.granularity());
    let end_entry = end_bit.div_ceil(entry_bits).min(bitmap.table_entries());
    let mut table = Vec::new();
    let mut bits = Vec::new();
    let mut first_entry = first_bit / entry_bits;
    while first_entry < end_entry {
        let count = TABLE_CHUNK.min(end_entry - first_entry);
        let table_at = bitmap.table.offset.saturating_add(ByteLen::new(first_entry * 8));
        table.resize(usize::try_from(count * 8).unwrap_or(0), 0);
        source.read_exact(table_at, &mut table, "the bitmap table")?;
        for (index, number) in (first_entry..first_entry + count).enumerate() {
            let from = first_bit.max(number * entry_bits);
            let to = end_bit.min((number + 1) * entry_bits);
            let entry = be64(&table, index);
            match BitmapTableEntry::decode(entry, cluster_size) {
                Some(BitmapTableEntry::AllZeros) => runs.push(false, from, to)?,
                Some(BitmapTableEntry::AllOnes) => runs.push(true, from, to)?,
                Some(BitmapTableEntry::Serialized(host)) => {
                    read_cluster(source, host, cluster_size, &mut bits)?;
                    push_bits(&bits, number * entry_bits, from, to, runs)?;
                }
                None => {
                    let name = bitmap.display_name();
                    return Err(Error::invalid(format!(
                        "entry {number} of the table of the bitmap '{name}' makes no sense: {entry:#x}"
                    ))
                    .at_offset(table_at.get().saturating_add(index as u64 * 8)));
                }
            }
        }
        first_entry += count;
    }
    Ok(())
}

fn read_cluster(
    source: &Source,
    host: HostOffset,
    cluster_size: u64,
    bits: &mut Vec<u8>,
) -> Result<()> {
    bits.resize(usize::try_from(cluster_size).unwrap_or(0), 0);
    source.read_exact(host, bits, "a cluster of a bitmap")
}

/// Hands on the bits from `from` up to `to` of a cluster, whose first bit is `first`.
fn push_bits(bits: &[u8], first: u64, from: u64, to: u64, runs: &mut Runs<'_>) -> Result<()> {
    let in_cluster = |bit: u64| usize::try_from(bit - first).unwrap_or(0);
    let end = in_cluster(to);
    let mut at = in_cluster(from);
    while at < end {
        let (is_dirty, count) = bit_run(bits, at, end);
        let start = first + at as u64;
        runs.push(is_dirty, start, start + count as u64)?;
        at += count;
    }
    Ok(())
}

/// Joins runs of bits, and makes guest ranges of them.
struct Runs<'e> {
    range: GuestRange,
    granularity_bits: u8,
    /// Whether the bits are set, the first of them, and the first after them.
    pending: Option<(bool, u64, u64)>,
    each: &'e mut dyn FnMut(GuestRange, bool) -> Result<()>,
}

impl Runs<'_> {
    fn push(&mut self, is_dirty: bool, from: u64, to: u64) -> Result<()> {
        match &mut self.pending {
            Some((value, _, end)) if *value == is_dirty => {
                *end = to;
                Ok(())
            }
            _ => {
                self.flush()?;
                self.pending = Some((is_dirty, from, to));
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let Some((is_dirty, from, to)) = self.pending.take() else { return Ok(()) };
        // The last bit may cover more than the disk has; no bit reaches past 2^64.
        let guest = |bit: u64| GuestOffset::new(bit.saturating_mul(1 << self.granularity_bits));
        let run = GuestRange::new(guest(from), guest(to)).intersection(self.range);
        if run.is_empty() { Ok(()) } else { (self.each)(run, is_dirty) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::qcow2::header::TableLocation;

    const CLUSTER: usize = 4096;

    /// The runs of a bitmap of 512 bytes a bit with these table entries, each for 16 MiB.
    fn runs(entries: &[u64], bits: &[u8], start: u64, end: u64) -> Result<Vec<(u64, u64, bool)>> {
        let mut file = vec![0; 2 * CLUSTER];
        for (index, entry) in entries.iter().enumerate() {
            file[index * 8..index * 8 + 8].copy_from_slice(&entry.to_be_bytes());
        }
        file[CLUSTER..CLUSTER + bits.len()].copy_from_slice(bits);
        let mut header = crate::format::qcow2::tests::header();
        header.cluster_bits = 12;
        header.virtual_size = ByteLen::new(entries.len() as u64 * (16 << 20) - 1024);
        let bitmap = BitmapDirectoryEntry {
            entry_offset: HostOffset::ZERO,
            entry_length: ByteLen::ZERO,
            table: TableLocation {
                offset: HostOffset::ZERO,
                length: ByteLen::new(entries.len() as u64 * 8),
            },
            in_use: false,
            auto: false,
            granularity_bits: 9,
            name: b"x".to_vec(),
        };
        let source = Source::from_bytes("x", file);
        let range = GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
        let mut found = Vec::new();
        for_each_dirty_run(&source, &header, &bitmap, range, &mut |run, is_dirty| {
            found.push((run.start.get(), run.end.get(), is_dirty));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn bits_are_least_significant_first_and_runs_join_across_entries() {
        let mut bits = vec![0; CLUSTER];
        (bits[0], bits[1], bits[CLUSTER - 1]) = (0b1000_0001, 1, 0x80);
        let mib = 1 << 20;
        assert_eq!(
            runs(&[CLUSTER as u64, 1, 0], &bits, 0, 48 * mib - 1024).unwrap(),
            [
                (0, 512, true),
                (512, 7 * 512, false),
                (7 * 512, 9 * 512, true),
                (9 * 512, 16 * mib - 512, false),
                (16 * mib - 512, 32 * mib, true),
                (32 * mib, 48 * mib - 1024, false),
            ]
        );
        // A part, cut inside of bits.
        assert_eq!(
            runs(&[CLUSTER as u64, 1, 0], &bits, 3600, 4700).unwrap(),
            [(3600, 4608, true), (4608, 4700, false)]
        );
        assert_eq!(runs(&[1], &bits, 100, 100).unwrap(), []);
    }

    #[test]
    fn an_entry_that_makes_no_sense_is_refused_where_it_is_needed() {
        assert_eq!(runs(&[1, 3], &[], 0, 512).unwrap(), [(0, 512, true)]);
        let error = runs(&[1, 3], &[], 0, 17 << 20).unwrap_err();
        assert_eq!((error.offset(), error.to_string().contains("entry 1")), (Some(8), true));
        let error = runs(&[1 << 30], &[], 0, 512).unwrap_err();
        assert_eq!(error.offset(), Some(1 << 30));
    }
}
