//! Fuzzing against qemu-img: real images, damaged in one to a few places. Both refuse them,
//! or both make the same map and the same bytes of them; what else is accepted is listed in
//! [`accepted`], each with its reason.
//!
//! `IMGDM_FUZZ_ROUNDS` sets how many images are damaged, without a limit of time (by default a
//! few hundred within 40 s), `IMGDM_SEED` the seed, `IMGDM_CASE` picks one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use imgdm::format::Format;
use imgdm::format::qcow2::SnapshotSelector;
use imgdm::open::{OpenPolicy, open_chain};
use imgdm::read::Ciphers;

use crate::check::same;
use crate::common::images::{Recipe, Step, scratch_dir};
use crate::common::patch::OFFSET_MASK;
use crate::common::process::{Outcome, Ran, run_within};
use crate::common::rng::Rng;
use crate::damaged::same_but_for_damage;
use crate::far::{create, write};
use crate::imgdm::{PROGRAM, sound};
use crate::one_field::{self, Subject};
use crate::random::setting;
use crate::read;

const WORKERS: usize = 2;
/// Images that are damaged by default, and within which time.
const ROUNDS: u64 = 300;
const TIME: Duration = Duration::from_secs(40);

/// What qemu-img may take for one image; some damage keeps it busy for ever, or takes all the
/// memory there is.
const QEMU_TIME: Duration = Duration::from_secs(3);
const QEMU_MEMORY: &str = "--as=4294967296";
/// What imgdm may take.
const OUR_TIME: Duration = Duration::from_secs(20);
const OUR_MEMORY: &str = "--as=1073741824";

/// The largest disk whose bytes are compared.
const COMPARED: u64 = 64 << 20;

/// An image to be damaged, with the files that it names.
struct Original {
    subject: Subject,
    format: Format,
    beside: Vec<(&'static str, Vec<u8>)>,
    /// An internal snapshot whose disk is compared too.
    snapshot: Option<&'static str>,
}

const ORIGINALS: [&str; 15] = [
    "plain",
    "version 2",
    "tiny clusters",
    "subclusters",
    "snapshots",
    "bitmaps",
    "1 bit",
    "compressed",
    "data file",
    "overlay",
    "overlay of an overlay",
    "subclusters over a raw file",
    "preallocated",
    "qcow",
    "qcow overlay",
];

impl Original {
    fn make(name: &'static str) -> Outcome<Self> {
        let dir = scratch_dir("original")?;
        let dir = dir.path();
        let run = |steps: &[Step]| Recipe { steps: steps.to_vec(), ..Recipe::default() }.make(dir);
        let base = || {
            run(&[
                create("base.raw", "raw", &[], None, 600 << 10),
                write("base.raw", "raw", &[(0, 64 << 10), (300 << 10, 20 << 10)]),
            ])
        };
        let over_raw = |format, options: &[&str]| {
            let file = if format == "qcow" { "x.qcow" } else { "x.qcow2" };
            create(file, format, options, Some(("base.raw", "raw")), 1 << 20)
        };
        let places = [(4 << 10, 8 << 10), (100 << 10, 9 << 10), (700 << 10, 20 << 10)];
        match name {
            "overlay" => {
                base()?;
                run(&[
                    over_raw("qcow2", &["cluster_size=4k"]),
                    write("x.qcow2", "qcow2", &places),
                ])?;
            }
            "overlay of an overlay" => {
                base()?;
                run(&[
                    create(
                        "m.qcow2",
                        "qcow2",
                        &["cluster_size=1k"],
                        Some(("base.raw", "raw")),
                        800 << 10,
                    ),
                    write("m.qcow2", "qcow2", &[(2 << 10, 3 << 10), (790 << 10, 5 << 10)]),
                    create(
                        "x.qcow2",
                        "qcow2",
                        &["cluster_size=2k"],
                        Some(("m.qcow2", "qcow2")),
                        1 << 20,
                    ),
                    write("x.qcow2", "qcow2", &places),
                ])?;
            }
            "subclusters over a raw file" => {
                base()?;
                run(&[
                    over_raw("qcow2", &["cluster_size=16k", "extended_l2=on"]),
                    write(
                        "x.qcow2",
                        "qcow2",
                        &[(512, 512), (20 << 10, 40 << 10), (700 << 10, 1 << 10)],
                    ),
                ])?;
            }
            "preallocated" => run(&[
                create(
                    "x.qcow2",
                    "qcow2",
                    &["cluster_size=4k", "preallocation=metadata"],
                    None,
                    1 << 20,
                ),
                write("x.qcow2", "qcow2", &places),
            ])?,
            "qcow" => run(&[
                create("x.qcow", "qcow", &[], None, 1 << 20),
                write("x.qcow", "qcow", &places),
                Step::Io {
                    format: "qcow",
                    file: "x.qcow".to_owned(),
                    commands: vec!["write -c -P 3 400k 4k".to_owned()],
                },
            ])?,
            "qcow overlay" => {
                base()?;
                run(&[over_raw("qcow", &[]), write("x.qcow", "qcow", &places)])?;
            }
            name => one_field::make(name, dir)?,
        }
        let format = if name.starts_with("qcow") { Format::Qcow } else { Format::Qcow2 };
        let bytes = fs::read(dir.join(format!("x.{format}"))).map_err(|error| error.to_string())?;
        let subject = match format {
            Format::Qcow => qcow(name, bytes),
            _ => Subject::of_bytes(name, bytes),
        };
        let mut beside = Vec::new();
        for file in ["base.raw", "m.qcow2", "x.data"] {
            if let Ok(bytes) = fs::read(dir.join(file)) {
                beside.push((file, bytes));
            }
        }
        let snapshot = match name {
            "snapshots" => Some("two"),
            "version 2" => Some("a"),
            _ => None,
        };
        Ok(Self { subject, format, beside, snapshot })
    }

    fn file(&self) -> String {
        format!("bad.{}", self.format)
    }

    /// Damages a copy; says how.
    fn damage(&self, rng: &mut Rng) -> (Vec<u8>, String) {
        let mut bytes = self.subject.bytes.clone();
        let mut what = Vec::new();
        let kinds: Vec<_> = self.subject.fields.keys().copied().collect();
        for _ in 0..*rng.pick(&[1, 1, 1, 2, 2, 3, 5]) {
            let fields = &self.subject.fields[*rng.pick(&kinds)];
            let field = rng.pick(fields);
            let at = usize::try_from(field.at).unwrap();
            let end = at + field.width;
            match rng.below(12) {
                0 => {
                    // The bytes of another place.
                    let kind = *rng.pick(&kinds);
                    let other = rng.pick(&self.subject.fields[kind]);
                    let from = usize::try_from(other.at).unwrap();
                    let length = usize::try_from(*rng.pick(&[8u64, 8, 16, 64])).unwrap();
                    let length = length.min(bytes.len() - from.max(at));
                    bytes.copy_within(from..from + length, at);
                    what.push(format!("{length} bytes from {from:#x} to {at:#x}"));
                }
                1 => {
                    let at = usize::try_from(rng.below(bytes.len() as u64)).unwrap();
                    bytes[at] ^= 1 << rng.below(8);
                    what.push(format!("a bit of the byte at {at:#x}"));
                }
                _ => {
                    let value = self.subject.change(field, rng);
                    bytes[at..end].copy_from_slice(&value.to_be_bytes()[8 - field.width..]);
                    what.push(format!("{value:#x} at {at:#x}"));
                }
            }
        }
        match rng.below(12) {
            0 => {
                let length = rng.below(bytes.len() as u64);
                bytes.truncate(usize::try_from(length).unwrap());
                what.push(format!("cut off at {length:#x}"));
            }
            1 => {
                let more = usize::try_from(rng.range(1, 100_000)).unwrap();
                bytes.resize(bytes.len() + more, 0);
                what.push(format!("{more} zeros at the end"));
            }
            _ => {}
        }
        (bytes, what.join(", "))
    }
}

/// The fields of a qcow image.
fn qcow(name: &'static str, bytes: Vec<u8>) -> Subject {
    // Its header has other fields than that of qcow2, which is looked at first.
    let mut subject = Subject::of_bytes(name, Vec::new());
    subject.bytes = bytes;
    for (at, width) in [(4, 4), (8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)] {
        subject.add("header", at, width);
    }
    let l1 = subject.u64(40);
    let entries = 1 << (subject.u64(32) >> 48 & 0xff);
    for index in 0..4 {
        let at = l1 + index * 8;
        subject.add("L1", at, 8);
        let table = subject.u64(at) & OFFSET_MASK;
        for entry in 0..entries {
            if table != 0 && subject.u64(table + entry * 8) != 0 {
                subject.add("L2", table + entry * 8, 8);
            }
        }
    }
    subject
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Map,
    Bytes,
    Snapshot,
}

/// The differences that are meant: who alone reads the image, what its refusal says (of
/// qemu-img's or imgdm's message), and the reason.
const ACCEPTED: [(Reader, &str, &str); 12] = [
    (
        Reader::Qemu,
        "is no multiple of 512",
        "qemu-img maps a cluster of qcow that starts inside of a sector, and reads it with EIO; to imgdm it is damage in both",
    ),
    (
        Reader::Qemu,
        "the refcount table",
        "refcounts say nothing of what is read, and qemu-img looks at them when it writes; a header that has them in a wrong place is not believed",
    ),
    (
        Reader::Qemu,
        "lies outside the file",
        "qemu-img takes a table past the end of the file for zeros; to imgdm it is damage, which a map goes past",
    ),
    (Reader::Qemu, "overlaps the", "qemu-img takes one table for another; to imgdm that is damage"),
    (
        Reader::Qemu,
        "both name the L2 table",
        "two L1 entries name one L2 table, which qemu-img notices when it writes; to imgdm it is damage",
    ),
    (
        Reader::Qemu,
        "marked corrupt",
        "qemu-img reads what is marked corrupt; imgdm with --allow-corrupt",
    ),
    (
        Reader::Imgdm,
        "itmap",
        "bitmaps say nothing of what is read: imgdm looks at them when it is asked for one",
    ),
    (
        Reader::Imgdm,
        "snapshot",
        "internal snapshots say nothing of what the active layer is: imgdm looks at them when it is asked for one",
    ),
    (Reader::Imgdm, "Snapshot", "the same"),
    (Reader::Imgdm, "data-file' is required", "imgdm's map opens no data file"),
    (
        Reader::Imgdm,
        "Missing CRYPTO header",
        "a map takes no key, and imgdm reads no header that is for keys",
    ),
    (Reader::Imgdm, "encrypt.key-secret' is required", "a map takes no key"),
];

/// Who alone reads an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Qemu,
    Imgdm,
}

fn accepted(reader: Reader, refusal: &str) -> Option<&'static str> {
    let known = ACCEPTED.iter().find(|known| known.0 == reader && refusal.contains(known.1));
    known.map(|known| known.2)
}

/// A program that is bounded in time and memory. None where it took more.
fn bounded(dir: &Path, memory: &str, time: Duration, line: &[&str]) -> Option<Ran> {
    let seconds = format!("--cpu={}", time.as_secs());
    let mut command = Command::new("prlimit");
    command.current_dir(dir).args([memory, &seconds, "--core=0", "--"]).args(line);
    let ran = run_within(&mut command, time * 3).ok()?;
    ran.code().is_some().then_some(ran)
}

/// qemu-img, where it comes to an end.
fn qemu_img(dir: &Path, line: &[&str]) -> Option<Ran> {
    bounded(dir, QEMU_MEMORY, QEMU_TIME, &[&["qemu-img"], line].concat())
}

/// # Errors
/// It did not come to an end, or not to one that any input may bring about.
fn imgdm(dir: &Path, line: &[&str]) -> Outcome<Ran> {
    let ran = bounded(dir, OUR_MEMORY, OUR_TIME, &[&[PROGRAM], line].concat());
    sound(ran.ok_or_else(|| format!("imgdm {line:?} took more than {OUR_TIME:?}"))?)
}

/// How a program ended, without what it printed: maps are long.
fn said(ran: &Ran) -> String {
    let stderr: String = ran.stderr.chars().take(1000).collect();
    format!("$ {}\nexit code {:?}\n{stderr}", ran.command, ran.code())
}

/// How often each outcome was seen.
#[derive(Default)]
struct Tally(Mutex<BTreeMap<String, u64>>);

impl Tally {
    fn add(&self, part: Part, outcome: &str) {
        *self.0.lock().unwrap().entry(format!("{part:?}: {outcome}")).or_default() += 1;
    }
}

/// Compares the maps of a damaged image; says whether both could be made.
fn compare_maps(dir: &Path, original: &Original, tally: &Tally) -> Outcome<bool> {
    let file = original.file();
    let line = ["map", "--output=json", "-f", original.format.name(), &file];
    let ours = imgdm(dir, &line)?;
    let Some(theirs) = qemu_img(dir, &line) else {
        tally.add(Part::Map, "qemu-img came to no end");
        return Ok(false);
    };
    let (qemu_reads, we_read) = (theirs.status.success(), ours.status.success());
    let outcome = match (qemu_reads, we_read) {
        (true, true) => {
            same(&theirs, &ours)?;
            "the same"
        }
        (false, false) => "both refuse",
        _ => {
            let reason = if qemu_reads {
                accepted(Reader::Qemu, &ours.stderr)
            } else {
                accepted(Reader::Imgdm, &theirs.stderr)
            };
            let Some(reason) = reason else {
                return Err(format!("one reads it:\n{}{}", said(&theirs), said(&ours)));
            };
            if qemu_reads {
                same_but_for_damage(&theirs, &ours, &file)?;
            }
            reason
        }
    };
    tally.add(Part::Map, outcome);
    Ok(qemu_reads && we_read)
}

/// Compares the bytes of the disk, or of a snapshot.
fn compare_bytes(
    dir: &Path,
    original: &Original,
    snapshot: Option<&str>,
    rng: &mut Rng,
    tally: &Tally,
) -> Outcome {
    let file = original.file();
    let part = if snapshot.is_some() { Part::Snapshot } else { Part::Bytes };
    let mut line = vec!["convert", "-f", original.format.name(), "-O", "raw"];
    line.extend(snapshot.iter().flat_map(|name| ["-l", name]));
    line.extend([file.as_str(), "copy.raw"]);
    let policy = OpenPolicy {
        format: Some(original.format),
        probe_backing: true,
        snapshot: snapshot.map(|name| SnapshotSelector::IdOrName(name.to_owned())),
        ..OpenPolicy::default()
    };
    let opened = open_chain(&dir.join(&file), &policy).map_err(|error| error.without_path());
    if let Ok(opened) = &opened
        && opened.chain.virtual_size().get() > COMPARED
    {
        tally.add(part, "too large");
        return Ok(());
    }
    let Some(theirs) = qemu_img(dir, &line) else {
        tally.add(part, "qemu-img came to no end");
        return Ok(());
    };
    let ours = opened.and_then(|opened| {
        // Read first without a copy: a difference is no refusal.
        let mut read = Ok(());
        let ciphers = Ciphers::new();
        let swept = opened.chain.for_each_chunk(&ciphers, opened.chain.whole(), |_, _| Ok(()));
        if let Err(error) = swept {
            read = Err(error.without_path());
        }
        read.map(|()| opened.chain)
    });
    let outcome = match (theirs.status.success(), ours) {
        (true, Ok(chain)) => {
            read::compare(&chain, &Ciphers::new(), &dir.join("copy.raw"), rng)?;
            "the same"
        }
        (false, Err(_)) => "both refuse",
        (true, Err(ours)) => accepted(Reader::Qemu, &ours)
            .ok_or_else(|| format!("qemu-img reads it:\n{}imgdm: {ours}", said(&theirs)))?,
        (false, Ok(_)) => accepted(Reader::Imgdm, &theirs.stderr)
            .ok_or_else(|| format!("imgdm reads it:\n{}", said(&theirs)))?,
    };
    tally.add(part, outcome);
    Ok(())
}

#[test]
fn a_damaged_image_is_read_as_qemu_img_reads_it_or_refused() {
    let seed = setting("IMGDM_SEED").unwrap_or(0x6d75_7461);
    let only = setting("IMGDM_CASE");
    let rounds = setting("IMGDM_FUZZ_ROUNDS");
    let cases = only.map_or(rounds.unwrap_or(ROUNDS), |case| case + 1);
    let originals: Vec<_> = ORIGINALS.iter().map(|name| Original::make(name).unwrap()).collect();
    let (next, done) = (AtomicU64::new(only.unwrap_or(0)), AtomicU64::new(0));
    let (failed, tally) = (Mutex::new(Vec::new()), Tally::default());
    // A few failures say what there is to say.
    let limit = if rounds.is_some() { 100 } else { 5 };
    let start = Instant::now();
    let one = |dir: &Path, index: u64| -> Outcome {
        let mut rng = Rng::for_case(seed, "mutated", index);
        let original = rng.pick(&originals);
        let (bytes, what) = original.damage(&mut rng);
        let fail = |error: std::io::Error| error.to_string();
        fs::write(dir.join(original.file()), &bytes).map_err(fail)?;
        for (name, bytes) in &original.beside {
            fs::write(dir.join(name), bytes).map_err(fail)?;
        }
        let compare = |rng: &mut Rng| {
            let both = compare_maps(dir, original, &tally)?;
            if both || rng.percent(30) {
                compare_bytes(dir, original, None, rng, &tally)?;
            }
            if original.snapshot.is_some() && rng.percent(40) {
                compare_bytes(dir, original, original.snapshot, rng, &tally)?;
            }
            Ok(())
        };
        compare(&mut rng).map_err(|error: String| {
            let kept = dir.with_file_name(format!("mutated-{index}-{}", original.file()));
            let _ = fs::write(&kept, &bytes);
            let (kept, name) = (kept.display(), original.subject.name);
            format!("--- case {index}, '{name}' ({kept}): {what}\n{error}")
        })
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                let dir = scratch_dir("mutated").unwrap();
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let late = rounds.is_none() && only.is_none() && start.elapsed() > TIME;
                    if index >= cases || late || failed.lock().unwrap().len() >= limit {
                        break;
                    }
                    if let Err(error) = one(dir.path(), index) {
                        failed.lock().unwrap().push(error);
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let (seen, done) = (tally.0.into_inner().unwrap(), done.into_inner());
    println!("{done} images, seed {seed:#x}: {seen:#?}");
    assert!(failed.is_empty(), "seed {seed:#x}, {seen:#?}:\n{}", failed.join("\n"));
    if only.is_none() {
        let of = |outcome: &str| seen.get(outcome).copied().unwrap_or(0);
        let least = done / 20;
        for outcome in ["Map: the same", "Map: both refuse", "Bytes: the same"] {
            assert!(of(outcome) > least, "hardly any: {outcome}: {seen:#?}");
        }
    }
}
