//! How long attaching a compressed image takes whose kept file is used again, as a ratio
//! to attaching the same content uncompressed.
//!
//! ```text
//! cargo bench --bench attach               prints the figures
//! cargo bench --bench attach -- --check    and fails where the goal is missed
//! ```
//!
//! It makes 2 GiB (`IMGDM_BENCH_MIB`: another number of MiB) of what lies under /usr, and
//! qcow2 images of it without and with compression, on an ext4 disk of a User-Mode Linux
//! guest (`tests/guest/run`), which has device-mapper whatever this machine's kernel has.
//! In the guest both are attached and detached in turn, the caches warm for both; what
//! counts is the median of the time from the start of `imgdm attach` to its end, when the
//! device is ready. Before that the two devices are compared.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};

#[path = "common/content.rs"]
mod content;
#[path = "common/process.rs"]
mod process;

use process::run;

const IMGDM: &str = env!("CARGO_BIN_EXE_imgdm");
const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/run");
const ROUNDS: usize = 21;
const RATIO_GOAL: f64 = 1.2;
const PLAIN: &str = "plain.qcow2";
const COMPRESSED: &str = "compressed.qcow2";

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let check = args.iter().any(|arg| arg == "--check");
    if args.first().is_some_and(|arg| arg == "guest") {
        let good = in_the_guest()?;
        return Ok(if check && !good { ExitCode::FAILURE } else { ExitCode::SUCCESS });
    }
    let mib = std::env::var("IMGDM_BENCH_MIB").map_or(Ok(2048), |text| text.parse::<u64>())?;
    let dir = tempfile::tempdir().context("cannot make a directory under TMPDIR")?;
    let (raw, files) = (dir.path().join("content.raw"), dir.path().join("files"));
    content::make_content(&raw, mib << 20)?;
    std::fs::create_dir(&files)?;
    for (name, more) in [(PLAIN, None), (COMPRESSED, Some("-c"))] {
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", "qcow2"]).args(more);
        run(convert.args([&raw, &files.join(name)]))?;
    }
    std::fs::remove_file(raw)?;
    // The images, and the kept files beside them.
    let disk = dir.path().join("disk");
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "-d"]).arg(&files).arg(&disk);
    run(mkfs.arg(format!("{}M", 3 * mib + 256)))?;
    std::fs::remove_dir_all(files)?;

    let mut guest = Command::new(GUEST);
    guest.args(["--mem=2G", "--timeout=1800"]).arg(format!("--disk={}", disk.display()));
    guest.arg("--").arg(std::env::current_exe()?).arg("guest").args(args);
    let status = guest.stdin(Stdio::null()).status().context("cannot start a guest")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, Into::into))
}

/// All that happens in the guest; says whether the goal is reached.
fn in_the_guest() -> anyhow::Result<bool> {
    let place = Path::new("/run/bench");
    std::fs::create_dir_all(place)?;
    run(Command::new("mount").arg("/dev/ubda").arg(place))?;
    let plain = Image { path: place.join(PLAIN), cache: None };
    let cached = Image { path: place.join(COMPRESSED), cache: Some(place.join("cache")) };
    let good = compare(&plain, &cached)?;
    run(Command::new("umount").arg(place))?;
    Ok(good)
}

fn compare(plain: &Image, cached: &Image) -> anyhow::Result<bool> {
    let filling = cached.attach()?;
    plain.attach()?;
    run(Command::new("cmp").args([plain.device(), cached.device()]))?;
    let kept = cached.kept_inode()?;
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (image, times) in [plain, cached].into_iter().zip(&mut times) {
            image.detach()?;
            times.push(image.attach()?);
        }
    }
    plain.detach()?;
    cached.detach()?;
    ensure!(cached.kept_inode()? == kept, "the kept file was not used again");
    let [plain, cached] = times.map(|mut times| {
        times.sort();
        times[ROUNDS / 2].as_secs_f64()
    });
    let ratio = cached / plain;
    println!(
        "attach: uncompressed {plain:.4} s, inflating {:.1} s, from the cache {cached:.4} s: {ratio:.2} times as long as uncompressed (goal {RATIO_GOAL})",
        filling.as_secs_f64()
    );
    if ratio > RATIO_GOAL {
        println!("attach misses its goal");
    }
    Ok(ratio <= RATIO_GOAL)
}

/// An image in the guest, attached from its kept file where it has a cache.
struct Image {
    path: PathBuf,
    cache: Option<PathBuf>,
}

impl Image {
    fn device(&self) -> PathBuf {
        Path::new("/dev/mapper").join(self.path.file_stem().unwrap_or_default())
    }

    /// How long it took.
    fn attach(&self) -> anyhow::Result<Duration> {
        let mut attach = Command::new(IMGDM);
        attach.arg("attach");
        if let Some(cache) = &self.cache {
            attach.args(["--compressed=cache", "--cache-dir"]).arg(cache);
        }
        run(attach.arg(&self.path))
    }

    fn detach(&self) -> anyhow::Result<()> {
        run(Command::new(IMGDM).arg("detach").arg(self.device()))?;
        Ok(())
    }

    /// Which file is kept: another one where it was made anew.
    fn kept_inode(&self) -> anyhow::Result<u64> {
        let directory = self.cache.as_ref().context("nothing is kept")?;
        let mut entries = std::fs::read_dir(directory)?;
        let kept = entries.next().context("no file is kept")??;
        Ok(kept.metadata()?.ino())
    }
}
