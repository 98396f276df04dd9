//! `imgdm mount` and mount.imgdm: file systems of images, read-only, until umount.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use crate::args;
use crate::guest::*;
use crate::lvm::{GROUP, Host};

/// What lies in every file system of these tests.
pub(crate) const CONTENT: &str = "what the guest wrote\n";

/// A directory to mount on.
pub(crate) fn place(scratch: &Scratch, name: &str) -> PathBuf {
    let place = scratch.path(name);
    fs::create_dir(&place).unwrap();
    place
}

/// The files of every file system: one to read, and a program with rights that it must not
/// get.
pub(crate) fn tree(scratch: &Scratch) -> PathBuf {
    let tree = scratch.path("tree");
    if !tree.exists() {
        fs::create_dir_all(tree.join("directory")).unwrap();
        fs::write(tree.join("directory/file"), CONTENT).unwrap();
        fs::write(tree.join("program"), "#!/bin/sh\necho ran\n").unwrap();
        fs::set_permissions(tree.join("program"), fs::Permissions::from_mode(0o4755)).unwrap();
    }
    tree
}

/// Makes a file system of that kind with the tree, in a raw file.
pub(crate) fn file_system(scratch: &Scratch, kind: &str, name: &str) -> PathBuf {
    let (tree, image) = (tree(scratch), scratch.path(name));
    let sized = |mib: u64| fs::File::create(&image).unwrap().set_len(mib * MIB).unwrap();
    match kind {
        "ext2" | "ext3" | "ext4" => {
            sized(8);
            tool("mkfs.ext4", args!["-q", "-F", "-t", kind, "-d", tree, &image]);
            return image;
        }
        "squashfs" => {
            tool("mksquashfs", args![tree, &image, "-quiet", "-no-progress", "-noappend"]);
            return image;
        }
        "iso9660" => {
            tool("genisoimage", args!["-quiet", "-R", "-o", &image, tree]);
            return image;
        }
        "erofs" => {
            tool("mkfs.erofs", args!["--quiet", &image, tree]);
            return image;
        }
        "btrfs" => {
            sized(128);
            tool("mkfs.btrfs", args!["-q", "-f", "--rootdir", tree, &image]);
            return image;
        }
        "xfs" => {
            sized(300);
            tool("mkfs.xfs", args!["-q", "-f", &image]);
        }
        "vfat" => {
            sized(8);
            tool("mkfs.vfat", args![&image]);
        }
        other => panic!("no recipe for {other}"),
    }
    with_written(scratch, &image, |place| {
        tool("cp", args!["-r", tree.join("directory"), tree.join("program"), place]);
    });
    image
}

/// Mounts a raw image for writing on a loop of another's, meanwhile does `write`.
pub(crate) fn with_written(scratch: &Scratch, image: &Path, write: impl FnOnce(&Path)) {
    let place = scratch.path("written");
    fs::create_dir_all(&place).unwrap();
    tool("mount", args!["-o", "loop", image, &place]);
    write(&place);
    tool("umount", args![&place]);
    fs::remove_dir(&place).unwrap();
}

/// A copy of a raw file system, made while it is mounted and `write` has been done: as after
/// the power failed.
pub(crate) fn crashed(
    scratch: &Scratch,
    image: &Path,
    name: &str,
    write: impl FnOnce(&Path),
) -> PathBuf {
    let copy = scratch.path(name);
    with_written(scratch, image, |place| {
        write(place);
        tool("cp", args!["--sparse=always", image, &copy]);
    });
    copy
}

/// Bytes and times of a file that must not change.
pub(crate) fn untouched(image: &Path) -> (String, i64, i64, i64, i64) {
    let times = fs::metadata(image).unwrap();
    (sha256(image), times.mtime(), times.mtime_nsec(), times.ctime(), times.ctime_nsec())
}

pub(crate) fn mount_command<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
) -> std::process::Command {
    let mut line = imgdm_command(["mount"]);
    line.args(arguments);
    line
}

/// `imgdm mount`, which must succeed and print nothing on standard output; what it warned of.
#[track_caller]
pub(crate) fn mount<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    let ran = run(&mut mount_command(arguments));
    assert!(ran.status.success(), "{ran}");
    assert_eq!(ran.stdout, "", "{ran}");
    ran.stderr
}

/// `imgdm mount`, which must fail so, say these words, and leave nothing.
#[track_caller]
pub(crate) fn refused<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
    code: i32,
    words: &[&str],
) -> String {
    let said = run(&mut mount_command(arguments)).refused(code);
    for word in words {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    said
}

#[track_caller]
pub(crate) fn umount(place: &Path) {
    tool("umount", [place]);
}

/// Unmounts the last that is mounted; nothing may be left soon.
#[track_caller]
pub(crate) fn umount_all(place: &Path) {
    umount(place);
    assert_nothing_left_soon();
}

/// The options of a mount and of its file system, as the kernel lists them.
pub(crate) fn options(place: &Path) -> Vec<String> {
    let line = ["-n", "-o", "VFS-OPTIONS,FS-OPTIONS", "--mountpoint"];
    let printed = tool("findmnt", line.iter().map(AsRef::as_ref).chain([place.as_os_str()]));
    printed.trim().split([',', ' ']).map(str::to_owned).collect()
}

/// The file system shows the tree, takes no write, and gives the guest no rights.
#[track_caller]
fn assert_mounted(place: &Path) {
    assert_eq!(fs::read_to_string(place.join("directory/file")).unwrap(), CONTENT);
    let error = fs::write(place.join("new"), "").unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{error}");
    let ran = std::process::Command::new(place.join("program")).output();
    assert_eq!(ran.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    let options = options(place);
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(options.contains(&option.to_owned()), "no {option}: {options:?}");
    }
}

/// A disk with a GPT of these partitions, each with what lies in a raw file.
pub(crate) fn partitioned(scratch: &Scratch, name: &str, parts: &[(&str, &Path)]) -> PathBuf {
    let disk = scratch.path(name);
    let mut script = String::from("label: gpt\n");
    let mut end = 2048;
    let mut places = Vec::new();
    for (kind, part) in parts {
        let sectors = (fs::metadata(part).unwrap().len() / 512).next_multiple_of(2048);
        script += &format!("start={end}, size={sectors}, type={kind}\n");
        places.push((end, part));
        end += sectors;
    }
    fs::File::create(&disk).unwrap().set_len((end + 2048) * 512).unwrap();
    let table = scratch.path("table");
    fs::write(&table, script).unwrap();
    sh(&format!("sfdisk -q '{}' <'{}'", disk.display(), table.display()));
    for (start, part) in places {
        let line = [
            format!("if={}", part.display()),
            format!("of={}", disk.display()),
            format!("seek={start}"),
        ];
        let fixed = ["bs=512", "conv=notrunc,sparse", "status=none"];
        tool("dd", line.iter().map(String::as_str).chain(fixed));
    }
    disk
}

/// The same as qcow2.
pub(crate) fn qcow2(scratch: &Scratch, raw: &Path, name: &str) -> PathBuf {
    let image = scratch.path(name);
    qemu_img(args!["convert", "-O", "qcow2", raw, &image]).ok();
    image
}

/// Types of partitions, by sfdisk's names.
pub(crate) const LINUX: &str = "linux";
const OTHER: &str = "21686148-6449-6E6F-744E-656564454649";

#[test]
fn each_kind_of_file_system_is_mounted_read_only_and_umount_takes_all_down() {
    let scratch = Scratch::on_disk();
    let place = place(&scratch, "mnt");
    for kind in ["ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "squashfs", "iso9660", "erofs"] {
        let raw = file_system(&scratch, kind, kind);
        let image = qcow2(&scratch, &raw, &format!("{kind}.qcow2"));
        fs::remove_file(raw).unwrap();
        let before = untouched(&image);
        assert_eq!(mount(args![&image, &place]), "", "{kind}: clean");
        assert_mounted(&place);
        assert_eq!(listed().len(), 1, "{kind}");
        // QEMU may not write meanwhile, and may as soon as all is gone.
        assert_ne!(qemu_io(&image, "qcow2", &["write 0 512"]).code(), Some(0), "{kind}");
        umount_all(&place);
        assert_eq!(untouched(&image), before, "{kind}: the image is as it was");
        write_image(&image, "qcow2", &["read 0 512", "discard 0 0"]);
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn a_dirty_journal_is_told_and_not_replayed() {
    let scratch = Scratch::on_disk();
    let place = place(&scratch, "mnt");
    // Written and synced, and not at its place but in the journal, or dirty by a flag.
    let write = |place: &Path| {
        fs::write(place.join("late"), "late\n").unwrap();
        fs::File::open(place.join("late")).unwrap().sync_all().unwrap();
    };
    for (kind, word) in [
        ("ext3", "journal"),
        ("ext4", "journal"),
        ("xfs", "journal"),
        ("btrfs", "journal"),
        ("vfat", "not cleanly unmounted"),
    ] {
        let raw = file_system(&scratch, kind, "clean.raw");
        let dirty = crashed(&scratch, &raw, "dirty.raw", write);
        // The original is clean again, and not the one that would be taken for the copy.
        fs::remove_file(&raw).unwrap();
        if kind == "btrfs" {
            tool("btrfs", ["device", "scan", "--forget"]);
        }
        let before = untouched(&dirty);
        let said = mount(args![&dirty, &place]);
        assert!(said.contains(kind) && said.contains(word), "{kind}: {said}");
        assert_mounted(&place);
        umount_all(&place);
        assert_eq!(untouched(&dirty), before, "{kind}");
        if kind == "btrfs" {
            tool("btrfs", ["device", "scan", "--forget"]);
        }
        fs::remove_file(dirty).unwrap();
    }
}

#[test]
fn a_btrfs_whose_copy_is_mounted_is_explained_and_not_mounted() {
    let scratch = Scratch::on_disk();
    let (first, second) = (place(&scratch, "first"), place(&scratch, "second"));
    let raw = file_system(&scratch, "btrfs", "guest.raw");
    let copy = scratch.path("copy.raw");
    fs::copy(&raw, &copy).unwrap();
    mount(args![&raw, &first]);
    let uuid = tool("blkid", args!["-p", "-o", "value", "-s", "UUID", &raw]);
    let first_shown = first.display().to_string();
    refused(args![&copy, &second], 75, &[uuid.trim(), &first_shown, "same UUID", "Unmount"]);
    assert_eq!(our_devices(), ["guest"]);
    // The same one a second time is no other.
    mount(args![&raw, &second]);
    assert_mounted(&second);
    umount(&second);
    assert_mounted(&first);
    umount_all(&first);
    mount(args![&copy, &second]);
    assert_mounted(&second);
    umount_all(&second);
}

#[test]
fn two_partitions_of_one_image_go_by_their_own_umount_and_the_disk_with_the_last() {
    let scratch = Scratch::on_disk();
    let (ext4, vfat) = (file_system(&scratch, "ext4", "e"), file_system(&scratch, "vfat", "v"));
    let raw = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4), (LINUX, &vfat)]);
    let image = qcow2(&scratch, &raw, "disk.qcow2");
    let (first, second) = (place(&scratch, "first"), place(&scratch, "second"));

    let said = refused(args![&image, &first], 64, &["-p 1", "ext4", "-p 2", "vfat"]);
    assert!(said.contains("disk.qcow2"), "{said}");
    assert_nothing_left();
    refused(args!["-p", "3", &image, &first], 66, &["partition 3"]);
    assert_nothing_left();

    mount(args!["-p", "1", &image, &first]);
    mount(args!["-p", "2", &image, &second]);
    assert_mounted(&first);
    assert_mounted(&second);
    umount(&first);
    wait_for("the first partition to go", || our_devices().len() == 2);
    assert_mounted(&second);
    mount(args!["-p", "1", &image, &first]);
    umount(&second);
    wait_for("the second partition to go", || our_devices().len() == 2);
    assert_mounted(&first);
    umount_all(&first);
}

#[test]
fn the_only_partition_that_can_be_mounted_is_and_that_is_said() {
    let scratch = Scratch::on_disk();
    let place = place(&scratch, "mnt");
    let ext4 = file_system(&scratch, "ext4", "e");
    let (boot, swap) = (scratch.path("boot"), scratch.path("swap"));
    fs::write(&boot, [1; 4096]).unwrap();
    fs::File::create(&swap).unwrap().set_len(MIB).unwrap();
    tool("mkswap", [&swap]);
    let parts: [(&str, &Path); 3] = [(OTHER, &boot), (LINUX, &ext4), (LINUX, &swap)];
    let image = partitioned(&scratch, "disk.raw", &parts);
    let said = mount(args![&image, &place]);
    assert!(said.contains("partition 2") && said.contains("ext4"), "{said}");
    assert_mounted(&place);
    umount_all(&place);
    refused(args!["-p", "3", &image, &place], 65, &["partition 3", "swap"]);
    refused(args!["-p", "1", &image, &place], 65, &["partition 1", "-t"]);
    assert_nothing_left();
}

#[test]
fn a_snapshot_is_mounted_beside_the_active_layer() {
    let scratch = Scratch::on_disk();
    let raw = file_system(&scratch, "ext4", "guest.raw");
    let image = qcow2(&scratch, &raw, "guest.qcow2");
    qemu_img(args!["snapshot", "-c", "before", &image]).ok();
    // The file's content is in one block; another guest's content takes its place.
    let bytes = fs::read(&raw).unwrap();
    let at = bytes.windows(CONTENT.len()).position(|w| w == CONTENT.as_bytes()).unwrap();
    let start = at / 512 * 512;
    let mut sector = bytes[start..start + 512].to_vec();
    sector[at - start..][..4].copy_from_slice(b"WHAT");
    let piece = scratch.path("piece");
    fs::write(&piece, sector).unwrap();
    write_image(&image, "qcow2", &[&format!("write -s {} {start} 512", piece.display())]);

    let (now, before) = (place(&scratch, "now"), place(&scratch, "before"));
    mount(args![&image, &now]);
    mount(args!["-l", "before", &image, &before]);
    assert_eq!(fs::read_to_string(before.join("directory/file")).unwrap(), CONTENT);
    let changed = fs::read_to_string(now.join("directory/file")).unwrap();
    assert_eq!(changed, CONTENT.replacen("what", "WHAT", 1));
    umount(&now);
    assert_mounted(&before);
    umount_all(&before);
}

#[test]
fn a_logical_volume_of_the_guest_is_mounted_without_lvm() {
    let scratch = Scratch::on_disk();
    let host = Host::new(&scratch);
    let first = &host.loops[0];
    host.lvm(&format!("pvcreate -qq {first}"));
    host.lvm(&format!("vgcreate -qq -s 1M {GROUP} {first}"));
    host.lvm(&format!("lvcreate -qq -y -Wn -Zn -L 12M -n root {GROUP}"));
    host.lvm(&format!("lvcreate -qq -y -Wn -Zn -L 4M -n swap {GROUP}"));
    tool("mkfs.ext4", args!["-q", "-F", "-d", tree(&scratch), host.device("root")]);
    tool("mkswap", args![host.device("swap")]);
    host.leave();
    helper();
    let place = place(&scratch, "mnt");
    let (root, swap) = (format!("{GROUP}/root"), format!("{GROUP}/swap"));
    refused(args![&host.raw, &place], 64, &["-p 1", "LVM2_member", &format!("--lv {root}")]);
    refused(args!["-p", "1", &host.raw, &place], 65, &["partition 1", "LVM", "--lv"]);
    refused(args!["--lv", &swap, &host.raw, &place], 65, &[&swap, "swap space"]);
    assert_nothing_left();
    mount(args!["--lv", &root, &host.raw, &place]);
    assert_mounted(&place);
    let mut devices = our_devices();
    devices.sort();
    assert_eq!(devices, ["guest", "guest-root"]);
    umount_all(&place);
    tool("mount", args!["-t", "imgdm", &host.raw, &place, "-o", format!("lv={root}")]);
    assert_mounted(&place);
    umount_all(&place);
}

#[test]
fn what_is_attached_already_is_used_and_stays() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let vfat = file_system(&scratch, "vfat", "v");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4), (LINUX, &vfat)]);
    let place = place(&scratch, "mnt");
    let record = Scratch::new();
    let evidence = format!("--evidence={}", record.path("record.json").display());
    // However it was attached, even under another name.
    for option in ["--publish", "--direct-io=off", "--zero=loop", "--name=other", &evidence] {
        let device = attach(args![option, &image]);
        let name = device.path.file_name().unwrap().to_str().unwrap().to_owned();
        mount(args!["-t", "auto", "-p", "2", &image, &place]);
        assert_mounted(&place);
        let said = imgdm(["detach", &name]).refused(75);
        assert!(said.contains(&*place.to_string_lossy()), "{option}: {said}");
        umount(&place);
        wait_for("the partition to go", || our_devices() == [name.as_str()]);
        assert_eq!(listed()[0]["deferred_remove"], false);
        assert_eq!(sha256(&device.path), sha256(&image));
        device.detach();
    }
    // Under a name of its own where one is asked for.
    let device = attach([&image]);
    mount(args!["--name", "mine", "-p", "2", &image, &place]);
    assert!(our_devices().contains(&"mine2".to_owned()));
    umount(&place);
    wait_for("the second one to go", || our_devices() == ["disk"]);
    device.detach();
    assert_nothing_left();
}

#[test]
fn a_file_system_that_was_on_the_disk_before_its_partitions_is_not_mounted() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    // Superblock and no more, as a partitioning tool leaves it.
    let stale = fs::read(file_system(&scratch, "ext4", "stale.raw")).unwrap();
    let file = OpenOptions::new().write(true).open(&image).unwrap();
    file.write_all_at(&stale[1024..2048], 1024).unwrap();
    let place = place(&scratch, "mnt");
    let ran = imgdm(args!["mount", &image, &place]);
    assert!(ran.status.success() && ran.stderr.contains("partition 1"), "{ran}");
    assert!(ran.stderr.contains("whole disk is not meant"), "{ran}");
    assert_mounted(&place);
    umount_all(&place);
}

#[test]
fn options_are_the_mounts_the_file_systems_or_of_fstab() {
    let scratch = Scratch::on_disk();
    let image = file_system(&scratch, "ext4", "guest.raw");
    let place = place(&scratch, "mnt");
    let line = "exec,suid,nofail,x-systemd.automount,errors=remount-ro,debug";
    mount(args!["-o", line, "-o", "comment=x", &image, &place]);
    let found = options(&place);
    assert!(found.contains(&"nodev".to_owned()) && !found.contains(&"noexec".to_owned()));
    assert!(!found.contains(&"nosuid".to_owned()), "{found:?}");
    let ran = tool(place.join("program").to_str().unwrap(), [""; 0]);
    assert_eq!(ran, "ran\n");
    umount_all(&place);

    refused(args!["-o", "frobnicate=7", &image, &place], 64, &["frobnicate"]);
    assert_nothing_left();
    mount(args!["-o", "frobnicate=7", "--sloppy", &image, &place]);
    umount_all(&place);
    let ran = run(&mut mount_command(args!["-v", &image, &place]));
    let said = ran.ok();
    let shown = place.display().to_string();
    for word in [&shown, "ext4", "ro", "noload", "nosuid,nodev,noexec"] {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    umount_all(&place);
    assert_eq!(mount(args!["--fake", &image, &place]), "");
    assert_nothing_left();
    for line in ["rw", "remount", "bind", "a=\"b"] {
        refused(args!["-o", line, &image, &place], 64, &[]);
    }
    refused(args!["-t", "no-such-fs", &image, &place], 69, &["no-such-fs", "driver"]);
    assert_nothing_left();
}

#[test]
fn what_cannot_be_mounted_is_explained_and_nothing_is_left() {
    let scratch = Scratch::on_disk();
    let image = file_system(&scratch, "ext4", "guest.raw");
    let place = place(&scratch, "mnt");
    let file = scratch.path("file");
    fs::write(&file, "").unwrap();
    refused(args![&image, scratch.path("none")], 66, &["none"]);
    refused(args![&image, &file], 64, &["no directory"]);
    refused(args![scratch.path("none.qcow2"), &place], 66, &["none.qcow2"]);
    assert_nothing_left();
    mount(args![&image, &place]);
    refused(args![&image, &place], 75, &["mounted there already", "guest"]);
    assert_mounted(&place);
    umount_all(&place);

    let sized = |name: &str, mib: u64| {
        let path = scratch.path(name);
        fs::File::create(&path).unwrap().set_len(mib * MIB).unwrap();
        path
    };
    let empty = sized("empty.raw", 1);
    refused(args!["-f", "raw", &empty, &place], 65, &["empty.raw", "-t"]);
    let luks = sized("luks.raw", 20);
    sh(&format!(
        "echo secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 '{}' -",
        luks.display()
    ));
    refused(args![&luks, &place], 65, &["LUKS", "cryptsetup open"]);
    let swap = sized("swap.raw", 1);
    tool("mkswap", [&swap]);
    refused(args![&swap, &place], 65, &["swap"]);
    // The guest's kernel has neither.
    for (kind, make) in [("exfat", &["mkfs.exfat"][..]), ("ntfs", &["mkfs.ntfs", "-q", "-F"])] {
        let path = sized(kind, 8);
        let line = make[1..].iter().map(std::ffi::OsString::from).chain([path.clone().into()]);
        tool(make[0], line);
        refused(args![&path, &place], 69, &[kind, "driver"]);
    }
    // Damage that the kernel finds: it says what, and so does the message.
    let damaged = scratch.path("damaged.raw");
    fs::copy(&image, &damaged).unwrap();
    let block = OpenOptions::new().write(true).open(&damaged).unwrap();
    block.write_all_at(&[0xff; 64], 4096).unwrap();
    block.write_all_at(&[0xff; 8], 1024 + 0x20).unwrap();
    let said = refused(args![&damaged, &place], 1, &["damaged.raw", "kernel says"]);
    assert!(said.contains("EXT4-fs"), "{said}");
    assert_nothing_left();
}

#[test]
fn killed_or_failed_at_any_step_it_leaves_nothing_or_a_mount() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let place = place(&scratch, "mnt");
    let faulty = |fault: &str| {
        let mut line = mount_command(args!["-q", "-p", "1", &image, &place]);
        line.env("IMGDM_FAULT", fault);
        run(&mut line)
    };
    let is_mounted = || fs::metadata(place.join("directory")).is_ok();
    let ran = faulty("list");
    let steps: Vec<_> = ran.stderr.lines().filter_map(|line| line.split_once(' ')).collect();
    assert!(steps.iter().any(|(_, name)| *name == "mount"), "{ran}");
    assert_eq!(steps.last().unwrap().1, "mount.attach");
    umount_all(&place);
    // What attach does before is for its own tests.
    let first = steps.iter().position(|(_, name)| *name == "above.read").unwrap();
    for (number, name) in &steps[first..] {
        let killed = faulty(&format!("{number}:kill"));
        assert_eq!(killed.signal(), Some(libc::SIGKILL), "{name}: {killed}");
        assert_eq!(is_mounted(), *name == "mount.attach", "{name}");
        if is_mounted() {
            assert_mounted(&place);
            umount(&place);
        }
        assert_nothing_left_soon();
    }
    let failed = faulty("mount:fail");
    assert_eq!(failed.code(), Some(1), "{failed}");
    assert_nothing_left();
    let stopped = faulty("mount:term");
    assert_eq!(stopped.signal(), Some(libc::SIGTERM), "{stopped}");
    assert_nothing_left();
}

/// /sbin/mount.imgdm as packages install it.
pub(crate) fn helper() -> PathBuf {
    let link = PathBuf::from("/sbin/mount.imgdm");
    if !link.exists() {
        std::os::unix::fs::symlink(imgdm_path(), &link).unwrap();
    }
    link
}

#[test]
fn mount_of_the_type_imgdm_takes_options_of_both() {
    let scratch = Scratch::on_disk();
    helper();
    let (ext4, vfat) = (file_system(&scratch, "ext4", "e"), file_system(&scratch, "vfat", "v"));
    let raw = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4), (LINUX, &vfat)]);
    let image = qcow2(&scratch, &raw, "disk.qcow2");
    qemu_img(args!["snapshot", "-c", "before", &image]).ok();
    let place = place(&scratch, "mnt");
    tool("mount", args!["-t", "imgdm", &image, &place, "-o", "partition=1,snapshot=before"]);
    assert_mounted(&place);
    assert_eq!(our_devices().len(), 2);
    assert!(our_devices().iter().any(|name| name.starts_with("disk@before")));
    umount_all(&place);
    let line = "partition=2,uid=7,allow-exec,force-share";
    tool("mount", args!["-t", "imgdm", &image, &place, "-o", line]);
    assert_eq!(fs::metadata(place.join("directory/file")).unwrap().uid(), 7);
    assert!(!options(&place).contains(&"noexec".to_owned()));
    umount_all(&place);
    tool("mount", args!["-f", "-t", "imgdm", &image, &place, "-o", "partition=2"]);
    assert_nothing_left();
    // In another mount namespace.
    let other =
        start(command("unshare", ["--mount", "sleep", "1000"]).stdin(std::process::Stdio::null()));
    let namespace = format!("/proc/{}/ns/mnt", other.id());
    let own = fs::read_link("/proc/self/ns/mnt").unwrap();
    wait_for("the other namespace", || fs::read_link(&namespace).is_ok_and(|other| other != own));
    tool("mount", args!["-N", &namespace, "-t", "imgdm", &image, &place, "-o", "partition=1"]);
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "not here");
    let entered = format!("--mount={namespace}");
    let file = place.join("directory/file");
    assert_eq!(tool("nsenter", args![&entered, "cat", &file]), CONTENT);
    let ran = run(&mut mount_command(args!["-N", other.id().to_string(), &image, &place]));
    assert_eq!(ran.code(), Some(75), "{ran}");
    // The namespace goes with its last process, and all of it with that.
    drop(other);
    assert_nothing_left_soon();
    let said = tool("mount", args!["-v", "-t", "imgdm.vfat", &image, &place, "-o", "partition=2"]);
    assert!(said.contains("vfat"), "{said}");
    umount_all(&place);
}

#[test]
fn the_helper_ends_with_the_statuses_of_mount() {
    let scratch = Scratch::on_disk();
    let helper = helper();
    let image = file_system(&scratch, "ext4", "guest.raw");
    let place = place(&scratch, "mnt");
    let direct = |arguments: &[std::ffi::OsString], code: i32| {
        let ran = run(&mut command(&helper, arguments));
        assert_eq!(ran.code(), Some(code), "{ran}");
        assert_nothing_left();
        ran.stderr
    };
    direct(&args![&image], 1);
    direct(&args![&image, &place, "-x"], 1);
    let said = direct(&args![&image, &place, "-o", "partition=x"], 1);
    assert!(said.contains("partition"), "{said}");
    let said = direct(&args![&image, &place, "-o", "remount,ro"], 1);
    assert!(said.contains("remount"), "{said}");
    direct(&args![scratch.path("none"), &place], 32);
    direct(&args![&image, &place, "-o", "partition=1"], 32);
    direct(&args![&image, scratch.path("none")], 32);
    direct(&args![&image, &place, "-o", "frobnicate"], 1);
    direct(&args![&image, &place, "-o", "frobnicate", "-s", "-f"], 0);
    let ran = run(&mut command(&helper, args![&image, &place, "-o", "rw,frobnicate", "-sn"]));
    assert!(ran.status.success(), "{ran}");
    assert_mounted(&place);
    umount_all(&place);
    let ran = run(&mut command("mount", args!["-t", "imgdm", scratch.path("none"), &place]));
    assert_eq!(ran.code(), Some(32), "{ran}");
}

#[test]
fn a_line_of_fstab_is_mounted_by_its_directory_and_by_mount_a() {
    let scratch = Scratch::on_disk();
    helper();
    let ext4 = file_system(&scratch, "ext4", "e");
    let image = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let (by_name, by_all) = (place(&scratch, "by-name"), place(&scratch, "by all"));
    let fstab = scratch.path("fstab");
    let line = |place: &Path, options: &str| {
        let place = place.display().to_string().replace(' ', "\\040");
        format!("{} {place} imgdm {options} 0 0\n", image.display())
    };
    fs::write(
        &fstab,
        line(&by_name, "partition=1,noauto,user,x-systemd.automount,comment=x")
            + &line(&by_all, "defaults,nofail,_netdev,partition=1"),
    )
    .unwrap();
    let option = "-T";
    tool("mount", args![option, &fstab, &by_name]);
    assert_mounted(&by_name);
    tool("mount", args![option, &fstab, "-a"]);
    assert_mounted(&by_all);
    // Once more: it is there.
    let ran = run(&mut command("mount", args![option, &fstab, "-a"]));
    assert!(ran.status.success() && ran.stderr.contains("already"), "{ran}");
    umount(&by_name);
    assert_mounted(&by_all);
    umount_all(&by_all);
}

#[test]
fn detach_waits_for_what_umount_has_left_to_the_kernel() {
    let scratch = Scratch::on_disk();
    let ext4 = file_system(&scratch, "ext4", "e");
    let raw = partitioned(&scratch, "disk.raw", &[(LINUX, &ext4)]);
    let image = qcow2(&scratch, &raw, "disk.qcow2");
    let place = place(&scratch, "mnt");
    for target in [image.as_os_str(), "disk".as_ref()] {
        for _ in 0..3 {
            mount(args!["-p", "1", &image, &place]);
            umount(&place);
            assert_eq!(imgdm(args!["detach", "--wait", target]).ok(), "");
            assert_nothing_left();
            // Of what is gone long since too.
            assert_eq!(imgdm(args!["detach", "--wait", target]).ok(), "");
        }
    }
    // What is still mounted does not go, and that is said.
    mount(args!["-p", "1", &image, &place]);
    let said = imgdm(["detach", "--wait", "disk"]).refused(75);
    assert!(said.contains("disk"), "{said}");
    umount(&place);
    imgdm(["detach", "--wait", "disk"]).ok();
    // By the image's bare name too, as long as somebody has it open.
    mount(args!["-p", "1", &image, &place]);
    let held = fs::File::open("/dev/mapper/disk").or_else(|_| fs::File::open("/dev/dm-0")).unwrap();
    umount(&place);
    let mut detach = imgdm_command(["detach", "--wait", "disk.qcow2"]);
    let said = run(detach.current_dir(scratch.path("."))).refused(75);
    assert!(said.contains("disk"), "{said}");
    drop(held);
    run(detach.current_dir(scratch.path("."))).ok();
    assert_nothing_left();
    // What is attached to stay is not waited for, and stays.
    let attached = attach([&image]);
    let said = imgdm(["detach", "--wait", "disk"]).refused(75);
    assert!(said.contains("imgdm detach disk"), "{said}");
    attached.detach();
}
