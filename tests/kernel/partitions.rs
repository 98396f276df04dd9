//! Partitions of the disk: the same devices as kpartx makes, and the same promises as for
//! the disk itself.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::libc;
use nix::sys::signal::Signal;

use crate::args;
use crate::encrypted::Encrypted;
use crate::faults::{faulty, steps};
use crate::guest::*;
use crate::verify::{l2_entry, number};

const SECTOR: u64 = 512;

/// A raw disk with the partition table that sfdisk makes of a script, and bytes that tell
/// where they are in many sectors outside of it.
fn disk(scratch: &Scratch, name: &str, mebibytes: u64, script: &str) -> PathBuf {
    let path = scratch.path(name);
    let mut bytes = vec![0; usize::try_from(mebibytes * MIB).unwrap()];
    for (sector, bytes) in (0u64..).zip(bytes.chunks_mut(512)) {
        if sector % 7 == 0 && (2048..mebibytes * 2048 - 64).contains(&sector) {
            bytes[..8].copy_from_slice(&sector.to_le_bytes());
        }
    }
    fs::write(&path, bytes).unwrap();
    sfdisk(&path, script);
    path
}

#[track_caller]
fn sfdisk(path: &Path, script: &str) {
    let words = ["--quiet", "--no-reread", "--no-tell-kernel", "--force", "--wipe=never"];
    let mut line = command("sfdisk", words);
    let mut running = start(line.arg(path).stdin(Stdio::piped()));
    running.tell(script);
    running.finish().ok();
}

/// An MBR with two primary partitions, and two logical ones in an extended one.
const DOS: &str = "label: dos\nstart=2048, size=2048, type=83\nstart=4096, size=1000, type=c, bootable\n\
    start=6144, size=16384, type=f\nstart=8192, size=2048, type=83\nstart=12288, size=4096, type=82";
const GPT: &str = "label: gpt\nstart=2048, size=2048, name=first\nstart=6144, size=4096, type=U\n\
    start=12288, size=99, name=last";

/// Runs `imgdm attach` and gives the paths that it prints and what it says.
#[track_caller]
fn attach_with<A: AsRef<std::ffi::OsStr>>(
    arguments: impl IntoIterator<Item = A>,
) -> (Vec<String>, String) {
    let words = arguments.into_iter().map(|word| word.as_ref().to_owned());
    let ran = imgdm(std::iter::once("attach".into()).chain(words));
    assert!(ran.status.success(), "{ran}");
    (ran.stdout.lines().map(str::to_owned).collect(), ran.stderr)
}

/// Attaches a raw image with all partitions; gives the names of these.
#[track_caller]
fn attach_all(image: &Path) -> Vec<String> {
    let (paths, said) = attach_with(args!["-f", "raw", "--partitions", image]);
    assert_eq!(said, "");
    let names = paths.iter().map(|path| path.strip_prefix("/dev/mapper/").unwrap().to_owned());
    names.skip(1).collect()
}

/// The partitions that have a device: UUID, table and whether it is read-only, by name.
fn partitions() -> BTreeMap<String, (String, String, bool)> {
    // Few programs: each takes its time in the guest.
    let tables = tool("dmsetup", ["table"]);
    let all = dm_devices().into_iter().filter(|(_, uuid)| uuid.starts_with("part"));
    let device = |(name, uuid): (String, String)| {
        let table = tables.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        let node = fs::canonicalize(Path::new("/dev/mapper").join(&name)).unwrap();
        let number = fs::metadata(node).unwrap().rdev();
        let (major, minor) = (libc::major(number), libc::minor(number));
        let read_only = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/ro")).unwrap();
        (name, (uuid, table.unwrap().to_owned(), read_only == "1\n"))
    };
    all.map(device).collect()
}

/// First sector and length of each partition's device.
fn extents() -> BTreeMap<String, (u64, u64)> {
    let extent = |(name, (_, table, _)): (String, (String, String, bool))| {
        let words: Vec<_> = table.split(' ').collect();
        assert_eq!((words.len(), words[0], words[2]), (5, "0", "linear"), "{name}: {table}");
        (name, (words[4].parse().unwrap(), words[1].parse().unwrap()))
    };
    partitions().into_iter().map(extent).collect()
}

fn detach(name: &str) {
    assert_eq!(imgdm(["detach", name]).ok(), "");
    assert_nothing_left();
}

#[test]
fn a_backup_table_that_cannot_be_read_takes_no_partition_away() {
    let scratch = Scratch::new();
    let raw = disk(&scratch, "disk.raw", 16, GPT);
    let image = scratch.path("disk.qcow2");
    qemu_img(args!["convert", "-O", "qcow2", "-c", &raw, &image]).ok();
    let last = 16 * MIB / 65536 - 1;
    let stream = number(&image, l2_entry(&image, last)) & ((1 << 54) - 1);
    patch(&image, stream, &[0xff; 8]);
    let options = ["--on-error=error-target", "--partitions"];
    let (paths, said) = attach_with(args![options[0], options[1], &image]);
    let all = ["disk", "disk1", "disk2", "disk3"].map(|name| format!("/dev/mapper/{name}"));
    assert_eq!(paths, all);
    assert!(said.contains("no good backup"), "{said}");
    assert!(said.contains(&format!("can't be read at {:#x}", 16 * MIB - 512)), "{said}");
    let wanted = [("disk1", (2048, 2048)), ("disk2", (6144, 4096)), ("disk3", (12288, 99))];
    assert_eq!(extents(), wanted.map(|(name, extent)| (name.to_owned(), extent)).into());
    imgdm(["verify", "disk"]).ok();
    detach("disk");
}

#[test]
fn names_uuids_and_tables_are_those_that_kpartx_makes() {
    let scratch = Scratch::new();
    for (name, script) in [("disk.raw", DOS), ("disk2.raw", GPT)] {
        let image = disk(&scratch, name, 16, script);
        let device = attach(args!["-f", "raw", &image]);
        tool("kpartx", args!["-a", "-r", &device.path]);
        let theirs = partitions();
        assert!(theirs.len() >= 3, "{theirs:#?}");
        // They are as good as ours.
        let listed: Vec<_> = theirs.keys().cloned().collect();
        assert_eq!(attach_all(&image), listed);
        assert_eq!(partitions(), theirs);
        tool("kpartx", args!["-d", &device.path]);
        assert_eq!(partitions(), BTreeMap::new());
        assert_eq!(attach_all(&image), listed);
        assert_eq!(partitions(), theirs);
        // kpartx knows ours, too.
        tool("kpartx", args!["-d", &device.path]);
        assert_eq!(partitions(), BTreeMap::new());
        device.detach();
    }
}

#[test]
fn numbers_and_places_are_those_of_libblkid_also_of_nested_tables() {
    let scratch = Scratch::new();
    let sun = "label: sun\nstart=0, size=16065, type=3\nstart=16065, size=16065, type=2";
    let sgi = "label: sgi\nstart=4096, size=4096, type=83\nstart=8192, size=4096, type=82";
    let bsd = "label: dos\nstart=2048, size=16384, type=a5\nstart=20480, size=2048, type=83";
    for (name, script) in [("sun", sun), ("sgi", sgi), ("bsd", bsd), ("dos", DOS), ("gpt", GPT)] {
        let image = disk(&scratch, &format!("{name}.raw"), 16, script);
        if name == "bsd" {
            put_bsd_label(&image, 2048, &[(2048, 4096), (6144, 8192)]);
        }
        attach_all(&image);
        let device = format!("/dev/mapper/{name}");
        let columns = ["--raw", "--noheadings", "-o", "NR,START,SECTORS,TYPE", &device];
        let theirs: BTreeMap<_, _> = tool("partx", columns)
            .lines()
            .map(|line| {
                let words: Vec<_> = line.split(' ').collect();
                let extended = ["0x5", "0xf", "0x85"].contains(&words[3]);
                let length: u64 = words[2].parse().unwrap();
                let length = if extended { 2 } else { length };
                (format!("{name}{}", words[0]), (words[1].parse().unwrap(), length))
            })
            .collect();
        assert!(theirs.len() >= 2, "{theirs:#?}");
        assert_eq!(extents(), theirs);
        if name == "bsd" {
            assert!(theirs.contains_key("bsd5") && theirs.contains_key("bsd6"), "{theirs:#?}");
        }
        detach(name);
    }
}

/// A BSD disklabel in the partition that starts at this sector, with these partitions.
fn put_bsd_label(image: &Path, start: u64, partitions: &[(u32, u32)]) {
    let mut label = vec![0u8; 404];
    for at in [0, 132] {
        label[at..at + 4].copy_from_slice(&0x8256_4557u32.to_le_bytes());
    }
    label[138..140].copy_from_slice(&u16::try_from(partitions.len()).unwrap().to_le_bytes());
    for (index, (start, length)) in partitions.iter().enumerate() {
        let entry = &mut label[148 + 16 * index..][..16];
        entry[..4].copy_from_slice(&length.to_le_bytes());
        entry[4..8].copy_from_slice(&start.to_le_bytes());
        entry[12] = 7;
    }
    let sum = label.chunks(2).fold(0, |sum, pair| sum ^ u16::from_le_bytes([pair[0], pair[1]]));
    label[136..138].copy_from_slice(&sum.to_le_bytes());
    patch(image, start * SECTOR + 512, &label);
}

#[test]
fn each_partition_has_its_bytes_of_the_disk_and_takes_none() {
    let scratch = Scratch::new();
    let raw = disk(&scratch, "raw", 16, DOS);
    let image = scratch.path("disk.qcow2");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", "-c", &raw, &image]).ok();
    let wanted = fs::read(&raw).unwrap();
    let (paths, _) = attach_with(args!["--partitions", &image]);
    assert_eq!(paths.len(), 6, "{paths:?}");
    for (name, (start, length)) in extents() {
        let path = PathBuf::from(format!("/dev/mapper/{name}"));
        let device = Device { name: name.clone(), path: path.clone() };
        let [from, to] = [start, start + length].map(|s| usize::try_from(s * SECTOR).unwrap());
        assert_same(&name, &device.bytes(), &wanted[from..to]);
        assert_eq!(tool("blockdev", args!["--getro", &path]).trim(), "1");
        let written = OpenOptions::new().write(true).open(&path).and_then(|mut file| {
            file.write_all(&[0; 4096])?;
            file.sync_all()
        });
        assert!(written.is_err(), "{name} was written");
    }
    detach("disk");
    assert_eq!(qemu_content(&scratch, &image, &[]), wanted);
}

#[test]
fn partitions_of_an_encrypted_disk_are_those_that_the_key_shows() {
    let scratch = Scratch::new();
    let image = Encrypted::luks(&scratch, "disk.qcow2", "");
    let raw = scratch.path("raw");
    File::create(&raw).unwrap().set_len(MIB).unwrap();
    sfdisk(&raw, "label: dos\nstart=16, size=32, type=83");
    image.write(&[&format!("write -s {} 0 512", raw.display())]);
    let key = image.key_file(&scratch);
    let (paths, said) = attach_with(args!["--key-file", &key, "--partitions", &image.path]);
    assert_eq!((paths.len(), said.as_str()), (2, ""), "{paths:?}");
    assert_eq!(extents()["disk1"], (16, 32));
    detach("disk");
}

#[test]
fn attaching_again_adds_what_is_missing_and_changes_nothing_else() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, GPT);
    let whole = attach(args!["-f", "raw", &image]);
    let number = whole.number();
    let one = |n: &str| attach_with(args!["-f", "raw", "-p", n, &image]).0;
    assert_eq!(one("2"), ["/dev/mapper/disk", "/dev/mapper/disk2"]);
    assert_eq!(partitions().len(), 1);
    let names = attach_all(&image);
    assert_eq!(names, ["disk1", "disk2", "disk3"]);
    let before = (partitions(), dm_devices());
    for _ in 0..2 {
        assert_eq!(attach_all(&image), names);
        assert_eq!(one("3"), ["/dev/mapper/disk", "/dev/mapper/disk3"]);
        assert_eq!(attach(args!["-f", "raw", &image]), whole);
    }
    assert_eq!((partitions(), dm_devices()), before);
    assert_eq!(whole.number(), number);
    detach("disk");
    // And both at once.
    let (paths, _) = attach_with(args!["-f", "raw", "-p", "3", "-p", "1", &image]);
    assert_eq!(paths, ["/dev/mapper/disk", "/dev/mapper/disk1", "/dev/mapper/disk3"]);
    for path in &paths {
        File::open(path).unwrap();
    }
    imgdm(["detach", "--all"]).ok();
}

#[test]
fn a_partition_that_is_not_there_is_66_and_leaves_things_as_they_were() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, GPT);
    let ask = |numbers: &[&str]| {
        let words = numbers.iter().flat_map(|n| ["-p", n]).map(std::ffi::OsString::from);
        imgdm(args!["attach", "-f", "raw", &image].into_iter().chain(words))
    };
    let said = ask(&["1", "4"]).refused(66);
    assert!(said.contains("no partition 4") && said.contains("1, 2 and 3"), "{said}");
    assert_nothing_left();
    let device = attach(args!["-f", "raw", &image]);
    ask(&["9"]).refused(66);
    assert_eq!(partitions(), BTreeMap::new());
    assert_eq!(listed().len(), 1);
    device.detach();
    imgdm(args!["attach", "--partitions", "-p", "1", &image]).refused(64);

    // Nothing is inflated for one that is not there.
    let packed = scratch.path("packed.qcow2");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", "-c", &image, &packed]).ok();
    let said = run(&mut faulty(&["-p", "4"], &packed, "list")).refused(66);
    assert!(said.contains("partitions 1, 2 and 3") && !said.contains("inflate"), "{said}");
    assert!(steps(&["-p", "3"], &packed).iter().any(|step| step == "inflate"));

    // The name of one is taken: nothing of the others stays.
    tool("dmsetup", ["create", "disk2", "-u", "LVM-abc", "--table", "0 8 zero"]);
    let said = imgdm(args!["attach", "-f", "raw", "--partitions", &image]).refused(73);
    assert!(said.contains("'disk2'") && said.contains("LVM"), "{said}");
    assert_eq!(dm_devices(), [("disk2".to_owned(), "LVM-abc".to_owned())]);
    tool("dmsetup", ["remove", "disk2"]);
}

#[test]
fn a_disk_without_a_table_is_attached_and_what_lies_on_it_is_told() {
    let scratch = Scratch::new();
    let image = scratch.path("disk.raw");
    File::create(&image).unwrap().set_len(4 * MIB).unwrap();
    let words = args!["-f", "raw", "--partitions", &image];
    let (paths, said) = attach_with(&words);
    assert_eq!(paths, ["/dev/mapper/disk"]);
    assert!(said.contains("warning") && said.contains("no partition table"), "{said}");
    detach("disk");
    tool("mkfs.ext4", args!["-q", "-F", "-O", "^has_journal", &image]);
    let (paths, said) = attach_with(&words);
    assert_eq!(paths, ["/dev/mapper/disk"]);
    assert!(said.contains("ext4 lies on the whole of it"), "{said}");
    let said = imgdm(args!["attach", "-f", "raw", "-p", "1", &image]).refused(66);
    assert!(said.contains("ext4"), "{said}");
    detach("disk");
}

#[test]
fn the_backup_of_a_damaged_gpt_is_used_and_told() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, GPT);
    let words = args!["-f", "raw", "--partitions", &image];
    attach_with(&words);
    let before = extents();
    detach("disk");
    patch(&image, 512, &[0; 8]);
    let (_, said) = attach_with(&words);
    assert!(said.contains("the primary GPT is damaged"), "{said}");
    assert_eq!(extents(), before);
    detach("disk");
}

#[test]
fn a_gpt_of_sectors_of_4096_bytes_is_attached() {
    let scratch = Scratch::new();
    // sfdisk writes one only on a disk that has such sectors.
    let image = scratch.path("disk.raw");
    File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let made = tool("losetup", args!["-b", "4096", "-f", "--show", &image]);
    let made = made.trim();
    sfdisk(Path::new(made), "label: gpt\nstart=256, size=256\nstart=1024, size=512");
    tool("losetup", ["-d", made]);
    attach_all(&image);
    let wanted = [("disk1".to_owned(), (2048, 2048)), ("disk2".to_owned(), (8192, 4096))];
    assert_eq!(extents(), BTreeMap::from(wanted));
    detach("disk");
}

#[test]
fn hostile_tables_are_bounded_and_what_cannot_be_had_is_told() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, "label: dos\nstart=2048, size=2048, type=83");
    let words = args!["-f", "raw", "--partitions", &image];
    let entry = |index: u64, kind: u8, start: u32, length: u32| {
        patch(&image, 446 + 16 * index + 4, &[kind]);
        patch(&image, 446 + 16 * index + 8, &start.to_le_bytes());
        patch(&image, 446 + 16 * index + 12, &length.to_le_bytes());
    };
    entry(1, 0x83, 3000, 2048); // Over the first.
    entry(2, 0x83, 32000, 1 << 31); // Past the end.
    entry(3, 0x5, 8192, 8192); // Its first record is its own next one, without end.
    let record = 8192 * SECTOR;
    patch(&image, record + 446 + 4, &[0x83]);
    patch(&image, record + 446 + 8, &[[64, 0, 0, 0], [64, 0, 0, 0]].concat());
    patch(&image, record + 462 + 4, &[0x5]);
    patch(&image, record + 462 + 8, &[[0, 0, 0, 0], [0, 32, 0, 0]].concat());
    patch(&image, record + 510, &[0x55, 0xaa]);
    let (paths, said) = attach_with(&words);
    assert!(paths.contains(&"/dev/mapper/disk1".to_owned()), "{paths:?}");
    assert!(!paths.contains(&"/dev/mapper/disk2".to_owned()), "{paths:?}");
    assert!(!paths.contains(&"/dev/mapper/disk3".to_owned()), "{paths:?}");
    assert!(paths.len() <= 257, "{paths:?}");
    assert!(said.contains("partition 2 is passed over: it overlaps partition 1"), "{said}");
    assert!(said.contains("partition 3 is passed over: it reaches past the end"), "{said}");
    for (name, (start, length)) in extents() {
        assert!(start + length <= 16 * 2048, "{name}");
    }
    detach("disk");
}

#[test]
fn detach_takes_partitions_first_and_says_who_is_on_one() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, DOS);
    attach_all(&image);
    let open = start(command("sleep", ["60"]).stdin(File::open("/dev/mapper/disk5").unwrap()));
    let before = partitions();
    let said = imgdm(["detach", "disk"]).refused(75);
    assert!(said.contains("sleep") && said.contains("partition 'disk5'"), "{said}");
    assert!(!said.contains("disk1"), "{said}");
    assert_eq!(partitions(), before);
    // A partition is no attachment of its own.
    for argument in ["disk5", "/dev/mapper/disk5"] {
        let said = imgdm(["detach", "--if-attached", argument]).refused(64);
        assert!(said.contains("'disk5' is partition 5 of 'disk'"), "{said}");
    }
    imgdm(["detach", "--deferred", "disk"]).ok();
    let mut left = our_devices();
    left.sort();
    assert_eq!(left, ["disk", "disk5"]);
    drop(open);
    assert_nothing_left_soon();
}

#[test]
fn list_and_verify_know_partitions() {
    let scratch = Scratch::new();
    let image = disk(&scratch, "disk.raw", 16, GPT);
    let device = attach(args!["-f", "raw", &image]);
    assert_eq!(listed()[0]["partitions"], serde_json::json!([]));
    attach_all(&image);
    let all = listed();
    assert_eq!(all.len(), 1, "{all:?}");
    let listed = all[0]["partitions"].as_array().unwrap();
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[1]["number"], 2);
    assert_eq!(listed[1]["name"], "disk2");
    assert_eq!(listed[1]["device"], "/dev/mapper/disk2");
    assert_eq!(listed[1]["size"], 2 * MIB);
    let uuid = format!("part2-{}", all[0]["uuid"].as_str().unwrap());
    assert_eq!(listed[1]["uuid"], uuid.as_str());
    let human = imgdm(["list"]).ok();
    assert!(human.contains("disk2") && human.contains("partition 2"), "{human}");
    imgdm(["verify", "disk"]).ok();

    // One that is elsewhere, one that can be written to, one that the table knows nothing of.
    let table = format!("0 8 linear {} 6144", device.number());
    tool("dmsetup", ["reload", "-r", "disk1", "--table", &table]);
    tool("dmsetup", ["resume", "disk1"]);
    let ran = imgdm(["verify", "disk"]);
    assert_eq!(ran.code(), Some(1), "{ran}");
    assert!(ran.stdout.contains("'disk1' is not what the partition table says"), "{ran}");
    tool("dmsetup", ["remove", "disk1"]);
    tool(
        "dmsetup",
        ["create", "-r", "disk7", "-u", &uuid.replace("part2", "part7"), "--table", &table],
    );
    let ran = imgdm(["verify", "disk"]);
    assert!(ran.stdout.contains("the disk has no partition 7"), "{ran}");
    let said = imgdm(args!["attach", "-f", "raw", "--partitions", &image]);
    assert!(said.status.success(), "{said}");
    detach("disk");
}

// --- Faults ---------------------------------------------------------------------------

/// A disk with two partitions.
fn small(scratch: &Scratch) -> PathBuf {
    disk(
        scratch,
        "small.raw",
        2,
        "label: dos\nstart=2048, size=64, type=83\nstart=2200, size=64, type=83",
    )
}

const WITH: [&str; 3] = ["-f", "raw", "--partitions"];

#[test]
fn killed_at_any_step_with_partitions_attach_leaves_nothing_or_what_it_completes() {
    let scratch = Scratch::new();
    let image = small(&scratch);
    let steps = steps(&WITH, &image);
    for step in ["create", "load-zero", "open", "mark", "load", "resume", "commit", "publish"] {
        for device in ["part1", "part2"] {
            assert!(steps.contains(&format!("{device}.{step}")), "no {device}.{step}: {steps:?}");
        }
    }
    let commit = steps.iter().position(|step| step == "commit").unwrap();
    let first = steps.iter().position(|step| step == "above.read").unwrap();
    // Those of the second partition do for both, up to the commit.
    let is_wanted =
        |&(at, step): &(usize, &String)| at == first || step.starts_with("part2") || at >= commit;
    for (at, step) in steps.iter().enumerate().skip(first).filter(is_wanted) {
        let ran = run(&mut faulty(&WITH, &image, &format!("{step}:kill")));
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        if at < commit {
            wait_for(&format!("what was killed after {step} to go"), || left(None).is_empty());
            continue;
        }
        assert_eq!(ran.stdout, "", "{step}");
        assert_eq!(listed().len(), 1, "{step}");
        assert_eq!(attach_all(&image), ["small1", "small2"], "{step}");
        detach("small");
    }
}

#[test]
fn failing_or_stopped_at_any_step_with_partitions_attach_rolls_back() {
    let scratch = Scratch::new();
    let image = small(&scratch);
    let all = steps(&WITH, &image);
    let first = all.iter().position(|step| step == "part1.resume").unwrap();
    for (at, step) in all.iter().enumerate().skip(first) {
        if at % 2 == 0 {
            let said = run(&mut faulty(&WITH, &image, &format!("{step}:fail"))).refused(1);
            assert!(!said.contains("left behind"), "{step}: {said}");
        } else {
            let attaching = start(&mut faulty(&WITH, &image, &format!("{step}:stop")));
            wait_for("it to stop", || attaching.is_stopped());
            attaching.signal(Signal::SIGTERM);
            attaching.signal(Signal::SIGCONT);
            assert_eq!(attaching.finish().signal(), Some(libc::SIGTERM), "{step}");
        }
        assert_nothing_left();
    }
    // What was there before stays.
    let device = attach(args!["-f", "raw", &image]);
    for step in ["part1.resume", "part2.mark", "part2.publish"] {
        run(&mut faulty(&WITH, &image, &format!("{step}:fail"))).refused(1);
        assert_eq!(our_devices(), ["small"], "{step}");
    }
    device.detach();
}
