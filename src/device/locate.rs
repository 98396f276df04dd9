//! Which live table lines serve one sector of an attachment, from the top device down to
//! a loop device.

use super::list::Attached;
use super::live::parse_number;
use super::{DeviceId, DeviceNumber, Kernel, LiveLine, LoopInfo};
use crate::error::{Error, ErrorKind, Result, printable};

/// Devices that are stacked at most: an attachment has top, inner, crypt, inner, crypt's
/// ciphertext, and what that lies on.
const MAX_STACKED: usize = 16;

/// A device-mapper device on the way, and its line that serves the sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServedBy {
    /// The device's name.
    pub name: String,
    /// Its numbers.
    pub number: DeviceNumber,
    /// The sector on this device.
    pub sector: u64,
    /// The line; a key that is not in the kernel's keyring comes as `-`.
    pub line: LiveLine,
}

/// Where the way ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServedEnd {
    /// At a target that needs no device: `zero` or `error`.
    Target,
    /// At a sector of a loop device.
    Loop {
        /// The loop device.
        number: DeviceNumber,
        /// What it is bound to.
        info: LoopInfo,
        /// The sector on it, and so of its file.
        sector: u64,
    },
    /// At a sector of another block device (`--direct-block`).
    BlockDevice {
        /// The device.
        number: DeviceNumber,
        /// The sector on it.
        sector: u64,
    },
}

/// The way of one sector through an attachment's live tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// The devices, the top one first.
    pub devices: Vec<ServedBy>,
    /// Where it ends.
    pub end: ServedEnd,
}

/// Follows `sector` of an attachment down through the live tables.
///
/// # Errors
/// What the system says; a table that has no line for the sector, or one of a kind that
/// imgdm does not load.
pub fn locate<K: Kernel>(kernel: &K, attached: &Attached, sector: u64) -> Result<Located> {
    let mut devices = Vec::new();
    let mut next = (attached.number, sector);
    while devices.len() < MAX_STACKED {
        let (number, sector) = next;
        let Some(device) = kernel.device(DeviceId::Number(number))? else {
            return Ok(Located { devices, end: end(kernel, number, sector)? });
        };
        let strange = |what: &str| {
            Error::new(ErrorKind::Unsupported(format!(
                "the live table of {} {what} sector {sector}",
                printable(&device.name)
            )))
        };
        let line = kernel
            .live_table(&device.uuid)?
            .find(|line| line.start.checked_add(line.length).is_some_and(|end| sector < end))
            .filter(|line| line.start <= sector)
            .ok_or_else(|| strange("has no line for"))?;
        let inside = sector - line.start;
        let below = below(&line, inside);
        let kind = line.kind.clone();
        devices.push(ServedBy {
            name: device.name.clone(),
            number,
            sector,
            line: without_key(line),
        });
        match below {
            Some(below) => next = below,
            None if kind == "zero" || kind == "error" => {
                return Ok(Located { devices, end: ServedEnd::Target });
            }
            None => return Err(strange("has a line that imgdm does not know for")),
        }
    }
    Err(Error::new(ErrorKind::Unsupported("too many devices lie on each other".to_owned())))
}

/// The device below a line and the sector on it, `inside` sectors into the line.
fn below(line: &LiveLine, inside: u64) -> Option<(DeviceNumber, u64)> {
    let words: Vec<&str> = line.parameters.split(' ').collect();
    let (device, offset) = match (line.kind.as_str(), &words[..]) {
        ("linear", [device, offset]) => (device, offset),
        // CIPHER KEY IV_OFFSET DEVICE OFFSET [options]
        ("crypt", [_, _, _, device, offset, ..]) => (device, offset),
        // Where nothing was written: where something was, it is in the store.
        ("snapshot", [origin, _cow, "P" | "PO", _chunk]) => {
            return Some((parse_number(origin)?, line.start.checked_add(inside)?));
        }
        _ => return None,
    };
    Some((parse_number(device)?, offset.parse::<u64>().ok()?.checked_add(inside)?))
}

/// The line with no key in it but a description.
fn without_key(mut line: LiveLine) -> LiveLine {
    if line.kind == "crypt" {
        let mut words: Vec<&str> = line.parameters.split(' ').collect();
        if let Some(key) = words.get_mut(1)
            && !key.starts_with(':')
        {
            *key = "-";
        }
        line.parameters = words.join(" ");
    }
    line
}

fn end<K: Kernel>(kernel: &K, number: DeviceNumber, sector: u64) -> Result<ServedEnd> {
    Ok(match kernel.loop_info(number)?.filter(|info| info.role().is_some()) {
        Some(info) => ServedEnd::Loop { number, info, sector },
        None => ServedEnd::BlockDevice { number, sector },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(kind: &str, parameters: &str) -> LiveLine {
        LiveLine { start: 8, length: 8, kind: kind.to_owned(), parameters: parameters.to_owned() }
    }

    #[test]
    fn linear_and_crypt_lines_lead_on() {
        let number = DeviceNumber { major: 7, minor: 3 };
        assert_eq!(below(&line("linear", "7:3 100"), 5), Some((number, 105)));
        let crypt = line("crypt", "aes-xts-plain64 :64:logon:x 0 7:3 0");
        assert_eq!(below(&crypt, 5), Some((number, 5)));
        for store in ["P", "PO"] {
            let snapshot = line("snapshot", &format!("7:3 7:4 {store} 32"));
            assert_eq!(below(&snapshot, 5), Some((number, 13)));
        }
        assert_eq!(below(&line("zero", ""), 5), None);
        assert_eq!(below(&line("linear", "7:3 18446744073709551615"), 1), None);
        assert_eq!(below(&line("striped", "2 8 7:3 0 7:4 0"), 5), None);
    }

    #[test]
    fn no_key_is_shown() {
        let shown = |key: &str| {
            without_key(line("crypt", &format!("aes-cbc-plain64 {key} 0 7:3 0"))).parameters
        };
        assert_eq!(shown("00112233"), "aes-cbc-plain64 - 0 7:3 0");
        assert_eq!(shown(":16:logon:imgdm"), "aes-cbc-plain64 :16:logon:imgdm 0 7:3 0");
    }
}
