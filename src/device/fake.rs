//! A kernel in memory, for tests: it records what is asked of it, can fail or panic at
//! any step, and removes devices and clears loops by the real one's rules.

mod reader;
mod state;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use self::reader::FakeReader;
use self::state::references;
pub use self::state::{FakeDevice, FakeLoop, State};
use super::name::{DmName, DmUuid};
use super::{
    Access, DeviceId, DeviceInfo, DeviceNumber, DeviceReader, Guard, Interrupt, Kernel, Lines,
    LiveLine, LoopHandle, LoopInfo, LoopOptions, LoopPath, PathState, UdevRules,
};
use crate::crypt::VolumeKey;
use crate::error::{Error, ErrorKind, Result};
use crate::source::FileId;
use crate::table::CryptKey;
use crate::units::{ByteLen, SECTOR_SIZE, Sectors};

const DM_MAJOR: u32 = 253;
const LOOP_MAJOR: u32 = 7;

/// The fake kernel.
#[derive(Debug, Default, Clone)]
pub struct FakeKernel(Rc<RefCell<State>>);

/// Anything of the fake kernel that is held open.
#[derive(Debug)]
pub struct FakeHandle {
    state: Rc<RefCell<State>>,
    number: DeviceNumber,
    size: Sectors,
    generation: u64,
}

impl Drop for FakeHandle {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        let minor = self.number.minor;
        if self.number.major == LOOP_MAJOR {
            if let Some(each) = state.loops.get_mut(&minor) {
                each.descriptors = each.descriptors.saturating_sub(1);
            }
        } else if let Some(device) = state.devices.get_mut(&minor) {
            device.descriptors = device.descriptors.saturating_sub(1);
        }
        state.settle();
    }
}

impl LoopHandle for FakeHandle {
    fn number(&self) -> DeviceNumber {
        self.number
    }

    fn size(&self) -> Sectors {
        self.size
    }

    fn direct_io(&self) -> bool {
        false
    }

    fn generation(&self) -> Option<u64> {
        Some(self.generation)
    }

    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let label = state.loops.get(&self.number.minor).map(|each| each.info.label.clone());
        state.calls.push(format!("sync {}", label.unwrap_or_default()));
        Ok(())
    }
}

/// The lock of the fake kernel.
#[derive(Debug)]
pub struct FakeLock(Rc<RefCell<State>>);

impl Drop for FakeLock {
    fn drop(&mut self) {
        self.0.borrow_mut().locked = false;
    }
}

struct NoGuard;
impl Guard for NoGuard {}

impl FakeKernel {
    /// A kernel without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has the call of this number, from 0, fail.
    pub fn fail_at(&self, call: usize) {
        self.0.borrow_mut().fail_at = Some(call);
    }

    /// Has the call of this number and all after it fail.
    pub fn fail_from(&self, call: usize) {
        self.0.borrow_mut().fail_from = Some(call);
    }

    /// Has the query of this number, from 0, fail.
    pub fn fail_query_at(&self, query: usize) {
        self.0.borrow_mut().fail_query_at = Some(query);
    }

    /// Has the queries of these numbers, from 0, find no device: it comes after them, or has
    /// gone before.
    pub fn hide_during(&self, queries: Range<usize>) {
        self.0.borrow_mut().hidden_during = queries;
    }

    /// Has nothing fail any more.
    pub fn mend(&self) {
        let mut state = self.0.borrow_mut();
        (state.fail_at, state.fail_from, state.fail_query_at) = (None, None, None);
    }

    /// Has the call of this number panic: everything is then closed with nothing of the
    /// roll-back run, as when a process is killed.
    pub fn panic_at(&self, call: usize) {
        self.0.borrow_mut().panic_at = Some(call);
    }

    /// Has the flag say SIGTERM from the call of this number on.
    pub fn raise_at(&self, call: usize, flag: &Arc<AtomicUsize>) {
        self.0.borrow_mut().raise_at = Some((call, Arc::clone(flag)));
    }

    /// Looks at what there is.
    pub fn with<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.0.borrow())
    }

    /// Changes what there is.
    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.0.borrow_mut();
        let result = change(&mut state);
        state.settle();
        result
    }

    /// Notes a call that changes something, and fails where that was asked for.
    fn call(&self, what: String) -> Result<()> {
        let mut state = self.0.borrow_mut();
        let number = state.calls.len();
        state.calls.push(what);
        if let Some((at, flag)) = &state.raise_at
            && *at == number
        {
            flag.store(usize::try_from(nix::libc::SIGTERM).unwrap_or_default(), Ordering::Relaxed);
        }
        if state.panic_at == Some(number) {
            drop(state);
            std::panic::resume_unwind(Box::new("killed"));
        }
        if state.fail_at == Some(number) || state.fail_from.is_some_and(|from| from <= number) {
            return Err(Error::new(ErrorKind::Io(format!("fault injected into call {number}"))));
        }
        Ok(())
    }

    /// Notes a call that changes nothing, and fails where that was asked for.
    fn query(&self, what: &'static str) -> Result<()> {
        let mut state = self.0.borrow_mut();
        let number = state.queries.len();
        state.queries.push(what);
        if state.fail_query_at == Some(number) {
            let message = format!("fault injected into query {number} ({what})");
            return Err(Error::new(ErrorKind::Io(message)));
        }
        Ok(())
    }

    /// Whether the last query may find a device.
    fn finds(&self) -> bool {
        let state = self.0.borrow();
        !state.hidden_during.contains(&state.queries.len().saturating_sub(1))
    }

    fn name_of(&self, uuid: &str) -> String {
        let state = self.0.borrow();
        let minor = state.find(DeviceId::Uuid(uuid));
        minor.map_or_else(|| "?".to_owned(), |minor| state.devices[&minor].name.clone())
    }

    fn on_device<T>(
        &self,
        uuid: &str,
        change: impl FnOnce(&mut State, u32) -> Result<T>,
    ) -> Result<T> {
        let mut state = self.0.borrow_mut();
        let Some(minor) = state.find(DeviceId::Uuid(uuid)) else {
            return Err(Error::new(ErrorKind::Io(format!("no device {uuid}"))));
        };
        let result = change(&mut state, minor)?;
        state.settle();
        Ok(result)
    }

    fn handle(&self, number: DeviceNumber, size: Sectors, generation: u64) -> FakeHandle {
        FakeHandle { state: Rc::clone(&self.0), number, size, generation }
    }
}

fn refused(what: &str) -> Error {
    Error::new(ErrorKind::Io(what.to_owned()))
}

impl Kernel for FakeKernel {
    type Lock = FakeLock;
    type Node = FakeHandle;
    type Loop = FakeHandle;

    fn prepare(&self, _targets: &[&str]) -> Result<()> {
        self.call("prepare".to_owned())
    }

    fn lock(&self, interrupt: &Interrupt<'_>) -> Result<FakeLock> {
        interrupt.check()?;
        self.call("lock".to_owned())?;
        let mut state = self.0.borrow_mut();
        assert!(!state.locked, "the lock is taken already");
        state.locked = true;
        Ok(FakeLock(Rc::clone(&self.0)))
    }

    fn guard(&self, _lock: &FakeLock, _uuids: &[String]) -> Result<Box<dyn Guard>> {
        self.query("guard")?;
        Ok(Box::new(NoGuard))
    }

    fn available_memory(&self) -> Option<u64> {
        self.0.borrow().available_memory
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        self.query("devices")?;
        if !self.finds() {
            return Ok(Vec::new());
        }
        let minors: Vec<u32> = self.0.borrow().devices.keys().copied().collect();
        let mut devices = Vec::new();
        for minor in minors {
            let number = DeviceNumber { major: DM_MAJOR, minor };
            devices.extend(self.device(DeviceId::Number(number))?);
        }
        Ok(devices)
    }

    fn device(&self, id: DeviceId<'_>) -> Result<Option<DeviceInfo>> {
        self.query("device")?;
        if !self.finds() {
            return Ok(None);
        }
        let state = self.0.borrow();
        Ok(state.find(id).map(|minor| {
            let device = &state.devices[&minor];
            DeviceInfo {
                number: DeviceNumber { major: DM_MAJOR, minor },
                name: device.name.clone(),
                uuid: device.uuid.clone(),
                open_count: state.open_count(minor),
                has_live_table: device.live.is_some(),
                deferred_remove: device.deferred,
                read_only: !device.writable,
            }
        }))
    }

    fn dependencies(&self, id: DeviceId<'_>) -> Result<Vec<DeviceNumber>> {
        self.query("dependencies")?;
        if !self.finds() {
            return Ok(Vec::new());
        }
        let state = self.0.borrow();
        let device = state.find(id).and_then(|minor| state.devices.get(&minor));
        let live = device.and_then(|device| device.live.as_ref());
        let mut found: Vec<_> = live.into_iter().flatten().flat_map(references).collect();
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn dependents(&self, number: DeviceNumber) -> Result<Vec<DeviceNumber>> {
        self.query("dependents")?;
        let state = self.0.borrow();
        let above = state.devices.iter().filter(|(_, device)| {
            device.live.iter().flatten().flat_map(references).any(|each| each == number)
        });
        Ok(above.map(|(&minor, _)| DeviceNumber { major: DM_MAJOR, minor }).collect())
    }

    fn live_table(&self, uuid: &str) -> Result<Box<dyn Iterator<Item = LiveLine>>> {
        self.query("live table")?;
        let state = self.0.borrow();
        let minor = state.find(DeviceId::Uuid(uuid)).ok_or_else(|| refused("no such device"))?;
        let live = state.devices[&minor].live.clone().unwrap_or_default();
        Ok(Box::new(live.into_iter().map(|line| LiveLine {
            start: line.start.get(),
            length: line.length.get(),
            kind: line.target.kind().to_owned(),
            parameters: line.target.parameters(),
        })))
    }

    fn live_status(&self, uuid: &str) -> Result<Vec<LiveLine>> {
        self.query("live status")?;
        let state = self.0.borrow();
        let minor = state.find(DeviceId::Uuid(uuid)).ok_or_else(|| refused("no such device"))?;
        Ok(state.devices[&minor].status.clone())
    }

    fn create(&self, name: &DmName, uuid: &DmUuid) -> Result<DeviceNumber> {
        self.call(format!("create {name}"))?;
        let mut state = self.0.borrow_mut();
        assert!(state.locked, "devices are made under the lock");
        let (name, uuid) = (name.as_str().to_owned(), uuid.to_string());
        if state.find(DeviceId::Name(&name)).or(state.find(DeviceId::Uuid(&uuid))).is_some() {
            return Err(Error::new(ErrorKind::CannotCreate(format!("{name} is taken"))));
        }
        let minor = (0..).find(|minor| !state.devices.contains_key(minor)).unwrap_or(0);
        state.devices.insert(minor, FakeDevice { name, uuid, ..FakeDevice::default() });
        Ok(DeviceNumber { major: DM_MAJOR, minor })
    }

    fn load(&self, uuid: &str, access: Access, _count: u64, lines: &mut Lines<'_>) -> Result<()> {
        let mut table = Vec::new();
        lines(&mut |line| {
            table.push(line.clone());
            Ok(())
        })?;
        let writable = if access == Access::Writable { " writable" } else { "" };
        self.call(format!("load {} {}{writable}", self.name_of(uuid), table.len()))?;
        self.on_device(uuid, |state, minor| {
            for number in table.iter().flat_map(references) {
                let there = match number.major {
                    DM_MAJOR => state.devices.contains_key(&number.minor),
                    _ => state.loops.contains_key(&number.minor),
                };
                if !there {
                    return Err(refused("the table lies on a device that is not there"));
                }
            }
            if let Some(device) = state.devices.get_mut(&minor) {
                device.inactive = Some(table);
                device.writable_next = access == Access::Writable;
            }
            Ok(())
        })
    }

    fn store_key(&self, description: &str, key: &VolumeKey) -> Result<CryptKey> {
        self.call(format!("key {description}"))?;
        let size = key.bytes().len();
        Ok(CryptKey::Keyring { size, description: description.to_owned() })
    }

    fn forget_key(&self, key: &CryptKey) {
        self.0.borrow_mut().calls.push(format!("forget {key}"));
    }

    fn resume(&self, uuid: &str, rules: UdevRules) -> Result<()> {
        self.call(format!("resume {} {rules:?}", self.name_of(uuid)))?;
        self.on_device(uuid, |state, minor| {
            if let Some(device) = state.devices.get_mut(&minor)
                && let Some(table) = device.inactive.take()
            {
                device.live = Some(table);
                device.writable = device.writable_next;
            }
            Ok(())
        })
    }

    fn open(&self, number: DeviceNumber) -> Result<FakeHandle> {
        self.call(format!("open {number}"))?;
        let mut state = self.0.borrow_mut();
        let Some(device) = state.devices.get_mut(&number.minor) else {
            return Err(refused("no such device"));
        };
        if device.live.is_none() && device.inactive.is_none() {
            return Err(refused("a device has no node before its first table"));
        }
        device.descriptors += 1;
        drop(state);
        Ok(self.handle(number, Sectors::default(), 0))
    }

    fn defer_removal(&self, uuid: &str) -> Result<()> {
        self.call(format!("defer {}", self.name_of(uuid)))?;
        self.on_device(uuid, |state, minor| {
            if let Some(device) = state.devices.get_mut(&minor) {
                device.deferred = true;
            }
            Ok(())
        })
    }

    fn cancel_deferred_removal(&self, uuid: &str) -> Result<()> {
        self.call(format!("cancel {}", self.name_of(uuid)))?;
        self.on_device(uuid, |state, minor| {
            if let Some(device) = state.devices.get_mut(&minor) {
                device.deferred = false;
            }
            Ok(())
        })
    }

    fn remove(&self, uuid: &str) -> Result<bool> {
        self.call(format!("remove {}", self.name_of(uuid)))?;
        let mut state = self.0.borrow_mut();
        let Some(minor) = state.find(DeviceId::Uuid(uuid)) else { return Ok(false) };
        if state.open_count(minor) > 0 {
            return Ok(false);
        }
        state.devices.remove(&minor);
        state.settle();
        Ok(true)
    }

    fn is_gone(&self, number: DeviceNumber, uuid: &str) -> bool {
        let state = self.0.borrow();
        state.devices.get(&number.minor).is_none_or(|device| device.uuid != uuid)
    }

    fn set_up_loop(&self, file: &File, options: &LoopOptions) -> Result<FakeHandle> {
        let label = options.role.file_name();
        self.call(format!("loop {label}"))?;
        let metadata = file.metadata().map_err(|error| Error::io("stat", error))?;
        let file_id = if metadata.file_type().is_block_device() {
            FileId { device: metadata.rdev(), inode: 0 }
        } else {
            FileId { device: metadata.dev(), inode: metadata.ino() }
        };
        let mut state = self.0.borrow_mut();
        let minor = (0..).find(|minor| !state.loops.contains_key(minor)).unwrap_or(0);
        state.generation += 1;
        let generation = state.generation;
        let size = metadata.len().saturating_sub(options.offset()) / SECTOR_SIZE;
        let size = Sectors::new(size);
        let path = PathBuf::from(format!("/images/{label}"));
        let info = LoopInfo {
            file: file_id,
            label,
            size_limit: super::LOOP_SIZE_LIMIT,
            read_only: !options.is_writable(),
            autoclear: true,
            direct_io: false,
            offset: options.offset(),
            path: Some(LoopPath { path, state: PathState::Same }),
            generation: Some(generation),
        };
        let file = file.try_clone().map_err(|error| Error::io("dup", error))?;
        state.loops.insert(minor, FakeLoop { file: Arc::new(file), info, size, descriptors: 1 });
        drop(state);
        Ok(self.handle(DeviceNumber { major: LOOP_MAJOR, minor }, size, generation))
    }

    fn zeros(&self, length: ByteLen) -> Result<File> {
        self.call("zeros".to_owned())?;
        super::sys::sealed_zeros(length.get()).map_err(|error| Error::io("zeros", error))
    }

    fn loop_info(&self, number: DeviceNumber) -> Result<Option<LoopInfo>> {
        self.query("loop info")?;
        if number.major != LOOP_MAJOR {
            return Ok(None);
        }
        Ok(self.0.borrow().loops.get(&number.minor).map(|each| each.info.clone()))
    }

    fn loops(&self) -> Result<Vec<DeviceNumber>> {
        self.query("loops")?;
        let minors = self.0.borrow().loops.keys().copied().collect::<Vec<_>>();
        Ok(minors.into_iter().map(|minor| DeviceNumber { major: LOOP_MAJOR, minor }).collect())
    }

    fn open_loop(&self, number: DeviceNumber) -> Result<FakeHandle> {
        self.query("open loop")?;
        let mut state = self.0.borrow_mut();
        let Some(each) = state.loops.get_mut(&number.minor) else {
            return Err(refused("no such loop device"));
        };
        each.descriptors += 1;
        let (size, generation) = (each.size, each.info.generation.unwrap_or(0));
        drop(state);
        Ok(self.handle(number, size, generation))
    }

    fn loop_is_clear(&self, number: DeviceNumber, generation: Option<u64>) -> bool {
        let state = self.0.borrow();
        state.loops.get(&number.minor).is_none_or(|each| each.info.generation != generation)
    }

    fn block_device(&self, number: DeviceNumber) -> Result<(Sectors, u32)> {
        self.query("block device")?;
        let state = self.0.borrow();
        let device = state.devices.get(&number.minor).filter(|_| number.major == DM_MAJOR);
        let size = match (device, state.loops.get(&number.minor)) {
            (Some(device), _) => {
                let last = device.live.as_ref().and_then(|table| table.last());
                last.map_or(0, |line| line.start.get() + line.length.get())
            }
            (None, Some(each)) if number.major == LOOP_MAJOR => each.size.get(),
            _ => 1 << 32,
        };
        Ok((Sectors::new(size), 512))
    }

    fn reader(&self, number: DeviceNumber) -> Result<Arc<dyn DeviceReader>> {
        self.query("reader")?;
        let state = self.0.borrow();
        let tables = state.devices.iter().filter_map(|(&minor, device)| {
            Some((DeviceNumber { major: DM_MAJOR, minor }, device.live.clone()?))
        });
        let files = state.loops.iter().map(|(&minor, each)| {
            (DeviceNumber { major: LOOP_MAJOR, minor }, Arc::clone(&each.file))
        });
        let (tables, files) = (tables.collect(), files.collect());
        Ok(Arc::new(FakeReader { number, tables, files }))
    }

    fn block_device_path(&self, number: DeviceNumber) -> PathBuf {
        let descriptor = self.0.borrow().loops.get(&number.minor).map(|each| each.file.as_raw_fd());
        format!("/proc/self/fd/{}", descriptor.unwrap_or(-1)).into()
    }

    fn now(&self) -> u64 {
        0
    }

    fn publish(
        &self,
        name: &str,
        _number: DeviceNumber,
        _since: Option<u64>,
        interrupt: &Interrupt<'_>,
    ) -> Result<PathBuf> {
        interrupt.check()?;
        self.call(format!("publish {name}"))?;
        self.0.borrow_mut().published.push(name.to_owned());
        Ok(Path::new("/dev/mapper").join(name))
    }

    fn unpublish(&self, name: &str, _number: DeviceNumber) {
        self.0.borrow_mut().published.retain(|published| published != name);
    }

    fn holders(&self, number: DeviceNumber) -> Vec<String> {
        let state = self.0.borrow();
        let device = state.devices.get(&number.minor);
        let descriptors = device.map_or(0, |device| device.descriptors);
        (0..descriptors).map(|n| format!("process {n}")).collect()
    }

    fn wait(&self, _patience: Duration, done: &mut dyn FnMut() -> bool) -> bool {
        done()
    }
}
