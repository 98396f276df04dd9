//! Images in /etc/fstab, mounted by systemd through mount.imgdm.

use std::fs;
use std::os::unix::fs::symlink;

use crate::guest::*;
use crate::udev_mount::disk_with_a_partition;
use crate::world::*;

#[test]
fn a_line_of_fstab_is_a_mount_unit() {
    let world = World::new("systemd");
    let disk = disk_with_a_partition(&world, "guest.raw");
    let helper = "/sbin/mount.imgdm";
    symlink(imgdm_path(), helper).unwrap();
    let fstab = fs::read_to_string("/etc/fstab").unwrap_or_default();
    let line = |place: &str, options: &str| {
        format!("{} {place} imgdm partition=1,noauto{options} 0 0\n", disk.display())
    };
    let lines = line("/run/image-now", "") + &line("/run/image-late", ",x-systemd.automount");
    fs::write("/etc/fstab", format!("{fstab}\n{lines}")).unwrap();
    tool("systemctl", ["daemon-reload"]);
    for _ in 0..2 {
        tool("systemctl", ["start", "run-image\\x2dnow.mount"]);
        assert_eq!(fs::read_to_string("/run/image-now/file").unwrap(), "content");
        tool("systemctl", ["is-active", "run-image\\x2dnow.mount"]);
        tool("systemctl", ["stop", "run-image\\x2dnow.mount"]);
        imgdm(["detach", "--wait", "guest"]).ok();
        assert!(our_devices().is_empty() && loops().is_empty());
    }
    // At the first access.
    tool("systemctl", ["start", "run-image\\x2dlate.automount"]);
    assert_eq!(fs::read_to_string("/run/image-late/file").unwrap(), "content");
    tool("systemctl", ["stop", "run-image\\x2dlate.automount", "run-image\\x2dlate.mount"]);
    imgdm(["detach", "--wait", "guest"]).ok();
    fs::write("/etc/fstab", fstab).unwrap();
    fs::remove_file(helper).unwrap();
    tool("systemctl", ["daemon-reload"]);
}
