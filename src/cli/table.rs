//! `imgdm table`: the tables, without loading them.

use std::io::Write;

use anyhow::Context;
use imgdm::chain::Chain;
use imgdm::device::name::DmName;
#[cfg(feature = "device")]
use imgdm::hash::Digest;
use imgdm::open::open_chain;
use imgdm::plan::{
    Backing, BackingId, Bindings, CryptId, Plan, SegmentTarget, TableId, TableSource,
};
use imgdm::source::Source;
use imgdm::table::{CryptKey, DeviceRef};
use imgdm::{Error, ErrorKind};

use super::open::{FiemapArgs, OpenArgs, ZeroArgs, print_warnings};
use super::output::{JsonPath, OutputFormat, show_path, stdout};
use super::scratch::ContentArgs;
use super::{Globals, workers};

/// Print the device-mapper tables of an image without loading them
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm table disk.qcow2\n  imgdm table --loops /dev/loop0,/dev/loop1 disk.qcow2\n\nIn the human form a comment line names each backing; @N stands for its device.\nOffsets and lengths are sectors of 512 bytes."
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,

    /// Name of the device; without it, made of the image's name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Devices to print for @0, @1 and so on
    #[arg(long, value_name = "DEVICE", value_delimiter = ',')]
    loops: Vec<String>,

    #[command(flatten)]
    zero: ZeroArgs,

    #[command(flatten)]
    content: ContentArgs,

    #[command(flatten)]
    fiemap: FiemapArgs,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let mut policy = args.open.policy();
    args.fiemap.apply(&mut policy);
    let opened = open_chain(&args.open.image, &policy)?;
    print_warnings(&opened.warnings, globals);
    workers::shut_main_thread();
    let plan = Plan::new(&opened.chain, args.content.options(args.zero))?;
    plan.check_attachable().map_err(|error| error.at_path(&args.open.image))?;
    let name = device_name(&opened.chain, args.name.as_deref())?;
    match args.output {
        OutputFormat::Json => print_json(&plan, &name),
        OutputFormat::Human => print_human(&plan, &name, &args.loops),
    }
}

/// The device's name: the given one, or the image's with its snapshot's.
pub(crate) fn device_name(chain: &Chain, given: Option<&str>) -> anyhow::Result<DmName> {
    if let Some(given) = given {
        return Ok(DmName::new(given)?);
    }
    let layer = &chain.layers()[0];
    let snapshot = layer.image.snapshot().map(|snapshot| snapshot.name.as_str());
    DmName::from_image(layer.source.path(), snapshot)
        .context("the image's name makes no device name; give one with --name")
}

fn print_human(plan: &Plan<'_>, name: &DmName, loops: &[String]) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let mut bindings = Bindings::default();
    let takes_device = |backing: &&Backing| !matches!(backing, Backing::Table(_));
    let wanted = plan.backings().iter().filter(takes_device).count();
    if loops.len() > wanted {
        return Err(Error::new(ErrorKind::Usage(format!(
            "--loops names {} devices, but there are {wanted} backings",
            loops.len()
        )))
        .into());
    }
    bind_ciphers(plan, &mut bindings);
    let mut given = loops.iter();
    for (backing, id) in plan.backings().iter().zip((0..).map(BackingId)) {
        let device = match backing {
            Backing::File { .. } | Backing::Zero { .. } | Backing::Scratch { .. } => given.next(),
            Backing::Table(_) => None,
        };
        let device = device.cloned().unwrap_or_else(|| format!("@{}", id.0));
        let what = match backing {
            Backing::File { .. } => {
                plan.file(id).map(|file| show_path(&file.absolute_path())).unwrap_or_default()
            }
            Backing::Zero { length } => format!("{length} sectors of zeros"),
            Backing::Scratch { length } => format!("a scratch file of {length} sectors"),
            Backing::Table(table) => format!("table {}", table.0),
        };
        writeln!(out, "# {device}: {what}")?;
        bindings.bind(id, DeviceRef::new(device)?);
    }
    for (table, id) in plan.tables().iter().zip((0..).map(TableId)) {
        if plan.tables().len() > 1 {
            writeln!(out, "# table {} ({})", id.0, table.role.name())?;
        } else {
            writeln!(out, "# {}", name.as_str())?;
        }
        write_lines(plan, id, &bindings, &mut out)?;
    }
    out.flush()?;
    Ok(())
}

fn write_lines(
    plan: &Plan<'_>,
    table: TableId,
    bindings: &Bindings,
    out: &mut dyn Write,
) -> imgdm::Result<()> {
    plan.for_each_segment(table, &mut |segment| {
        let line = bindings.line(&segment)?;
        writeln!(out, "{line}").map_err(|error| Error::io("cannot print", error))
    })
}

/// sha256 of all lines that are printed for people and are no comments: where a line names a
/// backing, not a device, so that it is the same wherever and whenever it is made.
#[cfg(feature = "device")]
pub(crate) fn table_digest(plan: &Plan<'_>) -> imgdm::Result<Digest> {
    struct Hashing(sha2::Sha256);
    impl Write for Hashing {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            sha2::Digest::update(&mut self.0, bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut bindings = Bindings::default();
    bind_ciphers(plan, &mut bindings);
    for (_, id) in plan.backings().iter().zip((0..).map(BackingId)) {
        bindings.bind(id, DeviceRef::new(format!("@{}", id.0))?);
    }
    let mut hashing = std::io::BufWriter::new(Hashing(sha2::Sha256::default()));
    for (_, id) in plan.tables().iter().zip((0..).map(TableId)) {
        write_lines(plan, id, &bindings, &mut hashing)?;
    }
    let hashing = hashing.into_inner().map_err(|error| Error::io("cannot hash", error.into()))?;
    Ok(Digest::from(hashing.0))
}

/// Where attach would have a key, the layer that it is of.
fn bind_ciphers(plan: &Plan<'_>, bindings: &mut Bindings) {
    for (crypt, id) in plan.crypts().iter().zip((0..).map(CryptId)) {
        let description = format!("imgdm:KEY-OF-LAYER-{}", crypt.layer);
        let key = CryptKey::Keyring { size: crypt.key_bytes, description };
        bindings.bind_cipher(id, crypt.cipher.clone(), key);
    }
}

#[derive(serde::Serialize)]
struct JsonBacking {
    id: u32,
    kind: &'static str,
    #[serde(flatten)]
    file: Option<JsonPath>,
    #[serde(skip_serializing_if = "Option::is_none")]
    table: Option<u32>,
    /// Sectors, of a backing of zeros and of the scratch file.
    #[serde(skip_serializing_if = "Option::is_none")]
    sectors: Option<u64>,
}

#[derive(serde::Serialize)]
struct JsonSegment {
    start: u64,
    length: u64,
    target: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    /// dm-crypt's name of the cipher.
    #[serde(skip_serializing_if = "Option::is_none")]
    cipher: Option<String>,
    /// The layer whose key it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    key_of_layer: Option<u32>,
}

fn json_backings(plan: &Plan<'_>) -> Vec<JsonBacking> {
    let with_ids = plan.backings().iter().zip((0..).map(BackingId));
    with_ids
        .map(|(backing, id)| {
            let mut json =
                JsonBacking { id: id.0, kind: "file", file: None, table: None, sectors: None };
            match backing {
                Backing::File { .. } => {
                    let file = plan.file(id);
                    let is_block = file.is_some_and(Source::is_block_device);
                    json.kind = if is_block { "block" } else { "file" };
                    json.file = file.map(|file| JsonPath::from(file.absolute_path().as_path()));
                }
                Backing::Zero { length } => {
                    json.kind = "zero";
                    json.sectors = Some(length.get());
                }
                Backing::Scratch { length } => {
                    json.kind = "scratch";
                    json.sectors = Some(length.get());
                }
                Backing::Table(table) => {
                    json.kind = "table";
                    json.table = Some(table.0);
                }
            }
            json
        })
        .collect()
}

/// Written piece by piece: a table can have a million segments.
fn print_json(plan: &Plan<'_>, name: &DmName) -> anyhow::Result<()> {
    let mut out = stdout()?;
    write!(out, "{{\"version\": 1, \"name\": ")?;
    serde_json::to_writer(&mut out, name.as_str()).map_err(std::io::Error::from)?;
    write!(out, ", \"sectors\": {},\n\"backings\": ", plan.size())?;
    serde_json::to_writer(&mut out, &json_backings(plan)).map_err(std::io::Error::from)?;
    write!(out, ",\n\"tables\": [")?;
    for (table, id) in plan.tables().iter().zip((0..).map(TableId)) {
        let comma = if id.0 == 0 { "" } else { "," };
        write!(
            out,
            "{comma}\n{{\"id\": {}, \"role\": \"{}\", \"segments\": [",
            id.0,
            table.role.name()
        )?;
        let mut first = true;
        plan.for_each_segment(id, &mut |segment| {
            let mut json = JsonSegment {
                start: segment.start.get(),
                length: segment.length.get(),
                target: "zero",
                backing: None,
                offset: None,
                cipher: None,
                key_of_layer: None,
            };
            match segment.target {
                SegmentTarget::Zero => {}
                SegmentTarget::Error => json.target = "error",
                SegmentTarget::Linear { backing, offset } => {
                    json.target = "linear";
                    (json.backing, json.offset) = (Some(backing.0), Some(offset.get()));
                }
                SegmentTarget::Crypt { backing, crypt } => {
                    json.target = "crypt";
                    (json.backing, json.offset) = (Some(backing.0), Some(0));
                    let planned = plan.crypts().get(crypt.0 as usize);
                    json.cipher = planned.map(|planned| planned.cipher.clone());
                    json.key_of_layer = planned.map(|planned| planned.layer);
                }
            }
            let mut print = || -> std::io::Result<()> {
                out.write_all(if std::mem::take(&mut first) { b"\n" } else { b",\n" })?;
                serde_json::to_writer(&mut out, &json).map_err(std::io::Error::from)
            };
            print().map_err(|error| Error::io("cannot print", error))
        })?;
        write!(out, "]}}")?;
    }
    writeln!(out, "]}}")?;
    out.flush()?;
    Ok(())
}
