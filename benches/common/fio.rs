//! fio, on several devices in turn.

use std::fmt::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// The way a line reads.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Line {
    pub(crate) random: bool,
    pub(crate) block_kib: u64,
    pub(crate) depth: u32,
    pub(crate) direct: bool,
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let block = match self.block_kib {
            kib if kib >= 1024 => format!("{} MiB", kib / 1024),
            kib => format!("{kib} KiB"),
        };
        let order = if self.random { "random" } else { "sequential" };
        let cache = if self.direct { "direct" } else { "buffered" };
        write!(f, "{block} {order}, depth {}, {cache}", self.depth)
    }
}

/// One read of a device: all of it once, or as far as it comes in time.
#[derive(Clone, Debug)]
pub(crate) struct Job<'a> {
    pub(crate) device: &'a Path,
    /// Whether the guest's page cache is emptied before.
    pub(crate) drop_caches: bool,
}

/// Longest that one read takes.
const TIME: &str = "400ms";

/// Reads devices one after the other, and gives what each gave, in MiB a second.
pub(crate) fn read(line: Line, bytes: u64, jobs: &[Job<'_>]) -> anyhow::Result<Vec<f64>> {
    let mut text = String::from("[global]\n");
    let engine = match (line.depth, line.direct) {
        (1, _) => "psync",
        (_, true) => "libaio",
        // The one that has more than one read under way through the page cache too.
        (_, false) => "io_uring",
    };
    let order = if line.random { "randread" } else { "read" };
    writeln!(text, "ioengine={engine}\niodepth={}\nrw={order}", line.depth)?;
    writeln!(text, "bs={}k\nsize={bytes}\ndirect={}", line.block_kib, u8::from(line.direct))?;
    // The clock is a slow system call in the guest: it is not asked for latencies. Nor are
    // the statistics of the devices below, of which there may be a thousand.
    writeln!(text, "runtime={TIME}\nthread\nstonewall\ngtod_reduce=1\ndisk_util=0")?;
    for (index, job) in jobs.iter().enumerate() {
        writeln!(text, "[{index}]\nfilename={}", job.device.display())?;
        if job.drop_caches {
            // fio appends a redirection of its own.
            writeln!(text, "exec_prerun=(echo 1 >/proc/sys/vm/drop_caches)")?;
        }
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("jobs");
    std::fs::write(&file, text)?;
    let output = Command::new("fio")
        .args(["--readonly", "--output-format=json", "--eta=never"])
        .arg(&file)
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output()
        .context("cannot start fio")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "fio: {}: {errors}", output.status);
    let start =
        output.stdout.iter().position(|&byte| byte == b'{').context("fio prints no JSON")?;
    let report: Report = serde_json::from_slice(&output.stdout[start..])?;
    let of = |index: usize| {
        let name = index.to_string();
        let job = report.jobs.iter().find(|job| job.jobname == name);
        let job = job.with_context(|| format!("fio says nothing of job {index}: {errors}"))?;
        ensure!(job.error == 0, "fio: job {index}: error {}: {errors}", job.error);
        ensure!(job.read.bw_bytes > 0, "fio: job {index} has read nothing: {errors}");
        Ok(job.read.bw_bytes as f64 / f64::from(1 << 20))
    };
    (0..jobs.len()).map(of).collect()
}

#[derive(serde::Deserialize)]
struct Report {
    jobs: Vec<JobReport>,
}

#[derive(serde::Deserialize)]
struct JobReport {
    jobname: String,
    error: i32,
    read: ReadReport,
}

#[derive(serde::Deserialize)]
struct ReadReport {
    bw_bytes: u64,
}

/// The one in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
