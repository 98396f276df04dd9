//! The record of an evidence attachment, as it stands in its file.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use imgdm::chain::Chain;
use imgdm::device::DeviceNumber;
use imgdm::source::Source;
use imgdm::status::FileRole;
use serde::{Deserialize, Serialize};

use crate::cli::output::JsonPath;

/// The version of this form, under the key by which a record is known.
pub(crate) const VERSION: u32 = 1;

/// What was attached, from which files, by whom and when.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Of this form.
    pub(crate) imgdm_evidence: u32,
    pub(crate) state: State,
    /// NAME.
    pub(crate) name: String,
    pub(crate) uuid: String,
    /// Bytes.
    pub(crate) virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) snapshot: Option<RecordedSnapshot>,
    /// The layers, the active one first.
    pub(crate) chain: Vec<RecordedLayer>,
    pub(crate) files: Vec<RecordedFile>,
    /// sha256 of the lines of `imgdm table` that are no comments.
    pub(crate) table_sha256: String,
    /// sha256 of all that the device gave after it was attached, with `--hash`.
    pub(crate) device_sha256: Option<String>,
    /// What was not as it should be when it was attached: a file system without locks, damage.
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
    pub(crate) attach: Act,
    pub(crate) detach: Option<Act>,
}

/// How far an attachment got. What was cut off stays as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// The files are hashed; perhaps there is no device yet.
    Attaching,
    /// The device is there.
    Attached,
    /// The files are hashed again; perhaps the device is still there.
    Detaching,
    /// The device is gone.
    Detached,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::Detached => "detached",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RecordedSnapshot {
    pub(crate) id: String,
    pub(crate) name: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RecordedLayer {
    pub(crate) depth: u32,
    pub(crate) format: String,
    /// The overlay, or `-f`, said so; else it was probed.
    pub(crate) format_declared: bool,
    pub(crate) virtual_size: u64,
    pub(crate) encrypted: bool,
}

/// A file of the chain.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RecordedFile {
    /// The depth of its layer.
    pub(crate) layer: u32,
    /// image or data-file.
    pub(crate) role: String,
    #[serde(flatten)]
    pub(crate) path: JsonPath,
    pub(crate) before: FileState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) after: Option<FileState>,
    /// What of it is not as before, once it was looked at after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) changed: Option<Vec<String>>,
    /// Why it could not be looked at after, or not all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) problem: Option<String>,
}

/// What the file system, or of a block device the kernel, says of a file, and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileState {
    /// MAJOR:MINOR that the file lies on; of a block device its own.
    pub(crate) device: String,
    /// None of a block device.
    pub(crate) inode: Option<u64>,
    /// Bytes.
    pub(crate) size: u64,
    /// Times in UTC, with nanoseconds (RFC 3339); none of a block device.
    pub(crate) accessed: Option<String>,
    pub(crate) modified: Option<String>,
    /// Of the inode itself.
    pub(crate) inode_changed: Option<String>,
    /// Of all its bytes, holes as zeros.
    pub(crate) sha256: Option<String>,
}

/// A run of imgdm.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Act {
    /// In UTC (RFC 3339).
    pub(crate) started: String,
    pub(crate) finished: Option<String>,
    /// imgdm and its version.
    pub(crate) tool: String,
    /// Its command line.
    pub(crate) arguments: Vec<String>,
    pub(crate) working_directory: Option<JsonPath>,
    pub(crate) by: Who,
    pub(crate) hostname: Option<String>,
    /// Release of the running kernel.
    pub(crate) kernel: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Who {
    pub(crate) uid: u32,
    pub(crate) effective_uid: u32,
    /// Who logged in, whatever became of the session since (audit).
    pub(crate) login_uid: Option<u32>,
    /// Who called sudo, as that tells it.
    pub(crate) sudo_uid: Option<String>,
    pub(crate) sudo_user: Option<String>,
}

/// Now, in UTC.
pub(crate) fn now() -> String {
    jiff::Timestamp::now().to_string()
}

fn time(seconds: i64, nanoseconds: i64) -> Option<String> {
    let time = jiff::Timestamp::new(seconds, i32::try_from(nanoseconds).ok()?).ok()?;
    // All digits, also where they are zeros.
    Some(format!("{time:.9}"))
}

fn line_of(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim_end().to_owned())
}

impl Act {
    /// This run, which is at it.
    pub(crate) fn begin() -> Self {
        let of_environment =
            |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        // The kernel's "nobody" where no one logged in.
        let login_uid = line_of("/proc/self/loginuid").and_then(|text| text.parse().ok());
        Self {
            started: now(),
            finished: None,
            tool: format!("imgdm {}", env!("CARGO_PKG_VERSION")),
            arguments: std::env::args_os()
                .map(|argument| argument.to_string_lossy().into_owned())
                .collect(),
            working_directory: std::env::current_dir().ok().as_deref().map(JsonPath::from),
            by: Who {
                uid: nix::unistd::getuid().as_raw(),
                effective_uid: nix::unistd::geteuid().as_raw(),
                login_uid: login_uid.filter(|&uid| uid != u32::MAX),
                sudo_uid: of_environment("SUDO_UID"),
                sudo_user: of_environment("SUDO_USER"),
            },
            hostname: line_of("/proc/sys/kernel/hostname"),
            kernel: line_of("/proc/sys/kernel/osrelease"),
        }
    }
}

impl FileState {
    /// Of a file that is open; its hash is not known yet.
    ///
    /// # Errors
    /// It can't be looked at.
    pub(crate) fn of(source: &Source) -> imgdm::Result<Self> {
        let fail =
            |error| imgdm::Error::io("cannot look at the file", error).at_path(source.path());
        let metadata = match source.file() {
            Some(file) => file.metadata().map_err(fail)?,
            None => std::fs::metadata(source.path()).map_err(fail)?,
        };
        Ok(Self { size: source.length().get(), ..Self::of_metadata(&metadata) })
    }

    /// Of what is at a path, without opening it. Of a block device the size is not known.
    pub(crate) fn of_path(path: &Path) -> std::io::Result<Self> {
        Ok(Self::of_metadata(&std::fs::metadata(path)?))
    }

    fn of_metadata(metadata: &Metadata) -> Self {
        let is_block = metadata.file_type().is_block_device();
        let device = if is_block { metadata.rdev() } else { metadata.dev() };
        let of_file = |time: Option<String>| time.filter(|_| !is_block);
        Self {
            device: DeviceNumber::from_dev(device).to_string(),
            inode: Some(metadata.ino()).filter(|_| !is_block),
            size: metadata.len(),
            accessed: of_file(time(metadata.atime(), metadata.atime_nsec())),
            modified: of_file(time(metadata.mtime(), metadata.mtime_nsec())),
            inode_changed: of_file(time(metadata.ctime(), metadata.ctime_nsec())),
            sha256: None,
        }
    }

    /// True for the same file, whatever became of it.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        (&self.device, self.inode) == (&other.device, other.inode)
    }

    /// What of `later` is not as it was, as far as both are known.
    pub(crate) fn differences(&self, later: &Self) -> Vec<String> {
        let differ = |of: fn(&Self) -> &Option<String>| {
            let (before, after) = (of(self), of(later));
            before.is_some() && after.is_some() && before != after
        };
        let differences = [
            ("file", !self.is_same_file(later)),
            // Of a block device that is not open.
            ("size", self.size != later.size && (self.inode.is_some() || later.size != 0)),
            ("content", differ(|state| &state.sha256)),
            ("modified", differ(|state| &state.modified)),
            ("inode-changed", differ(|state| &state.inode_changed)),
            (ACCESSED, differ(|state| &state.accessed)),
        ];
        let found = differences.iter().filter(|(_, differs)| *differs);
        found.map(|&(name, _)| name.to_owned()).collect()
    }
}

/// What says only that somebody read the file.
pub(crate) const ACCESSED: &str = "accessed";

/// Whether any of these says that a file is not what it was.
pub(crate) fn is_change(differences: &[String]) -> bool {
    differences.iter().any(|difference| difference != ACCESSED)
}

impl RecordedFile {
    pub(crate) fn path(&self) -> PathBuf {
        self.path.to_path()
    }
}

/// The layers of a chain.
///
/// # Errors
/// An encrypted layer's header is invalid.
pub(crate) fn layers(chain: &Chain) -> imgdm::Result<Vec<RecordedLayer>> {
    let layers = (0..).zip(chain.layers());
    layers
        .map(|(depth, layer)| {
            Ok(RecordedLayer {
                depth,
                format: layer.image.format().name().to_owned(),
                format_declared: layer.declared_format.is_some(),
                virtual_size: layer.image.virtual_size().get(),
                encrypted: layer.image.crypt_header()?.is_some(),
            })
        })
        .collect()
}

/// The name of a file's role in a record.
pub(crate) fn role_name(role: FileRole) -> &'static str {
    match role {
        FileRole::Image => "image",
        FileRole::DataFile => "data-file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> FileState {
        FileState {
            device: "8:1".to_owned(),
            inode: Some(12),
            size: 512,
            accessed: time(0, 0),
            modified: time(1, 5),
            inode_changed: time(2, 0),
            sha256: Some("00".to_owned()),
        }
    }

    #[test]
    fn times_have_all_their_nanoseconds() {
        assert_eq!(state().accessed.unwrap(), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(state().modified.unwrap(), "1970-01-01T00:00:01.000000005Z");
    }

    #[test]
    fn each_difference_has_its_name_and_a_read_is_no_change() {
        let before = state();
        assert_eq!(before.differences(&before), Vec::<String>::new());
        let read = FileState { accessed: time(9, 9), ..state() };
        assert_eq!(before.differences(&read), ["accessed"]);
        assert!(!is_change(&before.differences(&read)));
        let written = FileState {
            size: 1,
            modified: time(9, 0),
            inode_changed: time(9, 0),
            sha256: Some("01".to_owned()),
            ..state()
        };
        let differences = before.differences(&written);
        assert_eq!(differences, ["size", "content", "modified", "inode-changed"]);
        assert!(is_change(&differences));
        let other = FileState { inode: Some(13), sha256: None, ..state() };
        assert_eq!(before.differences(&other), ["file"]);
    }
}
