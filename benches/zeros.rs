//! What zeros are best served by: dm-zero, or a loop device of zeros, by the length of the
//! run; and whether a hole between data of one file is best run through.
//!
//! ```text
//! cargo bench --bench zeros
//! ```
//!
//! In a User-Mode Linux guest (`tests/guest/run`), on disks of 256 MiB in which runs of data
//! and of zeros alternate: qcow2 images attached with `--zero=dm` and `--zero=loop`, and raw
//! files with holes attached as by default and with `--zero=loop`. What counts is the median
//! of the ratios within one turn; more than 1: dm-zero, or the hole, is faster. The default
//! threshold (`DEFAULT_ZERO_THRESHOLD`) was chosen by it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

#[path = "common/fio.rs"]
mod fio;
#[path = "common/guest.rs"]
mod guest;
#[path = "common/image.rs"]
#[allow(dead_code)] // Other benches use the rest.
mod image;
#[path = "common/layers.rs"]
mod layers;
#[path = "common/process.rs"]
mod process;

use fio::{Job, Line, median};
use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const CLUSTERS: u64 = 1 << 12;
const BYTES: u64 = CLUSTERS * image::CLUSTER;
const ROUNDS: usize = 3;
/// Lengths of the runs, in clusters of 64 KiB.
const RUNS: [u64; 6] = [1, 4, 16, 64, 256, 1024];
const HOLES: [u64; 3] = [1, 4, 8];
const LINES: [Line; 4] = [
    Line { random: false, block_kib: 64, depth: 1, direct: false },
    Line { random: true, block_kib: 4, depth: 1, direct: false },
    Line { random: false, block_kib: 1024, depth: 1, direct: true },
    Line { random: true, block_kib: 4, depth: 1, direct: true },
];

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["guest"] => return in_the_guest().map(|()| ExitCode::SUCCESS),
        // No goal to check: it is there to choose by.
        [] | ["--check"] => {}
        _ => bail!("unknown arguments: {args:?}"),
    }
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let (files, disk) = (dir.path().join("files"), dir.path().join("disk"));
    std::fs::create_dir(&files)?;
    for run in RUNS {
        let mut hosts = 0..;
        let host = |cluster| if is_zero(cluster, run) { None } else { hosts.next() };
        let hosts: Vec<_> = (0..CLUSTERS).map(host).collect();
        layers::write_layer(&files.join(format!("{run}.qcow2")), &hosts, None)?;
    }
    for run in HOLES {
        let file = files.join(format!("{run}.raw"));
        layers::write_raw(&file, CLUSTERS, |cluster| is_zero(cluster, run))?;
    }
    guest::make_disk(&files, &disk, 2 << 10)?;
    guest::run_in_guest(&disk, "2G", &[])
}

fn is_zero(cluster: u64, run: u64) -> bool {
    cluster / run % 2 == 1
}

/// An image attached in two ways that are compared.
struct Pair {
    run: u64,
    devices: [PathBuf; 2],
}

fn in_the_guest() -> anyhow::Result<()> {
    let place = guest::mount_disk()?;
    let attach = |run: u64, format: &str, modes: [&str; 2]| -> anyhow::Result<Pair> {
        let mut devices = Vec::new();
        for mode in modes {
            let name = format!("{format}-{run}-{mode}");
            let mut attach = Command::new(IMGDM);
            attach.arg("attach").arg(format!("--zero={mode}")).args(["--format", format, "--name"]);
            process::run(attach.arg(&name).arg(place.join(format!("{run}.{format}"))))?;
            devices.push(Path::new("/dev/mapper").join(name));
        }
        let devices: [PathBuf; 2] = devices.try_into().ok().context("not two devices")?;
        process::run(Command::new("cmp").args(&devices))?;
        Ok(Pair { run, devices })
    };
    let runs = RUNS.map(|run| attach(run, "qcow2", ["dm", "loop"]));
    let holes = HOLES.map(|run| attach(run, "raw", ["auto", "loop"]));
    let runs: Vec<_> = runs.into_iter().collect::<anyhow::Result<_>>()?;
    let holes: Vec<_> = holes.into_iter().collect::<anyhow::Result<_>>()?;
    print_table("dm-zero / loop device of zeros", &runs)?;
    print_table("through the hole / loop device of zeros", &holes)?;
    for device in runs.iter().chain(&holes).flat_map(|pair| &pair.devices) {
        run(Command::new(IMGDM).arg("detach").arg(device))?;
    }
    guest::unmount_disk()
}

fn print_table(what: &str, pairs: &[Pair]) -> anyhow::Result<()> {
    println!("\n| {what}: runs of |{}", LINES.map(|line| format!(" {line} |")).concat());
    println!("|---|{}", "---:|".repeat(LINES.len()));
    let mut rows: Vec<String> =
        pairs.iter().map(|pair| format!("| {} KiB |", pair.run * image::CLUSTER / 1024)).collect();
    for line in LINES {
        let devices = || pairs.iter().flat_map(|pair| &pair.devices);
        let jobs: Vec<_> = (0..ROUNDS)
            .flat_map(|_| devices())
            .map(|device| Job { device, drop_caches: true })
            .collect();
        let speeds = fio::read(line, BYTES, &jobs)?;
        for (index, row) in rows.iter_mut().enumerate() {
            let in_round = speeds.chunks(pairs.len() * 2);
            let ratios: Vec<_> = in_round.map(|all| all[index * 2] / all[index * 2 + 1]).collect();
            *row += &format!(" {:.2} |", median(&ratios));
        }
    }
    rows.iter().for_each(|row| println!("{row}"));
    Ok(())
}
