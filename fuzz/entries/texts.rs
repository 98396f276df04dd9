//! Names and texts.

use std::path::Path;

use imgdm::convert::options::FormatOptions;
use imgdm::filesystem::{MountOptions, split};
use imgdm::format::Format;
use imgdm::imgdmtab::Tab;
use imgdm::open::{LocalName, resolve_beside};
use imgdm::table::{Table, TableLine};

/// A backing file's name. What it leads to is a path without NUL where it was a text without.
pub fn names(bytes: &[u8]) {
    for prefix in [&b""[..], b"json:", b"file:"] {
        let name = [prefix, bytes].concat();
        let Ok(local) = LocalName::parse(&name) else { continue };
        let path = resolve_beside(Path::new("/images/overlay.qcow2"), &local.path);
        assert!(path.is_absolute(), "{path:?}");
        if prefix == b"json:" {
            let path = local.path.to_str().expect("JSON is UTF-8");
            assert!(!path.contains('\0'), "{path:?}");
        }
    }
}

/// Table lines: what can be read is printed as it would be read again.
pub fn table(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    for line in text.lines() {
        if let Ok(line) = line.parse::<TableLine>() {
            let printed = line.to_string();
            assert_eq!(printed.parse::<TableLine>().expect("it was printed"), line, "{printed}");
        }
    }
    if let Ok(table) = text.parse::<Table>() {
        let printed = table.to_string();
        assert_eq!(printed.parse::<Table>().expect("it was printed").lines(), table.lines());
        let _ = table.size();
    }
}

/// imgdmtab, the options of `convert -o`, and those of `mount -o`.
pub fn text(bytes: &[u8]) {
    let tab = Tab::parse(bytes);
    for entry in &tab.entries {
        assert!(entry.arguments().len() >= 3, "{entry:?}");
    }
    for error in tab.errors {
        let _ = error.at(Path::new("/etc/imgdmtab")).to_string();
    }
    let text = String::from_utf8_lossy(bytes);
    let texts: Vec<&str> = text.split('\n').collect();
    let _ = FormatOptions::asks_for_help(&texts);
    for format in [Format::Raw, Format::Qcow2, Format::Qcow, Format::Cow] {
        let Ok(options) = FormatOptions::parse(format, &texts) else { continue };
        for (compressed, backing) in [(false, false), (true, false), (false, true)] {
            let _ = options.check(compressed, backing);
        }
    }
    if let Ok(items) = split(&text) {
        let _ = MountOptions::sort(items);
    }
}
