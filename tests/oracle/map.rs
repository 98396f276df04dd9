//! Reading `qemu-img map --output=json`, and the plan that follows from it.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::common::images::{Recipe, SECTOR};
use crate::common::process::Outcome;
use crate::table::{Backing, Plan, Segment, Table};

/// A row of imgdm's `--output=json-full`, as far as it is compared.
#[derive(Clone, Debug, Deserialize)]
struct FullRow {
    start: u64,
    length: u64,
    zero: bool,
    data: bool,
    offset: Option<u64>,
    file: Option<FullFile>,
    #[serde(rename = "zero-cause")]
    zero_cause: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct FullFile {
    path: PathBuf,
}

/// The plan that `imgdm map --output=json-full` describes, by itself.
///
/// # Errors
/// It is no list of such rows, or one lacks what it should have.
pub(crate) fn plan_of_full(json: &[u8]) -> Outcome<Plan> {
    let rows: Vec<FullRow> =
        serde_json::from_slice(json).map_err(|error| format!("map --output=json-full: {error}"))?;
    let mut maker = PlanMaker::default();
    for row in &rows {
        if row.zero != row.zero_cause.is_some() {
            return Err(format!("a zero should say why, data should not: {row:?}"));
        }
        let place = match (row.data && !row.zero, row.offset, &row.file) {
            (true, Some(offset), Some(file)) => Some((file.path.as_path(), offset)),
            (true, ..) => return Err(format!("data should have file and offset: {row:?}")),
            (false, ..) => None,
        };
        maker.add(row.start, row.length, place)?;
    }
    Ok(maker.done())
}

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
    /// Whether damaged metadata does not tell what the range holds (imgdm only).
    pub(crate) fn is_damaged(&self) -> bool {
        self.present && !self.zero && !self.data
    }

    /// The row of a part of this one.
    pub(crate) fn part(&self, start: u64, end: u64) -> Self {
        let offset = self.offset.map(|offset| offset + (start - self.start));
        Self { start, length: end - start, offset, ..self.clone() }
    }

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
    let paths: Vec<PathBuf> = recipe
        .layers
        .iter()
        .rev()
        .map(|layer| dir.join(layer.data_file.as_ref().unwrap_or(&layer.file)))
        .collect();
    let mut maker = PlanMaker::default();
    for row in map {
        let path = usize::try_from(row.depth).ok().and_then(|depth| paths.get(depth));
        let place = match (row.data && !row.zero, row.offset, path) {
            (true, Some(offset), Some(path)) => Some((path.as_path(), offset)),
            (true, ..) => return Err(format!("{row:?} can't be a segment")),
            (false, ..) => None,
        };
        maker.add(row.start, row.length, place)?;
    }
    Ok(maker.done())
}

/// Makes a plan of rows.
#[derive(Default)]
struct PlanMaker {
    backings: Vec<Backing>,
    segments: Vec<Segment>,
    sectors: u64,
}

impl PlanMaker {
    /// Adds a row: bytes at an offset of a file, or zeros.
    fn add(&mut self, start: u64, length: u64, place: Option<(&Path, u64)>) -> Outcome {
        let numbers = [start, length, place.map_or(0, |(_, offset)| offset)];
        if numbers.iter().any(|number| number % SECTOR != 0) {
            return Err(format!("{start} {length} {place:?} is not of whole sectors"));
        }
        let (start, length) = (start / SECTOR, length / SECTOR);
        self.sectors = start + length;
        let Some((path, offset)) = place else {
            self.segment(start, length, None);
            return Ok(());
        };
        let offset = offset / SECTOR;
        let known = self.backings.iter().find(|backing| backing.path.as_deref() == Some(path));
        let id = known.map_or(self.backings.len() as u64, |backing| backing.id);
        if known.is_none() {
            let path = Some(path.to_owned());
            self.backings.push(Backing { id, kind: "file".to_owned(), path, table: None });
        }
        // QEMU reads zeros past the end of a file that ends inside its last cluster.
        let there = path.metadata().map_err(|error| error.to_string())?.len() / SECTOR;
        let inside = there.saturating_sub(offset).min(length);
        if inside > 0 {
            self.segment(start, inside, Some((id, offset)));
        }
        if inside < length {
            self.segment(start + inside, length - inside, None);
        }
        Ok(())
    }

    fn segment(&mut self, start: u64, length: u64, place: Option<(u64, u64)>) {
        self.segments.push(Segment {
            start,
            length,
            target: if place.is_some() { "linear" } else { "zero" }.to_owned(),
            backing: place.map(|(backing, _)| backing),
            offset: place.map(|(_, offset)| offset),
        });
    }

    fn done(self) -> Plan {
        let top = Table { id: 0, role: "top".to_owned(), segments: self.segments };
        let (sectors, backings) = (self.sectors, self.backings);
        Plan { version: 1, name: "reference".to_owned(), sectors, backings, tables: vec![top] }
    }
}
