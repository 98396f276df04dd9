//! The same bad input to every command that opens an image: what it says, and with which
//! exit status.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Output, Stdio};

use crate::images::{Qcow2, chain, command};

/// A command line; `explain` is also told which byte to explain, `mount` and `convert` where
/// to.
fn line<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let last: &[_] = match arguments {
        [_, "--help" | "--reverse", ..] => &[],
        ["explain", _, ..] => &["0"],
        ["mount", _, ..] => &["."],
        ["convert", _, ..] => &["out.raw"],
        _ => &[],
    };
    [arguments, last].concat()
}

fn imgdm(directory: &Path, arguments: &[&str]) -> Output {
    crate::images::imgdm(directory, &line(arguments))
}

#[track_caller]
pub(super) fn assert_fails(output: &Output, status: i32, parts: &[&str]) {
    assert_says(output, status, parts);
    // A map is printed as it is read, as qemu-img does: its headline may be out.
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.lines().all(|line| line.starts_with("Offset")), "{stdout}");
}

#[track_caller]
fn assert_says(output: &Output, status: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(stderr.starts_with("imgdm: "), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "'{part}' is missing in: {stderr}");
    }
}

/// Damaged tables: what only looks goes on past them and lists them, all else refuses.
#[track_caller]
fn assert_finds_damage(command: &str, output: &Output, parts: &[&str]) {
    match command {
        "plan" => {}
        "show" => {
            assert!(output.stdout.starts_with(b"x.qcow2: 1 MiB"), "{output:?}");
            return assert_says(output, 65, parts);
        }
        "explain" => {
            // The steps up to the damage are told.
            assert!(String::from_utf8_lossy(&output.stdout).contains("damaged: "), "{output:?}");
            return assert_says(output, 65, parts);
        }
        _ => return assert_fails(output, 65, parts),
    }
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    for part in parts.iter().chain(&["attachable:    no", "damaged metadata"]) {
        assert!(stdout.contains(part), "'{part}' is missing in: {stdout}");
    }
}

/// `imgdm COMMAND IMAGE` in a directory with the image written by `prepare`.
pub(super) fn on(command: &str, image: &Qcow2, more: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    image.write(directory.path(), "x.qcow2");
    let arguments = [&[command], more, &["x.qcow2"]].concat();
    imgdm(directory.path(), &arguments)
}

pub(super) fn missing_file(command: &str) {
    let output = imgdm(Path::new("/"), &[command, "/nowhere/disk.qcow2"]);
    assert_fails(&output, 66, &["/nowhere/disk.qcow2"]);
}

pub(super) fn no_argument(command: &str) {
    let output = imgdm(Path::new("/"), &[command]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("IMAGE"));
}

pub(super) fn unknown_option(command: &str) {
    let output = imgdm(Path::new("/"), &[command, "--frobnicate", "x"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--frobnicate"));
}

pub(super) fn unknown_format(command: &str) {
    let output = imgdm(Path::new("/"), &[command, "-f", "vmdk", "x"]);
    assert_eq!(output.status.code(), Some(64));
    assert!(String::from_utf8_lossy(&output.stderr).contains("vmdk"));
}

pub(super) fn help(command: &str) {
    let output = imgdm(Path::new("/"), &[command, "--help"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("Example"));
}

pub(super) fn not_an_image_file(command: &str) {
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    let status = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(status.success());
    for (path, what) in
        [("/", "a directory"), ("fifo", "a FIFO"), ("/dev/null", "a character device")]
    {
        assert_fails(&imgdm(directory.path(), &[command, path]), 65, &[path, what]);
    }
}

pub(super) fn garbage(command: &str) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("x"), b"this is no image").unwrap();
    fs::write(directory.path().join("empty"), b"").unwrap();
    for format in ["qcow2", "qcow", "cow"] {
        for name in ["x", "empty"] {
            let output = imgdm(directory.path(), &[command, "-f", format, name]);
            assert_fails(&output, 65, &[name]);
        }
    }
}

pub(super) fn no_permission(command: &str) {
    let directory = chain();
    let image = directory.path().join("top.qcow2");
    fs::set_permissions(&image, Permissions::from_mode(0o0)).unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    let output = as_nobody(&line(&[command, "top.qcow2"]), directory.path());
    assert_fails(&output, 77, &["top.qcow2"]);
}

/// Runs imgdm as a user who owns nothing; root may read anything.
pub(super) fn as_nobody(line: &[&str], directory: &Path) -> Output {
    if nix::unistd::geteuid().is_root() {
        // The binary may lie where only root gets to: its own name beside the image, or else
        // a copy (which can't be run while another test's child has it open to write).
        let copy = directory.join("imgdm");
        let program = env!("CARGO_BIN_EXE_imgdm");
        fs::hard_link(program, &copy).or_else(|_| fs::copy(program, &copy).map(drop)).unwrap();
        let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups"];
        let mut command = std::process::Command::new("setpriv");
        command.args(arguments).arg(copy).args(line).current_dir(directory);
        loop {
            let output = command.output().unwrap();
            // Another test's child, just forked, may still hold the copy open for writing.
            if !String::from_utf8_lossy(&output.stderr).contains("Text file busy") {
                return output;
            }
        }
    }
    crate::images::imgdm(directory, line)
}

pub(super) fn no_such_snapshot(command: &str) {
    assert_fails(
        &on(command, &Qcow2::new(), &["-l", "yesterday"]),
        66,
        &["x.qcow2", "'yesterday'"],
    );
    let directory = chain();
    let output = imgdm(directory.path(), &[command, "-l", "yesterday", "base.raw"]);
    assert_fails(&output, 66, &["raw", "no internal snapshots"]);
}

pub(super) fn missing_backing_file(command: &str) {
    let image = Qcow2::new().backing(Path::new("gone.raw"), Some("raw"));
    assert_fails(&on(command, &image, &[]), 66, &["gone.raw", "backing file of x.qcow2"]);
}

pub(super) fn remote_backing_file(command: &str) {
    let image = Qcow2::new().backing(Path::new("nbd://host/disk"), Some("raw"));
    assert_fails(&on(command, &image, &[]), 65, &["x.qcow2", "'nbd'"]);
}

pub(super) fn unknown_backing_format(command: &str) {
    let image = Qcow2::new().backing(Path::new("base.vmdk"), Some("vmdk"));
    assert_fails(&on(command, &image, &[]), 65, &["x.qcow2", "vmdk"]);
}

pub(super) fn cycle(command: &str) {
    let directory = tempfile::tempdir().unwrap();
    Qcow2::new().backing(Path::new("b"), Some("qcow2")).write(directory.path(), "a");
    Qcow2::new().backing(Path::new("./link"), Some("qcow2")).write(directory.path(), "b");
    std::os::unix::fs::symlink("a", directory.path().join("link")).unwrap();
    assert_fails(&imgdm(directory.path(), &[command, "a"]), 65, &["circle", "link"]);
}

pub(super) fn unknown_feature(command: &str) {
    let mut image = Qcow2::new();
    image.put(72, &(1u64 << 40).to_be_bytes());
    assert_fails(&on(command, &image, &[]), 65, &["x.qcow2", "bit 40"]);
}

pub(super) fn corrupt_bit(command: &str) {
    let mut image = Qcow2::new();
    image.put(72, &2u64.to_be_bytes());
    let output = on(command, &image, &[]);
    if command == "plan" {
        // The preflight says it among all else that stands in the way.
        assert!(String::from_utf8_lossy(&output.stdout).contains("--allow-corrupt"));
    } else {
        assert_fails(&output, 65, &["marked corrupt"]);
    }
}

pub(super) fn an_image_of_another_format(command: &str) {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("x.vmdk"), [&b"KDMV"[..], &[0; 1020]].concat()).unwrap();
    let output = imgdm(directory.path(), &[command, "x.vmdk"]);
    assert_fails(&output, 65, &["x.vmdk", "looks like vmdk", "-f raw"]);
}

pub(super) fn names_that_move_the_cursor(command: &str) {
    for (name, format) in [("x\x1b[2J:y", "raw"), ("base", "\x1b]0;x\x07")] {
        let image = Qcow2::new().backing(Path::new(name), Some(format));
        let output = on(command, &image, &[]);
        assert_fails(&output, 65, &["x.qcow2"]);
        assert!(!output.stderr.contains(&0x1b), "{output:?}");
    }
}

pub(super) fn one_l2_table_named_twice(command: &str) {
    let mut image = Qcow2::new();
    image.put(36, &2u32.to_be_bytes());
    image.put(2 * 65536 + 8, &(3 * 65536u64).to_be_bytes());
    let output = on(command, &image, &[]);
    let parts = ["x.qcow2: ", "at offset 0x20008: ", "overlap"];
    if command == "explain" {
        // No byte of the disk suffers from it: that is a warning.
        assert!(output.status.success(), "{output:?}");
        let stderr = String::from_utf8_lossy(&output.stderr);
        return assert!(parts.iter().all(|part| stderr.contains(part)), "{stderr}");
    }
    assert_finds_damage(command, &output, &parts);
}

pub(super) fn table_out_of_the_file(command: &str) {
    let mut image = Qcow2::new();
    image.put(40, &(1u64 << 50).to_be_bytes());
    let output = on(command, &image, &[]);
    assert_finds_damage(command, &output, &["x.qcow2: ", "at offset 0x28: ", "L1 table"]);
}

pub(super) fn truncated(command: &str) {
    let cut = |length| {
        let mut image = Qcow2::new().data(1);
        image.bytes.truncate(length);
        on(command, &image, &["-f", "qcow2"])
    };
    for in_header in [0, 50, 103] {
        assert_fails(&cut(in_header), 65, &["x.qcow2: at offset 0x"]);
    }
    for in_tables in [104, 1000, 65536, 2 * 65536 + 7, 3 * 65536 + 512] {
        assert_finds_damage(command, &cut(in_tables), &["x.qcow2: ", "at offset 0x"]);
    }
}

pub(super) fn absurd_size(command: &str) {
    let mut image = Qcow2::new();
    image.put(24, &(1u64 << 62).to_be_bytes());
    assert_fails(&on(command, &image, &[]), 65, &["L1 table has 1 entries"]);
}

/// A cow image whose bitmap would be larger than any file.
pub(super) fn absurd_cow_size(command: &str) {
    let directory = tempfile::tempdir().unwrap();
    for (magic, version, size) in [
        (b"OOOM", 1u32.to_be_bytes(), (1u64 << 62).to_be_bytes()),
        (b"MOOO", 1u32.to_le_bytes(), (1u64 << 62).to_le_bytes()),
    ] {
        let mut bytes = [&magic[..], &version, &[0; 260], &size].concat();
        let sector = 512u32;
        let swapped = magic == b"MOOO";
        bytes.extend(if swapped { sector.to_le_bytes() } else { sector.to_be_bytes() });
        std::fs::write(directory.path().join("x.cow"), bytes).unwrap();
        let output = imgdm(directory.path(), &[command, "x.cow"]);
        assert_fails(&output, 65, &["x.cow", "lies outside the file"]);
    }
}

/// One test for each pair.
macro_rules! contract {
    ($($command:ident: $($case:ident)*;)*) => {
        $(mod $command {
            $(#[test]
            fn $case() {
                super::$case(stringify!($command));
            })*
        })*
    };
}

macro_rules! for_every_reader {
    ($($command:ident)*) => {
        contract! { $($command:
            missing_file no_argument unknown_option unknown_format help not_an_image_file
            garbage no_permission no_such_snapshot missing_backing_file remote_backing_file
            unknown_backing_format cycle unknown_feature corrupt_bit table_out_of_the_file
            truncated absurd_size absurd_cow_size an_image_of_another_format
            names_that_move_the_cursor one_l2_table_named_twice;)* }
    };
}

for_every_reader! { map plan table show attach explain hash mount convert }
// It opens no image by name.
contract! { export: unknown_option help; }

#[test]
fn what_only_other_bytes_suffer_from_is_no_damage_of_this_one() {
    // The second half of the disk has the first one's L2 table.
    let mut image = Qcow2::new().data(0);
    image.put(24, &(1u64 << 30).to_be_bytes());
    image.put(36, &2u32.to_be_bytes());
    image.put(2 * 65536 + 8, &(3 * 65536u64).to_be_bytes());
    let output = on("explain", &image, &[]);
    assert!(output.status.success(), "{output:?}");
    let directory = tempfile::tempdir().unwrap();
    image.write(directory.path(), "x.qcow2");
    let output = crate::images::imgdm(directory.path(), &["explain", "x.qcow2", "512M"]);
    assert_eq!(output.status.code(), Some(65), "{output:?}");
    let stdout = String::from_utf8_lossy(&output.stdout);
    let steps: Vec<_> = stdout.lines().collect();
    assert!(steps[2].contains("L1 entry 1, at 0x20008, is 0x0000000000030000"), "{stdout}");
    assert!(steps[3].contains("damaged: at offset 0x20008: the L1 entries 0 and 1"), "{stdout}");
}

#[test]
fn explain_wants_a_byte_of_the_disk_or_of_a_file_of_the_chain() {
    let directory = chain();
    let explain = |arguments: &[&str]| {
        crate::images::imgdm(directory.path(), &[&["explain"], arguments].concat())
    };
    for (arguments, part) in [
        (&["top.qcow2"][..], "OFFSET|SECTOR"),
        (&["top.qcow2", "1M"], "no byte 1048576"),
        (&["top.qcow2", "2048s"], "no byte 1048576"),
        (&["top.qcow2", "x"], "nor a sector"),
        (&["--reverse", ":0", "top.qcow2", "0"], "--reverse"),
        (&["--reverse", "top.qcow2", "top.qcow2"], "FILE:OFFSET"),
        (&["--reverse", "top.qcow2:x", "top.qcow2"], "not a number"),
        (&["--reverse", "top.qcow2:0", "base.raw"], "not a file of the image's chain"),
    ] {
        let output = explain(arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
    }
    for name in ["no-such-name", "--reverse=gone:0"] {
        let output = explain(&[name, if name.starts_with('-') { "top.qcow2" } else { "0" }]);
        assert_eq!(output.status.code(), Some(66), "{output:?}");
    }
}

// It reads the image file alone, and goes on where the others stop.
contract! { check:
    missing_file no_argument unknown_option unknown_format help not_an_image_file garbage
    no_permission unknown_feature absurd_size absurd_cow_size an_image_of_another_format;
}

// These read headers, and go on past what else is damaged.
contract! {
    info: missing_file no_argument unknown_option unknown_format help not_an_image_file garbage
        no_permission unknown_feature absurd_size absurd_cow_size
        an_image_of_another_format;
    snapshots: missing_file no_argument unknown_option unknown_format help not_an_image_file
        garbage no_permission unknown_feature absurd_size an_image_of_another_format;
}

#[test]
fn info_opens_backing_files_for_the_chain_only() {
    for (name, format, status, part) in [
        ("gone.raw", "raw", 66, "backing file of x.qcow2"),
        ("nbd://host/disk", "raw", 65, "'nbd'"),
        ("base.vmdk", "vmdk", 65, "vmdk"),
        ("x\x1b[2J:y", "raw", 65, "x.qcow2"),
        ("./x.qcow2", "qcow2", 65, "circle"),
    ] {
        let image = Qcow2::new().backing(Path::new(name), Some(format));
        assert_fails(&on("info", &image, &["--backing-chain"]), status, &[part]);
        for output in ["--output=human", "--output=json"] {
            let output = on("info", &image, &[output]);
            assert!(output.status.success(), "{output:?}");
            assert!(!output.stdout.contains(&0x1b), "{output:?}");
        }
    }
}

#[test]
fn info_tells_of_damage_that_it_goes_past() {
    let mut cut = Qcow2::new().data(1);
    cut.bytes.truncate(1000);
    let mut corrupt = Qcow2::new();
    corrupt.put(72, &2u64.to_be_bytes());
    let mut far = Qcow2::new();
    far.put(40, &(1u64 << 50).to_be_bytes());
    for (image, part) in [(cut, "L1 table"), (corrupt, "marked corrupt"), (far, "L1 table")] {
        let output = on("info", &image, &[]);
        assert!(output.status.success(), "{output:?}");
        let notices = String::from_utf8(output.stdout).unwrap();
        let notices = notices.split_once("Notices:").expect("notices").1;
        assert!(notices.contains(part), "{notices}");
    }
}

// An image by itself is compared with nothing: its tables are read only where it has a
// backing file.
contract! { partitions:
    missing_file no_argument unknown_option unknown_format help not_an_image_file garbage
    no_permission no_such_snapshot missing_backing_file remote_backing_file
    unknown_backing_format cycle unknown_feature corrupt_bit table_out_of_the_file absurd_size
    absurd_cow_size an_image_of_another_format names_that_move_the_cursor;
}

contract! { diff:
    missing_file no_argument unknown_option unknown_format help not_an_image_file garbage
    no_permission no_such_snapshot missing_backing_file remote_backing_file
    unknown_backing_format cycle unknown_feature corrupt_bit table_out_of_the_file absurd_size
    an_image_of_another_format names_that_move_the_cursor;
}

#[test]
fn diff_says_what_it_can_compare() {
    let directory = chain();
    let diff = |arguments: &[&str]| imgdm(directory.path(), &[&["diff"], arguments].concat());
    assert_fails(&diff(&["base.raw"]), 64, &["base.raw", "no backing file", "-l SNAP"]);
    for base in ["0", "2", "99999999999999999999", "top.qcow2", "nowhere", ""] {
        let given = format!("--base={base}");
        assert_fails(&diff(&[&given, "top.qcow2"]), 64, &["no layer below", "base.raw"]);
    }
    for base in ["1", "base.raw", "./base.raw"] {
        assert!(diff(&["--base", base, "top.qcow2"]).status.success());
    }
    let three = ["-l", "a", "-l", "b", "-l", "c", "top.qcow2"];
    assert_fails(&diff(&three), 64, &["two snapshots"]);
    let output = diff(&["-l", "a", "--base=1", "top.qcow2"]);
    assert_eq!(output.status.code(), Some(64));
    let image = Qcow2::new().data(1).entry(2, 4 * 65536 + 512);
    image.backing(Path::new("base.raw"), Some("raw")).write(directory.path(), "bad.qcow2");
    assert_fails(&diff(&["bad.qcow2"]), 65, &["bad.qcow2: at offset 0x30010"]);
}

#[test]
fn an_undeclared_backing_format_is_refused_by_those_that_hand_the_bytes_on() {
    let directory = chain();
    Qcow2::new().backing(Path::new("base.raw"), None).write(directory.path(), "x.qcow2");
    for name in ["table", "attach"] {
        let output = imgdm(directory.path(), &[name, "x.qcow2"]);
        assert_fails(&output, 65, &["base.raw", "--probe-backing"]);
    }
    let output = imgdm(directory.path(), &["map", "x.qcow2"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no format is declared"));
    let output = imgdm(directory.path(), &["--quiet", "map", "x.qcow2"]);
    assert!(output.stderr.is_empty());
    let output = imgdm(directory.path(), &["plan", "--output=json", "x.qcow2"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["attachable"], false);
    assert_eq!(report["obstacles"][0]["kind"], "undeclared-backing-format");
    let output = imgdm(directory.path(), &["table", "--probe-backing", "x.qcow2"]);
    assert!(output.status.success());
}

#[test]
fn obstacles_are_all_listed_and_nothing_is_loaded() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("odd.raw"), vec![1; 700]).unwrap();
    let compressed = (1 << 62) | (4 * 65536);
    Qcow2::new()
        .backing(Path::new("odd.raw"), Some("raw"))
        .entry(3, compressed)
        .entry(5, compressed)
        .entry(8, 1 << 40)
        .write(directory.path(), "x.qcow2");
    let line = ["plan", "--output=json", "--compressed=refuse", "x.qcow2"];
    let output = imgdm(directory.path(), &line);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let found: Vec<_> = report["obstacles"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| {
            (o["kind"].as_str().unwrap(), o["count"].as_u64(), o["first_guest_offset"].as_u64())
        })
        .collect();
    assert_eq!(
        found,
        [("compressed", Some(2), Some(3 * 65536)), ("past-end-of-file", Some(1), Some(8 * 65536)),]
    );
    for name in ["table", "attach"] {
        let output = imgdm(directory.path(), &[name, "--compressed=refuse", "x.qcow2"]);
        assert_fails(&output, 65, &["2, the first at guest offset 0x30000", "0x80000"]);
    }
    // For rescue, what is lost is no obstacle.
    let table = |what| {
        let arguments = ["table", "--output=json", what, "x.qcow2"];
        let output = imgdm(directory.path(), &arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(table("--on-error=error-target").contains("\"error\""));
    assert!(!table("--on-error=zero").contains("\"error\""));
}

#[test]
fn more_kernel_memory_than_is_allowed_is_an_obstacle() {
    let directory = chain();
    let plan = |options: &[&str]| {
        let line = [&["plan", "--output=json", "top.qcow2"], options].concat();
        let output = imgdm(directory.path(), &line);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = plan(&[]);
    let bytes = |key: &str| report[key].as_u64().unwrap();
    assert!(bytes("kernel_limit_bytes") > 1 << 20, "{report}");
    let needed = bytes("kernel_bytes") + bytes("kernel_load_bytes");
    let report = plan(&[&format!("--max-kernel-memory={needed}")]);
    assert_eq!(
        (&report["attachable"], &report["kernel_limit_bytes"]),
        (&true.into(), &needed.into())
    );
    let report = plan(&[&format!("--max-kernel-memory={}", needed - 1)]);
    assert_eq!(report["attachable"], false);
    assert_eq!(report["obstacles"][0]["kind"], "kernel-memory", "{report}");
    assert!(report["obstacles"][0]["message"].as_str().unwrap().contains("--max-kernel-memory"));
    let report = plan(&["--max-kernel-memory=none"]);
    assert_eq!(
        (&report["attachable"], &report["kernel_limit_bytes"]),
        (&true.into(), &serde_json::Value::Null)
    );
    let refused = imgdm(directory.path(), &["plan", "--max-kernel-memory=half", "top.qcow2"]);
    assert_eq!(refused.status.code(), Some(64));
}

#[test]
fn a_scratch_file_without_room_is_an_obstacle() {
    let directory = chain();
    Qcow2::new().entry(3, (1 << 62) | (4 * 65536)).write(directory.path(), "x.qcow2");
    let plan = |options: &[&str]| {
        let line = [&["plan", "--output=json", "x.qcow2"], options].concat();
        let output = imgdm(directory.path(), &line);
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = plan(&["--scratch-dir=."]);
    assert_eq!((&report["attachable"], &report["scratch_bytes"]), (&true.into(), &65536.into()));
    assert_eq!(report["scratch_dir"]["path"], directory.path().to_str().unwrap());
    let before = fs::read_dir(directory.path()).unwrap().count();
    // What attach could not write to either, whatever its permissions say.
    for place in ["/nonexistent", "/proc", "/sys", "x.qcow2", "/dev/null"] {
        let report = plan(&[&format!("--scratch-dir={place}")]);
        assert_eq!(report["obstacles"][0]["kind"], "no-scratch", "{place}: {report}");
        let path = directory.path().join(place);
        assert_eq!(report["obstacles"][0]["path"], path.to_str().unwrap());
    }
    for (place, named) in [
        ("/proc/cache", "/proc"),
        ("x.qcow2", "x.qcow2"),
        ("x.qcow2/cache", "x.qcow2"),
        ("/sys/a/b", "/sys"),
    ] {
        let report = plan(&["--compressed=cache", &format!("--cache-dir={place}")]);
        assert_eq!(report["obstacles"][0]["kind"], "no-scratch", "{place}: {report}");
        let path = directory.path().join(named);
        assert_eq!(report["obstacles"][0]["path"], path.to_str().unwrap());
    }
    let report = plan(&["--compressed=cache", "--cache-dir=a/b"]);
    assert_eq!(report["attachable"], true, "{report}");
    assert_eq!(report["scratch_dir"]["path"], directory.path().to_str().unwrap());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), before, "nothing is left");
}

#[test]
fn compressed_clusters_can_be_refused() {
    let image = Qcow2::new().entry(3, (1 << 62) | (4 * 65536));
    let refuse = ["--compressed=refuse"];
    assert_fails(&on("table", &image, &refuse), 76, &["compressed"]);
    assert_fails(&on("attach", &image, &refuse), 76, &["compressed"]);
}

#[test]
fn detach_says_what_is_not_attached() {
    let directory = chain();
    let output = imgdm(directory.path(), &["detach", "no-such-name"]);
    let status = output.status.code();
    assert!(status == Some(66) || status == Some(69), "{output:?}");
    let output = imgdm(directory.path(), &["detach", "--if-attached", "no-such-name"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(imgdm(directory.path(), &["detach"]).status.code(), Some(64));
    assert_eq!(imgdm(directory.path(), &["detach", "--all", "x"]).status.code(), Some(64));
}

#[test]
fn verify_says_what_is_not_attached_and_takes_no_key_for_nothing() {
    let directory = chain();
    for target in ["no-such-name", "./top.qcow2", "/dev/mapper/no-such-name"] {
        let output = imgdm(directory.path(), &["verify", target]);
        let status = output.status.code();
        assert!(status == Some(66) || status == Some(69) || status == Some(77), "{output:?}");
        assert!(output.stdout.is_empty(), "{output:?}");
    }
    assert_eq!(imgdm(directory.path(), &["verify"]).status.code(), Some(64));
    let output = imgdm(directory.path(), &["verify", "--key-file", "k", "no-such-name"]);
    assert_fails(&output, 64, &["--content"]);
}

#[test]
fn names_are_refused_when_given_and_mended_when_made() {
    let directory = chain();
    for name in ["", ".", "..", "control", "-x", "a b", "a/b", &"x".repeat(101)] {
        let output = imgdm(directory.path(), &["table", &format!("--name={name}"), "top.qcow2"]);
        assert_eq!(output.status.code(), Some(64), "{name}: {output:?}");
    }
    fs::copy(directory.path().join("base.raw"), directory.path().join("a b.tar.raw")).unwrap();
    let output = imgdm(directory.path(), &["table", "--output=json", "a b.tar.raw"]);
    let table: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(table["name"], "a_b.tar");
}

#[test]
fn a_map_goes_on_past_damage_and_lists_it() {
    const BAD: u64 = 4 * 65536 + 512;
    let image = Qcow2::new().data(1).entry(2, BAD).entry(3, BAD).data(4).entry(7, 1);
    for (form, rows_expected) in [("--output=json", 7), ("--output=json-full", 8)] {
        let output = on("map", &image, &[form]);
        assert_eq!(output.status.code(), Some(65));
        let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(rows.len(), rows_expected, "{rows:?}");
        let mut at = 0;
        for row in &rows {
            assert_eq!(row["start"], at);
            at += row["length"].as_u64().unwrap();
        }
        assert_eq!(at, 1 << 20, "the whole disk");
        let bad = &rows[2];
        assert_eq!(bad["start"], 2 * 65536);
        assert_eq!(
            [&bad["present"], &bad["zero"], &bad["data"], &bad["offset"]],
            [&true.into(), &false.into(), &false.into(), &serde_json::Value::Null]
        );
        let message = "at offset 0x30018: the L2 entry of guest offset 0x30000 has the host offset";
        if form == "--output=json-full" {
            assert!(rows[3]["damage"].as_str().unwrap().starts_with(message), "{rows:?}");
            assert_eq!(rows[4].get("damage"), None);
        }
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(&format!("imgdm: x.qcow2: {message}")), "{stderr}");
        assert!(stderr.contains("it spoils the disk from 0x20000 to 0x30000"), "{stderr}");
        assert!(stderr.ends_with("damaged in 2 places; all else is mapped\n"), "{stderr}");
    }
    // What people read shows data alone, as ever.
    let human = String::from_utf8(on("map", &image, &[]).stdout).unwrap();
    assert_eq!(human.lines().count(), 3, "{human}");
    // And a part of the disk has only its own damage.
    let part = ["--output=json", "--max-length=131072"];
    assert!(on("map", &image, &part).status.success());
}

#[test]
fn a_long_list_of_damage_is_cut_and_counted() {
    let mut image = Qcow2::new();
    image.put(24, &(8192u64 << 16).to_be_bytes());
    for cluster in 0..8192 {
        image = image.entry(cluster, 512);
    }
    let output = on("map", &image, &["--output=json"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 102, "{stderr}");
    assert!(stderr.contains("\nimgdm: and 8092 more like these\n"), "{stderr}");
    assert!(stderr.contains("damaged in 8192 places"), "{stderr}");
    let output = on("plan", &image, &["--output=json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["obstacles"][0]["kind"], "damaged", "{report}");
    assert_eq!(report["obstacles"][0]["count"], 8192, "{report}");
}

#[test]
fn damage_ends_with_65_also_where_stderr_takes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let image = Qcow2::new().data(1).entry(2, 4 * 65536 + 512);
    image.write(directory.path(), "bad.qcow2");
    for name in ["show", "map"] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let (reader, closed) = std::io::pipe().unwrap();
        drop(reader);
        for stderr in [Stdio::from(full), Stdio::from(closed)] {
            let mut program = command(directory.path(), &[name, "bad.qcow2"]);
            let output = program.stderr(stderr).output().unwrap();
            assert_eq!(output.status.code(), Some(65), "{name}: {output:?}");
        }
        // No descriptor at all.
        let shell = r#"exec "$0" "$1" bad.qcow2 2>&-"#;
        let mut program = std::process::Command::new("sh");
        program.args(["-c", shell, env!("CARGO_BIN_EXE_imgdm"), name]);
        let output = program.current_dir(directory.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(65), "{name}: {output:?}");
    }
}

#[test]
fn a_full_disk_is_an_error() {
    let directory = chain();
    for name in ["info", "map", "plan", "table", "diff", "show", "hash"] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = command(directory.path(), &[name, "top.qcow2"]).stdout(full).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("No space left"), "{output:?}");
    }
}

#[test]
fn keys_that_nothing_takes_are_refused_before_anything_is_done() {
    let on = |more: &[&str]| on("attach", &Qcow2::new(), more);
    assert_fails(&on(&["--key-file", "k:0"]), 64, &["layer 0", "not an encrypted one"]);
    assert_fails(&on(&["--key-file", "k", "--key-file", "l"]), 64, &["which layer"]);
    assert_fails(&on(&["--key-fd", "1000000"]), 64, &["descriptor 1000000"]);
    assert_eq!(on(&["--key-fd", "x"]).status.code(), Some(64));
}

#[test]
fn diff_takes_no_key_for_nothing() {
    let output = imgdm(chain().path(), &["diff", "--key-file", "k", "top.qcow2"]);
    assert_fails(&output, 64, &["--content"]);
}
