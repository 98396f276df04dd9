//! Cleaning the directory of kept files: what nobody can ever use again is removed.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::sys::signal::SigSet;

use super::cache::{SUFFIX, open_ours};
use super::origin::Origin;
use super::place::TEMPORARY_PREFIX;
use super::trailer::Trailer;

/// How long is waited for file systems of other images: one whose server is gone never
/// answers.
const PATIENCE: Duration = Duration::from_secs(2);

/// Removes the files with a temporary name whose maker is gone, and the kept files of
/// images that are gone.
pub(super) fn sweep(directory: &Path) {
    remove_unfinished(directory);
    let (sender, receiver) = channel::<()>();
    let directory = directory.to_owned();
    let sweeper = std::thread::Builder::new().name("sweep".to_owned()).spawn(move || {
        // Signals are for the thread that does the work.
        let _ = SigSet::all().thread_block();
        remove_forsaken(&directory);
        drop(sender);
    });
    if sweeper.is_ok() {
        let _ = receiver.recv_timeout(PATIENCE);
    }
}

fn remove_unfinished(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if !entry.file_name().as_bytes().starts_with(TEMPORARY_PREFIX.as_bytes()) {
            continue;
        }
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(entry.path());
        let lock = |file| Flock::lock(file, FlockArg::LockExclusiveNonblock);
        if file.is_ok_and(|file| lock(file).is_ok()) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn remove_forsaken(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if is_kept_name(&entry.file_name()) && is_forsaken(&entry.path()) {
            log::info!("{}: removed, its image is gone", entry.path().display());
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

fn is_kept_name(name: &OsStr) -> bool {
    name.as_bytes().ends_with(SUFFIX.as_bytes())
}

/// Whether a file is one that is kept of images, of which one is gone. What is damaged or
/// of another version says nothing of its images, and stays.
fn is_forsaken(path: &Path) -> bool {
    let origins = open_ours(path).and_then(|(file, metadata)| {
        Ok(match Trailer::find(&file, metadata.len())? {
            Some(trailer) => trailer.read_origins(&file)?,
            None => None,
        })
    });
    matches!(origins, Ok(Some(origins)) if origins.iter().any(Origin::is_gone))
}
