//! QEMU's locks, held by the kernel for as long as the device is there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::args;
use crate::guest::*;

/// A file of an attached chain.
struct Part {
    path: PathBuf,
    format: &'static str,
}

/// An overlay over an image with a data file over a middle layer that gives nothing over
/// an all-zero qcow2 over a raw file; each of them contributes as little as it can.
fn chain(scratch: &Scratch) -> Vec<Part> {
    let over = |backing: &'static str, format: &'static str| ["-b", backing, "-F", format];
    let base = scratch.create("raw", &[], "base.raw", "2M");
    write_image(&base, "raw", &["write -P 7 1M 512k"]);
    let zero = scratch.create("qcow2", &over("base.raw", "raw"), "zero.qcow2", "");
    write_image(&zero, "qcow2", &["write -z 0 1M"]);
    let middle = scratch.create("qcow2", &over("zero.qcow2", "qcow2"), "middle.qcow2", "");
    // QEMU looks for a data file in its working directory; an absolute name is safe.
    let data = scratch.path("with.data");
    let option = format!("data_file={}", data.display());
    let mut options = vec!["-o", &option];
    options.extend(over("middle.qcow2", "qcow2"));
    let with = scratch.create("qcow2", &options, "with.qcow2", "");
    write_image(&with, "qcow2", &["write -P 5 512k 64k"]);
    let fresh = scratch.create("qcow2", &over("with.qcow2", "qcow2"), "fresh.qcow2", "");
    [
        (fresh, "qcow2"),
        (with, "qcow2"),
        (data, "raw"),
        (middle, "qcow2"),
        (zero, "qcow2"),
        (base, "raw"),
    ]
    .map(|(path, format)| Part { path, format })
    .into()
}

/// The files that `list` names for the only attachment.
fn listed_files() -> Vec<PathBuf> {
    let listed = listed();
    assert_eq!(listed.len(), 1, "{listed:?}");
    let files = listed[0]["loops"].as_array().unwrap().iter();
    files.filter_map(|each| each["file"]["path"].as_str().map(PathBuf::from)).collect()
}

#[test]
fn while_attached_qemu_may_read_every_layer_and_write_none() {
    let scratch = Scratch::new();
    let parts = chain(&scratch);
    let before: Vec<_> = parts.iter().map(|part| fs::read(&part.path).unwrap()).collect();
    let device = attach([&parts[0].path]);
    assert_no_process(scratch.directory());
    let files = listed_files();
    for part in &parts {
        let Part { path, format } = part;
        assert!(files.contains(path), "list does not name {}: {files:?}", path.display());
        let write = qemu_io(path, format, &["write -P 66 0 4k"]);
        assert!(write.stderr.contains("lock"), "{write}");
        assert!(!write.status.success(), "{write}");
        if *format == "qcow2" {
            let snapshot = qemu_img(args!["snapshot", "-c", "new", path]);
            assert!(snapshot.stderr.contains("lock"), "{snapshot}");
            assert!(!snapshot.status.success(), "{snapshot}");
        }
        qemu_img(args!["info", path]).ok();
        run(&mut command("qemu-io", args!["-r", "-f", format, "-c", "read 0 4k", path])).ok();
    }
    device.detach();
    let after: Vec<_> = parts.iter().map(|part| fs::read(&part.path).unwrap()).collect();
    assert!(before == after, "a refused writer wrote");
    // And at once it may again.
    for Part { path, format } in &parts {
        write_image(path, format, &["write -P 66 0 4k"]);
    }
}

#[test]
fn an_all_zero_and_a_fresh_image_alone_are_held_as_well() {
    let scratch = Scratch::new();
    let fresh = scratch.create("qcow2", &[], "fresh.qcow2", "1M");
    let zero = scratch.create("qcow2", &[], "zero.qcow2", "1M");
    write_image(&zero, "qcow2", &["write -z 0 1M"]);
    for image in [fresh, zero] {
        let device = attach([&image]);
        assert!(listed_files().contains(&image));
        let write = qemu_io(&image, "qcow2", &["write -P 66 0 4k"]);
        assert!(!write.status.success() && write.stderr.contains("lock"), "{write}");
        device.detach();
    }
}

#[test]
fn attach_is_refused_while_a_writer_runs_on_any_layer_and_goes_with_force_share() {
    let scratch = Scratch::new();
    let parts = chain(&scratch);
    let image = &parts[0].path;
    let wanted = qemu_content(&scratch, image, &[]);
    for Part { path, format } in &parts {
        let writer = Writer::open(path, format);
        let said = imgdm(args!["attach", image]).refused(75);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(said.contains(name) && said.contains("write"), "{said}");
        assert!(our_devices().is_empty() && loops().iter().all(|(_, _, ours)| !ours));
        let device = attach(args!["-U", image]);
        assert_same(name, &device.bytes(), &wanted);
        device.detach();
        writer.close();
        assert_nothing_left();
    }
    attach([image]).detach();
}

#[test]
fn a_writer_that_came_by_force_share_may_go_on_writing() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 1M"]);
    let device = attach(args!["-U", &image]);
    // Nobody is kept out by a device attached with -U.
    write_image(&image, "qcow2", &["write -P 2 0 64k"]);
    assert_eq!(device.bytes()[0], 2);
    device.detach();
}

#[test]
fn a_running_reader_keeps_nobody_out() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 1M"]);
    let mut line = command("qemu-io", args!["-r", "-f", "qcow2", &image]);
    let mut reader = start(line.stdin(Stdio::piped()));
    let file = fs::metadata(&image).unwrap();
    wait_for("qemu-io to lock the image", || holds_lock(&file, 201));
    let device = attach([&image]);
    device.detach();
    reader.tell("quit");
    reader.finish().ok();
}

#[test]
fn an_unlinked_image_stays_attached_and_is_listed_as_deleted() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 1M"]);
    let device = attach([&image]);
    fs::remove_file(&image).unwrap();
    assert!(device.bytes().iter().all(|&byte| byte == 1));
    let listed = listed();
    assert_eq!(listed[0]["image"]["state"], "deleted", "{listed:?}");
    assert_eq!(listed[0]["image"]["path"].as_str().map(Path::new), Some(image.as_path()));
    imgdm(args!["detach", &image]).ok();
}
