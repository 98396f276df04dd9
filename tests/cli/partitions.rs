//! `imgdm partitions` on a disk with a bit of everything.

use std::fs;
use std::path::Path;

use crate::images::{Qcow2, chain, imgdm};
use crate::lvm::{
    AREA_AT, AREA_HEADER, FIRST, MIB, SECOND, group_text, linear_text, logical_text, put_area,
    put_label,
};

/// An entry of a boot record.
fn slot(bytes: &mut [u8], index: usize, boot: u8, kind: u8, start: u32, length: u32) {
    let at = 446 + index * 16;
    bytes[at] = boot;
    bytes[at + 4] = kind;
    bytes[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&length.to_le_bytes());
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// A disk of 8 MiB with a master boot record: a swap space, one that overlaps it, one that
/// reaches out of the disk, and a physical volume.
pub(crate) fn disk() -> Vec<u8> {
    let mut bytes = vec![0; 8 * MIB];
    bytes[440..444].copy_from_slice(&[0x78, 0x56, 0x34, 0x12]);
    slot(&mut bytes, 0, 0x80, 0x82, 2048, 2048);
    slot(&mut bytes, 1, 0, 0x83, 3000, 2048);
    slot(&mut bytes, 2, 0, 0x6d, 15000, 4096);
    slot(&mut bytes, 3, 0, 0x8e, 6144, 6144);
    let swap = &mut bytes[MIB..2 * MIB];
    swap[4086..4096].copy_from_slice(b"SWAPSPACE2");
    swap[1024..1032].copy_from_slice(&[1, 0, 0, 0, 9, 0, 0, 0]);
    swap[1036..1052].copy_from_slice(&[0x5a; 16]);
    swap[1052..1062].copy_from_slice(b"the\x1b label");
    let volume = &mut bytes[3 * MIB..6 * MIB];
    let area = (AREA_AT, MIB - AREA_AT);
    put_label(volume, FIRST, &[area, (2 * MIB, MIB)]);
    let thin = "start_extent = 0\nextent_count = 100\ntype = \"thin\"\nthin_pool = \"pool\"";
    let logical = [
        logical_text("root", &[&linear_text(0, 3, "pv0", 7), &linear_text(3, 2, "pv0", 20)]),
        logical_text("far", &[&linear_text(0, 3, "pv1", 7)]),
        logical_text("thin", &[thin]),
        logical_text("hidden", &[&linear_text(0, 1, "pv0", 0)]).replace(", \"VISIBLE\"", ""),
    ];
    put_area(volume, area, AREA_HEADER, &group_text("vg", 3, &[FIRST, SECOND], &logical.concat()));
    bytes
}

#[test]
fn what_is_not_as_it_should_be_is_said_on_stderr() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("disk.raw"), disk()).unwrap();
    let output = imgdm(directory.path(), &["partitions", "disk.raw"]);
    assert!(output.status.success(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        stderr,
        "imgdm: warning: disk.raw: the LVM metadata area at 0x500000 is passed over: the checksum of its header is wrong\n"
    );
    let output = imgdm(directory.path(), &["--quiet", "partitions", "disk.raw"]);
    assert!(output.stderr.is_empty());
}

#[test]
fn a_disk_of_nothing_known_is_said_to_be_so() {
    let directory = chain();
    let output = imgdm(directory.path(), &["partitions", "top.qcow2"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "top.qcow2: 1 MiB, no partition table\nNothing that is known is on the disk\n"
    );
}

#[test]
fn damage_where_a_table_would_be_is_no_disk_without_a_table() {
    let directory = tempfile::tempdir().unwrap();
    Qcow2::new().entry(0, 4 * 65536 + 512).write(directory.path(), "x.qcow2");
    let output = imgdm(directory.path(), &["partitions", "x.qcow2"]);
    assert_eq!(output.status.code(), Some(65));
    assert!(output.stdout.is_empty(), "{output:?}");
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(stderr.contains("x.qcow2: at offset 0x30000"), "{stderr}");
}

#[test]
fn the_json_is_one_struct_with_everything() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("disk.raw"), disk()).unwrap();
    let output = imgdm(directory.path(), &["-q", "partitions", "--output=json", "disk.raw"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["table"]["uuid"], "12345678");
    assert_eq!(json["partitions"][1]["unusable"]["overlaps"], 1);
    assert_eq!(json["partitions"][2]["unusable"], "out-of-disk");
    assert_eq!(json["partitions"][0]["content"]["kind"], "swap");
    assert_eq!(json["lvm"]["physical_volumes"][0]["partition"], 4);
    let volumes = &json["lvm"]["volume_groups"][0]["logical_volumes"];
    assert_eq!(volumes[0]["segments"][1]["areas"][0]["extent"], 20);
    assert_eq!(volumes[0]["obstacle"], serde_json::Value::Null);
    assert!(volumes[1]["obstacle"].as_str().unwrap().contains(SECOND));
    assert_eq!(volumes[2]["segments"][0]["type"], "thin");
    assert_eq!(json["warnings"].as_array().unwrap().len(), 1);
    let path = Path::new(json["path"]["path"].as_str().unwrap()).file_name();
    assert_eq!(path, Some("disk.raw".as_ref()));
}
