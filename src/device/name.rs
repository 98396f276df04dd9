//! All names and UUIDs that imgdm gives to devices, and how they are read again.
//!
//! A device's UUID says what it is, so that no state is kept anywhere else:
//!
//! ```text
//! IMGDM-1-<role>-<identity>-<snapshot>-<depth>-<options>
//! partN-IMGDM-1-top-<identity>-<snapshot>-<depth>-<options>
//! ```
//!
//! `role` is `top`, `innerN` or, for a logical volume on the disk, `lv` and 8 hex digits of
//! a hash of its names. A partition has, as kpartx would have it, the top device's UUID with
//! `partN-` before it; its name is kpartx's too. `identity` 40 hex digits: 32 of a hash over the files
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
/// Those of the identity that are of the name.
const NAME_DIGITS: usize = 8;
const SNAPSHOT_DIGITS: usize = 16;
const OPTION_DIGITS: usize = 8;
const VOLUME_DIGITS: usize = 8;
/// What the UUID of a partition starts with, before its number (kpartx).
const PARTITION: &str = "part";

// The longest UUID, with kpartx's longest prefix before it, and the longest names that are
// not checked when they are made.
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
const _: () = assert!(PARTITION.len() + LONGEST_U32 + 1 + LONGEST_UUID < DM_UUID_MAX);
const _: () = assert!("lv".len() + VOLUME_DIGITS <= "inner".len() + LONGEST_U32);
const _: () = assert!(NAME_MAX + "-inner".len() + LONGEST_U32 <= DM_NAME_MAX);
const _: () = assert!(NAME_MAX + "p".len() + LONGEST_U32 <= DM_NAME_MAX);

/// The name of a device in /dev/mapper.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DmName(String);

/// Those bytes, in words.
const PLAIN: &str = "0-9A-Za-z#+-.:=@_";

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
    Some(format!("has the byte {wrong:#04x} in it, and only {PLAIN} are allowed"))
}

/// True for what follows `NAME-` in the name of an inner device.
fn is_inner(suffix: &str) -> bool {
    let index = suffix.strip_prefix("inner");
    index.is_some_and(|index| !index.is_empty() && index.bytes().all(|b| b.is_ascii_digit()))
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

    /// The name of partition `number`, as kpartx and the kernel make it: with a `p` between
    /// where the name ends in a digit.
    pub fn partition(&self, number: u32) -> Self {
        let between = if self.0.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
        Self(format!("{}{between}{number}", self.0))
    }

    /// The name of the logical volume `volume` on the disk: `NAME-VOLUME`; `NAME--VOLUME`
    /// where the former is that of an inner device. No volume's name starts with a `-`, so
    /// that this one is no other volume's.
    ///
    /// # Errors
    /// The volume's name, which is a stranger's, has bytes in it that udev would change, or
    /// is too long.
    pub fn logical_volume(&self, volume: &str) -> Result<Self> {
        let between = if is_inner(volume) { "--" } else { "-" };
        let name = format!("{}{between}{volume}", self.0);
        let fault = if volume.is_empty() {
            "is empty".to_owned()
        } else if let Some(wrong) = volume.bytes().find(|&byte| !is_plain(byte)) {
            format!("has the byte {wrong:#04x} in it, and only {PLAIN} are allowed in device names")
        } else if name.len() > DM_NAME_MAX {
            format!("is too long: the device name would have more than {DM_NAME_MAX} bytes")
        } else {
            return Ok(Self(name));
        };
        Err(Error::new(ErrorKind::CannotCreate(format!(
            "the name of the logical volume '{}' {fault}",
            volume.escape_debug()
        ))))
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
    /// A partition on it, by its number.
    Partition(u32),
    /// A logical volume of the guest's LVM on it, by [`volume_hash`].
    LogicalVolume(u32),
}

impl DeviceRole {
    /// True for one that lies on the top device, and has to go before it can.
    pub fn is_above(self) -> bool {
        matches!(self, Self::Partition(_) | Self::LogicalVolume(_))
    }
}

impl fmt::Display for DeviceRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Top => f.write_str("top"),
            Self::Inner(index) => write!(f, "inner{index}"),
            Self::Partition(number) => write!(f, "{PARTITION}{number}"),
            Self::LogicalVolume(hash) => write!(f, "lv{hash:0VOLUME_DIGITS$x}"),
        }
    }
}

/// True for the UUID of any device of ours, also one of a later version, and for that of a
/// partition of one.
pub fn is_ours(uuid: &str) -> bool {
    match split_partition(uuid) {
        Some((_, of)) => of.starts_with(UUID_PREFIX),
        None => uuid.starts_with(UUID_PREFIX),
    }
}

/// The number in a partition's UUID, and the UUID of what it is a partition of.
fn split_partition(uuid: &str) -> Option<(u32, &str)> {
    let (number, of) = uuid.strip_prefix(PARTITION)?.split_once('-')?;
    Some((number.parse().ok()?, of))
}

/// The hash of a logical volume's names by which its role tells it from others of the same
/// disk.
pub fn volume_hash(group: &str, volume: &str) -> u32 {
    let mut hash = Sha256::new();
    hash.update(b"imgdm logical volume\0");
    hash.update((group.len() as u64).to_le_bytes());
    hash.update(group);
    hash.update(volume);
    let hash: [u8; 32] = hash.finalize().into();
    u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
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
    hex(&hash.finalize(), IDENTITY_DIGITS - NAME_DIGITS)
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
        identity.push_str(&hex(&Sha256::digest(name.as_str()), NAME_DIGITS));
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

    /// True where both are of the same files and snapshot, whatever their names and options.
    pub fn is_same_disk(&self, other: &Self) -> bool {
        let files = IDENTITY_DIGITS - NAME_DIGITS;
        self.identity.get(..files) == other.identity.get(..files)
            && self.snapshot == other.snapshot
            && self.depth == other.depth
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
        match self.role {
            DeviceRole::Partition(_) => {
                write!(f, "{}-{UUID_VERSION}{}", self.role, DeviceRole::Top)?
            }
            role => write!(f, "{UUID_VERSION}{role}")?,
        }
        write!(f, "-{}-{}-{}-{:08x}", self.identity, self.snapshot, self.depth, self.options)
    }
}

impl FromStr for DmUuid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || {
            let (partition, rest) = match split_partition(text) {
                Some((number, rest)) => (Some(number), rest),
                None => (None, text),
            };
            let mut parts = rest.strip_prefix(UUID_VERSION)?.split('-');
            let role = match (parts.next()?, partition) {
                ("top", None) => DeviceRole::Top,
                ("top", Some(number)) => DeviceRole::Partition(number),
                (role, _) => match role.strip_prefix("lv") {
                    Some(hash) => DeviceRole::LogicalVolume(u32::from_str_radix(hash, 16).ok()?),
                    None => DeviceRole::Inner(role.strip_prefix("inner")?.parse().ok()?),
                },
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
    /// The store of what is written to the device: the only loop that takes writes.
    Store,
}

impl LoopRole {
    /// The words for a loop's `lo_file_name`; never more than 63 bytes.
    pub fn file_name(&self) -> String {
        match self {
            Self::Zero => "imgdm:zero".to_owned(),
            Self::Scratch => "imgdm:scratch".to_owned(),
            Self::Store => "imgdm:store".to_owned(),
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
            "store" => return Some(Self::Store),
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

    #[test]
    fn devices_on_top_are_named_as_kpartx_names_them() {
        let name = |name: &str| DmName::new(name).unwrap();
        assert_eq!(name("disk").partition(1).as_str(), "disk1");
        assert_eq!(name("disk2").partition(10).as_str(), "disk2p10");
        for (volume, wanted) in [
            ("root", "disk-root"),
            ("inner", "disk-inner"),
            ("inner0", "disk--inner0"),
            ("inner0a", "disk-inner0a"),
        ] {
            assert_eq!(name("disk").logical_volume(volume).unwrap().as_str(), wanted);
        }
        assert_ne!(name("disk").logical_volume("inner0").unwrap(), name("disk").inner(0));
        for volume in ["", "a b", "a/b", "\u{e9}", &"x".repeat(123)] {
            assert!(name("disk").logical_volume(volume).is_err(), "{volume}");
        }
        assert!(name("disk").logical_volume(&"x".repeat(122)).is_ok());
        assert_ne!(volume_hash("a", "bc"), volume_hash("ab", "c"));

        let top = DmUuid::for_top(&name("disk"), &[], None, 0);
        let partition = top.with_role(DeviceRole::Partition(12));
        assert_eq!(partition.to_string(), format!("part12-{top}"));
        assert!(partition.same_attachment(&top));
        for spelling in [format!("part012-{top}"), format!("part1-{partition}")] {
            assert!(spelling.parse::<DmUuid>().is_err(), "{spelling}");
        }
        let inner = top.with_role(DeviceRole::Inner(0));
        assert!(format!("part1-{inner}").parse::<DmUuid>().is_err());
        assert!(is_ours("part3-IMGDM-2-of-a-later-version") && !is_ours("part3-LVM-x"));
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
            kind in 0..4, index: u32, layer: u32, device: u64, inode: u64, options: u32,
            name in "[a-z]{1,100}", snapshot: Option<(String, String)>, format: String,
        ) {
            let file = FileIdentity {
                layer, role: FileRole::DataFile, id: FileId { device, inode }, format,
            };
            let snapshot = snapshot.as_ref().map(|(id, name)| (id.as_str(), name.as_str()));
            let name = DmName::new(&name).unwrap();
            let role = match kind {
                0 => DeviceRole::Top,
                1 => DeviceRole::Inner(index),
                2 => DeviceRole::Partition(index),
                _ => DeviceRole::LogicalVolume(index),
            };
            let uuid = DmUuid::for_top(&name, &[file], snapshot, options).with_role(role);
            let text = uuid.to_string();
            prop_assert!(text.len() < DM_UUID_MAX, "{}", text);
            prop_assert!(is_ours(&text) && !is_ours(&text[1..]));
            prop_assert_eq!(text.parse::<DmUuid>().unwrap(), uuid);
            prop_assert!(name.inner(index).as_str().len() <= DM_NAME_MAX);
            prop_assert!(name.partition(index).as_str().len() <= DM_NAME_MAX);
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
