//! The device reads as QEMU reads the image, whatever the image is made of.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use crate::args;
use crate::guest::*;
use crate::verify::assert_verified;

/// Attaches with these options, compares with what was wanted, has it verified, detaches.
#[track_caller]
pub(crate) fn assert_attached_is(scratch: &Scratch, image: &Path, options: &[&str], wanted: &[u8]) {
    let words = options.iter().map(OsString::from).chain([image.into()]);
    let device = attach(words);
    let what = format!("{} attached with {options:?}", image.display());
    assert_same(&what, &device.bytes(), wanted);
    assert_random_reads(&device.path, wanted, wanted.len() as u64 | 1);
    if fs::metadata(image).unwrap().len() < 512 && fs::metadata(image).unwrap().is_file() {
        // No loop device can show it, so nothing tells where it is.
        imgdm(["verify", &device.name]).refused(66);
    } else {
        assert_verified(args!["--content", &device.name]);
    }
    assert_no_process(scratch.directory());
    device.detach();
    assert_nothing_left();
}

/// The same, against what QEMU reads now.
#[track_caller]
pub(crate) fn assert_attached_as_qemu(scratch: &Scratch, image: &Path) {
    let wanted = qemu_content(scratch, image, &[]);
    assert!(wanted.iter().any(|&byte| byte != 0), "the test's own image is empty");
    assert_attached_is(scratch, image, &[], &wanted);
}

/// Some data everywhere, in pieces that are not the cluster's.
const PATTERN: &[&str] = &[
    "write -P 1 0 5k",
    "write -P 2 300k 70k",
    "write -P 3 17k 512",
    "write -P 4 900k 100k",
    "write -P 5 64k 64k",
    "write -P 6 1020k 4k",
];

#[test]
fn a_plain_qcow2_reads_as_qemu_reads_it_and_needs_no_process() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "4M");
    write_image(&image, "qcow2", &["write -P 3 64k 64k", "write -P 4 3M 200k"]);
    let raw = scratch.path("oracle.raw");
    qemu_img(args!["convert", "-O", "raw", &image, &raw]).ok();

    let device = attach([&image]);
    assert_eq!(device.path, Path::new("/dev/mapper/disk"));
    assert_eq!(device.sha256(), sha256(&raw));
    assert_random_reads(&device.path, &fs::read(&raw).unwrap(), 7);
    assert_eq!(tool("blockdev", args!["--getsize64", &device.path]).trim(), "4194304");
    assert_eq!(tool("blockdev", args!["--getro", &device.path]).trim(), "1");
    assert_no_process(scratch.directory());
    let below: Vec<_> = loops().into_iter().map(|(name, ..)| name).collect();
    assert!(!below.is_empty());
    for name in below {
        assert_eq!(tool("blockdev", ["--getro", &format!("/dev/{name}")]).trim(), "1", "{name}");
    }
    device.detach();
    assert_nothing_left();
}

#[test]
fn every_cluster_size_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    for shift in 9..=21 {
        let option = format!("cluster_size={}", 1u64 << shift);
        let options = ["-o", &option];
        let image = scratch.create("qcow2", &options, &format!("c{shift}.qcow2"), "1M");
        write_image(&image, "qcow2", PATTERN);
        assert_attached_as_qemu(&scratch, &image);
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn version_2_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &["-o", "compat=0.10"], "v2.qcow2", "1M");
    write_image(&image, "qcow2", PATTERN);
    assert_attached_as_qemu(&scratch, &image);
}

#[test]
fn a_version_2_overlay_keeps_to_its_declared_backing_format() {
    let scratch = Scratch::new();
    let base = scratch.path("base.raw");
    // A raw file that looks like a qcow2: were it probed, it would be taken for one.
    let mut bytes = Random(5).bytes(1 << 20);
    bytes[..4].copy_from_slice(b"QFI\xfb");
    fs::write(&base, &bytes).unwrap();
    let options = ["-o", "compat=0.10", "-b", "base.raw", "-F", "raw"];
    let image = scratch.create("qcow2", &options, "v2.qcow2", "");
    write_image(&image, "qcow2", &["write -P 9 128k 64k"]);
    assert_attached_as_qemu(&scratch, &image);
}

#[test]
fn subclusters_read_as_qemu_reads_them() {
    let scratch = Scratch::new();
    let base = scratch.create("raw", &[], "base.raw", "1M");
    write_image(&base, "raw", &["write -P 7 0 1M"]);
    let options = ["-o", "extended_l2=on,cluster_size=64k", "-b", "base.raw", "-F", "raw"];
    let image = scratch.create("qcow2", &options, "disk.qcow2", "");
    let commands = [
        "write -P 1 2k 2k",
        "write -P 2 10k 6k",
        "write -z 14k 2k",
        "write -z 200k 2k",
        "write -P 3 300k 100k",
        "write -z -u 320k 64k",
        "discard 330k 20k",
    ];
    write_image(&image, "qcow2", &commands);
    assert_attached_as_qemu(&scratch, &image);
}

#[test]
fn an_external_data_file_reads_as_qemu_reads_it_raw_or_not() {
    let scratch = Scratch::new();
    for (name, raw) in [("plain", "off"), ("raw", "on")] {
        let option = format!("data_file={name}.data,data_file_raw={raw}");
        let image = scratch.create("qcow2", &["-o", &option], &format!("{name}.qcow2"), "4M");
        let commands =
            ["write -P 1 0 100k", "write -P 2 2M 300k", "write -z 2M 64k", "write -P 3 3M 4k"];
        write_qcow2(&image, &commands);
        let wanted = qemu_content_here(&scratch, &image);
        assert_attached_is(&scratch, &image, &[], &wanted);
    }
}

/// QEMU looks for a data file in its working directory.
#[track_caller]
fn write_qcow2(image: &Path, commands: &[&str]) {
    let mut line = command("qemu-io", ["-f", "qcow2"]);
    for each in commands {
        line.args(["-c", each]);
    }
    run(line.arg(image).current_dir(image.parent().unwrap())).ok();
}

#[track_caller]
fn qemu_content_here(scratch: &Scratch, image: &Path) -> Vec<u8> {
    let raw = scratch.path("oracle.raw");
    let mut line = command("qemu-img", args!["convert", "-O", "raw", image, &raw]);
    run(line.current_dir(scratch.directory())).ok();
    fs::read(raw).unwrap()
}

#[test]
fn zero_clusters_plain_and_allocated_read_as_zeros_over_a_backing_file() {
    let scratch = Scratch::new();
    let base = scratch.create("raw", &[], "base.raw", "2M");
    write_image(&base, "raw", &["write -P 7 0 2M"]);
    let image = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "disk.qcow2", "");
    let commands = [
        "write -P 1 0 512k",
        "write -z 64k 64k", // allocated
        "write -z -u 256k 64k",
        "write -z 1M 128k", // plain
        "write -z -u 1536k 64k",
    ];
    write_image(&image, "qcow2", &commands);
    let map = qemu_img(args!["map", "--output=json", &image]).ok();
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let zeros = map.iter().filter(|row| row["zero"] == true);
    assert_eq!(zeros.clone().filter(|row| row.get("offset").is_some()).count(), 1, "{map:?}");
    assert!(zeros.count() >= 3, "{map:?}");
    assert_attached_as_qemu(&scratch, &image);
}

/// raw <- qcow <- qcow2 <- qcow2 with extended L2 entries, `depth` layers.
fn mixed_chain(scratch: &Scratch, depth: usize) -> PathBuf {
    let layers = [
        ("raw", "base.raw", &[][..]),
        ("qcow", "one.qcow", &["-b", "base.raw", "-F", "raw"][..]),
        ("qcow2", "two.qcow2", &["-b", "one.qcow", "-F", "qcow"]),
        (
            "qcow2",
            "three.qcow2",
            &["-o", "extended_l2=on,cluster_size=32k", "-b", "two.qcow2", "-F", "qcow2"],
        ),
        ("qcow2", "four.qcow2", &["-o", "cluster_size=4k", "-b", "three.qcow2", "-F", "qcow2"]),
    ];
    let mut top = PathBuf::new();
    for (at, (format, name, options)) in layers[..depth].iter().enumerate() {
        let size = if at == 0 { "2M" } else { "" };
        top = scratch.create(format, options, name, size);
        let start = at * 150;
        let commands = [
            format!("write -P {} {}k 700k", at + 1, start),
            format!("write -P {} {}k 3k", at + 11, 1200 + 6 * at),
        ];
        write_image(&top, format, &[&commands[0], &commands[1]]);
        if *format == "qcow2" {
            write_image(&top, format, &[&format!("write -z {}k 70k", start + 200)]);
        }
    }
    top
}

#[test]
fn mixed_chains_three_and_five_deep_read_as_qemu_reads_them() {
    for depth in [3, 5] {
        let scratch = Scratch::new();
        let image = mixed_chain(&scratch, depth);
        let wanted = qemu_content(&scratch, &image, &[]);
        // A qcow image can't declare its backing file's format.
        let said = imgdm(args!["attach", &image]).refused(65);
        assert!(said.contains("--probe-backing"), "{said}");
        assert_attached_is(&scratch, &image, &["--probe-backing"], &wanted);
    }
}

#[test]
fn a_disk_larger_or_smaller_than_its_backing_file_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    let base = scratch.create("qcow2", &[], "base.qcow2", "1030k");
    write_image(&base, "qcow2", &["write -P 7 0 1030k"]);
    for size in ["2M", "600k"] {
        let options = ["-b", "base.qcow2", "-F", "qcow2"];
        let image = scratch.create("qcow2", &options, &format!("disk{size}.qcow2"), size);
        write_image(&image, "qcow2", &["write -P 1 100k 20k"]);
        assert_attached_as_qemu(&scratch, &image);
    }
}

#[test]
fn a_size_that_is_no_multiple_of_a_sector_is_cut_as_qemu_cuts_it() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "odd.qcow2", "1M");
    write_image(&image, "qcow2", PATTERN);
    // The size field; qemu-img itself rounds.
    patch(&image, 24, &999_999u64.to_be_bytes());
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_eq!(wanted.len(), 999_936);
    assert_attached_is(&scratch, &image, &[], &wanted);
}

#[test]
fn snapshots_stand_beside_the_active_layer_and_each_other() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 200k"]);
    qemu_img(args!["snapshot", "-c", "first", &image]).ok();
    write_image(&image, "qcow2", &["write -P 2 100k 200k"]);
    qemu_img(args!["snapshot", "-c", "the second", &image]).ok();
    qemu_img(args!["resize", "-q", &image, "2M"]).ok();
    write_image(&image, "qcow2", &["write -P 3 1M 64k", "write -z 0 64k"]);

    let active = qemu_content(&scratch, &image, &[]);
    let applied = |name: &str| {
        let copy = scratch.path("copy.qcow2");
        fs::copy(&image, &copy).unwrap();
        qemu_img(args!["snapshot", "-a", name, &copy]).ok();
        qemu_content(&scratch, &copy, &[])
    };
    let (first, second) = (applied("first"), applied("the second"));
    assert!(active.len() == 2 << 20 && first.len() == 1 << 20 && first != second);

    let devices = [
        (attach([&image]), "disk", &active),
        (attach(args!["-l", "first", &image]), "disk@first", &first),
        (attach(args!["-l", "2", &image]), "disk@the_second", &second),
    ];
    for (device, name, wanted) in &devices {
        assert_eq!(device.name, *name);
        assert_same(name, &device.bytes(), wanted);
    }
    assert_no_process(scratch.directory());
    let listed = listed();
    let snapshots: Vec<_> = listed.iter().map(|each| each["snapshot"].as_str()).collect();
    assert_eq!(snapshots, [None, Some("first"), Some("the second")], "{listed:?}");
    // The middle one goes, the others stay and stay readable.
    devices[1].0.detach();
    for (device, name, wanted) in [&devices[0], &devices[2]] {
        assert_same(name, &device.bytes(), wanted);
        device.detach();
    }
    assert_nothing_left();
}

#[test]
fn bitmaps_lazy_refcounts_and_the_dirty_bit_change_nothing() {
    let scratch = Scratch::new();
    let options = ["-o", "lazy_refcounts=on"];
    let image = scratch.create("qcow2", &options, "disk.qcow2", "1M");
    qemu_img(args!["bitmap", "--add", &image, "marks"]).ok();
    write_image(&image, "qcow2", PATTERN);
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_attached_is(&scratch, &image, &[], &wanted);
    // Incompatible feature bit 0.
    patch(&image, 79, &[1]);
    let ran = imgdm(args!["attach", &image]);
    assert!(ran.stderr.contains("dirty"), "{ran}");
    assert_eq!(ran.ok(), "/dev/mapper/disk\n");
    assert_same("dirty", &fs::read("/dev/mapper/disk").unwrap(), &wanted);
    imgdm(["detach", "disk"]).ok();
}

#[test]
fn a_raw_file_with_holes_reads_as_it_is_with_each_way_to_serve_zeros() {
    let scratch = Scratch::new();
    let image = scratch.create("raw", &[], "disk.raw", "40M");
    let commands =
        ["write -P 1 0 64k", "write -P 2 96k 32k", "write -P 3 200k 4k", "write -P 4 38M 1M"];
    write_image(&image, "raw", &commands);
    let wanted = fs::read(&image).unwrap();
    for (mode, zero_targets, zero_loop) in
        [("auto", true, false), ("dm", true, false), ("loop", false, true)]
    {
        let device = attach(args!["-f", "raw", format!("--zero={mode}"), &image]);
        assert_same(mode, &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 3);
        let table = tool("dmsetup", ["table", &device.name]);
        let zeros = table.lines().filter(|line| line.ends_with("zero ")).count();
        assert_eq!(zeros > 0, zero_targets, "{mode}: {table}");
        let loops = loops().into_iter().filter(|(_, _, ours)| *ours).count();
        assert_eq!(loops > 1, zero_loop, "{mode}: {table}");
        device.detach();
        assert_nothing_left();
    }
}

#[test]
fn zeros_between_data_read_as_zeros_in_each_mode_over_a_backing_file() {
    let scratch = Scratch::new();
    let base = scratch.create("raw", &[], "base.raw", "4M");
    write_image(&base, "raw", &["write -P 7 0 4M"]);
    let image = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "disk.qcow2", "");
    write_image(&image, "qcow2", &["write -z 64k 64k", "write -z 256k 128k", "write -z 1M 2M"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    for mode in ["--zero=auto", "--zero=dm", "--zero=loop"] {
        assert_attached_is(&scratch, &image, &[mode], &wanted);
    }
}

#[test]
fn direct_io_goes_around_the_page_cache_where_the_file_system_can() {
    let scratch = Scratch::on_disk();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "2M");
    write_image(&image, "qcow2", PATTERN);
    let wanted = qemu_content(&scratch, &image, &[]);
    for (mode, direct) in [("on", "1"), ("off", "0"), ("auto", "1")] {
        let device = attach(args![format!("--direct-io={mode}"), &image]);
        let file = loops().into_iter().find(|(_, file, _)| Path::new(file) == image);
        let (name, ..) = file.expect("no loop over the image");
        let dio = fs::read_to_string(format!("/sys/block/{name}/loop/dio")).unwrap();
        assert_eq!(dio.trim(), direct, "--direct-io={mode}");
        assert_same(mode, &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 11);
        device.detach();
        assert_nothing_left();
    }
}

#[test]
fn direct_io_that_the_file_system_cannot_is_refused_where_it_was_asked_for_and_else_done_without() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", PATTERN);
    let said = imgdm(args!["attach", "--direct-io=on", &image]).refused(69);
    assert!(said.contains("direct"), "{said}");
    assert_nothing_left();
    let device = attach(args![&image]);
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_same("as the file system can", &device.bytes(), &wanted);
    device.detach();
    assert_nothing_left();
}

#[test]
fn an_image_on_a_block_device_reads_as_qemu_reads_it_with_a_loop_between_or_not() {
    let scratch = Scratch::new();
    let block = block_device();
    qemu_img(args!["create", "-q", "-f", "qcow2", &block, "4M"]).ok();
    write_image(&block, "qcow2", PATTERN);
    let wanted = qemu_content(&scratch, &block, &["-f", "qcow2"]);
    for options in [&[][..], &["--direct-block"], &["--direct-io=on"]] {
        let words = options.iter().map(OsString::from).chain([block.clone().into()]);
        let device = attach(words);
        assert_eq!(device.name, block.file_name().unwrap().to_str().unwrap());
        assert_same(&format!("{options:?}"), &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 13);
        let over_block = loops().into_iter().any(|(_, file, _)| Path::new(&file) == block);
        assert_eq!(over_block, options != ["--direct-block"]);
        assert_eq!(tool("blockdev", args!["--getro", &device.path]).trim(), "1");
        device.detach();
        assert_nothing_left();
    }
}

#[test]
fn a_block_device_that_the_host_has_mounted_is_warned_of() {
    let scratch = Scratch::new();
    let block = block_device();
    tool("mkfs.ext4", args!["-q", "-F", &block]);
    let place = scratch.path("place");
    std::fs::create_dir(&place).unwrap();
    tool("mount", args![&block, &place]);
    let ran = imgdm(args!["attach", "-f", "raw", "--name", "mounted", &block]);
    tool("umount", [&place]);
    assert!(ran.stderr.contains("in use (the mount "), "{ran}");
    imgdm(["detach", "mounted"]).ok();
    let ran = imgdm(args!["attach", "-f", "raw", "--name", "mounted", &block]);
    assert!(!ran.stderr.contains("in use"), "{ran}");
    imgdm(["detach", "mounted"]).ok();
    assert_nothing_left();
}

#[test]
fn empty_and_all_zero_images_read_as_zeros() {
    let scratch = Scratch::new();
    let empty = scratch.create("qcow2", &[], "empty.qcow2", "3M");
    assert_attached_is(&scratch, &empty, &[], &vec![0; 3 << 20]);
    let hole = scratch.create("raw", &[], "hole.raw", "3M");
    assert_attached_is(&scratch, &hole, &["-f", "raw"], &vec![0; 3 << 20]);
}
