//! What convert does not do, and that it then leaves everything as it was.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use super::{Input, Output, bytes, good, listing, ours, raw_data_file_is_the_disk};
use crate::check::strings;
use crate::common::images::scratch_dir;
use crate::common::patch::{OFFSET_MASK, Patch};
use crate::common::process::{Outcome, Ran, run};
use crate::common::qemu;
use crate::imgdm::{PROGRAM, imgdm, program_in, refused};

/// in.qcow2 over base.qcow2, 1 MiB each.
fn two_layers(dir: &Path) {
    let create = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"];
    qemu::img(dir, &[&create[..], &["base.qcow2", "1M"]].concat()).unwrap();
    qemu::io(dir, "qcow2", "base.qcow2", &strings(&["write -P 1 0 500k"])).unwrap();
    let over = ["-b", "base.qcow2", "-F", "qcow2", "in.qcow2"];
    qemu::img(dir, &[&create[..], &over].concat()).unwrap();
    qemu::io(dir, "qcow2", "in.qcow2", &strings(&["write -P 2 300k 400k"])).unwrap();
}

const INPUT: Input = Input { file: "in.qcow2", format: "qcow2", snapshot: None };

/// Name, inode, time of change and bytes of all files in a directory.
fn state(dir: &Path) -> Vec<(std::ffi::OsString, u64, i64, Vec<u8>)> {
    let names = listing(dir).into_iter();
    let read = |name: std::ffi::OsString| {
        let path = dir.join(&name);
        let of = fs::symlink_metadata(&path).unwrap();
        let bytes = if of.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        (name, of.ino(), of.mtime_nsec(), bytes)
    };
    names.map(read).collect()
}

/// convert with these arguments is refused, and nothing changes.
#[track_caller]
fn assert_refused(dir: &Path, args: &[&str], codes: &[i32], words: &[&str]) -> Ran {
    let before = state(dir);
    let ran = imgdm(dir, &[&["convert"], args].concat()).unwrap();
    refused(&ran, codes, words).unwrap();
    assert_eq!(ran.text(), "", "{}", ran.describe());
    assert!(state(dir) == before, "{:?}: {}", listing(dir), ran.describe());
    ran
}

#[test]
fn an_image_that_is_there_is_replaced_with_force_only() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    INPUT.expected(dir).unwrap();
    fs::write(dir.join("out"), "old").unwrap();
    fs::set_permissions(dir.join("out"), fs::Permissions::from_mode(0o640)).unwrap();
    let old = fs::metadata(dir.join("out")).unwrap().ino();
    for format in ["raw", "qcow2", "qcow"] {
        assert_refused(dir, &["-O", format, "in.qcow2", "out"], &[73], &["out", "--force"]);
    }
    // A link to nothing yet becomes one to the image.
    symlink("later", dir.join("dangling")).unwrap();
    ours(dir, &INPUT, &Output::of("raw", &[], &[]), &[], "dangling").unwrap();
    good(dir, "raw", "later").unwrap();
    fs::hard_link(dir.join("out"), dir.join("old")).unwrap();
    let before = listing(dir);
    let force = strings(&["--force"]);
    for output in ["raw", "qcow2", "qcow"].map(|format| Output::of(format, &[], &[])) {
        ours(dir, &INPUT, &output, &force, "out").unwrap();
        good(dir, output.format, "out").unwrap();
        assert_eq!(listing(dir), before);
    }
    // The old one was not written to, but its name given away.
    assert_ne!(fs::metadata(dir.join("out")).unwrap().ino(), old);
    assert_eq!(bytes(dir, "old").unwrap(), b"old");
}

#[test]
fn what_is_read_is_never_written_over_even_with_force() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    fs::hard_link(dir.join("base.qcow2"), dir.join("hard")).unwrap();
    symlink("in.qcow2", dir.join("soft")).unwrap();
    fs::create_dir(dir.join("sub")).unwrap();
    for out in ["in.qcow2", "base.qcow2", "hard", "sub/../in.qcow2"] {
        for more in [&[][..], &["--force"], &["--force", "-B", "base.qcow2", "-F", "qcow2"]] {
            let line = [&["-O", "qcow2"], more, &["in.qcow2", out]].concat();
            assert_refused(dir, &line, &[64, 73], &[out]);
        }
    }
    // Replacing the symbolic link would leave the image as it is; either way nothing is lost.
    let before = bytes(dir, "in.qcow2").unwrap();
    let _ = imgdm(dir, &["convert", "-O", "qcow2", "--force", "in.qcow2", "soft"]).unwrap();
    assert!(before == bytes(dir, "in.qcow2").unwrap());
    // A base that is no layer of it.
    fs::copy(dir.join("base.qcow2"), dir.join("other.qcow2")).unwrap();
    let line = ["-O", "qcow2", "--force", "-B", "other.qcow2", "-F", "qcow2", "in.qcow2"];
    assert_refused(dir, &[&line[..], &["other.qcow2"]].concat(), &[64, 73], &["other.qcow2"]);
    // Nor is the data file of the new image one of those.
    for data in ["in.qcow2", "base.qcow2", "hard", "out"] {
        let option = format!("data_file={data}");
        let line = ["-O", "qcow2", "--force", "-o", &option, "in.qcow2", "out"];
        assert_refused(dir, &line, &[64, 73], &[data]);
    }
}

#[test]
fn a_data_file_that_is_there_is_replaced_with_force_only() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    INPUT.expected(dir).unwrap();
    fs::write(dir.join("out.data"), "old").unwrap();
    let output = Output::of("qcow2", &["data_file=@.data", "data_file_raw=on"], &[]);
    let args = output.args("out");
    let mut line: Vec<_> = args.iter().map(String::as_str).collect();
    line.extend(["in.qcow2", "out"]);
    assert_refused(dir, &line, &[73], &["out.data"]);
    ours(dir, &INPUT, &output, &strings(&["--force"]), "out").unwrap();
    good(dir, "qcow2", "out").unwrap();
    raw_data_file_is_the_disk(dir, "out.data").unwrap();
}

#[test]
fn a_place_that_cannot_have_the_image_is_named() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    fs::create_dir(dir.join("folder")).unwrap();
    assert_refused(dir, &["-O", "raw", "in.qcow2", "no/where"], &[66, 73], &["no/where"]);
    assert_refused(dir, &["-O", "raw", "in.qcow2", "folder"], &[64, 73], &["folder"]);
    assert_refused(dir, &["-O", "raw", "--force", "in.qcow2", "folder"], &[64, 73], &["folder"]);
    assert_refused(dir, &["-O", "raw", "in.qcow2", "in.qcow2/x"], &[66, 73], &["in.qcow2/x"]);
    assert_refused(
        dir,
        &["-O", "raw", "--force", "in.qcow2", "/dev/null"],
        &[64, 73],
        &["/dev/null"],
    );
    assert_refused(dir, &["-O", "raw", "nowhere", "out"], &[66], &["nowhere"]);
    let long = "x".repeat(300);
    assert_refused(dir, &["-O", "raw", "in.qcow2", &long], &[64, 73], &[]);
    let data = ["-O", "qcow2", "-o", "data_file=no/where", "in.qcow2", "out"];
    assert_refused(dir, &data, &[66, 73], &["no/where"]);
}

#[test]
fn without_permission_nothing_is_made() {
    if !nix::unistd::geteuid().is_root() {
        println!("passed over: only root can become somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    two_layers(dir);
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    let program = program_in(dir).unwrap();
    let before = listing(dir);
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]);
        run(command.current_dir(dir).arg(&program).arg("convert").args(args)).unwrap()
    };
    let ran = as_nobody(&["-O", "raw", "in.qcow2", "out"]);
    refused(&ran, &[77], &["out", "ermission"]).unwrap();
    assert_eq!(listing(dir), before);
    fs::set_permissions(dir.join("base.qcow2"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(dir.join("open")).unwrap();
    fs::set_permissions(dir.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
    let ran = as_nobody(&["-O", "raw", "in.qcow2", "open/out"]);
    refused(&ran, &[77], &["base.qcow2", "ermission"]).unwrap();
    assert!(listing(&dir.join("open")).is_empty());
    fs::set_permissions(dir.join("base.qcow2"), fs::Permissions::from_mode(0o644)).unwrap();
    as_nobody(&["-O", "raw", "in.qcow2", "open/out"]).ok().unwrap();
}

#[test]
fn a_damaged_image_is_refused_with_its_place_and_leaves_nothing() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    qemu::io(dir, "qcow2", "in.qcow2", &strings(&["write -c -P 3 800k 4k"])).unwrap();
    let image = Patch::open(&dir.join("in.qcow2")).unwrap();
    let outputs = [&["-O", "raw"][..], &["-O", "qcow2"], &["-O", "qcow2", "-c"], &["-O", "qcow"]];
    let all = |word: &str| {
        for output in outputs {
            for more in [&[][..], &["-B", "base.qcow2", "-F", "qcow2"]] {
                if output == ["-O", "raw"] && !more.is_empty() {
                    continue;
                }
                let line = [output, more, &["in.qcow2", "out"]].concat();
                assert_refused(dir, &line, &[65], &["in.qcow2", word]);
            }
        }
    };
    // A stream that does not inflate.
    let entry = image.l2_entry(800 << 10).unwrap();
    let old = image.u64(entry).unwrap();
    let host = old & ((1 << 54) - 1) & OFFSET_MASK | (old & 0x1ff);
    let stream: [u8; 8] = image.bytes(host).unwrap();
    image.put(host, &[0xff; 8]).unwrap();
    all("0xc8000");
    image.put(host, &stream).unwrap();
    // An entry whose cluster is not aligned.
    let entry = image.l2_entry(300 << 10).unwrap();
    let old = image.u64(entry).unwrap();
    image.put_u64(entry, (1 << 63) | 0x1200).unwrap();
    all("0x4b000");
    image.put_u64(entry, old).unwrap();
    // A base that is no image.
    fs::write(dir.join("junk"), "no image at all").unwrap();
    let base = ["-O", "qcow2", "-B", "junk", "-F", "qcow2", "in.qcow2", "out"];
    assert_refused(dir, &base, &[65], &["junk"]);
}

#[test]
fn a_wrong_key_is_refused_and_the_right_one_of_each_layer_opens_it() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    let keys = |line: &[&str]| imgdm(dir, &[&["convert"], line].concat()).unwrap();
    for (format, method) in
        [("qcow2", "luks,encrypt.iter-time=10"), ("qcow2", "aes"), ("qcow", "aes")]
    {
        let options = format!("encrypt.format={method}");
        crate::crypt::create(dir, format, "secret", &options, "abc", "1M").unwrap();
        let layers = [(format, "secret", "abc")];
        let writes = ["write -P 5 3k 300k", "write -P 0 400k 100k", "write -P 6 999k 1k"];
        crate::crypt::write(dir, &layers, &writes).unwrap();
        let line = [
            strings(&["convert"]),
            crate::crypt::secrets(&["abc"]),
            strings(&[
                "--image-opts",
                &crate::crypt::image_opts(&layers),
                "-O",
                "raw",
                "expected.raw",
            ]),
        ];
        qemu::img(dir, &line.concat()).unwrap();
        fs::write(dir.join("key"), "abc").unwrap();
        fs::write(dir.join("wrong"), "abd").unwrap();
        for output in [
            &["-O", "raw"][..],
            &["-O", "qcow2"],
            &["-O", "qcow2", "-c"],
            &["-O", "qcow2", "-o", "cluster_size=512"],
            &["-O", "qcow"],
        ] {
            keys(&[output, &["--key-file", "key", "secret", "out"]].concat()).ok().unwrap();
            let format = if output[1] == "raw" { "raw" } else { output[1] };
            let format = ["raw", "qcow2", "qcow"].into_iter().find(|name| *name == format).unwrap();
            good(dir, format, "out").unwrap_or_else(|error| panic!("{method} {output:?}: {error}"));
            fs::remove_file(dir.join("out")).unwrap();
            // Legacy AES can't tell a wrong key.
            if method != "aes" {
                let line = [output, &["--key-file", "wrong", "secret", "out"]].concat();
                assert_refused(dir, &line, &[67], &["secret"]);
            }
        }
        // Nobody to ask.
        let mut alone = Command::new("setsid");
        alone
            .current_dir(dir)
            .arg("-w")
            .arg(PROGRAM)
            .args(["convert", "-O", "raw", "secret", "out"]);
        refused(&run(&mut alone).unwrap(), &[67], &["secret"]).unwrap();
        assert!(!dir.join("out").exists());
        fs::remove_file(dir.join("secret")).unwrap();
    }
}

#[test]
fn an_image_that_is_written_to_is_refused_but_by_force_share() {
    let dir = scratch_dir("convert-refused").unwrap();
    let dir = dir.path();
    two_layers(dir);
    INPUT.expected(dir).unwrap();
    let mut writer = Command::new("qemu-io");
    writer.current_dir(dir).args(["-f", "qcow2", "in.qcow2"]);
    let mut writer = writer.stdin(std::process::Stdio::piped()).spawn().unwrap();
    // Not by opening it, which may keep the other one from it.
    let inode = format!(":{} ", fs::metadata(dir.join("in.qcow2")).unwrap().ino());
    let opened = || -> Outcome {
        for _ in 0..500 {
            let locks = fs::read_to_string("/proc/locks").map_err(|error| error.to_string())?;
            // The last lock of one who opens for writing: that nobody else may.
            if locks.lines().any(|lock| lock.contains(&inode) && lock.ends_with(" 201 201")) {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Err("qemu-io takes no lock".to_owned())
    };
    let open = opened();
    std::thread::sleep(std::time::Duration::from_millis(100));
    let refused_in_use = imgdm(dir, &["convert", "-O", "raw", "in.qcow2", "out"]).unwrap();
    let nothing = !dir.join("out").exists();
    let shared = imgdm(dir, &["convert", "-U", "-O", "raw", "in.qcow2", "out"]).unwrap();
    drop(writer.stdin.take());
    writer.wait().unwrap();
    open.unwrap();
    refused(&refused_in_use, &[75], &["in.qcow2"]).unwrap();
    assert!(nothing);
    shared.ok().unwrap();
    good(dir, "raw", "out").unwrap();
}
