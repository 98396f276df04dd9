//! How scattered in its files lies what follows one another on the disk.

use crate::extent::Mapping;
use crate::status::FileRole;
use crate::units::{ByteLen, GuestOffset, HostOffset};

/// How the stored parts of a disk (data, encrypted, compressed) lie in their files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragmentation {
    /// Bytes of the disk that are stored in a file.
    pub stored: ByteLen,
    /// Guest ranges that are each stored in one piece of one file. Compressed clusters are
    /// one piece where each starts in or right behind the sectors of the one before.
    pub extents: u64,
    /// Steps from one stored cluster to the next one of the disk, where that is stored too.
    pub steps: u64,
    /// Those of the steps that lead elsewhere: not right behind in the same file.
    pub jumps: u64,
}

impl Fragmentation {
    /// Length of an extent on average, rounded down; none where nothing is stored.
    pub fn mean_extent(&self) -> Option<ByteLen> {
        self.stored.get().checked_div(self.extents).map(ByteLen::new)
    }
}

/// A place in one of a chain's files: the layer's depth, its file, and where in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    layer: u32,
    file: FileRole,
    host: HostOffset,
    /// Where what carries on may start: between the two.
    next: (HostOffset, HostOffset),
}

impl Place {
    fn of(layer: u32, length: ByteLen, mapping: Mapping) -> Option<Self> {
        match mapping {
            Mapping::Data(place) | Mapping::Encrypted { place, .. } => {
                let end = place.offset.saturating_add(length);
                Some(Self { layer, file: place.file, host: place.offset, next: (end, end) })
            }
            Mapping::Compressed { host, stream_length, .. } => Some(Self {
                layer,
                file: FileRole::Image,
                host,
                // Where a stream ends is known to its last sector only, and the next one
                // may start in that.
                next: (host, host.saturating_add(stream_length)),
            }),
            Mapping::Zero(_) | Mapping::Damaged { .. } => None,
        }
    }

    fn is_carried_on_by(&self, next: &Self) -> bool {
        self.layer == next.layer
            && self.file == next.file
            && (self.next.0..=self.next.1).contains(&next.host)
    }
}

/// Measures a disk window by window; neighbouring windows' measures are joined.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measure {
    cluster_size: u64,
    found: Fragmentation,
    /// Where the first stored part starts.
    first: Option<(GuestOffset, Place)>,
    /// Where the last one ends.
    last: Option<(GuestOffset, Place)>,
}

impl Measure {
    /// A measure of nothing; steps are counted in clusters of this size.
    pub(super) fn new(cluster_size: u64) -> Self {
        let found = Fragmentation::default();
        Self { cluster_size: cluster_size.max(1), found, first: None, last: None }
    }

    /// Adds the next part of the disk, which layer `layer` answers for.
    #[inline]
    pub(super) fn push(
        &mut self,
        start: GuestOffset,
        length: ByteLen,
        layer: u32,
        mapping: Mapping,
    ) {
        let Some(place) = Place::of(layer, length, mapping) else { return };
        let end = start.saturating_add(length);
        self.found.extents += 1;
        self.join(start, &place);
        self.found.stored = ByteLen::new(self.found.stored.get().saturating_add(length.get()));
        // The cluster bounds inside of the part.
        let last_byte = end.get().saturating_sub(1);
        let clusters = last_byte / self.cluster_size;
        self.found.steps += clusters.saturating_sub(start.get() / self.cluster_size);
        self.first.get_or_insert((start, place));
        self.last = Some((end, place));
    }

    /// Adds what was measured right behind.
    pub(super) fn append(&mut self, next: &Self) {
        self.found.extents += next.found.extents;
        self.found.steps += next.found.steps;
        self.found.jumps += next.found.jumps;
        let stored = self.found.stored.get().saturating_add(next.found.stored.get());
        self.found.stored = ByteLen::new(stored);
        if let Some((start, place)) = &next.first {
            self.join(*start, place);
        }
        self.first = self.first.or(next.first);
        self.last = next.last.or(self.last);
    }

    /// Sees how what starts here, and has been counted as an extent, follows on the last.
    #[inline]
    fn join(&mut self, start: GuestOffset, place: &Place) {
        let Some((end, last)) = &self.last else { return };
        if *end != start {
            return;
        }
        if last.is_carried_on_by(place) {
            self.found.extents -= 1;
            self.found.steps += u64::from(start.is_multiple_of(self.cluster_size));
        } else {
            self.found.jumps += 1;
            self.found.steps += 1;
        }
    }

    pub(super) fn finish(&self) -> Fragmentation {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::HostPlace;

    const CLUSTER: u64 = 100;

    fn data(host: u64) -> Mapping {
        Mapping::Data(HostPlace::in_image(HostOffset::new(host)))
    }

    fn compressed(host: u64) -> Mapping {
        Mapping::Compressed {
            host: HostOffset::new(host),
            stream_length: ByteLen::new(40),
            cluster: GuestOffset::ZERO,
        }
    }

    /// Measures parts of (start, length, layer, mapping), also cut in two at every part.
    #[track_caller]
    fn check(parts: &[(u64, u64, u32, Mapping)], expected: (u64, u64, u64, u64)) {
        let measure = |parts: &[(u64, u64, u32, Mapping)]| {
            let mut measure = Measure::new(CLUSTER);
            for &(start, length, layer, mapping) in parts {
                measure.push(GuestOffset::new(start), ByteLen::new(length), layer, mapping);
            }
            measure
        };
        for cut in 0..=parts.len() {
            let mut whole = measure(&parts[..cut]);
            whole.append(&measure(&parts[cut..]));
            let Fragmentation { stored, extents, steps, jumps } = whole.finish();
            assert_eq!((stored.get(), extents, steps, jumps), expected, "cut at {cut}");
        }
    }

    #[test]
    fn what_lies_in_one_piece_has_steps_and_no_jump() {
        check(&[(0, 300, 0, data(0)), (300, 100, 0, data(300))], (400, 1, 3, 0));
        check(&[], (0, 0, 0, 0));
    }

    #[test]
    fn a_step_elsewhere_or_to_another_file_is_a_jump() {
        check(&[(0, 100, 0, data(0)), (100, 100, 0, data(500))], (200, 2, 1, 1));
        check(&[(0, 100, 0, data(0)), (100, 100, 1, data(100))], (200, 2, 1, 1));
        // Also inside of a cluster, where an overlay's are smaller.
        check(&[(0, 50, 0, data(0)), (50, 50, 1, data(50))], (100, 2, 1, 1));
    }

    #[test]
    fn over_a_gap_there_is_no_step() {
        let zero = Mapping::Zero(crate::extent::ZeroCause::Unallocated(None));
        let parts = [(0, 100, 0, data(0)), (100, 100, 0, zero), (200, 100, 0, data(900))];
        check(&parts, (200, 2, 0, 0));
    }

    #[test]
    fn compressed_clusters_follow_in_the_sectors_of_the_one_before() {
        let parts = [
            (0, 100, 0, compressed(1000)),
            (100, 100, 0, compressed(1033)),
            (200, 100, 0, compressed(1073)),
            (300, 100, 0, compressed(2000)),
        ];
        check(&parts, (400, 2, 3, 1));
    }
}
