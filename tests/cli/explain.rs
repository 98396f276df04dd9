//! `imgdm explain --reverse`: what it says of holes, of overlays, and of damage.

use std::fs::{self, File};
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::images::{CLUSTER, Qcow2, imgdm};

fn reverse(directory: &Path, place: &str, more: &[&str]) -> Output {
    imgdm(directory, &[&["explain", "--reverse", place], more].concat())
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

/// Status 65, and the JSON's problems are on stderr too.
#[track_caller]
fn assert_damaged(output: &Output, depth: u64, offset: u64, kind: &str) {
    assert_eq!(output.status.code(), Some(65), "{output:?}");
    let found = json(output);
    let problem = &found["problems"][0];
    assert_eq!((&problem["depth"], &problem["offset"]), (&depth.into(), &offset.into()), "{found}");
    assert_eq!(problem["kind"], kind, "{found}");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let message = format!("at offset {offset:#x}: {}", problem["message"].as_str().unwrap());
    assert!(stderr.contains(&message), "{stderr}");
    let count = found["problems"].as_array().unwrap().len();
    assert!(stderr.contains(&format!("damaged in {count} place")), "{stderr}");
}

#[test]
fn damage_that_may_hide_a_use_is_told() {
    let directory = tempfile::tempdir().unwrap();
    // Where the L2 table is named, it can't be; what it names seems to be unused.
    let mut image = Qcow2::new().data(1).data(2);
    image.put(2 * CLUSTER, &(3 * CLUSTER as u64 + 512).to_be_bytes());
    image.write(directory.path(), "x.qcow2");
    let output = reverse(directory.path(), ":0x50064", &["--output=json", "x.qcow2"]);
    assert_damaged(&output, 0, 2 * CLUSTER as u64, "unaligned");
    let output = reverse(directory.path(), ":0x50064", &["x.qcow2"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains("nothing that could be read refers to it: unused"), "{stdout}");
    // An L2 entry alone: the byte is found, but may have more uses.
    let image = Qcow2::new().data(1).entry(2, 1 << 40);
    image.write(directory.path(), "x.qcow2");
    let output = reverse(directory.path(), ":0x40064", &["--output=json", "x.qcow2"]);
    assert_damaged(&output, 0, 3 * CLUSTER as u64 + 16, "outside-file");
    assert_eq!(json(&output)["guests"][0]["visibility"], "shown");
    let whole = Qcow2::new().data(1);
    whole.write(directory.path(), "x.qcow2");
    let output = reverse(directory.path(), ":0x40064", &["--output=json", "x.qcow2"]);
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(json(&output)["problems"].as_array().map(Vec::len), Some(0));
}

#[test]
fn many_problems_are_listed_in_part_and_all_counted() {
    let directory = tempfile::tempdir().unwrap();
    let mut image = Qcow2::new();
    for entry in 0..300 {
        image = image.entry(entry, 1 << 40);
    }
    image.write(directory.path(), "x.qcow2");
    let output = reverse(directory.path(), ":0", &["--output=json", "x.qcow2"]);
    let found = json(&output);
    assert_eq!(found["problems"].as_array().map(Vec::len), Some(100));
    assert_eq!(found["problems_omitted"], 200);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("and 200 more") && stderr.contains("in 300 places"), "{stderr}");
}

#[test]
fn a_hole_of_a_raw_file_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    File::create(directory.path().join("a.raw")).unwrap().set_len(1 << 20).unwrap();
    let output = reverse(directory.path(), ":0", &["--output=json", "-f", "raw", "a.raw"]);
    let found = json(&output);
    assert_eq!(found["guests"][0]["visibility"], "shown", "{found}");
    // Not so the cluster that a zero cluster keeps.
    Qcow2::new().entry(1, (3 * CLUSTER as u64) | (1 << 63) | 1).write(directory.path(), "x.qcow2");
    let output = reverse(directory.path(), ":0x30000", &["--output=json", "x.qcow2"]);
    let found = json(&output);
    assert_eq!(found["guests"][0]["kind"], "kept-for-zeros", "{found}");
    assert_eq!(found["guests"][0]["visibility"], "not-read", "{found}");
}

#[test]
fn what_a_short_overlay_cuts_off_is_out_of_reach() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![b'b'; 1 << 20]).unwrap();
    let mut mid = Qcow2::new().backing(Path::new("base.raw"), Some("raw"));
    mid.put(24, &(512u64 << 10).to_be_bytes());
    mid.write(directory.path(), "mid.qcow2");
    let top = Qcow2::new().backing(Path::new("mid.qcow2"), Some("qcow2")).data(14);
    top.write(directory.path(), "top.qcow2");
    for (offset, visibility) in
        [("0x40000", "shown"), ("0xc0000", "out-of-reach"), ("0xe0000", "hidden")]
    {
        let place = format!("base.raw:{offset}");
        let output = reverse(directory.path(), &place, &["--output=json", "top.qcow2"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(json(&output)["guests"][0]["visibility"], visibility, "{offset}: {output:?}");
    }
}

#[test]
fn a_damaged_overlay_hides_nothing() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![b'b'; 1 << 20]).unwrap();
    let top = Qcow2::new().entry(1, 4 * CLUSTER as u64 + 512);
    let top = top.backing(Path::new("base.raw"), Some("raw"));
    top.write(directory.path(), "top.qcow2");
    let more = ["--output=json", "top.qcow2"];
    let output = reverse(directory.path(), "base.raw:0x10000", &more);
    assert_damaged(&output, 0, 3 * CLUSTER as u64 + 8, "invalid-field");
    let found = json(&output);
    assert_eq!(found["guests"][0]["visibility"], "damaged", "{found}");
    assert_eq!(found["guests"][0]["damaged_layer"], 0, "{found}");
    // Elsewhere the overlay's damage is in nobody's way.
    let output = reverse(directory.path(), "base.raw:0x20000", &more);
    assert!(output.status.success(), "{output:?}");
}
