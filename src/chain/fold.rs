//! What becomes of one layer's runs: rows, or runs that the next layer is asked about.

use crate::extent::{Extent, Mapping, ZeroCause};
use crate::status::{BlockStatus, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange};

/// The extent of a run that no further layer is asked about.
#[inline]
pub(crate) fn last_answer(run: &StatusRun, depth: u32) -> Extent {
    let mapping = match run.status {
        BlockStatus::Data(place) => Mapping::Data(place),
        BlockStatus::Encrypted { place, cipher } => Mapping::Encrypted { place, cipher },
        BlockStatus::Compressed { host, stream_length, cluster } => {
            Mapping::Compressed { host, stream_length, cluster }
        }
        BlockStatus::Zero(zero) => Mapping::Zero(ZeroCause::Layer(zero)),
        BlockStatus::Unallocated(place) => Mapping::Zero(ZeroCause::Unallocated(place)),
        BlockStatus::Damaged { from } => Mapping::Damaged { from },
    };
    Extent { start: run.start, length: run.length, depth, mapping }
}

/// Appends the rows of the data runs at the start of `runs`, which follow on the last row,
/// and says how many runs that are. In most images these are nearly all, so they have a
/// loop of their own.
#[inline(never)]
pub(super) fn push_data(runs: &[StatusRun], depth: u32, extents: &mut Vec<Extent>) -> usize {
    extents.reserve(runs.len());
    let data = runs.iter().map_while(|run| match run.status {
        BlockStatus::Data(place) => Some((run.start, run.length, place)),
        _ => None,
    });
    let mut count = 0;
    // Where the row before would go on.
    let mut expected = None;
    for (start, length, place) in data {
        // Made where it is pushed: made before, it would be copied once more.
        let row = || Extent { start, length, depth, mapping: Mapping::Data(place) };
        if count == 0 || expected == Some(place) {
            push_row(extents, row());
        } else {
            extents.push(row());
        }
        expected = Some(place.advanced(length));
        count += 1;
    }
    count
}

/// Appends a row, joined to the one before where it carries that on.
#[inline(never)]
fn push_row(extents: &mut Vec<Extent>, next: Extent) {
    // Rows of one layer come in order, but not without gap.
    if let Some(last) = extents.last_mut()
        && last.end() == next.start
        && last.absorb(&next)
    {
        return;
    }
    extents.push(next);
}

/// Leaves a range to the next layer.
#[inline]
fn leave(left: &mut Vec<GuestRange>, range: GuestRange) {
    match left.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => left.push(range),
    }
}

/// Folds a layer's runs, which hold all of the ranges in `open`, into rows and into what is
/// `left` to the next layer. Ranges that the layer leaves as they are are not looked at one
/// by one: of a thousand layers, each may have something else.
pub(super) fn fold_into(
    open: &[GuestRange],
    runs: &[StatusRun],
    depth: u32,
    backing_size: Option<ByteLen>,
    extents: &mut Vec<Extent>,
    left: &mut Vec<GuestRange>,
) {
    let mut open = open.iter();
    let Some(mut wanted) = open.next().copied() else { return };
    let backing_end = GuestOffset::new(backing_size.map_or(0, ByteLen::get));
    for run in runs {
        let leaves_all = matches!(run.status, BlockStatus::Unallocated(_))
            && run.end() <= backing_end
            && run.start <= wanted.start;
        if leaves_all && wanted.end <= run.end() {
            leave(left, wanted);
            let rest = open.as_slice();
            let inside = rest.partition_point(|range| range.end <= run.end());
            left.extend_from_slice(&rest[..inside]);
            open = rest[inside..].iter();
            let Some(&next) = open.next() else { return };
            wanted = next;
        }
        while wanted.start < run.end() {
            if let Some(part) = run.clipped(wanted) {
                answer(part, depth, backing_size, extents, left);
            }
            if wanted.end > run.end() {
                wanted.start = run.end();
                break;
            }
            let Some(&next) = open.next() else { return };
            wanted = next;
        }
    }
}

/// Turns one run into a row, or into an open range where the backing file answers.
pub(super) fn answer(
    run: StatusRun,
    depth: u32,
    backing_size: Option<ByteLen>,
    extents: &mut Vec<Extent>,
    left: &mut Vec<GuestRange>,
) {
    let (BlockStatus::Unallocated(place), Some(backing_size)) = (run.status, backing_size) else {
        return push_row(extents, last_answer(&run, depth));
    };
    let backing_end = GuestOffset::new(backing_size.get());
    let inside = GuestRange::new(run.start, run.end().min(backing_end));
    if !inside.is_empty() {
        leave(left, inside);
    }
    let past = GuestRange::new(run.start.max(backing_end), run.end());
    if !past.is_empty() {
        let place = place.map(|place| place.advanced(past.start.since(run.start)));
        let mapping = Mapping::Zero(ZeroCause::PastBackingEnd(place));
        push_row(extents, Extent { start: past.start, length: past.length(), depth, mapping });
    }
}
