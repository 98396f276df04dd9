//! `imgdm diff`: where two snapshots, or an overlay and its base, differ.

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use imgdm::chain::Chain;
use imgdm::diff::{Comparison, Difference, State};
use imgdm::format::qcow2::SnapshotSelector;
use imgdm::open::{OpenPolicy, OpenedChain, Warning, open_chain};
use imgdm::source::FileId;
use imgdm::units::GuestOffset;
use imgdm::{Error, ErrorKind, Result};

use super::open::{OpenArgs, is_undeclared, print_warnings};
use super::output::{OutputFormat, show_path, stdout};
use super::progress::Progress;
use super::unlock::{UnlockArgs, Unlocked};
use super::{Globals, workers};

/// List the ranges in which two snapshots, or an overlay and its base, differ
///
/// With two -l: the first snapshot (A) and the second (B). With one: that snapshot (A) and
/// the active layer (B). With none: the image (B) and its base (A), which is its backing
/// file, or with --base a layer further down; listed is what the layers above the base hold.
///
/// Ranges differ where A and B have them from different places: the bytes may be the same,
/// which --content finds out by reading them. Where one disk is longer, the rest of it is
/// listed as such. Differences are no failure: the exit status is 0.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm diff -l monday -l tuesday disk.qcow2    two snapshots\n  imgdm diff -l monday --content disk.qcow2     what was changed since monday\n  imgdm diff --output=json overlay.qcow2        what the overlay holds on top of its base\n  imgdm diff --base 3 overlay.qcow2             the same for its three topmost layers"
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs<Snapshots>,

    /// Compare with this layer: its depth in the chain (1: the backing file) or its file
    #[arg(long, value_name = "DEPTH|FILE", conflicts_with = "snapshots")]
    base: Option<OsString>,

    /// Read what differs, and list only those sectors (of 512 bytes) whose bytes differ
    #[arg(long)]
    content: bool,

    #[command(flatten)]
    keys: UnlockArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// None, one or two snapshots.
#[derive(Clone, Debug, clap::Args)]
struct Snapshots {
    /// Compare this internal snapshot, by ID or else by name (also snapshot.id=ID,
    /// snapshot.name=NAME), with the active layer; given twice, the first with the second
    #[arg(short = 'l', long = "snapshot", value_name = "SNAP")]
    snapshots: Vec<SnapshotSelector>,
}

/// What is compared.
struct Disks {
    a: Chain,
    b: Chain,
    /// The depth of A where it is the base of B.
    base_at: Option<u32>,
    /// For people.
    names: (String, String),
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let unlocker = args.keys.unlocker()?;
    if !args.content && unlocker.is_given_keys() {
        let message = "only --content takes keys: without it, nothing is decrypted";
        return Err(usage(message.to_owned()).into());
    }
    let disks = open(args, globals)?;
    let Disks { a, b, base_at, .. } = &disks;
    let comparison = match base_at {
        None => Comparison::new(a, b),
        Some(depth) => Comparison::with_base(b, a, *depth),
    };
    let mut depths = std::collections::BTreeSet::new();
    if args.content {
        let (of_a, of_b) = comparison.keys_needed()?;
        depths.extend(of_b);
        depths.extend(of_a.iter().map(|depth| depth.saturating_add(base_at.unwrap_or(0))));
    }
    let unlocked = unlocker.unlock(b, &depths)?;
    workers::shut_main_thread();
    let mut printer: Box<dyn Printer> = match args.output {
        OutputFormat::Json => Box::new(Json { first: true }),
        OutputFormat::Human => {
            Box::new(Human { disks: &disks, content: args.content, ranges: 0, bytes: 0 })
        }
    };
    print(args, &comparison, &unlocked, printer.as_mut(), globals)
}

/// Opens what is to be compared.
fn open(args: &Args, globals: Globals) -> anyhow::Result<Disks> {
    let open_one = |snapshot: Option<&SnapshotSelector>| {
        // As for a map: nothing is given to a guest or a kernel here.
        let mut policy = OpenPolicy { probe_backing: true, ..args.open.policy_for(snapshot) };
        policy.reach.allowed.extend(args.base.as_ref().map(PathBuf::from));
        open_chain(&args.open.image, &policy)
    };
    let warn = |mut warnings: Vec<Warning>| {
        if args.open.probe_backing {
            warnings.retain(|warning| !is_undeclared(warning));
        }
        print_warnings(&warnings, globals);
    };
    let name = |chain: &Chain| {
        let layer = &chain.layers()[0];
        let path = show_path(layer.source.path());
        match layer.image.snapshot() {
            Some(snapshot) => {
                format!("{path}@{}", imgdm::error::printable(&snapshot.name))
            }
            None => path,
        }
    };
    let selected = &args.open.snapshots.snapshots;
    let (a, b, base_at) = match selected.as_slice() {
        [] => {
            let OpenedChain { chain, warnings } = open_one(None)?;
            warn(warnings);
            let depth = base_depth(&chain, args.base.as_deref())?;
            let base = chain.base(depth).context("there is no such layer")?;
            (base, chain, Some(depth))
        }
        [a, b @ ..] if b.len() < 2 => {
            let a = open_one(Some(a))?;
            let b = open_one(b.first())?;
            let more = |warning: &Warning| !a.warnings.contains(warning);
            let more: Vec<_> = b.warnings.iter().filter(|w| more(w)).cloned().collect();
            warn(a.warnings);
            warn(more);
            (a.chain, b.chain, None)
        }
        _ => return Err(usage("at most two snapshots can be compared".to_owned()).into()),
    };
    let names = (name(&a), name(&b));
    Ok(Disks { a, b, base_at, names })
}

fn usage(message: String) -> Error {
    Error::new(ErrorKind::Usage(message))
}

/// The depth of the base that is meant.
fn base_depth(chain: &Chain, given: Option<&OsStr>) -> Result<u32> {
    let layers = chain.layers();
    let image = layers[0].source.path();
    if layers.len() < 2 {
        let message = "it has no backing file to compare it with; -l SNAP compares it with one of its snapshots";
        return Err(usage(message.to_owned()).at_path(image));
    }
    let Some(given) = given else { return Ok(1) };
    let digits = given.to_str().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let depth = match digits {
        Some(digits) => digits.parse().ok().filter(|&depth| (1..layers.len()).contains(&depth)),
        None => {
            let wanted = FileId::of_path(Path::new(given));
            let same =
                |layer: &imgdm::chain::Layer| wanted.is_some() && layer.source.id() == wanted;
            layers.iter().skip(1).position(same).map(|index| index + 1)
        }
    };
    depth.and_then(|depth| u32::try_from(depth).ok()).ok_or_else(|| {
        let last = layers.len() - 1;
        let given = show_path(Path::new(given));
        usage(format!(
            "'{given}' is no layer below it: give its file, or its depth from 1 to {last} ({})",
            show_path(layers[last].source.path())
        ))
        .at_path(image)
    })
}

/// Prints the differences as they are found.
fn print(
    args: &Args,
    comparison: &Comparison<'_>,
    unlocked: &Unlocked,
    printer: &mut dyn Printer,
    globals: Globals,
) -> anyhow::Result<()> {
    let mut out = stdout()?;
    printer.start(&mut out)?;
    let size = comparison.whole().end.get();
    // Where stdout is a terminal too, the rows themselves show that it goes on.
    let shown = args.content && !std::io::stdout().is_terminal();
    let progress = Progress::start(shown, size, "comparing", globals);
    let tick = |done: GuestOffset| {
        progress.set(done.get());
        unlocked.interrupt.check()
    };
    let each = |difference: &Difference| {
        printer.print(difference, &mut out).map_err(|error| Error::io("cannot print", error))
    };
    let outcome = if args.content {
        comparison.for_each_content(&unlocked.ciphers, each, tick)
    } else {
        comparison.for_each_mapping(each, tick)
    };
    progress.finish();
    // Left open where it broke off: a reader that does not look at the exit status must
    // not take it for the whole.
    if outcome.is_ok() {
        printer.finish(size, &mut out)?;
    }
    out.flush()?;
    Ok(outcome?)
}

/// A form of output.
trait Printer: Send {
    fn start(&mut self, out: &mut dyn Write) -> std::io::Result<()>;
    fn print(&mut self, difference: &Difference, out: &mut dyn Write) -> std::io::Result<()>;
    fn finish(&mut self, size: u64, out: &mut dyn Write) -> std::io::Result<()>;
}

/// A row of `--output=json`.
#[derive(serde::Serialize)]
struct JsonRow {
    start: u64,
    length: u64,
    /// mapping, content, only-in-a or only-in-b.
    kind: &'static str,
    /// What A has there: data, compressed, encrypted or zero; none past its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    a: Option<&'static str>,
    /// What B has there.
    #[serde(skip_serializing_if = "Option::is_none")]
    b: Option<&'static str>,
}

struct Json {
    first: bool,
}

impl Printer for Json {
    fn start(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        out.write_all(b"[")
    }

    fn print(&mut self, difference: &Difference, out: &mut dyn Write) -> std::io::Result<()> {
        if !std::mem::take(&mut self.first) {
            out.write_all(b",\n")?;
        }
        let (a, b) = difference.kind.states();
        let row = JsonRow {
            start: difference.range.start.get(),
            length: difference.range.length().get(),
            kind: difference.kind.name(),
            a: a.map(State::name),
            b: b.map(State::name),
        };
        serde_json::to_writer(out, &row).map_err(std::io::Error::from)
    }

    fn finish(&mut self, _: u64, out: &mut dyn Write) -> std::io::Result<()> {
        out.write_all(b"]\n")
    }
}

struct Human<'d> {
    disks: &'d Disks,
    content: bool,
    ranges: u64,
    bytes: u64,
}

impl Printer for Human<'_> {
    fn start(&mut self, out: &mut dyn Write) -> std::io::Result<()> {
        writeln!(out, "{:<16}{:<16}{:<12}In B", "Offset", "Length", "In A")
    }

    fn print(&mut self, difference: &Difference, out: &mut dyn Write) -> std::io::Result<()> {
        let Difference { range, kind } = *difference;
        self.ranges += 1;
        self.bytes = self.bytes.saturating_add(range.length().get());
        let (a, b) = kind.states();
        let shown = |state: Option<State>| state.map_or("(past end)", State::name);
        let start = format!("{:#x}", range.start.get());
        let length = format!("{:#x}", range.length().get());
        writeln!(out, "{start:<16}{length:<16}{:<12}{}", shown(a), shown(b))
    }

    fn finish(&mut self, size: u64, out: &mut dyn Write) -> std::io::Result<()> {
        let Self { disks: Disks { names: (a, b), .. }, content, ranges, bytes } = self;
        // In thousandths, so that no disk is too large for it.
        let share = (u128::from(*bytes) * 1000).checked_div(u128::from(size)).unwrap_or(0);
        writeln!(
            out,
            "{ranges} {}, {bytes} bytes ({}.{} % of the disk), {} in\n  A: {a}\n  B: {b}",
            if *ranges == 1 { "range" } else { "ranges" },
            share / 10,
            share % 10,
            if *content { "differ" } else { "are mapped differently" },
        )
    }
}
