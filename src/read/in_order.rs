//! Work on all cores whose results are wanted in order.

use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::Result;

/// Items that each thread works on before their results are taken.
const ITEMS_PER_THREAD: usize = 4;

/// Most items of a batch: the memory of their results does not grow with the cores.
const ITEMS_AT_ONCE: usize = 64;

/// Makes something of each item on all cores, and gives it to `take` in the items' order,
/// while the next ones are made. At most [`ITEMS_AT_ONCE`] results wait and as many are in
/// the making. `state` makes a thread's working memory, which is kept.
///
/// # Errors
/// The first in order of what `work` or `take` says; `take` has had all that comes before
/// it.
pub(crate) fn in_order<I: Send, S: Send, T: Send>(
    mut items: impl Iterator<Item = I> + Send,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()> + Send,
) -> Result<()> {
    let at_once = (rayon::current_num_threads() * ITEMS_PER_THREAD).min(ITEMS_AT_ONCE);
    let idle: Mutex<Vec<S>> = Mutex::default();
    let lock_idle = || idle.lock().unwrap_or_else(PoisonError::into_inner);
    let work = |item| {
        let kept = lock_idle().pop();
        let mut state = kept.unwrap_or_else(&state);
        let made = work(&mut state, item);
        lock_idle().push(state);
        made
    };
    let mut ready: Vec<Result<T>> = Vec::new();
    loop {
        let waiting = std::mem::take(&mut ready);
        let (taken, made) = rayon::join(
            || waiting.into_iter().try_for_each(|made| take(made?)),
            || {
                let batch: Vec<I> = items.by_ref().take(at_once).collect();
                batch.into_par_iter().with_max_len(1).map(work).collect()
            },
        );
        taken?;
        ready = made;
        if ready.is_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn results_come_in_order_and_none_after_the_first_error() {
        for bad in [0, 1, 63, 500, 5000] {
            let mut taken = Vec::new();
            let work = |_: &mut (), item: u32| {
                if item >= bad { Err(Error::invalid(format!("{item}"))) } else { Ok(item) }
            };
            let outcome = in_order(
                0..1000,
                || (),
                work,
                |item| {
                    taken.push(item);
                    Ok(())
                },
            );
            assert!(taken.iter().copied().eq(0..bad.min(1000)));
            match outcome {
                Ok(()) => assert_eq!(bad, 5000),
                Err(error) => assert_eq!(error.to_string(), bad.to_string()),
            }
        }
    }

    #[test]
    fn what_takes_the_results_can_stop_the_work() {
        let mut taken = 0;
        let outcome = in_order(
            0..u64::MAX,
            || (),
            |(), item| Ok(item),
            |item| {
                taken += 1;
                if item == 300 { Err(Error::invalid("enough")) } else { Ok(()) }
            },
        );
        assert!(outcome.is_err());
        assert_eq!(taken, 301);
    }
}
