//! The last thing in a guest: it is to power off by itself with an image attached and
//! mounted. tests/kernel_udev/run takes the time.

use std::fs;
use std::path::Path;

use crate::guest::*;

#[test]
#[ignore = "leaves an image attached and mounted: for the end of a guest"]
fn an_attached_and_mounted_image_does_not_hold_it_up() {
    assert_eq!(std::env::var("IMGDM_GUEST").as_deref(), Ok("systemd"));
    let place = Path::new("/run/shutdown");
    fs::create_dir_all(place).unwrap();
    let (base, image) = (Path::new("/tmp/off.raw"), Path::new("/tmp/off.qcow2"));
    fs::File::create(base).unwrap().set_len(16 * MIB).unwrap();
    tool("mkfs.ext4", args!["-q", "-F", base]);
    tool("qemu-img", args!["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image]);
    let device = attach([image]);
    tool("mount", args!["-o", "ro", &device.path, place]);
    // And what the boot had attached and mounted, in fstab's way.
    sh("systemctl start srv-whole.mount srv-part1.mount imgdm-tab@shown.service");
    // What the console tells from here on is the shutdown's: tests/kernel_udev/run reads it.
    fs::write("/dev/console", "imgdm: the shutdown begins\n").unwrap();
    // Somebody is at work in it, too.
    sh("cd /run/shutdown; sleep infinity >/dev/null 2>&1 &");
}
