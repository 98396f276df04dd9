//! `imgdm mount --overlay`: for writing, and the image stays as it was.

use std::fs;
use std::path::Path;

use nix::libc;

use crate::args;
use crate::guest::*;
use crate::mount::*;

/// Writes a file and has it on the disk, perhaps only in the journal.
fn write_late(place: &Path, name: &str) {
    fs::write(place.join(name), name).unwrap();
    fs::File::open(place.join(name)).unwrap().sync_all().unwrap();
}

#[test]
fn a_dirty_journal_is_replayed_into_the_store_and_the_image_stays() {
    let scratch = Scratch::on_disk();
    let place = place(&scratch, "mnt");
    for kind in ["ext3", "ext4", "xfs", "btrfs", "vfat"] {
        let raw = file_system(&scratch, kind, "clean.raw");
        let dirty = crashed(&scratch, &raw, "dirty.raw", |place| write_late(place, "late"));
        fs::remove_file(&raw).unwrap();
        if kind == "btrfs" {
            tool("btrfs", ["device", "scan", "--forget"]);
        }
        let before = untouched(&dirty);
        let said = mount(args!["--overlay", "--scratch-dir", scratch.directory(), &dirty, &place]);
        assert!(!said.contains("not replayed"), "{kind}: {said}");
        assert_eq!(fs::read_to_string(place.join("directory/file")).unwrap(), CONTENT, "{kind}");
        assert_eq!(fs::read_to_string(place.join("late")).unwrap(), "late", "{kind}");
        let shown = options(&place);
        for option in ["rw", "nosuid", "nodev", "noexec"] {
            assert!(shown.contains(&option.to_owned()), "{kind}: no {option}: {shown:?}");
        }
        write_late(&place, "new");
        fs::remove_file(place.join("program")).unwrap();
        umount_all(&place);
        assert_eq!(untouched(&dirty), before, "{kind}");
        // Nothing was kept.
        if kind == "btrfs" {
            tool("btrfs", ["device", "scan", "--forget"]);
        }
        mount(args!["--overlay", "--scratch-dir", scratch.directory(), &dirty, &place]);
        assert!(place.join("program").exists() && !place.join("new").exists(), "{kind}");
        umount_all(&place);
        if kind == "btrfs" {
            tool("btrfs", ["device", "scan", "--forget"]);
        }
        fs::remove_file(dirty).unwrap();
    }
    assert_eq!(fs::read_dir(scratch.directory()).unwrap().count(), 2, "the tree and the place");
}

#[test]
fn what_is_written_to_a_store_with_a_name_is_there_at_the_next_mount() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let raw = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let image = qcow2(&scratch, &raw, "disk.qcow2");
    let before = untouched(&image);
    let place = place(&scratch, "mnt");
    let store = scratch.path("changes");
    let overlay = format!("--overlay={}", store.display());
    for round in 0..4 {
        mount(args![&overlay, "-p", "1", &image, &place]);
        for earlier in 0..round {
            assert!(place.join(format!("round {earlier}")).exists(), "{round}: {earlier}");
        }
        write_late(&place, &format!("round {round}"));
        // At once again: what the kernel has yet to take down is waited for.
        umount(&place);
    }
    assert_nothing_left_soon();
    mount(args![&overlay, &image, &place]);
    assert!(place.join("round 3").exists());
    umount_all(&place);
    // Read-only it shows the same, and takes nothing.
    mount(args![&overlay, "-o", "ro", &image, &place]);
    assert!(place.join("round 3").exists());
    let error = fs::write(place.join("new"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    umount_all(&place);
    mount(args![&image, &place]);
    assert!(!place.join("round 0").exists(), "the image itself has nothing of it");
    umount_all(&place);
    assert_eq!(untouched(&image), before);
}

#[test]
fn what_is_mounted_without_the_option_is_the_image_and_not_what_was_written() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "disk.raw");
    let (first, second) = (place(&scratch, "first"), place(&scratch, "second"));
    let overlay = format!("--overlay={}", scratch.path("changes").display());
    mount(args![&overlay, &ext4, &first]);
    write_late(&first, "new");
    refused(args![&ext4, &second], 73, &["takes writes: --overlay", "--name"]);
    mount(args!["--name", "image", &ext4, &second]);
    assert!(second.join("directory/file").exists() && !second.join("new").exists());
    umount(&second);
    umount_all(&first);
    // Attached alone, it is not mounted either.
    let device = attach(args![&overlay, &ext4]);
    refused(args![&ext4, &second], 73, &["takes writes: --overlay", "--name"]);
    mount(args!["--name", "image", &ext4, &second]);
    assert!(!second.join("new").exists());
    umount(&second);
    wait_for("the image's device to go", || !our_devices().contains(&"image".to_owned()));
    device.detach();
}

#[test]
fn mount_of_the_type_imgdm_and_fstab_have_the_option() {
    let scratch = Scratch::on_disk();
    helper();
    let ext4 = file_system(&scratch, "ext4", "e");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let before = untouched(&image);
    let place = place(&scratch, "mnt");
    let store = scratch.path("changes");
    let options = format!("partition=1,overlay={},overlay-size=4M,noatime,sync", store.display());
    tool("mount", args!["-t", "imgdm", &image, &place, "-o", &options]);
    write_late(&place, "new");
    umount_all(&place);
    assert!(fs::metadata(&store).unwrap().len() <= 6 * MIB);
    let fstab = scratch.path("fstab");
    let line = format!("{} {} imgdm noauto,{options} 0 0\n", image.display(), place.display());
    fs::write(&fstab, line).unwrap();
    tool("mount", args!["-T", &fstab, &place]);
    assert_eq!(fs::read_to_string(place.join("new")).unwrap(), "new");
    let shown = crate::mount::options(&place);
    assert!(shown.contains(&"noatime".to_owned()), "{shown:?}");
    umount_all(&place);
    let fixed = format!("overlay,scratch-dir={}", scratch.directory().display());
    tool("mount", args!["-t", "imgdm", &image, &place, "-o", &fixed]);
    assert!(!place.join("new").exists());
    write_late(&place, "other");
    umount_all(&place);
    assert_eq!(untouched(&image), before);
}

#[test]
fn what_does_not_go_together_is_refused_and_nothing_is_left() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "disk.raw");
    let place = place(&scratch, "mnt");
    refused(args!["-o", "rw", &ext4, &place], 64, &["--overlay", "rw"]);
    refused(args!["--overlay-size=1M", &ext4, &place], 64, &["--overlay"]);
    let itself = format!("--overlay={}", ext4.display());
    refused(args![itself, &ext4, &place], 64, &["--overlay", "disk.raw"]);
    let squashfs = file_system(&scratch, "squashfs", "s");
    refused(args!["--overlay", "--scratch-dir", scratch.path("none"), &squashfs, &place], 73, &[]);
    assert_nothing_left();
    // The same name for two devices.
    let device = attach([&ext4]);
    let store = scratch.path("changes");
    let overlay = format!("--overlay={}", store.display());
    refused(args![&overlay, &ext4, &place], 73, &["--name", "disk"]);
    assert!(!store.exists(), "what was made for nothing is gone");
    mount(args![&overlay, "--name", "other", &ext4, &place]);
    write_late(&place, "new");
    umount(&place);
    wait_for("the other device to go", || our_devices() == ["disk"]);
    device.detach();
}

#[test]
fn killed_at_any_step_it_leaves_nothing_or_a_mount() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let place = place(&scratch, "mnt");
    let before = untouched(&image);
    let store = scratch.path("changes");
    let overlay = format!("--overlay={}", store.display());
    let faulty = |fault: &str| {
        let mut line = mount_command(args![&overlay, "-p", "1", &image, &place]);
        run(line.env("IMGDM_FAULT", fault))
    };
    let listed = faulty("list");
    assert!(listed.status.success(), "{listed}");
    umount_all(&place);
    let is_step = |line: &&str| line.split(' ').next().is_some_and(|n| n.parse::<u32>().is_ok());
    let steps: Vec<_> = listed.stderr.lines().filter(is_step).collect();
    assert!(steps.len() > 12, "{steps:?}");
    for step in steps {
        let (number, name) = step.split_once(' ').unwrap();
        let killed = faulty(&format!("{number}:kill"));
        assert_eq!(killed.signal(), Some(libc::SIGKILL), "{step}: {killed}");
        if name == "mount.attach" {
            umount(&place);
        }
        assert_nothing_left_soon();
        assert_eq!(untouched(&image), before, "{step}");
    }
}
