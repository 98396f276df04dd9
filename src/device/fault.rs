//! Faults on demand, for the tests that kill imgdm between any two steps.
//!
//! Only with the feature `fault-injection`: `IMGDM_FAULT=STEP:ACTION`, where STEP is a
//! step's name (`top.create`) or its number from 1, and ACTION what is done once that
//! step has been taken: `kill` (SIGKILL), `stop` (SIGSTOP), `tty` (all by which a terminal
//! stops a process), `term` (SIGTERM), `fail`.
//! `IMGDM_FAULT=list` prints each step's number and name on standard error.

use crate::error::Result;

/// Marks that the step of this name has been taken.
///
/// # Errors
/// The fault `fail`.
#[cfg(not(feature = "fault-injection"))]
#[inline]
pub fn point(_step: std::fmt::Arguments<'_>) -> Result<()> {
    Ok(())
}

/// Marks that the step of this name has been taken.
///
/// # Errors
/// The fault `fail`.
#[cfg(feature = "fault-injection")]
pub fn point(step: std::fmt::Arguments<'_>) -> Result<()> {
    use crate::error::{Error, ErrorKind};
    use nix::sys::signal::{Signal, raise};
    use std::sync::atomic::{AtomicU32, Ordering};

    static STEPS: AtomicU32 = AtomicU32::new(0);
    let number = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
    let Some(wanted) = std::env::var_os("IMGDM_FAULT") else { return Ok(()) };
    let Some(wanted) = wanted.to_str() else { return Ok(()) };
    let name = step.to_string();
    if wanted == "list" {
        eprintln!("{number} {name}");
        return Ok(());
    }
    let Some((at, action)) = wanted.rsplit_once(':') else { return Ok(()) };
    if at != name && at != number.to_string() {
        return Ok(());
    }
    let signals = match action {
        "kill" => &[Signal::SIGKILL][..],
        "stop" => &[Signal::SIGSTOP],
        "tty" => &[Signal::SIGTSTP, Signal::SIGTTOU, Signal::SIGTTIN],
        "term" => &[Signal::SIGTERM],
        _ => return Err(Error::new(ErrorKind::Io(format!("fault injected after {name}")))),
    };
    let raised = signals.iter().try_for_each(|&signal| raise(signal));
    raised.map_err(|errno| Error::io("cannot raise a signal", errno.into()))
}
