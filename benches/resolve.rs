//! How fast images are resolved, as ratios to what else there is on the same machine.
//!
//! ```text
//! cargo bench --bench resolve               prints the figures
//! cargo bench --bench resolve -- --check    and fails where a goal is missed
//! ```
//!
//! It makes three qcow2 images under `TMPDIR` (264 MiB on disk; sparse files of 64 GiB and
//! 1 TiB, so not on a file system without holes, nor, for the third figure, in memory) whose 64 KiB clusters lie shuffled: each
//! is an extent of its own, the worst case. Then, each several times in turn, median:
//!
//! 1. `imgdm map --output=json` of the first against `qemu-img map --output=json`, after
//!    a check that both print the same;
//! 2. `imgdm plan` of the second against reading its L2 tables with pread, 64 KiB each,
//!    out of the page cache;
//! 3. the same from the disk, the pages of the image dropped before each, and of a third
//!    image whose L2 tables lie shuffled: there pread reads them in the file's order.
//!
//! Let nothing else run meanwhile: imgdm uses all cores, qemu-img and pread one. The peak
//! memory is what the kernel counts (`ru_maxrss`), this small process's own included.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::resource::{UsageWho, getrusage};
use sha2::{Digest, Sha256};

#[path = "common/process.rs"]
mod process;

use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const QEMU_IMG: &str = "qemu-img";
const ROUNDS: usize = 7;
const MEMORY_GOAL_MIB: u64 = 64;

#[path = "common/image.rs"]
#[allow(dead_code)] // Another bench uses the rest.
mod image;

use image::{CLUSTER, Image, Order};

fn main() -> anyhow::Result<ExitCode> {
    let check = std::env::args().any(|arg| arg == "--check");
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let small = Image::create(&dir.path().join("64g.qcow2"), 20, Order::Shuffled, false)?;
    let large = Image::create(&dir.path().join("1t.qcow2"), 24, Order::Shuffled, false)?;

    // The kernel tells the peak of all children so far: the smallest goes first.
    let plan_memory = peak_memory(&mut plan(&large))?;
    let map_memory = peak_memory(&mut map(IMGDM, &small))?;
    ensure!(
        printed(&mut map(IMGDM, &small))? == printed(&mut map(QEMU_IMG, &small))?,
        "imgdm and qemu-img print different maps"
    );

    let [qemu_img, imgdm] =
        medians([&mut || run(&mut map(QEMU_IMG, &small)), &mut || run(&mut map(IMGDM, &small))])?;
    let ratio = qemu_img.as_secs_f64() / imgdm.as_secs_f64();
    println!(
        "map of {} extents: qemu-img {:.3} s, imgdm {:.3} s: {ratio:.1} times as fast (goal 15), {map_memory} MiB (goal {MEMORY_GOAL_MIB})",
        small.clusters,
        qemu_img.as_secs_f64(),
        imgdm.as_secs_f64(),
    );
    let map_is_good = ratio >= 15.0 && map_memory <= MEMORY_GOAL_MIB;

    let [pread, imgdm] = medians([&mut || read_l2_tables(&large), &mut || run(&mut plan(&large))])?;
    let ratio = imgdm.as_secs_f64() / pread.as_secs_f64();
    println!(
        "plan of {} clusters: pread of the L2 tables {:.3} s, imgdm {:.3} s: {ratio:.1} times the time (goal 4), {plan_memory} MiB (goal {MEMORY_GOAL_MIB})",
        large.clusters,
        pread.as_secs_f64(),
        imgdm.as_secs_f64(),
    );
    let plan_is_good = ratio <= 4.0 && plan_memory <= MEMORY_GOAL_MIB;

    let apart = Image::create(&dir.path().join("apart.qcow2"), 24, Order::ShuffledTables, false)?;
    let cold_is_good = [("in order", &large), ("shuffled", &apart)]
        .map(|(tables, image)| from_disk(tables, image))
        .into_iter()
        .try_fold(true, |all, good| good.map(|good| all && good))?;

    let all = [("map", map_is_good), ("plan", plan_is_good), ("plan from disk", cold_is_good)];
    for (name, _) in all.iter().filter(|(_, good)| !good) {
        println!("{name} misses its goal");
    }
    let good = all.iter().all(|(_, good)| *good);
    Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Compares plan with pread where nothing of the image is in the page cache; says whether the
/// goal is reached.
fn from_disk(tables: &str, image: &Image) -> anyhow::Result<bool> {
    let mut read_bytes = 0;
    let [pread, imgdm] = medians([
        &mut || {
            forget(image)?;
            read_l2_tables(image)
        },
        &mut || {
            forget(image)?;
            let before = blocks_read()?;
            let time = run(&mut plan(image))?;
            read_bytes = (blocks_read()? - before) * 512;
            Ok(time)
        },
    ])?;
    let needed = image.l2_tables * (CLUSTER + 8);
    let ratio = imgdm.as_secs_f64() / pread.as_secs_f64();
    println!(
        "plan of {} clusters from disk, L2 tables {tables}: pread {:.3} s, imgdm {:.3} s: {ratio:.2} times the time (goal 1.3); {:.1} MiB read, {:.1} MiB needed",
        image.clusters,
        pread.as_secs_f64(),
        imgdm.as_secs_f64(),
        read_bytes as f64 / 1048576.0,
        needed as f64 / 1048576.0,
    );
    // The header, and what the file system reads for itself.
    Ok(ratio <= 1.3 && read_bytes <= needed + (1 << 20))
}

/// Takes an image's pages out of the page cache.
fn forget(image: &Image) -> anyhow::Result<()> {
    let file = File::open(&image.path)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    Ok(())
}

/// Blocks of 512 bytes that the programs so far have had read from disks.
fn blocks_read() -> anyhow::Result<u64> {
    Ok(u64::try_from(getrusage(UsageWho::RUSAGE_CHILDREN)?.block_reads())?)
}

fn read_l2_tables(image: &Image) -> anyhow::Result<Duration> {
    let file = File::open(&image.path)?;
    let mut table = vec![0; usize::try_from(CLUSTER)?];
    let start = Instant::now();
    for index in 0..image.l2_tables {
        file.read_exact_at(&mut table, image.l2_offset + index * CLUSTER)?;
        black_box(&table);
    }
    Ok(start.elapsed())
}

fn map(program: &str, image: &Image) -> Command {
    let mut command = Command::new(program);
    command.args(["map", "--output=json"]).arg(&image.path);
    command
}

fn plan(image: &Image) -> Command {
    let mut command = Command::new(IMGDM);
    command.arg("plan").arg(&image.path);
    command
}

/// The peak of a command in MiB, or of an earlier one that was larger.
fn peak_memory(command: &mut Command) -> anyhow::Result<u64> {
    run(command)?;
    let kib = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    Ok(u64::try_from(kib)?.div_ceil(1024))
}

/// The SHA-256 of what a command prints.
fn printed(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    struct Hash(Sha256);
    impl Write for Hash {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.update(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let mut hash = Hash(Sha256::new());
    if let Some(mut output) = child.stdout.take() {
        io::copy(&mut output, &mut hash)?;
    }
    let status = child.wait()?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(hash.0.finalize().to_vec())
}

/// The median times of two things done in turn.
fn medians(
    mut things: [&mut dyn FnMut() -> anyhow::Result<Duration>; 2],
) -> anyhow::Result<[Duration; 2]> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (thing, times) in things.iter_mut().zip(&mut times) {
            times.push(thing()?);
        }
    }
    Ok(times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2]
    }))
}
