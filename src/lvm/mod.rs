//! LVM2 on a virtual disk: volume groups and logical volumes, read from the metadata of
//! their physical volumes. LVM itself is never asked, and nothing is activated.
//!
//! Linear and striped logical volumes can be attached ([`VolumeGroup::pieces`]); of all
//! others only the type is known. Metadata is a stranger's: its checksums are verified,
//! its size is bounded, and where it is damaged, that of another area is taken.

mod config;
mod group;
mod label;
mod layout;
/// Physical volumes for tests.
#[cfg(test)]
#[allow(dead_code)]
#[path = "../../tests/common/lvm.rs"]
pub(crate) mod made;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;

pub use group::{Area, GroupVolume, LogicalVolume, Segment, SegmentKind, VolumeGroup};
pub use layout::{Piece, PieceSource};

use crate::error::{Error, ErrorKind, Result, printable};
use crate::partition::{Disk, PartitionTable};
use crate::units::{ByteLen, GuestOffset, GuestRange};
use crate::worker::apart;

/// Most bytes of one text of metadata. LVM's usual area takes 1 MiB for two of them.
const MAX_TEXT: u64 = 16 << 20;
/// Most bytes of metadata that are read of one disk.
const MAX_TOTAL_TEXT: u64 = 64 << 20;

/// What is wrong with a label or with metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The label's checksum is not that of its contents, or it has no room for a header.
    LabelChecksum,
    /// The checksum of a metadata area's header is not that of its contents.
    HeaderChecksum,
    /// The header of a metadata area contradicts itself.
    Header,
    /// What starts here on the disk can't be read.
    Unreadable(GuestOffset),
    /// An area reaches past the end of the physical volume.
    OutOfVolume,
    /// The text is longer than is read.
    TooLarge,
    /// With the texts before it there is more than is read of one disk.
    TotalTooLarge,
    /// The text has more entries than are kept.
    TooManyEntries,
    /// The text has more sections inside of each other than are followed.
    TooDeep,
    /// The checksum of the metadata is not that of its text.
    TextChecksum,
    /// The text is not LVM's syntax.
    Syntax {
        /// The line where that shows.
        line: u64,
    },
    /// An entry is missing, or is not what it should be.
    Field(&'static str),
    /// The text describes no volume group.
    NoGroup,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LabelChecksum => f.write_str("its label's checksum is wrong"),
            Self::HeaderChecksum => f.write_str("the checksum of its header is wrong"),
            Self::Header => f.write_str("its header contradicts itself"),
            Self::Unreadable(at) => write!(f, "the disk can't be read at {at}"),
            Self::OutOfVolume => f.write_str("it reaches past the end of the physical volume"),
            Self::TooLarge => write!(f, "its text is longer than is read ({MAX_TEXT} bytes)"),
            Self::TotalTooLarge => write!(
                f,
                "with the other areas it holds more than is read of one disk ({MAX_TOTAL_TEXT} bytes)"
            ),
            Self::TooManyEntries => {
                write!(f, "its text has more entries than are kept ({})", config::MAX_ENTRIES)
            }
            Self::TooDeep => {
                let most = config::MAX_DEPTH;
                write!(f, "its text has more than {most} sections inside of each other")
            }
            Self::TextChecksum => f.write_str("the checksum of its text is wrong"),
            Self::Syntax { line } => write!(f, "its text is not understood at line {line}"),
            Self::Field(name) => write!(f, "'{name}' in its text is missing or wrong"),
            Self::NoGroup => f.write_str("its text describes no volume group"),
        }
    }
}

/// What is not as it should be, though more could be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// What starts here has a label of LVM that can't be used, or may have one that can't be
    /// read.
    Label {
        /// First byte of what should be a physical volume.
        at: GuestOffset,
        /// What is wrong.
        fault: Fault,
    },
    /// A metadata area can't be used; others may have been.
    MetadataArea {
        /// Where the area is on the disk.
        at: GuestOffset,
        /// What is wrong.
        fault: Fault,
    },
    /// A second physical volume has the UUID of another one, which is taken.
    Duplicate {
        /// Where the one that is passed over starts.
        at: GuestOffset,
        /// The UUID.
        uuid: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label { at, fault: fault @ Fault::Unreadable(_) } => {
                write!(f, "whether an LVM physical volume starts at {at} is not known: {fault}")
            }
            Self::Label { at, fault } => {
                write!(f, "the LVM physical volume at {at} can't be used: {fault}")
            }
            Self::MetadataArea { at, fault } => {
                write!(f, "the LVM metadata area at {at} is passed over: {fault}")
            }
            Self::Duplicate { at, uuid } => {
                write!(
                    f,
                    "the LVM physical volume at {at} is passed over: another one has the same UUID ({uuid})"
                )
            }
        }
    }
}

/// A physical volume on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhysicalVolume {
    /// Its UUID.
    pub uuid: String,
    /// The partition that it is, or the whole disk.
    pub place: GuestRange,
    /// Index of its volume group; none where no metadata names it.
    pub group: Option<usize>,
}

/// All of LVM on one disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lvm {
    /// The physical volumes, by their place.
    pub physical_volumes: Vec<PhysicalVolume>,
    /// The volume groups, in the order in which they were found.
    pub groups: Vec<VolumeGroup>,
    /// What is not as it should be.
    pub warnings: Vec<Warning>,
}

/// Where physical volumes can be: each partition that can be used, or the whole disk where it
/// has none. What is on the whole of a disk with partitions is a leftover, which LVM passes
/// over as well.
pub fn places(table: Option<&PartitionTable>, disk_size: ByteLen) -> Vec<GuestRange> {
    match table.map(|table| table.partitions.as_slice()) {
        None | Some([]) => {
            vec![GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk_size.get()))]
        }
        Some(partitions) => {
            let usable = partitions.iter().filter(|p| p.unusable.is_none() && !p.is_extended);
            usable.map(|partition| partition.range).collect()
        }
    }
}

/// Reads what LVM has at `places` of a disk (see [`places`]).
///
/// # Errors
/// What an interrupted read says. Metadata that is damaged or can't be read is a warning.
pub fn read(disk: &mut dyn Disk, places: &[GuestRange]) -> Result<Lvm> {
    apart(|| read_all(disk, places))
}

fn read_all(disk: &mut dyn Disk, places: &[GuestRange]) -> Result<Lvm> {
    let mut lvm = Lvm::default();
    let mut labels = Vec::new();
    for &place in places {
        match label::read_label(disk, place)? {
            None => {}
            Some(Err(fault)) => lvm.warnings.push(Warning::Label { at: place.start, fault }),
            Some(Ok(label)) if lvm.physical_volume(&label.uuid).is_some() => {
                lvm.warnings.push(Warning::Duplicate { at: place.start, uuid: label.uuid });
            }
            Some(Ok(label)) => {
                let uuid = label.uuid.clone();
                lvm.physical_volumes.push(PhysicalVolume { uuid, place, group: None });
                labels.push((place, label));
            }
        }
    }
    let mut budget = MAX_TOTAL_TEXT;
    // Most areas hold the same text.
    let mut known = BTreeSet::new();
    for (place, label) in &labels {
        for &(offset, _) in &label.areas {
            let found = match label::read_location(disk, *place, offset)? {
                Ok(None) => continue,
                Ok(Some(location)) => {
                    let identity = (location.size, location.checksum);
                    if known.contains(&identity) {
                        continue;
                    }
                    match budget.checked_sub(location.size) {
                        None => Err(Fault::TotalTooLarge),
                        Some(rest) => {
                            budget = rest;
                            let text = label::read_text(disk, *place, location)?;
                            let group = text.and_then(|text| VolumeGroup::parse(&text));
                            if group.is_ok() {
                                known.insert(identity);
                            }
                            group
                        }
                    }
                }
                Err(fault) => Err(fault),
            };
            match found {
                Ok(group) => lvm.add(group),
                Err(fault) => {
                    let at = place.start.saturating_add(ByteLen::new(offset));
                    lvm.warnings.push(Warning::MetadataArea { at, fault });
                }
            }
        }
    }
    lvm.connect();
    Ok(lvm)
}

impl Lvm {
    /// The physical volume of this UUID.
    fn physical_volume(&self, uuid: &str) -> Option<&PhysicalVolume> {
        self.physical_volumes.iter().find(|volume| volume.uuid == uuid)
    }

    /// The physical volume that is exactly this partition.
    pub fn physical_volume_at(&self, place: GuestRange) -> Option<&PhysicalVolume> {
        self.physical_volumes.iter().find(|volume| volume.place == place)
    }

    /// Adds a group, unless a newer description of it is there.
    fn add(&mut self, group: VolumeGroup) {
        match self.groups.iter_mut().find(|known| known.uuid == group.uuid) {
            Some(known) if known.seqno < group.seqno => *known = group,
            Some(_) => {}
            None => self.groups.push(group),
        }
    }

    /// Says of each group where its physical volumes are, and of these which group is
    /// theirs.
    fn connect(&mut self) {
        for (index, group) in self.groups.iter_mut().enumerate() {
            for known in &mut group.physical_volumes {
                let here = self.physical_volumes.iter_mut().find(|here| here.uuid == known.uuid);
                if let Some(here) = here {
                    known.place = Some(here.place);
                    here.group = Some(index);
                }
            }
        }
    }

    /// The logical volume that `VG/LV` means, with its group.
    ///
    /// # Errors
    /// `Usage` where that is not of this form, or where two groups have the name;
    /// `NotFound`, with those that there are.
    pub fn find(&self, wanted: &str) -> Result<(&VolumeGroup, &LogicalVolume)> {
        let (group_name, name) = split_name(wanted)?;
        let mut groups = self.groups.iter().filter(|group| group.name == group_name);
        let group = groups.next();
        if let (Some(one), Some(other)) = (group, groups.next()) {
            return Err(Error::new(ErrorKind::Usage(format!(
                "two volume groups on the disk are called '{group_name}' (UUIDs {} and {})",
                one.uuid, other.uuid
            ))));
        }
        let volume = group.and_then(|group| {
            let found = group.logical_volumes.iter().find(|volume| volume.name == name);
            found.map(|volume| (group, volume))
        });
        volume.ok_or_else(|| {
            Error::new(ErrorKind::NotFound(format!(
                "there is no logical volume '{wanted}' on the disk: {}{}",
                self.names(),
                self.unreadable().map(|warning| format!("; {warning}")).unwrap_or_default()
            )))
        })
    }

    /// The first warning of what can't be read.
    pub fn unreadable(&self) -> Option<&Warning> {
        self.warnings.iter().find(|warning| {
            matches!(
                warning,
                Warning::Label { fault: Fault::Unreadable(_), .. }
                    | Warning::MetadataArea { fault: Fault::Unreadable(_), .. }
            )
        })
    }

    /// The logical volumes that there are, for people.
    fn names(&self) -> String {
        const MOST: usize = 20;
        let names: Vec<_> = self
            .groups
            .iter()
            .flat_map(|group| {
                let visible = group.logical_volumes.iter().filter(|volume| volume.is_visible);
                visible.map(|volume| printable(&group.full_name(volume)))
            })
            .collect();
        match names.len() {
            0 if self.physical_volumes.is_empty() => "it has no physical volume of LVM".to_owned(),
            0 => "it has none".to_owned(),
            count if count > MOST => {
                format!("it has {} and {} more", names[..MOST].join(", "), count - MOST)
            }
            _ => format!("it has {}", names.join(", ")),
        }
    }
}

/// Takes `VG/LV` apart.
///
/// # Errors
/// `Usage`: it is not of this form.
pub fn split_name(name: &str) -> Result<(&str, &str)> {
    let parts = name.split_once('/');
    parts
        .filter(|(group, volume)| !group.is_empty() && !volume.is_empty())
        .ok_or_else(|| Error::new(ErrorKind::Usage(format!("'{name}' is not of the form VG/LV"))))
}

/// A UUID of LVM in its usual notation, however it is written.
fn uuid_text(text: &str) -> String {
    const DASHES: [usize; 6] = [6, 10, 14, 18, 22, 26];
    let mut out = String::with_capacity(38);
    for (index, c) in text.chars().filter(|&c| c != '-').take(32).enumerate() {
        if DASHES.contains(&index) {
            out.push('-');
        }
        out.push(c);
    }
    out
}
