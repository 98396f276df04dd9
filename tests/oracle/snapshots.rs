//! `imgdm snapshots` beside `qemu-img snapshot -l` and the list of `qemu-img info`.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::images::scratch_dir;
use crate::common::patch::{Patch, SNAPSHOTS_OFFSET};
use crate::common::process::{Outcome, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::{PROGRAM, imgdm, sound};
use crate::info::{assert_same, create, json, squeezed};

/// `imgdm snapshots`, both forms, in a time zone.
///
/// # Errors
/// They differ from qemu-img's.
pub(crate) fn same_snapshots(dir: &Path, file: &str, zone: Option<&str>) -> Outcome {
    let mut listing = Command::new("qemu-img");
    let mut ours = Command::new(PROGRAM);
    listing.args(["snapshot", "-l", file]);
    ours.args(["snapshots", file]);
    for command in [&mut listing, &mut ours] {
        command.current_dir(dir);
        if let Some(zone) = zone {
            command.env("TZ", zone);
        }
    }
    let (theirs, ours) = (run(&mut listing)?.ok()?, sound(run(&mut ours)?)?.ok()?);
    let (a, b) = (theirs.text(), ours.text());
    let mut same = a.lines().count() == b.lines().count();
    for (theirs, ours) in a.lines().zip(b.lines()) {
        // Ours has a column more.
        same &= squeezed(ours).starts_with(&squeezed(theirs));
    }
    if !same {
        return Err(format!("{zone:?}:\n{}{}", theirs.describe(), ours.describe()));
    }
    let info = json(&qemu::img(dir, &["info", "--output=json", file])?)?;
    let mut ours = json(&imgdm(dir, &["snapshots", "--output=json", file])?.ok()?)?;
    let list = ours.as_array_mut().ok_or("no array")?;
    for snapshot in list.iter_mut() {
        let size = snapshot.as_object_mut().and_then(|snapshot| snapshot.remove("virtual-size"));
        let size = size.as_ref().and_then(Value::as_u64).ok_or("no size")?;
        if size % 512 != 0 {
            return Err(format!("a size of {size}: {snapshot}"));
        }
    }
    let theirs = info["snapshots"].as_array().cloned().unwrap_or_default();
    if *list == theirs { Ok(()) } else { Err(format!("qemu-img: {theirs:?}\nimgdm: {list:?}")) }
}

#[test]
fn snapshots_are_listed_as_by_qemu_img_in_every_time_zone() {
    let dir = scratch_dir("info-snapshots").unwrap();
    let dir = dir.path();
    create(dir, "", None, "x");
    same_snapshots(dir, "x", None).unwrap();
    let long = "l".repeat(200);
    for name in ["before upgrade", "überblick", "1", "a,b=c", "'\"\\", long.as_str()] {
        qemu::img(dir, &["snapshot", "-c", name, "x"]).unwrap();
    }
    qemu::img(dir, &["resize", "-q", "x", "5M"]).unwrap();
    qemu::img(dir, &["snapshot", "-c", "larger", "x"]).unwrap();
    same_snapshots(dir, "x", None).unwrap();
    assert_same(dir, &["x"]);
    let ran = imgdm(dir, &["snapshots", "--output=json", "x"]).unwrap().ok().unwrap();
    let sizes: Vec<_> = json(&ran).unwrap().as_array().unwrap().iter().map(size_of).collect();
    assert_eq!(sizes, [[3 << 20; 6].as_slice(), &[5 << 20]].concat());

    // Whatever the fields hold.
    let mut rng = Rng::new(7);
    let image = Patch::open(&dir.join("x")).unwrap();
    let table = image.u64(SNAPSHOTS_OFFSET).unwrap();
    for round in 0..24u64 {
        let field = |rng: &mut Rng| rng.next() >> rng.below(64);
        image.put_u32(table + 16, u32::try_from(field(&mut rng) >> 32).unwrap()).unwrap();
        image.put_u32(table + 20, u32::try_from(rng.below(1_000_000_000)).unwrap()).unwrap();
        image.put_u64(table + 24, field(&mut rng)).unwrap();
        image.put_u64(table + 40, field(&mut rng) >> 1).unwrap();
        let count = if round % 3 == 0 { u64::MAX } else { field(&mut rng) };
        image.put_u64(table + 56, count).unwrap();
        let zones = ["Asia/Tokyo", "America/New_York", "Europe/Berlin", "EST5EDT", "UTC", "X-3:30"];
        same_snapshots(dir, "x", Some(*rng.pick(&zones))).unwrap();
        assert_same(dir, &["x"]);
    }
}

fn size_of(snapshot: &Value) -> u64 {
    snapshot["virtual-size"].as_u64().unwrap()
}

#[test]
fn snapshots_of_old_images_have_fewer_fields() {
    let dir = scratch_dir("info-extra").unwrap();
    let dir = dir.path();
    for extra in [0u32, 8, 16, 24] {
        create(dir, "", None, "x");
        qemu::img(dir, &["snapshot", "-c", "name", "x"]).unwrap();
        let image = Patch::open(&dir.join("x")).unwrap();
        let table = image.u64(SNAPSHOTS_OFFSET).unwrap();
        image.put_u32(table + 32, 12345).unwrap();
        image.put_u32(table + 36, extra).unwrap();
        image.put(table + 40 + u64::from(extra), b"1name").unwrap();
        same_snapshots(dir, "x", None).unwrap();
        assert_same(dir, &["x"]);
    }
}

#[test]
fn formats_without_snapshots_have_an_empty_list() {
    let dir = scratch_dir("info-none").unwrap();
    fs::write(dir.path().join("x.raw"), [0; 512]).unwrap();
    let ran = imgdm(dir.path(), &["snapshots", "--output=json", "x.raw"]).unwrap().ok().unwrap();
    assert_eq!(json(&ran).unwrap(), Value::Array(Vec::new()));
    assert!(ran.stderr.contains("raw has no internal snapshots"), "{}", ran.describe());
}
