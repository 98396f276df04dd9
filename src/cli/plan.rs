//! `imgdm plan`: the preflight.

use std::io::Write;
use std::path::PathBuf;

use imgdm::chain::Chain;
use imgdm::device::memory;
use imgdm::error::printable;
use imgdm::open::{Warning, open_chain};
use imgdm::plan::{KernelMemory, Obstacle, ObstacleKind, Plan, PlannedCrypt, TableSource};
use imgdm::scratch::{Cache, Cacheable, FillOptions, ScratchPlace, ScratchWork};
use imgdm::status::FileRole;
use imgdm::worker::apart;

use super::Globals;
use super::memory::MemoryArgs;
use super::open::{FiemapArgs, OpenArgs, ZeroArgs, is_undeclared};
use super::output::{JsonPath, OutputFormat, print_json, show_path, stdout};
use super::scratch::{Compressed, ContentArgs, PlaceArgs};

/// Say whether an image can be attached, what stands in the way, and what it takes
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm plan disk.qcow2\n  imgdm plan --output=json disk.qcow2 | jq .attachable\n\nExits with 0 also where the image is not attachable: the answer is in what it prints."
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,

    #[command(flatten)]
    zero: ZeroArgs,

    #[command(flatten)]
    content: ContentArgs,

    #[command(flatten)]
    places: PlaceArgs,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    fiemap: FiemapArgs,
}

/// The JSON report.
#[derive(serde::Serialize)]
struct Report {
    attachable: bool,
    obstacles: Vec<JsonObstacle>,
    warnings: Vec<JsonWarning>,
    /// Bytes.
    virtual_size: u64,
    /// Over all tables.
    segments: u64,
    linear: u64,
    zero: u64,
    error: u64,
    crypt: u64,
    tables: usize,
    loops: u64,
    /// What compressed clusters and partial sectors take on disk, at most.
    scratch_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    scratch_dir: Option<JsonPath>,
    /// A file that is kept from an earlier attach is used again.
    scratch_cached: bool,
    /// The scratch file takes memory, which `kernel_bytes` counts.
    scratch_in_memory: bool,
    kernel_bytes: u64,
    /// What the largest table takes beside that while it is loaded.
    kernel_load_bytes: u64,
    /// What both may come to; null: any.
    kernel_limit_bytes: Option<u64>,
    keys: Vec<JsonKey>,
    layers: Vec<JsonLayer>,
}

#[derive(serde::Serialize)]
struct JsonObstacle {
    kind: &'static str,
    #[serde(flatten)]
    file: JsonPath,
    count: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_guest_offset: Option<u64>,
    message: String,
}

#[derive(serde::Serialize)]
struct JsonWarning {
    kind: &'static str,
    #[serde(flatten)]
    file: JsonPath,
    message: String,
}

/// A key that attaching takes.
#[derive(serde::Serialize)]
struct JsonKey {
    layer: u32,
    #[serde(flatten)]
    file: JsonPath,
    cipher: String,
    key_bytes: usize,
}

fn key(chain: &Chain, crypt: &PlannedCrypt) -> JsonKey {
    let layer = &chain.layers()[crypt.layer as usize];
    JsonKey {
        layer: crypt.layer,
        file: JsonPath::from(layer.source.absolute_path().as_path()),
        cipher: crypt.cipher.clone(),
        key_bytes: crypt.key_bytes,
    }
}

#[derive(serde::Serialize)]
struct JsonLayer {
    depth: usize,
    #[serde(flatten)]
    file: JsonPath,
    format: &'static str,
    /// Whether anybody said so: its overlay, or -f. Else it was probed.
    format_declared: bool,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<JsonPath>,
}

pub(crate) fn run(args: &Args, _globals: Globals) -> anyhow::Result<()> {
    let mut policy = args.open.policy();
    // Every obstacle at once: what attach refuses when it opens is listed here.
    policy.report_in_use = true;
    policy.probe_backing = true;
    policy.allow_corrupt = true;
    policy.allow_changed_backing = true;
    policy.past_damage = true;
    args.fiemap.apply(&mut policy);
    let opened = open_chain(&args.open.image, &policy)?;
    let mut plan = apart(|| Plan::new(&opened.chain, args.content.options(args.zero)))?;
    plan.add_obstacles_of(&opened.warnings, &args.open.policy());
    let scratch = Scratch::of(&mut plan, args)?;
    let (limit, available) = (args.memory.limit(), memory::available());
    if let Err(error) = limit.check(KernelMemory::of(&plan), available) {
        let mut obstacle = Obstacle::of_file(ObstacleKind::KernelMemory, &args.open.image);
        obstacle.detail = Some(error.kind().to_string());
        plan.add_obstacle(obstacle);
    }
    let limit = limit.bytes(available);
    let probing_allowed = args.open.probe_backing;
    let report = report(&opened.chain, &plan, &opened.warnings, probing_allowed, (scratch, limit));
    match args.output {
        OutputFormat::Json => print_json(&report),
        OutputFormat::Human => print_human(&report, &plan),
    }
}

/// Where the scratch file would lie.
#[derive(Default)]
struct Scratch {
    bytes: u64,
    directory: Option<PathBuf>,
    in_memory: bool,
    /// A kept file will be used again.
    cached: bool,
}

impl Scratch {
    /// The place for what `plan` wants written; where there is none, that is an obstacle.
    fn of(plan: &mut Plan<'_>, args: &Args) -> imgdm::Result<Self> {
        let (bytes, length) = (plan.scratch_bytes(), plan.scratch_length());
        if bytes == 0 {
            return Ok(Self::default());
        }
        let place = match cache(plan, args)? {
            Some(cache) if cache.lookup().is_some() => {
                return Ok(Self { cached: true, ..Self::default() });
            }
            Some(cache) => cache.check_place(bytes, length),
            None => ScratchPlace::choose(args.places.scratch_dir.as_deref())
                .and_then(|place| place.check_room(bytes, length).map(|()| place)),
        };
        Ok(match place {
            Ok(place) => Self {
                bytes,
                directory: Some(place.directory().to_owned()),
                in_memory: place.in_memory(),
                cached: false,
            },
            Err(error) => {
                let path = error.path().unwrap_or(&args.open.image).to_owned();
                let mut obstacle = Obstacle::of_file(ObstacleKind::NoScratch, &path);
                obstacle.detail = Some(error.kind().to_string());
                plan.add_obstacle(obstacle);
                Self { bytes, ..Self::default() }
            }
        })
    }
}

/// The place of the kept file; none where none is asked for, or can be kept for this chain.
fn cache(plan: &Plan<'_>, args: &Args) -> imgdm::Result<Option<Cache>> {
    if args.content.compressed != Compressed::Cache {
        return Ok(None);
    }
    let run = FillOptions::SHORTEST_ZERO_RUN;
    Ok(match Cache::of(Some(&args.places.cache_dir), plan.chain(), plan, run)? {
        Cacheable::Yes(cache) => Some(cache),
        Cacheable::No(_) => None,
    })
}

fn report(
    chain: &Chain,
    plan: &Plan<'_>,
    warnings: &[Warning],
    probing_allowed: bool,
    (scratch, kernel_limit_bytes): (Scratch, Option<u64>),
) -> Report {
    let counts = plan.counts();
    let memory = KernelMemory::of(plan);
    let obstacle = |obstacle: &Obstacle| JsonObstacle {
        kind: obstacle.kind.name(),
        file: JsonPath::from(obstacle.path.as_path()),
        count: obstacle.count,
        first_guest_offset: obstacle.first.map(|first| first.get()),
        message: obstacle.to_string(),
    };
    let mut json_warnings: Vec<_> = warnings
        .iter()
        .filter(|warning| !(probing_allowed && is_undeclared(warning)))
        .map(|warning| JsonWarning {
            kind: warning.kind.name(),
            file: JsonPath::from(warning.path.as_path()),
            message: warning.kind.to_string(),
        })
        .collect();
    json_warnings.extend(plan.damage().iter().map(|damage| JsonWarning {
        kind: damage.kind.name(),
        file: JsonPath::from(damage.path.as_path()),
        message: damage.to_string(),
    }));
    json_warnings.extend(plan.unheld_files().map(|file| JsonWarning {
        kind: "not-held",
        file: JsonPath::from(file.path()),
        message: "a file under 512 bytes can't be held by a loop device: nothing keeps it from being changed while the image is attached".to_owned(),
    }));
    let layers = chain
        .layers()
        .iter()
        .enumerate()
        .map(|(depth, layer)| JsonLayer {
            depth,
            file: JsonPath::from(layer.source.absolute_path().as_path()),
            format: layer.image.format().name(),
            format_declared: layer.declared_format.is_some(),
            virtual_size: layer.image.virtual_size().get(),
            data_file: layer
                .data_file
                .as_ref()
                .map(|_| JsonPath::from(layer.file(FileRole::DataFile).absolute_path().as_path())),
        })
        .collect();
    Report {
        attachable: plan.obstacles().is_empty(),
        obstacles: plan.obstacles().iter().map(obstacle).collect(),
        warnings: json_warnings,
        virtual_size: chain.virtual_size().get(),
        segments: counts.total(),
        linear: counts.linear,
        zero: counts.zero,
        error: counts.error,
        crypt: counts.crypt,
        tables: plan.tables().len(),
        loops: plan.loops(),
        scratch_bytes: scratch.bytes,
        scratch_cached: scratch.cached,
        scratch_dir: scratch.directory.as_deref().map(JsonPath::from),
        scratch_in_memory: scratch.in_memory,
        kernel_bytes: memory.kept + if scratch.in_memory { scratch.bytes } else { 0 },
        kernel_load_bytes: memory.loading,
        kernel_limit_bytes,
        keys: plan.crypts().iter().map(|crypt| key(chain, crypt)).collect(),
        layers,
    }
}

fn print_human(report: &Report, plan: &Plan<'_>) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let yes_no = if report.attachable { "yes" } else { "no" };
    writeln!(out, "attachable:    {yes_no}")?;
    for obstacle in plan.obstacles() {
        writeln!(out, "  obstacle:    {obstacle}")?;
    }
    for warning in &report.warnings {
        writeln!(out, "  warning:     {}: {}", warning.file.shown(), warning.message)?;
    }
    writeln!(out, "virtual size:  {} bytes", report.virtual_size)?;
    write!(out, "segments:      {} ({} linear", report.segments, report.linear)?;
    let counts = [("zero", report.zero), ("error", report.error), ("crypt", report.crypt)];
    for (target, count) in counts {
        if count > 0 || target == "zero" {
            write!(out, ", {count} {target}")?;
        }
    }
    writeln!(out, ")")?;
    writeln!(out, "tables:        {}", report.tables)?;
    writeln!(out, "loop devices:  {}", report.loops)?;
    write!(out, "scratch space: {} bytes", report.scratch_bytes)?;
    if let Some(directory) = &report.scratch_dir {
        let memory = if report.scratch_in_memory { " (memory)" } else { "" };
        write!(out, " in {}{memory}", directory.shown())?;
    }
    if report.scratch_cached {
        write!(out, " (a kept file is used again)")?;
    }
    writeln!(out)?;
    for key in &report.keys {
        let (layer, cipher) = (key.layer, printable(&key.cipher));
        writeln!(out, "key:           of layer {layer} ({cipher})")?;
    }
    let (kept, loading) = (report.kernel_bytes, report.kernel_load_bytes);
    let limit = report.kernel_limit_bytes.map_or("none".to_owned(), |limit| limit.to_string());
    writeln!(
        out,
        "kernel memory: {kept} bytes (estimated), {loading} more while loading; limit {limit}"
    )?;
    writeln!(out, "layers:")?;
    for (layer, json) in plan.chain().layers().iter().zip(&report.layers) {
        let path = show_path(&layer.source.absolute_path());
        writeln!(out, "  {:<5}{:<7}{path}", json.depth, json.format)?;
        if let Some(data_file) = &layer.data_file {
            writeln!(out, "       data   {}", show_path(&data_file.absolute_path()))?;
        }
    }
    out.flush()?;
    Ok(())
}
