//! `imgdm diff` beside qemu-img's maps and copies of the disks that are compared.

#![allow(clippy::cast_possible_truncation)]

use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::check::{applied, convert, snapshots, strings};
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::imgdm;
use crate::map;
use crate::random::run_theme;

const SECTOR: usize = 512;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    start: u64,
    length: u64,
    kind: String,
    a: Option<String>,
    b: Option<String>,
}

/// A disk as QEMU has it.
struct Disk {
    /// What `-l` takes; none for the active layer.
    snapshot: Option<String>,
    bytes: Vec<u8>,
    map: Vec<map::Row>,
}

impl Disk {
    /// # Errors
    /// qemu-img failed.
    fn of(dir: &Path, format: &str, image: &str, snapshot: Option<&str>) -> Outcome<Self> {
        convert(dir, format, image, "copy.raw")?;
        let mut bytes = fs::read(dir.join("copy.raw")).map_err(|error| error.to_string())?;
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        let map = qemu::img(dir, &["map", "-f", format, "--output=json", image])?;
        let snapshot = snapshot.map(|id| format!("snapshot.id={id}"));
        Ok(Self { snapshot, bytes, map: map::rows(&map.stdout)? })
    }

    /// The row of the map that each sector is in the midst of.
    fn sectors(&self) -> Vec<(u64, &map::Row)> {
        let mut rows = self.map.iter().peekable();
        let mut sectors = Vec::new();
        for sector in (0..self.bytes.len() as u64).step_by(SECTOR) {
            while rows.peek().is_some_and(|row| row.start + row.length <= sector) {
                rows.next();
            }
            sectors.extend(rows.peek().map(|row| (sector, *row)));
        }
        sectors
    }
}

/// The rows of `imgdm diff --output=json`, sector by sector.
struct Listed {
    sectors: Vec<Option<Row>>,
}

impl Listed {
    /// Runs imgdm; the rows have to be in order, joined, of whole `unit`s and of the kind
    /// `common`, up to where the shorter disk ends; past that, all is listed. A sector is
    /// listed where its first byte is.
    ///
    /// # Errors
    /// Something else.
    fn get(
        dir: &Path,
        args: &[String],
        (a, b): (u64, u64),
        common: &str,
        unit: usize,
    ) -> Outcome<Self> {
        let mut line = strings(&["diff", "--output=json"]);
        line.extend_from_slice(args);
        let ran = imgdm(dir, &line)?.ok()?;
        let rows: Vec<Row> = serde_json::from_slice(&ran.stdout)
            .map_err(|error| format!("{error}: {}", ran.describe()))?;
        let mut sectors = vec![None; (a.max(b) as usize) / SECTOR];
        let tail = if a > b { "only-in-a" } else { "only-in-b" };
        let mut end = 0;
        for row in &rows {
            let in_tail = row.start >= a.min(b);
            let kind = if in_tail { tail } else { common };
            let states = (row.a.is_some(), row.b.is_some());
            let expected = (!in_tail || a > b, !in_tail || b > a);
            if row.start < end || row.length == 0 || row.kind != kind || states != expected {
                return Err(format!("a bad row: {row:?}\n{}", ran.describe()));
            }
            end = row.start + row.length;
            // What is found by comparing bytes is always sectors.
            let unit = if kind == "content" { SECTOR } else { unit };
            let in_units = |bytes: u64| bytes.is_multiple_of(unit as u64);
            if !in_units(row.start) || !in_units(row.length) {
                return Err(format!("not of whole units of {unit}: {row:?}"));
            }
            let part = (row.start as usize).div_ceil(SECTOR)..(end as usize).div_ceil(SECTOR);
            sectors[part].fill(Some(row.clone()));
        }
        for pair in rows.windows(2) {
            let (x, y) = (&pair[0], &pair[1]);
            let alike = (&x.kind, &x.a, &x.b) == (&y.kind, &y.a, &y.b);
            if alike && x.start + x.length == y.start {
                return Err(format!("not joined: {x:?} {y:?}"));
            }
        }
        let past = (a.min(b) as usize) / SECTOR;
        if sectors[past..].iter().any(Option::is_none) {
            return Err(format!("the longer disk's rest is not listed\n{}", ran.describe()));
        }
        Ok(Self { sectors })
    }

    fn has(&self, sector: u64) -> bool {
        self.sectors[sector as usize / SECTOR].is_some()
    }
}

/// Sectors that both disks have, and whether their bytes differ.
fn bytes_differ<'d>(a: &'d Disk, b: &'d Disk) -> impl Iterator<Item = (u64, bool)> + 'd {
    let sectors = a.bytes.chunks(SECTOR).zip(b.bytes.chunks(SECTOR));
    (0..).step_by(SECTOR).zip(sectors.map(|(a, b)| a != b))
}

/// With --content exactly the sectors that differ are listed.
fn check_content(dir: &Path, mut args: Vec<String>, a: &Disk, b: &Disk, unit: usize) -> Outcome {
    args.push("--content".to_owned());
    let (a_size, b_size) = (a.bytes.len() as u64, b.bytes.len() as u64);
    let listed = Listed::get(dir, &args, (a_size, b_size), "content", unit)?;
    match bytes_differ(a, b).find(|&(sector, differs)| listed.has(sector) != differs) {
        Some((sector, true)) => Err(format!("{args:?} misses the sector at {sector:#x}")),
        Some((sector, false)) => Err(format!("{args:?} lists the sector at {sector:#x}")),
        None => Ok(()),
    }
}

/// Two disks of one image.
fn check_pair(dir: &Path, image: &str, a: &Disk, b: &Disk) -> Outcome {
    let selected = [&a.snapshot, &b.snapshot].into_iter().flatten();
    let mut args: Vec<String> = selected.flat_map(|s| ["-l".to_owned(), s.clone()]).collect();
    args.push(image.to_owned());
    let (a_size, b_size) = (a.bytes.len() as u64, b.bytes.len() as u64);
    let listed = Listed::get(dir, &args, (a_size, b_size), "mapping", SECTOR)?;
    for (sector, differs) in bytes_differ(a, b) {
        if differs && !listed.has(sector) {
            return Err(format!("{args:?} misses the sector at {sector:#x}"));
        }
    }
    // What has the same place in both is not listed, and what has another is.
    let place = |sector: u64, row: &map::Row| {
        row.offset.map(|offset| (row.depth, offset + sector - row.start))
    };
    for ((sector, x), (_, y)) in a.sectors().into_iter().zip(b.sectors()) {
        let same = match (place(sector, x), place(sector, y)) {
            (Some(p), Some(q)) if x.data && y.data && p == q => true,
            // Whether holes below data are looked for is not the same for an image and for
            // its copy to which a snapshot was applied.
            _ if (x.zero && x.data) || (y.zero && y.data) => continue,
            _ if x.zero && y.zero => true,
            (Some(p), Some(q)) if x.data && y.data => p == q,
            // Compressed clusters have no place in a map.
            _ if x.compressed && y.compressed => continue,
            _ => false,
        };
        if listed.has(sector) == same {
            return Err(format!("{args:?} has it wrong at {sector:#x}: {x:?} {y:?}"));
        }
    }
    check_content(dir, args, a, b, SECTOR)
}

fn check_snapshots(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let top = recipe.top();
    if top.snapshots.is_empty() {
        return Ok(());
    }
    let mut disks = vec![Disk::of(dir, top.format, &top.file, None)?];
    for (id, _) in snapshots(dir, &top.file)? {
        let copy = applied(dir, top, &id)?;
        disks.push(Disk::of(dir, top.format, &copy, Some(&id))?);
    }
    for index in 1..disks.len() {
        check_pair(dir, &top.file, &disks[index], &disks[0])?;
        let other = 1 + rng.below(disks.len() as u64 - 1) as usize;
        check_pair(dir, &top.file, &disks[index], &disks[other])?;
    }
    Ok(())
}

#[test]
fn snapshots_that_differ() {
    let theme = Theme {
        depth: (1, 3),
        raw_base: 20,
        qcow: 0,
        data_file: 0,
        snapshot: 100,
        preallocation: 0,
        resize: 40,
        empty: 0,
        max_size: 16 << 20,
        ..MIXED
    };
    run_theme("snapshots_that_differ", 30, &theme, check_snapshots);
}

#[test]
fn compressed_snapshots_that_differ() {
    let theme = Theme {
        depth: (1, 3),
        qcow: 10,
        data_file: 0,
        snapshot: 100,
        preallocation: 0,
        compressed: 70,
        // As in `random`: with smaller clusters QEMU 10 damages such images.
        cluster_bits: (13, 21),
        bitmap: 0,
        empty: 0,
        max_size: 16 << 20,
        ..MIXED
    };
    run_theme("compressed_snapshots_that_differ", 20, &theme, check_snapshots);
}

/// An overlay and each layer below it; rows that tell mappings have to be of whole
/// `unit`s.
fn check_base(dir: &Path, recipe: &Recipe, rng: &mut Rng, unit: usize) -> Outcome {
    let layers: Vec<_> = recipe.layers.iter().rev().collect();
    let top = recipe.top();
    let overlay = Disk::of(dir, top.format, &top.file, None)?;
    for (depth, layer) in layers.iter().enumerate().skip(1) {
        let base = Disk::of(dir, layer.format, &layer.file, None)?;
        let mut args = match rng.below(3) {
            0 if depth == 1 => Vec::new(),
            0 | 1 => vec![format!("--base={depth}")],
            _ => vec!["--base".to_owned(), layer.file.clone()],
        };
        args.push(top.file.clone());
        let (a_size, b_size) = (base.bytes.len() as u64, overlay.bytes.len() as u64);
        let listed = Listed::get(dir, &args, (a_size, b_size), "mapping", unit)?;
        for (sector, row) in overlay.sectors() {
            // Not only what is present: a layer between that is too short covers it too.
            let held = row.depth < depth as u64;
            if sector < a_size && listed.has(sector) != held {
                return Err(format!("{args:?} has it wrong at {sector:#x}: {row:?}"));
            }
        }
        check_content(dir, args, &base, &overlay, unit)?;
    }
    Ok(())
}

#[test]
fn overlays_and_their_bases() {
    let theme = Theme { depth: (2, 4), max_size: 16 << 20, ..MIXED };
    run_theme("overlays_and_their_bases", 30, &theme, |dir, recipe, rng| {
        check_base(dir, recipe, rng, SECTOR)
    });
    let theme = Theme { raw_base: 100, odd_size: 100, compressed: 40, ..theme };
    run_theme("overlays_and_their_bases", 10, &theme, |dir, recipe, rng| {
        // A map is not of whole sectors where a file is not.
        check_base(dir, recipe, rng, 1)
    });
}

#[test]
fn a_stream_that_is_damaged_is_named_where_it_has_to_be_read() {
    let dir = scratch_dir("diff").unwrap();
    let dir = dir.path();
    qemu::img(dir, &["create", "-q", "-f", "qcow2", "x", "1M"]).unwrap();
    qemu::io(dir, "qcow2", "x", &strings(&["write -c -P 3 128k 64k", "write -c -P 4 256k 64k"]))
        .unwrap();
    qemu::img(dir, &["snapshot", "-c", "before", "x"]).unwrap();
    qemu::io(dir, "qcow2", "x", &strings(&["write -P 5 256k 64k"])).unwrap();
    let map = imgdm(dir, &["map", "--output=json-full", "-l", "before", "x"]).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&map.ok().unwrap().stdout).unwrap();
    let damage = |start: u64| {
        let row = rows.iter().find(|row| row["start"] == start).unwrap();
        let host = row["compressed-offset"].as_u64().unwrap();
        crate::common::patch::Patch::open(&dir.join("x")).unwrap().put(host, &[0xff; 4]).unwrap();
    };
    let run =
        |more: &[&str]| imgdm(dir, &[&["diff", "-l", "before"], more, &["x"]].concat()).unwrap();
    // The same stream of both: nobody looks at it.
    damage(128 << 10);
    run(&["--content"]).ok().unwrap();
    damage(256 << 10);
    run(&[]).ok().unwrap();
    for output in ["--output=json", "--output=human"] {
        let ran = run(&["--content", output]);
        crate::imgdm::refused(&ran, &[65], &["guest offset 0x40000", "does not inflate"]).unwrap();
        assert!(serde_json::from_slice::<serde_json::Value>(&ran.stdout).is_err());
    }
}
