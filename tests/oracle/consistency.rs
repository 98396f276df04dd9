//! `imgdm check` beside `qemu-img check`: the same numbers and the same kind of end, on
//! healthy images, on leaky ones, and on images with one damaged field each.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use imgdm::check::{Finding, Options, Report, Severity, check};
use imgdm::format::Format;
use imgdm::source::Source;
use serde_json::Value;

use crate::check::strings;
use crate::common::images::{MIXED, Recipe, Theme, scratch_dir};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::far::{create, write};
use crate::imgdm::imgdm;
use crate::random::run_theme;

/// What a check says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The image can't be opened, or QEMU gave up on the way: there are no numbers.
    Refused,
    /// The numbers, in the order of [`KEYS`].
    Numbers([u64; 8]),
}

const KEYS: [&str; 8] = [
    "check-errors",
    "corruptions",
    "leaks",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
];

impl Verdict {
    /// The exit status that goes with it.
    pub(crate) fn status(&self) -> i32 {
        match self {
            Self::Refused => 1,
            Self::Numbers([errors, ..]) if *errors > 0 => 1,
            Self::Numbers([_, corruptions, ..]) if *corruptions > 0 => 2,
            Self::Numbers([_, _, leaks, ..]) if *leaks > 0 => 3,
            Self::Numbers(_) => 0,
        }
    }

    fn of_json(json: &Value) -> Self {
        Self::Numbers(KEYS.map(|key| json[key].as_u64().unwrap_or(0)))
    }
}

/// The key that the images of the corruption test are encrypted by.
const SECRET: &str = "secret,id=key,data=imgdm";

/// What qemu-img says; `options` are the image's, where it needs any to be opened.
///
/// # Errors
/// It did something else than it says it does.
pub(crate) fn verdict_of_qemu(dir: &Path, file: &str, luks: bool) -> Outcome<(Verdict, String)> {
    let mut args = strings(&["check", "--output=json"]);
    if luks {
        args.extend(strings(&["--object", SECRET, "--image-opts"]));
        args.push(format!("driver=qcow2,encrypt.key-secret=key,file.filename={file}"));
    } else {
        args.extend(strings(&["-f", "qcow2", file]));
    }
    let ran = qemu::img_any(dir, &args)?;
    let verdict = match serde_json::from_slice::<Value>(&ran.stdout) {
        Ok(json) => Verdict::of_json(&json),
        Err(_) => Verdict::Refused,
    };
    if ran.code() != Some(verdict.status()) {
        return Err(format!("{verdict:?}, but:\n{}", ran.describe()));
    }
    Ok((verdict, ran.describe()))
}

/// What imgdm's library says, with all findings.
///
/// # Errors
/// It panicked, took too long, or its findings do not add up to its numbers.
pub(crate) fn verdict_of_imgdm(path: &Path) -> Outcome<(Verdict, Vec<Finding>)> {
    let start = Instant::now();
    let mut findings = Vec::new();
    let run = || -> imgdm::Result<Report> {
        let source = Source::open(path)?;
        let options = Options { findings_of_a_kind: None };
        check(&source, Format::Qcow2, options, &mut |finding| findings.push(finding))
    };
    let result = catch_unwind(AssertUnwindSafe(run)).map_err(|_| "imgdm panicked".to_owned())?;
    if start.elapsed() > Duration::from_secs(20) {
        return Err(format!("imgdm took {:?}", start.elapsed()));
    }
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            let offset = error.offset();
            let kind = imgdm::check::FindingKind::ReadError;
            let finding = Finding {
                kind,
                host: offset.map(imgdm::units::HostOffset::new),
                length: None,
                guest: None,
                place: None,
                count: 0,
                message: error.to_string(),
            };
            return Ok((Verdict::Refused, vec![finding]));
        }
    };
    for severity in [Severity::Error, Severity::Corruption, Severity::Leak, Severity::Notice] {
        let of = findings.iter().filter(|finding| finding.kind.severity() == severity);
        let sum: u64 = of.map(|finding| finding.count).sum();
        if sum != report.counts.of_severity(severity) {
            return Err(format!("{sum} findings of {severity:?}, but {report:?}"));
        }
    }
    if report.incomplete {
        return Ok((Verdict::Refused, findings));
    }
    let numbers = report.numbers;
    let verdict = Verdict::Numbers([
        report.check_errors(),
        report.corruptions(),
        report.leaks(),
        numbers.image_end_offset,
        numbers.total_clusters,
        numbers.allocated_clusters,
        numbers.fragmented_clusters,
        numbers.compressed_clusters,
    ]);
    Ok((verdict, findings))
}

/// Both, which have to say the same.
///
/// # Errors
/// They do not.
fn same_verdict(dir: &Path, file: &str) -> Outcome<Verdict> {
    let (theirs, said) = verdict_of_qemu(dir, file, false)?;
    let (ours, findings) = verdict_of_imgdm(&dir.join(file))?;
    if theirs == ours {
        return Ok(theirs);
    }
    Err(format!("qemu-img: {theirs:?}\nimgdm:    {ours:?}\n{findings:#?}\n{said}"))
}

/// The program's output beside qemu-img's: JSON, human, and exit status.
///
/// # Errors
/// They differ.
fn same_output(dir: &Path, file: &str) -> Outcome {
    let args = |output: &str| strings(&["check", output, "-f", "qcow2", file]);
    let theirs = qemu::img_any(dir, &args("--output=json"))?;
    let ours = imgdm(dir, &args("--output=json"))?;
    let parse = |ran: &crate::common::process::Ran| -> Outcome<Value> {
        serde_json::from_slice(&ran.stdout).map_err(|error| format!("{error}:\n{}", ran.describe()))
    };
    let (their_json, mut our_json) = (parse(&theirs)?, parse(&ours)?);
    let object = our_json.as_object_mut().ok_or("no object")?;
    let findings = object.remove("findings");
    object.remove("finding-counts");
    if their_json != our_json || theirs.code() != ours.code() {
        return Err(format!("{findings:?}\n{}\n{}", theirs.describe(), ours.describe()));
    }
    let theirs = qemu::img_any(dir, &args("--output=human"))?;
    let ours = imgdm(dir, &args("--output=human"))?;
    // Behind our findings come qemu-img's lines.
    let severities = ["error ", "corruption ", "leak ", "notice "];
    let lines: String = ours
        .text()
        .lines()
        .filter(|line| !severities.iter().any(|severity| line.starts_with(severity)))
        .filter(|line| !line.ends_with(" notices."))
        .flat_map(|line| [line, "\n"])
        .collect();
    if theirs.text() != lines || theirs.code() != ours.code() {
        return Err(format!("{}\n{}", theirs.describe(), ours.describe()));
    }
    Ok(())
}

/// All layers of a chain that qemu-img made without a fault.
fn healthy(dir: &Path, recipe: &Recipe, rng: &mut Rng) -> Outcome {
    for layer in &recipe.layers {
        match layer.format {
            "qcow2" => {
                // QEMU looks for a relative data file in its working directory.
                let verdict = same_verdict(dir, &layer.file)?;
                if verdict.status() != 0 {
                    return Err(format!("{verdict:?} of a healthy image {}", layer.file));
                }
                if rng.percent(20) {
                    same_output(dir, &layer.file)?;
                }
            }
            // For these qemu-img has no check, and says so with this status. imgdm checks
            // qcow, and has an exit status of 0 for a healthy one.
            format => {
                let args = strings(&["check", "-f", format, &layer.file]);
                let theirs = qemu::img_any(dir, &args)?;
                let ours = imgdm(dir, &args)?;
                let expected = if format == "qcow" { 0 } else { 63 };
                if theirs.code() != Some(63) || ours.code() != Some(expected) {
                    return Err(format!("{}\n{}", theirs.describe(), ours.describe()));
                }
            }
        }
    }
    Ok(())
}

macro_rules! healthy_themes {
    ($($name:ident: $cases:literal, $theme:expr;)*) => {
        $(#[test]
        fn $name() {
            run_theme(stringify!($name), $cases, &$theme, healthy);
        })*
    };
}

healthy_themes! {
    healthy_mixed: 60, MIXED;
    healthy_snapshots: 40, Theme {
        depth: (1, 2), raw_base: 0, qcow: 0, data_file: 0, snapshot: 100, bitmap: 40, ..MIXED
    };
    healthy_small_clusters: 30, Theme { depth: (1, 2), cluster_bits: (9, 12), bitmap: 30, ..MIXED };
    healthy_subclusters: 30, Theme {
        depth: (1, 2), cluster_bits: (14, 21), extended_l2: 100, qcow: 0, ..MIXED
    };
    healthy_data_files: 20, Theme { depth: (1, 2), data_file: 80, ..MIXED };
    healthy_preallocated: 20, Theme { depth: (1, 2), preallocation: 100, ..MIXED };
    healthy_compressed: 40, Theme {
        depth: (1, 2), raw_base: 0, qcow: 15, compressed: 70, cluster_bits: (13, 21), ..MIXED
    };
}

/// `qemu-img check` of images with every width of refcounts, with as many snapshots as fit.
#[test]
fn refcounts_of_every_width() {
    for bits in [1u64, 2, 4, 8, 16, 32, 64] {
        let dir = scratch_dir("widths").unwrap();
        let dir = dir.path();
        let width = format!("refcount_bits={bits}");
        let options = ["cluster_size=4k", &width];
        let steps = [
            create("x.qcow2", "qcow2", &options, None, 8 << 20),
            write("x.qcow2", "qcow2", &[(0, 1 << 20), (5 << 20, 300 << 10)]),
        ];
        for step in &steps {
            let recipe = Recipe { steps: vec![step.clone()], ..Recipe::default() };
            recipe.make(dir).unwrap();
        }
        // 1 bit has no room for a snapshot, 2 bits for two, 4 for 14.
        for snapshot in 0..[0, 2, 14, 20][bits.ilog2().min(3) as usize] {
            let name = format!("s{snapshot}");
            qemu::img(dir, &["snapshot", "-c", &name, "x.qcow2"]).unwrap();
            let at = format!("write {}k 64k", 256 + snapshot * 32);
            qemu::io(dir, "qcow2", "x.qcow2", &[at]).unwrap();
        }
        let verdict = same_verdict(dir, "x.qcow2").unwrap();
        assert_eq!(verdict.status(), 0, "{bits} bits: {verdict:?}");
        same_output(dir, "x.qcow2").unwrap();
    }
}

/// Images that QEMU was killed over: with lazy refcounts they need repair, without they
/// leak at worst.
#[test]
fn images_that_were_not_closed() {
    let mut statuses = Vec::new();
    for index in 0..24 {
        let mut rng = Rng::for_case(7, "aborted", index);
        let dir = scratch_dir("aborted").unwrap();
        let dir = dir.path();
        let lazy = rng.pick(&["lazy_refcounts=on", "lazy_refcounts=off"]);
        let size = rng.pick(&["cluster_size=512", "cluster_size=4k", "cluster_size=64k"]);
        let step = create("x.qcow2", "qcow2", &[lazy, size], None, 4 << 20);
        Recipe { steps: vec![step], ..Recipe::default() }.make(dir).unwrap();
        let mut commands: Vec<_> = (0..rng.range(1, 8))
            .map(|_| format!("write {} {}", rng.below(4000) << 10, rng.range(1, 90) << 10))
            .collect();
        commands.push("abort".to_owned());
        qemu::io_any(dir, "qcow2", "x.qcow2", &commands).unwrap();
        statuses.push(same_verdict(dir, "x.qcow2").unwrap().status());
        same_output(dir, "x.qcow2").unwrap();
    }
    assert!(statuses.contains(&2), "{statuses:?}");
}

/// Clusters that lost what referred to them.
#[test]
fn leaks_are_leaks() {
    let dir = scratch_dir("leaks").unwrap();
    let dir = dir.path();
    let steps = vec![
        create("x.qcow2", "qcow2", &["cluster_size=4k"], None, 4 << 20),
        write("x.qcow2", "qcow2", &[(0, 1 << 20)]),
    ];
    Recipe { steps, ..Recipe::default() }.make(dir).unwrap();
    let patch = crate::common::patch::Patch::open(&dir.join("x.qcow2")).unwrap();
    for guest in [0, 1, 2, 9, 100] {
        patch.put_u64(patch.l2_entry(guest * 4096).unwrap(), 0).unwrap();
    }
    let verdict = same_verdict(dir, "x.qcow2").unwrap();
    assert_eq!(verdict.status(), 3, "{verdict:?}");
    same_output(dir, "x.qcow2").unwrap();
    let (_, findings) = verdict_of_imgdm(&dir.join("x.qcow2")).unwrap();
    let counts: Vec<_> = findings.iter().map(|finding| finding.count).collect();
    // Neighbours are one finding.
    assert_eq!(counts, [3, 1, 1], "{findings:#?}");
}
