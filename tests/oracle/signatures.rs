//! What lies on a disk beside libblkid's reading of it (`blkid -p`).

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use imgdm::filesystem::{Unclean, unclean};
use imgdm::partition::Disk as _;
use imgdm::signature;
use imgdm::units::{GuestOffset, GuestRange};

use crate::common::images::scratch_dir;
use crate::common::patch::Patch;
use crate::common::process::{Outcome, run};
use crate::partitions::FileDisk;

/// Type, label, UUID, usage.
pub(crate) type Facts = (String, String, String, String);

fn ours(image: &Path) -> Option<Facts> {
    let mut disk = FileDisk(File::open(image).unwrap());
    let whole = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk.size().get()));
    let found = signature::probe(&mut disk, whole).unwrap()?;
    let usage = found.usage.name().to_owned();
    let kind = found.kind.to_owned();
    Some((kind, found.label.unwrap_or_default(), found.uuid.unwrap_or_default(), usage))
}

fn blkid(image: &Path) -> Outcome<Facts> {
    blkid_of_part(image, None)
}

/// What blkid finds in a part of an image, of which start and length are given.
pub(crate) fn blkid_of_part(image: &Path, part: Option<(u64, u64)>) -> Outcome<Facts> {
    let mut command = Command::new("blkid");
    command.args(["--probe", "-o", "export"]);
    if let Some((start, length)) = part {
        command.args(["--offset", &start.to_string(), "--size", &length.to_string()]);
    }
    let ran = run(command.arg(image))?;
    // It ends with 2 where it finds nothing.
    let text = if ran.code() == Some(2) { String::new() } else { ran.ok()?.text() };
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}=")));
        // blkid escapes what a shell would take apart.
        line.unwrap_or_default().replace('\\', "")
    };
    Ok((value("TYPE"), value("LABEL"), value("UUID"), value("USAGE")))
}

/// Runs `command` on a new file, and compares.
fn compare(dir: &Path, mib: u64, kind: &str, command: &[&str]) {
    let image = dir.join("image");
    let _ = fs::remove_file(&image);
    if mib > 0 {
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
    }
    let (program, arguments) = command.split_first().unwrap();
    let arguments: Vec<_> = arguments.iter().map(|word| word.replace("IMAGE", "image")).collect();
    run(Command::new(program).args(&arguments).current_dir(dir)).and_then(|ran| ran.ok()).unwrap();
    let facts = ours(&image).unwrap_or_else(|| panic!("nothing is found of {command:?}"));
    assert_eq!(facts.0, kind, "{command:?}");
    assert_eq!(facts, blkid(&image).unwrap(), "{command:?}");
    // Nobody has written to it since it was made.
    assert_eq!(unclean_of(&image, kind), None, "{command:?}");
}

fn unclean_of(image: &Path, kind: &str) -> Option<Unclean> {
    let mut disk = FileDisk(File::open(image).unwrap());
    let whole = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk.size().get()));
    unclean(&mut disk, whole, kind).unwrap()
}

#[test]
fn file_systems_of_their_own_tools_are_found_as_libblkid_finds_them() {
    let dir = scratch_dir("signatures").unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("tree")).unwrap();
    fs::write(dir.join("tree/file"), "content").unwrap();
    for (kind, options) in [
        ("ext2", &["-t", "ext2"][..]),
        ("ext3", &["-t", "ext3", "-L", "a label"]),
        ("ext4", &["-t", "ext4", "-L", "0123456789abcdef"]),
        ("ext4", &["-t", "ext4", "-O", "^has_journal"]),
        ("jbd", &["-O", "journal_dev"]),
    ] {
        compare(dir, 16, kind, &[&["mke2fs", "-q", "-F"], options, &["IMAGE"]].concat());
    }
    compare(dir, 300, "xfs", &["mkfs.xfs", "-q", "-L", "label", "IMAGE"]);
    compare(dir, 120, "btrfs", &["mkfs.btrfs", "-q", "-L", "a label", "IMAGE"]);
    compare(dir, 4, "swap", &["mkswap", "-L", "label", "IMAGE"]);
    compare(dir, 4, "swap", &["mkswap", "-p", "65536", "IMAGE"]);
    for (mib, bits) in [(4, "12"), (64, "16"), (300, "32")] {
        let mkfs = ["mkfs.vfat", "-F", bits];
        compare(dir, mib, "vfat", &[&mkfs[..], &["-n", "A LABEL", "IMAGE"]].concat());
        compare(dir, mib, "vfat", &[&mkfs[..], &["-i", "0a1b2c3d", "IMAGE"]].concat());
    }
    compare(dir, 64, "exfat", &["mkfs.exfat", "-L", "label", "IMAGE"]);
    compare(dir, 64, "exfat", &["mkfs.exfat", "-c", "4096", "IMAGE"]);
    compare(dir, 64, "ntfs", &["mkntfs", "-q", "-F", "-Q", "-L", "a label", "IMAGE"]);
    compare(dir, 64, "ntfs", &["mkntfs", "-q", "-F", "-Q", "-c", "65536", "IMAGE"]);
    compare(dir, 0, "squashfs", &["mksquashfs", "tree", "IMAGE", "-quiet", "-no-progress"]);
    compare(dir, 0, "erofs", &["mkfs.erofs", "IMAGE", "tree"]);
    compare(dir, 64, "f2fs", &["mkfs.f2fs", "-q", "-l", "label", "IMAGE"]);
    let iso = ["genisoimage", "-quiet", "-o", "IMAGE", "-V"];
    compare(dir, 0, "iso9660", &[&iso[..], &["A_LABEL", "tree"]].concat());
    compare(dir, 0, "iso9660", &[&iso[..], &["A label longer than 16", "-J", "tree"]].concat());
    compare(dir, 64, "jfs", &["mkfs.jfs", "-q", "-L", "label", "IMAGE"]);
    compare(dir, 200, "nilfs2", &["mkfs.nilfs2", "-q", "-L", "label", "IMAGE"]);
    compare(dir, 64, "reiserfs", &["mkfs.reiserfs", "-q", "-ff", "-l", "label", "IMAGE"]);
}

#[test]
fn encrypted_disks_are_found_as_libblkid_finds_them() {
    let dir = scratch_dir("signatures-luks").unwrap();
    fs::write(dir.path().join("key"), "a passphrase").unwrap();
    for options in [
        &["--type", "luks1", "--pbkdf-force-iterations", "1000"][..],
        &[
            "--type",
            "luks2",
            "--pbkdf",
            "pbkdf2",
            "--pbkdf-force-iterations",
            "1000",
            "--label",
            "x",
        ],
    ] {
        let format = ["cryptsetup", "luksFormat", "-q", "--key-file", "key"];
        compare(dir.path(), 32, "crypto_LUKS", &[&format[..], options, &["IMAGE"]].concat());
    }
}

#[test]
fn nothing_is_found_of_nothing() {
    let dir = scratch_dir("signatures-none").unwrap();
    let image = dir.path().join("image");
    for bytes in [0, 1, 511, 512, 100_000, 1 << 20] {
        File::create(&image).unwrap().set_len(bytes).unwrap();
        assert_eq!(ours(&image), None);
    }
}

/// Tools that mark a file system as its driver does when it is mounted; the kernel's own
/// marks are for the kernel tier.
#[test]
fn what_was_not_unmounted_is_found_by_its_marks() {
    let dir = scratch_dir("signatures-unclean").unwrap();
    let image = dir.path().join("image");
    let tool = |line: &[&str]| {
        let mut command = Command::new(line[0]);
        run(command.args(&line[1..]).arg(&image)).and_then(|ran| ran.ok()).unwrap();
    };
    let new = |line: &[&str]| {
        let _ = fs::remove_file(&image);
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        tool(line);
    };
    for (command, found) in [
        ("feature needs_recovery", Unclean::Journal),
        ("set_super_value state 0", Unclean::NotUnmounted),
        ("set_super_value state 3", Unclean::NotUnmounted),
    ] {
        new(&["mke2fs", "-q", "-F", "-t", "ext4"]);
        tool(&["debugfs", "-w", "-R", command]);
        assert_eq!(unclean_of(&image, "ext4"), Some(found), "{command}");
    }
    // ntfsfix marks it, so that Windows checks it.
    new(&["mkntfs", "-q", "-F", "-Q"]);
    tool(&["ntfsfix"]);
    assert_eq!(unclean_of(&image, "ntfs"), Some(Unclean::NotUnmounted));
    tool(&["ntfsfix", "-d"]);
    assert_eq!(unclean_of(&image, "ntfs"), None);
    // Of these the mark's place is said by the specification.
    for (mkfs, kind, place, value) in [
        (&["mkfs.vfat", "-F", "16"][..], "vfat", 0x25, 1),
        (&["mkfs.vfat", "-F", "32", "-s", "1"], "vfat", 0x41, 1),
        (&["mkfs.exfat"], "exfat", 106, 2),
        (&["mkfs.jfs", "-q"], "jfs", 32768 + 40, 1),
        (&["mkfs.reiserfs", "-q", "-ff"], "reiserfs", 65536 + 50, 2),
    ] {
        new(mkfs);
        Patch::open(&image).and_then(|file| file.put(place, &[value])).unwrap();
        assert_eq!(unclean_of(&image, kind), Some(Unclean::NotUnmounted), "{mkfs:?}");
    }
}
