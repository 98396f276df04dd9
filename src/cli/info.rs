//! `imgdm info`: what an image is, as `qemu-img info` has it, and what its files are.

mod human;
mod json;

use imgdm::info::{InfoOptions, chain_info, image_info};

use super::open::{ImageArgs, ReachArgs};
use super::output::{OutputFormat, print_json};
use super::{Globals, workers};

/// Show what an image is: format, sizes, snapshots, bitmaps, encryption, locks
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm info disk.qcow2\n  imgdm info --backing-chain --output=json disk.qcow2 | jq '.[].filename'\n  imgdm info -U disk.qcow2        while a virtual machine runs: who has it open\n\nThe JSON is that of qemu-img info; what is ours lies under the key \"imgdm\"."
)]
pub(crate) struct Args {
    #[command(flatten)]
    image: ImageArgs,

    /// Also show the backing files, each after its overlay
    #[arg(long)]
    backing_chain: bool,

    #[command(flatten)]
    reach: ReachArgs,

    /// How to print
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,
}

pub(crate) fn run(args: &Args, _globals: Globals) -> anyhow::Result<()> {
    let image = &args.image.image;
    let options = InfoOptions { reach: args.reach.reach(), ..args.image.options() };
    let infos = if args.backing_chain {
        chain_info(image, &options)?
    } else {
        vec![image_info(image, &options)?]
    };
    // Who holds a file is found under /proc.
    let printed: Vec<_> = infos.iter().map(json::Info::from).collect();
    workers::shut_main_thread();
    match args.output {
        OutputFormat::Human => human::print(&printed),
        OutputFormat::Json if args.backing_chain => print_json(&printed),
        OutputFormat::Json => printed.first().map_or(Ok(()), print_json),
    }
}
