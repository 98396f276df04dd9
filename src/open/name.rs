//! Backing file names as QEMU writes them: paths, `file:`, and `json:{...}`.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result, printable};

/// Where a name leads: a local path, and the driver that the name itself demands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalName {
    /// The path, as it is written.
    pub path: PathBuf,
    /// The format driver, where the name is `json:` and says one.
    pub driver: Option<String>,
}

/// Options of a `json:` name that change nothing of what is read.
const HARMLESS_OPTIONS: [&str; 11] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "force-share",
    "locking",
    "aio",
    "discard",
    "detect-zeroes",
    "cache",
    "cache.direct",
    "cache.no-flush",
];

fn refuse(name: &[u8], why: &str) -> Error {
    Error::new(ErrorKind::Unsupported(format!(
        "the name '{}' {why}",
        printable(&String::from_utf8_lossy(name))
    )))
}

impl LocalName {
    /// Understands a name that an image stores, or a user gives.
    ///
    /// # Errors
    /// `Unsupported` for a protocol other than `file:` (nbd:, http: ...) and for `json:`
    /// options that imgdm does not understand.
    pub fn parse(name: &[u8]) -> Result<Self> {
        if let Some(json) = name.strip_prefix(b"json:") {
            return parse_json(name, json);
        }
        let name = match protocol(name) {
            None => name,
            Some(b"file") => &name[b"file:".len()..],
            Some(protocol) => {
                let protocol = String::from_utf8_lossy(protocol);
                return Err(refuse(
                    name,
                    &format!(
                        "is not a local file: imgdm does not read by the protocol '{protocol}'"
                    ),
                ));
            }
        };
        Ok(Self { path: PathBuf::from(OsStr::from_bytes(name)), driver: None })
    }
}

/// `name` seen from the directory of `image`, as QEMU's path_combine() writes it; an
/// absolute name stays as it is.
pub fn resolve_beside(image: &Path, name: &Path) -> PathBuf {
    if name.is_absolute() {
        return name.to_owned();
    }
    let image = image.as_os_str().as_bytes();
    let directory = image.iter().rposition(|&b| b == b'/').map_or(0, |slash| slash + 1);
    let mut path = image[..directory].to_vec();
    path.extend_from_slice(name.as_os_str().as_bytes());
    PathBuf::from(std::ffi::OsString::from_vec(path))
}

/// A backing file's name seen from where `overlay` is, as QEMU prints it
/// (bdrv_get_full_backing_filename()): one with a protocol or `json:` stays as it is.
pub(crate) fn full_backing_name(overlay: &Path, name: &[u8]) -> Vec<u8> {
    if protocol(name).is_some() {
        return name.to_vec();
    }
    resolve_beside(overlay, Path::new(OsStr::from_bytes(name))).into_os_string().into_vec()
}

/// What stands before a colon that comes before any slash (QEMU's path_has_protocol()).
fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|&b| b == b':' || b == b'/')?;
    (name[end] == b':').then(|| &name[..end])
}

fn parse_json(name: &[u8], json: &[u8]) -> Result<LocalName> {
    let options: Map<String, Value> = serde_json::from_slice(json)
        .map_err(|error| refuse(name, &format!("is no JSON object: {error}")))?;
    let mut flat = Vec::new();
    flatten("", options, &mut flat);
    let (mut driver, mut file_driver) = (None, None);
    let (mut filename, mut file_filename) = (None, None);
    for (key, value) in flat {
        let slot = match key.as_str() {
            "driver" => &mut driver,
            "filename" => &mut filename,
            "file.driver" => &mut file_driver,
            "file.filename" => &mut file_filename,
            other => {
                if HARMLESS_OPTIONS.contains(&other.strip_prefix("file.").unwrap_or(other)) {
                    continue;
                }
                return Err(refuse(
                    name,
                    &format!(
                        "has the option '{}', which imgdm does not understand",
                        printable(other)
                    ),
                ));
            }
        };
        match value {
            Value::String(text) => *slot = Some(text),
            _ => return Err(refuse(name, &format!("has no text as the option '{key}'"))),
        }
    }
    for path in [&filename, &file_filename].into_iter().flatten() {
        if path.contains('\0') {
            return Err(refuse(name, "has a NUL in its file name"));
        }
    }
    let is_local = |driver: &str| matches!(driver, "file" | "host_device");
    if let Some(path) = file_filename {
        if let Some(other) = file_driver.filter(|driver| !is_local(driver)) {
            return Err(refuse(
                name,
                &format!("is not a local file: its protocol driver is '{}'", printable(&other)),
            ));
        }
        return Ok(LocalName { path: path.into(), driver });
    }
    match (filename, driver) {
        (Some(path), Some(driver)) if is_local(&driver) => {
            Ok(LocalName { path: path.into(), driver: Some("raw".to_owned()) })
        }
        (_, Some(driver)) => Err(refuse(
            name,
            &format!("does not lead to a local file (driver '{}')", printable(&driver)),
        )),
        _ => Err(refuse(name, "does not lead to a local file")),
    }
}

/// Nested objects to dotted keys. serde_json bounds the depth at 128.
fn flatten(prefix: &str, options: Map<String, Value>, flat: &mut Vec<(String, Value)>) {
    for (key, value) in options {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) => flatten(&format!("{key}."), inner, flat),
            value => flat.push((key, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<(String, Option<String>)> {
        let name = LocalName::parse(name.as_bytes())?;
        Ok((name.path.to_string_lossy().into_owned(), name.driver))
    }

    #[test]
    fn local_names_are_understood() {
        assert_eq!(parse("../base.raw").unwrap(), ("../base.raw".to_owned(), None));
        assert_eq!(parse("file:base").unwrap(), ("base".to_owned(), None));
        assert_eq!(parse("./a:b").unwrap(), ("./a:b".to_owned(), None));
        let qcow2 = Some("qcow2".to_owned());
        for json in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}"#,
            r#"json:{"driver":"qcow2","file.filename":"/b","file.locking":"off"}"#,
        ] {
            assert_eq!(parse(json).unwrap(), ("/b".to_owned(), qcow2.clone()), "{json}");
        }
        let raw = parse(r#"json:{"driver":"file","filename":"b"}"#).unwrap();
        assert_eq!(raw, ("b".to_owned(), Some("raw".to_owned())));
        let probed = parse(r#"json:{"file":{"filename":"b"}}"#).unwrap();
        assert_eq!(probed, ("b".to_owned(), None));
    }

    #[test]
    fn what_is_not_local_is_refused_by_name() {
        for (name, part) in [
            ("nbd:localhost:10809", "'nbd'"),
            ("http://x/y.qcow2", "'http'"),
            (r#"json:{"driver":"qcow2","file":{"driver":"nbd","filename":"x"}}"#, "'nbd'"),
            (r#"json:{"driver":"nbd","host":"x"}"#, "'host'"),
            (r#"json:{"driver":"raw","offset":512,"file.filename":"x"}"#, "'offset'"),
            (r#"json:{"driver":"qcow2","backing":null,"file.filename":"x"}"#, "'backing'"),
            (r#"json:{"driver":"raw","file.filename":"x\u0000y"}"#, "NUL"),
            ("json:{", "no JSON object"),
            ("json:{}", "does not lead to a local file"),
        ] {
            let error = parse(name).unwrap_err();
            assert!(error.to_string().contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn names_are_seen_from_the_overlays_directory_as_it_was_written() {
        let beside = |image: &str, name: &str| {
            resolve_beside(Path::new(image), Path::new(name)).to_string_lossy().into_owned()
        };
        assert_eq!(beside("a.qcow2", "b"), "b");
        assert_eq!(beside("./a.qcow2", "b"), "./b");
        assert_eq!(beside("x//a.qcow2", "../b"), "x//../b");
        assert_eq!(beside("x/a.qcow2", "/b"), "/b");
    }
}
