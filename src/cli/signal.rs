//! SIGINT and SIGTERM: noted, so that what is half built can be taken back first.

use std::sync::atomic::{AtomicI32, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use imgdm::device::Interrupt;

static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// From now on the two signals no longer end the process at once, but set the flag that
/// this gives back.
pub(crate) fn catch() -> anyhow::Result<Interrupt<'static>> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            SIGNAL.store(signal, Ordering::Relaxed);
        }
    });
    Ok(Interrupt::new(&SIGNAL))
}

/// Ends the process as the signal would have.
pub(crate) fn die_by(signal: i32) {
    // Where even that fails, the exit status says that something went wrong.
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}
