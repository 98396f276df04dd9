//! `imgdm map --bitmap` beside what QEMU's NBD server tells of the same bitmap.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::check::strings;
use crate::common::images::{Step, scratch_dir};
use crate::common::patch::{self, Patch};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::far::{create, recipe_of, write};
use crate::imgdm::{EX_INVALID, EX_MISSING, imgdm, refused};

/// Start, end, dirty.
type Run = (u64, u64, bool);

/// qemu-nbd serving one bitmap, for one client; ended with the value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(dir: &Path, image: &str, bitmap: &str) -> Outcome<Server> {
    let socket = dir.join("nbd");
    let _ = fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command.current_dir(dir).args(["-r", "-k"]).arg(&socket);
    command.args(["-B", bitmap, "-f", "qcow2", image]).stdin(Stdio::null());
    let mut server = Server(command.spawn().map_err(|error| format!("qemu-nbd: {error}"))?);
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        if let Ok(Some(status)) = server.0.try_wait() {
            return Err(format!("qemu-nbd ended with {status}"));
        }
        if Instant::now() > deadline {
            return Err("qemu-nbd made no socket".to_owned());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(server)
}

/// The runs of the bitmap as an NBD client sees them, joined.
fn theirs(dir: &Path, image: &str, bitmap: &str) -> Outcome<Vec<Run>> {
    let _server = serve(dir, image, bitmap)?;
    let socket = dir.join("nbd");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        socket.display()
    );
    let ran = qemu::img(dir, &["map", "--output=json", "--image-opts", &options])?;
    let rows: Vec<Value> = serde_json::from_slice(&ran.stdout).map_err(|e| e.to_string())?;
    let mut runs: Vec<Run> = Vec::new();
    for row in rows {
        let number = |key: &str| row[key].as_u64().unwrap();
        let (start, end) = (number("start"), number("start") + number("length"));
        // By this hack of QEMU's, what is dirty has no data.
        let is_dirty = row["data"] == false;
        match runs.last_mut() {
            Some(last) if last.2 == is_dirty => last.1 = end,
            _ => runs.push((start, end, is_dirty)),
        }
    }
    Ok(runs)
}

fn ours(dir: &Path, image: &str, bitmap: &str, more: &[&str]) -> Outcome<Vec<Run>> {
    let mut line = vec!["map", "--output=json", "--bitmap", bitmap];
    line.extend_from_slice(more);
    line.push(image);
    let ran = imgdm(dir, &line)?.ok()?;
    let rows: Vec<Value> =
        serde_json::from_slice(&ran.stdout).map_err(|error| format!("{error}: {}", ran.text()))?;
    let run = |row: &Value| {
        let number = |key: &str| row[key].as_u64().unwrap();
        let start = number("start");
        (start, start + number("length"), row["dirty"].as_bool().unwrap())
    };
    Ok(rows.iter().map(run).collect())
}

/// Compares the whole, and parts of it.
fn agree(dir: &Path, image: &str, bitmap: &str, rng: &mut Rng) -> Outcome {
    let expected = theirs(dir, image, bitmap)?;
    let found = ours(dir, image, bitmap, &[])?;
    if found != expected {
        return Err(format!("'{bitmap}' is\n{found:x?}\nin qemu-nbd\n{expected:x?}"));
    }
    let size = expected.last().map_or(0, |last| last.1);
    for _ in 0..3 {
        let (start, length) = (rng.below(size), rng.range(1, size));
        let part: Vec<Run> = expected
            .iter()
            .map(|run| (run.0.max(start), run.1.min(start + length), run.2))
            .filter(|run| run.0 < run.1)
            .collect();
        let (start, length) = (start.to_string(), length.to_string());
        let found = ours(dir, image, bitmap, &["-s", &start, "--max-length", &length])?;
        if found != part {
            return Err(format!("{length} bytes from {start}: {found:x?} for {part:x?}"));
        }
    }
    Ok(())
}

fn add(dir: &Path, image: &str, bitmap: &str, granularity: &str) {
    let line = ["bitmap", "--add", "-g", granularity, "-f", "qcow2", image, bitmap];
    qemu::img(dir, &line).unwrap();
}

/// Writes at random places, in one run of qemu-io.
fn scribble(dir: &Path, image: &str, size: u64, rng: &mut Rng) {
    let commands: Vec<String> = (0..40)
        .map(|_| {
            let length = (512 << rng.below(10)).min(size);
            let start = rng.below((size - length) / 512 + 1) * 512;
            let kind = *rng.pick(&["write -P 7", "write -P 9", "write -z", "discard"]);
            format!("{kind} {start} {length}")
        })
        .collect();
    let _ = qemu::io(dir, "qcow2", image, &commands).unwrap();
}

#[test]
fn a_bitmap_maps_as_qemus_nbd_server_tells_it() {
    let granularities = ["512", "4096", "64k", "1M", "64M"];
    for (index, granularity) in (0u64..).zip(granularities) {
        for (cluster, size) in [("512", 8 << 20), ("4k", (70 << 20) + 512), ("64k", 600 << 20)] {
            let dir = scratch_dir("bitmap").unwrap();
            let dir = dir.path();
            let mut rng = Rng::for_case(1, cluster, index);
            let options = [&format!("cluster_size={cluster}")[..]];
            recipe_of(vec![create("x.qcow2", "qcow2", &options, None, size)], &[])
                .make(dir)
                .unwrap();
            add(dir, "x.qcow2", "before", granularity);
            scribble(dir, "x.qcow2", size, &mut rng);
            add(dir, "x.qcow2", "empty", granularity);
            add(dir, "x.qcow2", "half", "65536");
            qemu::img(dir, &["bitmap", "--disable", "-f", "qcow2", "x.qcow2", "before"]).unwrap();
            scribble(dir, "x.qcow2", size, &mut rng);
            for bitmap in ["before", "empty", "half"] {
                agree(dir, "x.qcow2", bitmap, &mut rng)
                    .unwrap_or_else(|error| panic!("{granularity}, {cluster}: {error}"));
            }
        }
    }
}

#[test]
fn bitmaps_follow_the_disks_size() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let mut rng = Rng::new(3);
    let options = ["cluster_size=4k"];
    recipe_of(vec![create("x.qcow2", "qcow2", &options, None, 40 << 20)], &[]).make(dir).unwrap();
    add(dir, "x.qcow2", "b", "512");
    for (size, shrink) in [(90 << 20, false), ((20 << 20) + 1536, true), (33 << 20, false)] {
        scribble(dir, "x.qcow2", 20 << 20, &mut rng);
        let file = "x.qcow2".to_owned();
        let resize = Step::Resize { format: "qcow2", file, size, shrink };
        recipe_of(vec![resize], &[]).make(dir).unwrap();
        agree(dir, "x.qcow2", "b", &mut rng).unwrap_or_else(|error| panic!("{size}: {error}"));
    }
}

/// A bitmap of two table entries, the first of which has bits.
fn with_bits(dir: &Path) -> Patch {
    let steps = vec![
        create("base.raw", "raw", &[], None, 40 << 20),
        create("x.qcow2", "qcow2", &["cluster_size=4k"], Some(("base.raw", "raw")), 32 << 20),
        Step::Bitmap { name: "other".to_owned(), file: "x.qcow2".to_owned() },
    ];
    recipe_of(steps, &[]).make(dir).unwrap();
    add(dir, "x.qcow2", "b", "512");
    recipe_of(vec![write("x.qcow2", "qcow2", &[(8192, 4096), (1 << 20, 512)])], &[])
        .make(dir)
        .unwrap();
    Patch::open(&dir.join("x.qcow2")).unwrap()
}

/// Where the directory entry of that bitmap is, and its table.
fn entry_of(image: &Patch, name: &[u8]) -> (u64, u64) {
    let (_, extension, _) =
        *image.extensions().unwrap().iter().find(|e| e.0 == 0x2385_2875).unwrap();
    let mut entry = image.u64(extension + 16).unwrap();
    loop {
        let [length] = image.bytes::<1>(entry + 19).unwrap();
        let found = (0..u64::from(length)).map(|i| image.bytes::<1>(entry + 24 + i).unwrap()[0]);
        if found.eq(name.iter().copied()) {
            return (entry, image.u64(entry).unwrap());
        }
        entry += (24 + u64::from(length)).next_multiple_of(8);
    }
}

#[test]
fn entries_of_all_ones_are_dirty() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let image = with_bits(dir);
    let (_, table) = entry_of(&image, b"b");
    let mut rng = Rng::new(5);
    agree(dir, "x.qcow2", "b", &mut rng).unwrap();
    image.put_u64(table + 8, 1).unwrap();
    agree(dir, "x.qcow2", "b", &mut rng).unwrap();
    let found = ours(dir, "x.qcow2", "b", &[]).unwrap();
    assert_eq!(found.last(), Some(&(16 << 20, 32 << 20, true)));
    let human = imgdm(dir, &["map", "--bitmap", "b", "x.qcow2"]).unwrap().text();
    let rows: Vec<Vec<_>> = human.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        rows,
        [
            ["Offset", "Length"],
            ["0x2000", "0x1000"],
            ["0x100000", "0x200"],
            ["0x1000000", "0x1000000"]
        ]
    );
}

#[test]
fn a_bitmap_needs_no_backing_file() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let _ = with_bits(dir);
    fs::remove_file(dir.join("base.raw")).unwrap();
    let found = ours(dir, "x.qcow2", "b", &[]).unwrap();
    assert_eq!(found[..2], [(0, 8192, false), (8192, 12288, true)]);
}

#[test]
fn a_bitmap_in_use_is_refused_as_inconsistent() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let _ = with_bits(dir);
    // Killed, so that it can't take back the flag.
    let _ = qemu::io_any(dir, "qcow2", "x.qcow2", &strings(&["write 0 512", "sigraise 9"]));
    for output in ["human", "json"] {
        let output = format!("--output={output}");
        let ran = imgdm(dir, &["map", &output, "--bitmap", "b", "x.qcow2"]).unwrap();
        refused(&ran, &[EX_INVALID], &["x.qcow2", "'b'", "inconsistent"]).unwrap();
    }
    assert!(theirs(dir, "x.qcow2", "b").is_err(), "QEMU should refuse it too");
}

#[test]
fn a_bitmap_that_is_not_there_is_66_and_those_that_are_are_listed() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let image = with_bits(dir);
    let missing = |words: &[&str], line: &[&str]| {
        let mut all = vec!["map", "--bitmap", "nobody"];
        all.extend_from_slice(line);
        refused(&imgdm(dir, &all).unwrap(), &[EX_MISSING], words).unwrap();
    };
    missing(&["x.qcow2", "no bitmap 'nobody'", "'other', 'b'"], &["x.qcow2"]);
    missing(&["base.raw", "the format raw has no bitmaps"], &["-f", "raw", "base.raw"]);
    let autoclear = image.u64(patch::INCOMPATIBLE + 16).unwrap();
    image.put_u64(patch::INCOMPATIBLE + 16, autoclear & !1).unwrap();
    missing(&["x.qcow2", "void"], &["x.qcow2"]);
    for line in [&["-l", "x"][..], &["--deep"], &["--output=json-full"]] {
        let mut all = vec!["map", "--bitmap", "b", "x.qcow2"];
        all.extend_from_slice(line);
        refused(&imgdm(dir, &all).unwrap(), &[64], &[]).unwrap();
    }
}

#[test]
fn damaged_bitmaps_are_refused_and_never_guessed() {
    let dir = scratch_dir("bitmap").unwrap();
    let dir = dir.path();
    let image = with_bits(dir);
    let (entry, table) = entry_of(&image, b"b");
    let words = ["x.qcow2"];
    let refuse = |at: u64, value: u64| {
        let old = image.u64(at).unwrap();
        image.put_u64(at, value).unwrap();
        let ran = imgdm(dir, &["map", "--output=json", "--bitmap", "b", "x.qcow2"]).unwrap();
        refused(&ran, &[EX_INVALID], &words).unwrap_or_else(|e| panic!("{at:#x} {value:#x}: {e}"));
        assert!(serde_json::from_slice::<Value>(&ran.stdout).is_err(), "{}", ran.describe());
        image.put_u64(at, old).unwrap();
    };
    // Table entries with reserved bits, unaligned, past the end; a table elsewhere.
    for value in [2, 1 << 57, table + 512, 1 << 40, table + 1] {
        refuse(table, value);
    }
    for value in [0, table + 8, 1 << 50, u64::MAX] {
        refuse(entry, value);
    }
    // Entries of the table: too many, too few, none; then flags that nobody knows.
    for value in [3u64 << 32 | 2, 1 << 32 | 2, 2, 2 << 32 | 8] {
        refuse(entry + 8, value);
    }
    let good = imgdm(dir, &["map", "--output=json", "--bitmap", "b", "x.qcow2"]).unwrap();
    let rows: Value = serde_json::from_slice(&good.stdout).unwrap();
    assert_eq!(rows[1], json!({"start": 8192, "length": 4096, "dirty": true}));
}
