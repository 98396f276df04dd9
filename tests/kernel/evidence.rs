//! Evidence attachments: what is refused, and what the record says, from before there is a
//! device until after it is gone.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::libc;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::args;
use crate::guest::*;

const LINKS: &str = "/run/imgdm/evidence";

/// An overlay on a raw file whose last sector is partial, and a place for records.
struct Case {
    scratch: Scratch,
    image: PathBuf,
    base: PathBuf,
    report: PathBuf,
}

impl Case {
    #[track_caller]
    fn new(scratch: Scratch) -> Self {
        let base = scratch.create("raw", &[], "base.raw", "2M");
        write_image(&base, "raw", &["write -P 7 0 1M"]);
        fs::OpenOptions::new().append(true).open(&base).unwrap().write_all(b"odd").unwrap();
        let image = scratch.create("qcow2", &["-b", "base.raw", "-F", "raw"], "disk.qcow2", "");
        write_image(&image, "qcow2", &["write -P 1 0 512k", "write -z 600k 100k"]);
        fs::create_dir(scratch.path("records")).unwrap();
        let report = scratch.path("records/disk.json");
        Self { scratch, image, base, report }
    }

    fn files(&self) -> [&Path; 2] {
        [&self.image, &self.base]
    }

    fn option(&self) -> std::ffi::OsString {
        let mut option = std::ffi::OsString::from("--evidence=");
        option.push(&self.report);
        option
    }

    #[track_caller]
    fn attach(&self) -> Device {
        attach(args![self.option(), &self.image])
    }

    #[track_caller]
    fn record(&self) -> Value {
        read(&self.report)
    }
}

#[track_caller]
fn read(path: &Path) -> Value {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text)
        .unwrap_or_else(|error| panic!("{}: {error}: {text}", path.display()))
}

/// The records that are remembered.
fn links() -> Vec<PathBuf> {
    let all = fs::read_dir(LINKS).into_iter().flatten().flatten();
    all.map(|entry| entry.path()).collect()
}

/// A time of `stat`'s (`%X` and the like) as a record has it.
#[track_caller]
fn time(path: &Path, format: &str) -> String {
    let seconds = tool("stat", args!["-c", format!("%.9{format}"), path]);
    let at = format!("@{}", seconds.trim());
    tool("date", ["-u", "-d", &at, "+%Y-%m-%dT%H:%M:%S.%NZ"]).trim().to_owned()
}

#[test]
fn a_record_has_what_other_programs_say_of_files_table_and_device() {
    // A file system that notes every read.
    tool("mount", args!["-o", "remount,strictatime", disk()]);
    let case = Case::new(Scratch::on_disk());
    let sums = case.files().map(sha256);
    for file in case.files() {
        tool("touch", args!["-a", "-d", "2001-02-03", file]);
        tool("touch", args!["-m", "-d", "2002-03-04 05:06:07.123456789", file]);
        drop_caches();
    }
    let times = |file: &Path| ["X", "Y", "Z"].map(|format| time(file, format));
    let before = case.files().map(times);

    let device = attach(args![case.option(), "--hash", &case.image]);
    let record = case.record();
    assert_eq!(fs::metadata(&case.report).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(record["state"], "attached");
    assert_eq!(record["device_sha256"], device.sha256());
    let table = imgdm(args!["table", &case.image]).ok();
    let lines: String = table
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{line}\n"))
        .collect();
    let text = case.scratch.path("records/table");
    fs::write(&text, lines).unwrap();
    assert_eq!(record["table_sha256"], sha256(&text));
    let uuids: Vec<_> = dm_devices().into_iter().map(|(_, uuid)| uuid).collect();
    assert!(uuids.contains(&record["uuid"].as_str().unwrap().to_owned()), "{uuids:?}");
    let formats: Vec<_> =
        record["chain"].as_array().unwrap().iter().map(|layer| &layer["format"]).collect();
    assert_eq!(formats, ["qcow2", "raw"]);
    assert_eq!(
        [&record["chain"][0], &record["chain"][1]].map(|layer| &layer["format_declared"]),
        [false, true]
    );
    assert_eq!(record["attach"]["by"]["uid"], 0);
    let kernel = tool("uname", ["-r"]);
    assert_eq!(record["attach"]["kernel"], kernel.trim());
    let arguments = record["attach"]["arguments"].as_array().unwrap();
    assert!(arguments.contains(&"--hash".into()), "{arguments:?}");
    let listed = imgdm(["list", "--output=json"]).ok();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["evidence"], true);

    device.detach();
    let record = case.record();
    assert_eq!(record["state"], "detached");
    let files = record["files"].as_array().unwrap();
    assert_eq!(files.len(), 2);
    for (index, (file, path)) in files.iter().zip(case.files()).enumerate() {
        assert_eq!(file["path"], path.to_str().unwrap());
        let is = fs::metadata(path).unwrap();
        let (major, minor) = (libc::major(is.dev()), libc::minor(is.dev()));
        for when in ["before", "after"] {
            let state = &file[when];
            assert_eq!(state["sha256"], sums[index], "{when}");
            assert_eq!(state["device"], format!("{major}:{minor}"));
            assert_eq!(state["inode"], is.ino());
            assert_eq!(state["size"], is.size());
            let recorded = ["accessed", "modified", "inode_changed"].map(|key| &state[key]);
            assert_eq!(
                recorded.map(|time| time.as_str().unwrap()),
                [0, 1, 2].map(|at| before[index][at].as_str())
            );
        }
        assert_eq!(file["changed"], serde_json::json!([]));
        assert_eq!(times(path), before[index], "the times of the file itself");
    }
    assert!(links().is_empty());
    tool("mount", args!["-o", "remount,relatime", disk()]);
}

#[test]
fn a_file_that_is_changed_by_force_shows_at_detach_which_detaches_all_the_same() {
    let case = Case::new(Scratch::new());
    let device = case.attach();
    let mtime = time(&case.base, "Y");
    patch(&case.base, 1 << 19, b"forged");
    tool("touch", args!["-m", "-d", &mtime, &case.base]);
    let report = imgdm(["report", "--output=json", &device.name]);
    assert_eq!(report.code(), Some(1), "{report}");
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    assert_eq!(report["now"]["as_recorded"], false);
    assert_eq!(report["now"]["files"][1]["changed"], serde_json::json!(["inode-changed"]));

    let said = imgdm(["detach", &device.name]).refused(1);
    assert!(said.contains("base.raw: changed: content, inode-changed"), "{said}");
    assert_nothing_left();
    let record = case.record();
    assert_eq!(record["state"], "detached");
    assert_eq!(record["files"][0]["changed"], serde_json::json!([]));
    assert_eq!(record["files"][1]["changed"], serde_json::json!(["content", "inode-changed"]));
    assert_eq!(record["files"][1]["after"]["sha256"], sha256(&case.base));
    assert_ne!(record["files"][1]["before"]["sha256"], record["files"][1]["after"]["sha256"]);
    // And whoever asks later is told as well.
    assert_eq!(imgdm(args!["report", &case.report]).code(), Some(1));
}

#[test]
fn a_report_joins_the_record_with_what_is_now() {
    let case = Case::new(Scratch::new());
    let device = case.attach();
    let json = || -> Value {
        serde_json::from_str(&imgdm(["report", "--output=json", &device.name]).stdout).unwrap()
    };
    let report = json();
    assert_eq!(report["record"], case.record());
    let now = &report["now"];
    assert_eq!([&now["attached"], &now["verified"], &now["as_recorded"]], [true, true, true]);
    let human = imgdm(["report", "disk"]).ok();
    for part in ["disk: attached", "nothing can be written to", "(image)", "sha256 "] {
        assert!(human.contains(part), "{part}: {human}");
    }
    // Another table than the image gives, and one that can be written to.
    let table = tool("dmsetup", ["table", "disk"]);
    let (first, rest) = table.split_once('\n').unwrap();
    let (line, offset) = first.rsplit_once(' ').unwrap();
    let offset = offset.parse::<u64>().unwrap() - 8;
    tool("dmsetup", ["suspend", "disk"]);
    tool("dmsetup", ["load", "disk", "--table", format!("{line} {offset}\n{rest}").trim_end()]);
    tool("dmsetup", ["resume", "disk"]);
    let now = json()["now"].take();
    assert_eq!([&now["attached"], &now["verified"], &now["as_recorded"]], [true, false, false]);
    for part in ["is not read-only", "from elsewhere than the image says"] {
        assert!(now["findings"].to_string().contains(part), "{part}: {now}");
    }

    // What goes without imgdm leaves a record that says so.
    tool("dmsetup", ["remove", "--retry", "disk"]);
    assert_nothing_left_soon();
    let said = imgdm(args!["report", &case.report]);
    assert_eq!(said.code(), Some(1), "{said}");
    assert!(said.stdout.contains("went without 'imgdm detach'"), "{said}");
    assert_eq!(case.record()["state"], "attached");
    // The next one of the same image is remembered in its place.
    let second = case.scratch.path("records/second.json");
    attach(args![format!("--evidence={}", second.display()), &case.image]).detach();
    assert_eq!(read(&second)["state"], "detached");
    imgdm(args!["report", &second]).ok();
    assert_eq!(case.record()["state"], "attached");
}

#[test]
fn what_does_not_go_with_evidence_is_refused_and_leaves_nothing() {
    let case = Case::new(Scratch::new());
    let refused = |more: &[&str], code: i32, part: &str| {
        let mut line = args!["attach", case.option()].to_vec();
        line.extend(more.iter().map(std::ffi::OsString::from));
        line.push(case.image.clone().into());
        let said = imgdm(line).refused(code);
        assert!(said.contains(part), "{more:?}: {said}");
        assert!(fs::read_dir(case.scratch.path("records")).unwrap().next().is_none());
        assert!(links().is_empty());
    };
    for option in [
        "--force-share",
        "--direct-block",
        "--allow-changed-backing",
        "--probe-backing",
        "--on-error=zero",
    ] {
        refused(&[option], 64, option);
    }
    let writer = Writer::open(&case.base, "raw");
    refused(&[], 75, "base.raw");
    writer.close();
    // The directory of the files is to stay as it is.
    let mut beside = imgdm_command(args!["attach", "--evidence", &case.image]);
    let said = run(beside.current_dir(case.scratch.directory())).refused(64);
    assert!(said.contains("the directory of the evidence"), "{said}");
    let compressed = case.scratch.path("compressed.qcow2");
    qemu_img(args!["convert", "-c", "-O", "qcow2", &case.image, &compressed]).ok();
    let place = case.scratch.directory();
    let said =
        imgdm(args!["attach", case.option(), "--scratch-dir", place, &compressed]).refused(64);
    assert!(said.contains("the scratch file would be written to the directory"), "{said}");
    // What is there already stays.
    fs::write(&case.report, "mine").unwrap();
    let said = imgdm(args!["attach", case.option(), &case.image]).refused(73);
    assert!(said.contains("there already"), "{said}");
    assert_eq!(fs::read(&case.report).unwrap(), b"mine");
    fs::remove_file(&case.report).unwrap();
    // Attached without a record, it gets none.
    let device = attach([&case.image]);
    let said = imgdm(args!["attach", case.option(), &case.image]).refused(73);
    assert!(said.contains("other options"), "{said}");
    assert!(imgdm(["report", "disk"]).refused(66).contains("without --evidence"));
    device.detach();
}

#[test]
fn attaching_again_keeps_the_record_of_then_and_gives_no_other() {
    let case = Case::new(Scratch::new());
    let device = case.attach();
    let record = case.record();
    let other = case.scratch.path("records/other.json");
    let option = format!("--evidence={}", other.display());
    // Neither another record nor the hash that it has not: both would be missed later.
    for line in [
        args!["attach", option, &case.image].to_vec(),
        args!["attach", "--evidence", "--hash", &case.image].to_vec(),
    ] {
        let said = imgdm(line).refused(75);
        let known = format!("attached already, and its record is {}", case.report.display());
        assert!(said.contains(&known), "{said}");
    }
    assert!(!other.exists());
    assert_eq!(case.attach(), device);
    assert_eq!(attach(args!["--evidence", &case.image]), device);
    assert_eq!(case.record(), record);
    device.detach();
    assert_eq!(case.record()["state"], "detached");
}

#[test]
fn partitions_can_stand_on_evidence_and_go_with_it() {
    let scratch = Scratch::new();
    let image = scratch.create("raw", &[], "disk.raw", "4M");
    sh(&format!("echo start=2048,size=2048,type=83 | sfdisk -q {}", image.display()));
    fs::create_dir(scratch.path("records")).unwrap();
    let report = scratch.path("records/disk.json");
    let option = format!("--evidence={}", report.display());
    let printed = imgdm(args!["attach", &option, "--partitions", &image]).ok();
    assert_eq!(printed, "/dev/mapper/disk\n/dev/mapper/disk1\n");
    let record = read(&report);
    // One more of what is attached already: the record is that of then.
    imgdm(args!["attach", "--evidence", "-p", "1", &image]).ok();
    assert_eq!(read(&report), record);
    let held = fs::File::open("/dev/mapper/disk1").unwrap();
    assert!(imgdm(["detach", "disk"]).refused(75).contains("disk1"));
    assert_eq!(read(&report), record);
    drop(held);
    imgdm(["report", "disk"]).ok();
    imgdm(["detach", "disk"]).ok();
    assert_eq!(read(&report)["state"], "detached");
}

#[test]
fn a_device_in_use_stays_and_so_does_its_record() {
    let case = Case::new(Scratch::new());
    let device = case.attach();
    let record = case.record();
    let held = fs::File::open(&device.path).unwrap();
    for more in [&[][..], &["--deferred"]] {
        let said = imgdm([&["detach", "disk"], more].concat()).refused(75);
        assert!(said.contains("in use"), "{said}");
    }
    assert_eq!(imgdm(["detach", "--all"]).code(), Some(1));
    assert_eq!(case.record(), record);
    drop(held);
    imgdm(["detach", "--all"]).ok();
    assert_eq!(case.record()["state"], "detached");
}

#[test]
fn killed_at_any_step_the_record_says_how_far_it_got() {
    let case = Case::new(Scratch::new());
    let faulty = |line: &[std::ffi::OsString], fault: &str| {
        let mut line = imgdm_command(line);
        run(line.env("IMGDM_FAULT", fault).stdin(Stdio::null()))
    };
    let attaching = args!["attach", case.option(), "--hash", &case.image];
    for (step, state, is_attached) in [
        ("evidence.record", "attaching", false),
        ("top.load", "attaching", false),
        ("evidence.commit", "attaching", true),
        ("evidence.attached", "attached", true),
    ] {
        let ran = faulty(&attaching, &format!("{step}:kill"));
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        assert_eq!(case.record()["state"], state, "{step}");
        let report = imgdm(args!["report", "--output=json", &case.report]);
        let report: Value = serde_json::from_str(&report.stdout).unwrap();
        if !is_attached {
            wait_for("the rest to go", || left(Some(case.scratch.directory())).is_empty());
        }
        assert_eq!(report["now"]["attached"], is_attached, "{step}");
        if is_attached {
            imgdm(["detach", "disk"]).ok();
            assert_eq!(case.record()["state"], "detached", "{step}");
        }
        fs::remove_file(&case.report).unwrap();
    }
    for (step, state, is_attached) in
        [("evidence.detaching", "detaching", true), ("evidence.gone", "detaching", false)]
    {
        case.attach();
        let ran = faulty(&args!["detach", "disk"], &format!("{step}:kill"));
        assert_eq!(ran.signal(), Some(libc::SIGKILL), "{step}: {ran}");
        let record = case.record();
        assert_eq!(record["state"], state, "{step}");
        assert_eq!(record["files"][0]["after"]["sha256"], sha256(&case.image));
        if is_attached {
            imgdm(["detach", "disk"]).ok();
            assert_eq!(case.record()["state"], "detached", "{step}");
        } else {
            assert_nothing_left();
        }
        fs::remove_file(&case.report).unwrap();
    }
    for step in ["evidence.record", "top.load", "evidence.commit", "evidence.attached"] {
        for (action, check) in [("fail", Some(1)), ("term", None)] {
            let ran = faulty(&attaching, &format!("{step}:{action}"));
            assert_eq!(ran.code(), check, "{step}: {ran}");
            assert_nothing_left();
            assert!(!case.report.exists(), "{step}:{action} left a record");
        }
    }
    let left: Vec<_> = fs::read_dir(case.scratch.path("records")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_full_disk_keeps_neither_a_device_without_a_record_nor_one_from_going() {
    let case = Case::new(Scratch::new());
    let small = case.scratch.path("records");
    tool("mount", args!["-t", "tmpfs", "-o", "size=64k", "none", &small]);
    let fill = || {
        let mut file = fs::File::create(small.join("filler")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    fill();
    let said = imgdm(args!["attach", case.option(), &case.image]).refused(73);
    assert!(said.contains("No space left"), "{said}");
    assert!(!case.report.exists());
    assert_nothing_left();

    fs::remove_file(small.join("filler")).unwrap();
    case.attach();
    fill();
    let said = imgdm(["detach", "disk"]).refused(1);
    assert!(said.contains("No space left") && said.contains(LINKS), "{said}");
    assert_nothing_left();
    assert_eq!(case.record()["state"], "attached");
    let [kept] = links().try_into().unwrap();
    assert_eq!(read(&kept)["state"], "detached");
    assert_eq!(read(&kept)["files"][0]["after"]["sha256"], sha256(&case.image));
    imgdm(args!["report", &kept]).ok();
    // Nor does the next attachment of the same image take it away.
    let text = fs::read(&kept).unwrap();
    fs::create_dir(case.scratch.path("elsewhere")).unwrap();
    let next = case.scratch.path("elsewhere/next.json");
    attach(args![format!("--evidence={}", next.display()), &case.image]).detach();
    assert_eq!(fs::read(&kept).unwrap(), text);
    fs::remove_file(kept).unwrap();
    tool("umount", [&small]);
}

#[test]
fn a_closed_pipe_takes_neither_the_device_nor_its_record() {
    let case = Case::new(Scratch::new());
    let (imgdm_path, option) = (imgdm_path(), case.option());
    sh(&format!(
        "(sleep 0.5; exec {} attach {} {}) | true",
        imgdm_path.display(),
        option.display(),
        case.image.display()
    ));
    assert_eq!(case.record()["state"], "attached");
    imgdm(["report", "disk"]).ok();
    imgdm(["detach", "disk"]).ok();
    assert_eq!(case.record()["state"], "detached");
}

#[test]
fn a_device_that_can_not_be_taken_back_keeps_its_record_and_the_cause_is_told() {
    let case = Case::new(Scratch::new());
    let mut line = imgdm_command(args!["attach", case.option(), "--hash", &case.image]);
    let attaching = start(line.env("IMGDM_FAULT", "evidence.attached:stop").stdin(Stdio::null()));
    wait_for("it to stop", || attaching.is_stopped());
    let held = fs::File::open("/dev/mapper/disk").unwrap();
    attaching.signal(Signal::SIGINT);
    attaching.signal(Signal::SIGCONT);
    let ran = attaching.finish();
    assert_eq!(ran.signal(), Some(libc::SIGINT), "{ran}");
    assert!(ran.stderr.contains("/dev/mapper/disk stays"), "{ran}");
    assert_eq!(case.record()["state"], "attached");
    drop(held);
    imgdm(["detach", "disk"]).ok();
    assert_eq!(case.record()["state"], "detached");
}

#[test]
fn a_record_that_went_or_became_something_else_is_an_error_that_keeps_no_device() {
    let case = Case::new(Scratch::new());
    let away = case.scratch.path("away.json");
    for put in ["true", "mkfifo", "ln -s /dev/zero", "truncate -s 1G"] {
        case.attach();
        fs::rename(&case.report, &away).unwrap();
        sh(&format!("{put} {}", case.report.display()));
        let said = imgdm(["--quiet", "detach", "disk"]).refused(1);
        assert!(said.contains("no record was completed"), "{put}: {said}");
        assert_nothing_left();
        let [link] = links().try_into().unwrap();
        assert_eq!(fs::read_link(link).unwrap(), case.report);
        let _ = fs::remove_file(&case.report);
        let report = imgdm(args!["report", &away]);
        assert_eq!(report.code(), Some(1), "{report}");
    }
    for link in links() {
        fs::remove_file(link).unwrap();
    }
}

#[test]
fn who_can_write_to_evidence_is_refused_by_name_and_who_can_not_is_not() {
    let case = Case::new(Scratch::new());
    let refused = |options: &[&str], image: &Path, part: &str| {
        let mut line = args!["attach", case.option()].to_vec();
        line.extend(options.iter().map(std::ffi::OsString::from));
        line.push(image.into());
        let said = imgdm(line).refused(75);
        assert!(said.contains(part), "{said}");
        assert!(!case.report.exists());
        assert_nothing_left();
    };
    let writer = fs::OpenOptions::new().append(true).open(&case.base).unwrap();
    refused(&[], &case.image, &format!("process {}", std::process::id()));
    drop(writer);
    let bound = tool("losetup", args!["-f", "--show", &case.base]);
    refused(&[], &case.image, bound.trim());
    tool("losetup", ["-d", bound.trim()]);
    let reader = fs::File::open(&case.base).unwrap();
    case.attach().detach();
    fs::remove_file(&case.report).unwrap();
    drop(reader);

    let (block, place) = (block_device(), case.scratch.path("mnt"));
    fs::create_dir(&place).unwrap();
    tool("mkfs.ext4", args!["-q", "-F", &block]);
    tool("mount", args![&block, &place]);
    refused(&["-f", "raw", "--name=block"], &block, &format!("the mount {}", place.display()));
    tool("mount", args!["-o", "remount,ro", &place]);
    let device = attach(args![case.option(), "-f", "raw", "--name=block", &block]);
    // That it is used at all is in the record.
    let warnings = case.record()["warnings"].to_string();
    assert!(warnings.contains(place.to_str().unwrap()), "{warnings}");
    device.detach();
    tool("umount", [&place]);
}

#[test]
fn a_report_of_one_who_may_not_ask_the_kernel_says_so() {
    let case = Case::new(Scratch::new());
    case.attach();
    for (path, mode) in [(case.scratch.directory(), 0o755), (&case.report, 0o644)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let user = ["--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let report = |more: &[&str]| {
        let mut line = command("setpriv", user);
        run(line.arg(imgdm_path()).arg("report").args(more).arg(&case.report))
    };
    let ran = report(&[]);
    assert_eq!(ran.code(), Some(1), "{ran}");
    assert!(ran.stdout.contains("can't tell whether it is attached"), "{ran}");
    assert!(!ran.stdout.contains("went without"), "{ran}");
    let now = serde_json::from_str::<Value>(&report(&["--output=json"]).stdout).unwrap();
    assert_eq!(now["now"]["attached"], Value::Null);
    imgdm(["detach", "disk"]).ok();
}

#[test]
fn a_record_that_is_lost_sight_of_is_an_error_or_named() {
    let case = Case::new(Scratch::new());
    let device = case.attach();
    fs::remove_dir_all(LINKS).unwrap();
    assert!(imgdm(["report", "disk"]).refused(66).contains("--record"));
    let named = args!["report", "--record", &case.report, "disk"];
    imgdm(named).ok();
    let said = imgdm(["--quiet", "detach", "disk"]).refused(1);
    assert!(said.contains("no record was completed"), "{said}");
    assert_nothing_left();
    assert_eq!(case.record()["state"], "attached");
    fs::remove_file(&case.report).unwrap();

    assert_eq!(case.attach(), device);
    fs::remove_dir_all(LINKS).unwrap();
    imgdm(args!["detach", "--record", &case.report, "disk"]).ok();
    assert_eq!(case.record()["state"], "detached");
    // It is no record of the next one.
    let other = case.scratch.path("records/other.json");
    attach(args![format!("--evidence={}", other.display()), &case.image]);
    let said = imgdm(args!["detach", "--record", &case.report, "disk"]).refused(64);
    assert!(said.contains("another attachment"), "{said}");
    imgdm(["detach", "disk"]).ok();
    assert_eq!(read(&other)["state"], "detached");
}

#[test]
fn a_file_that_went_from_its_place_is_hashed_through_its_loop_device() {
    let case = Case::new(Scratch::new());
    let image_sum = sha256(&case.image);
    case.attach();
    fs::rename(&case.image, case.scratch.path("moved.qcow2")).unwrap();
    fs::write(&case.image, "another").unwrap();
    let said = imgdm(["detach", "disk"]).refused(1);
    assert!(said.contains("disk.qcow2: another file is at this path"), "{said}");
    let record = case.record();
    assert_eq!(record["files"][0]["after"]["sha256"], image_sum);
    assert_eq!(record["files"][0]["changed"], serde_json::json!([]));
    assert_eq!(record["state"], "detached");

    // The end of one that is not of whole sectors no loop device shows: neither the same nor
    // another.
    fs::remove_file(&case.report).unwrap();
    fs::rename(case.scratch.path("moved.qcow2"), &case.image).unwrap();
    case.attach();
    let moved = case.scratch.path("moved.raw");
    fs::rename(&case.base, &moved).unwrap();
    let said = imgdm(["detach", "disk"]).refused(1);
    assert!(said.contains("unknown") && !said.contains("changed:"), "{said}");
    let file = &case.record()["files"][1];
    assert_eq!([&file["changed"], &file["after"]], [&Value::Null, &Value::Null]);
    let sum = sh(&format!("head -c 2M {} | sha256sum", moved.display()));
    let sum = sum.split_whitespace().next().unwrap();
    assert!(file["problem"].as_str().unwrap().contains(sum), "{file}");
}

#[test]
fn evidence_on_a_block_device_with_a_snapshot_and_compressed_clusters() {
    let scratch = Scratch::new();
    let block = block_device();
    let source = scratch.create("raw", &[], "source.raw", "2M");
    write_image(&source, "raw", &["write -P 5 0 1M"]);
    qemu_img(args!["convert", "-n", "-c", "-O", "qcow2", &source, &block]).code();
    qemu_img(args!["create", "-q", "-f", "qcow2", &block, "2M"]).ok();
    write_image(&block, "qcow2", &["write -c -P 5 0 1M"]);
    qemu_img(args!["snapshot", "-c", "then", &block]).ok();
    write_image(&block, "qcow2", &["write -P 6 0 1M"]);
    let sum = sha256(&block);
    let report = scratch.path("block.json");
    let option = format!("--evidence={}", report.display());
    let device = attach(args![option, "--hash", "-l", "then", "--name", "then", &block]);
    assert!(device.bytes()[..1 << 20].iter().all(|&byte| byte == 5));
    let record = read(&report);
    assert_eq!(record["snapshot"]["name"], "then");
    assert_eq!(record["device_sha256"], device.sha256());
    let hashed = imgdm(args!["hash", "--output=json", "-l", "then", &block]).ok();
    let hashed: Value = serde_json::from_str(&hashed).unwrap();
    assert_eq!(record["device_sha256"], hashed["hashes"]["sha256"]);
    imgdm(["report", "then"]).ok();
    device.detach();
    let file = &read(&report)["files"][0];
    assert_eq!(file["inode"], Value::Null);
    assert_eq!([&file["before"]["sha256"], &file["after"]["sha256"]], [&sum, &sum]);
    imgdm(args!["report", &report]).ok();
}
