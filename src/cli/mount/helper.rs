//! `mount.imgdm`: what mount(8) runs for the type `imgdm`, from the command line or from
//! fstab. Its options become those of `imgdm mount`.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use imgdm::filesystem::{Item, split};
use imgdm::{Error, ErrorKind};

use crate::cli::exit::{is_broken_pipe, ours};
use crate::cli::{Cli, Command, Globals, finish, start};

/// The name by which mount(8) runs us.
const NAME: &str = "mount.imgdm";

// The exit statuses of mount(8).
const USAGE: u8 = 1;
const SYSTEM: u8 = 2;
const INTERRUPTED: u8 = 8;
const FAILED: u8 = 32;

/// Mount a file system of a virtual-machine disk image, read-only or over an overlay; run by
/// mount(8) for the type imgdm
#[derive(Debug, Parser)]
#[command(
    name = NAME,
    version,
    max_term_width = 100,
    after_help = "Examples:\n  mount -t imgdm disk.qcow2 /mnt -o partition=1\n  mount -t imgdm disk.qcow2 /mnt -o snapshot=before-update,lv=guest/root\n\nIn /etc/fstab:\n  /srv/disk.qcow2  /mnt  imgdm  partition=1,noauto  0 0\n  /srv/disk.qcow2  /try  imgdm  partition=1,noauto,overlay=/srv/disk.changes  0 0\n\nOptions are the long ones of 'imgdm mount', the usual ones of mount(8), and all else is\nthe file system's own. Without 'overlay', 'rw' is taken for 'ro', which mount(8) says unasked; and for\n'exec', 'suid' and 'dev', which it keeps to itself, say allow-exec, allow-suid, allow-dev.\n\nExit status, as of mount(8): 0 done, 1 usage or permission, 2 the system lacks something,\n8 interrupted, 32 mount failed."
)]
struct Helper {
    /// The image: a file or a block device
    #[arg(value_name = "SPEC")]
    image: OsString,

    /// The directory to mount on
    #[arg(value_name = "DIR")]
    directory: OsString,

    /// Pass over options that the file system does not know
    #[arg(short)]
    sloppy: bool,

    /// Check all that can be checked, and mount nothing
    #[arg(short)]
    fake: bool,

    /// Do not write to mtab; nothing does
    #[arg(short)]
    no_mtab: bool,

    /// Say what was mounted, and how
    #[arg(short)]
    verbose: bool,

    /// The mount namespace to mount in
    #[arg(short = 'N', value_name = "NS")]
    namespace: Option<OsString>,

    /// Options, separated by commas
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// The type: imgdm, or imgdm.FSTYPE
    #[arg(short = 't', value_name = "TYPE.SUBTYPE")]
    kind: Option<String>,
}

/// True where this program was run as mount(8)'s helper.
pub(crate) fn is_meant() -> bool {
    let program = std::env::args_os().next().unwrap_or_default();
    Path::new(&program).file_name() == Some(OsStr::new(NAME))
}

/// Runs the command line of the helper.
pub(crate) fn run() -> ExitCode {
    let helper = match Helper::try_parse() {
        Ok(helper) => helper,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { USAGE } else { 0 });
        }
    };
    let line = match helper.line() {
        Ok(line) => line,
        Err(error) => {
            let _ = writeln!(io::stderr(), "imgdm: {error}");
            return ExitCode::from(USAGE);
        }
    };
    let cli = match Cli::try_parse_from(line) {
        Ok(cli) => cli,
        Err(error) => {
            // Of a usage line for 'imgdm mount' nobody who wrote -o has any use.
            let text = error.to_string();
            let text = text.split("\n\n").next().unwrap_or_default();
            let text = text.trim_start_matches("error: ");
            let _ = writeln!(io::stderr(), "imgdm: the option {text}");
            return ExitCode::from(USAGE);
        }
    };
    let globals = Globals { quiet: cli.quiet };
    start(globals);
    let Command::Mount(args) = cli.command else { return ExitCode::from(USAGE) };
    finish(super::run_for_helper(&args, globals), status)
}

impl Helper {
    /// The line of `imgdm mount` that means the same.
    fn line(&self) -> Result<Vec<OsString>, Error> {
        let mut line: Vec<OsString> = vec!["imgdm".into(), "mount".into()];
        let ours = own_options();
        let mut others = Vec::new();
        for item in split(&self.options.join(","))? {
            if ours.contains(&item.key) {
                let value = item.value.map(|value| format!("={value}")).unwrap_or_default();
                line.push(format!("--{}{value}", item.key).into());
            } else if item.key != "rw" || item.value.is_some() {
                others.push(joined(&item));
            }
        }
        if !others.is_empty() {
            line.push(format!("--options={}", others.join(",")).into());
        }
        if let Some(kind) = self.kind.as_deref().and_then(|kind| kind.split_once('.')) {
            line.push(format!("--type={}", kind.1).into());
        }
        for (is_given, option) in
            [(self.sloppy, "--sloppy"), (self.fake, "--fake"), (self.verbose, "--verbose")]
        {
            if is_given {
                line.push(option.into());
            }
        }
        if let Some(namespace) = &self.namespace {
            line.extend(["--namespace".into(), namespace.clone()]);
        }
        line.extend(["--".into(), self.image.clone(), self.directory.clone()]);
        Ok(line)
    }
}

/// The long options of `imgdm mount` that are options of the helper too: all but those that
/// it has a letter for, or that mean something else to a file system.
fn own_options() -> Vec<String> {
    const NOT: [&str; 8] =
        ["options", "type", "sloppy", "fake", "verbose", "namespace", "quiet", "help"];
    let tree = Cli::command();
    let mount = tree.find_subcommand("mount").map(|mount| mount.get_arguments());
    let long = mount.into_iter().flatten().filter_map(|argument| argument.get_long());
    long.filter(|name| !NOT.contains(name)).map(str::to_owned).collect()
}

/// An option as it stands in a list of them.
fn joined(Item { key, value }: &Item) -> String {
    match value {
        None => key.clone(),
        Some(value) if value.contains(',') => format!("{key}=\"{value}\""),
        Some(value) => format!("{key}={value}"),
    }
}

/// mount(8)'s exit status for an error.
fn status(error: &anyhow::Error) -> u8 {
    if is_broken_pipe(error) {
        return 0;
    }
    match error.chain().find_map(ours).map(Error::kind) {
        Some(ErrorKind::Usage(_) | ErrorKind::PermissionDenied(_)) => USAGE,
        Some(ErrorKind::KernelLacks(_)) => SYSTEM,
        Some(ErrorKind::Interrupted(_)) => INTERRUPTED,
        _ => FAILED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(arguments: &[&str]) -> Vec<String> {
        let helper = Helper::try_parse_from([&[NAME], arguments].concat()).unwrap();
        let line = helper.line().unwrap();
        line.into_iter().skip(2).map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn options_of_ours_become_long_ones_and_the_rest_stays() {
        let options = r#"rw,noauto,partition=1,snapshot=x y,force-share,subvol="a,b",uid=5"#;
        let words = line(&["/srv/disk.qcow2", "/mnt", "-o", options, "-sv", "-N", "/ns"]);
        let wanted = [
            "--partition=1",
            "--snapshot=x y",
            "--force-share",
            r#"--options=noauto,subvol="a,b",uid=5"#,
            "--sloppy",
            "--verbose",
            "--namespace",
            "/ns",
            "--",
            "/srv/disk.qcow2",
            "/mnt",
        ];
        assert_eq!(words, wanted);
    }

    #[test]
    fn an_overlay_is_asked_for_with_a_file_or_without() {
        let options = "overlay,rw,noatime";
        let words = line(&["disk", "/mnt", "-o", options]);
        assert_eq!(words, ["--overlay", "--options=noatime", "--", "disk", "/mnt"]);
        let words = line(&["disk", "/mnt", "-o", "overlay=/a b,overlay-size=1G,ro"]);
        let wanted = ["--overlay=/a b", "--overlay-size=1G", "--options=ro", "--", "disk", "/mnt"];
        assert_eq!(words, wanted);
    }

    #[test]
    fn the_subtype_is_the_file_systems_type() {
        let words = line(&["disk", "/mnt", "-f", "-n", "-t", "imgdm.ext4"]);
        assert_eq!(words, ["--type=ext4", "--fake", "--", "disk", "/mnt"]);
        assert_eq!(line(&["disk", "/mnt", "-t", "imgdm"]), ["--", "disk", "/mnt"]);
    }

    #[test]
    fn every_line_that_the_helper_makes_is_one_of_imgdm_mount() {
        let words = line(
            &["-disk", "/mnt", "-o", "ro,partition=3,key-file=/k:0"]
                .map(|word| if word == "-disk" { "./-disk" } else { word }),
        );
        let all = ["imgdm", "mount"].map(str::to_owned).into_iter().chain(words);
        assert!(matches!(Cli::try_parse_from(all).unwrap().command, Command::Mount(_)));
    }

    #[test]
    fn an_option_of_a_file_system_is_not_taken_for_ours() {
        for key in ["quiet", "sloppy", "type", "help"] {
            assert!(!own_options().contains(&key.to_owned()), "{key}");
        }
        for key in ["partition", "snapshot", "lv", "key-file", "format", "force-share", "name"] {
            assert!(own_options().contains(&key.to_owned()), "{key}");
        }
    }
}
