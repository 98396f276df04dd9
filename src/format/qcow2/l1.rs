//! The L1 table in memory: as much of it as a chain of a thousand layers can afford.

use super::entry::l2_table_offset;

/// L1 entries that an image keeps in memory at most: 32 KiB, of each of up to 1024 layers.
const MAX_KEPT: usize = 4096;
/// With their indices they take twice the room.
const MAX_KEPT_WITH_INDEX: usize = MAX_KEPT / 2;
/// Groups of entries of which an image remembers whether any names a table.
const GROUPS: usize = MAX_KEPT;

/// What an image keeps of its L1 table.
#[derive(Debug)]
pub(super) enum KeptL1 {
    /// All entries: they are few.
    All(Vec<u64>),
    /// Those that name a table, with their indices, in order: they are few. All others name
    /// none.
    Named(Vec<(u32, u64)>),
    /// No entry, only which groups of so many name any table: most others are not worth a
    /// read.
    Groups {
        /// Entries of a group.
        size: u64,
        /// Whether any of a group names a table.
        named: Vec<bool>,
    },
}

impl Default for KeptL1 {
    fn default() -> Self {
        Self::All(Vec::new())
    }
}

impl KeptL1 {
    /// What is kept of these entries.
    pub(super) fn of(entries: Vec<u64>) -> Self {
        let named = || entries.iter().zip(0u32..).filter(|(entry, _)| names_a_table(**entry));
        let count = named().take(MAX_KEPT_WITH_INDEX + 1).count();
        if count <= MAX_KEPT_WITH_INDEX && count <= entries.len() / 2 {
            return Self::Named(named().map(|(&entry, index)| (index, entry)).collect());
        }
        if entries.len() <= MAX_KEPT {
            return Self::All(entries);
        }
        let size = entries.len().div_ceil(GROUPS);
        let any = |group: &[u64]| group.iter().any(|&entry| names_a_table(entry));
        Self::Groups { size: size as u64, named: entries.chunks(size).map(any).collect() }
    }

    /// Entry `index`; `None` where it is not kept. Some that names no table may read as 0.
    pub(super) fn get(&self, index: u64) -> Option<u64> {
        match self {
            Self::All(entries) => entries.get(usize::try_from(index).ok()?).copied(),
            Self::Named(entries) => Some(
                entries
                    .binary_search_by_key(&index, |&(index, _)| u64::from(index))
                    .map_or(0, |at| entries[at].1),
            ),
            Self::Groups { .. } => None,
        }
    }

    /// The first entry from `index` on that names a table, as far as is known; `None` where
    /// there is none.
    pub(super) fn next_named(&self, index: u64) -> Option<u64> {
        match self {
            Self::All(entries) => {
                let rest = entries.get(usize::try_from(index).ok()?..)?;
                let distance = rest.iter().position(|&entry| names_a_table(entry))?;
                Some(index + distance as u64)
            }
            Self::Named(entries) => {
                let at = entries.partition_point(|&(other, _)| u64::from(other) < index);
                entries.get(at).map(|&(index, _)| u64::from(index))
            }
            Self::Groups { size, named } => {
                let group = index / size;
                let rest = named.get(usize::try_from(group).ok()?..)?;
                let distance = rest.iter().position(|&named| named)?;
                Some(((group + distance as u64) * size).max(index))
            }
        }
    }
}

fn names_a_table(entry: u64) -> bool {
    l2_table_offset(entry).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u64 = 0x5_0000;

    /// A table of so many entries, of which these name a table.
    fn table(length: usize, named: &[usize]) -> Vec<u64> {
        let mut entries = vec![0; length];
        for &index in named {
            entries[index] = TABLE + ((index as u64) << 16);
        }
        entries
    }

    #[test]
    fn whatever_is_kept_says_the_same_of_each_entry() {
        let all: Vec<_> = (0..9000).collect();
        let halves: Vec<_> = (0..9000).step_by(2).collect();
        for (length, named) in [
            (10, &[][..]),
            (10, &[0, 9]),
            (10, &all[..10]),
            (MAX_KEPT, &all[..MAX_KEPT]),
            (9000, &all[7..11]),
            (9000, &halves),
            (9000, &all),
            (40_000, &all),
        ] {
            let entries = table(length, named);
            let kept = KeptL1::of(entries.clone());
            let mut true_next = None;
            for index in (0..length + 2).rev() {
                if let Some(entry) = kept.get(index as u64) {
                    assert_eq!(entry, entries.get(index).copied().unwrap_or(0));
                }
                if entries.get(index).is_some_and(|&entry| entry != 0) {
                    true_next = Some(index);
                }
                let next = kept.next_named(index as u64);
                match &kept {
                    // Nearer perhaps, never further.
                    KeptL1::Groups { .. } => {
                        let next = next.unwrap_or(u64::MAX);
                        assert!(next >= index as u64);
                        assert!(true_next.is_none_or(|at| next <= at as u64));
                    }
                    _ => assert_eq!(next, true_next.map(|at| at as u64)),
                }
            }
        }
    }

    #[test]
    fn an_empty_table_of_any_size_takes_no_memory() {
        assert!(matches!(KeptL1::of(vec![1 << 63; 100_000]), KeptL1::Named(few) if few.is_empty()));
    }

    #[test]
    fn no_table_takes_more_memory_than_the_largest_that_is_kept() {
        for entries in [vec![TABLE; 4 << 20], vec![TABLE; MAX_KEPT], table(1 << 20, &[1, 2, 3])] {
            let bytes = match KeptL1::of(entries) {
                KeptL1::All(all) => all.capacity() * 8,
                KeptL1::Named(named) => named.capacity() * 16,
                KeptL1::Groups { named, .. } => named.capacity(),
            };
            assert!(bytes <= MAX_KEPT * 8, "{bytes}");
        }
    }
}
