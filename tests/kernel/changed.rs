//! An image that is cut off, replaced or written over while it is attached: what is read
//! then, and what `verify` says.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::args;
use crate::guest::*;

/// Of what another file has: no block of an image's content begins so.
const ALIEN: &[u8] = b"another file's, and nobody else's";
const BLOCK: usize = 4096;

/// A qcow2 of 2 MiB, all of it allocated, in order; and its content, each block of which says
/// where it is and is neither zeros nor another's.
fn image(scratch: &Scratch, name: &str) -> (PathBuf, Vec<u8>) {
    let mut content = Random(0x5eed).bytes(2 << 20);
    for (number, block) in content.chunks_mut(BLOCK).enumerate() {
        let mark = format!("{name}, block {number};");
        block[..mark.len()].copy_from_slice(mark.as_bytes());
    }
    let raw = scratch.path("content.raw");
    fs::write(&raw, &content).unwrap();
    let path = scratch.path(name);
    qemu_img(args!["convert", "-f", "raw", "-O", "qcow2", &raw, &path]).ok();
    fs::remove_file(raw).unwrap();
    (path, content)
}

/// What a block of the device may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Block {
    /// What the image had there.
    Old,
    Zeros,
    Failed,
    Other,
}

/// Each block as it is read past the page cache.
fn blocks(device: &Path, content: &[u8]) -> Vec<Block> {
    drop_caches();
    let look = |(number, old): (usize, &[u8])| {
        let read = read_direct(device, (number * BLOCK) as u64, BLOCK);
        match read {
            Err(_) => Block::Failed,
            Ok(bytes) if bytes == old => Block::Old,
            Ok(bytes) if bytes.iter().all(|&byte| byte == 0) => Block::Zeros,
            Ok(bytes) => {
                assert!(!bytes.starts_with(ALIEN), "block {number} is another file's");
                Block::Other
            }
        }
    };
    content.chunks(BLOCK).enumerate().map(look).collect()
}

/// Fills what is free in a directory's file system, up to 16 MiB, with another file's bytes.
fn fill_with_alien_bytes(directory: &Path) {
    let block: Vec<_> = ALIEN.iter().copied().cycle().take(BLOCK).collect();
    fs::write(directory.join("alien"), block.repeat(4096)).unwrap();
    nix::unistd::sync();
}

/// The kinds that `verify` finds, of which there must be some.
#[track_caller]
fn kinds_found(name: &str) -> Vec<String> {
    let ran = imgdm(["verify", "--output=json", name]);
    assert_eq!(ran.code(), Some(1), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().iter();
    findings.map(|finding| finding["kind"].as_str().unwrap().to_owned()).collect()
}

/// What `list` says of the path of the only attachment's image.
fn state() -> Value {
    listed()[0]["image"]["state"].clone()
}

#[test]
fn past_the_new_end_of_a_file_that_was_cut_off_there_are_zeros_or_errors() {
    let scratch = Scratch::on_disk();
    for (direct_io, past_the_end) in [("off", Block::Zeros), ("on", Block::Failed)] {
        let (image, content) = image(&scratch, "disk.qcow2");
        let device = attach(args!["--direct-io", direct_io, &image]);
        let file = OpenOptions::new().write(true).open(&image).unwrap();
        let (length, cut) = (file.metadata().unwrap().len(), MIB);
        file.set_len(cut).unwrap();
        // Where the cut is the file's own matter; its blocks may have another owner now.
        fill_with_alien_bytes(scratch.directory());
        let read = blocks(&device.path, &content);
        let kept = read.iter().take_while(|&&block| block == Block::Old).count();
        assert!((kept * BLOCK) as u64 > MIB / 2, "{kept} blocks are left of 1 MiB: {direct_io}");
        assert!(read[kept..].iter().all(|&block| block == past_the_end), "{direct_io}: {read:?}");
        assert_eq!(state(), "same");
        assert!(kinds_found("disk").contains(&"past-end-of-file".to_owned()));
        // As long again, it has zeros there.
        file.set_len(length).unwrap();
        let read = blocks(&device.path, &content);
        assert!(read[kept..].iter().all(|&block| block == Block::Zeros), "{direct_io}: {read:?}");
        // Nothing of it is left at all.
        file.set_len(0).unwrap();
        assert!(blocks(&device.path, &content).iter().all(|&block| block == past_the_end));
        assert!(kinds_found("disk").contains(&"size".to_owned()));
        device.detach();
        assert_nothing_left();
        for name in ["alien", "disk.qcow2"] {
            fs::remove_file(scratch.path(name)).unwrap();
        }
    }
}

#[test]
fn an_image_that_was_replaced_or_removed_is_served_as_it_was() {
    let scratch = Scratch::on_disk();
    let (image, content) = image(&scratch, "disk.qcow2");
    let new = scratch.create("qcow2", &[], "new.qcow2", "4M");
    write_image(&new, "qcow2", &["write -P 0x55 0 4M"]);
    let device = attach([&image]);
    fs::rename(&new, &image).unwrap();
    fill_with_alien_bytes(scratch.directory());
    let all_old = || blocks(&device.path, &content).iter().all(|&block| block == Block::Old);
    assert!(all_old());
    // As the kernel has it: the file's own name is gone.
    assert_eq!(state(), "deleted");
    assert_eq!(kinds_found("disk"), ["file"]);
    // The new one is not the one that is attached.
    let said = imgdm(args!["attach", &image]).refused(73);
    assert!(said.contains("'disk' is taken by"), "{said}");
    imgdm(args!["detach", &image]).refused(66);
    let other = attach(args!["--name", "new", &image]);
    assert_eq!(other.bytes()[..512], [0x55; 512]);
    other.detach();
    fs::remove_file(&image).unwrap();
    fill_with_alien_bytes(scratch.directory());
    assert!(all_old());
    assert_eq!(state(), "deleted");
    assert_eq!(kinds_found("disk"), ["file"]);
    device.detach();
}

#[test]
fn the_inode_of_a_removed_image_is_nobody_elses_before_it_is_detached() {
    let scratch = Scratch::on_disk();
    let (image, content) = image(&scratch, "disk.qcow2");
    let inode = fs::metadata(&image).unwrap().ino();
    let store = scratch.path("store");
    let overlay = format!("--overlay={}", store.display());
    attach(args![&overlay, &image]).detach();
    let device = attach([&image]);
    fs::remove_file(&image).unwrap();
    for number in 0..64 {
        let file = File::create(scratch.path(&format!("file{number}"))).unwrap();
        assert_ne!(file.metadata().unwrap().ino(), inode);
    }
    assert!(blocks(&device.path, &content).iter().all(|&block| block == Block::Old));
    device.detach();
    // Now it may be: ext4 takes the first that is free.
    let again = (0..64)
        .map(|number| scratch.path(&format!("again{number}")))
        .find(|path| File::create(path).unwrap().metadata().unwrap().ino() == inode);
    let again = again.expect("no new file has the inode of the old one");
    fs::rename(again, &image).unwrap();
    let new = scratch.create("qcow2", &[], "new.qcow2", "4M");
    write_image(&new, "qcow2", &["write -P 0x55 0 4M"]);
    fs::write(&image, fs::read(&new).unwrap()).unwrap();
    assert_eq!(fs::metadata(&image).unwrap().ino(), inode);
    let device = attach([&image]);
    assert!(device.bytes().iter().all(|&byte| byte == 0x55));
    assert_eq!(imgdm(["verify", "disk"]).code(), Some(0));
    device.detach();
    // What was to be written over the old one is not written over the new.
    let said = imgdm(args!["attach", &overlay, &image]).refused(65);
    assert!(said.contains("was changed since"), "{said}");
}

#[test]
fn what_is_written_over_an_image_in_place_shows_and_verify_tells_what_no_longer_fits() {
    let scratch = Scratch::on_disk();
    let (image, content) = image(&scratch, "disk.qcow2");
    let device = attach([&image]);
    let data = crate::verify::number(&image, crate::verify::l2_entry(&image, 3)) & !(1 << 63);
    // A cluster's bytes: they are the image's own, so the device has them, and that is right.
    patch(&image, data, &[0xaa; 65536]);
    let bytes = device.bytes();
    assert_eq!(bytes[3 << 16..4 << 16], [0xaa; 65536]);
    assert_same("before", &bytes[..3 << 16], &content[..3 << 16]);
    assert_same("behind", &bytes[4 << 16..], &content[4 << 16..]);
    assert_eq!(imgdm(["verify", "disk"]).code(), Some(0));
    assert_eq!(imgdm(["verify", "--content", "disk"]).code(), Some(0));
    // Another image written into the same file: what is where is as it was, and its bytes are
    // the file's, which is what no path or inode could tell.
    let other = scratch.create("qcow2", &["-o", "cluster_size=4k"], "other.qcow2", "4M");
    write_image(&other, "qcow2", &["write -P 0x77 2M 2M", "write -P 0x66 0 2M"]);
    fs::write(&image, fs::read(&other).unwrap()).unwrap();
    let file = fs::read(&image).unwrap();
    drop_caches();
    for number in 0..content.len() / BLOCK {
        // The file is shorter than it was.
        let Ok(block) = read_direct(&device.path, (number * BLOCK) as u64, BLOCK) else { continue };
        let is_of_file = file.chunks(BLOCK).any(|own| own == block);
        assert!(is_of_file || block.iter().all(|&byte| byte == 0), "block {number}");
    }
    assert_eq!(state(), "same");
    assert!(kinds_found("disk").contains(&"mapping".to_owned()));
    // As it is now it is not what is attached.
    let said = imgdm(args!["attach", &image]).refused(73);
    assert!(said.contains("its live table is not"), "{said}");
    device.detach();
    // Something that is no image at all.
    let device = attach([&image]);
    fs::write(&image, vec![0x11; file.len()]).unwrap();
    assert!(kinds_found("disk").contains(&"mapping".to_owned()));
    device.detach();
}
