//! `imgdm partitions`: what is on the disk, without attaching it.

mod human;
mod json;

use imgdm::Result;
use imgdm::chain::Chain;
use imgdm::device::Interrupt;
use imgdm::lvm::{self, Lvm};
use imgdm::partition::{self, Disk, Noting, PartitionTable, Unusable};
use imgdm::read::{ChainReader, Ciphers};
use imgdm::signature::{self, Budget, Signature};
use imgdm::units::{ByteLen, GuestOffset, GuestRange};

use super::open::OpenArgs;
use super::output::{OutputFormat, print_json, show_path};
use super::unlock::UnlockArgs;
use super::{Globals, workers};

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
    /// What could not be read, for people.
    unread: Vec<String>,
}

impl Found<'_> {
    /// All warnings, for people.
    fn warnings(&self) -> Vec<String> {
        let of_table = self.table.iter().flat_map(|table| &table.warnings);
        let of_lvm = self.lvm.warnings.iter().map(ToString::to_string);
        let unread = self.unread.iter().cloned();
        of_table.map(ToString::to_string).chain(unread).chain(of_lvm).collect()
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
    workers::shut_main_thread();
    let found = look(chain, &unlocked.ciphers, unlocked.interrupt)?;
    for warning in found.warnings() {
        globals.warn(format_args!("{}: {warning}", show_path(&args.open.image)));
    }
    match args.output {
        OutputFormat::Human => human::print(&found),
        OutputFormat::Json => print_json(&json::Report::new(&found)),
    }
}

/// Reads what is on the disk. What can't be read is missing, and told, as long as anything is
/// found at all.
fn look<'c>(chain: &'c Chain, ciphers: &'c Ciphers, interrupt: Interrupt<'c>) -> Result<Found<'c>> {
    let mut guest = GuestDisk::new(chain, ciphers, interrupt);
    let mut disk = Noting::new(&mut guest);
    let (table, failed) = match partition::read(&mut disk) {
        Ok(table) => (table, None),
        Err(error) if error.is_interruption() => return Err(error),
        Err(error) => (None, Some(error)),
    };
    // These are among the table's own warnings.
    disk.take();
    let (mut unread, mut budget) = (Vec::new(), Budget::default());
    let mut content_of = |range, what: &dyn Fn() -> String| {
        let content = match signature::probe_within(&mut disk, range, &mut budget) {
            Err(error) if error.is_interruption() => return Err(error),
            content => content.unwrap_or_default(),
        };
        if let Some(at) = disk.take().first() {
            let what = what();
            unread.push(format!(
                "{what} can't be read at {at}: what lies on it may be another thing"
            ));
        }
        Ok(content)
    };
    let mut contents = Vec::new();
    for partition in table.iter().flat_map(|table| &table.partitions) {
        let is_inside = matches!(partition.unusable, None | Some(Unusable::Overlaps(_)));
        let has_content = !partition.is_extended && is_inside;
        contents.push(match has_content {
            true => content_of(partition.range, &|| format!("partition {}", partition.number))?,
            false => None,
        });
    }
    let content = content_of(chain.whole(), &|| "the disk".to_owned())?;
    let lvm = lvm::read(&mut disk, &lvm::places(table.as_ref(), chain.virtual_size()))?;
    if let Some(error) = failed {
        if content.is_none() && lvm.physical_volumes.is_empty() {
            return Err(error);
        }
        unread.push(format!("the partition table can't be read: {}", error.without_path()));
    }
    Ok(Found { chain, content, table, contents, lvm, unread })
}
