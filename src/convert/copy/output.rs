//! Writing to the output's file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

use super::super::Placed;
use super::super::reflink::HostCalls;
use super::{CopyOptions, lock};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{GuestOffset, GuestRange};

/// Bytes that are written before they are started to be written out.
const WRITE_BACK: u64 = 8 << 20;

/// The file that bytes are written to.
#[derive(Debug)]
pub(super) struct Output<'o> {
    file: File,
    /// Held by who writes to a regular file. The kernel lets one at a time write to it anyway,
    /// but has the others turn in circles for that long.
    writing: Option<Mutex<()>>,
    calls: &'o dyn HostCalls,
    write_back: bool,
    name: &'o Path,
}

impl<'o> Output<'o> {
    pub(super) fn new(file: &File, options: &CopyOptions<'o>) -> Result<Self> {
        let file = file.try_clone();
        let file = file.map_err(|error| Error::io("cannot copy the descriptor", error))?;
        let metadata = file.metadata();
        let metadata = metadata.map_err(|error| Error::io("cannot look at the output", error))?;
        let is_device = metadata.file_type().is_block_device();
        Ok(Self {
            file,
            writing: (!is_device).then(Mutex::default),
            calls: options.calls,
            write_back: options.write_back,
            name: options.data_name,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// To be held while the file is written to.
    pub(super) fn lock(&self) -> Option<MutexGuard<'_, ()>> {
        self.writing.as_ref().map(lock)
    }

    pub(super) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let writing = self.lock();
        self.file.write_all_at(bytes, offset).map_err(|error| self.write_failed(error, offset))?;
        drop(writing);
        self.has_written(offset, bytes.len() as u64);
        Ok(())
    }

    /// The error of writing at that offset.
    pub(super) fn write_failed(&self, error: io::Error, offset: u64) -> Error {
        let message = "cannot write the data".to_owned();
        let error = Error::new(ErrorKind::CannotCreate(message)).with_source(error);
        error.at_offset(offset).at_path(self.name)
    }

    /// Has what was written some time ago written out.
    fn has_written(&self, offset: u64, length: u64) {
        let (first, last) = (offset / WRITE_BACK, offset.saturating_add(length) / WRITE_BACK);
        if self.write_back && first != last {
            let start = first.saturating_sub(1) * WRITE_BACK;
            self.calls.start_write_back(&self.file, start, last * WRITE_BACK - start);
        }
    }
}

/// Most bytes that are allocated ahead.
const MOST_AHEAD: u64 = 64 << 20;
/// Least bytes that are worth a call.
const LEAST_AHEAD: u64 = 1 << 20;

/// Space that is allocated ahead of the data. ext4 otherwise reserves it block by block as it
/// is written, which takes more than a third of the time of writing to the page cache.
#[derive(Debug)]
pub(super) struct Room {
    /// Where space is allocated, if anywhere.
    file: Option<File>,
    /// What was allocated last.
    start: u64,
    end: u64,
    /// How much the next time, at most.
    ahead: u64,
}

impl Room {
    /// Allocates space in `file` if that is wanted, and makes it faster.
    pub(super) fn new(file: &File, options: &CopyOptions<'_>) -> Result<Self> {
        let is_ext4 = |file: &File| {
            fstatfs(file).is_ok_and(|stat| stat.filesystem_type() == EXT4_SUPER_MAGIC)
        };
        let file = (options.allocate_ahead && is_ext4(file)).then(|| file.try_clone()).transpose();
        let file = file.map_err(|error| Error::io("cannot copy the descriptor", error))?;
        Ok(Self { file, start: 0, end: 0, ahead: LEAST_AHEAD })
    }

    /// Before bytes are written to their own offsets. Nothing is allocated ahead there: what
    /// turns out to be zeros would have to be given back, and where the file system is mounted
    /// with `discard`, each punched hole waits for the disk.
    pub(super) fn make_for(&mut self, range: GuestRange) {
        self.allocate(range.start.get(), range.length().get());
    }

    /// Before bytes are written to their place, behind which likely come as many more, up to
    /// `run_end`.
    pub(super) fn make(&mut self, place: &Placed, run_end: GuestOffset) {
        let (offset, length) = (place.offset.get(), place.range.length().get());
        if offset >= self.start && offset.saturating_add(length) <= self.end {
            return;
        }
        if offset == place.range.start.get() {
            return self.make_for(place.range);
        }
        let likely = run_end.since(place.range.start).get();
        let wanted = length.max(likely.min(self.ahead));
        if wanted < LEAST_AHEAD.min(self.ahead) {
            return;
        }
        self.ahead = self.ahead.saturating_mul(2).min(MOST_AHEAD);
        self.allocate(offset, wanted);
    }

    fn allocate(&mut self, offset: u64, length: u64) {
        let Some(file) = &self.file else { return };
        let done = in_file(offset, length).is_some_and(|(at, length)| {
            fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, at, length).is_ok()
        });
        if done {
            (self.start, self.end) = (offset, offset.saturating_add(length));
        } else {
            // Whether that matters, the write will tell.
            self.file = None;
        }
    }
}

fn in_file(offset: u64, length: u64) -> Option<(libc::off_t, libc::off_t)> {
    libc::off_t::try_from(offset).ok().zip(libc::off_t::try_from(length).ok())
}
