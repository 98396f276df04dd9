//! Names: whose they are, attaching twice, and finding what to detach.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::args;
use crate::guest::*;

fn image(scratch: &Scratch, name: &str) -> PathBuf {
    let image = scratch.create("qcow2", &[], name, "1M");
    write_image(&image, "qcow2", &["write -P 1 0 512k"]);
    image
}

#[test]
fn attaching_again_gives_the_same_device_and_changes_nothing() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    let first = attach([&image]);
    let before = (first.number(), loops(), dm_devices());
    assert_eq!(attach([&image]), first);
    // By another path to the same file, too.
    let link = scratch.path("link");
    std::os::unix::fs::symlink(scratch.directory(), &link).unwrap();
    assert_eq!(attach([link.join("disk.qcow2")]), first);
    assert_eq!((first.number(), loops(), dm_devices()), before);
    first.detach();
}

#[test]
fn other_options_on_the_same_name_are_an_error_and_the_device_stays() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    qemu_img(args!["snapshot", "-c", "snap", &image]).ok();
    let device = attach([&image]);
    for options in [&["--zero=dm"][..], &["--no-fiemap"], &["-l", "snap", "--name", "disk"]] {
        let words = options.iter().map(std::ffi::OsString::from).chain([image.clone().into()]);
        let said = imgdm(std::iter::once("attach".into()).chain(words)).refused(73);
        assert!(said.contains("disk"), "{said}");
    }
    assert_eq!(listed().len(), 1);
    device.detach();
}

#[test]
fn a_name_taken_by_another_image_is_refused_and_says_by_which() {
    let scratch = Scratch::new();
    let (one, two) = (image(&scratch, "one.qcow2"), image(&scratch, "two.qcow2"));
    let device = attach(args!["--name", "same", &one]);
    let said = imgdm(args!["attach", "--name", "same", &two]).refused(73);
    assert!(said.contains("one.qcow2") && said.contains("same"), "{said}");
    assert_eq!(listed().len(), 1);
    device.detach();
}

#[test]
fn a_name_taken_by_a_device_of_others_is_refused_and_that_is_left_alone() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    tool("dmsetup", ["create", "disk", "-u", "LVM-abc", "--table", "0 8 zero"]);
    let said = imgdm(args!["attach", &image]).refused(73);
    assert!(said.contains("'disk'") && said.contains("LVM"), "{said}");
    let said = imgdm(["detach", "disk"]).refused(66);
    assert!(said.contains("LVM"), "{said}");
    imgdm(["detach", "--all", "--if-attached"]).ok();
    assert_eq!(dm_devices(), [("disk".to_owned(), "LVM-abc".to_owned())]);
    tool("dmsetup", ["remove", "disk"]);
}

#[test]
fn a_device_marked_for_deferred_removal_is_refused_or_kept() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    let device = attach([&image]);
    let open = File::open(&device.path).unwrap();
    imgdm(["detach", "--deferred", "disk"]).ok();
    assert_eq!(listed()[0]["deferred_remove"], true);
    let said = imgdm(args!["attach", &image]).refused(75);
    assert!(said.contains("--keep"), "{said}");
    assert_eq!(attach(args!["--keep", &image]), device);
    drop(open);
    assert_eq!(listed()[0]["deferred_remove"], false);
    assert!(device.bytes()[0] == 1);
    device.detach();
}

#[test]
fn detach_takes_a_name_the_devices_path_or_the_images_path() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    for argument in args!["disk", "/dev/mapper/disk", &image] {
        let device = attach([&image]);
        assert_eq!(imgdm(args!["detach", argument]).ok(), "");
        assert_nothing_left();
        assert!(fs::symlink_metadata(&device.path).is_err());
    }
    // By the kernel's own node, and by a relative path.
    let device = attach([&image]);
    let minor = device.number().rsplit(':').next().unwrap().to_owned();
    imgdm(["detach", &format!("/dev/dm-{minor}")]).ok();
    assert_nothing_left();
    attach([&image]);
    run(imgdm_command(["detach", "./disk.qcow2"]).current_dir(scratch.directory())).ok();
    assert_nothing_left();
}

#[test]
fn an_image_attached_twice_is_not_detached_by_its_path_and_the_names_are_told() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    let devices = [attach([&image]), attach(args!["--name", "other", &image])];
    let said = imgdm(args!["detach", &image]).refused(64);
    assert!(said.contains("disk") && said.contains("other"), "{said}");
    assert_eq!(listed().len(), 2);
    devices[1].detach();
    imgdm(args!["detach", &image]).ok();
}

#[test]
fn detaching_what_is_not_attached_is_66_or_nothing_with_if_attached() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    for argument in args!["disk", "/dev/mapper/disk", &image, scratch.path("none")] {
        imgdm(args!["detach", &argument]).refused(66);
        imgdm(args!["detach", "--if-attached", &argument]).ok();
    }
    imgdm(["detach", "--all"]).refused(66);
    imgdm(["detach", "--all", "--if-attached"]).ok();
    assert!(listed().is_empty());
    assert_eq!(imgdm(["list"]).ok(), "");
}

#[test]
fn a_plain_dmsetup_remove_unwinds_everything() {
    let scratch = Scratch::new();
    let base = image(&scratch, "base.qcow2");
    let options = ["-b", "base.qcow2", "-F", "qcow2"];
    let image = scratch.create("qcow2", &options, "disk.qcow2", "");
    for image in [&base, &image] {
        let device = attach(args!["--zero=loop", image]);
        tool("dmsetup", ["remove", &device.name]);
        let _ = fs::remove_file(&device.path);
        assert_nothing_left_soon();
    }
    write_image(&base, "qcow2", &["write -P 2 0 64k"]);
}

#[test]
fn list_says_what_is_attached() {
    let scratch = Scratch::new();
    let base = image(&scratch, "base.qcow2");
    let options = ["-b", "base.qcow2", "-F", "qcow2"];
    let image = scratch.create("qcow2", &options, "disk.qcow2", "");
    write_image(&image, "qcow2", &["write -P 2 0 64k"]);
    let device = attach([&image]);
    let open = File::open(&device.path).unwrap();
    let listed = listed();
    let it = &listed[0];
    assert_eq!(it["name"], "disk");
    assert_eq!(it["device"], "/dev/mapper/disk");
    assert_eq!(it["size"], 1 << 20);
    assert_eq!(it["depth"], 2);
    assert_eq!(it["open_count"], 1);
    assert_eq!(it["deferred_remove"], false);
    assert_eq!(it["image"]["path"].as_str(), image.to_str());
    assert_eq!(it["image"]["state"], "same");
    assert!(it["snapshot"].is_null());
    let files: Vec<_> = it["loops"].as_array().unwrap().iter().collect();
    assert!(files.iter().any(|each| each["file"]["path"].as_str() == base.to_str()), "{it}");
    let human = imgdm(["list"]).ok();
    assert!(human.contains("disk") && human.contains(image.to_str().unwrap()), "{human}");
    drop(open);
    device.detach();
}

// --- Busy -----------------------------------------------------------------------------

/// `detach` must be refused, soon, with 75 and these words; and then change nothing.
#[track_caller]
fn assert_busy(name: &str, words: &[&str]) {
    let began = Instant::now();
    let said = imgdm(["detach", name]).refused(75);
    assert!(began.elapsed() < Duration::from_secs(13), "took {:?}", began.elapsed());
    for word in words {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    assert_eq!(listed().len(), 1);
}

#[test]
fn a_busy_device_is_not_detached_and_each_kind_of_holder_is_named() {
    let scratch = Scratch::new();
    // A file system to mount.
    let raw = scratch.path("disk.raw");
    File::create(&raw).unwrap().set_len(2 << 20).unwrap();
    tool("mkfs.ext4", args!["-q", "-F", "-O", "^has_journal", &raw]);
    let device = attach(args!["-f", "raw", &raw]);

    let open = start(command("sleep", ["60"]).stdin(File::open(&device.path).unwrap()));
    assert_busy("disk", &["sleep", &open.id().to_string()]);
    drop(open);

    let place = scratch.path("mount point");
    fs::create_dir(&place).unwrap();
    tool("mount", args!["-o", "ro", &device.path, &place]);
    assert_busy("disk", &["mount point"]);
    tool("umount", [&place]);

    let line = "0 8 linear /dev/mapper/disk 0";
    tool("dmsetup", ["create", "upstairs", "-r", "--table", line]);
    assert_busy("disk", &["upstairs"]);
    tool("dmsetup", ["remove", "upstairs"]);
    device.detach();
}

#[test]
fn a_busy_device_goes_at_its_last_close_when_deferred() {
    let scratch = Scratch::new();
    let image = image(&scratch, "disk.qcow2");
    let device = attach([&image]);
    let open = File::open(&device.path).unwrap();
    imgdm(["detach", "--deferred", "disk"]).ok();
    assert_eq!(listed()[0]["deferred_remove"], true);
    let mut byte = [0];
    open.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
    // Without udev nobody would take the node away later.
    assert!(fs::symlink_metadata(&device.path).is_err());
    drop(open);
    assert_nothing_left_soon();
    // Not in use, it goes at once.
    attach([&image]);
    imgdm(["detach", "--deferred", "disk"]).ok();
    assert_nothing_left();
}

#[test]
fn detach_all_skips_what_is_busy_says_so_and_exits_1() {
    let scratch = Scratch::new();
    let images = ["one.qcow2", "two.qcow2", "three.qcow2"].map(|name| image(&scratch, name));
    for each in &images {
        attach([each]);
    }
    let open = File::open("/dev/mapper/two").unwrap();
    let said = imgdm(["detach", "--all"]).refused(1);
    assert!(said.contains("two") && !said.contains("three"), "{said}");
    let listed = listed();
    assert!(listed.len() == 1 && listed[0]["name"] == "two", "{listed:?}");
    drop(open);
    imgdm(["detach", "--all"]).ok();
}

#[test]
fn an_attachment_over_an_attachment_is_detached_by_all_in_the_right_order() {
    let scratch = Scratch::new();
    let inside = image(&scratch, "inside.qcow2");
    // The image lies on another attachment's device.
    let raw = scratch.path("a.raw");
    fs::copy(&inside, &raw).unwrap();
    let length = fs::metadata(&raw).unwrap().len().next_multiple_of(512);
    File::options().write(true).open(&raw).unwrap().set_len(length).unwrap();
    let below = attach(args!["-f", "raw", &raw]);
    let above = attach(args!["-f", "qcow2", "--name", "0above", &below.path]);
    assert_same("an image on a device", &above.bytes(), &qemu_content(&scratch, &inside, &[]));
    let said = imgdm(["detach", &below.name]).refused(75);
    assert!(said.contains("loop"), "{said}");
    imgdm(["detach", "--all"]).ok();
    assert_nothing_left();
}
