//! `imgdm export` of a store that is kept: it needs no device-mapper. What the kernel writes
//! into one is written here by hand.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use imgdm::open::{OpenPolicy, open_chain};
use imgdm::overlay::persistent::{DEFAULT_CHUNK, PersistentHeader, length_for};
use imgdm::overlay::{STORE_OFFSET, StoreFile, StoreHeader};
use imgdm::scratch::OnError;
use imgdm::units::Sectors;

use crate::contract::assert_fails;
use crate::images::{chain, imgdm};

const CHUNK: usize = 16 << 10;
/// Bytes of the disk of `top.qcow2`.
const DISK: usize = 1 << 20;

/// Makes the file `x.store` for `top.qcow2`: each pair is a chunk of the disk that was changed
/// and the byte that the whole of it is full of now. `fake` may spoil it.
fn store(directory: &Path, changed: &[(u64, u8)], fake: impl FnOnce(&File)) {
    let policy = OpenPolicy { probe_backing: true, ..OpenPolicy::default() };
    let chain = open_chain(&directory.join("top.qcow2"), &policy).unwrap().chain;
    let disk = Sectors::from_bytes(DISK as u64).unwrap();
    let header = StoreHeader {
        disk,
        length: length_for(disk, DEFAULT_CHUNK).unwrap(),
        chunk: DEFAULT_CHUNK,
        on_error: OnError::Refuse,
        snapshot: None,
        files: StoreFile::of_chain(&chain).unwrap(),
    };
    let file = File::create_new(directory.join("x.store")).unwrap();
    file.set_len(STORE_OFFSET + header.length.get()).unwrap();
    file.write_all_at(&header.to_bytes().unwrap(), 0).unwrap();
    let persistent = PersistentHeader { chunk: DEFAULT_CHUNK, valid: true };
    file.write_all_at(&persistent.to_bytes().unwrap(), STORE_OFFSET).unwrap();
    for (slot, &(old, fill)) in (0u64..).zip(changed) {
        // After the header's chunk the area of exceptions, and after that the data.
        let new = 2 + slot;
        let pair = [old.to_le_bytes(), new.to_le_bytes()].concat();
        file.write_all_at(&pair, STORE_OFFSET + CHUNK as u64 + slot * 16).unwrap();
        file.write_all_at(&[fill; CHUNK], STORE_OFFSET + new * CHUNK as u64).unwrap();
    }
    fake(&file);
}

fn export(directory: &Path, more: &[&str]) -> Output {
    imgdm(directory, &[&["export", "./x.store", "out.qcow2"], more].concat())
}

/// The disk of an image, as imgdm reads it.
fn disk(directory: &Path, image: &str) -> Vec<u8> {
    let output = imgdm(directory, &["convert", "--force", image, "disk.raw"]);
    assert!(output.status.success(), "{output:?}");
    fs::read(directory.join("disk.raw")).unwrap()
}

/// The chunks of the disk that the image itself has, not its backing file.
fn own_chunks(directory: &Path, image: &str) -> Vec<u64> {
    let output = imgdm(directory, &["map", "--output=json", image]);
    let map: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let own = map.iter().filter(|row| row["depth"] == 0 && row["present"] == true);
    own.flat_map(|row| {
        let (start, length) = (row["start"].as_u64().unwrap(), row["length"].as_u64().unwrap());
        start / CHUNK as u64..(start + length) / CHUNK as u64
    })
    .collect()
}

#[test]
fn a_kept_store_becomes_an_overlay_of_its_image() {
    let directory = chain();
    let directory = directory.path();
    let mut wanted = disk(directory, "top.qcow2");
    // In no order; the last chunk; one of zeros.
    let changed = [(9, 0xa1), (3, 0xa2), (63, 0xa3), (8, 0xa4), (20, 0)];
    store(directory, &changed, |_| {});
    for (chunk, fill) in changed {
        let start = usize::try_from(chunk).unwrap() * CHUNK;
        wanted[start..start + CHUNK].fill(fill);
    }
    let clusters: Vec<u64> = [0, 8, 20, 60].iter().flat_map(|&start| start..start + 4).collect();
    for (options, own) in [
        (&[][..], &clusters[..]),
        (&["-c"], &clusters),
        (&["--subclusters"], &[3, 8, 9, 20, 63]),
        (&["-o", "cluster_size=16k"], &[3, 8, 9, 20, 63]),
    ] {
        let output = export(directory, &[options, &["--force", "--output=json"]].concat());
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(said["changed"], 5 * CHUNK, "{said}");
        let image = fs::canonicalize(directory.join("top.qcow2")).unwrap();
        assert_eq!(said["backing_file"]["path"], image.to_str().unwrap(), "{said}");
        assert!(disk(directory, "out.qcow2") == wanted, "{options:?}");
        assert_eq!(own_chunks(directory, "out.qcow2"), own, "{options:?}");
        let checked = imgdm(directory, &["check", "out.qcow2"]);
        assert!(checked.status.success(), "{checked:?}");
    }
    let output = export(directory, &[]);
    assert_fails(&output, 73, &["out.qcow2", "--force"]);
}

#[test]
fn a_store_that_is_damaged_or_given_up_is_refused() {
    type Fake = fn(&File);
    let cases: [(Fake, &str); 4] = [
        (|file| file.write_all_at(&[0; 4], STORE_OFFSET + 4).unwrap(), "given the store up"),
        // The second exception is of the first one's chunk.
        (
            |file| {
                let at = STORE_OFFSET + CHUNK as u64 + 16;
                file.write_all_at(&1u64.to_le_bytes(), at).unwrap();
            },
            "twice",
        ),
        (
            |file| {
                let at = STORE_OFFSET + CHUNK as u64;
                file.write_all_at(&64u64.to_le_bytes(), at).unwrap();
            },
            "chunk 64 is said to be changed, and the disk has 64",
        ),
        (
            |file| {
                let at = STORE_OFFSET + CHUNK as u64 + 8;
                file.write_all_at(&u64::MAX.to_le_bytes(), at).unwrap();
            },
            "past its end",
        ),
    ];
    for (fake, said) in cases {
        let directory = chain();
        store(directory.path(), &[(1, 1), (2, 2)], fake);
        assert_fails(&export(directory.path(), &[]), 65, &["x.store", said]);
        assert!(!directory.path().join("out.qcow2").exists(), "{said}");
    }
}

#[test]
fn a_changed_image_is_refused_and_a_moved_one_found_by_option() {
    let directory = chain();
    let directory = directory.path();
    store(directory, &[(1, 1)], |_| {});
    fs::rename(directory.join("top.qcow2"), directory.join("new.qcow2")).unwrap();
    assert_fails(&export(directory, &[]), 66, &["top.qcow2", "--image"]);
    let output = export(directory, &["--image", "new.qcow2"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(disk(directory, "out.qcow2")[CHUNK..2 * CHUNK], [1; CHUNK]);
    File::options()
        .write(true)
        .open(directory.join("base.raw"))
        .and_then(|base| base.write_all_at(b"x", 0))
        .unwrap();
    let output = export(directory, &["--image", "new.qcow2", "--force"]);
    assert_fails(&output, 65, &["x.store", "base.raw", "was changed since"]);
}

#[test]
fn neither_the_store_nor_the_image_is_the_output() {
    let directory = chain();
    let directory = directory.path();
    store(directory, &[(1, 1)], |_| {});
    for out in ["x.store", "top.qcow2", "base.raw"] {
        let output = imgdm(directory, &["export", "./x.store", out, "--force"]);
        assert_fails(&output, 64, &[out, "stays as it is"]);
    }
}
