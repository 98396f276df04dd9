//! How fast a compressed image is inflated, as a ratio to `qemu-img convert`.
//!
//! ```text
//! cargo bench --bench inflate               prints the figures
//! cargo bench --bench inflate -- --check    and fails where a goal is missed
//! ```
//!
//! It fills 2 GiB (`IMGDM_BENCH_MIB`: another number of MiB) with what lies under /usr,
//! but for what does not compress, and makes qcow2 images of it under `TMPDIR` whose
//! clusters are all compressed, by zlib and by zstd. Then, several times in turn, median:
//! `qemu-img convert -O raw -m 16 -W` of the image to a file beside it, against a process
//! that opens the image and fills a scratch file in the same directory. Whether both gave
//! the same bytes is checked once. TMPDIR has to have room for three times the size.
//!
//! Let nothing else run meanwhile: both use all cores. The peak memory is that of the
//! whole process (`VmHWM`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use imgdm::chain::Chain;
use imgdm::open::{OpenPolicy, open_chain};
use imgdm::scratch::{FillOptions, OnError, ScratchPlace, ScratchWork, fill};

#[path = "../tests/common/chain_work.rs"]
mod chain_work;
#[path = "common/content.rs"]
mod content;

use chain_work::ChainWork;
use content::{CLUSTER, make_content};

const ROUNDS: usize = 5;
const RATIO_GOAL: f64 = 1.5;
const MEMORY_GOAL_MIB: u64 = 128;

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, image, directory] = &args[..]
        && command == "fill"
    {
        fill_once(Path::new(image), Path::new(directory), None)?;
        println!("{}", peak_memory_kib()?);
        return Ok(ExitCode::SUCCESS);
    }
    let check = args.iter().any(|arg| arg == "--check");
    let mib = std::env::var("IMGDM_BENCH_MIB").map_or(Ok(2048), |text| text.parse())?;
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let raw = dir.path().join("content.raw");
    make_content(&raw, mib << 20)?;

    let mut good = true;
    for method in ["zlib", "zstd"] {
        let image = dir.path().join(format!("{method}.qcow2"));
        let option = format!("compression_type={method}");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-c", "-O", "qcow2", "-o", &option]).args([&raw, &image]);
        run(&mut convert)?;
        let share = fill_once(&image, dir.path(), Some(&raw))?;
        good &= compare(method, &image, dir.path(), share)?;
    }
    Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Times both in turn, and says whether the goals are reached.
fn compare(method: &str, image: &Path, dir: &Path, share: f64) -> anyhow::Result<bool> {
    let copy = dir.join("copy.raw");
    let mut times = [Vec::new(), Vec::new()];
    let mut peak_kib = 0;
    for _ in 0..ROUNDS {
        let mut qemu_img = Command::new("qemu-img");
        qemu_img.args(["convert", "-O", "raw", "-m", "16", "-W"]).args([image, &copy]);
        nix::unistd::sync();
        times[0].push(run(&mut qemu_img)?.0);
        std::fs::remove_file(&copy)?;

        let mut ours = Command::new(std::env::current_exe()?);
        ours.arg("fill").args([image, dir]);
        nix::unistd::sync();
        let (time, printed) = run(&mut ours)?;
        times[1].push(time);
        peak_kib = peak_kib.max(printed.trim().parse()?);
    }
    let [qemu_img, ours] = times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2].as_secs_f64()
    });
    let (ratio, peak_mib) = (qemu_img / ours, u64::div_ceil(peak_kib, 1024));
    println!(
        "{method}, {:.0} % compressed clusters: qemu-img {qemu_img:.3} s, imgdm {ours:.3} s: {ratio:.2} times as fast (goal {RATIO_GOAL}), {peak_mib} MiB (goal {MEMORY_GOAL_MIB})",
        share * 100.0
    );
    let good = ratio >= RATIO_GOAL && peak_mib <= MEMORY_GOAL_MIB;
    if !good {
        println!("{method} misses its goal");
    }
    Ok(good)
}

/// Inflates an image to a scratch file; compares the pieces with those of `expected`, and
/// gives their share of the disk.
fn fill_once(image: &Path, directory: &Path, expected: Option<&Path>) -> anyhow::Result<f64> {
    let opened = open_chain(image, &OpenPolicy::default())?;
    let work = ChainWork(&opened.chain);
    let file = ScratchPlace::choose(Some(directory))?.create()?;
    let options = FillOptions::new(directory, OnError::Refuse);
    fill(&opened.chain, &work, &file.writer, &options, &|_| Ok(()))?;
    match expected {
        Some(raw) => same_pieces(&opened.chain, &work, &file.reader, &File::open(raw)?),
        None => Ok(0.0),
    }
}

fn same_pieces(
    chain: &Chain,
    work: &dyn ScratchWork,
    scratch: &File,
    raw: &File,
) -> anyhow::Result<f64> {
    let mut bytes = 0;
    let mut differs = None;
    let [mut ours, mut theirs] = [vec![0; CLUSTER], vec![0; CLUSTER]];
    work.for_each_window(&mut |jobs| {
        for job in jobs {
            let length = usize::try_from(job.length).unwrap_or(CLUSTER);
            let read = scratch
                .read_exact_at(&mut ours[..length], job.at)
                .and_then(|()| raw.read_exact_at(&mut theirs[..length], job.guest.get()));
            if read.is_err() || ours[..length] != theirs[..length] {
                differs.get_or_insert(job.guest);
            }
            bytes += job.length;
        }
        Ok(())
    })?;
    if let Some(guest) = differs {
        bail!("what is inflated differs at {guest}");
    }
    #[allow(clippy::cast_precision_loss)]
    Ok(bytes as f64 / chain.virtual_size().get() as f64)
}

/// Runs a command: how long it took and what it printed.
fn run(command: &mut Command) -> anyhow::Result<(Duration, String)> {
    let start = Instant::now();
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    let time = start.elapsed();
    ensure!(output.status.success(), "{command:?}: {}", output.status);
    Ok((time, String::from_utf8(output.stdout)?))
}

/// The peak memory of this process.
fn peak_memory_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    Ok(kib.context("the kernel does not say VmHWM")?.parse()?)
}
