//! The threads that read what images say, and what is done on each before it reads.
//!
//! A program that runs as root can have them give up all that reading takes none of
//! ([`on_start`]). Then headers are parsed on such a thread, too, while the one that opens
//! files waits.

use std::sync::OnceLock;

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
