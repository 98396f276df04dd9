//! Damaged metadata, for the commands that go on past it.

use std::io::{self, Write};

use imgdm::Error;
use imgdm::chain::Chain;
use imgdm::damage::{Damage, DamageList};
use imgdm::open::{OpenPolicy, Warning, WarningKind, open_chain};
use imgdm::units::GuestRange;

use super::Globals;
use super::open::{OpenArgs, is_undeclared, print_warnings};
use super::output::show_path;

/// Opens an image whose bytes are handed to nobody: past damage to its tables, which comes
/// back beside the chain. Other warnings are printed.
///
/// # Errors
/// As [`open_chain`].
pub(crate) fn open_to_look(
    args: &OpenArgs,
    mut policy: OpenPolicy,
    globals: Globals,
) -> imgdm::Result<(Chain, Vec<Warning>)> {
    // qemu-img too probes a backing file without a declared format; nothing is given to a
    // guest or a kernel here, so a warning is enough.
    policy.probe_backing = true;
    policy.past_damage = true;
    let mut opened = open_chain(&args.image, &policy)?;
    if args.probe_backing {
        opened.warnings.retain(|warning| !is_undeclared(warning));
    }
    let of_damage = |warning: &Warning| matches!(warning.kind, WarningKind::Damaged(_));
    let (damaged, warnings) = opened.warnings.into_iter().partition::<Vec<_>, _>(of_damage);
    print_warnings(&warnings, globals);
    Ok((opened.chain, damaged))
}

/// Lists on stderr what damage was found and what of `whose` it spoils, and fails where
/// there is any; all else is `done`.
///
/// # Errors
/// There is damage.
pub(crate) fn report_damage(
    of_files: &[Warning],
    found: &DamageList,
    whose: &str,
    done: &str,
) -> anyhow::Result<()> {
    let count = found.count() + of_files.len() as u64;
    if count == 0 {
        return Ok(());
    }
    // Where nobody reads stderr, the exit status still has to tell of the damage.
    let _ = list(of_files, found, whose);
    let message = format!(
        "the metadata is damaged in {count} place{}; all else is {done}",
        if count == 1 { "" } else { "s" }
    );
    Err(Error::invalid(message).into())
}

fn list(of_files: &[Warning], found: &DamageList, whose: &str) -> io::Result<()> {
    let mut err = io::BufWriter::new(io::stderr());
    for Warning { path, kind } in of_files {
        writeln!(err, "imgdm: {}: {kind}", show_path(path))?;
    }
    for Damage { range, error, .. } in found.listed() {
        let path = error.path().map(|path| format!("{}: ", show_path(path))).unwrap_or_default();
        let (what, GuestRange { start, end }) = (error.without_path(), range);
        writeln!(err, "imgdm: {path}{what} (it spoils {whose} from {start} to {end})")?;
    }
    let more = found.count() - found.listed().len() as u64;
    if more > 0 {
        writeln!(err, "imgdm: and {more} more like these")?;
    }
    err.flush()
}
