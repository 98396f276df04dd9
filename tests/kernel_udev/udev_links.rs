//! /dev/mapper/NAME comes before attach returns and goes before detach does.

use std::fs::{self, File};

use crate::guest::*;
use crate::world::*;

#[test]
fn the_device_can_be_opened_when_attach_returns() {
    let world = World::new("udev");
    let base = raw(&world, "base.raw", 4);
    let image = overlay(&world, "disk.qcow2", &base);
    write_image(&image, "qcow2", &["write -P 5 64k 64k"]);
    let links = disk_links();
    for round in 0..30 {
        let device = attach([&image]);
        // Through udev's link, at once.
        let opened = File::open(&device.path);
        assert!(opened.is_ok(), "round {round}: {opened:?}");
        let target = fs::read_link(&device.path).expect("no link");
        let node = tree(&device)[0].kernel_name.clone();
        assert_eq!(target.to_string_lossy(), format!("../{node}"), "round {round}");
        // That of the device inside comes when udev gets to it.
        let there = mapper();
        assert!(there.contains(&"disk".to_owned()), "round {round}: {there:?}");
        assert!(there.iter().all(|n| n == "disk" || n == "disk-inner0"), "{round}: {there:?}");
        drop(opened);
        device.detach();
        assert_eq!(mapper(), [""; 0], "round {round}");
        assert!(our_devices().is_empty() && loops().is_empty(), "round {round}");
    }
    settle();
    assert_eq!(mapper(), [""; 0]);
    assert_eq!(disk_links(), links);
    let claims = fs::read_dir("/run/udev/links").unwrap().flatten();
    let claims = claims.flat_map(|link| fs::read_dir(link.path()).unwrap().flatten());
    let claims: Vec<_> =
        claims.filter(|id| id.file_name().to_string_lossy().starts_with("b254:")).collect();
    assert!(claims.is_empty(), "udev's notes of gone devices' links: {claims:?}");
    let records = fs::read_dir("/run/udev/data").unwrap().flatten();
    let records: Vec<_> =
        records.filter(|r| r.file_name().to_string_lossy().starts_with("b254:")).collect();
    assert!(records.is_empty(), "udev's records of gone devices: {records:?}");
}
