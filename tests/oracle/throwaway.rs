//! The script of docs/forensics.md that reads a file system by a kernel to be thrown away.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::common::images::scratch_dir;
use crate::common::process::{Outcome, Ran, run};

/// The script, as the manual has it.
fn script() -> String {
    let manual = include_str!("../../docs/forensics.md");
    let (_, rest) = manual.split_once("```sh throwaway\n").unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

/// Runs it, where the processor asks for it with what tests/guest/run preloads as well.
fn throwaway(dir: &Path, disk: &str) -> Outcome<Ran> {
    let mut command = Command::new("sh");
    command.current_dir(dir).args(["throwaway", disk, "out"]);
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if cpu.split_whitespace().any(|flag| ["amx_tile", "apx"].contains(&flag)) {
        let shim = dir.join("xstate.so");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/xstate.c");
        run(Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).args([&shim, &source]))?
            .ok()?;
        command.env("LD_PRELOAD", shim);
    }
    run(&mut command)
}

#[test]
fn the_manuals_script_reads_a_file_system_in_a_guest() {
    let dir = scratch_dir("throwaway").unwrap();
    let dir = dir.path();
    fs::write(dir.join("throwaway"), script()).unwrap();
    for name in ["out", "tree", "tree/sub", "again"] {
        fs::create_dir(dir.join(name)).unwrap();
    }
    fs::write(dir.join("tree/sub/a file"), "from the guest's disk").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.join("tree/link")).unwrap();
    fs::File::create(dir.join("fs.raw")).unwrap().set_len(8 << 20).unwrap();
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.current_dir(dir).args(["-q", "-d", "tree", "fs.raw"]);
    run(mkfs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")).unwrap().ok().unwrap();
    let before = fs::read(dir.join("fs.raw")).unwrap();

    throwaway(dir, "fs.raw").unwrap().ok().unwrap();
    let mut tar = Command::new("tar");
    run(tar.current_dir(dir).args(["-C", "again", "-xf", "out/files.tar"])).unwrap().ok().unwrap();
    assert_eq!(fs::read(dir.join("again/sub/a file")).unwrap(), b"from the guest's disk");
    assert_eq!(fs::read_link(dir.join("again/link")).unwrap(), Path::new("/etc/passwd"));
    assert!(before == fs::read(dir.join("fs.raw")).unwrap(), "the disk was written to");

    fs::remove_file(dir.join("out/files.tar")).unwrap();
    fs::write(dir.join("none.raw"), vec![0; 1 << 20]).unwrap();
    let ran = throwaway(dir, "none.raw").unwrap();
    assert!(!ran.status.success() && !dir.join("out/done").exists(), "{}", ran.describe());
}
