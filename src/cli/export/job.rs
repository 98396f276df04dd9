//! The copying, and the files that it makes.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use imgdm::convert::Input;
use imgdm::convert::copy::{CopyOptions, DEFAULT_SPARSE, Summary, copy};
use imgdm::convert::create::{DataFile, NewImage, StoredBacking};
use imgdm::convert::options::{FormatOptions, Preallocation};
use imgdm::convert::qcow2::Qcow2Writer;
use imgdm::convert::reflink::{Offloads, Reflink};
use imgdm::convert::target::Target;
use imgdm::device::Interrupt;
use imgdm::device::blocks::KernelBlocks;
use imgdm::open::resolve_beside;
use imgdm::overlay::input::ChangedDisk;
use imgdm::source::FileId;
use imgdm::units::ByteLen;
use imgdm::{Error, ErrorKind, Result};

use super::super::Globals;
use super::super::convert::{Meter, output_failed};
use super::super::output::{JsonPath, OutputFormat, human_size, print_json, show_path, stdout};
use super::{Args, threads};

/// The new image, and its data file where it has one.
pub(super) struct Outputs {
    image: Target,
    data: Option<Target>,
}

impl Outputs {
    /// Starts them; none of them may be one of the `read` files.
    ///
    /// # Errors
    /// As [`Target::create`].
    pub(super) fn create(
        args: &Args,
        options: &FormatOptions,
        read: impl Iterator<Item = FileId>,
    ) -> Result<Self> {
        let data = options.data_file().map(|name| resolve_beside(&args.out, Path::new(name)));
        let read: Vec<_> = read.collect();
        for name in [Some(&args.out), data.as_ref()].into_iter().flatten() {
            if FileId::of_path(name).is_some_and(|id| read.contains(&id)) {
                let message = "this file is a part of what is exported, and stays as it is: take another name";
                return Err(Error::new(ErrorKind::Usage(message.to_owned())).at_path(name));
            }
        }
        Ok(Self {
            image: Target::create(&args.out, args.force)?,
            data: data.map(|name| Target::create(&name, args.force)).transpose()?,
        })
    }

    /// Their names and files.
    pub(super) fn files(&self) -> Vec<(&Path, &File)> {
        let all = std::iter::once(&self.image).chain(&self.data);
        all.map(|target| (target.name(), target.file())).collect()
    }

    /// Gives them their names once they are on the disk.
    ///
    /// # Errors
    /// As [`Target::commit`].
    pub(super) fn commit(&mut self) -> Result<()> {
        if let Some(data) = &mut self.data {
            data.commit(true)?;
        }
        self.image.commit(true)
    }

    /// Where the bytes of the disk go.
    fn bytes(&self) -> &Target {
        self.data.as_ref().unwrap_or(&self.image)
    }
}

/// What is to be written, and how.
pub(super) struct Job<'j> {
    pub(super) args: &'j Args,
    pub(super) options: &'j FormatOptions,
    pub(super) backing: &'j StoredBacking,
    pub(super) interrupt: Interrupt<'static>,
}

#[derive(serde::Serialize)]
struct Report {
    output: JsonPath,
    backing_file: JsonPath,
    backing_format: Option<&'static str>,
    /// Bytes of the disk.
    virtual_size: u64,
    /// Bytes that were changed, in whole chunks of the store.
    changed: u64,
    /// Bytes of the disk that were copied as they are.
    copied: u64,
    /// Bytes of the disk whose blocks are shared with the store.
    cloned: u64,
    /// Bytes of the disk that were compressed.
    compressed: u64,
    /// Zeros that were not written.
    zeros: u64,
    /// Bytes that the file system has allocated to the file; shared ones count.
    allocated: Option<u64>,
    /// For how long the device was suspended; none of a store that was not attached.
    suspended_milliseconds: Option<u64>,
}

impl Job<'_> {
    /// Copies what was changed.
    ///
    /// # Errors
    /// As [`copy`].
    pub(super) fn copy(
        &self,
        input: &ChangedDisk<'_>,
        outputs: &Outputs,
        globals: Globals,
    ) -> Result<Summary> {
        let (args, size, bytes) = (self.args, input.size(), outputs.bytes());
        let FormatOptions::Qcow2(options) = self.options else {
            return Err(Error::new(ErrorKind::Usage("an overlay has to be qcow2".to_owned())));
        };
        let failed = |error| output_failed(error, &outputs.image, bytes, size.get());
        let offloads = match args.compress || bytes.is_block_device() {
            true => Offloads::none(),
            false => Offloads::probe(input, bytes.file(), Reflink::Auto, &KernelBlocks)?,
        };
        let new = NewImage {
            file: outputs.image.file(),
            data_file: outputs
                .data
                .as_ref()
                .map(|data| DataFile { file: data.file(), name: data.name() }),
            size,
            backing: Some(self.backing),
        };
        let mut writer = Qcow2Writer::new(&new, options).map_err(failed)?;
        let copy_options = CopyOptions {
            sparse: DEFAULT_SPARSE,
            has_backing: true,
            compression: args.compress.then_some(options.compression()),
            offloads,
            calls: &KernelBlocks,
            write_back: true,
            allocate_ahead: options.preallocation() == Preallocation::Off
                && !args.compress
                && !bytes.is_block_device(),
            threads: threads(args.threads),
            data_name: bytes.name(),
        };
        let meter = Meter::start(args.progress, size.get(), "exporting", globals);
        let tick = |done: u64| {
            meter.set(done);
            self.interrupt.check()
        };
        let copied = copy(input, &mut writer, &copy_options, &tick);
        meter.finish(copied.is_ok());
        copied.map_err(failed)
    }

    /// Says what was done, where that is asked for.
    pub(super) fn print(
        &self,
        outputs: &Outputs,
        size: ByteLen,
        changed: ByteLen,
        suspended: Option<Duration>,
        summary: Summary,
    ) -> anyhow::Result<()> {
        use std::os::unix::ffi::OsStrExt;

        let Some(output) = self.args.output else { return Ok(()) };
        let metadata = outputs.image.file().metadata().ok().filter(std::fs::Metadata::is_file);
        let allocated = metadata.map(|metadata| metadata.blocks().saturating_mul(512));
        let backing = Path::new(std::ffi::OsStr::from_bytes(&self.backing.name));
        let milliseconds =
            suspended.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let Summary { copied, cloned, compressed, zeros } = summary;
        match output {
            OutputFormat::Json => print_json(&Report {
                output: JsonPath::from(outputs.image.name()),
                backing_file: JsonPath::from(backing),
                backing_format: self.backing.format.map(|format| format.name()),
                virtual_size: size.get(),
                changed: changed.get(),
                copied,
                cloned,
                compressed,
                zeros,
                allocated,
                suspended_milliseconds: milliseconds,
            }),
            OutputFormat::Human => {
                let mut out = stdout()?;
                write!(
                    out,
                    "{}: {} of {} changed, over {}",
                    show_path(outputs.image.name()),
                    human_size(changed.get()),
                    human_size(size.get()),
                    show_path(backing)
                )?;
                if let Some(milliseconds) = milliseconds {
                    write!(out, "; the device was suspended for {milliseconds} ms")?;
                }
                writeln!(out)?;
                out.flush()?;
                Ok(())
            }
        }
    }
}
