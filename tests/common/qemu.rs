//! QEMU's own tools: the reference.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use sha2::{Digest, Sha256};

use super::process::{Outcome, Ran, run};

/// The oldest qemu-img whose `map` is the reference.
const OLDEST: u32 = 10;

/// One of QEMU's tools, to be run in `dir`.
///
/// # Errors
/// There is no qemu-img, or it is too old to compare with.
fn tool(name: &str, dir: &Path) -> Outcome<Command> {
    static CHECKED: OnceLock<Outcome> = OnceLock::new();
    CHECKED.get_or_init(check_version).clone()?;
    let mut command = Command::new(name);
    command.current_dir(dir);
    Ok(command)
}

fn check_version() -> Outcome {
    let said = run(Command::new("qemu-img").arg("--version"))
        .map_err(|error| format!("needs qemu-img {OLDEST}, found none: {error}"))?
        .ok()?
        .text();
    let first = said.lines().next().unwrap_or("nothing").to_owned();
    let major: Option<u32> = first
        .strip_prefix("qemu-img version ")
        .and_then(|rest| rest.split('.').next())
        .and_then(|number| number.parse().ok());
    match major {
        Some(major) if major >= OLDEST => Ok(()),
        _ => Err(format!("needs qemu-img {OLDEST}, found '{first}'")),
    }
}

/// Runs qemu-img in `dir`, whatever it exits with.
///
/// # Errors
/// It could not be run.
pub(crate) fn img_any<S: AsRef<OsStr>>(dir: &Path, args: &[S]) -> Outcome<Ran> {
    let mut command = tool("qemu-img", dir)?;
    run_unlocked(command.args(args))
}

/// Runs one of QEMU's tools, again where the image was locked: a program that another
/// thread of the tests just started has all our descriptors until it runs, and with them
/// the locks of an image that was closed meanwhile.
fn run_unlocked(command: &mut Command) -> Outcome<Ran> {
    for _ in 0..50 {
        let ran = run(command)?;
        if !ran.stderr.contains("Failed to get \"write\" lock") {
            return Ok(ran);
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    run(command)
}

/// Runs qemu-img in `dir`.
///
/// # Errors
/// It failed; the message has the command and what it said.
pub(crate) fn img<S: AsRef<OsStr>>(dir: &Path, args: &[S]) -> Outcome<Ran> {
    img_any(dir, args)?.ok()
}

/// Runs qemu-io in `dir` with these commands on one image, whatever they come to.
///
/// # Errors
/// It could not be run.
pub(crate) fn io_any(dir: &Path, format: &str, image: &str, commands: &[String]) -> Outcome<Ran> {
    let mut command = tool("qemu-io", dir)?;
    command.args(["-f", format, "-d", "unmap"]);
    for line in commands {
        command.args(["-c", line]);
    }
    run_unlocked(command.arg(image))
}

/// Runs qemu-io in `dir` with these commands on one image.
///
/// # Errors
/// It failed, or one of the commands did.
pub(crate) fn io(dir: &Path, format: &str, image: &str, commands: &[String]) -> Outcome<Ran> {
    let ran = io_any(dir, format, image, commands)?.ok()?;
    // Not every failing command makes it exit with 1.
    if ran.text().contains("failed") || !ran.stderr.is_empty() {
        return Err(ran.describe());
    }
    Ok(ran)
}

/// The content of a file, in hex.
///
/// # Errors
/// It can't be read.
pub(crate) fn sha256(path: &Path) -> Outcome<String> {
    let fail = |error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(fail)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(fail)?;
        if n == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..n]);
    }
}
