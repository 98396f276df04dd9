//! `/etc/imgdmtab`: the images that are attached at boot, and under which names.
//!
//! As in crypttab(5), a line is an entry of up to four fields between blanks:
//!
//! ```text
//! # NAME  IMAGE                 KEY             OPTIONS
//! data    /srv/data.qcow2
//! old     /srv/my\040disk.qcow2 -               snapshot=monday,nofail
//! secret  /srv/secret.qcow2     /etc/secret.key partitions,noauto
//! ```
//!
//! Blank lines and those that begin with `#` are passed over. A backslash and three octal
//! digits stand for a byte, as in fstab(5): `\040` a blank, `\054` a comma in an option.
//! KEY is a key file, or `-` or `none`. OPTIONS are some for the boot ([`BootOptions`]) and
//! the long options of `imgdm attach`, without their dashes.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, printable};

/// Where the table is.
pub const DEFAULT_PATH: &str = "/etc/imgdmtab";

/// Most bytes of a table that is read.
pub const MAX_LEN: u64 = 1 << 20;

/// An image that is to be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its line, the first one 1.
    pub line: usize,
    /// NAME of the device. Only that it is UTF-8 and no path has been looked at.
    pub name: String,
    /// The image, an absolute path.
    pub image: PathBuf,
    /// What `attach` is told, in the order of the line.
    pub options: Vec<AttachOption>,
    /// What the boot is told.
    pub boot: BootOptions,
}

/// An option of `imgdm attach`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOption {
    /// Its long name, without dashes.
    pub name: &'static str,
    /// Its value; none of a switch.
    pub value: Option<OsString>,
}

/// The options of an entry that `attach` knows nothing of, with the meaning and names that
/// they have in crypttab(5) and fstab(5).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootOptions {
    /// `nofail`: the boot neither waits for it nor fails with it.
    pub nofail: bool,
    /// `noauto`: attached only when asked for, also by a mount of it.
    pub noauto: bool,
    /// `_netdev`: it needs the network.
    pub netdev: bool,
    /// `x-initrd.attach`: the initrd attaches it, and it stays until the very end.
    pub initrd: bool,
    /// `x-systemd.device-timeout=`: how long its device is waited for, as systemd.time(7)
    /// has it.
    pub device_timeout: Option<String>,
    /// `x-systemd.requires-mounts-for=`: what has to be mounted beside the image's own file
    /// system, as for backing files that lie elsewhere. Absolute paths.
    pub requires_mounts_for: Vec<PathBuf>,
}

/// What follows an option's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing.
    Nothing,
    /// `=VALUE`.
    Value,
    /// `=VALUE`, and it may be given again.
    Values,
    /// `=PATH`, an absolute one.
    Path,
    /// `=PATH`, and it may be given again.
    Paths,
    /// Nothing, or `=PATH`, an absolute one.
    MaybePath,
}

/// The options of `imgdm attach` that a table may hold: their long names.
pub const ATTACH_OPTIONS: &[(&str, Takes)] = &[
    ("snapshot", Takes::Value),
    ("format", Takes::Value),
    ("force-share", Takes::Nothing),
    ("probe-backing", Takes::Nothing),
    ("allow-changed-backing", Takes::Nothing),
    ("allow-corrupt", Takes::Nothing),
    ("data-file", Takes::Path),
    ("allow-path", Takes::Paths),
    ("direct-io", Takes::Value),
    ("direct-block", Takes::Nothing),
    ("zero", Takes::Value),
    ("no-fiemap", Takes::Nothing),
    ("compressed", Takes::Value),
    ("on-error", Takes::Value),
    ("scratch-dir", Takes::Path),
    ("cache-dir", Takes::Path),
    ("max-kernel-memory", Takes::Value),
    ("key-file", Takes::Paths),
    ("partitions", Takes::Nothing),
    ("partition", Takes::Values),
    ("lv", Takes::Values),
    ("publish", Takes::Nothing),
    ("overlay", Takes::MaybePath),
    ("overlay-size", Takes::Value),
];

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {kind}")]
pub struct TabError {
    /// The line, the first one 1.
    pub line: usize,
    /// The entry's name, where there is one that no line before has.
    pub name: Option<String>,
    /// What it is.
    pub kind: TabErrorKind,
}

/// What can be wrong with a line. What is quoted is a line's own text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TabErrorKind {
    /// The name is none for a device; the words say why.
    #[error("{0}")]
    Name(String),
    /// Another line has it.
    #[error("the name '{name}' is taken by line {first}", name = printable(name))]
    Twice {
        /// The name.
        name: String,
        /// The line that has it.
        first: usize,
    },
    /// There is a name and nothing else.
    #[error("no image follows the name '{0}'")]
    NoImage(String),
    /// A fifth field.
    #[error(
        "'{0}' follows the options: a line has NAME IMAGE KEY OPTIONS (\\040 stands for a blank, and a comment takes a line of its own)"
    )]
    TooManyFields(String),
    /// A path that depends on a working directory, or with a NUL in it.
    #[error("{what} is '{path}', and has to be an absolute path")]
    NotAbsolute {
        /// Whose path it is.
        what: String,
        /// The path.
        path: String,
    },
    /// An option that nothing knows.
    #[error("unknown option '{0}'")]
    UnknownOption(String),
    /// An option without the value that it needs.
    #[error("option '{0}' needs a value: {0}=...")]
    NoValue(&'static str),
    /// A switch with a value.
    #[error("option '{0}' takes no value")]
    NeedlessValue(&'static str),
    /// A second value for what has one.
    #[error("option '{0}' is given twice")]
    Repeated(&'static str),
    /// A value that makes no sense; the words say why.
    #[error("option '{option}': {why}")]
    Value {
        /// The option.
        option: String,
        /// What is wrong.
        why: String,
    },
    /// What `attach` says to the options.
    #[error("{0}")]
    Attach(String),
    /// More bytes than are read of any table.
    #[error("the file is longer than {MAX_LEN} bytes")]
    TooLong,
}

impl TabError {
    /// The error of a command that reads the table at `path`.
    pub fn at(self, path: &Path) -> Error {
        Error::new(ErrorKind::InvalidTab(self.to_string())).at_path(path)
    }
}

/// A table: its entries, and what is wrong with the lines that are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tab {
    /// In the order of their lines, each with a name of its own.
    pub entries: Vec<Entry>,
    /// In the order of their lines.
    pub errors: Vec<TabError>,
}

impl Tab {
    /// Reads a table. A line that is wrong does not keep others from being read.
    pub fn parse(text: &[u8]) -> Self {
        let mut tab = Self::default();
        if u64::try_from(text.len()).map_or(true, |length| length > MAX_LEN) {
            tab.errors.push(TabError { line: 1, name: None, kind: TabErrorKind::TooLong });
            return tab;
        }
        let mut names: Vec<(String, usize)> = Vec::new();
        for (line, text) in (1..).zip(text.split(|&byte| byte == b'\n')) {
            let Some(fields) = fields(text) else { continue };
            let mut name = None;
            let outcome = name_of(&fields).and_then(|new| {
                match names.iter().find(|(known, _)| *known == new) {
                    Some(&(_, first)) => return Err(TabErrorKind::Twice { name: new, first }),
                    None => names.push((new.clone(), line)),
                }
                name = Some(new.clone());
                entry(line, new, &fields)
            });
            match outcome {
                Ok(entry) => tab.entries.push(entry),
                Err(kind) => tab.errors.push(TabError { line, name, kind }),
            }
        }
        tab
    }
}

/// The fields of a line, still with their escapes; none of a line that is empty or a
/// comment. fstab(5) has the same lines.
pub fn fields(line: &[u8]) -> Option<Vec<&[u8]>> {
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") {
        return None;
    }
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    Some(line.split(blank).filter(|field| !field.is_empty()).collect())
}

/// A field with its octal escapes replaced. Other backslashes stay, as in fstab(5).
pub fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        match (first, octal(after)) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// The byte that three octal digits give.
fn octal(text: &[u8]) -> Option<u8> {
    let digits = std::str::from_utf8(text.get(..3)?).ok()?;
    // from_str_radix would take a sign.
    digits.bytes().all(|digit| digit.is_ascii_digit()).then_some(())?;
    u8::from_str_radix(digits, 8).ok()
}

fn shown(text: &OsStr) -> String {
    printable(&text.to_string_lossy())
}

fn name_of(fields: &[&[u8]]) -> Result<String, TabErrorKind> {
    let name = unescape(fields.first().copied().unwrap_or_default());
    let wrong = |name: &OsStr| {
        TabErrorKind::Name(format!("'{}' is no name for a device in /dev/mapper", shown(name)))
    };
    match name.into_string() {
        Ok(name) if name.contains(['/', '\0']) => Err(wrong(name.as_ref())),
        Ok(name) => Ok(name),
        Err(name) => Err(wrong(&name)),
    }
}

fn entry(line: usize, name: String, fields: &[&[u8]]) -> Result<Entry, TabErrorKind> {
    let (image, key, options) = match fields {
        [_, image] => (*image, None, None),
        [_, image, key] => (*image, Some(*key), None),
        [_, image, key, options] => (*image, Some(*key), Some(*options)),
        [_, _, _, _, fifth, ..] => {
            return Err(TabErrorKind::TooManyFields(shown(&unescape(fifth))));
        }
        _ => return Err(TabErrorKind::NoImage(printable(&name))),
    };
    let image = absolute("the image", unescape(image))?.into();
    let mut entry = Entry { line, name, image, options: Vec::new(), boot: BootOptions::default() };
    if let Some(key) = key.map(unescape).filter(|key| key != "-" && key != "none") {
        let value = Some(absolute("the key file", key)?);
        entry.options.push(AttachOption { name: "key-file", value });
    }
    for option in options.unwrap_or_default().split(|&byte| byte == b',') {
        if !option.is_empty() {
            entry.add(option)?;
        }
    }
    Ok(entry)
}

fn absolute(what: &str, path: OsString) -> Result<OsString, TabErrorKind> {
    if path.as_bytes().starts_with(b"/") && !path.as_bytes().contains(&0) {
        return Ok(path);
    }
    Err(TabErrorKind::NotAbsolute { what: what.to_owned(), path: shown(&path) })
}

impl Entry {
    /// The values of an option of `attach`, in the order of the line.
    pub fn values<'e>(&'e self, name: &'e str) -> impl Iterator<Item = &'e OsStr> {
        let mine = self.options.iter().filter(move |option| option.name == name);
        mine.filter_map(|option| option.value.as_deref())
    }

    /// True where that option of `attach` is given.
    pub fn has(&self, name: &str) -> bool {
        self.options.iter().any(|option| option.name == name)
    }

    /// What `imgdm attach` is to be called with.
    pub fn arguments(&self) -> Vec<OsString> {
        let long = |name: &str, value: Option<&OsStr>| {
            let mut word = OsString::from(format!("--{name}"));
            if let Some(value) = value {
                word.push("=");
                word.push(value);
            }
            word
        };
        let mut words = vec![long("name", Some(self.name.as_ref()))];
        words.extend(self.options.iter().map(|each| long(each.name, each.value.as_deref())));
        words.extend(["--".into(), self.image.clone().into()]);
        words
    }

    /// Takes an option of the fourth field, still with its escapes.
    fn add(&mut self, option: &[u8]) -> Result<(), TabErrorKind> {
        let equals = option.iter().position(|&byte| byte == b'=');
        let (name, value) = option.split_at(equals.unwrap_or(option.len()));
        let value = equals.map(|_| unescape(&value[1..]));
        let name = std::str::from_utf8(name).unwrap_or_default();
        if self.add_for_boot(name, value.as_deref())? {
            return Ok(());
        }
        if let ("cache", None) = (name, &value) {
            return self.add_for_attach("compressed", Takes::Value, Some("cache".into()));
        }
        match ATTACH_OPTIONS.iter().find(|(known, _)| *known == name) {
            Some(&(name, takes)) => self.add_for_attach(name, takes, value),
            None => Err(TabErrorKind::UnknownOption(shown(&unescape(option)))),
        }
    }

    /// False where the option is none for the boot.
    fn add_for_boot(&mut self, name: &str, value: Option<&OsStr>) -> Result<bool, TabErrorKind> {
        let boot = &mut self.boot;
        match (name, value) {
            ("defaults" | "-" | "none", None) => {}
            ("nofail", None) => boot.nofail = true,
            ("fail", None) => boot.nofail = false,
            ("noauto", None) => boot.noauto = true,
            ("auto", None) => boot.noauto = false,
            ("_netdev", None) => boot.netdev = true,
            ("x-initrd.attach", None) => boot.initrd = true,
            ("x-systemd.device-timeout", value) => {
                boot.device_timeout = Some(time_span("x-systemd.device-timeout", value)?);
            }
            ("x-systemd.requires-mounts-for", value) => {
                let option = "x-systemd.requires-mounts-for";
                let value = value.ok_or(TabErrorKind::NoValue(option))?;
                boot.requires_mounts_for.push(absolute(option, value.to_owned())?.into());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn add_for_attach(
        &mut self,
        name: &'static str,
        takes: Takes,
        value: Option<OsString>,
    ) -> Result<(), TabErrorKind> {
        match (takes, &value) {
            (Takes::Nothing, Some(_)) => return Err(TabErrorKind::NeedlessValue(name)),
            (Takes::Nothing | Takes::MaybePath, None) => {}
            (_, None) => return Err(TabErrorKind::NoValue(name)),
            (_, Some(value)) if value.is_empty() => return Err(TabErrorKind::NoValue(name)),
            (Takes::Path | Takes::Paths | Takes::MaybePath, Some(value)) => {
                absolute(&format!("option '{name}'"), value.clone())?;
            }
            (Takes::Value | Takes::Values, Some(value)) => {
                if value.as_bytes().contains(&0) {
                    let why = "a NUL byte can't be in a value".to_owned();
                    return Err(TabErrorKind::Value { option: name.to_owned(), why });
                }
            }
        }
        if self.has(name) {
            match takes {
                Takes::Nothing => return Ok(()),
                Takes::Value | Takes::Path | Takes::MaybePath => {
                    return Err(TabErrorKind::Repeated(name));
                }
                Takes::Values | Takes::Paths => {}
            }
        }
        self.options.push(AttachOption { name, value });
        Ok(())
    }
}

/// A time as systemd takes it: numbers and units. What they come to is for systemd to say.
fn time_span(option: &'static str, value: Option<&OsStr>) -> Result<String, TabErrorKind> {
    let value = value.ok_or(TabErrorKind::NoValue(option))?;
    let is_fine = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b' ');
    match value.to_str() {
        Some(text) if !text.trim().is_empty() && text.as_bytes().iter().all(is_fine) => {
            Ok(text.to_owned())
        }
        _ => Err(TabErrorKind::Value {
            option: option.to_owned(),
            why: format!("'{}' is no time span, like 30 or 5min", shown(value)),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn one(line: &str) -> Entry {
        let tab = Tab::parse(line.as_bytes());
        assert_eq!(tab.errors, []);
        assert_eq!(tab.entries.len(), 1, "{line}");
        tab.entries[0].clone()
    }

    fn arguments(line: &str) -> Vec<String> {
        one(line).arguments().into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[track_caller]
    fn refused(line: &str) -> String {
        let tab = Tab::parse(line.as_bytes());
        assert_eq!(tab.entries, [], "{line}");
        assert_eq!(tab.errors.len(), 1, "{line}");
        tab.errors[0].to_string()
    }

    #[test]
    fn a_line_becomes_the_arguments_of_attach() {
        assert_eq!(arguments("disk /srv/disk.qcow2"), ["--name=disk", "--", "/srv/disk.qcow2"]);
        assert_eq!(
            arguments(" disk\t/srv/a\\040b\\134.qcow2  /etc/k  snapshot=x\\054y,,force-share\r"),
            [
                "--name=disk",
                "--key-file=/etc/k",
                "--snapshot=x,y",
                "--force-share",
                "--",
                "/srv/a b\\.qcow2"
            ]
        );
        for none in ["-", "none"] {
            let line = format!("disk /a {none} cache,key-file=/k:0,key-file=/l:1,force-share");
            assert_eq!(
                arguments(&line)[1..5],
                ["--compressed=cache", "--key-file=/k:0", "--key-file=/l:1", "--force-share"]
            );
        }
    }

    #[test]
    fn the_boots_options_are_not_for_attach() {
        let entry = one(
            "d /a - nofail,noauto,_netdev,x-initrd.attach,x-systemd.device-timeout=1min\\04030s,\
             x-systemd.requires-mounts-for=/b,x-systemd.requires-mounts-for=/c\\054d",
        );
        let boot = BootOptions {
            nofail: true,
            noauto: true,
            netdev: true,
            initrd: true,
            device_timeout: Some("1min 30s".to_owned()),
            requires_mounts_for: vec!["/b".into(), "/c,d".into()],
        };
        assert_eq!((entry.boot, entry.options.len()), (boot, 0));
        // The last one counts, as in fstab.
        assert_eq!(one("d /a - nofail,noauto,auto,fail").boot, BootOptions::default());
        assert_eq!(one("d /a - defaults").boot, BootOptions::default());
    }

    #[test]
    fn comments_and_empty_lines_are_passed_over_and_lines_counted() {
        let tab = Tab::parse(b"# a\n\n  # b\n \t \na /a\nb\nc /c");
        let lines: Vec<_> = tab.entries.iter().map(|e| (e.line, e.name.as_str())).collect();
        assert_eq!(lines, [(5, "a"), (7, "c")]);
        assert_eq!(tab.errors[0].to_string(), "line 6: no image follows the name 'b'");
        assert_eq!(tab.errors[0].name.as_deref(), Some("b"));
        let error = tab.errors[0].clone().at(Path::new(DEFAULT_PATH));
        assert_eq!(error.to_string(), "/etc/imgdmtab: line 6: no image follows the name 'b'");
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, what) in [
            ("a b", "the image is 'b', and has to be an absolute path"),
            ("a /b\\000", "absolute path"),
            ("a /b k", "the key file is 'k'"),
            ("a /b - nofail # comment", "'#' follows the options"),
            ("a/b /c", "'a/b' is no name"),
            ("a\\377 /c", "is no name"),
            ("a /b - frobnicate=1", "unknown option 'frobnicate=1'"),
            ("a /b - x-initrd.attach=1", "unknown option 'x-initrd.attach=1'"),
            ("a /b - \x1b[2J", "unknown option '\\u{1b}[2J'"),
            ("a /b - snapshot", "option 'snapshot' needs a value"),
            ("a /b - snapshot=", "option 'snapshot' needs a value"),
            ("a /b - snapshot=1,snapshot=2", "option 'snapshot' is given twice"),
            ("a /b - compressed=refuse,cache", "option 'compressed' is given twice"),
            ("a /b - no-fiemap=1", "option 'no-fiemap' takes no value"),
            ("a /b - cache-dir=here", "option 'cache-dir' is 'here'"),
            ("a /b - snapshot=\\000", "a NUL byte"),
            ("a /b - x-systemd.device-timeout", "needs a value"),
            ("a /b - x-systemd.device-timeout=1\\012Exec", "is no time span"),
            ("a /b - x-systemd.requires-mounts-for=b", "absolute path"),
        ] {
            let said = refused(line);
            assert!(said.starts_with("line 1: ") && said.contains(what), "{line}: {said}");
        }
    }

    #[test]
    fn a_name_belongs_to_the_first_line_that_has_it() {
        let tab = Tab::parse(b"a /a - bad\na /b\nb /c\n");
        assert_eq!(tab.entries.len(), 1);
        let errors: Vec<_> =
            tab.errors.iter().map(|e| (e.name.as_deref(), e.to_string())).collect();
        assert_eq!(errors[0].0, Some("a"));
        assert_eq!(errors[1], (None, "line 2: the name 'a' is taken by line 1".to_owned()));
    }

    #[test]
    fn a_table_without_end_is_not_read() {
        let long = vec![b'\n'; usize::try_from(MAX_LEN).unwrap() + 1];
        assert_eq!(Tab::parse(&long).errors[0].kind, TabErrorKind::TooLong);
        assert_eq!(Tab::parse(&long[1..]), Tab::default());
    }

    #[test]
    fn the_manual_page_names_every_option() {
        let page = include_str!("../man/imgdmtab.5").replace("\\-", "-");
        for (name, takes) in ATTACH_OPTIONS {
            let wanted = match takes {
                Takes::Nothing => name.to_string(),
                _ => format!("{name}="),
            };
            let mut words = page.split_whitespace();
            assert!(words.any(|word| word.trim_matches(['.', ',']) == wanted), "{wanted}");
        }
    }

    #[test]
    fn only_three_octal_digits_are_an_escape() {
        for (field, text) in [
            ("a\\040b", "a b"),
            ("\\1234", "S4"),
            ("a\\04", "a\\04"),
            ("\\+12", "\\+12"),
            ("\\777", "\\777"),
            ("\\089\\", "\\089\\"),
        ] {
            assert_eq!(unescape(field.as_bytes()), text, "{field}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(text: Vec<u8>) {
            let tab = Tab::parse(&text);
            for entry in &tab.entries {
                prop_assert!(entry.image.is_absolute());
            }
        }

        #[test]
        fn any_path_can_be_written(path in "/[^\0]{1,40}") {
            let escaped: String = path.bytes().map(|byte| format!("\\{byte:03o}")).collect();
            prop_assert_eq!(one(&format!("a {escaped}")).image, PathBuf::from(path));
        }
    }
}
