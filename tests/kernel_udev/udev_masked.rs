//! Where parts of udev's rules or of dmsetup are missing: attach returns all the same.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::guest::*;
use crate::hidden::assert_hidden;
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

#[test]
fn in_the_order_of_device_mappers_own_rules_the_device_is_hidden_as_well() {
    // As Fedora has them: blkid and the links come before imgdm's rule.
    let world = World::new("udev");
    let image = raw(&world, "early.raw", 16);
    sh(&format!(
        "printf 'label: gpt\\nstart=2048,size=16384,name=imgdm-name\\n' | sfdisk -q {0}
         mkfs.ext4 -q -F -L imgdm-early -E offset=1048576 {0} 8M",
        image.display()
    ));
    let whole = raw(&world, "whole.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", "-L", "imgdm-whole", &whole]);
    let text = |name: &str| fs::read_to_string(format!("/lib/udev/rules.d/{name}")).unwrap();
    let _rules = [
        Rules::put("10-dm.rules", &text("55-dm.rules")),
        Rules::put("13-dm-disk.rules", &text("60-persistent-storage-dm.rules")),
        Rules::put("55-dm.rules", ""),
        Rules::put("60-persistent-storage-dm.rules", ""),
    ];
    settle();
    let links = disk_links();
    imgdm(args!["attach", "-f", "raw", "--partitions", &image]).ok();
    let early = Device { name: "early".to_owned(), path: "/dev/mapper/early".into() };
    let devices = [early, attach([&whole])];
    // As device-mapper's own tools resume: they tell udev nothing of hiding.
    for name in ["early", "early1", "whole"] {
        tool("dmsetup", ["suspend", name]);
        tool("dmsetup", ["resume", name]);
    }
    for action in ["change", "add"] {
        settle();
        for device in &devices {
            assert_hidden(device);
        }
        assert_eq!(disk_links(), links, "before '{action}'");
        let part = fs::canonicalize("/dev/mapper/early1").unwrap();
        let part = Node::named(&part.file_name().unwrap().to_string_lossy());
        let claims: Vec<_> = part.claims().into_iter().collect();
        assert_eq!(claims, ["disk/by-imgdm/early-part1", "mapper/early1"]);
        assert_eq!(part.property("ID_FS_TYPE"), None);
        trigger(action);
    }
    for device in devices {
        device.detach();
    }
    // It is these rules that look: into what is published they do.
    let published = attach(args!["--publish", &whole]);
    settle();
    let led = fs::canonicalize("/dev/disk/by-label/imgdm-whole").ok();
    assert_eq!(led, fs::canonicalize(&published.path).ok());
    published.detach();
}
