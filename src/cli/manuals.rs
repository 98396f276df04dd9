//! `imgdm manuals`: the manual page of imgdm and of each command. For packages.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::output::show_path;
use super::visible_commands;

/// Of the last change to what the commands' help says.
const DATE: &str = "2026-11-25";
const SECTION: &str = "8";

/// Write the manual pages imgdm.8 and imgdm-COMMAND.8
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  imgdm manuals /usr/local/share/man/man8")]
pub(crate) struct Args {
    /// Where to
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    let mut commands = visible_commands();
    commands.build();
    let others: Vec<_> =
        commands.get_subcommands().map(|command| format!("imgdm-{}", command.get_name())).collect();
    for command in commands.get_subcommands().chain([&commands]) {
        let title = command.get_display_name().unwrap_or("imgdm").to_owned();
        let path = args.directory.join(format!("{title}.{SECTION}"));
        page(command, &title, &others)
            .and_then(|page| fs::write(&path, page))
            .with_context(|| show_path(&path))?;
    }
    Ok(())
}

fn page(command: &Command, title: &str, others: &[String]) -> std::io::Result<String> {
    let man = Man::new(command.clone())
        .title(title.to_uppercase())
        .section(SECTION)
        .date(DATE)
        .source(concat!("imgdm ", env!("CARGO_PKG_VERSION")))
        .manual("imgdm");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        Roff::new().control("SH", ["COMMANDS"]).to_writer(&mut page)?;
        let mut list = Roff::new();
        for sub in command.get_subcommands() {
            list.control("TP", [])
                .text([bold(format!("imgdm-{}", sub.get_name())), roman(format!("({SECTION})"))])
                .text([roman(sub.get_about().map(ToString::to_string).unwrap_or_default())]);
        }
        list.to_writer(&mut page)?;
    }
    if let Some(text) = command.get_after_help() {
        after_help(&text.to_string()).to_writer(&mut page)?;
    }
    see_also(title, others).to_writer(&mut page)?;
    let page = String::from_utf8_lossy(&page);
    // clap_mangen breaks the line around an empty one, of which mandoc complains.
    Ok(page.replace("\n.br\n\n.br\n", "\n.sp\n"))
}

/// The sections at the end: examples, exit status, and notes on all else.
fn after_help(text: &str) -> Roff {
    let mut roff = Roff::new();
    let mut in_notes = false;
    for block in text.split("\n\n") {
        if let Some(examples) = block.strip_prefix("Examples:\n") {
            roff.control("SH", ["EXAMPLES"]).control("nf", []);
            for line in examples.lines() {
                roff.text([roman(line.trim_start())]);
            }
            roff.control("fi", []);
            continue;
        }
        if block.starts_with("Exit status") {
            roff.control("SH", ["EXIT STATUS"]);
            in_notes = false;
        } else if in_notes {
            roff.control("PP", []);
        } else {
            roff.control("SH", ["NOTES"]);
            in_notes = true;
        }
        for line in block.lines() {
            roff.text([roman(line.trim_start())]);
        }
    }
    roff
}

fn see_also(title: &str, others: &[String]) -> Roff {
    let mut pages = vec![("imgdm".to_owned(), SECTION)];
    pages.extend(others.iter().map(|name| (name.clone(), SECTION)));
    pages.extend([("imgdm".to_owned(), "7"), ("imgdmtab".to_owned(), "5")]);
    pages.extend([("imgdm.conf".to_owned(), "5"), ("mount.imgdm".to_owned(), "8")]);
    pages.retain(|(name, section)| name != title || *section != SECTION);
    let mut line = Vec::new();
    for (index, (name, section)) in pages.iter().enumerate() {
        let comma = if index + 1 < pages.len() { ", " } else { "" };
        line.extend([italic(name.as_str()), roman(format!("({section}){comma}"))]);
    }
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]).text(line);
    roff
}
