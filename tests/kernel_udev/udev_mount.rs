//! `imgdm mount` where udev names the devices and takes their names away.

use std::fs;

use crate::guest::*;
use crate::world::*;

/// A disk with one ext4 partition that holds the file `file`.
#[track_caller]
pub(crate) fn disk_with_a_partition(world: &World, name: &str) -> std::path::PathBuf {
    let (disk, tree) = (raw(world, name, 16), world.path("tree"));
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("file"), "content").unwrap();
    sh(&format!("echo 'label: gpt\nstart=2048, size=24576' | sfdisk -q '{}'", disk.display()));
    let offset = format!("offset={}", 2048 * 512);
    let line = args!["-q", "-F", "-L", "imgdm-mount", "-E", offset, "-d", &tree, &disk, "12M"];
    tool("mkfs.ext4", line);
    disk
}

#[test]
fn what_is_mounted_has_its_name_and_umount_takes_the_name_away() {
    let world = World::new("udev");
    let disk = disk_with_a_partition(&world, "disk.raw");
    let place = world.path("mnt");
    fs::create_dir(&place).unwrap();
    let links = disk_links();
    for round in 0..8 {
        imgdm(args!["mount", "-p", "1", &disk, &place]).ok();
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "content");
        let source = tool("findmnt", args!["-n", "-o", "SOURCE", "--mountpoint", &place]);
        assert_eq!(source.trim(), "/dev/mapper/disk1", "round {round}");
        // Nothing of the guest's is shown to the host.
        settle();
        assert_eq!(disk_links(), links, "round {round}");
        tool("umount", [&place]);
        imgdm(["detach", "--wait", "disk"]).ok();
        assert!(our_devices().is_empty() && loops().is_empty(), "round {round}");
        settle();
        assert_eq!(mapper(), [""; 0], "round {round}");
    }
}

#[test]
fn an_older_btrfs_is_mounted_after_a_newer_one_of_the_same_uuid() {
    let world = World::new("udev");
    let (older, newer) = (raw(&world, "older.raw", 128), world.path("newer.raw"));
    let place = world.path("mnt");
    fs::create_dir(&place).unwrap();
    tool("mkfs.btrfs", args!["-q", "-f", &older]);
    fs::copy(&older, &newer).unwrap();
    tool("mount", args!["-o", "loop", &newer, &place]);
    fs::write(place.join("file"), "content").unwrap();
    tool("umount", [&place]);
    settle();
    tool("btrfs", ["device", "scan", "--forget"]);
    // Others' devices, so that none has the number of the one before.
    let mut others = Vec::new();
    for (image, name, files) in [(&newer, "newer", 1), (&older, "older", 0)] {
        imgdm(args!["mount", image, &place]).ok();
        assert_eq!(fs::read_dir(&place).unwrap().count(), files, "{name}");
        tool("umount", [&place]);
        imgdm(["detach", "--wait", name]).ok();
        others.push(attach([&raw(&world, &format!("other-than-{name}.raw"), 1)]));
    }
    others.iter().for_each(Device::detach);
    tool("btrfs", ["device", "scan", "--forget"]);
}
