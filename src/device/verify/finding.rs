//! What a verification finds.

use std::path::PathBuf;

use crate::units::{ByteLen, GuestOffset, GuestRange};

/// In what respect an attachment is not what its image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FindingKind {
    /// The image can't be opened or resolved any more.
    Image,
    /// The snapshot that is attached is not in the image any more.
    Snapshot,
    /// The image's chain has other layers, or other formats, than what is attached.
    Layers,
    /// At the path of a file of the chain is another file now, or none.
    File,
    /// A file of the chain has no loop device that holds it.
    NotHeld,
    /// A live table or loop device is not read-only.
    Writable,
    /// A loop device does not start where its file does.
    LoopOffset,
    /// The device is longer or shorter than the virtual disk.
    Size,
    /// A partition's device is not what the partition table on the disk says.
    Partition,
    /// A logical volume's device is not what LVM's metadata on the disk says.
    LogicalVolume,
    /// A guest range comes from elsewhere than the image says.
    Mapping,
    /// A guest range lies past the end of its file: that was cut off.
    PastFileEnd,
    /// A guest range comes from a place that may be right, but has other bytes.
    Content,
    /// The device can't be read.
    Unreadable,
}

impl FindingKind {
    /// A stable name for scripts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Snapshot => "snapshot",
            Self::Layers => "layers",
            Self::File => "file",
            Self::NotHeld => "not-held",
            Self::Writable => "writable",
            Self::LoopOffset => "loop-offset",
            Self::Size => "size",
            Self::Partition => "partition",
            Self::LogicalVolume => "logical-volume",
            Self::Mapping => "mapping",
            Self::PastFileEnd => "past-end-of-file",
            Self::Content => "content",
            Self::Unreadable => "unreadable",
        }
    }
}

/// One thing that differs; of guest ranges the first of its kind, and how many there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// In what respect.
    pub kind: FindingKind,
    /// What it is, in words, but for file and guest range; names that it quotes are escaped.
    pub message: String,
    /// The file that it is about, where it is one.
    pub path: Option<PathBuf>,
    /// The first guest range; none where it is not about guest ranges. Path, message and what
    /// each side has are of its start.
    pub first: Option<GuestRange>,
    /// What the device has there, in words.
    pub live: Option<String>,
    /// What the image says, in words.
    pub fresh: Option<String>,
    /// Guest ranges concerned.
    pub ranges: u64,
    /// Bytes of all of them.
    pub bytes: ByteLen,
    /// Where the last one ends.
    pub(super) end: GuestOffset,
}

impl Finding {
    pub(super) fn new(kind: FindingKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            path: None,
            first: None,
            live: None,
            fresh: None,
            ranges: 0,
            bytes: ByteLen::ZERO,
            end: GuestOffset::ZERO,
        }
    }

    pub(super) fn at_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }
}

/// What a verification comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verification {
    findings: Vec<Finding>,
    notices: Vec<String>,
    /// Bytes that were read from the device or what lies below it, and compared.
    pub bytes_read: ByteLen,
    /// Bytes whose source is not to be seen any more: the partial last sectors of files that
    /// are reached through their loop devices only.
    pub bytes_not_compared: ByteLen,
}

impl Verification {
    /// True where nothing differs.
    pub fn is_same(&self) -> bool {
        self.findings.is_empty()
    }

    /// What differs.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// What is no difference, but to be known.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    pub(super) fn note(&mut self, what: impl Into<String>) {
        self.notices.push(what.into());
    }

    pub(super) fn add(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    /// Adds a guest range: the first of its kind as a finding of its own, which `describe`
    /// makes. Ranges of a kind come in guest order, mostly; neighbours count as one.
    pub(super) fn add_range(
        &mut self,
        kind: FindingKind,
        range: GuestRange,
        describe: impl FnOnce() -> Finding,
    ) {
        let index = self.findings.iter().position(|f| f.kind == kind && f.first.is_some());
        let index = index.unwrap_or_else(|| {
            self.findings.push(Finding {
                first: Some(range),
                kind,
                end: range.start,
                ..describe()
            });
            self.findings.len() - 1
        });
        let finding = &mut self.findings[index];
        if finding.ranges == 0 || finding.end != range.start {
            finding.ranges += 1;
        } else if let (Some(first), 1) = (&mut finding.first, finding.ranges) {
            first.end = range.end;
        }
        finding.bytes = ByteLen::new(finding.bytes.get().saturating_add(range.length().get()));
        finding.end = range.end;
    }
}
