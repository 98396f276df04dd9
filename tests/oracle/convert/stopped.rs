//! Stopped in the middle: by a signal, by a limit, by a full file system.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{listing, same_content};
use crate::common::images::scratch_dir;
use crate::common::process::run;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::PROGRAM;

const MIB: usize = 1 << 20;

/// in.raw and expected.raw: bytes that take long to compress.
fn make_input(dir: &Path, mib: usize) {
    let mut bytes = vec![0; MIB];
    let mut file = File::create(dir.join("in.raw")).unwrap();
    for number in 0..mib {
        Rng::new(number as u64).fill(&mut bytes);
        // So that they compress at all.
        bytes.iter_mut().for_each(|byte| *byte &= 0x3f);
        file.write_all(&bytes).unwrap();
    }
    fs::hard_link(dir.join("in.raw"), dir.join("expected.raw")).unwrap();
}

/// Starts a conversion, ends it by a signal after that time, and says whether it was still
/// at it.
fn stopped(dir: &Path, args: &[&str], signal: Signal, after: Duration) -> bool {
    let mut child = Command::new(PROGRAM)
        .current_dir(dir)
        .args(["convert", "-f", "raw"])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(after);
    // It is not waited for yet, so that the number is its own still.
    kill(Pid::from_raw(i32::try_from(child.id()).unwrap()), signal).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(signal as i32), "{args:?} {status}");
    !status.success()
}

#[test]
fn stopped_at_any_moment_there_is_no_half_image_and_an_old_one_stays() {
    let dir = scratch_dir("convert-stopped").unwrap();
    let dir = dir.path();
    make_input(dir, 24);
    let before = listing(dir);
    let mut were_at_it = 0;
    let outputs = [
        ("raw", &["-O", "raw", "--reflink=never"][..]),
        ("qcow2", &["-O", "qcow2", "-o", "cluster_size=4k"]),
        ("qcow2", &["-O", "qcow2", "-c"]),
        ("qcow", &["-O", "qcow", "-c"]),
        ("qcow2", &["-O", "qcow2", "-o", "preallocation=full,data_file=out.data"]),
    ];
    for signal in [Signal::SIGKILL, Signal::SIGINT, Signal::SIGTERM] {
        for (format, args) in outputs {
            for after in [1, 5, 12, 25, 50, 100, 200] {
                let after = Duration::from_millis(after);
                let line = [args, &["in.raw", "out"]].concat();
                let was = stopped(dir, &line, signal, after);
                let name = format!("{signal} {args:?} after {after:?}");
                // It may have had its name already, and then it is whole.
                let is_there = dir.join("out").exists();
                assert!(is_there || was, "{name}: {:?}", listing(dir));
                were_at_it += u32::from(!is_there);
                if is_there {
                    same_content(dir, format, "out").unwrap();
                }
                let _ = fs::remove_file(dir.join("out"));
                let _ = fs::remove_file(dir.join("out.data"));
                if was && signal != Signal::SIGKILL {
                    assert_eq!(listing(dir), before, "{name}");
                }
                for left in listing(dir).iter().filter(|name| !before.contains(name)) {
                    fs::remove_file(dir.join(left)).unwrap();
                }

                fs::write(dir.join("out"), "old").unwrap();
                let line = [args, &["--force", "in.raw", "out"]].concat();
                let was = stopped(dir, &line, signal, after);
                let is_old = fs::read(dir.join("out")).unwrap() == b"old";
                were_at_it += u32::from(is_old);
                assert!(!is_old || was, "{name}");
                if !is_old {
                    same_content(dir, format, "out").unwrap();
                }
                for left in listing(dir).iter().filter(|name| !before.contains(name)) {
                    fs::remove_file(dir.join(left)).unwrap();
                }
            }
        }
    }
    assert!(were_at_it >= 60, "{were_at_it}");
}

#[test]
fn a_file_size_limit_leaves_nothing() {
    let dir = scratch_dir("convert-stopped").unwrap();
    let dir = dir.path();
    make_input(dir, 4);
    let before = listing(dir);
    for (limit, args) in [
        (1000, &["-O", "qcow2"][..]),
        (100_000, &["-O", "qcow2"]),
        (2_000_000, &["-O", "qcow2"]),
        (2_000_000, &["-O", "qcow2", "-c"]),
        (2_000_000, &["-O", "qcow"]),
        (2_000_000, &["-O", "raw", "--reflink=never"]),
        (2_000_000, &["-O", "raw"]),
        (2_000_000, &["-O", "qcow2", "-o", "preallocation=full"]),
        (2_000_000, &["-O", "qcow2", "-o", "data_file=out.data"]),
    ] {
        let mut command = Command::new("prlimit");
        command.current_dir(dir).arg(format!("--fsize={limit}")).arg(PROGRAM);
        command.args(["convert", "-f", "raw"]).args(args).args(["in.raw", "out"]);
        let ran = run(&mut command).unwrap();
        // It is the data file that grows too long.
        let named =
            if args.iter().any(|arg| arg.contains("out.data")) { "out.data" } else { "out" };
        crate::imgdm::refused(&ran, &[1, 73], &[&format!("{named}: "), "large"])
            .unwrap_or_else(|error| panic!("{limit} {args:?}: {error}"));
        assert_eq!(listing(dir), before, "{limit} {args:?}");
    }
}

/// Runs a script as root of a namespace of its own, where a tmpfs of `size` is over full/;
/// `None` where this system gives no such namespace.
fn with_small_tmpfs(dir: &Path, size: usize, script: &str) -> Option<String> {
    let whole = format!("mount -t tmpfs -o size={size} none full && {script}");
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", &whole]).current_dir(dir).env("IMGDM", PROGRAM);
    let ran = run(&mut command).unwrap();
    if ran.stderr.contains("unshare") || ran.stderr.contains("mount:") {
        println!("passed over: {}", ran.describe());
        return None;
    }
    Some(ran.ok().unwrap().text())
}

#[test]
fn a_full_file_system_at_any_point_leaves_nothing_and_an_old_image_stays() {
    let dir = scratch_dir("convert-stopped").unwrap();
    let dir = dir.path();
    make_input(dir, 4);
    fs::create_dir(dir.join("full")).unwrap();
    qemu::img(dir, &["convert", "-O", "qcow2", "-f", "raw", "in.raw", "in.qcow2"]).unwrap();
    for output in [
        "-O raw",
        "-O raw -S 0",
        "-O qcow2",
        "-O qcow2 -o cluster_size=512",
        "-O qcow2 -c",
        "-O qcow2 -o preallocation=full",
        "-O qcow2 -o preallocation=falloc",
        "-O qcow2 -o data_file=out.data",
        "-O qcow",
        "-O qcow -c",
    ] {
        // Compressed, it takes 3 MiB.
        let most = if output.ends_with("-c") { 2500 } else { 3900 };
        for kib in [0, 4, 64, 256, 300, 1000, 2500, most] {
            for old in ["", "printf old >full/out; "] {
                let size = ((kib + 8) << 10).max(8192);
                // What is there afterwards, the program's end and its words.
                let force = if old.is_empty() { "" } else { "--force" };
                let script = format!(
                    "{old} \"$IMGDM\" convert -f qcow2 {output} {force} in.qcow2 full/out 2>said; \
                     code=$?; echo $code $(ls -A full) $(head -c 100 full/out 2>/dev/null | tr -d '\\0')"
                );
                let Some(text) = with_small_tmpfs(dir, size, &script) else { return };
                let said = fs::read_to_string(dir.join("said")).unwrap();
                let name = format!("{output} with {kib} KiB {old}: {text}{said}");
                let wanted = if old.is_empty() { "1" } else { "1 out old" };
                // No room for the first of the metadata is the same as none for its end.
                assert!(
                    [wanted, &wanted.replacen('1', "73", 1)].contains(&text.trim_end()),
                    "{name}"
                );
                assert!(said.contains("full/out"), "{name}");
                assert!(said.contains("pace") || said.contains("full:"), "{name}");
            }
        }
    }
}
