//! `imgdm verify`: does the device still give what the image says?

use std::io::Write;
use std::path::PathBuf;

use imgdm::chain::Chain;
use imgdm::device::Interrupt;
use imgdm::device::detach::find;
use imgdm::device::linux::LinuxKernel;
use imgdm::device::list::Attached;
use imgdm::device::name::DmName;
use imgdm::device::verify::{Finding, Verification, Verifier};
use imgdm::error::printable;
use imgdm::read::Ciphers;
use imgdm::source::FileId;
use imgdm::{Error, ErrorKind};

use super::key::{KeyArgs, KeySources, encrypted_layers};
use super::output::{JsonPath, OutputFormat, print_json, show_path, stdout};
use super::{Globals, signal, workers};

/// Say whether an attached device still gives what its image says
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm verify disk\n  imgdm verify --content ./disk.qcow2\n  imgdm verify --output=json disk | jq '.findings[].kind'\n\nReads the live tables back from the kernel and resolves the image anew, under the options\nthat it was attached with. Exits with 0 where both mean the same, with 1 where anything\ndiffers; the first difference of each kind is printed. What was inflated is compared byte by\nbyte, all else by where it lies; --content reads all of the device."
)]
pub(crate) struct Args {
    /// What to verify: a NAME, /dev/mapper/NAME, or the path of an image
    #[arg(value_name = "NAME|PATH")]
    target: PathBuf,

    /// Also read all of the device, and compare it with what imgdm itself reads in the image.
    /// Encrypted layers take their keys for that
    #[arg(long)]
    content: bool,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,

    #[command(flatten)]
    keys: KeyArgs,
}

#[derive(serde::Serialize)]
struct JsonReport {
    name: String,
    device: String,
    image: Option<JsonPath>,
    same: bool,
    /// All of the device was read.
    content: bool,
    /// Bytes that were read from the device or below it, and compared.
    bytes_read: u64,
    /// Bytes of partial last sectors that only the device still has.
    bytes_not_compared: u64,
    findings: Vec<JsonFinding>,
    notices: Vec<String>,
}

#[derive(serde::Serialize)]
struct JsonFinding {
    kind: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<JsonPath>,
    /// The first guest range, in bytes, and what the device and the image have for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    length: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device_has: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_says: Option<String>,
    /// Of all ranges of the kind: how many, and bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    ranges: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    workers::prepare()?;
    let key_sources = KeySources::new(&args.keys)?;
    if !args.content && key_sources.are_given() {
        let message = "only --content takes keys: without it, nothing is decrypted";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())).into());
    }
    let interrupt = signal::catch()?;
    let kernel = LinuxKernel::new();
    let attached = find(&kernel, &args.target, FileId::of_path(&args.target))?;
    let image = imgdm::open::is_path(args.target.as_os_str()).then_some(args.target.as_path());
    let verifier = Verifier::open(&kernel, attached.clone(), image)?;
    let ciphers = match verifier.chain().filter(|_| args.content) {
        None => None,
        Some(chain) => Some(unlock(chain, &attached, &key_sources, &interrupt)?),
    };
    drop(key_sources);
    let size = attached.size.to_bytes().unwrap_or(u64::MAX);
    let bar = globals.progress(size, "verifying");
    let tick = |done: u64| {
        // What is read is read in batches, behind what is compared.
        bar.set_position(done.max(bar.position()));
        interrupt.check()
    };
    let verified = verifier.run(ciphers.as_ref(), &tick);
    bar.finish_and_clear();
    let verified = verified?;
    match args.output {
        OutputFormat::Json => print_json(&report(&attached, &verified, args.content))?,
        OutputFormat::Human => print_human(&attached, &verified)?,
    }
    let name = printable(&attached.name);
    match verified.findings().len() {
        0 => Ok(()),
        1 => anyhow::bail!("'{name}' is not what its image says: a difference"),
        count => anyhow::bail!("'{name}' is not what its image says: {count} kinds of differences"),
    }
}

/// The ciphers of all layers that have to be decrypted.
fn unlock(
    chain: &Chain,
    attached: &Attached,
    sources: &KeySources,
    interrupt: &Interrupt<'_>,
) -> anyhow::Result<Ciphers> {
    let mut ciphers = Ciphers::new();
    let encrypted = encrypted_layers(chain);
    sources.check_all_used(&encrypted)?;
    // What can't be resolved is found, and reported, by the comparison.
    let needed =
        chain.keys_needed(chain.whole()).unwrap_or_else(|_| encrypted.into_iter().collect());
    for depth in needed {
        let layer = &chain.layers()[depth as usize];
        let Some(header) = layer.image.crypt_header()? else { continue };
        let name = DmName::new(&attached.name)?;
        let key = sources.unlock(Some(&name), depth, &header, &layer.source, interrupt)?;
        ciphers.insert(depth, &header, &key)?;
    }
    Ok(ciphers)
}

/// A finding that is not about a guest range, in words, with its file.
pub(crate) fn described(finding: &Finding) -> String {
    match &finding.path {
        // Some messages are an error's, which names its file itself.
        Some(path) if !finding.message.starts_with(&show_path(path)) => {
            format!("{}: {}", show_path(path), finding.message)
        }
        _ => finding.message.clone(),
    }
}

fn json_finding(finding: &Finding) -> JsonFinding {
    let of_range = |number: u64| finding.first.map(|_| number);
    JsonFinding {
        kind: finding.kind.name(),
        message: finding.message.clone(),
        file: finding.path.as_deref().map(JsonPath::from),
        guest_offset: finding.first.map(|range| range.start.get()),
        length: finding.first.map(|range| range.length().get()),
        device_has: finding.live.clone(),
        image_says: finding.fresh.clone(),
        ranges: of_range(finding.ranges),
        bytes: of_range(finding.bytes.get()),
    }
}

fn report(attached: &Attached, verified: &Verification, content: bool) -> JsonReport {
    JsonReport {
        name: attached.name.clone(),
        device: attached.path.display().to_string(),
        image: attached.image.as_ref().map(|image| JsonPath::from(image.path.as_path())),
        same: verified.is_same(),
        content,
        bytes_read: verified.bytes_read.get(),
        bytes_not_compared: verified.bytes_not_compared.get(),
        findings: verified.findings().iter().map(json_finding).collect(),
        notices: verified.notices().to_vec(),
    }
}

fn print_human(attached: &Attached, verified: &Verification) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let name = printable(&attached.name);
    let image = match &attached.image {
        Some(image) => show_path(&image.path),
        None => "its image".to_owned(),
    };
    let read = verified.bytes_read.get();
    if verified.is_same() {
        writeln!(
            out,
            "{name}: the same as {image} ({read} bytes compared, all else by its place)"
        )?;
    } else {
        writeln!(out, "{name}: differs from {image}")?;
    }
    for finding in verified.findings() {
        write!(out, "  {}: ", finding.kind.name())?;
        match finding.first {
            Some(first) => {
                let length = first.length().get();
                let message = &finding.message;
                writeln!(out, "guest offset {}, {length} bytes: {message}", first.start)?;
            }
            None => writeln!(out, "{}", described(finding))?,
        }
        if let (Some(live), Some(fresh)) = (&finding.live, &finding.fresh) {
            writeln!(out, "    the device has {live}\n    the image says {fresh}")?;
        }
        if finding.ranges > 1 {
            let (more, bytes) = (finding.ranges - 1, finding.bytes.get());
            writeln!(out, "    and {more} more such ranges, {bytes} bytes in all")?;
        }
    }
    if verified.bytes_not_compared.get() > 0 {
        let bytes = verified.bytes_not_compared.get();
        writeln!(
            out,
            "  note: {bytes} bytes lie in the partial last sector of a file that is gone, and were not compared"
        )?;
    }
    for notice in verified.notices() {
        writeln!(out, "  note: {notice}")?;
    }
    out.flush()?;
    Ok(())
}
