//! Where parts of udev's rules or of dmsetup are missing: attach returns all the same.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::guest::*;
use crate::world::*;

/// The longest that attach may wait for udev before it makes the link itself, and start.
const BOUND: Duration = Duration::from_secs(15);

/// Attaches and detaches an image, each in bounded time; gives attach's time and stderr.
#[track_caller]
fn works(world: &World, before_detach: impl FnOnce()) -> (Duration, String) {
    let image = world.create("qcow2", &[], "masked.qcow2", "4M");
    write_image(&image, "qcow2", &["write -P 4 0 64k"]);
    let start = Instant::now();
    let ran = imgdm(args!["attach", &image]);
    let took = start.elapsed();
    assert!(ran.status.success() && ran.stdout == "/dev/mapper/masked\n", "{ran}");
    let device = Device { name: "masked".to_owned(), path: "/dev/mapper/masked".into() };
    assert_eq!(device.bytes()[..65536], [4; 65536]);
    assert!(took < BOUND, "attach took {took:?}");
    before_detach();
    let start = Instant::now();
    device.detach();
    assert!(start.elapsed() < BOUND, "detach took {:?}", start.elapsed());
    assert_eq!(mapper(), [""; 0]);
    (took, ran.stderr)
}

#[test]
fn without_the_notification_of_dmsetup() {
    let world = World::new("udev");
    let _notify = Rules::put("95-dm-notify.rules", "");
    let (took, stderr) = works(&world, || ());
    assert!(took < Duration::from_secs(5), "nothing to wait for, but it took {took:?}");
    assert_eq!(stderr, "");
}

#[test]
fn without_the_rules_of_device_mapper() {
    let world = World::new("udev");
    let _rules = Rules::put("55-dm.rules", "");
    let _notify = Rules::put("95-dm-notify.rules", "");
    let (took, _) = works(&world, || ());
    assert!(took < Duration::from_secs(5), "nothing to wait for, but it took {took:?}");
}

#[test]
fn with_a_udev_that_deals_with_nothing() {
    let world = World::new("udev");
    tool("udevadm", ["control", "--stop-exec-queue"]);
    let start = || tool("udevadm", ["control", "--start-exec-queue"]);
    let result = std::panic::catch_unwind(|| works(&world, || drop(start())));
    start();
    let _ = result.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn without_dmsetup_the_device_is_hidden_all_the_same() {
    let world = World::new("udev");
    let image = raw(&world, "bare.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", "-L", "imgdm-bare", &image]);
    let links = disk_links();
    sh("mount --bind /bin/false /usr/sbin/dmsetup");
    let start = Instant::now();
    let ran = imgdm(args!["attach", &image]);
    let took = start.elapsed();
    sh("udevadm settle; umount /usr/sbin/dmsetup");
    assert!(ran.status.success(), "{ran}");
    assert!(took < BOUND, "attach took {took:?}");
    assert!(!Path::new("/dev/disk/by-label/imgdm-bare").exists());
    let new: Vec<_> = disk_links().into_keys().filter(|link| !links.contains_key(link)).collect();
    assert!(new.is_empty(), "{new:?}");
    assert_eq!(imgdm(["detach", "bare"]).ok(), "");
}
