//! Completions in real shells, on a terminal.

use std::fs;
use std::path::Path;

use crate::shell::Shell;

#[test]
fn tab_completes_image_files_commands_options_and_their_values() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("my disk.qcow2"), "").unwrap();
    fs::create_dir(directory.path().join("place")).unwrap();
    let cases: [(&str, &[&str]); 5] = [
        // A lone file is the only answer, whatever its name.
        ("imgdm attach m\t", &["attach", "my disk.qcow2"]),
        (
            "imgdm attach --compressed=ca\t --scratch-dir p\t my\t",
            &["attach", "--compressed=cache", "--scratch-dir", "place", "my disk.qcow2"],
        ),
        ("imgdm list --output js\t", &["list", "--output", "json"]),
        // No file where an option's value is due that only its user knows, nor where no
        // argument is.
        ("imgdm attach --name m\t", &["attach", "--name", "m"]),
        ("imgdm list m\t", &["list", "m"]),
    ];
    let lines = cases.map(|(typed, _)| typed);
    for shell in Shell::ALL {
        let imgdm = Path::new(env!("CARGO_BIN_EXE_imgdm"));
        let got = shell.arguments_of(imgdm, directory.path(), &lines);
        for ((typed, arguments), got) in cases.iter().zip(got) {
            // zsh takes the slash after a directory back.
            let got: Vec<_> = got.iter().map(|got| got.trim_end_matches('/')).collect();
            assert_eq!(&got, arguments, "{shell:?}: {typed:?}");
        }
    }
}
