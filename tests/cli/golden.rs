//! Output that people and scripts rely on, kept in `golden/`. After a wanted change run
//! the tests with SNAPSHOTS=overwrite and read the difference.

use std::path::Path;

use snapbox::data::DataFormat;
use snapbox::{Assert, Data, Redactions};
use tempfile::TempDir;

use crate::images::{chain, command, imgdm};

/// Compares stdout of a command on the chain with a file; `[DIR]` stands for its
/// directory.
fn check(arguments: &[&str], golden: &str) {
    check_in(&chain(), arguments, golden);
}

fn check_in(directory: &TempDir, arguments: &[&str], golden: &str) {
    let output = command(directory.path(), arguments).env("LC_ALL", "C.UTF-8").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let mut redactions = Redactions::new();
    let path = directory.path().canonicalize().unwrap();
    redactions.insert("[DIR]", path.display().to_string()).unwrap();
    redactions.insert("[VERSION]", env!("CARGO_PKG_VERSION")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/golden").join(golden);
    Assert::new().action_env("SNAPSHOTS").redact_with(redactions).eq(
        String::from_utf8(output.stdout).unwrap(),
        Data::read_from(&golden, Some(DataFormat::Text)),
    );
}

#[test]
fn map_human() {
    check(&["map", "top.qcow2"], "map.txt");
}

#[test]
fn map_json() {
    check(&["map", "--output=json", "top.qcow2"], "map.json.txt");
}

#[test]
fn map_json_full() {
    check(&["map", "--output=json-full", "top.qcow2"], "map.json-full.txt");
}

#[test]
fn map_of_a_part() {
    let part = ["map", "--output=json", "-s", "100k", "--max-length", "0x8000", "top.qcow2"];
    check(&part, "map-part.json.txt");
    check(&["map", "--output=json", "-s", "1M", "top.qcow2"], "map-empty.json.txt");
}

#[test]
fn plan_human() {
    // The default limit is this machine's.
    check(&["plan", "--max-kernel-memory=1M", "top.qcow2"], "plan.txt");
}

#[test]
fn plan_json() {
    let line = ["plan", "--output=json", "--max-kernel-memory=1M", "top.qcow2"];
    check(&line, "plan.json.txt");
}

#[test]
fn table_human() {
    check(&["table", "top.qcow2"], "table.txt");
}

#[test]
fn table_with_devices() {
    check(&["table", "--loops", "/dev/loop0,7:1,/dev/loop2", "top.qcow2"], "table-loops.txt");
}

#[test]
fn table_json() {
    check(&["table", "--output=json", "--zero=dm", "top.qcow2"], "table.json.txt");
}

#[test]
fn diff_human() {
    check(&["diff", "top.qcow2"], "diff.txt");
}

#[test]
fn diff_json() {
    check(&["diff", "--output=json", "--base=base.raw", "top.qcow2"], "diff.json.txt");
}

#[test]
fn diff_of_content() {
    check(&["diff", "--content", "top.qcow2"], "diff-content.txt");
}

#[test]
fn show_picture() {
    check(&["show", "--width", "80", "--ascii", "top.qcow2"], "show-ascii.txt");
    check(&["show", "--width", "80", "--color=never", "top.qcow2"], "show.txt");
}

#[test]
fn show_json() {
    check(&["show", "--output=json", "--cells=3", "top.qcow2"], "show.json.txt");
}

#[test]
fn hash() {
    check(&["hash", "top.qcow2"], "hash.txt");
    check(&["hash", "--output=json", "top.qcow2"], "hash.json.txt");
}

#[test]
fn convert() {
    let line = ["convert", "--reflink=never", "top.qcow2", "out.raw"];
    check(&[&line[..], &["--output=human"]].concat(), "convert.txt");
}

#[test]
fn partitions() {
    let directory = chain();
    std::fs::write(directory.path().join("disk.raw"), crate::partitions::disk()).unwrap();
    let human = ["--quiet", "partitions", "disk.raw"];
    check_in(&directory, &human, "partitions.txt");
    let json = ["--quiet", "partitions", "--output=json", "disk.raw"];
    check_in(&directory, &json, "partitions.json.txt");
}

#[test]
fn explain() {
    check(&["explain", "top.qcow2", "0x10064"], "explain-data.txt");
    check(&["explain", "top.qcow2", "640s"], "explain-backing.txt");
    check(&["explain", "top.qcow2", "256k"], "explain-zero.txt");
    check(&["explain", "--output=json", "top.qcow2", "640s"], "explain.json.txt");
}

#[test]
fn explain_reverse() {
    check(&["explain", "--reverse", ":0x40064", "top.qcow2"], "explain-reverse.txt");
    check(&["explain", "--reverse", "base.raw:0x10000", "top.qcow2"], "explain-hidden.txt");
    check(&["explain", "--reverse", ":196616", "top.qcow2"], "explain-table.txt");
    let json = ["explain", "--output=json", "--reverse", ":0x40064", "top.qcow2"];
    check(&json, "explain-reverse.json.txt");
}

#[test]
fn help_of_each_command() {
    let help = imgdm(Path::new("/"), &["--help"]);
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let (commands, _) = commands.split_once("\n\n").unwrap();
    // What a long line goes on with stands further to the right.
    let names = commands.lines().filter_map(|line| {
        line.strip_prefix("  ").filter(|rest| !rest.starts_with(' '))?.split_whitespace().next()
    });
    let mut count = 0;
    for command in names.filter(|&name| name != "help") {
        check(&[command, "--help"], &format!("help-{command}.txt"));
        count += 1;
    }
    assert!(count >= 6, "{help}");
    check(&["--help"], "help.txt");
}
