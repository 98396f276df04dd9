//! A udev that was killed, or that hangs: attach and detach return all the same.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::guest::*;
use crate::world::*;

/// The processes of udev, workers too.
fn udev() -> Vec<Pid> {
    let is_udev = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        // A worker has the name of its file, `(udev-worker)`, or that of the daemon.
        name.contains("udevd") || name.contains("udev-worker")
    };
    let all = processes().into_iter().filter(is_udev);
    all.map(|pid| Pid::from_raw(i32::try_from(pid).unwrap())).collect()
}

#[track_caller]
fn signal(which: Signal) {
    let all = udev();
    assert!(!all.is_empty(), "no udev runs");
    for pid in all {
        // A worker may have ended meanwhile.
        let _ = kill(pid, which);
    }
}

/// A disk with four partitions.
fn disk(world: &World) -> std::path::PathBuf {
    let image = world.path("disk.raw");
    fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    sh(&format!(
        "printf 'label: gpt\\nsize=4096\\nsize=4096\\nsize=4096\\nsize=4096\\n' | sfdisk -q {}",
        image.display()
    ));
    patch(&image, MIB, b"the first");
    image
}

/// Attaches the disk with its partitions, reads one, and detaches it; the longer of both.
#[track_caller]
fn works(image: &Path) -> Duration {
    let begin = Instant::now();
    let printed = imgdm(args!["attach", "-f", "raw", "--partitions", image]).ok();
    let attached = begin.elapsed();
    let wanted: Vec<_> =
        ["", "1", "2", "3", "4"].map(|part| format!("/dev/mapper/disk{part}")).into();
    assert_eq!(printed.lines().collect::<Vec<_>>(), wanted);
    for path in &wanted {
        assert!(Path::new(path).exists(), "{path}");
    }
    assert_eq!(read_direct(Path::new("/dev/mapper/disk1"), 0, 512).unwrap()[..9], *b"the first");
    let begin = Instant::now();
    assert_eq!(imgdm(["detach", "disk"]).ok(), "");
    let detached = begin.elapsed();
    for path in &wanted {
        assert!(fs::symlink_metadata(path).is_err(), "{path} is left");
    }
    assert_nothing_left();
    attached.max(detached)
}

#[test]
fn a_udev_that_was_killed_is_not_waited_for() {
    let world = World::new("udev");
    let image = disk(&world);
    works(&image);
    settle();
    signal(Signal::SIGKILL);
    wait_for("udev to be gone", || udev().is_empty());
    assert!(Path::new("/run/udev/control").exists(), "its socket outlives it");
    let took = std::panic::catch_unwind(|| works(&image));
    sh("/lib/systemd/systemd-udevd --daemon; udevadm control --ping; udevadm settle");
    let took = took.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(took < Duration::from_secs(5), "nothing to wait for, but it took {took:?}");
    // And with the new one all is as it was.
    works(&image);
}

#[test]
fn a_udev_that_hangs_is_waited_for_once_and_not_for_each_partition() {
    let world = World::new("udev");
    let image = disk(&world);
    settle();
    signal(Signal::SIGSTOP);
    let took = std::panic::catch_unwind(|| works(&image));
    signal(Signal::SIGCONT);
    settle();
    let took = took.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert!(took < Duration::from_secs(20), "ten seconds of patience, and it took {took:?}");
    // What it does late is done to devices that are gone.
    assert_eq!(mapper(), [""; 0]);
    works(&image);
}
