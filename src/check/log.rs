//! Counting findings, and keeping the first of each kind.

use super::finding::{Finding, FindingKind, Severity};

const KINDS: usize = FindingKind::ALL.len();

/// How many findings of each kind there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts([u64; KINDS]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; KINDS])
    }
}

impl Counts {
    /// How many of a kind.
    pub fn of(&self, kind: FindingKind) -> u64 {
        self.0[kind.index()]
    }

    /// How many of a severity.
    pub fn of_severity(&self, severity: Severity) -> u64 {
        self.iter()
            .filter(|(kind, _)| kind.severity() == severity)
            .fold(0, |sum: u64, (_, count)| sum.saturating_add(count))
    }

    /// The kinds of which there are some.
    pub fn iter(&self) -> impl Iterator<Item = (FindingKind, u64)> {
        FindingKind::ALL.iter().map(|&kind| (kind, self.of(kind))).filter(|&(_, count)| count > 0)
    }

    fn add(&mut self, kind: FindingKind, count: u64) {
        let total = &mut self.0[kind.index()];
        *total = total.saturating_add(count);
    }
}

/// What one worker finds: counts, and the first findings of each kind.
#[derive(Debug)]
pub(crate) struct Tally {
    counts: Counts,
    kept: Vec<Finding>,
    kept_of: [u64; KINDS],
    /// Most findings of a kind to keep.
    limit: u64,
}

impl Tally {
    pub(crate) fn new(limit: u64) -> Self {
        Self { counts: Counts::default(), kept: Vec::new(), kept_of: [0; KINDS], limit }
    }

    /// Counts a finding `count` times; `make` is called where it is to be kept.
    pub(crate) fn add(&mut self, kind: FindingKind, count: u64, make: impl FnOnce() -> Finding) {
        self.counts.add(kind, count);
        let kept = &mut self.kept_of[kind.index()];
        if *kept < self.limit {
            *kept += 1;
            self.kept.push(Finding { count, ..make() });
        }
    }

    /// Counts a finding once.
    pub(crate) fn push(&mut self, finding: Finding) {
        self.add(finding.kind, 1, || finding);
    }

    /// True where it keeps so many findings that they had better be told.
    fn is_full(&self) -> bool {
        self.kept.len() >= 4096
    }
}

/// Where all that is found comes together, in the order of the file.
pub(crate) struct Log<'s> {
    counts: Counts,
    told_of: [u64; KINDS],
    limit: u64,
    no_leaks: bool,
    sink: &'s mut dyn FnMut(Finding),
}

impl<'s> Log<'s> {
    /// Tells `sink` of at most `limit` findings of each kind.
    pub(crate) fn new(limit: u64, sink: &'s mut dyn FnMut(Finding)) -> Self {
        Self { counts: Counts::default(), told_of: [0; KINDS], limit, no_leaks: false, sink }
    }

    /// A tally for a part of the work.
    pub(crate) fn tally(&self) -> Tally {
        Tally::new(self.limit)
    }

    /// Most findings of a kind to keep.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// True where findings are not limited: then they must not pile up.
    pub(crate) fn is_unlimited(&self) -> bool {
        self.limit == u64::MAX
    }

    /// From now on leaks are no findings: some references could not be counted.
    pub(crate) fn ignore_leaks(&mut self) {
        self.no_leaks = true;
    }

    /// Takes over what a worker found.
    pub(crate) fn absorb(&mut self, tally: Tally) {
        let no_leaks = self.no_leaks;
        let ignored = |kind: FindingKind| no_leaks && kind.severity() == Severity::Leak;
        for (kind, count) in tally.counts.iter().filter(|&(kind, _)| !ignored(kind)) {
            self.counts.add(kind, count);
        }
        for finding in tally.kept.into_iter().filter(|finding| !ignored(finding.kind)) {
            let told = &mut self.told_of[finding.kind.index()];
            if *told < self.limit {
                *told += 1;
                (self.sink)(finding);
            }
        }
    }

    /// Tells what a tally keeps, once it is much: what is to come may be millions more.
    #[inline]
    pub(crate) fn absorb_if_full(&mut self, tally: &mut Tally) {
        if tally.is_full() {
            self.absorb(std::mem::replace(tally, Tally::new(tally.limit)));
        }
    }

    pub(crate) fn push(&mut self, finding: Finding) {
        let mut tally = self.tally();
        tally.push(finding);
        self.absorb(tally);
    }

    /// The counts so far.
    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_are_counted_and_the_first_of_each_kind_are_told() {
        let mut told = Vec::new();
        let mut sink = |finding: Finding| told.push((finding.kind, finding.count));
        let mut log = Log::new(2, &mut sink);
        for _ in 0..2 {
            let mut tally = log.tally();
            for count in 1..4 {
                let kind = FindingKind::LeakedClusters;
                tally.add(kind, count, || Finding::new(kind, "leaked"));
            }
            log.absorb(tally);
        }
        log.push(Finding::new(FindingKind::MarkedDirty, "dirty"));
        assert_eq!(log.counts().of_severity(Severity::Leak), 12);
        assert_eq!(log.counts().of(FindingKind::MarkedDirty), 1);
        let leaked = FindingKind::LeakedClusters;
        assert_eq!(told, [(leaked, 1), (leaked, 2), (FindingKind::MarkedDirty, 1)]);
    }

    #[test]
    fn a_tally_that_is_full_is_told_and_begins_anew() {
        let mut told = 0;
        let mut sink = |_| told += 1;
        let mut log = Log::new(u64::MAX, &mut sink);
        let (mut tally, mut most) = (log.tally(), 0);
        for _ in 0..10_000 {
            tally.push(Finding::new(FindingKind::BitmapTableInvalid, "broken"));
            most = most.max(tally.kept.len());
            log.absorb_if_full(&mut tally);
        }
        log.absorb(tally);
        assert_eq!(log.counts().of(FindingKind::BitmapTableInvalid), 10_000);
        assert_eq!((told, most), (10_000, 4096));
    }

    #[test]
    fn the_names_of_kinds_are_unlike_each_other() {
        let mut names: Vec<_> = FindingKind::ALL.iter().map(|kind| kind.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FindingKind::ALL.len());
        assert!(FindingKind::ALL.iter().enumerate().all(|(index, kind)| kind.index() == index));
    }
}
