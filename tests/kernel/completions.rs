//! Shells offer the names of what is attached, also to those who may not ask device-mapper.

use crate::args;
use crate::guest::*;
use crate::shell::Shell;

#[test]
fn tab_completes_the_names_of_attached_images() {
    let scratch = Scratch::new();
    let image = scratch.create("raw", &[], "golden.raw", "1M");
    tool("dmsetup", ["create", "other", "--notable"]);
    let devices = [attach([&image]), attach(args!["--name", "in@stance:1", &image])];
    let cases: [(&str, &[&str]); 6] = [
        ("imgdm detach g\t", &["detach", "golden"]),
        ("imgdm verify g\t", &["verify", "golden"]),
        ("imgdm detach in@st\t", &["detach", "in@stance:1"]),
        // Not one of ours; and a path is completed as one.
        ("imgdm detach o\t", &["detach", "o"]),
        ("imgdm detach ./g\t", &["detach", "./golden.raw"]),
        ("imgdm attach g\t", &["attach", "golden.raw"]),
    ];
    let lines = cases.map(|(typed, _)| typed);
    for shell in Shell::ALL {
        let got = shell.arguments_of(&imgdm_path(), scratch.directory(), &lines);
        for ((typed, arguments), got) in cases.iter().zip(got) {
            assert_eq!(&got, arguments, "{shell:?}: {typed:?}");
        }
    }
    for device in devices {
        device.detach();
    }
    tool("dmsetup", ["remove", "other"]);
}
