//! Names and values as unit files have them (systemd.unit(5)).

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

/// Most bytes of a unit's name, suffix included.
const UNIT_NAME_MAX: usize = 255;

/// Bytes that stay as they are in a unit's name.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b":_.".contains(&byte)
}

/// Text as the instance of a unit, as `systemd-escape` gives it.
pub(crate) fn instance(text: &str) -> String {
    escaped(text.as_bytes())
}

/// A path as a unit's name or instance, as `systemd-escape --path` gives it. The path is
/// absolute and without `.`, `..` and needless slashes.
pub(crate) fn path(path: &Path) -> String {
    match path.as_os_str().as_bytes() {
        b"/" => "-".to_owned(),
        bytes => escaped(bytes.strip_prefix(b"/").unwrap_or(bytes)),
    }
}

fn escaped(text: &[u8]) -> String {
    use std::fmt::Write;
    let mut out = String::with_capacity(text.len());
    for (at, &byte) in text.iter().enumerate() {
        match byte {
            b'/' => out.push('-'),
            byte if is_plain(byte) && !(at == 0 && byte == b'.') => out.push(char::from(byte)),
            byte => {
                let _ = write!(out, "\\x{byte:02x}");
            }
        }
    }
    out
}

/// A unit's name, unless it is too long for systemd.
pub(crate) fn unit(name: String) -> Option<String> {
    (name.len() <= UNIT_NAME_MAX).then_some(name)
}

/// A value's text that systemd does not take for specifiers.
pub(crate) fn specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// One word of a value, in quotes.
pub(crate) fn word(text: &str) -> String {
    format!("\"{}\"", specifiers(&text.replace('\\', "\\\\").replace('"', "\\\"")))
}

/// The part of an absolute path by which its mounts can be named: unit files hold UTF-8
/// without control characters, and systemd refuses `..`. Mount points below stay unknown.
pub(crate) fn mountable(path: &Path) -> String {
    let is_fine =
        |name: &OsStr| name.to_str().is_some_and(|name| !name.chars().any(char::is_control));
    let mut fine = String::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            Component::Normal(name) if is_fine(name) => {
                fine.push('/');
                fine.push_str(&name.to_string_lossy());
            }
            Component::Normal(_) | Component::ParentDir => break,
        }
    }
    if fine.is_empty() { "/".to_owned() } else { fine }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_escaped_as_systemd_does() {
        // As systemd-escape and systemd-escape --path print them.
        assert_eq!(
            instance("a-b@c.d:e_f#1+=\u{e9}"),
            "a\\x2db\\x40c.d:e_f\\x231\\x2b\\x3d\\xc3\\xa9"
        );
        assert_eq!(instance(".a"), "\\x2ea");
        assert_eq!(path(Path::new("/dev/mapper/.a-b")), "dev-mapper-.a\\x2db");
        assert_eq!(path(Path::new("/.a")), "\\x2ea");
        assert_eq!(path(Path::new("/")), "-");
    }

    #[test]
    fn a_word_is_no_specifier_and_ends_at_its_quote() {
        assert_eq!(word("/a b%i\\\"c"), "\"/a b%%i\\\\\\\"c\"");
    }

    #[test]
    fn a_path_is_cut_where_a_unit_file_can_hold_it_no_more() {
        let raw = OsStr::from_bytes(b"/srv/x\xff/a");
        for (whole, part) in [
            (Path::new("/srv/my disk.qcow2"), "/srv/my disk.qcow2"),
            (Path::new("//srv/./a//b/"), "/srv/a/b"),
            (Path::new("/srv/../etc/a"), "/srv"),
            (Path::new("/srv/a\nb/c"), "/srv"),
            (Path::new(raw), "/srv"),
            (Path::new("/"), "/"),
        ] {
            assert_eq!(mountable(whole), part);
        }
    }

    #[test]
    fn a_name_too_long_is_no_unit() {
        assert!(unit("a".repeat(255)).is_some() && unit("a".repeat(256)).is_none());
    }
}
