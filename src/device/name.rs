//! All names and UUIDs that imgdm gives to devices, and how they are read again.
//!
//! A device's UUID says what it is, so that no state is kept anywhere else:
//!
//! ```text
//! IMGDM-1-<role>-<identity>-<snapshot>-<depth>-<options>
//! ```
//!
//! `role` is `top` or `innerN`; `identity` 40 hex digits: 32 of a hash over the files
//! (device, inode, role, format) in order and 8 of a hash of the name, so that one
//! image can be attached under several names; `snapshot` 16 hex digits, zeros for the
//! active layer; `depth` the number of layers; `options` 8 hex digits of bits.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};
use crate::source::FileId;
use crate::status::FileRole;

/// Most bytes of a NAME, so that the suffixes of partitions and inner devices fit.
pub const NAME_MAX: usize = 100;
/// Most bytes of any device-mapper name and UUID (kernel: DM_NAME_LEN and DM_UUID_LEN,
/// which count a NUL).
const DM_NAME_MAX: usize = 127;
const DM_UUID_MAX: usize = 128;
/// Bytes that a loop device remembers as its file's name (LO_NAME_SIZE less a NUL).
const LOOP_NAME_MAX: usize = 63;

/// What every UUID of ours starts with.
pub const UUID_PREFIX: &str = "IMGDM-";
const UUID_VERSION: &str = "IMGDM-1-";
const IDENTITY_DIGITS: usize = 40;
const SNAPSHOT_DIGITS: usize = 16;
const OPTION_DIGITS: usize = 8;

// The longest UUID, with kpartx's longest prefix before it, and the longest inner name.
const LONGEST_U32: usize = 10;
const LONGEST_UUID: usize = UUID_VERSION.len()
    + "inner".len()
    + LONGEST_U32
    + 1
    + IDENTITY_DIGITS
    + 1
    + SNAPSHOT_DIGITS
    + 1
    + LONGEST_U32
    + 1
    + OPTION_DIGITS;
const _: () = assert!("part4294967295-".len() + LONGEST_UUID < DM_UUID_MAX);
const _: () = assert!(NAME_MAX + "-inner".len() + LONGEST_U32 <= DM_NAME_MAX);

/// The name of a device in /dev/mapper.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmName(String);

/// Bytes that udev leaves as they are.
fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&byte)
}

/// What stands against `name`, in words.
fn name_fault(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("is empty".to_owned());
    }
    if matches!(name, "." | ".." | "control") {
        return Some("has a meaning of its own in /dev/mapper".to_owned());
    }
    if name.starts_with('-') {
        return Some("starts with '-', which commands take for an option".to_owned());
    }
    if name.len() > NAME_MAX {
        return Some(format!("is {} bytes long, more than {NAME_MAX}", name.len()));
    }
    let wrong = name.bytes().find(|&byte| !is_plain(byte))?;
    Some(format!("has the byte {wrong:#04x} in it, and only 0-9A-Za-z#+-.:=@_ are allowed"))
}

impl DmName {
    /// A name that the user gave: taken as it is, or refused.
    ///
    /// # Errors
    /// It breaks a rule, which the message says.
    pub fn new(name: &str) -> Result<Self> {
        match name_fault(name) {
            None => Ok(Self(name.to_owned())),
            Some(fault) => Err(Error::new(ErrorKind::Usage(format!(
                "the device name '{}' {fault}",
                name.escape_debug()
            )))),
        }
    }

    /// The name for an image: its last path part without the last suffix, with
    /// `@SNAPSHOT` where a snapshot is meant; other bytes than udev likes become `_`.
    ///
    /// # Errors
    /// What is left is no name; the message asks for `--name`.
    pub fn from_image(path: &Path, snapshot: Option<&str>) -> Result<Self> {
        let stem = path.file_stem().unwrap_or(OsStr::new(""));
        let plain = |bytes: &[u8]| -> String {
            bytes.iter().map(|&b| if is_plain(b) { char::from(b) } else { '_' }).collect()
        };
        let mut name = plain(stem.as_bytes());
        if let Some(snapshot) = snapshot
            && !name.is_empty()
        {
            name.push('@');
            name.push_str(&plain(snapshot.as_bytes()));
        }
        match name_fault(&name) {
            None => Ok(Self(name)),
            Some(fault) => Err(Error::new(ErrorKind::Usage(format!(
                "the device name '{name}' that follows from the image {fault}: choose one with --name"
            )))
            .at_path(path)),
        }
    }

    /// The name of inner device `index`.
    pub fn inner(&self, index: u32) -> Self {
        Self(format!("{}-inner{index}", self.0))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which device of an attachment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DeviceRole {
    /// The one that the user gets.
    Top,
    /// One below it, by its number.
    Inner(u32),
}

/// A file that an attachment reads, as far as its identity goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileIdentity {
    /// Depth of its layer.
    pub layer: u32,
    /// Which of the layer's files.
    pub role: FileRole,
    /// Device and inode.
    pub id: FileId,
    /// The layer's format.
    pub format: String,
}

/// A device's UUID, which says what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmUuid {
    /// Which device of the attachment.
    pub role: DeviceRole,
    /// Hash over the files, in hex (32 digits), and over the name (8 digits).
    pub identity: String,
    /// Hash of the snapshot's ID and name, in hex; zeros for the active layer.
    pub snapshot: String,
    /// Number of layers.
    pub depth: u32,
    /// The options that change what is attached, as bits.
    pub options: u32,
}

fn hex(bytes: &[u8], digits: usize) -> String {
    use fmt::Write;
    let mut out = String::with_capacity(digits + 1);
    for byte in bytes.iter().take(digits.div_ceil(2)) {
        let _ = write!(out, "{byte:02x}");
    }
    out.truncate(digits);
    out
}

/// The hash of a snapshot's ID and name that UUIDs carry; zeros without a snapshot.
pub fn snapshot_hash(snapshot: Option<(&str, &str)>) -> String {
    let Some((id, name)) = snapshot else { return "0".repeat(SNAPSHOT_DIGITS) };
    let mut hash = Sha256::new();
    hash.update(b"imgdm snapshot\0");
    hash.update((id.len() as u64).to_le_bytes());
    hash.update(id);
    hash.update(name);
    hex(&hash.finalize(), SNAPSHOT_DIGITS)
}

/// The part of a UUID's identity that is of the files.
fn files_hash(files: &[FileIdentity]) -> String {
    let mut hash = Sha256::new();
    hash.update(b"imgdm files\0");
    for file in files {
        hash.update(file.layer.to_le_bytes());
        hash.update([match file.role {
            FileRole::Image => 0u8,
            FileRole::DataFile => 1,
        }]);
        hash.update(file.id.device.to_le_bytes());
        hash.update(file.id.inode.to_le_bytes());
        hash.update((file.format.len() as u64).to_le_bytes());
        hash.update(&file.format);
    }
    hex(&hash.finalize(), IDENTITY_DIGITS - 8)
}

impl DmUuid {
    /// The UUID of an attachment's top device.
    pub fn for_top(
        name: &DmName,
        files: &[FileIdentity],
        snapshot: Option<(&str, &str)>,
        options: u32,
    ) -> Self {
        let mut identity = files_hash(files);
        identity.push_str(&hex(&Sha256::digest(name.as_str()), 8));
        let depth = files.iter().map(|file| file.layer.saturating_add(1)).max().unwrap_or(0);
        Self { role: DeviceRole::Top, identity, snapshot: snapshot_hash(snapshot), depth, options }
    }

    /// The UUID of another device of the same attachment.
    #[must_use]
    pub fn with_role(&self, role: DeviceRole) -> Self {
        Self { role, ..self.clone() }
    }

    /// True where these are the files of the attachment, in the same order and formats,
    /// whatever its name.
    pub fn is_of_files(&self, files: &[FileIdentity]) -> bool {
        self.identity.starts_with(&files_hash(files))
    }

    /// The description in the kernel's keyring of a layer's key. The part before the colon
    /// is what keys of the type `logon` have to have.
    pub fn key_description(&self, layer: u32) -> String {
        format!("imgdm:{}:{layer}", self.identity)
    }

    /// True where both are devices of one attachment.
    pub fn same_attachment(&self, other: &Self) -> bool {
        self.with_role(DeviceRole::Top) == other.with_role(DeviceRole::Top)
    }

    /// True for a snapshot, false for the active layer.
    pub fn is_snapshot(&self) -> bool {
        self.snapshot.bytes().any(|digit| digit != b'0')
    }
}

impl fmt::Display for DmUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(UUID_VERSION)?;
        match self.role {
            DeviceRole::Top => f.write_str("top")?,
            DeviceRole::Inner(index) => write!(f, "inner{index}")?,
        }
        write!(f, "-{}-{}-{}-{:08x}", self.identity, self.snapshot, self.depth, self.options)
    }
}

impl FromStr for DmUuid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let mut parts = text.strip_prefix(UUID_VERSION)?.split('-');
            let role = match parts.next()? {
                "top" => DeviceRole::Top,
                role => DeviceRole::Inner(role.strip_prefix("inner")?.parse().ok()?),
            };
            let mut digits = |length: usize| {
                let part = parts.next()?;
                let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                (part.len() == length && part.bytes().all(is_hex)).then(|| part.to_owned())
            };
            let identity = digits(IDENTITY_DIGITS)?;
            let snapshot = digits(SNAPSHOT_DIGITS)?;
            let depth = parts.next()?.parse().ok()?;
            let options = parts.next()?;
            let options = (options.len() == OPTION_DIGITS)
                .then(|| u32::from_str_radix(options, 16).ok())
                .flatten()?;
            let uuid = Self { role, identity, snapshot, depth, options };
            // No second spelling of the same: `inner007` or `inner+7`.
            (parts.next().is_none() && uuid.to_string() == text).then_some(uuid)
        };
        parse().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported(format!(
                "'{}' is no device UUID of this imgdm",
                text.escape_debug()
            )))
        })
    }
}

/// What a loop device is for, as its `lo_file_name` says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoopRole {
    /// A file of the chain; the active layer's carries the snapshot's name, cut to
    /// what fits.
    File {
        /// Depth of its layer.
        layer: u32,
        /// Which of the layer's files.
        role: FileRole,
        /// The snapshot that is attached.
        snapshot: Option<String>,
    },
    /// The attachment's zeros.
    Zero,
    /// The attachment's scratch file.
    Scratch,
}

impl LoopRole {
    /// The words for a loop's `lo_file_name`; never more than 63 bytes.
    pub fn file_name(&self) -> String {
        match self {
            Self::Zero => "imgdm:zero".to_owned(),
            Self::Scratch => "imgdm:scratch".to_owned(),
            Self::File { layer, role, snapshot } => {
                let role = match role {
                    FileRole::Image => "image",
                    FileRole::DataFile => "data",
                };
                let mut name = format!("imgdm:{layer}:{role}");
                if let Some(snapshot) = snapshot {
                    name.push(':');
                    for c in snapshot.chars() {
                        if name.len() + c.len_utf8() > LOOP_NAME_MAX {
                            break;
                        }
                        name.push(c);
                    }
                }
                name
            }
        }
    }

    /// Reads what [`file_name`](Self::file_name) wrote; none for a loop of others.
    pub fn parse(name: &str) -> Option<Self> {
        let rest = name.strip_prefix("imgdm:")?;
        match rest {
            "zero" => return Some(Self::Zero),
            "scratch" => return Some(Self::Scratch),
            _ => {}
        }
        let (layer, rest) = rest.split_once(':')?;
        let (role, snapshot) = match rest.split_once(':') {
            Some((role, snapshot)) => (role, Some(snapshot.to_owned())),
            None => (rest, None),
        };
        let role = match role {
            "image" => FileRole::Image,
            "data" => FileRole::DataFile,
            _ => return None,
        };
        Some(Self::File { layer: layer.parse().ok()?, role, snapshot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name_of(path: &str, snapshot: Option<&str>) -> String {
        DmName::from_image(Path::new(path), snapshot).unwrap().to_string()
    }

    #[test]
    fn the_name_is_the_stem_of_the_last_part() {
        assert_eq!(name_of("/a/disk.qcow2", None), "disk");
        assert_eq!(name_of("disk.tar.qcow2", None), "disk.tar");
        assert_eq!(name_of("/dev/vg/lv", None), "lv");
        assert_eq!(name_of("/a/my disk\u{e9}.img", None), "my_disk__");
        assert_eq!(name_of("/a/disk.qcow2", Some("before update")), "disk@before_update");
    }

    #[test]
    fn names_that_cannot_be_are_refused() {
        for name in ["", ".", "..", "control", "-x", "a b", "a/b", "\u{e9}", &"x".repeat(101)] {
            assert!(DmName::new(name).is_err(), "{name}");
        }
        for path in ["/", "control.qcow2", "/a/-x.img", "..", &"x".repeat(101)] {
            assert!(DmName::from_image(Path::new(path), None).is_err(), "{path}");
        }
        assert!(DmName::new(&"x".repeat(100)).is_ok());
    }

    #[test]
    fn the_uuid_depends_on_all_that_makes_an_attachment() {
        let name = DmName::new("disk").unwrap();
        let file = FileIdentity {
            layer: 0,
            role: FileRole::Image,
            id: FileId { device: 1, inode: 2 },
            format: "qcow2".to_owned(),
        };
        let files = [file.clone()];
        let uuid = DmUuid::for_top(&name, &files, None, 0);
        assert_eq!(uuid, DmUuid::for_top(&name, &files, None, 0));
        assert!(!uuid.is_snapshot());
        assert!(uuid.is_of_files(&files));
        let other_file = [FileIdentity { id: FileId { device: 1, inode: 3 }, ..file.clone() }];
        let other_format = [FileIdentity { format: "raw".to_owned(), ..file }];
        assert!(!uuid.is_of_files(&other_file) && !uuid.is_of_files(&other_format));
        for other in [
            DmUuid::for_top(&DmName::new("disk2").unwrap(), &files, None, 0),
            DmUuid::for_top(&name, &other_file, None, 0),
            DmUuid::for_top(&name, &other_format, None, 0),
            DmUuid::for_top(&name, &files, Some(("1", "a")), 0),
            DmUuid::for_top(&name, &files, None, 1),
        ] {
            assert_ne!(uuid.to_string(), other.to_string());
        }
        assert_ne!(snapshot_hash(Some(("1", "2a"))), snapshot_hash(Some(("12", "a"))));
    }

    proptest! {
        #[test]
        fn any_path_gives_a_good_name_or_none(path: String, snapshot: Option<String>) {
            if let Ok(name) = DmName::from_image(Path::new(&path), snapshot.as_deref()) {
                prop_assert_eq!(DmName::new(name.as_str()).unwrap(), name);
            }
        }

        #[test]
        fn uuids_read_back_and_fit(
            inner: Option<u32>, layer: u32, device: u64, inode: u64, options: u32,
            name in "[a-z]{1,100}", snapshot: Option<(String, String)>, format: String,
        ) {
            let file = FileIdentity {
                layer, role: FileRole::DataFile, id: FileId { device, inode }, format,
            };
            let snapshot = snapshot.as_ref().map(|(id, name)| (id.as_str(), name.as_str()));
            let name = DmName::new(&name).unwrap();
            let role = inner.map_or(DeviceRole::Top, DeviceRole::Inner);
            let uuid = DmUuid::for_top(&name, &[file], snapshot, options).with_role(role);
            let text = uuid.to_string();
            prop_assert!(text.len() <= LONGEST_UUID, "{}", text);
            prop_assert_eq!(text.parse::<DmUuid>().unwrap(), uuid);
            if let Some(index) = inner {
                prop_assert!(name.inner(index).as_str().len() <= DM_NAME_MAX);
            }
        }

        #[test]
        fn uuids_of_others_are_no_panic(text: String) {
            if let Ok(uuid) = text.parse::<DmUuid>() {
                prop_assert_eq!(uuid.to_string(), text);
            }
        }

        #[test]
        fn loop_names_read_back(layer: u32, data: bool, snapshot: Option<String>) {
            let role = if data { FileRole::DataFile } else { FileRole::Image };
            let role = LoopRole::File { layer, role, snapshot };
            let name = role.file_name();
            prop_assert!(name.len() <= LOOP_NAME_MAX);
            let again = LoopRole::parse(&name).unwrap();
            if name.len() < LOOP_NAME_MAX - 4 {
                prop_assert_eq!(again, role);
            }
        }
    }
}
