//! Device-mapper by its ioctls alone.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use imgdm::device::sys::{DM_HEADER_LENGTH, dm_ioctl};

const LIST_DEVICES: u8 = 2;
const DEV_CREATE: u8 = 3;
const DEV_REMOVE: u8 = 4;
const DEV_SUSPEND: u8 = 6;
const TABLE_LOAD: u8 = 9;
const TABLE_STATUS: u8 = 12;

const READ_ONLY: u32 = 1 << 0;
const STATUS_TABLE: u32 = 1 << 4;
const BUFFER_FULL: u32 = 1 << 8;

// Where fields are in `struct dm_ioctl`, and in `struct dm_target_spec`.
const DATA_START_AT: usize = 16;
const COUNT_AT: usize = 20;
const FLAGS_AT: usize = 28;
const NAME_AT: usize = 48;
const NEXT_AT: usize = 20;
const SPEC_LENGTH: usize = 40;

/// Room for the lines of the largest table.
const ROOM: usize = 72 << 20;

fn get(buffer: &[u8], at: usize) -> anyhow::Result<u32> {
    let bytes = buffer.get(at..).and_then(|bytes| bytes.first_chunk()).context("cut off")?;
    Ok(u32::from_ne_bytes(*bytes))
}

fn put(buffer: &mut [u8], at: usize, value: u32) {
    buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
}

/// A buffer that names a device, with room for an answer.
fn request(name: &str, flags: u32, room: usize) -> anyhow::Result<Vec<u8>> {
    let mut buffer = vec![0; DM_HEADER_LENGTH + room];
    put(&mut buffer, 0, 4);
    put(&mut buffer, DATA_START_AT, u32::try_from(DM_HEADER_LENGTH)?);
    put(&mut buffer, FLAGS_AT, flags);
    buffer[NAME_AT..NAME_AT + name.len()].copy_from_slice(name.as_bytes());
    Ok(buffer)
}

fn control() -> anyhow::Result<File> {
    File::open("/dev/mapper/control").context("cannot open /dev/mapper/control")
}

fn call(command: u8, buffer: &mut [u8]) -> anyhow::Result<()> {
    dm_ioctl(control()?.as_fd(), command, buffer).context("an ioctl failed")
}

/// The answer to a command, whose buffer grows until it fits.
fn ask(command: u8, name: &str, flags: u32, mut room: usize) -> anyhow::Result<Vec<u8>> {
    loop {
        let mut buffer = request(name, flags, room)?;
        call(command, &mut buffer)?;
        if get(&buffer, FLAGS_AT)? & BUFFER_FULL == 0 {
            return Ok(buffer);
        }
        room *= 2;
    }
}

fn text(bytes: &[u8]) -> anyhow::Result<&str> {
    let end = bytes.iter().position(|&byte| byte == 0).context("no end of a text")?;
    Ok(std::str::from_utf8(&bytes[..end])?)
}

/// Names of all devices, the oldest first.
pub(crate) fn devices() -> anyhow::Result<Vec<String>> {
    let answer = ask(LIST_DEVICES, "", 0, 64 << 10)?;
    let mut at = usize::try_from(get(&answer, DATA_START_AT)?)?;
    let mut devices = Vec::new();
    // struct dm_name_list: dev, distance to the next, name.
    loop {
        let number = answer.get(at..).and_then(|bytes| bytes.first_chunk()).context("cut off")?;
        let number = u64::from_ne_bytes(*number);
        if number != 0 {
            devices.push((number, text(&answer[at + 12..])?.to_owned()));
        }
        match get(&answer, at + 8)? {
            0 => break,
            next => at += usize::try_from(next)?,
        }
    }
    // They come by their names; numbers are given in order.
    devices.sort();
    Ok(devices.into_iter().map(|(_, name)| name).collect())
}

/// A line of a live table.
#[derive(Debug)]
pub(crate) struct Line<'a> {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) kind: &'a str,
    pub(crate) parameters: &'a str,
}

/// Calls `each` with the lines of a device's live table; says how many there are.
pub(crate) fn for_each_line(
    name: &str,
    mut each: impl FnMut(Line<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<u32> {
    let answer = ask(TABLE_STATUS, name, STATUS_TABLE, ROOM)?;
    let start = usize::try_from(get(&answer, DATA_START_AT)?)?;
    let mut at = start;
    let count = get(&answer, COUNT_AT)?;
    for _ in 0..count {
        let spec = answer.get(at..at + SPEC_LENGTH).context("cut off")?;
        let number = |at: usize| spec[at..].first_chunk().map_or(0, |b| u64::from_ne_bytes(*b));
        let line = Line {
            start: number(0),
            length: number(8),
            kind: text(&spec[24..])?,
            parameters: text(&answer[at + SPEC_LENGTH..])?,
        };
        each(line)?;
        // In an answer that counts from the start of all lines.
        at = start + usize::try_from(get(spec, NEXT_AT)?)?;
    }
    Ok(count)
}

/// A table on its way to the kernel, for a device that nothing else has to do with.
pub(crate) struct Bare {
    table: Vec<u8>,
    lines: u32,
}

const BARE: &str = "bare";

impl Bare {
    /// With the lines of a device's live table.
    pub(crate) fn like(name: &str) -> anyhow::Result<Self> {
        let mut table = request(BARE, READ_ONLY, 0)?;
        let lines = for_each_line(name, |line| {
            let at = table.len();
            table.extend(line.start.to_ne_bytes());
            table.extend(line.length.to_ne_bytes());
            table.extend([0; 8]);
            table.extend(line.kind.as_bytes());
            table.resize(at + SPEC_LENGTH, 0);
            table.extend(line.parameters.as_bytes());
            table.push(0);
            let end = DM_HEADER_LENGTH + (table.len() - DM_HEADER_LENGTH).next_multiple_of(8);
            table.resize(end, 0);
            put(&mut table, at + NEXT_AT, u32::try_from(end - at)?);
            Ok(())
        })?;
        put(&mut table, COUNT_AT, lines);
        Ok(Self { table, lines })
    }

    pub(crate) fn lines(&self) -> u32 {
        self.lines
    }

    /// How long it takes to load and resume the table, and then to remove its device.
    pub(crate) fn load_and_remove(&self) -> anyhow::Result<(Duration, Duration)> {
        let mut table = self.table.clone();
        let mut create = request(BARE, 0, 0)?;
        call(DEV_CREATE, &mut create)?;
        let mut resume = request(BARE, 0, 0)?;
        let mut remove = request(BARE, 0, 0)?;
        let start = Instant::now();
        call(TABLE_LOAD, &mut table)?;
        call(DEV_SUSPEND, &mut resume)?;
        let loaded = start.elapsed();
        let start = Instant::now();
        call(DEV_REMOVE, &mut remove)?;
        Ok((loaded, start.elapsed()))
    }
}
