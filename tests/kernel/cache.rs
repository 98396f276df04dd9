//! What was inflated is kept, and used again as long as it is right.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::args;
use crate::compressed::text;
use crate::guest::*;

/// Attaches with the cache; with `inflates_nothing`, inflating would be a failure.
fn attach_cached(image: &Path, cache: &Path, inflates_nothing: bool) -> Ran {
    let line = args!["attach", "--compressed=cache", "--cache-dir", cache, image];
    let mut line = imgdm_command(line);
    if inflates_nothing {
        line.env("IMGDM_FAULT", "inflate:fail");
    }
    run(line.stdin(Stdio::null()))
}

/// The kept files, of which there is at most one.
fn kept(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).into_iter().flatten();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[track_caller]
fn assert_attached(ran: Ran, image: &Path, wanted: &[u8]) {
    let path = ran.ok();
    assert_same("the device", &fs::read(path.trim_end()).unwrap(), wanted);
    imgdm(args!["detach", image]).ok();
    assert_nothing_left();
}

#[test]
fn a_kept_file_is_used_again_until_it_or_the_image_changes() {
    let scratch = Scratch::on_disk();
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let cache = scratch.path("cache/imgdm");
    // There is nothing yet, and it has to be inflated.
    assert_eq!(attach_cached(&image, &cache, true).code(), Some(1));
    assert_nothing_left();
    assert!(kept(&cache).is_empty());
    assert_attached(attach_cached(&image, &cache, false), &image, &wanted);
    assert_eq!(kept(&cache).len(), 1);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&cache), mode(&kept(&cache)[0])), (0o700, 0o600));
    assert_attached(attach_cached(&image, &cache, true), &image, &wanted);
    let said = imgdm(args!["plan", "--compressed=cache", "--cache-dir", &cache, &image]).ok();
    assert!(said.contains("a kept file is used again"), "{said}");

    let damage: [(&str, &dyn Fn(&Path)); 3] = [
        ("one byte", &|file| {
            let file = OpenOptions::new().write(true).open(file).unwrap();
            file.write_all_at(b"!", 70_000).unwrap();
        }),
        ("its length", &|file| {
            OpenOptions::new().write(true).open(file).unwrap().set_len(100_000).unwrap();
        }),
        ("the image", &|_| {
            let file = OpenOptions::new().write(true).open(&image).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }),
    ];
    for (what, damage) in damage {
        damage(&kept(&cache)[0]);
        assert_eq!(attach_cached(&image, &cache, true).code(), Some(1), "{what}");
        assert_nothing_left();
        assert_attached(attach_cached(&image, &cache, false), &image, &wanted);
        assert_attached(attach_cached(&image, &cache, true), &image, &wanted);
        assert_eq!(kept(&cache).len(), 1, "{what}");
    }
}

#[test]
fn killed_while_it_fills_a_file_to_be_kept_attach_leaves_none() {
    let scratch = Scratch::on_disk();
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let cache = scratch.path("cache");
    let line = args!["attach", "--compressed=cache", "--cache-dir", &cache, &image];
    for action in ["kill", "term"] {
        let mut line = imgdm_command(line.clone());
        line.env("IMGDM_FAULT", format!("inflate:{action}")).stdin(Stdio::null());
        assert!(run(&mut line).signal().is_some(), "{action}");
        assert_nothing_left();
    }
    assert_attached(attach_cached(&image, &cache, false), &image, &wanted);
    assert_eq!(kept(&cache).len(), 1);
}
