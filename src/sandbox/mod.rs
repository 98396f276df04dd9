//! Shutting threads off from all that reading an image takes none of: files that are not open
//! yet, by Landlock; system calls, by seccomp. Should a hostile image get the better of a
//! parser, what it has then is the open files and this process's memory.
//!
//! Both hold for the calling thread and those that it starts from then on, and can't be taken
//! back. What the kernel has neither of is let be: this is a second line of defence.

mod calls;
#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests;

use std::fmt;
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, AccessNet, RestrictionStatus, Ruleset, RulesetAttr, RulesetError,
    RulesetStatus,
};

/// What of a thread is shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shut {
    /// Landlock: no file can be opened, made, renamed or removed, and no TCP port taken.
    pub files: bool,
    /// seccomp: only the system calls that reading takes, and the end of the process for those
    /// that nothing but an attack makes.
    pub calls: bool,
}

impl fmt::Display for Shut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let said = |is_shut| if is_shut { "shut" } else { "not shut (the kernel can't)" };
        write!(f, "files: {}, system calls: {}", said(self.files), said(self.calls))
    }
}

/// Shuts this thread, and all that it starts from now on, as far as the kernel can.
pub fn shut_thread() -> Shut {
    // Landlock first, whose own calls are not among those that stay.
    let shut = Shut { files: shut_files(), calls: shut_calls() };
    log::debug!("{}: {shut}", std::thread::current().name().unwrap_or("a thread"));
    shut
}

/// The same of every thread that reads images: to be given to [`crate::worker::on_start`] and
/// to rayon's global pool.
pub fn shut_worker() {
    shut_thread();
}

fn shut_files() -> bool {
    // What the running kernel has not of it is left out.
    let restrict = || -> Result<RestrictionStatus, RulesetError> {
        Ruleset::default()
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::from_all(ABI::V4))?
            .create()?
            .restrict_self()
    };
    match restrict() {
        Ok(RestrictionStatus { ruleset, .. }) => ruleset != RulesetStatus::NotEnforced,
        Err(error) => {
            log::debug!("Landlock: {error}");
            false
        }
    }
}

fn shut_calls() -> bool {
    static FILTERS: OnceLock<Vec<seccompiler::BpfProgram>> = OnceLock::new();
    let filters = FILTERS.get_or_init(|| {
        calls::filters().unwrap_or_else(|error| {
            log::debug!("seccomp: {error}");
            Vec::new()
        })
    });
    let applied = filters.iter().try_for_each(|filter| seccompiler::apply_filter(filter));
    if let Err(error) = &applied {
        log::debug!("seccomp: {error}");
    }
    applied.is_ok() && !filters.is_empty()
}
