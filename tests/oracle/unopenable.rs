//! Files that are no image, that are not there, or that may not be read: each is named, with
//! the overlay that asks for it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkfifo};

use crate::check::same;
use crate::common::images::scratch_dir;
use crate::common::patch;
use crate::common::process::run;
use crate::common::qemu;
use crate::damaged::{COMMANDS, SIZE, all_refuse, good};
use crate::far::{create, recipe_of};
use crate::imgdm::{
    EX_INVALID, EX_MISSING, EX_NOT_REPRESENTABLE, EX_PERMISSION, imgdm, program_in, refused, sound,
};

#[test]
fn things_that_are_no_image() {
    let dir = scratch_dir("unopenable").unwrap();
    let dir = dir.path();
    mkfifo(&dir.join("fifo"), Mode::S_IRWXU).unwrap();
    fs::create_dir(dir.join("directory")).unwrap();
    fs::write(dir.join("empty"), b"").unwrap();
    fs::write(dir.join("garbage"), [0x5a; 5000]).unwrap();
    for format in ["raw", "qcow2", "qcow"] {
        all_refuse(dir, &["-f", format, "./fifo"], &[EX_INVALID], &["fifo", "FIFO"]);
        all_refuse(dir, &["-f", format, "./directory"], &[EX_INVALID], &["directory"]);
        all_refuse(dir, &["-f", format, "/dev/null"], &[EX_INVALID], &["/dev/null"]);
    }
    for format in ["qcow2", "qcow", "cow"] {
        all_refuse(dir, &["-f", format, "empty"], &[EX_INVALID], &["empty"]);
        all_refuse(dir, &["-f", format, "garbage"], &[EX_INVALID], &["garbage"]);
    }
    all_refuse(dir, &["missing"], &[EX_MISSING], &["missing"]);
    all_refuse(dir, &["missing/missing"], &[EX_MISSING], &["missing"]);
    all_refuse(dir, &["-f", "vmdk", "garbage"], &[64], &["vmdk"]);
    // An empty raw image is a disk of no sector: qemu-img maps it; there is no such
    // device.
    for output in ["--output=json", "--output=human"] {
        let line = ["map", "-f", "raw", output, "empty"];
        same(&qemu::img(dir, &line).unwrap(), &imgdm(dir, &line).unwrap()).unwrap();
    }
    let ran = imgdm(dir, &["table", "-f", "raw", "empty"]).unwrap();
    refused(&ran, &[EX_INVALID, EX_NOT_REPRESENTABLE], &["empty"]).unwrap();
}

#[test]
fn a_missing_backing_or_data_file_is_named_with_the_overlay() {
    let dir = scratch_dir("unopenable").unwrap();
    let dir = dir.path();
    good(dir);
    fs::rename(dir.join("base.raw"), dir.join("elsewhere.raw")).unwrap();
    all_refuse(dir, &["good.qcow2"], &[EX_MISSING], &["base.raw", "good.qcow2"]);
    let steps = vec![create("d.qcow2", "qcow2", &["data_file=d.data"], None, SIZE)];
    recipe_of(steps, &[]).make(dir).unwrap();
    fs::rename(dir.join("d.data"), dir.join("elsewhere.data")).unwrap();
    all_refuse(dir, &["d.qcow2"], &[EX_MISSING], &["d.data", "d.qcow2"]);
    imgdm(dir, &["table", "--data-file", "elsewhere.data", "d.qcow2"]).unwrap().ok().unwrap();
    // A directory in its place.
    fs::create_dir(dir.join("base.raw")).unwrap();
    all_refuse(dir, &["good.qcow2"], &[EX_INVALID], &["base.raw", "directory"]);
}

#[test]
fn a_file_that_may_not_be_read_is_77_and_named() {
    let dir = scratch_dir("unopenable").unwrap();
    let dir = dir.path();
    good(dir);
    let open = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    // Root may read all: as another user, who has to be able to reach program and image.
    let place = tempfile::Builder::new().prefix("imgdm-oracle-").tempdir_in("/tmp").unwrap();
    open(place.path(), 0o755);
    for name in ["good.qcow2", "base.raw"] {
        patch::copy(&dir.join(name), &place.path().join(name)).unwrap();
    }
    open(&place.path().join("base.raw"), 0o000);
    let program = program_in(place.path()).unwrap();
    let as_nobody = |args: &[&str]| {
        let mut command = if geteuid().is_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(&program);
            command
        } else {
            Command::new(&program)
        };
        sound(run(command.current_dir(place.path()).args(args)).unwrap()).unwrap()
    };
    for command in COMMANDS {
        let ran = as_nobody(&[command, "good.qcow2"]);
        refused(&ran, &[EX_PERMISSION], &["base.raw", "good.qcow2"]).unwrap();
        let ran = as_nobody(&[command, "-f", "raw", "base.raw"]);
        refused(&ran, &[EX_PERMISSION], &["base.raw"]).unwrap();
    }
    // Readable, but another's: O_NOATIME is refused by the kernel, reading is not.
    open(&place.path().join("base.raw"), 0o644);
    for command in COMMANDS {
        as_nobody(&[command, "good.qcow2"]).ok().unwrap();
    }
}

#[test]
fn a_snapshot_that_is_not_there_is_66() {
    let dir = scratch_dir("unopenable").unwrap();
    let dir = dir.path();
    good(dir);
    for name in ["third", "3", "", "snapshot.id=first", "snapshot.name=1"] {
        all_refuse(dir, &["-l", name, "good.qcow2"], &[EX_MISSING, 64], &["snapshot"]);
    }
    all_refuse(dir, &["-f", "raw", "-l", "first", "base.raw"], &[EX_MISSING], &["base.raw"]);
}
