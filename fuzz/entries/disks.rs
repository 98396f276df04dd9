//! What lies on a guest's disk: partition tables, file systems, LVM.

use imgdm::chain::{Chain, HoleQuery, Layer};
use imgdm::error::Result;
use imgdm::filesystem::unclean;
use imgdm::format::raw::RawImage;
use imgdm::lvm::{self, Piece, PieceSource};
use imgdm::partition::{Disk, MAX_PARTITIONS};
use imgdm::signature::{self, Budget};
use imgdm::source::Source;
use imgdm::units::{ByteLen, GuestOffset, GuestRange};

/// Most reads that looking at a disk may take.
const MAX_READS: u64 = 1 << 20;

/// A disk of `size` bytes that begins with `bytes`; zeros follow.
struct Memory<'b> {
    size: u64,
    bytes: &'b [u8],
    reads: u64,
}

impl<'b> Memory<'b> {
    /// The first byte says how large the disk is: what is cut off is as hostile as the rest.
    fn new(bytes: &'b [u8]) -> Option<Self> {
        let (&scale, bytes) = bytes.split_first()?;
        let length = bytes.len() as u64;
        let size = match scale % 4 {
            0 => length,
            1 => 64 << 20,
            2 => 3 << 40,
            _ => u64::MAX / 512 * 512,
        };
        Some(Self { size: size.max(length) / 512 * 512, bytes, reads: 0 })
    }

    fn whole(&self) -> GuestRange {
        GuestRange::new(GuestOffset::ZERO, GuestOffset::new(self.size))
    }
}

impl Disk for Memory<'_> {
    fn size(&self) -> ByteLen {
        ByteLen::new(self.size)
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let end = offset.get().checked_add(buffer.len() as u64);
        assert!(end.is_some_and(|end| end <= self.size), "a read past the end of the disk");
        self.reads += 1;
        assert!(self.reads <= MAX_READS, "there is no end of reading");
        let rest = usize::try_from(offset.get()).ok().and_then(|at| self.bytes.get(at..));
        let rest = rest.unwrap_or_default();
        let (there, beyond) = buffer.split_at_mut(rest.len().min(buffer.len()));
        there.copy_from_slice(&rest[..there.len()]);
        beyond.fill(0);
        Ok(())
    }
}

/// Partition tables; and the disk as a raw image. Where bit 2 of the first byte is set, the
/// checksums of a GPT are put right.
pub fn partitions(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if bytes.first().is_some_and(|flags| flags & 4 != 0) {
        correct_gpt(&mut bytes[1..]);
    }
    let Some(mut disk) = Memory::new(&bytes) else { return };
    if let Ok(Some(table)) = imgdm::partition::read(&mut disk) {
        assert!(table.partitions.len() <= MAX_PARTITIONS, "more than are listed");
        for partition in &table.partitions {
            let _ = partition.kind.as_ref().and_then(|kind| kind.name(partition.table));
            assert!(
                partition.unusable.is_some() || partition.range.end.get() <= disk.size,
                "a partition that reaches past the end of the disk can be used"
            );
        }
        let _ = (table.unreadable(), format!("{:?}", table.warnings));
    }
    raw(disk.bytes);
}

/// Puts right the checksums of the header of a GPT in sector 1 and of its entries.
fn correct_gpt(disk: &mut [u8]) {
    let Some(header) = disk.get(512..1024) else { return };
    let number = |at: usize| {
        let bytes = header[at..at + 4].try_into().expect("it is 4 bytes long");
        usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
    };
    let (length, start) = (number(12), number(72).saturating_mul(512));
    let end = start.saturating_add(number(80).saturating_mul(number(84)));
    let sum = disk.get(start..end).map(crc32fast::hash);
    let header = &mut disk[512..1024];
    if let Some(sum) = sum {
        header[88..92].copy_from_slice(&sum.to_le_bytes());
    }
    header[16..20].fill(0);
    if let Some(sum) = header.get(..length).map(crc32fast::hash) {
        header[16..20].copy_from_slice(&sum.to_le_bytes());
    }
}

fn raw(bytes: &[u8]) {
    let source = std::sync::Arc::new(Source::from_bytes("fuzzed", bytes.to_vec()));
    let image = RawImage::open(std::sync::Arc::clone(&source)).expect("any bytes are raw");
    let image = Box::new(image);
    let chain = Chain::new(vec![Layer { image, source, data_file: None, declared_format: None }]);
    let chain = chain.expect("it has a layer");
    let mut at = GuestOffset::ZERO;
    chain
        .for_each_extent(chain.whole(), HoleQuery::Deep, &mut |extent| {
            assert_eq!(extent.start, at, "a gap or an overlap");
            at = extent.end();
            Ok(())
        })
        .expect("memory can be read");
    assert_eq!(at.get(), (bytes.len() as u64).next_multiple_of(512));
}

/// What a file system or container is, and whether it was left unclean.
pub fn signatures(bytes: &[u8]) {
    let Some(mut disk) = Memory::new(bytes) else { return };
    let whole = disk.whole();
    let found = signature::probe_within(&mut disk, whole, &mut Budget::default());
    if let Ok(Some(found)) = found {
        let _ = unclean(&mut disk, whole, found.kind);
    }
    for kind in ["ext4", "xfs", "btrfs", "ntfs", "vfat", "exfat", "f2fs", "jfs", "hfsplus"] {
        let _ = unclean(&mut disk, whole, kind);
    }
}

/// LVM: labels, metadata text, and what its logical volumes are made of. The input is a disk
/// whose checksums are put right where the first byte's bit 2 is set, or where its bit 3 is set
/// the metadata's text alone.
pub fn lvm(bytes: &[u8]) {
    let Some((&flags, rest)) = bytes.split_first() else { return };
    let mut bytes = vec![flags];
    if flags & 8 == 0 {
        bytes.extend(rest);
        if flags & 4 != 0 {
            correct_checksums(&mut bytes[1..]);
        }
    } else {
        bytes[0] = 1;
        bytes.extend(physical_volume(rest));
    }
    let Some(mut disk) = Memory::new(&bytes) else { return };
    // The whole disk, and a part of it in which the same label lies elsewhere.
    let mut places = vec![disk.whole()];
    if disk.size > 8192 {
        places.push(GuestRange::new(GuestOffset::new(4096), GuestOffset::new(disk.size)));
    }
    let Ok(lvm) = lvm::read(&mut disk, &places) else { return };
    for group in &lvm.groups {
        for volume in &group.logical_volumes {
            let _ = (group.full_name(volume), group.obstacle(volume));
            let Ok(pieces) = group.pieces(volume) else { continue };
            let mut length = 0u64;
            for piece in &pieces {
                assert!(!piece.length.is_zero(), "an empty piece");
                length = length.saturating_add(piece.length.get());
                assert!(on_disk(&disk, piece), "{piece:?} reaches past the end of the disk");
            }
            assert_eq!(length, group.size_of(volume).get(), "not all of the volume");
        }
    }
    let _ = lvm.find("vg/lv");
    let _ = format!("{:?}", lvm.warnings);
}

fn on_disk(disk: &Memory<'_>, piece: &Piece) -> bool {
    let fits = |start: GuestOffset, length: ByteLen| {
        start.checked_add(length).is_some_and(|end| end.get() <= disk.size)
    };
    match &piece.source {
        PieceSource::Linear(start) => fits(*start, piece.length),
        PieceSource::Striped { chunk, stripes } => {
            let length = ByteLen::new(piece.length.get() / stripes.len() as u64);
            length.get().is_multiple_of(chunk.get())
                && stripes.iter().all(|start| fits(*start, length))
        }
    }
}

/// LVM's checksum.
fn checksum(bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
    hasher.update(bytes);
    !hasher.finalize()
}

/// Where a metadata area is looked for by [`correct_checksums`].
const AREA: usize = 4096;

/// Puts right the checksums of a label in sector 1, of the header of an area at 4096 and of
/// that area's text: with them wrong, nothing behind them is looked at.
fn correct_checksums(disk: &mut [u8]) {
    if let Some(label) = disk.get_mut(512..1024) {
        let sum = checksum(&label[20..]);
        label[16..20].copy_from_slice(&sum.to_le_bytes());
    }
    let Some(header) = disk.get(AREA..AREA + 512) else { return };
    let number = |at: usize| {
        let bytes = header[at..at + 8].try_into().expect("it is 8 bytes long");
        usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
    };
    let start = AREA.saturating_add(number(40));
    let text = disk.get(start..start.saturating_add(number(48)));
    let sum = text.map(checksum);
    let header = &mut disk[AREA..AREA + 512];
    if let Some(sum) = sum {
        header[56..60].copy_from_slice(&sum.to_le_bytes());
    }
    let sum = checksum(&header[4..]);
    header[..4].copy_from_slice(&sum.to_le_bytes());
}

/// A disk that is a physical volume, called 32 times `A`, with this text in its only metadata
/// area.
fn physical_volume(text: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; 4608];
    disk[512..520].copy_from_slice(b"LABELONE");
    disk[520] = 1;
    disk[532] = 32;
    disk[536..544].copy_from_slice(b"LVM2 001");
    disk[544..576].fill(b'A');
    let put = |disk: &mut [u8], at: usize, value: u64| {
        disk[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    let area_size = 512 + text.len() as u64 + 512;
    put(&mut disk, 576, 64 << 20);
    put(&mut disk, 584, 1 << 20);
    put(&mut disk, 616, 4096);
    put(&mut disk, 624, area_size);
    disk[4100..4116].copy_from_slice(b" LVM2 x[5A%r0N*>");
    disk[4116] = 1;
    put(&mut disk, 4120, 4096);
    put(&mut disk, 4128, area_size);
    put(&mut disk, 4136, 512);
    put(&mut disk, 4144, text.len() as u64);
    disk.extend(text);
    correct_checksums(&mut disk);
    disk
}
