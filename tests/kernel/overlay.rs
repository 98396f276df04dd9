//! Writable devices: what is written to them, and what becomes of the image and the store.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::libc;
use serde_json::Value;

use crate::args;
use crate::encrypted::{Encrypted, PATTERN};
use crate::faults::{faulty, steps};
use crate::guest::*;
use crate::lvm::{GROUP, Host};

/// Content and times of files: what must not change while they are attached.
pub(crate) fn untouched(files: &[PathBuf]) -> Vec<(Vec<u8>, [i64; 6])> {
    let look = |file: &PathBuf| {
        let m = fs::metadata(file).unwrap();
        let times =
            [m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
        let flags = libc::O_NOATIME;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(file).unwrap();
        let mut bytes = vec![0; usize::try_from(m.len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (bytes, times)
    };
    files.iter().map(look).collect()
}

/// Writes random pieces to the device, of whole sectors and not, and the same to `wanted`.
pub(crate) fn write_randomly(device: &Path, wanted: &mut [u8], seed: u64, count: u64) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    let mut random = Random(seed);
    for _ in 0..count {
        let at = random.below(wanted.len() as u64);
        let most = (wanted.len() as u64 - at).min(40 * KIB);
        let bytes = random.below(most).max(1);
        let bytes = random.bytes(usize::try_from(bytes).unwrap());
        file.write_all_at(&bytes, at).unwrap();
        let at = usize::try_from(at).unwrap();
        wanted[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    file.sync_all().unwrap();
}

/// A chain of two qcow2 images over a raw one of 3 MiB and a bit, and all its files.
pub(crate) fn chain(scratch: &Scratch) -> (PathBuf, Vec<PathBuf>) {
    let base = scratch.path("base.raw");
    fs::write(&base, Random(3).bytes(3 * 1024 * 1024 + 3 * 512)).unwrap();
    let middle = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "middle.qcow2", "");
    write_image(&middle, "qcow2", &["write -P 7 512k 300k", "write -z 1M 128k"]);
    let top = scratch.create("qcow2", &["-b", "middle.qcow2", "-F", "qcow2"], "disk.qcow2", "");
    write_image(&top, "qcow2", &["write -P 9 600k 64k", "write -P 5 3M 1k"]);
    (top.clone(), vec![top, middle, base])
}

/// A raw image of 4 MiB.
pub(crate) fn raw(scratch: &Scratch) -> PathBuf {
    let image = scratch.path("disk.raw");
    fs::write(&image, Random(11).bytes(4 << 20)).unwrap();
    // Read later than written by the clock of the kernel's ticks: else the next who reads it,
    // QEMU perhaps, moves its access time once more (relatime).
    std::thread::sleep(Duration::from_millis(50));
    fs::read(&image).unwrap();
    image
}

pub(crate) fn kept(store: &Path) -> String {
    format!("--overlay={}", store.display())
}

/// What `list` says of the only device's store.
#[track_caller]
fn overlay() -> Value {
    let all = listed();
    assert_eq!(all.len(), 1, "{all:?}");
    all[0]["overlay"].clone()
}

/// Attaches with `options`, writes at random, compares, detaches; the files stay as they are.
#[track_caller]
fn assert_writable(options: &[std::ffi::OsString], files: &[PathBuf], seed: u64) {
    let plain: Vec<_> =
        options.iter().filter(|o| !o.to_string_lossy().contains("overlay")).collect();
    let device = attach(&plain);
    let mut wanted = device.bytes();
    device.detach();
    let before = untouched(files);
    let device = attach(options);
    assert_same("before it is written", &device.bytes(), &wanted);
    write_randomly(&device.path, &mut wanted, seed, 40);
    assert_same("after it was written", &device.bytes(), &wanted);
    // The last sectors need not be a whole chunk.
    let end = wanted.len() - 1024;
    wanted[end..].fill(0xee);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[0xee; 1024], end as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_same("after its end was written", &device.bytes(), &wanted);
    assert_random_reads(&device.path, &wanted, seed + 1);
    assert_eq!(imgdm(["verify", &device.name]).code(), Some(0));
    device.detach();
    assert_nothing_left();
    assert!(untouched(files) == before, "a file of the image was touched");
}

#[test]
fn what_is_written_is_read_again_and_the_image_stays_as_it_was() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let into = args!["--overlay", "--scratch-dir", scratch.directory(), &image];
    assert_writable(&into, &files, 5);
    assert_eq!(fs::read_dir(scratch.directory()).unwrap().count(), files.len());
    let raw = raw(&scratch);
    assert_writable(&args!["--overlay", "-f", "raw", &raw], std::slice::from_ref(&raw), 6);
    let options =
        args!["--overlay", "--direct-io=on", "--scratch-dir", scratch.directory(), &image];
    assert_writable(&options, &files, 7);
}

#[test]
fn compressed_and_encrypted_images_and_snapshots_are_written_over_too() {
    let scratch = Scratch::new();
    let text = crate::compressed::text(&scratch, "text.qcow2", &[]);
    let into = args!["--overlay", "--scratch-dir", scratch.directory(), &text];
    assert_writable(&into, std::slice::from_ref(&text), 8);
    let luks = Encrypted::luks(&scratch, "luks.qcow2", "");
    luks.write(PATTERN);
    let key = luks.key_file(&scratch);
    let options = args!["--overlay", "--key-file", &key, &luks.path];
    assert_writable(&options, std::slice::from_ref(&luks.path), 9);
    let (image, files) = chain(&scratch);
    qemu_img(args!["snapshot", "-c", "before", &image]).ok();
    write_image(&image, "qcow2", &["write -P 0x55 0 2M"]);
    assert_writable(&args!["--overlay", "-l", "before", &image], &files, 10);
}

#[test]
fn file_systems_are_made_checked_and_filled_on_it() {
    let scratch = Scratch::on_disk();
    let image = scratch.create("qcow2", &[], "disk.qcow2", "512M");
    let before = sha256(&image);
    let device = attach(args!["--overlay", "--scratch-dir", scratch.directory(), &image]);
    let node = device.path.display();
    for (make, check) in [("mkfs.ext4 -q -F", "fsck.ext4 -fn"), ("mkfs.xfs -q -f", "xfs_repair -n")]
    {
        sh(&format!(
            "mkdir -p /run/over; {make} {node}; mount {node} /run/over; \
             for n in $(seq 50); do head -c 20000 /dev/urandom >/run/over/$n; done; \
             sha256sum /run/over/[0-9]* >/run/sums; umount /run/over; {check} {node} 2>&1; \
             mount {node} /run/over; sha256sum -c --quiet /run/sums"
        ));
        // A mounted one is busy, and says by what.
        let said = imgdm(["detach", &device.name]).refused(75);
        assert!(said.contains("the mount /run/over"), "{said}");
        sh("umount /run/over");
    }
    device.detach();
    assert_nothing_left();
    assert_eq!(sha256(&image), before);
}

#[test]
fn a_kept_store_has_it_all_again() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let mut wanted = qemu_content(&scratch, &image, &[]);
    let before = untouched(&files);
    let store = scratch.path("disk.store");
    for round in 0..3 {
        let device = attach(args![kept(&store), &image]);
        assert_same(&format!("round {round}"), &device.bytes(), &wanted);
        write_randomly(&device.path, &mut wanted, 70 + round, 20);
        assert_same(&format!("written in round {round}"), &device.bytes(), &wanted);
        let said = overlay();
        assert_eq!((&said["kept"], &said["state"]), (&true.into(), &"usable".into()));
        assert_eq!(said["store"]["path"], store.display().to_string());
        assert!(said["used"].as_u64().unwrap() > 100 * KIB, "{said}");
        let human = imgdm(["list"]).ok();
        assert!(human.contains(" bytes of its store used; "), "{human}");
        // The image or its content changes nothing about it.
        let renamed = scratch.path("renamed.store");
        if round == 1 {
            fs::rename(&store, &renamed).unwrap();
        }
        device.detach();
        assert_nothing_left();
        if round == 1 {
            fs::rename(&renamed, &store).unwrap();
            // A copy that keeps its times is the same image.
            sh(&format!("cd '{}'; cp -p base.raw b; mv b base.raw", scratch.directory().display()));
        }
    }
    assert_eq!(fs::metadata(&store).unwrap().mode() & 0o777, 0o600);
    let content =
        |all: &[(Vec<u8>, [i64; 6])]| all.iter().map(|one| one.0.clone()).collect::<Vec<_>>();
    assert!(content(&untouched(&files)) == content(&before), "a file of the image was touched");
}

#[test]
fn what_was_synced_survives_a_removal_without_us() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let mut wanted = fs::read(&image).unwrap();
    let store = scratch.path("store");
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    write_randomly(&device.path, &mut wanted, 21, 30);
    tool("dmsetup", ["remove", "--noudevsync", &device.name]);
    let _ = fs::remove_file(&device.path);
    assert_nothing_left_soon();
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    assert_same("afterwards", &device.bytes(), &wanted);
    device.detach();
    // The store of a device that goes with it leaves nothing on its file system.
    let free = free_bytes(scratch.directory());
    let device =
        attach(args!["--overlay", "--scratch-dir", scratch.directory(), "-f", "raw", &image]);
    write_randomly(&device.path, &mut wanted, 22, 30);
    assert!(free_bytes(scratch.directory()) < free - 300 * KIB);
    tool("dmsetup", ["remove", "--noudevsync", &device.name]);
    let _ = fs::remove_file(&device.path);
    assert_nothing_left_soon();
    wait_for("its space to be free", || free_bytes(scratch.directory()) >= free);
}

#[test]
fn killed_at_any_step_attach_leaves_nothing_or_an_empty_store() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let mut wanted = qemu_content(&scratch, &image, &[]);
    let before = untouched(&files);
    let store = scratch.path("store");
    let option = kept(&store);
    for options in [["--overlay"], [&option]] {
        let is_kept = options == [option.as_str()];
        for step in steps(&options, &image) {
            let ran = run(&mut faulty(&options, &image, &format!("{step}:kill")));
            assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
            if ["commit", "publish"].contains(&step.as_str()) {
                let _ = attach(args![options[0], &image]);
                imgdm(args!["detach", &image]).ok();
            } else if !within(SETTLE, || left(Some(scratch.directory())).is_empty()) {
                panic!("killed after {step}: {:#?}", left(Some(scratch.directory())));
            }
            // What is there is a whole store.
            if is_kept && store.exists() {
                attach(args![&option, &image]).detach();
                fs::remove_file(&store).unwrap();
            }
        }
    }
    // With something in it, it is as it was.
    let device = attach(args![&option, &image]);
    write_randomly(&device.path, &mut wanted, 31, 20);
    device.detach();
    for step in steps(&[&option], &image).iter().skip(1).step_by(3) {
        run(&mut faulty(&[&option], &image, &format!("{step}:kill")));
        let _ = within(SETTLE, || our_devices().is_empty());
        let device = attach(args![&option, &image]);
        assert_same(&format!("killed after {step}"), &device.bytes(), &wanted);
        device.detach();
        assert_nothing_left();
    }
    assert!(untouched(&files) == before, "a file of the image was touched");
}

#[test]
fn failing_at_any_step_attach_takes_a_new_store_away_and_leaves_an_old_one() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let store = scratch.path("store");
    let option = kept(&store);
    let options = ["-f", "raw", option.as_str()];
    for step in steps(&options, &image) {
        let _ = fs::remove_file(&store);
        let said = run(&mut faulty(&options, &image, &format!("{step}:fail"))).refused(1);
        assert!(said.contains("fault injected") && !said.contains("left behind"), "{said}");
        assert_nothing_left();
        assert!(!store.exists(), "{step}");
        attach(args!["-f", "raw", &option, &image]).detach();
        run(&mut faulty(&options, &image, &format!("{step}:fail"))).refused(1);
        assert!(store.exists(), "{step}");
    }
}

#[test]
fn an_image_that_was_changed_and_other_images_and_snapshots_are_refused() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let store = scratch.path("store");
    attach(args![kept(&store), &image]).detach();
    let before = fs::read(&store).unwrap();
    let refused = |options: &[&str], image: &Path, code: i32, words: &[&str]| {
        let options: Vec<_> = options.iter().map(std::ffi::OsString::from).collect();
        let line = args!["attach", kept(&store)].into_iter().chain(options).chain([image.into()]);
        let said = imgdm(line).refused(code);
        for word in words.iter().chain(&[&*store.display().to_string()]) {
            assert!(said.contains(word), "no '{word}' in: {said}");
        }
        assert_nothing_left();
    };
    let other = scratch.create("qcow2", &[], "other.qcow2", "1M");
    refused(&[], &other, 65, &["another image", "disk.qcow2"]);
    refused(&["--on-error=zero"], &image, 65, &["--on-error=refuse"]);
    // A base that was written to.
    let modified = fs::metadata(&files[2]).unwrap().modified().unwrap();
    patch(&files[2], 2 << 20, b"changed");
    refused(&[], &image, 65, &["was changed since", "base.raw", "written to since"]);
    File::options().write(true).open(&files[2]).unwrap().set_modified(modified).unwrap();
    attach(args![kept(&store), &image]).detach();
    // A base that has become longer.
    File::options().append(true).open(&files[2]).unwrap().set_len(4 << 20).unwrap();
    refused(&[], &image, 65, &["base.raw", "bytes long"]);
    File::options().write(true).open(&files[2]).unwrap().set_len(3 * MIB + 3 * 512).unwrap();
    File::options().write(true).open(&files[2]).unwrap().set_modified(modified).unwrap();
    attach(args![kept(&store), &image]).detach();
    qemu_img(args!["snapshot", "-c", "now", &image]).ok();
    refused(&[], &image, 65, &["was changed since", "disk.qcow2"]);
    let second = scratch.path("second.store");
    attach(args![kept(&second), &image]).detach();
    let said = imgdm(args!["attach", kept(&second), "-l", "now", &image]).refused(65);
    assert!(said.contains("of the active layer") && said.contains("snapshot 'now'"), "{said}");
    assert!(fs::read(&store).unwrap() == before, "the store was touched");
}

#[test]
fn what_is_no_store_or_a_damaged_one_is_refused_and_left_alone() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let refused = |file: &Path, code: i32, word: &str| {
        let said = imgdm(args!["attach", "-f", "raw", kept(file), &image]).refused(code);
        assert!(said.contains(word), "no '{word}' in: {said}");
        assert_nothing_left();
    };
    let letter = scratch.path("letter");
    fs::write(&letter, "Dear Sir or Madam").unwrap();
    refused(&letter, 73, "no store of imgdm");
    assert_eq!(fs::read(&letter).unwrap(), b"Dear Sir or Madam");
    refused(&image, 64, "a file of the image");
    refused(scratch.directory(), 73, "a directory");
    refused(&block_device(), 73, "a block device");
    refused(&scratch.path("missing/store"), 73, "no such directory");
    let store = scratch.path("store");
    let damaged = |damage: &dyn Fn(&Path), word: &str| {
        let _ = fs::remove_file(&store);
        attach(args!["-f", "raw", kept(&store), &image]).detach();
        damage(&store);
        let before = fs::read(&store).unwrap();
        refused(&store, 65, word);
        assert!(fs::read(&store).unwrap() == before, "the store was touched");
    };
    damaged(&|store| patch(store, 60, b"!"), "header of the store is damaged");
    damaged(&|store| patch(store, 16, &[9]), "version 9");
    damaged(&|store| patch(store, MIB, b"!"), "magic");
    damaged(&|store| patch(store, MIB + 4, &[0]), "has given the store up");
    damaged(
        &|store| File::options().write(true).open(store).unwrap().set_len(2 * MIB).unwrap(),
        "cut off",
    );
    // Exceptions that would make the kernel panic, were it given them: its count of a run of
    // chunks, in the upper bits of the second number, would go from 255 to 0.
    let pairs = [1u64, 0xff << 56 | 6, 0, 5].map(u64::to_le_bytes).concat();
    damaged(&|store| patch(store, MIB + 16 * KIB, &pairs), "past its end");
    // What the chain's files are refused for, evidence is too.
    let said = imgdm(args!["attach", "--overlay", "--evidence", &image]).refused(64);
    assert!(said.contains("--evidence") && said.contains("--overlay"), "{said}");
    let said = imgdm(args!["attach", "-U", kept(&store), "-f", "raw", &image]).refused(64);
    assert!(said.contains("--force-share"), "{said}");
    let said = imgdm(args!["attach", "--overlay", "--overlay-size=4k", "-f", "raw", &image]);
    assert!(said.refused(64).contains("at least 1048576"));
}

#[test]
fn a_store_in_use_is_refused_whoever_uses_it() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let other = scratch.path("copy.raw");
    tool("cp", args!["-p", &image, &other]);
    let store = scratch.path("store");
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    let said = imgdm(args!["attach", kept(&store), "-f", "raw", "--name=x", &image]).refused(75);
    assert!(said.contains("in use") && said.contains("store"), "{said}");
    // A copy that keeps its times is the same image, and the store is in use all the same.
    imgdm(args!["attach", kept(&store), "-f", "raw", &other]).refused(75);
    let ran = qemu_io(&store, "raw", &["write 0 512"]);
    assert!(ran.stderr.contains("lock"), "{ran}");
    // Again is no other use, and with another store it is refused.
    let again = attach(args![kept(&store), "-f", "raw", &image]);
    assert_eq!(again, device);
    let elsewhere = scratch.path("elsewhere");
    let said = imgdm(args!["attach", kept(&elsewhere), "-f", "raw", &image]).refused(73);
    assert!(said.contains("another store") && said.contains("store"), "{said}");
    assert!(!elsewhere.exists());
    let said = imgdm(args!["attach", "-f", "raw", &image]).refused(73);
    assert!(said.contains("other options"), "{said}");
    // The store stands for the device.
    imgdm(args!["detach", &store]).ok();
    assert_nothing_left();
    // A QEMU that has it open.
    let writer = Writer::open(&store, "raw");
    imgdm(args!["attach", kept(&store), "-f", "raw", &image]).refused(75);
    writer.close();
}

#[test]
fn a_store_that_is_full_fails_writes_keeps_what_is_in_it_and_goes_on_once_it_is_larger() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let mut wanted = fs::read(&image).unwrap();
    wanted[..512 << 10].fill(7);
    let before = untouched(std::slice::from_ref(&image));
    let store = scratch.path("store");
    for options in [vec!["--overlay".to_owned()], vec![kept(&store)]] {
        let is_kept = options[0] != "--overlay";
        let device = attach(args![&options[0], "--overlay-size=1M", "-f", "raw", &image]);
        let file = OpenOptions::new().write(true).open(&device.path).unwrap();
        file.write_all_at(&[7; 512 << 10], 0).and_then(|()| file.sync_all()).unwrap();
        let written = file.write_all_at(&[8; 2 << 20], 1 << 20).and_then(|()| file.sync_all());
        assert!(written.is_err());
        drop(file);
        let said = overlay();
        assert_eq!((&said["state"], &said["used"]), (&"full".into(), &Value::Null), "{said}");
        assert!(imgdm(["list"]).ok().contains("its store is full"));
        assert_same("what was written", &device.bytes()[..1 << 20], &wanted[..1 << 20]);
        assert_same("what was not", &device.bytes()[3 << 20..], &wanted[3 << 20..]);
        let file = OpenOptions::new().write(true).open(&device.path).unwrap();
        let written = file.write_all_at(&[9; 4096], 0).and_then(|()| file.sync_all());
        assert!(written.is_err(), "also where there is a place for it");
        drop(file);
        // All that was written without an error goes into an overlay of the image.
        let out = scratch.path("out.qcow2");
        imgdm(args!["export", "--force", &device.name, &out]).ok();
        let exported = qemu_content(&scratch, &out, &[]);
        assert_same("exported", &exported[..1 << 20], &wanted[..1 << 20]);
        assert_eq!(imgdm(["verify", &device.name]).code(), Some(0));
        let ran = imgdm(["detach", &device.name]);
        assert_eq!(ran.code(), Some(0), "{ran}");
        assert_eq!(ran.stderr.contains("this store is full"), is_kept, "{ran}");
        assert_nothing_left();
    }
    let device = attach(args![kept(&store), "--overlay-size=4M", "-f", "raw", &image]);
    assert_same("kept", &device.bytes()[..1 << 20], &wanted[..1 << 20]);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[8; 2 << 20], 1 << 20).and_then(|()| file.sync_all()).unwrap();
    drop(file);
    wanted[1 << 20..3 << 20].fill(8);
    assert_same("with more room", &device.bytes(), &wanted);
    device.detach();
    assert!(untouched(&[image]) == before);
}

#[test]
fn a_store_that_an_earlier_imgdm_attached_is_known_and_given_up_when_it_is_full() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let store = scratch.path("store");
    let device = attach(args![kept(&store), "--overlay-size=1M", "-f", "raw", &image]);
    let table = tool("dmsetup", ["table", &device.name]);
    assert!(table.contains(" PO "), "{table}");
    sh(&format!(
        "dmsetup suspend --noudevsync {0}; dmsetup load {0} --table '{1}'; \
         dmsetup resume --noudevsync {0}",
        device.name,
        table.trim().replace(" PO ", " P ")
    ));
    assert_eq!(attach(args![kept(&store), "-f", "raw", &image]), device);
    assert_eq!(imgdm(["verify", &device.name]).code(), Some(0));
    assert_eq!(overlay()["state"], "usable");
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    let written = file.write_all_at(&[7; 2 << 20], 0).and_then(|()| file.sync_all());
    assert!(written.is_err());
    drop(file);
    assert_eq!(overlay()["state"], "invalid");
    assert!(imgdm(["list"]).ok().contains("given up by the kernel"));
    let ran = imgdm(["detach", &device.name]);
    assert_eq!(ran.code(), Some(0), "{ran}");
    assert!(ran.stderr.contains("has given this store up"), "{ran}");
    assert_nothing_left();
    let said = imgdm(args!["attach", kept(&store), "-f", "raw", &image]).refused(65);
    assert!(said.contains("has given the store up"), "{said}");
}

#[test]
fn a_file_system_that_is_full_gives_the_store_up_and_the_image_is_unhurt() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let before = untouched(std::slice::from_ref(&image));
    let small = Tmpfs::over(scratch.path("small"), MIB);
    let device = attach(args!["--overlay", "--scratch-dir", &small.place, "-f", "raw", &image]);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    let written = file.write_all_at(&[7; 3 << 20], 0).and_then(|()| file.sync_all());
    assert!(written.is_err());
    drop(file);
    wait_for("the store to be given up", || overlay()["state"] == "invalid");
    device.detach();
    assert_nothing_left();
    assert!(untouched(&[image]) == before);
}

#[test]
fn places_that_take_no_store_are_named_with_the_reason() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let refused = |options: &[std::ffi::OsString], image: &Path, code: i32, words: &[&str]| {
        let line = args!["attach"].into_iter().chain(options.iter().cloned());
        let said = imgdm(line.chain([image.into()])).refused(code);
        for word in words {
            assert!(said.contains(word), "no '{word}' in: {said}");
        }
        assert_nothing_left();
    };
    let closed = scratch.path("closed");
    fs::create_dir(&closed).unwrap();
    tool("chattr", args!["+i", &closed]);
    refused(&args![kept(&closed.join("store")), "-f", "raw"], &image, 77, &["closed/store"]);
    tool("chattr", args!["-i", &closed]);
    let read_only = Tmpfs::read_only(scratch.path("ro"));
    let in_read_only = kept(&read_only.place.join("store"));
    refused(&args![in_read_only, "-f", "raw"], &image, 73, &["ro/store", "read-only"]);
    // One that is there already, on a file system that has become read-only.
    let place = Tmpfs::over(scratch.path("place"), 8 * MIB);
    let store = place.place.join("store");
    attach(args![kept(&store), "-f", "raw", &image]).detach();
    tool("mount", args!["-o", "remount,ro", &place.place]);
    refused(&args![kept(&store), "-f", "raw"], &image, 73, &["place/store", "read-only"]);
    tool("mount", args!["-o", "remount,rw", &place.place]);
    let tiny = Tmpfs::over(scratch.path("tiny"), 4096);
    let in_tiny = kept(&tiny.place.join("store"));
    refused(&args![in_tiny, "-f", "raw"], &image, 73, &["tiny/store", "full"]);
    refused(&args!["--overlay", "--scratch-dir", &tiny.place, "-f", "raw"], &image, 73, &["full"]);
    assert_eq!(fs::read_dir(&tiny.place).unwrap().count(), 0);
    // ext4 takes no file of more than 16 TiB.
    let large = scratch.create("qcow2", &[], "large.qcow2", "20T");
    let into = scratch.directory();
    refused(&args![kept(&into.join("s"))], &large, 73, &["no file that long", "--overlay-size"]);
    refused(&args!["--overlay", "--scratch-dir", into], &large, 73, &["no file that long"]);
    let limited = args!["--overlay", "--overlay-size=1G", "--scratch-dir", into, &large];
    let device = attach(limited);
    assert_eq!(overlay()["total"], 1 << 30);
    device.detach();
    assert!(!into.join("s").exists());
}

#[test]
fn a_store_can_be_made_larger() {
    let scratch = Scratch::on_disk();
    let image = raw(&scratch);
    let mut wanted = fs::read(&image).unwrap();
    let store = scratch.path("store");
    let with =
        |size: &str| args![kept(&store), format!("--overlay-size={size}"), "-f", "raw", &image];
    let device = attach(with("1M"));
    assert_eq!(overlay()["total"], MIB);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[3; 600 << 10], 0).unwrap();
    wanted[..600 << 10].fill(3);
    drop(file);
    device.detach();
    let said = imgdm(args!["attach"].into_iter().chain(with("1048064"))).refused(64);
    assert!(said.contains("larger, and not smaller") || said.contains("at least"), "{said}");
    // Blocks are of 512 bytes for one shell and 1024 for another.
    let line = args!["-c", "ulimit -f 4500; exec \"$@\"", "sh", imgdm_path(), "attach"];
    let said = run(&mut command("sh", line.into_iter().chain(with("4M")))).refused(73);
    assert!(said.contains("RLIMIT_FSIZE"), "{said}");
    let device = attach(with("4M"));
    assert_eq!(overlay()["total"], 4 * MIB);
    // Where it is attached, nothing would come of another size.
    assert_eq!(attach(with("4M")), device);
    let said = imgdm(args!["attach"].into_iter().chain(with("3M"))).refused(73);
    assert!(said.contains("a store of 4194304 bytes, where 3145728 are asked for"), "{said}");
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[4; 2 << 20], 1 << 20).unwrap();
    wanted[1 << 20..3 << 20].fill(4);
    drop(file);
    device.detach();
    let device = attach(args![kept(&store), "-f", "raw", &image]);
    assert_same("after it has grown", &device.bytes(), &wanted);
    device.detach();
}

#[test]
fn partitions_and_logical_volumes_on_it_take_writes_and_nothing_below_does() {
    let scratch = Scratch::on_disk();
    let host = Host::new(&scratch);
    let [first, second] = &host.loops[..] else { panic!("{:?}", host.loops) };
    host.lvm(&format!("pvcreate -qq {first} {second}"));
    host.lvm(&format!("vgcreate -qq -s 1M {GROUP} {first} {second}"));
    host.lvm(&format!("lvcreate -qq -y -Wn -Zn -L 4M -n root {GROUP} {first}"));
    host.leave();
    let before = untouched(std::slice::from_ref(&host.raw));
    let volume = format!("--lv={GROUP}/root");
    let options = args!["attach", "--overlay", "--partitions", volume, "-f", "raw", &host.raw];
    let printed = imgdm(&options).ok();
    let paths: Vec<_> = printed.lines().map(PathBuf::from).collect();
    assert_eq!(paths.len(), 4, "{printed}");
    // Each is written, and shows on the disk.
    for (number, path) in paths.iter().enumerate() {
        let byte = 0xa0 + u8::try_from(number).unwrap();
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.write_all_at(&[byte; 4096], 2 << 20).unwrap();
        file.sync_all().unwrap();
        assert_eq!(read_direct(path, 2 << 20, 4096).unwrap(), [byte; 4096]);
    }
    assert_eq!(read_direct(&paths[0], 3 << 20, 4096).unwrap(), [0xa1; 4096]);
    // Below, nothing takes a write.
    for (name, uuid) in dm_devices() {
        let table = tool("dmsetup", ["info", "-c", "--noheadings", "-o", "attr", &name]);
        let is_inner = uuid.contains("-inner");
        assert_eq!(table.trim().ends_with('r'), is_inner, "{name}: {table}");
    }
    assert_eq!(imgdm(["verify", "guest"]).code(), Some(0));
    assert_eq!(imgdm(&options).ok(), printed, "again");
    imgdm(["detach", "guest"]).ok();
    assert_nothing_left();
    assert!(untouched(std::slice::from_ref(&host.raw)) == before);
}

#[test]
fn explain_leads_through_it_into_the_image() {
    let scratch = Scratch::on_disk();
    let (image, _) = chain(&scratch);
    let device = attach(args!["--overlay", &image]);
    let ran = imgdm(["explain", &device.name, "610k"]);
    assert_eq!(ran.code(), Some(0), "{ran}");
    assert!(ran.stdout.contains(" snapshot ") && ran.stdout.contains(" PO "), "{ran}");
    assert!(ran.stderr.contains("takes writes"), "{ran}");
    assert!(ran.stdout.contains("its chunk was not written"), "{ran}");
    let ran = imgdm(["verify", &device.name]);
    assert_eq!(ran.code(), Some(0), "{ran}");
    assert!(format!("{ran}").contains("takes writes"), "{ran}");
    // Its content as the image has it, whatever was written.
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[1; 9000], 700_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(imgdm(["verify", "--content", &device.name]).code(), Some(0));
    let said = imgdm(["explain", &device.name, "705000"]).ok();
    assert!(said.contains("does NOT show what the image has: it is at 0x1"), "{said}");
    device.detach();
    // Where it is kept, its file and the place there are told.
    let store = scratch.path("store");
    let device = attach(args![kept(&store), &image]);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(b"written here", 700_000).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let said = imgdm(["explain", "--output=json", &device.name, "700000"]).ok();
    let said: Value = serde_json::from_str(&said).unwrap();
    let step = said["steps"].as_array().unwrap().iter().find(|step| step["step"] == "written");
    let step = step.unwrap_or_else(|| panic!("{said}"));
    assert_eq!(step["store"]["path"], store.display().to_string());
    let mut bytes = [0; 12];
    let at = step["offset"].as_u64().unwrap();
    File::open(&store).unwrap().read_exact_at(&mut bytes, at).unwrap();
    assert_eq!(&bytes, b"written here");
    device.detach();
}

#[test]
fn a_kernel_without_the_target_is_named_with_what_it_lacks() {
    let scratch = Scratch::new();
    let image = raw(&scratch);
    let release = tool("uname", ["-r"]);
    let modules = PathBuf::from("/lib/modules").join(release.trim());
    let target = fs::read_link(&modules).unwrap();
    // All else is there, and the module is loaded where it can be.
    attach(args!["--overlay", "-f", "raw", &image]).detach();
    tool("modprobe", ["-r", "dm-snapshot"]);
    attach(args!["--overlay", "-f", "raw", &image]).detach();
    tool("modprobe", ["-r", "dm-snapshot"]);
    fs::remove_file(&modules).unwrap();
    let store = scratch.path("store");
    let ran = imgdm(args!["attach", kept(&store), "-f", "raw", &image]);
    let plain = imgdm(args!["attach", "-f", "raw", &image]);
    std::os::unix::fs::symlink(target, &modules).unwrap();
    let said = ran.refused(69);
    assert!(said.contains("target 'snapshot' (module dm-snapshot)"), "{said}");
    assert!(!store.exists());
    plain.ok();
    imgdm(["detach", "disk"]).ok();
}

#[test]
fn a_block_device_stays_as_it_is_and_keeps_a_store_only_where_it_is_locked() {
    let scratch = Scratch::on_disk();
    let block = block_device();
    let mut wanted = Random(41).bytes(4 << 20);
    let file = OpenOptions::new().read(true).write(true).open(&block).unwrap();
    file.write_all_at(&wanted, 0).unwrap();
    file.sync_all().unwrap();
    let before = sha256(&block);
    let store = scratch.path("store");
    // Without a loop device nothing holds the locks, so that anybody may change it.
    let refused = imgdm(args!["attach", "--direct-block", "-f", "raw", kept(&store), &block]);
    let said = refused.refused(64);
    assert!(said.contains("--direct-block") && said.contains("--overlay=FILE"), "{said}");
    assert!(!store.exists());
    let into = scratch.directory();
    let direct = args!["--direct-block", "-f", "raw", "--overlay", "--scratch-dir", into, &block];
    let device = attach(direct);
    let mut changed = wanted.clone();
    write_randomly(&device.path, &mut changed, 44, 20);
    assert_same("direct", &read_direct(&device.path, 0, 4 << 20).unwrap(), &changed);
    device.detach();
    assert_eq!(sha256(&block), before);
    let options = args!["-f", "raw", kept(&store), &block];
    for seed in [42, 43] {
        let device = attach(&options);
        assert_same("before", &read_direct(&device.path, 0, 4 << 20).unwrap(), &wanted);
        write_randomly(&device.path, &mut wanted, seed, 20);
        assert_same("after", &read_direct(&device.path, 0, 4 << 20).unwrap(), &wanted);
        device.detach();
        assert_eq!(sha256(&block), before);
    }
    // It has no time of its own: what is different at its start is seen.
    file.write_all_at(b"changed", 1000).unwrap();
    file.sync_all().unwrap();
    let said = imgdm(args!["attach"].into_iter().chain(options)).refused(65);
    assert!(said.contains("content is another"), "{said}");
}
