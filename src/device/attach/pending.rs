//! An attachment that is built and not yet for good.

use std::path::PathBuf;

use super::{AttachError, Attachment, Request};
use crate::device::above::{self, Above, AboveWarning, AttachedAbove, WantedAbove};
use crate::device::name::{DmName, DmUuid};
use crate::device::stacked::{NewDevice, Stack, step};
use crate::device::{Access, DeviceId, DeviceNumber, Interrupt, Kernel, UdevRules, fault};
use crate::error::{Error, ErrorKind, Result, printable};
use crate::overlay::Store;

/// A device that the user gets: the disk itself, or one on top of it.
pub(super) struct Given {
    pub(super) name: String,
    pub(super) uuid: DmUuid,
    pub(super) number: DeviceNumber,
    /// It was there before.
    pub(super) is_old: bool,
    /// Its last close removes it.
    pub(super) is_marked: bool,
}

/// What of a request matters once the disk is there.
pub(super) struct Terms {
    pub(super) name: DmName,
    pub(super) keep: bool,
    pub(super) rules: UdevRules,
    pub(super) access: Access,
}

impl Terms {
    pub(super) fn of(request: &Request<'_>) -> Self {
        let (name, keep, rules) = (request.name.clone(), request.keep, request.options.rules());
        Self { name, keep, rules, access: request.options.access() }
    }
}

/// An attachment, all built and held open, whose new devices go at their last close. It ends
/// by [`commit`](Self::commit), [`leave_to_openers`](Self::leave_to_openers) or
/// [`undo`](Self::undo). Dropped, it goes too, but nothing waits for that. As long as it
/// lives, no other imgdm builds or cleans up.
#[must_use = "what is built goes when this is dropped"]
pub struct Pending<'k, K: Kernel> {
    top: Given,
    above: Vec<Given>,
    name: DmName,
    /// A moment before the first device of the build.
    since: u64,
    /// Where it is attached already and marked for removal, take the mark away.
    keep: bool,
    /// For devices on top.
    rules: UdevRules,
    access: Access,
    warnings: Vec<AboveWarning>,
    /// Paths of the disk and of what stands on it, as far as they are published.
    paths: Vec<PathBuf>,
    /// For how many that was tried.
    published: usize,
    stack: Stack<'k, K>,
    /// The store of what is written; it goes with a failure where it was made for this.
    store: Option<Store>,
    /// Devices that were there before.
    held: Vec<K::Node>,
    // The last to be dropped.
    lock: K::Lock,
}

impl<'k, K: Kernel> Pending<'k, K> {
    pub(super) fn new(
        terms: Terms,
        top: Given,
        stack: Stack<'k, K>,
        held: Vec<K::Node>,
        since: u64,
        lock: K::Lock,
    ) -> Self {
        let (above, warnings, paths) = (Vec::new(), Vec::new(), Vec::new());
        let Terms { name, keep, rules, access } = terms;
        let published = 0;
        Self {
            top,
            above,
            name,
            since,
            keep,
            rules,
            access,
            warnings,
            paths,
            published,
            stack,
            store: None,
            held,
            lock,
        }
    }

    /// Takes the store of what is written, which was made or opened for this. One that was
    /// made goes again, unless all comes to a good end.
    pub fn with_store(mut self, store: Option<Store>) -> Self {
        self.store = store;
        self
    }

    /// Builds what is asked for on top, as far as it is not there: also what whoever has
    /// looked at the disk asks for after that.
    ///
    /// # Errors
    /// Whatever went wrong; then all that was built is gone again, or listed.
    pub fn with_above(
        mut self,
        above: &Above,
        interrupt: &Interrupt<'_>,
    ) -> Result<Self, AttachError> {
        match self.build_above(above, interrupt) {
            Ok(()) => Ok(self),
            Err(cause) => Err(self.undo(cause)),
        }
    }

    fn build_above(&mut self, above: &Above, interrupt: &Interrupt<'_>) -> Result<()> {
        let kernel = self.stack.kernel;
        let top = (&self.name, &self.top.uuid);
        let (wanted, warnings) = above::wanted(kernel, above, top, self.top.number, *interrupt)?;
        self.warnings.extend(warnings);
        if wanted.is_empty() {
            return Ok(());
        }
        step(interrupt, format_args!("above.read"))?;
        let mut devices = Vec::new();
        for wanted in wanted {
            let there = above::existing(kernel, &wanted, self.access)?;
            devices.push((wanted, there));
        }
        let missing = devices.iter().filter(|(_, there)| there.is_none());
        let uuids: Vec<_> = missing.map(|(wanted, _)| wanted.uuid.to_string()).collect();
        let _watch = kernel.guard(&self.lock, &uuids)?;
        for (WantedAbove { name, uuid, lines }, there) in devices {
            let given = if let Some(there) = there {
                self.held.push(kernel.open(there.number)?);
                let (number, is_marked) = (there.number, there.deferred_remove);
                Given { name: there.name, uuid, number, is_old: true, is_marked }
            } else {
                let (rules, access) = (self.rules, self.access);
                let device = NewDevice { name: name.clone(), uuid: uuid.clone(), rules };
                let count = lines.len() as u64;
                let number = self.stack.build(device, interrupt, &mut |text| {
                    kernel.load(text, access, count, &mut |each| {
                        lines.iter().try_for_each(&mut *each)
                    })
                })?;
                let name = name.as_str().to_owned();
                Given { name, uuid, number, is_old: false, is_marked: true }
            };
            self.above.push(given);
        }
        Ok(())
    }

    /// What is not as it was asked for, or not as it should be.
    pub fn warnings(&self) -> &[AboveWarning] {
        &self.warnings
    }

    /// The numbers of the disk's device.
    pub fn number(&self) -> DeviceNumber {
        self.top.number
    }

    /// The numbers of the last device on top, of the disk's where there is none.
    pub fn last_number(&self) -> DeviceNumber {
        self.above.last().unwrap_or(&self.top).number
    }

    /// The UUID of the disk's device.
    pub fn uuid(&self) -> &DmUuid {
        &self.top.uuid
    }

    /// The disk was attached before.
    pub fn already_attached(&self) -> bool {
        self.top.is_old
    }

    /// Sees to it that the disk's and all devices' nodes are in /dev/mapper and can be
    /// opened; gives their paths, the disk's first. Where no udev runs, a kill from here on
    /// leaves a node that leads nowhere. [`commit`](Self::commit) does it too.
    ///
    /// # Errors
    /// A node can't be made or opened, or `interrupt` came. Then call [`undo`](Self::undo).
    pub fn publish(&mut self, interrupt: &Interrupt<'_>) -> Result<&[PathBuf]> {
        let kernel = self.stack.kernel;
        for (index, given) in std::iter::once(&self.top).chain(&self.above).enumerate() {
            if index < self.paths.len() {
                continue;
            }
            self.published = index + 1;
            let since = (!given.is_old).then_some(self.since);
            let path = kernel.publish(&given.name, given.number, since, interrupt)?;
            self.paths.push(path);
            if !given.is_old {
                match index {
                    0 => fault::point(format_args!("publish"))?,
                    _ => fault::point(format_args!("{}.publish", given.uuid.role))?,
                }
            }
            interrupt.check()?;
        }
        Ok(&self.paths)
    }

    /// Makes it stay; returns once the disk and all on top of it can be opened.
    ///
    /// # Errors
    /// Whatever went wrong; then all that was built is gone again, or listed. It was attached
    /// before and goes at its last close, and nobody asked to keep it.
    pub fn commit(mut self, interrupt: &Interrupt<'_>) -> Result<Attachment, AttachError> {
        if self.top.is_old && self.top.is_marked && !self.keep {
            let message = format!(
                "'{}' is attached, but marked for removal at its last close: --keep makes it permanent",
                printable(&self.top.name)
            );
            return Err(self.undo(Error::new(ErrorKind::InUse(message))));
        }
        let mut taken = Vec::new();
        let made = self.take_marks(&mut taken, interrupt).and_then(|()| {
            // The descriptors stay open until here: so a late failure is undone the same
            // way. The lock is held too: nobody else makes or removes the node of that name
            // meanwhile.
            self.publish(interrupt).map(drop)
        });
        match made.and_then(|()| self.attachment()) {
            Ok(attachment) => {
                self.keep_store();
                Ok(attachment)
            }
            Err(cause) => {
                for uuid in taken {
                    let _ = self.stack.kernel.defer_removal(&uuid);
                }
                Err(self.undo(cause))
            }
        }
    }

    /// Leaves it to those who have opened it meanwhile, like a mount: what has a mark for
    /// removal, as all has that was built here, goes with the last of them.
    pub fn leave_to_openers(mut self) {
        self.keep_store();
        drop(self);
    }

    fn keep_store(&mut self) {
        if let Some(store) = &mut self.store {
            store.keep();
        }
    }

    /// Takes down what was built, as [`take_down`](Self::take_down), because of an error.
    pub fn undo(self, cause: Error) -> AttachError {
        AttachError { cause, leftovers: self.take_down() }
    }

    /// Takes down what was built, and waits until it is gone. What was there before stays.
    /// Gives what is left all the same, in words.
    pub fn take_down(mut self) -> Vec<String> {
        self.held.clear();
        let leftovers = self.stack.undo();
        let published = std::iter::once(&self.top).chain(&self.above).take(self.published);
        for given in published.filter(|given| !given.is_old) {
            self.stack.kernel.unpublish(&given.name, given.number);
        }
        leftovers
    }

    /// Takes the marks away, from the disk's device first: a kill in between leaves a whole
    /// attachment, if not all that was to stand on it. The UUIDs go to `taken`.
    fn take_marks(&mut self, taken: &mut Vec<String>, interrupt: &Interrupt<'_>) -> Result<()> {
        let kernel = self.stack.kernel;
        for (index, given) in std::iter::once(&self.top).chain(&self.above).enumerate() {
            if !given.is_marked {
                continue;
            }
            interrupt.check()?;
            let uuid = given.uuid.to_string();
            kernel.cancel_deferred_removal(&uuid)?;
            taken.push(uuid);
            match index {
                0 => fault::point(format_args!("commit"))?,
                _ => step(interrupt, format_args!("{}.commit", given.uuid.role))?,
            }
        }
        Ok(())
    }

    fn attachment(&self) -> Result<Attachment> {
        let kernel = self.stack.kernel;
        let mut above = Vec::new();
        for given in &self.above {
            let Some(mut info) = kernel.device(DeviceId::Number(given.number))? else { continue };
            // But for ourselves.
            info.open_count = info.open_count.saturating_sub(1);
            above.push(AttachedAbove::of(kernel, given.uuid.role, info));
        }
        let path = self.paths.first().cloned().unwrap_or_default();
        let (name, uuid) = (self.name.clone(), self.top.uuid.clone());
        let (number, already_attached) = (self.top.number, self.top.is_old);
        Ok(Attachment { path, name, uuid, number, already_attached, above })
    }
}
