//! What the host must not do to a guest's disk; each with the proof that it would do it
//! to a plain loop device over the same file.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::guest::*;
use crate::world::*;

/// How long what udev hands to systemd (LVM's activation) may take to start and act.
const ACTIVATION: Duration = Duration::from_secs(2);

/// A raw image, as top image, as evidence and under an overlay, all attached.
struct Attached {
    before: std::collections::BTreeMap<PathBuf, PathBuf>,
    devices: [Device; 3],
}

impl Attached {
    #[track_caller]
    fn attach(world: &World, raw: &Path) -> Self {
        settle();
        let before = disk_links();
        let above = overlay(world, "above.qcow2", raw);
        let records = world.path("records");
        fs::create_dir_all(&records).unwrap();
        let record = records.join(raw.file_name().unwrap());
        let record = format!("--evidence={}", record.display());
        let evidence = attach(args![record, "--name=evidence", raw]);
        let devices = [attach([raw]), evidence, attach([&above])];
        let inner = tree(&devices[2]).iter().filter(|n| n.kernel_name.starts_with("dm-")).count();
        assert!(inner > 1, "the overlay has no device inside");
        Self { before, devices }
    }

    /// Fails where udev knows or tells anything of what is inside, now or after it has
    /// dealt with all devices again.
    #[track_caller]
    fn assert_hidden(&self, also: &dyn Fn()) {
        for action in [None, Some("change"), Some("add")] {
            match action {
                None => settle(),
                Some(action) => trigger(action),
            }
            for device in &self.devices {
                assert_hidden(device);
            }
            assert_eq!(disk_links(), self.before, "links changed ({action:?})");
            also();
        }
        if Path::new("/run/systemd/system").exists() {
            thread::sleep(ACTIVATION);
            settle();
            assert_eq!(disk_links(), self.before, "links changed later");
            also();
        }
    }

    #[track_caller]
    fn detach(&self) {
        for device in &self.devices {
            device.detach();
        }
    }
}

/// Fails where udev has looked into any device of the attachment, or has given it a
/// link but that in /dev/mapper and that by its name.
#[track_caller]
pub(crate) fn assert_hidden(device: &Device) {
    for (at, node) in tree(device).iter().enumerate() {
        for property in node.properties() {
            let looked = ["ID_FS_", "ID_PART_", "ID_BTRFS", "LVM_", "DM_LV_"];
            let looked = looked.iter().any(|start| property.starts_with(start));
            assert!(!looked, "{} of '{}': {property}", node.kernel_name, device.name);
        }
        let claims: Vec<_> = node.claims().into_iter().collect();
        let name = fs::read_to_string(format!("/sys/class/block/{}/dm/name", node.kernel_name));
        let mut allowed: Vec<_> =
            name.iter().map(|name| format!("mapper/{}", name.trim())).collect();
        if at == 0 {
            allowed.insert(0, format!("disk/by-imgdm/{}", device.name));
        }
        assert_eq!(claims, allowed, "links of {} of '{}'", node.kernel_name, device.name);
        let ready = node.property("SYSTEMD_READY");
        // Of evidence even systemd may be told nothing.
        if at > 0 || device.name != "evidence" {
            assert_eq!(ready.as_deref() == Some("0"), at > 0, "{}: {ready:?}", node.kernel_name);
        }
    }
    let node = fs::read_link(&device.path).unwrap();
    assert!(node.starts_with(".."), "a link of ours, not udev's: {}", node.display());
}

/// A volume group on a raw image: not activated, its PV not even noticed.
#[track_caller]
pub(crate) fn lvm(world: &World) {
    let volume = "imgdmtest-lv";
    let is_active = || dm_devices().iter().any(|(name, _)| name == volume);
    let image = raw(world, "pv.raw", 32);
    {
        let printed = tool("losetup", args!["-f", "--show", &image]);
        let device = printed.trim();
        sh(&format!(
            "pvcreate -qqy {device}; vgcreate -qq imgdmtest {device}
             lvcreate -qqy -an -Wn -L 4M -n lv imgdmtest
             udevadm settle"
        ));
        forget_volume_group(device);
    }
    assert!(!is_active());

    let attached = Attached::attach(world, &image);
    attached.assert_hidden(&|| {
        assert!(!is_active(), "the guest's volume group was activated");
        let online = fs::read_dir("/run/lvm/pvs_online").into_iter().flatten().count();
        assert_eq!(online, 0, "LVM noticed the guest's PV");
    });
    attached.detach();

    // Unless that is asked for.
    let published = attach([OsStr::new("--publish"), image.as_os_str()]);
    wait_for("the published disk's volume group to be activated", is_active);
    deactivate_volume_group();
    published.detach();
    forget_what_lvm_noted();
    assert!(!is_active());

    let plain = PlainLoop::over(&image);
    wait_for("a plain loop to have its volume group activated", is_active);
    settle();
    forget_volume_group(&plain.path().to_string_lossy());
}

/// Deactivates the group, takes its loop away and what LVM noted of it.
#[track_caller]
fn forget_volume_group(device: &str) {
    deactivate_volume_group();
    sh(&format!("losetup -d {device}"));
    forget_what_lvm_noted();
}

/// The activation that udev has systemd run is none of udev's own work, so settling does not
/// wait for it.
#[track_caller]
fn deactivate_volume_group() {
    sh("udevadm settle; systemctl stop lvm-activate-imgdmtest.service 2>/dev/null || true
        vgchange -qq -an imgdmtest; udevadm settle");
}

#[track_caller]
fn forget_what_lvm_noted() {
    sh("udevadm settle
        rm -f /run/lvm/pvs_online/* /run/lvm/vgs_online/* /run/lvm/pvs_lookup/*
        systemctl reset-failed 2>/dev/null || true");
}

/// A btrfs on a raw image: not registered with the kernel, where one of the same UUID
/// could then not be mounted, or be mixed up with it.
#[track_caller]
pub(crate) fn btrfs(world: &World) {
    let image = raw(world, "btrfs.raw", 128);
    tool("mkfs.btrfs", args!["-q", "-L", "imgdm-btrfs", &image]);
    let registered = || kernel_log().matches("BTRFS: device label imgdm-btrfs").count();
    let before = registered();

    let attached = Attached::attach(world, &image);
    attached.assert_hidden(&|| assert_eq!(registered(), before, "registered with the kernel"));
    attached.detach();

    let plain = PlainLoop::over(&image);
    wait_for("a plain loop's btrfs to be registered", || registered() > before);
    settle();
    assert_eq!(plain.property("ID_FS_TYPE").as_deref(), Some("btrfs"));
    drop(plain);
    let _ = run(&mut command("btrfs", ["device", "scan", "--forget"]));
}

/// A raw image with the UUID of a disk that the host has: the host's link stays.
#[track_caller]
pub(crate) fn same_uuid(world: &World) {
    let uuid = host_uuid();
    let link = Path::new("/dev/disk/by-uuid").join(&uuid);
    let leads = || fs::canonicalize(&link).ok();
    assert_eq!(leads(), Some(host_disk()), "the host's own link");
    let image = raw(world, "same.raw", 16);
    tool("mkfs.ext4", args!["-q", "-F", "-U", &uuid, "-L", "imgdm-guest", &image]);

    let attached = Attached::attach(world, &image);
    attached
        .assert_hidden(&|| assert_eq!(leads(), Some(host_disk()), "the host's link was shadowed"));
    attached.detach();

    let plain = PlainLoop::over(&image);
    settle();
    let claims = plain.claims();
    let wanted = format!("disk/by-uuid/{uuid}");
    assert!(claims.contains(&wanted), "a plain loop does not claim the host's link: {claims:?}");
    let label = fs::canonicalize("/dev/disk/by-label/imgdm-guest").ok();
    assert_eq!(label, Some(plain.path()), "a plain loop has no link by its label");
    drop(plain);
    assert_eq!(leads(), Some(host_disk()));
}
