//! The guest's volume group beside one of the host's that has the same name, and even the
//! same UUIDs: as after a copy of the host's own disk.

use std::fs;
use std::path::{Path, PathBuf};

use crate::guest::*;
use crate::hidden::assert_hidden;
use crate::world::*;

const GROUP: &str = "imgdmsame";

/// What LVM tells of all that it sees.
#[track_caller]
fn told() -> Vec<String> {
    [
        ["vgs", "vg_name,vg_uuid,vg_seqno,pv_count,lv_count,vg_missing_pv_count"],
        ["lvs", "vg_name,lv_name,lv_uuid,lv_active,lv_kernel_major,lv_kernel_minor,devices"],
        ["pvs", "pv_name,pv_uuid,vg_name"],
    ]
    .map(|[tool_name, columns]| tool(tool_name, ["--noheadings", "-o", columns]))
    .to_vec()
}

#[test]
fn a_group_of_the_host_with_the_same_name_and_uuids_is_left_alone() {
    let world = World::new("udev");
    let host = raw(&world, "host.raw", 32);
    let printed = tool("losetup", args!["-f", "--show", &host]);
    let node = printed.trim();
    let volume = PathBuf::from(format!("/dev/{GROUP}/lv"));
    sh(&format!(
        "pvcreate -qqy {node}; vgcreate -qq -s 1M {GROUP} {node}
         lvcreate -qqy -Wn -Zn -L 4M -n lv {GROUP}
         udevadm settle"
    ));
    let mut random = Random(0x7711_2233);
    let (of_guest, of_host) = (random.bytes(4 << 20), random.bytes(4 << 20));
    fs::write(&volume, &of_guest).unwrap();
    sh("sync");
    let guest = world.path("guest.qcow2");
    qemu_img(args!["convert", "-U", "-f", "raw", "-O", "qcow2", &host, &guest]).ok();
    fs::write(&volume, &of_host).unwrap();
    sh("sync; udevadm settle");

    let before = (told(), dm_devices(), disk_links());
    assert!(before.0[1].contains("active"), "{:?}", before.0);
    let lv = format!("--lv={GROUP}/lv");
    let printed = imgdm(args!["attach", lv, &guest]).ok();
    assert_eq!(printed, "/dev/mapper/guest\n/dev/mapper/guest-lv\n");
    for action in [None, Some("change"), Some("add")] {
        match action {
            None => settle(),
            Some(action) => trigger(action),
        }
        for name in ["guest-lv", "guest"] {
            let path = Path::new("/dev/mapper").join(name);
            let node = Node::named(
                &fs::canonicalize(&path).unwrap().file_name().unwrap().to_string_lossy(),
            );
            let looked = node.properties().into_iter().find(|p| p.starts_with("ID_FS_"));
            assert_eq!(looked, None, "{name}");
        }
        assert_eq!(told(), before.0, "{action:?}");
        assert_eq!(disk_links(), before.2, "{action:?}");
    }
    let mine = Device { name: "guest".to_owned(), path: "/dev/mapper/guest".into() };
    assert_hidden(&mine);
    assert_same("the guest's", &fs::read("/dev/mapper/guest-lv").unwrap(), &of_guest);
    forget(&volume);
    assert_same("the host's", &fs::read(&volume).unwrap(), &of_host);
    mine.detach();
    settle();
    assert_eq!((told(), dm_devices(), disk_links()), before);

    sh(&format!(
        "vgchange -qq -an {GROUP}; losetup -d {node}; udevadm settle
         rm -f /run/lvm/pvs_online/* /run/lvm/vgs_online/* /run/lvm/pvs_lookup/*"
    ));
}
