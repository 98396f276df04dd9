//! The numbers behind the picture beside qemu-img's maps: of the whole chain, and of each
//! layer's own file, whose rows of depth 0 are what that layer says.

use std::path::Path;

use serde::Deserialize;

use crate::common::images::{LayerMade, MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::crypt;
use crate::imgdm::imgdm;
use crate::map::{Row, rows};
use crate::random::run_theme;

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
struct Bytes {
    damaged: u64,
    data: u64,
    compressed: u64,
    encrypted: u64,
    zero: u64,
    unallocated: u64,
}

#[derive(Debug, Deserialize)]
struct Cell {
    start: u64,
    length: u64,
    #[serde(flatten)]
    bytes: Bytes,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
struct Fragmentation {
    stored_bytes: u64,
    extents: u64,
    jumps: u64,
}

#[derive(Debug, Deserialize)]
struct Strip {
    bytes: Bytes,
    fragmentation: Fragmentation,
    cells: Vec<Cell>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    visible: Bytes,
    beyond: Bytes,
    #[serde(flatten)]
    strip: Strip,
}

#[derive(Debug, Deserialize)]
struct Report {
    virtual_size: u64,
    whole: Strip,
    segments: u64,
    layers: Vec<Layer>,
}

impl Bytes {
    /// What of the rows lies between two offsets; data is encrypted in an encrypted image.
    fn of(rows: &[Row], (from, to): (u64, u64), encrypted: bool) -> Self {
        let mut bytes = Self::default();
        for row in rows {
            let length = (row.start + row.length).min(to).saturating_sub(row.start.max(from));
            let sum = match (row.compressed, row.data && !row.zero, row.present) {
                (true, ..) => &mut bytes.compressed,
                (_, true, _) if encrypted => &mut bytes.encrypted,
                (_, true, _) => &mut bytes.data,
                (.., true) => &mut bytes.zero,
                (.., false) => &mut bytes.unallocated,
            };
            *sum += length;
        }
        bytes
    }

    fn total(&self) -> u64 {
        self.damaged + self.data + self.compressed + self.encrypted + self.zero + self.unallocated
    }
}

fn same<T: PartialEq + std::fmt::Debug>(what: &str, ours: &T, theirs: &T) -> Outcome {
    if ours == theirs {
        return Ok(());
    }
    Err(format!("{what}:\n  imgdm:    {ours:?}\n  by qemu-img: {theirs:?}"))
}

/// How data lies in its files, by the offsets of a map. (Compressed and encrypted clusters
/// have none there.)
fn fragmentation(rows: &[Row]) -> Fragmentation {
    let mut found = Fragmentation::default();
    let mut last: Option<&Row> = None;
    for row in rows.iter().filter(|row| row.data && !row.zero) {
        let touches = last.is_some_and(|last| last.start + last.length == row.start);
        let carries_on = last.is_some_and(|last| {
            last.depth == row.depth && last.offset.map(|at| at + last.length) == row.offset
        });
        found.stored_bytes += row.length;
        found.extents += u64::from(!(touches && carries_on));
        found.jumps += u64::from(touches && !carries_on);
        last = Some(row);
    }
    found
}

fn check_strip(strip: &Strip, rows: &[Row], size: u64, encrypted: bool) -> Outcome {
    same("bytes", &strip.bytes, &Bytes::of(rows, (0, u64::MAX), encrypted))?;
    same("all bytes", &strip.bytes.total(), &size)?;
    let mut at = 0;
    for cell in &strip.cells {
        same("where a cell starts", &cell.start, &at)?;
        at += cell.length;
        same(&format!("{cell:?}"), &cell.bytes, &Bytes::of(rows, (cell.start, at), encrypted))?;
    }
    if !encrypted && !rows.iter().any(|row| row.compressed) {
        same("fragmentation", &strip.fragmentation, &fragmentation(rows))?;
    }
    Ok(())
}

/// A layer's own rows: what it leaves to its backing file is not in it.
fn own_rows(map: &[u8]) -> Outcome<Vec<Row>> {
    let mut rows = rows(map)?;
    for row in rows.iter_mut().filter(|row| row.depth > 0) {
        (row.present, row.data, row.zero, row.compressed) = (false, false, true, false);
    }
    Ok(rows)
}

fn map_of(dir: &Path, layer: &LayerMade) -> Outcome<Vec<u8>> {
    Ok(qemu::img(dir, &["map", "-f", layer.format, "--output=json", &layer.file])?.stdout)
}

fn check_once(dir: &Path, recipe: &Recipe, cells: &str) -> Outcome {
    let top = recipe.top();
    let args = ["show", "--output=json", "--cells", cells, "-f", top.format, &top.file];
    let ran = imgdm(dir, &args)?.ok()?;
    let report: Report =
        serde_json::from_slice(&ran.stdout).map_err(|error| format!("show: {error}"))?;
    let whole = rows(&map_of(dir, top)?)?;
    check_strip(&report.whole, &whole, report.virtual_size, false)
        .map_err(|error| format!("whole: {error}"))?;
    let covered: u64 = report.whole.cells.iter().map(|cell| cell.length).sum();
    same("the cells", &covered, &report.virtual_size)?;
    let full = imgdm(dir, &["map", "--output=json-full", "-f", top.format, &top.file])?.ok()?;
    let full: Vec<serde_json::Value> =
        serde_json::from_slice(&full.stdout).map_err(|error| format!("map: {error}"))?;
    same("segments", &report.segments, &(full.len() as u64))?;
    same("layers", &report.layers.len(), &recipe.layers.len())?;
    for (depth, (ours, made)) in (0..).zip(report.layers.iter().zip(recipe.layers.iter().rev())) {
        let own = own_rows(&map_of(dir, made)?)?;
        let seen: Vec<Row> = whole.iter().filter(|row| row.depth == depth).cloned().collect();
        check_strip(&ours.strip, &own, own.iter().map(|row| row.length).sum(), false)
            .and_then(|()| {
                let range = (report.virtual_size, u64::MAX);
                same("beyond the disk", &ours.beyond, &Bytes::of(&own, range, false))
            })
            .and_then(|()| same("visible", &ours.visible, &Bytes::of(&seen, (0, u64::MAX), false)))
            .map_err(|error| format!("layer {depth}, {}: {error}", made.file))?;
    }
    Ok(())
}

fn check_picture(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let cells = rng.range(1, 300).to_string();
    // Once more where they differ: delayed allocation may have changed the host's mind
    // about holes between two of the programs.
    check_once(dir, recipe, &cells).or_else(|_| check_once(dir, recipe, &cells))
}

#[test]
fn pictures_of_mixed_chains() {
    run_theme("pictures_of_mixed_chains", 40, &MIXED, check_picture);
}

#[test]
fn pictures_of_subclusters() {
    let theme = Theme {
        depth: (1, 3),
        cluster_bits: (14, 21),
        extended_l2: 100,
        qcow: 0,
        preallocation: 25,
        ..MIXED
    };
    run_theme("pictures_of_subclusters", 15, &theme, check_picture);
}

#[test]
fn pictures_of_compressed_images() {
    let theme = Theme {
        depth: (1, 3),
        raw_base: 30,
        qcow: 20,
        compressed: 60,
        cluster_bits: (13, 21),
        ..MIXED
    };
    run_theme("pictures_of_compressed_images", 20, &theme, check_picture);
}

#[test]
fn pictures_of_data_files_and_preallocated_images() {
    let theme =
        Theme { depth: (1, 3), qcow: 0, data_file: 50, preallocation: 60, raw_base: 20, ..MIXED };
    run_theme("pictures_of_data_files_and_preallocated_images", 15, &theme, check_picture);
}

#[test]
fn a_picture_of_an_encrypted_image_needs_no_key() {
    let dir = scratch_dir("show").unwrap();
    let dir = dir.path();
    let layers = [("qcow2", "x.qcow2", "secret")];
    crypt::create(dir, "qcow2", "x.qcow2", crypt::LUKS, "secret", "8M").unwrap();
    crypt::write(dir, &layers, &["write 64k 200k", "write 5M 64k", "write -z 1M 1M"]).unwrap();
    let mut args = vec!["map".to_owned(), "--output=json".to_owned()];
    args.extend(crypt::secrets(&["secret"]));
    args.extend(["--image-opts".to_owned(), crypt::image_opts(&layers)]);
    let map = qemu::img(dir, &args).unwrap();
    let ran = imgdm(dir, &["show", "--output=json", "x.qcow2"]).unwrap().ok().unwrap();
    let report: Report = serde_json::from_slice(&ran.stdout).unwrap();
    let rows = rows(&map.stdout).unwrap();
    check_strip(&report.whole, &rows, 8 << 20, true).unwrap();
    assert_eq!(report.whole.bytes.encrypted, 5 * 65536);
    let text = imgdm(dir, &["show", "--ascii", "x.qcow2"]).unwrap().ok().unwrap().text();
    assert!(text.contains("eE encrypted"), "{text}");
}
