//! imgdm-generator: systemd's units for the images of /etc/imgdmtab.
//!
//! systemd.generator(7): called by that name with three directories before units are read,
//! at boot and at each daemon-reload. It has to be quick, must not wait for anything, and
//! writes to those directories alone. It opens no image.

mod escape;
mod mounts;
mod units;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use imgdm::imgdmtab::{self, DEFAULT_PATH};
use imgdm::{Error, ErrorKind, Result};

use super::output::show_path;
use super::{exit, tab};
use mounts::Mounts;
use units::{Made, Setting, What};

/// The name by which the program is called to be a generator.
pub(crate) const NAME: &str = "imgdm-generator";

/// Runs as the generator, with what follows its name.
pub(crate) fn run(arguments: &[OsString]) -> ExitCode {
    // Given by systemd, which shows nobody what generators print.
    let log = Log { to_kernel: std::env::var_os("SYSTEMD_SCOPE").is_some() };
    let [directory, ..] = arguments else {
        log.error(format_args!("usage: {NAME} DIRECTORY [EARLY-DIRECTORY LATE-DIRECTORY]"));
        return ExitCode::from(exit::USAGE);
    };
    match generate(Path::new(directory), &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log.error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Where a boot's messages go.
struct Log {
    to_kernel: bool,
}

impl Log {
    fn error(&self, message: impl Display) {
        self.log(3, &message);
    }

    fn notice(&self, message: impl Display) {
        self.log(5, &message);
    }

    fn log(&self, level: u8, message: &dyn Display) {
        let _ = writeln!(io::stderr(), "{NAME}: {message}");
        if self.to_kernel {
            // One write is one record.
            let record = format!("<{level}>{NAME}[{}]: {message}\n", std::process::id());
            let kernel = fs::OpenOptions::new().write(true).open("/dev/kmsg");
            let _ = kernel.and_then(|mut kernel| kernel.write_all(record.as_bytes()));
        }
    }
}

/// A file that the environment may name, for trying things out.
fn file_of(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| default.into(), PathBuf::from)
}

fn is_initrd() -> bool {
    match std::env::var_os("SYSTEMD_IN_INITRD") {
        Some(value) => value == "1",
        None => Path::new("/etc/initrd-release").exists(),
    }
}

fn generate(directory: &Path, log: &Log) -> Result<()> {
    let path = file_of("IMGDM_TAB", DEFAULT_PATH);
    let tab = match tab::read(&path) {
        Ok(tab) => tab,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    let program = std::env::current_exe()
        .map_err(|error| Error::io("cannot tell where the program is", error))?;
    let program = program.to_str().ok_or_else(|| {
        let message = "the program's path is not UTF-8: no unit could name it";
        Error::new(ErrorKind::Usage(message.to_owned())).at_path(&program)
    })?;
    let fstab = fs::read(file_of("SYSTEMD_FSTAB", "/etc/fstab")).unwrap_or_default();
    let mounts = Mounts::parse(&fstab);
    let mounted: BTreeSet<_> = mounts.devices().cloned().collect();
    let in_initrd = is_initrd();
    let entries: Vec<_> =
        tab.entries.iter().filter(|entry| entry.boot.initrd || !in_initrd).collect();
    let circular = mounts::circular(&entries, &mounts);
    for (line, directory) in &circular {
        log.notice(format_args!(
            "{}: line {line}: not waiting for the mount of {}, which waits for this image",
            show_path(&path),
            show_path(directory)
        ));
    }
    let setting = Setting { program, tab: &path, mounted: &mounted, circular: &circular };
    let too_long = |name: &str, line| {
        let kind = imgdmtab::TabErrorKind::Name(format!(
            "the name '{name}' becomes too long as the name of a unit"
        ));
        imgdmtab::TabError { line, name: None, kind }.at(&path)
    };
    let mut made = BTreeSet::new();
    for entry in entries {
        match units::of_entry(entry, &setting) {
            Some(units) => made.extend(units),
            None => log.error(too_long(&entry.name, entry.line)),
        }
    }
    for error in tab.errors {
        if let Some(name) = &error.name {
            made.extend(units::of_wrong_line(name, error.line, &setting).unwrap_or_default());
        }
        log.error(error.at(&path));
    }
    // What can't be made keeps nothing else from being made.
    let failed = made.iter().filter_map(|each| make(directory, each).err());
    match failed.inspect(|error| log.error(error)).count() {
        0 => Ok(()),
        _ => Err(Error::new(ErrorKind::Io("some units could not be made".to_owned()))),
    }
}

fn make(directory: &Path, made: &Made) -> Result<()> {
    let path = directory.join(&made.path);
    let failed = |error| Error::io("cannot make the unit's file", error).at_path(&path);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    match &made.what {
        What::Link(target) => symlink(target, &path).map_err(failed),
        What::File(text) => {
            let file = fs::OpenOptions::new().write(true).create_new(true).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(failed)
        }
    }
}
