//! What the commands print, human and JSON.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::ValueEnum;
use serde::Serialize;

use imgdm::error::printable;

/// How a command prints facts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    /// For people
    #[default]
    Human,
    /// For programs
    Json,
}

/// A path for people: control characters escaped.
pub(crate) fn show_path(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

/// A path in JSON: `path`, and `path_bytes` in hex where that is not the whole truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct JsonPath {
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_bytes: Option<String>,
}

impl From<&Path> for JsonPath {
    fn from(path: &Path) -> Self {
        let bytes = path.as_os_str().as_bytes();
        let path_bytes = path
            .to_str()
            .is_none()
            .then(|| bytes.iter().map(|byte| format!("{byte:02x}")).collect());
        Self { path: path.to_string_lossy().into_owned(), path_bytes }
    }
}

impl JsonPath {
    /// The path for people.
    pub(crate) fn shown(&self) -> String {
        printable(&self.path)
    }
}

/// Stdout without the line buffering of [`std::io::Stdout`]: a map has millions of lines.
pub(crate) fn stdout() -> io::Result<io::BufWriter<File>> {
    let fd = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(io::BufWriter::with_capacity(256 << 10, File::from(fd)))
}

/// Prints a value as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut out = stdout()?;
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    out.flush()?;
    Ok(())
}
