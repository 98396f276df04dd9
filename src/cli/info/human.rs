//! `imgdm info` for people: the lines of `qemu-img info`, then ours.

use std::io::{self, Write};

use imgdm::error::printable;

use super::json::{File, Info, JsonHolder, Ours};
use crate::cli::output::{human_size, local_time, stdout};
use crate::cli::snapshots;

/// Prints images, each after its overlay.
pub(super) fn print(infos: &[Info]) -> anyhow::Result<()> {
    let mut out = stdout()?;
    for (index, info) in infos.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        node(&mut out, info, 0)?;
        for child in &info.children {
            writeln!(out, "Child node '/{}':", child.name)?;
            node(&mut out, &child.info, 1)?;
        }
        if let Some(ours) = &info.imgdm {
            print_ours(&mut out, ours)?;
        }
    }
    out.flush()?;
    Ok(())
}

/// bdrv_node_info_dump() of QEMU's block/qapi.c; at depth 1 the node is a file and no disk.
fn node(out: &mut impl Write, info: &Info, depth: usize) -> io::Result<()> {
    let indent = " ".repeat(depth * 4);
    let [name, kind, size] = match depth {
        0 => ["image", "file format", "virtual size"],
        _ => ["filename", "protocol type", "file length"],
    };
    writeln!(out, "{indent}{name}: {}", printable(&info.filename))?;
    writeln!(out, "{indent}{kind}: {}", info.format)?;
    let bytes = info.virtual_size;
    writeln!(out, "{indent}{size}: {} ({bytes} bytes)", human_size(bytes))?;
    let actual = info.actual_size.map_or_else(|| "unavailable".to_owned(), human_size);
    writeln!(out, "{indent}disk size: {actual}")?;
    if info.encrypted {
        writeln!(out, "{indent}encrypted: yes")?;
    }
    if let Some(cluster_size) = info.cluster_size {
        writeln!(out, "{indent}cluster_size: {cluster_size}")?;
    }
    if info.dirty_flag {
        writeln!(out, "{indent}cleanly shut down: no")?;
    }
    if let Some(name) = &info.backing_filename {
        let full = info.full_backing_filename.as_ref().filter(|full| *full != name);
        let full = full.map(|full| format!(" (actual path: {})", printable(full)));
        writeln!(out, "{indent}backing file: {}{}", printable(name), full.unwrap_or_default())?;
    }
    if let Some(format) = &info.backing_filename_format {
        writeln!(out, "{indent}backing file format: {}", printable(format))?;
    }
    if !info.snapshot_table.is_empty() {
        writeln!(out, "{indent}Snapshot list:\n{indent}{}", snapshots::headline())?;
        for snapshot in &info.snapshot_table {
            writeln!(out, "{indent}{}", snapshots::row(snapshot))?;
        }
    }
    if let Some(specific) = info.format_specific.as_ref().filter(|s| !s.data.is_empty()) {
        writeln!(out, "{indent}Format specific information:")?;
        specific.data.dump(out, depth + 1)?;
    }
    Ok(())
}

fn print_ours(out: &mut impl Write, ours: &Ours) -> io::Result<()> {
    writeln!(out, "Files:")?;
    let data_file = ours.data_file.iter().map(|file| ("data file", file));
    for (name, file) in std::iter::once(("image", &ours.image)).chain(data_file) {
        writeln!(out, "    {name}: {}", file.path.shown())?;
        print_file(out, file)?;
    }
    if let Some(cow) = &ours.cow {
        writeln!(out, "cow layout: {}", cow.layout)?;
        if let Some(seconds) = cow.backing_mtime_sec {
            let size = cow.backing_size.map(|size| format!(", {size} bytes"));
            let modified = local_time(seconds.into());
            let size = size.unwrap_or_default();
            writeln!(out, "backing file when it was made: modified {modified}{size}")?;
        }
    }
    if !ours.notices.is_empty() {
        writeln!(out, "Notices:")?;
    }
    for notice in &ours.notices {
        writeln!(out, "    {}: {}", notice.kind, printable(&notice.message))?;
    }
    Ok(())
}

fn print_file(out: &mut impl Write, file: &File) -> io::Result<()> {
    const INDENT: &str = "        ";
    if let Some(device) = &file.device {
        writeln!(out, "{INDENT}device: {device}")?;
    }
    if let Some(inode) = file.inode {
        writeln!(out, "{INDENT}inode: {inode}")?;
    }
    if let (Some(seconds), Some(nanoseconds)) = (file.mtime_sec, file.mtime_nsec) {
        writeln!(out, "{INDENT}modified: {}.{nanoseconds:09}", local_time(seconds))?;
    }
    if !file.locks.is_empty() {
        writeln!(out, "{INDENT}locks of others:")?;
    }
    for lock in &file.locks {
        let holders = lock.holders.iter().map(|holder| match holder {
            JsonHolder::Process { pid, command } => format!("{command} (pid {pid})"),
            JsonHolder::Loop { device } => format!("perhaps {device}"),
        });
        let holders: Vec<_> = holders.collect();
        let who = if holders.is_empty() {
            "somebody who can't be seen".to_owned()
        } else {
            holders.join(", ")
        };
        writeln!(out, "{INDENT}    byte {}: {} {}", lock.byte, printable(&who), lock.shown)?;
    }
    Ok(())
}
