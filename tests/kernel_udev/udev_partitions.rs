//! Partitions: there when attach returns, gone when detach does, and not looked into.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::guest::*;
use crate::world::*;

#[test]
fn the_devices_of_partitions_can_be_opened_when_attach_returns_and_stay_hidden() {
    let world = World::new("udev");
    let image = raw(&world, "disk.raw", 16);
    sh(&format!(
        "printf 'label: gpt\\nstart=2048,size=16384,name=imgdm-name\\nstart=20480,size=4096\\n' |
         sfdisk -q {0}
         mkfs.ext4 -q -F -L imgdm-part -E offset=1048576 {0} 8M",
        image.display()
    ));
    settle();
    let links = disk_links();
    for round in 0..5 {
        let printed = imgdm(args!["attach", "-f", "raw", "--partitions", &image]).ok();
        let paths: Vec<_> = printed.lines().collect();
        assert_eq!(paths, ["/dev/mapper/disk", "/dev/mapper/disk1", "/dev/mapper/disk2"]);
        for path in &paths {
            // Through udev's link, at once.
            let opened = File::open(path);
            assert!(opened.is_ok(), "round {round}, {path}: {opened:?}");
            let target = fs::read_link(path).expect("no link");
            assert!(target.starts_with(".."), "a link of ours, not udev's: {}", target.display());
        }
        imgdm(["detach", "disk"]).ok();
        assert_eq!(mapper(), [""; 0], "round {round}");
        assert!(our_devices().is_empty() && loops().is_empty(), "round {round}");
    }

    imgdm(args!["attach", "-f", "raw", "--partitions", &image]).ok();
    for action in [None, Some("change"), Some("add")] {
        match action {
            None => settle(),
            Some(action) => trigger(action),
        }
        for number in [1, 2] {
            let name = format!("disk{number}");
            let target = fs::canonicalize(format!("/dev/mapper/{name}")).unwrap();
            let node = Node::named(&target.file_name().unwrap().to_string_lossy());
            let properties = node.properties();
            let looked = ["ID_FS_", "ID_PART_"];
            let looked =
                properties.iter().find(|p| looked.iter().any(|start| p.starts_with(start)));
            assert_eq!(looked, None, "{name} after {action:?}");
            let claims: Vec<_> = node.claims().into_iter().collect();
            let ours = [format!("disk/by-imgdm/disk-part{number}"), format!("mapper/{name}")];
            assert_eq!(claims, ours, "after {action:?}");
            assert_ne!(node.property("SYSTEMD_READY").as_deref(), Some("0"), "{name}");
            // So that udev knows it also after switch-root.
            let record = fs::metadata(format!("/run/udev/data/b{}", node.number)).unwrap();
            assert_eq!(record.permissions().mode() & 0o1000, 0o1000, "{name} after {action:?}");
        }
        assert_eq!(disk_links(), links, "after {action:?}");
    }
    imgdm(["detach", "disk"]).ok();
    settle();
    assert_eq!(disk_links(), links);

    // What a plain loop's partition would be given.
    let offset = "--offset=1048576";
    let plain = tool("losetup", args!["-r", "-f", "--show", offset, &image]);
    settle();
    let label = Path::new("/dev/disk/by-label/imgdm-part").exists();
    tool("losetup", ["-d", plain.trim()]);
    settle();
    assert!(label, "a plain loop has no link by its label");
}
