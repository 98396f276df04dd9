//! What can't be attached is refused with a stable status, and nothing is left.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::args;
use crate::guest::*;

/// `attach` must end with that status and say these words; nothing may be left.
#[track_caller]
fn assert_refused(image: &Path, options: &[&str], code: i32, words: &[&str]) {
    let options = options.iter().map(std::ffi::OsString::from);
    let line = std::iter::once("attach".into()).chain(options).chain([image.into()]);
    let said = imgdm(line).refused(code);
    for word in words {
        assert!(said.contains(word), "no '{word}' in: {said}");
    }
    assert_nothing_left();
}

fn image(scratch: &Scratch) -> PathBuf {
    let image = scratch.create("qcow2", &[], "disk.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 1 0 512k"]);
    image
}

#[test]
fn an_encrypted_layer_without_a_key_is_refused_under_a_compressed_one_or_over_it() {
    let scratch = Scratch::new();
    let secret = "secret,id=key,data=correct";
    let luks = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let base = scratch.create("qcow2", &[], "base.qcow2", "1M");
    write_image(&base, "qcow2", &["write -c -P 3 64k 64k"]);
    let encrypted = ["--object", secret, "-o", luks, "-b", "base.qcow2", "-F", "qcow2"];
    let top = scratch.create("qcow2", &encrypted, "top.qcow2", "1M");
    let opts = format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.filename={}",
        top.display()
    );
    let write = ["--object", secret, "-c", "write -P 5 128k 64k", "--image-opts", &opts];
    run(command("qemu-io", write).current_dir(scratch.directory())).ok();
    assert_no_key(&top, "top.qcow2", 0);

    let over = scratch.create("qcow2", &["-u", "-b", "top.qcow2", "-F", "qcow2"], "o.qcow2", "1M");
    write_image_unread(&over, "write -c -P 3 0 64k");
    assert_no_key(&over, "top.qcow2", 1);
}

/// Writes whole clusters, for which QEMU needs nothing of a backing file it has no key of.
#[track_caller]
fn write_image_unread(image: &Path, write: &str) {
    let opts = format!("driver=qcow2,file.filename={},backing=", image.display());
    run(&mut command("qemu-io", ["-c", write, "--image-opts", &opts])).ok();
}

/// `attach` must want the key of that layer; which it is, is said by file or by number.
#[track_caller]
fn assert_no_key(image: &Path, file: &str, layer: usize) {
    let said = imgdm(args!["attach", image]).refused(67);
    assert!(said.contains(file) || said.contains(&format!("layer {layer}")), "{said}");
    assert!(said.contains("key"), "{said}");
    assert_nothing_left();
}

#[test]
fn a_legacy_encrypted_image_without_a_key_is_refused() {
    let scratch = Scratch::new();
    let secret = "secret,id=key,data=correct";
    let options = ["--object", secret, "-o", "encrypt.format=aes,encrypt.key-secret=key"];
    let image = scratch.create("qcow", &options, "disk.qcow", "1M");
    let opts = format!(
        "driver=qcow,encrypt.format=aes,encrypt.key-secret=key,file.filename={}",
        image.display()
    );
    run(&mut command("qemu-io", ["--object", secret, "-c", "write 0 64k", "--image-opts", &opts]))
        .ok();
    assert_no_key(&image, "disk.qcow", 0);
}

#[test]
fn truncated_and_damaged_images_are_refused() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let whole = fs::read(&image).unwrap();
    for length in [whole.len() / 2, 300_000, 70_000, 100, 3] {
        fs::write(&image, &whole[..length]).unwrap();
        assert_refused(&image, &["-f", "qcow2"], 65, &["disk.qcow2"]);
    }
    let damage: [(&str, u64, &[u8]); 5] = [
        ("an unknown feature", 72, &[0, 0, 1, 0, 0, 0, 0, 0]),
        ("the corrupt bit", 79, &[2]),
        ("a cluster size of 2^63", 20, &[0, 0, 0, 63]),
        ("a first table beyond the file", 40, &[0, 0, 1, 0, 0, 0, 0, 0]),
        ("an absurd size", 24, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0]),
    ];
    for (what, offset, bytes) in damage {
        fs::write(&image, &whole).unwrap();
        OpenOptions::new().write(true).open(&image).unwrap().write_all_at(bytes, offset).unwrap();
        eprintln!("{what}");
        assert_refused(&image, &[], 65, &["disk.qcow2"]);
    }
}

#[test]
fn a_missing_file_backing_file_or_snapshot_is_66() {
    let scratch = Scratch::new();
    let base = image(&scratch);
    let options = ["-b", "disk.qcow2", "-F", "qcow2"];
    let overlay = scratch.create("qcow2", &options, "overlay.qcow2", "");
    assert_refused(&base, &["-l", "none"], 66, &["none"]);
    fs::remove_file(&base).unwrap();
    assert_refused(&base, &[], 66, &["disk.qcow2"]);
    assert_refused(&overlay, &[], 66, &["disk.qcow2", "overlay.qcow2"]);
}

#[test]
fn what_is_no_image_is_refused() {
    let scratch = Scratch::new();
    let fifo = scratch.path("fifo");
    tool("mkfifo", [&fifo]);
    for (path, code) in [(scratch.directory(), None), (&fifo, None), (Path::new("/dev/null"), None)]
    {
        let ran = imgdm(args!["attach", path]);
        assert!(!ran.status.success() && ran.status.code() != code, "{ran}");
        assert!(matches!(ran.code(), Some(64..=78)), "{ran}");
        assert_nothing_left();
    }
    let overlay = scratch.create("qcow2", &[], "loop.qcow2", "1M");
    let rebase = ["rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2"];
    qemu_img(rebase.map(Into::into).into_iter().chain([overlay.clone().into_os_string()])).ok();
    assert_refused(&overlay, &[], 65, &["circle"]);
}

/// imgdm as nobody.
fn as_nobody(image: &Path) -> Ran {
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let mut line = command("setpriv", user);
    run(line.arg(imgdm_path()).arg("attach").arg(image))
}

#[test]
fn without_permission_attach_is_77_and_names_what_it_may_not_open() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    fs::set_permissions(scratch.directory(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&image, fs::Permissions::from_mode(0o644)).unwrap();
    let said = as_nobody(&image).refused(77);
    assert!(said.contains("/dev/") || said.contains("root"), "{said}");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).unwrap();
    let said = as_nobody(&image).refused(77);
    assert!(said.contains("disk.qcow2"), "{said}");
    assert_nothing_left();
}

#[test]
fn a_name_that_device_mapper_or_udev_cannot_take_is_refused() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    for name in ["", ".", "..", "control", "-x", "a b", "a/b", "caf\u{e9}", &"x".repeat(101)] {
        let ran = imgdm(args!["attach", format!("--name={name}"), &image]);
        assert_eq!(ran.code(), Some(64), "{ran}");
        assert_nothing_left();
    }
    let longest = "x".repeat(100);
    attach(args!["--name", &longest, &image]).detach();
}

#[test]
fn a_module_that_is_missing_is_loaded_or_named() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let release = tool("uname", ["-r"]);
    let modules = PathBuf::from("/lib/modules").join(release.trim());
    let target = fs::read_link(&modules).unwrap();
    let unload = || {
        // Other tests' devices are gone, but not the targets that they had loaded, some of
        // which lie on others.
        for _ in 0..3 {
            let targets = fs::read_dir("/sys/module/dm_mod/holders").into_iter().flatten();
            for target in targets.flatten() {
                let name = target.file_name();
                let _ = run(command("modprobe", ["-r"]).arg(name));
            }
        }
        run(&mut command("modprobe", ["-r", "dm-mod"]))
    };
    let unloaded = unload();
    if !unloaded.status.success() {
        panic!("cannot unload device-mapper: {unloaded}");
    }
    let attached = attach([&image]);
    attached.detach();

    unload().ok();
    fs::remove_file(&modules).unwrap();
    let ran = imgdm(args!["attach", &image]);
    let listed = imgdm(["list"]);
    let detached = imgdm(["detach", "disk"]);
    std::os::unix::fs::symlink(target, &modules).unwrap();
    tool("modprobe", ["dm-mod"]);
    let said = ran.refused(69);
    assert!(said.contains("device-mapper"), "{said}");
    // Nothing can be attached where nothing could be.
    assert_eq!(listed.ok(), "");
    assert_eq!(detached.code(), Some(66));
}
