//! `imgdm info` beside `qemu-img info`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::check::strings;
use crate::common::images::{LayerMade, scratch_dir};
use crate::common::patch::{
    BACKING_FORMAT, INCOMPATIBLE, L1_OFFSET, Patch, REFCOUNT_OFFSET, SNAPSHOTS_OFFSET,
};
use crate::common::process::{Outcome, Ran};
use crate::common::qemu;
use crate::common::rng::Rng;
use crate::imgdm::{EX_INVALID, EX_MISSING, imgdm, refused};
use crate::luks::{Spec, header, put_aes, put_luks};
use crate::snapshots::same_snapshots;

/// The key of what qemu-img does not say.
const OURS: &str = "imgdm";

pub(crate) fn json(ran: &Ran) -> Outcome<Value> {
    serde_json::from_slice(&ran.stdout).map_err(|error| format!("{error}\n{}", ran.describe()))
}

/// Takes our own key off, which each image must have.
fn without_ours(info: &mut Value) -> Outcome {
    let images: Vec<&mut Value> = match info {
        Value::Array(images) => images.iter_mut().collect(),
        image => vec![image],
    };
    for image in images {
        let removed = image.as_object_mut().and_then(|image| image.remove(OURS));
        let removed = removed.ok_or("an image without our own key")?;
        if !removed["image"]["inode"].is_u64() {
            return Err(format!("no identity: {removed}"));
        }
    }
    Ok(())
}

/// What `imgdm info` prints for people that `qemu-img info` prints too.
fn standard_lines(text: &str) -> String {
    let mut ours = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        let starts = ["Files:", "Notices:"].contains(&line);
        ours = starts || (ours && line.starts_with(' '));
        if !ours {
            lines.push(squeezed(line));
        }
    }
    lines.join("\n")
}

/// A line whose columns may be wider or narrower: QEMU counts bytes, we characters.
pub(crate) fn squeezed(line: &str) -> String {
    let indent = line.len() - line.trim_start().len();
    let words: Vec<_> = line.split_whitespace().collect();
    format!("{}{}", &line[..indent], words.join(" "))
}

/// Both programs with the same arguments.
fn both(dir: &Path, args: &[String]) -> Outcome<(Ran, Ran)> {
    Ok((qemu::img_any(dir, args)?, imgdm(dir, args)?))
}

fn compare(theirs: &Ran, ours: &Ran, is_json: bool) -> Outcome {
    let (theirs, ours) = match is_json {
        true => {
            let mut info = json(ours)?;
            without_ours(&mut info)?;
            let pretty = |value| format!("{value:#}");
            (pretty(json(theirs)?), pretty(info))
        }
        false => {
            let theirs: Vec<_> = theirs.text().lines().map(squeezed).collect();
            (theirs.join("\n"), standard_lines(&ours.text()))
        }
    };
    if theirs.trim() == ours.trim() {
        return Ok(());
    }
    let differs = theirs.lines().zip(ours.lines()).find(|(a, b)| a != b);
    Err(format!("differs at {differs:?}\nqemu-img:\n{theirs}\nimgdm:\n{ours}"))
}

/// `imgdm info` beside `qemu-img info`, JSON and human; `Ok(false)` where both refuse.
///
/// # Errors
/// They differ, or one refuses.
fn same_info(dir: &Path, args: &[&str]) -> Outcome<bool> {
    for output in ["--output=json", "--output=human"] {
        let line = strings(&[&["info", output], args].concat());
        let is_json = output.ends_with("json");
        let (theirs, ours) = both(dir, &line)?;
        match (theirs.status.success(), ours.status.success()) {
            (false, false) => return Ok(false),
            (true, true) => {}
            _ => return Err(format!("one failed:\n{}{}", theirs.describe(), ours.describe())),
        }
        let Err(difference) = compare(&theirs, &ours, is_json) else { continue };
        // A file that was just written may be allocated a moment later.
        let (again, ours) = both(dir, &line)?;
        if again.stdout == theirs.stdout {
            return Err(format!("{line:?}: {difference}"));
        }
        compare(&again, &ours, is_json).map_err(|error| format!("{line:?}: {error}"))?;
    }
    Ok(true)
}

#[track_caller]
pub(crate) fn assert_same(dir: &Path, args: &[&str]) {
    assert!(same_info(dir, args).unwrap(), "{args:?}: refused by both");
}

/// What is known of a random chain, and of its top layer alone.
///
/// # Errors
/// It is not as qemu-img has it.
pub(crate) fn check_info(dir: &Path, top: &LayerMade, rng: &mut Rng) -> Outcome {
    let absolute = dir.join(&top.file).to_string_lossy().into_owned();
    let file = if rng.percent(50) { &top.file } else { &absolute };
    let mut args = if rng.percent(50) { vec!["-f", top.format] } else { vec![] };
    args.push(file);
    let alone = same_info(dir, &args)?;
    args.insert(0, "--backing-chain");
    if !alone || !same_info(dir, &args)? {
        return Err("qemu-img refused an image of its own".to_owned());
    }
    if top.format == "qcow2" { same_snapshots(dir, file, None) } else { Ok(()) }
}

pub(crate) fn create(dir: &Path, options: &str, backing: Option<(&str, &str)>, file: &str) {
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    if let Some((name, format)) = backing {
        args.extend(["-u", "-b", name, "-F", format]);
    }
    args.extend([file, "3M"]);
    qemu::img(dir, &args).unwrap();
}

#[test]
fn every_option_of_qcow2_is_shown_as_qemu_img_shows_it() {
    let dir = scratch_dir("info").unwrap();
    let dir = dir.path();
    for options in [
        "",
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "refcount_bits=1",
        "refcount_bits=64,lazy_refcounts=on",
        "compression_type=zstd",
        "preallocation=metadata",
        "data_file=x.data",
        "data_file=y.data,data_file_raw=on,extended_l2=on,cluster_size=16k",
    ] {
        create(dir, options, None, "x.qcow2");
        assert_same(dir, &["x.qcow2"]);
        assert_same(dir, &["--backing-chain", "-f", "qcow2", "x.qcow2"]);
        // As raw it is a disk like any other.
        assert_same(dir, &["-f", "raw", "x.qcow2"]);
    }
    // The data file is not asked for, and need not be there.
    let ours = |dir| {
        let ran = imgdm(dir, &["info", "--output=json", "x.qcow2"]).unwrap().ok().unwrap();
        json(&ran).unwrap()[OURS].clone()
    };
    let path = dir.join("y.data").canonicalize().unwrap();
    assert_eq!(ours(dir)["data-file"]["path"], path.to_str().unwrap());
    fs::remove_file(path).unwrap();
    assert_same(dir, &["x.qcow2"]);
    assert_eq!(ours(dir)["notices"][0]["kind"], "no-data-file");
}

#[test]
fn raw_files_of_any_length_have_whole_sectors() {
    let dir = scratch_dir("info-raw").unwrap();
    for length in [0, 1, 511, 512, 513, 999, 1000, 1_023_488, 1_024_000, 5_000_001] {
        let file = fs::File::create(dir.path().join("x.raw")).unwrap();
        file.set_len(length).unwrap();
        assert_same(dir.path(), &["-f", "raw", "x.raw"]);
        let ran = imgdm(dir.path(), &["info", "--output=json", "x.raw"]).unwrap().ok().unwrap();
        assert_eq!(json(&ran).unwrap()[OURS]["image"]["length"], length);
    }
}

#[test]
fn encryption_is_shown_as_qemu_img_shows_it() {
    let dir = scratch_dir("info-crypt").unwrap();
    let dir = dir.path();
    // With two slots, as qemu-img makes them.
    let secrets = ["--object", "secret,id=s0,data=abc", "--object", "secret,id=s1,data=def"];
    let luks = "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s0";
    let args = [&["create", "-q", "-f", "qcow2"], &secrets[..2], &["-o", luks, "x", "1M"]];
    qemu::img(dir, &args.concat()).unwrap();
    let add = "encrypt.state=active,encrypt.new-secret=s1,encrypt.iter-time=10";
    let image = "driver=qcow2,file.driver=file,file.filename=x,encrypt.key-secret=s0";
    let args = [&["amend"], &secrets[..], &["--image-opts", "-o", add, image]];
    qemu::img(dir, &args.concat()).unwrap();
    assert_same(dir, &["x"]);
    let info = json(&imgdm(dir, &["info", "--output=json", "x"]).unwrap()).unwrap();
    let slots = &info["format-specific"]["data"]["encrypt"]["slots"];
    assert_eq!((&slots[1]["active"], &slots[2]["active"]), (&true.into(), &false.into()));

    for (cipher, key_bytes, mode, hash) in [
        ("aes", 16, "ecb-plain", "md5"),
        ("aes", 24, "cbc-plain64", "sha1"),
        ("aes", 32, "cbc-essiv:sha256", "sha224"),
        ("aes", 32, "xts-plain64", "sha384"),
        ("aes", 64, "xts-plain64", "sha512"),
        ("serpent", 32, "ctr-plain64", "ripemd160"),
        ("twofish", 32, "xts-plain", "sha256"),
        ("cast5", 16, "cbc-plain64", "sha256"),
    ] {
        create(dir, "", None, "luks");
        let spec = Spec { cipher, key_bytes, mode: mode.to_owned(), hash };
        put_luks(&dir.join("luks"), &header(&spec, &[(0, b"a"), (3, b"b"), (7, b"c")], 1)).unwrap();
        assert_same(dir, &["luks"]);
    }
    for (file, options) in [("v2", "compat=0.10"), ("v3", "")] {
        create(dir, options, None, file);
        put_aes(&dir.join(file)).unwrap();
        assert_same(dir, &[file]);
    }
    qemu::img(dir, &["create", "-q", "-f", "qcow", "qcow", "1M"]).unwrap();
    assert_same(dir, &["qcow"]);
    put_aes(&dir.join("qcow")).unwrap();
    assert_same(dir, &["--backing-chain", "qcow"]);
}

#[test]
fn backing_names_are_spelled_as_qemu_img_spells_them() {
    let dir = scratch_dir("info-names").unwrap();
    let dir = dir.path();
    fs::create_dir(dir.join("sub")).unwrap();
    create(dir, "", None, "base");
    qemu::img(dir, &["snapshot", "-c", "s", "base"]).unwrap();
    let absolute = dir.join("base").to_string_lossy().into_owned();
    let in_file = format!("file:{absolute}");
    let in_json = format!(r#"json:{{"driver":"qcow2","file.filename":"{absolute}"}}"#);
    for name in [absolute.as_str(), in_file.as_str(), in_json.as_str()] {
        for top in ["top", "sub/top"] {
            create(dir, "", Some((name, "qcow2")), top);
            assert_same(dir, &[top]);
            assert_same(dir, &["--backing-chain", top]);
        }
    }
    create(dir, "", Some(("base", "qcow2")), "top");
    create(dir, "", Some(("../top", "qcow2")), "sub/upper");
    let top = dir.join("sub/upper").to_string_lossy().into_owned();
    for top in ["sub/upper", "./sub/upper", "sub/../sub/upper", top.as_str(), "file:sub/upper"] {
        assert_same(dir, &["--backing-chain", top]);
    }
    let argument = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"sub/upper"}}"#;
    assert_same(dir, &["--backing-chain", argument]);

    // Names that lead nowhere are only opened for the chain.
    for name in ["gone", "./sub/gone", "nbd:localhost:1", "a b", "überblick", "a\x07\"\\b"] {
        create(dir, "", Some((name, "raw")), "lost");
        let human = imgdm(dir, &["info", "lost"]).unwrap().ok().unwrap();
        assert!(!human.stdout.contains(&7), "{}", human.describe());
        if !name.contains('\x07') {
            assert_same(dir, &["lost"]);
        }
        let line = strings(&["info", "--output=json", "lost"]);
        let (theirs, ours) = both(dir, &line).unwrap();
        compare(&theirs, &ours, true).unwrap();
        assert!(!same_info(dir, &["--backing-chain", "lost"]).unwrap());
        let ran = imgdm(dir, &["info", "--backing-chain", "lost"]).unwrap();
        refused(&ran, &[EX_MISSING, EX_INVALID], &["lost"]).unwrap();
        assert!(ran.stdout.is_empty());
    }

    // A name that is no text.
    create(dir, "", Some(("xyz", "raw")), "odd");
    let image = Patch::open(&dir.join("odd")).unwrap();
    let at = image.u64(crate::common::patch::BACKING_OFFSET).unwrap();
    image.put(at + 1, b"\xff").unwrap();
    assert_same(dir, &["odd"]);
    let ran = imgdm(dir, &["info", "--output=json", "odd"]).unwrap().ok().unwrap();
    assert_eq!(json(&ran).unwrap()[OURS]["backing"]["path_bytes"], "78ff7a");
}

#[test]
fn a_backing_format_that_nobody_declared_is_probed_with_a_notice() {
    let dir = scratch_dir("info-undeclared").unwrap();
    let dir = dir.path();
    create(dir, "", None, "base");
    create(dir, "", Some(("base", "qcow2")), "top");
    let image = Patch::open(&dir.join("top")).unwrap();
    image.forget_extension(BACKING_FORMAT).unwrap();
    assert_same(dir, &["top"]);
    assert_same(dir, &["--backing-chain", "top"]);
    let chain = imgdm(dir, &["info", "--backing-chain", "--output=json", "top"]).unwrap();
    let notices = &json(&chain).unwrap()[1][OURS]["notices"];
    assert_eq!(notices[0]["kind"], "undeclared-backing-format", "{notices}");
    qemu::img(dir, &["create", "-q", "-f", "qcow", "-b", "base", "-F", "qcow2", "old"]).unwrap();
    assert_same(dir, &["--backing-chain", "old"]);
}

#[test]
fn a_chain_that_runs_in_a_circle_is_refused_and_its_images_alone_are_not() {
    let dir = scratch_dir("info-circle").unwrap();
    let dir = dir.path();
    create(dir, "", Some(("b", "qcow2")), "a");
    create(dir, "", Some(("a", "qcow2")), "b");
    assert_same(dir, &["a"]);
    assert!(!same_info(dir, &["--backing-chain", "a"]).unwrap());
    let ran = imgdm(dir, &["info", "--backing-chain", "a"]).unwrap();
    refused(&ran, &[EX_INVALID], &["circle"]).unwrap();
    // qemu-img goes by the name, and would open this one over and over.
    create(dir, "", Some(("./a", "qcow2")), "a");
    let ran = imgdm(dir, &["info", "--backing-chain", "a"]).unwrap();
    refused(&ran, &[EX_INVALID], &["circle"]).unwrap();
}

#[test]
fn bitmaps_are_shown_with_their_flags() {
    let dir = scratch_dir("info-bitmaps").unwrap();
    let dir = dir.path();
    create(dir, "", None, "x");
    for more in [
        &["one"][..],
        &["--disable", "two"],
        &["-g", "512", "three"],
        &["-g", "1M", "überblick \u{7f}"],
    ] {
        let (options, name) = more.split_at(more.len() - 1);
        let line = [&["bitmap", "--add", "-f", "qcow2"], options, &["x"], name].concat();
        qemu::img(dir, &line).unwrap();
    }
    // For people a control character is escaped.
    let line = strings(&["info", "--output=json", "x"]);
    let (theirs, ours) = both(dir, &line).unwrap();
    compare(&theirs, &ours, true).unwrap();
    assert!(imgdm(dir, &["info", "x"]).unwrap().text().contains("überblick \\u{7f}"));

    // One that was not saved cleanly.
    let bitmaps = ours_bitmaps(dir);
    let image = Patch::open(&dir.join("x")).unwrap();
    let (_, at, _) =
        *image.extensions().unwrap().iter().find(|each| each.0 == 0x2385_2875).unwrap();
    let directory = image.u64(at + 16).unwrap();
    image.put_u32(directory + 12, 3).unwrap();
    let (theirs, ours) = both(dir, &line).unwrap();
    compare(&theirs, &ours, true).unwrap();
    assert_ne!(ours_bitmaps(dir), bitmaps);
    // One that nobody has to believe.
    image.put_u64(88, 0).unwrap();
    assert_same(dir, &["x"]);
    assert_eq!(ours_bitmaps(dir), Value::Null);
}

fn ours_bitmaps(dir: &Path) -> Value {
    let ran = imgdm(dir, &["info", "--output=json", "x"]).unwrap().ok().unwrap();
    json(&ran).unwrap()["format-specific"]["data"]["bitmaps"].clone()
}

#[test]
fn what_qemu_img_opens_damaged_is_shown_damaged() {
    let dir = scratch_dir("info-damaged").unwrap();
    let dir = dir.path();
    create(dir, "", None, "base");
    for (at, value, kinds) in [
        (INCOMPATIBLE, 1, &["dirty"][..]),
        (INCOMPATIBLE, 3, &["dirty", "corrupt"]),
        (L1_OFFSET, 1 << 50, &["damaged"]),
        (L1_OFFSET, 0, &["damaged"]),
        (REFCOUNT_OFFSET, 1 << 50, &["damaged"]),
    ] {
        fs::copy(dir.join("base"), dir.join("x")).unwrap();
        Patch::open(&dir.join("x")).unwrap().put_u64(at, value).unwrap();
        assert_same(dir, &["x"]);
        let ran = imgdm(dir, &["info", "--output=json", "x"]).unwrap().ok().unwrap();
        let info = json(&ran).unwrap();
        let found = info[OURS]["notices"].as_array().unwrap().iter();
        let found: Vec<_> = found.map(|notice| notice["kind"].as_str().unwrap()).collect();
        assert_eq!(found, kinds, "{info}");
    }
}

#[test]
fn whatever_a_byte_of_the_header_becomes_what_qemu_img_opens_is_the_same() {
    let dir = scratch_dir("info-bytes").unwrap();
    let dir = dir.path();
    create(dir, "", None, "base");
    create(dir, "", Some(("base", "qcow2")), "x");
    qemu::img(dir, &["snapshot", "-c", "s", "x"]).unwrap();
    qemu::img(dir, &["bitmap", "--add", "x", "b"]).unwrap();
    let image = Patch::open(&dir.join("x")).unwrap();
    let mut rng = Rng::new(11);
    let table = image.u64(SNAPSHOTS_OFFSET).unwrap();
    let end = image.u64(crate::common::patch::BACKING_OFFSET).unwrap() + 4;
    let mut opened = 0;
    for case in 0..260 {
        let at = if case % 8 == 0 { table + rng.below(72) } else { rng.below(end) };
        let [before] = image.bytes(at).unwrap();
        let after =
            if rng.percent(50) { before ^ 1 << rng.below(8) } else { rng.next().to_le_bytes()[0] };
        image.put(at, &[after]).unwrap();
        let line = strings(&["info", "--output=json", "x"]);
        let (theirs, ours) = both(dir, &line).unwrap();
        if theirs.status.success() {
            opened += 1;
            let ours = ours.ok().unwrap();
            // QEMU reads zeros past the end of the file, and takes them for a snapshot.
            let notices = json(&ours).unwrap()[OURS]["notices"].to_string();
            let outside = notices.contains("the snapshot table") && notices.contains("outside");
            let theirs = if outside { without_made_up_snapshots(theirs) } else { theirs };
            compare(&theirs, &ours, true)
                .unwrap_or_else(|error| panic!("byte {at:#x}: {before:#x} to {after:#x}: {error}"));
        }
        image.put(at, &[before]).unwrap();
    }
    assert!(opened > 100, "{opened}");
}

fn without_made_up_snapshots(mut theirs: Ran) -> Ran {
    let mut info = json(&theirs).unwrap();
    let list = info["snapshots"].as_array_mut().unwrap();
    let before = list.len();
    list.retain(|snapshot| snapshot["id"] != "");
    assert!(list.len() < before);
    if list.is_empty() {
        info.as_object_mut().unwrap().remove("snapshots");
    }
    theirs.stdout = info.to_string().into_bytes();
    theirs
}

/// A qemu-io that holds the image until it is dropped.
struct Held(Child);

impl Held {
    fn open(dir: &Path, more: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.current_dir(dir).args(["-f", "qcow2"]).args(more);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("qemu-io");
        // It prompts once it has opened the image and done this.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
        let mut seen = Vec::from(answer);
        while !seen.ends_with(b"MiB") {
            child.stdout.as_mut().unwrap().read_exact(&mut answer).unwrap();
            seen.extend(answer);
        }
        Self(child)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn locks_of_others_are_listed_with_who_holds_them() {
    let dir = scratch_dir("info-locks").unwrap();
    let dir = dir.path();
    create(dir, "data_file=x.data", None, "x");
    let locks = |file: &str, more: &[&str]| {
        let args = [&["info", "--output=json"], more, &["x"]].concat();
        let info = json(&imgdm(dir, &args).unwrap().ok().unwrap()).unwrap();
        info[OURS][file]["locks"].as_array().unwrap().clone()
    };
    let bytes = |locks: &[Value]| -> Vec<_> {
        locks.iter().map(|lock| lock["byte"].as_u64().unwrap()).collect()
    };
    assert!(bytes(&locks("image", &[])).is_empty());

    let writer = Held::open(dir, &["x"]);
    // Both programs are kept out, but for -U.
    assert!(!same_info(dir, &["x"]).unwrap());
    let ran = imgdm(dir, &["info", "x"]).unwrap();
    assert_eq!(ran.code(), Some(75), "{}", ran.describe());
    assert_eq!(imgdm(dir, &["snapshots", "x"]).unwrap().code(), Some(75));
    assert_same(dir, &["-U", "x"]);
    imgdm(dir, &["snapshots", "-U", "x"]).unwrap().ok().unwrap();
    for file in ["image", "data-file"] {
        let found = locks(file, &["-U"]);
        assert!(bytes(&found).starts_with(&[100, 101]), "{found:?}");
        let write = found.iter().find(|lock| lock["byte"] == 101).unwrap();
        assert_eq!((&write["permission"], &write["claim"]), (&"write".into(), &"uses".into()));
        assert_eq!(write["holders"][0]["pid"], writer.0.id());
        assert_eq!(write["holders"][0]["command"], "qemu-io");
    }
    let human = imgdm(dir, &["info", "-U", "x"]).unwrap().text();
    let line = format!("byte 101: qemu-io (pid {}) uses 'write'", writer.0.id());
    assert!(human.contains(&line), "{human}");
    drop(writer);

    let reader = Held::open(dir, &["-r", "x"]);
    assert_same(dir, &["x"]);
    let found = locks("image", &[]);
    assert_eq!(bytes(&found), [100, 201, 203]);
    assert_eq!(found[1]["claim"], "does-not-share");
    assert_eq!(found[1]["holders"][0]["pid"], reader.0.id());
}

#[test]
fn a_name_of_any_bytes_is_given_whole() {
    let dir = scratch_dir("info-bytes-name").unwrap();
    let name = std::ffi::OsStr::from_bytes(b"a\xffb\x1b");
    fs::write(dir.path().join(name), [0; 512]).unwrap();
    let ran = imgdm(dir.path(), &[Path::new("info").as_os_str(), name]).unwrap().ok().unwrap();
    assert!(!ran.stdout.contains(&0x1b), "{}", ran.describe());
    let line = ["info".as_ref(), "--output=json".as_ref(), name];
    let info = json(&imgdm(dir.path(), &line).unwrap().ok().unwrap()).unwrap();
    let bytes = info[OURS]["image"]["path_bytes"].as_str().unwrap();
    assert!(bytes.ends_with("61ff621b"), "{bytes}");
    let line: [&std::ffi::OsStr; 3] = ["info".as_ref(), "--output=json".as_ref(), name];
    let theirs = json(&qemu::img(dir.path(), &line).unwrap()).unwrap();
    assert_eq!(theirs["filename"], info["filename"]);
}
