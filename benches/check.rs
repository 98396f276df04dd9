//! How fast an image is checked, as a ratio to `qemu-img check`.
//!
//! ```text
//! cargo bench --bench check               prints the figures
//! cargo bench --bench check -- --check    and fails where a goal is missed
//! ```
//!
//! It makes two qcow2 images with correct refcounts under `TMPDIR` (180 MiB on disk; sparse
//! files, so not on a file system without holes): one of 1 TiB whose 64 KiB clusters lie in
//! runs of 1 to 64, and one of 64 GiB (`IMGDM_BENCH_GIB`: another power of two, up to 1024)
//! whose clusters lie shuffled, which is hard on qemu-img: at 1 TiB it takes ten minutes.
//! Each is checked by `imgdm check` several times, median, and by `qemu-img check`, after
//! it is made sure that both say the same.
//!
//! Let nothing else run meanwhile: imgdm uses all cores, qemu-img one. The peak memory is
//! what the kernel counts (`VmHWM`) of this process as it checks an image by the library.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use imgdm::check::Options;
use imgdm::format::Format;
use imgdm::source::Source;
use serde_json::Value;

#[path = "common/image.rs"]
#[allow(dead_code)] // Another bench uses the rest.
mod image;

use image::{Image, Order};

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const ROUNDS: usize = 5;
/// Beside two bits a cluster.
const MEMORY_GOAL_MIB: u64 = 64;
const RUNS_GOAL: f64 = 20.0;
const SHUFFLED_GOAL: f64 = 200.0;

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, image] = &args[..]
        && command == "library"
    {
        let source = Source::open(Path::new(image))?;
        imgdm::check::check(&source, Format::Qcow2, Options::default(), &mut |_| {})?;
        println!("{}", peak_memory_kib()?);
        return Ok(ExitCode::SUCCESS);
    }
    let check = args.iter().any(|arg| arg == "--check");
    let gib: u64 = std::env::var("IMGDM_BENCH_GIB").map_or(Ok(64), |text| text.parse())?;
    ensure!(
        gib.is_power_of_two() && gib <= 1024,
        "IMGDM_BENCH_GIB has to be a power of two up to 1024"
    );
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let mut good = true;
    for (name, bits, order, goal) in [
        ("runs", 24, Order::Runs, RUNS_GOAL),
        ("shuffled", 14 + gib.trailing_zeros(), Order::Shuffled, SHUFFLED_GOAL),
    ] {
        let path = dir.path().join(format!("{name}.qcow2"));
        let image = Image::create(&path, bits, order, true)?;
        good &= measure(name, &image, goal)?;
        std::fs::remove_file(&path)?;
    }
    Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Whether the goals are met.
fn measure(name: &str, image: &Image, goal: f64) -> anyhow::Result<bool> {
    let (qemu_img, theirs) = run("qemu-img", image)?;
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let (time, mut ours) = run(IMGDM, image)?;
        if let Some(object) = ours.as_object_mut() {
            object.retain(|key, _| !key.starts_with("finding"));
        }
        ensure!(ours == theirs, "qemu-img says {theirs}, imgdm {ours}");
        times.push(time);
    }
    times.sort();
    let imgdm = times[ROUNDS / 2];
    let ratio = qemu_img.as_secs_f64() / imgdm.as_secs_f64();
    let memory = library_memory_mib(image)?;
    let memory_goal = ((image.clusters / 4) >> 20) + MEMORY_GOAL_MIB;
    println!(
        "check of {} clusters, {name} ({} GiB): qemu-img {:.2} s, imgdm {:.3} s: {ratio:.0} times as fast (goal {goal}), {memory} MiB (goal {memory_goal})",
        image.clusters,
        (image.clusters * image::CLUSTER) >> 30,
        qemu_img.as_secs_f64(),
        imgdm.as_secs_f64(),
    );
    let good = ratio >= goal && memory <= memory_goal;
    if !good {
        println!("{name} misses its goal");
    }
    Ok(good)
}

fn run(program: &str, image: &Image) -> anyhow::Result<(Duration, Value)> {
    let mut command = Command::new(program);
    command.args(["check", "--output=json"]).arg(&image.path);
    let start = Instant::now();
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {program}"))?;
    let time = start.elapsed();
    ensure!(output.status.success(), "{command:?}: {output:?}");
    Ok((time, serde_json::from_slice(&output.stdout)?))
}

/// The peak of a process that checks the image.
fn library_memory_mib(image: &Image) -> anyhow::Result<u64> {
    let output = Command::new(std::env::current_exe()?).arg("library").arg(&image.path).output()?;
    ensure!(output.status.success(), "{output:?}");
    let kib: u64 = String::from_utf8(output.stdout)?.trim().parse()?;
    Ok(kib.div_ceil(1024))
}

/// This process's.
fn peak_memory_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.context("no VmHWM in /proc/self/status")?.parse()?)
}
