//! Where imgdm's udev rule is not installed.

use std::path::Path;

use crate::guest::*;
use crate::world::*;

#[test]
fn a_raw_image_is_warned_of_and_a_pure_qcow2_is_not() {
    let world = World::new("udev");
    let base = raw(&world, "base.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", "-L", "imgdm-norule", &base]);
    let pure = world.create("qcow2", &[], "pure.qcow2", "4M");
    let above = overlay(&world, "above.qcow2", &base);

    for image in [&base, &above] {
        let ran = imgdm(args!["attach", image]);
        assert!(ran.status.success(), "{ran}");
        let how = ["59-imgdm.rules", "/etc/udev/rules.d"];
        assert!(how.iter().all(|word| ran.stderr.contains(word)), "{ran}");
        // And rightly so.
        settle();
        assert!(Path::new("/dev/disk/by-label/imgdm-norule").exists(), "nothing to warn of");
        assert_eq!(imgdm(args!["detach", image]).ok(), "");
    }
    let ran = imgdm(args!["attach", &pure]);
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran}");
    assert_eq!(imgdm(args!["detach", &pure]).ok(), "");

    // The rule counts as soon as it is there, under any name.
    let text = include_str!("../../udev/59-imgdm.rules");
    let _rule = Rules::put("58-local-imgdm.rules", text);
    let ran = imgdm(args!["attach", &base]);
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran}");
    assert_eq!(imgdm(args!["detach", &base]).ok(), "");
}
