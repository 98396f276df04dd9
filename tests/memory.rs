//! Hostile headers, and what they make each command take at most: peak memory of the whole
//! process, as the kernel counts it (`ru_maxrss`), below a named limit for each command.
//!
//! The files claim all that their formats can, and are sparse: a few KiB on disk that say they
//! are terabytes.

// Helpers outside of #[test] functions fail a test by panicking too.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::resource::{UsageWho, getrusage};

const MIB: u64 = 1 << 20;

/// A program that does next to nothing, with the threads of this machine.
const BASE: u64 = 32;
/// An L1 table at its largest (32 MiB), as it is in the file, as numbers, and in the order of
/// what its entries name.
const LARGEST_L1: u64 = 32 * 4;
/// A snapshot table or a bitmap directory at its largest, as it is and taken apart.
const LARGEST_TABLE: u64 = 64 * 3;
/// Parts of clusters and pieces in order (`imgdm::metadata`).
const METADATA: u64 = 96 + 40;
/// LVM's metadata at its largest, 16 MiB, as bytes and as a text, and what it is taken apart
/// to: a million entries and a million values.
const LARGEST_LVM: u64 = 16 * 2 + 40 + 24 + 64;

/// Seconds of all processors together that a command may take on such a file, unoptimised.
const SECONDS: i64 = 40;

/// The name of this test program's own variable: the command line to be measured.
const MEASURED: &str = "IMGDM_MEASURED";

/// Runs what the variable says, in a process of its own, and prints its peak memory in KiB: the
/// kernel keeps one number for all children.
#[test]
fn a_child_is_measured() {
    let Ok(line) = std::env::var(MEASURED) else { return };
    let mut words = line.split('\n');
    let mut command = Command::new(words.next().unwrap());
    let command = command.args(words).stdin(Stdio::null()).stdout(Stdio::null());
    let output = command.output().unwrap();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    let seconds = usage.user_time().tv_sec() + usage.system_time().tv_sec();
    let peak = usage.max_rss();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr: String = stderr.chars().take(300).collect();
    let stderr = stderr.replace('\n', " / ");
    println!("\nMEASURED {peak} {seconds} {:?} {stderr}", output.status.code());
}

/// Peak memory in MiB, and how it ended.
fn measure(dir: &Path, args: &[&str]) -> (u64, String) {
    let line = [&[env!("CARGO_BIN_EXE_imgdm")], args].concat().join("\n");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "a_child_is_measured", "--nocapture"]).env(MEASURED, line);
    let output = child.current_dir(dir).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let measured = said.lines().find_map(|line| line.strip_prefix("MEASURED "));
    let measured = measured.unwrap_or_else(|| panic!("{args:?}: {said}"));
    let mut parts = measured.splitn(3, ' ');
    let (peak, seconds, how) = (parts.next(), parts.next(), parts.next().unwrap());
    let number = |part: Option<&str>| part.unwrap().parse::<i64>().unwrap();
    assert!(number(seconds) < SECONDS, "{args:?} took {seconds:?} seconds: {how}");
    assert!(how.starts_with("Some(") && !how.starts_with("Some(101)"), "{args:?}: {how}");
    (number(peak).unsigned_abs() / 1024, how.to_owned())
}

/// A sparse file to be written to.
struct Hostile {
    file: File,
}

impl Hostile {
    fn new(dir: &Path, length: u64) -> Self {
        let file = File::create(dir.join("x")).unwrap();
        file.set_len(length).unwrap();
        Self { file }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> &Self {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    /// A qcow2 header, version 3, with its L1 table at 1 MiB and its refcount table at 64 MiB.
    fn qcow2(dir: &Path, length: u64, cluster_bits: u32, size: u64, l1_entries: u32) -> Self {
        let image = Self::new(dir, length);
        image.put(0, b"QFI\xfb\0\0\0\x03").put(20, &cluster_bits.to_be_bytes());
        image.put(24, &size.to_be_bytes()).put(36, &l1_entries.to_be_bytes());
        image.put(40, &MIB.to_be_bytes()).put(48, &(64 * MIB).to_be_bytes());
        image.put(56, &1u32.to_be_bytes()).put(96, &4u32.to_be_bytes());
        image.put(100, &104u32.to_be_bytes());
        image
    }
}

/// The commands, and how many MiB each may take on the file.
fn assert_bounded(dir: &Path, format: &str, what: &str, bounds: &[(&[&str], u64)]) {
    for (command, bound) in bounds {
        let mut args = [*command, &["-f", format, "x"]].concat();
        if command[0] == "explain" {
            args.push("0");
        }
        let (peak, how) = measure(dir, &args);
        println!("{what}: {}: {peak} MiB of {bound}: {how}", command.join(" "));
        assert!(peak <= *bound, "{what}: {command:?} took {peak} MiB, {bound} are allowed: {how}");
    }
}

/// All of a qcow2 image's commands; a map of the first MiB alone, where the disk is a huge one.
fn qcow2_is_bounded(dir: &Path, what: &str, bound: u64) {
    let bounds: [(&[&str], u64); 7] = [
        (&["map", "--max-length=1048576"], bound),
        (&["map", "--output=json", "--max-length=1048576"], bound),
        (&["info"], bound),
        (&["info", "--output=json"], bound),
        (&["check"], bound),
        (&["check", "-M"], bound + METADATA),
        (&["explain"], bound),
    ];
    assert_bounded(dir, "qcow2", what, &bounds);
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn a_header_that_claims_the_most_takes_no_more_than_the_named_limits() {
    let dir = directory();
    let dir = dir.path();
    // The largest L1 table, all of it a hole; clusters of 512 bytes.
    Hostile::qcow2(dir, 4 << 40, 9, 1 << 37, 4 << 20);
    qcow2_is_bounded(dir, "the largest L1 table", BASE + LARGEST_L1);
    // The largest refcount table, and the largest disk that a small L1 table can have.
    let image = Hostile::qcow2(dir, 4 << 40, 21, 1 << 49, 1024);
    image.put(40, &(2 * MIB).to_be_bytes()).put(56, &4u32.to_be_bytes());
    qcow2_is_bounded(dir, "the largest clusters", BASE + 64);
    // Claims that can't be believed.
    let fields: [(u64, &[u8]); 7] = [
        (16, &[0xff; 4]),
        (24, &[0xff; 8]),
        (36, &[0xff; 4]),
        (56, &[0xff; 4]),
        (60, &[0xff; 4]),
        (100, &[0xff; 4]),
        (108, &[0xff; 4]),
    ];
    for (at, bytes) in fields {
        let image = Hostile::qcow2(dir, 4 << 40, 16, 1 << 30, 2);
        image.put(104, &0x2385_2875u32.to_be_bytes());
        image.put(at, bytes);
        assert_bounded(
            dir,
            "qcow2",
            &format!("{bytes:?} at {at}"),
            &[(&["map"], BASE), (&["check", "-M"], BASE + METADATA)],
        );
    }
}

#[test]
fn the_largest_tables_of_snapshots_and_bitmaps_stay_within_the_named_limits() {
    let dir = directory();
    let dir = dir.path();
    // As many snapshots as there can be, without a name; and as long names as there can be.
    let image = Hostile::qcow2(dir, 1 << 40, 16, 1 << 30, 2);
    image.put(60, &65536u32.to_be_bytes()).put(64, &(128 * MIB).to_be_bytes());
    qcow2_is_bounded(dir, "65536 snapshots", BASE + LARGEST_TABLE);
    image.put(60, &1023u32.to_be_bytes());
    let mut at = 128 * MIB;
    for _ in 0..1023 {
        image.put(at + 14, &[0xff; 2]);
        at += (40 + 65535u64).next_multiple_of(8);
    }
    qcow2_is_bounded(dir, "long names of snapshots", BASE + LARGEST_TABLE);
    // Nearly as many bitmaps as there can be; and fewer, with names of 1023 bytes.
    for (count, name_length) in [(64000u32, 8u16), (4000, 1023)] {
        many_bitmaps(dir, count, name_length);
        let what = format!("{count} bitmaps with names of {name_length} bytes");
        qcow2_is_bounded(dir, &what, BASE + LARGEST_TABLE);
    }
}

fn many_bitmaps(dir: &Path, count: u32, name_length: u16) {
    let image = Hostile::qcow2(dir, 1 << 40, 16, 1 << 30, 2);
    let entry = (24 + u64::from(name_length)).next_multiple_of(8);
    image.put(88, &1u64.to_be_bytes());
    image.put(104, &0x2385_2875u32.to_be_bytes()).put(108, &24u32.to_be_bytes());
    image.put(112, &count.to_be_bytes()).put(120, &(u64::from(count) * entry).to_be_bytes());
    image.put(128, &(128 * MIB).to_be_bytes());
    for number in 0..count {
        let mut fields = [0; 28];
        fields[..8].copy_from_slice(&MIB.to_be_bytes());
        fields[8..12].copy_from_slice(&1u32.to_be_bytes());
        fields[16..18].copy_from_slice(&[1, 16]);
        fields[18..20].copy_from_slice(&name_length.to_be_bytes());
        fields[24..].copy_from_slice(&number.to_be_bytes());
        image.put(128 * MIB + u64::from(number) * entry, &fields);
    }
}

#[test]
fn what_a_plan_finds_in_the_way_is_counted_not_listed() {
    const TABLES: u64 = 512;
    const ENTRIES: u64 = 8192;
    let dir = directory();
    let dir = dir.path();
    let image =
        Hostile::qcow2(dir, 1 << 30, 16, (TABLES * ENTRIES) << 16, u32::try_from(TABLES).unwrap());
    let tables_at = 128 * MIB;
    let l1: Vec<_> =
        (0..TABLES).flat_map(|i| ((1 << 63) | (tables_at + (i << 16))).to_be_bytes()).collect();
    image.put(MIB, &l1);
    // Each cluster is something else than the one before: compressed, and past the file's end.
    let (compressed, past_end) = ((1u64 << 62) | (512 * MIB), (1u64 << 63) | (1 << 40));
    let table = [compressed.to_be_bytes(), past_end.to_be_bytes()].concat().repeat(4096);
    for number in 0..TABLES {
        image.put(tables_at + (number << 16), &table);
    }
    let commands: [(&[&str], u64); 2] =
        [(&["plan", "--compressed=refuse"], BASE), (&["plan"], BASE)];
    assert_bounded(dir, "qcow2", "clusters in the way", &commands);
}

#[test]
fn qcow_and_cow_headers_that_claim_the_most_take_next_to_nothing() {
    let dir = directory();
    let dir = dir.path();
    let image = Hostile::new(dir, 4 << 40);
    image.put(0, b"QFI\xfb\0\0\0\x01").put(24, &(1u64 << 38).to_be_bytes());
    image.put(32, &[9, 6]).put(40, &MIB.to_be_bytes());
    let commands: [(&[&str], u64); 4] = [
        (&["map", "--max-length=1048576"], BASE),
        (&["info"], BASE),
        (&["check"], BASE),
        (&["check", "-M"], BASE + METADATA),
    ];
    assert_bounded(dir, "qcow", "the largest qcow", &commands);
    let image = Hostile::new(dir, 4 << 40);
    image.put(0, b"OOOM\0\0\0\x02").put(8, b"/base").put(4108, &(256u64 << 30).to_be_bytes());
    image.put(4116, &512u32.to_be_bytes());
    assert_bounded(dir, "cow", "the largest cow", &commands[1..]);
}

#[test]
fn what_lies_on_a_disk_takes_no_more_than_the_named_limits() {
    let dir = directory();
    let dir = dir.path();
    // A GPT of 2^32 entries of 4 GiB each.
    let image = Hostile::new(dir, 4 << 40);
    let mut header = [0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[10] = 1;
    header[12] = 92;
    header[24] = 1;
    header[40] = 34;
    header[48..56].copy_from_slice(&((4u64 << 40) / 512 - 34).to_le_bytes());
    header[72] = 2;
    header[80..88].fill(0xff);
    let sum = crc32fast::hash(&header);
    header[16..20].copy_from_slice(&sum.to_le_bytes());
    image.put(512, &header).put(510, &[0x55, 0xaa]).put(450, &[0xee]);
    assert_bounded(dir, "raw", "a GPT", &[(&["partitions"], BASE)]);
    // LVM's metadata: as many entries as there can be, and as many sections as there can be
    // inside of each other.
    for (what, text) in [
        ("entries", "a=1 ".repeat(4 << 20)),
        ("arrays", format!("a=[{}]", "1,".repeat(8 << 20))),
        ("sections", "a{".repeat(8 << 20)),
        ("one string", format!("a=\"{}\"", "\\\"".repeat(7 << 20))),
    ] {
        let image = Hostile::new(dir, 64 * MIB);
        physical_volume(&image, &text.as_bytes()[..text.len().min((16 << 20) - 512)]);
        let what = format!("LVM's metadata of {what}");
        assert_bounded(dir, "raw", &what, &[(&["partitions"], BASE + LARGEST_LVM)]);
    }
}

/// Writes a label, and an area with this text.
fn physical_volume(image: &Hostile, text: &[u8]) {
    let checksum = |bytes: &[u8]| {
        let mut hasher = crc32fast::Hasher::new_with_initial(!0xf597_a6cf);
        hasher.update(bytes);
        (!hasher.finalize()).to_le_bytes()
    };
    let area_size = 32 * MIB;
    let mut label = [0; 512];
    label[..8].copy_from_slice(b"LABELONE");
    label[8] = 1;
    label[20] = 32;
    label[24..32].copy_from_slice(b"LVM2 001");
    label[32..64].fill(b'A');
    label[64..72].copy_from_slice(&(64 * MIB).to_le_bytes());
    label[72..80].copy_from_slice(&(40 * MIB).to_le_bytes());
    label[104..112].copy_from_slice(&4096u64.to_le_bytes());
    label[112..120].copy_from_slice(&area_size.to_le_bytes());
    let sum = checksum(&label[20..]);
    label[16..20].copy_from_slice(&sum);
    let mut area = [0; 512];
    area[4..20].copy_from_slice(b" LVM2 x[5A%r0N*>");
    area[20] = 1;
    area[24..32].copy_from_slice(&4096u64.to_le_bytes());
    area[32..40].copy_from_slice(&area_size.to_le_bytes());
    area[40..48].copy_from_slice(&512u64.to_le_bytes());
    area[48..56].copy_from_slice(&(text.len() as u64).to_le_bytes());
    area[56..60].copy_from_slice(&checksum(text));
    let sum = checksum(&area[4..]);
    area[..4].copy_from_slice(&sum);
    image.put(512, &label).put(4096, &area).put(4608, text);
}

#[test]
fn names_of_json_nested_without_end_are_refused() {
    let dir = directory();
    for text in ["{\"file\":", "["] {
        let name = format!("json:{{\"a\":{}", text.repeat(10_000));
        let (peak, how) = measure(dir.path(), &["map", &name]);
        assert!(peak <= BASE && how.starts_with("Some(65)"), "{peak} MiB: {how}");
    }
}
