//! `imgdm convert` beside qemu-img: the same content, the same allocation, and images that
//! QEMU's tools find sound and go on with.

mod base;
mod far;
mod guest;
mod options;
mod place;
mod random;
mod refused;
mod stopped;

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::check::strings;
use crate::common::images::Recipe;
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::{PROGRAM, imgdm, sound};
use crate::map::{Row, rows};

/// The image that is asked for.
#[derive(Clone, Debug)]
struct Output {
    format: &'static str,
    /// For `-o`; `@` stands for the image's name.
    options: Vec<String>,
    /// `-c`, `-S SIZE`.
    switches: Vec<String>,
    /// Bytes that are data, zeros or left to the backing file by themselves.
    granularity: u64,
    /// Bytes that are compressed at a time.
    cluster: u64,
}

impl Output {
    /// One with these options.
    fn of(format: &'static str, options: &[&str], switches: &[&str]) -> Self {
        let number = |name: &str| {
            let value = options.iter().find_map(|option| option.strip_prefix(name))?;
            let (digits, unit) = match value.strip_suffix(['k', 'M']) {
                Some(digits) if value.ends_with('k') => (digits, 1 << 10),
                Some(digits) => (digits, 1 << 20),
                None => (value, 1),
            };
            Some(digits.parse::<u64>().ok()? * unit)
        };
        let cluster = match format {
            "raw" => 512,
            "qcow" => 4096,
            _ => number("cluster_size=").unwrap_or(64 << 10),
        };
        let extended = options.contains(&"extended_l2=on");
        Self {
            format,
            options: strings(options),
            switches: strings(switches),
            granularity: if extended { cluster / 32 } else { cluster },
            cluster,
        }
    }

    /// Draws one for a disk of that size, over a backing file or not.
    fn draw(rng: &mut Rng, size: u64, over_backing: bool) -> Self {
        let mut switches: Vec<&str> = Vec::new();
        if rng.percent(25) {
            switches.extend(["-S", *rng.pick(&["0", "512", "4k", "64k"])]);
        }
        match rng.below(10) {
            0 | 1 if !over_backing => {
                let options = ["preallocation=falloc", "preallocation=full"];
                let chosen =
                    if rng.percent(20) { std::slice::from_ref(rng.pick(&options)) } else { &[] };
                return Self::of("raw", chosen, &switches);
            }
            2 => {
                // QEMU fails to compress the small clusters that it has over a backing file.
                if !over_backing && rng.percent(40) {
                    switches.push("-c");
                }
                let mut qcow = Self::of("qcow", &[], &switches);
                if over_backing {
                    (qcow.granularity, qcow.cluster) = (512, 512);
                }
                return qcow;
            }
            _ => {}
        }
        // Many small clusters cost QEMU much time.
        let least = u64::from((size >> 13).max(1).ilog2()).clamp(9, 16);
        let v2 = rng.percent(15);
        let extended = !v2 && rng.percent(25);
        let bits = rng.range(if extended { least.max(14) } else { least }, 21);
        let mut options = vec![format!("cluster_size={}", 1_u64 << bits)];
        if v2 {
            options.push("compat=0.10".to_owned());
        } else if rng.percent(50) {
            options.push(format!("compat={}", rng.pick(&["1.1", "v3"])));
        }
        let mut compressed = rng.percent(30);
        let has_data_file = !v2 && rng.percent(15);
        if extended {
            options.push("extended_l2=on".to_owned());
        }
        if has_data_file {
            compressed = false;
            options.push("data_file=@.data".to_owned());
            if !over_backing && rng.percent(50) {
                options.push("data_file_raw=on".to_owned());
            }
        }
        if !v2 {
            if rng.percent(30) {
                options.push(format!("refcount_bits={}", rng.pick(&[1, 2, 4, 8, 16, 32, 64])));
            }
            if rng.percent(25) {
                options.push("lazy_refcounts=on".to_owned());
            }
            if !has_data_file && rng.percent(if compressed { 60 } else { 15 }) {
                options.push(format!("compression_type={}", rng.pick(&["zlib", "zstd", "zstd"])));
            }
        }
        if rng.percent(25) && !compressed && (!over_backing || extended) {
            let kind = rng.pick(&["off", "metadata", "metadata", "falloc", "full"]);
            options.push(format!("preallocation={kind}"));
        }
        if compressed {
            switches.push("-c");
        }
        // The order is no matter.
        let first = usize::try_from(rng.below(options.len() as u64)).unwrap();
        options.swap(0, first);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Self::of("qcow2", &options, &switches)
    }

    /// The arguments that ask for it.
    fn args(&self, name: &str) -> Vec<String> {
        let mut args = strings(&["-O", self.format]);
        if !self.options.is_empty() {
            args.extend(["-o".to_owned(), self.options.join(",").replace('@', name)]);
        }
        args.extend_from_slice(&self.switches);
        args
    }

    fn has(&self, option: &str) -> bool {
        self.options.iter().any(|each| each == option)
    }

    /// Zeros in a row that are left out: `-S`.
    fn sparse(&self) -> u64 {
        let given = self.switches.iter().position(|switch| switch == "-S");
        match given.and_then(|at| self.switches.get(at + 1)).map(String::as_str) {
            Some("0") => 0,
            Some("512") => 512,
            Some("64k") => 64 << 10,
            _ => 4096,
        }
    }

    fn is_compressed(&self) -> bool {
        self.switches.iter().any(|switch| switch == "-c")
    }
}

/// What is converted.
struct Input<'a> {
    file: &'a str,
    format: &'static str,
    /// The argument of `-l`.
    snapshot: Option<&'a str>,
}

impl Input<'_> {
    fn args(&self) -> Vec<String> {
        let mut args = strings(&["-f", self.format]);
        if let Some(snapshot) = self.snapshot {
            args.extend(strings(&["-l", snapshot]));
        }
        args
    }

    /// A raw copy by qemu-img: what the guest sees.
    fn expected(&self, dir: &Path) -> Outcome {
        let line = [strings(&["convert"]), self.args(), strings(&["-O", "raw"])].concat();
        qemu::img(dir, &[line, strings(&[self.file, "expected.raw"])].concat()).map(drop)
    }
}

/// The active layer of a recipe.
fn input_of(recipe: &Recipe) -> Input<'_> {
    let top = recipe.top();
    Input { file: &top.file, format: top.format, snapshot: None }
}

/// Converts with imgdm, from `input` to a file `out` that is not there yet.
fn ours(dir: &Path, input: &Input, output: &Output, more: &[String], out: &str) -> Outcome<Ran> {
    let line = [strings(&["convert", "--probe-backing"]), input.args(), output.args(out)].concat();
    let last = strings(&[input.file, out]);
    imgdm(dir, &[line, more.to_vec(), last].concat())?.ok()
}

/// The same with qemu-img.
fn theirs(dir: &Path, input: &Input, output: &Output, more: &[String], out: &str) -> Outcome {
    let line = [strings(&["convert"]), input.args(), output.args(out)].concat();
    let ran = qemu::img_any(dir, &[line, more.to_vec(), strings(&[input.file, out])].concat())?;
    // QEMU 10 makes a compressed qcow image, and then fails without a word.
    if output.format == "qcow" && output.is_compressed() && ran.stderr.is_empty() {
        return Ok(());
    }
    ran.ok().map(drop)
}

/// What is where, without offsets, neighbours joined.
fn allocation(dir: &Path, format: &str, image: &str) -> Outcome<Vec<Row>> {
    let map = qemu::img(dir, &["map", "-f", format, "--output=json", image])?;
    let mut joined: Vec<Row> = Vec::new();
    for mut row in rows(&map.stdout)? {
        row.offset = None;
        let alike = |a: &Row| Row { start: 0, length: 0, ..a.clone() };
        match joined.last_mut() {
            Some(last) if alike(last) == alike(&row) => last.length += row.length,
            _ => joined.push(row),
        }
    }
    Ok(joined)
}

/// The ranges in which two maps differ, with what each says there.
fn differences<'m>(a: &'m [Row], b: &'m [Row]) -> Vec<(&'m Row, &'m Row, u64, u64)> {
    let mut found = Vec::new();
    for x in a {
        for y in b {
            let start = x.start.max(y.start);
            let end = (x.start + x.length).min(y.start + y.length);
            if start < end && x.part(start, end) != y.part(start, end) {
                found.push((x, y, start, end));
            }
        }
    }
    found
}

/// Drops the page cache of a file.
fn forget(path: &Path) -> Outcome {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.sync_data().map_err(|error| error.to_string())?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
        .map_err(|error| error.to_string())
}

/// Why our output may be allocated unlike qemu-img's in some place; `over_base` with `-B`.
fn accepted(
    (input, output): (&Input, &Output),
    over_base: bool,
    ours: &Row,
    theirs: &Row,
    (start, end): (u64, u64),
) -> Option<&'static str> {
    let is_own = |row: &Row| row.depth == 0 && row.present;
    let without_zero = |row: &Row| Row { zero: false, start: 0, length: 0, ..row.clone() };
    if output.format == "raw" && end <= 4096 && ours.zero && !ours.data {
        return Some("the first block, which QEMU writes so that alignments can be probed");
    }
    if output.format != "raw" && ours.data && without_zero(ours) == without_zero(theirs) {
        // Whether QEMU looks for them depends on how much of the file is allocated.
        return Some("holes that the file system has below data");
    }
    if is_own(ours) && ours.data && !theirs.data && theirs.zero && end - start < output.sparse() {
        return Some("zeros too few to be left out, which are all of a piece that qemu-img reads");
    }
    let in_pieces = input.format == "qcow" || over_base;
    if output.sparse() > 0 && in_pieces && is_own(theirs) && theirs.data && ours.zero && !ours.data
    {
        return Some("zeros that qemu-img does not see, as it looks at the pieces of a cluster");
    }
    if output.is_compressed() && is_own(theirs) && !is_own(ours) {
        return Some("clusters that qemu-img learns of by pieces, which it takes for data");
    }
    let hides = over_base && output.has("compat=0.10") && is_own(theirs) && theirs.data;
    if output.is_compressed() && hides && ours.compressed {
        return Some("zeros for want of zero clusters, which qemu-img does not compress");
    }
    None
}

/// Fails where two images are not allocated alike, but for what is accepted.
fn same_allocation(
    dir: &Path,
    (input, output): (&Input, &Output),
    over_base: bool,
    ours: &str,
    theirs: &str,
) -> Outcome {
    // What was read of preallocated space is no hole as long as it is in the page cache.
    if output.options.iter().any(|option| option.starts_with("preallocation")) {
        for name in [ours, theirs] {
            forget(&dir.join(name))?;
        }
    }
    let (a, b) = (allocation(dir, output.format, ours)?, allocation(dir, output.format, theirs)?);
    let end = |rows: &[Row]| rows.last().map_or(0, |row| row.start + row.length);
    if end(&a) != end(&b) {
        return Err(format!("{} bytes are mapped, and {} by qemu-img", end(&a), end(&b)));
    }
    let mut differing = differences(&a, &b);
    differing.retain(|(x, y, start, end)| {
        accepted((input, output), over_base, x, y, (*start, *end)).is_none()
    });
    match differing.first() {
        None => Ok(()),
        Some((x, y, start, end)) => Err(format!(
            "{} ranges are allocated unlike qemu-img's, the first {start:#x}-{end:#x}:\n  imgdm    {x:?}\n  qemu-img {y:?}",
            differing.len()
        )),
    }
}

/// What `qemu-img info` says of an image, without what may differ.
fn described(dir: &Path, format: &str, image: &str) -> Outcome<serde_json::Value> {
    let ran = qemu::img(dir, &["info", "-f", format, "--output=json", image])?;
    let mut info: serde_json::Value =
        serde_json::from_slice(&ran.stdout).map_err(|error| error.to_string())?;
    if let Some(fields) = info.as_object_mut() {
        for name in ["filename", "actual-size", "children", "full-backing-filename"] {
            fields.remove(name);
        }
    }
    if let Some(data) = info.pointer_mut("/format-specific/data/data-file") {
        *data = "the data file".into();
    }
    Ok(info)
}

/// `qemu-img check` and `imgdm check` find nothing.
fn clean(dir: &Path, format: &str, image: &str) -> Outcome {
    if format == "qcow2" {
        qemu::img(dir, &["check", "-f", format, image])?;
    }
    if format != "raw" {
        imgdm(dir, &["check", "-f", format, image])?.ok()?;
    }
    Ok(())
}

/// The image is sound, and holds what expected.raw holds; QEMU and imgdm read it alike.
fn good(dir: &Path, format: &'static str, out: &str) -> Outcome {
    clean(dir, format, out)?;
    same_content(dir, format, out)?;
    crate::check::same_map(dir, &strings(&["-f", format, "--output=json", out])).map(drop)
}

/// qemu-img compares the image with expected.raw; their sizes are the same.
fn same_content(dir: &Path, format: &str, out: &str) -> Outcome {
    same_disk(dir, ("raw", "expected.raw"), (format, out))
}

/// The same by qemu-img of any two images.
fn same_disk(dir: &Path, a: (&str, &str), b: (&str, &str)) -> Outcome {
    let ran = qemu::img(dir, &["compare", "-f", a.0, "-F", b.0, a.1, b.1])?;
    let same = ran.text().trim_end() == "Images are identical.";
    if same { Ok(()) } else { Err(ran.describe()) }
}

/// It can be longer, by the rest of a cluster, as QEMU's is.
fn raw_data_file_is_the_disk(dir: &Path, file: &str) -> Outcome {
    qemu::img(dir, &["compare", "-f", "raw", "-F", "raw", "expected.raw", file]).map(drop)
}

/// A file's bytes.
fn bytes(dir: &Path, file: &str) -> Outcome<Vec<u8>> {
    fs::read(dir.join(file)).map_err(|error| format!("{file}: {error}"))
}

/// Removes an image and its data file.
fn remove(dir: &Path, image: &str) {
    for name in [image.to_owned(), format!("{image}.data")] {
        let _ = fs::remove_file(dir.join(name));
    }
}

/// Everything about one conversion that leaves nothing to a backing file. qemu-img converts
/// the `reference`, which is the same disk.
fn check_copy_of(
    dir: &Path,
    input: &Input,
    reference: &Input,
    output: &Output,
    rng: &mut Rng,
) -> Outcome {
    let line = ours(dir, input, output, &[], "ours")?.command;
    let outcome = theirs(dir, reference, output, &[], "theirs").and_then(|()| {
        good(dir, output.format, "ours")?;
        let (a, b) =
            (described(dir, output.format, "ours")?, described(dir, output.format, "theirs")?);
        if a != b {
            return Err(format!("qemu-img info:\n  imgdm    {a}\n  qemu-img {b}"));
        }
        same_allocation(dir, (input, output), false, "ours", "theirs")?;
        if output.has("data_file_raw=on") {
            raw_data_file_is_the_disk(dir, "ours.data")?;
        }
        if rng.percent(30) {
            same_bytes_again(dir, input, output, &[], "ours")?;
        }
        Ok(())
    });
    remove(dir, "ours");
    remove(dir, "theirs");
    outcome.map_err(|error| format!("{error}\n$ {line}"))
}

fn check_copy(dir: &Path, input: &Input, output: &Output, rng: &mut Rng) -> Outcome {
    check_copy_of(dir, input, input, output, rng)
}

/// However many threads, however often: the same bytes, of the data file too.
fn same_bytes_again(
    dir: &Path,
    input: &Input,
    output: &Output,
    more: &[String],
    out: &str,
) -> Outcome {
    let names = [out.to_owned(), format!("{out}.data")];
    let read = || names.each_ref().map(|name| fs::read(dir.join(name)).unwrap_or_default());
    let first = read();
    for threads in ["1", "2", "7"] {
        remove(dir, out);
        let mut command = Command::new(PROGRAM);
        command.current_dir(dir).env("RAYON_NUM_THREADS", threads);
        command.args(["convert", "--allow-path=.", "--probe-backing"]).args(input.args());
        command.args(output.args(out)).args(more).args([input.file, out]);
        sound(run(&mut command)?)?.ok()?;
        for ((name, a), b) in names.iter().zip(&first).zip(read()) {
            if *a != b {
                let at = a.iter().zip(&b).position(|(a, b)| a != b);
                let lengths = (a.len(), b.len());
                return Err(format!(
                    "{name} has other bytes with {threads} threads: {lengths:?} bytes, first {at:?}"
                ));
            }
        }
    }
    Ok(())
}

/// Names in a directory, sorted.
fn listing(dir: &Path) -> Vec<OsString> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}
