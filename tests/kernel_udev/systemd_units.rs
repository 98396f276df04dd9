//! What systemd makes of an attachment.

use std::fs;

use crate::guest::*;
use crate::hidden::assert_hidden;
use crate::world::*;

fn is_active(unit: &str) -> bool {
    run(&mut command("systemctl", ["is-active", "--quiet", unit])).status.success()
}

#[test]
fn the_device_unit_comes_and_goes() {
    let world = World::new("systemd");
    let base = raw(&world, "unit.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", "-L", "imgdm-unit", &base]);
    let image = overlay(&world, "unit.qcow2", &base);
    let unit = "dev-mapper-unit.device";
    assert!(!is_active(unit));
    for _ in 0..3 {
        let device = attach([&image]);
        wait_for("the device's unit", || is_active(unit));
        for action in ["change", "add"] {
            trigger(action);
            assert!(is_active(unit), "gone after '{action}'");
            assert_hidden(&device);
        }
        // systemd has no unit for what is inside.
        for node in tree(&device).iter().skip(1) {
            let unit = format!("dev-{}.device", node.kernel_name.replace('-', "\\x2d"));
            assert!(!is_active(&unit), "{unit} is active");
        }
        device.detach();
        wait_for("the device's unit to go", || !is_active(unit));
    }
}

#[test]
fn a_mount_unit_waits_for_the_device() {
    let world = World::new("systemd");
    let base = raw(&world, "late.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", &base]);
    let unit = "[Mount]\nWhat=/dev/mapper/late\nWhere=/run/late\nOptions=ro\n";
    fs::write("/run/systemd/system/run-late.mount", unit).unwrap();
    sh("systemctl daemon-reload; systemctl start --no-block run-late.mount");
    assert!(!is_active("run-late.mount"));
    let device = attach([&base]);
    wait_for("the mount that waited", || is_active("run-late.mount"));
    let ran = imgdm(["detach", "late"]);
    assert!(ran.refused(75).contains("/run/late"));
    sh("systemctl stop run-late.mount; rm /run/systemd/system/run-late.mount");
    device.detach();
    sh("systemctl daemon-reload");
}

#[test]
fn the_device_stays_ready_when_the_initrd_ends() {
    let world = World::new("systemd");
    let base = raw(&world, "root.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", &base]);
    let device = attach([&overlay(&world, "root.qcow2", &base)]);
    settle();
    // What initrd-udevadm-cleanup-db.service and the cold plug of the new root do.
    tool("udevadm", ["info", "--cleanup-db"]);
    trigger("add");
    assert_hidden(&device);
    assert!(is_active("dev-mapper-root.device"));
    device.detach();
}

#[test]
fn logs_tell_of_no_trouble() {
    let world = World::new("systemd");
    let base = raw(&world, "quiet.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", &base]);
    let image = overlay(&world, "quiet.qcow2", &base);
    let marker = format!("imgdm-test-marker-{}", std::process::id());
    tool("udevadm", ["control", "--log-level=debug"]);
    tool("systemd-cat", ["-p", "notice", "echo", &marker]);
    for _ in 0..2 {
        attach([&image]).detach();
    }
    settle();
    tool("udevadm", ["control", "--log-level=info"]);
    tool("journalctl", ["--sync"]);
    let since = |level: &str| {
        let line = ["-b", "-o", "short-monotonic", "--no-pager", "-p", level];
        let log = tool("journalctl", line);
        let (_, since) = log.split_once(&marker).expect("no marker in the journal");
        since.to_owned()
    };
    // The marker is at the level `notice`.
    let (all, notices) = (since("debug"), since("notice"));
    assert!(all.contains("Processing device"), "udev is not at its debug level: {all}");
    let of_ours = |line: &str| {
        let ours = ["dm-", "loop", "imgdm", "cookie", "quiet"];
        ours.iter().any(|word| line.to_ascii_lowercase().contains(word))
    };
    let trouble = |line: &str| {
        let bad = ["error", "fail", "invalid", "timeout", "no such", "warn", "cannot", "unable"];
        // An event about what a loop device was bound to before: udev sees that it is late.
        let late = line.contains("Failed to open '/dev/loop") && line.contains("ignoring: No such");
        !late && bad.iter().any(|word| line.to_ascii_lowercase().contains(word))
    };
    let lines: Vec<_> = notices.lines().filter(|line| of_ours(line)).collect();
    assert!(lines.is_empty(), "not for administrators to read: {lines:#?}");
    let lines: Vec<_> = all.lines().filter(|line| of_ours(line) && trouble(line)).collect();
    assert!(lines.is_empty(), "{lines:#?}");
}
