//! A volume group, as its metadata's text describes it (LVM2: lib/format_text/export.c).

use std::collections::{BTreeMap, BTreeSet};

use super::config::{Config, Section, Value};
use super::{Fault, uuid_text};
use crate::units::GuestRange;

const CONTENTS: &str = "Text Format Volume Group";
const SNAPSHOT: &str = "snapshot";

/// A volume group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeGroup {
    /// Its name, of a stranger's choosing.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// How often its metadata was changed.
    pub seqno: u64,
    /// Sectors of 512 bytes of an extent; never 0.
    pub extent_sectors: u32,
    /// Its physical volumes, also those that are on other disks.
    pub physical_volumes: Vec<GroupVolume>,
    /// Its logical volumes, also those that LVM keeps to itself.
    pub logical_volumes: Vec<LogicalVolume>,
}

/// A physical volume, as its group knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupVolume {
    /// By which name the metadata calls it, like `pv0`.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The path that it had when the metadata was written.
    pub device: Option<String>,
    /// Sectors of 512 bytes before its first extent.
    pub extents_start: u64,
    /// How many extents it has.
    pub extents: u32,
    /// LVM missed it at some time: what is on it may be old.
    pub was_missing: bool,
    /// Where it is on this disk.
    pub place: Option<GuestRange>,
}

/// A logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalVolume {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// It is meant to be used; else it is a part of another one.
    pub is_visible: bool,
    /// Its size in extents.
    pub extents: u64,
    /// Its segments by their start, without gap.
    pub segments: Vec<Segment>,
}

/// A part of a logical volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First extent of the logical volume.
    pub start: u32,
    /// How many there are.
    pub extents: u32,
    /// Where they come from.
    pub kind: SegmentKind,
}

/// Where the extents of a segment come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SegmentKind {
    /// One after the other from one physical volume.
    Linear(Area),
    /// In chunks from one after the other.
    Striped {
        /// Sectors of 512 bytes of a chunk; never 0.
        chunk_sectors: u32,
        /// At least two.
        areas: Vec<Area>,
    },
    /// Something that only LVM's own tools can put together: its segment type, like `thin`.
    Unsupported(String),
}

/// Extents of a physical volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Index of the physical volume in its group.
    pub physical_volume: usize,
    /// First extent of it.
    pub extent: u32,
}

impl SegmentKind {
    /// LVM's name of the segment type.
    pub fn name(&self) -> &str {
        match self {
            Self::Linear(_) => "linear",
            Self::Striped { .. } => "striped",
            Self::Unsupported(name) => name,
        }
    }
}

impl VolumeGroup {
    /// Reads the metadata's text. Where its volumes are is not in it.
    pub(super) fn parse(text: &str) -> Result<Self, Fault> {
        let config = Config::parse(text)?;
        let root = config.root();
        if root.optional_text("contents").as_deref() != Some(CONTENTS) {
            return Err(Fault::Field("contents"));
        }
        if root.number("version")? != 1 {
            return Err(Fault::Field("version"));
        }
        let (name, group) = root.sections().next().ok_or(Fault::NoGroup)?;
        let extent_sectors = group.count("extent_size")?;
        if extent_sectors == 0 {
            return Err(Fault::Field("extent_size"));
        }
        let volumes = group.section("physical_volumes").sections();
        let physical_volumes = volumes
            .map(|(name, volume)| group_volume(name, volume))
            .collect::<Result<Vec<_>, _>>()?;
        let by_name: BTreeMap<_, _> = (0..physical_volumes.len())
            .filter_map(|index| Some((physical_volumes.get(index)?.name.as_str(), index)))
            .collect();
        let snapshots = Snapshots::of(group);
        let logical_volumes = group
            .section("logical_volumes")
            .sections()
            .map(|(name, volume)| logical_volume(name, volume, &by_name, &snapshots))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            name: name.to_owned(),
            uuid: uuid_text(&group.text("id")?),
            seqno: group.number("seqno")?,
            extent_sectors,
            physical_volumes,
            logical_volumes,
        })
    }
}

fn group_volume(name: &str, volume: Section<'_>) -> Result<GroupVolume, Fault> {
    Ok(GroupVolume {
        name: name.to_owned(),
        uuid: uuid_text(&volume.text("id")?),
        device: volume.optional_text("device"),
        extents_start: volume.number("pe_start")?,
        extents: volume.count("pe_count")?,
        was_missing: ["flags", "status"].iter().any(|key| volume.has_flag(key, "MISSING")),
        place: None,
    })
}

/// Snapshots of the old kind. The metadata has one as a volume of its own, which names the
/// two that users know it by.
#[derive(Default)]
struct Snapshots {
    /// What users call the snapshot: the volume that holds what was overwritten in its
    /// origin, in a form of its own.
    stores: BTreeSet<String>,
    /// An origin that is about to get that back, and where it is.
    merging: BTreeSet<String>,
}

impl Snapshots {
    fn of(group: Section<'_>) -> Self {
        let mut found = Self::default();
        let volumes = group.section("logical_volumes").sections();
        for (_, segment) in volumes.flat_map(|(_, volume)| volume.sections()) {
            if segment.optional_text("type").as_deref() != Some(SNAPSHOT) {
                continue;
            }
            found.stores.extend(segment.optional_text("cow_store"));
            if let Some(merging) = segment.optional_text("merging_store") {
                found.merging.insert(merging);
                found.merging.extend(segment.optional_text("origin"));
            }
        }
        found
    }
}

fn logical_volume(
    name: &str,
    volume: Section<'_>,
    physical_volumes: &BTreeMap<&str, usize>,
    snapshots: &Snapshots,
) -> Result<LogicalVolume, Fault> {
    let mut segments = volume
        .sections()
        .map(|(_, section)| segment(section, physical_volumes))
        .collect::<Result<Vec<_>, _>>()?;
    segments.sort_by_key(|segment| segment.start);
    let is_snapshot = segments.iter().any(|segment| segment.kind.name() == SNAPSHOT);
    let is_store = snapshots.stores.contains(name);
    let mut end = 0u64;
    for segment in &mut segments {
        if u64::from(segment.start) != end || segment.extents == 0 {
            return Err(Fault::Field("start_extent"));
        }
        end += u64::from(segment.extents);
        if is_store || snapshots.merging.contains(name) {
            segment.kind = SegmentKind::Unsupported(SNAPSHOT.to_owned());
        }
    }
    Ok(LogicalVolume {
        name: name.to_owned(),
        uuid: uuid_text(&volume.text("id")?),
        is_visible: is_store || volume.has_flag("status", "VISIBLE") && !is_snapshot,
        extents: end,
        segments,
    })
}

fn segment(
    section: Section<'_>,
    physical_volumes: &BTreeMap<&str, usize>,
) -> Result<Segment, Fault> {
    let (start, extents) = (section.count("start_extent")?, section.count("extent_count")?);
    let kind = match section.optional_text("type").as_deref() {
        // The metadata calls linear ones striped, too.
        None | Some("striped" | "linear") => striped(section, physical_volumes)?,
        Some(other) => SegmentKind::Unsupported(other.to_owned()),
    };
    Ok(Segment { start, extents, kind })
}

fn striped(
    section: Section<'_>,
    physical_volumes: &BTreeMap<&str, usize>,
) -> Result<SegmentKind, Fault> {
    let mut areas = Vec::new();
    let (pairs, rest) = section.list("stripes").as_chunks::<2>();
    for [volume, extent] in pairs {
        let (Value::Text(name), Some(extent)) = (volume, extent.number()) else {
            return Err(Fault::Field("stripes"));
        };
        let Some(&physical_volume) = physical_volumes.get(name) else {
            // Over another logical volume, as while extents are being moved.
            return Ok(SegmentKind::Unsupported("striped over a logical volume".to_owned()));
        };
        let extent = u32::try_from(extent).map_err(|_| Fault::Field("stripes"))?;
        areas.push(Area { physical_volume, extent });
    }
    if !rest.is_empty() || section.count("stripe_count")? as usize != areas.len() {
        return Err(Fault::Field("stripe_count"));
    }
    match areas.as_slice() {
        [] => Err(Fault::Field("stripe_count")),
        [area] => Ok(SegmentKind::Linear(*area)),
        _ => match section.count("stripe_size")? {
            0 => Err(Fault::Field("stripe_size")),
            chunk_sectors => Ok(SegmentKind::Striped { chunk_sectors, areas }),
        },
    }
}
