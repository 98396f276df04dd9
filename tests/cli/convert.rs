//! `imgdm convert`: what it refuses, and what it leaves behind.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::contract::assert_fails;
use crate::images::{chain, command, imgdm};

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// The disk has the same bytes as that of `top.qcow2`.
#[track_caller]
fn assert_same_disk(directory: &Path, image: &str) {
    let hash = |image| {
        let output = imgdm(directory, &["hash", "--algorithm=blake3", image]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().split(' ').next().unwrap().to_owned()
    };
    assert_eq!(hash("top.qcow2"), hash(image));
}

#[test]
fn the_disk_of_the_whole_chain_is_copied() {
    let directory = chain();
    let output = imgdm(directory.path(), &["convert", "top.qcow2", "a.raw"]);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let output = imgdm(directory.path(), &["convert", "-O", "qcow2", "-c", "a.raw", "b.qcow2"]);
    assert!(output.status.success(), "{output:?}");
    assert_same_disk(directory.path(), "a.raw");
    assert_same_disk(directory.path(), "b.qcow2");
    let length = fs::metadata(directory.path().join("a.raw")).unwrap().len();
    assert_eq!(length, 1 << 20);
}

#[test]
fn an_output_that_is_there_stays_unless_forced() {
    let directory = chain();
    let out = directory.path().join("out.raw");
    fs::write(&out, "old").unwrap();
    let convert = |more: &[&str]| {
        imgdm(directory.path(), &[&["convert", "top.qcow2", "out.raw"], more].concat())
    };
    assert_fails(&convert(&[]), 73, &["out.raw", "--force"]);
    assert_eq!(fs::read(&out).unwrap(), b"old");
    assert!(convert(&["--force"]).status.success());
    assert_eq!(fs::metadata(&out).unwrap().len(), 1 << 20);
}

#[test]
fn a_file_that_is_read_is_never_the_output() {
    let directory = chain();
    let path = |name: &str| directory.path().join(name);
    fs::hard_link(path("base.raw"), path("other.raw")).unwrap();
    symlink("top.qcow2", path("link")).unwrap();
    let before = (fs::read(path("top.qcow2")).unwrap(), fs::read(path("base.raw")).unwrap());
    for out in ["top.qcow2", "./base.raw", "other.raw", "link"] {
        let output = imgdm(directory.path(), &["convert", "--force", "top.qcow2", out]);
        assert_fails(&output, 64, &[out, "stays as it is"]);
    }
    fs::copy(path("base.raw"), path("new-base.raw")).unwrap();
    let rebase = ["convert", "--force", "-Oqcow2", "-Bnew-base.raw", "-Fraw"];
    let output = imgdm(directory.path(), &[&rebase[..], &["top.qcow2", "new-base.raw"]].concat());
    assert_fails(&output, 64, &["new-base.raw", "stays as it is"]);
    let after = (fs::read(path("top.qcow2")).unwrap(), fs::read(path("base.raw")).unwrap());
    assert!(before == after);
}

#[test]
fn an_overlay_is_kept_over_its_base_or_another_one() {
    let directory = chain();
    fs::copy(directory.path().join("base.raw"), directory.path().join("moved.raw")).unwrap();
    for (base, more, out) in
        [("base.raw", &[][..], "a.qcow2"), ("moved.raw", &["-F", "raw"], "b.qcow2")]
    {
        let line = [&["convert", "-O", "qcow2", "-B", base], more, &["top.qcow2", out]].concat();
        let output = imgdm(directory.path(), &line);
        assert!(output.status.success(), "{output:?}");
        assert_same_disk(directory.path(), out);
        let info = imgdm(directory.path(), &["info", "--output=json", out]);
        let info = String::from_utf8(info.stdout).unwrap();
        assert!(info.contains(&format!("\"backing-filename\": \"{base}\"")), "{info}");
    }
}

#[test]
fn what_does_not_go_together_is_refused_before_anything_is_made() {
    let directory = chain();
    let before = names(directory.path());
    for (arguments, status, part) in [
        (&["-B", "base.raw"][..], 64, "no backing file"),
        (&["-c"], 64, "compressed"),
        (&["-F", "raw"], 64, "--base"),
        (&["-O", "cow"], 64, "not written"),
        (&["-o", "cluster_size=4k"], 64, "cluster_size"),
        (&["-S", "1000"], 64, "multiple of 512"),
        (&["-S", "32M"], 64, "multiple of 512"),
        (&["-O", "qcow2", "-c", "--reflink=always"], 64, "--reflink=always"),
        (&["-O", "qcow2", "-B", "top.qcow2"], 64, "-F"),
        (&["-O", "qcow2", "-B", "base.raw", "-F", "qcow2"], 64, "-F qcow2"),
        (&["-O", "qcow2", "-B", "gone.raw", "-F", "raw"], 66, "gone.raw"),
        (&["-O", "qcow2", "-B", "nbd:x:1", "-F", "raw"], 65, "nbd"),
        (&["-m", "0"], 64, "--threads"),
    ] {
        let line = [&["convert"], arguments, &["top.qcow2", "out"]].concat();
        let output = imgdm(directory.path(), &line);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
        assert_eq!(names(directory.path()), before);
    }
    for out in [".", "/dev/null", "no/such/out"] {
        let output = imgdm(directory.path(), &["convert", "top.qcow2", out]);
        assert_fails(&output, 73, &[out]);
    }
}

#[test]
fn a_limit_of_the_files_size_is_an_error_that_leaves_nothing() {
    let directory = chain();
    let before = names(directory.path());
    let shell = r#"ulimit -f 100; exec "$0" convert --quiet -O "$1" top.qcow2 out"#;
    for format in ["raw", "qcow2"] {
        let mut program = std::process::Command::new("bash");
        program.args(["-c", shell, env!("CARGO_BIN_EXE_imgdm"), format]);
        let output = program.current_dir(directory.path()).output().unwrap();
        assert_fails(&output, 73, &["out", "File too large"]);
        assert_eq!(names(directory.path()), before);
    }
}

#[test]
fn a_data_file_is_made_beside_the_image() {
    let directory = chain();
    fs::create_dir(directory.path().join("sub")).unwrap();
    let line = ["convert", "-Oqcow2", "-o", "data_file=x.data", "top.qcow2", "sub/out.qcow2"];
    let output = imgdm(directory.path(), &line);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(names(&directory.path().join("sub")), ["out.qcow2", "x.data"]);
    assert_same_disk(directory.path(), "sub/out.qcow2");
    // The image may not be made where its data file can't.
    let output = imgdm(directory.path(), &[&line[..5], &["sub/other.qcow2"]].concat());
    assert_fails(&output, 73, &["sub/x.data", "--force"]);
    assert_eq!(names(&directory.path().join("sub")), ["out.qcow2", "x.data"]);
}

#[test]
fn the_options_of_the_formats_are_listed_without_an_image() {
    let directory = chain();
    for arguments in [&["convert", "-o", "help"][..], &["convert", "-O", "qcow2", "-o?", "a", "b"]]
    {
        let output = imgdm(directory.path(), arguments);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("cluster_size="), "{output:?}");
    }
}

#[test]
fn progress_is_printed_in_percent() {
    let directory = chain();
    let output = imgdm(directory.path(), &["convert", "-p", "top.qcow2", "a.raw"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("0%\n") && stderr.ends_with("100%\n"), "{stderr}");
    let output = imgdm(directory.path(), &["-q", "convert", "-p", "top.qcow2", "b.raw"]);
    assert!(output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_signal_leaves_nothing_and_ends_it() {
    use std::os::unix::process::ExitStatusExt;

    let directory = chain();
    // Enough noise for the signal to come in time, on any machine.
    let file = fs::File::create(directory.path().join("noise.raw")).unwrap();
    let noise: Vec<u8> =
        (0..1u32 << 20).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for at in 0..64 {
        std::os::unix::fs::FileExt::write_all_at(&file, &noise, at * noise.len() as u64).unwrap();
    }
    let before = names(directory.path());
    let line = ["convert", "-O", "qcow2", "-c", "noise.raw", "out.qcow2"];
    let mut child = command(directory.path(), &line).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(15));
    assert_eq!(names(directory.path()), before);
}

#[test]
fn a_format_that_is_not_written_is_answered_by_those_that_are() {
    let directory = chain();
    let output = imgdm(directory.path(), &["convert", "-O", "vmdk", "top.qcow2", "out"]);
    assert_eq!(output.status.code(), Some(64), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("'vmdk'") && said.contains("writes (raw, qcow2, qcow)"), "{said}");
}
