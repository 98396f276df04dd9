//! Files and disks that end inside a sector or a cluster.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

use crate::args;
use crate::content::assert_attached_is;
use crate::guest::*;

/// What QEMU reads, made up to whole sectors with zeros.
#[track_caller]
fn rounded_up(scratch: &Scratch, image: &Path, options: &[&str]) -> Vec<u8> {
    let mut wanted = qemu_content(scratch, image, options);
    wanted.resize(wanted.len().next_multiple_of(512), 0);
    wanted
}

/// Cuts a file off.
fn cut(file: &Path, length: u64) {
    File::options().write(true).open(file).unwrap().set_len(length).unwrap();
}

/// No byte of it is zero, so that none can be taken for one past the end.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut bytes = Random(seed).bytes(length);
    bytes.iter_mut().for_each(|byte| *byte |= 1);
    bytes
}

#[test]
fn raw_files_with_tails_of_all_kinds_of_lengths_end_in_zeros() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.raw");
    let whole = bytes(2048, 3);
    fs::write(&image, &whole).unwrap();
    // A tenth of a second each, so here a sample with the ones beside whole sectors. A raw
    // file is the lowest of its chain, so there is only one at a time: all 511 are for the
    // oracle tier, which needs no kernel.
    for tail in (1..512).filter(|tail| tail % 15 == 8 || [1, 2, 510, 511].contains(tail)) {
        let length = 1536 + tail;
        fs::write(&image, &whole[..length]).unwrap();
        let mut wanted = whole[..length].to_owned();
        wanted.resize(2048, 0);
        let device = attach(args!["-f", "raw", &image]);
        assert_same(&format!("a tail of {tail}"), &device.bytes(), &wanted);
        device.detach();
    }
    // QEMU rounds up as well, and its zeros are the same.
    assert_eq!(rounded_up(&scratch, &image, &["-f", "raw"]).len(), 2048);
    assert_nothing_left();
}

/// A chain of 512 images over each other, of which each but the lowest has one cluster of 4
/// KiB, and ends in it: that of depth N has a tail of 511 - N bytes. One image is QEMU's;
/// the others are copies with other names, places and contents.
fn chain_of_all_tails(scratch: &Scratch) -> std::path::PathBuf {
    let options = ["-o", "cluster_size=4k"];
    scratch.create("qcow2", &options, "000.qcow2", "2M");
    let overlay = ["-o", "cluster_size=4k", "-b", "000.qcow2", "-F", "qcow2"];
    let image = scratch.create("qcow2", &overlay, "001.qcow2", "");
    write_image(&image, "qcow2", &["write -P 1 0 4k"]);
    let template = fs::read(&image).unwrap();
    let number = |at: usize| {
        let number = u64::from_be_bytes(template[at..at + 8].try_into().unwrap());
        usize::try_from(number & 0x00ff_ffff_ffff_ffff).unwrap()
    };
    let l2 = number(number(40));
    let (name, data) = (number(8), number(l2));
    assert_eq!(template.len(), data + 4096, "the data come last");
    for tail in 1..512 {
        let mut bytes = template.clone();
        bytes[name..name + 3].copy_from_slice(format!("{:03}", tail - 1).as_bytes());
        bytes[l2..l2 + 8].fill(0);
        bytes[l2 + 8 * tail..][..8].copy_from_slice(&template[l2..l2 + 8]);
        bytes.truncate(data + 512 * (tail % 8) + tail);
        bytes[data..].fill(u8::try_from(tail % 255).unwrap() + 1);
        fs::write(scratch.path(&format!("{tail:03}.qcow2")), bytes).unwrap();
    }
    scratch.path("511.qcow2")
}

#[test]
fn images_cut_off_with_tails_of_every_length_read_as_qemu_reads_them() {
    let scratch = Scratch::new();
    let top = chain_of_all_tails(&scratch);
    let wanted = qemu_content(&scratch, &top, &[]);
    for tail in 1..512 {
        let cluster = &wanted[tail * 4096..][..4096];
        let end = 512 * (tail % 8) + tail;
        assert!(cluster[..end].iter().all(|&byte| byte != 0), "{tail}");
        assert!(cluster[end..].iter().all(|&byte| byte == 0), "{tail}");
    }
    let device = attach([&top]);
    assert_same("all tails", &device.bytes(), &wanted);
    device.detach();
    assert_nothing_left();
}

#[test]
fn a_raw_file_of_less_than_a_sector_or_that_much_more_than_a_page_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    let disk = Scratch::on_disk();
    for directory in [scratch.directory(), disk.directory()] {
        let image = directory.join("disk.raw");
        for length in [1, 511, 4097, 1_048_000] {
            fs::write(&image, bytes(length, 5)).unwrap();
            let wanted = rounded_up(&scratch, &image, &["-f", "raw"]);
            assert_attached_is(&scratch, &image, &["-f", "raw"], &wanted);
        }
    }
}

#[test]
fn a_qcow2_cut_off_inside_its_last_cluster_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    for (cluster, cuts) in [("4k", [1, 511, 3000]), ("64k", [100, 512, 65_535])] {
        let options = ["-o", &format!("cluster_size={cluster}")];
        let image = scratch.create("qcow2", &options, "disk.qcow2", "1M");
        // Data come last: of the second cluster, whose first byte stays.
        write_image(&image, "qcow2", &["write -P 1 0 64k", "write -P 2 512k 64k"]);
        let length = fs::metadata(&image).unwrap().len();
        for by in cuts {
            cut(&image, length - by);
            let wanted = rounded_up(&scratch, &image, &[]);
            assert_eq!((wanted[0], wanted[512 << 10]), (1, 2));
            assert_attached_is(&scratch, &image, &[], &wanted);
        }
    }
}

#[test]
fn a_backing_file_of_an_odd_size_reads_as_qemu_reads_it_below_a_larger_or_smaller_overlay() {
    let scratch = Scratch::new();
    for (base_length, size) in [(300_100, "1M"), (65_536 + 511, "64k"), (1_000_001, "700k")] {
        fs::write(scratch.path("base.raw"), bytes(base_length, 7)).unwrap();
        let options = ["-b", "base.raw", "-F", "raw"];
        let image = scratch.create("qcow2", &options, "disk.qcow2", size);
        let wanted = qemu_content(&scratch, &image, &[]);
        assert_attached_is(&scratch, &image, &[], &wanted);
        write_image(&image, "qcow2", &["write -P 1 0 20k"]);
        let wanted = qemu_content(&scratch, &image, &[]);
        assert_attached_is(&scratch, &image, &[], &wanted);
    }
}

#[test]
fn an_odd_backing_file_shows_through_the_subclusters_of_its_last_sector() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base.raw"), bytes(300_100, 7)).unwrap();
    let options = ["-o", "extended_l2=on,cluster_size=64k", "-b", "base.raw", "-F", "raw"];
    let image = scratch.create("qcow2", &options, "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 288k 2k", "write -P 2 296k 6k"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_attached_is(&scratch, &image, &[], &wanted);
    write_image(&image, "qcow2", &["write -P 3 294k 2k", "write -c -P 4 512k 64k"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    assert_attached_is(&scratch, &image, &[], &wanted);
}

#[test]
fn an_external_data_file_of_an_odd_length_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    for raw in ["off", "on"] {
        let data = scratch.path(&format!("{raw}.data"));
        let option = format!("data_file={},data_file_raw={raw}", data.display());
        let image = scratch.create("qcow2", &["-o", &option], &format!("{raw}.qcow2"), "1M");
        write_image(&image, "qcow2", &["write -P 1 0 100k", "write -P 2 960k 64k"]);
        let length = fs::metadata(&data).unwrap().len();
        for by in [1, 511, 513, 5000] {
            cut(&data, length - by);
            let wanted = rounded_up(&scratch, &image, &[]);
            assert_attached_is(&scratch, &image, &[], &wanted);
        }
    }
}

#[test]
fn a_qcow2_whose_size_is_no_multiple_of_a_sector_is_cut_down_with_what_lies_there() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &["-o", "cluster_size=4k"], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 600k", "write -c -P 2 600k 424k"]);
    for size in [1_048_575u64, 1_048_065, 614_400 + 1, 300_100] {
        patch(&image, 24, &size.to_be_bytes());
        let wanted = qemu_content(&scratch, &image, &[]);
        assert_eq!(wanted.len() as u64, size / 512 * 512);
        assert_attached_is(&scratch, &image, &[], &wanted);
    }
}

#[test]
fn a_qcow_whose_size_is_no_multiple_of_a_sector_reads_as_qemu_reads_it() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow", &[], "disk.qcow", "1M");
    write_image(&image, "qcow", &["write -P 1 0 600k", "write -P 2 900k 124k"]);
    for size in [1_048_575u64, 1_048_065, 300_100] {
        patch(&image, 24, &size.to_be_bytes());
        let wanted = qemu_content(&scratch, &image, &[]);
        assert_attached_is(&scratch, &image, &[], &wanted);
    }
}

#[test]
fn the_tails_of_several_layers_stand_beside_compressed_clusters() {
    let scratch = Scratch::new();
    fs::write(scratch.path("base.raw"), bytes(700_001, 9)).unwrap();
    let options = ["-b", "base.raw", "-F", "raw"];
    let middle = scratch.create("qcow2", &options, "middle.qcow2", "1M");
    write_image(&middle, "qcow2", &["write -c -P 3 64k 64k", "write -P 4 256k 64k"]);
    cut(&middle, fs::metadata(&middle).unwrap().len() - 33);
    let options = ["-b", "middle.qcow2", "-F", "qcow2"];
    let top = scratch.create("qcow2", &options, "top.qcow2", "");
    write_image(&top, "qcow2", &["write -c -P 5 384k 64k", "write -P 6 512k 64k"]);
    cut(&top, fs::metadata(&top).unwrap().len() - 700);
    let wanted = rounded_up(&scratch, &top, &[]);
    let words: Vec<OsString> = args!["--output=json", &top].into();
    let plan = imgdm([&args!["plan"][..], &words].concat()).ok();
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert!(plan["scratch_bytes"].as_u64().unwrap() > 128 * KIB, "{plan}");
    assert_attached_is(&scratch, &top, &[], &wanted);
}
