//! `imgdm map --bitmap`: which parts of the disk a persistent bitmap says are dirty.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use imgdm::error::printable;
use imgdm::format::qcow2::Qcow2Image;
use imgdm::format::qcow2::bitmap::BitmapDirectoryEntry;
use imgdm::format::qcow2::dirty::for_each_dirty_run;
use imgdm::format::{Format, ImageFormat, Notice};
use imgdm::open::{OpenedFile, Warning, open_file};
use imgdm::source::Source;
use imgdm::units::{GuestOffset, GuestRange};
use imgdm::{Error, ErrorKind, Result};

use super::super::open::print_warnings;
use super::super::output::stdout;
use super::super::{Globals, workers};
use super::{Args, MapOutput};

/// Names of bitmaps that a message lists.
const LISTED: usize = 20;

/// Prints the runs of the bitmap `name` of the image itself: no other layer is opened.
pub(super) fn run(args: &Args, name: &OsStr, globals: Globals) -> anyhow::Result<()> {
    let is_json = match args.output {
        MapOutput::Human => false,
        MapOutput::Json => true,
        MapOutput::JsonFull => {
            return Err(Error::new(ErrorKind::Usage(
                "--output=json-full shows files, which a bitmap has none of: use --output=json"
                    .to_owned(),
            ))
            .into());
        }
    };
    let policy = args.open.policy();
    let OpenedFile { source, format, mut warnings } = open_file(&args.open.image, &policy)?;
    workers::shut_main_thread();
    let source = Arc::new(source);
    if format != Format::Qcow2 {
        return Err(no_bitmap(name, &format!("the format {format} has no bitmaps"))
            .at_path(source.path())
            .into());
    }
    let image = Qcow2Image::open_past_damage(Arc::clone(&source), None, policy.allow_corrupt)?;
    let warning = |notice: Notice| Warning { path: source.path().to_owned(), kind: notice.into() };
    warnings.extend(image.notices().into_iter().map(warning));
    print_warnings(&warnings, globals);
    let bitmap = find(&image, &source, name)?;
    let whole = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(image.virtual_size().get()));
    let dirty = Dirty { source: &source, image: &image, bitmap: &bitmap, range: args.range(whole) };
    if is_json { dirty.print_json() } else { dirty.print_human() }
}

fn no_bitmap(name: &OsStr, why: &str) -> Error {
    let name = printable(&name.to_string_lossy());
    Error::new(ErrorKind::NotFound(format!("no bitmap '{name}': {why}")))
}

fn find(image: &Qcow2Image, source: &Source, name: &OsStr) -> Result<BitmapDirectoryEntry> {
    let mut bitmaps = image.bitmaps()?;
    if let Some(index) = bitmaps.iter().position(|bitmap| bitmap.name == name.as_bytes()) {
        return Ok(bitmaps.swap_remove(index));
    }
    let mut names: Vec<_> =
        bitmaps.iter().take(LISTED).map(|bitmap| format!("'{}'", short(bitmap))).collect();
    if bitmaps.len() > LISTED {
        names.push(format!("and {} more", bitmaps.len() - LISTED));
    }
    let why = match (bitmaps.is_empty(), image.extensions()?.bitmaps.is_some()) {
        (false, _) => format!("the image has {}", names.join(", ")),
        (true, false) => "the image has no bitmaps".to_owned(),
        (true, true) => {
            "a program that does not know of bitmaps has written to the image, so that those it has are void (their autoclear bit is not set)".to_owned()
        }
    };
    Err(no_bitmap(name, &why).at_path(source.path()))
}

/// A bitmap's name, cut to a length for a list.
fn short(bitmap: &BitmapDirectoryEntry) -> String {
    let name = bitmap.display_name();
    let cut: String = name.chars().take(64).collect();
    if cut.len() < name.len() { cut + "..." } else { cut }
}

fn cannot_print(error: std::io::Error) -> Error {
    Error::io("cannot print", error)
}

/// What is to be printed.
struct Dirty<'a> {
    source: &'a Source,
    image: &'a Qcow2Image,
    bitmap: &'a BitmapDirectoryEntry,
    range: GuestRange,
}

impl Dirty<'_> {
    fn for_each_run(&self, mut each: impl FnMut(GuestRange, bool) -> Result<()>) -> Result<()> {
        let header = self.image.header();
        for_each_dirty_run(self.source, header, self.bitmap, self.range, &mut each)
    }

    /// Only the dirty ranges, as the table of a map is of data only.
    fn print_human(&self) -> anyhow::Result<()> {
        let mut out = stdout()?;
        writeln!(out, "{:<16}Length", "Offset")?;
        let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
        let outcome = self.for_each_run(|run, is_dirty| {
            if !is_dirty {
                return Ok(());
            }
            let (start, length) = (hex(run.start.get()), hex(run.length().get()));
            writeln!(out, "{start:<16}{length}").map_err(cannot_print)
        });
        out.flush()?;
        Ok(outcome?)
    }

    fn print_json(&self) -> anyhow::Result<()> {
        let mut out = stdout()?;
        out.write_all(b"[")?;
        let mut separator = "";
        let outcome = self.for_each_run(|run, is_dirty| {
            let (start, length) = (run.start.get(), run.length().get());
            let row = format_args!(
                "{separator}{{ \"start\": {start}, \"length\": {length}, \"dirty\": {is_dirty}}}"
            );
            out.write_fmt(row).map_err(cannot_print)?;
            separator = ",\n";
            Ok(())
        });
        // Left open where it broke off, as other maps are.
        if outcome.is_ok() {
            out.write_all(b"]\n")?;
        }
        out.flush()?;
        Ok(outcome?)
    }
}
