//! SIGINT, SIGTERM and SIGHUP: noted, so that what is half built can be taken back first.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};

use nix::sys::signal::{SigSet, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use imgdm::device::Interrupt;

/// On a worker: the signals are not for this thread.
pub(crate) fn leave_to_main_thread() {
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // Where that fails, the handler runs there: late, but it runs.
    let _ = set.thread_block();
}

static SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// From now on the signals no longer end the process at once, but set the flag that
/// this gives back, every time the same one. The handler itself sets it: a signal that came
/// before a step is seen by that step, which a thread that passes signals on could not
/// promise.
pub(crate) fn catch() -> anyhow::Result<Interrupt<'static>> {
    if let Some(caught) = SIGNAL.get() {
        return Ok(Interrupt::new(caught));
    }
    let caught = SIGNAL.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        flag::register_usize(signal, Arc::clone(caught), usize::try_from(signal)?)?;
    }
    Ok(Interrupt::new(caught))
}

/// Ends the process as the signal would have.
pub(crate) fn die_by(signal: i32) {
    // Where even that fails, the exit status says that something went wrong.
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}
