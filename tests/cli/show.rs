//! The picture: what it shows to whom, and the file that it is drawn into.

use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Output;

use crate::images::{CLUSTER, Qcow2, chain, command, imgdm};

/// `imgdm show` in a directory, on a terminal that knows UTF-8 and colours.
fn show(directory: &Path, arguments: &[&str]) -> String {
    let output = command(directory, &["show"])
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .env_remove("COLUMNS")
        .output()
        .unwrap();
    text(&output)
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A strip of a picture: what stands behind a label.
fn strip(picture: &str, label: &str) -> String {
    let start = format!("  {label} ");
    let line = picture.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("no {label} in {picture}")).trim_start().to_owned()
}

/// An image of a disk of 16 TiB with one L2 table, which is for the given one of the
/// 32768 parts of 512 MiB.
fn huge(part: usize, entry: u64) -> Qcow2 {
    let mut image = Qcow2::new();
    let entries = 32768;
    image.put(24, &(16u64 << 40).to_be_bytes());
    image.put(36, &u32::try_from(entries).unwrap().to_be_bytes());
    image.put(2 * CLUSTER, &[0; 8]);
    let l1 = image.bytes.len();
    image.bytes.resize(l1 + entries * 8, 0);
    image.put(40, &(l1 as u64).to_be_bytes());
    image.put(l1 + part * 8, &(3 * CLUSTER as u64).to_be_bytes());
    image.entry(7, entry)
}

#[test]
fn one_cluster_of_16_tib_is_seen_wherever_it_is() {
    let directory = tempfile::tempdir().unwrap();
    for (part, entry, glyph) in [
        (0, 3 * CLUSTER as u64, '░'),
        (12345, 3 * CLUSTER as u64, '░'),
        (32767, (1 << 62) | (3 * CLUSTER as u64), 'c'),
        (20000, 1, 'z'),
    ] {
        huge(part, entry).write(directory.path(), "x.qcow2");
        for width in ["40", "80", "233"] {
            let picture = show(directory.path(), &["--width", width, "x.qcow2"]);
            let strip: Vec<char> = strip(&picture, "x.qcow2").chars().collect();
            let expected = part * strip.len() / 32768;
            for (column, &shown) in strip.iter().enumerate() {
                let wanted = if column == expected { glyph } else { '·' };
                assert_eq!(shown, wanted, "part {part}, column {column} of\n{picture}");
            }
            assert!(picture.contains("64 KiB"), "{picture}");
        }
        let svg = show(directory.path(), &["--svg", "-", "x.qcow2"]);
        assert!(roxmltree::Document::parse(&svg).is_ok(), "{svg}");
    }
}

#[test]
fn no_line_is_longer_than_the_screen() {
    let directory = chain();
    let name = "a-very-long-name-".repeat(8) + "長い名前.qcow2";
    fs::rename(directory.path().join("top.qcow2"), directory.path().join(&name)).unwrap();
    for width in [40, 57, 80, 132, 500] {
        let columns = width.to_string();
        for more in [&["--ascii"][..], &[]] {
            let arguments = [&["--width", &columns, &name], more].concat();
            let picture = show(directory.path(), &arguments);
            for line in picture.lines() {
                let columns = unicode_width::UnicodeWidthStr::width(line);
                assert!(columns <= width, "{columns} columns, not {width}: {line}");
            }
            assert!(!more.contains(&"--ascii") || picture.is_ascii(), "{picture}");
        }
    }
}

#[test]
fn colours_come_on_demand_and_no_state_is_told_by_colour_alone() {
    let directory = tempfile::tempdir().unwrap();
    let at = 4 * CLUSTER as u64;
    Qcow2::new().data(0).entry(3, 1).entry(6, (1 << 62) | at).write(directory.path(), "x.qcow2");
    let image = &["x.qcow2"][..];
    let plain = show(directory.path(), image);
    assert!(!plain.contains('\x1b'), "stdout is no terminal");
    for sign in ["█ data", "cC compressed", "zZ zero", "· unallocated"] {
        assert!(plain.contains(sign), "{sign} is missing in {plain}");
    }
    let strip = strip(&plain, "x.qcow2");
    assert!("█CZ·".chars().all(|sign| strip.contains(sign)), "{strip}");
    let coloured = show(directory.path(), &["--color=always", "x.qcow2"]);
    for code in ["\x1b[38;5;32m█", "\x1b[38;5;172m", "\x1b[38;5;248m"] {
        assert!(coloured.contains(code), "{code:?} is missing in {coloured}");
    }
    // A C locale is for ASCII.
    let output = command(directory.path(), &["show", "x.qcow2"]).env("LC_ALL", "C").output();
    assert!(text(&output.unwrap()).is_ascii());
}

#[test]
fn layers_end_where_they_end_and_say_what_is_seen_of_them() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("base.raw"), vec![b'b'; 8 * CLUSTER]).unwrap();
    let top = Qcow2::new().backing(Path::new("base.raw"), Some("raw")).data(0).data(1);
    top.write(directory.path(), "top.qcow2");
    let picture = show(directory.path(), &["--width", "77", "top.qcow2"]);
    // 62 columns for 16 clusters, of which the base has half.
    assert_eq!(strip(&picture, "1 base.raw"), "█".repeat(31));
    assert_eq!(strip(&picture, "whole"), format!("{}{}", "█".repeat(31), "·".repeat(31)));
    assert!(picture.contains("384 KiB  75%"), "{picture}");
}

#[test]
fn a_long_chain_shows_its_ends() {
    let directory = tempfile::tempdir().unwrap();
    Qcow2::new().data(1).data(2).write(directory.path(), "0");
    for layer in 1..40 {
        let below = (layer - 1).to_string();
        let image = Qcow2::new().backing(Path::new(&below), Some("qcow2"));
        let image = if layer == 20 { image.data(2) } else { image };
        image.write(directory.path(), &layer.to_string());
    }
    let picture = show(directory.path(), &["39"]);
    assert!(picture.contains("(31 more layers, shown with --all)"), "{picture}");
    assert!(picture.contains("\n   7 32 ") && picture.contains("\n  39 0 "), "{picture}");
    assert!(!picture.contains("\n   8 31 "), "{picture}");
    let picture = show(directory.path(), &["--all", "39"]);
    assert!(!picture.contains("more layers") && picture.contains("\n  19 20 "), "{picture}");
    let json = show(directory.path(), &["--output=json", "39"]);
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["layers"].as_array().unwrap().len(), 40);
    assert_eq!(report["layers"][19]["visible"]["data"], CLUSTER);
    assert_eq!(report["layers"][39]["visible"]["data"], CLUSTER);
}

#[test]
fn svg_holds_names_that_are_markup_and_needs_nothing_from_elsewhere() {
    let directory = tempfile::tempdir().unwrap();
    let names: [&[u8]; 4] = [
        b"a<b>&\"'c]]>.qcow2",
        b"--><script>alert(1)<!--",
        "x\u{1}\u{7f}\u{85}\u{202e}\u{fffe}\u{ffff}\u{1f4be}".as_bytes(),
        b"\xff\xfe<&",
    ];
    for name in names {
        let name = std::ffi::OsStr::from_bytes(name);
        fs::write(directory.path().join(name), &Qcow2::new().data(3).bytes).unwrap();
        let mut program = command(directory.path(), &["show", "--svg", "x.svg", "--"]);
        let output = program.arg(name).output().unwrap();
        assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
        let svg = fs::read_to_string(directory.path().join("x.svg")).unwrap();
        let document = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{e}: {svg}"));
        let root = document.root_element();
        assert_eq!(root.tag_name().namespace(), Some("http://www.w3.org/2000/svg"));
        for node in root.descendants().filter(|node| node.is_element()) {
            let tag = node.tag_name().name();
            let known = ["svg", "title", "desc", "rect", "g", "path", "text"];
            assert!(known.contains(&tag), "{tag}");
            assert!(!node.attributes().any(|attribute| attribute.name().ends_with("href")));
        }
        let title = root.children().find(|node| node.has_tag_name("title"));
        let title = title.and_then(|node| node.text()).unwrap().to_owned();
        if let Some(plain) = name.to_str().filter(|name| name.is_ascii()) {
            assert_eq!(title, plain);
        }
        fs::remove_file(directory.path().join(name)).unwrap();
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "only x.svg is left");
}

#[test]
fn what_stdout_goes_to_is_written_on_and_not_replaced() {
    let directory = chain();
    for path in ["/dev/stdout", "report"] {
        let mut report = fs::File::create(directory.path().join("report")).unwrap();
        report.write_all(b"head\n").unwrap();
        let output = command(directory.path(), &["show", "--svg", path, "top.qcow2"])
            .stdout(report.try_clone().unwrap())
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        report.write_all(b"tail\n").unwrap();
        let text = fs::read_to_string(directory.path().join("report")).unwrap();
        assert!(text.starts_with("head\n<") && text.ends_with("</svg>\ntail\n"), "{text}");
    }
}

#[test]
fn an_image_is_never_drawn_over() {
    let directory = chain();
    std::os::unix::fs::symlink("base.raw", directory.path().join("link.svg")).unwrap();
    for file in ["top.qcow2", "base.raw", "link.svg"] {
        let before = fs::read(directory.path().join(file)).unwrap();
        let output = imgdm(directory.path(), &["show", "--svg", file, "top.qcow2"]);
        assert_eq!(output.status.code(), Some(64), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(file), "{output:?}");
        assert!(fs::read(directory.path().join(file)).unwrap() == before);
    }
    let output = imgdm(directory.path(), &["show", "--svg", "no/x.svg", "top.qcow2"]);
    assert_eq!(output.status.code(), Some(73), "{output:?}");
}

#[test]
fn a_disk_of_no_bytes_and_one_of_a_sector_are_shown() {
    let directory = tempfile::tempdir().unwrap();
    for (size, word) in [(0, "no bytes"), (512, "512 bytes")] {
        fs::write(directory.path().join("x.raw"), vec![1; size]).unwrap();
        let picture = show(directory.path(), &["-f", "raw", "x.raw"]);
        assert!(picture.contains(word), "{picture}");
        let wide = show(directory.path(), &["-f", "raw", "--width", "1000", "x.raw"]);
        assert!(size == 0 || wide.contains(&"█".repeat(900)), "{wide}");
        let svg = show(directory.path(), &["--svg=-", "-f", "raw", "x.raw"]);
        assert!(roxmltree::Document::parse(&svg).is_ok(), "{svg}");
    }
}

#[test]
fn damage_is_shown_in_every_strip_and_listed() {
    const BAD: u64 = 4 * 65536 + 512;
    let directory = tempfile::tempdir().unwrap();
    Qcow2::new().data(0).entry(1, BAD).entry(2, BAD).write(directory.path(), "base");
    let top = Qcow2::new().backing(Path::new("base"), Some("qcow2")).data(1);
    top.write(directory.path(), "top");
    let show = |more: &[&str]| {
        let line = [&["show"], more, &["top"]].concat();
        let output = command(directory.path(), &line).env("LC_ALL", "C").output().unwrap();
        assert_eq!(output.status.code(), Some(65), "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        // Also what the overlay covers.
        for range in ["0x10000 to 0x20000", "0x20000 to 0x30000"] {
            assert!(stderr.contains(&format!("it spoils the layer from {range}")), "{stderr}");
        }
        assert!(stderr.contains("damaged in 2 places"), "{stderr}");
        String::from_utf8(output.stdout).unwrap()
    };
    // 16 clusters in 32 columns.
    let picture = show(&["--width=42"]);
    assert_eq!(strip(&picture, "whole"), format!("####!!{}", ".".repeat(26)));
    assert_eq!(strip(&picture, "1 base"), format!("##!!!!{}", ".".repeat(26)));
    assert_eq!(strip(&picture, "0 top"), format!("..##{}", ".".repeat(28)));
    assert!(picture.contains("! damaged"), "{picture}");
    let report: serde_json::Value = serde_json::from_str(&show(&["--output=json"])).unwrap();
    assert_eq!(report["whole"]["bytes"]["damaged"], CLUSTER);
    assert_eq!(report["layers"][1]["bytes"]["damaged"], 2 * CLUSTER);
    let svg = show(&["--svg=-"]);
    let document = roxmltree::Document::parse(&svg).unwrap();
    assert!(document.descendants().any(|node| node.text() == Some("damaged")), "{svg}");
}
