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

    type Damage<'d> = (&'d str, &'d dyn Fn(&Path));
    let damage: [Damage<'_>; 3] = [
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

#[test]
fn two_that_fill_the_same_file_at_once_are_both_attached_and_leave_one() {
    let scratch = Scratch::on_disk();
    let image = text(&scratch, "disk.qcow2", &["-O", "qcow2"]);
    let wanted = qemu_content(&scratch, &image, &[]);
    let cache = scratch.path("cache");
    let names = ["one", "two"];
    let line =
        |name| args!["attach", "--name", name, "--compressed=cache", "--cache-dir", &cache, &image];
    let filling = names.map(|name| {
        let mut line = imgdm_command(line(name));
        let running = start(line.env("IMGDM_FAULT", "inflate:stop").stdin(Stdio::null()));
        wait_for("it to stop", || running.is_stopped());
        running
    });
    for running in &filling {
        running.signal(nix::sys::signal::Signal::SIGCONT);
    }
    for (running, name) in filling.into_iter().zip(names) {
        let ran = running.finish();
        assert_eq!(ran.stderr, "", "{name}");
        assert_eq!(ran.ok(), format!("/dev/mapper/{name}\n"));
    }
    assert_eq!(kept(&cache).len(), 1);
    for name in names {
        assert_same(name, &fs::read(format!("/dev/mapper/{name}")).unwrap(), &wanted);
        imgdm(args!["detach", name]).ok();
    }
    assert_nothing_left();
    assert_attached(attach_cached(&image, &cache, true), &image, &wanted);
}

#[test]
fn the_file_of_an_image_that_is_gone_goes_with_the_next_that_is_kept() {
    let scratch = Scratch::on_disk();
    let cache = scratch.path("cache");
    let disk = Mounted::make("ext4", scratch.directory(), 16 * MIB);
    let images = ["stays", "goes", "is-not-mounted", "new"].map(|name| {
        let image = text(&scratch, &format!("{name}.qcow2"), &["-O", "qcow2"]);
        if name != "is-not-mounted" {
            return image;
        }
        let place = disk.place.join("image.qcow2");
        fs::copy(&image, &place).unwrap();
        place
    });
    let wanted = qemu_content(&scratch, &images[0], &[]);
    for image in &images[..3] {
        assert_attached(attach_cached(image, &cache, false), image, &wanted);
    }
    assert_eq!(kept(&cache).len(), 3);
    disk.umount().unwrap();
    fs::remove_file(&images[1]).unwrap();
    // What is used again is no reason to look at the others.
    assert_attached(attach_cached(&images[0], &cache, true), &images[0], &wanted);
    assert_eq!(kept(&cache).len(), 3);
    assert_attached(attach_cached(&images[3], &cache, false), &images[3], &wanted);
    let names: Vec<_> = kept(&cache).iter().map(|path| path.display().to_string()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(!names.iter().any(|name| name.contains("goes-")), "{names:?}");
    disk.mount().unwrap();
    for image in [&images[0], &images[2], &images[3]] {
        assert_attached(attach_cached(image, &cache, true), image, &wanted);
    }
}
