//! Whoever reads our output may stop when they have enough.

use std::io::Read;
use std::path::Path;
use std::process::Stdio;

use crate::images::{CLUSTER, Qcow2, command};

#[test]
fn a_closed_pipe_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    // Every second cluster: more rows than a pipe holds.
    let clusters = CLUSTER / 8;
    let mut image = Qcow2::new();
    image.put(24, &((clusters * CLUSTER) as u64).to_be_bytes());
    for cluster in (0..clusters).step_by(2) {
        image = image.entry(cluster, 1);
    }
    std::fs::File::create(directory.path().join("base")).unwrap().set_len(1 << 40).unwrap();
    image.backing(Path::new("base"), Some("raw")).write(directory.path(), "x.qcow2");
    for arguments in [
        ["map", "--output=json"],
        ["map", "--output=json-full"],
        ["table", "--zero=dm"],
        ["table", "--output=json"],
        ["diff", "--output=json"],
    ] {
        let mut child = command(directory.path(), &arguments)
            .arg("x.qcow2")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = [0; 16];
        child.stdout.take().unwrap().read_exact(&mut first).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {output:?}");
        assert!(output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn control_characters_of_a_name_do_not_reach_the_terminal() {
    let directory = tempfile::tempdir().unwrap();
    let name = "x\x1b[31m.qcow2";
    Qcow2::new().backing(Path::new("gone\x07"), Some("raw")).write(directory.path(), name);
    let output = command(directory.path(), &["plan", name]).output().unwrap();
    assert_eq!(output.status.code(), Some(66));
    assert!(!output.stderr.iter().any(|&byte| byte < b' ' && byte != b'\n'), "{output:?}");
}
