//! `imgdm partitions`: what is on the disk, without attaching it.

mod human;
mod json;

use imgdm::Result;
use imgdm::chain::Chain;
use imgdm::device::Interrupt;
use imgdm::lvm::{self, Lvm};
use imgdm::partition::{self, Disk, PartitionTable, Unusable};
use imgdm::read::{ChainReader, Ciphers};
use imgdm::signature::{self, Signature};
use imgdm::units::{ByteLen, GuestOffset, GuestRange};

use super::Globals;
use super::open::OpenArgs;
use super::output::{OutputFormat, print_json, show_path};
use super::unlock::UnlockArgs;

/// List the partitions of the disk and what lies on them, LVM included
///
/// Nothing is attached. Numbers are those that 'imgdm attach -p' takes. Also told is a file
/// system on the whole disk, and of each logical volume whether 'imgdm attach --lv' can put
/// it together.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm partitions disk.qcow2\n  imgdm partitions -l before-update disk.qcow2     as they were in a snapshot\n  imgdm partitions --output=json disk.qcow2 | jq '.partitions[] | {number, content}'"
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    keys: UnlockArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

/// All that was found on a disk.
struct Found<'c> {
    chain: &'c Chain,
    /// What the disk as a whole looks like; with a table that may be a leftover.
    content: Option<Signature>,
    table: Option<PartitionTable>,
    /// What lies on each partition of the table.
    contents: Vec<Option<Signature>>,
    lvm: Lvm,
}

impl Found<'_> {
    /// All warnings, for people.
    fn warnings(&self) -> Vec<String> {
        let of_table = self.table.iter().flat_map(|table| &table.warnings);
        let of_lvm = self.lvm.warnings.iter().map(ToString::to_string);
        of_table.map(ToString::to_string).chain(of_lvm).collect()
    }

    /// The number of the partition at a place; none for the whole disk.
    fn partition_at(&self, place: GuestRange) -> Option<u32> {
        let mut partitions = self.table.iter().flat_map(|table| &table.partitions);
        partitions.find(|partition| partition.range == place).map(|partition| partition.number)
    }
}

/// The guest's disk, read in user space.
pub(super) struct GuestDisk<'c> {
    reader: ChainReader<'c>,
    size: ByteLen,
    interrupt: Interrupt<'c>,
}

impl<'c> GuestDisk<'c> {
    pub(super) fn new(chain: &'c Chain, ciphers: &'c Ciphers, interrupt: Interrupt<'c>) -> Self {
        let size = chain.virtual_size();
        Self { reader: ChainReader::new(chain, ciphers), size, interrupt }
    }
}

impl Disk for GuestDisk<'_> {
    fn size(&self) -> ByteLen {
        self.size
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.interrupt.check()?;
        self.reader.read_at(offset, buffer)
    }
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let unlocker = args.keys.unlocker()?;
    let chain = &args.open.open_to_read(globals)?;
    let unlocked = unlocker.unlock(chain, &chain.keys_needed(chain.whole())?)?;
    let found = look(chain, &unlocked.ciphers, unlocked.interrupt)?;
    for warning in found.warnings() {
        globals.warn(format_args!("{}: {warning}", show_path(&args.open.image)));
    }
    match args.output {
        OutputFormat::Human => human::print(&found),
        OutputFormat::Json => print_json(&json::Report::new(&found)),
    }
}

/// Reads what is on the disk.
fn look<'c>(chain: &'c Chain, ciphers: &'c Ciphers, interrupt: Interrupt<'c>) -> Result<Found<'c>> {
    let size = chain.virtual_size();
    let mut disk = GuestDisk::new(chain, ciphers, interrupt);
    let table = partition::read(&mut disk)?;
    let mut contents = Vec::new();
    for partition in table.iter().flat_map(|table| &table.partitions) {
        let is_inside = matches!(partition.unusable, None | Some(Unusable::Overlaps(_)));
        let has_content = !partition.is_extended && is_inside;
        contents.push(match has_content {
            true => signature::probe(&mut disk, partition.range)?,
            false => None,
        });
    }
    let content = signature::probe(&mut disk, chain.whole())?;
    let lvm = lvm::read(&mut disk, &lvm::places(table.as_ref(), size))?;
    Ok(Found { chain, content, table, contents, lvm })
}
