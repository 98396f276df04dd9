//! Which file system is meant; or what there is to choose from, or lies there instead.

use std::fmt;

use imgdm::error::printable;
use imgdm::filesystem::has_driver;
use imgdm::lvm::{self, Lvm};
use imgdm::partition::{self, Disk, Partition, PartitionTable};
use imgdm::signature::{Budget, Signature, Usage, probe, probe_within};
use imgdm::units::{GuestOffset, GuestRange};
use imgdm::{Error, ErrorKind, Result};

use crate::cli::output::human_size;

/// Lines of what there is to choose from, at most.
const MAX_LISTED: usize = 64;

/// Where a file system lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// On the whole disk; or nobody said where.
    Disk,
    /// On the partition of this number.
    Partition(u32),
    /// On the logical volume `VG/LV`.
    Volume(String),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk => f.write_str("the disk"),
            Self::Partition(number) => write!(f, "partition {number}"),
            Self::Volume(name) => write!(f, "logical volume {}", printable(name)),
        }
    }
}

/// What is to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Where it lies.
    pub(super) place: Place,
    /// Its type, by libblkid's name or as the user says.
    pub(super) kind: String,
    /// There are partitions, and what looks like a file system on the whole disk: that may be
    /// older than they are.
    pub(super) is_ambiguous: bool,
}

/// The whole of a disk.
pub(super) fn whole(disk: &dyn Disk) -> GuestRange {
    GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk.size().get()))
}

/// What is to be mounted of `disk`, which is the device of the place that was `asked` for.
/// `kind` is the type that the user gave.
///
/// # Errors
/// What reading says; there is no file system, or more than one that can be meant.
pub(super) fn choose(disk: &mut dyn Disk, asked: &Place, kind: Option<&str>) -> Result<Target> {
    let range = whole(disk);
    let (found, unread) = match probe(disk, range) {
        Err(error) if error.is_interruption() => return Err(error),
        Err(error) => (None, Some(error)),
        Ok(found) => (found, None),
    };
    let target = |place: &Place, found: &str| {
        let kind = kind.unwrap_or(found).to_owned();
        Ok(Target { place: place.clone(), kind, is_ambiguous: false })
    };
    let on_all = found.as_ref().filter(|found| found.usage == Usage::Filesystem);
    if let Some(found) = on_all.filter(|_| *asked != Place::Disk) {
        return target(asked, found.kind);
    }
    if *asked == Place::Disk {
        let table = match partition::read(disk) {
            Err(error) if error.is_interruption() => return Err(error),
            Err(error) if kind.is_none() && on_all.is_none() => return Err(error),
            table => table.unwrap_or_default(),
        };
        if let Some(found) = on_all.filter(|found| is_of_all(found, table.as_ref())) {
            return target(asked, found.kind);
        }
        let places = lvm::places(table.as_ref(), disk.size());
        let lvm = lvm::read(disk, &places)?;
        let (mut partitions, mut budget) = (Vec::new(), Budget::default());
        let mut is_certain = true;
        for partition in table.map(|table| table.partitions).unwrap_or_default() {
            let usable = partition.unusable.is_none() && !partition.is_extended;
            let found = match usable.then(|| probe_within(disk, partition.range, &mut budget)) {
                None => None,
                Some(Ok(found)) => found,
                Some(Err(error)) if error.is_interruption() => return Err(error),
                // It may be the one that is meant.
                Some(Err(_)) => {
                    is_certain = false;
                    None
                }
            };
            partitions.push((partition, found));
        }
        let volumes = volumes(&lvm);
        let mountable = partitions.iter().filter_map(|(partition, found)| {
            let found = found.as_ref()?;
            let is_mountable = found.usage == Usage::Filesystem && has_driver(found.kind);
            is_mountable.then_some((partition.number, found.kind))
        });
        let mountable: Vec<_> = mountable.collect();
        if volumes.is_empty() && is_certain {
            match (&mountable[..], on_all) {
                (&[(number, kind)], _) => {
                    let target = target(&Place::Partition(number), kind)?;
                    return Ok(Target { is_ambiguous: on_all.is_some(), ..target });
                }
                // Partitions that hold something else, like LUKS, are the ones that are meant.
                ([], Some(found)) if partitions.iter().all(|(_, found)| found.is_none()) => {
                    return Ok(Target { is_ambiguous: true, ..target(asked, found.kind)? });
                }
                _ => {}
            }
        }
        if !partitions.is_empty() || !volumes.is_empty() {
            return Err(ask(&partitions, &volumes));
        }
    }
    match kind {
        Some(kind) => target(asked, kind),
        None => Err(unread.unwrap_or_else(|| no_file_system(asked, found.as_ref()))),
    }
}

/// Whether a file system on the whole of a disk is meant though there is a partition table:
/// it is one of those that come with a table, or the table lies inside of it. Otherwise it
/// was there before the partitions, whose maker left its superblock.
fn is_of_all(found: &Signature, table: Option<&PartitionTable>) -> bool {
    let partitions = table.map_or(&[][..], |table| &table.partitions);
    let mut usable = partitions.iter().filter(|p| p.unusable.is_none() && !p.is_extended);
    let starts = |partition: &Partition| partition.range.start == GuestOffset::ZERO;
    found.kind == "iso9660" || usable.clone().next().is_none() || usable.any(starts)
}

/// The logical volumes that are there to be used, with their sizes.
fn volumes(lvm: &Lvm) -> Vec<(String, u64)> {
    let all = lvm.groups.iter().flat_map(|group| {
        let visible = group.logical_volumes.iter().filter(|volume| volume.is_visible);
        visible.map(|volume| (group.full_name(volume), group.size_of(volume).get()))
    });
    all.collect()
}

/// Asks for a choice.
fn ask(partitions: &[(Partition, Option<Signature>)], volumes: &[(String, u64)]) -> Error {
    let partitions = partitions.iter().filter(|(partition, _)| !partition.is_extended);
    let mut lines: Vec<String> =
        partitions.map(|(each, found)| line(each, found.as_ref())).collect();
    let how = match (lines.is_empty(), volumes.is_empty()) {
        (false, true) => "by -p N which of its partitions",
        (true, _) => "by --lv VG/LV which of its logical volumes",
        (false, false) => "by -p N or --lv VG/LV what of it",
    };
    lines.extend(
        volumes
            .iter()
            .map(|(name, size)| format!("\n  --lv {}  {}", printable(name), human_size(*size))),
    );
    let more = lines.len().saturating_sub(MAX_LISTED);
    lines.truncate(MAX_LISTED);
    let mut message = format!("say {how} is to be mounted:{}", lines.concat());
    if more > 0 {
        message.push_str(&format!("\n  and {more} more"));
    }
    Error::new(ErrorKind::Usage(message))
}

/// A line of the list of partitions.
fn line(partition: &Partition, found: Option<&Signature>) -> String {
    let what = match (partition.unusable, found) {
        (Some(why), _) => why.to_string(),
        (None, None) => "nothing known".to_owned(),
        (None, Some(found)) => match &found.label {
            Some(label) => format!("{} '{}'", found.kind, printable(label)),
            None => found.kind.to_owned(),
        },
    };
    let size = human_size(partition.range.length().get());
    format!("\n  -p {:<3} {size:>9}  {what}", partition.number)
}

/// Why there is nothing to be mounted, and what can be done.
fn no_file_system(place: &Place, found: Option<&Signature>) -> Error {
    let attach = match place {
        Place::Disk => "imgdm attach".to_owned(),
        Place::Partition(number) => format!("imgdm attach -p {number}"),
        Place::Volume(name) => format!("imgdm attach --lv {}", printable(name)),
    };
    let Some(found) = found else {
        return Error::new(ErrorKind::Unsupported(format!(
            "on {place} there is nothing that imgdm knows: -t FSTYPE mounts it all the same"
        )));
    };
    let open = |kind: &str| {
        format!(
            "'{attach}' it, open that by 'cryptsetup open --readonly{kind}', and mount what comes of it"
        )
    };
    let what = match found.kind {
        "LVM2_member" => "a physical volume of LVM: 'imgdm partitions' lists the logical volumes, and --lv VG/LV mounts one that lies on this disk alone".to_owned(),
        "crypto_LUKS" => format!("encrypted by LUKS: {}", open("")),
        "BitLocker" => format!("encrypted by BitLocker: {}", open(" --type bitlk")),
        "linux_raid_member" => format!("a member of a RAID of Linux: '{attach}' all its members, and assemble them by 'mdadm --assemble --readonly'"),
        "swap" | "swsuspend" => "swap space, no file system".to_owned(),
        "jbd" => "the journal of a file system that lies elsewhere".to_owned(),
        kind => format!("no file system ({kind})"),
    };
    Error::new(ErrorKind::Unsupported(format!("{place} is {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgdm::units::ByteLen;

    struct Memory(Vec<u8>);

    impl Disk for Memory {
        fn size(&self) -> ByteLen {
            ByteLen::new(self.0.len() as u64)
        }

        fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
            let at = usize::try_from(offset.get()).unwrap();
            buffer.copy_from_slice(&self.0[at..at + buffer.len()]);
            Ok(())
        }
    }

    /// Sectors of each partition.
    const PART: usize = 256;

    /// A disk with a master boot record of so many partitions.
    fn partitioned(count: usize) -> Memory {
        let mut disk = Memory(vec![0; (count + 1) * PART * 512]);
        disk.0[510..512].copy_from_slice(&[0x55, 0xaa]);
        for index in 0..count {
            let (entry, start) = (446 + index * 16, u32::try_from((index + 1) * PART).unwrap());
            disk.0[entry + 4] = 0x83;
            disk.0[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
            disk.0[entry + 12] = 0;
            disk.0[entry + 13] = 1;
        }
        disk
    }

    fn put_ext2(disk: &mut Memory, start: usize) {
        disk.0[start + 1024 + 56..start + 1024 + 58].copy_from_slice(&[0x53, 0xef]);
    }

    fn target(place: Place, kind: &str) -> Target {
        Target { place, kind: kind.to_owned(), is_ambiguous: false }
    }

    #[test]
    fn the_only_partition_with_a_file_system_is_chosen_and_of_two_none() {
        let mut disk = partitioned(3);
        put_ext2(&mut disk, 2 * PART * 512);
        let chosen = choose(&mut disk, &Place::Disk, None).unwrap();
        assert_eq!(chosen, target(Place::Partition(2), "ext2"));
        put_ext2(&mut disk, 3 * PART * 512);
        let error = choose(&mut disk, &Place::Disk, None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)));
        let text = error.to_string();
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.contains("-p 1 ") && text.contains("-p 3 "), "{text}");
    }

    #[test]
    fn a_file_system_on_the_whole_of_a_partition_or_volume_goes_before_all_else() {
        let mut disk = partitioned(2);
        put_ext2(&mut disk, 0);
        put_ext2(&mut disk, PART * 512);
        for place in [Place::Partition(7), Place::Volume("vg/lv".to_owned())] {
            assert_eq!(choose(&mut disk, &place, None).unwrap(), target(place, "ext2"));
        }
    }

    #[test]
    fn what_an_earlier_file_system_of_the_whole_disk_has_left_is_not_mounted() {
        let mut disk = partitioned(2);
        put_ext2(&mut disk, 0);
        // Nothing else can be meant.
        assert_eq!(
            choose(&mut disk, &Place::Disk, None).unwrap(),
            Target { is_ambiguous: true, ..target(Place::Disk, "ext2") }
        );
        // Here it can, though it can't be mounted.
        let start = 2 * PART * 512;
        disk.0[start..start + 8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        let error = choose(&mut disk, &Place::Disk, None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
        assert!(error.to_string().contains("crypto_LUKS"), "{error}");
        put_ext2(&mut disk, PART * 512);
        assert_eq!(
            choose(&mut disk, &Place::Disk, None).unwrap(),
            Target { is_ambiguous: true, ..target(Place::Partition(1), "ext2") }
        );
    }

    #[test]
    fn the_users_type_goes_before_what_is_found_or_not() {
        let mut empty = Memory(vec![0; 65536]);
        assert_eq!(
            choose(&mut empty, &Place::Disk, Some("udf")).unwrap(),
            target(Place::Disk, "udf")
        );
        let error = choose(&mut empty, &Place::Partition(3), None).unwrap_err();
        assert!(error.to_string().contains("partition 3") && error.to_string().contains("-t"));
        put_ext2(&mut empty, 0);
        assert_eq!(
            choose(&mut empty, &Place::Disk, Some("ext4")).unwrap(),
            target(Place::Disk, "ext4")
        );
    }

    /// One of which this byte can't be read, for this reason.
    struct Holed(Memory, u64, ErrorKind);

    impl Disk for Holed {
        fn size(&self) -> ByteLen {
            self.0.size()
        }

        fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
            match (offset.get()..offset.get() + buffer.len() as u64).contains(&self.1) {
                true => Err(Error::new(self.2.clone())),
                false => self.0.read(offset, buffer),
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_obstacle_to_the_users_type_and_not_chosen_around() {
        let broken = || ErrorKind::Io("a broken sector".to_owned());
        let mut disk = Holed(Memory(vec![0; 65536]), 1024, broken());
        for place in [Place::Disk, Place::Partition(3)] {
            let chosen = choose(&mut disk, &place, Some("udf")).unwrap();
            assert_eq!(chosen, target(place.clone(), "udf"));
            assert_eq!(choose(&mut disk, &place, None).unwrap_err().kind(), &broken());
        }
        disk.2 = ErrorKind::Interrupted(2);
        let error = choose(&mut disk, &Place::Disk, Some("udf")).unwrap_err();
        assert_eq!(error.kind(), &disk.2);
        // The one that can't be read may have the file system that is meant.
        let mut disk = Holed(partitioned(2), u64::try_from(2 * PART * 512).unwrap(), broken());
        put_ext2(&mut disk.0, PART * 512);
        let error = choose(&mut disk, &Place::Disk, None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Usage(_)), "{error}");
    }

    #[test]
    fn what_is_no_file_system_is_explained() {
        let mut disk = Memory(vec![0; 65536]);
        disk.0[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        let error = choose(&mut disk, &Place::Partition(2), None).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Unsupported(_)));
        let text = error.to_string();
        assert!(text.contains("partition 2 is encrypted by LUKS"), "{text}");
        assert!(text.contains("imgdm attach -p 2"), "{text}");
    }
}
