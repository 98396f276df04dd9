//! How fast imgdm's devices are read, beside the loop device of a raw copy, which is the
//! limit, devices of dm-linear segments over that, and qemu-nbd of the same images.
//!
//! ```text
//! cargo bench --bench datapath                         prints the tables
//! cargo bench --bench datapath -- --check              and fails where a goal is missed
//! cargo bench --bench datapath -- --lines='4 KiB' --images=fragmented --rounds=9 --no-nbd
//! ```
//!
//! It makes images of 256 MiB (1.6 GiB on an ext4 disk of a User-Mode Linux guest,
//! `tests/guest/run`), attaches all of them there, compares each with its raw copy, and then
//! has fio read them: each line of the tables with every device in turn, several times
//! over; what counts is the median, for ratios of those within one turn. Before each read
//! the guest's page cache is emptied; the disk's file is in the host's, so that no real disk
//! is in the way. It takes ten minutes, and wants the machine for itself.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail, ensure};

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
const CLUSTER_BITS: u32 = 12;
const CLUSTERS: u64 = 1 << CLUSTER_BITS;
const BYTES: u64 = CLUSTERS * image::CLUSTER;
const DEEP: u64 = 1000;
const DEEPEST: &str = "thousand-deep";
const ROUNDS: usize = 5;
/// Of those that have no goal, or are far from it.
const FEWER_ROUNDS: usize = 2;
const LIMIT_GOAL: f64 = 0.9;
const NBD_GOAL: f64 = 3.0;

/// One of the images.
struct Image {
    name: &'static str,
    what: &'static str,
    /// Its raw copy.
    raw: &'static str,
}

const IMAGES: [Image; 5] = [
    Image { name: "sequential", what: "qcow2, clusters in the disk's order", raw: "full.raw" },
    Image { name: "fragmented", what: "qcow2, 4096 clusters shuffled", raw: "full.raw" },
    Image { name: "half-zero", what: "qcow2, every other cluster zero", raw: "half.raw" },
    Image {
        name: "five-deep",
        what: "a chain of 5 layers, each cluster in any of them",
        raw: "full.raw",
    },
    Image {
        name: DEEPEST,
        what: "a chain of 1000 layers, each cluster in any of them",
        raw: "full.raw",
    },
];

/// How qemu-nbd reads the images.
struct NbdMode {
    what: &'static str,
    args: [&'static str; 2],
}

const NBD_MODES: [NbdMode; 3] = [
    NbdMode { what: "none, native", args: ["--cache=none", "--aio=native"] },
    NbdMode { what: "none, io_uring", args: ["--cache=none", "--aio=io_uring"] },
    NbdMode { what: "writeback", args: ["--cache=writeback", "--aio=threads"] },
];

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let options = Options::parse(&args)?;
    if options.in_guest {
        let good = in_the_guest(&options)?;
        let failed = options.check && !good;
        return Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let (files, disk) = (dir.path().join("files"), dir.path().join("disk"));
    std::fs::create_dir(&files)?;
    make_images(&files, &options)?;
    guest::make_disk(&files, &disk, 3 << 10)?;
    guest::run_in_guest(&disk, "2G", &args)
}

struct Options {
    in_guest: bool,
    check: bool,
    nbd: bool,
    /// How the names of the lines start that are wanted.
    lines: String,
    images: Vec<&'static Image>,
    rounds: usize,
}

impl Options {
    fn parse(args: &[String]) -> anyhow::Result<Self> {
        let mut options = Self {
            in_guest: false,
            check: false,
            nbd: true,
            lines: String::new(),
            images: IMAGES.iter().collect(),
            rounds: ROUNDS,
        };
        for arg in args {
            match arg.split_once('=').unwrap_or((arg, "")) {
                // cargo bench's own.
                ("--bench", _) => {}
                ("guest", _) => options.in_guest = true,
                ("--check", _) => options.check = true,
                ("--no-nbd", _) => options.nbd = false,
                ("--lines", lines) => options.lines = lines.to_owned(),
                ("--rounds", rounds) => options.rounds = rounds.parse()?,
                ("--images", names) => {
                    options.images.retain(|image| names.split(',').any(|name| name == image.name));
                }
                _ => bail!("unknown argument {arg}"),
            }
        }
        Ok(options)
    }

    fn wants(&self, name: &str) -> bool {
        self.images.iter().any(|image| image.name == name)
    }
}

/// The images and their raw copies.
fn make_images(files: &Path, options: &Options) -> anyhow::Result<()> {
    let path = |name: &str| files.join(format!("{name}.qcow2"));
    layers::write_raw(&files.join("full.raw"), CLUSTERS, |_| false)?;
    if options.wants("sequential") {
        let hosts: Vec<_> = (0..CLUSTERS).map(Some).collect();
        layers::write_layer(&path("sequential"), &hosts, None)?;
    }
    if options.wants("fragmented") {
        let hosts: Vec<_> =
            (0..CLUSTERS).map(|cluster| Some(image::shuffled(cluster, CLUSTER_BITS))).collect();
        layers::write_layer(&path("fragmented"), &hosts, None)?;
    }
    if options.wants("half-zero") {
        let is_zero = |cluster: u64| cluster % 2 == 1;
        let hosts: Vec<_> =
            (0..CLUSTERS).map(|cluster| (!is_zero(cluster)).then_some(cluster / 2)).collect();
        layers::write_layer(&path("half-zero"), &hosts, None)?;
        layers::write_raw(&files.join("half.raw"), CLUSTERS, is_zero)?;
    }
    for (name, depth) in [("five-deep", 5), (DEEPEST, DEEP)] {
        if options.wants(name) {
            make_chain(files, name, depth)?;
        }
    }
    Ok(())
}

/// A chain each of whose clusters lies in any one of the layers.
fn make_chain(files: &Path, name: &str, depth: u64) -> anyhow::Result<()> {
    let layer_name = |layer: u64| match layer + 1 {
        top if top == depth => format!("{name}.qcow2"),
        below => format!("{name}-{below}.qcow2"),
    };
    for layer in 0..depth {
        let mut next = 0..;
        let host = |cluster| {
            let holder = image::shuffled(cluster, CLUSTER_BITS) % depth;
            (holder == layer).then(|| next.next()).flatten()
        };
        let hosts: Vec<_> = (0..CLUSTERS).map(host).collect();
        let below = layer.checked_sub(1).map(layer_name);
        layers::write_layer(&files.join(layer_name(layer)), &hosts, below.as_deref())?;
    }
    Ok(())
}

/// Every line of the tables.
fn lines() -> impl Iterator<Item = Line> {
    let patterns = [(true, 4), (false, 4), (false, 64), (false, 1024)];
    let caches = [true, false];
    let depths = [1, 16];
    caches.into_iter().flat_map(move |direct| {
        patterns.into_iter().flat_map(move |(random, block_kib)| {
            depths.map(|depth| Line { random, block_kib, depth, direct })
        })
    })
}

/// What reads an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// The loop device of its raw copy, around the page cache as imgdm's own: the limit.
    Loop,
    /// The same through the page cache, as losetup sets it up.
    LoopCached,
    /// A device of one dm-linear segment over the limit: what device-mapper costs by itself.
    Linear,
    /// A device of a segment for each cluster of the limit, shuffled as those of the fragmented
    /// image are: what any table of so many pieces costs.
    LinearCut,
    Imgdm,
    /// By index of the mode.
    Nbd(usize),
}

struct Contestant {
    by: By,
    /// Of `Options::images`; of a raw copy, all that it is one of.
    images: Vec<usize>,
    device: PathBuf,
}

/// All that happens in the guest; says whether the goals are reached.
fn in_the_guest(options: &Options) -> anyhow::Result<bool> {
    let place = guest::mount_disk()?;
    let contestants = set_up(place, options)?;
    let all: Vec<_> = lines().filter(|l| l.to_string().starts_with(&options.lines)).collect();
    let mut results = Vec::new();
    for (index, &line) in all.iter().enumerate() {
        eprintln!("{} of {}: {line}", index + 1, all.len());
        results.push((line, measure(line, &contestants, options)?));
    }
    let good = report(options, &contestants, &results);
    take_down(&contestants)?;
    guest::unmount_disk()?;
    Ok(good)
}

/// Attaches everything, and compares it.
fn set_up(place: &Path, options: &Options) -> anyhow::Result<Vec<Contestant>> {
    let mut contestants: Vec<Contestant> = Vec::new();
    let mut raws: Vec<&str> = options.images.iter().map(|image| image.raw).collect();
    raws.sort_unstable();
    raws.dedup();
    for raw in raws {
        for (by, direct_io) in [(By::Loop, "on"), (By::LoopCached, "off")] {
            let of = |(index, image): (usize, &&Image)| (image.raw == raw).then_some(index);
            let images = options.images.iter().enumerate().filter_map(of).collect();
            let device = bind_loop(&place.join(raw), direct_io)?;
            contestants.push(Contestant { by, images, device });
        }
        let limit = contestants.iter().rev().find(|each| each.by == By::Loop);
        let limit = limit.context("a raw copy without a loop device")?;
        let (limit, images) = (limit.device.clone(), limit.images.clone());
        for (by, name, segments) in
            [(By::Linear, "linear", 1), (By::LinearCut, "linear-cut", CLUSTERS)]
        {
            let name = format!("{name}-{raw}");
            let table = place.join("table");
            std::fs::write(&table, linear_table(&limit, segments))?;
            run(Command::new("dmsetup").args(["create", &name, "--readonly"]).arg(table))?;
            let device = Path::new("/dev/mapper").join(name);
            contestants.push(Contestant { by, images: images.clone(), device });
        }
    }
    for (index, image) in options.images.iter().enumerate() {
        run(Command::new(IMGDM).arg("attach").arg(qcow2(place, image)))?;
        let device = Path::new("/dev/mapper").join(image.name);
        let raw = contestants.iter().find(|each| each.images.contains(&index));
        let raw = raw.context("an image without a raw copy")?;
        run(Command::new("cmp").args([&raw.device, &device]))?;
        contestants.push(Contestant { by: By::Imgdm, images: vec![index], device });
    }
    if !options.nbd {
        return Ok(contestants);
    }
    run(Command::new("modprobe").arg("nbd"))?;
    // For qemu-nbd's own lock.
    std::fs::create_dir_all("/run/lock")?;
    let mut next = 0;
    for (index, image) in options.images.iter().enumerate() {
        if image.name == DEEPEST {
            println!("qemu-nbd of the {DEEPEST} image is left out: it fails reads with EIO");
            continue;
        }
        for (mode, NbdMode { what, args }) in NBD_MODES.iter().enumerate() {
            let device = PathBuf::from(format!("/dev/nbd{next}"));
            let mut command = Command::new("qemu-nbd");
            command.args(["-r", "-f", "qcow2", "-c"]).arg(&device).args(args);
            if let Err(error) = run(command.arg(qcow2(place, image))) {
                println!("qemu-nbd ({what}) of the {} image does not start: {error}", image.name);
                continue;
            }
            next += 1;
            contestants.push(Contestant { by: By::Nbd(mode), images: vec![index], device });
        }
    }
    Ok(contestants)
}

/// The lines of a table of so many segments, a power of two, of the same length.
fn linear_table(device: &Path, segments: u64) -> String {
    let (length, device) = (BYTES / 512 / segments, device.display());
    let place = |segment| image::shuffled(segment, segments.trailing_zeros()) * length;
    let line =
        |segment| format!("{} {length} linear {device} {}\n", segment * length, place(segment));
    (0..segments).map(line).collect()
}

fn qcow2(place: &Path, image: &Image) -> PathBuf {
    place.join(format!("{}.qcow2", image.name))
}

fn bind_loop(file: &Path, direct_io: &str) -> anyhow::Result<PathBuf> {
    let mut losetup = Command::new("losetup");
    losetup.args(["-r", "-f", "--show"]).arg(format!("--direct-io={direct_io}")).arg(file);
    let output = losetup.output()?;
    ensure!(output.status.success(), "losetup: {}", output.status);
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

fn take_down(contestants: &[Contestant]) -> anyhow::Result<()> {
    // The limits after what lies on them.
    let (last, first): (Vec<_>, Vec<_>) = contestants.iter().partition(|each| each.by == By::Loop);
    for Contestant { by, device, .. } in first.into_iter().chain(last) {
        match by {
            By::Linear | By::LinearCut => run(Command::new("dmsetup").arg("remove").arg(device))?,
            By::Loop | By::LoopCached => run(Command::new("losetup").arg("-d").arg(device))?,
            By::Imgdm => run(Command::new(IMGDM).arg("detach").arg(device))?,
            By::Nbd(_) => run(Command::new("qemu-nbd").arg("-d").arg(device))?,
        };
    }
    Ok(())
}

/// What each contestant gave in each round, in MiB a second.
fn measure(
    line: Line,
    contestants: &[Contestant],
    options: &Options,
) -> anyhow::Result<Vec<Vec<f64>>> {
    let rounds_of = |by| match by {
        By::Loop | By::Linear | By::LinearCut | By::Imgdm => options.rounds,
        _ if line.random => options.rounds.min(FEWER_ROUNDS),
        _ => 1,
    };
    // What is read first in a round is a tenth and more faster: each takes other places in other
    // rounds.
    let turns: Vec<_> = (0..options.rounds)
        .flat_map(|round| {
            let mut order: Vec<_> = (0..contestants.len())
                .filter(|&each| round < rounds_of(contestants[each].by))
                .collect();
            let places = order.len() * round / options.rounds;
            order.rotate_left(places);
            order
        })
        .collect();
    let job = |&each: &usize| Job { device: &contestants[each].device, drop_caches: true };
    let jobs: Vec<_> = turns.iter().map(job).collect();
    let mut results = vec![Vec::new(); contestants.len()];
    for (&each, result) in turns.iter().zip(fio::read(line, BYTES, &jobs)?) {
        results[each].push(result);
    }
    Ok(results)
}

/// Prints a table for each image, and what is below a goal.
fn report(
    options: &Options,
    contestants: &[Contestant],
    results: &[(Line, Vec<Vec<f64>>)],
) -> bool {
    let mut missed = Vec::new();
    for (index, image) in options.images.iter().enumerate() {
        println!("\n### {}: {}\n", image.name, image.what);
        let mut modes: Vec<usize> = Vec::new();
        for each in contestants.iter().filter(|each| each.images.contains(&index)) {
            if let By::Nbd(mode) = each.by {
                modes.push(mode);
            }
        }
        let mut head =
            "| read | loop, MiB/s | imgdm | dm-linear | dm-linear, cut | loop (cached) |"
                .to_owned();
        for &mode in &modes {
            head += &format!(" nbd ({}) |", NBD_MODES[mode].what);
        }
        head += if modes.is_empty() { "" } else { " imgdm / best nbd |" };
        println!("{head}\n|---|{}", "---:|".repeat(head.matches('|').count() - 2));
        for (line, results) in results {
            let of = |by| {
                let found =
                    contestants.iter().position(|c| c.by == by && c.images.contains(&index));
                found.map(|each| results[each].as_slice()).unwrap_or_default()
            };
            let limit = of(By::Loop);
            // Both of one round: what else ran meanwhile slowed both.
            let ratio = |by| {
                let ratios: Vec<_> = of(by).iter().zip(limit).map(|(a, b)| a / b).collect();
                median(&ratios)
            };
            let imgdm = ratio(By::Imgdm);
            let [linear, cut, cached] = [By::Linear, By::LinearCut, By::LoopCached].map(ratio);
            let limit = median(limit);
            print!("| {line} | {limit:.0} | {imgdm:.2} | {linear:.2} | {cut:.2} | {cached:.2} |");
            if imgdm < LIMIT_GOAL {
                missed.push(format!("{}, {line}: {imgdm:.2} of the limit", image.name));
            }
            let mut best: f64 = 0.0;
            for &mode in &modes {
                let nbd = ratio(By::Nbd(mode));
                print!(" {nbd:.2} |");
                best = best.max(nbd);
            }
            if best > 0.0 {
                let times = imgdm / best;
                print!(" {times:.1} |");
                if line.random && times < NBD_GOAL {
                    missed.push(format!("{}, {line}: {times:.1} times qemu-nbd", image.name));
                }
            }
            println!();
        }
    }
    println!();
    for missed in &missed {
        println!(
            "below the goal ({LIMIT_GOAL} of the limit, {NBD_GOAL} times qemu-nbd at 4 KiB random): {missed}"
        );
    }
    missed.is_empty()
}
