//! How fast `imgdm convert` is, as ratios to `qemu-img convert` on the same file system.
//!
//! ```text
//! cargo bench --bench convert               prints the figures
//! cargo bench --bench convert -- --check    and fails where a goal is missed
//! ```
//!
//! It makes a qcow2 image of 1 GiB (`IMGDM_BENCH_MIB`: another number of MiB; the goals are for
//! 4096), of what lies under /usr and compresses, and converts it under `TMPDIR`, by both
//! programs in turn, median of five, each time with the image in the page cache, no output
//! there and nothing left to be written out:
//!
//! - to raw, every byte copied (`--reflink=never`);
//! - to raw by reflinks, on XFS on a loop device, which takes root;
//! - to qcow2 with `-c`, zlib and zstd, an eighth of the image, against
//!   `qemu-img convert -c -m 16 -W`.
//!
//! qemu-img leaves it to the kernel when its output is on the disk; imgdm waits for that, but
//! for `-t unsafe`. So like is compared with like: `imgdm convert -t unsafe` with qemu-img, and
//! imgdm convert with qemu-img and an fsync of its output. The goals are for the first.
//!
//! TMPDIR has to have room for four times the size. Let nothing else run meanwhile. A virtual
//! machine that gives free memory back to its host (free page reporting) fills the page cache at
//! the speed at which the host hands out pages, which says little of either program: it is told
//! at the start, with how to leave that off.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

#[path = "common/content.rs"]
mod content;
#[path = "common/process.rs"]
mod process;

use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const ROUNDS: usize = 5;
/// MiB of different content; more is the same again.
const CONTENT_MIB: u64 = 256;
const REPORTING_ORDER: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
const COPY_GOAL: f64 = 1.3;
const REFLINK_GOAL: f64 = 50.0;
const COMPRESS_GOAL: f64 = 1.2;

fn main() -> anyhow::Result<ExitCode> {
    let check = std::env::args().any(|arg| arg == "--check");
    if gives_memory_back() {
        println!(
            "this machine gives free memory back to its host, so that what is written is slow and uneven: echo 11 >{REPORTING_ORDER} leaves it off until the next boot"
        );
    }
    let mib = std::env::var("IMGDM_BENCH_MIB").map_or(Ok(1024), |text| text.parse::<u64>())?;
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let dir = dir.path();
    let raw = dir.join("content.raw");
    content::make_content(&raw, CONTENT_MIB.min(mib) << 20)?;
    let (whole, part) = (dir.join("whole.qcow2"), dir.join("part.qcow2"));
    make_image(&raw, (mib / 8).max(16), &part)?;
    make_image(&raw, mib, &whole)?;

    let mut good = copied(&format!("{mib} MiB of qcow2 to raw"), &whole, "never", COPY_GOAL)?;
    good &= reflinked(mib, &whole, dir)?;
    std::fs::remove_file(&whole)?;
    for method in ["zlib", "zstd"] {
        good &= compressed(&part, method)?;
    }
    Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether the kernel tells a host which pages are free, so that they have to be had from it
/// anew: the balloon device was agreed to do so, and blocks of pages are not too small for it.
fn gives_memory_back() -> bool {
    /// `VIRTIO_BALLOON_F_REPORTING`.
    const FEATURE: usize = 5;
    /// Blocks of free pages have orders up to 10.
    const NEVER: u32 = 11;
    let order = std::fs::read_to_string(REPORTING_ORDER).ok();
    let order = order.and_then(|order| order.trim().parse::<u32>().ok());
    let devices = std::fs::read_dir("/sys/bus/virtio/drivers/virtio_balloon");
    let reports = devices.into_iter().flatten().flatten().any(|device| {
        let features = std::fs::read_to_string(device.path().join("features"));
        features.is_ok_and(|features| features.as_bytes().get(FEATURE) == Some(&b'1'))
    });
    reports && order.is_some_and(|order| order < NEVER)
}

/// A qcow2 image of that many MiB of the content, again and again.
fn make_image(raw: &Path, mib: u64, image: &Path) -> anyhow::Result<()> {
    let longer = raw.with_extension("longer");
    let mut out = File::create(&longer)?;
    let mut left = mib << 20;
    while left > 0 {
        left -= std::io::copy(&mut File::open(raw)?.take(left), &mut out)?;
    }
    out.flush()?;
    let mut convert = Command::new("qemu-img");
    run(convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args([&longer, &image.into()]))?;
    std::fs::remove_file(longer)?;
    Ok(())
}

/// Medians of what two programs take, in seconds: to their end, and until all is on the disk.
struct Times {
    ours: [f64; 2],
    theirs: [f64; 2],
    /// Bytes of the outputs.
    sizes: [u64; 2],
}

/// Both in turn, from an image to files beside it; what they wrote is compared once.
fn times(
    image: &Path,
    ours: impl Fn(&Path) -> Command,
    theirs: impl Fn(&Path) -> Command,
    format: &str,
) -> anyhow::Result<Times> {
    let outputs = ["ours", "theirs"].map(|name| image.with_file_name(name));
    let mut all = [Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    let mut sizes = [0; 2];
    let fresh = || -> anyhow::Result<()> {
        for output in &outputs {
            let _ = std::fs::remove_file(output);
        }
        nix::unistd::sync();
        // Into the page cache.
        std::io::copy(&mut File::open(image)?, &mut std::io::sink())?;
        Ok(())
    };
    for round in 0..ROUNDS {
        fresh()?;
        all[1].push(run(&mut ours(&outputs[0]))?);
        fresh()?;
        all[0].push(run(ours(&outputs[0]).args(["-t", "unsafe"]))?);
        if round > 0 {
            fresh()?;
        }
        nix::unistd::sync();
        let start = Instant::now();
        all[2].push(run(&mut theirs(&outputs[1]))?);
        File::open(&outputs[1])?.sync_all()?;
        all[3].push(start.elapsed());
        if round == 0 {
            let mut compare = Command::new("qemu-img");
            compare.args(["compare", "-f", format, "-F", format]).args(&outputs);
            run(&mut compare)?;
            for (size, output) in sizes.iter_mut().zip(&outputs) {
                *size = std::fs::metadata(output)?.len();
            }
        }
    }
    for output in &outputs {
        let _ = std::fs::remove_file(output);
    }
    let [ours, ours_synced, theirs, theirs_synced] = all.map(median);
    Ok(Times { ours: [ours, ours_synced], theirs: [theirs, theirs_synced], sizes })
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

/// Prints a comparison, and says whether the goal is reached.
fn reached(what: &str, times: &Times, goal: f64) -> bool {
    let ratios = [0, 1].map(|i| times.theirs[i] / times.ours[i]);
    println!(
        "{what}: qemu-img {:.3} s, imgdm {:.3} s: {:.2} times as fast (goal {goal}); until all is on the disk {:.3} s, {:.3} s: {:.2} times",
        times.theirs[0], times.ours[0], ratios[0], times.theirs[1], times.ours[1], ratios[1]
    );
    if ratios[0] < goal {
        println!("{what} misses its goal");
    }
    ratios[0] >= goal
}

fn copied(what: &str, image: &Path, reflink: &str, goal: f64) -> anyhow::Result<bool> {
    let ours = |out: &Path| {
        let mut command = Command::new(IMGDM);
        command.args(["convert", "-f", "qcow2", "-O", "raw"]);
        command.arg(format!("--reflink={reflink}")).args([image, out]);
        command
    };
    let theirs = |out: &Path| {
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", "qcow2", "-O", "raw"]).args([image, out]);
        command
    };
    Ok(reached(what, &times(image, ours, theirs, "raw")?, goal))
}

/// An XFS file system in a file, mounted until this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn xfs(dir: &Path, mib: u64) -> anyhow::Result<Self> {
        let (file, place) = (dir.join("xfs"), dir.join("mounted"));
        File::create(&file)?.set_len((3 * mib + 512) << 20)?;
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&file))?;
        std::fs::create_dir(&place)?;
        run(Command::new("mount").args(["-o", "loop"]).args([&file, &place]))?;
        Ok(Self(place))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = run(Command::new("umount").arg(&self.0));
    }
}

fn reflinked(mib: u64, image: &Path, dir: &Path) -> anyhow::Result<bool> {
    let what = format!("{mib} MiB of qcow2 to raw by reflinks on XFS");
    let mounted = match Mounted::xfs(dir, mib) {
        Ok(mounted) => mounted,
        Err(error) => {
            println!("{what}: passed over, no XFS can be mounted here: {error:#}");
            return Ok(true);
        }
    };
    let there = mounted.0.join("image.qcow2");
    std::fs::copy(image, &there)?;
    copied(&what, &there, "always", REFLINK_GOAL)
}

fn compressed(image: &Path, method: &str) -> anyhow::Result<bool> {
    let option = format!("compression_type={method}");
    let command = |program: &str, more: &[&str], out: &Path| {
        let mut command = Command::new(program);
        command.args(["convert", "-f", "qcow2", "-O", "qcow2", "-c", "-o", &option]);
        command.args(more).args([image, out]);
        command
    };
    let ours = |out: &Path| command(IMGDM, &[], out);
    let theirs = |out: &Path| command("qemu-img", &["-m", "16", "-W"], out);
    let times = times(image, ours, theirs, "qcow2")?;
    let [our_size, their_size] = times.sizes.map(|bytes| bytes >> 10);
    ensure!(our_size > 0, "nothing was written");
    println!("-c {method}: imgdm's image has {our_size} KiB, qemu-img's {their_size} KiB");
    Ok(reached(&format!("-c {method}"), &times, COMPRESS_GOAL))
}
