//! `imgdm partitions` of images beside what `partx` and `blkid` say of a raw copy by
//! qemu-img, and `pvck` of a physical volume on it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::images::scratch_dir;
use crate::common::lvm::{
    AREA_AT, AREA_HEADER, FIRST, MIB, group_text, linear_text, logical_text, put_area, put_label,
};
use crate::common::patch::Patch;
use crate::common::process::{Outcome, run};
use crate::common::qemu;
use crate::crypt::secrets;
use crate::imgdm::imgdm;
use crate::partitions::{DISK_BYTES, Row, partx, sfdisk};
use crate::signatures::{Facts, blkid_of_part};

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn number(value: &Value) -> Outcome<u64> {
    match value.as_str().and_then(|text| text.strip_prefix("0x")) {
        Some(hex) => u64::from_str_radix(hex, 16).map_err(|error| error.to_string()),
        None => value.as_u64().ok_or_else(|| format!("{value} is no number")),
    }
}

/// A partition as `partx` tells it, and what `blkid` finds on it.
fn rows(report: &Value) -> Outcome<Vec<(Row, Facts)>> {
    let partitions = report["partitions"].as_array().ok_or("no array of partitions")?;
    let row = |one: &Value| {
        let row = (
            u32::try_from(number(&one["number"])?).map_err(|error| error.to_string())?,
            number(&one["start"])? / 512,
            number(&one["length"])? / 512,
            text(&one["type"]),
            text(&one["uuid"]),
            text(&one["name"]),
            number(&one["flags"])?,
            text(&one["table"]),
        );
        Ok((row, facts(&one["content"])))
    };
    partitions.iter().map(row).collect()
}

fn facts(content: &Value) -> Facts {
    (
        text(&content["kind"]),
        text(&content["label"]),
        text(&content["uuid"]),
        text(&content["usage"]),
    )
}

/// What the image's own listing says, and the same from a raw copy.
fn compare(dir: &Path, arguments: &[&str], copy: &str) -> Outcome<Value> {
    let ran = imgdm(dir, &[&["partitions", "--output=json"], arguments].concat())?.ok()?;
    let report: Value = serde_json::from_str(&ran.text()).map_err(|error| error.to_string())?;
    let ours = rows(&report)?;
    let copy = dir.join(copy);
    let mut theirs = Vec::new();
    for row in partx(&copy)? {
        let part = (row.1 * 512, row.2 * 512);
        let content = blkid_of_part(&copy, Some(part))?;
        theirs.push((row, content));
    }
    if ours == theirs {
        return Ok(report);
    }
    Err(format!("{arguments:?}\nimgdm: {ours:#?}\npartx, blkid: {theirs:#?}"))
}

/// Writes a disk with five partitions: ext4, vfat, nothing, swap and a physical volume.
fn disk(dir: &Path, label: &str) -> Outcome {
    let raw = dir.join("disk.raw");
    let types = match label {
        "gpt" => ["L", "U", "L", "S", "lvm"],
        _ => ["83", "c", "5", "82", "8e"],
    };
    let sizes = [20, 12, 12, 4, 6];
    let mut script = format!("label: {label}\nlabel-id: ");
    script +=
        if label == "gpt" { "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0\n" } else { "0x0f1e2d3c\n" };
    let mut start = 1;
    for (kind, mib) in types.into_iter().zip(sizes) {
        // Those after the extended partition lie inside of it.
        let (from, length) = match (label, kind) {
            ("dos", "82") => (34, 4),
            ("dos", "8e") => (39, 6),
            ("dos", "5") => (33, 20),
            _ => (start, mib),
        };
        start += mib;
        script += &format!("start={}, size={}, type={kind}", from * 2048, length * 2048);
        script += if label == "gpt" { ", name=\"part of it\"\n" } else { "\n" };
    }
    sfdisk(&raw, &script)?;
    let file = OpenOptions::new().write(true).open(&raw).map_err(|error| error.to_string())?;
    let makers: [(&str, &[&str]); 3] = [
        ("ext4", &["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root"]),
        ("vfat", &["mkfs.vfat", "-n", "EFI"]),
        ("swap", &["mkswap", "-q", "-L", "swap"]),
    ];
    for row in partx(&raw)? {
        let (number, start) = (row.0, row.1 * 512);
        let length = usize::try_from(row.2 * 512).map_err(|error| error.to_string())?;
        let maker = match (number, row.3.as_str()) {
            (1, _) => 0,
            (2, _) => 1,
            (4, _) | (5, "0x82") => 2,
            (5 | 6, _) => {
                file.write_all_at(&physical_volume(length), start).map_err(|e| e.to_string())?;
                continue;
            }
            _ => continue,
        };
        let (name, command) = makers[maker];
        let part = dir.join(name);
        File::create(&part).and_then(|f| f.set_len(length as u64)).map_err(|e| e.to_string())?;
        run(Command::new(command[0]).args(&command[1..]).arg(&part))?.ok()?;
        let bytes = fs::read(&part).map_err(|error| error.to_string())?;
        file.write_all_at(&bytes, start).map_err(|error| error.to_string())?;
    }
    Ok(())
}

fn physical_volume(length: usize) -> Vec<u8> {
    let mut volume = vec![0; length];
    let area = (AREA_AT, MIB - AREA_AT);
    put_label(&mut volume, FIRST, &[area]);
    let logical = logical_text("root", &[&linear_text(0, 3, "pv0", 7)]);
    put_area(&mut volume, area, AREA_HEADER, &group_text("vg", 3, &[FIRST], &logical));
    volume
}

#[test]
fn partitions_of_any_image_are_those_of_its_raw_copy() {
    let dir = scratch_dir("listed").unwrap();
    let dir = dir.path();
    fs::write(dir.join("key"), "abc").unwrap();
    for label in ["gpt", "dos"] {
        disk(dir, label).unwrap();
        let report = compare(dir, &["disk.raw", "-f", "raw"], "disk.raw").unwrap();
        assert_eq!(report["partitions"].as_array().unwrap().len(), 5);
        assert_eq!(report["table"]["kind"], label);
        let group = &report["lvm"]["volume_groups"][0];
        assert_eq!(group["logical_volumes"][0]["name"], "root");

        for options in [
            &["create", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "image"][..],
            &["convert", "-O", "qcow2", "-c", "disk.raw", "image"],
        ] {
            qemu::img(dir, options).unwrap();
            // In the chain's own top: another name of a partition's file system, and in a
            // snapshot the old one.
            qemu::img(dir, &["snapshot", "-c", "before", "image"]).unwrap();
            let zeros = ["write -P 0 1M 1M".to_owned()];
            qemu::io(dir, "qcow2", "image", &zeros).unwrap();
            qemu::img(dir, &["convert", "-O", "raw", "image", "copy"]).unwrap();
            let after = compare(dir, &["image"], "copy").unwrap();
            assert_eq!(after["partitions"][0]["content"], Value::Null);
            let before = compare(dir, &["-l", "before", "image"], "disk.raw").unwrap();
            assert_eq!(before["partitions"][0]["content"]["label"], "root");
        }

        let mut options = vec!["convert".to_owned()];
        options.extend(secrets(&["abc"]));
        let luks = ["-O", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10"];
        options.extend(luks.iter().map(|&word| word.to_owned()));
        options.extend(["-o", "encrypt.key-secret=s0", "disk.raw", "image"].map(str::to_owned));
        qemu::img(dir, &options).unwrap();
        compare(dir, &["--key-file", "key", "image"], "disk.raw").unwrap();
        // Without the key nothing is told.
        let ran = imgdm(dir, &["partitions", "image"]).unwrap();
        assert_eq!(ran.code(), Some(67), "{}", ran.describe());
    }
    assert_eq!(DISK_BYTES, fs::metadata(dir.join("disk.raw")).unwrap().len());
}

#[test]
fn a_cluster_that_cannot_be_inflated_takes_away_only_what_it_holds() {
    let dir = scratch_dir("listed-broken").unwrap();
    let dir = dir.path();
    disk(dir, "gpt").unwrap();
    qemu::img(dir, &["convert", "-O", "qcow2", "-c", "disk.raw", "image"]).unwrap();
    let sound = compare(dir, &["image"], "disk.raw").unwrap();
    let rest = |report: &Value| {
        let table = &report["table"];
        (table.clone(), report["partitions"].clone(), report["lvm"].clone())
    };
    // The backup GPT; the superblocks of the second partition; a volume's label.
    let second = 21 << 20;
    let volume = sound["lvm"]["physical_volumes"][0]["start"].as_u64().unwrap();
    for (at, lost) in [(DISK_BYTES - 512, None), (second, Some(1)), (volume, Some(4))] {
        let image = Patch::open(&dir.join("image")).unwrap();
        let entry = image.l2_entry(at).unwrap();
        let place = image.u64(entry).unwrap();
        assert!(place >> 62 == 1, "a compressed cluster at {at:#x}: {place:#x}");
        let place = place & ((1 << 54) - 1);
        let before: [u8; 8] = image.bytes(place).unwrap();
        image.put(place, &[0xff; 8]).unwrap();
        let ran = imgdm(dir, &["partitions", "--output=json", "image"]).unwrap().ok().unwrap();
        image.put(place, &before).unwrap();
        let mut report: Value = serde_json::from_slice(&ran.stdout).unwrap();
        let warnings = report["warnings"].as_array().unwrap();
        assert!(!warnings.is_empty() && ran.stderr.contains("can't be read at 0x"), "{report}");
        if let Some(lost) = lost {
            assert_eq!(report["partitions"][lost]["content"], Value::Null);
            report["partitions"][lost]["content"] = sound["partitions"][lost]["content"].clone();
        }
        if lost == Some(4) {
            assert_eq!(report["lvm"]["physical_volumes"], Value::Array(Vec::new()));
            report["lvm"] = sound["lvm"].clone();
        }
        assert_eq!(rest(&report), rest(&sound), "{at:#x}");
    }
}

#[test]
fn a_file_system_on_the_whole_disk_is_told_as_blkid_tells_it() {
    let dir = scratch_dir("listed-whole").unwrap();
    let dir = dir.path();
    File::create(dir.join("disk.raw")).unwrap().set_len(16 << 20).unwrap();
    run(Command::new("mke2fs").args(["-q", "-F", "-L", "whole"]).arg(dir.join("disk.raw")))
        .and_then(|ran| ran.ok())
        .unwrap();
    qemu::img(dir, &["create", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "image"]).unwrap();
    let report = compare(dir, &["image"], "disk.raw").unwrap();
    assert_eq!(report["table"], Value::Null);
    assert_eq!(facts(&report["content"]), blkid_of_part(&dir.join("disk.raw"), None).unwrap());
}
