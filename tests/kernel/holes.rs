//! Holes, unwritten and delayed extents, on the file systems that have them.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::args;
use crate::guest::*;

/// Pieces of a MiB, by what their file system makes of them; those without a name are
/// holes.
const PIECES: u64 = 8;
const WRITTEN: u64 = 0;
const UNWRITTEN: u64 = 1;
/// Unwritten, and read since: with its pages in memory SEEK_DATA calls it data.
const UNWRITTEN_AND_READ: u64 = 2;
const WRITTEN_INTO_UNWRITTEN: u64 = 3;
/// Written into preallocated space, not yet on the disk.
const DELAYED_INTO_UNWRITTEN: u64 = 5;
/// Written into a hole, not yet on the disk.
const DELAYED: u64 = 6;

/// Makes all pieces in a file that is there or not; gives what it holds.
fn make(path: &Path) -> Vec<u8> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
    let file = file.unwrap();
    file.set_len(PIECES * MIB).unwrap();
    let mut wanted = vec![0u8; usize::try_from(PIECES * MIB).unwrap()];
    let mut write = |piece: u64, byte: u8| {
        let bytes = vec![byte; 1 << 20];
        file.write_all_at(&bytes, piece * MIB).unwrap();
        let start = usize::try_from(piece * MIB).unwrap();
        wanted[start..start + bytes.len()].copy_from_slice(&bytes);
    };
    let mut can_preallocate = true;
    for piece in [UNWRITTEN, UNWRITTEN_AND_READ, WRITTEN_INTO_UNWRITTEN, DELAYED_INTO_UNWRITTEN] {
        let offset = i64::try_from(piece * MIB).unwrap();
        can_preallocate &= fallocate(&file, FallocateFlags::empty(), offset, 1 << 20).is_ok();
    }
    assert!(can_preallocate);
    write(WRITTEN, 0x11);
    write(WRITTEN_INTO_UNWRITTEN, 0x33);
    file.sync_all().unwrap();
    let mut read = vec![0xff; 1 << 20];
    file.read_exact_at(&mut read, UNWRITTEN_AND_READ * MIB).unwrap();
    assert!(read.iter().all(|&byte| byte == 0));
    write(DELAYED_INTO_UNWRITTEN, 0x55);
    write(DELAYED, 0x66);
    wanted
}

/// Why each MiB of the image reads as zero, as `map` says it; "data" where it does not.
#[track_caller]
fn causes(image: &Path, options: &[&str]) -> Vec<String> {
    let mut line = imgdm_command(["map", "--output=json-full"]);
    let printed = run(line.args(options).arg(image)).ok();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&printed).unwrap();
    (0..PIECES)
        .map(|piece| {
            let row = rows.iter().find(|row| {
                let start = row["start"].as_u64().unwrap();
                let length = row["length"].as_u64().unwrap();
                start <= piece * MIB && (piece + 1) * MIB <= start + length
            });
            let row = row.unwrap_or_else(|| panic!("MiB {piece} is in pieces: {printed}"));
            row["zero-cause"].as_str().unwrap_or("data").to_owned()
        })
        .collect()
}

/// What SEEK_DATA alone tells.
const BY_SEEKING: [&str; 8] = ["data", "hole", "data", "data", "hole", "data", "data", "hole"];

#[test]
fn unwritten_extents_are_zeros_and_delayed_ones_are_data_on_ext4_and_xfs() {
    let disk = Scratch::on_disk();
    for (kind, size) in [("ext4", 64 * MIB), ("xfs", 320 * MIB)] {
        let mounted = Mounted::make(kind, disk.directory(), size);
        let image = mounted.place.join("disk.raw");

        // attach first, on what is delayed still.
        let wanted = make(&image);
        let device = attach(args!["-f", "raw", "--zero=dm", &image]);
        let table = tool("dmsetup", ["table", &device.name]);
        assert_same(kind, &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 17);
        assert_no_process(&mounted.place);
        device.detach();
        // MiB 1 and 2 are one zero segment, whatever SEEK_DATA says of the second.
        assert!(table.lines().any(|line| line == "2048 4096 zero "), "{kind}: {table}");
        assert_nothing_left();

        make(&image);
        let by_fiemap = ["data", "hole", "unwritten", "data", "hole", "data", "data", "hole"];
        assert_eq!(causes(&image, &["-f", "raw"]), by_fiemap, "{kind}");
        make(&image);
        assert_eq!(causes(&image, &["-f", "raw", "--no-fiemap"]), BY_SEEKING, "{kind}");

        make(&image);
        let device = attach(args!["-f", "raw", "--no-fiemap", &image]);
        assert_same(kind, &device.bytes(), &wanted);
        device.detach();
    }
}

#[test]
fn fiemap_is_not_trusted_while_anybody_has_the_file_open_for_writing() {
    let disk = Scratch::on_disk();
    let mounted = Mounted::make("ext4", disk.directory(), 64 * MIB);
    let image = mounted.place.join("disk.raw");
    let wanted = make(&image);
    let writer = OpenOptions::new().write(true).open(&image).unwrap();
    assert_eq!(causes(&image, &["-f", "raw"]), BY_SEEKING);
    let device = attach(args!["-f", "raw", &image]);
    assert_same("with a writer", &device.bytes(), &wanted);
    // What it writes now into preallocated space must show: nothing there was taken for
    // zeros on FIEMAP's word.
    writer.write_all_at(&[0x77; 4096], UNWRITTEN_AND_READ * MIB).unwrap();
    writer.sync_all().unwrap();
    let at = usize::try_from(UNWRITTEN_AND_READ * MIB).unwrap();
    assert_eq!(device.bytes()[at], 0x77);
    device.detach();
    drop(writer);
    // With -U no lock keeps writers out, so FIEMAP is not asked either.
    make(&image);
    assert_eq!(causes(&image, &["-f", "raw", "-U"]), BY_SEEKING);
}

#[test]
fn a_data_file_with_holes_and_unwritten_extents_reads_as_it_is() {
    let disk = Scratch::on_disk();
    for (kind, size) in [("ext4", 64 * MIB), ("xfs", 320 * MIB), ("btrfs", 160 * MIB)] {
        let mounted = Mounted::make(kind, disk.directory(), size);
        let image = mounted.place.join("disk.qcow2");
        let data = mounted.place.join("disk.data");
        let option =
            format!("data_file={},data_file_raw=on,preallocation=metadata", data.display());
        qemu_img(args!["create", "-q", "-f", "qcow2", "-o", option, &image, "8M"]).ok();
        let wanted = make(&data);
        let device = attach([&image]);
        assert_same(kind, &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 19);
        device.detach();
        assert_nothing_left();
    }
}

#[test]
fn raw_images_on_btrfs_and_tmpfs_read_as_they_are() {
    let disk = Scratch::on_disk();
    let tmpfs = Scratch::new();
    let btrfs = Mounted::make("btrfs", disk.directory(), 160 * MIB);
    for (kind, place) in [("btrfs", btrfs.place.as_path()), ("tmpfs", tmpfs.directory())] {
        let image = place.join("disk.raw");
        let wanted = make(&image);
        let device = attach(args!["-f", "raw", &image]);
        assert_same(kind, &device.bytes(), &wanted);
        assert_random_reads(&device.path, &wanted, 23);
        device.detach();
        assert_nothing_left();
        assert_eq!(causes(&image, &["-f", "raw"])[0], "data", "{kind}");
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn shared_extents_of_a_reflink_are_data() {
    let disk = Scratch::on_disk();
    let mounted = Mounted::make("xfs", disk.directory(), 320 * MIB);
    let (base, copy) = (mounted.place.join("base.raw"), mounted.place.join("copy.raw"));
    let wanted = make(&base);
    tool("cp", args!["--reflink=always", &base, &copy]);
    File::open(&copy).unwrap().sync_all().unwrap();
    for image in [&base, &copy] {
        let device = attach(args!["-f", "raw", image]);
        assert_same("a reflinked file", &device.bytes(), &wanted);
        device.detach();
    }
}
