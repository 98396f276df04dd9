//! How many references there are to each cluster of the file.
//!
//! Two bits a cluster hold 0, 1, 2, or "3 or more". Where some have 3 or more, the tables
//! are walked again, once for every 8 Mi such clusters at most, with counters that can count
//! on: memory does not grow with what the tables say.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use zerocopy::FromZeros;

use crate::error::{Error, ErrorKind, Result};

/// Clusters of which a word of [`Counters`] has the bits.
pub(crate) const LANES: u64 = 32;
/// The lower bit of each cluster.
const ONES: u64 = 0x5555_5555_5555_5555;
/// The count that stands for itself and all above.
pub(crate) const SATURATED: u64 = 3;

/// Takes references as the tables are walked.
pub(crate) trait References: Sync {
    /// Counts `weight` references to each of the `count` clusters from `first` on, which are
    /// inside of the file.
    fn add(&self, first: u64, count: u64, weight: u64);

    /// The references to a cluster so far; 3 stands for more, too.
    fn count(&self, cluster: u64) -> u64;
}

/// Two bits for each cluster.
pub(crate) struct Counters {
    words: Vec<AtomicU64>,
}

impl Counters {
    /// Counters of as many clusters, at most 2^31, all 0. Memory is taken as they are
    /// written to.
    ///
    /// # Errors
    /// There is not so much memory.
    pub(crate) fn new(clusters: u64) -> Result<Self> {
        let words = usize::try_from(clusters.div_ceil(LANES)).unwrap_or(usize::MAX);
        Ok(Self { words: zeroed(words)? })
    }

    /// The 32 clusters from `word * 32` on.
    pub(crate) fn word(&self, word: u64) -> u64 {
        self.at(word).map_or(0, |at| at.load(Relaxed))
    }

    /// Puts other values in the place of those counts.
    pub(crate) fn set_word(&self, word: u64, value: u64) {
        if let Some(at) = self.at(word) {
            at.store(value, Relaxed);
        }
    }

    /// How many words there are.
    pub(crate) fn words(&self) -> u64 {
        self.words.len() as u64
    }

    fn at(&self, word: u64) -> Option<&AtomicU64> {
        self.words.get(usize::try_from(word).ok()?)
    }

    #[inline]
    fn add_in_word(&self, word: u64, lanes: u64, weight: u64) {
        let Some(at) = self.at(word) else { return };
        // Two workers seldom meet: a failed exchange is no loss.
        let mut seen = at.load(Relaxed);
        loop {
            let mut sum = seen;
            for _ in 0..weight.min(SATURATED) {
                sum += lanes & !(sum & (sum >> 1));
            }
            match at.compare_exchange_weak(seen, sum, Relaxed, Relaxed) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }
}

impl References for Counters {
    #[inline]
    fn add(&self, first: u64, count: u64, weight: u64) {
        let (mut at, end) = (first, first + count);
        while at < end {
            let lane = at % LANES;
            let here = (LANES - lane).min(end - at);
            // `here` times 2 bits, from the lane on.
            let lanes = (ONES >> (64 - 2 * here)) << (2 * lane);
            self.add_in_word(at / LANES, lanes, weight);
            at += here;
        }
    }

    #[inline]
    fn count(&self, cluster: u64) -> u64 {
        lane(self.word(cluster / LANES), cluster % LANES)
    }
}

/// The count of one cluster in a word.
#[inline]
pub(crate) fn lane(word: u64, lane: u64) -> u64 {
    word >> (2 * lane) & 3
}

/// Whether some count of a word is 3, which stands for more.
#[inline]
fn has_saturated(word: u64) -> bool {
    word & (word >> 1) & ONES != 0
}

/// Whether some count of a word is 2 or more.
#[inline]
pub(crate) fn has_shared(word: u64) -> bool {
    word & !ONES != 0
}

/// Clusters of a page of exact counters.
const PAGE: u64 = 1024;
/// Pages at a time: 32 MiB of counters.
const MAX_PAGES: usize = 8192;

/// Counters that go on to 2^32 - 1, for some of the clusters.
pub(crate) struct ExactCounters {
    /// For each page of clusters where its counters are, counted from 1; 0 for those that
    /// have none.
    directory: Vec<u32>,
    /// The pages that have some.
    pages: Vec<u64>,
    counters: Vec<AtomicU32>,
}

impl ExactCounters {
    /// Counters for the next pages from `first` on in which some cluster has 3 references
    /// or more; `None` where there are none.
    ///
    /// # Errors
    /// There is not so much memory.
    pub(crate) fn for_saturated(counters: &Counters, first: u64) -> Result<Option<Self>> {
        let words_a_page = PAGE / LANES;
        let all = counters.words().div_ceil(words_a_page);
        let is_saturated = |page: &u64| {
            let start = page * words_a_page;
            (start..start + words_a_page).any(|word| has_saturated(counters.word(word)))
        };
        let pages: Vec<u64> = (first..all).filter(is_saturated).take(MAX_PAGES).collect();
        let Some(last) = pages.last() else { return Ok(None) };
        let mut directory = vec![0; usize::try_from(last + 1).unwrap_or(0)];
        for (number, &page) in (1u32..).zip(&pages) {
            if let Some(slot) = usize::try_from(page).ok().and_then(|at| directory.get_mut(at)) {
                *slot = number;
            }
        }
        let counters = zeroed(pages.len() * usize::try_from(PAGE).unwrap_or(0))?;
        Ok(Some(Self { directory, pages, counters }))
    }

    /// The page after the last one that has counters.
    pub(crate) fn next_page(&self) -> u64 {
        self.pages.last().map_or(0, |last| last + 1)
    }

    /// The clusters that have 3 references or more, in order, with their exact count.
    pub(crate) fn saturated<'c>(
        &'c self,
        counters: &'c Counters,
    ) -> impl Iterator<Item = (u64, u64)> + 'c {
        let clusters = self.pages.iter().flat_map(|page| page * PAGE..(page + 1) * PAGE);
        clusters
            .filter(|&cluster| counters.count(cluster) == SATURATED)
            .map(|cluster| (cluster, self.count(cluster)))
    }

    fn at(&self, cluster: u64) -> Option<&AtomicU32> {
        let page = *self.directory.get(usize::try_from(cluster / PAGE).ok()?)?;
        let page = u64::from(page.checked_sub(1)?);
        self.counters.get(usize::try_from(page * PAGE + cluster % PAGE).ok()?)
    }
}

impl References for ExactCounters {
    fn add(&self, first: u64, count: u64, weight: u64) {
        let weight = u32::try_from(weight).unwrap_or(u32::MAX);
        for cluster in first..first + count {
            if let Some(at) = self.at(cluster) {
                // At most 2^32 - 1: no refcount is compared above that without being wrong.
                let _ = at.fetch_update(Relaxed, Relaxed, |n| Some(n.saturating_add(weight)));
            }
        }
    }

    fn count(&self, cluster: u64) -> u64 {
        self.at(cluster).map_or(0, |at| at.load(Relaxed).into())
    }
}

/// Memory that is zero and not touched yet.
fn zeroed<T: FromZeros>(length: usize) -> Result<Vec<T>> {
    T::new_vec_zeroed(length).map_err(|_| {
        Error::new(ErrorKind::Io(format!(
            "not enough memory to count references: {} MiB",
            (length as u64).saturating_mul(size_of::<T>() as u64) >> 20
        )))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_stop_at_three_and_do_not_spill_over() {
        let counters = Counters::new(200).unwrap();
        counters.add(30, 100, 1);
        counters.add(31, 3, 2);
        counters.add(32, 1, 7);
        let counts: Vec<_> = (28..36).map(|cluster| counters.count(cluster)).collect();
        assert_eq!(counts, [0, 0, 1, 3, 3, 3, 1, 1]);
        assert_eq!((counters.count(129), counters.count(130)), (1, 0));
    }

    #[test]
    fn clusters_with_many_references_are_counted_exactly() {
        let counters = Counters::new(10 * PAGE).unwrap();
        let references = [(5, 1, 9), (3 * PAGE + 7, 2, 3), (9 * PAGE, 1, 2)];
        for (first, count, weight) in references {
            counters.add(first, count, weight);
        }
        let exact = ExactCounters::for_saturated(&counters, 0).unwrap().unwrap();
        for (first, count, weight) in references {
            exact.add(first, count, weight);
        }
        let found: Vec<_> = exact.saturated(&counters).collect();
        assert_eq!(found, [(5, 9), (3 * PAGE + 7, 3), (3 * PAGE + 8, 3)]);
        assert_eq!(exact.next_page(), 4);
        assert!(ExactCounters::for_saturated(&counters, 4).unwrap().is_none());
    }
}
