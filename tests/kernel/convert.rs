//! `imgdm convert` where it takes a kernel: clones on the file systems that have them, block
//! devices, full disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::args;
use crate::guest::*;

/// Bytes that a file shares with another one, and all that it has.
#[track_caller]
fn shared_bytes(file: &Path) -> (u64, u64) {
    let printed = tool("filefrag", args!["-s", "-v", "-b512", file]);
    let (mut shared, mut all) = (0, 0);
    // ext: logical_offset: physical_offset: length: expected: flags
    for line in printed.lines() {
        let fields: Vec<_> = line.split(':').map(str::trim).collect();
        if fields[0].parse::<u64>().is_err() || fields.len() < 5 {
            continue;
        }
        let length = fields[3].parse::<u64>().unwrap() * 512;
        all += length;
        if fields[fields.len() - 1].split(',').any(|flag| flag.trim() == "shared") {
            shared += length;
        }
    }
    assert!(all > 0, "{printed}");
    (shared, all)
}

/// A raw disk of 24 MiB: 8 of random bytes, 4 of nothing, 8 of random bytes, 4 of nothing.
fn disk_with_gaps(place: &Path) -> PathBuf {
    let path = place.join("disk.raw");
    let file = File::create(&path).unwrap();
    file.set_len(24 * MIB).unwrap();
    let mut random = Random(7);
    for start in [0, 12 * MIB] {
        file.write_all_at(&random.bytes(8 << 20), start).unwrap();
    }
    file.sync_all().unwrap();
    path
}

/// Converts, and compares what came of it with what was converted.
#[track_caller]
fn convert(input: (&str, &Path), output: (&str, &Path), more: &[&str]) {
    let mut line = imgdm_command(["convert", "-f", input.0, "-O", output.0]);
    run(line.args(more).args([input.1, output.1])).ok();
    compare(input, output);
}

#[track_caller]
fn compare(a: (&str, &Path), b: (&str, &Path)) {
    let ran = qemu_img(args!["compare", "-f", a.0, "-F", b.0, a.1, b.1]);
    assert_eq!(ran.ok().trim_end(), "Images are identical.");
    if b.0 == "qcow2" {
        qemu_img(args!["check", "-q", "-f", "qcow2", b.1]).ok();
    }
}

/// Converts by clones: what is data takes no space that was not taken before.
#[track_caller]
fn converts_by_clones(
    kind: &str,
    place: &Path,
    input: (&str, &Path),
    output: (&str, &str),
    options: &str,
) {
    let out = place.join(output.1);
    let data = options.contains("data_file").then(|| place.join("out.data"));
    let given = options.replace("out.data", &place.join("out.data").to_string_lossy());
    let free = free_bytes(place);
    let mut more = vec!["--reflink=always"];
    if !options.is_empty() {
        more.extend(["-o", &given]);
    }
    let mut line = imgdm_command(["convert", "-f", input.0, "-O", output.0]);
    run(line.args(&more).args([input.1, &out])).ok();
    let taken = free.saturating_sub(free_bytes(place));
    let name = format!("{kind}: {input:?} to {output:?} {options}");
    // Metadata come in whole clusters.
    let metadata = if options.contains("2M") { 12 * MIB } else { 2 * MIB };
    assert!(taken < metadata, "{name}: {taken} bytes were taken");
    let (shared, all) = shared_bytes(data.as_deref().unwrap_or(&out));
    let is_cloned = shared >= 16 * MIB && all < 16 * MIB + metadata;
    assert!(is_cloned, "{name}: {shared} of {all} bytes are shared");
    forget(&out);
    compare(input, (output.0, &out));
    fs::remove_file(out).unwrap();
    data.map(fs::remove_file).transpose().unwrap();
}

#[test]
fn on_xfs_and_btrfs_data_is_cloned_and_takes_no_space() {
    let disk = Scratch::on_disk();
    for kind in ["xfs", "btrfs"] {
        let mounted = Mounted::make(kind, disk.directory(), 512 * MIB);
        let place = mounted.place.as_path();
        let raw = disk_with_gaps(place);
        for (name, options) in [
            ("64k", "cluster_size=64k"),
            ("4k", "cluster_size=4k"),
            ("2M", "cluster_size=2M"),
            ("extended", "cluster_size=128k,extended_l2=on"),
            ("preallocated", "preallocation=metadata"),
        ] {
            let image = place.join(name);
            qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", "-o", options, &raw, &image])
                .ok();
            File::open(&image).unwrap().sync_all().unwrap();
        }
        let (of_64k, of_4k) = (place.join("64k"), place.join("4k"));
        for name in ["64k", "4k", "2M", "extended", "preallocated"] {
            let image = place.join(name);
            converts_by_clones(kind, place, ("qcow2", &image), ("raw", "out"), "");
        }
        for options in
            ["", "cluster_size=4k", "cluster_size=2M", "extended_l2=on", "data_file=out.data"]
        {
            converts_by_clones(kind, place, ("raw", &raw), ("qcow2", "out"), options);
            converts_by_clones(kind, place, ("qcow2", &of_64k), ("qcow2", "out"), options);
            converts_by_clones(kind, place, ("qcow2", &of_4k), ("qcow2", "out"), options);
        }
        let data_file = "data_file=out.data,data_file_raw=on";
        converts_by_clones(kind, place, ("qcow2", &of_64k), ("qcow2", "out"), data_file);
        // Without a word it does the same, and with the other word never.
        for (reflink, wanted) in [(None, true), (Some("--reflink=never"), false)] {
            let out = place.join("out");
            let more: Vec<_> = reflink.into_iter().collect();
            convert(("qcow2", &of_64k), ("raw", &out), &more);
            let (shared, _) = shared_bytes(&out);
            assert_eq!(shared >= 16 * MIB, wanted, "{kind} {reflink:?}: {shared}");
            assert!(wanted || shared == 0, "{kind}: {shared}");
            fs::remove_file(out).unwrap();
        }
        // What was cloned is nobody else's to change.
        let out = place.join("out");
        convert(("raw", &raw), ("qcow2", &out), &[]);
        write_image(&out, "qcow2", &["write -P 9 0 3M", "write -z 12M 1M"]);
        compare(("raw", &raw), ("qcow2", &of_64k));
    }
}

#[test]
fn what_is_not_aligned_for_a_clone_is_copied() {
    let disk = Scratch::on_disk();
    for kind in ["xfs", "btrfs"] {
        let mounted = Mounted::make(kind, disk.directory(), 512 * MIB);
        let place = mounted.place.as_path();
        let raw = disk_with_gaps(place);
        let image = place.join("in");
        for (format, options) in [
            ("qcow2", "cluster_size=512"),
            ("qcow2", "cluster_size=2k"),
            ("qcow2", "cluster_size=16k,extended_l2=on"),
            ("qcow", ""),
        ] {
            let _ = fs::remove_file(&image);
            let mut line = command("qemu-img", ["convert", "-f", "raw", "-O", format]);
            if !options.is_empty() {
                line.args(["-o", options]);
            }
            run(line.args([&raw, &image])).ok();
            for (number, output) in ["raw", "qcow2", "qcow"].into_iter().enumerate() {
                let out = place.join(format!("out{number}"));
                convert((format, &image), (output, &out), &[]);
                fs::remove_file(out).unwrap();
            }
        }
        // An end amid a block, and writes that are of single sectors.
        let odd = place.join("odd.raw");
        fs::copy(&raw, &odd).unwrap();
        File::options().write(true).open(&odd).unwrap().set_len(20 * MIB - 3 * 512).unwrap();
        for output in ["raw", "qcow2", "qcow"] {
            let out = place.join("out");
            convert(("raw", &odd), (output, &out), &[]);
            fs::remove_file(out).unwrap();
        }
        let overlay = place.join("over");
        qemu_img(args!["create", "-q", "-f", "qcow2", "-b", &raw, "-F", "raw", &overlay]).ok();
        write_image(
            &overlay,
            "qcow2",
            &["write -P 3 512 512", "write -z 2M 1k", "write -P 4 5M 70k"],
        );
        for output in ["raw", "qcow2"] {
            let out = place.join("out");
            convert(("qcow2", &overlay), (output, &out), &[]);
            assert!(shared_bytes(&out).0 > 8 * MIB, "{kind} {output}");
            fs::remove_file(out).unwrap();
        }
    }
}

#[test]
fn where_there_are_no_clones_always_is_refused_and_the_rest_copies() {
    let disk = Scratch::on_disk();
    let raw = disk_with_gaps(disk.directory());
    let image = disk.path("in");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    for output in ["raw", "qcow2", "qcow"] {
        let out = disk.path("out");
        let ran = imgdm(args!["convert", "-O", output, "--reflink=always", &image, &out]);
        assert!(!ran.status.success() && ran.stdout.is_empty(), "{ran}");
        assert!(ran.stderr.contains("reflink") && ran.stderr.contains("out"), "{ran}");
        assert!(!out.exists());
        for reflink in ["--reflink=auto", "--reflink=never"] {
            convert(("qcow2", &image), (output, &out), &[reflink]);
            assert_eq!(shared_bytes(&out).0, 0);
            fs::remove_file(&out).unwrap();
        }
    }
    // From one file system to another.
    let mounted = Mounted::make("xfs", disk.directory(), 320 * MIB);
    let out = mounted.place.join("out");
    let ran = imgdm(args!["convert", "-O", "raw", "--reflink=always", &image, &out]);
    assert!(!ran.status.success() && ran.stderr.contains("reflink"), "{ran}");
    assert!(fs::read_dir(&mounted.place).unwrap().next().is_none());
    convert(("qcow2", &image), ("raw", &out), &[]);
}

#[test]
fn every_file_system_takes_the_new_image() {
    let disk = Scratch::on_disk();
    let raw = disk_with_gaps(disk.directory());
    let image = disk.path("in");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    let btrfs = Mounted::make("btrfs", disk.directory(), 160 * MIB);
    let scratch = Scratch::new();
    let overlay = PathBuf::from("/root/imgdm-convert");
    fs::create_dir_all(&overlay).unwrap();
    for place in [disk.directory(), &btrfs.place, scratch.directory(), &overlay] {
        let before = fs::read_dir(place).unwrap().count();
        for (output, more) in [
            ("raw", &[][..]),
            ("qcow2", &[]),
            ("qcow2", &["-c"]),
            ("qcow2", &["-o", "preallocation=full"]),
            ("raw", &["-o", "preallocation=falloc"]),
            ("qcow", &[]),
        ] {
            let out = place.join("out");
            convert(("qcow2", &image), (output, &out), more);
            convert(("qcow2", &image), (output, &out), &[more, &["--force"]].concat());
            assert_eq!(fs::read_dir(place).unwrap().count(), before + 1, "{}", place.display());
            fs::remove_file(out).unwrap();
        }
    }
    fs::remove_dir(overlay).unwrap();
}

/// A loop device over a file of `size` bytes, all of which are 0xa5.
struct Loop {
    path: PathBuf,
    file: PathBuf,
}

impl Loop {
    #[track_caller]
    fn make(scratch: &Scratch, size: u64) -> Self {
        let file = scratch.path("device");
        fs::write(&file, vec![0xa5; usize::try_from(size).unwrap()]).unwrap();
        let path = tool("losetup", args!["--show", "-f", &file]).trim().into();
        Self { path, file }
    }

    /// The device's bytes, as they are below it.
    fn bytes(&self) -> Vec<u8> {
        forget(&self.path);
        fs::read(&self.file).unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run(&mut command("losetup", args!["-d", &self.path]));
        let _ = fs::remove_file(&self.file);
    }
}

#[test]
fn a_block_device_becomes_the_disk_and_nothing_of_what_it_held_shows_through() {
    let scratch = Scratch::on_disk();
    let raw = disk_with_gaps(scratch.directory());
    let image = scratch.path("in");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    let wanted = fs::read(&raw).unwrap();
    for (format, more) in [
        ("raw", &[][..]),
        ("raw", &["-S", "0"]),
        ("qcow2", &[]),
        ("qcow2", &["-c"]),
        ("qcow2", &["-o", "cluster_size=4k"]),
        ("qcow", &[]),
    ] {
        let device = Loop::make(&scratch, 28 * MIB);
        let mut line = imgdm_command(["convert", "-f", "qcow2", "-O", format, "--force"]);
        run(line.args(more).args([&image, &device.path])).ok();
        let bytes = device.bytes();
        if format == "raw" {
            assert_same("the device", &bytes[..wanted.len()], &wanted);
            assert!(bytes[wanted.len()..].iter().all(|&byte| byte == 0xa5));
        } else {
            forget(&device.path);
            let said =
                qemu_img(args!["compare", "-f", "qcow2", "-F", format, &image, &device.path]);
            assert_eq!(said.ok().trim_end(), "Images are identical.");
        }
        if format == "qcow2" {
            qemu_img(args!["check", "-f", "qcow2", &device.path]).ok();
        }
    }
}

#[test]
fn a_block_device_that_is_too_small_or_held_is_refused_as_it_is() {
    let scratch = Scratch::on_disk();
    let raw = disk_with_gaps(scratch.directory());
    let device = Loop::make(&scratch, 12 * MIB);
    let untouched = |said: String, words: &[&str]| {
        let path = device.path.to_string_lossy();
        assert!(said.contains(&*path) && words.iter().all(|word| said.contains(word)), "{said}");
        assert!(device.bytes().iter().all(|&byte| byte == 0xa5), "{said}");
    };
    let refused = |format: &str| {
        let line = args!["convert", "-f", "raw", "-O", format, "--force", &raw, &device.path];
        let ran = imgdm(line);
        assert!(!ran.status.success(), "{ran}");
        ran.stderr
    };
    untouched(refused("raw"), &["small"]);
    let said = refused("qcow2");
    assert!(said.contains(&*device.path.to_string_lossy()), "{said}");
    drop(device);

    // Held: by device-mapper, by a file system.
    let device = Loop::make(&scratch, 320 * MIB);
    let refused = |code: i32| {
        let line = args!["convert", "-f", "raw", "-O", "raw", "--force", &raw, &device.path];
        let ran = imgdm(line);
        assert_eq!(ran.code(), Some(code), "{ran}");
        assert!(ran.stderr.contains(&*device.path.to_string_lossy()), "{ran}");
    };
    let table = format!("0 1000 linear {} 0", device.path.display());
    tool("dmsetup", ["create", "--noudevsync", "held", "--table", &table]);
    refused(75);
    tool("dmsetup", ["remove", "--noudevsync", "held"]);
    assert!(device.bytes().iter().all(|&byte| byte == 0xa5));
    tool("mkfs.ext4", args!["-q", "-F", "-E", "nodiscard", &device.path]);
    let place = scratch.path("place");
    fs::create_dir(&place).unwrap();
    tool("mount", args!["-o", "ro", &device.path, &place]);
    let before = sha256(&device.file);
    refused(75);
    assert_eq!(sha256(&device.file), before);
    tool("umount", [&place]);
}

#[test]
fn an_attached_image_is_converted_and_so_is_its_device() {
    let scratch = Scratch::on_disk();
    let raw = disk_with_gaps(scratch.directory());
    let image = scratch.path("in.qcow2");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", "-c", &raw, &image]).ok();
    let device = attach([&image]);
    for output in ["raw", "qcow2"] {
        let (out, from_device) = (scratch.path("out"), scratch.path("from-device"));
        convert(("qcow2", &image), (output, &out), &[]);
        convert(("raw", &device.path), (output, &from_device), &[]);
        compare(("raw", &raw), (output, &from_device));
        fs::remove_file(out).unwrap();
        fs::remove_file(from_device).unwrap();
    }
    // What is attached is not to be written over, nor is its device.
    for out in [&image, &device.path] {
        let ran = imgdm(args!["convert", "-f", "raw", "-O", "raw", "--force", &raw, out]);
        assert!(!ran.status.success(), "{ran}");
    }
    compare(("raw", &raw), ("raw", &device.path));
    device.detach();
}

/// Takes all the space of a file system but some, by a file.
fn fill(filler: &Path, left: u64) {
    let file = File::create(filler).unwrap();
    let mut length = 0;
    for step in [MIB, 64 * KIB, 4 * KIB] {
        let more = |length: u64| {
            let (from, step) = (i64::try_from(length).unwrap(), i64::try_from(step).unwrap());
            nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), from, step).is_ok()
        };
        while more(length) {
            length += step;
        }
    }
    file.set_len(length - left).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_full_disk_leaves_nothing_and_the_old_image_as_it_was() {
    let disk = Scratch::on_disk();
    let raw = disk_with_gaps(disk.directory());
    let image = disk.path("in");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    for (kind, size) in [("ext4", 64 * MIB), ("xfs", 320 * MIB), ("btrfs", 128 * MIB)] {
        let mounted = Mounted::make(kind, disk.directory(), size);
        let (filler, out) = (mounted.place.join("filler"), mounted.place.join("out"));
        fs::write(&out, "old").unwrap();
        for left in [64 * KIB, MIB, 4 * MIB, 11 * MIB] {
            fill(&filler, left);
            for (output, more) in [
                ("raw", &[][..]),
                ("qcow2", &[]),
                ("qcow2", &["-o", "preallocation=falloc"]),
                ("qcow", &[]),
            ] {
                let mut line = imgdm_command(["convert", "-O", output, "--force"]);
                let ran = run(line.args(more).args([&image, &out]));
                let name = format!("{kind}, {left} bytes free: {ran}");
                assert!(matches!(ran.code(), Some(1 | 73)), "{name}");
                assert!(ran.stderr.contains("out") && ran.stderr.contains("space"), "{name}");
                assert_eq!(fs::read(&out).unwrap(), b"old", "{name}");
                let count = fs::read_dir(&mounted.place).unwrap().flatten();
                let names: Vec<_> = count.map(|entry| entry.file_name()).collect();
                let others = names.iter().filter(|name| *name != "lost+found").count();
                assert_eq!(others, 2, "{name}: {names:?}");
            }
            fs::remove_file(&filler).unwrap();
        }
        // With room it goes on as if nothing had been.
        convert(("qcow2", &image), ("raw", &out), &["--force"]);
    }
}
