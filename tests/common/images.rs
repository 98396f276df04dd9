//! Makes backing chains at random with qemu-img and qemu-io.
//!
//! A [`Recipe`] is a list of steps that is drawn from a seed first and carried out
//! afterwards, so that a failing image can be described, and made again by hand: it
//! prints as shell commands.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::process::{Outcome, quoted};
use super::qemu;
use super::rng::Rng;

/// Bytes in a sector.
pub(crate) const SECTOR: u64 = 512;

/// Number of pattern files.
const PATTERNS: u64 = 6;

/// One step in the making of a chain. Paths are relative to the chain's directory.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// `qemu-img create`.
    Create {
        format: &'static str,
        options: Vec<String>,
        /// The backing file's name, and its declared format.
        backing: Option<(String, &'static str)>,
        file: String,
        size: u64,
    },
    /// `qemu-io -c ... -c ...`.
    ///
    /// QEMU refuses a compressed write to a cluster that has data; such a command may
    /// fail and leave the rest to be done.
    Io { format: &'static str, file: String, commands: Vec<String> },
    /// `qemu-img snapshot -c NAME` (or `-d`).
    Snapshot { action: &'static str, name: String, file: String },
    /// `qemu-img bitmap --add`.
    Bitmap { name: String, file: String },
    /// `qemu-img resize`.
    Resize { format: &'static str, file: String, size: u64, shrink: bool },
    /// `truncate -s`.
    Truncate { file: String, length: u64 },
}

/// `@DIR@` in a name stands for the chain's directory, `@PATTERNS@` for theirs.
fn with_paths(text: &str, dir: &Path) -> String {
    if !text.contains('@') {
        return text.to_owned();
    }
    let patterns = patterns().map_or(Path::new("?"), PathBuf::as_path);
    text.replace("@DIR@", &dir.to_string_lossy()).replace("@PATTERNS@", &patterns.to_string_lossy())
}

impl Step {
    /// The arguments of qemu-img for this step; `None` where it is not qemu-img's.
    fn img_args(&self, dir: &Path) -> Option<Vec<String>> {
        let mut args: Vec<String> = Vec::new();
        match self {
            Self::Create { format, options, backing, file, size } => {
                args.extend(["create", "-q", "-f", format].map(str::to_owned));
                if !options.is_empty() {
                    args.extend(["-o".to_owned(), with_paths(&options.join(","), dir)]);
                }
                if let Some((name, format)) = backing {
                    let name = with_paths(name, dir);
                    args.extend(["-b".to_owned(), name, "-F".to_owned(), (*format).to_owned()]);
                }
                args.extend([file.clone(), size.to_string()]);
            }
            Self::Snapshot { action, name, file } => {
                args.extend(["snapshot", action, name, file].map(str::to_owned));
            }
            Self::Bitmap { name, file } => {
                args.extend(["bitmap", "--add", "-f", "qcow2", file, name].map(str::to_owned));
            }
            Self::Resize { format, file, size, shrink } => {
                args.extend(["resize", "-q", "-f", format].map(str::to_owned));
                if *shrink {
                    args.push("--shrink".to_owned());
                }
                args.extend([file.clone(), size.to_string()]);
            }
            Self::Io { .. } | Self::Truncate { .. } => return None,
        }
        Some(args)
    }

    fn carry_out(&self, dir: &Path) -> Outcome {
        match self {
            Self::Io { format, file, commands } => {
                let commands: Vec<_> = commands.iter().map(|c| with_paths(c, dir)).collect();
                if commands.iter().any(|command| command.starts_with("write -c")) {
                    return qemu::io_any(dir, format, file, &commands).map(drop);
                }
                qemu::io(dir, format, file, &commands).map(drop)
            }
            Self::Truncate { file, length } => OpenOptions::new()
                .write(true)
                .open(dir.join(file))
                .and_then(|file| file.set_len(*length))
                .map_err(|error| format!("truncate {file}: {error}")),
            _ => qemu::img(dir, &self.img_args(dir).unwrap_or_default()).map(drop),
        }
    }

    fn shown(&self, dir: &Path) -> String {
        let words = |args: Vec<String>| -> String {
            args.iter().map(|arg| quoted(arg)).collect::<Vec<_>>().join(" ")
        };
        match self {
            Self::Io { format, file, commands } => {
                let mut args = vec!["-f".to_owned(), (*format).to_owned()];
                args.extend(["-d".to_owned(), "unmap".to_owned()]);
                for command in commands {
                    args.extend(["-c".to_owned(), with_paths(command, dir)]);
                }
                args.push(file.clone());
                format!("qemu-io {}", words(args))
            }
            Self::Truncate { file, length } => format!("truncate -s {length} {}", quoted(file)),
            _ => format!("qemu-img {}", words(self.img_args(dir).unwrap_or_default())),
        }
    }
}

/// One image of a chain, as it is when all steps are done.
#[derive(Clone, Debug)]
pub(crate) struct LayerMade {
    /// Its file, relative to the chain's directory.
    pub(crate) file: String,
    pub(crate) format: &'static str,
    /// Its external data file, relative to the chain's directory.
    pub(crate) data_file: Option<String>,
    pub(crate) size: u64,
    /// The names of its snapshots.
    pub(crate) snapshots: Vec<String>,
    /// The names of its bitmaps.
    pub(crate) bitmaps: Vec<String>,
}

/// How to make a chain.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recipe {
    pub(crate) steps: Vec<Step>,
    /// The layers, base first.
    pub(crate) layers: Vec<LayerMade>,
    /// Some overlay's format has no room for the backing file's format.
    pub(crate) undeclared: bool,
    /// A raw layer's size is no multiple of 512.
    pub(crate) odd_size: bool,
}

impl Recipe {
    /// The active layer.
    pub(crate) fn top(&self) -> &LayerMade {
        &self.layers[self.layers.len() - 1]
    }

    /// Makes the files in `dir`.
    ///
    /// # Errors
    /// One of QEMU's tools failed.
    pub(crate) fn make(&self, dir: &Path) -> Outcome {
        patterns()?;
        fs::create_dir_all(dir.join("sub")).map_err(|error| error.to_string())?;
        self.steps.iter().try_for_each(|step| step.carry_out(dir))
    }

    /// The steps as shell commands.
    pub(crate) fn script(&self, dir: &Path) -> impl fmt::Display {
        let lines: Vec<_> = self.steps.iter().map(|step| step.shown(dir)).collect();
        format!("mkdir -p {0}/sub; cd {0}\n{1}\n", dir.display(), lines.join("\n"))
    }

    /// Files of random bytes as long as `dir`'s writes take them from; see [`patterns`].
    pub(crate) fn pattern(index: u64) -> Outcome<PathBuf> {
        Ok(patterns()?.join(format!("p{}", index % PATTERNS)))
    }
}

/// The directory with the files that writes take their bytes from. Every sector in
/// them is unlike all others, so that bytes tell where they come from; their lengths
/// differ, so that a longer write does not repeat the same way.
fn patterns() -> Outcome<&'static PathBuf> {
    static MADE: OnceLock<Outcome<PathBuf>> = OnceLock::new();
    let make = || -> std::io::Result<PathBuf> {
        let dir = test_dir().join("patterns");
        fs::create_dir_all(&dir)?;
        for index in 0..PATTERNS {
            let path = dir.join(format!("p{index}"));
            let mut bytes = vec![0; usize::try_from(SECTOR * (509 + 6 * index)).unwrap_or(0)];
            Rng::new(index).fill(&mut bytes);
            if fs::read(&path).is_ok_and(|there| there == bytes) {
                continue;
            }
            // Another test program may be doing the same: each file appears whole.
            let mut file = tempfile::NamedTempFile::new_in(&dir)?;
            file.write_all(&bytes)?;
            file.persist(path)?;
        }
        Ok(dir)
    };
    let made = MADE.get_or_init(|| make().map_err(|error| format!("pattern files: {error}")));
    made.as_ref().map_err(Clone::clone)
}

/// What chains to draw: how often, of 100, each feature comes.
#[derive(Clone, Debug)]
pub(crate) struct Theme {
    /// Fewest and most layers.
    pub(crate) depth: (u64, u64),
    /// The base is raw (and not a qcow2 or qcow).
    pub(crate) raw_base: u64,
    /// An overlay or other base is a qcow of version 1.
    pub(crate) qcow: u64,
    /// A qcow2 is of version 2.
    pub(crate) v2: u64,
    /// Least and greatest cluster size, as powers of two.
    pub(crate) cluster_bits: (u64, u64),
    /// Extended L2 entries where the cluster size permits.
    pub(crate) extended_l2: u64,
    /// An external data file, and data_file_raw where there is one.
    pub(crate) data_file: u64,
    pub(crate) data_file_raw: u64,
    /// Preallocation where QEMU permits.
    pub(crate) preallocation: u64,
    /// A snapshot after a round of writes.
    pub(crate) snapshot: u64,
    pub(crate) bitmap: u64,
    pub(crate) resize: u64,
    /// A layer's size is unlike its backing file's.
    pub(crate) other_size: u64,
    /// A round has compressed writes.
    pub(crate) compressed: u64,
    /// The raw base's size is no multiple of 512.
    pub(crate) odd_size: u64,
    /// Backing names other than a plain relative one.
    pub(crate) fancy_name: u64,
    /// A layer that gets no writes at all.
    pub(crate) empty: u64,
    /// Largest virtual size in bytes.
    pub(crate) max_size: u64,
}

/// A mixture of everything that a device-mapper table can express.
pub(crate) const MIXED: Theme = Theme {
    depth: (1, 5),
    raw_base: 40,
    qcow: 8,
    v2: 20,
    cluster_bits: (9, 21),
    extended_l2: 25,
    data_file: 12,
    data_file_raw: 50,
    preallocation: 10,
    snapshot: 20,
    bitmap: 8,
    resize: 15,
    other_size: 35,
    compressed: 0,
    odd_size: 0,
    fancy_name: 30,
    empty: 8,
    max_size: 64 << 20,
};

impl Theme {
    /// Draws a recipe.
    pub(crate) fn draw(&self, rng: &mut Rng) -> Recipe {
        let mut drawing = Drawing { theme: self, rng, recipe: Recipe::default() };
        let depth = drawing.rng.range(self.depth.0, self.depth.1);
        let size = drawing.any_size(self.max_size);
        for level in 0..depth {
            drawing.layer(level, size, level + 1 == depth);
        }
        drawing.recipe
    }
}

/// What a layer's writes depend on.
struct Shape {
    format: &'static str,
    cluster: u64,
    version_2: bool,
    extended: bool,
    compressed: bool,
    /// It has a backing file.
    overlay: bool,
}

struct Drawing<'a> {
    theme: &'a Theme,
    rng: &'a mut Rng,
    recipe: Recipe,
}

impl Drawing<'_> {
    /// A size in whole sectors, small ones as likely as large ones.
    fn any_size(&mut self, most: u64) -> u64 {
        let bits = self.rng.range(13, most.ilog2().into());
        let size = self.rng.range(1 << (bits - 1), most.min(1 << bits));
        let grain = *self.rng.pick(&[512, 512, 4096, 65536, 1 << 20]);
        size.next_multiple_of(grain).min(most)
    }

    fn layer(&mut self, level: u64, first_size: u64, last: bool) {
        let theme = self.theme;
        let below = self.recipe.layers.last().cloned();
        let raw = below.is_none() && self.rng.percent(theme.raw_base);
        let format = if raw {
            "raw"
        } else if self.rng.percent(theme.qcow) {
            "qcow"
        } else {
            "qcow2"
        };
        let dir = if self.rng.percent(20) { "sub/" } else { "" };
        let file = format!("{dir}l{level}.{format}");

        // Mostly clusters so small that the disk has many.
        let (least, greatest) = theme.cluster_bits;
        let disk = below.as_ref().map_or(first_size, |below| below.size);
        let many = u64::from(disk.max(1 << 12).ilog2() - 3).clamp(least, greatest);
        let most_bits = if self.rng.percent(75) { many } else { greatest };
        let mut bits = self.rng.range(least, most_bits);
        let extended = format == "qcow2" && bits >= 14 && self.rng.percent(theme.extended_l2);
        if format == "qcow" {
            bits = if below.is_some() { 9 } else { 12 };
        }
        // Small clusters in a large image cost QEMU much time.
        let most = theme.max_size.min(1 << (bits + 12).min(26));
        let mut size = disk.min(most);
        if below.is_some() && self.rng.percent(theme.other_size) {
            size = self.any_size(most);
        }

        let mut options = Vec::new();
        let mut data_file = None;
        let mut version_2 = false;
        let mut snapshots_wanted = false;
        if format == "qcow2" {
            options.push(format!("cluster_size={}", 1_u64 << bits));
            let wants_data_file = self.rng.percent(theme.data_file);
            snapshots_wanted = !wants_data_file && self.rng.percent(theme.snapshot * 2);
            version_2 = !extended && !wants_data_file && self.rng.percent(theme.v2);
            options.push(format!("compat={}", if version_2 { "0.10" } else { "1.1" }));
            if extended {
                options.push("extended_l2=on".to_owned());
            }
            if wants_data_file {
                data_file = Some(self.data_file(&file, below.is_none(), last, &mut options));
            }
            if !version_2 {
                if self.rng.percent(25) {
                    options.push("lazy_refcounts=on".to_owned());
                }
                if self.rng.percent(25) {
                    let widths: &[u32] = if snapshots_wanted { &[8, 32, 64] } else { &[1, 4, 64] };
                    options.push(format!("refcount_bits={}", self.rng.pick(widths)));
                }
                if theme.compressed > 0 && self.rng.percent(50) && data_file.is_none() {
                    options.push("compression_type=zstd".to_owned());
                }
            }
        }
        // QEMU preallocates over a backing file only with extended L2 entries.
        let may = format == "raw" || (format == "qcow2" && (below.is_none() || extended));
        if may && self.rng.percent(theme.preallocation) {
            let kind = if format == "raw" || self.rng.percent(30) { "falloc" } else { "metadata" };
            options.push(format!("preallocation={kind}"));
        }
        let backing = below.as_ref().map(|below| {
            let name = self.backing_name(dir, below, bits);
            (name, below.format)
        });
        self.recipe.undeclared |= format == "qcow" && below.is_some();
        let create = Step::Create { format, options, backing, file: file.clone(), size };
        self.recipe.steps.push(create);
        let (snapshots, bitmaps) = (Vec::new(), Vec::new());
        let layer = LayerMade { file, format, data_file, size, snapshots, bitmaps };
        self.recipe.layers.push(layer);

        let shape = Shape {
            format,
            cluster: 1 << bits,
            version_2,
            extended,
            compressed: format != "raw" && self.recipe.top().data_file.is_none(),
            overlay: below.is_some(),
        };
        self.rounds(&shape, snapshots_wanted, most);
        if raw && self.rng.percent(theme.odd_size) {
            let top = self.recipe.top();
            let (file, length) = (top.file.clone(), top.size - 512 + self.rng.range(1, 511));
            self.recipe.steps.push(Step::Truncate { file, length });
            self.recipe.odd_size = true;
        }
    }

    fn data_file(
        &mut self,
        image: &str,
        no_backing: bool,
        last: bool,
        options: &mut Vec<String>,
    ) -> String {
        let name = format!("{image}.data");
        // QEMU opens the stored name from its working directory: a relative one is
        // only the same to all where that is the image's directory, and is printed the
        // same only where the image's own name has no directory either.
        if image.contains('/') || !last || self.rng.percent(30) {
            options.push(format!("data_file=@DIR@/{name}"));
        } else {
            options.push(format!("data_file={name}"));
        }
        if no_backing && self.rng.percent(self.theme.data_file_raw) {
            options.push("data_file_raw=on".to_owned());
        }
        name
    }

    /// A name for `below` as an overlay in `dir` may store it.
    fn backing_name(&mut self, dir: &str, below: &LayerMade, cluster_bits: u64) -> String {
        let (file, format) = (&below.file, below.format);
        let relative = match (dir, file.strip_prefix("sub/")) {
            ("", _) => file.clone(),
            (_, Some(beside)) => beside.to_owned(),
            (_, None) => format!("../{file}"),
        };
        // The name has to fit into the first cluster.
        if cluster_bits < 12 || !self.rng.percent(self.theme.fancy_name) {
            return relative;
        }
        match self.rng.below(4) {
            0 => format!("@DIR@/{file}"),
            1 => format!("file:@DIR@/{file}"),
            2 => format!(
                r#"json:{{"driver":"{format}","file":{{"driver":"file","filename":"@DIR@/{file}"}}}}"#
            ),
            _ => format!(r#"json:{{"file.filename":"@DIR@/{file}","driver":"{format}"}}"#),
        }
    }

    /// Rounds of writes with what comes between them.
    fn rounds(&mut self, shape: &Shape, snapshots_wanted: bool, most: u64) {
        if self.rng.percent(self.theme.empty) {
            return;
        }
        let mut taken = 0;
        for round in 0..self.rng.range(1, 3) {
            let (file, size) = (self.recipe.top().file.clone(), self.recipe.top().size);
            let count = self.rng.range(3, 18);
            let compressed = shape.compressed && self.rng.percent(self.theme.compressed);
            let commands = (0..count).map(|_| self.command(shape, size, compressed)).collect();
            let io = Step::Io { format: shape.format, file: file.clone(), commands };
            self.recipe.steps.push(io);
            if shape.format == "qcow2" {
                if snapshots_wanted && self.rng.percent(60) {
                    let names = ["before upgrade", "s", "überblick", "1", "2", "a,b=c"];
                    let name = format!("{}{}", self.rng.pick(&names), "'".repeat(taken % 2));
                    // Two of one name would make -l NAME ambiguous.
                    if !self.recipe.top().snapshots.contains(&name) {
                        self.snapshot("-c", &name);
                        self.top_mut().snapshots.push(name);
                        taken += 1;
                    }
                }
                if taken > 1 && self.rng.percent(15) {
                    let name = self.top_mut().snapshots.remove(0);
                    self.snapshot("-d", &name);
                }
                if !shape.version_2 && self.rng.percent(self.theme.bitmap) {
                    let name = format!("b{round}");
                    self.top_mut().bitmaps.push(name.clone());
                    self.recipe.steps.push(Step::Bitmap { name, file: file.clone() });
                }
            }
            let resizable = shape.format != "qcow"
                && self.recipe.top().bitmaps.is_empty()
                && (taken == 0 || !shape.version_2);
            if resizable && self.rng.percent(self.theme.resize) {
                let size = self.any_size(most);
                let shrink = size < self.recipe.top().size;
                if !shrink && shape.version_2 && shape.overlay {
                    continue; // Version 2 can't hide what the backing file has there.
                }
                let format = shape.format;
                self.recipe.steps.push(Step::Resize { format, file, size, shrink });
                self.top_mut().size = size;
            }
        }
    }

    fn top_mut(&mut self) -> &mut LayerMade {
        let last = self.recipe.layers.len() - 1;
        &mut self.recipe.layers[last]
    }

    fn snapshot(&mut self, action: &'static str, name: &str) {
        let file = self.recipe.top().file.clone();
        self.recipe.steps.push(Step::Snapshot { action, name: name.to_owned(), file });
    }

    /// A command of qemu-io that changes the image.
    fn command(&mut self, shape: &Shape, size: u64, compressed: bool) -> String {
        if compressed && self.rng.percent(60) && size >= shape.cluster {
            let at = self.rng.below(size / shape.cluster) * shape.cluster;
            // Bytes that compress.
            return format!("write -c -P {} {at} {}", self.rng.range(1, 255), shape.cluster);
        }
        let subcluster = if shape.extended { shape.cluster / 32 } else { shape.cluster };
        let grain = *self.rng.pick(&[512, 4096, subcluster, shape.cluster, shape.cluster]);
        let slots = (size / grain).max(1);
        let at = if self.rng.percent(10) {
            size.saturating_sub(grain * self.rng.range(1, 3)).next_multiple_of(SECTOR)
        } else {
            self.rng.below(slots) * grain
        }
        .min(size - SECTOR);
        let kind = self.rng.below(100);
        let writes = kind < 62;
        let most = match (writes, shape.format == "qcow" && shape.overlay) {
            // A qcow over a backing file has clusters of one sector.
            (_, true) => 16 << 10,
            (true, _) => (shape.cluster * 64).min(1 << 20).max(shape.cluster),
            (false, _) => (size / 6).max(SECTOR),
        };
        let length = match self.rng.below(4) {
            0 => SECTOR * self.rng.range(1, 9),
            1 => grain,
            2 => grain * self.rng.range(1, 8),
            _ => self.rng.range(1, most),
        };
        let length = length.next_multiple_of(SECTOR).min(most).min(size - at).max(SECTOR);
        match kind {
            ..62 => {
                let pattern = self.rng.below(PATTERNS);
                format!("write -s @PATTERNS@/p{pattern} {at} {length}")
            }
            62..74 => format!("write -z {at} {length}"),
            74..82 => format!("write -z -u {at} {length}"),
            82..85 => format!("write -P 0 {at} {length}"),
            _ => format!("discard {at} {length}"),
        }
    }
}

/// Where tests make their files: below the target directory, or in IMGDM_TEST_DIR,
/// which may be on another file system.
fn test_dir() -> PathBuf {
    let target = || PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::env::var_os("IMGDM_TEST_DIR").map_or_else(target, PathBuf::from)
}

/// A directory for one test's files. It goes away with the value, unless it is kept.
///
/// # Errors
/// It can't be made.
pub(crate) fn scratch_dir(prefix: &str) -> Outcome<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(&format!("{prefix}-"))
        .tempdir_in(test_dir())
        .map_err(|error| format!("no directory for the test's files: {error}"))
}

/// Opens a file to patch it.
///
/// # Errors
/// It can't be opened.
pub(crate) fn open_to_patch(path: &Path) -> Outcome<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| format!("{}: {error}", path.display()))
}
