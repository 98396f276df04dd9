//! The partitions as a table for people.

use std::io::{self, Write};

use imgdm::error::printable;
use imgdm::lvm::VolumeGroup;
use imgdm::partition::{Partition, PartitionTable, PartitionType, TableKind, Unusable};
use imgdm::signature::Signature;
use imgdm::units::{GuestRange, SECTOR_SIZE};

use super::Found;
use crate::cli::output::{human_size, show_path, stdout};

/// The columns; those in which no row has anything are left out.
const HEADLINE: [&str; 11] =
    ["No", "Start", "End", "Size", "Type", "Table", "Name", "Content", "Label", "UUID", "Note"];
/// The flag of a partition of a master boot record that the machine starts from.
const ACTIVE: u64 = 0x80;
/// How many of the first ones are numbers.
const NUMBERS: usize = 4;

pub(super) fn print(found: &Found<'_>) -> anyhow::Result<()> {
    let mut out = stdout()?;
    let top = &found.chain.layers()[0];
    let snapshot = top.image.snapshot().map(|s| format!(", snapshot {}", printable(&s.name)));
    write!(
        out,
        "{}{}: {}",
        show_path(top.source.path()),
        snapshot.unwrap_or_default(),
        human_size(found.chain.virtual_size().get())
    )?;
    match &found.table {
        None => writeln!(out, ", no partition table")?,
        Some(table) => {
            let uuid = table.uuid.as_ref().map(|uuid| format!(", {uuid}")).unwrap_or_default();
            writeln!(out, ", {}{uuid}; sectors of {} bytes", table.kind, SECTOR_SIZE)?;
        }
    }
    if let Some(content) = &found.content {
        let also = if found.table.is_some() {
            "The whole disk also looks like"
        } else {
            "The whole disk is"
        };
        let told = |name, text: &Option<String>| match text {
            Some(text) => format!(", {name} {}", printable(text)),
            None => String::new(),
        };
        let (label, uuid) = (told("label", &content.label), told("UUID", &content.uuid));
        writeln!(out, "{also} {}{label}{uuid}", content.kind)?;
    } else if found.table.is_none() {
        writeln!(out, "Nothing that is known is on the disk")?;
    }
    groups_at(&mut out, found, found.chain.whole())?;
    if let Some(table) = &found.table {
        partitions(&mut out, found, table)?;
    }
    out.flush()?;
    Ok(())
}

fn partitions(out: &mut impl Write, found: &Found<'_>, table: &PartitionTable) -> io::Result<()> {
    let rows: Vec<_> = table
        .partitions
        .iter()
        .zip(&found.contents)
        .map(|(partition, content)| row(partition, content.as_ref(), table))
        .collect();
    let shown = |column: usize| column < NUMBERS || rows.iter().any(|row| !row[column].is_empty());
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(HEADLINE[column].len())
    };
    let columns: Vec<_> = (0..HEADLINE.len())
        .filter(|&column| shown(column))
        .map(|column| (column, width(column)))
        .collect();
    let line = |cells: &[String; HEADLINE.len()]| {
        let mut line = String::new();
        for &(column, width) in &columns {
            let cell = &cells[column];
            let gap = if column == 0 { "" } else { "  " };
            line += &match column < NUMBERS {
                true => format!("{gap}{cell:>width$}"),
                false => format!("{gap}{cell:<width$}"),
            };
        }
        line.trim_end().to_owned()
    };
    if !rows.is_empty() {
        writeln!(out, "{}", line(&HEADLINE.map(str::to_owned)))?;
    }
    for (partition, row) in table.partitions.iter().zip(&rows) {
        writeln!(out, "{}", line(row))?;
        groups_at(out, found, partition.range)?;
    }
    Ok(())
}

fn row(
    partition: &Partition,
    content: Option<&Signature>,
    table: &PartitionTable,
) -> [String; HEADLINE.len()] {
    let sector = |bytes: u64| bytes / SECTOR_SIZE;
    let text = |text: Option<&String>| text.map(|text| printable(text)).unwrap_or_default();
    let kind = partition.kind.as_ref().map(|kind| match kind.name(partition.table) {
        Some(name) => name.to_owned(),
        None => printable(&PartitionType::to_string(kind)),
    });
    let inside = partition.inside.filter(|_| partition.table != table.kind);
    let is_active = partition.table == TableKind::Dos && partition.flags & ACTIVE != 0;
    let notes = [
        inside.map(|outer| format!("in {outer}")),
        is_active.then(|| "active".to_owned()),
        partition.unusable.map(|why| match why {
            Unusable::Empty => "empty".to_owned(),
            Unusable::OutOfDisk => "past the end of the disk".to_owned(),
            Unusable::Overlaps(other) => format!("overlaps {other}"),
        }),
    ];
    let notes: Vec<_> = notes.into_iter().flatten().collect();
    let last = match partition.range.is_empty() {
        true => "-".to_owned(),
        false => sector(partition.range.end.get()).saturating_sub(1).to_string(),
    };
    let nested = if partition.table == table.kind { "" } else { partition.table.name() };
    [
        partition.number.to_string(),
        sector(partition.range.start.get()).to_string(),
        last,
        human_size(partition.range.length().get()),
        kind.unwrap_or_default(),
        nested.to_owned(),
        text(partition.name.as_ref()),
        content.map(|content| content.kind.to_owned()).unwrap_or_default(),
        text(content.and_then(|content| content.label.as_ref())),
        text(content.and_then(|content| content.uuid.as_ref())),
        notes.join(", "),
    ]
}

/// The volume group of the physical volume at a place; in full at the first of its
/// physical volumes.
fn groups_at(out: &mut impl Write, found: &Found<'_>, place: GuestRange) -> io::Result<()> {
    let Some(volume) = found.lvm.physical_volume_at(place) else { return Ok(()) };
    let Some(group) = volume.group.and_then(|index| found.lvm.groups.get(index)) else {
        return writeln!(out, "    LVM physical volume of no volume group");
    };
    let name = printable(&group.name);
    let first = found.lvm.physical_volumes.iter().find(|other| other.group == volume.group);
    if first.is_some_and(|first| first.place != place) {
        return writeln!(out, "    volume group {name}: see above");
    }
    let there = group.physical_volumes.iter().filter(|volume| volume.place.is_some()).count();
    let missing = match group.physical_volumes.len().saturating_sub(there) {
        0 => String::new(),
        missing => format!(", {missing} of its physical volumes not on this disk"),
    };
    writeln!(out, "    volume group {name}{missing}")?;
    logical_volumes(out, group)
}

fn logical_volumes(out: &mut impl Write, group: &VolumeGroup) -> io::Result<()> {
    let visible: Vec<_> = group.logical_volumes.iter().filter(|volume| volume.is_visible).collect();
    let names: Vec<_> = visible.iter().map(|volume| printable(&group.full_name(volume))).collect();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    for (volume, name) in visible.iter().zip(&names) {
        let mut kinds: Vec<_> =
            volume.segments.iter().map(|segment| printable(segment.kind.name())).collect();
        kinds.dedup();
        let obstacle = match group.obstacle(volume) {
            Some(_) => " (can't be attached)",
            None => "",
        };
        let size = human_size(group.size_of(volume).get());
        writeln!(out, "        {name:<width$}  {size:>8}  {}{obstacle}", kinds.join(", "))?;
    }
    Ok(())
}
