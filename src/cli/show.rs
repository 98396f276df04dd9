//! `imgdm show`: a picture of the guest's disk.

mod json;
mod scene;
mod svg;
mod terminal;
mod text;
mod words;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use imgdm::chain::{Chain, HoleQuery};
use imgdm::picture::{Picture, PictureOptions};

use super::damage::{open_to_look, report_damage};
use super::open::OpenArgs;
use super::output::{OutputFormat, print_json, stdout};
use super::save::{refuse_files_of, save};
use super::{Globals, workers};
use scene::{Scene, is_shown, layer_name};
use terminal::{ColorChoice, GREATEST_WIDTH, LEAST_WIDTH, Screen};

/// Cells of a strip in JSON and in SVG, where nobody says how many.
const JSON_CELLS: usize = 100;
const SVG_CELLS: usize = 1000;
const MOST_CELLS: u64 = 4096;

/// Draw the disk: a strip for the whole and one for each layer, and how scattered they lie
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm show disk.qcow2\n  imgdm show --color=always disk.qcow2 | less -R\n  imgdm show --svg report.svg -l before-update disk.qcow2\n  imgdm show --output=json disk.qcow2 | jq .whole.bytes\n\nDamaged metadata is shown as such and listed on stderr; the exit status is then 65."
)]
pub(crate) struct Args {
    #[command(flatten)]
    open: OpenArgs,

    /// human is the picture; json the numbers behind it, of all layers
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    output: OutputFormat,

    /// Draw into this file instead, as SVG; - is stdout
    #[arg(long, value_name = "FILE", conflicts_with = "output")]
    svg: Option<PathBuf>,

    /// Show all layers of a long chain
    #[arg(long)]
    all: bool,

    /// Columns of the picture; else those of the terminal (or COLUMNS), or 80
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(LEAST_WIDTH as u64..=GREATEST_WIDTH as u64))]
    width: Option<usize>,

    /// When to use colours
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    color: ColorChoice,

    /// Draw with ASCII characters, as where the locale is not UTF-8
    #[arg(long)]
    ascii: bool,

    /// Cells of each strip in JSON (else 100) and SVG (else 1000)
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_CELLS))]
    cells: Option<usize>,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let (chain, damaged) = open_to_look(&args.open, args.open.policy(), globals)?;
    let chain = &chain;
    let layers = chain.layers().len();
    let shown = |depth| args.all || is_shown(depth, layers);
    if let Some(path) = &args.svg {
        refuse_files_of(chain, path)?;
        let picture = draw(chain, args.cells.unwrap_or(SVG_CELLS), &shown, globals)?;
        let svg = svg::draw(&Scene::new(chain, &picture), layers);
        write_svg(path, &svg)?;
        return report_damage(&damaged, &picture.damage, WHOSE, "drawn");
    }
    workers::shut_main_thread();
    let picture = match args.output {
        OutputFormat::Json => {
            let picture = draw(chain, args.cells.unwrap_or(JSON_CELLS), &|_| true, globals)?;
            print_json(&json::Report::new(chain, &picture))?;
            picture
        }
        OutputFormat::Human => {
            let screen = Screen::new(args.width, args.color, args.ascii);
            let names = chain.layers().iter().map(layer_name).collect::<Vec<_>>();
            let picture = draw(chain, text::strip_width(screen, &names, &shown), &shown, globals)?;
            let text = text::draw(&Scene::new(chain, &picture), layers, screen);
            let mut out = stdout()?;
            out.write_all(text.as_bytes())?;
            out.flush()?;
            picture
        }
    };
    report_damage(&damaged, &picture.damage, WHOSE, "shown")
}

/// What damage is said to spoil: a strip shows also what overlays cover.
const WHOSE: &str = "the layer";

/// Adds up the picture, with a progress bar where that takes long.
fn draw(
    chain: &Chain,
    cells: usize,
    layers: &dyn Fn(usize) -> bool,
    globals: Globals,
) -> anyhow::Result<Picture> {
    let options = PictureOptions { cells, layers, holes: HoleQuery::AsQemu, progress: &|_| {} };
    #[cfg(feature = "device")]
    {
        let bar = globals.progress(options.work(chain).get(), "reading the tables");
        let progress = |bytes: imgdm::units::ByteLen| bar.inc(bytes.get());
        let picture = Picture::of(chain, &PictureOptions { progress: &progress, ..options });
        bar.finish_and_clear();
        Ok(picture?)
    }
    #[cfg(not(feature = "device"))]
    {
        let _ = globals;
        Ok(Picture::of(chain, &options)?)
    }
}

fn write_svg(path: &Path, svg: &str) -> anyhow::Result<()> {
    if path == Path::new("-") {
        let mut out = stdout()?;
        out.write_all(svg.as_bytes())?;
        out.flush()?;
        return Ok(());
    }
    Ok(save(path, svg.as_bytes())?)
}
