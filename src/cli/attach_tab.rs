//! `imgdm attach-tab`: attaches what /etc/imgdmtab says.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::FromArgMatches;
use imgdm::error::printable;
use imgdm::imgdmtab::{DEFAULT_PATH, Entry, Tab, TabError, TabErrorKind};
use imgdm::{Error, ErrorKind};

use super::output::{show_path, stdout};
use super::{Globals, attach, exit, tab};

/// Attach images of /etc/imgdmtab
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  imgdm attach-tab disk       the image that has this NAME there\n  imgdm attach-tab --check    what is in it, and what is wrong with it\n  imgdm attach-tab --all\n\nA line of the table: NAME IMAGE [KEY-FILE|- [OPTION,...]], for example\n  disk /srv/disk.qcow2 - nofail,snapshot=before-update\nAt boot the table is read by systemd, through imgdm-generator."
)]
pub(crate) struct Args {
    /// What to attach: the NAME of a line
    #[arg(value_name = "NAME", required_unless_present_any = ["all", "check"])]
    names: Vec<String>,

    /// Attach all but those with the option noauto
    #[arg(long, conflicts_with = "names")]
    all: bool,

    /// With --all: only those with the option x-initrd.attach
    #[arg(long, requires = "all")]
    initrd: bool,

    /// Attach nothing: print each line as the command that it amounts to, and what is wrong
    #[arg(long, conflicts_with_all = ["names", "all"])]
    check: bool,

    /// The table
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    file: PathBuf,
}

pub(crate) fn run(args: &Args, globals: Globals) -> anyhow::Result<()> {
    let tab = tab::read(&args.file)?;
    if args.check {
        return check(&tab, &args.file);
    }
    if args.all {
        let wanted = |entry: &&Entry| !entry.boot.noauto && (entry.boot.initrd || !args.initrd);
        return attach_all(&tab, tab.entries.iter().filter(wanted), &args.file, globals);
    }
    // All names are looked up before anything is attached.
    let entries: Vec<_> =
        args.names.iter().map(|name| find(&tab, name, &args.file)).collect::<Result<_, _>>()?;
    for entry in entries {
        attach(entry, &args.file, globals)?;
    }
    Ok(())
}

/// The entry of that name.
fn find<'t>(tab: &'t Tab, name: &str, path: &Path) -> Result<&'t Entry, Error> {
    if let Some(entry) = tab.entries.iter().find(|entry| entry.name == name) {
        return Ok(entry);
    }
    match tab.errors.iter().find(|error| error.name.as_deref() == Some(name)) {
        Some(error) => Err(error.clone().at(path)),
        None => {
            let message = format!("no line has the name '{}'", printable(name));
            Err(Error::new(ErrorKind::NotFound(message)).at_path(path))
        }
    }
}

/// An entry as attach's own arguments; the error is a value that attach does not know.
fn arguments(entry: &Entry) -> Result<attach::Args, TabError> {
    let command = <attach::Args as clap::Args>::augment_args(clap::Command::new("attach"));
    let words = std::iter::once(OsString::from("attach")).chain(entry.arguments());
    let parsed = command
        .try_get_matches_from(words)
        .and_then(|matches| attach::Args::from_arg_matches(&matches));
    parsed.map_err(|error| {
        let text = error.render().to_string();
        // clap's hints at --help are for a command line.
        let first = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let kind = TabErrorKind::Attach(first.split_whitespace().collect::<Vec<_>>().join(" "));
        TabError { line: entry.line, name: Some(entry.name.clone()), kind }
    })
}

fn attach(entry: &Entry, path: &Path, globals: Globals) -> anyhow::Result<()> {
    let args = arguments(entry).map_err(|error| error.at(path))?;
    attach::run(&args, globals)
}

/// Attaches one after the other; what fails keeps no other from being attached.
fn attach_all<'t>(
    tab: &Tab,
    entries: impl Iterator<Item = &'t Entry>,
    path: &Path,
    globals: Globals,
) -> anyhow::Result<()> {
    let mut first = None;
    let mut note = |error: anyhow::Error| {
        if first.is_none() {
            first = Some(error);
        } else {
            let _ = writeln!(std::io::stderr(), "imgdm: {}", exit::message(&error));
        }
    };
    for error in &tab.errors {
        note(error.clone().at(path).into());
    }
    for entry in entries {
        match attach(entry, path, globals) {
            Err(error) if exit::interrupted_by(&error).is_some() => return Err(error),
            Err(error) if entry.boot.nofail => globals.warn(exit::message(&error)),
            Err(error) => note(error),
            Ok(()) => {}
        }
    }
    first.map_or(Ok(()), Err)
}

/// Prints what the table amounts to.
fn check(tab: &Tab, path: &Path) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let mut errors = tab.errors.clone();
    for entry in &tab.entries {
        match arguments(entry) {
            Ok(_) => {
                let words: Vec<_> = entry.arguments().iter().map(|word| quoted(word)).collect();
                writeln!(out, "imgdm attach {}", words.join(" "))?;
            }
            Err(error) => errors.push(error),
        }
    }
    out.flush()?;
    errors.sort_by_key(|error| error.line);
    let count = errors.len();
    for error in errors {
        writeln!(std::io::stderr(), "imgdm: {}", error.at(path))?;
    }
    if count == 0 {
        return Ok(());
    }
    let lines = if count == 1 { "a line is".to_owned() } else { format!("{count} lines are") };
    Err(Error::new(ErrorKind::InvalidTab(format!("{lines} wrong"))).at_path(path).into())
}

/// A word as a shell takes it.
fn quoted(word: &std::ffi::OsStr) -> String {
    let text = show_path(Path::new(word));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_=./:@+,%".contains(&byte);
    if !text.is_empty() && text.bytes().all(plain) {
        text
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

#[cfg(test)]
mod tests {
    use imgdm::imgdmtab::{ATTACH_OPTIONS, Takes};

    use super::*;

    #[test]
    fn what_a_table_may_hold_are_attachs_own_options() {
        let command = <attach::Args as clap::Args>::augment_args(clap::Command::new("attach"));
        for (name, takes) in ATTACH_OPTIONS {
            let found = command.get_arguments().find(|arg| arg.get_long() == Some(*name));
            let action = found.unwrap_or_else(|| panic!("attach has no --{name}")).get_action();
            let wanted = match takes {
                Takes::Nothing => clap::ArgAction::SetTrue,
                Takes::Value | Takes::Path | Takes::MaybePath => clap::ArgAction::Set,
                Takes::Values | Takes::Paths => clap::ArgAction::Append,
            };
            assert_eq!(format!("{action:?}"), format!("{wanted:?}"), "{name}");
        }
    }

    #[test]
    fn a_value_that_attach_does_not_know_is_an_error_with_its_line() {
        let tab = Tab::parse(b"\na /b - compressed=often\nb /b - compressed=cache\n");
        let said = arguments(&tab.entries[0]).unwrap_err().to_string();
        assert!(said.starts_with("line 2: ") && said.contains("'often'"), "{said}");
        assert!(arguments(&tab.entries[1]).is_ok());
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("--name=a".as_ref()), "--name=a");
        assert_eq!(quoted("/it's a\n".as_ref()), "'/it'\\''s a\\n'");
    }
}
