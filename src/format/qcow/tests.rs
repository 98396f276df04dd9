use proptest::prelude::*;

use super::*;

/// An image written field by field from the format's definition.
#[derive(Clone, Debug)]
struct Builder {
    header: [u8; QcowHeader::LENGTH],
    file: Vec<u8>,
}

impl Builder {
    /// 64 KiB disk, clusters of 512 bytes, L2 tables of 64 entries (one maps 32 KiB);
    /// the L1 table of two entries at 4096, nothing allocated.
    fn new() -> Self {
        let mut builder = Self { header: [0; 48], file: vec![0; 8192] };
        builder.set(0, b"QFI\xfb");
        builder.set(4, &1_u32.to_be_bytes());
        builder.set(24, &65536_u64.to_be_bytes());
        builder.set(32, &[9, 6]);
        builder.set(40, &4096_u64.to_be_bytes());
        builder
    }

    fn set(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.header[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        if self.file.len() < at + bytes.len() {
            self.file.resize(at + bytes.len(), 0);
        }
        self.file[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    fn parse(&self) -> Result<QcowHeader> {
        QcowHeader::parse(&self.header)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut file = self.file.clone();
        file[..48].copy_from_slice(&self.header);
        file
    }

    fn open(&self) -> Result<QcowImage> {
        QcowImage::open(Arc::new(Source::from_bytes("a.qcow", self.bytes())))
    }
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
}

fn status_of(image: &QcowImage, range: GuestRange) -> Result<Vec<StatusRun>> {
    let mut runs = Vec::new();
    image.status(range, &mut Scratch::default(), &mut runs)?;
    Ok(runs)
}

fn data(offset: u64) -> BlockStatus {
    BlockStatus::Data(HostPlace::in_image(HostOffset::new(offset)))
}

fn run(start: u64, length: u64, status: BlockStatus) -> StatusRun {
    StatusRun { start: GuestOffset::new(start), length: ByteLen::new(length), status }
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>, offset: u64, message: &str) {
    let error = result.expect_err("it must be refused");
    assert_eq!(error.offset(), Some(offset), "{error}");
    assert!(error.to_string().contains(message), "{error}");
}

#[test]
fn every_header_field_is_read_from_its_place() {
    let mut builder = Builder::new();
    builder
        .set(8, &0x1122_u64.to_be_bytes())
        .set(16, &7_u32.to_be_bytes())
        .set(20, &0xdead_beef_u32.to_be_bytes())
        .set(24, &(1_u64 << 40).to_be_bytes())
        .set(32, &[12, 9])
        .set(34, &[0xff, 0xff])
        .set(36, &1_u32.to_be_bytes())
        .set(40, &0x3000_u64.to_be_bytes());
    let header = builder.parse().unwrap();
    assert_eq!(header.backing_file_offset(), HostOffset::new(0x1122));
    assert_eq!(header.backing_file_size(), 7);
    assert_eq!(header.mtime(), 0xdead_beef);
    assert_eq!(header.size(), ByteLen::new(1 << 40));
    assert_eq!((header.cluster_size(), header.l2_entries()), (4096, 512));
    assert_eq!(header.crypt_method(), Some(Encryption::Aes));
    assert_eq!(header.l1_table_offset(), HostOffset::new(0x3000));
    assert_eq!(header.l1_entries(), 1 << 19);
}

#[test]
fn a_header_cut_short_anywhere_is_refused() {
    let header = Builder::new().header;
    for length in 0..header.len() {
        assert_refused(QcowHeader::parse(&header[..length]), 0, "takes 48 bytes");
        let source = Source::from_bytes("a.qcow", header[..length].to_vec());
        assert_refused(QcowImage::open(Arc::new(source)), 0, "a.qcow: ");
    }
}

#[test]
fn fields_outside_of_their_limits_are_refused_with_their_offset() {
    let refused = |at: usize, bytes: &[u8], message| {
        assert_refused(Builder::new().set(at, bytes).parse(), at as u64, message);
    };
    refused(0, b"QFI\xfa", "magic 0x514649fa");
    refused(4, &[0, 0, 0, 0], "version 0");
    refused(4, &[0, 0, 0, 3], "that is qcow2");
    refused(24, &[0; 8], "less than 2");
    refused(24, &1_u64.to_be_bytes(), "less than 2");
    refused(24, &[0xff; 8], "needs an L1 table");
    refused(32, &[8], "cluster_bits 8");
    refused(32, &[17], "cluster_bits 17");
    refused(32, &[255], "cluster_bits 255");
    refused(33, &[5], "l2_bits 5");
    refused(33, &[14], "l2_bits 14");
    refused(36, &[0, 0, 0, 2], "crypt_method 2");
    refused(36, &[1, 0, 0, 0], "crypt_method 16777216");
    refused(40, &[0xff; 8], "past 2^63");
    refused(40, &(i64::MAX as u64 - 15).to_be_bytes(), "past 2^63");
}

#[test]
fn the_l1_table_is_bounded_as_in_qemu() {
    // One entry maps 32 KiB, and INT_MAX / 8 entries are the most.
    let most = 0x0fff_ffff_u64 << 15;
    let header = Builder::new().set(24, &most.to_be_bytes()).parse().unwrap();
    assert_eq!(header.l1_entries(), 0x0fff_ffff);
    assert_refused(
        Builder::new().set(24, &(most + 1).to_be_bytes()).parse(),
        24,
        "more than 0xfffffff",
    );
}

#[test]
fn a_long_backing_name_counts_only_where_there_is_a_name() {
    let mut builder = Builder::new();
    builder.set(16, &1024_u32.to_be_bytes());
    assert!(builder.parse().is_ok());
    builder.set(8, &48_u64.to_be_bytes());
    assert_refused(builder.parse(), 16, "1024 bytes is longer than 1023");
    builder.set(16, &1023_u32.to_be_bytes());
    assert!(builder.parse().is_ok());
}

#[test]
fn the_virtual_size_leaves_a_part_of_a_sector_off() {
    for (size, virtual_size) in [(2_u64, 0), (511, 0), (513, 512), (65535, 65024), (65536, 65536)] {
        let image = Builder::new().set(24, &size.to_be_bytes()).open().unwrap();
        assert_eq!(image.virtual_size(), ByteLen::new(virtual_size), "{size}");
    }
}

#[test]
fn the_backing_name_is_a_c_string_without_a_format() {
    let mut builder = Builder::new();
    assert_eq!(builder.open().unwrap().backing(), None);
    builder.set(8, &100_u64.to_be_bytes()).set(16, &9_u32.to_be_bytes());
    assert_eq!(builder.open().unwrap().backing(), None, "an empty name is none");
    builder.put(100, b"base\x01.img");
    let backing = builder.open().unwrap().backing().cloned().unwrap();
    assert_eq!(backing.name, b"base\x01.img");
    assert_eq!((backing.format, backing.expected), (None, None));
    builder.put(104, b"\0");
    assert_eq!(builder.open().unwrap().backing().unwrap().name, b"base");
}

#[test]
fn metadata_outside_of_the_file_is_refused_when_it_is_opened() {
    let mut builder = Builder::new();
    builder.set(40, &8184_u64.to_be_bytes());
    assert_refused(builder.open(), 8184, "the L1 table (16 bytes) lies outside the file");
    builder.set(40, &8176_u64.to_be_bytes());
    assert!(builder.open().is_ok());
    for offset in [8191_u64, 1 << 40, u64::MAX] {
        builder.set(8, &offset.to_be_bytes()).set(16, &2_u32.to_be_bytes());
        assert_refused(builder.open(), offset, "the backing file's name (2 bytes) lies outside");
    }
}

#[test]
fn entries_become_runs_and_contiguous_clusters_one_run() {
    let mut builder = Builder::new();
    builder.put(4096 + 8, &8192_u64.to_be_bytes());
    let compressed = OFLAG_COMPRESSED | (77 << (63 - 9)) | 0x0012_3457;
    for (index, entry) in [0, 0x2000, 0x2200, 0x2600, compressed, compressed].iter().enumerate() {
        builder.put(8192 + index * 8, &u64::to_be_bytes(*entry));
    }
    builder.put(8192 + 63 * 8, &0x8000_u64.to_be_bytes());
    let image = builder.open().unwrap();
    let inflated = |cluster| BlockStatus::Compressed {
        host: HostOffset::new(0x0012_3457),
        stream_length: ByteLen::new(77),
        cluster: GuestOffset::new(cluster),
    };
    let nothing = BlockStatus::Unallocated(None);
    let all = status_of(&image, range(0, 65536)).unwrap();
    assert_eq!(
        all,
        [
            run(0, 0x8200, nothing),
            run(0x8200, 0x400, data(0x2000)),
            run(0x8600, 0x200, data(0x2600)),
            run(0x8800, 0x200, inflated(0x8800)),
            run(0x8a00, 0x200, inflated(0x8a00)),
            run(0x8c00, 57 * 512, nothing),
            run(0xfe00, 0x200, data(0x8000)),
        ]
    );
    // A part of it, that starts and ends inside of clusters.
    assert_eq!(
        status_of(&image, range(0x8300, 0x8900)).unwrap(),
        [
            run(0x8300, 0x300, data(0x2100)),
            run(0x8600, 0x200, data(0x2600)),
            run(0x8800, 0x100, inflated(0x8800)),
        ]
    );
    assert_eq!(status_of(&image, range(0x8300, 0x8300)).unwrap(), []);
}

#[test]
fn data_of_an_encrypted_image_is_encrypted_and_its_compressed_clusters_are_not() {
    let mut builder = Builder::new();
    builder.set(36, &1_u32.to_be_bytes()).put(4096, &8192_u64.to_be_bytes());
    builder.put(8192, &0x4000_u64.to_be_bytes()).put(8200, &0x4200_u64.to_be_bytes());
    builder.put(8208, &OFLAG_COMPRESSED.to_be_bytes()).put(8192 + 511, &[0]);
    let runs = status_of(&builder.open().unwrap(), range(0, 1536)).unwrap();
    let place = HostPlace::in_image(HostOffset::new(0x4000));
    assert_eq!(runs[0], run(0, 1024, BlockStatus::Encrypted { place, cipher: Encryption::Aes }));
    assert!(matches!(runs[1].status, BlockStatus::Compressed { .. }));
}

#[test]
fn an_l2_table_outside_of_the_file_is_refused_and_only_where_it_is_asked_for() {
    for offset in [8192_u64 - 511, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX, u64::MAX - 511] {
        let image = Builder::new().put(4096 + 8, &offset.to_be_bytes()).open().unwrap();
        assert_eq!(
            status_of(&image, range(0, 32768)).unwrap(),
            [run(0, 32768, BlockStatus::Unallocated(None))]
        );
        let message = "an L2 table (512 bytes) lies outside the file, which is 8192 bytes long";
        assert_refused(status_of(&image, range(0, 65536)), offset, message);
        // The other end of the range does not matter: a table is in the file or is not.
        assert_refused(status_of(&image, range(32768, 33280)), offset, message);
    }
}

#[test]
fn a_cluster_that_no_file_can_hold_is_refused_with_the_place_of_its_entry() {
    for entry in [i64::MAX as u64, (1 << 63) - 511] {
        let mut builder = Builder::new();
        builder.put(4096, &8192_u64.to_be_bytes()).put(8192 + 511, &[0]);
        builder.put(8192 + 24, &entry.to_be_bytes());
        let image = builder.open().unwrap();
        assert_refused(status_of(&image, range(1024, 2048)), 8192 + 24, "guest offset 0x600");
    }
}

/// The runs of the first `end` bytes, and the ranges that damage spoils.
fn past_damage(builder: &Builder, end: u64) -> (Vec<StatusRun>, Vec<GuestRange>) {
    let source = Source::from_bytes("a.qcow", builder.bytes());
    let image = QcowImage::open_past_damage(Arc::new(source)).unwrap();
    let mut scratch = Scratch { damage: Some(DamageList::default()), ..Scratch::default() };
    let mut runs = Vec::new();
    image.status(range(0, end), &mut scratch, &mut runs).unwrap();
    let found = scratch.damage.unwrap();
    (runs, found.listed().iter().map(|damage| damage.range).collect())
}

#[test]
fn past_damage_each_range_that_is_spoiled_is_listed() {
    const NONE: BlockStatus = BlockStatus::Unallocated(None);
    let damaged = |from| BlockStatus::Damaged { from: GuestOffset::new(from) };
    let bad_entry = (i64::MAX as u64).to_be_bytes();
    let mut builder = Builder::new();
    builder.put(4096, &8192_u64.to_be_bytes()).put(8192 + 511, &[0]);
    builder.put(8192 + 24, &bad_entry).put(4096 + 8, &(1_u64 << 40).to_be_bytes());
    let (runs, spoiled) = past_damage(&builder, 65536);
    assert_eq!(
        runs,
        [
            run(0, 1536, NONE),
            run(1536, 512, damaged(1536)),
            run(2048, 32768 - 2048, NONE),
            run(32768, 32768, damaged(32768))
        ]
    );
    assert_eq!(spoiled, [range(1536, 2048), range(32768, 65536)]);
    // QEMU reads no cluster that starts inside of a sector.
    builder.put(8192 + 24, &0x3001_u64.to_be_bytes()).put(4096 + 8, &[0; 8]);
    assert_eq!(past_damage(&builder, 65536).1, [range(1536, 2048)]);
    // An L1 table of which one entry is in the file, and one of which none is.
    let mut builder = Builder::new();
    builder.set(40, &8184_u64.to_be_bytes());
    assert_eq!(past_damage(&builder, 65536).1, [range(32768, 65536)]);
    assert_eq!(past_damage(&builder, 40000).1, [range(32768, 65536)]);
    assert_eq!(past_damage(&builder, 32768).1, []);
    builder.set(40, &(1_u64 << 40).to_be_bytes());
    assert_eq!(past_damage(&builder, 512).1, [range(0, 65536)]);
}

#[test]
fn a_huge_sparse_disk_needs_no_more_memory_than_a_small_one() {
    // 4 GiB of a disk whose L1 entries map 32 KiB each.
    let mut builder = Builder::new();
    builder.set(24, &(4_u64 << 30).to_be_bytes()).put(4096 + (1 << 20) - 1, &[0]);
    let image = builder.open().unwrap();
    let mut scratch = Scratch::default();
    let mut runs = Vec::new();
    image.status(range(0, 4 << 30), &mut scratch, &mut runs).unwrap();
    assert_eq!(runs, [run(0, 4 << 30, BlockStatus::Unallocated(None))]);
    assert!(scratch.table.len() <= 68 << 10, "{}", scratch.table.len());
}

/// What one byte of the disk is, by the specification alone.
fn model(file: &[u8], cluster_bits: u32, l2_bits: u32, at: u64) -> BlockStatus {
    let entry = |offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        u64::from_be_bytes(file[offset..offset + 8].try_into().unwrap())
    };
    let l2_table = entry(4096 + (at >> (cluster_bits + l2_bits)) * 8);
    if l2_table == 0 {
        return BlockStatus::Unallocated(None);
    }
    let in_cluster = at % (1 << cluster_bits);
    let value = entry(l2_table + (at >> cluster_bits) % (1 << l2_bits) * 8);
    match value {
        0 => BlockStatus::Unallocated(None),
        _ if value >> 63 == 1 => BlockStatus::Compressed {
            host: HostOffset::new(value & ((1 << (63 - cluster_bits)) - 1)),
            stream_length: ByteLen::new(value >> (63 - cluster_bits) & ((1 << cluster_bits) - 1)),
            cluster: GuestOffset::new(at - in_cluster),
        },
        _ => data(value + in_cluster),
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_header_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = QcowHeader::parse(&bytes);
    }

    #[test]
    fn no_image_makes_the_reader_panic(
        fields in prop::collection::vec((8_usize..48, any::<u8>()), 0..6),
        tables in prop::collection::vec((4096_usize..9000, any::<u8>()), 0..200),
    ) {
        let mut builder = Builder::new();
        for (at, byte) in fields {
            builder.set(at, &[byte]);
        }
        for (at, byte) in tables {
            builder.put(at, &[byte]);
        }
        if let Ok(image) = builder.open() {
            let end = image.virtual_size().get().min(1 << 22);
            if let Ok(runs) = status_of(&image, range(0, end)) {
                let mut at = 0;
                for run in runs {
                    prop_assert_eq!(run.start.get(), at);
                    prop_assert!(!run.length.is_zero());
                    at = run.end().get();
                }
                prop_assert_eq!(at, end);
            }
        }
    }

    #[test]
    fn runs_agree_with_a_reading_sector_by_sector(
        cluster_bits in 9_u32..=12,
        l2_bits in 6_u32..=7,
        entries in prop::collection::vec(
            prop_oneof![
                3 => Just(0_u64),
                4 => (1_u64..40).prop_map(|n| n * 4096),
                4 => Just(1_u64), // the one before, carried on
                1 => (1_u64..1 << 31).prop_map(|sector| sector << 9),
                1 => any::<u64>().prop_map(|n| n | OFLAG_COMPRESSED),
            ],
            1..400,
        ),
        tables in prop::collection::vec(prop::bool::weighted(0.8), 8),
        (from, to) in (0_u64..400, 0_u64..400),
    ) {
        let cluster = 1_u64 << cluster_bits;
        let mut builder = Builder::new();
        let size = entries.len() as u64 * cluster;
        let bits = [u8::try_from(cluster_bits).unwrap(), u8::try_from(l2_bits).unwrap()];
        builder.set(24, &size.to_be_bytes()).set(32, &bits);
        let l2_length = 8_usize << l2_bits;
        let mut last = 0;
        for (index, &entry) in entries.iter().enumerate() {
            let table = index >> l2_bits;
            let table_at = 8192 + table * l2_length;
            builder.put(table_at + l2_length - 1, &[]);
            if tables[table] {
                builder.put(4096 + table * 8, &(table_at as u64).to_be_bytes());
            }
            let entry = match entry {
                1 if last >> 63 == 0 && last != 0 => last + cluster,
                1 => cluster,
                entry => entry,
            };
            last = entry;
            builder.put(table_at + (index % (1 << l2_bits)) * 8, &entry.to_be_bytes());
        }
        let tables_end = 8192 + 8 * l2_length;
        builder.put(tables_end, &[0]);
        let image = builder.open().unwrap();
        let file = builder.bytes();
        let (start, end) = (from.min(to) * 512, from.max(to) * 512);
        let (start, end) = (start.min(size), end.min(size));
        let runs = status_of(&image, range(start, end)).unwrap();
        let mut at = start;
        for (index, run) in runs.iter().enumerate() {
            prop_assert_eq!(run.start.get(), at);
            let mut distance = 0;
            while distance < run.length.get() {
                let expected = model(&file, cluster_bits, l2_bits, at + distance);
                prop_assert_eq!(run.status.advanced(ByteLen::new(distance)), expected);
                distance += 512;
            }
            at = run.end().get();
            if let Some(next) = runs.get(index + 1) {
                prop_assert_ne!(run.status.advanced(run.length), next.status, "not coalesced");
            }
        }
        prop_assert_eq!(at, end);
    }
}
