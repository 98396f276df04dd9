//! Evidence, as far as no device is needed.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::contract::{as_nobody, assert_fails, on};
use crate::images::{Qcow2, imgdm};

#[test]
fn evidence_refuses_what_loosens_it_before_anything_is_done() {
    let options = [
        "--force-share",
        "--allow-changed-backing",
        "--probe-backing",
        "--on-error=zero",
        "--direct-block",
        "--publish",
    ];
    for option in options {
        let output = on("attach", &Qcow2::new(), &["--evidence", option]);
        assert_fails(&output, 64, &["--evidence: not with", option]);
    }
    assert_eq!(on("attach", &Qcow2::new(), &["--hash"]).status.code(), Some(64));
    let output = imgdm(Path::new("/"), &["detach", "--all", "--record", "x"]);
    assert_eq!(output.status.code(), Some(64));
}

#[test]
fn evidence_that_can_not_be_read_without_a_trace_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
    // Readable, but another's: of root, or where no root runs this, of /etc.
    let mut image = directory.path().join("x.raw");
    if nix::unistd::geteuid().is_root() {
        fs::write(&image, vec![0; 4096]).unwrap();
    } else {
        image = "/etc/passwd".into();
    }
    let image = image.to_str().unwrap();
    let output = as_nobody(&["attach", "--evidence", "-f", "raw", image], directory.path());
    assert_fails(&output, 77, &[image, "O_NOATIME"]);
}

#[test]
fn a_report_is_of_records_alone() {
    let directory = tempfile::tempdir().unwrap();
    let record = |text: &str| fs::write(directory.path().join("x.json"), text).unwrap();
    for (text, part) in [("{", "no record"), ("[1]", "no record"), ("{\"state\": 1}", "no record")]
    {
        record(text);
        for arguments in [&["report", "./x.json"][..], &["report", "--record", "x.json"]] {
            assert_fails(&imgdm(directory.path(), arguments), 65, &["x.json", part]);
        }
    }
    let output = imgdm(directory.path(), &["report", "--record", "none.json"]);
    assert_fails(&output, 66, &["none.json"]);
    // Nobody will ever write to it.
    nix::unistd::mkfifo(&directory.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let output = imgdm(directory.path(), &["report", "--record", "fifo"]);
    assert_fails(&output, 65, &["fifo", "no regular file"]);
    assert_eq!(imgdm(directory.path(), &["report"]).status.code(), Some(64));

    let by = r#"{"uid": 0, "effective_uid": 0, "login_uid": null, "sudo_uid": null, "sudo_user": "eve\u001b[2J"}"#;
    let act = format!(
        r#"{{"started": "a", "finished": "b", "tool": "imgdm 1", "arguments": [], "working_directory": null, "by": {by}, "hostname": null, "kernel": null}}"#
    );
    record(&format!(
        r#"{{"imgdm_evidence": 1, "state": "detached", "name": "d", "uuid": "u", "virtual_size": 512, "chain": [], "files": [], "table_sha256": "t", "device_sha256": null, "attach": {act}, "detach": {act}}}"#
    ));
    let output = imgdm(directory.path(), &["report", "./x.json"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && stdout.starts_with("d: detached\n"), "{stdout}");
    assert!(stdout.contains("by sudo of eve\\u{1b}[2J") && !stdout.contains('\x1b'), "{stdout}");
    let output = imgdm(directory.path(), &["report", "--output=json", "./x.json"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    // Who may not ask the kernel is not told.
    assert_ne!(report["now"]["attached"], true);
    assert_eq!(report["now"]["as_recorded"], true);
    record(
        &fs::read_to_string(directory.path().join("x.json"))
            .unwrap()
            .replace("detached", "attached"),
    );
    let output = imgdm(directory.path(), &["report", "./x.json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}
