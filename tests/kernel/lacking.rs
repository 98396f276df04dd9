//! What the kernel or the system does not give: modules, loop devices, memory, descriptors,
//! single ioctls. It is named, and nothing is left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc;

use crate::args;
use crate::encrypted::{Encrypted, PATTERN};
use crate::guest::*;
use crate::image::{Image, Order};

/// A fresh overlay over an image with data: loop devices, an inner device and the top one.
fn stacked(scratch: &Scratch) -> PathBuf {
    let base = scratch.create("qcow2", &[], "base.qcow2", "1M");
    write_image(&base, "qcow2", &["write -P 1 0 512k"]);
    scratch.create("qcow2", &["-b", "base.qcow2", "-F", "qcow2"], "disk.qcow2", "")
}

/// Nobody loads a module while it lives: the kernel's own helper is of no use, and imgdm goes
/// by the same.
struct NoModprobe(String);

const HELPER: &str = "/proc/sys/kernel/modprobe";

impl NoModprobe {
    fn new() -> Self {
        let before = fs::read_to_string(HELPER).unwrap();
        fs::write(HELPER, "/bin/false").unwrap();
        Self(before)
    }
}

impl Drop for NoModprobe {
    fn drop(&mut self) {
        fs::write(HELPER, self.0.trim()).unwrap();
    }
}

#[test]
fn each_module_that_cannot_be_loaded_is_named() {
    let scratch = Scratch::new();
    let plain = stacked(&scratch);
    let luks = Encrypted::luks(&scratch, "luks.qcow2", "");
    luks.write(PATTERN);
    let key = luks.key_file(&scratch);
    let lines = [
        ("dm-zero", args!["attach", &plain].to_vec()),
        ("dm-crypt", args!["attach", "--key-file", &key, &luks.path].to_vec()),
        ("dm-snapshot", args!["attach", "--overlay", &plain].to_vec()),
        ("loop", args!["attach", &plain].to_vec()),
    ];
    for (module, line) in lines {
        // Without its being loaded there is nothing to take away.
        let _ = run(&mut command("modprobe", [module]));
        // Not what it needs, too, as modprobe would.
        tool("rmmod", [module]);
        let helper = NoModprobe::new();
        let ran = imgdm(&line);
        let listed = imgdm(["list"]);
        drop(helper);
        let said = ran.refused(69);
        assert!(said.contains(module), "{said}");
        assert_eq!(listed.ok(), "", "{module}");
        tool("modprobe", [module]);
        assert_nothing_left();
        // With it, it works.
        imgdm(&line).ok();
        imgdm(["detach", "--all"]).ok();
    }
}

/// imgdm of whose ioctls this one fails.
fn without(request: u32, errno: i32, line: &[std::ffi::OsString]) -> Ran {
    let filter = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernel/refuse-ioctl");
    let mut command = Command::new("perl");
    command.arg(filter).arg(format!("{request:x}")).arg(errno.to_string());
    run(command.arg(imgdm_path()).args(line))
}

/// An ioctl of device-mapper (`_IOWR(0xfd, command, struct dm_ioctl)`).
const fn dm(command: u32) -> u32 {
    0xc138_fd00 | command
}

const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_GET_STATUS64: u32 = 0x4c05;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
const LIST_DEVICES: u32 = dm(2);
const DEV_CREATE: u32 = dm(3);
const DEV_REMOVE: u32 = dm(4);
const DEV_SUSPEND: u32 = dm(6);
const DEV_STATUS: u32 = dm(7);
const TABLE_LOAD: u32 = dm(9);
const TABLE_DEPS: u32 = dm(11);
const LIST_VERSIONS: u32 = dm(13);
const TARGET_MSG: u32 = dm(14);

const NO_MEMORY: &str = "Cannot allocate memory";

#[test]
fn each_ioctl_that_the_kernel_refuses_is_an_error_that_says_why_and_leaves_nothing() {
    let scratch = Scratch::new();
    let image = stacked(&scratch);
    let line = args!["attach", &image];
    for (request, errno, code, word) in [
        (LOOP_CTL_GET_FREE, libc::ENOSPC, 73, "no loop device is free"),
        (LOOP_CTL_GET_FREE, libc::EINVAL, 73, "no loop device is free"),
        (LOOP_CTL_GET_FREE, libc::ENOMEM, 1, NO_MEMORY),
        (LOOP_CONFIGURE, libc::EBUSY, 75, "took the free loop device"),
        (LOOP_CONFIGURE, libc::ENOTTY, 69, "LOOP_CONFIGURE"),
        (LOOP_CONFIGURE, libc::ENOMEM, 1, NO_MEMORY),
        (LOOP_GET_STATUS64, libc::EIO, 1, "loop device"),
        (LIST_VERSIONS, libc::ENOMEM, 1, NO_MEMORY),
        (LIST_DEVICES, libc::ENOMEM, 1, NO_MEMORY),
        (DEV_STATUS, libc::ENOMEM, 1, NO_MEMORY),
        (DEV_CREATE, libc::ENOMEM, 1, NO_MEMORY),
        (DEV_CREATE, libc::EBUSY, 73, "is taken"),
        (TABLE_LOAD, libc::ENOMEM, 1, NO_MEMORY),
        (TABLE_LOAD, libc::EINVAL, 1, "the kernel log says why"),
        (DEV_SUSPEND, libc::ENOMEM, 1, NO_MEMORY),
        (TARGET_MSG, libc::ENOMEM, 1, NO_MEMORY),
        (DEV_CREATE, libc::EACCES, 77, "needs root"),
    ] {
        let ran = without(request, errno, &line);
        let what = format!("{request:#x} fails with {errno}");
        assert_eq!((ran.code(), &*ran.stdout), (Some(code), ""), "{what}: {ran}");
        assert!(ran.stderr.contains(word), "{what}: {ran}");
        assert!(!ran.stderr.contains("left behind"), "{what}: {ran}");
        assert_nothing_left();
    }
    attach([&image]).detach();
}

#[test]
fn what_cannot_be_rolled_back_is_told_and_the_next_run_takes_it_away() {
    let scratch = Scratch::new();
    let image = stacked(&scratch);
    // Neither the mark for removal nor the removal itself.
    let said = without(DEV_REMOVE, libc::EIO, &args!["attach", &image]).refused(1);
    assert!(said.contains("Input/output error"), "{said}");
    assert!(said.contains("left behind: the device 'disk-inner"), "{said}");
    assert_eq!(our_devices().len(), 1);
    // It holds nothing, and is in nobody's way.
    assert_eq!(loops().iter().filter(|(_, _, ours)| *ours).count(), 0);
    attach([&image]).detach();
    assert_nothing_left();
}

#[test]
fn detach_and_list_fail_with_the_ioctl_that_fails_and_the_device_stays_whole() {
    let scratch = Scratch::new();
    let image = stacked(&scratch);
    let device = attach([&image]);
    let before = (device.bytes(), dm_devices(), loops());
    for request in [LIST_DEVICES, DEV_STATUS, TABLE_DEPS, DEV_REMOVE, LOOP_GET_STATUS64] {
        for line in [args!["detach", "disk"].to_vec(), args!["list"].to_vec()] {
            let ran = without(request, libc::EIO, &line);
            if request == DEV_REMOVE && line.len() == 1 {
                assert!(ran.ok().contains("disk"));
                continue;
            }
            let what = format!("{line:?}, {request:#x}");
            let said = ran.refused(1);
            assert!(said.contains("Input/output error"), "{what}: {said}");
            let now = (device.bytes(), dm_devices(), loops());
            assert!(now == before, "{what}: {:?} {:?}", now.1, now.2);
        }
    }
    device.detach();
}

#[test]
fn too_few_file_descriptors_are_told_and_nothing_is_left() {
    let scratch = Scratch::new();
    let mut below = scratch.create("qcow2", &[], "0.qcow2", "1M");
    write_image(&below, "qcow2", &["write -P 1 0 512k"]);
    for layer in 1..12 {
        let name = format!("{layer}.qcow2");
        let backing = below.display().to_string();
        below = scratch.create("qcow2", &["-b", &backing, "-F", "qcow2"], &name, "");
    }
    for limit in [6, 8, 12, 16, 20] {
        let script = format!("ulimit -n {limit}; exec \"$@\"");
        let line = args!["-c", script, "sh", imgdm_path(), "attach", &below];
        let said = run(&mut command("sh", line)).refused(1);
        assert!(said.contains("Too many open files"), "{limit}: {said}");
        assert_nothing_left();
    }
    attach([&below]).detach();
}

/// The loop devices 0 to 4095, all that there can be of such as may have 255 partitions: taken
/// while it lives.
struct EveryLoop;

impl EveryLoop {
    fn take() -> Self {
        // It has to be there to be taken away.
        let _ = run(&mut command("modprobe", ["loop"]));
        tool("rmmod", ["loop"]);
        tool("modprobe", ["loop", "max_part=255"]);
        let all = Self;
        let script = r#"
            open my $file, "<", $ARGV[0] or die "$ARGV[0]: $!";
            open my $control, "+<", "/dev/loop-control" or die "loop-control: $!";
            for my $number (0 .. 4095) {
                # LOOP_CTL_ADD and LOOP_SET_FD.
                defined ioctl($control, 0x4c80, $number) or $!{EEXIST} or die "add $number: $!";
                open my $loop, "<", "/dev/loop$number" or die "loop$number: $!";
                defined ioctl($loop, 0x4c00, fileno $file) or die "take loop$number: $!";
            }"#;
        tool("perl", ["-MErrno", "-e", script, "/etc/hostname"]);
        all
    }
}

impl Drop for EveryLoop {
    fn drop(&mut self) {
        // Where a test has failed meanwhile, that is what is to be told.
        for (name, argument) in [("losetup", "-D"), ("rmmod", "loop"), ("modprobe", "loop")] {
            let _ = run(&mut command(name, [argument]));
        }
    }
}

#[test]
fn when_every_loop_device_is_taken_that_is_said_and_two_that_are_let_go_will_do() {
    let scratch = Scratch::new();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 64k"]);
    let _all = EveryLoop::take();
    let said = imgdm(args!["attach", &image]).refused(73);
    assert!(said.contains("no loop device is free") && said.contains("losetup -a"), "{said}");
    assert_nothing_left();
    // One for the file, and one for zeros.
    tool("losetup", ["-d", "/dev/loop4095", "/dev/loop4094"]);
    let device = attach([&image]);
    assert_eq!(device.bytes()[..512], [1; 512]);
    device.detach();
}

/// The kernel has room for the table's text, with the help of swap, but an array of as many targets
/// is more than all its memory: that is refused at once. With less memory or with more its OOM
/// killer comes first, and whom it ends is a matter of chance.
#[test]
#[ignore = "takes a guest with less memory than a table, and swap: tests/kernel/run boots one"]
fn a_table_that_there_is_no_memory_for_leaves_nothing() {
    let swap = std::env::var("IMGDM_SWAP").unwrap();
    tool("mkswap", [&swap]);
    tool("swapon", [&swap]);
    let scratch = Scratch::new();
    let large = Image::create(&scratch.path("large.qcow2"), 20, Order::Shuffled, false).unwrap();
    let small = stacked(&scratch);
    let said = imgdm(args!["attach", &large.path]).refused(73);
    assert!(said.contains("--max-kernel-memory"), "{said}");
    for _ in 0..3 {
        let said = imgdm(args!["attach", "--max-kernel-memory=none", &large.path]).refused(1);
        assert!(said.contains(NO_MEMORY) && said.contains("imgdm plan IMAGE"), "{said}");
        assert_nothing_left();
        attach([&small]).detach();
        assert_nothing_left();
    }
    drop(scratch);
    tool("swapoff", [&swap]);
}
