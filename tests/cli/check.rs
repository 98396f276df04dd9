//! `imgdm check`: exit statuses, and what is printed of how much.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use crate::images::{CLUSTER, Qcow2, chain, imgdm};

fn check(image: &Qcow2, more: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    image.write(directory.path(), "x.qcow2");
    imgdm(directory.path(), &[&["check"], more, &["x.qcow2"]].concat())
}

/// An image with the refcounts 1 of its first `clusters` clusters: the refcount block comes
/// last.
fn with_refcounts(mut image: Qcow2, clusters: usize) -> Qcow2 {
    let block = image.bytes.len();
    image.bytes.resize(block + CLUSTER, 0);
    image.put(CLUSTER, &(block as u64).to_be_bytes());
    for cluster in 0..clusters {
        image.put(block + cluster * 2, &[0, 1]);
    }
    let copied = image.bytes[2 * CLUSTER] | 0x80;
    image.put(2 * CLUSTER, &[copied]);
    image
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn each_end_has_its_status() {
    let healthy = with_refcounts(Qcow2::new().data(1), 6);
    let output = check(&healthy, &[]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let leaky = with_refcounts(Qcow2::new().data(1).entry(1, 0), 6);
    assert_eq!(check(&leaky, &[]).status.code(), Some(3));
    let corrupt = with_refcounts(Qcow2::new().data(1), 5);
    assert_eq!(check(&corrupt, &[]).status.code(), Some(2));
    let mut broken = with_refcounts(Qcow2::new().data(1), 6);
    broken.put(60, &u32::MAX.to_be_bytes());
    let output = check(&broken, &["--output=json"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(json(&output)["incomplete"], true);
    assert!(String::from_utf8_lossy(&output.stderr).contains("not all of the image"));
    let output = check(&healthy, &["-f", "raw"]);
    assert_eq!(output.status.code(), Some(63));
    assert!(output.stdout.is_empty());
    let mut unknown = Qcow2::new();
    unknown.put(72, &(1u64 << 40).to_be_bytes());
    assert_eq!(check(&unknown, &[]).status.code(), Some(65));
}

/// qemu-img check opens these, and fails where one is missing.
#[test]
fn neither_backing_nor_data_file_nor_key_is_needed() {
    let image = Qcow2::new().backing(Path::new("gone"), Some("raw")).data(1);
    assert_eq!(check(&with_refcounts(image, 6), &[]).status.code(), Some(0));
    let mut image = with_refcounts(Qcow2::new(), 5);
    image.put(72, &4u64.to_be_bytes());
    assert_eq!(check(&image, &[]).status.code(), Some(0));
    let mut image = with_refcounts(Qcow2::new(), 5);
    image.put(32, &1u32.to_be_bytes());
    assert_eq!(check(&image, &[]).status.code(), Some(0));
}

#[test]
fn the_first_findings_of_a_kind_are_told_or_all() {
    let mut image = Qcow2::new();
    for guest in 0..16 {
        image = image.entry(guest, 2);
    }
    let image = with_refcounts(image, 5);
    let report = json(&check(&image, &["--output=json"]));
    assert_eq!(report["finding-counts"]["l2-reserved-bits"], 16);
    assert_eq!(report["findings"].as_array().unwrap().len(), 10);
    assert_eq!(report["findings"][1]["guest-offset"], CLUSTER);
    assert_eq!(report["findings"][1]["table"], "l2");
    assert_eq!(report["findings"][1]["entry"], 1);
    let report = json(&check(&image, &["--output=json", "--all"]));
    assert_eq!(report["findings"].as_array().unwrap().len(), 16);
    let output = String::from_utf8(check(&image, &[]).stdout).unwrap();
    assert!(output.contains("l2-reserved-bits: 6 more"), "{output}");
    assert!(output.contains("16 errors were found on the image."), "{output}");
}

#[test]
fn notices_change_no_status() {
    let mut image = with_refcounts(Qcow2::new(), 5);
    image.put(72, &3u64.to_be_bytes());
    let output = check(&image, &["--output=json"]);
    assert_eq!(output.status.code(), Some(0));
    let report = json(&output);
    assert_eq!(report["finding-counts"]["marked-dirty"], 1);
    assert_eq!(report["finding-counts"]["marked-corrupt"], 1);
}

#[test]
fn the_file_is_not_touched() {
    let directory = chain();
    let path = directory.path().join("top.qcow2");
    let before = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    imgdm(directory.path(), &["check", "top.qcow2"]);
    let after = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap().modified().unwrap());
    assert!(before == after);
}
