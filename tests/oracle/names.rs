//! How an overlay names its backing file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::check::{convert, same, strings};
use crate::common::images::{Step, scratch_dir};
use crate::common::patch::{self, BACKING_FORMAT, BACKING_LENGTH, BACKING_OFFSET, Patch};
use crate::common::process::Outcome;
use crate::common::qemu;
use crate::far::{check_steps, create, recipe_of, write};
use crate::imgdm::{EX_INVALID, imgdm, refused};
use crate::table::{Plan, compare};

const SIZE: u64 = 1 << 20;

/// A base and an overlay in `dir`/a, both with data.
fn base_and_overlay(dir: &Path, overlay: &Step) {
    fs::create_dir_all(dir.join("a")).unwrap();
    let steps = vec![
        create("base.raw", "raw", &[], None, SIZE),
        write("base.raw", "raw", &[(0, 3 * 65536 + 512)]),
        overlay.clone(),
        write("overlay.qcow2", "qcow2", &[(65536, 512), (8 * 65536, 65536)]),
    ];
    recipe_of(steps, &[]).make(&dir.join("a")).unwrap();
}

fn plain_overlay() -> Step {
    create("overlay.qcow2", "qcow2", &[], Some(("base.raw", "raw")), SIZE)
}

/// Map and table of `image`, as it is named from `from`, against qemu-img's.
fn check_from(from: &Path, image: &str) -> Outcome {
    check_with(from, image, &[])
}

/// The same, with more arguments for table.
fn check_with(from: &Path, image: &str, extra: &[&str]) -> Outcome {
    for output in ["--output=json", "--output=human"] {
        let line = strings(&["map", "-f", "qcow2", output, image]);
        same(&qemu::img(from, &line)?, &imgdm(from, &line)?)?;
    }
    let copy = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    convert(from, "qcow2", image, &copy.path().to_string_lossy())?;
    let mut line = vec!["table", "--output=json", image];
    line.extend_from_slice(extra);
    let ran = imgdm(from, &line)?.ok()?;
    compare(&Plan::parse(&ran.stdout)?, copy.path())
}

#[test]
fn a_relative_name_is_the_overlays_and_not_the_working_directorys() {
    let dir = scratch_dir("names").unwrap();
    let dir = dir.path();
    base_and_overlay(dir, &plain_overlay());
    // A file of that name that must not be taken.
    fs::write(dir.join("base.raw"), vec![7; 4096]).unwrap();
    check_from(dir, "a/overlay.qcow2").unwrap();
    check_from(&dir.join("a"), "overlay.qcow2").unwrap();
    check_from(&dir.join("a"), "./overlay.qcow2").unwrap();
    check_from(&dir.join("a"), "../a/overlay.qcow2").unwrap();
    check_from(Path::new("/"), &dir.join("a/overlay.qcow2").to_string_lossy()).unwrap();
    check_from(Path::new("/proc"), &dir.join("a/overlay.qcow2").to_string_lossy()).unwrap();
}

#[test]
fn a_relative_name_is_beside_the_symlink_and_not_its_target() {
    let dir = scratch_dir("names").unwrap();
    let dir = dir.path();
    base_and_overlay(dir, &plain_overlay());
    fs::create_dir(dir.join("b")).unwrap();
    symlink("../a/overlay.qcow2", dir.join("b/link.qcow2")).unwrap();
    let line = strings(&["map", "--output=json", "b/link.qcow2"]);
    // QEMU looks beside the name that it was given, where nothing is yet.
    assert!(!qemu::img_any(dir, &line).unwrap().status.success());
    let ran = imgdm(dir, &line).unwrap();
    refused(&ran, &[66], &["b/base.raw", "link.qcow2"]).unwrap();
    fs::write(dir.join("b/base.raw"), vec![7; 1 << 20]).unwrap();
    check_from(dir, "b/link.qcow2").unwrap();
    check_from(&dir.join("b"), "link.qcow2").unwrap();
    check_from(dir, "a/overlay.qcow2").unwrap();
}

#[test]
fn absolute_file_and_json_names_lead_to_the_same_disk() {
    for name in [
        "@DIR@/base.raw",
        "file:@DIR@/base.raw",
        "./base.raw",
        "../a/base.raw",
        r#"json:{"driver":"raw","file":{"driver":"file","filename":"@DIR@/base.raw"}}"#,
        r#"json:{"driver":"raw","file.driver":"file","file.filename":"@DIR@/base.raw"}"#,
        r#"json:{"driver":"file","filename":"@DIR@/base.raw"}"#,
    ] {
        let dir = scratch_dir("names").unwrap();
        let backing =
            if name.contains(r#""driver":"file","filename""#) && !name.contains("raw\",\"file") {
                (name, "file")
            } else {
                (name, "raw")
            };
        let overlay = create("overlay.qcow2", "qcow2", &[], Some(backing), SIZE);
        base_and_overlay(dir.path(), &overlay);
        check_from(dir.path(), "a/overlay.qcow2").unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

#[test]
fn names_with_odd_characters() {
    let dir = scratch_dir("names").unwrap();
    let dir = dir.path();
    base_and_overlay(dir, &plain_overlay());
    for name in ["a b", "quo\"te'", "überlay", "a,b=c", "perc%s", "back\\slash"] {
        let name = format!("./{name}.qcow2");
        fs::copy(dir.join("a/overlay.qcow2"), dir.join("a").join(&name)).unwrap();
        check_from(&dir.join("a"), &name).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // A device's name may not start with a dash: it takes another.
    fs::copy(dir.join("a/overlay.qcow2"), dir.join("a/-dash.qcow2")).unwrap();
    let ran = imgdm(&dir.join("a"), &["table", "./-dash.qcow2"]).unwrap();
    refused(&ran, &[64], &["-dash", "--name"]).unwrap();
    check_with(&dir.join("a"), "./-dash.qcow2", &["--name=dash"]).unwrap();
    // Not UTF-8.
    let name = OsStr::from_bytes(b"./\xff\xfe.qcow2");
    fs::copy(dir.join("a/overlay.qcow2"), dir.join("a").join(name)).unwrap();
    let line = [OsStr::new("map"), OsStr::new("-f"), OsStr::new("qcow2"), name];
    let from = dir.join("a");
    same(&qemu::img(&from, &line).unwrap(), &imgdm(&from, &line).unwrap()).unwrap();
    let line = [OsStr::new("table"), OsStr::new("--output=json"), name];
    let ran = imgdm(&from, &line).unwrap().ok().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert!(json.to_string().contains("fffe2e71636f7732"), "path_bytes: {json}");
}

#[test]
fn a_version_2_overlay_keeps_the_declared_raw_of_a_base_that_looks_like_qcow2() {
    for compat in ["compat=0.10", "compat=1.1"] {
        let dir = scratch_dir("names").unwrap();
        let steps = vec![
            // A whole qcow2 image with data: taken for one, the disk would be another.
            create("base.raw", "qcow2", &[], None, SIZE),
            write("base.raw", "qcow2", &[(0, SIZE)]),
            create("top.qcow2", "qcow2", &[compat], Some(("base.raw", "raw")), SIZE),
            write("top.qcow2", "qcow2", &[(65536, 65536)]),
        ];
        let layers = [("base.raw", "raw", None, SIZE), ("top.qcow2", "qcow2", None, SIZE)];
        check_steps(dir.path(), steps, &layers);
    }
}

#[test]
fn an_undeclared_format_is_probed_by_map_and_refused_by_table() {
    for compat in ["compat=0.10", "compat=1.1"] {
        let dir = scratch_dir("names").unwrap();
        let dir = dir.path();
        let overlay = create("overlay.qcow2", "qcow2", &[compat], Some(("base.raw", "raw")), SIZE);
        base_and_overlay(dir, &overlay);
        let overlay = dir.join("a/overlay.qcow2");
        Patch::open(&overlay).unwrap().forget_extension(BACKING_FORMAT).unwrap();
        let line = strings(&["map", "--output=json", "a/overlay.qcow2"]);
        let ran = imgdm(dir, &line).unwrap();
        assert!(ran.stderr.contains("warning") && ran.stderr.contains("base.raw"), "{ran:?}");
        same(&qemu::img(dir, &line).unwrap(), &ran).unwrap();
        let ran = imgdm(dir, &["table", "a/overlay.qcow2"]).unwrap();
        refused(&ran, &[EX_INVALID], &["--probe-backing", "base.raw"]).unwrap();
        imgdm(dir, &["table", "--probe-backing", "a/overlay.qcow2"]).unwrap().ok().unwrap();
        let ran = imgdm(dir, &["plan", "--output=json", "a/overlay.qcow2"]).unwrap().ok().unwrap();
        let plan: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
        assert_eq!(plan["attachable"], false, "{plan}");
    }
}

#[test]
fn a_name_that_leads_to_no_local_file_is_refused_by_name() {
    let dir = scratch_dir("names").unwrap();
    let dir = dir.path();
    base_and_overlay(dir, &plain_overlay());
    let overlay = dir.join("a/overlay.qcow2");
    for name in [
        "nbd://localhost/x",
        "nbd:localhost:10809",
        "http://localhost/base.raw",
        "ssh://host/base",
        "rbd:pool/image",
        "fat:/tmp",
        r#"json:{"driver":"nbd","server.type":"unix","server.path":"/x"}"#,
        r#"json:{"driver":"raw","file":{"driver":"nbd","path":"/x"}}"#,
        r#"json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"base.raw"}}"#,
        r#"json:{"driver":"raw","file":{"driver":"file"}}"#,
        r#"json:{"driver":"quorum","children":[]}"#,
        "json:{",
        "json:[]",
        "json:",
    ] {
        let changed = dir.join("a/changed.qcow2");
        patch::copy(&overlay, &changed).unwrap();
        let image = Patch::open(&changed).unwrap();
        // The rest of the first cluster is free.
        image.put_u64(BACKING_OFFSET, 4096).unwrap();
        image.put_u32(BACKING_LENGTH, u32::try_from(name.len()).unwrap()).unwrap();
        image.put(4096, name.as_bytes()).unwrap();
        for command in ["map", "plan", "table"] {
            let ran = imgdm(dir, &[command, "a/changed.qcow2"]).unwrap();
            refused(&ran, &[EX_INVALID], &["changed.qcow2", &name[..name.len().min(4)]])
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(ran.stdout.is_empty(), "{}", ran.describe());
        }
    }
}
