//! Where the image goes, who may read it, and what others do there meanwhile.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use super::{bytes, listing};
use crate::common::images::scratch_dir;
use crate::common::process::{Ran, run};
use crate::common::rng::Rng;
use crate::imgdm::{PROGRAM, imgdm, program_in, refused};

/// in.raw of 64 KiB.
fn make_input(dir: &Path) {
    let mut bytes = vec![0; 64 << 10];
    Rng::new(1).fill(&mut bytes);
    fs::write(dir.join("in.raw"), bytes).unwrap();
}

#[test]
fn what_another_run_left_beside_is_no_matter() {
    let dir = scratch_dir("convert-place").unwrap();
    let dir = dir.path();
    make_input(dir);
    fs::write(dir.join("out"), "old").unwrap();
    // The shell becomes imgdm, with the same number.
    let script = "for n in '' -0 -1 -2; do : >.out.imgdm-$$$n; done; exec \"$@\"";
    let mut command = Command::new("sh");
    command.current_dir(dir).args(["-c", script, "sh", PROGRAM, "convert", "--force"]);
    run(command.args(["-f", "raw", "in.raw", "out"])).unwrap().ok().unwrap();
    assert!(bytes(dir, "out").unwrap() == bytes(dir, "in.raw").unwrap());
    // What is not ours stays.
    assert_eq!(listing(dir).len(), 2 + 4, "{:?}", listing(dir));
}

#[test]
fn a_directory_that_is_not_there_is_told_at_once() {
    let dir = scratch_dir("convert-place").unwrap();
    let dir = dir.path();
    make_input(dir);
    let before = listing(dir);
    let ran = imgdm(dir, &["convert", "-f", "raw", "in.raw", "sub/"]).unwrap();
    refused(&ran, &[73], &["sub/", "directory"]).unwrap();
    assert_eq!(listing(dir), before);
}

#[test]
fn a_base_that_is_not_there_is_looked_for_beside_the_image() {
    let dir = scratch_dir("convert-place").unwrap();
    let dir = dir.path();
    make_input(dir);
    fs::create_dir(dir.join("sub")).unwrap();
    fs::write(dir.join("base.raw"), [0; 512]).unwrap();
    for more in [&[][..], &["-F", "raw"]] {
        let line = ["convert", "-O", "qcow2", "-f", "raw", "-B", "base.raw", "in.raw", "sub/out"];
        let ran = imgdm(dir, &[&line[..], more].concat()).unwrap();
        refused(&ran, &[66], &["sub/base.raw", "seen from the directory of OUT"]).unwrap();
    }
    assert!(listing(&dir.join("sub")).is_empty());
}

/// Runs it as somebody who owns nothing; `None` where that takes another user.
fn as_nobody(dir: &Path, args: &[&str]) -> Option<Ran> {
    if !nix::unistd::geteuid().is_root() {
        println!("passed over: only root can become somebody else");
        return None;
    }
    let program = program_in(dir).unwrap();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
    Some(run(command.current_dir(dir).arg(program).args(args)).unwrap())
}

#[test]
fn who_replaces_a_strangers_image_gives_it_to_no_other_group() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make_input(dir);
    let open = dir.join("open");
    fs::create_dir(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    for (old, new) in [(0o660, 0o600), (0o644, 0o644)] {
        let out = open.join("out");
        fs::write(&out, "old").unwrap();
        fs::set_permissions(&out, fs::Permissions::from_mode(old)).unwrap();
        let line = ["convert", "--force", "-f", "raw", "in.raw", "open/out"];
        let Some(ran) = as_nobody(dir, &line) else { return };
        ran.ok().unwrap();
        let metadata = fs::metadata(&out).unwrap();
        assert_eq!((metadata.uid(), metadata.mode() & 0o777), (65534, new), "{old:o}");
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn an_image_whose_directory_cannot_be_written_out_is_said_to_be_there() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    make_input(dir);
    let drop_box = dir.join("box");
    fs::create_dir(&drop_box).unwrap();
    fs::set_permissions(&drop_box, fs::Permissions::from_mode(0o333)).unwrap();
    let convert =
        |more: &[&str]| as_nobody(dir, &[&["convert", "-f", "raw", "in.raw"], more].concat());
    let Some(ran) = convert(&["box/out"]) else { return };
    refused(&ran, &[73], &["box/out", "is there and whole", "power failure"]).unwrap();
    assert!(bytes(dir, "box/out").unwrap() == bytes(dir, "in.raw").unwrap());
    convert(&["-t", "unsafe", "box/other"]).unwrap().ok().unwrap();
}

#[test]
fn a_base_that_is_written_to_meanwhile_is_noticed() {
    let dir = scratch_dir("convert-place").unwrap();
    let dir = dir.path();
    // So much that compressing it takes longer than writing to the base.
    let mut content = vec![0; 24 << 20];
    Rng::new(2).fill(&mut content);
    content.iter_mut().for_each(|byte| *byte &= 0x3f);
    fs::write(dir.join("in.raw"), content).unwrap();
    fs::write(dir.join("base.raw"), [0; 4096]).unwrap();
    let mut command = Command::new(PROGRAM);
    command.current_dir(dir).args(["convert", "-p", "-m", "1", "-O", "qcow2", "-c", "-f", "raw"]);
    command.args(["-B", "base.raw", "-F", "raw", "in.raw", "out"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // By now the base was looked at.
    assert_eq!(lines.next().unwrap().unwrap(), "0%");
    fs::write(dir.join("base.raw"), [1; 8192]).unwrap();
    let said = lines.map(|line| line.unwrap()).last().unwrap_or_default();
    assert_eq!(child.wait().unwrap().code(), Some(75), "{said}");
    assert!(said.contains("base.raw") && said.contains("written to while"), "{said}");
    assert!(!dir.join("out").exists());
}
