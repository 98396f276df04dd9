//! The arguments about what dm-linear can't serve from the image's own files.

use std::path::PathBuf;

use clap::ValueEnum;
use imgdm::plan::{CompressedMode, PlanOptions};
use imgdm::scratch::OnError;

use super::open::ZeroArgs;

/// What is done with compressed clusters, and with those that can't be read.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct ContentArgs {
    /// What to do with compressed clusters
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub(crate) compressed: Compressed,

    /// What to do with clusters that do not inflate or lie past the end of a cut-off file
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    on_error: OnErrorChoice,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compressed {
    /// Inflate them into an unlinked scratch file, which goes with the device
    #[default]
    Scratch,
    /// Inflate them into a kept file, which the next attach uses again
    Cache,
    /// Attach no image that has any
    Refuse,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum OnErrorChoice {
    /// Attach nothing
    #[default]
    Refuse,
    /// Let them read as zeros, and list them
    Zero,
    /// Let reading them fail, and list them
    ErrorTarget,
}

impl ContentArgs {
    /// What was asked to be done on errors.
    pub(crate) fn on_error(self) -> OnError {
        match self.on_error {
            OnErrorChoice::Refuse => OnError::Refuse,
            OnErrorChoice::Zero => OnError::Zero,
            OnErrorChoice::ErrorTarget => OnError::ErrorTarget,
        }
    }

    /// The options of a plan.
    pub(crate) fn options(self, zero: ZeroArgs) -> PlanOptions {
        PlanOptions {
            compressed: match self.compressed {
                Compressed::Scratch | Compressed::Cache => CompressedMode::Inflate,
                Compressed::Refuse => CompressedMode::Refuse,
            },
            on_error: self.on_error(),
            zero: zero.mode(),
            ..PlanOptions::default()
        }
    }
}

/// Where that is written to.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct PlaceArgs {
    /// Directory of the scratch file; without it /var/tmp, or /run (memory) where that can't
    /// be written
    #[arg(long, value_name = "DIR")]
    pub(crate) scratch_dir: Option<PathBuf>,

    /// Directory of the kept files of --compressed=cache
    #[arg(long, value_name = "DIR", default_value = "/var/cache/imgdm")]
    pub(crate) cache_dir: PathBuf,
}
