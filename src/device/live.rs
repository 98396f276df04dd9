//! Live tables, read back: single lines understood, and what lies at the bottom of a stack
//! of them.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::name::DmUuid;
use super::{DeviceNumber, Kernel, LiveLine};
use crate::error::{Result, printable};
use crate::table::CryptKey;
use crate::units::SECTOR_SIZE;

/// Lines of a table that is kept whole. Those of a longer one are read on and on.
const KEPT_LINES: usize = 4096;
/// Longer tables that are read at the same time: each is the kernel's whole answer.
const READ_TABLES: usize = 4;
/// Devices that lie on each other, at most; attachments have five.
const MAX_DEPTH: usize = 16;

/// What serves a live line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LiveTarget {
    /// dm-zero.
    Zero,
    /// dm-error.
    Error,
    /// dm-linear onto this sector of a device.
    Linear {
        /// The device below.
        device: DeviceNumber,
        /// The sector on it.
        offset: u64,
    },
    /// dm-crypt.
    Crypt(Rc<LiveCrypt>),
    /// dm-snapshot, with a persistent store.
    Snapshot(LiveSnapshot),
    /// None of those that imgdm loads, in words.
    Other(String),
}

/// A live snapshot target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LiveSnapshot {
    /// The device that is never written.
    pub(super) origin: DeviceNumber,
    /// The device of the store.
    pub(super) cow: DeviceNumber,
}

/// A live crypt target. A key that is not in the keyring is `-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LiveCrypt {
    pub(super) cipher: String,
    pub(super) key: String,
    /// What is added to the sector's number in the target for its IV.
    pub(super) iv_offset: u64,
    pub(super) device: DeviceNumber,
    /// The sector of the device below where the target starts.
    pub(super) start: u64,
}

impl LiveCrypt {
    /// True where it has the key of a layer of the attachment with the UUID `top`, as far as
    /// a table tells: a key that is not in the keyring is not shown.
    pub(super) fn has_key(&self, top: &DmUuid, layer: u32, size: usize) -> bool {
        let description = top.key_description(layer);
        let key = CryptKey::Keyring { size, description }.to_string();
        self.key == key || self.key == "-"
    }
}

/// `MAJOR:MINOR`.
pub(super) fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

impl LiveTarget {
    /// Understands the target of a line.
    pub(super) fn of(line: &LiveLine) -> Self {
        let words: Vec<_> = line.parameters.split(' ').collect();
        let known = match (line.kind.as_str(), &words[..]) {
            ("zero", _) => Some(Self::Zero),
            ("error", _) => Some(Self::Error),
            ("linear", [device, offset]) => parse_number(device)
                .zip(offset.parse().ok())
                .map(|(device, offset)| Self::Linear { device, offset }),
            // One that an earlier imgdm attached has `P`.
            ("snapshot", [origin, cow, "P" | "PO", _chunk]) => parse_number(origin)
                .zip(parse_number(cow))
                .map(|(origin, cow)| Self::Snapshot(LiveSnapshot { origin, cow })),
            // Options change what is read: a crypt target with any is not ours.
            ("crypt", [cipher, key, iv_offset, device, start]) => {
                let crypt = || {
                    Some(LiveCrypt {
                        cipher: (*cipher).to_owned(),
                        key: (*key).to_owned(),
                        iv_offset: iv_offset.parse().ok()?,
                        device: parse_number(device)?,
                        start: start.parse().ok()?,
                    })
                };
                crypt().map(|crypt| Self::Crypt(Rc::new(crypt)))
            }
            _ => None,
        };
        known.unwrap_or_else(|| {
            Self::Other(printable(&format!("{} {}", line.kind, line.parameters)))
        })
    }
}

/// A live line, understood; sectors.
#[derive(Clone, Debug)]
struct Line {
    start: u64,
    end: u64,
    target: LiveTarget,
}

impl Line {
    fn of(line: &LiveLine) -> Self {
        let end = line.start.saturating_add(line.length);
        Self { start: line.start, end, target: LiveTarget::of(line) }
    }
}

/// Where the bytes of a stretch of a device come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LiveBytes {
    /// dm-zero.
    Zero,
    /// Reading fails: dm-error.
    Error,
    /// A device that is none of the attachment's inner ones, from this byte on.
    Device {
        /// The device.
        number: DeviceNumber,
        /// Bytes from its start.
        offset: u64,
    },
    /// There is no table, or one that imgdm does not load; in words.
    Unknown(String),
}

/// A stretch of a device that is served in one way.
#[derive(Clone, Debug)]
pub(super) struct LiveRun {
    /// Bytes of it from where it was asked for; never 0.
    pub(super) length: u64,
    /// Where they come from.
    pub(super) bytes: LiveBytes,
    /// The crypt target that decrypts them, and the IV of the first sector.
    pub(super) crypt: Option<(Rc<LiveCrypt>, u64)>,
}

/// The device that a person gets, looked through down to loop devices. Memory does not
/// grow with the tables but for the kernel's own answers, of which few are held at a time.
pub(super) struct LiveDisk<'k, K> {
    kernel: &'k K,
    top: DeviceNumber,
    /// UUIDs of the devices that are looked through, the top one too.
    uuids: BTreeMap<DeviceNumber, String>,
    tables: BTreeMap<DeviceNumber, OpenTable>,
    /// Counts the uses of tables.
    clock: u64,
}

/// A table that was asked for.
struct OpenTable {
    lines: Lines,
    used: u64,
}

enum Lines {
    /// All there are.
    Kept(Vec<Line>),
    /// Read in order, and anew where an earlier one is asked for.
    Read { current: Option<Line>, rest: Box<dyn Iterator<Item = Line>> },
}

impl<'k, K: Kernel> LiveDisk<'k, K> {
    /// Looks through `top` and these devices inside.
    pub(super) fn new(
        kernel: &'k K,
        top: (DeviceNumber, String),
        inner: impl Iterator<Item = (DeviceNumber, String)>,
    ) -> Self {
        let number = top.0;
        let uuids = inner.chain([top]).collect();
        Self { kernel, top: number, uuids, tables: BTreeMap::new(), clock: 0 }
    }

    /// What serves the disk from this sector on.
    ///
    /// # Errors
    /// The kernel does not give a table.
    pub(super) fn at(&mut self, sector: u64) -> Result<LiveRun> {
        let (mut device, mut at) = (self.top, sector);
        let (mut length, mut crypt) = (u64::MAX / SECTOR_SIZE, None);
        for _ in 0..MAX_DEPTH {
            let line = match self.uuids.get(&device).cloned() {
                Some(uuid) => self.line(device, &uuid, at)?,
                None => {
                    let bytes = match at.checked_mul(SECTOR_SIZE) {
                        Some(offset) => LiveBytes::Device { number: device, offset },
                        None => LiveBytes::Unknown("a sector past 2^64 bytes".to_owned()),
                    };
                    return Ok(LiveRun { length: length * SECTOR_SIZE, bytes, crypt });
                }
            };
            let Some(line) = line else {
                let bytes = LiveBytes::Unknown("nothing: the table ends before".to_owned());
                return Ok(LiveRun { length: length * SECTOR_SIZE, bytes, crypt });
            };
            let within = at - line.start;
            length = length.min(line.end - at);
            let bytes = match line.target {
                LiveTarget::Linear { device: below, offset } => {
                    (device, at) = (below, offset.saturating_add(within));
                    continue;
                }
                LiveTarget::Crypt(below) if crypt.is_none() => {
                    (device, at) = (below.device, below.start.saturating_add(within));
                    let iv = below.iv_offset.saturating_add(within);
                    crypt = Some((below, iv));
                    continue;
                }
                LiveTarget::Crypt(_) => LiveBytes::Unknown("two crypt targets".to_owned()),
                LiveTarget::Snapshot(_) => LiveBytes::Unknown("a snapshot target".to_owned()),
                LiveTarget::Zero => LiveBytes::Zero,
                LiveTarget::Error => LiveBytes::Error,
                LiveTarget::Other(text) => LiveBytes::Unknown(format!("the target '{text}'")),
            };
            return Ok(LiveRun { length: length * SECTOR_SIZE, bytes, crypt });
        }
        let bytes = LiveBytes::Unknown("devices over devices without end".to_owned());
        Ok(LiveRun { length: length * SECTOR_SIZE, bytes, crypt })
    }

    /// The line of a device's table that has this sector.
    fn line(&mut self, device: DeviceNumber, uuid: &str, sector: u64) -> Result<Option<Line>> {
        self.clock += 1;
        let again = self.tables.get(&device).is_none_or(|table| table.lines.is_past(sector));
        if again {
            self.tables.remove(&device);
            let lines = self.open(uuid)?;
            self.make_room(&lines);
            self.tables.insert(device, OpenTable { lines, used: 0 });
        }
        let Some(table) = self.tables.get_mut(&device) else { return Ok(None) };
        table.used = self.clock;
        Ok(table.lines.with(sector))
    }

    fn open(&self, uuid: &str) -> Result<Lines> {
        let mut live = self.kernel.live_table(uuid)?.map(|line| Line::of(&line));
        let mut first: Vec<_> = live.by_ref().take(KEPT_LINES + 1).collect();
        if first.len() <= KEPT_LINES {
            first.shrink_to_fit();
            return Ok(Lines::Kept(first));
        }
        Ok(Lines::Read { current: None, rest: Box::new(first.into_iter().chain(live)) })
    }

    /// Closes the table that was not used for longest, where too many long ones are open.
    fn make_room(&mut self, for_lines: &Lines) {
        let is_long = |lines: &Lines| matches!(lines, Lines::Read { .. });
        let long = self.tables.iter().filter(|(_, table)| is_long(&table.lines));
        if is_long(for_lines)
            && long.clone().count() >= READ_TABLES
            && let Some((&oldest, _)) = long.min_by_key(|(_, table)| table.used)
        {
            self.tables.remove(&oldest);
        }
    }
}

impl Lines {
    /// True where the lines have to be read anew to get back to the sector.
    fn is_past(&self, sector: u64) -> bool {
        match self {
            Self::Kept(_) => false,
            Self::Read { current, .. } => current.as_ref().is_some_and(|line| sector < line.start),
        }
    }

    /// The line that has the sector.
    fn with(&mut self, sector: u64) -> Option<Line> {
        let line = match self {
            Self::Kept(lines) => {
                lines.get(lines.partition_point(|line| line.end <= sector)).cloned()
            }
            Self::Read { current, rest } => {
                while current.as_ref().is_none_or(|line| line.end <= sector) {
                    *current = Some(rest.next()?);
                }
                current.clone()
            }
        };
        line.filter(|line| line.start <= sector && sector < line.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::fake::{FakeDevice, FakeKernel};

    fn target(kind: &str, parameters: &str) -> LiveTarget {
        let (kind, parameters) = (kind.to_owned(), parameters.to_owned());
        LiveTarget::of(&LiveLine { start: 0, length: 1, kind, parameters })
    }

    #[test]
    fn lines_are_understood_or_called_by_their_words() {
        let device = DeviceNumber { major: 7, minor: 3 };
        assert_eq!(target("linear", "7:3 80"), LiveTarget::Linear { device, offset: 80 });
        assert_eq!(target("zero", ""), LiveTarget::Zero);
        let LiveTarget::Crypt(crypt) = target("crypt", "aes-xts-plain64 - 5 7:3 6") else {
            panic!("a crypt target")
        };
        assert_eq!((crypt.iv_offset, crypt.start, crypt.device), (5, 6, device));
        for (kind, parameters) in [
            ("linear", "7:3"),
            ("linear", "/dev/x 0"),
            ("crypt", "aes-xts-plain64 - 0 7:3 0 1 sector_size:4096"),
            ("striped", "2 128 7:3 0 7:4 0"),
        ] {
            let other = LiveTarget::Other(format!("{kind} {parameters}"));
            assert_eq!(target(kind, parameters), other);
        }
    }
    #[test]
    fn long_tables_are_read_in_order_and_anew() {
        let kernel = FakeKernel::new();
        let lines = 3 * KEPT_LINES as u64;
        let mut top = vec![format!("0 {} linear 253:1 8", 8 * lines - 8)];
        top.push(format!("{} 8 linear 7:1 4", 8 * lines - 8));
        let inner = (0..lines).map(|n| format!("{} 8 linear 7:0 {}", 8 * n, 100 + 16 * n));
        for (minor, table) in [(0, top), (1, inner.collect())] {
            let live = Some(table.iter().map(|line| line.parse().unwrap()).collect());
            let device = FakeDevice { uuid: minor.to_string(), live, ..FakeDevice::default() };
            kernel.change(|state| state.devices.insert(minor, device));
        }
        let dm = |minor| (DeviceNumber { major: 253, minor }, minor.to_string());
        let mut disk = LiveDisk::new(&kernel, dm(0), std::iter::once(dm(1)));
        let last = 8 * lines - 16;
        for sector in [0, 1, 9, 8 * 5000, last, 3, 8 * 5000 + 7, last + 7] {
            let run = disk.at(sector).unwrap();
            let (line, within) = ((sector + 8) / 8, (sector + 8) % 8);
            let number = DeviceNumber { major: 7, minor: 0 };
            let offset = (100 + 16 * line + within) * SECTOR_SIZE;
            assert_eq!(run.bytes, LiveBytes::Device { number, offset }, "{sector}");
            assert_eq!(run.length, (8 - within) * SECTOR_SIZE);
        }
        let number = DeviceNumber { major: 7, minor: 1 };
        assert_eq!(disk.at(last + 9).unwrap().bytes, LiveBytes::Device { number, offset: 5 * 512 });
        assert!(matches!(disk.at(8 * lines).unwrap().bytes, LiveBytes::Unknown(_)));
    }

    #[test]
    fn a_table_over_itself_ends() {
        let kernel = FakeKernel::new();
        let live = Some(vec!["0 8 linear 253:0 0".parse().unwrap()]);
        let device = FakeDevice { uuid: "0".to_owned(), live, ..FakeDevice::default() };
        kernel.change(|state| state.devices.insert(0, device));
        let top = (DeviceNumber { major: 253, minor: 0 }, "0".to_owned());
        let mut disk = LiveDisk::new(&kernel, top, std::iter::empty());
        assert!(matches!(disk.at(0).unwrap().bytes, LiveBytes::Unknown(_)));
    }
}
