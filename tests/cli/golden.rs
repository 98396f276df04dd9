//! Output that people and scripts rely on, kept in `golden/`. After a wanted change run
//! the tests with SNAPSHOTS=overwrite and read the difference.

use std::path::Path;

use snapbox::data::DataFormat;
use snapbox::{Assert, Data, Redactions};

use crate::images::{chain, imgdm};

/// Compares stdout of a command on the chain with a file; `[DIR]` stands for its
/// directory.
fn check(arguments: &[&str], golden: &str) {
    let directory = chain();
    let output = imgdm(directory.path(), arguments);
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
    check(&["plan", "top.qcow2"], "plan.txt");
}

#[test]
fn plan_json() {
    check(&["plan", "--output=json", "top.qcow2"], "plan.json.txt");
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
fn help_of_each_command() {
    for command in ["info", "snapshots", "map", "plan", "table", "diff", "attach", "detach", "list"]
    {
        check(&[command, "--help"], &format!("help-{command}.txt"));
    }
    check(&["--help"], "help.txt");
}
