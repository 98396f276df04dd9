//! `imgdm explain --reverse`: what a byte of a file is.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use imgdm::chain::Chain;
use imgdm::error::printable;
use imgdm::explain::{ByteUse, GuestUse, GuestUseKind, LayerProblem, SnapshotName, Visibility};
use imgdm::source::FileId;
use imgdm::status::FileRole;
use imgdm::units::{ByteLen, HostOffset};
use imgdm::{Error, ErrorKind, Result};
use serde::Serialize;

use super::forward::json_path;
use super::steps::{JsonSnapshot, Stored};
use super::{Shown, parse_place};
use crate::cli::output::{JsonPath, show_path};

/// `FILE:OFFSET`; without a FILE the image itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilePlace {
    file: Option<PathBuf>,
    offset: u64,
}

impl FilePlace {
    /// Splits at the last colon.
    pub(super) fn parse(text: &OsString) -> Result<Self> {
        let bytes = text.as_bytes();
        let usage = |what: String| Error::new(ErrorKind::Usage(what));
        let Some(colon) = bytes.iter().rposition(|&byte| byte == b':') else {
            let message = "--reverse takes FILE:OFFSET, or :OFFSET for the image itself";
            return Err(usage(message.to_owned()));
        };
        let (file, offset) = (&bytes[..colon], &bytes[colon + 1..]);
        let offset = parse_place(&String::from_utf8_lossy(offset))
            .map_err(|error| usage(format!("the offset of --reverse is {error}")))?;
        let file = (!file.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(file)));
        Ok(Self { file, offset })
    }

    pub(super) fn offset(&self) -> HostOffset {
        HostOffset::new(self.offset)
    }

    /// Which of the chain's files it is.
    pub(super) fn find(&self, chain: &Chain) -> Result<(u32, FileRole)> {
        let Some(path) = &self.file else { return Ok((0, FileRole::Image)) };
        let id = FileId::of_path(path).ok_or_else(|| {
            Error::new(ErrorKind::NotFound("cannot look at the file of --reverse".to_owned()))
                .at_path(path)
        })?;
        let layers = (0u32..).zip(chain.layers());
        let mut files =
            layers.flat_map(|(depth, layer)| layer.files().map(move |file| (depth, file)));
        let found = files.find(|(_, (_, file))| file.id() == Some(id));
        found.map(|(depth, (role, _))| (depth, role)).ok_or_else(|| {
            Error::new(ErrorKind::Usage("this is not a file of the image's chain".to_owned()))
                .at_path(path)
        })
    }
}

/// The whole report.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    #[serde(skip)]
    found: &'a ByteUse,
    #[serde(flatten)]
    file: JsonPath,
    /// The layer whose file it is, and whether its image file or its data file.
    depth: u32,
    role: &'static str,
    offset: u64,
    /// The file ends before the byte.
    past_end: bool,
    metadata: Vec<JsonPiece>,
    guests: Vec<JsonUse<'a>>,
    /// Set where nothing refers to the byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    unclaimed: Option<JsonRange>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refcount: Option<JsonRefcount>,
    /// There are more uses than are listed.
    truncated: bool,
    /// What damaged metadata may have led to the byte.
    problems: Vec<JsonProblem>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problems_omitted: Option<u64>,
}

#[derive(Debug, Serialize)]
struct JsonProblem {
    depth: u32,
    kind: &'static str,
    offset: u64,
    message: String,
}

#[derive(Debug, Serialize)]
struct JsonPiece {
    kind: &'static str,
    offset: u64,
    length: u64,
    what: String,
}

#[derive(Debug, Serialize)]
struct JsonUse<'a> {
    #[serde(skip)]
    found: &'a GuestUse,
    /// None for the active layer.
    snapshot: Option<JsonSnapshot>,
    guest_offset: u64,
    kind: &'static str,
    /// Of a compressed stream: where it starts, and its length at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_length: Option<u64>,
    visibility: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hidden_by: Option<u32>,
    /// The layer that can't tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged_layer: Option<u32>,
}

#[derive(Debug, Serialize)]
struct JsonRange {
    #[serde(rename = "use")]
    used: &'static str,
    offset: u64,
    length: u64,
}

#[derive(Debug, Serialize)]
struct JsonRefcount {
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table_entry_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table_entry: Option<Stored>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl<'a> Report<'a> {
    pub(super) fn of(chain: &Chain, found: &'a ByteUse) -> Option<Self> {
        let layer = chain.layers().get(found.depth as usize)?;
        let offset = found.place.offset.get();
        let refcount = found.refcount.as_ref().map(|refcount| match refcount {
            Ok(refcount) => JsonRefcount {
                count: Some(refcount.count),
                at: refcount.at.map(HostOffset::get),
                table_entry_at: Some(refcount.table_entry_at.get()),
                table_entry: Some(Stored(refcount.table_entry)),
                problem: None,
            },
            Err(error) => JsonRefcount {
                count: None,
                at: None,
                table_entry_at: None,
                table_entry: None,
                problem: Some(error.without_path()),
            },
        });
        Some(Self {
            found,
            file: json_path(layer, found.place.file),
            depth: found.depth,
            role: match found.place.file {
                FileRole::Image => "image",
                FileRole::DataFile => "data-file",
            },
            offset,
            past_end: offset >= found.file_length.get(),
            metadata: found
                .metadata
                .iter()
                .map(|(piece, what)| JsonPiece {
                    kind: piece.kind.name(),
                    offset: piece.offset.get(),
                    length: piece.length.get(),
                    what: what.clone(),
                })
                .collect(),
            guests: found.guests.iter().map(JsonUse::of).collect(),
            unclaimed: found.unclaimed.map(|range| JsonRange {
                used: range.used.name(),
                offset: range.offset.get(),
                length: range.length.get(),
            }),
            refcount,
            truncated: found.truncated,
            problems: found
                .problems
                .iter()
                .map(|LayerProblem { depth, problem }| JsonProblem {
                    depth: *depth,
                    kind: problem.kind.name(),
                    offset: problem.offset.get(),
                    message: problem.to_string(),
                })
                .collect(),
            problems_omitted: (found.problems_omitted > 0).then_some(found.problems_omitted),
        })
    }
}

impl<'a> JsonUse<'a> {
    fn of(found: &'a GuestUse) -> Self {
        let (kind, stream) = match found.kind {
            GuestUseKind::Data => ("data", None),
            GuestUseKind::Compressed { stream, length } => ("compressed", Some((stream, length))),
            GuestUseKind::KeptForZeros => ("kept-for-zeros", None),
            GuestUseKind::KeptUnallocated => ("kept-unallocated", None),
            GuestUseKind::Contradiction => ("contradiction", None),
            GuestUseKind::PastDisk => ("past-disk", None),
        };
        let (visibility, hidden_by, damaged_layer) = match found.visibility {
            Visibility::Shown => ("shown", None, None),
            Visibility::HiddenBy(depth) => ("hidden", Some(depth), None),
            Visibility::OutOfReach => ("out-of-reach", None, None),
            Visibility::Damaged(depth) => ("damaged", None, Some(depth)),
            Visibility::OtherState => ("other-state", None, None),
            Visibility::NotRead => ("not-read", None, None),
        };
        Self {
            found,
            snapshot: found
                .snapshot
                .clone()
                .map(|SnapshotName { id, name }| JsonSnapshot { id, name }),
            guest_offset: found.guest.get(),
            kind,
            stream_offset: stream.map(|(stream, _)| stream.get()),
            stream_length: stream.map(|(_, length): (_, ByteLen)| length.get()),
            visibility,
            hidden_by,
            damaged_layer,
        }
    }

    fn print(&self, out: &mut impl Write) -> io::Result<()> {
        let guest = self.guest_offset;
        match self.found.kind {
            GuestUseKind::Data => write!(out, "byte {guest:#x} of the disk")?,
            GuestUseKind::Compressed { stream, length } => write!(
                out,
                "in the compressed stream at {stream} (at most {} bytes), which gives the cluster at {guest:#x} of the disk",
                length.get()
            )?,
            GuestUseKind::KeptForZeros => {
                write!(out, "kept for byte {guest:#x} of the disk, which reads as zero")?;
            }
            GuestUseKind::KeptUnallocated => {
                write!(out, "kept for byte {guest:#x} of the disk, which is the backing file's")?;
            }
            GuestUseKind::Contradiction => {
                write!(
                    out,
                    "kept for byte {guest:#x} of the disk, whose entry contradicts itself"
                )?;
            }
            GuestUseKind::PastDisk => {
                write!(out, "byte {guest:#x} past the end of the disk (VM state, or nothing)")?;
            }
        }
        match &self.snapshot {
            None => write!(out, ", active layer")?,
            Some(JsonSnapshot { id, name }) => {
                write!(out, ", snapshot {} ({})", printable(id), printable(name))?;
            }
        }
        match self.found.visibility {
            Visibility::Shown => writeln!(out, ": the chain shows it"),
            Visibility::HiddenBy(depth) => writeln!(out, ": hidden by layer {depth}"),
            Visibility::OutOfReach => writeln!(out, ": the chain does not reach so far"),
            Visibility::Damaged(depth) => {
                writeln!(out, ": layer {depth} is damaged there, whether it is read can't be told")
            }
            Visibility::OtherState => writeln!(out, ": not what the chain reads of this image"),
            Visibility::NotRead => writeln!(out, ": not read"),
        }
    }
}

/// Lists on stderr what damage may have led to the byte or away from it, and fails where there
/// is any.
///
/// # Errors
/// There is damage.
pub(super) fn report_problems(chain: &Chain, found: &ByteUse) -> anyhow::Result<()> {
    let count = found.problems.len() as u64 + found.problems_omitted;
    if count == 0 {
        return Ok(());
    }
    let mut err = io::BufWriter::new(io::stderr());
    for LayerProblem { depth, problem } in &found.problems {
        let layer = chain.layers().get(*depth as usize);
        let path = layer.map(|layer| format!("{}: ", show_path(layer.source.path())));
        let path = path.unwrap_or_default();
        writeln!(err, "imgdm: {path}at offset {}: {problem}", problem.offset)?;
    }
    if found.problems_omitted > 0 {
        writeln!(err, "imgdm: and {} more like these", found.problems_omitted)?;
    }
    err.flush()?;
    let message = format!(
        "the metadata is damaged in {count} place{}; what that leads to is not known",
        if count == 1 { "" } else { "s" }
    );
    Err(Error::invalid(message).into())
}

impl Shown for Report<'_> {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut out = out;
        let (offset, depth) = (self.offset, self.depth);
        let role = match self.found.place.file {
            FileRole::Image => "",
            FileRole::DataFile => "'s data file",
        };
        writeln!(
            out,
            "byte {offset} ({offset:#x}) of {} (layer {depth}{role})",
            self.file.shown()
        )?;
        if self.past_end {
            writeln!(out, "  - the file ends before it")?;
        }
        for JsonPiece { offset, length, what, .. } in &self.metadata {
            writeln!(out, "  - {what} ({length} bytes at {offset:#x})")?;
        }
        for found in &self.guests {
            write!(out, "  - ")?;
            found.print(&mut out)?;
        }
        let nothing =
            if self.problems.is_empty() { "nothing" } else { "nothing that could be read" };
        if let Some(JsonRange { used, offset, length }) = &self.unclaimed {
            writeln!(out, "  - {nothing} refers to it: {used} ({length} bytes at {offset:#x})")?;
        }
        if self.metadata.is_empty()
            && self.guests.is_empty()
            && self.unclaimed.is_none()
            && !self.past_end
        {
            writeln!(out, "  - {nothing} refers to it")?;
        }
        if self.truncated {
            writeln!(out, "  - and there is more than imgdm keeps in memory")?;
        }
        match &self.refcount {
            Some(JsonRefcount { count: Some(count), at: Some(at), .. }) => {
                writeln!(out, "refcount of its cluster: {count} (at {at:#x})")
            }
            Some(JsonRefcount { count: Some(count), .. }) => {
                writeln!(out, "refcount of its cluster: {count} (there is no refcount block)")
            }
            Some(JsonRefcount { problem: Some(problem), .. }) => {
                writeln!(out, "refcount of its cluster: can't be told: {}", printable(problem))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_split_at_its_last_colon() {
        let parse = |text: &str| FilePlace::parse(&OsString::from(text));
        let place =
            |file: Option<&str>, offset| FilePlace { file: file.map(PathBuf::from), offset };
        assert_eq!(parse("a.qcow2:0x200").unwrap(), place(Some("a.qcow2"), 512));
        assert_eq!(parse("a:b:8s").unwrap(), place(Some("a:b"), 4096));
        assert_eq!(parse(":4k").unwrap(), place(None, 4096));
        for bad in ["a.qcow2", "a.qcow2:", "a:x", ""] {
            assert!(matches!(parse(bad).unwrap_err().kind(), ErrorKind::Usage(_)), "{bad}");
        }
    }
}
