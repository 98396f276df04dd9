//! Superblocks put by hand where no tool makes them, and noise.

use super::*;
use crate::error::ErrorKind;

struct Memory(Vec<u8>);

/// One of which it is counted how often it is read.
struct Counted(Memory, u64);

impl Disk for Counted {
    fn size(&self) -> ByteLen {
        self.0.size()
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        self.1 += 1;
        self.0.read(offset, buffer)
    }
}

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

/// One of which this byte can't be read, for this reason.
struct Holed<'m>(&'m mut Memory, u64, ErrorKind);

impl Disk for Holed<'_> {
    fn size(&self) -> ByteLen {
        self.0.size()
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        match (offset.get()..offset.get() + buffer.len() as u64).contains(&self.1) {
            true => Err(Error::new(self.2.clone()).at_offset(offset.get())),
            false => self.0.read(offset, buffer),
        }
    }
}

fn disk(bytes: usize, pieces: &[(usize, &[u8])]) -> Memory {
    let mut disk = Memory(vec![0; bytes]);
    for (at, piece) in pieces {
        disk.0[*at..*at + piece.len()].copy_from_slice(piece);
    }
    disk
}

fn whole(disk: &Memory) -> GuestRange {
    GuestRange::new(GuestOffset::ZERO, GuestOffset::new(disk.size().get()))
}

fn found(mut disk: Memory) -> Signature {
    let range = whole(&disk);
    probe(&mut disk, range).unwrap().expect("something is found")
}

#[test]
fn a_physical_volume_of_lvm_is_known_by_its_label_in_any_of_four_sectors() {
    for sector in 0..4u8 {
        let at = usize::from(sector) * 512;
        let id = b"abcdefghijklmnopqrstuvwxyz012345";
        let found = found(disk(
            1 << 20,
            &[(at, b"LABELONE"), (at + 8, &[sector]), (at + 24, b"LVM2 001"), (at + 32, id)],
        ));
        assert_eq!((found.kind, found.usage), ("LVM2_member", Usage::Raid));
        assert_eq!(found.uuid.as_deref(), Some("abcdef-ghij-klmn-opqr-stuv-wxyz-012345"));
    }
}

#[test]
fn members_of_a_raid_are_known_wherever_their_version_has_the_superblock() {
    let size = 1 << 20;
    for place in [0, 4096, size - 8192] {
        let sectors = u64::try_from(place / 512).unwrap();
        let found = found(disk(
            size,
            &[
                (place, &[0xfc, 0x4e, 0x2b, 0xa9, 1]),
                (place + 16, &[7; 16]),
                (place + 32, b"host:0"),
                (place + 144, &sectors.to_le_bytes()),
            ],
        ));
        assert_eq!((found.kind, found.label.as_deref()), ("linux_raid_member", Some("host:0")));
        assert_eq!(found.uuid.as_deref(), Some("07070707-0707-0707-0707-070707070707"));
    }
}

#[test]
fn the_label_of_hfs_plus_is_read_from_its_catalogue() {
    let name: Vec<u8> = "Disk".encode_utf16().flat_map(u16::to_be_bytes).collect();
    let found = found(disk(
        1 << 20,
        &[
            (1024, b"H+"),
            (1024 + 40, &4096u32.to_be_bytes()),
            (1024 + 104, &[1, 2, 3, 4, 5, 6, 7, 8]),
            // The catalogue: blocks 8 to 15. Its header node, then the leaf, node 1.
            (1024 + 288, &[0, 0, 0, 8, 0, 0, 0, 8]),
            (8 * 4096 + 24, &[0, 0, 0, 1]),
            (8 * 4096 + 32, &4096u16.to_be_bytes()),
            (9 * 4096 + 8, &[0xff, 0, 0, 1]),
            (9 * 4096 + 16, &[0, 0, 0, 1, 0, 4]),
            (9 * 4096 + 22, &name),
        ],
    ));
    assert_eq!((found.kind, found.label.as_deref()), ("hfsplus", Some("Disk")));
    assert!(found.uuid.is_some());
}

#[test]
fn only_the_range_is_looked_at() {
    let mut disk = disk(1 << 20, &[(512 * 100 + 1024 + 56, &[0x53, 0xef])]);
    let range = |start, end| GuestRange::new(GuestOffset::new(start), GuestOffset::new(end));
    let ext = probe(&mut disk, range(512 * 100, 1 << 20)).unwrap();
    assert_eq!(ext.map(|found| found.kind), Some("ext2"));
    assert_eq!(probe(&mut disk, range(512 * 100, 512 * 102)).unwrap(), None);
    assert_eq!(probe(&mut disk, range(512 * 99, 1 << 20)).unwrap(), None);
}

#[test]
fn no_bytes_whatsoever_make_it_panic() {
    let magics: [(usize, &[u8]); 16] = [
        (0, b"XFSB\0\0\x10\0"),
        (3, b"NTFS    \0\x02\x08"),
        (3, b"EXFAT   "),
        (0, b"\xebX\x90mkfs.fat\0\x02\x04\x01\0\x02"),
        (0, b"hsqs"),
        (0, b"LUKS\xba\xbe\0\x02"),
        (510, &[0x55, 0xaa]),
        (1024, b"H+"),
        (1024, b"BD"),
        (1024, &[0x10, 0x20, 0xf5, 0xf2]),
        (1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
        (1030, &[0x34, 0x34]),
        (32769, b"CD001"),
        (4086, b"SWAPSPACE2"),
        (32768, b"JFS1"),
        (65536 + 0x40, b"_BHRfS_M"),
    ];
    let mut state = 7u64;
    let mut noise = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    };
    for round in 0..600usize {
        let mut disk = Memory(vec![0; if round % 3 == 0 { 70 << 10 } else { 3000 }]);
        disk.0.iter_mut().for_each(|byte| *byte = if noise() < 90 { noise() } else { 0 });
        let (at, magic) = magics[round % magics.len()];
        if let Some(place) = disk.0.get_mut(at..at + magic.len()) {
            place.copy_from_slice(magic);
        }
        let range = whole(&disk);
        probe(&mut disk, range).unwrap();
    }
}

/// A FAT32 of clusters of so many sectors, whose root directory is full and has no label. The
/// chain of its clusters leads from each to the next one, or to itself.
fn fat32_without_end(cluster_sectors: u8, is_loop: bool) -> Memory {
    const FAT_SECTORS: usize = 64;
    let mut disk = Memory(vec![b'x'; 8 << 20]);
    disk.0[..512].fill(0);
    disk.0[11..17].copy_from_slice(&[0, 2, cluster_sectors, 1, 0, 1]);
    disk.0[21] = 0xf8;
    disk.0[32..36].copy_from_slice(&(16u32 << 10).to_le_bytes());
    disk.0[36..40].copy_from_slice(&u32::try_from(FAT_SECTORS).unwrap().to_le_bytes());
    disk.0[44] = 2;
    disk.0[0x52..0x5a].copy_from_slice(b"FAT32   ");
    disk.0[510..512].copy_from_slice(&[0x55, 0xaa]);
    for cluster in 0..u32::try_from(FAT_SECTORS * 128).unwrap() {
        let at = 512 + cluster as usize * 4;
        let next = if is_loop { cluster } else { cluster + 1 };
        disk.0[at..at + 4].copy_from_slice(&next.to_le_bytes());
    }
    disk
}

#[test]
fn a_directory_without_end_is_searched_within_bounds() {
    for (cluster_sectors, is_loop, most) in
        [(1, false, 300), (128, false, 120), (1, true, 100), (128, true, 100)]
    {
        let memory = fat32_without_end(cluster_sectors, is_loop);
        let range = whole(&memory);
        let mut disk = Counted(memory, 0);
        let found = probe(&mut disk, range).unwrap().unwrap();
        assert_eq!((found.kind, found.label), ("vfat", None));
        assert!(disk.1 < most, "{cluster_sectors} {is_loop}: {} reads", disk.1);
    }
}

#[test]
fn all_partitions_of_a_disk_share_what_is_read_of_directories() {
    let memory = fat32_without_end(1, false);
    let range = whole(&memory);
    let (mut disk, mut budget) = (Counted(memory, 0), Budget::default());
    for _ in 0..256 {
        let found = probe_within(&mut disk, range, &mut budget).unwrap().unwrap();
        assert_eq!(found.kind, "vfat");
    }
    // 200 reads of each were 51,200.
    assert!(disk.1 < 20_000, "{} reads", disk.1);
}

#[test]
fn a_superblock_that_cannot_be_read_is_none_and_hides_no_other() {
    let mut ext2 = disk(1 << 20, &[(1024 + 56, &[0x53, 0xef])]);
    let range = whole(&ext2);
    let broken = || ErrorKind::Io("a broken sector".to_owned());
    // Where a RAID's superblock would be, at the end, and the label of LVM.
    for place in [(1 << 20) - 8192, (1 << 20) - (64 << 10), 512] {
        let found = probe(&mut Holed(&mut ext2, place, broken()), range).unwrap().unwrap();
        assert_eq!(found.kind, "ext2", "{place}");
    }
    let error = probe(&mut Holed(&mut ext2, 1024 + 56, broken()), range).unwrap_err();
    assert_eq!(error.kind(), &broken());
    let signal = ErrorKind::Interrupted(15);
    let error = probe(&mut Holed(&mut ext2, 512, signal.clone()), range).unwrap_err();
    assert_eq!(error.kind(), &signal);
}
