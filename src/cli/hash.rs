//! `imgdm hash`: the virtual disk's sha256 and BLAKE3, without attaching it.

use std::collections::BTreeSet;
use std::io::Write;

use clap::ValueEnum;
use imgdm::hash::{Algorithm, Digests};
use imgdm::lock::Sharing;
use imgdm::units::ByteLen;

use super::open::OpenArgs;
use super::output::{JsonPath, OutputFormat, print_json, show_path, stdout};
use super::progress::Progress;
use super::stamps::Stamps;
use super::unlock::UnlockArgs;
use super::{Globals, workers};

/// Print the sha256 and the BLAKE3 of the virtual disk, without attaching it
///
/// What is hashed is what the guest sees, as long as its disk: the same bytes as of the
/// device that attach makes, or of a raw copy by qemu-img convert. It is not the hash of the
/// image's file; so that nothing checks that one against it, the lines are not sha256sum's.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm hash disk.qcow2\n  imgdm hash --algorithm=sha256 -l before-update disk.qcow2\n  imgdm hash --output=json disk.qcow2 | jq -r .hashes.sha256\n\nPrints ALGORITHM:HEX and the image. It is an error if the image is written to meanwhile."
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// Only this hash; without it, both
    #[arg(long, value_enum, value_name = "NAME")]
    algorithm: Option<AlgorithmChoice>,

    #[command(flatten)]
    keys: UnlockArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum AlgorithmChoice {
    /// As sha256sum
    Sha256,
    /// As b3sum
    Blake3,
}

#[derive(serde::Serialize)]
struct Report {
    image: JsonPath,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<JsonSnapshot>,
    /// Bytes of the disk, all of which are hashed.
    virtual_size: u64,
    /// In hex, by the function's name: sha256, blake3.
    hashes: std::collections::BTreeMap<&'static str, String>,
}

#[derive(serde::Serialize)]
struct JsonSnapshot {
    id: String,
    name: String,
}

impl Args {
    fn algorithms(&self) -> BTreeSet<Algorithm> {
        match self.algorithm {
            None => [Algorithm::Sha256, Algorithm::Blake3].into(),
            Some(AlgorithmChoice::Sha256) => [Algorithm::Sha256].into(),
            Some(AlgorithmChoice::Blake3) => [Algorithm::Blake3].into(),
        }
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let unlocker = args.keys.unlocker()?;
    let chain = args.open.open_to_read(globals)?;
    let stamps = match args.open.policy().sharing {
        Sharing::Readers => Some(Stamps::of(&chain)?),
        Sharing::Writers => None,
    };
    let unlocked = unlocker.unlock(&chain, &chain.keys_needed(chain.whole())?)?;
    workers::shut_main_thread();
    let size = chain.virtual_size().get();
    let progress = Progress::start(true, size, "hashing", globals);
    let tick = |done: ByteLen| {
        progress.set(done.get());
        unlocked.interrupt.check()
    };
    let hashed = chain.hash(&unlocked.ciphers, &args.algorithms(), &tick);
    progress.finish();
    let digests = hashed?;
    if let Some(stamps) = stamps {
        stamps.check(&chain)?;
    }
    let active = &chain.layers()[0];
    let snapshot = active.image.snapshot();
    match args.output {
        OutputFormat::Json => print_json(&Report {
            image: JsonPath::from(active.source.path()),
            snapshot: snapshot.map(|snapshot| JsonSnapshot {
                id: snapshot.id.clone(),
                name: snapshot.name.clone(),
            }),
            virtual_size: size,
            hashes: digests.iter().map(|(name, hash)| (name.name(), hash.to_string())).collect(),
        }),
        OutputFormat::Human => {
            let mut name = show_path(active.source.path());
            if let Some(snapshot) = snapshot {
                name = format!("{name}@{}", imgdm::error::printable(&snapshot.name));
            }
            print_human(&digests, &name)
        }
    }
}

fn print_human(digests: &Digests, name: &str) -> anyhow::Result<()> {
    let mut out = stdout()?;
    for (algorithm, digest) in digests {
        writeln!(out, "{}:{digest}  {name}", algorithm.name())?;
    }
    out.flush()?;
    Ok(())
}
