//! What each cluster of a file is used for, in 2 bits a cluster.

/// What a whole cluster is used for. Metadata goes before data where something is both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ClusterUse {
    /// Nothing that refers to all of it.
    None = 0,
    Data = 1,
    Metadata = 2,
    /// An L2 table that has been walked.
    WalkedTable = 3,
}

const PER_WORD: u64 = 32;
/// Words of a page, which is 32 KiB.
const PAGE_WORDS: usize = 4096;
const PER_PAGE: u64 = PER_WORD * PAGE_WORDS as u64;
/// Pages of the directory at most: 2^37 clusters, 64 TiB of the smallest ones.
const MAX_DIRECTORY: u64 = 1 << 20;
/// Pages that are filled at most: 128 MiB, which is 2^29 clusters. Past it are only images
/// whose few clusters are strewn over a sparse file.
const MAX_PAGES: u64 = 4096;
/// A page's words with the same use in all its clusters.
const SAME: u64 = 0x5555_5555_5555_5555;

/// The uses of all clusters. Pages are made when they are needed: a sparse file of 8 EiB
/// takes as little as a small one.
#[derive(Debug)]
pub(super) struct Clusters {
    pages: Vec<Option<Box<[u64; PAGE_WORDS]>>>,
    count: u64,
    pages_made: u64,
    exhausted: bool,
}

impl Clusters {
    /// For a file of so many clusters.
    pub(super) fn new(count: u64) -> Self {
        let directory = count.div_ceil(PER_PAGE).min(MAX_DIRECTORY);
        let mut pages = Vec::new();
        pages.resize_with(usize::try_from(directory).unwrap_or(0), || None);
        Self { pages, count, pages_made: 0, exhausted: false }
    }

    /// True where some use could not be kept: what seems to be unused then may be used.
    pub(super) fn is_exhausted(&self) -> bool {
        self.exhausted
    }

    fn place(cluster: u64) -> (usize, usize, u32) {
        let page = usize::try_from(cluster / PER_PAGE).unwrap_or(usize::MAX);
        let word = usize::try_from(cluster % PER_PAGE / PER_WORD).unwrap_or(PAGE_WORDS);
        // Always converts: less than 64.
        let shift = u32::try_from(cluster % PER_WORD * 2).unwrap_or(0);
        (page, word, shift)
    }

    /// The word with the cluster's use; `None` where there is no room for it any more.
    fn word(&mut self, cluster: u64) -> Option<(&mut u64, u32)> {
        let (page, word, shift) = Self::place(cluster);
        let Some(slot) = self.pages.get_mut(page) else {
            self.exhausted = true;
            return None;
        };
        if slot.is_none() {
            if self.pages_made == MAX_PAGES {
                self.exhausted = true;
                return None;
            }
            self.pages_made += 1;
            // From the heap's zeroed pages, not over the stack.
            *slot = vec![0; PAGE_WORDS].into_boxed_slice().try_into().ok();
        }
        slot.as_mut().and_then(|page| page.get_mut(word)).map(|word| (word, shift))
    }

    /// Notes the use of the clusters from `first` up to `end`.
    pub(super) fn mark(&mut self, first: u64, end: u64, used: ClusterUse) {
        for cluster in first..end.min(self.count) {
            let Some((word, shift)) = self.word(cluster) else { return };
            let before = *word >> shift & 3;
            if before < used as u64 {
                *word = *word & !(3 << shift) | (used as u64) << shift;
            }
        }
    }

    /// True the first time that it is asked of a cluster.
    pub(super) fn walk_table(&mut self, cluster: u64) -> bool {
        if cluster >= self.count {
            return false;
        }
        let Some((word, shift)) = self.word(cluster) else { return false };
        let is_new = *word >> shift & 3 != ClusterUse::WalkedTable as u64;
        *word |= (ClusterUse::WalkedTable as u64) << shift;
        is_new
    }

    /// The use of a cluster, and the first cluster after it that has another.
    pub(super) fn run(&self, first: u64) -> (ClusterUse, u64) {
        let used = self.get(first);
        let mut cluster = first;
        while cluster < self.count {
            let (page, word, shift) = Self::place(cluster);
            let Some(page) = self.pages.get(page) else {
                return if used == ClusterUse::None { (used, self.count) } else { (used, cluster) };
            };
            let Some(page) = page else {
                if used != ClusterUse::None {
                    return (used, cluster);
                }
                cluster = (cluster / PER_PAGE + 1) * PER_PAGE;
                continue;
            };
            // A walked table is metadata as any other.
            let word = page.get(word).copied().unwrap_or(0);
            let word = word & !(word >> 1 & SAME);
            let other = (word ^ (used as u64 * SAME)) >> shift;
            let same = u64::from(other.trailing_zeros() / 2).min(PER_WORD - u64::from(shift) / 2);
            cluster += same;
            if other != 0 {
                break;
            }
        }
        (used, cluster.min(self.count))
    }

    /// The use of a cluster; a walked table is metadata.
    fn get(&self, cluster: u64) -> ClusterUse {
        let (page, word, shift) = Self::place(cluster);
        let page = self.pages.get(page).and_then(Option::as_ref);
        match page.and_then(|page| page.get(word)).map_or(0, |word| word >> shift & 3) {
            0 => ClusterUse::None,
            1 => ClusterUse::Data,
            _ => ClusterUse::Metadata,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_across_words_and_pages() {
        let mut clusters = Clusters::new(3 * PER_PAGE + 5);
        clusters.mark(10, 100, ClusterUse::Data);
        clusters.mark(40, 41, ClusterUse::Metadata);
        clusters.mark(40, 41, ClusterUse::Data);
        assert!(clusters.walk_table(41));
        assert!(!clusters.walk_table(41));
        clusters.mark(41, 42, ClusterUse::Metadata);
        assert!(!clusters.walk_table(41));
        clusters.mark(2 * PER_PAGE - 1, 2 * PER_PAGE + 1, ClusterUse::Data);
        clusters.mark(3 * PER_PAGE, u64::MAX, ClusterUse::Metadata);
        let mut runs = Vec::new();
        let mut at = 0;
        while at < clusters.count {
            let (used, end) = clusters.run(at);
            runs.push((at, used));
            at = end;
        }
        assert_eq!(
            runs,
            [
                (0, ClusterUse::None),
                (10, ClusterUse::Data),
                (40, ClusterUse::Metadata),
                (42, ClusterUse::Data),
                (100, ClusterUse::None),
                (2 * PER_PAGE - 1, ClusterUse::Data),
                (2 * PER_PAGE + 1, ClusterUse::None),
                (3 * PER_PAGE, ClusterUse::Metadata),
            ]
        );
        assert_eq!(at, 3 * PER_PAGE + 5);
        assert_eq!(clusters.pages_made, 4);
        assert!(!clusters.is_exhausted());
    }

    #[test]
    fn a_sparse_file_costs_what_is_in_it_and_no_more_than_the_limit() {
        let mut clusters = Clusters::new(1 << 54);
        clusters.mark(5, 6, ClusterUse::Data);
        assert_eq!(clusters.run(6), (ClusterUse::None, 1 << 54));
        assert!(!clusters.is_exhausted());
        clusters.mark(1 << 50, (1 << 50) + 1, ClusterUse::Data);
        assert!(clusters.is_exhausted());
        for page in 0..2 * MAX_PAGES {
            clusters.mark(page * PER_PAGE, page * PER_PAGE + 1, ClusterUse::Data);
        }
        assert_eq!(clusters.pages_made, MAX_PAGES);
    }
}
