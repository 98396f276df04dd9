//! What `imgdm verify` says of a device whose image or tables were changed under it, and of
//! one where they were not.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::{FallocateFlags, fallocate};
use serde_json::Value;

use crate::args;
use crate::compressed::text;
use crate::encrypted::{Encrypted, PATTERN};
use crate::guest::*;

fn verify(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Ran {
    let mut line = imgdm_command(["verify", "--output=json"]);
    let arguments = arguments.into_iter().map(Into::<OsString>::into);
    run(line.args(arguments).stdin(Stdio::null()))
}

/// It must find nothing, nor note anything.
#[track_caller]
pub(crate) fn assert_verified(arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Value {
    let ran = verify(arguments);
    assert_eq!(ran.code(), Some(0), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["same"], true, "{ran}");
    assert_eq!(report["findings"], Value::Array(Vec::new()), "{ran}");
    assert_eq!(report["notices"], Value::Array(Vec::new()), "{ran}");
    report
}

/// The kinds that are found, with the first guest offset and the bytes of each.
#[track_caller]
fn found(
    arguments: impl IntoIterator<Item = impl Into<OsString>>,
) -> Vec<(String, Option<u64>, Option<u64>)> {
    let ran = verify(arguments);
    assert_eq!(ran.code(), Some(1), "{ran}");
    assert!(ran.stderr.contains("is not what its image says"), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["same"], false, "{ran}");
    let findings = report["findings"].as_array().unwrap().iter().map(|finding| {
        let kind = finding["kind"].as_str().unwrap().to_owned();
        (kind, finding["guest_offset"].as_u64(), finding["bytes"].as_u64())
    });
    findings.collect()
}

/// One finding of that kind, from that guest offset on.
#[track_caller]
fn assert_found(name: &str, kind: &str, offset: u64, bytes: u64) {
    assert_eq!(found([name]), [(kind.to_owned(), Some(offset), Some(bytes))]);
}

/// Where the L2 entry of a cluster is, in a qcow2 of one L2 table of 64 KiB clusters.
pub(crate) fn l2_entry(image: &Path, cluster: u64) -> u64 {
    (number(image, number(image, 40)) & 0x00ff_ffff_ffff_fe00) + 8 * cluster
}

pub(crate) fn number(file: &Path, offset: u64) -> u64 {
    let mut bytes = [0; 8];
    File::open(file).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    u64::from_be_bytes(bytes)
}

/// 4 MiB with data in clusters 0 to 2, 16 to 17 and 40.
fn plain(scratch: &Scratch) -> std::path::PathBuf {
    let image = scratch.create("qcow2", &[], "disk.qcow2", "4M");
    let commands = ["write -P 1 0 192k", "write -P 2 1M 128k", "write -P 3 2560k 64k"];
    write_image(&image, "qcow2", &commands);
    image
}

#[test]
fn one_changed_l2_entry_is_found_while_the_image_is_attached() {
    let scratch = Scratch::new();
    let image = plain(&scratch);
    let device = attach([&image]);
    assert_verified([&device.name]);
    assert_verified(args![&image]);
    assert_verified(args![&device.path]);
    // Nobody but root does that, and past all locks.
    let (at, other) = (l2_entry(&image, 17), l2_entry(&image, 40));
    let (was, now) = (number(&image, at), number(&image, other));
    patch(&image, at, &now.to_be_bytes());
    assert_found("disk", "mapping", 17 * 65536, 65536);
    let said = imgdm(["verify", "disk"]);
    assert_eq!(said.code(), Some(1));
    for part in ["guest offset 0x110000, 65536 bytes", "the device has", "the image says"] {
        assert!(said.stdout.contains(part), "{said}");
    }
    patch(&image, at, &was.to_be_bytes());
    assert_verified(["disk"]);
    // Zeros in place of data, and data in place of zeros.
    patch(&image, at, &1u64.to_be_bytes());
    assert_found("disk", "content", 17 * 65536, 65536);
    patch(&image, at, &was.to_be_bytes());
    patch(&image, l2_entry(&image, 30), &was.to_be_bytes());
    assert_found("disk", "content", 30 * 65536, 65536);
    // No entry at all.
    patch(&image, l2_entry(&image, 30), &(was + 512).to_be_bytes());
    assert_found("disk", "image", 30 * 65536, 65536);
    patch(&image, l2_entry(&image, 30), &0u64.to_be_bytes());
    assert_verified(["disk"]);
    device.detach();
    imgdm(["verify", "disk"]).refused(66);
    imgdm(args!["verify", &image]).refused(66);
}

#[test]
fn a_harmless_change_of_holes_stays_clean() {
    let disk = Scratch::on_disk();
    let base = disk.path("base.raw");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&base).unwrap();
    file.set_len(8 * MIB).unwrap();
    file.write_all_at(&vec![0; 2 << 20], 0).unwrap();
    file.write_all_at(&vec![7; 1 << 20], 4 * MIB).unwrap();
    file.sync_all().unwrap();
    let options = ["-b", "base.raw", "-F", "raw"];
    let image = disk.create("qcow2", &options, "disk.qcow2", "");
    write_image(&image, "qcow2", &["write -P 1 6M 64k"]);
    for zero in ["auto", "dm", "loop"] {
        let device = attach(args!["--zero", zero, &image]);
        assert_verified(["disk"]);
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, punch, 0, 1 << 20).unwrap();
        assert_verified(["disk"]);
        fallocate(&file, FallocateFlags::empty(), 3 << 20, 512 << 10).unwrap();
        assert_verified(["disk"]);
        file.write_all_at(&vec![0; 1 << 20], 5 * MIB).unwrap();
        assert_verified(["disk"]);
        assert_verified(["--content", "disk"]);
        // And one that is none: by dm-zero or the zero loop it would not be seen.
        if zero != "auto" {
            file.write_all_at(b"!", 5 * MIB + 70_000).unwrap();
            assert_found("disk", "content", 5 * MIB + 69_632, 512);
            file.write_all_at(&[0], 5 * MIB + 70_000).unwrap();
        }
        device.detach();
        file.write_all_at(&vec![0; 1 << 20], 0).unwrap();
        fallocate(&file, punch, 3 << 20, 512 << 10).unwrap();
        fallocate(&file, punch, 5 << 20, 1 << 20).unwrap();
        file.sync_all().unwrap();
    }
}

/// Loads another table into a device.
#[track_caller]
fn reload(name: &str, options: &[&str], change: impl FnOnce(&str) -> String) {
    let table = tool("dmsetup", ["table", "--showkeys", name]);
    let changed = change(&table);
    assert_ne!(changed, table);
    let mut line = command("dmsetup", ["load"]);
    run(line.args(options).args([name, "--table", changed.trim()])).ok();
    tool("dmsetup", ["resume", "--noudevsync", name]);
}

#[test]
fn a_reloaded_table_is_found() {
    let scratch = Scratch::new();
    let image = plain(&scratch);
    let device = attach([&image]);
    let table = tool("dmsetup", ["table", "disk"]);
    let line = table.lines().find(|line| line.starts_with("2048 256 linear ")).unwrap();
    let (device_and_kind, offset) = line.rsplit_once(' ').unwrap();
    let offset: u64 = offset.parse().unwrap();
    let moved = format!("{device_and_kind} {}", offset - 128);
    reload("disk", &["--readonly"], |table| table.replace(line, &moved));
    assert_found("disk", "mapping", MIB, 128 * KIB);
    reload("disk", &["--readonly"], |table| table.replace(&moved, "2048 256 zero"));
    assert_found("disk", "content", MIB, 128 * KIB);
    reload("disk", &["--readonly"], |table| table.replace("2048 256 zero", "2048 256 error"));
    assert_found("disk", "mapping", MIB, 128 * KIB);
    // What was right, but as it should not be.
    reload("disk", &[], |table| table.replace("2048 256 error", line));
    assert_eq!(found(["disk"]), [("writable".to_owned(), None, None)]);
    reload("disk", &["--readonly"], |table| format!("{table}8192 8 zero\n"));
    assert_eq!(found(["disk"])[0].0, "size");
    device.detach();
}

#[test]
fn another_file_or_none_at_the_path_is_found_and_the_held_one_compared() {
    let scratch = Scratch::new();
    let options = ["-b", "base.raw", "-F", "raw"];
    // Ends inside a sector: through its loop device the last one is not to be seen.
    fs::write(scratch.path("base.raw"), vec![9; 300_000]).unwrap();
    let image = scratch.create("qcow2", &options, "disk.qcow2", "4M");
    write_image(&image, "qcow2", &["write -P 1 0 64k", "write -P 2 1M 64k"]);
    let device = attach([&image]);
    let fresh = scratch.path("fresh");
    fs::copy(&image, &fresh).unwrap();
    fs::rename(&fresh, &image).unwrap();
    assert_eq!(found(["disk"]), [("file".to_owned(), None, None)]);
    fs::remove_file(&image).unwrap();
    fs::remove_file(scratch.path("base.raw")).unwrap();
    let file = || ("file".to_owned(), None, None);
    assert_eq!(found(["disk"]), [file(), file()]);
    let said = imgdm(["verify", "--content", "disk"]);
    assert_eq!(said.code(), Some(1), "{said}");
    assert!(said.stdout.contains("still holds it") && said.stdout.contains("512 bytes"), "{said}");
    let table = tool("dmsetup", ["table", "disk"]);
    assert!(table.contains(" linear "), "{table}");
    reload("disk", &["--readonly"], |table| {
        let line = table.lines().find(|line| line.starts_with("2048 128 linear ")).unwrap();
        table.replace(line, "2048 128 zero")
    });
    assert_eq!(found(["disk"]), [file(), file(), ("content".to_owned(), Some(MIB), Some(65536))]);
    device.detach();
}

#[test]
fn a_file_that_was_cut_off_is_found() {
    let scratch = Scratch::new();
    let image = plain(&scratch);
    let device = attach([&image]);
    let length = fs::metadata(&image).unwrap().len();
    OpenOptions::new().write(true).open(&image).unwrap().set_len(length - 65536).unwrap();
    let past = found(["disk"]);
    assert_eq!(past[0].0, "past-end-of-file", "{past:?}");
    device.detach();
}

#[test]
fn a_flipped_byte_of_a_kept_file_is_found() {
    let scratch = Scratch::on_disk();
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let cache = scratch.path("cache");
    let device = attach(args!["--compressed=cache", "--cache-dir", &cache, &image]);
    let report = assert_verified(["disk"]);
    assert_eq!(report["bytes_read"], MIB, "all of it was inflated");
    assert_verified(["--content", "disk"]);
    let kept = fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let before = fs::read(&kept).unwrap()[70_000];
    patch(&kept, 70_000, &[before ^ 1]);
    for options in [&["disk"][..], &["--content", "disk"]] {
        let wanted = [("content".to_owned(), Some(69_632), Some(512))];
        assert_eq!(found(options), wanted, "{options:?}");
    }
    patch(&kept, 70_000, &[before]);
    assert_verified(["disk"]);
    // An entry of another compressed cluster.
    let entry = number(&image, l2_entry(&image, 3));
    patch(&image, l2_entry(&image, 5), &entry.to_be_bytes());
    let [(kind, offset, _)] = &found(["disk"])[..] else { panic!("one finding") };
    assert_eq!((kind.as_str(), *offset), ("content", Some(5 * 65536)));
    device.detach();
}

#[test]
fn images_of_all_sorts_are_the_same_by_whichever_options() {
    let scratch = Scratch::new();
    let disk = Scratch::on_disk();
    let check = |arguments: Vec<OsString>| {
        let device = attach(arguments);
        assert_verified([&device.name]);
        device.detach();
    };
    // A snapshot, and a deleted one.
    let image = plain(&scratch);
    qemu_img(args!["snapshot", "-c", "before", &image]).ok();
    write_image(&image, "qcow2", &["write -P 9 0 64k", "write -P 8 3M 64k"]);
    let device = attach(args!["-l", "before", &image]);
    assert_verified([&device.name]);
    assert_verified(args!["--content", &image]);
    device.detach();
    // Only past its locks can a snapshot go while it is attached.
    let device = attach(args!["-l", "before", &image]);
    // Its ID comes behind what else the entry holds.
    let table = number(&image, 64);
    let extra = number(&image, table + 32) & 0xffff_ffff;
    patch(&image, table + 40 + extra, b"X");
    let snapshot = found([&device.name]);
    assert_eq!(snapshot[0].0, "snapshot", "{snapshot:?}");
    device.detach();

    let raw = disk.path("holes.raw");
    let file = File::create(&raw).unwrap();
    for piece in 0..40 {
        file.write_all_at(&[7; 5000], piece * 100_000).unwrap();
    }
    for zero in ["--zero=auto", "--zero=dm", "--zero=loop"] {
        check(args!["-f", "raw", zero, "--no-fiemap", &raw].into());
        check(args!["-f", "raw", zero, &raw].into());
    }
    // A whole guest disk that looks like an image.
    check(args!["-f", "raw", &image].into());
    // An overlay without a byte of its own lies over inner devices.
    let options = ["-b", "disk.qcow2", "-F", "qcow2"];
    let fresh = scratch.create("qcow2", &options, "fresh.qcow2", "");
    check(args![&fresh].into());
    // By a symbolic link: the names beside it lead to the backing file, those beside what
    // it leads to do not.
    fs::create_dir(scratch.path("elsewhere")).unwrap();
    fs::rename(&fresh, scratch.path("elsewhere/fresh.qcow2")).unwrap();
    std::os::unix::fs::symlink("elsewhere/fresh.qcow2", &fresh).unwrap();
    check(args!["--name", "linked", &fresh].into());
    // On a block device, with a loop between or not.
    let block = block_device();
    qemu_img(args!["create", "-q", "-f", "qcow2", &block, "4M"]).ok();
    write_image(&block, "qcow2", &["write -P 5 1M 300k"]);
    for options in [&[][..], &["--direct-block"]] {
        let words = options.iter().map(OsString::from).chain([block.clone().into()]);
        let device = attach(words);
        assert_verified([&device.name]);
        assert_verified(args!["--content", &block]);
        let at = l2_entry(&block, 16);
        let was = number(&block, at);
        patch(&block, at, &(was + 65536).to_be_bytes());
        let mapping = found([&device.name]);
        assert_eq!(mapping[0], ("mapping".to_owned(), Some(MIB), Some(65536)), "{mapping:?}");
        patch(&block, at, &was.to_be_bytes());
        device.detach();
    }
}

#[test]
fn damage_that_was_passed_over_is_no_difference() {
    let scratch = Scratch::new();
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let entry = number(&image, l2_entry(&image, 4)) & ((1 << 54) - 1);
    patch(&image, entry, &[0xff; 64]);
    for on_error in ["zero", "error-target"] {
        let option = format!("--on-error={on_error}");
        let device = attach(args![&option, &image]);
        assert_verified(["disk"]);
        assert_verified(["--content", "disk"]);
        device.detach();
    }
}

#[test]
fn encrypted_layers_are_verified_without_a_key_and_their_content_with_it() {
    let scratch = Scratch::new();
    let luks = Encrypted::luks(&scratch, "luks.qcow2", "");
    let options = "encrypt.format=aes";
    let aes = Encrypted::create(&scratch, "qcow2", "aes.qcow2", options, &[], "secret");
    for image in [&luks, &aes] {
        image.write(PATTERN);
        let key = image.key_file(&scratch);
        let device = attach(args!["--key-file", &key, &image.path]);
        assert_verified([&device.name]);
        assert_verified(args!["--content", "--key-file", &key, &device.name]);
        // A key for nothing, none, and a wrong one.
        let with_key = |key: &Path| verify(args!["--content", "--key-file", key, &device.name]);
        verify(args!["--key-file", &key, &device.name]).refused(64);
        verify(args!["--content", &device.name]).refused(67);
        let wrong = scratch.path("wrong");
        fs::write(&wrong, "wrong").unwrap();
        let ran = with_key(&wrong);
        if image.path == luks.path {
            ran.refused(67);
        } else {
            // Nobody can tell but by what comes out.
            assert_eq!(ran.code(), Some(1), "{ran}");
            assert!(ran.stdout.contains("\"content\""), "{ran}");
        }
        let (at, other) =
            (l2_entry(&image.path, 4), number(&image.path, l2_entry(&image.path, 29)));
        let was = number(&image.path, at);
        assert!(was != 0 && other != 0);
        patch(&image.path, at, &other.to_be_bytes());
        assert_found(&device.name, "mapping", 4 * 65536, 65536);
        patch(&image.path, at, &was.to_be_bytes());
        assert_verified([&device.name]);
        device.detach();
    }
}

/// The most memory, in KiB, that verifying takes.
#[track_caller]
fn peak(name: &str) -> u64 {
    let ran = run(command("busybox", ["time", "-v"]).arg(imgdm_path()).args(["verify", name]));
    assert_eq!(ran.code(), Some(0), "{ran}");
    let line = ran.stderr.lines().find(|line| line.contains("Maximum resident")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_hundred_thousand_segments_take_little_memory() {
    const SEGMENTS: u64 = 100_000;
    let scratch = Scratch::new();
    let small = plain(&scratch);
    let device = attach([&small]);
    let before = peak("disk");
    device.detach();
    // Clusters of 4 KiB in reverse order, so that no two follow on each other. The file has
    // no data: all of it but the tables is a hole.
    let size = format!("{}k", SEGMENTS * 4);
    let image = scratch.create("qcow2", &["-o", "cluster_size=4k"], "large.qcow2", &size);
    let l1 = number(&image, 40);
    let tables = SEGMENTS.div_ceil(512);
    let first = fs::metadata(&image).unwrap().len().next_multiple_of(4096);
    let data = first + tables * 4096;
    let mut entries = Vec::new();
    for index in 0..tables {
        patch(&image, l1 + 8 * index, &(first + index * 4096).to_be_bytes());
        for entry in index * 512..((index + 1) * 512).min(SEGMENTS) {
            entries.extend((data + (SEGMENTS - 1 - entry) * 4096).to_be_bytes());
        }
    }
    patch(&image, first, &entries);
    OpenOptions::new().write(true).open(&image).unwrap().set_len(data + SEGMENTS * 4096).unwrap();
    let device = attach([&image]);
    let count = tool("dmsetup", ["table", "large"]).lines().count();
    assert_eq!(count as u64, SEGMENTS);
    let after = peak("large");
    println!("peak: {before} KiB, with {SEGMENTS} segments {after} KiB");
    // The kernel's own answer, and a batch of the image's windows: here all that there are,
    // and no larger image has more of them in memory.
    assert!(after < before + 64 * 1024, "{before} KiB, {after} KiB");
    patch(&image, first + 70_000 * 8, &data.to_be_bytes());
    assert_found("large", "mapping", 70_000 * 4096, 4096);
    device.detach();
}

#[test]
fn what_a_mounted_file_system_keeps_in_the_page_cache_is_not_the_devices_content() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.raw");
    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    tool("mkfs.ext4", args!["-q", "-F", &image]);
    let device = attach(args!["-f", "raw", &image]);
    let place = scratch.path("mounted");
    fs::create_dir(&place).unwrap();
    // Without noload: ext4 makes itself a view of its journal's superblock.
    tool("mount", args!["-t", "ext4", "-o", "ro", &device.path, &place]);
    assert_ne!(device.sha256(), sha256(&image), "the page cache has nothing of its own");
    assert_verified(["--content", "disk"]);
    tool("umount", [&place]);
    device.detach();
}
