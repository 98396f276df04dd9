//! `imgdm convert`: a disk copied into a new image.

mod meter;

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use imgdm::chain::Chain;
use imgdm::convert::copy::{CopyOptions, DEFAULT_SPARSE, Summary, copy};
use imgdm::convert::create::{DataFile, NewImage, StoredBacking};
use imgdm::convert::input::{Base, ChainInput};
use imgdm::convert::options::{FormatOptions, Preallocation};
use imgdm::convert::qcow::QcowWriter;
use imgdm::convert::qcow2::Qcow2Writer;
use imgdm::convert::raw::RawWriter;
use imgdm::convert::reflink::{Offloads, Reflink};
use imgdm::convert::target::{Target, refuse_files};
use imgdm::convert::{ImageWriter, Input};
use imgdm::device::Interrupt;
use imgdm::device::blocks::KernelBlocks;
use imgdm::format::Format;
use imgdm::format::qcow2::Compression;
use imgdm::lock::Sharing;
use imgdm::open::{LocalName, OpenPolicy, OpenedChain, open_chain, resolve_beside};
use imgdm::read::Ciphers;
use imgdm::source::{FileId, Source};
use imgdm::{Error, ErrorKind, Result};

use super::Globals;
use super::open::{OpenArgs, is_undeclared, parse_size, print_warnings};
use super::output::{JsonPath, OutputFormat, human_size, print_json, show_path, stdout};
use super::stamps::Stamps;
use super::unlock::UnlockArgs;
pub(super) use meter::Meter;

/// Copy a disk into a new image: raw, qcow2 or qcow
///
/// As qemu-img convert, for local files. OUT is written beside its name, and has the name only
/// once it is finished and on the disk: whatever happens meanwhile, nothing half is left, and
/// what was there stays. On file systems with shared blocks (XFS, btrfs) what is aligned is
/// not copied but shared: it takes no time and no space.
///
/// With -B, OUT is a copy-on-write image of BASE. Where BASE is a layer of IMAGE's own chain,
/// what lies above it is copied. Else BASE takes the place of IMAGE's backing file, of which it
/// is taken to have the content: so is an image re-based whose base was moved or renamed.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm convert -O qcow2 -c disk.qcow2 small.qcow2\n  imgdm convert disk.qcow2 disk.raw\n  imgdm convert -O qcow2 -B base.qcow2 -F qcow2 disk.qcow2 rebased.qcow2\n  imgdm convert -O qcow2 -o cluster_size=1M,preallocation=metadata disk.raw disk.qcow2\n  imgdm convert --force -l before-update disk.qcow2 /dev/vg/lv\n  imgdm convert -O qcow2 -o help"
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// The new image: a file that is not there yet, or, with --force, one that is to be
    /// replaced or a block device
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// Format of OUT (raw, qcow2, qcow)
    #[arg(short = 'O', long, value_name = "FMT", default_value = "raw", value_parser = parse_output_format)]
    output_format: Format,

    /// Make OUT a copy-on-write image of BASE, which OUT names as it is given here: seen from
    /// the directory of OUT
    #[arg(short = 'B', long, value_name = "BASE")]
    base: Option<PathBuf>,

    /// Format of BASE (raw, qcow2, qcow, cow); needed unless IMAGE's own chain says it
    #[arg(short = 'F', long, value_name = "FMT", requires = "base")]
    base_format: Option<Format>,

    /// Compress the clusters (qcow2, qcow)
    #[arg(short, long)]
    compress: bool,

    /// Options of OUT's format, NAME=VALUE,...; 'help' lists them
    #[arg(short = 'o', long = "options", value_name = "OPTIONS", value_parser = OptionsParser)]
    format_options: Vec<String>,

    /// Leave out so many zeros in a row, a multiple of 512; 0 writes all of them
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4k", value_parser = parse_sparse)]
    sparse: u64,

    /// Share blocks with IMAGE instead of copying them: where the file system can, always (or
    /// it is an error), or never
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    reflink: ReflinkChoice,

    /// Replace OUT if it is there; write to OUT if it is a block device
    #[arg(long)]
    force: bool,

    /// Print how far it is in percent, as lines on stderr
    #[arg(short, long)]
    progress: bool,

    /// Threads that copy; without it, one for each core
    #[arg(short = 'm', long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// When OUT has to be on the disk
    #[arg(short = 't', long, value_enum, default_value_t, value_name = "CACHE")]
    cache: Cache,

    /// Taken for the sake of scripts: writes are always out of order
    #[arg(short = 'W', hide = true)]
    out_of_order: bool,

    #[command(flatten)]
    keys: UnlockArgs,

    /// Print what was done
    #[arg(long, value_enum, value_name = "FORMAT")]
    output: Option<OutputFormat>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ReflinkChoice {
    /// Where the file system can
    #[default]
    Auto,
    /// All that is aligned, or it is an error
    Always,
    /// Copy everything
    Never,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Cache {
    /// Once the command ends
    #[default]
    Writeback,
    /// Some time: as by qemu-img, a power failure after the command loses it
    Unsafe,
}

/// Most zeros that can be asked for: as by qemu-img.
const MAX_SPARSE: u64 = 16 << 20;

fn parse_sparse(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes % 512 != 0 || bytes > MAX_SPARSE {
        return Err("not a multiple of 512 up to 16M, or 0".to_owned());
    }
    Ok(bytes)
}

/// A format that is written: more of them are read.
fn parse_output_format(text: &str) -> Result<Format, String> {
    text.parse().map_err(|_| "not a format that imgdm writes (raw, qcow2, qcow)".to_owned())
}

static HELP: OnceLock<String> = OnceLock::new();

/// What `-o help` is answered with, once it was asked.
pub(crate) fn help_asked_for() -> Option<&'static str> {
    HELP.get().map(String::as_str)
}

/// Takes any text, but for one that asks for help: that gets it, whatever else is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptionsParser;

impl clap::builder::TypedValueParser for OptionsParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        let text = clap::builder::StringValueParser::new().parse_ref(command, argument, value)?;
        if FormatOptions::asks_for_help(&[&text]) {
            let of = |format: Format| {
                let help = FormatOptions::help(format).unwrap_or_default();
                format!("-O {format}:\n{help}")
            };
            let all = [Format::Qcow2, Format::Raw, Format::Qcow].map(of).join("\n");
            let _ = HELP.set(all);
            return Err(clap::Error::new(clap::error::ErrorKind::DisplayHelp));
        }
        Ok(text)
    }
}

#[derive(serde::Serialize)]
struct Report {
    output: JsonPath,
    format: &'static str,
    /// Bytes of the disk.
    virtual_size: u64,
    /// Bytes of the disk that were copied as they are.
    copied: u64,
    /// Bytes of the disk whose blocks are shared with the input.
    cloned: u64,
    /// Bytes of the disk that were compressed.
    compressed: u64,
    /// Zeros that were not written.
    zeros: u64,
    /// Bytes that the file system has allocated to the file; shared ones count.
    allocated: Option<u64>,
}

/// The output's backing file.
struct Backing {
    stored: StoredBacking,
    /// Its layer in the input's chain, or its own chain.
    place: Place,
}

enum Place {
    Layer(u32),
    Other(Chain),
}

impl Backing {
    /// Its chain, where that is not the input's.
    fn own_chain(&self) -> Option<&Chain> {
        match &self.place {
            Place::Layer(_) => None,
            Place::Other(chain) => Some(chain),
        }
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let options = FormatOptions::parse(args.output_format, &args.format_options)?;
    options.check(args.compress, args.base.is_some())?;
    if args.compress && args.reflink == ReflinkChoice::Always {
        let message = "-c compresses what --reflink=always is to share: leave one of them out";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())).into());
    }
    let unlocker = args.keys.unlocker()?;
    let interrupt = catch_signals()?;
    let chain = args.open_input(globals)?;
    let backing = args.base.as_deref().map(|base| args.backing(base, &chain, globals));
    let backing = backing.transpose()?;

    let chains = [Some(&chain), backing.as_ref().and_then(Backing::own_chain)];
    let chains: Vec<&Chain> = chains.into_iter().flatten().collect();
    let stamps: Vec<Stamps> = match args.open.policy().sharing {
        Sharing::Readers => chains.iter().copied().map(Stamps::of).collect::<Result<_>>()?,
        Sharing::Writers => Vec::new(),
    };
    let needed = args.keys_needed(&chain, backing.as_ref(), &options)?;
    let unlocked = unlocker.unlock(&chain, &needed)?;
    let no_keys = Ciphers::new();
    let base = backing.as_ref().map(|backing| match &backing.place {
        Place::Layer(depth) => Base::Layer(*depth),
        Place::Other(chain) => Base::Other { chain, ciphers: &no_keys },
    });
    let input = ChainInput::new(&chain, &unlocked.ciphers, base)?;
    let job = Job { args, options: &options, input: &input, backing: backing.as_ref(), interrupt };
    let data_name = options.data_file().map(|name| resolve_beside(&args.out, Path::new(name)));
    for name in [Some(&args.out), data_name.as_ref()].into_iter().flatten() {
        for chain in &chains {
            refuse_files(name, files_of(chain))?;
        }
    }
    let mut target = Target::create(&args.out, args.force)?;
    let mut data = data_name.map(|name| Target::create(&name, args.force)).transpose()?;
    if let Some(data) = data.as_ref().filter(|data| data.is_same_place(&target)) {
        let message = "the image can't be its own data file: give that another name";
        return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(data.name()).into());
    }
    let summary = job.copy(&target, data.as_ref(), globals)?;
    for (stamps, chain) in stamps.iter().zip(&chains) {
        stamps.check(chain)?;
    }
    let sync = args.cache == Cache::Writeback;
    for target in data.as_mut().into_iter().chain([&mut target]) {
        target.prepare(sync)?;
    }
    // Writing out may have taken long.
    interrupt.check()?;
    give_names(data.as_mut(), &mut target, sync, args.force)?;
    args.print(&target, input.size().get(), summary)
}

/// Gives the data file and the image their names: both, or none where nothing was there.
fn give_names(
    mut data: Option<&mut Target>,
    image: &mut Target,
    sync: bool,
    force: bool,
) -> Result<()> {
    let mut commit = || {
        data.as_mut().map_or(Ok(()), |data| data.commit(sync))?;
        image.commit(sync)
    };
    let committed = commit();
    if committed.is_err()
        && !image.is_committed()
        && let Some(data) = data.filter(|data| data.is_committed() && !force)
    {
        // Nothing was there, and without the image it is of no use.
        let _ = std::fs::remove_file(data.name());
    }
    committed
}

fn files_of(chain: &Chain) -> impl Iterator<Item = &Source> {
    chain.layers().iter().flat_map(|layer| layer.files()).map(|(_, file)| file.as_ref())
}

/// From now on signals set a flag, so that what is half done can be taken back.
pub(super) fn catch_signals() -> anyhow::Result<Interrupt<'static>> {
    #[cfg(feature = "device")]
    {
        // A limit of the file's size is to be an error, not the end.
        let ignored = std::sync::Arc::default();
        signal_hook::flag::register(nix::libc::SIGXFSZ, ignored)?;
        super::signal::catch()
    }
    #[cfg(not(feature = "device"))]
    Ok(Interrupt::never())
}

impl Args {
    /// Opens the image; where its own backing file is gone, over the base, which takes its
    /// place.
    fn open_input(&self, globals: Globals) -> anyhow::Result<Chain> {
        let base = match &self.base {
            None => None,
            Some(base) => {
                let name = LocalName::parse(base.as_os_str().as_bytes())?;
                Some((base, resolve_beside(&self.out, &name.path)))
            }
        };
        let mut policy = self.open.policy();
        policy.reach.allowed.extend(base.iter().map(|(_, path)| path.clone()));
        let gone = match self.open.open_to_read_as(policy, globals) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound(_)) => error,
            other => return Ok(other?),
        };
        let (Some((base, path)), Some(format)) = (base, self.base_format) else {
            return Err(gone.into());
        };
        let policy = OpenPolicy { backing: Some((path, format)), ..self.open.policy() };
        let chain = self.open.open_to_read_as(policy, globals)?;
        globals.warn(format_args!("{gone}; {} takes its place", show_path(base)));
        Ok(chain)
    }

    /// Finds the base among the input's layers, or opens it.
    fn backing(&self, base: &Path, chain: &Chain, globals: Globals) -> anyhow::Result<Backing> {
        let name = LocalName::parse(base.as_os_str().as_bytes())?;
        let path = resolve_beside(&self.out, &name.path);
        if let Err(error) = std::fs::metadata(&path)
            && error.kind() == std::io::ErrorKind::NotFound
        {
            let message =
                "there is no such file for -B, whose name is seen from the directory of OUT";
            return Err(Error::new(ErrorKind::NotFound(message.to_owned())).at_path(path).into());
        }
        let id = FileId::of_path(&path);
        let layers = chain.layers().iter().zip(0u32..);
        let own = layers.filter(|(layer, _)| id.is_some() && layer.source.id() == id).last();
        let declared = match own {
            Some((layer, _)) => layer.declared_format.map(|_| layer.image.format()),
            None => None,
        };
        let driver: Option<Format> = name.driver.as_deref().map(str::parse).transpose()?;
        let Some(format) = self.base_format.or(driver).or(declared) else {
            let message = "say with -F which format it has: nothing declares it, and a guessed one is not to be stored";
            return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(path).into());
        };
        let stored =
            StoredBacking { name: base.as_os_str().as_bytes().to_vec(), format: Some(format) };
        if let Some((layer, depth)) = own {
            if layer.image.format() != format {
                let message = format!(
                    "-F {format} is not the format that the chain of the image has it in ({})",
                    layer.image.format()
                );
                return Err(Error::new(ErrorKind::Usage(message)).at_path(path).into());
            }
            if depth == 0 && layer.image.snapshot().is_some() {
                let message = "an image of its own snapshot has no way to name it: leave out -B";
                return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(path).into());
            }
            return Ok(Backing { stored, place: Place::Layer(depth) });
        }
        let policy = OpenPolicy {
            format: Some(format),
            snapshot: None,
            data_file: None,
            probe_backing: true,
            ..self.open.policy()
        };
        let OpenedChain { chain, mut warnings } = open_chain(&path, &policy)?;
        if self.open.probe_backing {
            warnings.retain(|warning| !is_undeclared(warning));
        }
        print_warnings(&warnings, globals);
        Ok(Backing { stored, place: Place::Other(chain) })
    }

    /// The encrypted layers whose bytes are read: those that are copied, and those below where
    /// a cluster of the output is made of both.
    fn keys_needed(
        &self,
        chain: &Chain,
        backing: Option<&Backing>,
        options: &FormatOptions,
    ) -> anyhow::Result<std::collections::BTreeSet<u32>> {
        let mut needed = chain.keys_needed(chain.whole())?;
        let depth = match backing.map(|backing| &backing.place) {
            None => return Ok(needed),
            Some(Place::Other(_)) => 1,
            Some(Place::Layer(depth)) => *depth,
        };
        let granularity = match options {
            FormatOptions::Qcow2(options) if self.compress => options.cluster_size(),
            FormatOptions::Qcow2(options) => options.granularity(),
            _ => u64::MAX,
        };
        let copied = chain.layers().iter().take(depth as usize);
        let mut images = copied.map(|layer| &layer.image).zip(0u32..);
        // Also where a layer below the first ends inside of a granule: behind that are zeros.
        let is_coarser = images.any(|(image, depth)| {
            image.granularity() < granularity
                || depth > 0 && !image.virtual_size().is_multiple_of(granularity)
        });
        if !is_coarser || !matches!(backing, Some(Backing { place: Place::Layer(_), .. })) {
            needed.retain(|&layer| layer < depth);
        }
        Ok(needed)
    }

    fn print(&self, target: &Target, size: u64, summary: Summary) -> anyhow::Result<()> {
        use std::io::Write;
        use std::os::unix::fs::MetadataExt;

        let Some(output) = self.output else { return Ok(()) };
        let metadata = target.file().metadata().ok().filter(std::fs::Metadata::is_file);
        let allocated = metadata.map(|metadata| metadata.blocks().saturating_mul(512));
        let Summary { copied, cloned, compressed, zeros } = summary;
        match output {
            OutputFormat::Json => print_json(&Report {
                output: JsonPath::from(target.name()),
                format: self.output_format.name(),
                virtual_size: size,
                copied,
                cloned,
                compressed,
                zeros,
                allocated,
            }),
            OutputFormat::Human => {
                let parts = [
                    (copied, "copied"),
                    (cloned, "shared"),
                    (compressed, "compressed"),
                    (zeros, "zeros"),
                ];
                let parts: Vec<String> = parts
                    .iter()
                    .filter(|(bytes, _)| *bytes > 0)
                    .map(|(bytes, what)| format!("{} {what}", human_size(*bytes)))
                    .collect();
                let mut out = stdout()?;
                writeln!(
                    out,
                    "{}: {} of {}: {}",
                    show_path(target.name()),
                    self.output_format,
                    human_size(size),
                    if parts.is_empty() { "nothing copied".to_owned() } else { parts.join(", ") }
                )?;
                out.flush()?;
                Ok(())
            }
        }
    }
}

/// What is to be copied, and how.
struct Job<'j> {
    args: &'j Args,
    options: &'j FormatOptions,
    input: &'j ChainInput<'j>,
    backing: Option<&'j Backing>,
    interrupt: Interrupt<'static>,
}

impl Job<'_> {
    fn copy(
        &self,
        target: &Target,
        data: Option<&Target>,
        globals: Globals,
    ) -> anyhow::Result<Summary> {
        let (args, input) = (self.args, self.input);
        let size = input.size();
        let reflink = match args.reflink {
            ReflinkChoice::Auto => Reflink::Auto,
            ReflinkChoice::Always => Reflink::Always,
            ReflinkChoice::Never => Reflink::Never,
        };
        let bytes_go_to = data.unwrap_or(target);
        let offloads = if args.compress || bytes_go_to.is_block_device() {
            if reflink == Reflink::Always {
                let message = "--reflink=always: a block device shares no blocks with a file";
                let error = Error::new(ErrorKind::CannotCreate(message.to_owned()));
                return Err(error.at_path(bytes_go_to.name()).into());
            }
            Offloads::none()
        } else {
            Offloads::probe(input, bytes_go_to.file(), reflink, &KernelBlocks)?
        };
        let new = NewImage {
            file: target.file(),
            data_file: data.map(|data| DataFile { file: data.file(), name: data.name() }),
            size,
            backing: self.backing.map(|backing| &backing.stored),
        };
        let failed = |error| output_failed(error, target, bytes_go_to, size.get());
        let (mut writer, compression) = self.writer(&new).map_err(failed)?;
        let preallocation = match self.options {
            FormatOptions::Raw(options) => options.preallocation,
            FormatOptions::Qcow2(options) => options.preallocation(),
            FormatOptions::Qcow(_) => Preallocation::Off,
        };
        let options = CopyOptions {
            sparse: args.sparse,
            has_backing: self.backing.is_some(),
            compression: args.compress.then_some(compression),
            offloads,
            calls: &KernelBlocks,
            write_back: args.cache == Cache::Writeback,
            allocate_ahead: preallocation == Preallocation::Off
                && !args.compress
                && !bytes_go_to.is_block_device(),
            threads: threads(args.threads),
            data_name: bytes_go_to.name(),
        };
        let progress = Meter::start(args.progress, size.get(), "converting", globals);
        let tick = |done: u64| {
            progress.set(done);
            self.interrupt.check()
        };
        let copied = copy(input, &mut *writer, &options, &tick);
        progress.finish(copied.is_ok());
        Ok(copied.map_err(failed)?)
    }

    /// The writer of the output's format, and how it is compressed.
    fn writer<'f>(&self, new: &NewImage<'f>) -> Result<(Box<dyn ImageWriter + 'f>, Compression)> {
        Ok(match self.options {
            FormatOptions::Raw(options) => {
                (Box::new(RawWriter::new(new, options)?), Compression::Zlib)
            }
            FormatOptions::Qcow2(options) => {
                (Box::new(Qcow2Writer::new(new, options)?), options.compression())
            }
            FormatOptions::Qcow(_) => (Box::new(QcowWriter::new(new)?), Compression::Zlib),
        })
    }
}

/// As many as there are cores, unless told otherwise.
pub(super) fn threads(asked: Option<NonZeroUsize>) -> usize {
    /// More than that only wait for each other.
    const MOST: usize = 64;
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    asked.map_or_else(cores, NonZeroUsize::get).min(MOST)
}

/// An error of reading names the file that was read; any other is of the output, of the image
/// where it does not name the data file.
pub(super) fn output_failed(error: Error, target: &Target, data: &Target, size: u64) -> Error {
    let is_input = |path: &Path| path != data.name() && path != target.name();
    if error.path().is_some_and(is_input) || error.is_interruption() {
        return error;
    }
    let cause = std::error::Error::source(&error)
        .and_then(|cause| cause.downcast_ref::<std::io::Error>())
        .and_then(std::io::Error::raw_os_error);
    let left = match data.is_block_device() || target.is_block_device() {
        true => "the block device holds a part of it",
        false => "nothing of it is left",
    };
    let why = match cause {
        Some(nix::libc::ENOSPC | nix::libc::EDQUOT) => "there is no space left for it",
        Some(nix::libc::EFBIG) => "the file may not become so long",
        _ => "",
    };
    let kind = match error.kind() {
        ErrorKind::Io(what) | ErrorKind::CannotCreate(what) if !why.is_empty() => {
            ErrorKind::CannotCreate(format!("{what} of a disk of {size} bytes: {why}; {left}"))
        }
        ErrorKind::Io(what) => ErrorKind::CannotCreate(format!("{what}; {left}")),
        other => other.clone(),
    };
    error.with_kind(kind).at_path(target.name())
}

const _: () = assert!(DEFAULT_SPARSE == 4 << 10, "the default of -S");
