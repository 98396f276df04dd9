//! Checking an image's metadata: what contradicts itself, what is lost, what is wasted.
//!
//! Of qcow2 the numbers are those of `qemu-img check`, counted by the rules of QEMU's
//! block/qcow2-refcount.c; each is explained by findings, whose [counts](Finding::count) add
//! up to it. What qemu-img does not count is a [notice](Severity::Notice). Of qcow and cow,
//! for which qemu-img has no check, it is looked whether what the tables name is in the
//! file, and named once.
//!
//! A check goes on past damage and reads the image file alone: no backing file, no external
//! data file, no key.

mod cow;
mod extent;
mod finding;
mod log;
mod qcow;
mod qcow2;
mod references;
#[cfg(test)]
mod tests;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::source::Source;

pub use finding::{Finding, FindingKind, Place, Severity, Table};
pub use log::Counts;

use log::Log;

/// The numbers about an image that are no findings, 0 where they can't be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// The end of the last cluster that is in use, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those of the active layer that have data (or room for some) in the file.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file, compressed ones among them.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
}

/// What a check comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The image's format.
    pub format: Format,
    /// The numbers.
    pub numbers: Numbers,
    /// How many findings of each kind there are.
    pub counts: Counts,
    /// Some of the image could not be checked, so that QEMU gives up: there are findings of
    /// the severity [`Error`](Severity::Error) that say what. References may be missing from
    /// the count, so there are no leaks.
    pub incomplete: bool,
}

impl Report {
    fn new(format: Format, numbers: Numbers, log: &Log<'_>) -> Self {
        let counts = log.counts().clone();
        Self { format, numbers, incomplete: gives_up(&counts), counts }
    }

    /// QEMU's `check-errors`.
    pub fn check_errors(&self) -> u64 {
        self.counts.of_severity(Severity::Error)
    }

    /// QEMU's `corruptions`.
    pub fn corruptions(&self) -> u64 {
        self.counts.of_severity(Severity::Corruption)
    }

    /// QEMU's `leaks`: clusters.
    pub fn leaks(&self) -> u64 {
        self.counts.of_severity(Severity::Leak)
    }
}

/// QEMU goes on only where a refcount block can't be read.
fn gives_up(counts: &Counts) -> bool {
    counts.of_severity(Severity::Error) > counts.of(FindingKind::RefcountUnreadable)
}

/// How to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Most findings of each kind to tell of; all are counted. `None` for all: then they
    /// are told a few thousand at a time, and tables are walked one after the other.
    pub findings_of_a_kind: Option<u64>,
}

impl Default for Options {
    /// The first ten of each kind.
    fn default() -> Self {
        Self { findings_of_a_kind: Some(10) }
    }
}

/// True for formats that have metadata to check.
pub fn is_checkable(format: Format) -> bool {
    format != Format::Raw
}

/// Checks an image. `each` is told of findings as they are found: in the order of the file
/// for each part of the check.
///
/// # Errors
/// It can't be opened at all: its header breaks a bound without which nothing else can be
/// found. `Unsupported` where the format has nothing to check, or for unknown features.
pub fn check(
    source: &Source,
    format: Format,
    options: Options,
    each: &mut dyn FnMut(Finding),
) -> Result<Report> {
    let mut log = Log::new(options.findings_of_a_kind.unwrap_or(u64::MAX), each);
    let report = match format {
        Format::Raw => {
            let message = "the format raw has no metadata to check".to_owned();
            Err(Error::new(ErrorKind::Unsupported(message)))
        }
        Format::Qcow2 => qcow2::check(source, &mut log),
        Format::Qcow => qcow::check(source, &mut log),
        Format::Cow => cow::check(source, &mut log),
    };
    report.map_err(|error| error.at_path(source.path()))
}
