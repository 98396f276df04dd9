//! Device-mapper tables as text: prints and parses `dmsetup table` lines.

use std::fmt;
use std::str::FromStr;

use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};
use crate::units::Sectors;

/// A device as a table line names it: `MAJOR:MINOR`, a path, or `@N` for a backing
/// that has no device yet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceRef(String);

impl DeviceRef {
    /// Wraps a device's name.
    ///
    /// # Errors
    /// Empty, or with white space in it: a table line could not be split again.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(Error::new(ErrorKind::Usage(format!(
                "'{}' can't stand for a device in a table",
                name.escape_debug()
            ))));
        }
        Ok(Self(name))
    }

    /// A device by its numbers.
    pub fn from_numbers(major: u32, minor: u32) -> Self {
        Self(format!("{major}:{minor}"))
    }

    /// The name as it stands in a table line.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A key of dm-crypt, as its table line takes it.
#[derive(Clone, PartialEq, Eq)]
pub enum CryptKey {
    /// In the kernel's keyring: `:SIZE:logon:DESCRIPTION`.
    Keyring {
        /// Bytes of the key.
        size: usize,
        /// By which description the kernel finds it; no white space.
        description: String,
    },
    /// The key itself. It is never printed: only the device side takes it out.
    Raw(Zeroizing<Vec<u8>>),
}

impl fmt::Debug for CryptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CryptKey({self})")
    }
}

impl fmt::Display for CryptKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keyring { size, description } => write!(f, ":{size}:logon:{description}"),
            Self::Raw(_) => f.write_str("-"),
        }
    }
}

impl FromStr for CryptKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (size, rest) = text.strip_prefix(':')?.split_once(':')?;
            let description = rest.strip_prefix("logon:")?;
            Some(Self::Keyring { size: size.parse().ok()?, description: description.to_owned() })
        };
        // What it is is not said: it may be a key.
        parse().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported("a key that is not in the kernel's keyring".into()))
        })
    }
}

/// What becomes of dm-snapshot's persistent store when it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// `P`: it is given up with all that is in it, reads and writes fail.
    GiveUp,
    /// `PO`: writes fail from then on, reads go on, and what is in it stays (Linux 4.3).
    FailWrites,
}

impl fmt::Display for WhenFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GiveUp => "P",
            Self::FailWrites => "PO",
        })
    }
}

impl FromStr for WhenFull {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "P" => Ok(Self::GiveUp),
            "PO" => Ok(Self::FailWrites),
            _ => Err(Error::new(ErrorKind::Unsupported(format!(
                "'{}' is no persistent store of dm-snapshot",
                text.escape_debug()
            )))),
        }
    }
}

/// A device-mapper target with its parameters
/// (kernel: Documentation/admin-guide/device-mapper/).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `linear DEVICE OFFSET`.
    Linear {
        /// The device below.
        device: DeviceRef,
        /// Where on it the segment starts.
        offset: Sectors,
    },
    /// `zero`.
    Zero,
    /// `error`.
    Error,
    /// `striped COUNT CHUNK DEVICE OFFSET...`: chunks from each place in turn, all of them on
    /// one device.
    Striped {
        /// Length of a chunk.
        chunk: Sectors,
        /// The device below.
        device: DeviceRef,
        /// Where on it each stripe starts.
        offsets: Vec<Sectors>,
    },
    /// `crypt CIPHER KEY 0 DEVICE 0`: the IV is the sector's number on the device below.
    Crypt {
        /// The cipher, mode and IV generator: `aes-xts-plain64`.
        cipher: String,
        /// The key.
        key: CryptKey,
        /// The device with the ciphertext.
        device: DeviceRef,
    },
    /// `snapshot ORIGIN COW PO CHUNK`, or `P`: what was written lies in a persistent exception
    /// store.
    Snapshot {
        /// The device that is never written.
        origin: DeviceRef,
        /// The device of the exception store.
        cow: DeviceRef,
        /// What becomes of a store that is full.
        when_full: WhenFull,
        /// Size of a chunk.
        chunk: Sectors,
    },
}

impl Target {
    /// The target's type as the kernel knows it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Linear { .. } => "linear",
            Self::Striped { .. } => "striped",
            Self::Zero => "zero",
            Self::Error => "error",
            Self::Crypt { .. } => "crypt",
            Self::Snapshot { .. } => "snapshot",
        }
    }

    /// The parameters after the type; empty where the target has none. A raw key is not
    /// among them.
    pub fn parameters(&self) -> String {
        match self {
            Self::Linear { device, offset } => format!("{device} {offset}"),
            Self::Striped { chunk, device, offsets } => {
                let stripes: String =
                    offsets.iter().map(|offset| format!(" {device} {offset}")).collect();
                format!("{} {chunk}{stripes}", offsets.len())
            }
            Self::Zero | Self::Error => String::new(),
            Self::Crypt { cipher, key, device } => format!("{cipher} {key} 0 {device} 0"),
            Self::Snapshot { origin, cow, when_full, chunk } => {
                format!("{origin} {cow} {when_full} {chunk}")
            }
        }
    }

    /// The device below, where there is one; of a snapshot the origin.
    pub fn device(&self) -> Option<&DeviceRef> {
        match self {
            Self::Linear { device, .. }
            | Self::Striped { device, .. }
            | Self::Crypt { device, .. }
            | Self::Snapshot { origin: device, .. } => Some(device),
            Self::Zero | Self::Error => None,
        }
    }

    /// All devices below.
    pub fn devices(&self) -> impl Iterator<Item = &DeviceRef> {
        let cow = match self {
            Self::Snapshot { cow, .. } => Some(cow),
            _ => None,
        };
        self.device().into_iter().chain(cow)
    }
}

/// One line of a table: `START LENGTH TARGET PARAMETERS`, in sectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableLine {
    /// First sector.
    pub start: Sectors,
    /// Length, never 0.
    pub length: Sectors,
    /// What serves it.
    pub target: Target,
}

impl fmt::Display for TableLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.start, self.length, self.target.kind())?;
        match &self.target {
            Target::Linear { device, offset } => write!(f, " {device} {offset}"),
            Target::Striped { .. } | Target::Crypt { .. } | Target::Snapshot { .. } => {
                write!(f, " {}", self.target.parameters())
            }
            Target::Zero | Target::Error => Ok(()),
        }
    }
}

impl FromStr for TableLine {
    type Err = Error;

    fn from_str(line: &str) -> Result<Self> {
        let bad = |what: &str| {
            Error::new(ErrorKind::Unsupported(format!(
                "the table line '{}' {what}",
                line.escape_debug()
            )))
        };
        let number = |word: Option<&str>| {
            word.and_then(|w| w.parse().ok())
                .map(Sectors::new)
                .ok_or_else(|| bad("has no number of sectors where one belongs"))
        };
        let mut words = line.split_ascii_whitespace();
        let start = number(words.next())?;
        let length = number(words.next())?;
        let target = match words.next() {
            Some("linear") => {
                let device = words.next().ok_or_else(|| bad("names no device"))?;
                Target::Linear { device: DeviceRef::new(device)?, offset: number(words.next())? }
            }
            Some("striped") => striped_target(&mut words)
                .ok_or_else(|| bad("has no stripes that are all on one device"))?,
            Some("zero") => Target::Zero,
            Some("error") => Target::Error,
            // The line is not quoted: there may be a key in it.
            Some("crypt") => crypt_target(&mut words).ok_or_else(|| {
                Error::new(ErrorKind::Unsupported("a crypt line that is none of imgdm's".into()))
            })?,
            Some("snapshot") => snapshot_target(&mut words)
                .ok_or_else(|| bad("has no origin and no persistent store"))?,
            _ => {
                return Err(bad(
                    "has no target that imgdm knows (linear, striped, zero, error, crypt, snapshot)",
                ));
            }
        };
        if words.next().is_some() {
            return Err(bad("has words too many"));
        }
        Ok(Self { start, length, target })
    }
}

/// `COUNT CHUNK DEVICE OFFSET...`.
fn striped_target<'w>(words: &mut impl Iterator<Item = &'w str>) -> Option<Target> {
    let count: usize = words.next()?.parse().ok()?;
    let chunk = Sectors::new(words.next()?.parse().ok()?);
    let mut device = None;
    let mut offsets = Vec::new();
    for _ in 0..count {
        let below = DeviceRef::new(words.next()?).ok()?;
        if *device.get_or_insert_with(|| below.clone()) != below {
            return None;
        }
        offsets.push(Sectors::new(words.next()?.parse().ok()?));
    }
    Some(Target::Striped { chunk, device: device?, offsets })
}

/// `CIPHER KEY 0 DEVICE 0`.
fn crypt_target<'w>(words: &mut impl Iterator<Item = &'w str>) -> Option<Target> {
    let (cipher, key, iv) = (words.next()?.to_owned(), words.next()?.parse().ok()?, words.next()?);
    let (device, offset) = (DeviceRef::new(words.next()?).ok()?, words.next()?);
    (iv == "0" && offset == "0").then_some(Target::Crypt { cipher, key, device })
}

/// `ORIGIN COW PO CHUNK`, or `P`.
fn snapshot_target<'w>(words: &mut impl Iterator<Item = &'w str>) -> Option<Target> {
    let origin = DeviceRef::new(words.next()?).ok()?;
    let cow = DeviceRef::new(words.next()?).ok()?;
    let when_full = words.next()?.parse().ok()?;
    let chunk = Sectors::new(words.next()?.parse().ok()?);
    Some(Target::Snapshot { origin, cow, when_full, chunk })
}

/// A whole table: lines without gap from sector 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    lines: Vec<TableLine>,
}

impl Table {
    /// Checks the lines as the kernel would, which itself says no more than EINVAL.
    ///
    /// # Errors
    /// A gap, an overlap, an empty line or a size past 2^64 sectors.
    pub fn new(lines: Vec<TableLine>) -> Result<Self> {
        let mut end = 0u64;
        for line in &lines {
            let wrong = |what| {
                Error::new(ErrorKind::NotRepresentable(format!("table line '{line}': {what}")))
            };
            if line.start.get() != end {
                return Err(wrong(format!("should start at sector {end}")));
            }
            if line.length.get() == 0 {
                return Err(wrong("is empty".to_owned()));
            }
            end = end
                .checked_add(line.length.get())
                .ok_or_else(|| wrong("ends past 2^64 sectors".to_owned()))?;
        }
        Ok(Self { lines })
    }

    /// The lines.
    pub fn lines(&self) -> &[TableLine] {
        &self.lines
    }

    /// Size of the device.
    pub fn size(&self) -> Sectors {
        self.lines
            .last()
            .map_or(Sectors::default(), |l| Sectors::new(l.start.get() + l.length.get()))
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

impl FromStr for Table {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text.lines().map(str::parse).collect::<Result<_>>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_reads_back_what_it_prints() {
        let text = "0 8 linear 7:0 2048\n8 16 zero\n24 8 linear /dev/loop1 0\n\
            32 8 error\n40 8 crypt aes-xts-plain64 :64:logon:imgdm:x 0 7:1 0\n\
            48 16 striped 2 8 253:0 0 253:0 2048\n64 8 snapshot 253:1 7:2 P 32\n\
            72 8 snapshot 253:1 7:2 PO 32\n";
        let table: Table = text.parse().unwrap();
        assert_eq!(table.to_string(), text);
        assert_eq!(table.size(), Sectors::new(80));
    }

    #[test]
    fn a_key_is_neither_printed_nor_quoted() {
        let key = CryptKey::Raw(Zeroizing::new(b"secret".to_vec()));
        assert_eq!(format!("{key} {key:?}"), "- CryptKey(-)");
        let error = "0 8 crypt aes-xts-plain64 736563726574 0 7:1 0".parse::<TableLine>();
        assert!(!error.unwrap_err().to_string().contains("736563726574"));
    }

    #[test]
    fn a_gap_is_refused_with_the_line() {
        let error = "0 8 zero\n9 1 zero\n".parse::<Table>().unwrap_err();
        assert!(error.to_string().contains("'9 1 zero': should start at sector 8"), "{error}");
    }

    #[test]
    fn garbage_lines_are_refused() {
        for line in [
            "",
            "0",
            "0 8",
            "0 8 crypt x",
            "0 8 linear",
            "0 8 linear 7:0",
            "0 8 zero x",
            "0 8 striped 0 8",
            "0 8 striped 2 8 7:0 0",
            "0 8 striped 2 8 7:0 0 7:1 0",
            "0 8 striped 1 8 7:0 0 7:0 0",
            "0 8 snapshot 7:0 7:1 N 32",
            "0 8 snapshot 7:0 7:1 PX 32",
            "0 8 snapshot 7:0 7:1 P",
            "0 8 snapshot 7:0 7:1 P 32 1 discard_zeroes_cow",
            "0 8 striped 99999999999999999999 8 7:0 0",
        ] {
            assert!(line.parse::<TableLine>().is_err(), "{line}");
        }
    }
}
