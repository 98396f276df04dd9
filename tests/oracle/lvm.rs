//! LVM's metadata beside LVM's own reading of it (`pvck`, which needs no device-mapper).
//! The kernel tier has volume groups that LVM itself makes.

use std::fs::{self, File};
use std::process::Command;

use imgdm::lvm;
use imgdm::partition::Disk as _;

use crate::common::images::scratch_dir;
use crate::common::lvm::{
    AREA_AT, AREA_HEADER, FIRST, MIB, group_text, linear_text, logical_text, put_area, put_label,
};
use crate::common::process::{Outcome, run};
use crate::partitions::FileDisk;

const AREA: (usize, usize) = (AREA_AT, MIB - AREA_AT);

/// What `pvck` dumps of a file.
fn pvck(what: &str, image: &std::path::Path) -> Outcome<String> {
    let mut command = Command::new("pvck");
    command.args(["--dump", what]).arg(image).env("LVM_SUPPRESS_FD_WARNINGS", "1");
    Ok(run(&mut command)?.ok()?.text())
}

#[test]
fn what_lvm_takes_for_sound_metadata_is_read() {
    let dir = scratch_dir("lvm").unwrap();
    let image = dir.path().join("pv");
    let segments = [linear_text(0, 3, "pv0", 7), linear_text(3, 2, "pv0", 20)];
    let segments: Vec<_> = segments.iter().map(String::as_str).collect();
    let text = group_text("vg", 12, &[FIRST], &logical_text("root", &segments));
    for text_at in [AREA_HEADER, AREA.1 - 1024, AREA.1 - 512] {
        let mut volume = vec![0; 3 * MIB];
        put_label(&mut volume, FIRST, &[AREA]);
        put_area(&mut volume, AREA, text_at, &text);
        fs::write(&image, &volume).unwrap();
        let theirs = pvck("metadata", &image).unwrap();
        assert!(theirs.contains("vgname vg seqno 12"), "{theirs}");
        assert!(theirs.contains(text.trim_end()), "{theirs}");
        assert!(!theirs.contains("CHECK"), "{theirs}");
        let headers = pvck("headers", &image).unwrap();
        assert!(headers.contains(&FIRST.replace('-', "")), "{headers}");
        assert!(!headers.contains("CHECK"), "{headers}");

        let mut disk = FileDisk(File::open(&image).unwrap());
        let places = lvm::places(None, disk.size());
        let found = lvm::read(&mut disk, &places).unwrap();
        assert_eq!(found.warnings, []);
        let (group, root) = found.find("vg/root").unwrap();
        assert_eq!((group.seqno, root.extents, root.segments.len()), (12, 5, 2));
        assert_eq!(group.pieces(root).unwrap().len(), 2);
    }
}

#[test]
fn damage_is_found_where_lvm_finds_it() {
    let dir = scratch_dir("lvm-damaged").unwrap();
    let image = dir.path().join("pv");
    let text = group_text("vg", 12, &[FIRST], "");
    let mut sound = vec![0; 3 * MIB];
    put_label(&mut sound, FIRST, &[AREA]);
    put_area(&mut sound, AREA, AREA_HEADER, &text);
    // The label, the area's header, and the text.
    for at in [512 + 16, 512 + 70, AREA_AT, AREA_AT + 30, AREA_AT + 500, AREA_AT + 600] {
        let mut volume = sound.clone();
        volume[at] ^= 0x10;
        fs::write(&image, &volume).unwrap();
        let theirs = ["headers", "metadata"].map(|what| {
            let mut command = Command::new("pvck");
            command.args(["--dump", what]).arg(&image);
            let output = command.env("LVM_SUPPRESS_FD_WARNINGS", "1").output().unwrap();
            [output.stdout, output.stderr].concat()
        });
        let theirs = String::from_utf8_lossy(&theirs.concat()).into_owned();
        assert!(theirs.contains("CHECK") || theirs.contains("crc"), "{at}: {theirs}");
        let mut disk = FileDisk(File::open(&image).unwrap());
        let places = lvm::places(None, disk.size());
        let found = lvm::read(&mut disk, &places).unwrap();
        assert_eq!(found.warnings.len(), 1, "{at}: {theirs}");
        assert_eq!(found.groups, []);
    }
}
