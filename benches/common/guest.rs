//! A disk of files, and a benchmark that runs on it in a User-Mode Linux guest.

use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context;

use super::process::run;

const GUEST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/run");
/// Where the guest has the disk's files.
pub(crate) const PLACE: &str = "/run/bench";

/// Moves `files` to an ext4 file system in the file `disk`.
pub(crate) fn make_disk(files: &Path, disk: &Path, mib: u64) -> anyhow::Result<()> {
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "-d"]).arg(files).arg(disk);
    run(mkfs.arg(format!("{mib}M")))?;
    std::fs::remove_dir_all(files)?;
    Ok(())
}

/// Runs this benchmark again in a guest, as `guest ARGUMENT...`, with the disk there.
pub(crate) fn run_in_guest(disk: &Path, memory: &str, args: &[String]) -> anyhow::Result<ExitCode> {
    let mut guest = Command::new(GUEST);
    guest.args(["--timeout=3600"]).arg(format!("--mem={memory}"));
    guest.arg(format!("--disk={}", disk.display()));
    guest.arg("--").arg(std::env::current_exe()?).arg("guest").args(args);
    let status = guest.stdin(Stdio::null()).status().context("cannot start a guest")?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, Into::into))
}

/// Mounts the disk.
pub(crate) fn mount_disk() -> anyhow::Result<&'static Path> {
    let place = Path::new(PLACE);
    std::fs::create_dir_all(place)?;
    run(Command::new("mount").arg("/dev/ubda").arg(place))?;
    Ok(place)
}

/// Unmounts it: fails where something still holds a file of it.
pub(crate) fn unmount_disk() -> anyhow::Result<()> {
    run(Command::new("umount").arg(PLACE))?;
    Ok(())
}
