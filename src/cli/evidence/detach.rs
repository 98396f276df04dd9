//! Taking an evidence attachment down, and completing its record.
//!
//! The files are hashed while the device still holds their locks, and looked at once more
//! when it is gone, under locks of our own. Nothing of this keeps the device from going.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgdm::device::detach::{check_free, detach};
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::name::LoopRole;
use imgdm::device::{DeviceId, Interrupt, Kernel, fault};
use imgdm::error::printable;
use imgdm::lock::{self, Sharing};
use imgdm::source::Source;
use imgdm::units::SECTOR_SIZE;
use imgdm::{Error, ErrorKind, Result};

use super::record::{Act, FileState, Record, RecordedFile, State, is_change, now, role_name};
use super::{hash_files, in_full, read_record, record_path, rescue, text_of, unlink};
use crate::cli::Globals;
use crate::cli::output::show_path;
use crate::cli::save::save_over;

/// Detaches, and completes the record: the one that is remembered, or the `given` one.
///
/// # Errors
/// The device is in use, the record that was given is none of it, or a signal came while the
/// files were hashed: then it stays. It is gone, but a file changed, could not be read, or the
/// record could not be written.
pub(crate) fn detach_with_record(
    kernel: &LinuxKernel,
    attached: &Attached,
    given: Option<&Path>,
    interrupt: &Interrupt<'_>,
    globals: Globals,
) -> anyhow::Result<()> {
    // Told before all is hashed for nothing.
    check_free(kernel, attached)?;
    let (path, record) = match find_record(attached, given) {
        Ok(found) => found,
        // One that was named can be named right.
        Err(error) if given.is_some() => return Err(error.into()),
        Err(error) => {
            detach(kernel, attached, false, interrupt)?;
            // The link stays: should the record turn up again, it tells where that was.
            anyhow::bail!(
                "'{}' is detached, but its files were not hashed again and no record was completed: {}",
                printable(&attached.name),
                in_full(&error)
            );
        }
    };
    let mut work = Work { path, record, held: Vec::new(), problems: Vec::new() };
    let mut act = Act::begin();
    work.look_again(kernel, attached, interrupt, globals)?;
    work.record.state = State::Detaching;
    work.record.detach = Some(act.clone());
    // Where it can't be written now, perhaps it can in the end.
    let _ = work.save();
    fault::point(format_args!("evidence.detaching"))?;
    if let Err(error) = detach(kernel, attached, false, interrupt) {
        if kernel.device(DeviceId::Uuid(&work.record.uuid))?.is_some() {
            work.put_back();
            return Err(error.into());
        }
        // It went, but something below it did not in time.
        work.problems.push(in_full(&error));
    }
    fault::point(format_args!("evidence.gone"))?;
    work.look_once_more();
    work.record.state = State::Detached;
    act.finished = Some(now());
    work.record.detach = Some(act);
    work.finish()
}

/// The record of an attachment.
fn find_record(attached: &Attached, given: Option<&Path>) -> Result<(PathBuf, Record)> {
    // The link that the user may name it by stays one.
    let named = given.map(|path| path.canonicalize().unwrap_or_else(|_| path.to_owned()));
    let remembered = named.or_else(|| record_path(&attached.uuid));
    let path = remembered.ok_or_else(|| {
        let name = printable(&attached.name);
        let message =
            format!("where the record of '{name}' is, is not known any more: give --record FILE");
        Error::new(ErrorKind::NotFound(message))
    })?;
    let record = read_record(&path)?;
    if record.uuid != attached.uuid.to_string() || record.state == State::Detached {
        let message =
            format!("this is the record of another attachment of '{}'", printable(&record.name));
        return Err(Error::new(ErrorKind::Usage(message)).at_path(path));
    }
    Ok((path, record))
}

struct Work {
    path: PathBuf,
    record: Record,
    /// The files that are in their places, in the record's order.
    held: Vec<Option<Arc<Source>>>,
    problems: Vec<String>,
}

impl Work {
    /// Opens, locks and hashes the files.
    fn look_again(
        &mut self,
        kernel: &LinuxKernel,
        attached: &Attached,
        interrupt: &Interrupt<'_>,
        globals: Globals,
    ) -> Result<()> {
        let mut opened = Vec::new();
        for file in &mut self.record.files {
            match open_again(kernel, attached, file) {
                Ok((source, in_place)) => opened.push(Some((Arc::new(source), in_place))),
                Err(error) => {
                    file.problem = Some(in_full(&error));
                    self.problems.push(in_full(&error));
                    opened.push(None);
                }
            }
        }
        let sources: Vec<_> =
            opened.iter().flatten().map(|(source, _)| Arc::clone(source)).collect();
        let mut hashes = hash_files(&sources, interrupt, globals)?.into_iter();
        for (file, opened) in self.record.files.iter_mut().zip(opened) {
            let Some((source, in_place)) = opened else {
                self.held.push(None);
                continue;
            };
            let mut after = FileState::of(&source)?;
            if !in_place {
                // A loop device tells nothing of its file but the bytes.
                after = FileState {
                    accessed: None,
                    modified: None,
                    inode_changed: None,
                    ..file.before.clone()
                };
                after.size = source.length().get();
                after.sha256 = None;
                let problem = "another file is at this path, or none: what was attached was read through its loop device";
                self.problems.push(format!("{}: {problem}", show_path(&file.path())));
                file.problem = Some(problem.to_owned());
            }
            let is_cut = !in_place && is_cut_by_loop(file.before.size, after.size);
            match hashes.next() {
                Some(Ok(hash)) if is_cut => {
                    let problem = format!(
                        "a loop device shows whole sectors, so whether all of it is as it was is unknown; the sha256 of its first {} bytes is {hash}",
                        after.size
                    );
                    self.problems.push(format!("{}: {problem}", show_path(&file.path())));
                    file.problem = Some(match &file.problem {
                        Some(before) => format!("{before}; {problem}"),
                        None => problem,
                    });
                }
                Some(Ok(hash)) => after.sha256 = Some(hash),
                Some(Err(error)) => {
                    let problem = format!("it can't be hashed: {}", error.without_path());
                    self.problems.push(format!("{}: {problem}", show_path(&file.path())));
                    file.problem = Some(problem);
                }
                None => {}
            }
            // What was looked at is not the file that was looked at before.
            file.changed = (!is_cut).then(|| file.before.differences(&after));
            file.after = Some(after).filter(|_| !is_cut);
            self.held.push(Some(source).filter(|_| in_place));
        }
        Ok(())
    }

    /// What changed since the files were hashed, for the locks keep only those out who take
    /// them.
    fn look_once_more(&mut self) {
        for (file, held) in self.record.files.iter_mut().zip(&self.held) {
            let (Some(held), Some(after)) = (held, &mut file.after) else { continue };
            let Ok(now) = FileState::of(held) else { continue };
            let now = FileState { sha256: after.sha256.clone(), ..now };
            let was_written = is_change(&after.differences(&now));
            file.changed = Some(file.before.differences(&now));
            *after = now;
            if was_written {
                let problem = "it was written to while it was hashed".to_owned();
                self.problems.push(format!("{}: {problem}", show_path(&file.path())));
                file.problem = Some(problem);
            }
        }
    }

    /// The device stays: all is as it was.
    fn put_back(mut self) {
        for file in &mut self.record.files {
            (file.after, file.changed, file.problem) = (None, None, None);
        }
        self.record.state = State::Attached;
        self.record.detach = None;
        let _ = self.save();
    }

    fn save(&self) -> Result<()> {
        save_over(&self.path, &text_of(&self.record)?)
    }

    /// Writes the record, and tells what is not as it should be.
    fn finish(mut self) -> anyhow::Result<()> {
        // To the end they kept others out.
        let saved = self.save();
        self.held.clear();
        if let Err(error) = saved {
            // Nothing is to be lost.
            let place = match rescue(&self.record) {
                Ok(place) => format!("it is in {} instead, until the next boot", show_path(&place)),
                Err(other) => format!("nor to {}", in_full(&other)),
            };
            self.problems.push(format!("{}; {place}", in_full(&error)));
        }
        unlink(&self.record.uuid);
        let name = printable(&self.record.name);
        let mut said = Vec::new();
        for file in &self.record.files {
            let changed = file.changed.as_deref().unwrap_or_default();
            if !changed.is_empty() {
                said.push(format!("{}: changed: {}", show_path(&file.path()), changed.join(", ")));
            }
        }
        let only_read = self
            .record
            .files
            .iter()
            .all(|file| !is_change(file.changed.as_deref().unwrap_or_default()));
        if only_read && self.problems.is_empty() {
            return Ok(());
        }
        said.append(&mut self.problems);
        anyhow::bail!("'{name}' is detached, but not all is as it should be: {}", said.join("; "))
    }
}

/// True where a loop device over a file of `size` bytes shows `shown`, which is all but the
/// part of a sector at its end.
fn is_cut_by_loop(size: u64, shown: u64) -> bool {
    size != shown && size / SECTOR_SIZE * SECTOR_SIZE == shown
}

/// Opens a file of the attachment by its path, and where that leads elsewhere by now, the loop
/// device that still holds it. True where it is in its place.
fn open_again(
    kernel: &LinuxKernel,
    attached: &Attached,
    file: &RecordedFile,
) -> Result<(Source, bool)> {
    let path = file.path();
    let held = attached.loops.iter().find(|each| match each.info.role() {
        Some(LoopRole::File { layer, role, .. }) => {
            layer == file.layer && role_name(role) == file.role
        }
        _ => false,
    });
    let by_path = Source::open(&path);
    let is_it = |source: &Source| held.is_none_or(|held| source.id() == Some(held.info.file));
    match (by_path, held) {
        (Ok(mut source), _) if is_it(&source) => {
            lock::lock(&source, Sharing::Readers)?;
            source.refresh()?;
            Ok((source, true))
        }
        (_, Some(held)) => {
            let node = kernel.block_device_path(held.number);
            Ok((Source::open(&node)?.named(&path), false))
        }
        (outcome, None) => outcome.map(|source| (source, true)),
    }
}
