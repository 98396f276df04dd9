//! Writable devices: what is written to them, and what becomes of the image and the store.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::args;
use crate::guest::*;

/// Content and times of files: what must not change while they are attached.
fn untouched(files: &[PathBuf]) -> Vec<(Vec<u8>, [i64; 6])> {
    let look = |file: &PathBuf| {
        let m = fs::metadata(file).unwrap();
        let times =
            [m.atime(), m.atime_nsec(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()];
        let flags = nix::libc::O_NOATIME;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(file).unwrap();
        let mut bytes = vec![0; usize::try_from(m.len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        (bytes, times)
    };
    files.iter().map(look).collect()
}

/// Writes random pieces to the device, of whole sectors and not, and the same to `wanted`.
fn write_randomly(device: &Path, wanted: &mut [u8], seed: u64, count: u64) {
    let file = OpenOptions::new().write(true).open(device).unwrap();
    let mut random = Random(seed);
    for _ in 0..count {
        let at = random.below(wanted.len() as u64);
        let most = (wanted.len() as u64 - at).min(40 * KIB);
        let length = usize::try_from(random.below(most) + 1).unwrap().min(wanted.len());
        let bytes = random.bytes(length.min(wanted.len() - usize::try_from(at).unwrap()));
        file.write_all_at(&bytes, at).unwrap();
        let at = usize::try_from(at).unwrap();
        wanted[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    file.sync_all().unwrap();
}

/// A chain of two qcow2 images over a raw one of 3 MiB and a bit.
fn chain(scratch: &Scratch) -> (PathBuf, Vec<PathBuf>) {
    let base = scratch.path("base.raw");
    fs::write(&base, Random(3).bytes(3 * 1024 * 1024 + 3 * 512)).unwrap();
    let middle = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "middle.qcow2", "");
    write_image(&middle, "qcow2", &["write -P 7 512k 300k", "write -z 1M 128k"]);
    let top = scratch.create("qcow2", &["-b", "middle.qcow2", "-F", "qcow2"], "disk.qcow2", "");
    write_image(&top, "qcow2", &["write -P 9 600k 64k", "write -P 5 3M 1k"]);
    (top.clone(), vec![top, middle, base])
}

#[test]
fn what_is_written_is_read_again_and_the_image_stays_as_it_was() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let mut wanted = qemu_content(&scratch, &image, &[]);
    let before = untouched(&files);
    let device = attach(args!["--overlay", "--scratch-dir", scratch.directory(), &image]);
    assert_same("untouched", &device.bytes(), &wanted);
    write_randomly(&device.path, &mut wanted, 5, 60);
    assert_same("written", &device.bytes(), &wanted);
    // The last sectors are no whole chunk.
    let end = wanted.len() - 1024;
    wanted[end..].fill(0xee);
    let file = OpenOptions::new().write(true).open(&device.path).unwrap();
    file.write_all_at(&[0xee; 1024], end as u64).unwrap();
    file.sync_all().unwrap();
    drop(file);
    assert_same("its end", &device.bytes(), &wanted);
    assert_eq!(untouched(&files), before);
    device.detach();
    assert_nothing_left();
    assert_eq!(fs::read_dir(scratch.directory()).unwrap().count(), 3);
    assert_eq!(untouched(&files), before);
}

#[test]
fn a_kept_store_has_it_all_again() {
    let scratch = Scratch::on_disk();
    let (image, files) = chain(&scratch);
    let mut wanted = qemu_content(&scratch, &image, &[]);
    let before = untouched(&files);
    let store = scratch.path("disk.store");
    let overlay = format!("--overlay={}", store.display());
    for round in 0..3 {
        let device = attach(args![&overlay, &image]);
        assert_same(&format!("round {round}"), &device.bytes(), &wanted);
        write_randomly(&device.path, &mut wanted, 70 + round, 20);
        assert_same(&format!("written in round {round}"), &device.bytes(), &wanted);
        device.detach();
        assert_nothing_left();
    }
    assert_eq!(fs::metadata(&store).unwrap().mode() & 0o777, 0o600);
    assert_eq!(untouched(&files), before);
    let _ = File::open(&store).unwrap();
}
