//! How fast a disk is hashed, as a ratio to the limit: reading a raw copy from start to end
//! and hashing it by sha256 on one thread, with the same crate.
//!
//! ```text
//! cargo bench --bench hash               prints the figures
//! cargo bench --bench hash -- --check    and fails where a goal is missed
//! ```
//!
//! It fills 1 GiB (`IMGDM_BENCH_MIB`: another number of MiB) with what lies under /usr and
//! compresses, under `TMPDIR`: as a raw file, in a qcow2, and in one whose clusters are all
//! compressed. All is in the page cache. Then, several times in turn, median: the plain
//! read, and each hash of each image. That all gave the same hash is checked.
//!
//! Let nothing else run meanwhile.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, ensure};
use imgdm::hash::Algorithm;
use imgdm::open::{OpenPolicy, open_chain};
use imgdm::read::Ciphers;
use sha2::Digest as _;

#[path = "common/content.rs"]
mod content;
#[path = "common/process.rs"]
mod process;

use content::make_content;
use process::run;

const ROUNDS: usize = 5;

/// sha256 alone of what takes no inflating is to be as fast as the limit, but for noise.
const GOAL: f64 = 0.95;

/// What is hashed at the same time.
const SETS: [(&str, &[Algorithm]); 3] = [
    ("sha256", &[Algorithm::Sha256]),
    ("blake3", &[Algorithm::Blake3]),
    ("both", &[Algorithm::Sha256, Algorithm::Blake3]),
];

fn main() -> anyhow::Result<ExitCode> {
    let check = std::env::args().any(|arg| arg == "--check");
    let mib: u64 = std::env::var("IMGDM_BENCH_MIB").map_or(Ok(1024), |text| text.parse())?;
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let raw = dir.path().join("content.raw");
    make_content(&raw, mib << 20)?;
    let mut images = vec![("raw", raw.clone())];
    for (kind, options) in [("qcow2", &[][..]), ("compressed", &["-c"][..])] {
        let image = dir.path().join(format!("{kind}.qcow2"));
        let mut convert = Command::new("qemu-img");
        run(convert.args(["convert", "-O", "qcow2"]).args(options).args([&raw, &image]))?;
        images.push((kind, image));
    }

    let mut good = true;
    for (kind, image) in &images {
        let mut plain = Vec::new();
        let mut ours = vec![Vec::new(); SETS.len()];
        for _ in 0..ROUNDS {
            let start = Instant::now();
            let expected = plain_sha256(&raw)?;
            plain.push(start.elapsed().as_secs_f64());
            for ((_, set), times) in SETS.iter().zip(&mut ours) {
                let start = Instant::now();
                let sha256 = hash(image, set)?;
                times.push(start.elapsed().as_secs_f64());
                ensure!(sha256.is_none_or(|hash| hash == expected), "{kind}: another hash");
            }
        }
        let plain = median(plain);
        for ((name, _), times) in SETS.iter().zip(ours) {
            let time = median(times);
            let ratio = plain / time;
            let has_goal = *name == "sha256" && *kind != "compressed";
            let goal = if has_goal { format!(" (goal {GOAL})") } else { String::new() };
            println!(
                "{kind:<10} {name:<6} {time:.3} s, the limit {plain:.3} s: {ratio:.2} times as fast{goal}"
            );
            good &= !has_goal || ratio >= GOAL;
        }
    }
    Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The limit: one thread that reads and hashes.
fn plain_sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut hash = sha2::Sha256::new();
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Opens and hashes a disk; gives its sha256, where that is among `algorithms`.
fn hash(image: &Path, algorithms: &[Algorithm]) -> anyhow::Result<Option<String>> {
    let opened = open_chain(image, &OpenPolicy::default())?;
    let algorithms: BTreeSet<Algorithm> = algorithms.iter().copied().collect();
    let digests = opened.chain.hash(&Ciphers::new(), &algorithms, &|_| Ok(()))?;
    Ok(digests.get(&Algorithm::Sha256).map(ToString::to_string))
}
