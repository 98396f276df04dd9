//! `imgdm map`: which file, at which offset, holds each part of the disk.

mod bitmap;

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use imgdm::chain::{Chain, HoleQuery};
use imgdm::damage::DamageList;
use imgdm::extent::{Extent, Mapping, ZeroCause};
use imgdm::status::{FileRole, ZeroStatus};
use imgdm::units::{GuestOffset, GuestRange};
use imgdm::{Error, ErrorKind, Result};

use super::damage::{open_to_look, report_damage};
use super::open::{FiemapArgs, OpenArgs, parse_size};
use super::output::{JsonPath, stdout};
use super::{Globals, workers};

/// Show where each part of the disk lies, as `qemu-img map` does
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm map disk.qcow2\n  imgdm map --output=json -l before-update disk.qcow2\n  imgdm map --output=json-full --start-offset 1M --max-length 64k disk.qcow2\n  imgdm map --bitmap since-backup --output=json disk.qcow2\n\nDamaged metadata does not end the map: what it spoils is listed on stderr and is, in\nJSON, present but neither zero nor data; the exit status is then 65."
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// human and json are those of qemu-img; json-full adds file, layer, the length of
    /// compressed data and why a range is zero
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: MapOutput,

    /// Begin at this offset of the disk
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = parse_size)]
    start_offset: u64,

    /// Stop after this many bytes
    #[arg(long, value_name = "N", value_parser = parse_size)]
    max_length: Option<u64>,

    /// Ask the host's file system for holes below every data cluster
    #[arg(long)]
    deep: bool,

    /// Show what this persistent bitmap of the image itself says is dirty, and no layers
    #[arg(long, value_name = "NAME", conflicts_with_all = ["snapshot", "deep"])]
    bitmap: Option<OsString>,

    #[command(flatten)]
    fiemap: FiemapArgs,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum MapOutput {
    /// Only the parts that hold data
    #[default]
    Human,
    /// Every part, one object a line
    Json,
    /// As json, with file, layer and cause
    JsonFull,
}

impl Args {
    /// The part of the disk that is asked for.
    fn range(&self, whole: GuestRange) -> GuestRange {
        let end = self.max_length.map_or(whole.end, |length| {
            whole.end.min(GuestOffset::new(self.start_offset.saturating_add(length)))
        });
        GuestRange::new(GuestOffset::new(self.start_offset), end)
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    if let Some(name) = &args.bitmap {
        return bitmap::run(args, name, globals);
    }
    let mut policy = args.open.policy();
    if args.output == MapOutput::JsonFull {
        args.fiemap.apply(&mut policy);
    }
    let (chain, damaged) = open_to_look(&args.open, policy, globals)?;
    workers::shut_main_thread();
    let chain = &chain;
    let range = args.range(chain.whole());
    let holes = if args.deep { HoleQuery::Deep } else { HoleQuery::AsQemu };
    let found = match args.output {
        MapOutput::Human => human(chain, range, holes),
        MapOutput::Json => json(chain, range, holes),
        MapOutput::JsonFull => json_full(chain, range, holes),
    }?;
    report_damage(&damaged, &found, "the disk", "mapped")
}

/// A row as qemu-img knows it (MapEntry of qemu-img.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    role: FileRole,
}

impl Row {
    fn of(extent: &Extent) -> Self {
        let place = extent.mapping.place();
        Self {
            start: extent.start.get(),
            length: extent.length.get(),
            depth: extent.depth,
            present: extent.mapping.is_present(),
            zero: extent.mapping.is_zero(),
            data: extent.mapping.is_data(),
            compressed: extent.mapping.is_compressed(),
            offset: place.map(|place| place.offset.get()),
            role: place.map_or(FileRole::Image, |place| place.file),
        }
    }

    /// What qemu-img prints for an empty range.
    fn empty(start: u64) -> Self {
        Self {
            start,
            length: 0,
            depth: 0,
            present: false,
            zero: false,
            data: false,
            compressed: false,
            offset: None,
            role: FileRole::Image,
        }
    }

    /// qemu-img's entry_mergeable().
    fn takes(&self, next: &Row) -> bool {
        self.depth == next.depth
            && self.present == next.present
            && self.zero == next.zero
            && self.data == next.data
            && self.compressed == next.compressed
            && self.role == next.role
            && match (self.offset, next.offset) {
                (Some(a), Some(b)) => a.checked_add(self.length) == Some(b),
                (None, None) => true,
                _ => false,
            }
    }
}

/// Calls `each` with the rows of the range, merged as qemu-img merges them, and whether
/// it is the last.
fn for_each_row(
    chain: &Chain,
    range: GuestRange,
    holes: HoleQuery,
    each: &mut dyn FnMut(&Row, bool) -> Result<()>,
) -> Result<DamageList> {
    let mut pending: Option<Row> = None;
    let damage = chain.for_each_extent_past_damage(range, holes, &mut |extent| {
        let next = Row::of(extent);
        match &mut pending {
            Some(row) if row.takes(&next) => row.length += next.length,
            Some(row) => {
                let done = std::mem::replace(row, next);
                each(&done, false)?;
            }
            None => pending = Some(next),
        }
        Ok(())
    })?;
    each(&pending.unwrap_or_else(|| Row::empty(range.start.get())), true)?;
    Ok(damage)
}

fn human(chain: &Chain, range: GuestRange, holes: HoleQuery) -> anyhow::Result<DamageList> {
    let mut out = stdout()?;
    writeln!(out, "{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")?;
    let hex = |number: u64| if number == 0 { "0".to_owned() } else { format!("{number:#x}") };
    let outcome = for_each_row(chain, range, holes, &mut |row, _| {
        let layer = &chain.layers()[row.depth as usize];
        if row.data && row.offset.is_none() {
            return Err(Error::new(ErrorKind::NotRepresentable(
                "the image holds compressed or encrypted clusters, which have no offset; --output=json shows them"
                    .to_owned(),
            ))
            .at_path(layer.source.path()));
        }
        if row.data && !row.zero {
            let fields = [row.start, row.length, row.offset.unwrap_or(0)].map(hex);
            let path = layer.file(row.role).path().as_os_str().as_bytes();
            let [start, length, offset] = fields;
            write!(out, "{start:<16}{length:<16}{offset:<16}")
                .and_then(|()| out.write_all(path))
                .and_then(|()| out.write_all(b"\n"))
                .map_err(|error| Error::io("cannot print", error))?;
        }
        Ok(())
    });
    out.flush()?;
    Ok(outcome?)
}

/// What of a row is the same in most rows of an image: formatted once for many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Middle {
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    has_offset: bool,
}

impl Middle {
    fn of(row: &Row) -> Self {
        Self {
            length: row.length,
            depth: row.depth,
            present: row.present,
            zero: row.zero,
            data: row.data,
            compressed: row.compressed,
            has_offset: row.offset.is_some(),
        }
    }

    /// The text between the start and the offset.
    fn text(self) -> Vec<u8> {
        let Self { length, depth, present, zero, data, compressed, has_offset } = self;
        let offset = if has_offset { ", \"offset\": " } else { "" };
        format!(
            ", \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}"
        )
        .into_bytes()
    }
}

/// Formats rows as qemu-img's JSON objects. By hand: this is most of the time that a map
/// of a million extents takes.
#[derive(Debug, Default)]
struct JsonRows {
    text: Vec<u8>,
    middle: Option<Middle>,
    middle_text: Vec<u8>,
}

impl JsonRows {
    fn push(&mut self, row: &Row) {
        let middle = Middle::of(row);
        if self.middle != Some(middle) {
            self.middle = Some(middle);
            self.middle_text = middle.text();
        }
        let mut digits = itoa::Buffer::new();
        let text = &mut self.text;
        text.extend_from_slice(b"{ \"start\": ");
        text.extend_from_slice(digits.format(row.start).as_bytes());
        text.extend_from_slice(&self.middle_text);
        if let Some(offset) = row.offset {
            text.extend_from_slice(digits.format(offset).as_bytes());
        }
        text.push(b'}');
    }

    fn push_with_comma(&mut self, row: &Row) {
        self.push(row);
        self.text.extend_from_slice(b",\n");
    }
}

/// One window's rows: those at its ends may merge with the neighbouring windows', those
/// between are text already.
#[derive(Debug, Default)]
struct JsonWindow {
    first: Option<Row>,
    between: Vec<u8>,
    last: Option<Row>,
}

impl JsonWindow {
    /// Formats the rows of `extents` into `between`, which is empty.
    fn of(extents: impl Iterator<Item = Extent>, between: Vec<u8>) -> Self {
        let mut rows = JsonRows { text: between, ..JsonRows::default() };
        let mut first = None;
        let mut pending: Option<Row> = None;
        extents.for_each(|extent| {
            let next = Row::of(&extent);
            if let Some(row) = &mut pending {
                if row.takes(&next) {
                    row.length += next.length;
                    return;
                }
                if first.is_none() {
                    first = Some(*row);
                } else {
                    rows.push_with_comma(row);
                }
            }
            pending = Some(next);
        });
        let last = if first.is_some() { pending } else { None };
        Self { first: first.or(pending), between: rows.text, last }
    }
}

/// Puts the windows' rows together.
#[derive(Debug, Default)]
struct JsonMap {
    pending: Option<Row>,
    rows: JsonRows,
}

impl JsonMap {
    /// Takes the next window and writes the rows that can grow no more; gives back the
    /// window's text, to be written over.
    fn take(&mut self, window: JsonWindow, out: &mut impl Write) -> std::io::Result<Vec<u8>> {
        let JsonWindow { first, mut between, last } = window;
        match (&mut self.pending, first) {
            (Some(row), Some(first)) if row.takes(&first) => row.length += first.length,
            (Some(row), Some(first)) => {
                self.rows.push_with_comma(row);
                *row = first;
            }
            (None, first) => self.pending = first,
            (Some(_), None) => {}
        }
        if let (Some(row), Some(last)) = (&mut self.pending, last) {
            self.rows.push_with_comma(row);
            *row = last;
        }
        out.write_all(&self.rows.text)?;
        self.rows.text.clear();
        out.write_all(&between)?;
        between.clear();
        Ok(between)
    }

    /// Writes the last row; `start` is where the map starts.
    fn finish(mut self, start: GuestOffset, out: &mut impl Write) -> std::io::Result<()> {
        self.rows.push(&self.pending.unwrap_or_else(|| Row::empty(start.get())));
        out.write_all(&self.rows.text)
    }
}

fn json(chain: &Chain, range: GuestRange, holes: HoleQuery) -> anyhow::Result<DamageList> {
    let mut out = stdout()?;
    out.write_all(b"[")?;
    let mut map = JsonMap::default();
    // Texts to be written over: fresh memory for each window would take longer to get
    // from the kernel than to fill.
    let spare: Mutex<Vec<Vec<u8>>> = Mutex::default();
    let lock_spare = || spare.lock().unwrap_or_else(PoisonError::into_inner);
    let outcome = chain.map_windows_past_damage(
        range,
        holes,
        |_, extents| {
            let text = lock_spare().pop().unwrap_or_default();
            JsonWindow::of(extents, text)
        },
        |window| {
            let text =
                map.take(window, &mut out).map_err(|error| Error::io("cannot print", error))?;
            lock_spare().push(text);
            Ok(())
        },
    );
    if outcome.is_ok() {
        map.finish(range.start, &mut out)?;
        out.write_all(b"]\n")?;
    }
    out.flush()?;
    Ok(outcome?)
}

/// A row of `--output=json-full`.
#[derive(serde::Serialize)]
struct FullRow<'a> {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// The file that holds the bytes, where one does.
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a JsonPath>,
    /// The image that answers, and its format.
    layer: &'a JsonPath,
    format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    encryption: Option<&'static str>,
    /// Where the compressed stream starts in the file, and its length at most.
    #[serde(rename = "compressed-offset", skip_serializing_if = "Option::is_none")]
    compressed_offset: Option<u64>,
    #[serde(rename = "compressed-length", skip_serializing_if = "Option::is_none")]
    compressed_length: Option<u64>,
    #[serde(rename = "zero-cause", skip_serializing_if = "Option::is_none")]
    zero_cause: Option<&'static str>,
    /// What is wrong with the layer's metadata, where that does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    damage: Option<String>,
}

/// Why a range reads as zero, in JSON.
pub(super) fn zero_cause(cause: ZeroCause) -> &'static str {
    match cause {
        ZeroCause::Layer(ZeroStatus::Plain | ZeroStatus::Allocated(_)) => "zero-cluster",
        ZeroCause::Layer(ZeroStatus::Hole(_) | ZeroStatus::DataHole(_)) => "hole",
        ZeroCause::Layer(ZeroStatus::Unwritten(_) | ZeroStatus::DataUnwritten(_)) => "unwritten",
        ZeroCause::Layer(ZeroStatus::PastFileEnd(_) | ZeroStatus::DataPastFileEnd(_)) => {
            "past-file-end"
        }
        ZeroCause::Unallocated(_) => "unallocated",
        ZeroCause::PastBackingEnd(_) => "past-backing-end",
    }
}

fn json_full(chain: &Chain, range: GuestRange, holes: HoleQuery) -> anyhow::Result<DamageList> {
    let mut out = stdout()?;
    let names: Vec<_> = chain
        .layers()
        .iter()
        .map(|layer| {
            let name = |role| JsonPath::from(layer.file(role).absolute_path().as_path());
            (name(FileRole::Image), name(FileRole::DataFile))
        })
        .collect();
    out.write_all(b"[")?;
    let mut first = true;
    let outcome = chain.for_each_extent_past_damage(range, holes, &mut |extent| {
        let row = Row::of(extent);
        let (image, data_file) = &names[extent.depth as usize];
        let mut full = FullRow {
            start: row.start,
            length: row.length,
            depth: row.depth,
            present: row.present,
            zero: row.zero,
            data: row.data,
            compressed: row.compressed,
            offset: row.offset,
            file: None,
            layer: image,
            format: chain.layers()[extent.depth as usize].image.format().name(),
            encryption: None,
            compressed_offset: None,
            compressed_length: None,
            zero_cause: None,
            damage: None,
        };
        let file = |role| if role == FileRole::DataFile { data_file } else { image };
        match extent.mapping {
            Mapping::Data(place) => full.file = Some(file(place.file)),
            Mapping::Encrypted { place, cipher } => {
                full.file = Some(file(place.file));
                full.encryption = Some(match cipher {
                    imgdm::status::Encryption::Aes => "aes",
                    imgdm::status::Encryption::Luks => "luks",
                });
            }
            Mapping::Compressed { host, stream_length, .. } => {
                full.file = Some(image);
                full.compressed_offset = Some(host.get());
                full.compressed_length = Some(stream_length.get());
            }
            Mapping::Zero(cause) => {
                full.file = extent.mapping.place().map(|place| file(place.file));
                full.zero_cause = Some(zero_cause(cause));
            }
            Mapping::Damaged { .. } => {
                let error = chain.layers()[extent.depth as usize].damage_at(extent.start);
                full.damage = error.map(|error| error.without_path());
            }
        }
        let mut print = || -> std::io::Result<()> {
            if !std::mem::take(&mut first) {
                out.write_all(b",\n")?;
            }
            serde_json::to_writer(&mut out, &full).map_err(std::io::Error::from)
        };
        print().map_err(|error| Error::io("cannot print", error))
    });
    // Left open where it broke off: a reader that does not look at the exit status must
    // not take it for the whole.
    if outcome.is_ok() {
        out.write_all(b"]\n")?;
    }
    out.flush()?;
    Ok(outcome?)
}

#[cfg(test)]
mod tests {
    use imgdm::status::HostPlace;
    use imgdm::units::{ByteLen, HostOffset};

    use super::*;

    #[test]
    fn a_row_prints_as_qemu_img_prints_it() {
        let mut rows = JsonRows::default();
        rows.push(&Row { offset: Some(327_680), ..Row::empty(65536) });
        rows.push_with_comma(&Row { zero: true, ..Row::empty(5) });
        assert_eq!(
            String::from_utf8(rows.text).unwrap(),
            concat!(
                r#"{ "start": 65536, "length": 0, "depth": 0, "present": false, "zero": false, "data": false, "compressed": false, "offset": 327680}"#,
                r#"{ "start": 5, "length": 0, "depth": 0, "present": false, "zero": true, "data": false, "compressed": false},"#,
                "\n"
            )
        );
    }

    fn text_of(windows: &[&[Extent]]) -> String {
        let mut out = Vec::new();
        let mut map = JsonMap::default();
        for extents in windows {
            let text =
                map.take(JsonWindow::of(extents.iter().copied(), Vec::new()), &mut out).unwrap();
            assert!(text.is_empty());
        }
        map.finish(GuestOffset::ZERO, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn rows_are_the_same_wherever_the_windows_are_cut() {
        let data = |host| Mapping::Data(HostPlace::in_image(HostOffset::new(host)));
        let zero = Mapping::Zero(ZeroCause::Unallocated(None));
        let mappings = [data(70), data(80), data(90), data(10), data(20), zero, zero, data(0)];
        let extents: Vec<Extent> = (0..)
            .zip(mappings)
            .map(|(index, mapping)| Extent {
                start: GuestOffset::new(index * 10),
                length: ByteLen::new(10),
                depth: 0,
                mapping,
            })
            .collect();
        let whole = text_of(&[&extents]);
        let lengths: Vec<&str> = whole.lines().filter_map(|line| line.split(", ").nth(1)).collect();
        assert_eq!(
            lengths,
            ["\"length\": 30", "\"length\": 20", "\"length\": 20", "\"length\": 10"]
        );
        for first in 0..=extents.len() {
            for second in first..=extents.len() {
                let windows = [&extents[..first], &extents[first..second], &extents[second..]];
                assert_eq!(text_of(&windows), whole, "cut at {first} and {second}");
            }
        }
        assert_eq!(text_of(&[]), text_of(&[&[], &[]]));
        assert!(text_of(&[]).starts_with("{ \"start\": 0, \"length\": 0,"));
    }
}
