//! Device-mapper's ioctls (linux/dm-ioctl.h).
//!
//! Spoken directly and not through a library, for four reasons: a table is written once
//! in the ioctl's own form as it streams in (a table of a million lines takes 64 MiB
//! and not three times that); nothing of it, keys included, goes to a log; other
//! people's devices with names that are not ASCII are no error; and the flags for udev
//! go without the semaphore of libdevmapper's protocol, whose wait has no end where
//! `dmsetup` is missing and which a kill leaves behind.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::libc;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::live_table::LiveTable;
use super::sys::{DM_HEADER_LENGTH, Remedy, dm_ioctl, dm_ioctl_in_file, memory_file};
use super::table_buffer::{Finished, TableBuffer};
use super::{Access, DeviceId, DeviceInfo, DeviceNumber, UdevRules};

// Commands.
const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const DEV_STATUS: u8 = 7;
const TABLE_LOAD: u8 = 9;
const TABLE_DEPS: u8 = 11;
const TABLE_STATUS: u8 = 12;
const LIST_VERSIONS: u8 = 13;
const TARGET_MSG: u8 = 14;

// Flags.
const READONLY: u32 = 1 << 0;
const SUSPENDED: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const ACTIVE_PRESENT: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
const NO_FLUSH: u32 = 1 << 11;
/// The kernel wipes its copy of the ioctl's buffer.
const SECURE_DATA: u32 = 1 << 15;
const DEFERRED_REMOVE: u32 = 1 << 17;

// Flags for udev's rules, in the upper half of the event number (libdevmapper.h).
const UDEV_DISABLE_SUBSYSTEM_RULES: u32 = 0x02;
const UDEV_DISABLE_DISK_RULES: u32 = 0x04;
const UDEV_DISABLE_OTHER_RULES: u32 = 0x08;
const UDEV_PRIMARY_SOURCE: u32 = 0x40;

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

const _: () =
    assert!(size_of::<Header>() == DM_HEADER_LENGTH && DM_HEADER_LENGTH.is_multiple_of(8));

/// `struct dm_target_spec`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(super) struct TargetSpec {
    pub(super) sector_start: u64,
    pub(super) length: u64,
    status: i32,
    pub(super) next: u32,
    pub(super) target_type: [u8; 16],
}

pub(super) const SPEC_LENGTH: usize = size_of::<TargetSpec>();

/// Copies a C string with its NUL; EINVAL where it does not fit.
pub(super) fn put(field: &mut [u8], text: &str) -> io::Result<()> {
    if text.len() >= field.len() || text.as_bytes().contains(&0) {
        return Err(Errno::EINVAL.into());
    }
    field[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

/// The bytes up to the NUL.
pub(super) fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or(field)
}

pub(super) fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(until_nul(field)).into_owned()
}

impl Header {
    fn new(id: Option<DeviceId<'_>>) -> io::Result<Self> {
        let mut header = Self::new_zeroed();
        header.version = [4, 0, 0];
        header.data_start = u32::try_from(DM_HEADER_LENGTH).unwrap_or(0);
        match id {
            None => {}
            Some(DeviceId::Name(name)) => put(&mut header.name, name)?,
            Some(DeviceId::Uuid(uuid)) => put(&mut header.uuid[..128], uuid)?,
            Some(DeviceId::Number(number)) => {
                let (major, minor) = (u64::from(number.major), u64::from(number.minor));
                header.dev = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
            }
        }
        Ok(header)
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            number: DeviceNumber::from_kernel(self.dev),
            name: text(&self.name),
            uuid: text(&self.uuid),
            open_count: u32::try_from(self.open_count).unwrap_or(0),
            has_live_table: self.flags & ACTIVE_PRESENT != 0,
            deferred_remove: self.flags & DEFERRED_REMOVE != 0,
            read_only: self.flags & READONLY != 0,
        }
    }
}

/// The control device, opened.
#[derive(Debug)]
pub(crate) struct Dm {
    control: File,
}

/// Room for an answer from which on it goes to a file.
const LARGE_ANSWER: usize = 1 << 20;

/// What an ioctl gave: the header, and the whole buffer.
type Answer = (Header, Vec<u8>);

impl Dm {
    pub(crate) fn new(control: File) -> Self {
        Self { control }
    }

    /// One ioctl with `input` after the header; the answer's buffer grows until it fits.
    fn call(&self, command: u8, header: &Header, input: &[u8], room: usize) -> io::Result<Answer> {
        let mut room = room.max(input.len()).max(16 << 10);
        loop {
            let mut buffer = vec![0; DM_HEADER_LENGTH + room];
            buffer[..DM_HEADER_LENGTH].copy_from_slice(header.as_bytes());
            buffer[DM_HEADER_LENGTH..DM_HEADER_LENGTH + input.len()].copy_from_slice(input);
            let answer = self.run(command, &mut buffer)?;
            if answer.flags & BUFFER_FULL == 0 {
                return Ok((answer, buffer));
            }
            room = room.checked_mul(2).ok_or(Errno::EOVERFLOW)?;
        }
    }

    fn run(&self, command: u8, buffer: &mut [u8]) -> io::Result<Header> {
        dm_ioctl(self.control.as_fd(), command, buffer)?;
        Header::read_from_prefix(buffer).map(|(header, _)| header).map_err(|_| Errno::EINVAL.into())
    }

    fn simple(&self, command: u8, header: &Header) -> io::Result<Header> {
        Ok(self.call(command, header, &[], 0)?.0)
    }

    /// Names and numbers of all devices.
    pub(crate) fn list(&self) -> io::Result<Vec<(OsString, DeviceNumber)>> {
        let (header, buffer) = self.call(LIST_DEVICES, &Header::new(None)?, &[], 0)?;
        let mut devices = Vec::new();
        let mut rest = data(&header, &buffer);
        // struct dm_name_list: dev, distance to the next, name.
        while let Some((dev, tail)) = take_u64(rest) {
            let Some((next, name)) = take_u32(tail) else { break };
            if dev != 0 {
                let name = OsString::from_vec(until_nul(name).to_vec());
                devices.push((name, DeviceNumber::from_kernel(dev)));
            }
            match usize::try_from(next).ok().filter(|&next| next > 0) {
                Some(next) => rest = rest.get(next..).unwrap_or(&[]),
                None => break,
            }
        }
        Ok(devices)
    }

    /// Names of the targets that are there.
    pub(crate) fn targets(&self) -> io::Result<Vec<String>> {
        let (header, buffer) = self.call(LIST_VERSIONS, &Header::new(None)?, &[], 0)?;
        let mut targets = Vec::new();
        let mut rest = data(&header, &buffer);
        // struct dm_target_versions: distance to the next, version, name.
        while let Some((next, tail)) = take_u32(rest) {
            let Some(name) = tail.get(12..) else { break };
            targets.push(text(name));
            match usize::try_from(next).ok().filter(|&next| next > 0) {
                Some(next) => rest = rest.get(next..).unwrap_or(&[]),
                None => break,
            }
        }
        Ok(targets)
    }

    /// One device; none where it is not there.
    pub(crate) fn info(&self, id: DeviceId<'_>) -> io::Result<Option<DeviceInfo>> {
        match self.simple(DEV_STATUS, &Header::new(Some(id))?) {
            Ok(header) => Ok(Some(header.info())),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn create(&self, name: &str, uuid: &str) -> io::Result<DeviceNumber> {
        let mut header = Header::new(Some(DeviceId::Name(name)))?;
        put(&mut header.uuid[..128], uuid)?;
        Ok(self.simple(DEV_CREATE, &header)?.info().number)
    }

    pub(crate) fn resume(&self, uuid: &str, rules: UdevRules) -> io::Result<()> {
        let mut header = Header::new(Some(DeviceId::Uuid(uuid)))?;
        let flags = UDEV_PRIMARY_SOURCE
            | match rules {
                UdevRules::Publish => 0,
                UdevRules::HideContent => UDEV_DISABLE_DISK_RULES,
                UdevRules::Hide => {
                    UDEV_DISABLE_SUBSYSTEM_RULES
                        | UDEV_DISABLE_DISK_RULES
                        | UDEV_DISABLE_OTHER_RULES
                }
            };
        header.event_nr = flags << 16;
        self.simple(DEV_SUSPEND, &header).map(drop)
    }

    /// Removes a device, or with `deferred` has it removed at its last close.
    pub(crate) fn remove(&self, uuid: &str, deferred: bool) -> io::Result<()> {
        let mut header = Header::new(Some(DeviceId::Uuid(uuid)))?;
        header.flags = if deferred { DEFERRED_REMOVE } else { 0 };
        self.simple(DEV_REMOVE, &header).map(drop)
    }

    /// How a device is removed unless it has a live table, made up front.
    pub(crate) fn removal(uuid: &str) -> io::Result<Remedy> {
        Self::remedy(DeviceId::Uuid(uuid), ACTIVE_PRESENT, false, DEV_REMOVE)
    }

    /// How a device is resumed that is suspended, made up front.
    pub(crate) fn resumption(number: DeviceNumber) -> io::Result<Remedy> {
        Self::remedy(DeviceId::Number(number), SUSPENDED, true, DEV_SUSPEND)
    }

    fn remedy(id: DeviceId<'_>, flag: u32, is_set: bool, command: u8) -> io::Result<Remedy> {
        let mut header = [0; DM_HEADER_LENGTH];
        header.copy_from_slice(Header::new(Some(id))?.as_bytes());
        Ok(Remedy { header, status: DEV_STATUS, flag, is_set, command })
    }

    /// Has a device let no request through any more, once all that it has are done. A file
    /// system on it is brought into order first and waits, too.
    pub(crate) fn suspend(&self, number: DeviceNumber) -> io::Result<()> {
        let mut header = Header::new(Some(DeviceId::Number(number)))?;
        header.flags = SUSPENDED;
        self.simple(DEV_SUSPEND, &header).map(drop)
    }

    /// Has a device go on with the table that it has. Without a word to udev's rules these go
    /// by what they know of it.
    pub(crate) fn go_on(&self, number: DeviceNumber) -> io::Result<()> {
        let header = Header::new(Some(DeviceId::Number(number)))?;
        self.simple(DEV_SUSPEND, &header).map(drop)
    }

    /// Whether a device is suspended.
    pub(crate) fn is_suspended(&self, number: DeviceNumber) -> io::Result<bool> {
        let header = Header::new(Some(DeviceId::Number(number)))?;
        Ok(self.simple(DEV_STATUS, &header)?.flags & SUSPENDED != 0)
    }

    pub(crate) fn message(&self, uuid: &str, message: &str) -> io::Result<()> {
        let header = Header::new(Some(DeviceId::Uuid(uuid)))?;
        let mut input = 0u64.to_ne_bytes().to_vec(); // To the device, not to a sector's target.
        input.extend_from_slice(message.as_bytes());
        input.push(0);
        self.call(TARGET_MSG, &header, &input, 0).map(drop)
    }

    /// What the live table lies on.
    pub(crate) fn dependencies(&self, id: DeviceId<'_>) -> io::Result<Vec<DeviceNumber>> {
        let (header, buffer) = self.call(TABLE_DEPS, &Header::new(Some(id))?, &[], 0)?;
        let Some((count, rest)) = take_u32(data(&header, &buffer)) else { return Ok(Vec::new()) };
        let mut rest = rest.get(4..).unwrap_or(&[]);
        let mut devices = Vec::new();
        for _ in 0..count {
            let Some((dev, tail)) = take_u64(rest) else { break };
            devices.push(DeviceNumber::from_kernel(dev));
            rest = tail;
        }
        Ok(devices)
    }

    /// The live table, line by line out of the kernel's answer.
    pub(crate) fn live_table(&self, uuid: &str) -> io::Result<LiveTable> {
        self.table_status(uuid, STATUS_TABLE)
    }

    /// What the targets of the live table say of their state. Nothing is written out for it.
    pub(crate) fn live_status(&self, uuid: &str) -> io::Result<LiveTable> {
        self.table_status(uuid, NO_FLUSH)
    }

    fn table_status(&self, uuid: &str, flags: u32) -> io::Result<LiveTable> {
        let mut header = Header::new(Some(DeviceId::Uuid(uuid)))?;
        let lines = self.simple(DEV_STATUS, &header)?.target_count;
        header.flags = flags;
        let room = usize::try_from(lines).unwrap_or(0).saturating_mul(SPEC_LENGTH + 32);
        if room >= LARGE_ANSWER {
            return self.large_table_status(&header, room);
        }
        let (answer, buffer) = self.call(TABLE_STATUS, &header, &[], room)?;
        let start = usize::try_from(answer.data_start).unwrap_or(buffer.len());
        Ok(LiveTable::new(buffer, start, answer.target_count))
    }

    /// The answer in a memory file: as for a table that is loaded, each of its pages would be a
    /// fault to handle.
    fn large_table_status(&self, header: &Header, mut room: usize) -> io::Result<LiveTable> {
        loop {
            let length = room.checked_add(DM_HEADER_LENGTH).ok_or(Errno::EOVERFLOW)? as u64;
            let file = memory_file("imgdm-status")?;
            file.set_len(length)?;
            file.write_all_at(header.as_bytes(), 0)?;
            dm_ioctl_in_file(self.control.as_fd(), TABLE_STATUS, &file, length)?;
            let mut answer = Header::new_zeroed();
            file.read_exact_at(answer.as_mut_bytes(), 0)?;
            if answer.flags & BUFFER_FULL == 0 {
                let start = usize::try_from(answer.data_start).unwrap_or(usize::MAX);
                return LiveTable::in_file(file, start, answer.target_count);
            }
            room = room.checked_mul(2).ok_or(Errno::EOVERFLOW)?;
        }
    }

    /// Loads a table as the inactive one.
    pub(crate) fn load(
        &self,
        uuid: &str,
        access: Access,
        mut table: TableBuffer,
    ) -> io::Result<()> {
        let mut header = Header::new(Some(DeviceId::Uuid(uuid)))?;
        header.flags = match access {
            Access::ReadOnly => READONLY,
            Access::Writable => 0,
        };
        if table.has_key() {
            header.flags |= SECURE_DATA;
        }
        header.target_count = table.count();
        match table.finish(header.as_bytes())? {
            Finished::Memory(buffer) => self.run(TABLE_LOAD, buffer).map(drop),
            Finished::File(file, length) => {
                dm_ioctl_in_file(self.control.as_fd(), TABLE_LOAD, file, length)
            }
        }
    }
}

/// What follows the header in an answer.
fn data<'b>(header: &Header, buffer: &'b [u8]) -> &'b [u8] {
    let start = usize::try_from(header.data_start).unwrap_or(usize::MAX);
    let end = usize::try_from(header.data_size).unwrap_or(usize::MAX).min(buffer.len());
    buffer.get(start..end).unwrap_or(&[])
}

fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (first, rest) = bytes.split_first_chunk()?;
    Some((u32::from_ne_bytes(*first), rest))
}

fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (first, rest) = bytes.split_first_chunk()?;
    Some((u64::from_ne_bytes(*first), rest))
}

#[cfg(test)]
mod tests {
    use super::super::live_table::without_key;
    use super::*;
    use crate::table::{CryptKey, DeviceRef, TableLine, Target};
    use crate::units::Sectors;

    #[test]
    fn a_key_goes_to_the_kernel_and_is_not_read_back() {
        let device = DeviceRef::from_numbers(7, 1);
        let key = CryptKey::Raw(vec![0xab, 0x01].into());
        let target = Target::Crypt { cipher: "aes-cbc-plain64".to_owned(), key, device };
        let line = TableLine { start: Sectors::new(0), length: Sectors::new(8), target };
        let mut buffer = TableBuffer::with_capacity(1).unwrap();
        buffer.push(&line).unwrap();
        assert!(buffer.has_key());
        let Finished::Memory(buffer) = buffer.finish(&[]).unwrap() else { panic!("in a file") };
        let (_, parameters) = TargetSpec::read_from_prefix(&buffer[DM_HEADER_LENGTH..]).unwrap();
        assert_eq!(text(parameters), "aes-cbc-plain64 ab01 0 7:1 0");
        assert_eq!(without_key(until_nul(parameters)), "aes-cbc-plain64 - 0 7:1 0");
        let keyring = b"aes-xts-plain64 :64:logon:imgdm:x 0 7:1 0";
        assert_eq!(without_key(keyring).as_bytes(), keyring);
    }

    #[test]
    fn names_too_long_for_the_kernel_are_an_error() {
        let name = "x".repeat(128);
        assert!(Header::new(Some(DeviceId::Name(&name))).is_err());
        assert!(Header::new(Some(DeviceId::Uuid(&name))).is_err());
        assert!(Header::new(Some(DeviceId::Name("a\0b"))).is_err());
    }
}
