//! What the writers of images lay out, as QEMU reads it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgdm::convert::compress::Compressor;
use imgdm::convert::create::{DataFile, NewImage, StoredBacking};
use imgdm::convert::options::FormatOptions;
use imgdm::convert::qcow::QcowWriter;
use imgdm::convert::qcow2::Qcow2Writer;
use imgdm::convert::{ImageWriter, Placed};
use imgdm::format::Format;
use imgdm::format::qcow2::Compression;
use imgdm::units::{ByteLen, GuestOffset, GuestRange};
use serde_json::Value;

use crate::common::images::scratch_dir;
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::imgdm;
use crate::random::setting;

/// What a part of the disk is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Backing,
    Zeros,
    Data,
    Compressed,
}

/// A disk to be written.
struct Disk {
    format: Format,
    options: String,
    size: u64,
    /// The raw backing file's bytes.
    backing: Option<Vec<u8>>,
    pieces: Vec<(GuestRange, Kind)>,
    /// What the disk is to be.
    bytes: Vec<u8>,
}

fn range(start: u64, end: u64) -> GuestRange {
    GuestRange::new(GuestOffset::new(start), GuestOffset::new(end))
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

fn new_file(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap()
}

impl Disk {
    fn parsed(&self) -> FormatOptions {
        FormatOptions::parse(self.format, &[&self.options]).unwrap()
    }

    /// The writer's word of the smallest part, and of a cluster.
    fn shape(&self) -> (u64, u64) {
        match self.parsed() {
            FormatOptions::Qcow2(options) => (options.granularity(), options.cluster_size()),
            _ if self.backing.is_some() => (512, 512),
            _ => (4096, 4096),
        }
    }

    fn method(&self) -> Compression {
        match self.parsed() {
            FormatOptions::Qcow2(options) => options.compression(),
            _ => Compression::Zlib,
        }
    }

    /// Draws what is where.
    fn draw(&mut self, rng: &mut Rng, kinds: &[Kind]) {
        let (granularity, cluster) = self.shape();
        self.bytes = self.backing.clone().unwrap_or_default();
        self.bytes.resize(at(self.size), 0);
        let mut start = 0;
        while start < self.size {
            let kind = *rng.pick(kinds);
            let unit = if kind == Kind::Compressed { cluster } else { granularity };
            if kind == Kind::Compressed && start % cluster != 0 {
                start = self.piece(rng, start, granularity, Kind::Backing);
                continue;
            }
            let most = if rng.percent(10) { 200 } else { 5 };
            start = self.piece(rng, start, rng.clone().range(1, most) * unit, kind);
        }
    }

    fn piece(&mut self, rng: &mut Rng, start: u64, length: u64, kind: Kind) -> u64 {
        let end = self.size.min(start + length);
        self.pieces.push((range(start, end), kind));
        let bytes = &mut self.bytes[at(start)..at(end)];
        match kind {
            Kind::Backing => {}
            Kind::Zeros => bytes.fill(0),
            Kind::Data => rng.fill(bytes),
            Kind::Compressed => {
                // Streams of all lengths; some clusters become no shorter.
                for sector in bytes.chunks_mut(512) {
                    let random = at(rng.below(520)).min(sector.len());
                    rng.fill(&mut sector[..random]);
                    sector[random..].fill(0x5a);
                }
            }
        }
        let _ = rng.next();
        end
    }

    /// Writes it as `image`, with its files beside.
    fn write(&self, dir: &Path, image: &str) {
        let file = new_file(&dir.join(image));
        let options = self.parsed();
        let data_file = options.data_file().map(|name| new_file(&dir.join(name)));
        let backing = self.backing.as_ref().map(|bytes| {
            fs::write(dir.join("base"), bytes).unwrap();
            StoredBacking { name: b"base".to_vec(), format: Some(Format::Raw) }
        });
        let new = NewImage {
            file: &file,
            data_file: data_file.as_ref().map(|file| DataFile { file, name: Path::new("data") }),
            size: ByteLen::new(self.size),
            backing: backing.as_ref(),
        };
        let mut writer: Box<dyn ImageWriter> = match &options {
            FormatOptions::Qcow2(options) => Box::new(Qcow2Writer::new(&new, options).unwrap()),
            _ => Box::new(QcowWriter::new(&new).unwrap()),
        };
        let mut compressor = Compressor::new(self.method()).unwrap();
        for &(range, kind) in &self.pieces {
            if kind == Kind::Data && range.start.get() % 3 == 0 {
                writer.pass_over(range.start).unwrap();
            }
            match kind {
                Kind::Backing => {}
                Kind::Zeros if writer.has_zeros() => writer.zeros(range).unwrap(),
                Kind::Zeros | Kind::Data => self.write_data(&mut *writer, range),
                Kind::Compressed => self.write_compressed(&mut *writer, range, &mut compressor),
            }
        }
        writer.finish().unwrap();
    }

    fn write_data(&self, writer: &mut dyn ImageWriter, range: GuestRange) {
        let mut placed = Vec::new();
        writer.data(range, &mut placed).unwrap();
        let mut next = range.start;
        for Placed { range, offset } in placed {
            assert_eq!(range.start, next);
            next = range.end;
            let bytes = &self.bytes[at(range.start.get())..at(range.end.get())];
            writer.data_file().write_all_at(bytes, offset.get()).unwrap();
        }
        assert_eq!(next, range.end);
    }

    fn write_compressed(
        &self,
        writer: &mut dyn ImageWriter,
        whole: GuestRange,
        compressor: &mut Compressor,
    ) {
        let size = writer.cluster_size();
        for start in (whole.start.get()..whole.end.get()).step_by(at(size)) {
            let end = whole.end.get().min(start + size);
            let mut cluster = self.bytes[at(start)..at(end)].to_vec();
            cluster.resize(at(size), 0);
            match compressor.compress(&cluster).unwrap() {
                Some(stream) => {
                    let place = writer.compressed(GuestOffset::new(start), stream.len()).unwrap();
                    writer.data_file().write_all_at(stream, place.get()).unwrap();
                }
                None => self.write_data(writer, range(start, end)),
            }
        }
    }

    /// QEMU finds nothing wrong, reads the disk, and sees what is whose.
    fn check(&self, dir: &Path, image: &str) -> Outcome {
        let format = self.format.name();
        if self.format == Format::Qcow2 {
            qemu::img(dir, &["check", "-q", "-f", format, image])?;
        }
        imgdm(dir, &["check", "-f", format, image])?.ok()?;
        qemu::img(dir, &["convert", "-f", format, "-O", "raw", image, "copy"])?;
        let copy = fs::read(dir.join("copy")).map_err(|error| error.to_string())?;
        if copy.len() != self.bytes.len() {
            return Err(format!("{} bytes, and not {}", copy.len(), self.bytes.len()));
        }
        if let Some(differs) = (0..copy.len()).find(|&i| copy[i] != self.bytes[i]) {
            return Err(format!("byte {differs:#x} differs"));
        }
        let map = qemu::img(dir, &["map", "--output=json", "-f", format, image])?;
        let ours = imgdm(dir, &["map", "--output=json", "-f", format, image])?.ok()?;
        let map: Value = serde_json::from_slice(&map.stdout).map_err(|error| error.to_string())?;
        let ours: Value =
            serde_json::from_slice(&ours.stdout).map_err(|error| error.to_string())?;
        if ours.as_array().map(Vec::len) != map.as_array().map(Vec::len) {
            return Err(format!("maps differ:\n{map}\n{ours}"));
        }
        self.check_map(map.as_array().unwrap())
    }

    /// QEMU goes on writing to it, and still finds nothing wrong.
    fn write_on(&self, dir: &Path, image: &str, rng: &mut Rng) -> Outcome {
        let sectors = self.size / 512;
        let writes: Vec<String> = (0..6)
            .map(|i| {
                let start = rng.below(sectors);
                let length = rng.range(1, (sectors - start).min(600));
                let what = if i % 3 == 2 { "-z" } else { "-P 9" };
                format!("write {what} {} {}", start * 512, length * 512)
            })
            .collect();
        qemu::io(dir, self.format.name(), image, &writes)?;
        qemu::img(dir, &["check", "-q", "-f", self.format.name(), image]).map(|_| ())
    }

    fn check_map(&self, map: &[Value]) -> Outcome {
        let preallocated = ["prealloc", "data_file_raw"].iter().any(|o| self.options.contains(o));
        for &(range, kind) in &self.pieces {
            for row in map {
                let number = |field: &str| row[field].as_u64().unwrap();
                let start = number("start").max(range.start.get());
                let end = (number("start") + number("length")).min(range.end.get());
                if start >= end {
                    continue;
                }
                let flag = |field: &str| row[field].as_bool().unwrap();
                let hides = number("depth") == 0 && flag("present");
                let right = match kind {
                    Kind::Data | Kind::Compressed => hides && flag("data"),
                    _ if preallocated => true,
                    Kind::Zeros if self.backing.is_none() => flag("zero") && !flag("data"),
                    // As data, where there are no zero clusters.
                    Kind::Zeros => hides,
                    Kind::Backing => {
                        !hides && (self.backing.is_none() || number("depth") == 1 || flag("zero"))
                    }
                };
                if !right {
                    return Err(format!("{kind:?} at {start:#x} is {row}"));
                }
            }
        }
        Ok(())
    }
}

const NO_STREAMS: &[Kind] = &[Kind::Backing, Kind::Zeros, Kind::Data, Kind::Data];
const ALL: &[Kind] = &[Kind::Backing, Kind::Zeros, Kind::Data, Kind::Compressed, Kind::Compressed];

fn draw_options(rng: &mut Rng) -> (String, u64, bool, bool) {
    let v2 = rng.percent(15);
    let mut bits = rng.range(9, 21);
    let mut options = Vec::new();
    let (mut streams, mut backing) = (true, rng.percent(60));
    if v2 {
        options.push("compat=v2".to_owned());
    } else {
        if rng.percent(30) {
            bits = bits.max(14);
            options.push("extended_l2=on".to_owned());
        }
        if rng.percent(60) {
            options.push(format!("refcount_bits={}", 1 << rng.below(7)));
        }
        if rng.percent(30) {
            options.push("compression_type=zstd".to_owned());
        }
        if rng.percent(20) {
            options.push("lazy_refcounts".to_owned());
        }
        if rng.percent(20) {
            options.push("data_file=the,,data".to_owned());
            streams = false;
            if rng.percent(50) {
                options.push("data_file_raw=on".to_owned());
                backing = false;
            }
        }
    }
    options.push(format!("cluster_size={}", 1u64 << bits));
    if rng.percent(20) && (!backing || options.iter().any(|option| option == "extended_l2=on")) {
        let mode = rng.pick(&["metadata", "falloc", "full"]);
        options.push(format!("preallocation={mode}"));
        streams = false;
    }
    (options.join(","), bits, streams, backing)
}

fn run_cases(name: &str, cases: u64, one: impl Fn(&Path, &mut Rng) -> (String, Outcome)) {
    let seed = setting("IMGDM_SEED").unwrap_or(0x0069_6d67_646d);
    let cases = setting("IMGDM_CASES").unwrap_or(cases);
    let range = setting("IMGDM_CASE").map_or(0..cases, |case| case..case + 1);
    for case in range {
        let dir = scratch_dir("writers").unwrap();
        let (what, outcome) = one(dir.path(), &mut Rng::for_case(seed, name, case));
        if let Err(error) = outcome {
            let kept = dir.keep();
            panic!(
                "IMGDM_SEED={seed:#x} IMGDM_CASE={case} ({what}) in {}: {error}",
                kept.display()
            );
        }
    }
}

#[test]
fn qcow2_images_of_all_shapes_are_clean_and_hold_what_was_written() {
    run_cases("qcow2", 70, |dir, rng| {
        let (options, bits, streams, backing) = draw_options(rng);
        // Several L2 tables and refcount blocks, where clusters are small.
        let most = (1u64 << 23).min(1 << (bits + 10)) / 512;
        let size = rng.range(1, most) * 512;
        let backing = backing.then(|| {
            let mut bytes = vec![0; at(rng.range(1, size / 512 + 20) * 512)];
            rng.fill(&mut bytes);
            bytes
        });
        let what = format!("{size} bytes, -o {options}, backing: {}", backing.is_some());
        let mut disk = Disk {
            format: Format::Qcow2,
            options,
            size,
            backing,
            pieces: Vec::new(),
            bytes: Vec::new(),
        };
        disk.draw(rng, if streams { ALL } else { NO_STREAMS });
        disk.write(dir, "x.qcow2");
        let outcome = disk.check(dir, "x.qcow2");
        (what, outcome.and_then(|()| disk.write_on(dir, "x.qcow2", rng)))
    });
}

#[test]
fn qcow_images_hold_what_was_written() {
    run_cases("qcow", 20, |dir, rng| {
        let size = rng.range(1, 12_000) * 512;
        let backing = rng.percent(50).then(|| {
            let mut bytes = vec![0; at(rng.range(1, size / 512 + 20) * 512)];
            rng.fill(&mut bytes);
            bytes
        });
        let what = format!("{size} bytes, backing: {}", backing.is_some());
        let mut disk = Disk {
            format: Format::Qcow,
            options: String::new(),
            size,
            backing,
            pieces: Vec::new(),
            bytes: Vec::new(),
        };
        disk.draw(rng, ALL);
        disk.write(dir, "x.qcow");
        (what, disk.check(dir, "x.qcow"))
    });
}

/// A disk of these pieces, over no backing file.
fn disk_of(options: &str, size: u64, pieces: &[(u64, u64, Kind)]) -> Disk {
    let mut disk = Disk {
        format: Format::Qcow2,
        options: options.to_owned(),
        size,
        backing: None,
        pieces: Vec::new(),
        bytes: vec![0; at(size)],
    };
    let mut rng = Rng::new(7);
    for &(start, end, kind) in pieces {
        disk.piece(&mut rng, start, end - start, kind);
    }
    disk
}

/// A map's rows but for the offsets; neighbours that are alike are one.
fn rows(dir: &Path, image: &str) -> Vec<(u64, u64, String)> {
    let map = qemu::img(dir, &["map", "--output=json", "-f", "qcow2", image]).unwrap();
    let map: Value = serde_json::from_slice(&map.stdout).unwrap();
    let mut rows: Vec<(u64, u64, String)> = Vec::new();
    for row in map.as_array().unwrap() {
        let start = row["start"].as_u64().unwrap();
        let end = start + row["length"].as_u64().unwrap();
        let has_offset = row["offset"].is_u64();
        let what = format!(
            "depth {} present {} zero {} data {} offset {has_offset}",
            row["depth"], row["present"], row["zero"], row["data"]
        );
        match rows.last_mut() {
            Some(last) if last.2 == what => last.1 = end,
            _ => rows.push((start, end, what)),
        }
    }
    rows
}

#[test]
fn preallocated_images_map_as_those_of_qemu_img() {
    const SIZE: u64 = 5 << 20;
    let pieces = [(0x10_0000, 0x18_0000, Kind::Data), (0x40_0000, 0x41_0000, Kind::Data)];
    for mode in ["metadata", "falloc", "full"] {
        for more in [
            "cluster_size=64k",
            "cluster_size=4k",
            "cluster_size=4k,compat=v2",
            "extended_l2=on,cluster_size=32k",
            "cluster_size=4k,data_file=data",
            "cluster_size=64k,data_file=data,data_file_raw=on",
        ] {
            let dir = scratch_dir("preallocated").unwrap();
            let dir = dir.path();
            let options = format!("preallocation={mode},{more}");
            let disk = disk_of(&options, SIZE, &pieces);
            disk.write(dir, "ours.qcow2");
            disk.check(dir, "ours.qcow2").unwrap();
            if more.contains("data_file_raw") {
                assert!(fs::read(dir.join("data")).unwrap() == disk.bytes);
            }
            let allocated = |file: &str| {
                use std::os::unix::fs::MetadataExt;
                fs::metadata(dir.join(file)).unwrap().blocks() * 512
            };
            let holder = if more.contains("data_file") { "data" } else { "ours.qcow2" };
            assert_eq!(allocated(holder) >= SIZE, mode != "metadata", "{options}");

            let raw = new_file(&dir.join("disk.raw"));
            raw.set_len(SIZE).unwrap();
            for &(start, end, _) in &pieces {
                raw.write_all_at(&disk.bytes[at(start)..at(end)], start).unwrap();
            }
            let theirs = options.replace("=data", "=their-data");
            let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", &theirs];
            qemu::img(dir, &[&convert[..], &["disk.raw", "theirs.qcow2"]].concat()).unwrap();
            assert_eq!(rows(dir, "ours.qcow2"), rows(dir, "theirs.qcow2"), "{options}");
        }
    }
}

#[test]
fn the_first_cluster_is_the_one_that_qemu_img_writes() {
    for options in [
        "",
        "compat=v2",
        "cluster_size=4k",
        "cluster_size=8k,refcount_bits=1",
        "cluster_size=2M,extended_l2=on,lazy_refcounts=on,refcount_bits=64",
        "compression_type=zstd",
        "data_file=data",
        "data_file=data,data_file_raw=on",
    ] {
        for backing in [None, Some(b"base".to_vec())] {
            if backing.is_some() && options.contains("raw") {
                continue;
            }
            let dir = scratch_dir("header").unwrap();
            let dir = dir.path();
            let mut disk = disk_of(options, 3 << 20, &[]);
            disk.backing = backing.clone();
            disk.write(dir, "ours.qcow2");
            let create = ["create", "-q", "-f", "qcow2", "-o", options];
            let over: &[&str] = if backing.is_some() { &["-b", "base", "-F", "raw"] } else { &[] };
            let create =
                [if options.is_empty() { &create[..4] } else { &create[..] }, over].concat();
            let mut theirs = [&create[..], &["theirs.qcow2", "3M"]].concat();
            theirs.retain(|argument| !argument.is_empty());
            qemu::img(dir, &theirs).unwrap();
            let first = |image: &str| {
                let mut bytes = fs::read(dir.join(image)).unwrap();
                bytes.truncate(at(match disk.parsed() {
                    FormatOptions::Qcow2(options) => options.cluster_size(),
                    _ => 0,
                }));
                // Where the L1 and the refcount table are is each one's own affair.
                bytes[40..60].fill(0);
                bytes
            };
            assert!(first("ours.qcow2") == first("theirs.qcow2"), "-o {options} {backing:?}");
        }
    }
}

#[test]
fn compressed_images_are_no_larger_than_those_of_qemu_img() {
    const SIZE: u64 = 8 << 20;
    for options in
        ["", "cluster_size=4k", "cluster_size=4k,refcount_bits=1", "compression_type=zstd"]
    {
        let dir = scratch_dir("packed").unwrap();
        let dir = dir.path();
        let disk = disk_of(options, SIZE, &[(0, SIZE, Kind::Compressed)]);
        disk.write(dir, "ours.qcow2");
        disk.check(dir, "ours.qcow2").unwrap();
        fs::write(dir.join("disk.raw"), &disk.bytes).unwrap();
        let mut convert = vec!["convert", "-c", "-f", "raw", "-O", "qcow2"];
        if !options.is_empty() {
            convert.extend(["-o", options]);
        }
        convert.extend(["disk.raw", "theirs.qcow2"]);
        qemu::img(dir, &convert).unwrap();
        let length = |image: &str| fs::metadata(dir.join(image)).unwrap().len();
        let (ours, theirs) = (length("ours.qcow2"), length("theirs.qcow2"));
        assert!(ours <= theirs + theirs / 50 + 0x2_0000, "-o {options}: {ours} and {theirs} bytes");
    }
}

#[test]
fn a_disk_of_many_terabytes_with_little_in_it_takes_little() {
    const TERABYTE: u64 = 1 << 40;
    let dir = scratch_dir("sparse").unwrap();
    let file = new_file(&dir.path().join("x.qcow2"));
    fs::write(dir.path().join("base"), [0; 512]).unwrap();
    let backing = StoredBacking { name: b"base".to_vec(), format: Some(Format::Raw) };
    let size = 64 * TERABYTE;
    let new = NewImage {
        file: &file,
        data_file: None,
        size: ByteLen::new(size),
        backing: Some(&backing),
    };
    let FormatOptions::Qcow2(options) = FormatOptions::parse::<&str>(Format::Qcow2, &[]).unwrap()
    else {
        panic!("not qcow2");
    };
    let mut writer = Qcow2Writer::new(&new, &options).unwrap();
    let mut placed = Vec::new();
    for terabyte in 0..64 {
        let start = terabyte * TERABYTE;
        writer.data(range(start, start + 0x1_0000), &mut placed).unwrap();
        writer.zeros(range(start + 0x1_0000, start + 0x100_0000)).unwrap();
    }
    writer.zeros(range(size - 0x1_0000, size)).unwrap();
    writer.finish().unwrap();
    for place in placed {
        file.write_all_at(&[7; 0x1_0000], place.offset.get()).unwrap();
    }
    assert!(file.metadata().unwrap().len() < 32 << 20);
    let read = format!("read -P 7 {} 64k", 63 * TERABYTE);
    qemu::img(dir.path(), &["check", "-q", "-f", "qcow2", "x.qcow2"]).unwrap();
    qemu::io(dir.path(), "qcow2", "x.qcow2", &[read]).unwrap();
}
