//! `imgdm check`: what is wrong with an image's metadata.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;
use std::sync::Arc;

use imgdm::check::{Finding, FindingKind, Options, Report, Severity, check, is_checkable};
use imgdm::format::Format;
use imgdm::lock::Sharing;
use imgdm::metadata::{Metadata, Walk};
use imgdm::open::{OpenPolicy, OpenedFile, open_file};
use serde::Serialize;

use super::metadata::{Viscera, print_human};
use super::open::print_warnings;
use super::output::{OutputFormat, show_path, stdout};
use super::{Globals, workers};

/// Exit statuses of `qemu-img check`.
const CLEAN: u8 = 0;
const CHECK_FAILED: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NO_CHECK: u8 = 63;

/// Check an image's metadata: refcounts, tables, flags, overlaps
///
/// Nothing is written, and only the image file itself is read: no backing file, no external
/// data file, no key is needed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm check disk.qcow2\n  imgdm check --output=json --all disk.qcow2 | jq '.findings[]'\n  imgdm check -M disk.qcow2\n\nExit status, as of qemu-img check: 0 no errors, 1 the check itself failed,\n2 the image is corrupt, 3 it only has leaked clusters, 63 the format (raw) has\nno metadata to check. Notices do not change it. An image that cannot be opened\nends with the status of the other commands, 64 to 77."
)]
pub(crate) struct Args {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    image: PathBuf,

    /// Format of the image (raw, qcow2, qcow, cow); without it the format is probed
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// Check even while another program writes to the image; what is read may be torn
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Print every finding, and not only the first ten of each kind
    #[arg(long)]
    all: bool,

    /// Print also where every piece of metadata lies, and what nothing refers to: in JSON
    /// under the key viscera
    #[arg(short = 'M', long)]
    metadata: bool,

    /// Output format
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// Opens, checks and prints; gives the exit status.
pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<u8> {
    let policy = OpenPolicy {
        format: args.format,
        sharing: if args.force_share { Sharing::Writers } else { Sharing::Readers },
        ..OpenPolicy::default()
    };
    let OpenedFile { source, format, warnings } = open_file(&args.image, &policy)?;
    workers::shut_main_thread();
    print_warnings(&warnings, globals);
    let source = Arc::new(source);
    let dumped = args.metadata.then(|| Metadata::read(Arc::clone(&source), format)).transpose()?;
    let walk = dumped.as_ref().map(Metadata::walk);
    let dump = dumped.as_ref().zip(walk.as_ref());
    let name = show_path(&args.image);
    if !is_checkable(format) {
        if dump.is_some() {
            Printer::new(args, format)?.finish(None, dump)?;
        }
        // Not globals.warn(): qemu-img says so even when it is to be quiet.
        writeln!(io::stderr(), "imgdm: {name}: the format {format} has no metadata to check")?;
        return Ok(NO_CHECK);
    }
    let mut options = Options::default();
    if args.all {
        options.findings_of_a_kind = None;
    }
    let mut printer = Printer::new(args, format)?;
    let checked = check(&source, format, options, &mut |finding| printer.finding(&finding));
    let report = match checked {
        Ok(report) => report,
        Err(error) => {
            // What can't be checked may still be looked into, and JSON that has begun has to
            // end.
            if dump.is_some() || printer.started {
                printer.finish(None, dump)?;
            }
            return Err(error.into());
        }
    };
    printer.finish(Some(&report), dump)?;
    if report.check_errors() > 0 {
        writeln!(io::stderr(), "imgdm: {name}: {}", failed(&report))?;
    }
    Ok(status(&report))
}

fn status(report: &Report) -> u8 {
    if report.check_errors() > 0 {
        CHECK_FAILED
    } else if report.corruptions() > 0 {
        CORRUPT
    } else if report.leaks() > 0 {
        LEAKS
    } else {
        CLEAN
    }
}

fn failed(report: &Report) -> &'static str {
    if report.incomplete {
        "the check failed: not all of the image could be checked"
    } else {
        "the check failed: some refcounts could not be read"
    }
}

/// Prints findings as they come, and the numbers at the end.
struct Printer<'a> {
    args: &'a Args,
    format: Format,
    out: BufWriter<File>,
    /// How often the findings that were printed count, by kind.
    printed: BTreeMap<FindingKind, u64>,
    started: bool,
    /// The first error of writing; nothing is written after it.
    outcome: io::Result<()>,
}

impl<'a> Printer<'a> {
    fn new(args: &'a Args, format: Format) -> io::Result<Self> {
        let (printed, started, outcome) = (BTreeMap::new(), false, Ok(()));
        Ok(Self { args, format, out: stdout()?, printed, started, outcome })
    }

    fn finding(&mut self, finding: &Finding) {
        *self.printed.entry(finding.kind).or_default() += finding.count;
        if self.outcome.is_ok() {
            self.outcome = self.try_finding(finding);
        }
    }

    fn try_finding(&mut self, finding: &Finding) -> io::Result<()> {
        match self.args.output {
            OutputFormat::Human => human_finding(&mut self.out, finding),
            OutputFormat::Json => {
                let is_first = !self.started;
                self.start_json()?;
                self.out.write_all(if is_first { b"\n" } else { b",\n" })?;
                self.out.write_all(b"    ")?;
                serde_json::to_writer(&mut self.out, &JsonFinding::from(finding))
                    .map_err(io::Error::from)
            }
        }
    }

    /// Opens the object and its list of findings.
    fn start_json(&mut self) -> io::Result<()> {
        if std::mem::replace(&mut self.started, true) {
            return Ok(());
        }
        // As given, like qemu-img's.
        let name = serde_json::to_string(&self.args.image.to_string_lossy())?;
        let format = self.format.name();
        write!(
            self.out,
            "{{\n  \"filename\": {name},\n  \"format\": \"{format}\",\n  \"findings\": ["
        )
    }

    /// Prints the numbers, where the check came to some, and the metadata, where it is asked
    /// for.
    fn finish(
        mut self,
        report: Option<&Report>,
        dump: Option<(&Metadata, &Walk<'_>)>,
    ) -> io::Result<()> {
        self.outcome?;
        self.outcome = Ok(());
        match self.args.output {
            OutputFormat::Human => {
                if let Some(report) = report {
                    human_report(&mut self.out, report, &self.printed)?;
                }
                if let Some((metadata, walk)) = dump {
                    if report.is_some() {
                        writeln!(self.out)?;
                    }
                    print_human(&mut self.out, metadata, walk)?;
                }
            }
            OutputFormat::Json => {
                let some = self.started;
                self.start_json()?;
                self.out.write_all(if some { b"\n  ],\n" } else { b"],\n" })?;
                let rest = JsonRest {
                    report: report.map(JsonReport::from),
                    viscera: dump.map(|(metadata, walk)| Viscera::new(metadata, walk)),
                };
                serde_json::to_writer_pretty(AfterBrace::new(&mut self.out), &rest)
                    .map_err(io::Error::from)?;
                writeln!(self.out)?;
            }
        }
        self.out.flush()
    }
}

/// Writes the rest of an object that has begun: all but its opening brace and line end.
struct AfterBrace<W> {
    out: W,
    left_out: usize,
}

impl<W: Write> AfterBrace<W> {
    fn new(out: W) -> Self {
        Self { out, left_out: "{\n".len() }
    }
}

impl<W: Write> Write for AfterBrace<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left_out = self.left_out.min(bytes.len());
        self.left_out -= left_out;
        self.out.write_all(&bytes[left_out..])?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn human_finding(out: &mut impl Write, finding: &Finding) -> io::Result<()> {
    let Finding { kind, host, length, guest, place, count, message } = finding;
    write!(out, "{} {kind}: {message}", kind.severity().name())?;
    if let Some(host) = host {
        write!(out, "; host {host}")?;
    }
    if let (Some(_), Some(length)) = (host, length) {
        write!(out, " + {}", length.get())?;
    }
    if let Some(guest) = guest {
        write!(out, "; guest {guest}")?;
    }
    if let Some(place) = place {
        write!(out, " ({place})")?;
    }
    if *count > 1 {
        write!(out, " x {count}")?;
    }
    writeln!(out)
}

fn human_report(
    out: &mut impl Write,
    report: &Report,
    printed: &BTreeMap<FindingKind, u64>,
) -> io::Result<()> {
    for (kind, count) in report.counts.iter() {
        let more = count.saturating_sub(printed.get(&kind).copied().unwrap_or(0));
        if more > 0 {
            writeln!(out, "{} {kind}: {more} more (--all prints them)", kind.severity().name())?;
        }
    }
    let (errors, corruptions, leaks) =
        (report.check_errors(), report.corruptions(), report.leaks());
    let notices = report.counts.of_severity(Severity::Notice);
    if errors + corruptions + leaks == 0 {
        writeln!(out, "No errors were found on the image.")?;
    }
    if corruptions > 0 {
        writeln!(
            out,
            "\n{corruptions} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it."
        )?;
    }
    if leaks > 0 {
        writeln!(
            out,
            "\n{leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data."
        )?;
    }
    if errors > 0 {
        writeln!(out, "\n{errors} internal errors have occurred during the check.")?;
    }
    if notices > 0 {
        writeln!(out, "{notices} notices.")?;
    }
    let numbers = report.numbers;
    if numbers.total_clusters != 0 && numbers.allocated_clusters != 0 {
        let allocated = numbers.allocated_clusters;
        writeln!(
            out,
            "{allocated}/{} = {}% allocated, {}% fragmented, {}% compressed clusters",
            numbers.total_clusters,
            percent(allocated, numbers.total_clusters),
            percent(numbers.fragmented_clusters, allocated),
            percent(numbers.compressed_clusters, allocated),
        )?;
    }
    if numbers.image_end_offset != 0 {
        writeln!(out, "Image end offset: {}", numbers.image_end_offset)?;
    }
    Ok(())
}

/// A share as printf's %.2f shows it.
#[allow(clippy::cast_precision_loss)]
fn percent(part: u64, whole: u64) -> String {
    format!("{:.2}", part as f64 * 100.0 / whole as f64)
}

/// An element of `findings`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonFinding<'a> {
    kind: &'static str,
    severity: &'static str,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    host_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<u32>,
    message: &'a str,
}

impl<'a> From<&'a Finding> for JsonFinding<'a> {
    fn from(finding: &'a Finding) -> Self {
        let place = finding.place;
        Self {
            kind: finding.kind.name(),
            severity: finding.kind.severity().name(),
            count: finding.count,
            host_offset: finding.host.map(|offset| offset.get()),
            length: finding.length.map(|length| length.get()),
            guest_offset: finding.guest.map(|offset| offset.get()),
            table: place.map(|place| place.table.name()),
            table_offset: place.map(|place| place.offset.get()),
            entry: place.and_then(|place| place.entry),
            snapshot: place.and_then(|place| place.snapshot),
            message: &finding.message,
        }
    }
}

/// What follows the findings.
#[derive(Serialize)]
struct JsonRest<'a> {
    #[serde(flatten)]
    report: Option<JsonReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    viscera: Option<Viscera<'a>>,
}

/// The keys of `qemu-img check`, left out where it leaves them
/// out, and the counts behind them.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonReport {
    finding_counts: BTreeMap<&'static str, u64>,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    /// Not all of the image could be checked; qemu-img prints no numbers then.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    incomplete: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl From<&Report> for JsonReport {
    fn from(report: &Report) -> Self {
        let numbers = report.numbers;
        Self {
            finding_counts: report.counts.iter().map(|(kind, n)| (kind.name(), n)).collect(),
            check_errors: report.check_errors(),
            image_end_offset: numbers.image_end_offset,
            corruptions: report.corruptions(),
            leaks: report.leaks(),
            total_clusters: numbers.total_clusters,
            allocated_clusters: numbers.allocated_clusters,
            fragmented_clusters: numbers.fragmented_clusters,
            compressed_clusters: numbers.compressed_clusters,
            incomplete: report.incomplete,
        }
    }
}
