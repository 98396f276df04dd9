//! Files and disks that end inside a sector.

use std::fs;
use std::path::Path;

use imgdm::format::Format;
use imgdm::open::OpenPolicy;

use crate::check::convert;
use crate::common::images::scratch_dir;
use crate::common::qemu;
use crate::device::{self, Reading};

fn reading(format: Format) -> Reading {
    let policy = OpenPolicy { format: Some(format), ..OpenPolicy::default() };
    Reading { policy, ..Reading::default() }
}

fn odd_raw(dir: &Path, length: usize) {
    let bytes: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap() + 1).collect();
    fs::write(dir.join("odd.raw"), bytes).unwrap();
}

#[test]
fn raw_files_with_tails_of_every_length_end_in_zeros() {
    let dir = scratch_dir("odd").unwrap();
    let dir = dir.path();
    for tail in 1..512 {
        odd_raw(dir, 3 * 512 + tail);
        // Its own copy, with zeros up to the sector's end.
        device::compare(dir, "odd.raw", &reading(Format::Raw), "odd.raw")
            .unwrap_or_else(|error| panic!("tail of {tail}: {error}"));
        if tail % 73 == 1 {
            convert(dir, "raw", "odd.raw", "copy.raw").unwrap();
            device::compare(dir, "odd.raw", &reading(Format::Raw), "copy.raw").unwrap();
        }
    }
}

#[test]
fn tails_of_backing_files_and_of_cut_images() {
    let dir = scratch_dir("odd").unwrap();
    let dir = dir.path();
    let create = |line: &[&str]| {
        let line = [&["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"], line].concat();
        qemu::img(dir, &line).unwrap();
    };
    odd_raw(dir, 70_000);
    create(&["-b", "odd.raw", "-F", "raw", "over.qcow2", "256k"]);
    qemu::img(dir, &["convert", "-O", "qcow2", "-o", "cluster_size=4k", "odd.raw", "cut.qcow2"])
        .unwrap();
    let whole = fs::read(dir.join("cut.qcow2")).unwrap();
    let last = whole.len().next_multiple_of(4096) - 4096;
    // What QEMU makes of a tail does not depend on its length: a sample is enough.
    for tail in (1..512).step_by(37).chain([2, 255, 511]) {
        odd_raw(dir, 66_048 + tail);
        let cut = last + 512 + tail;
        let mut bytes = whole.clone();
        bytes.resize(cut, 7);
        fs::write(dir.join("cut.qcow2"), bytes).unwrap();
        for image in ["over.qcow2", "cut.qcow2"] {
            convert(dir, "qcow2", image, "copy.raw").unwrap();
            device::compare(dir, image, &reading(Format::Qcow2), "copy.raw")
                .unwrap_or_else(|error| panic!("tail of {tail}: {error}"));
        }
    }
}
