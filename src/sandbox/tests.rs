//! What holds for a thread is tried on one; what ends a process, in a process of its own.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use landlock::{CompatLevel, Compatible};
use nix::sys::signal::Signal;

use super::*;
use crate::source::{Allocation, Source};
use crate::units::HostOffset;

/// What `work` comes to on a thread that is shut by `shut` first.
fn on_a_thread<T: Send>(shut: fn() -> bool, work: impl FnOnce() -> T + Send) -> Option<T> {
    let thread = || shut().then(work);
    std::thread::scope(|scope| scope.spawn(thread).join().unwrap())
}

fn is_denied<T>(outcome: &io::Result<T>) -> bool {
    matches!(outcome, Err(error) if error.kind() == ErrorKind::PermissionDenied)
}

#[test]
fn what_is_open_is_read_and_written_on_while_nothing_else_can_be_opened() {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    image.write_all(&[7; 1 << 16]).unwrap();
    let output = tempfile::tempfile().unwrap();
    let source = Arc::new(Source::open(image.path()).unwrap());
    let path = image.path();
    let work = || {
        let mut read = [0; 512];
        source.read_exact(HostOffset::new(512), &mut read, "it").unwrap();
        assert_eq!(read, [7; 512]);
        assert!(matches!(source.allocation(HostOffset::ZERO), Allocation::Data { .. }));
        source.stamp().unwrap();
        output.write_all_at(b"written", 0).unwrap();
        output.set_len(4096).unwrap();
        // Threads, in them too, and the memory that they take.
        let sum = std::thread::scope(|scope| {
            let more = scope.spawn(|| (is_denied(&File::open(path)), vec![1u8; 8 << 20].len()));
            more.join().unwrap()
        });
        assert_eq!(sum, (true, 8 << 20));
        assert!(is_denied(&File::open("/etc/passwd")));
        assert!(is_denied(&File::create(path.with_extension("new"))));
        assert!(is_denied(&std::fs::remove_file(path)));
        assert!(is_denied(&std::fs::read_dir("/")));
        std::thread::available_parallelism().unwrap();
    };
    let done = on_a_thread(|| shut_thread().calls, work);
    assert!(done.is_some(), "no seccomp here");
    // The others of this process are as free as before.
    assert!(File::open("/etc/passwd").is_ok() && path.exists());
}

#[test]
fn landlock_alone_shuts_the_files_where_the_kernel_has_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let kept = File::open(file.path()).unwrap();
    let opened = on_a_thread(shut_files, || {
        let listens = TcpListener::bind("127.0.0.1:0").map(drop);
        kept.metadata().unwrap();
        (File::open(file.path()), std::fs::remove_file(file.path()), listens)
    });
    let Some((opened, removed, _listens)) = opened else {
        // As the tests' own guest: then seccomp alone has to do.
        let needed = Ruleset::default()
            .set_compatibility(CompatLevel::HardRequirement)
            .handle_access(AccessFs::from_all(ABI::V1))
            .and_then(Ruleset::create);
        return assert!(needed.is_err(), "the kernel has Landlock");
    };
    assert!(is_denied(&opened) && is_denied(&removed));
}

const ATTACK: &str = "IMGDM_TEST_ATTACK";

#[test]
fn a_call_that_only_an_attack_makes_ends_the_process() {
    if let Ok(attack) = std::env::var(ATTACK) {
        assert!(shut_thread().calls);
        match attack.as_str() {
            "none" => {}
            "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "program" => drop(nix::unistd::execv(c"/bin/true", &[c"true"])),
            "namespace" => drop(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)),
            other => panic!("{other}"),
        }
        return;
    }
    for (attack, ends_by) in [
        ("none", None),
        ("socket", Some(Signal::SIGSYS)),
        ("program", Some(Signal::SIGSYS)),
        ("namespace", Some(Signal::SIGSYS)),
    ] {
        let name = "sandbox::tests::a_call_that_only_an_attack_makes_ends_the_process";
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", name])
            .env(ATTACK, attack)
            .output()
            .unwrap();
        assert_eq!(ended.status.signal(), ends_by.map(|signal| signal as i32), "{attack}");
        assert_eq!(ended.status.success(), ends_by.is_none(), "{attack}: {ended:?}");
    }
}

#[test]
fn there_are_filters_for_this_machine() {
    let lengths: Vec<_> = calls::filters().unwrap().iter().map(Vec::len).collect();
    assert!(lengths.iter().all(|&length| (1..4096).contains(&length)), "{lengths:?}");
}
