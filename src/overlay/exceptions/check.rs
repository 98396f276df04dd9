//! Whether a store may be given to the kernel.
//!
//! dm-snapshot takes exceptions as it finds them (read_exceptions() in
//! drivers/md/dm-snap-persistent.c). What it would never have written itself can make it panic
//! (in dm-exception-store.h the upper bits of a chunk's number count those that follow it, and
//! that count has a BUG_ON), or write over what others have.

use std::collections::BTreeSet;

use super::{Exception, ExceptionStore};
use crate::error::{Error, Result};

/// How much is looked at in one go. Memory is taken for what there is, and at most for this.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Numbers of chunks, a bit each.
    pub(super) bits: u64,
    /// Exceptions to be sorted, 8 bytes each.
    pub(super) sorted: u64,
    /// How often all exceptions are read.
    pub(super) rounds: usize,
}

const LIMITS: Limits = Limits { bits: 1 << 30, sorted: 4 << 20, rounds: 256 };

impl ExceptionStore<'_> {
    /// Checks all exceptions: each is of a chunk of the disk and lies in a chunk of the store
    /// that is for data, and no chunk is named twice.
    ///
    /// # Errors
    /// `InvalidImage`, with where it is wrong; a read failed.
    pub fn check(&self) -> Result<()> {
        self.check_within(LIMITS)
    }

    pub(super) fn check_within(&self, limits: Limits) -> Result<()> {
        let (mut count, mut last) = (0, Exception { old: 0, new: 0 });
        self.for_each(|Exception { old, new }| {
            count += 1;
            last = Exception { old: last.old.max(old), new: last.new.max(new) };
            Ok(())
        })?;
        let (old, new) = (|each: Exception| each.old, |each: Exception| each.new);
        self.each_once(count, last.old, limits, old, "of the disk")?;
        self.each_once(count, last.new, limits, new, "of the store")
    }

    /// Refuses a number twice among the `count` that `number` takes of the exceptions, the
    /// highest of which is `last`.
    fn each_once(
        &self,
        count: u64,
        last: u64,
        limits: Limits,
        number: impl Fn(Exception) -> u64,
        of: &str,
    ) -> Result<()> {
        let twice = |number: u64| {
            let message =
                format!("the overlay's store is damaged: its chunk {number} {of} is named twice");
            Err(self.invalid(self.start, message))
        };
        if last >= limits.bits && count <= limits.sorted {
            let mut numbers = Vec::new();
            self.for_each(|exception| {
                numbers.push(number(exception));
                Ok(())
            })?;
            numbers.sort_unstable();
            let pair = numbers.windows(2).find(|pair| pair[0] == pair[1]);
            return pair.map_or(Ok(()), |pair| twice(pair[0]));
        }
        let mut parts = BTreeSet::from([0]);
        if last >= limits.bits {
            self.for_each(|exception| {
                parts.insert(number(exception) / limits.bits);
                match parts.len() > limits.rounds {
                    true => Err(self.invalid(
                        self.start,
                        format!("{count} chunks {of} are too many and too far apart to be checked"),
                    )),
                    false => Ok(()),
                }
            })?;
        }
        for part in parts {
            let start = part.saturating_mul(limits.bits);
            let length = last.saturating_sub(start).saturating_add(1).min(limits.bits);
            // Pages of zeros are taken from the machine when they are written to.
            let mut seen = vec![0u64; usize::try_from(length.div_ceil(64)).unwrap_or(0)];
            self.for_each(|exception| {
                let number = number(exception);
                let Some(at) = number.checked_sub(start).filter(|&at| at < length) else {
                    return Ok(());
                };
                let word = usize::try_from(at / 64).ok().and_then(|at| seen.get_mut(at));
                let word = word.ok_or_else(|| Error::invalid("a chunk outside of the disk"))?;
                let bit = 1 << (at % 64);
                if *word & bit != 0 {
                    return twice(number);
                }
                *word |= bit;
                Ok(())
            })?;
        }
        Ok(())
    }
}
