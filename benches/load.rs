//! How long the kernel's own work takes of attaching and detaching an image in the worst
//! order, and how much memory that takes.
//!
//! ```text
//! cargo bench --bench load                prints the figures
//! cargo bench --bench load -- --check     and fails where a goal is missed
//! cargo bench --bench load -- million     the first part alone; or worst, the second
//! ```
//!
//! It starts a User-Mode Linux guest (`tests/guest/run`), which has device-mapper whatever
//! this machine's kernel has, with 5 GiB of memory. The images are made in the guest's own
//! memory, sparse: only their metadata takes any.
//!
//! 1. 1,000,000 clusters of 64 KiB, shuffled: each is a line of the table. In turn, each
//!    several times, median: `imgdm attach` from the start of the process to its end, against
//!    the ioctls alone that load the very same table into a device of another name and resume
//!    it; then `imgdm detach` against the one that removes that.
//! 2. 16 Mi of them, a disk of 1 TiB: one device over seventeen inner ones. Its attach and
//!    detach, and what they take of memory, the kernel's and their own. Every line of the live
//!    tables is compared with where the cluster was put, clusters at random and at the tables'
//!    ends with what was written there. Nothing may be left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::resource::{UsageWho, getrusage};

#[path = "common/dm.rs"]
mod dm;
#[path = "common/image.rs"]
#[allow(dead_code)] // Other benches use the rest.
mod image;
#[path = "common/process.rs"]
mod process;

use dm::Bare;
use image::{CLUSTER, Image, Order};
use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/run");
const ROUNDS: usize = 7;
const RATIO_GOAL: f64 = 1.6;
/// In MiB.
const MEMORY_GOAL: u64 = 128;
const MILLION: u64 = 1_000_000;
const WORST_BITS: u32 = 24;
/// Clusters that are written to and read, beside those at the ends of tables.
const SAMPLES: u64 = 4096;
/// How long the kernel may take to give its memory back.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| args.iter().any(|arg| arg == word);
    if args.first().is_some_and(|arg| arg == "guest") {
        let mut good = true;
        if !has("worst") {
            good &= million()?;
        }
        if !has("million") {
            good &= worst()?;
        }
        return Ok(if has("--check") && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    let mut guest = Command::new(GUEST);
    guest.args(["--mem=5G", "--timeout=3000", "--"]).arg(std::env::current_exe()?);
    let status = guest.arg("guest").args(args).stdin(Stdio::null()).status();
    let code = status.context("cannot start a guest")?.code();
    Ok(code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, Into::into))
}

/// Says how a figure compares with its goal.
fn judge(what: &str, good: bool) -> bool {
    if !good {
        println!("{what} misses its goal");
    }
    good
}

fn place() -> anyhow::Result<PathBuf> {
    let place = PathBuf::from("/tmp/bench");
    fs::create_dir_all(&place)?;
    Ok(place)
}

fn attach(image: &Image) -> anyhow::Result<Duration> {
    run(Command::new(IMGDM).args(["attach", "--max-kernel-memory=none"]).arg(&image.path))
}

fn detach(image: &Image) -> anyhow::Result<Duration> {
    run(Command::new(IMGDM).arg("detach").arg(&image.path))
}

/// The peak of all programs that were started so far, in MiB.
fn peak_memory() -> anyhow::Result<u64> {
    let kib = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    Ok(u64::try_from(kib)?.div_ceil(1024))
}

fn million() -> anyhow::Result<bool> {
    let image = Image::create(&place()?.join("million.qcow2"), 20, Order::Shuffled, false)?;
    let image = image.cut(MILLION)?;
    attach(&image)?;
    detach(&image)?;
    let memory = peak_memory()?;

    attach(&image)?;
    let bare = Bare::like("million")?;
    ensure!(u64::from(bare.lines()) == MILLION, "the table has {} lines", bare.lines());
    detach(&image)?;
    let mut times = [(); 4].map(|()| Vec::new());
    for _ in 0..ROUNDS {
        times[0].push(attach(&image)?);
        let (load, remove) = bare.load_and_remove()?;
        times[1].push(load);
        times[2].push(detach(&image)?);
        times[3].push(remove);
    }
    fs::remove_file(&image.path)?;
    let [attach, load, detach, remove] = times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2].as_secs_f64()
    });
    let (up, down) = (attach / load, detach / remove);
    println!(
        "attach of {MILLION} segments: {attach:.3} s, the ioctls alone {load:.3} s: {up:.2} times as long (goal {RATIO_GOAL}), {memory} MiB (goal {MEMORY_GOAL})"
    );
    println!(
        "detach of {MILLION} segments: {detach:.3} s, the ioctl alone {remove:.3} s: {down:.2} times as long (goal {RATIO_GOAL})"
    );
    let good = [
        judge("attach", up <= RATIO_GOAL),
        judge("detach", down <= RATIO_GOAL),
        judge("memory", memory <= MEMORY_GOAL),
    ];
    Ok(good == [true; 3])
}

fn worst() -> anyhow::Result<bool> {
    let image = Image::create(&place()?.join("worst.qcow2"), WORST_BITS, Order::Shuffled, false)?;
    let samples = samples(&image);
    let file = File::options().write(true).open(&image.path)?;
    for &cluster in &samples {
        file.write_all_at(&mark(cluster), image.host_offset(cluster))?;
    }
    drop(file);
    let plan = Command::new(IMGDM).args(["plan", "--output=json"]).arg(&image.path).output()?;
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout)?;
    let planned = plan["kernel_bytes"].as_u64().context("plan tells no kernel memory")?;

    let before = available()?;
    let attached = attach(&image)?;
    let memory = peak_memory()?;
    let taken = before.saturating_sub(available()?);
    let again = attach(&image)?;
    let memory_again = peak_memory()?;
    let tables = compare_tables(&image)?;
    let device = File::open("/dev/mapper/worst")?;
    let start = Instant::now();
    for &cluster in &samples {
        let mut read = mark(cluster);
        read.fill(0);
        device.read_exact_at(&mut read, cluster * CLUSTER)?;
        ensure!(read == mark(cluster), "cluster {cluster} reads as another");
        device.read_exact_at(&mut read, (cluster + 1) * CLUSTER - 512)?;
        ensure!(read.iter().all(|&byte| byte == 0), "cluster {cluster} ends as another");
    }
    let reading = start.elapsed();
    drop(device);
    let detached = detach(&image)?;
    ensure!(dm::devices()?.is_empty(), "devices are left: {:?}", dm::devices()?);
    ensure!(loops()?.is_empty(), "loop devices are left: {:?}", loops()?);
    let back = wait_for_memory(before)?;
    fs::remove_file(&image.path)?;
    println!(
        "the worst disk of 1 TiB: {} segments in {tables} tables, attached in {:.1} s, found attached in {:.1} s, {} reads in {:.2} s, detached in {:.1} s",
        image.clusters,
        attached.as_secs_f64(),
        again.as_secs_f64(),
        2 * samples.len(),
        reading.as_secs_f64(),
        detached.as_secs_f64(),
    );
    let mib = |bytes: u64| bytes >> 20;
    println!(
        "its memory: {memory} MiB of imgdm's own, {memory_again} MiB to find it attached (goal {MEMORY_GOAL}), {} MiB of the kernel's where plan said {}, {} MiB not given back",
        mib(taken),
        mib(planned),
        mib(before.saturating_sub(back)),
    );
    let good = [
        judge("memory", memory.max(memory_again) <= MEMORY_GOAL),
        judge("plan's kernel memory", planned >= taken && planned <= taken + taken / 4),
        judge("what is given back", back + before / 50 >= before),
    ];
    Ok(good == [true; 3])
}

/// Which clusters are looked at: at random, and all near the ends of tables.
fn samples(image: &Image) -> BTreeSet<u64> {
    let mut random = 1u64;
    let mut samples: BTreeSet<_> = (0..SAMPLES)
        .map(|_| {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (random >> 32) % image.clusters
        })
        .collect();
    for table in 0..=image.clusters >> 20 {
        // Where a table ends is a line's more or less than a multiple of its lines.
        let near = (table << 20).saturating_sub(64)..((table << 20) + 64).min(image.clusters);
        samples.extend(near);
    }
    samples
}

/// What a cluster that is looked at begins with.
fn mark(cluster: u64) -> [u8; 512] {
    let mut mark = [0; 512];
    for (at, bytes) in (0u64..).zip(mark.chunks_exact_mut(8)) {
        bytes.copy_from_slice(&(cluster << 6 | at).to_be_bytes());
    }
    mark
}

/// Compares every line of the live tables with where its cluster was put; gives the number of
/// tables.
fn compare_tables(image: &Image) -> anyhow::Result<usize> {
    let mut tables = 0;
    let mut end = 0;
    let loops = loops()?;
    ensure!(loops.len() == 1, "there are {loops:?}");
    for name in dm::devices()? {
        tables += 1;
        if name == "worst" {
            continue;
        }
        dm::for_each_line(&name, |line| {
            let cluster = end / (CLUSTER / 512);
            let (device, offset) = line.parameters.split_once(' ').context("no linear line")?;
            ensure!(
                line.length == CLUSTER / 512
                    && device.starts_with("7:")
                    && offset.parse::<u64>()? == image.host_offset(cluster) / 512,
                "cluster {cluster} is mapped by {line:?}"
            );
            end += line.length;
            Ok(())
        })?;
    }
    ensure!(end == image.clusters * CLUSTER / 512, "the tables have {end} sectors");
    Ok(tables)
}

/// Names of the loop devices that are bound.
fn loops() -> io::Result<Vec<String>> {
    let bound = fs::read_dir("/sys/block")?.filter_map(|entry| {
        let entry = entry.ok()?;
        let is_bound = entry.path().join("loop/backing_file").exists();
        is_bound.then(|| entry.file_name().to_string_lossy().into_owned())
    });
    Ok(bound.collect())
}

/// Bytes that the kernel says are to be had.
fn available() -> anyhow::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).context("no MemAvailable")?;
    Ok(kib.trim().parse::<u64>()? << 10)
}

/// Waits until the kernel has about as much as before; gives what it has then.
fn wait_for_memory(before: u64) -> anyhow::Result<u64> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = available()?;
        if now + before / 100 >= before || Instant::now() > end {
            return Ok(now);
        }
        thread::sleep(Duration::from_millis(100));
    }
}
