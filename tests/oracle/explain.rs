//! `imgdm explain` beside `qemu-img map`, beside the files' own bytes, and back again.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::check::{convert, strings};
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::patch::{self, OFFSET_MASK, Patch};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::damaged::{bad, encrypted, good, in_a_gib};
use crate::imgdm::{EX_INVALID, imgdm, refused};
use crate::map::{Row, rows};
use crate::random::run_theme;

/// Bytes of each image that are explained.
const BYTES: u64 = 8;

/// What imgdm prints as JSON.
fn json(dir: &Path, args: &[String]) -> Outcome<Value> {
    let ran = imgdm(dir, args)?.ok()?;
    serde_json::from_slice(&ran.stdout).map_err(|error| format!("{error}:\n{}", ran.describe()))
}

fn u64_of(value: &Value, key: &str) -> Outcome<u64> {
    value[key].as_u64().ok_or_else(|| format!("{key} is missing in {value}"))
}

/// The arguments of one explanation.
fn line(snapshot: Option<&str>, more: &[&str]) -> Vec<String> {
    let mut line = strings(&["explain", "--quiet", "--output=json"]);
    if let Some(snapshot) = snapshot {
        line.extend(strings(&["-l", snapshot]));
    }
    line.extend(strings(more));
    line
}

/// The byte at the end of an explanation's way is that of a map's row, and of the disk.
fn check_answer(row: &Row, offset: u64, answer: &Value) -> Outcome {
    let inside = offset - row.start;
    let depth = u64_of(answer, "depth")?;
    let kind = answer["kind"].as_str().unwrap_or_default();
    let expected = match row {
        _ if row.is_damaged() => "damaged",
        Row { compressed: true, .. } => "compressed",
        Row { data: true, .. } => "data",
        _ => "zero",
    };
    let place = (kind == "data").then(|| u64_of(answer, "offset")).transpose()?;
    let same_place = place.is_none() || place == row.offset.map(|at| at + inside);
    if kind == expected && depth == row.depth && same_place {
        return Ok(());
    }
    Err(format!("byte {offset:#x}: the map says {row:?}, but it is explained as {answer}"))
}

/// A byte of a file; `None` past its end.
fn byte_at(path: &Path, offset: u64) -> Outcome<Option<u8>> {
    let mut byte = [0];
    let read = File::open(path).and_then(|file| file.read_at(&mut byte, offset));
    let read = read.map_err(|error| format!("{}: {error}", path.display()))?;
    Ok((read == 1).then_some(byte[0]))
}

/// Explains a byte, and, where a file holds it, who uses the byte of the file: the guest's
/// byte has to be among them.
fn check_byte(dir: &Path, file: &str, snapshot: Option<&str>, map: &[Row], offset: u64) -> Outcome {
    let text = offset.to_string();
    let found = json(dir, &line(snapshot, &[file, &text]))?;
    let answer = &found["answer"];
    let row = map.iter().find(|row| (row.start..row.start + row.length).contains(&offset));
    check_answer(row.ok_or("the map has a gap")?, offset, answer)?;

    let steps = found["steps"].as_array().ok_or("no steps")?;
    let layers = steps.iter().filter(|step| step["step"] == "layer").count() as u64;
    if layers != u64_of(answer, "depth")? + 1 {
        return Err(format!("{layers} layers were asked: {found}"));
    }
    let kind = answer["kind"].as_str().unwrap_or_default();
    let (place, guest) = match kind {
        "data" => (u64_of(answer, "offset")?, offset),
        "compressed" => {
            (u64_of(answer, "stream_offset")?, offset - u64_of(answer, "offset_in_cluster")?)
        }
        _ => return Ok(()),
    };
    let path = PathBuf::from(answer["path"].as_str().unwrap_or_default());
    // qemu-img copies no more of a snapshot than the active layer is long.
    if let (true, Some(copied)) = (kind == "data", byte_at(&dir.join("copy.raw"), offset)?)
        && copied != byte_at(&path, place)?.unwrap_or(0)
    {
        return Err(format!("byte {offset:#x} of the disk is not there: {answer}"));
    }
    let file_place = format!("{}:{place}", path.display());
    let used = json(dir, &line(snapshot, &["--reverse", &file_place, file]))?;
    let guests = used["guests"].as_array().ok_or("no guests")?;
    let is_it = |found: &Value| {
        found["guest_offset"] == guest
            && found["kind"] == kind
            && found["visibility"] == "shown"
            && (snapshot.is_none() || answer["depth"] != 0 || !found["snapshot"].is_null())
    };
    if used["depth"] != answer["depth"] || !guests.iter().any(is_it) {
        return Err(format!("byte {offset:#x} ({answer}) is not among {used}"));
    }
    Ok(())
}

fn check_bytes(
    dir: &Path,
    file: &str,
    snapshot: Option<&str>,
    map: &[Row],
    rng: &mut Rng,
) -> Outcome {
    let Some(size) = map.last().map(|row| row.start + row.length).filter(|&size| size > 0) else {
        return Ok(());
    };
    for _ in 0..BYTES {
        // Anywhere, or at the edge of a row, or inside of a row that has something.
        let row = rng.pick(map);
        let data: Vec<_> = map.iter().filter(|row| row.data).collect();
        let offset = match rng.below(3) {
            0 => rng.below(size),
            1 => (row.start + row.length.saturating_sub(rng.below(2))).min(size - 1),
            _ if data.is_empty() => row.start,
            _ => {
                let row = rng.pick(&data);
                row.start + rng.below(row.length)
            }
        };
        check_byte(dir, file, snapshot, map, offset)?;
    }
    Ok(())
}

/// Bytes of the active layer, and of a snapshot where there is one.
fn check_image(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    let top = recipe.top();
    let map = qemu::img(dir, &["map", "-f", top.format, "--output=json", &top.file])?;
    convert(dir, top.format, &top.file, "copy.raw")?;
    check_bytes(dir, &top.file, None, &rows(&map.stdout)?, rng)?;
    if !top.snapshots.is_empty() {
        let name = rng.pick(&top.snapshots);
        let ran = imgdm(dir, &["map", "--quiet", "--output=json", "-l", name, &top.file])?.ok()?;
        let from = format!("snapshot.name={}", name.replace(',', ",,"));
        qemu::img(dir, &["convert", "-O", "raw", "-l", &from, &top.file, "copy.raw"])?;
        check_bytes(dir, &top.file, Some(name), &rows(&ran.stdout)?, rng)?;
    }
    Ok(())
}

macro_rules! themes {
    ($($name:ident: $cases:literal, $theme:expr;)*) => {
        $(#[test]
        fn $name() {
            run_theme(concat!("explain_", stringify!($name)), $cases, &$theme, check_image);
        })*
    };
}

themes! {
    mixed: 12, MIXED;
    subclusters: 8, Theme { depth: (1, 3), cluster_bits: (14, 18), extended_l2: 100, qcow: 0, ..MIXED };
    data_files: 8, Theme { depth: (1, 3), raw_base: 10, qcow: 0, data_file: 75, ..MIXED };
    snapshots: 10, Theme {
        depth: (1, 3), raw_base: 20, qcow: 0, data_file: 0, snapshot: 100, preallocation: 0,
        resize: 30, empty: 0, ..MIXED
    };
    version_1: 6, Theme { depth: (1, 3), qcow: 80, ..MIXED };
    compressed: 10, Theme {
        depth: (1, 3), raw_base: 30, qcow: 20, compressed: 70, cluster_bits: (13, 18), ..MIXED
    };
}

#[test]
fn of_a_damaged_image_what_the_map_says_is_explained_and_nothing_panics() {
    let dir = scratch_dir("explain-damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let image = bad(dir);
    let l1 = image.u64(patch::L1_OFFSET).unwrap();
    let l2 = image.l2_entry(0).unwrap() / 4096 * 4096;
    let snapshots = image.u64(patch::SNAPSHOTS_OFFSET).unwrap();
    let length = image.length().unwrap();
    let mut rng = Rng::for_case(1, "explain-damaged", 0);
    let (mut damaged, mut whole) = (0, 0);
    for case in 0..60 {
        let image = bad(dir);
        let at = match rng.below(5) {
            0 => rng.below(160),
            1 => l1 + rng.below(16),
            2 | 3 => l2 + rng.below(64),
            _ => snapshots + rng.below(120),
        };
        flip(&image, at, &mut rng).unwrap();
        let what = format!("case {case}: byte {at:#x}");
        let map = in_a_gib(dir, &["map", "-f", "qcow2", "--output=json", "bad.qcow2"]).unwrap();
        let map: Vec<Row> = rows(&map.stdout).unwrap_or_default();
        let offset = rng.below(16) * 4096 + rng.below(4096);
        let text = offset.to_string();
        let ran = in_a_gib(dir, &["explain", "-f", "qcow2", "--output=json", "bad.qcow2", &text])
            .unwrap();
        let report: Option<Value> = serde_json::from_slice(&ran.stdout).ok();
        let row = map.iter().find(|row| (row.start..row.start + row.length).contains(&offset));
        if let (Some(report), Some(row)) = (&report, row) {
            check_answer(row, offset, &report["answer"])
                .unwrap_or_else(|error| panic!("{what}: {error}"));
        }
        let is_damaged = report.is_some_and(|report| report["answer"]["kind"] == "damaged");
        if is_damaged {
            refused(&ran, &[EX_INVALID], &["bad.qcow2", "damaged"])
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            damaged += 1;
        } else if ran.status.success() {
            whole += 1;
        }
        let place = format!(":{}", rng.below(length + 4096));
        for more in [&[][..], &["-l", "first"]] {
            let mut args = vec!["explain", "-f", "qcow2", "--reverse", &place, "bad.qcow2"];
            args.extend_from_slice(more);
            in_a_gib(dir, &args).unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }
    assert!(damaged > 3 && whole > 20, "{damaged} damaged, {whole} explained");
}

fn flip(image: &Patch, at: u64, rng: &mut Rng) -> Outcome {
    let [old] = image.bytes::<1>(at)?;
    image.put(at, &[old ^ (1 << rng.below(8))])
}

#[test]
fn every_byte_of_a_file_is_something() {
    let dir = scratch_dir("explain-reverse").unwrap();
    let dir = dir.path();
    good(dir);
    let length = std::fs::metadata(dir.join("good.qcow2")).unwrap().len();
    for offset in (0..length).step_by(2048) {
        let used = json(dir, &line(None, &["--reverse", &format!(":{offset}"), "good.qcow2"]));
        let used = used.unwrap();
        let some = |key: &str| !used[key].as_array().unwrap().is_empty();
        let kinds = [some("metadata"), some("guests"), used["unclaimed"].is_object()];
        assert!(kinds.contains(&true), "{used}");
        // What only snapshots have is not what the chain reads.
        for found in used["guests"].as_array().unwrap() {
            let shown = found["visibility"] == "shown";
            assert!(!shown || found["snapshot"].is_null(), "{used}");
        }
        if kinds[0] || kinds[1] {
            assert_ne!(used["refcount"]["count"], 0, "{used}");
        }
    }
    let past = json(dir, &line(None, &["--reverse", &format!(":{length}"), "good.qcow2"])).unwrap();
    assert_eq!(past["past_end"], true, "{past}");
    // A byte of the backing file that the overlay hides.
    let hidden = json(dir, &line(None, &["--reverse", "base.raw:0", "good.qcow2"])).unwrap();
    assert_eq!(hidden["guests"][0]["visibility"], "hidden", "{hidden}");
    assert_eq!(hidden["guests"][0]["hidden_by"], 0, "{hidden}");
    let ran = imgdm(dir, &["explain", "--reverse", "good.qcow2:0", "base.raw"]).unwrap();
    refused(&ran, &[64], &["not a file of the image's chain"]).unwrap();
}

#[test]
fn an_encrypted_byte_is_explained_without_a_key() {
    for format in ["luks", "aes"] {
        let dir = scratch_dir("explain-encrypted").unwrap();
        let dir = dir.path();
        encrypted(dir, format);
        let found = json(dir, &line(None, &["x.qcow2", "0x10203"])).unwrap();
        let entry = Patch::open(&dir.join("x.qcow2")).unwrap();
        let host = entry.u64(entry.l2_entry(65536).unwrap()).unwrap() & OFFSET_MASK;
        let answer = &found["answer"];
        assert_eq!(answer["kind"], "encrypted", "{found}");
        assert_eq!(answer["offset"], host + 0x203, "{found}");
        let steps = found["steps"].as_array().unwrap();
        let step = steps.iter().find(|step| step["step"] == "encryption").unwrap();
        let sector = if format == "luks" { host / 512 + 1 } else { 129 };
        assert_eq!((&step["method"], &step["iv_sector"]), (&format.into(), &sector.into()));
        assert!(step["cipher"].as_str().unwrap().starts_with("aes-"), "{found}");
        let place = format!(":{}", host + 0x203);
        let used = json(dir, &line(None, &["--reverse", &place, "x.qcow2"])).unwrap();
        assert_eq!(used["guests"][0]["guest_offset"], 0x10203, "{used}");
        assert_eq!(used["guests"][0]["visibility"], "shown", "{used}");
    }
}
