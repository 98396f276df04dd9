//! The arguments by which every command opens an image.

use std::path::PathBuf;

use clap::ValueEnum;
use imgdm::Result;
use imgdm::chain::Chain;
use imgdm::format::Format;
use imgdm::format::qcow2::SnapshotSelector;
use imgdm::info::InfoOptions;
use imgdm::lock::Sharing;
use imgdm::open::{OpenPolicy, OpenedChain, PolicyFile, Reach, Warning, WarningKind, open_chain};
use imgdm::plan::ZeroMode;

use super::Globals;
use super::output::show_path;

/// Arguments that open an image; which of its snapshots is for `S` to say.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OpenArgs<S: clap::Args = OneSnapshot> {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,

    /// Format of the image (raw, qcow2, qcow, cow); without it the format is probed
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    #[command(flatten)]
    pub(crate) snapshots: S,

    /// Read even while another program writes to the image; what is read may be torn
    #[arg(short = 'U', long)]
    pub(crate) force_share: bool,

    /// Probe the format of a backing file whose overlay declares none. Risky with a raw
    /// one: its guest can make it look like an overlay of any file of this host
    #[arg(long)]
    pub(crate) probe_backing: bool,

    /// Read a cow image though its backing file is not the one that it recorded
    #[arg(long)]
    allow_changed_backing: bool,

    /// Read a qcow2 image though it is marked corrupt
    #[arg(long)]
    allow_corrupt: bool,

    /// The external data file, in place of the one that the image names
    #[arg(long, value_name = "PATH")]
    data_file: Option<PathBuf>,

    #[command(flatten)]
    reach: ReachArgs,
}

/// Where the files may lie that an image names.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct ReachArgs {
    /// Let the image name backing and data files in this directory and below it, too, or this
    /// one file or block device; can be given several times. Without it, only regular files in
    /// the image's own directory and below
    #[arg(long, value_name = "DIR")]
    allow_path: Vec<PathBuf>,
}

impl ReachArgs {
    /// What these arguments, or else /etc/imgdm.conf, allow.
    pub(crate) fn reach(&self) -> Reach {
        Reach {
            allowed: self.allow_path.clone(),
            policy_file: Some(PolicyFile::DEFAULT_PATH.into()),
        }
    }
}

/// The active layer, or one snapshot in its stead.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct OneSnapshot {
    /// Read this internal snapshot, by ID or else by name (also snapshot.id=ID,
    /// snapshot.name=NAME)
    #[arg(short = 'l', long, value_name = "SNAP")]
    snapshot: Option<SnapshotSelector>,
}

impl OpenArgs {
    /// The first option given that says what an attachment says itself.
    #[cfg(feature = "device")]
    pub(crate) fn what_is_known_of_the_attached(&self) -> Option<&'static str> {
        let given = [
            ("-l", self.snapshots.snapshot.is_some()),
            ("-f", self.format.is_some()),
            ("--data-file", self.data_file.is_some()),
        ];
        given.into_iter().find_map(|(option, is_given)| is_given.then_some(option))
    }

    /// The policy that these arguments ask for.
    pub(crate) fn policy(&self) -> OpenPolicy {
        self.policy_for(self.snapshots.snapshot.as_ref())
    }

    /// Opens an image whose bytes are read here and go no further, and prints the warnings.
    pub(crate) fn open_to_read(&self, globals: Globals) -> Result<Chain> {
        self.open_to_read_as(self.policy(), globals)
    }

    /// The same by a policy made of these arguments.
    pub(crate) fn open_to_read_as(&self, policy: OpenPolicy, globals: Globals) -> Result<Chain> {
        // As for a map: nothing is given to a guest or a kernel, so a warning is enough.
        let policy = OpenPolicy { probe_backing: true, ..policy };
        let OpenedChain { chain, mut warnings } = open_chain(&self.image, &policy)?;
        if self.probe_backing {
            warnings.retain(|warning| !is_undeclared(warning));
        }
        print_warnings(&warnings, globals);
        Ok(chain)
    }
}

impl<S: clap::Args> OpenArgs<S> {
    /// The policy for one of the image's snapshots, or for the active layer.
    pub(crate) fn policy_for(&self, snapshot: Option<&SnapshotSelector>) -> OpenPolicy {
        OpenPolicy {
            format: self.format,
            snapshot: snapshot.cloned(),
            sharing: sharing(self.force_share),
            reach: self.reach.reach(),
            probe_backing: self.probe_backing,
            allow_changed_backing: self.allow_changed_backing,
            allow_corrupt: self.allow_corrupt,
            data_file: self.data_file.clone(),
            ..OpenPolicy::default()
        }
    }
}

/// Arguments that open one image to look at its metadata.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ImageArgs {
    /// The image: a file or a block device
    #[arg(value_name = "IMAGE")]
    pub(crate) image: PathBuf,

    /// Format of the image (raw, qcow2, qcow, cow); without it the format is probed
    #[arg(short, long, value_name = "FMT")]
    format: Option<Format>,

    /// Read even while another program writes to the image; what is read may be torn
    #[arg(short = 'U', long)]
    force_share: bool,
}

impl ImageArgs {
    /// The options that these arguments ask for; nothing outside the image's directory is
    /// looked at.
    pub(crate) fn options(&self) -> InfoOptions {
        InfoOptions {
            format: self.format,
            sharing: sharing(self.force_share),
            reach: Reach::default(),
        }
    }
}

fn sharing(force_share: bool) -> Sharing {
    if force_share { Sharing::Writers } else { Sharing::Readers }
}

/// The switch for FIEMAP, on the commands that use it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct FiemapArgs {
    /// Do not ask the file system for unwritten extents (FIEMAP)
    #[arg(long)]
    pub(crate) no_fiemap: bool,
}

impl FiemapArgs {
    /// Lets unwritten extents count as zero, unless switched off.
    pub(crate) fn apply(self, policy: &mut OpenPolicy) {
        if !self.no_fiemap {
            policy.unwritten = Some(std::sync::Arc::new(imgdm::device::fiemap::Fiemap));
        }
    }
}

/// How zeros are served.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct ZeroArgs {
    /// Serve zeros by dm-zero, by a loop device of zeros, or each as it suits
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    zero: ZeroChoice,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum ZeroChoice {
    /// Long runs by dm-zero, short ones by the loop or through the hole itself
    #[default]
    Auto,
    /// All by dm-zero
    Dm,
    /// All by the loop
    Loop,
}

impl ZeroArgs {
    /// The mode asked for.
    pub(crate) fn mode(self) -> ZeroMode {
        match self.zero {
            ZeroChoice::Auto => ZeroMode::Auto,
            ZeroChoice::Dm => ZeroMode::Dm,
            ZeroChoice::Loop => ZeroMode::Loop,
        }
    }
}

/// Prints the warnings of opening on stderr.
pub(crate) fn print_warnings(warnings: &[Warning], globals: Globals) {
    for Warning { path, kind } in warnings {
        globals.warn(format_args!("{}: {kind}", show_path(path)));
    }
}

/// Whether a warning is about something that attach would refuse.
pub(crate) fn is_undeclared(warning: &Warning) -> bool {
    matches!(warning.kind, WarningKind::UndeclaredBackingFormat(_))
}

/// A number of bytes as QEMU's options take it, but for fractions: decimal or 0x..., with
/// b, k, M, G, T, P or E behind a decimal one.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if !text.starts_with("0x") && !text.starts_with("0X") => {
            let shift = match unit.to_ascii_lowercase() {
                'b' => Some(0),
                'k' => Some(10),
                'm' => Some(20),
                'g' => Some(30),
                't' => Some(40),
                'p' => Some(50),
                'e' => Some(60),
                _ => None,
            };
            shift.map_or((text, 0), |shift| (&text[..at], shift))
        }
        _ => (text, 0),
    };
    let hex = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let number = match hex {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => digits.parse(),
    };
    number
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| "not a number of bytes (like 512, 0x200, 64k or 1G)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("0x200"), Ok(512));
        assert_eq!(parse_size("0xb"), Ok(11));
        assert_eq!(parse_size("64k"), Ok(65536));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        for bad in ["", "k", "-1", "1x", "9E", "0x", "1.5G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
