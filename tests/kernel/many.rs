//! More segments than one table holds.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::libc;
use nix::sys::signal::Signal;

use crate::args;
use crate::faults::faulty;
use crate::guest::*;
use crate::image::{CLUSTER, Image, Order};

/// Two tables full, and a part of a third one.
const CLUSTERS: u64 = 2_200_000;
/// Where the second table starts, and the third: one sector of each is left to every file.
const BORDERS: [u64; 2] = [1_048_575, 2 * 1_048_575];
const NO_LIMIT: &str = "--max-kernel-memory=none";
/// What a program may have for itself, in KiB.
const MEMORY: u64 = 128 << 10;

/// What a cluster that is looked at begins with.
fn mark(cluster: u64) -> [u8; 512] {
    let mut mark = [0; 512];
    for (at, bytes) in (0..).zip(mark.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&(cluster << 6 | at).to_be_bytes());
    }
    mark
}

/// Clusters at both sides of the borders, at the disk's ends and in between.
fn looked_at() -> Vec<u64> {
    let mut random = Random(7);
    let near = BORDERS.into_iter().flat_map(|border| border - 3..border + 3);
    let between = (0..200).map(|_| random.below(CLUSTERS));
    [0, 1, CLUSTERS - 2, CLUSTERS - 1].into_iter().chain(near).chain(between).collect()
}

/// Every cluster somewhere else; those that are looked at with a mark.
fn shuffled(scratch: &Scratch) -> PathBuf {
    let image = Image::create(&scratch.path("many.qcow2"), 22, Order::Shuffled, false);
    let image = image.unwrap().cut(CLUSTERS).unwrap();
    let file = File::options().write(true).open(&image.path).unwrap();
    for cluster in looked_at() {
        file.write_all_at(&mark(cluster), image.host_offset(cluster)).unwrap();
    }
    image.path
}

/// The most memory that a program has had, in KiB. It stops at this step, and goes on then.
fn peak_memory(options: &[&str], image: &Path, step: &str) -> (Ran, u64) {
    let running = start(&mut faulty(options, image, &format!("{step}:stop")));
    assert!(within(PATIENCE, || running.is_stopped()), "it never came to {step}");
    let status = fs::read_to_string(format!("/proc/{}/status", running.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak = peak.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    running.signal(Signal::SIGCONT);
    (running.finish(), peak)
}

#[test]
fn more_segments_than_a_table_holds_are_loaded_in_bounded_memory() {
    let scratch = Scratch::new();
    let image = shuffled(&scratch);
    let plan = imgdm(args!["plan", "--output=json", &image]).ok();
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    assert_eq!((&plan["segments"], &plan["tables"]), (&(CLUSTERS + 3).into(), &4.into()));
    let planned = plan["kernel_bytes"].as_u64().unwrap();
    let loading = plan["kernel_load_bytes"].as_u64().unwrap();

    // More than a quarter of what this guest has, which is said before anything is built.
    assert_eq!(plan["obstacles"][0]["kind"], "kernel-memory", "{plan}");
    let said = imgdm(args!["attach", &image]).refused(73);
    assert!(
        said.contains("MiB of kernel memory") && said.contains("--max-kernel-memory"),
        "{said}"
    );
    let limit = format!("--max-kernel-memory={}", planned + loading - 1);
    imgdm(args!["attach", limit, &image]).refused(73);
    assert_nothing_left();

    let before = available();
    let limit = format!("--max-kernel-memory={}", planned + loading);
    let (ran, peak) = peak_memory(&[&limit], &image, "commit");
    assert_eq!(ran.ok(), "/dev/mapper/many\n");
    assert!(peak <= MEMORY, "{peak} KiB");
    let taken = before.saturating_sub(available());
    let about = planned / 2..planned + planned / 4;
    assert!(about.contains(&taken), "{taken} bytes are taken where {planned} were planned");
    assert_eq!(our_devices().len(), 4);

    let device = File::open("/dev/mapper/many").unwrap();
    for cluster in looked_at() {
        let mut read = [0; 512];
        device.read_exact_at(&mut read, cluster * CLUSTER).unwrap();
        assert_same(&format!("cluster {cluster}"), &read, &mark(cluster));
    }
    // In one read, across the border of two tables.
    let mut read = vec![1; 2 * 65536];
    device.read_exact_at(&mut read, (BORDERS[0] - 1) * CLUSTER).unwrap();
    let mut wanted = vec![0; 2 * 65536];
    wanted[..512].copy_from_slice(&mark(BORDERS[0] - 1));
    wanted[65536..65536 + 512].copy_from_slice(&mark(BORDERS[0]));
    assert_same("across a border", &read, &wanted);
    drop(device);

    imgdm(["detach", "many"]).ok();
    assert_nothing_left();
    let given_back = || available() + before / 50 >= before;
    assert!(within(PATIENCE, given_back), "{} of {before} bytes are free again", available());
}

#[test]
fn killed_between_two_full_tables_attach_leaves_nothing() {
    let scratch = Scratch::new();
    let image = shuffled(&scratch);
    for step in ["inner1.mark", "top.load"] {
        let ran = run(&mut faulty(&[NO_LIMIT], &image, &format!("{step}:kill")));
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        assert_nothing_left_in_time(step, &scratch);
    }
    // Also where it dies while the kernel is at work, or the next table is made.
    let attaching = start(imgdm_command(args!["attach", NO_LIMIT, &image]).stdin(Stdio::null()));
    assert!(within(PATIENCE, || our_devices().len() >= 2), "there is no second device");
    attaching.signal(Signal::SIGKILL);
    assert_eq!(attaching.finish().signal(), Some(libc::SIGKILL));
    assert_nothing_left_in_time("the second device was made", &scratch);
}

/// The kernel frees each line of the tables, which takes it a while.
#[track_caller]
fn assert_nothing_left_in_time(step: &str, scratch: &Scratch) {
    let left = || left(Some(scratch.directory()));
    assert!(within(PATIENCE, || left().is_empty()), "killed after {step}: {:#?}", left());
}

/// Bytes of memory that can be had.
fn available() -> u64 {
    drop_caches();
    imgdm::device::memory::available().unwrap()
}
