//! The threads that read images, and what of the process is shut while they do.
//!
//! | command | the main thread, once all files are open |
//! |---|---|
//! | check, diff, explain of an image, hash, info, map, partitions, show, snapshots, table | shut, too |
//! | explain of a NAME, plan, show --svg | opens more, or asks the kernel |
//! | convert, export | opens OUT and renames it; what is copied is read by others |
//! | attach, attach-tab, mount, verify | talks to the kernel |
//!
//! The threads that read are shut from the first on, whatever the command.

use std::sync::OnceLock;

/// Has the threads that read images do only that, and leave signals to the main thread, which
/// does the steps: taken by a worker, a signal that came before a step might be noted after
/// it. To be called before anything is read.
pub(crate) fn prepare() -> anyhow::Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_none() {
        #[cfg(feature = "sandbox")]
        imgdm::worker::on_start(start);
        rayon::ThreadPoolBuilder::new().start_handler(|_| start()).build_global()?;
        let _ = DONE.set(());
    }
    Ok(())
}

/// On a worker that starts.
pub(super) fn start() {
    #[cfg(feature = "device")]
    super::signal::leave_to_main_thread();
    #[cfg(feature = "sandbox")]
    imgdm::sandbox::shut_worker();
}

/// From now on nothing more is opened by this command: what follows is reading and printing.
pub(crate) fn shut_main_thread() {
    #[cfg(feature = "sandbox")]
    {
        // What is read of it once the files are shut would be nothing.
        super::output::keep_time_zone();
        imgdm::sandbox::shut_thread();
    }
}
