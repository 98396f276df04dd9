//! The JSON of `imgdm partitions`. Offsets and lengths are bytes.

use serde::Serialize;

use imgdm::lvm::{GroupVolume, LogicalVolume, PhysicalVolume, Segment, SegmentKind, VolumeGroup};
use imgdm::partition::{Partition, PartitionType, Unusable};
use imgdm::signature::Signature;
use imgdm::units::SECTOR_SIZE;

use super::Found;
use crate::cli::output::JsonPath;

#[derive(Serialize)]
pub(super) struct Report {
    path: JsonPath,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<JsonSnapshot>,
    virtual_size: u64,
    /// None where the disk has no partition table.
    table: Option<JsonTable>,
    /// What the whole disk looks like. With a table that may be a leftover.
    content: Option<JsonContent>,
    partitions: Vec<JsonPartition>,
    lvm: JsonLvm,
    warnings: Vec<String>,
}

#[derive(Serialize)]
struct JsonSnapshot {
    id: String,
    name: String,
}

#[derive(Serialize)]
struct JsonTable {
    /// libblkid's `PTTYPE`.
    kind: &'static str,
    /// libblkid's `PTUUID`.
    uuid: Option<String>,
    sector_size: u64,
}

#[derive(Serialize)]
struct JsonContent {
    /// libblkid's `TYPE`.
    kind: &'static str,
    /// libblkid's `USAGE`.
    usage: &'static str,
    label: Option<String>,
    uuid: Option<String>,
}

#[derive(Serialize)]
struct JsonPartition {
    number: u32,
    start: u64,
    length: u64,
    /// The kind of table that it is of; of nested ones the inner one's.
    table: &'static str,
    /// A GUID, a number in hex, or a name, as the table has it.
    #[serde(rename = "type")]
    kind: Option<String>,
    /// What that type is called, where it is well known.
    type_name: Option<&'static str>,
    uuid: Option<String>,
    name: Option<String>,
    /// 64 bits in hex.
    flags: String,
    extended: bool,
    /// The partition that it lies in.
    inside: Option<u32>,
    /// Why it can't be attached.
    #[serde(skip_serializing_if = "Option::is_none")]
    unusable: Option<JsonUnusable>,
    content: Option<JsonContent>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
enum JsonUnusable {
    Empty,
    OutOfDisk,
    /// With the partition of this number.
    Overlaps(u32),
}

#[derive(Serialize)]
struct JsonLvm {
    physical_volumes: Vec<JsonPhysicalVolume>,
    volume_groups: Vec<JsonGroup>,
}

#[derive(Serialize)]
struct JsonPhysicalVolume {
    uuid: String,
    start: u64,
    length: u64,
    /// None for the whole disk.
    partition: Option<u32>,
    /// None where no metadata names it.
    volume_group: Option<String>,
}

#[derive(Serialize)]
struct JsonGroup {
    name: String,
    uuid: String,
    seqno: u64,
    /// Bytes of an extent.
    extent_size: u64,
    physical_volumes: Vec<JsonGroupVolume>,
    logical_volumes: Vec<JsonLogicalVolume>,
}

#[derive(Serialize)]
struct JsonGroupVolume {
    name: String,
    uuid: String,
    /// The path that it had when the metadata was written.
    device: Option<String>,
    extents: u32,
    /// It is on this disk.
    present: bool,
    /// LVM missed it at some time: what is on it may be old.
    was_missing: bool,
}

#[derive(Serialize)]
struct JsonLogicalVolume {
    name: String,
    uuid: String,
    size: u64,
    /// False for parts of other volumes.
    visible: bool,
    /// Why it can't be attached; none where it can.
    obstacle: Option<String>,
    segments: Vec<JsonSegment>,
}

#[derive(Serialize)]
struct JsonSegment {
    /// First extent.
    start: u32,
    extents: u32,
    /// LVM's segment type.
    #[serde(rename = "type")]
    kind: String,
    /// Bytes of a chunk of a striped one.
    #[serde(skip_serializing_if = "Option::is_none")]
    chunk_size: Option<u64>,
    /// Empty where the type is not known.
    areas: Vec<JsonArea>,
}

#[derive(Serialize)]
struct JsonArea {
    physical_volume: String,
    /// First extent of it.
    extent: u32,
}

impl Report {
    pub(super) fn new(found: &Found<'_>) -> Self {
        let top = &found.chain.layers()[0];
        let partitions = found.table.iter().flat_map(|table| &table.partitions);
        Self {
            path: JsonPath::from(top.source.path()),
            snapshot: top
                .image
                .snapshot()
                .map(|s| JsonSnapshot { id: s.id.clone(), name: s.name.clone() }),
            virtual_size: found.chain.virtual_size().get(),
            table: found.table.as_ref().map(|table| JsonTable {
                kind: table.kind.name(),
                uuid: table.uuid.clone(),
                sector_size: table.sector_size,
            }),
            content: found.content.as_ref().map(content),
            partitions: partitions
                .zip(&found.contents)
                .map(|(one, content)| partition(one, content.as_ref()))
                .collect(),
            lvm: JsonLvm {
                physical_volumes: found
                    .lvm
                    .physical_volumes
                    .iter()
                    .map(|volume| physical_volume(found, volume))
                    .collect(),
                volume_groups: found.lvm.groups.iter().map(group).collect(),
            },
            warnings: found.warnings(),
        }
    }
}

fn content(signature: &Signature) -> JsonContent {
    JsonContent {
        kind: signature.kind,
        usage: signature.usage.name(),
        label: signature.label.clone(),
        uuid: signature.uuid.clone(),
    }
}

fn partition(partition: &Partition, found: Option<&Signature>) -> JsonPartition {
    let kind = partition.kind.as_ref();
    JsonPartition {
        number: partition.number,
        start: partition.range.start.get(),
        length: partition.range.length().get(),
        table: partition.table.name(),
        kind: kind.map(PartitionType::to_string),
        type_name: kind.and_then(|kind| kind.name(partition.table)),
        uuid: partition.uuid.clone(),
        name: partition.name.clone(),
        flags: format!("{:#x}", partition.flags),
        extended: partition.is_extended,
        inside: partition.inside,
        unusable: partition.unusable.map(|why| match why {
            Unusable::Empty => JsonUnusable::Empty,
            Unusable::OutOfDisk => JsonUnusable::OutOfDisk,
            Unusable::Overlaps(other) => JsonUnusable::Overlaps(other),
        }),
        content: found.map(content),
    }
}

fn physical_volume(found: &Found<'_>, volume: &PhysicalVolume) -> JsonPhysicalVolume {
    let group = volume.group.and_then(|index| found.lvm.groups.get(index));
    JsonPhysicalVolume {
        uuid: volume.uuid.clone(),
        start: volume.place.start.get(),
        length: volume.place.length().get(),
        partition: found.partition_at(volume.place),
        volume_group: group.map(|group| group.name.clone()),
    }
}

fn group(group: &VolumeGroup) -> JsonGroup {
    let physical = |volume: &GroupVolume| JsonGroupVolume {
        name: volume.name.clone(),
        uuid: volume.uuid.clone(),
        device: volume.device.clone(),
        extents: volume.extents,
        present: volume.place.is_some(),
        was_missing: volume.was_missing,
    };
    JsonGroup {
        name: group.name.clone(),
        uuid: group.uuid.clone(),
        seqno: group.seqno,
        extent_size: u64::from(group.extent_sectors) * SECTOR_SIZE,
        physical_volumes: group.physical_volumes.iter().map(physical).collect(),
        logical_volumes: group
            .logical_volumes
            .iter()
            .map(|volume| logical_volume(group, volume))
            .collect(),
    }
}

fn logical_volume(group: &VolumeGroup, volume: &LogicalVolume) -> JsonLogicalVolume {
    JsonLogicalVolume {
        name: volume.name.clone(),
        uuid: volume.uuid.clone(),
        size: group.size_of(volume).get(),
        visible: volume.is_visible,
        obstacle: group.obstacle(volume),
        segments: volume.segments.iter().map(|one| segment(group, one)).collect(),
    }
}

fn segment(group: &VolumeGroup, segment: &Segment) -> JsonSegment {
    let (chunk_sectors, areas) = match &segment.kind {
        SegmentKind::Linear(area) => (None, std::slice::from_ref(area)),
        SegmentKind::Striped { chunk_sectors, areas } => (Some(*chunk_sectors), areas.as_slice()),
        SegmentKind::Unsupported(_) => (None, [].as_slice()),
    };
    JsonSegment {
        start: segment.start,
        extents: segment.extents,
        kind: segment.kind.name().to_owned(),
        chunk_size: chunk_sectors.map(|sectors| u64::from(sectors) * SECTOR_SIZE),
        areas: areas
            .iter()
            .filter_map(|area| {
                let volume = group.physical_volumes.get(area.physical_volume)?;
                Some(JsonArea { physical_volume: volume.name.clone(), extent: area.extent })
            })
            .collect(),
    }
}
