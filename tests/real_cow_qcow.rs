//! cow and qcow images against the programs that write and read them: `uml_mkcow` and
//! `uml_moo` of Debian's uml-utilities, and QEMU's `qemu-img` and `qemu-io`.
//!
//! A program that is not installed is a failure: `make test` installs them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use imgdm::format::cow::{CowImage, CowLayout};
use imgdm::format::qcow::QcowImage;
use imgdm::format::{BackingIdentity, Format, ImageFormat, Scratch};
use imgdm::source::Source;
use imgdm::status::{BlockStatus, StatusRun};
use imgdm::units::{ByteLen, GuestOffset, GuestRange, HostOffset};

/// Numbers that are the same in every run (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % limit
    }
}

/// Runs a program to its end.
fn program<S: AsRef<OsStr>>(name: &str, arguments: &[S]) -> Vec<u8> {
    let output = Command::new(name).args(arguments).output().unwrap_or_else(|error| {
        panic!("{name} can't be run ('scripts/setup test' installs it): {error}")
    });
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}: {errors}");
    output.stdout
}

fn open_source(path: &Path) -> Arc<Source> {
    Arc::new(Source::open(path).unwrap())
}

/// The status of the whole disk, asked for in pieces of `step` bytes.
fn status(image: &dyn ImageFormat, step: u64) -> Vec<StatusRun> {
    let mut scratch = Scratch::default();
    let mut runs = Vec::new();
    let end = image.virtual_size().get();
    let mut at = 0;
    while at < end {
        let next = (at + step).min(end);
        let range = GuestRange::new(GuestOffset::new(at), GuestOffset::new(next));
        image.status(range, &mut scratch, &mut runs).unwrap();
        at = next;
    }
    runs
}

fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// The disk as an overlay and the bytes of its backing file give it.
fn read_disk(image: &dyn ImageFormat, file: &Source, backing: &[u8]) -> Vec<u8> {
    let mut disk = backing.to_vec();
    disk.resize(index(image.virtual_size().get()), 0);
    for run in status(image, 1 << 20) {
        let part = &mut disk[index(run.start.get())..index(run.end().get())];
        match run.status {
            BlockStatus::Data(place) => {
                file.read_up_to(place.offset, part).unwrap();
            }
            BlockStatus::Unallocated(None) => {}
            other => panic!("a cow image says {other:?}"),
        }
    }
    disk
}

fn random_bytes(random: &mut Random, length: usize) -> Vec<u8> {
    (0..length).map(|_| u8::try_from(random.below(256)).unwrap()).collect()
}

/// Writes random sectors into a cow file: their data, and their bits.
fn scribble(file: &fs::File, bitmap: u64, data: u64, sectors: u64, random: &mut Random) {
    let mut bits = vec![0_u8; index(sectors.div_ceil(8))];
    for _ in 0..60 {
        let first = random.below(sectors);
        let count = (1 + random.below(40)).min(sectors - first);
        for sector in first..first + count {
            bits[index(sector / 8)] |= 1 << (sector % 8);
            file.write_all_at(&random_bytes(random, 512), data + sector * 512).unwrap();
        }
    }
    file.write_all_at(&bits, bitmap).unwrap();
}

/// What `uml_moo` makes of a cow file and its backing file.
fn merged(cow: &Path, backing: &Path) -> Vec<u8> {
    let out = cow.with_extension("merged");
    program("uml_moo", &[OsStr::new("-b"), backing.as_ref(), cow.as_ref(), out.as_ref()]);
    fs::read(out).unwrap()
}

#[test]
fn an_image_of_uml_mkcow_is_read_and_merges_as_uml_moo_merges_it() {
    let directory = tempfile::tempdir().unwrap();
    let backing = directory.path().join("base.img");
    let cow = directory.path().join("a.cow");
    let mut random = Random(1);
    // The size is no multiple of 8 sectors, nor of what one bitmap word covers.
    let base = random_bytes(&mut random, 2003 * 512);
    fs::write(&backing, &base).unwrap();
    program("uml_mkcow", &[&cow, &backing]);

    let source = open_source(&cow);
    let mut start = [0; 512];
    source.read_up_to(HostOffset::ZERO, &mut start).unwrap();
    assert_eq!(Format::probe(&start), Format::Cow);
    let image = CowImage::open(Arc::clone(&source)).unwrap();
    assert_eq!(image.header().layout(), CowLayout::UmlV3);
    assert_eq!(image.virtual_size(), ByteLen::new(2003 * 512));
    let reference = image.backing().unwrap();
    assert_eq!(Path::new(OsStr::from_bytes(&reference.name)), backing);
    assert_eq!(reference.format.as_deref(), Some("raw"));
    let modified = u32::try_from(fs::metadata(&backing).unwrap().mtime()).unwrap();
    let size = Some(ByteLen::new(2003 * 512));
    assert_eq!(reference.expected, Some(BackingIdentity { modified, size }));
    assert_eq!(read_disk(&image, &source, &base), base, "nothing is written yet");

    // From the definition: the bitmap at the next multiple of 4096 after 4128 bytes, 251
    // bytes long, the data at the next one after that.
    let file = fs::OpenOptions::new().write(true).open(&cow).unwrap();
    scribble(&file, 8192, 12288, 2003, &mut random);
    let disk = read_disk(&image, &source, &base);
    assert_ne!(disk, base);
    assert!(disk == merged(&cow, &backing), "uml_moo reads it differently");
}

#[test]
fn a_backing_size_that_is_no_multiple_of_512_is_recorded_to_the_byte() {
    let directory = tempfile::tempdir().unwrap();
    let (backing, cow) = (directory.path().join("b"), directory.path().join("c"));
    fs::write(&backing, [7; 1000]).unwrap();
    program("uml_mkcow", &[&cow, &backing]);
    let image = CowImage::open(open_source(&cow)).unwrap();
    let size = image.backing().unwrap().expected.unwrap().size;
    assert_eq!(size, Some(ByteLen::new(1000)));
    assert_eq!(image.virtual_size(), ByteLen::new(1024));
}

/// A cow file of an older layout, written by its definition; its disk is a multiple of
/// 8 sectors long.
fn old_layout(layout: CowLayout, backing: &Path) -> (Vec<u8>, u64, u64) {
    let metadata = fs::metadata(backing).unwrap();
    let modified = u32::try_from(metadata.mtime()).unwrap();
    let size = metadata.len();
    let name = backing.as_os_str().as_bytes();
    let (mut file, bitmap, data);
    let put = |file: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    };
    match layout {
        CowLayout::UmlV1LittleEndian => {
            bitmap = 280;
            data = (bitmap + size / 4096).next_multiple_of(512);
            file = vec![0; index(data)];
            put(&mut file, 0, b"MOOO\x01\0\0\0");
            put(&mut file, 8, name);
            put(&mut file, 264, &modified.to_le_bytes());
            put(&mut file, 268, &size.to_le_bytes());
            put(&mut file, 276, &512_u32.to_le_bytes());
        }
        CowLayout::UmlV2 => {
            bitmap = 4120;
            data = (bitmap + size / 4096).next_multiple_of(512);
            file = vec![0; index(data)];
            put(&mut file, 0, b"OOOM\0\0\0\x02");
            put(&mut file, 8, name);
            put(&mut file, 4104, &modified.to_be_bytes());
            put(&mut file, 4108, &size.to_be_bytes());
            put(&mut file, 4116, &512_u32.to_be_bytes());
        }
        CowLayout::UmlV3Misaligned => {
            bitmap = 8192;
            data = (bitmap + size / 4096).next_multiple_of(4096);
            file = vec![0; index(data)];
            put(&mut file, 0, b"OOOM\0\0\0\x03");
            put(&mut file, 8, &modified.to_be_bytes());
            put(&mut file, 16, &size.to_be_bytes());
            put(&mut file, 24, &512_u32.to_be_bytes());
            put(&mut file, 28, &4096_u32.to_be_bytes());
            put(&mut file, 36, name);
        }
        other => panic!("{other} is no layout of this test"),
    }
    (file, bitmap, data)
}

// What uml_moo can't be asked: version 1 of a big-endian host (it takes the fields for the
// own host's), QEMU's version 2 (it knows User-Mode Linux's only, and no QEMU since 2.3
// reads cow), sectors past a bitmap of versions 1 and 2, which is rounded down to whole
// bytes (it looks at memory past its buffer).
#[test]
fn older_layouts_merge_as_uml_moo_merges_them() {
    for layout in [CowLayout::UmlV1LittleEndian, CowLayout::UmlV2, CowLayout::UmlV3Misaligned] {
        for (seed, sectors) in [(1, 8), (2, 4096), (3, 1864), (4, 3904)] {
            let directory = tempfile::tempdir().unwrap();
            let backing = directory.path().join("base.img");
            let cow = directory.path().join("a.cow");
            let mut random = Random(seed);
            let base = random_bytes(&mut random, index(sectors * 512));
            fs::write(&backing, &base).unwrap();
            let (header, bitmap, data) = old_layout(layout, &backing);
            fs::write(&cow, header).unwrap();
            let file = fs::OpenOptions::new().write(true).open(&cow).unwrap();
            file.set_len(data + sectors * 512).unwrap();
            scribble(&file, bitmap, data, sectors, &mut random);

            let source = open_source(&cow);
            let image = CowImage::open(Arc::clone(&source)).unwrap();
            assert_eq!(image.header().layout(), layout);
            let expected = image.backing().unwrap().expected.unwrap();
            let modified = fs::metadata(&backing).unwrap().mtime();
            assert_eq!(i64::from(expected.modified), modified);
            assert_eq!(expected.size, Some(ByteLen::new(sectors * 512)));
            let disk = read_disk(&image, &source, &base);
            assert_ne!(disk, base);
            assert!(
                disk == merged(&cow, &backing),
                "{layout}, {sectors} sectors: uml_moo reads it differently"
            );
        }
    }
}

/// What `qemu-img map` tells apart in one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sector {
    Unallocated,
    Data {
        offset: u64,
    },
    Compressed,
    /// Data with no offset that is not compressed.
    Encrypted,
}

/// The sectors of an image, by `qemu-img map --output=json` at depth 0.
fn map_of_qemu(arguments: &[&str]) -> Vec<Sector> {
    let mut all = vec!["map", "--output=json"];
    all.extend(arguments);
    let json = program("qemu-img", &all);
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&json).unwrap();
    let mut sectors = Vec::new();
    for row in rows {
        let number = |key: &str| row[key].as_u64().unwrap();
        let (start, length) = (number("start"), number("length"));
        assert_eq!((start, length % 512), (sectors.len() as u64 * 512, 0));
        let answers = row["depth"] == 0 && row["present"] == true;
        for distance in (0..length).step_by(512) {
            sectors.push(match row["offset"].as_u64() {
                _ if !answers => Sector::Unallocated,
                _ if row["compressed"] == true => Sector::Compressed,
                Some(offset) => Sector::Data { offset: offset + distance },
                None => Sector::Encrypted,
            });
        }
    }
    sectors
}

/// The sectors of an image, by its own status.
fn map_of_status(image: &dyn ImageFormat, step: u64) -> Vec<Sector> {
    let mut sectors = Vec::new();
    for run in status(image, step) {
        assert_eq!(run.start.get(), sectors.len() as u64 * 512);
        for distance in (0..run.length.get()).step_by(512) {
            sectors.push(match run.status {
                BlockStatus::Data(place) => Sector::Data { offset: place.offset.get() + distance },
                BlockStatus::Unallocated(None) => Sector::Unallocated,
                BlockStatus::Compressed { .. } => Sector::Compressed,
                BlockStatus::Encrypted { .. } => Sector::Encrypted,
                other => panic!("a qcow image says {other:?}"),
            });
        }
    }
    sectors
}

/// Commands for `qemu-io` that write at random into a disk of `size` bytes.
fn random_writes(random: &mut Random, size: u64, cluster: u64, compress: bool) -> Vec<String> {
    let mut commands = Vec::new();
    for number in 0..25 {
        let pattern = 1 + number;
        let mut push = |command| commands.extend(["-c".to_owned(), command]);
        if compress && random.below(3) == 0 {
            let at = random.below(size / cluster - 1) * cluster;
            push(format!("write -c -P {pattern} {at} {cluster}"));
        } else {
            let at = random.below(size / 512 - 1) * 512;
            let length = (512 * (1 + random.below(60))).min(size - at);
            push(format!("write -P {pattern} {at} {length}"));
        }
    }
    commands
}

#[test]
fn the_status_of_random_qcow_images_is_what_qemu_img_maps() {
    for seed in 1..=8 {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        let (image_path, base) = (path("a.qcow"), path("base.img"));
        let mut random = Random(seed);
        let with_backing = seed % 2 == 0;
        let size = (1 + random.below(40_000)) * 512 + (1 << 20);
        let mut create = vec!["create", "-q", "-f", "qcow"];
        // QEMU makes clusters of 4096 bytes, and of 512 where there is a backing file.
        let cluster = if with_backing {
            fs::write(&base, vec![0x55; index(size)]).unwrap();
            create.extend(["-b", "base.img", "-F", "raw"]);
            512
        } else {
            4096
        };
        let size_argument = size.to_string();
        create.extend([&*image_path, &*size_argument]);
        program("qemu-img", &create);
        let mut arguments = vec!["-f".to_owned(), "qcow".to_owned()];
        arguments.extend(random_writes(&mut random, size, cluster, true));
        arguments.push(image_path.clone());
        program("qemu-io", &arguments);

        let source = open_source(Path::new(&image_path));
        let image = QcowImage::open(Arc::clone(&source)).unwrap();
        assert_eq!(image.virtual_size(), ByteLen::new(size));
        assert_eq!(image.granularity(), cluster);
        let backing = image.backing().map(|backing| backing.name.as_slice());
        assert_eq!(backing, with_backing.then_some(b"base.img".as_slice()));
        let qemu = map_of_qemu(&["-f", "qcow", &image_path]);
        for step in [1 << 40, 1 << 20, 12345 * 512] {
            assert!(map_of_status(&image, step) == qemu, "seed {seed}, pieces of {step} bytes");
        }
        assert!(qemu.contains(&Sector::Compressed));

        let raw = path("a.raw");
        program("qemu-img", &["convert", "-f", "qcow", "-O", "raw", &image_path, &raw]);
        let disk = fs::read(raw).unwrap();
        let mut compared = 0;
        for run in status(&image, 1 << 40) {
            let expected = &disk[index(run.start.get())..index(run.end().get())];
            match run.status {
                BlockStatus::Data(place) => {
                    let mut bytes = vec![0; expected.len()];
                    source.read_up_to(place.offset, &mut bytes).unwrap();
                    assert!(bytes == expected, "seed {seed}: {run:?}");
                    compared += bytes.len();
                }
                BlockStatus::Compressed { host, stream_length, .. } => {
                    assert!(!stream_length.is_zero());
                    assert!(host.get() + stream_length.get() <= source.length().get());
                }
                _ => {}
            }
        }
        assert!(compared > 0);
    }
}

#[test]
fn an_encrypted_qcow_image_is_encrypted_where_qemu_maps_data() {
    let directory = tempfile::tempdir().unwrap();
    let image_path = directory.path().join("a.qcow").to_str().unwrap().to_owned();
    let secret = "secret,id=key,data=secret";
    let options = "encrypt.format=aes,encrypt.key-secret=key";
    let size = 3 << 20;
    let size_argument = size.to_string();
    let create = [
        "create",
        "-q",
        "--object",
        secret,
        "-f",
        "qcow",
        "-o",
        options,
        &image_path,
        &size_argument,
    ];
    program("qemu-img", &create);
    let opened = format!("driver=qcow,encrypt.key-secret=key,file.filename={image_path}");
    let mut arguments = vec!["--object".to_owned(), secret.to_owned(), "--image-opts".to_owned()];
    arguments.extend(random_writes(&mut Random(9), size, 4096, false));
    arguments.push(opened.clone());
    program("qemu-io", &arguments);
    let image = QcowImage::open(open_source(Path::new(&image_path))).unwrap();
    let qemu = map_of_qemu(&["--object", secret, "--image-opts", &opened]);
    assert!(map_of_status(&image, 1 << 40) == qemu);
    assert!(qemu.contains(&Sector::Encrypted) && qemu.contains(&Sector::Unallocated));
}

#[test]
fn a_qcow_size_is_cut_to_sectors_as_qemu_cuts_it() {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("a.qcow");
    let name = path.to_str().unwrap();
    program("qemu-img", &["create", "-q", "-f", "qcow", name, "2M"]);
    for size in [999_999_u64, 1_000_448, 513, 1023] {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&size.to_be_bytes(), 24).unwrap();
        let info = program("qemu-img", &["info", "--output=json", "-f", "qcow", name]);
        let info: serde_json::Value = serde_json::from_slice(&info).unwrap();
        let image = QcowImage::open(open_source(&path)).unwrap();
        assert_eq!(Some(image.virtual_size().get()), info["virtual-size"].as_u64(), "{size}");
    }
}
