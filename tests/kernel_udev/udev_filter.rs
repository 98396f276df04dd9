//! The filter of docs/lvm.conf keeps LVM from guests' disks also when it is told to look.

use std::ffi::OsStr;

use crate::guest::*;
use crate::world::*;

#[test]
fn lvm_with_the_documented_filter_passes_over_attached_images() {
    let world = World::new("udev");
    let image = raw(&world, "pv.raw", 32);
    // A physical volume without a group: nothing that anybody would activate.
    let printed = tool("losetup", args!["-f", "--show", &image]);
    sh(&format!(
        "pvcreate -qqy {0}; udevadm settle; losetup -d {0}; udevadm settle",
        printed.trim()
    ));
    let filter: Vec<_> =
        include_str!("../../docs/lvm.conf").lines().filter(|line| !line.starts_with('#')).collect();
    let seen = |more: &[&str]| {
        let mut line = command("pvs", ["--noheadings", "-o", "pv_name"]);
        run(line.args(more)).ok().split_whitespace().count()
    };
    let before = seen(&[]);
    let device = attach([OsStr::new("--publish"), image.as_os_str()]);
    settle();
    assert!(seen(&[]) > before, "LVM does not see the guest's disk without the filter either");
    assert_eq!(seen(&["--config", &filter.join("\n")]), before);
    device.detach();
    sh("rm -f /run/lvm/pvs_online/* /run/lvm/pvs_lookup/*");
}
