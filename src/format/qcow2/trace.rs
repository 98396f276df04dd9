//! The L1 and L2 entry, the subcluster's bits and the refcount of one guest byte.

use super::entry::{L2Entry, L2Format, l2_table_offset};
use super::header::{Qcow2Header, SUBCLUSTERS_PER_CLUSTER, TableLocation};
use super::{Qcow2Image, mapping, refcount};
use crate::format::trace::TraceStep;
use crate::source::Source;
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// Appends the entries that lead to the guest's byte at `guest`, as far as they can be read
/// and make sense. What is wrong, [`status`](mapping::status) says.
pub(super) fn trace(image: &Qcow2Image, guest: GuestOffset, steps: &mut Vec<TraceStep>) {
    let (source, header) = (&image.source, &image.header);
    let is_good = |index, table| mapping::check_l2_table(image, index, table).is_ok();
    let Some(entry) = trace_tables(source, header, image.l1_table, guest, is_good, steps) else {
        return;
    };
    let host = match entry {
        L2Entry::Standard(host) | L2Entry::ZeroAllocated(host) if !header.has_data_file() => host,
        L2Entry::Compressed { host, .. } => host,
        _ => return,
    };
    let cluster = HostOffset::new(host.get() / header.cluster_size() * header.cluster_size());
    let found = refcount::refcount_of(source, header, cluster);
    let found = found.map_err(|error| error.at_path(source.path()));
    steps.push(TraceStep::Refcount { cluster, found });
}

/// Appends the L1 and L2 entry and the bitmap that lead to a byte from an L1 table, as far
/// as they can be read and `is_good` takes the L2 table of an L1 entry; gives back the L2
/// entry, or `None` where it ends before.
pub(crate) fn trace_tables(
    source: &Source,
    header: &Qcow2Header,
    l1_table: TableLocation,
    guest: GuestOffset,
    is_good: impl FnOnce(u64, HostOffset) -> bool,
    steps: &mut Vec<TraceStep>,
) -> Option<L2Entry> {
    let index = guest.get() / header.l2_coverage();
    let entries = l1_table.length.get() / 8;
    if index >= entries {
        steps.push(TraceStep::NoL1Entry { index, entries });
        return None;
    }
    let at = l1_table.offset.saturating_add(ByteLen::new(index * 8));
    let value = read_entry(source, at)?;
    let l2_table = l2_table_offset(value);
    steps.push(TraceStep::L1Entry { index, at, value, l2_table });
    let table = l2_table.filter(|&table| is_good(index, table))?;

    let index = guest.get() % header.l2_coverage() / header.cluster_size();
    let at = table.saturating_add(ByteLen::new(index * header.l2_entry_size()));
    let value = read_entry(source, at)?;
    let entry = L2Format::of(header).decode(value);
    steps.push(TraceStep::L2Entry { index, at, value, entry });
    if header.has_extended_l2() && !matches!(entry, L2Entry::Compressed { .. }) {
        let at = at.saturating_add(ByteLen::new(8));
        let in_cluster = guest.get() % header.cluster_size();
        let number = in_cluster / (header.cluster_size() / SUBCLUSTERS_PER_CLUSTER);
        steps.push(TraceStep::Subcluster { at, bitmap: read_entry(source, at)?, number });
    }
    Some(entry)
}

fn read_entry(source: &Source, at: HostOffset) -> Option<u64> {
    let mut bytes = [0; 8];
    source.read_exact(at, &mut bytes, "a table's entry").ok()?;
    Some(u64::from_be_bytes(bytes))
}
