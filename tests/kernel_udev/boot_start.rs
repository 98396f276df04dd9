//! What a guest with an imgdmtab and an fstab (tests/kernel_udev/boot-files) has once it has
//! booted. Each test leaves things as it found them: the boot is there once.

use std::fs;
use std::path::{Path, PathBuf};

use crate::guest::*;
use crate::hidden::assert_hidden;
use crate::world::*;

/// A property of a unit.
#[track_caller]
fn show(unit: &str, property: &str) -> String {
    let printed = tool("systemctl", ["show", "--property", property, "--value", unit]);
    printed.trim_end_matches('\n').to_owned()
}

fn state(unit: &str) -> String {
    show(unit, "ActiveState")
}

/// A moment in a unit's life, in microseconds.
#[track_caller]
fn moment(unit: &str, property: &str) -> u64 {
    let text = show(unit, property);
    let time = text.parse().unwrap_or_else(|_| panic!("{property} of {unit}: '{text}'"));
    assert!(time > 0, "{unit} has no {property}");
    time
}

/// Where a file system is mounted from.
fn mounted_from(place: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(place))?;
    fs::canonicalize(line.split(' ').next()?).ok()
}

fn device(name: &str) -> Device {
    Device { name: name.to_owned(), path: Path::new("/dev/mapper").join(name) }
}

/// Waits until no job of the boot is left: those with nofail hold nothing up.
#[track_caller]
fn booted() {
    settle();
    wait_for("the boot's jobs", || {
        let jobs = tool("systemctl", ["list-jobs", "--no-legend", "--plain"]);
        !jobs.lines().any(|job| ["imgdm-tab", "srv-", "dev-"].iter().any(|word| job.contains(word)))
    });
}

#[test]
fn the_images_are_attached_and_mounted_in_order() {
    booted();
    for (place, name) in
        [("/srv/whole", "whole"), ("/srv/part1", "parts1"), ("/srv/part2", "parts2")]
    {
        let wanted = fs::canonicalize(device(name).path).unwrap();
        assert_eq!(mounted_from(place), Some(wanted), "{place}");
        assert!(Path::new(place).join("lost+found").is_dir());
    }
    let began = |unit| moment(unit, "ExecMainStartTimestampMonotonic");
    let ended = |unit| moment(unit, "ActiveEnterTimestampMonotonic");
    for (service, mount) in [
        ("imgdm-tab@whole.service", "srv-whole.mount"),
        ("imgdm-tab@parts.service", "srv-part1.mount"),
    ] {
        assert!(ended("srv-images.mount") <= began(service), "{service} is before its image");
        assert!(ended(service) <= moment(mount, "InactiveExitTimestampMonotonic"), "{mount}");
    }
    assert!(ended("imgdm-tab@whole.service") <= ended("sysinit.target"));
    // What is sure to come is waited for as long as attaching takes.
    let timeout = |unit| show(unit, "JobRunningTimeoutUSec");
    assert_eq!(timeout("dev-mapper-whole.device"), "infinity");
    assert_ne!(timeout("dev-mapper-parts2.device"), "infinity");
    assert!(ended("srv-whole.mount") <= ended("local-fs.target"), "local-fs.target did not wait");
    // A blank and a '%' on the way from the table to the unit.
    let mounts = show("imgdm-tab@parts.service", "RequiresMountsFor");
    assert!(mounts.contains("/srv/images/my parts%.qcow2"), "{mounts}");
}

#[test]
fn links_by_imgdm_are_there_and_others_only_of_what_is_published() {
    booted();
    let links = by_imgdm();
    let names: Vec<_> = links.keys().map(String::as_str).collect();
    assert_eq!(names, ["parts", "parts-part1", "parts-part2", "shown", "whole"]);
    for (link, name) in [("parts-part2", "parts2"), ("whole", "whole")] {
        let led = fs::canonicalize(Path::new("/dev/disk/by-imgdm").join(link)).unwrap();
        assert_eq!(led, fs::canonicalize(device(name).path).unwrap());
    }
    let uuid = |number: u32| format!("5ca1ab1e-0000-4000-8000-00000000000{number}");
    let shown = fs::canonicalize("/dev/mapper/shown").unwrap();
    let check = || {
        let all = disk_links();
        let names: Vec<_> = all.keys().map(|path| path.to_string_lossy()).collect();
        for hidden in [uuid(0), uuid(4), uuid(5), "imgdm-0".to_owned(), "dm-name-whole".to_owned()]
        {
            assert!(!names.iter().any(|name| name.contains(&hidden)), "{hidden}: {names:#?}");
        }
        let by = [
            "by-id/dm-name-shown".to_owned(),
            format!("by-uuid/{}", uuid(1)),
            "by-label/imgdm-1".to_owned(),
        ];
        for link in by {
            let led = fs::canonicalize(Path::new("/dev/disk").join(&link)).ok();
            assert_eq!(led.as_ref(), Some(&shown), "{link}: {names:#?}");
        }
        for name in ["whole", "parts"] {
            assert_hidden(&device(name));
        }
        assert_eq!(by_imgdm(), links);
    };
    check();
    // As device-mapper's own tools resume a device: they tell udev nothing of hiding.
    tool("dmsetup", ["suspend", "whole"]);
    tool("dmsetup", ["resume", "whole"]);
    settle();
    check();
    for action in ["change", "add"] {
        trigger(action);
        check();
    }
    // What initrd-udevadm-cleanup-db.service and the cold plug of the new root do.
    tool("udevadm", ["info", "--cleanup-db"]);
    trigger("add");
    check();
    let published = |name: &str| {
        listed().iter().find(|each| each["name"] == name).unwrap()["published"].as_bool()
    };
    assert_eq!((published("shown"), published("whole")), (Some(true), Some(false)));
}

#[test]
fn what_is_missing_fails_and_holds_up_nothing() {
    booted();
    for name in ["gone", "needed"] {
        let service = format!("imgdm-tab@{name}.service");
        assert_eq!(state(&service), "failed");
        assert_eq!(show(&service, "ExecMainStatus"), "66", "{service}");
        let log = tool("journalctl", ["-b", "-o", "cat", "-u", &service]);
        assert!(log.contains(&format!("/srv/images/{name}.qcow2")), "{log}");
        assert_eq!(mounted_from(&format!("/srv/{name}")), None);
    }
    // Without nofail its target fails, and with that nothing else.
    assert_eq!(
        (state("imgdm.target"), state("local-fs.target")),
        ("inactive".into(), "active".into())
    );
    // At once, not after the time that a device is waited for (which the console would tell).
    let ran = run(&mut command("systemctl", ["start", "srv-needed.mount"]));
    assert!(ran.stderr.contains("A dependency job for srv-needed.mount failed"), "{ran}");
}

#[test]
fn a_wrong_line_is_told_and_fails_what_waits_for_it_at_once() {
    booted();
    let kernel = kernel_log();
    let said = "imgdm-generator";
    let line =
        kernel.lines().find(|line| line.contains(said)).expect("nothing in the kernel's log");
    assert!(line.contains("/etc/imgdmtab: line 8: unknown option 'nofial'"), "{line}");
    let ran = run(&mut command("systemctl", ["start", "srv-typo.mount"]));
    assert!(!ran.status.success());
    assert_eq!(show("imgdm-tab@typo.service", "ExecMainStatus"), "78");
    tool("systemctl", ["reset-failed", "imgdm-tab@typo.service"]);
}

#[test]
fn noauto_is_attached_by_the_mount_that_needs_it() {
    booted();
    assert_eq!(
        (state("imgdm-tab@asked.service"), mounted_from("/srv/asked")),
        ("inactive".into(), None)
    );
    tool("systemctl", ["start", "srv-asked.mount"]);
    assert_eq!(state("imgdm-tab@asked.service"), "active");
    assert!(mounted_from("/srv/asked").is_some());
    // The service takes its mount down first.
    tool("systemctl", ["stop", "imgdm-tab@asked.service"]);
    assert_eq!(mounted_from("/srv/asked"), None);
    assert!(!our_devices().contains(&"asked".to_owned()));
    assert_eq!(show("imgdm-tab@asked.service", "Result"), "success");
}

#[test]
fn an_image_is_attached_by_its_path() {
    booted();
    let path = "/srv/images/by path%.raw";
    let unit = tool("systemd-escape", ["--path", "--template=imgdm@.service", path]);
    let unit = unit.trim();
    let before = our_devices();
    tool("systemctl", ["start", unit]);
    assert_eq!(show(unit, "ActiveState"), "active");
    assert!(show(unit, "RequiresMountsFor").contains(path));
    let device = device("by_path_");
    assert_eq!(device.sha256(), sha256(Path::new(path)));
    assert_hidden(&device);
    tool("systemctl", ["stop", unit]);
    assert_eq!(our_devices(), before);
    assert_eq!(show(unit, "Result"), "success");
}

#[test]
fn the_unit_of_a_path_takes_down_only_what_it_attached() {
    booted();
    let path = "/srv/images/by path%.raw";
    let unit = tool("systemd-escape", ["--path", "--template=imgdm@.service", path]);
    let unit = unit.trim();
    let before = our_devices();
    imgdm(["attach", "--name", "other", path]).ok();
    tool("systemctl", ["start", unit]);
    tool("systemctl", ["stop", unit]);
    assert_eq!(
        (show(unit, "Result"), show(unit, "ExecMainStatus")),
        ("success".into(), "0".into())
    );
    assert!(!Path::new("/dev/mapper/by_path_").exists());
    // Its own is gone before it is stopped.
    tool("systemctl", ["start", unit]);
    imgdm(["detach", "by_path_"]).ok();
    tool("systemctl", ["stop", unit]);
    assert_eq!(show(unit, "Result"), "success");
    // Another image under that name is none of its business.
    tool("systemctl", ["start", unit]);
    imgdm(["detach", "by_path_"]).ok();
    imgdm(["attach", "--name", "by_path_", "/srv/images/asked.raw"]).ok();
    tool("systemctl", ["stop", unit]);
    for name in ["other", "by_path_"] {
        assert!(Path::new("/dev/mapper").join(name).exists(), "{name} is gone");
        imgdm(["detach", name]).ok();
    }
    assert_eq!(our_devices(), before);
}

#[test]
fn a_daemon_reload_changes_nothing() {
    booted();
    let generated = || sh("cd /run/systemd/generator; find . -print | sort; cat imgdm-tab@*");
    let (units, devices) = (generated(), listed());
    assert!(units.contains("sysinit.target.wants/imgdm.target"), "{units}");
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    for _ in 0..2 {
        tool("systemctl", ["daemon-reload"]);
        assert_eq!(generated(), units);
    }
    assert_eq!(listed(), devices);
    assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), mounts);
    for unit in ["imgdm-tab@whole.service", "imgdm-tab@parts.service", "imgdm-tab@shown.service"] {
        assert_eq!(
            (state(unit).as_str(), show(unit, "NeedDaemonReload").as_str()),
            ("active", "no")
        );
    }
    // Started again, nothing happens to what is there.
    tool("systemctl", ["start", "imgdm-tab@whole.service"]);
    assert_eq!(imgdm(["attach-tab", "whole"]).ok(), "/dev/mapper/whole\n");
    assert_eq!(listed(), devices);
}
