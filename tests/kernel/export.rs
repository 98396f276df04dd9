//! `imgdm export`: what was written to a device, as QEMU reads it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use nix::libc;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::args;
use crate::guest::*;
use crate::overlay::{chain, kept, raw, untouched, write_randomly};

/// Bytes of dm-snapshot's chunks.
const CHUNK: u64 = 16 * KIB;

fn export_command<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
) -> std::process::Command {
    let mut line = imgdm_command(["export"]);
    line.args(arguments);
    line
}

/// `imgdm export --output=json`, which must succeed.
#[track_caller]
fn export<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Value {
    let printed = run(export_command(["--output=json"]).args(arguments)).ok();
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

/// `imgdm export`, which must fail so and say these words.
#[track_caller]
fn refused<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
    code: i32,
    words: &[&str],
) -> String {
    let said = run(&mut export_command(arguments)).refused(code);
    for word in words {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    said
}

/// What QEMU says of an image is in order, and its content is this.
#[track_caller]
fn assert_image(scratch: &Scratch, image: &Path, wanted: &[u8]) {
    qemu_img(args!["check", "-q", image]).ok();
    assert_same(&image.display().to_string(), &qemu_content(scratch, image, &[]), wanted);
}

/// The ranges that the image itself has something for, not its backing file.
fn allocated(image: &Path) -> Vec<(u64, u64)> {
    let printed = qemu_img(args!["map", "--output=json", image]).ok();
    let map: Vec<Value> = serde_json::from_str(&printed).unwrap();
    let own = map.iter().filter(|row| row["depth"] == 0 && row["present"] == true);
    own.map(|row| (row["start"].as_u64().unwrap(), row["length"].as_u64().unwrap())).collect()
}

/// The ranges, cut into pieces of `unit` bytes.
fn units(ranges: &[(u64, u64)], unit: u64) -> BTreeSet<u64> {
    let all =
        ranges.iter().flat_map(|(start, length)| start / unit..(start + length).div_ceil(unit));
    all.collect()
}

/// Which pieces of `unit` bytes hold a chunk in which the two differ.
fn changed_units(before: &[u8], after: &[u8], unit: u64) -> BTreeSet<u64> {
    let size = usize::try_from(CHUNK).unwrap();
    let chunks = (0u64..).zip(before.chunks(size).zip(after.chunks(size)));
    let changed = chunks.filter(|(_, (a, b))| a != b).map(|(at, _)| (at * CHUNK, CHUNK));
    let end = (before.len() as u64).div_ceil(unit);
    units(&changed.collect::<Vec<_>>(), unit).into_iter().filter(|at| *at < end).collect()
}

/// The devices that are suspended.
fn suspended() -> Vec<String> {
    let printed = tool("dmsetup", ["info", "-c", "--noheadings", "-o", "name,suspended"]);
    let lines = printed.lines().filter(|line| line.trim_end().ends_with("Suspended"));
    lines.map(str::to_owned).collect()
}

/// The device takes reads and writes; the first chunk is a changed one then.
#[track_caller]
fn assert_alive(device: &Device) {
    assert_eq!(suspended(), Vec::<String>::new());
    let file = File::options().read(true).write(true).open(&device.path).unwrap();
    let mut sector = [0; 512];
    file.read_exact_at(&mut sector, 0).unwrap();
    file.write_all_at(&sector, 0).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn what_was_written_is_what_qemu_reads_and_no_other_cluster_is_allocated() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let original = qemu_content(&scratch, &image, &[]);
    let before = untouched(&files);
    let out = scratch.path("out.qcow2");
    let store = scratch.path("store");
    for overlay in ["--overlay".to_owned(), kept(&store)] {
        let mut wanted = original.clone();
        let options = args![&overlay, "--scratch-dir", scratch.directory(), &image];
        let device = attach(options);
        write_randomly(&device.path, &mut wanted, 41, 12);
        // The last sectors, which are no whole chunk.
        let end = wanted.len() - 512;
        wanted[end..].fill(0xee);
        let file = File::options().write(true).open(&device.path).unwrap();
        file.write_all_at(&[0xee; 512], end as u64).unwrap();
        file.sync_all().unwrap();
        drop(file);
        for (options, unit) in [
            (&[][..], 64 * KIB),
            (&["-o", "cluster_size=4k"], CHUNK),
            (&["-o", "cluster_size=2M,lazy_refcounts=on"], 2 * MIB),
            (&["-o", "compat=v2,cluster_size=16k"], CHUNK),
            (&["--subclusters"], CHUNK),
            (&["--subclusters", "-o", "cluster_size=512k,refcount_bits=1"], CHUNK),
            (&["-c"], 64 * KIB),
            (&["-c", "-o", "compression_type=zstd,cluster_size=128k"], 128 * KIB),
        ] {
            let said = export(
                args![&device.name, "--force", &out]
                    .into_iter()
                    .chain(options.iter().map(OsString::from)),
            );
            assert_image(&scratch, &out, &wanted);
            let changed = changed_units(&original, &wanted, unit);
            assert_eq!(units(&allocated(&out), unit), changed, "{options:?}");
            assert_eq!(said["backing_file"]["path"], image.to_str().unwrap(), "{said}");
            assert_eq!(said["backing_format"], "qcow2");
            assert_eq!(said["virtual_size"], wanted.len() as u64);
            assert!(said["suspended_milliseconds"].is_u64(), "{said}");
            assert_eq!(suspended(), Vec::<String>::new());
        }
        assert_same("the device", &device.bytes(), &wanted);
        device.detach();
        if store.exists() {
            for options in [&[][..], &["--subclusters"]] {
                let options = options.iter().map(OsString::from);
                let said = export(args![&store, "--force", &out].into_iter().chain(options));
                assert_image(&scratch, &out, &wanted);
                assert_eq!(said["suspended_milliseconds"], Value::Null);
                let chunks = changed_units(&original, &wanted, CHUNK).len() as u64;
                let changed = said["changed"].as_u64().unwrap().div_ceil(CHUNK);
                assert_eq!(changed, chunks, "{said}");
            }
            // The store is as it was: what it holds is there again.
            let device = attach(args![kept(&store), &image]);
            assert_same("attached again", &device.bytes(), &wanted);
            device.detach();
        }
    }
    assert!(untouched(&files) == before, "a file of the image was touched");
    // QEMU writes to what was exported, and not to the image.
    write_image(&out, "qcow2", &["write -P 3 0 64k"]);
    assert!(untouched(&files) == before, "a file of the image was touched");
}

#[test]
fn nothing_written_is_an_empty_overlay_and_everything_a_full_one() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let out = scratch.path("out.qcow2");
    let device = attach(args!["--overlay", "-f", "raw", &image]);
    let said = export(args![&device.path, &out]);
    assert_eq!((said["changed"].as_u64(), said["backing_format"].as_str()), (Some(0), Some("raw")));
    assert_eq!(allocated(&out), []);
    assert_image(&scratch, &out, &fs::read(&image).unwrap());
    let wanted = Random(77).bytes(4 << 20);
    let file = File::options().write(true).open(&device.path).unwrap();
    file.write_all_at(&wanted, 0).unwrap();
    drop(file);
    // Not synced: that is for export to see to. By the path of the image.
    let said = export(args![&image, "--force", &out]);
    assert_eq!(said["changed"], 4 * MIB, "{said}");
    assert_image(&scratch, &out, &wanted);
    let zeros = vec![0; 4 << 20];
    fs::write(&device.path, &zeros).unwrap();
    let said = export(args![&device.name, "--force", &out]);
    assert_eq!((said["copied"].as_u64(), said["zeros"].as_u64()), (Some(0), Some(4 * MIB)));
    assert_image(&scratch, &out, &zeros);
    device.detach();
}

#[test]
fn a_store_on_xfs_is_cloned_and_the_device_goes_on_at_once() {
    let disk = Scratch::on_disk();
    let xfs = Mounted::make("xfs", disk.directory(), 320 * MIB);
    let scratch = Scratch::under(&xfs.place);
    let image = raw(&scratch);
    let mut wanted = fs::read(&image).unwrap();
    let store = scratch.path("store");
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    write_randomly(&device.path, &mut wanted, 51, 30);
    let out = scratch.path("out.qcow2");
    // It goes on once the clone is made: stopped after that, it is alive.
    let mut line = export_command(args![&device.name, &out, "-o", "cluster_size=4k"]);
    let stopped = start(line.env("IMGDM_FAULT", "clone:stop"));
    wait_for("export to stop", || stopped.is_stopped());
    assert_eq!(suspended().len(), 1);
    stopped.signal(Signal::SIGCONT);
    wait_for("the device to go on", || suspended().is_empty());
    let ran = stopped.finish();
    assert!(ran.status.success() && !ran.stderr.contains("suspended"), "{ran}");
    assert_image(&scratch, &out, &wanted);
    // Blocks are shared, not copied.
    let said = export(args![&device.name, "--force", &out, "-o", "cluster_size=4k"]);
    assert!(said["cloned"].as_u64().unwrap() > 0, "{said}");
    assert_image(&scratch, &out, &wanted);
    device.detach();
    // A store without a name can't be cloned.
    let device =
        attach(args!["--overlay", "--scratch-dir", scratch.directory(), "-f", "raw", &image]);
    let ran = run(&mut export_command(args![&device.name, "--force", &out]));
    assert!(ran.status.success() && ran.stderr.contains("is suspended until"), "{ran}");
    assert_image(&scratch, &out, &fs::read(&image).unwrap());
    device.detach();
    assert_eq!(fs::read_dir(scratch.directory()).unwrap().count(), 3);
}

/// A file system of the device's that is mounted; perhaps with a program that writes to it.
struct OnDevice {
    place: PathBuf,
    writer: Option<Running>,
}

impl OnDevice {
    #[track_caller]
    fn mount(device: &Path, place: &Path) -> Self {
        tool("mount", args![device, place]);
        Self { place: place.to_owned(), writer: None }
    }

    fn start_writer(&mut self) {
        self.writer = Some(writer(&self.place));
        wait_for("the writer to write", || self.place.join("f16").exists());
    }

    /// The writer's end, with all that it started; then the file system is unmounted.
    #[track_caller]
    fn end(mut self) {
        self.kill();
        // What it started is gone a moment later.
        wait_for("umount", || run(&mut command("umount", [&self.place])).code() == Some(0));
    }

    fn kill(&mut self) {
        let Some(writer) = self.writer.take() else { return };
        let group = nix::unistd::Pid::from_raw(i32::try_from(writer.id()).unwrap());
        let _ = nix::sys::signal::killpg(group, Signal::SIGKILL);
    }
}

impl Drop for OnDevice {
    fn drop(&mut self) {
        self.kill();
        // Nothing to be done where it has ended: then nothing is mounted there.
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// A program that writes and syncs files in a directory until its group is killed.
fn writer(place: &Path) -> Running {
    let script = "n=0; while :; do n=$((n + 1)); echo $n >f$((n % 17)).new; \
        head -c $((n % 90000)) /dev/urandom >>f$((n % 17)).new; \
        mv f$((n % 17)).new f$((n % 17)); [ $((n % 5)) != 0 ] || sync -f .; done";
    let mut line = command("sh", ["-c", script]);
    start(line.current_dir(place).process_group(0))
}

#[test]
fn a_file_system_in_use_is_exported_clean_from_the_disk_and_from_a_partition() {
    let disk = Scratch::on_disk();
    let xfs = Mounted::make("xfs", disk.directory(), 400 * MIB);
    let place = disk.path("mnt");
    fs::create_dir(&place).unwrap();
    // Where the store can be cloned, and where not.
    for under in [xfs.place.as_path(), disk.directory()] {
        let scratch = Scratch::under(under);
        let image = scratch.create("qcow2", &[], "disk.qcow2", "48M");
        let store = scratch.path("store");
        for partitions in [false, true] {
            let device = attach(args![kept(&store), &image]);
            let mut on = device.path.clone();
            if partitions {
                sh(&format!("echo 2048, | sfdisk -q --no-reread '{}'", device.path.display()));
                tool("dmsetup", ["remove", "--noudevsync", &device.name]);
                let _ = fs::remove_file(&device.path);
                assert_nothing_left_soon();
                imgdm(args!["attach", kept(&store), "--partitions", &image]).ok();
                on = PathBuf::from(format!("{}1", device.path.display()));
            }
            tool("mkfs.ext4", args!["-q", "-F", "-E", "nodiscard", &on]);
            let mut busy = OnDevice::mount(&on, &place);
            busy.start_writer();
            for round in 0..3 {
                let out = scratch.path(&format!("out{round}.qcow2"));
                export(args![&device.name, "--force", &out]);
                qemu_img(args!["check", "-q", &out]).ok();
                let raw = scratch.path("out.raw");
                qemu_img(args!["convert", "-O", "raw", &out, &raw]).ok();
                let offset = if partitions { MIB } else { 0 };
                let found =
                    tool("losetup", args!["--show", "-r", "-o", &offset.to_string(), "-f", &raw]);
                let node = found.trim();
                // Not even a journal is left to be replayed.
                let told = tool("dumpe2fs", ["-h", node]);
                assert!(!told.contains("needs_recovery"), "{told}");
                let ran = run(&mut command("e2fsck", ["-fn", node]));
                tool("losetup", ["-d", node]);
                assert_eq!(ran.code(), Some(0), "{partitions}: {ran}");
                // The writer goes on.
                let newest = || fs::metadata(place.join("f3")).and_then(|m| m.modified()).ok();
                let before = newest();
                wait_for("the writer to go on", || newest() != before);
            }
            busy.end();
            device.detach();
            fs::remove_file(&store).unwrap();
        }
    }
}

#[test]
fn killed_stopped_or_failed_while_it_is_suspended_the_device_goes_on() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let store = scratch.path("store");
    let out = scratch.path("out.qcow2");
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    let mut wanted = fs::read(&image).unwrap();
    write_randomly(&device.path, &mut wanted, 61, 20);
    let faulty = |fault: &str| {
        let mut line = export_command(args![&device.name, &out]);
        line.env("IMGDM_FAULT", fault);
        line
    };
    for step in ["suspend", "clone"] {
        let ran = run(&mut faulty(&format!("{step}:kill")));
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        wait_for("the device to go on", || suspended().is_empty());
        assert_alive(&device);
        wait_for("its guard to end", || our_processes(None).is_empty());
        let ran = run(&mut faulty(&format!("{step}:fail")));
        assert!(ran.code() == Some(1) && ran.stderr.contains("fault injected"), "{ran}");
        assert_alive(&device);
        assert_eq!(our_processes(None), Vec::<String>::new());
        let ran = run(&mut faulty(&format!("{step}:term")));
        assert_eq!(ran.signal(), Some(libc::SIGTERM), "{step}: {ran}");
        assert_alive(&device);
        // Stopped it stays so, until it goes on or is killed.
        for signal in [Signal::SIGCONT, Signal::SIGINT, Signal::SIGKILL] {
            let _ = fs::remove_file(&out);
            let stopped = start(&mut faulty(&format!("{step}:stop")));
            wait_for("export to stop", || stopped.is_stopped());
            assert_eq!(suspended().len(), 1, "{step}");
            // A second one does not meddle.
            refused(args![&device.name, scratch.path("second")], 75, &["suspended by somebody"]);
            stopped.signal(signal);
            if signal == Signal::SIGINT {
                stopped.signal(Signal::SIGCONT);
            }
            let ran = stopped.finish();
            match signal {
                Signal::SIGCONT => assert!(ran.status.success(), "{ran}"),
                _ => assert_eq!(ran.signal(), Some(signal as i32), "{ran}"),
            }
            wait_for("the device to go on", || suspended().is_empty());
            assert_alive(&device);
            assert_eq!(out.exists(), signal == Signal::SIGCONT);
        }
    }
    // A terminal's stops are for later: the shell might wait for the device. Processes of
    // a group of their own are stopped by them, as this one is.
    let mut sleeping = command("sleep", ["1000"]);
    let sleeping = start(sleeping.process_group(0));
    sleeping.signal(Signal::SIGTSTP);
    wait_for("sleep to stop", || sleeping.is_stopped());
    sleeping.signal(Signal::SIGKILL);
    sleeping.finish();
    let mut line = faulty("clone:tty");
    let _ = fs::remove_file(&out);
    let running = start(line.process_group(0));
    let ran = running.finish();
    assert!(ran.status.success(), "{ran}");
    assert_image(&scratch, &out, &wanted);
    assert_same("the device", &device.bytes(), &wanted);
    device.detach();
    let mut names: Vec<_> =
        fs::read_dir(scratch.directory()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["disk.raw", "out.qcow2", "store"]);
}

#[test]
fn a_full_disk_leaves_no_output_and_the_device_alive() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let small = Tmpfs::over(scratch.path("small"), MIB);
    let out = small.place.join("out.qcow2");
    let device =
        attach(args!["--overlay", "--scratch-dir", scratch.directory(), "-f", "raw", &image]);
    fs::write(&device.path, Random(5).bytes(4 << 20)).unwrap();
    refused(args![&device.name, &out], 73, &["out.qcow2", "no space"]);
    assert_eq!(fs::read_dir(&small.place).unwrap().count(), 0);
    assert_alive(&device);
    fs::write(&out, "old").unwrap();
    refused(args![&device.name, &out], 73, &["--force"]);
    refused(args![&device.name, "--force", &out], 73, &["no space"]);
    assert_eq!(fs::read(&out).unwrap(), b"old");
    assert_alive(&device);
    device.detach();
}

#[test]
fn an_output_on_the_device_itself_is_refused_before_anything_waits() {
    let scratch = Scratch::on_disk();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "128M");
    let device = attach(args!["--overlay", "--scratch-dir", scratch.directory(), &image]);
    let place = scratch.path("mnt");
    fs::create_dir(&place).unwrap();
    tool("mkfs.ext4", args!["-q", "-F", &device.path]);
    let mounted = OnDevice::mount(&device.path, &place);
    refused(args![&device.name, place.join("out")], 64, &["out", "lies on the device 'disk'"]);
    symlink(place.join("there"), scratch.path("link")).unwrap();
    refused(args![&device.name, scratch.path("link")], 64, &["lies on the device"]);
    refused(args![&device.name, "--force", &device.path], 75, &["in use"]);
    // A file system in a file on it, and one that is mounted over it.
    let inner = Mounted::make("ext4", &place, 8 * MIB);
    refused(args![&device.name, inner.place.join("out")], 64, &["lies on the device"]);
    drop(inner);
    let union = scratch.path("union");
    for directory in [&union, &place.join("upper"), &place.join("work")] {
        fs::create_dir(directory).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        scratch.directory().display(),
        place.join("upper").display(),
        place.join("work").display()
    );
    tool("mount", args!["-t", "overlay", "-o", options, "none", &union]);
    refused(args![&device.name, union.join("out")], 64, &["lies on the device"]);
    tool("umount", args![&union]);
    // Where it says what it does.
    let mut line = export_command(args![&device.name, scratch.path("out")]);
    line.stderr(File::create(place.join("log")).unwrap());
    assert_eq!(line.status().unwrap().code(), Some(64));
    drop(line);
    // By the program that lies on it.
    tool("cp", args![imgdm_path(), place.join("imgdm")]);
    let program = place.join("imgdm");
    let said = run(&mut command(&program, args!["export", &device.name, scratch.path("out")]));
    assert!(said.code() == Some(75) && said.stderr.contains("program"), "{said}");
    assert!(!scratch.path("out").exists());
    assert_alive(&device);
    mounted.end();
    device.detach();
}

#[test]
fn an_output_on_a_mount_that_hides_the_device_is_refused() {
    let scratch = Scratch::on_disk();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "48M");
    let device = attach(args!["--overlay", "--scratch-dir", scratch.directory(), &image]);
    let (place, union) = (scratch.path("mnt"), scratch.path("union"));
    tool("mkfs.ext4", args!["-q", "-F", &device.path]);
    fs::create_dir(&place).unwrap();
    fs::create_dir(&union).unwrap();
    tool("mount", args![&device.path, &place]);
    for directory in ["lower", "upper", "work"] {
        fs::create_dir(place.join(directory)).unwrap();
    }
    let at = place.display();
    let options = format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work");
    tool("mount", args!["-t", "overlay", "-o", options, "none", &union]);
    // As the root of a live system: what it is made of is mounted, and nowhere to be seen.
    tool("umount", args!["-l", &place]);
    refused(args![&device.name, union.join("out")], 64, &["lies on the device 'disk'"]);
    assert_eq!(suspended(), Vec::<String>::new());
    tool("umount", args![&union]);
    // Held by nobody any more.
    export(args![&device.name, scratch.path("out")]);
    device.detach();
}

#[test]
fn what_has_no_changes_to_export_is_explained() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let out = scratch.path("out");
    refused(args!["disk", &out], 66, &["'disk'"]);
    refused(args![&image, &out], 66, &["store of a writable device"]);
    refused(args![scratch.path("none"), &out], 66, &["none"]);
    let device = attach(args!["-f", "raw", &image]);
    refused(args!["disk", &out], 64, &["takes no writes", "--overlay"]);
    refused(args![&image, &out], 64, &["takes no writes"]);
    device.detach();
    // A store by its bare name is taken for the name of a device.
    let store = scratch.path("store");
    attach(args![kept(&store), "-f", "raw", &image]).detach();
    let mut line = export_command(["store", "out"]);
    let said = run(line.current_dir(scratch.directory())).refused(66);
    assert!(said.contains("./store"), "{said}");
    // Neither the image nor the store is written over.
    refused(args![&store, "--force", &image], 64, &["disk.raw", "part of what is exported"]);
    refused(args![&store, "--force", &store], 64, &["part of what is exported"]);
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    refused(args!["disk", "--force", &image], 64, &["part of what is exported"]);
    refused(args!["disk", "--force", &store], 64, &["part of what is exported"]);
    refused(args!["disk", "--image", &image, &out], 64, &["--image"]);
    refused(args!["disk", "-c", "--subclusters", &out], 64, &["--subclusters"]);
    let large = "cluster_size=2M";
    refused(args!["disk", "--subclusters", "-o", large, &out], 64, &["at most 524288"]);
    // By the store of one that is attached.
    export(args![&store, &out]);
    device.detach();
    assert!(out.exists());
}

#[test]
fn a_store_that_was_given_up_is_refused_by_name() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let small = Tmpfs::over(scratch.path("small"), MIB);
    let (store, out) = (small.place.join("store"), scratch.path("out"));
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    let file = File::options().write(true).open(&device.path).unwrap();
    let written = file.write_all_at(&Random(9).bytes(3 << 20), 0).and_then(|()| file.sync_all());
    assert!(written.is_err());
    drop(file);
    wait_for("the store to be given up", || listed()[0]["overlay"]["state"] == "invalid");
    refused(args![&device.name, &out], 65, &["given up the store of 'disk'", "lost", "unhurt"]);
    assert_eq!(suspended(), Vec::<String>::new());
    imgdm(args!["detach", &device.name]).ok();
    refused(args![&store, &out], 65, &["store", "given the store up", "unhurt"]);
    assert!(!out.exists());
}

#[test]
fn the_image_of_a_store_is_found_again_and_no_other_is_taken_for_it() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let (store, out) = (scratch.path("store"), scratch.path("out.qcow2"));
    let device = attach(args![kept(&store), &image]);
    let mut wanted = device.bytes();
    write_randomly(&device.path, &mut wanted, 71, 20);
    device.detach();
    let other = scratch.create("qcow2", &[], "other.qcow2", "4M");
    refused(args![&store, "--image", &other, &out], 65, &["store", "another image"]);
    // Moved.
    let moved = scratch.path("moved.qcow2");
    fs::rename(&image, &moved).unwrap();
    refused(args![&store, &out], 66, &["disk.qcow2", "--image"]);
    let said = export(args![&store, "--image", &moved, &out]);
    assert_eq!(said["backing_file"]["path"], moved.to_str().unwrap());
    assert_image(&scratch, &out, &wanted);
    // By a name of the user's own.
    let options = args!["--backing", "moved.qcow2", "-F", "qcow2", "--force"];
    export(args![&store, "--image", &moved, &out].into_iter().chain(options));
    assert_image(&scratch, &out, &wanted);
    let printed = qemu_img(args!["info", "--output=json", &out]).ok();
    let info: Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(info["backing-filename"], "moved.qcow2");
    refused(
        args![
            &store,
            "--image",
            &moved,
            "--backing",
            "other.qcow2",
            "-F",
            "qcow2",
            "--force",
            &out
        ],
        64,
        &["can't be the backing file", "4194304"],
    );
    // Changed since.
    fs::rename(&moved, &image).unwrap();
    write_image(&image, "qcow2", &["write -P 1 0 512"]);
    refused(args![&store, "--force", &out], 65, &["was changed since", "disk.qcow2"]);
    assert_eq!(files.len(), 3);
}

#[test]
fn a_snapshot_needs_an_image_of_its_own_to_lie_on() {
    let scratch = Scratch::on_disk();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "4M");
    write_image(&image, "qcow2", &["write -P 1 0 1M"]);
    qemu_img(args!["snapshot", "-c", "then", &image]).ok();
    write_image(&image, "qcow2", &["write -P 2 0 2M"]);
    let (base, out) = (scratch.path("base.qcow2"), scratch.path("out.qcow2"));
    let device = attach(args!["--overlay", "-l", "then", &image]);
    let mut wanted = device.bytes();
    write_randomly(&device.path, &mut wanted, 81, 5);
    refused(args![&device.name, &out], 76, &["snapshot 'then'", "--backing", "convert"]);
    qemu_img(args!["convert", "-O", "qcow2", "-l", "then", &image, &base]).ok();
    refused(args![&device.name, "--backing", &base, &out], 64, &["-F"]);
    export(args![&device.name, "--backing", &base, "-F", "qcow2", &out]);
    assert_image(&scratch, &out, &wanted);
    device.detach();
}

#[test]
fn an_image_without_a_name_or_of_a_format_that_qemu_does_not_read_is_explained() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let out = scratch.path("out.qcow2");
    let device = attach(args!["--overlay", "-f", "raw", &image]);
    let mut wanted = fs::read(&image).unwrap();
    let copy = scratch.path("copy.raw");
    fs::copy(&image, &copy).unwrap();
    write_randomly(&device.path, &mut wanted, 91, 9);
    fs::remove_file(&image).unwrap();
    refused(args![&device.name, &out], 66, &["was removed", "--backing"]);
    export(args![&device.name, "--backing", &copy, "-F", "raw", &out]);
    assert_image(&scratch, &out, &wanted);
    device.detach();
    assert_nothing_left();
}

#[test]
fn an_image_on_a_device_of_device_mapper_is_named_by_the_name_that_it_keeps() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let out = scratch.path("out.qcow2");
    let node = tool("losetup", args!["--show", "-f", &image]);
    let table = format!("0 8192 linear {} 0", node.trim());
    tool("dmsetup", ["create", "--noudevsync", "volume", "--table", &table]);
    let store = scratch.path("store");
    let volume = Path::new("/dev/mapper/volume");
    let device = attach(args![kept(&store), "--name=disk", "-f", "raw", volume]);
    let mut wanted = fs::read(&image).unwrap();
    write_randomly(&device.path, &mut wanted, 101, 5);
    let said = export(args![&device.name, &out]);
    assert_eq!(said["backing_file"]["path"], "/dev/mapper/volume");
    assert_image(&scratch, &out, &wanted);
    device.detach();
    // The store names it now, which is not the user's word.
    let said = imgdm(args!["export", &store, "--force", &out]).refused(77);
    assert!(said.contains("--allow-path=/dev/mapper/volume"), "{said}");
    let said = export(args![&store, "--force", "--allow-path=/dev/mapper/volume", &out]);
    assert_eq!(said["backing_file"]["path"], "/dev/mapper/volume");
    assert_image(&scratch, &out, &wanted);
    tool("dmsetup", ["remove", "--noudevsync", "volume"]);
    tool("losetup", ["-d", node.trim()]);
}
