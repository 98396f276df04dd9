//! udev keeps away from what is inside an image.

use std::fs;
use std::path::Path;

use crate::guest::*;
use crate::hidden;
use crate::world::*;

#[test]
fn volume_groups_of_a_guest_stay_inactive() {
    hidden::lvm(&World::new("udev"));
}

#[test]
fn a_guests_btrfs_is_not_registered() {
    hidden::btrfs(&World::new("udev"));
}

#[test]
fn the_hosts_link_by_uuid_is_not_shadowed() {
    hidden::same_uuid(&World::new("udev"));
}

/// `LOOP_CTL_ADD` and `LOOP_CTL_REMOVE`, which losetup can't.
#[track_caller]
fn loop_control(request: u32, minors: &str) {
    let script = format!(
        "open my $f, '<', '/dev/loop-control' or die; ioctl $f, {request}, $_ for {minors}"
    );
    tool("perl", ["-e", &script]);
}
const LOOP_CTL_ADD: u32 = 0x4C80;
const LOOP_CTL_REMOVE: u32 = 0x4C81;

#[test]
fn a_loop_that_is_bound_while_udev_looks_at_it_stays_hidden() {
    let world = World::new("udev");
    let image = raw(&world, "late.raw", 128);
    tool("mkfs.btrfs", args!["-q", "-L", "imgdm-late", &image]);
    // udev's event stays between imgdm's rule and the next ones until it is let go.
    let (began, go) = (Path::new("/run/udev-began"), Path::new("/run/udev-go"));
    let program = format!(
        "/bin/sh -c '>{}; until [ -e {} ]; do sleep 0.05; done'",
        began.display(),
        go.display()
    );
    let rule = format!("ACTION==\"add\", KERNEL==\"loop99\", PROGRAM=\"{program}\"\n");
    let rules = Rules::put("59-zz-slow.rules", &rule);
    loop_control(LOOP_CTL_REMOVE, "0..31");
    loop_control(LOOP_CTL_ADD, "99");
    wait_for("udev to look at the new loop", || began.exists());

    let device = attach([&image]);
    let nodes = tree(&device);
    assert_eq!(nodes[1].kernel_name, "loop99");
    fs::write(go, "").unwrap();
    settle();
    hidden::assert_hidden(&device);
    let log = kernel_log();
    device.detach();
    drop(rules);
    settle();
    fs::remove_file(began).unwrap();
    fs::remove_file(go).unwrap();
    loop_control(LOOP_CTL_REMOVE, "99");
    loop_control(LOOP_CTL_ADD, "0..7");
    assert!(!log.contains("BTRFS: device label imgdm-late"), "udev looked into it");
}

#[test]
fn partitions_of_a_loop_stay_hidden_where_the_kernel_scans_for_them() {
    let world = World::new("udev");
    let image = raw(&world, "parts.raw", 16);
    sh(&format!(
        "echo start=2048,type=83 | sfdisk -q {0}; \
         mkfs.ext4 -q -F -L imgdm-part -E offset=1048576 {0} 8M",
        image.display()
    ));
    // As some distributions have it.
    sh("udevadm settle; modprobe -r loop; modprobe loop max_part=7; udevadm settle");
    let scanned = |node: &Node| {
        settle();
        let part = format!("{}p1", node.kernel_name);
        Path::new("/sys/class/block").join(&part).exists().then(|| Node::named(&part))
    };
    let label = Path::new("/dev/disk/by-label/imgdm-part");

    let device = attach([&image]);
    let part = scanned(&tree(&device)[1]).expect("the kernel did not scan");
    let (properties, linked) = (part.properties(), label.exists());
    let claims = part.claims();
    device.detach();

    let plain = PlainLoop::over(&image);
    let control = (scanned(&plain).is_some(), label.exists());
    drop(plain);
    sh("udevadm settle; modprobe -r loop; modprobe loop; udevadm settle");

    assert!(!linked && claims.is_empty(), "{claims:?}");
    let looked = properties.iter().any(|property| property.starts_with("ID_FS_"));
    assert!(!looked, "{properties:?}");
    assert_eq!(control, (true, true), "a plain loop's partition and its link");
}

#[test]
fn what_is_written_to_a_device_stays_hidden_and_its_store_too() {
    let world = World::new("udev");
    let image = raw(&world, "blank.raw", 64);
    let before = disk_links();
    let option = format!("--overlay={}", world.path("store").display());
    let device = attach(args![option, &image]);
    // udev looks again at what was open for writing.
    tool("mkfs.ext4", args!["-q", "-F", "-L", "imgdm-over", &device.path]);
    for action in [None, Some("change"), Some("add")] {
        match action {
            None => settle(),
            Some(action) => trigger(action),
        }
        hidden::assert_hidden(&device);
        let label = Path::new("/dev/disk/by-label/imgdm-over");
        assert!(!label.exists(), "a link by what was written ({action:?})");
    }
    let store = tree(&device).into_iter().find(|node| {
        let file = format!("/sys/class/block/{}/loop/backing_file", node.kernel_name);
        fs::read_to_string(file).is_ok_and(|file| file.trim_end().ends_with("/store"))
    });
    assert!(store.is_some(), "the store's loop device was looked at");
    device.detach();
    settle();
    assert_eq!(disk_links(), before);
}
