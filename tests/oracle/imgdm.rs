//! Running the program under test.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ::imgdm::open::OpenPolicy;

use crate::common::process::{Outcome, Ran, run};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_imgdm");

/// Exit codes of imgdm.
pub(crate) const EX_INVALID: i32 = 65;
pub(crate) const EX_MISSING: i32 = 66;
pub(crate) const EX_NOT_REPRESENTABLE: i32 = 76;
pub(crate) const EX_PERMISSION: i32 = 77;

/// The commands that open the files which an image names.
const OPENS_CHAINS: [&str; 11] = [
    "attach",
    "convert",
    "diff",
    "explain",
    "hash",
    "info",
    "map",
    "partitions",
    "plan",
    "show",
    "table",
];

/// A copy in `dir`, for those who have no way to where cargo built it. `cp` makes it: a program that
/// this process wrote can't be run while another test's child, just forked, has it open.
///
/// # Errors
/// It could not be copied.
pub(crate) fn program_in(dir: &Path) -> Outcome<PathBuf> {
    let copy = dir.join("imgdm");
    run(Command::new("cp").arg(PROGRAM).arg(&copy))?.ok()?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).map_err(|e| e.to_string())?;
    Ok(copy)
}

/// Runs imgdm in `dir`, where images may name files in all of that, as with QEMU they may.
///
/// # Errors
/// It could not be run, did not end, was ended by a signal, or panicked.
pub(crate) fn imgdm<S: AsRef<OsStr>>(dir: &Path, args: &[S]) -> Outcome<Ran> {
    let mut command = Command::new(PROGRAM);
    command.current_dir(dir);
    match args.split_first() {
        Some((first, rest)) if OPENS_CHAINS.iter().any(|name| first.as_ref() == *name) => {
            command.arg(first).arg("--allow-path=.").args(rest)
        }
        _ => command.args(args),
    };
    sound(run(&mut command)?)
}

/// The policy by which images may name files in all of `dir`, as with QEMU they may.
pub(crate) fn all_of(dir: &Path, policy: &OpenPolicy) -> OpenPolicy {
    let mut policy = policy.clone();
    policy.reach.allowed.push(dir.to_owned());
    policy
}

/// No end of imgdm that no input may bring about.
///
/// # Errors
/// A signal or a panic ended it.
pub(crate) fn sound(ran: Ran) -> Outcome<Ran> {
    if ran.code().is_none_or(|code| code == 101) || ran.stderr.contains("panicked at") {
        return Err(ran.describe());
    }
    Ok(ran)
}

/// Checks that imgdm gave up with one of these codes, with nothing on stdout but
/// what a map had got to, and with words on stderr.
///
/// # Errors
/// It did something else.
pub(crate) fn refused(ran: &Ran, codes: &[i32], words: &[&str]) -> Outcome {
    if !ran.code().is_some_and(|code| codes.contains(&code)) {
        return Err(format!("should exit with one of {codes:?}:\n{}", ran.describe()));
    }
    for word in words {
        if !ran.stderr.to_lowercase().contains(&word.to_lowercase()) {
            return Err(format!("should say '{word}':\n{}", ran.describe()));
        }
    }
    if ran.stderr.trim().is_empty() {
        return Err(format!("should say why:\n{}", ran.describe()));
    }
    Ok(())
}
