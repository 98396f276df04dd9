//! Physical volumes in memory, hostile ones above all.

use super::made::*;
use super::*;
use crate::error::ErrorKind;

/// Several physical volumes of 3 MiB behind each other.
struct Disk3 {
    bytes: Vec<u8>,
    read: u64,
}

/// One of which this byte can't be read, for this reason.
struct Holed<'d>(&'d mut Disk3, u64, ErrorKind);

impl Disk for Holed<'_> {
    fn size(&self) -> ByteLen {
        self.0.size()
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        match (offset.get()..offset.get() + buffer.len() as u64).contains(&self.1) {
            true => Err(Error::new(self.2.clone())),
            false => Disk::read(self.0, offset, buffer),
        }
    }
}

const VOLUME: usize = 3 * MIB;
const AREA: (usize, usize) = (AREA_AT, 64 << 10);
const OTHER_AREA: (usize, usize) = (2 * MIB, 64 << 10);

impl Disk3 {
    fn new(volumes: usize) -> Self {
        Self { bytes: vec![0; volumes * VOLUME], read: 0 }
    }

    fn volume(&mut self, index: usize) -> &mut [u8] {
        &mut self.bytes[index * VOLUME..(index + 1) * VOLUME]
    }

    fn read(&mut self) -> Lvm {
        let count = self.bytes.len() / VOLUME;
        read(self, &(0..count).map(place).collect::<Vec<_>>()).unwrap()
    }
}

fn place(index: usize) -> GuestRange {
    let at = |index: usize| GuestOffset::new((index * VOLUME) as u64);
    GuestRange::new(at(index), at(index + 1))
}

impl Disk for Disk3 {
    fn size(&self) -> ByteLen {
        ByteLen::new(self.bytes.len() as u64)
    }

    fn read(&mut self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let at = usize::try_from(offset.get()).unwrap();
        buffer.copy_from_slice(&self.bytes[at..at + buffer.len()]);
        self.read += buffer.len() as u64;
        Ok(())
    }
}

/// One physical volume, whose group `vg` has these logical volumes.
fn single(logical: &str) -> Disk3 {
    let mut disk = Disk3::new(1);
    put_label(disk.volume(0), FIRST, &[AREA]);
    put_area(disk.volume(0), AREA, AREA_HEADER, &group_text("vg", 1, &[FIRST], logical));
    disk
}

fn pieces(lvm: &Lvm, name: &str) -> Result<Vec<Piece>> {
    let (group, volume) = lvm.find(name)?;
    group.pieces(volume)
}

fn linear(start: u64, length: u64) -> Piece {
    Piece { length: ByteLen::new(length), source: PieceSource::Linear(GuestOffset::new(start)) }
}

const M: u64 = 1 << 20;
const EXTENT: u64 = 4096;

#[test]
fn a_disk_without_labels_has_no_lvm() {
    assert_eq!(Disk3::new(1).read(), Lvm::default());
    let mut small = Disk3 { bytes: vec![0; 700], read: 0 };
    let whole = places(None, small.size());
    assert_eq!(read(&mut small, &whole).unwrap(), Lvm::default());
}

#[test]
fn what_is_on_the_whole_of_a_disk_with_partitions_is_passed_over() {
    let mut disk = single("");
    let found = |disk: &mut Disk3| {
        let table = crate::partition::read(disk).unwrap();
        let places = places(table.as_ref(), disk.size());
        (places.len(), read(disk, &places).unwrap().groups.len())
    };
    assert_eq!(found(&mut disk), (1, 1));
    // A boot record without partitions, then one with two, of which one is out of the disk.
    disk.bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert_eq!(found(&mut disk), (1, 1));
    disk.bytes[450] = 0x8e;
    disk.bytes[454..462].copy_from_slice(&[0, 8, 0, 0, 0, 8, 0, 0]);
    disk.bytes[466] = 0x8e;
    disk.bytes[470..478].copy_from_slice(&[0, 16, 0, 0, 0, 0x40, 0, 0]);
    assert_eq!(found(&mut disk), (1, 0));
    // The physical volume of the first partition.
    let volume = single("").bytes[..MIB].to_vec();
    disk.bytes[MIB..2 * MIB].copy_from_slice(&volume);
    assert_eq!(found(&mut disk), (1, 1));
}

#[test]
fn linear_segments_become_pieces_and_are_joined_where_they_go_on() {
    let logical = logical_text(
        "root",
        &[
            &linear_text(8, 4, "pv0", 100),
            &linear_text(0, 4, "pv0", 20),
            &linear_text(4, 4, "pv0", 24),
        ],
    );
    let lvm = single(&logical).read();
    assert_eq!(lvm.warnings, []);
    let (group, volume) = lvm.find("vg/root").unwrap();
    assert_eq!((group.seqno, group.extent_sectors, volume.extents), (1, 8, 12));
    assert_eq!(group.size_of(volume).get(), 12 * EXTENT);
    assert_eq!(group.uuid, "GRPGRP-0000-0000-0000-0000-0000-vg0000");
    assert_eq!(lvm.physical_volumes[0].uuid, FIRST);
    assert_eq!(lvm.physical_volumes[0].group, Some(0));
    let expected = [linear(M + 20 * EXTENT, 8 * EXTENT), linear(M + 100 * EXTENT, 4 * EXTENT)];
    assert_eq!(group.pieces(volume).unwrap(), expected);
}

#[test]
fn striped_segments_lie_on_several_volumes() {
    let striped = "start_extent = 0\nextent_count = 4\ntype = \"striped\"\nstripe_count = 2\n\
                   stripe_size = 4\nstripes = [\n\"pv0\", 1,\n\"pv1\", 3\n]";
    let text = group_text("vg", 1, &[FIRST, SECOND], &logical_text("s", &[striped]));
    let mut disk = Disk3::new(2);
    put_label(disk.volume(0), FIRST, &[AREA]);
    put_area(disk.volume(0), AREA, AREA_HEADER, &text);
    // The other one keeps no metadata.
    put_label(disk.volume(1), SECOND, &[]);
    let lvm = disk.read();
    let stripes = vec![GuestOffset::new(M + EXTENT), GuestOffset::new(4 * M + 3 * EXTENT)];
    let source = PieceSource::Striped { chunk: ByteLen::new(2048), stripes };
    assert_eq!(pieces(&lvm, "vg/s").unwrap(), [Piece { length: ByteLen::new(4 * EXTENT), source }]);
    assert_eq!(lvm.physical_volumes[1].group, Some(0));

    // Without it the volume is named.
    disk.volume(1).fill(0);
    let error = pieces(&disk.read(), "vg/s").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFound(_)));
    let text = error.to_string();
    for part in ["vg/s", "pv1", SECOND, "/dev/sd1", "not on this disk"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn the_text_goes_round_the_end_of_its_area() {
    let text = group_text("vg", 7, &[FIRST], &logical_text("a", &[&linear_text(0, 1, "pv0", 0)]));
    for before_end in [1, 2, 512, text.len(), text.len() + 1] {
        let mut disk = Disk3::new(1);
        put_label(disk.volume(0), FIRST, &[AREA]);
        put_area(disk.volume(0), AREA, AREA.1 - before_end, &text);
        let lvm = disk.read();
        assert_eq!((lvm.warnings.as_slice(), lvm.groups[0].seqno), (&[][..], 7), "{before_end}");
    }
}

#[test]
fn the_newest_metadata_of_all_areas_wins() {
    let text = |seqno, name| {
        let logical = logical_text(name, &[&linear_text(0, 1, "pv0", 0)]);
        group_text("vg", seqno, &[FIRST, SECOND], &logical)
    };
    let mut disk = Disk3::new(2);
    put_label(disk.volume(0), FIRST, &[AREA, OTHER_AREA]);
    put_area(disk.volume(0), AREA, AREA_HEADER, &text(4, "old"));
    put_area(disk.volume(0), OTHER_AREA, AREA_HEADER, &text(9, "new"));
    put_label(disk.volume(1), SECOND, &[AREA]);
    put_area(disk.volume(1), AREA, AREA_HEADER, &text(5, "middle"));
    let lvm = disk.read();
    assert_eq!((lvm.groups.len(), lvm.groups[0].seqno), (1, 9));
    assert!(lvm.find("vg/new").is_ok());
    // One that LVM keeps out of use is not looked at.
    let newer = text(10, "newer");
    put_area(disk.volume(1), AREA, AREA_HEADER, &newer);
    let newer = [newer.as_bytes(), b"\0"].concat();
    put_area_header(disk.volume(1), AREA, AREA_HEADER, &newer, 1);
    assert_eq!(disk.read().groups[0].seqno, 9);
    put_area_header(disk.volume(1), AREA, AREA_HEADER, &newer, 0);
    assert_eq!(disk.read().groups[0].seqno, 10);
}

#[test]
fn a_damaged_area_is_said_and_the_other_one_is_taken() {
    let text = group_text("vg", 3, &[FIRST], "");
    let mut sound = Disk3::new(1);
    put_label(sound.volume(0), FIRST, &[AREA, OTHER_AREA]);
    for area in [AREA, OTHER_AREA] {
        put_area(sound.volume(0), area, AREA_HEADER, &text);
    }
    for (at, fault) in
        [(AREA_AT + 50, Fault::HeaderChecksum), (AREA_AT + AREA_HEADER + 30, Fault::TextChecksum)]
    {
        let mut disk = Disk3 { bytes: sound.bytes.clone(), read: 0 };
        disk.bytes[at] ^= 1;
        let lvm = disk.read();
        let at = GuestOffset::new(AREA_AT as u64);
        assert_eq!(lvm.warnings, [Warning::MetadataArea { at, fault }]);
        assert_eq!(lvm.groups.len(), 1);
    }
    // Checksums that are right, over nonsense.
    let nonsense = b"vg {\n}\0";
    for (text_at, text, fault) in [
        (AREA_HEADER, &b"vg {\nid = \n}\0"[..], Fault::Syntax { line: 3 }),
        (AREA_HEADER, &nonsense[..], Fault::Field("contents")),
        (8, &nonsense[..], Fault::Header),
        (AREA.1, &nonsense[..], Fault::Header),
    ] {
        let mut disk = Disk3 { bytes: sound.bytes.clone(), read: 0 };
        disk.volume(0)[AREA_AT + text_at..][..text.len()].copy_from_slice(text);
        put_area_header(disk.volume(0), AREA, text_at, text, 0);
        let lvm = disk.read();
        let at = GuestOffset::new(AREA_AT as u64);
        assert_eq!(lvm.warnings, [Warning::MetadataArea { at, fault }]);
        assert_eq!(lvm.groups.len(), 1);
    }
    // An area that reaches out of its volume.
    let mut disk = Disk3 { bytes: sound.bytes.clone(), read: 0 };
    put_area_header(disk.volume(0), (AREA_AT, VOLUME), AREA_HEADER, nonsense, 0);
    put_label(disk.volume(0), FIRST, &[AREA, (VOLUME - 100, 1 << 20)]);
    let lvm = disk.read();
    let faults: Vec<_> = lvm
        .warnings
        .iter()
        .map(|warning| match warning {
            Warning::MetadataArea { fault, .. } => *fault,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(faults, [Fault::OutOfVolume, Fault::OutOfVolume]);
    assert_eq!(lvm.physical_volumes[0].group, None);
}

#[test]
fn what_cannot_be_read_of_a_volume_is_said_and_what_else_there_is_is_taken() {
    let text = group_text("vg", 1, &[FIRST], &logical_text("a", &[]));
    let mut disk = Disk3::new(2);
    put_label(disk.volume(1), FIRST, &[AREA, OTHER_AREA]);
    put_area(disk.volume(1), AREA, AREA_HEADER, &text);
    put_area(disk.volume(1), OTHER_AREA, AREA_HEADER, &text);
    let (places, start) = ([place(0), place(1)], VOLUME as u64);
    let broken = || ErrorKind::Io("a broken sector".to_owned());
    let unreadable = |at| Fault::Unreadable(GuestOffset::new(at));
    // A sector of the other place where a label could be: nobody knows.
    let lvm = read(&mut Holed(&mut disk, 700, broken()), &places).unwrap();
    assert_eq!(lvm.groups.len(), 1);
    assert_eq!(lvm.warnings, [Warning::Label { at: GuestOffset::ZERO, fault: unreadable(512) }]);
    // One before the label, which is found.
    let lvm = read(&mut Holed(&mut disk, start, broken()), &places).unwrap();
    assert_eq!((lvm.groups.len(), &lvm.warnings[..]), (1, &[][..]));
    // The header of an area, and its text: the other area is read.
    for (byte, said) in [(AREA_AT, AREA_AT), (AREA_AT + 520, AREA_AT + AREA_HEADER)] {
        let lvm = read(&mut Holed(&mut disk, start + byte as u64, broken()), &places).unwrap();
        assert_eq!(lvm.groups.len(), 1);
        let at = GuestOffset::new(start + AREA_AT as u64);
        let fault = unreadable(start + said as u64);
        assert_eq!(lvm.warnings, [Warning::MetadataArea { at, fault }]);
    }
    let lvm = read(&mut Holed(&mut disk, start + 512, broken()), &places).unwrap();
    let error = lvm.find("vg/a").unwrap_err().to_string();
    assert!(error.contains("not known") && error.contains("can't be read"), "{error}");
    let signal = ErrorKind::Interrupted(15);
    let error = read(&mut Holed(&mut disk, 700, signal.clone()), &places).unwrap_err();
    assert_eq!(error.kind(), &signal);
}

#[test]
fn a_label_with_a_wrong_checksum_or_a_known_uuid_is_passed_over() {
    let mut disk = Disk3::new(2);
    let text = group_text("vg", 1, &[FIRST], "");
    for index in 0..2 {
        put_label(disk.volume(index), FIRST, &[AREA]);
        put_area(disk.volume(index), AREA, AREA_HEADER, &text);
    }
    let lvm = disk.read();
    let at = place(1).start;
    assert_eq!(lvm.warnings, [Warning::Duplicate { at, uuid: FIRST.to_owned() }]);
    assert_eq!(lvm.groups[0].physical_volumes[0].place, Some(place(0)));
    disk.volume(1)[600] ^= 1;
    let fault = Fault::LabelChecksum;
    assert_eq!(disk.read().warnings, [Warning::Label { at, fault }]);
}

#[test]
fn what_only_lvm_can_put_together_is_refused_by_its_type() {
    let thin = "start_extent = 0\nextent_count = 9\ntype = \"thin\"\nthin_pool = \"pool\"";
    let moved = linear_text(0, 1, "pvmove0", 0);
    let snapshot = "start_extent = 0\nextent_count = 1\ntype = \"snapshot\"\nchunk_size = 8\n\
                    origin = \"origin\"\ncow_store = \"cow\"";
    let merge = "start_extent = 0\nextent_count = 1\ntype = \"snapshot\"\nchunk_size = 8\n\
                 origin = \"merged\"\nmerging_store = \"merging\"";
    let one = linear_text(0, 1, "pv0", 0);
    let logical = [
        logical_text("thin", &[thin]),
        logical_text("moved", &[&moved]),
        logical_text("origin", &[&one]),
        logical_text("cow", &[&one]).replace(", \"VISIBLE\"", ""),
        logical_text("merged", &[&one]),
        logical_text("merging", &[&one]),
        logical_text("snapshot0", &[snapshot]),
        logical_text("snapshot1", &[merge]),
    ]
    .concat();
    let lvm = single(&logical).read();
    assert_eq!(lvm.warnings, []);
    for (name, kind) in [
        ("thin", "'thin'"),
        ("moved", "'striped over a logical volume'"),
        ("cow", "'snapshot'"),
        ("merged", "'snapshot'"),
        ("merging", "'snapshot'"),
    ] {
        let error = pieces(&lvm, &format!("vg/{name}")).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::NotRepresentable(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains(&format!("vg/{name}")) && text.contains(kind), "{text}");
    }
    assert!(pieces(&lvm, "vg/origin").is_ok());
    // As LVM shows them.
    let visible = lvm.groups[0].logical_volumes.iter().filter(|volume| volume.is_visible);
    let visible: Vec<_> = visible.map(|volume| volume.name.as_str()).collect();
    assert_eq!(visible, ["thin", "moved", "origin", "cow", "merged", "merging"]);
}

#[test]
fn segments_that_point_out_of_their_volume_are_damage() {
    let striped = |count: u32, chunk: u32| {
        format!(
            "start_extent = 0\nextent_count = {count}\ntype = \"striped\"\nstripe_count = 2\n\
             stripe_size = {chunk}\nstripes = [\"pv0\", 0, \"pv0\", 10]"
        )
    };
    for segment in [
        linear_text(0, 1, "pv0", 512),
        linear_text(0, 513, "pv0", 0),
        linear_text(0, u32::MAX, "pv0", 0),
        linear_text(0, 1, "pv0", u32::MAX),
        striped(3, 8),
        striped(2, 16),
    ] {
        let lvm = single(&logical_text("a", &[&segment])).read();
        let error = pieces(&lvm, "vg/a").unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::InvalidImage(_)), "{error}: {segment}");
    }
    // Inside of the extents that the metadata counts, but not of the partition.
    let text = group_text("vg", 1, &[FIRST], "").replace("pe_start = 2048", "pe_start = 2056");
    let text = text.replace(
        "logical_volumes {\n",
        &format!("logical_volumes {{\n{}", logical_text("a", &[&linear_text(0, 512, "pv0", 0)])),
    );
    let mut disk = single("");
    put_area(disk.volume(0), AREA, AREA_HEADER, &text);
    let error = pieces(&disk.read(), "vg/a").unwrap_err().to_string();
    assert!(error.contains("partition"), "{error}");
}

#[test]
fn texts_that_contradict_themselves_are_no_groups() {
    let good = group_text(
        "vg",
        1,
        &[FIRST],
        &logical_text("a", &[&linear_text(0, 2, "pv0", 0), &linear_text(2, 2, "pv0", 4)]),
    );
    assert!(VolumeGroup::parse(&good).is_ok());
    for (from, to, field) in [
        ("extent_size = 8", "extent_size = 0", "extent_size"),
        ("extent_size = 8", "extent_size = 99999999999", "extent_size"),
        ("extent_size = 8", "extent_size = -8", "extent_size"),
        ("version = 1", "version = 2", "version"),
        ("seqno = 1", "", "seqno"),
        ("pe_start = 2048", "pe_start = \"x\"", "pe_start"),
        ("start_extent = 2", "start_extent = 1", "start_extent"),
        ("start_extent = 2", "start_extent = 3", "start_extent"),
        ("extent_count = 2", "extent_count = 0", "start_extent"),
        ("stripe_count = 1", "stripe_count = 2", "stripe_count"),
        ("\"pv0\", 4", "\"pv0\"", "stripe_count"),
        ("\"pv0\", 4", "", "stripe_count"),
        ("\"pv0\", 4", "4, \"pv0\"", "stripes"),
        ("\"pv0\", 4", "\"pv0\", -1", "stripes"),
    ] {
        assert!(good.contains(from), "{from}");
        let fault = VolumeGroup::parse(&good.replace(from, to)).unwrap_err();
        assert_eq!(fault, Fault::Field(field), "{from} -> {to}");
    }
    assert_eq!(
        VolumeGroup::parse("contents = \"Text Format Volume Group\"\nversion = 1\n"),
        Err(Fault::NoGroup)
    );
}

#[test]
fn a_volume_that_was_missing_is_not_read_from() {
    let text = group_text("vg", 1, &[FIRST], &logical_text("a", &[&linear_text(0, 1, "pv0", 0)]))
        .replacen(
            "status = [\"ALLOCATABLE\"]\nflags = []",
            "status = []\nflags = [\"MISSING\"]",
            1,
        );
    let mut disk = single("");
    put_area(disk.volume(0), AREA, AREA_HEADER, &text);
    let error = pieces(&disk.read(), "vg/a").unwrap_err().to_string();
    assert!(error.contains("is old"), "{error}");
}

#[test]
fn what_is_not_there_is_said_with_what_is() {
    let one = linear_text(0, 1, "pv0", 0);
    let hidden = logical_text("hidden", &[&one]).replace(", \"VISIBLE\"", "");
    let logical = [logical_text("a", &[&one]), logical_text("b", &[&one]), hidden].concat();
    let lvm = single(&logical).read();
    let error = lvm.find("vg/c").unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::NotFound(_)));
    let text = error.to_string();
    assert!(text.contains("'vg/c'") && text.ends_with("it has vg/a, vg/b"), "{text}");
    assert!(lvm.find("vg/hidden").is_ok());
    for name in ["vg", "", "/", "vg/", "/a"] {
        assert!(matches!(lvm.find(name).unwrap_err().kind(), ErrorKind::Usage(_)), "{name}");
    }
    let nothing = Lvm::default().find("vg/c").unwrap_err().to_string();
    assert!(nothing.contains("no physical volume"), "{nothing}");

    // Two groups of one name: neither is meant.
    let mut disk = Disk3::new(2);
    let text = group_text("vg", 1, &[FIRST], &logical_text("a", &[&one]));
    let other =
        group_text("vg", 1, &[SECOND], &logical_text("a", &[&one])).replace("GRPGRP", "OTHERS");
    for (index, (uuid, text)) in [(FIRST, text), (SECOND, other)].into_iter().enumerate() {
        put_label(disk.volume(index), uuid, &[AREA]);
        put_area(disk.volume(index), AREA, AREA_HEADER, &text);
    }
    let lvm = disk.read();
    assert_eq!(lvm.groups.len(), 2);
    assert!(matches!(lvm.find("vg/a").unwrap_err().kind(), ErrorKind::Usage(_)));
}

/// The header of an area with so much text.
fn claim(volume: &mut [u8], area: (usize, usize), size: usize) {
    put_area_header(volume, area, AREA_HEADER, b"", 0);
    let header = &mut volume[area.0..][..AREA_HEADER];
    header[48..56].copy_from_slice(&(size as u64).to_le_bytes());
    let sum = checksum(&header[4..]);
    header[..4].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn areas_without_end_are_read_within_bounds() {
    // As many areas as a label has room for, each of which claims as much text as it may,
    // none of it the same.
    let mut disk = Disk3 { bytes: vec![b' '; 20 << 20], read: 0 };
    let areas: Vec<_> = (0..24).map(|index| (AREA_AT + index * 512, 17 << 20)).collect();
    put_label(&mut disk.bytes, FIRST, &areas);
    for (index, area) in areas.iter().enumerate() {
        claim(&mut disk.bytes, *area, (16 << 20) - index);
    }
    let whole = GuestRange::new(GuestOffset::ZERO, GuestOffset::new(20 << 20));
    let lvm = read(&mut disk, &[whole]).unwrap();
    assert_eq!(lvm.warnings.len(), 24);
    assert!(disk.read <= MAX_TOTAL_TEXT + (1 << 20), "{}", disk.read);
    let too_large = |warning: &&Warning| {
        matches!(warning, Warning::MetadataArea { fault: Fault::TotalTooLarge, .. })
    };
    assert_eq!(lvm.warnings.iter().filter(too_large).count(), 20);
}

#[test]
fn no_byte_that_is_changed_makes_it_panic() {
    let logical = logical_text("a", &[&linear_text(0, 2, "pv0", 0)]);
    let sound = single(&logical).bytes;
    let text_end = AREA_AT + AREA_HEADER + group_text("vg", 1, &[FIRST], &logical).len();
    let mut disk = Disk3 { bytes: sound.clone(), read: 0 };
    let range = AREA_AT + AREA_HEADER..text_end;
    for (round, at) in range.clone().enumerate() {
        // With checksums that are right again: what is behind them is looked at.
        disk.bytes.copy_from_slice(&sound);
        disk.bytes[at] = b"{}[]=\"#0\0\xff"[round % 10];
        let text = disk.bytes[range.start..=range.end].to_vec();
        put_area_header(disk.volume(0), AREA, AREA_HEADER, &text, 0);
        let lvm = disk.read();
        for group in &lvm.groups {
            for volume in &group.logical_volumes {
                let _ = group.pieces(volume);
            }
        }
    }
}
