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
    snapshot.detach();
    device.detach();
    let said = imgdm(args!["explain", "explained", "0"]).refused(66);
    assert!(said.contains("nothing is attached under the name"), "{said}");
}
