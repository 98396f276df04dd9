//! Reading `qemu-img map --output=json`, and the plan that follows from it.

use std::path::Path;

use serde::Deserialize;

use crate::common::images::{Recipe, SECTOR};
use crate::common::process::Outcome;
use crate::table::{Backing, Plan, Segment, Table};

/// One row.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) depth: u64,
    pub(crate) present: bool,
    pub(crate) zero: bool,
    pub(crate) data: bool,
    pub(crate) compressed: bool,
    pub(crate) offset: Option<u64>,
}

impl Row {
    /// Whether `next` carries this row on, as entry_mergeable() of qemu-img.c has it.
    pub(crate) fn absorbs(&self, next: &Self) -> bool {
        let alike = |row: &Self| (row.depth, row.present, row.zero, row.data, row.compressed);
        let offset = self.offset.map(|offset| offset + self.length);
        self.start + self.length == next.start
            && alike(self) == alike(next)
            && offset == next.offset
    }
}

/// # Errors
/// It is no list of such rows.
pub(crate) fn rows(json: &[u8]) -> Outcome<Vec<Row>> {
    serde_json::from_slice(json).map_err(|error| format!("map --output=json: {error}"))
}

/// Makes the plan that a map describes, with what is known of the chain: a way from
/// qemu-img's map to the disk's bytes that does not go through imgdm.
///
/// # Errors
/// A row is not of whole sectors, or its data has no offset.
pub(crate) fn plan_of(map: &[Row], recipe: &Recipe, dir: &Path) -> Outcome<Plan> {
    let mut backings = Vec::new();
    for (id, layer) in (0..).zip(recipe.layers.iter().rev()) {
        let file = layer.data_file.as_ref().unwrap_or(&layer.file);
        let path = Some(dir.join(file));
        backings.push(Backing { id, kind: "file".to_owned(), path, table: None });
    }
    let mut segments = Vec::new();
    for row in map {
        let linear = row.data && !row.zero;
        let numbers = [row.start, row.length, if linear { row.offset.unwrap_or(1) } else { 0 }];
        if row.compressed || numbers.iter().any(|number| number % SECTOR != 0) {
            return Err(format!("{row:?} can't be a segment"));
        }
        let length = row.length / SECTOR;
        let segment = |start, length, place: Option<(u64, u64)>| Segment {
            start,
            length,
            target: if place.is_some() { "linear" } else { "zero" }.to_owned(),
            backing: place.map(|(backing, _)| backing),
            offset: place.map(|(_, offset)| offset),
        };
        let start = row.start / SECTOR;
        let offset = row.offset.filter(|_| linear).map(|offset| offset / SECTOR);
        let Some(offset) = offset else {
            segments.push(segment(start, length, None));
            continue;
        };
        // QEMU reads zeros past the end of a file that ends inside its last cluster.
        let path = backings
            .get(usize::try_from(row.depth).unwrap_or(usize::MAX))
            .and_then(|backing| backing.path.as_ref())
            .ok_or(format!("{row:?} is too deep"))?;
        let there = path.metadata().map_err(|error| error.to_string())?.len() / SECTOR;
        let inside = there.saturating_sub(offset).min(length);
        if inside > 0 {
            segments.push(segment(start, inside, Some((row.depth, offset))));
        }
        if inside < length {
            segments.push(segment(start + inside, length - inside, None));
        }
    }
    let sectors = map.last().map_or(0, |last| (last.start + last.length) / SECTOR);
    let top = Table { id: 0, role: "top".to_owned(), segments };
    Ok(Plan { version: 1, name: "reference".to_owned(), sectors, backings, tables: vec![top] })
}
