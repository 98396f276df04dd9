//! How fast images are resolved, as ratios to what else there is on the same machine.
//!
//! ```text
//! cargo bench --bench resolve               prints the figures
//! cargo bench --bench resolve -- --check    and fails where a goal is missed
//! ```
//!
//! It makes two qcow2 images under `TMPDIR` (136 MiB on disk; sparse files of 64 GiB and
//! 1 TiB, so not on a file system without holes) whose 64 KiB clusters lie shuffled: each
//! is an extent of its own, the worst case. Then, each several times in turn, median:
//!
//! 1. `imgdm map --output=json` of the first against `qemu-img map --output=json`, after
//!    a check that both print the same;
//! 2. `imgdm plan` of the second against reading its L2 tables with pread, 64 KiB each,
//!    out of the page cache.
//!
//! Let nothing else run meanwhile: imgdm uses all cores, qemu-img and pread one. The peak
//! memory is what the kernel counts (`ru_maxrss`), this small process's own included.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use sha2::{Digest, Sha256};

#[path = "common/process.rs"]
mod process;

use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const QEMU_IMG: &str = "qemu-img";
const ROUNDS: usize = 7;
const MEMORY_GOAL_MIB: u64 = 64;

const CLUSTER: u64 = 64 << 10;
const ENTRIES_PER_TABLE: u64 = CLUSTER / 8;
const COPIED: u64 = 1 << 63;

fn main() -> anyhow::Result<ExitCode> {
    let check = std::env::args().any(|arg| arg == "--check");
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let small = Image::create(&dir.path().join("64g.qcow2"), 20)?;
    let large = Image::create(&dir.path().join("1t.qcow2"), 24)?;

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

    let [pread, imgdm] = medians([&mut || large.read_l2_tables(), &mut || run(&mut plan(&large))])?;
    let ratio = imgdm.as_secs_f64() / pread.as_secs_f64();
    println!(
        "plan of {} clusters: pread of the L2 tables {:.3} s, imgdm {:.3} s: {ratio:.1} times the time (goal 4), {plan_memory} MiB (goal {MEMORY_GOAL_MIB})",
        large.clusters,
        pread.as_secs_f64(),
        imgdm.as_secs_f64(),
    );
    let plan_is_good = ratio <= 4.0 && plan_memory <= MEMORY_GOAL_MIB;

    for (name, good) in [("map", map_is_good), ("plan", plan_is_good)] {
        if !good {
            println!("{name} misses its goal");
        }
    }
    Ok(if check && !(map_is_good && plan_is_good) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A qcow2 image (version 3) with every cluster allocated, each somewhere else.
struct Image {
    path: std::path::PathBuf,
    clusters: u64,
    l2_tables: u64,
}

impl Image {
    /// Makes one of 2^`bits` clusters, of which only the metadata takes space on disk.
    fn create(path: &Path, bits: u32) -> anyhow::Result<Self> {
        let clusters = 1u64 << bits;
        let l2_tables = clusters / ENTRIES_PER_TABLE;
        // Header, L1 table, refcount table (empty: nothing is to be written), L2 tables.
        let l1_offset = CLUSTER;
        let refcounts_offset = 2 * CLUSTER;
        let l2_offset = 3 * CLUSTER;
        let data_offset = l2_offset + l2_tables * CLUSTER;

        let mut header = Vec::new();
        let be32 = |value: u32| value.to_be_bytes().to_vec();
        let be64 = |value: u64| value.to_be_bytes().to_vec();
        for field in [
            b"QFI\xfb".to_vec(),
            be32(3),
            be64(0), // backing file
            be32(0),
            be32(CLUSTER.trailing_zeros()),
            be64(clusters * CLUSTER),
            be32(0), // encryption
            be32(u32::try_from(l2_tables)?),
            be64(l1_offset),
            be64(refcounts_offset),
            be32(1),
            be32(0), // snapshots
            be64(0),
            be64(0), // features: incompatible, compatible, autoclear
            be64(0),
            be64(0),
            be32(4), // refcounts of 16 bits
            be32(104),
        ] {
            header.extend(field);
        }

        let write = || -> io::Result<()> {
            let file = File::create(path)?;
            file.write_all_at(&header, 0)?;
            let l1: Vec<u8> = (0..l2_tables)
                .flat_map(|table| (COPIED | (l2_offset + table * CLUSTER)).to_be_bytes())
                .collect();
            file.write_all_at(&l1, l1_offset)?;
            for table in 0..l2_tables {
                let first = table * ENTRIES_PER_TABLE;
                let entries: Vec<u8> = (first..first + ENTRIES_PER_TABLE)
                    .map(|cluster| data_offset + shuffled(cluster, bits) * CLUSTER)
                    .flat_map(|host| (COPIED | host).to_be_bytes())
                    .collect();
                file.write_all_at(&entries, l2_offset + table * CLUSTER)?;
            }
            file.set_len(data_offset + clusters * CLUSTER)
        };
        write().with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path: path.to_owned(), clusters, l2_tables })
    }

    fn read_l2_tables(&self) -> anyhow::Result<Duration> {
        let file = File::open(&self.path)?;
        let mut table = vec![0; usize::try_from(CLUSTER)?];
        let start = Instant::now();
        for index in 0..self.l2_tables {
            file.read_exact_at(&mut table, (3 + index) * CLUSTER)?;
            black_box(&table);
        }
        Ok(start.elapsed())
    }
}

/// A permutation of the numbers of `bits` bits: each step can be undone. A list to
/// shuffle would count as memory of the programs that are started.
fn shuffled(number: u64, bits: u32) -> u64 {
    const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
    let mask = (1 << bits) - 1;
    let mut mixed = number;
    for _ in 0..3 {
        mixed = mixed.wrapping_mul(SEED | 1).wrapping_add(SEED >> 7) & mask;
        mixed ^= mixed >> (bits / 2);
    }
    mixed
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
