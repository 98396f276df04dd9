//! The running kernel.

use std::cell::{Cell, OnceCell};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use nix::libc;
use nix::time::{ClockId, clock_gettime};

use super::dm::Dm;
use super::name::{DmName, DmUuid};
use super::nodes::{self, DEVICE_MAPPER, LOOP, MAPPER};
use super::table_buffer::TableBuffer;
use super::{
    Access, DeviceId, DeviceInfo, DeviceNumber, DeviceReader, Guard, Interrupt, Kernel, Lines,
    LiveLine, LoopInfo, LoopOptions, PATIENCE, UdevRules, loop_node, loops, memory, mountinfo, sys,
    udev,
};
use crate::crypt::VolumeKey;
use crate::error::{Error, ErrorKind, Result, printable};
use crate::source::FileId;
use crate::table::{CryptKey, Target};
use crate::units::{ByteLen, SECTOR_SIZE, Sectors};
use crate::worker::apart;

/// How long another imgdm may build before we give up waiting for it.
const LOCK_PATIENCE: Duration = Duration::from_secs(120);

/// The kernel that runs, with its control devices opened when they are first needed.
#[derive(Debug, Default)]
pub struct LinuxKernel {
    dm: OnceCell<Dm>,
    loop_control: OnceCell<File>,
    /// udev has had its time and did not do its part: it gets no more, however many devices
    /// there are.
    udev_is_late: Cell<bool>,
}

/// Memory in multiples of this suits every device for reads past the page cache.
const DIRECT_ALIGNMENT: usize = 4096;

/// A block device that is read.
struct BlockReader {
    file: File,
    /// Its logical block size, where it can be read past the page cache: a file system that
    /// somebody has mounted keeps its own view of some blocks there (ext4 its journal's
    /// superblock).
    direct: Option<usize>,
}

impl BlockReader {
    fn new(file: File) -> Self {
        // Others keep the device open, and so its pages, whatever became of what lies below.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        let direct = set_direct(&file, true)
            .and_then(|()| Ok(usize::try_from(sys::logical_block_size(file.as_fd())?).ok()))
            .ok()
            .flatten()
            .filter(|block| (1..=DIRECT_ALIGNMENT).contains(block) && block.is_power_of_two());
        let mut reader = Self { file, direct };
        // Whether it really can be read so shows with its first block.
        if direct.is_none_or(|block| reader.read_direct(0, &mut [0; 512], block).is_err()) {
            let _ = set_direct(&reader.file, false);
            reader.direct = None;
        }
        reader
    }

    fn read_direct(&self, offset: u64, buffer: &mut [u8], block: usize) -> io::Result<()> {
        let too_far = || io::Error::from(io::ErrorKind::InvalidInput);
        let skipped = usize::try_from(offset % block as u64).map_err(|_| too_far())?;
        let length = skipped.checked_add(buffer.len()).ok_or_else(too_far)?;
        let length = length.checked_next_multiple_of(block).ok_or_else(too_far)?;
        let mut memory = vec![0; length.checked_add(DIRECT_ALIGNMENT).ok_or_else(too_far)?];
        let start = memory.as_ptr().align_offset(DIRECT_ALIGNMENT);
        let aligned = memory.get_mut(start..start.saturating_add(length)).ok_or_else(too_far)?;
        self.file.read_exact_at(aligned, offset - skipped as u64)?;
        let read = aligned.get(skipped..skipped + buffer.len()).ok_or_else(too_far)?;
        buffer.copy_from_slice(read);
        Ok(())
    }
}

impl DeviceReader for BlockReader {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self.direct {
            Some(block) => self.read_direct(offset, buffer, block),
            None => self.file.read_exact_at(buffer, offset),
        }
    }
}

/// Sets whether a file is read past the page cache.
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_DIRECT, direct);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

/// An open device-mapper device.
#[derive(Debug)]
pub struct Node(#[expect(dead_code, reason = "held open, not read")] File);

impl LinuxKernel {
    /// Opens nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    pub(super) fn dm(&self) -> Result<&Dm> {
        if let Some(dm) = self.dm.get() {
            return Ok(dm);
        }
        let dm = Dm::new(DEVICE_MAPPER.open()?);
        Ok(self.dm.get_or_init(|| dm))
    }

    /// Waits for udev to do its part; [`PATIENCE`] is for all devices together.
    fn wait_for_udev(&self, done: &mut dyn FnMut() -> bool) -> bool {
        let patience = if self.udev_is_late.get() { Duration::ZERO } else { PATIENCE };
        let is_done = self.wait(patience, done);
        self.udev_is_late.set(!is_done);
        is_done
    }

    fn loop_control(&self) -> Result<&File> {
        if let Some(control) = self.loop_control.get() {
            return Ok(control);
        }
        let control = LOOP.open()?;
        Ok(self.loop_control.get_or_init(|| control))
    }
}

/// Turns the error of a device-mapper ioctl into ours.
fn failed<'a>(what: &'a str, device: &'a str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |error| {
        if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) {
            let message = format!("cannot {what} '{}': this needs root", printable(device));
            return Error::new(ErrorKind::PermissionDenied(message)).with_source(error);
        }
        let hint = match error.raw_os_error() {
            Some(libc::EINVAL) => " (the kernel log says why)",
            _ => "",
        };
        Error::io(format!("cannot {what} '{}'{hint}", printable(device)), error)
    }
}

/// The same of one that loads a table, which may be large.
fn load_failed(uuid: &str, error: io::Error) -> Error {
    if error.raw_os_error() != Some(libc::ENOMEM) {
        return failed("load a table into", uuid)(error);
    }
    let message = format!(
        "cannot load a table into '{}': the kernel has too little memory for it ('imgdm plan IMAGE' tells how much the tables of an image take)",
        printable(uuid)
    );
    Error::io(message, error)
}

fn sysfs(number: DeviceNumber) -> PathBuf {
    format!("/sys/dev/block/{number}").into()
}

impl Kernel for LinuxKernel {
    type Lock = Flock<File>;
    type Node = Node;
    type Loop = loops::Loop;

    fn prepare(&self, targets: &[&str]) -> Result<()> {
        self.loop_control()?;
        let dm = self.dm()?;
        let known = || dm.targets().map_err(failed("ask for the targets of", "device-mapper"));
        let mut there = known()?;
        for target in targets {
            if !there.iter().any(|known| known == target) {
                nodes::modprobe(&format!("dm-{target}"));
                there = known()?;
            }
            if !there.iter().any(|known| known == target) {
                return Err(Error::new(ErrorKind::KernelLacks(format!(
                    "the kernel lacks device-mapper's target '{target}' (module dm-{target})"
                ))));
            }
        }
        Ok(())
    }

    fn lock(&self, interrupt: &Interrupt<'_>) -> Result<Self::Lock> {
        let mut file = DEVICE_MAPPER.open()?;
        let end = Instant::now() + LOCK_PATIENCE;
        loop {
            interrupt.check()?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(lock),
                Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) if Instant::now() < end => {
                    file = back;
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err((_, Errno::EWOULDBLOCK)) => {
                    return Err(Error::new(ErrorKind::InUse(format!(
                        "another imgdm has been at work for more than {} s",
                        LOCK_PATIENCE.as_secs()
                    )))
                    .at_path("/dev/mapper/control"));
                }
                Err((_, errno)) => {
                    return Err(
                        Error::io("cannot lock", errno.into()).at_path("/dev/mapper/control")
                    );
                }
            }
        }
    }

    fn guard(&self, lock: &Self::Lock, uuids: &[String]) -> Result<Box<dyn Guard>> {
        let failed = |error| Error::io("cannot start a process that watches over the build", error);
        let removals: io::Result<Vec<_>> =
            uuids.iter().rev().map(|uuid| Dm::removal(uuid)).collect();
        let watch = removals.and_then(|removals| sys::watch(lock.as_fd(), &removals));
        Ok(Box::new(watch.map_err(failed)?))
    }

    fn available_memory(&self) -> Option<u64> {
        memory::available()
    }

    fn devices(&self) -> Result<Vec<DeviceInfo>> {
        if !DEVICE_MAPPER.is_there() {
            return Ok(Vec::new());
        }
        let dm = self.dm()?;
        let listed = dm.list().map_err(failed("list the devices of", "device-mapper"))?;
        let mut devices = Vec::new();
        for (name, number) in listed {
            let name = name.to_string_lossy();
            let info = dm.info(DeviceId::Number(number));
            devices.extend(info.map_err(failed("look at the device", &name))?);
        }
        Ok(devices)
    }

    fn device(&self, id: DeviceId<'_>) -> Result<Option<DeviceInfo>> {
        let shown = match id {
            DeviceId::Name(text) | DeviceId::Uuid(text) => text.to_owned(),
            DeviceId::Number(number) => number.to_string(),
        };
        if !DEVICE_MAPPER.is_there() {
            return Ok(None);
        }
        self.dm()?.info(id).map_err(failed("look at the device", &shown))
    }

    fn dependencies(&self, id: DeviceId<'_>) -> Result<Vec<DeviceNumber>> {
        match self.dm()?.dependencies(id) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Vec::new()),
            other => other.map_err(failed("look below the device", "of imgdm")),
        }
    }

    fn dependents(&self, number: DeviceNumber) -> Result<Vec<DeviceNumber>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(sysfs(number).join("holders")).into_iter().flatten().flatten() {
            let Ok(text) = fs::read_to_string(entry.path().join("dev")) else { continue };
            let mut parts = text.trim().split(':').map(str::parse);
            if let (Some(Ok(major)), Some(Ok(minor))) = (parts.next(), parts.next()) {
                found.push(DeviceNumber { major, minor });
            }
        }
        Ok(found)
    }

    fn live_table(&self, uuid: &str) -> Result<Box<dyn Iterator<Item = LiveLine>>> {
        let table = self.dm()?.live_table(uuid).map_err(failed("read the table of", uuid))?;
        Ok(Box::new(table))
    }

    fn live_status(&self, uuid: &str) -> Result<Vec<LiveLine>> {
        let status = self.dm()?.live_status(uuid).map_err(failed("read the state of", uuid))?;
        Ok(status.collect())
    }

    fn create(&self, name: &DmName, uuid: &DmUuid) -> Result<DeviceNumber> {
        let created = self.dm()?.create(name.as_str(), &uuid.to_string());
        created.map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => {
                let message = format!("the device name '{name}' or its UUID is taken");
                Error::new(ErrorKind::CannotCreate(message)).with_source(error)
            }
            _ => failed("create the device", name.as_str())(error),
        })
    }

    fn load(&self, uuid: &str, access: Access, count: u64, lines: &mut Lines<'_>) -> Result<()> {
        let mut load = || {
            let mut table = TableBuffer::with_capacity(count)
                .map_err(|error| Error::io("cannot make a memory file for a table", error))?;
            let mut cipher = None;
            // All of it at once: handed over line by line, or some lines at a time, it took a
            // quarter longer on one processor.
            apart(|| {
                lines(&mut |line| {
                    if let Target::Crypt { cipher: name, .. } = &line.target {
                        cipher = Some(name.clone());
                    }
                    table.push(line)
                })
            })?;
            Ok((self.dm()?.load(uuid, access, table), cipher))
        };
        match load()? {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(cipher)) => {
                // The kernel loads a cipher's modules itself, but not everywhere: in a
                // container or an initrd its helper may be missing.
                nodes::load_cipher_modules(&cipher);
                load()?.0.map_err(|error| match error.raw_os_error() {
                    Some(libc::EINVAL | libc::ENOENT) => {
                        let message = format!(
                            "the kernel lacks a part of the cipher '{cipher}' (modules for it, or dm-crypt's support; the kernel log says which)"
                        );
                        Error::new(ErrorKind::KernelLacks(message)).with_source(error)
                    }
                    _ => load_failed(uuid, error),
                })
            }
            (Err(error), None) => Err(load_failed(uuid, error)),
        }
    }

    fn store_key(&self, description: &str, key: &VolumeKey) -> Result<CryptKey> {
        match sys::add_logon_key(description, key.bytes()) {
            Ok(()) => {
                let (size, description) = (key.bytes().len(), description.to_owned());
                Ok(CryptKey::Keyring { size, description })
            }
            // No keyring in this kernel or container: the key goes in the table's line.
            Err(_) => Ok(CryptKey::Raw(key.bytes().to_vec().into())),
        }
    }

    fn forget_key(&self, key: &CryptKey) {
        if let CryptKey::Keyring { description, .. } = key {
            sys::forget_logon_key(description);
        }
    }

    fn resume(&self, uuid: &str, rules: UdevRules) -> Result<()> {
        self.dm()?.resume(uuid, rules).map_err(failed("resume the device", uuid))
    }

    fn open(&self, number: DeviceNumber) -> Result<Node> {
        let path = PathBuf::from(format!("/dev/dm-{}", number.minor));
        match nodes::open_block(number, &path) {
            Ok(file) => Ok(Node(file)),
            Err(error) => Err(Error::io("cannot open the device", error).at_path(path)),
        }
    }

    fn defer_removal(&self, uuid: &str) -> Result<()> {
        self.dm()?.remove(uuid, true).map_err(failed("mark for removal", uuid))
    }

    fn cancel_deferred_removal(&self, uuid: &str) -> Result<()> {
        let message = "@cancel_deferred_remove";
        self.dm()?.message(uuid, message).map_err(failed("make permanent the device", uuid))
    }

    fn remove(&self, uuid: &str) -> Result<bool> {
        match self.dm()?.remove(uuid, false) {
            Ok(()) => Ok(true),
            Err(error) => match error.raw_os_error() {
                Some(libc::EBUSY | libc::ENXIO) => Ok(false),
                _ => Err(failed("remove the device", uuid)(error)),
            },
        }
    }

    fn is_gone(&self, number: DeviceNumber, uuid: &str) -> bool {
        // The device leaves device-mapper's list first, then lets go of what it lay on,
        // and only then leaves sysfs.
        match self.device(DeviceId::Number(number)) {
            Ok(Some(info)) => info.uuid != uuid,
            Ok(None) => !sysfs(number).exists(),
            Err(_) => false,
        }
    }

    fn set_up_loop(&self, file: &File, options: &LoopOptions) -> Result<loops::Loop> {
        loops::set_up(self.loop_control()?, file, options)
    }

    fn zeros(&self, length: ByteLen) -> Result<File> {
        sys::sealed_zeros(length.get()).map_err(|e| Error::io("cannot make a memory file", e))
    }

    fn loop_info(&self, number: DeviceNumber) -> Result<Option<LoopInfo>> {
        if loops::is_loop(number) { loops::info(number) } else { Ok(None) }
    }

    fn loops(&self) -> Result<Vec<DeviceNumber>> {
        Ok(bound_loops().filter(|(_, number)| loops::is_ours(*number)).map(|(_, n)| n).collect())
    }

    fn open_loop(&self, number: DeviceNumber) -> Result<loops::Loop> {
        loops::open(number)
    }

    fn loop_is_clear(&self, number: DeviceNumber, generation: Option<u64>) -> bool {
        loops::is_clear(number, generation)
    }

    fn block_device(&self, number: DeviceNumber) -> Result<(Sectors, u32)> {
        // From sysfs where it is there: an open device is a busy one for others.
        let attribute = |name: &str| -> Option<u64> {
            fs::read_to_string(sysfs(number).join(name)).ok()?.trim().parse().ok()
        };
        let block = attribute("queue/logical_block_size")
            .or_else(|| attribute("../queue/logical_block_size"))
            .and_then(|block| u32::try_from(block).ok());
        if let (Some(size), Some(block)) = (attribute("size"), block) {
            return Ok((Sectors::new(size), block));
        }
        let path = self.block_device_path(number);
        let ask = || {
            let file = nodes::open_block(number, &path)?;
            let size = sys::block_device_size(file.as_fd())?;
            let block = sys::logical_block_size(file.as_fd())?;
            Ok((Sectors::new(size / SECTOR_SIZE), block))
        };
        ask().map_err(|error| Error::io("cannot look at the block device", error).at_path(&path))
    }

    fn reader(&self, number: DeviceNumber) -> Result<Arc<dyn DeviceReader>> {
        let path = self.block_device_path(number);
        let file = nodes::open_block(number, &path)
            .map_err(|error| Error::io("cannot open the device", error).at_path(&path))?;
        Ok(Arc::new(BlockReader::new(file)))
    }

    fn block_device_path(&self, number: DeviceNumber) -> PathBuf {
        let name = fs::read_link(sysfs(number)).ok();
        match name.as_deref().and_then(Path::file_name) {
            Some(name) => Path::new("/dev").join(name),
            None if loops::is_loop(number) => loop_node(number),
            None => format!("/dev/dm-{}", number.minor).into(),
        }
    }

    fn now(&self) -> u64 {
        let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
        let micros = now.tv_sec().saturating_mul(1_000_000).saturating_add(now.tv_nsec() / 1000);
        u64::try_from(micros).unwrap_or(0)
    }

    fn publish(
        &self,
        name: &str,
        number: DeviceNumber,
        since: Option<u64>,
        interrupt: &Interrupt<'_>,
    ) -> Result<PathBuf> {
        let path = Path::new(MAPPER).join(name);
        if let Some(since) = since
            && udev::is_running()
            && udev::has_device_mapper_rules()
        {
            let mut stopped = Ok(());
            let done = self.wait_for_udev(&mut || {
                stopped = interrupt.check();
                stopped.is_err()
                    || udev::Record::of(number).is_some_and(|record| record.is_done(since))
            });
            stopped?;
            // Links come before the record: one that is not there now is in another
            // mount namespace.
            self.wait(Duration::from_millis(100), &mut || nodes::number_at(&path) == Some(number));
            if !done {
                let seconds = PATIENCE.as_secs();
                log::warn!("udev has not made {} in {seconds} s", path.display());
            }
        }
        let failed = |error| Error::io("cannot make or open the device's node", error);
        nodes::make_link(name, number).map_err(|error| failed(error).at_path(&path))?;
        let opened = File::open(&path).and_then(|file| file.metadata());
        match opened {
            Ok(metadata) if metadata.rdev() == number.to_dev() => Ok(path),
            Ok(_) => Err(failed(Errno::ENXIO.into()).at_path(path)),
            Err(error) => Err(failed(error).at_path(path)),
        }
    }

    fn unpublish(&self, name: &str, number: DeviceNumber) {
        let path = Path::new(MAPPER).join(name);
        let gone = matches!(self.device(DeviceId::Name(name)), Ok(None));
        if udev::is_running() && udev::has_device_mapper_rules() {
            // As long as the device is there, or another is by now, the link is udev's.
            if !gone {
                return;
            }
            self.wait_for_udev(&mut || {
                path.symlink_metadata().is_err() && udev::Record::of(number).is_none()
            });
        }
        nodes::remove_link(name, number);
    }

    fn holders(&self, number: DeviceNumber) -> Vec<String> {
        let mut holders = Vec::new();
        for above in self.dependents(number).unwrap_or_default() {
            holders.push(match self.device(DeviceId::Number(above)) {
                Ok(Some(info)) => format!("the device '{}'", printable(&info.name)),
                _ => format!("the block device {above}"),
            });
        }
        holders.extend(loops_over(number));
        holders.extend(mounts(number));
        holders.extend(processes(number));
        holders
    }

    fn wait(&self, patience: Duration, done: &mut dyn FnMut() -> bool) -> bool {
        let end = Instant::now() + patience;
        let mut pause = Duration::from_millis(1);
        loop {
            if done() {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

impl Guard for sys::Watch {}

/// Loop devices over a block device: the kernel holds it for them, no process does.
fn loops_over(number: DeviceNumber) -> Vec<String> {
    let device = FileId { device: number.to_dev(), inode: 0 };
    bound_loops()
        .filter(|(_, number)| {
            loops::info(*number).is_ok_and(|info| info.is_some_and(|info| info.file == device))
        })
        .map(|(name, _)| format!("the loop device /dev/{name}"))
        .collect()
}

/// Name and numbers of each loop device that is bound. Opening a free one would make it
/// stay.
pub(super) fn bound_loops() -> impl Iterator<Item = (String, DeviceNumber)> {
    fs::read_dir("/sys/block").into_iter().flatten().flatten().filter_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let index = name.strip_prefix("loop")?.parse().ok()?;
        let is_bound = entry.path().join("loop/backing_file").exists();
        is_bound.then(|| (name, loops::number_of(index)))
    })
}

/// Where a block device is mounted, in words.
fn mounts(number: DeviceNumber) -> Vec<String> {
    let mut found = Vec::new();
    for mount in mounted(number) {
        let holder = format!("the mount {}", printable(&mount.point.to_string_lossy()));
        if !found.contains(&holder) {
            found.push(holder);
        }
    }
    found
}

/// The mounts of a block device, in any mount namespace.
pub(super) fn mounted(number: DeviceNumber) -> Vec<mountinfo::Mount> {
    let mut found = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for pid in pids() {
        let namespace = fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        if namespace.is_some_and(|namespace| !seen.insert(namespace)) {
            continue;
        }
        let mounts = mountinfo::mounts(&pid.to_string()).unwrap_or_default();
        found.extend(mounts.into_iter().filter(|mount| mount.is_of(number)));
    }
    found
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Which other processes have a block device open.
fn processes(number: DeviceNumber) -> Vec<String> {
    let mut found = Vec::new();
    for pid in pids().filter(|&pid| pid != std::process::id()) {
        let open =
            fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten().any(|entry| {
                fs::metadata(entry.path())
                    .is_ok_and(|m| m.file_type().is_block_device() && m.rdev() == number.to_dev())
            });
        if open {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.push(format!("process {pid} ({})", printable(name.trim_end())));
        }
    }
    found
}
