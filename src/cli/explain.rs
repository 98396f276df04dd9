//! `imgdm explain`: where a byte of the disk comes from, and who uses a byte of a file.

mod forward;
#[cfg(feature = "device")]
mod live;
mod reverse;
mod steps;

use std::ffi::OsString;
use std::io::{self, Write};

use imgdm::chain::Chain;
use imgdm::explain::{Explanation, explain, explain_reverse};
use imgdm::open::{OpenPolicy, OpenedChain, open_chain};
use imgdm::units::{GuestOffset, SECTOR_SIZE};
use imgdm::{Error, ErrorKind};
use serde::Serialize;

use super::open::{OpenArgs, is_undeclared, parse_size, print_warnings};
use super::output::{OutputFormat, print_json, stdout};
use super::{Globals, workers};

use reverse::FilePlace;

/// Explain step by step where a byte of the disk comes from, or what a byte of a file is
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm explain disk.qcow2 0x12345678        which layer, tables and file give this byte\n  imgdm explain -l before disk.qcow2 64k     the same in a snapshot\n  imgdm explain disk.qcow2 2048s             the first byte of sector 2048 (of 512 bytes)\n  imgdm explain disk 4G                      of /dev/mapper/disk: with its live tables\n  imgdm explain --reverse base.qcow2:0x50000 disk.qcow2\n\nAn argument without a slash that is no file here is the NAME of an attachment. Where the\nmetadata that leads to the byte is damaged, the steps up to there are printed, and the\nexit status is 65. So it is with --reverse where damage may have hidden something.",
    mut_arg("image", |image| image.index(1).value_name("IMAGE|NAME").help("The image, a file or a block device; or the NAME under which it is attached"))
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// Which byte of the disk: an offset in bytes (512, 0x200, 64k), or a sector of 512
    /// bytes (8s)
    #[arg(
        index = 2,
        value_name = "OFFSET|SECTOR",
        value_parser = parse_place,
        required_unless_present = "reverse",
        conflicts_with = "reverse"
    )]
    place: Option<u64>,

    /// The other way round: who uses this byte of a file of the chain (:OFFSET is the
    /// image's own), in the active layer and in all snapshots, or which metadata it is
    #[arg(long, value_name = "FILE:OFFSET")]
    reverse: Option<OsString>,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// An offset in bytes, or a sector number with `s` behind it.
fn parse_place(text: &str) -> Result<u64, String> {
    let Some(sector) = text.strip_suffix(['s', 'S']) else {
        return parse_size(text).map_err(|error| format!("{error}, nor a sector (like 8s)"));
    };
    let number = match sector.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => sector.parse(),
    };
    number
        .ok()
        .and_then(|sector| sector.checked_mul(SECTOR_SIZE))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| "not a sector number (like 8s)".to_owned())
}

/// Opens the chain as someone who only looks.
fn open(args: &OpenArgs, globals: Globals) -> imgdm::Result<OpenedChain> {
    let policy = OpenPolicy { probe_backing: true, past_damage: true, ..args.policy() };
    let mut opened = open_chain(&args.image, &policy)?;
    if args.probe_backing {
        opened.warnings.retain(|warning| !is_undeclared(warning));
    }
    print_warnings(&opened.warnings, globals);
    Ok(opened)
}

/// What can be printed for people.
trait Shown: Serialize {
    fn print(&self, out: &mut dyn Write) -> io::Result<()>;
}

fn print(report: &impl Shown, format: OutputFormat) -> anyhow::Result<()> {
    match format {
        OutputFormat::Json => print_json(report),
        OutputFormat::Human => {
            let mut out = stdout()?;
            report.print(&mut out)?;
            out.flush()?;
            Ok(())
        }
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let file_place = args.reverse.as_ref().map(FilePlace::parse).transpose()?;
    #[cfg(feature = "device")]
    {
        let kernel = imgdm::device::linux::LinuxKernel::new();
        if let Some(live) = live::Live::of(&kernel, &args.open)? {
            let chain = live.chain(globals)?;
            return report(args, file_place.as_ref(), chain, |report, explanation| {
                live.add_devices(report, explanation)
            });
        }
    }
    let opened = open(&args.open, globals)?;
    workers::shut_main_thread();
    report(args, file_place.as_ref(), &opened.chain, |_, _| Ok(()))
}

/// Prints what was asked for; `add_devices` adds those that serve a byte of the disk.
fn report(
    args: &Args,
    file_place: Option<&FilePlace>,
    chain: &Chain,
    add_devices: impl FnOnce(&mut forward::Report, &Explanation) -> imgdm::Result<()>,
) -> anyhow::Result<()> {
    if let Some(file_place) = file_place {
        let (depth, role) = file_place.find(chain)?;
        let found = explain_reverse(chain, depth, role, file_place.offset())?;
        if let Some(report) = reverse::Report::of(chain, &found) {
            print(&report, args.output)?;
        }
        return reverse::report_problems(chain, &found);
    }
    let offset = GuestOffset::new(args.place.unwrap_or(0));
    let explanation = explain(chain, offset).map_err(|error| error.at_path(&args.open.image))?;
    let mut report = forward::Report::of(chain, &explanation);
    add_devices(&mut report, &explanation)?;
    print(&report, args.output)?;
    match explanation.damage() {
        None => Ok(()),
        Some(damage) => {
            let message = format!("the metadata is damaged: {}", damage.without_path());
            let error = Error::new(ErrorKind::InvalidImage(message));
            Err(match damage.path() {
                Some(path) => error.at_path(path),
                None => error,
            }
            .into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bytes_or_sectors() {
        assert_eq!(parse_place("512"), Ok(512));
        assert_eq!(parse_place("0x200"), Ok(512));
        assert_eq!(parse_place("4k"), Ok(4096));
        assert_eq!(parse_place("8s"), Ok(4096));
        assert_eq!(parse_place("0x10S"), Ok(8192));
        for bad in ["", "s", "-1s", "1.5s", "99999999999999999s", "x"] {
            assert!(parse_place(bad).is_err(), "{bad}");
        }
    }
}
