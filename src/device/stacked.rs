//! A stack of devices that is built one by one, bottom up, so that the kernel undoes it.
//!
//! Each device in turn: create it; load a table of one zero sector, which makes its node
//! appear and holds nothing; open it; mark it for removal at its last close; only then load
//! the real table, and resume. Loop devices let go of their file at the last close. So
//! everything hangs on this process's descriptors, and its death undoes it.

use std::fmt;
use std::fs::File;

use super::name::{DmName, DmUuid};
use super::{
    Access, DeviceNumber, Interrupt, Kernel, LoopHandle, LoopOptions, PATIENCE, UdevRules, fault,
    loop_node,
};
use crate::error::Result;
use crate::table::{TableLine, Target};
use crate::units::Sectors;

/// What a device is to be, but for its table.
pub(super) struct NewDevice {
    pub(super) name: DmName,
    pub(super) uuid: DmUuid,
    pub(super) rules: UdevRules,
}

/// A device on its way.
struct Built<N> {
    name: DmName,
    uuid: String,
    number: DeviceNumber,
    node: Option<N>,
    marked: bool,
}

/// What was built so far, held open. All of it goes once it is closed, as long as its marks
/// for removal are in place.
pub(super) struct Stack<'k, K: Kernel> {
    pub(super) kernel: &'k K,
    loops: Vec<K::Loop>,
    devices: Vec<Built<K::Node>>,
}

impl<'k, K: Kernel> Stack<'k, K> {
    pub(super) fn new(kernel: &'k K) -> Self {
        Self { kernel, loops: Vec::new(), devices: Vec::new() }
    }

    /// The device that was built last.
    pub(super) fn top(&self) -> Option<DeviceNumber> {
        self.devices.last().map(|device| device.number)
    }

    /// The loop device that was bound last.
    pub(super) fn last_loop(&self) -> Option<&K::Loop> {
        self.loops.last()
    }

    /// Binds a loop device; gives its numbers and size.
    pub(super) fn bind_loop(
        &mut self,
        file: &File,
        options: &LoopOptions,
        interrupt: &Interrupt<'_>,
    ) -> Result<(DeviceNumber, Sectors)> {
        let made = self.kernel.set_up_loop(file, options)?;
        let bound = (made.number(), made.size());
        self.loops.push(made);
        step(interrupt, format_args!("loop{}", self.loops.len() - 1))?;
        Ok(bound)
    }

    /// Builds a device up to its resume, marked for removal and held open. `load` loads its
    /// table.
    pub(super) fn build(
        &mut self,
        device: NewDevice,
        interrupt: &Interrupt<'_>,
        load: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<DeviceNumber> {
        let NewDevice { name, uuid, rules } = device;
        let (kernel, role, text) = (self.kernel, uuid.role, uuid.to_string());

        let number = kernel.create(&name, &uuid)?;
        let index = self.devices.len();
        self.devices.push(Built { name, uuid: text.clone(), number, node: None, marked: false });
        step(interrupt, format_args!("{role}.create"))?;

        let one_sector =
            TableLine { start: Sectors::new(0), length: Sectors::new(1), target: Target::Zero };
        kernel.load(&text, Access::ReadOnly, 1, &mut |each| each(&one_sector))?;
        step(interrupt, format_args!("{role}.load-zero"))?;

        self.devices[index].node = Some(kernel.open(number)?);
        step(interrupt, format_args!("{role}.open"))?;

        kernel.defer_removal(&text)?;
        self.devices[index].marked = true;
        step(interrupt, format_args!("{role}.mark"))?;

        load(&text)?;
        step(interrupt, format_args!("{role}.load"))?;

        kernel.resume(&text, rules)?;
        step(interrupt, format_args!("{role}.resume"))?;
        Ok(number)
    }

    /// Takes down what was built, by closing it, and waits until it is gone. Gives what is
    /// left all the same, in words.
    pub(super) fn undo(&mut self) -> Vec<String> {
        let mut leftovers = Vec::new();
        for device in self.devices.iter_mut().rev() {
            device.node = None;
            if !device.marked {
                let _ = self.kernel.remove(&device.uuid);
            }
        }
        // The loops are held until the devices have let go of them: then it is our own
        // close that clears them, and they are clear when it returns.
        let devices = self.devices.drain(..).rev().collect();
        let is_gone = |device: &Built<_>| self.kernel.is_gone(device.number, &device.uuid);
        for device in wait_for_all(self.kernel, devices, is_gone) {
            let holders = self.kernel.holders(device.number);
            leftovers.push(with_holders(format!("the device '{}'", device.name), &holders));
        }
        for held in self.loops.drain(..) {
            let (number, generation) = (held.number(), held.generation());
            drop(held);
            let clear = || self.kernel.loop_is_clear(number, generation);
            if !self.kernel.wait(PATIENCE, &mut || clear()) {
                let holders = self.kernel.holders(number);
                leftovers.push(with_holders(loop_node(number).display().to_string(), &holders));
            }
        }
        leftovers
    }
}

/// Marks a step as taken: a place to be interrupted.
pub(super) fn step(interrupt: &Interrupt<'_>, what: fmt::Arguments<'_>) -> Result<()> {
    fault::point(what)?;
    interrupt.check()
}

/// Waits until all of these are gone, as long as one of them goes every [`PATIENCE`]: the kernel
/// takes full tables down one after the other, each in its time. Gives those that are left.
pub(super) fn wait_for_all<K: Kernel, T>(
    kernel: &K,
    mut left: Vec<T>,
    is_gone: impl Fn(&T) -> bool,
) -> Vec<T> {
    loop {
        let before = left.len();
        kernel.wait(PATIENCE, &mut || {
            left.retain(|each| !is_gone(each));
            left.is_empty() || left.len() < before
        });
        if left.is_empty() || left.len() == before {
            return left;
        }
    }
}

/// `what (held by ...)`.
pub(super) fn with_holders(what: String, holders: &[String]) -> String {
    if holders.is_empty() { what } else { format!("{what} (held by {})", holders.join(", ")) }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::device::fake::FakeKernel;

    #[test]
    fn what_goes_one_by_one_is_waited_for_to_the_end() {
        let kernel = FakeKernel::new();
        // One goes each time that all are looked at; the one that stays is told.
        let gone = Cell::new(0);
        let looked = |each: &u32| {
            if *each == 0 {
                gone.set(gone.get() + 1);
            }
            *each > 0 && *each <= gone.get()
        };
        assert_eq!(wait_for_all(&kernel, vec![0, 5, 4, 3, 2, 1], looked), [0]);
        assert_eq!(gone.get(), 6);
        assert!(wait_for_all(&kernel, Vec::<u32>::new(), |_| false).is_empty());
    }
}
