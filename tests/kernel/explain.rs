//! Explaining a byte of what is attached, down through the live tables.

use serde_json::Value;

use crate::args;
use crate::guest::*;

fn explain(arguments: impl IntoIterator<Item = std::ffi::OsString>) -> Value {
    let line = ["explain", "--output=json"].map(std::ffi::OsString::from);
    serde_json::from_str(&imgdm(line.into_iter().chain(arguments)).ok()).unwrap()
}

/// The steps of one kind.
fn steps<'v>(report: &'v Value, kind: &str) -> Vec<&'v Value> {
    report["steps"].as_array().unwrap().iter().filter(|step| step["step"] == kind).collect()
}

#[test]
fn a_name_is_explained_with_the_devices_that_serve_the_sector() {
    let scratch = Scratch::new();
    let base = scratch.create("qcow2", &[], "base.qcow2", "1M");
    write_image(&base, "qcow2", &["write -P 1 0 512k"]);
    let overlay = scratch.path("disk.qcow2");
    let line = args!["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, &overlay];
    qemu_img(line).ok();
    write_image(&overlay, "qcow2", &["write -P 2 64k 64k"]);
    qemu_img(args!["snapshot", "-c", "before, of course", &overlay]).ok();
    write_image(&overlay, "qcow2", &["write -P 3 64k 64k", "write -c -P 4 256k 64k"]);

    let device = attach(args!["--name", "explained", &overlay]);
    let bytes = device.bytes();
    for offset in [0, 0x1_0203, 0x2_0000, 0x4_0005, 0x9_0000] {
        let report = explain(args!["explained", offset.to_string()]);
        let devices = steps(&report, "device");
        assert_eq!(devices[0]["name"], "explained", "{report}");
        assert_eq!(devices[0]["sector"], offset / 512, "{report}");
        let loops = steps(&report, "loop");
        let answer = &report["answer"];
        if answer["kind"] == "data" {
            assert_eq!(loops[0]["agrees"], true, "{report}");
            assert_eq!(loops[0]["offset"], answer["offset"], "{report}");
            // The byte itself is there.
            let path = answer["path"].as_str().unwrap();
            let at = usize::try_from(answer["offset"].as_u64().unwrap()).unwrap();
            let file = std::fs::read(path).unwrap();
            assert_eq!(file[at], bytes[usize::try_from(offset).unwrap()], "{report}");
        } else {
            assert!(loops.iter().all(|step| step.get("agrees").is_none()), "{report}");
        }
    }
    let depth = |offset: &str| explain(args!["explained", offset])["answer"]["depth"].clone();
    assert_eq!((depth("128s"), depth("0")), (0.into(), 1.into()));
    let by_path = explain(args![&device.path, "64k"]);
    assert_eq!(
        steps(&by_path, "device").len(),
        steps(&explain(args!["explained", "64k"]), "device").len()
    );

    // A snapshot, whose name a loop device may have cut: the byte that it has.
    let snapshot = attach(args!["-l", "before, of course", "--name", "then", &overlay]);
    let (now, then) = (explain(args!["explained", "64k"]), explain(args!["then", "64k"]));
    assert_eq!(then["steps"][0]["snapshot"]["name"], "before, of course", "{then}");
    assert_ne!(now["answer"]["offset"], then["answer"]["offset"]);
    assert_eq!(steps(&then, "loop")[0]["agrees"], true, "{then}");
    imgdm(args!["explain", "-l", "1", "explained", "0"]).refused(64);
    imgdm(args!["explain", "-f", "raw", "explained", "0"]).refused(64);
    snapshot.detach();
    device.detach();
    let said = imgdm(args!["explain", "explained", "0"]).refused(66);
    assert!(said.contains("nothing is attached under the name"), "{said}");
}

/// The one loop step of a byte, after the byte's answer is checked to be of `kind`.
#[track_caller]
fn served(name: &str, offset: u64, kind: &str) -> Value {
    let report = explain(args![name, offset.to_string()]);
    assert_eq!(report["answer"]["kind"], kind, "{report}");
    let loops = steps(&report, "loop");
    assert_eq!(loops.len(), 1, "{report}");
    loops[0].clone()
}

#[test]
fn a_partial_last_sector_in_the_scratch_file_is_no_false_place() {
    let scratch = Scratch::new();
    let odd = scratch.path("odd.raw");
    std::fs::write(&odd, vec![7; 1024 * 1024 + 100]).unwrap();
    let device = attach(args!["-f", "raw", "--name", "odd", &odd]);
    assert_eq!(served("odd", 1024 * 1024 - 1, "data")["agrees"], true);
    // The partial last sector, which a loop device does not show.
    let tail = served("odd", 1024 * 1024, "data");
    assert_eq!(tail.get("agrees"), None, "{tail}");
    device.detach();
}

#[test]
fn a_hole_that_the_zero_loop_serves_is_no_false_place() {
    let scratch = Scratch::new();
    // The metadata gives the data cluster a place, but a loop of zeros serves it.
    let image = scratch.create("qcow2", &[], "hole.qcow2", "1M");
    write_image(&image, "qcow2", &["write -P 5 0 256k"]);
    let place = explain(args![&image, "64k"])["answer"]["offset"].as_u64().unwrap();
    let (at, length) = (place.to_string(), 65536.to_string());
    run(&mut command("fallocate", args!["-p", "-o", at, "-l", length, &image])).ok();
    let device = attach(args!["--zero", "loop", "--name", "hole", &image]);
    assert_eq!(served("hole", 0, "data")["agrees"], true);
    let report = explain(args!["hole", "64k"]);
    assert!(steps(&report, "loop").iter().all(|step| step["agrees"] != false), "{report}");
    device.detach();
}

#[test]
fn a_name_is_explained_in_the_format_that_was_attached() {
    let scratch = Scratch::new();
    // What a guest wrote to the start of its raw disk: an overlay of a file of the host.
    let secret = scratch.create("qcow2", &[], "secret.qcow2", "1M");
    write_image(&secret, "qcow2", &["write -P 9 0 1M"]);
    let image = scratch.path("guest.raw");
    qemu_img(args!["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &secret, &image]).ok();
    let device = attach(args!["-f", "raw", "--name", "guest", &image]);
    let report = explain(args!["guest", "0"]);
    assert_eq!(steps(&report, "layer").len(), 1, "{report}");
    assert_eq!(steps(&report, "layer")[0]["format"], "raw", "{report}");
    assert_eq!(report["answer"]["offset"], 0, "{report}");
    assert_eq!(steps(&report, "loop")[0]["agrees"], true, "{report}");

    // Nor does it take the path: the loop device still holds the file.
    std::fs::rename(&image, scratch.path("moved.raw")).unwrap();
    std::fs::remove_file(scratch.path("moved.raw")).unwrap();
    let ran = imgdm(args!["explain", "--output=json", "guest", "0"]);
    assert!(ran.stderr.contains("not at its path any more"), "{ran}");
    let report: Value = serde_json::from_str(&ran.ok()).unwrap();
    assert_eq!(report["answer"]["kind"], "data", "{report}");
    assert_eq!(steps(&report, "loop")[0]["agrees"], true, "{report}");
    device.detach();
}

#[test]
fn who_may_not_ask_what_is_attached_is_told_so() {
    let scratch = Scratch::new();
    let device = attach(args!["--name", "asked", scratch.create("raw", &[], "disk.raw", "1M")]);
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let mut line = command("setpriv", user);
    let said = run(line.arg(imgdm_path()).args(["explain", "asked", "0"])).refused(77);
    assert!(said.contains("no file of that name") && said.contains("(os error"), "{said}");
    device.detach();
}
