//! What a process has shut while it prints: looked at from outside, while nobody takes what it
//! prints.

use std::fs;
use std::io::{ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::path::Path;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::images::{Qcow2, command};

/// Those of one thread that reads.
const FILTERS: u64 = 3;

/// A pipe that takes nothing more.
fn full_pipe() -> (PipeReader, PipeWriter, usize) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut filled = 0;
    loop {
        match writer.write(&[b'.'; 4096]) {
            Ok(written) => filled += written,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
    }
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    (reader, writer, filled)
}

/// How many filters a thread has; none where the kernel does not tell.
fn filters(task: &Path) -> Option<u64> {
    let status = fs::read_to_string(task.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?;
    line.trim().parse().ok()
}

/// The filters of the main thread and of the others, once that is waiting for its pipe.
fn filters_of(child: &mut Child) -> (u64, Vec<u64>) {
    let process = Path::new("/proc").join(child.id().to_string());
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        let waits = fs::read_to_string(process.join("wchan")).unwrap_or_default();
        let state = fs::read_to_string(process.join("status")).unwrap_or_default();
        if waits.contains("pipe") || waits == "0" && state.contains("State:\tS") {
            // Where the kernel does not say for what, it sleeps for this sooner or later.
            sleep(Duration::from_millis(if waits == "0" { 500 } else { 10 }));
            break;
        }
        sleep(Duration::from_millis(10));
    }
    let tasks = fs::read_dir(process.join("task")).unwrap().map(|task| task.unwrap().path());
    let main = process.join("task").join(child.id().to_string());
    let others = tasks.filter(|task| *task != main).filter_map(|task| filters(&task)).collect();
    (filters(&main).unwrap(), others)
}

/// Runs a command on an image with two snapshots' worth of nothing, and looks at it.
#[track_caller]
fn look(directory: &Path, line: &[&str], main_is_shut: bool) {
    // Linux 5.9 tells.
    let Some(own) = filters(Path::new("/proc/self")) else { return };
    let (mut reader, writer, filled) = full_pipe();
    let mut child = command(directory, line).stdout(writer).spawn().unwrap();
    let (main, others) = filters_of(&mut child);
    assert_eq!(main - own, if main_is_shut { FILTERS } else { 0 }, "{line:?}");
    assert!(!others.is_empty(), "{line:?}");
    assert!(others.iter().all(|others| others - own >= FILTERS), "{line:?}: {others:?}");
    let mut printed = Vec::new();
    reader.read_to_end(&mut printed).unwrap();
    assert!(child.wait().unwrap().code().is_some(), "{line:?}");
    let alone = command(directory, line).output().unwrap();
    assert_eq!(printed[filled..], alone.stdout, "{line:?}");
    assert!(!printed[filled..].is_empty(), "{line:?}");
}

#[test]
fn what_opens_nothing_more_is_shut_with_all_its_threads() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![b'b'; 1 << 20]).unwrap();
    let image = Qcow2::new().data(0).data(3).backing("base.raw".as_ref(), Some("raw"));
    image.write(directory.path(), "disk.qcow2");
    for line in [
        &["map", "--output=json", "disk.qcow2"][..],
        &["check", "--output=json", "disk.qcow2"],
        &["info", "disk.qcow2"],
        &["info", "--backing-chain", "--output=json", "disk.qcow2"],
        &["snapshots", "--output=json", "disk.qcow2"],
        &["hash", "disk.qcow2"],
        &["partitions", "disk.qcow2"],
        &["show", "--ascii", "disk.qcow2"],
        &["table", "disk.qcow2"],
        &["diff", "disk.qcow2"],
        &["explain", "disk.qcow2", "0"],
    ] {
        look(directory.path(), line, true);
    }
    // It tries the scratch directory.
    // The default limit goes by the memory that is free, which changes.
    look(directory.path(), &["plan", "--max-kernel-memory=4G", "disk.qcow2"], false);
}
