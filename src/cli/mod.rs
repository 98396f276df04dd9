//! The clap tree; one file a command.

#[cfg(feature = "device")]
mod attach;
#[cfg(feature = "device")]
mod attach_tab;
#[cfg(feature = "device")]
mod build;
mod check;
mod completions;
mod convert;
mod damage;
#[cfg(feature = "device")]
mod detach;
mod diff;
#[cfg(feature = "device")]
mod evidence;
mod exit;
mod explain;
#[cfg(feature = "device")]
mod export;
mod facts;
#[cfg(feature = "device")]
mod fill;
#[cfg(feature = "device")]
mod generator;
mod hash;
mod info;
#[cfg(feature = "device")]
mod key;
#[cfg(feature = "device")]
mod list;
mod manuals;
mod map;
mod memory;
mod metadata;
#[cfg(feature = "device")]
mod mount;
mod open;
mod output;
#[cfg(feature = "device")]
mod overlay;
mod partitions;
mod plan;
mod progress;
#[cfg(feature = "device")]
mod report;
mod save;
mod scratch;
mod show;
#[cfg(feature = "device")]
mod signal;
mod snapshots;
mod stamps;
#[cfg(feature = "device")]
mod tab;
mod table;
mod unlock;
#[cfg(feature = "device")]
mod verify;
mod workers;

use std::io::{self, Write};
#[cfg(feature = "device")]
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use exit::exit_code;

/// Attach qcow2, qcow, cow and raw disk images as block devices that the kernel serves alone,
/// read-only or over an overlay: no daemon, nothing left behind.
#[derive(Debug, Parser)]
#[command(
    name = "imgdm",
    version,
    max_term_width = 100,
    after_help = "Examples:\n  imgdm attach disk.qcow2        gives /dev/mapper/disk\n  imgdm plan disk.qcow2          says whether that will work, and what it takes\n  imgdm detach disk\n\nExit status: 0 done, 1 failed, 64 usage, 65 image invalid, 66 not found,\n67 wrong or missing key,\n69 the kernel lacks something, 73 cannot create, 75 in use,\n76 not representable, 77 permission, 78 wrong line of imgdmtab."
)]
pub(crate) struct Cli {
    /// Print no warnings and no progress
    #[arg(short, long, global = true)]
    quiet: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Info(info::Args),
    Snapshots(snapshots::Args),
    Partitions(partitions::Args),
    Map(map::Args),
    Plan(plan::Args),
    Table(table::Args),
    Explain(explain::Args),
    Check(check::Args),
    Diff(diff::Args),
    Show(show::Args),
    Hash(hash::Args),
    Convert(convert::Args),
    #[cfg(feature = "device")]
    Export(export::Args),
    #[cfg(feature = "device")]
    Attach(attach::Args),
    #[cfg(feature = "device")]
    AttachTab(attach_tab::Args),
    #[cfg(feature = "device")]
    Detach(detach::Args),
    #[cfg(feature = "device")]
    List(list::Args),
    #[cfg(feature = "device")]
    Verify(verify::Args),
    #[cfg(feature = "device")]
    Mount(mount::Args),
    #[cfg(feature = "device")]
    Report(report::Args),
    #[command(hide = true)]
    Completions(completions::Args),
    #[command(hide = true)]
    Manuals(manuals::Args),
}

impl Command {
    /// Those that talk to the kernel prepare for it themselves, where they read an image at all.
    fn reads_an_image(&self) -> bool {
        use Command as C;
        match self {
            C::Info(_) | C::Snapshots(_) | C::Partitions(_) | C::Map(_) | C::Plan(_) => true,
            C::Table(_) | C::Explain(_) | C::Check(_) | C::Diff(_) | C::Show(_) => true,
            C::Hash(_) | C::Convert(_) => true,
            #[cfg(feature = "device")]
            C::Export(_) => true,
            _ => false,
        }
    }
}

/// What the library notes on the way and no caller is told, like a udev that is late.
#[derive(Debug)]
struct StderrLog(Globals);

impl log::Log for StderrLog {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            self.0.warn(record.args());
        }
    }

    fn flush(&self) {}
}

/// What every command is told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Globals {
    quiet: bool,
}

impl Globals {
    /// Prints a warning on stderr, unless `--quiet`.
    pub(crate) fn warn(self, message: impl std::fmt::Display) {
        if !self.quiet {
            // A closed stderr must not stop the work.
            let _ = writeln!(io::stderr(), "imgdm: warning: {message}");
        }
    }
}

impl Globals {
    /// A progress bar for so many bytes, on stderr where that is a terminal.
    #[cfg(feature = "device")]
    pub(crate) fn progress(self, bytes: u64, what: &'static str) -> indicatif::ProgressBar {
        if self.quiet {
            return indicatif::ProgressBar::hidden();
        }
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {eta}";
        let bar = indicatif::ProgressBar::new(bytes).with_message(what);
        match indicatif::ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }
    }
}

/// The commands that are for people: manuals and completions are made of them.
fn visible_commands() -> clap::Command {
    let root = Cli::command();
    let shown = root.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    clap::Command::new("imgdm")
        .version(env!("CARGO_PKG_VERSION"))
        .about(root.get_about().cloned().unwrap_or_default())
        .after_help(root.get_after_help().cloned().unwrap_or_default())
        .disable_help_subcommand(true)
        .subcommand_required(true)
        .args(root.get_arguments().cloned())
        .subcommands(shown)
}

/// Runs the command line and turns its outcome into an exit status.
pub(crate) fn run() -> ExitCode {
    #[cfg(feature = "device")]
    {
        let words: Vec<_> = std::env::args_os().collect();
        if let [name, arguments @ ..] = words.as_slice()
            && Path::new(name).file_name() == Some(generator::NAME.as_ref())
        {
            return generator::run(arguments);
        }
        if mount::helper::is_meant() {
            return mount::helper::run();
        }
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if let Some(help) = convert::help_asked_for() {
                let _ = io::stdout().write_all(help.as_bytes());
                return ExitCode::SUCCESS;
            }
            // clap's own exit status for usage is 2; ours is sysexits' 64.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { exit::USAGE } else { 0 });
        }
    };
    let globals = Globals { quiet: cli.quiet };
    start(globals);
    if cli.command.reads_an_image()
        && let Err(error) = workers::prepare()
    {
        return finish(Err(error), exit_code);
    }
    let outcome = match cli.command {
        Command::Info(args) => info::run(&args, globals),
        Command::Snapshots(args) => snapshots::run(&args, globals),
        Command::Partitions(args) => partitions::run(&args, globals),
        Command::Map(args) => map::run(&args, globals),
        Command::Plan(args) => plan::run(&args, globals),
        Command::Table(args) => table::run(&args, globals),
        Command::Explain(args) => explain::run(&args, globals),
        Command::Check(args) => match check::run(&args, globals) {
            Ok(status) => return ExitCode::from(status),
            Err(error) => Err(error),
        },
        Command::Diff(args) => diff::run(&args, globals),
        Command::Show(args) => show::run(&args, globals),
        Command::Hash(args) => hash::run(&args, globals),
        Command::Convert(args) => convert::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Export(args) => export::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Attach(args) => attach::run(&args, globals),
        #[cfg(feature = "device")]
        Command::AttachTab(args) => attach_tab::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Detach(args) => detach::run(&args, globals),
        #[cfg(feature = "device")]
        Command::List(args) => list::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Verify(args) => verify::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Mount(args) => mount::run(&args, globals),
        #[cfg(feature = "device")]
        Command::Report(args) => report::run(&args, globals),
        Command::Completions(args) => completions::run(&args),
        Command::Manuals(args) => manuals::run(&args),
    };
    finish(outcome, exit_code)
}

/// What is to be done before any work.
fn start(globals: Globals) {
    if log::set_boxed_logger(Box::new(StderrLog(globals))).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    imgdm::device::raise_open_files_limit();
}

/// Says what went wrong, and gives the exit status for it.
fn finish(outcome: anyhow::Result<()>, status: fn(&anyhow::Error) -> u8) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = status(&error);
            if code != 0 {
                let _ = writeln!(io::stderr(), "imgdm: {}", exit::message(&error));
            }
            #[cfg(feature = "device")]
            if let Some(signal) = exit::interrupted_by(&error) {
                signal::die_by(signal);
            }
            ExitCode::from(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_clap_tree_is_consistent() {
        super::Cli::command().debug_assert();
    }
}
