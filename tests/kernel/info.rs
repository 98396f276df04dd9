//! `imgdm info` of what only a real kernel has: block devices, XFS, attached images.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;

use crate::args;
use crate::guest::*;

/// What `info` says, ours taken off, and ours; the former is qemu-img's too.
#[track_caller]
fn info(image: &Path) -> (Value, Value) {
    let line = args!["info", "--output=json", "-f", "raw", image];
    let mut ours: Value = serde_json::from_str(&imgdm(&line).ok()).unwrap();
    let more = ours.as_object_mut().unwrap().remove("imgdm").unwrap();
    let theirs: Value = serde_json::from_str(&qemu_img(&line).ok()).unwrap();
    assert_eq!(ours, theirs);
    (ours, more)
}

#[test]
fn a_block_device_is_a_host_device() {
    let _scratch = Scratch::new();
    let (info, ours) = info(&block_device());
    assert_eq!(info["children"][0]["info"]["format"], "host_device");
    assert!(ours["image"]["device"].is_string() && ours["image"]["inode"].is_null(), "{ours}");
}

#[test]
fn the_extent_size_hint_that_qemu_gives_a_file_on_xfs_is_told() {
    let disk = Scratch::on_disk();
    let mounted = Mounted::make("xfs", disk.directory(), 320 * MIB);
    let image = mounted.place.join("x.raw");
    qemu_img(args!["create", "-q", "-f", "raw", &image, "8M"]).ok();
    let (info, _) = info(&image);
    let data = &info["children"][0]["info"]["format-specific"]["data"];
    assert_eq!(data["extent-size-hint"], MIB, "{info}");
    let text = imgdm([OsStr::new("info"), image.as_os_str()]).ok();
    assert!(text.contains("    Format specific information:\n        extent size hint: 1048576\n"));
}

#[test]
fn the_locks_of_an_attached_image_are_its_loops() {
    let scratch = Scratch::new();
    let image = scratch.create("raw", &[], "disk.raw", "1M");
    let device = attach([&image]);
    let (_, ours) = info(&image);
    let locks = ours["image"]["locks"].as_array().unwrap();
    let bytes: Vec<_> = locks.iter().map(|lock| lock["byte"].as_u64().unwrap()).collect();
    assert_eq!(bytes, [100, 201, 202, 203]);
    let held_by = locks[0]["holders"][0]["device"].as_str().unwrap_or_default();
    assert!(held_by.starts_with("/dev/loop"), "{locks:?}");
    device.detach();
    let (_, ours) = info(&image);
    assert_eq!(ours["image"]["locks"], Value::Array(Vec::new()));
}
