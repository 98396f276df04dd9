//! Disks in memory, hostile ones above all.

use super::*;
use crate::error::{Error, ErrorKind};

/// A disk of which only what was put there is not zero.
struct Memory {
    size: u64,
    bytes: Vec<u8>,
    /// How many bytes were read.
    read: u64,
}

impl Memory {
    fn new(size: u64) -> Self {
        Self { size, bytes: vec![0; 64 << 10], read: 0 }
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    /// An entry of the boot record in this sector.
    fn slot(&mut self, sector: usize, index: usize, kind: u8, start: u32, length: u32) {
        let at = sector * 512 + 446 + index * 16;
        self.put(at + 4, &[kind]).put(at + 8, &start.to_le_bytes());
        self.put(at + 12, &length.to_le_bytes()).put(sector * 512 + 510, &[0x55, 0xaa]);
    }

    fn table(&mut self) -> PartitionTable {
        read(self).unwrap().expect("there is a table")
    }
}

impl Disk for Memory {
    fn size(&self) -> ByteLen {
        ByteLen::new(self.size)
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let end = offset.get() + buffer.len() as u64;
        assert!(end <= self.size, "a read past the end of the disk");
        self.read += buffer.len() as u64;
        for (at, byte) in (offset.get()..).zip(buffer.iter_mut()) {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// A disk of which some sectors can't be read, for this reason.
struct Holed<'m>(&'m mut Memory, &'static [u64], ErrorKind);

impl Disk for Holed<'_> {
    fn size(&self) -> ByteLen {
        self.0.size()
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let end = offset.get() + buffer.len() as u64;
        let is_touched = |&sector: &u64| offset.get() < (sector + 1) * 512 && sector * 512 < end;
        match self.1.iter().any(is_touched) {
            true => Err(Error::new(self.2.clone()).at_offset(offset.get())),
            false => self.0.read(offset, buffer),
        }
    }
}

fn broken() -> ErrorKind {
    ErrorKind::Io("a broken sector".to_owned())
}

/// A disk of which nothing can be read.
struct Broken;

impl Disk for Broken {
    fn size(&self) -> ByteLen {
        ByteLen::new(1 << 20)
    }

    fn read(&mut self, offset: GuestOffset, _: &mut [u8]) -> Result<()> {
        Err(Error::invalid("a broken cluster").at_offset(offset.get()))
    }
}

fn sectors(partition: &Partition) -> (u32, u64, u64) {
    let range = partition.range;
    (partition.number, range.start.get() / 512, range.length().get() / 512)
}

#[test]
fn a_disk_without_a_table_has_none() {
    for size in [0, 511, 512, 1 << 20] {
        assert_eq!(read(&mut Memory::new(size)).unwrap(), None);
    }
}

#[test]
fn what_cannot_be_read_is_an_error_and_not_a_disk_without_partitions() {
    assert!(read(&mut Broken).is_err());
}

#[test]
fn a_place_that_cannot_be_read_takes_away_only_what_it_holds() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x83, 200, 100);
    disk.slot(0, 1, 0x05, 10, 100);
    disk.slot(10, 0, 0x83, 1, 9);
    disk.slot(10, 1, 0x05, 20, 50);
    disk.slot(30, 0, 0x82, 2, 8);
    let unreadable = |sector: u64| TableWarning::Unreadable(GuestOffset::new(sector * 512));
    let numbers = |table: &PartitionTable| -> Vec<_> {
        table.partitions.iter().map(|partition| partition.number).collect()
    };
    let table = read(&mut Holed(&mut disk, &[30], broken())).unwrap().unwrap();
    assert_eq!(numbers(&table), [1, 2, 5]);
    let fault = ChainFault::NoRecord;
    let cut = TableWarning::ChainCut { extended: 2, sector: 30, fault };
    assert_eq!(table.warnings, [cut, unreadable(30)]);
    let table = read(&mut Holed(&mut disk, &[10], broken())).unwrap().unwrap();
    assert_eq!((numbers(&table), table.warnings), (vec![1, 2], vec![unreadable(10)]));
    // What is not of the table at all.
    let table = read(&mut Holed(&mut disk, &[200, 2047], broken())).unwrap().unwrap();
    assert_eq!((numbers(&table).len(), table.warnings), (4, Vec::new()));
    // Whether there is a table.
    let error = read(&mut Holed(&mut disk, &[0], broken())).unwrap_err();
    assert_eq!((error.kind(), error.offset()), (&broken(), Some(0)));
    // A signal is no broken sector.
    let signal = ErrorKind::Interrupted(2);
    let error = read(&mut Holed(&mut disk, &[30], signal.clone())).unwrap_err();
    assert_eq!(error.kind(), &signal);
}

#[test]
fn out_of_the_disk_and_overlapping_are_listed_with_the_reason() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x83, 1, 100);
    disk.slot(0, 1, 0x83, 100, 100);
    disk.slot(0, 2, 0x83, 500, u32::MAX);
    disk.slot(0, 3, 0x83, 200, 100);
    let table = disk.table();
    let found: Vec<_> = table.partitions.iter().map(|p| (p.number, p.unusable)).collect();
    assert_eq!(
        found,
        [(1, None), (2, Some(Unusable::Overlaps(1))), (3, Some(Unusable::OutOfDisk)), (4, None)]
    );
}

#[test]
fn a_partition_without_a_sector_is_listed_with_the_reason() {
    // BSD: two slices of type 7, the first of which is empty.
    let mut disk = Memory::new(1 << 20);
    let label = 512;
    disk.put(label, &0x8256_4557u32.to_le_bytes()).put(label + 132, &0x8256_4557u32.to_le_bytes());
    disk.put(label + 138, &[2]);
    for (index, (length, start)) in [(0u32, 90u32), (100, 50)].into_iter().enumerate() {
        let at = label + 148 + index * 16;
        disk.put(at, &length.to_le_bytes()).put(at + 4, &start.to_le_bytes()).put(at + 12, &[7]);
    }
    let sum = disk.bytes[label..label + 148 + 32]
        .as_chunks::<2>()
        .0
        .iter()
        .fold(0u16, |sum, word| sum ^ u16::from_le_bytes(*word));
    disk.put(label + 136, &sum.to_le_bytes());
    let table = disk.table();
    let found: Vec<_> = table.partitions.iter().map(|p| (sectors(p), p.unusable)).collect();
    assert_eq!(found, [((1, 90, 0), Some(Unusable::Empty)), ((2, 50, 100), None)]);
}

#[test]
fn logical_partitions_do_not_overlap_the_extended_one_that_holds_them() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 1, 0x05, 10, 100);
    disk.slot(10, 0, 0x83, 1, 9);
    disk.slot(10, 1, 0x05, 20, 50);
    disk.slot(30, 0, 0x82, 2, 8);
    let table = disk.table();
    assert_eq!(
        table.partitions.iter().map(sectors).collect::<Vec<_>>(),
        [(2, 10, 100), (5, 11, 9), (6, 32, 8)]
    );
    assert!(table.partitions.iter().all(|p| p.unusable.is_none()));
    assert_eq!(table.partitions[2].inside, Some(2));
    assert!(table.partitions[0].is_extended);
}

#[test]
fn a_chain_of_extended_records_without_end_ends() {
    // Each leads one sector on, and none has a partition.
    let mut disk = Memory::new(1 << 30);
    disk.bytes = vec![0; 4 << 20];
    disk.slot(0, 0, 0x05, 1, 1 << 20);
    for sector in 1..8000 {
        disk.slot(sector, 0, 0x05, u32::try_from(sector).unwrap(), 1);
    }
    let cut = |sector, fault| [TableWarning::ChainCut { extended: 1, sector, fault }];
    let table = disk.table();
    assert_eq!(table.partitions.len(), 1);
    assert_eq!(table.warnings, cut(101, ChainFault::TooLong));
    assert!(disk.read < 1 << 20, "{}", disk.read);
    // One that leads back.
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x05, 10, 100);
    disk.slot(10, 0, 0x05, 20, 10);
    disk.slot(30, 0, 0x05, 20, 10);
    let table = disk.table();
    assert_eq!(table.partitions.len(), 1);
    assert_eq!(table.warnings, cut(30, ChainFault::Loop));
    // One that leads out, and one that leads to no record.
    disk.slot(30, 0, 0x05, 95, 10);
    assert_eq!(disk.table().warnings, cut(105, ChainFault::OutOfExtended));
    disk.slot(30, 0, 0x05, 40, 10);
    assert_eq!(disk.table().warnings, cut(50, ChainFault::NoRecord));
    disk.slot(30, 0, 0x05, 0, 0);
    assert_eq!(disk.table().warnings, []);
}

#[test]
fn thousands_of_logical_partitions_are_bounded() {
    let mut disk = Memory::new(1 << 30);
    disk.bytes = vec![0; 4 << 20];
    disk.slot(0, 0, 0x05, 1, 1 << 20);
    for sector in 1..8000 {
        disk.slot(sector, 0, 0x83, 1, 1);
        disk.slot(sector, 1, 0x05, u32::try_from(sector).unwrap(), 1);
    }
    let table = disk.table();
    assert_eq!(table.partitions.len(), MAX_PARTITIONS);
    assert_eq!(table.warnings, [TableWarning::TooManyPartitions]);
}

#[test]
fn the_first_sector_of_a_fat_is_no_table() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x83, 1, 100);
    // 512-byte sectors, 4 of them a cluster, one reserved, two FATs of 2, 16 entries of the
    // root directory.
    disk.put(11, &[0, 2, 4, 1, 0, 2, 16, 0]).put(21, &[0xf8, 2, 0]);
    // Too short for what lies before its clusters, so that it is none.
    assert_eq!(disk.table().kind, TableKind::Dos);
    disk.put(19, &[0, 8]);
    assert_eq!(read(&mut disk).unwrap(), None);
    disk.put(3, b"mkfs.fat").put(0x36, b"FAT16   ");
    assert_eq!(read(&mut disk).unwrap(), None);
    // Nor is another system's that looks like one.
    disk.put(0x36, b"HPFS    ");
    assert_eq!(disk.table().kind, TableKind::Dos);
}

#[test]
fn the_first_sector_of_an_ntfs_is_no_table_but_what_only_has_its_name_is() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x83, 1, 100);
    disk.put(3, b"NTFS    ");
    assert_eq!(disk.table().kind, TableKind::Dos);
    // Clusters of 8 sectors, 200 of them, records of 1024 bytes from the fourth cluster on.
    disk.put(11, &[0, 2, 8]).put(40, &1600u64.to_le_bytes());
    disk.put(48, &4u64.to_le_bytes()).put(56, &100u64.to_le_bytes()).put(64, &[0xf6]);
    disk.put(4 * 4096, b"FILE").put(4 * 4096 + 3 * 1024, b"FILE");
    assert_eq!(read(&mut disk).unwrap(), None);
    // Fields of FAT that NTFS leaves empty.
    disk.put(16, &[2]);
    assert_eq!(disk.table().kind, TableKind::Dos);
}

#[test]
fn the_first_sector_of_an_exfat_is_no_table_but_what_only_has_its_name_is() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x83, 1, 100);
    disk.put(0, b"\xeb\x76\x90EXFAT   ");
    for (at, number) in [(80, 24u32), (84, 8), (88, 64), (92, 200), (96, 4)] {
        disk.put(at, &number.to_le_bytes());
    }
    disk.put(108, &[9, 3, 1]);
    assert_eq!(disk.table().kind, TableKind::Dos);
    let mut sum = 0u32;
    for at in (0..11 * 512).filter(|at| ![106, 107, 112].contains(at)) {
        sum = sum.rotate_right(1).wrapping_add(disk.bytes[at].into());
    }
    disk.put(11 * 512, &sum.to_le_bytes().repeat(128));
    assert_eq!(read(&mut disk).unwrap(), None);
}

#[test]
fn a_physical_volume_with_an_empty_boot_record_has_no_table() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0, 0, 0);
    assert_eq!(disk.table().kind, TableKind::Dos);
    disk.put(512, b"LABELONE\x01\0\0\0\0\0\0\0").put(512 + 24, b"LVM2 001");
    assert_eq!(read(&mut disk).unwrap(), None);
    disk.slot(0, 0, 0x83, 1, 100);
    assert_eq!(disk.table().kind, TableKind::Dos);
}

#[test]
fn slices_of_solaris_unixware_and_minix_are_found_in_their_partitions() {
    let mut disk = Memory::new(1 << 20);
    disk.slot(0, 0, 0x82, 10, 100);
    let vtoc = 11 * 512;
    disk.put(vtoc + 12, &0x600d_deeeu32.to_le_bytes()).put(vtoc + 16, &[1]).put(vtoc + 30, &[3]);
    disk.put(vtoc + 72, &[2, 0, 0, 0, 5, 0, 0, 0, 20]);
    // Past the end of the partition.
    disk.put(vtoc + 84, &[2, 0, 0, 0, 50, 0, 0, 0, 100]);
    disk.slot(0, 1, 0x81, 110, 20);
    disk.slot(110, 0, 0x81, 112, 5);
    disk.slot(110, 1, 0x83, 118, 5);
    let table = disk.table();
    let found: Vec<_> = table.partitions.iter().map(|p| (p.table, sectors(p), p.inside)).collect();
    assert_eq!(
        found,
        [
            (TableKind::Dos, (1, 10, 100), None),
            (TableKind::Dos, (2, 110, 20), None),
            (TableKind::Solaris, (5, 15, 20), Some(1)),
            (TableKind::Minix, (6, 112, 5), Some(2)),
        ]
    );
}

#[test]
fn no_bytes_whatsoever_make_it_panic() {
    // Magics in their places, and noise around them.
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    };
    let magics: [(usize, &[u8]); 8] = [
        (510, &[0x55, 0xaa]),
        (0, &[0x0b, 0xe5, 0xa9, 0x41]),
        (508, &[0xda, 0xbe]),
        (0, b"ER\x02\x00"),
        (512, &[0x57, 0x45, 0x56, 0x82]),
        (512, b"EFI PART\0\0\x01\0\x5c\0\0\0"),
        (16384 - 72, &[0x57, 0x29, 3, 0, 1, 0, 0, 0]),
        (446, &[0, 0, 0, 0, 0x05]),
    ];
    for round in 0..2000usize {
        let mut disk = Memory::new(40 << 10);
        disk.bytes.iter_mut().for_each(|byte| *byte = if noise() < 60 { noise() } else { 0 });
        for (index, (at, magic)) in magics.iter().enumerate() {
            if round >> index & 1 == 1 {
                disk.put(*at, magic);
            }
        }
        if let Some(table) = read(&mut disk).unwrap() {
            assert!(table.partitions.len() <= MAX_PARTITIONS);
        }
        assert!(disk.read < 4 << 20);
    }
}
