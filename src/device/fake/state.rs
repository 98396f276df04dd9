//! What there is in the fake kernel, and what goes by itself.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::{DM_MAJOR, LOOP_MAJOR};
use crate::device::{DeviceId, DeviceNumber, LiveLine, LoopInfo};
use crate::table::TableLine;
use crate::units::Sectors;

/// A device of the fake kernel.
#[derive(Debug, Default, Clone)]
pub struct FakeDevice {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// Its live table.
    pub live: Option<Vec<TableLine>>,
    /// Its inactive table.
    pub inactive: Option<Vec<TableLine>>,
    /// It goes at its last close.
    pub deferred: bool,
    /// How many descriptors are open on it.
    pub descriptors: u32,
    /// Its live table was loaded without the flag that it takes no writes.
    pub writable: bool,
    /// Its inactive table was.
    pub writable_next: bool,
    /// What its live table's targets say of their state.
    pub status: Vec<LiveLine>,
}

/// A loop device of the fake kernel.
#[derive(Debug, Clone)]
pub struct FakeLoop {
    /// The file that it holds open.
    pub file: Arc<File>,
    /// What it is bound to.
    pub info: LoopInfo,
    /// Its size.
    pub size: Sectors,
    /// How many descriptors are open on it.
    pub descriptors: u32,
}

/// What there is.
#[derive(Debug, Default)]
pub struct State {
    /// All devices by their minor number.
    pub devices: BTreeMap<u32, FakeDevice>,
    /// All bound loop devices by their minor number.
    pub loops: BTreeMap<u32, FakeLoop>,
    /// What was asked that changes something, in order.
    pub calls: Vec<String>,
    /// What was asked that changes nothing, in order.
    pub queries: Vec<&'static str>,
    /// Bytes of memory that can be had.
    pub available_memory: Option<u64>,
    /// The name under which a device is published.
    pub published: Vec<String>,
    pub(super) locked: bool,
    pub(super) fail_at: Option<usize>,
    pub(super) fail_from: Option<usize>,
    pub(super) fail_query_at: Option<usize>,
    pub(super) hidden_during: Range<usize>,
    pub(super) panic_at: Option<usize>,
    pub(super) raise_at: Option<(usize, Arc<AtomicUsize>)>,
    pub(super) generation: u64,
}

/// The devices that a line lies on.
pub(super) fn references(line: &TableLine) -> impl Iterator<Item = DeviceNumber> {
    line.target.devices().filter_map(|device| crate::device::live::parse_number(device.as_str()))
}

pub(super) fn reference(line: &TableLine) -> Option<DeviceNumber> {
    references(line).next()
}

impl State {
    pub(super) fn users(&self, number: DeviceNumber) -> u32 {
        let tables = self.devices.values().flat_map(|d| [&d.live, &d.inactive]).flatten();
        let users = tables.filter(|t| t.iter().flat_map(references).any(|each| each == number));
        u32::try_from(users.count()).unwrap_or(u32::MAX)
    }

    pub(super) fn open_count(&self, minor: u32) -> u32 {
        let own = self.devices.get(&minor).map_or(0, |device| device.descriptors);
        own + self.users(DeviceNumber { major: DM_MAJOR, minor })
    }

    /// Removes what goes by itself, until nothing more does.
    pub(super) fn settle(&mut self) {
        loop {
            let device = self
                .devices
                .iter()
                .find(|(minor, device)| device.deferred && self.open_count(**minor) == 0);
            if let Some(minor) = device.map(|(&minor, _)| minor) {
                self.devices.remove(&minor);
                continue;
            }
            let free = self.loops.iter().find(|(minor, each)| {
                let number = DeviceNumber { major: LOOP_MAJOR, minor: **minor };
                each.info.autoclear && each.descriptors == 0 && self.users(number) == 0
            });
            let Some(minor) = free.map(|(&minor, _)| minor) else { return };
            self.loops.remove(&minor);
        }
    }

    pub(super) fn find(&self, id: DeviceId<'_>) -> Option<u32> {
        self.devices
            .iter()
            .find(|(minor, device)| match id {
                DeviceId::Name(name) => device.name == name,
                DeviceId::Uuid(uuid) => device.uuid == uuid,
                DeviceId::Number(number) => {
                    number == DeviceNumber { major: DM_MAJOR, minor: **minor }
                }
            })
            .map(|(&minor, _)| minor)
    }
}
