//! `imgdm hash` beside sha256sum and b3sum of qemu-img's copies.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use crate::check::{applied, convert, snapshots};
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::{Outcome, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::crypt::{LUKS, create, image_opts, secrets, write};
use crate::imgdm::{PROGRAM, imgdm, refused};
use crate::random::run_theme;

/// Hashes a file with coreutils and with the BLAKE3 team's own program.
fn sums(dir: &Path, file: &str) -> Outcome<[String; 2]> {
    let sum = |program: &str| -> Outcome<String> {
        let ran = run(Command::new(program).current_dir(dir).arg(file))?.ok()?;
        ran.text().split_whitespace().next().map(str::to_owned).ok_or_else(|| ran.describe())
    };
    Ok([sum("sha256sum")?, sum("b3sum")?])
}

/// Makes a copy as long as the disk: a raw file's last sector may be partial.
fn pad(dir: &Path, copy: &str) -> Outcome {
    let file = OpenOptions::new().write(true).open(dir.join(copy));
    let file = file.map_err(|error| error.to_string())?;
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    file.set_len(length.next_multiple_of(512)).map_err(|error| error.to_string())
}

/// What is printed for people, and in JSON, is what these two programs say of `copy`.
fn same_hashes(dir: &Path, args: &[&str], copy: &str) -> Outcome {
    pad(dir, copy)?;
    let [sha256, blake3] = sums(dir, copy)?;
    let ran = imgdm(dir, &[&["hash"], args].concat())?.ok()?;
    let text = ran.text();
    let lines: Vec<_> = text.lines().map(|line| line.split("  ").next().unwrap_or("")).collect();
    if lines != [format!("sha256:{sha256}"), format!("blake3:{blake3}")] {
        return Err(format!("sha256sum: {sha256}\nb3sum: {blake3}\n{}", ran.describe()));
    }
    for (name, expected) in [("sha256", sha256), ("blake3", blake3)] {
        let algorithm = format!("--algorithm={name}");
        let json = imgdm(dir, &[&["hash", "--output=json", &algorithm], args].concat())?.ok()?;
        let report: serde_json::Value =
            serde_json::from_slice(&json.stdout).map_err(|error| error.to_string())?;
        let only = serde_json::json!({ name: expected });
        let size = fs::metadata(dir.join(copy)).map_err(|error| error.to_string())?.len();
        if report["hashes"] != only || report["virtual_size"] != size {
            return Err(format!("{only} of {size} bytes is expected:\n{}", json.describe()));
        }
    }
    Ok(())
}

fn check(dir: &Path, recipe: &Recipe, _: &mut Rng) -> Outcome {
    let top = recipe.top();
    convert(dir, top.format, &top.file, "copy.raw")?;
    same_hashes(dir, &[&top.file], "copy.raw")?;
    if top.snapshots.is_empty() {
        return Ok(());
    }
    for (id, _) in snapshots(dir, &top.file)? {
        let copy = applied(dir, top, &id)?;
        convert(dir, "qcow2", &copy, "copy.raw")?;
        same_hashes(dir, &["-l", &format!("snapshot.id={id}"), &top.file], "copy.raw")?;
    }
    Ok(())
}

#[test]
fn hashes_of_disks_are_those_of_their_copies() {
    let theme = Theme { depth: (1, 3), compressed: 40, max_size: 16 << 20, ..MIXED };
    run_theme("hashes_of_disks", 12, &theme, check);
    let theme = Theme { raw_base: 100, odd_size: 100, ..theme };
    run_theme("hashes_of_disks", 6, &theme, check);
}

#[test]
fn hashes_of_encrypted_disks_take_their_keys() {
    let dir = scratch_dir("hash").unwrap();
    let dir = dir.path();
    let layers = [("qcow2", "x", "key of x")];
    create(dir, "qcow2", "x", LUKS, "key of x", "3M").unwrap();
    write(dir, &layers, &["write -P 7 100k 1M", "write -z 2M 64k"]).unwrap();
    let mut convert = vec!["convert".to_owned()];
    convert.extend(secrets(&["key of x"]));
    convert.extend(["--image-opts".to_owned(), image_opts(&layers)]);
    convert.extend(["-O", "raw", "copy.raw"].map(str::to_owned));
    qemu::img(dir, &convert).unwrap();
    fs::write(dir.join("key"), "key of x").unwrap();
    same_hashes(dir, &["--key-file", "key", "x"], "copy.raw").unwrap();
    fs::write(dir.join("key"), "another").unwrap();
    refused(&imgdm(dir, &["hash", "--key-file", "key", "x"]).unwrap(), &[67], &["x"]).unwrap();
}

#[test]
fn a_checksum_list_of_copies_is_not_confused_with_the_disk() {
    let dir = scratch_dir("hash").unwrap();
    let dir = dir.path();
    fs::write(dir.join("disk.raw"), [7; 4096]).unwrap();
    fs::write(dir.join("sums"), imgdm(dir, &["hash", "disk.raw"]).unwrap().stdout).unwrap();
    for program in ["sha256sum", "b3sum"] {
        let check = run(Command::new(program).current_dir(dir).args(["-c", "sums"])).unwrap();
        assert!(!check.status.success(), "{}", check.describe());
        assert!(!check.text().contains("OK"), "{}", check.describe());
    }
}

#[test]
fn an_interrupted_hash_ends_by_the_signal_and_a_sparse_giant_is_read_nowhere() {
    let dir = scratch_dir("hash").unwrap();
    let file = fs::File::create(dir.path().join("giant.raw")).unwrap();
    file.set_len(1 << 42).unwrap();
    let mut child = Command::new(PROGRAM)
        .current_dir(dir.path())
        .args(["hash", "giant.raw"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "4 TiB take more than that");
    let read = fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap();
    let read = read.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap();
    assert!(read.parse::<u64>().unwrap() < 16 << 20, "{read} bytes were read");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    // Not SIGINT: whoever runs the tests in the background has it ignored.
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let output = child.wait_with_output().unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
    assert_eq!(signal, Some(15), "{output:?}");
    assert!(output.stdout.is_empty());
}
