//! The threads that read what images say, and what is done on each before it reads.
//!
//! A program that runs as root can have them give up all that reading takes none of
//! ([`on_start`]). Then headers are parsed on such a thread, too, while the one that opens
//! files waits.

use std::sync::OnceLock;
use std::sync::mpsc::{channel, sync_channel};
use std::thread;

use crate::error::{Error, Result};

static START: OnceLock<fn()> = OnceLock::new();

/// Has every thread that this library starts to read images call `hook` first. The threads of
/// rayon's global pool are the program's: it has to give them the same. To be called once, and
/// before any image is opened.
pub fn on_start(hook: fn()) {
    let _ = START.set(hook);
}

/// On a thread that starts.
pub(crate) fn started() {
    if let Some(hook) = START.get() {
        hook();
    }
}

/// True where threads that read are not as free as others.
pub(crate) fn are_apart() -> bool {
    START.get().is_some()
}

/// Does `work` on a thread of the pool, where those are not as free as this one.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if are_apart() { rayon::scope(|_| work()) } else { work() }
}

/// Calls `each` with what `gather` puts into the list that it gets, list by list, until it says
/// that this was the last. Where threads that read are not as free as this one, such a thread
/// gathers the next list meanwhile.
///
/// # Errors
/// The first of what either says; `each` has had all that was gathered before.
pub(crate) fn gathered_apart<T: Send>(
    gather: impl FnMut(&mut Vec<T>) -> Result<bool> + Send,
    each: impl FnMut(&[T]) -> Result<()>,
) -> Result<()> {
    let is_apart = rayon::current_thread_index().is_some();
    gathered(are_apart() && !is_apart, gather, each)
}

fn gathered<T: Send>(
    apart: bool,
    mut gather: impl FnMut(&mut Vec<T>) -> Result<bool> + Send,
    mut each: impl FnMut(&[T]) -> Result<()>,
) -> Result<()> {
    if !apart {
        let mut list = Vec::new();
        loop {
            list.clear();
            let more = gather(&mut list);
            each(&list)?;
            if !more? {
                return Ok(());
            }
        }
    }
    let (full, lists) = sync_channel(1);
    let (done_with, empty) = channel::<Vec<T>>();
    thread::scope(|scope| {
        let gathering = move || {
            started();
            loop {
                let mut list = empty.try_recv().unwrap_or_default();
                list.clear();
                let more = gather(&mut list);
                let is_last = !matches!(more, Ok(true));
                if full.send((list, more)).is_err() || is_last {
                    return;
                }
            }
        };
        let name = thread::Builder::new().name("gather".to_owned());
        name.spawn_scoped(scope, gathering).map_err(|e| Error::io("cannot start a thread", e))?;
        for (list, more) in lists {
            each(&list)?;
            let _ = done_with.send(list);
            more?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    /// What is gathered of so many lists, where the last fails or not, and `each` has enough.
    fn run(apart: bool, lists: usize, fails: bool, enough: usize) -> (Vec<usize>, Result<()>) {
        let (mut next, mut got) = (0, Vec::new());
        let error = |what: &str| Err(Error::new(ErrorKind::Io(what.to_owned())));
        let gather = |list: &mut Vec<usize>| {
            assert!(list.is_empty());
            list.extend(next * 10..next * 10 + 10);
            next += 1;
            if fails && next == lists { error("bad") } else { Ok(next < lists) }
        };
        let outcome = gathered(apart, gather, |list| {
            got.extend_from_slice(list);
            if got.len() >= enough { error("enough").map(|_: bool| ()) } else { Ok(()) }
        });
        (got, outcome)
    }

    #[test]
    fn what_is_gathered_comes_in_order_up_to_the_first_error() {
        for apart in [false, true] {
            let (got, outcome) = run(apart, 7, false, 1000);
            assert!(outcome.is_ok() && got == (0..70).collect::<Vec<_>>());
            let (got, outcome) = run(apart, 7, true, 1000);
            assert!(outcome.unwrap_err().to_string().contains("bad"));
            assert_eq!(got.len(), 70);
            let (got, outcome) = run(apart, 7, true, 25);
            assert!(outcome.unwrap_err().to_string().contains("enough"));
            assert_eq!(got.len(), 30);
        }
    }
}
