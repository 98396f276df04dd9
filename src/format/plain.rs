//! Clusters that are nothing but data of the image's own file, in the shortest form.

use crate::status::{BlockStatus, HostPlace, StatusRun};
use crate::units::{ByteLen, GuestOffset, GuestRange, HostOffset};
use crate::vectorized::vectorized;

/// Entries that are decoded before it is looked whether they all are plain ones.
const AT_ONCE: usize = 512;

/// The host clusters of guest clusters in a row. Nearly all that a large image has are such:
/// eight bytes for each instead of a [`StatusRun`] is a sixth of the memory to go over.
///
/// A status call puts there what is at the start of its range, and all that follows into its
/// runs; but only where the caller has it [`begin`](Self::begin).
#[derive(Debug, Default)]
pub(crate) struct PlainClusters {
    is_wanted: bool,
    cluster_bits: u32,
    /// What of them is asked for: the first and the last cluster may reach out of it.
    range: GuestRange,
    hosts: Vec<u64>,
}

impl PlainClusters {
    /// Forgets what there is; whether the next status call may put clusters here.
    pub(crate) fn begin(&mut self, is_wanted: bool) {
        self.is_wanted = is_wanted;
        self.hosts.clear();
    }

    /// True where clusters may be put here.
    pub(crate) fn is_wanted(&self) -> bool {
        self.is_wanted
    }

    /// True where none are here.
    pub(crate) fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Adds the clusters of `entries`, of which `range` is asked for, and which follow on those
    /// that are here. `host_of` decodes an entry, to an offset that is a multiple of the
    /// cluster's size, and to the bits that speak against its being a plain one; where there are
    /// any, nothing is added, and false is given back.
    #[inline(always)]
    pub(crate) fn push_all(
        &mut self,
        cluster_bits: u32,
        range: GuestRange,
        entries: &[[u8; 8]],
        host_of: impl Fn(u64) -> (u64, u64) + Copy,
    ) -> bool {
        let before = self.hosts.len();
        self.hosts.reserve(entries.len());
        for some in entries.chunks(AT_ONCE) {
            let hosts = &mut self.hosts;
            let against = vectorized(
                #[inline(always)]
                move || decode(some, host_of, hosts),
            );
            if against != 0 {
                self.hosts.truncate(before);
                return false;
            }
        }
        self.cluster_bits = cluster_bits;
        match before {
            0 => self.range = range,
            _ => self.range.end = range.end,
        }
        true
    }

    /// The stretches that lie in the file as on the disk, in guest order.
    pub(crate) fn stretches(&self) -> Stretches<'_> {
        let size = 1 << (self.cluster_bits & 63);
        let first = GuestOffset::new(self.range.start.get() / size * size);
        Stretches { range: self.range, size, at: first, hosts: &self.hosts }
    }

    /// The same as runs.
    pub(crate) fn runs(&self) -> impl Iterator<Item = StatusRun> {
        self.stretches().map(|(range, host)| StatusRun {
            start: range.start,
            length: range.length(),
            status: BlockStatus::Data(HostPlace::in_image(host)),
        })
    }
}

/// Adds the host offset of each entry, and gives back what speaks against any of them.
#[inline(always)]
fn decode(entries: &[[u8; 8]], host_of: impl Fn(u64) -> (u64, u64), hosts: &mut Vec<u64>) -> u64 {
    let mut against = 0;
    hosts.extend(entries.iter().map(|&entry| {
        let (host, against_it) = host_of(u64::from_be_bytes(entry));
        against |= against_it;
        host
    }));
    against
}

/// Stretches of the disk, and where in the file each starts.
#[derive(Clone, Debug)]
pub struct Stretches<'c> {
    range: GuestRange,
    size: u64,
    /// Where the next cluster starts on the disk.
    at: GuestOffset,
    hosts: &'c [u64],
}

impl Stretches<'_> {
    /// The host offset of each cluster that is left, in guest order.
    pub(crate) fn hosts(&self) -> &[u64] {
        self.hosts
    }

    /// Bytes of a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        self.size
    }

    /// The last of them.
    pub(crate) fn last_one(&self) -> Option<(GuestRange, HostOffset)> {
        let starts =
            self.hosts.windows(2).rposition(|two| two[1] != two[0].wrapping_add(self.size));
        let before = starts.map_or(0, |at| at + 1);
        let skipped = ByteLen::new(self.size.saturating_mul(before as u64));
        let rest = self.hosts.get(before..)?;
        Stretches { at: self.at.saturating_add(skipped), hosts: rest, ..*self }.next()
    }
}

impl Iterator for Stretches<'_> {
    type Item = (GuestRange, HostOffset);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (&first, mut rest) = self.hosts.split_first()?;
        // Offsets of 56 bits, and a disk that ends below 2^63.
        let mut expected = first.wrapping_add(self.size);
        let mut length = self.size;
        while let [next, others @ ..] = rest
            && *next == expected
        {
            expected = expected.wrapping_add(self.size);
            length = length.wrapping_add(self.size);
            rest = others;
        }
        self.hosts = rest;
        let start = self.at;
        self.at = start.saturating_add(ByteLen::new(length));
        let part = GuestRange::new(start, self.at).intersection(self.range);
        let host = HostOffset::new(first).saturating_add(part.start.since(start));
        Some((part, host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 4096;

    fn range(start: u64, end: u64) -> GuestRange {
        GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
    }

    /// Adds clusters by their numbers; 0 is no plain one.
    fn push(clusters: &mut PlainClusters, asked: GuestRange, numbers: &[u64]) -> bool {
        let entries: Vec<_> = numbers.iter().map(|number| (number * SIZE).to_be_bytes()).collect();
        clusters.push_all(12, asked, &entries, |entry| (entry, u64::from(entry == 0)))
    }

    fn stretches(clusters: &PlainClusters) -> Vec<(u64, u64, u64)> {
        let plain = |(range, host): (GuestRange, HostOffset)| {
            (range.start.get(), range.length().get(), host.get())
        };
        let all: Vec<_> = clusters.stretches().map(plain).collect();
        assert_eq!(clusters.stretches().last_one().map(plain), all.last().copied());
        all
    }

    #[test]
    fn neighbours_are_one_stretch_cut_to_what_is_asked_for() {
        let mut clusters = PlainClusters::default();
        clusters.begin(true);
        assert!(push(&mut clusters, range(SIZE + 512, 4 * SIZE), &[7, 8, 3]));
        assert_eq!(
            stretches(&clusters),
            [(SIZE + 512, 2 * SIZE - 512, 7 * SIZE + 512), (3 * SIZE, SIZE, 3 * SIZE)]
        );
        // The next table's go on where these end, and may carry them on.
        assert!(push(&mut clusters, range(4 * SIZE, 6 * SIZE - 512), &[4, 9]));
        assert_eq!(
            stretches(&clusters),
            [
                (SIZE + 512, 2 * SIZE - 512, 7 * SIZE + 512),
                (3 * SIZE, 2 * SIZE, 3 * SIZE),
                (5 * SIZE, SIZE - 512, 9 * SIZE)
            ]
        );
        let runs: Vec<_> = clusters.runs().map(|run| (run.start.get(), run.status)).collect();
        let place = HostPlace::in_image(HostOffset::new(9 * SIZE));
        assert_eq!(runs[2], (5 * SIZE, BlockStatus::Data(place)));
        clusters.begin(true);
        assert!(clusters.is_empty() && stretches(&clusters).is_empty());
    }

    #[test]
    fn of_entries_that_are_not_all_plain_none_is_taken() {
        let mut clusters = PlainClusters::default();
        clusters.begin(true);
        assert!(push(&mut clusters, range(0, 2 * SIZE), &[5, 6]));
        let before = stretches(&clusters);
        let count = 2 * AT_ONCE + 77;
        let asked = range(2 * SIZE, (2 + count as u64) * SIZE);
        for bad in [0, 1, AT_ONCE - 1, AT_ONCE, count - 1] {
            let mut numbers: Vec<_> = (10..).take(count).collect();
            numbers[bad] = 0;
            assert!(!push(&mut clusters, asked, &numbers));
            assert_eq!(stretches(&clusters), before);
        }
    }
}
