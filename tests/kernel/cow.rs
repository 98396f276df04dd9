//! cow images as User-Mode Linux and its tools write them.
//!
//! `tests/kernel/run` made them: COW_DIR holds `written.cow` over `backing.raw`, written
//! by a guest's kernel to its `ubd0=COW,BACKING` disk, `written.read`, what that guest
//! then read there, and `written.merged`, uml_moo's merge; `fresh.cow` is uml_mkcow's,
//! which nobody wrote to, and `fresh.merged`.

use std::fs;
use std::path::PathBuf;

use crate::args;
use crate::guest::*;

fn made(name: &str) -> PathBuf {
    let directory = std::env::var_os("COW_DIR").expect("COW_DIR names no directory");
    PathBuf::from(directory).join(name)
}

/// The backing file by an absolute path is part of a cow image: they stay where they are.
#[track_caller]
fn assert_attached(image: &str, wanted: &[u8]) {
    let _scratch = Scratch::new();
    let path = made(image);
    // Nothing declares the backing file's format: a cow image always lies over raw.
    let device = attach([&path]);
    assert_same(image, &device.bytes(), wanted);
    assert_random_reads(&device.path, wanted, 29);
    assert_no_process(path.parent().unwrap());
    let backing = made("backing.raw");
    let named = listed()[0]["loops"]
        .as_array()
        .unwrap()
        .iter()
        .any(|each| each["file"]["path"].as_str() == backing.to_str());
    assert!(named, "list does not name the backing file");
    device.detach();
}

#[test]
fn a_cow_image_that_a_guest_wrote_reads_as_that_guest_read_it() {
    let read = fs::read(made("written.read")).unwrap();
    let backing = fs::read(made("backing.raw")).unwrap();
    assert!(read.len() == backing.len() && read != backing, "the guest wrote nothing");
    assert_attached("written.cow", &read);
}

#[test]
fn a_cow_image_that_a_guest_wrote_reads_as_uml_moo_merges_it() {
    assert_attached("written.cow", &fs::read(made("written.merged")).unwrap());
}

#[test]
fn a_cow_image_that_uml_mkcow_made_reads_as_its_backing_file() {
    let backing = fs::read(made("backing.raw")).unwrap();
    assert_same("uml_moo's merge", &fs::read(made("fresh.merged")).unwrap(), &backing);
    assert_attached("fresh.cow", &backing);
}

#[test]
fn a_cow_image_whose_backing_file_changed_is_refused_unless_allowed() {
    let scratch = Scratch::new();
    // A copy of both, since the name is in the header: over the bytes of the old one.
    let (cow, backing) = (scratch.path("own.cow"), scratch.path("own.raw"));
    fs::copy(made("backing.raw"), &backing).unwrap();
    tool("uml_mkcow", args![&cow, &backing]);
    tool("touch", args!["-d", "2001-02-03", &backing]);
    let said = imgdm(args!["attach", &cow]).refused(65);
    assert!(said.contains("own.raw"), "{said}");
    assert_nothing_left();
    let device = attach(args!["--allow-changed-backing", &cow]);
    assert_same("allowed", &device.bytes(), &fs::read(&backing).unwrap());
    device.detach();
}
