//! Reads a planned table as device-mapper would, over the image files themselves, and
//! compares that disk with a raw copy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use serde::Deserialize;

use crate::common::images::SECTOR;
use crate::common::process::Outcome;

/// What `imgdm table --output=json` prints. All numbers are sectors.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Plan {
    pub(crate) version: u64,
    pub(crate) name: String,
    pub(crate) sectors: u64,
    pub(crate) backings: Vec<Backing>,
    pub(crate) tables: Vec<Table>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Backing {
    pub(crate) id: u64,
    pub(crate) kind: String,
    pub(crate) path: Option<PathBuf>,
    pub(crate) table: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Table {
    pub(crate) id: u64,
    pub(crate) role: String,
    pub(crate) segments: Vec<Segment>,
}

#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Segment {
    pub(crate) start: u64,
    pub(crate) length: u64,
    pub(crate) target: String,
    pub(crate) backing: Option<u64>,
    pub(crate) offset: Option<u64>,
}

impl Table {
    fn sectors(&self) -> u64 {
        self.segments.last().map_or(0, |last| last.start + last.length)
    }
}

impl Plan {
    /// # Errors
    /// It is not the JSON that the documentation promises.
    pub(crate) fn parse(json: &[u8]) -> Outcome<Self> {
        serde_json::from_slice(json).map_err(|error| format!("table --output=json: {error}"))
    }

    /// The table of the device that the user gets.
    pub(crate) fn top(&self) -> Outcome<&Table> {
        let mut tops = self.tables.iter().filter(|table| table.role == "top");
        match (tops.next(), tops.next()) {
            (Some(top), None) => Ok(top),
            _ => Err("there should be one table with the role 'top'".to_owned()),
        }
    }

    /// The files of all backings.
    pub(crate) fn paths(&self) -> BTreeSet<&Path> {
        self.backings.iter().filter_map(|backing| backing.path.as_deref()).collect()
    }
}

/// Where a sector's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Zero,
    /// Byte offset in the file of that backing.
    File(u64, u64),
}

/// A plan with its files opened.
pub(crate) struct Device<'p> {
    plan: &'p Plan,
    tables: BTreeMap<u64, &'p Table>,
    backings: BTreeMap<u64, &'p Backing>,
    /// By backing, with the size that a loop device over the file has, in bytes.
    files: BTreeMap<u64, (File, u64)>,
}

impl<'p> Device<'p> {
    /// Opens the files, and checks what the kernel would check, and more: all
    /// tables gapless from sector 0, no reference out of range.
    ///
    /// # Errors
    /// The kernel would not load it, or the plan contradicts itself.
    pub(crate) fn open(plan: &'p Plan) -> Outcome<Self> {
        let mut files = BTreeMap::new();
        for backing in &plan.backings {
            if !matches!(backing.kind.as_str(), "file" | "block") {
                continue;
            }
            let path = backing.path.as_deref().ok_or("a backing of kind file has no path")?;
            if !path.is_absolute() {
                return Err(format!("the path {} should be absolute", path.display()));
            }
            let fail = |error| format!("{}: {error}", path.display());
            let file = File::open(path).map_err(fail)?;
            let length = file.metadata().map_err(fail)?.len();
            files.insert(backing.id, (file, length / SECTOR * SECTOR));
        }
        let device = Self {
            plan,
            tables: plan.tables.iter().map(|table| (table.id, table)).collect(),
            backings: plan.backings.iter().map(|backing| (backing.id, backing)).collect(),
            files,
        };
        device.check()?;
        Ok(device)
    }

    fn check(&self) -> Outcome {
        let plan = self.plan;
        if plan.version != 1 || plan.name.is_empty() {
            return Err(format!("version {}, name '{}'", plan.version, plan.name));
        }
        if self.tables.len() != plan.tables.len() || self.backings.len() != plan.backings.len() {
            return Err("an id is given twice".to_owned());
        }
        let top = plan.top()?.sectors();
        if top != plan.sectors {
            return Err(format!("the top table has {top} sectors of {}", plan.sectors));
        }
        for table in &plan.tables {
            let mut end = 0;
            for segment in &table.segments {
                let at = |what: &str| format!("table {}: {segment:?} {what}", table.id);
                if segment.start != end {
                    return Err(at(&format!("should start at sector {end}")));
                }
                if segment.length == 0 {
                    return Err(at("is empty"));
                }
                end += segment.length;
                match (segment.target.as_str(), segment.backing, segment.offset) {
                    ("zero", None, None) => {}
                    ("linear", Some(backing), Some(offset)) => {
                        let room = self.room(backing)?;
                        if offset.checked_add(segment.length).is_none_or(|end| end > room) {
                            return Err(at(&format!("ends past its backing's {room} sectors")));
                        }
                    }
                    _ => return Err(at("is no target with its parameters")),
                }
            }
        }
        self.check_order()
    }

    /// Size of a backing's device in sectors.
    fn room(&self, id: u64) -> Outcome<u64> {
        let backing = self.backings.get(&id).ok_or(format!("there is no backing {id}"))?;
        match (backing.kind.as_str(), backing.table) {
            ("file" | "block", None) => Ok(self.files.get(&id).map_or(0, |file| file.1 / SECTOR)),
            ("zero", None) => Ok(u64::MAX),
            ("table", Some(table)) => {
                let table = self.tables.get(&table).ok_or(format!("there is no table {table}"))?;
                Ok(table.sectors())
            }
            _ => Err(format!("{backing:?} can't be read")),
        }
    }

    /// No table lies on itself.
    fn check_order(&self) -> Outcome {
        let mut done: BTreeSet<u64> = BTreeSet::new();
        loop {
            let before = done.len();
            for table in self.plan.tables.iter().filter(|table| !done.contains(&table.id)) {
                let mut below = table
                    .segments
                    .iter()
                    .filter_map(|segment| self.backings.get(&segment.backing?)?.table);
                if below.all(|below| done.contains(&below)) {
                    done.insert(table.id);
                    break;
                }
            }
            if done.len() == self.plan.tables.len() {
                return Ok(());
            }
            if done.len() == before {
                return Err("a table lies on itself".to_owned());
            }
        }
    }

    /// Where a sector of a table is, and for how many sectors that goes on.
    fn resolve(&self, table: &Table, sector: u64) -> Outcome<(Place, u64)> {
        let index = table.segments.partition_point(|s| s.start + s.length <= sector);
        let segment = table.segments.get(index).ok_or(format!("no sector {sector}"))?;
        let within = sector - segment.start;
        let left = segment.length - within;
        let (Some(backing), Some(offset)) = (segment.backing, segment.offset) else {
            return Ok((Place::Zero, left));
        };
        let backing = self.backings.get(&backing).ok_or("no such backing")?;
        match backing.table.and_then(|id| self.tables.get(&id)) {
            Some(table) => {
                let (place, below) = self.resolve(table, offset + within)?;
                Ok((place, left.min(below)))
            }
            None if backing.kind == "zero" => Ok((Place::Zero, left)),
            None => Ok((Place::File(backing.id, (offset + within) * SECTOR), left)),
        }
    }

    /// Compares the top device with a raw copy of the disk, all of it.
    ///
    /// # Errors
    /// Where they differ first, with the segment.
    pub(crate) fn compare(&self, copy: &Path) -> Outcome {
        let copy_name = copy.display();
        let fail = |error| format!("{copy_name}: {error}");
        let copy = File::open(copy).map_err(fail)?;
        let size = self.plan.sectors * SECTOR;
        let length = copy.metadata().map_err(fail)?.len();
        if length != size {
            return Err(format!("the device has {size} bytes, qemu-img's copy {length}"));
        }
        let top = self.plan.top()?;
        const CHUNK: u64 = 1 << 20;
        let mut ours = vec![0; usize::try_from(CHUNK).unwrap_or(0)];
        let mut theirs = ours.clone();
        let mut at = 0;
        while at < size {
            let (place, sectors) = self.resolve(top, at / SECTOR)?;
            let run = sectors * SECTOR;
            // What is a hole on both sides needs no reading.
            let hole = next_data(&copy, at, size).saturating_sub(at).min(match place {
                Place::Zero => run,
                Place::File(id, offset) => {
                    let file = &self.files[&id];
                    next_data(&file.0, offset, file.1) - offset
                }
            });
            if hole > 0 {
                at += hole.min(run);
                continue;
            }
            let n = run.min(CHUNK).min(size - at);
            let bytes = usize::try_from(n).map_err(|error| error.to_string())?;
            let (ours, theirs) = (&mut ours[..bytes], &mut theirs[..bytes]);
            match place {
                Place::Zero => ours.fill(0),
                Place::File(id, offset) => self.files[&id]
                    .0
                    .read_exact_at(ours, offset)
                    .map_err(|error| format!("backing {id} at {offset}: {error}"))?,
            }
            copy.read_exact_at(theirs, at).map_err(fail)?;
            if ours != theirs {
                let first = ours.iter().zip(theirs.iter()).position(|(a, b)| a != b).unwrap_or(0);
                let byte = at + first as u64;
                return Err(format!(
                    "byte {byte} (sector {}) differs: {:#04x}, in qemu-img's copy {:#04x}; from {place:?}",
                    byte / SECTOR,
                    ours[first],
                    theirs[first]
                ));
            }
            at += n;
        }
        Ok(())
    }
}

/// Offset of the next byte that may be other than zero, `end` where there is none.
fn next_data(file: &File, from: u64, end: u64) -> u64 {
    let Ok(start) = i64::try_from(from) else { return from };
    match lseek(file, start, Whence::SeekData) {
        Ok(data) => data.unsigned_abs().clamp(from, end.max(from)),
        Err(Errno::ENXIO) => end.max(from),
        Err(_) => from,
    }
}

/// Interprets `plan` over its files and compares that with a raw copy.
///
/// # Errors
/// The plan can't be loaded, or the bytes differ.
pub(crate) fn compare(plan: &Plan, copy: &Path) -> Outcome {
    Device::open(plan)?.compare(copy)
}
