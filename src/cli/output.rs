//! What the commands print, human and JSON.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use imgdm::error::printable;

/// How a command prints facts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// A path for people: control characters escaped.
pub(crate) fn show_path(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// A path in JSON: `path`, and `path_bytes` in hex where that is not the whole truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JsonPath {
    path: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
}

impl From<&Path> for JsonPath {
    fn from(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let path_bytes = path
            .to_str()
            .is_none()
            .then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        Self { path: path.to_string_lossy().into_owned(), path_bytes }
    }
}

impl JsonPath {
    /// The path for people.
    pub(crate) fn shown(&self) -> String {
        printable(&self.path)
    }

    /// The path itself.
    #[cfg_attr(not(feature = "device"), allow(dead_code, reason = "records are of devices"))]
    pub(crate) fn to_path(&self) -> PathBuf {
        let byte = |at| self.path_bytes.as_ref().and_then(|hex| hex.get(at..at + 2));
        let length = self.path_bytes.as_ref().map_or(0, String::len);
        let bytes: Option<Vec<u8>> =
            (0..length).step_by(2).map(|at| u8::from_str_radix(byte(at)?, 16).ok()).collect();
        match bytes {
            Some(bytes) if length > 0 => OsString::from_vec(bytes).into(),
            _ => PathBuf::from(&self.path),
        }
    }
}

/// A size as QEMU prints it for people (size_to_str() in its util/cutils.c): three digits,
/// and the next unit from 1000 on.
pub(crate) fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let bytes = bytes as f64;
    let mut unit = 0;
    let mut divisor = 1.0;
    while unit + 1 < UNITS.len() && bytes / divisor >= 1000.0 {
        unit += 1;
        divisor *= 1024.0;
    }
    format!("{} {}B", three_digits(bytes / divisor), UNITS[unit])
}

/// `%.3g` of the C library, for 0 and for numbers from 0.9 on.
fn three_digits(number: f64) -> String {
    let scientific = format!("{number:.2e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let trimmed = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    match exponent.parse() {
        Ok(exponent @ 3usize..) => format!("{}e+{exponent:02}", trimmed(digits)),
        Ok(exponent) => trimmed(&format!("{number:.*}", 2 - exponent)),
        // Less than 1: 0.977 and the like.
        Err(_) => trimmed(&format!("{number:.3}")),
    }
}

/// Seconds since 1970 in the time zone of the user (TZ, or else the machine's), as QEMU
/// prints them.
pub(crate) fn local_time(seconds: i64) -> String {
    let Ok(time) = jiff::Timestamp::from_second(seconds) else { return seconds.to_string() };
    time_zone().to_datetime(time).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Finds out about the user's time zone while files can be opened.
#[cfg(feature = "sandbox")]
pub(crate) fn keep_time_zone() {
    time_zone();
}

fn time_zone() -> &'static jiff::tz::TimeZone {
    static ZONE: OnceLock<jiff::tz::TimeZone> = OnceLock::new();
    ZONE.get_or_init(jiff::tz::TimeZone::system)
}

/// Stdout without the line buffering of [`std::io::Stdout`]: a map has millions of lines.
pub(crate) fn stdout() -> io::Result<io::BufWriter<File>> {
    let fd = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(io::BufWriter::with_capacity(256 << 10, File::from(fd)))
}

/// Prints a value as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = stdout()?;
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_read_back_from_json() {
        for bytes in [&b"/a/b"[..], b"/a\xff\n", "/\u{e9}".as_bytes()] {
            let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
            let json = serde_json::to_string(&JsonPath::from(path.as_path())).unwrap();
            let read: JsonPath = serde_json::from_str(&json).unwrap();
            assert_eq!(read.to_path(), path);
        }
        let strange = r#"{"path": "/x", "path_bytes": "zz"}"#;
        assert_eq!(serde_json::from_str::<JsonPath>(strange).unwrap().to_path(), Path::new("/x"));
    }

    #[test]
    fn sizes_are_printed_as_by_qemu() {
        // Each as `qemu-img info` prints it for a raw file of that size.
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (196_608, "192 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }
}
