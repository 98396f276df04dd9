//! Nothing that is done to the devices reaches the image.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use crate::args;
use crate::guest::*;

/// The bytes of a file and the times of its last change and access, read without leaving
/// a mark on them.
#[derive(PartialEq, Eq)]
struct State {
    bytes: Vec<u8>,
    times: [i64; 4],
}

impl State {
    fn of(path: &Path) -> Self {
        forget(path);
        let mut file = OpenOptions::new();
        let mut file = file.read(true).custom_flags(libc::O_NOATIME).open(path).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut file, &mut bytes).unwrap();
        let is = file.metadata().unwrap();
        // A device's node has no times of its contents.
        let block = path.starts_with("/dev");
        let times = [is.mtime(), is.mtime_nsec(), is.atime(), is.atime_nsec()];
        Self { bytes, times: if block { [0; 4] } else { times } }
    }
}

/// Tries to write; what counts is that somebody says no before the data is called safe.
#[track_caller]
fn assert_write_fails(what: &str, path: &Path) {
    let write = |direct: bool| -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(if direct { libc::O_DIRECT } else { 0 });
        let mut file = options.open(path)?;
        let buffer = vec![0xeeu8; 8192];
        let start = buffer.as_ptr().align_offset(4096);
        file.write_all(&buffer[start..start + 4096])?;
        file.sync_all()
    };
    for direct in [false, true] {
        assert!(write(direct).is_err(), "{what}: a write (direct: {direct}) went through");
    }
}

/// Everything root might try on an attached device.
#[track_caller]
fn try_to_write(device: &Device) {
    assert_write_fails("as attached", &device.path);

    for (name, _, ours) in loops() {
        if ours {
            let path = PathBuf::from(format!("/dev/{name}"));
            assert_write_fails("its loop", &path);
            let _ = run(&mut command("blockdev", args!["--setrw", &path]));
            assert_write_fails("its loop after --setrw", &path);
        }
    }

    let _ = run(&mut command("blockdev", args!["--setrw", &device.path]));
    assert_write_fails("after --setrw", &device.path);

    let table = tool("dmsetup", ["table", &device.name]);
    let sectors: u64 =
        table.lines().map(|line| line.split(' ').nth(1).unwrap().parse::<u64>().unwrap()).sum();
    tool("dmsetup", ["suspend", &device.name]);
    tool("dmsetup", ["load", &device.name, "--table", table.trim_end()]);
    tool("dmsetup", ["resume", &device.name]);
    assert_eq!(tool("dmsetup", ["table", &device.name]), table);
    assert_write_fails("after a reload without the read-only flag", &device.path);

    for below in [device.path.clone()].into_iter().chain(loop_paths()) {
        let size: u64 = tool("blockdev", args!["--getsz", &below]).trim().parse().unwrap();
        let line = format!("0 {} linear {} 0", size.min(sectors), below.display());
        let made = run(&mut command("dmsetup", ["create", "stacked", "--table", &line]));
        if made.status.success() {
            assert_write_fails(
                "a writable device stacked on top",
                Path::new("/dev/mapper/stacked"),
            );
            tool("dmsetup", ["remove", "--retry", "stacked"]);
        }
    }
}

fn loop_paths() -> Vec<PathBuf> {
    let ours = loops().into_iter().filter(|(_, _, ours)| *ours);
    ours.map(|(name, ..)| format!("/dev/{name}").into()).collect()
}

#[test]
fn nothing_done_to_the_device_of_a_file_changes_the_file() {
    for scratch in [Scratch::new(), Scratch::on_disk()] {
        let base = scratch.create("raw", &[], "base.raw", "2M");
        write_image(&base, "raw", &["write -P 7 0 1M"]);
        let options = ["-b", "base.raw", "-F", "raw"];
        let image = scratch.create("qcow2", &options, "disk.qcow2", "");
        write_image(&image, "qcow2", &["write -P 1 0 512k", "write -z 600k 100k"]);
        let wanted = qemu_content(&scratch, &image, &[]);
        // Long ago: relatime would move the time of access at the next read.
        for file in [&base, &image] {
            tool("touch", args!["-a", "-d", "2001-02-03", file]);
            tool("touch", args!["-m", "-d", "2002-03-04", file]);
        }
        let before = [State::of(&base), State::of(&image)];

        let device = attach([&image]);
        assert_same("the device", &device.bytes(), &wanted);
        try_to_write(&device);
        assert_same("after all attempts", &device.bytes(), &wanted);
        imgdm(args!["map", "--output=json-full", &image]).ok();
        device.detach();
        let after = [State::of(&base), State::of(&image)];
        assert!(
            before == after,
            "contents or times changed: {:?}",
            [(before[0].times, after[0].times), (before[1].times, after[1].times)]
        );
    }
}

#[test]
fn nothing_done_to_the_device_of_a_block_device_image_changes_the_block_device() {
    let scratch = Scratch::new();
    let block = block_device();
    File::options().write(true).open(&block).unwrap().write_all(&vec![0; 4 << 20]).unwrap();
    qemu_img(args!["create", "-q", "-f", "qcow2", &block, "2M"]).ok();
    write_image(&block, "qcow2", &["write -P 1 0 512k", "write -P 2 1M 64k"]);
    let wanted = qemu_content(&scratch, &block, &["-f", "qcow2"]);
    let start = |path: &Path| {
        forget(path);
        read_direct(path, 0, 8 << 20).unwrap()
    };
    let before = start(&block);
    let device = attach([&block]);
    try_to_write(&device);
    assert_same("after all attempts", &device.bytes(), &wanted);
    device.detach();
    assert_same("the block device", &start(&block), &before);
}

#[test]
fn nothing_done_to_the_device_of_a_stacked_attachment_changes_its_files() {
    let scratch = Scratch::new();
    let base = scratch.create("raw", &[], "base.raw", "1M");
    write_image(&base, "raw", &["write -P 7 0 1M"]);
    let image = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "disk.qcow2", "");
    let before = [fs::read(&base).unwrap(), fs::read(&image).unwrap()];
    let device = attach([&image]);
    assert!(our_devices().len() > 1, "no inner device: {:?}", our_devices());
    try_to_write(&device);
    for name in our_devices() {
        let inner = Path::new("/dev/mapper").join(name);
        let inner = if inner.exists() { inner } else { continue };
        let _ = run(&mut command("blockdev", args!["--setrw", &inner]));
        assert_write_fails("an inner device", &inner);
    }
    assert_same("after all attempts", &device.bytes(), &before[0]);
    device.detach();
    drop_caches();
    assert!(before == [fs::read(&base).unwrap(), fs::read(&image).unwrap()]);
}
