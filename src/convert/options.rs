//! The options of an output format: qemu-img's `-o` text, read and checked.

mod qcow2;
mod text;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;

pub use qcow2::{CompatibilityLevel, Qcow2Options};
use text::Settings;

/// How much of the output is allocated before there is data (`preallocation`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Only what holds data.
    #[default]
    Off,
    /// Each cluster has a place; the file has holes there.
    Metadata,
    /// Each cluster has a place, and the file system keeps its space.
    Falloc,
    /// Each cluster has a place, and zeros are written where there is no data.
    Full,
}

impl Preallocation {
    fn parse(text: &str, metadata: bool) -> Result<Self> {
        match text {
            "off" => Ok(Self::Off),
            "metadata" if metadata => Ok(Self::Metadata),
            "falloc" => Ok(Self::Falloc),
            "full" => Ok(Self::Full),
            _ => {
                let metadata = if metadata { "metadata, " } else { "" };
                Err(bad_value("preallocation", text, &format!("off, {metadata}falloc or full")))
            }
        }
    }
}

/// Options of a raw output.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawOptions {
    /// Never [`Preallocation::Metadata`].
    pub preallocation: Preallocation,
}

/// Options of a qcow output: it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QcowOptions {}

/// The options of an output, whose format they tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FormatOptions {
    /// The bytes of the disk.
    Raw(RawOptions),
    /// qcow2, version 2 or 3.
    Qcow2(Qcow2Options),
    /// qcow, version 1.
    Qcow(QcowOptions),
}

impl FormatOptions {
    /// Reads the `-o` texts, of which there can be several; without any, the defaults.
    ///
    /// # Errors
    /// `Usage`: an unknown option, one that is given twice, a value or a combination that the
    /// format does not have; a format that imgdm does not write.
    pub fn parse<T: AsRef<str>>(format: Format, texts: &[T]) -> Result<Self> {
        let mut settings = Settings::parse(format, texts)?;
        let options = match format {
            Format::Raw => {
                Self::Raw(RawOptions { preallocation: take_preallocation(&mut settings, false)? })
            }
            Format::Qcow2 => Self::Qcow2(Qcow2Options::take(&mut settings)?),
            Format::Qcow => Self::Qcow(QcowOptions {}),
            Format::Cow => return Err(not_written()),
        };
        settings.refuse_the_rest()?;
        Ok(options)
    }

    /// True where one of the texts asks for the list of options (`help` or `?`).
    pub fn asks_for_help<T: AsRef<str>>(texts: &[T]) -> bool {
        let asks = |part: &String| part == "help" || part == "?";
        texts.iter().any(|text| text::split(text.as_ref()).iter().any(asks))
    }

    /// The list of a format's options, with their defaults and limits.
    ///
    /// # Errors
    /// A format that imgdm does not write.
    pub fn help(format: Format) -> Result<&'static str> {
        match format {
            Format::Raw => Ok(RAW_HELP),
            Format::Qcow2 => Ok(qcow2::HELP),
            Format::Qcow => Ok("qcow has no options.\n"),
            Format::Cow => Err(not_written()),
        }
    }

    /// The format.
    pub fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
            Self::Qcow(_) => Format::Qcow,
        }
    }

    /// Whether they go with compression (`-c`) and with a backing file (`-B`).
    ///
    /// # Errors
    /// `Usage` where they don't.
    pub fn check(&self, compressed: bool, backing: bool) -> Result<()> {
        match self {
            Self::Raw(_) if compressed => {
                Err(usage("raw images hold nothing compressed: leave out -c, or write qcow2"))
            }
            Self::Raw(_) if backing => {
                Err(usage("raw images have no backing file: leave out -B, or write qcow2"))
            }
            Self::Raw(_) | Self::Qcow(_) => Ok(()),
            Self::Qcow2(options) => options.check(compressed, backing),
        }
    }

    /// The name of the external data file that is to be made beside the output, as the image
    /// stores it.
    pub fn data_file(&self) -> Option<&str> {
        match self {
            Self::Qcow2(options) => options.data_file.as_deref(),
            Self::Raw(_) | Self::Qcow(_) => None,
        }
    }
}

const RAW_HELP: &str = "\
preallocation=off|falloc|full  what is allocated where there is no data: nothing (off, the
                               default), the space (falloc), or written zeros (full)
";

fn take_preallocation(settings: &mut Settings, metadata: bool) -> Result<Preallocation> {
    let text = settings.take("preallocation");
    text.map_or(Ok(Preallocation::Off), |text| Preallocation::parse(&text, metadata))
}

fn usage(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Usage(message.into()))
}

fn bad_value(option: &str, value: &str, possible: &str) -> Error {
    usage(format!("-o {option}={value}: it can be {possible}"))
}

fn not_written() -> Error {
    usage("the format 'cow' is read, but not written (raw, qcow2 and qcow are)")
}

#[cfg(test)]
mod tests;
