//! Which files an image may name: what each command says of others, and what allows them.

use std::fs;
use std::path::PathBuf;

use crate::contract::assert_fails;
use crate::images::{Qcow2, imgdm};

/// `images/overlay.qcow2` over `golden/base.raw`.
fn world() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    // Messages name files as they are without links.
    let root = directory.path().canonicalize().unwrap();
    fs::create_dir(root.join("images")).unwrap();
    fs::create_dir(root.join("golden")).unwrap();
    fs::write(root.join("golden/base.raw"), vec![b'b'; 1 << 20]).unwrap();
    let overlay = Qcow2::new().data(0).backing("../golden/base.raw".as_ref(), Some("raw"));
    overlay.write(&root.join("images"), "overlay.qcow2");
    (directory, root)
}

#[test]
fn every_command_that_opens_a_chain_keeps_to_the_images_directory_unless_told() {
    const IMAGE: &str = "images/overlay.qcow2";
    let (_directory, root) = world();
    let allow = format!("--allow-path={}/golden", root.display());
    for line in [
        &["map", IMAGE][..],
        &["plan", IMAGE],
        &["table", IMAGE],
        &["explain", IMAGE, "0"],
        &["show", "--ascii", IMAGE],
        &["hash", IMAGE],
        &["partitions", IMAGE],
        &["diff", IMAGE],
        &["info", "--backing-chain", IMAGE],
        &["convert", IMAGE, "out.raw"],
    ] {
        let refused = imgdm(&root, line);
        assert_fails(
            &refused,
            77,
            &[
                "images/../golden/base.raw: ",
                "it lies outside the directory of the image",
                &format!("{allow} allows it"),
                "(the backing file of images/overlay.qcow2)",
            ],
        );
        assert!(!root.join("out.raw").exists(), "{line:?}");
        let allowed = imgdm(&root, &[line, &[&allow]].concat());
        let stderr = String::from_utf8_lossy(&allowed.stderr);
        // There is no partition table.
        assert!(allowed.status.success() || line[0] == "partitions", "{line:?}: {stderr}");
        assert!(!stderr.contains("outside"), "{line:?}: {stderr}");
    }
    // What looks at the image alone opens nothing else.
    for command in ["info", "snapshots"] {
        assert!(imgdm(&root, &[command, IMAGE]).status.success(), "{command}");
    }
}

#[test]
fn a_base_on_the_command_line_is_the_users_word() {
    let (_directory, root) = world();
    let diff = ["diff", "images/overlay.qcow2", "--base", "golden/base.raw"];
    let diff = imgdm(&root, &diff);
    assert!(diff.status.success(), "{diff:?}");
    let convert = ["convert", "-O", "qcow2", "images/overlay.qcow2", "out.qcow2"];
    let convert = imgdm(&root, &[&convert[..], &["-B", "golden/base.raw", "-F", "raw"]].concat());
    assert!(convert.status.success(), "{convert:?}");
}

#[test]
fn what_is_no_image_is_never_read_by_an_images_word() {
    let (_directory, root) = world();
    for (name, why) in [("/etc/passwd", "outside"), ("/dev/null", "outside")] {
        let image = Qcow2::new().backing(name.as_ref(), Some("raw"));
        image.write(&root.join("images"), "hostile.qcow2");
        assert_fails(&imgdm(&root, &["map", "images/hostile.qcow2"]), 77, &[why]);
    }
}
