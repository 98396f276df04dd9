//! Images, scratch files and stores on a disk that fails: dm-dust for blocks that can't be
//! read, dm-error for a disk that is gone, dm-flakey for one that takes no writes.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args;
use crate::compressed::text;
use crate::guest::*;
use crate::overlay::kept;
use crate::verify::{l2_entry, number};

const BLOCK: u64 = 4096;
const SIZE: u64 = 64 * MIB;

/// An ext4 on a device that can be told to fail.
struct BadDisk {
    place: PathBuf,
    source: String,
    file: PathBuf,
}

const NAME: &str = "bad-disk";

impl BadDisk {
    #[track_caller]
    fn make(scratch: &Scratch) -> Self {
        let file = scratch.path("bad-disk.fs");
        fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let source = tool("losetup", args!["--show", "-f", &file]).trim().to_owned();
        let place = PathBuf::from("/run/bad-disk");
        fs::create_dir_all(&place).unwrap();
        let disk = Self { place, source, file };
        for target in ["dust", "flakey"] {
            tool("modprobe", [format!("dm-{target}")]);
        }
        tool("dmsetup", ["create", "--noudevsync", NAME, "--table", &disk.dust()]);
        let node = format!("/dev/mapper/{NAME}");
        tool("mkfs.ext4", ["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0", &node]);
        tool("mount", args![&node, &disk.place]);
        disk
    }

    /// As it should be, until blocks are made bad.
    fn dust(&self) -> String {
        format!("0 {} dust {} 0 {BLOCK}", SIZE / 512, self.source)
    }

    /// All of it has failed.
    fn error(&self) -> String {
        format!("0 {} error", SIZE / 512)
    }

    /// No write succeeds.
    fn read_only(&self) -> String {
        format!("0 {} flakey {} 0 0 3600 1 error_writes", SIZE / 512, self.source)
    }

    fn reload(&self, table: &str) {
        tool("dmsetup", ["suspend", "--noflush", "--nolockfs", NAME]);
        tool("dmsetup", ["load", NAME, "--table", table]);
        tool("dmsetup", ["resume", "--noudevsync", NAME]);
    }

    /// Has the block with this byte of a file fail to be read.
    #[track_caller]
    fn spoil(&self, file: &Path, offset: u64) {
        nix::unistd::sync();
        let printed = tool("filefrag", args!["-e", "-v", "-b4096", file]);
        let block = offset / BLOCK;
        // "   0:        0..      15:       1024..      1039:     16:             last,eof"
        let physical = printed.lines().find_map(|line| {
            let mut fields = line.split(':').skip(1);
            let range = |field: &str| -> Option<(u64, u64)> {
                let (first, last) = field.split_once("..")?;
                Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
            };
            let logical = range(fields.next()?)?;
            let physical = range(fields.next()?)?;
            (logical.0..=logical.1).contains(&block).then(|| physical.0 + block - logical.0)
        });
        let physical = physical.unwrap_or_else(|| panic!("no block {block} in: {printed}"));
        tool("dmsetup", ["message", NAME, "0", "addbadblock", &physical.to_string()]);
        tool("dmsetup", ["message", NAME, "0", "enable"]);
        drop_caches();
    }

    fn mend(&self) {
        tool("dmsetup", ["message", NAME, "0", "clearbadblocks"]);
        drop_caches();
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.place, nix::mount::MntFlags::MNT_DETACH);
        let _ = within(SETTLE, || {
            run(&mut command("dmsetup", ["remove", "--noudevsync", NAME])).status.success()
        });
        let _ = run(&mut command("losetup", ["-d", &self.source]));
        let _ = fs::remove_file(&self.file);
    }
}

/// A qcow2 of 4 MiB, all of it written, and its content.
fn image(scratch: &Scratch, disk: &BadDisk) -> (PathBuf, Vec<u8>) {
    let content = Random(0xbad).bytes(4 << 20);
    let raw = scratch.path("content.raw");
    fs::write(&raw, &content).unwrap();
    let image = disk.place.join("disk.qcow2");
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &image]).ok();
    (image, content)
}

#[test]
fn metadata_that_cannot_be_read_is_told_with_file_and_offset_and_nothing_is_left() {
    let scratch = Scratch::on_disk();
    let disk = BadDisk::make(&scratch);
    let (image, _) = image(&scratch, &disk);
    let places = [0, number(&image, 40), l2_entry(&image, 0)];
    let over = disk.place.join("over.qcow2");
    let create = args!["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", &over];
    run(command("qemu-img", create).current_dir(&disk.place)).ok();
    let out = scratch.path("out");
    for place in places {
        disk.spoil(&image, place);
        for words in [
            args!["attach", &image].to_vec(),
            args!["attach", &over].to_vec(),
            args!["mount", &over, scratch.directory()].to_vec(),
            args!["plan", &image].to_vec(),
            args!["map", &image].to_vec(),
            args!["hash", &image].to_vec(),
            args!["convert", "-O", "raw", &image, &out].to_vec(),
        ] {
            let what = format!("{words:?}, with the block at {place:#x} bad");
            drop_caches();
            let ran = imgdm(words);
            // Where there is a header, what else can't be read is damage. A plan lists what
            // stands in the way of attaching, which is its purpose.
            let codes: &[i32] = match place {
                0 => &[1],
                _ if ran.what.contains("\"plan\"") => &[0],
                _ => &[1, 65],
            };
            assert!(ran.code().is_some_and(|code| codes.contains(&code)), "{what}: {ran}");
            let said = format!("{}{}", ran.stdout, ran.stderr);
            assert!(said.contains("disk.qcow2") && said.contains("offset 0x"), "{what}: {said}");
            assert!(said.contains("Input/output error"), "{what}: {said}");
            assert!(!out.exists());
            assert_nothing_left();
        }
        disk.mend();
    }
    attach([&over]).detach();
}

#[test]
fn data_that_cannot_be_read_fails_there_and_nowhere_else() {
    let scratch = Scratch::on_disk();
    let disk = BadDisk::make(&scratch);
    let (image, content) = image(&scratch, &disk);
    let offset = (number(&image, l2_entry(&image, 9)) & !(1 << 63)) + 5 * BLOCK;
    disk.spoil(&image, offset);
    let bad = (9 * 65536 + 5 * BLOCK) / BLOCK;
    for direct_io in ["on", "off"] {
        let device = attach(args!["--direct-io", direct_io, &image]);
        for (number, wanted) in (0..).zip(content.chunks(4096)) {
            drop_caches_of(number);
            match read_direct(&device.path, number * BLOCK, 4096) {
                Ok(bytes) => assert!(bytes == wanted && number != bad, "{direct_io}: {number}"),
                Err(error) => {
                    assert_eq!((number, error.raw_os_error()), (bad, Some(nix::libc::EIO)));
                }
            }
        }
        assert_eq!(imgdm(["verify", "disk"]).code(), Some(0));
        let ran = imgdm(["verify", "--content", "--output=json", "disk"]);
        assert_eq!(ran.code(), Some(1), "{ran}");
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["findings"][0]["kind"], "unreadable", "{ran}");
        device.detach();
        assert_nothing_left();
    }
    let out = scratch.path("out");
    for words in [
        args!["hash", &image].to_vec(),
        args!["convert", "-O", "raw", &image, &out].to_vec(),
        args!["convert", "-O", "qcow2", &image, &out].to_vec(),
    ] {
        let ran = imgdm(&words);
        assert_eq!(ran.code(), Some(1), "{ran}");
        let said = &ran.stderr;
        assert!(said.contains("disk.qcow2") && said.contains("Input/output error"), "{said}");
        assert!(said.contains("offset 0x"), "{said}");
        assert!(!out.exists(), "{words:?}");
    }
    // What was written over is readable again.
    disk.mend();
    let device = attach([&image]);
    assert_same("mended", &device.bytes(), &content);
    device.detach();
}

/// The page cache now and then: it would hide little, and to drop it takes its time.
fn drop_caches_of(number: u64) {
    if number.is_multiple_of(128) {
        drop_caches();
    }
}

#[test]
fn a_disk_that_has_gone_fails_reads_and_is_detached_from_without_a_trace() {
    let scratch = Scratch::on_disk();
    let disk = BadDisk::make(&scratch);
    let (image, content) = image(&scratch, &disk);
    let device = attach([&image]);
    assert_same("before", &device.bytes(), &content);
    nix::unistd::sync();
    disk.reload(&disk.error());
    drop_caches();
    assert!(read_direct(&device.path, 0, 4096).is_err());
    assert_eq!(listed()[0]["image"]["path"], image.display().to_string());
    let ran = imgdm(["verify", "disk"]);
    assert_eq!(ran.code(), Some(1), "{ran}");
    device.detach();
    assert_nothing_left();
    // To attach it now is refused, and says why.
    let said = imgdm(args!["attach", &image]).refused(1);
    assert!(said.contains("disk.qcow2") && said.contains("Input/output error"), "{said}");
    assert_nothing_left();
    disk.reload(&disk.dust());
}

#[test]
fn a_scratch_file_whose_disk_takes_no_writes_is_no_wrong_content() {
    let scratch = Scratch::on_disk();
    let disk = BadDisk::make(&scratch);
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    nix::unistd::sync();
    disk.reload(&disk.read_only());
    let ran = imgdm(args!["attach", "--scratch-dir", &disk.place, &image]);
    if ran.code() == Some(0) {
        // Some of it may be in memory yet; what is not fails.
        drop_caches();
        for (number, wanted) in (0..).zip(wanted.chunks(4096)) {
            if let Ok(bytes) = read_direct(Path::new("/dev/mapper/disk"), number * BLOCK, 4096) {
                assert!(bytes == wanted, "block {number} is neither right nor an error");
            }
        }
        imgdm(["detach", "disk"]).ok();
    } else {
        let said = ran.refused(73);
        assert!(said.contains("bad-disk") && said.contains("Input/output error"), "{said}");
    }
    assert_nothing_left();
    let _ = run(&mut command("umount", args!["-l", &disk.place]));
    disk.reload(&disk.dust());
}

#[test]
fn a_store_whose_disk_fails_is_given_up_and_told_and_the_image_is_unhurt() {
    let scratch = Scratch::on_disk();
    let disk = BadDisk::make(&scratch);
    let image = crate::overlay::raw(&scratch);
    let before = sha256(&image);
    let store = disk.place.join("store");
    let device = attach(args!["--direct-io=on", kept(&store), "-f", "raw", &image]);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[7; 1 << 20], 0).and_then(|()| file.sync_all()).unwrap();
    disk.reload(&disk.error());
    let written = file.write_all_at(&[8; 1 << 20], 2 << 20).and_then(|()| file.sync_all());
    assert!(written.is_err());
    drop(file);
    wait_for("the store to be given up", || listed()[0]["overlay"]["state"] == "invalid");
    assert!(read_direct(&device.path, 0, 4096).is_err());
    let ran = imgdm(["detach", "disk"]);
    // Whether the last sync fails, too, depends on what the file system knows by then.
    assert!(matches!(ran.code(), Some(0 | 1)), "{ran}");
    assert!(ran.stderr.contains("/run/bad-disk/store"), "{ran}");
    assert!(ran.stderr.contains("given this store up"), "{ran}");
    assert_nothing_left();
    assert_eq!(sha256(&image), before);
    let _ = run(&mut command("umount", args!["-l", &disk.place]));
    disk.reload(&disk.dust());
}
