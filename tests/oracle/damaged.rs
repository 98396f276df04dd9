//! Bad input: each is a clear error with a stable exit code, or is read as QEMU reads
//! it; never a panic, a hang, or memory without bound.

use std::fs;
use std::path::Path;
use std::process::Command;

use imgdm::format::Format;
use imgdm::open::OpenPolicy;

use crate::check::{convert, same, strings};
use crate::common::images::{Step, scratch_dir};
use crate::common::patch::{self, FEATURE_NAMES, OFFSET_MASK, Patch};
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::device::{self, Reading};
use crate::far::{create, recipe_of, write};
use crate::imgdm::{EX_INVALID, EX_MISSING, EX_NOT_REPRESENTABLE, PROGRAM, imgdm, refused, sound};
use crate::map::{Row, rows};
use crate::table::{Plan, compare};

pub(crate) const SIZE: u64 = 1 << 20;
pub(crate) const COMMANDS: [&str; 3] = ["map", "plan", "table"];

/// An image with all tables, small ones: L1 and L2 tables, refcounts, two snapshots,
/// a backing file.
pub(crate) fn good(dir: &Path) {
    let snapshot = |name: &str| Step::Snapshot {
        action: "-c",
        name: name.to_owned(),
        file: "good.qcow2".to_owned(),
    };
    let steps = vec![
        create("base.raw", "raw", &[], None, SIZE),
        write("base.raw", "raw", &[(0, 65536)]),
        create("good.qcow2", "qcow2", &["cluster_size=4k"], Some(("base.raw", "raw")), SIZE),
        write("good.qcow2", "qcow2", &[(0, 512), (4096, 4096), (8192, 8192)]),
        snapshot("first"),
        write("good.qcow2", "qcow2", &[(4096, 512), (900_096 / 512 * 512, 4096)]),
        snapshot("second"),
        write("good.qcow2", "qcow2", &[(8192, 1024), (SIZE - 4096, 4096)]),
    ];
    recipe_of(steps, &[]).make(dir).unwrap();
}

/// Copies good.qcow2 to bad.qcow2 and opens that.
pub(crate) fn bad(dir: &Path) -> Patch {
    patch::copy(&dir.join("good.qcow2"), &dir.join("bad.qcow2")).unwrap();
    Patch::open(&dir.join("bad.qcow2")).unwrap()
}

/// Each command on `args`, which must refuse with one of the codes, saying the words.
pub(crate) fn all_refuse(dir: &Path, args: &[&str], codes: &[i32], words: &[&str]) {
    for command in COMMANDS {
        let mut line = vec![command];
        line.extend_from_slice(args);
        let ran = imgdm(dir, &line).unwrap();
        refused(&ran, codes, words).unwrap_or_else(|error| panic!("{error}"));
        assert!(ran.stdout.is_empty() || command == "map", "{}", ran.describe());
    }
}

/// Each command on `args`, an image whose tables are damaged: `table` refuses, `map` and
/// `plan` go on and list it. All say the words.
fn all_find_damage(dir: &Path, args: &[&str], words: &[&str]) {
    for command in COMMANDS {
        let mut line = vec![command, "--output=json"];
        line.extend_from_slice(args);
        let ran = imgdm(dir, &line).unwrap();
        finds_damage(command, &ran, words).unwrap_or_else(|error| panic!("{error}"));
    }
}

fn finds_damage(command: &str, ran: &Ran, words: &[&str]) -> Outcome {
    if command != "plan" {
        refused(ran, &[EX_INVALID], words)?;
        return if command == "map" { rows(&ran.stdout).map(drop) } else { Ok(()) };
    }
    let lists = is_plan_with_obstacles(ran);
    let text = ran.text().to_lowercase();
    let missing = words.iter().find(|word| !text.contains(&word.to_lowercase()));
    match (lists, missing) {
        (true, None) => Ok(()),
        _ => Err(format!("should list the damage, and say {missing:?}:\n{}", ran.describe())),
    }
}

/// Whether it is a JSON report of `plan` that says that the image can't be attached.
fn is_plan_with_obstacles(ran: &Ran) -> bool {
    let report = serde_json::from_slice::<serde_json::Value>(&ran.stdout);
    ran.status.success() && report.is_ok_and(|report| report["attachable"] == false)
}

/// What a map that ended with 65 says is whole JSON (or nothing, where the image could not
/// be opened), and of all that is not damaged it says what QEMU says, where that reads it.
pub(crate) fn same_but_for_damage(theirs: &Ran, ours: &Ran, file: &str) -> Outcome {
    refused(ours, &[EX_INVALID], &[file])?;
    if ours.stdout.is_empty() {
        return Ok(());
    }
    let ours_rows = rows(&ours.stdout)?;
    if !theirs.status.success() {
        return Ok(());
    }
    let theirs_rows = rows(&theirs.stdout)?;
    let end = |rows: &[Row]| rows.last().map(|row| row.start + row.length);
    if end(&ours_rows) != end(&theirs_rows) {
        return Err(format!("one is not whole:\n{}{}", theirs.describe(), ours.describe()));
    }
    for row in ours_rows.iter().filter(|row| !row.is_damaged()) {
        for other in &theirs_rows {
            let (from, to) = (
                row.start.max(other.start),
                (row.start + row.length).min(other.start + other.length),
            );
            if from < to && row.part(from, to) != other.part(from, to) {
                return Err(format!("qemu-img: {other:?}\nimgdm: {row:?}"));
            }
        }
    }
    Ok(())
}

/// Runs a command in at most a GiB of address space.
/// # Errors
/// It could not be run, a signal ended it, or it panicked.
pub(crate) fn in_a_gib(dir: &Path, args: &[&str]) -> Outcome<Ran> {
    let mut command = Command::new("prlimit");
    command.current_dir(dir).args(["--as=1073741824", "--", PROGRAM]).args(args);
    sound(run(&mut command)?)
}

/// The image is as good as one that nothing was done to.
fn reads_like_qemu(dir: &Path, image: &str, extra: &[&str]) {
    let line = ["map", "-f", "qcow2", "--output=json", image];
    let mut ours = line.to_vec();
    ours.extend_from_slice(extra);
    same(&qemu::img(dir, &line).unwrap(), &imgdm(dir, &ours).unwrap()).unwrap();
    convert(dir, "qcow2", image, "copy.raw").unwrap();
    let mut ours = vec!["table", "--output=json", image];
    ours.extend_from_slice(extra);
    let ran = imgdm(dir, &ours).unwrap().ok().unwrap();
    compare(&Plan::parse(&ran.stdout).unwrap(), &dir.join("copy.raw")).unwrap();
}

fn plan_json(dir: &Path, args: &[&str]) -> serde_json::Value {
    let mut line = vec!["plan", "--output=json"];
    line.extend_from_slice(args);
    let ran = imgdm(dir, &line).unwrap().ok().unwrap();
    serde_json::from_slice(&ran.stdout).unwrap()
}

#[test]
fn a_dirty_image_is_read_and_plan_warns() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    bad(dir).put_u64(patch::INCOMPATIBLE, 1).unwrap();
    reads_like_qemu(dir, "bad.qcow2", &[]);
    let plan = plan_json(dir, &["bad.qcow2"]);
    assert_eq!(plan["attachable"], true, "{plan}");
    assert_eq!(plan["warnings"][0]["kind"], "dirty", "{plan}");
}

#[test]
fn a_corrupt_image_is_refused_unless_it_is_allowed() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    bad(dir).put_u64(patch::INCOMPATIBLE, 2).unwrap();
    for command in ["map", "table"] {
        let ran = imgdm(dir, &[command, "bad.qcow2"]).unwrap();
        refused(&ran, &[EX_INVALID], &["bad.qcow2", "marked corrupt"]).unwrap();
    }
    // The preflight lists it with all else that stands in the way.
    let plan = plan_json(dir, &["bad.qcow2"]);
    assert_eq!(plan["attachable"], false, "{plan}");
    assert_eq!(plan["obstacles"][0]["kind"], "corrupt", "{plan}");
    reads_like_qemu(dir, "bad.qcow2", &["--allow-corrupt"]);
    let plan = plan_json(dir, &["--allow-corrupt", "bad.qcow2"]);
    assert_eq!(plan["warnings"][0]["kind"], "corrupt", "{plan}");
}

#[test]
fn an_unknown_feature_is_refused_by_the_name_that_the_image_gives_it() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    // qemu-img leaves the table of names out where a cluster has no room for it.
    let steps = vec![create("good.qcow2", "qcow2", &[], None, SIZE)];
    recipe_of(steps, &[]).make(dir).unwrap();
    let image = bad(dir);
    let extensions = image.extensions().unwrap();
    let (_, names, _) = *extensions.iter().find(|e| e.0 == FEATURE_NAMES).unwrap();
    let mut entry = [0; 48];
    entry[1] = 17;
    entry[2..23].copy_from_slice(b"frobnicated clusters\0");
    image.put(names, &entry).unwrap();
    image.put_u64(patch::INCOMPATIBLE, 1 << 17).unwrap();
    all_refuse(dir, &["bad.qcow2"], &[EX_INVALID], &["bad.qcow2", "frobnicated clusters"]);
    image.put_u64(patch::INCOMPATIBLE, 1 << 43).unwrap();
    all_refuse(dir, &["bad.qcow2"], &[EX_INVALID], &["bad.qcow2", "43"]);
    // Unknown compatible and autoclear bits change nothing.
    image.put_u64(patch::INCOMPATIBLE, 0).unwrap();
    image.put_u64(patch::INCOMPATIBLE + 8, 1 << 43).unwrap();
    image.put_u64(patch::INCOMPATIBLE + 16, 1 << 43).unwrap();
    reads_like_qemu(dir, "bad.qcow2", &[]);
}

#[test]
fn header_fields_that_make_no_sense_are_refused() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let fields: &[(&str, u64, &[u8])] = &[
        ("version 0", patch::VERSION, &[0, 0, 0, 0]),
        ("version 4", patch::VERSION, &[0, 0, 0, 4]),
        ("clusters of 256 bytes", patch::CLUSTER_BITS, &[0, 0, 0, 8]),
        ("clusters of 4 MiB", patch::CLUSTER_BITS, &[0, 0, 0, 22]),
        ("clusters of 2^63 bytes", patch::CLUSTER_BITS, &[0, 0, 0, 63]),
        ("clusters of 2^64 bytes", patch::CLUSTER_BITS, &[0, 0, 0, 64]),
        ("the largest cluster_bits", patch::CLUSTER_BITS, &[255; 4]),
        ("the largest size", patch::SIZE, &[255; 8]),
        ("a size past the L1 table", patch::SIZE, &[0, 0, 1, 0, 0, 0, 0, 0]),
        ("an unknown cipher", patch::CRYPT_METHOD, &[0, 0, 0, 3]),
        ("an L1 table of no entry", patch::L1_ENTRIES, &[0; 4]),
        ("the largest L1 table", patch::L1_ENTRIES, &[255; 4]),
        ("an L1 table of 32 MiB", patch::L1_ENTRIES, &[0, 64, 0, 0]),
        ("an unaligned L1 table", patch::L1_OFFSET, &[0, 0, 0, 0, 0, 0, 0x12, 8]),
        ("an L1 table past the end", patch::L1_OFFSET, &[0, 0, 1, 0, 0, 0, 0, 0]),
        ("an L1 table past 2^63", patch::L1_OFFSET, &[255, 255, 255, 255, 255, 255, 0xf0, 0]),
        ("an unaligned refcount table", patch::REFCOUNT_OFFSET, &[0, 0, 0, 0, 0, 0, 0x12, 8]),
        ("many snapshots", patch::SNAPSHOTS, &[255; 4]),
        ("an unaligned snapshot table", patch::SNAPSHOTS_OFFSET, &[0, 0, 0, 0, 0, 0, 0x12, 8]),
        ("refcounts of 2^99 bits", patch::REFCOUNT_ORDER, &[0, 0, 0, 99]),
        ("a header of 3 bytes", patch::HEADER_LENGTH, &[0, 0, 0, 3]),
        ("a header as long as memory", patch::HEADER_LENGTH, &[255; 4]),
        ("a long backing name", patch::BACKING_LENGTH, &[0, 0, 4, 0]),
        ("the longest backing name", patch::BACKING_LENGTH, &[255; 4]),
        ("a backing name past the end", patch::BACKING_OFFSET, &[0, 0, 1, 0, 0, 0, 0, 0]),
        ("an extension as long as memory", 116, &[255; 4]),
    ];
    let mut accepted = Vec::new();
    for (what, at, bytes) in fields {
        let image = bad(dir);
        image.put(*at, bytes).unwrap();
        // Whatever QEMU reads, it reads the same as we; whatever it refuses, we refuse.
        let line = ["map", "--output=json", "-f", "qcow2", "bad.qcow2"];
        let theirs = qemu::img_any(dir, &line).unwrap();
        for command in COMMANDS {
            let ran = in_a_gib(dir, &[command, "-f", "qcow2", "bad.qcow2"])
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            // Where a table can't be found, what only looks goes on.
            if command == "plan" && ran.text().starts_with("attachable:    no") {
                continue;
            }
            if theirs.status.success() && ran.status.success() {
                accepted.push(*what);
                continue;
            }
            refused(&ran, &[EX_INVALID], &["bad.qcow2"])
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let went_on = command == "map" && ran.stderr.contains("the metadata is damaged in ");
            assert!(ran.stdout.is_empty() || went_on, "{what}: {}", ran.describe());
        }
        if theirs.status.success() {
            let ours = imgdm(dir, &line).unwrap();
            // What QEMU lets pass may be refused, but not be read as something else.
            if ours.status.success() {
                same(&theirs, &ours)
            } else {
                same_but_for_damage(&theirs, &ours, "bad.qcow2")
            }
            .unwrap_or_else(|error| panic!("{what}: {error}"));
        }
    }
    accepted.dedup();
    assert_eq!(accepted, Vec::<&str>::new(), "what is read all the same");
}

/// The device that `table` planned for bad.qcow2 is the disk that QEMU reads; where QEMU
/// can't read it, neither can it be attached.
fn same_device(dir: &Path, table: &Ran) -> Outcome {
    let converted = convert(dir, "qcow2", "bad.qcow2", "copy.raw");
    let plan = Plan::parse(&table.stdout)?;
    if plan.backings.iter().all(|backing| backing.kind != "scratch") {
        converted?;
        return compare(&plan, &dir.join("copy.raw"));
    }
    let policy = OpenPolicy { format: Some(Format::Qcow2), ..OpenPolicy::default() };
    let reading = Reading { policy, ..Reading::default() };
    let ours = device::compare(dir, "bad.qcow2", &reading, "copy.raw").map(drop);
    match (converted, ours) {
        (Err(_), Err(_)) | (Ok(()), Ok(())) => Ok(()),
        (Ok(()), ours) => ours,
        (Err(theirs), Ok(())) => Err(format!("QEMU can't read it: {theirs}")),
    }
}

#[test]
fn an_image_cut_off_anywhere_is_refused_or_read_as_qemu_reads_it() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let whole = fs::metadata(dir.join("good.qcow2")).unwrap().len();
    let cuts = (0..128).step_by(4).chain((128..whole).step_by(512)).chain((1..whole).step_by(4001));
    let mut refusals = 0;
    for cut in cuts {
        bad(dir).set_length(cut).unwrap();
        let line = ["map", "--output=json", "-f", "qcow2", "bad.qcow2"];
        let theirs = qemu::img_any(dir, &line).unwrap();
        let ours = imgdm(dir, &line).unwrap();
        if ours.status.success() {
            same(&theirs, &ours).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        } else {
            same_but_for_damage(&theirs, &ours, "bad.qcow2")
                .unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
            refusals += 1;
        }
        // Nothing that was cut off becomes a device: data past the end is an obstacle.
        let ran = imgdm(dir, &["table", "--output=json", "-f", "qcow2", "bad.qcow2"]).unwrap();
        if ran.status.success() {
            same_device(dir, &ran).unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        } else {
            refused(&ran, &[EX_INVALID, EX_NOT_REPRESENTABLE], &["bad.qcow2"])
                .unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
        }
    }
    assert!(refusals > 30, "{refusals}");
}

#[test]
fn an_image_cut_off_inside_a_table_is_attached_by_nobody_and_listed_by_map_and_plan() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let image = bad(dir);
    let l2 = image.l2_entry(0).unwrap() / 4096 * 4096;
    let tables = [
        ("header", 0),
        ("header extensions", 112),
        ("L1 table", image.u64(patch::L1_OFFSET).unwrap()),
        ("L2 table", l2),
    ];
    for (what, at) in tables {
        for cut in [at + 4, at + 8] {
            // What is in use further on is not what this is about: the table has to be
            // the last in the file.
            bad(dir).set_length(cut).unwrap();
            println!("{what} cut at {cut}");
            if what.starts_with("header") {
                all_refuse(dir, &["-f", "qcow2", "bad.qcow2"], &[EX_INVALID], &["bad.qcow2"]);
            } else {
                all_find_damage(dir, &["-f", "qcow2", "bad.qcow2"], &["bad.qcow2", "at offset"]);
            }
        }
    }
    // The snapshot table is read when a snapshot is asked for.
    let image = bad(dir);
    let at = image.u64(patch::SNAPSHOTS_OFFSET).unwrap();
    image.set_length(at + 20).unwrap();
    all_refuse(dir, &["-f", "qcow2", "-l", "second", "bad.qcow2"], &[EX_INVALID], &["bad.qcow2"]);
}

#[test]
fn data_past_the_files_end_is_zero_to_map_as_to_qemu_and_an_obstacle_to_table() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let image = bad(dir);
    let entry = image.l2_entry(8192).unwrap();
    let old = image.u64(entry).unwrap();
    let far = image.length().unwrap().next_multiple_of(4096) + (1 << 30);
    image.put_u64(entry, (old & !OFFSET_MASK) | far).unwrap();
    let line = strings(&["map", "-f", "qcow2", "--output=json", "bad.qcow2"]);
    same(&qemu::img(dir, &line).unwrap(), &imgdm(dir, &line).unwrap()).unwrap();
    let ran = imgdm(dir, &["table", "bad.qcow2"]).unwrap();
    refused(&ran, &[EX_INVALID, EX_NOT_REPRESENTABLE], &["bad.qcow2"]).unwrap();
    let plan = plan_json(dir, &["bad.qcow2"]);
    assert_eq!(plan["attachable"], false, "{plan}");
    assert_eq!(plan["obstacles"][0]["first_guest_offset"], 8192, "{plan}");
}

/// Puts `value` into the L1 or L2 entry for guest byte 0 and checks all commands.
fn with_entry(name: &str, level: u32, value: u64, check: impl Fn(&Path)) {
    let dir = scratch_dir("damaged").unwrap();
    good(dir.path());
    let image = bad(dir.path());
    let entry = if level == 1 { image.l1_entry(0) } else { image.l2_entry(4096) };
    image.put_u64(entry.unwrap(), value).unwrap();
    println!("{name}: {value:#x}");
    check(dir.path());
}

const COPIED: u64 = 1 << 63;

#[test]
fn an_unaligned_l1_or_l2_entry_is_damage_where_qemus_map_breaks_off() {
    for (level, value) in [(1, COPIED | 0x1200), (2, COPIED | 0x1200), (2, COPIED | 0x0012_3600)] {
        with_entry("unaligned", level, value, |dir| {
            let line = ["map", "-f", "qcow2", "bad.qcow2"];
            assert!(!qemu::img_any(dir, &line).unwrap().status.success());
            all_find_damage(dir, &["bad.qcow2"], &["bad.qcow2", "at offset 0x"]);
        });
    }
}

#[test]
fn an_l2_table_past_the_files_end_is_damage_though_qemu_reads_zeros_there() {
    for value in [COPIED | (1 << 40), 0x00ff_ffff_ffff_f000, COPIED | 0x10_0000] {
        with_entry("past the end", 1, value, |dir| {
            all_find_damage(dir, &["bad.qcow2"], &["bad.qcow2", "L2 table"]);
        });
    }
}

#[test]
fn an_l2_table_over_the_header_or_another_table_is_damage_or_read_as_qemu_reads_it() {
    // At 0 there is "no L2 table" to QEMU, bit 63 or not.
    for value in [COPIED, COPIED | 0x1000, COPIED | 0x2000, COPIED | 0x3000, 0x3000] {
        with_entry("overlapping", 1, value, |dir| {
            let line = ["map", "-f", "qcow2", "--output=json", "bad.qcow2"];
            let (theirs, ours) = (qemu::img_any(dir, &line).unwrap(), imgdm(dir, &line).unwrap());
            if ours.status.success() {
                same(&theirs, &ours).unwrap();
            } else {
                same_but_for_damage(&theirs, &ours, "bad.qcow2").unwrap();
            }
        });
    }
}

#[test]
fn l2_entries_with_any_bit_set_are_damage_or_read_as_qemu_reads_them() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let entry = bad(dir).l2_entry(4096).unwrap();
    let old = bad(dir).u64(entry).unwrap();
    for bit in 0..64 {
        bad(dir).put_u64(entry, old ^ (1 << bit)).unwrap();
        let line = ["map", "-f", "qcow2", "--output=json", "bad.qcow2"];
        let (theirs, ours) = (qemu::img_any(dir, &line).unwrap(), imgdm(dir, &line).unwrap());
        if ours.status.success() {
            same(&theirs, &ours).unwrap_or_else(|error| panic!("bit {bit}: {error}"));
        } else {
            same_but_for_damage(&theirs, &ours, "bad.qcow2")
                .unwrap_or_else(|error| panic!("bit {bit}: {error}"));
        }
        let ran = imgdm(dir, &["table", "--output=json", "bad.qcow2"]).unwrap();
        if ran.status.success() {
            same_device(dir, &ran).unwrap_or_else(|error| panic!("bit {bit}: {error}"));
        } else {
            refused(&ran, &[EX_INVALID, EX_NOT_REPRESENTABLE], &["bad.qcow2"])
                .unwrap_or_else(|error| panic!("bit {bit}: {error}"));
        }
    }
}

#[test]
fn flipped_metadata_bytes_bring_no_panic_and_no_other_disk_than_qemus() {
    let dir = scratch_dir("damaged").unwrap();
    let dir = dir.path();
    good(dir);
    let mut rng = Rng::for_case(1, "flipped", 0);
    let image = bad(dir);
    let l1 = image.u64(patch::L1_OFFSET).unwrap();
    let l2 = image.l2_entry(0).unwrap() / 4096 * 4096;
    let snapshots = image.u64(patch::SNAPSHOTS_OFFSET).unwrap();
    let (mut read, mut refusals) = (0, 0);
    for case in 0..150 {
        let image = bad(dir);
        let mut flips = Vec::new();
        for _ in 0..rng.range(1, 3) {
            let at = match rng.below(5) {
                0 | 1 => rng.below(160),
                2 => l1 + rng.below(16),
                3 => l2 + rng.below(64),
                _ => snapshots + rng.below(120),
            };
            let [old] = image.bytes::<1>(at).unwrap();
            let new = old ^ (1 << rng.below(8));
            image.put(at, &[new]).unwrap();
            flips.push((at, old, new));
        }
        let what = format!("case {case}: offset, old, new {flips:x?}");
        let line = ["map", "-f", "qcow2", "--output=json", "bad.qcow2"];
        let theirs = qemu::img_any(dir, &line).unwrap();
        for extra in [&[][..], &["-l", "second"], &["-l", "first"]] {
            for command in COMMANDS {
                let mut args = vec![command, "-f", "qcow2", "--output=json", "bad.qcow2"];
                args.extend_from_slice(extra);
                let ran = in_a_gib(dir, &args).unwrap_or_else(|error| panic!("{what}: {error}"));
                if command == "plan" && is_plan_with_obstacles(&ran) {
                    refusals += 1;
                } else if !ran.status.success() {
                    refusals += 1;
                    if command == "map" && extra.is_empty() && ran.code() == Some(EX_INVALID) {
                        same_but_for_damage(&theirs, &ran, "bad.qcow2")
                            .unwrap_or_else(|error| panic!("{what}: {error}"));
                    }
                    let codes = [EX_INVALID, EX_MISSING, EX_NOT_REPRESENTABLE];
                    refused(&ran, &codes, &["imgdm:"])
                        .unwrap_or_else(|error| panic!("{what}: {error}"));
                } else if command == "map" && extra.is_empty() && theirs.status.success() {
                    read += 1;
                    same(&theirs, &ran).unwrap_or_else(|error| panic!("{what}: {error}"));
                }
            }
        }
    }
    assert!(read > 20 && refusals > 200, "{read} maps compared, {refusals} refusals");
}

/// An encrypted x.qcow2 with data at 64 KiB; gives the arguments by which QEMU opens it.
pub(crate) fn encrypted(dir: &Path, format: &str) -> ([&'static str; 2], &'static str) {
    let secret = ["--object", "secret,id=s,data=oracle"];
    let options = format!("encrypt.format={format},encrypt.key-secret=s");
    let options = if format == "luks" { options + ",encrypt.iter-time=10" } else { options };
    let mut line = vec!["create", "-q", "-f", "qcow2"];
    line.extend(secret);
    line.extend(["-o", &options, "x.qcow2", "1M"]);
    qemu::img(dir, &line).unwrap();
    let image = "driver=qcow2,file.filename=x.qcow2,encrypt.key-secret=s";
    let mut io = Command::new("qemu-io");
    let write = ["--image-opts", image, "-c", "write -P 5 65536 4096"];
    run(io.current_dir(dir).args(secret).args(write)).unwrap().ok().unwrap();
    (secret, image)
}

#[test]
fn encrypted_images_are_mapped_and_planned_without_a_key() {
    for format in ["luks", "aes"] {
        let dir = scratch_dir("damaged").unwrap();
        let dir = dir.path();
        let (secret, image) = encrypted(dir, format);
        for output in ["--output=json", "--output=human"] {
            let mut line = vec!["map", output];
            line.extend(secret);
            line.extend(["--image-opts", image]);
            let theirs = qemu::img_any(dir, &line).unwrap();
            let ours = imgdm(dir, &["map", output, "x.qcow2"]).unwrap();
            same(&theirs, &ours).unwrap_or_else(|error| panic!("{format}: {error}"));
        }
        let table = imgdm(dir, &["table", "x.qcow2"]).unwrap().ok().unwrap().text();
        assert!(table.contains(" crypt aes-"), "{table}");
        let plan = plan_json(dir, &["x.qcow2"]);
        assert_eq!((&plan["attachable"], &plan["keys"][0]["layer"]), (&true.into(), &0.into()));
    }
}
