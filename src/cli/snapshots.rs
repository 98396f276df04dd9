//! `imgdm snapshots`: the internal snapshots of a qcow2 image.

use std::io::Write;

use imgdm::error::printable;
use imgdm::format::Format;
use imgdm::format::qcow2::Snapshot;
use imgdm::info::snapshots;

use super::open::ImageArgs;
use super::output::{OutputFormat, human_size, local_time, print_json, show_path, stdout};
use super::{Globals, workers};

const NANOSECONDS: u64 = 1_000_000_000;

/// List the internal snapshots of an image, with the size that the disk had in each
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm snapshots disk.qcow2\n  imgdm snapshots --output=json disk.qcow2 | jq -r '.[].name'"
)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// A snapshot with the keys of `qemu-img info`, in its order.
#[derive(Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct JsonSnapshot {
    #[serde(skip_serializing_if = "Option::is_none")]
    icount: Option<i64>,
    vm_clock_nsec: u64,
    name: String,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_sec: u64,
    id: String,
    vm_state_size: i64,
}

#[derive(serde::Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonWithSize {
    #[serde(flatten)]
    snapshot: JsonSnapshot,
    /// Bytes of the virtual disk when it was taken.
    virtual_size: u64,
}

/// QEMU's strings end at a NUL.
fn c_text(text: &str) -> &str {
    text.split('\0').next().unwrap_or_default()
}

impl From<&Snapshot> for JsonSnapshot {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            // Two numbers that QEMU gives as signed ones.
            icount: snapshot.instruction_count.map(u64::cast_signed),
            vm_clock_nsec: snapshot.vm_clock_nanoseconds % NANOSECONDS,
            name: c_text(&snapshot.name).to_owned(),
            date_sec: snapshot.date_seconds,
            date_nsec: snapshot.date_nanoseconds,
            vm_clock_sec: snapshot.vm_clock_nanoseconds / NANOSECONDS,
            id: c_text(&snapshot.id).to_owned(),
            vm_state_size: snapshot.vm_state_size.cast_signed(),
        }
    }
}

/// The headline of [`row`], as QEMU has it.
pub(crate) fn headline() -> String {
    columns("ID", "TAG", ["VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"])
}

/// A snapshot in the columns of `qemu-img snapshot -l`.
pub(crate) fn row(snapshot: &Snapshot) -> String {
    let seconds = snapshot.vm_clock_nanoseconds / NANOSECONDS;
    let clock = format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        snapshot.vm_clock_nanoseconds / 1_000_000 % 1000
    );
    let count = snapshot.instruction_count.map(u64::cast_signed);
    columns(
        &printable(c_text(&snapshot.id)),
        &printable(c_text(&snapshot.name)),
        [
            &human_size(snapshot.vm_state_size),
            &local_time(snapshot.date_seconds.into()),
            &clock,
            &count.map_or_else(|| "--".to_owned(), |count| count.to_string()),
        ],
    )
}

fn columns(id: &str, name: &str, [size, date, clock, count]: [&str; 4]) -> String {
    format!("{id:<7} {name:<16} {size:>8} {date:>19} {clock:>15} {count:>10}")
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let (format, snapshots) = snapshots(&args.image.image, &args.image.options())?;
    workers::shut_main_thread();
    if format != Format::Qcow2 {
        let image = show_path(&args.image.image);
        globals.warn(format_args!("{image}: the format {format} has no internal snapshots"));
    }
    match args.output {
        OutputFormat::Human => human(&snapshots),
        OutputFormat::Json => {
            let json = |snapshot: &Snapshot| JsonWithSize {
                snapshot: JsonSnapshot::from(snapshot),
                virtual_size: snapshot.virtual_size.get(),
            };
            print_json(&snapshots.iter().map(json).collect::<Vec<_>>())
        }
    }
}

fn human(snapshots: &[Snapshot]) -> anyhow::Result<()> {
    let mut out = stdout()?;
    if !snapshots.is_empty() {
        writeln!(out, "Snapshot list:\n{} {:>12}", headline(), "VIRTUAL_SIZE")?;
    }
    for snapshot in snapshots {
        writeln!(out, "{} {:>12}", row(snapshot), human_size(snapshot.virtual_size.get()))?;
    }
    out.flush()?;
    Ok(())
}
